"""GPU kernels of core `member_logits`: the formulas are in solera/ensemble/member_logits.py.

Bytes: the sums read the N K rows of C logits once, the gradient reads them and writes as many. A program walks R rows
in tiles of BLOCK columns, with the sum rescaled whenever a tile raises the maximum; the weighted row of all members is
made tile by tile. The gradient to the weights is summed in two stages: a program's tile, then the tiles in order.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl

from .._launch import accumulate_type, accumulator, on_device_of
from ._members import LOWEST, gradient_like, row_config, stacked


@triton.jit
def _tile(
    z, weights, n, k, cols, mask, members, stride_n, stride_k, COMBINED: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """v of a tile [R, BLOCK]: the member's own logits or the weighted sum of all."""
    if COMBINED:
        v = tl.zeros(mask.shape, ACC)
        for m in range(members):
            at = n.to(tl.int64) * stride_n + (n * 0 + m).to(tl.int64) * stride_k + cols
            w = tl.load(weights + n.to(tl.int64) * members + m, mask=n >= 0, other=0.0)
            v += w * tl.load(z + at, mask=mask, other=0.0).to(ACC)
    else:
        at = n.to(tl.int64) * stride_n + k.to(tl.int64) * stride_k + cols
        v = tl.load(z + at, mask=mask, other=0.0).to(ACC)
    return v


@triton.jit
def member_sums_kernel(
    z, target, weights, lse, logp, rows, members, width, stride_n, stride_k, lowest,
    COMBINED: tl.constexpr, ACC: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * R + tl.arange(0, R))[:, None]  # [R, 1]
    lane = tl.arange(0, BLOCK)[None, :]  # [1, BLOCK]
    kept = row < rows
    each = tl.where(kept, row, 0)  # rows past the end read the first and store nothing
    n = each if COMBINED else each // members
    k = each * 0 if COMBINED else each % members
    y = tl.load(target + n)
    inside = (y >= 0) & (y < width)
    at_label = tl.where(inside, y, 0)
    picked = _tile(
        z, weights, n, k, at_label, inside & kept, members, stride_n, stride_k, COMBINED, ACC
    )
    top = tl.zeros((R, 1), ACC) + lowest
    total = tl.zeros((R, 1), ACC)
    for j in range(0, width, BLOCK):
        cols = j + lane
        mask = kept & (cols < width)
        v = _tile(z, weights, n, k, cols, mask, members, stride_n, stride_k, COMBINED, ACC)
        v = tl.where(mask, v, float("-inf"))
        here = tl.maximum(top, tl.max(v, 1)[:, None])
        total = total * tl.exp(top - here) + tl.sum(tl.exp(v - here), 1)[:, None]
        top = here
    none = total == 0
    logs = tl.where(none, float("-inf"), tl.log(tl.where(none, 1.0, total)))
    found = tl.where(inside & (total != 0), picked - top - logs, float("nan"))
    counted = y >= 0
    tl.store(lse + row, tl.where(counted, top + logs, 0.0), mask=kept)
    tl.store(logp + row, tl.where(counted, found, 0.0), mask=kept)


