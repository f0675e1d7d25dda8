r"""Core `gram`: all dots of K weight lists around a base, in one read.

$$G_{kj} = \langle w_k - b,\ w_j - b\rangle$$

for every tensor of the lists, or for every row of every tensor. What stays in the span of its inputs (slerp,
Karcher means, Model Stock, principal gradients) is decided by these numbers alone: one pass for them, one
pass of `lincomb` or `row_lincomb` for the result, however many iterations lie between.

With $\mathrm{d}G$ the gradient of $G$ and $d_k = w_k - b$,

$$\mathrm{d}w_k = \sum_j (\mathrm{d}G_{kj} + \mathrm{d}G_{jk})\, d_j, \qquad
  \mathrm{d}b = -\sum_k \mathrm{d}w_k ,$$

all of them from one read too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._registry import reference
from .._route import use_reference
from . import _lists
from .lincomb import Weights, _accumulator, _gather, _gather_with_care, _refuse_mismatch

_op = torch.ops.solera


# ---- reference ---------------------------------------------------------------------------------------


def _deltas(column: Sequence[Tensor], base: Sequence[Tensor], by_row: bool) -> Tensor:
    """w_k - b of one item in the accumulator's dtype: (rows, K, elements)."""
    acc = _accumulator([*column, *base], None)
    d = torch.stack([w.to(acc) - base[0].to(acc) if base else w.to(acc) for w in column])
    d = d.unsqueeze(-1)
    return d.flatten(2).transpose(0, 1) if by_row else d.flatten(1).unsqueeze(0)


def gram_reference(
    tensors: Sequence[Tensor], base: Sequence[Tensor], models: int, by_row: bool
) -> Tensor:
    """The dots of every item, row after row (R, K, K): differences in float32, sums in float64."""
    length = len(tensors) // models
    found = []
    for item in range(length):
        d = _deltas(tensors[item::length], base[item : item + 1], by_row).double()
        found.append(d @ d.mT)
    return torch.cat(found)


