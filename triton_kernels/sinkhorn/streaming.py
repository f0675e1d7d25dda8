"""GPU kernels of core `streaming`: soft minima over points, online, in base 2.

A program takes R rows and one share of the columns, goes through these in tiles of C and keeps the largest
exponent and the sum relative to it; a second kernel joins the shares in order, damps, relaxes and sums up the
state. The shares are there so that few rows still give every processor work. A half iteration is two launches;
a problem that has stopped (a flag on the device) returns at once. No host synchronisation, no atomics.

An alternating iteration takes both soft minima from scratch: 4 n m d flops and 2 n m exponentials (one of each
would need a row's tiles kept). H200, n = m = 10,000, d = 64: 26 GFLOP at 67 TFLOP/s (float32 without tensor
cores) 382 us, exponentials 48 us.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from .._launch import accumulator, on_device_of, processors
from ._points import LOG2E, centred, geometry_of, numbers_of, tile_of, tile_sizes


@triton.jit
def points_partial_kernel(
    x, y, yy, g, b, top_out, sum_out, status, n, m, d, tiles, splits, share, numbers,
    EVALUATE: tl.constexpr, SOURCE: tl.constexpr, ACC: tl.constexpr, K: tl.constexpr, R: tl.constexpr,
    C: tl.constexpr,
):  # fmt: skip
    """Largest exponent and relative sum of R rows over one share of the columns."""
    program = tl.program_id(0).to(tl.int64)
    split = program % splits
    tile = (program // splits) % tiles
    item = program // splits // tiles
    state = tl.load(status + item)
    if (state == 0) | (EVALUATE & (state == 1)):
        kappa = tl.load(numbers)
        alpha = tl.load(numbers + 1)
        lift = tl.load(numbers + 2)
        i = tile * R + tl.arange(0, R)
        top = tl.full((R,), float("-inf"), ACC)
        total = tl.zeros((R,), ACC)
        begin = split * share
        end = tl.minimum(begin + share, m)
        for start in range(begin, end, C):
            j = start + tl.arange(0, C)
            live = j < end
            u = tile_of(x, y, item, i, j, n, m, d, SOURCE, ACC, K, R, C)
            weight = tl.load(b + item * m + j, mask=live, other=0.0)
            h = tl.load(g + item * m + j, mask=live, other=0.0) * kappa
            h -= lift * tl.load(yy + item * m + j, mask=live, other=0.0)
            h += tl.log2(tl.where(weight > 0, weight, 1.0))
            t = h[None, :] + alpha * u
            t = tl.where(live[None, :] & (weight > 0)[None, :], t, float("-inf"))
            peak = tl.maximum(top, tl.max(t, 1))
            base = tl.where(peak == float("-inf"), 0.0, peak)
            total = total * tl.exp2(top - base) + tl.sum(tl.exp2(t - base[:, None]), 1)
            top = peak
        at = (item * splits + split) * n + i
        tl.store(top_out + at, top, mask=i < n)
        tl.store(sum_out + at, total, mask=i < n)


@triton.jit
def points_join_kernel(
    tops, sums, xx, a, f, error, mass, status, n, splits, blocks, numbers,
    EVALUATE: tl.constexpr, STATE: tl.constexpr, ACC: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The shares of C rows joined: the error of the state before (STATE), the new potential."""
    program = tl.program_id(0).to(tl.int64)
    item = program // blocks
    i = (program % blocks) * C + tl.arange(0, C)
    state = tl.load(status + item)
    if (state == 0) | (EVALUATE & (state == 1)):
        kappa = tl.load(numbers)
        lift = tl.load(numbers + 2)
        damp = tl.load(numbers + 3)
        tilt = tl.load(numbers + 4)
        relaxation = tl.load(numbers + 5)
        live = i < n
        top = tl.full((C,), float("-inf"), ACC)
        total = tl.zeros((C,), ACC)
        for split in range(splits):
            at = (item * splits + split) * n + i
            t = tl.load(tops + at, mask=live, other=0.0)
            peak = tl.maximum(top, t)
            base = tl.where(peak == float("-inf"), 0.0, peak)
            part = tl.load(sums + at, mask=live, other=1.0)
            total = total * tl.exp2(top - base) + part * tl.exp2(t - base)
            top = peak
        log_sum = top + tl.log2(total) - lift * tl.load(xx + item * n + i, mask=live, other=0.0)
        old = tl.load(f + item * n + i, mask=live, other=0.0)
        new = old + relaxation * (-damp * log_sum / kappa - old)
        if STATE:
            weight = tl.load(a + item * n + i, mask=live, other=0.0)
            s = tl.exp2(tl.minimum(old * kappa + log_sum, 126.0))
            aim = tl.exp2(-old * kappa * tilt)
            tl.store(error + program, tl.sum(tl.where(live, weight * tl.abs(s - aim), 0.0)))
            tl.store(mass + program, tl.sum(tl.where(live, weight * s, 0.0)))
        if not EVALUATE:
            tl.store(f + item * n + i, new, mask=live)
            lost = tl.max(tl.where(live & ((new - new == 0) == 0), 1, 0))
            if lost > 0:
                tl.store(status + item, 2)


