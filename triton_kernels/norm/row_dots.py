"""GPU kernels of core `row_dots`: the formulas are in solera/norm/row_dots.py.

Reads two rows once (the second one wherever the index says); the combination writes one.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from .._launch import accumulate_type, accumulator, on_device_of


@triton.jit
def _rows_beside(index, row, rows, others, HAS_INDEX: tl.constexpr):
    """Which row of y is beside each row of x, and whether there is one."""
    if HAS_INDEX:
        other = tl.load(index + row, mask=row < rows, other=-1)
    else:
        other = row.to(tl.int64)
    return other, (row < rows) & (other >= 0) & (other < others)


@triton.jit
def row_dots_kernel(
    x, y, index, xx_out, xy_out, yy_out, rows, columns, others,
    HAS_INDEX: tl.constexpr, ACC: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * R + tl.arange(0, R))[:, None]  # [R, 1]
    lane = tl.arange(0, BLOCK)[None, :]  # [1, BLOCK]
    other, there = _rows_beside(index, row, rows, others, HAS_INDEX)
    xx = tl.zeros((R, BLOCK), ACC)
    xy = tl.zeros((R, BLOCK), ACC)
    yy = tl.zeros((R, BLOCK), ACC)
    for j in range(0, columns, BLOCK):
        cols = j + lane
        v = tl.load(
            x + row.to(tl.int64) * columns + cols, mask=(row < rows) & (cols < columns), other=0.0
        )
        w = tl.load(y + other * columns + cols, mask=there & (cols < columns), other=0.0)
        v = v.to(ACC)
        w = w.to(ACC)
        xx += v * v
        xy += v * w
        yy += w * w
    missing = other >= others
    tl.store(xx_out + row, tl.sum(xx, 1)[:, None], mask=row < rows)
    tl.store(xy_out + row, tl.where(missing, float("nan"), tl.sum(xy, 1)[:, None]), mask=row < rows)
    tl.store(yy_out + row, tl.where(missing, float("nan"), tl.sum(yy, 1)[:, None]), mask=row < rows)


@triton.jit
def row_combine_kernel(
    x, y, index, a_in, b_in, out, rows, columns, others,
    HAS_INDEX: tl.constexpr, ACC: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * R + tl.arange(0, R))[:, None]
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    other, there = _rows_beside(index, row, rows, others, HAS_INDEX)
    a = tl.load(a_in + row, mask=row < rows, other=0.0)
    b = tl.load(b_in + row, mask=row < rows, other=0.0)
    mask = (row < rows) & (cols < columns)
    at = row.to(tl.int64) * columns + cols
    value = a * tl.load(x + at, mask=mask, other=0.0).to(ACC)
    w = tl.load(y + other * columns + cols, mask=there & (cols < columns), other=0.0).to(ACC)
    value += tl.where(there, b * w, 0.0)
    value = tl.where(other >= others, float("nan"), value)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=mask)


# ---- launchers ---------------------------------------------------------------------------------------


def _config(columns: int) -> dict[str, int]:
    """About 2048 elements a program: several narrow rows, or a tile of one wide row."""
    block = min(2048, max(16, triton.next_power_of_2(columns)))
    return {"R": max(1, 2048 // block), "BLOCK": block, "num_warps": 4}


def row_dots(x, y, index):
    x, y = x.contiguous(), y.contiguous()
    rows, columns = x.shape
    xx, xy, yy = (x.new_empty(rows, dtype=accumulate_type(x)) for _ in range(3))
    if rows:
        config = _config(columns)
        with on_device_of(x):
            row_dots_kernel[(triton.cdiv(rows, config["R"]),)](
                x, y, x if index is None else index.contiguous(), xx, xy, yy, rows, columns, y.shape[0],
                HAS_INDEX=index is not None, ACC=accumulator(x), **config,
            )  # fmt: skip
    return xx, xy, yy


def _combine(x, y, index, a, b, out):
    if x.numel() == 0:
        return
    rows, columns = x.shape
    config = _config(columns)
    grid = (triton.cdiv(rows, config["R"]), triton.cdiv(columns, config["BLOCK"]))
    with on_device_of(x):
        row_combine_kernel[grid](
            x, y.contiguous(), x if index is None else index.contiguous(), a.contiguous(), b.contiguous(), out,
            rows, columns, y.shape[0], HAS_INDEX=index is not None, ACC=accumulator(x), **config,
        )  # fmt: skip


def row_combine(x, y, index, a, b):
    x = x.contiguous()
    out = torch.empty_like(x)
    _combine(x, y, index, a, b, out)
    return out


def row_combine_(x, y, index, a, b):
    dense = x.contiguous()
    _combine(dense, y, index, a, b, dense)
    if dense is not x:
        x.copy_(dense)


# ---- ahead-of-time compilation -----------------------------------------------------------------------


def aot() -> Iterator:
    from .._aot import AotCase

    half, acc = "*bf16", "*fp32"
    sizes = {"rows": "i32", "columns": "i32", "others": "i32"}
    for columns in (128, 512, 8192):
        config = _config(columns)
        warps = config.pop("num_warps")
        constants = {"HAS_INDEX": True, "ACC": tl.float32, **config}
        sums = {"xx_out": acc, "xy_out": acc, "yy_out": acc}
        inputs = {"x": half, "y": half, "index": "*i64"}
        yield AotCase(
            name=f"row_dots_{columns}",
            fn=row_dots_kernel,
            signature={**inputs, **sums, **sizes},
            constexprs=constants,
            divisible_by_16=(*inputs, *sums, "columns"),
            num_warps=warps,
        )
        given = {"a_in": acc, "b_in": acc, "out": half}
        yield AotCase(
            name=f"row_combine_{columns}",
            fn=row_combine_kernel,
            signature={**inputs, **given, **sizes},
            constexprs=constants,
            divisible_by_16=(*inputs, *given, "columns"),
            num_warps=warps,
        )
