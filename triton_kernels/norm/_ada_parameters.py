"""The parameters of core `ada_norm` on the GPU: rows of any form, and their gradients from the sums of a sample."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .._launch import on_device_of
from .row_norm import sum_partials_kernel


@triton.jit
def parameter_of(p, sample, token, sample_step, token_step, cols, mask, ACC: tl.constexpr):
    """A parameter's tile: sample and token [R, 1], cols [1, C]."""
    at = p + sample.to(tl.int64) * sample_step + token.to(tl.int64) * token_step + cols
    return tl.load(at, mask=mask, other=0.0).to(ACC)


@triton.jit
def of_table(p, sample, step, index, sets, cols, mask, INDEXED: tl.constexpr, ACC: tl.constexpr):
    """Weight or bias: one row for all (step 0), or the row of a table that index names; NaN outside it."""
    pick = sample
    inside = mask
    if INDEXED:
        pick = tl.load(index + sample, mask=tl.max(mask.to(tl.int32), 1)[:, None] > 0, other=0)
        inside = mask & (pick >= 0) & (pick < sets)
    at = p + pick.to(tl.int64) * step + cols
    return tl.where(inside, tl.load(at, mask=inside, other=0.0).to(ACC), float("nan"))


@triton.jit
def ada_norm_finish_kernel(
    P, Q, E, scale, weight, bias, index, dgate, dscale, dshift, dweight, dbias, scale_step,
    weight_step, bias_step, sets, parts, columns,
    NEED_P: tl.constexpr, NEED_Q: tl.constexpr, NEED_GATE: tl.constexpr, NEED_SCALE: tl.constexpr,
    NEED_SHIFT: tl.constexpr, NEED_WEIGHT: tl.constexpr, NEED_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    INDEXED: tl.constexpr, ACC: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """One sample's gradients from the sums of its parts: a row of each."""
    sample = tl.program_id(1) + tl.zeros((1, 1), tl.int32)
    cols = (tl.program_id(0) * C + tl.arange(0, C))[None, :]
    mask = cols < columns
    p = tl.zeros((1, C), ACC)
    q = tl.zeros((1, C), ACC)
    e = tl.zeros((1, C), ACC)
    at = sample.to(tl.int64) * parts * columns + cols
    for _ in range(parts):
        if NEED_P:
            p += tl.load(P + at, mask=mask, other=0.0)
        if NEED_Q:
            q += tl.load(Q + at, mask=mask, other=0.0)
        if NEED_GATE:
            e += tl.load(E + at, mask=mask, other=0.0)
        at += columns
    at = sample.to(tl.int64) * columns + cols
    if NEED_GATE:
        tl.store(dgate + at, e, mask=mask)
    if NEED_SHIFT:
        tl.store(dshift + at, q, mask=mask)
    if NEED_SCALE:
        ds = p
        if HAS_WEIGHT:
            ds = p * of_table(weight, sample, weight_step, index, sets, cols, mask, INDEXED, ACC)
        if HAS_BIAS:
            ds += q * of_table(bias, sample, bias_step, index, sets, cols, mask, INDEXED, ACC)
        tl.store(dscale + at, ds, mask=mask)
    s = tl.full((1, C), 1.0, ACC)
    if HAS_SCALE:
        s += parameter_of(scale, sample, sample, scale_step, 0, cols, mask, ACC)
    if NEED_WEIGHT:
        tl.store(dweight + at, s * p, mask=mask)
    if NEED_BIAS:
        tl.store(dbias + at, s * q, mask=mask)


@triton.jit
def ada_norm_segments_kernel(values, order, starts, out, columns, C: tl.constexpr):
    """out[set] = sum of values[sample] over the samples of the set, in their order."""
    segment = tl.program_id(1)
    cols = tl.program_id(0) * C + tl.arange(0, C)
    total = tl.zeros((C,), values.dtype.element_ty)
    first = tl.load(starts + segment)
    for k in range(tl.load(starts + segment + 1) - first):
        sample = tl.load(order + first + k)
        total += tl.load(values + sample * columns + cols, mask=cols < columns, other=0.0)
    tl.store(out + segment.to(tl.int64) * columns + cols, total, mask=cols < columns)


def rows_of(p):
    """A parameter whose rows have no gaps, and its steps a sample and a token; zeros where there is none."""
    if p is None:
        return None, 0, 0
    if p.shape[-1] > 1 and p.stride(-1) != 1:
        p = p.contiguous()
    return p, p.stride(0) if p.dim() > 1 else 0, p.stride(1) if p.dim() > 2 else 0


def whole(rows, dim, h, index, sets):
    """The gradient of a parameter from one row a sample."""
    samples, columns = rows.shape
    if dim == 2 and index is None:
        return rows
    if samples == 1 and index is None:
        return rows.view(columns)
    out = rows.new_zeros((sets, columns) if dim == 2 else (columns,))
    if rows.numel() == 0:
        return out
    with on_device_of(h):
        if dim == 1:
            grid = (triton.cdiv(columns, 128),)
            sum_partials_kernel[grid](rows, out, samples, columns, C=128, num_warps=4)
        else:
            ordered, order = index.sort(stable=True)
            starts = torch.searchsorted(ordered, torch.arange(sets + 1, device=h.device))
            ada_norm_segments_kernel[(triton.cdiv(columns, 128), sets)](
                rows, order, starts, out, columns, C=128, num_warps=4
            )
    return out
