"""What the kernels of core `dense` share: its numerics, and how every solve starts, stops and ends.

`settings` is (epsilon / rho of the rows, of the columns, momentum, low and high of the rows, of the columns): the
numbers of a damped or over-relaxed solve, in the problem's precision; only GENERAL kernels read it all.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = 1.4426950408889634


@triton.jit
def _ranges(ACC: tl.constexpr):
    """Lowest and highest row sum believed, lowest and highest column sum, largest exponent, largest value."""
    if ACC == tl.float64:
        return 1e-100, 1e100, 1e-150, 1e150, 1022.0, 1.79e308
    else:
        return 1e-10, 1e10, 1e-20, 1e20, 126.0, 3.4e38


@triton.jit
def _weighted(b, w, big):
    """b * w with an infinite w held finite, so that a weight of 0 gives 0; NaN stays NaN."""
    return b * tl.where(w > big, big, w)


@triton.jit
def _lost(x):
    """1 if any element is not finite."""
    return tl.max(tl.where(x - x == 0, 0, 1))


@triton.jit
def _next(old, log_sum, inverse, momentum, low, high, GENERAL: tl.constexpr):
    """The next potential from the log2 of its exact sum: damped by rho (inverse = epsilon / rho), relaxed."""
    if GENERAL:
        step = 1.0 / (1.0 + inverse)
        level = log_sum + old * (1.0 + inverse)
        pace = tl.where((level >= low) & (level <= high), momentum, 1.0)
        return tl.where(pace > 1.0, old - step * pace * level, -step * log_sum)
    else:
        return -log_sum


@triton.jit
def _row_update(
    none, weight, live, old, shift, total, inverse, momentum, low, high, exponent, GENERAL: tl.constexpr
):  # fmt: skip
    """(new potential, sum a |s - h|, sum a s): s the state's row sums, h those that the potential asks for."""
    log_sum = shift + tl.log2(tl.where(none, 1.0, total))
    new = _next(old, log_sum, inverse, momentum, low, high, GENERAL)
    new = tl.where(none, tl.where(weight == 0, 0.0, float("nan")), new)
    new = tl.where(total == total, new, total)
    move = old + log_sum if GENERAL else old - new
    counts = live & (weight != 0)
    s = tl.where(counts, tl.exp2(tl.where(move > exponent, exponent, move)), 1.0)
    away = tl.abs(s - 1.0)
    if GENERAL:
        wish = -inverse * old
        h = tl.where(counts, tl.exp2(tl.where(wish > exponent, exponent, wish)), 1.0)
        away = tl.abs(s - h)
    return new, tl.sum(weight * away), tl.sum(weight * s)


@triton.jit
def _row_scale(none, weight, new, shift, total, GENERAL: tl.constexpr):
    """What makes a row's terms (relative to `shift`) entries of the plan without b."""
    if GENERAL:
        return tl.where(none, 0.0, weight * tl.exp2(new + shift))
    else:
        return tl.where(none, 0.0, weight / total)


@triton.jit
def _column(none, weight, old, shift, total, inverse, momentum, low, high, GENERAL: tl.constexpr):
    """A column's next potential from its exact sum; with no allowed pair 0 where it has no mass, else NaN."""
    none = none & (total == total)
    log_sum = shift + tl.log2(tl.where(none, 1.0, total))
    new = _next(old, log_sum, inverse, momentum, low, high, GENERAL)
    return tl.where(none, tl.where(weight == 0, 0.0, float("nan")), new)


@triton.jit
def _settings(settings, GENERAL: tl.constexpr):
    """The settings, or those of a hard and plain solve without a load."""
    if GENERAL:
        return (
            tl.load(settings), tl.load(settings + 1), tl.load(settings + 2), tl.load(settings + 3),
            tl.load(settings + 4), tl.load(settings + 5), tl.load(settings + 6),
        )  # fmt: skip
    else:
        return 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0


