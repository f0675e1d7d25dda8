r"""Core `pair_losses`: contrastive losses whose temperature belongs to the pair, many heads, streamed over pairs.

Anchor i with its positive + and its k most similar negatives, similarities s and temperature logits r:

$$\tau = \tau_{\min} + \Delta\,\sigma(-r),\quad \Delta = \tau_{\max}-\tau_{\min},\qquad
  L_i = -\frac{s^+}{\tau^+} + \frac1k\sum_j \frac{s_j}{\tau_j}
        + \beta\Bigl(\frac d2\log\tau^+ + \frac1{\tau^+}\Bigr) - \beta\sum_j\Bigl(\log\tau_j + \frac1{\tau_j}\Bigr) .$$

Its gradient is sparse, on the 1 + k chosen pairs of a row, with
$\mathrm d\tau/\mathrm dr = -\Delta\,\sigma(r)\,\sigma(-r)$:

$$\mathrm ds^+ = -\tfrac1{\tau^+},\quad
  \mathrm d\tau^+ = \tfrac{s^+}{\tau^{+2}} + \beta\bigl(\tfrac d{2\tau^+} - \tfrac1{\tau^{+2}}\bigr),\qquad
  \mathrm ds_j = \tfrac1{k\tau_j},\quad
  \mathrm d\tau_j = -\tfrac{s_j}{k\tau_j^2} - \beta\bigl(\tfrac1{\tau_j} - \tfrac1{\tau_j^2}\bigr) .$$

Similarities $S = ZZ^\top$ and $R = QQ^\top$ of a head exist for a chunk of anchors at a time; the op turns the chunk
into losses and the two gradient matrices, and $\mathrm dZ_{\text{chunk}} \mathrel{+}= \mathrm dS\,Z$,
$\mathrm dZ \mathrel{+}= \mathrm dS^\top Z_{\text{chunk}}$ (likewise Q) follow by products at once, so that nothing
but the gradients of Z and Q, (2B, d) a head, is kept for backward.

Source: Wang, Koniusz, Gedeon, Zheng, "Adaptive Multi-head Contrastive Learning", 2024, with the top-k negatives of
its public code; the gradient by differentiating the formula.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import _check
from .._autograd import differentiable_vjp
from .._registry import accumulate_type, reference
from .._route import use_reference, without_autocast
from ..norm import l2_normalize

_op = torch.ops.solera

CHUNK = 1 << 22  # pairs of a head whose similarities exist at a time


# ---- reference ---------------------------------------------------------------------------------------


def _row_losses(s, g, negative, positive, tau_min, tau_max, beta, width):
    acc = accumulate_type(s)
    columns = torch.cat([positive[:, None], negative], 1)
    s, r = s.gather(1, columns).to(acc), g.gather(1, columns).to(acc)
    tau = tau_min + (tau_max - tau_min) * torch.sigmoid(-r)
    ratio = s / tau
    near = -ratio[:, 0] + beta * (0.5 * width * tau[:, 0].log() + 1 / tau[:, 0])
    far = tau[:, 1:]
    return near + ratio[:, 1:].mean(1) - beta * (far.log() + 1 / far).sum(1)


@reference("pair_losses")
def pair_losses_reference(s, g, negative, positive, tau_min, tau_max, beta, width, need_grad):
    """(losses (R,), ds, dg), the gradients written out by the formulas above."""
    losses = _row_losses(s, g, negative, positive, tau_min, tau_max, beta, width)
    if not need_grad:
        return losses, s.new_empty(0), s.new_empty(0)
    columns = torch.cat([positive[:, None], negative], 1)
    a, r = s.gather(1, columns).to(losses.dtype), g.gather(1, columns).to(losses.dtype)
    spread = tau_max - tau_min
    tau = tau_min + spread * torch.sigmoid(-r)
    share = torch.full_like(tau, 1.0 / negative.shape[1])
    share[:, 0] = -1.0
    weight = torch.full_like(tau, -beta)
    weight[:, 0] = beta
    half = torch.ones_like(tau)
    half[:, 0] = 0.5 * width
    da = share / tau
    dtau = -share * a / tau.square() + weight * (half / tau - 1 / tau.square())
    dr = -dtau * spread * torch.sigmoid(r) * torch.sigmoid(-r)
    ds = torch.zeros_like(s).scatter(1, columns, da.to(s.dtype))
    return losses, ds, torch.zeros_like(g).scatter(1, columns, dr.to(g.dtype))


def _chunks(z: Tensor, whole: bool) -> list[tuple[int, int]]:
    rows = z.shape[0]
    step = rows if whole else max(1, min(rows, CHUNK // max(rows, 1)))
    return [(first, min(first + step, rows)) for first in range(0, rows, step)]


def _similarities(z: Tensor, first: int, last: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """A chunk of anchors against every sample: similarities, negatives' columns, positives' columns."""
    rows = z.shape[0]
    anchor = torch.arange(first, last, device=z.device)
    positive = (anchor + rows // 2) % rows
    s = z[first:last] @ z.mT
    own = torch.stack([anchor, positive], 1)
    others = s.detach().scatter(1, own, float("-inf"))
    return s, others.topk(k, dim=1).indices, positive


def head_loss_reference(z, q, k, options, whole=True):
    """The mean loss of one head's 2B anchors, differentiable in z and q."""
    total = z.new_zeros(())
    for first, last in _chunks(z, whole):
        s, negative, positive = _similarities(z, first, last, k)
        g = q[first:last] @ q.mT
        tau_min, tau_max, beta = options
        losses = _row_losses(s, g, negative, positive, tau_min, tau_max, beta, z.shape[1])
        total = total + losses.sum()
    return total / z.shape[0]


