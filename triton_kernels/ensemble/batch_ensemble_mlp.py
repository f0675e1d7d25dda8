"""GPU kernels of core `batch_ensemble_mlp`: the formulas are in solera/ensemble/batch_ensemble_mlp.py.

One product kernel a layer each way. Forward applies s, bias, activation, mask and the next layer's r before it
stores, so the next product reads its operand as it lies; it keeps h for backward. Backward recomputes a layer's
delta from h and the gradient of its output as it loads them, and its input from the h of the layer before; the
member products G_k, from which dW and dr come, stay in registers.

Operations a layer: forward 2 B K I O, backward twice that. Bytes: forward u, W read, h and the next u written;
backward g, h, the h before read twice, W, g of the layer before written.

H200 at 4.3 TB/s and 790 TFLOP/s in bf16, B = 4096, K = 32, 3 layers of 512: floors of 261 us forward and 783 us
forward and backward by operations. Not measured.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from .._activation import activate, slope
from .._aot import AotCase
from .._launch import accumulate_type, accumulator, on_device_of
from ._product import (
    PRODUCT,
    PROGRAMS,
    _dot_type,
    _product_config,
    _row,
    _sum_parts,
    _wide,
)


@triton.jit
def _keep(seed, layer, n, o, cut, ACC: tl.constexpr):
    """The dropout mask at rows n and columns o, which broadcast against each other."""
    lane = (o // 128 * 16 + o % 16).to(tl.uint32)
    low, high = n.to(tl.uint32), (n >> 32).to(tl.uint32)
    zero = (lane ^ lane) + (low ^ low)
    r0, r1, r2, r3 = tl.philox(tl.load(seed), zero + lane, zero + low, zero + high, zero + layer)
    half = o % 128 // 16
    word = tl.where(
        half // 2 == 0, r0, tl.where(half // 2 == 1, r1, tl.where(half // 2 == 2, r2, r3))
    )
    bits = (word >> (half % 2 * 16).to(tl.uint32)) & 0xFFFF
    scale = 65536.0 / (65536 - cut + bits.to(tl.int32) * 0).to(ACC)
    return tl.where(bits.to(tl.int32) >= cut, scale, 0.0)


@triton.jit
def _output(h, at, inside, s, bias, ACT: tl.constexpr, ACC: tl.constexpr):
    """(h, z, act(z)) of a layer at `at`; s and bias broadcast to it."""
    product = tl.load(h + at, mask=inside, other=0.0).to(ACC)
    z = product * s + bias
    return product, z, activate(z, ACT)


@triton.jit
def network_forward_kernel(
    a, weight, r, s, bias, next_r, out, h, seed, items, members, inner, outer, bias_stride, layer, cut,
    SHARED: tl.constexpr, HAS_R: tl.constexpr, HAS_S: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_NEXT: tl.constexpr, KEEP_H: tl.constexpr, DROP: tl.constexpr, ACT: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    k = tl.program_id(2)
    b = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)  # [BM]
    o = tl.program_id(1) * BN + tl.arange(0, BN)  # [BN]
    n = b * members + k
    rows = b if SHARED else n
    acc = tl.zeros((BM, BN), ACC)
    for start in range(0, inner, BK):
        i = start + tl.arange(0, BK)
        mask = (b < items)[:, None] & (i < inner)[None, :]
        t = tl.load(a + rows[:, None] * inner + i[None, :], mask=mask, other=0.0)  # [BM, BK]
        if HAS_R:
            t = t.to(ACC) * _row(r, k, i, inner, inner, 1.0, HAS_R, ACC)[None, :]
        inside = (i < inner)[:, None] & (o < outer)[None, :]
        at = i[:, None] + o.to(tl.int64)[None, :] * inner
        w = tl.load(weight + at, mask=inside, other=0.0)  # [BK, BN]
        acc = tl.dot(t.to(DOT), w.to(DOT), acc, input_precision="ieee", out_dtype=ACC)
    product = acc.to(h.dtype.element_ty)
    at = n[:, None] * outer + o[None, :]
    inside = (b < items)[:, None] & (o < outer)[None, :]
    if KEEP_H:
        tl.store(h + at, product, mask=inside)
    z = product.to(ACC) * _row(s, k, o, outer, outer, 1.0, HAS_S, ACC)[None, :]
    v = activate(z + _row(bias, k, o, outer, bias_stride, 0.0, HAS_BIAS, ACC)[None, :], ACT)
    if DROP:
        v *= _keep(seed, layer, n[:, None], o[None, :], cut, ACC)
    v *= _row(next_r, k, o, outer, outer, 1.0, HAS_NEXT, ACC)[None, :]
    tl.store(out + at, v.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gradient_of_member(
    g, h, weight, r, s, bias, seed, k, b, i, items, members, inner, outer, bias_stride, layer, cut,
    HAS_R: tl.constexpr, HAS_S: tl.constexpr, HAS_BIAS: tl.constexpr, DROP: tl.constexpr,
    ACT: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    n = b * members + k
    acc = tl.zeros((BM, BN), ACC)
    for start in range(0, outer, BK):
        o = start + tl.arange(0, BK)
        mask = (b < items)[:, None] & (o < outer)[None, :]
        at = n[:, None] * outer + o[None, :]
        by = _row(s, k, o, outer, outer, 1.0, HAS_S, ACC)[None, :]
        d = tl.load(g + at, mask=mask, other=0.0).to(ACC)
        if DROP:
            d *= _keep(seed, layer, n[:, None], o[None, :], cut, ACC)
        if ACT != 0:
            plus = _row(bias, k, o, outer, bias_stride, 0.0, HAS_BIAS, ACC)[None, :]
            _, z, _ = _output(h, at, mask, by, plus, 0, ACC)
            d = slope(d, z, ACT)
        inside = (o < outer)[:, None] & (i < inner)[None, :]
        w = tl.load(weight + o.to(tl.int64)[:, None] * inner + i[None, :], mask=inside, other=0.0)
        acc = tl.dot((d * by).to(DOT), w.to(DOT), acc, input_precision="ieee", out_dtype=ACC)
    return acc * _row(r, k, i, inner, inner, 1.0, HAS_R, ACC)[None, :]


@triton.jit
def network_input_kernel(
    g, h, weight, r, s, bias, dx, seed, items, members, inner, outer, bias_stride, layer, cut,
    SHARED: tl.constexpr, HAS_R: tl.constexpr, HAS_S: tl.constexpr, HAS_BIAS: tl.constexpr,
    DROP: tl.constexpr, ACT: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The gradient of a layer's input: of one member, or summed over all of them for a shared x."""
    b = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)  # [BM]
    i = tl.program_id(1) * BN + tl.arange(0, BN)  # [BN]
    k = tl.program_id(2)
    total = _gradient_of_member(
        g, h, weight, r, s, bias, seed, k, b, i, items, members, inner, outer, bias_stride, layer, cut,
        HAS_R, HAS_S, HAS_BIAS, DROP, ACT, ACC, DOT, BM, BN, BK,
    )  # fmt: skip
    rows = b * members + k
    if SHARED:
        rows = b
        for other in range(1, members):
            total += _gradient_of_member(
                g, h, weight, r, s, bias, seed, other, b, i, items, members, inner, outer,
                bias_stride, layer, cut, HAS_R, HAS_S, HAS_BIAS, DROP, ACT, ACC, DOT, BM, BN,
                BK,
            )  # fmt: skip
    mask = (b < items)[:, None] & (i < inner)[None, :]
    tl.store(dx + rows[:, None] * inner + i[None, :], total.to(dx.dtype.element_ty), mask=mask)


