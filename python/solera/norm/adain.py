r"""Adaptive instance normalisation: a channel's statistics replaced by those of a style, on core `channel_norm`.

$$y = \alpha\Bigl(\frac{x - \mu_x}{s_x}\, s + m\Bigr) + (1 - \alpha)\, x
    = (x - \mu_x)\Bigl(\alpha \frac{s}{s_x} + 1 - \alpha\Bigr) + \alpha m + (1 - \alpha)\mu_x$$

with $\mu_x, s_x$ of each (n, c) and the style's mean $m$ and standard deviation $s$. Public codes differ in the
variance's correction and in where $\varepsilon$ sits; both are arguments of every function here.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import _check
from .._activation import activation_code
from .._registry import accumulate_type
from ._statistics import (
    EPS_PLACES,
    bessel,
    check_correction,
    features,
    per_channel,
    positions,
    row_lengths,
    std_of,
)
from .channel_norm import channel_norm, moments
from .group_norm import grouped_norm


def _restyle(mean, var, style_mean, style_std, *, alpha, eps, eps_at, ratio, detach=False):
    """AdaIN as (center, scale, shift)."""
    if detach:
        mean, var = mean.detach(), var.detach()
    scale = style_std / std_of(var * ratio, eps, eps_at)
    if alpha == 1.0:
        return mean, scale, style_mean
    return mean, alpha * scale + (1 - alpha), alpha * style_mean + (1 - alpha) * mean


def _options(eps, eps_at, correction):
    _check.choice("eps_at", eps_at, EPS_PLACES)
    check_correction(correction)
    return _check.number("eps", eps, low=0.0)


def _statistics(style, content, eps, eps_at, correction, name="style"):
    """(mean, std), each (1 or N, C), of a style that is features or such a pair."""
    if isinstance(style, (tuple, list)):
        if len(style) != 2:
            raise ValueError(f"{name}: expected a (mean, std) pair, got {len(style)} values")
        return (
            per_channel(f"{name} mean", style[0], content, "content"),
            per_channel(f"{name} std", style[1], content, "content"),
        )
    features(name, style)
    n, c = content.shape[:2]
    if style.shape[1] != c or (style.shape[0] != 1 and style.shape[0] != n):
        raise ValueError(
            f"{name}: expected shape (1 or {n}, {c}, *) to go with content of shape "
            f"{tuple(content.shape)}, got {tuple(style.shape)}"
        )
    _check.like(name, style, style.shape, content, "content")
    mean, var = moments(style)
    ratio = bessel(positions(style), correction, f"{name}: each channel")
    return mean, std_of(var * ratio, eps, eps_at)


def adaptive_instance_norm(
    content: Tensor,
    style: Tensor | tuple[Tensor, Tensor],
    *,
    alpha: float = 1.0,
    eps: float = 1e-5,
    style_eps: float | None = None,
    eps_at: str = "variance",
    correction: int = 1,
) -> Tensor:
    r"""AdaIN: the content's features with the style's mean and standard deviation in each channel.

    $y = \alpha\,(s\,(x - \mu_x)/s_x + m) + (1 - \alpha)\,x$ with $s_x = \sqrt{\sigma^2_x + \varepsilon}$, and
    $s = \sqrt{\sigma^2 + \varepsilon_{\mathrm{style}}}$ likewise when the style is given as features.

    Args:
        content: (N, C, *), contiguous or channels-last (kept).
        style: features (N or 1, C, *) of any spatial size, or a pair (mean, std), each (C,), (1, C) or (N, C),
            with or without trailing ones; the pair is used as it is.
        alpha: 1 is the style's statistics, 0 the content unchanged.
        eps: of the content's standard deviation. `style_eps`: of the style's, eps if None.
        eps_at: "variance" is sqrt(var + eps), "std" is sqrt(var) + eps.
        correction: 1 divides by n - 1 as torch.var and the public PyTorch codes do, 0 by n.

    Shapes: content (N, C, *) -> y (N, C, *), of the content's dtype. Gradients reach content and style.

    Raises:
        ValueError, TypeError: naming the argument that does not fit; one position with correction=1.

    Source: Huang, Belongie, "Arbitrary Style Transfer in Real-time with Adaptive Instance Normalization",
    2017; the defaults are those of the public PyTorch code (unbiased variance, eps inside the root of both).
    """
    features("content", content)
    eps = _options(eps, eps_at, correction)
    alpha = _check.number("alpha", alpha)
    style_eps = eps if style_eps is None else _check.number("style_eps", style_eps, low=0.0)
    ratio = bessel(positions(content), correction, "content: each channel")
    mean, std = _statistics(style, content, style_eps, eps_at, correction)
    if alpha == 1.0 and eps_at == "variance" and eps > 0.0 and content.numel():
        pair = content.shape[:2]  # plain instance statistics: the core that has them in its kernel
        return grouped_norm(
            content, std.expand(pair), mean.expand(pair), groups=pair[1], eps=eps, correction=ratio
        )[0]
    combine = partial(_restyle, alpha=alpha, eps=eps, eps_at=eps_at, ratio=ratio)
    return channel_norm(content, combine, (mean, std))[0]


def adain_tokens(
    content: Tensor,
    style: Tensor,
    *,
    alpha: float = 1.0,
    eps: float = 0.0,
    correction: int = 1,
) -> Tensor:
    """Cross-modal AdaIN of attention outputs: `adaptive_instance_norm` over the tokens of (B, L, C).

    Args:
        content, style: (B, L, C) and (B or 1, L', C); no copy is made of either.
        alpha, eps, correction: as of `adaptive_instance_norm`; no eps by default, as in StyleStudio, so a channel
            that is constant over the tokens divides by 0.

    Shapes: content (B, L, C) -> (B, L, C).

    Source: Lei et al., "StyleStudio: Text-Driven Style Transfer with Selective Control of Style Elements", 2024.
    """
    _check.tensor("content", content, dim=3)
    _check.tensor("style", style, dim=3)
    y = adaptive_instance_norm(
        content.transpose(1, 2), style.transpose(1, 2), alpha=alpha, eps=eps, correction=correction
    )
    return y.transpose(1, 2)


def _conditional(mean, var, scale, shift, lengths, *, eps, count, correction):
    if lengths is not None:
        # An empty row has no moments: any finite ones do, since none of its positions is kept.
        n = lengths.to(mean.dtype)[:, None]
        some = n > correction
        mean = torch.where(n > 0, mean, 0.0)
        var = torch.where(some, var * (n / torch.where(some, n - correction, 1.0)), 0.0)
    elif correction:
        var = var * bessel(count, correction)
    rstd = 1.0 / std_of(var, eps)
    return (
        mean,
        rstd if scale is None else rstd * scale,
        var.new_zeros(()) if shift is None else shift,
    )


def conditional_instance_norm(
    x: Tensor,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    lengths: Tensor | None = None,
    eps: float = 1e-5,
    correction: int = 0,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    r"""Instance normalisation whose affine is given per sample, with a residual and an activation.

    $y = \phi(\gamma\,(x-\mu)/\sqrt{\sigma^2+\varepsilon} + \beta + r)$.

    Args:
        x: (N, C, *), contiguous or channels-last (kept).
        scale, shift: $\gamma, \beta$: (C,), (1, C) or (N, C), with or without trailing ones; left out: 1 and 0.
        lengths: (N,) integers; x is then (N, C, T), positions past a row's length count nowhere and come out 0.
        eps: added to the variance.
        correction: 0 as torch's instance norm, 1 for codes that use torch.var (PIN of PØDA). A row with a single
            position has variance 0 either way.
        residual: like x, added before the activation.
        activation: None, "relu", "gelu", "silu" or "sigmoid".

    Shapes: x (N, C, *) -> (N, C, *).

    Raises:
        ValueError, TypeError: naming the argument that does not fit; lengths outside [0, T] (CPU, eager).

    Source: Dumoulin, Shlens, Kudlur, "A Learned Representation For Artistic Style", 2017; with a style's linear
    layer it is the SAIN of DurIAN-E, the conditional layer of DyAd and of line-art colourisation.
    """
    features("x", x)
    eps = _options(eps, "variance", correction)
    scale = None if scale is None else per_channel("scale", scale, x)
    shift = None if shift is None else per_channel("shift", shift, x)
    rows = row_lengths(lengths, x)
    if residual is not None:
        _check.like("residual", residual, x.shape, x)
        _check.same_dtype("residual", residual, x)
    count = positions(x)
    if rows is None:
        bessel(count, correction)
    combine = partial(_conditional, eps=eps, count=count, correction=correction)
    code = activation_code(activation)
    return channel_norm(
        x, combine, (scale, shift, rows), activation=code, residual=residual, lengths=rows
    )[0]


def _perturb(mean, var, style_mean, style_std, coin, *, eps, eps_at, ratio):
    scale = style_std / std_of(var * ratio, eps, eps_at)
    if coin is None:
        return mean, scale, style_mean
    return mean, torch.where(coin, scale, 1.0), torch.where(coin, style_mean, mean)


def _noise(
    seed: int | Tensor | None, n: int, c: int, like: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Two standard normals for each (n, c) and one number in [0, 1)."""
    if seed is None:
        normal = torch.randn((2, n, c), device=like.device, dtype=like.dtype)
        return normal[0], normal[1], torch.rand((), device=like.device)
    from ..weights.ema import philox

    element = torch.arange(n * c + 1, device=like.device)
    key = torch.as_tensor(seed, dtype=torch.int64, device=like.device)
    zero = torch.zeros_like(element)
    words = philox((element, zero, zero, zero), (key & 0xFFFFFFFF, (key >> 32) & 0xFFFFFFFF))
    u, v, w = ((word.double() + 0.5) * 2.0**-32 for word in words[:3])
    radius, angle = torch.sqrt(-2.0 * torch.log(u)), 2.0 * math.pi * v
    first, second = (
        (radius * wave)[: n * c].reshape(n, c).to(like.dtype)
        for wave in (torch.cos(angle), torch.sin(angle))
    )
    return first, second, w[-1]


def adain_perturb(
    x: Tensor,
    mean: Tensor,
    std: Tensor,
    *,
    noise_std: float = 0.75,
    p: float = 1.0,
    seed: int | Tensor | None = None,
    eps: float = 1e-7,
    eps_at: str = "std",
    correction: int = 1,
) -> Tensor:
    r"""AdaIN to a target's statistics, perturbed for each sample and channel.

    $y = s\,n_1\,(x-\mu_x)/(s_x+\varepsilon) + m\,n_2$ with $n_1, n_2 \sim N(1, \mathrm{noise\_std}^2)$ per (n, c).

    Args:
        x: (N, C, *).
        mean, std: $m, s$ of one target image, (C,), (1, C) or (N, C).
        noise_std: of both factors; 0 leaves the target's statistics as they are.
        p: the probability that the call does anything, one draw for all of x; otherwise y is x.
        seed: an integer (or an int64 tensor, so that no value is read from the device) fixes the draws: Philox of
            (seed, element), the same on every device. None draws from torch's generator.
        eps, eps_at, correction: as of `adaptive_instance_norm`; the defaults are those of OSSA's code.

    Shapes: x (N, C, *) -> (N, C, *).

    Source: Gerster et al., "OSSA: Unsupervised One-Shot Style Adaptation", 2024.
    """
    features("x", x)
    eps = _options(eps, eps_at, correction)
    noise_std = _check.number("noise_std", noise_std, low=0.0)
    p = _check.number("p", p, low=0.0, high=1.0)
    target = per_channel("mean", mean, x), per_channel("std", std, x)
    n, c = x.shape[:2]
    acc = accumulate_type(x)
    first, second, uniform = _noise(seed, n, c, x.new_empty((), dtype=acc))
    style_std = target[1].to(acc) * (1 + noise_std * first)
    style_mean = target[0].to(acc) * (1 + noise_std * second)
    ratio = bessel(positions(x), correction)
    combine = partial(_perturb, eps=eps, eps_at=eps_at, ratio=ratio)
    coin = None if p == 1.0 else (uniform < p).reshape(1, 1)
    return channel_norm(x, combine, (style_mean, style_std, coin))[0]


def style_mix_adain(
    x: Tensor,
    mean_bank: Tensor,
    std_bank: Tensor,
    weights: Tensor,
    *,
    eps: float = 1e-5,
    correction: int = 1,
    detach_moments: bool = True,
) -> Tensor:
    r"""AdaIN to a convex mixture of stored styles: $m = W M$, $s = W S$, $y = s\,(x-\mu_x)/s_x + m$ (IADG's CSA).

    Args:
        x: (N, C, *).
        mean_bank, std_bank: M, S (K, C), the statistics of K base styles.
        weights: W (N, K), rows from a Dirichlet distribution in the paper.
        detach_moments: True takes x's own moments as constants in backward, as IADG's code does.

    Shapes: x (N, C, *) -> (N, C, *).

    Source: Zhou et al., "Instance-Aware Domain Generalization for Face Anti-Spoofing", 2023.
    """
    features("x", x)
    eps = _options(eps, "variance", correction)
    n, c = x.shape[:2]
    _check.tensor("weights", weights, dim=2)
    k = weights.shape[1]
    _check.like("weights", weights, (n, k), x)
    _check.like("mean_bank", mean_bank, (k, c), x)
    _check.like("std_bank", std_bank, (k, c), x)
    acc = accumulate_type(x)
    mean, std = (weights.to(acc) @ bank.to(acc) for bank in (mean_bank, std_bank))
    ratio = bessel(positions(x), correction)
    combine = partial(
        _restyle, alpha=1.0, eps=eps, eps_at="variance", ratio=ratio, detach=detach_moments
    )
    return channel_norm(x, combine, (mean, std))[0]


def attn_inject(
    content_query: Tensor,
    stylized_query: Tensor,
    style_key: Tensor,
    style_value: Tensor,
    *,
    gamma: float = 0.75,
    temperature: float = 1.5,
) -> Tensor:
    r"""Style injection in self-attention: a blended query on the style's keys and values.

    $\mathrm{softmax}(\tau\,\tilde Q K_s^\top/\sqrt d)\,V_s$ with $\tilde Q = \gamma Q_c + (1-\gamma) Q_{cs}$.

    Args:
        content_query, stylized_query: (..., L, d).
        style_key, style_value: (..., L', d) and (..., L', d').
        gamma: how much of the content's query is kept. temperature: $\tau$.

    Shapes: (..., L, d) -> (..., L, d').

    Source: Chung, Hyun, Heo, "Style Injection in Diffusion: A Training-free Approach for Adapting Large-scale
    Diffusion Models for Style Transfer", 2024. The same paper starts from AdaIN of the latents:
    `adaptive_instance_norm(content, style, eps=0.0)`.
    """
    _check.tensor("content_query", content_query, min_dim=2)
    _check.like(
        "stylized_query", stylized_query, content_query.shape, content_query, "content_query"
    )
    key = _check.tensor("style_key", style_key, min_dim=2)
    value = _check.tensor("style_value", style_value, min_dim=2)
    tokens, width = key.shape[-2], content_query.shape[-1]
    for name, t, last in (
        ("style_key", key, (tokens, width)),
        ("style_value", value, (tokens, value.shape[-1])),
    ):
        _check.like(name, t, (*t.shape[:-2], *last), content_query, "content_query")
        _check.product_dtype(name, t, content_query, "content_query")
    gamma = _check.number("gamma", gamma)
    temperature = _check.number("temperature", temperature)
    query = gamma * content_query + (1 - gamma) * stylized_query
    scale = temperature / math.sqrt(query.shape[-1])
    return F.scaled_dot_product_attention(query, style_key, style_value, scale=scale)
