r"""Core `channel_norm`: moments, combine, affine. Every normalisation of the form $y = (x - c)\,s + t$ per channel.

x is seen as (A, M, K): statistics over M, one set for each of the A x K others. An image batch (N, C, H, W) is
(N C, H W, 1) when contiguous and (N, H W, C) when channels-last, so neither layout is copied. Then

1. one kernel takes the moments $\mu, \sigma^2$ (A, K), centred;
2. the variant, a small differentiable function of (A, K)-sized tensors, turns moments and parameters into
   centre, scale and shift: instance, group and batch normalisation, AdaIN and AdaLIN differ in nothing else;
3. one kernel applies $y = \mathrm{act}(z)$, $z = (x - c)\,s + t\,[+ \mathrm{residual}]$.

The centre is kept apart (and not folded into the shift), so a large mean costs no digits.

Backward, with $g = \mathrm{d}y\,\mathrm{act}'(z)$ and $d = x - c$, is one reduction and one elementwise pass:

$$\mathrm{d}t = \sum_M g,\quad \mathrm{d}s = \sum_M g\,d,\quad \mathrm{d}c = -s\,\mathrm{d}t,\qquad
  \mathrm{d}x = g\,s + p\,d + q,$$

where autograd takes (dc, ds, dt) through the variant to $(\mathrm{d}\mu, \mathrm{d}\sigma^2)$ and the parameters, and
$p = 2\,\mathrm{d}\sigma^2 / M$, $q = \mathrm{d}\mu / M + p\,(c - \mu)$.

Saved for backward: x (and the residual where an activation needs it), the moments and the parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from .._activation import activate, delta_of
from .._autograd import differentiable_vjp
from .._registry import accumulate_type, reference
from .._route import needs_graph, use_reference

_op = torch.ops.solera

# (mean, var, *parameters) -> (center, scale, shift): mean and var (N, C), or (N, S) over channels, in the
# accumulator's dtype; the parameters as given, floating ones in that dtype; each result broadcasts to (N, C).
Combine = Callable[..., tuple[Tensor, Tensor, Tensor]]
Options = tuple[int, bool, bool, bool]  # activation, channels, moments, batch


# ---- reference ---------------------------------------------------------------------------------------


def _inside(x: Tensor, lengths: Tensor) -> Tensor:
    """(A, M, 1): which positions are before the end of their row."""
    return torch.arange(x.shape[1], device=x.device)[:, None] < lengths[:, None, None]


def channel_moments_reference(x: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (A, K) over the middle of x (A, M, K), of its first `lengths` (A,) if given."""
    v = x.to(accumulate_type(x))
    if lengths is None:
        mean = v.mean(1)
        return mean, (v - mean[:, None]).square().mean(1)
    inside, count = _inside(x, lengths), lengths[:, None].to(v.dtype)
    mean = torch.where(inside, v, 0.0).sum(1) / count
    return mean, torch.where(inside, v - mean[:, None], 0.0).square().sum(1) / count


def _affine(x, center, scale, shift, residual):
    z = (x.to(center.dtype) - center[:, None]) * scale[:, None] + shift[:, None]
    return z if residual is None else z + residual.to(z.dtype)


def channel_affine_reference(
    x: Tensor,
    center: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    lengths: Tensor | None,
    activation: int,
) -> Tensor:
    """act((x - center) scale + shift + residual), 0 past a row's length."""
    y = activate(_affine(x, center, scale, shift, residual), activation)
    if lengths is not None:
        y = torch.where(_inside(x, lengths), y, 0.0)
    return y.to(x.dtype)


def _delta(dy, x, center, scale, shift, residual, lengths, activation):
    z = _affine(x, center, scale, shift, residual) if activation else None
    g = delta_of(dy, z, activation)
    return g if lengths is None else torch.where(_inside(x, lengths), g, 0.0)


@reference("channel_moments")
def _channel_moments(x, lengths):
    mean, var = channel_moments_reference(x, lengths)
    return mean.contiguous(), var.contiguous()


@reference("channel_affine")
def _channel_affine(x, center, scale, shift, residual, lengths, activation):
    y = channel_affine_reference(x, center, scale, shift, residual, lengths, activation)
    return y.contiguous()


