"""GPU launchers of core `ensemble_mlp`: the formulas are in solera/ensemble/ensemble_mlp.py.

A layer is one launch of member_linear's product (_product.py), whose epilogue adds the bias and applies the
activation; tensors between layers are (B, K, H), and what is saved for backward is flat, in that order. Bytes
beyond the least: each hidden tensor is written and read once more forward, and its gradient backward.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl

from .._activation import activate
from .._aot import AotCase
from .._launch import accumulator, on_device_of
from ._product import backward, forward

BLOCK = 1024


@triton.jit
def mlp_combine_kernel(
    y, weights, out, items, members, width, ACC: tl.constexpr, BLOCK: tl.constexpr
):
    """out[b, o] = sum over members of weights[k] y[b, k, o], in order."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < items * width
    b, o = at // width, at % width
    total = tl.zeros((BLOCK,), ACC)
    for k in range(members):
        v = tl.load(y + (b * members + k) * width + o, mask=mask, other=0.0).to(ACC)
        total += tl.load(weights + k).to(ACC) * v
    tl.store(out + at, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def mlp_spread_kernel(dy, weights, out, n, members, width, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """out[b, k, o] = weights[k] dy[b, o]."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    row, o = at // width, at % width
    v = tl.load(dy + (row // members) * width + o, mask=mask, other=0.0).to(ACC)
    v *= tl.load(weights + row % members, mask=mask, other=0.0).to(ACC)
    tl.store(out + at, v.to(out.dtype.element_ty), mask=mask)


@triton.jit
def mlp_activate_kernel(z, h, n, ACT: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    v = activate(tl.load(z + at, mask=at < n, other=0.0).to(ACC), ACT)
    tl.store(h + at, v.to(h.dtype.element_ty), mask=at < n)


# ---- launchers ---------------------------------------------------------------------------------------


def _elementwise(kernel, out, *arguments, **constants):
    if out.numel():
        with on_device_of(out):
            kernel[(triton.cdiv(out.numel(), BLOCK),)](
                *arguments, **constants, ACC=accumulator(out), BLOCK=BLOCK, num_warps=4
            )
    return out


def _strides(weight):
    return weight.shape[1] * weight.shape[2], weight.shape[2], 1


def _matrices(weights, out_first):
    return [(w.mT if out_first else w).contiguous() for w in weights]


def _run(x, weights, biases, activations, out_first, combine, save):
    matrices = _matrices(weights, out_first)
    members, last, saved, h = matrices[0].shape[0], len(weights) - 1, [], x
    for i, (w, activation) in enumerate(zip(matrices, activations)):
        bias = biases[i] if biases else None
        h, z = forward(h, w, None, None, bias, activation, save, members, _strides(w))
        if save and (i < last or activation):
            saved.append((z if activation >= 2 else h).view(-1))
    if save and combine is None and activations[-1] == 1:
        saved[-1] = saved[-1].clone()  # an output may not alias another
    if combine is None:
        return h, saved
    items, _, width = h.shape
    y = h.new_empty((items, width))
    _elementwise(mlp_combine_kernel, y, h, combine.contiguous(), y, items, members, width)
    return y, saved


def ensemble_mlp(x, weights, biases, activations, out_first, combine):
    return _run(x, weights, biases, activations, out_first, combine, False)[0]


def ensemble_mlp_saved(x, weights, biases, activations, out_first, combine):
    return _run(x, weights, biases, activations, out_first, combine, True)


def ensemble_mlp_backward(
    dy, x, weights, saved, activations, out_first, combine, need_x, need_parameters
):
    matrices = _matrices(weights, out_first)
    items, members, d = x.shape[0], matrices[0].shape[0], dy.contiguous()
    if combine is not None:
        shape = (items, members, dy.shape[1])
        spread = x.new_empty(shape)
        d = _elementwise(
            mlp_spread_kernel, spread, d, combine.contiguous(), spread, spread.numel(), members, shape[2]
        )  # fmt: skip
    dweights, dbiases = [], []
    for i in reversed(range(len(matrices))):
        w, activation = matrices[i], activations[i]
        h = x
        if i:
            h, before = saved[i - 1].view(items, members, w.shape[1]), activations[i - 1]
            if before >= 2:
                out = x.new_empty(h.shape)
                h = _elementwise(mlp_activate_kernel, out, h, out, out.numel(), ACT=before)
        kept = saved[i].view(items, members, w.shape[2]) if activation else None
        d, dw, _, _, db = backward(
            d, h, w, None, None, kept, activation, True, bool(i) or need_x, need_parameters, False,
            False, need_parameters, _strides(w),
        )  # fmt: skip
        if need_parameters:
            dweights.append(dw.mT.contiguous() if out_first else dw)
            dbiases.append(db)
    dx = d if need_x else x.new_empty(0)
    return dx, dweights[::-1], dbiases[::-1]


def aot() -> Iterator[AotCase]:
    for name, element in (("bf16", "*bf16"), ("fp32", "*fp32")):
        sizes = {"members": "i32", "width": "i32"}
        options = {"ACC": tl.float32, "BLOCK": BLOCK}
        yield AotCase(
            name=f"mlp_combine_{name}",
            fn=mlp_combine_kernel,
            signature={"y": element, "weights": "*fp32", "out": element, "items": "i32", **sizes},
            constexprs=options,
            divisible_by_16=("y", "weights", "out", "items", "width"),
            num_warps=4,
        )
        yield AotCase(
            name=f"mlp_spread_{name}",
            fn=mlp_spread_kernel,
            signature={"dy": element, "weights": "*fp32", "out": element, "n": "i32", **sizes},
            constexprs=options,
            divisible_by_16=("dy", "weights", "out", "n", "width"),
            num_warps=4,
        )
        yield AotCase(
            name=f"mlp_activate_{name}",
            fn=mlp_activate_kernel,
            signature={"z": element, "h": element, "n": "i32"},
            constexprs={"ACT": 2, **options},
            divisible_by_16=("z", "h", "n"),
            num_warps=4,
        )
