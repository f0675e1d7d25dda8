r"""Core `routing`: which rows go on to the next member, where they come from, how they come back.

Uncertainty of a row of logits x (C of them), with $d_c = x_c - x_{(1)}$ from the largest and
$S = \sum_{c\ne(1)} e^{d_c}$, $W = \sum_{c\ne(1)} d_c e^{d_c}$, so that nothing cancels where one class has nearly
all the mass:

$$\mathrm{msp} = p_{(1)} = \tfrac1{1+S},\qquad \mathrm{entropy} = \log(1+S) - W p_{(1)},\qquad
  \mathrm{energy} = -\log\textstyle\sum_c e^{x_c} = -(x_{(1)} + \log(1+S)),\qquad
  \mathrm{margin} = p_{(1)} - p_{(2)} = p_{(1)}\,(1 - e^{d_{(2)}}) .$$

The gradient, with $p_c = p_{(1)}e^{d_c}$ and g the incoming one of each score:

$$\mathrm dx_c = p_c\,\bigl[g_H(\log(1+S) - d_c - H) - g_E - g_{\mathrm{msp}}\,\mathrm{msp}
    - g_{\mathrm{margin}}\,\mathrm{margin}\bigr]
  + [c=(1)]\,(g_{\mathrm{msp}} + g_{\mathrm{margin}})\,p_{(1)} - [c=(2)]\,g_{\mathrm{margin}}\,p_{(2)} .$$

Window: a row exits iff its score U is above `high` or below `low`; the others are listed in their order.
Compaction is stable and its length stays on the device. Merging selects: rows that are not named are not
touched, so nothing they hold (NaN, inf) and nothing in the rows that come back leaks into another.

Sources: Xia, Bouganis, "Window-Based Early-Exit Cascades for Uncertainty Estimation", 2023 (scores, window); the
gradients by differentiating the formulas above.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _check
from .._autograd import differentiable_vjp
from .._registry import accumulate_type, reference
from .._route import needs_graph, use_reference

_op = torch.ops.solera

KINDS = ("msp", "entropy", "energy", "margin")
HOW = ("mean", "replace")
# Below this difference from the largest logit e^d is 0 in every precision; it keeps 0 * inf out of W.
_LOWEST = -1000.0


class UncertaintyScores(NamedTuple):
    """What `uncertainty_scores` returns. Shapes: each (...), of logits (..., C)."""

    msp: Tensor
    entropy: Tensor
    energy: Tensor
    margin: Tensor


# ---- reference ---------------------------------------------------------------------------------------


def _top_two(x: Tensor) -> tuple[Tensor, Tensor]:
    """Columns of the largest and of the second largest, the first of equals."""
    first = x.argmax(1)
    second = x.scatter(1, first[:, None], float("-inf")).argmax(1)
    return first, torch.where(second == first, (first == 0).long(), second)


def uncertainty_reference(logits: Tensor) -> tuple[Tensor, Tensor]:
    """(scores (4, B), top (2, B)) by the formulas above."""
    x = logits.to(accumulate_type(logits))
    top = torch.stack(_top_two(x.detach()))
    best = x.gather(1, top[0, :, None])
    rest = torch.arange(x.shape[1], device=x.device) != top[0, :, None]
    d = torch.where(rest, x - best, 0.0).clamp(min=_LOWEST)
    e = torch.where(rest, d.exp(), 0.0)
    total, weighted = e.sum(1), (e * d).sum(1)
    msp = 1 / (1 + total)
    entropy = torch.log1p(total) - weighted * msp
    energy = -(best[:, 0] + torch.log1p(total))
    margin = -torch.expm1(d.gather(1, top[1, :, None])[:, 0]) * msp
    return torch.stack([msp, entropy, energy, margin]), top


def _score(logits: Tensor, kind: int) -> Tensor:
    return uncertainty_reference(logits)[0][kind]


@reference("uncertainty_scores")
def _uncertainty_scores(logits):
    scores, top = uncertainty_reference(logits)
    return scores.contiguous(), top.contiguous()


@reference("uncertainty_scores_backward")
def _uncertainty_scores_backward(dscores, logits, scores, top):
    x = logits.to(scores.dtype)
    msp, entropy, _, margin = scores[..., None].unbind(0)
    g_msp, g_entropy, g_energy, g_margin = dscores.to(scores.dtype)[..., None].unbind(0)
    d = (x - x.gather(1, top[0, :, None])).clamp(min=_LOWEST)
    p = d.exp() * msp
    inner = g_entropy * (-msp.log() - d - entropy) - g_energy - g_msp * msp - g_margin * margin
    column = torch.arange(x.shape[1], device=x.device)
    dx = p * inner + torch.where(column == top[0, :, None], (g_msp + g_margin) * p, 0.0)
    dx = dx - torch.where(column == top[1, :, None], g_margin * p, 0.0)
    return dx.to(logits.dtype).contiguous()


@reference("window_exit")
def window_exit_reference(logits, low, high, kind):
    """(exit (B,), index (B,) of the rows that stay and then -1, their count ())."""
    u = _score(logits, kind)
    done = (u > high) | (u < low)
    stays = ~done
    place = torch.where(stays, stays.cumsum(0) - 1, u.shape[0])
    rows = torch.arange(u.shape[0], device=u.device)
    index = torch.full((u.shape[0] + 1,), -1, dtype=torch.int64, device=u.device)
    index = index.scatter(0, place, rows)[: u.shape[0]]
    return done, index.clone(), stays.sum()


def cascade_merge_reference(out: Tensor, compact: Tensor, index: Tensor, weight: float) -> Tensor:
    """The merged tensor, differentiable in both; rows of index that are negative name nothing."""
    rows = out.shape[0]
    place = torch.where(index < 0, rows, index)
    source = torch.full((rows + 1,), -1, dtype=torch.int64, device=out.device)
    order = torch.arange(index.shape[0], device=out.device)
    source = source.scatter(0, place, order)[:rows]
    if index.shape[0] == 0:
        return out.clone()
    acc = accumulate_type(out)
    new = compact[source.clamp(min=0)].to(acc)
    if weight != 1.0:
        new = out.to(acc) * (1 - weight) + new * weight
    kept = (source < 0).view(-1, *[1] * (out.dim() - 1))
    return torch.where(kept, out, new.to(out.dtype))


@reference("cascade_merge_")
def _cascade_merge_in_place(out, compact, index, weight):
    out.copy_(cascade_merge_reference(out, compact, index, weight))


# ---- autograd ----------------------------------------------------------------------------------------


class _UncertaintyScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits):
        scores, top = _op.uncertainty_scores(logits)
        ctx.save_for_backward(logits, scores, top)
        return scores

    @staticmethod
    def backward(ctx, dscores):
        logits, scores, top = ctx.saved_tensors
        if torch.is_grad_enabled():
            scores_of = lambda x: uncertainty_reference(x)[0]
            return differentiable_vjp(scores_of, (logits,), (True,), (dscores,))[0]
        return _op.uncertainty_scores_backward(dscores, logits, scores, top)


# ---- public functions --------------------------------------------------------------------------------


def _logits(logits: object, dim: int | None = None) -> Tensor:
    x = _check.tensor("logits", logits, dim=dim, min_dim=1)
    if x.shape[-1] < 2:
        raise ValueError(f"logits: expected at least 2 classes, got shape {tuple(x.shape)}")
    return x


def uncertainty_scores(logits: Tensor) -> UncertaintyScores:
    r"""Four uncertainties of every row of logits in one pass.

    msp $= \max_c p_c$, entropy $= -\sum_c p_c\log p_c$, energy $= -\log\sum_c e^{x_c}$ and margin
    $= p_{(1)} - p_{(2)}$ with p the softmax. Uncertain rows have a high entropy and energy, a low msp and margin.

    Args:
        logits: (..., C), C at least 2; float32, float64, bfloat16 or float16.

    Shapes: (..., C) -> four tensors (...), in float32 (float64 for float64). Differentiable (of equal largest logits
    the first ones count as the two largest). A row that holds a NaN, or nothing but -inf, gives NaN.

    Raises:
        ValueError, TypeError: naming logits where it does not fit.

    Source: Xia, Bouganis, "Window-Based Early-Exit Cascades for Uncertainty Estimation", 2023; energy: Liu et al.,
    "Energy-based Out-of-distribution Detection", 2020.
    """
    x = _logits(logits)
    rows = x.reshape(-1, x.shape[-1])
    if use_reference():
        scores = uncertainty_reference(rows)[0]
    elif needs_graph(rows):
        scores = _UncertaintyScores.apply(rows)
    else:
        scores = _op.uncertainty_scores(rows)[0]
    return UncertaintyScores(*scores.reshape(4, *x.shape[:-1]).unbind(0))


def bound(name: str, value: object) -> float:
    """An end of a window: a number, infinities included."""
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected a number, got {_check._came(value)}") from None
    if math.isnan(number):
        raise ValueError(f"{name}: expected a number or an infinity, got {value!r}")
    return number


def window_exit(
    logits: Tensor, low: float, high: float, kind: str = "msp"
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Which rows of a cascade's stage are done, and the others in a list without gaps.

    exit $= (U > \mathrm{high}) \lor (U < \mathrm{low})$, U the score `kind` of `uncertainty_scores`. A single threshold
    is a window open on one side: `window_exit(logits, -inf, t)` exits where msp > t. A row whose score is NaN stays.

    Args:
        logits: (B, C), C at least 2; no gradient flows through them.
        low, high: the window's ends, infinities allowed; low > high lets every row exit.
        kind: "msp", "entropy", "energy" or "margin".

    Shapes: (B, C) -> exit (B,) bool; index (B,) int64, the rows that stay in their order, then -1; count () int64, how
    many stay, on the device: `index[:count]` is where the host first waits for it.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Xia, Bouganis, "Window-Based Early-Exit Cascades for Uncertainty Estimation", 2023.
    """
    x = _logits(logits, dim=2).detach()
    _check.choice("kind", kind, KINDS)
    options = (bound("low", low), bound("high", high), KINDS.index(kind))
    call = window_exit_reference if use_reference() else _op.window_exit
    done, index, count = call(x, *options)
    return done, index, count


