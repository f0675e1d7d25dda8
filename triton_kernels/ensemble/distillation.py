"""GPU kernels of core `distillation`: the formulas are in solera/ensemble/distillation.py.

Bytes a row of C logits and K teachers: the sums read (K + 1) C (combining logits with gradients to the weights: twice),
the gradients read (K + 1) C again, from L2 where the rows in flight fit there, and write C for the student and K C
for the teachers. Rows are walked in tiles; a teacher's mean of the student's values is taken relative to
the student's maximum.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl

from .._launch import accumulate_type, accumulator, on_device_of
from ._mixture_rows import Rows, config, raised, tile


@triton.jit
def _target(table, weights, m, members, row, cols, mask, it, KIND: tl.constexpr, ACC: tl.constexpr,
            DTYPE: tl.constexpr, ALIGNED: tl.constexpr):  # fmt: skip
    """t_m, or the weighted sum of all of them; -inf outside the mask."""
    if KIND == 0:
        t = tile(table, m, members, row, cols, mask, ACC, DTYPE, ALIGNED) * it
    else:
        t = tl.zeros_like(row).to(ACC) + tl.zeros_like(cols).to(ACC)
        for k in range(members):
            z = tile(table, k, members, row, cols, mask, ACC, DTYPE, ALIGNED)
            t += z * (tl.load(weights + k) * it)
        t = tl.where(mask, t, float("-inf"))
    return t


@triton.jit
def distill_sums_kernel(
    student, student_stride, table, weights, loss, own, sums, dweights, rows, width, members, it, scale,
    lowest, KIND: tl.constexpr, NEED_WEIGHTS: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr,
    ACC: tl.constexpr, KP: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The loss; own (2, N): the student's maximum and log sum; sums (3, K or 1, N): the teachers', and their means."""
    row = (tl.program_id(0) * R + tl.arange(0, R))[:, None]  # [R, 1]
    lane = tl.arange(0, BLOCK)[None, :]
    inside = row < rows
    x = student + row.to(tl.int64) * student_stride
    own_top = tl.zeros((R, 1), ACC) + lowest
    total = tl.zeros((R, 1), ACC)
    for j in range(0, width, BLOCK):
        mask = inside & (j + lane < width)
        s = tl.load(x + j + lane, mask=mask, other=float("-inf")).to(ACC) * it
        own_top, total, _ = raised(own_top, total, s)
    own_log = tl.log(total)
    tl.store(own + row, own_top, mask=inside)
    tl.store(own + rows + row, own_log, mask=inside)
    result = tl.zeros((R, 1), ACC)
    top = tl.zeros((R, 1), ACC)
    mean = tl.zeros((R, 1), ACC)
    targets = members if KIND == 0 else 1
    for m in range(targets):
        top = tl.zeros((R, 1), ACC) + lowest
        total = tl.zeros((R, 1), ACC)
        weighted = tl.zeros((R, 1), ACC)
        for j in range(0, width, BLOCK):
            mask = inside & (j + lane < width)
            t = _target(
                table, weights, m, members, row, j + lane, mask, it, KIND, ACC, DTYPE, ALIGNED
            )
            top, total, factor = raised(top, total, t)
            s = tl.load(x + j + lane, mask=mask, other=0.0).to(ACC) * it - own_top
            e = tl.exp(t - top)
            weighted = weighted * factor + tl.sum(tl.where(e > 0, e * s, 0.0), 1)[:, None]
        mean = weighted / total
        at = sums + m * rows + row
        tl.store(at, top, mask=inside)
        tl.store(at + targets * rows, tl.log(total), mask=inside)
        tl.store(at + 2 * targets * rows, mean, mask=inside)
        w = tl.load(weights + m) if KIND == 0 else 1.0
        result += w * (own_log - mean)
        if KIND == 0 and NEED_WEIGHTS:
            tl.store(dweights + row * members + m, (own_log - mean) * scale, mask=inside)
    tl.store(loss + row, result * scale, mask=inside)
    if KIND == 1 and NEED_WEIGHTS:
        log_total = tl.log(total)
        # <d, z> = <d, z - c> as d sums to 0: what rounding leaves of that sum is taken off with c, z's mean.
        found = tl.zeros((R, KP), ACC)
        means = tl.zeros((R, KP), ACC)
        rest = tl.zeros((R, 1), ACC)
        slot = tl.arange(0, KP)[None, :]
        for j in range(0, width, BLOCK):
            mask = inside & (j + lane < width)
            t = _target(
                table, weights, 0, members, row, j + lane, mask, it, KIND, ACC, DTYPE, ALIGNED
            )
            s = tl.load(x + j + lane, mask=mask, other=0.0).to(ACC) * it - own_top
            q = tl.exp(t - top - log_total)
            d = tl.where(q > 0, q * (mean - s), 0.0)
            rest += tl.sum(d, 1)[:, None]
            for k in range(members):
                z = tile(table, k, members, row, j + lane, mask, ACC, DTYPE, ALIGNED) * it
                dot = tl.sum(tl.where(d != 0, d * z, 0.0), 1)[:, None]
                found += tl.where(slot == k, dot, 0.0)
                z_mean = tl.sum(tl.where(q > 0, q * z, 0.0), 1)[:, None]
                means += tl.where(slot == k, z_mean, 0.0)
        found -= rest * means
        tl.store(dweights + row * members + slot, found * scale, mask=inside & (slot < members))


