r"""Core `reparam_linear`: $y = x\tilde W^\top + b$ where $\tilde W$ is made on its way into the product.

$\tilde W$ is the mixout of W with an anchor, or W under a mask (see `reparam.py`). With $\mathrm{d}y$ the gradient
of y,

$$\mathrm{d}x = \mathrm{d}y\,\tilde W,\qquad \mathrm{d}\tilde W = \mathrm{d}y^\top x,\qquad
  \mathrm{d}b = \sum_n \mathrm{d}y_n,$$

and $\mathrm{d}W$ follows from $\mathrm{d}\tilde W$ element by element. Kept between forward and backward: x, W, the
second tensor and the seed. The C++ kernel never holds $\tilde W$, $\mathrm{d}\tilde W$ or a mask beyond a tile; on a
GPU $\tilde W$ is a temporary of each direction, made by `reparam`'s kernels and multiplied by torch's product.

Sources: Lee, Cho, Kang, "Mixout", 2020; Zheng et al., "Regularized Mask Tuning", 2023.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _check
from .._autograd import differentiable_vjp
from .._registry import accumulate_type, reference
from .._route import autocast_dtype, needs_graph, use_reference
from .reparam import (
    MASKS,
    is_zero,
    masked_weight,
    masked_weight_reference,
    mixout_op,
    mixout_reference,
    pair,
    seed_tensor,
)

_op = torch.ops.solera
MIXOUT, MIXOUT_COLUMN, MASKED = range(3)


# ---- reference ---------------------------------------------------------------------------------------


def _made(weight, other, seed, kind, number, key):
    if kind == MASKED:
        return masked_weight_reference(weight, other, number)
    return mixout_reference(weight, other, seed, number, key, kind == MIXOUT_COLUMN)


def reparam_linear_reference(
    x: Tensor,
    weight: Tensor,
    other: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    kind: int,
    number: float,
    key: int,
) -> Tensor:
    """The product in float32 (float64 for float64), rounded to x's dtype."""
    acc = accumulate_type(weight)
    made = _made(weight.to(acc), None if other is None else other.to(acc), seed, kind, number, key)
    y = x.to(acc) @ made.mT
    return (y if bias is None else y + bias.to(acc)).to(x.dtype)


@reference("reparam_linear")
def _reparam_linear(x, weight, other, bias, seed, kind, number, key):
    return reparam_linear_reference(x, weight, other, bias, seed, kind, number, key).contiguous()


@reference("reparam_linear_backward")
def _reparam_linear_backward(
    dy, x, weight, other, seed, kind, number, key, need_x, need_weight, need_other, need_bias
):  # fmt: skip
    acc = accumulate_type(weight)
    g = dy.to(acc)
    w, o = weight.to(acc), None if other is None else other.to(acc)
    dx = x.new_empty(0)
    if need_x:
        dx = (g @ _made(w, o, seed, kind, number, key)).to(x.dtype).contiguous()
    dweight, dother = weight.new_empty(0), weight.new_empty(0)
    if need_weight or need_other:
        dmade = (g.mT @ x.to(acc)).contiguous()
        if kind == MASKED:
            found = _op.masked_weight_backward(dmade, w, o, number, need_weight, need_other)
        else:
            column = kind == MIXOUT_COLUMN
            found = _op.mixout_backward(dmade, seed, number, key, column, need_weight, need_other)
        dweight, dother = (t.to(weight.dtype) for t in found)
    return dx, dweight, dother, g.double().sum(0).to(acc) if need_bias else g.new_empty(0)


# ---- autograd ----------------------------------------------------------------------------------------


class _ReparamLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, other, bias, seed, kind, number, key):
        ctx.save_for_backward(x, weight, other, seed, bias)
        ctx.rest = (kind, number, key)
        return _op.reparam_linear(x, weight, other, bias, seed, kind, number, key)

    @staticmethod
    def backward(ctx, dy):
        x, weight, other, seed, bias = ctx.saved_tensors
        needs = ctx.needs_input_grad[:4]
        if torch.is_grad_enabled():
            formula = lambda x, w, o, b: _composed(x, w, o, b, seed, *ctx.rest)
            found = differentiable_vjp(formula, (x, weight, other, bias), needs, (dy,))
            return *found, *(None,) * 4
        *found, dbias = _op.reparam_linear_backward(dy, x, weight, other, seed, *ctx.rest, *needs)
        if needs[3]:
            dbias = dbias.to(bias.dtype)
        gradients = [g if need else None for g, need in zip((*found, dbias), needs)]
        return *gradients, *(None,) * 4


