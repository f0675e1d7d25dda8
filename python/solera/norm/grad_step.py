r"""Core `grad_step`: optimiser steps whose gradient is first brought to a norm.

**Stable-SPAM.** For each tensor, with t counting every step ($\hat\cdot$ is Adam's bias correction at t):

$$a \leftarrow \theta a + (1 - \theta) \max_i |g_i|,\quad
  g_i \leftarrow g_i\, \hat a / \max_j |g_j| \ \text{where}\ |g_i| > \hat a,$$
$$n = \lVert g \rVert,\quad m \leftarrow \gamma_1 m + (1 - \gamma_1) n,\quad
  v \leftarrow \gamma_2 v + (1 - \gamma_2) n^2,\quad
  g \leftarrow \frac{g}{n} \frac{\hat m}{\sqrt{\hat v} + \epsilon},$$

then AdamW, whose moments are zeroed every T steps and whose bias correction counts from there. The paper's code
restarts t as well and keeps a, m and v, so that their corrections inflate them (a by 1 / (1 - theta), a thousand
times) and clip nothing after a reset; here t goes on.

Three passes over memory: `tensor_norms` (max), `tensor_norms` of the clipped gradient, and `adam_step_`, which
clips and scales the gradient again as it reads it: g is never written. Between them (L,) tensors.

**Fira.** With the projected gradient R and Adam's update of it A, the residual $U = G - Q R$ is scaled column by
column by $\phi_j = \lVert A_{:j}\rVert / (\lVert R_{:j}\rVert + 10^{-8})$ (`fira_scale_`, which returns
$\lVert U \phi\rVert$ from the same pass), then limited in growth. Q R goes into the gradient's own memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import _check
from .._registry import reference
from .grad_norm import (
    _clipped,
    _wide,
    growth_factors,
    norms_of,
    previous_norms,
    run_in_place,
    scale_,
    tensor_list,
    writable,
)

# ---- reference ---------------------------------------------------------------------------------------


@reference("fira_scale_")
def _fira_scale(residuals, reduced, updates):
    """Each residual (m, n) times phi, along the side that reduced and update have whole; (L,) norms after."""
    norms = []
    for u, r, a in zip(residuals, reduced, updates, strict=True):
        dtype = _wide((u, r, a))
        # (r, n) with r < n: one phi a column; else (m, r): one a row.
        dim = 0 if r.shape[0] < r.shape[1] else 1
        r_norm = torch.linalg.vector_norm(r.to(dtype), 2, dim=dim, keepdim=True)
        a_norm = torch.linalg.vector_norm(a.to(dtype), 2, dim=dim, keepdim=True)
        if r.shape != a.shape or r_norm.shape[1 - dim] != u.shape[1 - dim]:
            raise RuntimeError("fira_scale_: residual, reduced and update do not fit")
        scaled = u.to(dtype) * (a_norm / (r_norm + 1e-8))
        u.copy_(scaled)
        norms.append(torch.linalg.vector_norm(scaled))
    if not norms:
        return torch.empty(0)
    return torch.stack([t.to(_wide((*residuals, *reduced, *updates))) for t in norms])


@reference("adam_step_")
def _adam_step(
    parameters, grads, exp_avg, exp_avg_sq, clip, scale, decay, step_size, beta1, beta2, eps,
    correction,
):  # fmt: skip
    """p <- decay p - step_size m / (sqrt(v) correction + eps), the gradient clipped and scaled as it is read."""
    for index, (p, g, m, v) in enumerate(zip(parameters, grads, exp_avg, exp_avg_sq, strict=True)):
        if not p.shape == g.shape == m.shape == v.shape:
            raise RuntimeError("adam_step_: the tensors of an entry differ in shape")
        dtype = _wide((p, g, m, v))
        wide = _clipped(g.to(dtype), clip.to(dtype), index) * scale[index].to(dtype)
        first = m.to(dtype) + (1 - beta1) * (wide - m.to(dtype))
        second = beta2 * v.to(dtype) + (1 - beta2) * wide * wide
        p.copy_(decay * p.to(dtype) - step_size * first / (second.sqrt() * correction + eps))
        m.copy_(first)
        v.copy_(second)


# ---- Stable-SPAM -------------------------------------------------------------------------------------


@dataclass
class StableSpamState:
    """What `stable_spam_step_` keeps between steps, for L parameters.

    exp_avg, exp_avg_sq: Adam's moments, zeroed every `reset_every` steps; gradient: (3, L), the running
    maximum, norm and squared norm; step counts all steps, since_reset those since the moments were zeroed.

    Shapes: as the parameters', and (3, L).
    """

    exp_avg: list[Tensor]
    exp_avg_sq: list[Tensor]
    gradient: Tensor
    step: int = 0
    since_reset: int = 0

    @classmethod
    def start(
        cls, parameters: Iterable[Tensor], *, dtype: torch.dtype | None = None
    ) -> StableSpamState:
        """All zero. The moments have the parameters' dtypes, or `dtype`."""
        tensors = tensor_list("parameters", parameters)
        moments = [
            [torch.zeros_like(t, dtype=dtype, requires_grad=False) for t in tensors]
            for _ in range(2)
        ]
        device = tensors[0].device if tensors else None
        return cls(
            moments[0],
            moments[1],
            torch.zeros(3, len(tensors), dtype=_wide(tensors), device=device),
        )


