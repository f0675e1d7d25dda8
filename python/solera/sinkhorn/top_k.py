r"""The k largest, softly: entropic transport to two bins, which one threshold solves.

Transport of n points of mass 1 to bins of mass k and n - k at cost $-x_i$ and 0 has the plan $(y_i, 1 - y_i)$ with

$$y_i = \sigma\bigl((x_i - t)/\varepsilon\bigr),\qquad t : \sum_i y_i = k .$$

With p the j-th largest x, j = ceil(k), and q the next one, $s = (t - p)/\varepsilon$ is at most
$\log((n - k)/(k - j + 1))$, and at least $-\log(k/(j - k))$ and $-(p - q)/\varepsilon - \log(k/(j + 1 - k))$:
j values are p or more and n - j + 1 are p or less (j + 1 are q or more). Bisection of s, and not of t, keeps a
threshold that lies between two neighbours of the dtype. The vector-Jacobian product needs y alone: with
$v = y(1 - y)/\varepsilon$, $\mathrm dx = v g - v\,\langle v, g\rangle / \sum v$.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import _check
from .._registry import accumulate_type
from .plan import transforms_active

APART = 200.0  # of p and q, in epsilons, from where all k are 1 and all others 0


def _steps(x: Tensor) -> int:
    """Halvings after which the bracket, a few hundred wide, is a last place of what decides."""
    return 60 if x.dtype == torch.float64 else 36


def _place(x: Tensor, count: int) -> Tensor:
    """The count-th largest of x (..., n), (..., 1); where kthvalue is refused as not deterministic, by sorting."""
    if x.device.type != "cpu":
        return x.sort(-1, descending=True).values[..., count - 1 : count]
    return x.kthvalue(x.shape[-1] - count + 1, dim=-1, keepdim=True).values


def _selected(x: Tensor, k: float, epsilon: float) -> Tensor:
    """y of x (..., n) in the dtype that is computed in."""
    n, j = x.shape[-1], math.ceil(k)
    p = torch.where(x.isnan().any(-1, keepdim=True), torch.nan, _place(x, j))
    d = x - p
    z = torch.where(d == 0, 0.0, d / epsilon)  # epsilon may be 0 in this dtype
    high = torch.full_like(p, math.log((n - k) / (k - (j - 1))))
    low = torch.full_like(p, -math.log(k / (j - k)) if j > k else -math.inf)
    if j < n:
        apart = -(_place(z, j + 1)).clamp(min=-APART)
        low = torch.maximum(low, -apart - max(math.log(k / (j + 1 - k)), 0.0))
    low, high = low - 1.0, high + 1.0  # rounding
    for _ in range(_steps(x)):
        middle = low + (high - low) / 2
        above = torch.sigmoid(z - middle).sum(-1, keepdim=True) > k
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return torch.sigmoid(z - (low + (high - low) / 2))


class _TopK(torch.autograd.Function):
    """y is saved as an output, so that backward is differentiable in it and in its gradient."""

    @staticmethod
    def forward(ctx, x, k, epsilon):
        y = _selected(x, k, epsilon)
        ctx.save_for_backward(y)
        ctx.epsilon = epsilon
        return y

    @staticmethod
    def backward(ctx, grad):
        (y,) = ctx.saved_tensors
        v = y * (1 - y)
        total = v.sum(-1, keepdim=True)
        mean = (v * grad).sum(-1, keepdim=True) / torch.where(total == 0, 1.0, total)
        # An epsilon below the dtype's range would give 0 / 0 where y is 0 or 1.
        return v * (grad - mean) / max(ctx.epsilon, torch.finfo(y.dtype).tiny), None, None


def soft_top_k(x: Tensor, k: float, *, epsilon: float = 0.1, largest: bool = True) -> Tensor:
    r"""Weights in (0, 1) that sum to k, near 1 for the k largest.

    $y_i = \sigma((x_i - t)/\varepsilon)$ with t such that they sum to k: entropic transport to bins of
    mass k and n - k.

    Args:
        x: (..., n) finite scores (a row with a NaN is NaN), any n.
        k: 0 < k < n; not necessarily an integer.
        epsilon: > 0, in units of x: the smaller, the harder.
        largest: False for the k smallest.

    Shapes: (..., n) -> (..., n) of x's dtype. The gradient is that of the exact solution, by its closed form; twice
    differentiable.

    Raises:
        ValueError, TypeError: naming the argument.
        NotImplementedError: under torch.func transforms or forward-mode AD.

    Source: Xie et al., "Differentiable Top-k Operator with Optimal Transport", 2020, whose two-bin problem one
    threshold solves.
    """
    _check.tensor("x", x, min_dim=1)
    n = x.shape[-1]
    k, epsilon = _check.number("k", k), _check.number("epsilon", epsilon)
    if not 0 < k < n:
        raise ValueError(f"k: expected 0 < k < n = {n}, got {k!r}")
    if not epsilon > 0:
        raise ValueError(f"epsilon: expected a number > 0, got {epsilon!r}")
    if transforms_active():
        raise NotImplementedError(
            "soft_top_k: not implemented under torch.func transforms or forward-mode AD"
        )
    if x.numel() == 0:
        return x * 1.0
    wide = x.to(accumulate_type(x))
    return _TopK.apply(wide if largest else -wide, k, epsilon).to(x.dtype)
