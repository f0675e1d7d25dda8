r"""Core `ada_norm`: layer and RMS normalisation over the last dimension with modulation per sample, gate and branch.

x is (B, T, D). A parameter has one row of D for everything, one a sample, or one a token; weight and bias may be
rows of a table picked by a sample's index. With

$$h = x + \mathrm{gate}\,\mathrm{branch}\ (\text{or } x),\quad
  n = (h - \mu)\,r,\quad z = n\,w + b,\quad y = z\,(1 + \mathrm{scale}) + \mathrm{shift},$$

$\mu$ the mean of the row (0 for RMS), $r = (\overline{(h-\mu)^2} + \varepsilon)^{-1/2}$, the kernels see
$y = n\,W + C$ with $W = w (1 + \mathrm{scale})$, $C = b (1 + \mathrm{scale}) + \mathrm{shift}$ made once a sample.

Backward, with $g = \mathrm{d}y\,W$ and means over the row:

$$\delta = r\,\bigl(g - n\,\overline{g n} - [\bar g]_{\text{layer}}\bigr) + \text{what flows into } h,\qquad
  \mathrm{d}x = \delta,\quad \mathrm{d}\,\mathrm{branch} = \mathrm{gate}\,\delta .$$

A row sums three things over each sample: $P = \sum \mathrm{d}y\,n$, $Q = \sum \mathrm{d}y$ and
$E = \sum \delta\,\mathrm{branch}$. All parameter gradients are small functions of those:

$$\mathrm{d}\,\mathrm{shift} = Q,\quad \mathrm{d}\,\mathrm{scale} = w P + b Q,\quad \mathrm{d}\,\mathrm{gate} = E,\quad
  \mathrm{d}w = \textstyle\sum_B (1 + \mathrm{scale}) P,\quad \mathrm{d}b = \sum_B (1 + \mathrm{scale}) Q,$$

summed over B for a parameter of one row, over the samples of an index for a table. A gradient per token is
not summed. Saved for backward: h (or x), the row statistics, and what the caller holds anyway.

Sources: Peebles, Xie, "Scalable Diffusion Models with Transformers", 2023 (adaLN-Zero); Perez et al., "FiLM",
2018; Ba, Kiros, Hinton, "Layer Normalization", 2016; Zhang, Sennrich, "Root Mean Square Layer Normalization", 2019.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from .. import _check
from .._autograd import differentiable_vjp
from .._registry import accumulate_type, reference
from .._route import needs_graph, use_reference

_op = torch.ops.solera


# ---- reference ---------------------------------------------------------------------------------------


def _rows(p: Tensor, x: Tensor, index: Tensor | None = None) -> Tensor:
    """A parameter in the accumulator's dtype, shaped to broadcast with x: a row of two dimensions is one a sample."""
    p = p.to(accumulate_type(x))
    if index is not None:
        p = p[index]
    return p.unsqueeze(1) if p.dim() == 2 and x.dim() == 3 else p


def _reduce(g: Tensor, dim: int) -> Tensor:
    """The gradient (B, T, D) or (B, D) summed to a parameter of `dim` dimensions."""
    if dim == g.dim():
        return g.clone()
    return g.sum(tuple(range(g.dim() - 1))) if dim == 1 else g.sum(1)


def ada_norm_reference(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    index: Tensor | None,
    eps: float,
    centred: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, h, mean, rstd) by the formula, in float32 (float64 for float64), y and h rounded to x's dtype."""
    acc = accumulate_type(x)
    h = x
    if branch is not None:
        flow = branch.to(acc) if gate is None else _rows(gate, x) * branch.to(acc)
        h = (x.to(acc) + flow).to(x.dtype)
    v = h.to(acc)
    mean = v.mean(-1, keepdim=True) if centred else v.new_zeros(())
    d = v - mean
    rstd = torch.rsqrt(d.square().mean(-1, keepdim=True) + eps)
    y = d * rstd
    if weight is not None:
        y = y * _rows(weight, x, index)
    if bias is not None:
        y = y + _rows(bias, x, index)
    if scale is not None:
        y = y * (1 + _rows(scale, x))
    if shift is not None:
        y = y + _rows(shift, x)
    return y.to(x.dtype), h, mean.squeeze(-1) if centred else v.new_zeros(0), rstd.squeeze(-1)


@reference("ada_norm")
def _ada_norm(x, branch, gate, scale, shift, weight, bias, index, eps, centred):
    y, h, mean, rstd = ada_norm_reference(
        x, branch, gate, scale, shift, weight, bias, index, eps, centred
    )
    h = x.new_empty(0) if branch is None else h.contiguous()
    return y.contiguous(), h, mean.contiguous(), rstd.contiguous()


