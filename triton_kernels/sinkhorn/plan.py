"""GPU kernels of core `plan`: the formulas are in solera/sinkhorn/plan.py.

Bytes: plan reads C and writes one matrix of its size; backward reads C and the gradient and writes one, plus
column partials of 1/16 of that. One exponential an element: both are bound by memory.

H200 at 4.3 TB/s, float32, 4096 x 4096: plan 31 us, backward 47 us are the floors.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from .._launch import accumulator, on_device_of
from ._shared import _bound

LOG2E = 1.4426950408889634
ROWS, COLUMNS = 16, 128  # a tile
PROGRAMS = 128  # that a problem of few rows is shared out to, by its columns


def shares(n: int, m: int) -> tuple[int, int]:
    """How many shares of the columns there are, and how wide, a multiple of a tile: by the shape alone."""
    splits = min(triton.cdiv(PROGRAMS, triton.cdiv(n, ROWS)), triton.cdiv(m, 4 * COLUMNS))
    width = triton.cdiv(triton.cdiv(m, splits), COLUMNS) * COLUMNS
    return triton.cdiv(m, width), width


@triton.jit
def _tile(
    cost, f, g, lengths, item, i, j, n, m, kappa, RAGGED: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """E of a tile (0 where it is below the normal numbers, never infinite), its offsets, the real part, all of it."""
    rows = i < n
    columns = j < m
    inside = rows[:, None] & columns[None, :]
    if RAGGED:
        rows = i < _bound(lengths, 2 * item, n)
        columns = j < _bound(lengths, 2 * item + 1, m)
    mask = rows[:, None] & columns[None, :]
    at = (item * n + i)[:, None] * m + j[None, :]
    c = tl.load(cost + at, mask=mask, other=0.0)
    fi = tl.load(f + item * n + i, mask=rows, other=0.0)
    gj = tl.load(g + item * m + j, mask=columns, other=0.0)
    x = ((fi[:, None] - c) + gj[None, :]) * kappa
    most = 1023.0 if ACC == tl.float64 else 127.0
    e = tl.exp2(tl.where(x > most, most, x))
    return tl.where((x < 1.0 - most) | (mask == 0), 0.0, e), at, mask, inside


@triton.jit
def sinkhorn_plan_kernel(
    cost, a, b, f, g, x, y, out, lengths, kappa_at, n, m, row_tiles, column_tiles,
    HAS_Y: tl.constexpr, RAGGED: tl.constexpr, ACC: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    item = program // (row_tiles * column_tiles)
    i = (program // column_tiles) % row_tiles * R + tl.arange(0, R)
    j = program % column_tiles * C + tl.arange(0, C)
    e, at, mask, inside = _tile(
        cost, f, g, lengths, item, i, j, n, m, tl.load(kappa_at), RAGGED, ACC
    )
    bj = tl.load(b + item * m + j, mask=j < m, other=0.0)
    xi = tl.load(x + item * n + i, mask=i < n, other=0.0)
    value = (e * bj[None, :]) * xi[:, None]
    if HAS_Y:
        ai = tl.load(a + item * n + i, mask=i < n, other=0.0)
        yj = tl.load(y + item * m + j, mask=j < m, other=0.0)
        value += (e * ai[:, None]) * yj[None, :]
    if RAGGED:
        value = tl.where(mask, value, 0.0)
    tl.store(out + at, value, mask=inside)


@triton.jit
def sinkhorn_plan_backward_kernel(
    grad, cost, a, b, f, g, dcost, row_sum, partial, lengths, kappa_at, n, m, row_tiles, splits,
    width, RAGGED: tl.constexpr, ACC: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """R rows of a share of the columns: dC, the row sums, and this block's part of the column sums."""
    split = tl.program_id(0).to(tl.int64) % splits
    program = tl.program_id(0).to(tl.int64) // splits
    item = program // row_tiles
    i = program % row_tiles * R + tl.arange(0, R)
    kappa = tl.load(kappa_at)
    ai = tl.load(a + item * n + i, mask=i < n, other=0.0)[:, None]
    total = tl.zeros((R,), ACC)
    for start in range(split * width, tl.minimum((split + 1) * width, m), C):
        j = start + tl.arange(0, C)
        e, at, mask, inside = _tile(cost, f, g, lengths, item, i, j, n, m, kappa, RAGGED, ACC)
        d = tl.load(grad + at, mask=mask, other=0.0)
        bj = tl.load(b + item * m + j, mask=j < m, other=0.0)[None, :]
        row = d * (e * bj)
        slope = kappa * -0.6931471805599453
        change = slope * (row * ai)
        if RAGGED:
            row = tl.where(mask, row, 0.0)
            change = tl.where(mask, change, 0.0)
        total += tl.sum(row, 1)
        tl.store(dcost + at, change, mask=inside)
        tl.store(partial + program * m + j, tl.sum(d * (e * ai), 0), mask=j < m)
    tl.store(row_sum + (item * splits + split) * n + i, total, mask=i < n)


