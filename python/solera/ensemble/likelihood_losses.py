"""Losses over sequence likelihoods, past predictions and score matrices, and steps of ensemble attacks."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _check
from .._registry import accumulate_type
from ..norm._labels import labels, reduced
from .distillation import ensemble_distillation_loss
from .logit_mixture import mixture_scores


def self_distillation_loss(
    logits: Tensor,
    target: Tensor,
    past_logits: Tensor,
    *,
    alpha: float,
    reduction: str = "mean",
    ignore_index: int = -100,
) -> Tensor:
    r"""Cross-entropy with the soft target $(1 - \alpha)\,\mathrm{onehot}(y) + \alpha\,\mathrm{softmax}(\text{past})$.

    The model's own predictions of an earlier epoch refine its targets; the paper lets alpha grow with the epoch,
    $\alpha_t = \alpha_T\,t/T$. Composition of `ensemble_distillation_loss` and the label's score: the soft target
    is never stored. Past predictions kept as log-probabilities serve as logits.

    Args:
        logits, past_logits: (..., C); the past is a constant.
        target: (...) int64. Rows with `ignore_index` count nothing.

    Shapes: (..., C), (...), (..., C) -> scalar, or (...) with reduction "none".

    Source: Kim et al., "Self-Knowledge Distillation with Progressive Refinement of Targets", 2021 (the linear
    schedule from knowledge).
    """
    x = _check.tensor("logits", logits, min_dim=1)
    alpha = _check.number("alpha", alpha, low=0.0, high=1.0)
    y = labels("target", target, x.shape[:-1], x.shape[-1], x.device, ignore_index)
    flat = x.reshape(y.shape[0], x.shape[-1])
    hard = -mixture_scores((flat,), y)[0]
    _check.tensor("past_logits", past_logits)
    _check.like("past_logits", past_logits, tuple(x.shape), x, "logits")
    _check.same_dtype("past_logits", past_logits, x, "logits")
    past = past_logits.detach().reshape(flat.shape)
    soft = ensemble_distillation_loss(flat, [past], reduction="none")
    each = (1 - alpha) * hard + alpha * soft.to(hard.dtype)
    return reduced(each, y, reduction, x, x.shape[:-1])


def pass_at_n_loss(log_prob: Tensor, n: int) -> Tensor:
    r"""$-\log(1 - (1 - p)^N)$ of sequence probabilities $p = e^{\text{log\_prob}}$.

    The gradient is that of $-\log p$ times $N(1-p)^{N-1}p / (1 - (1-p)^N)$, which is near 1 for p far below 1/N and
    vanishes as p nears 1: confidence beyond what N samples need is not rewarded. Where p is too small for the
    arithmetic, the limit $-\log p - \log N$. Composition.

    Args:
        log_prob: any shape, at most 0. n: N, the number of samples.

    Shapes: (...) -> (...), the dtype of log_prob.

    Source: "Rethinking Fine-Tuning when Scaling Test-Time Compute: Limiting Confidence Improves Mathematical
    Reasoning", 2025 (the loss from the abstract, its exact form from knowledge; pass@N of independent samples).
    """
    x = _check.tensor("log_prob", log_prob)
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ValueError(f"n: expected a positive int, got {n!r}")
    v = x.to(accumulate_type(x))
    if n == 1:
        return (-v).to(x.dtype)
    small = v < math.log(torch.finfo(v.dtype).eps / n)
    held = torch.where(small, -1.0, v)
    # p = 1 gives log 0 and a gradient of 0 in the end; its neighbour below stands in for it.
    held = held.clamp(max=-torch.finfo(v.dtype).tiny)
    none = n * (-torch.expm1(held)).log()  # log of the probability that all fail
    loss = torch.where(none > -math.log(2.0), (-torch.expm1(none)).log(), torch.log1p(-none.exp()))
    return torch.where(small, -v - math.log(n), -loss).to(x.dtype)


def cca_loss(
    log_prob: Tensor,
    reference_log_prob: Tensor,
    negative_log_prob: Tensor,
    negative_reference_log_prob: Tensor,
    *,
    beta: float = 0.02,
    weight: float = 1.0,
) -> Tensor:
    r"""The contrast of each sequence with its condition and with a wrong one.

    $-\log\sigma(\beta(\log p_\theta - \log p_\phi)) - \lambda\log\sigma(-\beta(\log p_\theta^- - \log p_\phi^-))$.

    Condition contrastive alignment: the likelihood of a sequence under its condition rises and under a wrong one
    falls, relative to a frozen model, until sampling needs no guidance. Composition.

    Args:
        log_prob, reference_log_prob: (B,), of the sequences under their own conditions.
        negative_log_prob, negative_reference_log_prob: (B,), under shuffled ones.
        beta: the scale. weight: lambda.

    Shapes: four times (B,) -> (B,).

    Source: Chen et al., "Toward Guidance-Free AR Visual Generation via Condition Contrastive Alignment", 2024
    (the loss from knowledge of the paper).
    """
    first = _check.tensor("log_prob", log_prob)
    for name, t in (
        ("reference_log_prob", reference_log_prob),
        ("negative_log_prob", negative_log_prob),
        ("negative_reference_log_prob", negative_reference_log_prob),
    ):
        _check.like(name, t, tuple(first.shape), first, "log_prob")
    beta, weight = _check.number("beta", beta), _check.number("weight", weight)
    positive = F.logsigmoid(beta * (log_prob - reference_log_prob))
    negative = F.logsigmoid(-beta * (negative_log_prob - negative_reference_log_prob))
    return -positive - weight * negative


def boost_margin_loss(
    scores: Tensor,
    anchor_scores: Tensor,
    *,
    relative: float = 0.2,
    positive: float | None = None,
    negative: float | None = None,
) -> Tensor:
    r"""A target branch that must beat an anchor branch on the hardest negatives of a score matrix.

    Relative: $\max_j [m + (A_{ii} - A_{ij}) - (S_{ii} - S_{ij})]_+$: the target's gap between positive and negative
    exceeds the anchor's by m. Absolute, where given: $[m_p + A_{ii} - S_{ii}]_+$ and
    $\max_j [m_n + S_{ij} - A_{ij}]_+$.
    Over rows and over columns, averaged over the batch and added. The anchor is a constant. Composition.

    Args:
        scores, anchor_scores: (B, B), pairs on the diagonal.
        relative, positive, negative: the margins; None leaves an absolute term out.

    Shapes: (B, B), (B, B) -> scalar.

    Source: Diao et al., "Deep Boosting Learning: A Brand-new Cooperative Approach for Image-Text Matching", 2024
    (the hinges; averaging over the batch is this library's choice).
    """
    s = _check.tensor("scores", scores, dim=2)
    if s.shape[0] != s.shape[1] or s.shape[0] < 2:
        raise ValueError(f"scores: expected (B, B) with B of at least 2, got {tuple(s.shape)}")
    _check.like("anchor_scores", anchor_scores, tuple(s.shape), s, "scores")
    a = anchor_scores.detach()
    own = torch.eye(s.shape[0], dtype=torch.bool, device=s.device)
    ds, da = s.diagonal(), a.diagonal()
    total = s.new_zeros(())
    for x, y in ((s, a), (s.t(), a.t())):
        hinge = relative + (da[:, None] - y) - (ds[:, None] - x)
        total = total + hinge.masked_fill(own, float("-inf")).amax(1).clamp(min=0.0).mean()
        if negative is not None:
            hinge = (negative + x - y).masked_fill(own, float("-inf"))
            total = total + hinge.amax(1).clamp(min=0.0).mean()
    if positive is not None:
        total = total + (positive + da - ds).clamp(min=0.0).mean()
    return total


@torch.no_grad()
def l2_momentum_step_(
    x: Tensor,
    grad: Tensor,
    momentum: Tensor,
    origin: Tensor,
    *,
    decay: float = 1.0,
    step_size: float,
    radius: float,
    low: float = 0.0,
    high: float = 1.0,
) -> Tensor:
    r"""One inner step of a sequential ensemble attack, in place.

    $m \leftarrow \mu m + g/\|g\|_2$, $x \leftarrow x + \beta m$.

    The norm is each sample's; x is clamped to [low, high] and to the ball of `radius` around `origin` in the
    maximum norm. A gradient of 0 adds nothing. Composition.

    Shapes: x, grad, momentum, origin (B, ...) -> x.

    Source: Chen et al., "Rethinking Model Ensemble in Transfer-based Adversarial Attacks", 2023.
    """
    x = _check.tensor("x", x, min_dim=1)
    for name, t in (("grad", grad), ("momentum", momentum), ("origin", origin)):
        _check.like(name, t, tuple(x.shape), x)
    decay, step_size = _check.number("decay", decay), _check.number("step_size", step_size)
    radius = _check.number("radius", radius, low=0.0)
    flat = grad.flatten(1)
    norm = torch.linalg.vector_norm(flat, dim=1).reshape(-1, *[1] * (x.dim() - 1))
    momentum.mul_(decay).add_(torch.where(norm > 0, grad / torch.where(norm > 0, norm, 1.0), 0.0))
    x.add_(momentum, alpha=step_size)
    return x.clamp_(origin - radius, origin + radius).clamp_(low, high)
