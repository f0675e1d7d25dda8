"""Weight interpolation: combinations and moving averages of the weights of several models."""

from . import methods
from .conv_lora import conv_lora_weight
from .ema import ema_
from .lincomb import lincomb
from .merge import merge
from .merge_files import merge_files

__all__ = ["conv_lora_weight", "ema_", "lincomb", "merge", "merge_files", "methods"]
