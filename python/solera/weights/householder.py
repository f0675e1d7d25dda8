r"""Products of Householder reflections (HRA) in compact WY form, over core `low_rank_update`."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _check
from .._registry import accumulate_type
from .._route import full_precision
from .low_rank_update import turned


def _check_vectors(u: object, x: object, name: str) -> tuple[Tensor, Tensor]:
    x = _check.tensor(name, x, min_dim=1)
    u = _check.tensor("u", u, dim=2)
    _check.like("u", u, (x.shape[-1], u.shape[1]), x, name)
    return u, x


@full_precision
def _run(u: object, x: object, name: str, eps: float, transpose: bool) -> Tensor:
    u, x = _check_vectors(u, x, name)
    eps = _check.number("eps", eps, low=0.0)
    if u.shape[1] == 0:
        return x.clone()
    wide = u.to(accumulate_type(x))
    unit = wide * (wide.square().sum(0) + eps).rsqrt()
    count = u.shape[1]
    half = 0.5 * torch.eye(count, dtype=wide.dtype, device=wide.device)
    inverse = torch.triu(unit.mT @ unit, 1) + half  # T^-1
    if transpose:
        a = torch.linalg.solve_triangular(inverse.mT, unit.mT, upper=False)
    else:
        a = torch.linalg.solve_triangular(inverse, unit.mT, upper=True)
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return turned(rows, a, unit.mT).reshape(x.shape)


def householder_chain(x: Tensor, u: Tensor, *, eps: float = 0.0, transpose: bool = False) -> Tensor:
    r"""Rows through r reflections: $x\prod_{i=1}^r (I - 2\hat u_i\hat u_i^\top)$, $\hat u = u / \sqrt{u^\top u + eps}$.

    In compact WY form $I - \hat UT\hat U^\top$ with $T^{-1} = \mathrm{striu}(\hat U^\top\hat U) + I/2$: a triangular
    system of size r, then each row is read once for its r dots and their combination, whatever r is. Of the layer
    with the merged weight $W' = W\prod H_i$ it is the part before W: `F.linear(householder_chain(x, u,
    transpose=True), W)`.

    Args:
        x: (..., D). float32, float64, bfloat16, float16; computed in float32 (float64 for float64).
        u: (D, r), the vectors as columns, of any length but zero (with eps 0).
        eps: added to the squared lengths; above 0 the maps are reflections only nearly.
        transpose: the product in reversed order, which is its transpose (and with eps = 0 its inverse).

    Shapes: (..., D), (D, r) -> (..., D) of x's dtype. Differentiable in both, twice. Core `low_rank_update`; what
    has r columns is left to torch's products.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Yuan, Liu, Xu, "Bridging The Gap between Low-rank and Orthogonal Adaptation via Householder Reflection
    Adaptation", 2024 (its public code forms the D x D product); the form: Joffrain et al., "Accumulating Householder
    transformations, revisited", 2006.
    """
    return _run(u, x, "x", eps, transpose)


def householder_merge(weight: Tensor, u: Tensor, *, eps: float = 0.0) -> Tensor:
    r"""The adapted weight $W\prod_i (I - 2\hat u_i\hat u_i^\top)$ of HRA.

    Shapes: weight (..., D), u (D, r) -> the shape and dtype of weight. Differentiable in both, twice.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: as `householder_chain`.
    """
    return _run(u, weight, "weight", eps, False)


@full_precision
def householder_penalty(u: Tensor) -> Tensor:
    r"""How far the unit vectors are from orthogonal to each other: $\lVert\hat U^\top\hat U - I\rVert_F^2$.

    Shapes: (D, r) -> a number, float32 (float64 for float64). Differentiable. A composition of torch operations.

    Raises:
        ValueError, TypeError: u is no floating-point matrix.

    Source: the orthogonality regulariser of HRA, Yuan et al., 2024, whose strength interpolates between its low-rank
    and orthogonal ends.
    """
    u = _check.tensor("u", u, dim=2)
    wide = u.to(accumulate_type(u))
    unit = wide / wide.norm(dim=0)
    gram = unit.mT @ unit
    return (gram - torch.eye(u.shape[1], dtype=gram.dtype, device=gram.device)).square().sum()
