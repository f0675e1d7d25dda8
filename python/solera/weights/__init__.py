"""Weight interpolation: combinations and moving averages of the weights of several models."""

from .conv_lora import conv_lora_weight
from .ema import ema_
from .lincomb import lincomb
from .sparse_merges import breadcrumbs, dare, della, ties

__all__ = [
    "breadcrumbs",
    "conv_lora_weight",
    "dare",
    "della",
    "ema_",
    "lincomb",
    "ties",
]
