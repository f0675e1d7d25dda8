"""Batch norms for data that has moved away from the training data."""

from __future__ import annotations

from torch import Tensor

from ..norm.test_time import alpha_batch_norm
from .channel_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d


class _AlphaBatchNorm:
    def __init__(self, *args, source_weight: float = 0.9, **options):
        super().__init__(*args, **options)
        self.source_weight = source_weight

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, source_weight={self.source_weight}"  # type: ignore[misc]

    def forward(self, x: Tensor) -> Tensor:
        if self.training or self.running_mean is None:  # type: ignore[attr-defined]
            return super().forward(x)  # type: ignore[misc]
        self._check_input_dim(x)  # type: ignore[attr-defined]
        return alpha_batch_norm(
            x,
            self.running_mean,  # type: ignore[attr-defined]
            self.running_var,  # type: ignore[attr-defined]
            self.weight,  # type: ignore[attr-defined]
            self.bias,  # type: ignore[attr-defined]
            source_weight=self.source_weight,
            eps=self.eps,  # type: ignore[attr-defined]
        )


class AlphaBatchNorm1d(_AlphaBatchNorm, BatchNorm1d):
    """`BatchNorm1d` that mixes its running statistics with the batch's in evaluation (`alpha_batch_norm`).

    Loads a BatchNorm1d's state_dict; `source_weight` is the share of the running statistics.

    Shape: (N, C) or (N, C, L) -> the same.
    """


class AlphaBatchNorm2d(_AlphaBatchNorm, BatchNorm2d):
    """`BatchNorm2d` that mixes its running statistics with the batch's in evaluation (`alpha_batch_norm`).

    Loads a BatchNorm2d's state_dict; `source_weight` is the share of the running statistics.

    Shape: (N, C, H, W) -> the same.
    """


class AlphaBatchNorm3d(_AlphaBatchNorm, BatchNorm3d):
    """`BatchNorm3d` that mixes its running statistics with the batch's in evaluation (`alpha_batch_norm`).

    Loads a BatchNorm3d's state_dict; `source_weight` is the share of the running statistics.

    Shape: (N, C, D, H, W) -> the same.
    """
