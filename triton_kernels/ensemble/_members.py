"""How the kernels over member logits take them: one (N, K, C) with unit last stride."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

LOWEST = {torch.float64: -1.7e308, torch.float32: -3.0e38}


def stacked(logits: list[Tensor]) -> Tensor:
    """(N, K, C) with a last stride of 1. A list of (N, C) is stacked: the one copy that these kernels make."""
    z = logits[0] if logits[0].dim() == 3 else torch.stack(list(logits), 1)
    return z if z.stride(-1) == 1 else z.contiguous()


def gradient_like(z: Tensor, logits: list[Tensor]) -> tuple[Tensor, int, int]:
    """A new tensor for the gradient, (N, K, C) or (K, N, C) to a list, and its strides over N and K."""
    rows, members, width = z.shape
    if logits[0].dim() == 3:
        return z.new_empty(rows, members, width), members * width, width
    return z.new_empty(members, rows, width), width, rows * width


def row_config(width: int) -> dict[str, int]:
    """Narrow rows several at a time, wide ones in tiles of 4096 columns."""
    block = min(4096, max(16, triton.next_power_of_2(width)))
    rows = max(1, 1024 // block)
    return {"R": rows, "BLOCK": block, "num_warps": 4 if rows * block <= 2048 else 8}


def member_config(members: int, width: int) -> dict[str, int]:
    """All members of a row beside each other, in tiles of about 4096 numbers."""
    several = triton.next_power_of_2(members)
    block = min(max(16, 4096 // several), max(16, triton.next_power_of_2(width)))
    return {"KB": several, "BLOCK": block, "num_warps": 4 if several * block <= 2048 else 8}
