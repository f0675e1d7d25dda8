"""Weight interpolation: combinations and moving averages of the weights of several models."""

from . import methods
from .conv_lora import conv_lora_weight
from .ema import ema_
from .federated import principal_aggregate, softmax_margin_ce
from .geometry import karcher_mean, model_stock, multi_slerp, slerp
from .gram import gram
from .lincomb import lincomb
from .merge import merge
from .merge_files import merge_files
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
from .row_lincomb import row_lincomb
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
    "gram",
    "karcher_mean",
    "lincomb",
    "masked_linear",
    "masked_update_",
    "masked_weight",
    "merge",
    "merge_files",
    "methods",
    "mix_logprobs",
    "mixout",
    "mixout_linear",
    "model_stock",
    "multi_slerp",
    "nonneg_project_",
    "prefix_mask",
    "principal_aggregate",
    "prune_grow_",
    "row_lincomb",
    "slerp",
    "softmax_margin_ce",
    "softplus_weight",
    "sparse_delta_linear",
    "sparse_delta_weight",
    "sparse_nuclear_norm",
    "sparse_select",
    "weight_compand",
    "weighted_sum",
]
