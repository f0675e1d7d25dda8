r"""Core `chain`: a product of disjoint 2x2 blocks on the columns of x, level by level.

**Pairs.** Level $l = 0, \dots, \lceil\log_2 d\rceil - 1$ holds the pairs $(i, i + 2^l)$ for every i that is a
multiple of $2^{l+1}$ with $i + 2^l < d$: $\lfloor n_l / 2\rfloor$ of them, $n_l = \lceil d / 2^l\rceil$. Column
$j > 0$ is the second of exactly one pair (that of its lowest set bit), so there are d - 1 pairs whatever d is. For
d = 8: (0,1) (2,3) (4,5) (6,7); (0,2) (4,6); (0,4). Parameters are numbered in this order.

**Blocks.** Block $B_p$ acts on its pair as on a column, $(x_i, x_j)^\top \leftarrow B_p\,(x_i, x_j)^\top$; of an
angle it is $\begin{pmatrix}\cos\theta & -\sin\theta\\ \sin\theta & \cos\theta\end{pmatrix}$. All levels in turn
map a row x to $xQ$; Q is orthogonal if all blocks are.

$$y = (xQ)\,\mathrm{diag}(s).$$

The kernels know two orders and take blocks as they come: natural (levels first to last, then the scale) and reversed
(the scale, then levels last to first). The merged weight $W\mathrm{diag}(s)Q^\top$ is the reversed order with
transposed blocks, the inverse the reversed order with inverted blocks and 1 / s.

**Backward** keeps x and the parameters. A row's activations at all levels are derived again beside its gradient, in
cache: from x rather than by turning y back, which costs a third less arithmetic, serves blocks of any determinant
and scales with zeros, and does not start from values rounded to half precision. With (a, b) a pair that went in, g its
gradient there and g' on the other side, $\mathrm{d}\theta = a\,g_b - b\,g_a$ and $\mathrm{d}B = g'\,(a, b)$.

Source: Ma et al., "Parameter Efficient Quasi-Orthogonal Fine-Tuning via Givens Rotation", 2024 (GOFT and
qGOFT). Its public code of qGOFT exchanges adjacent columns at every level while its sines lie $2^l$ apart, so that
the product is not orthogonal; here both lie $2^l$ apart.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _check
from .._autograd import differentiable_vjp
from .._registry import accumulate_type, reference
from .._route import needs_graph, use_reference

_op = torch.ops.solera


# ---- reference ---------------------------------------------------------------------------------------


def pairs(d: int) -> list[list[tuple[int, int]]]:
    """The pairs of columns of each level, in the order of the parameters."""
    levels, step = [], 1
    while step < d:
        levels.append([(i, i + step) for i in range(0, d - step, 2 * step)])
        step *= 2
    return levels


def _turn(low: Tensor, block: Tensor) -> tuple[Tensor, Tensor]:
    """The level's pairs, through their blocks (4, pairs)."""
    even, odd = low[:, 0::2], low[:, 1::2]
    count = block.shape[1]
    first = block[0] * even[:, :count] + block[1] * odd
    second = block[2] * even[:, :count] + block[3] * odd
    return torch.cat([first, even[:, count:]], 1), second


def _join(first: Tensor, second: Tensor) -> Tensor:
    """Columns of both in turn; an unpaired one comes last."""
    count = second.shape[1]
    joined = torch.stack([first[:, :count], second], 2).flatten(1)
    return torch.cat([joined, first[:, count:]], 1)


def _four(coefficients: Tensor) -> Tensor:
    """(4, d - 1): block entries, from a cosine and a sine."""
    if coefficients.shape[0] == 4:
        return coefficients
    cosine, sine = coefficients
    return torch.stack([cosine, -sine, sine, cosine])


