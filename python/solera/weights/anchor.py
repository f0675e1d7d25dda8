r"""Core `anchor`: distances of parameters from anchors, and steps towards them, over lists.

$$P = \frac{\lambda}{2} \sum_l \sum_i F_{li} (\theta_{li} - a_{li})^2, \qquad
  \frac{\partial P}{\partial \theta} = \lambda F (\theta - a), \qquad
  D = \frac{\lVert \theta - t\rVert^2}{\lVert s - t\rVert^2}.$$

One pass forward reads each tensor once, sums in float32 lanes over tiles and float64 across them (all in float64 where
a member of the entry is); one pass backward computes the differences again, so nothing of the parameters' size is
saved beyond the parameters themselves.

Sources: Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks", 2017 (F the diagonal of the Fisher
information); Li et al., "Explicit Inductive Bias for Transfer Learning with Convolutional Networks", 2018 (L2-SP,
F = 1); Cazenavette et al., "Dataset Distillation by Matching Training Trajectories", 2022 (D).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _check
from .._registry import reference
from .._route import use_reference
from ..norm.grad_norm import _wide, run_in_place
from ._lists import local
from ._parameters import beside, checked, parameters_of, written

_op: Any = torch.ops.solera
Parameters = Tensor | Iterable[Tensor] | Mapping[str, Tensor]


# ---- reference ---------------------------------------------------------------------------------------


def _entries(parameters, anchors, weights, starts):
    """(dtype, x, anchor, weight or None, start or None) of each entry, widened."""
    nothing = [None] * len(parameters)
    lists = (parameters, anchors, weights or nothing, starts or nothing)
    for entry in zip(*lists, strict=True):
        there = [t for t in entry if t is not None]
        if any([t.shape != there[0].shape for t in there]):
            raise RuntimeError("anchor: the tensors of an entry differ in shape")
        dtype = _wide(there)
        yield dtype, *(None if t is None else t.to(dtype) for t in entry)


@reference("anchor_sums")
def anchor_sums(parameters, anchors, weights, starts):
    """(2, L) float64: sum F (x - a)^2 and sum (s - a)^2 of each entry, 0 where there is no start."""
    columns = []
    for _, x, a, f, s in _entries(parameters, anchors, weights, starts):
        near = (x - a).square() if f is None else f * (x - a).square()
        away = near.new_zeros(()) if s is None else (s - a).square().sum()
        columns.append(torch.stack([near.sum(), away]).double())
    return torch.stack(columns, 1)


@reference("anchor_gradient")
def anchor_gradient(parameters, anchors, weights, factors):
    """f F (x - a) of each entry, in x's dtype."""
    found = []
    entries = _entries(parameters, anchors, weights, [])
    for index, (dtype, x, a, f, _) in enumerate(entries):
        factor = (factors if factors.dim() == 0 else factors[index]).to(dtype)
        d = x - a if f is None else (x - a) * f
        found.append((factor * d).to(parameters[index].dtype).contiguous())
    return found


@reference("anchor_step_")
def _anchor_step(parameters, anchors, weights, factors):
    """x - f F (x - a), in place."""
    entries = _entries(parameters, anchors, weights, [])
    for index, (dtype, x, a, f, _) in enumerate(entries):
        factor = (factors if factors.dim() == 0 else factors[index]).to(dtype)
        d = x - a if f is None else (x - a) * f
        parameters[index].copy_(x - factor * d)


# ---- autograd ----------------------------------------------------------------------------------------


def _gradients(
    flat: Sequence[Tensor], length: int, live: list[int], factor: Tensor
) -> dict[int, Tensor]:
    """factor F (x - a) of the entries `live`, by what can be differentiated again where that is wanted.

    flat holds L parameters, L anchors and L weights or none.
    """
    lists = [
        [flat[start + i] for i in live] if start < len(flat) else []
        for start in (0, length, 2 * length)
    ]
    run = anchor_gradient if torch.is_grad_enabled() else _op.anchor_gradient
    return dict(zip(live, run(*lists, factor)))


class _Penalty(torch.autograd.Function):
    """strength / 2 sum F (x - a)^2; flat holds L parameters, L anchors and L weights or none."""

    @staticmethod
    def forward(ctx, length, strength, *flat):
        ctx.length, ctx.strength = length, strength
        ctx.save_for_backward(*flat)
        lists = (flat[:length], flat[length : 2 * length], flat[2 * length :])
        return (_op.anchor_sums(*lists, [])[0].sum() * (0.5 * strength)).to(_wide(flat))

    @staticmethod
    def backward(ctx, g):
        length, flat, needs = ctx.length, ctx.saved_tensors, ctx.needs_input_grad[2:]
        live = [i for i in range(length) if needs[i] or needs[length + i]]
        found = _gradients(flat, length, live, g * ctx.strength)
        mine = [found[i] if needs[i] else None for i in range(length)]
        theirs = [
            -found[i].to(flat[length + i].dtype) if needs[length + i] else None
            for i in range(length)
        ]
        return None, None, *mine, *theirs, *(None for _ in needs[2 * length :])


class _Distance(torch.autograd.Function):
    """sum (x - t)^2 / sum (s - t)^2; flat holds L parameters, targets and starts."""

    @staticmethod
    def forward(ctx, length, *flat):
        x, target, start = (flat[i * length : (i + 1) * length] for i in range(3))
        near, away = _op.anchor_sums(x, target, [], start).sum(1).unbind()
        ctx.length = length
        ctx.save_for_backward(away, *flat[: 2 * length])
        return (near / away).to(_wide(flat))

    @staticmethod
    def backward(ctx, g):
        away, *flat = ctx.saved_tensors
        length, needs = ctx.length, ctx.needs_input_grad[1:]
        live = [i for i in range(length) if needs[i]]
        found = _gradients(flat, length, live, g.double() * (2.0 / away))
        return None, *(found.get(i) for i in range(length)), *(None for _ in needs[length:])


