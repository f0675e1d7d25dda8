"""Products with a half-precision weight in its accumulator's dtype, some rows of it widened at a time."""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 8192  # of the weight widened at a time


def product(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """out = x weight^T in out's dtype; a weight of another one is widened ROWS rows at a time."""
    if weight.dtype == out.dtype:
        torch.mm(x, weight.t(), out=out)
        return
    for first in range(0, weight.shape[0], ROWS):
        block = weight[first : first + ROWS].to(out.dtype)
        torch.mm(x, block.t(), out=out[:, first : first + ROWS])


def back_product(g: Tensor, weight: Tensor) -> Tensor:
    """g weight, by the same rule."""
    if weight.dtype == g.dtype:
        return g @ weight
    total = g.new_zeros(g.shape[0], weight.shape[1])
    for first in range(0, weight.shape[0], ROWS):
        block = weight[first : first + ROWS].to(g.dtype)
        total.addmm_(g[:, first : first + ROWS], block)
    return total


def rounded(t: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """t * factor rounded to dtype, some rows at a time: with `out=` torch would make a whole product first."""
    out = torch.empty_like(t, dtype=dtype)
    if t.dim() == 0:
        return out.copy_(t * factor)
    for first in range(0, t.shape[0], ROWS):
        part = slice(first, first + ROWS)
        out[part] = t[part] * factor
    return out
