r"""Low-rank optimal transport: a coupling of rank r that is never n x m. A composition.

$$\min_{Q, R, g}\ \langle C,\ Q\,\mathrm{diag}(1/g)\,R^\top\rangle - \varepsilon\,H(Q, R, g)\quad
  Q\mathbf 1 = a,\ R\mathbf 1 = b,\ Q^\top\mathbf 1 = R^\top\mathbf 1 = g \ge \alpha$$

by mirror descent: each step multiplies Q, R and g by exponentials of their gradients and projects back (in KL) by
Dykstra's algorithm, here in the log domain. With $C = AB^\top$ everything is $O((n + m)\,r\,k)$.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _check
from .._registry import accumulate_type
from .._route import full_precision, without_autocast
from .dense_arguments import TOTALS, check_weights
from .dense_arguments import count as _count
from .dense_arguments import weights as _weights
from .plan import reads_values


def squared_distance_factors(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """(A, B) with (A B^T)_ij = |x_i - y_j|^2, for `low_rank_sinkhorn`.

    Shapes: x (n, d), y (m, d) -> (n, d + 2), (m, d + 2). Both are centred first, which changes no distance and
    keeps the cancellation of the squares small. Differentiable.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    _check.tensor("x", x, dim=2)
    _check.tensor("y", y, dim=2)
    _check.like("y", y, (y.shape[0], x.shape[1]), x)
    centre = x.detach().mean(0)
    x, y = x - centre, y - centre
    xx, yy = x.square().sum(-1, keepdim=True), y.square().sum(-1, keepdim=True)
    return (
        torch.cat([xx, torch.ones_like(xx), -2 * x], -1),
        torch.cat([torch.ones_like(yy), yy, y], -1),
    )


@dataclass(frozen=True)
class LowRankResult:
    """A coupling Q diag(1/g) R^T.

    Attributes:
        q: (n, r), r: (m, r), g: (r,): its factors, not differentiable.
        cost: (), <C, Q diag(1/g) R^T>; differentiable in the cost or its factors with the coupling held (the
            envelope theorem, exact for epsilon = 0 at a stationary point).
        marginal_error: (), sum of the L1 errors of the four marginals.
        iterations: mirror descent steps done; converged: whether the last moved by at most the tolerance.

    Shapes: as stated; v in `apply` is (m, ...), in `apply_transposed` (n, ...).
    """

    q: Tensor
    r: Tensor
    g: Tensor
    cost: Tensor
    marginal_error: Tensor
    iterations: int
    converged: bool

    def plan(self) -> Tensor:
        """Q diag(1/g) R^T. Shapes: (n, m), stored whole."""
        with without_autocast(self.q):
            return (self.q / self.g) @ self.r.mT

    @full_precision
    def apply(self, v: Tensor) -> Tensor:
        """The plan times v, without the plan. Shapes: (m, ...) -> (n, ...)."""
        return torch.tensordot(self.q / self.g, torch.tensordot(self.r.mT, v, 1), 1)

    @full_precision
    def apply_transposed(self, v: Tensor) -> Tensor:
        """The plan's transpose times v, without the plan. Shapes: (n, ...) -> (m, ...)."""
        return torch.tensordot(self.r / self.g, torch.tensordot(self.q.mT, v, 1), 1)


def _check_values(left, right, a, b, allowed, least):
    """The checks that read the data."""
    check_weights(a, b, allowed)
    if not float(a.sum()) > least:
        raise ValueError(
            f"least_mass: expected rank * least_mass below the total {float(a.sum()):g}, got {least:g}"
        )
    for t in (left, right):
        if t is not None and not bool(torch.isfinite(t).all()):
            raise ValueError("cost: expected finite numbers, got a NaN or an infinite one")


