"""GPU kernels of core `scaling`: the algorithm is that of csrc/cpu/sinkhorn/scaling.cpp, in base 2.

An iteration is three launches: row blocks (their sums, then from a second look at the block in L2 their share of the
column sums), column tiles (the shares added in order; a column whose sum may have lost its terms is done again from
the logits, a branch rarely taken), and one program an item for the new potential and the stopping test. Stopping
is a flag on the device: later launches return at once. No host synchronisation, no atomics.

H200 at 4.3 TB/s, 4096 x 3000 float32 (49 MB, about the L2), 3 iterations: four reads and one write, 57 us from memory.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from .._launch import accumulator, on_device_of

SPAN = 64  # row tiles of one program of the first column pass


@triton.jit
def _tile(x, weight, scale, item, i, j, n, k, ACC: tl.constexpr):
    """scale x of a tile, -inf outside and in rows without weight; the weights."""
    w = tl.load(weight + item * n + i, mask=i < n, other=0.0)
    live = (w != 0)[:, None] & (j < k)[None, :]
    at = (item * n + i)[:, None] * k + j[None, :]
    t = tl.load(x + at, mask=live, other=0.0).to(ACC) * scale
    return tl.where(live, t, float("-inf")), w


@triton.jit
def _shift(top):
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def _column_sums(
    x, weight, f, scale, item, j, first, last, n, k, HAS_F: tl.constexpr, ACC: tl.constexpr, R: tl.constexpr,
    C: tl.constexpr,
):  # fmt: skip
    """(top, sum) with sum_n r_n 2^(t + F) = sum 2^top over the rows of [first, last)."""
    top = tl.full((C,), float("-inf"), ACC)
    total = tl.zeros((C,), ACC)
    for start in range(first, last, R):
        i = start + tl.arange(0, R)
        t, w = _tile(x, weight, scale, item, i, j, n, k, ACC)
        if HAS_F:
            t += tl.load(f + item * n + i, mask=i < n, other=0.0)[:, None]
        now = tl.maximum(top, tl.max(t, 0))
        base = _shift(now)
        total = total * tl.exp2(top - base) + tl.sum(w[:, None] * tl.exp2(t - base[None, :]), 0)
        top = now
    return top, total


@triton.jit
def scaling_columns_kernel(
    x, weight, top, total, scale_at, n, k, blocks, tiles,
    ACC: tl.constexpr, ROWS: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The first column pass (F = 0), a block of rows and a tile of columns a program."""
    program = tl.program_id(0).to(tl.int64)
    item = program // (blocks * tiles)
    block = (program // tiles) % blocks
    j = program % tiles * C + tl.arange(0, C)
    most, sums = _column_sums(
        x, weight, weight, tl.load(scale_at), item, j, block * ROWS, block * ROWS + ROWS, n, k, False, ACC, R, C
    )  # fmt: skip
    at = (item * blocks + block) * k + j
    tl.store(top + at, most, mask=j < k)
    tl.store(total + at, sums, mask=j < k)


@triton.jit
def scaling_merge_kernel(top, total, sums, k, blocks, tiles, ACC: tl.constexpr, C: tl.constexpr):
    """log2 of the columns' sums over all blocks, in order."""
    program = tl.program_id(0).to(tl.int64)
    item = program // tiles
    j = program % tiles * C + tl.arange(0, C)
    most = tl.full((C,), float("-inf"), ACC)
    for block in range(blocks):
        at = (item * blocks + block) * k + j
        most = tl.maximum(most, tl.load(top + at, mask=j < k, other=0.0))
    base = _shift(most)
    sum_ = tl.zeros((C,), ACC)
    for block in range(blocks):
        at = (item * blocks + block) * k + j
        share = tl.load(total + at, mask=j < k, other=1.0)
        sum_ += share * tl.exp2(tl.load(top + at, mask=j < k, other=0.0) - base)
    tl.store(sums + item * k + j, base + tl.log2(sum_), mask=j < k)


@triton.jit
def _row_sums(
    x, weight, g, scale, item, i, n, k, ACC: tl.constexpr, R: tl.constexpr, C: tl.constexpr
):
    """(top, sum, weights) of R rows: sum_k 2^(t + G) = sum 2^top."""
    top = tl.full((R,), float("-inf"), ACC)
    total = tl.zeros((R,), ACC)
    w = tl.load(weight + item * n + i, mask=i < n, other=0.0)
    for start in range(0, k, C):
        j = start + tl.arange(0, C)
        t, w = _tile(x, weight, scale, item, i, j, n, k, ACC)
        t += tl.load(g + item * k + j, mask=j < k, other=0.0)[None, :]
        now = tl.maximum(top, tl.max(t, 1))
        base = _shift(now)
        total = total * tl.exp2(top - base) + tl.sum(tl.exp2(t - base[:, None]), 1)
        top = now
    return _shift(top), total, w


@triton.jit
def scaling_rows_kernel(
    x, weight, g, f, partial, status, scale_at, n, k, blocks,
    ACC: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """F of R rows, and their share of the column sums."""
    program = tl.program_id(0).to(tl.int64)
    item = program // blocks
    if tl.load(status + item) == 0:
        scale = tl.load(scale_at)
        i = program % blocks * R + tl.arange(0, R)
        top, total, w = _row_sums(x, weight, g, scale, item, i, n, k, ACC, R, C)
        none = (total == 0) | (w == 0)
        potential = tl.where(none, float("-inf"), -(top + tl.log2(total)))
        tl.store(f + item * n + i, potential, mask=i < n)
        share = tl.where(none, 0.0, w / total)
        for start in range(0, k, C):
            j = start + tl.arange(0, C)
            t, w = _tile(x, weight, scale, item, i, j, n, k, ACC)
            t += tl.load(g + item * k + j, mask=j < k, other=0.0)[None, :]
            columns = tl.sum(share[:, None] * tl.exp2(t - top[:, None]), 0)
            tl.store(partial + program * k + j, columns, mask=j < k)


@triton.jit
def scaling_add_kernel(
    x, weight, g, f, partial, total, sums, status, scale_at, n, k, blocks, tiles,
    ACC: tl.constexpr, R: tl.constexpr, B: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """log2 of the columns' sums without G, from the blocks' shares in order."""
    program = tl.program_id(0).to(tl.int64)
    item = program // tiles
    if tl.load(status + item) == 0:
        j = program % tiles * C + tl.arange(0, C)
        columns = tl.zeros((C,), ACC)
        for start in range(0, blocks, B):
            b = start + tl.arange(0, B)
            at = (item * blocks + b)[:, None] * k + j[None, :]
            mask = (b < blocks)[:, None] & (j < k)[None, :]
            columns += tl.sum(tl.load(partial + at, mask=mask, other=0.0), 0)
        low = 1e-150 if ACC == tl.float64 else 1e-20
        high = 1e308 if ACC == tl.float64 else 3e38
        good = (columns > low * tl.load(total + item)) & (columns < high)
        good = good | (j >= k)
        value = tl.log2(tl.where(good, columns, 1.0)) - tl.load(
            g + item * k + j, mask=j < k, other=0.0
        )
        if tl.min(tl.where(good, 1, 0)) == 0:
            top, exact = _column_sums(
                x, weight, f, tl.load(scale_at), item, j, 0, n, n, k, True, ACC, R, C
            )
            value = tl.where(good, value, _shift(top) + tl.log2(exact))
        tl.store(sums + item * k + j, value, mask=j < k)


@triton.jit
def scaling_update_kernel(
    sums, log_target, g, status, done, tolerance_at, k,
    STEP: tl.constexpr, ACC: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The new G of an item, unless its column sums (of the state before) are the target's. STEP: count one."""
    item = tl.program_id(0).to(tl.int64)
    if tl.load(status + item) == 0:
        lane = tl.arange(0, C)
        if STEP:
            error = tl.zeros((C,), ACC)
            for start in range(0, k, C):
                j = start + lane
                at = item * k + j
                now = tl.load(sums + at, mask=j < k, other=0.0) + tl.load(
                    g + at, mask=j < k, other=0.0
                )
                goal = tl.load(log_target + at, mask=j < k, other=0.0)
                error += tl.abs(tl.exp2(now) - tl.exp2(goal))
            tolerance = tl.load(tolerance_at)
            tl.store(done + item, tl.load(done + item) + 1)
            stop = (tolerance > 0) & (tl.sum(error) <= tolerance)
        else:
            stop = False
        if stop:
            tl.store(status + item, 1)
        else:
            for start in range(0, k, C):
                j = start + lane
                at = item * k + j
                sum_ = tl.load(sums + at, mask=j < k, other=0.0)
                goal = tl.load(log_target + at, mask=j < k, other=0.0)
                new = tl.where(sum_ == float("-inf"), 0.0, goal - sum_)
                new = tl.where(goal == float("-inf"), goal, new)
                tl.store(g + at, new, mask=j < k)


@triton.jit
def scaling_assign_kernel(
    x, weight, g, out, scale_at, n, k, blocks, ACC: tl.constexpr, R: tl.constexpr, C: tl.constexpr
):
    program = tl.program_id(0).to(tl.int64)
    item = program // blocks
    scale = tl.load(scale_at)
    i = program % blocks * R + tl.arange(0, R)
    top, total, w = _row_sums(x, weight, g, scale, item, i, n, k, ACC, R, C)
    for start in range(0, k, C):
        j = start + tl.arange(0, C)
        t, w = _tile(x, weight, scale, item, i, j, n, k, ACC)
        t += tl.load(g + item * k + j, mask=j < k, other=0.0)[None, :]
        q = tl.where((w == 0)[:, None], 0.0, tl.exp2(t - top[:, None]) / total[:, None])
        at = (item * n + i)[:, None] * k + j[None, :]
        tl.store(out + at, q.to(out.dtype.element_ty), mask=(i < n)[:, None] & (j < k)[None, :])


@triton.jit
def scaling_backward_kernel(
    grad, q, y, weight, out, n, k, blocks,
    HAS_GRAD: tl.constexpr, ACC: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """q (c - <q, c>), c = grad - weight y, R rows a program; the second look comes from L2."""
    program = tl.program_id(0).to(tl.int64)
    item = program // blocks
    i = program % blocks * R + tl.arange(0, R)
    w = tl.load(weight + item * n + i, mask=i < n, other=0.0)[:, None]
    inner = tl.zeros((R,), ACC)
    for start in range(0, k, C):
        j = start + tl.arange(0, C)
        mask = (i < n)[:, None] & (j < k)[None, :]
        at = (item * n + i)[:, None] * k + j[None, :]
        c = -w * tl.load(y + item * k + j, mask=j < k, other=0.0)[None, :]
        if HAS_GRAD:
            c += tl.load(grad + at, mask=mask, other=0.0).to(ACC)
        inner += tl.sum(tl.load(q + at, mask=mask, other=0.0).to(ACC) * c, 1)
    for start in range(0, k, C):
        j = start + tl.arange(0, C)
        mask = (i < n)[:, None] & (j < k)[None, :]
        at = (item * n + i)[:, None] * k + j[None, :]
        c = -w * tl.load(y + item * k + j, mask=j < k, other=0.0)[None, :]
        if HAS_GRAD:
            c += tl.load(grad + at, mask=mask, other=0.0).to(ACC)
        d = tl.load(q + at, mask=mask, other=0.0).to(ACC) * (c - inner[:, None])
        tl.store(out + at, d.to(out.dtype.element_ty), mask=mask)


# ---- launchers ---------------------------------------------------------------------------------------


def _tiles(k: int) -> tuple[int, int]:
    """Rows and columns of a tile of 2048 elements, a quarter of that for many narrow rows (which spill)."""
    columns = min(128, max(4, triton.next_power_of_2(k)))
    return (2048 if columns >= 32 else 512) // columns, columns


def _scale(logits: torch.Tensor, weight: torch.Tensor, scale: float) -> torch.Tensor:
    """On the device, since a float argument would be rounded to float32."""
    return weight.new_full((1,), scale)


def scaling_solve(logits, weight, log_target, g, scale, steps, tolerance):
    logits, weight, log_target = (t.contiguous() for t in (logits, weight, log_target))
    batch, n, k = logits.shape
    acc = accumulator(logits)
    rows, columns = _tiles(k)
    tiles = triton.cdiv(k, columns)
    sums = torch.zeros_like(log_target)
    done = torch.zeros(batch, dtype=torch.int64, device=logits.device)
    status = torch.zeros(batch, dtype=torch.int32, device=logits.device)
    out = torch.empty_like(log_target) if g is None else g.contiguous().clone()
    if batch == 0:
        return out, sums, done
    with on_device_of(logits):
        scale_at = _scale(logits, weight, scale)
        tolerance_at = weight.new_full((1,), tolerance)
        update = (sums, log_target, out, status, done, tolerance_at, k)
        if g is None:
            blocks = triton.cdiv(n, SPAN * rows)
            top, total = weight.new_empty((2, batch, blocks, k))
            if n > 0:
                scaling_columns_kernel[(batch * blocks * tiles,)](
                    logits, weight, top, total, scale_at, n, k, blocks, tiles, ACC=acc, ROWS=SPAN * rows,
                    R=rows, C=columns, num_warps=4,
                )  # fmt: skip
            scaling_merge_kernel[(batch * tiles,)](
                top, total, sums, k, blocks, tiles, ACC=acc, C=columns, num_warps=4
            )
            scaling_update_kernel[(batch,)](*update, STEP=False, ACC=acc, C=512, num_warps=4)
        if steps > 0:
            blocks = triton.cdiv(n, rows)
            f = weight.new_empty((batch, n))
            partial = weight.new_empty((batch, blocks, k))
            total = weight.sum(-1)
        for _ in range(steps):
            if n > 0:
                scaling_rows_kernel[(batch * blocks,)](
                    logits, weight, out, f, partial, status, scale_at, n, k, blocks, ACC=acc, R=rows, C=columns,
                    num_warps=4,
                )  # fmt: skip
            scaling_add_kernel[(batch * tiles,)](
                logits, weight, out, f, partial, total, sums, status, scale_at, n, k, blocks, tiles, ACC=acc,
                R=rows, B=rows, C=columns, num_warps=4,
            )  # fmt: skip
            scaling_update_kernel[(batch,)](*update, STEP=True, ACC=acc, C=512, num_warps=4)
    return out, sums, done


def scaling_assign(logits, weight, g, scale):
    logits, weight, g = (t.contiguous() for t in (logits, weight, g))
    batch, n, k = logits.shape
    out = logits.new_empty(logits.shape)
    if out.numel() == 0:
        return out
    rows, columns = _tiles(k)
    blocks = triton.cdiv(n, rows)
    with on_device_of(logits):
        scaling_assign_kernel[(batch * blocks,)](
            logits, weight, g, out, _scale(logits, weight, scale), n, k, blocks, ACC=accumulator(logits),
            R=rows, C=columns, num_warps=4,
        )  # fmt: skip
    return out


def scaling_balance(logits, weight, log_target, scale, iterations):
    g = scaling_solve(logits, weight, log_target, None, scale, iterations - 1, 0.0)[0]
    return scaling_assign(logits, weight, g, scale)


def scaling_backward(grad, q, y, weight):
    q, y, weight = (t.contiguous() for t in (q, y, weight))
    batch, n, k = q.shape
    out = q.new_empty(q.shape)
    if out.numel() == 0:
        return out
    rows, columns = _tiles(k)
    blocks = triton.cdiv(n, rows)
    with on_device_of(q):
        scaling_backward_kernel[(batch * blocks,)](
            q if grad is None else grad.contiguous(), q, y, weight, out, n, k, blocks,
            HAS_GRAD=grad is not None, ACC=accumulator(q), R=rows, C=columns, num_warps=4,
        )  # fmt: skip
    return out


# ---- ahead-of-time compilation -----------------------------------------------------------------------


def aot() -> Iterator:
    """Every kernel on wide tiles in float32, the row kernels on a narrow one, with bfloat16 logits, in float64."""
    from .._aot import AotCase

    integers = ("n", "k", "blocks", "tiles")
    narrow = ("x", "q", "out", "grad")
    constants = {"ROWS": 1024, "STEP": True, "HAS_GRAD": True, "B": 16}
    kernels = {
        "columns": scaling_columns_kernel,
        "merge": scaling_merge_kernel,
        "rows": scaling_rows_kernel,
        "add": scaling_add_kernel,
        "update": scaling_update_kernel,
        "assign": scaling_assign_kernel,
        "backward": scaling_backward_kernel,
    }
    variants = [("32", "*fp32", "*fp32", tl.float32, 128, tuple(kernels))]
    variants += [
        ("few_32", "*fp32", "*fp32", tl.float32, 4, ("rows", "assign")),
        ("bf16", "*bf16", "*fp32", tl.float32, 128, ("rows", "assign")),
        ("64", "*fp64", "*fp64", tl.float64, 128, ("columns", "rows", "add", "assign")),
    ]
    for tag, word, wide, acc, columns, names in variants:
        for name in names:
            fn = kernels[name]
            given = {**constants, "ACC": acc, "R": _tiles(columns)[0], "C": columns}
            given = {key: value for key, value in given.items() if key in fn.arg_names}
            types = {"status": "*i32", "done": "*i64"}
            types |= dict.fromkeys(integers, "i32") | dict.fromkeys(narrow, word)
            arguments = [a for a in fn.arg_names if a not in given]
            yield AotCase(
                name=f"scaling_{name}_{tag}",
                fn=fn,
                signature={a: types.get(a, wide) for a in arguments},
                constexprs=given,
                divisible_by_16=[
                    a
                    for a in arguments
                    if a == "k" or a not in (*integers, "scale_at", "tolerance_at")
                ]
                if columns > 4
                else [],
                num_warps=4,
            )
