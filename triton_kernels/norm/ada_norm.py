"""GPU kernels of core `ada_norm`: the formulas are in solera/norm/ada_norm.py.

Bytes a row of D elements: forward reads x and branch and writes h and y; backward reads dy, dh, h and branch
and writes dx and dbranch. The parameters of a sample are read again by each of its rows, from the second level
cache; partial sums are three rows of D floats a program. Rows up to 4096 wide stay in registers; wider ones are
walked in tiles, and backward reads dy and h twice.

H200 at 4.3 TB/s, bf16, 32768 x 4096: forward 250 us, backward 375 us are the floors.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl

from .._launch import accumulate_type, accumulator, on_device_of, processors
from ._ada_parameters import (
    ada_norm_finish_kernel,
    ada_norm_segments_kernel,
    of_table,
    parameter_of,
    rows_of,
    whole,
)
from .row_norm import _tile

WIDEST = 4096  # columns kept in registers
TILE = 1024  # columns a step for wider rows


@triton.jit
def _sum_of(
    x, branch, gate, gate_sample, gate_token, row, sample, token, cols, rows, columns,
    HAS_BRANCH: tl.constexpr, HAS_GATE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """x + gate * branch rounded to x's dtype, as the unfused sum is; 0 outside the row."""
    at, mask = _tile(x, row, cols, rows, columns)
    h = tl.load(at, mask=mask, other=0.0).to(ACC)
    if HAS_BRANCH:
        at, mask = _tile(branch, row, cols, rows, columns)
        flow = tl.load(at, mask=mask, other=0.0).to(ACC)
        if HAS_GATE:
            flow *= parameter_of(gate, sample, token, gate_sample, gate_token, cols, mask, ACC)
        h = (h + flow).to(x.dtype.element_ty).to(ACC)
    return h


