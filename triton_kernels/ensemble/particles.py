"""GPU kernels of core `particles`: formulas in solera/ensemble/particles.py.

Bytes a particle of d elements: fkc_step m + 3 rows (m + 4 with a drift), afdps_step 5 rows; resampling reads and
writes each row once and streams the log weights three times. On an H200 at 4.3 TB/s, 100k particles of 64 float32
are gathered in 12 us, so the seven launches decide; none of them waits for the host.

Resampling without a barrier over the grid: sums a block, their prefix in one program, cumulative sums inside the
blocks, then every offspring finds its particle by bisection of the counts (17 reads from L2 at 100k).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from .._launch import accumulate_type, accumulator, on_device_of

BLOCK = 1024  # log weights a program
TILE = 1024  # elements of rows a program holds at once


def _halves(value: float) -> tuple[float, float]:
    """A double as two floats, which is what a launch can carry: 48 bits of it."""
    high = struct.unpack("f", struct.pack("f", value))[0]
    return high, 0.0 if math.isinf(high) else value - high


@triton.jit
def _number(high, low, ACC: tl.constexpr):
    return tl.full((1, 1), high, ACC) + tl.full((1, 1), low, ACC)


@triton.jit
def fkc_step_kernel(
    x, scores, betas, drift, divergence, noise, y, dlogw, rows, columns, models, rate_high, rate_low,
    variance_high, variance_low, dt_high, dt_low, root_high, root_low, inverse_high, inverse_low,
    HAS_DRIFT: tl.constexpr, HAS_DIVERGENCE: tl.constexpr, DENOISED: tl.constexpr, ACC: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64)[:, None]  # [R, 1]
    rate, variance = _number(rate_high, rate_low, ACC), _number(variance_high, variance_low, ACC)
    dt, root = _number(dt_high, dt_low, ACC), _number(root_high, root_low, ACC)
    inverse = _number(inverse_high, inverse_low, ACC)
    total_beta = tl.load(betas)
    for i in range(1, models):
        total_beta += tl.load(betas + i)
    excess = (total_beta - 1.0).to(ACC)
    terms = tl.zeros((R, C), ACC)
    step = rows.to(tl.int64) * columns
    for j in range(0, columns, C):
        cols = j + tl.arange(0, C)[None, :]  # [1, C]
        mask = (row < rows) & (cols < columns)
        at = row * columns + cols
        v = tl.load(x + at, mask=mask, other=0.0).to(ACC)
        first = tl.load(scores + at, mask=mask, other=0.0).to(ACC)
        if DENOISED:
            first = (first - v) * inverse
        lead = tl.zeros((R, C), ACC)
        squares = tl.zeros((R, C), ACC)
        for i in range(1, models):
            other = tl.load(scores + i * step + at, mask=mask, other=0.0).to(ACC)
            if DENOISED:
                other = (other - v) * inverse
            d = other - first
            weighted = d * tl.load(betas + i).to(ACC)
            lead += weighted
            squares += weighted * d
        total = first * (excess + 1.0) + lead
        if HAS_DRIFT:
            f = tl.load(drift + at, mask=mask, other=0.0).to(ACC)
        else:
            f = v * rate
        xi = tl.load(noise + at, mask=mask, other=0.0).to(ACC)
        moved = v + (total * variance - f) * dt + xi * root
        tl.store(y + at, moved.to(y.dtype.element_ty), mask=mask)
        terms += first * excess * (total + lead) + lead * lead - squares
    change = 0.5 * variance * tl.sum(terms, 1)[:, None]
    if HAS_DIVERGENCE:
        change += excess * tl.load(divergence + row, mask=row < rows, other=0.0).to(ACC)
    tl.store(dlogw + row, change * dt, mask=row < rows)


@triton.jit
def afdps_step_kernel(
    x, b, grad, laplacian, noise, y, dlogw, rows, columns, variance_high, variance_low, dt_high,
    dt_low, root_high, root_low, HAS_LAPLACIAN: tl.constexpr, ACC: tl.constexpr, R: tl.constexpr,
    C: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64)[:, None]
    variance = _number(variance_high, variance_low, ACC)
    dt, root = _number(dt_high, dt_low, ACC), _number(root_high, root_low, ACC)
    terms = tl.zeros((R, C), ACC)
    for j in range(0, columns, C):
        cols = j + tl.arange(0, C)[None, :]
        mask = (row < rows) & (cols < columns)
        at = row * columns + cols
        v = tl.load(x + at, mask=mask, other=0.0).to(ACC)
        prior = tl.load(b + at, mask=mask, other=0.0).to(ACC)
        g = tl.load(grad + at, mask=mask, other=0.0).to(ACC)
        xi = tl.load(noise + at, mask=mask, other=0.0).to(ACC)
        moved = v + (prior - g * variance) * dt + xi * root
        tl.store(y + at, moved.to(y.dtype.element_ty), mask=mask)
        terms += g * (g * (0.5 * variance) - prior)
    change = tl.sum(terms, 1)[:, None]
    if HAS_LAPLACIAN:
        change -= 0.5 * variance * tl.load(laplacian + row, mask=row < rows, other=0.0).to(ACC)
    tl.store(dlogw + row, change * dt, mask=row < rows)


@triton.jit
def resample_read_kernel(logw, sums, tops, count, B: tl.constexpr):
    """Sum (of those above -inf) and maximum of a block of log weights."""
    block = tl.program_id(0)
    i = block * B + tl.arange(0, B)
    v = tl.load(logw + i, mask=i < count, other=0.0).to(tl.float64)
    tl.store(sums + block, tl.sum(tl.where(v == float("-inf"), 0.0, v), 0))
    tl.store(tops + block, tl.max(tl.where(i < count, v, float("-inf")), 0))


@triton.jit
def resample_weigh_kernel(
    logw, mean, top, weights, after, sums, squares, count, clip_high, clip_low, CLIP: tl.constexpr,
    ACC: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """exp(a - top), a, and the block's sums of the first and of its square."""
    block = tl.program_id(0)
    i = block * B + tl.arange(0, B)
    a = tl.load(logw + i, mask=i < count, other=0.0).to(tl.float64) - tl.load(mean)
    if CLIP:
        clip = tl.sum(_number(clip_high, clip_low, tl.float64))
        a = tl.where(a > clip, clip, a)
        a = tl.where(a < -clip, -clip, a)
    w = tl.exp((a - tl.load(top)).to(ACC))
    tl.store(after + i, a.to(ACC), mask=i < count)
    tl.store(weights + i, w, mask=i < count)
    w = tl.where(i < count, w, 0.0).to(tl.float64)
    tl.store(sums + block, tl.sum(w, 0))
    tl.store(squares + block, tl.sum(w * w, 0))


