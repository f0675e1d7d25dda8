r"""Core `qk_norm`: heads brought to a scale, and turned by a rotary embedding.

A row is one head of d elements at one position. With statistics over it,

$$\text{rms: } r = (\overline{x^2} + \varepsilon)^{-1/2},\qquad
  \text{layer: } r = (\overline{(x-\mu)^2} + \varepsilon)^{-1/2},\qquad
  \text{l2: } r = 1/\max(\|x\|, \varepsilon),\qquad
  \text{l2\_add: } r = (\|x\|^2 + \varepsilon)^{-1/2},$$

$v = (x - \mu)\,r\,w$ ($\mu = 0$ but for layer; $w$ one vector, or one a head). The rotary embedding turns the
first R elements in pairs, $(j, j + R/2)$ or, interleaved, $(2j, 2j + 1)$, by the angle whose cosine and sine
are given for the position:

$$y_j = v_j \cos_j - v_{j'} \sin_j,\qquad y_{j'} = v_{j'} \cos_j + v_j \sin_j .$$

Backward turns the incoming gradient back by the same angle (the inverse of a rotation is its transpose), which gives
$e$; then, with $n = (x - \mu)\,r$ and $h = e\,w$,

$$\mathrm{d}x = r\,\bigl(h - c\,n\,{\textstyle\sum} h n - [\bar h]_{\text{layer}}\bigr),\qquad
  \mathrm{d}w = \textstyle\sum_{\text{rows}} e\,n,$$

where c is 1/d for rms and layer and 1 for l2 and l2_add, since there $\partial r/\partial x_j = -c\,r^3 x_j$; a row
whose norm was clamped (l2) is divided by a constant, so c is 0 for it.

Sources: Henry et al., "Query-Key Normalization for Transformers", 2020 (l2 and a learned scale); Dehghani et
al., "Scaling Vision Transformers to 22 Billion Parameters", 2023 (layer norm of q and k); Su et al., "RoFormer",
2021 (the rotation).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _check
from .._autograd import differentiable_vjp
from .._registry import accumulate_type, reference
from .._route import needs_graph, use_reference

KINDS = ("rms", "layer", "l2", "l2_add")
RMS, LAYER, L2, L2_ADD = range(4)
WIDEST = 8192  # elements of a head; wider ones have no rotation, only l2_normalize makes them

_op = torch.ops.solera


# ---- reference ---------------------------------------------------------------------------------------


def _turned(v: Tensor, cos: Tensor, sin: Tensor, positions: int, interleaved: bool) -> Tensor:
    """v (B, ., ., d) with the first 2 R' elements of each row turned; cos, sin (B or 1, T, R')."""
    half = cos.shape[-1]
    head_axis = 1 if positions == 2 else 2
    c, s = (t.to(v.dtype).unsqueeze(head_axis) for t in (cos, sin))
    part, rest = v[..., : 2 * half], v[..., 2 * half :]
    if interleaved:
        a, b = part.unflatten(-1, (half, 2)).unbind(-1)
        part = torch.stack((a * c - b * s, b * c + a * s), -1).flatten(-2)
    else:
        a, b = part[..., :half], part[..., half:]
        part = torch.cat((a * c - b * s, b * c + a * s), -1)
    return torch.cat((part, rest), -1)


def _per_head(weight: Tensor, positions: int, acc: torch.dtype) -> Tensor:
    w = weight.to(acc)
    if w.dim() == 2 and positions == 2:
        w = w.unsqueeze(1)
    return w


def head_norm_reference(
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    kind: int,
    eps: float,
    positions: int,
    interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean, rstd) by the formula, in float32 (float64 for float64); y rounded to x's dtype once.

    x (B, ., ., d) with positions along dimension `positions` (1 or 2) and heads along the other.
    """
    acc = accumulate_type(x)
    v = x.to(acc)
    mean = v.new_zeros(0)
    if kind == LAYER:
        mean = v.mean(-1, keepdim=True)
        v = v - mean
        mean = mean.squeeze(-1)
    if kind == L2:
        rstd = torch.linalg.vector_norm(v, dim=-1, keepdim=True).clamp_min(eps).reciprocal()
    else:
        square = v.square()
        size = square.sum(-1, keepdim=True) if kind == L2_ADD else square.mean(-1, keepdim=True)
        rstd = torch.rsqrt(size + eps)
    y = v * rstd
    if weight is not None:
        y = y * _per_head(weight, positions, acc)
    if cos is not None and sin is not None:
        y = _turned(y, cos, sin, positions, interleaved)
    return y.to(x.dtype), mean, rstd.squeeze(-1)


