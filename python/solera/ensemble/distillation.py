r"""Core `distillation`: the loss of a student against the mean prediction of an ensemble, and its gradients.

With $s = x/\tau$ the student's row, $t_m = z_m/\tau$ the teachers', $p_m = \mathrm{softmax}(t_m)$ and
$\ell = \log\sum_c e^{s_c}$,

$$L = -\sum_c q_c \log\mathrm{softmax}(s)_c,\qquad
q = \sum_m w_m p_m\ \text{(probability)}\quad\text{or}\quad
q = \mathrm{softmax}\Big(\sum_m w_m t_m\Big)\ \text{(logit)}.$$

**probability**: with $W = \sum_m w_m$ and $u_m = \sum_c p_{mc} s_c$, $L = W\ell - \sum_m w_m u_m$: a teacher's row is
needed only while its own two sums are formed, so the mean prediction is never stored. The gradients are

$$\partial L/\partial x = \tfrac1\tau\Big(W\,\mathrm{softmax}(s) - \sum_m w_m p_m\Big),\quad
\partial L/\partial z_m = -\tfrac{w_m}{\tau}\,p_m\,(s - u_m),\quad
\partial L/\partial w_m = \ell - u_m .$$

(From $\partial u_m/\partial t_{mc} = p_{mc}(s_c - u_m)$.) **logit**: one teacher with $t = \sum_m w_m t_m$, so
$\mathrm{d}t = -q\,(s - u)$, $\mathrm{d}z_m = (w_m/\tau)\,\mathrm{d}t$ and
$\mathrm{d}w_m = \langle \mathrm{d}t, t_m\rangle$.

The kernel forms a row's gradients in the forward pass, while the row is in cache: each teacher is read from memory
once. What is kept until backward is the gradient itself, which backward multiplies in place by the gradient that
arrives (a row whose factor is 1, as under a mean or a sum, is left alone) and hands on. A second backward through the
same graph finds it handed on and computes it again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.compiler import is_dynamo_compiling

from .. import _check
from .._autograd import differentiable_vjp
from .._registry import accumulate_type, reference
from .._route import autocast_enabled, needs_graph, use_reference
from ._logits import Members, member_logits, stacked

_op = torch.ops.solera

COMBINE = ("probability", "logit")
REDUCTIONS = ("none", "mean", "sum")


def rows_of(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """K tensors (N, C) from [(N, K, C)] or themselves."""
    return tensors[0].unbind(1) if tensors[0].dim() == 3 else tuple(tensors)


def is_rows_first(tensors: Sequence[Tensor]) -> bool:
    """Whether a gradient lies as (N, K, C): where the tensor does, so that it is not copied into place."""
    return tensors[0].dim() == 3 and tensors[0].stride(0) >= tensors[0].stride(1)


def as_given(grad: Tensor, tensors: Sequence[Tensor], rows_first: bool) -> tuple[Tensor, ...]:
    """The gradient (N, K, C), or (K, N, C), as one for each of `tensors`."""
    if tensors[0].dim() == 3:
        return (grad if rows_first else grad.transpose(0, 1),)
    return grad.unbind(1 if rows_first else 0)


# ---- reference ---------------------------------------------------------------------------------------


def distill_reference(
    student: Tensor,
    teachers: Sequence[Tensor],
    weights: Tensor,
    inverse_temperature: float,
    scale: float,
    kind: int,
) -> Tensor:
    """(N,): the rows' losses times `scale`, by the formulas above."""
    acc = accumulate_type(student)
    log_p = (student.to(acc) * inverse_temperature).log_softmax(1)
    t = stacked(teachers).to(acc) * inverse_temperature
    if kind == 0:
        q = (t.softmax(2) * weights[:, None]).sum(1)
    else:
        q = (t * weights[:, None]).sum(1).softmax(1)
    return -(q * torch.where(q == 0, 0.0, log_p)).sum(1) * scale


