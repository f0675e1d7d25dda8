"""Contrastive losses and losses on directions: thin functions over `normalized_softmax` and core `row_dots`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _check
from .._registry import accumulate_type
from .._route import without_autocast
from ._labels import labels, reduced
from .l2_norm import l2_normalize
from .normalized_softmax import EPS, normalized_softmax_cross_entropy
from .row_dots import row_dots


def _pair(x: Tensor, y: Tensor, x_name: str, y_name: str) -> None:
    _check.tensor(x_name, x, dim=2)
    _check.like(y_name, y, tuple(x.shape), x, x_name)
    _check.same_dtype(y_name, y, x, x_name)


def info_nce(
    q: Tensor,
    k: Tensor,
    *,
    temperature: float = 0.07,
    negatives: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""InfoNCE on unit vectors: row b of q against row b of k, all other rows of k, and the negatives.

    $L_b = -\log\frac{e^{\cos(q_b, k_b)/\tau}}{\sum_j e^{\cos(q_b, k_j)/\tau}
    + \sum_m e^{\cos(q_b, n_m)/\tau}}$: the normalised
    softmax with the keys as its weight, so the (B, B + M) similarities are walked in chunks and not kept.

    Args:
        q, k: (B, d) of one dtype. negatives: (M, d), a queue or bank; None for the batch alone.

    Shapes: (B, d), (B, d) -> scalar, or (B,) with reduction "none".

    Source: van den Oord et al., "Representation Learning with Contrastive Predictive Coding", 2018; Wang, Liu,
    "Understanding the Behaviour of Contrastive Loss", 2021 (the part of the temperature).
    """
    _pair(q, k, "q", "k")
    temperature = _positive("temperature", temperature)
    keys = k
    if negatives is not None:
        _check.tensor("negatives", negatives, dim=2)
        _check.like("negatives", negatives, (negatives.shape[0], q.shape[1]), q, "q")
        _check.same_dtype("negatives", negatives, q, "q")
        keys = torch.cat([k, negatives])
    if q.shape[0] == 0:
        raise ValueError("q: expected at least one row, got 0")
    own = torch.arange(q.shape[0], device=q.device)
    return normalized_softmax_cross_entropy(
        q, keys, own, scale=1 / temperature, reduction=reduction
    )


def _classes(target: object, x: Tensor) -> None:
    """One class a row of x, of any integer dtype."""
    if not isinstance(target, Tensor):
        raise TypeError(f"target: expected a torch.Tensor, got {type(target).__name__}")
    if target.shape != x.shape[:1] or target.device != x.device:
        raise ValueError(
            f"target: expected shape ({x.shape[0]},) on {x.device} to go with x of shape "
            f"{tuple(x.shape)}, got {tuple(target.shape)} on {target.device}"
        )


def _positive(name: str, value: float) -> float:
    number = _check.number(name, value)
    if number <= 0:
        raise ValueError(f"{name}: expected a positive number, got {value!r}")
    return number


def feature_direction_loss(
    student: Tensor,
    teacher: Tensor,
    centers: Tensor,
    target: Tensor,
    *,
    reduction: str = "mean",
    ignore_index: int = -100,
) -> Tensor:
    r"""ND loss: turn the student's features to their class's centre, and make them no shorter than the teacher's.

    $L_b = 1 - \langle s_b, e_{y_b}\rangle / \max(\|s_b\|, \|t_b\|)$, $e_c = \mu_c / \|\mu_c\|$.
    Where the student is the longer
    the gradient is the cosine's, elsewhere $-e_y/\|t\|$, which lengthens it. Reads student, teacher and the
    gathered centres once; the gradient reads student and centres. Teacher and centres are constants (where one
    of them takes a gradient torch's own operations compute everything).

    Args:
        student, teacher: (B, d). centers: (C, d), the teacher's class means. target: (B,) int64.

    Shapes: (B, d), (B, d), (C, d), (B,) -> scalar, or (B,) with reduction "none".

    Source: Wang et al., "Improving Knowledge Distillation via Regularizing Feature Norm and Direction", 2023.
    """
    _check.tensor("student", student, dim=2)
    _check.like("teacher", teacher, tuple(student.shape), student, "student")
    _check.tensor("centers", centers, dim=2)
    _check.like("centers", centers, (centers.shape[0], student.shape[1]), student, "student")
    if student.dtype == torch.float64:  # the kernel takes float64 with float64 only
        teacher, centers = teacher.to(student.dtype), centers.to(student.dtype)
    y = labels("target", target, student.shape[:1], centers.shape[0], student.device, ignore_index)
    ss, sc, cc = row_dots(student, centers, y)
    tt = row_dots(teacher, teacher)[0]
    longest = torch.maximum(ss, tt).clamp(min=EPS * EPS).sqrt()
    loss = 1 - sc / (longest * cc.clamp(min=EPS * EPS).sqrt())
    return reduced(loss, y, reduction, student)


