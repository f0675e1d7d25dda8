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
]
