"""Weight interpolation: combinations and moving averages of the weights of several models."""

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
from .chain import givens_chain, givens_merge, soft_orthogonality_penalty
from .conv_lora import conv_lora_weight
from .edits import (
    decomposed_fusion,
    low_rank_edit_,
    project_out,
    rank_one_edit_,
)
from .ema import ema_
from .householder import householder_chain, householder_merge, householder_penalty
from .lincomb import lincomb
from .merging import merge_hydra_, merge_lora_, merge_melora_

__all__ = [
    "average_lora",
    "conv_lora_weight",
    "decomposed_fusion",
    "diag_low_rank_linear",
    "ema_",
    "givens_chain",
    "givens_merge",
    "householder_chain",
    "householder_merge",
    "householder_penalty",
    "ldu_init",
    "lincomb",
    "low_rank_delta",
    "low_rank_edit_",
    "low_rank_linear",
    "merge_hydra_",
    "merge_lora_",
    "merge_melora_",
    "nested_lora_linear",
    "project_out",
    "proto_calibrate",
    "rank_one_edit_",
    "soft_orthogonality_penalty",
    "svd_split",
    "weighted_lora_sum",
]
