r"""Core `dense`: entropic optimal transport between two histograms with a dense cost matrix.

$$\min_{P \ge 0} \langle P, C\rangle + \varepsilon\,\mathrm{KL}(P \,|\, a b^\top)
  \quad\text{with } P\mathbf 1 = a,\ P^\top\mathbf 1 = b,\qquad
  P_{ij} = a_i b_j E_{ij},\quad E_{ij} = e^{(f_i + g_j - C_{ij})/\varepsilon}.$$

Sinkhorn's iteration, in the log domain, alternates the two exact block maximisations of the dual

$$f_i = -\varepsilon \log \sum_j b_j e^{(g_j - C_{ij})/\varepsilon},\qquad
  g_j = -\varepsilon \log \sum_i a_i e^{(f_i - C_{ij})/\varepsilon},$$

the c-transforms: they are finite at a zero weight too. The dual value
$V = \langle a,f\rangle + \langle b,g\rangle - \varepsilon\sum_{ij} (P_{ij} - a_i b_j)$ is stationary
in $(f, g)$ at the solution, hence (envelope theorem)
$\mathrm dV/\mathrm dC = P$, $\mathrm dV/\mathrm da = f$, $\mathrm dV/\mathrm db = g$.

**Gradients of the potentials** (and with them of the plan). Write $R_{ij} = b_j E_{ij}$ (rows sum to 1) and
$Q_{ij} = a_i E_{ij}$ (columns sum to 1). Differentiating the two equations above:

$$\mathrm df + R\,\mathrm dg = \rho,\ \rho_i = \sum_j R_{ij}\mathrm dC_{ij} - \varepsilon \sum_j E_{ij}\mathrm db_j,$$
$$\mathrm dg + Q^\top \mathrm df = \gamma,\ \gamma_j = \sum_i Q_{ij}\mathrm dC_{ij}
  - \varepsilon \sum_i E_{ij}\mathrm da_i .$$

For a gradient $(u, v)$ of $(f, g)$ the adjoint system is $\lambda + Q\mu = u$, $\mu + R^\top\lambda = v$, and then

$$\mathrm dC_{ij} = \lambda_i R_{ij} + \mu_j Q_{ij},\qquad \mathrm da = -\varepsilon E\mu,\qquad
  \mathrm db = -\varepsilon E^\top\lambda .$$

With $\mu = v + b \odot \kappa$ it is one system,
$(I - E^\top \mathrm{diag}(a) E\,\mathrm{diag}(b))\,\kappa = -E^\top(u - a \odot E v)$; with
$\kappa = \eta / \sqrt b$ it is symmetric and positive semidefinite, its null vector $\sqrt b$ (a constant moved
between $f$ and $g$) is deflated, and Cholesky solves it on the smaller side, in float64.
The gauge $\langle a,f\rangle = \langle b,g\rangle$ sends a gradient $(u', v')$ to
$u = u' - Da$, $v = v' + Db$, $\mathrm da \mathrel{-}= Df$, $\mathrm db \mathrel{+}= Dg$ with
$D = (\sum u' - \sum v') / (\sum a + \sum b)$.

Nothing is recorded per iteration. The formulas hold at the solution: before convergence a gradient is off
by a relative amount of the order of marginal_error / (1 - r), where r < 1 is Sinkhorn's linear rate, the square
of the second singular value of $\mathrm{diag}(\sqrt a)\,E\,\mathrm{diag}(\sqrt b)$.

Sources: Cuturi, "Sinkhorn Distances", 2013; Peyré, Cuturi, "Computational Optimal Transport", 2019 (ch. 4);
Luise et al., "Differential Properties of Sinkhorn Approximation", 2018 (implicit gradients).
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from .. import _check
from .._registry import accumulate_type, reference
from .._route import needs_graph, use_reference
from .plan import _sinkhorn_plan, kernel_matrix, plan_reference, transforms_active
from .result import SinkhornResult

_op = torch.ops.solera


# ---- reference ---------------------------------------------------------------------------------------


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


def _marginal(cost: Tensor, a: Tensor, b: Tensor, f: Tensor, g: Tensor, epsilon: float) -> Tensor:
    """sum_j b_j E_ij, 1 where the row marginal is met (and in a massless row of forbidden pairs)."""
    s = (kernel_matrix(cost, f, g, epsilon) * b.unsqueeze(-2)).sum(-1)
    return torch.where(a == 0, torch.where(s.isnan(), s, 1.0), s)


def sinkhorn_reference(cost, a, b, f, g, epsilon, max_iterations, tolerance, check_every):
    """The loop, one problem per batch item, without a host synchronisation; arguments as the op's."""
    good = torch.isfinite(a).all(-1) & (a >= 0).all(-1) & torch.isfinite(b).all(-1)
    good = good & (b >= 0).all(-1) & (a.sum(-1) > 0) & (b.sum(-1) > 0)
    f = torch.zeros_like(a) if f is None else f
    g = torch.zeros_like(b) if g is None else g
    active = good
    iterations = torch.zeros_like(good, dtype=torch.int64)
    transposed = cost.transpose(-1, -2)
    for k in range(max_iterations):
        if tolerance > 0 and k > 0 and k % check_every == 0:
            s = _marginal(cost, a, b, f, g, epsilon)
            active = active & ~((a * (s - 1).abs()).sum(-1) <= tolerance)
        moved_f = _potential(cost, g, b, a, epsilon)
        moved_g = _potential(transposed, moved_f, a, b, epsilon)
        f = torch.where(active.unsqueeze(-1), moved_f, f)
        g = torch.where(active.unsqueeze(-1), moved_g, g)
        iterations = iterations + active
    good = good & torch.isfinite(f).all(-1) & torch.isfinite(g).all(-1)
    f = torch.where(good.unsqueeze(-1), f, torch.nan)
    g = torch.where(good.unsqueeze(-1), g, torch.nan)
    s = _marginal(cost, a, b, f, g, epsilon)
    error = (a * (s - 1).abs()).sum(-1)
    wide = torch.float64
    total_a, total_b = a.to(wide).sum(-1), b.to(wide).sum(-1)
    af, bg = (a.to(wide) * f.to(wide)).sum(-1), (b.to(wide) * g.to(wide)).sum(-1)
    shift = (bg - af) / (total_a + total_b)
    mass = (a.to(wide) * s.to(wide)).sum(-1)
    value = af + bg + shift * (total_a - total_b) - epsilon * (mass - total_a * total_b)
    f = (f.to(wide) + shift.unsqueeze(-1)).to(cost.dtype)
    g = (g.to(wide) - shift.unsqueeze(-1)).to(cost.dtype)
    return f, g, value.to(cost.dtype), iterations, error, error <= tolerance