@triton.jit
def resample_prefix_kernel(sums, offsets, blocks, B: tl.constexpr):
    """offsets[i] = sum of the blocks before i, by one program, so always in one order."""
    carry = tl.zeros((1,), tl.float64)
    tl.store(offsets + tl.arange(0, 1), carry)
    for start in range(0, blocks, B):
        i = start + tl.arange(0, B)
        v = tl.load(sums + i, mask=i < blocks, other=0.0)
        tl.store(offsets + i + 1, tl.cumsum(v, 0) + carry, mask=i < blocks)
        carry += tl.sum(v, 0)


@triton.jit
def resample_count_kernel(
    weights,
    after,
    offsets,
    total,
    u,
    taken,
    usable,
    ends,
    count,
    ACC: tl.constexpr,
    B: tl.constexpr,
):
    """Normalises the weights of a block; ends[i] is one past the last offspring of particle i."""
    block = tl.program_id(0)
    i = block * B + tl.arange(0, B)
    w = tl.load(weights + i, mask=i < count, other=0.0)
    whole = tl.load(total)
    sum_to = tl.load(offsets + block) + tl.cumsum(w.to(tl.float64), 0)
    last = i + 1 == tl.minimum((block + 1) * B, count)
    sum_to = tl.where(last, tl.load(offsets + block + 1), sum_to)
    inverse = tl.where(tl.load(usable), (1.0 / whole).to(ACC), float("nan"))
    tl.store(weights + i, w * inverse, mask=i < count)
    end = tl.ceil(sum_to * (count / whole) - tl.load(u)).to(tl.int64)
    end = tl.minimum(tl.maximum(end, 0), count)
    end = tl.where(i + 1 == count, count, end)
    resampled = tl.load(taken)
    tl.store(ends + i, tl.where(resampled, end, i + 1), mask=i < count)
    a = tl.load(after + i, mask=i < count, other=0.0)
    tl.store(after + i, tl.where(resampled, 0.0, a), mask=i < count)


@triton.jit
def resample_pick_kernel(ends, indices, count, steps, B: tl.constexpr):
    """The first particle whose offspring end past k."""
    k = tl.program_id(0) * B + tl.arange(0, B)
    low = tl.zeros((B,), tl.int64)
    high = tl.zeros((B,), tl.int64) + (count - 1)
    for _ in range(steps):
        middle = (low + high) // 2
        past = tl.load(ends + middle, mask=k < count, other=0) > k
        high = tl.where(past, middle, high)
        low = tl.where(past, low, tl.minimum(middle + 1, high))
    tl.store(indices + k, low, mask=k < count)


