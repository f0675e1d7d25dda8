"""Assignments of points to centres without column balancing: hard, soft, smoothed over neighbours. Compositions."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _check
from .._registry import accumulate_type
from .._route import full_precision
from .dense_arguments import count as _count

LEAST = 1e-30  # a mass below it is none: the gradient of a mean divides by it


def kmeans_assign(x: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
    r"""The nearest centre of every point: $c_i = \arg\min_k \lVert x_i - m_k\rVert^2$, with that distance.

    Composition over `solera.ensemble.nearest_keys` (products in chunks, a running argmin). The distances are taken
    again from the differences to the centres found, so that none of a point lying on its centre is rounding.

    Shapes: x (N, d), centers (K, d) -> index (N,) int64, squared distance (N,), float32 (float64 for float64). No
    gradient.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Lloyd, "Least squares quantization in PCM", 1982; the step of Yu et al., "Diversify and Conquer", 2024.
    """
    from ..ensemble import nearest_keys  # at the call: the ensemble family imports this one

    _check.tensor("x", x, dim=2)
    _check.tensor("centers", centers, dim=2)
    _check.like("centers", centers, (centers.shape[0], x.shape[1]), x)
    if centers.shape[0] == 0:
        raise ValueError("centers: expected at least one, got none")
    with torch.no_grad():
        index = nearest_keys(x[None], centers[None])[0, :, 0]
        acc = accumulate_type(x)
        return index, (x.to(acc) - centers.to(acc)[index]).square().sum(1)


@full_precision
def laplacian_assign(
    x: Tensor,
    centers: Tensor,
    neighbors: Tensor,
    weights: Tensor | None = None,
    *,
    smoothness: float = 1.0,
    iterations: int = 20,
    labels: Tensor | None = None,
    update_centers: bool = True,
) -> tuple[Tensor, Tensor]:
    r"""Soft clusters whose points agree with their neighbours, by independent (Jacobi) updates of all points:

    $$s_p \leftarrow \operatorname{softmax}_k\bigl(-\lVert x_p - m_k\rVert^2 + \lambda \sum_q w_{pq} s_{qk}\bigr),
      \qquad m_k \leftarrow \sum_p s_{pk} x_p \big/ \sum_p s_{pk}.$$

    Rows with a label are held at it. A softmax a row and no balancing of the columns: not Sinkhorn. Composition, all
    tasks of a batch at once; a tape over the iterations gives the gradients.

    Args:
        x: (..., N, d), the points of each task; centers: (..., K, d), to start from.
        neighbors: (..., N, k) int64, indices of each point's neighbours in its task.
        weights: (..., N, k), $w_{pq}$; None is 1.
        smoothness: $\lambda \ge 0$. iterations: at least 1.
        labels: (..., N) int64, the class of a labelled point and -1 elsewhere; None if none is labelled.
        update_centers: False keeps the centres (the assignment's half of the steps alone). A centre whose mass is below
            1e-30 is kept as well.

    Shapes: -> assignments (..., N, K), centres (..., K, d), both in float32 (float64 for float64). Differentiable in x,
    centers and weights.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: "Transductive Few-Shot Learning: Clustering is All You Need?", 2021; the form of the updates is derived from
    its description.
    """
    _check.tensor("x", x, min_dim=2)
    *batch, n, d = x.shape
    _check.tensor("centers", centers, min_dim=2)
    k = centers.shape[-2]
    _check.like("centers", centers, (*batch, k, d), x)
    if k == 0:
        raise ValueError("centers: expected at least one, got none")
    near = _index("neighbors", neighbors, (*batch, n), x)
    if weights is not None:
        _check.like("weights", weights, tuple(near.shape), x)
    smoothness = _check.number("smoothness", smoothness, low=0.0)
    _count("iterations", iterations)
    acc = accumulate_type(x)
    points, middle = x.to(acc), centers.to(acc)
    # About the points' mean: |x - m|^2 is expanded below, and far from the origin its digits would cancel.
    origin = points.detach().mean(-2, keepdim=True) if n > 0 else torch.zeros_like(points[..., :1])
    points, middle = points - origin, middle - origin
    fixed, hot = None, points
    if labels is not None:
        if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
            raise TypeError(f"labels: expected int64, got {getattr(labels, 'dtype', type(labels))}")
        if labels.shape != (*batch, n):
            raise ValueError(
                f"labels: expected shape {(*batch, n)} to go with x of shape {tuple(x.shape)}, "
                f"got {tuple(labels.shape)}"
            )
        fixed = (labels >= 0).unsqueeze(-1)
        hot = torch.nn.functional.one_hot(labels.clamp(min=0), k).to(acc)
    flat = near.flatten(-2).unsqueeze(-1)
    s = None
    for _ in range(iterations):
        # |x|^2 is the same for every centre: the softmax does not see it.
        logits = 2 * points @ middle.mT - middle.square().sum(-1).unsqueeze(-2)
        if s is not None and smoothness > 0:
            around = s.gather(-2, flat.expand(*flat.shape[:-1], k)).unflatten(-2, near.shape[-2:])
            if weights is not None:
                around = around * weights.to(acc).unsqueeze(-1)
            logits = logits + smoothness * around.sum(-2)
        s = logits.softmax(-1)
        if fixed is not None:
            s = torch.where(fixed, hot, s)
        if update_centers:
            mass = s.sum(-2).unsqueeze(-1)
            some = mass > LEAST
            found = s.mT @ points / torch.where(some, mass, 1.0)
            middle = torch.where(some, found, middle)
    return s, middle + origin  # type: ignore[return-value]


def _index(name: str, value: object, rows: tuple[int, ...], x: Tensor) -> Tensor:
    if not isinstance(value, Tensor) or value.dtype != torch.int64:
        raise TypeError(f"{name}: expected int64, got {getattr(value, 'dtype', type(value))}")
    if value.dim() != len(rows) + 1 or tuple(value.shape[:-1]) != rows:
        raise ValueError(
            f"{name}: expected shape {(*rows, 'k')} to go with x of shape {tuple(x.shape)}, "
            f"got {tuple(value.shape)}"
        )
    return value


def soft_assign_pool(x: Tensor, groups: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    r"""Tokens pooled into groups that each token divides itself among:

    $$A_{nm} = \operatorname{softmax}_m(\langle x_n, g_m\rangle / \tau),\qquad
      y_m = \sum_n A_{nm} x_n \big/ \sum_n A_{nm}.$$

    A composition of two products.

    Shapes: x (..., n, d), groups (..., m, d) -> pooled (..., m, d), assignment (..., n, m), of x's dtype. A group whose
    mass is below 1e-30 is pooled to 0. Differentiable.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: "AttrSeg: Open-Vocabulary Semantic Segmentation via Attribute Decomposition-Aggregation", 2023: softmax over
    groups; the normalisation by the groups' mass is derived.
    """
    _check.tensor("x", x, min_dim=2)
    *batch, _, d = x.shape
    _check.tensor("groups", groups, min_dim=2)
    _check.like("groups", groups, (*batch, groups.shape[-2], d), x)
    temperature = _check.number("temperature", temperature, low=0.0)
    if temperature == 0.0:
        raise ValueError("temperature: expected a positive number, got 0")
    tokens = x.to(accumulate_type(x))
    share = (tokens @ groups.to(tokens.dtype).mT / temperature).softmax(-1)
    mass = share.sum(-2).unsqueeze(-1)
    some = mass > LEAST
    pooled = torch.where(some, share.mT @ tokens / torch.where(some, mass, 1.0), 0.0)
    return pooled.to(x.dtype), share.to(x.dtype)
