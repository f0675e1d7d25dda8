"""Sinkhorn iterations: entropic optimal transport and matrix scaling."""

from .clusters import kmeans_assign, laplacian_assign, soft_assign_pool
from .dense import sinkhorn
from .divergence import sinkhorn_divergence
from .frechet import frechet_argmin, frechet_assign, project_simplex
from .listwise import pld_loss
from .matching import log_optimal_transport
from .permutations import gumbel_sinkhorn, soft_rank, soft_sort
from .points import SinkhornPointsResult, sinkhorn_points, soft_c_transform
from .barycenters import barycenter, free_support_barycenter
from .dense import sinkhorn
from .dual import c_transform, dual_ascent, semi_dual_cost
from .gromov_wasserstein import GromovResult, gromov_wasserstein
from .low_rank import LowRankResult, low_rank_sinkhorn, squared_distance_factors
from .newton_sparse import NewtonResult, sinkhorn_newton_sparse
from .result import SinkhornResult
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
    "SinkhornPointsResult",
    "SinkhornResult",
    "TransferCost",
    "conditional_entropy",
    "frechet_argmin",
    "frechet_assign",
    "gumbel_sinkhorn",
    "kmeans_assign",
    "laplacian_assign",
    "log_optimal_transport",
    "pld_loss",
    "project_simplex",
    "select_sources",
    "sinkhorn",
    "sinkhorn_divergence",
    "sinkhorn_normalize",
    "sinkhorn_points",
    "soft_assign_pool",
    "soft_c_transform",
    "soft_rank",
    "soft_sort",
    "soft_top_k",
    "transfer_cost",
    "transport_gradient",
    "GromovResult",
    "LowRankResult",
    "NewtonResult",
    "SinkhornResult",
    "barycenter",
    "c_transform",
    "dual_ascent",
    "free_support_barycenter",
    "gromov_wasserstein",
    "low_rank_sinkhorn",
    "semi_dual_cost",
    "sinkhorn",
    "sinkhorn_newton_sparse",
    "squared_distance_factors",
from .directions import vmf_sample
from .result import SinkhornResult
from .scaling import PriorMatch, balanced_assignment, null_offsets, prior_match
from .sliced import sliced_wasserstein
from .slots import SlotState, slot_accumulate, slot_finalize, slot_normalize

__all__ = [
    "PriorMatch",
    "SinkhornResult",
    "SlotState",
    "balanced_assignment",
    "null_offsets",
    "prior_match",
    "sinkhorn",
    "sliced_wasserstein",
    "slot_accumulate",
    "slot_finalize",
    "slot_normalize",
    "vmf_sample",
]
