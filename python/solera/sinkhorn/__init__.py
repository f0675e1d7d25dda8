"""Sinkhorn iterations: entropic optimal transport and matrix scaling."""

from .dense import sinkhorn
from .points import SinkhornPointsResult, sinkhorn_points, soft_c_transform
from .result import SinkhornResult

__all__ = [
    "SinkhornPointsResult",
    "SinkhornResult",
    "sinkhorn",
    "sinkhorn_points",
    "soft_c_transform",
]
