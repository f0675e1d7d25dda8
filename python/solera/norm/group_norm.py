r"""Core `group_norm`: the norms whose statistics are plain means over groups of channels, or over the batch.

$$y = \mathrm{act}(z),\qquad z = (x - \mu)\,r\,w + b\;[+\ \mathrm{residual}],\qquad
  r = (\kappa\,\sigma^2 + \varepsilon)^{-1/2}$$

with $\mu, \sigma^2$ over the positions and channels of a group of one sample (group norm; instance norm with one
channel a group) or over the positions of a channel in all samples (batch norm), n values each. w and b are
one a channel, or one a channel and sample (AdaIN). $\kappa = 1$, or n/(n-1) for the unbiased variance.

Core `channel_norm` computes the same with its variants written in Python; this one has the statistics inside
the kernel, so that x is read once while a group of it is in the cache, and a small call is one op.

Backward, with $g = \mathrm{d}y\,\mathrm{act}'(z)$, $d = x - \mu$ and sums over positions for each (sample, channel):

$$\mathrm{d}b = \sum g,\qquad \mathrm{d}w = r\sum g\,d,\qquad \mathrm{d}x = g\,r\,w + p\,d + q,$$
$$p = -\frac{\kappa r^3}{n} \sum_{\text{group}} w \sum g\,d,\qquad q = -\frac{r}{n} \sum_{\text{group}} w \sum g :$$

z depends on x directly, through r ($\mathrm{d}r = \sum w \sum g d$, $\partial r/\partial\sigma^2 =
-\tfrac12 \kappa r^3$, $\partial\sigma^2/\partial x = 2d/n$) and through $\mu$
($\mathrm{d}\mu = -\sum w r \sum g$, 1/n each; $\sigma^2$ is stationary in $\mu$).

Saved for backward: x, the moments and the parameters (and the residual where an activation needs it).

Sources: Wu, He, "Group Normalization", 2018; Ioffe, Szegedy, "Batch Normalization", 2015.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _check
from .._activation import activate, activation_code, delta_of
from .._autograd import differentiable_vjp
from .._registry import accumulate_type, reference
from .._route import needs_graph, use_reference
from ._statistics import positions

_op = torch.ops.solera


# ---- reference ---------------------------------------------------------------------------------------


def _grouped(v: Tensor, groups: int, batch: bool, last: bool) -> tuple[Tensor, tuple[int, ...]]:
    """(N, groups, channels, S) or its channels-last form, and the dimensions statistics run over."""
    n, a, b = v.shape
    if last:
        return v.reshape(n, a, groups, b // groups), (0, 1) if batch else (1, 3)
    return v.reshape(n, groups, a // groups, b), (0, 3) if batch else (2, 3)


def _check_channels(t: Tensor, acc: torch.dtype, last: bool) -> Tensor:
    """(C,) or (N, C) -> what broadcasts to x."""
    t = t.to(acc)
    t = t if t.dim() == 2 else t[None]
    return t[:, None] if last else t[..., None]


def _normalised(x, groups, batch, last, eps, correction):
    """(n = d r of x's shape, r that broadcasts to it, mean, var)."""
    v = x.to(accumulate_type(x))
    split, dims = _grouped(v, groups, batch, last)
    mean = split.mean(dims, keepdim=True)
    d = split - mean
    var = d.square().mean(dims, keepdim=True)
    rstd = torch.rsqrt(var * correction + eps)
    shape = (1, x.shape[2 if last else 1]) if batch else (x.shape[0], groups)
    return (d * rstd).reshape(x.shape), rstd, mean.reshape(shape), var.reshape(shape)


def _affine(normal, weight, bias, residual, last):
    z = normal
    if weight is not None:
        z = z * _check_channels(weight, z.dtype, last)
    if bias is not None:
        z = z + _check_channels(bias, z.dtype, last)
    return z if residual is None else z + residual.to(z.dtype)


def group_norm_reference(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    groups: int,
    batch: bool,
    last: bool,
    eps: float,
    correction: float,
    activation: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean, var) by the formula, in float32 (float64 for float64), y rounded to x's dtype."""
    if batch:
        groups = x.shape[2 if last else 1]
    normal, _, mean, var = _normalised(x, groups, batch, last, eps, correction)
    y = activate(_affine(normal, weight, bias, residual, last), activation)
    return y.to(x.dtype), mean, var


@reference("group_norm")
def _group_norm(*arguments):
    return tuple(
        t.contiguous()
        for t in group_norm_reference(
            *(a.contiguous() if i == 0 else a for i, a in enumerate(arguments))
        )
    )


@reference("group_norm_backward")
def _group_norm_backward(
    dy, x, weight, bias, residual, mean, var, groups, batch, last, eps, correction, activation,
    need_x, need_residual, need_affine,
):  # fmt: skip
    x = x.contiguous()
    if batch:
        groups = x.shape[2 if last else 1]
    normal, rstd, _, _ = _normalised(x, groups, batch, last, eps, correction)
    z = _affine(normal, weight, bias, residual, last) if activation else None
    g = delta_of(dy.contiguous(), z, activation)
    dx, dresidual = x.new_empty(0), x.new_empty(0)
    if need_x:
        h = g if weight is None else g * _check_channels(weight, g.dtype, last)
        h, dims = _grouped(h, groups, batch, last)
        n, _ = _grouped(normal, groups, batch, last)
        # p d = -correction r n mean(h n), since d = n / r.
        of_normal = correction * n * (h * n).mean(dims, keepdim=True)
        dx = ((h - h.mean(dims, keepdim=True) - of_normal) * rstd).reshape(x.shape)
        dx = dx.to(x.dtype).contiguous()
    if need_residual:
        dresidual = g.to(x.dtype).clone(memory_format=torch.contiguous_format)

    def gathered(each, parameter):
        if parameter is None or not need_affine:
            return each.new_empty(0)
        each = each.sum(1 if last else 2)
        return each if parameter.dim() == 2 else each.sum(0)

    return dx, dresidual, gathered(g * normal, weight), gathered(g, bias)


# ---- autograd ----------------------------------------------------------------------------------------


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, residual, options):
        y, mean, var = _op.group_norm(x, weight, bias, residual, *options)
        ctx.options, ctx.has_residual = options, residual is not None
        ctx.save_for_backward(x, weight, bias, residual if options[-1] else None, mean, var)
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)
        return y, mean, var

    @staticmethod
    def backward(ctx, dy, dmean=None, dvar=None):
        x, weight, bias, residual, mean, var = ctx.saved_tensors
        need_x, need_weight, need_bias, need_residual, _ = ctx.needs_input_grad
        if dy is None:
            return None, None, None, None, None
        if torch.is_grad_enabled():
            if residual is None and ctx.has_residual:
                # Without an activation y is linear in the residual: its value does not matter.
                residual = torch.zeros_like(x).requires_grad_(need_residual)

            def norm(*tensors):
                return group_norm_reference(*tensors, *ctx.options)[0]

            needs = (need_x, need_weight, need_bias, need_residual)
            return *differentiable_vjp(norm, (x, weight, bias, residual), needs, (dy,)), None
        groups, batch, last, eps, correction, activation = ctx.options
        dx, dresidual, dweight, dbias = _op.group_norm_backward(
            dy, x, weight, bias, residual, mean, var, groups, batch, last, eps, correction, activation,
            need_x, need_residual, need_weight or need_bias,
        )  # fmt: skip
        return (
            dx if need_x else None,
            dweight.to(weight.dtype) if need_weight else None,
            dbias.to(bias.dtype) if need_bias else None,
            dresidual if need_residual else None,
            None,
        )


