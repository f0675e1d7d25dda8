"""GPU kernels of core `logit_norm`: the formulas are in solera/norm/logit_norm.py.

Bytes a row of C logits: the statistics read it once (normalized: a second time, for the softmax at the scale
that the norms give; from L2 while the rows in flight fit there), the gradient reads it and writes one row.
A program walks R rows in tiles of BLOCK columns, with the sums rescaled whenever a tile raises the maximum.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from .._launch import accumulate_type, accumulator, on_device_of

MOMENTS, STABLEMAX, SOFTMAX, NORMALIZED = range(4)
LOWEST = {torch.float64: -1.7e308}


@triton.jit
def _values(logits, columns, row, cols, rows, end, width, HAS_COLUMNS: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """v = c x of a tile [R, BLOCK], 0 outside it."""
    mask = (row < rows) & (cols < end)
    v = tl.load(logits + row.to(tl.int64) * width + cols, mask=mask, other=0.0).to(ACC)
    if HAS_COLUMNS:
        v *= tl.load(columns + cols, mask=cols < end, other=0.0)
    return v


@triton.jit
def logit_statistics_kernel(
    logits, target, scale, columns, bounds, a_out, b_out, picked_out, norms, rows, width, segments, eps,
    lowest, MODE: tl.constexpr, HAS_COLUMNS: tl.constexpr, ACC: tl.constexpr, R: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * R + tl.arange(0, R))[:, None]  # [R, 1]
    lane = tl.arange(0, BLOCK)[None, :]  # [1, BLOCK]
    y = tl.load(target + row, mask=row < rows, other=-1)
    kept = y >= 0
    inside = kept & (y < width)
    at_label = row.to(tl.int64) * width + tl.where(inside, y, 0)
    picked = tl.load(logits + at_label, mask=inside & (row < rows), other=0.0).to(ACC)
    if HAS_COLUMNS:
        picked *= tl.load(columns + y, mask=inside, other=0.0)
    picked = tl.where(kept & (y >= width), float("nan"), picked)
    a = tl.zeros((R, 1), ACC)
    b = tl.zeros((R, 1), ACC)
    if MODE == 0:
        count = 0.0
        for j in range(0, width, BLOCK):
            cols = j + lane
            v = _values(logits, columns, row, cols, rows, width, width, HAS_COLUMNS, ACC)
            n = tl.minimum(width - j, BLOCK).to(ACC)
            mean = tl.sum(v, 1)[:, None] / n
            d = tl.where(cols < width, v - mean, 0.0)
            gap = mean - a
            a += gap * (n / (count + n))
            b += tl.sum(d * d, 1)[:, None] + gap * gap * (count * n / (count + n))
            count += n
        b = b / width
    elif MODE == 1:
        for j in range(0, width, BLOCK):
            cols = j + lane
            v = _values(logits, columns, row, cols, rows, width, width, HAS_COLUMNS, ACC)
            s = tl.where(v >= 0, v + 1, 1 / (1 - tl.minimum(v, 0.0)))
            a += tl.sum(tl.where((cols < width) & (cols != y), s, 0.0), 1)[:, None]
    else:
        r = tl.load(scale + row, mask=row < rows, other=1.0)
        if MODE == 3:
            size = tl.zeros((R, 1), ACC)
            for t in range(segments):
                end = tl.load(bounds + t + 1)
                square = tl.zeros((R, 1), ACC)
                for j in range(tl.load(bounds + t), end, BLOCK):
                    v = _values(logits, columns, row, j + lane, rows, end, width, HAS_COLUMNS, ACC)
                    square += tl.sum(v * v, 1)[:, None]
                norm = tl.sqrt(square)
                size += norm
                tl.store(
                    norms + row.to(tl.int64) * segments + t,
                    tl.where(kept, norm, 1.0),
                    mask=row < rows,
                )
            r = r / (size / segments + eps)
        top = tl.zeros((R, 1), ACC) + lowest
        total = tl.zeros((R, 1), ACC)
        weighted = tl.zeros((R, 1), ACC)
        for j in range(0, width, BLOCK):
            cols = j + lane
            v = _values(logits, columns, row, cols, rows, width, width, HAS_COLUMNS, ACC)
            other = (cols < width) & (cols != y)
            z = tl.where(other, v * r, float("-inf"))
            here = tl.maximum(top, tl.max(z, 1)[:, None])
            factor = tl.exp(top - here)
            e = tl.exp(z - here)
            total = total * factor + tl.sum(e, 1)[:, None]
            finite = tl.where(v == float("-inf"), lowest, v)
            weighted = weighted * factor + tl.sum(tl.where(other, e * finite, 0.0), 1)[:, None]
            top = here
        none = total == 0
        a = tl.where(none, float("-inf"), top + tl.log(tl.where(none, 1.0, total)))
        b = tl.where(none, 0.0, weighted / tl.where(none, 1.0, total))
    tl.store(a_out + row, tl.where(kept, a, 0.0), mask=row < rows)
    tl.store(
        b_out + row,
        tl.where(kept, b, 1.0) if MODE != 1 else tl.zeros((R, 1), ACC) + 1.0,
        mask=row < rows,
    )
    tl.store(picked_out + row, tl.where(kept, picked, 0.0), mask=row < rows)


@triton.jit
def logit_gradient_kernel(
    logits, target, scale, columns, bounds, a_in, da_in, db_in, dpicked_in, out, rows, width, segments,
    MODE: tl.constexpr, HAS_COLUMNS: tl.constexpr, ACC: tl.constexpr, R: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One tile of the gradient; `out` may be the logits."""
    row = (tl.program_id(0) * R + tl.arange(0, R))[:, None]
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = (row < rows) & (cols < width)
    y = tl.load(target + row, mask=row < rows, other=-1)
    a = tl.load(a_in + row, mask=row < rows, other=0.0)
    da = tl.load(da_in + row, mask=row < rows, other=0.0)
    label = tl.load(dpicked_in + row, mask=row < rows, other=0.0)
    at = row.to(tl.int64) * width + cols
    x = tl.load(logits + at, mask=mask, other=0.0).to(ACC)
    if MODE == 0:
        db = tl.load(db_in + row, mask=row < rows, other=0.0)
        d = (2 * db * (x - a) + da) / width
        d = tl.where(cols == y, d + label, d)
    elif MODE == 1:
        s = 1 / (1 - tl.where(x >= 0, 0.0, x))
        d = tl.where(cols == y, label, da * tl.where(x >= 0, 1.0, s * s))
    else:
        r = tl.load(scale + row, mask=row < rows, other=0.0)
        if HAS_COLUMNS:
            c = tl.load(columns + cols, mask=cols < width, other=0.0)
            w = r * c * tl.exp(x * c * r - a)
            label = label * c
        else:
            w = r * tl.exp(x * r - a)
        d = tl.where(cols == y, label, tl.where(da == 0, 0.0, da * w))
        if MODE == 3:
            beta = tl.zeros((R, BLOCK), ACC)
            for t in range(segments):
                here = (cols >= tl.load(bounds + t)) & (cols < tl.load(bounds + t + 1))
                db = tl.load(db_in + row.to(tl.int64) * segments + t, mask=row < rows, other=0.0)
                beta = tl.where(here, db, beta)
            d += beta * x
    d = tl.where(y >= 0, d, 0.0)
    tl.store(out + at, d.to(out.dtype.element_ty), mask=mask)


