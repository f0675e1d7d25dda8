"""Sinkhorn iterations: entropic optimal transport and matrix scaling."""

from .barycenters import barycenter, free_support_barycenter
from .dense import sinkhorn
from .dual import c_transform, dual_ascent, semi_dual_cost
from .gromov_wasserstein import GromovResult, gromov_wasserstein
from .low_rank import LowRankResult, low_rank_sinkhorn, squared_distance_factors
from .newton_sparse import NewtonResult, sinkhorn_newton_sparse
from .result import SinkhornResult

__all__ = [
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
]
