"""Optimal transport between clouds of points: `sinkhorn_points` and its result. Core `streaming`."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from .. import _check
from .._registry import accumulate_type
from .._route import needs_graph
from .dense_arguments import TOTALS as _TOTALS
from .dense_arguments import bounds, check_bounds
from .dense_arguments import count as _count
from .plan import transforms_active, transport_plan, within
from .streaming import points_reference, points_softmin, solve_points
from .streaming_apply import COSTS, apply_density, cost_matrix

_NAMES_OF_COSTS = (*COSTS, "cosine")
GRADIENTS = ("auto", "unrolled", "none")
_EXPONENT = {"sqeuclidean": 2, "half_sqeuclidean": 2}  # p of a length's cost; 1 for the others


@dataclass(frozen=True)
class SinkhornPointsResult:
    r"""Potentials, value and state of `sinkhorn_points`; the plan as an operator that is never stored.

    Attributes:
        f: (..., n) and g: (..., m), the dual potentials, in the gauge <a, f> = <b, g> where both marginals are
            hard. Differentiable (implicitly, by conjugate gradients) in x, y, a, b.
        cost: (...), the dual value. Differentiable (envelope theorem).
        iterations: (...), int64, those of `epsilon_scaling` included.
        marginal_error: (...), sum_i |sum_j P_ij - a_i exp(-f_i / rho)| (hard: - a_i). Not differentiable.
        converged: (...), bool: marginal_error <= tolerance; False wherever a NaN stands.

    Shapes: (...) is the batch of the points (..., n, d). Memory of every method but `plan`: O((n + m) (d + k)).

    A pytree: it can be returned from a compiled function and mapped over.
    """

    f: Tensor
    g: Tensor
    cost: Tensor
    iterations: Tensor
    marginal_error: Tensor
    converged: Tensor
    _problem: tuple[Tensor, Tensor, Tensor, Tensor] = field(repr=False)
    _options: tuple[int, float] = field(repr=False)

    def _flat(self) -> tuple[Tensor, ...]:
        x, y, a, b = self._problem
        return x, y, a, b, self.f.reshape(a.shape), self.g.reshape(b.shape)

    def plan(self) -> Tensor:
        """P (..., n, m), the one thing here that takes n m memory. Differentiable like f and g.

        Shapes: (..., n, m).
        """
        x, y, a, b, f, g = self._flat()
        code, epsilon = self._options
        flat = transport_plan(cost_matrix(x, y, code), a, b, f, g, epsilon)
        return flat.reshape(*self.f.shape, self.g.shape[-1])

    def _product(self, v: Tensor, transposed: bool, power: int = 0) -> Tensor:
        x, y, a, b, f, g = self._flat()
        if transposed:
            x, y, a, b, f, g = y, x, b, a, g, f
        out = apply_density(x, y, f, g, b.unsqueeze(-1) * v, *self._options, power)
        return a.unsqueeze(-1) * out

    def _applied(self, name: str, v: Tensor, transposed: bool) -> Tensor:
        here, there = (self.g, self.f) if transposed else (self.f, self.g)
        batch = self.cost.shape
        if not isinstance(v, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(v).__name__}")
        vector = v.dim() == len(batch) + 1
        shape = (*batch, there.shape[-1]) if vector else (*batch, there.shape[-1], v.shape[-1])
        _check.like(name, v, tuple(shape), self._problem[0], "x")
        count = math.prod(batch)
        flat = v.to(self.f.dtype).reshape(count, there.shape[-1], 1 if vector else v.shape[-1])
        out = self._product(flat, transposed)
        return out.reshape(here.shape if vector else (*here.shape, v.shape[-1]))

    def apply(self, v: Tensor) -> Tensor:
        """P v, without P; differentiable in v, x, y, a and b.

        Shapes: v (..., m) or (..., m, k) -> (..., n) or (..., n, k).
        """
        return self._applied("v", v, False)

    def apply_transposed(self, v: Tensor) -> Tensor:
        """P^T v, without P; differentiable in v, x, y, a and b.

        Shapes: v (..., n) or (..., n, k) -> (..., m) or (..., m, k).
        """
        return self._applied("v", v, True)

    def marginals(self) -> tuple[Tensor, Tensor]:
        """(P 1, P^T 1).

        Shapes: (..., n) and (..., m).
        """
        x, y, *_ = self._flat()
        left = self._product(torch.ones_like(y[..., :1]), False)
        right = self._product(torch.ones_like(x[..., :1]), True)
        return left.reshape(self.f.shape), right.reshape(self.g.shape)

    def barycentric_projection(self, y: Tensor | None = None) -> Tensor:
        """sum_j P_ij y_j / sum_j P_ij: where the plan sends each x_i on average.

        Shapes: y (..., m, k), the points themselves if None (of unit length for a cosine) -> (..., n, k). Defined
        at a zero weight too.
        """
        xs, ys, a, b, f, g = self._flat()
        if y is None:
            values = ys
        else:
            _check.like("y", y, (*self.g.shape, y.shape[-1]), xs, "x")
            values = y.to(self.f.dtype).reshape(*b.shape, y.shape[-1])
        origin = values.detach()[..., :1, :]
        columns = torch.cat((values - origin, torch.ones_like(values[..., :1])), -1)
        out = apply_density(xs, ys, f, g, b.unsqueeze(-1) * columns, *self._options)
        mass = out[..., -1:]  # 0 without a column: a problem that is all padding
        out = torch.where(mass > 0, out[..., :-1] / torch.where(mass > 0, mass, 1.0) + origin, 0.0)
        return out.reshape(*self.f.shape, values.shape[-1])

    def transport_cost(self) -> Tensor:
        """<P, C>, the transport cost without the entropy. Differentiable like f and g.

        Shapes: (...).
        """
        y = self._problem[1]
        return (
            self._product(torch.ones_like(y[..., :1]), False, 1)
            .sum((-2, -1))
            .reshape(self.cost.shape)
        )


_NAMES = tuple(f.name for f in fields(SinkhornPointsResult))


def _flatten(result: SinkhornPointsResult) -> tuple[list[Any], Any]:
    return [getattr(result, name) for name in _NAMES[:-1]], result._options


def _unflatten(values: Any, options: Any) -> SinkhornPointsResult:
    f, g, cost, iterations, error, converged, problem = values
    return SinkhornPointsResult(f, g, cost, iterations, error, converged, problem, options)


_pytree.register_pytree_node(
    SinkhornPointsResult,
    _flatten,
    _unflatten,
    serialized_type_name="solera.sinkhorn.SinkhornPointsResult",
)


# ---- arguments ---------------------------------------------------------------------------------------


def check_points(x: Tensor, y: Tensor, cost: str) -> None:
    """Two clouds of one batch and one dimension."""
    _check.tensor("x", x, min_dim=2)
    _check.tensor("y", y, min_dim=2)
    _check.choice("cost", cost, _NAMES_OF_COSTS)
    if y.shape[:-2] != x.shape[:-2] or y.shape[-1] != x.shape[-1]:
        raise ValueError(
            f"y: expected the batch and the dimension of x, {(*x.shape[:-2], 'm', x.shape[-1])}, "
            f"got {tuple(y.shape)}"
        )
    if y.dtype != x.dtype:
        raise TypeError(f"y: expected {x.dtype} (that of x), got {y.dtype}")
    if y.device != x.device:
        raise ValueError(f"y: expected device {x.device} (that of x), got {y.device}")
    for name, points in (("x", x), ("y", y)):
        if points.shape[-2] == 0 or points.shape[-1] == 0:
            raise ValueError(
                f"{name}: expected at least one point and one dimension, got {tuple(points.shape)}"
            )


def weights_of(name: str, value: Tensor | None, points: Tensor, points_name: str) -> Tensor:
    """(batch, count) in the dtype computed in; uniform of total 1 for None."""
    *batch, count, _ = points.shape
    acc = accumulate_type(points)
    if value is None:
        flat = points.new_full((1,), 1.0 / count, dtype=acc).expand(*batch, count)
    else:
        shared = isinstance(value, Tensor) and value.dim() == 1
        shape = (count,) if shared else (*batch, count)
        _check.like(name, value, shape, points, points_name)
        flat = value.to(acc).expand(*batch, count)
    return flat.reshape(math.prod(batch), count)


def flat_points(points: Tensor, cost: str) -> Tensor:
    """(batch, count, d) in the dtype computed in; on the unit sphere for "cosine"."""
    flat = points.to(accumulate_type(points)).reshape(-1, *points.shape[-2:])
    if points.numel() == 0:
        flat = points.to(accumulate_type(points)).reshape(
            math.prod(points.shape[:-2]), *points.shape[-2:]
        )
    return torch.nn.functional.normalize(flat, dim=-1) if cost == "cosine" else flat


def code_of(cost: str) -> int:
    """The op's number of a cost: a cosine is half a square on the sphere."""
    return COSTS["half_sqeuclidean" if cost == "cosine" else cost]


