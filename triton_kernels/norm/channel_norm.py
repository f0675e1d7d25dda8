"""GPU kernels of core `channel_norm`: the formulas are in solera/norm/channel_norm.py.

x is (A, M, K), statistics over M. Two ways of laying a tile [R, C] over it, by one set of kernels:

    ROWS (K = 1)   R sets by C positions, summed along axis 1; both contiguous in memory
    else (K > 1)   one a, C neighbouring sets k, R positions, summed along axis 0

A program walks `steps` tiles of positions, so a long M is split over programs (how, depends on M and K alone: a
set's bits do not depend on how many sets there are) whose parts a second kernel adds up in order. Moments are
taken in one read, a running mean and sum of squares in each element of the tile, merged at the end.

Bytes, in units of x: moments 1, affine 2 (residual: 3), reduce 2, gradient 3 (residual with an activation: 4,
and 5 where it needs its gradient); per-set tensors are 1/M of that. An instance norm, forward and backward, moves 8
units: H200 at 4.3 TB/s, bf16 8 x 256 x 64 x 64 (16.8 MB a unit): 31 us is the floor.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl

from .._activation import activate, slope
from .._launch import accumulate_type, accumulator, on_device_of

SPAN = {True: 32768, False: 512}  # positions a program walks at most, by ROWS
MOST_PARTS = 65535


@triton.jit
def _place(A, M, K, R: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr):
    """Of this program's sets: number, which exist, a, where the first position lies, the tile's positions."""
    program = tl.program_id(0)
    if ROWS:
        a = program * R + tl.arange(0, R)[:, None]  # [R, 1]
        real = a < A
        index = a.to(tl.int64)
        row = index
        first = index * M
        lane = tl.arange(0, C)[None, :]  # [1, C]
    else:
        tiles = tl.cdiv(K, C)
        k = (program % tiles) * C + tl.arange(0, C)[None, :]  # [1, C]
        real = k < K
        row = (program // tiles).to(tl.int64) + k.to(tl.int64) * 0
        index = row * K + k
        first = row * M * K + k
        lane = tl.arange(0, R)[:, None]  # [R, 1]
    return index, real, row, first, lane


@triton.jit
def _limit(lengths, row, real, M, HAS_LENGTHS: tl.constexpr):
    """How many of a set's positions count."""
    if HAS_LENGTHS:
        limit = tl.minimum(tl.load(lengths + row, mask=real, other=0), M).to(tl.int32)
    else:
        limit = M
    return limit


@triton.jit
def _tile(first, real, limit, m, M, K, ROWS: tl.constexpr, HAS_LENGTHS: tl.constexpr):
    """Offsets of the tile's elements, which are there, and which of them count.

    The first mask knows nothing of lengths, so that loads stay vectors.
    """
    at = first + m
    if not ROWS:
        at = first + m.to(tl.int64) * K
    there = real & (m < M)
    keep = there
    if HAS_LENGTHS:
        keep = there & (m < limit)
    return at, there, keep


@triton.jit
def _load(x, at, there, ACC: tl.constexpr):
    return tl.load(x + at, mask=there, other=0.0).to(ACC)