def _dykstra(kernels, log_a, log_b, floor, iterations, tolerance):
    """KL projection of the kernels, given by their logarithms; logarithms of Q, R and g."""
    k1, k2, k3 = kernels
    zero = torch.zeros_like(k3)
    g, low, dual3 = k3, zero, zero
    v1 = v2 = dual1 = dual2 = zero
    for _ in range(iterations):
        u1 = log_a - torch.logsumexp(k1 + v1, -1)
        u2 = log_b - torch.logsumexp(k2 + v2, -1)
        raised = (g + low).clamp_min(floor)  # the set g >= alpha
        low, g = g + low - raised, raised
        s1 = torch.logsumexp(k1 + u1.unsqueeze(-1), 0)
        s2 = torch.logsumexp(k2 + u2.unsqueeze(-1), 0)
        # The set where both column sums are g: a geometric mean.
        mean = (g + dual3 + v1 + dual1 + s1 + v2 + dual2 + s2) / 3
        w1, w2 = mean - s1, mean - s2
        dual1, dual2, dual3 = v1 + dual1 - w1, v2 + dual2 - w2, g + dual3 - mean
        v1, v2, g = w1, w2, mean
        rows1 = (u1 + torch.logsumexp(k1 + v1, -1)).exp() - log_a.exp()
        rows2 = (u2 + torch.logsumexp(k2 + v2, -1)).exp() - log_b.exp()
        if not bool(rows1.abs().sum() + rows2.abs().sum() > tolerance):
            break
    return u1.unsqueeze(-1) + k1 + v1, u2.unsqueeze(-1) + k2 + v2, g


def _start(init, a, b, rank, seed):
    if init is not None:
        if not isinstance(init, tuple | list) or len(init) != 3:
            raise TypeError(f"init: expected None or (q, r, g), got {type(init).__name__}")
        shapes = ((a.shape[0], rank), (b.shape[0], rank), (rank,))
        for k, (t, shape) in enumerate(zip(init, shapes)):
            _check.like(f"init[{k}]", t, shape, a, "a")
        return [t.detach().to(a.dtype).clamp_min(torch.finfo(a.dtype).tiny).log() for t in init]
    # The independent coupling is a saddle point: something has to break the symmetry.
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: (
        1 + torch.rand(*shape, generator=generator, dtype=torch.float64).to(a.device, a.dtype)
    )
    total = a.sum()
    g = draw(rank)
    g = total * g / g.sum()
    q, r = draw(a.shape[0], rank), draw(b.shape[0], rank)
    q, r = (t / t.sum(-1, keepdim=True) * w.unsqueeze(-1) for t, w in ((q, a), (r, b)))
    tiny = torch.finfo(a.dtype).tiny
    return [t.clamp_min(tiny).log() for t in (q, r, g)]


