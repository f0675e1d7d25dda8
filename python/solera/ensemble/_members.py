"""What the ensemble cores share: the rows of a member, checks of arguments."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _activation, _check
from .._route import autocast_dtype

ACTIVATIONS = _activation.ACTIVATIONS[:4]


def activation_code(activation: object) -> int:
    """The number of an activation that the ensemble kernels know."""
    return _activation.activation_code(activation, ACTIVATIONS)


def by_member(x: Tensor) -> Tensor:
    """(B, I) -> (B, 1, I), which broadcasts over the members; (B, K, I) as it is."""
    return x.unsqueeze(1) if x.dim() == 2 else x


def fresh(t: Tensor, wanted: bool = True) -> Tensor:
    """t in memory of its own, or the empty tensor that stands for "not asked for"."""
    return t.clone(memory_format=torch.contiguous_format) if wanted else t.new_empty(0)


def cast_grad(grad: Tensor, like: Tensor | None, need: bool) -> Tensor | None:
    """A gradient in its parameter's dtype, None where it was not asked for."""
    return grad.to(like.dtype) if need and like is not None else None


def check_input(x: object) -> Tensor:
    """x of shape (B, I) or (B, K, I)."""
    x = _check.tensor("x", x)
    if x.dim() not in (2, 3):
        raise ValueError(
            f"x: expected shape (B, I) shared by the members or (B, K, I), got {tuple(x.shape)}"
        )
    return x


def check_bias(
    bias: Tensor, members: int, out: int, x: Tensor, name: str = "bias", x_name: str = "x"
) -> None:
    """bias of shape (O,) or (K, O)."""
    one = isinstance(bias, Tensor) and bias.dim() == 1
    _check.like(name, bias, (out,) if one else (members, out), x, x_name)


def autocast(x: Tensor) -> Tensor:
    """x as autocast hands it to a linear. The parameters stay: the kernels read them in any precision."""
    dtype = autocast_dtype(x)
    return x if dtype is None or x.dtype == torch.float64 else x.to(dtype)