@reference("distill")
def _distill(
    student, teachers, weights, inverse_temperature, scale, kind, need_student, need_teachers,
    need_weights, rows_first,
):  # fmt: skip
    acc = accumulate_type(student)
    rows, width = student.shape
    members = len(teachers)
    s = student.to(acc) * inverse_temperature
    s = s - s.amax(1, keepdim=True) if width else s
    total = s.exp().sum(1).log()
    t = torch.stack([x.to(acc) for x in teachers], 0) * inverse_temperature
    q = t.softmax(2) if kind == 0 else (t * weights[:, None, None]).sum(0).softmax(1)[None]
    share = weights if kind == 0 else weights.new_ones(1)
    u = torch.where(q > 0, q * s, 0.0).sum(2)
    loss = (share.sum() * total - (share[:, None] * u).sum(0)) * scale
    none = student.new_zeros(0)
    dstudent, dteachers, dweights = none.clone(), none.clone(), weights.new_zeros(0)
    factor = inverse_temperature * scale
    if need_student:
        softmax = (s - total[:, None]).exp()
        dstudent = factor * (share.sum() * softmax - (share[:, None, None] * q).sum(0))
        dstudent = dstudent.to(student.dtype).contiguous()
    slope = torch.where(q > 0, q * (s - u[:, :, None]), 0.0)
    if need_teachers:
        dteachers = (-factor * weights[:, None, None] * slope).to(student.dtype)
        dteachers = (dteachers.transpose(0, 1) if rows_first else dteachers).contiguous()
    if need_weights:
        each = total - u if kind == 0 else -(slope * t).sum(2)
        dweights = (each * scale).expand(members, rows).t().contiguous()
    return loss, dstudent, dteachers, dweights


@reference("distill_scale_")
def _distill_scale(x, factor):
    x.mul_(factor[:, None].to(accumulate_type(x)))


# ---- autograd ----------------------------------------------------------------------------------------


class _Distill(torch.autograd.Function):
    @staticmethod
    def forward(ctx, inverse_temperature, scale, kind, weights, student, *teachers):
        need_weights, need_student, *rest = ctx.needs_input_grad[3:]
        rows_first = is_rows_first(teachers)
        options = (inverse_temperature, scale, kind)
        needs = (need_student, any(rest), need_weights, rows_first)
        loss, *grads = _op.distill(student, rows_of(teachers), weights, *options, *needs)
        ctx.save_for_backward(weights, student, *teachers)
        ctx.options, ctx.needs, ctx.grads = options, needs, grads
        return loss

    @staticmethod
    def backward(ctx, grad):
        weights, student, *teachers = ctx.saved_tensors
        inverse_temperature, scale, kind = ctx.options
        need = ctx.needs_input_grad[3:]
        if torch.is_grad_enabled():

            def loss(weights, student, *teachers):
                return distill_reference(student, teachers, weights, *ctx.options)

            found = differentiable_vjp(loss, (weights, student, *teachers), need, (grad,))
            return None, None, None, *found
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            _, *grads = _op.distill(student, rows_of(teachers), weights, *ctx.options, *ctx.needs)
        dstudent, dteachers, dweights = grads
        rows_first = ctx.needs[3]
        found = [None] * len(need)
        if need[0]:
            found[0] = (dweights * grad[:, None]).sum(0)
        if need[1]:
            _op.distill_scale_(dstudent[None], grad)
            found[1] = dstudent
        if any(need[2:]):
            _op.distill_scale_(dteachers.transpose(0, 1) if rows_first else dteachers, grad)
            each = as_given(dteachers, teachers, rows_first)
            found[2:] = [g if n else None for g, n in zip(each, need[2:])]
        return None, None, None, *found


class _DistillTraced(torch.autograd.Function):
    """The same as dynamo can trace it: the gradients are saved, and multiplied into new tensors."""

    @staticmethod
    def forward(ctx, inverse_temperature, scale, kind, needs, weights, student, *teachers):
        rows_first = is_rows_first(teachers)
        ctx.needs, ctx.rows_first = needs, rows_first
        ctx.stacked, ctx.members = teachers[0].dim() == 3, len(teachers)
        loss, dstudent, dteachers, dweights = _op.distill(
            student,
            rows_of(teachers),
            weights,
            inverse_temperature,
            scale,
            kind,
            *needs,
            rows_first,
        )
        ctx.save_for_backward(dstudent, dteachers, dweights)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        dstudent, dteachers, dweights = ctx.saved_tensors
        need_student, need_teachers, need_weights = ctx.needs
        g = grad[:, None]
        found_weights = (dweights * g).sum(0) if need_weights else None
        found_student = (dstudent * g).to(dstudent.dtype) if need_student else None
        found: tuple = (None,) * ctx.members
        if need_teachers:
            each = (dteachers * (g[:, None] if ctx.rows_first else g)).to(dteachers.dtype)
            if ctx.stacked:
                found = (each if ctx.rows_first else each.transpose(0, 1),)
            else:
                found = each.unbind(1 if ctx.rows_first else 0)
        return None, None, None, None, found_weights, found_student, *found