@triton.jit
def _row_settings(settings, GENERAL: tl.constexpr):
    """Those that a row pass needs: epsilon / rho, momentum, low, high."""
    inverse, _, momentum, low, high, _, _ = _settings(settings, GENERAL)
    return inverse, momentum, low, high


@triton.jit
def _bound(lengths, at, most):
    """A length given by the caller, held inside the padded problem."""
    given = tl.load(lengths + at)
    return tl.minimum(tl.maximum(given, 0), most)


@triton.jit
def sinkhorn_prepare_kernel(
    a, b, f_in, g_in, F, G, status, iterations, total, lengths, n, m, kappa_at, max_iterations,
    HAS_INIT: tl.constexpr, RAGGED: tl.constexpr, ACC: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Scaled potentials to start from, the total of a, and the status.

    0 runs, 1 has stopped, 2 is lost, 3 has no rows or no columns.
    """
    item = tl.program_id(0).to(tl.int64)
    rows = n
    columns = m
    if RAGGED:
        rows = _bound(lengths, 2 * item, n).to(tl.int32)
        columns = _bound(lengths, 2 * item + 1, m).to(tl.int32)
    kappa = tl.load(kappa_at)
    lane = tl.arange(0, C)
    wrong = 0
    total_a = tl.zeros((C,), ACC)
    total_b = tl.zeros((C,), ACC)
    for start in range(0, rows, C):
        i = start + lane
        x = tl.load(a + item * n + i, mask=i < rows, other=0.0)
        wrong = tl.maximum(wrong, tl.max(tl.where((x >= 0) & (x < float("inf")), 0, 1)))
        total_a += x
        p = tl.zeros((C,), ACC)
        if HAS_INIT:
            p = tl.load(f_in + item * n + i, mask=i < rows, other=0.0) * kappa
        tl.store(F + item * n + i, p, mask=i < rows)
    for start in range(0, columns, C):
        j = start + lane
        x = tl.load(b + item * m + j, mask=j < columns, other=0.0)
        wrong = tl.maximum(wrong, tl.max(tl.where((x >= 0) & (x < float("inf")), 0, 1)))
        total_b += x
        p = tl.zeros((C,), ACC)
        if HAS_INIT:
            p = tl.load(g_in + item * m + j, mask=j < columns, other=0.0) * kappa
        tl.store(G + item * m + j, p, mask=j < columns)
    sum_a = tl.sum(total_a)
    empty = (sum_a > 0) & (tl.sum(total_b) > 0)
    state = tl.where(empty & (wrong == 0), 0, 2)
    if RAGGED:
        state = tl.where((rows == 0) | (columns == 0), 3, state)
    tl.store(status + item, state)
    tl.store(iterations + item, tl.where(state == 3, 0, max_iterations).to(tl.int64))
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
def _dual_part(potential, inverse, GENERAL: tl.constexpr):
    """phi in units of epsilon / log2(e), float64: F, or (1 - 2^(-inverse F)) log2(e) / inverse."""
    if GENERAL:
        x = -inverse * potential * 0.6931471805599453
        # exp(x) - 1: the series where the difference would lose digits.
        series = x * (1.0 + x * (0.5 + x * (1.0 / 6 + x * (1.0 / 24 + x * (1.0 / 120)))))
        minus_one = tl.where(tl.abs(x) < 1e-3, series, tl.exp2(x * 1.4426950408889634) - 1.0)
        soft = -minus_one * 1.4426950408889634 / tl.where(inverse > 0, inverse, 1.0)
        return tl.where(inverse > 0, soft, potential)
    else:
        return potential


@triton.jit
def sinkhorn_finish_kernel(
    a, b, F, G, f, g, value, error_out, converged, error, mass, status, lengths, settings, n, m, blocks,
    kappa_at, tolerance_at, GENERAL: tl.constexpr, BALANCED: tl.constexpr, RAGGED: tl.constexpr,
    ACC: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The dual value, the flags and, balanced, the gauge <a, f> = <b, g>, in float64; 0 in the padding."""
    item = tl.program_id(0).to(tl.int64)
    state = tl.load(status + item)
    rows = n
    columns = m
    if RAGGED:
        rows = tl.where(state == 3, 0, _bound(lengths, 2 * item, n))
        columns = tl.where(state == 3, 0, _bound(lengths, 2 * item + 1, m))
    inverse_a = tl.load(settings).to(tl.float64)
    inverse_b = tl.load(settings + 1).to(tl.float64)
    kappa = tl.load(kappa_at)
    tolerance = tl.load(tolerance_at)
    lane = tl.arange(0, C)
    af = tl.zeros((C,), tl.float64)
    bg = tl.zeros((C,), tl.float64)
    ones_a = tl.zeros((C,), tl.float64)
    ones_b = tl.zeros((C,), tl.float64)
    for start in range(0, rows, C):
        i = start + lane
        w = tl.load(a + item * n + i, mask=i < rows, other=0.0).to(tl.float64)
        x = tl.load(F + item * n + i, mask=i < rows, other=0.0).to(tl.float64)
        af += tl.where(w != 0, w * _dual_part(x, inverse_a, GENERAL), 0.0)
        ones_a += w
    for start in range(0, columns, C):
        j = start + lane
        w = tl.load(b + item * m + j, mask=j < columns, other=0.0).to(tl.float64)
        x = tl.load(G + item * m + j, mask=j < columns, other=0.0).to(tl.float64)
        bg += tl.where(w != 0, w * _dual_part(x, inverse_b, GENERAL), 0.0)
        ones_b += w
    e = tl.zeros((), tl.float64)
    s = tl.zeros((), tl.float64)
    for block in range(blocks):
        e += tl.load(error + item * blocks + block).to(tl.float64)
        s += tl.load(mass + item * blocks + block).to(tl.float64)
    e = tl.where(state == 3, 0.0, e)
    s = tl.where(state == 3, 0.0, s)
    nan = tl.where(state == 2, float("nan"), 0.0).to(tl.float64)
    k = kappa.to(tl.float64)
    total_a = tl.sum(ones_a)
    total_b = tl.sum(ones_b)
    left = tl.sum(af)
    right = tl.sum(bg)
    shift = nan
    if BALANCED:
        shift = tl.where(state == 3, 0.0, (right - left) / (total_a + total_b)) + nan
    dual = (
        left + right + shift * (total_a - total_b) - (s - total_a * total_b) * 1.4426950408889634
    ) / k
    tl.store(value + item, dual.to(ACC))
    tl.store(error_out + item, (e + nan).to(ACC))
    tl.store(converged + item, (e + nan) <= tolerance)
    for start in range(0, n, C):
        i = start + lane
        x = tl.load(F + item * n + i, mask=i < rows, other=0.0).to(tl.float64)
        tl.store(f + item * n + i, tl.where(i < rows, (x + shift) / k, 0.0).to(ACC), mask=i < n)
    for start in range(0, m, C):
        j = start + lane
        x = tl.load(G + item * m + j, mask=j < columns, other=0.0).to(tl.float64)
        tl.store(g + item * m + j, tl.where(j < columns, (x - shift) / k, 0.0).to(ACC), mask=j < m)


def device_settings(cost, epsilon, rho_a, rho_b, momentum):
    """`settings` of a damped or over-relaxed solve, written on the device since a copy would synchronise."""
    from solera.sinkhorn.dense_reference import relaxation_range

    settings = cost.new_zeros((7,))
    values = [0.0 if rho is None else epsilon / rho for rho in (rho_a, rho_b)]
    values.append(momentum)
    if momentum != 1:
        values += [
            LOG2E * x for r in (rho_a, rho_b) for x in relaxation_range(epsilon, r, momentum)
        ]
    for k, value in enumerate(values):
        settings[k].fill_(value)
    return settings
