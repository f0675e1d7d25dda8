"""Losses made of soft counts: compositions of torch operations on probabilities and scores."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _check
from .moments2 import indices


def _fits(p: Tensor, y: Tensor) -> Tensor:
    _check.tensor("p", p)
    if not isinstance(y, Tensor):
        raise TypeError(f"y: expected a torch.Tensor, got {type(y).__name__}")
    if y.shape != p.shape or y.device != p.device:
        raise ValueError(
            f"y: expected shape {tuple(p.shape)} on {p.device} (that of p), got "
            f"{tuple(y.shape)} on {y.device}"
        )
    if y.is_complex():
        raise TypeError(f"y: expected zeros and ones, got {y.dtype}")
    return y.to(p.dtype)


def soft_confusion(p: Tensor, y: Tensor, *, slope: float = 73.0) -> tuple[Tensor, ...]:
    r"""Soft counts (TP, FN, FP, TN) with $a(p) = 1/(1 + e^{-L(p - 1/2)})$ in place of a threshold. A composition.

    Shapes: p (...), y (...) of 0 and 1 -> four scalars.

    Source: Han, Moniz, Chawla, "AnyLoss: Transforming Classification Metrics into Loss Functions", 2024.
    """
    y = _fits(p, y)
    a = torch.sigmoid(_check.number("slope", slope) * (p - 0.5))
    return (a * y).sum(), ((1 - a) * y).sum(), (a * (1 - y)).sum(), ((1 - a) * (1 - y)).sum()


def any_loss(p: Tensor, y: Tensor, *, metric: str = "f1", slope: float = 73.0) -> Tensor:
    """1 - metric of the soft counts: "accuracy", "f1", "balanced_accuracy" or "gmean". A composition.

    Shapes: p (...), y (...) -> scalar.

    Source: Han, Moniz, Chawla, "AnyLoss: Transforming Classification Metrics into Loss Functions", 2024.
    """
    _check.choice("metric", metric, ("accuracy", "f1", "balanced_accuracy", "gmean"))
    tp, fn, fp, tn = soft_confusion(p, y, slope=slope)
    if metric == "accuracy":
        value = (tp + tn) / (tp + fn + fp + tn)
    elif metric == "f1":
        value = 2 * tp / (2 * tp + fp + fn)
    else:
        recall, specificity = tp / (tp + fn), tn / (tn + fp)
        balanced = metric == "balanced_accuracy"
        value = (recall + specificity) / 2 if balanced else (recall * specificity).sqrt()
    return 1 - value


def dice_loss(
    p: Tensor, y: Tensor, *, alpha: float = 0.0, gamma: float = 1.0, pooled: bool = False
) -> Tensor:
    r"""Self-adjusting dice loss, a composition.

    $1 - \frac{2 (1-p)^\alpha p\,y + \gamma}{(1-p)^\alpha p + y + \gamma}$ an element.

    `pooled` sums numerator and denominator over all elements first (a map's dice, SeaBird's with alpha 0, gamma 0).

    Shapes: p (...), y (...) -> scalar, the mean over elements, or of the pool.

    Source: Li et al., "Dice Loss for Data-imbalanced NLP Tasks", 2020; Kumar et al., "SeaBird: Segmentation in
    Bird's View with Dice Loss Improves Monocular 3D Detection of Large Objects", 2024 (pooled).
    """
    y = _fits(p, y)
    q = (1 - p).pow(_check.number("alpha", alpha, low=0.0)) * p
    over, under = 2 * q * y, q + y
    if pooled:
        over, under = over.sum(), under.sum()
    gamma = _check.number("gamma", gamma, low=0.0)
    return (1 - (over + gamma) / (under + gamma)).mean()


def bag_mean_loss(prediction: Tensor, bag: Tensor, target: Tensor, *, rho: float = 0.5) -> Tensor:
    r"""(1 - rho) times the bags' loss (mean prediction against the bag's answer) + rho times the instances'.

    Both are squared errors; an instance's answer is its bag's. A composition.

    Shapes: prediction (N,), bag (N,) int64, target (bags,) -> scalar.

    Source: Javanmard et al., "Learning from Aggregate responses: Instance Level versus Bag Level Loss Functions",
    2024; where rho sits is derived from its description.
    """
    _check.tensor("prediction", prediction, dim=1)
    rho = _check.number("rho", rho, low=0.0, high=1.0)
    _check.tensor("target", target, dim=1)
    _check.like("target", target, tuple(target.shape), prediction, "prediction")
    indices("bag", bag, prediction.shape, prediction)
    bags = target.shape[0]
    member = F.one_hot(bag, bags).to(prediction.dtype)
    size = member.sum(0)
    means = (member * prediction[:, None]).sum(0) / size.clamp(min=1)
    of_bags = torch.where(size > 0, (means - target).square(), 0.0).sum() / (size > 0).sum()
    return (1 - rho) * of_bags + rho * (prediction - target[bag]).square().mean()


def pairwise_softplus(positive: Tensor, negative: Tensor) -> Tensor:
    r"""Mean over all pairs of $\mathrm{softplus}(-(s^+_i - s^-_j))$, the Mann-Whitney loss. A composition.

    Shapes: positive (P,), negative (M,) -> scalar.

    Source: "Optimizing What Matters: AUC-Driven Learning for Robust Neural Retrieval", 2025.
    """
    _check.tensor("positive", positive, dim=1)
    _check.tensor("negative", negative, dim=1)
    _check.like("negative", negative, tuple(negative.shape), positive, "positive")
    return -F.logsigmoid(positive[:, None] - negative[None, :]).mean()
