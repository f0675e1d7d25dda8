"""Whitening and its relatives, compositions over core `moments2` (the covariance) and torch.linalg."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from .. import _check
from .._registry import accumulate_type
from .._route import needs_graph, use_reference
from ._hadamard import balanced_rotation
from .moments2 import covariance

_ROWS = 8192  # rows whose centred copy exists at a time


class MomentAccumulator:
    r"""Mean and covariance of rows that arrive in chunks, or from several places.

    Chunks (n, $\mu$, M) and (m, $\nu$, Q) merge to $n+m$, $\mu + \delta\,m/(n+m)$,
    $M + Q + \delta\delta^\top nm/(n+m)$ with $\delta = \nu - \mu$. State is kept in float64; no gradient flows.

    Shapes: `update` takes (N, D); `mean` is (D,), `covariance()` (D, D), both float64.

    Source: Chan, Golub, LeVeque, 1979. Composition over core `moments2`.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = torch.empty(0, dtype=torch.float64)
        self.scatter = torch.empty(0, 0, dtype=torch.float64)

    @torch.no_grad()
    def update(self, x: Tensor) -> MomentAccumulator:
        """Add the rows of x, shape (N, D)."""
        _check.tensor("x", x, dim=2)
        if self.count and x.shape[1] != self.mean.shape[0]:
            raise ValueError(
                f"x: expected {self.mean.shape[0]} columns, got shape {tuple(x.shape)}"
            )
        if x.shape[0] == 0:
            return self
        mean, c = covariance(x)
        other = MomentAccumulator()
        other.count, other.mean, other.scatter = x.shape[0], mean.double(), c.double() * x.shape[0]
        return self.merge(other)

    @torch.no_grad()
    def merge(self, other: MomentAccumulator) -> MomentAccumulator:
        """Add what another accumulator (another process, say) has seen."""
        if not other.count:
            return self
        if not self.count:
            self.count, self.mean, self.scatter = other.count, other.mean, other.scatter
            return self
        n, m = self.count, other.count
        delta = other.mean - self.mean
        self.mean = self.mean + delta * (m / (n + m))
        self.scatter = self.scatter + other.scatter + torch.outer(delta, delta) * (n * m / (n + m))
        self.count = n + m
        return self

    def covariance(self, correction: int = 0) -> Tensor:
        """(D, D); divided by count - correction."""
        return self.scatter / max(self.count - correction, 1)


