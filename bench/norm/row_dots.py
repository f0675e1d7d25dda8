"""Benchmark lines of core row_dots: the loss on feature norm and direction."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from bench.case import Case, Spec, in_double, step
from solera.norm import feature_direction_loss

ROWS, WIDTH, CLASSES = 16384, 1024, 1000


def _direction(dtype: torch.dtype, device: str) -> Case:
    teacher = torch.randn(ROWS, WIDTH, device=device).to(dtype)
    student = (0.9 * torch.randn(ROWS, WIDTH, device=device)).to(dtype).requires_grad_()
    centers = torch.randn(CLASSES, WIDTH, device=device).to(dtype)
    y = torch.randint(CLASSES, (ROWS,), device=device)

    def eager(s, t, c):
        longest = torch.maximum(s.norm(dim=1), t.norm(dim=1))
        return (1 - (s * F.normalize(c, dim=1)[y]).sum(1) / longest).mean()

    def steps(function):
        one = torch.ones((), device=device)
        constants = lambda s, t, c: step(lambda v: function(v, t, c), (s,), [one.to(s.dtype)])
        return constants

    inputs = (student, teacher, centers)
    return Case(
        ours=steps(lambda s, t, c: feature_direction_loss(s, t, c, y))(*inputs),
        exact=in_double(steps(eager), inputs),
        eager=steps(eager)(*inputs),
        compiled=steps(torch.compile(eager))(*inputs),
        # Student and gathered centres twice, the teacher and the gradient once.
        bytes=6 * student.numel() * student.element_size(),
    )


def specs(device: str) -> Iterator[Spec]:
    for dtype in (torch.float32, torch.bfloat16):
        yield Spec(
            op="norm.feature_direction_loss",
            label=f"fwd+bwd {ROWS}x{WIDTH}, {CLASSES} classes",
            dtype=dtype,
            make=lambda dtype=dtype: _direction(dtype, device),
        )
