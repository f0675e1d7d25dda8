"""The random words of masks: a function of (seed, tensor key, element), never stored.

Philox4x32-10 has the counter (block & 0xffffffff, block >> 32, tensor key, stream) and the key
(seed & 0xffffffff, seed >> 32). Element e of a tensor (row-major) belongs to chunk e // 512, slot
(e % 512) // 128, lane e % 128, and takes word `slot` of block chunk * 128 + lane: 32 random bits, the same on
every device and at any tiling. `stream` tells apart draws of one tensor and seed, model k of K among them.

An element is kept with probability q where its word is below round(q * 2^32).

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from .ema import philox

_LOW = 0xFFFFFFFF


def tensor_key(name: int | str) -> int:
    """32 bits that stand for a tensor: its index in a list, or a hash of its name in a state dict, so that
    its mask does not depend on the order of the others.
    """
    if isinstance(name, int):
        return name & _LOW
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "little")


def keep_below(probability: float) -> int:
    """The bound that a kept element's word lies below; 2^32 keeps all."""
    return round(probability * 2**32)


def random_words(
    seed: int | Tensor, key: int, stream: int, elements: int, device=None, begin: int = 0
) -> Tensor:
    """The words of elements from `begin` on, int64 in [0, 2^32); seed an int or an int64 tensor of one element."""
    if not isinstance(seed, Tensor):
        seed = torch.tensor(seed, dtype=torch.int64, device=device)
    seed = seed.reshape(())
    first, last = begin // 512, (begin + elements + 511) // 512
    block = torch.arange(first * 128, last * 128, device=seed.device)
    zero = torch.zeros_like(block)
    words = philox(
        (block & _LOW, block >> 32, zero + key, zero + stream),
        (seed & _LOW, (seed >> 32) & _LOW),
    )
    # Four words a block, of each chunk the first ones first.
    found = torch.stack(words).view(4, last - first, 128).transpose(0, 1).reshape(-1)
    return found[begin - first * 512 :][:elements]
