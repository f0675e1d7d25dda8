"""What all ways to merge have: the class `Method`, and the checks of their arguments."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from .. import _check
from .consensus import DIVISORS, VOTES

Tiling = Literal["elements", "rows", "whole"]
Numbers = tuple[float, ...]

_CHOICES: dict[str, tuple[str | None, ...]] = {
    "elect": VOTES[1:], "consensus": VOTES, "weigh": ("before", "after"), "divide": DIVISORS,
    "rescale": ("probability", "l1", None),
}  # fmt: skip

_BOUNDS: dict[str, dict[str, float]] = {
    "t": {}, "scale": {}, "colinear": {"low": 0.0, "high": 1.0}, "epsilon": {"low": 0.0, "high": 0.5},
}  # fmt: skip


def module(name: str):
    """A module of solera.weights, which itself imports the methods."""
    return importlib.import_module(f"solera.weights.{name}")


def function(name: str):
    """A function of solera.weights, likewise."""
    return getattr(importlib.import_module("solera.weights"), name)


def numbers(owner: object, name: str) -> None:
    """Turn a field that holds a list of numbers into a tuple of floats, which hashes."""
    value = getattr(owner, name)
    if value is None:
        return
    try:
        found = tuple(float(v) for v in value)
    except TypeError:
        raise TypeError(f"{name}: expected a list of numbers, got {value!r}") from None
    except ValueError:
        raise ValueError(f"{name}: expected a list of numbers, got {value!r}") from None
    if not found or not all(map(math.isfinite, found)):
        raise ValueError(f"{name}: expected finite numbers, one a model, got {value!r}")
    object.__setattr__(owner, name, found)


def shares(owner: object, name: str) -> None:
    """`numbers`, for weights that are divided by their sum."""
    numbers(owner, name)
    found = getattr(owner, name)
    if found is not None and math.fsum(found) == 0:
        raise ValueError(f"{name}: they add up to zero and cannot be normalized: {found}")


def within(name: str, value: float, low: float, high: float) -> None:
    """value is a number in [low, high], or a ValueError names the argument."""
    if not isinstance(value, int | float) or not low <= value <= high:
        raise ValueError(f"{name}: expected a number from {low:g} to {high:g}, got {value!r}")


def options(owner: Method) -> None:
    """The arguments that several methods share, refused when the method is made and not after hours of merging."""
    for name, options in _CHOICES.items():
        if hasattr(owner, name):
            _check.choice(name, getattr(owner, name), options)
    for name, bounds in _BOUNDS.items():
        if hasattr(owner, name):
            _check.number(name, getattr(owner, name), **bounds)
    dim = getattr(owner, "dim", None)
    if dim is not None and (isinstance(dim, bool) or not isinstance(dim, int)):
        raise TypeError(f"dim: expected an int or None, got {dim!r}")


class Study:
    """What must be known of all of a tensor before its first element is merged, from its parts, seen in order in one
    or several sweeps.
    """

    def add(
        self, tensors: Sequence[Tensor], base: Tensor | None, begin: int, dtype: torch.dtype
    ) -> None:
        """The part from element `begin` on; dtype: the result's."""
        raise NotImplementedError

    def turn(self) -> None:
        """A sweep is over."""


@dataclass(frozen=True)
class Method:
    """What all methods have. A subclass overrides `merge_tensor`, and `tiling` where a part of a tensor can be
    merged without the rest.
    """

    uses_base: ClassVar[bool] = False
    # A part of a tensor begins at a multiple of so many elements, where any elements can be merged alone.
    grain: ClassVar[int] = 1
    # Whether what `study` finds depends on the order of additions (known of the compiled CPU kernels alone).
    ordered: ClassVar[bool] = False
    # Whether the models may change places (with their weights); what draws random numbers for model k may not.
    symmetric: ClassVar[bool] = True

    def merge_tensor(
        self,
        name: str,
        tensors: Sequence[Tensor],
        base: Tensor | None,
        *,
        seed: int = 0,
        out_dtype: torch.dtype | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """The merged tensor `name`, in out_dtype (default: the promoted dtype); `out` may be written and returned."""
        raise NotImplementedError

    def tiling(self, shape: Sequence[int]) -> Tiling:
        """Which parts of a tensor can be merged alone: any elements, whole rows, or only all of it."""
        return "whole"

    def scratch(self, count: int) -> float:
        """Memory a call takes besides its inputs and its result, in accumulators an element."""
        return 0.0

    def study_bytes(self, count: int, elements: int) -> int:
        """Memory that a study takes, a part of `elements` added to it."""
        return 0

    def sweeps(self, wide: bool) -> int:
        """How often a tensor is read that does not fit in memory (wide: computed in float64); 1: it must fit."""
        return 1

    def study(self, name: str, shape: Sequence[int], count: int, wide: bool, seed: int) -> Study:
        """What the sweeps before the last one find out about all of a tensor, for `merge_tile`."""
        raise NotImplementedError

    def merge_tile(
        self,
        name: str,
        tensors: Sequence[Tensor],
        base: Tensor | None,
        study: Study | None,
        *,
        begin: int = 0,
        seed: int = 0,
        out_dtype: torch.dtype | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """A part of the merged tensor, from element `begin` on; `study` where it took several sweeps."""
        return self.merge_tensor(name, tensors, base, seed=seed, out_dtype=out_dtype, out=out)

    def models(self, count: int) -> tuple[int, ...]:
        """Which of the K models are read."""
        return tuple(range(count))

    def reads_base(self, count: int) -> bool:
        """Whether the base is read for K models."""
        return self.uses_base

    def check(self, count: int, base: bool) -> None:
        """An error if the method does not fit K models, with or without a base."""
        if self.uses_base and not base:
            raise ValueError(f"base: {self!r} needs one, got None")
        weights = getattr(self, "weights", None)
        if weights is not None and len(weights) != count:
            raise ValueError(
                f"weights: expected {count}, one for each model, got {len(weights)} in {self!r}"
            )

    def check_shape(self, name: str, shape: Sequence[int]) -> None:
        """An error if the method does not fit the tensor `name`."""

    def permuted(self, order: Sequence[int]) -> Method:
        """The same method for the models in another order."""
        weights = getattr(self, "weights", None)
        if weights is None:
            return self
        return replace(self, weights=tuple(weights[i] for i in order))  # type: ignore[call-arg]

    def _mean_weights(self, count: int) -> list[float]:
        return list(getattr(self, "weights", None) or [1 / count] * count)


def widened(
    tensors: Sequence[Tensor], base: Tensor | None, out_dtype: torch.dtype | None
) -> tuple[list[Tensor], Tensor | None]:
    """As they are, or in the result's dtype where that is wider than theirs: else it would be rounded twice."""
    dtype = tensors[0].dtype
    for t in (*tensors[1:], *(() if base is None else (base,))):
        dtype = torch.promote_types(dtype, t.dtype)
    if out_dtype is None or torch.promote_types(dtype, out_dtype) == dtype:
        return list(tensors), base
    dtype = torch.promote_types(dtype, out_dtype)
    return [t.to(dtype) for t in tensors], None if base is None else base.to(dtype)
