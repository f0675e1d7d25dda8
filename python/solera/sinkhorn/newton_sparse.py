r"""Core `newton_sparse`: one step of Sinkhorn-Newton-Sparse, and the solver made of such steps.

Sinkhorn's iteration converges linearly, and slowly where epsilon is small; Newton's on the same dual converges
quadratically. With $P_{ij} = a_i b_j e^{(f_i + g_j - C_{ij})/\varepsilon}$, $p = P\mathbf 1$ and
$q = P^\top\mathbf 1$ the dual value $V = \langle a,f\rangle + \langle b,g\rangle - \varepsilon\sum_{ij}P_{ij}$ has

$$\nabla V = (a - p,\ b - q),\qquad \nabla^2 V = -\tfrac1\varepsilon
  \begin{pmatrix}\mathrm{diag}\,p & P\\ P^\top & \mathrm{diag}\,q\end{pmatrix},$$

so an ascent step solves

$$\begin{pmatrix}\mathrm{diag}\,p & S\\ S^\top & \mathrm{diag}\,q\end{pmatrix}\begin{pmatrix}x\\y\end{pmatrix}
  = \begin{pmatrix}a - p\\ b - q\end{pmatrix},\qquad (f, g) \leftarrow (f, g) + \alpha\varepsilon\,(x, y).$$

S is P truncated to the largest entries of each row of its longer side; the diagonals are the sums of the whole P,
and stay. (The matrix is then diagonally dominant. Thresholding the whole Hessian, diagonal included, can make it
singular; descending along the negative of this direction, as a sign slip in a public port does, never gains.) No
dual variable is fixed: the constant that can move between f and g is left to the solver, since a truncated system
with one variable grounded stalls.

**Solve.** On a CPU conjugate gradients with the heaviest spanning forest as preconditioner (about 20 iterations to
1e-6 where the diagonal alone takes 300, or never ends), no further than the step can gain; on a GPU likewise on the
Schur complement $\mathrm{diag}\,q - S^\top\mathrm{diag}(1/p)\,S$ with its own diagonal and no tree; in the reference a
Cholesky factor of that. A relative `shift` of 1e-13 keeps modes finite in which blocks exchange less than that.

**Truncation.** Convergence follows the mass that S drops: above 1e-3, or where two steps in a row gain less than a
factor of two, keep_per_row is doubled, up to the whole plan where the shorter side allows that (2048): then the
step is Newton's own. Beyond, or where no step is accepted any more, Sinkhorn's iteration goes on from there.

**Line search.** Halving, until V has risen by 1e-4 of its predicted rise. Near the solution that rise is below V's
rounding: there the slope at the new point has to be positive or the L1 norm of the gradient to fall. Where the
slope has hardly fallen the step is doubled instead: where a mode of the plan is too large by a factor e^t, plain
Newton steps take t of them.

**Far from the solution** (an error above 0.05 after the first Sinkhorn iterations) the problem is first solved
roughly for 4 epsilon, by the same rule, and the error is added to the scaled diagonal (times 0.01) all along.

Everything is in float64: a truncated Newton step in float32 has nothing to gain over Sinkhorn.

Sources: Tang, Shavlovsky, Rahmanian, Tardini, Thekumparampil, Xiao, Ying, "Accelerating Sinkhorn Algorithm with
Sparse Newton Iterations", 2024; the preconditioner: Vaidya, 1990, as in Gremban, "Combinatorial Preconditioners for
Sparse, Symmetric, Diagonally Dominant Linear Systems", 1996.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from .. import _check
from .._registry import reference
from .._route import use_reference
from .dense import sinkhorn
from .dense_arguments import TOTALS as _TOTALS
from .dense_arguments import count as _count
from .dense_arguments import weights as _weights
from .plan import kernel_matrix, transforms_active
from .result import SinkhornResult

_op = torch.ops.solera

SHIFT = 1e-13  # of the scaled diagonal
WHOLE = 2048  # shorter side up to which the whole plan is factored
WIDEST = 64  # entries a row beyond which truncation is given up
# Marginal errors from which on a larger epsilon comes first, and how far it is solved.
_FAR, _NEAR = 0.05, 1e-3
_DROPPED = 1e-3  # mass left out of S above which keep_per_row grows


# ---- reference ---------------------------------------------------------------------------------------


@reference("sinkhorn_newton_pass")
def newton_pass_reference(cost, a, b, f, g, epsilon, keep):
    """Row sums, column sums, and the `keep` largest entries of each row with their columns."""
    plan = kernel_matrix(cost, f, g, epsilon) * b.unsqueeze(-2) * a.unsqueeze(-1)
    values, index = plan.topk(keep, -1)
    return plan.sum(-1), plan.sum(-2), values, index


@reference("sinkhorn_newton_solve")
def newton_solve_reference(values, index, p, q, ra, rb, shift, tolerance, max_iterations):
    """The solution by a Cholesky factor; `tolerance` and `max_iterations` concern iterative solvers."""
    s = values.new_zeros(*p.shape, q.shape[-1]).scatter(-1, index, values)
    x, y = solve_schur(s, p, q, ra, rb, shift, deflate=False)
    return x, y, torch.zeros(p.shape[:1], dtype=torch.int64, device=p.device)


def solve_schur(s, p, q, ra, rb, shift, deflate):
    """(x, y) through the Schur complement on the columns, scaled to a unit diagonal.

    `deflate` takes out the constant that can move between f and g: for the whole plan, of which it is a
    null vector.
    """
    row, column = (torch.where(t > 0, t, torch.inf).rsqrt() for t in (p, q))
    w = s * row.unsqueeze(-1) * column.unsqueeze(-2)
    wt = w.transpose(-1, -2)
    d = 1.0 + shift
    system = wt @ w / -d
    system.diagonal(dim1=-2, dim2=-1).add_(d)
    if deflate:
        null = q.sqrt() / q.sum(-1, keepdim=True).sqrt()
        system = system + null.unsqueeze(-1) * null.unsqueeze(-2)
    factor, failed = torch.linalg.cholesky_ex(system)
    u = (ra * row).unsqueeze(-1)
    v = torch.cholesky_solve((rb * column).unsqueeze(-1) - wt @ u / d, factor)
    v = torch.where(failed[:, None, None] != 0, torch.nan, v)
    u = (u - w @ v) / d
    return u.squeeze(-1) * row, v.squeeze(-1) * column


# ---- the loop ----------------------------------------------------------------------------------------


@dataclass
class _Report:
    """How one problem went."""

    newton_steps: int = 0
    cg_iterations: int = 0
    keep_per_row: int = 0
    dropped_mass: float = 0.0
    returned_to_sinkhorn: bool = False
    iterations: int = 0  # of Sinkhorn, after Newton's steps


class _Newton:
    """Newton's iteration on one problem, cost (1, n, m) with n >= m, from potentials (f, g)."""

    def __init__(self, cost, a, b, f, g, epsilon, keep):
        self.problem, self.epsilon = (cost, a, b), epsilon
        # Rows and columns in one vector each, (n + m): half the calls on vectors this short.
        self.weights, self.potentials = torch.cat([a[0], b[0]]), torch.cat([f[0], g[0]])
        self.report = _Report()
        self.iterations: list[Tensor] = []
        self._keep(min(keep, WIDEST) if cost.shape[-1] > WHOLE else keep)

    def _keep(self, keep: int) -> bool:
        """Keep so many entries a row, or the whole plan; False if neither can be."""
        m = self.problem[0].shape[-1]
        whole = 4 * keep > m or keep > WIDEST
        if whole and m > WHOLE:
            return False
        self.whole = whole
        self.report.keep_per_row = m if self.whole else keep
        self.state = self._look(self.potentials)
        self.error, self.mass, kept, self.size = self._read(self.state, self.potentials)
        self.report.dropped_mass = 0.0 if self.whole else max(0.0, 1.0 - kept / self.mass)
        return True

    def _sides(self, both: Tensor) -> tuple[Tensor, Tensor]:
        """(1, n) and (1, m) of (n + m)."""
        f, g = both.unsqueeze(0).split(self.problem[0].shape[1:], -1)
        return f, g

    def _look(self, potentials):
        """Marginals asked for less those of the plan, (n + m), and the plan's sums and largest entries."""
        op = newton_pass_reference if use_reference() else _op.sinkhorn_newton_pass
        keep = 0 if self.whole else self.report.keep_per_row
        p, q, values, index = op(*self.problem, *self._sides(potentials), self.epsilon, keep)
        return self.weights - torch.cat([p[0], q[0]]), p, q, values, index

    def _read(self, state, potentials, *more: Tensor) -> list[float]:
        """(error, mass, mass kept, largest potential, ...) on the host: the one synchronisation of a trial."""
        rest, p, _, values, _ = state
        first = (rest.abs().sum(), p.sum(), values.sum(), potentials.abs().max())
        return torch.stack([*first, *more]).tolist()

    def _direction(self):
        """Newton's step in units of epsilon, (n + m)."""
        rest, p, q, values, index = self.state
        ra, rb = self._sides(rest)
        shift = SHIFT + 1e-2 * self.error / self.mass
        if self.whole:
            cost, a, b = self.problem
            f, g = self._sides(self.potentials)
            if use_reference():
                plan = kernel_matrix(cost, f, g, self.epsilon)
                plan = plan * b.unsqueeze(-2) * a.unsqueeze(-1)
            else:
                plan = _op.sinkhorn_plan(cost, a, b, f, g, a, None, self.epsilon)
            x, y = solve_schur(plan, p, q, ra, rb, shift, deflate=True)
        else:
            op = newton_solve_reference if use_reference() else _op.sinkhorn_newton_solve
            x, y, iterations = op(values, index, p, q, ra, rb, shift, self._accuracy(), 1000)
            self.iterations.append(iterations)
        return torch.cat([x[0], y[0]])

    def _accuracy(self) -> float:
        """Of the linear solve: a tenth of what the step can gain, by its own size and the mass left out."""
        left = max(self.error / self.mass, self.report.dropped_mass)
        return max(1e-6, min(1e-2, 0.1 * left**0.5))

    def run(self, max_newton: int, tolerance: float) -> None:
        """Steps until `error` is at most the tolerance, or truncation and step length have no way on."""
        if self.report.returned_to_sinkhorn:  # already for a larger epsilon
            return
        slow, limit = 0, self.report.newton_steps + max_newton
        while self.report.newton_steps < limit and not self.error <= tolerance:
            if not self.error < float("inf"):
                self.report.returned_to_sinkhorn = True
                break
            if not self.whole and self._truncates(slow):
                slow = 0
                if not self._keep(2 * self.report.keep_per_row):
                    self.report.returned_to_sinkhorn = True
                    break
                continue
            before = self.error
            length = self._search(self._direction())
            self.report.newton_steps += 1
            if length == 0.0:
                if self.error <= self._rounding():
                    break
                if not self._truncates(2):
                    self.report.returned_to_sinkhorn = True
                    break
            slow = slow + 1 if self.error > 0.5 * before and length >= 0.5 else 0
            if slow and self.error <= self._rounding():
                break
            if length == 0.0:
                slow = 2
        else:
            self.report.returned_to_sinkhorn = not self.error <= tolerance
        if self.iterations:
            self.report.cg_iterations = int(torch.stack(self.iterations).sum())

    def _truncates(self, slow: int) -> bool:
        dropped = self.report.dropped_mass
        return dropped > _DROPPED or (slow >= 2 and dropped > 1e-7)

    def _rounding(self) -> float:
        """The marginal error that one rounding of the potentials makes in every entry, with a margin."""
        return 1e-15 * max(2 * self.size / self.epsilon, 1.0) * self.mass

    def _search(self, step) -> float:
        """Move along `step` by the first accepted of 1, 1/2, 1/4, ..., or 2, 4, ...; 0 if none is."""
        start, error_before, mass_before = self.potentials, self.error, self.mass
        near = error_before <= self._rounding()
        slope, linear = (self.state[0] * step).sum(), (self.weights * step).sum()
        length, best = 1.0, 0.0
        while 1e-9 < length < 100:
            potentials = torch.add(start, step, alpha=length * self.epsilon)
            state = self._look(potentials)
            error, mass, kept, size, rise, first, still = self._read(
                state, potentials, slope, linear, (state[0] * step).sum()
            )
            if not rise > 0:
                break
            # In units of epsilon; masses near 1 cancel to about 1e-15 of what is added.
            gain = length * first - (mass - mass_before)
            if near or best > 0:
                accepted = error < self.error and (still > 0 or best == 0)
            elif rise * length > 1e-12 * (mass_before + abs(first)):
                accepted = still >= 0 or gain >= 1e-4 * length * rise
            else:
                accepted = still >= 0 or error < error_before
            if accepted:
                self.potentials, self.state, self.size = potentials, state, size
                self.error, self.mass, best = error, mass, length
                if not self.whole:
                    self.report.dropped_mass = max(0.0, 1.0 - kept / mass)
                if length < 1 or still < 0.2 * rise:
                    break
                length *= 2
            elif best > 0:
                break
            else:
                length /= 2
        return best