def stable_spam_step_(
    parameters: Sequence[Tensor],
    grads: Sequence[Tensor],
    state: StableSpamState,
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    gammas: tuple[float, float] = (0.7, 0.9),
    theta: float = 0.999,
    reset_every: int = 1000,
    cosine_steps: int | None = None,
) -> None:
    r"""One step of Stable-SPAM: adaptive clipping and norm, then AdamW with moments zeroed now and then; in place.

    The formulas are at the head of this file. No gradient is written, nothing waits for the device, and a list of
    hundreds of tensors of mixed dtypes takes three passes and a dozen operations on (L,) numbers.

    Args:
        parameters: L tensors, updated in place.
        grads: their gradients, only read.
        state: `StableSpamState.start(parameters)`, updated.
        lr, betas, eps, weight_decay: AdamW's; the decay is decoupled, $p \leftarrow (1 - \mathrm{lr}\,\lambda) p$.
        gammas: decays of the norm's running mean and mean square.
        theta: decay of the running maximum.
        reset_every: T; 0 never zeroes the moments.
        cosine_steps: if given, betas[0] and gammas[0] are multiplied by a factor that falls as a cosine from 1 to
            0.5 over so many steps.

    Shapes: L tensors of any shapes. float32, float64, bfloat16, float16, mixed.

    Raises:
        ValueError, TypeError: naming the argument.

    Source: Huang et al., "Stable-SPAM: How to Train in 4-Bit More Stably than 16-Bit Adam", 2025; the separate
    counter is this library's.
    """
    lr = _check.number("lr", lr, low=0.0)
    eps = _check.number("eps", eps, low=0.0)
    weight_decay = _check.number("weight_decay", weight_decay, low=0.0)
    theta = _decay("theta", theta)
    beta1, beta2 = (_decay(f"betas[{i}]", b) for i, b in enumerate(betas))
    gamma1, gamma2 = (_decay(f"gammas[{i}]", b) for i, b in enumerate(gammas))
    weights = [t.detach() for t in tensor_list("parameters", parameters)]
    given = [t.detach() for t in tensor_list("grads", grads, weights)]
    if not isinstance(state, StableSpamState):
        raise TypeError(f"state: expected a StableSpamState, got {type(state).__name__}")
    exp_avg = tensor_list("state.exp_avg", state.exp_avg, weights)
    exp_avg_sq = tensor_list("state.exp_avg_sq", state.exp_avg_sq, weights)
    writable("parameters", weights)
    if tuple(state.gradient.shape) != (3, len(weights)):
        raise ValueError(
            f"state.gradient: expected shape {(3, len(weights))}, got {tuple(state.gradient.shape)}"
        )
    if not weights:
        return
    if reset_every > 0 and state.since_reset >= reset_every:
        with torch.no_grad():
            torch._foreach_zero_(exp_avg)
            torch._foreach_zero_(exp_avg_sq)
        state.since_reset = 0
    state.step += 1
    state.since_reset += 1
    t, since = state.step, state.since_reset
    if cosine_steps is not None:
        share = min(t, cosine_steps) / cosine_steps
        factor = 0.75 + 0.25 * math.cos(math.pi * share)
        beta1, gamma1 = beta1 * factor, gamma1 * factor
    with torch.no_grad():
        clip, scale = _stable_factors(given, state.gradient, t, eps, gamma1, gamma2, theta)
    arguments = (
        weights, given, exp_avg, exp_avg_sq, clip, scale, 1 - lr * weight_decay,
        lr / (1 - beta1**since), beta1, beta2, eps, (1 - beta2**since) ** -0.5,
    )  # fmt: skip
    run_in_place("adam_step_", _adam_step, (weights, exp_avg, exp_avg_sq), *arguments)