@triton.jit
def resample_gather_kernel(x, y, indices, rows, columns, R: tl.constexpr, C: tl.constexpr):
    k = tl.program_id(0) * R + tl.arange(0, R)
    source = tl.load(indices + k, mask=k < rows, other=0)[:, None]  # [R, 1]
    row = k.to(tl.int64)[:, None]
    for j in range(0, columns, C):
        cols = j + tl.arange(0, C)[None, :]
        mask = (row < rows) & (cols < columns)
        v = tl.load(x + source * columns + cols, mask=mask)
        tl.store(y + row * columns + cols, v, mask=mask)


# ---- launchers ---------------------------------------------------------------------------------------


def _tile(columns: int) -> dict[str, int]:
    C = min(TILE, max(16, triton.next_power_of_2(columns)))
    return {"R": max(1, TILE // C), "C": C, "num_warps": 4}


def _dense(*tensors):
    return [None if t is None else t.contiguous() for t in tensors]


def fkc_step(x, scores, betas, drift, divergence, noise, drift_rate, sigma, dt, level):
    x, scores, betas, drift, divergence, noise = _dense(x, scores, betas, drift, divergence, noise)
    rows, columns = x.shape
    y, dlogw = x.new_empty(x.shape), x.new_empty((rows,), dtype=accumulate_type(x))
    if rows == 0:
        return y, dlogw
    numbers = (
        drift_rate,
        sigma**2,
        dt,
        sigma * math.sqrt(abs(dt)),
        level**-2 if level > 0 else 1.0,
    )
    config = _tile(columns)
    with on_device_of(x):
        fkc_step_kernel[(triton.cdiv(rows, config["R"]),)](
            x, scores, betas, x if drift is None else drift, x if divergence is None else divergence,
            noise, y, dlogw, rows, columns, betas.numel(), *(h for v in numbers for h in _halves(v)),
            HAS_DRIFT=drift is not None, HAS_DIVERGENCE=divergence is not None, DENOISED=level > 0,
            ACC=accumulator(x), **config,
        )  # fmt: skip
    return y, dlogw


def afdps_step(x, b, grad_mu, lap_mu, noise, sigma, dt):
    x, b, grad_mu, lap_mu, noise = _dense(x, b, grad_mu, lap_mu, noise)
    rows, columns = x.shape
    y, dlogw = x.new_empty(x.shape), x.new_empty((rows,), dtype=accumulate_type(x))
    if rows == 0:
        return y, dlogw
    numbers = (sigma**2, dt, sigma * math.sqrt(abs(dt)))
    config = _tile(columns)
    with on_device_of(x):
        afdps_step_kernel[(triton.cdiv(rows, config["R"]),)](
            x, b, grad_mu, x if lap_mu is None else lap_mu, noise, y, dlogw, rows, columns,
            *(h for v in numbers for h in _halves(v)), HAS_LAPLACIAN=lap_mu is not None,
            ACC=accumulator(x), **config,
        )  # fmt: skip
    return y, dlogw


def smc_resample(logw, x, u, ess_threshold, center, clip):
    logw, x = _dense(logw, x)
    count, acc = logw.shape[0], accumulate_type(logw)
    indices = logw.new_empty((count,), dtype=torch.int64)
    weights, after = (logw.new_empty((count,), dtype=acc) for _ in range(2))
    y = logw.new_empty((0,)) if x is None else x.new_empty(x.shape)
    if count == 0:
        return indices, y, weights, after, *(logw.new_full((), math.nan, dtype=acc) for _ in "ab")
    blocks = triton.cdiv(count, BLOCK)
    first, second, ends = (
        logw.new_empty((n,), dtype=t)
        for n, t in ((blocks, torch.float64), (blocks, torch.float64), (count, torch.int64))
    )
    options = {"B": BLOCK, "num_warps": 4}
    with on_device_of(logw):
        resample_read_kernel[(blocks,)](logw, first, second, count, **options)
        mean = first.new_zeros(())
        if center:
            mean = first.sum() / (logw != -math.inf).sum().clamp(min=1)
        top = second.amax() - mean
        top = top.clamp(-clip, clip) if clip > 0 else top
        resample_weigh_kernel[(blocks,)](
            logw, mean, top, weights, after, first, second, count, *_halves(clip), CLIP=clip > 0,
            ACC=accumulator(logw), **options,
        )  # fmt: skip
        offsets = first.new_empty((blocks + 1,))
        resample_prefix_kernel[(1,)](first, offsets, blocks, **options)
        total = offsets[-1].clone()
        usable = (total > 0) & torch.isfinite(total)
        ess = torch.where(usable, total * total / second.sum(), math.nan)
        log_z = torch.where(usable, total.log() + top + mean - math.log(count), math.nan)
        taken = usable & (ess < ess_threshold * count)
        resample_count_kernel[(blocks,)](
            weights, after, offsets, total, u, taken, usable, ends, count, ACC=accumulator(logw),
            **options,
        )  # fmt: skip
        resample_pick_kernel[(blocks,)](
            ends, indices, count, max(count - 1, 0).bit_length() + 1, **options
        )
        if x is not None and x.numel():
            config = _tile(x.shape[1])
            resample_gather_kernel[(triton.cdiv(count, config["R"]),)](
                x, y, indices, count, x.shape[1], **config
            )
    return indices, y, weights, after, log_z.to(acc), ess.to(acc)


# ---- ahead-of-time compilation -----------------------------------------------------------------------


def aot() -> Iterator:
    """The variants held to tests/budgets.json: everything switched on, narrow and wide rows."""
    from .._aot import AotCase

    f32, f64, i64 = "*fp32", "*fp64", "*i64"
    for columns in (64, 4096):
        config = _tile(columns)
        warps = config.pop("num_warps")
        numbers = ("rate", "variance", "dt", "root", "inverse")
        halves = {f"{n}_{h}": "fp32" for n in numbers for h in ("high", "low")}
        pointers = {
            "x": "*bf16",
            "scores": "*bf16",
            "drift": "*bf16",
            "noise": "*bf16",
            "y": "*bf16",
        }
        yield AotCase(
            name=f"fkc_step_{columns}",
            fn=fkc_step_kernel,
            signature={
                **pointers, "betas": f64, "divergence": f32, "dlogw": f32, "rows": "i32",
                "columns": "i32", "models": "i32", **halves,
            },
            constexprs={
                "HAS_DRIFT": True, "HAS_DIVERGENCE": True, "DENOISED": True, "ACC": tl.float32, **config,
            },
            divisible_by_16=(*pointers, "columns"),
            num_warps=warps,
        )  # fmt: skip
        pointers = {"x": "*bf16", "b": "*bf16", "grad": "*bf16", "noise": "*bf16", "y": "*bf16"}
        yield AotCase(
            name=f"afdps_step_{columns}",
            fn=afdps_step_kernel,
            signature={
                **pointers, "laplacian": f32, "dlogw": f32, "rows": "i32", "columns": "i32",
                **{k: v for k, v in halves.items() if k.split("_")[0] in ("variance", "dt", "root")},
            },
            constexprs={"HAS_LAPLACIAN": True, "ACC": tl.float32, **config},
            divisible_by_16=(*pointers, "columns"),
            num_warps=warps,
        )  # fmt: skip
        yield AotCase(
            name=f"resample_gather_{columns}",
            fn=resample_gather_kernel,
            signature={"x": f32, "y": f32, "indices": i64, "rows": "i32", "columns": "i32"},
            constexprs=config,
            divisible_by_16=("x", "y", "indices", "columns"),
            num_warps=warps,
        )
    block = {"B": BLOCK}
    yield AotCase(
        name="resample_read",
        fn=resample_read_kernel,
        signature={"logw": f32, "sums": f64, "tops": f64, "count": "i32"},
        constexprs=block,
        divisible_by_16=("logw",),
    )
    yield AotCase(
        name="resample_weigh",
        fn=resample_weigh_kernel,
        signature={
            "logw": f32, "mean": f64, "top": f64, "weights": f32, "after": f32, "sums": f64,
            "squares": f64, "count": "i32", "clip_high": "fp32", "clip_low": "fp32",
        },
        constexprs={"CLIP": True, "ACC": tl.float32, **block},
        divisible_by_16=("logw", "weights", "after"),
    )  # fmt: skip
    yield AotCase(
        name="resample_count",
        fn=resample_count_kernel,
        signature={
            "weights": f32, "after": f32, "offsets": f64, "total": f64, "u": f64, "taken": "*i1",
            "usable": "*i1", "ends": i64, "count": "i32",
        },
        constexprs={"ACC": tl.float32, **block},
        divisible_by_16=("weights", "after", "ends"),
    )  # fmt: skip
    yield AotCase(
        name="resample_prefix",
        fn=resample_prefix_kernel,
        signature={"sums": f64, "offsets": f64, "blocks": "i32"},
        constexprs=block,
        divisible_by_16=("sums", "offsets"),
    )
    yield AotCase(
        name="resample_pick",
        fn=resample_pick_kernel,
        signature={"ends": i64, "indices": i64, "count": "i32", "steps": "i32"},
        constexprs=block,
        divisible_by_16=("ends", "indices"),
    )
