r"""Core `model_stock`: K models around a base, drawn to it by the angle between them, each byte read once.

$$\mathrm{out} = b + \frac{t}{K}\sum_k (w_k - b),\qquad t = \frac{K\cos\theta}{1 + (K - 1)\cos\theta},$$

the cosine from the dots $G_{kj} = \langle w_k - b, w_j - b\rangle$ of core `gram`. The pass that takes them leaves
the sum of the differences behind, so that the second one reads that and the base instead of the K models.

Backward is that of `gram` and of `lincomb` with the coefficients t / K: the op has none of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._registry import reference
from ._span import Span, unit_gram
from .gram import gram_reference
from .lincomb import Weights, _refuse_mismatch, lincomb_reference
from .row_lincomb import row_lincomb_reference


def stock_ratio(gram: Tensor) -> Tensor:
    """t (R,) of dots (R, K, K); a zero vector's cosines are 0."""
    count = gram.shape[-1]
    cosines, _, _ = unit_gram(gram)
    cos = cosines.tril(-1).sum((1, 2)) * (2 / (count * (count - 1)))
    cos = cos.clamp(0, 1)
    return count * cos / (1 + (count - 1) * cos)


def stock_coefficients(gram: Tensor) -> Tensor:
    """What `lincomb` merges with: t / K for each model and row, (K, R)."""
    count = gram.shape[-1]
    return (stock_ratio(gram) / count).expand(count, -1).contiguous()


def given_dots(dots: Tensor, tensors: Sequence[Tensor], models: int, by_row: bool) -> Tensor:
    """A copy of the op's argument, checked as the kernel does."""
    like = tensors[: len(tensors) // models]
    rows = sum(t.shape[0] for t in like) if by_row else len(like)
    if dots.dtype != torch.float64 or dots.shape != (rows, models, models):
        raise RuntimeError(f"model_stock: expected {rows} float64 matrices of dots")
    return dots.clone(memory_format=torch.contiguous_format)


# ---- reference ---------------------------------------------------------------------------------------


@reference("model_stock")
def _model_stock(tensors, base, models, by_row, dots=None):
    _refuse_mismatch([*tensors, *base], tensors[: len(tensors) // models])
    if dots is None:
        dots = gram_reference(tensors, base, models, by_row).contiguous()
    else:
        dots = given_dots(dots, tensors, models, by_row)
    combine = row_lincomb_reference if by_row else lincomb_reference
    merged = combine(tensors, stock_coefficients(dots), base, None)
    return [t.contiguous() for t in merged], dots


def stock_part(base: Tensor, tensors: Sequence[Tensor], dots: Tensor) -> Tensor:
    """A part of the merged tensor: `dots` (1, K, K) are those of all of it."""
    merged, _ = torch.ops.solera.model_stock(list(tensors), [base], len(tensors), False, dots)
    return merged[0]


# ---- public function ---------------------------------------------------------------------------------


def model_stock(
    base: Weights, tensors: Sequence[Weights], *, dim: int | None = None
) -> tuple[Any, Any]:
    r"""Model Stock: the average of fine-tuned models, drawn toward the pretrained one by their angle.

    $$\mathrm{out} = t\,\frac1K\sum_k w_k + (1 - t)\,b,\qquad
      t = \frac{K\cos\theta}{1 + (K - 1)\cos\theta},$$

    with $\cos\theta$ the cosine between $w_1 - b$ and $w_2 - b$, for K > 2 the mean over all pairs, clamped to
    [0, 1]: fine-tuned models that point apart leave the base (t = 0). Where a difference is zero its cosines
    are 0.

    Args:
        base: the pretrained tensor, list of tensors or state dict.
        tensors: K >= 2 fine-tuned ones like it.
        dim: None for one ratio a tensor (the paper's layers), else one for each index along `dim` (0: each filter; a
            tensor of fewer than two dimensions is one).

    Shapes: S, K of S -> (S, ()); with dim (S, (rows,)). Lists and state dicts -> (the same, (L,)), with dim a list or
    dict of (rows,). Ratios are float64. Differentiable in all tensors.

    Raises:
        ValueError, TypeError: naming the argument; fewer than two models.

    Source: Jang, Yun, Han, "Model Stock: All we need is just a few fine-tuned models", 2024; the mean over pairs as
    mergekit takes it.
    """
    if base is None:
        raise TypeError("base: expected a tensor, a list of tensors or a state dict, got None")
    if isinstance(tensors, Sequence) and len(tensors) < 2:
        raise ValueError(f"tensors: expected at least two models, got {len(tensors)}")
    span = Span(tensors, base, dim, stock=True)
    ratio = stock_ratio(span.gram)
    merged = span.combine((ratio / len(tensors))[:, None].expand(-1, len(tensors)))
    return merged, span.per_tensor(ratio)
