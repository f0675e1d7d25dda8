"""Batched ensemble forward passes: many models evaluated as one."""

from .adapters import batched_adapter, moe_lora_linear, multi_lora_linear
from .batch_ensemble import batch_ensemble_linear
from .batch_ensemble_mlp import tabm_mlp
from .boosted import boosted_mlp, pseudo_residuals
from .cascades import Cascade, CascadeReport, fit_windows
from .connections import (
    hyper_connection_depth,
    hyper_connection_depth_width,
    hyper_connection_width,
    manifold_connection,
)
from .distillation import ensemble_distillation_loss
from .ensemble_conv import batch_ensemble_conv2d, ensemble_conv2d
from .ensemble_mlp import ensemble_mlp
from .expert_mixtures import (
    MixtureNLL,
    bayes_mixture_nll,
    domain_prior_scan,
    mixture_next,
    mixture_nll,
    posterior_update,
)
from .experts import embed_router, moe_ffn
from .fast_weights import fastweight_accumulate, fastweight_lora_linear, polar_normalize
from .gates import (
    TopKGate,
    adaptive_aux_coefficient,
    load_balance_loss,
    multi_hot_router_loss,
    norm_top_k_gate,
    threshold_balance_loss,
    threshold_gate,
    top_k_gate,
)
from .hyper_linear import hyper_conv2d, hyper_linear
from .hypernet import chunked_hypernet, hypernet_linear, hypernet_regularizer, mpo_linear
from .key_value import kv_bottleneck, nearest_keys, vq_ema_update_
from .likelihood_losses import (
    boost_margin_loss,
    cca_loss,
    l2_momentum_step_,
    pass_at_n_loss,
    self_distillation_loss,
)
from .logit_combinations import combine_logits, knn_mix_log_probs, mix_log_probs
from .low_rank import (
    adapter_bank_mix,
    adapter_fusion,
    average_lora,
    goat_split,
    hydra_linear,
    hydra_merge,
    melora_linear,
    melora_merge_,
    rank_one_shift,
)
from .member_linear import ensemble_linear
from .member_logits import ensemble_cross_entropy
from .member_losses import (
    DiversityLoss,
    MultiExpertLoss,
    diversity_loss,
    el2n,
    ensemble_mean_prob,
    log_mean_softmax,
    multi_expert_loss,
    prompt_ensemble_logits,
)
from .member_scores import (
    EnsembleMoments,
    TokenConfidence,
    Vote,
    crps_ensemble,
    ensemble_moments,
    score_ensemble,
    token_confidence,
    weighted_vote,
)
from .member_statistics import ensemble_statistics
from .members import Members, stack_members
from .mixed_layers import (
    binary_kl_norm,
    cat_linear,
    dual_head_linear,
    fanout_scale_grad,
    gated_mix,
    grad_scale,
    indexed_mlp,
    layer_ensemble_heads,
    mixing_gate,
    mixture_linear,
)
from .oblivious_forest import forest_leaves, leaf_kernel_apply, oblivious_forest, smoother_weights
from .pair_losses import multi_head_contrastive_loss
from .particles import Resampled, afdps_step, fkc_step, smc_resample
from .prompt_ensembles import (
    merge_text_heads,
    prompt_bias,
    prompt_weights,
    segment_similarity,
    select_descriptions,
)
from .prompts import prompt_scores
from .prototypes import (
    class_stats,
    cosine_logits,
    cosine_route,
    dual_head_logits,
    gda_head,
    prototype_calibrate,
    prototype_complement,
    subspace_cosine_logits,
)
from .routing import UncertaintyScores, cascade_merge_, uncertainty_scores, window_exit
from .sample_losses import energy_hinge, ensloss, flops_reg, pairwise_sigmoid_mean
from .tabm import fold_for_inference, member_mean_loss, scale_ensemble

__all__ = [
    "Cascade",
    "CascadeReport",
    "DiversityLoss",
    "EnsembleMoments",
    "Members",
    "MixtureNLL",
    "MultiExpertLoss",
    "Resampled",
    "TokenConfidence",
    "TopKGate",
    "UncertaintyScores",
    "Vote",
    "adapter_bank_mix",
    "adapter_fusion",
    "adaptive_aux_coefficient",
    "afdps_step",
    "average_lora",
    "batch_ensemble_conv2d",
    "batch_ensemble_linear",
    "batched_adapter",
    "bayes_mixture_nll",
    "binary_kl_norm",
    "boost_margin_loss",
    "boosted_mlp",
    "cascade_merge_",
    "cat_linear",
    "cca_loss",
    "chunked_hypernet",
    "class_stats",
    "combine_logits",
    "cosine_logits",
    "cosine_route",
    "crps_ensemble",
    "diversity_loss",
    "domain_prior_scan",
    "dual_head_linear",
    "dual_head_logits",
    "el2n",
    "embed_router",
    "energy_hinge",
    "ensemble_conv2d",
    "ensemble_cross_entropy",
    "ensemble_distillation_loss",
    "ensemble_linear",
    "ensemble_mean_prob",
    "ensemble_mlp",
    "ensemble_moments",
    "ensemble_statistics",
    "ensloss",
    "fanout_scale_grad",
    "fastweight_accumulate",
    "fastweight_lora_linear",
    "fit_windows",
    "fkc_step",
    "flops_reg",
    "fold_for_inference",
    "forest_leaves",
    "gated_mix",
    "gda_head",
    "goat_split",
    "grad_scale",
    "hydra_linear",
    "hydra_merge",
    "hyper_connection_depth",
    "hyper_connection_depth_width",
    "hyper_connection_width",
    "hyper_conv2d",
    "hyper_linear",
    "hypernet_linear",
    "hypernet_regularizer",
    "indexed_mlp",
    "knn_mix_log_probs",
    "kv_bottleneck",
    "l2_momentum_step_",
    "layer_ensemble_heads",
    "leaf_kernel_apply",
    "load_balance_loss",
    "log_mean_softmax",
    "manifold_connection",
    "melora_linear",
    "melora_merge_",
    "member_mean_loss",
    "merge_text_heads",
    "mix_log_probs",
    "mixing_gate",
    "mixture_linear",
    "mixture_next",
    "mixture_nll",
    "moe_ffn",
    "moe_lora_linear",
    "mpo_linear",
    "multi_expert_loss",
    "multi_head_contrastive_loss",
    "multi_hot_router_loss",
    "multi_lora_linear",
    "nearest_keys",
    "norm_top_k_gate",
    "oblivious_forest",
    "pairwise_sigmoid_mean",
    "pass_at_n_loss",
    "polar_normalize",
    "posterior_update",
    "prompt_bias",
    "prompt_ensemble_logits",
    "prompt_scores",
    "prompt_weights",
    "prototype_calibrate",
    "prototype_complement",
    "pseudo_residuals",
    "rank_one_shift",
    "scale_ensemble",
    "score_ensemble",
    "segment_similarity",
    "select_descriptions",
    "self_distillation_loss",
    "smc_resample",
    "smoother_weights",
    "stack_members",
    "subspace_cosine_logits",
    "tabm_mlp",
    "threshold_balance_loss",
    "threshold_gate",
    "token_confidence",
    "top_k_gate",
    "uncertainty_scores",
    "vq_ema_update_",
    "weighted_vote",
    "window_exit",
]
