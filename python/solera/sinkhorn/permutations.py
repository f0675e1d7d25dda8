"""Permutations made soft by Sinkhorn: Gumbel-Sinkhorn, sorting, ranking. Compositions over `small` and `dense`."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from .. import _check
from .._registry import accumulate_type
from .dense import sinkhorn
from .dense_arguments import count as _count
from .small import MOST, sinkhorn_normalize


def _positive(name: str, value: object) -> float:
    number = _check.number(name, value)
    if not number > 0:
        raise ValueError(f"{name}: expected a number > 0, got {value!r}")
    return number


def _hard(soft: Tensor) -> Tensor:
    """The permutation matrices of largest total, found on the CPU by scipy."""
    try:
        solve = importlib.import_module("scipy.optimize").linear_sum_assignment
    except ImportError as error:
        raise ImportError(
            "gumbel_sinkhorn(hard=True) needs scipy for its linear assignment: pip install scipy"
        ) from error
    n = soft.shape[-1]
    flat = soft.detach().double().cpu().reshape(-1, n, n)
    columns = torch.stack([torch.as_tensor(solve(-p.numpy())[1]) for p in flat])
    return torch.nn.functional.one_hot(columns, n).reshape(soft.shape).to(soft)


def _gumbel(like: Tensor, seed: int) -> Tensor:
    """Gumbel noise in like's shape and dtype, a function of seed and of each element's place: one value anywhere."""
    from ..weights._random import random_words  # at the call: the weights family imports later

    words = random_words((seed + 2**63) % 2**64 - 2**63, 0, 0, like.numel(), like.device)
    # The middle of each of 2^32 intervals, so never 0 or 1; in float64, where the last one is not 1 yet.
    uniform = (words.reshape(like.shape).to(torch.float64) + 0.5) * 2.0**-32
    return -torch.log(-torch.log(uniform)).to(like.dtype)


def gumbel_sinkhorn(
    logits: Tensor,
    tau: float = 1.0,
    iterations: int = 20,
    *,
    noise: float = 1.0,
    n_samples: int = 1,
    hard: bool = False,
    seed: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Samples near permutation matrices: Sinkhorn of perturbed logits, $S((X + \sigma G) / \tau)$.

    G is Gumbel noise, $-\log(-\log U)$, drawn anew for each sample, $S$ is `iterations` of rows and columns in
    the log domain.
    As tau falls to 0 a sample tends to the permutation that maximises $\langle P, X + \sigma G\rangle$.

    Args:
        logits: (..., n, n), log-potentials of "row i goes to column j".
        tau: > 0, the temperature.
        noise: sigma >= 0, 0 for none.
        n_samples: S >= 1.
        hard: the permutation itself (by `scipy.optimize.linear_sum_assignment`, on the CPU), with the gradient of the
            soft one (straight-through).
        seed, generator: one of them, or neither, for the noise. A seed gives the same noise on every device, and
            under torch.compile (Philox4x32-10 of the seed and the element's place); a generator is torch's own.

    Shapes: (..., n, n) -> (S, ..., n, n) of logits's dtype. Exact gradient of the iterations.

    Raises:
        ValueError, TypeError: naming the argument.
        ImportError: hard without scipy.

    Source: Mena et al., "Learning Latent Permutations with Gumbel-Sinkhorn Networks", 2018 (Section 3, Eq. 5 to 7).
    """
    _check.tensor("logits", logits, min_dim=2)
    if logits.shape[-1] != logits.shape[-2]:
        raise ValueError(f"logits: expected square matrices, got shape {tuple(logits.shape)}")
    tau, noise = _positive("tau", tau), _check.number("noise", noise, low=0.0)
    _count("n_samples", n_samples)
    if seed is not None:
        if generator is not None:
            raise ValueError("seed: given together with generator")
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise TypeError(f"seed: expected an int, got {type(seed).__name__} {seed!r}")
    x = logits.to(accumulate_type(logits)).expand(n_samples, *logits.shape)
    if noise > 0 and seed is not None:
        x = x + noise * _gumbel(x, seed)
    elif noise > 0:
        # -log U of a uniform U is exponential.
        e = torch.empty_like(x, memory_format=torch.contiguous_format)
        x = x - noise * torch.log(e.exponential_(generator=generator))
    soft = sinkhorn_normalize(x / tau, iterations, variant="log").to(logits.dtype)
    return _hard(soft) + (soft - soft.detach()) if hard else soft