@reference("gram")
def _gram(tensors, base, models, by_row):
    _refuse_mismatch([*tensors, *base], tensors[: len(tensors) // models])
    return gram_reference(tensors, base, models, by_row).contiguous()


def gram_vjp(
    dgram: Tensor,
    tensors: Sequence[Tensor],
    base: Sequence[Tensor],
    by_row: bool,
    need_tensors: Sequence[bool],
) -> list[Tensor]:
    """The gradients asked for, in plain torch: itself differentiable."""
    models = dgram.shape[1]
    length, start, every = len(tensors) // models, 0, (*tensors, *base)
    out: dict[int, Tensor] = {}
    for item in range(length):
        like = tensors[item]
        rows = like.shape[0] if by_row else 1
        d = _deltas(tensors[item::length], base[item : item + 1], by_row)
        g = dgram[start : start + rows]
        factors = (g + g.mT).to(d.dtype)
        start += rows
        dw = factors @ d
        for k in range(models + len(base[item : item + 1])):
            i = k * length + item
            if need_tensors[i]:
                grad = dw[:, k] if k < models else -dw.sum(1)
                out[i] = grad.reshape(like.shape).to(every[i].dtype)
    return [out[i] for i in sorted(out)]


@reference("gram_backward")
def _gram_backward(dgram, tensors, base, by_row, need_tensors):
    _refuse_mismatch([*tensors, *base], tensors[: len(tensors) // dgram.shape[1]])
    found = gram_vjp(dgram, tensors, base, by_row, need_tensors)
    return [t.clone(memory_format=torch.contiguous_format) for t in found]  # not one's slices


# ---- autograd ----------------------------------------------------------------------------------------


class _Gram(torch.autograd.Function):
    """The K * L tensors followed by the base's L (or none) -> (R, K, K), or `known` where it is there already."""

    @staticmethod
    def forward(ctx, models, split, by_row, known, *flat):
        ctx.split, ctx.by_row = split, by_row
        ctx.save_for_backward(*flat)
        return known[0] if known else _op.gram(flat[:split], flat[split:], models, by_row)

    @staticmethod
    def backward(ctx, dgram):
        flat, need = ctx.saved_tensors, ctx.needs_input_grad[4:]
        backward = gram_vjp if torch.is_grad_enabled() else _op.gram_backward
        found = iter(backward(dgram, flat[: ctx.split], flat[ctx.split :], ctx.by_row, need))
        return (None, None, None, None, *(next(found) if needed else None for needed in need))


# ---- models as rows ----------------------------------------------------------------------------------


def gathered(tensors: Any, base: Any) -> tuple[str, list, dict[Any, Tensor], list[Tensor]]:
    """(kind, keys of the floating-point entries, the other entries, the models' tensors and the base's)."""
    found = _gather(tensors, base)
    if found is None or not _lists.uniform(found[3], found[3][: len(found[1])]):
        found = _gather_with_care(tensors, base)
    return found


def check_dim(dim: int, tensors: Sequence[Tensor]) -> None:
    """dim counts a dimension of every tensor of two or more."""
    if not isinstance(dim, int) or isinstance(dim, bool):
        raise TypeError(f"dim: expected an integer, got {type(dim).__name__} {dim!r}")
    for t in tensors:
        if t.dim() > 1 and not -t.dim() <= dim < t.dim():
            raise ValueError(f"dim: {dim} is out of range for a tensor of shape {tuple(t.shape)}")


def as_rows(t: Tensor, dim: int) -> Tensor:
    """t with its rows along the first dimension: `dim` moved there (the kernels copy what is then strided),
    or one row for a tensor of fewer than two dimensions."""
    if t.dim() < 2:
        return t.reshape(1, -1)
    return t if dim in (0, -t.dim()) else t.movedim(dim, 0)


def from_rows(rows: Tensor, like: Tensor, dim: int) -> Tensor:
    """The inverse of as_rows, contiguous."""
    if like.dim() < 2:
        return rows.reshape(like.shape)
    return rows if dim in (0, -like.dim()) else rows.movedim(0, dim).contiguous()


def gram_of(
    flat: Sequence[Tensor], models: int, split: int, by_row: bool, known: Tensor | None = None
) -> Tensor:
    """The dots (R, K, K) of checked tensors laid out model by model, the base after `split`.

    known: the dots, where another op took them: what is left is to record how they came about.
    """
    if use_reference():
        return gram_reference(flat[:split], flat[split:], models, by_row)
    if torch.is_grad_enabled() and any([t.requires_grad for t in flat]):
        # In a list: to autograd they are no input.
        return _Gram.apply(models, split, by_row, [] if known is None else [known], *flat)
    if known is not None:
        return known
    return _op.gram(flat[:split], flat[split:], models, by_row)


# ---- public function ---------------------------------------------------------------------------------


def gram(tensors: Sequence[Weights], *, base: Weights | None = None, dim: int | None = None) -> Any:
    r"""All dots $\langle w_k - b, w_j - b\rangle$ of K tensors, K lists of tensors or K state dicts, in one read.

    Args:
        tensors: K tensors of one shape, or K lists of L tensors, or K state dicts with the same keys.
            float32, float64, bfloat16 or float16, also mixed. Integer and boolean entries of state dicts
            must be equal in all models and are left out.
        base: one more tensor, list or state dict like the others, subtracted from each (the default: nothing).
        dim: None for one matrix a tensor; else one for each index along `dim`, of dots over all other
            dimensions (0: the rows of a linear weight, the filters of a convolution's). A tensor of fewer
            than two dimensions is one row.

    Shapes: tensors -> (K, K), with dim (rows, K, K); lists and state dicts -> (L, K, K), in the order of the
    floating-point entries, with dim a list or dict of (rows, K, K). The result is float64.

    Differences and products are float32 (float64 where a tensor of the item is), sums of 1024 products in
    vector lanes, everything above in float64, in a fixed order: the same bits for any number of threads.
    (Differences past 1e19 therefore overflow to inf, and products below 1e-38 count as zero, unless the tensors are
    float64.) Differentiable in the tensors and the base.

    Raises:
        ValueError, TypeError: naming the argument: no models, empty lists, missing or unexpected keys,
            shapes, dtypes or devices that do not fit, a `dim` out of range.
    """
    kind, keys, _, flat = gathered(tensors, base)
    models, length = len(tensors), len(keys)
    if dim is not None:
        check_dim(dim, flat[:length])
        flat = [as_rows(t, dim) for t in flat]
    found = gram_of(flat, models, models * length, dim is not None)
    if dim is None:
        return found[0] if kind == "tensor" else found
    if kind == "tensor":
        return found
    parts = found.split([t.shape[0] for t in flat[:length]])
    return list(parts) if kind == "list" else dict(zip(keys, parts))
