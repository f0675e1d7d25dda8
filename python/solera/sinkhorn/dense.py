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

**Unbalanced** problems penalise the marginals instead of fixing them, each side by its own $\rho$ or not at all:

$$\min_{P \ge 0} \langle P, C\rangle + \varepsilon\,\mathrm{KL}(P \,|\, a b^\top)
  + \rho_a \mathrm{KL}(P\mathbf 1 \,|\, a) + \rho_b \mathrm{KL}(P^\top\mathbf 1 \,|\, b),\qquad
  \mathrm{KL}(p|q) = \sum p \log\tfrac pq - p + q .$$

The dual value becomes
$V = \langle a,\varphi_a(f)\rangle + \langle b,\varphi_b(g)\rangle - \varepsilon\sum_{ij} (P_{ij} - a_i b_j)$ with
$\varphi(f) = -\rho\,(e^{-f/\rho} - 1)$, or $f$ for a hard side. Its derivative in $f_i$ is
$a_i (e^{-f_i/\rho} - s_i)$, $s_i = \sum_j b_j E_{ij}$, and setting it to 0 damps the update:

$$f_i = -\frac{\rho\,\varepsilon}{\rho + \varepsilon} \log \sum_j b_j e^{(g_j - C_{ij})/\varepsilon} .$$

