"""GPU kernels of cores `batch_ensemble` and `member_linear`, which are one product with and without scales.

A program works for one member k on rows b of its (B, K, .) operands, so scales and bias are rows of a tile,
not gathers, and a shared x is read where it lies. Forward and dx are one product each with the scales and the
activation (or its derivative) applied to operands as they are loaded and to the result before it is stored.
The parameters' gradients come out of the member products G_k, which never leave registers.

Operations: forward 2 B K I O, backward twice that. Bytes: forward x, W, y (and z for gelu, silu); backward
dy, x, W, saved, dx, dW. dW, ds and dr are summed over member groups and tiles from partials in a fixed order.

H200 at 4.3 TB/s and 790 TFLOP/s in bf16, B = 4096, K = 32, 512 x 512: floors of 87 us forward and 174 us
backward by operations (62 and 94 us by bytes).
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from .._activation import activate, slope
from .._aot import AotCase
from .._launch import accumulate_type, accumulator, on_device_of

# The interpreter multiplies bfloat16 tiles wrongly, without a word; there operands are widened first.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@triton.jit
def _wide(k):
    """An index in 64 bits; a loop's index may be a plain int."""
    return tl.full((), 0, tl.int64) + k


@triton.jit
def _row(p, k, cols, width, stride, fill, HAS: tl.constexpr, ACC: tl.constexpr):
    """Row k of a scale or bias at `cols`; `fill` where it is not given."""
    if HAS:
        return tl.load(p + _wide(k) * stride + cols, mask=cols < width, other=0.0).to(ACC)
    return tl.full(cols.shape, fill, ACC)


@triton.jit
def _delta(dy, saved, at, mask, ACT: tl.constexpr, ACC: tl.constexpr):
    g = tl.load(dy + at, mask=mask, other=0.0).to(ACC)
    if ACT != 0:
        g = slope(g, tl.load(saved + at, mask=mask, other=0.0).to(ACC), ACT)
    return g


@triton.jit
def ensemble_forward_kernel(
    x, weight, r, s, bias, y, z, items, members, inner, outer, w_member, w_in, w_out, bias_stride,
    SHARED: tl.constexpr, HAS_R: tl.constexpr, HAS_S: tl.constexpr, HAS_BIAS: tl.constexpr,
    KEEP_Z: tl.constexpr, ACT: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    k = tl.program_id(2)
    b = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)  # [BM]
    o = tl.program_id(1) * BN + tl.arange(0, BN)  # [BN]
    n = b * members + k
    rows = b if SHARED else n
    w = weight + _wide(k) * w_member
    acc = tl.zeros((BM, BN), ACC)
    for start in range(0, inner, BK):
        i = start + tl.arange(0, BK)
        mask = (b < items)[:, None] & (i < inner)[None, :]
        a = tl.load(x + rows[:, None] * inner + i[None, :], mask=mask, other=0.0)  # [BM, BK]
        if HAS_R:
            a = a.to(ACC) * _row(r, k, i, inner, inner, 1.0, HAS_R, ACC)[None, :]
        inside = (i < inner)[:, None] & (o < outer)[None, :]
        at = i.to(tl.int64)[:, None] * w_in + o.to(tl.int64)[None, :] * w_out
        t = tl.load(w + at, mask=inside, other=0.0)  # [BK, BN]
        acc = tl.dot(a.to(DOT), t.to(DOT), acc, input_precision="ieee", out_dtype=ACC)
    v = acc * _row(s, k, o, outer, outer, 1.0, HAS_S, ACC)[None, :]
    v += _row(bias, k, o, outer, bias_stride, 0.0, HAS_BIAS, ACC)[None, :]
    at = n[:, None] * outer + o[None, :]
    mask = (b < items)[:, None] & (o < outer)[None, :]
    if KEEP_Z:
        tl.store(z + at, v.to(z.dtype.element_ty), mask=mask)
    tl.store(y + at, activate(v, ACT).to(y.dtype.element_ty), mask=mask)


