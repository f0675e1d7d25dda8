r"""Core `streaming`: Sinkhorn between two clouds of points; the n x m cost matrix is never stored.

The problem, its potentials, its gauge and its value are those of core `dense`, with $C_{ij} = c(x_i, y_j)$.
Marginals may be soft, each by $\rho\,\mathrm{KL}$: then the updates are damped,
$f \leftarrow \frac{1}{1 + \varepsilon/\rho}\, S(g)$ with the soft minimum
$S(g)_i = -\varepsilon\log\sum_j b_j e^{(g_j - C_{ij})/\varepsilon}$, and the dual value is

$$\rho_a \langle a, 1 - e^{-f/\rho_a}\rangle + \rho_b \langle b, 1 - e^{-g/\rho_b}\rangle
  - \varepsilon \sum_{ij} (P_{ij} - a_i b_j),$$

with $\langle a, f\rangle$ for a hard side. At the solution $P\mathbf 1 = a\,e^{-f/\rho_a}$.

**Gradients.** By the envelope theorem $\mathrm dV/\mathrm dx_i = \sum_j P_{ij}\,\partial_1 c(x_i, y_j)$,
$\mathrm dV/\mathrm da = f$ (soft: $\rho(1 - e^{-f/\rho}) - \varepsilon(e^{-f/\rho} - \sum b)$). For gradients
$(u, v)$ of the potentials themselves the system of core `dense`, damped by $\delta_a$ and $\delta_b$,

$$\lambda + \delta_b\, Q\,\mu = u,\qquad \mu + \delta_a\, R^\top \lambda = v,\qquad
  \mathrm dC_{ij} = \delta_a \lambda_i R_{ij} + \delta_b \mu_j Q_{ij},$$

is solved by conjugate gradients whose products with $E$ stream (core `streaming_apply`).

Sources: Cuturi, 2013; Feydy, "Geometric data analysis, beyond convolutions", 2020 (log-domain, streaming,
unbalanced); Séjourné et al., "Sinkhorn Divergences for Unbalanced Optimal Transport", 2019.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._registry import reference
from .._route import full_precision, needs_graph, use_reference
from .streaming_apply import apply_density, cost_gradient, cost_matrix, density

_op = torch.ops.solera


# ---- reference ---------------------------------------------------------------------------------------


def softmin_of(cost: Tensor, g: Tensor, b: Tensor, epsilon: float) -> Tensor:
    """-epsilon log sum_j b_j exp((g_j - C_ij) / epsilon) of cost (batch, n, m)."""
    t = (g.unsqueeze(-2) - cost) / epsilon
    top = torch.where(b.unsqueeze(-2) > 0, t.detach(), -torch.inf).amax(-1, keepdim=True)
    top = torch.where(top == -torch.inf, 0.0, top)
    w = torch.exp((t - top).clamp(max=math.log(torch.finfo(t.dtype).max) - 1))
    return -epsilon * (torch.log((b.unsqueeze(-2) * w).sum(-1)) + top.squeeze(-1))


def damping(epsilon: float, rho: float) -> float:
    """1 / (1 + epsilon / rho), 1 for a hard marginal (rho < 0)."""
    return 1.0 if rho < 0 else 1.0 / (1.0 + epsilon / rho)


def dual_term(weight: Tensor, potential: Tensor, rho: float) -> Tensor:
    """<a, f>, or rho <a, 1 - exp(-f / rho)> for a soft marginal."""
    return (weight * (potential if rho < 0 else -rho * torch.expm1(-potential / rho))).sum(-1)


def points_reference(
    x, y, a, b, f, g, cost, epsilons, rho_a, rho_b, momentum, max_iterations, tolerance, check_every
):
    """The loop on the whole matrix, without a host synchronisation; arguments as the op's."""
    c = cost_matrix(x, y, cost)
    ct = c.transpose(-1, -2)
    good = torch.isfinite(a).all(-1) & (a >= 0).all(-1) & torch.isfinite(b).all(-1)
    good = good & (b >= 0).all(-1) & (a.sum(-1) > 0) & (b.sum(-1) > 0)
    f = torch.zeros_like(a) if f is None else f
    g = torch.zeros_like(b) if g is None else g
    active = good
    iterations = torch.zeros_like(good, dtype=torch.int64)

    def marginal(f, g, epsilon):
        w = (f.unsqueeze(-1) + g.unsqueeze(-2) - c) / epsilon
        w = torch.exp(w.clamp(max=math.log(torch.finfo(c.dtype).max) - 1))
        s = (w * b.unsqueeze(-2)).sum(-1)
        aim = torch.exp(-f / rho_a) if rho_a >= 0 else 1.0
        return s, (a * (s - aim).abs()).sum(-1)

    steps = len(epsilons)
    for k in range(steps - 1 + max_iterations):
        epsilon = epsilons[min(k, steps - 1)]
        if tolerance > 0 and k >= steps and (k - steps + 1) % check_every == 0:
            active = active & ~(marginal(f, g, epsilon)[1] <= tolerance)
        moved_f = damping(epsilon, rho_a) * softmin_of(c, g, b, epsilon)
        moved_f = f + momentum * (moved_f - f)
        moved_g = damping(epsilon, rho_b) * softmin_of(ct, moved_f, a, epsilon)
        moved_g = g + momentum * (moved_g - g)
        f = torch.where(active.unsqueeze(-1), moved_f, f)
        g = torch.where(active.unsqueeze(-1), moved_g, g)
        iterations = iterations + active
    epsilon = epsilons[-1]
    good = good & torch.isfinite(f).all(-1) & torch.isfinite(g).all(-1)
    f = torch.where(good.unsqueeze(-1), f, torch.nan)
    g = torch.where(good.unsqueeze(-1), g, torch.nan)
    s, error = marginal(f, g, epsilon)
    wide = torch.float64
    a, b, f, g = (t.to(wide) for t in (a, b, f, g))
    total_a, total_b = a.sum(-1), b.sum(-1)
    if rho_a < 0 and rho_b < 0:
        shift = ((b * g).sum(-1) - (a * f).sum(-1)) / (total_a + total_b)
        f, g = f + shift.unsqueeze(-1), g - shift.unsqueeze(-1)
    value = dual_term(a, f, rho_a) + dual_term(b, g, rho_b)
    value = value - epsilon * ((a * s.to(wide)).sum(-1) - total_a * total_b)
    kind = x.dtype
    return f.to(kind), g.to(kind), value.to(kind), iterations, error, error <= tolerance


