r"""Core `plan`: the transport plan of dual potentials, and its gradient.

$$E_{ij} = e^{(f_i + g_j - C_{ij})/\varepsilon},\qquad P_{ij} = a_i\,b_j\,E_{ij}.$$

For a gradient $D$ of $P$, with $r_i = \sum_j D_{ij} b_j E_{ij}$ and $q_j = \sum_i D_{ij} a_i E_{ij}$:

$$\mathrm dC = -\tfrac1\varepsilon D \odot P,\quad \mathrm da = r,\quad \mathrm db = q,\quad
  \mathrm df = \tfrac1\varepsilon a \odot r,\quad \mathrm dg = \tfrac1\varepsilon b \odot q .$$

The op computes the slightly more general $E \odot (x b^\top + a y^\top)$: with $x = a$ it is the plan, with
other $x$ and $y$ it is the gradient of the Sinkhorn map to its cost (core `dense`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .._autograd import differentiable_vjp
from .._registry import reference
from .._route import needs_graph, use_reference

_op = torch.ops.solera


def transforms_active() -> bool:
    """True inside torch.func transforms and forward-mode AD, where everything is plain torch ops."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def reads_values(t: Tensor) -> bool:
    """Whether a check may read t's data: on the CPU in eager mode, where that is no synchronisation."""
    return t.device.type == "cpu" and not torch.compiler.is_compiling() and not transforms_active()


def kernel_matrix(cost: Tensor, f: Tensor, g: Tensor, epsilon: float) -> Tensor:
    """E (batch, n, m); an exponent past the dtype's range is held just inside, so that 0 * E is 0."""
    exponent = (f.unsqueeze(-1) - cost + g.unsqueeze(-2)) / epsilon
    return torch.exp(exponent.clamp(max=math.log(torch.finfo(cost.dtype).max) - 1))


def within(lengths: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    """Which rows (batch, n) and columns (batch, m) of padded problems are real; lengths (batch, 2)."""
    rows = torch.arange(n, device=lengths.device) < lengths[..., :1]
    return rows, torch.arange(m, device=lengths.device) < lengths[..., 1:]


def valid_cost(cost: Tensor, lengths: Tensor | None) -> Tensor:
    """cost (batch, n, m) with inf (a forbidden pair) for whatever the padding holds."""
    if lengths is None:
        return cost
    rows, columns = within(lengths, *cost.shape[-2:])
    return torch.where(rows.unsqueeze(-1) & columns.unsqueeze(-2), cost, torch.inf)


def plan_reference(cost, a, b, f, g, x, y, epsilon, lengths=None):
    """e (b x + a y), e the plan's density: what `sinkhorn_plan` computes."""
    e = kernel_matrix(valid_cost(cost, lengths), f, g, epsilon)
    out = e * b.unsqueeze(-2) * x.unsqueeze(-1)
    return out if y is None else out + e * a.unsqueeze(-1) * y.unsqueeze(-2)


@reference("sinkhorn_plan")
def _sinkhorn_plan(cost, a, b, f, g, x, y, epsilon, lengths=None):
    return plan_reference(cost, a, b, f, g, x, y, epsilon, lengths).contiguous()


@reference("sinkhorn_plan_backward")
def _sinkhorn_plan_backward(grad, cost, a, b, f, g, epsilon, lengths=None):
    e = kernel_matrix(valid_cost(cost, lengths), f, g, epsilon)
    if lengths is not None:
        grad = torch.where(e > 0, grad, 0.0)
    row = grad * (e * b.unsqueeze(-2))
    dcost = row * a.unsqueeze(-1) * (-1.0 / epsilon)
    return dcost.contiguous(), row.sum(-1), (grad * (e * a.unsqueeze(-1))).sum(-2)


class _Plan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, cost, a, b, f, g, epsilon, lengths):
        ctx.save_for_backward(cost, a, b, f, g, lengths)
        ctx.epsilon = epsilon
        op = _sinkhorn_plan if use_reference() else _op.sinkhorn_plan
        return op(cost, a, b, f, g, a, None, epsilon, lengths)

    @staticmethod
    def backward(ctx, grad):
        cost, a, b, f, g, lengths = ctx.saved_tensors
        epsilon = ctx.epsilon
        if torch.is_grad_enabled():
            if lengths is not None:  # whatever stands there in the padding
                rows, columns = within(lengths, *cost.shape[-2:])
                grad = torch.where(rows.unsqueeze(-1) & columns.unsqueeze(-2), grad, 0.0)

            def plan(cost, a, b, f, g):
                return plan_reference(cost, a, b, f, g, a, None, epsilon, lengths)

            needs = ctx.needs_input_grad[:5]
            return (*differentiable_vjp(plan, (cost, a, b, f, g), needs, (grad,)), None, None)
        op = _sinkhorn_plan_backward if use_reference() else _op.sinkhorn_plan_backward
        dcost, row, column = op(grad, cost, a, b, f, g, epsilon, lengths)
        return dcost, row, column, a * row / epsilon, b * column / epsilon, None, None


def transport_plan(
    cost: Tensor,
    a: Tensor,
    b: Tensor,
    f: Tensor,
    g: Tensor,
    epsilon: float,
    lengths: Tensor | None = None,
) -> Tensor:
    """P (batch, n, m) of tensors that `sinkhorn` has checked; differentiable in the first five.

    Shapes: cost (batch, n, m), a and f (batch, n), b and g (batch, m) -> (batch, n, m); lengths (batch, 2), int64,
    rows and columns of each problem, outside of which P is 0 and nothing is read.
    """
    if transforms_active():
        return plan_reference(cost, a, b, f, g, a, None, epsilon, lengths)
    if needs_graph(cost, a, b, f, g):
        return _Plan.apply(cost, a, b, f, g, epsilon, lengths)
    op = _sinkhorn_plan if use_reference() else _op.sinkhorn_plan
    return op(cost, a, b, f, g, a, None, epsilon, lengths)
