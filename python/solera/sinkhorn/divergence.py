"""Sinkhorn divergences between clouds of points: compositions over core `streaming`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .points import (
    _schedule,
    check_points,
    code_of,
    flat_points,
    rhos_of,
    sinkhorn_points,
    weights_of,
)
from .streaming import damping, points_softmin, run_symmetric, solve_alone


def sinkhorn_divergence(
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
    reach: float | None = None,
    epsilon_scaling: float | tuple[float, float] | list[float] | None = None,
    momentum: float = 1.0,
    debias: bool = True,
    validate: bool | None = None,
) -> Tensor:
    r"""The Sinkhorn divergence, streaming: O((n + m) d) memory.

    $$S(a, b) = \mathrm{OT}(a, b) - \tfrac12 \mathrm{OT}(a, a) - \tfrac12 \mathrm{OT}(b, b)
      + \tfrac\varepsilon2 \left(\textstyle\sum a - \sum b\right)^2$$

    with OT the value of `sinkhorn_points`. The two terms of a cloud with itself take the averaged symmetric
    iteration $f \leftarrow \frac12 (f + S(f))$, max_iterations of them. `debias=False` gives OT(a, b).

    Args: as `sinkhorn_points`; `reach` is one length for both sides.

    Shapes: x (..., n, d), y (..., m, d), a (..., n) or (n,), b (..., m) or (m,) -> (...). float32, float64; half
    precision computed and returned in float32. Differentiable in x, y, a, b (envelope theorem, streaming).

    Raises:
        ValueError, TypeError: naming the argument.

    Sources: Feydy et al., "Interpolating between Optimal Transport and MMD using Sinkhorn Divergences", 2019;
    Séjourné et al., "Sinkhorn Divergences for Unbalanced Optimal Transport", 2019.
    """
    if isinstance(reach, tuple | list):
        raise TypeError(f"reach: expected None or one number for both sides, got {reach!r}")
    result = sinkhorn_points(
        x, y, a, b, cost=cost, epsilon=epsilon, max_iterations=max_iterations, tolerance=tolerance,
        check_every=check_every, reach=reach, epsilon_scaling=epsilon_scaling, momentum=momentum,
        validate=validate,
    )  # fmt: skip
    if not debias:
        return result.cost
    rho, _ = rhos_of(reach, cost)
    epsilons = _schedule(epsilon_scaling, float(epsilon))
    epsilons = epsilons + [float(epsilon)] * max_iterations
    flat_x, flat_y, flat_a, flat_b = result._problem
    code = code_of(cost)
    _, own_x = solve_alone(flat_x, flat_a, code, epsilons, rho)
    _, own_y = solve_alone(flat_y, flat_b, code, epsilons, rho)
    masses = (flat_a.sum(-1) - flat_b.sum(-1)).square()
    total = result.cost.reshape(own_x.shape) - 0.5 * (own_x + own_y)
    return (total + 0.5 * float(epsilon) * masses).reshape(result.cost.shape)


# ---- the annealed losses of SamplesLoss --------------------------------------------------------------


def annealing(p: float, diameter: float, blur: float, scaling: float) -> list[float]:
    """diameter^p, the same, then times scaling^p while above blur^p, and blur^p."""
    start, stop, step = p * math.log(diameter), p * math.log(blur), p * math.log(scaling)
    count = max(0, math.ceil((stop - start) / step))
    middle = [math.exp(start + k * step) for k in range(count)]
    return [diameter**p, *middle, blur**p]


def diameter_of(x: Tensor, y: Tensor) -> float:
    """The diagonal of the box around both clouds (..., n, d): an upper bound of every distance."""
    with torch.no_grad():
        ends = [t.detach().reshape(-1, t.shape[-1]) for t in (x, y)]
        low = torch.minimum(ends[0].amin(0), ends[1].amin(0))
        high = torch.maximum(ends[0].amax(0), ends[1].amax(0))
        return float(torch.linalg.vector_norm((high - low).double()))


def _last_step(x, y, g, b, code, epsilon, scale):
    """One more update, differentiable in x alone: what the gradients of these losses come from."""
    return scale * points_softmin(x, y.detach(), g, b.detach(), code, epsilon)


def annealed_potentials(
    x: Tensor,
    y: Tensor,
    a: Tensor,
    b: Tensor,
    code: int,
    steps: list[float],
    rho: float,
    debias: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(f, g, f_x, g_y): potentials of x with y and of each with itself after the annealed averaged updates.

    Shapes: x (batch, n, d), y (batch, m, d), a (batch, n), b (batch, m) -> (batch, n), (batch, m), the same.
    """
    epsilons = [steps[0], *steps]
    epsilon = steps[-1]
    scale = damping(epsilon, rho)
    held = [t.detach() for t in (x, y, a, b)]
    with torch.no_grad():
        f, g = run_symmetric(*held, code, epsilons, rho)
    new_f = _last_step(x, y, g, b, code, epsilon, scale)
    new_g = _last_step(y, x, f, a, code, epsilon, scale)
    if not debias:
        return new_f, new_g, None, None
    own = []
    for points, weight in ((x, a), (y, b)):
        with torch.no_grad():
            h, _ = run_symmetric(points.detach(), None, weight.detach(), None, code, epsilons, rho)
        own.append(_last_step(points, points, h, weight, code, epsilon, scale))
    return new_f, new_g, own[0], own[1]


def _soft_weight(t: Tensor, rho: float, epsilon: float) -> Tensor:
    """(rho + epsilon / 2) t, whose gradient is that of (rho + epsilon) t: the value's, by the envelope."""
    return (rho + epsilon) * t - (0.5 * epsilon * t).detach()


def annealed_loss(
    x: Tensor,
    y: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    *,
    p: int,
    blur: float,
    reach: float | None,
    diameter: float | None,
    scaling: float,
    cost: str | None,
    debias: bool,
    potentials: bool,
) -> Any:
    """What `solera.nn.SamplesLoss` computes; arguments are its own. (...) or a pair (..., n), (..., m).

    Shapes: x (..., n, d), y (..., m, d), a (..., n), b (..., m).
    """
    name = cost or {1: "euclidean", 2: "half_sqeuclidean"}[p]
    check_points(x, y, name)
    flat_a, flat_b = weights_of("a", a, x, "x"), weights_of("b", b, y, "y")
    flat_x, flat_y = flat_points(x, name), flat_points(y, name)
    if diameter is None:
        diameter = max(diameter_of(x, y), blur)
    steps = annealing(p, diameter, blur, scaling)
    rho = -1.0 if reach is None else float(reach) ** p
    epsilon = steps[-1]
    f, g, own_f, own_g = annealed_potentials(
        flat_x, flat_y, flat_a, flat_b, code_of(name), steps, rho, debias
    )
    batch = x.shape[:-2]
    if potentials:
        if own_f is not None and own_g is not None:
            f, g = f - own_f, g - own_g
        return f.reshape(x.shape[:-1]), g.reshape(y.shape[:-1])

    def side(weight: Tensor, f: Tensor, own: Tensor | None) -> Tensor:
        if rho < 0:
            return (weight * (f if own is None else f - own)).sum(-1)
        base = 1.0 if own is None else torch.exp(-own / rho)
        t = _soft_weight(base - torch.exp(-f / rho), rho, epsilon)
        return (weight * t).sum(-1)

    return (side(flat_a, f, own_f) + side(flat_b, g, own_g)).reshape(batch)
