"""Instance normalisation, on core `group_norm`: group normalisation with one channel a group."""

from __future__ import annotations

from torch import Tensor

from .. import _check
from ._statistics import positions
from .batch_norm import running_pair, stored_statistics, update_running
from .group_norm import check_channels, empty_norm, grouped_norm, more_than_one


def instance_norm(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    r"""Instance normalisation: each channel of each sample by its own mean and variance.

    $y = (x - \mu_{nc})\,/\sqrt{\sigma^2_{nc} + \varepsilon}\;w_c + b_c$ with biased, centred variances.

    Args:
        x: (N, C, *), contiguous or channels-last (kept), float32, float64, bfloat16 or float16.
        running_mean, running_var: (C,). With input statistics they are updated in place by the mean over
            samples of the means and unbiased variances; without, they are what x is normalised by.
        weight, bias: (C,); may be float32 with a half-precision x.
        use_input_stats: False normalises by the running statistics.
        momentum: weight of the new statistics, in running = (1 - momentum) running + momentum new.

    Shapes: x (N, C, *) -> y (N, C, *).

    Raises:
        ValueError, TypeError: naming the argument whose shape, dtype or device does not fit; a single
            position a channel, as torch.

    Source: Ulyanov, Vedaldi, Lempitsky, "Instance Normalization: The Missing Ingredient for Fast
    Stylization", 2016.
    """
    _check.tensor("x", x, min_dim=2)
    check_channels("weight", weight, x)
    check_channels("bias", bias, x)
    eps = _check.number("eps", eps, low=0.0)
    momentum = _check.number("momentum", momentum)
    running_pair(running_mean, running_var, x, required=not use_input_stats)
    size = positions(x)
    if use_input_stats:
        more_than_one(size, x, "spatial element")
    if x.numel() == 0:
        return empty_norm(x, weight, bias, None, 0)
    if not use_input_stats:
        return stored_statistics(x, running_mean, running_var, weight, bias, eps, 0, None)
    y, mean, var = grouped_norm(x, weight, bias, groups=x.shape[1], eps=eps)
    if running_mean is not None and running_var is not None:
        update_running(running_mean, mean.mean(0), momentum)
        update_running(running_var, var.mean(0) * (size / (size - 1)), momentum)
    return y
