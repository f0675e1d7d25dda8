"""Amortised directions of the sliced Wasserstein distance."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SelfAttentionProjection(nn.Module):
    r"""The mean direction of a pair of point clouds: $\mu = \mathrm{normalize}((A(x) + A(y)) / 2)$.

    $A(x) = \frac1n \sum_i q_i (k^\top v)$ is efficient self-attention averaged over the points:
    $q = \mathrm{softmax}_{d_k}(x W_q)$, $k = \mathrm{softmax}_n(x W_k)$, $v = x W_v$; linear in the number of points.

    Trained in two steps: mu ascends `sliced_wasserstein(x, y, vmf_sample(mu, kappa, L))` with the clouds detached, then
    the clouds descend it with mu detached.

    Args:
        dim: d, coordinates of a point. key_dim: d_k.

    Shapes: (..., n, d), (..., m, d) -> (..., d), of length one.

    Source: Nguyen, Nguyen, Ho, "Self-Attention Amortized Distributional Projection Optimization for Sliced Wasserstein
    Point-Cloud Reconstruction", 2023; Shen et al., "Efficient Attention", 2021.
    """

    def __init__(self, dim: int, key_dim: int = 64) -> None:
        super().__init__()
        self.dim, self.key_dim = dim, key_dim
        self.query = nn.Linear(dim, key_dim, bias=False)
        self.key = nn.Linear(dim, key_dim, bias=False)
        self.value = nn.Linear(dim, dim, bias=False)

    def pool(self, x: Tensor) -> Tensor:
        """A(x). Shapes: (..., n, d) -> (..., d)."""
        context = self.key(x).softmax(-2).transpose(-1, -2) @ self.value(x)
        return (self.query(x).softmax(-1).mean(-2, keepdim=True) @ context).squeeze(-2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for name, t in (("x", x), ("y", y)):
            if t.dim() < 2 or t.shape[-1] != self.dim:
                raise ValueError(
                    f"{name}: expected shape (..., points, {self.dim}), got {tuple(t.shape)}"
                )
        return torch.nn.functional.normalize((self.pool(x) + self.pool(y)) / 2, dim=-1)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, key_dim={self.key_dim}"
