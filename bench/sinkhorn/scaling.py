"""Benchmark lines of core scaling: the assignment of DINO's size, heads of novel classes, a matched prior."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bench.case import Case, Spec, in_double, step
from solera.sinkhorn import balanced_assignment, prior_match


def _public_loop(logits: Tensor) -> Tensor:
    """The loop of SwAV and DINO at temperature 0.05, 3 iterations, written from its formula; in place as there."""
    q = torch.exp(logits / 0.05).transpose(-1, -2)
    k, n = q.shape[-2:]
    q /= q.sum((-2, -1), keepdim=True)
    for _ in range(3):
        q /= q.sum(-1, keepdim=True)
        q /= k
        q /= q.sum(-2, keepdim=True)
        q /= n
    q *= n
    return q.transpose(-1, -2)


def _log_loop(iterations: int) -> Callable:
    def solve(logits: Tensor) -> tuple[Tensor, Tensor]:
        n, k = logits.shape
        goal = logits.new_full((), n / k).log()
        a = logits.new_zeros(k)
        for _ in range(iterations):
            f = -torch.logsumexp(logits + a, -1, keepdim=True)
            a = goal - torch.logsumexp(logits + f, 0)
        return a - a.mean(), torch.softmax(logits + a, -1)

    return solve


def _assignment(shape, dtype, device) -> Case:
    logits = (torch.rand(*shape, device=device) * 2 - 1).to(dtype)
    build = lambda t: step(_public_loop, [t])
    return Case(
        ours=step(balanced_assignment, [logits]),
        exact=in_double(build, [logits]),
        eager=build(logits.float()),
        compiled=step(torch.compile(_public_loop), [logits.float()]),
        bytes=2 * logits.numel() * logits.element_size(),
        floor_note="logits once in, Q once out; the passes read the logits four times",
    )


def _prior(shape, device) -> Case:
    logits = torch.randn(*shape, device=device)
    ours = lambda t: tuple(prior_match(t, iterations=20, tolerance=0.0))
    build = lambda t: step(_log_loop(20), [t])
    return Case(
        ours=step(ours, [logits]),
        exact=in_double(build, [logits]),
        eager=build(logits),
        bytes=2 * logits.numel() * 4,
        floor_note="logits once in, probabilities once out; 20 iterations read the logits each",
    )


def specs(device: str) -> Iterator[Spec]:
    f32, bf16 = torch.float32, torch.bfloat16
    name = "sinkhorn.balanced_assignment"
    # "eager" is the public loop.
    yield Spec(name, "4096x3000, 3 it", f32, lambda: _assignment((4096, 3000), f32, device),
               targets={"eager": 4})  # fmt: skip
    yield Spec(name, "8x512x100, 3 it", f32, lambda: _assignment((8, 512, 100), f32, device))
    yield Spec(
        name, "4096x3000, 3 it", bf16, lambda: _assignment((4096, 3000), bf16, device), quick=False
    )
    yield Spec("sinkhorn.prior_match", "50000x4, 20 it", f32, lambda: _prior((50000, 4), device))