def _positive(name: str, value: object) -> float:
    number = _check.number(name, value)
    if not number > 0:
        raise ValueError(f"{name}: expected a number > 0, got {value!r}")
    return number


def rhos_of(reach: Any, cost: str) -> tuple[float, float]:
    """rho = reach^p of each side; -1 for a hard marginal."""
    pair = reach if isinstance(reach, tuple | list) else (reach, reach)
    if len(pair) != 2:
        raise ValueError(f"reach: expected a number or a pair, got {len(pair)} values")
    p = _EXPONENT.get(cost, 1)
    left, right = (-1.0 if r is None else _positive("reach", r) ** p for r in pair)
    return left, right


MOST_STEPS = 100_000  # of epsilon_scaling: a ratio that rounds to 1 would never end


def _schedule(epsilon_scaling: Any, epsilon: float) -> list[float]:
    if epsilon_scaling is None:
        return [epsilon]
    if isinstance(epsilon_scaling, int | float) and not isinstance(epsilon_scaling, bool):
        epsilon_scaling = (epsilon_scaling, 0.5)
    if not isinstance(epsilon_scaling, tuple | list):
        raise TypeError(
            "epsilon_scaling: expected None, a number, a pair (start, ratio) or a list of epsilons, got "
            f"{type(epsilon_scaling).__name__}"
        )
    if isinstance(epsilon_scaling, tuple):
        if len(epsilon_scaling) != 2:
            raise ValueError(
                f"epsilon_scaling: expected (start, ratio), got {len(epsilon_scaling)} values"
            )
        value = _positive("epsilon_scaling", epsilon_scaling[0])
        ratio = _positive("epsilon_scaling", epsilon_scaling[1])
        if not ratio < 1:
            raise ValueError(f"epsilon_scaling: expected a ratio in (0, 1), got {ratio!r}")
        steps = []
        while value > epsilon:
            steps.append(value)
            value *= ratio
            if len(steps) > MOST_STEPS:
                raise ValueError(
                    f"epsilon_scaling: reaches epsilon={epsilon:g} in more than {MOST_STEPS} iterations; "
                    "lower the ratio"
                )
        return [*steps, epsilon]
    return [*(_positive("epsilon_scaling", e) for e in epsilon_scaling), epsilon]


