r"""Core `moment_exchange`: every sample with the moments of another, $y_n = (x_n - m_n)\,s_d/s_n + m_d$, d = index[n].

x is seen as (N, R, M, K): moments over M, a set for each of the R x K others; of R and K one is 1, so that neither
layout is copied. $s = \sqrt{\rho\,\sigma^2 + \varepsilon}$ with the biased variance and $\rho$ its correction. With
$d_n = x_n - m_n$, $r_n = s_d / s_n$, $t_n = \sum_M \mathrm{d}y_n$ and $u_n = \sum_M \mathrm{d}y_n d_n$ the backward is

$$\mathrm{d}m_n = -r_n t_n + \sum_{k \to n} t_k,\quad
  \mathrm{d}s_n = -\frac{r_n}{s_n} u_n + \sum_{k \to n} \frac{u_k}{s_k},\qquad
  \mathrm{d}x_n = r_n\,\mathrm{d}y_n + \frac{\rho\,\mathrm{d}s_n}{s_n M}\,d_n + \frac{\mathrm{d}m_n}{M},$$

k running over the samples that were given n's moments. Saved for backward: x, index and the moments.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._autograd import differentiable_vjp
from .._registry import accumulate_type, reference
from .._route import needs_graph, use_reference
from .channel_norm import Layout

_op = torch.ops.solera

MOST = 16384  # elements of a set: the kernel sums a set at once, channel_norm's passes in slabs


# ---- reference ---------------------------------------------------------------------------------------


def exchange_reference(
    x: Tensor, index: Tensor, eps: float, ratio: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, m, s) of x (N, R, M, K) by the formula; m and s (N, R K)."""
    v = x.to(accumulate_type(x))
    mean = v.mean(2, keepdim=True)
    deviation = ((v - mean).square().mean(2, keepdim=True) * ratio + eps).sqrt()
    y = (v - mean) * (deviation[index] / deviation) + mean[index]
    return y.to(x.dtype), mean.flatten(1), deviation.flatten(1)


@reference("moment_exchange")
def _moment_exchange(x, index, eps, ratio):
    return tuple(t.contiguous() for t in exchange_reference(x, index, eps, ratio))


def received(own: Tensor, index: Tensor, given: Tensor) -> Tensor:
    """own (N, P) plus, for each donor, the rows of `given` that came by it; the same bits each time."""
    return own.index_put((index,), given, accumulate=True)


def cotangents(sum_g, sum_gd, index, deviation, ratio, count):
    """Coefficients (N, P) of dx = dy r + p d + q, from the sums of dy and dy d."""
    scale, share = deviation[index] / deviation, sum_gd / deviation
    of_mean = received(-scale * sum_g, index, sum_g)
    of_deviation = received(-scale * share, index, share)
    return scale, ratio * of_deviation / (deviation * count), of_mean / count


@reference("moment_exchange_backward")
def _moment_exchange_backward(dy, x, index, mean, deviation, ratio):
    n, r, m, k = x.shape
    g = dy.to(mean.dtype)
    d = x.to(mean.dtype) - mean.view(n, r, 1, k)
    sums = g.sum(2).flatten(1), (g * d).sum(2).flatten(1)
    scale, p, q = (
        t.view(n, r, 1, k) for t in cotangents(*sums, index, deviation, ratio, max(m, 1))
    )
    return (g * scale + (d * p + q)).to(x.dtype).contiguous()


# ---- autograd ----------------------------------------------------------------------------------------


def _seen(layout: Layout) -> tuple[int, int, int, int]:
    """(N, R, M, K) of channel_norm's (A, M, K)."""
    a, m, k = layout.view
    n = layout.shape[0]
    return (n, 1, m, k) if k != 1 or a == n else (n, layout.stats[1], m, 1)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, index, channels, eps, ratio):
        layout = Layout(x, channels)
        y, mean, deviation = _op.moment_exchange(
            layout.flat(x).view(_seen(layout)), index, eps, ratio
        )
        ctx.options = channels, eps, ratio
        ctx.save_for_backward(x, index, mean, deviation)
        return layout.back(y)

    @staticmethod
    def backward(ctx, dy):
        x, index, mean, deviation = ctx.saved_tensors
        channels, eps, ratio = ctx.options
        layout = Layout(x, channels)
        if torch.is_grad_enabled():

            def exchange(x):
                four = layout.flat(x).view(_seen(layout))
                return layout.back(exchange_reference(four, index, eps, ratio)[0])

            return *differentiable_vjp(exchange, (x,), (True,), (dy,)), None, None, None, None
        four = (layout.flat(t).view(_seen(layout)) for t in (dy, x))
        dx = _op.moment_exchange_backward(*four, index, mean, deviation, ratio)
        return layout.back(dx), None, None, None, None


def exchange_moments(x: Tensor, index: Tensor, channels: bool, eps: float, ratio: float) -> Tensor:
    """x (N, C, *) with each sample's moments of another; arguments are checked by the caller.

    Args:
        channels: moments over the channels of each position instead of the positions of each channel.
        ratio: from the biased variance to the one that counts.
    """
    if needs_graph(x) and not use_reference():
        return _Exchange.apply(x, index, channels, eps, ratio)
    layout = Layout(x, channels)
    four = layout.flat(x).view(_seen(layout))
    run = exchange_reference if use_reference() else _op.moment_exchange
    return layout.back(run(four, index, eps, ratio)[0])
