"""Training under sparse masks: updates of the free weights, prune and grow, densities by layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _check
from .._registry import accumulate_type
from . import _lists


def _mask(name: str, mask: Any, like: Tensor) -> Tensor:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        came = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{name}: expected a bool tensor, got {came}")
    if mask.shape != like.shape:
        raise ValueError(
            f"{name}: expected shape {tuple(like.shape)} (that of weight), got {tuple(mask.shape)}"
        )
    if mask.device != like.device:
        raise ValueError(f"{name}: expected device {like.device}, got {mask.device}")
    return mask


def _listed(name: str, value: Any, count: int | None) -> list:
    if isinstance(value, Tensor):
        value = [value]
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise TypeError(f"{name}: expected a tensor or a list of them, got {type(value).__name__}")
    if count is not None and len(value) != count:
        raise ValueError(f"{name}: expected {count} tensor(s) like weight, got {len(value)}")
    return list(value)


@torch.no_grad()
def masked_update_(weight: Any, grad: Any, mask: Any, lr: float, *, frozen: Any = None) -> None:
    r"""A step on the weights a mask frees: $W \leftarrow W - \mathrm{lr}\,g\odot M\odot(1 - F)$, in place.

    Args:
        weight, grad: tensors, or lists of them; grad may be of another dtype.
        mask: M, bool: the task's own connections.
        lr: a number.
        frozen: F, bool: connections of earlier tasks (the union of their masks), which stay as they are.

    Shapes: any S each. A composition. A gradient that is not finite outside the mask does no harm.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Yildirim et al., "Continual Learning with Dynamic Sparse Training", 2023.
    """
    weights = _listed("weight", weight, None)
    grads, masks = _listed("grad", grad, len(weights)), _listed("mask", mask, len(weights))
    fixed = [None] * len(weights) if frozen is None else _listed("frozen", frozen, len(weights))
    lr = _check.number("lr", lr)
    for w, g, m, f in zip(weights, grads, masks, fixed):
        _check.tensor("weight", w)
        _check.tensor("grad", g)
        _check.like("grad", g, tuple(w.shape), g if g.dtype == torch.float64 else w, "weight")
        free = _mask("mask", m, w)
        if f is not None:
            free = free & ~_mask("frozen", f, w)
        _lists.refuse_expanded("weight", w)
        # Rounded once, also where the gradient is wider than the weight.
        acc = torch.promote_types(accumulate_type(w), g.dtype)
        w.copy_(torch.where(free, w.to(acc) - lr * g.to(acc), w.to(acc)))


def _ranks(last: Tensor, key: Tensor) -> Tensor:
    """The place of each element in increasing order of (last, key), ties by index: whatever the keys, NaN and
    infinities among them, those that come last come after the others.
    """
    order = torch.argsort(key, stable=True)
    order = order[torch.argsort(last[order].byte(), stable=True)]
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(key), device=key.device))


@torch.no_grad()
def prune_grow_(weight: Tensor, mask: Tensor, score: Tensor | None, fraction: float) -> Tensor:
    r"""One round of dynamic sparse training, in place: the weakest connections for as many new ones.

    Of the n connections in the mask the $k = \lfloor\mathrm{fraction}\cdot n\rfloor$ of least |w| go, and k of those
    outside come in, the ones of largest score (or all there are). Weights that go or come are 0. NaN is the largest |w|
    and the least score.

    Args:
        weight: W, written.
        mask: bool, written: the same number of connections before and after.
        score: like weight, say |gradient| (RigL). None grows at random, from torch's generator (SET).
        fraction: in [0, 1].

    Shapes: S, S, S -> (), k as an int64 tensor on weight's device: nothing is read on the host. A composition (sorts).

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Yildirim et al., "Continual Learning with Dynamic Sparse Training", 2023; Evci et al., "Rigging the
    Lottery", 2020; Mocanu et al., 2018 (random growth).
    """
    _check.tensor("weight", weight)
    _mask("mask", mask, weight)
    for name, t in (("weight", weight), ("mask", mask)):
        _lists.refuse_expanded(name, t)
    fraction = _check.number("fraction", fraction, low=0.0, high=1.0)
    if score is None:
        score = torch.rand(weight.shape, device=weight.device)
    else:
        _check.tensor("score", score)
        _check.like("score", score, tuple(weight.shape), weight, "weight")
    held = mask.reshape(-1)
    count = held.sum()
    # A thousandth of a unit, so that 0.3 of 10 is 3.
    k = torch.floor(count.double() * fraction + 1e-3).long()
    k = torch.minimum(k, (held.numel() - count))
    pruned = _ranks(~held, weight.reshape(-1).abs()) < k
    grown = _ranks(held, -score.reshape(-1)) < k
    moved = (pruned | grown).view(mask.shape)
    mask.logical_xor_(moved)
    weight.masked_fill_(moved, 0.0)
    return k


def erk_density(shapes: Sequence[Sequence[int]], density: float) -> list[float]:
    r"""Densities of layers by the Erdős–Rényi-kernel rule, which leaves small layers denser.

    $d_l = \min(1, \epsilon\,\frac{\sum_i n_i}{\prod_i n_i})$ over the sizes n of a weight (for a convolution
    $(C_{in} + C_{out} + k_h + k_w)/(C_{in} C_{out} k_h k_w)$), with $\epsilon$ such that the whole has the
    density asked for.

    Args:
        shapes: of the weights, as lists or tuples of sizes.
        density: of all weights together, in [0, 1].

    Shapes: L shapes -> L numbers.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Evci et al., "Rigging the Lottery", 2020, as used by Yildirim et al., 2023.
    """
    density = _check.number("density", density, low=0.0, high=1.0)
    sizes = [tuple(int(n) for n in shape) for shape in shapes]
    for i, shape in enumerate(sizes):
        if not shape or min(shape) < 1:
            raise ValueError(f"shapes[{i}]: expected sizes of at least 1, got {shape}")
    raw = [sum(shape) / math.prod(shape) for shape in sizes]
    numbers = [math.prod(shape) for shape in sizes]
    full: set[int] = set()
    while True:
        rest = [i for i in range(len(sizes)) if i not in full]
        wanted = density * sum(numbers) - sum(numbers[i] for i in full)
        epsilon = wanted / sum(raw[i] * numbers[i] for i in rest) if rest else 0.0
        over = {i for i in rest if epsilon * raw[i] > 1.0}
        if not over:
            return [1.0 if i in full else max(0.0, epsilon * raw[i]) for i in range(len(sizes))]
        full |= over