@reference("sinkhorn_points")
def _sinkhorn_points(*arguments):
    return points_reference(*arguments)


@reference("sinkhorn_points_symmetric")
def _sinkhorn_points_symmetric(x, y, a, b, cost, epsilons, rho):
    """Both potentials updated at once, and averaged with what they were from the second step on."""
    alone = y is None
    c = cost_matrix(x, x if alone else y, cost)
    ct = c.transpose(-1, -2)
    f = torch.zeros_like(a)
    g = f if alone else torch.zeros_like(b)
    for k, epsilon in enumerate(epsilons):
        relax = 1.0 if k == 0 else 0.5
        scale = damping(epsilon, rho)
        next_f = scale * softmin_of(c, g, a if alone else b, epsilon)
        next_f = f + relax * (next_f - f)
        if not alone:
            g = g + relax * (scale * softmin_of(ct, f, a, epsilon) - g)
        f = next_f
        g = f if alone else g
    wrong = ~(torch.isfinite(f).all(-1) & torch.isfinite(g).all(-1))
    f = torch.where(wrong.unsqueeze(-1), torch.nan, f)
    g = x.new_empty((x.shape[0], 0)) if alone else torch.where(wrong.unsqueeze(-1), torch.nan, g)
    return f, g


@reference("sinkhorn_points_softmin")
def _sinkhorn_points_softmin(x, y, g, b, cost, epsilon):
    return softmin_of(cost_matrix(x, y, cost), g, b, epsilon)


# ---- the soft minimum, differentiable ----------------------------------------------------------------


class _Softmin(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, g, b, cost, epsilon):
        op = _sinkhorn_points_softmin if use_reference() else _op.sinkhorn_points_softmin
        f = op(x, y, g, b, cost, epsilon)
        ctx.save_for_backward(x, y, g, b, f)
        ctx.options = cost, epsilon
        return f

    @staticmethod
    def backward(ctx, grad):
        x, y, g, b, f = ctx.saved_tensors
        cost, epsilon = ctx.options
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled():  # connected again: the saved output is not
            f = points_softmin(x, y, g, b, cost, epsilon)
        w, v = grad.unsqueeze(-1), b.unsqueeze(-1)
        dx = cost_gradient(x, y, f, g, w, v, cost, epsilon) if needs[0] else None
        dy = cost_gradient(y, x, g, f, v, w, cost, epsilon) if needs[1] else None
        dg = db = None
        if needs[2] or needs[3]:
            back = apply_density(y, x, g, f, w, cost, epsilon).squeeze(-1)
            dg, db = -b * back, -epsilon * back
        return dx, dy, dg if needs[2] else None, db if needs[3] else None, None, None


