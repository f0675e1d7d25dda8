r"""Core `connections`: n residual streams, read by a layer and written back to (hyper-connections).

A token has n streams $H_k$ of D features. The **width** connection mixes them by coefficients $\alpha$ (n, n + 1) into
the layer's input and the streams that pass it by; the **depth** connection adds the layer's output $F$:

$$h_{in} = \sum_k \alpha_{k0} H_k,\qquad R_j = \sum_k \alpha_{k,1+j} H_k,\qquad \hat H_j = \beta_j F(h_{in}) + R_j .$$

Coefficients are fixed (kind 0), or come from the token. Hyper-connections (kind 1), with $N_k$ the norm of each stream,
$W$ the n + 1 columns of alpha's weight and the one of beta's,

$$(\alpha, \beta)_{kc} = A_{kc} + s_c \tanh(\langle N_k, W_c\rangle).$$

Manifold-constrained (kind 2), with $x$ the n D features of the token over their root mean square and
$t = a \odot (x\,\varphi) + b$ of n (n + 2) numbers: $\alpha_{k0} = \sigma(t_k)$, $\beta_k = 2\sigma(t_{n+k})$,
$\alpha_{k,1+j} = M_{jk}$, $M$ = Sinkhorn of $\exp(t_{2n+jn+k})$: columns, then rows divided by their sums, `iterations`
times.

What the kernels are given: the norm's weight $w$ and bias $b$ are folded into the projection,
$\langle N, W\rangle = \langle\bar H, w\odot W\rangle + \langle b, W\rangle$ with $\bar H$ normalised only, so that
`projection` is $(w\odot W)^\top$ and `constant` the rest; they keep $z = \langle\bar H, w\odot W\rangle$.

Backward, with $d_c$ the gradients of $(h_{in}, R_1, .., R_n)$: $\mathrm d\alpha_{kc} = \langle H_k, d_c\rangle$;
$e_{kc}$ the gradient of $z_{kc}$ by the chain of the activation; $r$ the reciprocal deviation, $P$ the projection:

$$\mathrm dH_k = \sum_c \alpha_{kc}\,d_c + r\bigl(\textstyle\sum_c e_{kc} P_c - \overline{\sum_c e_{kc}P_c}
  - \bar H_k\,\tfrac1D \sum_c e_{kc} z_{kc}\bigr),\qquad \mathrm dP_c = \sum_{\text{tokens},k} e_{kc}\bar H_k ,$$

where the mean of the projected gradient's product with $\bar H$ needs no pass of its own, since
$\langle P_c, \bar H_k\rangle = z_{kc}$. A step of Sinkhorn, $y = x/s$ with $s$ the sum, has
$\mathrm dx = (\mathrm dy - \langle \mathrm dy, y\rangle)/s$ and is undone by $x = y s$.

Between forward and backward nothing is kept but the inputs and the n (n + 2) numbers z a token. The merged form takes
the previous layer's depth connection in: $H = \beta' F' + R'$ is formed in cache and never stored.

Sources: Zhu et al., "Hyper-Connections", 2024 (Algorithm 2 and Eq. 1 to 5, from memory; checked against the PyPI
package hyper-connections 0.4.11); manifold-constrained: Xie et al., "mHC", 2025 (arXiv 2512.24880).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import _check
from .._autograd import differentiable_vjp
from .._registry import accumulate_type, reference
from .._route import autocast_enabled, needs_graph, use_reference
from ._connections import (
    FIXED,
    HYPER,
    MANIFOLD,
    coefficients_of,
    projected,
    streams_of,
    through_coefficients,
)

_op = torch.ops.solera
MOST_STREAMS = 16


# ---- reference ---------------------------------------------------------------------------------------


def width_reference(
    h, out, out_beta, projection, constant, fixed, scale, kind, centred, tanh, eps, iterations
):
    """(h_in, H_r, beta, z, mean, rstd): what `connection_width` computes."""
    n = h.shape[1]
    v = streams_of(h, out, out_beta)
    z = mean = rstd = v.new_empty(0)
    if kind != FIXED:
        z, mean, rstd = projected(v, projection, kind, centred, eps)
    coefficients = coefficients_of(z, constant, fixed, scale, n, kind, tanh, iterations)
    c = coefficients.expand(h.shape[0], h.shape[2], n, n + 2)
    mixed = torch.einsum("oikj,okid->ojid", c[..., : n + 1], v).to(h.dtype)
    return mixed[:, 0], mixed[:, 1:], c[..., n + 1], z, mean, rstd


@reference("connection_width")
def _connection_width(*args):
    return tuple(t.clone(memory_format=torch.contiguous_format) for t in width_reference(*args))


@reference("connection_width_backward")
def _connection_width_backward(
    dinput, drest, dbeta, h, out, out_beta, projection, constant, fixed, scale, z, mean, rstd,
    kind, centred, tanh, iterations,
):  # fmt: skip
    O, n, I, D = h.shape
    v = streams_of(h, out, out_beta)
    acc = v.dtype
    dm = v.new_zeros(O, n + 1, I, D)
    if dinput is not None:
        dm[:, 0] = dinput.to(acc)
    if drest is not None:
        dm[:, 1:] = drest.to(acc)
    db = v.new_zeros(O, I, n) if dbeta is None else dbeta.to(acc)
    dc = torch.cat([torch.einsum("okid,ojid->oikj", v, dm), db.unsqueeze(-1)], -1)
    c = coefficients_of(z, constant, fixed, scale, n, kind, tanh, iterations)
    dv = torch.einsum("oikj,ojid->okid", c[..., : n + 1].expand(O, I, n, n + 1), dm)
    none = v.new_empty(0)
    dprojection, dconstant, dscale = none, none.clone(), none.clone()
    if kind == FIXED:
        dfixed = dc.sum((0, 1)).flatten()
    else:
        e, gs, gf = through_coefficients(dc, z, constant, fixed, scale, kind, tanh, iterations)
        dfixed, dscale, dconstant = gf.sum((0, 1)), gs.sum((0, 1)), e.sum((0, 1))
        if kind == MANIFOLD:
            r = rstd[:, None, :, None]
            p = projection.unflatten(1, (n, D))
            dprojection = torch.einsum("oip,onid->pnd", e, v * r).flatten(1)
            dn = torch.einsum("oip,pnd->onid", e, p)
            inner = (e * z).sum(-1)[:, None, :, None] / (n * D)
            dv = dv + r * (dn - v * r * inner)
        else:
            r, e = rstd.unsqueeze(-1), e.unflatten(-1, (n, n + 2))
            normal = (v - mean.unsqueeze(-1) if centred else v) * r
            dprojection = torch.einsum("oinc,onid->cd", e, normal)
            dn = torch.einsum("oinc,cd->onid", e, projection)
            inner = (e * z.unflatten(-1, (n, n + 2))).sum(-1).permute(0, 2, 1).unsqueeze(-1) / D
            dn = dn - normal * inner
            if centred:
                dn = dn - dn.mean(-1, keepdim=True)
            dv = dv + r * dn
    dout, dout_beta = none.to(h.dtype), none.clone()
    if out is not None:
        dout, dout_beta = _depth_gradients(dv, out, out_beta)
    results = (dv.to(h.dtype), dout, dout_beta, dprojection, dconstant, dfixed, dscale)
    return tuple(t.clone(memory_format=torch.contiguous_format) for t in results)


def depth_reference(out, h, beta):
    """The streams with the layer's output added by its weights."""
    return streams_of(h, out, beta).to(h.dtype)


