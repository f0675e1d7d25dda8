r"""Core `streaming_apply`: the density of a plan between two clouds of points, applied without being stored.

$$\mathrm{out}_{ik} = \sum_j C_{ij}^{p} E_{ij}\, v_{jk},\qquad E_{ij} = e^{(f_i + g_j - C(x_i, y_j))/\varepsilon},$$

with $p \in \{0, 1\}$, and $p = -1$ for distances. For gradients $W$ of out (with $p = 0$):

$$\mathrm dv = E^\top W,\quad \mathrm df_i = \tfrac1\varepsilon \sum_k W_{ik}\,\mathrm{out}_{ik},\quad
  \mathrm dg_j = \tfrac1\varepsilon \sum_k v_{jk} (E^\top W)_{jk},\quad
  \mathrm dx_i = -\tfrac1\varepsilon \sum_k W_{ik} \sum_j E_{ij} v_{jk}\, \partial_1 C(x_i, y_j).$$

The last sum is again such a product, since $\partial_1 C$ is a sum of products of functions of $x_i$ and of
$y_j$: $2 (x_i (E v)_i - (E (v \odot y))_i)$ for $|x - y|^2$. So for squares and products every derivative, of any
order, streams. For distances and city-block distances the first does; the second goes through the reference's
graph, which holds the n x m matrix.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._autograd import differentiable_vjp
from .._registry import reference
from .._route import full_precision, needs_graph, use_reference
from .plan import transforms_active

_op = torch.ops.solera

# The op's codes. A cosine is half a square of normalised points.
COSTS = {"sqeuclidean": 0, "half_sqeuclidean": 1, "dot": 2, "euclidean": 3, "l1": 4}
SQUARE, HALF_SQUARE, DOT, DISTANCE, CITY = range(5)
_COLUMNS = 256  # of v, at most, in one product of a gradient


@full_precision
def cost_matrix(x: Tensor, y: Tensor, cost: int) -> Tensor:
    """C (batch, n, m) of x (batch, n, d) and y (batch, m, d): what is never stored elsewhere."""
    if cost == DOT:
        return -(x @ y.transpose(-1, -2))
    if cost == CITY:
        if x.shape[-1] == 0:
            return x.new_zeros((*x.shape[:-1], y.shape[-2]))
        out = (x[..., :, None, 0] - y[..., None, :, 0]).abs()
        for k in range(1, x.shape[-1]):
            out = out + (x[..., :, None, k] - y[..., None, :, k]).abs()
        return out
    if x.shape[-1] <= 8:
        square = (x.unsqueeze(-2) - y.unsqueeze(-3)).square().sum(-1)
    else:
        middle = 0.5 * (x.detach().mean(-2, keepdim=True) + y.detach().mean(-2, keepdim=True))
        x, y = x - middle, y - middle
        lengths = x.square().sum(-1).unsqueeze(-1) + y.square().sum(-1).unsqueeze(-2)
        square = lengths - 2.0 * (x @ y.transpose(-1, -2))
    if cost == DISTANCE:
        apart = square > 0
        return torch.where(apart, torch.where(apart, square, 1.0).sqrt(), 0.0)
    return square if cost == SQUARE else 0.5 * square


def density(x: Tensor, y: Tensor, f: Tensor, g: Tensor, cost: int, epsilon: float) -> Tensor:
    """E (batch, n, m); an exponent past the dtype's range is held just inside."""
    exponent = (f.unsqueeze(-1) + g.unsqueeze(-2) - cost_matrix(x, y, cost)) / epsilon
    return torch.exp(exponent.clamp(max=math.log(torch.finfo(x.dtype).max) - 1))


@full_precision
def apply_reference(x, y, f, g, v, cost, epsilon, power, signs):
    """The op, from the whole matrix; x (batch, n, d), y (batch, m, d), f (batch, n), v (batch, m, k)."""
    w = density(x, y, f, g, cost, epsilon)
    if power == 1:
        w = w * cost_matrix(x, y, cost)
    elif power == -1:
        length = cost_matrix(x, y, cost)
        w = torch.where(length > 0, w / torch.where(length > 0, length, 1.0), 0.0)
    if signs:
        s = torch.sign(x.unsqueeze(-2) - y.unsqueeze(-3))  # (batch, n, m, d)
        return ((w * v.squeeze(-1).unsqueeze(-2)).unsqueeze(-1) * s).sum(-2)
    return w @ v


@reference("sinkhorn_points_apply")
def _sinkhorn_points_apply(x, y, f, g, v, cost, epsilon, power, signs):
    return apply_reference(x, y, f, g, v, cost, epsilon, power, signs).contiguous()


def _run(x, y, f, g, v, cost, epsilon, power=0, signs=False):
    op = _sinkhorn_points_apply if use_reference() else _op.sinkhorn_points_apply
    return op(x, y, f, g, v, cost, epsilon, power, signs)


