r"""Core `logit_mixture`: K models' logits, mixed along the models.

Rows $z_m$ (C,) of models m = 1..K, $\ell_m = \log\sum_c e^{z_{mc}}$, $\log p_{mc} = z_{mc} - \ell_m$.

**scores**: $s_m = \log p_{m y}$ of a label y. Everything about a mixture of experts over sequences follows from them.
Backward: $\mathrm{d}z_{mc} = \mathrm{d}s_m\,([c = y] - p_{mc})$.

**combine**: one row of C values,

| kind | $v_c$ |
|---|---|
| logit | $\sum_m w_m z_{mc}$ |
| log_probability | $\sum_m w_m \log p_{mc}$ |
| probability | $\log \sum_m w_m p_{mc}$, weights not negative |

then $y = v/\tau$, normalised to log-probabilities if asked for, over the columns that the anchor model a finds
plausible, $z_{ac} \ge \max_c z_{ac} + \log\beta$ (the others are $-\infty$). With G the sum of dy over them and
$\mathrm{d}v = (\mathrm{d}y - e^{y} G)/\tau$ ($\mathrm{d}y/\tau$ if not normalised):

- logit: $\mathrm{d}z_m = w_m\,\mathrm{d}v$, $\mathrm{d}w_m = \langle \mathrm{d}v, z_m\rangle$;
- log_probability: $\mathrm{d}z_m = w_m(\mathrm{d}v - D\,p_m)$, $D = \sum_c \mathrm{d}v_c$,
  $\mathrm{d}w_m = \langle \mathrm{d}v, \log p_m\rangle$;
- probability: with the responsibilities $r_{mc} = w_m p_{mc} e^{-v_c}$ and $R_m = \langle r_m, \mathrm{d}v\rangle$,
  $\mathrm{d}z_m = r_m\,\mathrm{d}v - R_m p_m$, $\mathrm{d}w_m = \sum_c p_{mc} e^{-v_c}\,\mathrm{d}v_c$.

Saved between forward and backward: the logits, and for each row the maximum and the log of the sum of the K models'
rows and of the combined one. Nothing of a row's size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .._autograd import differentiable_vjp
from .._registry import accumulate_type, reference
from .._route import needs_graph, use_reference
from ._logits import stacked
from .distillation import as_given, is_rows_first, rows_of

_op = torch.ops.solera

KINDS = ("logit", "log_probability", "probability")
LOGIT, LOG_PROBABILITY, PROBABILITY = range(3)


# ---- reference ---------------------------------------------------------------------------------------


def mixture_scores_reference(logits: Sequence[Tensor], target: Tensor) -> Tensor:
    """(K, N): log p_m of the rows' labels; 0 where a label is negative, NaN where it is past the classes."""
    z = stacked(logits)
    z = z.to(accumulate_type(z))
    at = target.clamp(0, z.shape[2] - 1)[:, None, None].expand(-1, z.shape[1], 1)
    score = z.log_softmax(2).gather(2, at)[:, :, 0].t()
    return torch.where(target < 0, 0.0, torch.where(target < z.shape[2], score, float("nan")))


def _row_sums(z: Tensor) -> tuple[Tensor, Tensor]:
    """Maximum and log of the sum of e^(z - maximum) over the last dimension; 0 for the maximum of an empty row."""
    top = z.amax(-1)
    top = torch.where(top == float("-inf"), 0.0, top)
    return top, (z - top[..., None]).exp().sum(-1).log()


@reference("mixture_scores")
def _mixture_scores(logits, target):
    score = mixture_scores_reference(logits, target).contiguous()
    z = torch.stack([x.to(score.dtype) for x in logits])
    top, log_total = _row_sums(z)
    kept = target >= 0
    return score, torch.where(kept, top, 0.0), torch.where(kept, log_total, 0.0)