@triton.jit
def sinkhorn_sum_blocks_kernel(partial, out, m, blocks, tiles, ACC: tl.constexpr, C: tl.constexpr):
    """out[item, j] = sum over blocks of partial[item, block, j], in order."""
    program = tl.program_id(0).to(tl.int64)
    item = program // tiles
    j = program % tiles * C + tl.arange(0, C)
    total = tl.zeros((C,), ACC)
    for block in range(blocks):
        total += tl.load(partial + (item * blocks + block) * m + j, mask=j < m, other=0.0)
    tl.store(out + item * m + j, total, mask=j < m)


def _warps(double: bool) -> int:
    return 8 if double else 4


def sinkhorn_plan(cost, a, b, f, g, x, y, epsilon, lengths=None):
    cost, a, b, f, g, x = (t.contiguous() for t in (cost, a, b, f, g, x))
    batch, n, m = cost.shape
    out = cost.new_empty(cost.shape)
    if out.numel() == 0:
        return out
    rows, columns = triton.cdiv(n, ROWS), triton.cdiv(m, COLUMNS)
    with on_device_of(cost):
        # On the device, since a float argument would be rounded to float32.
        kappa = cost.new_full((1,), LOG2E / epsilon)
        sinkhorn_plan_kernel[(batch * rows * columns,)](
            cost, a, b, f, g, x, b if y is None else y.contiguous(), out,
            cost if lengths is None else lengths.contiguous(), kappa, n, m, rows, columns,
            HAS_Y=y is not None, RAGGED=lengths is not None, ACC=accumulator(cost), R=ROWS, C=COLUMNS,
            num_warps=4,
        )  # fmt: skip
    return out


def sinkhorn_plan_backward(grad, cost, a, b, f, g, epsilon, lengths=None):
    grad, cost, a, b, f, g = (t.contiguous() for t in (grad, cost, a, b, f, g))
    batch, n, m = cost.shape
    dcost, row_sum = cost.new_empty(cost.shape), cost.new_empty((batch, n))
    column_sum = cost.new_empty((batch, m))
    if cost.numel() == 0:
        return dcost, row_sum, column_sum
    rows, tiles = triton.cdiv(n, ROWS), triton.cdiv(m, COLUMNS)
    splits, width = shares(n, m)
    partial = cost.new_empty((batch, rows, m))
    row_parts = row_sum if splits == 1 else cost.new_empty((batch, splits, n))
    acc = accumulator(cost)
    with on_device_of(cost):
        kappa = cost.new_full((1,), LOG2E / epsilon)
        sinkhorn_plan_backward_kernel[(batch * rows * splits,)](
            grad, cost, a, b, f, g, dcost, row_parts, partial,
            cost if lengths is None else lengths.contiguous(),
            kappa, n, m, rows, splits, width, RAGGED=lengths is not None, ACC=acc, R=ROWS, C=COLUMNS,
            num_warps=_warps(cost.dtype == torch.float64),
        )  # fmt: skip
        sinkhorn_sum_blocks_kernel[(batch * tiles,)](
            partial, column_sum, m, rows, tiles, ACC=acc, C=COLUMNS, num_warps=4
        )
        if splits > 1:
            tiles = triton.cdiv(n, COLUMNS)
            sinkhorn_sum_blocks_kernel[(batch * tiles,)](
                row_parts, row_sum, n, splits, tiles, ACC=acc, C=COLUMNS, num_warps=4
            )
    return dcost, row_sum, column_sum


def aot() -> Iterator:
    """Both kernels in float32 and float64."""
    from .._aot import AotCase

    for word, acc, tag in (("*fp32", tl.float32, "32"), ("*fp64", tl.float64, "64")):
        for name, fn, constants in (
            (
                "plan",
                sinkhorn_plan_kernel,
                {"HAS_Y": True, "RAGGED": True, "R": ROWS, "C": COLUMNS},
            ),
            (
                "plan_backward",
                sinkhorn_plan_backward_kernel,
                {"RAGGED": True, "R": ROWS, "C": COLUMNS},
            ),
            ("sum_blocks", sinkhorn_sum_blocks_kernel, {"C": COLUMNS}),
        ):
            constants["ACC"] = acc
            integers = ("n", "m", "blocks", "tiles", "row_tiles", "column_tiles", "splits", "width")
            names = [k for k in fn.arg_names if k not in constants]
            yield AotCase(
                name=f"sinkhorn_{name}_{tag}",
                fn=fn,
                signature={
                    k: "*i64" if k == "lengths" else "i32" if k in integers else word for k in names
                },
                constexprs=constants,
                divisible_by_16=[
                    k for k in names if k in ("m", "width") or k not in (*integers, "kappa_at")
                ],
                num_warps=_warps(word == "*fp64") if name == "plan_backward" else 4,
            )
