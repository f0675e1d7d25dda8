"""Sinkhorn iterations: entropic optimal transport and matrix scaling."""

from .dense import sinkhorn
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
