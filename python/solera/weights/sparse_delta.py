r"""Core `sparse_delta`: a linear layer whose frozen weight has some entries replaced by trained ones.

With W the frozen weight but $W_{r_i c_i} = p_i$ at the S entries i,

$$y = xW^\top + b,\qquad \mathrm{d}x = \mathrm{d}y\,W,\qquad
  \mathrm{d}p_i = \sum_n \mathrm{d}y_{n r_i}\,x_{n c_i},\qquad \mathrm{d}b = \sum_n \mathrm{d}y_n .$$

$\mathrm{d}p$ is computed at the entries only (a sampled product): the dense gradient of W is never formed. The C++
kernel puts the entries in a tile of W at a time, on its way into the product; on a GPU W is a temporary.

Source: Hu et al., "SaRA: High-Efficient Diffusion Model Fine-tuning with Progressive Sparse Low-Rank Adaptation",
2024. Its public optimizer writes |p| into the weight; here it is p, as the paper has it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _check
from .._autograd import differentiable_vjp
from .._registry import accumulate_type, reference
from .._route import needs_graph, use_reference
from .reparam_linear import linear_arguments

_op = torch.ops.solera


# ---- reference ---------------------------------------------------------------------------------------


def _scattered(weight: Tensor, index: Tensor, value: Tensor) -> Tensor:
    return weight.reshape(-1).scatter(0, index, value).view(weight.shape)


def sparse_delta_linear_reference(
    x: Tensor, weight: Tensor, index: Tensor, value: Tensor, bias: Tensor | None
) -> Tensor:
    """The product in float32 (float64 for float64), rounded to x's dtype."""
    acc = accumulate_type(weight)
    y = x.to(acc) @ _scattered(weight.to(acc), index, value.to(acc)).mT
    return (y if bias is None else y + bias.to(acc)).to(x.dtype)


@reference("sparse_delta_linear")
def _sparse_delta_linear(x, weight, index, value, bias):
    return sparse_delta_linear_reference(x, weight, index, value, bias).contiguous()


@reference("sparse_delta_linear_backward")
def _sparse_delta_linear_backward(dy, x, weight, index, value, need_x, need_value, need_bias):
    acc = accumulate_type(weight)
    g = dy.to(acc)
    dx, dvalue = x.new_empty(0), value.new_empty(0)
    if need_x:
        w = _scattered(weight.to(acc), index, value.to(acc))
        dx = (g @ w).to(x.dtype).contiguous()
    if need_value:
        row, column = index // weight.shape[1], index % weight.shape[1]
        dvalue = (g[:, row] * x.to(acc)[:, column]).sum(0).to(value.dtype)
    return dx, dvalue, g.double().sum(0).to(acc) if need_bias else g.new_empty(0)


# ---- autograd ----------------------------------------------------------------------------------------


class _SparseDeltaLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, index, value, bias):
        ctx.save_for_backward(x, weight, index, value, bias)
        return _op.sparse_delta_linear(x, weight, index, value, bias)

    @staticmethod
    def backward(ctx, dy):
        x, weight, index, value, bias = ctx.saved_tensors
        need_x, _, _, need_value, need_bias = ctx.needs_input_grad
        if torch.is_grad_enabled():
            formula = lambda x, p, b: sparse_delta_linear_reference(x, weight, index, p, b)
            needs = (need_x, need_value, need_bias)
            dx, dvalue, dbias = differentiable_vjp(formula, (x, value, bias), needs, (dy,))
            return dx, None, None, dvalue, dbias
        dx, dvalue, dbias = _op.sparse_delta_linear_backward(
            dy, x, weight, index, value, need_x, need_value, need_bias
        )
        return (
            dx if need_x else None, None, None, dvalue if need_value else None,
            dbias.to(bias.dtype) if need_bias else None,
        )  # fmt: skip


# ---- public functions --------------------------------------------------------------------------------


def _entries(weight: Tensor, index: Any, value: Any, validate: bool | None) -> None:
    if not isinstance(index, Tensor) or index.dtype != torch.int64 or index.dim() != 1:
        came = (
            f"{index.dtype} of shape {tuple(index.shape)}"
            if isinstance(index, Tensor)
            else type(index).__name__
        )
        raise TypeError(f"index: expected an int64 tensor of one dimension, got {came}")
    if index.device != weight.device:
        raise ValueError(f"index: expected device {weight.device}, got {index.device}")
    _check.tensor("value", value, dim=1)
    _check.like("value", value, tuple(index.shape), weight, "weight")
    if weight.dtype == torch.float64:
        _check.same_dtype("value", value, weight, "weight")
    if validate is None:
        transformed = torch._C._are_functorch_transforms_active()
        validate = index.is_cpu and not torch.compiler.is_compiling() and not transformed
    if validate and index.numel() > 0:
        first, last = int(index[0]), int(index[-1])
        if not (0 <= first and last < weight.numel() and bool((index[1:] > index[:-1]).all())):
            raise ValueError(
                f"index: expected increasing places below {weight.numel()}, each once; it holds "
                f"{first} first, {last} last"
            )


