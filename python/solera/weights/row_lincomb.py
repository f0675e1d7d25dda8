r"""Core `row_lincomb`: linear combinations of K weight lists with coefficients for every row.

$$\mathrm{out}_{r} = \sum_k c_{kr}\,w_{kr} \qquad\text{or, around a base,}\qquad
  \mathrm{out}_{r} = b_{r} + \sum_k c_{kr}\,(w_{kr} - b_{r}),$$

r counting the rows of all tensors: `lincomb` with a finer grain, and on each device the same kernels. With
$G$ the gradient of out, $\mathrm{d}c_{kr} = \langle G_r, w_{kr} - b_r\rangle$,
$\mathrm{d}w_{kr} = c_{kr} G_r$, $\mathrm{d}b_r = (1 - \sum_k c_{kr})\,G_r$.

Sources: Model Stock filter by filter, Jang et al., 2024; slerp row by row, Shoemake, 1985.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _check
from .._registry import reference
from .._route import use_reference
from .gram import as_rows, check_dim, from_rows, gathered
from .lincomb import Weights, _accumulator, _refuse_mismatch

_op = torch.ops.solera


# ---- reference ---------------------------------------------------------------------------------------


def _factor(c: Tensor, like: Tensor, acc: torch.dtype) -> Tensor:
    """A coefficient for each row, ready to multiply with like."""
    return c.to(acc).reshape(-1, *[1] * (like.dim() - 1))


def row_lincomb_reference(
    tensors: Sequence[Tensor],
    coefficients: Tensor,
    base: Sequence[Tensor],
    out_dtype: torch.dtype | None,
) -> list[Tensor]:
    """The formula on K * L tensors (model by model), summed in float32 (float64 where one is float64)."""
    length, start = len(tensors) // coefficients.shape[0], 0
    out = []
    for item in range(length):
        column = tensors[item::length]
        every = [*column, *base[item : item + 1]]
        dtype = out_dtype
        if dtype is None:
            dtype = every[0].dtype
            for t in every:
                dtype = torch.promote_types(dtype, t.dtype)
        acc = _accumulator(every, dtype)
        part = coefficients[:, start : start + column[0].shape[0]]
        start += column[0].shape[0]
        b = base[item].to(acc) if base else None
        total = torch.zeros_like(column[0], dtype=acc) if b is None else b
        for c, w in zip(part, column):
            total = total + _factor(c, w, acc) * (w.to(acc) if b is None else w.to(acc) - b)
        out.append(total.to(dtype))
    return out


@reference("row_lincomb")
def _row_lincomb(tensors, coefficients, base, out_dtype):
    _refuse_mismatch([*tensors, *base], tensors[: len(tensors) // coefficients.shape[0]])
    out = row_lincomb_reference(tensors, coefficients, base, out_dtype)
    return [t.contiguous() for t in out]


def row_lincomb_vjp(
    grads: Sequence[Tensor],
    tensors: Sequence[Tensor],
    coefficients: Tensor,
    base: Sequence[Tensor],
    need_coefficients: bool,
    need_tensors: Sequence[bool],
) -> tuple[Tensor, list[Tensor]]:
    """dots (K, R) in float64 and the gradients asked for, in plain torch: itself differentiable."""
    count, length, start = coefficients.shape[0], len(grads), 0
    every = (*tensors, *base)
    dots, out = [], {}
    for item, g in enumerate(grads):
        rows = g.shape[0]
        part = coefficients[:, start : start + rows].double()
        start += rows
        if need_coefficients:
            column = [w.double() for w in tensors[item::length]]
            if base:
                column = [w - base[item].double() for w in column]
            products = torch.stack([g.double() * w for w in column])
            dots.append(products.unsqueeze(-1).flatten(2).sum(2))
        factors = [*part, 1 - part.sum(0)]
        for k, factor in enumerate(factors[: count + bool(base)]):
            i = k * length + item
            if need_tensors[i]:
                acc = _accumulator([every[i], g], None)
                out[i] = (g.to(acc) * _factor(factor, g, acc)).to(every[i].dtype)
    found = torch.cat(dots, 1) if need_coefficients else coefficients.new_empty(0).double()
    return found, [out[i] for i in sorted(out)]


@reference("row_lincomb_backward")
def _row_lincomb_backward(grads, tensors, coefficients, base, need_coefficients, need_tensors):
    dots, out = row_lincomb_vjp(grads, tensors, coefficients, base, need_coefficients, need_tensors)
    return dots.contiguous(), [t.contiguous() for t in out]


# ---- autograd ----------------------------------------------------------------------------------------


class _RowLincomb(torch.autograd.Function):
    """coefficients (K, R) and the K * L tensors followed by the base's L (or none) -> L tensors, or `known`."""

    @staticmethod
    def forward(ctx, coefficients, need_coefficients, length, out_dtype, known, *flat):
        ctx.split = coefficients.shape[0] * length
        ctx.dtypes = [t.dtype for t in flat]
        # Only the dots read the tensors: without them no tensor is kept.
        ctx.save_for_backward(coefficients, *(flat if need_coefficients else ()))
        if known:
            return tuple(known)
        return tuple(_op.row_lincomb(flat[: ctx.split], coefficients, flat[ctx.split :], out_dtype))

    @staticmethod
    def backward(ctx, *grads):
        coefficients, *flat = ctx.saved_tensors
        need_coefficients, need = ctx.needs_input_grad[0], ctx.needs_input_grad[5:]
        if not flat:
            flat = [grads[0].new_empty(0, dtype=d) for d in ctx.dtypes]
        backward = row_lincomb_vjp if torch.is_grad_enabled() else _op.row_lincomb_backward
        dots, out = backward(
            grads, flat[: ctx.split], coefficients, flat[ctx.split :], need_coefficients, need
        )
        found = iter(out)
        return (
            dots.to(coefficients.dtype) if need_coefficients else None,
            None, None, None, None,
            *(next(found) if needed else None for needed in need),
        )  # fmt: skip


