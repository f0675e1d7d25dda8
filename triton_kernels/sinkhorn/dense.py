"""GPU kernels of core `dense`: the algorithm is that of csrc/cpu/sinkhorn/dense.cpp, in base 2.

With F = f log2(e)/epsilon, G likewise and w_ij = 2^(F_i + G_j - K C_ij), one row pass gives the row sums s_i
(hence the new F) and, from the same w_ij / s_i, the column sums of the plan (hence the new G): one
exponential and one read of C an iteration. A row or column whose sum left the range in which nothing that
matters can have underflowed is done again as an exact log-sum-exp, in a branch that is rarely taken.

Three ways by size:
- small (up to 8192 elements, 2048 in float64): one program a problem, C in registers, all iterations and the
  stopping test in it;
- rows of up to 2048: per iteration one launch over row blocks (w in registers, column partials out) and one
  over column blocks (partials summed in order);
- wider rows: the same two, w computed twice from C (the second read from L2).

Stopping is decided on the device, a flag a problem; launches go on and return at once. No host
synchronisation, no atomics: the fixed number of launches can be captured in a CUDA graph.

H200 at 4.3 TB/s: 1024 x 1024 float32 stays in L2; 4096 x 4096, 100 iterations reads 6.7 GB: floor 1.56 ms.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from .._launch import accumulator, on_device_of, processors
from ._shared import (
    _bound,
    _column,
    _lost,
    _next,
    _ranges,
    _row_scale,
    _row_settings,
    _row_update,
    _settings,
    _weighted,
    device_settings,
    sinkhorn_decide_kernel,
    sinkhorn_finish_kernel,
    sinkhorn_prepare_kernel,
)

LOG2E = 1.4426950408889634
SMALL = 8192  # elements of a float32 problem that one program keeps in registers
WIDEST = 2048  # columns kept in registers by the row pass; 4096 spill


@triton.jit
def sinkhorn_small_kernel(
    cost, a, b, F, G, status, iterations, total, error, mass, lengths, settings, n, m, kappa_at, tolerance_at,
    max_iterations, check_every, GENERAL: tl.constexpr, RAGGED: tl.constexpr, ACC: tl.constexpr,
    N: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """A whole problem in one program. Its shift is the true maximum: it costs no memory here."""
    item = tl.program_id(0).to(tl.int64)
    kappa = tl.load(kappa_at)
    tolerance = tl.load(tolerance_at)
    low, high, column_low, column_high, exponent, big = _ranges(ACC)
    i = tl.arange(0, N)
    j = tl.arange(0, M)
    live = i < n
    open_column = j < m
    if RAGGED:
        live = i < _bound(lengths, 2 * item, n)
        open_column = j < _bound(lengths, 2 * item + 1, m)
    at = cost + item * n * m + i.to(tl.int64)[:, None] * m + j[None, :]
    c = tl.load(at, mask=live[:, None] & open_column[None, :], other=float("inf")) * kappa
    wa = tl.load(a + item * n + i, mask=live, other=0.0)
    wb = tl.load(b + item * m + j, mask=open_column, other=0.0)
    old = tl.load(F + item * n + i, mask=live, other=0.0)
    g = tl.load(G + item * m + j, mask=open_column, other=0.0)
    inverse_a, inverse_b, momentum, low_a, high_a, low_b, high_b = _settings(settings, GENERAL)
    log_a = tl.log2(wa)
    log_b = tl.log2(wb)
    least = column_low * tl.load(total + item)
    state = tl.load(status + item)
    going = state == 0
    failed = tl.where(going, 0, 1)
    k = 0
    e = tl.sum(wa) * 0.0
    s_total = e
    while going:
        plain = (k + 1 == max_iterations) | ((tolerance > 0) & ((k + 1) % check_every == 0))
        pace = tl.where(plain, 1.0, momentum)
        t = g[None, :] - c
        top = tl.max(t + log_b[None, :], 1)
        none = top == float("-inf")
        shift = tl.where(none, 0.0, top)
        w = tl.exp2(t - shift[:, None])
        s = tl.sum(_weighted(wb[None, :], w, big), 1)
        none = none & (s == s)
        new, e, s_total = _row_update(
            none, wa, live, old, shift, s, inverse_a, pace, low_a, high_a, exponent, GENERAL
        )
        failed = _lost(new)
        stop = (tolerance > 0) & (k > 0) & (k % check_every == 0) & (e <= tolerance)
        going = (k < max_iterations) & (failed == 0) & (stop == 0)
        if going:
            scale = _row_scale(none, wa, new, shift, s, GENERAL)
            columns = tl.sum(scale[:, None] * w, 0)
            good = (columns > least) & (columns < column_high)
            log_sum = tl.log2(tl.where(good, columns, 1.0)) - g
            next_g = _next(g, log_sum, inverse_b, pace, low_b, high_b, GENERAL)
            if tl.min(tl.where(good, 1, 0)) == 0:
                by_column = (log_a + new)[:, None] - c
                top_c = tl.max(by_column, 0)
                none_c = top_c == float("-inf")
                shift_c = tl.where(none_c, 0.0, top_c)
                exact = tl.sum(tl.exp2(by_column - shift_c[None, :]), 0)
                redone = _column(
                    none_c, wb, g, shift_c, exact, inverse_b, pace, low_b, high_b, GENERAL
                )
                next_g = tl.where(good, next_g, redone)
            g = next_g
            old = new
            failed = _lost(g)
            going = failed == 0
            k += 1
    tl.store(F + item * n + i, old, mask=live)
    tl.store(G + item * m + j, g, mask=open_column)
    tl.store(error + item, e)
    tl.store(mass + item, s_total)
    tl.store(iterations + item, tl.zeros((), tl.int64) + k)
    tl.store(status + item, tl.where(state == 3, 3, tl.where(failed == 0, 1, 2)))


@triton.jit
def sinkhorn_rows_kernel(
    cost, a, b, F, G, partial, error, mass, status, lengths, settings, n, m, blocks, kappa_at,
    EVALUATE: tl.constexpr, GENERAL: tl.constexpr, RAGGED: tl.constexpr, ACC: tl.constexpr,
    STEPS: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """STEPS * R rows, each in one tile: new F, and the block's column sums. EVALUATE: the error alone."""
    program = tl.program_id(0).to(tl.int64)
    item = program // blocks
    kappa = tl.load(kappa_at)
    block = program % blocks
    low, high, column_low, column_high, exponent, big = _ranges(ACC)
    rows = n
    width = m
    if RAGGED:
        rows = _bound(lengths, 2 * item, n)
        width = _bound(lengths, 2 * item + 1, m)
    state = tl.load(status + item)
    if ((state == 0) | (EVALUATE & (state == 1))) & (block * STEPS * R < rows):
        inverse, momentum, low_a, high_a = _row_settings(settings, GENERAL)
        j = tl.arange(0, C)
        g = tl.load(G + item * m + j, mask=j < width, other=float("-inf"))[None, :]
        wb = tl.load(b + item * m + j, mask=j < width, other=0.0)[None, :]
        columns = tl.zeros((C,), ACC)
        e_total = tl.zeros((), ACC)
        s_total = tl.zeros((), ACC)
        failed = 0
        for step in range(STEPS):
            i = (block * STEPS + step) * R + tl.arange(0, R)
            at = cost + (item * n + i)[:, None] * m + j[None, :]
            live = i < rows
            c = tl.load(at, mask=live[:, None] & (j < width)[None, :], other=0.0)
            wa = tl.load(a + item * n + i, mask=live, other=0.0)
            old = tl.load(F + item * n + i, mask=live, other=0.0)
            t = g - c * kappa
            shift = -old
            w = tl.exp2(t + old[:, None])
            s = tl.sum(_weighted(wb, w, big), 1)
            bad = ((s > low) & (s < high)) == 0
            if GENERAL:
                ahead = _next(old, tl.log2(s) - old, inverse, momentum, low_a, high_a, GENERAL)
                bad = bad | (tl.abs(ahead - old) > 0.25 * exponent)
            none = bad & (s != s) & (s == s)
            if tl.max(tl.where(bad & live, 1, 0)) > 0:
                top = tl.max(t + tl.log2(wb), 1)
                none = bad & (top == float("-inf"))
                shift = tl.where(bad, tl.where(none, 0.0, top), shift)
                w = tl.exp2(t - shift[:, None])
                s = tl.sum(_weighted(wb, w, big), 1)
                none = none & (s == s)
            new, e, x = _row_update(
                none, wa, live, old, shift, s, inverse, momentum, low_a, high_a, exponent, GENERAL
            )
            e_total += e
            s_total += x
            failed = tl.maximum(failed, _lost(tl.where(live, new, 0.0)))
            if not EVALUATE:
                tl.store(F + item * n + i, new, mask=live)
                scale = _row_scale(none | (live == 0), wa, new, shift, s, GENERAL)
                columns += tl.sum(tl.where(live[:, None], scale[:, None] * w, 0.0), 0)
        tl.store(error + program, e_total)
        tl.store(mass + program, s_total)
        if not EVALUATE:
            tl.store(partial + program * m + j, columns, mask=j < width)
        if failed > 0:
            tl.store(status + item, 2)