@reference("head_norm")
def _head_norm(x, weight, cos, sin, kind, eps, positions, interleaved):
    y, mean, rstd = head_norm_reference(x, weight, cos, sin, kind, eps, positions, interleaved)
    return y.contiguous(), mean.contiguous(), rstd.contiguous()


@reference("head_norm_backward")
def _head_norm_backward(
    dy, x, weight, cos, sin, mean, rstd, kind, eps, positions, interleaved, need_x, need_weight
):
    acc = accumulate_type(x)
    e = dy.to(acc)
    if cos is not None:
        e = _turned(e, cos, -sin, positions, interleaved)
    r = rstd.unsqueeze(-1)
    n = x.to(acc)
    n = (n - mean.unsqueeze(-1) if kind == LAYER else n) * r
    dx, dweight = x.new_empty(0), n.new_empty(0)
    if need_x:
        h = e if weight is None else e * _per_head(weight, positions, acc)
        share = (h * n).sum(-1, keepdim=True)
        share = share / x.shape[-1] if kind in (RMS, LAYER) else share
        if kind == L2:
            share = torch.where(r >= 1 / torch.full_like(r, eps), 0.0, share)
        d = h - n * share
        d = d - h.mean(-1, keepdim=True) if kind == LAYER else d
        dx = (d * r).to(x.dtype).contiguous()
    if need_weight:
        per_head = weight is not None and weight.dim() == 2
        dweight = (e * n).sum((0, positions) if per_head else (0, 1, 2))
    return dx, dweight


# ---- autograd ----------------------------------------------------------------------------------------


class _QKNorm(torch.autograd.Function):
    """Both of a pair (or one, with k None) in one node of the graph."""

    @staticmethod
    def forward(ctx, q, k, q_weight, k_weight, cos, sin, *options):
        y, *kept = _op.head_norm(q, q_weight, cos, sin, *options)
        ctx.options, ctx.pair = options, k is not None
        ctx.set_materialize_grads(False)
        if k is None:
            ctx.save_for_backward(cos, sin, q, q_weight, *kept)
            return y
        z, *kept_k = _op.head_norm(k, k_weight, cos, sin, *options)
        ctx.save_for_backward(cos, sin, q, q_weight, *kept, k, k_weight, *kept_k)
        return y, z

    @staticmethod
    def backward(ctx, dy, dz=None):
        cos, sin, *saved = ctx.saved_tensors
        needs, turn = ctx.needs_input_grad, (cos, sin)
        dq, dq_weight = _one_backward(ctx.options, turn, dy, saved[:4], needs[0], needs[2])
        dk = dk_weight = None
        if ctx.pair:
            dk, dk_weight = _one_backward(ctx.options, turn, dz, saved[4:], needs[1], needs[3])
        return dq, dk, dq_weight, dk_weight, *[None] * (2 + len(ctx.options))


def _one_backward(options, turn, dy, saved, need_x, need_weight):
    x, weight, mean, rstd = saved
    if dy is None or not (need_x or need_weight):
        return None, None
    if torch.is_grad_enabled():

        def norm(x, weight):
            return head_norm_reference(x, weight, *turn, *options)[0]

        return differentiable_vjp(norm, (x, weight), (need_x, need_weight), (dy,))
    dx, dweight = _op.head_norm_backward(
        dy, x, weight, *turn, mean, rstd, *options, need_x, need_weight
    )
    return dx if need_x else None, dweight.to(weight.dtype) if need_weight else None


def head_norm(x: Tensor, kind: int, eps: float) -> Tensor:
    """One tensor (B, ., ., d), no weight, no rotation: what l2_normalize calls."""
    options = (kind, eps, 2, False)
    if use_reference():
        return head_norm_reference(x, None, None, None, *options)[0]
    if needs_graph(x):
        return _QKNorm.apply(x, None, None, None, None, None, *options)
    return _op.head_norm(x, None, None, None, *options)[0]


# ---- public function ---------------------------------------------------------------------------------


