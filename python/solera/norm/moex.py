r"""Moments taken out of features and put back elsewhere: PONO, moment shortcuts, moment exchange.

Positional normalisation takes its moments over the channels of each position; moment exchange gives a sample
the moments of another, $y_n = s_{\pi(n)}\,(x_n - m_n)/s_n + m_{\pi(n)}$, with moments of any kind. Both are core
`channel_norm`, but for exchanges per position or per channel, which are core `moment_exchange`; a gradient
flows through the moments of receiver and donor alike.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from .. import _check
from ._statistics import (
    bessel,
    check_correction,
    features,
    group_count,
    pooled,
    positions,
    std_of,
    to_channels,
)
from .channel_norm import channel_norm, moments
from .moment_exchange import MOST, exchange_moments

KINDS = ("pono", "instance", "layer", "group", "group_pono", "batch")


def _positional(mean, var, mean_in, std, weight, bias):
    rstd = 1.0 / std
    return (
        mean_in,
        rstd if weight is None else rstd * weight,
        rstd.new_zeros(()) if bias is None else bias,
    )


def _per_position(name, t, x) -> Tensor:
    """(*spatial), or (1 or N, 1, *spatial) -> (1 or N, S)."""
    value = _check.tensor(name, t)
    spatial = x.shape[2:]
    lead = value.shape[: value.dim() - len(spatial)]
    fits = value.shape[len(lead) :] == spatial and (
        len(lead) == 0
        or (len(lead) == 2 and lead[1] == 1 and (lead[0] == 1 or lead[0] == x.shape[0]))
    )
    if not fits:
        raise ValueError(
            f"{name}: expected shape {tuple(spatial)} or (1 or N, 1, *) of it to go with x of shape "
            f"{tuple(x.shape)}, got {tuple(value.shape)}"
        )
    _check.like(name, value, value.shape, x)
    return value.reshape(lead[0] if len(lead) else 1, positions(x))


def positional_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    correction: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""PONO: each position normalised over its channels, and the moments that were taken out.

    $\hat x = w\,(x-\mu)/s + b$ with $\mu$ and $s = \sqrt{\sigma^2+\varepsilon}$ over C at each (n, position).

    Args:
        x: (N, C, *), contiguous or channels-last (kept).
        weight, bias: of x's spatial shape, or (1 or N, 1, *) of it; left out: 1 and 0.
        eps: added to the variance.
        correction: 1 as torch.var (the authors' code), 0 for the biased variance.

    Shapes: x (N, C, *) -> xhat (N, C, *), mean and std (N, 1, *), all of x's dtype and differentiable.

    Raises:
        ValueError, TypeError: naming the argument that does not fit; a single channel with correction=1.

    Source: Li et al., "Positional Normalization", 2019; used by "On Feature Normalization and Data Augmentation".
    """
    features("x", x)
    eps = _check.number("eps", eps, low=0.0)
    check_correction(correction)
    weight = None if weight is None else _per_position("weight", weight, x)
    bias = None if bias is None else _per_position("bias", bias, x)
    ratio = bessel(x.shape[1], correction, "x: each position")
    mean, var = moments(x, channels=True)
    std = std_of(var * ratio, eps)
    y = channel_norm(x, _positional, (mean, std, weight, bias), channels=True, moments=False)[0]
    shape = (x.shape[0], 1, *x.shape[2:])
    return y, mean.view(shape).to(x.dtype), std.view(shape).to(x.dtype)


def _put_back(mean, var, shift, scale):
    return scale.new_zeros(()), scale, shift


