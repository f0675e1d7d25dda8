"""GPU kernels of core `moments2`: the formulas are in solera/norm/moments2.py.

Bytes: moments read a segment's columns twice (the second time from L2 while they fit), scatter centres rows as it
loads them and reads them once for each tile of columns it meets; pairs read two rows each; pooling reads the
kept tokens once. Operations of a scatter: D (D + 64) N, tiles on and above the diagonal.

A program owns its output: no atomics, one order of every sum. A segment is walked by one program for each tile of
columns, so a single long segment of few columns leaves most of a GPU idle.

H200 at 4.3 TB/s: pooling 2 x 256 x 128 x 768 bfloat16 (101 MB) 23 us.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from .._launch import accumulate_type, accumulator, on_device_of

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
MOMENTS = {"BM": 32, "BN": 64, "num_warps": 4}
SCATTER = {"BM": 32, "BN": 64, "num_warps": 8}
PAIR = {"BL": 1024, "num_warps": 4}
POOL = {"BT": 16, "BN": 128, "num_warps": 4}


@triton.jit
def _rows(x, order, n, last, j, columns, ORDERED: tl.constexpr, ACC: tl.constexpr):
    """Rows n of x (through `order`) at columns j, 0 outside: [BM, BN] and its mask."""
    row = n
    if ORDERED:
        row = tl.load(order + n, mask=n < last, other=0)
    mask = (n < last)[:, None] & (j < columns)[None, :]
    return tl.load(x + row[:, None] * columns + j[None, :], mask=mask, other=0.0).to(ACC), mask


@triton.jit
def segment_moments_kernel(
    x, order, offsets, mean, squares, columns, ORDERED: tl.constexpr, ACC: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    segment = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * BN + tl.arange(0, BN)
    first = tl.load(offsets + segment)
    last = tl.load(offsets + segment + 1)
    total = tl.zeros((BM, BN), ACC)
    for start in range(first, last, BM):
        n = start + tl.arange(0, BM)
        total += _rows(x, order, n, last, j, columns, ORDERED, ACC)[0]
    count = tl.maximum(last - first, 1).to(ACC)
    m = tl.sum(total, 0) / count
    total = tl.zeros((BM, BN), ACC)
    for start in range(first, last, BM):
        n = start + tl.arange(0, BM)
        v, mask = _rows(x, order, n, last, j, columns, ORDERED, ACC)
        d = tl.where(mask, v - m[None, :], 0.0)
        total += d * d
    at = segment * columns + j
    tl.store(mean + at, m, mask=j < columns)
    tl.store(squares + at, tl.sum(total, 0), mask=j < columns)


@triton.jit
def segment_scatter_kernel(
    x, order, offsets, mean, out, columns, ORDERED: tl.constexpr, ACC: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One tile of a segment's D x D sum, and its mirror image."""
    segment = tl.program_id(0).to(tl.int64)
    if tl.program_id(2) >= tl.program_id(1):
        i = tl.program_id(1) * BN + tl.arange(0, BN)
        j = tl.program_id(2) * BN + tl.arange(0, BN)
        first = tl.load(offsets + segment)
        last = tl.load(offsets + segment + 1)
        mi = tl.load(mean + segment * columns + i, mask=i < columns, other=0.0).to(ACC)
        mj = tl.load(mean + segment * columns + j, mask=j < columns, other=0.0).to(ACC)
        acc = tl.zeros((BN, BN), ACC)
        for start in range(first, last, BM):
            n = start + tl.arange(0, BM)
            a, inside = _rows(x, order, n, last, i, columns, ORDERED, ACC)
            a = tl.where(inside, a - mi[None, :], 0.0)
            b, inside = _rows(x, order, n, last, j, columns, ORDERED, ACC)
            b = tl.where(inside, b - mj[None, :], 0.0)
            acc = tl.dot(tl.trans(a), b, acc, input_precision="ieee", out_dtype=ACC)
        base = out + segment * columns * columns
        # Of a tile on the diagonal the upper half serves both: a product need not be symmetric to the last bit.
        mask = (i[:, None] <= j[None, :]) & (j < columns)[None, :]
        wide_i = i.to(tl.int64)[:, None]
        wide_j = j.to(tl.int64)[None, :]
        tl.store(base + wide_j * columns + wide_i, acc, mask=mask)
        tl.store(base + wide_i * columns + wide_j, acc, mask=mask)


