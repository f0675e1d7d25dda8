"""Activations and their derivatives in Triton, by the codes of python/solera/_activation.py."""

import triton
import triton.language as tl


@triton.jit
def activate(z, ACT: tl.constexpr):
    if ACT == 1:
        z = tl.where(z <= 0, 0.0, z)
    elif ACT == 2:
        z = z * 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACT == 3:
        z = z / (1.0 + tl.exp(-z))
    elif ACT == 4:
        z = 1.0 / (1.0 + tl.exp(-z))
    return z


@triton.jit
def slope(dy, v, ACT: tl.constexpr):
    """dy times the derivative of the activation; v is y or z for relu, z otherwise."""
    if ACT == 1:
        dy = tl.where(v <= 0, 0.0, dy)
    elif ACT == 2:
        cdf = 0.5 * (1.0 + tl.erf(v * 0.7071067811865476))
        dy = dy * (cdf + v * tl.exp(-0.5 * v * v) * 0.3989422804014327)
    elif ACT == 3:
        sigmoid = 1.0 / (1.0 + tl.exp(-v))
        dy = dy * sigmoid * (1.0 + v * (1.0 - sigmoid))
    elif ACT == 4:
        sigmoid = 1.0 / (1.0 + tl.exp(-v))
        dy = dy * sigmoid * (1.0 - sigmoid)
    return dy
