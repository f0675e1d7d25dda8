"""The layouts in which member logits come, and the one form the kernels take.

A caller has one tensor with a member dimension, (B, K, C) by default, or a list of K tensors (..., C). The ops take a
list of tensors: [(N, K, C)] or K times (N, C), all of one dtype, of any strides but a last one of 1. Nothing is
stacked, so a list costs no memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _check


class Members(NamedTuple):
    """Checked member logits."""

    tensors: tuple[Tensor, ...]  # ((N, K, C),) or K times (N, C): what the ops take as `logits`
    shape: tuple[int, ...]  # of the rows, the batch dimensions: N is their product
    count: int  # type: ignore[assignment]  # K, and not tuple.count
    classes: int  # C

    @property
    def first(self) -> Tensor:
        """For the dtype and the device, which all share."""
        return self.tensors[0]


def member_logits(
    logits: Tensor | Sequence[Tensor],
    member_dim: int = 1,
    name: str = "logits",
    *,
    least: int = 1,
) -> Members:
    """`logits` as the ops take them: one tensor with its members along `member_dim`, or a list of (..., C).

    The other dimensions, but for the last (the classes), are the rows: (B, K, C) has B, (K, B, T, C) with
    `member_dim=0` has B T. A tensor whose last stride is not 1, or whose rows do not merge, is copied here.
    """
    if isinstance(logits, Tensor):
        x = _check.tensor(name, logits, min_dim=2)
        if isinstance(member_dim, bool) or not isinstance(member_dim, int):
            raise TypeError(f"member_dim: expected an int, got {type(member_dim).__name__}")
        if not -x.dim() <= member_dim < x.dim() or member_dim % x.dim() == x.dim() - 1:
            raise ValueError(
                f"member_dim: expected a dimension of {name} before the classes, which are the last, "
                f"got {member_dim} for shape {tuple(x.shape)}"
            )
        x = x.movedim(member_dim, -2)
        shape, count, classes = tuple(x.shape[:-2]), x.shape[-2], x.shape[-1]
        if x.dim() != 3:
            x = x.reshape(_product(shape), count, classes)
        tensors: tuple[Tensor, ...] = (_unit_stride(x),)
    else:
        if not isinstance(logits, (list, tuple)):
            raise TypeError(
                f"{name}: expected a tensor (B, K, C) or a list of (B, C), got {type(logits).__name__}"
            )
        parts = [_check.tensor(f"{name}[{k}]", x, min_dim=1) for k, x in enumerate(logits)]
        if not parts:
            raise ValueError(f"{name}: expected at least one member, got an empty list")
        first = parts[0]
        for k, x in enumerate(parts[1:], 1):
            _check.like(f"{name}[{k}]", x, tuple(first.shape), first, f"{name}[0]")
            _check.same_dtype(f"{name}[{k}]", x, first, f"{name}[0]")
        shape, count, classes = tuple(first.shape[:-1]), len(parts), first.shape[-1]
        rows = _product(shape)
        tensors = tuple(
            _unit_stride(x if x.dim() == 2 else x.reshape(rows, classes)) for x in parts
        )
    if count < least:
        raise ValueError(f"{name}: expected at least {least} member(s), got K = {count}")
    return Members(tensors, shape, count, classes)


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """(N, K, C): for references, which may copy."""
    return tensors[0] if tensors[0].dim() == 3 else torch.stack(list(tensors), 1)


def unstacked(grad: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """A gradient (N, K, C), or (K, N, C) to a list, as one tensor for each of `tensors`."""
    return (grad,) if tensors[0].dim() == 3 else grad.unbind(0)


def _product(shape: Sequence[int]) -> int:
    rows = 1
    for extent in shape:
        rows = rows * extent
    return rows


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
