"""Sinkhorn iterations: entropic optimal transport and matrix scaling."""

from .dense import sinkhorn
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