def _soft_permutation(x: Tensor, epsilon: float, iterations: int, squash: bool) -> Tensor:
    """n times the plan between x (..., n) and n increasing targets: rows sum to 1, columns too."""
    n = x.shape[-1]
    if squash:
        scale = x.detach().std(-1, keepdim=True, unbiased=False)
        x = torch.sigmoid((x - x.detach().mean(-1, keepdim=True)) / scale.clamp_min(1e-12))
    target = torch.linspace(0, 1, n, dtype=x.dtype, device=x.device)
    cost = (x.unsqueeze(-1) - target).square()
    if n <= MOST:
        return sinkhorn_normalize(-cost / epsilon, iterations, variant="log")
    return sinkhorn(cost, epsilon=epsilon, max_iterations=iterations, validate=False).plan() * n


def _soft_order(x, epsilon, iterations, direction, squash):
    _check.tensor("x", x, min_dim=1)
    epsilon = _positive("epsilon", epsilon)
    _count("iterations", iterations)
    _check.choice("direction", direction, ("ascending", "descending"))
    wide = x.to(accumulate_type(x))
    return wide, _soft_permutation(wide, epsilon, iterations, squash)


def soft_sort(
    x: Tensor,
    *,
    epsilon: float = 1e-2,
    iterations: int = 200,
    direction: str = "ascending",
    squash: bool = True,
) -> Tensor:
    r"""x sorted, differentiably: $s_j = n \sum_i P_{ij} x_i$, P the entropic plan from x to n increasing targets.

    The cost is $(\tilde x_i - y_j)^2$, $y$ from 0 to 1 in equal steps,
    $\tilde x = \sigma((x - \bar x) / \mathrm{std})$ with the mean and deviation held constant (`squash=False`:
    x itself, best within [0, 1]); uniform weights. As epsilon falls
    to 0 the result tends to the sorted values; with more epsilon they are drawn together.

    Args:
        x: (..., n). Up to n = 32 by `sinkhorn_normalize`, whose gradient is that of the iterations; beyond by
            `sinkhorn`, whose gradient is that of the limit.
        epsilon: > 0, in units of the squared distance of squashed values.
        iterations: of Sinkhorn; about 1 / epsilon of them settle the plan.
        direction: "ascending" or "descending".

    Shapes: (..., n) -> (..., n) of x's dtype.

    Raises:
        ValueError, TypeError: naming the argument.

    Source: Cuturi, Teboul, Vert, "Differentiable Ranking and Sorting using Optimal Transport", 2019 (Eq. 5, 6).
    """
    wide, plan = _soft_order(x, epsilon, iterations, direction, squash)
    out = (plan * wide.unsqueeze(-1)).sum(-2)
    return (out.flip(-1) if direction == "descending" else out).to(x.dtype)


def soft_rank(
    x: Tensor,
    *,
    epsilon: float = 1e-2,
    iterations: int = 200,
    direction: str = "ascending",
    squash: bool = True,
) -> Tensor:
    r"""The rank of each x, from 1 to n, differentiably: $r_i = n \sum_j P_{ij}\,j$, P as in `soft_sort`.

    Args:
        x, epsilon, iterations, squash: as in `soft_sort`.
        direction: "ascending" gives the smallest x rank 1, "descending" the largest.

    Shapes: (..., n) -> (..., n) of x's dtype.

    Raises:
        ValueError, TypeError: naming the argument.

    Source: Cuturi, Teboul, Vert, "Differentiable Ranking and Sorting using Optimal Transport", 2019 (Eq. 5, 6).
    """
    wide, plan = _soft_order(x, epsilon, iterations, direction, squash)
    n = x.shape[-1]
    rank = (plan * torch.arange(1, n + 1, dtype=wide.dtype, device=x.device)).sum(-1)
    return (n + 1 - rank if direction == "descending" else rank).to(x.dtype)
