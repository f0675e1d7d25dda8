r"""Batch normalisation: each channel by its mean and variance over samples and positions.

$$y = \mathrm{act}\Bigl(\frac{x - \mu_c}{\sqrt{\sigma^2_c + \varepsilon}}\,w_c + b_c + \mathrm{residual}\Bigr)$$

In training $\mu_c, \sigma^2_c$ are those of the batch, and the running statistics move towards them: core `group_norm`.
Otherwise they are the running ones, and with a process group those of the batches of all its ranks: core
`channel_norm`. There a channel's moments are merged from those of its samples,
$\sigma^2 = \overline{\sigma^2_n} + \overline{(\mu_n - \mu)^2}$, and across ranks by Chan's rule with their counts.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import _check
from .._activation import activation_code
from .._registry import accumulate_type
from ._statistics import positions
from .channel_norm import channel_norm
from .group_norm import check_channels, empty_norm, grouped_norm, more_than_one


def merged(mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """(1, C) moments of the batch from those of its samples (N, C), which have equal counts."""
    if mean.shape[0] == 1:
        return mean, var
    center = mean.mean(0, keepdim=True)
    return center, (var + (mean - center).square()).mean(0, keepdim=True)


def affine_of(center: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float):
    """(center, scale, shift) of the usual norm; the parameters (C,) or broadcasting to var's shape."""
    scale = torch.rsqrt(var + eps)
    if weight is not None:
        scale = scale * weight
    return center, scale, torch.zeros_like(center) if bias is None else bias


def _stored(_mean, _var, mean, var, weight, bias, *, eps):
    return affine_of(mean, var, weight, bias, eps)


# ---- across ranks ------------------------------------------------------------------------------------


class _Everyone(torch.autograd.Function):
    """This rank's row -> the rows of all ranks. Each rank's gradient is the sum of what all ranks want of it."""

    @staticmethod
    def forward(ctx, mine, group, known):
        ctx.group = group
        if known:
            return known[0].clone()
        rank, size = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
        rows = mine.new_zeros(size, *mine.shape)
        rows[rank] = mine
        torch.distributed.all_reduce(rows, group=group)
        known.append(rows)
        return rows.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        grad = grad.contiguous().clone()
        torch.distributed.all_reduce(grad, group=ctx.group)
        return grad[torch.distributed.get_rank(ctx.group)], None, None


