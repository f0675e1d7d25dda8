"""GPU kernels of core `lincomb`: the formulas are in solera/weights/lincomb.py.

Bytes an element of s bytes: forward (K + 1) s, one more s with a base; backward reads G, the base and, for
the coefficients, the K tensors, and writes what is asked for. The launch covers a whole list through a
pointer table. Up to eight streams (and any mixture of dtypes) are unrolled; more of one dtype run in a loop
with the sum in registers, so memory is read once for any K.

H200 at 4.3 TB/s: 8-way, 100M float32 837 us; 7B bfloat16 29 ms are the floors.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from .._launch import on_device_of
from ._table import LANGUAGE_DTYPE, aligned, build, pointer, program_of, size

UNROLLED = 8  # streams of one dtype; more run in a loop


@triton.jit
def _rounded(value, DTYPE: tl.constexpr):
    """To DTYPE; a half by way of float32, as on the other backends (and the interpreter knows no other)."""
    if DTYPE.primitive_bitwidth == 16:
        value = value.to(tl.float32)
    return value.to(DTYPE)


@triton.jit
def _stream(row, k, at, mask, b, DTYPE: tl.constexpr, HAS_BASE: tl.constexpr, ACC: tl.constexpr,
            ALIGNED: tl.constexpr):  # fmt: skip
    """w_k, or w_k - base."""
    w = tl.load(pointer(row + k, DTYPE, ALIGNED) + at, mask=mask, other=0.0).to(ACC)
    if HAS_BASE:
        w -= b
    return w


# A row of the table: the K streams, the base (or 0), the output, the number of elements, the column.
@triton.jit
def lincomb_forward_kernel(
    rows, programs, coefficients, K, stride_k, stride_item,
    DTYPES: tl.constexpr, COUNT: tl.constexpr, BASE: tl.constexpr, OUT: tl.constexpr,
    HAS_BASE: tl.constexpr, ACC: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """COUNT streams of DTYPES unrolled, or (COUNT = 0) K streams of DTYPES[0] in a loop."""
    item, chunk = program_of(programs)
    row = rows + item * (K + 4)
    n = size(row + K + 2, ALIGNED)
    c = coefficients + tl.load(row + K + 3) * stride_item
    out = pointer(row + K + 1, OUT, ALIGNED)
    end = tl.minimum(n, (chunk + 1) * CHUNK)
    for start in range(chunk * CHUNK, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        mask = at < n
        b = tl.zeros((BLOCK,), ACC)
        if HAS_BASE:
            b = tl.load(pointer(row + K, BASE, ALIGNED) + at, mask=mask, other=0.0).to(ACC)
        total = b
        if COUNT > 0:
            for k in tl.static_range(COUNT):
                w = _stream(row, k, at, mask, b, DTYPES[k], HAS_BASE, ACC, ALIGNED)
                total += tl.load(c + k * stride_k).to(ACC) * w
        else:
            for k in range(K):
                w = _stream(row, k, at, mask, b, DTYPES[0], HAS_BASE, ACC, ALIGNED)
                total += tl.load(c + k * stride_k).to(ACC) * w
        tl.store(out + at, _rounded(total, OUT), mask=mask)


@triton.jit
def _store_gradient(row, entry, at, mask, g, factor, DTYPE: tl.constexpr, ACC: tl.constexpr,
                    ALIGNED: tl.constexpr):  # fmt: skip
    """factor * g where the table holds an address."""
    if tl.load(row + entry) != 0:
        value = g * tl.load(factor).to(ACC)
        tl.store(pointer(row + entry, DTYPE, ALIGNED) + at, _rounded(value, DTYPE), mask=mask)


# A row: the K streams, the base (or 0), G, then where K + 1 gradients go (or 0), the number of elements,
# the column, the first partial.
@triton.jit
def lincomb_backward_kernel(
    rows, programs, factors, partial, K, length,
    DTYPES: tl.constexpr, COUNT: tl.constexpr, BASE: tl.constexpr, GRAD: tl.constexpr,
    HAS_BASE: tl.constexpr, NEED_DOTS: tl.constexpr, NEED_TENSORS: tl.constexpr, ACC: tl.constexpr,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    """K dots of a chunk into partial[first + chunk], and factors[k] * G; factors is (K + 1, length)."""
    item, chunk = program_of(programs)
    row = rows + item * (2 * K + 6)
    n = size(row + 2 * K + 3, ALIGNED)
    factor = factors + tl.load(row + 2 * K + 4)
    lane = tl.arange(0, KP)
    dots = tl.zeros((KP,), tl.float64)
    end = tl.minimum(n, (chunk + 1) * CHUNK)
    for start in range(chunk * CHUNK, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        mask = at < n
        g = tl.load(pointer(row + K + 1, GRAD, ALIGNED) + at, mask=mask, other=0.0).to(ACC)
        b = tl.zeros((BLOCK,), ACC)
        if NEED_DOTS and HAS_BASE:
            b = tl.load(pointer(row + K, BASE, ALIGNED) + at, mask=mask, other=0.0).to(ACC)
        if COUNT > 0:
            for k in tl.static_range(COUNT):
                if NEED_DOTS:
                    w = _stream(row, k, at, mask, b, DTYPES[k], HAS_BASE, ACC, ALIGNED)
                    dots += tl.where(
                        lane == k, tl.sum(tl.where(mask, g * w, 0.0)).to(tl.float64), 0.0
                    )
                if NEED_TENSORS:
                    _store_gradient(
                        row, K + 2 + k, at, mask, g, factor + k * length, DTYPES[k], ACC, ALIGNED
                    )
        else:
            for k in range(K):
                if NEED_DOTS:
                    w = _stream(row, k, at, mask, b, DTYPES[0], HAS_BASE, ACC, ALIGNED)
                    dots += tl.where(
                        lane == k, tl.sum(tl.where(mask, g * w, 0.0)).to(tl.float64), 0.0
                    )
                if NEED_TENSORS:
                    _store_gradient(
                        row, K + 2 + k, at, mask, g, factor + k * length, DTYPES[0], ACC, ALIGNED
                    )
        if NEED_TENSORS and HAS_BASE:
            _store_gradient(row, 2 * K + 2, at, mask, g, factor + K * length, BASE, ACC, ALIGNED)
    if NEED_DOTS:
        slot = tl.load(row + 2 * K + 5) + chunk
        tl.store(partial + slot * K + lane, dots, mask=lane < K)


@triton.jit
def lincomb_sum_kernel(first, partial, dots, K, length, KP: tl.constexpr, C: tl.constexpr):
    """dots[k, item] = sum over the item's chunks, in order; the item's range is first[item : item + 2]."""
    item = tl.program_id(0)
    begin, end = tl.load(first + item), tl.load(first + item + 1)
    lane = tl.arange(0, KP)[None, :]
    total = tl.zeros((C, KP), tl.float64)
    for start in range(begin, end, C):
        slot = start + tl.arange(0, C)[:, None]
        total += tl.load(partial + slot * K + lane, mask=(slot < end) & (lane < K), other=0.0)
    found = tl.sum(total, 0)
    lane = tl.arange(0, KP)
    tl.store(dots + lane * length + item, found, mask=lane < K)


# ---- launchers ---------------------------------------------------------------------------------------


def _config(x: torch.Tensor) -> dict[str, int]:
    """Elements a step and a program: eight a thread; larger for the interpreter, which pays by the program."""
    if x.is_cuda:
        return {"BLOCK": 1024, "CHUNK": 8192, "num_warps": 4}
    return {"BLOCK": 4096, "CHUNK": 16384, "num_warps": 4}


def _unrolled(dtypes: tuple) -> tuple[tuple, int]:
    """(DTYPES, COUNT) of the kernels."""
    if len(dtypes) <= UNROLLED or len(set(dtypes)) > 1:
        return tuple(LANGUAGE_DTYPE[d] for d in dtypes), len(dtypes)
    return (LANGUAGE_DTYPE[dtypes[0]],), 0


def _accumulator(dtypes) -> tl.dtype:
    return tl.float64 if torch.float64 in dtypes else tl.float32


def _columns(tensors, base, like):
    """The streams of each item, contiguous, and its base or None. A wrong shape would read past the end."""
    length = len(like)
    if any([t.shape != like[i % length].shape for i, t in enumerate((*tensors, *base))]):
        raise RuntimeError("lincomb: a tensor differs in shape from the first model's")
    tensors = [t.contiguous() for t in tensors]
    base = [t.contiguous() for t in base] or [None] * length
    return [tensors[item::length] for item in range(length)], base


def _strides(coefficients):
    return coefficients.stride(0), coefficients.stride(1) if coefficients.dim() == 2 else 0


def _combine(columns, bases, coefficients, out):
    groups: dict = {}
    config = _config(out[0])
    for item, (column, base, y) in enumerate(zip(columns, bases, out)):
        if y.numel() == 0:
            continue
        numbers = [t.data_ptr() for t in (*column, *([] if base is None else [base]), y)] + [
            y.numel()
        ]
        row = [t.data_ptr() for t in column]
        row += [0 if base is None else base.data_ptr(), y.data_ptr(), y.numel(), item]
        dtypes = tuple(t.dtype for t in column)
        key = (dtypes, None if base is None else base.dtype, y.dtype, aligned(numbers))
        groups.setdefault(key, []).append(row)
    stride_k, stride_item = _strides(coefficients)
    for (dtypes, base_dtype, out_dtype, even), rows in groups.items():
        DTYPES, COUNT = _unrolled(dtypes)
        chunks = [triton.cdiv(row[-2], config["CHUNK"]) for row in rows]
        table, programs = build(rows, chunks, out[0])
        with on_device_of(out[0]):
            lincomb_forward_kernel[(len(programs),)](
                table, programs, coefficients, len(dtypes), stride_k, stride_item, DTYPES=DTYPES,
                COUNT=COUNT, BASE=LANGUAGE_DTYPE[base_dtype or dtypes[0]], OUT=LANGUAGE_DTYPE[out_dtype],
                HAS_BASE=base_dtype is not None, ACC=_accumulator((*dtypes, base_dtype, out_dtype)),
                ALIGNED=even, **config,
            )  # fmt: skip


def lincomb(tensors, coefficients, base, out_dtype):
    length = len(tensors) // coefficients.shape[0]
    columns, bases = _columns(tensors, base, tensors[:length])
    out = []
    for column, b in zip(columns, bases):
        dtype = out_dtype
        if dtype is None:
            dtype = column[0].dtype
            for t in (*column, *([] if b is None else [b])):
                dtype = torch.promote_types(dtype, t.dtype)
        out.append(column[0].new_empty(column[0].shape, dtype=dtype))
    _combine(columns, bases, coefficients, out)
    return out


def lincomb_out(tensors, coefficients, base, out):
    columns, bases = _columns(tensors, base, out)
    dense = [
        t if t.is_contiguous() else torch.empty_like(t, memory_format=torch.contiguous_format)
        for t in out
    ]
    _combine(columns, bases, coefficients, dense)
    for t, computed in zip(out, dense):
        if t is not computed:
            t.copy_(computed)


def lincomb_backward(grads, tensors, coefficients, base, need_coefficients, need_tensors):
    K, length = coefficients.shape[0], len(grads)
    grads = [g.contiguous() for g in grads]
    columns, bases = _columns(tensors, base, grads if need_coefficients else tensors[:length])
    every = (*tensors, *base)
    found = [
        grads[i % length].new_empty(grads[i % length].shape, dtype=every[i].dtype) if need else None
        for i, need in enumerate(need_tensors)
    ]
    like = grads[0]
    config = _config(like)
    c = coefficients if coefficients.dim() == 2 else coefficients[:, None].expand(K, length)
    factors = torch.cat([c.double(), 1 - c.double().sum(0, keepdim=True)])
    first, groups = [0], {}
    for item, (column, b, g) in enumerate(zip(columns, bases, grads)):
        chunks = triton.cdiv(g.numel(), config["CHUNK"])
        first.append(first[-1] + chunks)
        if chunks == 0:
            continue
        targets = [0 if t is None else t.data_ptr() for t in found[item::length]]
        targets += [0] * (K + 1 - len(targets))
        row = [t.data_ptr() for t in column] + [
            0 if b is None else b.data_ptr(),
            g.data_ptr(),
            *targets,
        ]
        even = aligned([*row, g.numel()])
        row += [g.numel(), item, first[-2]]
        key = (tuple(t.dtype for t in column), None if b is None else b.dtype, g.dtype, even)
        groups.setdefault(key, []).append(row)
    KP = triton.next_power_of_2(K)
    partial = factors.new_empty((first[-1], K) if need_coefficients else (0,))
    for (dtypes, base_dtype, grad_dtype, even), rows in groups.items():
        DTYPES, COUNT = _unrolled(dtypes)
        table, programs = build(rows, [triton.cdiv(r[-3], config["CHUNK"]) for r in rows], like)
        with on_device_of(like):
            lincomb_backward_kernel[(len(programs),)](
                table, programs, factors, partial, K, length, DTYPES=DTYPES, COUNT=COUNT,
                BASE=LANGUAGE_DTYPE[base_dtype or dtypes[0]], GRAD=LANGUAGE_DTYPE[grad_dtype],
                HAS_BASE=base_dtype is not None, NEED_DOTS=need_coefficients,
                NEED_TENSORS=any(need_tensors), ACC=_accumulator((*dtypes, base_dtype, grad_dtype)),
                ALIGNED=even, KP=KP, **config,
            )  # fmt: skip
    dots = factors.new_empty((K, length) if need_coefficients else (0,))
    if need_coefficients:
        ranges, _ = build([first], [0], like)
        with on_device_of(like):
            lincomb_sum_kernel[(length,)](
                ranges, partial, dots, K, length, KP=KP, C=max(1, 256 // KP)
            )
    return dots, [t for t in found if t is not None]


# ---- ahead-of-time compilation -----------------------------------------------------------------------


def aot() -> Iterator:
    """The variants held to tests/budgets.json: eight streams and the loop, float32 and bfloat16, all switched on."""
    from .._aot import AotCase

    pointers = {"rows": "*i64", "programs": "*i64"}
    even = ("rows", "programs", "coefficients")
    for name, dtype, count in (
        ("float32", tl.float32, 8),
        ("bfloat16", tl.bfloat16, 8),
        ("loop", tl.bfloat16, 0),
    ):
        flags = {
            "DTYPES": (dtype,) * max(count, 1), "COUNT": count, "BASE": dtype, "HAS_BASE": True,
            "ACC": tl.float32, "ALIGNED": True, "BLOCK": 1024, "CHUNK": 8192,
        }  # fmt: skip
        yield AotCase(
            name=f"lincomb_forward_{name}",
            fn=lincomb_forward_kernel,
            signature={
                **pointers,
                "coefficients": "*fp32",
                "K": "i32",
                "stride_k": "i32",
                "stride_item": "i32",
            },
            constexprs={**flags, "OUT": dtype},
            divisible_by_16=even,
        )
        yield AotCase(
            name=f"lincomb_backward_{name}",
            fn=lincomb_backward_kernel,
            signature={
                **pointers,
                "factors": "*fp64",
                "partial": "*fp64",
                "K": "i32",
                "length": "i32",
            },
            constexprs={**flags, "GRAD": dtype, "NEED_DOTS": True, "NEED_TENSORS": True, "KP": 8},
            divisible_by_16=("rows", "programs", "factors", "partial"),
        )
    yield AotCase(
        name="lincomb_sum",
        fn=lincomb_sum_kernel,
        signature={
            "first": "*i64",
            "partial": "*fp64",
            "dots": "*fp64",
            "K": "i32",
            "length": "i32",
        },
        constexprs={"KP": 8, "C": 32},
        divisible_by_16=("first", "partial", "dots"),
    )
