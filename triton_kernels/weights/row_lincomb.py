"""GPU form of core `row_lincomb`: the kernels of lincomb, with each row as an item of its own.

The table of pointers has a line a row (K + 4 numbers forward), so that rows of any length, of any number of
tensors, are one launch for each combination of dtypes. For rows of a few hundred elements the table is as
large as a model's row; its bytes are counted in docs/performance/row_lincomb.md.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton

from .._launch import on_device_of
from ._table import LANGUAGE_DTYPE, aligned, build, each_row
from .gram import grouped, rows_of
from .lincomb import (
    _accumulator,
    _columns,
    _config,
    _strides,
    _unrolled,
    lincomb_backward_kernel,
    lincomb_forward_kernel,
    lincomb_sum_kernel,
)


def _addresses(tensors, n):
    """Where each tensor begins (0 for none), and the way from a row of n elements to the next."""
    return (
        [0 if t is None else t.data_ptr() for t in tensors],
        [0 if t is None else n * t.element_size() for t in tensors],
    )


def row_lincomb(tensors, coefficients, base, out_dtype):
    length = len(tensors) // coefficients.shape[0]
    columns, bases = _columns(tensors, base, tensors[:length])
    like = tensors[0]
    config = _config(like)
    groups: dict = {}
    out, start = [], 0
    for column, b in zip(columns, bases):
        dtype = out_dtype
        if dtype is None:
            dtype = column[0].dtype
            for t in (*column, *([] if b is None else [b])):
                dtype = torch.promote_types(dtype, t.dtype)
        y = column[0].new_empty(column[0].shape, dtype=dtype)
        out.append(y)
        rows, n = rows_of(y, True)
        chunks = triton.cdiv(n, config["CHUNK"])
        if rows and chunks:
            row, steps = _addresses([*column, b, y], n)
            even = aligned([*row, n])
            key = (tuple(t.dtype for t in column), None if b is None else b.dtype, dtype, even)
            grouped(groups, key, each_row([*row, n, start], [*steps, 0, 1], rows), chunks)
        start += rows
    stride_k, stride_row = _strides(coefficients)
    for (dtypes, base_dtype, dtype, even), (lines, chunks) in groups.items():
        DTYPES, COUNT = _unrolled(dtypes)
        table, programs = build(torch.cat(lines), torch.cat(chunks), like)
        with on_device_of(like):
            lincomb_forward_kernel[(len(programs),)](
                table, programs, coefficients, len(dtypes), stride_k, stride_row, DTYPES=DTYPES,
                COUNT=COUNT, BASE=LANGUAGE_DTYPE[base_dtype or dtypes[0]], OUT=LANGUAGE_DTYPE[dtype],
                HAS_BASE=base_dtype is not None, ACC=_accumulator((*dtypes, base_dtype, dtype)),
                ALIGNED=even, **config,
            )  # fmt: skip
    return out


def row_lincomb_backward(grads, tensors, coefficients, base, need_coefficients, need_tensors):
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
    c = coefficients.double()
    factors = torch.cat([c, 1 - c.sum(0, keepdim=True)])
    groups: dict = {}
    first, start, total = [torch.zeros(1, dtype=torch.int64)], 0, 0
    for item, (column, b, g) in enumerate(zip(columns, bases, grads)):
        rows, n = rows_of(g, True)
        chunks = triton.cdiv(n, config["CHUNK"])
        first.append(total + chunks * torch.arange(1, rows + 1))
        if rows and chunks:
            targets = [*found[item::length], *([None] if b is None else [])]
            row, steps = _addresses([*column, b, g, *targets], n)
            even = aligned([*row, n])
            key = (tuple(t.dtype for t in column), None if b is None else b.dtype, g.dtype, even)
            line = each_row([*row, n, start, total], [*steps, 0, 1, chunks], rows)
            grouped(groups, key, line, chunks)
        start += rows
        total += rows * chunks
    KP = triton.next_power_of_2(K)
    partial = factors.new_empty((total, K) if need_coefficients else (0,))
    for (dtypes, base_dtype, grad_dtype, even), (lines, chunks) in groups.items():
        DTYPES, COUNT = _unrolled(dtypes)
        table, programs = build(torch.cat(lines), torch.cat(chunks), like)
        with on_device_of(like):
            lincomb_backward_kernel[(len(programs),)](
                table, programs, factors, partial, K, start, DTYPES=DTYPES, COUNT=COUNT,
                BASE=LANGUAGE_DTYPE[base_dtype or dtypes[0]], GRAD=LANGUAGE_DTYPE[grad_dtype],
                HAS_BASE=base_dtype is not None, NEED_DOTS=need_coefficients,
                NEED_TENSORS=any(need_tensors), ACC=_accumulator((*dtypes, base_dtype, grad_dtype)),
                ALIGNED=even, KP=KP, **config,
            )  # fmt: skip
    dots = factors.new_empty((K, start) if need_coefficients else (0,))
    if need_coefficients and start:
        ranges, _ = build(torch.cat(first), [0], like)
        with on_device_of(like):
            lincomb_sum_kernel[(start,)](
                ranges, partial, dots, K, start, KP=KP, C=max(1, 256 // KP)
            )
    return dots, [t for t in found if t is not None]


def aot() -> Iterator:
    """No kernels of its own: those of lincomb are held to their budgets there."""
    return iter(())
