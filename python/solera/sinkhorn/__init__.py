"""Sinkhorn iterations: entropic optimal transport and matrix scaling."""

from .dense import sinkhorn
from .result import SinkhornResult
from .small import sinkhorn_normalize

__all__ = ["SinkhornResult", "sinkhorn", "sinkhorn_normalize"]
