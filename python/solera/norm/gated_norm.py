r"""Core `gated_norm`: RMS normalisation with a gate, after it or before it.

A row of D elements is cut into groups of C (one group of D unless said otherwise). With
$a = \mathrm{act}(\mathrm{gate})$, means over the group and $w, b$ of D elements:

$$\text{norm first:}\quad n = x\,r,\quad r = (\overline{x^2} + \varepsilon)^{-1/2},\quad y = (n\,w + b)\,a
  \qquad\quad \text{gate first:}\quad n = u\,r,\quad u = x\,a,\quad
  r = (\overline{u^2} + \varepsilon)^{-1/2},\quad y = n\,w + b .$$

The gradient of $n = v\,r$ for an incoming $h$ is $r\,(h - n\,\overline{h n})$, since
$\partial r/\partial v_j = -r^3 v_j / C$. Norm first, with $m = n\,w + b$ and $e = \mathrm{d}y\,a$:

$$\mathrm{d}x = r\,(e w - n\,\overline{e w n}),\quad \mathrm{d\,gate} = \mathrm{d}y\,m\,\mathrm{act}',\quad
  \mathrm{d}w = \textstyle\sum e\,n,\quad \mathrm{d}b = \sum e .$$

Gate first, with $\mathrm{d}u = r\,(\mathrm{d}y\,w - n\,\overline{\mathrm{d}y\,w\,n})$:

$$\mathrm{d}x = \mathrm{d}u\,a,\quad \mathrm{d\,gate} = \mathrm{d}u\,x\,\mathrm{act}',\quad
  \mathrm{d}w = \textstyle\sum \mathrm{d}y\,n,\quad \mathrm{d}b = \sum \mathrm{d}y .$$

Sources: the norm is Zhang, Sennrich, "Root Mean Square Layer Normalization", 2019; gate first with groups is
the output norm of Dao, Gu, "Transformers are SSMs" (Mamba-2), 2024; norm first is that of Yang et al., "Gated
Linear Attention", 2024; no weight and no activation is NormAttention's SRMS(o) * u of Qin et al., "Scaling
TransNormer to 175 Billion Parameters", 2023.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _check
from .._activation import activate, activation_code, delta_of
from .._autograd import differentiable_vjp
from .._registry import accumulate_type, reference
from .._route import needs_graph, use_reference

_op = torch.ops.solera


# ---- reference ---------------------------------------------------------------------------------------


def gated_norm_reference(
    x: Tensor,
    gate: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: int,
    norm_first: bool,
    groups: int,
) -> tuple[Tensor, Tensor]:
    """(y, rstd) by the formula, in float32 (float64 for float64); y rounded to x's dtype once."""
    acc = accumulate_type(x)
    a = activate(gate.to(acc), activation)
    v = x.to(acc) if norm_first else x.to(acc) * a
    v = v.unflatten(-1, (groups, x.shape[-1] // groups))
    rstd = torch.rsqrt(v.square().mean(-1, keepdim=True) + eps)
    y = (v * rstd).flatten(-2)
    if weight is not None:
        y = y * weight.to(acc)
    if bias is not None:
        y = y + bias.to(acc)
    if norm_first:
        y = y * a
    return y.to(x.dtype), rstd.squeeze(-1)


@reference("gated_norm")
def _gated_norm(x, gate, weight, bias, eps, activation, norm_first, groups):
    y, rstd = gated_norm_reference(x, gate, weight, bias, eps, activation, norm_first, groups)
    return y.contiguous(), rstd.contiguous()


@reference("gated_norm_backward")
def _gated_norm_backward(
    dy, x, gate, weight, bias, rstd, activation, norm_first, need_x, need_gate, need_weight, need_bias
):  # fmt: skip
    acc = accumulate_type(x)
    groups = rstd.shape[-1]
    size = (groups, x.shape[-1] // groups)
    g, v, z, r = dy.to(acc), x.to(acc), gate.to(acc), rstd.unsqueeze(-1)
    a = activate(z, activation)
    n = ((v if norm_first else v * a).unflatten(-1, size) * r).flatten(-2)
    e = g * a if norm_first else g
    h = e if weight is None else e * weight.to(acc)
    mean = (h * n).unflatten(-1, size).mean(-1, keepdim=True)
    dv = ((h.unflatten(-1, size) - n.unflatten(-1, size) * mean) * r).flatten(-2)
    if norm_first:
        m = n if weight is None else n * weight.to(acc)
        m = m if bias is None else m + bias.to(acc)
        dx, dgate = dv, delta_of(g * m, z, activation)
    else:
        dx, dgate = dv * a, delta_of(dv * v, z, activation)
    rows = tuple(range(x.dim() - 1))
    dweight = (e * n).sum(rows) if rows else e * n
    dbias = e.sum(rows) if rows else e.clone()
    return (
        dx.to(x.dtype).contiguous() if need_x else x.new_empty(0),
        dgate.to(x.dtype).contiguous() if need_gate else x.new_empty(0),
        dweight if need_weight else g.new_empty(0),
        dbias if need_bias else g.new_empty(0),
    )


# ---- autograd ----------------------------------------------------------------------------------------


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gate, weight, bias, eps, activation, norm_first, groups):
        y, rstd = _op.gated_norm(x, gate, weight, bias, eps, activation, norm_first, groups)
        ctx.options = (eps, activation, norm_first, groups)
        ctx.save_for_backward(x, gate, weight, bias, rstd)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, gate, weight, bias, rstd = ctx.saved_tensors
        eps, activation, norm_first, groups = ctx.options
        needs = ctx.needs_input_grad[:4]
        if torch.is_grad_enabled():

            def norm(x, gate, weight, bias):
                return gated_norm_reference(x, gate, weight, bias, *ctx.options)[0]

            return (*differentiable_vjp(norm, (x, gate, weight, bias), needs, (dy,)), *[None] * 4)
        grads = _op.gated_norm_backward(
            dy, x, gate, weight, bias, rstd, activation, norm_first, *needs
        )
        tensors = (x, gate, weight, bias)
        return (
            *(d.to(t.dtype) if need else None for d, t, need in zip(grads, tensors, needs)),
            *[None] * 4,
        )


# ---- public function ---------------------------------------------------------------------------------


def gated_rms_norm(
    x: Tensor,
    gate: Tensor,
    weight: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    activation: str | None = "silu",
    norm_first: bool = True,
    eps: float | None = None,
    group_size: int | None = None,
) -> Tensor:
    r"""RMS normalisation over the last dimension with a gate.

    `norm_first`: $y = (\mathrm{rms}(x)\,\mathrm{weight} + \mathrm{bias})\,\mathrm{act}(\mathrm{gate})$; otherwise
    $y = \mathrm{rms}(x\,\mathrm{act}(\mathrm{gate}))\,\mathrm{weight} + \mathrm{bias}$, with
    $\mathrm{rms}(u) = u\,/\sqrt{\overline{u^2} + \varepsilon}$.

    Args:
        x: (..., D), float32, float64, bfloat16 or float16; computed in float32 (float64 for float64). Rows may
            lie apart (views of `chunk` or `split`): only what has no common row stride is copied.
        gate: (..., D), x's dtype.
        weight, bias: (D,); may be float32 with a half-precision x.
        activation: None, "silu", "sigmoid", "gelu" (the exact one) or "relu", applied to the gate.
        norm_first: False is Mamba-2's order.
        eps: None takes torch's rule: the machine epsilon of the dtype that is computed in.
        group_size: the mean is taken over each `group_size` neighbours instead of the row; divides D.
            To share one weight among heads use x of (..., heads, d) and a weight of (d,) instead.

    Shapes: x, gate (..., D) -> y (..., D). Saved for backward: the inputs and one number a group.

    Raises:
        ValueError, TypeError: naming the argument whose shape, dtype or device does not fit.

    Source: Dao, Gu, "Transformers are SSMs" (Mamba-2), 2024; Yang et al., "Gated Linear Attention
    Transformers", 2024; TransNormer's gate is `activation=None` without a weight.
    """
    _check.tensor("x", x, min_dim=1)
    _check.like("gate", gate, x.shape, x)
    _check.same_dtype("gate", gate, x)
    width = x.shape[-1:]
    if weight is not None:
        _check.like("weight", weight, width, x)
    if bias is not None:
        _check.like("bias", bias, width, x)
    code = activation_code(activation)
    if eps is None:
        eps = torch.finfo(accumulate_type(x)).eps
    eps = _check.number("eps", eps, low=0.0)
    groups = _groups(group_size, width[0])
    if x.is_cuda and torch.is_autocast_enabled("cuda") and x.dtype != torch.float64:
        # As torch's own norms on CUDA: float32 in and out. On the CPU autocast leaves norms alone.
        x, gate = x.float(), gate.float()
    options = (x, gate, weight, bias, eps, code, bool(norm_first), groups)
    if use_reference():
        return gated_norm_reference(*options)[0]
    if needs_graph(x, gate, weight, bias):
        return _GatedNorm.apply(*options)
    return _op.gated_norm(*options)[0]


def _groups(group_size: object, columns: int) -> int:
    if group_size is None:
        return 1
    if isinstance(group_size, bool) or not isinstance(group_size, int):
        raise TypeError(
            f"group_size: expected an int or None, got {type(group_size).__name__} {group_size!r}"
        )
    if group_size < 1 or columns % group_size:
        raise ValueError(
            f"group_size: expected a divisor of x's {columns} columns, got {group_size}"
        )
    return max(columns // group_size, 1)
