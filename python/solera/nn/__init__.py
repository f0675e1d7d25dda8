"""Modules: drop-ins with the argument names and state_dict keys of the modules they replace."""

from .ensemble import LinearBatchEnsemble, LinearEnsemble
from .norm import LayerNorm, RMSNorm

__all__ = ["LayerNorm", "LinearBatchEnsemble", "LinearEnsemble", "RMSNorm"]