def _started(cost, a, b, f, g, epsilon, keep, n_sinkhorn, max_newton, coarser=12) -> _Newton:
    """Newton's iteration ready to run: where (f, g) are far from a solution, by way of 4 epsilon first."""
    newton = _Newton(cost, a, b, f, g, epsilon, keep)
    if coarser == 0 or not newton.error > _FAR * newton.mass:  # NaN has nowhere to go
        return newton
    options = {"max_iterations": n_sinkhorn, "validate": False}
    first = sinkhorn(cost, a, b, epsilon=4 * epsilon, **options)
    coarse = _started(
        cost, a, b, first.f, first.g, 4 * epsilon, keep, n_sinkhorn, max_newton, coarser - 1
    )
    coarse.run(max_newton, _NEAR * coarse.mass)
    if coarse.report.returned_to_sinkhorn:
        newton.report.returned_to_sinkhorn = True
        return newton
    near = sinkhorn(cost, a, b, epsilon=epsilon, init=coarse._sides(coarse.potentials), **options)
    closer = _Newton(cost, a, b, near.f, near.g, epsilon, keep)
    done = coarse.report
    closer.report.newton_steps = done.newton_steps
    closer.report.iterations = done.iterations + 2 * n_sinkhorn
    closer.iterations = coarse.iterations
    return closer