@reference("sinkhorn_dense")
def _sinkhorn_dense(cost, a, b, f, g, epsilon, max_iterations, tolerance, check_every):
    return sinkhorn_reference(cost, a, b, f, g, epsilon, max_iterations, tolerance, check_every)


# ---- autograd ----------------------------------------------------------------------------------------

# Added to the diagonal of the adjoint system: above the rounding of its entries, so that where the problem
# falls apart into blocks that exchange less than this, the solution is the one that moves them least.
_RIDGE = 1e-12


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def _solve_adjoint(e, a, b, rows, columns, u, v):
    """(lambda / rows, mu / columns) of the module's docstring; the system is m x m.

    R and Q are divided by the sums they should have, rows and columns. That makes the system positive
    semidefinite whatever the rounding of the potentials and however far from convergence, with
    sqrt(b * columns) as its null vector.
    """
    et = e.transpose(-1, -2)
    right = -_times(et, (u - a * _times(e, v / columns)) / rows)
    root = torch.sqrt(b / columns + 1e-200)  # differentiable at a zero weight
    null = root * columns
    null = null / torch.linalg.vector_norm(null, dim=-1, keepdim=True)
    inner = (et * (a / rows).unsqueeze(-2)) @ e
    system = null.unsqueeze(-1) * null.unsqueeze(-2) - root.unsqueeze(-1) * inner * root.unsqueeze(
        -2
    )
    system = system + (1.0 + _RIDGE) * torch.eye(b.shape[-1], dtype=e.dtype, device=e.device)
    # Not linalg.solve: its batched LU can hang with MKL, and Cholesky is half the work.
    factor, failed = torch.linalg.cholesky_ex(system)
    eta = torch.cholesky_solve((root * right).unsqueeze(-1), factor).squeeze(-1)
    kappa = torch.where(failed.unsqueeze(-1) != 0, torch.nan, eta / root)
    mu = (v + b * kappa) / columns
    return (u - a * _times(e, mu)) / rows, mu


