"""GPU kernels of core `plan_sums`: the formulas are in solera/sinkhorn/plan_sums.py.

A program takes R rows of a share of the columns: their densities in registers, sums along both axes. Shares and blocks
meet in order, in a second kernel; the shares, a matter of the shape alone, give a problem of few rows programs enough.
With w the column sums wait for the row sums: a second launch makes the densities again. Bytes: C once or twice, and
1/16 of it for the blocks' column sums; an exponential an element each time.

H200 at 4.3 TB/s, float32, 4096 x 4096: 18 us without w and 36 us with it are the floors.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl

from .._launch import accumulator, on_device_of
from .plan import COLUMNS, LOG2E, ROWS, _tile, _warps, shares, sinkhorn_sum_blocks_kernel


@triton.jit
def sinkhorn_plan_sums_kernel(
    cost, f, g, x, y, row_parts, column_parts, lengths, kappa_at, n, m, row_tiles, splits, width,
    BY_COST: tl.constexpr, OF_ROWS: tl.constexpr, OF_COLUMNS: tl.constexpr, RAGGED: tl.constexpr,
    ACC: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    split = program % splits
    block = program // splits
    item = block // row_tiles
    i = block % row_tiles * R + tl.arange(0, R)
    kappa = tl.load(kappa_at)
    total = tl.zeros((R,), ACC)
    for start in range(split * width, tl.minimum((split + 1) * width, m), C):
        j = start + tl.arange(0, C)
        e, at, mask, inside = _tile(cost, f, g, lengths, item, i, j, n, m, kappa, RAGGED, ACC)
        if BY_COST:
            c = tl.load(cost + at, mask=mask, other=0.0)
            e = tl.where(c == float("inf"), 0.0, e * c)
        real = tl.max(mask.to(tl.int32), 0) > 0
        if OF_ROWS:
            xj = tl.load(x + item * m + j, mask=real, other=0.0)
            total += tl.sum(e * xj[None, :], 1)
        if OF_COLUMNS:
            yi = tl.load(y + item * n + i, mask=tl.max(mask.to(tl.int32), 1) > 0, other=0.0)
            tl.store(column_parts + block * m + j, tl.sum(e * yi[:, None], 0), mask=j < m)
    if OF_ROWS:
        tl.store(row_parts + (item * splits + split) * n + i, total, mask=i < n)


def sinkhorn_plan_sums(cost, f, g, x, w, y, epsilon, by_cost=False, lengths=None):
    cost, f, g, x, y = (t.contiguous() for t in (cost, f, g, x, y))
    batch, n, m = cost.shape
    rows, columns = cost.new_empty((batch, n)), cost.new_empty((batch, m))
    if cost.numel() == 0:
        return rows, columns
    tiles, (splits, width) = triton.cdiv(n, ROWS), shares(n, m)
    row_parts = rows if splits == 1 else cost.new_empty((batch, splits, n))
    column_parts = columns if tiles == 1 else cost.new_empty((batch, tiles, m))
    acc = accumulator(cost)
    with on_device_of(cost):
        # On the device, since a float argument would be rounded to float32.
        kappa = cost.new_full((1,), LOG2E / epsilon)

        def run(y, of_rows, of_columns):
            sinkhorn_plan_sums_kernel[(batch * tiles * splits,)](
                cost, f, g, x, y, row_parts, column_parts,
                cost if lengths is None else lengths.contiguous(), kappa, n, m, tiles, splits, width,
                BY_COST=by_cost, OF_ROWS=of_rows, OF_COLUMNS=of_columns, RAGGED=lengths is not None,
                ACC=acc, R=ROWS, C=COLUMNS, num_warps=_warps(acc == tl.float64),
            )  # fmt: skip
            if of_rows and splits > 1:
                add_parts(row_parts, rows)
            if of_columns and tiles > 1:
                add_parts(column_parts, columns)

        if w is None:
            run(y, True, True)
        else:
            run(y, True, False)
            run((w * rows + y).contiguous(), False, True)
    return rows, columns


def add_parts(parts, out):
    """out (batch, k) = the sum over parts (batch, blocks, k), in order."""
    batch, blocks, k = parts.shape
    tiles = triton.cdiv(k, COLUMNS)
    sinkhorn_sum_blocks_kernel[(batch * tiles,)](
        parts, out, k, blocks, tiles, ACC=accumulator(out), C=COLUMNS, num_warps=4
    )


def aot() -> Iterator:
    """Both sides at once and each alone, in float32 and float64."""
    from .._aot import AotCase

    for word, acc, tag in (("*fp32", tl.float32, "32"), ("*fp64", tl.float64, "64")):
        for name, of_rows, of_columns in (("both", 1, 1), ("rows", 1, 0), ("columns", 0, 1)):
            constants = {
                "BY_COST": True,
                "OF_ROWS": bool(of_rows),
                "OF_COLUMNS": bool(of_columns),
                "RAGGED": True,
                "ACC": acc,
                "R": ROWS,
                "C": COLUMNS,
            }
            integers = ("n", "m", "row_tiles", "splits", "width")
            names = [k for k in sinkhorn_plan_sums_kernel.arg_names if k not in constants]
            yield AotCase(
                name=f"sinkhorn_plan_sums_{name}_{tag}",
                fn=sinkhorn_plan_sums_kernel,
                signature={
                    k: "*i64" if k == "lengths" else "i32" if k in integers else word for k in names
                },
                constexprs=constants,
                divisible_by_16=[
                    k for k in names if k in ("m", "width") or k not in (*integers, "kappa_at")
                ],
                num_warps=_warps(acc == tl.float64),
            )