@reference("connection_depth")
def _connection_depth(out, h, beta):
    return depth_reference(out, h, beta).contiguous()


def _depth_gradients(g, out, beta):
    dout = torch.einsum("onid,oin->oid", g, beta.to(g.dtype)).to(out.dtype)
    return dout, torch.einsum("onid,oid->oin", g, out.to(g.dtype))


@reference("connection_depth_backward")
def _connection_depth_backward(grad, out, beta):
    dout, dbeta = _depth_gradients(grad.to(accumulate_type(grad)), out, beta)
    return dout.contiguous(), dbeta.contiguous()


# ---- autograd ----------------------------------------------------------------------------------------


class _Width(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, out, out_beta, projection, constant, fixed, scale, *options):
        tensors = (h, out, out_beta, projection, constant, fixed, scale)
        *results, z, mean, rstd = _op.connection_width(*tensors, *options)
        ctx.options = options
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, z, mean, rstd)
        return tuple(results)

    @staticmethod
    def backward(ctx, dinput, drest, dbeta):
        *tensors, z, mean, rstd = ctx.saved_tensors
        kind, centred, tanh, _, iterations = ctx.options
        needs = ctx.needs_input_grad[:7]
        if torch.is_grad_enabled():

            def width(*tensors):
                return width_reference(*tensors, *ctx.options)[:3]

            grads = differentiable_vjp(width, tensors, needs, (dinput, drest, dbeta))
        elif dinput is None and drest is None and dbeta is None:
            grads = [None] * 7
        else:
            grads = _op.connection_width_backward(
                dinput, drest, dbeta, *tensors, z, mean, rstd, kind, centred, tanh, iterations
            )
            grads = [g.to(t.dtype) if need else None for g, t, need in zip(grads, tensors, needs)]
        return (*grads, *([None] * 5))


