"""GPU kernels of core `qk_norm`: the formulas are in solera/norm/qk_norm.py.

Bytes a row (one head at one position) of d elements: forward reads x and writes y, backward reads x and dy and writes
dx; the angles, shared by heads and batch, come from L2. A row reads each element of the rotated part twice, as itself
and as its pair's other half; the second read finds the line in L1.

H200 at 4.3 TB/s, bf16, 8 x 32 x 4096 x 128 (q alone): forward 125 us, backward 187 us are the floors.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl

from .._launch import accumulate_type, accumulator, on_device_of, processors
from .row_norm import sum_partials_kernel

WIDEST = 8192  # elements of a row kept in registers; wider ones (l2_normalize) have no weight and no angles
TILE = 4096
LAYER, L2, L2_ADD = 1, 2, 3


@triton.jit
def _place(row, J, K, KP: tl.constexpr):
    """The first three indices of a row in the output's order, and which of them are head and position."""
    i = row // (J * K)
    j = row // K % J
    k = row % K
    if KP:  # positions along dimension 2
        return i, j, k, j, k
    return i, j, k, k, j


@triton.jit
def _row_stats(x, mean, columns, cols, eps, KIND: tl.constexpr):
    d = tl.where(cols < columns, x - mean, 0.0)
    return _scale_of(tl.sum(d * d, 1)[:, None], columns, eps, KIND)


@triton.jit
def _scale_of(square, columns, eps, KIND: tl.constexpr):
    if KIND == 2:
        norm = tl.sqrt(square)
        return 1.0 / tl.where(norm < eps, eps, norm)  # NaN stays
    elif KIND == 3:
        return 1.0 / tl.sqrt(square + eps)
    else:
        return 1.0 / tl.sqrt(square / columns + eps)


@triton.jit
def _share_of(total, rstd, columns, eps, KIND: tl.constexpr):
    """The factor of n in dx: a clamped row was divided by a constant and has none."""
    if KIND == 2:
        return tl.where(rstd >= 1.0 / eps, 0.0, total)
    elif KIND == 3:
        return total
    else:
        return total / columns


@triton.jit
def _partner(cols, half, INTERLEAVED: tl.constexpr):
    """For each column of the rotated part: the pair's other column, its angle, and the sine's sign."""
    if INTERLEAVED:
        other = cols ^ 1
        angle = cols // 2
        upper = (cols % 2) == 1
    else:
        upper = cols >= half
        other = tl.where(upper, cols - half, cols + half)
        angle = tl.where(upper, cols - half, cols)
    return other, angle, tl.where(upper, 1.0, -1.0)


@triton.jit
def _turn(v, partner, cos, sin, at, angle, sign, turned):
    c = tl.load(cos + at + angle, mask=turned, other=1.0)
    s = tl.load(sin + at + angle, mask=turned, other=0.0)
    return tl.where(turned, v * c + partner * s * sign, v)


@triton.jit
def head_norm_forward_kernel(
    x, weight, cos, sin, y, mean_out, rstd_out, step0, step1, step2, J, K, rows, columns, half,
    weight_step, cos_batch, eps, KIND: tl.constexpr, KP: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_TURN: tl.constexpr, INTERLEAVED: tl.constexpr, ACC: tl.constexpr, R: tl.constexpr,
    C: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0).to(tl.int64) * R + tl.arange(0, R))[:, None]  # [R, 1]
    cols = tl.arange(0, C)[None, :]  # [1, C]
    i, j, k, head, position = _place(row, J, K, KP)
    from_x = x + i * step0 + j * step1 + k * step2
    inside = (row < rows) & (cols < columns)
    v = tl.load(from_x + cols, mask=inside, other=0.0).to(ACC)
    mean = tl.zeros((R, 1), ACC)
    if KIND == 1:
        mean = tl.sum(v, 1)[:, None] / columns
    rstd = _row_stats(v, mean, columns, cols, eps, KIND)
    v = (v - mean) * rstd
    if HAS_WEIGHT:
        v *= tl.load(weight + head * weight_step + cols, mask=inside, other=0.0).to(ACC)
    if HAS_TURN:
        turned = inside & (cols < 2 * half)
        other, angle, sign = _partner(cols, half, INTERLEAVED)
        p = (tl.load(from_x + other, mask=turned, other=0.0).to(ACC) - mean) * rstd
        if HAS_WEIGHT:
            p *= tl.load(weight + head * weight_step + other, mask=turned, other=0.0).to(ACC)
        v = _turn(v, p, cos, sin, i * cos_batch + position * half, angle, sign, turned)
    tl.store(y + row * columns + cols, v.to(y.dtype.element_ty), mask=inside)
    one = tl.arange(0, 1)[None, :]
    if KIND == 1:
        tl.store(mean_out + row + one, mean, mask=row < rows)
    tl.store(rstd_out + row + one, rstd, mask=row < rows)


