r"""Batch statistics under a shift of the data: mixed with the source's, kept by domain; gated entropy.

All on core `channel_norm`: each is a combine function of the batch's moments. `recalibrate.py` re-estimates
the running statistics themselves (AdaBN).
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .. import _check
from .._registry import accumulate_type
from ._statistics import bessel, check_correction, positions
from .batch_norm import affine_of, merged, running_pair, update_running
from .channel_norm import channel_norm
from .group_norm import empty_norm

MODES = ("source", "batch", "mix", "ema")


# ---- source and batch statistics mixed ---------------------------------------------------------------


def _alpha(mean, var, source_mean, source_var, weight, bias, *, source_weight, factor, eps):
    center, spread = merged(mean, var)
    center = source_weight * source_mean + (1.0 - source_weight) * center
    spread = source_weight * source_var + (1.0 - source_weight) * factor * spread
    return affine_of(center, spread, weight, bias, eps)


def _alpha_norm(
    x, source_mean, source_var, weight, bias, source_weight, eps, correction, name="source"
):
    """(y, mean, var): the moments (C,) are the batch's, the variance with its correction."""
    _check.tensor("x", x, min_dim=2)
    for part, value in (("mean", source_mean), ("var", source_var)):
        _check.like(f"{name}_{part}", value, x.shape[1:2], x)
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            _check.like(name, value, x.shape[1:2], x)
    source_weight = _check.number("source_weight", source_weight, low=0.0, high=1.0)
    eps = _check.number("eps", eps, low=0.0)
    check_correction(correction)
    if x.numel() == 0:
        return empty_norm(x, weight, bias, None, 0), source_mean, source_var
    factor = bessel(x.shape[0] * positions(x), correction)
    combine = partial(_alpha, source_weight=source_weight, factor=factor, eps=eps)
    params = (source_mean, source_var, weight, bias)
    y, mean, var = channel_norm(x, combine, params, batch=True)
    mean, var = merged(mean, var)
    return y, mean[0], var[0] * factor


def alpha_batch_norm(
    x: Tensor,
    source_mean: Tensor,
    source_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    source_weight: float,
    eps: float = 1e-5,
    correction: int = 0,
) -> Tensor:
    r"""Batch normalisation by a mixture of the source's moments and the batch's.

    With $a$ = source_weight: $\mu = a\,\mu_s + (1-a)\,\mu_B$, $\sigma^2 = a\,\sigma_s^2 + (1-a)\,\sigma_B^2$ and
    $y = (x - \mu)/\sqrt{\sigma^2 + \varepsilon}\;w + b$. 1 is evaluation as usual, 0 the batch's statistics alone
    (AdaBN on one batch). Moments are mixed, not outputs. Gradients flow through the batch's moments with
    the factor $1 - a$.

    Args:
        x: (N, C, *), contiguous or channels-last (kept); float32, float64, bfloat16 or float16.
        source_mean, source_var: (C,), the running statistics of training.
        weight, bias: (C,).
        source_weight: a, in [0, 1]. The paper's abstract does not say which side its alpha weights and
            public code puts it on the batch's side, hence the name.
        eps: added to the variance; not negative.
        correction: 0 for the biased variance of the batch, 1 for the unbiased one, which public code takes.

    Shapes: x (N, C, *) -> y (N, C, *).

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: You, Li, Zhao, "Test-time Batch Statistics Calibration for Covariate Shift", 2021.
    """
    return _alpha_norm(
        x, source_mean, source_var, weight, bias, source_weight, eps, correction
    )[0]  # fmt: skip