def _adjoint(cost, a, b, f, g, epsilon, du, dv):
    """(lambda, mu, da, db) in float64, for gradients du, dv of the potentials in their gauge."""
    cost, a, b, f, g = (t.to(torch.float64) for t in (cost, a, b, f, g))
    du = torch.zeros_like(f) if du is None else du.to(torch.float64)
    dv = torch.zeros_like(g) if dv is None else dv.to(torch.float64)
    d = ((du.sum(-1) - dv.sum(-1)) / (a.sum(-1) + b.sum(-1))).unsqueeze(-1)
    u, v = du - d * a, dv + d * b
    e = kernel_matrix(cost, f, g, epsilon)
    et = e.transpose(-1, -2)
    # Both are 1 at the solution (0 for a massless row of forbidden pairs), so their derivative is 0.
    rows, columns = _times(e, b).detach(), _times(et, a).detach()
    rows, columns = (torch.where(t == 0, 1.0, t) for t in (rows, columns))
    if a.shape[-1] < b.shape[-1]:
        mu, lam = _solve_adjoint(et, b, a, columns, rows, v, u)
    else:
        lam, mu = _solve_adjoint(e, a, b, rows, columns, u, v)
    return lam, mu, -epsilon * _times(e, mu) - d * f, -epsilon * _times(et, lam) + d * g


class _Potentials(torch.autograd.Function):
    """The solve. f and g are differentiable, implicitly; the value gets its gradient in `_Value`."""

    @staticmethod
    def forward(ctx, cost, a, b, f, g, epsilon, max_iterations, tolerance, check_every):
        op = _sinkhorn_dense if use_reference() else _op.sinkhorn_dense
        f, g, value, iterations, error, converged = op(
            cost, a, b, f, g, epsilon, max_iterations, tolerance, check_every
        )
        ctx.save_for_backward(cost, a, b, f, g)
        ctx.epsilon = epsilon
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(value, iterations, error, converged)
        return f, g, value, iterations, error, converged

    @staticmethod
    def backward(ctx, du, dv, *_):
        if du is None and dv is None:
            return (None,) * 9
        cost, a, b, f, g = ctx.saved_tensors
        need_cost, need_a, need_b = ctx.needs_input_grad[:3]
        x, y, da, db = (t.to(cost.dtype) for t in _adjoint(cost, a, b, f, g, ctx.epsilon, du, dv))
        dcost = _plan_gradient(cost, a, b, f, g, x, y, ctx.epsilon) if need_cost else None
        return dcost, da if need_a else None, db if need_b else None, *[None] * 6


class _Value(torch.autograd.Function):
    """The value with its envelope gradient; none to f and g, in which it is stationary."""

    @staticmethod
    def forward(ctx, value, cost, a, b, f, g, epsilon):
        ctx.save_for_backward(cost, a, b, f, g)
        ctx.epsilon = epsilon
        return value.clone()

    @staticmethod
    def backward(ctx, grad):
        cost, a, b, f, g = ctx.saved_tensors
        _, need_cost, need_a, need_b, *_ = ctx.needs_input_grad
        grad = grad.unsqueeze(-1)
        dcost = _plan_gradient(cost, a, b, f, g, grad * a, None, ctx.epsilon) if need_cost else None
        return None, dcost, grad * f if need_a else None, grad * g if need_b else None, *[None] * 3


def _plan_gradient(cost, a, b, f, g, x, y, epsilon):
    if torch.is_grad_enabled():
        # Second derivatives: f and g are outputs of `_Potentials`, so everything here is connected.
        return plan_reference(cost, a, b, f, g, x, y, epsilon)
    op = _sinkhorn_plan if use_reference() else _op.sinkhorn_plan
    return op(cost, a, b, f, g, x, y, epsilon)


def _differentiable(cost, a, b, *rest):
    f, g, value, *state = _Potentials.apply(cost, a, b, *rest)
    # Connected, f and g carry the second derivatives. There are none under torch.compile, which would run
    # a connected node on zeros: detached, a loss on the value alone leaves no solve in its backward.
    held = (f.detach(), g.detach()) if torch.compiler.is_compiling() else (f, g)
    return f, g, _Value.apply(value, cost, a, b, *held, rest[2]), *state


