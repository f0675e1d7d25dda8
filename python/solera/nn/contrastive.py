"""Modules of contrastive losses."""

from __future__ import annotations

from torch import Tensor, nn

from ..ensemble import multi_head_contrastive_loss


class _Temperature(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.phi = nn.Sequential(
            nn.Linear(width, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, width)
        )


class MultiHeadContrastiveLoss(nn.Module):
    """`solera.ensemble.multi_head_contrastive_loss` with its temperature network.

    Arguments and state_dict keys (`temperature.phi.<i>`) of the paper's public AMCLNTXentLoss.

    Args:
        dim: d of the heads' outputs. num_heads: H, held against the input.
        beta, tau_min, tau_max, topk: as the function's.
        temperature_hidden_dim: width of the network's hidden layer; dim unless given.

    Shapes: (B, H, d) twice -> ().

    Source: Wang, Koniusz, Gedeon, Zheng, "Adaptive Multi-head Contrastive Learning", 2024.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 3,
        beta: float = 0.01,
        tau_min: float = 1e-5,
        tau_max: float = 2.0,
        topk: int = 100,
        temperature_hidden_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.num_heads, self.beta, self.topk = dim, num_heads, beta, topk
        self.tau_min, self.tau_max = tau_min, tau_max
        self.temperature = _Temperature(dim, temperature_hidden_dim or dim)

    def forward(self, z1: Tensor, z2: Tensor) -> Tensor:
        if z1.dim() == 3 and z1.shape[1:] != (self.num_heads, self.dim):
            raise ValueError(
                f"z1: expected shape (B, {self.num_heads}, {self.dim}), got {tuple(z1.shape)}"
            )
        phi = self.temperature.phi
        dtype = next(phi.parameters()).dtype
        own = lambda z: phi(z.to(dtype))  # z comes in the accumulator's
        return multi_head_contrastive_loss(
            z1, z2, own, tau_min=self.tau_min, tau_max=self.tau_max,
            beta=self.beta, top_k=self.topk,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, beta={self.beta}, topk={self.topk}"
