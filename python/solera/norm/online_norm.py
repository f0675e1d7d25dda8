r"""Core `online_norm`: normalisation by statistics that run along the samples, no batch.

Forward, sample by sample, per channel, with $\mu_n, \sigma_n^2$ the sample's own moments over its positions:

$$y_n = (x_n - m_n) / s_n,\quad s_n = \sqrt{v_n + \varepsilon},\quad d_n = \mu_n - m_n,$$
$$m_{n+1} = m_n + (1 - \alpha_f)\,d_n,\qquad
  v_{n+1} = \alpha_f v_n + (1 - \alpha_f)\,\sigma_n^2 + \alpha_f (1 - \alpha_f)\,d_n^2.$$

Backward is not the derivative of that but the paper's control process, with $g$ the gradient of y and
$k = 1 - \alpha_b$:

$$g'_n = g_n - k w_n y_n,\quad \mathrm{d}x_n = g'_n / s_n - k u_n,\quad
  w_{n+1} = w_n + E[g'_n y_n],\quad u_{n+1} = u_n + E[\mathrm{d}x_n].$$

Neither loop has to run over the tensor. Taking means over the positions,

$$w_{n+1} = w_n (1 - k E[y_n^2]) + E[g_n y_n],\qquad
  u_{n+1} = \alpha_b u_n + (E[g_n] - k w_n E[y_n]) / s_n,$$

so the state needs only the per-(n, c) means of g, g y, y and y^2, and a linear scan of (N, C) numbers; the last
two means are known from forward's moments. What touches x is `channel_norm`'s: its moments and its affine pass
forward, its reduction and its elementwise pass backward. A sample needs the state of those before it and
nothing else, so op `online_norm` reads x once each way: a row's passes follow one another while it is in cache.

Behind the normalisation, $z = y\,\mathrm{weight} + \mathrm{bias}$ and, with layer scaling,
$\mathrm{out} = z\,r_n$, $r_n = (E_{c}[z_n^2] + \varepsilon_l)^{-1/2}$ over the whole sample. $E[z_n^2]$ comes
from the same means, so both join the affine pass, and with $q_n = E[g_n z_n]$ over the sample

$$\mathrm{d}z_n = r_n g_n - r_n^3 q_n z_n$$

joins the elementwise pass: every gradient is linear in (g, x - m).
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import _check
from .._registry import accumulate_type, reference
from .._route import needs_graph, use_reference
from . import channel_norm as _channels
from .channel_norm import Layout, channel_norm

_op: Any = torch.ops.solera


class OnlineNormState(NamedTuple):
    """What `online_norm` carries from sample to sample, one number a channel each.

    m, v: the running mean and variance, updated in place by forward; u, w: the accumulated errors that
    backward corrects (of the gradient's mean and of its product with y), updated in place by backward.

    Shapes: (C,) each, float32 (float64 to go with float64 input).
    """

    m: Tensor
    v: Tensor
    u: Tensor
    w: Tensor

    @classmethod
    def start(
        cls,
        channels: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> OnlineNormState:
        """m = u = w = 0, v = 1."""
        zeros = [torch.zeros(channels, dtype=dtype, device=device) for _ in range(3)]
        return cls(zeros[0], torch.ones(channels, dtype=dtype, device=device), zeros[1], zeros[2])


# ---- reference ---------------------------------------------------------------------------------------


@reference("online_scan")
def online_scan_reference(
    mean: Tensor, var: Tensor, m: Tensor, v: Tensor, alpha: float
) -> tuple[Tensor, Tensor]:
    """(N + 1, C) each: m_n and v_n before each of the N samples and after the last, summed in float64."""
    ms, vs = [m.double()], [v.double()]
    for mu, sigma in zip(mean.double().unbind(), var.double().unbind()):
        d = mu - ms[-1]
        ms.append(ms[-1] + (1 - alpha) * d)
        vs.append(alpha * vs[-1] + (1 - alpha) * sigma + alpha * (1 - alpha) * d * d)
    return torch.stack(ms).to(mean.dtype), torch.stack(vs).to(mean.dtype)


@reference("online_scan_backward")
def online_scan_backward_reference(
    g: Tensor,
    gy: Tensor,
    y: Tensor,
    yy: Tensor,
    rstd: Tensor,
    u: Tensor,
    w: Tensor,
    alpha: float,
) -> tuple[Tensor, Tensor]:
    """(N + 1, C) each: u_n and w_n before each sample and after the last, from the (N, C) means and 1 / s."""
    k = 1 - alpha
    us, ws = [u.double()], [w.double()]
    for row in zip(*(t.double().unbind() for t in (g, gy, y, yy, rstd))):
        e_g, e_gy, e_y, e_yy, r = row
        us.append(alpha * us[-1] + (e_g - k * ws[-1] * e_y) * r)
        ws.append(ws[-1] * (1 - k * e_yy) + e_gy)
    return torch.stack(us).to(g.dtype), torch.stack(ws).to(g.dtype)


class _Means:
    """1 / s, and E[y], E[y^2], E[z], E[z^2] of each sample and channel, all (N, C)."""

    def __init__(self, mean, var, center, variance, weight, bias, eps):
        self.rstd = (variance + eps).rsqrt()
        self.y = (mean - center) * self.rstd
        self.yy = var * self.rstd * self.rstd + self.y * self.y
        self.weight = torch.ones_like(center[0]) if weight is None else weight.to(center.dtype)
        self.bias = torch.zeros_like(center[0]) if bias is None else bias.to(center.dtype)

    def layer_scale(self, layer_eps):
        """r_n, (N, 1)."""
        zz = self.weight.square() * self.yy + 2 * self.weight * self.bias * self.y
        return ((zz + self.bias.square()).mean(1, keepdim=True) + layer_eps).rsqrt()


def _spread(t: Tensor, x: Tensor) -> Tensor:
    """(N, C) -> (A, K) of x (A, M, K)."""
    return t.expand(-1, t.shape[1]).reshape(x.shape[0], x.shape[2]).contiguous()


def forward_by_passes(ops, x, weight, bias, m, v, alpha, eps, layer_eps=None):
    """Op `online_norm` by the passes of `channel_norm` and a scan; layer scaling has no other form."""
    acc, c = accumulate_type(x), m.shape[0]
    moments = ops.channel_moments(x, None)
    mean, var = (t.view(-1, c) for t in moments)
    ms, vs = ops.online_scan(mean, var, m.to(acc), v.to(acc), alpha)
    center, variance = ms[:-1], vs[:-1]
    means = _Means(mean, var, center, variance, weight, bias, eps)
    scale, shift = means.rstd * means.weight, means.bias.expand_as(mean)
    if layer_eps is not None:
        r = means.layer_scale(layer_eps)
        scale, shift = scale * r, shift * r
    spread = [_spread(t, x) for t in (center, scale, shift)]
    return ops.channel_affine(x, *spread, None, None, 0), mean, var, ms, vs


def backward_by_passes(
    ops, dy, x, weight, bias, mean, var, ms, vs, u, w, alpha, eps, need_x, layer_eps=None
):
    """Op `online_norm_backward`, which takes no bias: it matters under layer scaling only."""
    center, k = ms[:-1], 1 - alpha
    means = _Means(mean, var, center, vs[:-1], weight, bias, eps)
    rstd, gamma, beta = means.rstd, means.weight, means.bias
    zero = torch.zeros_like(rstd)
    spread = [_spread(t, x) for t in (center, rstd, zero)]
    count = x.shape[1]
    sums = ops.channel_reduce(dy, x, *spread, None, None, 0)
    g, gd = (t.view(rstd.shape) / count for t in sums)
    # dz = a g + b y + c, per (n, c)
    a, b, c = torch.ones_like(rstd), None, None
    gy = gd * rstd
    if layer_eps is not None:
        r = means.layer_scale(layer_eps)
        q = (gamma * gy + beta * g).mean(1, keepdim=True)
        a, b, c = a * r, -(r**3) * q * gamma, -(r**3) * q * beta
        g, gy = a * g + b * means.y + c, a * gy + b * means.yy + c * means.y
    us, ws = ops.online_scan_backward(
        gamma * g, gamma * gy, means.y, means.yy, rstd, u.to(g.dtype), w.to(g.dtype), alpha
    )
    dx = x.new_empty(0)
    if need_x:
        scale = gamma * rstd
        p = -k * ws[:-1] * rstd * rstd
        shift = -k * us[:-1]
        if b is not None:
            p, shift = p + scale * b * rstd, shift + scale * c
        spread = [_spread(t, x) for t in (center, scale * a, zero)]
        dx, _ = ops.channel_gradient(
            dy, x, *spread, None, None, 0, _spread(p, x), _spread(shift, x), True, False
        )
    return dx, gy.sum(0) * count, g.sum(0) * count, us[-1].clone(), ws[-1].clone()


_plain: Any = SimpleNamespace(
    channel_moments=_channels._channel_moments,
    channel_affine=_channels._channel_affine,
    channel_reduce=_channels._channel_reduce,
    channel_gradient=_channels._channel_gradient,
    online_scan=online_scan_reference,
    online_scan_backward=online_scan_backward_reference,
)


@reference("online_norm")
def online_norm_reference(x, weight, bias, m, v, alpha, eps):
    """(y, moments and states): what the op `online_norm` computes, pass by pass."""
    return forward_by_passes(_plain, x, weight, bias, m, v, alpha, eps)


@reference("online_norm_backward")
def online_norm_backward_reference(dy, x, weight, mean, var, ms, vs, u, w, alpha, eps, need_x):
    """The gradients of the op `online_norm`, pass by pass."""
    return backward_by_passes(
        _plain, dy, x, weight, None, mean, var, ms, vs, u, w, alpha, eps, need_x
    )


# ---- autograd ----------------------------------------------------------------------------------------


def _run(x, weight, bias, m, v, options, plain):
    """(y, mean, var, ms, vs) of x (A, M, K)."""
    alpha, _, eps, layer_eps = options
    if layer_eps is not None:
        return forward_by_passes(
            _plain if plain else _op, x, weight, bias, m, v, alpha, eps, layer_eps
        )
    return (online_norm_reference if plain else _op.online_norm)(x, weight, bias, m, v, alpha, eps)


class _OnlineNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, m, v, u, w, options, plain):
        layout = Layout(x, False)
        y, mean, var, ms, vs = _run(layout.flat(x), weight, bias, m, v, options, plain)
        ctx.options, ctx.plain = options, plain
        ctx.state = (u, w)  # written by backward, which saved tensors may not be
        ctx.save_for_backward(x, weight, bias, mean, var, ms, vs)
        m_after, v_after = ms[-1].clone(), vs[-1].clone()
        ctx.mark_non_differentiable(m_after, v_after)
        ctx.set_materialize_grads(False)
        return layout.back(y), m_after, v_after

    @staticmethod
    def backward(ctx, dy, dm=None, dv=None):
        if dy is None:
            return (None,) * 9
        if torch.is_grad_enabled():
            raise RuntimeError(
                "online_norm: backward under create_graph=True is not supported: it is the paper's "
                "control process, which updates its state and is not the derivative of forward"
            )
        x, weight, bias, *kept = ctx.saved_tensors
        u, w = ctx.state
        _, alpha, eps, layer_eps = ctx.options
        needs, layout = ctx.needs_input_grad, Layout(x, False)
        data: tuple[Any, ...] = (layout.flat(dy), layout.flat(x), weight)
        rest: tuple[Any, ...] = (*kept, u, w, alpha, eps, needs[0])
        if layer_eps is not None:
            ops = _plain if ctx.plain else _op
            every: tuple[Any, ...] = (ops, *data, bias, *rest, layer_eps)
            found = backward_by_passes(*every)
        elif ctx.plain:
            found = online_norm_backward_reference(*data, *rest)
        else:
            found = _op.online_norm_backward(*data, *rest)
        dx, dweight, dbias, u_after, w_after = found
        u.copy_(u_after)
        w.copy_(w_after)
        return (
            layout.back(dx) if needs[0] else None,
            dweight.to(weight.dtype) if needs[1] else None,
            dbias.to(bias.dtype) if needs[2] else None,
            *(None,) * 6,
        )


# ---- public function ---------------------------------------------------------------------------------


def _at_rest(mean, var, m, v, weight, bias, *, eps, layer_eps):
    """Combine function of evaluation: fixed statistics, ordinary gradients."""
    rstd = (v + eps).rsqrt()
    scale = rstd if weight is None else rstd * weight
    shift = torch.zeros_like(m) if bias is None else bias
    if layer_eps is None:
        return m, scale, shift
    # E[z^2] = Var(z) + E[z]^2 with z = (x - m) scale + shift
    ez = (mean - m) * scale + shift
    r = ((var * scale.square() + ez.square()).mean(1, keepdim=True) + layer_eps).rsqrt()
    return m, scale * r, shift * r


class _Evaluation:
    """`_at_rest` with its numbers, comparable so that a compiled graph is found again."""

    def __init__(self, eps: float, layer_eps: float | None):
        self.eps, self.layer_eps = eps, layer_eps

    def __call__(self, mean, var, m, v, weight, bias):
        return _at_rest(mean, var, m, v, weight, bias, eps=self.eps, layer_eps=self.layer_eps)


def online_norm(
    x: Tensor,
    state: OnlineNormState,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    alpha_forward: float = 0.999,
    alpha_backward: float = 0.99,
    eps: float = 1e-5,
    training: bool = True,
    layer_scaling: bool = False,
    layer_scaling_eps: float = 1e-5,
    clamp: float | None = None,
) -> Tensor:
    r"""Online normalisation: each sample by the running mean and variance of those before it.

    $y_n = (x_n - m_n) / \sqrt{v_n + \varepsilon} \cdot \mathrm{weight} + \mathrm{bias}$, samples taken in order;
    the formulas of both directions are at the head of this file. **Stateful**: in training forward updates
    `state.m` and `state.v` in place, and backward updates `state.u` and `state.w` in place, once for each
    backward call. The gradient of x is the paper's control process, not the derivative of forward: it cannot
    be differentiated again, and `gradcheck` does not apply. In evaluation (`training=False`) the statistics are
    constants, nothing is updated and gradients are ordinary ones.

    Args:
        x: (N, C, *), contiguous or channels-last (kept).
        state: `OnlineNormState.start(C)`, or any object with (C,) tensors m, v, u, w.
        weight, bias: (C,).
        alpha_forward: in [0, 1], decay of the running statistics.
        alpha_backward: in [0, 1], decay of the accumulated errors.
        eps: added to the variance.
        layer_scaling: divide each sample, after the affine step, by $\sqrt{E[z^2] + \varepsilon_l}$ over all its
            channels and positions; differentiated as usual.
        layer_scaling_eps: $\varepsilon_l$.
        clamp: clamp the output to [-clamp, clamp] (the paper's other guard; 5 there). An elementwise pass of
            torch's own.

    Shapes: (N, C, *) -> the same. float32, float64, bfloat16, float16; half precision in float32.

    Raises:
        ValueError, TypeError: naming the argument.
        NotImplementedError: under torch.func transforms or forward-mode AD while training: neither can
            carry the state.
        RuntimeError: in backward under create_graph=True.

    Source: Chiley et al., "Online Normalization for Training Neural Networks", 2019.
    """
    _check.tensor("x", x, min_dim=2)
    _check_state(state, x)
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            _check.like(name, value, x.shape[1:2], x)
    alpha_forward = _check.number("alpha_forward", alpha_forward, low=0.0, high=1.0)
    alpha_backward = _check.number("alpha_backward", alpha_backward, low=0.0, high=1.0)
    eps = _check.number("eps", eps, low=0.0)
    layer_eps = None
    if layer_scaling:
        layer_eps = _check.number("layer_scaling_eps", layer_scaling_eps, low=0.0)
    if clamp is not None:
        clamp = _check.number("clamp", clamp, low=0.0)
    if not training:
        params = (state.m, state.v, weight, bias)
        combine = _Evaluation(eps, layer_eps)
        y = channel_norm(x, combine, params, moments=layer_scaling)[0]
    else:
        y = _training(x, state, weight, bias, (alpha_forward, alpha_backward, eps, layer_eps))
    return y if clamp is None else y.clamp(-clamp, clamp)


def _training(x, state, weight, bias, options):
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        raise NotImplementedError(
            "online_norm: torch.func transforms and forward-mode AD are not supported while training: "
            "forward and backward update the state; use autograd, or training=False"
        )
    if x.numel() == 0:
        return x.clone()
    m, v, u, w = state.m, state.v, state.u, state.w
    if needs_graph(x, weight, bias):
        y, m_after, v_after = _OnlineNorm.apply(
            x, weight, bias, m, v, u, w, options, use_reference()
        )
    else:
        layout = Layout(x, False)
        y, _, _, ms, vs = _run(layout.flat(x), weight, bias, m, v, options, use_reference())
        y, m_after, v_after = layout.back(y), ms[-1], vs[-1]
    with torch.no_grad():
        m.copy_(m_after)
        v.copy_(v_after)
    return y


def _check_state(state: object, x: Tensor) -> None:
    wanted = accumulate_type(x)
    for name in OnlineNormState._fields:
        if not hasattr(state, name):
            raise TypeError(
                f"state: expected an OnlineNormState (m, v, u, w), got {type(state).__name__}"
            )
        value = getattr(state, name)
        _check.like(f"state.{name}", value, x.shape[1:2], x)
        if value.dtype not in (wanted, torch.float64):
            raise TypeError(
                f"state.{name}: expected {wanted} to go with x of {x.dtype}, got {value.dtype}"
            )
        if value.requires_grad:
            raise ValueError(
                f"state.{name}: expected a tensor without requires_grad, which is updated in place"
            )
