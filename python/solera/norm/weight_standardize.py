"""Weights brought to mean 0 and a fixed variance before use: a few lines over core `channel_norm`."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _check
from .channel_norm import channel_norm

EPS_MODES = ("clamp", "add")


class _Standardize:
    """The combine function, comparable so that a compiled graph is found again."""

    def __init__(self, fan_in: int, gamma: float, eps: float, add: bool):
        self.numbers = (fan_in, gamma, eps, add)

    def __call__(self, mean: Tensor, var: Tensor, gain: Tensor | None):
        fan_in, gamma, eps, add = self.numbers
        total = var * fan_in
        total = total + eps * fan_in if add else total.clamp_min(eps)
        scale = gamma * total.rsqrt()
        if gain is not None:
            scale = scale * gain
        return mean, scale, torch.zeros_like(mean)


def scaled_weight_standardize(
    weight: Tensor,
    gain: Tensor | None = None,
    *,
    gamma: float = 1.0,
    eps: float = 1e-4,
    eps_mode: str = "clamp",
) -> Tensor:
    r"""Scaled weight standardisation: each output's weights with mean 0 and variance gamma^2 / fan-in.

    $\hat w_o = \gamma\, \mathrm{gain}_o\, (w_o - \mu_o) / \sqrt{\max(N \sigma_o^2, \epsilon)}$ with the mean and the
    biased variance over the N inputs of output o.

    Args:
        weight: (O, *), a convolution's or a linear layer's.
        gain: O numbers of any shape, (O,) or (O, 1, 1, 1).
        gamma: the factor that makes an activation keep variances.
        eps: see eps_mode.
        eps_mode: "clamp" is the formula above (the paper's code); "add" divides by
            $\sqrt{N (\sigma_o^2 + \epsilon)}$, as timm's ScaledStdConv2d does with eps 1e-6.

    Shapes: (O, *) -> the same. float32, float64, bfloat16, float16. Differentiable, also twice.

    Raises:
        ValueError, TypeError: naming the argument.

    Source: Brock et al., "High-Performance Large-Scale Image Recognition Without Normalization", 2021; Brock et
    al., "Characterizing signal propagation to close the performance gap in unnormalized ResNets", 2021.
    """
    _check.tensor("weight", weight, min_dim=2)
    outputs = weight.shape[0]
    if gain is not None:
        _check.tensor("gain", gain)
        if gain.numel() != outputs:
            raise ValueError(f"gain: expected {outputs} numbers, got shape {tuple(gain.shape)}")
        gain = gain.reshape(outputs)
        _check.like("gain", gain, (outputs,), weight, "weight")
        gain = gain[:, None]
    gamma = _check.number("gamma", gamma)
    eps = _check.number("eps", eps, low=0.0)
    _check.choice("eps_mode", eps_mode, EPS_MODES)
    if weight.numel() == 0:
        return weight.clone()
    rows = weight.reshape(outputs, 1, -1)
    combine = _Standardize(rows.shape[2], gamma, eps, eps_mode == "add")
    return channel_norm(rows, combine, (gain,))[0].view(weight.shape)