class _Depth(torch.autograd.Function):
    @staticmethod
    def forward(ctx, out, h, beta):
        ctx.save_for_backward(out, beta)
        return _op.connection_depth(out, h, beta)

    @staticmethod
    def backward(ctx, grad):
        out, beta = ctx.saved_tensors
        need_out, need_h, need_beta = ctx.needs_input_grad
        if torch.is_grad_enabled():
            g = grad.to(accumulate_type(grad))
            dout, dbeta = _depth_gradients(g, out, beta)
        elif need_out or need_beta:
            dout, dbeta = _op.connection_depth_backward(grad, out, beta)
        else:
            return None, grad, None
        return (
            dout if need_out else None,
            grad if need_h else None,
            dbeta.to(beta.dtype) if need_beta else None,
        )


# ---- public functions --------------------------------------------------------------------------------


class _Layout:
    """H (..., n, ..., D) as (O, n, I, D) and back."""

    def __init__(self, name: str, H: object, stream_dim: int) -> None:
        H = _check.tensor(name, H, min_dim=2)
        if isinstance(stream_dim, bool) or not isinstance(stream_dim, int):
            raise TypeError(f"stream_dim: expected an integer, got {stream_dim!r}")
        dim = stream_dim + H.dim() if stream_dim < 0 else stream_dim
        if not 0 <= dim < H.dim() - 1:
            raise ValueError(
                f"stream_dim: expected a dimension before the last of {name} of shape "
                f"{tuple(H.shape)}, got {stream_dim}"
            )
        self.name, self.H, self.streams, self.width = name, H, H.shape[dim], H.shape[-1]
        if not 1 <= self.streams <= MOST_STREAMS:
            raise ValueError(
                f"{name}: expected 1 to {MOST_STREAMS} streams in dimension {stream_dim}, got shape "
                f"{tuple(H.shape)}"
            )
        self.tokens = (*H.shape[:dim], *H.shape[dim + 1 : -1])
        self.outer, self.inner = math.prod(H.shape[:dim]), math.prod(H.shape[dim + 1 : -1])
        self.flat = H.reshape(self.outer, self.streams, self.inner, self.width)

    def out(self, out: object, beta: object, beta_name: str = "out_beta") -> tuple[Tensor, Tensor]:
        _check.like("out", out, (*self.tokens, self.width), self.H, self.name)
        assert isinstance(out, Tensor)
        if autocast_enabled(self.H):  # the layer ended in a product; the streams keep their dtype
            out = out.to(self.H.dtype)
        _check.same_dtype("out", out, self.H, self.name)
        _check.like(beta_name, beta, (*self.tokens, self.streams), self.H, self.name)
        assert isinstance(beta, Tensor)
        return (
            out.reshape(self.outer, self.inner, self.width),
            beta.reshape(self.outer, self.inner, self.streams),
        )


def _width(layout, out, beta, parameters, options):
    tensors = (layout.flat, out, beta, *parameters)
    if use_reference():
        h_in, rest, new_beta = width_reference(*tensors, *options)[:3]
    elif needs_graph(*tensors):
        h_in, rest, new_beta = _Width.apply(*tensors, *options)
    else:
        h_in, rest, new_beta = _op.connection_width(*tensors, *options)[:3]
    return (
        h_in.reshape(*layout.tokens, layout.width),
        rest.reshape(layout.H.shape),
        new_beta.reshape(*layout.tokens, layout.streams),
    )


def _scalar(name: str, value: Tensor | float, layout: _Layout) -> Tensor:
    x = layout.H
    acc = accumulate_type(x)
    if not isinstance(value, Tensor):
        return torch.full((1,), _check.number(name, value), dtype=acc, device=x.device)
    if value.numel() != 1:
        raise ValueError(f"{name}: expected a number or one element, got {tuple(value.shape)}")
    _check.like(name, value, value.shape, x, layout.name)
    return value.reshape(1).to(acc)