def _stable_factors(grads, running, t, eps, gamma1, gamma2, theta):
    """(2, L) threshold and factor of the clipping, (L,) factor of the norm; `running` is updated."""
    maximum, first, second = running.unbind()
    largest = norms_of(grads, None, math.inf).to(running.dtype)
    maximum.mul_(theta).add_(largest, alpha=1 - theta)
    threshold = maximum / (1 - theta**t)
    # Nothing is above the threshold where the largest is not; that also keeps 0 / 0 out.
    clip = torch.stack([threshold, torch.where(largest > threshold, threshold / largest, 1.0)])
    norm = norms_of(grads, clip).to(running.dtype)
    first.mul_(gamma1).add_(norm, alpha=1 - gamma1)
    second.mul_(gamma2).addcmul_(norm, norm, value=1 - gamma2)
    wanted = first / (1 - gamma1**t) / ((second / (1 - gamma2**t)).sqrt() + eps)
    return clip, torch.where(norm > 0, wanted / norm, norm)


def _decay(name: str, value: float) -> float:
    value = _check.number(name, value, low=0.0, high=1.0)
    if value == 1.0:
        raise ValueError(f"{name}: expected a number in [0, 1), got 1")
    return value


# ---- Fira --------------------------------------------------------------------------------------------


def fira_residual_(
    grad: Tensor | Sequence[Tensor],
    reduced: Tensor | Sequence[Tensor],
    projector: Tensor | Sequence[Tensor],
    update: Tensor | Sequence[Tensor],
    prev_norm: Tensor,
    gamma: float = 1.01,
) -> None:
    r"""Fira's full-rank part: the gradient outside the projection, scaled as Adam scaled the part inside; in place.

    $U = (G - Q R)\,\phi,\ \phi_j = \lVert A_{:j}\rVert / (\lVert R_{:j}\rVert + 10^{-8})$, then
    `norm_growth_limit_`. The step is $W \leftarrow W - \mathrm{lr}\,(Q A + U)$.

    Args:
        grad: G (m, n), or L of them; becomes U.
        reduced: $R = Q^\top G$ (r, n), or for wide r (m, r) with $R = G Q^\top$, projecting from the right.
        projector: Q (m, r), or (r, n) for the right.
        update: A, Adam's update of R, shaped like it.
        prev_norm: (L,) float32 or float64, () for one tensor: $\lVert U\rVert$ of the step before, updated in
            place. Start with zeros.
        gamma: at least 1, the growth allowed.

    Shapes: above. float32, float64, bfloat16, float16. The product is torch's, into the gradient's memory.

    Raises:
        ValueError, TypeError: naming the argument.

    Source: Chen et al., "Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint?", 2024.
    """
    gamma = _check.number("gamma", gamma, low=1.0)
    grads = [t.detach() for t in tensor_list("grad", grad)]
    if not grads:
        return
    writable("grad", grads)
    every = [
        [t.detach() for t in tensor_list(name, value)]
        for name, value in (("reduced", reduced), ("projector", projector), ("update", update))
    ]
    for name, tensors in zip(("reduced", "projector", "update"), every):
        if len(tensors) != len(grads):
            raise ValueError(f"{name}: expected {len(grads)} tensors, got {len(tensors)}")
    previous = previous_norms(prev_norm, grads)
    sides = [_side(i, *entry) for i, entry in enumerate(zip(grads, *every))]
    with torch.no_grad():
        for left, g, r, q in zip(sides, grads, every[0], every[1]):
            a, b = (q, r) if left else (r, q)
            g.addmm_(a.to(g.dtype), b.to(g.dtype), alpha=-1)
        norms = run_in_place("fira_scale_", _fira_scale, (grads,), grads, every[0], every[2])
        scale_(grads, growth_factors(norms, previous, gamma))