def _solve_one(cost, a, b, f, g, epsilon, keep, n_sinkhorn, max_newton, tolerance, max_iterations):
    """(f, g, report) of one problem, (n, m); the longer side becomes the rows."""
    n, m = cost.shape
    flip = n < m
    if flip:
        cost, a, b, f, g = cost.mT.contiguous(), b, a, g, f
    cost, a, b, f, g = (t.unsqueeze(0) for t in (cost, a, b, f, g))
    newton = _started(cost, a, b, f, g, epsilon, min(keep, min(n, m)), n_sinkhorn, max_newton)
    newton.run(max_newton, tolerance)
    (f, g), report = newton._sides(newton.potentials), newton.report
    if report.returned_to_sinkhorn:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the caller warns once, of the whole batch
            result = sinkhorn(
                cost, a, b, epsilon=epsilon, max_iterations=max_iterations, init=(f, g),
                validate=False, tolerance=0.5 * tolerance,
            )  # fmt: skip
        f, g = result.f, result.g
        report.iterations += int(result.iterations)
    f, g = f[0], g[0]
    return (g, f, report) if flip else (f, g, report)


# ---- public function ---------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class NewtonResult(SinkhornResult):
    """A `SinkhornResult` with the history of the Newton stage, per problem.

    Attributes:
        newton_steps, cg_iterations: (...), int64; cg_iterations is 0 where a direct solver serves.
        keep_per_row: (...), int64, entries a row (of the longer side) kept at the end; all of them is the
            length of the shorter side.
        dropped_mass: (...), the share of the plan's mass outside them.
        returned_to_sinkhorn: (...), bool: Newton's iteration did not get there, Sinkhorn's went on.

    Shapes: as `SinkhornResult`. `iterations` counts the Sinkhorn iterations before and after Newton's.
    """

    newton_steps: Tensor
    cg_iterations: Tensor
    keep_per_row: Tensor
    dropped_mass: Tensor
    returned_to_sinkhorn: Tensor


