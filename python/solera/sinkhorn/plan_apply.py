r"""P v and P^T v of a dense plan, a block of its rows at a time: no more of P than that is ever stored.

Let $D = L R^\top$ be the gradient of P: $L = W$, $R = v$ for a gradient W of $P v$, and $L = v$, $R = W$ for one of
$P^\top v$. Then, with $s = P R$ (rows) and $t = P^\top L$ (columns),

$$\mathrm da_i = \tfrac1{a_i} \sum_k L_{ik} s_{ik},\quad \mathrm db_j = \tfrac1{b_j} \sum_k R_{jk} t_{jk},\quad
  \mathrm df = \tfrac1\varepsilon a \odot \mathrm da,\quad \mathrm dg = \tfrac1\varepsilon b \odot \mathrm db,\quad
  \mathrm dC = -\tfrac1\varepsilon (L R^\top) \odot P,$$

and one of s and t is the result itself, the other dv: backward is one product with P more. Where a weight is too
small to divide by, the block is made with 1 in its place, and the factor that this leaves out goes to L or R.

The blocks depend on the plan's shape alone, and sums over them are taken in order.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .._autograd import differentiable_vjp
from .._route import needs_graph, use_reference, without_autocast
from .plan import _sinkhorn_plan, transforms_active, transport_plan, within

_op = torch.ops.solera

# Elements of a block, and of the largest plan that is formed whole: on the CPU near what caches hold, elsewhere enough
# that the launches do not show.
BLOCK, DEVICE_BLOCK = 2**20, 2**24
WHOLE, DEVICE_WHOLE = 2**22, 2**24
ROWS = 16  # at least, whatever their length: work for every thread
SMALL = 1e-30  # weights: below, an entry of the plan that counts may be subnormal


def _blocks(cost: Tensor) -> Iterator[tuple[slice, slice]]:
    """(items, rows) of cost (batch, n, m): several items whole, or some rows of one."""
    count, n, m = cost.shape
    size = BLOCK if cost.device.type == "cpu" else DEVICE_BLOCK
    items, rows = max(1, size // (n * m)), min(n, max(ROWS, size // m))
    for item in range(0, count, items):
        for row in range(0, n, rows):
            yield slice(item, item + items), slice(row, row + rows)


def _plan(cost, a, b, f, g, epsilon, lengths):
    op = _sinkhorn_plan if use_reference() else _op.sinkhorn_plan
    return op(cost, a, b, f, g, a, None, epsilon, lengths)


def _plan_block(items, rows, cost, a, b, f, g, epsilon, lengths):
    if lengths is not None:
        lengths = lengths[items]
        if rows.start:
            lengths = torch.stack(((lengths[:, 0] - rows.start).clamp(min=0), lengths[:, 1]), -1)
    return _plan(
        cost[items, rows], a[items, rows], b[items], f[items, rows], g[items], epsilon, lengths
    )


def _products(problem, left, right, of_rows, of_columns, scale):
    """P right, P^T left and scale (left right^T) * P, each if asked for (scale not None)."""
    cost, d = problem[0], left.shape[-1]
    count, n, m = cost.shape
    rows_out = cost.new_empty((count, n, d)) if of_rows else None
    columns_out = cost.new_zeros((count, m, d)) if of_columns else None
    dcost = None if scale is None else cost.new_empty((count, n, m))
    for items, rows in _blocks(cost):
        plan = _plan_block(items, rows, *problem)
        if rows_out is not None:
            torch.bmm(plan, right[items], out=rows_out[items, rows])
        if columns_out is not None:
            columns_out[items].baddbmm_(plan.mT, left[items, rows])
        if dcost is not None:
            part = dcost[items, rows]
            torch.bmm(left[items, rows] * scale, right[items].mT, out=part)
            part.mul_(plan)
        del plan  # its memory is the next block's
    return rows_out, columns_out, dcost


def _whole_products(problem, left, right, of_rows, of_columns, scale):
    """The same from the whole plan, with nothing written in place: for a batch of gradients under vmap."""
    plan = _plan(*problem)
    rows, columns = plan @ right if of_rows else None, plan.mT @ left if of_columns else None
    return rows, columns, None if scale is None else (left * scale) @ right.mT * plan


def _batched(grad: Tensor) -> bool:
    return transforms_active() or torch._C._functorch.is_legacy_batchedtensor(grad)


def _gradients(cost, a, b, f, g, v, out, grad, epsilon, lengths, transposed, needs):
    """The gradients of cost, a, b, f, g and v; None for those without need."""
    if lengths is not None:  # whatever stands there in the padding
        valid = within(lengths, *cost.shape[-2:])[transposed]
        grad = torch.where(valid.unsqueeze(-1), grad, 0.0)
    left, right = (v, grad) if transposed else (grad, v)
    weights = needs[1] or needs[2]
    x, y, left_in, right_in = a, b, left, right
    if weights:
        x, y = torch.where(a > SMALL, a, 1.0), torch.where(b > SMALL, b, 1.0)
        left_in, right_in = left * (a / x).unsqueeze(-1), right * (b / y).unsqueeze(-1)
    products = _whole_products if _batched(grad) else _products
    rows, columns, dcost = products(
        (cost, x, y, f, g, epsilon, lengths),
        left_in,
        right_in,
        weights or transposed,
        weights or not transposed,
        -1.0 / epsilon if needs[0] else None,
    )
    dv = rows if transposed else columns
    if weights:
        dv = dv * ((a / x) if transposed else (b / y)).unsqueeze(-1)
    # Sums of the problem's size beside n m: a * da and b * db where nobody asked for those.
    row = (left * (out if rows is None else rows)).sum(-1)
    column = (right * (out if columns is None else columns)).sum(-1)
    da, db = (row / x, column / y) if weights else (None, None)
    df, dg = (row, column) if da is None or db is None else (a * da, b * db)
    found = dcost, da, db, df / epsilon, dg / epsilon, dv
    return [t if need else None for t, need in zip(found, needs)]


def _whole(cost, a, b, f, g, v, epsilon, lengths, transposed):
    plan = transport_plan(cost, a, b, f, g, epsilon, lengths)
    with without_autocast(plan):
        return (plan.mT if transposed else plan) @ v


def _run(cost, a, b, f, g, v, epsilon, lengths, transposed):
    with without_autocast(cost):
        problem = cost, a, b, f, g, epsilon, lengths
        return _products(problem, v, v, not transposed, transposed, None)[int(transposed)]


class _PlanApply(torch.autograd.Function):
    @staticmethod
    def forward(ctx, cost, a, b, f, g, v, epsilon, lengths, transposed):
        out = _run(cost, a, b, f, g, v, epsilon, lengths, transposed)
        ctx.save_for_backward(cost, a, b, f, g, v, out, lengths)
        ctx.options = epsilon, transposed
        return out

    @staticmethod
    def backward(ctx, grad):
        cost, a, b, f, g, v, out, lengths = ctx.saved_tensors
        epsilon, transposed = ctx.options
        needs = ctx.needs_input_grad[:6]
        with without_autocast(grad):
            if torch.is_grad_enabled():

                def whole(cost, a, b, f, g, v):
                    return _whole(cost, a, b, f, g, v, epsilon, lengths, transposed)

                found = differentiable_vjp(whole, (cost, a, b, f, g, v), needs, (grad,))
            else:
                found = _gradients(
                    cost, a, b, f, g, v, out, grad, epsilon, lengths, transposed, needs
                )
        return *found, None, None, None


def plan_apply(
    cost: Tensor,
    a: Tensor,
    b: Tensor,
    f: Tensor,
    g: Tensor,
    v: Tensor,
    epsilon: float,
    lengths: Tensor | None = None,
    transposed: bool = False,
) -> Tensor:
    """P v, or P^T v, of `plan.transport_plan`'s P; differentiable in the first six.

    Shapes: as there, and v (batch, m, d) or (m, d) -> (batch, n, d), or, transposed, (batch, n, d) or (n, d) ->
    (batch, m, d); v in cost's dtype, 0 in the padding. Small plans are formed whole, which is faster; so are those of
    torch.func transforms, compiled graphs and second derivatives.
    """
    most = WHOLE if cost.device.type == "cpu" else DEVICE_WHOLE
    if torch.compiler.is_compiling() or transforms_active() or cost.numel() <= most:
        return _whole(cost, a, b, f, g, v, epsilon, lengths, transposed)
    v = v.expand(cost.shape[0], *v.shape[-2:])
    if needs_graph(cost, a, b, f, g, v):
        return _PlanApply.apply(cost, a, b, f, g, v, epsilon, lengths, transposed)
    return _run(cost, a, b, f, g, v, epsilon, lengths, transposed)
