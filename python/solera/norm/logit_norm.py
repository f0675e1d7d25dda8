r"""Core `logit_norm`: statistics of logit rows, and the gradient that belongs to them.

Every loss over logits x (B, C) with one label y a row that Solera knows is a function of a few numbers a row:

| mode | statistics | used by |
|---|---|---|
| moments | $\mu = \mathrm{mean}(x),\ \sigma^2 = \mathrm{var}(x)$, $x_y$ | Z-loss |
| stablemax | $S = \sum_{k\ne y} s(x_k)$, $x_y$ | StableMax |
| softmax | $\ell = \log\sum_{k\ne y} e^{r v_k}$, $e = \sum_{k\ne y} p_k v_k$, $v_y$ | LDR-KL, margin softmax |
| normalized | the same, $r = \mathrm{scale} / (\bar n + \varepsilon)$, $\bar n$ the segments' mean norm | LogitNorm |

with $v_k = c_k x_k$ (optional column factors c), r a factor a row and p the softmax of $r v$ without the label. The
label is kept out of the sums: a cross-entropy is then $\mathrm{softplus}(\ell - r v_y)$, exact where the label
has nearly all the mass, and a margin at the label changes nothing else. So one kernel reads the logits
once and writes the statistics; the loss is a few torch operations on (B,) tensors (which autograd differentiates);
and one kernel reads the logits and writes

$$\mathrm{d}x_k = \alpha\,w(x_k) + \beta\,(x_k - \mu) + \gamma + [k=y]\,\delta$$

where w is $r c_k\,e^{r v_k - \ell}$ (0 at the label), $s'(x_k)$ (0 at the label) or nothing:

- moments: $\gamma = \mathrm{d}\mu / C$, $\beta = 2\,\mathrm{d}\sigma^2 / C$;
- softmax: $\alpha = \mathrm{d}\ell$, and $\mathrm{d}r = \mathrm{d}\ell\,e$;
- normalized: as softmax, and for a segment t of T with norm $n_t$, since $\bar n = \tfrac1T \sum_t n_t$,
  $\beta_t = (\mathrm{d}n_t - \mathrm{d}\ell\,e\,r / ((\bar n + \varepsilon)\,T)) / n_t$ (0 where $n_t$ is 0),
  $\mu = 0$.

Nothing of size B x C is kept but the logits themselves.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from .._autograd import differentiable_vjp
from .._registry import accumulate_type, reference
from .._route import needs_graph, use_reference

_op = torch.ops.solera

MODES = ("moments", "stablemax", "softmax", "normalized")
MOMENTS, STABLEMAX, SOFTMAX, NORMALIZED = range(4)


# ---- reference ---------------------------------------------------------------------------------------


def stablemax_scores(x: Tensor) -> Tensor:
    """s(x): x + 1 from 0 on, 1 / (1 - x) below."""
    return torch.where(x >= 0, x + 1, 1 / (1 - x.clamp(max=0)))


def _segment_of(bounds: Tensor, columns: int) -> Tensor:
    """(C,): the segment each column lies in."""
    column = torch.arange(columns, device=bounds.device)
    return torch.searchsorted(bounds[1:], column, right=True).clamp(max=bounds.shape[0] - 2)


def _segment_norms(v: Tensor, bounds: Tensor) -> Tensor:
    squares = v.new_zeros(v.shape[0], bounds.shape[0] - 1)
    squares = squares.index_add(1, _segment_of(bounds, v.shape[1]), v.square())
    positive = squares > 0
    return torch.where(positive, torch.where(positive, squares, 1.0).sqrt(), 0.0)


def logit_statistics_reference(
    logits: Tensor,
    target: Tensor,
    scale: Tensor | None,
    columns: Tensor | None,
    bounds: Tensor | None,
    eps: float,
    mode: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(a, b, picked, norms) by the formulas above; rows whose target is negative give 0, 1, 0 and 1."""
    v = logits.to(accumulate_type(logits))
    if columns is not None:
        v = v * columns
    width = v.shape[1]
    kept = target >= 0
    picked = v.gather(1, target.clamp(0, width - 1)[:, None])[:, 0]
    picked = torch.where(target < width, picked, float("nan"))
    norms = v.new_zeros(0)
    if mode == MOMENTS:
        a = v.mean(1)
        b = (v - a[:, None]).square().mean(1)
    else:
        other = torch.arange(width, device=v.device) != target[:, None]
        if mode == STABLEMAX:
            a = torch.where(other, stablemax_scores(v), 0.0).sum(1)
            b = torch.ones_like(a)
        else:
            assert scale is not None
            if mode == NORMALIZED:
                assert bounds is not None
                norms = _segment_norms(v, bounds)
                scale = scale / (norms.mean(1) + eps)
                norms = torch.where(kept[:, None], norms, 1.0)
            z = torch.where(other, v * scale[:, None], float("-inf"))
            a = z.logsumexp(1)
            p = torch.where(other, (z - a[:, None]).detach().exp(), 0.0)
            b = torch.where(p > 0, p * v.detach(), 0.0).sum(1)
    return (
        torch.where(kept, a, 0.0),
        torch.where(kept, b, 1.0),
        torch.where(kept, picked, 0.0),
        norms,
    )


