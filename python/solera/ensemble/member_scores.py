"""Ensembles of numbers: forecasts verified against what came, scores and votes of several judges put together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _check
from .._registry import accumulate_type

NORMS = ("minmax", "zscore", "none")


def _members_first(x: Tensor, member_dim: int) -> Tensor:
    """x with its members along dimension 0, in the accumulator's dtype."""
    _check.tensor("x", x, min_dim=1)
    if not isinstance(member_dim, int) or not -x.dim() <= member_dim < x.dim():
        raise ValueError(
            f"member_dim: expected a dimension of x, got {member_dim!r} for shape {tuple(x.shape)}"
        )
    x = x.movedim(member_dim, 0)
    if x.shape[0] == 0:
        raise ValueError(f"x: expected at least one member, got shape {tuple(x.shape)}")
    return x.to(accumulate_type(x))


def crps_ensemble(
    x: Tensor,
    y: Tensor,
    *,
    fair: bool = False,
    weights: Tensor | None = None,
    member_dim: int = 0,
) -> Tensor:
    r"""Continuous ranked probability score of an ensemble forecast, in O(M log M) a point.

    $\sum_i w_i|x_i - y| - \tfrac12\sum_{ij} w_i w_j|x_i - x_j|$, with $w_i = 1/M$ unless given. The second term is
    $\sum_i w_{(i)}\,(W_{(i)} + W_{(i-1)} - 1)\,x_{(i)}$ over the sorted members with W the running sum of their weights
    ($\tfrac1{M^2}\sum_i (2i - M - 1)\,x_{(i)}$ for equal ones), and is taken of x - y, so a common offset does
    not cancel. A composition around `torch.sort`; differentiable.

    Args:
        x: (M, ...). y: (...), what was observed.
        fair: divide the second term by $1 - \sum w_i^2$ (pairs of different members only), which makes the score
            unbiased for ensembles of any size; needs two members.
        weights: (M,), not negative; normalised here.

    Shapes: (M, ...), (...) -> (...), in x's dtype.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Gneiting, Raftery, "Strictly Proper Scoring Rules, Prediction, and Estimation", 2007; Ferro, "Fair
    scores for ensemble forecasts", 2014; the metric of Li et al., "SEEDS", 2023. The sorted form is
    derived from the sum.
    """
    members = _members_first(x, member_dim)
    _check.like("y", y, tuple(members.shape[1:]), x)
    count = members.shape[0]
    if fair and count < 2:
        raise ValueError(f"fair: expected at least two members, got x of shape {tuple(x.shape)}")
    if weights is None:
        w = torch.full((count,), 1 / count, dtype=members.dtype, device=x.device)
    else:
        _check.like("weights", weights, (count,), x)
        w = weights.to(members.dtype)
        w = w / w.sum()
    gap, order = (members - y.to(members.dtype)).sort(0)
    w = w[order]
    running = w.cumsum(0)
    spread = (w * (2 * running - w - 1) * gap).sum(0)
    if fair:
        spread = spread / (1 - w.square().sum(0))
    return ((w * gap.abs()).sum(0) - spread).to(x.dtype)


class EnsembleMoments(NamedTuple):
    """What `ensemble_moments` returns. Shapes: those of y, each."""

    mean: Tensor
    variance: Tensor
    rank: Tensor | None  # int64, how many members lie below y: the rank histogram's bin


def ensemble_moments(
    x: Tensor, y: Tensor | None = None, *, correction: int = 1, member_dim: int = 0
) -> EnsembleMoments:
    r"""Mean and variance over the members, and the rank of an observation among them.

    Args:
        x: (M, ...). y: (...), optional.
        correction: the variance is divided by M - correction; the spread is its root.

    Shapes: (M, ...) -> (...) each.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: the ensemble verification of Li et al., "SEEDS: Emulation of Weather Forecast Ensembles with Diffusion
    Models", 2023 (ensemble-mean error, spread, rank histogram).
    """
    members = _members_first(x, member_dim)
    if not isinstance(correction, int) or not 0 <= correction < members.shape[0]:
        raise ValueError(
            f"correction: expected an int in [0, {members.shape[0]}), got {correction!r}"
        )
    variance, mean = torch.var_mean(members, 0, correction=correction)
    rank = None
    if y is not None:
        _check.like("y", y, tuple(members.shape[1:]), x)
        rank = (members < y.to(members.dtype)).sum(0)
    return EnsembleMoments(mean.to(x.dtype), variance.to(x.dtype), rank)


