"""Norms modulated by a condition or by time, and DeepNorm."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from ..norm.ada_norm import ada_layer_norm, ada_rms_norm
from ..norm.deep_norm import deep_norm, deep_norm_constants
from ..norm.time_norm import time_layer_norm


class _Modulated(nn.Module):
    """`adaLN_modulation` = SiLU, Linear, as DiT names it; zero at the start, so the norm begins plain."""

    def __init__(self, dim: int, cond_dim: int, parts: int, eps: float, device, dtype):
        super().__init__()
        self.dim, self.cond_dim, self.eps = dim, cond_dim, eps
        linear = nn.Linear(cond_dim, parts * dim, device=device, dtype=dtype)
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), linear)

    def extra_repr(self) -> str:
        return f"{self.dim}, cond_dim={self.cond_dim}, eps={self.eps}"


class AdaLayerNorm(_Modulated):
    """Layer norm whose shift and scale come from a condition: `shift, scale = Linear(silu(cond)).chunk(2)`.

    Args: dim, cond_dim, eps, device, dtype. Keys: adaLN_modulation.1.weight and .bias, as DiT's final layer.

    Shape: x (B, ..., dim), cond (B, cond_dim) -> (B, ..., dim).
    """

    def __init__(self, dim: int, cond_dim: int, eps: float = 1e-6, device=None, dtype=None):
        super().__init__(dim, cond_dim, 2, eps, device, dtype)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(cond).chunk(2, dim=-1)
        return cast(Tensor, ada_layer_norm(x, shift=shift, scale=scale, eps=self.eps))


class AdaRMSNorm(_Modulated):
    """RMS norm whose shift and scale come from a condition: `shift, scale = Linear(silu(cond)).chunk(2)`.

    Args: dim, cond_dim, eps, device, dtype. Keys: adaLN_modulation.1.weight, adaLN_modulation.1.bias.

    Shape: x (B, ..., dim), cond (B, cond_dim) -> (B, ..., dim).
    """

    def __init__(self, dim: int, cond_dim: int, eps: float = 1e-6, device=None, dtype=None):
        super().__init__(dim, cond_dim, 2, eps, device, dtype)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(cond).chunk(2, dim=-1)
        return cast(Tensor, ada_rms_norm(x, shift=shift, scale=scale, eps=self.eps))


class AdaLayerNormZero(_Modulated):
    """DiT's adaLN-Zero: a block's six rows of modulation, `Linear(silu(cond)).chunk(6)`.

    Their order is DiT's: shift, scale, gate of attention, then shift, scale, gate of the feed-forward. One call
    gives the block's first norm; `between` its first residual and second norm in one kernel; the last residual
    is `h + gate * branch`, or the `branch` of the next block's first norm.

        y, rows = norm(x, cond)
        h, y = norm.between(x, attention(y), rows)
        x = torch.addcmul(h, rows[5].unsqueeze(1), mlp(y))

    Args: dim, cond_dim, eps, device, dtype. Keys: adaLN_modulation.1.weight, adaLN_modulation.1.bias.

    Shape: x (B, T, dim), cond (B, cond_dim) -> y (B, T, dim) and six rows (B, dim).
    """

    def __init__(self, dim: int, cond_dim: int, eps: float = 1e-6, device=None, dtype=None):
        super().__init__(dim, cond_dim, 6, eps, device, dtype)

    def forward(self, x: Tensor, cond: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        rows = self.adaLN_modulation(cond).chunk(6, dim=-1)
        y = ada_layer_norm(x, shift=rows[0], scale=rows[1], eps=self.eps)
        return cast(Tensor, y), rows

    def between(self, x: Tensor, branch: Tensor, rows: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """(h, y): h = x + gate * branch, and y the norm of h modulated for the feed-forward."""
        out = ada_layer_norm(
            x, branch=branch, gate=rows[2], shift=rows[3], scale=rows[4], eps=self.eps
        )
        return out[0], out[1]


class TimeDependentParameter(nn.Module):
    """The four rows of one time-dependent parameter, by the names of DiMR's public code.

    Shape: param0, param1, nodecay_weight, nodecay_bias, all (dim,).
    """

    def __init__(self, dim: int, value: float, device=None, dtype=None):
        super().__init__()
        full = lambda v: nn.Parameter(torch.full((dim,), v, device=device, dtype=dtype))
        self.param0, self.param1 = full(value), full(value)
        self.nodecay_weight, self.nodecay_bias = full(0.0), full(0.0)

    def forward(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.param0, self.param1, self.nodecay_weight, self.nodecay_bias


class TimeLayerNorm(nn.Module):
    """DiMR's time-dependent layer norm, with its keys weight.* and bias.* of a `TimeDependentParameter`.

    Takes log SNR as the public code does (and divides it by 4 as it does); `num_groups` is kept for its
    constructor's sake and, as there, changes nothing.

    Shape: x (B, ..., dim), log_snr (B,) or (1,) -> (B, ..., dim).
    """

    def __init__(self, dim: int, num_groups: int = 1, eps: float = 1e-5, device=None, dtype=None):
        super().__init__()
        self.dim, self.num_groups, self.eps = dim, num_groups, eps
        self.weight = TimeDependentParameter(dim, 1.0, device, dtype)
        self.bias = TimeDependentParameter(dim, 0.0, device, dtype)

    def forward(self, x: Tensor, log_snr: Tensor) -> Tensor:
        return time_layer_norm(x, log_snr / 4, *self.weight(), *self.bias(), eps=self.eps)

    def extra_repr(self) -> str:
        return f"{self.dim}, eps={self.eps}"


class DeepNorm(nn.LayerNorm):
    """`LayerNorm(alpha * x + branch)` with torch.nn.LayerNorm's keys; alpha from `layers` by `deep_norm_constants`.

    Shape: x, branch (..., dim) -> (..., dim).
    """

    def __init__(
        self, dim: int, layers: int, eps: float = 1e-5, bias: bool = True, device=None, dtype=None
    ):
        super().__init__(dim, eps=eps, bias=bias, device=device, dtype=dtype)
        self.alpha, self.gain = deep_norm_constants(layers)

    def forward(self, x: Tensor, branch: Tensor) -> Tensor:  # type: ignore[override]
        return deep_norm(x, branch, self.alpha, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, alpha={self.alpha:.4g}"