@triton.jit
def channel_moments_kernel(
    x, lengths, mean_out, square_out, A, M, K, steps,
    HAS_LENGTHS: tl.constexpr, ROWS: tl.constexpr, PARTIAL: tl.constexpr, ACC: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Mean and biased variance of a share of each set's positions; PARTIAL: the sum of squares instead."""
    AXIS: tl.constexpr = 1 if ROWS else 0
    STEP: tl.constexpr = C if ROWS else R
    index, real, row, first, lane = _place(A, M, K, R, C, ROWS)
    limit = _limit(lengths, row, real, M, HAS_LENGTHS)
    start = tl.program_id(1) * steps * STEP
    mean = tl.zeros((R, C), ACC)
    square = tl.zeros((R, C), ACC)
    count = tl.zeros((R, C), ACC)  # by its loads' layout; computed apart it got one that spilled
    for i in range(steps):
        at, there, keep = _tile(
            first, real, limit, start + i * STEP + lane, M, K, ROWS, HAS_LENGTHS
        )
        d = tl.where(keep, _load(x, at, there, ACC) - mean, 0.0)
        share = tl.full((), 1.0, ACC) / (i + 1)
        mean += d * share
        square += d * d * (i * share)
        count += tl.where(keep, 1.0, 0.0)
    n = tl.expand_dims(tl.sum(count, AXIS), AXIS)
    some = tl.maximum(n, 1.0)
    center = tl.expand_dims(tl.sum(count * mean, AXIS), AXIS) / some
    center += tl.expand_dims(tl.sum(count * (mean - center), AXIS), AXIS) / some
    d = mean - center
    total = tl.expand_dims(tl.sum(square + count * d * d, AXIS), AXIS)
    if PARTIAL:
        index += tl.program_id(1).to(tl.int64) * A * K
    else:
        total = tl.where(n > 0, total / some, float("nan"))
        center = tl.where(n > 0, center, float("nan"))
    tl.store(mean_out + index, center, mask=real)
    tl.store(square_out + index, total, mask=real)


@triton.jit
def channel_merge_kernel(
    mean_in, square_in, lengths, mean_out, var_out, A, M, K, parts, span,
    HAS_LENGTHS: tl.constexpr, ACC: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Moments of whole sets from those of their parts, in order."""
    index = tl.program_id(0).to(tl.int64) * C + tl.arange(0, C)
    sets = tl.full((), 1, tl.int64) * A * K
    real = index < sets
    limit = _limit(lengths, index // K, real, M, HAS_LENGTHS)
    n = tl.zeros((C,), ACC)
    mean = tl.zeros((C,), ACC)
    square = tl.zeros((C,), ACC)
    at = index
    for i in range(parts):
        count = tl.minimum(tl.maximum(limit - i * span, 0), span).to(ACC) + n * 0.0
        total = tl.maximum(n + count, 1.0)
        d = tl.load(mean_in + at, mask=real, other=0.0) - mean
        square += tl.load(square_in + at, mask=real, other=0.0) + d * d * (n * count / total)
        mean += d * (count / total)
        n += count
        at += sets
    tl.store(mean_out + index, tl.where(n > 0, mean, float("nan")), mask=real)
    var = tl.where(n > 0, square / tl.maximum(n, 1.0), float("nan"))
    tl.store(var_out + index, var, mask=real)


@triton.jit
def _affine(d, scale, shift, residual, at, there, HAS_RESIDUAL: tl.constexpr, ACC: tl.constexpr):
    z = d * scale + shift
    if HAS_RESIDUAL:
        z += _load(residual, at, there, ACC)
    return z


@triton.jit
def channel_affine_kernel(
    x, center, scale, shift, residual, lengths, y, A, M, K, steps,
    HAS_RESIDUAL: tl.constexpr, HAS_LENGTHS: tl.constexpr, ACT: tl.constexpr, ROWS: tl.constexpr,
    ACC: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """y = act((x - center) scale + shift + residual), 0 past a row's length."""
    STEP: tl.constexpr = C if ROWS else R
    index, real, row, first, lane = _place(A, M, K, R, C, ROWS)
    limit = _limit(lengths, row, real, M, HAS_LENGTHS)
    c = tl.load(center + index, mask=real, other=0.0)
    s = tl.load(scale + index, mask=real, other=0.0)
    t = tl.load(shift + index, mask=real, other=0.0)
    start = tl.program_id(1) * steps * STEP
    for i in range(steps):
        at, there, keep = _tile(
            first, real, limit, start + i * STEP + lane, M, K, ROWS, HAS_LENGTHS
        )
        d = _load(x, at, there, ACC) - c
        v = activate(_affine(d, s, t, residual, at, there, HAS_RESIDUAL, ACC), ACT)
        if HAS_LENGTHS:
            v = tl.where(keep, v, 0.0)
        tl.store(y + at, v.to(y.dtype.element_ty), mask=there)


@triton.jit
def _incoming(
    dy, x, c, s, t, residual, at, there, keep,
    HAS_RESIDUAL: tl.constexpr, HAS_LENGTHS: tl.constexpr, ACT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """g = dy act'(z) and d = x - center; both 0 for what does not count."""
    d = _load(x, at, there, ACC) - c
    g = _load(dy, at, there, ACC)
    if ACT:
        g = slope(g, _affine(d, s, t, residual, at, there, HAS_RESIDUAL, ACC), ACT)
    if HAS_LENGTHS:
        g = tl.where(keep, g, 0.0)
        d = tl.where(keep, d, 0.0)
    return g, d


@triton.jit
def channel_reduce_kernel(
    dy, x, center, scale, shift, residual, lengths, dshift, dscale, A, M, K, steps,
    HAS_RESIDUAL: tl.constexpr, HAS_LENGTHS: tl.constexpr, ACT: tl.constexpr, ROWS: tl.constexpr,
    ACC: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Sums of g and g d over a share of each set's positions."""
    AXIS: tl.constexpr = 1 if ROWS else 0
    STEP: tl.constexpr = C if ROWS else R
    index, real, row, first, lane = _place(A, M, K, R, C, ROWS)
    limit = _limit(lengths, row, real, M, HAS_LENGTHS)
    c = tl.load(center + index, mask=real, other=0.0)
    s = tl.load(scale + index, mask=real, other=0.0)
    t = tl.load(shift + index, mask=real, other=0.0)
    start = tl.program_id(1) * steps * STEP
    sum_g = tl.zeros((R, C), ACC)
    sum_gd = tl.zeros((R, C), ACC)
    for i in range(steps):
        at, there, keep = _tile(
            first, real, limit, start + i * STEP + lane, M, K, ROWS, HAS_LENGTHS
        )
        g, d = _incoming(
            dy, x, c, s, t, residual, at, there, keep, HAS_RESIDUAL, HAS_LENGTHS, ACT, ACC
        )
        g = tl.where(there, g, 0.0)
        sum_g += g
        sum_gd += g * tl.where(there, d, 0.0)
    index += tl.program_id(1).to(tl.int64) * A * K
    tl.store(dshift + index, tl.expand_dims(tl.sum(sum_g, AXIS), AXIS), mask=real)
    tl.store(dscale + index, tl.expand_dims(tl.sum(sum_gd, AXIS), AXIS), mask=real)


@triton.jit
def channel_sum_kernel(dshift_in, dscale_in, dshift, dscale, sets, parts, C: tl.constexpr):
    """Both sums of the parts, in order."""
    index = tl.program_id(0).to(tl.int64) * C + tl.arange(0, C)
    real = index < sets
    sum_g = tl.zeros((C,), dshift.dtype.element_ty)
    sum_gd = tl.zeros((C,), dshift.dtype.element_ty)
    at = index
    for _ in range(parts):
        sum_g += tl.load(dshift_in + at, mask=real, other=0.0)
        sum_gd += tl.load(dscale_in + at, mask=real, other=0.0)
        at += sets
    tl.store(dshift + index, sum_g, mask=real)
    tl.store(dscale + index, sum_gd, mask=real)


@triton.jit
def channel_gradient_kernel(
    dy, x, center, scale, shift, residual, lengths, p, q, dx, dresidual, A, M, K, steps,
    NEED_X: tl.constexpr, NEED_RESIDUAL: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, ACT: tl.constexpr, ROWS: tl.constexpr, ACC: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """dx = g scale + p d + q, 0 past a row's length; dresidual = g."""
    STEP: tl.constexpr = C if ROWS else R
    index, real, row, first, lane = _place(A, M, K, R, C, ROWS)
    limit = _limit(lengths, row, real, M, HAS_LENGTHS)
    c = tl.load(center + index, mask=real, other=0.0)
    s = tl.load(scale + index, mask=real, other=0.0)
    t = tl.load(shift + index, mask=real, other=0.0)
    slant = tl.load(p + index, mask=real, other=0.0)
    level = tl.load(q + index, mask=real, other=0.0)
    start = tl.program_id(1) * steps * STEP
    for i in range(steps):
        at, there, keep = _tile(
            first, real, limit, start + i * STEP + lane, M, K, ROWS, HAS_LENGTHS
        )
        g, d = _incoming(
            dy, x, c, s, t, residual, at, there, keep, HAS_RESIDUAL, HAS_LENGTHS, ACT, ACC
        )
        if NEED_X:
            v = g * s + slant * d + level
            if HAS_LENGTHS:
                v = tl.where(keep, v, 0.0)
            tl.store(dx + at, v.to(dx.dtype.element_ty), mask=there)
        if NEED_RESIDUAL:
            tl.store(dresidual + at, g.to(dresidual.dtype.element_ty), mask=there)


# ---- launchers ---------------------------------------------------------------------------------------


class _Plan:
    """Tile, grid and split of an (A, M, K), chosen by M and K alone."""

    def __init__(self, A: int, M: int, K: int):
        self.rows = K == 1
        if self.rows:
            C = min(max(16, triton.next_power_of_2(M)), 4096)
            R = max(1, 2048 // C)
            step, self.tiles = C, triton.cdiv(A, R)
        else:
            C = min(max(16, triton.next_power_of_2(K)), 64)
            R = 2048 // C
            step, self.tiles = R, A * triton.cdiv(K, C)
        every = triton.cdiv(M, step)
        self.steps = max(min(every, SPAN[self.rows] // step), triton.cdiv(every, MOST_PARTS))
        self.parts = triton.cdiv(every, self.steps)
        self.span = self.steps * step
        self.tile = {"R": R, "C": C, "ROWS": self.rows, "num_warps": 8 if R * C > 2048 else 4}
        self.grid = (self.tiles, self.parts)


def _dense(x, *others):
    """The tensors contiguous, x in the place of those that are None."""
    return tuple(x if t is None else t.contiguous() for t in others)


def channel_moments(x, lengths):
    x = x.contiguous()
    A, M, K = x.shape
    acc = accumulate_type(x)
    mean, var = (x.new_empty((A, K), dtype=acc) for _ in range(2))
    if A * K == 0:
        return mean, var
    if M == 0:
        return mean.fill_(float("nan")), var.fill_(float("nan"))
    plan = _Plan(A, M, K)
    partial = plan.parts > 1
    out = [mean, var]
    if partial:
        out = [x.new_empty((plan.parts, A, K), dtype=acc) for _ in range(2)]
    flags = {"HAS_LENGTHS": lengths is not None, "ACC": accumulator(x)}
    (rows,) = _dense(x, lengths)
    with on_device_of(x):
        channel_moments_kernel[plan.grid](
            x, rows, *out, A, M, K, plan.steps, PARTIAL=partial, **flags, **plan.tile
        )
        if partial:
            channel_merge_kernel[(triton.cdiv(A * K, 256),)](
                *out, rows, mean, var, A, M, K, plan.parts, plan.span, C=256, num_warps=4, **flags
            )
    return mean, var


def channel_affine(x, center, scale, shift, residual, lengths, activation):
    x = x.contiguous()
    y = x.new_empty(x.shape)
    if x.numel() == 0:
        return y
    plan = _Plan(*x.shape)
    with on_device_of(x):
        channel_affine_kernel[plan.grid](
            x, *_dense(x, center, scale, shift, residual, lengths), y, *x.shape, plan.steps,
            HAS_RESIDUAL=residual is not None, HAS_LENGTHS=lengths is not None, ACT=activation,
            ACC=accumulator(x), **plan.tile,
        )  # fmt: skip
    return y


def channel_reduce(dy, x, center, scale, shift, residual, lengths, activation):
    x = x.contiguous()
    A, M, K = x.shape
    acc = accumulate_type(x)
    dshift, dscale = (x.new_empty((A, K), dtype=acc) for _ in range(2))
    if x.numel() == 0:
        return dshift.zero_(), dscale.zero_()
    plan = _Plan(A, M, K)
    out = [dshift, dscale]
    if plan.parts > 1:
        out = [x.new_empty((plan.parts, A, K), dtype=acc) for _ in range(2)]
    with on_device_of(x):
        channel_reduce_kernel[plan.grid](
            dy.contiguous(), x, *_dense(x, center, scale, shift, residual, lengths), *out, A, M, K,
            plan.steps, HAS_RESIDUAL=residual is not None, HAS_LENGTHS=lengths is not None,
            ACT=activation, ACC=accumulator(x), **plan.tile,
        )  # fmt: skip
        if plan.parts > 1:
            channel_sum_kernel[(triton.cdiv(A * K, 256),)](
                *out, dshift, dscale, A * K, plan.parts, C=256, num_warps=4
            )
    return dshift, dscale


def channel_gradient(
    dy, x, center, scale, shift, residual, lengths, activation, p, q, need_x, need_residual
):
    x = x.contiguous()
    dx = x.new_empty(x.shape if need_x else (0,))
    dresidual = x.new_empty(x.shape if need_residual else (0,))
    if x.numel() == 0 or not (need_x or need_residual):
        return dx, dresidual
    plan = _Plan(*x.shape)
    with on_device_of(x):
        channel_gradient_kernel[plan.grid](
            dy.contiguous(), x, *_dense(x, center, scale, shift, residual, lengths, p, q), dx,
            dresidual, *x.shape, plan.steps, NEED_X=need_x, NEED_RESIDUAL=need_residual,
            HAS_RESIDUAL=residual is not None, HAS_LENGTHS=lengths is not None, ACT=activation,
            ACC=accumulator(x), **plan.tile,
        )  # fmt: skip
    return dx, dresidual


# ---- ahead-of-time compilation -----------------------------------------------------------------------


def aot() -> Iterator:
    """Both layouts with everything switched on, short and long rows, and the second stages."""
    from .._aot import AotCase

    half, acc, long = "*bf16", "*fp32", "*i64"
    sizes = {"A": "i32", "M": "i32", "K": "i32", "steps": "i32"}
    affine = {"center": acc, "scale": acc, "shift": acc, "residual": half, "lengths": long}
    on = {"HAS_LENGTHS": True, "HAS_RESIDUAL": True, "ACT": 3, "ACC": tl.float32}
    shapes = {"rows_64": (64, 1), "rows_4096": (4096, 1), "columns": (4096, 256)}
    for name, (M, K) in shapes.items():
        plan = _Plan(2048, M, K)
        tile = dict(plan.tile)
        warps = tile.pop("num_warps")
        unit = {"K": 1} if plan.rows else {}
        extents = {k: v for k, v in sizes.items() if k not in unit}
        kernels = {
            "moments": (
                channel_moments_kernel,
                {"x": half, "lengths": long, "mean_out": acc, "square_out": acc},
                {"HAS_LENGTHS": True, "PARTIAL": not plan.rows, "ACC": tl.float32},
            ),
            "affine": (channel_affine_kernel, {"x": half, **affine, "y": half}, on),
            "reduce": (
                channel_reduce_kernel,
                {"dy": half, "x": half, **affine, "dshift": acc, "dscale": acc},
                on,
            ),
            "gradient": (
                channel_gradient_kernel,
                {
                    "dy": half,
                    "x": half,
                    **affine,
                    "p": acc,
                    "q": acc,
                    "dx": half,
                    "dresidual": half,
                },
                {**on, "NEED_X": True, "NEED_RESIDUAL": True},
            ),
        }
        for kind, (kernel, pointers, flags) in kernels.items():
            yield AotCase(
                name=f"channel_{kind}_{name}",
                fn=kernel,
                signature={**pointers, **extents},
                constexprs={**flags, **tile, **unit},
                divisible_by_16=(*pointers, "M", *(() if plan.rows else ("K",))),
                num_warps=warps,
            )
    yield AotCase(
        name="channel_merge",
        fn=channel_merge_kernel,
        signature={
            "mean_in": acc, "square_in": acc, "lengths": long, "mean_out": acc, "var_out": acc,
            "A": "i32", "M": "i32", "K": "i32", "parts": "i32", "span": "i32",
        },
        constexprs={"HAS_LENGTHS": True, "ACC": tl.float32, "C": 256},
        divisible_by_16=("mean_in", "square_in", "lengths", "mean_out", "var_out", "M", "K", "span"),
        num_warps=4,
    )  # fmt: skip
    yield AotCase(
        name="channel_sum",
        fn=channel_sum_kernel,
        signature={
            "dshift_in": acc, "dscale_in": acc, "dshift": acc, "dscale": acc, "sets": "i32",
            "parts": "i32",
        },
        constexprs={"C": 256},
        divisible_by_16=("dshift_in", "dscale_in", "dshift", "dscale", "sets"),
        num_warps=4,
    )  # fmt: skip
