"""Directions to slice along: samples of the von Mises-Fisher distribution, differentiable in its mean."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import _check
from .._registry import accumulate_type

PROPOSALS = 32  # a proposal is accepted with probability above 0.6: all fail once in 10^13 samples


def _axial_3d(kappa: Tensor, shape, like: dict[str, Any], generator) -> Tensor:
    """w = <x, mu> in three dimensions by inversion: w = 1 + log(u + (1 - u) e^{-2 kappa}) / kappa."""
    u = torch.rand(shape, generator=generator, **like).clamp_min(torch.finfo(like["dtype"]).tiny)
    return 1 + torch.logaddexp(torch.log(u), torch.log1p(-u) - 2 * kappa) / kappa


def _axial(kappa: Tensor, d: int, shape, like: dict[str, Any], generator) -> Tensor:
    """w = <x, mu> in d dimensions by Wood's rejection, PROPOSALS at once, the first accepted one."""
    b = (d - 1) / (2 * kappa + torch.sqrt(4 * kappa * kappa + (d - 1) ** 2))
    x0 = (1 - b) / (1 + b)
    # 1 - x0^2 = 4 b / (1 + b)^2, which for a large kappa is not a difference of ones.
    c = kappa * x0 + (d - 1) * torch.log(4 * b / (1 + b) ** 2)
    wide = (*shape, PROPOSALS)
    # Beta(h, h) with h = (d - 1) / 2, as a coordinate of a uniform direction: z = (1 + t) / 2.
    normal = torch.randn((*wide, d), generator=generator, **like)
    z = (1 + normal[..., 0] / torch.linalg.vector_norm(normal, dim=-1)) / 2 if d > 2 else None
    if z is None:
        u = torch.rand(wide, generator=generator, **like)
        z = torch.sin(0.5 * math.pi * u).square()  # Beta(1/2, 1/2)
    b, x0, c, kappa = (t.unsqueeze(-1) for t in (b, x0, c, kappa))
    w = (1 - (1 + b) * z) / (1 - (1 - b) * z)
    u = torch.rand(wide, generator=generator, **like)
    accepted = kappa * w + (d - 1) * torch.log(1 - x0 * w) - c >= torch.log(u)
    first = accepted.to(torch.int32).argmax(-1, keepdim=True)
    return w.gather(-1, first).squeeze(-1)


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
        w = _axial_3d(concentration, shape, like, generator)
    else:
        with torch.no_grad():
            w = _axial(concentration, d, shape, like, generator)
    tangent = torch.randn((*shape, d - 1), generator=generator, **like)
    tangent = tangent / torch.linalg.vector_norm(tangent, dim=-1, keepdim=True)
    # The tiny floor keeps the square root differentiable at the pole.
    radius = torch.sqrt((1 - w * w).clamp_min(torch.finfo(acc).tiny))
    z = torch.cat([w.unsqueeze(-1), radius.unsqueeze(-1) * tangent], -1)
    pole = torch.zeros_like(mean)
    pole[..., 0] = 1
    u = pole - mean
    square = (u * u).sum(-1, keepdim=True).clamp_min(torch.finfo(acc).tiny)
    return (z - 2 * u * ((z * u).sum(-1, keepdim=True) / square)).to(mu.dtype)
