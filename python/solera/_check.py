"""Argument checks of the public functions: each error names the argument, what was expected, what came."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._route import autocast_enabled

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _came(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}, {value.dtype} on {value.device}"
    return f"{type(value).__name__} {value!r}"


def tensor(name: str, value: object, *, dim: int | None = None, min_dim: int = 0) -> Tensor:
    """A floating-point tensor of the stated rank."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {_came(value)}")
    if value.dtype not in FLOATS:
        raise TypeError(
            f"{name}: expected float32, float64, bfloat16 or float16, got {value.dtype} "
            f"(shape {tuple(value.shape)})"
        )
    if dim is not None and value.dim() != dim:
        raise ValueError(f"{name}: expected {dim} dimensions, got shape {tuple(value.shape)}")
    if value.dim() < min_dim:
        raise ValueError(
            f"{name}: expected at least {min_dim} dimension(s), got shape {tuple(value.shape)}"
        )
    return value


def like(name: str, value: object, shape: tuple[int, ...], x: Tensor, x_name: str = "x") -> None:
    """A floating-point tensor of exactly this shape, on x's device; its dtype may differ from x's.

    float64 is the exception: it must match, since an op computes in x's precision.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor or None, got {_came(value)}")
    if value.shape != shape:
        raise ValueError(
            f"{name}: expected shape {tuple(shape)} to go with {x_name} of shape "
            f"{tuple(x.shape)}, got {tuple(value.shape)}"
        )
    if value.dtype is not x.dtype:
        if value.dtype not in FLOATS:
            raise TypeError(
                f"{name}: expected float32, float64, bfloat16 or float16, got {value.dtype}"
            )
        if value.dtype is torch.float64:
            raise TypeError(
                f"{name}: float64 with {x_name} of {x.dtype} would lose its precision; "
                f"convert {name} or {x_name} first"
            )
    if value.device != x.device:
        raise ValueError(
            f"{name}: expected device {x.device} (that of {x_name}), got {value.device}"
        )


def same_dtype(name: str, value: Tensor, x: Tensor, x_name: str = "x") -> None:
    """value has x's dtype."""
    if value.dtype is not x.dtype:
        raise TypeError(f"{name}: expected {x.dtype} (that of {x_name}), got {value.dtype}")


def product_dtype(name: str, value: Tensor, x: Tensor, x_name: str = "x") -> None:
    """value has x's dtype, unless autocast is about to give both one: torch's products take no mixture."""
    if value.dtype is not x.dtype and not autocast_enabled(x):
        raise TypeError(f"{name}: expected {x.dtype} (that of {x_name}), got {value.dtype}")


def same_device(name: str, value: Tensor, x: Tensor, x_name: str = "x") -> None:
    """value lies on x's device."""
    if value.device != x.device:
        raise ValueError(
            f"{name}: expected device {x.device} (that of {x_name}), got {value.device}"
        )


def count(name: str, value: object, low: int = 1) -> int:
    """A Python int of at least `low`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{name}: expected an int, at least {low}, got {value!r}")
    return value


def number(name: str, value: object, *, low: float = -math.inf, high: float = math.inf) -> float:
    """A finite Python number in [low, high]."""
    try:
        result = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected a number, got {_came(value)}") from None
    # Comparisons instead of math.isfinite: a number that torch.compile made symbolic passes through them.
    if not (-math.inf < result < math.inf and low <= result <= high):
        bounds = f" in [{low:g}, {high:g}]" if (low, high) != (-math.inf, math.inf) else ""
        raise ValueError(f"{name}: expected a finite number{bounds}, got {value!r}")
    return result


def choice(name: str, value: object, options: tuple[object, ...]) -> None:
    """value is one of the options."""
    if value not in options:
        raise ValueError(f"{name}: expected one of {options}, got {value!r}")
