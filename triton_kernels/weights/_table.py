"""Pointer tables: a list of tensors handed to one launch.

A table is one int64 tensor, built on the host and sent in one asynchronous copy: a row of numbers for each
item (addresses, sizes), then one number for each program, item << 32 | chunk. A thousand small tensors cost
one launch for each combination of dtypes, not a thousand.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

LANGUAGE_DTYPE = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
# A captured graph replays the copy from the host: its source must outlive the graph.
_captured: list[Tensor] = []


def build(
    rows: Sequence[Sequence[int]] | Tensor, chunks: Sequence[int] | Tensor, like: Tensor
) -> tuple[Tensor, Tensor]:
    """(rows, programs) on like's device; item i has chunks[i] programs, its row is rows[i]."""
    counts = torch.as_tensor(chunks)
    items = torch.repeat_interleave(counts)
    first = torch.cumsum(counts, 0) - counts
    programs = (items << 32) | (torch.arange(len(items)) - first[items])
    table = torch.cat([torch.as_tensor(rows, dtype=torch.int64).flatten(), programs])
    if like.is_cuda:
        table = table.pin_memory()
        if torch.cuda.is_current_stream_capturing():
            _captured.append(table)
    table = table.to(like.device, non_blocking=True)
    split = table.numel() - programs.numel()
    return table[:split], table[split:]


def each_row(row: Sequence[int], steps: Sequence[int], count: int) -> Tensor:
    """A tensor's row of the table once for each of its `count` rows, every number `steps` further each time."""
    at = torch.arange(count)[:, None]
    return torch.tensor(row)[None] + at * torch.tensor(steps)[None]


def aligned(numbers: Sequence[int]) -> bool:
    """Addresses and sizes that are multiples of 16: masked loads are then whole vectors."""
    return all([n % 16 == 0 for n in numbers])


@triton.jit
def program_of(programs):
    """The item and the chunk of this program."""
    packed = tl.load(programs + tl.program_id(0))
    return packed >> 32, packed & 0xFFFFFFFF


@triton.jit
def pointer(entry, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The address stored at `entry`, as a pointer to DTYPE."""
    p = tl.load(entry).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        p = tl.multiple_of(p, 16)
    return p


@triton.jit
def size(entry, ALIGNED: tl.constexpr):
    n = tl.load(entry)
    if ALIGNED:
        n = tl.multiple_of(n, 16)
    return n
