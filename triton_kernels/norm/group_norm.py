"""GPU launchers of core `group_norm`: the passes of `channel_norm`, and between them one small kernel each way.

Bytes as in channel_norm: x is read twice forward; x and dy twice backward. The small kernels turn the moments of
each (sample, channel) into coefficients, and the sums over positions into p, q and the gradient of the
weight; they touch a few numbers a channel, so the launch is their price.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl

from .._launch import accumulate_type, accumulator, on_device_of
from .channel_norm import channel_affine, channel_gradient, channel_moments, channel_reduce

BLOCK = 256


@triton.jit
def _member(i, group, groups, channels, width, BATCH: tl.constexpr):
    """The i-th (sample, channel) of a group: its place in (N, C), and in a parameter (C,)."""
    if BATCH:
        return i * channels + group, group + i * 0
    channel = (group % groups) * width + i
    return (group // groups) * channels + channel, channel


@triton.jit
def _parameter(
    t,
    at,
    channel,
    there,
    HAS: tl.constexpr,
    EACH: tl.constexpr,
    OTHER: tl.constexpr,
    ACC: tl.constexpr,
):
    if HAS:
        return tl.load(t + (at if EACH else channel), mask=there, other=0.0).to(ACC)
    return tl.zeros(at.shape, ACC) + OTHER


@triton.jit
def group_coefficients_kernel(
    one, other, weight, bias, mean, var, center, scale, shift,
    groups, channels, width, eps, correction,
    STATISTICS: tl.constexpr, BATCH: tl.constexpr, HAS_WEIGHT: tl.constexpr, WEIGHT_EACH: tl.constexpr,
    HAS_BIAS: tl.constexpr, BIAS_EACH: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0).to(tl.int64)
    if STATISTICS:
        total = tl.zeros([BLOCK], ACC)
        for start in range(0, width, BLOCK):
            i = start + tl.arange(0, BLOCK)
            at, channel = _member(i, group, groups, channels, width, BATCH)
            total += tl.load(one + at, mask=i < width, other=0.0)
        mu = tl.sum(total, 0) / width
        total = tl.zeros([BLOCK], ACC)
        for start in range(0, width, BLOCK):
            i = start + tl.arange(0, BLOCK)
            at, channel = _member(i, group, groups, channels, width, BATCH)
            d = tl.where(i < width, tl.load(one + at, mask=i < width, other=0.0) - mu, 0.0)
            total += tl.load(other + at, mask=i < width, other=0.0) + d * d
        square = tl.sum(total, 0) / width
        tl.store(mean + group, mu)
        tl.store(var + group, square)
    else:
        mu = tl.load(mean + group)
        square = tl.load(var + group)
    rstd = 1.0 / tl.sqrt(square * correction + eps)
    for start in range(0, width, BLOCK):
        i = start + tl.arange(0, BLOCK)
        there = i < width
        at, channel = _member(i, group, groups, channels, width, BATCH)
        w = _parameter(weight, at, channel, there, HAS_WEIGHT, WEIGHT_EACH, 1.0, ACC)
        b = _parameter(bias, at, channel, there, HAS_BIAS, BIAS_EACH, 0.0, ACC)
        tl.store(center + at, tl.zeros([BLOCK], ACC) + mu, mask=there)
        tl.store(scale + at, (w * rstd).to(ACC), mask=there)
        tl.store(shift + at, b, mask=there)


@triton.jit
def group_cotangents_kernel(
    sum_g, sum_gd, weight, var, p, q, dweight, groups, channels, width, count, eps, correction,
    BATCH: tl.constexpr, HAS_WEIGHT: tl.constexpr, WEIGHT_EACH: tl.constexpr, ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0).to(tl.int64)
    rstd = 1.0 / tl.sqrt(tl.load(var + group) * correction + eps)
    of_rstd = tl.zeros([BLOCK], ACC)
    of_center = tl.zeros([BLOCK], ACC)
    for start in range(0, width, BLOCK):
        i = start + tl.arange(0, BLOCK)
        there = i < width
        at, channel = _member(i, group, groups, channels, width, BATCH)
        w = _parameter(weight, at, channel, there, HAS_WEIGHT, WEIGHT_EACH, 1.0, ACC)
        gd = tl.load(sum_gd + at, mask=there, other=0.0)
        of_rstd += w * gd
        of_center += w * tl.load(sum_g + at, mask=there, other=0.0)
        tl.store(dweight + at, (gd * rstd).to(ACC), mask=there)
    each_p = -correction * rstd * rstd * rstd * tl.sum(of_rstd, 0) / count
    each_q = -rstd * tl.sum(of_center, 0) / count
    for start in range(0, width, BLOCK):
        i = start + tl.arange(0, BLOCK)
        at, channel = _member(i, group, groups, channels, width, BATCH)
        tl.store(p + at, (tl.zeros([BLOCK], ACC) + each_p).to(ACC), mask=i < width)
        tl.store(q + at, (tl.zeros([BLOCK], ACC) + each_q).to(ACC), mask=i < width)


# ---- launchers ---------------------------------------------------------------------------------------


class _Plan:
    """x (N, C, S) or (N, S, C) as (A, M, K) of channel_norm, and its groups.

    Over the batch the samples of a channels-last x are kept apart as well: a group is then a channel's N
    pairs in (N, C), in either layout.
    """

    def __init__(self, x, groups: int, batch: bool, last: bool):
        n, self.channels = x.shape[0], x.shape[2 if last else 1]
        size = x.shape[1 if last else 2]
        self.view = x.shape if last else (n * self.channels, size, 1)
        self.pair = (self.view[0], self.view[2])
        self.groups = self.channels if batch else groups
        self.width = n if batch else self.channels // groups
        self.stats = (1, self.channels) if batch else (n, groups)
        self.grid = (self.stats[0] * self.stats[1],)
        self.count = self.width * size


def _given(weight, bias):
    return {
        "HAS_WEIGHT": weight is not None,
        "WEIGHT_EACH": weight is not None and weight.dim() == 2,
        "HAS_BIAS": bias is not None,
        "BIAS_EACH": bias is not None and bias.dim() == 2,
    }


def _coefficients(x, plan, moments, mean, var, weight, bias, batch, eps, correction):
    acc = accumulate_type(x)
    out = [x.new_empty(plan.pair, dtype=acc) for _ in range(3)]
    one, other = moments or (mean, var)
    group_coefficients_kernel[plan.grid](
        one, other, mean if weight is None else weight.contiguous(),
        mean if bias is None else bias.contiguous(), mean, var, *out, plan.groups, plan.channels,
        plan.width, eps, correction, STATISTICS=moments is not None, BATCH=batch, **_given(weight, bias),
        ACC=accumulator(x), BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return out


def group_norm(x, weight, bias, residual, groups, batch, last, eps, correction, activation):
    plan, acc = _Plan(x, groups, batch, last), accumulate_type(x)
    flat = x.reshape(plan.view)
    mean, var = (x.new_empty(plan.stats, dtype=acc) for _ in range(2))
    with on_device_of(x):
        moments = channel_moments(flat, None)
        affine = _coefficients(x, plan, moments, mean, var, weight, bias, batch, eps, correction)
        residual = None if residual is None else residual.reshape(plan.view)
        y = channel_affine(flat, *affine, residual, None, activation)
    return y.view(x.shape), mean, var


def group_norm_backward(
    dy, x, weight, bias, residual, mean, var, groups, batch, last, eps, correction, activation,
    need_x, need_residual, need_affine,
):  # fmt: skip
    plan, acc = _Plan(x, groups, batch, last), accumulate_type(x)
    mean, var = mean.contiguous(), var.contiguous()
    with on_device_of(x):
        affine = _coefficients(x, plan, None, mean, var, weight, bias, batch, eps, correction)
        residual = None if residual is None else residual.reshape(plan.view)
        data = (dy.reshape(plan.view), x.reshape(plan.view), *affine, residual, None, activation)
        sum_g, sum_gd = channel_reduce(*data)
        p, q, dweight = (x.new_empty(plan.pair, dtype=acc) for _ in range(3))
        given = _given(weight, None)
        group_cotangents_kernel[plan.grid](
            sum_g, sum_gd, mean if weight is None else weight.contiguous(), var, p, q, dweight, plan.groups,
            plan.channels, plan.width, plan.count, eps, correction, BATCH=batch,
            HAS_WEIGHT=given["HAS_WEIGHT"], WEIGHT_EACH=given["WEIGHT_EACH"], ACC=accumulator(x),
            BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
        dx, dresidual = channel_gradient(*data, p, q, need_x, need_residual)

    def gathered(each, parameter):
        if parameter is None or not need_affine:
            return each.new_empty(0)
        each = each.view(x.shape[0], plan.channels)
        return each if parameter.dim() == 2 else each.sum(0)

    return (
        dx.view(x.shape) if need_x else dx,
        dresidual.view(x.shape) if need_residual else dresidual,
        gathered(dweight, weight),
        gathered(sum_g, bias),
    )


def aot() -> Iterator:
    """The small kernels, over groups of channels and over the batch; the passes are channel_norm's."""
    from .._aot import AotCase

    sizes = {"groups": "i32", "channels": "i32", "width": "i32"}
    reals = {"eps": "fp32", "correction": "fp32"}
    for batch in (False, True):
        flags = {"BATCH": batch, "HAS_WEIGHT": True, "WEIGHT_EACH": not batch, "ACC": tl.float32}
        names = "one other weight bias mean var center scale shift".split()
        yield AotCase(
            name=f"group_coefficients-{'batch' if batch else 'groups'}",
            fn=group_coefficients_kernel,
            signature={**dict.fromkeys(names, "*fp32"), **sizes, **reals},
            constexprs={
                **flags, "STATISTICS": True, "HAS_BIAS": True, "BIAS_EACH": not batch, "BLOCK": BLOCK,
            },
            divisible_by_16=tuple(names),
            num_warps=4,
        )  # fmt: skip
        names = "sum_g sum_gd weight var p q dweight".split()
        yield AotCase(
            name=f"group_cotangents-{'batch' if batch else 'groups'}",
            fn=group_cotangents_kernel,
            signature={**dict.fromkeys(names, "*fp32"), **sizes, "count": "i32", **reals},
            constexprs={**flags, "BLOCK": BLOCK},
            divisible_by_16=tuple(names),
            num_warps=4,
        )
