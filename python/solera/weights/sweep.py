r"""Core `sweep`: all interpolations of two weight lists from one read of both.

$$\mathrm{out}_{al} = (1 - \alpha_{al})\,b_l + \alpha_{al}\,w_l,\qquad a < A .$$

With $G_{al}$ the gradient of $\mathrm{out}_{al}$

$$\mathrm{d}\alpha_{al} = \langle G_{al},\, w_l - b_l\rangle,\qquad
  \mathrm{d}b_l = \sum_a (1 - \alpha_{al})\,G_{al},\qquad
  \mathrm{d}w_l = \sum_a \alpha_{al}\,G_{al} .$$

Written so, and not as $b + \alpha (w - b)$, the ends are exact: $\alpha = 0$ gives b and $\alpha = 1$ gives w (where
both are finite). Dots are float32 over short runs and float64 over those, in a fixed order.

Source: WiSE-FT, Wortsman et al., "Robust fine-tuning of zero-shot models", 2022.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _check
from .._registry import accumulate_type, reference
from .._route import needs_graph, use_reference
from . import _models

_op = torch.ops.solera
Weights = Tensor | Sequence[Tensor] | Mapping[str, Tensor] | torch.nn.Module


# ---- reference ---------------------------------------------------------------------------------------


def _column(alpha: Tensor, item: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    column = alpha if alpha.dim() == 1 else alpha[:, item]
    return column.to(dtype).view(-1, *(1,) * like.dim())


def lerp_sweep_reference(
    base: Sequence[Tensor], tuned: Sequence[Tensor], alpha: Tensor
) -> list[Tensor]:
    """The formula, in float32 (float64 for float64), rounded once."""
    out = []
    for item, (b, w) in enumerate(zip(base, tuned, strict=True)):
        acc = accumulate_type(b)
        # 1 - alpha is taken before alpha is rounded to the accumulator, as in the kernels.
        near, far = (_column(t, item, b, acc) for t in (1 - alpha.double(), alpha))
        out.append((near * b.to(acc) + far * w.to(acc)).to(b.dtype))
    return out


@reference("lerp_sweep")
def _lerp_sweep(base, tuned, alpha):
    if any(b.shape != w.shape or b.dtype != w.dtype for b, w in zip(base, tuned, strict=True)):
        raise RuntimeError("lerp_sweep: a tensor differs in shape or dtype from its base")
    return [t.contiguous() for t in lerp_sweep_reference(base, tuned, alpha)]


def lerp_sweep_vjp(
    grads: Sequence[Tensor],
    base: Sequence[Tensor],
    tuned: Sequence[Tensor],
    alpha: Tensor,
    need_alpha: bool,
    need_base: bool,
    need_tuned: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """dalpha (A, L) in float64 and the gradients asked for, in plain torch: itself differentiable."""
    count, length = alpha.shape[0], len(grads)
    dalpha = alpha.new_empty(0, dtype=torch.float64)
    if need_alpha:
        dots = [
            (g.double() * (w.double() - b.double())).reshape(count, -1).sum(1)
            if g.numel()
            else (g.double() * 0).new_zeros(count)
            for g, b, w in zip(grads, base, tuned)
        ]
        dalpha = (
            torch.stack(dots, 1) if length else alpha.new_zeros((count, 0), dtype=torch.float64)
        )

    def summed(factors: Tensor) -> list[Tensor]:
        found = []
        for item, g in enumerate(grads):
            acc = accumulate_type(g)
            column = _column(factors, item, g[0] if count else g.new_empty(g.shape[1:]), acc)
            found.append((column * g.to(acc)).sum(0).to(g.dtype))
        return found

    dbase = summed(1 - alpha.double()) if need_base else []
    dtuned = summed(alpha) if need_tuned else []
    return dalpha, dbase, dtuned


@reference("lerp_sweep_backward")
def _lerp_sweep_backward(grads, base, tuned, alpha, need_alpha, need_base, need_tuned):
    dalpha, *rest = lerp_sweep_vjp(grads, base, tuned, alpha, need_alpha, need_base, need_tuned)
    return dalpha, *([t.contiguous() for t in found] for found in rest)


# ---- autograd ----------------------------------------------------------------------------------------


class _Sweep(torch.autograd.Function):
    """alpha, then base's L tensors, then tuned's -> L tensors with a leading dimension A."""

    @staticmethod
    def forward(ctx, alpha, *flat):
        half = len(flat) // 2
        ctx.need_alpha = ctx.needs_input_grad[0]
        # Only the dots read the tensors: without them none is kept.
        ctx.save_for_backward(alpha, *(flat if ctx.need_alpha else ()))
        ctx.set_materialize_grads(False)
        return tuple(_op.lerp_sweep(flat[:half], flat[half:], alpha))

    @staticmethod
    def backward(ctx, *grads):
        alpha, *flat = ctx.saved_tensors
        length = len(grads)
        needs = ctx.needs_input_grad
        live = [item for item, g in enumerate(grads) if g is not None]
        if not live:
            return (None,) * len(needs)
        need_base, need_tuned = any(needs[1 : 1 + length]), any(needs[1 + length :])
        part = alpha[:, live] if alpha.dim() == 2 and len(live) < length else alpha
        backward = lerp_sweep_vjp if torch.is_grad_enabled() else _op.lerp_sweep_backward
        dots, dbase, dtuned = backward(
            [grads[item] for item in live],
            [flat[item] for item in live] if flat else [],
            [flat[length + item] for item in live] if flat else [],
            part,
            ctx.need_alpha,
            need_base,
            need_tuned,
        )
        dalpha = None
        if ctx.need_alpha:
            if alpha.dim() == 1:
                dalpha = dots.sum(1)
            elif len(live) < length:
                place = torch.tensor(live, device=dots.device)
                dalpha = dots.new_zeros(alpha.shape).index_copy(1, place, dots)
            else:
                dalpha = dots
            dalpha = dalpha.to(alpha.dtype)
        dflat: list[Tensor | None] = [None] * (2 * length)
        for start, found in ((0, dbase), (length, dtuned)):
            for item, gradient in zip(live, found):
                if needs[1 + start + item]:
                    dflat[start + item] = gradient
        return dalpha, *dflat


# ---- public function ---------------------------------------------------------------------------------


def alphas(name: str, value: Any, length: int, like: Tensor) -> tuple[Tensor, bool]:
    """(alpha (A,) or (A, L) in float32 or float64, whether it was one number)."""
    if isinstance(value, Tensor):
        alpha = value
        if alpha.dtype not in _check.FLOATS:
            raise TypeError(f"{name}: expected a floating-point dtype, got {alpha.dtype}")
        if alpha.device != like.device:
            raise ValueError(f"{name}: expected device {like.device}, got {alpha.device}")
        alpha = alpha if alpha.dtype == torch.float64 else alpha.float()
    else:
        dtype = torch.float32 if like.device.type == "mps" else torch.float64
        try:
            alpha = torch.tensor(value, dtype=dtype, device=like.device)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            raise TypeError(
                f"{name}: expected a number, a list of numbers or a tensor, got {value!r:.200}"
            ) from None
    if alpha.dim() > 2 or (alpha.dim() == 2 and alpha.shape[1] != length):
        raise ValueError(
            f"{name}: expected a number, shape (A,) or (A, {length}) for {length} floating-point "
            f"tensor(s), got {tuple(alpha.shape)}"
        )
    return (alpha.reshape(1), True) if alpha.dim() == 0 else (alpha, False)


def interpolate(a: Weights, b: Weights, t: float | Sequence[float] | Tensor) -> Any:
    r"""Interpolation of two tensors, lists of tensors, state dicts or modules: $(1 - t)\,a + t\,b$.

    Args:
        a, b: two of one kind; of modules the state dicts are taken. float32, float64, bfloat16 or float16; where the
            dtypes of a pair differ both are first converted to the promoted one. Computed in float32 (float64 for
            float64), rounded once. Integer and boolean entries of state dicts must be equal and are copied.
        t: a number (also a tensor of no dimension), or a vector (M,): all M interpolations from one read of both; or
            (M, L), with a value for each of the L floating-point tensors, in order. Not bounded to [0, 1].

    Shapes: a number -> a's shapes; (M,) or (M, L) -> (M, *S) for each tensor of shape S (a list or state dict of
    those), integer entries as they are.

    Differentiable in t, a and b.

    Raises:
        ValueError, TypeError: naming the argument: keys, shapes, dtypes or devices that do not fit.

    Source: Wortsman et al., "Robust fine-tuning of zero-shot models", 2022; path between models: Schürholt et al.,
    "Model Zoos: A Dataset of Diverse Populations of Neural Network Models", 2022.
    """
    return sweep(a, b, t, ("a", "b", "t"))


def sweep(base: Any, tuned: Any, alpha: Any, names: tuple[str, str, str]) -> Any:
    """`interpolate` with the arguments' names for its errors."""
    kind, keys, whole, flat = _models.gather([base, tuned], names[:2])
    length = len(keys)
    like = flat[0]
    c, single = alphas(names[2], alpha, length, like)
    pairs = []
    for b, w in zip(flat[:length], flat[length:]):
        dtype = torch.promote_types(b.dtype, w.dtype)
        pairs.append((b.to(dtype), w.to(dtype)))
    bases, tuneds = [p[0] for p in pairs], [p[1] for p in pairs]
    results: Sequence[Tensor]
    if use_reference():
        results = lerp_sweep_reference(bases, tuneds, c)
    elif needs_graph(c, *bases, *tuneds):
        results = _Sweep.apply(c, *bases, *tuneds)
    else:
        results = _op.lerp_sweep(bases, tuneds, c)
    if single:
        results = [y.squeeze(0) for y in results]
    return _models.as_given(kind, keys, whole, results)