def sparse_delta_linear(
    x: Tensor,
    weight: Tensor,
    index: Tensor,
    value: Tensor,
    bias: Tensor | None = None,
    *,
    validate: bool | None = None,
) -> Tensor:
    r"""A linear layer of a frozen weight with some entries replaced: $y = xW^\top + b$, $W_{\mathrm{index}} = p$.

    The gradient is computed at those entries only.

    Args:
        x: (..., I).
        weight: the frozen W (O, I); a weight that requires a gradient is refused.
        index: (S,) int64, increasing: places in the flattened weight, as `sparse_select` gives them.
        value: p (S,), what stands there; start with `weight.flatten()[index]`.
        bias: (O,), or None.
        validate: look whether index is increasing and within the weight. None: on eager CPU tensors only. What
            an index that is not does elsewhere is undefined.

    Shapes: x (..., I), weight (O, I), index (S,), value (S,) -> (..., O), x's dtype. float32, float64, bfloat16,
    float16; value may be float32 beside a half weight. Under autocast x is cast as
    `torch.nn.functional.linear` casts it. Gradients to x, value and bias.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Hu et al., "SaRA", 2024.
    """
    rows = linear_arguments(x, weight, bias)
    _entries(weight, index, value, validate)
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "weight: expected a frozen tensor, got one that requires a gradient, which is computed at the "
            "entries of value only; pass weight.detach()"
        )
    if use_reference():
        y = sparse_delta_linear_reference(rows, weight, index, value, bias)
    elif needs_graph(rows, value, bias):
        y = _SparseDeltaLinear.apply(rows, weight, index, value, bias)
    else:
        y = _op.sparse_delta_linear(rows, weight, index, value, bias)
    return y.view(*x.shape[:-1], weight.shape[0]) if x.dim() != 2 else y


def sparse_delta_weight(
    weight: Tensor, index: Tensor, value: Tensor, *, validate: bool | None = None
) -> Tensor:
    """The dense weight with value in the places of index: what to merge, or to use outside a linear layer.

    Args:
        weight: any shape.
        index, value, validate: as in `sparse_delta_linear`.

    Shapes: weight S, index (n,), value (n,) -> S, a new tensor of weight's dtype. Gradients go to value (those of
    its places) and to weight (zero there). A composition.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Hu et al., "SaRA", 2024.
    """
    _check.tensor("weight", weight)
    _entries(weight, index, value, validate)
    return _scattered(weight, index, value.to(weight.dtype))


def sparse_select(weight: Tensor, threshold: float, index: Tensor | None = None) -> Tensor:
    r"""The places of weights too small to matter, $|w| < \theta$, which SaRA trains.

    Args:
        weight: any shape; or, with `index`, the values (n,) at those places.
        threshold: $\theta$.
        index: (n,), an earlier selection: which of it still lies below (the progressive step half-way).

    Shapes: any S -> (n,) int64, increasing; the number of entries is read from the device. A composition.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Hu et al., "SaRA", 2024.
    """
    _check.tensor("weight", weight)
    threshold = _check.number("threshold", threshold, low=0.0)
    small = torch.nonzero(weight.detach().reshape(-1).abs() < threshold).squeeze(1)
    if index is None:
        return small
    _entries(weight, index, weight, False)
    return index[small]


def sparse_nuclear_norm(value: Tensor, index: Tensor, shape: tuple[int, int]) -> Tensor:
    r"""Nuclear norm $\|W\odot M\|_*$ of the trained entries as a matrix, zeros elsewhere: SaRA's low-rank penalty.

    The gradient is that of the singular values, $UV^\top$ at the entries.

    Args:
        value, index: as in `sparse_delta_linear`.
        shape: (O, I) of the weight.

    Shapes: value (S,), index (S,) -> (). A composition (one SVD); in float32 for half values.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Hu et al., "SaRA", 2024.
    """
    _check.tensor("value", value, dim=1)
    if len(shape) != 2:
        raise ValueError(f"shape: expected (O, I), got {tuple(shape)}")
    zeros = torch.zeros(*shape, dtype=accumulate_type(value), device=value.device)
    _entries(zeros, index, value, None)
    return torch.linalg.svdvals(_scattered(zeros, index, value.to(zeros.dtype))).sum()
