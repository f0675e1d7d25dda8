"""The reference of core `dense`: the loop in plain torch, which autograd can follow (see dense.py)."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from .._registry import reference
from .plan import kernel_matrix, within


def _potential(cost: Tensor, g: Tensor, b: Tensor, a: Tensor, epsilon: float) -> Tensor:
    """The c-transform f_i = -epsilon log sum_j b_j exp((g_j - C_ij) / epsilon), cost (batch, n, m).

    A row in which nothing is allowed has no potential (NaN), or the potential 0 if it has no mass.
    """
    t = (g.unsqueeze(-2) - cost) / epsilon
    top = torch.where(b.unsqueeze(-2) > 0, t.detach(), -torch.inf).amax(-1)
    none = top == -torch.inf
    top = torch.where(none, 0.0, top)
    w = torch.exp((t - top.unsqueeze(-1)).clamp(max=math.log(torch.finfo(t.dtype).max) - 1))
    s = (b.unsqueeze(-2) * w).sum(-1)
    f = -epsilon * (torch.log(torch.where(none, 1.0, s)) + top)
    return torch.where(none & ~s.isnan(), torch.where(a == 0, 0.0, torch.nan), f)


def damping(epsilon: float, rho: float | None) -> float:
    """lambda = rho / (rho + epsilon), 1 for a hard marginal."""
    return 1.0 if rho is None else 1.0 / (1.0 + epsilon / rho)


def asked(f: Tensor, rho: float | None) -> Tensor:
    """exp(-f / rho): the marginal over its weight that a potential asks for; 1 on a hard side."""
    return torch.ones_like(f) if rho is None else torch.exp(-f / rho)


def dual_part(f: Tensor, rho: float | None) -> Tensor:
    """phi(f) = -rho (exp(-f / rho) - 1), f on a hard side."""
    return f if rho is None else -rho * torch.expm1(-f / rho)


@functools.lru_cache(maxsize=256)
def relaxation_range(epsilon: float, rho: float | None, momentum: float) -> tuple[float, float]:
    """The range of L = log(marginal / marginal asked for) in which the step by `momentum` is taken.

    There the over-relaxed step of a potential, -epsilon lambda w L, does not lower the dual value. That
    rises by epsilon a_i h_i times the function below, which is nonnegative near L = 0.
    """
    inverse = 0.0 if rho is None else epsilon / rho
    step = momentum / (1.0 + inverse)

    def rise(x: float) -> float:
        penalty = math.expm1(step * inverse * x) / inverse if inverse > 0 else step * x
        return math.exp(x) - math.exp(x * (1 - step)) - penalty

    def reach(sign: float) -> float:
        at = 0.0
        while at < 60 and rise(sign * (at + 0.05)) >= 0:
            at += 0.05
        return sign * at

    return reach(-1.0), reach(1.0)


def _update(cost, f, g, a, b, epsilon, rho, momentum):
    """The next f: the damped c-transform of g, over-relaxed where that is safe."""
    scale = damping(epsilon, rho)
    exact = scale * _potential(cost, g, b, a, epsilon)
    if momentum == 1:
        return exact
    low, high = relaxation_range(epsilon, rho, momentum)
    move = exact - f
    level = -move / (epsilon * scale)
    return exact + torch.where((level >= low) & (level <= high), (momentum - 1) * move, 0.0)


def _marginal(cost: Tensor, a: Tensor, b: Tensor, f: Tensor, g: Tensor, epsilon: float) -> Tensor:
    """sum_j b_j E_ij, 1 where the row marginal is met (and in a massless row of forbidden pairs)."""
    s = (kernel_matrix(cost, f, g, epsilon) * b.unsqueeze(-2)).sum(-1)
    return torch.where(a == 0, torch.where(s.isnan(), s, 1.0), s)


def sinkhorn_reference(
    cost, a, b, f, g, epsilon, max_iterations, tolerance, check_every,
    rho_a=None, rho_b=None, momentum=1.0, lengths=None,
):  # fmt: skip
    """The loop, one problem per batch item, without a host synchronisation; arguments as the op's."""
    if lengths is not None:
        rows, columns = within(lengths, *cost.shape[-2:])
        cost = torch.where(rows.unsqueeze(-1) & columns.unsqueeze(-2), cost, torch.inf)
        a, b = torch.where(rows, a, 0.0), torch.where(columns, b, 0.0)
        f = f if f is None else torch.where(rows, f, 0.0)
        g = g if g is None else torch.where(columns, g, 0.0)
    good = torch.isfinite(a).all(-1) & (a >= 0).all(-1) & torch.isfinite(b).all(-1)
    good = good & (b >= 0).all(-1) & (a.sum(-1) > 0) & (b.sum(-1) > 0)
    f = torch.zeros_like(a) if f is None else f
    g = torch.zeros_like(b) if g is None else g
    active = good
    iterations = torch.zeros_like(good, dtype=torch.int64)
    transposed = cost.transpose(-1, -2)

    def row_error(f, g):
        s = _marginal(cost, a, b, f, g, epsilon)
        return s, (a * (s - torch.where(a == 0, 1.0, asked(f, rho_a))).abs()).sum(-1)

    for k in range(max_iterations):
        if tolerance > 0 and k > 0 and k % check_every == 0:
            active = active & ~(row_error(f, g)[1] <= tolerance)
        # What is looked at, and what is returned, comes from a plain iteration.
        plain = k + 1 == max_iterations or (tolerance > 0 and (k + 1) % check_every == 0)
        w = 1.0 if plain else momentum
        moved_f = _update(cost, f, g, a, b, epsilon, rho_a, w)
        moved_g = _update(transposed, g, moved_f, b, a, epsilon, rho_b, w)
        f = torch.where(active.unsqueeze(-1), moved_f, f)
        g = torch.where(active.unsqueeze(-1), moved_g, g)
        iterations = iterations + active
    good = good & torch.isfinite(f).all(-1) & torch.isfinite(g).all(-1)
    f = torch.where(good.unsqueeze(-1), f, torch.nan)
    g = torch.where(good.unsqueeze(-1), g, torch.nan)
    s, error = row_error(f, g)
    wide = torch.float64
    total_a, total_b = a.to(wide).sum(-1), b.to(wide).sum(-1)
    left = (a.to(wide) * dual_part(f.to(wide), rho_a)).sum(-1)
    right = (b.to(wide) * dual_part(g.to(wide), rho_b)).sum(-1)
    shift = (right - left) / (total_a + total_b)
    if rho_a is not None or rho_b is not None:
        shift = torch.zeros_like(shift)
    mass = (a.to(wide) * s.to(wide)).sum(-1)
    value = left + right + shift * (total_a - total_b) - epsilon * (mass - total_a * total_b)
    value = value.to(cost.dtype)
    f = (f.to(wide) + shift.unsqueeze(-1)).to(cost.dtype)
    g = (g.to(wide) - shift.unsqueeze(-1)).to(cost.dtype)
    converged = error <= tolerance
    if lengths is not None:
        some = (lengths > 0).all(-1)
        f = torch.where(rows & some.unsqueeze(-1), f, 0.0)
        g = torch.where(columns & some.unsqueeze(-1), g, 0.0)
        value, error = torch.where(some, value, 0.0), torch.where(some, error, 0.0)
        converged = converged | ~some
    return f, g, value, iterations, error, converged


@reference("sinkhorn_dense")
def sinkhorn_dense(
    cost, a, b, f, g, epsilon, max_iterations, tolerance, check_every,
    rho_a=None, rho_b=None, momentum=1.0, lengths=None,
):  # fmt: skip
    """The op `sinkhorn_dense` where no kernel serves it."""
    return sinkhorn_reference(
        cost, a, b, f, g, epsilon, max_iterations, tolerance, check_every, rho_a, rho_b, momentum, lengths,
    )  # fmt: skip