@full_precision
def low_rank_sinkhorn(
    cost: Tensor | tuple[Tensor, Tensor],
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    rank: int,
    epsilon: float = 0.0,
    step_size: float = 10.0,
    least_mass: float = 1e-10,
    max_iterations: int = 500,
    dykstra_iterations: int = 200,
    tolerance: float = 1e-7,
    init: tuple[Tensor, Tensor, Tensor] | None = None,
    seed: int = 0,
) -> LowRankResult:
    r"""Optimal transport over couplings of nonnegative rank at most r, by mirror descent and Dykstra.

    Args:
        cost: (n, m), or its factors (A, B), (n, k) and (m, k), C = A B^T, of which no n x m matrix is made
            (`squared_distance_factors(x, y)` for points).
            Finite.
        a, b: (n,), (m,), >= 0, of equal totals; uniform (total 1) if None.
        rank: r >= 1, at most min(n, m).
        epsilon: >= 0, weight of the entropies of Q, R and g.
        step_size: > 0, of mirror descent: times the largest entry of C R / g and C^T Q / g at the start, divided by
            the square of the largest current gradient, so that the steps do not depend on the unit of cost.
        least_mass: alpha > 0, lower bound on g; rank * least_mass < total.
        max_iterations, dykstra_iterations: of the outer loop, and of each projection.
        tolerance: the outer loop stops where an iteration changes Q, R and g by at most this in L1; the
            projection stops at this marginal error. One host synchronisation a projection step.
        init: (q, r, g) to start from; random from `seed` if None. The problem is not convex.

    Shapes: cost (n, m) or ((n, k), (m, k)) -> q (n, r), r (m, r), g (r,). float32, float64; half is computed in
    float32.

    Raises:
        ValueError, TypeError: naming the argument.

    Source: Scetbon, Cuturi, Peyré, "Low-Rank Sinkhorn Factorization", 2021.
    """
    if isinstance(cost, Tensor):
        _check.tensor("cost", cost, dim=2)
        acc = accumulate_type(cost)
        left, right, like = cost.to(acc), None, cost
        n, m = cost.shape
    else:
        if not isinstance(cost, tuple | list) or len(cost) != 2:
            raise TypeError(
                f"cost: expected a tensor or a pair of factors, got {type(cost).__name__}"
            )
        _check.tensor("cost[0]", cost[0], dim=2)
        _check.tensor("cost[1]", cost[1], dim=2)
        _check.like("cost[1]", cost[1], (cost[1].shape[0], cost[0].shape[1]), cost[0], "cost[0]")
        acc = accumulate_type(cost[0])
        left, right = cost[0].to(acc), cost[1].to(acc)
        n, m = left.shape[0], right.shape[0]
        like = cost[0].new_empty(()).expand(n, m)
    _count("rank", rank)
    if rank > min(n, m):
        raise ValueError(f"rank: expected at most min(n, m) = {min(n, m)}, got {rank}")
    for name, value in (
        ("max_iterations", max_iterations),
        ("dykstra_iterations", dykstra_iterations),
    ):
        _count(name, value)
    epsilon = _check.number("epsilon", epsilon, low=0.0)
    tolerance = _check.number("tolerance", tolerance, low=0.0)
    step_size = _check.number("step_size", step_size)
    least_mass = _check.number("least_mass", least_mass)
    if not step_size > 0 or not least_mass > 0:
        raise ValueError(
            f"step_size, least_mass: expected numbers > 0, got {step_size!r} and {least_mass!r}"
        )
    kinds = [t.dtype for t in (a, b) if t is not None] or [acc]
    a, b = (_weights(k, t, c, like).detach() for k, t, c in (("a", a, n), ("b", b, m)))
    if reads_values(a):
        _check_values(left, right, a, b, max(TOTALS[k] for k in kinds), rank * least_mass)

    def times(t: Tensor) -> Tensor:
        return left @ t if right is None else left @ (right.mT @ t)

    def transposed_times(t: Tensor) -> Tensor:
        return left.mT @ t if right is None else right @ (left.mT @ t)

    with torch.no_grad():
        tiny = torch.finfo(acc).tiny
        log_a, log_b = a.clamp_min(tiny).log(), b.clamp_min(tiny).log()
        floor = float(torch.tensor(least_mass, dtype=torch.float64).log())
        state = _start(init, a, b, rank, seed)
        steps, converged, scale = 0, False, None
        while steps < max_iterations and not converged:
            steps += 1
            q, r, g = (t.exp() for t in state)
            cr, cq = times(r), transposed_times(q)
            gradients = [
                cr / g + epsilon * state[0],
                cq / g + epsilon * state[1],
                -(q * cr).sum(0) / g.square() + epsilon * state[2],
            ]
            most = torch.stack([t.abs().max() for t in gradients]).max()
            some = most > 1e3 * tiny  # else they are 0: nowhere to go
            most = torch.where(some, most, 1.0)
            if scale is None:  # the unit of cost
                scale = torch.maximum((cr / g).abs().max(), (cq / g).abs().max())
                scale = torch.where(scale > 0, scale, most)
            gamma = torch.where(some, step_size * (scale / most) / most, 0.0)
            kernels = [s - gamma * t for s, t in zip(state, gradients)]
            after = _dykstra(kernels, log_a, log_b, floor, dykstra_iterations, tolerance)
            moved = sum((s.exp() - t.exp()).abs().sum() for s, t in zip(after, state))
            state = list(after)
            converged = tolerance > 0 and bool(moved <= tolerance)
        q, r, g = (t.exp() for t in state)
        error = sum(
            (t.sum(dim) - w).abs().sum()
            for t, dim, w in ((q, 1, a), (r, 1, b), (q, 0, g), (r, 0, g))
        )
    value = (q / g * times(r)).sum()
    return LowRankResult(q, r, g, value, error, steps, converged)
