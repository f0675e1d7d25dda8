r"""The linear solve behind implicit differentiation of Sinkhorn's fixed point, dense or matrix-free.

The potentials solve $f = \lambda_a T_\varepsilon(g)$, $g = \lambda_b T_\varepsilon'(f)$ with the c-transforms
$T$ and $\lambda = \rho/(\rho+\varepsilon)$ (1 for a hard marginal). With $E_{ij} = e^{(f_i+g_j-C_{ij})/\varepsilon}$,
$s = E b$ and $t = E^\top a$ (both 1 at a balanced solution), their differentials satisfy

$$\mathrm df_i + \lambda_a \sum_j \tfrac{b_j E_{ij}}{s_i} \mathrm dg_j = \lambda_a \Bigl(\sum_j \tfrac{b_j E_{ij}}{s_i}
  \mathrm dC_{ij} - \tfrac{\varepsilon}{s_i} \sum_j E_{ij} \mathrm db_j\Bigr)$$

and the same with the sides exchanged. For a gradient $(u, v)$ of $(f, g)$ the adjoint unknowns, scaled to
$X = \lambda_a x / s$ and $Y = \lambda_b y / t$, solve

$$s \odot X / \lambda_a + a \odot E Y = u,\qquad t \odot Y / \lambda_b + b \odot E^\top X = v,$$

and then $\mathrm dC = E \odot (X b^\top + a Y^\top)$, $\mathrm da = -\varepsilon E Y$ and
$\mathrm db = -\varepsilon E^\top X$. With
$Y = \lambda_b (v + b \odot \kappa) / t$ and $\kappa = \eta / r$, $r = \sqrt{b / t}$, it is one symmetric system

$$\bigl(I - \lambda_a\lambda_b\, \mathrm{diag}(r) E^\top \mathrm{diag}(a/s) E\, \mathrm{diag}(r)\bigr)\,\eta
  = -\lambda_a\, r \odot E^\top \bigl((u - \lambda_b\, a \odot E (v / t)) / s\bigr)$$

whose eigenvalues lie in $[1 - \lambda_a\lambda_b, 1]$. In the balanced case the smallest, 0, belongs to
$r \odot t$ (a constant moved between f and g), which is deflated. Dividing by s and t makes it
positive semidefinite whatever the rounding of the potentials and however far from convergence.

Up to `DENSE` unknowns, and where the solve is itself differentiated, it is a float64 Cholesky factorisation on
the smaller side. Beyond, conjugate gradients in the problem's own dtype, which never store E: a step is one call of
core `plan_sums`, and there are about $\log(1/\text{tolerance}) / (2\sqrt{1 - r})$ of them where $r$ is Sinkhorn's
linear rate. On the CPU a solve that does not
converge within `STEPS` is factorised after all; on other devices, where that would be a synchronisation, and
under torch.compile, conjugate gradients serve from `DENSE_DEVICE` unknowns on, with all their steps.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .._route import full_precision
from .dense_reference import damping
from .plan import kernel_matrix, valid_cost
from .plan_sums import stored_sums

# Added to the diagonal of the dense system: above the rounding of its entries, so that where the problem
# falls apart into blocks that exchange less than this, the solution is the one that moves them least.
RIDGE = 1e-12
DENSE = 128
DENSE_DEVICE = 4096
STEPS = 200


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def conjugate_gradients(
    product: Callable[[Tensor], Tensor], right: Tensor, tolerance: float, steps: int
) -> tuple[Tensor, Tensor]:
    """(x, converged) of product(x) = right for a symmetric positive definite product.

    Shapes: right (batch, k) -> x (batch, k), converged (batch,): residual <= tolerance * |right|. An item that
    has converged is left alone, so its bits do not depend on its neighbours; no host synchronisation, except
    for an early end on the CPU.
    """
    # Of size 1, so that no square underflows.
    size = right.abs().amax(-1, keepdim=True)
    right = right / torch.where(size > 0, size, 1.0)
    x, r, p = torch.zeros_like(right), right, right
    square = (r * r).sum(-1, keepdim=True)
    target = tolerance * tolerance * square
    going = square > target
    for step in range(steps):
        if right.device.type == "cpu" and step % 4 == 0 and not torch.compiler.is_compiling():
            if not bool(going.any()):
                break
        q = product(p)
        alpha = torch.where(going, square / (p * q).sum(-1, keepdim=True), 0.0)
        x, r = x + alpha * p, r - alpha * q
        new = torch.where(going, (r * r).sum(-1, keepdim=True), square)
        p = torch.where(going, r + new / square * p, p)
        square, going = new, going & (new > target)
    return x * size, (square <= target).squeeze(-1)


def _met(t: Tensor) -> Tensor:
    """A sum of a side's density, 1 for a row or column without an allowed pair: it counts as met."""
    return torch.where(t == 0, 1.0, t)


def _direct(e, a, b, rows, columns, u, v, la, lb, balanced):
    """(X, Y) of the module's docstring by a Cholesky factor of the system on b's side."""
    et = e.transpose(-1, -2)
    right = -la * _times(et, (u - lb * a * _times(e, v / columns)) / rows)
    root, null = _scaling(b, columns)
    inner = (et * (a / rows).unsqueeze(-2)) @ e
    system = -(la * lb) * root.unsqueeze(-1) * inner * root.unsqueeze(-2)
    if balanced:
        system = system + null.unsqueeze(-1) * null.unsqueeze(-2)
    system = system + (1.0 + RIDGE) * torch.eye(b.shape[-1], dtype=e.dtype, device=e.device)
    # Not linalg.solve: its batched LU can hang with MKL, and Cholesky is half the work.
    factor, failed = torch.linalg.cholesky_ex(system)
    eta = torch.cholesky_solve((root * right).unsqueeze(-1), factor).squeeze(-1)
    kappa = torch.where((failed == 0).unsqueeze(-1), eta, torch.nan) / root
    y = lb * (v + b * kappa) / columns
    return la * (u - a * _times(e, y)) / rows, y