# ---- the engine --------------------------------------------------------------------------------------


def grouped_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    groups: int = 0,
    batch: bool = False,
    eps: float = 1e-5,
    correction: float = 1.0,
    activation: int = 0,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""act((x - mean) (correction var + eps)^(-1/2) weight + bias + residual); arguments are checked by the caller.

    Args:
        x: (N, C, *), not empty, contiguous or channels-last (kept); other strides are copied once.
        weight, bias: None, (C,), or (N, C) unless `batch`.
        groups: of channels; or `batch` for statistics of each channel over all samples.
        correction: n / (n - 1) for the unbiased variance.
        activation: a code of `solera._activation`.
        residual: like x, added before the activation.

    Returns y and the biased moments, (N, groups) or (1, C), through which no gradient flows.
    """
    n, c = x.shape[:2]
    size = positions(x)
    moved = x.dim() > 2 and not x.is_contiguous() and x.movedim(1, -1).is_contiguous()
    last = moved or size == 1
    shape = (n, size, c) if last else (n, c, size)

    def flat(t):
        return (t.movedim(1, -1) if moved else t).reshape(shape)

    tensors = (flat(x), weight, bias, None if residual is None else flat(residual))
    options: tuple[Any, ...] = (groups, batch, last, eps, correction, activation)
    if use_reference():
        y, mean, var = group_norm_reference(*tensors, *options)
        mean, var = mean.detach(), var.detach()
    elif needs_graph(*tensors):
        y, mean, var = _GroupNorm.apply(*tensors, options)
    else:
        y, mean, var = _op.group_norm(*tensors, *options)
    if moved:
        return y.view(n, *x.shape[2:], c).movedim(-1, 1), mean, var
    return y.view(x.shape), mean, var


# ---- what the functions over it share ----------------------------------------------------------------


def check_channels(name: str, t: object, x: Tensor) -> None:
    """t is None or has shape (C,)."""
    if t is not None:
        _check.like(name, t, x.shape[1:2], x)


def more_than_one(count: int, x: Tensor, what: str) -> None:
    """Statistics of a single value say nothing: torch's error, in torch's words."""
    if count == 1:
        raise ValueError(
            f"x: Expected more than 1 {what} when training, got input size {list(x.shape)}"
        )


def empty_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, activation: int
) -> Tensor:
    """The result for x without elements: gradients of the parameters are 0, as torch's are."""
    shape = (1, x.shape[1], *[1] * (x.dim() - 2))
    y = x.clone()
    for t in (weight, bias):
        if t is not None:
            y = y + t.to(x.dtype).view(shape)
    return activate(y if residual is None else y + residual, activation)