@triton.jit
def points_decide_kernel(
    status, iterations, error, blocks, iteration, tolerance_at, ACC: tl.constexpr
):
    """Stops a problem whose state, just evaluated, meets the tolerance."""
    item = tl.program_id(0).to(tl.int64)
    if tl.load(status + item) == 0:
        e = tl.zeros((), ACC)
        for block in range(blocks):
            e += tl.load(error + item * blocks + block)
        if e <= tl.load(tolerance_at):
            tl.store(status + item, 1)
            tl.store(iterations + item, iteration.to(tl.int64))


# ---- launchers ---------------------------------------------------------------------------------------

_JOIN = 256


class _Side:
    """One soft minimum, rows of x over columns of y: its launch sizes and its scratch."""

    def __init__(self, x, y, xx, yy, source):
        batch, n, d = x.shape
        m = y.shape[1]
        self.sizes = tile_sizes(source, d, x.element_size() == 8)
        self.tiles = triton.cdiv(n, self.sizes["R"])
        C = self.sizes["C"]
        wanted = triton.cdiv(2 * processors(x), max(1, batch * self.tiles))
        self.splits = max(1, min(wanted, triton.cdiv(m, 4 * C)))
        self.share = triton.cdiv(triton.cdiv(m, self.splits), C) * C
        self.splits = triton.cdiv(m, self.share)
        self.points, self.source = (x, y, xx, yy), source
        self.tops = x.new_empty((batch, self.splits, n))
        self.sums = x.new_empty((batch, self.splits, n))
        self.blocks = triton.cdiv(n, _JOIN)
        self.error = x.new_empty((batch, self.blocks))
        self.mass = x.new_empty((batch, self.blocks))

    def partial(self, g, b, status, numbers, evaluate=False):
        x, y, _, yy = self.points
        batch, n, d = x.shape
        points_partial_kernel[(batch * self.tiles * self.splits,)](
            x, y, yy, g, b, self.tops, self.sums, status, n, y.shape[1], d, self.tiles, self.splits,
            self.share, numbers, EVALUATE=evaluate, SOURCE=self.source, ACC=accumulator(x), **self.sizes,
        )  # fmt: skip

    def join(self, a, f, status, numbers, evaluate=False, state=False):
        x, _, xx, _ = self.points
        batch, n, _ = x.shape
        points_join_kernel[(batch * self.blocks,)](
            self.tops, self.sums, xx, a, f, self.error, self.mass, status, n, self.splits, self.blocks,
            numbers, EVALUATE=evaluate, STATE=state, ACC=accumulator(x), C=_JOIN, num_warps=4,
        )  # fmt: skip


