"""What the kernels of core `dense` share: its numerics, and how every solve starts, stops and ends."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _ranges(ACC: tl.constexpr):
    """Lowest and highest row sum believed, lowest and highest column sum, largest exponent, largest value."""
    if ACC == tl.float64:
        return 1e-100, 1e100, 1e-150, 1e150, 1022.0, 1.79e308
    else:
        return 1e-10, 1e10, 1e-20, 1e20, 126.0, 3.4e38


@triton.jit
def _potential(none, weight, shift, total):
    """-(shift + log2 total); with no allowed pair 0 where there is no mass, else NaN."""
    value = -(shift + tl.log2(tl.where(none, 1.0, total)))
    return tl.where(none, tl.where(weight == 0, 0.0, float("nan")), value)


@triton.jit
def _weighted(b, w, big):
    """b * w with an infinite w held finite, so that a weight of 0 gives 0; NaN stays NaN."""
    return b * tl.where(w > big, big, w)


@triton.jit
def _lost(x):
    """1 if any element is not finite."""
    return tl.max(tl.where(x - x == 0, 0, 1))


@triton.jit
def _state(old, new, weight, live, exponent):
    """(sum a |s - 1|, sum a s) of the state before a row update: s = 2^(old - new)."""
    move = old - new
    s = tl.exp2(tl.where(move > exponent, exponent, move))
    s = tl.where(live & (weight != 0), s, 1.0)
    return tl.sum(weight * tl.abs(s - 1.0)), tl.sum(weight * s)


@triton.jit
def sinkhorn_prepare_kernel(
    a, b, f_in, g_in, F, G, status, iterations, total, n, m, kappa_at, max_iterations,
    HAS_INIT: tl.constexpr, ACC: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Scaled potentials to start from, the total of a, and the status: 0 runs, 1 has stopped, 2 is lost."""
    item = tl.program_id(0).to(tl.int64)
    kappa = tl.load(kappa_at)
    lane = tl.arange(0, C)
    wrong = 0
    total_a = tl.zeros((C,), ACC)
    total_b = tl.zeros((C,), ACC)
    for start in range(0, n, C):
        i = start + lane
        x = tl.load(a + item * n + i, mask=i < n, other=0.0)
        wrong = tl.maximum(wrong, tl.max(tl.where((x >= 0) & (x < float("inf")), 0, 1)))
        total_a += x
        p = tl.zeros((C,), ACC)
        if HAS_INIT:
            p = tl.load(f_in + item * n + i, mask=i < n, other=0.0) * kappa
        tl.store(F + item * n + i, p, mask=i < n)
    for start in range(0, m, C):
        j = start + lane
        x = tl.load(b + item * m + j, mask=j < m, other=0.0)
        wrong = tl.maximum(wrong, tl.max(tl.where((x >= 0) & (x < float("inf")), 0, 1)))
        total_b += x
        p = tl.zeros((C,), ACC)
        if HAS_INIT:
            p = tl.load(g_in + item * m + j, mask=j < m, other=0.0) * kappa
        tl.store(G + item * m + j, p, mask=j < m)
    sum_a = tl.sum(total_a)
    empty = (sum_a > 0) & (tl.sum(total_b) > 0)
    tl.store(status + item, tl.where(empty & (wrong == 0), 0, 2))
    tl.store(iterations + item, max_iterations.to(tl.int64))
    tl.store(total + item, sum_a)


@triton.jit
def sinkhorn_decide_kernel(
    status, iterations, error, blocks, iteration, tolerance_at, ACC: tl.constexpr
):
    """Stops a problem whose state, just evaluated, meets the tolerance."""
    item = tl.program_id(0).to(tl.int64)
    tolerance = tl.load(tolerance_at)
    if tl.load(status + item) == 0:
        e = tl.zeros((), ACC)
        for block in range(blocks):
            e += tl.load(error + item * blocks + block)
        if e <= tolerance:
            tl.store(status + item, 1)
            tl.store(iterations + item, iteration.to(tl.int64))


@triton.jit
def sinkhorn_finish_kernel(
    a, b, F, G, f, g, value, error_out, converged, error, mass, status, n, m, blocks, kappa_at, tolerance_at,
    ACC: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The gauge <a, f> = <b, g>, the dual value and the flags, in float64."""
    item = tl.program_id(0).to(tl.int64)
    kappa = tl.load(kappa_at)
    tolerance = tl.load(tolerance_at)
    lane = tl.arange(0, C)
    af = tl.zeros((C,), tl.float64)
    bg = tl.zeros((C,), tl.float64)
    ones_a = tl.zeros((C,), tl.float64)
    ones_b = tl.zeros((C,), tl.float64)
    for start in range(0, n, C):
        i = start + lane
        w = tl.load(a + item * n + i, mask=i < n, other=0.0).to(tl.float64)
        af += w * tl.load(F + item * n + i, mask=i < n, other=0.0).to(tl.float64)
        ones_a += w
    for start in range(0, m, C):
        j = start + lane
        w = tl.load(b + item * m + j, mask=j < m, other=0.0).to(tl.float64)
        bg += w * tl.load(G + item * m + j, mask=j < m, other=0.0).to(tl.float64)
        ones_b += w
    e = tl.zeros((), tl.float64)
    s = tl.zeros((), tl.float64)
    for block in range(blocks):
        e += tl.load(error + item * blocks + block).to(tl.float64)
        s += tl.load(mass + item * blocks + block).to(tl.float64)
    nan = tl.where(tl.load(status + item) == 2, float("nan"), 0.0).to(tl.float64)
    k = kappa.to(tl.float64)
    total_a = tl.sum(ones_a)
    total_b = tl.sum(ones_b)
    left = tl.sum(af)
    right = tl.sum(bg)
    shift = (right - left) / (total_a + total_b) + nan
    dual = (
        left + right + shift * (total_a - total_b) - (s - total_a * total_b) * 1.4426950408889634
    ) / k
    tl.store(value + item, dual.to(ACC))
    tl.store(error_out + item, (e + nan).to(ACC))
    tl.store(converged + item, (e + nan) <= tolerance)
    for start in range(0, n, C):
        i = start + lane
        x = tl.load(F + item * n + i, mask=i < n, other=0.0).to(tl.float64)
        tl.store(f + item * n + i, ((x + shift) / k).to(ACC), mask=i < n)
    for start in range(0, m, C):
        j = start + lane
        x = tl.load(G + item * m + j, mask=j < m, other=0.0).to(tl.float64)
        tl.store(g + item * m + j, ((x - shift) / k).to(ACC), mask=j < m)
