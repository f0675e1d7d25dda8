"""A tensor passed on unchanged whose gradient is multiplied by a number."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _check
from .._route import use_reference


class _GradScale(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale):
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dy):
        scale = ctx.scale
        return dy * (scale.to(dy.dtype) if isinstance(scale, Tensor) else scale), None


def grad_scale(x: Tensor, scale: float | Tensor) -> Tensor:
    r"""The identity with a scaled gradient: $y = x$, $\mathrm{d}x = \mathrm{scale}\,\mathrm{d}y$.

    The form $a x + (1 - a)\,\mathrm{sg}(x)$ without its two products and its rounding: y has x's bits.

    Args:
        x: any floating-point tensor.
        scale: a finite number; 0 stops the gradient, -1 reverses it. Or a tensor that broadcasts against x, for a
            factor known on the device only; it gets no gradient.

    Shapes: x (...) -> (...), a view of x.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: the embedding gradient shrink of GLM-130B (Zeng et al., 2022) and of CogView (Ding et al., 2021); with -1
    the gradient reversal of Ganin et al., 2016.
    """
    _check.tensor("x", x)
    if isinstance(scale, Tensor):
        scale = scale.detach()
        if scale.is_complex():
            raise TypeError(f"scale: expected real numbers, got {scale.dtype}")
        if scale.dim():  # a number may stay on the host
            _check.same_device("scale", scale, x)
        last = x.shape[x.dim() - scale.dim() :]
        if scale.dim() > x.dim() or any(s not in (1, n) for s, n in zip(scale.shape, last)):
            raise ValueError(
                f"scale: expected a shape that broadcasts to x's {tuple(x.shape)}, got "
                f"{tuple(scale.shape)}"
            )
    else:
        scale = _check.number("scale", scale)
    if use_reference():
        still = x.detach()
        return still + scale * (x - still)
    return _GradScale.apply(x, scale) if x.requires_grad else x.view_as(x)


def embedding_shrink(e: Tensor, alpha: float = 0.1) -> Tensor:
    r"""GLM-130B's embedding gradient shrink, $e \leftarrow \alpha e + (1-\alpha)\,\mathrm{sg}(e)$.

    The same as `grad_scale(e, alpha)`.

    Shapes: e (...) -> (...).

    Source: Zeng et al., "GLM-130B: An Open Bilingual Pre-trained Model", 2023.
    """
    return grad_scale(e, alpha)
