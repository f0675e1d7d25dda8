"""Benchmark lines of core sliced: forward and backward beside the torch composition and POT."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import normalize

from bench.case import Case, Spec, in_double, step
from solera.sinkhorn import sliced_wasserstein


def _composition(x: Tensor, y: Tensor, theta: Tensor) -> Tensor:
    a, b = ((theta @ t.transpose(-1, -2)).sort(-1).values for t in (x, y))
    return (a - b).square().mean((-2, -1))


def _pot() -> Callable | None:
    try:
        import ot
    except ImportError:
        return None

    def distance(x: Tensor, y: Tensor, theta: Tensor) -> Tensor:
        one = lambda a, b, t: ot.sliced_wasserstein_distance(a, b, projections=t.T, p=2) ** 2
        return torch.stack([one(*item) for item in zip(x, y, theta)])

    return distance


def _case(batch, n, d, count, device, peer=True) -> Case:
    x, y = torch.randn(batch, n, d, device=device), torch.randn(batch, n, d, device=device)
    theta = normalize(torch.randn(batch, count, d, device=device), dim=-1)
    inputs = [t.requires_grad_() for t in (x, y, theta)]
    grad = torch.ones(batch, device=device)

    def both(function: Callable) -> Callable:
        return lambda *t: step(function, t, [grad.to(t[0].dtype)])

    pot = _pot() if peer else None
    return Case(
        ours=both(sliced_wasserstein)(*inputs),
        exact=in_double(both(_composition), inputs),
        eager=both(_composition)(*inputs),
        peers={} if pot is None else {"POT": both(pot)(*inputs)},
        bytes=4 * (2 * batch * count * n * 4 + 4 * batch * n * d),
        flops=2 * 16 * batch * n * d * count,
        # No tolerance of its own: two nearly equal projections may change places, in eager torch as here.
        saved_bytes=8 * batch * count * n,
        floor_note="permutations written and read; the sorts stay in the caches",
    )


def specs(device: str) -> Iterator[Spec]:
    name, f32 = "sinkhorn.sliced_wasserstein", torch.float32
    yield Spec(name, "fwd+bwd 32x2048, d=3, 100 directions", f32, lambda: _case(32, 2048, 3, 100, device),
               False, {"eager": 1.5, "POT": 2})  # fmt: skip
    yield Spec(name, "fwd+bwd 64x256, d=64, 50 directions", f32,
               lambda: _case(64, 256, 64, 50, device, peer=False), False)  # fmt: skip
