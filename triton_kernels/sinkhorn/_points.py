"""What the kernels of cores `streaming` and `streaming_apply` share: a tile of u, and the launchers' numbers.

alpha u_ij - lift (|x_i|^2 + |y_j|^2) is -K C_ij, K = log2(e) / epsilon: u is the inner product for squares and
products (alpha = 2 K for |x - y|^2), otherwise the cost itself and alpha = -K. Distances always come from
differences: a root of a cancelled sum loses half the digits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

LOG2E = 1.4426950408889634
PRODUCT, SQUARED, ROOT, ABSOLUTE = range(4)
DIRECT_DIMENSIONS = 8


@triton.jit
def tile_of(
    x, y, item, i, j, n, m, d,
    SOURCE: tl.constexpr, ACC: tl.constexpr, K: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """u of rows i and columns j: a product in steps of K coordinates, or differences one at a time."""
    u = tl.zeros((R, C), ACC)
    row = x + (item * n + i)[:, None] * d
    column = y + (item * m + j)[None, :] * d
    if SOURCE == 0:
        k = tl.arange(0, K)
        for start in range(0, d, K):
            left = tl.load(
                row + (start + k)[None, :],
                mask=(i < n)[:, None] & (start + k < d)[None, :],
                other=0.0,
            )
            right = tl.load(
                column + (start + k)[:, None], mask=(j < m)[None, :] & (start + k < d)[:, None],
                other=0.0,
            )  # fmt: skip
            u = tl.dot(left, right, u, input_precision="ieee", out_dtype=ACC)
    else:
        for k in range(d):
            left = tl.load(row + k, mask=(i < n)[:, None], other=0.0)
            right = tl.load(column + k, mask=(j < m)[None, :], other=0.0)
            t = left - right
            u += tl.abs(t) if SOURCE == 3 else t * t
        if SOURCE == 2:
            u = tl.sqrt(u)
    return u


def geometry_of(cost: int, d: int) -> tuple[int, float, float]:
    """(source, alpha / K, lift / K) of the op's cost code."""
    direct = d <= DIRECT_DIMENSIONS
    if cost in (0, 1):
        half = 1.0 if cost == 0 else 0.5
        return (SQUARED, -half, 0.0) if direct else (PRODUCT, 2.0 * half, half)
    if cost == 2:
        return PRODUCT, 1.0, 0.0
    return (ABSOLUTE if cost == 4 else ROOT), -1.0, 0.0


def centred(x, y, cost: int):
    """(x, y, |x|^2, |y|^2), contiguous, an origin between both clouds taken off where that changes nothing."""
    if cost != 2:
        middle = 0.5 * (x.mean(-2, keepdim=True) + y.mean(-2, keepdim=True))
        x, y = x - middle, y - middle
    x, y = x.contiguous(), y.contiguous()
    return x, y, x.square().sum(-1), y.square().sum(-1)


def tile_sizes(source: int, d: int, double: bool) -> dict[str, int]:
    """Rows and columns of a tile, coordinates a step."""
    if source == PRODUCT:
        if double:
            return {"R": 32, "C": 32, "K": 16, "num_warps": 4}
        return {"R": 64, "C": 64, "K": 16, "num_warps": 8}
    return {"R": 32, "C": 32 if double else 64, "K": 16, "num_warps": 4}


def numbers_of(like: torch.Tensor, values: list[float]) -> torch.Tensor:
    """A vector on the device, filled without a copy from the host (which a CUDA graph cannot hold)."""
    out = like.new_empty((len(values),))
    for k, value in enumerate(values):
        out[k].fill_(value)
    return out