def _hyper(layout, alpha, beta, alpha_weight, beta_weight, alpha_scale, beta_scale, norm_weight,
           norm_bias, norm, tanh, eps):  # fmt: skip
    """The op's parameters and options from the public arguments."""
    n, D, H = layout.streams, layout.width, layout.H
    acc = accumulate_type(H)
    _check.like("alpha", alpha, (n, n + 1), H, layout.name)
    _check.like("beta", beta, (n,), H, layout.name)
    _check.choice("norm", norm, ("layer", "rms"))
    eps = _check.number("eps", eps, low=0.0)
    fixed = torch.cat([alpha.to(acc), beta.to(acc).unsqueeze(1)], 1).reshape(-1)
    if alpha_weight is None and beta_weight is None:
        for name, value in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
            if value is not None:
                raise ValueError(f"{name}: given without alpha_weight and beta_weight")
        return (None, None, fixed, None), (FIXED, False, tanh, eps, 0)
    if alpha_weight is None or beta_weight is None:
        missing = "alpha_weight" if alpha_weight is None else "beta_weight"
        raise ValueError(f"{missing}: expected beside the other weight, got None")
    _check.like("alpha_weight", alpha_weight, (D, n + 1), H, layout.name)
    _check.like("beta_weight", beta_weight, (D,), H, layout.name)
    for name, value in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if value is not None:
            _check.like(name, value, (D,), H, layout.name)
    w = torch.cat([alpha_weight.to(acc).mT, beta_weight.to(acc).unsqueeze(0)], 0)
    scales = [_scalar("alpha_scale", alpha_scale, layout)] * (n + 1)
    scale = torch.cat([*scales, _scalar("beta_scale", beta_scale, layout)]).repeat(n)
    constant = None if norm_bias is None else (w * norm_bias.to(acc)).sum(1).repeat(n)
    projection = w if norm_weight is None else w * norm_weight.to(acc)
    return (projection, constant, fixed, scale), (HYPER, norm == "layer", tanh, eps, 0)


