"""Ensembles of linear layers: the modules of `tabm` 0.0.3 by name, arguments and state_dict, on Solera's core."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, nn

from ..ensemble import batch_ensemble_linear, ensemble_linear

SCALING_INITS = ("ones", "normal", "random-signs")


def _positive(name: str, value: object) -> int:
    try:  # what counts as an integer: numpy's too, in which searches for hyperparameters come
        number = None if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is None:
        raise TypeError(
            f"{name}: expected a positive integer, got {type(value).__name__} {value!r}"
        )
    if number <= 0:
        raise ValueError(f"{name}: expected a positive integer, got {value}")
    return number


def _uniform_(t: Tensor, in_features: int) -> Tensor:
    """U(-1/sqrt(in_features), 1/sqrt(in_features)), as torch initialises a linear layer."""
    bound = in_features**-0.5
    return nn.init.uniform_(t, -bound, bound)


def _draw_(t: Tensor, distribution: str) -> Tensor:
    with torch.no_grad():
        if distribution == "ones":
            return t.fill_(1.0)
        if distribution == "normal":
            return t.normal_()
        return t.bernoulli_(0.5).mul_(2).sub_(1)


def _init_scaling_(t: Tensor, distribution: str, chunks: list[int] | None) -> None:
    """One draw an element, or one a chunk of consecutive elements of each row."""
    if chunks is None:
        _draw_(t, distribution)
        return
    for part in t.detach().split(chunks, dim=-1):
        part.copy_(_draw_(torch.empty(*t.shape[:-1], 1), distribution))


def shared_input(x: Tensor) -> Tensor:
    """(B, D) where x (B, k, D) is one row expanded over the members: it is then read once, not k times."""
    if x.dim() == 3 and x.shape[1] > 1 and x.stride(1) == 0 and not x.requires_grad:
        return x[:, 0]
    return x


def _check_input(x: object, members: int, in_features: int) -> None:
    """A wrong number of members is an error here, never a broadcast; the rest the function checks."""
    if not isinstance(x, Tensor) or x.dim() not in (2, 3):
        return
    expected = f"(B, {in_features}) or (B, {members}, {in_features})"
    if x.shape[-1] != in_features or (x.dim() == 3 and x.shape[1] != members):
        raise ValueError(
            f"x: expected shape {expected} for k={members} members, got {tuple(x.shape)}"
        )


class LinearBatchEnsemble(nn.Module):
    r"""K linear layers that share a weight, $y_{bk} = \phi(s_k \odot W(r_k \odot x_{bk}) + b_k)$.

    Names, defaults, initialisation and state_dict keys are those of `tabm.LinearBatchEnsemble`; besides, the
    input may be (B, in_features), shared by the members, and an activation may be applied in the same pass.

    Args:
        in_features, out_features: sizes of each layer.
        bias: with a bias per member.
        k: the number of members.
        scaling_init: how r and s start: "ones", "normal" or "random-signs", or a pair of them for (r, s).
        first_scaling_init_chunks: sizes of consecutive groups of input features that start from one draw each.
        activation: None, "relu", "gelu" or "silu".

    Shapes: x (B, k, in_features) or (B, in_features) -> (B, k, out_features). Parameters: weight
    (out_features, in_features), r (k, in_features), s (k, out_features), bias (k, out_features).

    Raises:
        ValueError: another number of members than k, other sizes, or chunks that do not add up.

    Source: Wen, Tran, Ba, "BatchEnsemble", ICLR 2020; Gorishniy et al., "TabM", ICLR 2025.
    """

    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        k: int,
        scaling_init: str | tuple[str, str],
        first_scaling_init_chunks: list[int] | None = None,
        activation: str | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features = _positive("in_features", in_features)
        self.out_features = _positive("out_features", out_features)
        self.k = _positive("k", k)
        self.activation = activation
        inits = scaling_init if isinstance(scaling_init, tuple) else (scaling_init, scaling_init)
        if len(inits) != 2 or any(i not in SCALING_INITS for i in inits):
            raise ValueError(
                f"scaling_init: expected one of {SCALING_INITS} or a pair of them, got {scaling_init!r}"
            )
        chunks = first_scaling_init_chunks
        if chunks is not None and inits[0] == "ones":
            raise ValueError(
                "first_scaling_init_chunks: expected None with scaling_init 'ones', which draws nothing, "
                f"got {chunks!r}"
            )
        if chunks is not None and sum(chunks) != in_features:
            raise ValueError(
                f"first_scaling_init_chunks: expected sizes that add up to in_features={in_features}, "
                f"got {chunks!r}"
            )
        self._scaling_init = inits
        self._first_scaling_init_chunks = chunks
        options: dict[str, Any] = {"dtype": dtype, "device": device}
        self.weight = nn.Parameter(torch.empty(out_features, in_features, **options))
        self.r = nn.Parameter(torch.empty(k, in_features, **options))
        self.s = nn.Parameter(torch.empty(k, out_features, **options))
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(k, out_features, **options)) if bias else None
        )
        self.reset_parameters()

    @classmethod
    def from_linear(
        cls, module: nn.Linear, *, copy: bool = False, **kwargs: Any
    ) -> LinearBatchEnsemble:
        """An ensemble of a linear layer's sizes, dtype and device, with values of its own (as in tabm).

        With copy=True the layer's weight is the shared one, its bias each member's start.
        """
        kwargs.setdefault("dtype", module.weight.dtype)
        kwargs.setdefault("device", module.weight.device)
        made = cls(module.in_features, module.out_features, module.bias is not None, **kwargs)
        if copy:
            with torch.no_grad():
                made.weight.copy_(module.weight)
                if made.bias is not None:
                    made.bias.copy_(module.bias)
        return made

    def reset_parameters(self) -> None:
        """weight uniform as in a linear layer; r and s by scaling_init; all members start from one bias."""
        _uniform_(self.weight, self.in_features)
        _init_scaling_(self.r, self._scaling_init[0], self._first_scaling_init_chunks)
        _init_scaling_(self.s, self._scaling_init[1], None)
        if self.bias is not None:
            start = _uniform_(self.bias.detach().new_empty(self.out_features), self.in_features)
            with torch.no_grad():
                self.bias.copy_(start)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, k, in_features) or (B, in_features) -> (B, k, out_features)."""
        _check_input(x, self.k, self.in_features)
        return batch_ensemble_linear(
            shared_input(x), self.weight, self.r, self.s, self.bias, activation=self.activation
        )

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, k={self.k}, "
            f"bias={self.bias is not None}, activation={self.activation!r}"
        )


