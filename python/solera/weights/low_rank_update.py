r"""Core `low_rank_update`: the rows of a matrix moved by a product of low rank.

$$\mathrm{out}_o = w_o + (b_o - K w_o)^\top A \qquad\text{that is}\qquad W + (B - WK^\top)A$$

with A (r, I), B (O, r) and the keys K (r, I), of which B or K may be missing (zero). Without keys this merges an
adapter; with B and keys it edits the matrix so that it answers the keys otherwise; with keys alone it projects rows
or reflects them. A row is read once and written once, its r dots taken before it leaves the cache: "dots, then
update" in torch reads it twice, and forms a second matrix where factors and matrix differ in dtype.

$\partial/\partial W$ of $W - WK^\top A$ applied to G is $G - GA^\top K$: the same core with A and K exchanged.
Gradients of A and K are products with r rows, left to torch.

Sources: Hu et al., "LoRA", 2022 (W + sBA); Meng et al., "Locating and Editing Factual Associations in GPT", 2022
(edits); Bischof, Van Loan, "The WY Representation for Products of Householder Matrices", 1987.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._registry import accumulate_type, reference
from .._route import needs_graph, use_reference

_op = torch.ops.solera


def low_rank_update_reference(
    w: Tensor, a: Tensor, b: Tensor | None, keys: Tensor | None
) -> Tensor:
    """The formula in float32 (float64 for float64), rounded once."""
    acc = accumulate_type(w)
    wide = w.to(acc)
    by = None if b is None else b.to(acc)
    if keys is not None:
        measured = wide @ keys.to(acc).mT
        by = -measured if by is None else by - measured
    assert by is not None
    return (wide + by @ a.to(acc)).to(w.dtype)


def _refuse_misfits(w, a, b, keys):
    """What the kernels refuse too."""
    rows, columns = w.shape
    if (
        a.shape[1] != columns
        or (b is not None and b.shape != (rows, a.shape[0]))
        or (keys is not None and keys.shape != a.shape)
        or (b is None and keys is None)
    ):
        raise RuntimeError("low_rank_update: a factor does not fit its matrix")


@reference("low_rank_update")
def _low_rank_update(w, a, b, keys):
    _refuse_misfits(w, a, b, keys)
    return low_rank_update_reference(w, a, b, keys).contiguous()


@reference("low_rank_update_")
def _low_rank_update_in_place(w, a, b, keys):
    lists = (b or [None] * len(w), keys or [None] * len(w))
    for one in zip(w, a, *lists, strict=True):
        _refuse_misfits(*one)
        one[0].copy_(low_rank_update_reference(*one))


def update_(
    w: Sequence[Tensor], a: Sequence[Tensor], b: Sequence[Tensor], keys: Sequence[Tensor]
) -> None:
    """The update of each matrix of a list, in place and without autograd; b or keys may be an empty list."""
    with torch.no_grad():
        if use_reference():
            _low_rank_update_in_place(list(w), list(a), list(b), list(keys))
            return
        _op.low_rank_update_(list(w), list(a), list(b), list(keys))
        if not torch.compiler.is_compiling():
            torch.autograd.graph.increment_version(tuple(w))


class _Turned(torch.autograd.Function):
    """x - x K^T A for x (N, D), A and K (r, D) in the accumulator's dtype."""

    @staticmethod
    def forward(ctx, x, a, keys):
        ctx.save_for_backward(x, a, keys)
        return _op.low_rank_update(x, a, None, keys)

    @staticmethod
    def backward(ctx, dy):
        x, a, keys = ctx.saved_tensors
        need_x, need_a, need_keys = ctx.needs_input_grad
        wide, g = x.to(a.dtype), dy.to(a.dtype)
        return (
            turned(dy, keys, a) if need_x else None,
            -(wide @ keys.mT).mT @ g if need_a else None,
            -(g @ a.mT).mT @ wide if need_keys else None,
        )


def turned(x: Tensor, a: Tensor, keys: Tensor) -> Tensor:
    """x - x K^T A on the rows of x (N, D); differentiable, twice."""
    if use_reference():
        return low_rank_update_reference(x, a, None, keys)
    if needs_graph(x, a, keys):
        return _Turned.apply(x, a, keys)
    return _op.low_rank_update(x, a, None, keys)
