r"""Core `reparam`: weights that are a function of two tensors (or of a tensor and two numbers) in a forward pass.

**mixout**, M ~ Bernoulli(1 - p) by element or by column, s = 1/(1 - p):

$$\tilde W = U + s\,M\odot(W - U),\qquad
  \mathrm{d}W = s\,M\odot\mathrm{d}\tilde W,\quad \mathrm{d}U = \mathrm{d}\tilde W - \mathrm{d}W .$$

The mask is a function of the seed (see `_random.py`), made again in the backward: kept is the seed.

**masked weight**, straight-through: $W' = W\odot 1[M > a]$, $\mathrm{d}M = \mathrm{d}W'\odot W$,
$\mathrm{d}W = \mathrm{d}W'\odot 1[M > a]$.

**gradient dropout**, u uniform: $P = \tfrac12\bigl(1 + \mathrm{sign}(g)\,\tfrac{g + h}{|g| + |h| + \epsilon}\bigr)$,
$g \leftarrow g$ where $P > u$, $(1 - \lambda)\,g$ elsewhere.

**compander**, $t = v/b$, f = arctan or tanh: $W = a\,f(t)$; with G the gradient of W,
$\mathrm{d}v = \tfrac ab f'(t)\,G$, $\mathrm{d}a = \sum f(t)\,G$, $\mathrm{d}b = -\sum t\,\mathrm{d}v$.

All in float32 (float64 for float64), products and sums of mixout and of the dropout rounded one by one, so that
every backend gives the same bits.

Sources: Lee, Cho, Kang, "Mixout", 2020; Zheng et al., "Regularized Mask Tuning", 2023; Weight Compander, 2023
(the forms a·arctan(v/b) and a·tanh(v/b) derived here from its description).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _check
from .._autograd import differentiable_vjp
from .._registry import accumulate_type, reference
from .._route import needs_graph, use_reference
from . import _lists
from ._random import keep_below, random_words, tensor_key

_op = torch.ops.solera
MASKS = ("element", "column")
KINDS = ("arctan", "tanh")


# ---- reference ---------------------------------------------------------------------------------------


def kept(like: Tensor, seed: Tensor, p: float, key: int, column: bool) -> Tensor:
    """The mask M, True where an element is kept; of a column mask one row, to be broadcast."""
    shape = like.shape
    if column and like.dim() > 1:
        shape = torch.Size((1, *shape[1:]))
    words = random_words(seed, key, 0, shape.numel())
    return (words < keep_below(1.0 - p)).view(shape)


def mixout_reference(
    weight: Tensor, anchor: Tensor | None, seed: Tensor, p: float, key: int, column: bool
) -> Tensor:
    """anchor + mask (weight - anchor) / (1 - p), rounded once; anchor None counts as 0."""
    acc = accumulate_type(weight)
    scale = 1.0 / (1.0 - p) if p < 1.0 else 0.0
    base = torch.zeros((), dtype=acc, device=weight.device) if anchor is None else anchor.to(acc)
    moved = base + (weight.to(acc) - base) * scale
    return torch.where(kept(weight, seed, p, key, column), moved, base).to(weight.dtype)


@reference("mixout")
def _mixout(weight, anchor, seed, p, key, column):
    return mixout_reference(weight, anchor, seed, p, key, column).contiguous()


def _gradients(grad: Tensor, first, second, need_first: bool, need_second: bool):
    none = grad.new_empty(0)
    return (
        first().to(grad.dtype).contiguous() if need_first else none,
        second().to(grad.dtype).contiguous() if need_second else none.clone(),
    )


@reference("mixout_backward")
def _mixout_backward(grad, seed, p, key, column, need_weight, need_anchor):
    acc = accumulate_type(grad)
    scale = 1.0 / (1.0 - p) if p < 1.0 else 0.0
    g = grad.to(acc)
    d = torch.where(kept(grad, seed, p, key, column), g * scale, 0.0)
    return _gradients(grad, lambda: d, lambda: g - d, need_weight, need_anchor)


def masked_weight_reference(weight: Tensor, score: Tensor, threshold: float) -> Tensor:
    """W 1[M > a]; the gradient to M is the straight-through one (its value adds an exact 0)."""
    value = torch.where(score > threshold, weight, 0.0)
    if not (score.requires_grad or torch._C._are_functorch_transforms_active()):
        return value
    pull = weight.detach() * score
    return value + torch.where(pull.isfinite(), pull - pull.detach(), 0.0)


@reference("masked_weight")
def _masked_weight(weight, score, threshold):
    return torch.where(score > threshold, weight, 0.0).contiguous()


@reference("masked_weight_backward")
def _masked_weight_backward(grad, weight, score, threshold, need_weight, need_score):
    acc = accumulate_type(grad)
    return _gradients(
        grad,
        lambda: torch.where(score > threshold, grad, 0.0),
        lambda: grad.to(acc) * weight.to(acc),
        need_weight,
        need_score,
    )


@reference("gradient_dropout")
def _gradient_dropout(grad, other, seed, rate, eps, key):
    acc = accumulate_type(grad)
    g, h = grad.to(acc), other.to(acc)
    toward = torch.where(g > 0, g + h, torch.where(g < 0, -(g + h), 0.0))
    agreement = 0.5 * (1.0 + toward / (g.abs() + h.abs() + eps))
    u = (random_words(seed, key, 0, grad.numel()) >> 8).to(acc).view(grad.shape) * 2.0**-24
    return torch.where(agreement > u, g, g * (1.0 - rate)).to(grad.dtype).contiguous()


def weight_compand_reference(v: Tensor, a: Tensor, b: Tensor, kind: int) -> Tensor:
    """a atan(v / b), or with kind 1 a tanh(v / b), rounded once."""
    acc = accumulate_type(v)
    t = v.to(acc) / b.to(acc)
    return (a.to(acc) * (t.tanh() if kind else t.atan())).to(v.dtype)


@reference("weight_compand")
def _weight_compand(v, a, b, kind):
    return weight_compand_reference(v, a, b, kind).contiguous()


@reference("weight_compand_backward")
def _weight_compand_backward(grad, v, a, b, kind, need_v):
    acc = accumulate_type(v)
    g, t = grad.to(acc), v.to(acc) / b
    f = t.tanh() if kind else t.atan()
    d = g * (a / b) * (1 - f * f) if kind else g * (a / b) / (1 + t * t)
    dab = torch.stack([(g * f).double().sum(), -(t * d).double().sum()])
    return d.to(v.dtype).contiguous() if need_v else v.new_empty(0), dab


# ---- autograd ----------------------------------------------------------------------------------------


class _Mixout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, anchor, seed, p, key, column):
        ctx.save_for_backward(seed)
        ctx.rest = (p, key, column)
        return _op.mixout(weight, anchor, seed, p, key, column)

    @staticmethod
    def backward(ctx, grad):
        (seed,) = ctx.saved_tensors
        need_weight, need_anchor = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled():
            dweight = mixout_op(grad, None, seed, *ctx.rest)  # s M g: mixout toward 0
            danchor = grad - dweight if need_anchor else None
        else:
            dweight, danchor = _op.mixout_backward(grad, seed, *ctx.rest, need_weight, need_anchor)
        return (
            dweight if need_weight else None,
            danchor if need_anchor else None,
            *(None,) * 4,
        )


def mixout_op(
    weight: Tensor, anchor: Tensor | None, seed: Tensor, p: float, key: int, column: bool
) -> Tensor:
    """mixout of one tensor; the arguments have been checked."""
    if use_reference():
        return mixout_reference(weight, anchor, seed, p, key, column)
    if needs_graph(weight, anchor):
        return _Mixout.apply(weight, anchor, seed, p, key, column)
    return _op.mixout(weight, anchor, seed, p, key, column)


class _MaskedWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, score, threshold):
        need_score = ctx.needs_input_grad[1]
        ctx.save_for_backward(weight if need_score else None, score)
        ctx.threshold = threshold
        return _op.masked_weight(weight, score, threshold)

    @staticmethod
    def backward(ctx, grad):
        weight, score = ctx.saved_tensors
        need_weight, need_score = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled():
            dweight = torch.where(score > ctx.threshold, grad, 0.0) if need_weight else None
            return dweight, grad * weight if need_score else None, None
        dweight, dscore = _op.masked_weight_backward(
            grad, score if weight is None else weight, score, ctx.threshold, need_weight, need_score
        )
        return dweight if need_weight else None, dscore if need_score else None, None


class _WeightCompand(torch.autograd.Function):
    @staticmethod
    def forward(ctx, v, a, b, kind):
        ctx.save_for_backward(v, a, b)
        ctx.kind = kind
        return _op.weight_compand(v, a.detach(), b.detach(), kind)

    @staticmethod
    def backward(ctx, grad):
        v, a, b = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled():
            formula = lambda v, a, b: weight_compand_reference(v, a, b, ctx.kind)
            return *differentiable_vjp(formula, (v, a, b), needs[:3], (grad,)), None
        dv, dab = _op.weight_compand_backward(grad, v, a, b, ctx.kind, needs[0])
        da, db = dab.to(a.dtype).unbind()
        return dv if needs[0] else None, da if needs[1] else None, db if needs[2] else None, None


# ---- arguments ---------------------------------------------------------------------------------------


def seed_tensor(seed: int | Tensor | None, like: Tensor) -> Tensor:
    """One int64 number on like's device. None draws one from torch's generator, without waiting for it."""
    if seed is None:
        return torch.randint(2**63 - 1, (), dtype=torch.int64, device=like.device)
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise TypeError(
                f"seed: expected an int or an int64 tensor of one number, got {seed.dtype} of shape "
                f"{tuple(seed.shape)}"
            )
        if seed.device != like.device:
            raise ValueError(f"seed: expected device {like.device}, got {seed.device}")
        return seed.reshape(())
    if isinstance(seed, bool) or not isinstance(seed, int | torch.SymInt):
        raise TypeError(f"seed: expected an int, an int64 tensor or None, got {seed!r:.100}")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed: expected an int within [-2^63, 2^63), got {seed!r}")
    return torch.full((), seed, dtype=torch.int64, device=like.device)


def pair(name: str, value: Any, like: Tensor, like_name: str = "weight") -> Tensor:
    """A tensor of like's shape, dtype and device."""
    _check.tensor(name, value)
    _check.like(name, value, tuple(like.shape), like, like_name)
    _check.same_dtype(name, value, like, like_name)
    return value


