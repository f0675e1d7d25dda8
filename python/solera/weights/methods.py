"""Ways to merge, as values: what `merge` and `merge_files` are told to do with each tensor.

A method is a small frozen dataclass: it compares, hashes and pickles, and its repr is the call that makes it.
Its one hook, `merge_tensor`, makes one named tensor of the result from that tensor in each of the K models (and
in the base). Random methods draw from (seed, the tensor's name, the element), so that neither the order of
the tensors nor that of the files matters.

Shapes: any; the result has the shape of its inputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import _check
from .._registry import compiled_library
from ._method import Method, Numbers, function, module, numbers, options, shares, widened
from ._task_vectors import Breadcrumbs, Dare, Della, Ties

__all__ = [
    "Breadcrumbs", "Copy", "Dare", "Della", "FromBase", "Karcher", "Linear", "Method", "ModelStock", "MultiSlerp",
    "Same", "Slerp", "TaskArithmetic", "Ties",
]  # fmt: skip


# ---- elementwise -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Linear(Method):
    """sum_k w_k W_k, by default the mean; with `normalize` the weights are divided by their sum."""

    weights: Numbers | None = None
    normalize: bool = True

    def __post_init__(self):
        (shares if self.normalize else numbers)(self, "weights")

    def tiling(self, shape):
        return "elements"

    def coefficients(self, count: int) -> list[float]:
        weights = self.weights or (1.0,) * count
        total = math.fsum(weights) if self.normalize else 1.0
        return [w / total for w in weights]

    def merge_tensor(self, name, tensors, base, *, seed=0, out_dtype=None, out=None):
        return _lincomb(tensors, self.coefficients(len(tensors)), None, out_dtype, out)


@dataclass(frozen=True)
class TaskArithmetic(Method):
    """base + sum_k w_k (W_k - base). A single number is the weight of every model."""

    weights: Numbers | float
    uses_base: ClassVar[bool] = True

    def __post_init__(self):
        if isinstance(self.weights, int | float):
            _check.number("weights", self.weights)
        else:
            numbers(self, "weights")

    def tiling(self, shape):
        return "elements"

    def check(self, count, base):
        if isinstance(self.weights, tuple):
            super().check(count, base)
        elif not base:
            raise ValueError(f"base: {self!r} needs one, got None")

    def permuted(self, order):
        return super().permuted(order) if isinstance(self.weights, tuple) else self

    def merge_tensor(self, name, tensors, base, *, seed=0, out_dtype=None, out=None):
        weights = self.weights
        if not isinstance(weights, tuple):
            weights = (float(weights),) * len(tensors)
        return _lincomb(tensors, list(weights), base, out_dtype, out)


def _lincomb(tensors, coefficients, base, out_dtype, out):
    if out is None:
        return function("lincomb")(tensors, coefficients, base=base, out_dtype=out_dtype)
    return function("lincomb")(tensors, coefficients, base=base, out=out)


@dataclass(frozen=True)
class Copy(Method):
    """The tensor of one model, as it is. `index` counts the models in the order given."""

    index: int = 0
    symmetric: ClassVar[bool] = False

    def tiling(self, shape):
        return "elements"

    def models(self, count):
        return (self.index,)

    def check(self, count, base):
        if not isinstance(self.index, int) or not 0 <= self.index < count:
            raise ValueError(
                f"index: expected 0 to {count - 1} for {count} models, got {self.index!r}"
            )

    def merge_tensor(self, name, tensors, base, *, seed=0, out_dtype=None, out=None):
        return _cast(tensors[0], out_dtype, out)


@dataclass(frozen=True)
class FromBase(Method):
    """The base's tensor, as it is."""

    uses_base: ClassVar[bool] = True

    def tiling(self, shape):
        return "elements"

    def models(self, count):
        return ()

    def merge_tensor(self, name, tensors, base, *, seed=0, out_dtype=None, out=None):
        return _cast(base, out_dtype, out)


def _cast(t: Tensor, out_dtype: torch.dtype | None, out: Tensor | None) -> Tensor:
    return t.to(out_dtype or t.dtype) if out is None else out.copy_(t)


@dataclass(frozen=True)
class Same(Method):
    """The common value of all models: what integer and boolean tensors get. Differing values are an error."""

    def tiling(self, shape):
        return "elements"

    def merge_tensor(self, name, tensors, base, *, seed=0, out_dtype=None, out=None):
        first = tensors[0]
        for k, t in enumerate(tensors[1:], 1):
            if not torch.equal(_bits(t), _bits(first)):
                raise ValueError(
                    f"{name!r} is of {first.dtype}, which is not averaged, and differs between models 0 and "
                    f"{k}: make them equal, or give it a rule (Copy(0) or FromBase())"
                )
        return first


def _bits(t: Tensor) -> Tensor:
    """Bytes: torch.equal knows no float8, and takes no NaN for equal."""
    return t.contiguous().reshape(-1).view(torch.uint8)


