r"""Core `hyper_linear`: layers whose weights move with a hyperparameter vector, one for each example.

A self-tuning network's layer adds to its elementary response a second one, scaled by example and output. With
x (B, I), hyperparameters $\lambda$ (B, m) and $[s_w, s_b] = \lambda H^\top$:

$$y = e\,(x W_e^\top + b_e) + s_w \odot (x W_h^\top) + s_b \odot b_h ,$$

the best response to $\lambda$ to first order: the weights of example n are $e W_e + \mathrm{diag}(s_{w,n}) W_h$,
and never exist. The products are torch's; everything behind them is one pass, the ops of this core. With
a the elementary response and u = x W_h^T, both (N, O, P) (P positions of a convolution's output, 1 for a linear
layer), s (N, 2 O):

$$y_{nop} = a_{nop} + s_{no}\,u_{nop} + s_{n,O+o}\,b_o .$$

Its gradient, likewise one pass over dy and u:

$$\mathrm{d}a = \mathrm{d}y,\quad \mathrm{d}u_{nop} = s_{no}\,\mathrm{d}y_{nop},\quad
  \mathrm{d}s_{no} = \sum_p \mathrm{d}y_{nop}\,u_{nop},\quad
  \mathrm{d}s_{n,O+o} = b_o \sum_p \mathrm{d}y_{nop},\quad
  \mathrm{d}b_o = \sum_{np} s_{n,O+o}\,\mathrm{d}y_{nop} .$$

The scalar e multiplies W_e and b_e, not the (N, O, P) response.

Source: MacKay, Vicol, Lorraine, Duvenaud, Grosse, "Self-Tuning Networks: Bilevel Optimization of
Hyperparameters using Structured Best-Response Functions", ICLR 2019.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import _check
from .._autograd import differentiable_vjp
from .._registry import accumulate_type, reference
from .._route import needs_graph, use_reference
from ._members import cast_grad, fresh

_op = torch.ops.solera


# ---- reference ---------------------------------------------------------------------------------------


def hyper_gate_reference(a: Tensor, u: Tensor, s: Tensor, bias: Tensor | None) -> Tensor:
    """The pass behind the products, in float32 (float64 for float64), rounded to a's dtype."""
    acc = accumulate_type(a)
    outputs = a.shape[1]
    y = a.to(acc) + s[:, :outputs, None].to(acc) * u.to(acc)
    if bias is not None:
        y = y + (s[:, outputs:].to(acc) * bias.to(acc)).unsqueeze(2)
    return y.to(a.dtype)


@reference("hyper_gate")
def _hyper_gate(a, u, s, bias):
    return fresh(hyper_gate_reference(a, u, s, bias))


@reference("hyper_gate_backward")
def _hyper_gate_backward(dy, u, s, bias):
    acc = accumulate_type(dy)
    outputs = dy.shape[1]
    g = dy.to(acc)
    ds = (g * u.to(acc)).sum(2)
    du = s[:, :outputs, None].to(acc) * g
    if bias is None:
        return fresh(du.to(u.dtype)), fresh(ds.to(s.dtype)), s.new_empty(0, dtype=acc)
    total = g.sum(2)
    ds = torch.cat([ds, total * bias.to(acc)], 1)
    dbias = (s[:, outputs:].to(acc) * total).sum(0)
    return fresh(du.to(u.dtype)), fresh(ds.to(s.dtype)), fresh(dbias)


# ---- autograd ----------------------------------------------------------------------------------------


class _HyperGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, u, s, bias):
        ctx.save_for_backward(u, s, bias)
        return _op.hyper_gate(a, u, s, bias)

    @staticmethod
    def backward(ctx, dy):
        u, s, bias = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled():
            gate = lambda u, s, bias: hyper_gate_reference(torch.zeros_like(u), u, s, bias)
            rest = differentiable_vjp(gate, (u, s, bias), needs[1:], (dy,))
            return dy, *rest
        da = dy if needs[0] else None
        if not any(needs[1:]):
            return da, None, None, None
        du, ds, dbias = _op.hyper_gate_backward(dy, u, s, bias)
        return (
            da,
            du if needs[1] else None,
            ds if needs[2] else None,
            cast_grad(dbias, bias, needs[3]),
        )


def hyper_gate(a: Tensor, u: Tensor, s: Tensor, bias: Tensor | None) -> Tensor:
    """a + s_w u + s_b bias of (N, O, P) responses; the inputs have been checked."""
    if use_reference():
        return hyper_gate_reference(a, u, s, bias)
    if needs_graph(a, u, s, bias):
        return _HyperGate.apply(a, u, s, bias)
    return _op.hyper_gate(a, u, s, bias)


# ---- public functions --------------------------------------------------------------------------------