def points_softmin(x: Tensor, y: Tensor, g: Tensor, b: Tensor, cost: int, epsilon: float) -> Tensor:
    """-epsilon log sum_j b_j exp((g_j - C_ij) / epsilon) of checked tensors, differentiable, streaming.

    Shapes: x (batch, n, d), y (batch, m, d), g and b (batch, m) -> (batch, n).
    """
    if torch._C._are_functorch_transforms_active():
        return softmin_of(cost_matrix(x, y, cost), g, b, epsilon)
    if needs_graph(x, y, g, b):
        return _Softmin.apply(x, y, g, b, cost, epsilon)
    op = _sinkhorn_points_softmin if use_reference() else _op.sinkhorn_points_softmin
    return op(x, y, g, b, cost, epsilon)


# ---- gradients of the solve --------------------------------------------------------------------------

_CG_STEPS = 200
_COMPILED_CG_STEPS = 32  # unrolled into the graph


def _conjugate_gradients(matvec, right: Tensor, null: Tensor | None, steps: int) -> Tensor:
    """Solves a positive semidefinite system (batch, m) whose null vector, if any, is deflated.

    Stops at the accuracy of the dtype on the CPU; elsewhere all steps are taken, without a synchronisation, and
    under torch.compile fewer.
    """

    def project(t: Tensor) -> Tensor:
        return t if null is None else t - null * (null * t).sum(-1, keepdim=True)

    def dot(s: Tensor, t: Tensor) -> Tensor:
        return (s.double() * t.double()).sum(-1, keepdim=True)

    residual = project(right)
    solution = torch.zeros_like(residual)
    direction = residual
    square = dot(residual, residual)
    enough = square * (4.0 * torch.finfo(right.dtype).eps) ** 2
    compiling = torch.compiler.is_compiling()
    reads = right.device.type == "cpu" and not compiling
    for _ in range(min(steps, _COMPILED_CG_STEPS) if compiling else steps):
        going = square > enough
        if reads and not bool(going.any()):
            break
        image = project(matvec(direction))
        curvature = dot(direction, image)
        going = going & (curvature > 0)
        length = torch.where(going, square / torch.where(going, curvature, 1.0), 0.0)
        solution = solution + (length.to(right.dtype) * direction)
        residual = residual - (length.to(right.dtype) * image)
        after = torch.where(going, dot(residual, residual), square)
        growth = torch.where(going, after / torch.where(square > 0, square, 1.0), 0.0)
        square = torch.where(going, after, 0.0)
        direction = residual + growth.to(right.dtype) * direction
    return solution


def _gauge(a, b, du, dv, soft):
    """(u, v, D): the gradients before the gauge <a, f> = <b, g> was fixed; D is None if it was not."""
    if soft:
        return du, dv, None
    shift = ((du.sum(-1) - dv.sum(-1)) / (a.sum(-1) + b.sum(-1))).unsqueeze(-1)
    return du - shift * a, dv + shift * b, shift


def points_adjoint(x, y, a, b, f, g, du, dv, cost, epsilon, rho_a, rho_b):
    """(w, v, da, db) with dC_ij = E_ij sum_k w_ik v_jk, for gradients du, dv of the potentials; streaming."""
    damp_a, damp_b = damping(epsilon, rho_a), damping(epsilon, rho_b)
    u, v, shift = _gauge(a, b, du, dv, rho_a >= 0 or rho_b >= 0)

    def right_times(t):  # E t
        return apply_density(x, y, f, g, t.unsqueeze(-1), cost, epsilon).squeeze(-1)

    def left_times(t):  # E^T t
        return apply_density(y, x, g, f, t.unsqueeze(-1), cost, epsilon).squeeze(-1)

    rows, columns = right_times(b), left_times(a)
    rows, columns = (torch.where(t == 0, 1.0, t) for t in (rows, columns))
    both = damp_a * damp_b
    spread = a / rows
    root = torch.sqrt(b / columns)
    null = None
    if both == 1.0:
        null = root * columns
        null = null / torch.linalg.vector_norm(null, dim=-1, keepdim=True)
    right = both * left_times(spread * right_times(v / columns)) - damp_a * left_times(u / rows)

    def matvec(t):
        return t - both * root * left_times(spread * right_times(root * t))

    eta = _conjugate_gradients(matvec, root * right, null, min(_CG_STEPS, 2 * b.shape[-1]))
    kappa = right + both * left_times(spread * right_times(root * eta))
    if null is not None:  # a constant in kappa moves nothing; kept small
        kappa = kappa - (b * kappa).sum(-1, keepdim=True) / b.sum(-1, keepdim=True)
    mu = v + b * kappa
    lam = u - damp_b * a * right_times(mu / columns)
    lam, mu = damp_a * lam / rows, damp_b * mu / columns
    da, db = -epsilon * right_times(mu), -epsilon * left_times(lam)
    if shift is not None:
        da, db = da - shift * f, db + shift * g
    return torch.stack((lam, a), -1), torch.stack((b, mu), -1), da, db


