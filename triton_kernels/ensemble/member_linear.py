"""GPU launchers of core `member_linear`: the formulas are in solera/ensemble/member_linear.py.

The kernels are in _product.py; here each member has a weight (I, O) of its own, and there are no scales.
"""

from __future__ import annotations

from collections.abc import Iterator

from .._aot import AotCase
from ._product import backward, forward, product_cases


def _strides(weight):
    return weight.shape[1] * weight.shape[2], weight.shape[2], 1


def member_linear(x, weight, bias, activation):
    strides = _strides(weight)
    return forward(x, weight, None, None, bias, activation, False, weight.shape[0], strides)[0]


def member_linear_saved(x, weight, bias, activation):
    strides = _strides(weight)
    return forward(x, weight, None, None, bias, activation, True, weight.shape[0], strides)


def member_linear_backward(
    dy, x, weight, saved, activation, bias_per_member, need_x, need_weight, need_bias
):
    dx, dweight, _, _, dbias = backward(
        dy, x, weight, None, None, saved, activation, bias_per_member, need_x, need_weight, False,
        False, need_bias, _strides(weight),
    )  # fmt: skip
    return dx, dweight if need_weight else weight.new_empty(0), dbias


def aot() -> Iterator[AotCase]:
    return product_cases("member_linear", separate=True)
