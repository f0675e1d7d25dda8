"""Ensembles of text prompts and descriptions: biases, weights, merged heads, ragged classes. Over core `prompts`."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _check
from .._registry import accumulate_type
from .._route import readable, without_autocast
from ..norm import l2_normalize
from ..norm.moments2 import indices
from .prompts import check_texts

REDUCE = ("mean", "max", "lse")
WEIGHTS = ("raw", "softmax", "select")


def _mean_vector(name: str, value: object, texts: Tensor) -> Tensor:
    t = _check.tensor(name, value, min_dim=1)
    if t.dim() > 2 or t.shape[-1] != texts.shape[2] or t.numel() == 0:
        raise ValueError(
            f"{name}: expected shape ({texts.shape[2]},) or (n, {texts.shape[2]}), n at least 1, "
            f"to go with texts of shape {tuple(texts.shape)}, got {tuple(t.shape)}"
        )
    if t.device != texts.device:
        raise ValueError(f"{name}: expected device {texts.device} (that of texts), got {t.device}")
    acc = accumulate_type(texts)
    return t.mean(0, dtype=acc) if t.dim() == 2 else t.to(acc)


def prompt_bias(
    texts: Tensor, test: Tensor | None = None, pretrain: Tensor | None = None
) -> Tensor:
    r"""The debiasing term of `prompt_scores`: $b_{pc} = -\langle m, t_{pc}\rangle$, m the mean image.

    m is the mean over the test images, over pretraining images, or (both given) the mean of the two means: by linearity
    $\operatorname{mean}_i \langle x_i, t\rangle = \langle \bar x, t\rangle$, one matrix-vector product in place of N
    P C logits.

    Args:
        texts: (P, C, D), float32, float64, bfloat16 or float16.
        test, pretrain: images (n, D), or their mean (D,); at least one.

    Shapes: (P, C, D) -> (P, C) in float32 (float64 for float64). Differentiable.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Allingham et al., "A Simple Zero-shot Prompt Weighting Technique to Improve Prompt Ensembling in Text-Image
    Models", 2023: half of each mean where both are taken; the product by linearity. Composition.
    """
    t = check_texts(texts)
    given = [("test", test), ("pretrain", pretrain)]
    means = [_mean_vector(name, value, t) for name, value in given if value is not None]
    if not means:
        raise ValueError("test: expected test images, pretraining images or both, got neither")
    mean = means[0] if len(means) == 1 else 0.5 * (means[0] + means[1])
    return -(t.to(mean.dtype) @ mean)


def prompt_weights(scores: Tensor, kind: str = "softmax", tau: float = 0.5) -> Tensor:
    r"""Weights of prompts from their scores a.

    raw: $a_p$. softmax: $e^{a_p} / \sum_q e^{a_q}$. select: 1 where $(a_p - \operatorname{med} a) /
    \operatorname{MAD} a > \tau$ with $\operatorname{MAD} a = \operatorname{med}|a - \operatorname{med} a|$, 0
    elsewhere: outliers on the high side only; if none is, the best prompt alone (a choice of Solera).

    Args:
        scores: (P,), P at least 1; float32, float64, bfloat16 or float16.
        kind: "raw", "softmax" or "select". tau: of "select"; finite.

    Shapes: (P,) -> (P,). Differentiable but for "select". The median of an even count is the mean of the middle two.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: as `prompt_bias`. Composition.
    """
    a = _check.tensor("scores", scores, dim=1)
    if a.shape[0] == 0:
        raise ValueError("scores: expected at least one prompt")
    _check.choice("kind", kind, WEIGHTS)
    tau = _check.number("tau", tau)
    if kind == "raw":
        return a
    if kind == "softmax":
        return a.softmax(0)
    a = a.detach().to(accumulate_type(a))
    gap = a - a.quantile(0.5)
    # Compared as a product: without spread nothing lies above it but what is above the median.
    chosen = gap > tau * gap.abs().quantile(0.5)
    best = torch.arange(a.shape[0], device=a.device) == a.argmax()
    return torch.where(chosen.any(), chosen, best).to(scores.dtype)


def merge_text_heads(texts: Tensor, weights: Tensor | None = None) -> Tensor:
    r"""P text heads as one classifier: $h_c = \frac1P\sum_p w_p\,t_{pc}$.

    $\langle x, h_c\rangle$ is the weighted mean of the prompts' logits, so no P-fold logits are needed to predict.

    Args:
        texts: (P, C, D); weights: (P,), 1 for all if None.

    Shapes: (P, C, D), (P,) -> (C, D) of texts' dtype. Differentiable.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: as `prompt_bias` (the prediction by linearity). Composition.
    """
    t = check_texts(texts)
    if t.shape[0] == 0:
        raise ValueError("texts: expected at least one prompt")
    acc = accumulate_type(t)
    if weights is None:
        return t.mean(0, dtype=acc).to(t.dtype)
    _check.like("weights", weights, t.shape[:1], t, "texts")
    with without_autocast(t):
        merged = (weights.to(acc) / t.shape[0]) @ t.to(acc).flatten(1)
    return merged.view(t.shape[1:]).to(t.dtype)


def _classes(offsets: Tensor, count: int) -> Tensor:
    """The class of each description."""
    place = torch.arange(count, device=offsets.device)
    return torch.searchsorted(offsets[1:].contiguous(), place, right=True)


def _offsets(offsets: object, texts: Tensor) -> Tensor:
    if not isinstance(offsets, Tensor) or offsets.dim() != 1 or offsets.shape[0] < 2:
        raise ValueError(f"offsets: expected an int64 tensor (C + 1,), got {_check._came(offsets)}")
    indices("offsets", offsets, (offsets.shape[0],), texts)
    if readable(offsets):
        steps = offsets.diff()
        if offsets[0] != 0 or offsets[-1] != texts.shape[0] or bool((steps < 1).any()):
            raise ValueError(
                f"offsets: expected numbers that rise from 0 to {texts.shape[0]} (one description a class "
                f"or more), got {offsets.tolist()[:8]}"
            )
    return offsets


def segment_similarity(
    x: Tensor, texts: Tensor, offsets: Tensor, reduce: str = "mean", *, normalize: bool = True
) -> Tensor:
    r"""Similarity of images to classes that are described by several texts each, as many as there are.

    $s_{bc} = \operatorname{reduce}_{j\in\mathcal D_c}\langle \hat x_b, \hat t_j\rangle$, the descriptions of class c
    being rows offsets[c] to offsets[c + 1] of texts. The mean is one averaged row a class, so its product is C wide,
    not M; lse is $\log\sum_j e^{\langle\hat x, \hat t_j\rangle}$.

    Args:
        x: (B, D); texts: (M, D) of x's dtype. float32, float64, bfloat16 or float16.
        offsets: (C + 1,) int64, rising from 0 to M; each class has at least one description (looked at on the CPU).
        reduce: "mean", "max" or "lse".
        normalize: bring the rows of both to length one first.

    Shapes: (B, D), (M, D), (C + 1,) -> (B, C) of x's dtype. Differentiable in x and texts (of equal maxima each has its
    share).

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Menon, Vondrick, "Visual Classification via Description from Large Language Models", 2023; Ma et al., "Does
    VLM Classification Benefit from LLM Description Semantics?", 2025. Composition.
    """
    _check.tensor("x", x, dim=2)
    _check.tensor("texts", texts, dim=2)
    _check.like("texts", texts, (texts.shape[0], x.shape[1]), x)
    _check.same_dtype("texts", texts, x)
    offsets = _offsets(offsets, texts)
    _check.choice("reduce", reduce, REDUCE)
    acc, classes = accumulate_type(x), offsets.shape[0] - 1
    if normalize:
        x, texts = l2_normalize(x), l2_normalize(texts)
    label = _classes(offsets, texts.shape[0])
    if reduce == "mean":
        count = offsets.diff().to(acc)[:, None]
        zero = torch.zeros(classes, x.shape[1], dtype=acc, device=x.device)
        heads = zero.index_add(0, label, texts.to(acc)) / count
        return x @ heads.to(x.dtype).mT
    s = (x @ texts.mT).to(acc)
    spread = label.expand(s.shape)
    low = torch.full((s.shape[0], classes), float("-inf"), dtype=acc, device=s.device)
    top = low.scatter_reduce(1, spread, s if reduce == "max" else s.detach(), "amax")
    if reduce == "max":
        return top.to(x.dtype)
    shifted = (s - top.gather(1, spread)).exp()
    total = torch.zeros_like(top).scatter_add(1, spread, shifted)
    return (top + total.log()).to(x.dtype)


def select_descriptions(
    images: Tensor,
    labels: Tensor,
    texts: Tensor,
    offsets: Tensor,
    count: int,
    neighbours: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""The `count` descriptions of each class that separate its images best from its neighbours'.

    A description's value is the mean similarity to the images of its own class less that to the images of the class's
    neighbours: $v_j = \operatorname{mean}_{y_b = c}\langle\hat x_b, \hat t_j\rangle -
    \operatorname{mean}_{y_b\in\mathcal N_c}\langle\hat x_b, \hat t_j\rangle$.

    Args:
        images: (B, D), a small selection set in which every class occurs; labels: (B,) int64 in [0, C).
        texts, offsets: as `segment_similarity`.
        count: descriptions kept a class; a class with fewer keeps all.
        neighbours: (C, n) int64, the classes to be told apart from each class (its own is left out); None for all
            others.

    Shapes: -> kept (M',) int64 rows of texts in their order, offsets (C + 1,) of `texts[kept]`. No gradient.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Ma et al., "Does VLM Classification Benefit from LLM Description Semantics?", 2025; the score is derived
    from the paper's description (own-class similarity less the neighbours'). Composition.
    """
    _check.tensor("images", images, dim=2)
    _check.tensor("texts", texts, dim=2)
    _check.like("texts", texts, (texts.shape[0], images.shape[1]), images, "images")
    offsets = _offsets(offsets, texts)
    indices("labels", labels, images.shape[:1], images)
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"count: expected a positive int, got {count!r}")
    classes = offsets.shape[0] - 1
    with torch.no_grad():
        acc = accumulate_type(images)
        x, t = l2_normalize(images.to(acc)), l2_normalize(texts.to(acc))
        own = torch.nn.functional.one_hot(labels, classes).to(acc)
        sizes = own.sum(0)
        sums = (
            own.mT @ x
        )  # (C, D): similarities are linear, so sums of images serve for all of them
        label = _classes(offsets, texts.shape[0])
        if neighbours is None:
            other = sums.sum(0) - sums
            others = sizes.sum() - sizes
        else:
            wide = neighbours.shape[-1:] if isinstance(neighbours, Tensor) else (0,)
            indices("neighbours", neighbours, (classes, *wide), images)
            beside = torch.zeros(classes, classes, dtype=acc, device=x.device)
            beside.scatter_(1, neighbours, 1.0).fill_diagonal_(0.0)
            other, others = beside @ sums, beside @ sizes
        gap = sums / sizes.clamp_min(1)[:, None] - other / others.clamp_min(1)[:, None]
        value = (t * gap[label]).sum(1)
        by_value = torch.sort(value, descending=True, stable=True).indices
        order = by_value[torch.sort(label[by_value], stable=True).indices]
        rank = torch.arange(len(order), device=x.device) - offsets[label[order]]
        kept = order[rank < count].sort().values
        sizes_kept = offsets.diff().clamp_max(count)
        return kept, torch.cat([offsets[:1], sizes_kept.cumsum(0)])
