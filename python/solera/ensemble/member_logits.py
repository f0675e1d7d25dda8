r"""Core `member_logits`: log-softmax of member logits at the label, and the gradient that belongs to it.

For the row $v_{nk} = z_{nk}$ (C,) of row n and member k, and a label $y_n$,

$$\ell_{nk} = \log\sum_c e^{v_{nkc}},\qquad a_{nk} = v_{nky} - \ell_{nk},$$

or, where weights $w_{nk}$ are given, the same of the one row $v_n = \sum_k w_{nk} z_{nk}$. Each loss of an
ensemble is a few operations on these (N, K) numbers:

- mean of the members' losses: $-\sum_k w_k a_{nk}$;
- loss of the mean probability: $-\log\sum_k w_k e^{a_{nk}}$;
- loss of the mean logit: $-a_n$ of the weighted row.

With p the softmax of v, $\mathrm{d}v_c = (\mathrm{d}\ell - \mathrm{d}a)\,p_c + [c=y]\,\mathrm{d}a$;
$\mathrm{d}z_{nk}$ is that of the member's own row, or $w_{nk}\,\mathrm{d}v_n$, and then
$\mathrm{d}w_{nk} = \mathrm{d}v_n\cdot z_{nk}$.

Forward reads the logits once, backward reads them once and writes their gradient; between the two only $\ell$ is kept.

The losses themselves are one op more, `member_cross_entropy`, which forms the gradient in the forward pass, while a
row's exponentials are at hand: the logits are read from memory once and each exponential is computed once. What is kept
until backward is the gradient itself, scaled as the reduction (a mean or a sum) wants it; backward multiplies it in
place by what arrives (a row whose factor is 1, as under a mean or a sum, is left alone) and hands it on. With
$r_k = w_k e^{a_k} / \sum_j w_j e^{a_j}$ (mean probability) or $r_k = w_k$ (mean loss),
$\mathrm{d}z_k = r_k (p_k - [c=y])$.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from .. import _check
from .._autograd import differentiable_vjp
from .._registry import accumulate_type, reference
from .._route import needs_graph, use_reference
from ..norm._labels import REDUCTIONS, labels, reduced
from ._groups import check_group, largest_over, summed_over, world_members
from ._logits import Members, member_logits, stacked, unstacked

_op = torch.ops.solera

COMBINATIONS = ("logit", "probability", "log_probability")


# ---- reference ---------------------------------------------------------------------------------------


def _values(tensors, weights) -> Tensor:
    """v in the accumulator's dtype: (N, K, C), or (N, 1, C) where weights are given."""
    z = stacked(tensors)
    z = z.to(accumulate_type(z))
    if weights is not None:
        z = (z * weights.unsqueeze(-1)).sum(1, keepdim=True)
    return z