@reference("mixture_scores_backward")
def _mixture_scores_backward(logits, target, top, log_total, dscore, rows_first):
    z = torch.stack([x.to(top.dtype) for x in logits])
    p = (z - top[:, :, None] - log_total[:, :, None]).exp()
    hot = torch.arange(z.shape[2], device=z.device) == target[:, None]
    d = torch.where(hot, 1.0 - p, -p) * dscore[:, :, None]
    d = torch.where((target < 0)[:, None] | (dscore == 0)[:, :, None], 0.0, d)
    d = d.to(logits[0].dtype)
    return (d.transpose(0, 1) if rows_first else d).contiguous()


def _implausible(z: Tensor, plausibility: float, anchor: int) -> Tensor | None:
    """(N, C) of z (N, K, C): the columns left out."""
    if plausibility <= 0.0:
        return None
    held = z[:, anchor]
    return held < held.amax(1, keepdim=True) + math.log(plausibility)


def combine_reference(
    logits: Sequence[Tensor],
    weights: Tensor,
    kind: int,
    inverse_temperature: float,
    plausibility: float,
    anchor: int,
    normalize: bool,
) -> Tensor:
    """(N, C) by the formulas above, in the accumulator's dtype; weights (N, K)."""
    z = stacked(logits)
    z = z.to(accumulate_type(z))
    w = weights[:, :, None]
    if kind == LOGIT:
        v = (w * z).sum(1)
    elif kind == LOG_PROBABILITY:
        v = (w * z.log_softmax(2)).sum(1)
    else:
        # log sum_m w_m p_m with the largest p factored out: differentiable where a weight is 0.
        log_p = z.log_softmax(2)
        top = log_p.detach().amax(1, keepdim=True).clamp(min=torch.finfo(z.dtype).min)
        v = (w * (log_p - top).exp()).sum(1).log() + top[:, 0]
    y = v * inverse_temperature
    out = _implausible(z, plausibility, anchor)
    if out is not None:
        y = torch.where(out, float("-inf"), y)
    return y.log_softmax(1) if normalize else y


@reference("combine_logits")
def _combine_logits(
    logits, weights, kind, inverse_temperature, plausibility, anchor, normalize
):  # fmt: skip
    y = combine_reference(
        logits, weights, kind, inverse_temperature, plausibility, anchor, False
    )  # fmt: skip
    z = torch.stack([x.to(weights.dtype) for x in logits])
    top, log_total = _row_sums(z)
    if kind == LOGIT:
        top, log_total = torch.zeros_like(top), torch.zeros_like(top)
    last_top, last_total = torch.zeros_like(y[:, 0]), torch.zeros_like(y[:, 0])
    if normalize:
        last_top, last_total = _row_sums(y)
        y = y - last_top[:, None] - last_total[:, None]
    top = torch.cat([top, last_top[None]])
    log_total = torch.cat([log_total, last_total[None]])
    return y.to(logits[0].dtype).contiguous(), top, log_total


@reference("combine_logits_backward")
def _combine_logits_backward(
    dout, logits, weights, top, log_total, kind, inverse_temperature, plausibility, anchor, normalize,
    need_logits, need_weights, rows_first,
):  # fmt: skip
    z = torch.stack([x.to(weights.dtype) for x in logits], 1)  # (N, K, C)
    w = weights[:, :, None]
    members = z.shape[1]
    log_p = z - top[:members].t()[:, :, None] - log_total[:members].t()[:, :, None]
    dy = dout.to(weights.dtype)
    out = _implausible(z, plausibility, anchor)
    if out is not None:
        dy = torch.where(out, 0.0, dy)
    y = combine_reference(logits, weights, kind, inverse_temperature, plausibility, anchor, False)
    dv = dy
    if normalize:
        p = (y - top[members][:, None] - log_total[members][:, None]).exp()
        dv = dy - p * dy.sum(1, keepdim=True)
    dv = (dv * inverse_temperature)[:, None]
    if kind == PROBABILITY:
        v = combine_reference(logits, weights, kind, 1.0, 0.0, anchor, False)
        share = torch.where(dv == 0, 0.0, (log_p - v[:, None]).exp() * dv)
        dweights = share.sum(2)
        dz = w * (share - dweights[:, :, None] * log_p.exp())
    else:
        held = z if kind == LOGIT else log_p
        dweights = torch.where(dv == 0, 0.0, dv * held).sum(2)
        dz = w * dv
        if kind == LOG_PROBABILITY:
            dz = dz - w * log_p.exp() * dv.sum(2, keepdim=True)
    none = weights.new_zeros(0)
    dz = dz.to(logits[0].dtype) if need_logits else none.to(logits[0].dtype)
    if need_logits:
        dz = (dz if rows_first else dz.transpose(0, 1)).contiguous()
    return dz.clone(), dweights.contiguous() if need_weights else none


