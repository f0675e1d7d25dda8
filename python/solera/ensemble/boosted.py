"""Networks that grow by boosting: a sum of small blocks, each fitted to what the ones before left."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import _check
from .._registry import accumulate_type
from .._route import without_autocast
from ._members import autocast

Activation = str | Callable[[Tensor], Tensor]
KNOWN = ("sigmoid", "tanh", "relu", "gelu", "silu")


def boosted_mlp(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    rho: Tensor,
    start: Tensor | float = 0.0,
    *,
    activation: Activation = "sigmoid",
    staged: bool = False,
) -> Tensor:
    r"""A sum of T boosted blocks: $F_t(x) = F_0 + \sum_{j \le t} \rho_j (V_j\,\sigma(W_j x + b_j) + c_j)$.

    A composition: the blocks side by side are one network of T J hidden units, so the sum of all is two
    products. With `staged` the second product keeps the blocks apart and their running sum is returned, so a
    prefix can be used as an early exit.

    Args:
        x: (B, D).
        weight, bias: W (T, J, D), b (T, J).
        out_weight, out_bias: V (T, C, J), c (T, C).
        rho: (T,), step sizes.
        start: $F_0$, a number or (C,).
        activation: "sigmoid", "tanh", "relu", "gelu", "silu", or a function of a tensor.
        staged: return every $F_t$ instead of the last.

    Parameters may be float32 with a half-precision x. Under autocast x is taken, and F returned, in the autocast dtype.

    Shapes: x (B, D) -> (B, C), or (T, B, C) with `staged`.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Emami, Martinez-Munoz, "Sequential Training of Neural Networks with Gradient Boosting", IEEE Access
    2023.
    """
    _check.tensor("x", x, dim=2)
    _check.tensor("weight", weight, dim=3)
    _check.tensor("out_weight", out_weight, dim=3)
    steps, hidden, inputs = weight.shape
    outputs = out_weight.shape[1]
    for name, t, size in (
        ("weight", weight, (steps, hidden, x.shape[1])),
        ("bias", bias, (steps, hidden)),
        ("out_weight", out_weight, (steps, outputs, hidden)),
        ("out_bias", out_bias, (steps, outputs)),
        ("rho", rho, (steps,)),
    ):
        _check.like(name, t, size, x)
    if isinstance(start, Tensor):
        _check.like("start", start, () if start.dim() == 0 else (outputs,), x)
    else:
        _check.number("start", start)
    if not callable(activation):
        _check.choice("activation", activation, KNOWN)
        function = getattr(torch if activation in ("sigmoid", "tanh") else F, activation)
    else:
        function = activation
    x = autocast(x)
    scaled = rho[:, None, None] * out_weight  # (T, C, J): parameters, not activations
    shift = rho[:, None] * out_bias
    w, b = weight.reshape(steps * hidden, inputs), bias.reshape(-1)
    with without_autocast(x):
        h = function(F.linear(x, w.to(x.dtype), b.to(x.dtype)))
        if not staged:
            v = scaled.permute(1, 0, 2).reshape(outputs, steps * hidden)
            return F.linear(h, v.to(h.dtype), (shift.sum(0) + start).to(h.dtype))
        blocks = torch.baddbmm(
            shift.unsqueeze(1).to(h.dtype),
            h.unflatten(1, (steps, hidden)).transpose(0, 1),
            scaled.mT.to(h.dtype),
        )
        return (blocks.cumsum(0, dtype=accumulate_type(h)) + start).to(h.dtype)


def pseudo_residuals(logits: Tensor, target: Tensor) -> Tensor:
    r"""What the next block is fitted to, for cross-entropy: $e_y - \mathrm{softmax}(F(x))$.

    Shapes: logits (B, C), target (B,) integers -> (B, C).

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Friedman, "Greedy Function Approximation: A Gradient Boosting Machine", 2001; Emami,
    Martinez-Munoz, 2023.
    """
    _check.tensor("logits", logits, dim=2)
    if not isinstance(target, Tensor) or target.shape != logits.shape[:1]:
        raise ValueError(f"target: expected class numbers of shape {tuple(logits.shape[:1])}")
    if target.dtype != torch.int64:
        raise TypeError(f"target: expected int64 class numbers, got {target.dtype}")
    _check.same_device("target", target, logits, "logits")
    return F.one_hot(target, logits.shape[1]).to(logits.dtype) - logits.softmax(1)