def member_logsumexp_reference(
    tensors: Sequence[Tensor], target: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(lse, logp) by the formulas above, (N, K) or (N, 1); 0 where the label is negative."""
    v = _values(tensors, weights)
    rows, members, width = v.shape
    at = target.clamp(0, width - 1)[:, None, None].expand(rows, members, 1)
    logp = v.log_softmax(-1).gather(2, at)[..., 0]
    logp = torch.where((target < width)[:, None], logp, float("nan"))
    kept = (target >= 0)[:, None]
    return torch.where(kept, v.logsumexp(-1), 0.0), torch.where(kept, logp, 0.0)


@reference("member_logsumexp")
def _member_logsumexp(logits, target, weights):
    lse, logp = member_logsumexp_reference(logits, target, weights)
    return lse.contiguous(), logp.contiguous()


@reference("member_softmax")
def _member_softmax(logits, target, weights, lse, a, b, need_weights):
    v = _values(logits, weights)
    at_target = torch.arange(v.shape[-1], device=v.device) == target[:, None, None]
    d = a.unsqueeze(-1) * (v - lse.unsqueeze(-1)).exp() + torch.where(
        at_target, b.unsqueeze(-1), 0.0
    )
    d = torch.where((target >= 0)[:, None, None], d, 0.0)
    dweights = v.new_empty(0)
    if weights is not None:
        if need_weights:
            z = stacked(logits).to(d.dtype)
            dweights = torch.where(d == 0, 0.0, z * d).sum(-1)
        d = d * weights.unsqueeze(-1)
    d = d.to(logits[0].dtype)
    if logits[0].dim() == 2:
        d = d.transpose(0, 1)
    return d.clone(memory_format=torch.contiguous_format), dweights


def member_cross_entropy_reference(
    tensors: Sequence[Tensor],
    target: Tensor,
    weights: Tensor | None,
    scale: Tensor | None,
    kind: int,
) -> Tensor:
    """(N,): the rows' losses times `scale`; 0 where the label is negative."""
    if kind == 0 and weights is None:
        z = stacked(tensors)
        weights = z.new_full(z.shape[:2], 1 / z.shape[1], dtype=accumulate_type(z))
    _, logp = member_logsumexp_reference(tensors, target, weights if kind == 0 else None)
    found = _combined(logp, weights, kind)
    return -found if scale is None else -found * scale


def _combined(logp: Tensor, weights: Tensor | None, kind: int, group=None) -> Tensor:
    """(N,) of logp (N, K), or (N, 1) of the weighted row."""
    if kind == 0:
        return logp[:, 0]
    return log_mean_exp(logp, weights, group) if kind == 1 else _averaged(logp, weights, group)


def cross_entropy_by_sums(
    logsumexp, softmax, tensors, target, weights, scale, kind, need_logits, need_weights
) -> tuple[Tensor, Tensor, Tensor]:
    """The op from the two others, for devices without a kernel of its own."""
    first = tensors[0]
    members = first.shape[1] if first.dim() == 3 else len(tensors)
    acc = accumulate_type(first)
    shared = kind == 0 and weights is None and first.dim() == 3
    if weights is None:
        weights = first.new_full((), 1 / members, dtype=acc).expand(target.shape[0], members)
    inner = weights if kind == 0 else None
    lse, logp = logsumexp(tensors, target, inner)
    with torch.no_grad():
        found = _combined(logp, weights, kind)
        if kind == 1:
            top = logp.amax(1, keepdim=True).clamp(min=torch.finfo(acc).min)
            e = (logp - top).exp()
            each = e / (weights * e).sum(1, keepdim=True)
        else:
            each = torch.ones_like(logp) if kind == 0 else logp
        factor = torch.ones_like(logp) if kind == 0 else weights * (each if kind == 1 else 1.0)
        if scale is not None:
            found, each, factor = found * scale, each * scale, factor * scale
    dlogits, dweights = first.new_empty(0), first.new_empty(0, dtype=acc)
    if need_logits or (need_weights and kind == 0):
        dlogits, dweights = softmax(
            tensors, target, inner, lse, factor.contiguous(), -factor, need_weights and kind == 0
        )
        dlogits = dlogits if need_logits else first.new_empty(0)
        dlogits = dlogits[:, :1].clone() if shared and need_logits else dlogits
    if need_weights and kind != 0:
        dweights = torch.where((target >= 0)[:, None], -each, 0.0)
    return torch.where(target >= 0, -found, 0.0), dlogits, dweights


@reference("member_cross_entropy")
def _member_cross_entropy(logits, target, weights, scale, kind, need_logits, need_weights):
    return cross_entropy_by_sums(
        _member_logsumexp, _member_softmax, logits, target, weights, scale, kind, need_logits,
        need_weights,
    )  # fmt: skip


# ---- autograd ----------------------------------------------------------------------------------------


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, target, scale, kind, weights, *tensors):
        need_weights, *rest = ctx.needs_input_grad[3:]
        needs = (any(rest), need_weights)
        loss, *grads = _op.member_cross_entropy(tensors, target, weights, scale, kind, *needs)
        ctx.save_for_backward(target, scale, weights, *tensors)
        ctx.kind, ctx.needs, ctx.grads = kind, needs, grads
        return loss

    @staticmethod
    def backward(ctx, grad):
        target, scale, weights, *tensors = ctx.saved_tensors
        need = ctx.needs_input_grad[3:]
        if torch.is_grad_enabled():

            def loss(weights, *tensors):
                return member_cross_entropy_reference(tensors, target, weights, scale, ctx.kind)

            found = differentiable_vjp(loss, (weights, *tensors), need, (grad,))
            return None, None, None, *found
        grads, ctx.grads = ctx.grads, None
        if grads is None:  # handed on by an earlier backward through this graph
            _, *grads = _op.member_cross_entropy(
                tensors, target, weights, scale, ctx.kind, *ctx.needs
            )
        dlogits, dweights = grads
        found = [dweights * grad[:, None] if need[0] else None]
        if any(need[1:]):
            as_sets = dlogits.transpose(0, 1) if tensors[0].dim() == 3 else dlogits  # (K, N, C)
            _op.distill_scale_(as_sets, grad)
            if tensors[0].dim() == 3:
                dlogits = dlogits.expand(tensors[0].shape)
            found += unstacked(dlogits, tensors)
        else:
            found += [None] * len(tensors)
        return None, None, None, *found


