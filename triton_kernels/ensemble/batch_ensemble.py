"""GPU launchers of core `batch_ensemble`: the formulas are in solera/ensemble/batch_ensemble.py.

The kernels are in _product.py; here the weight (O, I) is the same for every member, and scales are given.
"""

from __future__ import annotations

from collections.abc import Iterator

from .._aot import AotCase
from ._product import backward, ensemble_sum_parts_kernel, forward, product_cases


def _strides(weight):
    return 0, 1, weight.shape[1]


def _members(x, r, s, bias):
    if x.dim() == 3:
        return x.shape[1]
    return next(t.shape[0] for t in (r, s, bias) if t is not None and t.dim() == 2)


def batch_ensemble(x, weight, r, s, bias, activation):
    strides, members = _strides(weight), _members(x, r, s, bias)
    return forward(x, weight, r, s, bias, activation, False, members, strides)[0]


def batch_ensemble_saved(x, weight, r, s, bias, activation):
    strides, members = _strides(weight), _members(x, r, s, bias)
    return forward(x, weight, r, s, bias, activation, True, members, strides)


def batch_ensemble_backward(dy, x, weight, r, s, saved, *options):
    return backward(dy, x, weight, r, s, saved, *options, _strides(weight))


def aot() -> Iterator[AotCase]:
    yield from product_cases("batch_ensemble", separate=False)
    yield AotCase(
        name="ensemble_sum_parts",
        fn=ensemble_sum_parts_kernel,
        signature={"parts": "*fp32", "out": "*fp32", "count": "i32", "n": "i32"},
        constexprs={"C": 1024},
        divisible_by_16=("parts", "out", "n"),
        num_warps=4,
    )