def _standard(x: Tensor, norm: str, dims: tuple[int, ...], mask: Tensor | None) -> Tensor:
    """x brought to [0, 1] or to mean 0 and deviation 1 over `dims`; a constant becomes 0, a NaN stays one."""
    if norm == "none":
        return x
    kept = torch.ones_like(x, dtype=torch.bool) if mask is None else mask.expand_as(x)
    low = torch.where(kept, x, float("inf")).amin(dims, keepdim=True)
    high = torch.where(kept, x, float("-inf")).amax(dims, keepdim=True)
    flat = high <= low  # and not a deviation of 0, which the rounding of a mean may miss
    if norm == "minmax":
        spread = torch.where(flat, 1.0, high - low)
    else:
        count = kept.sum(dims, keepdim=True).clamp(min=1)
        low = torch.where(kept, x, 0.0).sum(dims, keepdim=True) / count
        squares = torch.where(kept, (x - low).square(), 0.0).sum(dims, keepdim=True)
        spread = torch.where(flat, 1.0, squares / count).sqrt()  # a root of 0 has no derivative
    return torch.where(flat | ~kept, 0.0, (x - low) / spread)


def _mask(mask: Tensor | None, x: Tensor, name: str, shape: tuple[int, ...]) -> Tensor | None:
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(
            f"mask: expected a bool tensor, got {getattr(mask, 'dtype', type(mask).__name__)}"
        )
    if mask.shape != shape or mask.device != x.device:
        raise ValueError(
            f"mask: expected shape {shape} on {x.device} to go with {name} of shape {tuple(x.shape)}, "
            f"got {tuple(mask.shape)} on {mask.device}"
        )
    return mask