@reference("ada_norm_backward")
def _ada_norm_backward(
    dy, dh, h, branch, gate, scale, weight, bias, index, mean, rstd, centred, shift_dim, needs
):
    acc = accumulate_type(h)
    need_x, need_branch, need_gate, need_scale, need_shift, need_weight, need_bias = needs
    g, v, r = dy.to(acc), h.to(acc), rstd.unsqueeze(-1)
    n = (v - mean.unsqueeze(-1) if centred else v) * r
    w = n.new_ones(()) if weight is None else _rows(weight, h, index)
    b = n.new_zeros(()) if bias is None else _rows(bias, h, index)
    s = n.new_ones(()) if scale is None else 1 + _rows(scale, h)
    e = g * (w * s)
    delta = e - n * (e * n).mean(-1, keepdim=True)
    if centred:
        delta = delta - e.mean(-1, keepdim=True)
    delta = delta * r
    if dh is not None:
        delta = delta + dh.to(acc)
    none = h.new_empty(0)
    small = [n.new_empty(0) for _ in range(4)]
    dx = delta.to(h.dtype).contiguous() if need_x else none
    dbranch, dgate = none.clone(), n.new_empty(0)
    if need_branch:
        dbranch = (delta if gate is None else delta * _rows(gate, h)).to(h.dtype).contiguous()
    if need_gate:
        dgate = _of_parameter(delta * branch.to(acc), gate, h)
    if need_scale:
        small[0] = _of_parameter(g * (n * w + b), scale, h)
    if need_shift:
        small[1] = _reduce(g, shift_dim)
    for i, (need, p, by) in enumerate(((need_weight, weight, g * s * n), (need_bias, bias, g * s))):
        if need and index is None:
            small[2 + i] = _reduce(by, 1)
        elif need:
            each = by if by.dim() == 2 else by.sum(1)
            small[2 + i] = torch.zeros_like(p, dtype=acc).index_add(0, index, each)
    return dx, dbranch, dgate, *small


def _of_parameter(g: Tensor, p: Tensor, x: Tensor) -> Tensor:
    """A sum in the accumulator's dtype; per token, where nothing is summed, in x's if that is the parameter's."""
    if p.dim() < 3:
        return _reduce(g, p.dim())
    return g.to(p.dtype if p.dtype == x.dtype else g.dtype).contiguous()


# ---- autograd ----------------------------------------------------------------------------------------


class _AdaNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, branch, gate, scale, shift, weight, bias, index, eps, centred):
        y, h, mean, rstd = _op.ada_norm(
            x, branch, gate, scale, shift, weight, bias, index, eps, centred
        )
        ctx.options = (eps, centred)
        ctx.shift_like = None if shift is None else (shift.dim(), shift.dtype)
        ctx.set_materialize_grads(False)
        kept = x if branch is None else h
        need_gate = gate is not None and gate.requires_grad
        ctx.save_for_backward(
            kept, branch if need_gate else None, gate, scale, weight, bias, index, mean, rstd
        )
        if branch is None:
            return y
        if not any(ctx.needs_input_grad[:3]):
            ctx.mark_non_differentiable(h)
        return y, h

    @staticmethod
    def backward(ctx, dy, dh=None):
        if dy is None and dh is None:
            return (None,) * 10
        h, branch, gate, scale, weight, bias, index, mean, rstd = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:7])
        shift_dim, shift_dtype = ctx.shift_like or (0, None)
        if torch.is_grad_enabled():
            grads = _differentiable_backward(ctx, dy, dh, needs)
        else:
            dy = torch.zeros_like(h) if dy is None else dy
            # A branch without a gate has x's gradient; a shift per token has dy.
            whole_shift = needs[4] and shift_dim == 3
            shared = needs[1] and gate is None
            asked = list(needs)
            asked[0] = needs[0] or shared
            asked[1] = needs[1] and not shared
            asked[4] = needs[4] and not whole_shift
            grads = list(
                _op.ada_norm_backward(
                    dy, dh, h, branch, gate, scale, weight, bias, index, mean, rstd,
                    ctx.options[1], 0 if whole_shift else shift_dim, asked,
                )
            )  # fmt: skip
            if shared:
                grads[1] = grads[0]
            if whole_shift:
                grads[4] = dy
        like = (None, None, gate, scale, None, weight, bias)
        dtypes = [None if t is None else t.dtype for t in like]
        dtypes[4] = shift_dtype
        out = [
            (g if d is None or g.dtype is d else g.to(d)) if need and g is not None else None
            for need, g, d in zip(needs, grads, dtypes)
        ]
        return (*out, None, None, None)


