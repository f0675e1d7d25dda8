"""GPU kernels of core `connections`: formulas in solera/ensemble/connections.py.

Elements of D a token: width reads n streams and writes n + 1 rows, its backward reads 2 n + 1 and writes n; the merged
form adds one row each way; depth reads n + 1, writes n, backward n + 1 and 1. A program takes a token: what it reads
again (statistics, products, mixing) comes from L1, memory sees each byte once. Backward adds the projection's gradient
to a partial of each program, which is as large as the projection and stays in L2 (n + 2 rows of D; for the manifold
n (n + 2) rows of n D).

H200 at 4.3 TB/s, n 4, D 1024, 8192 tokens, bfloat16: width 35 us, its backward 51 us, depth 35 us are the floors.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl

from .._launch import accumulate_type, accumulator, on_device_of, processors
from ..norm.row_norm import sum_partials_kernel
from ._connections import column_of, gradient_row, manifold, streams_of, tanh, undivide

FIXED, HYPER, MANIFOLD = 0, 1, 2
TILE, BACKWARD_TILE = 1024, 128  # columns a step: backward holds five times as much


@triton.jit
def connection_width_kernel(
    h, out, out_beta, projection, constant, fixed, scale, input, rest, beta, z_out, mean_out, rstd_out,
    inner, columns, eps, iterations, KIND: tl.constexpr, CENTRED: tl.constexpr, TANH: tl.constexpr,
    MERGED: tl.constexpr, HAS_CONSTANT: tl.constexpr, ACC: tl.constexpr, n: tl.constexpr,
    N2: tl.constexpr, P2: tl.constexpr, PF: tl.constexpr, S2: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, N2)
    c = tl.arange(0, P2)
    lane = tl.arange(0, C)
    row = token // inner * n * inner + token % inner + k * inner  # [N2], in rows of `columns`
    here = k[:, None] * (n + 2) + c[None, :]  # of the n (n + 2) numbers
    there = (k[:, None] < n) & (c[None, :] < n + 2)
    if KIND == 1:
        mean = tl.zeros((N2,), ACC)
        if CENTRED:
            for j in range(0, columns, C):
                mask = (k[:, None] < n) & (j + lane[None, :] < columns)
                v = streams_of(h, out, out_beta, row[:, None] * columns + j + lane[None, :], token, k,
                             j + lane, columns, mask, MERGED, ACC, n)  # fmt: skip
                mean += tl.sum(v, 1)
            mean = mean / columns
            tl.store(mean_out + row, mean, mask=k < n)
        square = tl.zeros((N2,), ACC)
        z = tl.zeros((N2, P2), ACC)
        for j in range(0, columns, C):
            cols = j + lane
            mask = (k[:, None] < n) & (cols[None, :] < columns)
            v = streams_of(h, out, out_beta, row[:, None] * columns + cols[None, :], token, k, cols,
                         columns, mask, MERGED, ACC, n)  # fmt: skip
            d = tl.where(mask, v - mean[:, None], 0.0)
            square += tl.sum(d * d, 1)
            for p in range(n + 2):
                w = tl.load(projection + p * columns + cols, mask=cols < columns, other=0.0)
                z += tl.where(c[None, :] == p, tl.sum(d * w[None, :], 1)[:, None], 0.0)
        rstd = 1.0 / tl.sqrt(square / columns + eps)
        tl.store(rstd_out + row, rstd, mask=k < n)
        z = z * rstd[:, None]
        tl.store(z_out + token * (n * (n + 2)) + here, z, mask=there)
        if HAS_CONSTANT:
            z += tl.load(constant + here, mask=there, other=0.0)
        if TANH:
            z = tanh(z, ACC)
        alpha = tl.load(fixed + here, mask=there, other=0.0)
        alpha += tl.load(scale + here, mask=there, other=0.0) * z
    elif KIND == 2:
        lanes = tl.arange(0, PF)
        square = tl.zeros((N2,), ACC)
        z = tl.zeros((PF,), ACC)
        for j in range(0, columns, C):
            cols = j + lane
            mask = (k[:, None] < n) & (cols[None, :] < columns)
            v = streams_of(h, out, out_beta, row[:, None] * columns + cols[None, :], token, k, cols,
                         columns, mask, MERGED, ACC, n)  # fmt: skip
            square += tl.sum(v * v, 1)
            flat = k[:, None] * columns + cols[None, :]
            for p in range(n * (n + 2)):
                w = tl.load(projection + p * (n * columns) + flat, mask=mask, other=0.0)
                z += tl.where(lanes == p, tl.sum(tl.sum(v * w, 1), 0), 0.0)
        rstd = 1.0 / tl.sqrt(tl.sum(square, 0) / (n * columns) + eps)
        tl.store(rstd_out + token, rstd)
        z = z * rstd
        real = lanes < n * (n + 2)
        tl.store(z_out + token * (n * (n + 2)) + lanes, z, mask=real)
        t = tl.load(fixed + lanes, mask=real, other=0.0)
        t += tl.load(scale + lanes, mask=real, other=0.0) * z
        alpha, m, sums = manifold(t, k, lanes, c, iterations, ACC, n, N2, P2, S2)
    else:
        alpha = tl.load(fixed + here, mask=there, other=0.0)
    tl.store(beta + token * n + k, column_of(alpha, n + 1, c), mask=k < n)
    for j in range(0, columns, C):
        cols = j + lane
        mask = (k[:, None] < n) & (cols[None, :] < columns)
        v = streams_of(h, out, out_beta, row[:, None] * columns + cols[None, :], token, k, cols,
                     columns, mask, MERGED, ACC, n)  # fmt: skip
        x = tl.sum(column_of(alpha, 0, c)[:, None] * v, 0)
        tl.store(input + token * columns + cols, x.to(input.dtype.element_ty), mask=cols < columns)
        first = token // inner * n * inner + token % inner
        for i in range(n):
            x = tl.sum(column_of(alpha, i + 1, c)[:, None] * v, 0)
            at = (first + i * inner) * columns + cols
            tl.store(rest + at, x.to(rest.dtype.element_ty), mask=cols < columns)


@triton.jit
def connection_width_backward_kernel(
    dinput, drest, dbeta, h, out, out_beta, projection, constant, fixed, scale, z_in, mean_in, rstd_in,
    dh, dout, dout_beta, part, numbers, tokens, inner, columns, iterations, steps, KIND: tl.constexpr,
    CENTRED: tl.constexpr, TANH: tl.constexpr, MERGED: tl.constexpr, HAS_CONSTANT: tl.constexpr,
    HAS_INPUT: tl.constexpr, HAS_REST: tl.constexpr, HAS_BETA: tl.constexpr, ACC: tl.constexpr,
    n: tl.constexpr, N2: tl.constexpr, P2: tl.constexpr, PF: tl.constexpr, S2: tl.constexpr,
    C: tl.constexpr,
):  # fmt: skip
    """A program walks `steps` tokens; `part` and `numbers` hold its share of the parameters' gradients."""
    program = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, N2)
    c = tl.arange(0, P2)
    lane = tl.arange(0, C)
    lanes = tl.arange(0, PF)
    N: tl.constexpr = n * (n + 2)
    here = k[:, None] * (n + 2) + c[None, :]
    there = (k[:, None] < n) & (c[None, :] < n + 2)
    real = lanes < N
    if KIND == 2:
        part += program * N * n * columns
        sum_fixed = tl.zeros((PF,), ACC)
        sum_scale = tl.zeros((PF,), ACC)
    else:
        part += program * (n + 2) * columns
        sum_fixed = tl.zeros((N2, P2), ACC)
        sum_scale = tl.zeros((N2, P2), ACC)
    sum_constant = tl.zeros((N2, P2), ACC)
    for step in range(steps):
        token = program * steps + step
        live = token < tokens
        n_live = tl.where(live, n, 0)
        first = token // inner * n * inner + token % inner
        row = first + k * inner
        dc = tl.zeros((N2, P2), ACC)
        for j in range(0, columns, C):
            cols = j + lane
            mask = (k[:, None] < n_live) & (cols[None, :] < columns)
            v = streams_of(h, out, out_beta, row[:, None] * columns + cols[None, :], token, k, cols,
                         tl.where(live, columns, 0), mask, MERGED, ACC, n)  # fmt: skip
            for i in range(n + 1):
                g = gradient_row(dinput, drest, i, first, token, inner, cols,
                                  tl.where(live, columns, 0), HAS_INPUT, HAS_REST, ACC, C)  # fmt: skip
                dc += tl.where(c[None, :] == i, tl.sum(v * g[None, :], 1)[:, None], 0.0)
        if HAS_BETA:
            db = tl.load(dbeta + token * n + k, mask=k < n_live, other=0.0).to(ACC)
            dc += tl.where(c[None, :] == n + 1, db[:, None], 0.0)
        mean = tl.zeros((N2,), ACC)
        factor = tl.zeros((N2, P2), ACC)
        flat_factor = tl.zeros((PF,), ACC)
        pull = tl.zeros((N2,), ACC)
        alpha = tl.load(fixed + here, mask=there, other=0.0)
        if KIND == 1:
            z = tl.load(z_in + token * N + here, mask=there & live, other=0.0)
            rstd = tl.load(rstd_in + row, mask=k < n_live, other=0.0)
            if CENTRED:
                mean = tl.load(mean_in + row, mask=k < n_live, other=0.0)
            a = z
            if HAS_CONSTANT:
                a += tl.load(constant + here, mask=there, other=0.0)
            s = tl.load(scale + here, mask=there, other=0.0)
            e = dc * s
            if TANH:
                a = tanh(a, ACC)
                e = e * (1.0 - a) * (1.0 + a)
            alpha += s * a
            sum_fixed += dc
            sum_scale += dc * a
            sum_constant += e
            factor = e * rstd[:, None]
            pull = rstd * rstd * tl.sum(e * z, 1) / columns
        elif KIND == 2:
            z = tl.load(z_in + token * N + lanes, mask=real & live, other=0.0)
            rstd = tl.load(rstd_in + token, mask=live, other=0.0)
            s = tl.load(scale + lanes, mask=real, other=0.0)
            t = tl.load(fixed + lanes, mask=real, other=0.0) + s * z
            alpha, m, sums = manifold(t, k, lanes, c, iterations, ACC, n, N2, P2, S2)
            order = tl.arange(0, S2)
            other = tl.arange(0, N2)
            match = (c[None, :, None] == other[None, None, :] + 1) & (other[None, None, :] < n)
            back = tl.sum(tl.where(match, dc[:, :, None], 0.0), 1)  # [k, j]
            for i in range(iterations):
                back, m = undivide(back, m, sums, 2 * (iterations - 1 - i) + 1, order, 0)
                back, m = undivide(back, m, sums, 2 * (iterations - 1 - i), order, 1)
            pre, half = column_of(alpha, 0, c), column_of(alpha, n + 1, c) * 0.5
            gp = column_of(dc, 0, c) * pre * (1.0 - pre)
            gh = 2.0 * column_of(dc, n + 1, c) * half * (1.0 - half)
            inside = (k[:, None] < n) & (other[None, :] < n)
            index = tl.where(inside, 2 * n + other[None, :] * n + k[:, None], -1)
            gm = tl.where(inside, back * m, 0.0)
            dt = tl.sum(
                tl.where(lanes[None, :] == tl.where(k < n, k, -1)[:, None], gp[:, None], 0.0), 0
            )
            dt += tl.sum(
                tl.where(lanes[None, :] == tl.where(k < n, n + k, -1)[:, None], gh[:, None], 0.0), 0
            )
            spread = tl.where(lanes[None, None, :] == index[:, :, None], gm[:, :, None], 0.0)
            dt += tl.sum(tl.sum(spread, 1), 0)
            sum_fixed += dt
            sum_scale += dt * z
            flat_factor = dt * s * rstd
            pull += rstd * rstd * tl.sum(dt * s * z, 0) / (n * columns)
        if KIND == 1 and CENTRED:
            average = tl.zeros((N2,), ACC)
            for j in range(0, columns, C):
                cols = j + lane
                for p in range(n + 2):
                    w = tl.load(projection + p * columns + cols, mask=cols < columns, other=0.0)
                    average += column_of(factor, p, c) * tl.sum(w, 0)
            shift = average / columns
        for j in range(0, columns, C):
            cols = j + lane
            mask = (k[:, None] < n_live) & (cols[None, :] < columns)
            at = row[:, None] * columns + cols[None, :]
            v = streams_of(h, out, out_beta, at, token, k, cols, tl.where(live, columns, 0), mask,
                         MERGED, ACC, n)  # fmt: skip
            d = tl.where(mask, v - mean[:, None], 0.0)
            total = -d * pull[:, None]
            if KIND == 1:
                if CENTRED:
                    total -= shift[:, None]
                for p in range(n + 2):
                    w = tl.load(projection + p * columns + cols, mask=cols < columns, other=0.0)
                    f = column_of(factor, p, c)
                    total += f[:, None] * w[None, :]
                    to = part + p * columns + cols
                    held = tl.load(to, mask=(cols < columns) & (step > 0), other=0.0)
                    tl.store(to, held + tl.sum(f[:, None] * d, 0), mask=cols < columns)
            elif KIND == 2:
                flat = k[:, None] * columns + cols[None, :]
                wide = (k[:, None] < n) & (cols[None, :] < columns)
                for p in range(N):
                    w = tl.load(projection + p * (n * columns) + flat, mask=wide, other=0.0)
                    f = tl.sum(tl.where(lanes == p, flat_factor, 0.0), 0)
                    total += f * w
                    to = part + p * (n * columns) + flat
                    held = tl.load(to, mask=wide & (step > 0), other=0.0)
                    tl.store(to, held + f * d, mask=wide)
            for i in range(n + 1):
                g = gradient_row(dinput, drest, i, first, token, inner, cols,
                                  tl.where(live, columns, 0), HAS_INPUT, HAS_REST, ACC, C)  # fmt: skip
                total += column_of(alpha, i, c)[:, None] * g[None, :]
            tl.store(dh + at, total.to(dh.dtype.element_ty), mask=mask)
            if MERGED:
                total = tl.where(mask, total, 0.0)
                weight = tl.load(out_beta + token * n + k, mask=k < n_live, other=0.0).to(ACC)
                to = token * columns + cols
                f = tl.load(out + to, mask=(cols < columns) & live, other=0.0).to(ACC)
                x = tl.sum(weight[:, None] * total, 0)
                tl.store(dout + to, x.to(dout.dtype.element_ty), mask=(cols < columns) & live)
                to = dout_beta + token * n + k
                held = tl.load(to, mask=(k < n_live) & (j > 0), other=0.0)
                tl.store(to, held + tl.sum(total * f[None, :], 1), mask=k < n_live)
        if KIND == 0:
            sum_fixed += dc
        tl.debug_barrier()
    to = numbers + program * 3 * N
    if KIND == 2:
        tl.store(to + lanes, sum_fixed, mask=real)
        tl.store(to + N + lanes, sum_scale, mask=real)
    else:
        tl.store(to + here, sum_fixed, mask=there)
        tl.store(to + N + here, sum_scale, mask=there)
    tl.store(to + 2 * N + here, sum_constant, mask=there)


