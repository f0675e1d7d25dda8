r"""Core `batch_ensemble`: K linear layers that share a weight, evaluated as one.

BatchEnsemble shares one weight $W$ (O, I) among K members, each with its own scales $r_k$, $s_k$ and
bias $b_k$; TabM is this layer with its own initialisation:

$$h_{bk} = W\,(r_k \odot x_{bk}),\qquad z_{bk} = s_k \odot h_{bk} + b_k,\qquad y_{bk} = \phi(z_{bk}) .$$

The gradient, with $\delta = \mathrm{d}y\,\phi'(z)$ (from y itself for relu, from the saved z for gelu and
silu), needs only the input besides:

$$\mathrm{d}x_{bk} = r_k \odot W^\top(s_k \odot \delta_{bk}),\qquad \mathrm{d}b_k = \textstyle\sum_b \delta_{bk} .$$

The gradients of $W, r, s$ are three contractions of one small product a member,
$G_k = \sum_b \delta_{bk} x_{bk}^\top$ (O, I):

$$\mathrm{d}W_{oi} = \sum_k s_{ko}\,r_{ki}\,G_{k,oi},\qquad
  \mathrm{d}s_{ko} = \sum_i G_{k,oi}\,r_{ki}W_{oi},\qquad
  \mathrm{d}r_{ki} = \sum_o G_{k,oi}\,s_{ko}W_{oi},$$

so nothing is recovered by division and zeros in r or s are as good as any value.

Sources: Wen, Tran, Ba, "BatchEnsemble", ICLR 2020; Gorishniy, Kotelnikov, Babenko, "TabM", ICLR 2025.
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


def batch_ensemble_reference(
    x: Tensor,
    weight: Tensor,
    r: Tensor | None,
    s: Tensor | None,
    bias: Tensor | None,
    activation: int,
) -> tuple[Tensor, Tensor]:
    """(y, z) by the formula, in float32 (float64 for float64), rounded to x's dtype."""
    acc = accumulate_type(x)
    h = by_member(x).to(acc)
    if r is not None:
        h = h * r.to(acc)
    with without_autocast(x):
        z = h @ weight.to(acc).T
    if s is not None:
        z = z * s.to(acc)
    if bias is not None:
        z = z + bias.to(acc)
    return activate(z, activation).to(x.dtype), z.to(x.dtype)


@reference("batch_ensemble")
def _batch_ensemble(x, weight, r, s, bias, activation):
    return fresh(batch_ensemble_reference(x, weight, r, s, bias, activation)[0])


@reference("batch_ensemble_saved")
def _batch_ensemble_saved(x, weight, r, s, bias, activation):
    y, z = batch_ensemble_reference(x, weight, r, s, bias, activation)
    return fresh(y), fresh(z, activation >= GELU)


@reference("batch_ensemble_backward")
def _batch_ensemble_backward(
    dy, x, weight, r, s, saved, activation, bias_per_member,
    need_x, need_weight, need_r, need_s, need_bias,
):  # fmt: skip
    delta = delta_of(dy, saved, activation)
    acc = delta.dtype
    v, w = by_member(x).to(acc), weight.to(acc)
    g = torch.einsum("bko,bki->koi", delta, v.expand(-1, delta.shape[1], -1))
    scaled = delta if s is None else delta * s.to(acc)
    dx = scaled @ w if need_x else None
    if dx is not None and r is not None:
        dx = dx * r.to(acc)
    if dx is not None and x.dim() == 2:
        dx = dx.sum(1)
    ones = delta.new_ones(())
    rows = ones if r is None else r.to(acc).unsqueeze(1)  # (K, 1, I)
    columns = ones if s is None else s.to(acc).unsqueeze(2)  # (K, O, 1)
    dbias = delta.sum(0) if bias_per_member else delta.sum((0, 1))
    return (
        delta.new_empty(0).to(x.dtype) if dx is None else fresh(dx.to(x.dtype)),
        fresh((g * rows * columns).sum(0), need_weight),
        fresh((g * columns * w).sum(1), need_r),
        fresh((g * rows * w).sum(2), need_s),
        fresh(dbias, need_bias),
    )


