"""A convolution whose weight is standardised in every forward pass (NFNets)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..norm.weight_standardize import scaled_weight_standardize


def _symmetric(kernel_size, stride, dilation):
    def padding(kernel: int, stride: int, dilation: int) -> int:
        return (stride - 1 + dilation * (kernel - 1)) // 2

    pairs = [v if isinstance(v, tuple) else (v, v) for v in (kernel_size, stride, dilation)]
    return tuple(padding(*one) for one in zip(*pairs))


class ScaledStdConv2d(torch.nn.Conv2d):
    """2-D convolution with scaled weight standardisation: timm's ScaledStdConv2d, its arguments and keys.

    The weight is used as `scaled_weight_standardize(weight, gain, gamma=gamma, eps=eps, eps_mode="add")`.
    padding=None pads so that a stride of 1 keeps the size.

    Shape: (N, C_in, H, W) -> (N, C_out, H', W').
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str | None = None,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        gamma: float = 1.0,
        eps: float = 1e-6,
        gain_init: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if padding is None:
            padding = _symmetric(kernel_size, stride, dilation)
        super().__init__(
            in_channels, out_channels, kernel_size, stride=stride, padding=padding,
            dilation=dilation, groups=groups, bias=bias, device=device, dtype=dtype,
        )  # fmt: skip
        self.gamma, self.eps, self.gain_init = gamma, eps, gain_init
        self.gain = torch.nn.Parameter(
            torch.full((out_channels, 1, 1, 1), gain_init, device=device, dtype=dtype)
        )

    def forward(self, input: Tensor) -> Tensor:
        weight = scaled_weight_standardize(
            self.weight, self.gain, gamma=self.gamma, eps=self.eps, eps_mode="add"
        )
        return F.conv2d(
            input, weight, self.bias, self.stride, self.padding, self.dilation, self.groups
        )  # fmt: skip
