r"""Instance and layer normalisation blended per channel (AdaLIN, ILN), on core `channel_norm`.

With the moments $\mu_I, \sigma_I^2$ of each (n, c), and from them those of the sample, $\mu_L, \sigma_L^2$,

$$y = \gamma\Bigl(\rho\,\frac{x-\mu_I}{\sqrt{\sigma_I^2+\varepsilon}} +
      (1-\rho)\,\frac{x-\mu_L}{\sqrt{\sigma_L^2+\varepsilon}}\Bigr) + \beta
    = \gamma\,(\rho\,r_I + (1-\rho)\,r_L)\,(x-\mu_I) + \gamma\,(1-\rho)\,r_L\,(\mu_I-\mu_L) + \beta .$$
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from .. import _check
from ._statistics import bessel, check_correction, features, per_channel, pooled, positions
from .channel_norm import channel_norm


def _blend(mean, var, rho, gamma, beta, *, eps, of_instance, of_layer):
    layer_mean, layer_var = pooled(mean, var, 1)
    instance = rho * torch.rsqrt(var * of_instance + eps)
    layer = (1 - rho) * torch.rsqrt(layer_var * of_layer + eps)
    scale, shift = instance + layer, layer * (mean - layer_mean)
    if gamma is not None:
        scale, shift = gamma * scale, gamma * shift
    return mean, scale, shift if beta is None else shift + beta


def _norm(x, rho, gamma, beta, eps, correction, names):
    features("x", x)
    eps = _check.number("eps", eps, low=0.0)
    check_correction(correction)
    rho = per_channel("rho", rho, x)
    gamma = None if gamma is None else per_channel(names[0], gamma, x)
    beta = None if beta is None else per_channel(names[1], beta, x)
    size = positions(x)
    combine = partial(
        _blend,
        eps=eps,
        of_instance=bessel(size, correction),
        of_layer=bessel(x.shape[1] * size, correction, "x: each sample"),
    )
    return channel_norm(x, combine, (rho, gamma, beta))[0]


def ada_layer_instance_norm(
    x: Tensor,
    rho: Tensor,
    gamma: Tensor,
    beta: Tensor,
    *,
    eps: float = 1e-5,
    correction: int = 1,
) -> Tensor:
    r"""AdaLIN: $y = \gamma\,(\rho\,\mathrm{IN}(x) + (1-\rho)\,\mathrm{LN}(x)) + \beta$ with an affine per sample.

    Args:
        x: (N, C, *), contiguous or channels-last (kept).
        rho: (C,) or (1, C, 1, 1), in [0, 1]; kept there by the caller after each step.
        gamma, beta: (N, C), with or without trailing ones.
        eps: added to both variances.
        correction: 1 as the authors' PyTorch code, which calls torch.var; 0 for biased variances.

    Shapes: x (N, C, *) -> (N, C, *). LN's statistics are those over (C, *) of each sample. Gradients reach x,
    rho, gamma and beta.

    Raises:
        ValueError, TypeError: naming the argument that does not fit; one position with correction=1.

    Source: Kim et al., "U-GAT-IT: Unsupervised Generative Attentional Networks with Adaptive Layer-Instance
    Normalization for Image-to-Image Translation", 2020, and its PyTorch code.
    """
    return _norm(x, rho, gamma, beta, eps, correction, ("gamma", "beta"))


def layer_instance_norm(
    x: Tensor,
    rho: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    correction: int = 1,
) -> Tensor:
    r"""ILN, AdaLIN with a static affine: $y = w\,(\rho\,\mathrm{IN}(x) + (1-\rho)\,\mathrm{LN}(x)) + b$.

    Args:
        x: (N, C, *).
        rho: (C,) or (1, C, 1, 1), in [0, 1].
        weight, bias: (C,) or (1, C, 1, 1); left out: 1 and 0.
        eps, correction: as of `ada_layer_instance_norm`.

    Shapes: x (N, C, *) -> (N, C, *).

    Source: as `ada_layer_instance_norm`.
    """
    return _norm(x, rho, weight, bias, eps, correction, ("weight", "bias"))
