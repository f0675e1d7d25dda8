"""The random words of masks, as solera/weights/_random.py defines them."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def mask_words(seed, chunk, lane, tensor, stream):
    """Four words for each (chunk, lane): those of elements chunk * 512 + slot * 128 + lane, slot 0 to 3.

    chunk int64 and lane int32 broadcast to a block; seed, tensor, stream are scalars.
    """
    block = chunk * 128 + lane
    zero = tl.zeros_like(block).to(tl.uint32)
    return tl.philox(
        seed,
        block.to(tl.uint32),
        (block >> 32).to(tl.uint32),
        zero + tensor.to(tl.uint32),
        zero + stream.to(tl.uint32),
    )
