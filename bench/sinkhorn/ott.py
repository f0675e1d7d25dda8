"""OTT-JAX as a peer, where it is installed.

Compiled by jax.jit for the shape, float32, all of its threads; the data are handed over before the clock starts
and the result is waited for.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def available() -> bool:
    try:
        import ott  # noqa: F401
    except ImportError:
        return False
    return True


def _array(t: Tensor):
    import jax.numpy as jnp

    return jnp.asarray(t.detach().cpu().numpy())


def _potentials(f, g, epsilon: float, n: int, m: int) -> tuple[Tensor, Tensor]:
    """OTT's potentials hold the weights' logarithms; ours do not, and have equal means."""
    f = torch.from_numpy(f.copy()) + epsilon * math.log(n)
    g = torch.from_numpy(g.copy()) + epsilon * math.log(m)
    shift = 0.5 * (g.mean() - f.mean())
    return f + shift, g - shift


def _solver(geometry: Callable, epsilon: float, **options) -> Callable:
    import jax
    import numpy as np
    from ott.problems.linear.linear_problem import LinearProblem
    from ott.solvers.linear.sinkhorn import Sinkhorn

    solver = Sinkhorn(lse_mode=True, **options)
    run = jax.jit(lambda *data: solver(LinearProblem(geometry(*data))))
    kept: dict[tuple[int, ...], tuple] = {}

    def solve(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        key = tuple(t.data_ptr() for t in tensors)
        if key not in kept:
            kept[key] = tuple(_array(t) for t in tensors)
        out = run(*kept[key])
        f, g = np.asarray(out.f), np.asarray(out.g)
        return _potentials(f, g, epsilon, len(f), len(g))

    return solve


def _fixed(iterations: int) -> dict:
    """That many iterations, none of them followed by a look at the error."""
    return {
        "threshold": -1.0, "max_iterations": iterations, "min_iterations": iterations,
        "inner_iterations": iterations,
    }  # fmt: skip


def dense(epsilon: float, iterations: int) -> Callable:
    """cost (n, m) -> potentials."""
    from ott.geometry.geometry import Geometry

    make = lambda cost: Geometry(cost_matrix=cost, epsilon=epsilon)
    return _solver(make, epsilon, **_fixed(iterations))


def points(epsilon: float, iterations: int, batch_size: int | None = 1000) -> Callable:
    """x (n, d), y (m, d) -> potentials, the squared distances made batch_size rows at a time."""
    from ott.geometry.pointcloud import PointCloud

    make = lambda x, y: PointCloud(x, y, epsilon=epsilon, batch_size=batch_size)
    return _solver(make, epsilon, **_fixed(iterations))


def points_to(epsilon: float, tolerance: float, max_iterations: int = 2000) -> Callable:
    """The same until the marginals' L1 error is at most `tolerance`, looked at every ten iterations, with OTT's own
    decay of epsilon from 200 times its value."""
    from ott.geometry.epsilon_scheduler import Epsilon
    from ott.geometry.pointcloud import PointCloud

    schedule = Epsilon(epsilon, init=200.0, decay=0.25)
    make = lambda x, y: PointCloud(x, y, epsilon=schedule, batch_size=1000)
    return _solver(make, epsilon, threshold=tolerance, max_iterations=max_iterations)
