"""GPU kernels of core `consensus`: the formulas are in solera/weights/consensus.py.

Bytes an element of s bytes: forward (K + 1) s, one more s with a base; backward reads G, the base and the K
tensors (twice: the vote needs all of them, what follows each; the second time from the cache) and writes what is
asked for. The launch covers a whole list through a pointer table. Sums for both signs are kept in registers
while the K streams go by, so nothing is stacked. A block of 512 R elements takes its random words from R x 128
Philox counters for each model. Compiled without contraction to fused multiply-adds and with divisions rounded
to nearest, so that the bits are those of the other backends.

H200 at 4.3 TB/s: 8 x 100M float32 around a base 0.93 ms is the floor (of the merge; thresholds are core
`abs_quantile`).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from .._launch import on_device_of
from ._table import LANGUAGE_DTYPE, aligned, build, pointer, program_of, size
from ._votes import LINEAR, divided, drawn, kept_of, scale_of, verdict_of
from .lincomb import _accumulator, _columns, _rounded, _stream, lincomb_sum_kernel


# A row of the table: the K streams, the base (or 0), the output, the number of elements, the column, the
# tensor's key, the bits of the scale, where it begins in the tensor its words are drawn for.
@triton.jit
def consensus_forward_kernel(
    rows, programs, numbers, keep, seeds, K, length,
    DTYPE: tl.constexpr, BASE: tl.constexpr, OUT: tl.constexpr,
    HAS_BASE: tl.constexpr, VOTE: tl.constexpr, DIVIDE: tl.constexpr, RANDOM: tl.constexpr,
    ACC: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    item, chunk = program_of(programs)
    row = rows + item * (K + 7)
    n = size(row + K + 2, ALIGNED)
    column = tl.load(row + K + 3)
    key = tl.load(row + K + 4)
    scale = scale_of(row + K + 5, ACC)
    begin = tl.load(row + K + 6)
    out = pointer(row + K + 1, OUT, ALIGNED)
    seed = tl.load(seeds)
    end = tl.minimum(n, (chunk + 1) * CHUNK)
    for start in range(chunk * CHUNK, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        mask = at < n
        b = tl.zeros((BLOCK,), ACC)
        if HAS_BASE:
            b = tl.load(pointer(row + K, BASE, ALIGNED) + at, mask=mask, other=0.0).to(ACC)
        total, divisor, negative, replaced = verdict_of(
            row, at, mask, b, K, numbers, column, length, keep, seed, key, begin + start, DTYPE, HAS_BASE,
            VOTE, DIVIDE, RANDOM, ACC, ALIGNED, BLOCK,
        )  # fmt: skip
        merged = total * scale
        if DIVIDE:
            merged = divided(merged, divisor, ACC)
        tl.store(out + at, _rounded(b + merged, OUT), mask=mask)


@triton.jit
def _spread(row, k, entry, at, mask, b, h, mean, negative, numbers, at_k, stride, keep, seed, key, start,
            DTYPE: tl.constexpr, HAS_BASE: tl.constexpr, VOTE: tl.constexpr, RANDOM: tl.constexpr,
            ACC: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """dw_k, stored where the table holds an address, and the two dots of model k."""
    d = _stream(row, k, at, mask, b, DTYPE, HAS_BASE, ACC, ALIGNED)
    agree = kept_of(d, at_k, k, numbers, keep, seed, key, start, stride, RANDOM, ACC, BLOCK) & mask
    if VOTE != LINEAR:
        u = d * tl.load(numbers + 2 * stride + at_k).to(ACC)
        agree = agree & tl.where(negative, u < 0, (u <= 0) == 0)
    mine = tl.where(agree, h, 0.0)
    dw = mine * tl.load(numbers + 3 * stride + at_k).to(ACC)
    if tl.load(row + entry) != 0:
        tl.store(pointer(row + entry, DTYPE, ALIGNED) + at, _rounded(dw, DTYPE), mask=mask)
    values = tl.sum(tl.where(agree, mine * d, 0.0)).to(tl.float64)
    divisors = -tl.sum(mine * mean).to(tl.float64)
    return dw, values, divisors


# A row: the K streams, the base (or 0), G, where K + 1 gradients go (or 0), the number of elements, the column,
# the key, the bits of the scale, the first partial.
@triton.jit
def consensus_backward_kernel(
    rows, programs, numbers, keep, seeds, partial, K, length,
    DTYPE: tl.constexpr, BASE: tl.constexpr, GRAD: tl.constexpr,
    HAS_BASE: tl.constexpr, VOTE: tl.constexpr, DIVIDE: tl.constexpr, RANDOM: tl.constexpr,
    ACC: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    """Gradients, and 2 K dots of a chunk into partial[first + chunk]."""
    item, chunk = program_of(programs)
    row = rows + item * (2 * K + 8)
    n = size(row + 2 * K + 3, ALIGNED)
    column = tl.load(row + 2 * K + 4)
    key = tl.load(row + 2 * K + 5)
    scale = scale_of(row + 2 * K + 6, ACC)
    seed = tl.load(seeds)
    stride = K * length
    lane = tl.arange(0, KP)
    dots = tl.zeros((KP,), tl.float64)
    end = tl.minimum(n, (chunk + 1) * CHUNK)
    for start in range(chunk * CHUNK, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        mask = at < n
        g = tl.load(pointer(row + K + 1, GRAD, ALIGNED) + at, mask=mask, other=0.0).to(ACC)
        b = tl.zeros((BLOCK,), ACC)
        if HAS_BASE:
            b = tl.load(pointer(row + K, BASE, ALIGNED) + at, mask=mask, other=0.0).to(ACC)
        h = g * scale
        mean = tl.zeros((BLOCK,), ACC)
        negative = mean < 0
        if VOTE != LINEAR:
            total, divisor, negative, replaced = verdict_of(
                row, at, mask, b, K, numbers, column, length, keep, seed, key, start, DTYPE,
                HAS_BASE, VOTE, DIVIDE, RANDOM, ACC, ALIGNED, BLOCK,
            )  # fmt: skip
            h = h / divisor
            mean = tl.where(replaced, 0.0, total / divisor)
        rest = g
        for k in range(K):
            dw, values, divisors = _spread(
                row, k, K + 2 + k, at, mask, b, h, mean, negative, numbers, k * length + column, stride,
                keep, seed, key, start, DTYPE, HAS_BASE, VOTE, RANDOM, ACC, ALIGNED, BLOCK,
            )  # fmt: skip
            rest -= dw
            dots += tl.where(lane == k, values, 0.0) + tl.where(lane == K + k, divisors, 0.0)
        if HAS_BASE:
            if tl.load(row + 2 * K + 2) != 0:
                target = pointer(row + 2 * K + 2, BASE, ALIGNED) + at
                tl.store(target, _rounded(rest, BASE), mask=mask)
    slot = tl.load(row + 2 * K + 7) + chunk
    tl.store(partial + slot * 2 * K + lane, dots, mask=lane < 2 * K)


# A row: the K streams, the base (or 0), the number of elements, the column, the key, the first partial, where the
# tensor begins in the one its words are drawn for.
@triton.jit
def consensus_norms_kernel(
    rows, programs, keep, seeds, partial, K,
    DTYPE: tl.constexpr, BASE: tl.constexpr, HAS_BASE: tl.constexpr,
    ACC: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    """K sums of |d| and K of what is kept, of a chunk, into partial[first + chunk]."""
    item, chunk = program_of(programs)
    row = rows + item * (K + 6)
    n = size(row + K + 1, ALIGNED)
    key = tl.load(row + K + 3)
    begin = tl.load(row + K + 5)
    seed = tl.load(seeds)
    lane = tl.arange(0, KP)
    sums = tl.zeros((KP,), tl.float64)
    end = tl.minimum(n, (chunk + 1) * CHUNK)
    for start in range(chunk * CHUNK, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        mask = at < n
        b = tl.zeros((BLOCK,), ACC)
        if HAS_BASE:
            b = tl.load(pointer(row + K, BASE, ALIGNED) + at, mask=mask, other=0.0).to(ACC)
        for k in range(K):
            magnitude = tl.abs(_stream(row, k, at, mask, b, DTYPE, HAS_BASE, ACC, ALIGNED))
            magnitude = magnitude.to(tl.float64)
            kept = drawn(seed, key, k, begin + start, tl.load(keep + k), BLOCK)
            left = tl.sum(tl.where(kept, magnitude, 0.0))
            sums += tl.where(lane == k, tl.sum(magnitude), 0.0) + tl.where(lane == K + k, left, 0.0)
    slot = tl.load(row + K + 4) + chunk
    tl.store(partial + slot * 2 * K + lane, sums, mask=lane < 2 * K)


# ---- launchers ---------------------------------------------------------------------------------------


def _config(x: torch.Tensor) -> dict[str, int]:
    """Elements a step (a multiple of 512) and a program; larger for the interpreter."""
    if x.is_cuda:
        return {"BLOCK": 1024, "CHUNK": 8192, "num_warps": 4}
    return {"BLOCK": 4096, "CHUNK": 16384, "num_warps": 4}


def _numbers(weights, factors, low, high, before, divide):
    """(5, K, L) float64: low, high, election, value, divisor."""
    w = weights.double()
    f = torch.ones_like(w) if factors is None else factors.double()
    value = w * f
    return torch.stack([
        torch.zeros_like(w) if low is None else low.double(),
        torch.full_like(w, float("inf")) if high is None else high.double(),
        value if before else f, value, w if divide == 1 else torch.ones_like(w),
    ])  # fmt: skip


def _random(seed, keys, keep, like, length):
    """(keep, seed, keys) as the kernels take them; stand-ins where the thresholds decide."""
    bounds, _ = build([list(keep) or [0]], [0], like)
    return bounds, bounds if seed is None else seed, list(keys) or [0] * length


def _bits(value: float) -> int:
    return struct.unpack("q", struct.pack("d", value))[0]


def _alike(columns):
    """Columns of one dtype each: the kernels' loops over the models read one. Others are copied to the dtype
    that holds them all.
    """
    out = []
    for column in columns:
        dtype = column[0].dtype
        for t in column:
            dtype = torch.promote_types(dtype, t.dtype)
        out.append([t.to(dtype) for t in column])
    return out


def _kind(column, b):
    return column[0].dtype, None if b is None else b.dtype


def _flags(dtype, base_dtype, even, config):
    """What every kernel is specialised for."""
    return {
        "DTYPE": LANGUAGE_DTYPE[dtype], "BASE": LANGUAGE_DTYPE[base_dtype or dtype],
        "HAS_BASE": base_dtype is not None, "ACC": _accumulator((dtype, base_dtype)), "ALIGNED": even,
        **config,
    }  # fmt: skip


def _width(dtype, base_dtype):
    """What the numbers are handed over in: float32 takes half the registers."""
    return torch.float64 if torch.float64 in (dtype, base_dtype) else torch.float32


def consensus(
    tensors,
    base,
    weights,
    factors,
    low,
    high,
    seed,
    keys,
    keep,
    vote,
    before,
    divide,
    scale,
    begins=(),
):
    K, length = weights.shape
    columns, bases = _columns(tensors, base, tensors[:length])
    columns, like = _alike(columns), columns[0][0]
    numbers = _numbers(weights, factors, low, high, before, divide)
    bounds, seeds, keys = _random(seed, keys, keep, like, length)
    config, out = _config(like), []
    groups: dict = {}
    for item, (column, b) in enumerate(zip(columns, bases)):
        dtype = column[0].dtype
        for t in (*column, *([] if b is None else [b])):
            dtype = torch.promote_types(dtype, t.dtype)
        y = column[0].new_empty(column[0].shape, dtype=dtype)
        out.append(y)
        if y.numel() == 0:
            continue
        row = [t.data_ptr() for t in column]
        row += [0 if b is None else b.data_ptr(), y.data_ptr(), y.numel()]
        even = aligned(row)
        row += [item, keys[item], _bits(scale), begins[item] if begins else 0]
        groups.setdefault((*_kind(column, b), dtype, even), []).append(row)
    for (dtype, base_dtype, out_dtype, even), rows in groups.items():
        table, programs = build(rows, [triton.cdiv(r[K + 2], config["CHUNK"]) for r in rows], like)
        with on_device_of(like):
            consensus_forward_kernel[(len(programs),)](
                table, programs, numbers.to(_width(dtype, base_dtype)), bounds, seeds, K, length,
                OUT=LANGUAGE_DTYPE[out_dtype],
                VOTE=vote, DIVIDE=divide != 0, RANDOM=seed is not None, enable_fp_fusion=False,
                **_flags(dtype, base_dtype, even, config),
            )  # fmt: skip
    return out


def _in_order(partial, first, K, length, like):
    """(2, K, L): the partials of each item, summed in order."""
    sums = partial.new_empty((2 * K, length))
    ranges, _ = build([first], [0], like)
    KP = triton.next_power_of_2(2 * K)
    with on_device_of(like):
        lincomb_sum_kernel[(length,)](
            ranges, partial, sums, 2 * K, length, KP=KP, C=max(1, 256 // KP)
        )
    return sums.view(2, K, length)


def consensus_backward(
    grads, tensors, base, weights, factors, low, high, seed, keys, keep, vote, before, divide, scale,
    need_weights, need_tensors,
):  # fmt: skip
    K, length = weights.shape
    grads = [g.contiguous() for g in grads]
    columns, bases = _columns(tensors, base, grads)
    columns, like = _alike(columns), grads[0]
    dtypes = [column[0].dtype for column in columns] * K + [t.dtype for t in base]
    found = [
        grads[i % length].new_empty(grads[i % length].shape, dtype=dtypes[i]) if need else None
        for i, need in enumerate(need_tensors)
    ]
    numbers = _numbers(weights, factors, low, high, before, divide)
    bounds, seeds, keys = _random(seed, keys, keep, like, length)
    config, first = _config(like), [0]
    groups: dict = {}
    for item, (column, b, g) in enumerate(zip(columns, bases, grads)):
        first.append(first[-1] + triton.cdiv(g.numel(), config["CHUNK"]))
        if g.numel() == 0:
            continue
        targets = [0 if t is None else t.data_ptr() for t in found[item::length]]
        targets += [0] * (K + 1 - len(targets))
        row = [t.data_ptr() for t in column]
        row += [0 if b is None else b.data_ptr(), g.data_ptr(), *targets, g.numel()]
        even = aligned(row)
        row += [item, keys[item], _bits(scale), first[-2]]
        groups.setdefault((*_kind(column, b), g.dtype, even), []).append(row)
    partial = numbers.new_empty((first[-1], 2 * K))
    for (dtype, base_dtype, grad_dtype, even), rows in groups.items():
        chunks = [triton.cdiv(r[2 * K + 3], config["CHUNK"]) for r in rows]
        table, programs = build(rows, chunks, like)
        with on_device_of(like):
            consensus_backward_kernel[(len(programs),)](
                table, programs, numbers.to(_width(dtype, base_dtype)), bounds, seeds, partial, K, length,
                GRAD=LANGUAGE_DTYPE[grad_dtype], VOTE=vote, DIVIDE=divide != 0, RANDOM=seed is not None,
                KP=triton.next_power_of_2(2 * K), enable_fp_fusion=False,
                **_flags(dtype, base_dtype, even, config),
            )  # fmt: skip
    gradients = [t.to(w.dtype) for t, w in zip(found, (*tensors, *base)) if t is not None]
    if not need_weights:
        return numbers.new_empty(0), gradients
    values, divisors = _in_order(partial, first, K, length, like)
    dweights = values if factors is None else values * factors.double()
    if divide == 1:
        dweights = dweights + divisors
    return dweights.contiguous(), gradients


def consensus_norms(tensors, base, seed, keys, keep, begins=()):
    K = len(keep)
    length = len(tensors) // K
    columns, bases = _columns(tensors, base, tensors[:length])
    columns, like = _alike(columns), columns[0][0]
    bounds, seeds, keys = _random(seed, keys, keep, like, length)
    config, first = _config(like), [0]
    groups: dict = {}
    for item, (column, b) in enumerate(zip(columns, bases)):
        n = column[0].numel()
        first.append(first[-1] + triton.cdiv(n, config["CHUNK"]))
        if n == 0:
            continue
        row = [*[t.data_ptr() for t in column], 0 if b is None else b.data_ptr(), n]
        even = aligned(row)
        row += [item, keys[item], first[-2], begins[item] if begins else 0]
        groups.setdefault((*_kind(column, b), even), []).append(row)
    partial = like.new_empty((first[-1], 2 * K), dtype=torch.float64)
    for (dtype, base_dtype, even), rows in groups.items():
        table, programs = build(rows, [triton.cdiv(r[K + 1], config["CHUNK"]) for r in rows], like)
        with on_device_of(like):
            consensus_norms_kernel[(len(programs),)](
                table, programs, bounds, seeds, partial, K, KP=triton.next_power_of_2(2 * K),
                **_flags(dtype, base_dtype, even, config),
            )  # fmt: skip
    return _in_order(partial, first, K, length, like)


# ---- ahead-of-time compilation -----------------------------------------------------------------------


def aot() -> Iterator:
    """The variants held to tests/budgets.json: thresholds or random words, with and without a vote."""
    from .._aot import AotCase

    pointers = {"rows": "*i64", "programs": "*i64"}
    rest = {"keep": "*i64", "seeds": "*i64"}
    for name, dtype, vote, random in (
        ("ties_float32", tl.float32, 1, False),
        ("ties_bfloat16", tl.bfloat16, 1, False),
        ("dare_float32", tl.float32, 0, True),
        ("dare_ties_bfloat16", tl.bfloat16, 1, True),
    ):
        flags = {
            "DTYPE": dtype, "BASE": dtype, "HAS_BASE": True, "VOTE": vote, "DIVIDE": vote > 0,
            "RANDOM": random, "ACC": tl.float32, "ALIGNED": True, "BLOCK": 1024, "CHUNK": 8192,
        }  # fmt: skip
        signature = {**pointers, "numbers": "*fp32", **rest, "K": "i32", "length": "i32"}
        yield AotCase(
            name=f"consensus_forward_{name}",
            fn=consensus_forward_kernel,
            signature=signature,
            constexprs={**flags, "OUT": dtype},
            divisible_by_16=("rows", "programs", "numbers"),
        )
        yield AotCase(
            name=f"consensus_backward_{name}",
            fn=consensus_backward_kernel,
            signature={**signature, "partial": "*fp64"},
            constexprs={**flags, "GRAD": dtype, "KP": 16},
            divisible_by_16=("rows", "programs", "numbers", "partial"),
        )
    yield AotCase(
        name="consensus_norms",
        fn=consensus_norms_kernel,
        signature={**pointers, **rest, "partial": "*fp64", "K": "i32"},
        constexprs={
            "DTYPE": tl.float32, "BASE": tl.float32, "HAS_BASE": True,
            "ACC": tl.float32, "ALIGNED": True, "BLOCK": 1024, "CHUNK": 8192, "KP": 16,
        },
        divisible_by_16=("rows", "programs", "partial"),
    )  # fmt: skip