def scaled_cosines(
    x: Tensor, rows: object, scale: float | Tensor, name: str, *, unit: bool = False
) -> Tensor:
    """scale cos(x_b, r_c) in x's dtype, (B, d), (C, d) -> (B, C); `unit`: the rows have length one already."""
    _check.tensor("x", x, dim=2)
    r = _check.tensor(name, rows, dim=2)
    _check.like(name, r, (r.shape[0], x.shape[1]), x)
    return F.linear(l2_normalize(x), (r if unit else l2_normalize(r)).to(x.dtype)) * scale


def cosine_logits(
    x: Tensor, weight: Tensor, *, temperature: float = 0.07, normalize_weight: bool = False
) -> Tensor:
    """normalize(x) @ weight.T / temperature, the weight's rows of unit length already. A composition.

    `ensemble.cosine_logits` is the same with both sides normalised and a scale in place of the temperature.

    Shapes: (B, d), (C, d) -> (B, C).

    Source: Shen et al., "Equiangular Basis Vectors", 2023.
    """
    scale = 1 / _positive("temperature", temperature)
    return scaled_cosines(x, weight, scale, "weight", unit=not normalize_weight)


def cosine_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    temperature: float = 0.07,
    reduction: str = "mean",
    ignore_index: int = -100,
) -> Tensor:
    """Cross-entropy of cosines over a temperature, the (B, C) logits not kept: EBV's training loss.

    The weight's rows are normalised (which leaves unit rows as they are). A thin call of
    `normalized_softmax_cross_entropy`.

    Shapes: (B, d), (C, d), (B,) -> scalar, or (B,) with reduction "none".

    Source: Shen et al., "Equiangular Basis Vectors", 2023.
    """
    return normalized_softmax_cross_entropy(
        x, weight, target, scale=1 / _positive("temperature", temperature),
        reduction=reduction, ignore_index=ignore_index,
    )  # fmt: skip


def _cosines(x: Tensor) -> Tensor:
    """(B, B) in the accumulator's dtype, under autocast too."""
    with without_autocast(x):
        v = F.normalize(x.to(accumulate_type(x)), dim=1)
        return v @ v.t()


def batch_negatives(x: Tensor, target: Tensor, *, whisker: float | None = 1.5) -> Tensor:
    r"""Cosines between the batch's samples of different classes, as `extra_negatives`; -inf elsewhere. A composition.

    Pairs outside [Q1 - whisker IQR, Q3 + whisker IQR] of these cosines count as noise and are left out.

    Shapes: (B, d), (B,) -> (B, B).

    Source: Jung et al., "Unified Negative Pair Generation toward Well-discriminative Feature Space for Face
    Recognition", 2022; the whisker rule and the joint log-sum-exp follow the paper's description.
    """
    _check.tensor("x", x, dim=2)
    _classes(target, x)
    cosine = _cosines(x)
    kept = target[:, None] != target[None, :]
    if whisker is not None and bool(kept.any()):
        values = cosine.detach()[kept]
        low, high = values.quantile(0.25), values.quantile(0.75)
        reach = _check.number("whisker", whisker, low=0.0) * (high - low)
        kept = kept & (cosine >= low - reach) & (cosine <= high + reach)
    return torch.where(kept, cosine, float("-inf"))