# ---- autograd ----------------------------------------------------------------------------------------


class _BatchEnsemble(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, r, s, bias, activation):
        y, z = _op.batch_ensemble_saved(x, weight, r, s, bias, activation)
        ctx.activation = activation
        saved = None if activation == 0 else y if activation == RELU else z
        ctx.save_for_backward(x, weight, r, s, bias, saved)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, r, s, bias, saved = ctx.saved_tensors
        needs = ctx.needs_input_grad[:5]
        if torch.is_grad_enabled():

            def layer(x, weight, r, s, bias):
                return batch_ensemble_reference(x, weight, r, s, bias, ctx.activation)[0]

            grads = differentiable_vjp(layer, (x, weight, r, s, bias), needs, (dy,))
            return *grads, None
        dx, *grads = _op.batch_ensemble_backward(
            dy, x, weight, r, s, saved, ctx.activation, bias is not None and bias.dim() == 2, *needs
        )
        pairs = zip(grads, (weight, r, s, bias), needs[1:])
        return dx if needs[0] else None, *(cast_grad(*p) for p in pairs), None


# ---- public functions --------------------------------------------------------------------------------


def batch_ensemble_linear(
    x: Tensor,
    weight: Tensor,
    r: Tensor | None = None,
    s: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
) -> Tensor:
    r"""K linear layers that share a weight: the BatchEnsemble (and TabM) linear layer.

    $y_{bk} = \phi\bigl(s_k \odot W(r_k \odot x_{bk}) + b_k\bigr)$.

    Args:
        x: (B, I), shared by all members and never expanded in memory, or (B, K, I); float32, float64,
            bfloat16 or float16. The output has its dtype; sums run in float32 (float64 for float64).
        weight: (O, I). Like r, s and bias it may be float32 with a half-precision x.
        r: (K, I), the input scales; None for ones. May hold zeros.
        s: (K, O), the output scales; None for ones.
        bias: (K, O), or (O,) for one shared by the members.
        activation: None, "relu", "gelu" (with the exact erf) or "silu", applied in the same pass.

    Under autocast x is taken, and y returned, in the autocast dtype, as by `torch.nn.functional.linear`.

    Shapes: x (B, I) or (B, K, I) -> y (B, K, O).

    Raises:
        ValueError: shapes or devices that do not fit, K = 0, or a shared x with nothing that tells K.
        TypeError: a dtype that does not fit, or an argument that is not a tensor.

    Source: Wen, Tran, Ba, "BatchEnsemble: An Alternative Approach to Efficient Ensemble and Lifelong
    Learning", ICLR 2020; Gorishniy et al., "TabM", ICLR 2025.
    """
    code = activation_code(activation)
    x = check_input(x)
    _check.tensor("weight", weight, dim=2)
    out = weight.shape[0]
    _check.like("weight", weight, (out, x.shape[-1]), x)
    if x.dim() == 3:
        members = x.shape[1]
    else:
        for name, t in (("r", r), ("s", s), ("bias", bias)):
            if isinstance(t, Tensor) and t.dim() == 2:
                members = t.shape[0]
                break
            if t is not None and name != "bias":
                _check.tensor(name, t, dim=2)
        else:
            raise ValueError(
                "x: a shared x (B, I) does not tell the number of members; expected r (K, I), s (K, O), "
                f"a bias (K, O) or x (B, K, I), got x of shape {tuple(x.shape)} and none of them"
            )
    if members == 0:
        raise ValueError(f"x: expected at least one member (K >= 1), got K = 0, x {tuple(x.shape)}")
    if r is not None:
        _check.like("r", r, (members, x.shape[-1]), x)
    if s is not None:
        _check.like("s", s, (members, out), x)
    if bias is not None:
        check_bias(bias, members, out, x)
    x = autocast(x)
    if use_reference():
        return batch_ensemble_reference(x, weight, r, s, bias, code)[0]
    if needs_graph(x, weight, r, s, bias):
        return _BatchEnsemble.apply(x, weight, r, s, bias, code)
    return _op.batch_ensemble(x, weight, r, s, bias, code)