def _initial(init: Any, x: Tensor, y: Tensor) -> tuple[Tensor | None, Tensor | None]:
    if init is None:
        return None, None
    if isinstance(init, SinkhornPointsResult):
        init = (init.f, init.g)
    if not isinstance(init, tuple | list) or len(init) != 2:
        raise TypeError(
            f"init: expected None, a pair (f, g) or a SinkhornPointsResult, got {type(init).__name__}"
        )
    out = []
    for k, points in enumerate((x, y)):
        _check.like(f"init[{k}]", init[k], tuple(points.shape[:-1]), x)
        flat = init[k].detach().to(accumulate_type(x))
        out.append(flat.reshape(math.prod(points.shape[:-2]), points.shape[-2]))
    return out[0], out[1]


def _without_padding(points: Tensor, weight: Tensor, given: bool, inside: Tensor, some: Tensor):
    """Points and weights of padded clouds: the padding lies on the cloud's first point and weighs nothing.

    An item without points (not some) gets the weights of one at the origin, so that its numbers stay finite.
    """
    first = torch.where(some[:, None, None], points.detach()[:, :1], 0.0)
    points = torch.where(inside[..., None], points, first)
    weight = weight if given else 1.0 / inside.sum(-1, keepdim=True).clamp(min=1).to(weight.dtype)
    weight = torch.where(inside, weight, 0.0)
    alone = torch.arange(points.shape[-2], device=points.device) == 0
    return points, torch.where(some[:, None], weight, alone.to(weight.dtype))