def multi_similarity_loss(
    x: Tensor,
    target: Tensor,
    *,
    alpha: float = 2.0,
    beta: float = 50.0,
    lam: float = 1.0,
    margin: float = 0.1,
) -> Tensor:
    r"""Multi-similarity loss with its mining. A composition over the (B, B) cosines S.

    A negative pair counts if it is more similar than the least similar positive less the margin, a positive
    pair if it is less similar than the most similar negative plus the margin. Then the mean over rows of
    $\tfrac1\alpha\log(1 + \sum_{pos} e^{-\alpha(S - \lambda)})
    + \tfrac1\beta\log(1 + \sum_{neg} e^{\beta(S - \lambda)})$.

    Shapes: (B, d), (B,) -> scalar.

    Source: Wang et al., "Multi-Similarity Loss with General Pair Weighting for Deep Metric Learning", 2019.
    """
    _check.tensor("x", x, dim=2)
    _classes(target, x)
    s = _cosines(x)
    same = target[:, None] == target[None, :]
    positive = same & ~torch.eye(len(s), dtype=torch.bool, device=s.device)
    inf = float("inf")
    easiest = torch.where(positive, s, inf).amin(1, keepdim=True)
    hardest = torch.where(same, -inf, s).amax(1, keepdim=True)
    with torch.no_grad():
        negative = ~same & (s + margin > easiest)
        positive = positive & (s - margin < hardest)

    def soft(kept: Tensor, exponent: Tensor) -> Tensor:
        zero = exponent.new_zeros(len(s), 1)
        terms = torch.cat([zero, torch.where(kept, exponent, -inf)], 1)
        return terms.logsumexp(1)

    pull = soft(positive, -alpha * (s - lam)) / _positive("alpha", alpha)
    push = soft(negative, beta * (s - lam)) / _positive("beta", beta)
    return (pull + push).mean().to(x.dtype)


def loss_reweight(
    losses: Tensor, *, strategy: str = "linupper", r: float = 1.0, cap: float = 1.0
) -> Tensor:
    r"""Losses (B,) weighted by themselves: sum of sg(softmax(s(h)/r)) * loss, h the losses brought to [-1, 1].

    strategy "linupper": s = min(h, cap); "quadratic": 1 - h^2; "extremes": |h|. A composition.

    Shapes: (B,) -> scalar.

    Source: Sow et al., "Dynamic Loss-Based Sample Reweighting for Improved Large Language Model Pretraining", 2025;
    h by the smallest and largest loss, and the constants of s, are derived from its description.
    """
    _check.tensor("losses", losses, dim=1)
    _check.choice("strategy", strategy, ("linupper", "quadratic", "extremes"))
    v = losses.detach().to(accumulate_type(losses))
    low, high = v.amin(), v.amax()
    h = 2 * (v - low) / (high - low).clamp(min=1e-12) - 1
    if strategy == "linupper":
        s = h.clamp(max=_check.number("cap", cap))
    else:
        s = 1 - h.square() if strategy == "quadratic" else h.abs()
    weights = (s / _positive("r", r)).softmax(0)
    return (weights * losses.to(weights.dtype)).sum().to(losses.dtype)


