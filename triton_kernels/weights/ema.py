"""GPU kernels of core `ema`: the formulas and the definition of the random bits are in solera/weights/ema.py.

Bytes an element: reads the average and the parameter, writes the average. One launch covers all tensors of a
pair of dtypes through a pointer table. With stochastic rounding a step is R chunks of 1024 elements: the
Philox blocks of an [R, 128] tile of counters give eight [R, 128] tiles of 16 random bits. Compiled without
contraction to fused multiply-adds, so the bits are those of the other backends.

H200 at 4.3 TB/s: 200 x 100k bfloat16 28 us is the floor.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from .._launch import accumulator, on_device_of
from ._table import LANGUAGE_DTYPE, aligned, build, pointer, program_of, size

HALVES = (torch.bfloat16, torch.float16)


@triton.jit
def _averaged(average, parameter, weight, at, mask, COPY: tl.constexpr, ACC: tl.constexpr):
    p = tl.load(parameter + at, mask=mask, other=0.0).to(ACC)
    if not COPY:
        a = tl.load(average + at, mask=mask, other=0.0).to(ACC)
        p = a + weight * (p - a)
    return p


# A row of the table: average, parameter, number of elements, index in the list, the bits of the weight.
@triton.jit
def ema_nearest_kernel(
    rows, programs, AVERAGE: tl.constexpr, PARAMETER: tl.constexpr, COPY: tl.constexpr,
    ACC: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    item, chunk = program_of(programs)
    row = rows + item * 5
    average = pointer(row, AVERAGE, ALIGNED)
    parameter = pointer(row + 1, PARAMETER, ALIGNED)
    n = size(row + 2, ALIGNED)
    weight = tl.load(row + 4).to(tl.float64, bitcast=True).to(ACC)
    end = tl.minimum(n, (chunk + 1) * CHUNK)
    for start in range(chunk * CHUNK, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = _averaged(average, parameter, weight, at, at < n, COPY, ACC)
        tl.store(average + at, value.to(AVERAGE), mask=at < n)


@triton.jit
def _round(x, r, HALF: tl.constexpr):
    """float32 x to HALF, up with the probability of what is cut off; r holds 16 random bits."""
    u = x.to(tl.uint32, bitcast=True)
    if HALF == tl.bfloat16:
        rounded = ((u + r) & 0xFFFF0000).to(tl.float32, bitcast=True)
        return tl.where(x == x, rounded, x).to(HALF)
    else:
        magnitude = u & 0x7FFFFFFF
        normal = ((magnitude + (r >> 3)) & 0xFFFFE000).to(tl.float32, bitcast=True)
        tiny_size = magnitude < 0x38800000
        scaled = tl.where(tiny_size, tl.abs(x), 0.0) * 16777216.0
        whole = tl.floor(scaled)
        threshold = 1.0 - r.to(tl.float32) * 1.52587890625e-05
        tiny = (whole + tl.where(scaled - whole >= threshold, 1.0, 0.0)) * 5.9604644775390625e-08
        rounded = tl.where(tiny_size, tiny, normal).to(tl.uint32, bitcast=True) | (u & 0x80000000)
        kept = tl.where(magnitude >= 0x7F800000, u, rounded)
        return kept.to(tl.float32, bitcast=True).to(HALF)


@triton.jit
def ema_stochastic_kernel(
    rows, programs, state, AVERAGE: tl.constexpr, PARAMETER: tl.constexpr, COPY: tl.constexpr,
    ALIGNED: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    item, chunk = program_of(programs)
    row = rows + item * 5
    average = pointer(row, AVERAGE, ALIGNED)
    parameter = pointer(row + 1, PARAMETER, ALIGNED)
    n = size(row + 2, ALIGNED)
    index = tl.load(row + 3).to(tl.uint32)
    weight = tl.load(row + 4).to(tl.float64, bitcast=True).to(tl.float32)
    seed, step = tl.load(state), tl.load(state + 1).to(tl.uint32)
    group = chunk * R + tl.arange(0, R)[:, None]  # [R, 1], chunks of 1024
    lane = tl.arange(0, 128)[None, :]  # [1, 128]
    block = group * 128 + lane  # [R, 128]
    zero = tl.zeros((R, 128), tl.uint32)
    r0, r1, r2, r3 = tl.philox(
        seed, block.to(tl.uint32), (block >> 32).to(tl.uint32), zero + index, zero + step
    )
    for slot in tl.static_range(8):
        if slot // 2 == 0:
            word = r0
        elif slot // 2 == 1:
            word = r1
        elif slot // 2 == 2:
            word = r2
        else:
            word = r3
        r = (word >> (16 * (slot % 2))) & 0xFFFF
        at = group * 1024 + slot * 128 + lane
        value = _averaged(average, parameter, weight, at, at < n, COPY, tl.float32)
        tl.store(average + at, _round(value, r, AVERAGE), mask=at < n)


# ---- launcher ----------------------------------------------------------------------------------------


def _config(x: torch.Tensor) -> dict[str, int]:
    if x.is_cuda:
        return {"BLOCK": 1024, "CHUNK": 8192, "num_warps": 4}
    return {"BLOCK": 4096, "CHUNK": 16384, "num_warps": 4}


ROWS = 8  # chunks of 1024 a program with stochastic rounding: eight counters a thread


def ema_(averages, parameters, decay, seed):
    if any([a.shape != p.shape for a, p in zip(averages, parameters, strict=True)]):
        raise RuntimeError("ema_: a parameter differs in shape from its average")
    weight = 1 - decay
    (bits,) = struct.unpack("q", struct.pack("d", weight))
    targets = [a.contiguous() for a in averages]
    sources = [p.contiguous() for p in parameters]
    groups: dict = {}
    for index, (a, p) in enumerate(zip(targets, sources)):
        if a.numel() == 0:
            continue
        row = [a.data_ptr(), p.data_ptr(), a.numel(), index, bits]
        random = seed is not None and a.dtype in HALVES
        groups.setdefault((a.dtype, p.dtype, random, aligned(row[:3])), []).append((row, a))
    for (average, parameter, random, even), members in groups.items():
        rows, like = [row for row, _ in members], members[0][1]
        config = _config(like)
        flags = {
            "AVERAGE": LANGUAGE_DTYPE[average], "PARAMETER": LANGUAGE_DTYPE[parameter],
            "COPY": decay == 0, "ALIGNED": even, "enable_fp_fusion": False,
        }  # fmt: skip
        step = ROWS * 1024 if random else config["CHUNK"]
        table, programs = build(rows, [triton.cdiv(row[2], step) for row in rows], like)
        with on_device_of(like):
            if random:
                ema_stochastic_kernel[(len(programs),)](
                    table, programs, seed, R=ROWS, num_warps=4, **flags
                )
            else:
                ema_nearest_kernel[(len(programs),)](
                    table, programs, ACC=accumulator(like), **flags, **config
                )
    for a, computed in zip(averages, targets):
        if a is not computed and not a.is_contiguous():
            a.copy_(computed)


# ---- ahead-of-time compilation -----------------------------------------------------------------------


def aot() -> Iterator:
    """The variants held to tests/budgets.json."""
    from .._aot import AotCase

    pointers = {"rows": "*i64", "programs": "*i64"}
    for name, dtype in (("float32", tl.float32), ("bfloat16", tl.bfloat16)):
        yield AotCase(
            name=f"ema_nearest_{name}",
            fn=ema_nearest_kernel,
            signature=pointers,
            constexprs={
                "AVERAGE": dtype, "PARAMETER": dtype, "COPY": False, "ACC": tl.float32, "ALIGNED": True,
                "BLOCK": 1024, "CHUNK": 8192,
            },
            divisible_by_16=tuple(pointers),
        )  # fmt: skip
    for name, dtype in (("bfloat16", tl.bfloat16), ("float16", tl.float16)):
        yield AotCase(
            name=f"ema_stochastic_{name}",
            fn=ema_stochastic_kernel,
            signature={**pointers, "state": "*i64"},
            constexprs={
                "AVERAGE": dtype,
                "PARAMETER": tl.float32,
                "COPY": False,
                "ALIGNED": True,
                "R": ROWS,
            },
            divisible_by_16=(*pointers, "state"),
        )
