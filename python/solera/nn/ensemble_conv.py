"""Convolutions of many members."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..ensemble import batch_ensemble_conv2d, ensemble_conv2d
from .ensemble import _positive

Pair = int | tuple[int, int]


class _Conv(nn.Module):
    bias: Tensor | None

    def _options(self, in_channels, out_channels, kernel_size, stride, padding, dilation, groups):
        if in_channels % groups or out_channels % groups:
            raise ValueError(
                f"groups: expected a divisor of in_channels={in_channels} and "
                f"out_channels={out_channels}, got {groups}"
            )
        self.in_channels, self.out_channels = in_channels, out_channels
        size = kernel_size if isinstance(kernel_size, tuple) else (kernel_size, kernel_size)
        self.kernel_size, self.stride, self.padding = size, stride, padding
        self.dilation, self.groups = dilation, groups
        return (out_channels, in_channels // groups, *size)

    def _where(self) -> dict:
        return {
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "groups": self.groups,
        }

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, k={self.k}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding}, bias={self.bias is not None}"
        )


class BatchEnsembleConv2d(_Conv):
    r"""K convolutions that share a weight, $y_{bk} = s_k \odot (W * (r_k \odot x_{bk})) + b_k$.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: as in `torch.nn.Conv2d`.
        k: the number of members.
        scaling_init: "ones", "normal" or "random-signs", how r and s start.

    Shapes: x (B, C, H, W) or (B, k, C, H, W) -> (B, k, O, H', W'). Parameters: weight (O, C / groups, kh, kw), r
    (k, C), s (k, O), bias (k, O).

    Source: Wen, Tran, Ba, "BatchEnsemble", ICLR 2020.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair = 1,
        padding: Pair | str = 0,
        dilation: Pair = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        k: int,
        scaling_init: str = "random-signs",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if scaling_init not in ("ones", "normal", "random-signs"):
            raise ValueError(
                f"scaling_init: expected 'ones', 'normal' or 'random-signs', got {scaling_init!r}"
            )
        self.k, self.scaling_init = _positive("k", k), scaling_init
        shape = self._options(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups
        )
        options: dict[str, Any] = {"dtype": dtype, "device": device}
        self.weight = nn.Parameter(torch.empty(shape, **options))
        self.r = nn.Parameter(torch.empty(k, in_channels, **options))
        self.s = nn.Parameter(torch.empty(k, out_channels, **options))
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(k, out_channels, **options)) if bias else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """weight as in `torch.nn.Conv2d`; r and s by scaling_init; all members start from one bias."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        with torch.no_grad():
            for t in (self.r, self.s):
                if self.scaling_init == "ones":
                    t.fill_(1)
                elif self.scaling_init == "normal":
                    t.normal_()
                else:
                    t.bernoulli_(0.5).mul_(2).sub_(1)
            if self.bias is not None:
                bound = 1 / math.sqrt(max(self.weight[0].numel(), 1))
                self.bias.copy_(torch.empty_like(self.bias[0]).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        return batch_ensemble_conv2d(x, self.weight, self.r, self.s, self.bias, **self._where())


class EnsembleConv2d(_Conv):
    r"""K convolutions with weights of their own in one call, $y_{bk} = W_k * x_{bk} + b_k$.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: as in `torch.nn.Conv2d`.
        k: the number of members.

    Shapes: x (B, C, H, W) or (B, k, C, H, W) -> (B, k, O, H', W'). Parameters: weight (k, O, C / groups, kh, kw), bias
    (k, O): K stacked `torch.nn.Conv2d`.

    Source: Lakshminarayanan et al., "Deep Ensembles", NeurIPS 2017.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair = 1,
        padding: Pair | str = 0,
        dilation: Pair = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        k: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.k = _positive("k", k)
        shape = self._options(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups
        )
        options: dict[str, Any] = {"dtype": dtype, "device": device}
        self.weight = nn.Parameter(torch.empty(k, *shape, **options))
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(k, out_channels, **options)) if bias else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Each member as a `torch.nn.Conv2d` of its own."""
        for k in range(self.k):
            nn.init.kaiming_uniform_(self.weight[k], a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(max(self.weight[0][0].numel(), 1))
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        return ensemble_conv2d(x, self.weight, self.bias, **self._where())