@triton.jit
def connection_depth_kernel(
    out, h, beta, y, inner, columns, ACC: tl.constexpr, n: tl.constexpr, N2: tl.constexpr,
    C: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, N2)
    cols = tl.program_id(1) * C + tl.arange(0, C)
    row = token // inner * n * inner + token % inner + k * inner
    at = row[:, None] * columns + cols[None, :]
    mask = (k[:, None] < n) & (cols[None, :] < columns)
    v = streams_of(h, out, beta, at, token, k, cols, columns, mask, True, ACC, n)
    tl.store(y + at, v.to(y.dtype.element_ty), mask=mask)


@triton.jit
def connection_depth_backward_kernel(
    grad, out, beta, dout, dbeta, inner, columns, ACC: tl.constexpr, n: tl.constexpr, N2: tl.constexpr,
    C: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, N2)
    row = token // inner * n * inner + token % inner + k * inner
    weight = tl.load(beta + token * n + k, mask=k < n, other=0.0).to(ACC)
    total = tl.zeros((N2,), ACC)
    for j in range(0, columns, C):
        cols = j + tl.arange(0, C)
        mask = (k[:, None] < n) & (cols[None, :] < columns)
        g = tl.load(grad + row[:, None] * columns + cols[None, :], mask=mask, other=0.0).to(ACC)
        f = tl.load(out + token * columns + cols, mask=cols < columns, other=0.0).to(ACC)
        x = tl.sum(weight[:, None] * g, 0)
        tl.store(dout + token * columns + cols, x.to(dout.dtype.element_ty), mask=cols < columns)
        total += tl.sum(g * f[None, :], 1)
    tl.store(dbeta + token * n + k, total, mask=k < n)