def _differentiable_backward(ctx, dy, dh, needs):
    """The gradients as differentiable torch operations; h carries the graph of x + gate branch.

    Where only h was used (dy None), the norm must not be differentiated: h leads back here.
    """
    h, branch, gate, scale, weight, bias, index, _, _ = ctx.saved_tensors
    eps, centred = ctx.options

    def norm(h, scale, weight, bias):
        return ada_norm_reference(
            h, None, None, scale, None, weight, bias, index, eps, centred
        )[0]  # fmt: skip

    inner = (needs[0] or needs[1] or needs[2], needs[3], needs[5], needs[6])
    delta, dscale, dweight, dbias = differentiable_vjp(norm, (h, scale, weight, bias), inner, (dy,))
    if dh is not None:
        delta = dh if delta is None else delta + dh
    acc = accumulate_type(h)
    dbranch = dgate = dshift = None
    if delta is not None and needs[1]:
        dbranch = delta if gate is None else (delta.to(acc) * _rows(gate, h)).to(h.dtype)
    if delta is not None and needs[2]:
        dgate = _reduce(delta.to(acc) * branch.to(acc), gate.dim())
    if needs[4] and dy is not None:
        dshift = _reduce(dy.to(acc), ctx.shift_like[0])
    return delta, dbranch, dgate, dscale, dshift, dweight, dbias


# ---- public functions --------------------------------------------------------------------------------


def _parameter(name: str, p: object, x: Tensor) -> Tensor | None:
    """p as (D,), (B, D) or, one row a token, x's shape; refused if it is none of them."""
    if p is None:
        return None
    D = x.shape[-1]
    shapes: list[tuple[int, ...]] = [(D,)]
    if x.dim() > 1:
        shapes.append((x.shape[0], D))
    if x.dim() > 2:
        shapes += [(x.shape[0], *(1 for _ in x.shape[1:-1]), D), tuple(x.shape)]
    shape = tuple(p.shape) if isinstance(p, Tensor) else None
    if isinstance(p, Tensor) and shape not in shapes:
        raise ValueError(
            f"{name}: expected shape {' or '.join(map(str, shapes))} to go with x of shape "
            f"{tuple(x.shape)}, got {shape}"
        )
    _check.like(name, p, shapes[0] if shape is None else shape, x)
    assert isinstance(p, Tensor)
    if p.dim() > 2 and shape == shapes[2]:
        return p.flatten(0, -2)
    return p.flatten(1, -2) if p.dim() > 3 else p


def _ada_norm_public(x, branch, gate, scale, shift, weight, bias, eps, centred, index=None):
    shape = x.shape
    if x.is_cuda and torch.is_autocast_enabled("cuda") and x.dtype != torch.float64:
        # As torch's own norms on CUDA: float32 in and out. On the CPU autocast leaves norms alone.
        x = x.float()
        branch = None if branch is None else branch.float()
    if x.dim() == 1:
        x = x.unsqueeze(0)
        branch = None if branch is None else branch.unsqueeze(0)
    elif x.dim() > 3:
        x = x.flatten(1, -2)
        branch = None if branch is None else branch.flatten(1, -2)
    if scale is not None and shift is not None and scale.dim() == 3 and shift.dim() < 3:
        # The kernels sum dy for the shift only where they do not weigh each token's dy otherwise.
        shift = (shift.unsqueeze(1) if shift.dim() == 2 else shift).expand(x.shape)
    options = (x, branch, gate, scale, shift, weight, bias, index, eps, centred)
    y: Tensor
    h: Tensor | None
    if use_reference():
        y, h = ada_norm_reference(*options)[:2]
    elif needs_graph(x, branch, gate, scale, shift, weight, bias):
        out = _AdaNorm.apply(*options)
        y, h = (out, None) if branch is None else out
    else:
        y, h = _op.ada_norm(*options)[:2]
    if y.shape != shape:
        y, h = y.view(shape), None if branch is None or h is None else h.view(shape)
    return y if branch is None else (h, y)


def _ada(x, shift, scale, gate, branch, weight, bias, eps, centred):
    _check.tensor("x", x, min_dim=1)
    if branch is not None:
        _check.like("branch", branch, x.shape, x)
        _check.same_dtype("branch", branch, x)
    elif gate is not None:
        raise ValueError("gate: given without a branch to multiply")
    for name, p in (("weight", weight), ("bias", bias)):
        if p is not None:
            _check.like(name, p, x.shape[-1:], x)
    eps = _check.number("eps", eps, low=0.0)
    shift = _parameter("shift", shift, x)
    scale = _parameter("scale", scale, x)
    gate = _parameter("gate", gate, x)
    return _ada_norm_public(x, branch, gate, scale, shift, weight, bias, eps, centred)


