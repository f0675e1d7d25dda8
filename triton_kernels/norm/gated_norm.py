"""GPU kernels of core `gated_norm`: the formulas are in solera/norm/gated_norm.py.

Bytes a row of D elements: forward reads x and gate and writes y; backward reads dy, x and gate and writes dx and
dgate; plus 2 * processors * D floats of weight-gradient partials. A group up to 4096 wide stays in registers. Wider
ones are walked in tiles: a forward re-reads from L2, backward reads its operands twice from memory, and once more for
the weight gradient.

H200 at 4.3 TB/s, bf16, 32768 x 4096: forward 187 us, backward 312 us are the floors.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl

from .._activation import activate, slope
from .._launch import accumulate_type, accumulator, on_device_of, processors
from .row_norm import sum_partials_kernel

WIDEST = 4096  # columns of a group kept in registers
TILE = 2048  # columns a step for wider groups


@triton.jit
def _rows(x, step, row, first, cols, ACC: tl.constexpr, rows, columns):
    """A tile of a tensor whose rows are `step` elements apart: row [R, 1], cols [1, C]."""
    mask = (row < rows) & (cols < columns)
    return tl.load(x + row.to(tl.int64) * step + first + cols, mask=mask, other=0.0).to(ACC)


@triton.jit
def _columns(weight, first, cols, columns, ACC: tl.constexpr):
    return tl.load(weight + first + cols, mask=cols < columns, other=0.0).to(ACC)


@triton.jit
def _value(x, gate, x_step, gate_step, row, first, cols, rows, columns, ACT: tl.constexpr,
           NORM_FIRST: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """What is normalised (x, or x * act(gate)) and act(gate)."""
    a = activate(_rows(gate, gate_step, row, first, cols, ACC, rows, columns), ACT)
    v = _rows(x, x_step, row, first, cols, ACC, rows, columns)
    if not NORM_FIRST:
        v = tl.where(cols < columns, v * a, 0.0)
    return v, a


@triton.jit
def _affine(n, a, weight, bias, first, cols, columns, HAS_WEIGHT: tl.constexpr,
            HAS_BIAS: tl.constexpr, NORM_FIRST: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    if HAS_WEIGHT:
        n *= _columns(weight, first, cols, columns, ACC)
    if HAS_BIAS:
        n += _columns(bias, first, cols, columns, ACC)
    if NORM_FIRST:
        n *= a
    return n


@triton.jit
def gated_norm_forward_kernel(
    x, gate, weight, bias, y, rstd_out, x_step, gate_step, rows, columns, groups, eps,
    ACT: tl.constexpr, NORM_FIRST: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    ACC: tl.constexpr, R: tl.constexpr, C: tl.constexpr, ONE_TILE: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * R + tl.arange(0, R))[:, None]  # [R, 1]
    group = tl.program_id(1)
    first = group * columns
    lane = tl.arange(0, C)[None, :]  # [1, C]
    if ONE_TILE:
        v, a = _value(
            x, gate, x_step, gate_step, row, first, lane, rows, columns, ACT, NORM_FIRST, ACC
        )
        square = tl.sum(v * v, 1)[:, None]
    else:
        squares = tl.zeros((R, C), ACC)
        for j in range(0, columns, C):
            v, a = _value(
                x, gate, x_step, gate_step, row, first, j + lane, rows, columns, ACT, NORM_FIRST, ACC
            )  # fmt: skip
            squares += v * v
        square = tl.sum(squares, 1)[:, None]
    rstd = 1.0 / tl.sqrt(square / columns + eps)
    one = tl.arange(0, 1)[None, :]
    tl.store(rstd_out + row.to(tl.int64) * groups + group + one, rstd, mask=row < rows)
    out = y + row.to(tl.int64) * groups * columns + first
    if ONE_TILE:
        m = _affine(
            v * rstd, a, weight, bias, first, lane, columns, HAS_WEIGHT, HAS_BIAS, NORM_FIRST, ACC
        )
        mask = (row < rows) & (lane < columns)
        tl.store(out + lane, m.to(y.dtype.element_ty), mask=mask)
    else:
        for j in range(0, columns, C):
            cols = j + lane
            v, a = _value(
                x, gate, x_step, gate_step, row, first, cols, rows, columns, ACT, NORM_FIRST, ACC
            )
            m = _affine(
                v * rstd, a, weight, bias, first, cols, columns, HAS_WEIGHT, HAS_BIAS, NORM_FIRST, ACC
            )  # fmt: skip
            mask = (row < rows) & (cols < columns)
            tl.store(out + cols, m.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _incoming(
    dy, x, gate, weight, rstd, dy_step, x_step, gate_step, row, group, cols, rows, columns, groups,
    ACT: tl.constexpr, NORM_FIRST: tl.constexpr, HAS_WEIGHT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dy, x, act(gate), n, the weight gradient's e and h = e * w; zero outside."""
    first = group * columns
    g = _rows(dy, dy_step, row, first, cols, ACC, rows, columns)
    v = _rows(x, x_step, row, first, cols, ACC, rows, columns)
    a = activate(_rows(gate, gate_step, row, first, cols, ACC, rows, columns), ACT)
    r = tl.load(rstd + row.to(tl.int64) * groups + group, mask=row < rows, other=0.0)
    n = v * r
    e = g
    if NORM_FIRST:
        e = g * a
    else:
        n *= a
    h = e
    if HAS_WEIGHT:
        h = e * _columns(weight, first, cols, columns, ACC)
    return g, v, a, n, e, h, r


