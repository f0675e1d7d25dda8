r"""Means and interpolations by angle: spherical interpolation, Karcher means, Model Stock.

Every result lies in the span of the models (their differences from a base), so all iteration is on the K x K
dots of core `gram`: one pass over memory for the dots, one for the combination, whatever the number of
iterations. Nothing waits for the device. All functions take tensors, lists of tensors (each tensor by itself)
and state dicts, with `dim` row by row (filter by filter); a tensor of fewer than two dimensions is then one row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _check
from ._span import Span, unit_gram
from .lincomb import Weights

KARCHER_STEPS = 10
KARCHER_TOLERANCE = 1e-5  # radians


def slerp(
    a: Weights,
    b: Weights,
    t: float | Tensor,
    *,
    base: Weights | None = None,
    dim: int | None = None,
    colinear: float = 0.9995,
) -> Any:
    r"""Spherical interpolation of two tensors, lists or state dicts.

    $$\mathrm{out} = \frac{\sin((1 - t)\Omega)}{\sin\Omega}\,a + \frac{\sin(t\,\Omega)}{\sin\Omega}\,b,
      \qquad \cos\Omega = \frac{\langle a, b\rangle}{\lVert a\rVert\,\lVert b\rVert},$$

    and $(1 - t)\,a + t\,b$ where $|\cos\Omega|$ exceeds `colinear` or one of the two is zero. With a base the
    differences a - base and b - base are turned, and the base added again.

    Args:
        a, b: two tensors of one shape, lists of tensors, or state dicts with the same keys.
        t: 0 gives a, 1 gives b: a number or a tensor without dimensions, for lists also (L,); may require a gradient.
        base: one more tensor, list or state dict.
        dim: None for one angle a tensor, else one for each index along `dim` (0: each row, each filter).
        colinear: the |cos| above which the interpolation is linear.

    Shapes: S, S -> S; lists and state dicts likewise. Dtypes as `lincomb`; the angles are float64.

    Differentiable in a, b, base and t (the choice of formula is locally constant).

    Raises:
        ValueError, TypeError: naming the argument.

    Source: Shoemake, "Animating rotation with quaternion curves", 1985.
    """
    colinear = _check.number("colinear", colinear, low=0, high=1)
    try:
        span = Span([a, b], base, dim)
    except (TypeError, ValueError) as error:
        text = str(error).replace("tensors[0]", "a").replace("tensors[1]", "b")
        raise type(error)(text) from None
    return span.combine(slerp_coefficients(span.gram, span.per_row("t", t), colinear))


def slerp_coefficients(gram: Tensor, t: Any, colinear: float) -> Tensor:
    """Coefficients (R, 2) of dots (R, 2, 2); t is a number, or one for each row."""
    cosines, _, alive = unit_gram(gram)
    cos = cosines[:, 0, 1]
    straight = (cos.abs() > colinear) | (cos.abs() >= 1) | ~alive.all(1)
    cos = torch.where(straight, 0, cos)
    angle, sine = torch.acos(cos), (1 - cos.square()).sqrt()
    first = torch.where(straight, 1 - t, torch.sin((1 - t) * angle) / sine)
    second = torch.where(straight, t, torch.sin(t * angle) / sine)
    return torch.stack([first, second], 1)


def _weights(name: str, value: Any, count: int, like: Tensor) -> Tensor:
    """K weights in float64, as they are."""
    if isinstance(value, Tensor):
        w = value
        if w.dtype not in _check.FLOATS:
            raise TypeError(f"{name}: expected a floating-point dtype, got {w.dtype}")
        if w.device != like.device:
            raise ValueError(
                f"{name}: expected device {like.device} (that of tensors), got {w.device}"
            )
    else:
        try:
            w = torch.tensor(value, dtype=torch.float64, device=like.device)
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"{name}: expected {count} numbers, got {value!r:.200}") from None
        if w.dim() == 1 and len(value) and math.fsum(value) == 0:
            raise ValueError(f"{name}: they add up to zero and cannot be divided by their sum")
    if w.shape != (count,):
        raise ValueError(
            f"{name}: expected shape ({count},), one for each model, got {tuple(w.shape)}"
        )
    return w.double()


def _angle_over_sine(cos: Tensor) -> Tensor:
    """theta / sin(theta) of cos(theta); a series near 1, where the quotient loses its digits."""
    u = 1 - cos
    near = u < 1e-3
    series = 1 + u * (1 / 3 + u * (2 / 15 + u * (2 / 35)))
    far = torch.where(near, 0, cos).clamp_min(-1 + 1e-12)
    return torch.where(near, series, torch.acos(far) / (1 - far.square()).sqrt())


def _length(cosines: Tensor, a: Tensor) -> Tensor:
    """The norms (R, 1) of vectors with coefficients a (R, K) over unit vectors; 1e-15 for zero."""
    square = (a * (cosines @ a[:, :, None])[:, :, 0]).sum(1, keepdim=True)
    return square.clamp_min(1e-30).sqrt()


def sphere_mean(gram: Tensor, w: Tensor, iterations: int, tolerance: float) -> Tensor:
    """Coefficients (R, K) of the mean of the directions, times the mean of the norms."""
    cosines, norms, alive = unit_gram(gram)
    w = w / w.sum()
    scale = (w * norms).sum(1, keepdim=True)
    w = torch.where(alive, w, 0)
    total = w.sum(1, keepdim=True)
    w = w / torch.where(total == 0, 1, total)
    length = _length(cosines, w)
    # Directions that cancel have no mean: begin at the first that is not zero.
    first = (alive & (alive.cumsum(1) == 1)).double()
    cancelled = length < 1e-7
    a = torch.where(cancelled, first, w / torch.where(cancelled, 1, length))
    done = torch.zeros_like(cancelled)
    for _ in range(iterations):
        cos = (cosines @ a[:, :, None])[:, :, 0].clamp(-1, 1)
        step = w * _angle_over_sine(cos)
        tangent = step - (step * cos).sum(1, keepdim=True) * a
        length = _length(cosines, tangent)
        moved = torch.cos(length) * a + torch.sin(length) / length * tangent
        done = done | (length < tolerance)
        a = torch.where(done, a, moved / _length(cosines, moved))
    inverse = torch.where(alive, 1 / torch.where(alive, norms, 1), 0)
    return scale * a * inverse


def multi_slerp(
    tensors: Sequence[Weights],
    weights: Tensor | Sequence[float],
    *,
    base: Weights | None = None,
    dim: int | None = None,
) -> Any:
    r"""Spherical interpolation of K tensors, lists or state dicts: one step in the tangent space of their mean.

    With unit vectors $u_k$, $m = \sum_k w_k u_k$ brought to unit length, and $\theta_k$ the angle between
    $u_k$ and $m$,

    $$\tau = \sum_k w_k\,\frac{\theta_k}{\sin\theta_k}\,(u_k - \cos\theta_k\,m),\qquad
      \mathrm{out} = \Bigl(\sum_k w_k\lVert x_k\rVert\Bigr)
      \Bigl(\cos\lVert\tau\rVert\,m + \sin\lVert\tau\rVert\,\frac{\tau}{\lVert\tau\rVert}\Bigr).$$

    `karcher_mean` repeats the step; two tensors' limit has `slerp`'s direction. (Without the factor
    $\theta_k/\sin\theta_k$ of the logarithm $\tau$ is zero for weights that sum to one, and the result m.)

    Args:
        tensors: K tensors of one shape, or K lists of L tensors, or K state dicts with the same keys.
        weights: (K,), a tensor or numbers; divided by their sum.
        base: one more tensor, list or state dict; the x_k are then the differences from it.
        dim: None for one mean a tensor, else one for each index along `dim`.

    Shapes: K of any shape S -> S; lists and state dicts likewise. Differentiable in all tensors and the weights. A zero
    vector has no direction and counts with its norm only; directions that cancel start from the first.

    Source: Buss, Fillmore, "Spherical averages and applications to spherical splines and interpolation", 2001 (one
    iteration of their algorithm).
    """
    span = Span(tensors, base, dim)
    w = _weights("weights", weights, len(tensors), span.gram)
    return span.combine(sphere_mean(span.gram, w, 1, 0.0))


def karcher_mean(
    tensors: Sequence[Weights],
    weights: Tensor | Sequence[float] | None = None,
    *,
    base: Weights | None = None,
    dim: int | None = None,
    max_iterations: int = KARCHER_STEPS,
    tolerance: float = KARCHER_TOLERANCE,
) -> Any:
    r"""The weighted mean on the sphere (minimum of $\sum_k w_k\,\theta_k^2$), times the weighted mean of the norms.

    `multi_slerp`'s step, repeated until the tangent $\tau$ is shorter than `tolerance` (each tensor or row for
    itself) or max_iterations times. All steps are on K x K numbers; on a GPU too nothing is waited for.

    Args:
        tensors: K tensors of one shape, or K lists of L tensors, or K state dicts with the same keys.
        weights: (K,), a tensor or numbers; divided by their sum. None: all the same.
        base: one more tensor, list or state dict; the means are then of the differences from it.
        dim: None for one mean a tensor, else one for each index along `dim`.
        max_iterations: at least 0, which leaves the direction of the weighted sum of unit vectors.
        tolerance: in radians.

    Shapes: K of any shape S -> S; lists and state dicts likewise. Differentiable, through the
    iterations, in all tensors and the weights.

    Source: Karcher, "Riemannian center of mass and mollifier smoothing", 1977; Buss, Fillmore, 2001.
    """
    if not isinstance(max_iterations, int) or max_iterations < 0:
        raise ValueError(f"max_iterations: expected an integer of at least 0, got {max_iterations}")
    tolerance = _check.number("tolerance", tolerance, low=0)
    span = Span(tensors, base, dim)
    if weights is None:
        weights = span.gram.new_ones(len(tensors))
    w = _weights("weights", weights, len(tensors), span.gram)
    return span.combine(sphere_mean(span.gram, w, max_iterations, tolerance))
