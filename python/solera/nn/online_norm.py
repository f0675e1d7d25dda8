"""Online normalisation as modules: the constructor order and keys of Cerebras/online-normalization."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _check
from ..norm.online_norm import OnlineNormState, online_norm

GUARDS = ("ac", "ls", "none")


class _Norm(torch.nn.Module):
    """The running state, under the paper repository's keys: m, var forward, u and v (here w) backward."""

    m: Tensor
    var: Tensor
    u: Tensor
    v: Tensor

    def __init__(self, num_features: int) -> None:
        super().__init__()
        for name, value in (("m", 0.0), ("var", 1.0), ("u", 0.0), ("v", 0.0)):
            self.register_buffer(name, torch.full((num_features,), value))

    def _apply(self, fn: Any, recurse: bool = True) -> _Norm:
        """As every conversion, but the state stays in float32 where the model goes to half precision."""
        before = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = getattr(self, name)
            if new.dtype.itemsize == 2:
                setattr(self, name, old.to(new.device))
        return self

    def state(self) -> OnlineNormState:
        return OnlineNormState(self.m, self.var, self.u, self.v)


class _OnlineNorm(torch.nn.Module):
    dims: tuple[int, ...]
    weight: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        num_features: int,
        alpha_fwd: float = 0.999,
        alpha_bkw: float = 0.99,
        eps: float = 1e-05,
        affine: bool = True,
        ecm: str = "ac",
        ls_eps: float = 1e-05,
        clamp_val: float = 5,
    ) -> None:
        super().__init__()
        _check.choice("ecm", ecm, GUARDS)
        self.num_features, self.eps = num_features, eps
        self.alpha_fwd, self.alpha_bkw = alpha_fwd, alpha_bkw
        self.ecm, self.ls_eps, self.clamp_val = ecm, ls_eps, clamp_val
        self.norm = _Norm(num_features)
        if affine:
            self.weight = torch.nn.Parameter(torch.ones(num_features))
            self.bias = torch.nn.Parameter(torch.zeros(num_features))
        else:
            self.register_parameter("weight", None)
            self.register_parameter("bias", None)

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, alpha_fwd={self.alpha_fwd}, alpha_bkw={self.alpha_bkw}, "
            f"eps={self.eps}, affine={self.weight is not None}, ecm={self.ecm!r}"
        )

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() not in self.dims:
            raise ValueError(f"x: expected {self.dims} dimensions, got shape {tuple(x.shape)}")
        return online_norm(
            x, self.norm.state(), self.weight, self.bias,
            alpha_forward=self.alpha_fwd, alpha_backward=self.alpha_bkw, eps=self.eps,
            training=self.training, layer_scaling=self.ecm == "ls", layer_scaling_eps=self.ls_eps,
            clamp=self.clamp_val if self.ecm == "ac" else None,
        )  # fmt: skip


class OnlineNorm1d(_OnlineNorm):
    """Online normalisation of (N, C): arguments and keys of Cerebras/online-normalization's OnlineNorm1d.

    ecm is the guard against drifting statistics: "ac" clamps the output to [-clamp_val, clamp_val], "ls"
    divides each sample by its root mean square (layer scaling), "none" does neither. The state is in
    `norm.m`, `norm.var` (moved by forward) and `norm.u`, `norm.v` (moved by backward).

    Shape: (N, C) -> the same.
    """

    dims = (2,)


class OnlineNorm2d(_OnlineNorm):
    """Online normalisation of (N, C, H, W); everything else as `OnlineNorm1d`.

    Shape: (N, C, H, W) -> the same.
    """

    dims = (4,)
