r"""Core `sliced`: the sliced Wasserstein distance between two point clouds.

A direction $\theta_l$ turns the clouds $x$ (n points) and $y$ (m points) into samples of the line, where optimal
transport is a comparison of sorted values:

$$W_p^p(l) = \int_0^1 |F_x^{-1} - F_y^{-1}|^p = \sum_t w_t\,|X_{i_t} - Y_{j_t}|^p,\qquad
  X = \mathrm{sort}(x\theta_l),\ Y = \mathrm{sort}(y\theta_l),$$

$w_t = 1/n$ and $i_t = j_t$ for $n = m$, else the $n + m - \gcd(n, m)$ pieces of [0, 1] on which both quantile
functions are constant: the exact distance of the empirical measures, for any two sizes.

Backward keeps the two permutations alone. With $s_t = p\,|X_{i_t} - Y_{j_t}|^{p-1}\,\mathrm{sign}$ and $D_x$, $D_y$
(L x n and L x m) the $w_t s_t$ in the places where their points stood before sorting ($D_y$ negative),

$$\mathrm dx = D_x^\top\theta,\qquad \mathrm dy = D_y^\top\theta,\qquad \mathrm d\theta = D_x x + D_y y .$$

Sources: Rabin, Peyré, Delon, Bernot, "Wasserstein Barycenter and its Application to Texture Mixing", 2011; Bonneel
et al., "Sliced and Radon Wasserstein Barycenters of Measures", 2015.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import _check
from .._autograd import differentiable_vjp
from .._registry import accumulate_type, reference
from .._route import needs_graph, use_reference, without_autocast
from .plan import transforms_active

_op = torch.ops.solera
REDUCTIONS = ("mean", "sum", "none")

# ---- reference ---------------------------------------------------------------------------------------


def _pieces(n: int, m: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(i_t, j_t, w_t): in units of 1/(n m), the ends of the pieces are the multiples of m and of n."""
    ends = torch.cat(
        [
            torch.arange(1, n + 1, device=like.device) * m,
            torch.arange(1, m + 1, device=like.device) * n,
        ]
    )
    ends = ends.sort().values  # a common multiple twice: its second piece has length 0
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    i = (starts // m).clamp(max=n - 1)
    j = (starts // n).clamp(max=m - 1)
    return i, j, (ends - starts).to(like.dtype) / (n * m)


def _project(cloud: Tensor, directions: Tensor) -> Tensor:
    """(batch, n, d), (batch or 1, L, d) -> (batch, L, n)."""
    with without_autocast(cloud):
        return directions @ cloud.transpose(-1, -2)


def _distance(difference: Tensor, p: float) -> Tensor:
    if p == 2:
        return difference * difference
    size = difference.abs()
    return size if p == 1 else size**p


def sliced_value(x, y, directions, order_x, order_y, p):
    """(batch, L) with the permutations given: differentiable any number of times."""
    a = _project(x, directions).gather(-1, order_x.long())
    b = _project(y, directions).gather(-1, order_y.long())
    n, m = x.shape[1], y.shape[1]
    if n == m:
        return _distance(a - b, p).mean(-1)
    i, j, w = _pieces(n, m, x)
    return (_distance(a[..., i] - b[..., j], p) * w).sum(-1)


def _orders(x, y, directions):
    orders = [torch.argsort(_project(t, directions), dim=-1, stable=True) for t in (x, y)]
    return [t.to(torch.int32) for t in orders]


@reference("sliced_forward")
def _sliced_forward(x, y, directions, p):
    order_x, order_y = _orders(x, y, directions)
    return sliced_value(x, y, directions, order_x, order_y, p), order_x, order_y


@reference("sliced_backward")
def _sliced_backward(grad, x, y, directions, order_x, order_y, p):
    n, m = x.shape[1], y.shape[1]
    i, j, w = _pieces(n, m, x)
    at_x, at_y = order_x.long()[..., i], order_y.long()[..., j]
    d = _project(x, directions).gather(-1, at_x) - _project(y, directions).gather(-1, at_y)
    size = d.abs()
    slope = d.sign() if p == 1 else p * torch.where(d == 0, d, size ** (p - 1) * d.sign())
    slope = slope * w * grad.unsqueeze(-1)
    shape = grad.shape
    dx = slope.new_zeros((*shape, n)).scatter_add_(-1, at_x, slope)
    dy = slope.new_zeros((*shape, m)).scatter_add_(-1, at_y, -slope)
    return (
        dx.transpose(-1, -2) @ directions,
        dy.transpose(-1, -2) @ directions,
        dx @ x + dy @ y,
    )


# ---- autograd ----------------------------------------------------------------------------------------


class _Sliced(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, directions, p):
        op = _sliced_forward if use_reference() else _op.sliced_forward
        value, order_x, order_y = op(x, y, directions, p)
        ctx.save_for_backward(x, y, directions, order_x, order_y)
        ctx.p = p
        return value

    @staticmethod
    def backward(ctx, grad):
        x, y, directions, order_x, order_y = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():

            def value(x, y, directions):
                return sliced_value(x, y, directions, order_x, order_y, ctx.p)

            return (*differentiable_vjp(value, (x, y, directions), needs, (grad,)), None)
        op = _sliced_backward if use_reference() else _op.sliced_backward
        dx, dy, dtheta = op(grad, x, y, directions, order_x, order_y, ctx.p)
        if directions.shape[0] != x.shape[0]:
            dtheta = dtheta.sum(0, keepdim=True)
        return (*(g if need else None for g, need in zip((dx, dy, dtheta), needs)), None)


# ---- public functions --------------------------------------------------------------------------------


def _sorted_weights(weights: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """Ends of a sorted sample's pieces of [0, 1] for weights (batch, n) and an order (batch, L, n)."""
    picked = weights.unsqueeze(1).expand(order.shape).gather(-1, order)
    ends = picked.cumsum(-1)
    return ends / ends[..., -1:], picked


def _weighted(x, y, directions, p, x_weights, y_weights):
    """The same with weights: the pieces differ by direction, so it is a composition of torch's sorts."""
    values, ends = [], []
    for cloud, weights in ((x, x_weights), (y, y_weights)):
        projected = _project(cloud, directions)
        order = torch.argsort(projected.detach(), dim=-1, stable=True)
        values.append(projected.gather(-1, order))
        if weights is None:
            weights = cloud.new_ones(cloud.shape[:2])
        ends.append(_sorted_weights(weights, order)[0])
    both = torch.cat(ends, -1).sort(-1).values
    starts = torch.cat([torch.zeros_like(both[..., :1]), both[..., :-1]], -1)
    middle = ((starts + both) / 2).detach()
    picked = [
        v.gather(-1, torch.searchsorted(e.detach(), middle).clamp(max=v.shape[-1] - 1))
        for v, e in zip(values, ends)
    ]
    return (_distance(picked[0] - picked[1], p) * (both - starts)).sum(-1)


def _cloud_weights(name: str, value: Tensor | None, cloud: Tensor, cloud_name: str):
    if value is None:
        return None
    shape = cloud.shape[:-1]
    _check.like(name, value, tuple(shape), cloud, cloud_name)
    return value


def sliced_wasserstein(
    x: Tensor,
    y: Tensor,
    directions: Tensor,
    p: float = 2,
    *,
    reduction: str = "mean",
    x_weights: Tensor | None = None,
    y_weights: Tensor | None = None,
) -> Tensor:
    r"""Sliced Wasserstein distance of two point clouds, to the power p: $\frac1L\sum_l W_p^p(x\theta_l, y\theta_l)$.

    The projections on each direction are sorted and compared. Differentiable in x, y and directions (and once more);
    the permutations are all that is kept for it. Ties are sorted by index; the gradient of $|d|$ at 0 is 0.

    Args:
        x, y: (..., n, d) and (..., m, d), with the same leading batch. For n != m the quantile functions are compared
            exactly, piece by piece.
        directions: (..., L, d), or (L, d) for all. Not normalised here: those of `torch.nn.functional.normalize` on
            normal samples, or of `vmf_sample`.
        p: >= 1.
        reduction: "mean": over directions, $W_p^p$ with masses 1/n; "sum": the mean over directions of the sum over
            points, n times that (n = m only); "none": $W_p^p$ of each direction.
        x_weights, y_weights: (..., n) and (..., m), >= 0, scaled to total 1: masses of the points. A composition of
            torch's sorts; differentiable in the weights too.

    Shapes: (..., n, d), (..., m, d), (..., L, d) -> (...), or (..., L) for "none". float32 or float64; half
    precision is computed, and returned, in float32.

    The distance itself is the result to the power 1/p. NaN in a cloud gives NaN in its batch item.

    Raises:
        ValueError, TypeError: naming the argument.

    Source: Bonneel et al., "Sliced and Radon Wasserstein Barycenters of Measures", 2015.
    """
    _check.tensor("x", x, min_dim=2)
    _check.tensor("y", y, min_dim=2)
    _check.tensor("directions", directions, min_dim=2)
    *batch, n, d = x.shape
    m = y.shape[-2]
    if y.shape[:-2] != x.shape[:-2] or y.shape[-1] != d:
        raise ValueError(
            f"y: expected shape {(*batch, 'm', d)} to go with x of shape {tuple(x.shape)}, "
            f"got {tuple(y.shape)}"
        )
    if directions.shape[-1] != d or directions.shape[:-2] not in ((), x.shape[:-2]):
        raise ValueError(
            f"directions: expected shape (L, {d}) or {(*batch, 'L', d)} to go with x of shape "
            f"{tuple(x.shape)}, got {tuple(directions.shape)}"
        )
    for name, t in (("y", y), ("directions", directions)):
        _check.like(name, t, tuple(t.shape), x)
    count = directions.shape[-2]
    for name, size, what in (
        ("x", n, "point"),
        ("y", m, "point"),
        ("directions", count, "direction"),
    ):
        if size == 0:
            raise ValueError(f"{name}: expected at least one {what}, got none")
    if max(n, m) >= 2**31:
        raise ValueError(f"x, y: expected fewer than 2^31 points, got {max(n, m)}")
    p = _check.number("p", p, low=1.0)
    _check.choice("reduction", reduction, REDUCTIONS)
    if reduction == "sum" and n != m:
        raise ValueError(f"reduction: 'sum' needs clouds of one size, got {n} and {m} points")
    x_weights = _cloud_weights("x_weights", x_weights, x, "x")
    y_weights = _cloud_weights("y_weights", y_weights, y, "y")

    acc = accumulate_type(x)
    size = math.prod(batch)
    flat_x, flat_y = x.to(acc).reshape(size, n, d), y.to(acc).reshape(size, m, d)
    theta = directions.to(acc)
    theta = theta.unsqueeze(0) if theta.dim() == 2 else theta.reshape(size, count, d)
    if x_weights is not None or y_weights is not None:
        weights = [
            None if w is None else w.to(acc).reshape(size, w.shape[-1])
            for w in (x_weights, y_weights)
        ]
        value = _weighted(flat_x, flat_y, theta, p, *weights)
    elif transforms_active():
        order_x, order_y = _orders(flat_x, flat_y, theta)
        value = sliced_value(flat_x, flat_y, theta, order_x, order_y, p)
    elif needs_graph(flat_x, flat_y, theta):
        value = _Sliced.apply(flat_x, flat_y, theta, p)
    elif use_reference():
        value = _sliced_forward(flat_x, flat_y, theta, p)[0]
    else:
        value = _op.sliced_forward(flat_x, flat_y, theta, p)[0]
    if reduction == "none":
        return value.reshape(*batch, count)
    value = value.mean(-1).reshape(batch)
    return value * n if reduction == "sum" else value
