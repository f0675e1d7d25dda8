"""Losses around ensembles of losses, of samples and of outliers: compositions of a few lines."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _check
from .._registry import accumulate_type


def flops_reg(weights: Tensor, factor: Tensor | None = None) -> Tensor:
    r"""FLOPS regulariser of sparse retrieval, aware of IDF: $\sum_v \bigl(\tfrac1B\sum_b w_{bv}\,g_v\bigr)^2$.

    Args:
        weights: (B, V), the documents' term weights.
        factor: (V,), $g_v = g(\mathrm{idf}_v)$; None for 1, the plain FLOPS loss.

    Shapes: (B, V) -> scalar, in the weights' dtype.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Geng et al., "Towards Competitive Search Relevance For Inference-Free Learned Sparse Retrievers",
    2024; the plain form is that of Paria et al., "Minimizing FLOPs to Learn Efficient Sparse Representations", 2020.
    """
    _check.tensor("weights", weights, dim=2)
    acc = accumulate_type(weights)
    mean = weights.mean(0, dtype=acc)
    if factor is not None:
        _check.like("factor", factor, (weights.shape[1],), weights, "weights")
        mean = mean * factor.to(acc)
    return mean.square().sum().to(weights.dtype)


def ensloss(
    output: Tensor,
    target: Tensor,
    *,
    draws: Tensor | None = None,
    power: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""A random calibrated convex loss a batch, given by its derivatives alone.

    With margins $z_i = y_i f_i$ and positive draws u, sorted so that u falls as z rises (a convex loss's slope rises),
    $\partial L/\partial f_i = -y_i u_i / B$. The value returned is $-\tfrac1B\sum_i u_i z_i$ with u held constant: only
    its gradient has a meaning.

    Args:
        output: (B,), f. target: (B,), -1 or 1.
        draws: (B,) positive numbers; None draws exponential variates e and takes their inverse Box-Cox
            transform, $(1 + \lambda e)^{1/\lambda}$, or $e^e$ for $\lambda = 0$.
        power: $\lambda \ge 0$.

    Shapes: (B,), (B,) -> scalar.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Dai, "EnsLoss: Stochastic Calibrated Loss Ensembles for Preventing Overfitting in Classification", 2024; the
    sampler is one of the family that it allows, from knowledge.
    """
    _check.tensor("output", output, dim=1)
    _check.like("target", target, tuple(output.shape), output, "output")
    power = _check.number("power", power, low=0.0)
    if draws is None:
        noise = torch.empty_like(output, dtype=torch.float64).exponential_(generator=generator)
        draws = noise.exp() if power == 0 else (1 + power * noise) ** (1 / power)
        draws = draws.to(output.dtype)
    else:
        _check.like("draws", draws, tuple(output.shape), output, "output")
    margin = target * output
    order = margin.detach().argsort(stable=True)
    slope = torch.empty_like(output).scatter(
        0, order, draws.detach().to(output.dtype).sort(descending=True).values
    )
    return -(slope * margin).mean()


def pairwise_sigmoid_mean(z1: Tensor, z2: Tensor, a: float | Tensor, b: float | Tensor) -> Tensor:
    r"""Match probability of two stochastic embeddings: $\tfrac1{K^2}\sum_{kl}\sigma(-a\,\|z^1_k - z^2_l\| + b)$.

    Args:
        z1, z2: (B, K, D), K samples of each embedding.
        a, b: numbers or scalar tensors, a positive.

    Shapes: (B, K, D), (B, K', D) -> (B,).

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Oh et al., "Modeling Uncertainty with Hedged Instance Embedding", 2019 (from knowledge).
    """
    _check.tensor("z1", z1, dim=3)
    _check.tensor("z2", z2, dim=3)
    _check.like("z2", z2, (z1.shape[0], z2.shape[1], z1.shape[2]), z1, "z1")
    for name, value in (("a", a), ("b", b)):
        if isinstance(value, Tensor):
            _check.like(name, value, (), z1, "z1")
        else:
            _check.number(name, value)
    acc = accumulate_type(z1)
    distance = torch.cdist(z1.to(acc), z2.to(acc))
    return torch.sigmoid(b - a * distance).mean((1, 2)).to(z1.dtype)


def energy_hinge(
    inliers: Tensor,
    outliers: Tensor,
    *,
    low: float = -15.0,
    high: float = -3.0,
    weight: float = 0.1,
) -> Tensor:
    r"""Keeps the energy $E = -\log\sum_c e^{z_c}$ of inliers below `low` and that of outliers above `high`.

    $\lambda\,[\mathrm{mean}\,h(\mathrm{relu}(E_{in} - m_{in})) + \mathrm{mean}\,h(\mathrm{relu}(m_{out} - E_{out}))]$
    with h Huber's function, its corner at 1. The gradient of E is minus the softmax.

    Args:
        inliers: (B, C) logits. outliers: (B', C) logits. low, high, weight: $m_{in}$, $m_{out}$, $\lambda$.

    Shapes: (B, C), (B', C) -> scalar.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Huang, Chen, Hsu, "OVOR: OnePrompt with Virtual Outlier Regularization for Rehearsal-Free Class-Incremental
    Learning", 2024 (defaults of its code).
    """
    _check.tensor("inliers", inliers, dim=2)
    _check.tensor("outliers", outliers, dim=2)
    _check.like("outliers", outliers, (outliers.shape[0], inliers.shape[1]), inliers, "inliers")
    low, high = _check.number("low", low), _check.number("high", high)
    above = F.relu(-inliers.logsumexp(1) - low)
    below = F.relu(high + outliers.logsumexp(1))
    huber = lambda t: F.huber_loss(t, torch.zeros_like(t))
    return _check.number("weight", weight) * (huber(above) + huber(below))
