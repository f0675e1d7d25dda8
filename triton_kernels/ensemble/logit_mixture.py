"""GPU kernels of core `logit_mixture`: the formulas are in solera/ensemble/logit_mixture.py.

Bytes a row of C logits and K models: scores read K C, their gradient reads and writes K C. combine reads K C for the
models' sums (not for kind logit), K C for the combined row's and K C to write it, the later readings from L2 where the
rows in flight fit there; its gradient reads K C twice more and writes K C.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from .._launch import accumulate_type, accumulator, on_device_of
from ._mixture_rows import Rows, config, raised, tile

LOGIT, LOG_PROBABILITY, PROBABILITY = range(3)


@triton.jit
def mixture_scores_kernel(
    table, target, score, tops, log_totals, rows, width, members, lowest, DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr, ACC: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * R + tl.arange(0, R))[:, None]  # [R, 1]
    m = tl.program_id(1)
    lane = tl.arange(0, BLOCK)[None, :]
    inside = row < rows
    y = tl.load(target + row, mask=inside, other=-1)
    kept = inside & (y >= 0)
    top = tl.zeros((R, 1), ACC) + lowest
    total = tl.zeros((R, 1), ACC)
    for j in range(0, width, BLOCK):
        mask = kept & (j + lane < width)
        z = tile(table, m, members, row, j + lane, mask, ACC, DTYPE, ALIGNED)
        top, total, _ = raised(top, total, z)
    log_total = tl.log(tl.where(kept, total, 1.0))
    top = tl.where(kept, top, 0.0)
    picked = tile(table, m, members, row, y, kept & (y < width), ACC, DTYPE, ALIGNED)
    result = tl.where(y < width, picked - top - log_total, float("nan"))
    at = m * rows + row
    tl.store(score + at, tl.where(kept, result, 0.0), mask=inside)
    tl.store(tops + at, top, mask=inside)
    tl.store(log_totals + at, log_total, mask=inside)


@triton.jit
def mixture_scores_backward_kernel(
    table, target, tops, log_totals, dscore, out, member_stride, row_stride, rows, width, members,
    DTYPE: tl.constexpr, ALIGNED: tl.constexpr, ACC: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One tile of model program_id(2)'s gradient."""
    row = (tl.program_id(0) * R + tl.arange(0, R))[:, None]
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    m = tl.program_id(2)
    inside = row < rows
    mask = inside & (cols < width)
    y = tl.load(target + row, mask=inside, other=-1)
    at = m * rows + row
    d = tl.load(dscore + at, mask=inside, other=0.0)
    d = tl.where(y >= 0, d, 0.0)
    top = tl.load(tops + at, mask=inside, other=0.0)
    log_total = tl.load(log_totals + at, mask=inside, other=0.0)
    z = tile(table, m, members, row, cols, mask & (d != 0), ACC, DTYPE, ALIGNED)
    p = tl.exp(z - top - log_total)
    value = tl.where(d != 0, tl.where(cols == y, 1.0 - p, -p) * d, 0.0)
    out += m.to(tl.int64) * member_stride + row.to(tl.int64) * row_stride + cols
    tl.store(out, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _log_p(table, tops, log_totals, m, members, row, cols, mask, rows, ACC: tl.constexpr,
           DTYPE: tl.constexpr, ALIGNED: tl.constexpr):  # fmt: skip
    z = tile(table, m, members, row, cols, mask, ACC, DTYPE, ALIGNED)
    at = m * rows + row
    return (
        z
        - tl.load(tops + at, mask=row < rows, other=0.0)
        - tl.load(log_totals + at, mask=row < rows, other=0.0)
    )


@triton.jit
def _combined(table, weights, tops, log_totals, members, row, cols, mask, rows, lowest, KIND: tl.constexpr,
              ACC: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):  # fmt: skip
    """v of a tile [R, BLOCK]; 0 outside the mask."""
    v = tl.zeros_like(row).to(ACC) + tl.zeros_like(cols).to(ACC)
    if KIND == 2:
        top = v + lowest
        for m in range(members):
            lp = _log_p(
                table, tops, log_totals, m, members, row, cols, mask, rows, ACC, DTYPE, ALIGNED
            )
            top = tl.maximum(top, lp)
        for m in range(members):
            lp = _log_p(
                table, tops, log_totals, m, members, row, cols, mask, rows, ACC, DTYPE, ALIGNED
            )
            w = tl.load(weights + row * members + m, mask=row < rows, other=0.0)
            v += tl.exp(lp - top) * w
        v = tl.log(v) + top
    else:
        for m in range(members):
            if KIND == 0:
                z = tile(table, m, members, row, cols, mask, ACC, DTYPE, ALIGNED)
            else:
                z = _log_p(
                    table, tops, log_totals, m, members, row, cols, mask, rows, ACC, DTYPE, ALIGNED
                )
            v += z * tl.load(weights + row * members + m, mask=row < rows, other=0.0)
    return tl.where(mask, v, 0.0)


@triton.jit
def _cut(table, anchor, members, row, inside, width, log_plausibility, lowest, MASKED: tl.constexpr,
         ACC: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, R: tl.constexpr,
         BLOCK: tl.constexpr):  # fmt: skip
    """The smallest logit of the anchor that is plausible."""
    top = tl.zeros((R, 1), ACC) + lowest
    if MASKED:
        lane = tl.arange(0, BLOCK)[None, :]
        for j in range(0, width, BLOCK):
            mask = inside & (j + lane < width)
            z = tile(table, anchor, members, row, j + lane, mask, ACC, DTYPE, ALIGNED)
            top = tl.maximum(top, tl.max(z, 1)[:, None])
    return top + log_plausibility


@triton.jit
def _kept(table, anchor, members, row, cols, mask, cut, MASKED: tl.constexpr, ACC: tl.constexpr,
          DTYPE: tl.constexpr, ALIGNED: tl.constexpr):  # fmt: skip
    if MASKED:
        z = tile(table, anchor, members, row, cols, mask, ACC, DTYPE, ALIGNED)
        mask = mask & ((z >= cut) | (z != z))
    return mask


@triton.jit
def combine_logits_kernel(
    table, weights, out, tops, log_totals, rows, width, members, anchor, it, log_plausibility, lowest,
    KIND: tl.constexpr, MASKED: tl.constexpr, NORMALIZE: tl.constexpr, DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr, ACC: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """tops and log_totals hold the models' sums, except the combined row's, which is found here."""
    row = (tl.program_id(0) * R + tl.arange(0, R))[:, None]
    lane = tl.arange(0, BLOCK)[None, :]
    inside = row < rows
    cut = _cut(table, anchor, members, row, inside, width, log_plausibility, lowest, MASKED, ACC, DTYPE,
               ALIGNED, R, BLOCK)  # fmt: skip
    top = tl.zeros((R, 1), ACC)
    log_total = tl.zeros((R, 1), ACC)
    if NORMALIZE:
        top += lowest
        total = tl.zeros((R, 1), ACC)
        for j in range(0, width, BLOCK):
            mask = inside & (j + lane < width)
            v = _combined(table, weights, tops, log_totals, members, row, j + lane, mask, rows, lowest,
                          KIND, ACC, DTYPE, ALIGNED)  # fmt: skip
            held = _kept(
                table, anchor, members, row, j + lane, mask, cut, MASKED, ACC, DTYPE, ALIGNED
            )
            top, total, _ = raised(top, total, tl.where(held, v * it, float("-inf")))
        log_total = tl.log(total)
    tl.store(tops + members * rows + row, top, mask=inside)
    tl.store(log_totals + members * rows + row, log_total, mask=inside)
    out += row.to(tl.int64) * width
    for j in range(0, width, BLOCK):
        mask = inside & (j + lane < width)
        v = _combined(table, weights, tops, log_totals, members, row, j + lane, mask, rows, lowest, KIND,
                      ACC, DTYPE, ALIGNED)  # fmt: skip
        held = _kept(table, anchor, members, row, j + lane, mask, cut, MASKED, ACC, DTYPE, ALIGNED)
        y = tl.where(held, v * it - top - log_total, float("-inf"))
        tl.store(out + j + lane, y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _slope(
    table, weights, dy, tops, log_totals, members, anchor, row, cols, mask, rows, it, lowest, cut, whole,
    KIND: tl.constexpr, MASKED: tl.constexpr, NORMALIZE: tl.constexpr, ACC: tl.constexpr,
    DTYPE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """v and dv of a tile."""
    v = _combined(table, weights, tops, log_totals, members, row, cols, mask, rows, lowest, KIND, ACC, DTYPE,
                  ALIGNED)  # fmt: skip
    held = _kept(table, anchor, members, row, cols, mask, cut, MASKED, ACC, DTYPE, ALIGNED)
    d = tl.load(dy + cols, mask=held, other=0.0).to(ACC)
    if NORMALIZE:
        top = tl.load(tops + members * rows + row, mask=row < rows, other=0.0)
        log_total = tl.load(log_totals + members * rows + row, mask=row < rows, other=0.0)
        d -= whole * tl.exp(v * it - top - log_total)
    return v, tl.where(held, d * it, 0.0)


@triton.jit
def combine_logits_backward_kernel(
    dout, dout_stride, table, weights, tops, log_totals, dlogits, dweights, member_stride, row_stride, rows,
    width, members, anchor, it, log_plausibility, lowest, KIND: tl.constexpr, MASKED: tl.constexpr,
    NORMALIZE: tl.constexpr, NEED_LOGITS: tl.constexpr, NEED_WEIGHTS: tl.constexpr, DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr, ACC: tl.constexpr, KP: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * R + tl.arange(0, R))[:, None]
    lane = tl.arange(0, BLOCK)[None, :]
    slot = tl.arange(0, KP)[None, :]
    inside = row < rows
    dy = dout + row.to(tl.int64) * dout_stride
    cut = _cut(table, anchor, members, row, inside, width, log_plausibility, lowest, MASKED, ACC, DTYPE,
               ALIGNED, R, BLOCK)  # fmt: skip
    whole = tl.zeros((R, 1), ACC)
    if NORMALIZE:
        for j in range(0, width, BLOCK):
            mask = inside & (j + lane < width)
            held = _kept(
                table, anchor, members, row, j + lane, mask, cut, MASKED, ACC, DTYPE, ALIGNED
            )
            d = tl.load(dy + j + lane, mask=held, other=0.0).to(ACC)
            whole += tl.sum(d, 1)[:, None]
    dots = tl.zeros((R, KP), ACC)
    total = tl.zeros((R, 1), ACC)
    if NEED_WEIGHTS or KIND != 0:
        for j in range(0, width, BLOCK):
            mask = inside & (j + lane < width)
            v, d = _slope(
                table, weights, dy, tops, log_totals, members, anchor, row, j + lane, mask, rows, it, lowest,
                cut, whole, KIND, MASKED, NORMALIZE, ACC, DTYPE, ALIGNED,
            )  # fmt: skip
            total += tl.sum(d, 1)[:, None]
            for m in range(members):
                if KIND == 0:
                    held = tile(table, m, members, row, j + lane, mask, ACC, DTYPE, ALIGNED)
                else:
                    held = _log_p(table, tops, log_totals, m, members, row, j + lane, mask, rows, ACC,
                                  DTYPE, ALIGNED)  # fmt: skip
                if KIND == 2:
                    held = tl.exp(tl.minimum(held - v, 80.0))
                dot = tl.sum(tl.where(d != 0, d * held, 0.0), 1)[:, None]
                dots += tl.where(slot == m, dot, 0.0)
    if NEED_WEIGHTS:
        tl.store(dweights + row * members + slot, dots, mask=inside & (slot < members))
    if NEED_LOGITS:
        for j in range(0, width, BLOCK):
            mask = inside & (j + lane < width)
            v, d = _slope(
                table, weights, dy, tops, log_totals, members, anchor, row, j + lane, mask, rows, it, lowest,
                cut, whole, KIND, MASKED, NORMALIZE, ACC, DTYPE, ALIGNED,
            )  # fmt: skip
            out = dlogits + row.to(tl.int64) * row_stride + j + lane
            for m in range(members):
                w = tl.load(weights + row * members + m, mask=inside, other=0.0)
                dz = d
                if KIND != 0:
                    lp = _log_p(table, tops, log_totals, m, members, row, j + lane, mask, rows, ACC, DTYPE,
                                ALIGNED)  # fmt: skip
                    if KIND == 1:
                        dz = d - tl.exp(lp) * total
                    else:
                        share = tl.where(d != 0, tl.exp(tl.minimum(lp - v, 80.0)) * d, 0.0)
                        dot = tl.sum(tl.where(slot == m, dots, 0.0), 1)[:, None]
                        dz = share - tl.exp(lp) * dot
                tl.store(out, (dz * w).to(dlogits.dtype.element_ty), mask=mask)
                out += member_stride


# ---- launchers ---------------------------------------------------------------------------------------


def _scores(z: Rows, target, score, tops, log_totals):
    options = config(z.width)
    mixture_scores_kernel[(triton.cdiv(z.rows, options["R"]), z.count)](
        z.table, target, score, tops, log_totals, z.rows, z.width, z.count, z.lowest,
        ACC=accumulator(z.first), **z.constants(), **options,
    )  # fmt: skip


def mixture_scores(logits, target):
    z = Rows(logits)
    acc = accumulate_type(z.first)
    score, top, log_total = (z.first.new_empty((z.count, z.rows), dtype=acc) for _ in range(3))
    if z.rows:
        with on_device_of(z.first):
            _scores(z, target.contiguous(), score, top, log_total)
    return score, top, log_total


def _gradient(z: Rows, rows_first: bool):
    """Where the gradient goes, and its strides from model to model and from row to row."""
    if rows_first:
        out = z.first.new_empty((z.rows, z.count, z.width))
        return out, z.width, z.count * z.width
    return z.first.new_empty((z.count, z.rows, z.width)), z.rows * z.width, z.width


def mixture_scores_backward(logits, target, top, log_total, dscore, rows_first):
    z = Rows(logits)
    out, member_stride, row_stride = _gradient(z, rows_first)
    if z.rows == 0:
        return out
    options = config(z.width)
    grid = (triton.cdiv(z.rows, options["R"]), triton.cdiv(z.width, options["BLOCK"]), z.count)
    with on_device_of(z.first):
        mixture_scores_backward_kernel[grid](
            z.table, target.contiguous(), top.contiguous(), log_total.contiguous(), dscore.contiguous(),
            out, member_stride, row_stride, z.rows, z.width, z.count, ACC=accumulator(z.first),
            **z.constants(), **options,
        )  # fmt: skip
    return out


def combine_logits(logits, weights, kind, inverse_temperature, plausibility, anchor, normalize):
    z = Rows(logits)
    acc = accumulate_type(z.first)
    out = z.first.new_empty((z.rows, z.width))
    fill = torch.zeros if kind == LOGIT else torch.empty
    sizes = (z.count + 1, z.rows)
    top, log_total = (fill(sizes, dtype=acc, device=z.first.device) for _ in range(2))
    if z.rows == 0:
        return out, top, log_total
    options = config(z.width)
    with on_device_of(z.first):
        if kind != LOGIT:
            # Every row counts; the scores of label 0 are not used.
            label = torch.zeros(z.rows, dtype=torch.int64, device=z.first.device)
            _scores(z, label, torch.empty_like(top), top, log_total)
        combine_logits_kernel[(triton.cdiv(z.rows, options["R"]),)](
            z.table, weights.contiguous(), out, top, log_total, z.rows, z.width, z.count, anchor,
            inverse_temperature, math.log(plausibility) if plausibility > 0 else 0.0, z.lowest, KIND=kind,
            MASKED=plausibility > 0, NORMALIZE=normalize, ACC=accumulator(z.first), **z.constants(), **options,
        )  # fmt: skip
    return out, top, log_total


def combine_logits_backward(
    dout, logits, weights, top, log_total, kind, inverse_temperature, plausibility, anchor, normalize,
    need_logits, need_weights, rows_first,
):  # fmt: skip
    z = Rows(logits)
    acc = accumulate_type(z.first)
    dweights = z.first.new_empty((z.rows, z.count) if need_weights else 0, dtype=acc)
    dlogits, member_stride, row_stride = z.first.new_empty(0), 0, 0
    if need_logits:
        dlogits, member_stride, row_stride = _gradient(z, rows_first)
    if z.rows == 0:
        return dlogits, dweights
    dout = dout if dout.shape[1] <= 1 or dout.stride(1) == 1 else dout.contiguous()
    options = config(z.width)
    with on_device_of(z.first):
        combine_logits_backward_kernel[(triton.cdiv(z.rows, options["R"]),)](
            dout, dout.stride(0), z.table, weights.contiguous(), top.contiguous(), log_total.contiguous(),
            dlogits, dweights, member_stride, row_stride, z.rows, z.width, z.count, anchor,
            inverse_temperature, math.log(plausibility) if plausibility > 0 else 0.0, z.lowest, KIND=kind,
            MASKED=plausibility > 0, NORMALIZE=normalize, NEED_LOGITS=need_logits, NEED_WEIGHTS=need_weights,
            ACC=accumulator(z.first), KP=triton.next_power_of_2(z.count), **z.constants(), **options,
        )  # fmt: skip
    return dlogits, dweights


# ---- ahead-of-time compilation -----------------------------------------------------------------------


def aot() -> Iterator:
    """The scores, and every kind combined with a plausibility mask, over a vocabulary's rows and narrow ones."""
    from .._aot import AotCase

    acc, half, label = "*fp32", "*bf16", "*i64"
    sizes = {"rows": "i32", "width": "i32", "members": "i32"}
    strides = {"member_stride": "i64", "row_stride": "i64"}
    for width in (65536, 128):
        options = config(width)
        warps = options.pop("num_warps")
        constants = {"DTYPE": tl.bfloat16, "ALIGNED": True, "ACC": tl.float32, **options}
        inputs = {"table": label, "target": label}
        sums = {"tops": acc, "log_totals": acc}
        yield AotCase(
            name=f"mixture_scores_{width}",
            fn=mixture_scores_kernel,
            signature={**inputs, "score": acc, **sums, **sizes, "lowest": "fp32"},
            constexprs=constants,
            divisible_by_16=(*inputs, "score", *sums, "width"),
            num_warps=warps,
        )
        given = {**inputs, **sums, "dscore": acc, "out": half}
        yield AotCase(
            name=f"mixture_scores_backward_{width}",
            fn=mixture_scores_backward_kernel,
            signature={**given, **strides, **sizes},
            constexprs=constants,
            divisible_by_16=(*given, *strides, "width"),
            num_warps=warps,
        )
        numbers = {"anchor": "i32", "it": "fp32", "log_plausibility": "fp32", "lowest": "fp32"}
        for kind in range(3):
            mixed = {**constants, "KIND": kind, "MASKED": True, "NORMALIZE": True}
            given = {"table": label, "weights": acc, "out": half, **sums}
            yield AotCase(
                name=f"combine_logits_{kind}_{width}",
                fn=combine_logits_kernel,
                signature={**given, **sizes, **numbers},
                constexprs=mixed,
                divisible_by_16=(*given, "width"),
                num_warps=warps,
            )
            given = {
                "dout": half,
                "table": label,
                "weights": acc,
                **sums,
                "dlogits": half,
                "dweights": acc,
            }
            yield AotCase(
                name=f"combine_logits_backward_{kind}_{width}",
                fn=combine_logits_backward_kernel,
                signature={**given, "dout_stride": "i64", **strides, **sizes, **numbers},
                constexprs={**mixed, "NEED_LOGITS": True, "NEED_WEIGHTS": True, "KP": 4},
                divisible_by_16=(*given, "dout_stride", *strides, "width"),
                num_warps=warps,
            )
