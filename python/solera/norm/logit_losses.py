"""Losses over logits (B, C): each a few lines over the row statistics of core `logit_norm`.

All of them read the logits once forward and once backward, keep nothing of their size, and take labels as
`torch.nn.functional.cross_entropy` does (`ignore_index` included).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _check
from .._registry import accumulate_type
from ._labels import labels, logit_rows, per_row, reduced
from .logit_norm import (
    MOMENTS,
    NORMALIZED,
    SOFTMAX,
    STABLEMAX,
    logit_statistics,
    stablemax_scores,
)


def _above(name: str, value: float, low: float) -> float:
    number = _check.number(name, value)
    if number <= low:
        raise ValueError(f"{name}: expected a number above {low:g}, got {value!r}")
    return number


def z_loss(
    logits: Tensor,
    target: Tensor,
    *,
    a: float,
    b: float,
    eps: float = 1e-12,
    reduction: str = "mean",
    ignore_index: int = -100,
) -> Tensor:
    r"""The Z-loss: softplus of the label's standardised logit, blind to shift and scale of the logits.

    $L = \tfrac1a\,\mathrm{softplus}(a\,(b - z_y))$, $z_y = (o_y - \mu)/\sqrt{\sigma^2 + \varepsilon}$ with the mean and
    biased variance of the row. (Not the z-loss of mixture-of-experts models, logsumexp squared.)

    Args:
        logits: (..., C), computed in float32 (float64 for float64).
        target: (...) int64.
        a, b: slope and position of the softplus, as the paper's hyperparameters; a is positive.
        eps: keeps rows of equal logits finite; the paper has none.

    Shapes: (..., C), (...) -> scalar, or (...) with reduction "none".

    Raises:
        ValueError, TypeError, IndexError: naming the argument that does not fit.

    Source: de Brebisson, Vincent, "The Z-loss: a shift and scale invariant classification loss belonging to the
    Spherical Family", 2016. The factor 1/a makes the slope at infinity 1 for every a; derived here.
    """
    x, y = logit_rows(logits, target, ignore_index)
    a, b = _above("a", a, 0.0), _check.number("b", b)
    mean, var, picked, _ = logit_statistics(x, y, MOMENTS)
    z = (picked - mean) * torch.rsqrt(var + _check.number("eps", eps, low=0.0))
    return reduced(-F.logsigmoid(a * (z - b)) / a, y, reduction, x, logits.shape[:-1])


def spherical_z_loss(
    h: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    a: float,
    b: float,
    gram: Tensor | None = None,
    eps: float = 1e-12,
    reduction: str = "mean",
    ignore_index: int = -100,
) -> Tensor:
    r"""The Z-loss of `h @ weight.T` without the (B, C) logits: O(d^2) a row.

    $\sum_k o_k = \bar w^\top h$ and $\sum_k o_k^2 = h^\top Q h$ with $Q = W^\top W$ (d, d), $\bar w = W^\top 1$, and
    $o_y = w_y \cdot h$. A composition of products; its gradient to the weight passes through Q and costs
    another C d^2 (dW = 2 W dQ plus rank-one and gathered rows), once a step however large B is. Where the
    head is fixed pass `gram` and only O(B d^2) is left.

    The variance is a difference of two sums: with logits whose mean is far beyond their spread it loses
    digits that `z_loss` keeps.

    Args:
        h: (B, d). weight: (C, d). target: (B,) int64.
        gram: (d, d), weight.T @ weight, if at hand; a constant then.

    Shapes: (B, d), (C, d), (B,) -> scalar, or (B,) with reduction "none".

    Source: de Brebisson, Vincent, 2016; Vincent, de Brebisson, Bouthillier, "Efficient Exact Gradient Update for
    training Deep Networks with Very Large Sparse Targets", 2015 (the spherical family).
    """
    _check.tensor("h", h, dim=2)
    _check.tensor("weight", weight, dim=2)
    _check.like("weight", weight, (weight.shape[0], h.shape[1]), h, "h")
    y = labels("target", target, h.shape[:1], weight.shape[0], h.device, ignore_index)
    a, b = _above("a", a, 0.0), _check.number("b", b)
    acc = accumulate_type(h)
    w, v = weight.to(acc), h.to(acc)
    if gram is None:
        gram = w.mT @ w
    else:
        _check.like("gram", gram, (h.shape[1], h.shape[1]), h, "h")
    mean = v @ w.mean(0)
    square = ((v @ gram.to(acc)) * v).sum(1) / weight.shape[0]
    picked = (v * w[y.clamp(min=0)]).sum(1)
    var = (square - mean.square()).clamp(min=0.0)
    z = (picked - mean) * torch.rsqrt(var + _check.number("eps", eps, low=0.0))
    return reduced(-F.logsigmoid(a * (z - b)) / a, y, reduction, h)


def stablemax(x: Tensor, dim: int = -1) -> Tensor:
    r"""StableMax: $s(x_i) / \sum_j s(x_j)$ with s(x) = x + 1 from 0 on and 1 / (1 - x) below. A composition.

    Shapes: x (...) -> (...), in x's dtype, computed in float32 (float64 for float64).

    Source: Prieto, Barsbey, Mediano, Birdal, "Grokking at the Edge of Numerical Stability", 2025.
    """
    _check.tensor("x", x, min_dim=1)
    s = stablemax_scores(x.to(accumulate_type(x)))
    return (s / s.sum(dim, keepdim=True)).to(x.dtype)


def log_stablemax(x: Tensor, dim: int = -1) -> Tensor:
    """The logarithm of `stablemax`, by log1p: no digits are lost near 0. A composition.

    Shapes: x (...) -> (...), in x's dtype.

    Source: Prieto et al., "Grokking at the Edge of Numerical Stability", 2025.
    """
    _check.tensor("x", x, min_dim=1)
    v = x.to(accumulate_type(x))
    return (_log_score(v) - stablemax_scores(v).sum(dim, keepdim=True).log()).to(x.dtype)


def _log_score(x: Tensor) -> Tensor:
    return torch.where(x >= 0, x.clamp(min=0).log1p(), -(-x.clamp(max=0)).log1p())


def stablemax_cross_entropy(
    logits: Tensor, target: Tensor, *, reduction: str = "mean", ignore_index: int = -100
) -> Tensor:
    r"""Cross-entropy of the StableMax probabilities, $-\log(s(x_y) / \sum_j s(x_j))$.

    Written as softplus(log S - log s(x_y)) with S the sum over the other classes, it keeps full relative
    precision where the label has nearly all the mass: in float32 the loss of a row stays within a few 1e-7
    of its float64 value down to 1e-30, so nothing has to be computed in float64, as the paper's code does.

    Args:
        logits: (..., C). target: (...) int64.

    Shapes: (..., C), (...) -> scalar, or (...) with reduction "none".

    Source: Prieto, Barsbey, Mediano, Birdal, "Grokking at the Edge of Numerical Stability", 2025.
    """
    x, y = logit_rows(logits, target, ignore_index)
    others, _, picked, _ = logit_statistics(x, y, STABLEMAX)
    log_others = others.clamp(min=torch.finfo(others.dtype).tiny).log()
    loss = -F.logsigmoid(_log_score(picked) - log_others)
    return reduced(loss, y, reduction, x, logits.shape[:-1])


def logit_norm_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    segments: Sequence[int] | None = None,
    eps: float = 1e-7,
    reduction: str = "mean",
    ignore_index: int = -100,
) -> Tensor:
    r"""Cross-entropy of $x / ((\bar n + \varepsilon)\,\tau)$, $\bar n$ the (segments' mean) norm.

    Args:
        logits: (..., C). target: (...) int64.
        temperature: tau, a positive number or a scalar tensor (which may take a gradient).
        segments: lengths that add up to C, SLCA's classes of each task; None is one segment, LogitNorm.

    Shapes: (..., C), (...) -> scalar, or (...) with reduction "none".

    Source: Wei et al., "Mitigating Neural Network Overconfidence with Logit Normalization", 2022; Zhang et al.,
    "SLCA: Slow Learner with Classifier Alignment for Continual Learning on a Pre-trained Model", 2023.
    """
    x, y = logit_rows(logits, target, ignore_index)
    lengths = [x.shape[1]] if segments is None else [int(n) for n in segments]
    if not lengths or min(lengths) < 1 or sum(lengths) != x.shape[1]:
        raise ValueError(
            f"segments: expected positive lengths that add up to {x.shape[1]} classes, got {segments}"
        )
    ends = torch.tensor([0, *lengths], device=x.device).cumsum(0)
    scale = 1 / per_row("temperature", temperature, x, x.shape[0], low=0.0)
    eps = _check.number("eps", eps, low=0.0)
    others, _, picked, norms = logit_statistics(x, y, NORMALIZED, scale=scale, bounds=ends, eps=eps)
    loss = -F.logsigmoid(picked * scale / (norms.mean(1) + eps) - others)
    return reduced(loss, y, reduction, x, logits.shape[:-1])


def ldr_kl_loss(
    logits: Tensor,
    target: Tensor,
    *,
    lam: float | Tensor,
    margin: float = 0.0,
    reduction: str = "mean",
    ignore_index: int = -100,
) -> Tensor:
    r"""Label-distributionally robust loss, $c_k$ the margin for $k\ne y$ and 0 at y.

    $\lambda \log \tfrac1C \sum_k e^{(f_k - f_y + c_k)/\lambda}$.

    With margin 0 it is cross-entropy at temperature lambda, times lambda, less lambda log C.

    Args:
        logits: (..., C). target: (...) int64.
        lam: positive; a number, a scalar tensor or one value a row (B,). May take a gradient.

    Shapes: (..., C), (...) -> scalar, or (...) with reduction "none".

    Source: Zhu, Ying, Yang, "Label Distributionally Robust Losses for Multi-class Classification", 2023.
    """
    x, y = logit_rows(logits, target, ignore_index)
    lam = per_row("lam", lam, x, x.shape[0], low=0.0)
    exponent, _, _ = _robust(x, y, lam, _check.number("margin", margin))
    width = torch.tensor(float(x.shape[1]), dtype=lam.dtype, device=x.device)
    return reduced(lam * (exponent - width.log()), y, reduction, x, logits.shape[:-1])


def _robust(x: Tensor, y: Tensor, lam: Tensor, margin: float) -> tuple[Tensor, Tensor, Tensor]:
    """log sum_k exp((f_k - f_y + c_k) / lam), the entropy of that softmax, and its label's logit gap."""
    scale = 1 / lam
    others, mean, picked, _ = logit_statistics(x, y, SOFTMAX, scale=scale)
    gap = picked * scale - others - margin * scale
    # With p the label's mass: entropy = H(p, 1 - p) + (1 - p) (entropy among the others).
    among = torch.where(others.isfinite(), others - scale * mean, 0.0).detach()
    inverse = torch.sigmoid(-gap.detach())
    log_p, log_q = F.logsigmoid(gap.detach()), F.logsigmoid(-gap.detach())
    entropy = -(1 - inverse) * log_p - torch.where(inverse > 0, inverse * log_q, 0.0)
    return -F.logsigmoid(gap), entropy + inverse * among, gap


def aldr_kl_loss(
    logits: Tensor,
    target: Tensor,
    lam: Tensor,
    *,
    lam0: float,
    alpha: float,
    margin: float = 0.0,
    reduction: str = "mean",
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor]:
    r"""The adaptive form of `ldr_kl_loss`: one step of each row's own lambda, then the loss at it.

    $q = \mathrm{softmax}((f - f_y + c)/\lambda_{prev})$,
    $\lambda = \lambda_0 (1 - \mathrm{KL}(q \| u)/(\alpha \log C))$,
    $L = \lambda \log\sum_k e^{(f_k - f_y + c_k)/\lambda} - \tfrac{\alpha \log C}{2\lambda_0}(\lambda - \lambda_0)^2$;
    lambda is a constant for the gradient. Two passes of statistics.

    Args:
        lam: (B,), each row's lambda of the step before (lam0 at first), positive.
        alpha: above 1, which keeps lambda positive.

    Shapes: (B, C), (B,), (B,) -> (scalar or (B,), lambda (B,)).

    Source: Zhu, Ying, Yang, "Label Distributionally Robust Losses for Multi-class Classification", 2023; the
    step of lambda follows a public implementation, not the paper's text.
    """
    x, y = logit_rows(logits, target, ignore_index)
    lam0, alpha = _above("lam0", lam0, 0.0), _above("alpha", alpha, 1.0)
    margin = _check.number("margin", margin)
    if x.shape[1] < 2:
        raise ValueError("logits: expected at least two classes, got 1")
    before = per_row("lam", lam, x, x.shape[0], low=0.0).detach()
    width = torch.tensor(float(x.shape[1]), dtype=before.dtype, device=x.device).log()
    _, entropy, _ = _robust(x.detach(), y, before, margin)
    after = lam0 * (1 - (width - entropy) / (alpha * width))
    exponent, _, _ = _robust(x, y, after, margin)
    loss = after * exponent - (0.5 * alpha / lam0) * width * (after - lam0).square()
    return reduced(loss, y, reduction, x, logits.shape[:-1]), after.to(lam.dtype)


def comp_sum_loss(
    logits: Tensor,
    target: Tensor,
    *,
    kind: str = "log",
    q: float = 0.7,
    reduction: str = "mean",
    ignore_index: int = -100,
) -> Tensor:
    r"""Comp-sum losses: $\Phi(u)$ of $u = \sum_{k \ne y} e^{h_k - h_y}$.

    kind "log": log(1 + u), cross-entropy; "gce": $(1 - (1 + u)^{-q})/q$, generalised cross-entropy;
    "mae": 1 - 1/(1 + u); "exp": u.

    Shapes: (..., C), (...) -> scalar, or (...) with reduction "none".

    Source: Mao, Mohri, Zhong, "Cross-Entropy Loss Functions: Theoretical Analysis and Applications", 2023.
    """
    _check.choice("kind", kind, ("log", "gce", "mae", "exp"))
    x, y = logit_rows(logits, target, ignore_index)
    ones = torch.ones(x.shape[0], dtype=accumulate_type(x), device=x.device)
    others, _, picked, _ = logit_statistics(x, y, SOFTMAX, scale=ones)
    gap = picked - others
    if kind == "log":
        loss = -F.logsigmoid(gap)
    elif kind == "gce":
        q = _above("q", q, 0.0)
        loss = -torch.expm1(q * F.logsigmoid(gap)) / q
    elif kind == "mae":
        loss = torch.sigmoid(-gap)
    else:
        loss = (-gap).exp()
    return reduced(loss, y, reduction, x, logits.shape[:-1])


def decoupled_softmax_loss(
    scores: Tensor, positive_mask: Tensor, *, reduction: str = "mean"
) -> Tensor:
    r"""Each positive against all negatives, and against no other positive.

    $L = \sum_{p \in P} \mathrm{softplus}(\log Z_n - s_p)$, $Z_n = \sum_{n \notin P} e^{s_n}$. A composition; a row
    without negatives gives 0.

    Args:
        scores: (B, L). positive_mask: (B, L) bool.

    Shapes: (B, L), (B, L) -> scalar (the mean over rows), or (B,) with reduction "none".

    Source: Gupta et al., "Dual-Encoders for Extreme Multi-Label Classification", 2024; the formula derived from
    the loss's name, its gradient (-(1 - q_p) at a positive) checked against it.
    """
    _check.tensor("scores", scores, dim=2)
    _check.choice("reduction", reduction, ("none", "mean", "sum"))
    if not isinstance(positive_mask, Tensor) or positive_mask.dtype != torch.bool:
        raise TypeError("positive_mask: expected a bool tensor")
    if positive_mask.shape != scores.shape:
        raise ValueError(
            f"positive_mask: expected shape {tuple(scores.shape)}, got {tuple(positive_mask.shape)}"
        )
    s = scores.to(accumulate_type(scores))
    negatives = s.masked_fill(positive_mask, float("-inf")).logsumexp(1, keepdim=True)
    loss = torch.where(positive_mask, -F.logsigmoid(s - negatives), 0.0).sum(1)
    if reduction != "none":
        loss = loss.mean() if reduction == "mean" else loss.sum()
    return loss.to(scores.dtype)
