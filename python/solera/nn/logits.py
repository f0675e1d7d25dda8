"""Losses over logits and features as modules."""

from __future__ import annotations

import torch
from torch import Tensor

from ..norm.logit_losses import stablemax_cross_entropy, z_loss
from ..norm.normalized_softmax import Margin, normalized_softmax_cross_entropy


class _Loss(torch.nn.Module):
    def __init__(self, ignore_index: int, reduction: str) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self.reduction = reduction


class ZLoss(_Loss):
    """`solera.norm.z_loss` as a module.

    Shapes: (..., C), (...) -> scalar, or (...) with reduction "none".
    """

    def __init__(
        self, a: float, b: float, ignore_index: int = -100, reduction: str = "mean"
    ) -> None:
        super().__init__(ignore_index, reduction)
        self.a, self.b = a, b

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return z_loss(
            input, target, a=self.a, b=self.b,
            reduction=self.reduction, ignore_index=self.ignore_index,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"a={self.a}, b={self.b}, reduction={self.reduction!r}"


class StableMaxCrossEntropyLoss(_Loss):
    """`solera.norm.stablemax_cross_entropy` as a module, called as `torch.nn.CrossEntropyLoss`.

    Shapes: (..., C), (...) -> scalar, or (...) with reduction "none".
    """

    def __init__(self, ignore_index: int = -100, reduction: str = "mean") -> None:
        super().__init__(ignore_index, reduction)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return stablemax_cross_entropy(
            input, target, reduction=self.reduction, ignore_index=self.ignore_index
        )


class NormalizedSoftmaxCrossEntropyLoss(_Loss):
    """A classification head and its loss: `solera.norm.normalized_softmax_cross_entropy` with its own weight.

    `weight` is (num_classes, in_features), as torch.nn.Linear's. A margin with running statistics (AdaFace)
    follows the module's training mode.

    Shapes: (B, in_features), (B,) -> scalar, or (B,) with reduction "none".
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        scale: float = 64.0,
        margin: float | Margin | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(ignore_index, reduction)
        self.in_features, self.num_classes = in_features, num_classes
        self.scale, self.margin = scale, margin
        self.weight = torch.nn.Parameter(
            torch.empty(num_classes, in_features, device=device, dtype=dtype)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        torch.nn.init.normal_(self.weight, std=0.01)

    def forward(
        self, input: Tensor, target: Tensor, extra_negatives: Tensor | None = None
    ) -> Tensor:
        if self.margin is not None and hasattr(self.margin, "training"):
            self.margin.training = self.training
        return normalized_softmax_cross_entropy(
            input, self.weight, target, scale=self.scale, margin=self.margin,
            extra_negatives=extra_negatives, reduction=self.reduction, ignore_index=self.ignore_index,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.num_classes}, scale={self.scale}, margin={self.margin}"
