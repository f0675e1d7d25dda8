"""Benchmark lines of normalized_softmax_cross_entropy: a face recogniser's head."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from bench.case import Case, Spec, in_double, step
from solera.norm import normalized_softmax_cross_entropy

SHAPE = (512, 512, 70722)  # B, d, C


def _plain(x, weight, y):
    cosine = F.normalize(x) @ F.normalize(weight).t()
    hot = F.one_hot(y, weight.shape[0]).to(cosine.dtype)
    return F.cross_entropy(64.0 * (cosine - 0.35 * hot), y)


def _case(dtype: torch.dtype, device: str) -> Case:
    rows, d, classes = SHAPE
    x = torch.randn(rows, d, device=device).to(dtype).requires_grad_()
    weight = torch.randn(classes, d, device=device).to(dtype).requires_grad_()
    y = torch.randint(classes, (rows,), device=device)

    def steps(function, out=None):
        def build(a, b):
            one = torch.ones((), device=device, dtype=out or a.dtype)
            return step(lambda p, q: function(p, q, y), (a, b), [one])

        return build

    ours = lambda p, q, y: normalized_softmax_cross_entropy(p, q, y, scale=64.0, margin=0.35)
    return Case(
        ours=steps(ours, torch.float32)(x, weight),
        exact=in_double(steps(_plain), (x, weight)),
        eager=steps(_plain)(x, weight),
        bytes=3 * weight.numel() * weight.element_size(),
        flops=6 * rows * d * classes,
    )


def specs(device: str) -> Iterator[Spec]:
    for dtype, goal in ((torch.float32, 1.0), (torch.bfloat16, 2.5)):
        yield Spec(
            op="norm.normalized_softmax_cross_entropy",
            label="margin fwd+bwd 512x512x70722",
            dtype=dtype,
            make=lambda dtype=dtype: _case(dtype, device),
            quick=False,  # a float64 reference of this size alone takes a tenth of the quick form's time
            targets={"eager": goal},
        )