# ---- public function ---------------------------------------------------------------------------------


def combine_rows(
    flat: Sequence[Tensor],
    c: Tensor,
    split: int,
    out_dtype: torch.dtype | None = None,
    known: Sequence[Tensor] | None = None,
) -> Sequence[Tensor]:
    """The combinations of checked tensors whose rows lie along the first dimension, the base after `split`.

    known: the results, where another op made them: what is left is to record how.
    """
    if use_reference():
        return row_lincomb_reference(flat[:split], c, flat[split:], out_dtype)
    if torch.is_grad_enabled() and (c.requires_grad or any([t.requires_grad for t in flat])):
        return _RowLincomb.apply(c, c.requires_grad, split // c.shape[0], out_dtype, known, *flat)
    if known is not None:
        return known
    return _op.row_lincomb(flat[:split], c, flat[split:], out_dtype)


def row_lincomb(
    tensors: Sequence[Weights],
    coefficients: Tensor,
    *,
    base: Weights | None = None,
    dim: int = 0,
    out_dtype: torch.dtype | None = None,
) -> Any:
    r"""Linear combination of K tensors, lists or state dicts with K coefficients for each row of each tensor.

    $\mathrm{out}_r = \sum_k c_{kr} w_{kr}$, or with a base $b_r + \sum_k c_{kr} (w_{kr} - b_r)$.

    Args:
        tensors: K tensors of one shape, or K lists of L tensors, or K state dicts with the same keys.
            float32, float64, bfloat16 or float16, also mixed; summed in float32 (float64 where a tensor or
            the result is float64), rounded once. Integer and boolean entries of state dicts must be equal
            in all models and are copied.
        coefficients: (K, R), R the number of rows of all floating-point tensors together, in order.
        base: one more tensor, list or state dict like the others.
        dim: the dimension whose indices are the rows (0: the rows of a linear weight, the filters of a
            convolution's; another one is copied to the front first). A tensor of fewer than two dimensions is one row.
        out_dtype: dtype of the results; default: the promoted dtype of what goes in, tensor by tensor.

    Shapes: K of any shape S -> S; K lists of shapes S_1..S_L -> the list; state dicts -> a dict. Results are
    contiguous. Differentiable in the coefficients, the tensors and the base.

    Raises:
        ValueError, TypeError: naming the argument: what `lincomb` refuses, a `dim` out of range.
    """
    kind, keys, whole, flat = gathered(tensors, base)
    count, length = len(tensors), len(keys)
    if out_dtype is not None and out_dtype not in _check.FLOATS:
        raise TypeError(
            f"out_dtype: expected float32, float64, bfloat16 or float16, got {out_dtype!r}"
        )
    check_dim(dim, flat[:length])
    like = flat[:length]
    flat = [as_rows(t, dim) for t in flat]
    rows = sum([t.shape[0] for t in flat[:length]])
    if not isinstance(coefficients, Tensor):
        raise TypeError(f"coefficients: expected a tensor, got {type(coefficients).__name__}")
    if coefficients.dtype not in _check.FLOATS:
        raise TypeError(f"coefficients: expected a floating-point dtype, got {coefficients.dtype}")
    if coefficients.shape != (count, rows):
        raise ValueError(
            f"coefficients: expected shape ({count}, {rows}) for {count} models of {rows} row(s), got "
            f"{tuple(coefficients.shape)}"
        )
    if coefficients.device != flat[0].device:
        raise ValueError(
            f"coefficients: expected device {flat[0].device} (that of tensors), got "
            f"{coefficients.device}"
        )
    results = combine_rows(flat, coefficients, count * length, out_dtype)
    return packed(kind, keys, whole, [from_rows(y, t, dim) for y, t in zip(results, like)], tensors)


def packed(
    kind: str, keys: Sequence, whole: dict[Any, Tensor], results: Sequence[Tensor], tensors: Any
) -> Any:
    """Results in the form the models came in: a tensor, a list or a state dict in the first model's order."""
    if kind == "tensor":
        return results[0]
    if kind == "list":
        return list(results)
    found = dict(zip(keys, results))
    return {key: whole[key].clone() if key in whole else found[key] for key in tensors[0]}
