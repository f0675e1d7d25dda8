"""Layers of TabM models: the smaller modules of the PyPI package `tabm` 0.0.3 by name, arguments and state_dict."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from .channel_norm import BatchNorm1d
from .ensemble import SCALING_INITS, _init_scaling_, _positive
from .norm import LayerNorm


class ElementwiseAffine(nn.Module):
    r"""$y = w \odot x + b$ over the last dimensions, with tabm's initialisations of w.

    Args:
        shape: the last dimensions of the input.
        bias: with a bias, which starts at zero.
        scaling_init: how w starts: "ones", "normal" or "random-signs".
        scaling_init_chunks: sizes of consecutive groups of features that start from one draw each.

    Shapes: x (*, *shape) -> the same. Parameters: weight, bias (*shape).

    Raises:
        ValueError: another shape than `shape`, or chunks that do not add up.

    Source: `tabm.ElementwiseAffine` (Gorishniy et al., "TabM", ICLR 2025).
    """

    bias: Tensor | None

    def __init__(
        self,
        shape: tuple[int, ...],
        *,
        bias: bool,
        scaling_init: str,
        scaling_init_chunks: list[int] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if scaling_init not in SCALING_INITS:
            raise ValueError(f"scaling_init: expected one of {SCALING_INITS}, got {scaling_init!r}")
        if scaling_init_chunks is not None and scaling_init == "ones":
            raise ValueError(
                "scaling_init_chunks: expected None with scaling_init 'ones', which draws nothing, "
                f"got {scaling_init_chunks!r}"
            )
        if scaling_init_chunks is not None and sum(scaling_init_chunks) != shape[-1]:
            raise ValueError(
                f"scaling_init_chunks: expected sizes that add up to {shape[-1]}, "
                f"got {scaling_init_chunks!r}"
            )
        self.weight = nn.Parameter(torch.empty(shape, dtype=dtype, device=device))
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(shape, dtype=dtype, device=device)) if bias else None
        )
        self._weight_init = scaling_init
        self._weight_init_chunks = scaling_init_chunks
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """weight by scaling_init, bias zero."""
        _init_scaling_(self.weight, self._weight_init, self._weight_init_chunks)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (*, *shape) -> the same."""
        shape = self.weight.shape
        if x.shape[max(x.dim() - len(shape), 0) :] != shape:
            raise ValueError(
                f"x: expected shape (*, {', '.join(map(str, shape))}), got {tuple(x.shape)}"
            )
        if self.bias is None:
            return x * self.weight
        return torch.addcmul(self.bias, self.weight, x)


def as_members(x: Tensor, k: int, training: bool) -> Tensor:
    """(B, D) as (B, k, D) without a copy; (B, k, D) as it is, with a warning outside training."""
    if x.dim() == 2:
        return x.unsqueeze(-2).expand(-1, k, -1)
    if x.dim() != 3 or x.shape[1] != k:
        raise ValueError(f"x: expected shape (B, D) or (B, {k}, D), got {tuple(x.shape)}")
    if not training:
        warnings.warn(
            "an input (B, k, D) outside training: one row for each item (B, D) is usual there, "
            f"got {tuple(x.shape)}",
            stacklevel=3,
        )
    return x


class EnsembleView(nn.Module):
    """(B, D) as (B, k, D) without a copy; (B, k, D) as it is.

    Args:
        k: the number of members.

    Shapes: x (B, D) or (B, k, D) -> (B, k, D).

    Raises:
        ValueError: another rank, or another number of members than k.

    Source: `tabm.EnsembleView` (Gorishniy et al., "TabM", ICLR 2025).
    """

    def __init__(self, *, k: int) -> None:
        super().__init__()
        self._k = _positive("k", k)

    @property
    def k(self) -> int:
        return self._k

    def forward(self, x: Tensor) -> Tensor:
        """x (B, D) or (B, k, D) -> (B, k, D)."""
        return as_members(x, self.k, self.training)


