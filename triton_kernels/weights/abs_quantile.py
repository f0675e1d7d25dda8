"""GPU kernels of core `abs_quantile`: what they compute is said in solera/weights/abs_quantile.py.

A radix search over the bits of |w - base|, eleven at a time from the top: a histogram of the digit among the keys
whose higher bits are those found so far, then one program for each rank picks the digit. float32 takes three
passes (float64 six), each reading the tensor and the base; counts are integers, so atomic adds keep the result
exact and the same every time. Thresholds stay on the device.

H200 at 4.3 TB/s: 8 x 100M float32 and a base, three passes: 4.5 ms is the floor.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from ...weights.abs_quantile import abs_digits_reference
from .._launch import on_device_of
from ._table import LANGUAGE_DTYPE, aligned, build, pointer, program_of, size

DIGIT = 11
BITS = tl.constexpr(DIGIT)
BINS = tl.constexpr(1 << DIGIT)


@triton.jit
def _keys(w, base, at, mask, HAS_BASE: tl.constexpr, WIDE: tl.constexpr, KEY64: tl.constexpr):
    """The bits of |w - base| as int64: as integers they order like the numbers, NaN last."""
    ACC: tl.constexpr = tl.float64 if WIDE else tl.float32
    d = tl.load(w + at, mask=mask, other=0.0).to(ACC)
    if HAS_BASE:
        d -= tl.load(base + at, mask=mask, other=0.0).to(ACC)
    if KEY64:
        key = d.to(tl.float64).to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
    else:
        key = (d.to(tl.int32, bitcast=True) & 0x7FFFFFFF).to(tl.int64)
    return key


# A row of the table: w, base (or 0), number of elements, the place of the rank.
@triton.jit
def abs_quantile_count_kernel(
    rows, programs, prefixes, bins, shift,
    W: tl.constexpr, BASE: tl.constexpr, HAS_BASE: tl.constexpr, WIDE: tl.constexpr, KEY64: tl.constexpr,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    item, chunk = program_of(programs)
    row = rows + item * 4
    n = size(row + 2, ALIGNED)
    place = tl.load(row + 3)
    prefix = tl.load(prefixes + place)
    w, base = pointer(row, W, ALIGNED), pointer(row + 1, BASE, ALIGNED)
    counts = tl.zeros((BINS,), tl.int32)
    end = tl.minimum(n, (chunk + 1) * CHUNK)
    for start in range(chunk * CHUNK, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        rest = _keys(w, base, at, at < n, HAS_BASE, WIDE, KEY64) >> shift
        live = (at < n) & ((rest >> BITS) == prefix)
        counts += tl.histogram((rest & (BINS - 1)).to(tl.int32), BINS, mask=live)
    digit = tl.arange(0, BINS)
    tl.atomic_add(bins + place * BINS + digit, counts.to(tl.int64), mask=counts > 0)


@triton.jit
def abs_quantile_pick_kernel(
    places, prefixes, ranks, bins, out, LAST: tl.constexpr, KEY64: tl.constexpr
):
    """The digit of one rank; the bins are left at zero. After the last digit the threshold is written."""
    place = tl.load(places + tl.program_id(0))
    digit = tl.arange(0, BINS)
    mine = bins + place * BINS + digit
    counts = tl.load(mine)
    rank = tl.load(ranks + place)
    from_here = tl.sum(counts) - tl.cumsum(counts) + counts  # keys of this digit or a larger one
    found = tl.sum((from_here >= rank).to(tl.int64)) - 1
    prefix = tl.load(prefixes + place) * BINS + found
    if LAST:
        if KEY64:
            value = prefix.to(tl.float64, bitcast=True)
        else:
            value = prefix.to(tl.int32).to(tl.float32, bitcast=True).to(tl.float64)
        value = tl.where((rank > 0) & (value == value), value, float("inf"))
        tl.store(out + place, value)
    else:
        above = tl.sum(tl.where(digit == found, from_here - counts, 0))
        tl.store(prefixes + place, prefix)
        tl.store(ranks + place, rank - above)
        tl.store(mine, tl.zeros_like(counts))


# ---- launcher ----------------------------------------------------------------------------------------


def _config(x: torch.Tensor) -> dict[str, int]:
    """A program's histogram is added to the common one at its end: large chunks make few of those."""
    if x.is_cuda:
        return {"BLOCK": 2048, "CHUNK": 65536, "num_warps": 8}
    return {"BLOCK": 16384, "CHUNK": 65536, "num_warps": 4}


