"""Activations that cores apply before they store: their names, codes and derivatives."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from . import _check
from ._registry import accumulate_type

ACTIVATIONS = (None, "relu", "gelu", "silu", "sigmoid")
RELU, GELU, SILU, SIGMOID = 1, 2, 3, 4


def activate(z: Tensor, activation: int) -> Tensor:
    """The activation with this code; the identity for 0."""
    if activation == RELU:
        return F.relu(z)
    if activation == GELU:
        return F.gelu(z)
    if activation == SILU:
        return F.silu(z)
    return torch.sigmoid(z) if activation == SIGMOID else z


def delta_of(dy: Tensor, saved: Tensor | None, activation: int) -> Tensor:
    """dy times the derivative of the activation, in the accumulator's type.

    `saved` is the activation's input; for relu its output serves as well.
    """
    g = dy.to(accumulate_type(dy))
    if activation == 0 or saved is None:
        return g
    v = saved.to(g.dtype)
    if activation == RELU:
        return torch.where(v <= 0, 0.0, g)
    if activation == GELU:
        return torch.ops.aten.gelu_backward(g, v)
    if activation == SIGMOID:
        return torch.ops.aten.sigmoid_backward(g, torch.sigmoid(v))
    return torch.ops.aten.silu_backward(g, v)


def activation_code(activation: object, known: tuple[str | None, ...] = ACTIVATIONS) -> int:
    """The number by which kernels know an activation."""
    if activation is None:
        return 0
    if not isinstance(activation, str):
        raise TypeError(
            f"activation: expected one of {known}, got {type(activation).__name__} {activation!r}"
        )
    _check.choice("activation", activation, known)
    return known.index(activation)
