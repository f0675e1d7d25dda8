"""Drop-ins for torch's norm modules over the last dimensions."""

from __future__ import annotations

import torch
from torch import Tensor

from ..norm.row_norm import layer_norm, rms_norm


class _RowNorm:
    """What both modules share: several normalized dimensions are flattened into one row."""

    normalized_shape: tuple[int, ...]
    weight: Tensor | None
    bias: Tensor | None
    eps: float | None

    def _rows(self, x: Tensor) -> Tensor:
        dims = len(self.normalized_shape)
        if tuple(x.shape[-dims:]) != tuple(self.normalized_shape):
            raise ValueError(
                f"x: expected last dimensions {tuple(self.normalized_shape)} (normalized_shape), "
                f"got shape {tuple(x.shape)}"
            )
        return x if dims == 1 else x.flatten(-dims)

    def _apply_norm(self, norm, x: Tensor, residual: Tensor | None, residual_scale: float):
        rows = self._rows(x)
        weight = None if self.weight is None else self.weight.flatten()
        bias = getattr(self, "bias", None)
        bias = None if bias is None else bias.flatten()
        if residual is None:
            out = norm(rows, weight, bias=bias, eps=self.eps)
            return out if rows is x else out.view(x.shape)
        y, u = norm(
            rows, weight, bias=bias, eps=self.eps,
            residual=self._rows(residual), residual_scale=residual_scale,
        )  # fmt: skip
        return (y, u) if rows is x else (y.view(x.shape), u.view(x.shape))


class LayerNorm(_RowNorm, torch.nn.LayerNorm):
    """`torch.nn.LayerNorm` on Solera's kernel: same arguments, defaults and state_dict keys.

    Called with a residual it returns (y, u): `u = x + residual_scale * residual`, `y = norm(u)`.

    Shape: (..., *normalized_shape) -> the same; with a residual a pair of that shape.
    """

    def forward(
        self, x: Tensor, residual: Tensor | None = None, residual_scale: float = 1.0
    ) -> Tensor | tuple[Tensor, Tensor]:
        return self._apply_norm(layer_norm, x, residual, residual_scale)


class RMSNorm(_RowNorm, torch.nn.RMSNorm):
    """`torch.nn.RMSNorm` on Solera's kernel: same arguments, defaults and state_dict keys.

    Called with a residual it returns (y, u): `u = x + residual_scale * residual`, `y = norm(u)`.

    Shape: (..., *normalized_shape) -> the same; with a residual a pair of that shape.
    """

    def forward(
        self, x: Tensor, residual: Tensor | None = None, residual_scale: float = 1.0
    ) -> Tensor | tuple[Tensor, Tensor]:
        return self._apply_norm(rms_norm, x, residual, residual_scale)
