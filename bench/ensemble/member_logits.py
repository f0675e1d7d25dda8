"""Benchmark lines of core member_logits: cross-entropy of an ensemble over a vocabulary.

Bytes: the logits read once and a gradient of their size written.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from bench.case import Case, Spec, in_double, step
from solera.ensemble import ensemble_cross_entropy

MAIN = (512, 8, 50257)
SMALL = (64, 8, 50257)  # an eighth of it, for --quick


def eager(z, y, combine):
    """As it is written today."""
    if combine == "logit":
        return F.cross_entropy(z.mean(1), y)
    members = z.shape[1]
    at = y[:, None, None].expand(-1, members, 1)
    picked = z.log_softmax(-1).gather(2, at)[..., 0]
    if combine == "probability":
        return -(picked.logsumexp(1) - torch.tensor(float(members)).log()).mean()
    return -picked.mean()


def _case(shape, dtype: torch.dtype, combine: str, device: str) -> Case:
    rows, _, width = shape
    z = torch.randn(*shape, device=device).to(dtype).requires_grad_()
    y = torch.randint(width, (rows,), device=device)

    def steps(function):
        one = torch.ones((), device=device)
        return lambda t: step(lambda v: function(v, y, combine), (t,), [one.to(t.dtype)])

    return Case(
        ours=steps(lambda v, y, c: ensemble_cross_entropy(v, y, combine=c))(z),
        exact=in_double(steps(eager), (z,)),
        eager=steps(eager)(z),
        compiled=steps(torch.compile(eager))(z),
        bytes=2 * z.numel() * z.element_size(),
        written=z.numel() * z.element_size(),
    )


def specs(device: str) -> Iterator[Spec]:
    targets = {"eager": 4.0, "compile": 2.0}
    for combine in ("probability", "logit", "log_probability"):
        yield Spec(
            op="ensemble.ensemble_cross_entropy",
            label=f"fwd+bwd {combine} K=8 512x50257",
            dtype=torch.float32,
            make=lambda c=combine: _case(MAIN, torch.float32, c, device),
            targets=targets,
            quick=False,
        )
    yield Spec(
        op="ensemble.ensemble_cross_entropy",
        label="fwd+bwd probability K=8 512x50257",
        dtype=torch.bfloat16,
        make=lambda: _case(MAIN, torch.bfloat16, "probability", device),
        quick=False,
    )
    yield Spec(
        op="ensemble.ensemble_cross_entropy",
        label="fwd+bwd probability K=8 64x50257",
        dtype=torch.float32,
        make=lambda: _case(SMALL, torch.float32, "probability", device),
        targets={"eager": 4.0},
    )
