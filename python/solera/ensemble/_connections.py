"""The steps of core `connections` in plain torch: streams, norms, coefficients and their gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from .._registry import accumulate_type
from ..sinkhorn.small import SCALING, normalize_gradient, normalize_reference

FIXED, HYPER, MANIFOLD = 0, 1, 2


def streams_of(h: Tensor, out: Tensor | None, out_beta: Tensor | None) -> Tensor:
    """The streams in the accumulator's type, the last layer's output added where there is one."""
    v = h.to(accumulate_type(h))
    if out is None or out_beta is None:
        return v
    return v + out_beta.to(v.dtype).permute(0, 2, 1).unsqueeze(-1) * out.to(v.dtype).unsqueeze(1)


def _sinkhorn(iterations: int) -> tuple[int, int, bool, float]:
    """The options of solera.sinkhorn.small by which mHC's mixing is balanced: columns first."""
    return iterations, SCALING, False, 1e-30


def manifold_coefficients(t: Tensor, n: int, iterations: int) -> Tensor:
    """Coefficients (O, I, n, n + 2) of mHC from the scaled logits."""
    m = normalize_reference(t[..., 2 * n :].unflatten(-1, (n, n)), *_sinkhorn(iterations))
    pre, post = torch.sigmoid(t[..., :n]), 2 * torch.sigmoid(t[..., n : 2 * n])
    return torch.cat([pre.unsqueeze(-1), m.mT, post.unsqueeze(-1)], -1)


def projected(v, projection, kind, centred, eps):
    """z (O, I, n * (n + 2)), mean and rstd of the rows."""
    n = v.shape[1]
    none = v.new_empty(0)
    if kind == MANIFOLD:
        rstd = torch.rsqrt(v.square().mean((1, 3)) + eps)
        z = torch.einsum("onid,pnd->oip", v, projection.unflatten(1, (n, -1)))
        return z * rstd.unsqueeze(-1), none, rstd
    mean = v.mean(-1) if centred else none
    d = v - mean.unsqueeze(-1) if centred else v
    rstd = torch.rsqrt(d.square().mean(-1) + eps)
    z = torch.einsum("onid,cd->oinc", d * rstd.unsqueeze(-1), projection)
    return z.flatten(2), mean, rstd


def coefficients_of(z, constant, fixed, scale, n, kind, tanh, iterations):
    """(n, n + 2) coefficients, for each token or, if fixed, for all."""
    if kind == FIXED:
        return fixed.unflatten(0, (n, n + 2))
    if kind == MANIFOLD:
        return manifold_coefficients(fixed + scale * z, n, iterations)
    a = z if constant is None else z + constant
    return (fixed + scale * (torch.tanh(a) if tanh else a)).unflatten(-1, (n, n + 2))


def through_coefficients(dc, z, constant, fixed, scale, kind, tanh, iterations):
    """The gradients of z, of scale and of fixed, token by token, from those of the coefficients (O, I, n, n + 2)."""
    n = dc.shape[2]
    if kind == HYPER:
        a = z if constant is None else z + constant
        a = torch.tanh(a) if tanh else a
        g = dc.flatten(2)
        return g * scale * ((1 - a * a) if tanh else 1.0), g * a, g
    t = fixed + scale * z
    c = manifold_coefficients(t, n, iterations)
    logits = t[..., 2 * n :].unflatten(-1, (n, n))
    mixing = normalize_gradient(dc[..., 1 : n + 1].mT, logits, *_sinkhorn(iterations))
    pre, half = c[..., 0], c[..., n + 1] / 2
    parts = [dc[..., 0] * pre * (1 - pre), 2 * dc[..., n + 1] * half * (1 - half)]
    g = torch.cat([*parts, mixing.flatten(2)], -1)
    return g * scale, g * z, g
