"""TabM: the model of the PyPI package `tabm` 0.0.3 by name, arguments and state_dict, on Solera's cores."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ensemble.tabm import fold_for_inference
from .ensemble import LinearEnsemble, _positive
from .tabm_backbones import (
    MLPBackboneEnsemble,
    MLPBackboneMiniEnsemble,
    _silent,
    make_tabm_backbone,
)
from .tabm_layers import EnsembleView


class _OneHot(nn.Module):
    """Categorical features (*, n) side by side in one-hot form (*, sum of cardinalities)."""

    def __init__(self, cardinalities: list[int]) -> None:
        super().__init__()
        for index, size in enumerate(cardinalities):
            _positive(f"cat_cardinalities[{index}]", size)
        self._cardinalities = list(cardinalities)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(
            [F.one_hot(x[..., i], size) for i, size in enumerate(self._cardinalities)], -1
        )


class TabM(nn.Module):
    """TabM: k multilayer perceptrons for tables, trained at once, whose mean is the prediction.

    Names, arguments, defaults, initialisation and state_dict keys are those of `tabm.TabM` 0.0.3. With one of the
    activations ReLU, GELU and SiLU the backbone is one pass (`solera.ensemble.tabm_mlp`); dropout masks are then
    drawn as that function says, not as `torch.nn.Dropout` does.

    Args:
        n_num_features: the number of continuous features.
        cat_cardinalities: the number of values of each categorical feature; one-hot inside.
        d_out: outputs of each member; None for the backbone's own.
        num_embeddings: an embedding of the continuous features that the members share: a module with
            `get_output_shape()` -> (n_num_features, d), such as those of `rtdl_num_embeddings`.
        arch_type: "tabm", "tabm-mini" or "tabm-packed".
        start_scaling_init: "random-signs" or "normal"; None for "tabm-packed".
        n_blocks, d_block, dropout, activation, k: of the backbone.

    Shapes: x_num (B, n_num_features), x_cat (B, len(cat_cardinalities)), or (B, k, .) each for another
    batch a member -> (B, k, d_out), or (B, k, d_block) without d_out.

    Raises:
        ValueError: arguments or shapes that do not fit.
        RuntimeError: an input that the arguments did not announce, or its absence.
        TypeError: embeddings without `get_output_shape`; x_num of whole numbers, x_cat of another dtype than int64.

    Source: Gorishniy, Kotelnikov, Babenko, "TabM: Advancing Tabular Deep Learning with Parameter-Efficient
    Ensembling", ICLR 2025.
    """

    num_module: nn.Module | None
    cat_module: _OneHot | None
    output: LinearEnsemble | None
    backbone: Any  # one of the three above

    def __init__(
        self,
        *,
        n_num_features: int = 0,
        cat_cardinalities: list[int] | None = None,
        d_out: int | None,
        num_embeddings: nn.Module | None = None,
        arch_type: str = "tabm",
        start_scaling_init: str | None,
        **options: Any,
    ) -> None:
        for name in ("d_in", "start_scaling_init_chunks"):
            if name in options:
                raise TypeError(f"{name}: follows from the features and cannot be given")
        if "k" not in options:
            raise TypeError("k: the number of members is missing")
        cat_cardinalities = cat_cardinalities or []
        if n_num_features < 0 or not (n_num_features or cat_cardinalities):
            raise ValueError(
                "n_num_features: expected at least one continuous or categorical feature, got "
                f"n_num_features={n_num_features} and cat_cardinalities={cat_cardinalities}"
            )
        sizes = [1] * n_num_features
        if num_embeddings is not None:
            sizes = [self._embedding_size(num_embeddings, n_num_features)] * n_num_features
        super().__init__()
        self.num_module = num_embeddings
        self.cat_module = _OneHot(cat_cardinalities) if cat_cardinalities else None
        sizes += cat_cardinalities
        self.ensemble_view = EnsembleView(k=options["k"])
        self.backbone = make_tabm_backbone(
            d_in=sum(sizes),
            arch_type=arch_type,
            start_scaling_init=start_scaling_init,
            start_scaling_init_chunks=None if start_scaling_init is None else sizes,
            **options,
        )
        width = self.backbone.get_original_output_shape()[0]
        self.output = None if d_out is None else LinearEnsemble(width, d_out, k=self.backbone.k)
        self._n_num_features = n_num_features
        self._n_cat_features = len(cat_cardinalities)

    @staticmethod
    def _embedding_size(module: nn.Module, features: int) -> int:
        if features == 0:
            raise ValueError("num_embeddings: expected None without continuous features")
        if not callable(getattr(module, "get_output_shape", None)):
            raise TypeError(
                f"num_embeddings: expected a module with get_output_shape(), got {type(module)}"
            )
        if getattr(module, "linear0", module) is None:
            raise ValueError(
                "num_embeddings: expected PiecewiseLinearEmbeddings with version='B', got version 'A'"
            )
        shape = tuple(module.get_output_shape())  # type: ignore[operator]
        if len(shape) != 2 or shape[0] != features:
            raise ValueError(
                f"num_embeddings: expected output shape ({features}, d) for n_num_features={features}, "
                f"got {shape}"
            )
        return shape[1]

    @classmethod
    def make(cls, **kwargs: Any) -> TabM:
        """A TabM with the package's defaults for what is not given: k=32, 3 blocks of 512 (2 with embeddings)."""
        embedded = kwargs.get("num_embeddings") is not None
        packed = kwargs.get("arch_type") == "tabm-packed"
        defaults: dict[str, Any] = {
            "n_blocks": 2 if embedded else 3,
            "d_block": 512,
            "dropout": 0.1,
            "activation": "ReLU",
            "k": 32,
            "arch_type": "tabm",
            "start_scaling_init": None if packed else "normal" if embedded else "random-signs",
        }
        return cls(**(defaults | kwargs))

    @property
    def k(self) -> int:
        return self.backbone.k

    def _check_input(self, name: str, x: Tensor | None, features: int) -> None:
        if (x is None) != (features == 0):
            expected = "None" if features == 0 else f"a tensor of {features} features"
            raise RuntimeError(f"{name}: expected {expected}, got {'None' if x is None else 'one'}")
        if x is None:
            return
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
        numbers = name == "x_num"
        if not (x.is_floating_point() if numbers else x.dtype == torch.int64):
            expected = "a floating-point dtype" if numbers else "torch.int64"
            raise TypeError(f"{name}: expected {expected}, got {x.dtype}")
        if x.dim() not in (2, 3):
            raise ValueError(f"{name}: expected 2 or 3 dimensions, got shape {tuple(x.shape)}")
        if x.shape[-1] != features:
            raise RuntimeError(
                f"{name}: expected shape (B, {features}) or (B, {self.k}, {features}), "
                f"got {tuple(x.shape)}"
            )

    def forward(self, x_num: Tensor | None = None, x_cat: Tensor | None = None) -> Tensor:
        """x_num (B, n_num_features), x_cat (B, n_cat_features) of whole numbers -> (B, k, d_out)."""
        self._check_input("x_num", x_num, self._n_num_features)
        self._check_input("x_cat", x_cat, self._n_cat_features)
        if x_num is not None and x_cat is not None and x_num.shape[:-1] != x_cat.shape[:-1]:
            raise ValueError(
                f"x_cat: expected shape {tuple(x_num.shape[:-1])} before the features (that of x_num), "
                f"got {tuple(x_cat.shape)}"
            )
        given = x_num if x_num is not None else x_cat
        assert given is not None
        parts = []
        if x_num is not None:
            x_num = x_num.flatten(0, -2)
            parts.append(x_num if self.num_module is None else self.num_module(x_num).flatten(1))
        if x_cat is not None:
            assert self.cat_module is not None
            dtype = parts[0].dtype if parts else next(self.backbone.parameters()).dtype
            parts.append(self.cat_module(x_cat.flatten(0, -2)).to(dtype))
        x = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        if given.dim() == 3:
            x = x.unflatten(0, given.shape[:2])
        mini = isinstance(self.backbone, MLPBackboneMiniEnsemble)
        if x.dim() == 3 or mini or not _silent(self.ensemble_view):
            x = self.ensemble_view(x)
        x = self.backbone(x)
        return x if self.output is None else self.output(x)

    def fold_for_inference(self) -> TabM:
        """A "tabm-packed" model of the same values, the scales multiplied into a weight for each member.

        It has k times the weights; see `solera.ensemble.fold_for_inference` for when that pays.
        """
        blocks = self.backbone.blocks
        if isinstance(self.backbone, MLPBackboneEnsemble):
            layers = [(b[0].weight, b[0].bias) for b in blocks]
        else:
            if isinstance(self.backbone, MLPBackboneMiniEnsemble):
                affine = self.backbone.affine
                shared: list[tuple] = [(b[0].weight, None, None, b[0].bias) for b in blocks]
                shared[0] = (shared[0][0], affine.weight, None, shared[0][3])
            else:
                shared = [(b[0].weight, b[0].r, b[0].s, b[0].bias) for b in blocks]
            layers = fold_for_inference(shared, members=self.k)
        folded = TabM.__new__(TabM)
        nn.Module.__init__(folded)
        folded.num_module, folded.cat_module = self.num_module, self.cat_module
        folded.ensemble_view, folded.output = self.ensemble_view, self.output
        folded._n_num_features, folded._n_cat_features = self._n_num_features, self._n_cat_features
        weight = layers[0][0]
        folded.backbone = MLPBackboneEnsemble(
            d_in=weight.shape[1],
            n_blocks=len(blocks),
            d_block=weight.shape[2],
            dropout=blocks[0][2].p,
            activation=type(blocks[0][1]).__name__,
            k=self.k,
        ).to(weight)
        with torch.no_grad():
            for block, (w, b) in zip(folded.backbone.blocks, layers):
                block[0].weight.copy_(w)
                if b is None:
                    block[0].bias.zero_()
                else:
                    block[0].bias.copy_(b)
        return folded.train(self.training)
