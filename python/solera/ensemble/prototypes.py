"""Classifiers made of class means and text rows: cosines in one or several subspaces, Gaussian heads. Compositions."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _check
from .._registry import accumulate_type
from ..norm import class_moments, l2_normalize
from ..norm.contrastive import scaled_cosines

STEP = 4096  # rows whose centred copy exists at a time


def _rows(name: str, value: object, columns: int, like: Tensor, like_name: str) -> Tensor:
    t = _check.tensor(name, value, dim=2)
    _check.like(name, t, (t.shape[0], columns), like, like_name)
    return t


def cosine_logits(x: Tensor, prototypes: Tensor, scale: float | Tensor = 1.0) -> Tensor:
    r"""$\mathrm{scale}\cdot\cos(x_b, p_c)$.

    Args:
        x: (B, D); prototypes: (C, D). float32, float64, bfloat16 or float16. scale: a number, or a tensor that
            broadcasts against (B, C).

    Shapes: (B, D), (C, D) -> (B, C). Differentiable.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Zhou et al., "Revisiting Class-Incremental Learning with Pre-Trained Models: Generalizability and Adaptivity
    are All You Need", 2023 (class means of concatenated features as prototypes). Composition over `l2_normalize`;
    `norm.cosine_logits` is the same by a temperature, for rows that may have unit length already.
    """
    if not isinstance(scale, Tensor):
        scale = _check.number("scale", scale)
    elif isinstance(x, Tensor):
        _check.like("scale", scale, tuple(scale.shape), x)
    return scaled_cosines(x, prototypes, scale, "prototypes")


def cosine_route(
    x: Tensor, centroids: Tensor, temperature: float = 1.0, *, standardize: bool = True
) -> Tensor:
    r"""Weights of experts from the cosine to their centroids: $\operatorname{softmax}_e(z_{be} /
      \mathrm{temperature})$.

    z is $\cos(x_b, m_e)$, with `standardize` less its mean over the experts and over its (biased) deviation there, so
    that routing does not depend on how close the centroids lie to each other.

    Args:
        x: (B, D); centroids: (E, D). temperature: positive.

    Shapes: (B, D), (E, D) -> (B, E). Differentiable. Without spread (one expert) the weights are equal.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Li et al., "Ensembles of Low-Rank Expert Adapters", 2025, as reported: softmax of standardised cosines of
    projected gradients; that the standardisation is per sample, over the experts, is derived. Composition.
    """
    z = scaled_cosines(x, centroids, 1.0, "centroids").to(accumulate_type(x))
    temperature = _check.number("temperature", temperature, low=0.0)
    if temperature == 0.0:
        raise ValueError("temperature: expected a positive number, got 0")
    if standardize:
        d = z - z.mean(1, keepdim=True)
        variance = d.square().mean(1, keepdim=True)
        z = d * torch.where(variance > 1e-24, variance, 1.0).rsqrt()
    return (z / temperature).softmax(1).to(x.dtype)


def prototype_calibrate(
    new: Tensor, base: Tensor, alpha: float = 0.5, temperature: float = 16.0
) -> Tensor:
    r"""New classes' prototypes moved towards the base classes they resemble, without training.

    $\tilde p_n = \alpha\,p_n + (1-\alpha)\sum_b \operatorname{softmax}_b(\tau\cos(p_n, p_b))\,p_b$.

    Args:
        new: (N, D), prototypes of few samples; base: (C, D). alpha: in [0, 1]; temperature: $\tau$, not negative.

    Shapes: (N, D), (C, D) -> (N, D) of new's dtype. Differentiable.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Wang et al., "Few-Shot Class-Incremental Learning via Training-Free Prototype Calibration", 2023, from
    knowledge of the method. Composition.
    """
    alpha = _check.number("alpha", alpha, low=0.0, high=1.0)
    temperature = _check.number("temperature", temperature, low=0.0)
    _check.tensor("new", new, dim=2)
    _check.tensor("base", base, dim=2)
    _check.like("base", base, (base.shape[0], new.shape[1]), new, "new")
    weight = cosine_logits(new, base, temperature).softmax(1)
    return alpha * new + (1 - alpha) * (weight @ base.to(new.dtype))


def subspace_cosine_logits(
    features: Tensor, prototypes: Tensor, weights: Tensor | None = None
) -> Tensor:
    r"""Cosines in K subspaces, weighted by class: $\sum_k w_{kc}\cos(f_{kb}, p_{kc})$, as one product.

    Args:
        features: (K, B, d); prototypes: (K, C, d). weights: (K, C), or None for 1. In EASE a class has 1 in the
            subspace of its own task and alpha in the others.

    Shapes: (K, B, d), (K, C, d), (K, C) -> (B, C) of features' dtype. Differentiable. Two subspaces with prototypes
    from `class_moments` of either feature are APER's classifier by subspace.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Zhou et al., "Expandable Subspace Ensemble for Pre-Trained Model-Based Class-Incremental Learning", 2024,
    from knowledge of the method. Composition over `l2_normalize`.
    """
    f = _check.tensor("features", features, dim=3)
    p = _check.tensor("prototypes", prototypes, dim=3)
    _check.like("prototypes", p, (f.shape[0], p.shape[1], f.shape[2]), f, "features")
    p = l2_normalize(p).to(f.dtype)
    if weights is not None:
        _check.like("weights", weights, tuple(p.shape[:2]), f, "features")
        p = p * weights[..., None].to(f.dtype)
    flat = lambda t: t.transpose(0, 1).flatten(1)
    return F.linear(flat(l2_normalize(f)), flat(p))


def prototype_complement(
    old: Tensor, new: Tensor, new_in_new: Tensor, temperature: float = 1.0
) -> Tensor:
    r"""Prototypes of old classes in a subspace that their samples never saw, from the classes that are like them.

    $\hat p_o = \sum_n \operatorname{softmax}_n(\cos(p_{o}, p_{n}) / \mathrm{temperature})\;p'_n$: similarity in the old
    subspace, prototypes p' of the new one.

    Args:
        old: (O, d), old classes in the old subspace. new: (N, d), new classes in the old subspace. new_in_new:
            (N, e), new classes in the new subspace. temperature: positive.

    Shapes: (O, d), (N, d), (N, e) -> (O, e). Differentiable.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: as `subspace_cosine_logits`, from knowledge of the method. Composition.
    """
    temperature = _check.number("temperature", temperature, low=0.0)
    if temperature == 0.0:
        raise ValueError("temperature: expected a positive number, got 0")
    _check.tensor("old", old, dim=2)
    _check.tensor("new", new, dim=2)
    _check.like("new", new, (new.shape[0], old.shape[1]), old, "old")
    weight = cosine_logits(old, new, 1 / temperature).softmax(1)
    p = _check.tensor("new_in_new", new_in_new, dim=2)
    _check.like("new_in_new", p, (weight.shape[1], p.shape[1]), old, "old")
    return weight @ p.to(weight.dtype)


def class_stats(
    x: Tensor, labels: Tensor, num_classes: int, *, normalize: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Class means and the covariance of rows about their own class's mean, pooled over classes.

    $\hat\Sigma = \frac1{n-1}\sum_i (x_i-\mu_{y_i})(x_i-\mu_{y_i})^\top$, the product of centred rows taken in steps.

    Args:
        x: (n, D), n at least 2, float32, float64, bfloat16 or float16; no gradient flows through them.
        labels: (n,) int64 in [0, num_classes). normalize: rows to length one first.

    Shapes: (n, D), (n,) -> counts (C,) int64, means (C, D), covariance (D, D), in float32 (float64 for float64).

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Wang et al., "A Hard-to-Beat Baseline for Training-free CLIP-based Adaptation", 2024. Composition over
    `class_moments`.
    """
    rows = _check.tensor("x", x, dim=2).detach()
    if rows.shape[0] < 2:
        raise ValueError(f"x: expected at least 2 rows, got shape {tuple(rows.shape)}")
    if normalize:
        rows = l2_normalize(rows)
    count, means, _ = class_moments(rows, labels, num_classes, covariance=False)
    total = means.new_zeros(rows.shape[1], rows.shape[1])
    for part, label in zip(rows.split(STEP), labels.split(STEP)):
        d = part.to(means.dtype) - means[label]
        total.addmm_(d.mT, d)
    return count, means, total / (rows.shape[0] - 1)