class BatchNorm1dEnsemble(nn.Module):
    """k batch normalizations side by side, each with its own statistics and parameters.

    Args:
        num_features, affine: as in `torch.nn.BatchNorm1d`.
        k: the number of members.
        kwargs: further arguments of `torch.nn.BatchNorm1d`.

    Shapes: x (B, k, num_features) -> the same.

    Raises:
        ValueError: another number of members or features.

    Source: `tabm.BatchNorm1dEnsemble` (Gorishniy et al., "TabM", ICLR 2025).
    """

    affine: ElementwiseAffine | None

    def __init__(self, num_features: int, *, k: int, affine: bool = True, **kwargs: Any) -> None:
        super().__init__()
        self._k = _positive("k", k)
        self.impl = BatchNorm1d(k * num_features, affine=False, **kwargs)
        self.affine = (
            ElementwiseAffine(
                (k, num_features),
                scaling_init="ones",
                bias=True,
                dtype=kwargs.get("dtype"),
                device=kwargs.get("device"),
            )
            if affine
            else None
        )

    @classmethod
    def from_batchnorm1d(cls, module: nn.BatchNorm1d, **kwargs: Any) -> BatchNorm1dEnsemble:
        """k copies of a batch normalization: its arguments, parameters and running statistics."""
        names = ("track_running_stats", "momentum", "eps", "num_features", "affine")
        kwargs.update((name, getattr(module, name)) for name in names)
        like = module.weight if module.weight is not None else module.running_mean
        if like is not None:
            kwargs.update(dtype=like.dtype, device=like.device)
        made = cls(**kwargs)
        with torch.no_grad():
            if made.affine is not None and made.affine.bias is not None:
                made.affine.weight.copy_(module.weight)
                made.affine.bias.copy_(module.bias)
            for name in ("running_mean", "running_var"):
                if getattr(module, name) is not None:
                    getattr(made.impl, name).copy_(getattr(module, name).repeat(made.k))
            tracked = made.impl.num_batches_tracked
            if tracked is not None and module.num_batches_tracked is not None:
                tracked.copy_(module.num_batches_tracked)
        return made

    @property
    def k(self) -> int:
        return self._k

    def forward(self, x: Tensor) -> Tensor:
        """x (B, k, num_features) -> the same."""
        features = self.impl.num_features // self.k
        if x.dim() != 3 or x.shape[1:] != (self.k, features):
            raise ValueError(
                f"x: expected shape (B, {self.k}, {features}) for k={self.k} members, "
                f"got {tuple(x.shape)}"
            )
        x = self.impl(x.flatten(-2)).unflatten(-1, (self.k, features))
        return x if self.affine is None else self.affine(x)


class LayerNormEnsemble(nn.Module):
    """k layer normalizations side by side, each with its own parameters.

    Args:
        normalized_shape, elementwise_affine: as in `torch.nn.LayerNorm`.
        k: the number of members.
        kwargs: further arguments of `torch.nn.LayerNorm`. As in tabm, bias=False changes nothing: the members have
            their bias, so that checkpoints load either way.

    Shapes: x (*, k, *normalized_shape) -> the same.

    Raises:
        ValueError: another number of members or shape.

    Source: `tabm.LayerNormEnsemble` (Gorishniy et al., "TabM", ICLR 2025).
    """

    affine: ElementwiseAffine | None

    def __init__(
        self,
        normalized_shape: int | list[int] | torch.Size,
        *,
        k: int,
        elementwise_affine: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self._k = _positive("k", k)
        self.impl = LayerNorm(normalized_shape, elementwise_affine=False, **kwargs)
        self.affine = (
            ElementwiseAffine(
                (k, *self.impl.normalized_shape),
                scaling_init="ones",
                bias=True,
                dtype=kwargs.get("dtype"),
                device=kwargs.get("device"),
            )
            if elementwise_affine
            else None
        )

    @classmethod
    def from_layernorm(cls, module: nn.LayerNorm, **kwargs: Any) -> LayerNormEnsemble:
        """k copies of a layer normalization, with or without parameters."""
        names = ("normalized_shape", "eps", "elementwise_affine")
        kwargs.update((name, getattr(module, name)) for name in names)
        if module.weight is not None:
            kwargs.update(dtype=module.weight.dtype, device=module.weight.device)
        made = cls(**kwargs)
        with torch.no_grad():
            if made.affine is not None:
                made.affine.weight.copy_(module.weight)
                if made.affine.bias is not None and module.bias is not None:
                    made.affine.bias.copy_(module.bias)
        return made

    @property
    def k(self) -> int:
        return self._k

    def forward(self, x: Tensor) -> Tensor:
        """x (*, k, *normalized_shape) -> the same."""
        shape = (self.k, *self.impl.normalized_shape)
        if x.shape[max(x.dim() - len(shape), 0) :] != shape:
            raise ValueError(
                f"x: expected shape (*, {', '.join(map(str, shape))}), got {tuple(x.shape)}"
            )
        x = self.impl(x)
        return x if self.affine is None else self.affine(x)