# ---- autograd ----------------------------------------------------------------------------------------


class _MixtureScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx, target, *logits):
        score, top, log_total = _op.mixture_scores(rows_of(logits), target)
        ctx.save_for_backward(target, top, log_total, *logits)
        return score

    @staticmethod
    def backward(ctx, grad):
        target, top, log_total, *logits = ctx.saved_tensors
        need = ctx.needs_input_grad[1:]
        if torch.is_grad_enabled():

            def scores(*logits):
                return mixture_scores_reference(logits, target)

            return None, *differentiable_vjp(scores, logits, need, (grad,))
        rows_first = is_rows_first(logits)
        found = _op.mixture_scores_backward(
            rows_of(logits), target, top, log_total, grad, rows_first
        )
        each = as_given(found, logits, rows_first)
        return None, *(g if n else None for g, n in zip(each, need))


def mixture_scores(logits: Sequence[Tensor], target: Tensor) -> Tensor:
    """(K, N) of [(N, K, C)] or K times (N, C) and (N,) labels, differentiable in the logits."""
    if use_reference():
        return mixture_scores_reference(logits, target)
    if needs_graph(*logits):
        return _MixtureScores.apply(target, *logits)
    return _op.mixture_scores(rows_of(logits), target)[0]


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weights, kind, inverse_temperature, plausibility, anchor, normalize, *logits):
        ctx.options = (kind, inverse_temperature, plausibility, anchor, normalize)
        out, top, log_total = _op.combine_logits(rows_of(logits), weights, *ctx.options)
        ctx.save_for_backward(weights, top, log_total, *logits)
        return out

    @staticmethod
    def backward(ctx, grad):
        weights, top, log_total, *logits = ctx.saved_tensors
        need = (ctx.needs_input_grad[0], *ctx.needs_input_grad[6:])
        if torch.is_grad_enabled():

            def combined(weights, *logits):
                out = combine_reference(logits, weights, *ctx.options)
                return out.to(logits[0].dtype)

            dweights, *found = differentiable_vjp(combined, (weights, *logits), need, (grad,))
            return dweights, None, None, None, None, None, *found
        rows_first = is_rows_first(logits)
        dlogits, dweights = _op.combine_logits_backward(
            grad, rows_of(logits), weights, top, log_total, *ctx.options, any(need[1:]), need[0],
            rows_first,
        )  # fmt: skip
        found = [None] * len(logits)
        if any(need[1:]):
            each = as_given(dlogits, logits, rows_first)
            found = [g if n else None for g, n in zip(each, need[1:])]
        return dweights if need[0] else None, None, None, None, None, None, *found


def combine(
    logits: Sequence[Tensor],
    weights: Tensor,
    kind: int,
    *,
    temperature: float = 1.0,
    plausibility: float = 0.0,
    anchor: int = 0,
    normalize: bool = True,
) -> Tensor:
    """(N, C) of [(N, K, C)] or K times (N, C) and weights (N, K), differentiable in both."""
    options = (kind, 1.0 / temperature, plausibility, anchor, normalize)
    if use_reference():
        return combine_reference(logits, weights, *options).to(logits[0].dtype)
    if needs_graph(weights, *logits):
        return _Combine.apply(weights, *options, *logits)
    return _op.combine_logits(rows_of(logits), weights, *options)[0]
