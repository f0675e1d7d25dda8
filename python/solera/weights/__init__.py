"""Weight interpolation: combinations and moving averages of the weights of several models."""

from .conv_lora import conv_lora_weight
from .ema import ema_
from .gram import gram
from .lincomb import lincomb
from .row_lincomb import row_lincomb

__all__ = ["conv_lora_weight", "ema_", "gram", "lincomb", "row_lincomb"]
