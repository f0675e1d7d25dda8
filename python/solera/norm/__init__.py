"""Normalization variants: rows, channels, weights and logits brought to a scale."""

from .row_norm import layer_norm, rms_norm

__all__ = ["layer_norm", "rms_norm"]
