"""GPU kernels of core `row_norm`: the formulas are in solera/norm/row_norm.py.

Bytes a row of D elements: forward reads x and writes y; backward reads u and dy and writes du; plus
2 * processors * D floats of weight-gradient partials, under 2% of the rest. Rows up to 8192 wide stay in
registers, so memory sees each byte once. Wider rows are walked in tiles: what a forward re-reads comes from
L2, and backward reads u and dy twice from memory (once for du, once for the weight gradient).

H200 at 4.3 TB/s, bf16, 32768 x 4096: forward 125 us, backward 189 us are the floors.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl

from .._launch import accumulate_type, accumulator, on_device_of, processors

WIDEST = 8192  # columns kept in registers
TILE = 4096  # columns a step for wider rows


@triton.jit
def _tile(x, row, cols, rows, columns):
    """Addresses and mask of a tile: row [R, 1], cols [1, C]."""
    return x + row.to(tl.int64) * columns + cols, (row < rows) & (cols < columns)


@triton.jit
def _sum_of(
    x, residual, row, cols, rows, columns, alpha, HAS_RESIDUAL: tl.constexpr, ACC: tl.constexpr
):
    """x + alpha * residual rounded to x's dtype, as the unfused sum is; 0 outside the row."""
    at, mask = _tile(x, row, cols, rows, columns)
    u = tl.load(at, mask=mask, other=0.0).to(ACC)
    if HAS_RESIDUAL:
        at, mask = _tile(residual, row, cols, rows, columns)
        u += alpha * tl.load(at, mask=mask, other=0.0).to(ACC)
        u = u.to(x.dtype.element_ty).to(ACC)
    return u


@triton.jit
def _affine(n, weight, bias, offset, cols, columns, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
            ACC: tl.constexpr):  # fmt: skip
    if HAS_WEIGHT:
        n *= tl.load(weight + cols, mask=cols < columns, other=0.0).to(ACC) + offset
    if HAS_BIAS:
        n += tl.load(bias + cols, mask=cols < columns, other=0.0).to(ACC)
    return n