@triton.jit
def sinkhorn_wide_rows_kernel(
    cost, a, b, F, G, partial, error, mass, status, lengths, settings, n, m, blocks, kappa_at,
    EVALUATE: tl.constexpr, GENERAL: tl.constexpr, RAGGED: tl.constexpr, ACC: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """R rows of any width, in tiles: their sums first, the column sums from a second look at C."""
    program = tl.program_id(0).to(tl.int64)
    item = program // blocks
    kappa = tl.load(kappa_at)
    block = program % blocks
    low, high, column_low, column_high, exponent, big = _ranges(ACC)
    rows = n
    width = m
    if RAGGED:
        rows = _bound(lengths, 2 * item, n)
        width = _bound(lengths, 2 * item + 1, m)
    state = tl.load(status + item)
    if ((state == 0) | (EVALUATE & (state == 1))) & (block * R < rows):
        inverse, momentum, low_a, high_a = _row_settings(settings, GENERAL)
        i = block * R + tl.arange(0, R)
        live = i < rows
        row = cost + (item * n + i)[:, None] * m
        wa = tl.load(a + item * n + i, mask=live, other=0.0)
        old = tl.load(F + item * n + i, mask=live, other=0.0)
        shift = -old
        s = tl.zeros((R,), ACC)
        for start in range(0, width, C):
            j = start + tl.arange(0, C)[None, :]
            c = tl.load(row + j, mask=live[:, None] & (j < width), other=0.0)
            g = tl.load(G + item * m + j, mask=j < width, other=float("-inf"))
            wb = tl.load(b + item * m + j, mask=j < width, other=0.0)
            s += tl.sum(_weighted(wb, tl.exp2(g - c * kappa - shift[:, None]), big), 1)
        bad = ((s > low) & (s < high)) == 0
        if GENERAL:
            ahead = _next(old, tl.log2(s) - old, inverse, momentum, low_a, high_a, GENERAL)
            bad = bad | (tl.abs(ahead - old) > 0.25 * exponent)
        none = bad & (s != s) & (s == s)
        if tl.max(tl.where(bad & live, 1, 0)) > 0:
            top = tl.full((R,), float("-inf"), ACC)
            for start in range(0, width, C):
                j = start + tl.arange(0, C)[None, :]
                c = tl.load(row + j, mask=live[:, None] & (j < width), other=0.0)
                g = tl.load(G + item * m + j, mask=j < width, other=float("-inf"))
                wb = tl.load(b + item * m + j, mask=j < width, other=0.0)
                top = tl.maximum(top, tl.max(g - c * kappa + tl.log2(wb), 1))
            none = bad & (top == float("-inf"))
            shift = tl.where(bad, tl.where(none, 0.0, top), shift)
            s = tl.zeros((R,), ACC)
            for start in range(0, width, C):
                j = start + tl.arange(0, C)[None, :]
                c = tl.load(row + j, mask=live[:, None] & (j < width), other=0.0)
                g = tl.load(G + item * m + j, mask=j < width, other=float("-inf"))
                wb = tl.load(b + item * m + j, mask=j < width, other=0.0)
                s += tl.sum(_weighted(wb, tl.exp2(g - c * kappa - shift[:, None]), big), 1)
            none = none & (s == s)
        new, e, x = _row_update(
            none, wa, live, old, shift, s, inverse, momentum, low_a, high_a, exponent, GENERAL
        )
        tl.store(error + program, e)
        tl.store(mass + program, x)
        if not EVALUATE:
            tl.store(F + item * n + i, new, mask=live)
            scale = _row_scale(none | (live == 0), wa, new, shift, s, GENERAL)
            for start in range(0, width, C):
                j = start + tl.arange(0, C)[None, :]
                c = tl.load(row + j, mask=live[:, None] & (j < width), other=0.0)
                g = tl.load(G + item * m + j, mask=j < width, other=float("-inf"))
                w = scale[:, None] * tl.exp2(g - c * kappa - shift[:, None])
                columns = tl.sum(tl.where(live[:, None], w, 0.0), 0)[None, :]
                tl.store(partial + program * m + j, columns, mask=j < width)
        if _lost(tl.where(live, new, 0.0)) > 0:
            tl.store(status + item, 2)


@triton.jit
def sinkhorn_columns_kernel(
    cost, a, b, F, G, partial, status, total, lengths, settings, n, m, blocks, tiles, kappa_at,
    ROWS: tl.constexpr, GENERAL: tl.constexpr, RAGGED: tl.constexpr, ACC: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """G of C columns from the partial sums of the row blocks, in order."""
    program = tl.program_id(0).to(tl.int64)
    item = program // tiles
    kappa = tl.load(kappa_at)
    j = (program % tiles) * C + tl.arange(0, C)
    low, high, column_low, column_high, exponent, big = _ranges(ACC)
    rows = n
    width = m
    if RAGGED:
        rows = _bound(lengths, 2 * item, n)
        width = _bound(lengths, 2 * item + 1, m)
    if (tl.load(status + item) == 0) & ((program % tiles) * C < width):
        _, inverse, momentum, _, _, low_b, high_b = _settings(settings, GENERAL)
        columns = tl.zeros((C,), ACC)
        for block in range(tl.cdiv(rows, ROWS)):
            columns += tl.load(partial + (item * blocks + block) * m + j, mask=j < width, other=0.0)
        columns = tl.where(j < width, columns, 1.0)
        good = (columns > column_low * tl.load(total + item)) & (columns < column_high)
        g = tl.load(G + item * m + j, mask=j < width, other=0.0)
        log_sum = tl.log2(tl.where(good, columns, 1.0)) - g
        next_g = _next(g, log_sum, inverse, momentum, low_b, high_b, GENERAL)
        if tl.min(tl.where(good, 1, 0)) == 0:
            wb = tl.load(b + item * m + j, mask=j < width, other=0.0)
            top = tl.full((C,), float("-inf"), ACC)
            for start in range(0, rows, R):
                i = start + tl.arange(0, R)
                mask = (i < rows)[:, None] & (j < width)[None, :]
                at = (item * n + i).to(tl.int64)[:, None] * m + j[None, :]
                c = tl.load(cost + at, mask=mask, other=0.0)
                wa = tl.load(a + item * n + i, mask=i < rows, other=0.0)
                f = tl.log2(wa) + tl.load(F + item * n + i, mask=i < rows, other=0.0)
                top = tl.maximum(top, tl.max(f[:, None] - c * kappa, 0))
            none = top == float("-inf")
            shift = tl.where(none, 0.0, top)
            exact = tl.zeros((C,), ACC)
            for start in range(0, rows, R):
                i = start + tl.arange(0, R)
                mask = (i < rows)[:, None] & (j < width)[None, :]
                at = (item * n + i).to(tl.int64)[:, None] * m + j[None, :]
                c = tl.load(cost + at, mask=mask, other=0.0)
                wa = tl.load(a + item * n + i, mask=i < rows, other=0.0)
                f = tl.log2(wa) + tl.load(F + item * n + i, mask=i < rows, other=0.0)
                exact += tl.sum(tl.exp2(f[:, None] - c * kappa - shift[None, :]), 0)
            redone = _column(none, wb, g, shift, exact, inverse, momentum, low_b, high_b, GENERAL)
            next_g = tl.where(good, next_g, redone)
        tl.store(G + item * m + j, next_g, mask=j < width)
        if _lost(tl.where(j < width, next_g, 0.0)) > 0:
            tl.store(status + item, 2)


# ---- launcher ----------------------------------------------------------------------------------------


def _small(n: int, m: int, double: bool) -> dict[str, int] | None:
    """Tile of the one-program path, 32 elements a thread (8 in float64); None where it would be too large."""
    N, M = max(2, triton.next_power_of_2(n)), max(2, triton.next_power_of_2(m))
    if N * M > SMALL // (4 if double else 1) or max(N, M) > 1024:
        return None
    return {"N": N, "M": M, "num_warps": max(1, min(8, N * M * (4 if double else 1) // 1024))}


def _rows(n: int, m: int, double: bool, sms: int) -> dict[str, int]:
    """Tile of the row pass: 16 elements a thread; rows a program so that all processors have one.

    Two rows at least: one row to a tile does not compile for gfx942.
    """
    if m > WIDEST:
        return {"R": 16, "C": 64 if double else 256, "num_warps": 8}
    C = max(32, triton.next_power_of_2(m))
    R = max(2, (2048 if double else 4096) // C)
    steps = 1
    while steps < 8 and triton.cdiv(n, 2 * steps * R) >= sms:
        steps *= 2
    return {"STEPS": steps, "R": R, "C": C, "num_warps": 8}


def sinkhorn_dense(
    cost, a, b, f, g, epsilon, max_iterations, tolerance, check_every,
    rho_a=None, rho_b=None, momentum=1.0, lengths=None,
):  # fmt: skip
    cost, a, b = cost.contiguous(), a.contiguous(), b.contiguous()
    batch, n, m = cost.shape
    new = cost.new_empty
    F, G, f_out, g_out = new((batch, n)), new((batch, m)), new((batch, n)), new((batch, m))
    value, error_out, total = new((batch,)), new((batch,)), new((batch,))
    iterations = new((batch,), dtype=torch.int64)
    converged = new((batch,), dtype=torch.bool)
    status = new((batch,), dtype=torch.int32)
    if batch == 0:
        return f_out, g_out, value, iterations, error_out, converged
    acc = accumulator(cost)
    double = cost.dtype == torch.float64
    balanced = rho_a is None and rho_b is None
    flags = {
        "GENERAL": not balanced or momentum != 1,
        "RAGGED": lengths is not None,
        "ACC": acc,
    }
    lengths = iterations if lengths is None else lengths.contiguous()
    with on_device_of(cost):
        # On the device, since a float argument would be rounded to float32.
        kappa = cost.new_full((1,), LOG2E / epsilon)
        target = cost.new_full((1,), tolerance)
        settings = plain = kappa
        if flags["GENERAL"]:
            settings = plain = device_settings(cost, epsilon, rho_a, rho_b, momentum)
            if momentum != 1:
                plain = device_settings(cost, epsilon, rho_a, rho_b, 1.0)
        sinkhorn_prepare_kernel[(batch,)](
            a, b, a if f is None else f.contiguous(), b if g is None else g.contiguous(), F, G, status,
            iterations, total, lengths, n, m, kappa, max_iterations, HAS_INIT=f is not None,
            RAGGED=flags["RAGGED"], ACC=acc, C=512,
        )  # fmt: skip
        small = _small(n, m, double)
        if small is not None:
            blocks = 1
            error, mass = new((batch,)), new((batch,))
            sinkhorn_small_kernel[(batch,)](
                cost, a, b, F, G, status, iterations, total, error, mass, lengths, settings, n, m, kappa,
                target, max_iterations, check_every, **flags, **small,
            )  # fmt: skip
        else:
            config = _rows(n, m, double, processors(cost))
            height = config["R"] * config.get("STEPS", 1)
            blocks = triton.cdiv(n, height)
            partial = new((batch, blocks, m))
            # A block of padding writes nothing.
            error, mass = (cost.new_zeros((batch, blocks)) for _ in range(2))
            kernel = sinkhorn_wide_rows_kernel if m > WIDEST else sinkhorn_rows_kernel
            tiles = triton.cdiv(m, 64)

            def row_pass(evaluate, settings):
                kernel[(batch * blocks,)](
                    cost, a, b, F, G, partial, error, mass, status, lengths, settings, n, m, blocks, kappa,
                    EVALUATE=evaluate, **flags, **config,
                )  # fmt: skip

            for iteration in range(max_iterations):
                looked = tolerance > 0 and (iteration + 1) % check_every == 0
                pace = plain if looked or iteration + 1 == max_iterations else settings
                if tolerance > 0 and iteration > 0 and iteration % check_every == 0:
                    row_pass(True, plain)
                    sinkhorn_decide_kernel[(batch,)](
                        status, iterations, error, blocks, iteration, target, ACC=acc, num_warps=1
                    )
                row_pass(False, pace)
                sinkhorn_columns_kernel[(batch * tiles,)](
                    cost, a, b, F, G, partial, status, total, lengths, pace, n, m, blocks, tiles, kappa,
                    ROWS=height, **flags, R=16 if double else 32, C=64, num_warps=4,
                )  # fmt: skip
            row_pass(True, plain)
        sinkhorn_finish_kernel[(batch,)](
            a, b, F, G, f_out, g_out, value, error_out, converged, error, mass, status, lengths, plain, n, m,
            blocks, kappa, target, BALANCED=balanced, **flags, C=512, num_warps=4,
        )  # fmt: skip
    return f_out, g_out, value, iterations, error_out, converged


# ---- ahead-of-time compilation -----------------------------------------------------------------------


def aot() -> Iterator:
    """The variants held to tests/budgets.json.

    Small, one tile a row, wide, columns; plain, and damped and ragged at once; float32, and float64.
    """
    from .._aot import AotCase

    types = {
        "status": "*i32", "iterations": "*i64", "converged": "*i1", "lengths": "*i64", "n": "i32",
        "m": "i32", "blocks": "i32", "tiles": "i32", "iteration": "i32", "max_iterations": "i32",
        "check_every": "i32",
    }  # fmt: skip
    vectors = ("cost", "a", "b", "F", "G", "m")
    for double, hard in itertools.product((False, True), (True, False)):
        word, acc = ("*fp64", tl.float64) if double else ("*fp32", tl.float32)
        tag = ("64" if double else "32") + ("" if hard else "_general")
        flags = {"GENERAL": not hard, "RAGGED": not hard, "ACC": acc}

        def case(name, fn, config, aligned=vectors, flags=flags, word=word, tag=tag):
            warps = config.pop("num_warps")
            constants = {**flags, **config}
            return AotCase(
                name=f"sinkhorn_{name}_{tag}",
                fn=fn,
                signature={k: types.get(k, word) for k in fn.arg_names if k not in constants},
                constexprs=constants,
                divisible_by_16=aligned,
                num_warps=warps,
            )

        for n, m in ((32, 64),) if double else ((64, 64), (64, 128)):
            yield case(f"small_{n}x{m}", sinkhorn_small_kernel, _small(n, m, double))
        for m in (1024, WIDEST):
            config = {"EVALUATE": False, **_rows(4096, m, double, 132)}
            yield case(f"rows_{m}", sinkhorn_rows_kernel, config, (*vectors, "partial"))
        config = {"EVALUATE": False, **_rows(8192, 8192, double, 132)}
        yield case("wide_rows", sinkhorn_wide_rows_kernel, config, (*vectors, "partial"))
        config = {"ROWS": 32, "R": 16 if double else 32, "C": 64, "num_warps": 4}
        yield case("columns", sinkhorn_columns_kernel, config, (*vectors, "partial"))
    for name, fn, extra in (
        ("prepare", sinkhorn_prepare_kernel, {"HAS_INIT": True, "RAGGED": True, "C": 512}),
        ("finish", sinkhorn_finish_kernel,
         {"GENERAL": True, "BALANCED": False, "RAGGED": True, "C": 512}),
        ("decide", sinkhorn_decide_kernel, {}),
    ):  # fmt: skip
        constants = {"ACC": tl.float32, **extra}
        names = [k for k in fn.arg_names if k not in constants]
        yield AotCase(
            name=f"sinkhorn_{name}",
            fn=fn,
            signature={k: types.get(k, "*fp32") for k in names},
            constexprs=constants,
            num_warps=1 if name == "decide" else 4,
        )
