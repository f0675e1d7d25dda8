"""Residual scaling by a feature's own deviation, and gated sums of streams, on core `channel_norm`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _check
from .._registry import accumulate_type
from ._statistics import bessel, features, per_channel, positions, std_of
from .channel_norm import channel_norm, moments


def _scaled(mean, var, scale):
    zero = scale.new_zeros(())
    return zero, scale, zero


def _scalar(name, value, x) -> Tensor:
    if not isinstance(value, Tensor):
        return x.new_full((), _check.number(name, value), dtype=accumulate_type(x))
    if value.numel() != 1:
        raise ValueError(f"{name}: expected one element, got shape {tuple(value.shape)}")
    _check.like(name, value, value.shape, x, "y")
    return value.reshape(()).to(accumulate_type(x))


def adaptive_deviation_scale(
    y: Tensor,
    skip: Tensor,
    weight: Tensor | float,
    bias: Tensor | float = 0.0,
    *,
    log_domain: bool = False,
    correction: int = 1,
) -> Tensor:
    r"""Adaptive deviation: $\mathrm{skip} + y\,\phi(\sigma)$, $\sigma$ the deviation of `skip` over (C, *) of a sample.

    $\phi(\sigma) = w\,\sigma + b$, or with `log_domain` $\phi(\sigma) = \exp(w \log\sigma + b)$ (AdaDM).

    Args:
        y: (N, C, *), the residual branch after its normalisation.
        skip: like y, what the branch is added to.
        weight, bias: one element each (a tensor to be trained, or a number); QuantNAS starts from 1.5 and 0.
        correction: 1 as torch.std, 0 for the biased deviation.

    Shapes: y (N, C, *) -> (N, C, *). Gradients reach y, skip (through $\sigma$ too), weight and bias.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: "QuantNAS for super resolution: searching for efficient quantization-friendly architectures against
    quantization noise" and its code; the form in logarithms is AdaDM's (Liu et al., 2021).
    """
    features("y", y)
    _check.like("skip", skip, y.shape, y, "y")
    _check.same_dtype("skip", skip, y, "y")
    weight, bias = _scalar("weight", weight, y), _scalar("bias", bias, y)
    ratio = bessel(y.shape[1] * positions(y), correction, "skip: each sample")
    # The moments of a whole sample do not depend on the order of its elements: both layouts are one row.
    rows = skip if skip.is_contiguous() else skip.movedim(1, -1)
    var = moments(rows.reshape(y.shape[0], 1, -1))[1] if y.numel() else skip.new_ones(1, 1)
    std = std_of(var * ratio, 0.0)
    phi = torch.exp(weight * torch.log(std) + bias) if log_domain else weight * std + bias
    return channel_norm(y, _scaled, (phi,), residual=skip, moments=False)[0]


def gated_stream_sum(x: Tensor | Sequence[Tensor], gate: Tensor | Sequence[Tensor]) -> Tensor:
    r"""Unified aggregation of streams: $y = \sum_t g_t \odot x_t$, a gate for each sample and channel.

    Args:
        x: T streams of (N, C, *) each: a tensor (T, N, C, *) or a sequence, which is not stacked.
        gate: (T, N, C), or a sequence of T gates (N, C), with or without trailing ones.

    Shapes: (T, N, C, *) and (T, N, C) -> (N, C, *). The rest of OSNet-AIN's block is
    `conditional_instance_norm(y, scale=weight, shift=bias, residual=x, activation="relu")`.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Zhou et al., "Learning Generalisable Omni-Scale Representations for Person Re-Identification", 2021.
    """
    streams, gates = list(x), list(gate)
    if not streams or len(streams) != len(gates):
        raise ValueError(
            f"gate: expected one for each stream of x, got {len(gates)} gates for {len(streams)} streams"
        )
    first = features("x", streams[0])
    total: Tensor | None = None
    for stream, g in zip(streams, gates):
        _check.like("x", stream, first.shape, first, "its first stream")
        _check.same_dtype("x", stream, first, "its first stream")
        scale = per_channel("gate", g, first)
        total = channel_norm(stream, _scaled, (scale,), residual=total, moments=False)[0]
    return first if total is None else total
