r"""Wasserstein barycenters, on a fixed support and on a free one: compositions.

Fixed support: over histograms p on the n points of the rows,
$\min_p \sum_k w_k \min_{P_k \in \Pi(p, h_k)} \langle P_k, C\rangle + \varepsilon\sum P_k \log P_k$ by iterative Bregman
projections, in the log domain: with $K = e^{-C/\varepsilon}$ and $P_k = \mathrm{diag}(u_k) K \mathrm{diag}(v_k)$

$$v_k = h_k / K^\top u_k,\qquad p = d \odot \prod_k (K v_k)^{w_k},\qquad u_k = p / K v_k ,$$

with d = 1; debiased, $d \leftarrow \sqrt{d \odot p / K d}$, which takes the blur of the entropy off again.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _check
from .._registry import accumulate_type
from .._route import full_precision
from .dense import sinkhorn
from .dense_arguments import TOTALS
from .dense_arguments import count as _count
from .plan import reads_values, transforms_active


def _mixture(weights: Tensor | None, count: int, like: Tensor) -> Tensor:
    if weights is None:
        return like.new_full((count,), 1.0 / count)
    _check.like("weights", weights, (count,), like, "measures")
    if reads_values(weights):
        if not bool((torch.isfinite(weights) & (weights >= 0)).all()):
            raise ValueError(
                "weights: expected finite numbers >= 0, got a negative, NaN or infinite one"
            )
        if not bool(weights.sum() > 0):
            raise ValueError("weights: expected a positive total, got zeros")
    return weights.to(like.dtype) / weights.sum()


FORBIDDEN = -1e30  # what stands for minus infinity: differences of it are numbers


def _check_histograms(h: Tensor, cost: Tensor, allowed: float) -> None:
    """The checks that read the data."""
    if not bool((torch.isfinite(h) & (h >= 0)).all()):
        raise ValueError(
            "histograms: expected finite masses >= 0, got a negative, NaN or infinite one"
        )
    total = h.double().sum(-1)
    if not bool((total > 0).all()):
        raise ValueError("histograms: expected a positive total, got a histogram of zeros")
    least, most = total.amin(-1), total.amax(-1)
    if bool((most - least > allowed * most).any()):
        k = int((most / least).argmax())
        raise ValueError(
            "histograms: expected equal totals, got "
            f"{float(least.flatten()[k]):.6g} and {float(most.flatten()[k]):.6g}"
        )
    if not bool((cost > -torch.inf).all()):  # False for a NaN
        raise ValueError("cost: expected numbers or +inf (a forbidden pair), got NaN or -inf")
    lonely = (cost == torch.inf).all(0)
    if bool((lonely & (h > 0)).any()):
        raise ValueError(
            "cost: a point of a histogram with mass has only forbidden pairs (inf), so no plan exists"
        )


def barycenter(
    histograms: Tensor,
    cost: Tensor,
    weights: Tensor | None = None,
    *,
    epsilon: float,
    max_iterations: int = 1000,
    tolerance: float = 1e-7,
    check_every: int = 10,
    debiased: bool = False,
) -> Tensor:
    r"""Entropic Wasserstein barycenter of histograms on a fixed support.

    Args:
        histograms: (..., K, m), each row >= 0 and of one total (1, usually), on the points of the columns.
        cost: (n, m), from the points that the barycenter may use to those of the histograms; for a shared grid
            n = m. +inf forbids a pair.
        weights: (K,), brought to total 1; equal if None.
        epsilon: > 0, in the units of cost. Log-domain: stable down to 1e-3 of the cost's range and below.
        max_iterations, tolerance: stops when an iteration moves the barycenter by at most so much (L1), looked
            at every `check_every` iterations with a host synchronisation; 0 looks at nothing.
        debiased: without the entropic blur (n = m and a symmetric cost): a histogram's barycenter with itself
            is itself.

    Shapes: histograms (..., K, m), cost (n, m) -> (..., n). float32, float64; half is computed in float32.

    Differentiable in histograms, cost and weights through the iterations, which are all kept for backward. An
    iteration takes 2 K n m exponentials and memory.

    Raises:
        ValueError, TypeError: naming the argument; what stands in the tensors is looked at on the CPU in eager mode.
    Warns:
        UserWarning: on the CPU in eager mode, if tolerance > 0 was not reached.

    Sources: Benamou et al., "Iterative Bregman Projections for Regularized Transportation Problems", 2015;
    Janati, Cuturi, Gramfort, "Debiased Sinkhorn barycenters", 2020.
    """
    _check.tensor("histograms", histograms, min_dim=2)
    _check.tensor("cost", cost, dim=2)
    count, m = histograms.shape[-2:]
    n = cost.shape[0]
    if count == 0 or n == 0 or m == 0:
        raise ValueError(
            f"histograms: expected at least one of at least one point, got {tuple(histograms.shape)} "
            f"and cost {tuple(cost.shape)}"
        )
    _check.like("cost", cost, (n, m), histograms, "histograms")
    if debiased and n != m:
        raise ValueError(
            f"cost: expected a square matrix for debiased=True, got {tuple(cost.shape)}"
        )
    epsilon = _check.number("epsilon", epsilon)
    if not epsilon > 0:
        raise ValueError(f"epsilon: expected a number > 0, got {epsilon!r}")
    tolerance = _check.number("tolerance", tolerance, low=0.0)
    _count("max_iterations", max_iterations)
    _count("check_every", check_every)
    acc = accumulate_type(histograms)
    h = histograms.to(acc)
    w = _mixture(weights, count, h).unsqueeze(-1)
    if reads_values(h):
        _check_histograms(h.detach(), cost.detach(), TOTALS[histograms.dtype])
    # Finite floors instead of -inf: the gradient at a point without mass is 0, not NaN.
    kernel = (-cost.to(acc) / epsilon).clamp(min=FORBIDDEN)
    log_h = torch.where(h == 0, torch.finfo(acc).tiny, h).log()
    u = h.new_zeros((*h.shape[:-1], n))
    d = h.new_zeros((*h.shape[:-2], n))
    p = torch.zeros_like(d)
    for k in range(max_iterations):
        before = p
        v = log_h - torch.logsumexp(u.unsqueeze(-1) + kernel, -2)
        kv = torch.logsumexp(v.unsqueeze(-2) + kernel, -1)
        p = (w * kv).sum(-2) + d
        u = p.unsqueeze(-2) - kv
        if debiased:
            d = 0.5 * (d + p - torch.logsumexp(d.unsqueeze(-1) + kernel, -2))
        if tolerance > 0 and k > 0 and k % check_every == 0:
            moved = (p.detach().exp() - before.detach().exp()).abs().sum(-1)
            if moved.numel() == 0 or not bool(moved.max() > tolerance):
                break
    else:
        eager_cpu = cost.device.type == "cpu" and not torch.compiler.is_compiling()
        if tolerance > 0 and eager_cpu and not transforms_active():
            warnings.warn(
                f"solera.barycenter: it still moved by more than tolerance={tolerance:g} after "
                f"max_iterations={max_iterations} at epsilon={epsilon:g}. Try more iterations, a larger "
                "epsilon or a larger tolerance.",
                UserWarning,
                stacklevel=2,
            )
    return p.exp()


@full_precision
def free_support_barycenter(
    points: Sequence[Tensor] | Tensor,
    support: Tensor,
    masses: Sequence[Tensor] | Tensor | None = None,
    weights: Tensor | None = None,
    *,
    epsilon: float,
    support_mass: Tensor | None = None,
    max_iterations: int = 20,
    sinkhorn_iterations: int = 200,
    tolerance: float = 0.0,
) -> Tensor:
    r"""Barycenter of point clouds whose points move: squared Euclidean cost, fixed masses.

    Alternates the plans $P_k$ from the support X to each cloud $Y_k$, by `sinkhorn` from the last potentials, with
    the barycentric projection $X \leftarrow \sum_k w_k\,\mathrm{diag}(1/b)\,P_k Y_k$.

    Args:
        points: K clouds, (m_k, d) each, or one tensor (K, m, d), which is solved as one batch.
        support: (n, d), the points to start from.
        masses: of each cloud, (m_k,) or (K, m); uniform if None.
        weights: (K,), brought to total 1; equal if None.
        epsilon: > 0, in squared units of the points.
        support_mass: (n,), b, > 0; uniform if None.
        max_iterations: moves of the support; sinkhorn_iterations: at each.
        tolerance: stops when a move has a sum of squares of at most this, with a host synchronisation; 0
            looks at nothing.

    Shapes: points K x (m_k, d), support (n, d) -> (n, d). float32, float64; half is computed in float32.

    Differentiable in points, support, masses and weights: implicitly through every plan, and unrolled over the
    moves. K n m_k of memory a move.

    Raises:
        ValueError, TypeError: naming the argument.

    Source: Cuturi, Doucet, "Fast Computation of Wasserstein Barycenters", 2014 (algorithm 2).
    """
    _check.tensor("support", support, dim=2)
    if isinstance(points, Tensor):
        _check.tensor("points", points, dim=3)
        clouds = [points]
        count = points.shape[0]
        if masses is not None and not isinstance(masses, Tensor):
            raise TypeError("masses: expected a tensor (K, m), as points is one tensor")
        given = [masses]
    else:
        clouds, count = list(points), len(points)
        given = [None] * count if masses is None else list(masses)
        if len(given) != count:
            raise ValueError(f"masses: expected {count}, one for each cloud, got {len(given)}")
    if count == 0:
        raise ValueError("points: expected at least one cloud, got none")
    for k, cloud in enumerate(clouds):
        _check.tensor(f"points[{k}]", cloud, min_dim=2)
        expected = (*cloud.shape[:-1], support.shape[-1])
        _check.like(f"points[{k}]", cloud, expected, support, "support")
    tolerance = _check.number("tolerance", tolerance, low=0.0)
    _count("max_iterations", max_iterations)
    acc = accumulate_type(support)
    x = support.to(acc)
    clouds = [cloud.to(acc) for cloud in clouds]
    w = _mixture(weights, count, x)
    parts = [w] if len(clouds) == 1 and clouds[0].dim() == 3 else list(w)
    if support_mass is None:
        mass = x.new_full((x.shape[0],), 1.0 / x.shape[0])
    else:
        mass = support_mass
        _check.like("support_mass", mass, (x.shape[0],), support, "support")
        if reads_values(mass) and not bool((mass > 0).all()):
            raise ValueError("support_mass: expected masses > 0, got one that is not")
    last: list[tuple[Tensor, Tensor] | None] = [None] * len(clouds)
    for _ in range(max_iterations):
        moved = torch.zeros_like(x)
        for k, cloud in enumerate(clouds):
            cost = (x.unsqueeze(-2) - cloud.unsqueeze(-3)).square().sum(-1)
            result = sinkhorn(
                cost,
                mass,
                given[k],
                epsilon=epsilon,
                max_iterations=sinkhorn_iterations,
                init=last[k],
            )
            last[k] = (result.f.detach(), result.g.detach())
            share = parts[k][..., None, None] * (result.plan() @ cloud)
            moved = moved + (share.sum(0) if share.dim() == 3 else share)
        moved = moved / mass.to(acc).unsqueeze(-1)
        step = (moved - x).detach().square().sum()
        x = moved
        if tolerance > 0 and bool(step <= tolerance):
            break
    return x
