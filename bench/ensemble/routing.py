"""Benchmark lines of core routing: uncertainties, windows and merges beside the torch calls they replace."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bench.case import Case, Spec, in_double, step
from solera.ensemble import cascade_merge_, uncertainty_scores, window_exit


def _eager_scores(x: Tensor) -> tuple[Tensor, ...]:
    p, log_p = x.softmax(-1), x.log_softmax(-1)
    two = p.topk(2, dim=-1).values
    return p.amax(-1), -(p * log_p).sum(-1), -x.logsumexp(-1), two[..., 0] - two[..., 1]


def _scores(device: str, rows: int, classes: int, backward: bool) -> Case:
    x = 3 * torch.randn(rows, classes, device=device)
    x.requires_grad_(backward)
    grads = [torch.randn(rows, device=device) for _ in range(4)] if backward else None
    compiled = torch.compile(_eager_scores)

    def exact(x: Tensor):
        return step(_eager_scores, (x,), None if grads is None else [g.double() for g in grads])

    return Case(
        ours=step(uncertainty_scores, (x,), grads),
        exact=in_double(exact, (x,)),
        eager=step(_eager_scores, (x,), grads),
        compiled=step(compiled, (x,), grads),
        bytes=4 * rows * classes * (3 if backward else 1),
        written=4 * rows * classes if backward else 16 * rows,
        # The formulas' own rounding where one class has nearly all the mass.
        tolerance=2e-6,
    )


def _window(device: str, rows: int, classes: int) -> Case:
    x = 3 * torch.randn(rows, classes, device=device)

    def eager(x: Tensor):
        u = -(x.softmax(-1) * x.log_softmax(-1)).sum(-1)
        done = (u > 1.5) | (u < 0.2)
        return (~done).nonzero().flatten().double()

    def ours(x: Tensor):
        _, index, count = window_exit(x, 0.2, 1.5, "entropy")
        return index[: int(count)].double()

    return Case(
        ours=step(ours, (x,)),
        exact=step(eager, (x,)),
        eager=step(eager, (x,)),
        bytes=4 * rows * classes + 9 * rows,
    )


def _merge(device: str, rows: int, classes: int) -> Case:
    """The public code's merge multiplies both whole outputs by masks; ours touches the rows that came back."""
    first = torch.randn(rows, classes, device=device)
    index = torch.arange(0, rows, 4, device=device)
    second = torch.randn(len(index), classes, device=device)
    held = first.clone()

    def ours(first: Tensor, second: Tensor):
        held[index] = first[index]
        return cascade_merge_(held, second, index, "replace")

    def eager(first: Tensor, second: Tensor):
        done = torch.ones(rows, 1, dtype=first.dtype, device=device)
        done[index] = 0.0
        spread = torch.zeros_like(first)
        spread[index] = second
        return done * first + (1 - done) * spread

    return Case(
        ours=step(ours, (first, second)),
        exact=in_double(lambda *t: step(eager, t), (first, second)),
        eager=step(eager, (first, second)),
        bytes=2 * second.nbytes + 8 * len(index),
    )


def specs(device: str) -> Iterator[Spec]:
    for rows, classes in ((8192, 100), (512, 50257)):
        for backward in (False, True):
            yield Spec(
                op="ensemble.uncertainty_scores",
                label=f"{'fwd+bwd' if backward else 'fwd'} {rows}x{classes}",
                dtype=torch.float32,
                make=lambda r=rows, c=classes, b=backward: _scores(device, r, c, b),
                quick=classes == 100,
            )
    yield Spec(
        "ensemble.window_exit", "65536x100", torch.float32, lambda: _window(device, 65536, 100)
    )
    yield Spec(
        "ensemble.cascade_merge_",
        "65536x100, a quarter",
        torch.float32,
        lambda: _merge(device, 65536, 100),
    )
