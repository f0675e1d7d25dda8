"""GPU launcher of core `reparam_linear`: the weight made by `reparam`'s kernels, multiplied by torch's product.

Weights moved, forward: read W and U, write and read the made weight (4; 1 more of them read from L2 where it fits).
Backward: the same again for dx, the dense gradient written and read, dW written (7). Nothing of it outlives the
call. With few rows the product is bound by those bytes.

H200 at 4.3 TB/s: 4096 x 4096 bfloat16, forward and backward, 86 us is the floor of 11 weights.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .._launch import accumulate_type
from . import reparam


def _made(weight, other, seed, kind, number, key):
    if kind == 2:
        return reparam.masked_weight(weight, other, number)
    return reparam.mixout(weight, other, seed, number, key, kind == 1)


def product(x, made, bias):
    """x made^T + bias in the wider of the two dtypes, rounded to x's."""
    dtype = torch.promote_types(x.dtype, made.dtype)
    bias = None if bias is None else bias.to(dtype)
    y = torch.nn.functional.linear(x.to(dtype), made.to(dtype), bias)
    return y.to(x.dtype).contiguous()


def input_gradient(dy, made, x):
    dtype = torch.promote_types(dy.dtype, made.dtype)
    return (dy.to(dtype) @ made.to(dtype)).to(x.dtype).contiguous()


def bias_gradient(dy, weight, needed):
    acc = accumulate_type(weight)
    return dy.sum(0, dtype=acc) if needed else dy.new_empty(0, dtype=acc)


def reparam_linear(x, weight, other, bias, seed, kind, number, key):
    return product(x, _made(weight, other, seed, kind, number, key), bias)


def reparam_linear_backward(
    dy, x, weight, other, seed, kind, number, key, need_x, need_weight, need_other, need_bias
):  # fmt: skip
    dx = x.new_empty(0)
    if need_x:
        dx = input_gradient(dy, _made(weight, other, seed, kind, number, key), x)
    dweight, dother = weight.new_empty(0), weight.new_empty(0)
    if need_weight or need_other:
        dtype = torch.promote_types(dy.dtype, weight.dtype)
        dmade = (dy.to(dtype).mT @ x.to(dtype)).to(weight.dtype)
        if kind == 2:
            dweight, dother = reparam.masked_weight_backward(
                dmade, weight, other, number, need_weight, need_other
            )
        else:
            dweight, dother = reparam.mixout_backward(
                dmade, seed, number, key, kind == 1, need_weight, need_other
            )
    return dx, dweight, dother, bias_gradient(dy, weight, need_bias)


def aot() -> Iterator:
    """None of its own: see `reparam`."""
    yield from ()