def ada_layer_norm(
    x: Tensor,
    *,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    gate: Tensor | None = None,
    branch: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Adaptive layer normalisation (adaLN, adaLN-Zero): $y = \mathrm{LN}(h)\,(1 + \mathrm{scale}) + \mathrm{shift}$.

    $h = x + \mathrm{gate}\cdot\mathrm{branch}$ if a branch is given (gate None counts as 1), else $h = x$;
    $\mathrm{LN}(h) = (h - \mu)/\sqrt{\sigma^2 + \varepsilon}\cdot\mathrm{weight} + \mathrm{bias}$.

    Args:
        x: (..., D), float32, float64, bfloat16 or float16; computed in float32 (float64 for float64).
        shift, scale, gate: (D,), (B, D), (B, 1, D) or x's shape; views such as those of
            `modulation.chunk(6, dim=-1)` are read in place; may be float32 with a half-precision x.
        branch: x's shape and dtype, the output of the sublayer before.
        weight, bias: (D,), applied before the modulation.
        eps: added to the variance; not negative.

    Shapes: x (B, ..., D) -> y of x's shape; with a branch the pair (h, y).

    Gradients are deterministic; those of half-precision parameters are summed in float32.

    Raises:
        ValueError, TypeError: naming the argument whose shape, dtype or device does not fit.

    Source: Peebles, Xie, "Scalable Diffusion Models with Transformers", 2023.
    """
    return _ada(x, shift, scale, gate, branch, weight, bias, eps, True)


def ada_rms_norm(
    x: Tensor,
    *,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    gate: Tensor | None = None,
    branch: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""`ada_layer_norm` by the root mean square: $y = \mathrm{RMS}(h)\,(1 + \mathrm{scale}) + \mathrm{shift}$.

    $\mathrm{RMS}(h) = h/\sqrt{\tfrac1D\sum_j h_j^2 + \varepsilon}\cdot\mathrm{weight} + \mathrm{bias}$, and
    $h = x + \mathrm{gate}\cdot\mathrm{branch}$ if a branch is given.

    Args, errors: as `ada_layer_norm`.

    Shapes: x (B, ..., D) -> y of x's shape; with a branch the pair (h, y).

    Source: the modulation of Peebles, Xie, 2023, on the norm of Zhang, Sennrich, 2019 (AdaRMSNorm of Crowson et
    al., "Hourglass Diffusion Transformers", 2024, is the case of a scale alone).
    """
    return _ada(x, shift, scale, gate, branch, weight, bias, eps, False)


def indexed_layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, *, eps: float = 1e-5
) -> Tensor:
    r"""Layer normalisation whose weight and bias are picked per sample: $y_b = \mathrm{LN}(x_b)\,w_{i_b} + c_{i_b}$.

    Nothing is expanded over the tokens; the gradient of a set sums its samples in their order.

    Args:
        x: (B, ..., D), float32, float64, bfloat16 or float16; computed in float32 (float64 for float64).
        weight, bias: (sets, D); bias may be None; may be float32 with a half-precision x.
        index: int64, (B,), or x.shape[:-1] to pick a set for every row (a member's norm in an ensemble). A number
            outside [0, sets) is refused on the CPU; on other devices its rows become NaN.
        eps: added to the variance; not negative.

    Shapes: x (B, ..., D), weight and bias (sets, D), index (B,) -> (B, ..., D).

    Raises:
        ValueError, TypeError: naming the argument whose shape, dtype or device does not fit.
        IndexError: an index outside the sets, on the CPU.

    Source: De Min et al., "On the Effectiveness of LayerNorm Tuning for Continual Learning in Vision
    Transformers", 2023 (public code: tdemin16/Continual-LayerNorm-Tuning).
    """
    _check.tensor("x", x, min_dim=2)
    _check.tensor("weight", weight, dim=2)
    _check.like("weight", weight, (weight.shape[0], x.shape[-1]), x)
    if bias is not None:
        _check.like("bias", bias, weight.shape, x)
    if not isinstance(index, Tensor) or index.dtype != torch.int64:
        raise TypeError(f"index: expected an int64 tensor, got {_check._came(index)}")
    if index.shape not in (x.shape[:1], x.shape[:-1]):
        raise ValueError(
            f"index: expected shape {tuple(x.shape[:1])} or {tuple(x.shape[:-1])} to go with x of "
            f"shape {tuple(x.shape)}, got {tuple(index.shape)}"
        )
    if index.device != x.device:
        raise ValueError(
            f"index: expected device {x.device} (that of x), got {index.device}"
        )  # fmt: skip
    eps = _check.number("eps", eps, low=0.0)
    if x.is_cpu and index.numel() and not is_dynamo_compiling() and not use_reference():
        low, high = (int(i) for i in index.aminmax())
        if low < 0 or high >= weight.shape[0]:
            raise IndexError(
                f"index: expected numbers in [0, {weight.shape[0]}), got {low} to {high}"
            )
    shape = x.shape
    if index.dim() > 1:
        x, index = x.flatten(0, -2), index.flatten()
    y = _ada_norm_public(x, None, None, None, None, weight, bias, eps, True, index)
    return y.view(shape) if y.shape != shape else y
