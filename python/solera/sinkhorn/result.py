"""What `solera.sinkhorn.sinkhorn` returns."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from .plan import transport_plan


@dataclass(frozen=True)
class SinkhornResult:
    r"""Potentials, value and state of a Sinkhorn solve; the plan on request.

    Attributes:
        f: (..., n) and g: (..., m), the dual potentials in the gauge <a, f> = <b, g>; float32, or float64
            for a float64 cost. Differentiable (implicitly) in cost, a, b.
        cost: (...), the dual value <a, f> + <b, g> - epsilon * sum_ij (P_ij - a_i b_j), which at
            convergence is <P, C> + epsilon * KL(P | a x b). Differentiable (envelope theorem).
        iterations: (...), int64, iterations done.
        marginal_error: (...), sum_i |sum_j P_ij - a_i| of the returned potentials (the column marginal is
            met exactly, to rounding). Not differentiable.
        converged: (...), bool: marginal_error <= tolerance; False wherever a NaN stands.

    Shapes: (...) is the batch of the cost matrix (..., n, m) that was solved; a single problem has none.

    Under torch.compile a loss on `cost` alone leaves no linear solve in backward if it is inside the compiled
    function; a function that returns the whole result gets zero gradients for f and g, and solves for them.

    A pytree: it can be returned from a compiled function and mapped over.
    """

    f: Tensor
    g: Tensor
    cost: Tensor
    iterations: Tensor
    marginal_error: Tensor
    converged: Tensor
    _problem: tuple[Tensor, Tensor, Tensor] = field(repr=False)
    _epsilon: float = field(repr=False)

    def plan(self) -> Tensor:
        r"""The transport plan $P_{ij} = a_i b_j e^{(f_i + g_j - C_{ij})/\varepsilon}$.

        Shapes: (..., n, m). Differentiable in cost, a and b through f and g, by implicit differentiation.
        Computed at each call and not kept.
        """
        cost, a, b = self._problem
        flat = transport_plan(
            cost,
            a,
            b,
            self.f.reshape(a.shape),
            self.g.reshape(b.shape),
            self._epsilon,
        )
        return flat.reshape(*self.f.shape, self.g.shape[-1])

    def transport_cost(self) -> Tensor:
        """<P, C>, the transport cost without the entropy; a forbidden pair (cost inf) counts as 0.

        Shapes: (...). Differentiable in cost, a and b, by implicit differentiation.
        """
        cost = self._problem[0]
        cost = torch.where(cost == torch.inf, 0.0, cost).reshape(*self.f.shape, self.g.shape[-1])
        return (self.plan() * cost).sum((-2, -1))


_NAMES = tuple(f.name for f in fields(SinkhornResult))


def _flatten(result: SinkhornResult) -> tuple[list[Any], float]:
    return [getattr(result, name) for name in _NAMES[:-1]], result._epsilon


def _unflatten(values: Any, epsilon: float) -> SinkhornResult:
    f, g, cost, iterations, error, converged, problem = values
    return SinkhornResult(f, g, cost, iterations, error, converged, problem, epsilon)


_pytree.register_pytree_node(
    SinkhornResult,
    _flatten,
    _unflatten,
    serialized_type_name="solera.sinkhorn.SinkhornResult",
)
