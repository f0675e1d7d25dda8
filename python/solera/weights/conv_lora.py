"""Low-rank updates of convolution weights."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _check
from .._registry import accumulate_type
from .._route import full_precision


@full_precision
def conv_lora_weight(weight: Tensor, a: Tensor, b: Tensor, *, scale: float) -> Tensor:
    r"""A convolution's weight with its low-rank update: $W + \text{scale}\cdot\mathrm{view}(BA)$.

    The product (R rows of A summed over) is read in row-major order as a tensor of W's shape. scale is
    alpha / rank; the merged weight of evaluation is the same expression.

    Args:
        weight: (O, I / groups, k, ...), the convolution's.
        a: (R, P), in public code (rank k, I k).
        b: (Q, R), in public code (O / groups k, rank k), with Q P the number of weights.

    Shapes: weight (O, I / groups, *) -> the same. Differentiable in all three; computed in float32 (float64
    for float64). A composition of torch ops.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Aleem, Dietlmeier, Arazo, Little, "ConvLoRA and AdaBN based Domain Adaptation via Self-Training",
    2024; shapes as in its public code.
    """
    _check.tensor("weight", weight, min_dim=2)
    _check.tensor("a", a, dim=2)
    _check.like("b", b, (weight.numel() // max(a.shape[1], 1), a.shape[0]), weight, "weight")
    _check.like("a", a, a.shape, weight, "weight")
    if b.shape[0] * a.shape[1] != weight.numel():
        raise ValueError(
            f"a: expected a second dimension that divides the {weight.numel()} weights, got shape "
            f"{tuple(a.shape)}"
        )
    scale = _check.number("scale", scale)
    acc = accumulate_type(weight)
    flat = weight.to(acc).reshape(b.shape[0], a.shape[1])
    merged = torch.addmm(flat, b.to(acc), a.to(acc), alpha=scale)
    return merged.view(weight.shape).to(weight.dtype)
