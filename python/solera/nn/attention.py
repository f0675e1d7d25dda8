"""Modules for the inside of an attention layer."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .. import _check
from ..norm.qk_norm import KINDS, qk_norm


class _Side(nn.Module):
    """Holds the weight of q or of k under its name."""

    weight: nn.Parameter | None

    def __init__(self, weight: nn.Parameter | None):
        super().__init__()
        self.register_parameter("weight", weight)


class QKNorm(nn.Module):
    r"""Queries and keys normalised over the head dimension, with rotary embedding: see `solera.norm.qk_norm`.

    The weights live in submodules `q_norm` and `k_norm`, so that the keys are those of the models that hold two torch
    norms by these names (`q_norm.weight`, `k_norm.weight`).

    Args:
        head_dim: d.
        eps: None takes the kind's default.
        elementwise_affine: a weight of (d,) each for q and k, starting at 1.
        kind: "rms", "layer" (without bias), "l2" or "l2_add".
        length: of the training sequences (97.5th percentile). If given, q is multiplied by a learned `scale` that
            starts at $\log_2(L^2 - L)$ and replaces $1/\sqrt d$: call the attention with
            `scale=module.attention_scale`.
        interleaved, rotary_dim, seq_dim: as for qk_norm.

    Shapes: q (B, H, T, d), k (B, Hk, T, d) -> the same.

    Source: Henry et al., "Query-Key Normalization for Transformers", 2020.
    """

    def __init__(
        self,
        head_dim: int,
        eps: float | None = None,
        elementwise_affine: bool = True,
        *,
        kind: str = "rms",
        length: int | None = None,
        interleaved: bool = False,
        rotary_dim: int | None = None,
        seq_dim: int = -2,
        device=None,
        dtype=None,
    ):
        super().__init__()
        _check.choice("kind", kind, KINDS)
        if length is not None:
            _check.number("length", length, low=2)
        self.head_dim, self.eps, self.kind = head_dim, eps, kind
        self.interleaved, self.rotary_dim, self.seq_dim = interleaved, rotary_dim, seq_dim
        factory = {"device": device, "dtype": dtype}
        one = lambda: nn.Parameter(torch.ones(head_dim, **factory)) if elementwise_affine else None
        self.q_norm, self.k_norm = _Side(one()), _Side(one())
        start = None if length is None else math.log2(length * length - length)
        self.scale = None if start is None else nn.Parameter(torch.tensor(start, **factory))

    @property
    def attention_scale(self) -> float | None:
        """What to hand `scaled_dot_product_attention` as `scale`: 1.0 where the learned scale is in q."""
        return None if self.scale is None else 1.0

    def forward(
        self, q: Tensor, k: Tensor, cos: Tensor | None = None, sin: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return qk_norm(
            q, k, self.q_norm.weight, self.k_norm.weight, scale=self.scale, kind=self.kind,
            cos=cos, sin=sin, interleaved=self.interleaved,
            rotary_dim=self.rotary_dim if cos is not None else None, eps=self.eps,
            seq_dim=self.seq_dim,
        )  # fmt: skip

    def extra_repr(self) -> str:
        affine = self.q_norm.weight is not None
        return f"{self.head_dim}, eps={self.eps}, elementwise_affine={affine}, kind={self.kind!r}"
