r"""Core `moments2`: second moments of rows, by class, without writing the centred rows.

Rows $x_n$ of class $c_n$ (a stable sort of the labels gives `order` and `offsets`, so that each class is a
segment and its sums have one order):

$$\mu_c = \tfrac1{n_c}\sum_{c_n = c} x_n,\qquad
  v_c = \sum_{c_n=c} (x_n-\mu_c)^2,\qquad
  M_c = \sum_{c_n=c} (x_n-\mu_c)(x_n-\mu_c)^\top .$$

Rows are centred on their way into the product's tile, so $x$ is read once and nothing of its size is
written; $M_c$ is symmetric and only its tiles on and above the diagonal are multiplied. Chunks merge by Chan's
formula. Of one class $\Sigma = M/(N - \mathrm{correction})$ is differentiable:
$\mathrm dx = (x-\mu)\,(\mathrm d\Sigma + \mathrm d\Sigma^\top)/(N-\mathrm{correction}) + \mathrm d\mu/N$
(the mean inside $\Sigma$ contributes nothing, the centred rows sum to 0).

Pairs of a Gram matrix: $g_{bk} = \langle F_{b,i_k}, F_{b,j_k}\rangle$ for K index pairs instead of all C x C, with
$\mathrm dF_{b,i} = \sum_{k: i_k=i} \mathrm dg_{bk} F_{b,j_k} + \sum_{k: j_k=i} \mathrm dg_{bk} F_{b,i_k}$.

Pooling: $y_b = \frac1{S\,n_b}\sum_s\sum_{t:\,\mathrm{mask}} h_{sbt}$, $n_b$ the tokens that count; others
are not read. Its gradient is $\mathrm dy_b/(S n_b)$ at each token that counts.

Sources: Chan, Golub, LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances",
1979; gradients by differentiating the sums above.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _check
from .._registry import accumulate_type, reference
from .._route import needs_graph, use_reference

_op = torch.ops.solera


# ---- reference ---------------------------------------------------------------------------------------


def _segments(x: Tensor, order: Tensor | None, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Rows in order, and the class of each."""
    rows = x.to(accumulate_type(x))
    rows = rows if order is None else rows[order]
    place = torch.arange(rows.shape[0], device=x.device)
    return rows, torch.searchsorted(offsets[1:].contiguous(), place, right=True)


@reference("segment_moments")
def segment_moments_reference(x, order, offsets):
    """(means, sums of squares about them) of each segment, (C, D) both; 0 where it is empty."""
    rows, label = _segments(x, order, offsets)
    classes = offsets.shape[0] - 1
    zero = rows.new_zeros(classes, x.shape[1])
    count = (offsets[1:] - offsets[:-1]).clamp_min(1).to(rows.dtype)[:, None]
    mean = zero.index_add(0, label, rows) / count
    return mean, zero.index_add(0, label, (rows - mean[label]).square())


@reference("segment_scatter")
def segment_scatter_reference(x, order, offsets, mean):
    """(C, D, D): each segment's sum of outer products about the given means."""
    rows, label = _segments(x, order, offsets)
    classes = offsets.shape[0] - 1
    d = rows - mean.to(rows.dtype)[label]
    own = label == torch.arange(classes, device=x.device)[:, None]  # (C, N)
    return (torch.where(own[:, :, None], d, 0.0).mT @ d).contiguous()


@reference("pair_dots")
def pair_dots_reference(x, pairs):
    """(B, K) in the accumulator's type: dot products of the rows x[b, i] and x[b, j] of each pair."""
    rows = x.to(accumulate_type(x))
    return (rows[:, pairs[:, 0]] * rows[:, pairs[:, 1]]).sum(-1).contiguous()


@reference("pair_dots_backward")
def _pair_dots_backward(grad, x, pairs):
    rows = x.to(accumulate_type(x))
    g = grad.to(rows.dtype)[:, :, None]
    i, j = pairs[:, 0], pairs[:, 1]
    dx = torch.zeros_like(rows).index_add(1, i, g * rows[:, j]).index_add(1, j, g * rows[:, i])
    return dx.to(x.dtype).contiguous()


