"""Backbones of TabM: those of the PyPI package `tabm` 0.0.3 by name, arguments and state_dict, on Solera's cores."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ensemble import ensemble_linear, tabm_mlp
from .ensemble import LinearBatchEnsemble, LinearEnsemble, _positive, shared_input
from .tabm_layers import ElementwiseAffine

ARCHITECTURES = ("tabm", "tabm-mini", "tabm-packed")


def _silent(*modules: nn.Module) -> bool:
    """Whether nobody would notice that these modules are not called one by one."""
    return not torch.nn.modules.module._has_any_global_hook() and not any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
        for m in modules
    )


def _activation_name(module: nn.Module) -> tuple[bool, str | None]:
    """(known, name): the activation as the cores know it."""
    if type(module) is nn.ReLU:
        return True, "relu"
    if type(module) is nn.SiLU:
        return True, "silu"
    if type(module) is nn.GELU:
        return module.approximate == "none", "gelu"
    return type(module) is nn.Identity, None


class _Blocks(nn.Module):
    """Blocks of (linear, activation, dropout), as tabm builds and names them."""

    blocks: Any  # nn.ModuleList of nn.Sequential

    def __init__(
        self, *, d_in: int, n_blocks: int, d_block: int, dropout: float, activation: str = "ReLU"
    ) -> None:
        super().__init__()
        for name, value in (("d_in", d_in), ("n_blocks", n_blocks), ("d_block", d_block)):
            _positive(name, value)
        kind = getattr(nn, activation, None)
        if kind is None:
            raise ValueError(
                f"activation: expected the name of a module of torch.nn, got {activation!r}"
            )
        self.blocks = nn.ModuleList(
            nn.Sequential(
                self._linear(i, d_in if i == 0 else d_block, d_block), kind(), nn.Dropout(dropout)
            )
            for i in range(n_blocks)
        )

    def _linear(self, index: int, in_features: int, out_features: int) -> nn.Module:
        raise NotImplementedError


class MLPBackbone(_Blocks):
    """One multilayer perceptron, the model that the ensembles are made of.

    Args:
        d_in, n_blocks, d_block: input size, depth and width.
        dropout: the rate after each activation.
        activation: the name of a module of torch.nn.

    Shapes: x (*, d_in) -> (*, d_block).

    Raises:
        ValueError: sizes that are not positive, or an unknown activation.

    Source: `tabm.MLPBackbone` (Gorishniy et al., "TabM", ICLR 2025). Torch's own layers.
    """

    def _linear(self, index: int, in_features: int, out_features: int) -> nn.Module:
        return nn.Linear(in_features, out_features)

    def forward(self, x: Tensor) -> Tensor:
        """x (*, d_in) -> (*, d_block)."""
        for block in self.blocks:
            x = block(x)
        return x


class MLPBackboneEnsembleBase(_Blocks):
    """What the ensembles of k perceptrons have in common.

    Args:
        k: the number of members.
        kwargs: as `MLPBackbone`.

    Shapes: x (B, k, d_in) -> (B, k, d_block).

    Raises:
        ValueError: sizes that are not positive, or an unknown activation.

    Source: `tabm.MLPBackboneEnsembleBase` (Gorishniy et al., "TabM", ICLR 2025).
    """

    def __init__(self, *, k: int, **kwargs: Any) -> None:
        self._k = _positive("k", k)  # first: the layers are made with it
        super().__init__(**kwargs)

    @property
    def k(self) -> int:
        return self._k

    def get_original_output_shape(self) -> torch.Size:
        """(d_block,): the shape of one member's output."""
        return torch.Size((self.blocks[-1][0].weight.shape[0],))  # of a weight that members share

    def _plain_blocks(self, linear: type[nn.Module]) -> list[tuple[Any, str | None]] | None:
        """(linear, activation) of each block if all are as built here and nobody listens in."""
        plain: list[tuple[Any, str | None]] = []
        rates = set()
        for block in self.blocks:
            if not isinstance(block, nn.Sequential) or len(block) != 3:
                return None
            layer, act, drop = block
            known, name = _activation_name(act)
            if type(layer) is not linear or type(drop) is not nn.Dropout or not known:
                return None
            if getattr(layer, "activation", None) is not None or not _silent(block, *block):
                return None
            rates.add((drop.p, drop.training))
            plain.append((layer, name))
        return plain if len(rates) == 1 else None

    def _network(self, x: Tensor, layers: list[tuple], names: list[str | None]) -> Tensor:
        drop = self.blocks[0][2]
        return tabm_mlp(x, layers, activation=names, dropout_p=drop.p, training=drop.training)

    def _check(self, x: Tensor) -> None:
        if x.dim() not in (2, 3) or (x.dim() == 3 and x.shape[1] != self.k):
            raise ValueError(
                f"x: expected shape (B, {self.k}, D) or (B, D) for k={self.k} members, "
                f"got {tuple(x.shape)}"
            )


