"""Weight interpolation: combinations and moving averages of the weights of several models."""

from . import methods
from .adapters import (
    average_lora,
    diag_low_rank_linear,
    ldu_init,
    low_rank_delta,
    low_rank_linear,
    nested_lora_linear,
    proto_calibrate,
    svd_split,
    weighted_lora_sum,
)
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
from .chain import givens_chain, givens_merge, soft_orthogonality_penalty
from .conv_lora import conv_lora_weight
from .distributed import average_parameters_, ema_over_group_, soup_over_group
from .edits import decomposed_fusion, low_rank_edit_, project_out, rank_one_edit_
from .ema import ema_
from .embeddings import (
    focal_info_nce,
    masked_mean_pool,
    mix_negatives,
    mix_pairs,
    pairwise_cosine_diversity,
)
from .federated import principal_aggregate, softmax_margin_ce
from .geometry import karcher_mean, multi_slerp, slerp
from .gram import gram
from .householder import householder_chain, householder_merge, householder_penalty
from .importance import importance_mask, importance_merge, masked_lerp_, prune_rewind
from .indexed_ema import class_ema_, indexed_ema_
from .learned import Soup
from .lincomb import lincomb
from .lookahead import lookahead_
from .merge import merge
from .merge_files import merge_files
from .merging import merge_hydra_, merge_lora_, merge_melora_
from .mixing import (
    coteaching_select,
    mix_logprobs,
    nonneg_project_,
    prefix_mask,
    softplus_weight,
    weighted_sum,
)
from .model_stock import model_stock
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
    "average_lora",
    "average_parameters_",
    "breadcrumbs",
    "cfg_kd_loss",
    "class_ema_",
    "conv_lora_weight",
    "coteaching_select",
    "dare",
    "decomposed_fusion",
    "della",
    "diag_low_rank_linear",
    "elr_loss",
    "ema_",
    "ema_over_group_",
    "erk_density",
    "focal_info_nce",
    "givens_chain",
    "givens_merge",
    "gradient_dropout",
    "gram",
    "greedy_soup",
    "householder_chain",
    "householder_merge",
    "householder_penalty",
    "importance_mask",
    "importance_merge",
    "indexed_ema_",
    "interpolate",
    "isogclr_loss",
    "karcher_mean",
    "kl_to_bank",
    "ldu_init",
    "lincomb",
    "lookahead_",
    "low_rank_delta",
    "low_rank_edit_",
    "low_rank_linear",
    "masked_lerp_",
    "masked_linear",
    "masked_mean_pool",
    "masked_update_",
    "masked_weight",
    "merge",
    "merge_files",
    "merge_hydra_",
    "merge_lora_",
    "merge_melora_",
    "methods",
    "mix_logprobs",
    "mix_negatives",
    "mix_pairs",
    "mixout",
    "mixout_linear",
    "model_stock",
    "multi_slerp",
    "nested_lora_linear",
    "nonneg_project_",
    "normalized_parameter_distance",
    "normalized_step",
    "pairwise_cosine_diversity",
    "perturb_weights_",
    "prefix_mask",
    "principal_aggregate",
    "project_out",
    "proto_calibrate",
    "prune_grow_",
    "prune_rewind",
    "rank_one_edit_",
    "rationale_loss",
    "row_lincomb",
    "running_mean_",
    "sam_perturb_",
    "sam_restore_",
    "slerp",
    "soft_orthogonality_penalty",
    "softmax_margin_ce",
    "softplus_weight",
    "soup",
    "soup_over_group",
    "sparse_delta_linear",
    "sparse_delta_weight",
    "sparse_nuclear_norm",
    "sparse_select",
    "svd_split",
    "task_arithmetic",
    "ties",
    "weight_compand",
    "weighted_lora_sum",
    "weighted_sum",
    "windowed_ema",
    "wise_ft",
]
