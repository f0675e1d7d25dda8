"""GPU kernels of core `reparam`: the formulas are in solera/weights/reparam.py.

Elements read and written: mixout 2 + 1, backward 1 + 1 (2 with the anchor's); mask 2 + 1, backward 3 + 2;
dropout 2 + 1; compand 1 + 1, backward 2 + 1. A program of mixout makes the words of R chunks of 512 elements and
serves the four slots of each; with a column mask it keeps them over a block of rows. Compiled without contraction
to fused multiply-adds, so the bits are those of the other backends.

H200 at 4.3 TB/s: mixout of 4096 x 4096 bfloat16 23 us is the floor.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from .._launch import accumulator, on_device_of
from ._mask import mask_words

KEEP_ALL = 2**32


@triton.jit
def number(bits, ACC: tl.constexpr):
    """A Python float handed over as the bits of a float64: a float argument would be rounded to float32."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True).to(ACC)


@triton.jit
def _word(slot: tl.constexpr, w0, w1, w2, w3):
    if slot == 0:
        word = w0
    elif slot == 1:
        word = w1
    elif slot == 2:
        word = w2
    else:
        word = w3
    return word


@triton.jit(do_not_specialize=["key", "bound", "scale"])
def mixout_kernel(
    weight, anchor, out, seed, key, bound, scale, rows, columns, ANCHOR: tl.constexpr,
    ACC: tl.constexpr, ROWS: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)[:, None]  # [R, 1]
    lane = tl.arange(0, 128)[None, :]  # [1, 128]
    w0, w1, w2, w3 = mask_words(tl.load(seed), chunk, lane, key, key * 0)
    s = number(scale, ACC)
    first = tl.program_id(1).to(tl.int64) * ROWS
    for row in range(first, tl.minimum(first + ROWS, rows)):
        for slot in tl.static_range(4):
            column = chunk * 512 + slot * 128 + lane
            inside = column < columns
            at = row * columns + column
            x = tl.load(weight + at, mask=inside, other=0.0).to(ACC)
            base = tl.zeros((R, 128), ACC)
            if ANCHOR:
                base = tl.load(anchor + at, mask=inside, other=0.0).to(ACC)
            kept = _word(slot, w0, w1, w2, w3).to(tl.int64) < bound
            mixed = tl.where(kept, base + (x - base) * s, base)
            tl.store(out + at, mixed.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["key", "bound", "scale"])
def mixout_backward_kernel(
    grad, dweight, danchor, seed, key, bound, scale, rows, columns, NEED_WEIGHT: tl.constexpr,
    NEED_ANCHOR: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)[:, None]  # [R, 1]
    lane = tl.arange(0, 128)[None, :]  # [1, 128]
    w0, w1, w2, w3 = mask_words(tl.load(seed), chunk, lane, key, key * 0)
    s = number(scale, ACC)
    first = tl.program_id(1).to(tl.int64) * ROWS
    for row in range(first, tl.minimum(first + ROWS, rows)):
        for slot in tl.static_range(4):
            column = chunk * 512 + slot * 128 + lane
            inside = column < columns
            at = row * columns + column
            g = tl.load(grad + at, mask=inside, other=0.0).to(ACC)
            kept = _word(slot, w0, w1, w2, w3).to(tl.int64) < bound
            d = tl.where(kept, g * s, 0.0)
            if NEED_WEIGHT:
                tl.store(dweight + at, d.to(dweight.dtype.element_ty), mask=inside)
            if NEED_ANCHOR:
                tl.store(danchor + at, (g - d).to(danchor.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["key", "rate", "eps"])
def dropout_kernel(
    grad, other, out, seed, key, rate, eps, n, ACC: tl.constexpr, R: tl.constexpr
):  # fmt: skip
    chunk = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)[:, None]  # [R, 1]
    lane = tl.arange(0, 128)[None, :]  # [1, 128]
    w0, w1, w2, w3 = mask_words(tl.load(seed), chunk, lane, key, key * 0)
    low = number(rate, ACC)  # 1 - rate
    small = number(eps, ACC)
    for slot in tl.static_range(4):
        at = chunk * 512 + slot * 128 + lane
        g = tl.load(grad + at, mask=at < n, other=0.0).to(ACC)
        h = tl.load(other + at, mask=at < n, other=0.0).to(ACC)
        toward = tl.where(g > 0, g + h, tl.where(g < 0, -(g + h), 0.0))
        agreement = 0.5 * (1.0 + _quotient(toward, tl.abs(g) + tl.abs(h) + small, ACC))
        u = (_word(slot, w0, w1, w2, w3) >> 8).to(ACC) * 5.9604644775390625e-08
        kept = tl.where(agreement > u, g, g * low)
        tl.store(out + at, kept.to(out.dtype.element_ty), mask=at < n)


