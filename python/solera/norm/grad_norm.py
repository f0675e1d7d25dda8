r"""Core `grad_norm`: norms over lists of tensors, and gradients scaled by them in place.

Four passes over a list of L tensors, each one call for the whole list, none waiting for the device:

* `tensor_norms`: $\lVert x_l \rVert_p$ for p = 1, 2, inf, optionally of x with its entries above a threshold
  $t_l$ scaled by $f_l$;
* `tensor_dots`: $\langle a, a\rangle, \langle a, b\rangle, \langle b, b\rangle$, in float64;
* `scale_tensors_`: $x_l \leftarrow f_l x_l$, where tensors with $f_l = 1$ are not touched;
* `clip_units_`: adaptive gradient clipping. With a unit the part of a tensor that belongs to one output (index 0 of
  two or more dimensions; all of a tensor of fewer),
  $g_i \leftarrow g_i\,\lambda \max(\lVert w_i \rVert, \epsilon) / \max(\lVert g_i \rVert, 10^{-6})$
  where $\lVert g_i \rVert \ge \lambda \max(\lVert w_i \rVert, \epsilon)$.

What follows from these numbers (a limit, a projection's coefficient) is arithmetic on (L,) tensors that stay on
the device. An orthogonal projection is `weights.lincomb` of gradient and parameter with those coefficients:
from the three dots $\lVert g - c w\rVert^2 = \langle g,g\rangle - \langle w,g\rangle^2/\langle w,w\rangle$, so
the rescaling needs no further pass; in float64 the difference keeps its digits.

Half precision is computed in float32, a unit or tensor with a float64 member in float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _check
from .._registry import reference
from .._route import use_reference

_op: Any = torch.ops.solera
ORDERS = (1, 2, math.inf)
_NOISE = 1e-12  # of the squared norm: a remainder below it is float32's rounding, not a direction
_TINY = 1e-6  # the least gradient norm that is divided by, as in the paper's code


# ---- reference ---------------------------------------------------------------------------------------


def _wide(tensors: Iterable[Tensor]) -> torch.dtype:
    """float64 if one of the tensors is, else float32."""
    return torch.float64 if any([t.dtype == torch.float64 for t in tensors]) else torch.float32


def _clipped(x: Tensor, clip: Tensor | None, index: int) -> Tensor:
    if clip is None:
        return x
    return torch.where(x.abs() > clip[0, index], x * clip[1, index], x)


@reference("tensor_norms")
def _tensor_norms(tensors, clip, ord):
    """(L,): the norm of each tensor; entries above clip[0, l] count clip[1, l] times."""
    dtype = _wide(tensors)
    if not tensors:
        return torch.empty(0)
    found = []
    for index, t in enumerate(tensors):
        flat = _clipped(t.to(dtype), clip, index).flatten()
        norm = torch.linalg.vector_norm(flat, ord) if t.numel() else flat.new_zeros(())
        found.append(norm)
    return torch.stack(found)


@reference("tensor_dots")
def _tensor_dots(a, b):
    """(3, L) float64: <a, a>, <a, b>, <b, b>."""
    if any([x.shape != y.shape for x, y in zip(a, b, strict=True)]):
        raise RuntimeError("tensor_dots: two tensors of a pair differ in shape")
    if not a:
        return torch.empty(3, 0, dtype=torch.float64)
    pairs = [(x.double(), y.double()) for x, y in zip(a, b)]
    rows = [[(x * x).sum(), (x * y).sum(), (y * y).sum()] for x, y in pairs]
    return torch.stack([torch.stack(row) for row in rows], 1)


@reference("scale_tensors_")
def _scale_tensors(tensors, factors):
    for t, factor in zip(tensors, factors.unbind(), strict=True):
        wide = t.to(_wide((t,)))
        t.copy_(torch.where(factor == 1, wide, wide * factor.to(wide.dtype)))


def _unit_norm(x: Tensor, ord: float) -> Tensor:
    if x.dim() < 2:
        return torch.linalg.vector_norm(x, ord)
    return torch.linalg.vector_norm(x, ord, dim=tuple(range(1, x.dim())), keepdim=True)


@reference("clip_units_")
def _clip_units(grads, parameters, clip, eps, ord):
    for g, w in zip(grads, parameters, strict=True):
        if g.shape != w.shape:
            raise RuntimeError("clip_units_: a parameter differs in shape from its gradient")
        if g.numel() == 0:
            continue
        dtype = _wide((g, w))
        wide = g.to(dtype)
        limit = _unit_norm(w.to(dtype), ord).clamp_min(eps) * clip
        norm = _unit_norm(wide, ord)
        clipped = wide * (limit / norm.clamp_min(_TINY))
        g.copy_(torch.where(norm < limit, wide, clipped))


# ---- arguments ---------------------------------------------------------------------------------------

_FLOATS = frozenset(_check.FLOATS)


def tensor_list(name: str, value: object, like: Sequence[Tensor] | None = None) -> list[Tensor]:
    """A tensor or an iterable of dense floating-point tensors on one device, shaped like `like` if given."""
    if isinstance(value, Tensor):
        tensors = [value]
    elif isinstance(value, Iterable) and not isinstance(value, str | bytes):
        tensors = list(value)
    else:
        raise TypeError(
            f"{name}: expected a tensor or an iterable of tensors, got {type(value).__name__}"
        )
    if like is not None and len(tensors) != len(like):
        raise ValueError(f"{name}: expected {len(like)} tensors, got {len(tensors)}")
    first = (tensors if like is None else like)[0] if tensors else None
    device = first.device if isinstance(first, Tensor) else None
    for index, t in enumerate(tensors):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}[{index}]: expected a torch.Tensor, got {type(t).__name__}")
        if t.dtype not in _FLOATS or t.layout is not torch.strided:
            raise TypeError(
                f"{name}[{index}]: expected a dense tensor of float32, float64, bfloat16 or float16, "
                f"got {t.dtype}, layout {t.layout}"
            )
        if t.device != device:
            raise ValueError(
                f"{name}[{index}]: expected device {device} (that of the first), got {t.device}"
            )
        if like is not None and t.shape != like[index].shape:
            raise ValueError(
                f"{name}[{index}]: expected shape {tuple(like[index].shape)}, got {tuple(t.shape)}"
            )
    return tensors


def writable(name: str, tensors: Sequence[Tensor]) -> None:
    """No tensor whose elements share memory, none given twice."""
    for index, t in enumerate(tensors):
        if not t.is_contiguous() and any(n > 1 and s == 0 for n, s in zip(t.shape, t.stride())):
            raise ValueError(f"{name}[{index}]: expanded, cannot be written in place")
    if len({id(t) for t in tensors}) != len(tensors):
        raise ValueError(f"{name}: the same tensor is given twice")


def with_grads(parameters: object) -> tuple[list[Tensor], list[Tensor]]:
    """The parameters that have a gradient, and the gradients, both detached."""
    if isinstance(parameters, Tensor):
        parameters = [parameters]
    if not isinstance(parameters, Iterable):
        raise TypeError(
            f"parameters: expected a tensor or an iterable of tensors, got {type(parameters).__name__}"
        )
    every = list(parameters)
    for index, p in enumerate(every):
        if not isinstance(p, Tensor):
            raise TypeError(f"parameters[{index}]: expected a torch.Tensor, got {type(p).__name__}")
    pairs = [(p, g) for p in every if (g := p.grad) is not None]
    live, grads = [p for p, _ in pairs], [g for _, g in pairs]
    weights = tensor_list("parameters", [p.detach() for p in live])
    if not grads:
        return [], []
    tensor_list("gradient", grads, weights)
    writable("parameters", live)
    writable("gradient", grads)
    return weights, grads


def run_in_place(name: str, plain: Any, written: Sequence[Sequence[Tensor]], *args: Any) -> Any:
    """The op of that name, or its reference; what is written counts as changed for autograd."""
    with torch.no_grad():
        if use_reference():
            return plain(*args)
        if not torch.compiler.is_compiling():
            for tensors in written:
                torch.autograd.graph.increment_version(tensors)
        return getattr(_op, name)(*args)


def norms_of(tensors: Sequence[Tensor], clip: Tensor | None = None, ord: float = 2.0) -> Tensor:
    """(L,) norms, of the clipped tensors if `clip` (2, L) is given."""
    return run_in_place("tensor_norms", _tensor_norms, (), tensors, clip, float(ord))


def dots_of(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """<a_i, b_i> of each pair of tensors, (len(a),), in one launch."""
    return run_in_place("tensor_dots", _tensor_dots, (), a, b)


def scale_(tensors: Sequence[Tensor], factors: Tensor) -> None:
    """tensors[i] *= factors[i], in one launch."""
    run_in_place("scale_tensors_", _scale_tensors, (tensors,), tensors, factors)


# ---- public functions --------------------------------------------------------------------------------


def multi_tensor_norm(
    tensors: Tensor | Iterable[Tensor], ord: float = 2, *, per_tensor: bool = False
) -> Tensor:
    r"""The norm of all tensors taken as one vector, $(\sum_l \sum_i |x_{li}|^p)^{1/p}$, in one pass.

    Args:
        tensors: a tensor or an iterable of tensors of any shapes; float32, float64, bfloat16 or float16, mixed.
        ord: 1, 2 or inf.
        per_tensor: return the norm of each tensor instead.

    Shapes: L tensors -> () or, per tensor, (L,). float32, or float64 where one of the tensors is; summed in
    float32 lanes and float64 across them. No gradient flows. NaN gives NaN. An empty list gives 0.

    Raises:
        ValueError, TypeError: naming the argument.

    Source: what `torch.nn.utils.get_total_norm` computes.
    """
    if not (isinstance(ord, int | float) and ord in ORDERS):
        raise ValueError(f"ord: expected 1, 2 or inf, got {ord!r}")
    found = tensor_list("tensors", tensors)
    if not found:
        return torch.zeros(0 if per_tensor else ())
    norms = norms_of([t.detach() for t in found], None, ord)
    return norms if per_tensor else torch.linalg.vector_norm(norms, ord)


def adaptive_grad_clip_(
    parameters: Tensor | Iterable[Tensor],
    clip: float = 0.01,
    eps: float = 1e-3,
    norm_type: float = 2.0,
) -> None:
    r"""Adaptive gradient clipping (AGC), in place on `p.grad`: unit by unit, at most a share of the weight's norm.

    $g_i \leftarrow g_i \min\bigl(1,\ \lambda \max(\lVert w_i\rVert, \epsilon) / \max(\lVert g_i\rVert, 10^{-6})\bigr)$
    for each unit i: a row of a linear weight, a filter of a convolution (everything under one index of the first
    dimension); tensors of fewer than two dimensions are one unit.

    Gradient and parameter are read once, and only clipped units are written. The paper leaves out the
    classifier's weight: do not pass it.

    Args:
        parameters: a tensor or an iterable; those without a gradient are passed over.
        clip: $\lambda$.
        eps: $\epsilon$, the least norm of a weight.
        norm_type: 1, 2 or inf.

    Shapes: any. float32, float64, bfloat16, float16; parameters and gradients may differ in dtype.

    Raises:
        ValueError, TypeError: naming the argument.

    Source: Brock et al., "High-Performance Large-Scale Image Recognition Without Normalization", 2021.
    """
    clip = _check.number("clip", clip, low=0.0)
    eps = _check.number("eps", eps, low=0.0)
    _check.choice("norm_type", norm_type, ORDERS)
    weights, grads = with_grads(parameters)
    if grads:
        arguments = (grads, weights, clip, eps, float(norm_type))
        run_in_place("clip_units_", _clip_units, (grads,), *arguments)


def orthogonalize_grad_(
    parameters: Tensor | Iterable[Tensor], *, rescale: bool = True, eps: float = 1e-30
) -> None:
    r"""Remove from each gradient its component along the parameter (OrthoGrad), in place on `p.grad`.

    $g' = g - \frac{\langle w, g\rangle}{\langle w, w\rangle + \epsilon}\, w$, for each tensor as one vector, then
    with `rescale` $g' \leftarrow g' \lVert g\rVert / \lVert g'\rVert$. A remainder below $10^{-7} \lVert g \rVert$
    is rounding noise and is scaled by $10^7$ at most.

    Two passes: three dots of each pair, then one update.

    Args:
        parameters: a tensor or an iterable; those without a gradient are passed over.
        rescale: back to the gradient's own norm, as the paper's code does; False is the paper's perpGrad.
        eps: added to the parameter's squared norm.

    Shapes: any. float32, float64, bfloat16, float16; parameters and gradients may differ in dtype.

    Raises:
        ValueError, TypeError: naming the argument.

    Source: Prieto et al., "Grokking at the Edge of Numerical Stability", 2025.
    """
    from ..weights.lincomb import _lincomb_out

    eps = _check.number("eps", eps, low=0.0)
    weights, grads = with_grads(parameters)
    if not grads:
        return
    gg, gw, ww = dots_of(grads, weights).unbind()
    along = gw / (ww + eps)
    scale = torch.ones_like(along)
    if rescale:
        rest = gg - along * (2.0 * gw - along * ww)
        scale = torch.where(rest > _NOISE * gg, (gg / rest).sqrt(), scale)
    coefficients = torch.stack([scale, -along * scale])
    arguments: Any = ([*grads, *weights], coefficients, [], grads)
    run_in_place("lincomb_out", _lincomb_out, (grads,), *arguments)


def growth_factors(norms: Tensor, prev_norm: Tensor, gamma: float) -> Tensor:
    """(L,) factors that hold each norm to gamma times the one before; prev_norm is updated in place."""
    limiter = (norms / (prev_norm + 1e-8)).clamp_min(gamma) / gamma
    factors = torch.where(prev_norm > 0, limiter.reciprocal(), torch.ones_like(limiter))
    prev_norm.copy_(norms * factors)
    return factors


def previous_norms(prev_norm: object, tensors: Sequence[Tensor]) -> Tensor:
    """prev_norm as a checked (L,) view that can be written."""
    shapes = [(len(tensors),)] + ([()] if len(tensors) == 1 else [])
    if not isinstance(prev_norm, Tensor) or tuple(prev_norm.shape) not in shapes:
        came = (
            f"shape {tuple(prev_norm.shape)}"
            if isinstance(prev_norm, Tensor)
            else type(prev_norm).__name__
        )
        raise ValueError(f"prev_norm: expected a tensor of shape {shapes[0]}, got {came}")
    if prev_norm.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"prev_norm: expected float32 or float64, got {prev_norm.dtype}")
    if prev_norm.device != tensors[0].device:
        raise ValueError(f"prev_norm: expected device {tensors[0].device}, got {prev_norm.device}")
    return prev_norm.detach().view(len(tensors))


def norm_growth_limit_(
    grad: Tensor | Iterable[Tensor], prev_norm: Tensor, gamma: float = 1.01
) -> None:
    r"""Hold the norm of each tensor to $\gamma$ times its norm at the step before (Fira's limiter), in place.

    $g \leftarrow g / \ell,\ \ell = \max\bigl(\lVert g\rVert / (n + 10^{-8}),\ \gamma\bigr) / \gamma$, then
    $n \leftarrow \lVert g \rVert$ as limited. n = 0 stands for "no step before": nothing is limited then.

    Args:
        grad: a tensor or an iterable of L tensors, written in place; those within the limit are only read.
        prev_norm: (L,) float32 or float64, () for a single tensor; updated in place. Start with zeros.
        gamma: at least 1.

    Shapes: any, and (L,). float32, float64, bfloat16, float16, mixed.

    Raises:
        ValueError, TypeError: naming the argument.

    Source: Chen et al., "Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint?", 2024.
    """
    gamma = _check.number("gamma", gamma, low=1.0)
    grads = [t.detach() for t in tensor_list("grad", grad)]
    if not grads:
        return
    writable("grad", grads)
    previous = previous_norms(prev_norm, grads)
    with torch.no_grad():
        scale_(grads, growth_factors(norms_of(grads), previous, gamma))