def _flatten(result: NewtonResult) -> tuple[list[Any], Any]:
    values = {f.name: getattr(result, f.name) for f in fields(result)}
    fixed = tuple((k, v) for k, v in values.items() if not isinstance(v, Tensor | tuple))
    moving = {k: v for k, v in values.items() if isinstance(v, Tensor | tuple)}
    return list(moving.values()), (tuple(moving), fixed)


def _unflatten(values: Any, context: Any) -> NewtonResult:
    names, fixed = context
    return NewtonResult(**dict(zip(names, values)), **dict(fixed))


_pytree.register_pytree_node(
    NewtonResult, _flatten, _unflatten, serialized_type_name="solera.sinkhorn.NewtonResult"
)


def _outside_graphs(function: Callable[..., NewtonResult]) -> Callable[..., NewtonResult]:
    """`torch.compiler.disable`, asked for at a compiled call: as a decorator it would import torch's compiler here."""

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> NewtonResult:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)(*args, **options)
        return function(*args, **options)

    return call


@_outside_graphs
def sinkhorn_newton_sparse(
    cost: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    epsilon: float,
    n_sinkhorn: int = 20,
    keep_per_row: int = 8,
    max_newton: int = 100,
    max_iterations: int = 10000,
    tolerance: float = 1e-12,
    validate: bool | None = None,
) -> NewtonResult:
    r"""Entropic optimal transport to high accuracy at small epsilon: Sinkhorn, then sparse Newton steps.

    The problem, its conventions and its gradients are those of `sinkhorn`. For plans that are nearly sparse
    (assignments at epsilon far below the cost's range) about ten steps of O(n m) take the place of tens of
    thousands of iterations. A dense plan (large epsilon, smooth costs) is not what it is for: it is noticed,
    and served by whole Newton steps or by Sinkhorn's iteration.

    Args:
        cost: (..., n, m); +inf forbids a pair. Computed in float64 and returned in float64 whatever the
            dtype, so float32 input reaches the same tolerance.
        a, b: as in `sinkhorn`.
        epsilon: > 0, in the units of cost.
        n_sinkhorn: Sinkhorn iterations before the first Newton step.
        keep_per_row: entries kept of each row of the plan (of the longer side) in the Newton system, to start
            with: doubled where they leave out more than 1e-3 of the mass or where steps gain too little, up
            to the whole plan (shorter side up to 2048).
        max_newton: Newton steps, at most.
        max_iterations: of the Sinkhorn iteration that goes on where Newton's stalls.
        tolerance: on the L1 error of both marginals together. float64 reaches about 1e-16 |f| / epsilon:
            below that no step gains, and `converged` is False.
        validate: as in `sinkhorn`.

    Shapes: cost (..., n, m) -> f (..., n), g (..., m), everything else (...). The problems of a batch are
    solved one after another, each with its own keep_per_row and stopping.

    The loop is on the host and reads three numbers a trial step: one synchronisation each on a GPU. Gradients
    are `sinkhorn`'s (envelope, implicit; with the whole plan). torch.compile leaves the call to eager mode.

    Raises:
        ValueError, TypeError: naming the argument.
        RuntimeError: under torch.func transforms and forward-mode AD, which cannot follow the loop.
    Warns:
        UserWarning: on the CPU, if the tolerance was not reached.

    Source: Tang et al., "Accelerating Sinkhorn Algorithm with Sparse Newton Iterations", 2024.
    """
    if transforms_active():
        raise RuntimeError(
            "sinkhorn_newton_sparse: torch.func transforms and forward-mode AD cannot follow its loop; use "
            "solera.sinkhorn.sinkhorn, or autograd without a transform"
        )
    _check.tensor("cost", cost, min_dim=2)
    for name, value in (
        ("n_sinkhorn", n_sinkhorn),
        ("keep_per_row", keep_per_row),
        ("max_newton", max_newton),
        ("max_iterations", max_iterations),
    ):
        _count(name, value)
    tolerance = _check.number("tolerance", tolerance, low=0.0)
    kinds = [t.dtype for t in (a, b) if isinstance(t, Tensor)]
    cost = cost.to(torch.float64)
    *_, n, m = cost.shape
    if n == 0 or m == 0:
        raise ValueError(f"cost: expected at least one row and one column, got {tuple(cost.shape)}")
    a, b = _weights("a", a, n, cost), _weights("b", b, m, cost)
    b = _same_total(a, b, max((_TOTALS[k] for k in kinds if k in _TOTALS), default=0.0))
    with torch.no_grad():
        start = sinkhorn(cost, a, b, epsilon=epsilon, max_iterations=n_sinkhorn, validate=validate)
        cost3, a2, b2 = start._problem
        f, g = start.f.reshape(a2.shape).clone(), start.g.reshape(b2.shape).clone()
        reports = []
        for k in range(f.shape[0]):
            f[k], g[k], report = _solve_one(
                cost3[k], a2[k], b2[k], f[k], g[k], float(epsilon), keep_per_row, n_sinkhorn,
                max_newton, tolerance, max_iterations,
            )  # fmt: skip
            reports.append(report)
    # One iteration more meets the columns exactly, sets the gauge and carries the gradients.
    init = (f.reshape(start.f.shape), g.reshape(start.g.shape))
    result = sinkhorn(cost, a, b, epsilon=epsilon, max_iterations=1, init=init, validate=False)
    return _with_reports(result, start.iterations, reports, tolerance)


