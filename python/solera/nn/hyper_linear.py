"""Self-tuning networks' layers, with the names of the authors' code."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..ensemble import hyper_conv2d, hyper_linear

Pair = int | tuple[int, int]


class _Hyper(nn.Module):
    elem_bias: Tensor | None
    hnet_bias: Tensor | None

    def _build(self, shape: tuple[int, ...], num_hparams: int, bias: bool, **options) -> None:
        self.elem_weight = nn.Parameter(torch.empty(shape, **options))
        self.hnet_weight = nn.Parameter(torch.empty(shape, **options))
        for name in ("elem_bias", "hnet_bias"):
            value = nn.Parameter(torch.empty(shape[0], **options)) if bias else None
            self.register_parameter(name, value)
        self.htensor_to_scalars = nn.Linear(num_hparams, 2 * shape[0], bias=False, **options)
        self.elem_scalar = nn.Parameter(torch.ones(1, **options))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights and biases uniform within 1/sqrt(fan in); H normal with deviation 0.01."""
        bound = 1 / math.sqrt(max(self.elem_weight[0].numel(), 1))
        for t in (self.elem_weight, self.hnet_weight, self.elem_bias, self.hnet_bias):
            if t is not None:
                nn.init.uniform_(t, -bound, bound)
        nn.init.normal_(self.htensor_to_scalars.weight, std=0.01)

    def _parameters_of_call(self) -> tuple:
        return (
            self.elem_weight, self.hnet_weight, self.htensor_to_scalars.weight, self.elem_bias,
            self.hnet_bias, self.elem_scalar,
        )  # fmt: skip


class HyperLinear(_Hyper):
    r"""A linear layer whose weights move with hyperparameters, one vector for each example.

    Args:
        in_features, out_features: sizes of the layer.
        num_hparams: m, the length of a hyperparameter vector.
        bias: with $b_e$ and $b_h$.

    Shapes: input (B, in_features), htensor (B, m) or None -> (B, out_features). Parameters: elem_weight, hnet_weight
    (out_features, in_features), elem_bias, hnet_bias (out_features,), htensor_to_scalars.weight (2 out_features, m),
    elem_scalar (1,).

    Source: MacKay et al., "Self-Tuning Networks", ICLR 2019; see `solera.ensemble.hyper_linear`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_hparams: int,
        bias: bool = True,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self._build((out_features, in_features), num_hparams, bias, dtype=dtype, device=device)

    def forward(self, input: Tensor, htensor: Tensor | None) -> Tensor:
        return hyper_linear(input, htensor, *self._parameters_of_call())


class HyperConv2d(_Hyper):
    r"""A convolution whose weights move with hyperparameters, one vector for each example.

    Args:
        in_channels, out_channels, kernel_size, padding, stride: as in `torch.nn.Conv2d`.
        num_hparams: m, the length of a hyperparameter vector.
        bias: with $b_e$ and $b_h$.

    Shapes: input (B, in_channels, H, W), htensor (B, m) or None -> (B, out_channels, H', W'). Parameters as
    `HyperLinear`, weights (out_channels, in_channels, kh, kw).

    Source: MacKay et al., "Self-Tuning Networks", ICLR 2019; see `solera.ensemble.hyper_conv2d`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        num_hparams: int,
        padding: Pair = 0,
        stride: Pair = 1,
        bias: bool = True,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.padding, self.stride = padding, stride
        size = kernel_size if isinstance(kernel_size, tuple) else (kernel_size, kernel_size)
        shape = (out_channels, in_channels, *size)
        self._build(shape, num_hparams, bias, dtype=dtype, device=device)

    def forward(self, input: Tensor, htensor: Tensor | None) -> Tensor:
        return hyper_conv2d(
            input, htensor, *self._parameters_of_call(), stride=self.stride, padding=self.padding
        )
