"""GPU kernels of core `sparse_delta`: the formulas are in solera/weights/sparse_delta.py.

Forward and dx: the weight copied, the entries put in, and torch's product. dvalue: a program takes E entries and
runs over the rows of the batch, of the transposed operands, so that an entry reads two contiguous pieces a step;
two reads of N elements an entry, most of them from L2.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl

from .._launch import accumulator, on_device_of
from .reparam_linear import bias_gradient, input_gradient, product


@triton.jit
def put_kernel(weight, index, value, entries, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    at = tl.load(index + i, mask=i < entries, other=0)
    v = tl.load(value + i, mask=i < entries, other=0.0)
    tl.store(weight + at, v.to(weight.dtype.element_ty), mask=i < entries)


@triton.jit
def dots_kernel(
    dy, x, index, out, rows, columns, entries, ACC: tl.constexpr, E: tl.constexpr, N: tl.constexpr
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * E + tl.arange(0, E)
    live = i < entries
    at = tl.load(index + i, mask=live, other=0)
    row = at // columns
    column = at - row * columns
    total = tl.zeros((E, N), ACC)
    for start in range(0, rows, N):
        n = start + tl.arange(0, N)
        inside = live[:, None] & (n < rows)[None, :]
        g = tl.load(dy + row[:, None] * rows + n[None, :], mask=inside, other=0.0).to(ACC)
        z = tl.load(x + column[:, None] * rows + n[None, :], mask=inside, other=0.0).to(ACC)
        total += g * z
    tl.store(out + i, tl.sum(total, 1).to(out.dtype.element_ty), mask=live)


# ---- launchers ---------------------------------------------------------------------------------------


def _made(weight, index, value):
    made = weight.contiguous().clone()
    entries, block = index.numel(), 1024
    if entries:
        with on_device_of(made):
            put_kernel[(triton.cdiv(entries, block),)](
                made, index.contiguous(), value.contiguous(), entries, BLOCK=block
            )
    return made


def sparse_delta_linear(x, weight, index, value, bias):
    return product(x, _made(weight, index, value), bias)


def sparse_delta_linear_backward(dy, x, weight, index, value, need_x, need_value, need_bias):
    dx = input_gradient(dy, _made(weight, index, value), x) if need_x else x.new_empty(0)
    dvalue = value.new_empty(value.shape if need_value else 0)
    if dvalue.numel():
        dy_t, x_t = dy.t().contiguous(), x.t().contiguous()
        entries, block = index.numel(), 32 if x.is_cuda else 256
        with on_device_of(x):
            dots_kernel[(triton.cdiv(entries, block),)](
                dy_t, x_t, index.contiguous(), dvalue, x.shape[0], weight.shape[1], entries,
                ACC=accumulator(weight), E=block, N=64,
            )  # fmt: skip
    return dx, dvalue, bias_gradient(dy, weight, need_bias)


# ---- ahead-of-time compilation -----------------------------------------------------------------------


def aot() -> Iterator:
    """The variants held to tests/budgets.json."""
    from .._aot import AotCase

    for name, kind in (("float32", "*fp32"), ("bfloat16", "*bf16")):
        yield AotCase(
            name=f"sparse_put_{name}",
            fn=put_kernel,
            signature={"weight": kind, "index": "*i64", "value": "*fp32", "entries": "i32"},
            constexprs={"BLOCK": 1024},
            divisible_by_16=("weight", "index", "value", "entries"),
        )
        yield AotCase(
            name=f"sparse_dots_{name}",
            fn=dots_kernel,
            signature={
                "dy": kind, "x": kind, "index": "*i64", "out": "*fp32", "rows": "i32",
                "columns": "i32", "entries": "i32",
            },
            constexprs={"ACC": tl.float32, "E": 32, "N": 64},
            divisible_by_16=("dy", "x", "index", "out", "rows", "columns", "entries"),
        )  # fmt: skip
