"""Benchmark lines of core oblivious_forest: K trees over B rows, beside an index and a gather in torch.

Bytes: forward x read, the leaves' numbers (4 B K) written and read, a row of leaf values a tree and row gathered, y
written; backward the numbers and dy read, the leaf values' gradient written.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bench.case import Case, Spec, in_double, step
from solera.ensemble import oblivious_forest


def specs(device: str) -> Iterator[Spec]:
    for backward in (True, False):
        yield Spec(
            "ensemble.oblivious_forest",
            f"{'fwd+bwd' if backward else 'fwd'} 8192 rows 500 trees depth 6, 4 outputs",
            torch.float32,
            lambda backward=backward: _case(device, torch.float32, 8192, 50, 500, 6, 4, backward),
        )


def _case(device, dtype, B, F, K, D, A, backward) -> Case:
    x = torch.randn(B, F, device=device).to(dtype)
    features = torch.randint(0, F, (K, D), device=device)
    thresholds = torch.randn(K, D, device=device).to(dtype)
    leaves = torch.randn(K, 2**D, A, device=device).to(dtype).requires_grad_(backward)
    grads = (torch.randn(B, A, device=device).to(dtype),) if backward else None
    trees = torch.arange(K, device=device)
    place = 2 ** torch.arange(D, device=device)

    def ours(leaves):
        return oblivious_forest(x, features, thresholds, leaves)

    def eager(leaves):
        index = ((x[:, features] > thresholds) * place).sum(2)
        return -leaves[trees, index].sum(1)

    exact_grads = None if grads is None else (grads[0].double(),)
    size = torch.finfo(dtype).bits // 8
    traffic = (B * F + B * A + leaves.numel()) * size + 8 * B * K
    if backward:
        traffic += (B * A + leaves.numel()) * size + 4 * B * K
    return Case(
        ours=step(ours, (leaves,), grads),
        exact=in_double(lambda t: step(eager, (t,), exact_grads), (leaves,)),
        eager=step(eager, (leaves,), grads),
        compiled=step(torch.compile(eager), (leaves,), grads),
        bytes=traffic,
    )


def small_calls(device: str):
    """Every op once, on awkward shapes."""

    def call(dtype) -> None:
        leaves = torch.randn(5, 8, 3, device=device).to(dtype).requires_grad_()
        features = torch.randint(0, 7, (5, 3), device=device)
        x = torch.randn(33, 7, device=device).to(dtype)
        y = oblivious_forest(x, features, torch.zeros(5, 3, device=device).to(dtype), leaves)
        y.backward(torch.randn_like(y))

    for dtype in (torch.float32, torch.bfloat16):
        yield f"oblivious_forest {dtype}", lambda dtype=dtype: call(dtype)