@triton.jit
def _input_of_member(
    dy, saved, weight, r, s, k, b, i, items, members, inner, outer, w_member, w_in, w_out,
    HAS_R: tl.constexpr, HAS_S: tl.constexpr, ACT: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    w = weight + _wide(k) * w_member
    n = b * members + k
    acc = tl.zeros((BM, BN), ACC)
    for start in range(0, outer, BK):
        o = start + tl.arange(0, BK)
        mask = (b < items)[:, None] & (o < outer)[None, :]
        a = _delta(dy, saved, n[:, None] * outer + o[None, :], mask, ACT, ACC)  # [BM, BK]
        a *= _row(s, k, o, outer, outer, 1.0, HAS_S, ACC)[None, :]
        inside = (o < outer)[:, None] & (i < inner)[None, :]
        at = o.to(tl.int64)[:, None] * w_out + i.to(tl.int64)[None, :] * w_in
        t = tl.load(w + at, mask=inside, other=0.0)  # [BK, BN]
        acc = tl.dot(a.to(DOT), t.to(DOT), acc, input_precision="ieee", out_dtype=ACC)
    return acc * _row(r, k, i, inner, inner, 1.0, HAS_R, ACC)[None, :]


@triton.jit
def ensemble_input_kernel(
    dy, saved, weight, r, s, dx, items, members, inner, outer, w_member, w_in, w_out,
    SHARED: tl.constexpr, HAS_R: tl.constexpr, HAS_S: tl.constexpr, ACT: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """dx of a tile of batch items: of one member, or summed over all of them for a shared x."""
    b = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)  # [BM]
    i = tl.program_id(1) * BN + tl.arange(0, BN)  # [BN]
    k = tl.program_id(2)
    total = _input_of_member(
        dy, saved, weight, r, s, k, b, i, items, members, inner, outer, w_member, w_in, w_out,
        HAS_R, HAS_S, ACT, ACC, DOT, BM, BN, BK,
    )  # fmt: skip
    rows = b * members + k
    if SHARED:
        rows = b
        for other in range(1, members):
            total += _input_of_member(
                dy, saved, weight, r, s, other, b, i, items, members, inner, outer, w_member, w_in,
                w_out, HAS_R, HAS_S, ACT, ACC, DOT, BM, BN, BK,
            )  # fmt: skip
    mask = (b < items)[:, None] & (i < inner)[None, :]
    tl.store(dx + rows[:, None] * inner + i[None, :], total.to(dx.dtype.element_ty), mask=mask)


@triton.jit
def ensemble_parameters_kernel(
    dy, saved, x, weight, r, s, dweight, dr, ds, dbias, items, members, inner, outer, per_group,
    SEPARATE: tl.constexpr, SHARED: tl.constexpr, HAS_R: tl.constexpr, HAS_S: tl.constexpr,
    NEED_WEIGHT: tl.constexpr, NEED_R: tl.constexpr, NEED_S: tl.constexpr, NEED_BIAS: tl.constexpr,
    ACT: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr,
    BB: tl.constexpr,
):  # fmt: skip
    """A tile of G_k for each member of a group, folded into partials.

    dweight (groups, O, I), or with separate weights (K, I, O) itself; dr (tiles of O, K, I); ds (tiles of I,
    K, O); dbias (K, O), written by the programs of the first tile of I.
    """
    o = tl.program_id(0) * BO + tl.arange(0, BO)  # [BO]
    i = tl.program_id(1) * BI + tl.arange(0, BI)  # [BI]
    group = tl.program_id(2)
    at_o, at_i = o.to(tl.int64), i.to(tl.int64)
    inside = (o < outer)[:, None] & (i < inner)[None, :]
    dw = tl.zeros((BO, BI), ACC)
    last = tl.minimum((group + 1) * per_group, members)
    for k in range(group * per_group, last):
        g = tl.zeros((BO, BI), ACC)
        db = tl.zeros((BO,), ACC)
        for start in range(0, items, BB):
            b = (start + tl.arange(0, BB)).to(tl.int64)
            n = b * members + k
            mask = (o < outer)[:, None] & (b < items)[None, :]
            d = _delta(dy, saved, n[None, :] * outer + o[:, None], mask, ACT, ACC)  # [BO, BB]
            if NEED_BIAS:
                db += tl.sum(d, 1)
            rows = b if SHARED else n
            mask = (b < items)[:, None] & (i < inner)[None, :]
            a = tl.load(x + rows[:, None] * inner + i[None, :], mask=mask, other=0.0)  # [BB, BI]
            g = tl.dot(d.to(DOT), a.to(DOT), g, input_precision="ieee", out_dtype=ACC)
        row = _wide(k)
        if NEED_BIAS:
            if tl.program_id(1) == 0:
                tl.store(dbias + row * outer + o, db, mask=o < outer)
        if SEPARATE:
            if NEED_WEIGHT:
                at = (row * inner + at_i)[None, :] * outer + at_o[:, None]
                tl.store(dweight + at, g.to(dweight.dtype.element_ty), mask=inside)
        else:
            scale_r = _row(r, k, i, inner, inner, 1.0, HAS_R, ACC)[None, :]
            scale_s = _row(s, k, o, outer, outer, 1.0, HAS_S, ACC)[:, None]
            if NEED_WEIGHT:
                dw += g * scale_r * scale_s
            if NEED_R or NEED_S:
                g *= tl.load(
                    weight + at_o[:, None] * inner + at_i[None, :], mask=inside, other=0.0
                ).to(ACC)
            if NEED_R:
                at = dr + (tl.program_id(0).to(tl.int64) * members + row) * inner + i
                tl.store(at, tl.sum(g * scale_s, 0), mask=i < inner)
            if NEED_S:
                at = ds + (tl.program_id(1).to(tl.int64) * members + row) * outer + o
                tl.store(at, tl.sum(g * scale_r, 1), mask=o < outer)
    if NEED_WEIGHT and not SEPARATE:
        at = (_wide(group) * outer + at_o)[:, None] * inner + at_i[None, :]
        tl.store(dweight + at, dw, mask=inside)


@triton.jit
def ensemble_sum_parts_kernel(parts, out, count, n, C: tl.constexpr):
    """out[j] = sum over parts of parts[part, j], in order."""
    at = tl.program_id(0).to(tl.int64) * C + tl.arange(0, C)
    total = tl.zeros((C,), parts.dtype.element_ty)
    for p in range(count):
        total += tl.load(parts + _wide(p) * n + at, mask=at < n, other=0.0)
    tl.store(out + at, total, mask=at < n)


# ---- launchers ---------------------------------------------------------------------------------------

# Tiles of a product by dtype: columns, depth, warps, stages. Rows follow the batch, up to `BM`.
PRODUCT = {
    torch.bfloat16: {"BM": 128, "BN": 128, "BK": 32, "num_warps": 8, "num_stages": 3},
    torch.float16: {"BM": 128, "BN": 128, "BK": 32, "num_warps": 8, "num_stages": 3},
    torch.float32: {"BM": 64, "BN": 64, "BK": 32, "num_warps": 8, "num_stages": 2},
    torch.float64: {"BM": 32, "BN": 32, "BK": 16, "num_warps": 4, "num_stages": 2},
}
# dx: the activation's derivative on the way in takes registers, so half tiles are narrower.
INPUT = {
    **PRODUCT,
    torch.bfloat16: {"BM": 128, "BN": 64, "BK": 32, "num_warps": 8, "num_stages": 3},
    torch.float16: {"BM": 128, "BN": 64, "BK": 32, "num_warps": 8, "num_stages": 3},
}
PARAMETERS = {
    torch.bfloat16: {"BO": 64, "BI": 64, "BB": 32, "num_warps": 8, "num_stages": 3},
    torch.float16: {"BO": 64, "BI": 64, "BB": 32, "num_warps": 8, "num_stages": 3},
    torch.float32: {"BO": 64, "BI": 64, "BB": 32, "num_warps": 8, "num_stages": 2},
    torch.float64: {"BO": 32, "BI": 32, "BB": 16, "num_warps": 4, "num_stages": 2},
}
PROGRAMS = 512  # the parameters' gradients are cut into about so many programs, whatever the device


def _product_config(table: dict, x, items: int) -> dict[str, int]:
    config = dict(table[x.dtype])
    config["BM"] = min(config["BM"], max(16, triton.next_power_of_2(items)))
    return config


def _dot_type(x):
    if INTERPRETED or x.dtype in (torch.float32, torch.float64):
        return accumulator(x)
    return tl.bfloat16 if x.dtype == torch.bfloat16 else tl.float16


def _or(t, other):
    return other if t is None else t.contiguous()


def forward(x, weight, r, s, bias, activation, save, members, strides):
    """strides: of the weight over member, input and output; its sizes are those of (x, y)."""
    x, weight = x.contiguous(), weight.contiguous()
    items, inner = x.shape[0], x.shape[-1]
    outer = weight.shape[0] if weight.dim() == 2 else weight.shape[2]
    keep = save and activation >= 2
    y = x.new_empty((items, members, outer))
    z = x.new_empty(y.shape if keep else (0,))
    if y.numel() == 0:
        return y, z
    config = _product_config(PRODUCT, x, items)
    grid = (triton.cdiv(items, config["BM"]), triton.cdiv(outer, config["BN"]), members)
    with on_device_of(x):
        ensemble_forward_kernel[grid](
            x, weight, _or(r, x), _or(s, x), _or(bias, x), y, z, items, members, inner, outer, *strides,
            outer if bias is not None and bias.dim() == 2 else 0, SHARED=x.dim() == 2,
            HAS_R=r is not None, HAS_S=s is not None, HAS_BIAS=bias is not None, KEEP_Z=keep,
            ACT=activation, ACC=accumulator(x), DOT=_dot_type(x), **config,
        )  # fmt: skip
    return y, z


def _sum_parts(parts, shape):
    if parts.shape[0] == 1:
        return parts.view(shape)
    out = parts.new_empty(shape)
    if out.numel():
        ensemble_sum_parts_kernel[(triton.cdiv(out.numel(), 1024),)](
            parts, out, parts.shape[0], out.numel(), C=1024, num_warps=4
        )
    return out


def backward(
    dy, x, weight, r, s, saved, activation, bias_per_member, need_x, need_weight, need_r, need_s,
    need_bias, strides,
):  # fmt: skip
    dy, x, weight = dy.contiguous(), x.contiguous(), weight.contiguous()
    saved = _or(saved, dy)
    acc = accumulate_type(x)
    items, members, outer = dy.shape
    inner = x.shape[-1]
    separate = weight.dim() == 3
    shared = x.dim() == 2
    flags = {
        "SHARED": shared, "HAS_R": r is not None, "HAS_S": s is not None, "ACT": activation,
        "ACC": accumulator(x), "DOT": _dot_type(x),
    }  # fmt: skip
    scales = (_or(r, x), _or(s, x))
    dx = x.new_empty(x.shape if need_x else (0,))
    with on_device_of(x):
        if dx.numel():
            config = _product_config(INPUT, x, items)
            grid = (
                triton.cdiv(items, config["BM"]),
                triton.cdiv(inner, config["BN"]),
                1 if shared else members,
            )
            ensemble_input_kernel[grid](
                dy,
                saved,
                weight,
                *scales,
                dx,
                items,
                members,
                inner,
                outer,
                *strides,
                **flags,
                **config,
            )
        if not (need_weight or need_r or need_s or need_bias):
            none = x.new_empty(0, dtype=acc)
            return dx, none, none.clone(), none.clone(), none.clone()
        config = PARAMETERS[x.dtype]
        outs, ins = (
            max(1, triton.cdiv(outer, config["BO"])),
            max(1, triton.cdiv(inner, config["BI"])),
        )
        groups = members
        if need_weight and not separate:
            groups = max(1, min(members, PROGRAMS // (outs * ins)))
        per_group = triton.cdiv(members, groups)
        groups = triton.cdiv(members, per_group)
        if separate:
            dweight = weight.new_empty(weight.shape if need_weight else (0,))
        else:
            dweight = x.new_empty((groups, outer, inner) if need_weight else (0,), dtype=acc)
        dr = x.new_empty((outs, members, inner) if need_r else (0,), dtype=acc)
        ds = x.new_empty((ins, members, outer) if need_s else (0,), dtype=acc)
        dbias = x.new_empty((members, outer) if need_bias else (0,), dtype=acc)
        ensemble_parameters_kernel[(outs, ins, groups)](
            dy, saved, x, weight, *scales, dweight, dr, ds, dbias, items, members, inner, outer,
            per_group, SEPARATE=separate, NEED_WEIGHT=need_weight, NEED_R=need_r, NEED_S=need_s,
            NEED_BIAS=need_bias, **flags, **config,
        )  # fmt: skip
        if need_weight and not separate:
            dweight = _sum_parts(dweight, (outer, inner))
        if need_r:
            dr = _sum_parts(dr, (members, inner))
        if need_s:
            ds = _sum_parts(ds, (members, outer))
        if need_bias and not bias_per_member:
            dbias = _sum_parts(dbias, (outer,))
    return dx, dweight, dr, ds, dbias


# ---- ahead-of-time compilation -----------------------------------------------------------------------


def product_cases(core: str, separate: bool) -> Iterator[AotCase]:
    """The three products in bfloat16 and float32, with bias, gelu and, of a shared weight, scales."""
    unit = "w_out" if separate else "w_in"  # the step that is 1, which a launch makes a constant
    sizes = {"items": "i32", "members": "i32", "inner": "i32", "outer": "i32"}
    steps = {k: "i32" for k in ("w_member", "w_in", "w_out") if k != unit}
    for name, dtype, element, dot in (
        ("bf16", torch.bfloat16, "*bf16", tl.bfloat16),
        ("fp32", torch.float32, "*fp32", tl.float32),
    ):
        flags = {
            "SHARED": False,
            "HAS_R": not separate,
            "HAS_S": not separate,
            "ACT": 2,
            "ACC": tl.float32,
            "DOT": dot,
        }
        options = dict(PRODUCT[dtype])
        launch = {k: options.pop(k) for k in ("num_warps", "num_stages")}
        pointers = {k: element for k in ("x", "weight", "r", "s", "bias", "y", "z")}
        yield AotCase(
            name=f"{core}_forward_{name}",
            fn=ensemble_forward_kernel,
            signature={**pointers, **sizes, **steps, "bias_stride": "i32"},
            constexprs={unit: 1, **flags, "HAS_BIAS": True, "KEEP_Z": True, **options},
            divisible_by_16=(*pointers, "inner", "outer", *steps, "bias_stride"),
            **launch,
        )
        options = dict(INPUT[dtype])
        launch = {k: options.pop(k) for k in ("num_warps", "num_stages")}
        pointers = {k: element for k in ("dy", "saved", "weight", "r", "s", "dx")}
        yield AotCase(
            name=f"{core}_input_{name}",
            fn=ensemble_input_kernel,
            signature={**pointers, **sizes, **steps},
            constexprs={unit: 1, **flags, **options},
            divisible_by_16=(*pointers, "inner", "outer", *steps),
            **launch,
        )
        options = dict(PARAMETERS[dtype])
        launch = {k: options.pop(k) for k in ("num_warps", "num_stages")}
        pointers = {k: element for k in ("dy", "saved", "x", "weight", "r", "s")}
        sums = {k: "*fp32" for k in ("dweight", "dr", "ds", "dbias")}
        if separate:
            sums["dweight"] = element
        needs = {
            "NEED_WEIGHT": True,
            "NEED_R": not separate,
            "NEED_S": not separate,
            "NEED_BIAS": True,
        }
        yield AotCase(
            name=f"{core}_parameters_{name}",
            fn=ensemble_parameters_kernel,
            signature={**pointers, **sums, **sizes} | ({} if separate else {"per_group": "i32"}),
            constexprs={"SEPARATE": separate, **flags, **needs, **options}
            | ({"per_group": 1} if separate else {}),
            divisible_by_16=(*pointers, *sums, "inner", "outer"),
            **launch,
        )
