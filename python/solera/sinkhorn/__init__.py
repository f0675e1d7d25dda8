"""Sinkhorn iterations: entropic optimal transport and matrix scaling."""

from .dense import sinkhorn
from .newton_sparse import NewtonResult, sinkhorn_newton_sparse
from .result import SinkhornResult

__all__ = ["NewtonResult", "SinkhornResult", "sinkhorn", "sinkhorn_newton_sparse"]
