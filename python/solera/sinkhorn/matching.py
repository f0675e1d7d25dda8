r"""Matching with dustbins: log-domain Sinkhorn of scores extended by a row and a column for what has no match.

$$\bar S = \begin{pmatrix} S & \alpha\\ \alpha & \alpha\end{pmatrix},\quad
  \mu = \tfrac{1}{m + n}(1, .., 1, n),\quad \nu = \tfrac{1}{m + n}(1, .., 1, m),\qquad
  \log Z = \bar S + u 1^\top + 1 v^\top + \log(m + n),$$

u and v by T times $u_i = \log\mu_i - \mathrm{lse}_j(\bar S_{ij} + v_j)$,
$v_j = \log\nu_j - \mathrm{lse}_i(\bar S_{ij} + u_i)$ from v = 0: the solve of
core `dense` with cost $-\bar S$ and $\varepsilon = 1$, $u = \log\mu + f$, $v = \log\nu + g$.

Backward through the iterations: D, the gradient of $\log Z$, becomes that of $\bar S$ by
$D \leftarrow D - Q\,\mathrm{diag}(1^\top D)$ for a step of v with $Q = e^{\bar S + u + v} / \nu$, and
likewise for a step of u.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import _check
from .._autograd import differentiable_vjp
from .._registry import accumulate_type
from .._route import needs_graph
from .dense import sinkhorn
from .plan import transforms_active


def _marginals(z: Tensor) -> tuple[Tensor, Tensor]:
    """log mu (m + 1,) and log nu (n + 1,) of z (..., m + 1, n + 1)."""
    m, n = z.shape[-2] - 1, z.shape[-1] - 1
    log_mu, log_nu = (z.new_full((k + 1,), -math.log(m + n)) for k in (m, n))
    log_mu[m] += math.log(n)
    log_nu[n] += math.log(m)
    return log_mu, log_nu


def _potentials(z: Tensor, iterations: int) -> tuple[list[Tensor], list[Tensor]]:
    """u and v of every iteration, v's list beginning with 0."""
    log_mu, log_nu = _marginals(z)
    us, vs = [], [torch.zeros_like(z[..., 0, :])]
    for _ in range(iterations):
        us.append(log_mu - torch.logsumexp(z + vs[-1].unsqueeze(-2), -1))
        vs.append(log_nu - torch.logsumexp(z + us[-1].unsqueeze(-1), -2))
    return us, vs


def _formula(z: Tensor, iterations: int) -> Tensor:
    us, vs = _potentials(z, iterations)
    return z + us[-1].unsqueeze(-1) + vs[-1].unsqueeze(-2)


def _solve(z: Tensor, iterations: int) -> Tensor:
    log_mu, log_nu = _marginals(z)
    f, g = torch.zeros_like(z[..., 0]), (-log_nu).expand(z[..., 0, :].shape)
    mu, nu = log_mu.exp(), log_nu.exp()
    r = sinkhorn(-z, mu, nu, epsilon=1.0, max_iterations=iterations, init=(f, g), validate=False)
    return z + (r.f + log_mu).unsqueeze(-1) + (r.g + log_nu).unsqueeze(-2)


class _Unrolled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, iterations):
        ctx.save_for_backward(z)
        ctx.iterations = iterations
        return _solve(z, iterations)

    @staticmethod
    def backward(ctx, grad):
        (z,) = ctx.saved_tensors
        T = ctx.iterations
        if torch.is_grad_enabled():
            return differentiable_vjp(lambda z: _formula(z, T), (z,), (True,), (grad,))[0], None
        log_mu, log_nu = _marginals(z)
        us, vs = _potentials(z, T)
        d = grad
        for k in range(T - 1, -1, -1):
            u = us[k].unsqueeze(-1)
            q = torch.exp(z + u + (vs[k + 1] - log_nu).unsqueeze(-2))
            d = d - q * d.sum(-2, keepdim=True)
            q = torch.exp(z + (u - log_mu.unsqueeze(-1)) + vs[k].unsqueeze(-2))
            d = d - q * d.sum(-1, keepdim=True)
        return d, None


def log_optimal_transport(
    scores: Tensor, bin_score: Tensor | float, iterations: int = 100, *, gradient: str = "unrolled"
) -> Tensor:
    r"""Log-assignments of m to n with dustbins: each row matches a column or its bin, each column a row or its bin.

    The scores get a row and a column of `bin_score`; entropic transport (epsilon 1) then gives ordinary rows and
    columns mass 1 / (m + n), the row of bins n / (m + n) and the column of bins m / (m + n). The result is multiplied
    by m + n, so that an ordinary row of its exponential sums to 1.

    Args:
        scores: (..., m, n), m and n at least 1.
        bin_score: a number or a tensor of one element (learned).
        iterations: T >= 1.
        gradient: "unrolled", exactly that of the T iterations, which backward recomputes (T (m + n) numbers, no matrix,
            are kept while it runs; nothing but the scores is saved); "implicit", that of the limit, one linear solve.

    Shapes: scores (..., m, n), bin_score () -> (..., m + 1, n + 1) of scores's dtype, computed in float32 (float64 for
    float64). Twice differentiable.

    Raises:
        ValueError, TypeError: naming the argument.

    Source: the optimal matching layer of Sarlin et al., "SuperGlue", 2020 (Section 3.2), from its definition.
    """
    _check.tensor("scores", scores, min_dim=2)
    m, n = scores.shape[-2:]
    if m == 0 or n == 0:
        raise ValueError(f"scores: expected at least one row and column, got {tuple(scores.shape)}")
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
        raise ValueError(f"iterations: expected a positive integer, got {iterations!r}")
    _check.choice("gradient", gradient, ("unrolled", "implicit"))
    x = scores.to(accumulate_type(scores))
    if isinstance(bin_score, Tensor):
        if bin_score.numel() != 1:
            raise ValueError(
                f"bin_score: expected a number or one element, got shape {tuple(bin_score.shape)}"
            )
        _check.like("bin_score", bin_score, bin_score.shape, scores, "scores")
        bins = bin_score.reshape(()).to(x.dtype)
    else:
        bins = x.new_full((), _check.number("bin_score", bin_score))
    batch = x.shape[:-2]
    z = torch.cat([x, bins.expand(*batch, m, 1)], -1)
    z = torch.cat([z, bins.expand(*batch, 1, n + 1)], -2)
    if z.numel() == 0:
        return z.to(scores.dtype)
    if transforms_active():
        out = _formula(z, iterations)
    elif needs_graph(z) and gradient == "unrolled":
        out = _Unrolled.apply(z, iterations)
    else:
        out = _solve(z, iterations)
    return (out + math.log(m + n)).to(scores.dtype)
