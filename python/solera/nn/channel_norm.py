"""Drop-ins for torch's group, instance and batch norm modules."""

from __future__ import annotations

import torch
from torch import Tensor

from ..norm.batch_norm import batch_norm
from ..norm.group_norm import group_norm
from ..norm.instance_norm import instance_norm


class _Activated:
    """An activation after the norm, by a class attribute where `convert` made the module."""

    activation: str | None = None

    def __init__(self, *args, activation: str | None = None, **options):
        super().__init__(*args, **options)
        if activation is not None:
            self.activation = activation

    def extra_repr(self) -> str:
        said = super().extra_repr()  # type: ignore[misc]
        return said if self.activation is None else f"{said}, activation={self.activation!r}"


class GroupNorm(_Activated, torch.nn.GroupNorm):
    """`torch.nn.GroupNorm` on Solera's kernel: same arguments, defaults and state_dict keys, and `activation=`.

    Shape: (N, C, *) -> the same.
    """

    def forward(self, x: Tensor) -> Tensor:
        return group_norm(
            x, self.num_groups, self.weight, self.bias, self.eps, activation=self.activation
        )


class _InstanceNorm:
    def _apply_instance_norm(self, x: Tensor) -> Tensor:
        from_input = self.training or not self.track_running_stats  # type: ignore[attr-defined]
        return instance_norm(
            x,
            self.running_mean,  # type: ignore[attr-defined]
            self.running_var,  # type: ignore[attr-defined]
            self.weight,  # type: ignore[attr-defined]
            self.bias,  # type: ignore[attr-defined]
            from_input,
            self.momentum if self.momentum is not None else 0.0,  # type: ignore[attr-defined]
            self.eps,  # type: ignore[attr-defined]
        )


class InstanceNorm1d(_InstanceNorm, torch.nn.InstanceNorm1d):
    """`torch.nn.InstanceNorm1d` on Solera's kernel: same arguments, defaults and state_dict keys.

    Shape: (N, C, L) or (C, L) -> the same.
    """


class InstanceNorm2d(_InstanceNorm, torch.nn.InstanceNorm2d):
    """`torch.nn.InstanceNorm2d` on Solera's kernel: same arguments, defaults and state_dict keys.

    Shape: (N, C, H, W) or (C, H, W) -> the same.
    """


class InstanceNorm3d(_InstanceNorm, torch.nn.InstanceNorm3d):
    """`torch.nn.InstanceNorm3d` on Solera's kernel: same arguments, defaults and state_dict keys.

    Shape: (N, C, D, H, W) or (C, D, H, W) -> the same.
    """


class _BatchNorm(_Activated):
    process_group: torch.distributed.ProcessGroup | None = None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        self._check_input_dim(x)  # type: ignore[attr-defined]
        momentum = 0.0 if self.momentum is None else self.momentum  # type: ignore[attr-defined]
        if self.training and self.track_running_stats:  # type: ignore[attr-defined]
            counter = self.num_batches_tracked  # type: ignore[attr-defined]
            if counter is not None:
                counter.add_(1)
                if self.momentum is None:  # type: ignore[attr-defined]
                    momentum = 1.0 / float(counter)
        mean, var = self.running_mean, self.running_var  # type: ignore[attr-defined]
        training = self.training or (mean is None and var is None)  # type: ignore[attr-defined]
        if self.training and not self.track_running_stats:  # type: ignore[attr-defined]
            mean = var = None
        return batch_norm(
            x,
            mean,
            var,
            self.weight,  # type: ignore[attr-defined]
            self.bias,  # type: ignore[attr-defined]
            training,
            momentum,
            self.eps,  # type: ignore[attr-defined]
            activation=self.activation,
            residual=residual,
        )


class BatchNorm1d(_BatchNorm, torch.nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d` on Solera's kernel: same arguments, defaults and state_dict keys.

    `activation=` follows in the same pass, and so does a residual given to the call.

    Shape: (N, C) or (N, C, L) -> the same.
    """


class BatchNorm2d(_BatchNorm, torch.nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` on Solera's kernel: same arguments, defaults and state_dict keys.

    `activation=` follows in the same pass, and so does a residual given to the call.

    Shape: (N, C, H, W) -> the same.
    """


class BatchNorm3d(_BatchNorm, torch.nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d` on Solera's kernel: same arguments, defaults and state_dict keys.

    `activation=` follows in the same pass, and so does a residual given to the call.

    Shape: (N, C, D, H, W) -> the same.
    """
