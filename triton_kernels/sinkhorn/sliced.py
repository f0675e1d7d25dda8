"""GPU kernels of core `sliced`: the formulas are in solera/sinkhorn/sliced.py.

Forward, one program a direction: both clouds are projected, packed with their indices into 64-bit keys whose order
is the values' (then the indices'), sorted in registers by a bitonic network, compared and written as permutations;
one launch. That serves clouds of one size, up to WIDEST points, in float32. Others (float64, larger, n != m) are
composed of torch's sorts on the device, and say so here alone: the result is the same.

Backward, for clouds of one size: one program a direction puts the slopes into the unsorted places (the projections are
gathered anew from L2), then four batched products.

H200 at 4.3 TB/s, 32 x 512 points, d = 3, 100 directions: 13 MB of permutations written, 3 us; the network has 45
stages of 256 compare-exchanges for 6400 sorts, 74 M of them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from .._launch import accumulator, on_device_of

WIDEST = (
    512  # keys that a program sorts in registers; the network of 2048 takes a minute to compile
)


@triton.jit
def _sorted(cloud, theta, n, d, N: tl.constexpr):
    """(values in order, permutation) of a cloud's projections; positions beyond n hold garbage."""
    i = tl.arange(0, N)
    a = tl.zeros((N,), tl.float32)
    for c in range(d):
        a += tl.load(theta + c) * tl.load(cloud + i * d + c, mask=i < n, other=0.0)
    bits = a.to(tl.int32, bitcast=True)
    key = tl.where(a == a, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)
    packed = (key.to(tl.int64) << 32) | i.to(tl.int64)
    packed = tl.sort(tl.where(i < n, packed, 0x7FFFFFFFFFFFFFFF))
    key = (packed >> 32).to(tl.int32)
    bits = key ^ ((key >> 31) & 0x7FFFFFFF)
    return bits.to(tl.float32, bitcast=True), (packed & 0xFFFFFFFF).to(tl.int32)


