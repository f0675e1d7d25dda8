"""EvoNorm modules with timm's arguments and state_dict keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..norm.channel_norm import channel_norm
from ..norm.evonorm import evonorm_b0, evonorm_b1, evonorm_b2, evonorm_s0


def _affine(_mean, _var, weight, bias):
    return torch.zeros_like(weight), weight, bias


class _EvoNorm2d(nn.Module):
    has_v = False
    has_running_var = True
    v: Any
    running_var: Tensor

    def __init__(self, num_features, apply_act, momentum, eps, device, dtype):
        super().__init__()
        options = {"device": device, "dtype": dtype}
        self.num_features, self.apply_act = num_features, apply_act
        self.momentum, self.eps = momentum, eps
        self.weight = nn.Parameter(torch.ones(num_features, **options))
        self.bias = nn.Parameter(torch.zeros(num_features, **options))
        if self.has_v:
            v = torch.ones(num_features, **options) if apply_act else None
            self.v = None if v is None else nn.Parameter(v)
        if self.has_running_var:
            self.register_buffer("running_var", torch.ones(num_features, **options))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)
        if getattr(self, "v", None) is not None:
            nn.init.ones_(self.v)

    def extra_repr(self) -> str:
        return f"{self.num_features}, apply_act={self.apply_act}, eps={self.eps}"

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[1] != self.num_features:
            raise ValueError(
                f"x: expected shape (N, {self.num_features}, H, W), got {tuple(x.shape)}"
            )
        if self.apply_act:
            return self._norm(x)
        return channel_norm(x, _affine, (self.weight, self.bias), moments=False)[0]

    def _norm(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _running(self) -> dict:
        return {
            "running_var": self.running_var,
            "training": self.training,
            "momentum": self.momentum,
            "eps": self.eps,
        }


class EvoNorm2dS0(_EvoNorm2d):
    """`solera.norm.evonorm_s0` with timm's EvoNorm2dS0 arguments and keys.

    `apply_act=False` leaves weight * x + bias, as in timm.

    Shape: (N, C, H, W) -> the same.
    """

    has_v, has_running_var = True, False

    def __init__(
        self,
        num_features: int,
        groups: int = 32,
        group_size: int | None = None,
        apply_act: bool = True,
        eps: float = 1e-5,
        device=None,
        dtype=None,
        **_,
    ):
        super().__init__(num_features, apply_act, None, eps, device, dtype)
        if group_size:
            if num_features % group_size:
                raise ValueError(
                    f"group_size: expected a divisor of the {num_features} channels, got {group_size}"
                )
            groups = num_features // group_size
        self.groups = groups

    def _norm(self, x: Tensor) -> Tensor:
        return evonorm_s0(x, self.weight, self.bias, self.v, groups=self.groups, eps=self.eps)


class EvoNorm2dB0(_EvoNorm2d):
    """`solera.norm.evonorm_b0` with timm's EvoNorm2dB0 arguments (eps 1e-3 among them) and keys.

    Shape: (N, C, H, W) -> the same.
    """

    has_v = True

    def __init__(
        self,
        num_features: int,
        apply_act: bool = True,
        momentum: float = 0.1,
        eps: float = 1e-3,
        device=None,
        dtype=None,
        **_,
    ):
        super().__init__(num_features, apply_act, momentum, eps, device, dtype)

    def _norm(self, x: Tensor) -> Tensor:
        return evonorm_b0(x, self.weight, self.bias, self.v, **self._running())


class EvoNorm2dB1(_EvoNorm2d):
    """`solera.norm.evonorm_b1` with timm's EvoNorm2dB1 arguments and keys.

    Shape: (N, C, H, W) -> the same.
    """

    def __init__(
        self,
        num_features: int,
        apply_act: bool = True,
        momentum: float = 0.1,
        eps: float = 1e-5,
        device=None,
        dtype=None,
        **_,
    ):
        super().__init__(num_features, apply_act, momentum, eps, device, dtype)

    def _norm(self, x: Tensor) -> Tensor:
        return evonorm_b1(x, self.weight, self.bias, **self._running())


class EvoNorm2dB2(EvoNorm2dB1):
    """`solera.norm.evonorm_b2` with timm's EvoNorm2dB2 arguments and keys.

    Shape: (N, C, H, W) -> the same.
    """

    def _norm(self, x: Tensor) -> Tensor:
        return evonorm_b2(x, self.weight, self.bias, **self._running())
