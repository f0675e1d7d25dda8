"""GPU kernels of core `routing`: the formulas are in solera/ensemble/routing.py.

Bytes a row of C logits: scores and windows read it twice, the second time from L2 while the rows in flight fit
there; backward reads it and writes one row. Compaction writes one flag a row, then reads the flags twice: once for
each block's count, once for the rows' places. No host waits for anything here.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from .._launch import accumulate_type, accumulator, on_device_of

FLAGS = {"BLOCK": 1024, "num_warps": 4}
MERGE = {"R": 4, "BLOCK": 256, "num_warps": 4}


@triton.jit
def _log1p(x):
    """log(1 + x) for x >= 0, its last digits from x itself (Kahan)."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def _one_less_exp(d):
    """1 - e^d for d <= 0, by the same device."""
    u = tl.exp(d)
    inner = (u != 1.0) & (u > 1e-30)
    logarithm = tl.log(tl.where(inner, u, 0.5))
    return tl.where(u == 1.0, -d, tl.where(inner, (1.0 - u) * (d / logarithm), 1.0))


@triton.jit
def routing_scores_kernel(
    logits, scores, top, exited, rows, width, low_at, high_at, KIND: tl.constexpr,
    SCORES: tl.constexpr, ACC: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """SCORES: the four scores and the two largest columns; otherwise the window's test of score KIND."""
    row = (tl.program_id(0) * R + tl.arange(0, R))[:, None]  # [R, 1]
    lane = tl.arange(0, BLOCK)[None, :]  # [1, BLOCK]
    base = logits + row.to(tl.int64) * width
    best = tl.full((R, 1), float("-inf"), ACC)
    after = tl.full((R, 1), float("-inf"), ACC)
    first = tl.zeros((R, 1), tl.int32)
    second = tl.zeros((R, 1), tl.int32) + 1
    wrong = tl.zeros((R, 1), tl.int32)
    for j in range(0, width, BLOCK):
        cols = j + lane
        mask = (row < rows) & (cols < width)
        v = tl.load(base + cols, mask=mask, other=float("-inf")).to(ACC)
        wrong += tl.sum((v != v).to(tl.int32), 1)[:, None]
        v1 = tl.max(v, 1)[:, None]
        i1 = tl.min(tl.where((v == v1) & (cols < width), cols, width), 1)[:, None]
        u = tl.where(cols == i1, float("-inf"), v)
        v2 = tl.max(u, 1)[:, None]
        held = (u == v2) & (cols < width) & (cols != i1)
        i2 = tl.min(tl.where(held, cols, width), 1)[:, None]
        higher = v1 > best
        rival = tl.where(higher, best, v1)
        rival_at = tl.where(higher, first, i1)
        other = tl.where(higher, v2, after)
        other_at = tl.where(higher, i2, second)
        # Of equals the first column: an earlier tile's before this one's, and i1 before i2.
        takes = tl.where(higher, rival >= other, rival > other)
        after = tl.where(takes, rival, other)
        second = tl.where(takes, rival_at, other_at)
        best = tl.where(higher, v1, best)
        first = tl.where(higher, i1, first)
    second = tl.where((second == first) | (second >= width), (first == 0).to(tl.int32), second)
    infinite = (best - best) != 0
    usual = (wrong == 0) & (best != float("-inf")) & ((best != after) | (infinite == 0))
    total = tl.zeros((R, 1), ACC)
    weighted = tl.zeros((R, 1), ACC)
    for j in range(0, width, BLOCK):
        cols = j + lane
        mask = (row < rows) & (cols < width)
        v = tl.load(base + cols, mask=mask, other=float("-inf")).to(ACC)
        d = tl.maximum(v - best, -1000.0)
        counts = (cols != first) & (cols < width)
        e = tl.where(counts, tl.exp(d), 0.0)
        total += tl.sum(e, 1)[:, None]
        weighted += tl.sum(tl.where(counts, e * d, 0.0), 1)[:, None]
    rest = _log1p(total)
    msp = tl.where(usual, 1.0 / (1.0 + total), float("nan"))
    entropy = tl.where(usual, rest - weighted * msp, float("nan"))
    energy = tl.where(usual, -(best + rest), float("nan"))
    margin = tl.where(usual, _one_less_exp(tl.maximum(after - best, -1000.0)) * msp, float("nan"))
    if SCORES:
        at = scores + row
        tl.store(at, msp, mask=row < rows)
        tl.store(at + rows, entropy, mask=row < rows)
        tl.store(at + 2 * rows, energy, mask=row < rows)
        tl.store(at + 3 * rows, margin, mask=row < rows)
        tl.store(top + row, first.to(tl.int64), mask=row < rows)
        tl.store(top + rows + row, second.to(tl.int64), mask=row < rows)
    else:
        score = msp
        if KIND == 1:
            score = entropy
        elif KIND == 2:
            score = energy
        elif KIND == 3:
            score = margin
        done = (score > tl.load(high_at)) | (score < tl.load(low_at))
        tl.store(exited + row, done.to(tl.uint8), mask=row < rows)


@triton.jit
def routing_gradient_kernel(
    dscores, logits, scores, top, dlogits, rows, width, ACC: tl.constexpr, R: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * R + tl.arange(0, R))[:, None]
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = row < rows
    mask = inside & (cols < width)
    first = tl.load(top + row, mask=inside, other=0)
    second = tl.load(top + rows + row, mask=inside, other=0)
    base = logits + row.to(tl.int64) * width
    best = tl.load(base + first, mask=inside, other=0.0).to(ACC)
    msp = tl.load(scores + row, mask=inside, other=1.0)
    entropy = tl.load(scores + rows + row, mask=inside, other=0.0)
    margin = tl.load(scores + 3 * rows + row, mask=inside, other=0.0)
    g_msp = tl.load(dscores + row, mask=inside, other=0.0)
    g_entropy = tl.load(dscores + rows + row, mask=inside, other=0.0)
    g_energy = tl.load(dscores + 2 * rows + row, mask=inside, other=0.0)
    g_margin = tl.load(dscores + 3 * rows + row, mask=inside, other=0.0)
    fixed = g_entropy * (-tl.log(msp) - entropy) - g_energy - g_msp * msp - g_margin * margin
    v = tl.load(base + cols, mask=mask, other=0.0).to(ACC)
    d = tl.maximum(v - best, -1000.0)
    p = tl.exp(d) * msp
    extra = tl.where(cols == first, g_msp + g_margin, 0.0)
    extra -= tl.where(cols == second, g_margin, 0.0)
    dx = p * (fixed - g_entropy * d + extra)
    dx = tl.where(msp == msp, dx, float("nan"))
    tl.store(dlogits + row.to(tl.int64) * width + cols, dx.to(dlogits.dtype.element_ty), mask=mask)


@triton.jit
def routing_count_kernel(exited, counts, rows, BLOCK: tl.constexpr):
    """How many rows of a block stay."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    done = tl.load(exited + i, mask=i < rows, other=1)
    tl.store(counts + tl.program_id(0), tl.sum((done == 0).to(tl.int64), 0))


@triton.jit
def routing_compact_kernel(exited, counts, index, count, rows, blocks, BLOCK: tl.constexpr):
    """The places of a block's rows that stay; the last entries are -1."""
    block = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    before = tl.zeros((BLOCK,), tl.int64)
    every = tl.zeros((BLOCK,), tl.int64)
    for start in range(0, blocks, BLOCK):
        b = start + lane
        held = tl.load(counts + b, mask=b < blocks, other=0)
        before += tl.where(b < block, held, 0)
        every += held
    first = tl.sum(before, 0)
    total = tl.sum(every, 0)
    i = block * BLOCK + lane
    stays = tl.load(exited + i, mask=i < rows, other=1) == 0
    place = first + tl.cumsum(stays.to(tl.int64), 0) - 1
    tl.store(index + place, i.to(tl.int64), mask=stays)
    tl.store(index + i, tl.zeros((BLOCK,), tl.int64) - 1, mask=(i < rows) & (i >= total))
    if block == 0:
        tl.store(count, total)


@triton.jit
def routing_merge_kernel(
    out, compact, index, n, rows, width, weight_at, REPLACE: tl.constexpr, ACC: tl.constexpr,
    R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    j = (tl.program_id(0) * R + tl.arange(0, R))[:, None]
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    row = tl.load(index + j, mask=j < n, other=-1)
    mask = (row >= 0) & (row < rows) & (cols < width)
    new = tl.load(compact + j.to(tl.int64) * width + cols, mask=mask, other=0.0)
    at = out + row * width + cols
    if not REPLACE:
        weight = tl.load(weight_at)
        old = tl.load(at, mask=mask, other=0.0).to(ACC)
        new = (old * (1 - weight) + new.to(ACC) * weight).to(out.dtype.element_ty)
    tl.store(at, new, mask=mask)


# ---- launchers ---------------------------------------------------------------------------------------


def _config(width: int) -> dict[str, int]:
    """Narrow rows several at a time, wide ones in tiles of 4096 columns."""
    block = min(4096, max(16, triton.next_power_of_2(width)))
    rows = max(1, 1024 // block)
    return {"R": rows, "BLOCK": block, "num_warps": 4 if rows * block <= 2048 else 8}


def _number(value, like):
    """A number on the device in the accumulator's precision; a float argument would be a float32."""
    return like.new_full((), value, dtype=accumulate_type(like))


def _scores(x, scores, top, exited, low, high, kind):
    rows, width = x.shape
    config = _config(width)
    routing_scores_kernel[(triton.cdiv(rows, config["R"]),)](
        x, scores, top, exited, rows, width, low, high, KIND=kind, SCORES=kind < 0,
        ACC=accumulator(x), **config,
    )  # fmt: skip


def uncertainty_scores(logits):
    x = logits.contiguous()
    scores = x.new_empty((4, x.shape[0]), dtype=accumulate_type(x))
    top = x.new_empty((2, x.shape[0]), dtype=torch.int64)
    if x.shape[0]:
        with on_device_of(x):
            _scores(x, scores, top, x, x, x, -1)
    return scores, top


def uncertainty_scores_backward(dscores, logits, scores, top):
    x = logits.contiguous()
    dlogits = torch.empty_like(x)
    rows, width = x.shape
    if rows:
        config = _config(width)
        grid = (triton.cdiv(rows, config["R"]), triton.cdiv(width, config["BLOCK"]))
        with on_device_of(x):
            routing_gradient_kernel[grid](
                dscores.contiguous(), x, scores.contiguous(), top.contiguous(), dlogits, rows, width,
                ACC=accumulator(x), **config,
            )  # fmt: skip
    return dlogits


def window_exit(logits, low, high, kind):
    x = logits.contiguous()
    rows = x.shape[0]
    exited = x.new_empty(rows, dtype=torch.uint8)
    index = x.new_empty(rows, dtype=torch.int64)
    count = x.new_zeros((), dtype=torch.int64)
    if rows:
        blocks = triton.cdiv(rows, FLAGS["BLOCK"])
        counts = x.new_empty(blocks, dtype=torch.int64)
        with on_device_of(x):
            _scores(x, x, x, exited, _number(low, x), _number(high, x), kind)
            routing_count_kernel[(blocks,)](exited, counts, rows, **FLAGS)
            routing_compact_kernel[(blocks,)](exited, counts, index, count, rows, blocks, **FLAGS)
    return exited.bool(), index, count


def cascade_merge_(out, compact, index, weight):
    dense, rows = out.contiguous(), out.shape[0]
    n = index.shape[0]
    width = dense.numel() // max(rows, 1)
    if n == 0 or width == 0:
        return
    grid = (triton.cdiv(n, MERGE["R"]), triton.cdiv(width, MERGE["BLOCK"]))
    with on_device_of(out):
        routing_merge_kernel[grid](
            dense, compact.contiguous(), index.contiguous(), n, rows, width, _number(weight, out),
            REPLACE=weight == 1.0, ACC=accumulator(out), **MERGE,
        )  # fmt: skip
    if dense is not out:
        out.copy_(dense)


# ---- ahead-of-time compilation -----------------------------------------------------------------------


def aot() -> Iterator:
    """Scores, a window and the gradient of narrow and of wide bfloat16 rows; compaction; a running mean."""
    from .._aot import AotCase

    half, acc, label, flag = "*bf16", "*fp32", "*i64", "*u8"

    def options(config, **constants):
        config = dict(config)
        warps = config.pop("num_warps")
        return {"constexprs": {**constants, **config}, "num_warps": warps}

    for width in (128, 65536):
        for kind in (-1, 1):
            yield AotCase(
                name=f"routing_scores_{width}_{'window' if kind >= 0 else 'all'}",
                fn=routing_scores_kernel,
                signature={
                    "logits": half, "scores": acc, "top": label, "exited": flag, "rows": "i32",
                    "width": "i32", "low_at": acc, "high_at": acc,
                },
                divisible_by_16=("logits", "scores", "top", "exited", "width"),
                **options(_config(width), KIND=kind, SCORES=kind < 0, ACC=tl.float32),
            )  # fmt: skip
        yield AotCase(
            name=f"routing_gradient_{width}",
            fn=routing_gradient_kernel,
            signature={
                "dscores": acc, "logits": half, "scores": acc, "top": label, "dlogits": half,
                "rows": "i32", "width": "i32",
            },
            divisible_by_16=("dscores", "logits", "scores", "top", "dlogits", "width"),
            **options(_config(width), ACC=tl.float32),
        )  # fmt: skip
    yield AotCase(
        name="routing_count",
        fn=routing_count_kernel,
        signature={"exited": flag, "counts": label, "rows": "i32"},
        divisible_by_16=("exited", "counts"),
        **options(FLAGS),
    )
    yield AotCase(
        name="routing_compact",
        fn=routing_compact_kernel,
        signature={
            "exited": flag, "counts": label, "index": label, "count": label, "rows": "i32",
            "blocks": "i32",
        },
        divisible_by_16=("exited", "counts", "index", "count"),
        **options(FLAGS),
    )  # fmt: skip
    yield AotCase(
        name="routing_merge_mean",
        fn=routing_merge_kernel,
        signature={
            "out": half, "compact": half, "index": label, "n": "i32", "rows": "i32", "width": "i32",
            "weight_at": acc,
        },
        divisible_by_16=("out", "compact", "index", "width"),
        **options(MERGE, REPLACE=False, ACC=tl.float32),
    )  # fmt: skip
