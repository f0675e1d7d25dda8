"""Sinkhorn iterations: entropic optimal transport and matrix scaling."""

from .clusters import kmeans_assign, laplacian_assign, soft_assign_pool
from .dense import sinkhorn
from .frechet import frechet_argmin, frechet_assign, project_simplex
from .listwise import pld_loss
from .result import SinkhornResult

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
]