def is_zero(anchor: Any) -> bool:
    """None or the number 0: DropConnect."""
    return anchor is None or (isinstance(anchor, int | float) and anchor == 0)


Weights = Tensor | Sequence[Tensor] | Mapping[str, Tensor]


def each_tensor(name: str, value: Any, other_name: str, other: Any, function: Callable) -> Any:
    """function(name, tensor, other name, other tensor or None, key) over a tensor, a list or a state dict."""
    kind = _lists.kind_of(name, value)
    items = _lists.entries(name, value, kind)
    others: dict = dict.fromkeys(items)
    if other is not None:
        others = _lists.entries(other_name, other, kind)
        _lists.match_keys(other_name, others, name, items, kind)
    out = {
        key: function(
            _lists.spelled(name, kind, key), t, _lists.spelled(other_name, kind, key), others[key],
            tensor_key(key),
        )
        for key, t in items.items()
    }  # fmt: skip
    if kind == "tensor":
        return out[0]
    return out if kind == "state dict" else list(out.values())


# ---- public functions --------------------------------------------------------------------------------


def mixout(
    weight: Weights,
    anchor: Any,
    p: float,
    seed: int | Tensor | None = None,
    *,
    mask: str = "element",
    training: bool = True,
) -> Any:
    r"""Weights mixed at random with those of an anchor: $U + M\odot(W - U)/(1 - p)$, M ~ Bernoulli(1 - p).

    The expected value is W. In training, an element is the anchor's with probability p, and else lies
    1/(1 - p) times as far from it as W. No mask is stored: forward and backward make it from the seed, the same
    on every device, at any tiling and for any number of threads. The gradients are the exact ones,
    $\mathrm{d}W = M\odot\mathrm{d}\tilde W/(1 - p)$ and $\mathrm{d}U = \mathrm{d}\tilde W - \mathrm{d}W$ (the authors'
    code leaves 1/(1 - p) out).

    Args:
        weight: W, a tensor, a list of tensors or a state dict; each has a mask of its own (by its index or name).
        anchor: U, like weight: the pretrained weights. None or 0 is DropConnect.
        p: probability of the anchor's element, in [0, 1]. With 0 the result is `weight` itself, with 1 it is U.
        seed: an int, or an int64 tensor of one number on weight's device, which is not read on the host. None
            draws a fresh one from torch's generator. Pass the same seed to get the same mask again.
        mask: "element", or "column": one row of M for all rows (`weight[0]`'s shape), as the authors' code has
            it for weights of two or more dimensions.
        training: False returns `weight` itself.

    Shapes: any S -> S; lists of tensors and state dicts alike. float32, float64, bfloat16, float16, anchor and
    weight of one dtype. Under `torch.func.vmap` a seed that is not batched gives every item the same mask; None
    follows vmap's `randomness`.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Lee, Cho, Kang, "Mixout: Effective Regularization to Finetune Large-scale Pretrained Language Models",
    2020; DropConnect: Wan et al., 2013.
    """
    p = _check.number("p", p, low=0.0, high=1.0)
    _check.choice("mask", mask, MASKS)
    drawn: list[Tensor] = []  # one seed for all tensors of a list

    def one(name, w, anchor_name, u, key):
        _check.tensor(name, w)
        if u is not None:
            pair(anchor_name, u, w, name)
        if not training or p == 0.0:
            return w
        if not drawn:
            drawn.append(seed_tensor(seed, w))
        return mixout_op(w, u, drawn[0], p, key, mask == "column")

    return each_tensor("weight", weight, "anchor", None if is_zero(anchor) else anchor, one)