def _scaling(b: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """r of the module's docstring and the deflated direction."""
    tiny = 1e-200 if b.dtype == torch.float64 else 1e-38
    root = torch.sqrt(b / columns + tiny)  # differentiable at a zero weight
    null = root * columns
    return root, null / torch.linalg.vector_norm(null, dim=-1, keepdim=True)


def _factored(cost, a, b, f, g, epsilon, u, v, la, lb, balanced, lengths):
    """(X, Y, E Y, E^T X) on the smaller side, differentiable."""
    e = kernel_matrix(valid_cost(cost, lengths).to(f.dtype), f, g, epsilon)
    # Far from convergence E would overflow. Of a balanced solution E <= 1 / max(a_i, b_j) and rows and columns are 1;
    # one with penalised marginals has any.
    largest = torch.maximum(a.unsqueeze(-1), b.unsqueeze(-2)).detach().clamp(min=1e-12)
    e = e.minimum(1e3 / largest) if balanced else e.clamp(max=1e130)
    rows, columns = _times(e, b), _times(e.transpose(-1, -2), a)
    if balanced:
        # Both are 1 at the solution (0 for a massless row of forbidden pairs), so their derivative is 0.
        rows, columns = rows.detach(), columns.detach()
    least = 1e-8 if balanced else 0.0
    rows, columns = (_met(t).clamp(min=least) for t in (rows, columns))
    if a.shape[-1] < b.shape[-1]:
        et = e.transpose(-1, -2)
        y, x = _direct(et, b, a, columns, rows, v, u, lb, la, balanced)
    else:
        x, y = _direct(e, a, b, rows, columns, u, v, la, lb, balanced)
    return x, y, _times(e, y), _times(e.transpose(-1, -2), x)


def _iterated(cost, a, b, f, g, epsilon, u, v, la, lb, balanced, lengths):
    """(X, Y, E Y, E^T X, converged) by conjugate gradients on b's side; nothing of the size of cost is stored."""
    sums = stored_sums(cost, f, g, epsilon, lengths)
    rows, columns = (_met(t) for t in sums(b, None, a))
    weight, zero = a / rows, torch.zeros_like(a)
    root, null = _scaling(b, columns)
    right = -la * root * sums(v / columns, -lb * weight, u / rows)[1]

    def product(z: Tensor) -> Tensor:
        y = z - la * lb * root * sums(root * z, weight, zero)[1]
        return y + null * (null * z).sum(-1, keepdim=True) if balanced else y

    tolerance = 1e-13 if f.dtype == torch.float64 else 1e-7
    eta, good = conjugate_gradients(product, right, tolerance, STEPS)
    # b kappa = b eta / root; a weight of 0 (root near 0) gives 0 without a division.
    y = lb * (v + b * torch.where(b > 0, eta / root, 0.0)) / columns
    row, column = sums(y, -la * weight, la * u / rows)
    return la * (u - a * row) / rows, y, row, column, good


@full_precision
def adjoint(
    cost: Tensor,
    a: Tensor,
    b: Tensor,
    f: Tensor,
    g: Tensor,
    epsilon: float,
    du: Tensor | None,
    dv: Tensor | None,
    rho_a: float | None = None,
    rho_b: float | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(X, Y, da, db) for gradients du, dv of the potentials (in their gauge, if balanced).

    Shapes: cost (batch, n, m), a, f, du (batch, n), b, g, dv (batch, m) -> X, da (batch, n), Y, db (batch, m), in
    cost's dtype, or float64 where the solve is dense; differentiable if grad mode is on.
    """
    side = min(cost.shape[-2:])
    la, lb = damping(epsilon, rho_a), damping(epsilon, rho_b)
    balanced = rho_a is None and rho_b is None
    here = cost.device.type == "cpu" and not torch.compiler.is_compiling()
    iterative = not torch.is_grad_enabled() and side > (DENSE if here else DENSE_DEVICE)

    def attempt(solve: Callable, dtype: torch.dtype):
        low = [t.to(dtype) for t in (a, b, f, g)]
        u = torch.zeros_like(low[2]) if du is None else du.to(dtype)
        v = torch.zeros_like(low[3]) if dv is None else dv.to(dtype)
        d = None
        if balanced:
            d = ((u.sum(-1) - v.sum(-1)) / (low[0].sum(-1) + low[1].sum(-1))).unsqueeze(-1)
            u, v = u - d * low[0], v + d * low[1]
        x, y, row, column, *good = solve(cost, *low, epsilon, u, v, la, lb, balanced, lengths)
        da, db = -epsilon * row, -epsilon * column
        return (x, y, da, db) if d is None else (x, y, da - d * low[2], db + d * low[3]), good

    if iterative:
        result, (good,) = attempt(_iterated, cost.dtype)
        if not here or bool((good | f.isnan().any(-1)).all()):
            return result
    return attempt(_factored, torch.float64)[0]