def bn_adapt(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    mode: str = "mix",
    momentum: float = 0.1,
    eps: float = 1e-5,
    correction: int = 0,
) -> Tensor:
    r"""Batch normalisation while a model adapts at test time, by one of four rules for its statistics.

    `alpha_batch_norm` with the source's weight by `mode`:

    * "source": 1, the running statistics;
    * "batch": 0, the batch's own;
    * "mix": 1 - momentum, that is $(1-m)\,\mu_s + m\,\mu_B$, likewise the variance;
    * "ema": as "mix", and the running statistics become the mixture, in place.

    Args:
        x: (N, C, *); running_mean, running_var, weight, bias: (C,). Train weight and bias alone for
            adaptation of the affine parameters (TENT).
        momentum: m, in [0, 1]; without effect in modes "source" and "batch".
        eps, correction: as in `alpha_batch_norm`.

    Shapes: x (N, C, *) -> y (N, C, *).

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Roy, Mitra, Biswas, Soundararajan, "Test Time Adaptation for Blind Image Quality Assessment", 2023
    (batch statistics updated at test time; the four rules are those in use for it).
    """
    _check.choice("mode", mode, MODES)
    momentum = _check.number("momentum", momentum, low=0.0, high=1.0)
    source_weight = {"source": 1.0, "batch": 0.0}.get(mode, 1.0 - momentum)
    if _check.tensor("x", x, min_dim=2).numel() > 0 and mode == "ema":
        # The mixture overwrites the running statistics: backward needs their old values.
        copy = lambda t: t.clone() if isinstance(t, Tensor) else t  # the check's to refuse
        y, mean, var = _alpha_norm(
            x,
            copy(running_mean),
            copy(running_var),
            weight,
            bias,
            source_weight,
            eps,
            correction,
            name="running",
        )
        update_running(running_mean, mean, momentum)
        update_running(running_var, var, momentum)
        return y
    return _alpha_norm(
        x, running_mean, running_var, weight, bias, source_weight, eps, correction, name="running"
    )[0]  # fmt: skip


# ---- statistics by domain ----------------------------------------------------------------------------


def _by_domain(mean, var, domain, domains):
    """(counts (M,), means (M, C), biased variances (M, C)) of the samples of each domain.

    Sums of selected rows, not products with zeros: a NaN stays in its domain.
    """
    member = (domain == torch.arange(domains, device=domain.device)[:, None])[
        :, :, None
    ]  # (M, N, 1)
    count = member.sum(1).to(mean.dtype)
    share = count.clamp_min(1.0)
    center = torch.where(member, mean, 0.0).sum(1) / share
    spread = torch.where(member, var + (mean - center[:, None]).square(), 0.0).sum(1) / share
    return count[:, 0], center, spread


def _domain(mean, var, domain, weight, bias, *, domains, eps):
    _, center, spread = _by_domain(mean, var, domain, domains)
    return _rows(center, spread, domain, weight, bias, eps)


def _domain_stored(_mean, _var, domain, center, spread, weight, bias, *, eps):
    return _rows(center, spread, domain, weight, bias, eps)


def _rows(center, spread, domain, weight, bias, eps):
    pick = lambda t: None if t is None else t[domain]
    return affine_of(center[domain], spread[domain], pick(weight), pick(bias), eps)


def _domain_index(domain: object, x: Tensor, domains: int) -> Tensor:
    if not isinstance(domain, Tensor):
        raise TypeError(f"domain: expected a torch.Tensor, got {type(domain).__name__}")
    if domain.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"domain: expected int64 or int32, got {domain.dtype}")
    if domain.shape != x.shape[:1] or domain.device != x.device:
        raise ValueError(
            f"domain: expected shape {tuple(x.shape[:1])} on {x.device}, got "
            f"{tuple(domain.shape)} on {domain.device}"
        )
    if domain.is_cpu and not is_compiling() and domain.numel():
        low, high = int(domain.min()), int(domain.max())
        if low < 0 or high >= domains:
            raise ValueError(f"domain: expected values in [0, {domains}), got {low} to {high}")
    return domain.long()