class LinearEnsemble(nn.Module):
    r"""K independent linear layers in one call, $y_{bk} = \phi(W_k^\top x_{bk} + b_k)$.

    Names, defaults, initialisation and state_dict keys are those of `tabm.LinearEnsemble`; besides, the input
    may be (B, in_features), shared by the members, and an activation may be applied in the same pass.

    Args:
        in_features, out_features: sizes of each layer.
        bias: with a bias per member.
        k: the number of members.
        activation: None, "relu", "gelu" or "silu".

    Shapes: x (B, k, in_features) or (B, in_features) -> (B, k, out_features). Parameters: weight
    (k, in_features, out_features), bias (k, out_features).

    Raises:
        ValueError: another number of members than k, or other sizes.

    Source: Gorishniy et al., "TabM", ICLR 2025.
    """

    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        k: int,
        activation: str | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("in_features", in_features), ("out_features", out_features), ("k", k)):
            _positive(name, value)
        self.activation = activation
        options: dict[str, Any] = {"dtype": dtype, "device": device}
        self.weight = nn.Parameter(torch.empty(k, in_features, out_features, **options))
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(k, out_features, **options)) if bias else None
        )
        self.reset_parameters()

    @classmethod
    def from_linear(cls, module: nn.Linear, *, copy: bool = False, **kwargs: Any) -> LinearEnsemble:
        """k layers of a linear layer's sizes, dtype and device, each drawn anew (as in tabm).

        With copy=True each is a copy of the layer; members that start alike and see the same batches stay alike.
        """
        kwargs.setdefault("dtype", module.weight.dtype)
        kwargs.setdefault("device", module.weight.device)
        made = cls(module.in_features, module.out_features, module.bias is not None, **kwargs)
        if copy:
            with torch.no_grad():
                made.weight.copy_(module.weight.T)
                if made.bias is not None:
                    made.bias.copy_(module.bias)
        return made

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[2]

    @property
    def k(self) -> int:
        return self.weight.shape[0]

    def reset_parameters(self) -> None:
        """Weight and bias uniform, as in a linear layer."""
        _uniform_(self.weight, self.in_features)
        if self.bias is not None:
            _uniform_(self.bias, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, k, in_features) or (B, in_features) -> (B, k, out_features)."""
        _check_input(x, self.k, self.in_features)
        return ensemble_linear(shared_input(x), self.weight, self.bias, activation=self.activation)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, k={self.k}, "
            f"bias={self.bias is not None}, activation={self.activation!r}"
        )