@reference("pool_layers")
def pool_layers_reference(h, mask):
    """(B, D) in h's dtype: the mean over layers of the mean over the tokens that count."""
    acc = accumulate_type(h)
    kept = torch.where(mask[:, :, None], h.to(acc), 0.0).sum(2).sum(0)
    count = h.shape[0] * mask.sum(1, keepdim=True).clamp_min(1)
    return (kept / count.clamp_min(1)).to(h.dtype).contiguous()


# ---- autograd ----------------------------------------------------------------------------------------


def _one_segment(x: Tensor) -> Tensor:
    return torch.tensor([0, x.shape[0]], device=x.device)


class _Covariance(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, correction):
        mean = x.mean(0, dtype=accumulate_type(x))
        scale = 1.0 / max(x.shape[0] - correction, 1)
        ctx.scale = scale
        ctx.save_for_backward(x, mean)
        return mean, _op.segment_scatter(x, None, _one_segment(x), mean[None])[0] * scale

    @staticmethod
    def backward(ctx, dmean, dcovariance):
        x, _ = ctx.saved_tensors
        acc = accumulate_type(x)
        rows = x.to(acc)
        d = (dcovariance + dcovariance.mT) * ctx.scale
        dx = (rows - rows.mean(0)) @ d + dmean / max(x.shape[0], 1)
        return dx.to(x.dtype), None


class _PairDots(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, pairs):
        ctx.save_for_backward(x, pairs)
        return _op.pair_dots(x, pairs)

    @staticmethod
    def backward(ctx, grad):
        x, pairs = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _pair_dots_backward(grad, x, pairs), None
        return _op.pair_dots_backward(grad, x, pairs), None


class _PoolLayers(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, mask):
        ctx.save_for_backward(mask)
        ctx.shape = h.shape
        return _op.pool_layers(h, mask)

    @staticmethod
    def backward(ctx, dy):
        (mask,) = ctx.saved_tensors
        count = (ctx.shape[0] * mask.sum(1, keepdim=True)).clamp_min(1)
        share = (dy.to(accumulate_type(dy)) / count).to(dy.dtype)
        return torch.where(mask[:, :, None], share[:, None], 0.0).expand(ctx.shape), None


# ---- public functions --------------------------------------------------------------------------------


def indices(name: str, value: object, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """An int64 tensor of this shape on like's device."""
    if not isinstance(value, Tensor) or value.dtype != torch.int64:
        came = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name}: expected an int64 tensor, got {came}")
    if value.shape != shape or value.device != like.device:
        raise ValueError(
            f"{name}: expected shape {tuple(shape)} on {like.device}, "
            f"got {tuple(value.shape)} on {value.device}"
        )
    return value


