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
from .row_lincomb import row_lincomb

__all__ = [
    "conv_lora_weight",
    "ema_",
    "gram",
    "karcher_mean",
    "lincomb",
    "merge",
    "merge_files",
    "methods",
    "model_stock",
    "multi_slerp",
    "principal_aggregate",
    "row_lincomb",
    "slerp",
    "softmax_margin_ce",
]