@triton.jit
def network_parameters_kernel(
    g, h, a, weight, r, s, bias, before_s, before_bias, dweight, dr, ds, dbias, seed, items, members, inner,
    outer, bias_stride, before_stride, layer, cut, per_group, SHARED: tl.constexpr,
    FIRST: tl.constexpr, HAS_R: tl.constexpr, HAS_S: tl.constexpr, HAS_BIAS: tl.constexpr,
    BEFORE_S: tl.constexpr, BEFORE_BIAS: tl.constexpr, NEED_WEIGHT: tl.constexpr,
    NEED_R: tl.constexpr, NEED_S: tl.constexpr, NEED_BIAS: tl.constexpr, DROP: tl.constexpr,
    ACT: tl.constexpr, BEFORE_ACT: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr,
    BO: tl.constexpr, BI: tl.constexpr, BB: tl.constexpr,
):  # fmt: skip
    """A tile of G_k for each member of a group. a: x if FIRST, else the h of the layer before.

    dweight (groups, O, I) and dr (tiles of O, K, I) are partial; ds and dbias (K, O) come from the programs of
    the first tile of I.
    """
    o = tl.program_id(0) * BO + tl.arange(0, BO)  # [BO]
    i = tl.program_id(1) * BI + tl.arange(0, BI)  # [BI]
    group = tl.program_id(2)
    at_o = o.to(tl.int64)
    inside = (o < outer)[:, None] & (i < inner)[None, :]
    dw = tl.zeros((BO, BI), ACC)
    last = tl.minimum((group + 1) * per_group, members)
    for k in range(group * per_group, last):
        product = tl.zeros((BO, BI), ACC)
        db = tl.zeros((BO,), ACC)
        dot_s = tl.zeros((BO,), ACC)
        row = _wide(k)
        by = _row(s, k, o, outer, outer, 1.0, HAS_S, ACC)[:, None]
        plus = _row(bias, k, o, outer, bias_stride, 0.0, HAS_BIAS, ACC)[:, None]
        own_s = _row(before_s, k, i, inner, inner, 1.0, BEFORE_S, ACC)[None, :]
        own_bias = _row(before_bias, k, i, inner, before_stride, 0.0, BEFORE_BIAS, ACC)[None, :]
        for start in range(0, items, BB):
            b = (start + tl.arange(0, BB)).to(tl.int64)
            n = b * members + k
            mask = (o < outer)[:, None] & (b < items)[None, :]
            at = n[None, :] * outer + o[:, None]
            d = tl.load(g + at, mask=mask, other=0.0).to(ACC)  # [BO, BB]
            if DROP:
                d *= _keep(seed, layer, n[None, :], o[:, None], cut, ACC)
            made, z, _ = _output(h, at, mask, by, plus, 0, ACC)
            d = slope(d, z, ACT)
            db += tl.sum(d, 1)
            dot_s += tl.sum(d * made, 1)
            mask = (b < items)[:, None] & (i < inner)[None, :]
            if FIRST:
                rows = b if SHARED else n
                t = tl.load(a + rows[:, None] * inner + i[None, :], mask=mask, other=0.0).to(ACC)
            else:
                at = n[:, None] * inner + i[None, :]
                _, _, t = _output(a, at, mask, own_s, own_bias, BEFORE_ACT, ACC)
                if DROP:
                    t *= _keep(seed, layer - 1, n[:, None], i[None, :], cut, ACC)
                t = tl.where(mask, t, 0.0)
            product = tl.dot(d.to(DOT), t.to(DOT), product, input_precision="ieee", out_dtype=ACC)
        if tl.program_id(1) == 0:
            if NEED_BIAS:
                tl.store(dbias + row * outer + o, db, mask=o < outer)
            if NEED_S:
                tl.store(ds + row * outer + o, dot_s, mask=o < outer)
        scale_r = _row(r, k, i, inner, inner, 1.0, HAS_R, ACC)[None, :]
        if NEED_WEIGHT:
            dw += product * scale_r * by
        if NEED_R:
            at = at_o[:, None] * inner + i[None, :]
            w = tl.load(weight + at, mask=inside, other=0.0).to(ACC)
            at = dr + (tl.program_id(0).to(tl.int64) * members + row) * inner + i
            tl.store(at, tl.sum(product * w * by, 0), mask=i < inner)
    if NEED_WEIGHT:
        at = (_wide(group) * outer + at_o)[:, None] * inner + i[None, :]
        tl.store(dweight + at, dw, mask=inside)


