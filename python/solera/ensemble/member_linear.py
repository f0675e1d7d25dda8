r"""Core `member_linear`: K linear layers with separate weights, evaluated as one.

With weights $W_k$ (I, O) and biases $b_k$, for x (B, K, I) or an x (B, I) shared by the members:

$$z_{bk} = W_k^\top x_{bk} + b_k,\qquad y_{bk} = \phi(z_{bk}) .$$

The gradient, with $\delta = \mathrm{d}y\,\phi'(z)$ (from y itself for relu, from the saved z for gelu and
silu), is two products a member and a sum:

$$\mathrm{d}x_{bk} = W_k\,\delta_{bk},\qquad
  \mathrm{d}W_k = \sum_b x_{bk}\,\delta_{bk}^\top,\qquad
  \mathrm{d}b_k = \sum_b \delta_{bk} ;$$

for a shared x, dx is the sum over k, for a shared bias, db too.

Sources: Lakshminarayanan, Pritzel, Blundell, "Simple and Scalable Predictive Uncertainty Estimation using
Deep Ensembles", NeurIPS 2017; the layout is that of `tabm.LinearEnsemble` (Gorishniy, Kotelnikov, Babenko,
"TabM", ICLR 2025).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _check
from .._activation import GELU, RELU, activate, delta_of
from .._autograd import differentiable_vjp
from .._registry import accumulate_type, reference
from .._route import needs_graph, use_reference, without_autocast
from ._members import (
    activation_code,
    autocast,
    by_member,
    cast_grad,
    check_bias,
    check_input,
    fresh,
)

_op = torch.ops.solera


# ---- reference ---------------------------------------------------------------------------------------


def member_linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: int
) -> tuple[Tensor, Tensor]:
    """(y, z) by the formula, in float32 (float64 for float64), rounded to x's dtype."""
    acc = accumulate_type(x)
    with without_autocast(x):
        z = torch.matmul(by_member(x).to(acc).transpose(0, 1), weight.to(acc)).transpose(0, 1)
    if bias is not None:
        z = z + bias.to(acc)
    return activate(z, activation).to(x.dtype), z.to(x.dtype)


@reference("member_linear")
def _member_linear(x, weight, bias, activation):
    return fresh(member_linear_reference(x, weight, bias, activation)[0])


@reference("member_linear_saved")
def _member_linear_saved(x, weight, bias, activation):
    y, z = member_linear_reference(x, weight, bias, activation)
    return fresh(y), fresh(z, activation >= GELU)


@reference("member_linear_backward")
def _member_linear_backward(
    dy, x, weight, saved, activation, bias_per_member, need_x, need_weight, need_bias
):
    delta = delta_of(dy, saved, activation)
    acc = delta.dtype
    v = by_member(x).to(acc).expand(-1, delta.shape[1], -1)
    dx = torch.einsum("bko,kio->bki", delta, weight.to(acc)) if need_x else v
    if need_x and x.dim() == 2:
        dx = dx.sum(1)
    dbias = delta.sum(0) if bias_per_member else delta.sum((0, 1))
    return (
        fresh(dx.to(x.dtype), need_x),
        fresh(torch.einsum("bki,bko->kio", v, delta).to(weight.dtype), need_weight),
        fresh(dbias, need_bias),
    )


# ---- autograd ----------------------------------------------------------------------------------------


class _MemberLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, activation):
        y, z = _op.member_linear_saved(x, weight, bias, activation)
        ctx.activation = activation
        saved = None if activation == 0 else y if activation == RELU else z
        ctx.save_for_backward(x, weight, bias, saved)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, bias, saved = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():

            def layer(x, weight, bias):
                return member_linear_reference(x, weight, bias, ctx.activation)[0]

            return *differentiable_vjp(layer, (x, weight, bias), needs, (dy,)), None
        dx, dweight, dbias = _op.member_linear_backward(
            dy, x, weight, saved, ctx.activation, bias is not None and bias.dim() == 2, *needs
        )
        return (
            dx if needs[0] else None,
            dweight if needs[1] else None,
            cast_grad(dbias, bias, needs[2]),
            None,
        )


# ---- public functions --------------------------------------------------------------------------------


def ensemble_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
) -> Tensor:
    r"""K independent linear layers in one call: $y_{bk} = \phi(W_k^\top x_{bk} + b_k)$.

    Args:
        x: (B, I), shared by all members and never expanded in memory, or (B, K, I); float32, float64,
            bfloat16 or float16. The output has its dtype; sums run in float32 (float64 for float64).
        weight: (K, I, O); may be float32 with a half-precision x, as may bias.
        bias: (K, O), or (O,) for one shared by the members.
        activation: None, "relu", "gelu" (with the exact erf) or "silu", applied in the same pass.

    Under autocast x is taken, and y returned, in the autocast dtype, as by `torch.nn.functional.linear`.

    Shapes: x (B, I) or (B, K, I) -> y (B, K, O).

    Raises:
        ValueError: shapes or devices that do not fit, or K = 0.
        TypeError: a dtype that does not fit, or an argument that is not a tensor.

    Source: the layout of `tabm.LinearEnsemble` (Gorishniy et al., "TabM", ICLR 2025).
    """
    code = activation_code(activation)
    x = check_input(x)
    _check.tensor("weight", weight, dim=3)
    members, _, out = weight.shape
    if members == 0:
        raise ValueError(
            f"weight: expected at least one member (K >= 1), got {tuple(weight.shape)}"
        )
    if x.dim() == 3 and x.shape[1] != members:
        raise ValueError(
            f"x: expected {members} members to go with weight of shape {tuple(weight.shape)}, "
            f"got {x.shape[1]} (x of shape {tuple(x.shape)})"
        )
    _check.like("weight", weight, (members, x.shape[-1], out), x)
    if bias is not None:
        check_bias(bias, members, out, x)
    x = autocast(x)
    if use_reference():
        return member_linear_reference(x, weight, bias, code)[0]
    if needs_graph(x, weight, bias):
        return _MemberLinear.apply(x, weight, bias, code)
    return _op.member_linear(x, weight, bias, code)
