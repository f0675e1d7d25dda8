"""Predictions in a metric space of labels: Fréchet means of class probabilities, and the simplex projection."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import _check
from .._registry import accumulate_type
from .._route import without_autocast

CHUNK = 1 << 22  # expected costs held at once


def _metric(probabilities: Tensor, distances: Tensor, squared: bool) -> tuple[Tensor, Tensor]:
    """Both in the dtype that is computed in, the distances raised to their power."""
    _check.tensor("probabilities", probabilities, min_dim=1)
    _check.tensor("distances", distances, dim=2)
    labels, classes = distances.shape[0], probabilities.shape[-1]
    _check.like("distances", distances, (labels, classes), probabilities, "probabilities")
    if labels == 0 or classes == 0:
        raise ValueError(
            f"distances: expected at least one label and one class, got {tuple(distances.shape)}"
        )
    acc = accumulate_type(probabilities)
    d = distances.to(acc)
    return probabilities.to(acc), d.square() if squared else d


def frechet_argmin(
    probabilities: Tensor, distances: Tensor, *, squared: bool = True
) -> tuple[Tensor, Tensor]:
    r"""The label that is nearest to all classes in expectation: $\hat y_b = \arg\min_y \sum_k P_{bk} D_{yk}^2$.

    It replaces argmax where labels have a geometry, and it can predict labels that no class stands for (Y may be
    much larger than K). The expected cost is the optimal transport cost from $P_b$ to a Dirac at y, $W_2^2$ for
    squared distances and $W_1$ for plain ones. Composition: a product in chunks of rows and a running minimum; no
    (B, Y) tensor past 4 million elements.

    Args:
        probabilities: (..., K), classes' weights; they need not sum to one. float32, float64, bfloat16, float16.
        distances: (Y, K), from every label that may be predicted to every class.
        squared: square the distances (Fréchet mean); False takes them as they are (median).

    Shapes: (..., K), (Y, K) -> index (...) int64, value (...), the least expected cost in float32 (float64 for
    float64). No gradient; `frechet_assign` has one.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Roberts et al., "Geometry-Aware Adaptation for Pretrained Models" (Loki), 2023.
    """
    with torch.no_grad(), without_autocast(probabilities):
        p, d = _metric(probabilities, distances, squared)
        rows = p.reshape(-1, p.shape[-1])
        parts = [(r @ d.mT).min(1) for r in rows.split(max(1, CHUNK // d.shape[0]))]
        value = torch.cat([part.values for part in parts])
        index = torch.cat([part.indices for part in parts])
    return index.reshape(p.shape[:-1]), value.reshape(p.shape[:-1])


def project_simplex(x: Tensor) -> Tensor:
    r"""The nearest point of the probability simplex: $\arg\min_{p \ge 0,\ \sum_k p_k = 1} \lVert p - x\rVert^2$.

    $p = \max(x - \tau, 0)$, $\tau$ found from the sorted entries. Its Jacobian is
    $\mathrm{diag}(s) - s s^\top / \lvert s \rvert$ with s the indicator of the support, and so is its double
    backward right (zero almost everywhere). Composition.

    Shapes: (..., K) -> (..., K) of x's dtype. Differentiable.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Held, Wolfe, Crowder, "Validation of subgradient optimization", 1974; Duchi et al., "Efficient Projections
    onto the l1-Ball", 2008.
    """
    _check.tensor("x", x, min_dim=1)
    if x.shape[-1] == 0:
        raise ValueError(f"x: expected at least one entry, got shape {tuple(x.shape)}")
    wide = x.to(accumulate_type(x))
    # The threshold does not change with a shift: the largest entry at 0 keeps the sums small.
    wide = wide - wide.detach().amax(-1, keepdim=True)
    order = wide.detach().sort(-1, descending=True).values
    count = torch.arange(1, x.shape[-1] + 1, device=x.device, dtype=wide.dtype)
    held = order * count > order.cumsum(-1) - 1
    support = held.sum(-1, keepdim=True).clamp(min=1)
    at = order.gather(-1, support - 1)
    inside = (wide.detach() >= at).to(wide.dtype)
    # Ties at the border are all inside: the entry is then the threshold itself and adds nothing.
    tau = ((wide * inside).sum(-1, keepdim=True) - 1) / inside.sum(-1, keepdim=True)
    return (wide - tau).clamp(min=0).to(x.dtype)


class _OneHot(torch.autograd.Function):
    """The one-hot argmax of scores; backward as `frechet_assign` says."""

    @staticmethod
    def forward(ctx, scores, step):
        hot = torch.zeros_like(scores)
        hot.scatter_(-1, scores.argmax(-1, keepdim=True), 1.0)
        ctx.save_for_backward(hot)
        ctx.step = step
        return hot

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (hot,) = ctx.saved_tensors
        if ctx.step is None:
            return grad, None
        return hot - project_simplex(hot - ctx.step * grad), None


def frechet_assign(
    probabilities: Tensor,
    distances: Tensor,
    *,
    squared: bool = True,
    backward: str = "projected",
    step: float = 1.0,
) -> Tensor:
    r"""`frechet_argmin` as a one-hot row that trains: scores $-\sum_k P_{bk} D_{yk}^2$, then their argmax.

    An argmax has no gradient. In its place the scores receive, for a gradient g of the one-hot row h,

    - "straight_through": g itself,
    - "projected": $h - \Pi_\Delta(h - \mathrm{step}\cdot g)$, $\Pi_\Delta$ being `project_simplex` (SPIGOT).

    Args:
        probabilities: (..., K); distances: (Y, K), as in `frechet_argmin`.
        backward: "projected" or "straight_through". step: positive, of the projected form.

    Shapes: (..., K), (Y, K) -> (..., Y) of probabilities' dtype. Differentiable once, in probabilities and distances;
    a second derivative is refused.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Roberts et al., "Geometry-Aware Adaptation for Pretrained Models", 2023 (its public code puts a softmax in
    the projection's place); Peng, Thomson, Smith, "Backpropagating through Structured Argmax using a SPIGOT", 2018.
    """
    _check.choice("backward", backward, ("projected", "straight_through"))
    step = _check.number("step", step, low=0.0)
    if step == 0.0:
        raise ValueError("step: expected a positive number, got 0")
    p, d = _metric(probabilities, distances, squared)
    scores = -(p @ d.mT)
    return _OneHot.apply(scores, step if backward == "projected" else None).to(probabilities.dtype)