def cascade_merge_(
    out: Tensor,
    compact: Tensor,
    index: Tensor,
    how: str = "mean",
    *,
    weight: float | None = None,
) -> Tensor:
    r"""Bring a later member's rows back into the outputs, in place: only the rows named are touched.

    mean: $o_{i_j} \leftarrow (1-w)\,o_{i_j} + w\,c_j$; replace: $o_{i_j} \leftarrow c_j$. Rows are selected, never
    masked by multiplication, so NaN and inf of a row stay in that row.

    Args:
        out: (B, ...), changed; float32, float64, bfloat16 or float16. With autograd it must not be a leaf.
        compact: (n, ...) of out's dtype, the rows that come back.
        index: (n,) int64, distinct rows of out; negative for an entry to be left out, as `window_exit` pads.
        how: "mean" or "replace".
        weight: w in [0, 1] of "mean"; 1/2 unless given. The m-th member of a running mean has 1/m.

    Shapes: (B, ...), (n, ...), (n,) -> out. Differentiable in out and compact.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.
        RuntimeError: an index past B, on the CPU.

    Source: Xia, Bouganis, "Window-Based Early-Exit Cascades for Uncertainty Estimation", 2023.
    """
    _check.tensor("out", out, min_dim=1)
    if not isinstance(index, Tensor) or index.dtype != torch.int64 or index.dim() != 1:
        raise TypeError(f"index: expected an int64 tensor (n,), got {_check._came(index)}")
    if index.device != out.device:
        raise ValueError(f"index: expected device {out.device} (that of out), got {index.device}")
    _check.like("compact", compact, (index.shape[0], *out.shape[1:]), out, "out")
    _check.same_dtype("compact", compact, out, "out")
    _check.choice("how", how, HOW)
    if weight is not None and how == "replace":
        raise ValueError('weight: expected None with how="replace"')
    share = 1.0 if how == "replace" else 0.5 if weight is None else weight
    share = _check.number("weight", share, low=0.0, high=1.0)
    if use_reference() or needs_graph(out, compact):
        return out.copy_(cascade_merge_reference(out, compact, index, share))
    _op.cascade_merge_(out, compact, index, share)
    return out
