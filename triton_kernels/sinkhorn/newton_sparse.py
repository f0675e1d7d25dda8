"""GPU kernel of core `newton_sparse`: the pass over the plan. The formulas are in solera/sinkhorn/newton_sparse.py.

A program takes a tile of C columns of STEPS * R rows: entries, their sums both ways, and of each row the `keep`
largest by as many reductions over registers. Tiles of a row meet in `torch.topk` over their candidates. Bytes: C
is read once; partial sums and candidates are 1/32 and keep / 512 of it. One float64 exponential an element, which
outweighs the bytes: about 30 float64 operations against 8 bytes.

The linear system has a few thousand entries. Up to 8192 columns its Schur complement is a product and a Cholesky
factor in float64, by the vendor's libraries, without a synchronisation; beyond, the entries go to the host.

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
FACTORED = 8192  # columns up to which the Schur complement is factored on the device


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


def sinkhorn_newton_solve(values, index, p, q, ra, rb, shift, tolerance, max_iterations):
    from solera.sinkhorn.newton_sparse import newton_solve_reference

    arguments = (values, index, p, q, ra, rb)
    if q.shape[-1] <= FACTORED:
        return newton_solve_reference(*arguments, shift, tolerance, max_iterations)
    host = torch.ops.solera.sinkhorn_newton_solve(
        *(t.cpu() for t in arguments), shift, tolerance, max_iterations
    )
    return tuple(t.to(values.device) for t in host)


def aot() -> Iterator:
    """A tile of its widest form and of the narrowest."""
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
