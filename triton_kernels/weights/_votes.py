"""What is kept of a task vector and which sign it elects, for the kernels of core `consensus`."""

from __future__ import annotations

import triton
import triton.language as tl

from ._mask import mask_words
from .lincomb import _stream

LINEAR = tl.constexpr(0)
MASS = tl.constexpr(1)


@triton.jit
def drawn(seed, key, k, start, bound, BLOCK: tl.constexpr):
    """Whether the random words of BLOCK elements from `start` keep them."""
    chunk = start // 512 + tl.arange(0, BLOCK // 512)[:, None]
    lane = tl.arange(0, 128)[None, :]
    stream = tl.zeros((), tl.int32) + k
    r0, r1, r2, r3 = mask_words(seed, chunk.to(tl.int64), lane, key, stream)
    words = tl.join(tl.join(r0, r2), tl.join(r1, r3))  # [R, 128, 2, 2]: slot 2 i + j at [..., i, j]
    words = tl.reshape(tl.permute(words, (0, 2, 3, 1)), (BLOCK,))
    return (words <= (bound - 1).to(tl.uint32)) & (bound > 0)


@triton.jit
def kept_of(d, at_k, k, numbers, keep, seed, key, start, stride, RANDOM: tl.constexpr,
            ACC: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    if RANDOM:
        kept = drawn(seed, key, k, start, tl.load(keep + k), BLOCK)
    else:
        magnitude = tl.abs(d)
        low = tl.load(numbers + at_k).to(ACC)
        high = tl.load(numbers + stride + at_k).to(ACC)
        kept = ((magnitude < low) | (magnitude > high)) == 0
    return kept


@triton.jit
def divided(a, b, ACC: tl.constexpr):
    if ACC == tl.float64:
        quotient = a / b
    else:
        quotient = tl.div_rn(a, b)
    return quotient


@triton.jit
def counted(d, kept, plus, minus, plus_divisor, minus_divisor, plus_mass, minus_mass, numbers, at_k,
            stride, VOTE: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """The sums with model k's share; numbers holds low, high, election, value, divisor, (K, L) each."""
    v = d * tl.load(numbers + 3 * stride + at_k).to(ACC)
    if VOTE == LINEAR:
        plus += tl.where(kept, v, 0.0)
    else:
        u = d * tl.load(numbers + 2 * stride + at_k).to(ACC)
        share = tl.load(numbers + 4 * stride + at_k).to(ACC)
        up = kept & ((u <= 0) == 0)
        down = kept & (u < 0)
        plus += tl.where(up, v, 0.0)
        minus += tl.where(down, v, 0.0)
        plus_divisor += tl.where(up, share, 0.0)
        minus_divisor += tl.where(down, share, 0.0)
        if VOTE == MASS:
            plus_mass += tl.where(up, u, 0.0)
            minus_mass += tl.where(down, -u, 0.0)
        else:
            plus_mass += tl.where(up, 1.0, 0.0).to(ACC)
            minus_mass += tl.where(down, 1.0, 0.0).to(ACC)
    return plus, minus, plus_divisor, minus_divisor, plus_mass, minus_mass


@triton.jit
def verdict_of(row, at, mask, b, K, numbers, column, length, keep, seed, key, start,
               DTYPE: tl.constexpr, HAS_BASE: tl.constexpr, VOTE: tl.constexpr, DIVIDE: tl.constexpr,
               RANDOM: tl.constexpr, ACC: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """(sum, divisor) of those that agree, whether the elected sign is -, whether the divisor was replaced."""
    plus = tl.zeros((BLOCK,), ACC)
    minus = tl.zeros((BLOCK,), ACC)
    plus_divisor = tl.zeros((BLOCK,), ACC)
    minus_divisor = tl.zeros((BLOCK,), ACC)
    plus_mass = tl.zeros((BLOCK,), ACC)
    minus_mass = tl.zeros((BLOCK,), ACC)
    stride = K * length
    for k in range(K):
        d = _stream(row, k, at, mask, b, DTYPE, HAS_BASE, ACC, ALIGNED)
        at_k = k * length + column
        kept = kept_of(d, at_k, k, numbers, keep, seed, key, start, stride, RANDOM, ACC, BLOCK)
        plus, minus, plus_divisor, minus_divisor, plus_mass, minus_mass = counted(
            d, kept, plus, minus, plus_divisor, minus_divisor, plus_mass, minus_mass, numbers, at_k,
            stride, VOTE, ACC,
        )  # fmt: skip
    negative = plus_mass < minus_mass
    total = tl.where(negative, minus, plus)
    divisor = tl.where(negative, minus_divisor, plus_divisor)
    replaced = tl.abs(divisor) < 1e-8
    if not DIVIDE:
        replaced = divisor == divisor
    return total, tl.where(replaced, 1.0, divisor).to(ACC), negative, replaced


@triton.jit
def scale_of(entry, ACC: tl.constexpr):
    return tl.load(entry).to(tl.float64, bitcast=True).to(ACC)