# ---- public functions --------------------------------------------------------------------------------


def _lists_of(parameters: Any, **others: Any) -> tuple[list[Tensor], ...]:
    """The parameters and what goes with them, checked; an absent list is empty."""
    keys, own = parameters_of("parameters", parameters)
    if not own:
        raise ValueError("parameters: expected at least one floating-point tensor")
    own = checked("parameters", own)
    found = [own]
    for name, value in others.items():
        found.append([] if value is None else checked(name, beside(name, value, keys), own))
    return tuple(found)


def _constant(name: str, tensors: list[Tensor]) -> None:
    if torch.is_grad_enabled() and any([t.requires_grad for t in tensors]):
        raise ValueError(f"{name}: no gradient flows to them; give them detached")


def anchor_penalty(
    parameters: Parameters,
    anchors: Parameters,
    weights: Parameters | None = None,
    strength: float = 1.0,
) -> Tensor:
    r"""The squared distance of parameters from anchors, $\frac{\lambda}{2} \sum_i F_i (\theta_i - a_i)^2$.

    F = 1 is L2-SP (and ProLIP's $\lVert W - W_0\rVert^2$ with $\lambda$ doubled); F the diagonal of the Fisher
    information is EWC, whose running form $F \leftarrow \gamma F + (1 - \gamma) g^2$ is
    `ema_(F, squares, gamma)`, and $F \leftarrow \gamma F + g^2$ `lincomb([F, squares], [gamma, 1.0], out=F)` with the
    squares of the gradients.

    Args:
        parameters: $\theta$: a tensor, an iterable or a mapping of names (`dict(model.named_parameters())`).
        anchors: as many, of the same shapes; by name from a mapping (a state dict) where parameters are one.
        weights: F, as many; None: 1. Not differentiated.
        strength: $\lambda$.

    Shapes: any -> () float32 (float64 where a tensor is float64).

    Differentiable in the parameters and the anchors, twice.

    Raises:
        ValueError, TypeError: naming the argument.

    Source: Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks", 2017; Li et al., "Explicit
    Inductive Bias for Transfer Learning with Convolutional Networks" (L2-SP), 2018.
    """
    strength = _check.number("strength", strength)
    own, around, scale = _lists_of(parameters, anchors=anchors, weights=weights)
    _constant("weights", scale)
    flat = [*own, *around, *scale]
    if use_reference():
        return (anchor_sums(own, around, scale, [])[0].sum() * (0.5 * strength)).to(_wide(flat))
    return _Penalty.apply(len(own), strength, *flat)


def normalized_parameter_distance(
    theta: Parameters, target: Parameters, start: Parameters
) -> Tensor:
    r"""How far parameters are from a target, beside how far the start was.

    $\lVert\theta - t\rVert^2 / \lVert s - t\rVert^2$, all tensors as one vector; the three of an entry are read once.

    Args:
        theta: a tensor, an iterable or a mapping of names.
        target, start: as many, of the same shapes; not differentiated. A start equal to the target gives inf or NaN.

    Shapes: any -> () float32 (float64 where a tensor is float64).

    Differentiable in theta, twice.

    Raises:
        ValueError, TypeError: naming the argument.

    Source: Cazenavette et al., "Dataset Distillation by Matching Training Trajectories", 2022.
    """
    own, goal, begin = _lists_of(theta, target=target, start=start)
    _constant("target", goal)
    _constant("start", begin)
    flat = [*own, *goal, *begin]
    if use_reference():
        near, away = anchor_sums(own, goal, [], begin).sum(1).unbind()
        return (near / away).to(_wide(flat))
    return _Distance.apply(len(own), *flat)


def anchor_decay_(
    parameters: Parameters,
    anchors: Parameters,
    rate: float | Tensor,
    weights: Parameters | None = None,
) -> None:
    r"""Decay towards anchors instead of zero, in place and apart from the gradient.

    $\theta \leftarrow \theta - r F (\theta - a)$: with $r = \mathrm{lr}\,\lambda$ the decoupled form of
    `anchor_penalty`, as AdamW's is of weight decay. An element with $r F > 1$ passes its anchor, with $r F > 2$ it runs
    away: clamp F.

    Args:
        parameters: $\theta$: a tensor, an iterable or a mapping of names; written in place.
        anchors: as many, of the same shapes.
        rate: r, a number or a tensor of one on the parameters' device.
        weights: F, as many; None: 1.

    Shapes: any. float32, float64, bfloat16, float16, mixed. DTensors: each process moves its shards.

    Raises:
        ValueError, TypeError: naming the argument.

    Source: Li et al., L2-SP, 2018; decoupled as Loshchilov, Hutter, 2019.
    """
    keys, every = parameters_of("parameters", parameters)
    given = [
        None if value is None else [local(t) for t in beside(name, value, keys)]
        for name, value in (("anchors", anchors), ("weights", weights))
    ]
    own, around, scale = _lists_of([local(t) for t in every], anchors=given[0], weights=given[1])
    written("parameters", own)
    if isinstance(rate, Tensor):
        if rate.numel() != 1 or rate.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"rate: expected a number or a float32 or float64 tensor of one, got shape "
                f"{tuple(rate.shape)}, {rate.dtype}"
            )
        factor = rate.detach().reshape(())
    else:
        number = _check.number("rate", rate)
        factor = torch.full((), number, dtype=torch.float64, device=own[0].device)
    run_in_place("anchor_step_", _anchor_step, (own,), own, around, scale, factor)
