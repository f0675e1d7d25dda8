"""Compositions over `row_norm` and `ada_norm`: DeepNorm, the layer-normalised LSTM, rows scaled one by one."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import _check
from .row_norm import layer_norm


def deep_norm(
    x: Tensor,
    branch: Tensor,
    alpha: float,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    r"""DeepNorm, the post-norm residual of very deep models: $y = \mathrm{LN}(\alpha x + \mathrm{branch})$.

    One pass of core `row_norm` with x as the scaled residual; $\mathrm{d}x = \alpha\,\mathrm{d}u$,
    $\mathrm{d}\,\mathrm{branch} = \mathrm{d}u$.

    Args:
        x, branch: (..., D) of one dtype; branch is the output of the sublayer f(x).
        alpha: see `deep_norm_constants`.
        weight, bias: (D,); may be float32 with a half-precision x.
        eps: added to the variance; not negative.

    Shapes: x, branch (..., D) -> (..., D).

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Wang et al., "DeepNet: Scaling Transformers to 1,000 Layers", 2022; Zeng et al., "GLM-130B", 2023.
    """
    _check.tensor("branch", branch, min_dim=1)
    _check.like("x", x, branch.shape, branch, "branch")
    _check.same_dtype("x", x, branch, "branch")
    alpha = _check.number("alpha", alpha)
    return layer_norm(branch, weight, bias, eps, residual=x, residual_scale=alpha)[0]


def deep_norm_constants(layers: int) -> tuple[float, float]:
    r"""GLM-130B's constants for N layers: $\alpha = (2N)^{1/2}$ and the initial gain $(2N)^{-1/2}$.

    The gain multiplies the Xavier initialisation of the feed-forward, value and output projections. (DeepNet itself
    takes $(2N)^{1/4}$ and $(8N)^{-1/4}$ for one stack.)

    Shapes: an int -> (alpha, gain), two floats.

    Source: Zeng et al., "GLM-130B: An Open Bilingual Pre-trained Model", 2023 (70 layers: alpha = 11.83).
    """
    if not isinstance(layers, int) or isinstance(layers, bool) or layers < 1:
        raise ValueError(f"layers: expected a positive int, got {layers!r}")
    return (2 * layers) ** 0.5, (2 * layers) ** -0.5


def _rows(x: Tensor, affine: tuple[Tensor | None, Tensor | None], eps: float) -> Tensor:
    """layer_norm without a residual, which returns one tensor."""
    return cast(Tensor, layer_norm(x, *affine, eps))


def ln_lstm_cell(
    x: Tensor,
    h: Tensor,
    c: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None,
    norm_ih: tuple[Tensor | None, Tensor | None],
    norm_hh: tuple[Tensor | None, Tensor | None],
    norm_c: tuple[Tensor | None, Tensor | None],
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    r"""One step of the layer-normalised LSTM: the summed inputs of the gates are normalised at each step.

    $(i, f, g, o) = \mathrm{LN}(W_{ih} x) + \mathrm{LN}(W_{hh} h) + b$,
    $c' = \sigma(f)\,c + \sigma(i)\tanh(g)$, $h' = \sigma(o)\tanh(\mathrm{LN}(c'))$, each LN with its own gain and
    bias. A composition: two products and three calls of core `row_norm`.

    Args:
        x, h, c: (B, input), (B, H), (B, H).
        weight_ih, weight_hh, bias: (4 H, input), (4 H, H), (4 H,), in the gate order of `torch.nn.LSTMCell`.
        norm_ih, norm_hh, norm_c: pairs (weight, bias) of (4 H,), (4 H,) and (H,), either may be None.

    Shapes: x (B, input), h, c (B, H) -> (h, c), both (B, H).

    Raises:
        ValueError, TypeError: naming the argument of the norm that does not fit.

    Source: Ba, Kiros, Hinton, "Layer Normalization", 2016, equations 20 to 22 of the supplement.
    """
    for name, t in (("x", x), ("h", h), ("c", c)):
        _check.tensor(name, t, dim=2)
    gates = _rows(F.linear(x, weight_ih), norm_ih, eps)
    gates = gates + _rows(F.linear(h, weight_hh), norm_hh, eps)
    if bias is not None:
        gates = gates + bias
    i, f, g, o = gates.chunk(4, dim=-1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(_rows(c, norm_c, eps)), c


def row_scale(x: Tensor, scale: Tensor) -> Tensor:
    """Each sample's features times its own number: y_b = scale_b x_b. A composition.

    The adaptive feature scaling of online continual learning; an instance's logit mask is the same call with a
    scale (B, C) of zeros and ones, or `masked_fill` with -inf before a softmax.

    Shapes: x (B, ..., D), scale (B,) or (B, D) -> (B, ..., D) in x's dtype.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: after "Online Class Incremental Learning on Stochastic Blurry Task Boundary via Mask and Visual Prompt
    Tuning", 2023 (abstract; its exact factor is computed by the caller).
    """
    _check.tensor("x", x, min_dim=2)
    _check.tensor("scale", scale)
    shapes = ((x.shape[0],), (x.shape[0], x.shape[-1]))
    if tuple(scale.shape) not in shapes:
        raise ValueError(
            f"scale: expected shape {shapes[0]} or {shapes[1]} to go with x of shape "
            f"{tuple(x.shape)}, got {tuple(scale.shape)}"
        )
    _check.like("scale", scale, tuple(scale.shape), x)
    middle = (1,) * (x.dim() - 2)
    last = 1 if scale.dim() == 1 else x.shape[-1]
    return (x * scale.view(x.shape[0], *middle, last)).to(x.dtype)
