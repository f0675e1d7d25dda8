r"""Core `row_dots`: the three dots of two rows, and a linear combination of them.

For rows $x_n$ and $y_{i_n}$ (i an index into the rows of y, or n itself):

$$xx_n = \langle x_n, x_n\rangle,\quad xy_n = \langle x_n, y_{i_n}\rangle,\quad yy_n = \langle y_{i_n}, y_{i_n}\rangle;
  \qquad \mathrm{combine}_n = a_n x_n + b_n y_{i_n}.$$

The gradient of any function of the dots is such a combination:
$\mathrm{d}x_n = 2\,\mathrm{d}xx_n\,x_n + \mathrm{d}xy_n\,y_{i_n}$. So a cosine, a norm, a projection onto a sphere's
tangent plane and their gradients each read two rows once, and the gathered rows never exist as a tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from .._autograd import differentiable_vjp
from .._registry import accumulate_type, reference
from .._route import needs_graph, use_reference

_op = torch.ops.solera


def _beside(x: Tensor, y: Tensor, index: Tensor | None) -> Tensor:
    """The row of y beside each row of x, in the accumulator's dtype; zeros where the index is negative."""
    acc = accumulate_type(x)
    if index is None:
        return y.to(acc)
    rows = y.to(acc)[index.clamp(min=0)]
    return torch.where((index >= 0)[:, None], rows, 0.0)


def row_dots_reference(x: Tensor, y: Tensor, index: Tensor | None) -> tuple[Tensor, ...]:
    """(xx, xy, yy), each (N,)."""
    v, w = x.to(accumulate_type(x)), _beside(x, y, index)
    return v.square().sum(1), (v * w).sum(1), w.square().sum(1)


def _combined(x, y, index, a, b):
    return a[:, None] * x.to(a.dtype) + b[:, None] * _beside(x, y, index)


@reference("row_dots")
def _row_dots(x, y, index):
    return tuple(t.contiguous() for t in row_dots_reference(x, y, index))


@reference("row_combine")
def _row_combine(x, y, index, a, b):
    return _combined(x, y, index, a, b).to(x.dtype).contiguous()


@reference("row_combine_")
def _row_combine_in_place(x, y, index, a, b):
    x.copy_(_combined(x, y, index, a, b))


class _RowDots(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, index):
        ctx.save_for_backward(x, y, index)
        return _op.row_dots(x, y, index)

    @staticmethod
    def backward(ctx, dxx, dxy, dyy):
        x, y, index = ctx.saved_tensors
        if torch.is_grad_enabled():
            dots = lambda x: row_dots_reference(x, y, index)
            return differentiable_vjp(dots, (x,), (True,), (dxx, dxy, dyy))[0], None, None
        return _op.row_combine(x, y, index, 2 * dxx, dxy), None, None


def row_dots(x: Tensor, y: Tensor, index: Tensor | None = None) -> tuple[Tensor, ...]:
    """(xx, xy, yy) of the rows of x (N, D) and y (M, D) at `index` (N,), differentiable in x.

    Where y takes a gradient too, torch's own operations compute everything (y's gradient is a sum over the
    rows that share an index, which no row alone can write).
    """
    if use_reference() or is_dynamo_compiling() or needs_graph(y):
        return row_dots_reference(x, y, index)
    return _RowDots.apply(x, y, index) if needs_graph(x) else _op.row_dots(x, y, index)
