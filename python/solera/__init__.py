"""Solera: fused kernels for ensembles, normalization, Sinkhorn iterations and weight interpolation."""

from . import _ops, ensemble, nn, norm, sinkhorn, weights
from ._route import backend

__version__ = "0.1.0"
__all__ = ["__version__", "backend", "ensemble", "nn", "norm", "sinkhorn", "weights"]