def _numbers(like, geometry, epsilon, rho, relaxation):
    """K, alpha, lift, damping, epsilon / rho, relaxation."""
    _, factor, lift = geometry
    kappa = LOG2E / epsilon
    tilt = 0.0 if rho < 0 else epsilon / rho
    return numbers_of(
        like, [kappa, factor * kappa, lift * kappa, 1.0 / (1.0 + tilt), tilt, relaxation]
    )


def _status(a, b):
    """0 where both marginals are finite, >= 0 and not all zero, else 2."""
    fine = [((t >= 0) & (t < float("inf"))).all(-1) & (t.sum(-1) > 0) for t in (a, b)]
    return (~(fine[0] & fine[1])).int() * 2


def sinkhorn_points(
    x, y, a, b, f, g, cost, epsilons, rho_a, rho_b, momentum, max_iterations, tolerance, check_every
):
    a, b = a.contiguous(), b.contiguous()
    batch, n, d = x.shape
    m = y.shape[1]
    F = x.new_zeros((batch, n)) if f is None else f.clone(memory_format=torch.contiguous_format)
    G = x.new_zeros((batch, m)) if g is None else g.clone(memory_format=torch.contiguous_format)
    iterations = x.new_empty((batch,), dtype=torch.int64)
    if batch == 0:
        none = x.new_empty((0,))
        return F, G, none, iterations, none.clone(), none.bool()
    geometry = geometry_of(cost, d)
    with on_device_of(x):
        x, y, xx, yy = centred(x, y, cost)
        rows, columns = _Side(x, y, xx, yy, geometry[0]), _Side(y, x, yy, xx, geometry[0])
        status = _status(a, b)
        steps = len(epsilons)
        count = steps - 1 + max_iterations
        iterations.fill_(count)
        target = numbers_of(x, [tolerance])
        held: tuple = (None, None, None)
        for k in range(count):
            epsilon = epsilons[min(k, steps - 1)]
            if held[0] != epsilon:
                held = (
                    epsilon,
                    _numbers(x, geometry, epsilon, rho_a, momentum),
                    _numbers(x, geometry, epsilon, rho_b, momentum),
                )
            rows.partial(G, b, status, held[1])
            if tolerance > 0 and k >= steps and (k - steps + 1) % check_every == 0:
                rows.join(a, F, status, held[1], evaluate=True, state=True)
                points_decide_kernel[(batch,)](
                    status, iterations, rows.error, rows.blocks, k, target, ACC=accumulator(x), num_warps=1
                )  # fmt: skip
            rows.join(a, F, status, held[1])
            columns.partial(F, a, status, held[2])
            columns.join(b, G, status, held[2])
        numbers = held[1]
        rows.partial(G, b, status, numbers, evaluate=True)
        rows.join(a, F, status, numbers, evaluate=True, state=True)
        return _finish(F, G, a, b, status, iterations, rows, epsilons[-1], rho_a, rho_b, tolerance)


def _finish(F, G, a, b, status, iterations, rows, epsilon, rho_a, rho_b, tolerance):
    """The gauge, the dual value and the flags, in float64; plain torch, nothing read back."""
    kind = F.dtype
    lost = status == 2
    a, b, f, g = (t.double() for t in (a, b, F, G))
    total_a, total_b = a.sum(-1), b.sum(-1)
    if rho_a < 0 and rho_b < 0:
        shift = ((b * g).sum(-1) - (a * f).sum(-1)) / (total_a + total_b)
        f, g = f + shift[:, None], g - shift[:, None]
    value = -epsilon * (rows.mass.double().sum(-1) - total_a * total_b)
    for weight, potential, rho in ((a, f, rho_a), (b, g, rho_b)):
        term = potential if rho < 0 else -rho * (-potential / rho).expm1()
        value = value + (weight * term).sum(-1)
    nan = float("nan")
    error = rows.error.double().sum(-1).masked_fill(lost, nan)
    f, g = f.masked_fill(lost[:, None], nan), g.masked_fill(lost[:, None], nan)
    value = value.masked_fill(lost, nan)
    return f.to(kind), g.to(kind), value.to(kind), iterations, error.to(kind), error <= tolerance