def hyper_connection_width(
    H: Tensor,
    alpha: Tensor,
    beta: Tensor,
    alpha_weight: Tensor | None = None,
    beta_weight: Tensor | None = None,
    alpha_scale: Tensor | float = 0.01,
    beta_scale: Tensor | float = 0.01,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    *,
    norm: str = "layer",
    tanh: bool = True,
    eps: float = 1e-5,
    stream_dim: int = -2,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""The layer's input, the streams that pass it by, and the weights by which its output comes back.

    With $\bar H$ the norm of each stream: $\alpha = \mathrm{alpha} + s_\alpha\tanh(\bar H W_\alpha)$,
    $\beta = \mathrm{beta} + s_\beta\tanh(\bar H w_\beta)$; $h_{in} = \sum_k\alpha_{k0}H_k$,
    $R_j = \sum_k\alpha_{k,1+j}H_k$. Without the weights the coefficients are the static ones. One read of H.

    Args:
        H: (..., n, D), at most 16 streams; with `stream_dim` another place of the n, as in (B, n, L, D).
        alpha, beta: (n, n + 1) = [A_m, A_r] and (n,): the static coefficients.
        alpha_weight, beta_weight: (D, n + 1), (D,), or None for static hyper-connections.
        alpha_scale, beta_scale: numbers or tensors of one element.
        norm_weight, norm_bias: (D,) of the norm; `norm` is "layer" (the paper's) or "rms".
        tanh: False leaves the activation out.
        eps: added to the variance or mean square.

    Shapes: H (..., n, D) -> h_in (..., D) and R (..., n, D) of H's dtype, beta (..., n) in float32 (float64 for
    float64). Parameters may be float32 with a half-precision H.

    Raises:
        ValueError, TypeError: naming the argument whose shape, dtype or device does not fit.

    Source: Zhu et al., "Hyper-Connections", 2024, Algorithm 2.
    """
    layout = _Layout("H", H, stream_dim)
    parameters, options = _hyper(
        layout, alpha, beta, alpha_weight, beta_weight, alpha_scale, beta_scale, norm_weight,
        norm_bias, norm, tanh, eps,
    )  # fmt: skip
    return _width(layout, None, None, parameters, options)


def hyper_connection_depth(
    out: Tensor, H_r: Tensor, beta: Tensor, *, stream_dim: int = -2
) -> Tensor:
    r"""The layer's output written back to the streams, $\hat H_j = \beta_j\,\mathrm{out} + R_j$.

    Args:
        out: (..., D), the layer's output.
        H_r, beta: what `hyper_connection_width` or `manifold_connection` returned.

    Shapes: out (..., D), H_r (..., n, D), beta (..., n) -> (..., n, D) of H_r's dtype.

    Raises:
        ValueError, TypeError: naming the argument whose shape, dtype or device does not fit.

    Source: Zhu et al., "Hyper-Connections", 2024, Algorithm 2.
    """
    layout = _Layout("H_r", H_r, stream_dim)
    flat, weights = layout.out(out, beta, "beta")
    if use_reference():
        H = depth_reference(flat, layout.flat, weights)
    elif needs_graph(flat, layout.flat, weights):
        H = _Depth.apply(flat, layout.flat, weights)
    else:
        H = _op.connection_depth(flat, layout.flat, weights)
    return H.reshape(H_r.shape)


def hyper_connection_depth_width(
    out: Tensor,
    H_r: Tensor,
    out_beta: Tensor,
    alpha: Tensor,
    beta: Tensor,
    alpha_weight: Tensor | None = None,
    beta_weight: Tensor | None = None,
    alpha_scale: Tensor | float = 0.01,
    beta_scale: Tensor | float = 0.01,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    *,
    norm: str = "layer",
    tanh: bool = True,
    eps: float = 1e-5,
    stream_dim: int = -2,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""`hyper_connection_width(hyper_connection_depth(out, H_r, out_beta), ...)` in one pass.

    The streams between two layers are formed in cache and never stored: H_r is read once and written once, and backward
    forms them again.

    Args:
        out, H_r, out_beta: the layer's output and what the width connection before it returned.
        alpha, ...: of the next layer, as in `hyper_connection_width`.

    Shapes: as in `hyper_connection_width`.

    Raises:
        ValueError, TypeError: naming the argument whose shape, dtype or device does not fit.

    Source: Zhu et al., "Hyper-Connections", 2024, Algorithm 2, two layers' halves joined.
    """
    layout = _Layout("H_r", H_r, stream_dim)
    flat, weights = layout.out(out, out_beta)
    parameters, options = _hyper(
        layout, alpha, beta, alpha_weight, beta_weight, alpha_scale, beta_scale, norm_weight,
        norm_bias, norm, tanh, eps,
    )  # fmt: skip
    return _width(layout, flat, weights, parameters, options)


def manifold_connection(
    H: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor,
    norm_weight: Tensor | None = None,
    *,
    iterations: int = 20,
    eps: float = 1e-6,
    out: Tensor | None = None,
    out_beta: Tensor | None = None,
    stream_dim: int = -2,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Manifold-constrained hyper-connections: the residual mixing is doubly stochastic.

    With $x$ the RMS norm of a token's n D features and $t = a\odot(x\,\mathrm{weight}) + \mathrm{bias}$:
    $h_{in} = \sum_k\sigma(t_k)H_k$, $\beta_k = 2\sigma(t_{n+k})$, $R = M H$ with M the Sinkhorn scaling of
    $\exp(\mathrm{mat}(t_{2n:}))$. Follow it by `hyper_connection_depth`, or give the layer's output to the next call by
    `out` and `out_beta` (then H is the R of the call before, and the depth connection happens in this pass).

    Args:
        H: (..., n, D), at most 16 streams; with `stream_dim` another place of the n.
        weight: (n D, n (n + 2)): columns for the input, the output and the n x n mixing, rows by stream.
        bias: (n (n + 2),).
        scale: (3,): one factor for each of the three.
        norm_weight: (n D,) of the norm.
        iterations: of Sinkhorn: columns, then rows. Entries of a row or column of the mixing's t should lie within
            60 of one another: what is smaller is 0 in float32.
        eps: added to the mean square.

    Shapes: H (..., n, D) -> h_in (..., D) and R (..., n, D) of H's dtype, beta (..., n) in float32 (float64 for
    float64).

    Raises:
        ValueError, TypeError: naming the argument whose shape, dtype or device does not fit.

    Source: Xie et al., "mHC: Manifold-Constrained Hyper-Connections", 2025 (arXiv 2512.24880).
    """
    layout = _Layout("H", H, stream_dim)
    n, D = layout.streams, layout.width
    acc = accumulate_type(H)
    _check.like("weight", weight, (n * D, n * (n + 2)), H, "H")
    _check.like("bias", bias, (n * (n + 2),), H, "H")
    _check.like("scale", scale, (3,), H, "H")
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
        raise ValueError(f"iterations: expected a positive integer, got {iterations!r}")
    eps = _check.number("eps", eps, low=0.0)
    flat: Tensor | None = None
    weights: Tensor | None = None
    if (out is None) != (out_beta is None):
        raise ValueError("out: expected together with out_beta, got one of them")
    if out is not None:
        flat, weights = layout.out(out, out_beta)
    projection = weight.to(acc).mT
    if norm_weight is not None:
        _check.like("norm_weight", norm_weight, (n * D,), H, "H")
        projection = projection * norm_weight.to(acc)
    a = torch.cat([s.to(acc).expand(k) for s, k in zip(scale.split(1), (n, n, n * n))])
    parameters = (projection.contiguous(), None, bias.to(acc), a)
    return _width(layout, flat, weights, parameters, (MANIFOLD, False, False, eps, iterations))