So $a\,e^{-f/\rho}$ is the marginal that a potential asks for, and $\sum_i a_i |s_i - e^{-f_i/\rho}|$ the error (the
other side's is 0 after its update). The potentials are unique, without a gauge, and
$\mathrm dV/\mathrm da = \varphi_a(f) - \varepsilon\,(e^{-f/\rho} - \sum b)$ in every direction.

**Over-relaxation.** With momentum w a potential takes w times the step, $f_i \leftarrow f_i + w\,(f_i^{new} - f_i)$.
Near the solution that turns the rate $r$ into as little as $w - 1$ at $w = 2 / (1 + \sqrt{1 - r})$. Where it
could lower the dual value, which a look at $s_i e^{f_i/\rho}$ tells, the step is a plain one: the dual value
never falls.

**Gradients of the potentials** (and with them of the plan) are those of the fixed point, one linear solve:
see `_adjoint.py`. Balanced, the gauge $\langle a,f\rangle = \langle b,g\rangle$ sends a gradient $(u', v')$ to
$u = u' - Da$, $v = v' + Db$, $\mathrm da \mathrel{-}= Df$, $\mathrm db \mathrel{+}= Dg$ with
$D = (\sum u' - \sum v') / (\sum a + \sum b)$.

Nothing is recorded per iteration. The formulas hold at the solution: before convergence a gradient is off
by a relative amount of the order of marginal_error / (1 - r), where r < 1 is Sinkhorn's linear rate, the square
of the second singular value of $\mathrm{diag}(\sqrt a)\,E\,\mathrm{diag}(\sqrt b)$.

Sources: Cuturi, "Sinkhorn Distances", 2013; Peyré, Cuturi, "Computational Optimal Transport", 2019 (ch. 4);
Luise et al., "Differential Properties of Sinkhorn Approximation", 2018 (implicit gradients); Chizat et al.,
"Scaling Algorithms for Unbalanced Transport Problems", 2018; Thibault et al., "Overrelaxed Sinkhorn-Knopp
Algorithm for Regularized Optimal Transport", 2021.
"""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from .. import _check
from .._registry import accumulate_type
from .._route import needs_graph, use_reference
from . import dense_arguments as arguments
from ._adjoint import adjoint
from .dense_reference import asked, dual_part, sinkhorn_reference
from .dense_reference import sinkhorn_dense as _sinkhorn_dense
from .plan import _sinkhorn_plan, plan_reference, transforms_active, within
from .result import SinkhornResult

_op = torch.ops.solera


# ---- autograd ----------------------------------------------------------------------------------------


def _solve(*args):
    return (_sinkhorn_dense if use_reference() else _op.sinkhorn_dense)(*args)


class _Potentials(torch.autograd.Function):
    """The solve. f and g are differentiable, implicitly; the value gets its gradient in `_Value`."""

    @staticmethod
    def forward(ctx, cost, a, b, f, g, epsilon, loop, rho_a, rho_b, momentum, lengths):
        f, g, value, iterations, error, converged = _solve(
            cost, a, b, f, g, epsilon, *loop, rho_a, rho_b, momentum, lengths
        )
        ctx.save_for_backward(cost, a, b, f, g, lengths)
        ctx.epsilon, ctx.rho = epsilon, (rho_a, rho_b)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(value, iterations, error, converged)
        return f, g, value, iterations, error, converged

    @staticmethod
    def backward(ctx, du, dv, *_):
        if du is None and dv is None:
            return (None,) * 11
        cost, a, b, f, g, lengths = ctx.saved_tensors
        need_cost, need_a, need_b = ctx.needs_input_grad[:3]
        if lengths is not None:
            rows, columns = within(lengths, *cost.shape[-2:])
            du = du if du is None else torch.where(rows, du, 0.0)
            dv = dv if dv is None else torch.where(columns, dv, 0.0)
        solved = adjoint(cost, a, b, f, g, ctx.epsilon, du, dv, ctx.rho[0], ctx.rho[1], lengths)
        x, y, da, db = (t.to(cost.dtype) for t in solved)
        dcost = None
        if need_cost:
            dcost = _plan_gradient(cost, a, b, f, g, x, y, ctx.epsilon, lengths)
        return dcost, da if need_a else None, db if need_b else None, *[None] * 8


class _Value(torch.autograd.Function):
    """The value with its envelope gradient; none to f and g, in which it is stationary."""

    @staticmethod
    def forward(ctx, value, cost, a, b, f, g, epsilon, rho_a, rho_b, lengths):
        ctx.save_for_backward(cost, a, b, f, g, lengths)
        ctx.epsilon, ctx.rho = epsilon, (rho_a, rho_b)
        return value.clone()

    @staticmethod
    def backward(ctx, grad):
        cost, a, b, f, g, lengths = ctx.saved_tensors
        _, need_cost, need_a, need_b, *_ = ctx.needs_input_grad
        grad, epsilon = grad.unsqueeze(-1), ctx.epsilon
        dcost = da = db = None
        if need_cost:
            dcost = _plan_gradient(cost, a, b, f, g, grad * a, None, epsilon, lengths)
        free = ctx.rho != (None, None)  # balanced, a and b move along the simplex only

        def slope(f, rho, others):
            out = dual_part(f, rho)
            return out - epsilon * (asked(f, rho) - others.sum(-1, keepdim=True)) if free else out

        if need_a:
            da = grad * slope(f, ctx.rho[0], b)
        if need_b:
            db = grad * slope(g, ctx.rho[1], a)
        return None, dcost, da, db, *[None] * 6


def _plan_gradient(cost, a, b, f, g, x, y, epsilon, lengths):
    if torch.is_grad_enabled():
        # Second derivatives: f and g are outputs of `_Potentials`, so everything here is connected.
        return plan_reference(cost, a, b, f, g, x, y, epsilon, lengths)
    op = _sinkhorn_plan if use_reference() else _op.sinkhorn_plan
    return op(cost, a, b, f, g, x, y, epsilon, lengths)


def _differentiable(cost, a, b, f, g, epsilon, loop, rho_a, rho_b, momentum, lengths):
    f, g, value, *state = _Potentials.apply(
        cost, a, b, f, g, epsilon, loop, rho_a, rho_b, momentum, lengths
    )
    # Connected, f and g carry the second derivatives. There are none under torch.compile, which would run
    # a connected node on zeros: detached, a loss on the value alone leaves no solve in its backward.
    held = (f.detach(), g.detach()) if torch.compiler.is_compiling() else (f, g)
    value = _Value.apply(value, cost, a, b, *held, epsilon, rho_a, rho_b, lengths)
    return f, g, value, *state


# ---- public function ---------------------------------------------------------------------------------

GRADIENTS = ("auto", "unrolled", "none")


def sinkhorn(
    cost: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    epsilon: float,
    max_iterations: int = 100,
    tolerance: float = 0.0,
    check_every: int = 10,
    rho: float | tuple[float | None, float | None] | None = None,
    momentum: float = 1.0,
    epsilon_scaling: float | tuple[float, float] | list[float] | None = None,
    lengths: tuple[Tensor | int | None, Tensor | int | None] | None = None,
    init: SinkhornResult | tuple[Tensor, Tensor] | None = None,
    gradient: str = "auto",
    validate: bool | None = None,
) -> SinkhornResult:
    r"""Entropic optimal transport by Sinkhorn iterations in the log domain.

    Minimises $\langle P, C\rangle + \varepsilon\,\mathrm{KL}(P|ab^\top)$ over plans with marginals a and b;
    $P_{ij} = a_i b_j e^{(f_i + g_j - C_{ij})/\varepsilon}$. Each iteration updates f, then g. With `rho` the
    marginals are penalised instead: $+ \rho_a\mathrm{KL}(P\mathbf 1|a) + \rho_b\mathrm{KL}(P^\top\mathbf 1|b)$.

    Args:
        cost: (..., n, m), any leading batch; float32 or float64, half precision is computed in float32 and
            gives float32 results. +inf forbids a pair.
        a, b: (..., n) and (..., m), or (n,) and (m,) for every batch item; >= 0, of equal totals (any, with
            rho); uniform (total 1) if None. A zero weight gives a zero row of the plan and a finite potential.
        epsilon: > 0, in the units of cost. Stable down to 1e-4 of the cost's range in float32.
        max_iterations: >= 1.
        tolerance: an item stops when its `marginal_error` is at most this, looked at after every
            `check_every` iterations, on the device. 0 runs max_iterations.
        rho: None (or inf) for hard marginals; a number > 0, in the units of cost, penalises both; a pair,
            with None for a hard side, is semi-unbalanced. The larger rho / epsilon, the slower.
        momentum: w in [1, 2), over-relaxation: updates go w times as far, those after which the dual value
            might be lower excepted. 1 is plain Sinkhorn; try 1.5 to 1.9 where that is slow. Iterations that
            are followed by a look at the error, and the last one, are plain.
        epsilon_scaling: None, a start or a pair (start, factor), factor 0.5 if not given: iteration
            k = 0, 1, ... is a plain one with the larger epsilon start * factor^k until that would be epsilon or
            less; or a list of those epsilons. They count as iterations; the error is looked at only from
            then on. A start of the size of the largest cost is usual.
        lengths: (row lengths, column lengths), integer tensors of the batch's shape (or an int, or None for
            all): the part of each item that is real. What cost and weights hold in the padding, NaN too, is
            not read; default weights are uniform over the real part; the plan, the potentials and the
            gradients are 0 there. An item of no rows or no columns costs 0 and has converged.
        init: potentials (f, g) or an earlier result to start from; not differentiated.
        gradient: "auto": envelope for `cost`, implicit for everything else, at no memory per iteration.
            "unrolled": autograd through the iterations of the reference (slow; for comparison). "none".
        validate: check values (NaN, negative weights, totals, infeasible rows, lengths) and raise. None: on for
            CPU tensors in eager mode, off elsewhere. Never done under torch.compile and torch.func transforms.
            Without it a bad batch item has NaN potentials and converged = False; others are untouched.

    Shapes: cost (..., n, m) -> f (..., n), g (..., m), cost, iterations, marginal_error, converged (...).

    Gradients flow from `result.cost` to cost (the plan), a and b (balanced: f and g, meant along the simplex;
    unbalanced: in every direction), and from f, g, `result.plan()` and all that is made of them by implicit
    differentiation (one linear solve of size min(n, m); no tape). They are those of the converged solution: with a
    marginal error e left, off by the order of e / (1 - r), r < 1 being the rate at which it falls. The backward
    passes can be differentiated again: Hessian-vector products of `result.cost` are one such solve each. Under
    torch.func transforms and forward-mode AD the iterations themselves are differentiated.

    Raises:
        ValueError, TypeError: naming the argument.
    Warns:
        UserWarning: on the CPU in eager mode, if tolerance > 0 was not reached.

    Sources: Cuturi, "Sinkhorn Distances: Lightspeed Computation of Optimal Transport", 2013; Chizat et al., "Scaling
    Algorithms for Unbalanced Transport Problems", 2018; Thibault et al., "Overrelaxed Sinkhorn-Knopp Algorithm", 2021.
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
    arguments.count("max_iterations", max_iterations)
    arguments.count("check_every", check_every)
    rho_a, rho_b = arguments.penalties(rho)
    momentum = arguments.relaxation(momentum)
    earlier = arguments.schedule(epsilon_scaling, epsilon, max_iterations)
    _check.choice("gradient", gradient, GRADIENTS)
    _check.choice("validate", validate, (None, True, False))
    limits = arguments.bounds(
        lengths, cost, tuple(cost.shape), f"cost of shape {tuple(cost.shape)}"
    )
    rows, columns = (None, None) if limits is None else within(limits, n, m)
    weight_a = arguments.weights("a", a, n, cost, rows)
    weight_b = arguments.weights("b", b, m, cost, columns)
    f0, g0 = arguments.initial(init, cost)
    compiling, transforms = torch.compiler.is_compiling(), transforms_active()
    eager_cpu = cost.device.type == "cpu" and not compiling and not transforms
    if not compiling and not transforms and (eager_cpu if validate is None else validate):
        if cost.numel() > 0:
            kinds = [t.dtype for t in (a, b) if t is not None] or [acc]
            arguments.check_values(
                cost.detach(),
                weight_a.detach(),
                weight_b.detach(),
                limits,
                rho_a is None and rho_b is None,
                max(arguments.TOTALS[k] for k in kinds),
            )

    count = math.prod(batch)
    cost3 = cost.to(acc).reshape(count, n, m)
    a2, b2 = weight_a.reshape(count, n), weight_b.reshape(count, m)
    if limits is not None:
        limits = limits.reshape(count, 2)
    if gradient == "none":
        cost3, a2, b2 = cost3.detach(), a2.detach(), b2.detach()
    if f0 is not None and g0 is not None:
        f0, g0 = f0.reshape(count, n), g0.reshape(count, m)
    unrolled = transforms or (gradient == "unrolled" and needs_graph(cost3, a2, b2))
    for larger in earlier:
        run = sinkhorn_reference if unrolled else _solve
        tensors = (cost3, a2, b2) if unrolled else (cost3.detach(), a2.detach(), b2.detach())
        f0, g0, *_ = run(*tensors, f0, g0, larger, 1, 0.0, 1, rho_a, rho_b, 1.0, limits)
    loop = (max_iterations - len(earlier), tolerance, check_every)
    rest = (rho_a, rho_b, momentum, limits)
    if unrolled:
        out = sinkhorn_reference(cost3, a2, b2, f0, g0, epsilon, *loop, *rest)
    elif needs_graph(cost3, a2, b2):
        out = _differentiable(cost3, a2, b2, f0, g0, epsilon, loop, *rest)
    else:
        out = _solve(cost3, a2, b2, f0, g0, epsilon, *loop, *rest)
    f, g, value, iterations, error, converged = out
    if earlier:
        iterations = iterations + len(earlier)
    if tolerance > 0 and eager_cpu and not bool(converged.all()):
        advice = "a larger epsilon, momentum=1.5"
        finite = cost3.detach()[cost3.detach() < math.inf]
        if not earlier and finite.numel():  # else all is NaN or forbidden
            advice += f", epsilon_scaling={float(finite.max()):.2g}"
        warnings.warn(
            f"solera.sinkhorn: {int((~converged).sum())} of {count} problems have a marginal error above "
            f"tolerance={tolerance:g} after max_iterations={max_iterations} at epsilon={epsilon:g} (largest "
            f"{float(error.max()):.3g}). Try more iterations, {advice} or a larger tolerance.",
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
        limits,
    )
