"""Hyper-connections as a module, with the names of the PyPI package hyper-connections."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import _check
from ..ensemble import hyper_connection_depth, hyper_connection_width


class _Norm(nn.Module):
    """Holds gamma, the norm's weight less 1."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(dim))


class HyperConnections(nn.Module):
    r"""n residual streams around a layer: $\hat H_j = \beta_j F(\sum_k\alpha_{k0}H_k) + \sum_k\alpha_{k,1+j}H_k$.

    Arguments, parameter names, start and layout are those of `hyper_connections.HyperConnections` (0.4), so that a
    state_dict of one loads into the other: streams lie in the batch, (batch * streams, ..., dim), as `expand` makes
    them. `norm="layer"` is the paper's norm, "rms" the package's.

    Args:
        num_residual_streams: n, at most 16.
        dim: features D.
        branch: the layer F; without one `forward` returns its input and a function that takes its output.
        layer_index: the stream the layer reads at the start, modulo n; a random one if None.
        tanh: the activation of the dynamic part.
        dropout: of the streams after the depth connection.
        norm, eps: of the streams before the dynamic part.

    Shapes: (batch * n, ..., D) -> the same. Parameters: static_alpha (n, n + 1), static_beta (n,), dynamic_alpha_fn
    (D, n + 1), dynamic_beta_fn (D,), dynamic_alpha_scale, dynamic_beta_scale (), norm.gamma (D,).

    Raises:
        ValueError: a batch that n does not divide, or other sizes than the parameters'.

    Source: Zhu et al., "Hyper-Connections", 2024.
    """

    def __init__(
        self,
        num_residual_streams: int,
        *,
        dim: int,
        branch: nn.Module | None = None,
        layer_index: int | None = None,
        tanh: bool = True,
        dropout: float = 0.0,
        norm: str = "rms",
        eps: float = 1e-12,
    ) -> None:
        super().__init__()
        _check.choice("norm", norm, ("rms", "layer"))
        n = num_residual_streams
        if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= 16:
            raise ValueError(f"num_residual_streams: expected an integer in [1, 16], got {n!r}")
        self.num_residual_streams, self.dim, self.tanh = n, dim, tanh
        self.norm_kind, self.eps, self.dropout = norm, eps, dropout
        self.branch = branch
        self.norm = _Norm(dim)
        first = torch.zeros(n, 1)
        first[(random.randrange(n) if layer_index is None else layer_index) % n] = 1.0
        self.static_alpha = nn.Parameter(torch.cat([first, torch.eye(n)], 1))
        self.dynamic_alpha_fn = nn.Parameter(torch.zeros(dim, n + 1))
        self.dynamic_alpha_scale = nn.Parameter(torch.tensor(0.01))
        self.static_beta = nn.Parameter(torch.ones(n))
        self.dynamic_beta_fn = nn.Parameter(torch.zeros(dim))
        self.dynamic_beta_scale = nn.Parameter(torch.tensor(0.01))

    def expand(self, x: Tensor) -> Tensor:
        """(batch, ...) -> (batch * n, ...): every stream starts as x."""
        return x.repeat_interleave(self.num_residual_streams, 0)

    def reduce(self, residuals: Tensor) -> Tensor:
        """(batch * n, ...) -> (batch, ...): the sum of the streams."""
        return self._split(residuals).sum(1)

    def _split(self, residuals: Tensor) -> Tensor:
        n = self.num_residual_streams
        _check.tensor("residuals", residuals, min_dim=2)
        if residuals.shape[0] % n:
            raise ValueError(
                f"residuals: expected a batch that {n} streams divide, got shape "
                f"{tuple(residuals.shape)}"
            )
        if residuals.shape[-1] != self.dim:
            raise ValueError(
                f"residuals: expected {self.dim} features in the last dimension, got shape "
                f"{tuple(residuals.shape)}"
            )
        return residuals.unflatten(0, (residuals.shape[0] // n, n))

    def forward(self, residuals: Tensor, *args: Any, **kwargs: Any) -> Any:
        h_in, rest, beta = hyper_connection_width(
            self._split(residuals), self.static_alpha, self.static_beta, self.dynamic_alpha_fn,
            self.dynamic_beta_fn, self.dynamic_alpha_scale, self.dynamic_beta_scale,
            self.norm.gamma + 1, norm=self.norm_kind, tanh=self.tanh, eps=self.eps, stream_dim=1,
        )  # fmt: skip

        def add_residual(out: Tensor) -> Tensor:
            _check.like("the branch's output", out, tuple(h_in.shape), residuals, "residuals")
            H = hyper_connection_depth(out, rest, beta, stream_dim=1).flatten(0, 1)
            return F.dropout(H, self.dropout, self.training) if self.dropout else H

        if self.branch is None:
            result: tuple[Tensor, Callable[[Tensor], Tensor]] = (h_in, add_residual)
            return result
        return add_residual(self.branch(h_in, *args, **kwargs))

    def extra_repr(self) -> str:
        return f"{self.num_residual_streams}, dim={self.dim}, norm={self.norm_kind!r}"