def _composed(x, weight, other, bias, seed, kind, number, key):
    """The same of differentiable parts: mixout's or the mask's own backward, and torch's product."""
    if kind == MASKED:
        made = masked_weight(weight, other, number)
    else:
        made = mixout_op(weight, other, seed, number, key, kind == MIXOUT_COLUMN)
    acc = accumulate_type(weight)
    y = x.to(acc) @ made.to(acc).mT
    return (y if bias is None else y + bias.to(acc)).to(x.dtype)


# ---- public functions --------------------------------------------------------------------------------


def linear_arguments(x: Any, weight: Any, bias: Any) -> Tensor:
    """The checks of a linear layer; x as autocast would have it, (N, I)."""
    _check.tensor("x", x, min_dim=1)
    _check.tensor("weight", weight, dim=2)
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"x: expected {weight.shape[1]} features to go with weight of shape "
            f"{tuple(weight.shape)}, got shape {tuple(x.shape)}"
        )
    _check.like("weight", weight, tuple(weight.shape), x)
    if x.dtype == torch.float64:
        _check.same_dtype("weight", weight, x)
    if bias is not None:
        _check.like("bias", bias, (weight.shape[0],), x)
    dtype = autocast_dtype(x)
    if dtype is not None and x.dtype != torch.float64:
        x = x.to(dtype)
    return x.reshape(-1, x.shape[-1]) if x.dim() != 2 else x


def _linear(x, rows, weight, other, bias, seed, kind, number):
    arguments = (rows, weight, other, bias, seed, kind, number, 0)
    if use_reference():
        y = _composed(*arguments) if kind == MASKED else reparam_linear_reference(*arguments)
    elif needs_graph(rows, weight, other, bias):
        y = _ReparamLinear.apply(*arguments)
    else:
        y = _op.reparam_linear(*arguments)
    return y.view(*x.shape[:-1], weight.shape[0]) if x.dim() != 2 else y


def mixout_linear(
    x: Tensor,
    weight: Tensor,
    anchor: Any,
    p: float,
    seed: int | Tensor | None = None,
    bias: Tensor | None = None,
    *,
    mask: str = "element",
    training: bool = True,
) -> Tensor:
    r"""A linear layer with `mixout` in the product: $y = x\,(U + M\odot(W - U)/(1 - p))^\top + b$.

    The same mask and values as `linear(x, mixout(weight, anchor, p, seed), bias)`, without a mixed weight or a mask
    in memory (on a GPU the mixed weight is a temporary).

    Args:
        x: (..., I).
        weight: W (O, I).
        anchor: U (O, I) of weight's dtype; None or 0 is DropConnect.
        p, seed, mask, training: as in `mixout`.
        bias: (O,), not mixed, or None.

    Shapes: x (..., I), weight (O, I) -> (..., O), x's dtype. float32, float64, bfloat16, float16; a float32 weight
    goes with half x. Under autocast x is cast as `torch.nn.functional.linear` casts it. Products are summed in
    float32 (float64 for float64); a row's result does not depend on the rest of the batch. Gradients to x, weight,
    anchor and bias.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Lee, Cho, Kang, "Mixout", 2020.
    """
    rows = linear_arguments(x, weight, bias)
    p = _check.number("p", p, low=0.0, high=1.0)
    _check.choice("mask", mask, MASKS)
    other = None if is_zero(anchor) else pair("anchor", anchor, weight)
    if not training or p == 0.0:
        bias = None if bias is None else bias.to(rows.dtype)
        y = torch.nn.functional.linear(rows, weight.to(rows.dtype), bias)
        return y.view(*x.shape[:-1], weight.shape[0])
    kind = MIXOUT_COLUMN if mask == "column" else MIXOUT
    return _linear(x, rows, weight, other, bias, seed_tensor(seed, weight), kind, p)


def masked_linear(
    x: Tensor, weight: Tensor, score: Tensor, threshold: float, bias: Tensor | None = None
) -> Tensor:
    r"""A linear layer with `masked_weight` in the product: $y = x\,(W\odot 1[M > a])^\top + b$.

    Straight-through gradient to M: $\mathrm{d}M = (\mathrm{d}y^\top x)\odot W$.

    Args:
        x: (..., I).
        weight: W (O, I).
        score: M, like weight.
        threshold: a.
        bias: (O,), or None.

    Shapes: x (..., I), weight (O, I) -> (..., O), x's dtype; dtypes as in `mixout_linear`.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Zheng et al., "Regularized Mask Tuning", 2023.
    """
    rows = linear_arguments(x, weight, bias)
    pair("score", score, weight)
    threshold = _check.number("threshold", threshold)
    return _linear(x, rows, weight, score, bias, None, MASKED, threshold)