# ---- autograd ----------------------------------------------------------------------------------------


@reference("pair_head_loss")
def _head_loss(z, q, k, tau_min, tau_max, beta, need_grad):
    """The sum of one head's losses and its gradients, a chunk of anchors at a time."""
    total = z.new_zeros(())
    dz, dq = (t.new_zeros(t.shape if need_grad else (0,)) for t in (z, q))
    for first, last in _chunks(z, False):
        s, negative, positive = _similarities(z, first, last, k)
        g = q[first:last] @ q.mT
        losses, ds, dg = _op.pair_losses(
            s, g, negative, positive, tau_min, tau_max, beta, z.shape[1], need_grad
        )
        total += losses.sum()
        if need_grad:
            for d, grad, t in ((dz, ds, z), (dq, dg, q)):
                d[first:last].addmm_(grad, t)
                d.addmm_(grad.mT, t[first:last])
    return total, dz, dq


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, q, k, options):
        need = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        total, dz, dq = _op.pair_head_loss(z, q, k, *options, need)
        ctx.options = (k, options)
        ctx.save_for_backward(z, q, dz, dq)
        return total / z.shape[0]

    @staticmethod
    def backward(ctx, grad):
        z, q, dz, dq = ctx.saved_tensors
        k, options = ctx.options
        needs = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled():
            loss = lambda z, q: head_loss_reference(z, q, k, options, False)
            return (*differentiable_vjp(loss, (z, q), needs, (grad,)), None, None)
        scale = grad / z.shape[0]
        return dz * scale if needs[0] else None, dq * scale if needs[1] else None, None, None


# ---- public function ---------------------------------------------------------------------------------


def multi_head_contrastive_loss(
    z1: Tensor,
    z2: Tensor,
    phi: Callable[[Tensor], Tensor],
    *,
    tau_min: float = 1e-5,
    tau_max: float = 2.0,
    beta: float = 0.01,
    top_k: int = 100,
) -> Tensor:
    r"""Adaptive multi-head contrastive loss of two views: a temperature for every pair, a sum over heads.

    Per head, with z of unit length and $\tau(u, v) = \tau_{\min} + (\tau_{\max} - \tau_{\min})\,
    \sigma(-\langle\varphi(u), \varphi(v)\rangle)$, the mean over the 2B anchors of
    $-s^+/\tau^+ + \frac1k\sum_j s_j/\tau_j + \beta(\frac d2\log\tau^+ + 1/\tau^+) - \beta\sum_j(\log\tau_j +
    1/\tau_j)$; the negatives j are the k most similar of the anchor's 2B - 2.

    Args:
        z1, z2: (B, H, d), the heads' outputs for two views of B samples, B at least 2; computed in float32 (float64
            for float64).
        phi: a callable (n, d) -> (n, e), shared by the heads; its parameters have gradients.
        tau_min, tau_max: positive, rising. beta: not negative.
        top_k: negatives kept, at most 2B - 2 of them exist.

    Shapes: (B, H, d) twice -> (). Differentiable in z1, z2 and phi. Pairs are taken a chunk of anchors of one head at
    a time; what is kept for backward is of z's size.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Wang, Koniusz, Gedeon, Zheng, "Adaptive Multi-head Contrastive Learning", 2024; checked against its public
    code.
    """
    _check.tensor("z1", z1, dim=3)
    _check.like("z2", z2, tuple(z1.shape), z1, "z1")
    if z1.shape[0] < 2 or z1.shape[1] < 1:
        raise ValueError(f"z1: expected at least 2 samples and 1 head, got shape {tuple(z1.shape)}")
    if not callable(phi):
        raise TypeError(f"phi: expected a callable, got {_check._came(phi)}")
    if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1:
        raise ValueError(f"top_k: expected a positive int, got {top_k!r}")
    tau_min = _check.number("tau_min", tau_min, low=0.0)
    tau_max = _check.number("tau_max", tau_max, low=0.0)
    if not 0.0 < tau_min < tau_max:
        raise ValueError(f"tau_min: expected 0 < tau_min < tau_max, got {tau_min} and {tau_max}")
    options = (tau_min, tau_max, _check.number("beta", beta, low=0.0))
    k = min(top_k, 2 * z1.shape[0] - 2)
    total = None
    with without_autocast(z1):
        both = torch.cat([z1, z2]).to(accumulate_type(z1))
        z = l2_normalize(both.transpose(0, 1).contiguous())  # (H, 2B, d)
        for head in z.unbind(0):
            q = phi(head)
            _check.like("phi's output", q, (head.shape[0], q.shape[-1]), head, "z")
            q = q.to(head.dtype)
            if use_reference():
                loss = head_loss_reference(head, q, k, options)
            else:
                loss = _HeadLoss.apply(head, q, k, options)
            total = loss if total is None else total + loss
    assert total is not None
    return total