def masked_weight(weight: Tensor, score: Tensor, threshold: float) -> Tensor:
    r"""A frozen weight under a learned binary mask: $W\odot 1[M > a]$, with straight-through gradient to M.

    $\mathrm{d}M = \mathrm{d}W'\odot W$ as if the mask were M itself; $\mathrm{d}W = \mathrm{d}W'\odot 1[M > a]$.

    Args:
        weight: W. Without requires_grad nothing is computed for it.
        score: M, like weight.
        threshold: a.

    Shapes: any S, S -> S. float32, float64, bfloat16, float16, both of one dtype. Under `torch.func` too the
    gradient to M is the straight-through one.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Zheng et al., "Regularized Mask Tuning: Uncovering Hidden Knowledge in Pre-trained Vision-Language
    Models", 2023.
    """
    _check.tensor("weight", weight)
    pair("score", score, weight)
    threshold = _check.number("threshold", threshold)
    if use_reference():
        return masked_weight_reference(weight, score, threshold)
    if needs_graph(weight, score):
        return _MaskedWeight.apply(weight, score, threshold)
    return _op.masked_weight(weight, score, threshold)


@torch.no_grad()
def gradient_dropout(
    grad: Weights,
    other: Any,
    rate: float,
    seed: int | Tensor | None = None,
    *,
    eps: float = 1e-20,
) -> Any:
    r"""A gradient damped at random where another one disagrees with it.

    With g the task's gradient, h the one of keeping the pretrained model's predictions (of
    $T^2\,\mathrm{CE}(\mathrm{softmax}(z_0/T), \mathrm{softmax}(z/T))$) and u uniform on [0, 1):
    $P = \tfrac12(1 + \mathrm{sign}(g)\frac{g + h}{|g| + |h| + \epsilon})$; g stays where P > u and becomes
    (1 - rate) g elsewhere. Gradients of one sign always pass.

    Args:
        grad, other: g and h, tensors, lists of tensors or dicts alike; of a list each has randomness of its own.
        rate: $\lambda$ in [0, 1]; 1 drops what does not pass.
        seed: as in `mixout`.
        eps: keeps the quotient finite. (The authors' code has 1e-8, which also drops gradients below it at random.)

    Shapes: any S, S -> S; new tensors, no gradient flows. float32, float64, bfloat16, float16. The uniform numbers
    have 24 bits, the same on every device.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Zheng et al., "Regularized Mask Tuning", 2023.
    """
    rate = _check.number("rate", rate, low=0.0, high=1.0)
    eps = _check.number("eps", eps, low=0.0)
    if other is None:
        raise TypeError("other: expected what grad is, got None")
    drawn: list[Tensor] = []

    def one(name, g, other_name, h, key):
        _check.tensor(name, g)
        pair(other_name, h, g, name)
        if not drawn:
            drawn.append(seed_tensor(seed, g))
        route = _gradient_dropout if use_reference() else _op.gradient_dropout
        return route(g, h, drawn[0], rate, eps, key)

    return each_tensor("grad", grad, "other", other, one)


