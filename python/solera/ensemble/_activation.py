"""What the ensemble cores share: activations, the rows of a member, checks of arguments."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import _check
from .._registry import accumulate_type
from .._route import autocast_dtype

ACTIVATIONS = (None, "relu", "gelu", "silu")
RELU, GELU, SILU = 1, 2, 3


def activate(z: Tensor, activation: int) -> Tensor:
    if activation == RELU:
        return F.relu(z)
    if activation == GELU:
        return F.gelu(z)
    return F.silu(z) if activation == SILU else z


def delta_of(dy: Tensor, saved: Tensor | None, activation: int) -> Tensor:
    """dy times the derivative of the activation, in the accumulator's type."""
    g = dy.to(accumulate_type(dy))
    if activation == 0 or saved is None:
        return g
    v = saved.to(g.dtype)
    if activation == RELU:
        return torch.where(v <= 0, 0.0, g)
    if activation == GELU:
        return torch.ops.aten.gelu_backward(g, v)
    return torch.ops.aten.silu_backward(g, v)


def by_member(x: Tensor) -> Tensor:
    return x.unsqueeze(1) if x.dim() == 2 else x


def fresh(t: Tensor, wanted: bool = True) -> Tensor:
    """t in memory of its own, or the empty tensor that stands for "not asked for"."""
    return t.clone(memory_format=torch.contiguous_format) if wanted else t.new_empty(0)


def cast_grad(grad: Tensor, like: Tensor | None, need: bool) -> Tensor | None:
    return grad.to(like.dtype) if need and like is not None else None


def activation_code(activation: object) -> int:
    if activation is None:
        return 0
    if not isinstance(activation, str):
        raise TypeError(
            f"activation: expected one of {ACTIVATIONS}, got {type(activation).__name__} {activation!r}"
        )
    _check.choice("activation", activation, ACTIVATIONS)
    return ACTIVATIONS.index(activation)


def check_input(x: object) -> Tensor:
    x = _check.tensor("x", x)
    if x.dim() not in (2, 3):
        raise ValueError(
            f"x: expected shape (B, I) shared by the members or (B, K, I), got {tuple(x.shape)}"
        )
    return x


def check_bias(bias: Tensor, members: int, out: int, x: Tensor) -> None:
    one = isinstance(bias, Tensor) and bias.dim() == 1
    _check.like("bias", bias, (out,) if one else (members, out), x)


def autocast(x: Tensor) -> Tensor:
    """x as autocast hands it to a linear. The parameters stay: the kernels read them in any precision."""
    dtype = autocast_dtype(x)
    return x if dtype is None or x.dtype == torch.float64 else x.to(dtype)