# ---- launchers ---------------------------------------------------------------------------------------

# What surrounds the product, the mask above all, takes registers: tiles are smaller than a lone product's.
FORWARD = {
    **PRODUCT,
    torch.bfloat16: {"BM": 64, "BN": 64, "BK": 32, "num_warps": 8, "num_stages": 3},
    torch.float16: {"BM": 64, "BN": 64, "BK": 32, "num_warps": 8, "num_stages": 3},
}
GRADIENT = {
    **PRODUCT,
    torch.bfloat16: {"BM": 128, "BN": 64, "BK": 32, "num_warps": 8, "num_stages": 3},
    torch.float16: {"BM": 128, "BN": 64, "BK": 32, "num_warps": 8, "num_stages": 3},
}
NETWORK_PARAMETERS = {
    torch.bfloat16: {"BO": 32, "BI": 64, "BB": 32, "num_warps": 8, "num_stages": 3},
    torch.float16: {"BO": 32, "BI": 64, "BB": 32, "num_warps": 8, "num_stages": 3},
    torch.float32: {"BO": 32, "BI": 32, "BB": 32, "num_warps": 8, "num_stages": 2},
    torch.float64: {"BO": 32, "BI": 32, "BB": 16, "num_warps": 4, "num_stages": 2},
}


def _layers(parameters, kinds):
    """Per layer (weight, r, s, bias, activation), None for what a layer does not have."""
    given = iter(parameters)
    out = []
    for kind in kinds:
        weight = next(given).contiguous()
        rest = [next(given).contiguous() if kind & bit else None for bit in (8, 16, 32)]
        out.append((weight, *rest, kind & 7))
    return out