# ---- launchers ---------------------------------------------------------------------------------------


def _config(width: int) -> dict[str, int]:
    """Narrow rows several at a time, wide ones in tiles of 4096 columns."""
    block = min(4096, max(16, triton.next_power_of_2(width)))
    rows = max(1, 1024 // block)
    return {"R": rows, "BLOCK": block, "num_warps": 4 if rows * block <= 2048 else 8}


def logit_statistics(logits, target, scale, columns, bounds, eps, mode):
    logits, target = logits.contiguous(), target.contiguous()
    rows, width = logits.shape
    acc = accumulate_type(logits)
    a, b, picked = (logits.new_empty(rows, dtype=acc) for _ in range(3))
    segments = bounds.shape[0] - 1 if mode == NORMALIZED else 0
    norms = logits.new_empty((rows, segments) if mode == NORMALIZED else (0,), dtype=acc)
    if rows == 0:
        return a, b, picked, norms
    config = _config(width)
    with on_device_of(logits):
        logit_statistics_kernel[(triton.cdiv(rows, config["R"]),)](
            logits, target, a if scale is None else scale.contiguous(),
            a if columns is None else columns.contiguous(), target if bounds is None else bounds.contiguous(),
            a, b, picked, norms, rows, width, segments, eps, LOWEST.get(acc, -3.0e38), MODE=mode,
            HAS_COLUMNS=columns is not None, ACC=accumulator(logits), **config,
        )  # fmt: skip
    return a, b, picked, norms


def _gradient(logits, target, scale, columns, bounds, a, da, db, dpicked, mode, out):
    rows, width = logits.shape
    if logits.numel() == 0:
        return
    config = _config(width)
    grid = (triton.cdiv(rows, config["R"]), triton.cdiv(width, config["BLOCK"]))
    segments = bounds.shape[0] - 1 if mode == NORMALIZED else 0
    with on_device_of(logits):
        logit_gradient_kernel[grid](
            logits, target.contiguous(), a if scale is None else scale.contiguous(),
            a if columns is None else columns.contiguous(), target if bounds is None else bounds.contiguous(),
            a.contiguous(), da.contiguous(), db.contiguous(), dpicked.contiguous(), out, rows, width,
            segments, MODE=mode, HAS_COLUMNS=columns is not None, ACC=accumulator(logits), **config,
        )  # fmt: skip


def logit_gradient(logits, target, scale, columns, bounds, a, da, db, dpicked, mode):
    logits = logits.contiguous()
    out = torch.empty_like(logits)
    _gradient(logits, target, scale, columns, bounds, a, da, db, dpicked, mode, out)
    return out


def logit_gradient_(logits, target, scale, columns, bounds, a, da, db, dpicked, mode):
    dense = logits.contiguous()
    _gradient(dense, target, scale, columns, bounds, a, da, db, dpicked, mode, dense)
    if dense is not logits:
        logits.copy_(dense)


# ---- ahead-of-time compilation -----------------------------------------------------------------------


def aot() -> Iterator:
    """Every mode on a vocabulary's rows, the softmax also on narrow rows and with column factors."""
    from .._aot import AotCase

    half, acc, label = "*bf16", "*fp32", "*i64"
    inputs = {"logits": half, "target": label, "scale": acc, "columns": acc, "bounds": label}
    sizes = {"rows": "i32", "width": "i32", "segments": "i32"}
    names = ("moments", "stablemax", "softmax", "normalized")
    variants = [(mode, 65536, False) for mode in range(4)] + [
        (SOFTMAX, 128, False),
        (SOFTMAX, 65536, True),
    ]
    for mode, width, has_columns in variants:
        config = _config(width)
        warps = config.pop("num_warps")
        constants = {"MODE": mode, "HAS_COLUMNS": has_columns, "ACC": tl.float32, **config}
        tail = f"{names[mode]}_{width}{'_columns' if has_columns else ''}"
        outputs = {"a_out": acc, "b_out": acc, "picked_out": acc, "norms": acc}
        yield AotCase(
            name=f"logit_statistics_{tail}",
            fn=logit_statistics_kernel,
            signature={**inputs, **outputs, **sizes, "eps": "fp32", "lowest": "fp32"},
            constexprs=constants,
            divisible_by_16=(*inputs, *outputs, "width"),
            num_warps=warps,
        )
        given = {"a_in": acc, "da_in": acc, "db_in": acc, "dpicked_in": acc, "out": half}
        yield AotCase(
            name=f"logit_gradient_{tail}",
            fn=logit_gradient_kernel,
            signature={**inputs, **given, **sizes},
            constexprs=constants,
            divisible_by_16=(*inputs, *given, "width"),
            num_warps=warps,
        )