def _eigen(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, largest first, and vectors whose largest entry is positive."""
    value, vector = torch.linalg.eigh(matrix)
    value, vector = value.flip(-1), vector.flip(-1)
    at = vector.abs().argmax(0, keepdim=True)
    return value, vector * torch.sign(vector.gather(0, at))


def whiten_fit(
    x: Tensor | MomentAccumulator, k: int | None = None, *, correction: int = 0
) -> tuple[Tensor, Tensor]:
    r"""Mean and whitening matrix of embeddings: $\Sigma = U\Lambda U^\top$, $W = U_k\Lambda_k^{-1/2}$.

    Args:
        x: (N, D), float32, float64, bfloat16 or float16, or a MomentAccumulator that has seen the rows.
        k: how many of the leading directions to keep; None for all.
        correction: of the covariance; 0 divides by N.

    Shapes: (N, D) -> mean (D,), W (D, k), in float32 (float64 for float64 and an accumulator). Directions
    without variance (eigenvalues below D machine epsilons of the largest) get 0. Differentiable where the
    eigenvalues differ.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Huang et al., "WhiteningBERT: An Easy Unsupervised Sentence Embedding Approach", 2021.
    """
    if isinstance(x, MomentAccumulator):
        mean, matrix = x.mean, x.covariance(correction)
    else:
        mean, matrix = covariance(x, correction=correction)
    columns = mean.shape[0]
    if k is not None and (isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= columns):
        raise ValueError(f"k: expected None or an int from 1 to {columns}, got {k!r}")
    value, vector = _eigen(matrix)
    seen = value > value[:1] * (columns * torch.finfo(value.dtype).eps)
    scale = torch.where(seen, torch.where(seen, value, 1.0).rsqrt(), 0.0)
    return mean, (vector * scale)[:, :k]


def _centred_product(x: Tensor, mean: Tensor, weight: Tensor) -> Tensor:
    """(x - mean) @ weight in the accumulator's type, a block of centred rows at a time if it may."""
    acc = accumulate_type(x)
    mean, weight = mean.to(acc), weight.to(acc)
    one = lambda rows: (rows.to(acc) - mean) @ weight
    if needs_graph(x, mean, weight) or use_reference() or is_dynamo_compiling():
        return one(x).to(x.dtype)
    out = x.new_empty(x.shape[0], weight.shape[1])
    for rows, to in zip(x.split(_ROWS), out.split(_ROWS)):
        to.copy_(one(rows))
    return out


def _fits(x_name: str, x: object, mean: object, weight_name: str, weight: object) -> Tensor:
    x = _check.tensor(x_name, x, dim=2)
    mean, weight = _check.tensor("mean", mean), _check.tensor(weight_name, weight, dim=2)
    columns = x.shape[1]
    # A fit over a MomentAccumulator is in float64 and goes with any x.
    for name, t, shape in (
        ("mean", mean, (columns,)),
        (weight_name, weight, (columns, weight.shape[1])),
    ):
        if t.shape != shape or t.device != x.device:
            raise ValueError(
                f"{name}: expected shape {tuple(shape)} on {x.device} to go with {x_name} of shape "
                f"{tuple(x.shape)}, got {tuple(t.shape)} on {t.device}"
            )
    return x


def _phi_fits(name: str, x: object, mean: object, rotation: Tensor, scale: Tensor) -> Tensor:
    x = _fits(name, x, mean, "rotation", rotation)
    if rotation.shape[1] != x.shape[1]:
        raise ValueError(
            f"rotation: expected shape {(x.shape[1], x.shape[1])} to go with {name} of shape "
            f"{tuple(x.shape)}, got {tuple(rotation.shape)}"
        )
    if _check.tensor("scale", scale).dim() != 0 or scale.device != x.device:
        raise ValueError(
            f"scale: expected shape () on {x.device}, got {tuple(scale.shape)} on {scale.device}"
        )
    return x


def whiten_apply(x: Tensor, mean: Tensor, weight: Tensor) -> Tensor:
    r"""$(x - \mu) W$ with what `whiten_fit` returned.

    Args:
        x: (N, D), float32, float64, bfloat16 or float16.
        mean, weight: (D,) and (D, k).

    Shapes: (N, D) -> (N, k) of x's dtype. Differentiable. Without a gradient 8192 centred rows exist at a time.

    Raises:
        ValueError, TypeError: naming the argument whose shape, dtype or device does not fit.

    Source: Huang et al., "WhiteningBERT", 2021.
    """
    return _centred_product(_fits("x", x, mean, "weight", weight), mean, weight)


def phi_standardize_fit(x: Tensor | MomentAccumulator) -> tuple[Tensor, Tensor, Tensor]:
    r"""PHI-S: mean, rotation and the one scale that give every output channel variance 1.

    $\Sigma = U\Lambda U^\top$, $\varphi = \sqrt{\overline{\lambda}}$, rotation $R = HU^\top$ with $H$ orthogonal and
    $H\Lambda H^\top$ of constant diagonal: a normalised Hadamard matrix (Sylvester's times Paley's) where one of that
    order is known here, otherwise plane rotations that level the diagonal one entry at a time.

    Args:
        x: (N, D), or a MomentAccumulator.

    Shapes: (N, D) -> mean (D,), rotation (D, D), scale (); in float32 (float64 for float64).

    Raises:
        ValueError, TypeError: naming x where its shape or dtype does not fit.

    Source: Ranzinger et al., "PHI-S: Distribution Balancing for Label-Free Multi-Teacher Distillation", 2024;
    the plane rotations: Chan, Li, "Diagonal Elements and Eigenvalues of a Real Symmetric Matrix", 1983.
    """
    if isinstance(x, MomentAccumulator):
        mean, matrix = x.mean, x.covariance()
    else:
        with torch.no_grad():
            mean, matrix = covariance(x)
    value, vector = _eigen(matrix)
    level = balanced_rotation(value.detach()).to(vector)
    return mean, level @ vector.mT, value.clamp_min(0).mean().sqrt()


def phi_standardize(x: Tensor, mean: Tensor, rotation: Tensor, scale: Tensor) -> Tensor:
    r"""$y = R\,(x-\mu)/\varphi$ for every row.

    Shapes: x (N, D), mean (D,), rotation (D, D), scale () -> (N, D) of x's dtype. Differentiable.

    Raises:
        ValueError, TypeError: naming the argument whose shape, dtype or device does not fit.

    Source: Ranzinger et al., "PHI-S", 2024. Composition.
    """
    x = _phi_fits("x", x, mean, rotation, scale)
    return _centred_product(x, mean, rotation.mT / scale)


def phi_standardize_invert(y: Tensor, mean: Tensor, rotation: Tensor, scale: Tensor) -> Tensor:
    r"""$x = \varphi R^\top y + \mu$: undoes `phi_standardize`.

    Shapes: y (N, D), mean (D,), rotation (D, D), scale () -> (N, D) of y's dtype. Differentiable.

    Raises:
        ValueError, TypeError: naming the argument whose shape, dtype or device does not fit.

    Source: Ranzinger et al., "PHI-S", 2024. Composition.
    """
    y = _phi_fits("y", y, mean, rotation, scale)
    acc = accumulate_type(y)
    return torch.addmm(mean.to(acc), y.to(acc), (rotation * scale).to(acc)).to(y.dtype)


def newton_schulz(s: Tensor, iterations: int, mode: str = "inverse") -> Tensor:
    r"""Inverse or inverse square root of positive definite matrices by products alone.

    "inverse": $M_0 = aS$ with $a = 1/(\|S\|_1\|S\|_\infty)$, $M_{k+1} = 2M_k - M_kSM_k$.
    "inverse_sqrt": $P_0 = I$, $P_{k+1} = \frac12(3P_k - P_k^3\,S/\operatorname{tr}S)$, then
    $P/\sqrt{\operatorname{tr}S}$; computed in the coupled form (P and $Y = PS/\operatorname{tr}S$, both
    multiplied by $\frac12(3I - Y)$), which in exact arithmetic has the same iterates and, unlike the
    other, does not diverge once it has converged.

    Args:
        s: (..., D, D) symmetric positive definite, float32 or float64 (half precision is computed in
            float32 and rounded once).
        iterations: at least 0; both double the correct digits once they are close.
        mode: "inverse" or "inverse_sqrt".

    Shapes: (..., D, D) -> (..., D, D). Differentiable.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Fu et al., "Transformers Learn Higher-Order Optimization Methods for In-Context Learning: A Study
    with Linear Models", 2024 (the inverse; start by Ben-Israel, Cohen, 1966); Huang et al., "Iterative
    Normalization", 2019 (the root). Composition.
    """
    _check.tensor("s", s, min_dim=2)
    _check.choice("mode", mode, ("inverse", "inverse_sqrt"))
    if s.shape[-1] != s.shape[-2]:
        raise ValueError(f"s: expected square matrices, got shape {tuple(s.shape)}")
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 0:
        raise ValueError(f"iterations: expected an int, at least 0, got {iterations!r}")
    a = s.to(accumulate_type(s))
    if mode == "inverse":
        size = a.abs().sum(-2).amax(-1) * a.abs().sum(-1).amax(-1)
        m = a / size[..., None, None]
        for _ in range(iterations):
            m = 2 * m - m @ a @ m
        return m.to(s.dtype)
    trace = a.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    unit = a / trace
    eye = torch.eye(s.shape[-1], dtype=a.dtype, device=a.device)
    p = eye.expand(a.shape)
    for _ in range(iterations):
        step = 1.5 * eye - 0.5 * (p @ unit)
        p, unit = step @ p, unit @ step
    return (p * trace.rsqrt()).to(s.dtype)


def iterative_whitening(
    x: Tensor, *, groups: int = 1, iterations: int = 5, eps: float = 1e-5
) -> Tensor:
    r"""Whitening over the batch by Newton's iteration (IterNorm), group by group of channels.

    Per group: $\Sigma = \operatorname{cov}(x) + \varepsilon I$ over batch and positions,
    $y = (x-\mu)\,\Sigma^{-1/2}$ with `iterations` steps of `newton_schulz`; symmetric, so channels keep their
    meaning (ZCA).

    Args:
        x: (N, C, *), float32, float64, bfloat16 or float16.
        groups: divides C.
        iterations: 5 in the paper; fewer whiten less.
        eps: added to the diagonal.

    Shapes: (N, C, *) -> (N, C, *). Differentiable.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Huang et al., "Iterative Normalization: Beyond Standardization towards Efficient Whitening", 2019.
    Composition over core `moments2`.
    """
    _check.tensor("x", x, min_dim=2)
    eps = _check.number("eps", eps, low=0.0)
    channels = x.shape[1]
    if isinstance(groups, bool) or not isinstance(groups, int) or groups < 1 or channels % groups:
        raise ValueError(f"groups: expected a divisor of {channels} channels, got {groups!r}")
    rows = x.movedim(1, -1).reshape(-1, channels)
    out = []
    for part in rows.chunk(groups, 1):
        mean, matrix = covariance(part)
        eye = torch.eye(part.shape[1], dtype=matrix.dtype, device=x.device)
        root = newton_schulz(matrix + eps * eye, iterations, "inverse_sqrt")
        out.append(((part.to(root.dtype) - mean) @ root).to(x.dtype))
    shape = x.movedim(1, -1).shape
    return torch.cat(out, 1).reshape(shape).movedim(-1, 1)