def gda_head(
    means: Tensor, covariance: Tensor, count: int, log_prior: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    r"""Gaussian discriminant analysis as a linear head, with a shrunk precision.

    $\Sigma^{-1} = D\,\bigl((n-1)\hat\Sigma + \operatorname{tr}(\hat\Sigma)\,I\bigr)^{-1}$ (Kubokawa and Srivastava's
    empirical Bayes form), $w_c = \Sigma^{-1}\mu_c$, $b_c = \log\pi_c - \frac12\mu_c^\top\Sigma^{-1}\mu_c$.

    Args:
        means: (C, D), float32 or float64; covariance: (D, D), positive semidefinite and not 0 (`class_stats`).
        count: n, the rows that the covariance was taken of; at least 2.
        log_prior: (C,), equal classes if None.

    Shapes: (C, D), (D, D) -> weight (C, D), bias (C,): `F.linear(x, weight, bias)`. Differentiable.

    Raises:
        ValueError, TypeError: naming the argument that does not fit; torch.linalg.LinAlgError where the matrix is not
            positive definite.

    Source: Wang et al., "A Hard-to-Beat Baseline for Training-free CLIP-based Adaptation", 2024; a Cholesky solve in
    place of the code's pseudo-inverse, which it equals. Composition.
    """
    m = _check.tensor("means", means, dim=2)
    classes, width = m.shape
    _check.like("covariance", covariance, (width, width), m, "means")
    if isinstance(count, bool) or not isinstance(count, int) or count < 2:
        raise ValueError(f"count: expected an int, at least 2, got {count!r}")
    m, sigma = m.to(accumulate_type(m)), covariance.to(accumulate_type(m))
    eye = torch.eye(width, dtype=sigma.dtype, device=sigma.device)
    shrunk = (count - 1) * sigma + sigma.trace() * eye
    weight = width * torch.cholesky_solve(m.mT, torch.linalg.cholesky(shrunk)).mT
    bias = -0.5 * (m * weight).sum(1)
    if log_prior is None:
        return weight, bias - math.log(classes)
    _check.like("log_prior", log_prior, (classes,), m, "means")
    return weight, bias + log_prior.to(bias.dtype)


def dual_head_logits(
    x: Tensor, texts: Tensor, weight: Tensor, bias: Tensor, alpha: float, scale: float = 100.0
) -> Tensor:
    r"""A text head and a linear head in one product: $\mathrm{scale}\,x T^\top + \alpha\,(x W^\top + b)$.

    Args:
        x: (B, D), usually of unit length; texts, weight: (C, D); bias: (C,).

    Shapes: (B, D), (C, D), (C, D), (C,) -> (B, C). Differentiable; `F.linear(x, scale * texts + alpha * weight, alpha *
    bias)`, so the merged head can be kept.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Wang et al., "A Hard-to-Beat Baseline for Training-free CLIP-based Adaptation", 2024. Composition.
    """
    _check.tensor("x", x, dim=2)
    t = _rows("texts", texts, x.shape[1], x, "x")
    _check.like("weight", weight, tuple(t.shape), x)
    _check.like("bias", bias, t.shape[:1], x)
    alpha, scale = _check.number("alpha", alpha), _check.number("scale", scale)
    acc = accumulate_type(x)
    merged = scale * t.to(acc) + alpha * weight.to(acc)
    return F.linear(x, merged.to(x.dtype), (alpha * bias.to(acc)).to(x.dtype))
