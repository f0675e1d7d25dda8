"""The functions of the PyPI package `tabm` 0.0.3 by name and arguments, over Solera's classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, nn

from .ensemble import SCALING_INITS, LinearBatchEnsemble, LinearEnsemble, _init_scaling_
from .tabm_layers import BatchNorm1dEnsemble, LayerNormEnsemble, as_members

Layer = TypeVar("Layer", bound=nn.Module)


def init_scaling_(x: Tensor, distribution: str, chunks: list[int] | None = None) -> Tensor:
    """Draws scales in place: one number an element, or one a chunk of consecutive elements of each row.

    Args:
        x: (..., D).
        distribution: "ones", "normal" or "random-signs".
        chunks: sizes that add up to D; None with "ones".

    Shapes: (..., D) -> x.

    Raises:
        ValueError: naming the argument that does not fit.

    Source: `tabm.init_scaling_` (Gorishniy et al., "TabM", ICLR 2025).
    """
    if distribution not in SCALING_INITS:
        raise ValueError(f"distribution: expected one of {SCALING_INITS}, got {distribution!r}")
    if chunks is not None and (distribution == "ones" or x.dim() < 1 or sum(chunks) != x.shape[-1]):
        raise ValueError(
            "chunks: expected sizes that add up to the last dimension of x, or None (always with 'ones'), got "
            f"{chunks!r} for x of shape {tuple(x.shape)} and {distribution!r}"
        )
    _init_scaling_(x, distribution, chunks)
    return x


def ensemble_view(x: Tensor, k: int, training: bool) -> Tensor:
    """`solera.nn.EnsembleView` as a function: (B, D) as (B, k, D) without a copy; (B, k, D) as it is.

    Shapes: x (B, D) or (B, k, D) -> (B, k, D).

    Raises:
        ValueError: another rank, or another number of members than k.

    Source: `tabm.ensemble_view` (Gorishniy et al., "TabM", ICLR 2025).
    """
    return as_members(x, k, training)


def _replace(
    module: nn.Module,
    kind: type[Layer],
    make: Callable[..., nn.Module],
    include: list[Layer] | None,
    exclude: list[Layer] | None,
    options: dict[str, Any],
) -> None:
    if include is not None and exclude is not None:
        raise ValueError("include: expected include or exclude, got both")
    inside = {id(m) for m in module.modules()}
    for name, chosen in (("include", include), ("exclude", exclude)):
        for i, layer in enumerate(chosen or []):
            if not isinstance(layer, kind):
                raise ValueError(
                    f"{name}[{i}]: expected a {kind.__name__}, got {type(layer).__name__}"
                )
            if id(layer) not in inside:
                raise ValueError(f"{name}[{i}]: expected a submodule of module")
    kept = {id(layer) for layer in exclude or []}
    wanted = None if include is None else {id(layer) for layer in include}
    _replace_children(module, kind, make, wanted, kept, options)


def _replace_children(module, kind, make, wanted, kept, options) -> None:
    for name, child in list(module.named_children()):
        if not isinstance(child, kind):
            _replace_children(child, kind, make, wanted, kept, options)
        elif id(child) not in kept and (wanted is None or id(child) in wanted):
            module.add_module(name, make(child, **options))


def ensemble_linear_layers_(
    module: nn.Module,
    *,
    include: list[nn.Linear] | None = None,
    exclude: list[nn.Linear] | None = None,
    **kwargs: Any,
) -> None:
    """Puts `LinearEnsemble.from_linear(layer, **kwargs)` in the place of a module's linear layers.

    Args:
        module: changed; itself it stays what it is.
        include: only these submodules; exclude: all but these.
        kwargs: of `from_linear`: k, and copy=True for members that start from the layer's values.

    Shapes: the layers then take (B, k, I) and return (B, k, O).

    Raises:
        ValueError: include and exclude together, or entries that are no such submodules.

    Source: `tabm.ensemble_linear_layers_` (Gorishniy et al., "TabM", ICLR 2025).
    """
    _replace(module, nn.Linear, LinearEnsemble.from_linear, include, exclude, kwargs)


def batchensemble_linear_layers_(
    module: nn.Module,
    *,
    include: list[nn.Linear] | None = None,
    exclude: list[nn.Linear] | None = None,
    **kwargs: Any,
) -> None:
    """Puts `LinearBatchEnsemble.from_linear(layer, **kwargs)` in the place of a module's linear layers.

    Args:
        module, include, exclude: as `ensemble_linear_layers_`.
        kwargs: of `from_linear`: k, scaling_init, and copy=True for a weight that starts as the layer's.

    Shapes: the layers then take (B, k, I) and return (B, k, O).

    Raises:
        ValueError: include and exclude together, or entries that are no such submodules.

    Source: `tabm.batchensemble_linear_layers_` (Gorishniy et al., "TabM", ICLR 2025).
    """
    _replace(module, nn.Linear, LinearBatchEnsemble.from_linear, include, exclude, kwargs)


def ensemble_batchnorm1d_layers_(
    module: nn.Module,
    *,
    include: list[nn.BatchNorm1d] | None = None,
    exclude: list[nn.BatchNorm1d] | None = None,
    **kwargs: Any,
) -> None:
    """Puts `BatchNorm1dEnsemble.from_batchnorm1d(layer, **kwargs)` in the place of batch normalizations.

    Args:
        module, include, exclude: as `ensemble_linear_layers_`.
        kwargs: k.

    Shapes: the layers then take and return (B, k, D).

    Raises:
        ValueError: include and exclude together, or entries that are no such submodules.

    Source: `tabm.ensemble_batchnorm1d_layers_` (Gorishniy et al., "TabM", ICLR 2025).
    """
    make = BatchNorm1dEnsemble.from_batchnorm1d
    _replace(module, nn.BatchNorm1d, make, include, exclude, kwargs)


def ensemble_layernorm_layers_(
    module: nn.Module,
    *,
    include: list[nn.LayerNorm] | None = None,
    exclude: list[nn.LayerNorm] | None = None,
    **kwargs: Any,
) -> None:
    """Puts `LayerNormEnsemble.from_layernorm(layer, **kwargs)` in the place of layer normalizations.

    Args:
        module, include, exclude: as `ensemble_linear_layers_`.
        kwargs: k.

    Shapes: the layers then take and return (*, k, *normalized_shape).

    Raises:
        ValueError: include and exclude together, or entries that are no such submodules.

    Source: `tabm.ensemble_layernorm_layers_` (Gorishniy et al., "TabM", ICLR 2025).
    """
    _replace(module, nn.LayerNorm, LayerNormEnsemble.from_layernorm, include, exclude, kwargs)
