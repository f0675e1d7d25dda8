"""Weight interpolation: combinations and moving averages of the weights of several models."""

from .averages import (
    GreedyLog,
    GreedyStep,
    greedy_soup,
    running_mean_,
    soup,
    task_arithmetic,
    windowed_ema,
    wise_ft,
)
from .bank_losses import cfg_kd_loss, elr_loss, isogclr_loss, kl_to_bank, rationale_loss
from .conv_lora import conv_lora_weight
from .ema import ema_
from .embeddings import (
    focal_info_nce,
    masked_mean_pool,
    mix_negatives,
    mix_pairs,
    pairwise_cosine_diversity,
)
from .indexed_ema import class_ema_, indexed_ema_
from .learned import Soup
from .lincomb import lincomb
from .lookahead import lookahead_
from .sweep import interpolate

__all__ = [
    "GreedyLog",
    "GreedyStep",
    "Soup",
    "cfg_kd_loss",
    "class_ema_",
    "conv_lora_weight",
    "elr_loss",
    "ema_",
    "focal_info_nce",
    "greedy_soup",
    "indexed_ema_",
    "interpolate",
    "isogclr_loss",
    "kl_to_bank",
    "lincomb",
    "lookahead_",
    "masked_mean_pool",
    "mix_negatives",
    "mix_pairs",
    "pairwise_cosine_diversity",
    "rationale_loss",
    "running_mean_",
    "soup",
    "task_arithmetic",
    "windowed_ema",
    "wise_ft",
]
