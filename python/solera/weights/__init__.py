"""Weight interpolation: combinations and moving averages of the weights of several models."""

from .conv_lora import conv_lora_weight
from .ema import ema_
from .importance import importance_mask, importance_merge, masked_lerp_, prune_rewind
from .lincomb import lincomb
from .sparse_merges import breadcrumbs, dare, della, ties

__all__ = [
    "breadcrumbs",
    "conv_lora_weight",
    "dare",
    "della",
    "ema_",
    "importance_mask",
    "importance_merge",
    "lincomb",
    "masked_lerp_",
    "prune_rewind",
    "ties",
]