def _members(x, layers):
    if x.dim() == 3:
        return x.shape[1]
    own = (t for layer in layers for t in layer[1:4] if t is not None and t.dim() == 2)
    return next(own).shape[0]


def _drop(dropout, seed, x):
    cut = round(dropout * 65536) if seed is not None else 0
    return (x if seed is None else seed), cut


def _stride(bias):
    return bias.shape[-1] if bias is not None and bias.dim() == 2 else 0


def _forward(x, parameters, kinds, dropout, seed, save):
    x = x.contiguous()
    layers = _layers(parameters, kinds)
    members, items = _members(x, layers), x.shape[0]
    seed, cut = _drop(dropout, seed, x)
    config = _product_config(FORWARD, x, items)
    a, products = x, []
    for index, (weight, r, s, bias, act) in enumerate(layers):
        outer, inner = weight.shape
        out = x.new_empty((items, members, outer))
        h = torch.empty_like(out) if save else out
        after = layers[index + 1][1] if index + 1 < len(layers) else None
        grid = (triton.cdiv(items, config["BM"]), triton.cdiv(outer, config["BN"]), members)
        if out.numel():
            with on_device_of(x):
                network_forward_kernel[grid](
                    a, weight, x if r is None else r, x if s is None else s,
                    x if bias is None else bias, x if after is None else after, out, h, seed, items,
                    members, inner, outer, _stride(bias), index, cut,
                    SHARED=index == 0 and x.dim() == 2, HAS_R=index == 0 and r is not None,
                    HAS_S=s is not None, HAS_BIAS=bias is not None, HAS_NEXT=after is not None,
                    KEEP_H=save, DROP=cut > 0, ACT=act, ACC=accumulator(x), DOT=_dot_type(x), **config,
                )  # fmt: skip
        products.append(h)
        a = out
    return a, products


def batch_ensemble_mlp(x, parameters, kinds, dropout, seed):
    return _forward(x, parameters, kinds, dropout, seed, False)[0]


def batch_ensemble_mlp_saved(x, parameters, kinds, dropout, seed):
    return _forward(x, parameters, kinds, dropout, seed, True)