def _check_layer(x, h, weight, hyper_weight, hyper, bias, hyper_bias, scale) -> None:
    outputs, inputs = weight.shape[:2]
    if x.shape[1] != inputs:
        raise ValueError(
            f"x: expected {inputs} features to go with weight of shape {tuple(weight.shape)}, got "
            f"shape {tuple(x.shape)}"
        )
    _check.like("weight", weight, tuple(weight.shape), x)
    _check.product_dtype("weight", weight, x)
    _check.like("hyper_weight", hyper_weight, tuple(weight.shape), x)
    _check.product_dtype("hyper_weight", hyper_weight, x)
    for name, t in (("bias", bias), ("hyper_bias", hyper_bias)):
        if t is not None:
            _check.like(name, t, (outputs,), x)
            _check.product_dtype(name, t, x)
    if isinstance(scale, Tensor):
        if scale.numel() != 1:
            raise ValueError(f"scale: expected one number, got shape {tuple(scale.shape)}")
        _check.like("scale", scale, tuple(scale.shape), x)
    else:
        _check.number("scale", scale)
    if h is None:
        return
    _check.tensor("h", h, dim=2)
    _check.like("h", h, (x.shape[0], h.shape[1]), x)
    _check.product_dtype("h", h, x)
    _check.tensor("hyper", hyper, dim=2)
    _check.like("hyper", hyper, (2 * outputs, h.shape[1]), x)
    _check.product_dtype("hyper", hyper, x)


def _scaled(weight: Tensor, bias: Tensor | None, scale: Tensor | float):
    """e W_e and e b_e: parameters are smaller than responses."""
    if not isinstance(scale, Tensor):
        return (
            (weight, bias)
            if scale == 1
            else (weight * scale, bias if bias is None else bias * scale)
        )
    scale = scale.reshape(())
    return weight * scale, bias if bias is None else bias * scale


def _scalars(h: Tensor, hyper: Tensor, hyper_bias: Tensor | None) -> Tensor:
    """[s_w, s_b], without s_b where there is nothing to scale."""
    return F.linear(h, hyper if hyper_bias is not None else hyper[: hyper.shape[0] // 2])


def hyper_linear(
    x: Tensor,
    h: Tensor | None,
    weight: Tensor,
    hyper_weight: Tensor,
    hyper: Tensor,
    bias: Tensor | None = None,
    hyper_bias: Tensor | None = None,
    scale: Tensor | float = 1.0,
) -> Tensor:
    r"""A self-tuning network's linear layer: $y = e(xW_e^\top + b_e) + s_w \odot xW_h^\top + s_b \odot b_h$.

    Products by torch, then one pass; no example's weights are formed.

    Args:
        x: (B, I).
        h: (B, m), each example's (perturbed) hyperparameters, with $[s_w, s_b] = hH^\top$. None leaves the
            elementary response alone.
        weight, hyper_weight: $W_e$, $W_h$ (O, I).
        hyper: H (2 O, m).
        bias, hyper_bias: $b_e$, $b_h$ (O,).
        scale: e, a number or a tensor of one element.

    Shapes: x (B, I), h (B, m) -> (B, O). float32, float64, bfloat16, float16; under autocast as
    `torch.nn.functional.linear`.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: MacKay et al., "Self-Tuning Networks", ICLR 2019; the scalar e as in the authors' code.
    """
    _check.tensor("x", x, dim=2)
    _check.tensor("weight", weight, dim=2)
    _check_layer(x, h, weight, hyper_weight, hyper, bias, hyper_bias, scale)
    a = F.linear(x, *_scaled(weight, bias, scale))
    if h is None:
        return a
    u, s = F.linear(x, hyper_weight), _scalars(h, hyper, hyper_bias)
    return hyper_gate(a.unsqueeze(2), u.unsqueeze(2), s, hyper_bias).squeeze(2)


def hyper_conv2d(
    x: Tensor,
    h: Tensor | None,
    weight: Tensor,
    hyper_weight: Tensor,
    hyper: Tensor,
    bias: Tensor | None = None,
    hyper_bias: Tensor | None = None,
    scale: Tensor | float = 1.0,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
) -> Tensor:
    r"""A self-tuning network's convolution: `hyper_linear` with $s_w$, $s_b$ by example and output channel.

    Args:
        x: (B, C, H, W).
        h: (B, m), or None for the elementary response alone.
        weight, hyper_weight: (O, C, kh, kw).
        hyper: (2 O, m).
        bias, hyper_bias: (O,).
        scale: a number or a tensor of one element.
        stride, padding: as in `torch.nn.functional.conv2d`.

    Shapes: x (B, C, H, W), h (B, m) -> (B, O, H', W').

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: MacKay et al., "Self-Tuning Networks", ICLR 2019.
    """
    _check.tensor("x", x, dim=4)
    _check.tensor("weight", weight, dim=4)
    _check_layer(x, h, weight, hyper_weight, hyper, bias, hyper_bias, scale)
    w, b = _scaled(weight, bias, scale)
    a = F.conv2d(x, w, b, stride=stride, padding=padding)
    if h is None:
        return a
    u = F.conv2d(x, hyper_weight, stride=stride, padding=padding)
    s = _scalars(h, hyper, hyper_bias)
    return hyper_gate(a.flatten(2), u.flatten(2), s, hyper_bias).view(a.shape)