def moment_shortcut(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    r"""Moments put back: $y = x\,s + \mu$ with a mean and a deviation for each position, as PONO takes them out.

    Args:
        x: (N, C, *), a decoder's features.
        mean, std: (N, 1, *) as `positional_norm` returns them, or of x's spatial shape.

    Shapes: x (N, C, *) -> (N, C, *).

    Source: Li et al., "Positional Normalization", 2019 (PONO-MS).
    """
    features("x", x)
    params = (_per_position("mean", mean, x), _per_position("std", std, x))
    return channel_norm(x, _put_back, params, channels=True, moments=False)[0]


def _pool(mean, var, kind, groups):
    """Moments (N, C) or (N, S) -> those of the kind, broadcasting to them."""
    if kind in ("layer", "group"):
        mean_of, var_of = pooled(mean, var, groups)
        return to_channels(mean_of, mean.shape[1]), to_channels(var_of, mean.shape[1])
    return mean, var


def _over_batch(mean, var):
    center = mean.mean(0, keepdim=True)
    return center, var.mean(0, keepdim=True) + (mean - center).square().mean(0, keepdim=True)


def _exchange(mean, var, index, *, kind, groups, eps, ratio):
    if kind == "batch":
        donor_mean, donor_var = _over_batch(mean[index], var[index])
        mean, var = _over_batch(mean, var)
        donor_std = torch.sqrt(donor_var * ratio + eps)
        return mean, donor_std / torch.sqrt(var * ratio + eps), donor_mean
    mean, var = _pool(mean, var, kind, groups)
    std = torch.sqrt(var * ratio + eps)
    return mean, std[index] / std, mean[index]


def _exchange_given(_, __, mean, std, donor_mean, donor_std):
    return mean, donor_std / std, donor_mean


def _positive_moments(x, kind, groups, eps, index):
    """Mean and deviation of the positive elements alone (0 and sqrt(eps) where there is none), and the donors'."""
    channels = kind == "pono"
    mean, var = moments(torch.relu(x), channels=channels)
    square = var + mean.square()
    share = (x > 0).to(mean.dtype)
    share = share.mean(1).flatten(1) if channels else share.flatten(2).mean(2)

    def of(mean, square, share):
        if kind in ("layer", "group"):
            n, c = mean.shape
            mean, square, share = (
                to_channels(t.reshape(n, groups, c // groups).mean(-1), c)
                for t in (mean, square, share)
            )
        elif kind == "batch":
            mean, square, share = (t.mean(0, keepdim=True) for t in (mean, square, share))
        share = torch.where(share > 0, share, 1.0)
        mean, square = mean / share, square / share
        return mean, torch.sqrt((square - mean.square()).clamp_min(0) + eps)

    return *of(mean, square, share), *of(mean[index], square[index], share[index])


def moment_exchange(
    x: Tensor,
    index: Tensor,
    *,
    kind: str = "pono",
    groups: int | None = None,
    eps: float = 1e-5,
    correction: int = 1,
    positive_only: bool = False,
) -> Tensor:
    r"""MoEx: every sample with the moments of another, $y_n = s_{\pi(n)}\,(x_n - m_n)/s_n + m_{\pi(n)}$.

    Args:
        x: (N, C, *), contiguous or channels-last (kept, except by "group_pono", which copies).
        index: (N,) int64, $\pi$: which sample gives the moments. Values are checked on the CPU only.
        kind: over what the moments are taken: "pono" the channels of a position, "instance" the positions of a
            channel, "layer" both, "group" both within a group of channels, "group_pono" the channels of a group
            at a position, "batch" samples and positions of a channel, where the donor's moments are those of
            x[index], so a permutation changes nothing.
        groups: how many groups of channels; with "group" and "group_pono" only.
        eps: added to the variance.
        correction: 1 as torch.var (the authors' code), 0 for biased variances.
        positive_only: moments of the positive elements alone, biased as in the authors' code.

    Shapes: x (N, C, *) -> (N, C, *). The loss of the paper is lam CE(y_n) + (1 - lam) CE(y_index[n]).

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Li et al., "On Feature Normalization and Data Augmentation", 2021, and its code.
    """
    features("x", x)
    _check.choice("kind", kind, KINDS)
    eps = _check.number("eps", eps, low=0.0)
    check_correction(correction)
    _check_index(index, x)
    n, c = x.shape[:2]
    if kind in ("group", "group_pono"):
        groups = group_count("groups", groups, c)
    elif groups is not None:
        raise ValueError(f"groups: expected None with kind {kind!r}, got {groups!r}")
    else:
        groups = 1
    if kind == "group_pono":
        parts = x.reshape(n * groups, c // groups, *x.shape[2:])
        donors = (index[:, None] * groups + torch.arange(groups, device=x.device)).reshape(-1)
        y = moment_exchange(
            parts, donors, eps=eps, correction=correction, positive_only=positive_only
        )
        return y.reshape(x.shape)
    channels = kind == "pono"
    if positive_only:
        params = _positive_moments(x, kind, groups, eps, index)
        return channel_norm(x, _exchange_given, params, channels=channels, moments=False)[0]
    size = positions(x)
    each = {
        "pono": (c, "x: each position"),
        "instance": (size, "x: each channel"),
        "layer": (c * size, "x: each sample"),
        "group": (c // groups * size, "x: each group"),
        "batch": (n * size, "x: each channel"),
    }[kind]
    ratio = bessel(each[0], correction, each[1])
    if kind in ("pono", "instance") and each[0] <= MOST:
        return exchange_moments(x, index, channels, eps, ratio)
    combine = partial(_exchange, kind=kind, groups=groups, eps=eps, ratio=ratio)
    return channel_norm(x, combine, (index,), channels=channels)[0]


def _check_index(index: object, x: Tensor) -> None:
    if not isinstance(index, Tensor):
        raise TypeError(f"index: expected a torch.Tensor, got {type(index).__name__}")
    if index.dtype != torch.int64:
        raise TypeError(f"index: expected int64, got {index.dtype}")
    if index.shape != x.shape[:1] or index.device != x.device:
        raise ValueError(
            f"index: expected shape {tuple(x.shape[:1])} on {x.device}, got {tuple(index.shape)} "
            f"on {index.device}"
        )
    if index.is_cpu and not torch.compiler.is_compiling() and index.numel():
        low, high = int(index.min()), int(index.max())
        if low < 0 or high >= x.shape[0]:
            raise ValueError(
                f"index: expected values in [0, {x.shape[0] - 1}], got {low} to {high}"
            )
