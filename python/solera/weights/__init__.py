"""Weight interpolation: combinations and moving averages of the weights of several models."""

from .chain import givens_chain, givens_merge, soft_orthogonality_penalty
from .conv_lora import conv_lora_weight
from .ema import ema_
from .lincomb import lincomb

__all__ = [
    "conv_lora_weight",
    "ema_",
    "givens_chain",
    "givens_merge",
    "lincomb",
    "soft_orthogonality_penalty",
]
