"""Ways to merge that trim or thin task vectors and vote on signs: TIES, DARE, Breadcrumbs, DELLA.

Part of `solera.weights.methods`, which says what a method is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from .._registry import compiled_library
from ._method import Method, Numbers, function, module, numbers, options, widened, within


@dataclass(frozen=True)
class TaskVectors(Method):
    """What the methods of this file share: the base, weights, how parts are merged and masks drawn."""

    uses_base: ClassVar[bool] = True

    def scratch(self, count):
        return 1.0 if compiled_library is not None else 8.0 * count

    def __post_init__(self):
        numbers(self, "weights")
        within("density", getattr(self, "density"), 0.0, 1.0)  # noqa: B009
        within("gamma", getattr(self, "gamma", 0.0), 0.0, 1.0)
        options(self)

    def _voted(self) -> dict:
        """How a part is merged, as the whole function takes it."""
        elect = getattr(self, "elect", None) or getattr(self, "consensus", None)
        options = {"elect": elect, "weigh": getattr(self, "weigh", "before")}
        divide = getattr(self, "divide", None)
        return {**options, "divide": divide, "scale": getattr(self, "scale")}  # noqa: B009

    def _drawn(self, method, name, tensors, base, out_dtype, seed, options, **more):
        """By name, as state dicts of one entry, since masks are drawn by name."""
        tensors, base = widened(tensors, base, out_dtype)
        numbers = (self._mean_weights(len(tensors)), getattr(self, "density"))  # noqa: B009
        chosen = {key: getattr(self, key) for key in options}
        named = [{name: t} for t in tensors]
        return function(method)({name: base}, named, *numbers, seed=seed, **chosen, **more)[name]


# Counts of 16 bits for one rank: their sum so far, what a part adds, the running sum.
_RANK_BYTES = 3 * 8 << 16


def _rank_sweeps(wide: bool) -> int:
    return 5 if wide else 3


@dataclass(frozen=True)
class Ties(TaskVectors):
    """TIES: of each task vector the largest `density`, a sign by majority, the mean of those that agree.

    The threshold is taken tensor by tensor. Weights default to 1. Arguments as of `solera.weights.ties`.
    """

    density: float = 0.2
    weights: Numbers | None = None
    elect: str = "mass"
    weigh: str = "before"
    divide: str = "weight"
    scale: float = 1.0

    def merge_tensor(self, name, tensors, base, *, seed=0, out_dtype=None, out=None):
        tensors, base = widened(tensors, base, out_dtype)
        weights = list(self.weights or [1.0] * len(tensors))
        options = {key: getattr(self, key) for key in ("elect", "weigh", "divide", "scale")}
        return function("ties")(base, tensors, weights, self.density, **options)

    def sweeps(self, wide):
        return _rank_sweeps(wide)

    def study(self, name, shape, count, wide, seed):
        rank = module("sparse_merges").ties_rank(self.density, math.prod(shape))
        return module("_sweeps").Ranks([[rank]] * count, wide)

    def study_bytes(self, count, elements):
        return _RANK_BYTES * count

    def merge_tile(self, name, tensors, base, study, *, begin=0, seed=0, out_dtype=None, out=None):
        if study is None:
            return self.merge_tensor(name, tensors, base, seed=seed, out_dtype=out_dtype, out=out)
        tensors, base = widened(tensors, base, out_dtype)
        weights = list(self.weights or [1.0] * len(tensors))
        return module("sparse_merges").merged_part(
            base, tensors, weights, low=study.thresholds(0), **self._voted()
        )


@dataclass(frozen=True)
class Dare(TaskVectors):
    """DARE: each element of a task vector kept with probability `density` and rescaled. Weights default to 1 / K.

    Arguments as of `solera.weights.dare`.
    """

    density: float = 0.5
    weights: Numbers | None = None
    rescale: str | None = "probability"
    consensus: str | None = None
    scale: float = 1.0
    symmetric: ClassVar[bool] = False
    ordered: ClassVar[bool] = True
    grain: ClassVar[int] = 512  # elements that share blocks of random words

    def tiling(self, shape):
        return "whole" if self.rescale == "l1" else "elements"

    def sweeps(self, wide):
        return 2 if self.rescale == "l1" else 1

    def study(self, name, shape, count, wide, seed):
        drawn = module("sparse_merges").drawn_part(name, seed, [self.density] * count)
        return module("_sweeps").Magnitudes(drawn["keys"][0], drawn["keep"], drawn["seed"])

    def study_bytes(self, count, elements):
        # Sums of each chunk, and its tensors.
        return -(-elements // module("_sweeps").CHUNK) * 640 * count

    def merge_tensor(self, name, tensors, base, *, seed=0, out_dtype=None, out=None):
        options = ("rescale", "consensus", "scale")
        return self._drawn("dare", name, tensors, base, out_dtype, seed, options)

    def merge_tile(self, name, tensors, base, study, *, begin=0, seed=0, out_dtype=None, out=None):
        if study is None and self.rescale == "l1":
            return self.merge_tensor(name, tensors, base, seed=seed, out_dtype=out_dtype, out=out)
        tensors, base = widened(tensors, base, out_dtype)
        shares = [self.density] * len(tensors)
        drawn = module("sparse_merges").drawn_part(name, seed, shares, base.device)
        sums = None if study is None else study.total
        factors = module("sparse_merges").made_up(self.rescale, shares, sums, base.device)
        return module("sparse_merges").merged_part(
            base, tensors, self._mean_weights(len(tensors)), factors=factors, begins=[begin],
            **drawn, **self._voted(),
        )  # fmt: skip


@dataclass(frozen=True)
class Breadcrumbs(TaskVectors):
    """Model breadcrumbs: each task vector without its `gamma` largest elements, and of the rest the `density`
    largest. Weights default to 1 / K. Arguments as of `solera.weights.breadcrumbs`.
    """

    density: float = 0.9
    gamma: float = 0.01
    weights: Numbers | None = None
    consensus: str | None = None
    scale: float = 1.0

    def merge_tensor(self, name, tensors, base, *, seed=0, out_dtype=None, out=None):
        tensors, base = widened(tensors, base, out_dtype)
        numbers = (self._mean_weights(len(tensors)), self.density, self.gamma)
        options = {"consensus": self.consensus, "scale": self.scale}
        return function("breadcrumbs")(base, tensors, *numbers, **options)

    def sweeps(self, wide):
        return _rank_sweeps(wide)

    def study(self, name, shape, count, wide, seed):
        ranks = module("sparse_merges").breadcrumb_ranks(self.density, self.gamma, math.prod(shape))
        return module("_sweeps").Ranks([list(ranks)] * count, wide)

    def study_bytes(self, count, elements):
        return 2 * _RANK_BYTES * count

    def merge_tile(self, name, tensors, base, study, *, begin=0, seed=0, out_dtype=None, out=None):
        if study is None:
            return self.merge_tensor(name, tensors, base, seed=seed, out_dtype=out_dtype, out=out)
        tensors, base = widened(tensors, base, out_dtype)
        return module("sparse_merges").merged_part(
            base, tensors, self._mean_weights(len(tensors)), low=study.thresholds(0),
            high=study.thresholds(1), **self._voted(),
        )  # fmt: skip


@dataclass(frozen=True)
class Della(TaskVectors):
    """DELLA: elements dropped at random, smaller ones more often: kept with probability density - epsilon to
    density + epsilon by rank in the row. Weights default to 1 / K. Arguments as of `solera.weights.della`.
    """

    density: float = 0.5
    epsilon: float = 0.1
    weights: Numbers | None = None
    rescale: str | None = "probability"
    consensus: str | None = "mass"
    scale: float = 1.0
    symmetric: ClassVar[bool] = False

    def __post_init__(self):
        super().__post_init__()
        if not self.epsilon <= self.density <= 1 - self.epsilon:
            raise ValueError(
                f"epsilon: expected density - epsilon and density + epsilon in [0, 1], got density {self.density} "
                f"and epsilon {self.epsilon}"
            )

    def scratch(self, count):
        return 40.0 + 2.0 * count  # ranks by torch's sort, and their masks

    def tiling(self, shape):
        return "rows" if len(shape) > 1 and self.rescale != "l1" else "whole"

    @property
    def divide(self) -> str | None:
        """Without a vote nothing is divided by."""
        return None if self.consensus is None else "weight"

    def merge_tensor(self, name, tensors, base, *, seed=0, out_dtype=None, out=None):
        options = ("epsilon", "rescale", "consensus", "scale", "divide")
        return self._drawn("della", name, tensors, base, out_dtype, seed, options)

    def merge_tile(self, name, tensors, base, study, *, begin=0, seed=0, out_dtype=None, out=None):
        if begin == 0:
            return self.merge_tensor(name, tensors, base, seed=seed, out_dtype=out_dtype)
        tensors, base = widened(tensors, base, out_dtype)
        return module("sparse_merges").della_part(
            name, base, tensors, self._mean_weights(len(tensors)), self.density, seed=seed,
            epsilon=self.epsilon, rescale=self.rescale, begin=begin, **self._voted(),
        )  # fmt: skip