# ---- public function ---------------------------------------------------------------------------------


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
) -> Tensor:
    r"""Group normalisation, optionally with an activation.

    $y = \mathrm{act}((x - \mu_g)\,/\sqrt{\sigma^2_g + \varepsilon}\;w_c + b_c)$ with the biased, centred variance of
    each of the `num_groups` groups of channels of a sample.

    Args:
        x: (N, C, *), contiguous or channels-last (kept), float32, float64, bfloat16 or float16;
            computed in float32 (float64 for float64).
        num_groups: a divisor of C.
        weight, bias: (C,); may be float32 with a half-precision x.
        activation: None, "relu", "gelu", "silu" or "sigmoid", applied in the same pass.

    Shapes: x (N, C, *) -> y (N, C, *).

    Raises:
        ValueError, TypeError: naming the argument whose shape, dtype or device does not fit; a single
            value a group, as torch.

    Source: Wu, He, "Group Normalization", 2018.
    """
    _check.tensor("x", x, min_dim=2)
    channels = x.shape[1]
    if isinstance(num_groups, bool) or not isinstance(num_groups, int | torch.SymInt):
        raise TypeError(
            f"num_groups: expected an integer, got {type(num_groups).__name__} {num_groups!r}"
        )
    if num_groups <= 0 or channels % num_groups:
        raise ValueError(
            f"num_groups: expected a positive divisor of the {channels} channels, got {num_groups}"
        )
    check_channels("weight", weight, x)
    check_channels("bias", bias, x)
    eps = _check.number("eps", eps, low=0.0)
    code = activation_code(activation)
    # torch's rule, to the letter: N C / groups counts as the values, whatever N.
    more_than_one(x.shape[0] * channels // num_groups * positions(x), x, "value per channel")
    if x.is_cuda and torch.is_autocast_enabled("cuda") and x.dtype != torch.float64:
        x = x.float()  # as torch's own
    if x.numel() == 0:
        return empty_norm(x, weight, bias, None, code)
    return grouped_norm(x, weight, bias, groups=num_groups, eps=eps, activation=code)[0]