# ---- launchers ---------------------------------------------------------------------------------------


def _config(n: int, columns: int, iterations: int = 0, most: int = TILE) -> dict[str, int]:
    N2 = triton.next_power_of_2(n)
    C = min(most, max(16, triton.next_power_of_2(columns)), max(16, 8192 // N2))
    return {
        "n": n, "N2": N2, "P2": triton.next_power_of_2(n + 2),
        "PF": triton.next_power_of_2(n * (n + 2)), "S2": max(1, triton.next_power_of_2(2 * iterations)),
        "C": C, "num_warps": 4 if N2 * C <= 4096 else 8,
    }  # fmt: skip


def _dense(*tensors):
    return [None if t is None else t.contiguous() for t in tensors]


def connection_width(
    h, out, out_beta, projection, constant, fixed, scale, kind, centred, tanh, eps, iterations
):
    h, out, out_beta, projection, constant, fixed, scale = _dense(
        h, out, out_beta, projection, constant, fixed, scale
    )
    O, n, I, D = h.shape
    acc = accumulate_type(h)
    new = lambda *shape: h.new_empty(shape, dtype=acc)
    input, rest, beta = h.new_empty((O, I, D)), h.new_empty(h.shape), new(O, I, n)
    z = new(0) if kind == FIXED else new(O, I, n * (n + 2))
    mean = new(O, n, I) if kind == HYPER and centred else new(0)
    rstd = new(O, n, I) if kind == HYPER else (new(O, I) if kind == MANIFOLD else new(0))
    if O * I > 0:
        with on_device_of(h):
            connection_width_kernel[(O * I,)](
                h, h if out is None else out, fixed if out_beta is None else out_beta,
                fixed if projection is None else projection, fixed if constant is None else constant,
                fixed, fixed if scale is None else scale, input, rest, beta, z, mean, rstd, I, D, eps,
                iterations, KIND=kind, CENTRED=centred, TANH=tanh, MERGED=out is not None,
                HAS_CONSTANT=constant is not None, ACC=accumulator(h), **_config(n, D, iterations),
            )  # fmt: skip
    return input, rest, beta, z, mean, rstd


def _sum(partial, shape):
    """Partials (parts, ...) summed in order."""
    columns = partial[0].numel()
    total = partial.new_empty(shape)
    sum_partials_kernel[(triton.cdiv(columns, 128),)](
        partial, total, partial.shape[0], columns, C=128, num_warps=4
    )
    return total


def connection_width_backward(
    dinput, drest, dbeta, h, out, out_beta, projection, constant, fixed, scale, z, mean, rstd,
    kind, centred, tanh, iterations,
):  # fmt: skip
    dinput, drest, dbeta, h, out, out_beta, projection, constant, fixed, scale = _dense(
        dinput, drest, dbeta, h, out, out_beta, projection, constant, fixed, scale
    )
    O, n, I, D = h.shape
    acc, tokens, N = accumulate_type(h), O * I, n * (n + 2)
    new = lambda *shape: h.new_empty(shape, dtype=acc)
    dh = h.new_empty(h.shape)
    dout = h.new_empty((0,) if out is None else (O, I, D))
    dout_beta = new(0) if out is None else new(O, I, n)
    shape = (0,) if kind == FIXED else ((N, n * D) if kind == MANIFOLD else (n + 2, D))
    if tokens == 0 or D == 0:
        zero = lambda *shape: h.new_zeros(shape, dtype=acc)
        others = [zero(0) if kind == FIXED else zero(N) for _ in range(2)]
        dfixed = zero(N)
        if dbeta is not None and kind != MANIFOLD:
            dfixed.view(n, n + 2)[:, n + 1] = dbeta.to(acc).sum((0, 1))
        return dh, dout, dout_beta.zero_(), zero(*shape), others[0], dfixed, others[1]
    steps = triton.cdiv(tokens, (1 if kind == MANIFOLD else 4) * processors(h))
    parts = triton.cdiv(tokens, steps)
    part, numbers = new(parts, *shape), new(parts, 3, N)
    with on_device_of(h):
        connection_width_backward_kernel[(parts,)](
            h if dinput is None else dinput, h if drest is None else drest,
            fixed if dbeta is None else dbeta, h, h if out is None else out,
            fixed if out_beta is None else out_beta, fixed if projection is None else projection,
            fixed if constant is None else constant, fixed, fixed if scale is None else scale, z, mean,
            rstd, dh, dout, dout_beta, part, numbers, tokens, I, D, iterations, steps, KIND=kind,
            CENTRED=centred, TANH=tanh, MERGED=out is not None, HAS_CONSTANT=constant is not None,
            HAS_INPUT=dinput is not None, HAS_REST=drest is not None, HAS_BETA=dbeta is not None,
            ACC=accumulator(h), **_config(n, D, iterations, BACKWARD_TILE),
        )  # fmt: skip
        dprojection = new(0) if kind == FIXED else _sum(part, shape)
        dfixed, dscale, dconstant = (t.clone() for t in _sum(numbers, (3, N)))
    if kind == FIXED:
        dscale, dconstant = new(0), new(0)
    return dh, dout, dout_beta, dprojection, dconstant, dfixed, dscale


def connection_depth(out, h, beta):
    out, h, beta = _dense(out, h, beta)
    O, n, I, D = h.shape
    y = h.new_empty(h.shape)
    if h.numel():
        config = _config(n, D)
        options = {key: config[key] for key in ("n", "N2", "C", "num_warps")}
        with on_device_of(h):
            connection_depth_kernel[(O * I, triton.cdiv(D, config["C"]))](
                out, h, beta, y, I, D, ACC=accumulator(h), **options
            )
    return y


def connection_depth_backward(grad, out, beta):
    grad, out, beta = _dense(grad, out, beta)
    O, n, I, D = grad.shape
    dout, dbeta = grad.new_empty((O, I, D)), grad.new_empty((O, I, n), dtype=accumulate_type(grad))
    if O * I > 0:
        config = _config(n, D)
        options = {key: config[key] for key in ("n", "N2", "C", "num_warps")}
        with on_device_of(grad):
            connection_depth_backward_kernel[(O * I,)](
                grad, out, beta, dout, dbeta, I, D, ACC=accumulator(grad), **options
            )
    return dout, dbeta


# ---- ahead-of-time compilation -----------------------------------------------------------------------


def aot() -> Iterator:
    """The variants held to tests/budgets.json: four streams of 1024 columns, merged, every gradient."""
    from .._aot import AotCase

    half, acc = "*bf16", "*fp32"
    wanted = {"HAS_INPUT": True, "HAS_REST": True, "HAS_BETA": True}
    for kind, name in ((HYPER, "hyper"), (MANIFOLD, "manifold")):
        config = _config(4, 1024, 20 if kind == MANIFOLD else 0)
        warps = config.pop("num_warps")
        flags = {
            "KIND": kind, "CENTRED": kind == HYPER, "TANH": kind == HYPER, "MERGED": True,
            "HAS_CONSTANT": kind == HYPER, "ACC": tl.float32, **config,
        }  # fmt: skip
        inputs = {
            "h": half, "out": half, "out_beta": acc, "projection": acc, "constant": acc, "fixed": acc,
            "scale": acc,
        }  # fmt: skip
        results = {
            "input": half,
            "rest": half,
            "beta": acc,
            "z_out": acc,
            "mean_out": acc,
            "rstd_out": acc,
        }
        sizes = {"inner": "i32", "columns": "i32", "iterations": "i32"}
        yield AotCase(
            name=f"connection_width_{name}",
            fn=connection_width_kernel,
            signature={**inputs, **results, **sizes, "eps": "fp32"},
            constexprs=flags,
            divisible_by_16=(*inputs, *results, "columns"),
            num_warps=warps,
        )
        gradients = {
            "dinput": half, "drest": half, "dbeta": acc, "z_in": acc, "mean_in": acc, "rstd_in": acc,
            "dh": half, "dout": half, "dout_beta": acc, "part": acc, "numbers": acc,
        }  # fmt: skip
        yield AotCase(
            name=f"connection_width_backward_{name}",
            fn=connection_width_backward_kernel,
            signature={**inputs, **gradients, **sizes, "tokens": "i32", "steps": "i32"},
            constexprs={**flags, **wanted, "C": BACKWARD_TILE},
            divisible_by_16=(*inputs, *gradients, "columns"),
            num_warps=4,
        )
    config = {key: _config(4, 1024)[key] for key in ("n", "N2", "C")}
    pointers = {"out": half, "beta": acc}
    for name, fn, more in (
        ("depth", connection_depth_kernel, {"h": half, "y": half}),
        (
            "depth_backward",
            connection_depth_backward_kernel,
            {"grad": half, "dout": half, "dbeta": acc},
        ),
    ):
        yield AotCase(
            name=f"connection_{name}", fn=fn,
            signature={**pointers, **more, "inner": "i32", "columns": "i32"},
            constexprs={**config, "ACC": tl.float32},
            divisible_by_16=(*pointers, *more, "columns"),
        )  # fmt: skip
