r"""Masks by importance: merging with a pretrained weight entry by entry, and trimming by magnitude.

`importance_mask`, `masked_lerp_`, `importance_merge` (SPIDER) are compositions of torch's own ops with no
synchronisation; `prune_rewind` trims at an exact percentile from core `abs_quantile`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _check
from . import _lists
from .abs_quantile import abs_quantile
from .lincomb import Weights, _gather_with_care, _is_whole


def _standard_sigmoid(x: Tensor, correction: float) -> Tensor:
    """The sigmoid of x standardised over the whole tensor; 1/2 everywhere where x does not vary."""
    spread, mean = torch.var_mean(x, correction=correction)
    spread = torch.where(spread > 0, spread.sqrt(), 1)
    return torch.sigmoid((x - mean) / spread)


def importance_mask(weight: Tensor, gradient_sum: Tensor, *, correction: float = 1) -> Tensor:
    r"""SPIDER's mask of the entries that matter more downstream than they did in pretraining.

    $I_0 = \sigma(z(|W_0|))$, $I_g = \sigma(z(|\sum_t g_t|))$ with $z$ standardising over the whole tensor;
    $r = [I_0 < I_g]\, I_g / (I_0 + I_g)$; $M = \min(1, r / \mathrm{mean}(r[r \ne 0]))$.

    Args:
        weight: $W_0$, the pretrained weight.
        gradient_sum: the sum of its gradients over the steps taken.
        correction: of the standard deviation: 1 divides by n - 1, 0 by n.

    Shapes: any S, the same for both -> S, in float32 (float64 for float64). A tensor of one element gives 0.

    Differentiable by autograd (the comparison is constant). No synchronisation with the host.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit.

    Source: Huang et al., "Learn from Downstream and Be Yourself in Multimodal Large Language Model
    Fine-Tuning", 2024.
    """
    _check.tensor("weight", weight)
    _lists.match("gradient_sum", gradient_sum, "weight", weight)
    correction = _check.number("correction", correction, low=0)
    wide = torch.float64 in (weight.dtype, gradient_sum.dtype)
    acc = torch.float64 if wide else torch.float32
    if weight.numel() < 2:  # nothing to compare with
        return torch.zeros(weight.shape, dtype=acc, device=weight.device)
    before = _standard_sigmoid(weight.to(acc).abs(), correction)
    after = _standard_sigmoid(gradient_sum.to(acc).abs(), correction)
    ratio = torch.where(before < after, after / (before + after), 0)
    mean = ratio.sum() / (ratio != 0).sum().clamp(min=1)
    return (ratio / torch.where(mean > 0, mean, 1)).clamp(max=1)


def masked_lerp_(weight: Tensor, anchor: Tensor, mask: Tensor) -> Tensor:
    r"""$W \leftarrow (1 - M) \odot W_0 + M \odot W$ in place, entry by entry; returns `weight`.

    Args:
        weight: $W$, written. Outside autograd, like an optimiser's step.
        anchor: $W_0$.
        mask: $M$, floating-point or boolean. Where it is 0 the anchor is copied, where it is 1 W is left as it
            is, bit for bit.

    Shapes: any S, the same for all. Computed in float32, float64 for float64.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit, a weight that cannot be written.
    """
    _check.tensor("weight", weight)
    _lists.match("anchor", anchor, "weight", weight)
    if isinstance(mask, Tensor) and mask.dtype == torch.bool:
        mask = mask.to(torch.float32)
    _lists.match("mask", mask, "weight", weight)
    _lists.refuse_expanded("weight", weight)
    acc = torch.float64 if weight.dtype == torch.float64 else torch.float32
    with torch.no_grad():
        w, start, m = weight.to(acc), anchor.to(acc), mask.to(acc)
        weight.copy_(torch.where(m == 1, w, torch.where(m == 0, start, (1 - m) * start + m * w)))
    return weight


def importance_merge(
    base: Weights, tuned: Weights, gradient_sum: Weights, *, correction: float = 1
) -> Any:
    r"""SPIDER: keep what fine-tuning changed where it mattered, the pretrained weight elsewhere.

    $\mathrm{out} = (1 - M) \odot W_0 + M \odot W$, $M$ = `importance_mask(base, gradient_sum)`, tensor by tensor.
    The paper does so after every step, by `importance_mask` and `masked_lerp_`.

    Args:
        base: $W_0$: a tensor, list or state dict.
        tuned: $W$, like it.
        gradient_sum: the sum of the gradients, like it.
        correction: as in `importance_mask`.

    Shapes: S -> S; lists and state dicts -> the like, in the promoted dtype of base and tuned. Integer entries
    of state dicts must be equal in base and tuned; gradient_sum may leave them out. A composition.

    Differentiable in tuned and base through the formula.

    Raises:
        ValueError, TypeError: naming the argument.

    Source: Huang et al., "Learn from Downstream and Be Yourself in Multimodal Large Language Model
    Fine-Tuning", 2024.
    """
    kind, keys, whole, flat = _gather_with_care([tuned], base)
    sums = _lists.entries("gradient_sum", gradient_sum, kind)
    sums = {key: t for key, t in sums.items() if key in keys or not _is_whole(t)}
    _lists.match_keys("gradient_sum", sums, "base", keys, kind)
    found = {}
    for i, key in enumerate(keys):
        w, start = flat[i], flat[len(keys) + i]
        _lists.match(
            _lists.spelled("gradient_sum", kind, key),
            sums[key],
            _lists.spelled("base", kind, key),
            start,
        )
        mask = importance_mask(start, sums[key], correction=correction)
        acc = torch.promote_types(mask.dtype, torch.promote_types(w.dtype, start.dtype))
        out = (1 - mask) * start.to(acc) + mask * w.to(acc)
        found[key] = out.to(torch.promote_types(w.dtype, start.dtype))
    if kind == "tensor":
        return found[0]
    if kind == "list":
        return [found[key] for key in keys]
    return {key: whole[key].clone() if key in whole else found[key] for key in base}


def prune_rewind(activation: Tensor, source: Tensor | None = None, *, percentile: float) -> Tensor:
    r"""SiSTA's sampling: what is below a percentile of the magnitudes becomes zero, or what the source had.

    $\mathrm{out} = a$ where $|a| \ge t$, else 0 ("prune-zero") or the source generator's activation
    ("prune-rewind"), $t$ the exact value with `int(percentile * n)` of the $n$ magnitudes below it in order.

    Args:
        activation: of the adapted generator.
        source: of the source generator for the same input; None for zeros.
        percentile: in [0, 1]: 0 keeps all, 1 nothing.

    Shapes: any S -> S. Differentiable in both: the threshold is held constant.

    Raises:
        ValueError, TypeError: naming the argument.

    Source: Thopalli et al., "Target-Aware Generative Augmentations for Single-Shot Adaptation", 2023 (from its
    description: the sampling's code was not compared with).
    """
    _check.tensor("activation", activation)
    if source is not None:
        _lists.match("source", source, "activation", activation)
    percentile = _check.number("percentile", percentile, low=0, high=1)
    n = activation.numel()
    rank = n - int(percentile * n)
    low = abs_quantile([activation], [], 1, [rank])[0, 0]
    kept = ~(activation.detach().abs() < low)
    return torch.where(kept, activation, torch.zeros_like(activation) if source is None else source)