def _scalar(name: str, value: float | Tensor, v: Tensor) -> Tensor:
    if not isinstance(value, Tensor):
        number = _check.number(name, value)
        return torch.full((), number, dtype=accumulate_type(v), device=v.device)
    if value.numel() != 1:
        raise ValueError(f"{name}: expected one number, got shape {tuple(value.shape)}")
    _check.like(name, value, tuple(value.shape), v, "v")
    return value.reshape(()).to(accumulate_type(v))


def weight_compand(v: Tensor, a: float | Tensor, b: float | Tensor, kind: str = "arctan") -> Tensor:
    r"""Weights through an odd, bounded curve: $W = a\arctan(v/b)$, or $a\tanh(v/b)$.

    Small weights are spread (the slope at 0 is a/b), large ones held below $a\pi/2$ (a for tanh).

    Args:
        v: what is trained in W's place.
        a, b: numbers, or tensors of one element, which may require a gradient; b is not 0.
        kind: "arctan" or "tanh".

    Shapes: v of any S -> S. float32, float64, bfloat16, float16. Gradients go to v, a and b; those of a and b are
    summed in a fixed order, in float64 beyond 1024 elements.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Weight Compander: A Simple Weight Reparameterization for Regularization, 2023 (form derived from its
    description).
    """
    _check.tensor("v", v)
    _check.choice("kind", kind, KINDS)
    scale, width = _scalar("a", a, v), _scalar("b", b, v)
    index = KINDS.index(kind)
    if use_reference():
        return weight_compand_reference(v, scale, width, index)
    if needs_graph(v, scale, width):
        return _WeightCompand.apply(v, scale, width, index)
    return _op.weight_compand(v, scale, width, index)