@triton.jit
def head_norm_backward_kernel(
    dy, x, weight, cos, sin, mean, rstd, dx, dweight, g0, g1, g2, step0, step1, step2, J, K, rows,
    columns, half, weight_step, cos_batch, eps, steps, KIND: tl.constexpr, KP: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_TURN: tl.constexpr, INTERLEAVED: tl.constexpr,
    PER_HEAD: tl.constexpr, NEED_X: tl.constexpr, NEED_WEIGHT: tl.constexpr, ACC: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """A program walks `steps` blocks of R rows and keeps its share of dw in registers.

    With a weight a head (PER_HEAD) the second axis of the grid is the head and its rows are walked; otherwise
    all rows are. `rows` counts what one program of the first axis and its siblings walk.
    """
    program = tl.program_id(0)
    cols = tl.arange(0, C)[None, :]  # [1, C]
    heads = J if KP else K
    dw = tl.zeros((1, C), ACC)
    for step in range(steps):
        index = ((program * steps + step).to(tl.int64) * R + tl.arange(0, R))[:, None]
        row = index
        if PER_HEAD:
            if KP:
                row = (index // K * J + tl.program_id(1)) * K + index % K
            else:
                row = index * K + tl.program_id(1)
        i, j, k, head, position = _place(row, J, K, KP)
        inside = (index < rows) & (cols < columns)
        from_dy = dy + i * g0 + j * g1 + k * g2
        e = tl.load(from_dy + cols, mask=inside, other=0.0).to(ACC)
        if HAS_TURN:
            turned = inside & (cols < 2 * half)
            other, angle, sign = _partner(cols, half, INTERLEAVED)
            p = tl.load(from_dy + other, mask=turned, other=0.0).to(ACC)
            e = _turn(e, p, cos, sin, i * cos_batch + position * half, angle, -sign, turned)
        r = tl.load(rstd + row, mask=index < rows, other=0.0)
        n = tl.load(x + i * step0 + j * step1 + k * step2 + cols, mask=inside, other=0.0).to(ACC)
        if KIND == 1:
            n = tl.where(inside, n - tl.load(mean + row, mask=index < rows, other=0.0), 0.0)
        n *= r
        if NEED_WEIGHT:
            dw += tl.sum(e * n, 0)[None, :]
        if NEED_X:
            h = e
            if HAS_WEIGHT:
                h *= tl.load(weight + head * weight_step + cols, mask=inside, other=0.0).to(ACC)
            value = h - n * _share_of(tl.sum(h * n, 1)[:, None], r, columns, eps, KIND)
            if KIND == 1:
                value -= tl.sum(h, 1)[:, None] / columns
            tl.store(dx + row * columns + cols, (value * r).to(dx.dtype.element_ty), mask=inside)
    if NEED_WEIGHT:
        part = program.to(tl.int64)
        if PER_HEAD:
            part = part * heads + tl.program_id(1)
        tl.store(dweight + part * columns + cols, dw, mask=cols < columns)


@triton.jit
def head_norm_wide_kernel(
    dy, x, rstd, out, rstd_out, g0, g1, g2, step0, step1, step2, J, K, columns, eps,
    KIND: tl.constexpr, BACKWARD: tl.constexpr, ACC: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """One row wider than a tile, no weight, no angles, not centred: its sum, then the row again."""
    row = tl.program_id(0).to(tl.int64) + tl.zeros((1, 1), tl.int64)
    lane = tl.arange(0, C)[None, :]
    i, j, k, _, _ = _place(row, J, K, True)
    from_x = x + i * step0 + j * step1 + k * step2
    from_dy = dy + i * g0 + j * g1 + k * g2
    total = tl.zeros((1, C), ACC)
    for c in range(0, columns, C):
        inside = c + lane < columns
        v = tl.load(from_x + c + lane, mask=inside, other=0.0).to(ACC)
        h = v
        if BACKWARD:
            h = tl.load(from_dy + c + lane, mask=inside, other=0.0).to(ACC)
        total += h * v
    s = tl.sum(total, 1)[:, None]
    one = tl.arange(0, 1)[None, :]
    if BACKWARD:
        r = tl.load(rstd + row + one)
        share = _share_of(s * r, r, columns, eps, KIND)
    else:
        r = _scale_of(s, columns, eps, KIND)
        tl.store(rstd_out + row + one, r)
    for c in range(0, columns, C):
        inside = c + lane < columns
        v = tl.load(from_x + c + lane, mask=inside, other=0.0).to(ACC) * r
        if BACKWARD:
            h = tl.load(from_dy + c + lane, mask=inside, other=0.0).to(ACC)
            v = (h - v * share) * r
        tl.store(out + row * columns + c + lane, v.to(out.dtype.element_ty), mask=inside)


# ---- launchers ---------------------------------------------------------------------------------------


def _config(columns: int) -> dict[str, int]:
    """Tile and warps by width: 8 to 16 elements a thread, several narrow rows a program."""
    C = max(16, triton.next_power_of_2(columns))
    R = max(1, 1024 // C)
    warps = 4 if R * C <= 2048 else (8 if R * C <= 4096 else 16)
    return {"R": R, "C": C, "num_warps": warps}


def _last_dense(x):
    return x if x.stride(-1) == 1 or x.shape[-1] < 2 else x.contiguous()


def _turn_flags(x, weight, cos, positions, interleaved):
    per_head = weight is not None and weight.dim() == 2
    numbers = {
        "half": 0 if cos is None else cos.shape[2],
        "weight_step": x.shape[3] if per_head else 0,
        "cos_batch": 0 if cos is None or cos.shape[0] == 1 else cos.shape[1] * cos.shape[2],
    }
    flags = {
        "KP": positions == 2, "HAS_WEIGHT": weight is not None, "HAS_TURN": cos is not None,
        "INTERLEAVED": interleaved, "ACC": accumulator(x),
    }  # fmt: skip
    return per_head, numbers, flags


def head_norm(x, weight, cos, sin, kind, eps, positions, interleaved):
    x = _last_dense(x)
    acc = accumulate_type(x)
    y = x.new_empty(x.shape)
    mean = x.new_empty(x.shape[:-1] if kind == LAYER else (0,), dtype=acc)
    rstd = x.new_empty(x.shape[:-1], dtype=acc)
    if x.numel() == 0:
        return y, mean, rstd
    _, J, K, columns = x.shape
    rows = x.numel() // columns
    steps = x.stride()[:3]
    with on_device_of(x):
        if columns > WIDEST:
            _refuse_wide(weight, cos, kind)
            head_norm_wide_kernel[(rows,)](
                x, x, rstd, y, rstd, *steps, *steps, J, K, columns, eps, KIND=kind, BACKWARD=False,
                ACC=accumulator(x), C=TILE, num_warps=8,
            )  # fmt: skip
            return y, mean, rstd
        _, numbers, flags = _turn_flags(x, weight, cos, positions, interleaved)
        config = _config(columns)
        head_norm_forward_kernel[(triton.cdiv(rows, config["R"]),)](
            x, x if weight is None else weight.contiguous(), x if cos is None else cos.contiguous(),
            x if sin is None else sin.contiguous(), y, mean, rstd, *steps, J, K, rows, columns,
            eps=eps, KIND=kind, **numbers, **flags, **config,
        )  # fmt: skip
    return y, mean, rstd


def _refuse_wide(weight, cos, kind):
    if weight is not None or cos is not None or kind == LAYER:
        raise ValueError(f"x: rows wider than {WIDEST} take no weight, no angles and no centring")


def head_norm_backward(
    dy, x, weight, cos, sin, mean, rstd, kind, eps, positions, interleaved, need_x, need_weight
):
    dy, x = _last_dense(dy), _last_dense(x)
    acc = accumulate_type(x)
    I, J, K, columns = x.shape
    rows = I * J * K
    per_head, numbers, flags = _turn_flags(x, weight, cos, positions, interleaved)
    heads = (J if positions == 2 else K) if per_head else 1
    shape = (heads, columns) if per_head else (columns,)
    dx = x.new_empty(x.shape if need_x else (0,))
    if x.numel() == 0:
        return dx, x.new_zeros(shape if need_weight else (0,), dtype=acc)
    strides = (*dy.stride()[:3], *x.stride()[:3])
    dweight = x.new_empty(shape if need_weight else (0,), dtype=acc)
    rstd = rstd.contiguous()
    with on_device_of(x):
        if columns > WIDEST:
            _refuse_wide(weight, cos, kind)
            if need_weight:
                raise ValueError(f"x: rows wider than {WIDEST} take no weight")
            head_norm_wide_kernel[(rows,)](
                dy, x, rstd, dx, rstd, *strides, J, K, columns, eps, KIND=kind, BACKWARD=True,
                ACC=accumulator(x), C=TILE, num_warps=8,
            )  # fmt: skip
            return dx, dweight
        config = _config(columns)
        blocks = triton.cdiv(rows // heads, config["R"])
        steps = triton.cdiv(blocks, max(1, 4 * processors(x) // heads))
        parts = triton.cdiv(blocks, steps)
        partial = x.new_empty((parts, heads * columns) if need_weight else (0,), dtype=acc)
        head_norm_backward_kernel[(parts, heads)](
            dy, x, x if weight is None else weight.contiguous(),
            x if cos is None else cos.contiguous(), x if sin is None else sin.contiguous(), mean,
            rstd, dx, partial, *strides, J, K, rows // heads, columns, eps=eps, steps=steps,
            KIND=kind, PER_HEAD=per_head, NEED_X=need_x, NEED_WEIGHT=need_weight, **numbers, **flags,
            **config,
        )  # fmt: skip
        if need_weight:
            sum_partials_kernel[(triton.cdiv(heads * columns, 128),)](
                partial, dweight, parts, heads * columns, C=128, num_warps=4
            )
    return dx, dweight


# ---- ahead-of-time compilation -----------------------------------------------------------------------


def aot() -> Iterator:
    """The variants held to tests/budgets.json: common head sizes with rotation, and long vectors."""
    from .._aot import AotCase

    half, acc = "*bf16", "*fp32"
    turn = {"half": "i32", "weight_step": "i32", "cos_batch": "i32"}
    x_steps = {"step0": "i32", "step1": "i32", "step2": "i32"}
    all_steps = {"g0": "i32", "g1": "i32", "g2": "i32", **x_steps}
    for columns, kind, pairs, each in ((64, 0, False, False), (128, 0, True, True), (128, 1, False, False),
                                       (4096, 2, False, False)):  # fmt: skip
        config = _config(columns)
        warps = config.pop("num_warps")
        plain = columns > 128
        flags = {
            "KIND": kind, "KP": True, "HAS_WEIGHT": not plain, "HAS_TURN": not plain,
            "INTERLEAVED": pairs, "ACC": tl.float32, **config,
        }  # fmt: skip
        name = f"{columns}_{('rms', 'layer', 'l2')[kind]}{'_pairs_per_head' if pairs else ''}"
        divisible = ("columns", "half", "weight_step", "step0", "step1", "step2")
        pointers = {
            "x": half, "weight": acc, "cos": acc, "sin": acc, "y": half, "mean_out": acc, "rstd_out": acc,
        }  # fmt: skip
        yield AotCase(
            name=f"head_norm_forward_{name}",
            fn=head_norm_forward_kernel,
            signature={
                **pointers, **x_steps, "J": "i32", "K": "i32", "rows": "i32", "columns": "i32", **turn,
                "eps": "fp32",
            },
            constexprs=flags,
            divisible_by_16=(*pointers, *divisible),
            num_warps=warps,
        )  # fmt: skip
        pointers = {
            "dy": half, "x": half, "weight": acc, "cos": acc, "sin": acc, "mean": acc, "rstd": acc,
            "dx": half, "dweight": acc,
        }  # fmt: skip
        yield AotCase(
            name=f"head_norm_backward_{name}",
            fn=head_norm_backward_kernel,
            signature={
                **pointers, **all_steps, "J": "i32", "K": "i32", "rows": "i32", "columns": "i32", **turn,
                "eps": "fp32", "steps": "i32",
            },
            constexprs={**flags, "PER_HEAD": each, "NEED_X": True, "NEED_WEIGHT": not plain},
            divisible_by_16=(*pointers, *divisible, "g0", "g1", "g2"),
            num_warps=warps,
        )  # fmt: skip
    for backward in (False, True):
        pointers = {"dy": half, "x": half, "rstd": acc, "out": half, "rstd_out": acc}
        yield AotCase(
            name=f"head_norm_wide_{'backward' if backward else 'forward'}",
            fn=head_norm_wide_kernel,
            signature={
                **pointers, **all_steps, "J": "i32", "K": "i32", "columns": "i32", "eps": "fp32",
            },
            constexprs={"KIND": L2, "BACKWARD": backward, "ACC": tl.float32, "C": TILE},
            divisible_by_16=(*pointers, *all_steps, "columns"),
            num_warps=8,
        )  # fmt: skip