@full_precision
def _whole_adjoint(x, y, a, b, f, g, du, dv, cost, epsilon, rho_a, rho_b):
    """(dx, dy, da, db) from n x m matrices, differentiable: the second derivatives of the potentials."""
    damp_a, damp_b = damping(epsilon, rho_a), damping(epsilon, rho_b)
    both = damp_a * damp_b
    u, v, shift = _gauge(a, b, du, dv, rho_a >= 0 or rho_b >= 0)
    e = density(x, y, f, g, cost, epsilon)
    et = e.transpose(-1, -2)

    def times(matrix, vector):
        return (matrix @ vector.unsqueeze(-1)).squeeze(-1)

    rows, columns = times(e, b), times(et, a)
    if rho_a < 0:
        rows = rows.detach()
    if rho_b < 0:
        columns = columns.detach()
    root = torch.sqrt(b / columns + 1e-200)
    right = both * times(et, a / rows * times(e, v / columns)) - damp_a * times(et, u / rows)
    inner = (et * (a / rows).unsqueeze(-2)) @ e
    system = -both * root.unsqueeze(-1) * inner * root.unsqueeze(-2)
    system = system + (1.0 + 1e-12) * torch.eye(b.shape[-1], dtype=e.dtype, device=e.device)
    if both == 1.0:
        null = root * columns
        null = null / torch.linalg.vector_norm(null, dim=-1, keepdim=True)
        system = system + null.unsqueeze(-1) * null.unsqueeze(-2)
    factor, _ = torch.linalg.cholesky_ex(system)
    eta = torch.cholesky_solve((root * right).unsqueeze(-1), factor).squeeze(-1)
    mu = v + b * (eta / root)
    lam = u - damp_b * a * times(e, mu / columns)
    lam, mu = damp_a * lam / rows, damp_b * mu / columns
    da, db = -epsilon * times(e, mu), -epsilon * times(et, lam)
    if shift is not None:
        da, db = da - shift * f, db + shift * g
    xs, ys = (t if t.requires_grad else t.detach().requires_grad_() for t in (x, y))
    dc = e * (lam.unsqueeze(-1) * b.unsqueeze(-2) + a.unsqueeze(-1) * mu.unsqueeze(-2))
    dx, dy = torch.autograd.grad(cost_matrix(xs, ys, cost), (xs, ys), dc, create_graph=True)
    return dx, dy, da, db


class _Potentials(torch.autograd.Function):
    """The solve. f and g are differentiable, implicitly; the value gets its gradient in `_Value`.

    `symmetric`: x is y and a is b, solved by averaged updates along `epsilons`; value and state are then not
    computed here.
    """

    @staticmethod
    def forward(ctx, x, y, a, b, f, g, cost, epsilons, rho_a, rho_b, symmetric, *rest):
        if symmetric:
            f, _ = run_symmetric(x, None, a, None, cost, epsilons, rho_a)
            f, g, state = f, f.clone(), (f.new_empty(0),) * 4
            state = tuple(t.clone() for t in state)
        else:
            f, g, *state = run_points(x, y, a, b, f, g, cost, epsilons, rho_a, rho_b, *rest)
        ctx.save_for_backward(x, y, a, b, f, g)
        ctx.options = cost, epsilons[-1], rho_a, rho_b
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*state)
        return f, g, *state

    @staticmethod
    def backward(ctx, du, dv, *_):
        if du is None and dv is None:
            return (None,) * 15
        x, y, a, b, f, g = ctx.saved_tensors
        cost, epsilon, *_ = ctx.options
        du = torch.zeros_like(f) if du is None else du
        dv = torch.zeros_like(g) if dv is None else dv
        if torch.is_grad_enabled():
            grads = _whole_adjoint(x, y, a, b, f, g, du, dv, *ctx.options)
        else:
            w, v, da, db = points_adjoint(x, y, a, b, f, g, du, dv, *ctx.options)
            dx = dy = None
            if ctx.needs_input_grad[0]:
                dx = cost_gradient(x, y, f, g, w, v, cost, epsilon)
            if ctx.needs_input_grad[1]:
                dy = cost_gradient(y, x, g, f, v, w, cost, epsilon)
            grads = dx, dy, da, db
        needs = ctx.needs_input_grad
        return *(t if need else None for t, need in zip(grads, needs)), *[None] * 11