def _rows(tensors, base, models, groups):
    """Rows of the table by what their kernels are specialised for."""
    length = len(tensors) // models
    found: dict = {}
    wide_places: set[int] = set()
    for item in range(length):
        column, b = tensors[item::length], base[item] if base else None
        dtypes = [t.dtype for t in (*column, *([] if b is None else [b]))]
        wide = torch.float64 in dtypes
        group = item if groups == length else 0
        if wide:
            wide_places.update(k * groups + group for k in range(models))
        for k, w in enumerate(column):
            row = [w.data_ptr(), 0 if b is None else b.data_ptr(), w.numel(), k * groups + group]
            if w.numel():
                key = (w.dtype, None if b is None else b.dtype, wide, aligned(row[:3]))
                found.setdefault(key, []).append(row)
    return found, wide_places


def abs_quantile(tensors, base, models, ranks, whole):
    length = len(tensors) // models
    if any([t.shape != tensors[i % length].shape for i, t in enumerate((*tensors, *base))]):
        raise RuntimeError("abs_quantile: a tensor differs in shape from the first model's")
    tensors, base = [t.contiguous() for t in tensors], [t.contiguous() for t in base]
    groups = 1 if whole else length
    like, places = tensors[0], models * groups
    out = like.new_empty((models, groups), dtype=torch.float64)
    config = _config(like)
    left = build([ranks], [0], like)[0].clone()
    prefixes = torch.zeros(places, dtype=torch.int64, device=like.device)
    bins = torch.zeros((places, 1 << DIGIT), dtype=torch.int64, device=like.device)
    rows, wide_places = _rows(tensors, base, models, groups)
    for key64 in (False, True):
        here = [p for p in range(places) if (p in wide_places) == key64]
        if not here:
            continue
        launches = []
        for (dtype, base_dtype, wide, even), members in rows.items():
            members = [row for row in members if (row[3] in wide_places) == key64]
            if not members:
                continue
            chunks = [triton.cdiv(row[2], config["CHUNK"]) for row in members]
            flags = {
                "W": LANGUAGE_DTYPE[dtype], "BASE": LANGUAGE_DTYPE[base_dtype or dtype],
                "HAS_BASE": base_dtype is not None, "WIDE": wide, "KEY64": key64, "ALIGNED": even,
            }  # fmt: skip
            launches.append((*build(members, chunks, like), flags))
        ids, _ = build([here], [0], like)
        with on_device_of(like):
            for shift in range((62 if key64 else 30) // DIGIT * DIGIT, -1, -DIGIT):
                for table, programs, flags in launches:
                    abs_quantile_count_kernel[(len(programs),)](
                        table, programs, prefixes, bins, shift, **flags, **config
                    )
                abs_quantile_pick_kernel[(len(here),)](
                    ids, prefixes, left, bins, out, LAST=shift == 0, KEY64=key64
                )
    return out


def abs_digits(tensors, base, which, prefixes, shift):
    """torch's bincount: these counts are for tensors that come from a disk, which is slower."""
    return abs_digits_reference(tensors, base, which, prefixes, shift)


# ---- ahead-of-time compilation -----------------------------------------------------------------------


def aot() -> Iterator:
    """The variants held to tests/budgets.json."""
    from .._aot import AotCase

    for name, dtype, wide in (
        ("float32", tl.float32, False),
        ("bfloat16", tl.bfloat16, False),
        ("float64", tl.float64, True),
    ):
        yield AotCase(
            name=f"abs_quantile_count_{name}",
            fn=abs_quantile_count_kernel,
            signature={
                "rows": "*i64", "programs": "*i64", "prefixes": "*i64", "bins": "*i64", "shift": "i32",
            },
            constexprs={
                "W": dtype, "BASE": dtype, "HAS_BASE": True, "WIDE": wide, "KEY64": wide, "ALIGNED": True,
                "BLOCK": 2048, "CHUNK": 65536,
            },
            divisible_by_16=("rows", "programs", "prefixes", "bins"),
            num_warps=8,
        )  # fmt: skip
    yield AotCase(
        name="abs_quantile_pick",
        fn=abs_quantile_pick_kernel,
        signature={
            "places": "*i64", "prefixes": "*i64", "ranks": "*i64", "bins": "*i64", "out": "*fp64",
        },
        constexprs={"LAST": True, "KEY64": False},
        divisible_by_16=("places", "prefixes", "ranks", "bins", "out"),
    )  # fmt: skip