# ---- geometry ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Geometric(Method):
    """What may work row by row: with `dim=0` each row of the first dimension is a vector of its own."""

    ordered: ClassVar[bool] = True

    def scratch(self, count):
        return 0.5 if compiled_library is not None else 4.0 * count

    def tiling(self, shape):
        return "rows" if getattr(self, "dim", None) == 0 and len(shape) > 1 else "whole"

    def check_shape(self, name, shape):
        dim = getattr(self, "dim", None)
        if dim is not None and len(shape) > 1 and not -len(shape) <= dim < len(shape):
            raise ValueError(f"dim: {dim} is out of range for {name!r} of shape {tuple(shape)}")

    def sweeps(self, wide):
        return 2 if getattr(self, "dim", None) is None else 1

    def study(self, name, shape, count, wide, seed):
        return module("_sweeps").Dots(self)

    def study_bytes(self, count, elements):
        # The dots of each chunk, as sums and as matrices.
        return -(-elements // module("_sweeps").CHUNK) * 16 * (count + 1) ** 2

    def vectors(
        self, tensors: Sequence[Tensor], base: Tensor | None, out_dtype: torch.dtype | None
    ) -> tuple[list[Tensor], Tensor | None]:
        """(the vectors whose dots count and that are combined, what they are taken from or None)."""
        return widened(tensors, None, out_dtype)

    def coefficients(self, dots: Tensor) -> Tensor:
        """(1, K) of the dots (1, K, K) of all of a tensor, as `merge_tensor` takes them."""
        raise NotImplementedError

    def merge_tile(self, name, tensors, base, study, *, begin=0, seed=0, out_dtype=None, out=None):
        if study is None:
            return self.merge_tensor(name, tensors, base, seed=seed, out_dtype=out_dtype, out=out)
        return self.merge_part(tensors, base, study.total, out)

    def merge_part(
        self, tensors: Sequence[Tensor], base: Tensor | None, dots: Tensor, out: Tensor
    ) -> Tensor:
        """A part of the merged tensor, with the dots (1, K, K) of all of it, written to `out` or not."""
        vectors, around = self.vectors(tensors, base, out.dtype)
        c = self.coefficients(dots).mT.contiguous()
        return function("lincomb")(vectors, c, base=around, out=out)


@dataclass(frozen=True)
class Slerp(Geometric):
    """Spherical interpolation from the first model (t = 0) to the second (t = 1), or from the base to one model."""

    t: float = 0.5
    dim: int | None = None
    colinear: float = 0.9995
    symmetric: ClassVar[bool] = False

    def __post_init__(self):
        options(self)

    def check(self, count, base):
        if count != 2 and not (count == 1 and base):
            raise ValueError(f"models: Slerp takes two, or one and a base, got {count}")

    def reads_base(self, count):
        return count == 1

    def vectors(self, tensors, base, out_dtype):
        ends = [base, *tensors] if len(tensors) == 1 else list(tensors)
        return widened(ends, None, out_dtype)

    def coefficients(self, dots):
        return module("geometry").slerp_coefficients(dots, float(self.t), float(self.colinear))

    def merge_tensor(self, name, tensors, base, *, seed=0, out_dtype=None, out=None):
        (a, b), _ = self.vectors(tensors, base, out_dtype)
        return function("slerp")(a, b, self.t, dim=self.dim, colinear=self.colinear)


@dataclass(frozen=True)
class MultiSlerp(Geometric):
    """Weighted spherical mean of K models, by default with equal weights, in the tangent space of their mean."""

    weights: Numbers | None = None

    def __post_init__(self):
        shares(self, "weights")

    def merge_tensor(self, name, tensors, base, *, seed=0, out_dtype=None, out=None):
        tensors, _ = widened(tensors, None, out_dtype)
        return function("multi_slerp")(tensors, self._mean_weights(len(tensors)))

    def coefficients(self, dots):
        w = dots.new_tensor(self._mean_weights(dots.shape[-1]))
        return module("geometry").sphere_mean(dots, w, 1, 0.0)


@dataclass(frozen=True)
class Karcher(Geometric):
    """Karcher (Fréchet) mean of K models on the sphere, by default with equal weights."""

    weights: Numbers | None = None

    def __post_init__(self):
        shares(self, "weights")

    def merge_tensor(self, name, tensors, base, *, seed=0, out_dtype=None, out=None):
        tensors, _ = widened(tensors, None, out_dtype)
        return function("karcher_mean")(tensors, self._mean_weights(len(tensors)))

    def coefficients(self, dots):
        w, found = dots.new_tensor(self._mean_weights(dots.shape[-1])), module("geometry")
        return found.sphere_mean(dots, w, found.KARCHER_STEPS, found.KARCHER_TOLERANCE)


@dataclass(frozen=True)
class ModelStock(Geometric):
    """Model Stock: the mean of K fine-tuned models drawn towards the base by the angle between them."""

    dim: int | None = None
    uses_base: ClassVar[bool] = True

    def __post_init__(self):
        options(self)

    def vectors(self, tensors, base, out_dtype):
        return widened(tensors, base, out_dtype)

    def merge_part(self, tensors, base, dots, out):
        tensors, base = self.vectors(tensors, base, out.dtype)
        part = module("model_stock").stock_part
        return part(base, tensors, dots)

    def scratch(self, count):
        # The sums between its two passes (of 8 MiB at most).
        return 1.0 if compiled_library is not None else super().scratch(count)

    def check(self, count, base):
        super().check(count, base)
        if count < 2:
            raise ValueError(f"models: ModelStock takes at least two, got {count}")

    def merge_tensor(self, name, tensors, base, *, seed=0, out_dtype=None, out=None):
        tensors, base = self.vectors(tensors, base, out_dtype)
        merged, _ = function("model_stock")(base, tensors, dim=self.dim)
        return merged
