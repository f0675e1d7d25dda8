"""What embedding models that are merged are trained and compared with: pooling, contrastive losses, mixed pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _check
from .._registry import accumulate_type
from ..norm import info_nce, l2_normalize, masked_mean_pool_layers


def masked_mean_pool(x: Tensor, mask: Tensor, *, normalize: bool = False) -> Tensor:
    r"""Mean over the tokens that count: $h_b = \sum_t m_{bt} x_{bt} / \sum_t m_{bt}$, of unit length if asked.

    Args:
        x: (B, T, D), float32, float64, bfloat16 or float16. mask: (B, T), bool or 0 and 1 of any dtype; tokens outside
            are not read. A row without tokens gives 0.

    Shapes: (B, T, D), (B, T) -> (B, D). Differentiable in x. It is `norm.masked_mean_pool_layers` for one layer (one
    kernel each way), then `norm.l2_normalize`.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Zhao et al., "KaLM-Embedding-V2: Superior Training Techniques and Data Inspire A Versatile Embedding Model",
    2025.
    """
    _check.tensor("x", x, dim=3)
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask: expected a torch.Tensor, got {type(mask).__name__}")
    if mask.shape != x.shape[:2] or mask.device != x.device:
        raise ValueError(
            f"mask: expected shape {tuple(x.shape[:2])} on {x.device}, got {tuple(mask.shape)} on {mask.device}"
        )
    pooled = masked_mean_pool_layers(x[None], mask if mask.dtype == torch.bool else mask != 0)
    return l2_normalize(pooled) if normalize else pooled


def focal_info_nce(
    q: Tensor,
    p: Tensor,
    negatives: Tensor | None = None,
    tau: float = 0.05,
    gamma: float = 0.5,
    *,
    reduction: str = "mean",
) -> Tensor:
    r"""InfoNCE that looks away from what is solved: $(1 - \pi_b)^\gamma \cdot (-\log \pi_b)$, $\pi_b$ the positive's
    softmax probability.

    Candidates of row b: all rows of p (its own is the positive) and the negatives; similarities are cosines over tau.

    Args:
        q, p: (B, d) queries and positives of one dtype.
        negatives: None; (M, d), shared by all queries; or (B, M, d), each query's own hard negatives.
        tau: positive. gamma: not negative; 0 is InfoNCE.
        reduction: "mean" or "none".

    Shapes: (B, d), (B, d) -> () or (B,). Differentiable in q, p and negatives, also through the factor. A composition
    over `norm.info_nce` (its similarities are walked in chunks and not kept).

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Zhao et al., "KaLM-Embedding-V2: Superior Training Techniques and Data Inspire A Versatile Embedding Model",
    2025 (in words there: a focal-style weight; this form is derived from Lin et al., "Focal loss for dense object
    detection", 2017).
    """
    _check.tensor("q", q, dim=2)
    _check.tensor("p", p, dim=2)
    _check.like("p", p, tuple(q.shape), q, "q")
    tau = _check.number("tau", tau, low=0.0)
    if tau == 0.0:
        raise ValueError("tau: expected a positive number, got 0")
    gamma = _check.number("gamma", gamma, low=0.0)
    _check.choice("reduction", reduction, ("mean", "none"))
    own = negatives is not None and isinstance(negatives, Tensor) and negatives.dim() == 3
    loss = info_nce(
        q, p, temperature=tau, negatives=None if own else negatives, reduction="none"
    ).to(accumulate_type(q))
    if own:
        assert negatives is not None
        _check.like("negatives", negatives, (q.shape[0], negatives.shape[1], q.shape[1]), q, "q")
        a, b, n = (l2_normalize(t.to(loss.dtype)) for t in (q, p, negatives))
        beside = torch.einsum("bd,bmd->bm", a, n) / tau - (a * b).sum(1, keepdim=True) / tau
        loss = torch.logaddexp(loss, beside.logsumexp(1))
    losses = (-torch.expm1(-loss)) ** gamma * loss if gamma else loss
    return (losses.mean() if reduction == "mean" else losses).to(q.dtype)


def mix_negatives(negatives: Tensor, weights: Tensor) -> Tensor:
    r"""Harder negatives made of hard ones: $\mathrm{normalize}(\sum_m a_{bjm} n_{bm})$.

    Args:
        negatives: (B, M, d). weights: (B, J, M), or (J, M) for all queries: convex, as from a softmax of similarities.

    Shapes: -> (B, J, d), of unit length. Differentiable in both. A composition.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Zhao et al., "KaLM-Embedding-V2: Superior Training Techniques and Data Inspire A Versatile Embedding Model",
    2025 (in words there; the form is that of Kalantidis et al., "Hard negative mixing for contrastive learning", 2020).
    """
    n = _check.tensor("negatives", negatives, dim=3)
    a = _check.tensor("weights", weights, min_dim=2)
    shape = (n.shape[0], a.shape[-2], n.shape[1]) if a.dim() == 3 else (a.shape[-2], n.shape[1])
    _check.like("weights", a, shape, n, "negatives")
    return l2_normalize(torch.matmul(a.to(n.dtype), n))


def mix_pairs(x: Tensor, permutation: Tensor, share: float | Tensor) -> Tensor:
    r"""Each sample mixed with another of the batch: $\lambda_b x_b + (1 - \lambda_b) x_{\pi(b)}$.

    Inputs, features, embeddings, pair labels or soft labels alike; with a share for each sample it also mixes a
    teacher's labels with hard ones by confidence (`mix_pairs(torch.cat([teacher, hard]), order, share)[:B]`).

    Args:
        x: (B, ...). permutation: (B,) int64. share: a number in [0, 1] or (B,).

    Shapes: (B, *S) -> (B, *S). Differentiable in x and share. A composition.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Venkataramanan et al., "It Takes Two to Tango: Mixup for Deep Metric Learning", 2022.
    """
    _check.tensor("x", x, min_dim=1)
    if not isinstance(permutation, Tensor) or permutation.dtype != torch.int64:
        raise TypeError(
            f"permutation: expected an int64 tensor, got {getattr(permutation, 'dtype', permutation)}"
        )
    if permutation.shape != x.shape[:1] or permutation.device != x.device:
        raise ValueError(
            f"permutation: expected shape {tuple(x.shape[:1])} on {x.device}, got "
            f"{tuple(permutation.shape)} on {permutation.device}"
        )
    if isinstance(share, Tensor):
        _check.tensor("share", share)
        if share.dim() > 1 or (share.dim() == 1 and share.shape != x.shape[:1]):
            raise ValueError(
                f"share: expected a number or shape ({x.shape[0]},), got {tuple(share.shape)}"
            )
        if share.dim():
            share = share.view(-1, *(1,) * (x.dim() - 1))
    else:
        share = _check.number("share", share, low=0.0, high=1.0)
    acc = accumulate_type(x)
    mine, other = x.to(acc), x[permutation].to(acc)
    return (share * mine + (1 - share) * other).to(x.dtype)


def pairwise_cosine_diversity(embeddings: Tensor) -> Tensor:
    r"""One minus the mean cosine of different pairs: $1 - (\|\sum_i e_i\|^2 - n)/(n(n - 1))$ on unit vectors.

    The n x n cosines are never formed.

    Args:
        embeddings: (..., n, d), n at least 2, float32, float64, bfloat16 or float16.

    Shapes: (..., n, d) -> (...). Differentiable. A composition over `norm.l2_normalize`. Zero vectors count as
    orthogonal to all: $\sum_i \|e_i\|^2$ stands where the formula has n.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Cideron et al., "Diversity-Rewarded CFG Distillation", 2025.
    """
    x = _check.tensor("embeddings", embeddings, min_dim=2)
    n = x.shape[-2]
    if n < 2:
        raise ValueError(f"embeddings: expected at least 2 vectors, got {n}")
    e = l2_normalize(x.to(accumulate_type(x)))
    same = e.square().sum((-1, -2))
    return (1 - (e.sum(-2).square().sum(-1) - same) / (n * (n - 1))).to(x.dtype)
