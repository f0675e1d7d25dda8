"""GPU form of core `model_stock`: the kernels of gram, and of lincomb or row_lincomb, one after the other.

2 K + 3 streams. The sums that the CPU keeps in its last-level cache between two passes over a tensor would be
one more stream written and read here (K + 5 together): not built before it can be measured.
"""

from ...weights.model_stock import given_dots, stock_coefficients
from .gram import gram
from .lincomb import lincomb
from .row_lincomb import row_lincomb


def model_stock(tensors, base, models, by_row, dots=None):
    if dots is None:
        dots = gram(tensors, base, models, by_row)
    else:
        dots = given_dots(dots, tensors, models, by_row)
    combine = row_lincomb if by_row else lincomb
    return combine(tensors, stock_coefficients(dots), base, None), dots


def aot():
    """No kernels but theirs."""
    return ()