def _gradient(logits, target, scale, columns, bounds, a, da, db, dpicked, mode):
    x = logits.to(a.dtype)
    width = x.shape[1]
    v = x if columns is None else x * columns
    at_target = torch.arange(width, device=x.device) == target[:, None]
    if mode == MOMENTS:
        dx = (db[:, None] * (x - a[:, None]) * 2 + da[:, None]) / width
    else:
        if mode == STABLEMAX:
            w = torch.where(v >= 0, 1.0, stablemax_scores(v).square())
        else:
            w = scale[:, None] * (v * scale[:, None] - a[:, None]).exp()
            if columns is not None:
                w = w * columns
        dx = torch.where(at_target | (da == 0)[:, None], 0.0, w * da[:, None])
        if mode == NORMALIZED:
            dx = dx + db[:, _segment_of(bounds, width)] * x
    label = dpicked[:, None] if columns is None else dpicked[:, None] * columns
    dx = dx + torch.where(at_target, label, 0.0)
    return torch.where((target >= 0)[:, None], dx, 0.0)


@reference("logit_statistics")
def _logit_statistics(logits, target, scale, columns, bounds, eps, mode):
    out = logit_statistics_reference(logits, target, scale, columns, bounds, eps, mode)
    return tuple(t.contiguous() for t in out)


@reference("logit_gradient")
def _logit_gradient(logits, target, scale, columns, bounds, a, da, db, dpicked, mode):
    dx = _gradient(logits, target, scale, columns, bounds, a, da, db, dpicked, mode)
    return dx.to(logits.dtype).contiguous()


@reference("logit_gradient_")
def _logit_gradient_in_place(logits, target, scale, columns, bounds, a, da, db, dpicked, mode):
    logits.copy_(_gradient(logits, target, scale, columns, bounds, a, da, db, dpicked, mode))


# ---- autograd ----------------------------------------------------------------------------------------


class _LogitStatistics(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, scale, target, columns, bounds, eps, mode):
        a, b, picked, norms = _op.logit_statistics(
            logits, target, scale, columns, bounds, eps, mode
        )
        ctx.options = (eps, mode)
        ctx.save_for_backward(logits, scale, target, columns, bounds, a, b, norms)
        if mode != MOMENTS:
            ctx.mark_non_differentiable(b)
        return a, b, picked, norms

    @staticmethod
    def backward(ctx, da, db, dpicked, dnorms):
        logits, scale, target, columns, bounds, a, b, norms = ctx.saved_tensors
        eps, mode = ctx.options
        need_logits, need_scale = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled():

            def statistics(logits, scale):
                out = logit_statistics_reference(logits, target, scale, columns, bounds, eps, mode)
                return out if mode == MOMENTS else (out[0], out[2], out[3])

            grads = (da, db, dpicked, dnorms) if mode == MOMENTS else (da, dpicked, dnorms)
            needs = (need_logits, need_scale)
            dlogits, dscale = differentiable_vjp(statistics, (logits, scale), needs, grads)
            return dlogits, dscale, None, None, None, None, None
        dscale = None
        if mode == NORMALIZED:
            size = norms.mean(1) + eps
            if need_scale:
                dscale = da * b / size
            scale = scale / size
            through = da * b * scale / (size * norms.shape[1])
            db = torch.where(norms > 0, (dnorms - through[:, None]) / norms, 0.0)
        elif mode == SOFTMAX and need_scale:
            dscale = da * b
        dlogits = None
        if need_logits:
            dlogits = _op.logit_gradient(
                logits, target, scale, columns, bounds, a, da, db, dpicked, mode
            )
        return dlogits, dscale, None, None, None, None, None


def logit_statistics(
    logits: Tensor,
    target: Tensor,
    mode: int,
    *,
    scale: Tensor | None = None,
    columns: Tensor | None = None,
    bounds: Tensor | None = None,
    eps: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(a, b, picked, norms) of the rows of `logits` (B, C), differentiable in `logits` and `scale`.

    `target` (B,) int64: the label, negative for a row to be left out (its statistics are 0, 1, 0 and 1 and its
    gradient is 0). See the table at the head of this file for what a and b are in each mode.
    """
    # Compiled: several of these Functions in one graph fail inside torch 2.13's tracer, and the reference is
    # what the compiler fuses best.
    if use_reference() or is_dynamo_compiling():
        return logit_statistics_reference(logits, target, scale, columns, bounds, eps, mode)
    if needs_graph(logits, scale):
        return _LogitStatistics.apply(logits, scale, target, columns, bounds, eps, mode)
    return _op.logit_statistics(logits, target, scale, columns, bounds, eps, mode)
