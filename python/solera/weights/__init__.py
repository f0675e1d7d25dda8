"""Weight interpolation: combinations and moving averages of the weights of several models."""

from .anchor import anchor_decay_, anchor_penalty, normalized_parameter_distance
from .conv_lora import conv_lora_weight
from .distributed import average_parameters_, ema_over_group_, soup_over_group
from .ema import ema_
from .lincomb import lincomb
from .perturb import normalized_step, perturb_weights_, sam_perturb_, sam_restore_
from .sam import SAM

__all__ = [
    "SAM",
    "anchor_decay_",
    "anchor_penalty",
    "average_parameters_",
    "conv_lora_weight",
    "ema_",
    "ema_over_group_",
    "lincomb",
    "normalized_parameter_distance",
    "normalized_step",
    "perturb_weights_",
    "sam_perturb_",
    "sam_restore_",
    "soup_over_group",
]