def score_ensemble(
    scores: Tensor,
    weights: Tensor | Sequence[float] | None = None,
    *,
    norm: str = "minmax",
    scale: float = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    r"""Scores of M judges for n candidates, each judge's brought to one range, then summed: $s\sum_m w_m \hat t_m$.

    Args:
        scores: (M, B, n). weights: M numbers; None for 1/M each.
        norm: per judge and query, over the n candidates: "minmax", $(t - \min)/(\max - \min)$; "zscore" (biased
            deviation); "none". A judge whose scores are all equal counts 0.
        scale: the number s; `torch.softmax` of the result is a teacher's distribution over the candidates.
        mask: (B, n) bool, False for candidates that are not there; they get -inf.

    Shapes: (M, B, n) -> (B, n), in the scores' dtype.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Geng et al., "Towards Competitive Search Relevance For Inference-Free Learned Sparse Retrievers", 2024
    (min-max and scale from knowledge); Bouchard, Chauhan, "Uncertainty Quantification for Language Models", 2025
    (norm "none", weights 0.56, 0.14, 0.3 or tuned).
    """
    _check.tensor("scores", scores, dim=3)
    _check.choice("norm", norm, NORMS)
    scale = _check.number("scale", scale)
    count = scores.shape[0]
    acc = accumulate_type(scores)
    t = scores.to(acc)
    if weights is None:
        if count == 0:
            raise ValueError(
                f"scores: expected at least one judge, got shape {tuple(scores.shape)}"
            )
        w = torch.full((count,), 1 / count, dtype=acc, device=scores.device)
    else:
        if not isinstance(weights, Tensor):
            if not isinstance(weights, (list, tuple)):
                raise TypeError(
                    f"weights: expected a list of numbers, got {type(weights).__name__}"
                )
            numbers = [_check.number("weights", w) for w in weights]
            weights = torch.tensor(numbers, dtype=acc, device=scores.device)
        _check.like("weights", weights, (count,), scores, "scores")
        w = weights.to(acc)
    mask = _mask(mask, scores, "scores", tuple(scores.shape[1:]))
    total = scale * (w[:, None, None] * _standard(t, norm, (2,), mask)).sum(0)
    if mask is not None:
        total = torch.where(mask, total, float("-inf"))
    return total.to(scores.dtype)


class Vote(NamedTuple):
    """What `weighted_vote` returns. Shapes: (Q, n) and (Q,)."""

    logit: Tensor  # (Q, n)
    best: Tensor  # (Q,) int64


def weighted_vote(
    scores: Tensor,
    weights: Tensor,
    bias: float | Tensor = 0.0,
    *,
    threshold: float | Tensor = 0.5,
    norm: str = "minmax",
    mask: Tensor | None = None,
) -> Vote:
    r"""Weak verifiers' votes on each response as a log-odds, and the response with the largest.

    Each verifier's scores are normalised over the whole data set and turned into votes
    $v_m = [\hat S_m \ge \theta_m]$;
    then $\mathrm{logit} = b + \sum_m w_{m,v_m}$. With $w_{m1} = \log\frac{P(v_m=1|1)}{P(v_m=1|0)}$ and
    $w_{m0} = \log\frac{P(v_m=0|1)}{P(v_m=0|0)}$ and b the log-odds of a right response, this is the naive
    Bayes posterior.

    Args:
        scores: (Q, n, M), queries, responses and verifiers.
        weights: (M, 2), what a vote of 0 and a vote of 1 add.
        bias: a number or a scalar tensor. threshold: a number or (M,).
        norm: "minmax", "zscore" or "none", per verifier.
        mask: (Q, n, M) bool, False where a verifier has no score; it then adds nothing.

    Shapes: (Q, n, M), (M, 2) -> (Q, n) and (Q,). Differentiable in weights and bias.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Saad-Falcon et al., "Shrinking the Generation-Verification Gap with Weak Verifiers", 2025; the
    naive Bayes form is derived from independent verifiers. Estimating the accuracies stays with the caller.
    """
    _check.tensor("scores", scores, dim=3)
    verifiers = scores.shape[2]
    _check.like("weights", weights, (verifiers, 2), scores, "scores")
    _check.choice("norm", norm, NORMS)
    if scores.shape[1] == 0:
        raise ValueError(f"scores: expected at least one response, got {tuple(scores.shape)}")
    acc = accumulate_type(scores)
    if isinstance(threshold, Tensor):
        _check.like("threshold", threshold, (verifiers,), scores, "scores")
        threshold = threshold.to(acc)
    else:
        threshold = _check.number("threshold", threshold)
    if isinstance(bias, Tensor):
        _check.like("bias", bias, (), scores, "scores")
    else:
        bias = _check.number("bias", bias)
    mask = _mask(mask, scores, "scores", tuple(scores.shape))
    if scores.numel() == 0:
        votes = torch.zeros_like(scores, dtype=torch.bool)
    else:
        votes = _standard(scores.to(acc), norm, (0, 1), mask) >= threshold
    added = torch.where(votes, weights[:, 1], weights[:, 0]).to(acc)
    if mask is not None:
        added = torch.where(mask, added, 0.0)
    logit = (added.sum(2) + bias).to(scores.dtype)
    return Vote(logit, logit.argmax(1))


class TokenConfidence(NamedTuple):
    """What `token_confidence` returns. Shapes: (B,) each."""

    normalized: Tensor  # exp of the mean log-probability
    least: Tensor  # the smallest probability
    perplexity: Tensor  # 1 / normalized


def token_confidence(log_probs: Tensor, mask: Tensor | None = None) -> TokenConfidence:
    r"""How sure a language model was of what it wrote: $e^{\mathrm{mean}\log p}$, $\min p$ and the perplexity.

    Args:
        log_probs: (B, T), of the tokens written (`-ensemble_cross_entropy([logits], tokens, reduction="none")`).
        mask: (B, T) bool, False for padding; a row without tokens gives 1.

    Shapes: (B, T) -> (B,) each.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: the white-box scorers of Bouchard, Chauhan, "Uncertainty Quantification for Language Models: A Suite of
    Black-Box, White-Box, LLM Judge, and Ensemble Scorers", 2025.
    """
    _check.tensor("log_probs", log_probs, dim=2)
    mask = _mask(mask, log_probs, "log_probs", tuple(log_probs.shape))
    if mask is None:
        mask = torch.ones_like(log_probs, dtype=torch.bool)
    logs = torch.where(mask, log_probs.to(accumulate_type(log_probs)), 0.0)
    mean = logs.sum(1) / mask.sum(1).clamp(min=1)
    ones = logs.new_zeros(logs.shape[0], 1)
    least = torch.cat([logs, ones], 1).amin(1)
    out = (mean.exp(), least.exp(), (-mean).exp())
    return TokenConfidence(*(t.to(log_probs.dtype) for t in out))