def _side(index: int, g: Tensor, r: Tensor, q: Tensor, a: Tensor) -> bool:
    """True where Q stands on the left; an error where the shapes do not fit."""
    if g.dim() == r.dim() == q.dim() == 2 and a.shape == r.shape:
        (m, n), (p, s) = g.shape, r.shape
        if p < s and s == n and q.shape == (m, p):
            return True
        if p >= s and p == m and q.shape == (s, n):
            return False
    raise ValueError(
        f"reduced[{index}], projector[{index}], update[{index}]: expected (r, n), (m, r), (r, n) with r < n, "
        f"or (m, r), (r, n), (m, r), to go with grad of shape {tuple(g.shape)}, got {tuple(r.shape)}, "
        f"{tuple(q.shape)}, {tuple(a.shape)}"
    )


# ---- normalised momentum -----------------------------------------------------------------------------


def normalized_momentum_step_(
    parameters: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum: Sequence[Tensor],
    *,
    lr: float,
    beta: float = 0.9,
    eps: float = 1e-12,
) -> None:
    r"""One step along the momentum with its length taken out: always of length lr; in place.

    $m \leftarrow \beta m + (1 - \beta) g,\quad x \leftarrow x - \mathrm{lr}\, m / (\lVert m\rVert + \epsilon)$, the
    norm over all tensors together. A composition of `weights.ema_`, `multi_tensor_norm` and `weights.lincomb`.

    Args:
        parameters: L tensors, updated in place.
        grads: their gradients, only read.
        momentum: L tensors of the same shapes, updated in place; start with zeros.
        lr, beta: step length and decay.
        eps: added to the norm.

    Shapes: L tensors of any shapes. float32, float64, bfloat16, float16, mixed.

    Raises:
        ValueError, TypeError: naming the argument.

    Source: Hao et al., "Bilevel Optimization under Unbounded Smoothness: A New Algorithm and Convergence
    Analysis", 2024 (its upper-level update).
    """
    from ..weights.ema import ema_
    from ..weights.lincomb import _lincomb_out

    lr = _check.number("lr", lr)
    beta = _check.number("beta", beta, low=0.0, high=1.0)
    eps = _check.number("eps", eps, low=0.0)
    weights = [t.detach() for t in tensor_list("parameters", parameters)]
    if not weights:
        return
    given = [t.detach() for t in tensor_list("grads", grads, weights)]
    moved = [t.detach() for t in tensor_list("momentum", momentum, weights)]
    writable("parameters", weights)
    writable("momentum", moved)
    with torch.no_grad():
        ema_(moved, given, beta)
        length = torch.linalg.vector_norm(norms_of(moved)) + eps
        coefficients = torch.stack([torch.ones_like(length), -lr / length])
    arguments: Any = ([*weights, *moved], coefficients, [], weights)
    run_in_place("lincomb_out", _lincomb_out, (weights,), *arguments)