@triton.jit
def member_softmax_kernel(
    z, target, weights, lse_in, a_in, b_in, out, partial, rows, members, width, stride_n, stride_k,
    out_n, out_k, lowest, COMBINED: tl.constexpr, MOMENT: tl.constexpr, ACC: tl.constexpr,
    R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One tile of the gradient; with MOMENT also its part of the gradient to the weights."""
    row = (tl.program_id(0) * R + tl.arange(0, R))[:, None]
    tile = tl.program_id(1)
    cols = tile * BLOCK + tl.arange(0, BLOCK)[None, :]
    kept = row < rows
    each = tl.where(kept, row, 0)
    n = each if COMBINED else each // members
    k = each * 0 if COMBINED else each % members
    mask = kept & (cols < width)
    y = tl.load(target + n)
    v = _tile(z, weights, n, k, cols, mask, members, stride_n, stride_k, COMBINED, ACC)
    d = tl.load(a_in + each) * tl.exp(v - tl.load(lse_in + each))
    d = tl.where(cols == y, d + tl.load(b_in + each), d)
    d = tl.where((y >= 0) & mask, d, 0.0)
    if COMBINED:
        for m in range(members):
            w = tl.load(weights + n.to(tl.int64) * members + m)
            at = n.to(tl.int64) * out_n + (n * 0 + m).to(tl.int64) * out_k + cols
            tl.store(out + at, (w * d).to(out.dtype.element_ty), mask=mask)
            if MOMENT:
                at = n.to(tl.int64) * stride_n + (n * 0 + m).to(tl.int64) * stride_k + cols
                x = tl.load(z + at, mask=mask, other=0.0).to(ACC)
                x = tl.where(x < lowest, lowest, x)
                part = tl.sum(d * x, 1)[:, None]
                to = (tile.to(tl.int64) * rows + row) * members + m
                tl.store(partial + to, part, mask=kept)
    else:
        at = n.to(tl.int64) * out_n + k.to(tl.int64) * out_k + cols
        tl.store(out + at, d.to(out.dtype.element_ty), mask=mask)


# ---- launchers ---------------------------------------------------------------------------------------


def member_logsumexp(logits, target, weights):
    z = stacked(logits)
    rows, members, width = z.shape
    acc = accumulate_type(z)
    columns = members if weights is None else 1
    lse, logp = (z.new_empty((rows, columns), dtype=acc) for _ in range(2))
    if lse.numel() == 0:
        return lse, logp
    config = row_config(width)
    grid = (triton.cdiv(rows * columns, config["R"]),)
    with on_device_of(z):
        member_sums_kernel[grid](
            z, target.contiguous(), lse if weights is None else weights.contiguous(), lse, logp,
            rows * columns, members, width, z.stride(0), z.stride(1), LOWEST[acc],
            COMBINED=weights is not None, ACC=accumulator(z), **config,
        )  # fmt: skip
    return lse, logp


def member_softmax(logits, target, weights, lse, a, b, need_weights):
    z = stacked(logits)
    rows, members, width = z.shape
    acc = accumulate_type(z)
    out, out_n, out_k = gradient_like(z, logits)
    combined = weights is not None
    moment = combined and need_weights
    count = rows if combined else rows * members
    config = row_config(width)
    tiles = triton.cdiv(width, config["BLOCK"])
    partial = z.new_empty((tiles, rows, members) if moment else (0,), dtype=acc)
    if z.numel():
        grid = (triton.cdiv(count, config["R"]), tiles)
        with on_device_of(z):
            member_softmax_kernel[grid](
                z, target.contiguous(), lse if not combined else weights.contiguous(), lse.contiguous(),
                a.contiguous(), b.contiguous(), out, partial, count, members, width, z.stride(0),
                z.stride(1), out_n, out_k, LOWEST[acc], COMBINED=combined, MOMENT=moment,
                ACC=accumulator(z), **config,
            )  # fmt: skip
    return out, partial.sum(0) if moment else partial


def member_cross_entropy(logits, target, weights, scale, kind, need_logits, need_weights):
    """Sums, then the gradient: a row in flight is read again from L2 where it fits there."""
    from solera.ensemble.member_logits import cross_entropy_by_sums

    return cross_entropy_by_sums(
        member_logsumexp,
        member_softmax,
        logits,
        target,
        weights,
        scale,
        kind,
        need_logits,
        need_weights,
    )


# ---- ahead-of-time compilation -----------------------------------------------------------------------


def aot() -> Iterator:
    """A vocabulary's rows and narrow ones, members apart and combined, with and without weights' gradients."""
    from .._aot import AotCase

    half, acc = "*bf16", "*fp32"
    inputs = {"z": half, "target": "*i64", "weights": acc}
    sizes = dict.fromkeys(("rows", "members", "width", "stride_n", "stride_k"), "i32")
    aligned = ("width", "stride_n", "stride_k")
    for width, combined, moment in (
        (65536, False, False),
        (65536, True, False),
        (65536, True, True),
        (128, False, False),
        (128, True, True),
    ):
        config = row_config(width)
        warps = config.pop("num_warps")
        constants = {"COMBINED": combined, "ACC": tl.float32, **config}
        tail = f"{width}{'_combined' if combined else ''}{'_moment' if moment else ''}"
        if not moment or width == 128:
            yield AotCase(
                name=f"member_sums_{tail}",
                fn=member_sums_kernel,
                signature={**inputs, "lse": acc, "logp": acc, **sizes, "lowest": "fp32"},
                constexprs=constants,
                divisible_by_16=(*inputs, "lse", "logp", *aligned),
                num_warps=warps,
            )
        given = {"lse_in": acc, "a_in": acc, "b_in": acc, "out": half, "partial": acc}
        strides = {"out_n": "i32", "out_k": "i32"}
        yield AotCase(
            name=f"member_softmax_{tail}",
            fn=member_softmax_kernel,
            signature={**inputs, **given, **sizes, **strides, "lowest": "fp32"},
            constexprs={**constants, "MOMENT": moment},
            divisible_by_16=(*inputs, *given, *aligned, *strides),
            num_warps=warps,
        )
