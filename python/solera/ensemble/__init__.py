"""Batched ensemble forward passes: many models evaluated as one."""

from .batch_ensemble import batch_ensemble_linear
from .member_linear import ensemble_linear

__all__ = ["batch_ensemble_linear", "ensemble_linear"]
