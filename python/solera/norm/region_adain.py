"""AdaIN inside each of several regions, as foveated style transfer composes metamers: a composition."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _check
from .._registry import accumulate_type
from ._statistics import check_correction, features, std_of
from .channel_norm import moments


def _windows(regions, spatial, count, x, name) -> Tensor:
    """Labels (*spatial) or masks (R, *spatial) -> weights (R, S) in the accumulator's dtype."""
    if not isinstance(regions, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(regions).__name__}")
    if regions.device != x.device:
        raise ValueError(f"{name}: expected device {x.device}, got {regions.device}")
    acc = accumulate_type(x)
    if regions.is_floating_point():
        if regions.shape[1:] != spatial:
            raise ValueError(
                f"{name}: expected masks of shape (R, {', '.join(map(str, spatial))}), "
                f"got {tuple(regions.shape)}"
            )
        return regions.flatten(1).to(acc)
    if regions.shape != spatial:
        raise ValueError(
            f"{name}: expected labels of shape {tuple(spatial)}, got {tuple(regions.shape)}"
        )
    if count is None:
        count = int(regions.max()) + 1
    return (regions.reshape(1, -1) == torch.arange(count, device=x.device)[:, None]).to(acc)


def _region_moments(x: Tensor, w: Tensor, eps: float, correction: int):
    """(x about its channel mean, that mean, the regions' mean about it and std), the last two (N, C, R)."""
    flat = x.flatten(2).to(w.dtype)
    origin = moments(x)[0].detach()[..., None]
    about = flat - origin
    total = w.sum(1)
    share = w.T / total.clamp_min(torch.finfo(w.dtype).tiny)
    mean = about @ share
    var = (about.square() @ share - mean.square()).clamp_min(0)
    if correction:
        var = var * (total / (total - correction).clamp_min(1e-6))
    return about, origin, mean, std_of(var, eps)


def region_adain(
    content: Tensor,
    style: Tensor,
    regions: Tensor,
    *,
    alpha: float | Tensor = 1.0,
    style_regions: Tensor | None = None,
    num_regions: int | None = None,
    eps: float = 1e-5,
    correction: int = 0,
) -> Tensor:
    r"""AdaIN within windows: $y = \sum_i w_i\,\bigl((1-\alpha_i)\,F + \alpha_i\,\mathrm{AdaIN}_i(F, G)\bigr)$.

    $\mathrm{AdaIN}_i$ takes the mean and the standard deviation of both content F and style G within window i,
    weighted by $w_i$.

    Args:
        content: (N, C, *).
        style: (N or 1, C, *), of the content's spatial size unless `style_regions` is given.
        regions: integer labels of the content's spatial shape, or floating masks (R, *spatial), which need not
            add up to 1.
        alpha: one number, or (R,): by eccentricity in the paper.
        style_regions: the style's own labels or masks; the content's if None.
        num_regions: how many labels there are; None reads the largest label, or alpha's length.
        eps: added to the variances.
        correction: subtracted from a window's total weight in its variance.

    Shapes: content (N, C, *) -> (N, C, *).

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Deza, Jonnalagadda, Eckstein, "Towards Metamerism via Foveated Style Transfer", 2019; the formula is
    derived from its description. A composition over `moments` and matrix products.
    """
    features("content", content)
    features("style", style)
    eps = _check.number("eps", eps, low=0.0)
    check_correction(correction)
    n, c = content.shape[:2]
    if style.shape[1] != c or style.shape[0] not in (1, n):
        raise ValueError(
            f"style: expected shape (1 or {n}, {c}, *) to go with content of shape "
            f"{tuple(content.shape)}, got {tuple(style.shape)}"
        )
    _check.like("style", style, style.shape, content, "content")
    spatial = content.shape[2:]
    if style_regions is None and style.shape[2:] != spatial:
        raise ValueError(
            f"style: expected spatial shape {tuple(spatial)} (that of content) without style_regions, "
            f"got {tuple(style.shape[2:])}"
        )
    if isinstance(alpha, Tensor) and num_regions is None:
        num_regions = alpha.numel()
    w = _windows(regions, spatial, num_regions, content, "regions")
    a = torch.as_tensor(alpha, dtype=w.dtype, device=w.device)
    if a.dim() > 1 or (a.dim() == 1 and a.shape[0] != w.shape[0]):
        raise ValueError(f"alpha: expected a number or shape ({w.shape[0]},), got {tuple(a.shape)}")
    v = w
    if style_regions is not None:
        v = _windows(style_regions, style.shape[2:], w.shape[0], content, "style_regions")
        if v.shape[0] != w.shape[0]:
            raise ValueError(
                f"style_regions: expected {w.shape[0]} masks, as regions has, got {v.shape[0]}"
            )
    about, origin, mean, std = _region_moments(content, w, eps, correction)
    _, style_origin, style_mean, style_std = _region_moments(style, v, eps, correction)
    scale = a * (style_std / std) + (1 - a)
    shift = a * (style_mean + style_origin) + (1 - a) * (mean + origin) - scale * mean
    return (about * (scale @ w) + shift @ w).reshape(content.shape).to(content.dtype)