class MLPBackboneEnsemble(MLPBackboneEnsembleBase):
    """k independent multilayer perceptrons in one pass: the backbone of "tabm-packed".

    Args:
        d_in, n_blocks, d_block: input size, depth and width.
        dropout: the rate after each activation.
        activation: the name of a module of torch.nn.
        k: the number of members.

    Shapes: x (B, k, d_in), or (B, d_in) shared by the members -> (B, k, d_block).

    Raises:
        ValueError: another number of members or features, or an unknown activation.

    Source: `tabm.MLPBackboneEnsemble` (Gorishniy et al., "TabM", ICLR 2025).
    """

    def _linear(self, index: int, in_features: int, out_features: int) -> nn.Module:
        return LinearEnsemble(in_features, out_features, k=self.k)

    def get_original_output_shape(self) -> torch.Size:
        """(d_block,): the shape of one member's output."""
        return torch.Size((self.blocks[-1][0].weight.shape[-1],))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, k, d_in) or (B, d_in) -> (B, k, d_block)."""
        self._check(x)
        plain = self._plain_blocks(LinearEnsemble)
        if plain is None:
            for block in self.blocks:
                x = block(x)
            return x
        x = shared_input(x)
        for (linear, name), block in zip(plain, self.blocks):
            x = ensemble_linear(x, linear.weight, linear.bias, activation=name)
            x = F.dropout(x, block[2].p, block[2].training)
        return x


class MLPBackboneMiniEnsemble(MLPBackboneEnsembleBase):
    """One multilayer perceptron for k members that differ by a scale of the input: "tabm-mini".

    Args:
        affine_bias: whether the members also have a shift of the input.
        affine_scaling_init: how the scales start: "random-signs" or "normal".
        affine_scaling_init_chunks: sizes of consecutive groups of features that start from one draw each.
        kwargs: as `MLPBackboneEnsemble`.

    Shapes: x (B, k, d_in) -> (B, k, d_block).

    Raises:
        ValueError: another number of members or features.

    Source: `tabm.MLPBackboneMiniEnsemble` (Gorishniy et al., "TabM", ICLR 2025).
    """

    def __init__(
        self,
        *,
        affine_bias: bool,
        affine_scaling_init: str,
        affine_scaling_init_chunks: list[int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.affine = ElementwiseAffine(
            (self.k, self.blocks[0][0].weight.shape[-1]),
            scaling_init=affine_scaling_init,
            scaling_init_chunks=affine_scaling_init_chunks,
            bias=affine_bias,
        )

    def _linear(self, index: int, in_features: int, out_features: int) -> nn.Module:
        return nn.Linear(in_features, out_features)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, k, d_in) -> (B, k, d_block)."""
        plain = self._plain_blocks(nn.Linear)
        if plain is None or not _silent(self.affine) or x.dim() != 3:
            x = self.affine(x)
            for block in self.blocks:
                x = block(x)
            return x
        self._check(x)
        layers: list[tuple] = [(m.weight, None, None, m.bias) for m, _ in plain]
        weight, bias = layers[0][0], layers[0][3]
        if self.affine.bias is not None:  # W (r x + c) + b = W (r x) + (W c + b)
            bias = F.linear(self.affine.bias, weight, bias)
        layers[0] = (weight, self.affine.weight, None, bias)
        return self._network(shared_input(x), layers, [name for _, name in plain])