@triton.jit
def distill_gradient_kernel(
    student, student_stride, table, weights, own, sums, dstudent, dteachers, member_stride, row_stride,
    rows, width, members, it, factor, share, KIND: tl.constexpr, NEED_STUDENT: tl.constexpr,
    NEED_TEACHERS: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, ACC: tl.constexpr,
    R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One tile of every gradient; factor is scale / temperature."""
    row = (tl.program_id(0) * R + tl.arange(0, R))[:, None]
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = row < rows
    mask = inside & (cols < width)
    own_top = tl.load(own + row, mask=inside, other=0.0)
    own_log = tl.load(own + rows + row, mask=inside, other=0.0)
    s = tl.load(student + row.to(tl.int64) * student_stride + cols, mask=mask, other=0.0).to(ACC)
    s = s * it - own_top
    mixed = tl.zeros((R, BLOCK), ACC)
    targets = members if KIND == 0 else 1
    out = dteachers + row.to(tl.int64) * row_stride + cols
    for m in range(targets):
        t = _target(table, weights, m, members, row, cols, mask, it, KIND, ACC, DTYPE, ALIGNED)
        at = sums + m * rows + row
        top = tl.load(at, mask=inside, other=0.0)
        log_total = tl.load(at + targets * rows, mask=inside, other=0.0)
        q = tl.exp(t - top - log_total)
        w = tl.load(weights + m) if KIND == 0 else 1.0
        mixed += w * q
        if NEED_TEACHERS:
            mean = tl.load(at + 2 * targets * rows, mask=inside, other=0.0)
            d = tl.where(q > 0, q * (mean - s), 0.0) * factor
            if KIND == 0:
                tl.store(out, (d * w).to(dteachers.dtype.element_ty), mask=mask)
                out += member_stride
            else:
                for k in range(members):
                    value = (d * tl.load(weights + k)).to(dteachers.dtype.element_ty)
                    tl.store(out, value, mask=mask)
                    out += member_stride
    if NEED_STUDENT:
        d = (tl.exp(s - own_log) * tl.load(share) - mixed) * factor
        tl.store(
            dstudent + row.to(tl.int64) * width + cols, d.to(dstudent.dtype.element_ty), mask=mask
        )


@triton.jit
def distill_scale_kernel(
    x, factor, set_stride, row_stride, rows, width, R: tl.constexpr, BLOCK: tl.constexpr
):
    """A tile of set program_id(2) times its rows' factors; rows whose factor is 1 are left alone."""
    row = (tl.program_id(0) * R + tl.arange(0, R))[:, None]
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    f = tl.load(factor + row, mask=row < rows, other=1.0)
    mask = (row < rows) & (cols < width) & (f != 1.0)
    at = x + tl.program_id(2).to(tl.int64) * set_stride + row.to(tl.int64) * row_stride + cols
    value = tl.load(at, mask=mask, other=0.0).to(f.dtype) * f
    tl.store(at, value.to(x.dtype.element_ty), mask=mask)


# ---- launchers ---------------------------------------------------------------------------------------


def _sums_config(width: int, kind: int) -> dict[str, int]:
    """Mean logits need two rows of columns at hand: in tiles of 2048 they spilled."""
    return config(width, 1024 if kind else 2048)


def distill(
    student, teachers, weights, inverse_temperature, scale, kind, need_student, need_teachers, need_weights,
    rows_first,
):  # fmt: skip
    t = Rows(teachers)
    x = student if student.shape[1] <= 1 or student.stride(1) == 1 else student.contiguous()
    weights = weights.contiguous()
    acc = accumulate_type(x)
    new = lambda *sizes: x.new_empty(sizes, dtype=acc)
    targets = t.count if kind == 0 else 1
    loss, own, sums = new(t.rows), new(2, t.rows), new(3, targets, t.rows)
    dstudent = x.new_empty((t.rows, t.width) if need_student else 0)
    sizes = (t.rows, t.count, t.width) if rows_first else (t.count, t.rows, t.width)
    dteachers = x.new_empty(sizes if need_teachers else 0)
    dweights = new(t.rows, t.count) if need_weights else new(0)
    if t.rows == 0:
        return loss, dstudent, dteachers, dweights
    options = config(t.width)
    share = weights.sum() if kind == 0 else weights.new_ones(())
    constants = {"KIND": kind, "ACC": accumulator(x), **t.constants()}
    tiles = triton.cdiv(t.rows, options["R"])
    sums_config = _sums_config(t.width, kind)
    with on_device_of(x):
        distill_sums_kernel[(triton.cdiv(t.rows, sums_config["R"]),)](
            x, x.stride(0), t.table, weights, loss, own, sums, dweights, t.rows, t.width, t.count,
            inverse_temperature, scale, t.lowest, NEED_WEIGHTS=need_weights,
            KP=triton.next_power_of_2(t.count), **constants, **sums_config,
        )  # fmt: skip
        if need_student or need_teachers:
            distill_gradient_kernel[(tiles, triton.cdiv(t.width, options["BLOCK"]))](
                x, x.stride(0), t.table, weights, own, sums, dstudent, dteachers,
                t.width if rows_first else t.rows * t.width,
                t.count * t.width if rows_first else t.width, t.rows, t.width, t.count,
                inverse_temperature, inverse_temperature * scale, share, NEED_STUDENT=need_student,
                NEED_TEACHERS=need_teachers, **constants, **options,
            )  # fmt: skip
    return loss, dstudent, dteachers, dweights


def distill_scale_(x, factor):
    if x.numel() == 0:
        return
    held = x if x.shape[2] <= 1 or x.stride(2) == 1 else x.contiguous()
    sets, rows, width = x.shape
    options = config(width)
    grid = (triton.cdiv(rows, options["R"]), triton.cdiv(width, options["BLOCK"]), sets)
    with on_device_of(x):
        distill_scale_kernel[grid](
            held, factor.contiguous(), held.stride(0), held.stride(1), rows, width, **options
        )
    if held is not x:
        x.copy_(held)


# ---- ahead-of-time compilation -----------------------------------------------------------------------


def aot() -> Iterator:
    """Both kinds over a vocabulary's rows, and the mean probability over narrow ones; with every gradient."""
    from .._aot import AotCase

    acc, half = "*fp32", "*bf16"
    head = {"student": half, "student_stride": "i64", "table": "*i64", "weights": acc}
    sizes = {"rows": "i32", "width": "i32", "members": "i32", "it": "fp32"}
    for kind, width in ((0, 65536), (1, 65536), (0, 128)):
        options = config(width)
        warps = options.pop("num_warps")
        sums_options = _sums_config(width, kind)
        sums_warps = sums_options.pop("num_warps")
        constants = {"KIND": kind, "DTYPE": tl.bfloat16, "ALIGNED": True, "ACC": tl.float32}
        outputs = {"loss": acc, "own": acc, "sums": acc, "dweights": acc}
        yield AotCase(
            name=f"distill_sums_{kind}_{width}",
            fn=distill_sums_kernel,
            signature={**head, **outputs, **sizes, "scale": "fp32", "lowest": "fp32"},
            constexprs={"NEED_WEIGHTS": True, "KP": 8, **constants, **sums_options},
            divisible_by_16=(*head, *outputs, "width"),
            num_warps=sums_warps,
        )
        given = {"own": acc, "sums": acc, "dstudent": half, "dteachers": half, "share": acc}
        yield AotCase(
            name=f"distill_gradient_{kind}_{width}",
            fn=distill_gradient_kernel,
            signature={
                **head, **given, **sizes, "member_stride": "i64", "row_stride": "i64", "factor": "fp32"
            },
            constexprs={"NEED_STUDENT": True, "NEED_TEACHERS": True, **constants, **options},
            divisible_by_16=(*head, *given, "member_stride", "row_stride", "width"),
            num_warps=warps,
        )  # fmt: skip
    options = config(65536)
    warps = options.pop("num_warps")
    yield AotCase(
        name="distill_scale",
        fn=distill_scale_kernel,
        signature={
            "x": half, "factor": acc, "set_stride": "i64", "row_stride": "i64", "rows": "i32", "width": "i32"
        },
        constexprs=options,
        divisible_by_16=("x", "factor", "set_stride", "row_stride", "width"),
        num_warps=warps,
    )  # fmt: skip