@reference("channel_reduce")
def _channel_reduce(dy, x, center, scale, shift, residual, lengths, activation):
    g = _delta(dy, x, center, scale, shift, residual, lengths, activation)
    d = x.to(g.dtype) - center[:, None]
    if lengths is not None:
        d = torch.where(_inside(x, lengths), d, 0.0)
    return g.sum(1), (g * d).sum(1)


@reference("channel_gradient")
def _channel_gradient(
    dy, x, center, scale, shift, residual, lengths, activation, p, q, need_x, need_residual
):
    g = _delta(dy, x, center, scale, shift, residual, lengths, activation)
    dx, dresidual = x.new_empty(0), x.new_empty(0)
    if need_x:
        d = x.to(g.dtype) - center[:, None]
        dx = g * scale[:, None] + p[:, None] * d + q[:, None]
        if lengths is not None:
            dx = torch.where(_inside(x, lengths), dx, 0.0)
        dx = dx.to(x.dtype).contiguous()
    if need_residual:
        dresidual = g.to(x.dtype).clone(memory_format=torch.contiguous_format)
    return dx, dresidual


# ---- layouts -----------------------------------------------------------------------------------------


class Layout:
    """How an (N, C, *) tensor is read as (A, M, K), and its statistics (A, K) as (N, C) or (N, S).

    `channels`: statistics run over the channels of each position instead of the positions of each channel.
    `batch`: the samples are merged where the layout allows it, statistics are then (1, C).
    """

    def __init__(self, x: Tensor, channels: bool, batch: bool = False):
        self.shape, self.channels = x.shape, channels
        self.last = x.dim() > 2 and not x.is_contiguous() and x.movedim(1, -1).is_contiguous()
        n, c = x.shape[:2]
        size = 1
        for extent in x.shape[2:]:
            size = size * extent
        self.stats = (n, size) if channels else (n, c)
        if self.last:
            self.view = (n * size, c, 1) if channels else (n, size, c)
        else:
            self.view = (n, c, size) if channels else (n * c, size, 1)
        if batch and (self.last or size == 1):
            self.stats, self.view = (1, c), (1, n * size, c)

    def flat(self, t: Any) -> Any:
        """(N, C, *) -> (A, M, K): a view where t has x's layout, a copy otherwise."""
        if t is None:
            return None
        return (t.movedim(1, -1) if self.last else t).reshape(self.view).contiguous()

    def back(self, t: Tensor) -> Tensor:
        if self.last:
            return t.view(self.shape[0], *self.shape[2:], self.shape[1]).movedim(-1, 1)
        return t.view(self.shape)

    def per_set(self, t: Tensor) -> Tensor:
        """Statistics (A, K) -> (N, C), or (N, S) over channels."""
        return t.view(self.stats)

    def spread(self, t: Tensor) -> Tensor:
        """What broadcasts to (N, C) -> (A, K), contiguous."""
        return t.expand(self.stats).reshape(self.view[0], self.view[2]).contiguous()

    def rows(self, lengths: Tensor | None) -> Tensor | None:
        """(N,) -> (A,)."""
        if lengths is None or self.view[0] == self.shape[0]:
            return lengths
        return lengths.repeat_interleave(self.view[0] // self.shape[0], output_size=self.view[0])


def _combined(combine, layout, acc, mean, var, params):
    """(center, scale, shift), each (A, K)."""
    params = [p.to(acc) if p is not None and p.is_floating_point() else p for p in params]
    center, scale, shift = combine(mean, var, *params)
    return layout.spread(center), layout.spread(scale), layout.spread(shift)


def channel_norm_reference(
    x: Tensor,
    residual: Tensor | None,
    lengths: Tensor | None,
    combine: Combine,
    options: Options,
    *params: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean, var) in plain torch; everything differentiable."""
    activation, channels, moments, batch = options
    layout, acc = Layout(x, channels, batch), accumulate_type(x)
    flat, rows = layout.flat(x), layout.rows(lengths)
    mean, var = flat.new_empty(0, dtype=acc), flat.new_empty(0, dtype=acc)
    if moments:
        mean, var = map(layout.per_set, channel_moments_reference(flat, rows))
    center, scale, shift = _combined(combine, layout, acc, mean, var, params)
    extra = layout.flat(residual)
    y = channel_affine_reference(flat, center, scale, shift, extra, rows, activation)
    return layout.back(y), mean, var


# ---- autograd ----------------------------------------------------------------------------------------


def _forward(x, residual, lengths, combine, options, *params):
    activation, channels, moments, batch = options
    layout, acc = Layout(x, channels, batch), accumulate_type(x)
    flat, rows = layout.flat(x), layout.rows(lengths)
    mean, var = flat.new_empty(0, dtype=acc), flat.new_empty(0, dtype=acc)
    if moments:
        mean, var = map(layout.per_set, _op.channel_moments(flat, rows))
    affine = _combined(combine, layout, acc, mean, var, params)
    y = _op.channel_affine(flat, *affine, layout.flat(residual), rows, activation)
    return layout.back(y), mean, var


class _ChannelNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, lengths, combine, options, *params):
        y, mean, var = _forward(x, residual, lengths, combine, options, *params)
        ctx.combine, ctx.options, ctx.has_residual = combine, options, residual is not None
        ctx.save_for_backward(x, residual if options[0] else None, lengths, mean, var, *params)
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)
        return y, mean, var

    @staticmethod
    def backward(ctx, dy, dmean=None, dvar=None):
        x, residual, lengths, mean, var, *params = ctx.saved_tensors
        combine, options = ctx.combine, ctx.options
        needs = ctx.needs_input_grad
        if dy is None:
            return (None,) * len(needs)
        if torch.is_grad_enabled():
            return _graph_backward(ctx, dy, x, residual, lengths, params)
        activation, channels, moments, batch = options
        layout, acc = Layout(x, channels, batch), accumulate_type(x)
        flat, rows, flat_dy = layout.flat(x), layout.rows(lengths), layout.flat(dy)
        flat_residual = layout.flat(residual)
        wanted = [i for i, p in enumerate(params) if needs[5 + i]]
        inner = [mean, var] if moments else []

        def affine(*values):
            every = list(params)
            for i, value in zip(wanted, values[len(inner) :]):
                every[i] = value
            first, second = values[:2] if inner else (mean, var)
            return _combined(combine, layout, acc, first, second, every)

        inputs = [*inner, *(params[i] for i in wanted)]
        if is_dynamo_compiling():
            (center, scale, shift), vjp = torch.func.vjp(affine, *inputs)  # type: ignore[misc]
        else:
            leaves = [t.detach().requires_grad_() for t in inputs]
            with torch.enable_grad():
                traced = affine(*leaves)
            center, scale, shift = (t.detach() for t in traced)
        data = (flat_dy, flat, center, scale, shift, flat_residual, rows, activation)
        grads = [None] * len(inputs)
        if inputs and (wanted or needs[0]):
            dshift, dscale = _op.channel_reduce(*data)
            cotangents = (-scale * dshift, dscale, dshift)
            if is_dynamo_compiling():
                grads = vjp(cotangents)
            else:
                grads = _pull(traced, leaves, cotangents)
        p = q = torch.zeros_like(center)
        if moments and needs[0]:
            count = flat.shape[1] if rows is None else rows[:, None].to(acc)
            of_mean, of_var = (0.0 if g is None else layout.spread(g) for g in grads[:2])
            p = 2.0 * of_var / count + torch.zeros_like(center)
            q = of_mean / count + p * (center - layout.spread(mean))
        dx = dresidual = None
        if needs[0] or needs[1]:
            dx, dresidual = _op.channel_gradient(*data, p, q, needs[0], needs[1])
            dx = layout.back(dx) if needs[0] else None
            dresidual = layout.back(dresidual) if needs[1] else None
        of_params = [None] * len(params)
        for i, grad in zip(wanted, grads[len(inner) :]):
            of_params[i] = grad
        return dx, dresidual, None, None, None, *of_params


def _pull(outputs, leaves, cotangents):
    pairs = [(o, c) for o, c in zip(outputs, cotangents) if o.requires_grad]
    if not pairs:
        return [None] * len(leaves)
    return torch.autograd.grad(
        [o for o, _ in pairs], leaves, [c for _, c in pairs], allow_unused=True
    )


def _graph_backward(ctx, dy, x, residual, lengths, params):
    """Backward that can be differentiated again: the reference's own."""
    needs = ctx.needs_input_grad
    if residual is None and ctx.has_residual:
        # Without an activation y is linear in the residual: its value does not matter.
        residual = torch.zeros_like(x).requires_grad_(needs[1])

    def norm(x, residual, *params):
        return channel_norm_reference(x, residual, lengths, ctx.combine, ctx.options, *params)[0]

    grads = differentiable_vjp(
        norm, (x, residual, *params), (needs[0], needs[1], *needs[5:]), (dy,)
    )
    return grads[0], grads[1], None, None, None, *grads[2:]


# ---- the engine --------------------------------------------------------------------------------------


def channel_norm(
    x: Tensor,
    combine: Combine,
    params: Sequence[Tensor | None] = (),
    *,
    activation: int = 0,
    residual: Tensor | None = None,
    lengths: Tensor | None = None,
    channels: bool = False,
    moments: bool = True,
    batch: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""act((x - c) s + t + residual) with (c, s, t) = combine(mean, var, *params); arguments are checked by the caller.

    Args:
        x: (N, C, *), contiguous or channels-last (kept); other strides are copied once.
        combine: the variant, differentiable; a function of a module or a `functools.partial` of one.
        params: the tensors combine takes after the moments; gradients reach those that require them.
        activation: a code of `solera._activation`.
        residual: like x, added before the activation.
        lengths: (N,) int64; positions past a sample's length (of x's one spatial dimension) count
            nowhere and come out as 0.
        channels: moments over the channels of each position, (N, S), instead of (N, C).
        moments: False leaves them out (mean and var are then empty).
        batch: combine merges the samples anyway, so moments may come merged: (1, C) where the layout
            makes that one row (channels-last, no positions), (N, C) elsewhere.

    Returns y and the moments, through which no gradient flows.
    """
    arguments: tuple[Any, ...] = (
        x,
        residual,
        lengths,
        combine,
        (activation, channels, moments, batch),
        *params,
    )
    if use_reference():
        y, mean, var = channel_norm_reference(*arguments)
        return y, mean.detach(), var.detach()
    if needs_graph(x, residual, *params):
        return _ChannelNorm.apply(*arguments)
    return _forward(*arguments)


class _Moments(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, lengths, channels):
        layout = Layout(x, channels)
        mean, var = _op.channel_moments(layout.flat(x), layout.rows(lengths))
        mean, var = layout.per_set(mean), layout.per_set(var)
        ctx.channels = channels
        ctx.save_for_backward(x, lengths, mean)
        return mean, var

    @staticmethod
    def backward(ctx, dmean, dvar):
        x, lengths, mean = ctx.saved_tensors
        if torch.is_grad_enabled():

            def moments_of(x):
                return moments_reference(x, lengths, ctx.channels)

            return *differentiable_vjp(moments_of, (x,), (True,), (dmean, dvar)), None, None
        layout = Layout(x, ctx.channels)
        flat, rows = layout.flat(x), layout.rows(lengths)
        count = flat.shape[1] if rows is None else rows[:, None].to(mean.dtype)
        center = layout.spread(mean)
        scale, q = layout.spread(dvar) * (2.0 / count), layout.spread(dmean) / count
        return layout.back(_op.channel_affine(flat, center, scale, q, None, rows, 0)), None, None


def moments_reference(x: Tensor, lengths: Tensor | None, channels: bool) -> tuple[Tensor, Tensor]:
    """(mean, var) as `moments`, in plain torch."""
    layout = Layout(x, channels)
    mean, var = channel_moments_reference(layout.flat(x), layout.rows(lengths))
    return layout.per_set(mean), layout.per_set(var)


def moments(
    x: Tensor, *, lengths: Tensor | None = None, channels: bool = False
) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of x (N, C, *): (N, C) each, or (N, S) over channels; differentiable."""
    if use_reference():
        return moments_reference(x, lengths, channels)
    return _Moments.apply(x, lengths, channels)