class _MemberLogsumexp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, target, weights, *tensors):
        lse, logp = _op.member_logsumexp(tensors, target, weights)
        ctx.save_for_backward(target, weights, lse, *tensors)
        ctx.set_materialize_grads(False)
        return lse, logp

    @staticmethod
    def backward(ctx, dlse, dlogp):
        target, weights, lse, *tensors = ctx.saved_tensors
        need_weights = ctx.needs_input_grad[1]
        if torch.is_grad_enabled():

            def values(weights, *tensors):
                return member_logsumexp_reference(tensors, target, weights)

            needs = ctx.needs_input_grad[1:]
            grads = differentiable_vjp(values, (weights, *tensors), needs, (dlse, dlogp))
            return None, *grads
        dlogp = torch.zeros_like(lse) if dlogp is None else dlogp
        alpha = -dlogp if dlse is None else dlse - dlogp
        dlogits, dweights = _op.member_softmax(
            tensors, target, weights, lse, alpha, dlogp, need_weights
        )
        dweights = dweights if need_weights else None
        return None, dweights, *unstacked(dlogits, tensors)


def member_logsumexp(
    tensors: Sequence[Tensor],
    target: Tensor,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(lse, logp) of the rows, (N, K), or (N, 1) of the weighted row; differentiable in tensors and weights.

    `tensors` as `_logits.Members` has them; target (N,) int64, negative for a row to be left out; weights (N, K)
    in the accumulator's dtype.
    """
    if use_reference():
        return member_logsumexp_reference(tensors, target, weights)
    if needs_graph(weights, *tensors):
        return _MemberLogsumexp.apply(target, weights, *tensors)
    return _op.member_logsumexp(tensors, target, weights)


# ---- public functions --------------------------------------------------------------------------------


def member_weights(weights: Tensor | None, members: Members) -> Tensor | None:
    """weights (K,) or (..., K) as (N, K) in the accumulator's dtype."""
    if weights is None:
        return None
    _check.tensor("weights", weights, min_dim=1)
    one = weights.dim() == 1
    shape = (members.count,) if one else (*members.shape, members.count)
    _check.like("weights", weights, shape, members.first, "logits")
    weights = weights.to(accumulate_type(members.first))
    if one:
        return weights.expand(members.first.shape[0], members.count)
    return weights.reshape(members.first.shape[0], members.count)


def ensemble_cross_entropy(
    logits: Tensor | Sequence[Tensor],
    target: Tensor,
    weights: Tensor | None = None,
    *,
    combine: str = "logit",
    member_dim: int = 1,
    reduction: str = "mean",
    ignore_index: int = -100,
    group: torch.distributed.ProcessGroup | None = None,
) -> Tensor:
    r"""Cross-entropy of an ensemble against labels, without a tensor of the logits' size beside their gradient.

    With p_k the softmax of member k's logits z_k:

    - "logit": $-\log\mathrm{softmax}(\sum_k w_k z_k)_y$, the logits averaged (the members' normalised geometric mean);
    - "probability": $-\log\sum_k w_k p_{ky}$, the probabilities averaged;
    - "log_probability": $-\sum_k w_k\log p_{ky}$, the losses averaged.

    Args:
        logits: (B, K, C); or any (..., C) with its members along `member_dim`, whose other dimensions are
            rows; or a list of K tensors (..., C). float32, float64, bfloat16 or float16, any strides; computed in
            float32 (float64 for float64).
        target: int64 labels, of the rows' shape.
        weights: (K,), or one set a row (..., K), used as they are (they should sum to 1); None for 1/K each. They get a
            gradient if they require one.
        reduction, ignore_index: as in `torch.nn.functional.cross_entropy`.
        group: a process group whose ranks each hold some members, of one batch. (B,)-sized sums travel, (B, C)-sized
            ones for "logit". Each rank gets the loss of the whole ensemble and, if all ranks use it alike, the
            gradient to its own members (backward sends nothing).

    Shapes: (B, K, C), (B,) -> scalar, or (B,) with reduction "none".

    Raises:
        ValueError, TypeError, IndexError: naming the argument that does not fit.

    Source: Kim et al., "Pre-training under infinite compute", 2025 (logits averaged); Lakshminarayanan et al., "Simple
    and Scalable Predictive Uncertainty Estimation using Deep Ensembles", 2017 (probabilities).
    """
    _check.choice("combine", combine, COMBINATIONS)
    check_group(group)
    members = member_logits(logits, member_dim)
    x = members.first
    y = labels("target", target, members.shape, members.classes, x.device, ignore_index)
    w = member_weights(weights, members)
    kind = COMBINATIONS.index(combine)
    # Rows of their own factors would have to be written twice, and rounded twice.
    whole = reduction != "none" and not use_reference() and not is_dynamo_compiling()
    if whole and group is None:
        return _reduced_cross_entropy(members, y, w, kind, reduction)
    if kind == 0:
        logp = _of_averaged_logits(members, y, w, group)
    else:
        logp = _combined(member_logsumexp(members.tensors, y)[1], w, kind, group)
    return reduced(-logp, y, reduction, x, members.shape)


def _reduced_cross_entropy(
    members: Members, target: Tensor, weights: Tensor | None, kind: int, reduction: str
) -> Tensor:
    """The mean's factor goes into the kernel, so that the rows' own gradients come as 1."""
    _check.choice("reduction", reduction, REDUCTIONS)
    scale = count = None
    if reduction == "mean":
        count = (target >= 0).sum()
        scale = (1.0 / count.double()).to(accumulate_type(members.first))
    if needs_graph(weights, *members.tensors):
        losses = _CrossEntropy.apply(target, scale, kind, weights, *members.tensors)
    else:
        losses, _, _ = _op.member_cross_entropy(
            members.tensors, target, weights, scale, kind, False, False
        )
    total = reduced(losses, target, "sum", members.first)
    if count is None:
        return total
    return torch.where(count > 0, total, float("nan"))


def _averaged(each: Tensor, weights: Tensor | None, group) -> Tensor:
    """The weighted sum over the members (N, K) -> (N,), or their mean."""
    if weights is not None:
        return summed_over((each * weights).sum(1), group)
    return summed_over(each.sum(1), group) / world_members(each.shape[1], each, group)


def log_mean_exp(each: Tensor, weights: Tensor | None = None, group=None) -> Tensor:
    """log of the weighted sum over the members of e^each (N, K) -> (N,), or of their mean."""
    top = largest_over(each.detach().amax(1), group).clamp(min=torch.finfo(each.dtype).min)
    return top + _averaged((each - top[:, None]).exp(), weights, group).log()


def _of_averaged_logits(members: Members, target: Tensor, weights: Tensor | None, group) -> Tensor:
    tensors, x = members.tensors, members.first
    acc = accumulate_type(x)
    if weights is None and group is None:
        weights = torch.full((), 1 / members.count, dtype=acc, device=x.device)
        weights = weights.expand(x.shape[0], members.count)
    if group is None:
        return member_logsumexp(tensors, target, weights)[1][:, 0]
    z = stacked(tensors).to(acc)
    if weights is None:
        mean = summed_over(z.sum(1), group) / world_members(members.count, z, group)
    else:
        mean = summed_over((z * weights.unsqueeze(-1)).sum(1), group)
    return member_logsumexp((mean,), target)[1][:, 0]
