r"""Core `row_norm`: layer and RMS normalisation over the last dimension.

With $u = x + \alpha\,\mathrm{residual}$ (or $u = x$), $w = \mathrm{weight} + \mathrm{weight\_offset}$ and

$$\mu = \tfrac1D\sum_j u_j \ (\text{0 for RMS}),\qquad
  r = \Bigl(\tfrac1D\sum_j (u_j-\mu)^2 + \varepsilon\Bigr)^{-1/2},\qquad
  n = (u-\mu)\,r,\qquad y = n\,w + b .$$

The gradient, with $h = \mathrm{d}y\,w$ and means over the row:

$$\mathrm{d}u = r\,\bigl(h - n\,\overline{hn} - [\bar h]_{\text{layer}}\bigr) + \text{what flows into } u,\qquad
  \mathrm{d}w = \textstyle\sum_{\text{rows}} \mathrm{d}y\,n,\qquad
  \mathrm{d}b = \textstyle\sum_{\text{rows}} \mathrm{d}y .$$

Sources: Ba, Kiros, Hinton, "Layer Normalization", 2016; Zhang, Sennrich, "Root Mean Square Layer
Normalization", 2019. The residual form with $\alpha$ is DeepNorm (Wang et al., 2022).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from .. import _check
from .._autograd import differentiable_vjp
from .._registry import accumulate_type, compiled_library, reference
from .._route import needs_graph, use_reference

_op = torch.ops.solera
_plain = _op.row_norm.default
_CPU_KERNEL = compiled_library is not None


# ---- reference ---------------------------------------------------------------------------------------


def row_norm_reference(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual_scale: float,
    weight_offset: float,
    centred: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, u, mean, rstd) by the formula, in float32 (float64 for float64), y and u rounded to x's dtype."""
    acc = accumulate_type(x)
    u = x if residual is None else (x.to(acc) + residual_scale * residual.to(acc)).to(x.dtype)
    v = u.to(acc)
    mean = v.mean(-1, keepdim=True) if centred else v.new_zeros(())
    d = v - mean
    rstd = torch.rsqrt(d.square().mean(-1, keepdim=True) + eps)
    y = d * rstd
    if weight is not None:
        y = y * (weight.to(acc) + weight_offset)
    if bias is not None:
        y = y + bias.to(acc)
    return y.to(x.dtype), u, mean.squeeze(-1) if centred else v.new_zeros(0), rstd.squeeze(-1)


@reference("row_norm")
def _row_norm(x, weight, bias, eps, weight_offset, centred):
    y = row_norm_reference(x, None, weight, bias, eps, 1.0, weight_offset, centred)[0]
    return y.contiguous()


@reference("row_norm_stats")
def _row_norm_stats(x, residual, weight, bias, eps, residual_scale, weight_offset, centred):
    y, u, mean, rstd = row_norm_reference(
        x, residual, weight, bias, eps, residual_scale, weight_offset, centred
    )
    u = x.new_empty(0) if residual is None else u.contiguous()
    return y.contiguous(), u, mean.contiguous(), rstd.contiguous()


@reference("row_norm_backward")
def _row_norm_backward(
    dy, du, u, weight, mean, rstd, weight_offset, centred, need_x, need_weight, need_bias
):
    acc = accumulate_type(u)
    g, v, r = dy.to(acc), u.to(acc), rstd.unsqueeze(-1)
    n = (v - mean.unsqueeze(-1) if centred else v) * r
    none = g.new_empty(0)
    dx = u.new_empty(0)
    if need_x:
        h = g if weight is None else g * (weight.to(acc) + weight_offset)
        total = h - n * (h * n).mean(-1, keepdim=True)
        if centred:
            total = total - h.mean(-1, keepdim=True)
        total = total * r
        dx = (total if du is None else total + du.to(acc)).to(u.dtype).contiguous()
    rows = tuple(range(u.dim() - 1))
    dweight = (g * n).sum(rows) if rows else g * n
    dbias = g.sum(rows) if rows else g.clone()
    return dx, dweight if need_weight else none, dbias if need_bias else none.clone()


# ---- autograd ----------------------------------------------------------------------------------------


class _RowNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, bias, eps, residual_scale, weight_offset, centred):
        y, u, mean, rstd = _op.row_norm_stats(
            x, residual, weight, bias, eps, residual_scale, weight_offset, centred
        )
        ctx.options = (eps, residual_scale, weight_offset, centred)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.set_materialize_grads(False)
        if residual is None:
            ctx.save_for_backward(x, None, weight, mean, rstd)
            return y
        ctx.save_for_backward(u, None, weight, mean, rstd)
        return y, u

    @staticmethod
    def backward(ctx, dy, du=None):
        u, _, weight, mean, rstd = ctx.saved_tensors
        eps, residual_scale, weight_offset, centred = ctx.options
        need_x, need_residual, need_weight, need_bias = ctx.needs_input_grad[:4]
        if torch.is_grad_enabled():
            # Second derivatives: the norm as a function of (u, weight, bias); u carries the graph of the sum.
            bias = (
                None if ctx.bias_dtype is None else u.new_zeros(u.shape[-1], dtype=ctx.bias_dtype)
            )
            if bias is not None:
                bias.requires_grad_(need_bias)

            def norm(u, weight, bias):
                options = (eps, 1.0, weight_offset, centred)
                return row_norm_reference(u, None, weight, bias, *options)[0]

            needs = (need_x or need_residual, need_weight, need_bias)
            dx, dweight, dbias = differentiable_vjp(norm, (u, weight, bias), needs, (dy,))
            if du is not None:
                dx = du if dx is None else dx + du
        elif dy is None:
            dx, dweight, dbias = du, None, None
        else:
            dx, dweight, dbias = _op.row_norm_backward(
                dy, du, u, weight, mean, rstd, weight_offset, centred,
                need_x or need_residual, need_weight, need_bias,
            )  # fmt: skip
            dweight = dweight.to(weight.dtype) if need_weight else None
            dbias = dbias.to(ctx.bias_dtype) if need_bias else None
        dresidual = None
        if need_residual and dx is not None:
            dresidual = dx if residual_scale == 1.0 else dx * residual_scale
        return dx if need_x else None, dresidual, dweight, dbias, None, None, None, None


