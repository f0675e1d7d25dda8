r"""Entropic Gromov-Wasserstein distance with the squared loss: a composition of dense solves."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _check
from .._registry import accumulate_type
from .._route import full_precision
from .dense import sinkhorn
from .dense_arguments import count as _count
from .dense_arguments import weights as _weights


@dataclass(frozen=True)
class GromovResult:
    """A coupling of two metric spaces.

    Attributes:
        plan: (..., n, m), the coupling T. Not differentiable.
        cost: (...), sum_ijkl (X_ik - Y_jl)^2 T_ij T_kl + epsilon * KL(T | a x b); differentiable in c_x and c_y by
            the envelope theorem (T is a stationary point).
        distortion: (...), the same without the entropy. Not differentiable.
        f, g: (..., n), (..., m), potentials of the last linear problem.
        change: (...), L1 norm of T's last change; iterations: the linear problems solved.

    Shapes: (...) is the batch of the two matrices.
    """

    plan: Tensor
    cost: Tensor
    distortion: Tensor
    f: Tensor
    g: Tensor
    change: Tensor
    iterations: int


def _distortion(x: Tensor, y: Tensor, plan: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """sum_ijkl (X_ik - Y_jl)^2 T_ij T_kl, with the sums p and q of T, in O(n^2 m + n m^2)."""
    first = (p.unsqueeze(-2) @ x.square() @ p.unsqueeze(-1)).squeeze((-2, -1))
    second = (q.unsqueeze(-2) @ y.square() @ q.unsqueeze(-1)).squeeze((-2, -1))
    return first + second - 2 * ((x @ plan @ y.mT) * plan).sum((-2, -1))


@full_precision
def gromov_wasserstein(
    c_x: Tensor,
    c_y: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    epsilon: float,
    max_iterations: int = 100,
    sinkhorn_iterations: int = 200,
    tolerance: float = 1e-9,
    init: Tensor | None = None,
) -> GromovResult:
    r"""Entropic Gromov-Wasserstein coupling of two spaces by their inner distances, squared loss.

    A stationary point of $\sum_{ijkl} (X_{ik} - Y_{jl})^2 T_{ij}T_{kl} + \varepsilon\,\mathrm{KL}(T | ab^\top)$ over
    couplings T of a and b: $T \leftarrow$ `sinkhorn`$(\nabla(T))$ with

    $$\nabla(T)_{ij} = ((X^2 + X^{\top 2})\,a)_i + ((Y^2 + Y^{\top 2})\,b)_j
      - 2\,(X T Y^\top + X^\top T Y)_{ij},$$

    each solve from the last potentials. The problem is not convex: the coupling found depends on `init`.

    Args:
        c_x, c_y: (..., n, n) and (..., m, m), distances (or any numbers) within each space; symmetric or not.
        a, b: (..., n) or (n,) and (..., m) or (m,), weights of total 1; uniform if None.
        epsilon: > 0, in squared units of c_x.
        max_iterations: of the outer loop; sinkhorn_iterations: of each solve.
        tolerance: stops when T changes by at most this in L1, with a host synchronisation each time; 0 runs on.
        init: (..., n, m), the coupling to start from; a b^T if None.

    Shapes: c_x (..., n, n), c_y (..., m, m) -> plan (..., n, m), cost (...). float32, float64; half is computed in
    float32.

    Raises:
        ValueError, TypeError: naming the argument; also for weights that require a gradient, which have none here.

    Source: Peyré, Cuturi, Solomon, "Gromov-Wasserstein Averaging of Kernel and Distance Matrices", 2016.
    """
    _check.tensor("c_x", c_x, min_dim=2)
    _check.tensor("c_y", c_y, min_dim=2)
    n, m = c_x.shape[-1], c_y.shape[-1]
    batch = c_x.shape[:-2]
    _check.like("c_x", c_x, (*batch, n, n), c_x, "itself")
    _check.like("c_y", c_y, (*batch, m, m), c_x, "c_x")
    if n == 0 or m == 0:
        raise ValueError(f"c_x, c_y: expected at least one point each, got {n} and {m}")
    for name, t in (("a", a), ("b", b)):
        if isinstance(t, Tensor) and t.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name}: gradients to the weights are not available; detach it")
    tolerance = _check.number("tolerance", tolerance, low=0.0)
    _count("max_iterations", max_iterations)
    acc = accumulate_type(c_x)
    x, y = c_x.to(acc), c_y.to(acc)
    like = x.new_empty(()).expand(*batch, n, m)
    p, q = _weights("a", a, n, like), _weights("b", b, m, like)
    if init is not None:
        _check.like("init", init, (*batch, n, m), c_x, "c_x")
    with torch.no_grad():
        x2, y2 = x.square(), y.square()
        rows = ((x2 + x2.mT) @ p.unsqueeze(-1)) + ((y2 + y2.mT) @ q.unsqueeze(-1)).mT
        plan = p.unsqueeze(-1) * q.unsqueeze(-2) if init is None else init.to(acc)
        result, change, iterations = None, plan.new_zeros(tuple(batch)), 0
        while iterations < max_iterations:
            iterations += 1
            gradient = rows - 2 * (x @ plan @ y.mT + x.mT @ plan @ y)
            result = sinkhorn(
                gradient, p, q, epsilon=epsilon, max_iterations=sinkhorn_iterations, init=result
            )
            before, plan = plan, result.plan()
            change = (plan - before).abs().sum((-2, -1))
            if tolerance > 0 and not bool((change > tolerance).any()):
                break
        assert result is not None  # there is one iteration at least
        product = p.unsqueeze(-1) * q.unsqueeze(-2)
        kl = torch.special.xlogy(
            plan, plan / product.clamp_min(1e-300 if acc == torch.float64 else 1e-37)
        )
        kl = kl.sum((-2, -1))
    distortion = _distortion(x, y, plan, plan.sum(-1), plan.sum(-2))
    return GromovResult(
        plan, distortion + epsilon * kl, distortion.detach(), result.f, result.g, change, iterations
    )
