"""Small mixtures and selections that papers on weights ask for: compositions over the cores."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import _check
from .lincomb import lincomb


def mix_logprobs(
    g: Tensor,
    h: Tensor,
    alpha: float | Tensor,
    scale_g: float = 1.0,
    scale_h: float = 1.0,
) -> Tensor:
    r"""Log-probabilities of an accurate and a robust classifier, mixed: adaptive smoothing.

    $\log\bigl((1-\alpha)\,\mathrm{softmax}(s_g\,g) + \alpha\,\mathrm{softmax}(s_h\,h)\bigr)$, in a form that stays
    finite where probabilities underflow. With u = dout / mix: $\mathrm{d}g = s_g(1-\alpha)p(u - \langle u, p\rangle)$,
    $\mathrm{d}h = s_h\alpha q(u - \langle u, q\rangle)$, $\mathrm{d}\alpha = \langle u, q - p\rangle$.

    Args:
        g, h: logits (..., C) of the accurate and of the robust classifier.
        alpha: in [0, 1], a number or a tensor that broadcasts against (..., 1), say (B, 1) of a mixing network.
        scale_g, scale_h: numbers.

    Shapes: (..., C), (..., C) -> (..., C), the logits' dtype. Gradients to g, h and alpha. Core
    `ensemble.logit_mixture`.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Bai et al., "Improving the Accuracy-Robustness Trade-Off of Classifiers via Adaptive Smoothing", 2023.
    """
    from ..ensemble import mix_log_probs  # the ensemble family builds on this one

    _check.tensor("g", g, min_dim=1)
    _check.tensor("h", h)
    _check.like("h", h, tuple(g.shape), g, "g")
    _check.same_dtype("h", h, g, "g")
    scale_g, scale_h = _check.number("scale_g", scale_g), _check.number("scale_h", scale_h)
    wide = torch.float64 if g.dtype == torch.float64 else torch.float32
    if isinstance(alpha, Tensor):
        _check.tensor("alpha", alpha)
        try:
            a = alpha.to(wide).expand(*g.shape[:-1], 1)
        except RuntimeError:
            raise ValueError(
                f"alpha: expected a shape that broadcasts against {(*g.shape[:-1], 1)}, got "
                f"{tuple(alpha.shape)}"
            ) from None
    else:
        number = _check.number("alpha", alpha, low=0.0, high=1.0)
        a = torch.full((*g.shape[:-1], 1), number, dtype=wide, device=g.device)
    scaled = [x if s == 1.0 else x * s for x, s in ((g, scale_g), (h, scale_h))]
    return mix_log_probs(scaled, torch.cat([1.0 - a, a], -1))


def weighted_sum(outs: Tensor | Sequence[Tensor], weight: Tensor, *, max_w: bool = False) -> Tensor:
    r"""A mixed operation: $\sum_o w_o\,y_o$, or with Max-W $\sum_o (1 - \max w + w_o)\,y_o$.

    Max-W leaves the strongest operation at weight 1, and the others below it.

    Args:
        outs: (O, ...), or a list of O tensors.
        weight: (O,), softmaxed architecture weights.
        max_w: sharpDARTS' form; the gradient of the maximum goes to the largest weight.

    Shapes: (O, S), (O,) -> S. Gradients to outs and weight. A composition over core `weights.lincomb`.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Hundt et al., "sharpDARTS: Faster and More Accurate Differentiable Architecture Search", 2019.
    """
    _check.tensor("weight", weight, dim=1)
    items = list(outs.unbind(0)) if isinstance(outs, Tensor) and outs.dim() > 0 else outs
    if not isinstance(items, Sequence) or not all(isinstance(t, Tensor) for t in items):
        raise TypeError(
            f"outs: expected a tensor (O, ...) or a list of them, got {type(outs).__name__}"
        )
    if len(items) != weight.shape[0] or not items:
        raise ValueError(f"outs: expected {weight.shape[0]} (that of weight), got {len(items)}")
    return lincomb(list(items), 1.0 - weight.amax() + weight if max_w else weight)


def prefix_mask(x: Tensor, k: Tensor) -> Tensor:
    r"""Nested dropout: each row keeps its first k features, $x_{bj}\,1[j \le k_b]$ counting from 1.

    Args:
        x: (..., D).
        k: (...), integers; 0 keeps none, D or more all.

    Shapes: (..., D), (...) -> (..., D). A composition; a dropped NaN is 0.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: "Compressing Features for Learning with Noisy Labels", 2022; Rippel et al., "Learning Ordered
    Representations with Nested Dropout", 2014.
    """
    _check.tensor("x", x, min_dim=1)
    if not isinstance(k, Tensor) or k.is_floating_point() or k.dtype == torch.bool:
        raise TypeError("k: expected a tensor of integers")
    if k.shape != x.shape[:-1]:
        raise ValueError(
            f"k: expected shape {tuple(x.shape[:-1])} (a number a row of x), got {tuple(k.shape)}"
        )
    kept = torch.arange(x.shape[-1], device=x.device) < k[..., None]
    return torch.where(kept, x, 0.0)


@torch.no_grad()
def coteaching_select(
    loss_first: Tensor, loss_second: Tensor, fraction: float
) -> tuple[Tensor, Tensor]:
    r"""Co-teaching: each of two networks learns from the samples whose loss is small for the other.

    Args:
        loss_first, loss_second: (B,), a loss a sample of either network.
        fraction: of the batch to keep: $\lfloor\mathrm{fraction}\cdot B\rfloor$ samples.

    Shapes: (B,), (B,) -> two index tensors: samples for the first network (small for the second), and for the second;
    by increasing loss, ties by index. A composition.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: "Compressing Features for Learning with Noisy Labels", 2022; Han et al., "Co-teaching", 2018.
    """
    _check.tensor("loss_first", loss_first, dim=1)
    _check.tensor("loss_second", loss_second, dim=1)
    if loss_first.shape != loss_second.shape:
        raise ValueError(
            f"loss_second: expected shape {tuple(loss_first.shape)} (that of loss_first), got "
            f"{tuple(loss_second.shape)}"
        )
    fraction = _check.number("fraction", fraction, low=0.0, high=1.0)
    count = int(fraction * loss_first.shape[0] + 1e-9)
    first, second = (torch.argsort(loss, stable=True)[:count] for loss in (loss_second, loss_first))
    return first, second


@torch.no_grad()
def nonneg_project_(parameters: Tensor | Iterable[Tensor]) -> None:
    r"""$W \leftarrow \max(W, 0)$ in place: after a step, for networks convex in their input.

    Args:
        parameters: a tensor or an iterable of them.

    Shapes: any. A composition (torch's multi-tensor clamp).

    Raises:
        TypeError: naming what is not a floating-point tensor.

    Source: Fang, Buchanan, Sulam, "What's in a Prior? Learned Proximal Networks for Inverse Problems", 2024;
    Amos et al., "Input Convex Neural Networks", 2017.
    """
    items = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    for i, t in enumerate(items):
        _check.tensor(f"parameters[{i}]", t)
    if items:
        torch._foreach_clamp_min_(items, 0.0)


def softplus_weight(v: Tensor, beta: float = 1.0) -> Tensor:
    r"""Weights that are positive by construction: $W = \log(1 + e^{\beta v})/\beta$.

    Args:
        v: what is trained.
        beta: sharpness, positive.

    Shapes: any S -> S. A composition; differentiable.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Fang, Buchanan, Sulam, "What's in a Prior?", 2024.
    """
    _check.tensor("v", v)
    beta = _check.number("beta", beta)
    if beta <= 0.0:
        raise ValueError(f"beta: expected a positive number, got {beta}")
    return F.softplus(v, beta)