@triton.jit
def pair_dots_kernel(x, pairs, out, count, channels, length, ACC: tl.constexpr, BL: tl.constexpr):
    k = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    i = tl.load(pairs + 2 * k)
    j = tl.load(pairs + 2 * k + 1)
    total = tl.zeros((BL,), ACC)
    for start in range(0, length, BL):
        at = start + tl.arange(0, BL)
        u = tl.load(x + (b * channels + i) * length + at, mask=at < length, other=0.0).to(ACC)
        v = tl.load(x + (b * channels + j) * length + at, mask=at < length, other=0.0).to(ACC)
        total += u * v
    tl.store(out + b * count + k, tl.sum(total, 0))


@triton.jit
def pair_dots_backward_kernel(
    grad,
    x,
    start_of,
    entry,
    other,
    dx,
    count,
    channels,
    length,
    ACC: tl.constexpr,
    BL: tl.constexpr,
):
    """A stretch of one channel's gradient: its entries in order, each with its partner's row."""
    c = tl.program_id(0).to(tl.int64)
    b = tl.program_id(1).to(tl.int64)
    at = tl.program_id(2) * BL + tl.arange(0, BL)
    total = tl.zeros((BL,), ACC)
    for e in range(tl.load(start_of + c), tl.load(start_of + c + 1)):
        g = tl.load(grad + b * count + tl.load(entry + e)).to(ACC)
        row = b * channels + tl.load(other + e)
        total += g * tl.load(x + row * length + at, mask=at < length, other=0.0).to(ACC)
    tl.store(dx + (b * channels + c) * length + at, total.to(dx.dtype.element_ty), mask=at < length)


