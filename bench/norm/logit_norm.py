"""Benchmark lines of core logit_norm: losses over a vocabulary's logits."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from bench.case import Case, Spec, in_double, step
from solera.norm import stablemax_cross_entropy, z_loss


def _z(x, y):
    z = (x - x.mean(1, keepdim=True)) / x.std(1, correction=0, keepdim=True)
    return F.softplus(0.5 * (2.0 - z.gather(1, y[:, None])[:, 0])).mean() / 0.5


def _stablemax(x, y):
    s = torch.where(x >= 0, x + 1, 1 / (1 - x.clamp(max=0)))
    return -(s.gather(1, y[:, None])[:, 0] / s.sum(1)).log().mean()


FORMS = {
    "z_loss": (lambda x, y: z_loss(x, y, a=0.5, b=2.0), _z),
    "stablemax_cross_entropy": (stablemax_cross_entropy, _stablemax),
}


def _case(name: str, dtype: torch.dtype, device: str) -> Case:
    rows, width = 512, 32000
    x = torch.randn(rows, width, device=device).to(dtype).requires_grad_()
    y = torch.randint(width, (rows,), device=device)
    ours, eager = FORMS[name]

    def steps(function):
        one = torch.ones((), device=device)
        return lambda t: step(lambda v: function(v, y), (t,), [one.to(t.dtype)])

    return Case(
        ours=steps(ours)(x),
        exact=in_double(steps(eager), (x,)),
        eager=steps(eager)(x),
        compiled=steps(torch.compile(eager))(x),
        bytes=3 * x.numel() * x.element_size(),
    )


def specs(device: str) -> Iterator[Spec]:
    for name in FORMS:
        for dtype in (torch.float32, torch.bfloat16):
            yield Spec(
                op=f"norm.{name}",
                label="fwd+bwd 512x32000",
                dtype=dtype,
                make=lambda name=name, dtype=dtype: _case(name, dtype, device),
                quick=False,
            )