# ---- public functions --------------------------------------------------------------------------------


def _row_norm_public(x, residual, weight, bias, eps, residual_scale, weight_offset, centred):
    try:
        # The commonest call at the price of the op alone: its kernel refuses what does not fit, and the
        # checks below then say what it was.
        if (
            residual is None
            and residual_scale == 1.0
            and x.is_cpu
            and (weight is None or weight.is_cpu)
            and (bias is None or bias.is_cpu)
            and _CPU_KERNEL
            and not is_dynamo_compiling()
            and not use_reference()
            and not needs_graph(x, weight, bias)
        ):
            return _plain(x, weight, bias, eps, weight_offset, centred)
    except (AttributeError, RuntimeError):
        pass
    _check.tensor("x", x, min_dim=1)
    width = x.shape[-1:]
    if weight is not None:
        _check.like("weight", weight, width, x)
    if bias is not None:
        _check.like("bias", bias, width, x)
    eps = _check.number("eps", eps, low=0.0)
    weight_offset = _check.number("weight_offset", weight_offset)
    residual_scale = _check.number("residual_scale", residual_scale)
    if residual is not None:
        _check.like("residual", residual, x.shape, x)
        _check.same_dtype("residual", residual, x)
    elif residual_scale != 1.0:
        raise ValueError(f"residual_scale: {residual_scale!r} was given without a residual")
    if x.is_cuda and torch.is_autocast_enabled("cuda") and x.dtype != torch.float64:
        # As torch's own norms on CUDA: float32 in and out. On the CPU autocast leaves norms alone.
        x = x.float()
        residual = None if residual is None else residual.float()
    options = (x, residual, weight, bias, eps, residual_scale, weight_offset, centred)
    if use_reference():
        out = row_norm_reference(*options)[:2]
    elif needs_graph(x, residual, weight, bias):
        return _RowNorm.apply(*options)
    elif residual is None:
        return _op.row_norm(x, weight, bias, eps, weight_offset, centred)
    else:
        out = _op.row_norm_stats(*options)[:2]
    return out[0] if residual is None else out


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    residual_scale: float = 1.0,
    weight_offset: float = 0.0,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Layer normalisation over the last dimension, optionally of `x + residual_scale * residual`.

    $y = (u - \mu)\,/\sqrt{\sigma^2 + \varepsilon}\;(\mathrm{weight} + \mathrm{weight\_offset}) + \mathrm{bias}$ with
    $\mu, \sigma^2$ the mean and the (biased, centred) variance of each row of $u$.

    Args:
        x: (..., D), float32, float64, bfloat16 or float16; computed in float32 (float64 for float64).
        weight, bias: (D,); may be float32 with a half-precision x.
        eps: added to the variance; not negative.
        residual: (..., D) of x's dtype. A pre-norm block uses `residual_scale=1`, DeepNorm its alpha.
        weight_offset: added to the weight; 1.0 for checkpoints that store weight - 1.

    Shapes: x (..., D) -> y (..., D); with a residual the pair (y, u), both (..., D).

    Raises:
        ValueError, TypeError: naming the argument whose shape, dtype or device does not fit.

    Source: Ba, Kiros, Hinton, "Layer Normalization", 2016; DeepNorm: Wang et al., "DeepNet", 2022.
    """
    return _row_norm_public(x, residual, weight, bias, eps, residual_scale, weight_offset, True)


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    residual_scale: float = 1.0,
    weight_offset: float = 0.0,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Root-mean-square normalisation over the last dimension, optionally of `x + residual_scale * residual`.

    $y = u\,/\sqrt{\tfrac1D\sum_j u_j^2 + \varepsilon}\;(\mathrm{weight} + \mathrm{weight\_offset}) + \mathrm{bias}$.
    Without a weight this is TransNormer's SimpleRMSNorm.

    Args:
        x: (..., D), float32, float64, bfloat16 or float16; computed in float32 (float64 for float64).
        weight, bias: (D,); may be float32 with a half-precision x.
        eps: None takes torch's rule: the machine epsilon of the dtype that is computed in, that is of
            float32 for half-precision x.
        residual: (..., D) of x's dtype.
        weight_offset: added to the weight; 1.0 for Gemma's convention.

    Shapes: x (..., D) -> y (..., D); with a residual the pair (y, u), both (..., D).

    Raises:
        ValueError, TypeError: naming the argument whose shape, dtype or device does not fit.

    Source: Zhang, Sennrich, "Root Mean Square Layer Normalization", 2019; SimpleRMSNorm: Qin et al.,
    "TransNormerLLM", 2023.
    """
    if eps is None:
        double = isinstance(x, Tensor) and x.dtype == torch.float64
        eps = 2.220446049250313e-16 if double else 1.1920928955078125e-07
    return _row_norm_public(x, residual, weight, bias, eps, residual_scale, weight_offset, False)
