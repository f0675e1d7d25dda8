"""Benchmark lines of core anchor."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bench.case import Case, Spec, Step
from solera.weights import anchor_decay_, anchor_penalty, normalized_parameter_distance


def _penalty(
    xs: list[Tensor], anchors: list[Tensor], weights: list[Tensor] | None = None
) -> Tensor:
    if weights is None:
        return 0.5 * sum(((x - a) ** 2).sum() for x, a in zip(xs, anchors))
    return 0.5 * sum((f * (x - a) ** 2).sum() for x, a, f in zip(xs, anchors, weights))


def _penalty_foreach(
    xs: list[Tensor], anchors: list[Tensor], weights: list[Tensor] | None = None
) -> Tensor:
    if weights is None:
        norms = torch._foreach_norm(torch._foreach_sub(xs, anchors))
        return 0.5 * torch.stack(norms).square().sum()
    d = torch._foreach_sub(xs, anchors)
    return 0.5 * sum(t.sum() for t in torch._foreach_mul(torch._foreach_mul(d, d), weights))


def _distance(xs: list[Tensor], targets: list[Tensor], starts: list[Tensor]) -> Tensor:
    """As MTT writes it: over one flat vector."""
    x, t, s = (torch.cat([p.reshape(-1) for p in ps]) for ps in (xs, targets, starts))
    loss = torch.nn.functional.mse_loss(x, t, reduction="sum")
    return loss / torch.nn.functional.mse_loss(s, t, reduction="sum")


def _random(count: int, n: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    return [torch.randn(n, device=device).to(dtype) for _ in range(count)]


def _case(
    ours: Callable, eager: Callable, peers: dict[str, Callable], lists: int, dtype, device
) -> Case:
    tensors = [_random(200, 100_000, dtype, device) for _ in range(lists)]
    if lists == 3:
        tensors[2] = [t.abs() for t in tensors[2]]

    def running(function: Callable, as_dtype: torch.dtype) -> Step:
        first, *rest = ([t.to(as_dtype) for t in ts] for ts in tensors)
        leaves = [t.requires_grad_() for t in (x.clone() for x in first)]

        def run() -> list[Tensor]:
            value = function(leaves, *rest)
            return [value.detach(), *torch.autograd.grad(value, leaves)]

        return run

    size = 200 * 100_000 * tensors[0][0].element_size()
    backward = 3 if ours is normalized_parameter_distance else lists + 1
    return Case(
        ours=running(ours, dtype),
        exact=running(eager, torch.float64),
        eager=running(eager, dtype),
        peers={name: running(f, dtype) for name, f in peers.items()},
        bytes=(lists + backward) * size,
        written=size,
    )


def _decay_case(dtype: torch.dtype, device: str) -> Case:
    start, anchors = (_random(200, 100_000, dtype, device) for _ in range(2))

    def running(function: Callable[[list[Tensor]], object], as_dtype: torch.dtype) -> Step:
        xs = [x.to(as_dtype, copy=True) for x in start]

        def run() -> list[Tensor]:
            function(xs)
            return xs

        return torch.no_grad()(run)

    def loop(xs: list[Tensor]) -> None:
        for x, a in zip(xs, anchors):
            x.sub_((x - a.to(x.dtype)) * 1e-4)

    size = 200 * 100_000 * start[0].element_size()
    return Case(
        ours=running(lambda xs: anchor_decay_(xs, anchors, 1e-4), dtype),
        exact=running(loop, torch.float64),
        eager=running(loop, dtype),
        peers={"foreach": running(lambda xs: torch._foreach_lerp_(xs, anchors, 1e-4), dtype)},
        bytes=3 * size,
        written=size,
    )


def specs(device: str) -> Iterator[Spec]:
    f32, bf16 = torch.float32, torch.bfloat16
    foreach = {"foreach": _penalty_foreach}
    for label, dtype, lists, quick in (
        ("fwd+bwd 200 x 100k", f32, 2, True),
        ("fwd+bwd 200 x 100k", bf16, 2, False),
        ("fwd+bwd 200 x 100k, Fisher weights", f32, 3, True),
    ):
        yield Spec(
            "weights.anchor_penalty", label, dtype,
            lambda dtype=dtype, lists=lists: _case(
                anchor_penalty, _penalty, foreach, lists, dtype, device
            ), quick, {}, "eager: a loop over the parameters",
        )  # fmt: skip
    yield Spec(
        "weights.normalized_parameter_distance", "fwd+bwd 200 x 100k", f32,
        lambda: _case(normalized_parameter_distance, _distance, {}, 3, f32, device), True, {},
        "eager: MTT's form, one flat vector",
    )  # fmt: skip
    yield Spec(
        "weights.anchor_decay_", "200 x 100k", f32, lambda: _decay_case(f32, device), False, {},
        "foreach: torch._foreach_lerp_",
    )  # fmt: skip