@triton.jit
def _store_gradients(
    dx, dgate, gate, bias, weight, g, v, a, n, h, r, share, gate_step, row, group, cols, rows,
    columns, groups, ACT: tl.constexpr, NORM_FIRST: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr, NEED_X: tl.constexpr, NEED_GATE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    first = group * columns
    mask = (row < rows) & (cols < columns)
    at = row.to(tl.int64) * groups * columns + first + cols
    dv = (h - n * share) * r
    if NEED_X:
        value = dv
        if not NORM_FIRST:
            value = dv * a
        tl.store(dx + at, value.to(dx.dtype.element_ty), mask=mask)
    if NEED_GATE:
        flow = dv * v
        if NORM_FIRST:
            m = n
            if HAS_WEIGHT:
                m = n * _columns(weight, first, cols, columns, ACC)
            if HAS_BIAS:
                m += _columns(bias, first, cols, columns, ACC)
            flow = g * m
        z = _rows(gate, gate_step, row, first, cols, ACC, rows, columns)
        tl.store(dgate + at, slope(flow, z, ACT).to(dgate.dtype.element_ty), mask=mask)


@triton.jit
def gated_norm_backward_kernel(
    dy, x, gate, weight, bias, rstd, dx, dgate, dweight, dbias, dy_step, x_step, gate_step, rows,
    columns, groups, steps, ACT: tl.constexpr, NORM_FIRST: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr, NEED_X: tl.constexpr, NEED_GATE: tl.constexpr,
    NEED_WEIGHT: tl.constexpr, NEED_BIAS: tl.constexpr, ACC: tl.constexpr, R: tl.constexpr,
    C: tl.constexpr,
):  # fmt: skip
    """Groups in one tile. A program walks `steps` blocks of R rows and keeps its share of dw, db in registers."""
    program = tl.program_id(0)
    group = tl.program_id(1)
    cols = tl.arange(0, C)[None, :]  # [1, C]
    dw = tl.zeros((1, C), ACC)
    db = tl.zeros((1, C), ACC)
    for i in range(steps):
        row = ((program * steps + i) * R + tl.arange(0, R))[:, None]  # [R, 1]
        g, v, a, n, e, h, r = _incoming(
            dy, x, gate, weight, rstd, dy_step, x_step, gate_step, row, group, cols, rows, columns,
            groups, ACT, NORM_FIRST, HAS_WEIGHT, ACC,
        )  # fmt: skip
        if NEED_WEIGHT:
            dw += tl.sum(e * n, 0)[None, :]
        if NEED_BIAS:
            db += tl.sum(e, 0)[None, :]
        share = tl.sum(h * n, 1)[:, None] / columns
        _store_gradients(
            dx, dgate, gate, bias, weight, g, v, a, n, h, r, share, gate_step, row, group, cols, rows,
            columns, groups, ACT, NORM_FIRST, HAS_WEIGHT, HAS_BIAS, NEED_X, NEED_GATE, ACC,
        )  # fmt: skip
    at = (program.to(tl.int64) * groups + group) * columns + cols
    if NEED_WEIGHT:
        tl.store(dweight + at, dw, mask=cols < columns)
    if NEED_BIAS:
        tl.store(dbias + at, db, mask=cols < columns)


@triton.jit
def gated_norm_backward_wide_kernel(
    dy, x, gate, weight, bias, rstd, dx, dgate, dy_step, x_step, gate_step, rows, columns, groups,
    ACT: tl.constexpr, NORM_FIRST: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    NEED_X: tl.constexpr, NEED_GATE: tl.constexpr, ACC: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """dx and dgate of one group wider than a tile: its sum, then the group again."""
    row = tl.program_id(0) + tl.zeros((1, 1), tl.int32)
    group = tl.program_id(1)
    lane = tl.arange(0, C)[None, :]
    total = tl.zeros((1, C), ACC)
    for j in range(0, columns, C):
        g, v, a, n, e, h, r = _incoming(
            dy, x, gate, weight, rstd, dy_step, x_step, gate_step, row, group, j + lane, rows,
            columns, groups, ACT, NORM_FIRST, HAS_WEIGHT, ACC,
        )  # fmt: skip
        total += h * n
    share = tl.sum(total, 1)[:, None] / columns
    for j in range(0, columns, C):
        g, v, a, n, e, h, r = _incoming(
            dy, x, gate, weight, rstd, dy_step, x_step, gate_step, row, group, j + lane, rows,
            columns, groups, ACT, NORM_FIRST, HAS_WEIGHT, ACC,
        )  # fmt: skip
        _store_gradients(
            dx, dgate, gate, bias, weight, g, v, a, n, h, r, share, gate_step, row, group, j + lane,
            rows, columns, groups, ACT, NORM_FIRST, HAS_WEIGHT, HAS_BIAS, NEED_X, NEED_GATE, ACC,
        )  # fmt: skip


@triton.jit
def gated_norm_parameters_wide_kernel(
    dy, x, gate, rstd, dweight, dbias, dy_step, x_step, gate_step, rows, columns, groups, steps,
    ACT: tl.constexpr, NORM_FIRST: tl.constexpr, NEED_WEIGHT: tl.constexpr, NEED_BIAS: tl.constexpr,
    ACC: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """dw and db of a column tile over `steps` rows, for groups wider than a tile."""
    program = tl.program_id(0)
    group = tl.program_id(1)
    cols = (tl.program_id(2) * C + tl.arange(0, C))[None, :]
    dw = tl.zeros((1, C), ACC)
    db = tl.zeros((1, C), ACC)
    for i in range(steps):
        row = program * steps + i + tl.zeros((1, 1), tl.int32)
        g, v, a, n, e, h, r = _incoming(
            dy, x, gate, x, rstd, dy_step, x_step, gate_step, row, group, cols, rows, columns, groups,
            ACT, NORM_FIRST, False, ACC,
        )  # fmt: skip
        dw += e * n
        db += e
    at = (program.to(tl.int64) * groups + group) * columns + cols
    if NEED_WEIGHT:
        tl.store(dweight + at, dw, mask=cols < columns)
    if NEED_BIAS:
        tl.store(dbias + at, db, mask=cols < columns)


# ---- launchers ---------------------------------------------------------------------------------------


def _config(columns: int) -> dict[str, int]:
    """Tile and warps by the width of a group: 8 to 16 elements a thread, several narrow groups a program."""
    C = max(16, triton.next_power_of_2(columns)) if columns <= WIDEST else TILE
    R = max(1, 512 // C)
    warps = 4 if R * C <= 1024 else (8 if R * C <= 2048 else 16)
    return {"R": R, "C": C, "num_warps": warps}


def _as_rows(x):
    """x as (rows, D) whatever its row stride: a view where the leading dimensions merge, else a copy."""
    columns = x.shape[-1]
    rows = x.numel() // max(columns, 1)
    try:
        flat = x.view(rows, columns)
    except RuntimeError:
        flat = x.contiguous().view(rows, columns)
    return flat if flat.stride(-1) == 1 or columns < 2 else flat.contiguous()


def gated_norm(x, gate, weight, bias, eps, activation, norm_first, groups):
    width = x.shape[-1]
    columns = width // groups
    y = x.new_empty(x.shape)
    rstd = x.new_empty((*x.shape[:-1], groups), dtype=accumulate_type(x))
    if x.numel() == 0:
        return y, rstd
    flat, z = _as_rows(x), _as_rows(gate)
    rows = flat.shape[0]
    config = _config(columns)
    with on_device_of(x):
        gated_norm_forward_kernel[(triton.cdiv(rows, config["R"]), groups)](
            flat, z, x if weight is None else weight.contiguous(),
            x if bias is None else bias.contiguous(), y, rstd, flat.stride(0), z.stride(0), rows,
            columns, groups, eps, ACT=activation, NORM_FIRST=norm_first,
            HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None, ACC=accumulator(x),
            ONE_TILE=columns <= WIDEST, **config,
        )  # fmt: skip
    return y, rstd


def gated_norm_backward(
    dy, x, gate, weight, bias, rstd, activation, norm_first, need_x, need_gate, need_weight, need_bias
):  # fmt: skip
    width, groups = x.shape[-1], rstd.shape[-1]
    columns = width // groups
    acc = accumulate_type(x)
    dx = x.new_empty(x.shape if need_x else (0,))
    dgate = x.new_empty(x.shape if need_gate else (0,))
    needs = (need_weight, need_bias)
    if x.numel() == 0:
        return dx, dgate, *[x.new_zeros((width,) if need else (0,), dtype=acc) for need in needs]
    g, flat, z = _as_rows(dy), _as_rows(x), _as_rows(gate)
    rows = flat.shape[0]
    config = _config(columns)
    blocks = triton.cdiv(rows, config["R"])
    steps = triton.cdiv(blocks, max(1, 2 * processors(x) // groups))
    parts = triton.cdiv(blocks, steps)
    dweight, dbias = (x.new_empty((parts, width) if need else (0,), dtype=acc) for need in needs)
    w = x if weight is None else weight.contiguous()
    b = x if bias is None else bias.contiguous()
    rstd = rstd.contiguous()
    strides = (g.stride(0), flat.stride(0), z.stride(0))
    flags = {"ACT": activation, "NORM_FIRST": norm_first, "ACC": accumulator(x)}
    both = {
        "HAS_WEIGHT": weight is not None, "HAS_BIAS": bias is not None,
        "NEED_X": need_x, "NEED_GATE": need_gate,
    }  # fmt: skip
    with on_device_of(x):
        if columns <= WIDEST:
            gated_norm_backward_kernel[(parts, groups)](
                g, flat, z, w, b, rstd, dx, dgate, dweight, dbias, *strides, rows, columns, groups,
                steps, NEED_WEIGHT=need_weight, NEED_BIAS=need_bias, **both, **flags, **config,
            )  # fmt: skip
        else:
            if need_x or need_gate:
                gated_norm_backward_wide_kernel[(rows, groups)](
                    g, flat, z, w, b, rstd, dx, dgate, *strides, rows, columns, groups, C=TILE,
                    num_warps=8, **both, **flags,
                )  # fmt: skip
            if need_weight or need_bias:
                gated_norm_parameters_wide_kernel[(parts, groups, triton.cdiv(columns, 512))](
                    g, flat, z, rstd, dweight, dbias, *strides, rows, columns, groups, steps,
                    NEED_WEIGHT=need_weight, NEED_BIAS=need_bias, C=512, num_warps=4, **flags,
                )  # fmt: skip
        sums = []
        for partial, need in ((dweight, need_weight), (dbias, need_bias)):
            total = x.new_empty((width,) if need else (0,), dtype=acc)
            if need:
                sum_partials_kernel[(triton.cdiv(width, 128),)](
                    partial, total, parts, width, C=128, num_warps=4
                )
            sums.append(total)
    return dx, dgate, *sums


# ---- ahead-of-time compilation -----------------------------------------------------------------------


def aot() -> Iterator:
    """The variants held to tests/budgets.json: narrow, wide and tiled groups, everything switched on."""
    from .._aot import AotCase

    half, acc = "*bf16", "*fp32"
    sizes = {"rows": "i32", "columns": "i32", "groups": "i32"}
    has = {"HAS_WEIGHT": True, "HAS_BIAS": True}
    needs = {"NEED_X": True, "NEED_GATE": True}
    for columns, act, first in (
        (128, 3, True),
        (4096, 3, True),
        (4096, 2, False),
        (16384, 3, True),
    ):
        config = _config(columns)
        warps = config.pop("num_warps")
        one = columns <= WIDEST
        flags = {"ACT": act, "NORM_FIRST": first, "ACC": tl.float32}
        name = f"{columns}_{'norm' if first else 'gate'}_first"
        pointers = {"x": half, "gate": half, "weight": acc, "bias": acc, "y": half, "rstd_out": acc}
        steps = {"x_step": "i32", "gate_step": "i32"}
        divisible = ("x_step", "gate_step", "columns")
        yield AotCase(
            name=f"gated_norm_forward_{name}",
            fn=gated_norm_forward_kernel,
            signature={**pointers, **steps, **sizes, "eps": "fp32"},
            constexprs={**flags, **has, **config, "ONE_TILE": one},
            divisible_by_16=(*pointers, *divisible),
            num_warps=warps,
        )
        pointers = {
            "dy": half, "x": half, "gate": half, "weight": acc, "bias": acc, "rstd": acc,
            "dx": half, "dgate": half,
        }  # fmt: skip
        steps["dy_step"] = "i32"
        divisible = (*divisible, "dy_step")
        if one:
            shares = {"dweight": acc, "dbias": acc}
            yield AotCase(
                name=f"gated_norm_backward_{name}",
                fn=gated_norm_backward_kernel,
                signature={**pointers, **shares, **steps, **sizes, "steps": "i32"},
                constexprs={
                    **flags, **has, **needs, "NEED_WEIGHT": True, "NEED_BIAS": True, **config,
                },
                divisible_by_16=(*pointers, *shares, *divisible),
                num_warps=warps,
            )  # fmt: skip
            continue
        yield AotCase(
            name="gated_norm_backward_wide",
            fn=gated_norm_backward_wide_kernel,
            signature={**pointers, **steps, **sizes},
            constexprs={**flags, **has, **needs, "C": TILE},
            divisible_by_16=(*pointers, *divisible),
            num_warps=8,
        )
        pointers = {
            "dy": half, "x": half, "gate": half, "rstd": acc, "dweight": acc, "dbias": acc,
        }  # fmt: skip
        yield AotCase(
            name="gated_norm_parameters_wide",
            fn=gated_norm_parameters_wide_kernel,
            signature={**pointers, **steps, **sizes, "steps": "i32"},
            constexprs={**flags, "NEED_WEIGHT": True, "NEED_BIAS": True, "C": 512},
            divisible_by_16=(*pointers, *divisible),
            num_warps=4,
        )
