"""What the kernels of logit_mixture and distillation share: K models' logits through a pointer table.

A table holds the K addresses, then the K strides between rows; a list of tensors is one launch. It is sent from
pinned memory in one asynchronous copy.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..weights import _table
from ..weights._table import LANGUAGE_DTYPE, pointer

LOWEST = {torch.float64: -1.7e308}


class Rows:
    """K tensors (N, C) with unit stride along C, ready for a launch."""

    def __init__(self, logits: list[Tensor]) -> None:
        self.tensors = [
            x if x.shape[1] <= 1 or x.stride(1) == 1 else x.contiguous() for x in logits
        ]
        self.first = first = self.tensors[0]
        self.count = len(logits)
        self.rows, self.width = first.shape
        self.lowest = LOWEST.get(first.dtype, -3.0e38)
        numbers = [x.data_ptr() for x in self.tensors] + [x.stride(0) for x in self.tensors]
        table = torch.tensor(numbers, dtype=torch.int64)
        if first.is_cuda:
            table = table.pin_memory()
            if torch.cuda.is_current_stream_capturing():
                _table._captured.append(table)
        self.table = table.to(first.device, non_blocking=True)
        size = first.element_size()
        self.aligned = all(
            x.data_ptr() % 16 == 0 and x.stride(0) * size % 16 == 0 for x in self.tensors
        )

    def constants(self) -> dict[str, object]:
        """The constexpr arguments of every kernel here."""
        return {"DTYPE": LANGUAGE_DTYPE[self.first.dtype], "ALIGNED": self.aligned}


def config(width: int, most: int = 2048) -> dict[str, int]:
    """Narrow rows several at a time, wide ones in tiles of `most` columns."""
    block = min(most, max(16, triton.next_power_of_2(width)))
    rows = max(1, 1024 // block)
    return {"R": rows, "BLOCK": block, "num_warps": 4 if rows * block <= 1024 else 8}


@triton.jit
def tile(table, m, members, row, cols, mask, ACC: tl.constexpr, DTYPE: tl.constexpr,
         ALIGNED: tl.constexpr):  # fmt: skip
    """Columns cols [1, BLOCK] of rows row [R, 1] of model m, -inf outside the mask."""
    stride = tl.load(table + members + m)
    if ALIGNED:
        stride = tl.multiple_of(stride, 8)
    z = pointer(table + m, DTYPE, ALIGNED)
    return tl.load(z + row.to(tl.int64) * stride + cols, mask=mask, other=float("-inf")).to(ACC)


@triton.jit
def raised(top, total, z):
    """The running maximum and sum of e^(z - top) [R, 1] with a tile z [R, BLOCK] added, and the factor."""
    here = tl.maximum(top, tl.max(z, 1)[:, None])
    factor = tl.exp(top - here)
    return here, total * factor + tl.sum(tl.exp(z - here), 1)[:, None], factor
