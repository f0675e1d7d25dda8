"""What the losses over logits share: labels, the mean over those that count, the dtype of a loss."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _check
from .._registry import accumulate_type
from .._route import autocast_enabled, readable

REDUCTIONS = ("none", "mean", "sum")


def labels(
    name: str, target: Tensor, shape: tuple[int, ...], width: int, device, ignore_index: int = -100
) -> Tensor:
    """`target` flattened, with -1 in the places of `ignore_index`.

    A label outside [0, width) raises an IndexError on the CPU, as in `torch.nn.functional.cross_entropy`.
    Where values cannot be looked at (other devices, `torch.compile`, `torch.func`) it gives NaN.
    """
    if not isinstance(target, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(target).__name__}")
    if target.dtype != torch.int64:
        raise TypeError(f"{name}: expected int64 class indices, got {target.dtype}")
    if target.shape != shape:
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(target.shape)}")
    if target.device != device:
        raise ValueError(f"{name}: expected device {device}, got {target.device}")
    if width == 0:
        raise ValueError("logits: expected at least one class, got 0")
    target = target.flatten()
    ignored = target == ignore_index
    if readable(target):
        wrong = ((target < 0) | (target >= width)) & ~ignored
        if wrong.any():
            row = int(wrong.nonzero()[0])
            raise IndexError(
                f"{name}: expected labels in [0, {width}) or ignore_index ({ignore_index}), "
                f"got {int(target[row])} at row {row}"
            )
    return torch.where(ignored, -1, torch.where(target < 0, width, target))


def logit_rows(logits: object, target: object, ignore_index: int) -> tuple[Tensor, Tensor]:
    """(logits as (B, C), labels as (B,) with -1 where a row is left out), both checked."""
    x = _check.tensor("logits", logits, min_dim=1)
    found = labels("target", target, x.shape[:-1], x.shape[-1], x.device, ignore_index)  # type: ignore[arg-type]
    return x.reshape(found.shape[0], x.shape[-1]), found


def reduced(
    losses: Tensor, target: Tensor, reduction: str, x: Tensor, shape: tuple[int, ...] | None = None
) -> Tensor:
    """The losses of the rows whose label counts (0 for the others), summed, averaged over them, or as they are.

    x's dtype, but float32 for half precision under autocast (as torch's own losses).
    """
    _check.choice("reduction", reduction, REDUCTIONS)
    kept = target >= 0
    losses = torch.where(kept, losses, 0.0)
    half = x.dtype in (torch.bfloat16, torch.float16)
    dtype = x.dtype
    if half and autocast_enabled(x):
        dtype = torch.float32
    if reduction == "none":
        return losses.reshape(shape if shape is not None else losses.shape).to(dtype)
    # In float64: the order of this one sum is torch's own and may follow the thread count.
    total = losses.sum(dtype=torch.float64)
    if reduction == "mean":
        total = total / kept.sum()
    return total.to(dtype)


def per_row(name: str, value: float | Tensor, x: Tensor, rows: int, *, low: float) -> Tensor:
    """A positive number, a scalar tensor or (B,) values as (B,) of the accumulator's dtype."""
    acc = accumulate_type(x)
    if not isinstance(value, Tensor):
        number = _check.number(name, value, low=low)
        if number <= low:
            raise ValueError(f"{name}: expected a number above {low:g}, got {value!r}")
        return torch.full((rows,), number, dtype=acc, device=x.device)
    if value.dim() == 0:
        _check.like(name, value, (), x, "logits")
    else:
        _check.like(name, value, (rows,), x, "logits")
    return value.to(acc).expand(rows)