def _same_total(a: Tensor, b: Tensor, allowed: float) -> Tensor:
    """b scaled to a's total where they differ by rounding: a difference is an error no plan gets below."""
    total_a, total_b = (t.detach().sum(-1, keepdim=True) for t in (a, b))
    near = (total_a - total_b).abs() <= allowed * total_a.maximum(total_b)
    return b * torch.where(near & (total_b > 0), total_a / total_b, 1.0)


def _with_reports(result, before, reports, tolerance) -> NewtonResult:
    shape, device = result.cost.shape, result.cost.device

    def column(name: str, dtype: torch.dtype) -> Tensor:
        values = [getattr(report, name) for report in reports]
        return torch.tensor(values, dtype=dtype, device=device).reshape(shape)

    state = {f.name: getattr(result, f.name) for f in fields(result)}
    state["converged"] = result.marginal_error <= tolerance
    state["iterations"] = before + result.iterations + column("iterations", torch.int64)
    missed = ~state["converged"]
    if device.type == "cpu" and bool(missed.any()):
        warnings.warn(
            f"solera.sinkhorn_newton_sparse: {int(missed.sum())} of {missed.numel()} problems have a marginal "
            f"error above tolerance={tolerance:g} (largest {float(result.marginal_error.max()):.3g}); float64 "
            "reaches about 1e-16 |f| / epsilon, else raise max_newton or max_iterations",
            UserWarning,
            stacklevel=4,
        )
    return NewtonResult(
        **state,
        newton_steps=column("newton_steps", torch.int64),
        cg_iterations=column("cg_iterations", torch.int64),
        keep_per_row=column("keep_per_row", torch.int64),
        dropped_mass=column("dropped_mass", torch.float64),
        returned_to_sinkhorn=column("returned_to_sinkhorn", torch.bool),
    )
