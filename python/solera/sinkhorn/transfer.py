"""Data and model selection by optimal transport: compositions over `sinkhorn_points`, the plan never stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import _check
from .points import SinkhornPointsResult, sinkhorn_points


def transport_gradient(
    x: Tensor,
    y: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    epsilon: float,
    **options: Any,
) -> Tensor:
    r"""Calibrated gradient of the transport cost to the mass of each candidate x_i.

    $$\frac{\partial\,\mathrm{OT}}{\partial \mu_i} = f_i - \frac{1}{n - 1} \sum_{j \ne i} f_j$$

    of the potentials of x (candidates) with y (target): moving mass to x_i, away from the others evenly,
    changes OT at this rate. Select the most negative; the most positive are far from the target.

    Args:
        x, y, a, b, epsilon: as `sinkhorn_points`, whose other arguments `options` may give; n >= 2.

    Shapes: x (..., n, d), y (..., m, d) -> (..., n). float32, float64; half precision computed in float32.

    Raises:
        ValueError, TypeError: naming the argument.

    Sources: Just et al., "LAVA: Data Valuation without Pre-Specified Learning Algorithms", 2023; Kang et al.,
    "Get more for less: Principled Data Selection for Warming Up Fine-Tuning in LLMs", 2024.
    """
    f = sinkhorn_points(x, y, a, b, epsilon=epsilon, **options).f
    n = f.shape[-1]
    if n < 2:
        raise ValueError(f"x: expected at least two candidates, got {tuple(x.shape)}")
    return f - (f.sum(-1, keepdim=True) - f) / (n - 1)


@dataclass(frozen=True)
class TransferCost:
    """Attributes: domain (), the transport cost <P, C>; task (), the conditional entropy H(target | source) of
    the labels in nats; joint (source classes, target classes), the labels' joint distribution under the plan;
    transport, the `SinkhornPointsResult`. Shapes: one problem, no batch."""

    domain: Tensor
    task: Tensor
    joint: Tensor
    transport: SinkhornPointsResult


def conditional_entropy(joint: Tensor) -> Tensor:
    r"""$H(T|S) = -\sum_{st} J_{st} \log (J_{st} / \sum_t J_{st})$ in nats, with 0 log 0 = 0.

    Shapes: joint (..., S, T), >= 0 -> (...).

    Raises:
        TypeError: joint is not a floating-point tensor.
    """
    _check.tensor("joint", joint, min_dim=2)
    rows = joint.sum(-1, keepdim=True)
    some = joint > 0
    # A difference of logarithms: the ratio itself may underflow.
    part = torch.where(some, joint, 1.0).log() - torch.where(some, rows.expand_as(joint), 1.0).log()
    return -(joint * part).sum((-2, -1))


def _labels(name: str, value: Tensor, count: int, classes: int | None, device: Any) -> int:
    if not isinstance(value, Tensor) or value.dtype != torch.int64 or value.shape != (count,):
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name}: expected int64 labels of shape ({count},), got {shape}")
    if value.device != device:
        raise ValueError(f"{name}: expected device {device}, got {value.device}")
    low, high = (int(value.min()), int(value.max())) if count else (0, 0)
    found = high + 1 if classes is None else classes
    if low < 0 or high >= found:
        raise ValueError(f"{name}: expected labels in [0, {found}), got {low} to {high}")
    return found


def transfer_cost(
    x: Tensor,
    y: Tensor,
    source_labels: Tensor,
    target_labels: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    epsilon: float,
    source_classes: int | None = None,
    target_classes: int | None = None,
    **options: Any,
) -> TransferCost:
    r"""What a source costs to transfer: domain difference <P, C> and task difference H(Y_t | Y_s) under the plan.

    $J = Y_s^\top P\, Y_t$ (one-hot labels) is the joint distribution of labels that the plan couples, and
    $H(Y_t|Y_s) = -\sum J \log (J / J\mathbf 1)$. P is applied to Y_t as it streams: memory O(n T + (n + m) d).

    Args:
        x, y: source features (n, d) and target features (m, d).
        source_labels, target_labels: int64, (n,) and (m,).
        source_classes, target_classes: how many there are; from the labels if None.
        a, b, epsilon, options: as `sinkhorn_points`.

    Shapes: x (n, d), y (m, d) -> domain (), task (), joint (S, T). Differentiable in x, y, a, b.

    Raises:
        ValueError, TypeError: naming the argument.

    Sources: Tan, Li, Huang, "OTCE: A Transferability Metric for Cross-Domain Cross-Task Representations", 2021;
    Vimal et al., "Building a Winning Team: Selecting Source Model Ensembles using a Submodular Transferability
    Estimation Approach", 2023.
    """
    _check.tensor("x", x, dim=2)
    _check.tensor("y", y, dim=2)
    sources = _labels("source_labels", source_labels, x.shape[0], source_classes, x.device)
    targets = _labels("target_labels", target_labels, y.shape[0], target_classes, y.device)
    result = sinkhorn_points(x, y, a, b, epsilon=epsilon, **options)
    one_hot = torch.nn.functional.one_hot(target_labels, targets).to(result.f.dtype)
    rows = result.apply(one_hot)  # (n, T)
    joint = rows.new_zeros(sources, targets).index_add(0, source_labels, rows)
    return TransferCost(result.transport_cost(), conditional_entropy(joint), joint, result)


def select_sources(
    domain: Tensor,
    task: Tensor,
    predictions: Tensor,
    count: int,
    *,
    weights: tuple[float, float, float] = (1.0, 1.0, 1.0),
) -> Tensor:
    r"""Greedy choice of an ensemble of source models: small transfer costs, predictions that agree.

    $$F(S) = -\sum_{i \in S} (w_1 D_i + w_2 T_i) - w_3 \sum_{i \ne j \in S} H(\hat y_i | \hat y_j)$$

    is submodular (its pair terms are never positive), and the greedy step adds the model of largest gain. The
    three ingredients are the paper's; their weights are arguments because its values were not verified.

    Args:
        domain, task: (M,) of each model (see `transfer_cost`).
        predictions: (M, N) int64, the models' labels of the target samples.
        count: how many to choose, at most M.
        weights: w_1, w_2, w_3.

    Shapes: -> (count,) int64, in the order chosen. Not differentiable.

    Raises:
        ValueError, TypeError: naming the argument.

    Source: Vimal et al., "Building a Winning Team", 2023.
    """
    _check.tensor("domain", domain, dim=1)
    models = domain.shape[0]
    _check.like("task", task, (models,), domain, "domain")
    if not isinstance(predictions, Tensor) or predictions.dtype != torch.int64:
        raise TypeError("predictions: expected int64 labels")
    if predictions.dim() != 2 or predictions.shape[0] != models:
        raise ValueError(
            f"predictions: expected ({models}, N) to go with domain, got {tuple(predictions.shape)}"
        )
    if not 1 <= count <= models:
        raise ValueError(f"count: expected 1 to {models}, got {count}")
    one_hot = torch.nn.functional.one_hot(predictions).to(domain.dtype)  # (M, N, C)
    joint = torch.einsum("inc,jnd->ijdc", one_hot, one_hot) / predictions.shape[1]
    disagreement = conditional_entropy(joint)  # (M, M): of i given j
    pairs = weights[2] * (disagreement + disagreement.T)
    own = weights[0] * domain.detach() + weights[1] * task.detach()
    taken = torch.zeros(models, dtype=torch.bool, device=domain.device)
    pull = torch.zeros_like(own)
    order = []
    for _ in range(count):
        gain = torch.where(taken, -torch.inf, -own - pull)
        best = gain.argmax()
        order.append(best)
        taken = taken | (torch.arange(models, device=domain.device) == best)
        pull = pull + pairs.index_select(0, best.reshape(1)).squeeze(0)
    return torch.stack(order)
