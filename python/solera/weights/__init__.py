"""Weight interpolation: combinations and moving averages of the weights of several models."""

from .conv_lora import conv_lora_weight
from .ema import ema_
from .lincomb import lincomb
from .reparam import gradient_dropout, masked_weight, mixout, weight_compand
from .reparam_linear import masked_linear, mixout_linear
from .sparse_delta import (
    sparse_delta_linear,
    sparse_delta_weight,
    sparse_nuclear_norm,
    sparse_select,
)

__all__ = [
    "conv_lora_weight",
    "ema_",
    "gradient_dropout",
    "lincomb",
    "masked_linear",
    "masked_weight",
    "mixout",
    "mixout_linear",
    "sparse_delta_linear",
    "sparse_delta_weight",
    "sparse_nuclear_norm",
    "sparse_select",
    "weight_compand",
]