def segments(labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """(order, offsets) that make each class a segment, rows in their old order within it."""
    order = torch.sort(labels, stable=True)
    edges = torch.arange(classes + 1, device=labels.device)
    return order.indices, torch.searchsorted(order.values, edges)


def class_moments(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    covariance: bool = True,
    correction: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Counts, means and covariances of every class, in a fixed order of summation.

    $\mu_c = \frac1{n_c}\sum x$, $\Sigma_c = \frac1{n_c - \mathrm{correction}}\sum (x-\mu_c)(x-\mu_c)^\top$ over
    the rows of class c. A class without rows has zeros; one with no more rows than `correction` divides by 1.

    Args:
        features: (N, D), float32, float64, bfloat16 or float16; no gradient flows through them.
        labels: (N,) int64; rows whose label is not in [0, num_classes) belong to no class.
        covariance: False gives the variances (C, D) alone.
        correction: 1 for the unbiased estimate, 0 for the mean.

    Shapes: (N, D), (N,) -> counts (C,) int64, means (C, D), covariances (C, D, D) or variances (C, D), in
    float32 (float64 for float64).

    Raises:
        ValueError, TypeError: naming the argument whose shape, dtype or device does not fit.

    Source: the sums as written; class statistics of SLCA, CAFA and Gaussian naive Bayes.
    """
    x = _check.tensor("features", features, dim=2).detach()
    indices("labels", labels, x.shape[:1], x)
    if not isinstance(num_classes, int) or isinstance(num_classes, bool) or num_classes < 1:
        raise ValueError(f"num_classes: expected a positive int, got {num_classes!r}")
    order, offsets = segments(labels, num_classes)
    count = offsets[1:] - offsets[:-1]
    if use_reference():
        mean, squares = segment_moments_reference(x, order, offsets)
    else:
        mean, squares = _op.segment_moments(x, order, offsets)
    if covariance:
        scatter = segment_scatter_reference if use_reference() else _op.segment_scatter
        squares = scatter(x, order, offsets, mean)
    by = (count - correction).clamp_min(1).to(squares.dtype)
    return count, mean, squares / by.view(-1, *[1] * (squares.dim() - 1))


def covariance(x: Tensor, *, correction: int = 0) -> tuple[Tensor, Tensor]:
    r"""Mean and covariance of rows; x - mean is not written forward.

    Args:
        x: (N, D), float32, float64, bfloat16 or float16.
        correction: 0 divides by N, 1 by N - 1.

    Shapes: (N, D) -> mean (D,), covariance (D, D), in float32 (float64 for float64). Differentiable.

    Raises:
        ValueError, TypeError: naming the argument whose shape or dtype does not fit.

    Source: the definition; gradient in the core's text.
    """
    _check.tensor("x", x, dim=2)
    if use_reference():
        rows = x.to(accumulate_type(x))
        mean = rows.mean(0)
        d = rows - mean
        return mean, d.mT @ d / max(x.shape[0] - correction, 1)
    return _Covariance.apply(x, correction)


def gram_pairs(features: Tensor, pairs: Tensor) -> Tensor:
    r"""Chosen entries of the Gram matrices $F_b F_b^\top$: K dot products a sample instead of C x C.

    Args:
        features: (B, C, *), float32, float64, bfloat16 or float16.
        pairs: (K, 2) int64 channel indices in [0, C).

    Shapes: (B, C, *), (K, 2) -> (B, K) in float32 (float64 for float64). Differentiable in features.

    Raises:
        ValueError, TypeError: naming the argument whose shape, dtype, device or range does not fit (the
            range is looked at on the CPU only).

    Source: Zhou et al., "Instance-Aware Domain Generalization for Face Anti-Spoofing", 2023.
    """
    x = _check.tensor("features", features, min_dim=3).flatten(2)
    indices(
        "pairs", pairs, (pairs.shape[0] if isinstance(pairs, Tensor) and pairs.dim() else 0, 2), x
    )
    if pairs.is_cpu and pairs.numel() and not torch.compiler.is_dynamo_compiling():
        low, high = (int(t) for t in torch.aminmax(pairs))
        if low < 0 or high >= x.shape[1]:
            raise ValueError(f"pairs: expected indices in [0, {x.shape[1]}), got {low} to {high}")
    if use_reference():
        return pair_dots_reference(x, pairs)
    return _PairDots.apply(x, pairs) if needs_graph(x) else _op.pair_dots(x, pairs)


def masked_mean_pool_layers(h: Tensor, mask: Tensor) -> Tensor:
    r"""Sentence embeddings: mean over the tokens that count, then over the layers, in one pass.

    $y_b = \frac1{S\,n_b}\sum_s\sum_{t: m_{bt}} h_{sbt}$; a sentence without tokens gives 0. Tokens outside the mask
    are not read, whatever they hold.

    Args:
        h: (S, B, T, D) hidden states of S layers, float32, float64, bfloat16 or float16.
        mask: (B, T) bool, True for tokens that count.

    Shapes: (S, B, T, D), (B, T) -> (B, D). Differentiable in h.

    Raises:
        ValueError, TypeError: naming the argument whose shape, dtype or device does not fit.

    Source: Huang et al., "WhiteningBERT: An Easy Unsupervised Sentence Embedding Approach", 2021.
    """
    _check.tensor("h", h, dim=4)
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        came = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask: expected a bool tensor, got {came}")
    if mask.shape != h.shape[1:3] or mask.device != h.device:
        raise ValueError(
            f"mask: expected shape {tuple(h.shape[1:3])} on {h.device}, "
            f"got {tuple(mask.shape)} on {mask.device}"
        )
    if use_reference():
        return pool_layers_reference(h, mask)
    return _PoolLayers.apply(h, mask) if needs_graph(h) else _op.pool_layers(h, mask)
