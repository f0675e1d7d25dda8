"""Weight interpolation: combinations and moving averages of the weights of several models."""

from .conv_lora import conv_lora_weight
from .ema import ema_
from .lincomb import lincomb
from .mixing import (
    coteaching_select,
    mix_logprobs,
    nonneg_project_,
    prefix_mask,
    softplus_weight,
    weighted_sum,
)
from .reparam import gradient_dropout, masked_weight, mixout, weight_compand
from .reparam_linear import masked_linear, mixout_linear
from .sparse_delta import (
    sparse_delta_linear,
    sparse_delta_weight,
    sparse_nuclear_norm,
    sparse_select,
)
from .sparse_training import erk_density, masked_update_, prune_grow_

__all__ = [
    "conv_lora_weight",
    "coteaching_select",
    "ema_",
    "erk_density",
    "gradient_dropout",
    "lincomb",
    "masked_linear",
    "masked_update_",
    "masked_weight",
    "mix_logprobs",
    "mixout",
    "mixout_linear",
    "nonneg_project_",
    "prefix_mask",
    "prune_grow_",
    "softplus_weight",
    "sparse_delta_linear",
    "sparse_delta_weight",
    "sparse_nuclear_norm",
    "sparse_select",
    "weight_compand",
    "weighted_sum",
]
