r"""Core `plan_sums`: weighted sums of a plan over both its sides, without the plan; its marginals and <P, C>.

With $E_{ij} = e^{(f_i + g_j - C_{ij})/\varepsilon}$ and $K = E$, or $K = E \odot C$ (0 for a forbidden pair), the op is

$$r = K x,\qquad q = K^\top (w \odot r + y),$$

from one look at C. With $w = 0$ that is both marginals of $P = \mathrm{diag}(a) E\, \mathrm{diag}(b)$ or both sides of
$\langle P, C\rangle$; with $y = 0$ it is the product of conjugate gradients in `_adjoint.py`.

**Marginals** $p = a \odot E b$ and $q = b \odot E^\top a$, for gradients $u$ and $v$:

$$\mathrm da = u \odot E b + E (b \odot v),\quad \mathrm db = v \odot E^\top a + E^\top (a \odot u),\quad
  \mathrm df = \tfrac1\varepsilon a \odot \mathrm da,\quad \mathrm dg = \tfrac1\varepsilon b \odot \mathrm db,\quad
  \mathrm dC_{ij} = -\tfrac1\varepsilon (u_i + v_j) P_{ij}.$$

**Transport cost** $\langle P, C\rangle = \langle a, K b\rangle$, $K = E \odot C$, for a gradient $t$:

$$\mathrm da = t\, K b,\quad \mathrm db = t\, K^\top a,\quad \mathrm df = \tfrac1\varepsilon a \odot \mathrm da,\quad
  \mathrm dg = \tfrac1\varepsilon b \odot \mathrm db,\quad \mathrm dC = t\,(1 - \tfrac1\varepsilon C) \odot P.$$

Backward is one pass more; beside C there is nothing of its size but dC, if asked for. Second derivatives, and
torch.func transforms, form the plan.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .._autograd import differentiable_vjp
from .._registry import reference
from .._route import needs_graph, use_reference, without_autocast
from .plan import _sinkhorn_plan, kernel_matrix, transforms_active, valid_cost, within
from .plan_apply import _batched

_op = torch.ops.solera

CHUNK = 2**20  # elements of dC that are finished together, where caches hold them


def _density(cost, f, g, epsilon, by_cost, lengths):
    cost = valid_cost(cost, lengths)
    e = kernel_matrix(cost, f, g, epsilon)
    return e * torch.where(cost == torch.inf, 0.0, cost) if by_cost else e


def _inside(t: Tensor | None, valid: Tensor) -> Tensor | None:
    return None if t is None else torch.where(valid, t, 0.0)


@reference("sinkhorn_plan_sums")
def _sinkhorn_plan_sums(cost, f, g, x, w, y, epsilon, by_cost=False, lengths=None):
    """(K x, K^T (w * K x + y)); w None is 0. What x, w and y hold in the padding is not read."""
    if lengths is not None:
        rows, columns = within(lengths, *cost.shape[-2:])
        x, w, y = _inside(x, columns), _inside(w, rows), _inside(y, rows)
    with without_autocast(cost):
        k = _density(cost, f, g, epsilon, by_cost, lengths)
        row = (k @ x.unsqueeze(-1)).squeeze(-1)
        side = y if w is None else w * row + y
        return row, (k.mT @ side.unsqueeze(-1)).squeeze(-1)


def plan_sums(*args) -> tuple[Tensor, Tensor]:
    """(K x, K^T (w * K x + y)) by the op, or by the reference where that is asked for; arguments as of the op."""
    return (_sinkhorn_plan_sums if use_reference() else _op.sinkhorn_plan_sums)(*args)


def stored_sums(cost, f, g, epsilon, lengths) -> Callable[..., tuple[Tensor, Tensor]]:
    """(x, w, y) -> (E x, E^T (w * E x + y)), for many calls: the reference keeps E, kernels make it at each."""
    if not use_reference():
        return lambda x, w, y: _op.sinkhorn_plan_sums(cost, f, g, x, w, y, epsilon, False, lengths)
    e = _density(cost, f, g, epsilon, False, lengths)

    def sums(x, w, y):
        row = (e @ x.unsqueeze(-1)).squeeze(-1)
        side = y if w is None else w * row + y
        return row, (e.mT @ side.unsqueeze(-1)).squeeze(-1)

    return sums


def _plan(cost, a, b, f, g, x, y, epsilon, lengths):
    op = _sinkhorn_plan if use_reference() else _op.sinkhorn_plan
    return op(cost, a, b, f, g, x, y, epsilon, lengths)


# ---- marginals ---------------------------------------------------------------------------------------


def _marginals_reference(cost, a, b, f, g, epsilon, lengths):
    row, column = _sinkhorn_plan_sums(cost, f, g, b, None, a, epsilon, False, lengths)
    return a * row, b * column


class _Marginals(torch.autograd.Function):
    @staticmethod
    def forward(ctx, cost, a, b, f, g, epsilon, lengths):
        row, column = plan_sums(cost, f, g, b, None, a, epsilon, False, lengths)
        ctx.save_for_backward(cost, a, b, f, g, row, column, lengths)
        ctx.epsilon = epsilon
        return a * row, b * column

    @staticmethod
    def backward(ctx, u, v):
        cost, a, b, f, g, row, column, lengths = ctx.saved_tensors
        epsilon, needs = ctx.epsilon, ctx.needs_input_grad[:5]
        if torch.is_grad_enabled():

            def formula(cost, a, b, f, g):
                return _marginals_reference(cost, a, b, f, g, epsilon, lengths)

            found = differentiable_vjp(formula, (cost, a, b, f, g), needs, (u, v))
            return *found, None, None
        if lengths is not None:  # whatever stands there in the padding
            rows, columns = within(lengths, *cost.shape[-2:])
            u, v = _inside(u, rows), _inside(v, columns)
        au, bv = a * u, b * v
        da = db = None
        if any(needs[1:]):
            row_v, column_u = plan_sums(cost, f, g, bv, None, au, epsilon, False, lengths)
            da, db = u * row + row_v, v * column + column_u
        dcost = None
        if needs[0]:
            dcost = _plan(cost, a, b, f, g, au / -epsilon, bv / -epsilon, epsilon, lengths)
        return *_all_gradients(dcost, a, b, da, db, epsilon, needs), None, None


def _all_gradients(dcost, a, b, da, db, epsilon, needs):
    """Of cost, a, b, f and g, from those of cost, a and b."""
    df = a * da / epsilon if needs[3] else None
    dg = b * db / epsilon if needs[4] else None
    return dcost, da if needs[1] else None, db if needs[2] else None, df, dg


def plan_marginals(
    cost: Tensor,
    a: Tensor,
    b: Tensor,
    f: Tensor,
    g: Tensor,
    epsilon: float,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(P 1, P^T 1) of `plan.transport_plan`'s P; differentiable in the first five.

    Shapes: as there -> (batch, n), (batch, m), 0 in the padding.
    """
    if transforms_active():
        return _marginals_reference(cost, a, b, f, g, epsilon, lengths)
    if needs_graph(cost, a, b, f, g):
        return _Marginals.apply(cost, a, b, f, g, epsilon, lengths)
    row, column = plan_sums(cost, f, g, b, None, a, epsilon, False, lengths)
    return a * row, b * column