def sinkhorn_points_symmetric(x, y, a, b, cost, epsilons, rho):
    alone = y is None
    a = a.contiguous()
    b = a if alone else b.contiguous()
    batch, n, d = x.shape
    F = x.new_zeros((batch, n))
    G = F if alone else x.new_zeros((batch, y.shape[1]))
    if batch > 0:
        geometry = geometry_of(cost, d)
        with on_device_of(x):
            x, y, xx, yy = centred(x, x if alone else y, cost)
            rows, columns = _Side(x, y, xx, yy, geometry[0]), _Side(y, x, yy, xx, geometry[0])
            status = _status(a, b)
            for k, epsilon in enumerate(epsilons):
                numbers = _numbers(x, geometry, epsilon, rho, 1.0 if k == 0 else 0.5)
                rows.partial(G, b, status, numbers)
                if not alone:
                    columns.partial(F, a, status, numbers)
                    columns.join(b, G, status, numbers)
                rows.join(a, F, status, numbers)
            lost = (status == 2)[:, None]
            F = F.masked_fill(lost, float("nan"))
            G = F if alone else G.masked_fill(lost, float("nan"))
    return F, F.new_empty((batch, 0)) if alone else G


def sinkhorn_points_softmin(x, y, g, b, cost, epsilon):
    batch, n, d = x.shape
    f = x.new_zeros((batch, n))
    if batch > 0:
        geometry = geometry_of(cost, d)
        with on_device_of(x):
            x, y, xx, yy = centred(x, y, cost)
            side = _Side(x, y, xx, yy, geometry[0])
            status = x.new_zeros((batch,)).int()
            numbers = _numbers(x, geometry, epsilon, -1.0, 1.0)
            side.partial(g.contiguous(), b.contiguous(), status, numbers)
            side.join(f, f, status, numbers)
    return f


# ---- ahead-of-time compilation -----------------------------------------------------------------------


def aot() -> Iterator:
    """The soft minimum by products and by differences, float32 and float64; what follows it once."""
    from .._aot import AotCase

    pointers = ("x", "y", "yy", "g", "b", "top_out", "sum_out", "numbers")
    integers = ("n", "m", "d", "tiles", "splits", "share")
    for word, acc, double in (("*fp32", tl.float32, False), ("*fp64", tl.float64, True)):
        for name, source, d in (("product", 0, 64), ("differences", 1, 2), ("distance", 2, 64)):
            if double and name == "distance":
                continue
            sizes = tile_sizes(source, d, double)
            warps = sizes.pop("num_warps")
            yield AotCase(
                name=f"points_{name}_{'64' if double else '32'}",
                fn=points_partial_kernel,
                signature={
                    **dict.fromkeys(pointers, word), **dict.fromkeys(integers, "i32"), "status": "*i32",
                },
                constexprs={"EVALUATE": False, "SOURCE": source, "ACC": acc, **sizes},
                divisible_by_16=(*pointers, "n", "m", "share", *(("d",) if d > 8 else ())),
                num_warps=warps,
            )  # fmt: skip
    pointers = ("tops", "sums", "xx", "a", "f", "error", "mass", "numbers")
    yield AotCase(
        name="points_join",
        fn=points_join_kernel,
        signature={
            **dict.fromkeys(pointers, "*fp32"), "status": "*i32", "n": "i32", "splits": "i32",
            "blocks": "i32",
        },
        constexprs={"EVALUATE": False, "STATE": True, "ACC": tl.float32, "C": _JOIN},
        divisible_by_16=(*pointers, "n"),
    )  # fmt: skip
    yield AotCase(
        name="points_decide",
        fn=points_decide_kernel,
        signature={
            "status": "*i32", "iterations": "*i64", "error": "*fp32", "blocks": "i32", "iteration": "i32",
            "tolerance_at": "*fp32",
        },
        constexprs={"ACC": tl.float32},
        num_warps=1,
    )  # fmt: skip