@triton.jit
def row_norm_forward_kernel(
    x, residual, weight, bias, y, u_out, mean_out, rstd_out, rows, columns, eps, alpha, offset,
    CENTRED: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    STATS: tl.constexpr, ACC: tl.constexpr, R: tl.constexpr, C: tl.constexpr, ONE_TILE: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * R + tl.arange(0, R))[:, None]  # [R, 1]
    lane = tl.arange(0, C)[None, :]  # [1, C]
    mean = tl.zeros((R, 1), ACC)
    square = tl.zeros((R, 1), ACC)
    if ONE_TILE:
        u = _sum_of(x, residual, row, lane, rows, columns, alpha, HAS_RESIDUAL, ACC)
        if CENTRED:
            mean = tl.sum(u, 1)[:, None] / columns
        d = tl.where(lane < columns, u - mean, 0.0)
        square = tl.sum(d * d, 1)[:, None]
    else:
        if CENTRED:
            total = tl.zeros((R, C), ACC)
            for j in range(0, columns, C):
                total += _sum_of(
                    x, residual, row, j + lane, rows, columns, alpha, HAS_RESIDUAL, ACC
                )
            mean = tl.sum(total, 1)[:, None] / columns
        squares = tl.zeros((R, C), ACC)
        for j in range(0, columns, C):
            u = _sum_of(x, residual, row, j + lane, rows, columns, alpha, HAS_RESIDUAL, ACC)
            d = tl.where(j + lane < columns, u - mean, 0.0)
            squares += d * d
        square = tl.sum(squares, 1)[:, None]
    rstd = 1.0 / tl.sqrt(square / columns + eps)
    if STATS:
        one = tl.arange(0, 1)[None, :]
        if CENTRED:
            tl.store(mean_out + row + one, mean, mask=row < rows)
        tl.store(rstd_out + row + one, rstd, mask=row < rows)
    if ONE_TILE:
        at, mask = _tile(y, row, lane, rows, columns)
        n = _affine(d * rstd, weight, bias, offset, lane, columns, HAS_WEIGHT, HAS_BIAS, ACC)
        tl.store(at, n.to(y.dtype.element_ty), mask=mask)
        if HAS_RESIDUAL:
            at, mask = _tile(u_out, row, lane, rows, columns)
            tl.store(at, u.to(y.dtype.element_ty), mask=mask)
    else:
        for j in range(0, columns, C):
            cols = j + lane
            u = _sum_of(x, residual, row, cols, rows, columns, alpha, HAS_RESIDUAL, ACC)
            n = _affine(
                (u - mean) * rstd, weight, bias, offset, cols, columns, HAS_WEIGHT, HAS_BIAS, ACC
            )
            at, mask = _tile(y, row, cols, rows, columns)
            tl.store(at, n.to(y.dtype.element_ty), mask=mask)
            if HAS_RESIDUAL:
                at, mask = _tile(u_out, row, cols, rows, columns)
                tl.store(at, u.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _normal(u, mean, rstd, row, cols, rows, columns, CENTRED: tl.constexpr, ACC: tl.constexpr):
    """(u - mean) * rstd and rstd for a tile; rows past the end give rstd = 0, hence no gradient."""
    at, mask = _tile(u, row, cols, rows, columns)
    n = tl.load(at, mask=mask, other=0.0).to(ACC)
    r = tl.load(rstd + row, mask=row < rows, other=0.0)
    if CENTRED:
        n = tl.where(mask, n - tl.load(mean + row, mask=row < rows, other=0.0), 0.0)
    return n * r, r


@triton.jit
def _incoming(
    dy, weight, offset, row, cols, rows, columns, HAS_WEIGHT: tl.constexpr, ACC: tl.constexpr
):
    """dy and h = dy * w for a tile."""
    at, mask = _tile(dy, row, cols, rows, columns)
    g = tl.load(at, mask=mask, other=0.0).to(ACC)
    h = g
    if HAS_WEIGHT:
        h = g * (tl.load(weight + cols, mask=cols < columns, other=0.0).to(ACC) + offset)
    return g, h


@triton.jit
def _store_du(dx, du, value, row, cols, rows, columns, HAS_DU: tl.constexpr, ACC: tl.constexpr):
    if HAS_DU:
        at, mask = _tile(du, row, cols, rows, columns)
        value += tl.load(at, mask=mask, other=0.0).to(ACC)
    at, mask = _tile(dx, row, cols, rows, columns)
    tl.store(at, value.to(dx.dtype.element_ty), mask=mask)


@triton.jit
def row_norm_backward_kernel(
    dy, du, u, weight, mean, rstd, dx, dweight, dbias, rows, columns, offset, steps,
    CENTRED: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_DU: tl.constexpr, NEED_X: tl.constexpr,
    NEED_WEIGHT: tl.constexpr, NEED_BIAS: tl.constexpr, ACC: tl.constexpr, R: tl.constexpr,
    C: tl.constexpr,
):  # fmt: skip
    """Rows in one tile. A program walks `steps` blocks of R rows and keeps its share of dw, db in registers."""
    program = tl.program_id(0)
    cols = tl.arange(0, C)[None, :]  # [1, C]
    dw = tl.zeros((1, C), ACC)
    db = tl.zeros((1, C), ACC)
    for i in range(steps):
        row = ((program * steps + i) * R + tl.arange(0, R))[:, None]  # [R, 1]
        n, r = _normal(u, mean, rstd, row, cols, rows, columns, CENTRED, ACC)
        g, h = _incoming(dy, weight, offset, row, cols, rows, columns, HAS_WEIGHT, ACC)
        if NEED_WEIGHT:
            dw += tl.sum(g * n, 0)[None, :]
        if NEED_BIAS:
            db += tl.sum(g, 0)[None, :]
        if NEED_X:
            value = h - n * (tl.sum(h * n, 1)[:, None] / columns)
            if CENTRED:
                value -= tl.sum(h, 1)[:, None] / columns
            _store_du(dx, du, value * r, row, cols, rows, columns, HAS_DU, ACC)
    at = program.to(tl.int64) * columns + cols
    if NEED_WEIGHT:
        tl.store(dweight + at, dw, mask=cols < columns)
    if NEED_BIAS:
        tl.store(dbias + at, db, mask=cols < columns)


@triton.jit
def row_norm_backward_wide_kernel(
    dy, du, u, weight, mean, rstd, dx, rows, columns, offset,
    CENTRED: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_DU: tl.constexpr, ACC: tl.constexpr,
    C: tl.constexpr,
):  # fmt: skip
    """dx of one row wider than a tile: its two sums, then the row again."""
    row = tl.program_id(0) + tl.zeros((1, 1), tl.int32)
    lane = tl.arange(0, C)[None, :]
    sum_h = tl.zeros((1, C), ACC)
    sum_hn = tl.zeros((1, C), ACC)
    for j in range(0, columns, C):
        n, r = _normal(u, mean, rstd, row, j + lane, rows, columns, CENTRED, ACC)
        g, h = _incoming(dy, weight, offset, row, j + lane, rows, columns, HAS_WEIGHT, ACC)
        sum_h += h
        sum_hn += h * n
    mean_hn = tl.sum(sum_hn, 1)[:, None] / columns
    mean_h = tl.sum(sum_h, 1)[:, None] / columns
    for j in range(0, columns, C):
        n, r = _normal(u, mean, rstd, row, j + lane, rows, columns, CENTRED, ACC)
        g, h = _incoming(dy, weight, offset, row, j + lane, rows, columns, HAS_WEIGHT, ACC)
        value = h - n * mean_hn
        if CENTRED:
            value -= mean_h
        _store_du(dx, du, value * r, row, j + lane, rows, columns, HAS_DU, ACC)


@triton.jit
def row_norm_parameters_wide_kernel(
    dy, u, mean, rstd, dweight, dbias, rows, columns, steps,
    CENTRED: tl.constexpr, NEED_WEIGHT: tl.constexpr, NEED_BIAS: tl.constexpr, ACC: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """dw and db of a column tile over `steps` blocks of R rows, for rows wider than a tile."""
    program = tl.program_id(0)
    cols = (tl.program_id(1) * C + tl.arange(0, C))[None, :]
    dw = tl.zeros((1, C), ACC)
    db = tl.zeros((1, C), ACC)
    for i in range(steps):
        row = ((program * steps + i) * R + tl.arange(0, R))[:, None]
        n, r = _normal(u, mean, rstd, row, cols, rows, columns, CENTRED, ACC)
        g, h = _incoming(dy, u, 0.0, row, cols, rows, columns, False, ACC)
        dw += tl.sum(g * n, 0)[None, :]
        db += tl.sum(g, 0)[None, :]
    at = program.to(tl.int64) * columns + cols
    if NEED_WEIGHT:
        tl.store(dweight + at, dw, mask=cols < columns)
    if NEED_BIAS:
        tl.store(dbias + at, db, mask=cols < columns)


@triton.jit
def sum_partials_kernel(partial, out, parts, columns, C: tl.constexpr):
    """out[j] = sum over parts of partial[part, j], in order."""
    cols = tl.program_id(0) * C + tl.arange(0, C)
    total = tl.zeros((C,), partial.dtype.element_ty)
    at = partial + cols
    for _ in range(parts):
        total += tl.load(at, mask=cols < columns, other=0.0)
        at += columns
    tl.store(out + cols, total, mask=cols < columns)


# ---- launchers ---------------------------------------------------------------------------------------


def _config(columns: int) -> dict[str, int]:
    """Tile and warps by width: about 16 to 32 elements a thread, several narrow rows a program."""
    C = max(16, triton.next_power_of_2(columns)) if columns <= WIDEST else TILE
    R = max(1, 512 // C)
    warps = 4 if R * C <= 2048 else (8 if R * C <= 4096 else 16)
    return {"R": R, "C": C, "num_warps": warps}


def _forward(x, residual, weight, bias, eps, residual_scale, weight_offset, centred, stats):
    x = x.contiguous()
    columns = x.shape[-1]
    rows = x.numel() // max(columns, 1)
    y = x.new_empty(x.shape)
    u = x.new_empty(x.shape if residual is not None else (0,))
    kept = x.shape[:-1] if stats else (0,)
    mean = x.new_empty(kept if centred else (0,), dtype=accumulate_type(x))
    rstd = x.new_empty(kept, dtype=accumulate_type(x))
    if x.numel() == 0:
        return y, u, mean, rstd
    config = _config(columns)
    residual = x if residual is None else residual.contiguous()
    with on_device_of(x):
        row_norm_forward_kernel[(triton.cdiv(rows, config["R"]),)](
            x, residual, x if weight is None else weight.contiguous(),
            x if bias is None else bias.contiguous(), y, u, mean, rstd, rows, columns, eps,
            residual_scale, weight_offset, CENTRED=centred, HAS_RESIDUAL=u.numel() > 0,
            HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None, STATS=stats, ACC=accumulator(x),
            ONE_TILE=columns <= WIDEST, **config,
        )  # fmt: skip
    return y, u, mean, rstd


def row_norm(x, weight, bias, eps, weight_offset, centred):
    return _forward(x, None, weight, bias, eps, 1.0, weight_offset, centred, False)[0]


def row_norm_stats(x, residual, weight, bias, eps, residual_scale, weight_offset, centred):
    return _forward(x, residual, weight, bias, eps, residual_scale, weight_offset, centred, True)


def row_norm_backward(
    dy, du, u, weight, mean, rstd, weight_offset, centred, need_x, need_weight, need_bias
):
    dy, u = dy.contiguous(), u.contiguous()
    columns = u.shape[-1]
    rows = u.numel() // max(columns, 1)
    acc = accumulate_type(u)
    dx = u.new_empty(u.shape if need_x else (0,))
    if u.numel() == 0:
        zeros = [
            u.new_zeros((columns,) if n else (0,), dtype=acc) for n in (need_weight, need_bias)
        ]
        return dx, *zeros
    config = _config(columns)
    blocks = triton.cdiv(rows, config["R"])
    steps = triton.cdiv(blocks, 2 * processors(u))
    parts = triton.cdiv(blocks, steps)
    dweight = u.new_empty((parts, columns) if need_weight else (0,), dtype=acc)
    dbias = u.new_empty((parts, columns) if need_bias else (0,), dtype=acc)
    flow = u if du is None else du.contiguous()
    w = u if weight is None else weight.contiguous()
    flags = {"CENTRED": centred, "ACC": accumulator(u)}
    with on_device_of(u):
        if columns <= WIDEST:
            row_norm_backward_kernel[(parts,)](
                dy, flow, u, w, mean, rstd, dx, dweight, dbias, rows, columns, weight_offset, steps,
                HAS_WEIGHT=weight is not None, HAS_DU=du is not None, NEED_X=need_x,
                NEED_WEIGHT=need_weight, NEED_BIAS=need_bias, **flags, **config,
            )  # fmt: skip
        else:
            if need_x:
                row_norm_backward_wide_kernel[(rows,)](
                    dy, flow, u, w, mean, rstd, dx, rows, columns, weight_offset,
                    HAS_WEIGHT=weight is not None, HAS_DU=du is not None, C=TILE,
                    num_warps=8, **flags,
                )  # fmt: skip
            if need_weight or need_bias:
                row_norm_parameters_wide_kernel[(parts, triton.cdiv(columns, 512))](
                    dy, u, mean, rstd, dweight, dbias, rows, columns, steps,
                    NEED_WEIGHT=need_weight, NEED_BIAS=need_bias, R=1, C=512, num_warps=4, **flags,
                )  # fmt: skip
        sums = []
        for partial in (dweight, dbias):
            total = u.new_empty((columns,) if partial.numel() else (0,), dtype=acc)
            if partial.numel():
                sum_partials_kernel[(triton.cdiv(columns, 128),)](
                    partial, total, parts, columns, C=128, num_warps=4
                )
            sums.append(total)
    return dx, *sums


# ---- ahead-of-time compilation -----------------------------------------------------------------------


def aot() -> Iterator:
    """The variants held to tests/budgets.json: narrow, wide and tiled rows, everything switched on."""
    from .._aot import AotCase

    half, acc = "*bf16", "*fp32"
    for columns in (128, 4096, 8192, 16384):
        config = _config(columns)
        one = columns <= WIDEST
        warps = config.pop("num_warps")
        flags = {"CENTRED": True, "HAS_RESIDUAL": True, "HAS_WEIGHT": True, "HAS_BIAS": True}
        yield AotCase(
            name=f"row_norm_forward_{columns}",
            fn=row_norm_forward_kernel,
            signature={
                "x": half, "residual": half, "weight": acc, "bias": acc, "y": half, "u_out": half,
                "mean_out": acc, "rstd_out": acc, "rows": "i32", "columns": "i32", "eps": "fp32",
                "alpha": "fp32", "offset": "fp32",
            },
            constexprs={**flags, "STATS": True, "ACC": tl.float32, "ONE_TILE": one, **config},
            divisible_by_16=("x", "residual", "weight", "bias", "y", "u_out", "mean_out", "rstd_out", "columns"),
            num_warps=warps,
        )  # fmt: skip
        needs = {"NEED_X": True, "NEED_WEIGHT": True, "NEED_BIAS": True}
        pointers = {
            "dy": half,
            "du": half,
            "u": half,
            "weight": acc,
            "mean": acc,
            "rstd": acc,
            "dx": half,
        }
        if one:
            yield AotCase(
                name=f"row_norm_backward_{columns}",
                fn=row_norm_backward_kernel,
                signature={
                    **pointers, "dweight": acc, "dbias": acc, "rows": "i32", "columns": "i32",
                    "offset": "fp32", "steps": "i32",
                },
                constexprs={
                    "CENTRED": True, "HAS_WEIGHT": True, "HAS_DU": True, **needs, "ACC": tl.float32, **config,
                },
                divisible_by_16=(*pointers, "dweight", "dbias", "columns"),
                num_warps=warps,
            )  # fmt: skip
        else:
            yield AotCase(
                name="row_norm_backward_wide",
                fn=row_norm_backward_wide_kernel,
                signature={**pointers, "rows": "i32", "columns": "i32", "offset": "fp32"},
                constexprs={"CENTRED": True, "HAS_WEIGHT": True, "HAS_DU": True, "ACC": tl.float32, "C": TILE},
                divisible_by_16=(*pointers, "columns"),
                num_warps=8,
            )  # fmt: skip
            yield AotCase(
                name="row_norm_parameters_wide",
                fn=row_norm_parameters_wide_kernel,
                signature={
                    "dy": half, "u": half, "mean": acc, "rstd": acc, "dweight": acc, "dbias": acc,
                    "rows": "i32", "columns": "i32", "steps": "i32",
                },
                constexprs={
                    "CENTRED": True, "NEED_WEIGHT": True, "NEED_BIAS": True, "ACC": tl.float32, "R": 1, "C": 512,
                },
                divisible_by_16=("dy", "u", "dweight", "dbias", "columns"),
                num_warps=4,
            )  # fmt: skip
    yield AotCase(
        name="row_norm_sum_partials",
        fn=sum_partials_kernel,
        signature={"partial": acc, "out": acc, "parts": "i32", "columns": "i32"},
        constexprs={"C": 128},
        divisible_by_16=("partial", "out", "columns"),
        num_warps=4,
    )