class _Apply(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, f, g, v, cost, epsilon, power):
        out = _run(x, y, f, g, v, cost, epsilon, power)
        ctx.save_for_backward(x, y, f, g, v, out)
        ctx.options = cost, epsilon, power
        return out

    @staticmethod
    def backward(ctx, grad):
        x, y, f, g, v, out = ctx.saved_tensors
        cost, epsilon, power = ctx.options
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled() and (power != 0 or cost in (DISTANCE, CITY)):

            def whole(x, y, f, g, v):
                return apply_reference(x, y, f, g, v, cost, epsilon, power, False)

            found = differentiable_vjp(whole, (x, y, f, g, v), needs[:5], (grad,))
            return *found, None, None, None
        back = None
        if needs[3] or needs[4]:
            back = apply_density(y, x, g, f, grad, cost, epsilon, power)
        df = (grad * out).sum(-1) / epsilon if needs[2] else None
        dg = (v * back).sum(-1) / epsilon if needs[3] else None
        dx = dy = None
        # d(C^p E) / dC = p C^(p-1) E - C^p E / epsilon
        if needs[0]:
            dx = cost_gradient(x, y, f, g, grad, v, cost, epsilon, power) * (-1.0 / epsilon)
            if power == 1:
                dx = dx + cost_gradient(x, y, f, g, grad, v, cost, epsilon)
        if needs[1]:
            dy = cost_gradient(y, x, g, f, v, grad, cost, epsilon, power) * (-1.0 / epsilon)
            if power == 1:
                dy = dy + cost_gradient(y, x, g, f, v, grad, cost, epsilon)
        return dx, dy, df, dg, back if needs[4] else None, None, None, None


def apply_density(
    x: Tensor,
    y: Tensor,
    f: Tensor,
    g: Tensor,
    v: Tensor,
    cost: int,
    epsilon: float,
    power: int = 0,
) -> Tensor:
    """sum_j C_ij^power E_ij v_jk, differentiable in all five tensors (power 0 and 1).

    Shapes: x (batch, n, d), y (batch, m, d), f (batch, n), g (batch, m), v (batch, m, k) -> (batch, n, k).
    """
    if transforms_active():
        return apply_reference(x, y, f, g, v, cost, epsilon, power, False)
    if power >= 0 and needs_graph(x, y, f, g, v):
        return _Apply.apply(x, y, f, g, v, cost, epsilon, power)
    return _run(x, y, f, g, v, cost, epsilon, power)


@full_precision
def _whole_cost_gradient(x, y, f, g, w, v, cost, epsilon, power):
    """`cost_gradient` from n x m matrices, differentiable: for costs whose second derivative does not stream."""
    x = x if x.requires_grad else x.detach().requires_grad_()
    c = cost_matrix(x, y, cost)
    dc = (w @ v.transpose(-1, -2)) * density(x, y, f, g, cost, epsilon)
    if power == 1:
        dc = dc * c
    return torch.autograd.grad(c, x, dc, create_graph=True)[0]


def cost_gradient(
    x: Tensor,
    y: Tensor,
    f: Tensor,
    g: Tensor,
    w: Tensor,
    v: Tensor,
    cost: int,
    epsilon: float,
    power: int = 0,
) -> Tensor:
    """sum_j (sum_k w_ik v_jk) C_ij^power E_ij dC(x_i, y_j)/dx_i: the gradient of a function of C, to x.

    Shapes: as `apply_density`, w (batch, n, k), v (batch, m, k) -> (batch, n, d). At distance 0 a distance's
    gradient is 0. Columns of v are taken a few at a time: memory O((n + m) d).
    """
    d, k = x.shape[-1], v.shape[-1]
    if cost in (DISTANCE, CITY) and needs_graph(x, y, f, g, w, v):
        return _whole_cost_gradient(x, y, f, g, w, v, cost, epsilon, power)
    if cost == CITY:
        parts = [
            w[..., i, None] * _run(x, y, f, g, v[..., i, None], cost, epsilon, power, True)
            for i in range(k)
        ]
        return sum(parts[1:], parts[0])
    if cost != DOT:  # differences: an origin near both clouds keeps the digits
        origin = 0.5 * (x.detach()[..., :1, :] + y.detach()[..., :1, :])
        left, right = x - origin, y - origin
    else:
        left, right = x, y
    factor = {SQUARE: 2.0, HALF_SQUARE: 1.0, DOT: 1.0, DISTANCE: 1.0}[cost]
    inner = power - 1 if cost == DISTANCE else power
    if cost == DISTANCE:
        # Between two points without weight E is bounded by nothing, and E over a small distance is inf: times 0, NaN.
        least = -f.detach().amax(-1, keepdim=True) - 800 * epsilon
        g = torch.where((v == 0).all(-1), torch.minimum(g.detach(), least), g)
    total = torch.zeros_like(x)
    for begin in range(0, k, max(1, _COLUMNS // (d + 1))):
        part = slice(begin, begin + max(1, _COLUMNS // (d + 1)))
        vk, wk = v[..., part], w[..., part]
        # (batch, m, k', d) and, for differences, the plain sums beside it
        columns = (vk.unsqueeze(-1) * right.unsqueeze(-2)).flatten(-2)
        if cost != DOT:
            columns = torch.cat((columns, vk), -1)
        applied = apply_density(x, y, f, g, columns, cost, epsilon, inner)
        count = vk.shape[-1]
        moved = applied[..., : count * d].unflatten(-1, (count, d))
        pulled = (wk.unsqueeze(-1) * moved).sum(-2)
        if cost == DOT:
            total = total - pulled
        else:
            kept = (wk * applied[..., count * d :]).sum(-1, keepdim=True)
            total = total + factor * (left * kept - pulled)
    return total
