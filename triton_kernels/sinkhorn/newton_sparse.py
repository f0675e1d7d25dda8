"""GPU kernels of core `newton_sparse`: the pass and the linear solve. Formulas are in solera/sinkhorn/newton_sparse.py.

A program takes a tile of C columns of STEPS * R rows: entries, their sums both ways, and of each row the `keep`
largest by as many reductions over registers. Tiles of a row meet in `torch.topk` over their candidates. Bytes: C
is read once; partial sums and candidates are 1/32 and keep / 512 of it. One float64 exponential an element, which
outweighs the bytes: about 30 float64 operations against 8 bytes.

The linear solve is conjugate gradients on the Schur complement of the scaled system (its unknowns the columns),

    (d - W^T W / d) y = rb - W^T ra / d,   W = diag(p)^-1/2 S diag(q)^-1/2,   d = 1 + shift,

preconditioned by its own diagonal d - sum_i W_ij^2 / d. A column that one row holds nearly alone has almost nothing
left there, and such columns are what makes a plan near a vertex hard without: 136 iterations in the place of 989 over
the nine steps at n = 500, 1/epsilon = 1200, where the CPU's spanning forest takes 93. One program a problem, all
iterations in one launch, its vectors in scratch that stays in L2. W is there twice, by rows in planes [keep][n] and
sorted by column, so that both products gather and nothing is scattered; a column's sum is a loop as long as the
longest column of its tile.

H200 at 4.3 TB/s, 34 TFLOP/s in float64: 4096 x 4096 is 31 us of bytes, 15 us of arithmetic and keep reductions.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from .._launch import on_device_of

LOG2E = 1.4426950408889634
WIDEST = 512  # columns of a tile
ELEMENTS = 2048  # of a tile: 16 a thread
STEPS = 8
BLOCK = 1024  # rows or columns of the linear solve at a time


@triton.jit
def sinkhorn_newton_pass_kernel(
    cost, a, b, f, g, rows, columns, values, index, kappa_at, n, m, blocks, tiles, keep,
    STEPS: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    tile = program % tiles
    block = (program // tiles) % blocks
    item = program // (tiles * blocks)
    kappa = tl.load(kappa_at)
    c = tl.arange(0, C)
    j = tile * C + c
    inside = j < m
    gj = tl.load(g + item * m + j, mask=inside, other=0.0)
    bj = tl.load(b + item * m + j, mask=inside, other=0.0)
    total = tl.zeros((C,), tl.float64)
    for step in range(STEPS):
        i = (block * STEPS + step) * R + tl.arange(0, R)
        live = i < n
        mask = live[:, None] & inside[None, :]
        x = tl.load(cost + (item * n + i)[:, None] * m + j[None, :], mask=mask, other=0.0)
        fi = tl.load(f + item * n + i, mask=live, other=0.0)
        ai = tl.load(a + item * n + i, mask=live, other=0.0)
        x = ((fi[:, None] - x) + gj[None, :]) * kappa
        e = tl.exp2(tl.where(x > 1023.0, 1023.0, x))
        v = (tl.where(x < -1022.0, 0.0, e) * bj[None, :]) * ai[:, None]
        total += tl.sum(tl.where(live[:, None], v, 0.0), 0)
        tl.store(rows + (item * n + i) * tiles + tile, tl.sum(v, 1), mask=live)
        v = tl.where(inside[None, :] & (v >= 0), v, -1.0)  # NaN selects nothing
        at = ((item * n + i) * tiles + tile) * keep
        for k in range(keep):
            best = tl.argmax(v, 1)
            tl.store(values + at + k, tl.maximum(tl.max(v, 1), 0.0), mask=live)
            tl.store(index + at + k, tile * C + best.to(tl.int64), mask=live)
            v = tl.where(c[None, :] == best[:, None], -1.0, v)
    tl.store(columns + (item * blocks + block) * m + j, total, mask=inside)


def _config(m: int) -> dict[str, int]:
    C = max(32, min(WIDEST, triton.next_power_of_2(m)))
    return {"STEPS": STEPS, "R": min(32, ELEMENTS // C), "C": C}


def sinkhorn_newton_pass(cost, a, b, f, g, epsilon, keep):
    cost, a, b, f, g = (t.contiguous() for t in (cost, a, b, f, g))
    batch, n, m = cost.shape
    config = _config(m)
    blocks, tiles = triton.cdiv(n, config["R"] * STEPS), triton.cdiv(m, config["C"])
    rows, columns = cost.new_empty((batch, n, tiles)), cost.new_empty((batch, blocks, m))
    values = cost.new_empty((batch, n, tiles * keep))
    index = values.new_empty(values.shape, dtype=torch.int64)
    if batch > 0:
        with on_device_of(cost):
            # On the device, since a float argument would be rounded to float32.
            kappa = cost.new_full((1,), LOG2E / epsilon)
            sinkhorn_newton_pass_kernel[(batch * blocks * tiles,)](
                cost, a, b, f, g, rows, columns, values, index, kappa, n, m, blocks, tiles, keep,
                **config, num_warps=4,
            )  # fmt: skip
    if tiles > 1 and keep > 0:
        values, at = values.topk(keep, -1)
        index = index.gather(-1, at)
    return rows.sum(-1), columns.sum(-2), values, index


@triton.jit
def _times_columns(weights, rows, first, last, v, item, n, entries, SQUARES: tl.constexpr):
    """sum over each column's entries of weight * v[row], or of the weights' squares, in their order."""
    total = tl.zeros(first.shape, tl.float64)
    for step in range(tl.max(last - first)):
        at = first + step
        mask = at < last
        w = tl.load(weights + item * entries + at, mask=mask, other=0.0)
        if SQUARES:
            total += w * w
        else:
            i = tl.load(rows + item * entries + at, mask=mask, other=0)
            total += w * tl.load(v + item * n + i, mask=mask, other=0.0)
    return total


@triton.jit
def _times_rows(planes, index, v, item, i, n, m, keep):
    """sum over the entries of rows i of weight * v[column]."""
    total = tl.zeros(i.shape, tl.float64)
    for k in range(keep):
        at = (item * keep + k) * n + i
        w = tl.load(planes + at, mask=i < n, other=0.0)
        j = tl.load(index + at, mask=i < n, other=0)
        total += w * tl.load(v + item * m + j, mask=i < n, other=0.0)
    return total


@triton.jit
def sinkhorn_newton_solve_kernel(
    planes, index, weights, rows, starts, ra, rb, x, y, residual, direction, product, inverse, v,
    iterations, settings, n, m, keep, max_iterations, B: tl.constexpr,
):  # fmt: skip
    """One problem, scaled: x (n) and y (m) of right-hand sides ra and rb."""
    item = tl.program_id(0).to(tl.int64)
    entries = n * keep
    d = tl.load(settings)
    tolerance = tl.load(settings + 1)
    lane = tl.arange(0, B)
    rz = 0.0 * d
    for start in range(0, m, B):
        j = start + lane
        live = j < m
        first = tl.load(starts + item * (m + 1) + j, mask=live, other=0)
        last = tl.load(starts + item * (m + 1) + j + 1, mask=live, other=0)
        squares = _times_columns(weights, rows, first, last, ra, item, n, entries, True)
        right = _times_columns(weights, rows, first, last, ra, item, n, entries, False)
        left = d - squares / d
        inv = 1.0 / tl.where(left > 1e-15, left, 1e-15)
        r = tl.load(rb + item * m + j, mask=live, other=0.0) - right / d
        tl.store(y + item * m + j, tl.zeros((B,), tl.float64), mask=live)
        tl.store(inverse + item * m + j, inv, mask=live)
        tl.store(residual + item * m + j, r, mask=live)
        tl.store(direction + item * m + j, inv * r, mask=live)
        rz += tl.sum(tl.where(live, inv * r * r, 0.0))
    target = rz * tolerance * tolerance
    k = (0.0 * rz).to(tl.int32)
    going = rz > target
    while going:
        tl.debug_barrier()  # what other threads wrote
        for start in range(0, n, B):
            i = start + lane
            total = _times_rows(planes, index, direction, item, i, n, m, keep)
            tl.store(v + item * n + i, total, mask=i < n)
        tl.debug_barrier()
        dw = 0.0 * d
        for start in range(0, m, B):
            j = start + lane
            live = j < m
            first = tl.load(starts + item * (m + 1) + j, mask=live, other=0)
            last = tl.load(starts + item * (m + 1) + j + 1, mask=live, other=0)
            total = _times_columns(weights, rows, first, last, v, item, n, entries, False)
            here = tl.load(direction + item * m + j, mask=live, other=0.0)
            w = d * here - total / d
            tl.store(product + item * m + j, w, mask=live)
            dw += tl.sum(here * w)
        tl.debug_barrier()
        forward = dw > 0  # else a singular direction, or NaN
        step = tl.where(forward, rz / tl.where(forward, dw, 1.0), 0.0)
        next = 0.0 * d
        for start in range(0, m, B):
            j = start + lane
            at = item * m + j
            live = j < m
            moved = tl.load(y + at, mask=live, other=0.0)
            moved += step * tl.load(direction + at, mask=live, other=0.0)
            r = tl.load(residual + at, mask=live, other=0.0)
            r -= step * tl.load(product + at, mask=live, other=0.0)
            tl.store(y + at, moved, mask=live)
            tl.store(residual + at, r, mask=live)
            next += tl.sum(tl.load(inverse + at, mask=live, other=0.0) * r * r)
        tl.debug_barrier()
        ratio = next / rz
        for start in range(0, m, B):
            j = start + lane
            at = item * m + j
            live = j < m
            z = tl.load(inverse + at, mask=live, other=0.0)
            z *= tl.load(residual + at, mask=live, other=0.0)
            z += ratio * tl.load(direction + at, mask=live, other=0.0)
            tl.store(direction + at, z, mask=live)
        rz = next
        k += tl.where(forward, 1, 0)
        going = forward & (k < max_iterations) & (rz > target)
    tl.debug_barrier()
    for start in range(0, n, B):
        i = start + lane
        total = _times_rows(planes, index, y, item, i, n, m, keep)
        u = tl.load(ra + item * n + i, mask=i < n, other=0.0)
        tl.store(x + item * n + i, (u - total) / d, mask=i < n)
    tl.store(iterations + item, k.to(tl.int64))


def sinkhorn_newton_solve(values, index, p, q, ra, rb, shift, tolerance, max_iterations):
    """Nothing here waits for the device."""
    batch, n, keep = values.shape
    m = q.shape[-1]
    x, y = values.new_empty((batch, n)), values.new_empty((batch, m))
    iterations = values.new_empty((batch,), dtype=torch.int64)
    if batch == 0:
        return x, y, iterations
    row, column = (torch.where(t > 0, t, torch.inf).rsqrt() for t in (p, q))
    flat = index.reshape(batch, n * keep)
    scaled = values * row.unsqueeze(-1) * column.gather(-1, flat).reshape(values.shape)
    columns, order = flat.sort(stable=True, dim=-1)
    at = torch.arange(m + 1, device=values.device).expand(batch, m + 1).contiguous()
    residual, direction, product, inverse = values.new_empty((4, batch, m)).unbind()
    settings = values.new_empty((2,))
    settings[0].fill_(1.0 + shift)
    settings[1].fill_(tolerance)
    with on_device_of(values):
        sinkhorn_newton_solve_kernel[(batch,)](
            scaled.mT.contiguous(), index.mT.contiguous(), scaled.flatten(1).gather(-1, order),
            order // max(keep, 1), torch.searchsorted(columns, at), ra * row, rb * column, x, y,
            residual, direction, product, inverse, values.new_empty((batch, n)), iterations,
            settings, n, m, keep, max_iterations, B=BLOCK, num_warps=8,
        )  # fmt: skip
    return x * row, y * column, iterations


def aot() -> Iterator:
    """A tile of the pass in its widest form and in the narrowest, and the linear solve."""
    from .._aot import AotCase

    for m in (32, 4096):
        config = _config(m)
        integers = ("n", "m", "blocks", "tiles", "keep")
        names = [k for k in sinkhorn_newton_pass_kernel.arg_names if k not in config]
        words = {"index": "*i64", **{k: "i32" for k in integers}}
        yield AotCase(
            name=f"sinkhorn_newton_pass_{config['C']}",
            fn=sinkhorn_newton_pass_kernel,
            signature={k: words.get(k, "*fp64") for k in names},
            constexprs=config,
            divisible_by_16=[
                k for k in names if k not in (*integers, "kappa_at", "values", "index")
            ]
            + ["m"],
            num_warps=4,
        )
    words = {
        **dict.fromkeys(("index", "rows", "starts", "iterations"), "*i64"),
        **dict.fromkeys(("n", "m", "keep", "max_iterations"), "i32"),
    }
    names = [k for k in sinkhorn_newton_solve_kernel.arg_names if k != "B"]
    yield AotCase(
        name="sinkhorn_newton_solve",
        fn=sinkhorn_newton_solve_kernel,
        signature={k: words.get(k, "*fp64") for k in names},
        constexprs={"B": BLOCK},
        divisible_by_16=["planes", "index", "weights", "rows", "starts", "ra", "rb", "x", "y", "v"],
        num_warps=8,
    )