class MLPBackboneBatchEnsemble(MLPBackboneEnsembleBase):
    """k multilayer perceptrons that share their weights, with scales and biases of their own: "tabm".

    Args:
        tabm_init: only the first input scale starts at random, all other scales at one.
        scaling_init: how the scales start: "random-signs" or "normal".
        start_scaling_init_chunks: for the first scale, sizes of consecutive groups of features that start
            from one draw each.
        kwargs: as `MLPBackboneEnsemble`.

    Shapes: x (B, k, d_in), or (B, d_in) shared by the members -> (B, k, d_block).

    Raises:
        ValueError: another number of members or features.

    Source: `tabm.MLPBackboneBatchEnsemble` (Gorishniy et al., "TabM", ICLR 2025).
    """

    def __init__(
        self,
        *,
        tabm_init: bool,
        scaling_init: str,
        start_scaling_init_chunks: list[int] | None,
        **kwargs: Any,
    ) -> None:
        self._start = tabm_init, scaling_init, start_scaling_init_chunks
        super().__init__(**kwargs)

    def _linear(self, index: int, in_features: int, out_features: int) -> nn.Module:
        tabm_init, init, chunks = self._start
        first = (init, "ones") if index == 0 else "ones"
        return LinearBatchEnsemble(
            in_features,
            out_features,
            k=self.k,
            scaling_init=first if tabm_init else init,
            first_scaling_init_chunks=chunks if index == 0 else None,
        )

    def forward(self, x: Tensor) -> Tensor:
        """x (B, k, d_in) or (B, d_in) -> (B, k, d_block)."""
        self._check(x)
        plain = self._plain_blocks(LinearBatchEnsemble)
        if plain is None:
            for block in self.blocks:
                x = block(x)
            return x
        layers = [(m.weight, m.r, m.s, m.bias) for m, _ in plain]
        return self._network(shared_input(x), layers, [name for _, name in plain])


def make_tabm_backbone(
    *,
    d_in: int,
    n_blocks: int,
    d_block: int,
    dropout: float,
    activation: str = "ReLU",
    k: int,
    arch_type: str = "tabm",
    start_scaling_init: str | None,
    start_scaling_init_chunks: list[int] | None,
) -> MLPBackboneEnsembleBase:
    """The backbone of a TabM.

    Args:
        d_in, n_blocks, d_block, dropout, activation, k: as `MLPBackboneEnsemble`.
        arch_type: "tabm", "tabm-mini" or "tabm-packed".
        start_scaling_init: "random-signs" or "normal"; None for "tabm-packed".
        start_scaling_init_chunks: sizes of the features in the input, whose scales start from one draw each.

    Shapes: the module takes x (B, k, d_in) and returns (B, k, d_block).

    Raises:
        ValueError: an unknown architecture, or initializations that do not go with it.

    Source: `tabm.make_tabm_backbone` (Gorishniy et al., "TabM", ICLR 2025).
    """
    if arch_type not in ARCHITECTURES:
        raise ValueError(f"arch_type: expected one of {ARCHITECTURES}, got {arch_type!r}")
    packed = arch_type == "tabm-packed"
    if packed != (start_scaling_init is None):
        expected = "None" if packed else "an initialization"
        raise ValueError(
            f"start_scaling_init: expected {expected} with arch_type={arch_type!r}, "
            f"got {start_scaling_init!r}"
        )
    chunks = start_scaling_init_chunks
    if packed and chunks is not None:
        raise ValueError(
            f"start_scaling_init_chunks: expected None with start_scaling_init None, got {chunks!r}"
        )
    options: dict[str, Any] = {
        "d_in": d_in, "n_blocks": n_blocks, "d_block": d_block, "dropout": dropout,
        "activation": activation, "k": k,
    }  # fmt: skip
    if packed:
        return MLPBackboneEnsemble(**options)
    assert start_scaling_init is not None
    if chunks is None:
        warnings.warn(
            "start_scaling_init_chunks is not given: the parts of a feature then start from different scales",
            stacklevel=2,
        )
    if arch_type == "tabm":
        return MLPBackboneBatchEnsemble(
            tabm_init=True,
            scaling_init=start_scaling_init,
            start_scaling_init_chunks=chunks,
            **options,
        )
    return MLPBackboneMiniEnsemble(
        affine_bias=False,
        affine_scaling_init=start_scaling_init,
        affine_scaling_init_chunks=chunks,
        **options,
    )
