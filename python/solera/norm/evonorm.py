r"""Core `evonorm`: normalisation and activation as one function, in two forms, on the moments of `channel_norm`.

With per-(n, c) coefficients made from the moments and parameters by a small differentiable function,

$$\text{S:}\; u = x\,\sigma(a x),\qquad \text{B:}\; u = x/D,\; D = \max(l, z),\; z = a x + o,\qquad
  y = u\,s + t .$$

S0 takes $a = v$, $s = \gamma/\mathrm{std}_{\text{group}}$. The B forms take $l = \mathrm{std}_{\text{batch}}$,
$s = \gamma$ and $(a, o)$ = B0: $(v, \mathrm{std}_{hw})$, B1: $(r, r)$, B2: $(-1, r)$ with
$r = \mathrm{rms}_{hw}$; always $t = \beta$.

Backward, with $g = \mathrm{d}y$ and $w = g s$, is one reduction over positions and one elementwise pass:
$\mathrm{d}t = \sum g$, $\mathrm{d}s = \sum g u$ and

* S, with $\sigma = \sigma(a x)$: $\mathrm{d}a = \sum w x^2 \sigma (1-\sigma)$, direct part of
  $\mathrm{d}x = w\,\sigma\,(1 + a x (1-\sigma))$;
* B, with $e = -w u / D$ (what flows into D) and $e_z = e\,[z > l]$ (half of e at a tie, as torch's maximum has it):
  $\mathrm{d}l = \sum (e - e_z)$, $\mathrm{d}o = \sum e_z$, $\mathrm{d}a = \sum e_z x$, direct part of
  $\mathrm{d}x = w / D + a\,e_z$.

Autograd takes these through the coefficients to the parameters and to the moments $(\mathrm{d}\mu,
\mathrm{d}\sigma^2)$, which add $p\,(x - \mu) + q$ to dx, with $p = 2\,\mathrm{d}\sigma^2/M$, $q = \mathrm{d}\mu/M$.

Saved for backward: x, the moments and the parameters.

Source: Liu, Brock, Simonyan, Le, "Evolving Normalization-Activation Layers", 2020.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from .. import _check
from .._autograd import differentiable_vjp
from .._registry import accumulate_type, reference
from .._route import needs_graph, use_reference
from ._statistics import group_count, pooled, to_channels
from .batch_norm import merged, update_running
from .channel_norm import Layout, channel_moments_reference

_op = torch.ops.solera

# (mean, var, *parameters) -> (shift, scale, slope) for S, (shift, scale, slope, left, offset) for B: each
# broadcasts to (N, C).
Coefficients = Callable[..., tuple[Tensor, ...]]


# ---- reference ---------------------------------------------------------------------------------------


def evonorm_reference(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    slope: Tensor,
    left: Tensor | None,
    offset: Tensor | None,
) -> Tensor:
    """u scale + shift for x (A, M, K) and coefficients (A, K); S where left is None."""
    v = x.to(scale.dtype)
    z = v * slope[:, None]
    if left is None or offset is None:
        u = v * torch.sigmoid(z)
    else:
        u = v / torch.maximum(left[:, None], z + offset[:, None])
    return (u * scale[:, None] + shift[:, None]).to(x.dtype)


@reference("evonorm")
def _evonorm(x, shift, scale, slope, left, offset):
    return evonorm_reference(x, shift, scale, slope, left, offset).contiguous()


def _flow(dy, x, scale, slope, left, offset):
    """(g, u, slope's share, what flows into D, its part through z, direct part of dx), each (A, M, K)."""
    g, v = dy.to(scale.dtype), x.to(scale.dtype)
    z = v * slope[:, None]
    w = g * scale[:, None]
    if left is None:
        s = torch.sigmoid(z)
        return g, v * s, w * v * v * s * (1 - s), None, None, w * s * (1 + z * (1 - s))
    z, low = z + offset[:, None], left[:, None]
    bottom = torch.maximum(low, z)
    u = v / bottom
    e = -w * u / bottom
    through = torch.where(z > low, e, torch.where(z == low, 0.5 * e, 0.0))
    return g, u, through * v, e, through, w / bottom + slope[:, None] * through


@reference("evonorm_reduce")
def _evonorm_reduce(dy, x, scale, slope, left, offset):
    g, u, of_slope, e, through, _ = _flow(dy, x, scale, slope, left, offset)
    sums = [g, g * u, of_slope]
    if left is not None:
        sums += [e - through, through]
    return torch.stack([t.sum(1) for t in sums])


@reference("evonorm_gradient")
def _evonorm_gradient(dy, x, scale, slope, left, offset, mean, p, q):
    direct = _flow(dy, x, scale, slope, left, offset)[-1]
    d = x.to(scale.dtype) - mean[:, None]
    return (direct + p[:, None] * d + q[:, None]).to(x.dtype).contiguous()


# ---- coefficients ------------------------------------------------------------------------------------


def _gamma(weight: Tensor | None, scale: Tensor) -> Tensor:
    return scale if weight is None else weight * scale


def _beta(bias: Tensor | None, mean: Tensor) -> Tensor:
    return mean.new_zeros(()) if bias is None else bias


def _s0(mean, var, weight, bias, v, *, groups, eps):
    if mean.shape[1] != groups:
        mean, var = pooled(mean, var, groups)
    rstd = torch.rsqrt(var + eps)
    return _beta(bias, mean), _gamma(weight, to_channels(rstd, v.shape[0])), v


def _b(mean, var, weight, bias, v, running_var, *, kind, eps):
    batch = merged(mean, var)[1] if running_var is None else running_var
    left, one = torch.sqrt(batch + eps), mean.new_ones(())
    if kind == "b0":
        slope, offset = v, torch.sqrt(var + eps)
    else:
        offset = torch.sqrt(var + mean.square() + eps)
        slope = offset if kind == "b1" else -one
    return _beta(bias, mean), _gamma(weight, one), slope, left, offset


# ---- autograd ----------------------------------------------------------------------------------------


def _coefficients(combine, layout, acc, mean, var, params):
    params = [p.to(acc) if p is not None else None for p in params]
    out = [layout.spread(t) for t in combine(mean, var, *params)]
    return tuple(out)


def _of_op(coefficients):
    """(scale, slope, left, offset), the last two None for S."""
    return (*coefficients[1:], None, None)[:4]


def _moments(layout, flat, groups, take):
    """(mean, var): (N, groups) where a group is one stretch of memory, else (N, C).

    Taken directly, a group's variance keeps its digits under a large mean; merged from its channels' it
    loses those that the channels' means were rounded off.
    """
    n, c = layout.shape[:2]
    if groups is None or groups == c or layout.last:
        return tuple(map(layout.per_set, take(flat, None)))
    wide = flat.view(n * groups, flat.shape[1] * (c // groups), 1)
    return tuple(t.view(n, groups) for t in take(wide, None))


def _per_set(layout, t):
    """Moments (or their gradients) as `_moments` gives them -> (A, K)."""
    channels = layout.shape[1]
    return layout.spread(t if t.shape[1] == channels else to_channels(t, channels))


def _norm_reference(x, combine, groups, *params):
    """(y, mean, var) in plain torch; everything differentiable."""
    layout, acc = Layout(x, False), accumulate_type(x)
    flat = layout.flat(x)
    mean, var = _moments(layout, flat, groups, channel_moments_reference)
    shift, *others = _coefficients(combine, layout, acc, mean, var, params)
    y = evonorm_reference(flat, shift, *_of_op((shift, *others)))  # type: ignore[arg-type]
    return layout.back(y), mean, var


def _forward(x, combine, groups, *params):
    layout, acc = Layout(x, False), accumulate_type(x)
    flat = layout.flat(x)
    mean, var = _moments(layout, flat, groups, _op.channel_moments)
    coefficients = _coefficients(combine, layout, acc, mean, var, params)
    y = _op.evonorm(flat, coefficients[0], *_of_op(coefficients))
    return layout.back(y), mean, var


class _EvoNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, combine, groups, *params):
        y, mean, var = _forward(x, combine, groups, *params)
        ctx.combine, ctx.groups = combine, groups
        ctx.save_for_backward(x, mean, var, *params)
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)
        return y, mean, var

    @staticmethod
    def backward(ctx, dy, dmean=None, dvar=None):
        x, mean, var, *params = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if dy is None:
            return (None,) * len(needs)
        if torch.is_grad_enabled():

            def norm(x, *params):
                return _norm_reference(x, ctx.combine, ctx.groups, *params)[0]

            grads = differentiable_vjp(norm, (x, *params), (needs[0], *needs[3:]), (dy,))
            return grads[0], None, None, *grads[1:]
        layout, acc = Layout(x, False), accumulate_type(x)
        flat, flat_dy = layout.flat(x), layout.flat(dy)
        wanted = [i for i, p in enumerate(params) if needs[3 + i]]

        def coefficients_of(*values):
            every = list(params)
            for i, value in zip(wanted, values[2:]):
                every[i] = value
            return _coefficients(ctx.combine, layout, acc, values[0], values[1], every)

        inputs = [mean, var, *(params[i] for i in wanted)]
        if is_dynamo_compiling():
            coefficients, vjp = torch.func.vjp(coefficients_of, *inputs)  # type: ignore[misc]
            sums = _op.evonorm_reduce(flat_dy, flat, *_of_op(coefficients))
            grads = list(vjp(tuple(sums.unbind())))
        else:
            leaves = [t.detach().requires_grad_() for t in inputs]
            with torch.enable_grad():
                traced = coefficients_of(*leaves)
            coefficients = tuple(t.detach() for t in traced)
            sums = _op.evonorm_reduce(flat_dy, flat, *_of_op(coefficients))
            pairs = [(t, s) for t, s in zip(traced, sums.unbind()) if t.requires_grad]
            flowing = [t for t, _ in pairs], leaves, [s for _, s in pairs]
            grads = list(torch.autograd.grad(*flowing, allow_unused=True))
        dx = None
        if needs[0]:
            # A moment's values: those of a set, times the sets that share it.
            sets = layout.shape[1] // mean.shape[1]
            count = layout.view[1] * sets
            zero = torch.zeros_like(coefficients[1])
            of_mean, of_var = (zero if g is None else _per_set(layout, g) for g in grads[:2])
            data = (flat_dy, flat, *_of_op(coefficients), _per_set(layout, mean))
            dx = layout.back(_op.evonorm_gradient(*data, of_var * (2.0 / count), of_mean / count))
        of_params: list[Tensor | None] = [None] * len(params)
        for i, grad in zip(wanted, grads[2:]):
            of_params[i] = grad
        return dx, None, None, *of_params


# ---- public functions --------------------------------------------------------------------------------


def _checked(x, weight, bias, v):
    _check.tensor("x", x, min_dim=2)
    channels = x.shape[1:2]
    for name, value in (("weight", weight), ("bias", bias), ("v", v)):
        if value is not None:
            _check.like(name, value, channels, x)


def _apply(x, combine, groups, *params):
    if x.numel() == 0:
        # Nothing to normalise; the parameters' gradients are 0.
        y, shape = x.clone(), (1, x.shape[1], *[1] * (x.dim() - 2))
        for t in params[:3]:
            y = y if t is None else y + t.to(x.dtype).view(shape)
        return y, None, None
    if use_reference():
        return _norm_reference(x, combine, groups, *params)
    if needs_graph(x, *params):
        return _EvoNorm.apply(x, combine, groups, *params)
    return _forward(x, combine, groups, *params)


def evonorm_s0(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    v: Tensor,
    *,
    groups: int = 32,
    eps: float = 1e-5,
) -> Tensor:
    r"""EvoNorm-S0: $y = \gamma\, x\,\sigma(v x)\,/\sqrt{s^2_{h,w,c/G} + \varepsilon} + \beta$, per sample.

    $s^2$ is the biased variance of each sample's group of channels (as in group normalisation).

    Args:
        x: (N, C, *), contiguous or channels-last (kept); float32, float64, bfloat16 or float16.
        weight, bias, v: (C,): gamma (None: 1), beta (None: 0) and the sigmoid's factor.
        groups: G, a divisor of C.
        eps: added to the variance; not negative.

    Shape: x (N, C, *) -> y (N, C, *).

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Liu, Brock, Simonyan, Le, "Evolving Normalization-Activation Layers", 2020. Agrees with timm's
    EvoNorm2dS0, which rounds the standard deviation to x's dtype where this keeps it in float32.
    """
    _checked(x, weight, bias, v)
    if v is None:
        raise TypeError("v: expected a torch.Tensor, got None")
    groups = group_count("groups", groups, x.shape[1])
    combine = partial(_s0, groups=groups, eps=_check.number("eps", eps, low=0.0))
    return _apply(x, combine, groups, weight, bias, v)[0]


def _batch_form(kind, x, weight, bias, v, running_var, training, momentum, eps):
    _checked(x, weight, bias, v)
    eps = _check.number("eps", eps, low=0.0)
    momentum = _check.number("momentum", momentum, low=0.0, high=1.0)
    if running_var is not None:
        _check.like("running_var", running_var, x.shape[1:2], x)
    elif not training:
        raise ValueError("running_var: expected a torch.Tensor when training is False, got None")
    combine = partial(_b, kind=kind, eps=eps)
    y, mean, var = _apply(x, combine, None, weight, bias, v, None if training else running_var)
    if training and running_var is not None and x.numel() > 0:
        with torch.no_grad():
            count = x.numel() // x.shape[1]
            unbiased = merged(mean, var)[1][0] * (count / max(count - 1, 1))
            update_running(running_var, unbiased, momentum)
    return y


def evonorm_b0(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    v: Tensor,
    running_var: Tensor | None = None,
    *,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    r"""EvoNorm-B0: $y = \gamma\, x/D + \beta$, D the larger of two deviations.

    $D = \max\bigl(\sqrt{s^2_{n,h,w}+\varepsilon},\; v x + \sqrt{s^2_{h,w}+\varepsilon}\bigr)$.

    $s^2_{n,h,w}$ is the batch's biased variance per channel when training and `running_var` otherwise;
    $s^2_{h,w}$ is each sample's own. The running variance follows timm and `torch.nn.BatchNorm2d`:
    running <- (1 - momentum) running + momentum n/(n-1) s^2, unbiased, while the normalisation is biased
    (timm divides by zero for n = 1; here the factor is 1 then). It is kept in its own dtype and read in
    float32; timm rounds it to x's.

    Args:
        x: (N, C, *), contiguous or channels-last (kept); float32, float64, bfloat16 or float16.
        weight, bias, v: (C,): gamma (None: 1), beta (None: 0) and the factor of x.
        running_var: (C,), updated in place when training; needed otherwise.
        training: take the batch's variance, through which gradients flow.
        momentum: of the running variance, in [0, 1].
        eps: added to the variances; timm's module uses 1e-3 for this form.

    Shape: x (N, C, *) -> y (N, C, *).

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Liu, Brock, Simonyan, Le, "Evolving Normalization-Activation Layers", 2020.
    """
    if v is None:
        raise TypeError("v: expected a torch.Tensor, got None")
    return _batch_form("b0", x, weight, bias, v, running_var, training, momentum, eps)


def evonorm_b1(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_var: Tensor | None = None,
    *,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    r"""EvoNorm-B1: $y = \gamma\, x/D + \beta$, D the larger of two deviations.

    $D = \max\bigl(\sqrt{s^2_{n,h,w}+\varepsilon},\; (x + 1)\sqrt{\overline{x^2}_{h,w}+\varepsilon}\bigr)$.

    Arguments, running variance and errors as in `evonorm_b0`, without v.

    Shape: x (N, C, *) -> y (N, C, *).

    Source: Liu, Brock, Simonyan, Le, "Evolving Normalization-Activation Layers", 2020.
    """
    return _batch_form("b1", x, weight, bias, None, running_var, training, momentum, eps)


def evonorm_b2(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_var: Tensor | None = None,
    *,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    r"""EvoNorm-B2: $y = \gamma\, x/D + \beta$, D the larger of two deviations.

    $D = \max\bigl(\sqrt{s^2_{n,h,w}+\varepsilon},\; \sqrt{\overline{x^2}_{h,w}+\varepsilon} - x\bigr)$.

    Arguments, running variance and errors as in `evonorm_b0`, without v.

    Shape: x (N, C, *) -> y (N, C, *).

    Source: Liu, Brock, Simonyan, Le, "Evolving Normalization-Activation Layers", 2020.
    """
    return _batch_form("b2", x, weight, bias, None, running_var, training, momentum, eps)
