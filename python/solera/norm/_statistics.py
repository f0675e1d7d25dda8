"""What the functions over `channel_norm` share: checks of per-channel arguments, and moments made of moments."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .. import _check

EPS_PLACES = ("variance", "std")


def features(name: str, x: object) -> Tensor:
    """A floating-point (N, C, *) with at least one spatial dimension."""
    return _check.tensor(name, x, min_dim=3)


def positions(x: Tensor) -> int:
    """How many positions a channel of x (N, C, *) has."""
    count = 1
    for extent in x.shape[2:]:
        count = count * extent
    return count


def per_channel(name: str, t: object, x: Tensor, x_name: str = "x") -> Tensor:
    """(C,), (1, C) or (N, C), with or without trailing ones -> (1 or N, C)."""
    value = _check.tensor(name, t, min_dim=1)
    n, c = x.shape[:2]
    shape = tuple(value.shape)
    fits = shape == (c,) or (
        len(shape) > 1
        and shape[1] == c
        and (shape[0] == 1 or shape[0] == n)
        and all(extent == 1 for extent in shape[2:])
    )
    if not fits:
        raise ValueError(
            f"{name}: expected shape ({c},) or ({n}, {c}) to go with {x_name} of shape "
            f"{tuple(x.shape)}, got {shape}"
        )
    _check.like(name, value, value.shape, x, x_name)
    return value.reshape(-1, c) if c else value.reshape(1 if len(shape) == 1 else shape[0], 0)


def bessel(count: int, correction: int, what: str = "x: each channel") -> float:
    """count / (count - correction), which turns a biased variance into the corrected one."""
    if correction == 0 or count == 0:
        return 1.0
    if correction not in (0, 1):
        raise ValueError(f"correction: expected 0 or 1, got {correction!r}")
    if count <= correction:
        raise ValueError(
            f"{what}: expected more than {correction} value(s) for a variance with "
            f"correction={correction}, got {count}"
        )
    return count / (count - correction)


def check_correction(correction: object) -> None:
    """correction is 0 or 1."""
    if correction not in (0, 1) or isinstance(correction, bool):
        raise ValueError(f"correction: expected 0 or 1, got {correction!r}")


def std_of(var: Tensor, eps: float, eps_at: str = "variance") -> Tensor:
    """sqrt(var + eps), or sqrt(var) + eps, whose gradient is 0 (as that of torch.std) where var is 0."""
    if eps_at == "variance" and eps > 0:
        return torch.sqrt(var + eps)
    flat = var == 0
    std = torch.sqrt(torch.where(flat, 1.0, var))
    return torch.where(flat, 0.0, std) + eps


def pooled(mean: Tensor, var: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each group of channels, (N, groups), from those of its channels (N, C)."""
    n, c = mean.shape
    m, v = mean.reshape(n, groups, c // groups), var.reshape(n, groups, c // groups)
    center = m.mean(-1, keepdim=True)
    return center.squeeze(-1), v.mean(-1) + (m - center).square().mean(-1)


def to_channels(t: Tensor, channels: int) -> Tensor:
    """(N, groups) -> (N, C), each group's value for all its channels."""
    n, groups = t.shape
    return t.unsqueeze(-1).expand(n, groups, channels // groups).reshape(n, channels)


def group_count(name: str, groups: object, channels: int) -> int:
    """A positive divisor of the number of channels."""
    if isinstance(groups, bool) or not isinstance(groups, int):
        raise TypeError(
            f"{name}: expected a positive integer, got {type(groups).__name__} {groups!r}"
        )
    if groups <= 0 or channels % groups:
        raise ValueError(f"{name}: expected a divisor of the {channels} channels, got {groups}")
    return groups


def row_lengths(lengths: object, x: Tensor) -> Tensor | None:
    """(N,) int64 on x's device, each between 0 and the extent of x's one spatial dimension."""
    if lengths is None:
        return None
    if not isinstance(lengths, Tensor):
        raise TypeError(f"lengths: expected a torch.Tensor or None, got {type(lengths).__name__}")
    if lengths.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"lengths: expected int64 or int32, got {lengths.dtype}")
    if x.dim() != 3:
        raise ValueError(
            f"lengths: expected x (N, C, T), one spatial dimension, got {tuple(x.shape)}"
        )
    if lengths.shape != x.shape[:1] or lengths.device != x.device:
        raise ValueError(
            f"lengths: expected shape {tuple(x.shape[:1])} on {x.device}, got "
            f"{tuple(lengths.shape)} on {lengths.device}"
        )
    lengths = lengths.long()
    if lengths.is_cpu and not is_compiling() and lengths.numel():
        low, high = int(lengths.min()), int(lengths.max())
        if low < 0 or high > x.shape[2]:
            raise ValueError(f"lengths: expected values in [0, {x.shape[2]}], got {low} to {high}")
    return lengths.clamp(0, x.shape[2])