def _angles(name, value, x, positions, rotary_dim, interleaved):
    """cos or sin as (B or 1, T, rotary_dim / 2) in the dtype that is computed in."""
    _check.tensor(name, value)
    T = x.shape[positions]
    wide = value.shape[-1] == rotary_dim if value.dim() else False
    fits = value.dim() in (2, 3) and (wide or 2 * value.shape[-1] == rotary_dim)
    if (
        not fits
        or value.shape[-2] != T
        or (value.dim() == 3 and value.shape[0] not in (1, x.shape[0]))
    ):
        raise ValueError(
            f"{name}: expected shape ({T}, {rotary_dim // 2}) or ({T}, {rotary_dim}), or with a leading "
            f"batch of {x.shape[0]}, to go with {T} positions and rotary_dim {rotary_dim}, "
            f"got {tuple(value.shape)}"
        )
    if value.device != x.device:
        raise ValueError(f"{name}: expected device {x.device} (that of q), got {value.device}")
    if value.requires_grad:
        raise ValueError(f"{name}: no gradient flows to the angles; detach {name} first")
    if wide:
        # Both elements of a pair have the same angle: one of each is enough.
        value = value[..., ::2] if interleaved else value[..., : rotary_dim // 2]
    value = value.to(accumulate_type(x)).contiguous()
    return value if value.dim() == 3 else value.unsqueeze(0)


def _head_weight(name, weight, x, heads, x_name):
    if weight is None:
        return
    if isinstance(weight, Tensor) and weight.dim() == 2:
        _check.like(name, weight, (x.shape[heads], x.shape[-1]), x, x_name)
    else:
        _check.like(name, weight, x.shape[-1:], x, x_name)


def _scaled(weight, scale, offset, x):
    """(weight + offset) * scale as one small tensor that autograd sees."""
    acc = accumulate_type(x)
    if weight is not None and offset:
        weight = weight.to(acc) + offset
    if scale is None:
        return weight
    scale = torch.as_tensor(scale, dtype=acc, device=x.device).unsqueeze(-1)
    one = weight.to(acc) if weight is not None else scale.new_ones(x.shape[-1])
    return one * scale


def _default_eps(kind: int, x: Tensor) -> float:
    if kind == RMS:
        return torch.finfo(accumulate_type(x)).eps
    return 1e-5 if kind == LAYER else 1e-12


def qk_norm(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    *,
    scale: Tensor | float | None = None,
    kind: str = "rms",
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    interleaved: bool = False,
    rotary_dim: int | None = None,
    weight_offset: float = 0.0,
    eps: float | None = None,
    seq_dim: int = -2,
) -> tuple[Tensor, Tensor]:
    r"""Queries and keys normalised over the head dimension, then turned by a rotary embedding.

    $v = (x - \mu)\,r\,(\mathrm{weight} + \mathrm{weight\_offset})$ with r by `kind`: "rms"
    $(\overline{x^2} + \varepsilon)^{-1/2}$, "layer" (centred) $(\mathrm{var} + \varepsilon)^{-1/2}$, "l2"
    $1/\max(\|x\|, \varepsilon)$, "l2_add" $(\|x\|^2 + \varepsilon)^{-1/2}$; q also times `scale`. With cos and sin the
    first `rotary_dim` elements are turned in pairs: $(v_j \cos - v_{j'} \sin,\ v_{j'} \cos + v_j \sin)$.

    Args:
        q, k: (B, H, T, d), or (B, T, H, d) with `seq_dim=1`; k may have fewer heads (grouped queries) and, without
            cos, another T. Any strides with 1 as the last, such as views of one fused projection: no copy is made.
        q_weight, k_weight: (d,), or (H, d) for one vector a head; may be float32 with half-precision q.
        scale: QKNorm's learned g that replaces $1/\sqrt d$: a number, a tensor of one element or of (H,); then call
            the attention with `scale=1.0`. g starts at $\log_2(L^2 - L)$, L the length (97.5th percentile) of the
            training sequences. DiMR's per-head form is a weight, for both:
            `(0.5 * s.clamp(max=log(100)) - 0.25 * log(d)).exp()[:, None].expand(H, d)`.
        cos, sin: (T, rotary_dim / 2), or (T, rotary_dim) with every angle twice, optionally with a leading B. Their
            rows belong to the T positions in order: slice them to offset the positions. Constants: no gradient.
        interleaved: pairs are (2j, 2j + 1), not (j, j + rotary_dim / 2).
        rotary_dim: even, at most d; the rest of the head is not turned. Default d.
        weight_offset: added to the weights; 1.0 for Gemma's convention.
        eps: default by kind: torch's rule for rms, 1e-5 for layer, 1e-12 for l2 and l2_add.
        seq_dim: the dimension of the positions, -2 or 1.

    Shapes: q (B, H, T, d), k (B, Hk, T, d) -> the same, contiguous; d up to 8192. float32, float64, bfloat16,
    float16; computed in float32 (float64 for float64). Saved for backward: q, k, weights, one or two numbers a row.

    Raises:
        ValueError, TypeError: naming the argument whose shape, dtype or device does not fit.

    Source: Henry et al., "Query-Key Normalization for Transformers", 2020; Su et al., "RoFormer", 2021; Liu et al.,
    "Alleviating Distortion in Image Generation via Multi-Resolution Diffusion Models", 2024 (DiMR).
    """
    _check.tensor("q", q, dim=4)
    _check.tensor("k", k, dim=4)
    _check.same_dtype("k", k, q, "q")
    if k.device != q.device:
        raise ValueError(f"k: expected device {q.device} (that of q), got {k.device}")
    _check.choice("kind", kind, KINDS)
    _check.choice("seq_dim", seq_dim, (-2, 2, 1, -3))
    positions = seq_dim % 4
    heads = 3 - positions
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise ValueError(
            f"k: expected batch {q.shape[0]} and head dimension {q.shape[3]} to go with q of shape "
            f"{tuple(q.shape)}, got {tuple(k.shape)}"
        )
    if q.shape[3] > WIDEST:
        raise ValueError(f"q: expected a head dimension of at most {WIDEST}, got {q.shape[3]}")
    code = KINDS.index(kind)
    eps = _check.number("eps", _default_eps(code, q) if eps is None else eps, low=0.0)
    offset = _check.number("weight_offset", weight_offset)
    _head_weight("q_weight", q_weight, q, heads, "q")
    _head_weight("k_weight", k_weight, k, heads, "k")
    if isinstance(scale, Tensor):
        _check.like("scale", scale, (q.shape[heads],) if scale.dim() else (), q, "q")
    elif scale is not None:
        scale = _check.number("scale", scale)
    turn: tuple[Tensor | None, Tensor | None] = (None, None)
    if cos is not None or sin is not None:
        if cos is None or sin is None:
            raise ValueError("cos, sin: expected both or neither")
        rotary_dim = _rotary(rotary_dim, q.shape[3])
        if k.shape[positions] != q.shape[positions]:
            raise ValueError(
                f"k: expected {q.shape[positions]} positions (those of q) with cos and sin, got "
                f"shape {tuple(k.shape)}"
            )
        turn = (
            _angles("cos", cos, q, positions, rotary_dim, interleaved),
            _angles("sin", sin, q, positions, rotary_dim, interleaved),
        )
    elif rotary_dim is not None:
        raise ValueError(f"rotary_dim: {rotary_dim!r} was given without cos and sin")
    if q.is_cuda and torch.is_autocast_enabled("cuda") and q.dtype != torch.float64:
        # As torch's own norms on CUDA: float32 in and out. On the CPU autocast leaves norms alone.
        q, k = q.float(), k.float()
    q_weight = _scaled(q_weight, scale, offset, q)
    k_weight = _scaled(k_weight, None, offset, k)
    interleaved = bool(interleaved)
    options = (code, eps, positions, interleaved)
    if use_reference():
        q_out = head_norm_reference(q, q_weight, *turn, code, eps, positions, interleaved)[0]
        return q_out, head_norm_reference(k, k_weight, *turn, code, eps, positions, interleaved)[0]
    if needs_graph(q, k, q_weight, k_weight):
        return _QKNorm.apply(q, k, q_weight, k_weight, *turn, *options)
    return (
        _op.head_norm(q, q_weight, *turn, *options)[0],
        _op.head_norm(k, k_weight, *turn, *options)[0],
    )


def _rotary(rotary_dim: object, d: int) -> int:
    if rotary_dim is None:
        rotary_dim = d
    if isinstance(rotary_dim, bool) or not isinstance(rotary_dim, int):
        raise TypeError(
            f"rotary_dim: expected an int or None, got {type(rotary_dim).__name__} {rotary_dim!r}"
        )
    if rotary_dim % 2 or not 0 <= rotary_dim <= d:
        raise ValueError(f"rotary_dim: expected an even number of at most {d}, got {rotary_dim}")
    return rotary_dim
