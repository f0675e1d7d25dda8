"""Linear layers with adapters."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..ensemble.adapters import multi_lora_linear


class MultiLoRALinear(nn.Linear):
    """`torch.nn.Linear` with E LoRA adapters; the layer itself is frozen unless `train_base`.

    `weight` and `bias` are `torch.nn.Linear`'s; `lora_a` (E, r, I) starts as torch starts a linear layer,
    `lora_b` (E, O, r) at zero, so that the layer starts as its base. The scale is alpha / r.

    Shapes: forward(x, index=None, gates=None) as `solera.ensemble.multi_lora_linear`: x (..., I) -> (..., O).

    Raises:
        ValueError: fewer than one adapter or rank.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_adapters: int,
        r: int,
        lora_alpha: float = 1.0,
        bias: bool = True,
        train_base: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        if num_adapters < 1 or r < 1:
            raise ValueError(
                f"num_adapters: expected at least one adapter of rank r >= 1, got {num_adapters} of {r}"
            )
        for parameter in self.parameters():
            parameter.requires_grad_(train_base)
        self.lora_alpha = lora_alpha
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.lora_a = nn.Parameter(torch.empty(num_adapters, r, in_features, **options))
        self.lora_b = nn.Parameter(torch.zeros(num_adapters, out_features, r, **options))
        bound = 1 / math.sqrt(max(in_features, 1))
        nn.init.uniform_(self.lora_a, -bound, bound)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, num_adapters: int, r: int, lora_alpha: float = 1.0
    ) -> MultiLoRALinear:
        """Adapters on an existing layer, whose parameters are shared and frozen."""
        weight = linear.weight
        layer = cls(
            linear.in_features, linear.out_features, num_adapters, r, lora_alpha,
            linear.bias is not None, True, weight.device, weight.dtype,
        )  # fmt: skip
        layer.weight, layer.bias = weight, linear.bias
        for parameter in linear.parameters():
            parameter.requires_grad_(False)
        return layer

    def forward(
        self, x: Tensor, index: Tensor | None = None, gates: Tensor | None = None
    ) -> Tensor:
        if isinstance(x, Tensor) and x.dim() and x.shape[-1] != self.in_features:
            raise ValueError(
                f"x: expected {self.in_features} features in the last dimension, got {tuple(x.shape)}"
            )
        scaling = self.lora_alpha / self.lora_a.shape[1]
        return multi_lora_linear(
            x, self.weight, self.lora_a, self.lora_b, index=index, gates=gates, scaling=scaling,
            bias=self.bias,
        )  # fmt: skip

    def extra_repr(self) -> str:
        adapters, rank, _ = self.lora_a.shape
        return f"{super().extra_repr()}, num_adapters={adapters}, r={rank}, lora_alpha={self.lora_alpha}"