def _sizes(d: int) -> list[int]:
    """Pairs of each level."""
    sizes = []
    while d > 1:
        sizes.append(d // 2)
        d = (d + 1) // 2
    return sizes


def givens_chain_reference(
    x: Tensor, coefficients: Tensor, scale: Tensor | None, reverse: bool
) -> Tensor:
    """x (N, d) through all levels; coefficients (2, d - 1) cosines and sines or (4, d - 1) blocks."""
    acc = accumulate_type(x)
    low = x.to(acc)
    blocks = _four(coefficients.to(acc)).split(_sizes(x.shape[1]), 1) if x.shape[1] > 1 else ()
    waiting = []
    if reverse and scale is not None:
        low = low * scale.to(acc)
    for block in blocks:
        if reverse:
            low, second = low[:, 0::2], low[:, 1::2]
        else:
            low, second = _turn(low, block)
        waiting.append(second)
    for block, second in zip(reversed(blocks), reversed(waiting)):
        low = _join(low, second)
        if reverse:
            low = _join(*_turn(low, block))
    if not reverse and scale is not None:
        low = low * scale.to(acc)
    return low.to(x.dtype)


@reference("givens_chain")
def _givens_chain(x, coefficients, scale, reverse):
    return givens_chain_reference(x, coefficients, scale, reverse).contiguous()


def _vjp(dy, inputs, reverse, needs):
    """Gradients in plain torch, differentiable again; that of coefficients as the op gives it."""
    x, coefficients, scale = inputs
    if coefficients.shape[0] == 4:
        blocks = lambda x, c, s: givens_chain_reference(x, c, s, reverse)
        return differentiable_vjp(blocks, (x, coefficients, scale), needs, (dy,))
    # The rotations' own angles as the variable: zero, turned on from where they are.
    angle = torch.zeros_like(coefficients[0], requires_grad=True)

    def run(x, angle, scale):
        cosine, sine = coefficients
        c, s = angle.cos(), angle.sin()
        turned = torch.stack([cosine * c - sine * s, sine * c + cosine * s])
        return givens_chain_reference(x, turned, scale, reverse)

    return differentiable_vjp(run, (x, angle, scale), needs, (dy,))


@reference("givens_chain_backward")
def _givens_chain_backward(
    dy, x, coefficients, scale, reverse, need_x, need_coefficients, need_scale
):
    need_scale = need_scale and scale is not None
    wanted = (need_x, need_coefficients, need_scale)
    with torch.enable_grad():
        leaf = lambda t, need: t if t is None else t.detach().requires_grad_(need)
        inputs = map(leaf, (x, coefficients, scale), wanted)
        found = _vjp(dy, tuple(inputs), reverse, wanted)
    dx, dc, ds = (t if t is None else t.detach() for t in found)
    acc = coefficients.dtype
    rows = 4 if coefficients.shape[0] == 4 else 1
    if need_coefficients:  # None where there is no pair
        dc = coefficients.new_zeros((rows, 0)) if dc is None else dc.reshape(rows, -1)
    return (
        x.new_empty(0) if dx is None else dx.contiguous(),
        x.new_empty(0, dtype=acc) if dc is None else dc.contiguous(),
        x.new_empty(0, dtype=acc) if ds is None else ds.to(acc).contiguous(),
    )


# ---- autograd ----------------------------------------------------------------------------------------


def _coefficients(parameters: Tensor, acc: torch.dtype, reverse: bool, invert: bool) -> Tensor:
    """Cosines and sines (2, d - 1), or blocks (4, d - 1), of the order the kernel runs in."""
    p = parameters.to(acc)
    if p.dim() == 1:
        return torch.stack([p.cos(), -p.sin() if reverse else p.sin()])
    a, b, c, d = p.flatten(1).unbind(1)
    if not reverse:
        return torch.stack([a, b, c, d])
    if not invert:
        return torch.stack([a, c, b, d])
    return torch.stack([d, -b, -c, a]) / (a * d - b * c)


class _Chain(torch.autograd.Function):
    """Angles: (N, d), (d - 1,), scale (d,) or None. Of blocks the coefficients are made outside."""

    @staticmethod
    def forward(ctx, x, parameters, scale, reverse):
        acc = accumulate_type(x)
        ctx.reverse = reverse
        ctx.save_for_backward(x, parameters, scale)
        c = _coefficients(parameters, acc, reverse, False) if parameters.dim() == 1 else parameters
        return _op.givens_chain(x, c, None if scale is None else scale.to(acc), reverse)

    @staticmethod
    def backward(ctx, dy):
        x, parameters, scale = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        angles = parameters.dim() == 1
        if torch.is_grad_enabled():

            def run(x, p, s):
                c = _coefficients(p, accumulate_type(x), ctx.reverse, False) if angles else p
                return givens_chain_reference(x, c, s, ctx.reverse)

            return *differentiable_vjp(run, (x, parameters, scale), needs, (dy,)), None
        acc = accumulate_type(x)
        c = _coefficients(parameters, acc, ctx.reverse, False) if angles else parameters
        wide = None if scale is None else scale.to(acc)
        dx, dc, ds = _op.givens_chain_backward(dy, x, c, wide, ctx.reverse, *needs)
        if needs[1] and angles:
            dc = (-dc[0] if ctx.reverse else dc[0]).to(parameters.dtype)
        return (
            dx if needs[0] else None,
            dc if needs[1] else None,
            ds.to(scale.dtype) if needs[2] else None,
            None,
        )


def _run(x, parameters, scale, reverse, invert):
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    angles = parameters.dim() == 1
    acc = accumulate_type(x)
    if invert and scale is not None:
        scale = 1 / scale.to(acc)
    if not angles:
        parameters = _coefficients(parameters, acc, reverse, invert)
    if use_reference():
        c = _coefficients(parameters, acc, reverse, invert) if angles else parameters
        y = givens_chain_reference(rows, c, scale, reverse)
    elif needs_graph(x, parameters, scale):
        y = _Chain.apply(rows, parameters, scale, reverse)
    else:
        c = _coefficients(parameters, acc, reverse, invert) if angles else parameters
        y = _op.givens_chain(rows, c, None if scale is None else scale.to(acc), reverse)
    return y.reshape(x.shape)


# ---- public functions --------------------------------------------------------------------------------


def _check_arguments(name: str, x: object, parameters: object, scale: object) -> None:
    x = _check.tensor(name, x, min_dim=1)
    d = x.shape[-1]
    if d == 0:
        raise ValueError(
            f"{name}: expected a last dimension of at least 1, got shape {tuple(x.shape)}"
        )
    parameters = _check.tensor("theta_or_blocks", parameters)
    if parameters.dim() not in (1, 3):
        raise ValueError(
            f"theta_or_blocks: expected angles ({d - 1},) or blocks ({d - 1}, 2, 2) to go with {name} of "
            f"shape {tuple(x.shape)}, got shape {tuple(parameters.shape)}"
        )
    shape = (d - 1,) if parameters.dim() == 1 else (d - 1, 2, 2)
    _check.like("theta_or_blocks", parameters, shape, x, name)
    if scale is not None:
        _check.like("scale", scale, (d,), x, name)


def givens_chain(
    x: Tensor, theta_or_blocks: Tensor, scale: Tensor | None = None, *, inverse: bool = False
) -> Tensor:
    r"""Rows of x through $\lceil\log_2 d\rceil$ levels of disjoint plane rotations: $y = (xQ)\,\mathrm{diag}(s)$.

    Level l turns the columns $(i, i + 2^l)$ for i a multiple of $2^{l+1}$, d - 1 pairs in all (any d):
    $(x_i, x_j) \leftarrow (\cos\theta\,x_i - \sin\theta\,x_j,\ \sin\theta\,x_i + \cos\theta\,x_j)$. With blocks
    (qGOFT) each rotation is a free 2x2 matrix acting on $(x_i, x_j)^\top$; `soft_orthogonality_penalty` keeps them near
    rotations. `F.linear(givens_chain(x, theta, s), W)` is `F.linear(x, givens_merge(W, theta, s))`. A row stays in
    cache through all levels, forward and backward; backward keeps x alone.

    Args:
        x: (..., d). float32, float64, bfloat16, float16; computed in float32 (float64 for float64).
        theta_or_blocks: angles (d - 1,), or blocks (d - 1, 2, 2); level by level, within a level by column. The
            authors' angle is $\pi\tanh(raw)$.
        scale: s (d,), or None for 1.
        inverse: the map back: $(y\,\mathrm{diag}(1/s))\,Q^{-1}$; blocks must be invertible, s without zeros.

    Shapes: (..., d), (d - 1,) or (d - 1, 2, 2), (d,) -> (..., d) of x's dtype. Differentiable in all three, twice.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Ma et al., "Parameter Efficient Quasi-Orthogonal Fine-Tuning via Givens Rotation", 2024.
    """
    _check_arguments("x", x, theta_or_blocks, scale)
    return _run(x, theta_or_blocks, scale, inverse, inverse)


def givens_merge(weight: Tensor, theta_or_blocks: Tensor, scale: Tensor | None = None) -> Tensor:
    r"""The chain taken into the weight that follows it: $W\,\mathrm{diag}(s)\,Q^\top$.

    Shapes: weight (..., O, d) or (d,), theta_or_blocks and scale as `givens_chain` -> the shape and dtype of weight.
    Differentiable in all three, twice.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: as `givens_chain`.
    """
    _check_arguments("weight", weight, theta_or_blocks, scale)
    return _run(weight, theta_or_blocks, scale, True, False)


def soft_orthogonality_penalty(blocks: Tensor) -> Tensor:
    r"""How far 2x2 blocks are from orthogonal: $\sum_p \lVert B_p^\top B_p - I\rVert_F^2$.

    Shapes: (P, 2, 2) -> a number, float32 (float64 for float64). Differentiable. A composition of
    torch operations.

    Raises:
        ValueError, TypeError: blocks is no floating-point tensor (P, 2, 2).

    Source: the soft constraint of qGOFT, Ma et al., 2024; that it is the squared Frobenius norm, summed, is the usual
    form (Bansal et al., "Can We Gain More from Orthogonality Regularizations in Training Deep Networks?", 2018).
    """
    blocks = _check.tensor("blocks", blocks, dim=3)
    if blocks.shape[1:] != (2, 2):
        raise ValueError(f"blocks: expected shape (P, 2, 2), got {tuple(blocks.shape)}")
    a, b, c, d = blocks.to(accumulate_type(blocks)).flatten(1).unbind(1)
    first, second, mixed = a * a + c * c - 1, b * b + d * d - 1, a * b + c * d
    return (first.square() + second.square() + 2 * mixed.square()).sum()
