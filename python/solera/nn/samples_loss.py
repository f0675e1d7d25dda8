"""SamplesLoss: the Sinkhorn divergence as a criterion, with geomloss's arguments."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .. import _check
from ..sinkhorn.divergence import annealed_loss

_BACKENDS = ("auto", "tensorized", "online", "multiscale")


class SamplesLoss(nn.Module):
    r"""The Sinkhorn divergence between sampled measures, annealed; geomloss's arguments, call forms and values.

    $C(x, y) = |x - y|^p / p$, $\varepsilon = \mathrm{blur}^p$, $\rho = \mathrm{reach}^p$. Both potentials are
    updated at once and averaged with what they were, one step at each epsilon from diameter^p down by
    scaling^p to blur^p, then once more without averaging; the gradient is that of the last update. Nothing of
    size n x m is stored, whatever `backend` says: every one of its names takes the same kernels.

    Args:
        loss: "sinkhorn".
        p: 1 or 2.
        blur: the finest scale, a length.
        reach: None (balanced) or a length (marginals by KL).
        diameter: where the annealing starts; None takes the diagonal of the box around both clouds (which
            reads it back from the device).
        scaling: in (0, 1): ratio of successive scales; nearer 1 is more exact and slower.
        cost: None, or one of `sinkhorn_points`' names in the place of |x - y|^p / p.
        debias: subtract the two terms of a measure with itself.
        potentials: return the dual potentials (F, G) in the place of the value.
        truncate, kernel, cluster_scale, verbose, backend: accepted, without effect (no truncation is made).

    Shapes: (x, y) or (a, x, b, y) with x (n, d), y (m, d), a (n,) or (n, 1) -> (); with x (B, n, d), a (B, n)
    or (B, n, 1) -> (B,). With potentials=True a pair of the weights' shapes (n,), (m,) or (B, n), (B, m).

    Differs from geomloss 0.3.1 in three places: potentials of a single problem are (n,), where some of its backends
    put a batch of one before; with `reach`, gradients to the points are
    those of the value (its own lack a factor (rho + epsilon) / (rho + epsilon / 2)), and at p = 1 the distance
    of a point to itself is 0, not 1e-4.

    Raises:
        ValueError, TypeError: naming the argument.

    Source: Feydy et al., "Interpolating between Optimal Transport and MMD using Sinkhorn Divergences", 2019;
    the annealed averaged updates: Feydy, "Geometric data analysis, beyond convolutions", 2020, section 3.3.
    """

    def __init__(
        self,
        loss: str = "sinkhorn",
        p: int = 2,
        blur: float = 0.05,
        reach: float | None = None,
        diameter: float | None = None,
        scaling: float = 0.5,
        truncate: float | None = 5,
        cost: str | None = None,
        kernel: Any = None,
        cluster_scale: float | None = None,
        debias: bool = True,
        potentials: bool = False,
        verbose: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        _check.choice("loss", loss, ("sinkhorn",))
        _check.choice("p", p, (1, 2))
        _check.choice("backend", backend, _BACKENDS)
        for name, value in (("blur", blur), ("reach", reach), ("diameter", diameter)):
            if value is not None and not _check.number(name, value) > 0:
                raise ValueError(f"{name}: expected a number > 0, got {value!r}")
        if not 0 < _check.number("scaling", scaling) < 1:
            raise ValueError(f"scaling: expected a number in (0, 1), got {scaling!r}")
        if cost is not None and not isinstance(cost, str):
            raise TypeError(f"cost: expected None or the name of a cost, got {type(cost).__name__}")
        self.loss, self.p, self.blur, self.reach = loss, p, blur, reach
        self.diameter, self.scaling, self.truncate = diameter, scaling, truncate
        self.cost, self.kernel, self.cluster_scale = cost, kernel, cluster_scale
        self.debias, self.potentials = debias, potentials
        self.verbose, self.backend = verbose, backend

    def forward(self, *args: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """(x, y) or (a, x, b, y).

        Shapes: see the class.
        """
        if len(args) == 2:
            (x, y), a, b = args, None, None
        elif len(args) == 4:
            a, x, b, y = args
        else:
            raise ValueError(
                f"SamplesLoss: expected (x, y) or (a, x, b, y), got {len(args)} arguments"
            )
        _check.tensor("x", x, min_dim=2)
        _check.tensor("y", y, min_dim=2)
        if x.dim() > 3 or y.dim() != x.dim():
            raise ValueError(
                f"x, y: expected (n, d) or (B, n, d) each, got {tuple(x.shape)} and {tuple(y.shape)}"
            )
        out = annealed_loss(
            x, y, _flat("a", a, x), _flat("b", b, y), p=self.p, blur=self.blur, reach=self.reach,
            diameter=self.diameter, scaling=self.scaling, cost=self.cost, debias=self.debias,
            potentials=self.potentials,
        )  # fmt: skip
        return out

    def extra_repr(self) -> str:
        return (
            f"loss={self.loss!r}, p={self.p}, blur={self.blur}, reach={self.reach}, "
            f"scaling={self.scaling}, debias={self.debias}, potentials={self.potentials}"
        )


def _flat(name: str, weight: Tensor | None, points: Tensor) -> Tensor | None:
    """Weights (..., n, 1) as (..., n)."""
    if isinstance(weight, Tensor) and weight.dim() == points.dim() and weight.shape[-1] == 1:
        return weight.squeeze(-1)
    return weight
