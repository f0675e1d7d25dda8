"""What stays in the span of its inputs: one pass for all dots, K x K numbers, one pass for the result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._route import use_reference
from .gram import as_rows, check_dim, from_rows, gathered, gram_of
from .lincomb import _Lincomb, lincomb_reference
from .row_lincomb import combine_rows, packed

_op = torch.ops.solera


class Span:
    """K models (and a base) as vectors: `gram` (R, K, K) in float64, one matrix for each tensor or each row.

    stock: merged by the op `model_stock`, which takes the dots too; `combine` then only records its coefficients.
    """

    def __init__(self, tensors: Sequence[Any], base: Any, dim: int | None, stock: bool = False):
        self.tensors, self.dim = tensors, dim
        self.kind, self.keys, self.whole, flat = gathered(tensors, base)
        self.length = len(self.keys)
        self.split = len(tensors) * self.length
        self.like = flat[: self.length]
        if dim is not None:
            check_dim(dim, self.like)
            flat = [as_rows(t, dim) for t in flat]
        self.flat = flat
        self.rows = [1 if dim is None else t.shape[0] for t in flat[: self.length]]
        args = len(tensors), self.split, dim is not None
        self.merged, known = None, None
        if stock and not use_reference():
            with torch.no_grad():
                self.merged, known = _op.model_stock(
                    flat[: self.split], flat[self.split :], len(tensors), dim is not None
                )
        self.gram = gram_of(flat, *args, known)

    def per_row(self, name: str, value: Any) -> Any:
        """A number, a tensor without dimensions, or (L,) with a number for each tensor: one for each row."""
        if not isinstance(value, Tensor):
            if not isinstance(value, int | float):
                raise TypeError(f"{name}: expected a number or a tensor, got {value!r:.100}")
            return float(value)
        if value.device != self.gram.device:
            raise ValueError(f"{name}: expected device {self.gram.device}, got {value.device}")
        value = value.double()
        if value.dim() == 0:
            return value
        if value.shape != (self.length,) or self.kind == "tensor":
            expected = "" if self.kind == "tensor" else f" or ({self.length},)"
            raise ValueError(f"{name}: expected shape (){expected}, got {tuple(value.shape)}")
        if self.dim is None:
            return value
        return torch.cat([v.expand(n) for v, n in zip(value, self.rows)])

    def per_tensor(self, values: Tensor) -> Any:
        """(R,) as it is reported: a scalar or (rows,) of one tensor; (L,), or a list or dict of (rows,)."""
        if self.dim is None:
            return values[0] if self.kind == "tensor" else values
        if self.kind == "tensor":
            return values
        parts = values.split(self.rows)
        return list(parts) if self.kind == "list" else dict(zip(self.keys, parts))

    def combine(self, c: Tensor) -> Any:
        """The combination with coefficients (R, K), around the base if there is one, in the models' form."""
        c = c.mT.contiguous()
        flat, split = self.flat, self.split
        results: Any
        if self.dim is not None:
            found = combine_rows(flat, c, split, None, self.merged)
            results = [from_rows(y, t, self.dim) for y, t in zip(found, self.like)]
        elif use_reference():
            results = lincomb_reference(flat[:split], c, flat[split:], None)
        elif torch.is_grad_enabled() and (c.requires_grad or any([t.requires_grad for t in flat])):
            results = _Lincomb.apply(c, c.requires_grad, self.length, None, self.merged, *flat)
        elif self.merged is not None:
            results = self.merged
        else:
            results = _op.lincomb(flat[:split], c, flat[split:], None)
        return packed(self.kind, self.keys, self.whole, results, self.tensors)


def unit_gram(gram: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(cosines (R, K, K), norms (R, K), which vectors are not zero): a zero vector's cosines are 0."""
    squares = gram.diagonal(dim1=-2, dim2=-1)
    alive = squares != 0  # a NaN stays one
    roots = torch.where(alive, squares, 1).sqrt()
    inverse = torch.where(alive, 1 / roots, 0)
    return (
        gram * inverse[:, :, None] * inverse[:, None, :],
        torch.where(alive, roots, 0),
        alive,
    )
