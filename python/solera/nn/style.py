"""Modules of image style: U-GAT-IT's AdaLIN and ILN, PONO and its moment shortcut, by their repositories' keys."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..norm.adalin import ada_layer_instance_norm, layer_instance_norm
from ..norm.moex import moment_shortcut, positional_norm


class _Rho(nn.Module):
    """A blend of instance (rho = 1) and layer normalisation (rho = 0) for each channel."""

    rho: Tensor

    def __init__(self, num_features: int, eps: float, start: float) -> None:
        super().__init__()
        self.num_features, self.eps = num_features, eps
        self.rho = nn.Parameter(torch.full((1, num_features, 1, 1), start))

    @torch.no_grad()
    def clip_rho_(self) -> None:
        """rho back into [0, 1], to be called after each optimizer step."""
        self.rho.clamp_(0.0, 1.0)

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}"


class AdaLIN(_Rho):
    """U-GAT-IT's adaILN on Solera's kernel: same arguments, start (rho = 0.9) and state_dict key `rho`.

    Args:
        num_features: C. eps: added to both variances.

    Shapes: x (N, C, *), gamma and beta (N, C) -> (N, C, *). Parameter: rho (1, C, 1, 1).

    Source: Kim et al., "U-GAT-IT", 2020, and its PyTorch code.
    """

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__(num_features, eps, 0.9)

    def forward(self, x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        return ada_layer_instance_norm(x, self.rho, gamma, beta, eps=self.eps)


class ILN(_Rho):
    """U-GAT-IT's ILN on Solera's kernel: same arguments, start (rho = 0) and keys `rho`, `gamma`, `beta`.

    Args:
        num_features: C. eps: added to both variances.

    Shapes: x (N, C, *) -> (N, C, *). Parameters: rho, gamma, beta (1, C, 1, 1).

    Source: Kim et al., "U-GAT-IT", 2020, and its PyTorch code.
    """

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__(num_features, eps, 0.0)
        self.gamma = nn.Parameter(torch.ones(1, num_features, 1, 1))
        self.beta = nn.Parameter(torch.zeros(1, num_features, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return layer_instance_norm(x, self.rho, self.gamma, self.beta, eps=self.eps)


class PositionalNorm(nn.Module):
    """PONO by the authors' arguments and keys: `positional_norm` with an affine for each position, if any.

    Args:
        input_size: x's spatial shape, for the affine; None where affine is False.
        return_stats: kept for the order of the arguments; the moments are always returned.
        affine: with `gamma` and `beta` of shape (1, 1, *input_size).
        eps: added to the variance.

    Shapes: x (N, C, *) -> (xhat (N, C, *), mean (N, 1, *), std (N, 1, *)).

    Source: Li et al., "Positional Normalization", 2019.
    """

    gamma: Tensor | None
    beta: Tensor | None

    def __init__(
        self,
        input_size: Sequence[int] | None = None,
        return_stats: bool = False,
        affine: bool = True,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if affine and input_size is None:
            raise ValueError("input_size: expected x's spatial shape with affine=True, got None")
        self.input_size = None if input_size is None else tuple(input_size)
        self.return_stats, self.affine, self.eps = return_stats, affine, eps
        for name, start in (("beta", torch.zeros), ("gamma", torch.ones)):
            value = nn.Parameter(start(1, 1, *input_size)) if affine and input_size else None
            self.register_parameter(name, value)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return positional_norm(x, self.gamma, self.beta, eps=self.eps)

    def extra_repr(self) -> str:
        return f"input_size={self.input_size}, affine={self.affine}, eps={self.eps}"


class MomentShortcut(nn.Module):
    """PONO-MS: puts a mean (`beta`) and a deviation (`gamma`) back, given here or at construction.

    Shapes: x (N, C, *), beta and gamma (N, 1, *) -> (N, C, *).

    Source: Li et al., "Positional Normalization", 2019.
    """

    def __init__(self, beta: Tensor | None = None, gamma: Tensor | None = None) -> None:
        super().__init__()
        self.beta, self.gamma = beta, gamma

    def forward(self, x: Tensor, beta: Tensor | None = None, gamma: Tensor | None = None) -> Tensor:
        beta = self.beta if beta is None else beta
        gamma = self.gamma if gamma is None else gamma
        if gamma is None:
            return x if beta is None else moment_shortcut(x, beta, torch.ones_like(beta))
        return moment_shortcut(x, torch.zeros_like(gamma) if beta is None else beta, gamma)
