"""What `solera.sinkhorn.sinkhorn` returns."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from .. import _check
from .plan import transport_plan, within
from .plan_apply import plan_apply
from .plan_sums import plan_cost, plan_marginals


def _fits(shape: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    """Equal, number by number: torch.compile takes a tuple of symbols and one of numbers for different."""
    return len(shape) == len(expected) and all(m == n for m, n in zip(shape, expected))


@dataclass(frozen=True)
class SinkhornResult:
    r"""Potentials, value and state of a Sinkhorn solve; the plan on request.

    Attributes:
        f: (..., n) and g: (..., m), the dual potentials, in the gauge <a, f> = <b, g> if the problem is balanced;
            float32, or float64 for a float64 cost. Differentiable (implicitly) in cost, a, b.
        cost: (...), the dual value <a, f> + <b, g> - epsilon * sum_ij (P_ij - a_i b_j), which at
            convergence is <P, C> + epsilon * KL(P | a x b). Where a marginal is penalised by rho,
            -rho * <a, exp(-f / rho) - 1> stands for <a, f> and rho * KL(P 1 | a) is added. Differentiable
            (envelope theorem).
        iterations: (...), int64, iterations done, those of epsilon_scaling included.
        marginal_error: (...), sum_i |sum_j P_ij - a_i exp(-f_i / rho)| of the returned potentials (without rho
            the exponential is 1): how far the rows are from the marginal asked for. Columns meet theirs
            exactly, to rounding. Not differentiable.
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
    _lengths: Tensor | None = field(default=None, repr=False)

    def plan(self) -> Tensor:
        r"""The transport plan $P_{ij} = a_i b_j e^{(f_i + g_j - C_{ij})/\varepsilon}$.

        Shapes: (..., n, m). Differentiable in cost, a and b through f and g, by implicit differentiation.
        Computed at each call and not kept.
        """
        flat = transport_plan(*self._tensors(), self._epsilon, self._lengths)
        return flat.reshape(*self.f.shape, self.g.shape[-1])

    def _tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """cost (batch, n, m), a, b, f, g, the batch flattened."""
        cost, a, b = self._problem
        return cost, a, b, self.f.reshape(a.shape), self.g.reshape(b.shape)

    def apply(self, v: Tensor) -> Tensor:
        """P v, the plan applied to a function on the columns. Differentiable in v and the problem.

        Shapes: v (..., m) -> (..., n), or v (..., m, d) -> (..., n, d), (...) the batch, or no batch: one v for
        every problem. A v of as many dimensions as g is taken as (..., m). A large plan is made and used a block of
        rows at a time, backward too: it is never stored.

        Raises:
            ValueError, TypeError: v has neither shape, or another device or precision than the plan.
        """
        return self._applied(v, 1)

    def apply_transposed(self, v: Tensor) -> Tensor:
        """P^T v, the plan applied to a function on the rows. Differentiable in v and the problem.

        Shapes: v (..., n) -> (..., m), or v (..., n, d) -> (..., m, d), as in `apply`.

        Raises:
            ValueError, TypeError: as `apply`.
        """
        return self._applied(v, 0)

    def _applied(self, v: Tensor, side: int) -> Tensor:
        """P v for side 1, P^T v for side 0."""
        _check.tensor("v", v, min_dim=1)
        batch, count = tuple(self.f.shape[:-1]), (self.f, self.g)[side].shape[-1]
        vector = _fits(v.shape, (*batch, count)) or _fits(v.shape, (count,))
        if not vector and not (
            _fits(v.shape[:-1], (*batch, count)) or _fits(v.shape[:-1], (count,))
        ):
            raise ValueError(
                f"v: expected shape {(*batch, count)} or {(*batch, count, 'd')}, got {tuple(v.shape)}"
            )
        _check.like("v", v, tuple(v.shape), self._problem[0], "the plan")
        v = v.unsqueeze(-1) if vector else v
        out = self._product(v.to(self._problem[0].dtype), side)
        return out.squeeze(-1) if vector else out

    def _product(self, v: Tensor, side: int) -> Tensor:
        """P v for side 1, P^T v for side 0, v (..., k, d) or (k, d)."""
        v = self._inside(v, side)
        out = plan_apply(
            *self._tensors(),
            v if v.dim() == 2 else v.reshape(self._problem[0].shape[0], *v.shape[-2:]),
            self._epsilon,
            self._lengths,
            side == 0,
        )
        return out.reshape(*self.f.shape[:-1], *out.shape[-2:])

    def _inside(self, v: Tensor, side: int) -> Tensor:
        """v (..., k, d), 0 in the padding, where a NaN would reach the product."""
        if self._lengths is None:
            return v
        valid = within(self._lengths, self.f.shape[-1], self.g.shape[-1])[side]
        return torch.where(valid.reshape((self.f, self.g)[side].shape).unsqueeze(-1), v, 0.0)

    def marginals(self) -> tuple[Tensor, Tensor]:
        """The plan's row sums and column sums: a and b, as far as the iteration converged (or rho lets them).

        Shapes: (..., n), (..., m). Differentiable in cost, a and b, by implicit differentiation.
        """
        row, column = plan_marginals(*self._tensors(), self._epsilon, self._lengths)
        return row.reshape(self.f.shape), column.reshape(self.g.shape)

    def barycentric_projection(self, y: Tensor) -> Tensor:
        """Where each row's mass goes on average: (P y)_i / (P 1)_i. 0 for a row without mass.

        Shapes: y (..., m, d) or (m, d), the points of the columns -> (..., n, d). Differentiable in y, cost, a and b.

        Raises:
            ValueError, TypeError: y does not have that shape, or another device or precision.
        """
        _check.tensor("y", y, min_dim=2)
        batch, m = tuple(self.f.shape[:-1]), self.g.shape[-1]
        if not _fits(y.shape[:-1], (*batch, m)) and not _fits(y.shape[:-1], (m,)):
            raise ValueError(f"y: expected shape {(*batch, m, 'd')}, got {tuple(y.shape)}")
        _check.like("y", y, tuple(y.shape), self._problem[0], "the plan")
        y = y.to(self._problem[0].dtype)
        moved, mass = self._product(torch.cat([y, torch.ones_like(y[..., :1])], -1), 1).split(
            [y.shape[-1], 1], -1
        )
        return moved / torch.where(mass > 0, mass, 1.0)

    def transport_cost(self) -> Tensor:
        """<P, C>, the transport cost without the entropy; a forbidden pair (cost inf) counts as 0.

        Shapes: (...). Differentiable in cost, a and b, by implicit differentiation.
        """
        cost = plan_cost(*self._tensors(), self._epsilon, self._lengths)
        return cost.reshape(self.f.shape[:-1])


_NAMES = tuple(f.name for f in fields(SinkhornResult))


def _flatten(result: SinkhornResult) -> tuple[list[Any], float]:
    values = [getattr(result, name) for name in _NAMES if name not in ("_epsilon", "_lengths")]
    return values + ([] if result._lengths is None else [result._lengths]), result._epsilon


def _unflatten(values: Any, epsilon: float) -> SinkhornResult:
    f, g, cost, iterations, error, converged, problem, *lengths = values
    return SinkhornResult(f, g, cost, iterations, error, converged, problem, epsilon, *lengths)


_pytree.register_pytree_node(
    SinkhornResult,
    _flatten,
    _unflatten,
    serialized_type_name="solera.sinkhorn.SinkhornResult",
)