def batch_ensemble_mlp_backward(dy, x, parameters, products, kinds, dropout, seed, need_x, needs):
    x, g = x.contiguous(), dy.contiguous()
    layers = _layers(parameters, kinds)
    products = [h.contiguous() for h in products]
    acc = accumulate_type(x)
    items, members = dy.shape[:2]
    seed, cut = _drop(dropout, seed, x)
    flags = {"DROP": cut > 0, "ACC": accumulator(x), "DOT": _dot_type(x)}
    grads, left = [], list(needs)
    dx = x.new_empty(x.shape if need_x else (0,))
    for index in range(len(layers) - 1, -1, -1):
        weight, r, s, bias, act = layers[index]
        count = 1 + sum(t is not None for t in (r, s, bias))
        wanted, left = left[-count:], left[:-count]
        given = iter(wanted)
        need_w = next(given)
        need_r, need_s, need_b = (t is not None and next(given) for t in (r, s, bias))
        outer, inner = weight.shape
        own = (x if r is None else r, x if s is None else s, x if bias is None else bias)
        own_flags = {
            "HAS_R": r is not None, "HAS_S": s is not None, "HAS_BIAS": bias is not None, "ACT": act,
            "SHARED": index == 0 and x.dim() == 2, **flags,
        }  # fmt: skip
        config = dict(NETWORK_PARAMETERS[x.dtype])
        outs, ins = (
            max(1, triton.cdiv(outer, config["BO"])),
            max(1, triton.cdiv(inner, config["BI"])),
        )
        groups = max(1, min(members, PROGRAMS // (outs * ins))) if need_w else members
        per_group = triton.cdiv(members, groups)
        groups = triton.cdiv(members, per_group)
        sums = [
            x.new_empty(shape if need else (0,), dtype=acc)
            for shape, need in (
                ((groups, outer, inner), need_w),
                ((outs, members, inner), need_r),
                ((members, outer), need_s),
                ((members, outer), need_b),
            )
        ]
        first = index == 0
        before = (x, x, x, 0) if first else (products[index - 1], *layers[index - 1][2:])
        a, before_s, before_bias, before_act = before
        with on_device_of(x):
            if any(wanted):
                network_parameters_kernel[(outs, ins, groups)](
                    g, products[index], a, weight, *own, x if before_s is None else before_s,
                    x if before_bias is None else before_bias, *sums, seed, items, members, inner,
                    outer, _stride(bias), 0 if first else _stride(before_bias), index, cut,
                    per_group, FIRST=first, BEFORE_S=not first and before_s is not None,
                    BEFORE_BIAS=not first and before_bias is not None, NEED_WEIGHT=need_w,
                    NEED_R=need_r, NEED_S=need_s, NEED_BIAS=need_b, BEFORE_ACT=before_act,
                    **own_flags, **config,
                )  # fmt: skip
            made = []
            if bias is not None:
                db = sums[3]
                made.append(_sum_parts(db, (outer,)) if need_b and bias.dim() == 1 else db)
            if s is not None:
                made.append(sums[2])
            if r is not None:
                made.append(_sum_parts(sums[1], (members, inner)) if need_r else sums[1])
            made.append(_sum_parts(sums[0], (outer, inner)) if need_w else sums[0])
            grads += made
            if not any(left) and not need_x:
                grads += [x.new_empty(0, dtype=acc) for _ in left]
                break
            to = dx if first else x.new_empty((items, members, inner))
            if (not first or need_x) and to.numel():
                config = _product_config(GRADIENT, x, items)
                grid = (
                    triton.cdiv(items, config["BM"]),
                    triton.cdiv(inner, config["BN"]),
                    1 if own_flags["SHARED"] else members,
                )
                network_input_kernel[grid](
                    g, products[index], weight, *own, to, seed, items, members, inner, outer,
                    _stride(bias), index, cut, **own_flags, **config,
                )  # fmt: skip
            g = to
    return dx, grads[::-1]


# ---- ahead-of-time compilation -----------------------------------------------------------------------


def aot() -> Iterator[AotCase]:
    """The three kernels in bfloat16 and float32, with all parameters, gelu and dropout."""
    sizes = {k: "i32" for k in ("items", "members", "inner", "outer", "bias_stride")}
    drop = {"seed": "*i64", "layer": "i32", "cut": "i32"}
    for name, dtype, element, dot in (
        ("bf16", torch.bfloat16, "*bf16", tl.bfloat16),
        ("fp32", torch.float32, "*fp32", tl.float32),
    ):
        flags = {k: True for k in ("HAS_R", "HAS_S", "HAS_BIAS", "DROP")}
        flags |= {"SHARED": False, "ACT": 2, "ACC": tl.float32, "DOT": dot}
        options = dict(FORWARD[dtype])
        launch = {k: options.pop(k) for k in ("num_warps", "num_stages")}
        pointers = {k: element for k in ("a", "weight", "r", "s", "bias", "next_r", "out", "h")}
        yield AotCase(
            name=f"network_forward_{name}",
            fn=network_forward_kernel,
            signature={**pointers, **sizes, **drop},
            constexprs={**flags, "HAS_R": False, "HAS_NEXT": True, "KEEP_H": True, **options},
            divisible_by_16=(*pointers, "inner", "outer", "bias_stride"),
            **launch,
        )
        options = dict(GRADIENT[dtype])
        launch = {k: options.pop(k) for k in ("num_warps", "num_stages")}
        pointers = {k: element for k in ("g", "h", "weight", "r", "s", "bias", "dx")}
        yield AotCase(
            name=f"network_input_{name}",
            fn=network_input_kernel,
            signature={**pointers, **sizes, **drop},
            constexprs={**flags, **options},
            divisible_by_16=(*pointers, "inner", "outer", "bias_stride"),
            **launch,
        )
        options = dict(NETWORK_PARAMETERS[dtype])
        launch = {k: options.pop(k) for k in ("num_warps", "num_stages")}
        names = ("g", "h", "a", "weight", "r", "s", "bias", "before_s", "before_bias")
        pointers = {k: element for k in names}
        sums = {k: "*fp32" for k in ("dweight", "dr", "ds", "dbias")}
        more = {k: True for k in ("BEFORE_S", "BEFORE_BIAS", "NEED_WEIGHT", "NEED_R", "NEED_S")}
        yield AotCase(
            name=f"network_parameters_{name}",
            fn=network_parameters_kernel,
            signature={
                **pointers,
                **sums,
                **sizes,
                **drop,
                "before_stride": "i32",
                "per_group": "i32",
            },
            constexprs={
                **flags,
                **more,
                "NEED_BIAS": True,
                "FIRST": False,
                "BEFORE_ACT": 2,
                **options,
            },
            divisible_by_16=(*pointers, *sums, "inner", "outer", "bias_stride", "before_stride"),
            **launch,
        )
