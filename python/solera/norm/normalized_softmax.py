r"""Normalised softmax: cross-entropy of scaled cosines with a margin, without the (B, C) logits.

With $\hat x = x/\|x\|$, $\hat w_k = w_k/\|w_k\|$, $\cos_{bk} = \hat x_b\cdot\hat w_k$ and a margin function g:

$$L_b = \log\Bigl(e^{s\,g(\cos_{by})} + \sum_{k\ne y} e^{s\cos_{bk}} + \sum_j e^{s\,n_{bj}}\Bigr) - s\,g(\cos_{by})$$

(n: extra negatives). A composition of products and of the cores `logit_norm` and `row_dots`: the rows are taken in
chunks; a chunk's product $\hat x W^\top$ lies in one buffer, core `logit_norm` reads its statistics there (with
$1/\|w_k\|$ as column factors, so no normalised copy of the weight exists) and writes the gradient
over it, and two more products turn that into the chunk's part of dx and dW. So the gradient is made in the
forward pass, three products in all, and backward only scales it:

$$\mathrm{d}x = \frac{d - \hat x\,(\hat x\cdot d)}{\|x\|},\ d = G W;\qquad
  \mathrm{d}w_k = e_k - \hat w_k(\hat w_k\cdot e_k),\ e = G^\top \hat x,$$

G the gradient to the raw product. At the label $G$ holds $-s\,\sigma_b\,g'(\cos_{by})/\|w_y\|$, with
$\sigma_b$ the mass outside the label. Memory beyond the gradients: one chunk, R x C. A half-precision
weight on the CPU, whose gradient would be summed in float32 from chunk to chunk, is taken by blocks of classes
instead (`class_softmax`): the forward pass keeps the cosines in int16, and backward makes the gradients.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

from .. import _check
from .._autograd import differentiable_vjp
from .._registry import accumulate_type, reference
from .._route import use_reference, without_autocast
from . import class_softmax
from ._labels import REDUCTIONS, labels
from ._widened import back_product, product, rounded
from .logit_norm import SOFTMAX
from .margins import CosFace, MadaCos
from .row_dots import row_dots_reference  # noqa: F401  (registers the ops)

_op = torch.ops.solera

Margin = Callable[[Tensor, Tensor], Tensor]

CHUNK_ELEMENTS = 10 << 20  # of a chunk of logits, 40 MiB in float32
WIDENED_ELEMENTS = 20 << 20  # the same where a half's weight is widened for every chunk anew
LEAST_ROWS = 64  # below that a product is slower than the memory it saves is worth
EPS = 1e-12  # lengths below it count as it, as in torch.nn.functional.normalize


def _native(weight: Tensor) -> bool:
    """Whether products of this weight's dtype are to run in it: float types, and halves where hardware does."""
    if weight.dtype in (torch.float32, torch.float64):
        return True
    return not weight.is_cpu


def _log_sum(s: Tensor, others: Tensor, extra: Tensor | None) -> Tensor:
    """Log of everything but the label: the other classes, and the extra negatives."""
    return others if extra is None else torch.logaddexp(others, (s * extra).logsumexp(1))