# ---- public function ---------------------------------------------------------------------------------

# How far the totals of a and b may differ, relatively, by the dtype they came in.
_TOTALS = {
    torch.float64: 1e-8,
    torch.float32: 1e-4,
    torch.bfloat16: 3e-2,
    torch.float16: 4e-3,
}


def _weights(name: str, value: Tensor | None, count: int, cost: Tensor) -> Tensor:
    """A marginal as (batch..., count) in the dtype that is computed in; uniform for None."""
    batch = cost.shape[:-2]
    acc = accumulate_type(cost)
    if value is None:
        return cost.new_full((1,), 1.0 / count, dtype=acc).expand(*batch, count)
    if isinstance(value, Tensor) and value.dim() == 1 and len(batch) > 0:
        _check.like(name, value, (count,), cost, "cost")
    else:
        _check.like(name, value, (*batch, count), cost, "cost")
    return value.to(acc).expand(*batch, count)


def _initial(init: Any, cost: Tensor) -> tuple[Tensor | None, Tensor | None]:
    if init is None:
        return None, None
    if isinstance(init, SinkhornResult):
        init = (init.f, init.g)
    if not isinstance(init, tuple | list) or len(init) != 2:
        raise TypeError(
            f"init: expected None, a pair (f, g) or a SinkhornResult, got {type(init).__name__}"
        )
    *batch, n, m = cost.shape
    _check.like("init[0]", init[0], (*batch, n), cost, "cost")
    _check.like("init[1]", init[1], (*batch, m), cost, "cost")
    acc = accumulate_type(cost)
    return init[0].detach().to(acc), init[1].detach().to(acc)


def _count(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__} {value!r}")
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")


def _check_values(cost: Tensor, a: Tensor, b: Tensor, tolerance_totals: float) -> None:
    """The checks that read the data (see `validate`)."""
    for name, weight in (("a", a), ("b", b)):
        if not bool((torch.isfinite(weight) & (weight >= 0)).all()):
            raise ValueError(
                f"{name}: expected finite weights >= 0, got a negative, NaN or infinite one"
            )
        if not bool((weight.sum(-1) > 0).all()):
            raise ValueError(f"{name}: expected a positive total, got a marginal of zeros")
    total_a, total_b = a.double().sum(-1), b.double().sum(-1)
    apart = ((total_a - total_b).abs() / total_a.maximum(total_b)).max()
    if float(apart) > tolerance_totals:
        k = int(((total_a - total_b).abs() / total_a.maximum(total_b)).argmax())
        raise ValueError(
            f"a, b: expected equal totals, got {float(total_a.flatten()[k]):.6g} and "
            f"{float(total_b.flatten()[k]):.6g}"
        )
    for dim, name, weight in ((-1, "row", a), (-2, "column", b)):
        least = cost.amin(dim)  # NaN where there is one
        if not bool((least > -torch.inf).all()):
            what = "NaN" if bool(least.isnan().any()) else "-inf"
            raise ValueError(f"cost: expected numbers or +inf (a forbidden pair), got {what}")
        if bool(((least == torch.inf) & (weight > 0)).any()):
            raise ValueError(
                f"cost: a {name} with positive weight has only forbidden pairs (inf), so no plan exists"
            )


