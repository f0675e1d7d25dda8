"""Sinkhorn iterations: entropic optimal transport and matrix scaling."""

from .clusters import kmeans_assign, laplacian_assign, soft_assign_pool
from .dense import sinkhorn
from .frechet import frechet_argmin, frechet_assign, project_simplex
from .listwise import pld_loss
from .divergence import sinkhorn_divergence
from .points import SinkhornPointsResult, sinkhorn_points, soft_c_transform
from .result import SinkhornResult
from .transfer import (
    TransferCost,
    conditional_entropy,
    select_sources,
    transfer_cost,
    transport_gradient,
)

__all__ = [
    "SinkhornResult",
    "frechet_argmin",
    "frechet_assign",
    "kmeans_assign",
    "laplacian_assign",
    "pld_loss",
    "project_simplex",
    "sinkhorn",
    "soft_assign_pool",
    "SinkhornPointsResult",
    "SinkhornResult",
    "TransferCost",
    "conditional_entropy",
    "select_sources",
    "sinkhorn",
    "sinkhorn_divergence",
    "sinkhorn_points",
    "soft_c_transform",
    "transfer_cost",
    "transport_gradient",
from .matching import log_optimal_transport
from .permutations import gumbel_sinkhorn, soft_rank, soft_sort
from .result import SinkhornResult
from .small import sinkhorn_normalize
from .top_k import soft_top_k

__all__ = [
    "SinkhornResult",
    "gumbel_sinkhorn",
    "log_optimal_transport",
    "sinkhorn",
    "sinkhorn_normalize",
    "soft_rank",
    "soft_sort",
    "soft_top_k",
]
