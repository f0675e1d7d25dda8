"""Benchmark lines of core member_statistics: all statistics of an ensemble's predictions.

Bytes: the logits read once, mean and variance written; backward reads the logits and writes their gradient.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bench.case import Case, Spec, in_double, step
from solera.ensemble import ensemble_statistics

SMOOTH = ("mean", "variance", "total_entropy", "aleatoric", "mutual_information")


def eager(z):
    """The definitions, as they are written today."""
    p = z.softmax(-1)
    mean = p.mean(1)
    total = torch.special.entr(mean).sum(-1)
    aleatoric = torch.special.entr(p).sum(-1).mean(1)
    return mean, p.var(1, correction=0), total, aleatoric, total - aleatoric


def eager_with_votes(z):
    members = z.shape[1]
    top = z.argmax(-1)
    ones = torch.ones_like(top, dtype=z.dtype)
    counts = z.new_zeros(z.shape[0], z.shape[2]).scatter_add_(1, top, ones)
    apart = 1 - (counts * (counts - 1)).sum(1) / (members * (members - 1))
    return *eager(z), apart, counts.argmax(1)


def _case(shape, dtype: torch.dtype, backward: bool, device: str) -> Case:
    z = torch.randn(*shape, device=device).to(dtype).requires_grad_(backward)
    rows, _, width = shape
    size = z.element_size()
    formula = eager if backward else eager_with_votes
    outputs = {"outputs": SMOOTH} if backward else {}
    ours = lambda z: tuple(ensemble_statistics(z, **outputs).values())
    grads = None
    if backward:
        grads = [torch.randn_like(t) for t in eager(z.detach())]
    wide = None if grads is None else [g.double() for g in grads]
    written = 2 * rows * width * size + (z.numel() * size if backward else 0)
    return Case(
        ours=step(ours, (z,), grads),
        exact=in_double(lambda t: step(formula, (t,), wide), (z,)),
        eager=step(formula, (z,), grads),
        compiled=step(torch.compile(formula), (z,), grads),
        bytes=z.numel() * size * (2 if backward else 1) + written,
        written=written,
    )


def specs(device: str) -> Iterator[Spec]:
    for shape, backward, targets in (
        ((8192, 32, 100), False, {"eager": 20.0, "compile": 3.5}),
        ((8192, 32, 100), True, {}),
        ((64, 8, 50257), False, {}),
    ):
        rows, members, width = shape
        yield Spec(
            op="ensemble.ensemble_statistics",
            label=f"{'fwd+bwd' if backward else 'fwd'} {rows}x{members}x{width}",
            dtype=torch.float32,
            make=lambda s=shape, b=backward: _case(s, torch.float32, b, device),
            targets=targets,
            quick=bool(targets),
        )