def check_values(x: Tensor, y: Tensor, a: Tensor, b: Tensor, kinds: list, balanced: bool) -> None:
    """The checks that read the data."""
    for name, t in (("x", x), ("y", y)):
        if not bool(torch.isfinite(t).all()):
            raise ValueError(f"{name}: expected finite points, got a NaN or an infinite one")
    for name, weight in (("a", a), ("b", b)):
        if not bool((torch.isfinite(weight) & (weight >= 0)).all()):
            raise ValueError(
                f"{name}: expected finite weights >= 0, got a negative, NaN or infinite one"
            )
        if not bool((weight.sum(-1) > 0).all()):
            raise ValueError(f"{name}: expected a positive total, got a marginal of zeros")
    total_a, total_b = a.double().sum(-1), b.double().sum(-1)
    apart = (total_a - total_b).abs() / total_a.maximum(total_b)
    if balanced and apart.numel() and float(apart.max()) > max(_TOTALS[k] for k in kinds):
        digits = 12 if float(apart.max()) < 1e-5 else 6
        k = int(apart.argmax())
        raise ValueError(
            f"a, b: expected equal totals, got {float(total_a[k]):.{digits}g} and {float(total_b[k]):.{digits}g}; "
            "reach= allows unequal ones"
        )


def sinkhorn_points(
    x: Tensor,
    y: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    cost: str = "sqeuclidean",
    epsilon: float,
    max_iterations: int = 100,
    tolerance: float = 0.0,
    check_every: int = 10,
    reach: float | tuple[float | None, float | None] | None = None,
    epsilon_scaling: float | tuple[float, float] | list[float] | None = None,
    init: SinkhornPointsResult | tuple[Tensor, Tensor] | None = None,
    momentum: float = 1.0,
    lengths: tuple[Tensor | int | None, Tensor | int | None] | None = None,
    gradient: str = "auto",
    validate: bool | None = None,
) -> SinkhornPointsResult:
    r"""Entropic optimal transport between two clouds of points, in O((n + m) d) memory.

    Minimises $\langle P, C\rangle + \varepsilon\,\mathrm{KL}(P|ab^\top)$ with $C_{ij} = c(x_i, y_j)$ over plans
    with marginals a and b (or with $\rho\,\mathrm{KL}$ of the marginals to them); conventions as in `sinkhorn`.

    Args:
        x, y: (..., n, d) and (..., m, d), of one dtype; half precision is computed in float32.
        a, b: (..., n) and (..., m), or (n,) and (m,) for every batch item; >= 0, of equal totals unless `reach`
            is given; uniform (total 1) if None.
        cost: "sqeuclidean" |x - y|^2, "half_sqeuclidean" |x - y|^2 / 2, "euclidean" |x - y|, "cosine"
            1 - <x, y> / |x||y|, "dot" -<x, y>, "l1" sum |x_k - y_k|. Any cost <phi(x), psi(y)> is "dot" of
            features: sinkhorn_points(-phi(x), psi(y), cost="dot").
        epsilon: > 0, in the units of the cost.
        max_iterations: >= 1, at the target epsilon.
        tolerance: an item stops when the L1 error of its row marginal is at most this, looked at after every
            `check_every` iterations, on the device. 0 runs max_iterations.
        reach: a length: the marginals are soft, rho = reach^p with p = 2 for squares and 1 otherwise; a pair for
            each side, None for a hard one.
        epsilon_scaling: one iteration at each of decreasing epsilons before the target: a list of them, or
            (start, ratio) for start, start * ratio, ...; a number is a start, with ratio 0.5.
        init: potentials (f, g) or an earlier result to start from; not differentiated.
        momentum: over-relaxation of both updates, in (0, 2); 1 is plain Sinkhorn. 1.5 to 1.9 takes fewer
            iterations at a small epsilon; it may not converge from a poor start.
        lengths: (numbers of points in x, in y), integer tensors of the batch's shape (or an int, or None for all)
            of padded clouds: what lies behind is neither read nor weighed, its potentials are 0; uniform
            marginals are uniform over the points there are. A problem without points has cost 0.
        gradient: "auto": envelope for `cost`, implicit for everything else. "unrolled": autograd through the
            iterations of the reference, which holds n x m matrices of each (for comparison). "none".
        validate: check values (NaN, negative weights, totals, lengths) and raise. None: on for CPU tensors in
            eager mode, off elsewhere. Without it a bad batch item has NaN potentials and converged = False.

    Coordinates so large that a cost overflows the dtype (squares of 1e30 in float32) give NaN in their batch item.

    Shapes: x (..., n, d), y (..., m, d) -> f (..., n), g (..., m), cost, iterations, marginal_error,
    converged (...). float32, float64; half precision computed and returned in float32.

    Gradients flow from `result.cost` to x, y, a, b by the envelope theorem, and from f, g and the methods by
    implicit differentiation (conjugate gradients, no tape); both stream. Hessian-vector products of the cost
    stream too for squares, cosine and products; other second derivatives hold the n x m matrix.

    Raises:
        ValueError, TypeError: naming the argument.
    Warns:
        UserWarning: on the CPU in eager mode, if tolerance > 0 was not reached.

    Sources: Cuturi, "Sinkhorn Distances", 2013; Feydy et al., "Interpolating between Optimal Transport and MMD
    using Sinkhorn Divergences", 2019; Séjourné et al., "Sinkhorn Divergences for Unbalanced Optimal Transport",
    2019; over-relaxation: Thibault et al., "Overrelaxed Sinkhorn-Knopp Algorithm", 2017.
    """
    check_points(x, y, cost)
    epsilon = _positive("epsilon", epsilon)
    tolerance = _check.number("tolerance", tolerance, low=0.0)
    momentum = _positive("momentum", momentum)
    if not momentum < 2:
        raise ValueError(f"momentum: expected a number in (0, 2), got {momentum!r}")
    _count("max_iterations", max_iterations)
    _count("check_every", check_every)
    _check.choice("gradient", gradient, GRADIENTS)
    _check.choice("validate", validate, (None, True, False))
    rho_a, rho_b = rhos_of(reach, cost)
    epsilons = _schedule(epsilon_scaling, epsilon)
    *batch, n, _ = x.shape
    m = y.shape[-2]
    flat_a, flat_b = weights_of("a", a, x, "x"), weights_of("b", b, y, "y")
    f0, g0 = _initial(init, x, y)
    limits = bounds(
        lengths, x, (*batch, n, m), f"x of shape {tuple(x.shape)} and y of {tuple(y.shape)}"
    )
    rows = columns = some = None
    if limits is None:
        flat_x, flat_y = flat_points(x, cost), flat_points(y, cost)
    else:
        flat_x, flat_y = flat_points(x, "padded"), flat_points(y, "padded")
        limits = limits.reshape(math.prod(batch), 2)
        rows, columns = within(limits, n, m)
        some = (limits > 0).all(-1)
        flat_x, flat_a = _without_padding(flat_x, flat_a, a is not None, rows, some)
        flat_y, flat_b = _without_padding(flat_y, flat_b, b is not None, columns, some)
        flat_x, flat_y = flat_points(flat_x, cost), flat_points(flat_y, cost)
    plain = not torch.compiler.is_compiling() and not transforms_active()
    eager_cpu = x.device.type == "cpu" and plain
    if plain and (eager_cpu if validate is None else validate):
        kinds = [t.dtype for t in (a, b) if t is not None] or [accumulate_type(x)]
        if limits is not None:
            check_bounds(limits, n, m)
        seen_x, seen_y = (x, y) if limits is None else (flat_x, flat_y)
        check_values(
            seen_x.detach(), seen_y.detach(), flat_a.detach(), flat_b.detach(), kinds,
            rho_a < 0 and rho_b < 0,
        )  # fmt: skip
    code = code_of(cost)
    if gradient == "none":
        flat_x, flat_y, flat_a, flat_b = (t.detach() for t in (flat_x, flat_y, flat_a, flat_b))
    unrolled = gradient == "unrolled" and needs_graph(flat_x, flat_y, flat_a, flat_b)
    f, g, value, iterations, error, converged = (points_reference if unrolled else solve_points)(
        flat_x, flat_y, flat_a, flat_b, f0, g0, code, epsilons, rho_a, rho_b, momentum,
        max_iterations, tolerance, check_every,
    )  # fmt: skip
    if rows is not None and columns is not None and some is not None:
        f = torch.where(rows & some[:, None], f, 0.0)
        g = torch.where(columns & some[:, None], g, 0.0)
        value, error = torch.where(some, value, 0.0), torch.where(some, error, 0.0)
        iterations = torch.where(some, iterations, 0)
        converged = converged | ~some
        flat_a, flat_b = (torch.where(some[:, None], t, 0.0) for t in (flat_a, flat_b))
    if tolerance > 0 and eager_cpu and not bool(converged.all()):
        warnings.warn(
            f"solera.sinkhorn_points: {int((~converged).sum())} of {math.prod(batch)} problems have a marginal "
            f"error above tolerance={tolerance:g} after max_iterations={max_iterations} (largest "
            f"{float(error.max()):.3g}); raise max_iterations or epsilon, or try epsilon_scaling or momentum",
            UserWarning,
            stacklevel=2,
        )
    shape = tuple(batch)
    return SinkhornPointsResult(
        f.reshape(*shape, n),
        g.reshape(*shape, m),
        value.reshape(shape),
        iterations.reshape(shape),
        error.reshape(shape),
        converged.reshape(shape),
        (flat_x, flat_y, flat_a, flat_b),
        (code, epsilon),
    )


def soft_c_transform(
    x: Tensor,
    y: Tensor,
    g: Tensor,
    b: Tensor | None = None,
    *,
    cost: str = "sqeuclidean",
    epsilon: float,
) -> Tensor:
    r"""The soft c-transform $f_i = -\varepsilon\log\sum_j b_j e^{(g_j - c(x_i, y_j))/\varepsilon}$, streaming.

    Extends potentials g, given at y, to any points x. Differentiable in x, y, g and b.

    Shapes: x (..., n, d), y (..., m, d), g (..., m), b (..., m) or (m,) (uniform if None) -> (..., n).

    Raises:
        ValueError, TypeError: naming the argument.

    Source: Cuturi, Peyré, "Computational Optimal Transport", 2019, section 5.3.
    """
    check_points(x, y, cost)
    epsilon = _positive("epsilon", epsilon)
    weight = weights_of("b", b, y, "y")
    _check.like("g", g, tuple(y.shape[:-1]), y, "y")
    flat = g.to(weight.dtype).reshape(weight.shape)
    f = points_softmin(
        flat_points(x, cost), flat_points(y, cost), flat, weight, code_of(cost), epsilon
    )
    return f.reshape(x.shape[:-1])