# ---- <P, C> ------------------------------------------------------------------------------------------


def _cost_reference(cost, a, b, f, g, epsilon, lengths):
    row, _ = _sinkhorn_plan_sums(cost, f, g, b, None, a, epsilon, True, lengths)
    return (a * row).sum(-1)


def _slope(plan: Tensor, cost: Tensor, epsilon: float) -> Tensor:
    """plan * (1 - cost / epsilon) in plan's place, as much at a time as caches hold; 0 stays 0, whatever cost is."""
    rows = max(1, CHUNK // cost.shape[-1])
    for part, c in zip(plan.flatten(0, 1).split(rows), cost.flatten(0, 1).split(rows)):
        part.addcmul_(part, torch.where(part == 0, 0.0, c), value=-1.0 / epsilon)
    return plan


class _TransportCost(torch.autograd.Function):
    @staticmethod
    def forward(ctx, cost, a, b, f, g, epsilon, lengths):
        row, column = plan_sums(cost, f, g, b, None, a, epsilon, True, lengths)
        ctx.save_for_backward(cost, a, b, f, g, row, column, lengths)
        ctx.epsilon = epsilon
        return (a * row).sum(-1)

    @staticmethod
    def backward(ctx, grad):
        cost, a, b, f, g, row, column, lengths = ctx.saved_tensors
        epsilon, needs = ctx.epsilon, ctx.needs_input_grad[:5]
        batched = not torch.compiler.is_compiling() and _batched(grad)
        if torch.is_grad_enabled() or (batched and needs[0]):

            def formula(cost, a, b, f, g):
                return _cost_reference(cost, a, b, f, g, epsilon, lengths)

            with torch.enable_grad():
                inputs = [t.detach().requires_grad_() if batched else t for t in (cost, a, b, f, g)]
                found = differentiable_vjp(formula, inputs, needs, (grad,))
            return *found, None, None
        grad = grad.unsqueeze(-1)
        dcost = None
        if needs[0]:
            plan = _plan(cost, a, b, f, g, grad * a, None, epsilon, lengths)
            dcost = _slope(plan, cost, epsilon)
        found = _all_gradients(dcost, a, b, grad * row, grad * column, epsilon, needs)
        return *found, None, None


def plan_cost(
    cost: Tensor,
    a: Tensor,
    b: Tensor,
    f: Tensor,
    g: Tensor,
    epsilon: float,
    lengths: Tensor | None = None,
) -> Tensor:
    """<P, C> of `plan.transport_plan`'s P, forbidden pairs left out; differentiable in the first five.

    Shapes: as there -> (batch,).
    """
    if transforms_active():
        return _cost_reference(cost, a, b, f, g, epsilon, lengths)
    if needs_graph(cost, a, b, f, g):
        return _TransportCost.apply(cost, a, b, f, g, epsilon, lengths)
    row, _ = plan_sums(cost, f, g, b, None, a, epsilon, True, lengths)
    return (a * row).sum(-1)
