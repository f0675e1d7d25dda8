"""Sinkhorn iterations: entropic optimal transport and matrix scaling."""

from .dense import sinkhorn
from .directions import vmf_sample
from .result import SinkhornResult
from .scaling import PriorMatch, balanced_assignment, null_offsets, prior_match
from .sliced import sliced_wasserstein
from .slots import SlotState, slot_accumulate, slot_finalize, slot_normalize

__all__ = [
    "PriorMatch",
    "SinkhornResult",
    "SlotState",
    "balanced_assignment",
    "null_offsets",
    "prior_match",
    "sinkhorn",
    "sliced_wasserstein",
    "slot_accumulate",
    "slot_finalize",
    "slot_normalize",
    "vmf_sample",
]
