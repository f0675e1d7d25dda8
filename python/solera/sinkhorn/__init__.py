"""Sinkhorn iterations: entropic optimal transport and matrix scaling."""

from .barycenters import barycenter, free_support_barycenter
from .clusters import kmeans_assign, laplacian_assign, soft_assign_pool
from .dense import sinkhorn
from .directions import vmf_sample
from .divergence import sinkhorn_divergence
from .dual import c_transform, dual_ascent, semi_dual_cost
from .frechet import frechet_argmin, frechet_assign, project_simplex
from .gromov_wasserstein import GromovResult, gromov_wasserstein
from .listwise import pld_loss
from .low_rank import LowRankResult, low_rank_sinkhorn, squared_distance_factors
from .matching import log_optimal_transport
from .newton_sparse import NewtonResult, sinkhorn_newton_sparse
from .permutations import gumbel_sinkhorn, soft_rank, soft_sort
from .points import SinkhornPointsResult, sinkhorn_points, soft_c_transform
from .result import SinkhornResult
from .scaling import PriorMatch, balanced_assignment, null_offsets, prior_match
from .sliced import sliced_wasserstein
from .slots import SlotState, slot_accumulate, slot_finalize, slot_normalize
from .small import sinkhorn_normalize
from .top_k import soft_top_k
from .transfer import (
    TransferCost,
    conditional_entropy,
    select_sources,
    transfer_cost,
    transport_gradient,
)

__all__ = [
    "GromovResult",
    "LowRankResult",
    "NewtonResult",
    "PriorMatch",
    "SinkhornPointsResult",
    "SinkhornResult",
    "SlotState",
    "TransferCost",
    "balanced_assignment",
    "barycenter",
    "c_transform",
    "conditional_entropy",
    "dual_ascent",
    "frechet_argmin",
    "frechet_assign",
    "free_support_barycenter",
    "gromov_wasserstein",
    "gumbel_sinkhorn",
    "kmeans_assign",
    "laplacian_assign",
    "log_optimal_transport",
    "low_rank_sinkhorn",
    "null_offsets",
    "pld_loss",
    "prior_match",
    "project_simplex",
    "select_sources",
    "semi_dual_cost",
    "sinkhorn",
    "sinkhorn_divergence",
    "sinkhorn_newton_sparse",
    "sinkhorn_normalize",
    "sinkhorn_points",
    "sliced_wasserstein",
    "slot_accumulate",
    "slot_finalize",
    "slot_normalize",
    "soft_assign_pool",
    "soft_c_transform",
    "soft_rank",
    "soft_sort",
    "soft_top_k",
    "squared_distance_factors",
    "transfer_cost",
    "transport_gradient",
    "vmf_sample",
]