class _Value(torch.autograd.Function):
    """The value with its envelope gradient; none to f and g, in which it is stationary."""

    @staticmethod
    def forward(ctx, value, x, y, a, b, f, g, cost, epsilon, rho_a, rho_b):
        ctx.save_for_backward(x, y, a, b, f, g)
        ctx.options = cost, epsilon, rho_a, rho_b
        return value.clone()

    @staticmethod
    def backward(ctx, grad):
        x, y, a, b, f, g = ctx.saved_tensors
        cost, epsilon, rho_a, rho_b = ctx.options
        needs = ctx.needs_input_grad
        grad = grad.unsqueeze(-1)
        dx = dy = da = db = None
        wa, wb = (grad * a).unsqueeze(-1), b.unsqueeze(-1)
        if needs[1]:
            dx = cost_gradient(x, y, f, g, wa, wb, cost, epsilon)
        if needs[2]:
            dy = cost_gradient(y, x, g, f, wb, wa, cost, epsilon)
        if needs[3]:
            da = grad * _weight_gradient(f, b, epsilon, rho_a)
        if needs[4]:
            db = grad * _weight_gradient(g, a, epsilon, rho_b)
        return None, dx, dy, da, db, *[None] * 6


def _weight_gradient(potential, other, epsilon, rho):
    """dV/da: f along the simplex; the soft side's own."""
    if rho < 0:
        return potential
    shrunk = torch.expm1(-potential / rho)  # P 1 = a (1 + shrunk) at the solution
    return -rho * shrunk - epsilon * (1.0 + shrunk - other.sum(-1, keepdim=True))


def run_points(*arguments):
    """The op, or its reference where that is asked for."""
    op = _sinkhorn_points if use_reference() else _op.sinkhorn_points
    return op(*arguments)


def run_symmetric(*arguments):
    """The op of averaged updates, or its reference."""
    op = _sinkhorn_points_symmetric if use_reference() else _op.sinkhorn_points_symmetric
    return op(*arguments)


def solve_points(
    x, y, a, b, f, g, cost, epsilons, rho_a, rho_b, momentum, iterations, tolerance, every
):
    """(f, g, value, iterations, error, converged) of checked tensors, with gradients where they are needed."""
    rest = (momentum, iterations, tolerance, every)
    if torch._C._are_functorch_transforms_active():
        return points_reference(x, y, a, b, f, g, cost, epsilons, rho_a, rho_b, *rest)
    if not needs_graph(x, y, a, b):
        return run_points(x, y, a, b, f, g, cost, epsilons, rho_a, rho_b, *rest)
    f, g, value, *state = _Potentials.apply(
        x, y, a, b, f, g, cost, epsilons, rho_a, rho_b, False, *rest
    )
    held = (f.detach(), g.detach()) if torch.compiler.is_compiling() else (f, g)
    value = _Value.apply(value, x, y, a, b, *held, cost, epsilons[-1], rho_a, rho_b)
    return f, g, value, *state


def solve_alone(x, a, cost, epsilons, rho):
    """(f, value) of x with itself by averaged updates, differentiable like `solve_points`."""
    epsilon = epsilons[-1]
    if torch._C._are_functorch_transforms_active():
        f, _ = _sinkhorn_points_symmetric(x, None, a, None, cost, epsilons, rho)
        return f, _alone_value(x, a, f, cost, epsilon, rho)
    if not needs_graph(x, a):
        f, _ = run_symmetric(x, None, a, None, cost, epsilons, rho)
        return f, _alone_value(x, a, f, cost, epsilon, rho)
    f, g, *_ = _Potentials.apply(
        x, x, a, a, None, None, cost, epsilons, rho, rho, True, 1.0, 1, 0.0, 1
    )
    value = _alone_value(x.detach(), a.detach(), f.detach(), cost, epsilon, rho)
    return f, _Value.apply(value, x, x, a, a, f, g, cost, epsilon, rho, rho)


def _alone_value(x, a, f, cost, epsilon, rho):
    """The dual value of x with itself at (f, f)."""
    after = points_softmin(x, x, f, a, cost, epsilon)
    mass = (a * torch.exp((f - after) / epsilon)).sum(-1)
    return 2.0 * dual_term(a, f, rho) - epsilon * (mass - a.sum(-1).square())