class _Head:
    """What the passes over the chunks share: lengths, cosines at the labels, scale and margin."""

    def __init__(
        self, x: Tensor, weight: Tensor, target: Tensor, scale: Tensor, margin=None, label=None
    ):
        acc = accumulate_type(x)
        self.weight, self.target = weight, target
        xx, xy, yy = _op.row_dots(x, weight, target)
        self.x_norm = xx.sqrt().clamp(min=EPS)
        self.x_hat = x.to(acc) / self.x_norm[:, None]
        self.w_square = _op.row_dots(weight, weight, None)[0]
        self.w_inverse = 1 / self.w_square.sqrt().clamp(min=EPS)
        cosine = xy / (self.x_norm * yy.sqrt().clamp(min=EPS))
        # A half-precision GPU product runs in that dtype; elsewhere the accumulator's.
        self.dtype = weight.dtype if _native(weight) else acc
        limit = CHUNK_ELEMENTS if self.dtype == weight.dtype else WIDENED_ELEMENTS
        most = max(LEAST_ROWS, limit // max(weight.shape[0], 1))
        chunks = max(1, -(-x.shape[0] // most))
        self.rows = max(1, -(-x.shape[0] // chunks))
        self.scale = scale
        if isinstance(margin, MadaCos):
            self.scale, m = margin.adapt(cosine, self._others)
            margin = lambda cosine, norms: cosine - m
        self.scales = self.scale.expand(x.shape[0])
        if label is not None:  # given, and its gradient is the caller's
            self.label, self.slope = label, torch.zeros_like(label)
            return
        if margin is None:
            self.label, self.slope = cosine, torch.ones_like(cosine)
            return
        # Out of inference mode, whose tensors record nothing; clones, for autograd takes none of its tensors.
        with torch.inference_mode(False), torch.enable_grad():
            leaf = cosine.clone().detach().requires_grad_()
            moved = margin(leaf, self.x_norm.clone())
            (slope,) = torch.autograd.grad(moved.sum(), leaf)
        self.label, self.slope = moved.detach(), slope

    def _others(self, row: Tensor, scale: Tensor) -> Tensor:
        """log sum over the classes other than its label of e^(scale cos), for one row."""
        logits = self._logits(self.x_hat[row], None)
        return self._statistics(logits, self.target[row], scale)[0]

    def _logits(self, x_hat: Tensor, buffer: Tensor | None) -> Tensor:
        rows = x_hat.shape[0]
        if buffer is None:
            buffer = x_hat.new_empty(rows, self.weight.shape[0], dtype=self.dtype)
        out = buffer[:rows]
        product(x_hat.to(self.dtype), self.weight, out)
        return out

    def _statistics(self, logits: Tensor, target: Tensor, scales: Tensor):
        return _op.logit_statistics(logits, target, scales, self.w_inverse, None, 0.0, SOFTMAX)

    def losses(self, part: slice, others, negatives) -> tuple[Tensor, Tensor, Tensor]:
        """Losses of these rows; and, for their gradient, the label's gap and the log of everything else."""
        total = _log_sum(self.scale, others, negatives)
        gap = self.scale * self.label[part] - total
        return torch.where(self.target[part] >= 0, -F.logsigmoid(gap), 0.0), gap, total

    def shares(self, part: slice, others, mean, negatives, gap, total, row_weight) -> tuple:
        """(share of the other classes, dlabel, dextra, dscale) of sum(row_weight * losses) over these rows."""
        s = self.scale
        outside = torch.where(self.target[part] >= 0, row_weight * torch.sigmoid(-gap), 0.0)
        share = outside * torch.exp(others - total)
        dscale = (share * mean - outside * self.label[part]).sum()
        dextra = None
        if negatives is not None:
            p = outside[:, None] * torch.exp(s * negatives - total[:, None])
            dextra = s * p
            dscale = dscale + (p * negatives).sum()
        return share, -s * outside, dextra, dscale

    def run(self, extra: Tensor | None, row_weight: Tensor | None, need_x: bool, need_weight: bool):
        """(losses, dx, dweight, dextra, dscale, dlabel) of sum(row_weight * losses); None where not asked for.

        dlabel is the gradient to the cosines at the labels, which dx and dweight hold already by their slope.
        """
        grads = row_weight is not None
        rows, width = self.x_hat.shape[0], self.weight.shape[0]
        losses, dlabel = self.x_hat.new_empty(rows), self.x_hat.new_zeros(rows)
        dx_hat = torch.empty_like(self.x_hat) if grads and need_x else None
        dweight = None
        dextra = None if extra is None or not grads else torch.empty_like(extra)
        dscale = self.x_hat.new_zeros(())
        buffer = self.x_hat.new_empty(min(rows, self.rows), width, dtype=self.dtype)
        for first in range(0, rows, self.rows):
            part = slice(first, min(first + self.rows, rows))
            x_hat, y, scales = self.x_hat[part], self.target[part], self.scales[part]
            logits = self._logits(x_hat, buffer)
            others, mean, _, _ = self._statistics(logits, y, scales)
            negatives = None if extra is None else extra[part]
            losses[part], gap, total = self.losses(part, others, negatives)
            if row_weight is None:
                continue
            share, dlabel[part], dnegatives, more = self.shares(
                part, others, mean, negatives, gap, total, row_weight[part]
            )
            dscale = dscale + more
            if dextra is not None:
                dextra[part] = dnegatives
            if not (need_x or need_weight):
                continue
            label = dlabel[part] * self.slope[part]
            _op.logit_gradient_(
                logits, y, scales, self.w_inverse, None, others, share, others, label, SOFTMAX
            )
            if dx_hat is not None:
                dx_hat[part] = back_product(logits, self.weight)
            if need_weight:
                operand = x_hat.to(self.dtype)
                if self.dtype != x_hat.dtype:
                    grown = (logits.t() @ operand).to(x_hat.dtype)
                    dweight = grown if dweight is None else dweight.add_(grown)
                elif dweight is None:
                    dweight = logits.t() @ operand
                else:
                    dweight.addmm_(logits.t(), operand)
        del buffer
        return losses, self._dx(dx_hat), self._dweight(dweight), dextra, dscale, dlabel

    def statistics_by_class(self, x: Tensor, keep: bool):
        """`class_softmax`'s first pass: others, mean, and the cosines its second one reads."""
        return _op.class_statistics(
            x, self.weight, self.target, self.scales, 1 / self.x_norm, self.w_inverse, keep
        )

    def gradients_by_class(
        self, x, weight, others, mean, cosines, extra, row_weight, need_x: bool, need_weight: bool
    ):
        """[dx, dweight, dextra, dscale] of sum(row_weight * losses), the first two in their tensors' dtype."""
        every = slice(None)
        now = self.losses(every, others, extra)[1:]
        share, dlabel, dextra, dscale = self.shares(every, others, mean, extra, *now, row_weight)
        dx = dweight = None
        if need_x or need_weight:
            dx, dweight = _op.class_gradient(
                x, weight, self.target, cosines, self.scales, 1 / self.x_norm, self.w_inverse,
                others, share, dlabel * self.slope, need_x, need_weight,
            )  # fmt: skip
        return [dx if need_x else None, dweight if need_weight else None, dextra, dscale]

    def _dx(self, d: Tensor | None) -> Tensor | None:
        if d is None:
            return None
        _, along, _ = _op.row_dots(d, self.x_hat, None)
        inverse = 1 / self.x_norm
        _op.row_combine_(d, self.x_hat, None, inverse, -along * inverse * (self.x_norm > EPS))
        return d

    def _dweight(self, e: Tensor | None) -> Tensor | None:
        if e is None:
            return None
        _, along, _ = _op.row_dots(e, self.weight, None)
        along = torch.where(self.w_square > EPS * EPS, -along / self.w_square, 0.0)
        _op.row_combine_(e, self.weight, None, torch.ones_like(along), along)
        return e


def _reference_losses(x, weight, target, scale, margin, extra) -> Tensor:
    """The same losses (B,) in plain torch, differentiable as often as torch is."""
    acc = accumulate_type(x)
    v, w = x.to(acc), weight.to(acc)
    # F.normalize's own rule, with the length at hand for the margin.
    length = v.square().sum(1).clamp(min=EPS * EPS).sqrt()
    cosine = (v / length[:, None]) @ F.normalize(w, dim=1, eps=EPS).t()
    other = torch.arange(w.shape[0], device=x.device) != target[:, None]
    picked = cosine.gather(1, target.clamp(0, w.shape[0] - 1)[:, None])[:, 0]
    picked = torch.where(target < w.shape[0], picked, float("nan"))

    def others(row, s):
        return torch.where(other[row], s[:, None] * cosine.detach()[row], float("-inf")).logsumexp(
            1
        )

    if isinstance(margin, MadaCos):
        scale, m = margin.adapt(picked, others)
        picked = picked - m
    elif margin is not None:
        picked = margin(picked, length)
    rest = torch.where(other, scale * cosine, float("-inf")).logsumexp(1)
    gap = scale * picked - _log_sum(scale, rest, extra)
    return torch.where(target >= 0, -F.logsigmoid(gap), 0.0)


def _row_weights(target: Tensor, reduction: str, dtype: torch.dtype) -> Tensor:
    ones = torch.ones(target.shape, dtype=dtype, device=target.device)
    return ones / (target >= 0).sum() if reduction == "mean" else ones


class _NormalizedSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, scale, extra, target, margin, reduction):
        need_x, need_weight, _, _ = ctx.needs_input_grad[:4]
        with without_autocast(x):
            head = _Head(x, weight, target, scale, margin)
            row_weight, grads = None, None
            by_class: tuple = ()
            if reduction != "none":
                row_weight = _row_weights(target, reduction, head.x_hat.dtype)
            if class_softmax.suits(x, weight):
                by_class = head.statistics_by_class(x, need_x or need_weight)
                losses = head.losses(slice(None), by_class[0], extra)[0]
                ctx.head = head
                del head.weight, head.x_hat  # saved below as what they are, or not needed again
            else:
                losses, *grads, _ = head.run(extra, row_weight, need_x, need_weight)
        # Not a saved tensor: nobody else may hold this one, for backward scales it in place.
        ctx.grads = grads if row_weight is not None else None
        ctx.options = (margin, reduction)
        ctx.label = head.label, head.slope, head.scale
        ctx.save_for_backward(x, weight, scale, extra, target, *by_class)
        if row_weight is None:
            return losses
        return (losses.double() * row_weight.double()).sum().to(losses.dtype)

    @staticmethod
    def backward(ctx, g):
        x, weight, scale, extra, target, *by_class = ctx.saved_tensors
        margin, reduction = ctx.options
        needs = ctx.needs_input_grad[:4]
        none = (None, None, None)
        if torch.is_grad_enabled():

            def loss(x, weight, scale, extra):
                losses = _reference_losses(x, weight, target, scale, _frozen(margin), extra)
                if reduction == "none":
                    return losses
                return (losses * _row_weights(target, reduction, losses.dtype)).sum()

            return *differentiable_vjp(loss, (x, weight, scale, extra), needs, (g,)), *none
        grads, ctx.grads = ctx.grads, None
        factor = g
        if by_class:
            with without_autocast(x):
                row_weight, factor = g, None
                if reduction != "none":
                    row_weight = g * _row_weights(target, reduction, g.dtype)
                inputs = (x, weight, *by_class, extra, row_weight)
                grads = ctx.head.gradients_by_class(*inputs, *needs[:2])
        elif grads is None:
            # Losses a row, or a second backward through a kept graph: the chunks once more.
            with without_autocast(x):
                head = _Head(x, weight, target, scale, _frozen(margin))
                head.label, head.slope, head.scale = ctx.label
                head.scales = head.scale.expand(x.shape[0])
                if reduction == "none":
                    row_weight, factor = g, None
                else:
                    row_weight = _row_weights(target, reduction, head.x_hat.dtype)
                _, *grads, _ = head.run(extra, row_weight, *needs[:2])
        out: list[Tensor | None] = []
        for t, like, need in zip(
            grads, (x, weight, extra, scale), (*needs[:2], needs[3], needs[2])
        ):
            if t is None or not need:
                out.append(None)
            elif factor is None or t.dtype == like.dtype:
                out.append((t if factor is None else t.mul_(factor)).to(like.dtype))
            else:
                out.append(rounded(t, factor, like.dtype))
        dx, dweight, dextra, dscale = out
        if isinstance(margin, MadaCos):
            dscale = None
        return dx, dweight, dscale, dextra, *none


def _frozen(margin):
    """The margin as it is, its running statistics no longer moving."""
    if getattr(margin, "training", False) and hasattr(margin, "momentum"):
        return type(margin)(**{**vars(margin), "training": False})
    return margin


# ---- under torch.compile -----------------------------------------------------------------------------


@reference("normalized_softmax")
def _head_op(x, weight, target, label, scale, extra, row_weight, need_x, need_weight):
    with without_autocast(x):
        found = _Head(x, weight, target, scale, label=label).run(
            extra, row_weight, need_x, need_weight
        )
    nothing = x.new_empty(0, dtype=accumulate_type(x))
    return tuple(nothing.clone() if t is None else t.contiguous() for t in found)


class _OpaqueHead(torch.autograd.Function):
    """Losses from the cosines at the labels, given; the products over all classes stay inside one op."""

    @staticmethod
    def forward(ctx, x, weight, label, scale, extra, target, row_weight, needs):
        ctx.needs, ctx.given = needs, row_weight is not None
        losses, *grads = _op.normalized_softmax(
            x, weight, target, label, scale, extra, row_weight, *needs
        )
        if row_weight is None:
            ctx.save_for_backward(x, weight, label, scale, extra, target)
            return losses
        ctx.save_for_backward(x, weight, label, scale, extra, target, *grads)
        return (losses.double() * row_weight.double()).sum().to(losses.dtype)

    @staticmethod
    def backward(ctx, g):
        x, weight, label, scale, extra, target, *grads = ctx.saved_tensors
        if ctx.given:
            grads = [g * t for t in grads]
        else:
            _, *grads = _op.normalized_softmax(
                x, weight, target, label, scale, extra, g, *ctx.needs
            )
        dx, dweight, dextra, dscale, dlabel = grads
        return (
            dx.to(x.dtype) if ctx.needs[0] else None,
            dweight.to(weight.dtype) if ctx.needs[1] else None,
            dlabel,
            dscale,
            None if extra is None else dextra,
            *(None, None, None),
        )


def _compiled(x, weight, y, scale, margin, extra, reduction) -> Tensor:
    """The cosines at the labels by plain torch, so that any margin traces; the rest by one op."""
    acc = accumulate_type(x)
    v = x.to(acc)
    length = v.norm(dim=1).clamp(min=EPS)
    at_label = F.normalize(weight[y.clamp(min=0)].to(acc), dim=1, eps=EPS)
    label = (F.normalize(v, dim=1, eps=EPS) * at_label).sum(1)
    if margin is not None:
        label = margin(label, length.detach())
    row_weight = None if reduction == "none" else _row_weights(y, reduction, acc)
    needs = (x.requires_grad, weight.requires_grad)
    return _OpaqueHead.apply(x, weight, label, scale, extra, y, row_weight, needs)


# ---- public function ---------------------------------------------------------------------------------


def normalized_softmax_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    scale: float | Tensor = 64.0,
    margin: float | Margin | MadaCos | None = None,
    extra_negatives: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
) -> Tensor:
    r"""Cross-entropy of `scale * cos(x, weight)` with a margin at the label; the (B, C) logits never exist.

    $L_b = -\log \frac{e^{s\,g(\cos_{by})}}{e^{s\,g(\cos_{by})} + \sum_{k \ne y} e^{s \cos_{bk}}
    + \sum_j e^{s\,n_{bj}}}$.
    The rows are taken in chunks and the gradient is made in the forward pass (three products in all). With
    reduction "none", and in a second backward of a kept graph, it is recomputed. Halves on the CPU, B up to 2 d,
    keep the cosines as int16 for backward instead. Second derivatives are those of the plain composition, with its
    memory.

    Args:
        x: (B, d) features. weight: (C, d) class vectors, of x's dtype or float32. Neither need have unit length.
        target: (B,) int64.
        scale: s, or one over the temperature; a scalar tensor may take a gradient. MadaCos sets its own.
        margin: None; a number m for cos - m; `arcface(m)`, `cosface(m)`, `adaface(...)`, `madacos(...)`; or any
            `f(cosine, norms)` that maps each cosine by itself.
        extra_negatives: (B, m) further cosines in the denominator, as UNPG's from the batch (-inf leaves one out).

    Products run in x's precision, on the CPU with float32 sums for halves, whatever autocast says. The same bits at
    any time; other batches or thread counts may change what the product's library rounds.

    Shapes: (B, d), (C, d), (B,) -> scalar, or (B,) with reduction "none", float32 for half inputs.

    Raises:
        ValueError, TypeError, IndexError: naming the argument that does not fit.

    Source: Wang et al., "NormFace", 2017, and "Hyperspherical embedding for novel class classification" (the
    normalised softmax); margins and extra negatives as their functions say; gradient in the forward pass as in
    fused linear cross-entropy.
    """
    _check.tensor("x", x, dim=2)
    _check.tensor("weight", weight, dim=2)
    _check.like("weight", weight, (weight.shape[0], x.shape[1]), x)
    if x.dtype == torch.float32 and weight.dtype != torch.float32:
        raise TypeError(f"weight: expected torch.float32 (that of x), got {weight.dtype}")
    if x.dtype == torch.float64:
        weight = weight.to(x.dtype)
    _check.choice("reduction", reduction, REDUCTIONS)
    y = labels("target", target, x.shape[:1], weight.shape[0], x.device, ignore_index)
    acc = accumulate_type(x)
    if isinstance(scale, Tensor):
        _check.like("scale", scale, (), x)
        s = scale.to(acc)
    else:
        s = torch.tensor(_check.number("scale", scale, low=0.0), dtype=acc, device=x.device)
    if extra_negatives is not None:
        _check.tensor("extra_negatives", extra_negatives, dim=2)
        _check.like("extra_negatives", extra_negatives, (x.shape[0], extra_negatives.shape[1]), x)
        # -inf times a gradient of 0 would be NaN; at -1e6 the exponential is 0 all the same.
        extra_negatives = extra_negatives.to(acc).clamp(min=-1e6)
    if margin is not None and not callable(margin) and not isinstance(margin, MadaCos):
        margin = CosFace(_check.number("margin", margin))
    if isinstance(margin, CosFace) and margin.m == 0:
        margin = None
    if is_compiling() and not isinstance(margin, MadaCos):
        return _compiled(x, weight, y, s, margin, extra_negatives, reduction)
    if use_reference() or is_compiling():
        losses = _reference_losses(x, weight, y, s, margin, extra_negatives)
        if reduction == "none":
            return losses
        return (losses * _row_weights(y, reduction, losses.dtype)).sum()
    return _NormalizedSoftmax.apply(x, weight, s, extra_negatives, y, margin, reduction)
