"""Weight interpolation: combinations and moving averages of the weights of several models."""

from . import methods
from .anchor import anchor_decay_, anchor_penalty, normalized_parameter_distance
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
from .distributed import average_parameters_, ema_over_group_, soup_over_group
from .ema import ema_
from .embeddings import (
    focal_info_nce,
    masked_mean_pool,
    mix_negatives,
    mix_pairs,
    pairwise_cosine_diversity,
)
from .federated import principal_aggregate, softmax_margin_ce
from .geometry import karcher_mean, model_stock, multi_slerp, slerp
from .gram import gram
from .importance import importance_mask, importance_merge, masked_lerp_, prune_rewind
from .indexed_ema import class_ema_, indexed_ema_
from .learned import Soup
from .lincomb import lincomb
from .lookahead import lookahead_
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
from .perturb import normalized_step, perturb_weights_, sam_perturb_, sam_restore_
from .reparam import gradient_dropout, masked_weight, mixout, weight_compand
from .reparam_linear import masked_linear, mixout_linear
from .row_lincomb import row_lincomb
from .sam import SAM
from .sparse_delta import (
    sparse_delta_linear,
    sparse_delta_weight,
    sparse_nuclear_norm,
    sparse_select,
)
from .sparse_merges import breadcrumbs, dare, della, ties
from .sparse_training import erk_density, masked_update_, prune_grow_
from .sweep import interpolate

__all__ = [
    "SAM",
    "GreedyLog",
    "GreedyStep",
    "Soup",
    "anchor_decay_",
    "anchor_penalty",
    "average_parameters_",
    "breadcrumbs",
    "cfg_kd_loss",
    "class_ema_",
    "conv_lora_weight",
    "coteaching_select",
    "dare",
    "della",
    "elr_loss",
    "ema_",
    "ema_over_group_",
    "erk_density",
    "focal_info_nce",
    "gradient_dropout",
    "gram",
    "greedy_soup",
    "importance_mask",
    "importance_merge",
    "indexed_ema_",
    "interpolate",
    "isogclr_loss",
    "karcher_mean",
    "kl_to_bank",
    "lincomb",
    "lookahead_",
    "masked_lerp_",
    "masked_linear",
    "masked_mean_pool",
    "masked_update_",
    "masked_weight",
    "merge",
    "merge_files",
    "methods",
    "mix_logprobs",
    "mix_negatives",
    "mix_pairs",
    "mixout",
    "mixout_linear",
    "model_stock",
    "multi_slerp",
    "nonneg_project_",
    "normalized_parameter_distance",
    "normalized_step",
    "pairwise_cosine_diversity",
    "perturb_weights_",
    "prefix_mask",
    "principal_aggregate",
    "prune_grow_",
    "prune_rewind",
    "rationale_loss",
    "row_lincomb",
    "running_mean_",
    "sam_perturb_",
    "sam_restore_",
    "slerp",
    "softmax_margin_ce",
    "softplus_weight",
    "soup",
    "soup_over_group",
    "sparse_delta_linear",
    "sparse_delta_weight",
    "sparse_nuclear_norm",
    "sparse_select",
    "task_arithmetic",
    "ties",
    "weight_compand",
    "weighted_sum",
    "windowed_ema",
    "wise_ft",
]
