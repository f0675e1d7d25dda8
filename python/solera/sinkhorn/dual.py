r"""The c-transform, the semi-dual that it leaves, and ascent on it: compositions of plain torch.

$$g^{c}_i = -\varepsilon\log\sum_j b_j e^{(g_j - C_{ij})/\varepsilon}\ \xrightarrow{\varepsilon \to 0}\
  \min_{j:\,b_j > 0}\,(C_{ij} - g_j),\qquad
  S(g) = \langle a, g^c\rangle + \langle b, g\rangle - \varepsilon\,(1 - \textstyle\sum b)\textstyle\sum a .$$

S is concave, its gradient is b minus the column sums of the plan (of the hard assignment for epsilon 0), and its
maximum is the value of the transport problem, that of `sinkhorn` for epsilon > 0.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from .. import _check
from .dense_arguments import count as _count
from .dense_arguments import weights as _weights
from .dense_reference import _potential


def _arguments(cost, g, b, epsilon):
    _check.tensor("cost", cost, min_dim=2)
    *batch, n, m = cost.shape
    if n == 0 or m == 0:
        raise ValueError(f"cost: expected at least one row and one column, got {tuple(cost.shape)}")
    _check.like("g", g, (*batch, m), cost, "cost")
    epsilon = 0.0 if epsilon is None else _check.number("epsilon", epsilon, low=0.0)
    weight = _weights("b", b, m, cost)
    return cost.to(weight.dtype), g.to(weight.dtype), weight, epsilon


@overload
def c_transform(
    cost: Tensor,
    g: Tensor,
    b: Tensor | None = ...,
    *,
    epsilon: float | None = ...,
    return_indices: Literal[False] = ...,
) -> Tensor: ...
@overload
def c_transform(
    cost: Tensor,
    g: Tensor,
    b: Tensor | None = ...,
    *,
    epsilon: float | None = ...,
    return_indices: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def c_transform(
    cost: Tensor,
    g: Tensor,
    b: Tensor | None = None,
    *,
    epsilon: float | None = None,
    return_indices: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""The c-transform of a potential g on the columns, a potential on the rows.

    $-\varepsilon\log\sum_j b_j e^{(g_j - C_{ij})/\varepsilon}$, or $\min_j (C_{ij} - g_j)$ over the columns with
    weight for epsilon None or 0. The transform of a potential f on the rows is `c_transform(cost.mT, f, a)`.

    Args:
        cost: (..., n, m), +inf forbids a pair; computed in float32, or float64 if that is its dtype.
        g: (..., m).
        b: (..., m) or (m,), weights of the columns; uniform if None (hard: only whether they are 0 counts).
        epsilon: >= 0, in the units of cost.
        return_indices: with the hard transform, also give the minimising column, the first of equals.

    Shapes: cost (..., n, m), g (..., m) -> (..., n), and indices (..., n) int64. A row without an allowed pair
    gives NaN (soft) or +inf (hard).

    Differentiable in cost, g and b: the gradient to g is minus the conditional plan, or one column.

    Raises:
        ValueError, TypeError: naming the argument.

    Source: Peyré, Cuturi, "Computational Optimal Transport", 2019, sections 5.1 and 5.3.
    """
    cost, g, weight, epsilon = _arguments(cost, g, b, epsilon)
    if epsilon > 0:
        if return_indices:
            raise ValueError(
                "return_indices: a soft transform (epsilon > 0) has no minimising column"
            )
        ones = torch.ones_like(cost[..., 0])
        return _potential(cost, g, weight, ones, epsilon)
    reduced = torch.where(weight.unsqueeze(-2) > 0, cost - g.unsqueeze(-2), torch.inf)
    index = reduced.argmin(-1, keepdim=True)
    value = reduced.gather(-1, index).squeeze(-1)
    return (value, index.squeeze(-1)) if return_indices else value


def semi_dual_cost(
    cost: Tensor,
    g: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    epsilon: float | None = None,
) -> Tensor:
    r"""The semi-dual objective $S(g)$ of optimal transport, a lower bound on its value for every g.

    $\langle a, g^c\rangle + \langle b, g\rangle$, less $\varepsilon\,(\sum a - \sum a\sum b)$, which is 0 for weights
    of total 1: at the solution's g it is `sinkhorn(...).cost` (the linear program's value for epsilon None or 0).

    Shapes: cost (..., n, m), g (..., m), a (..., n) or (n,), b (..., m) or (m,) -> (...).

    Differentiable in everything; the gradient to g is b minus the plan's column sums.

    Raises:
        ValueError, TypeError: naming the argument.

    Source: Cuturi, Peyré, "Semidual Regularized Optimal Transport", 2018.
    """
    f = c_transform(cost, g, b, epsilon=epsilon)
    a, b = _weights("a", a, cost.shape[-2], cost), _weights("b", b, cost.shape[-1], cost)
    value = (torch.where(a > 0, a * f, 0.0)).sum(-1) + (b * g).sum(-1)
    if epsilon:
        value = value - epsilon * (a.sum(-1) - a.sum(-1) * b.sum(-1))
    return value


def dual_ascent(
    cost: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    epsilon: float | None = None,
    steps: int = 100,
    step_size: float = 1.0,
    init: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Ascent on the semi-dual: potentials without the exponential of both marginals at once.

    With q the column sums of the plan of (g^c, g): $g \leftarrow g + s_k\,(b - q)/\max(b, q)$, where $s_k$ is
    step_size times epsilon, or for epsilon None or 0 step_size / sqrt(k) in the units of cost and g the mean of
    all iterates (supergradients do not vanish). Unlike Sinkhorn's iteration it works without regularisation.

    Args:
        cost, a, b: as in `sinkhorn`.
        epsilon: >= 0 or None.
        steps: >= 1.
        step_size: > 0; at most 1 ascends steadily for epsilon > 0.
        init: g to start from, (..., m); 0 if None.

    Shapes: cost (..., n, m) -> f (..., n) = g^c, g (..., m). Not differentiated.

    Raises:
        ValueError, TypeError: naming the argument.

    Source: Genevay et al., "Stochastic Optimization for Large-scale Optimal Transport", 2016 (full gradients).
    """
    _count("steps", steps)
    step_size = _check.number("step_size", step_size)
    if not step_size > 0:
        raise ValueError(f"step_size: expected a number > 0, got {step_size!r}")
    _check.tensor("cost", cost, min_dim=2)
    g = cost.new_zeros((*cost.shape[:-2], cost.shape[-1])) if init is None else init
    wide, g, wb, epsilon = _arguments(cost, g, b, epsilon)
    wa = _weights("a", a, cost.shape[-2], cost)
    with torch.no_grad():
        wide, g = wide.detach(), g.detach()
        mean = torch.zeros_like(g)
        for k in range(1, steps + 1):
            if epsilon > 0:
                f = c_transform(wide, g, wb, epsilon=epsilon)
                e = torch.exp((f.unsqueeze(-1) + g.unsqueeze(-2) - wide) / epsilon)
                q = wb * (wa.unsqueeze(-1) * e).sum(-2)
                step = step_size * epsilon
            else:
                _, index = c_transform(wide, g, wb, return_indices=True)
                q = torch.zeros_like(g).scatter_add(-1, index, wa.expand(index.shape))
                step = step_size / k**0.5
            most = torch.maximum(wb, q)
            g = g + step * torch.where(most > 0, (wb - q) / most, 0.0)
            mean = mean + (g - mean) / k
        g = g if epsilon > 0 else mean
        return c_transform(wide, g, wb, epsilon=epsilon), g
