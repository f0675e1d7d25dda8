"""Weight interpolation: combinations and moving averages of the weights of several models."""

from .ema import ema_
from .lincomb import lincomb

__all__ = ["ema_", "lincomb"]
