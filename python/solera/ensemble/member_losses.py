"""Losses and predictions of an ensemble, each a few lines over the cores of member logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _check
from .._registry import accumulate_type
from ..norm._labels import labels
from ._logits import Members, member_logits, stacked
from .distillation import ensemble_distillation_loss
from .logit_mixture import PROBABILITY, combine
from .member_logits import log_mean_exp, member_logsumexp, member_weights
from .member_statistics import ENTROPIES, TOPS, ensemble_statistics, member_statistics

MEASURES = ("jensen", "variance", "js")


class DiversityLoss(NamedTuple):
    """What `diversity_loss` returns. Shapes: all scalars."""

    loss: Tensor
    member_nll: Tensor  # the mean of the members' losses
    ensemble_nll: Tensor  # the loss of their mean probability
    diversity: Tensor


def diversity_loss(
    logits: Tensor | Sequence[Tensor],
    target: Tensor,
    gamma: float,
    *,
    measure: str = "jensen",
    member_dim: int = 1,
    ignore_index: int = -100,
) -> DiversityLoss:
    r"""The members' mean loss less gamma times their diversity.

    $L = \frac1K\sum_k \mathrm{CE}(p_k, y) - \gamma D$, the mean over the rows. The Jensen gap
    $D = \frac1K\sum_k \mathrm{CE}(p_k, y) - \mathrm{CE}(\bar p, y) \ge 0$ makes it $(1-\gamma)$ times the
    members' mean loss plus $\gamma$ times the ensemble's: 0 trains the members on their own, 1 jointly, below 0 it
    discourages diversity.

    Args:
        logits: (B, K, C), or as in `ensemble_cross_entropy`.
        gamma: the number that weights diversity.
        measure: "jensen"; "variance", $\frac1K\sum_k\|p_k - \bar p\|^2$; or "js", the Jensen-Shannon divergence
            $H(\bar p) - \frac1K\sum_k H(p_k)$, the last two over all rows, labelled or not.

    Shapes: (B, K, C), (B,) -> (loss, member_nll, ensemble_nll, diversity), scalars.

    Raises:
        ValueError, TypeError, IndexError: naming the argument that does not fit.

    Source: Abe, Buchanan, Pleiss, Cunningham, "Pathologies of Predictive Diversity in Deep Ensembles", 2024.
    One read of the logits and one of their gradient serve both losses.
    """
    gamma = _check.number("gamma", gamma)
    _check.choice("measure", measure, MEASURES)
    members = member_logits(logits, member_dim)
    x = members.first
    y = labels("target", target, members.shape, members.classes, x.device, ignore_index)
    _, each = member_logsumexp(members.tensors, y)
    kept = (y >= 0).sum()
    member_nll = -each.mean(1).sum(dtype=torch.float64) / kept
    ensemble_nll = -torch.where(y >= 0, log_mean_exp(each), 0.0).sum(dtype=torch.float64) / kept
    if measure == "jensen":
        diversity = member_nll - ensemble_nll
    elif measure == "variance":
        whole = ensemble_statistics(_as_given(members), outputs=("variance",))
        diversity = whole["variance"].sum(1, dtype=torch.float64).mean()
    else:
        whole = ensemble_statistics(_as_given(members), outputs=("mutual_information",))
        diversity = whole["mutual_information"].mean(dtype=torch.float64)
    loss = member_nll - gamma * diversity
    return DiversityLoss(*(t.to(x.dtype) for t in (loss, member_nll, ensemble_nll, diversity)))


def _as_given(members: Members) -> Tensor | tuple[Tensor, ...]:
    """Checked members as an argument again: (N, K, C) or the list of (N, C)."""
    return members.first if members.first.dim() == 3 else members.tensors


class MultiExpertLoss(NamedTuple):
    """What `multi_expert_loss` returns. Shapes: all scalars; loss is diversity + kd_weight * consistency."""

    loss: Tensor
    diversity: Tensor
    consistency: Tensor


def multi_expert_loss(
    logits: Tensor | Sequence[Tensor],
    target: Tensor,
    log_prior: Tensor,
    *,
    lambdas: Sequence[float] = (-0.5, 1.0, 2.5),
    kd_weight: float = 0.6,
    temperature: float = 1.0,
    member_dim: int = 1,
) -> MultiExpertLoss:
    r"""The loss of MDCS: experts made diverse by their class priors, each distilled from one view into the other.

    The rows are two views of N samples, view 1 first. With $v_k = z_k + \lambda_k\log\pi$,

    - diversity: $\sum_k$ of the mean cross-entropy of $v_k$ over all 2N rows;
    - consistency: $\sum_k$ of the mean of $\mathrm{KL}(p_k^1\,\|\,p_k^2)$, $p_k^i = \mathrm{softmax}(v_k/\tau)$ in
      view i, over the samples whose view 1 expert k has right (0 where there is none); view 1 is a constant.

    Args:
        logits: (2N, K, C), or as in `ensemble_cross_entropy`.
        target: (2N,) int64. log_prior: (C,), the log of the class counts (of their frequencies: the same).
        lambdas: one number a member, the strength of the prior in its logits.
        kd_weight: the paper's is 0.6 min(epoch / 20, 1).

    The prediction of the experts is the mean of their logits, without the prior.

    Shapes: (2N, K, C), (2N,), (C,) -> (loss, diversity, consistency), scalars.

    Raises:
        ValueError, TypeError, IndexError: naming the argument that does not fit.

    Source: Zhao et al., "MDCS: More Diverse Experts with Consistency Self-distillation for Long-tailed
    Recognition", 2023.
    Its code adds 1e-9 inside the logarithms; this does not. The adjusted logits are made once; the rest is
    `member_logits`, `member_statistics` and `distillation`.
    """
    members = member_logits(logits, member_dim)
    x = members.first
    rows = x.shape[0]
    if len(members.shape) != 1 or rows % 2:
        raise ValueError(
            f"logits: expected an even number of rows, view 1 and then view 2, got rows of shape {members.shape}"
        )
    y = labels("target", target, members.shape, members.classes, x.device)
    _check.like("log_prior", log_prior, (members.classes,), x, "logits")
    strengths = [_check.number("lambdas", value) for value in lambdas]
    if len(strengths) != members.count:
        raise ValueError(
            f"lambdas: expected {members.count} numbers, one a member, got {len(strengths)}"
        )
    kd_weight = _check.number("kd_weight", kd_weight)
    tau = _check.number("temperature", temperature, low=0.0)
    if tau == 0.0:
        raise ValueError("temperature: expected a positive number, got 0")
    acc = accumulate_type(x)
    strength = torch.tensor(strengths, dtype=acc, device=x.device)
    v = stacked(members.tensors).to(acc) + strength[:, None] * log_prior.to(acc)
    _, each = member_logsumexp((v,), y)
    diversity = -each.sum() / (y >= 0).sum()
    teacher, student = (
        view.reshape(-1, members.classes) for view in (v[: rows // 2].detach(), v[rows // 2 :])
    )
    scaled = teacher if tau == 1.0 else teacher / tau
    told = member_statistics((scaled.unsqueeze(1),), ENTROPIES | TOPS)
    entropy, top = told[3], told[7].reshape(-1, members.count)
    gap = (
        ensemble_distillation_loss(student, [teacher], temperature=tau, reduction="none") - entropy
    )
    right = (top == y[: rows // 2, None]).to(acc)
    gap = gap.reshape(right.shape) * right
    consistency = (gap.sum(0) / right.sum(0).clamp(min=1)).sum()
    loss = diversity + kd_weight * consistency
    return MultiExpertLoss(*(t.to(x.dtype) for t in (loss, diversity, consistency)))


def log_mean_softmax(
    logits: Tensor | Sequence[Tensor], weights: Tensor | None = None, *, member_dim: int = 1
) -> Tensor:
    r"""Log of the members' mean probability, $\log\sum_k w_k\,\mathrm{softmax}(z_k)$ in the log domain.

    Args:
        logits: (B, K, C), or as in `ensemble_cross_entropy`.
        weights: (K,) or (B, K), not negative, counted relative to their sum; None for 1/K each.

    Shapes: (B, K, C) -> (B, C), in the logits' dtype.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Derakhshani et al., "Bayesian Prompt Learning for Image-Language Model Generalization", 2023. Core
    `logit_mixture`.
    """
    members = member_logits(logits, member_dim)
    w = member_weights(weights, members)
    x = members.first
    if w is None:
        share = torch.full((), 1 / members.count, dtype=accumulate_type(x), device=x.device)
        w = share.expand(x.shape[0], members.count)
    out = combine(members.tensors, w, PROBABILITY)
    return out.reshape(*members.shape, members.classes)


def ensemble_mean_prob(
    logits: Tensor | Sequence[Tensor], weights: Tensor | None = None, *, member_dim: int = 1
) -> Tensor:
    r"""$\sum_k w_k\,\mathrm{softmax}(z_k)$: the ensemble's prediction.

    Args:
        logits: (B, K, C), or as in `ensemble_cross_entropy`.
        weights: (K,) or (B, K), not negative, counted relative to their sum; None for 1/K each.

    Shapes: (B, K, C) -> (B, C), in the logits' dtype.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Szegedy et al., "Inception-v4, Inception-ResNet and the Impact of Residual Connections on Learning", 2016.
    """
    if weights is None:
        return ensemble_statistics(logits, outputs=("mean",), member_dim=member_dim)["mean"]
    members = member_logits(logits, member_dim)
    if members.first.dtype.itemsize > 2:
        return log_mean_softmax(logits, weights, member_dim=member_dim).exp()
    # Through float32: a logarithm rounded to half precision has lost digits of the probability.
    wide = logits.float() if isinstance(logits, Tensor) else [t.float() for t in logits]
    p = log_mean_softmax(wide, weights, member_dim=member_dim).exp()
    return p.to(members.first.dtype)


def prompt_ensemble_logits(images: Tensor, prompts: Tensor, scale: float | Tensor = 1.0) -> Tensor:
    r"""Logits of L sets of class vectors: $s\,\langle i_b, t_{lc}\rangle$, with no copy of the images for each set.

    One product of (B, D) with (D, L C), whose result is the (B, L, C) that `ensemble_cross_entropy` and
    `log_mean_softmax` read; the scale goes into the images.

    Args:
        images: (B, D). prompts: (L, C, D), of the images' dtype.
        scale: a number or a scalar tensor.

    Shapes: (B, D), (L, C, D) -> (B, L, C).

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Derakhshani et al., "Bayesian Prompt Learning for Image-Language Model Generalization", 2023.
    """
    _check.tensor("images", images, dim=2)
    _check.tensor("prompts", prompts, dim=3)
    sets, classes, width = prompts.shape
    _check.like("prompts", prompts, (sets, classes, images.shape[1]), images, "images")
    _check.product_dtype("prompts", prompts, images, "images")
    if isinstance(scale, Tensor):
        _check.like("scale", scale, (), images, "images")
    else:
        scale = _check.number("scale", scale)
    flat = prompts.reshape(sets * classes, width)
    return F.linear((images * scale).to(images.dtype), flat).reshape(images.shape[0], sets, classes)


def el2n(logits: Tensor | Sequence[Tensor], target: Tensor, *, member_dim: int = 1) -> Tensor:
    r"""EL2N, how hard an example is: $\frac1K\sum_k \|\mathrm{softmax}(z_k) - e_y\|_2$ over K training runs.

    Args:
        logits: (B, K, C), or as in `ensemble_cross_entropy`.
        target: (B,) int64.

    Shapes: (B, K, C), (B,) -> (B,), in the logits' dtype.

    Raises:
        ValueError, TypeError, IndexError: naming the argument that does not fit.

    Source: Paul, Ganguli, Dziugaite, "Deep Learning on a Data Diet: Finding Important Examples Early in
    Training", 2021.
    """
    members = member_logits(logits, member_dim)
    x = members.first
    y = labels("target", target, members.shape, members.classes, x.device)
    z = stacked(members.tensors)
    hot = torch.arange(members.classes, device=y.device) == y[:, None]
    gap = z.to(accumulate_type(z)).softmax(-1) - hot.unsqueeze(1).to(accumulate_type(z))
    return gap.norm(dim=-1).mean(1).reshape(members.shape).to(x.dtype)