def kl_dro_loss(
    losses: Tensor, lam: float, *, normalizer: Tensor | None = None, momentum: float = 0.9
) -> tuple[Tensor, Tensor]:
    r"""KL-regularised worst case over samples: $\lambda\log\operatorname{mean} e^{\ell/\lambda}$, and its normaliser.

    The gradient weights sample i by $e^{\ell_i/\lambda}$ over the batch's mean, or over its moving average where the
    log of that, `normalizer` (a scalar tensor), is passed in from the step before. A composition.

    Returns:
        (loss, the log of the new moving average, to be passed in next time).

    Shapes: (B,) -> (scalar, scalar).

    Source: Sow et al., "Doubly Robust Instance-Reweighted Adversarial Training", 2024; Qi et al., 2021 (the moving
    average); the forms derived here.
    """
    _check.tensor("losses", losses, dim=1)
    lam = _positive("lam", lam)
    v = losses.to(accumulate_type(losses)) / lam
    count = torch.tensor(float(v.shape[0]), dtype=v.dtype, device=v.device)
    here = v.logsumexp(0) - count.log()
    if normalizer is None:
        return (lam * here).to(losses.dtype), here.detach()
    rate = _check.number("momentum", momentum, low=0.0, high=1.0)
    odds = torch.tensor([rate, 1 - rate], dtype=v.dtype, device=v.device).log()
    average = (torch.stack([normalizer.to(v.dtype), here.detach()]) + odds).logsumexp(0)
    value = lam * here.detach()
    weights = (v.detach() - average).exp() / v.shape[0]
    surrogate = (weights * losses.to(v.dtype)).sum()
    return (value + surrogate - surrogate.detach()).to(losses.dtype), average


def cosine_relation_kl(
    old: Tensor, new: Tensor, features: Tensor, *, temperature: float = 0.1
) -> Tensor:
    r"""KL between the old and the new prototypes' softmax, over the samples, of their cosines. A composition.

    Shapes: old (C, d), new (C, d), features (B, d) -> scalar, the mean over prototypes.

    Source: Asadi et al., "Prototype-Sample Relation Distillation: Towards Replay-Free Continual Learning", 2023; the
    axis of the softmax is read from its abstract.
    """
    _pair(new, old, "new", "old")
    _check.tensor("features", features, dim=2)
    _check.like("features", features, (features.shape[0], new.shape[1]), new, "new")
    _check.product_dtype("features", features, new, "new")
    f = F.normalize(features, dim=1)
    scale = 1 / _positive("temperature", temperature)
    p, q = ((F.normalize(t, dim=1) @ f.t() * scale).log_softmax(1) for t in (old, new))
    return F.kl_div(q, p, reduction="batchmean", log_target=True)


def soft_topk(x: Tensor, k: float, *, alpha: float = 1.0, iterations: int = 48) -> Tensor:
    r"""$y_i = \sigma(\alpha (x_i + t))$ with t such that the row sums to k, by bisection. A composition.

    Exactly entropic transport to two bins of mass k and n - k. The gradient is that of the solution,
    $v g - v \langle v, g\rangle / \sum v$ with $v = \alpha y (1 - y)$.

    Shapes: (..., n) -> (..., n), 0 < k < n.

    Source: Gupta et al., "Dual-Encoders for Extreme Multi-Label Classification", 2024.
    """
    _check.tensor("x", x, min_dim=1)
    n = x.shape[-1]
    k, alpha = _check.number("k", k), _positive("alpha", alpha)
    if not 0 < k < n:
        raise ValueError(f"k: expected a number between 0 and {n}, got {k!r}")
    v = x.to(accumulate_type(x))
    with torch.no_grad():
        # At these two t every entry is below, or above, k / n.
        odds = torch.tensor(k / n, dtype=torch.float64).logit().item() / alpha
        low, high = odds - v.amax(-1, keepdim=True), odds - v.amin(-1, keepdim=True)
        for _ in range(iterations):
            middle = (low + high) / 2
            short = torch.sigmoid(alpha * (v + middle)).sum(-1, keepdim=True) < k
            low, high = torch.where(short, middle, low), torch.where(short, high, middle)
        t = (low + high) / 2
    # Newton steps, worth nothing but the derivatives: the first gives dt = -sum(v dx) / sum(v), both together
    # the second derivative. Where every entry is 0 or 1 to rounding, the quotient is noise and is held.
    tiny = torch.finfo(v.dtype).tiny
    for _ in range(2):
        y = torch.sigmoid(alpha * (v + t))
        slope = (alpha * y * (1 - y)).sum(-1, keepdim=True).clamp(min=tiny)
        t = t - ((y.sum(-1, keepdim=True) - k) / slope).clamp(-1 / alpha, 1 / alpha)
    return torch.sigmoid(alpha * (v + t)).to(x.dtype)