def domain_batch_norm(
    x: Tensor,
    domain: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    domains: int | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    r"""Batch normalisation by domain: each sample by the statistics, weight and bias of its own domain.

    $y_n = (x_n - \mu_d)/\sqrt{\sigma^2_d + \varepsilon}\;w_d + b_d$ with $d$ the domain of sample n. When training
    $\mu_d, \sigma^2_d$ run over the batch's samples of that domain (and over positions), all domains in one
    pass; otherwise they are the running ones.

    Args:
        x: (N, C, *), contiguous or channels-last (kept); float32, float64, bfloat16 or float16.
        domain: (N,) int64, each in [0, M).
        weight, bias: (M, C) or None.
        running_mean, running_var: (M, C). When training they move in place for the domains that the batch
            holds (the variance unbiased); needed otherwise.
        domains: M, where no (M, C) tensor gives it.
        training: statistics of the batch.
        momentum: weight of the batch in the running statistics.
        eps: added to the variance.

    Shapes: x (N, C, *) -> y (N, C, *).

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Pal et al., "Domain Adaptive Few-Shot Open-Set Learning", 2023 (domain-specific batch
    normalisation). Its prototypes are aligned after the same map, weight * prototype + bias.
    """
    _check.tensor("x", x, min_dim=2)
    named = {
        "weight": weight,
        "bias": bias,
        "running_mean": running_mean,
        "running_var": running_var,
    }
    for name, value in named.items():
        if value is not None:
            _check.tensor(name, value, dim=2)
            domains = value.shape[0] if domains is None else domains
            _check.like(name, value, (domains, x.shape[1]), x)
    if isinstance(domains, bool) or not isinstance(domains, int) or domains < 1:
        raise ValueError(f"domains: expected a positive integer, got {domains!r}")
    running_pair(
        None if running_mean is None else running_mean[0],
        None if running_var is None else running_var[0],
        x,
        required=not training,
    )
    domain = _domain_index(domain, x, domains)
    eps = _check.number("eps", eps, low=0.0)
    momentum = _check.number("momentum", momentum, low=0.0, high=1.0)
    if x.numel() == 0:
        return x.clone()
    if not training:
        params = (domain, running_mean, running_var, weight, bias)
        return channel_norm(x, partial(_domain_stored, eps=eps), params, moments=False)[0]
    combine = partial(_domain, domains=domains, eps=eps)
    y, mean, var = channel_norm(x, combine, (domain, weight, bias))
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            count, center, spread = _by_domain(mean, var, domain, domains)
            values = (count * positions(x))[:, None]
            spread = spread * (values / (values - 1).clamp_min(1))
            for running, new in ((running_mean, center), (running_var, spread)):
                moved = running.to(new.dtype).lerp(new, momentum)
                running.copy_(torch.where(values > 0, moved, running))
    return y


# ---- entropy of the samples that adaptation has made surer -------------------------------------------


def gated_entropy_loss(
    adapted: Tensor, reference: Tensor, *, rule: str = "conf_up"
) -> tuple[Tensor, Tensor]:
    r"""Entropy of the adapted model's predictions, over the samples that adaptation has not made less sure.

    With $c = \arg\max$ of the reference's logits, a sample is kept where $p_{\text{adapted}}[c] \ge
    p_{\text{reference}}[c]$; the loss is $\sum_{\text{kept}} H(p_{\text{adapted}})/\#\text{kept}$, 0 where none is
    kept. Unknown classes tend to lose confidence, so they drop out of entropy minimisation.

    Args:
        adapted: logits (B, C) or (B, C, *), classes in dimension 1; finite.
        reference: logits of the frozen original model, of the same shape; no gradient flows to it.
        rule: "conf_up", the rule above.

    Shapes: (B, C, *) twice -> loss () and mask (B, *), bool.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Lee, Das, Choo, Choi, "Towards Open-Set Test-Time Adaptation Utilizing the Wisdom of Crowds in
    Entropy Minimization", 2023; the rule as later literature states it. A composition of torch ops.
    """
    _check.tensor("adapted", adapted, min_dim=2)
    _check.like("reference", reference, adapted.shape, adapted, "adapted")
    _check.choice("rule", rule, ("conf_up",))
    acc = accumulate_type(adapted)
    log_p = torch.log_softmax(adapted.to(acc), 1)
    with torch.no_grad():
        log_q = torch.log_softmax(reference.to(acc), 1)
        best = log_q.argmax(1, keepdim=True)
        keep = (log_p.gather(1, best) >= log_q.gather(1, best)).squeeze(1)
    entropy = -(log_p.exp() * log_p).sum(1)
    loss = torch.where(keep, entropy, 0.0).sum() / keep.sum().clamp_min(1)
    return loss.to(adapted.dtype), keep
