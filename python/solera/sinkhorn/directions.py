"""Directions to slice along: samples of the von Mises-Fisher distribution, differentiable in its mean."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import _check
from .._registry import accumulate_type
from .plan import reads_values

PROPOSALS = 32  # a proposal is accepted with probability above 0.6: all fail once in 10^13 samples


# Both give m = 1 - w of w = <x, mu>, not w: for a large kappa all that a sample is lies in m.


def _axial_3d(kappa: Tensor, shape, like: dict[str, Any], generator) -> Tensor:
    """In three dimensions by inversion: m = -log(u + (1 - u) e^{-2 kappa}) / kappa.

    The logarithm is near 0 for a small kappa, where dividing its rounding by kappa would leave nothing of m; the
    other form, log1p((1 - u) (e^{-2 kappa} - 1)), loses a small u for a large one.
    """
    u = torch.rand(shape, generator=generator, **like).clamp_min(torch.finfo(like["dtype"]).tiny)
    large = torch.logaddexp(torch.log(u), torch.log1p(-u) - 2 * kappa)
    small = torch.log1p((1 - u) * torch.expm1(-2 * kappa.clamp(max=1.0)))
    return (torch.where(kappa > 1, large, small) / -kappa).clamp(0.0, 2.0)


def _axial(kappa: Tensor, d: int, shape, like: dict[str, Any], generator) -> Tensor:
    """In d dimensions by Wood's rejection, PROPOSALS at once, the first accepted one."""
    b = (d - 1) / (2 * kappa + torch.hypot(2 * kappa, torch.full_like(kappa, d - 1)))
    m0 = 2 * b / (1 + b)  # 1 - x0
    wide = (*shape, PROPOSALS)
    # Beta(h, h) with h = (d - 1) / 2, as a coordinate of a uniform direction: z = (1 + t) / 2.
    normal = torch.randn((*wide, d), generator=generator, **like)
    z = (1 + normal[..., 0] / torch.linalg.vector_norm(normal, dim=-1)) / 2 if d > 2 else None
    if z is None:
        u = torch.rand(wide, generator=generator, **like)
        z = torch.sin(0.5 * math.pi * u).square()  # Beta(1/2, 1/2)
    b, m0, kappa = (t.unsqueeze(-1) for t in (b, m0, kappa))
    m = 2 * b * z / (1 - (1 - b) * z)  # 1 - (1 - (1 + b) z) / (1 - (1 - b) z)
    u = torch.rand(wide, generator=generator, **like)
    # log of the target over the proposal, kappa (w - x0) + (d - 1) log((1 - x0 w) / (1 - x0^2)).
    level = kappa * (m0 - m) + (d - 1) * torch.log((m + m0 * (1 - m)) / (m0 * (2 - m0)))
    accepted = level >= torch.log(u)
    first = accepted.to(torch.int32).argmax(-1, keepdim=True)
    return m.gather(-1, first).squeeze(-1)


def vmf_sample(
    mu: Tensor,
    kappa: float | Tensor,
    count: int,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Samples of the von Mises-Fisher distribution: density $\propto e^{\kappa\langle x, \mu\rangle}$ on the sphere.

    $x = H(w, \sqrt{1 - w^2}\,v)$ with $v$ uniform in the tangent sphere and H the Householder reflection that
    takes $e_1$ to $\mu$: reparametrised, so gradients reach mu (the reflection is not smooth at $\mu = e_1$
    itself, where the gradient given is 0). In three dimensions w comes from its inverse distribution function and
    gradients reach kappa too; in any other from Wood's rejection, without one. No host synchronisation.

    Args:
        mu: (..., d), unit vectors, d >= 2.
        kappa: > 0, a number or a tensor (...); small is uniform, large is near mu.
        count: samples of each mu, >= 1.
        generator: as torch.rand's.

    Shapes: (..., d) -> (..., count, d), in mu's dtype (half precision is computed in float32).

    Raises:
        ValueError, TypeError: naming the argument.

    Source: Ulrich, "Computer Generation of Distributions on the m-Sphere", 1984; Wood, "Simulation of the von
    Mises Fisher Distribution", 1994; Jakob, "Numerically stable sampling of the von Mises Fisher distribution on
    S2", 2012; as a layer: Davidson et al., "Hyperspherical Variational Auto-Encoders", 2018.
    """
    _check.tensor("mu", mu, min_dim=1)
    *batch, d = mu.shape
    if d < 2:
        raise ValueError(f"mu: expected at least 2 coordinates, got shape {tuple(mu.shape)}")
    if not isinstance(count, int) or isinstance(count, bool):
        raise TypeError(f"count: expected an int, got {type(count).__name__} {count!r}")
    if count < 1:
        raise ValueError(f"count: expected at least 1, got {count}")
    acc = accumulate_type(mu)
    if isinstance(kappa, Tensor):
        _check.like("kappa", kappa, tuple(batch), mu, "mu")
        if reads_values(kappa) and not bool((kappa > 0).all()):
            raise ValueError("kappa: expected numbers > 0, got one that is not")
        concentration = kappa.to(acc)
    else:
        number = _check.number("kappa", kappa)
        if not number > 0:
            raise ValueError(f"kappa: expected a number > 0, got {kappa!r}")
        concentration = mu.new_full(tuple(batch), number, dtype=acc)
    mean = mu.to(acc).unsqueeze(-2)  # (..., 1, d)
    concentration = concentration.unsqueeze(-1)
    like: dict[str, Any] = {"dtype": acc, "device": mu.device}
    shape = (*batch, count)
    if d == 3:
        m = _axial_3d(concentration, shape, like, generator)
    else:
        with torch.no_grad():
            m = _axial(concentration, d, shape, like, generator)
    tangent = torch.randn((*shape, d - 1), generator=generator, **like)
    tangent = tangent / torch.linalg.vector_norm(tangent, dim=-1, keepdim=True)
    # The tiny floor keeps the square root differentiable at the pole.
    radius = torch.sqrt((m * (2 - m)).clamp_min(torch.finfo(acc).tiny))
    z = torch.cat([(1 - m).unsqueeze(-1), radius.unsqueeze(-1) * tangent], -1)
    # u = e_1 - mu. Near the pole its first coordinate is half the square of the others: 1 - mu_1 would be rounding.
    first, across = mean[..., :1], mean[..., 1:]
    height = across.square().sum(-1, keepdim=True) / (1 + first.clamp_min(0.0))
    u = torch.cat([torch.where(first > 0, height, 1 - first), -across], -1)
    square = (u * u).sum(-1, keepdim=True).clamp_min(torch.finfo(acc).tiny)
    return (z - 2 * u * ((z * u).sum(-1, keepdim=True) / square)).to(mu.dtype)