def _member_weights(weights: object, members: Members, name: str = "weights") -> Tensor:
    """(K,) in the accumulator's dtype; None is the mean."""
    first = members.first
    acc = accumulate_type(first)
    if weights is None:
        return torch.full((members.count,), 1.0 / members.count, dtype=acc, device=first.device)
    if not isinstance(weights, Tensor):
        try:
            weights = torch.tensor(weights, dtype=acc, device=first.device)
        except (TypeError, ValueError):
            raise TypeError(
                f"{name}: expected a tensor or a list of numbers, got {type(weights).__name__}"
            ) from None
    _check.like(name, weights, (members.count,), first, "the members")
    return weights.to(acc)


def ensemble_distillation_loss(
    student: Tensor,
    teachers: Tensor | Sequence[Tensor],
    *,
    temperature: float = 1.0,
    weights: Tensor | Sequence[float] | None = None,
    combine: str = "probability",
    member_dim: int = 1,
    reduction: str = "mean",
) -> Tensor:
    r"""Cross-entropy of the student against the ensemble's mean prediction.

    $L = -\sum_c q_c \log\mathrm{softmax}(x/\tau)_c$ with $q = \sum_m w_m\,\mathrm{softmax}(z_m/\tau)$
    (`combine="probability"`) or $q = \mathrm{softmax}(\sum_m w_m z_m/\tau)$ (`combine="logit"`). Not multiplied by
    $\tau^2$; the entropy of q, which is constant in the student, is not subtracted.

    One pass over teachers and student gives the loss and, where asked for, every gradient; q is never stored.
    Gradients go to the student and to those of teachers and weights that require one.

    Args:
        student: (..., C).
        teachers: (..., K, C) with its members along `member_dim`, or a list of K tensors (..., C); the student's
            dtype.
        temperature: the number tau, positive.
        weights: (K,), used as given; None is 1/K each.
        combine: "probability" (mean of the predictions) or "logit" (mean of the logits).
        reduction: "mean", "sum" or "none" over the rows.

    Shapes: (..., C), (..., K, C) -> scalar, or (...) with reduction "none". A row whose sum of weights is not 1 is
    W times the student's logsumexp minus the weighted mean logits. Dtype: the student's; float32 for half
    precision under autocast.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Shen, Savvides, "MEAL V2: Boosting Vanilla ResNet-50 to 80%+ Top-1 Accuracy on ImageNet without Tricks",
    2020 (mean probability, temperature 1); Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network",
    2015 (temperature). The gradients to teachers and weights are derived at the head of this file.
    """
    x = _check.tensor("student", student, min_dim=1)
    members = member_logits(teachers, member_dim, "teachers")
    if members.shape != x.shape[:-1] or members.classes != x.shape[-1]:
        raise ValueError(
            f"teachers: expected rows of shape {tuple(x.shape[:-1])} and {x.shape[-1]} classes to go with "
            f"student of shape {tuple(x.shape)}, got {members.shape} and {members.classes}"
        )
    _check.same_dtype("teachers", members.first, x, "student")
    if members.first.device != x.device:
        raise ValueError(
            f"teachers: expected device {x.device} (that of student), got {members.first.device}"
        )
    tau = _check.number("temperature", temperature, low=0.0)
    if tau == 0.0:
        raise ValueError("temperature: expected a positive number, got 0")
    _check.choice("combine", combine, COMBINE)
    _check.choice("reduction", reduction, REDUCTIONS)
    if members.classes == 0:
        raise ValueError("student: expected at least one class, got 0")
    w = _member_weights(weights, members)
    flat = x.reshape(-1, x.shape[-1])
    rows = flat.shape[0]
    # The mean's factor goes into the kernel, so that the rows' own gradients come as 1.
    scale = 1.0 / rows if reduction == "mean" and rows else 1.0
    options = (1.0 / tau, scale, COMBINE.index(combine))
    if use_reference():
        losses = distill_reference(flat, members.tensors, w, *options)
    elif needs_graph(flat, w, *members.tensors):
        if is_dynamo_compiling():
            needs = (flat.requires_grad, needs_graph(*members.tensors), w.requires_grad)
            losses = _DistillTraced.apply(*options, needs, w, flat, *members.tensors)
        else:
            losses = _Distill.apply(*options, w, flat, *members.tensors)
    else:
        none = (False, False, False, False)
        losses = _op.distill(flat, rows_of(members.tensors), w, *options, *none)[0]
    dtype = x.dtype
    if dtype.itemsize == 2 and autocast_enabled(x):
        dtype = torch.float32
    if reduction == "none":
        return losses.reshape(x.shape[:-1]).to(dtype)
    # In float64: the order of this one sum is torch's own and may follow the thread count.
    total = losses.sum(dtype=torch.float64)
    return (total / 0 if reduction == "mean" and not rows else total).to(dtype)
