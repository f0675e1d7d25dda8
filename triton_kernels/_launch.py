"""What every launcher needs: the device guard, the processor count, the accumulator type."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton.language as tl
from torch import Tensor


def on_device_of(x: Tensor) -> AbstractContextManager:
    """Launch on x's device and its current stream (a no-op for the interpreter's CPU tensors)."""
    if x.is_cuda:
        return torch.cuda.device(x.device)
    return nullcontext()


def processors(x: Tensor) -> int:
    """Streaming multiprocessors of x's device; few for the interpreter, where a program costs 0.6 ms."""
    if x.is_cuda:
        return torch.cuda.get_device_properties(x.device).multi_processor_count
    return 2


def accumulator(x: Tensor) -> tl.dtype:
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def accumulate_type(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