class Synchronised:
    """The batch's combine with the moments of all ranks of a process group.

    One all-reduce of a (ranks, 3, C) table in which each rank fills its row (count, mean, variance): a sum
    with zeros is exact, so all ranks merge the same numbers in the same order. The table is kept until
    backward, which sends one more all-reduce, of its gradient.
    """

    def __init__(self, group, values: int, eps: float):
        self.group, self.values, self.eps = group, values, eps
        self.known: list[Tensor] = []

    def moments(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Count (), mean and variance (1, C) over all ranks."""
        if mean.shape[0]:
            mean, var = merged(mean, var)
        else:
            mean = var = mean.sum(0, keepdim=True)
        count = torch.full_like(mean, float(self.values))
        rows = _Everyone.apply(torch.cat([count, mean, var]), self.group, self.known)
        counts, means, variances = rows.unbind(1)
        share = counts / counts.sum(0)
        center = (share * means).sum(0, keepdim=True)
        spread = (share * (variances + (means - center).square())).sum(0, keepdim=True)
        return counts[:, 0].sum(), center, spread

    def __call__(self, mean, var, weight, bias):
        _, center, spread = self.moments(mean, var)
        return affine_of(center, spread, weight, bias, self.eps)


# ---- running statistics ------------------------------------------------------------------------------


def running_pair(mean: object, var: object, x: Tensor, required: bool) -> None:
    """Both running statistics of shape (C,), or neither."""
    for name, value in (("running_mean", mean), ("running_var", var)):
        if value is not None:
            _check.like(name, value, x.shape[1:2], x)
        elif required:
            raise ValueError(f"{name}: expected a tensor of shape ({x.shape[1]},), got None")
    if (mean is None) != (var is None):
        missing = "running_mean" if mean is None else "running_var"
        raise ValueError(f"{missing}: expected both running statistics or neither, got None")


@torch.no_grad()
def update_running(running: Tensor, new: Tensor, momentum: float | Tensor) -> None:
    """running = (1 - momentum) running + momentum new, in the new value's dtype, rounded once."""
    if running.dtype == new.dtype:
        running.mul_(1 - momentum).add_(new * momentum)
    else:
        running.copy_(running.to(new.dtype) * (1 - momentum) + new * momentum)


def stored_statistics(x, mean, var, weight, bias, eps, activation, residual) -> Tensor:
    """x brought to scale by given means and variances (C,)."""
    combine = partial(_stored, eps=eps)
    params = (mean, var, weight, bias)
    return channel_norm(
        x, combine, params, activation=activation, residual=residual, moments=False, batch=True
    )[0]


# ---- public functions --------------------------------------------------------------------------------


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    group: torch.distributed.ProcessGroup | None = None,
) -> Tensor:
    r"""Batch normalisation, optionally with a residual and an activation in the same pass.

    $y = \mathrm{act}((x - \mu_c)\,/\sqrt{\sigma^2_c + \varepsilon}\;w_c + b_c + \mathrm{residual})$.

    Args:
        x: (N, C, *), contiguous or channels-last (kept), float32, float64, bfloat16 or float16;
            computed in float32 (float64 for float64).
        running_mean, running_var: (C,), both or neither. In training they are updated in place (the
            variance unbiased); otherwise x is normalised by them.
        weight, bias: (C,); may be float32 with a half-precision x.
        training: statistics of the batch instead of the running ones.
        momentum: weight of the batch in running = (1 - momentum) running + momentum batch. The modules'
            momentum=None (the cumulative average) is 1 / number of batches so far.
        activation: None, "relu", "gelu", "silu" or "sigmoid".
        residual: like x, added before the activation.
        group: a process group whose ranks hold parts of one batch: statistics (and their gradient) are
            of all parts, by one all-reduce each way; ranks may hold batches of different sizes.

    Shapes: x (N, C, *) -> y (N, C, *).

    Raises:
        ValueError, TypeError: naming the argument whose shape, dtype or device does not fit; in training
            a single value a channel, as torch.

    Source: Ioffe, Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal
    Covariate Shift", 2015.
    """
    _check.tensor("x", x, min_dim=2)
    check_channels("weight", weight, x)
    check_channels("bias", bias, x)
    if residual is not None:
        _check.like("residual", residual, x.shape, x)
        _check.same_dtype("residual", residual, x)
    eps = _check.number("eps", eps, low=0.0)
    momentum = _check.number("momentum", momentum)
    code = activation_code(activation)
    running_pair(running_mean, running_var, x, required=not training)
    values = x.shape[0] * positions(x)
    if not training:
        if x.numel() == 0:
            return empty_norm(x, weight, bias, residual, code)
        return stored_statistics(x, running_mean, running_var, weight, bias, eps, code, residual)
    if eps == 0.0:
        raise ValueError("eps: expected a positive number in training, got 0.0")
    if group is None:
        more_than_one(values, x, "value per channel")
        if x.numel() == 0:
            return empty_norm(x, weight, bias, residual, code)
        y, mean, var = grouped_norm(
            x, weight, bias, batch=True, eps=eps, activation=code, residual=residual
        )
    else:
        combine = Synchronised(group, values, eps)
        y, mean, var = channel_norm(
            x, combine, (weight, bias), activation=code, residual=residual, batch=True
        )
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            count: int | Tensor = values
            if group is not None:
                count, mean, var = combine.moments(mean, var)
            update_running(running_mean, mean[0], momentum)
            update_running(running_var, var[0] * (count / (count - 1)), momentum)
    return y


def fold_batch_norm(
    weight: Tensor,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    r"""Weight and bias of a linear or convolution layer that does what the layer and its batch norm do in evaluation.

    $W' = W\,s$ by output channel and $b' = (b - \mu)\,s + \beta$ with $s = \gamma/\sqrt{\sigma^2 + \varepsilon}$.

    Args:
        weight: (O, *), output channels first, as nn.Linear and nn.Conv hold it.
        bias: (O,) or None.
        running_mean, running_var, bn_weight, bn_bias: (O,), the last two may be None.

    Shapes: weight (O, *) -> (O, *); bias -> (O,). Differentiable; computed in float32 (float64 for float64).

    Raises:
        ValueError, TypeError: naming the argument whose shape, dtype or device does not fit.

    Source: Ioffe, Szegedy, "Batch Normalization", 2015, section 3.1 (inference is one linear map).
    """
    _check.tensor("weight", weight, min_dim=1)
    shape = weight.shape[:1]
    for name, t, needed in (
        ("bias", bias, False),
        ("running_mean", running_mean, True),
        ("running_var", running_var, True),
        ("bn_weight", bn_weight, False),
        ("bn_bias", bn_bias, False),
    ):
        if t is not None or needed:
            _check.like(name, t, shape, weight, "weight")
    eps = _check.number("eps", eps, low=0.0)
    acc = accumulate_type(weight)
    scale = torch.rsqrt(running_var.to(acc) + eps)
    if bn_weight is not None:
        scale = scale * bn_weight.to(acc)
    shift = -running_mean.to(acc) if bias is None else bias.to(acc) - running_mean.to(acc)
    shift = shift * scale
    if bn_bias is not None:
        shift = shift + bn_bias.to(acc)
    folded = weight.to(acc) * scale.view(-1, *[1] * (weight.dim() - 1))
    return folded.to(weight.dtype), shift.to(weight.dtype)
