"""Sinkhorn iterations: entropic optimal transport and matrix scaling."""

from .dense import sinkhorn
from .result import SinkhornResult

__all__ = ["SinkhornResult", "sinkhorn"]