@triton.jit
def _quotient(x, y, ACC: tl.constexpr):
    """Rounded to nearest, as elsewhere: float32's plain division is an approximation on some GPUs."""
    if ACC == tl.float32:
        return tl.math.div_rn(x, y)
    else:
        return x / y


@triton.jit(do_not_specialize=["threshold"])
def masked_kernel(weight, score, out, threshold, n, ACC: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    w = tl.load(weight + at, mask=at < n, other=0.0)
    m = tl.load(score + at, mask=at < n, other=0.0).to(ACC)
    tl.store(out + at, tl.where(m > number(threshold, ACC), w, 0.0), mask=at < n)


@triton.jit(do_not_specialize=["threshold"])
def masked_backward_kernel(
    grad, weight, score, dweight, dscore, threshold, n, NEED_WEIGHT: tl.constexpr,
    NEED_SCORE: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(grad + at, mask=at < n, other=0.0)
    if NEED_WEIGHT:
        m = tl.load(score + at, mask=at < n, other=0.0).to(ACC)
        tl.store(dweight + at, tl.where(m > number(threshold, ACC), g, 0.0), mask=at < n)
    if NEED_SCORE:
        w = tl.load(weight + at, mask=at < n, other=0.0).to(ACC)
        tl.store(dscore + at, (g.to(ACC) * w).to(dscore.dtype.element_ty), mask=at < n)


# ---- companders: Cephes' approximations, as csrc/cpu/weights/companders.h ----------------------------


@triton.jit
def arctan(x, ACC: tl.constexpr):
    size = tl.abs(x)
    far = size > 2.414213562373095
    near = size > 0.4142135623730950
    t = tl.where(near, (size - 1.0) / (size + 1.0), size)
    t = tl.where(far, -1.0 / tl.where(far, size, 1.0), t)
    z = t * t
    # pi/2, pi/4 or 0: a choice between numbers would be one in float32.
    base = near.to(ACC) * 0.7853981633974483 + far.to(ACC) * 0.7853981633974483
    if ACC == tl.float64:
        p = z * -8.750608600031904122785e-1 - 1.615753718733365076637e1
        p = p * z - 7.500855792314704667340e1
        p = p * z - 1.228866684490136173410e2
        p = p * z - 6.485021904942025371773e1
        q = z + 2.485846490142306297962e1
        q = q * z + 1.650270098316988542046e2
        q = q * z + 4.328810604912902668951e2
        q = q * z + 4.853903996359136964868e2
        q = q * z + 1.945506571482613964425e2
        y = base + (t * (z * p / q) + t)
    else:
        p = z * 8.05374449538e-2 - 1.38776856032e-1
        p = p * z + 1.99777106478e-1
        p = p * z - 3.33329491539e-1
        y = base + (p * z * t + t)
    return tl.where(x < 0, -y, y)


@triton.jit
def hyperbolic_tangent(x, ACC: tl.constexpr):
    size = tl.abs(x)
    close = size < 0.625
    v = tl.where(close, x, 0.0)
    z = v * v
    if ACC == tl.float64:
        p = z * -9.64399179425052238628e-1 - 9.92877231001918586564e1
        p = p * z - 1.61468768441708447952e3
        q = z + 1.12811678491632931402e2
        q = q * z + 2.23548839060100448583e3
        q = q * z + 4.84406305325125486048e3
        small = v + v * (z * p / q)
    else:
        p = z * -5.70498872745e-3 + 2.06390887954e-2
        p = p * z - 5.37397155531e-2
        p = p * z + 1.33314422036e-1
        p = p * z - 3.33332819422e-1
        small = p * z * v + v
    e = tl.exp(-2.0 * size)
    large = (1.0 - e) / (1.0 + e)
    return tl.where(close, small, tl.where(x < 0, -large, large))


@triton.jit
def compand_kernel(
    v, a, b, out, n, TANH: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    t = tl.load(v + at, mask=at < n, other=0.0).to(ACC) / tl.load(b).to(ACC)
    if TANH:
        f = hyperbolic_tangent(t, ACC)
    else:
        f = arctan(t, ACC)
    tl.store(out + at, (tl.load(a).to(ACC) * f).to(out.dtype.element_ty), mask=at < n)


@triton.jit
def compand_backward_kernel(
    grad, v, a, b, dv, partial, n, TANH: tl.constexpr, NEED_V: tl.constexpr, ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    at = program * BLOCK + tl.arange(0, BLOCK)
    width = tl.load(b).to(ACC)
    g = tl.load(grad + at, mask=at < n, other=0.0).to(ACC)
    t = tl.load(v + at, mask=at < n, other=0.0).to(ACC) / width
    d = g * (tl.load(a).to(ACC) / width)
    if TANH:
        f = hyperbolic_tangent(t, ACC)
        d = d * (1.0 - f * f)
    else:
        f = arctan(t, ACC)
        d = d / (1.0 + t * t)
    if NEED_V:
        tl.store(dv + at, d.to(dv.dtype.element_ty), mask=at < n)
    tl.store(partial + program * 2, tl.sum(g * f, 0).to(tl.float64))
    tl.store(partial + program * 2 + 1, -tl.sum(t * d, 0).to(tl.float64))


# ---- launchers ---------------------------------------------------------------------------------------


def _bits(value: float) -> int:
    return struct.unpack("q", struct.pack("d", value))[0]


def _block(x: torch.Tensor) -> int:
    return 1024 if x.is_cuda else 16384


def _mask_plan(like, p, column):
    """(arguments of the mask, grid, constants): one row of all elements, or rows under one row of the mask."""
    rows = like.shape[0] if column and like.dim() > 1 else 1
    columns = like.numel() // max(rows, 1)
    chunks = 2 if like.is_cuda else 8
    block = max(triton.cdiv(rows, 32768), 16 if like.is_cuda else 64)
    bound = round((1.0 - p) * KEEP_ALL)
    scale = _bits(1.0 / (1.0 - p) if p < 1.0 else 0.0)
    grid = (triton.cdiv(columns, chunks * 512), triton.cdiv(rows, block))
    constants = {"ACC": accumulator(like), "ROWS": block, "R": chunks, "enable_fp_fusion": False}
    return (bound, scale, rows, columns), grid, constants


def mixout(weight, anchor, seed, p, key, column):
    if anchor is not None and (anchor.shape, anchor.dtype) != (weight.shape, weight.dtype):
        raise RuntimeError("mixout: anchor differs from the weight in shape or dtype")
    weight = weight.contiguous()
    anchor = None if anchor is None else anchor.contiguous()
    out = weight.new_empty(weight.shape)
    if weight.numel():
        numbers, grid, constants = _mask_plan(weight, p, column)
        with on_device_of(weight):
            mixout_kernel[grid](
                weight, anchor, out, seed, key, *numbers, ANCHOR=anchor is not None, **constants
            )
    return out


def mixout_backward(grad, seed, p, key, column, need_weight, need_anchor):
    grad = grad.contiguous()
    dweight = grad.new_empty(grad.shape if need_weight else 0)
    danchor = grad.new_empty(grad.shape if need_anchor else 0)
    if grad.numel() and (need_weight or need_anchor):
        numbers, grid, constants = _mask_plan(grad, p, column)
        with on_device_of(grad):
            mixout_backward_kernel[grid](
                grad, dweight, danchor, seed, key, *numbers, NEED_WEIGHT=need_weight,
                NEED_ANCHOR=need_anchor, **constants,
            )  # fmt: skip
    return dweight, danchor


def gradient_dropout(grad, other, seed, rate, eps, key):
    grad, other = grad.contiguous(), other.contiguous()
    out = grad.new_empty(grad.shape)
    n, chunks = grad.numel(), 2 if grad.is_cuda else 8
    if n:
        with on_device_of(grad):
            dropout_kernel[(triton.cdiv(n, chunks * 512),)](
                grad, other, out, seed, key, _bits(1.0 - rate), _bits(eps), n, ACC=accumulator(grad),
                R=chunks, enable_fp_fusion=False,
            )  # fmt: skip
    return out


def masked_weight(weight, score, threshold):
    weight, score = weight.contiguous(), score.contiguous()
    out = weight.new_empty(weight.shape)
    n, block = weight.numel(), _block(weight)
    if n:
        with on_device_of(weight):
            masked_kernel[(triton.cdiv(n, block),)](
                weight, score, out, _bits(threshold), n, ACC=accumulator(weight), BLOCK=block
            )
    return out


def masked_weight_backward(grad, weight, score, threshold, need_weight, need_score):
    grad, weight, score = grad.contiguous(), weight.contiguous(), score.contiguous()
    dweight = grad.new_empty(grad.shape if need_weight else 0)
    dscore = grad.new_empty(grad.shape if need_score else 0)
    n, block = grad.numel(), _block(grad)
    if n and (need_weight or need_score):
        with on_device_of(grad):
            masked_backward_kernel[(triton.cdiv(n, block),)](
                grad, weight, score, dweight, dscore, _bits(threshold), n, NEED_WEIGHT=need_weight,
                NEED_SCORE=need_score, ACC=accumulator(grad), BLOCK=block,
            )  # fmt: skip
    return dweight, dscore


def weight_compand(v, a, b, kind):
    v = v.contiguous()
    out = v.new_empty(v.shape)
    n, block = v.numel(), _block(v)
    if n:
        with on_device_of(v):
            compand_kernel[(triton.cdiv(n, block),)](
                v, a, b, out, n, TANH=kind == 1, ACC=accumulator(v), BLOCK=block
            )
    return out


def weight_compand_backward(grad, v, a, b, kind, need_v):
    grad, v = grad.contiguous(), v.contiguous()
    dv = v.new_empty(v.shape if need_v else 0)
    n, block = v.numel(), _block(v)
    partial = v.new_empty((triton.cdiv(n, block), 2), dtype=torch.float64)
    if n:
        with on_device_of(v):
            compand_backward_kernel[(partial.shape[0],)](
                grad, v, a, b, dv, partial, n, TANH=kind == 1, NEED_V=need_v, ACC=accumulator(v),
                BLOCK=block,
            )  # fmt: skip
    return dv, partial.sum(0)


# ---- ahead-of-time compilation -----------------------------------------------------------------------


def aot() -> Iterator:
    """The variants held to tests/budgets.json."""
    from .._aot import AotCase

    numbers = {"seed": "*i64", "key": "i32", "bound": "i64", "scale": "i64"}
    sizes = {"rows": "i32", "columns": "i32"}
    for name, kind in (("float32", "*fp32"), ("bfloat16", "*bf16")):
        mask = {"ACC": tl.float32, "ROWS": 16, "R": 2}
        yield AotCase(
            name=f"mixout_{name}",
            fn=mixout_kernel,
            signature={"weight": kind, "anchor": kind, "out": kind, **numbers, **sizes},
            constexprs={"ANCHOR": True, **mask},
            divisible_by_16=("weight", "anchor", "out", "seed", "columns"),
        )
        yield AotCase(
            name=f"mixout_backward_{name}",
            fn=mixout_backward_kernel,
            signature={"grad": kind, "dweight": kind, "danchor": kind, **numbers, **sizes},
            constexprs={"NEED_WEIGHT": True, "NEED_ANCHOR": True, **mask},
            divisible_by_16=("grad", "dweight", "danchor", "seed", "columns"),
        )
        yield AotCase(
            name=f"gradient_dropout_{name}",
            fn=dropout_kernel,
            signature={
                "grad": kind, "other": kind, "out": kind, "seed": "*i64", "key": "i32",
                "rate": "i64", "eps": "i64", "n": "i32",
            },
            constexprs={"ACC": tl.float32, "R": 2},
            divisible_by_16=("grad", "other", "out", "seed", "n"),
        )  # fmt: skip
        flat = {"ACC": tl.float32, "BLOCK": 1024}
        yield AotCase(
            name=f"masked_weight_{name}",
            fn=masked_kernel,
            signature={"weight": kind, "score": kind, "out": kind, "threshold": "i64", "n": "i32"},
            constexprs=flat,
            divisible_by_16=("weight", "score", "out", "n"),
        )
        yield AotCase(
            name=f"masked_weight_backward_{name}",
            fn=masked_backward_kernel,
            signature={
                "grad": kind, "weight": kind, "score": kind, "dweight": kind, "dscore": kind,
                "threshold": "i64", "n": "i32",
            },
            constexprs={"NEED_WEIGHT": True, "NEED_SCORE": True, **flat},
            divisible_by_16=("grad", "weight", "score", "dweight", "dscore", "n"),
        )  # fmt: skip
    for tanh in (False, True):
        name = "tanh" if tanh else "arctan"
        one = {"a": "*fp32", "b": "*fp32"}
        yield AotCase(
            name=f"compand_{name}",
            fn=compand_kernel,
            signature={"v": "*fp32", **one, "out": "*fp32", "n": "i32"},
            constexprs={"TANH": tanh, "ACC": tl.float32, "BLOCK": 1024},
            divisible_by_16=("v", "out", "n"),
        )
        yield AotCase(
            name=f"compand_backward_{name}",
            fn=compand_backward_kernel,
            signature={
                "grad": "*fp32", "v": "*fp32", **one, "dv": "*fp32", "partial": "*fp64", "n": "i32",
            },
            constexprs={"TANH": tanh, "NEED_V": True, "ACC": tl.float32, "BLOCK": 1024},
            divisible_by_16=("grad", "v", "dv", "partial", "n"),
        )  # fmt: skip