@triton.jit
def _store_forward(
    y, h_out, n, h, scale, shift, weight, bias, index, sets, scale_sample, scale_token,
    shift_sample, shift_token, weight_step, bias_step, row, sample, token, cols, rows, columns,
    HAS_BRANCH: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, INDEXED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    at, mask = _tile(y, row, cols, rows, columns)
    if HAS_WEIGHT:
        n *= of_table(weight, sample, weight_step, index, sets, cols, mask, INDEXED, ACC)
    if HAS_BIAS:
        n += of_table(bias, sample, bias_step, index, sets, cols, mask, INDEXED, ACC)
    if HAS_SCALE:
        n *= 1.0 + parameter_of(scale, sample, token, scale_sample, scale_token, cols, mask, ACC)
    if HAS_SHIFT:
        n += parameter_of(shift, sample, token, shift_sample, shift_token, cols, mask, ACC)
    tl.store(at, n.to(y.dtype.element_ty), mask=mask)
    if HAS_BRANCH:
        at, mask = _tile(h_out, row, cols, rows, columns)
        tl.store(at, h.to(y.dtype.element_ty), mask=mask)


@triton.jit
def ada_norm_forward_kernel(
    x, branch, gate, scale, shift, weight, bias, index, y, h_out, mean_out, rstd_out,
    gate_sample, gate_token, scale_sample, scale_token, shift_sample, shift_token, weight_step,
    bias_step, sets, rows, tokens, columns, eps,
    CENTRED: tl.constexpr, HAS_BRANCH: tl.constexpr, HAS_GATE: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr, INDEXED: tl.constexpr, ACC: tl.constexpr, R: tl.constexpr,
    C: tl.constexpr, ONE_TILE: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * R + tl.arange(0, R))[:, None]  # [R, 1]
    sample = row // tokens
    token = row - sample * tokens
    lane = tl.arange(0, C)[None, :]  # [1, C]
    mean = tl.zeros((R, 1), ACC)
    square = tl.zeros((R, 1), ACC)
    if ONE_TILE:
        h = _sum_of(x, branch, gate, gate_sample, gate_token, row, sample, token, lane, rows,
                    columns, HAS_BRANCH, HAS_GATE, ACC)  # fmt: skip
        if CENTRED:
            mean = tl.sum(h, 1)[:, None] / columns
        d = tl.where(lane < columns, h - mean, 0.0)
        square = tl.sum(d * d, 1)[:, None]
    else:
        if CENTRED:
            total = tl.zeros((R, C), ACC)
            for j in range(0, columns, C):
                total += _sum_of(x, branch, gate, gate_sample, gate_token, row, sample, token, j + lane,
                                 rows, columns, HAS_BRANCH, HAS_GATE, ACC)  # fmt: skip
            mean = tl.sum(total, 1)[:, None] / columns
        squares = tl.zeros((R, C), ACC)
        for j in range(0, columns, C):
            h = _sum_of(x, branch, gate, gate_sample, gate_token, row, sample, token, j + lane, rows,
                        columns, HAS_BRANCH, HAS_GATE, ACC)  # fmt: skip
            d = tl.where(j + lane < columns, h - mean, 0.0)
            squares += d * d
        square = tl.sum(squares, 1)[:, None]
    rstd = 1.0 / tl.sqrt(square / columns + eps)
    one = tl.arange(0, 1)[None, :]
    if CENTRED:
        tl.store(mean_out + row + one, mean, mask=row < rows)
    tl.store(rstd_out + row + one, rstd, mask=row < rows)
    if ONE_TILE:
        _store_forward(y, h_out, d * rstd, h, scale, shift, weight, bias, index, sets, scale_sample,
                       scale_token, shift_sample, shift_token, weight_step, bias_step, row, sample,
                       token, lane, rows, columns, HAS_BRANCH, HAS_SCALE, HAS_SHIFT, HAS_WEIGHT,
                       HAS_BIAS, INDEXED, ACC)  # fmt: skip
    else:
        for j in range(0, columns, C):
            h = _sum_of(x, branch, gate, gate_sample, gate_token, row, sample, token, j + lane, rows,
                        columns, HAS_BRANCH, HAS_GATE, ACC)  # fmt: skip
            _store_forward(y, h_out, (h - mean) * rstd, h, scale, shift, weight, bias, index, sets,
                           scale_sample, scale_token, shift_sample, shift_token, weight_step,
                           bias_step, row, sample, token, j + lane, rows, columns, HAS_BRANCH,
                           HAS_SCALE, HAS_SHIFT, HAS_WEIGHT, HAS_BIAS, INDEXED, ACC)  # fmt: skip


@triton.jit
def _incoming(
    dy, h, mean, rstd, scale, weight, index, sets, scale_sample, scale_token, weight_step, row,
    sample, token, cols, inside, columns, CENTRED: tl.constexpr, HAS_SCALE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, INDEXED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dy, n, weight and 1 + scale of a tile, and rstd; dy and n are 0 outside, where rstd is too."""
    mask = inside & (cols < columns)
    at = row.to(tl.int64) * columns + cols
    g = tl.load(dy + at, mask=mask, other=0.0).to(ACC)
    n = tl.load(h + at, mask=mask, other=0.0).to(ACC)
    r = tl.load(rstd + row, mask=inside, other=0.0)
    if CENTRED:
        n = tl.where(mask, n - tl.load(mean + row, mask=inside, other=0.0), 0.0)
    w = tl.full(g.shape, 1.0, ACC)
    s = tl.full(g.shape, 1.0, ACC)
    if HAS_WEIGHT:
        w = tl.where(
            mask, of_table(weight, sample, weight_step, index, sets, cols, mask, INDEXED, ACC), 0.0
        )
    if HAS_SCALE:
        s = 1.0 + parameter_of(scale, sample, token, scale_sample, scale_token, cols, mask, ACC)
    return g, n * r, r, w, s


@triton.jit
def ada_norm_row_sums_kernel(
    dy, h, mean, rstd, scale, weight, index, sums, sets, scale_sample, scale_token, weight_step,
    rows, tokens, columns, CENTRED: tl.constexpr, HAS_SCALE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, INDEXED: tl.constexpr, ACC: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """sums[row] = (mean of g n, mean of g) for rows wider than a tile."""
    row = tl.program_id(0) + tl.zeros((1, 1), tl.int32)
    sample = row // tokens
    lane = tl.arange(0, C)[None, :]
    total_gn = tl.zeros((1, C), ACC)
    total_g = tl.zeros((1, C), ACC)
    for j in range(0, columns, C):
        dy_j, n, r, w, s = _incoming(
            dy, h, mean, rstd, scale, weight, index, sets, scale_sample, scale_token, weight_step, row,
            sample, row - sample * tokens, j + lane, row < rows, columns, CENTRED, HAS_SCALE,
            HAS_WEIGHT, INDEXED, ACC,
        )  # fmt: skip
        total_gn += dy_j * w * s * n
        total_g += dy_j * w * s
    at = sums + row.to(tl.int64) * 2 + tl.arange(0, 1)[None, :]
    tl.store(at, tl.sum(total_gn, 1)[:, None] / columns)
    tl.store(at + 1, tl.sum(total_g, 1)[:, None] / columns)


@triton.jit
def ada_norm_backward_kernel(
    dy, dh, h, branch, gate, scale, weight, bias, index, mean, rstd, sums, dx, dbranch, dgate,
    dscale, P, Q, E, gate_sample, gate_token, scale_sample, scale_token, weight_step, bias_step,
    sets, tokens, columns, parts, steps,
    CENTRED: tl.constexpr, HAS_DH: tl.constexpr, HAS_GATE: tl.constexpr, HAS_SCALE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, INDEXED: tl.constexpr, NEED_X: tl.constexpr,
    NEED_BRANCH: tl.constexpr, GATE: tl.constexpr, TOKEN_SCALE: tl.constexpr,
    NEED_TOKEN_SCALE: tl.constexpr, NEED_P: tl.constexpr, NEED_Q: tl.constexpr, ACC: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr, ONE_TILE: tl.constexpr,
):  # fmt: skip
    """A program walks `steps` blocks of R tokens of one sample and keeps its P, Q and E in registers.

    GATE: 0 no gradient, 1 summed into E, 2 per token.
    """
    part = tl.program_id(0)
    sample = part // parts + tl.zeros((1, 1), tl.int32)
    cols = (tl.program_id(1) * C + tl.arange(0, C))[None, :]  # [1, C]
    sum_p = tl.zeros((1, C), ACC)
    sum_q = tl.zeros((1, C), ACC)
    sum_e = tl.zeros((1, C), ACC)
    for i in range(steps):
        token = ((part % parts * steps + i) * R + tl.arange(0, R))[:, None]  # [R, 1]
        inside = token < tokens
        mask = inside & (cols < columns)
        row = sample * tokens + token
        at = row.to(tl.int64) * columns + cols
        g, n, r, w, s = _incoming(
            dy, h, mean, rstd, scale, weight, index, sets, scale_sample, scale_token, weight_step, row,
            sample, token, cols, inside, columns, CENTRED, HAS_SCALE, HAS_WEIGHT, INDEXED, ACC,
        )  # fmt: skip
        if NEED_TOKEN_SCALE:
            z = n * w
            if HAS_BIAS:
                z += of_table(bias, sample, bias_step, index, sets, cols, mask, INDEXED, ACC)
            tl.store(dscale + at, (g * z).to(dscale.dtype.element_ty), mask=mask)
        summed = g
        if TOKEN_SCALE:
            summed = g * s
        if NEED_P:
            sum_p += tl.sum(summed * n, 0)[None, :]
        if NEED_Q:
            sum_q += tl.sum(summed, 0)[None, :]
        if NEED_X or NEED_BRANCH or GATE > 0:
            delta = g * w * s
            if ONE_TILE:
                mean_gn = tl.sum(delta * n, 1)[:, None] / columns
                mean_g = tl.sum(delta, 1)[:, None] / columns
            else:
                mean_gn = tl.load(sums + row.to(tl.int64) * 2, mask=inside, other=0.0)
                mean_g = tl.load(sums + row.to(tl.int64) * 2 + 1, mask=inside, other=0.0)
            delta -= n * mean_gn
            if CENTRED:
                delta -= mean_g
            delta *= r
            if HAS_DH:
                delta += tl.load(dh + at, mask=mask, other=0.0).to(ACC)
            if NEED_X:
                tl.store(dx + at, delta.to(dx.dtype.element_ty), mask=mask)
            if NEED_BRANCH:
                flow = delta
                if HAS_GATE:
                    flow = delta * parameter_of(
                        gate, sample, token, gate_sample, gate_token, cols, mask, ACC
                    )
                tl.store(dbranch + at, flow.to(dbranch.dtype.element_ty), mask=mask)
            if GATE > 0:
                e = delta * tl.load(branch + at, mask=mask, other=0.0).to(ACC)
                if GATE == 1:
                    sum_e += tl.sum(tl.where(mask, e, 0.0), 0)[None, :]
                else:
                    tl.store(dgate + at, e.to(dgate.dtype.element_ty), mask=mask)
    at = part.to(tl.int64) * columns + cols
    if NEED_P:
        tl.store(P + at, sum_p, mask=cols < columns)
    if NEED_Q:
        tl.store(Q + at, sum_q, mask=cols < columns)
    if GATE == 1:
        tl.store(E + at, sum_e, mask=cols < columns)


# ---- launchers ---------------------------------------------------------------------------------------


def _config(columns: int, tokens: int) -> dict:
    """Tile and warps by width: several narrow rows a program, never more than a sample has."""
    one_tile = columns <= WIDEST
    C = max(16, triton.next_power_of_2(columns)) if one_tile else TILE
    R = min(max(1, 512 // C), triton.next_power_of_2(max(tokens, 1)))
    warps = 2 if R * C <= 512 else (4 if R * C <= 1024 else (8 if R * C <= 2048 else 16))
    return {"R": R, "C": C, "num_warps": warps, "ONE_TILE": one_tile}


def _seen(x, *dims):
    """(samples, tokens, columns) of x; where no parameter tells samples apart, all rows are one sample's."""
    samples, columns = x.shape[0], x.shape[-1]
    tokens = x.shape[1] if x.dim() == 3 else 1
    return (samples, tokens, columns) if max(dims) > 1 else (1, samples * tokens, columns)


def _dim(p):
    return 0 if p is None else p.dim()


def ada_norm(x, branch, gate, scale, shift, weight, bias, index, eps, centred):
    x = x.contiguous()
    y = x.new_empty(x.shape)
    h = x.new_empty(x.shape if branch is not None else (0,))
    mean = x.new_empty(x.shape[:-1] if centred else (0,), dtype=accumulate_type(x))
    rstd = x.new_empty(x.shape[:-1], dtype=accumulate_type(x))
    if x.numel() == 0:
        return y, h, mean.zero_(), rstd.zero_()
    samples, tokens, columns = _seen(x, *map(_dim, (gate, scale, shift, weight, bias)))
    gate, gate_sample, gate_token = rows_of(gate)
    scale, scale_sample, scale_token = rows_of(scale)
    shift, shift_sample, shift_token = rows_of(shift)
    weight, weight_step, _ = rows_of(weight)
    bias, bias_step, _ = rows_of(bias)
    config = _config(columns, samples * tokens)
    or_x = lambda t: x if t is None else t
    with on_device_of(x):
        ada_norm_forward_kernel[(triton.cdiv(samples * tokens, config["R"]),)](
            x, x if branch is None else branch.contiguous(), or_x(gate), or_x(scale), or_x(shift),
            or_x(weight), or_x(bias), x if index is None else index.contiguous(), y, h, mean, rstd,
            gate_sample, gate_token, scale_sample, scale_token, shift_sample, shift_token, weight_step,
            bias_step, weight.shape[0] if index is not None else 1, samples * tokens, tokens, columns,
            eps, CENTRED=centred, HAS_BRANCH=branch is not None, HAS_GATE=gate is not None,
            HAS_SCALE=scale is not None, HAS_SHIFT=shift is not None, HAS_WEIGHT=weight is not None,
            HAS_BIAS=bias is not None, INDEXED=index is not None, ACC=accumulator(x), **config,
        )  # fmt: skip
    return y, h, mean, rstd


def ada_norm_backward(
    dy, dh, h, branch, gate, scale, weight, bias, index, mean, rstd, centred, shift_dim, needs
):
    need_x, need_branch, need_gate, need_scale, need_shift, need_weight, need_bias = needs
    dy, h = dy.contiguous(), h.contiguous()
    acc = accumulate_type(h)
    gate_dim, scale_dim = _dim(gate), _dim(scale)
    token_gate, token_scale = need_gate and gate_dim == 3, need_scale and scale_dim == 3
    dx = h.new_empty(h.shape if need_x else (0,))
    dbranch = h.new_empty(h.shape if need_branch else (0,))
    per_token = [
        h.new_empty(h.shape if need else (0,), dtype=h.dtype if p is not None and p.dtype == h.dtype else acc)
        for need, p in ((token_gate, gate), (token_scale, scale))
    ]  # fmt: skip
    samples, tokens, columns = _seen(h, gate_dim, scale_dim, shift_dim, _dim(weight), _dim(bias))
    group_scale = need_scale and not token_scale
    wanted = (need_gate and not token_gate, group_scale, need_shift, need_weight, need_bias)
    dims = (gate_dim, scale_dim, shift_dim, *(1 if index is None else 2,) * 2)
    sets = weight.shape[0] if index is not None else 1

    def finish(rows):
        small = [
            whole(r, dim, h, index, sets) if need else r for r, need, dim in zip(rows, wanted, dims)
        ]
        dgate = per_token[0] if token_gate else small[0]
        dscale = per_token[1] if token_scale else small[1]
        return dx, dbranch, dgate, dscale, *small[2:]

    rows = [h.new_empty((samples, columns) if need else (0,), dtype=acc) for need in wanted]
    if h.numel() == 0:
        return finish([r.zero_() for r in rows])
    gate, gate_sample, gate_token = rows_of(gate)
    scale, scale_sample, scale_token = rows_of(scale)
    weight, weight_step, _ = rows_of(weight)
    bias, bias_step, _ = rows_of(bias)
    index = None if index is None else index.contiguous()
    config = _config(columns, tokens)
    blocks = triton.cdiv(tokens, config["R"])
    steps = triton.cdiv(blocks, max(1, triton.cdiv(4 * processors(h), samples)))
    parts = triton.cdiv(blocks, steps)
    need_p = group_scale or need_weight
    need_q = need_shift or need_bias or (group_scale and bias is not None)
    P, Q, E = (
        h.new_empty((samples * parts, columns) if need else (0,), dtype=acc)
        for need in (need_p, need_q, wanted[0])
    )
    or_h = lambda t: h if t is None else t
    flags = {
        "CENTRED": centred, "HAS_SCALE": scale is not None, "HAS_WEIGHT": weight is not None,
        "INDEXED": index is not None, "ACC": accumulator(h),
    }  # fmt: skip
    wide = not config["ONE_TILE"] and (need_x or need_branch or need_gate)
    sums = h.new_empty((samples * tokens, 2) if wide else (0,), dtype=acc)
    with on_device_of(h):
        if wide:
            ada_norm_row_sums_kernel[(samples * tokens,)](
                dy, h, mean, rstd, or_h(scale), or_h(weight), or_h(index), sums, sets, scale_sample,
                scale_token, weight_step, samples * tokens, tokens, columns, C=4 * TILE, num_warps=8,
                **flags,
            )  # fmt: skip
        ada_norm_backward_kernel[(samples * parts, triton.cdiv(columns, config["C"]))](
            dy, h if dh is None else dh.contiguous(), h, h if branch is None else branch.contiguous(),
            or_h(gate), or_h(scale), or_h(weight), or_h(bias), or_h(index), mean, rstd, sums, dx,
            dbranch, *per_token, P, Q, E, gate_sample, gate_token, scale_sample, scale_token,
            weight_step, bias_step, sets, tokens, columns, parts, steps, HAS_DH=dh is not None,
            HAS_GATE=gate is not None, HAS_BIAS=bias is not None, NEED_X=need_x,
            NEED_BRANCH=need_branch, GATE=0 if not need_gate else (2 if token_gate else 1),
            TOKEN_SCALE=scale_dim == 3, NEED_TOKEN_SCALE=token_scale, NEED_P=need_p, NEED_Q=need_q,
            **flags, **config,
        )  # fmt: skip
        if any(wanted):
            ada_norm_finish_kernel[(triton.cdiv(columns, 128), samples)](
                P, Q, E, or_h(scale), or_h(weight), or_h(bias), or_h(index), *rows, scale_sample,
                weight_step, bias_step, sets, parts, columns, NEED_P=need_p, NEED_Q=need_q,
                NEED_GATE=wanted[0], NEED_SCALE=group_scale, NEED_SHIFT=need_shift,
                NEED_WEIGHT=need_weight, NEED_BIAS=need_bias, HAS_BIAS=bias is not None,
                HAS_SCALE=0 < scale_dim < 3, HAS_WEIGHT=weight is not None, INDEXED=index is not None,
                ACC=accumulator(h), C=128, num_warps=4,
            )  # fmt: skip
        return finish(rows)


# ---- ahead-of-time compilation -----------------------------------------------------------------------


def aot() -> Iterator:
    """The variants held to tests/budgets.json: narrow, wide and tiled rows, everything switched on."""
    from .._aot import AotCase

    half, acc = "*bf16", "*fp32"
    forms = {"HAS_SCALE": True, "HAS_WEIGHT": True, "INDEXED": False, "ACC": tl.float32}
    steps = dict.fromkeys(("gate_sample", "scale_sample"), "i32")
    zero_steps = {"gate_token": 0, "scale_token": 0, "weight_step": 0, "bias_step": 0}
    for columns in (128, 1024, 4096, 16384):
        config = _config(columns, 256)
        warps = config.pop("num_warps")
        yield AotCase(
            name=f"ada_norm_forward_{columns}",
            fn=ada_norm_forward_kernel,
            signature={
                **dict.fromkeys(("x", "branch", "gate", "scale", "shift", "y", "h_out"), half),
                **dict.fromkeys(("weight", "bias", "mean_out", "rstd_out"), acc), "index": "*i64", **steps,
                "shift_sample": "i32", "sets": "i32", "rows": "i32", "tokens": "i32", "columns": "i32",
                "eps": "fp32",
            },
            constexprs={
                **forms, **zero_steps, "shift_token": 0, "CENTRED": True, "HAS_BRANCH": True,
                "HAS_GATE": True, "HAS_SHIFT": True, "HAS_BIAS": True, **config,
            },
            divisible_by_16=(
                "x", "branch", "gate", "scale", "shift", "weight", "bias", "y", "h_out", *steps,
                "shift_sample", "columns",
            ),
            num_warps=warps,
        )  # fmt: skip
        yield AotCase(
            name=f"ada_norm_backward_{columns}",
            fn=ada_norm_backward_kernel,
            signature={
                **dict.fromkeys(("dy", "dh", "h", "branch", "gate", "scale", "dx", "dbranch"), half),
                **dict.fromkeys(("weight", "bias", "mean", "rstd", "sums", "dgate", "dscale"), acc),
                **dict.fromkeys(("P", "Q", "E"), acc), "index": "*i64", **steps, "sets": "i32",
                "tokens": "i32", "columns": "i32", "parts": "i32", "steps": "i32",
            },
            constexprs={
                **forms, **zero_steps, "CENTRED": True, "HAS_DH": True, "HAS_GATE": True,
                "HAS_BIAS": True, "NEED_X": True, "NEED_BRANCH": True, "GATE": 1, "TOKEN_SCALE": False,
                "NEED_TOKEN_SCALE": False, "NEED_P": True, "NEED_Q": True, **config,
            },
            divisible_by_16=(
                "dy", "dh", "h", "branch", "gate", "scale", "weight", "bias", "dx", "dbranch", "P", "Q",
                "E", *steps, "columns",
            ),
            num_warps=warps,
        )  # fmt: skip
    yield AotCase(
        name="ada_norm_row_sums",
        fn=ada_norm_row_sums_kernel,
        signature={
            "dy": half, "h": half, "scale": half, "mean": acc, "rstd": acc, "weight": acc, "sums": acc,
            "index": "*i64", "sets": "i32", "scale_sample": "i32", "rows": "i32", "tokens": "i32",
            "columns": "i32",
        },
        constexprs={**forms, "scale_token": 0, "weight_step": 0, "CENTRED": True, "C": 4 * TILE},
        divisible_by_16=("dy", "h", "scale", "weight", "scale_sample", "columns"),
        num_warps=8,
    )  # fmt: skip
    small = ("P", "Q", "E", "weight", "bias", "dgate", "dscale", "dshift", "dweight", "dbias")
    needs = (
        "NEED_P",
        "NEED_Q",
        "NEED_GATE",
        "NEED_SCALE",
        "NEED_SHIFT",
        "NEED_WEIGHT",
        "NEED_BIAS",
    )
    yield AotCase(
        name="ada_norm_finish",
        fn=ada_norm_finish_kernel,
        signature={
            **dict.fromkeys(small, acc), "scale": half, "index": "*i64", "scale_step": "i32",
            "sets": "i32", "parts": "i32", "columns": "i32",
        },
        constexprs={
            **forms, **dict.fromkeys(needs, True), "HAS_BIAS": True, "weight_step": 0, "bias_step": 0,
            "C": 128,
        },
        divisible_by_16=(*small, "scale", "scale_step", "columns"),
    )  # fmt: skip
    yield AotCase(
        name="ada_norm_segments",
        fn=ada_norm_segments_kernel,
        signature={
            "values": acc, "order": "*i64", "starts": "*i64", "out": acc, "columns": "i32",
        },
        constexprs={"C": 128},
        divisible_by_16=("values", "out", "columns"),
    )  # fmt: skip