@triton.jit
def pool_layers_kernel(
    h, mask, out, layers, batch, tokens, columns, ACC: tl.constexpr, BT: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * BN + tl.arange(0, BN)
    total = tl.zeros((BT, BN), ACC)
    kept = tl.zeros((BT,), tl.int32)
    for first in range(0, tokens, BT):
        t = first + tl.arange(0, BT)
        keep = tl.load(mask + b * tokens + t, mask=t < tokens, other=0) != 0
        kept += keep.to(tl.int32)
        inside = keep[:, None] & (j < columns)[None, :]
        for s in range(layers):
            row = ((tl.zeros((), tl.int64) + s) * batch + b) * tokens + t
            at = row[:, None] * columns + j[None, :]
            total += tl.load(h + at, mask=inside, other=0.0).to(ACC)
    count = tl.maximum(tl.sum(kept, 0) * layers, 1).to(ACC)
    y = tl.sum(total, 0) / count
    tl.store(out + b * columns + j, y.to(out.dtype.element_ty), mask=j < columns)


# ---- launchers ---------------------------------------------------------------------------------------


def segment_moments(x, order, offsets):
    x = x.contiguous()
    classes, columns = offsets.shape[0] - 1, x.shape[1]
    mean, squares = (x.new_zeros((classes, columns), dtype=accumulate_type(x)) for _ in range(2))
    if mean.numel() and x.numel():
        with on_device_of(x):
            segment_moments_kernel[(classes, triton.cdiv(columns, MOMENTS["BN"]))](
                x, x if order is None else order.contiguous(), offsets.contiguous(), mean, squares,
                columns, ORDERED=order is not None, ACC=accumulator(x), **MOMENTS,
            )  # fmt: skip
    return mean, squares


def segment_scatter(x, order, offsets, mean):
    x = x.contiguous()
    classes, columns = offsets.shape[0] - 1, x.shape[1]
    out = x.new_zeros((classes, columns, columns), dtype=accumulate_type(x))
    if out.numel() and x.numel():
        config = dict(SCATTER)
        if x.dtype == torch.float64:
            config["BN"] = 32
        tiles = triton.cdiv(columns, config["BN"])
        with on_device_of(x):
            segment_scatter_kernel[(classes, tiles, tiles)](
                x, x if order is None else order.contiguous(), offsets.contiguous(),
                mean.contiguous(), out, columns, ORDERED=order is not None, ACC=accumulator(x), **config,
            )  # fmt: skip
    return out


def pair_dots(x, pairs):
    x = x.contiguous()
    batch, channels, length = x.shape
    count = pairs.shape[0]
    out = x.new_empty((batch, count), dtype=accumulate_type(x))
    if out.numel():
        with on_device_of(x):
            pair_dots_kernel[(count, batch)](
                x, pairs.contiguous(), out, count, channels, length, ACC=accumulator(x), **PAIR
            )
    return out


def pair_dots_backward(grad, x, pairs):
    x, grad = x.contiguous(), grad.contiguous()
    batch, channels, length = x.shape
    dx = x.new_empty(x.shape)
    if dx.numel():
        # By channel, the pairs it is in, in their order; position n is side n % 2 of pair n // 2.
        channel, place = torch.sort(pairs.flatten(), stable=True)
        start = torch.searchsorted(channel, torch.arange(channels + 1, device=x.device))
        other = pairs.flip(1).flatten()[place]
        with on_device_of(x):
            pair_dots_backward_kernel[(channels, batch, triton.cdiv(length, PAIR["BL"]))](
                grad, x, start, place // 2, other, dx, pairs.shape[0], channels, length,
                ACC=accumulator(x), **PAIR,
            )  # fmt: skip
    return dx


def pool_layers(h, mask):
    h = h.contiguous()
    layers, batch, tokens, columns = h.shape
    out = h.new_empty((batch, columns))
    if out.numel():
        with on_device_of(h):
            pool_layers_kernel[(batch, triton.cdiv(columns, POOL["BN"]))](
                h, mask.contiguous().view(torch.uint8), out, layers, batch, tokens, columns,
                ACC=accumulator(h), **POOL,
            )  # fmt: skip
    return out


# ---- ahead-of-time compilation -----------------------------------------------------------------------


def aot() -> Iterator:
    """The variants held to tests/budgets.json, of float32 and bfloat16 rows."""
    from .._aot import AotCase

    acc, index = "*fp32", "*i64"

    def options(config, **flags):
        config = dict(config)
        warps = config.pop("num_warps")
        return {"constexprs": {**flags, "ACC": tl.float32, **config}, "num_warps": warps}

    for name, element in (("fp32", acc), ("bf16", "*bf16")):
        rows = {"x": element, "order": index, "offsets": index, "mean": acc}
        yield AotCase(
            name=f"segment_moments_{name}",
            fn=segment_moments_kernel,
            signature={**rows, "squares": acc, "columns": "i32"},
            divisible_by_16=(*rows, "squares", "columns"),
            **options(MOMENTS, ORDERED=True),
        )
        yield AotCase(
            name=f"segment_scatter_{name}",
            fn=segment_scatter_kernel,
            signature={**rows, "out": acc, "columns": "i32"},
            divisible_by_16=(*rows, "out", "columns"),
            **options(SCATTER, ORDERED=True),
        )
        sizes = {"count": "i32", "channels": "i32", "length": "i32"}
        yield AotCase(
            name=f"pair_dots_{name}",
            fn=pair_dots_kernel,
            signature={"x": element, "pairs": index, "out": acc, **sizes},
            divisible_by_16=("x", "pairs", "out", "length"),
            **options(PAIR),
        )
        lists = {"start_of": index, "entry": index, "other": index}
        yield AotCase(
            name=f"pair_dots_backward_{name}",
            fn=pair_dots_backward_kernel,
            signature={"grad": acc, "x": element, **lists, "dx": element, **sizes},
            divisible_by_16=("grad", "x", *lists, "dx", "length"),
            **options(PAIR),
        )
        yield AotCase(
            name=f"pool_layers_{name}",
            fn=pool_layers_kernel,
            signature={
                "h": element, "mask": "*u8", "out": element, "layers": "i32", "batch": "i32",
                "tokens": "i32", "columns": "i32",
            },
            divisible_by_16=("h", "mask", "out", "columns"),
            **options(POOL),
        )  # fmt: skip