def sinkhorn(
    cost: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    epsilon: float,
    max_iterations: int = 100,
    tolerance: float = 0.0,
    check_every: int = 10,
    init: SinkhornResult | tuple[Tensor, Tensor] | None = None,
    validate: bool | None = None,
) -> SinkhornResult:
    r"""Entropic optimal transport by Sinkhorn iterations in the log domain.

    Minimises $\langle P, C\rangle + \varepsilon\,\mathrm{KL}(P|ab^\top)$ over plans with marginals a and b;
    $P_{ij} = a_i b_j e^{(f_i + g_j - C_{ij})/\varepsilon}$. Each iteration updates f, then g.

    Args:
        cost: (..., n, m), any leading batch; float32 or float64, half precision is computed in float32 and
            gives float32 results. +inf forbids a pair.
        a, b: (..., n) and (..., m), or (n,) and (m,) for every batch item; >= 0, of equal totals; uniform
            (total 1) if None. A zero weight gives a zero row of the plan and a finite potential.
        epsilon: > 0, in the units of cost. Stable down to 1e-4 of the cost's range in float32.
        max_iterations: >= 1.
        tolerance: an item stops when the L1 error of its row marginal is at most this, looked at after
            every `check_every` iterations, on the device. 0 runs max_iterations.
        init: potentials (f, g) or an earlier result to start from; not differentiated.
        validate: check values (NaN, negative weights, totals, infeasible rows) and raise. None: on for CPU
            tensors in eager mode, off elsewhere. Never done under torch.compile and torch.func transforms.
            Without it a bad batch item has NaN potentials and converged = False; others are untouched.

    Shapes: cost (..., n, m) -> f (..., n), g (..., m), cost, iterations, marginal_error, converged (...).

    Gradients flow from `result.cost` to cost (the plan), a (f) and b (g), the last two meant along the
    simplex, and from f, g, `result.plan()` and `result.transport_cost()` by implicit differentiation (one
    linear solve of size min(n, m); no tape). They are those of the converged solution: with a marginal
    error e left, off by the order of e / (1 - r), r < 1 being the rate at which it falls. Under
    torch.func transforms and forward-mode AD the iterations themselves are differentiated.

    Raises:
        ValueError, TypeError: naming the argument.
    Warns:
        UserWarning: on the CPU in eager mode, if tolerance > 0 was not reached.

    Source: Cuturi, "Sinkhorn Distances: Lightspeed Computation of Optimal Transport", 2013.
    """
    _check.tensor("cost", cost, min_dim=2)
    *batch, n, m = cost.shape
    if n == 0 or m == 0:
        raise ValueError(f"cost: expected at least one row and one column, got {tuple(cost.shape)}")
    acc = accumulate_type(cost)
    epsilon = _check.number("epsilon", epsilon)
    if not epsilon > 0:
        raise ValueError(f"epsilon: expected a number > 0, got {epsilon!r}")
    tolerance = _check.number("tolerance", tolerance, low=0.0)
    _count("max_iterations", max_iterations)
    _count("check_every", check_every)
    _check.choice("validate", validate, (None, True, False))
    weight_a, weight_b = _weights("a", a, n, cost), _weights("b", b, m, cost)
    f0, g0 = _initial(init, cost)
    compiling, transforms = torch.compiler.is_compiling(), transforms_active()
    eager_cpu = cost.device.type == "cpu" and not compiling and not transforms
    if not compiling and not transforms and (eager_cpu if validate is None else validate):
        if cost.numel() > 0:
            kinds = [t.dtype for t in (a, b) if t is not None] or [acc]
            _check_values(
                cost.detach(),
                weight_a.detach(),
                weight_b.detach(),
                max(_TOTALS[k] for k in kinds),
            )

    count = math.prod(batch)
    cost3 = cost.to(acc).reshape(count, n, m)
    a2, b2 = weight_a.reshape(count, n), weight_b.reshape(count, m)
    if f0 is not None and g0 is not None:
        f0, g0 = f0.reshape(count, n), g0.reshape(count, m)
    arguments = (cost3, a2, b2, f0, g0, epsilon, max_iterations, tolerance, check_every)
    if transforms:
        out = sinkhorn_reference(*arguments)
    elif needs_graph(cost3, a2, b2):
        out = _differentiable(*arguments)
    elif use_reference():
        out = _sinkhorn_dense(*arguments)
    else:
        out = _op.sinkhorn_dense(*arguments)
    f, g, value, iterations, error, converged = out
    if tolerance > 0 and eager_cpu and not bool(converged.all()):
        warnings.warn(
            f"solera.sinkhorn: {int((~converged).sum())} of {count} problems have a marginal error above "
            f"tolerance={tolerance:g} after max_iterations={max_iterations} (largest {float(error.max()):.3g})",
            UserWarning,
            stacklevel=2,
        )
    shape = tuple(batch)
    return SinkhornResult(
        f.reshape(*shape, n),
        g.reshape(*shape, m),
        value.reshape(shape),
        iterations.reshape(shape),
        error.reshape(shape),
        converged.reshape(shape),
        (cost3, a2, b2),
        epsilon,
    )