@triton.jit
def sliced_forward_kernel(
    x, y, theta, value, order_x, order_y, p_at, n, d, directions, theta_step,
    P: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """P: 1, 2, or 0 for the power at p_at."""
    program = tl.program_id(0).to(tl.int64)
    item = program // directions
    row = theta + (item * theta_step + program % directions) * d
    a, places_x = _sorted(x + item * n * d, row, n, d, N)
    b, places_y = _sorted(y + item * n * d, row, n, d, N)
    i = tl.arange(0, N)
    tl.store(order_x + program * n + i, places_x, mask=i < n)
    tl.store(order_y + program * n + i, places_y, mask=i < n)
    size = tl.abs(tl.where(i < n, a - b, 0.0))
    if P == 2:
        cost = size * size
    elif P == 1:
        cost = size
    else:
        cost = tl.where(size == 0, 0.0, tl.exp2(tl.load(p_at) * tl.log2(size)))
    tl.store(value + program, tl.sum(cost) / n)


@triton.jit
def _gathered(cloud, theta, place, mask, d, ACC: tl.constexpr, C: tl.constexpr):
    a = tl.zeros((C,), ACC)
    for c in range(d):
        a += tl.load(theta + c) * tl.load(cloud + place * d + c, mask=mask, other=0.0)
    return a


@triton.jit
def sliced_slopes_kernel(
    grad, x, y, theta, order_x, order_y, slope_x, slope_y, p_at, n, d, directions, theta_step,
    P: tl.constexpr, ACC: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """p |a - b|^(p - 1) sign(a - b) grad / n in the places the sorted points came from, minus that for y."""
    program = tl.program_id(0).to(tl.int64)
    item = program // directions
    row = theta + (item * theta_step + program % directions) * d
    scale = tl.load(grad + program) / n
    for start in range(0, n, C):
        i = start + tl.arange(0, C)
        mask = i < n
        at = tl.load(order_x + program * n + i, mask=mask, other=0)
        to = tl.load(order_y + program * n + i, mask=mask, other=0)
        a = _gathered(x + item * n * d, row, at, mask, d, ACC, C)
        difference = a - _gathered(y + item * n * d, row, to, mask, d, ACC, C)
        if P == 2:
            slope = 2 * difference
        else:
            sign = tl.where(difference > 0, 1.0, tl.where(difference < 0, -1.0, difference))
            slope = sign
            if P == 0:
                p = tl.load(p_at)
                size = tl.where(difference == 0, 1.0, tl.abs(difference))
                slope = sign * p * tl.exp2((p - 1) * tl.log2(size))
        slope *= scale
        tl.store(slope_x + program * n + at, slope, mask=mask)
        tl.store(slope_y + program * n + to, -slope, mask=mask)


def _power(p: float) -> int:
    return int(p) if p in (1, 2) else 0


def sliced_forward(x, y, directions, p):
    batch, n, d = x.shape
    if y.shape[1] != n or n > WIDEST or x.dtype != torch.float32 or batch == 0:
        from solera.sinkhorn.sliced import _sliced_forward

        return _sliced_forward(x, y, directions, p)
    x, y, directions = (t.contiguous() for t in (x, y, directions))
    count = directions.shape[1]
    value = x.new_empty((batch, count))
    order_x, order_y = (x.new_empty((batch, count, n), dtype=torch.int32) for _ in range(2))
    step = count if directions.shape[0] == batch else 0
    size = max(16, triton.next_power_of_2(n))
    with on_device_of(x):
        sliced_forward_kernel[(batch * count,)](
            x, y, directions, value, order_x, order_y, x.new_full((1,), p), n, d, count, step,
            P=_power(p), N=size, num_warps=4,
        )  # fmt: skip
    return value, order_x, order_y


def sliced_backward(grad, x, y, directions, order_x, order_y, p):
    batch, n, _ = x.shape
    if y.shape[1] != n or batch == 0:
        from solera.sinkhorn.sliced import _sliced_backward

        return _sliced_backward(grad, x, y, directions, order_x, order_y, p)
    tensors = (grad, x, y, directions, order_x, order_y)
    grad, x, y, directions, order_x, order_y = (t.contiguous() for t in tensors)
    count, d = directions.shape[1:]
    slope_x, slope_y = (x.new_empty((batch, count, n)) for _ in range(2))
    step = count if directions.shape[0] == batch else 0
    with on_device_of(x):
        sliced_slopes_kernel[(batch * count,)](
            grad, x, y, directions, order_x, order_y, slope_x, slope_y, x.new_full((1,), p), n, d, count,
            step, P=_power(p), ACC=accumulator(x), C=512, num_warps=4,
        )  # fmt: skip
        dtheta = torch.baddbmm(slope_x @ x, slope_y, y)
        rows = directions.expand(batch, count, d)
        return slope_x.transpose(1, 2) @ rows, slope_y.transpose(1, 2) @ rows, dtheta


def aot() -> Iterator:
    """The sort at its widest and of 64 points; the slopes for p = 2 and for any p, and in float64."""
    from .._aot import AotCase

    integers = dict.fromkeys(("n", "d", "directions", "theta_step"), "i32")
    orders = dict.fromkeys(("order_x", "order_y"), "*i32")
    for power, size, warps in ((2, 64, 4), (0, WIDEST, 4)):
        given = {"P": power, "N": size}
        names = [a for a in sliced_forward_kernel.arg_names if a not in given]
        yield AotCase(
            name=f"sliced_forward_{size}_p{power}",
            fn=sliced_forward_kernel,
            signature={a: (integers | orders).get(a, "*fp32") for a in names},
            constexprs=given,
            divisible_by_16=("x", "y", "theta", "value", "order_x", "order_y", "n"),
            num_warps=warps,
        )
    for power, word, acc in (
        (2, "*fp32", tl.float32),
        (0, "*fp32", tl.float32),
        (2, "*fp64", tl.float64),
    ):
        given = {"P": power, "ACC": acc, "C": 512}
        names = [a for a in sliced_slopes_kernel.arg_names if a not in given]
        yield AotCase(
            name=f"sliced_slopes_p{power}_{word[3:]}",
            fn=sliced_slopes_kernel,
            signature={a: (integers | orders).get(a, word) for a in names},
            constexprs=given,
            divisible_by_16=(
                "grad",
                "x",
                "y",
                "theta",
                "order_x",
                "order_y",
                "slope_x",
                "slope_y",
                "n",
            ),
            num_warps=4,
        )
