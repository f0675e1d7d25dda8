r"""Core `particles`: one step of weighted particles, and their systematic resampling.

**Feynman-Kac corrector.** Particles $x$ follow the reverse-time dynamics of several diffusion models with scores
$s_i = \nabla \log q_i$; the target is $p \propto \prod_i q_i^{\beta_i}$. With $S = \sum_i \beta_i s_i$,
$B = \sum_i \beta_i$,

$$x' = x + (\sigma^2 S - f)\,\mathrm dt + \sigma\sqrt{|\mathrm dt|}\,\xi,\qquad
  \mathrm d\log w = \bigl[\tfrac12\sigma^2 (\|S\|^2 - \textstyle\sum_i \beta_i \|s_i\|^2)
  + (B - 1)\,\nabla\!\cdot\! f\bigr]\mathrm dt .$$

Derivation. In reverse time each $q_i$ obeys $\partial_t q_i = \nabla\cdot(f q_i) - \tfrac12\sigma^2\Delta q_i$,
that is $\partial_t \log q_i = \nabla\cdot f + f\cdot s_i - \tfrac12\sigma^2(\nabla\cdot s_i + \|s_i\|^2)$. Hence
$\partial_t\log\prod q_i^{\beta_i} = B\,\nabla\cdot f + f\cdot S
- \tfrac12\sigma^2(\nabla\cdot S + \sum\beta_i\|s_i\|^2)$, while the simulated process, of drift $\sigma^2 S - f$ and
noise $\sigma$, changes a density with score $S$ by
$\nabla\cdot f + f\cdot S - \tfrac12\sigma^2(\nabla\cdot S + \|S\|^2)$. The difference of the two is the weight's rate
(up to a constant of $x$). Annealing is m = 1; guidance has $\beta = (1 - g, g)$ and gives
$\tfrac12\sigma^2 g(g-1)\|s_2 - s_1\|^2$; a product of two gives $\sigma^2\langle s_1, s_2\rangle + \nabla\cdot f$.

The difference of squares cancels where the scores agree, so it is summed in another form: with
$\delta_i = s_i - s_1$ and $\Delta = \sum_i\beta_i\delta_i$,

$$\|S\|^2 - \textstyle\sum_i\beta_i\|s_i\|^2 = B(B-1)\|s_1\|^2 + 2(B-1)\langle s_1, \Delta\rangle + \|\Delta\|^2
  - \sum_i \beta_i\|\delta_i\|^2 ,$$

of which guidance (B = 1) keeps only the differences.

**Ensemble posterior step.** A prior process with drift $b$ and noise $V$, reweighted by a potential $\mu$ (minus the
log-likelihood): $x' = x + (b - V^2\nabla\mu)\,\mathrm dt + V\sqrt{|\mathrm dt|}\,\xi$,
$\mathrm d\log w = [\tfrac12 V^2(\|\nabla\mu\|^2 - \Delta\mu) - b\cdot\nabla\mu]\,\mathrm dt$.

**Resampling.** $a = \mathrm{clip}(\log w - m)$ ($m$ the mean of those above $-\infty$, or 0),
$w = \mathrm{softmax}(a)$,
$\mathrm{ESS} = 1/\sum w^2$, $\log Z = m + \log\tfrac1K\sum e^{a}$. With cumulative weights $C_i$ and one number u in
[0, 1), offspring k is the particle i with $C_{i-1} \le (u + k)/K < C_i$: particle i has the offspring k from
$\lceil K C_{i-1} - u\rceil$ to $\lceil K C_i - u\rceil - 1$, so counting replaces a search.

Sources: Skreta et al., "Feynman-Kac Correctors in Diffusion", 2025; Chen et al., "Solving Inverse Problems via
Diffusion-Based Priors: An Approximation-Free Ensemble Sampling Approach", 2025; systematic resampling: Kitagawa, 1996,
and Douc, Cappé, Moulines, 2005. The formulas were derived again as above.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _check
from .._registry import accumulate_type, reference
from .._route import needs_graph, use_reference

_op = torch.ops.solera


# ---- reference ---------------------------------------------------------------------------------------


def _moved(x: Tensor, rate: Tensor, noise: Tensor, sigma: float, dt: float) -> Tensor:
    y = x.to(rate.dtype) + rate * dt + noise.to(rate.dtype) * (sigma * math.sqrt(abs(dt)))
    return y.to(x.dtype).contiguous()


@reference("fkc_step")
def fkc_reference(x, scores, betas, drift, divergence, noise, drift_rate, sigma, dt, level):
    """(x', dlogw); drift (K, d) or None with f = drift_rate * x; divergence (K,) or None."""
    acc = accumulate_type(x)
    v, s, b = x.to(acc), scores.to(acc), betas.to(acc)[:, None, None]
    if level > 0:
        s = (s - v) / level**2
    excess = (betas.sum() - 1).to(acc)
    first, difference = s[0], s - s[:1]
    lead = (b * difference).sum(0)
    total = (excess + 1) * first + lead
    f = drift_rate * v if drift is None else drift.to(acc)
    q = excess * first * ((excess + 1) * first + 2 * lead) + lead.square()
    q = (q - (b * difference.square()).sum(0)).sum(-1)
    rate = 0.5 * sigma**2 * q
    if divergence is not None:
        rate = rate + excess * divergence.to(acc)
    return _moved(x, sigma**2 * total - f, noise, sigma, dt), (rate * dt).contiguous()


@reference("afdps_step")
def afdps_reference(x, b, grad_mu, lap_mu, noise, sigma, dt):
    """(x', dlogw): what `afdps_step` computes."""
    acc = accumulate_type(x)
    g, prior = grad_mu.to(acc), b.to(acc)
    rate = (g * (0.5 * sigma**2 * g - prior)).sum(-1)
    if lap_mu is not None:
        rate = rate - 0.5 * sigma**2 * lap_mu.to(acc)
    return _moved(x, prior - sigma**2 * g, noise, sigma, dt), (rate * dt).contiguous()


def _log_weights(logw: Tensor, center: bool, clip: float) -> tuple[Tensor, Tensor]:
    """a and the mean that was taken off, in float64."""
    a = logw.double()
    mean = a.new_zeros(())
    if center:
        gone = a == -math.inf
        mean = torch.where(gone, 0.0, a).sum() / (~gone).sum().clamp(min=1)
    a = a - mean
    return (a.clamp(-clip, clip) if clip > 0 else a), mean


def _statistics(a: Tensor, mean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised weights, log Z, ESS."""
    w = torch.softmax(a, 0)
    log_z = torch.logsumexp(a, 0) - math.log(max(a.shape[0], 1)) + mean
    return w, log_z, 1 / w.square().sum()


@reference("smc_resample")
def resample_reference(logw, x, u, ess_threshold, center, clip):
    """(indices, x', weights, log weights after, log Z, ESS); indices count as the docstring above says."""
    acc, count = accumulate_type(logw), logw.shape[0]
    a, mean = _log_weights(logw, center, clip)
    w, log_z, ess = _statistics(a, mean)
    last = torch.ceil(w.cumsum(0) * count - u)
    last[-1:] = count
    k = torch.arange(count, device=logw.device)
    found = torch.searchsorted(last.nan_to_num(0.0), k.double(), right=True)
    usable = ess.isfinite() & (ess > 0)
    taken = usable & (ess < ess_threshold * count)
    indices = torch.where(taken, found.clamp(0, max(count - 1, 0)), k)
    after = torch.where(taken, torch.zeros_like(a), a).to(acc)
    rows = logw.new_empty(0) if x is None else x.index_select(0, indices)
    return indices, rows, w.to(acc), after, log_z.to(acc), ess.to(acc)


# ---- public functions --------------------------------------------------------------------------------


class Resampled(NamedTuple):
    """What `smc_resample` returns. Shapes: (N,), `particles` as x or None, `log_z` and `ess` scalars."""

    indices: Tensor
    particles: Tensor | None
    weights: Tensor
    log_weights: Tensor
    log_z: Tensor
    ess: Tensor


def _particles(x: object) -> Tensor:
    x = _check.tensor("x", x, min_dim=1)
    return x if x.dim() == 2 else x.reshape(x.shape[0], math.prod(x.shape[1:]))


def _beside(name: str, value: object, shape: torch.Size, x: Tensor) -> Tensor:
    """An argument of x's shape, as rows."""
    _check.like(name, value, shape, x)
    assert isinstance(value, Tensor)
    _check.same_dtype(name, value, x)
    return value.reshape(x.shape)


def _per_particle(name: str, value: object, x: Tensor) -> Tensor | None:
    if value is None:
        return None
    if isinstance(value, Tensor):
        if value.dim() == 0:
            value = value.expand(x.shape[0])
        _check.like(name, value, (x.shape[0],), x)
        return value
    value = _check.number(name, value)
    return torch.full((x.shape[0],), value, dtype=accumulate_type(x), device=x.device)


def _noise(
    noise: object,
    generator: torch.Generator | None,
    seed: int | None,
    shape: torch.Size,
    x: Tensor,
) -> Tensor:
    if noise is not None:
        if generator is not None or seed is not None:
            raise ValueError("noise: given beside a generator or a seed; expected one of them")
        return _beside("noise", noise, shape, x)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: expected a torch.Generator, got {type(generator).__name__}")
    if seed is not None:
        if generator is not None:
            raise ValueError("seed: given beside a generator; expected one of them")
        generator = torch.Generator(x.device).manual_seed(seed)
    return torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)


def fkc_step(
    x: Tensor,
    scores: Tensor | Sequence[Tensor],
    betas: Tensor | Sequence[float],
    f_div: Tensor | float | None = None,
    sigma: float = 1.0,
    dt: float = 1e-3,
    noise: Tensor | None = None,
    *,
    generator: torch.Generator | None = None,
    seed: int | None = None,
    drift: Tensor | float = 0.0,
    noise_level: float | None = None,
) -> tuple[Tensor, Tensor]:
    r"""One Euler-Maruyama step of the Feynman-Kac corrected reverse process of $\prod_i q_i^{\beta_i}$.

    $x' = x + (\sigma^2\sum_i\beta_i s_i - f)\,dt + \sigma\sqrt{|dt|}\,\xi$ and, in the same pass,
    $d\log w = [\tfrac12\sigma^2(\|S\|^2 - \sum_i\beta_i\|s_i\|^2) + (\sum_i\beta_i - 1)\nabla\cdot f]\,dt$.
    Annealing: one model and `betas=[beta]`. Guidance: `betas=[1 - g, g]` with the unconditional model first.
    Product of experts: `betas=[1, 1]`. A negative dt (time that runs down) is taken as it is.

    Args:
        x: (K, ...) particles.
        scores: (m, K, ...), or m tensors (K, ...), which are stacked by a copy.
        betas: m numbers or a tensor (m,).
        f_div: divergence of the forward drift f: a number or (K,). None takes drift * dim for a drift that is a
            number, and 0 for a tensor: what does not depend on x cancels in the normalised weights.
        sigma, dt: noise scale at this time and step.
        noise: (K, ...) standard normal; None draws it, by `generator` or from `seed`.
        drift: f, as (K, ...) or as the number c of f = c x.
        noise_level: if given, `scores` are denoised predictions D and the scores $(D - x)/t^2$ at this level t.

    Shapes: x (K, ...) -> x' (K, ...) of x's dtype, dlogw (K,) in float32 (float64 for float64). Gradients are those of
    the plain formula.

    Raises:
        ValueError, TypeError: naming the argument whose shape, dtype, device or value does not fit.

    Source: Skreta et al., "Feynman-Kac Correctors in Diffusion: Annealing, Guidance, and Product of Experts", 2025.
    """
    rows = _particles(x)
    if not isinstance(scores, Tensor):
        if not isinstance(scores, (list, tuple)) or not scores:
            raise TypeError(
                "scores: expected a tensor (m, K, ...) or a list of tensors (K, ...), got "
                f"{type(scores).__name__}"
            )
        for s in scores:
            _check.like("scores", s, x.shape, x)
        scores = torch.stack(list(scores))
    _check.tensor("scores", scores, min_dim=1)
    _check.like("scores", scores, (scores.shape[0], *x.shape), x)
    _check.same_dtype("scores", scores, x)
    count = scores.shape[0]
    if not isinstance(betas, Tensor):
        try:
            betas = torch.tensor([float(b) for b in betas], dtype=torch.float64, device=x.device)
        except (TypeError, ValueError):
            raise TypeError(f"betas: expected numbers, got {type(betas).__name__}") from None
    if betas.is_complex():
        raise TypeError(f"betas: expected real numbers, got {betas.dtype}")
    if betas.shape != (count,) or count == 0:
        raise ValueError(
            f"betas: expected one number for each of {count} scores (at least one), got shape "
            f"{tuple(betas.shape)}"
        )
    if betas.device != x.device:
        raise ValueError(f"betas: expected device {x.device} (that of x), got {betas.device}")
    sigma = _check.number("sigma", sigma, low=0.0)
    dt = _check.number("dt", dt)
    level = 0.0 if noise_level is None else _check.number("noise_level", noise_level, low=1e-30)
    rate, f = 0.0, None
    if isinstance(drift, Tensor):
        f = _beside("drift", drift, x.shape, rows)
    else:
        rate = _check.number("drift", drift)
        f_div = rate * rows.shape[1] if f_div is None else f_div
    if isinstance(f_div, (int, float)) and f_div == 0:
        f_div = None
    args = (
        rows, scores.reshape(count, *rows.shape), betas.double(), f, _per_particle("f_div", f_div, rows),
        _noise(noise, generator, seed, x.shape, rows), rate, sigma, dt, level,
    )  # fmt: skip
    if use_reference() or needs_graph(*args[:6]):
        y, change = fkc_reference(*args)
    else:
        y, change = _op.fkc_step(*args)
    return y.reshape(x.shape), change


def afdps_step(
    x: Tensor,
    b: Tensor,
    grad_mu: Tensor,
    lap_mu: Tensor | float | None,
    V: float,
    dt: float,
    noise: Tensor | None = None,
    *,
    generator: torch.Generator | None = None,
    seed: int | None = None,
) -> tuple[Tensor, Tensor]:
    r"""One step of an ensemble that samples a posterior without approximation of the likelihood's score.

    $x' = x + (b - V^2\nabla\mu)\,dt + V\sqrt{|dt|}\,\xi$,
    $d\log w = [\tfrac12 V^2(\|\nabla\mu\|^2 - \Delta\mu) - b\cdot\nabla\mu]\,dt$, in one pass; follow it by
    `smc_resample`. For $\mu = \|Ax - y\|^2/2\sigma_y^2$: $\nabla\mu = A^\top(Ax - y)/\sigma_y^2$, and $\Delta\mu$ is
    constant and may be left out (None), since it cancels in the normalised weights.

    Args:
        x, b, grad_mu: (K, ...): particles, drift of the prior's reverse process, gradient of the potential.
        lap_mu: (K,), a number or None: Laplacian of the potential.
        V, dt: noise scale of the prior's process and step.
        noise: (K, ...) standard normal; None draws it, by `generator` or from `seed`.

    Shapes: x (K, ...) -> x' (K, ...) of x's dtype, dlogw (K,) in float32 (float64 for float64). Gradients are those of
    the plain formula.

    Raises:
        ValueError, TypeError: naming the argument whose shape, dtype, device or value does not fit.

    Source: Chen et al., "Solving Inverse Problems via Diffusion-Based Priors: An Approximation-Free Ensemble Sampling
    Approach", 2025.
    """
    rows = _particles(x)
    V, dt = _check.number("V", V, low=0.0), _check.number("dt", dt)
    args = (
        rows, _beside("b", b, x.shape, rows), _beside("grad_mu", grad_mu, x.shape, rows),
        _per_particle("lap_mu", lap_mu, rows), _noise(noise, generator, seed, x.shape, rows), V, dt,
    )  # fmt: skip
    if use_reference() or needs_graph(*args[:5]):
        y, change = afdps_reference(*args)
    else:
        y, change = _op.afdps_step(*args)
    return y.reshape(x.shape), change


def smc_resample(
    logw: Tensor,
    x: Tensor | None = None,
    *,
    u: float | Tensor | None = None,
    generator: torch.Generator | None = None,
    ess_threshold: float | None = None,
    center: bool = False,
    clip: float | None = None,
) -> Resampled:
    r"""Systematic resampling of K weighted particles, with the gather of their rows.

    $w = \mathrm{softmax}(a)$ with $a = \mathrm{clip}(\log w - m)$, cumulative sums in float64; offspring k is the
    particle in whose share of [0, 1) the number $(u + k)/K$ lies, so that particle i gets $\lfloor K w_i\rfloor$ or
    $\lceil K w_i\rceil$ of them. The same u gives the same indices. Nothing waits for the device: whether the particles
    were resampled shows in `ess`, and `log_weights` are 0 if they were.

    Args:
        logw: (K,) log weights, -inf for none; with a NaN or +inf among them, or none above -inf, nothing is resampled
            and the statistics are NaN.
        x: (K, ...) particles, or None for the indices alone.
        u: a number in [0, 1) or a tensor of one element; None draws it, by `generator`.
        ess_threshold: resample only if ESS < ess_threshold * K (a share in [0, 1]); None always resamples.
        center: take the mean off the log weights first, of those above -inf; log Z has it added again.
        clip: then bound them to [-clip, clip], -inf too.

    Shapes: logw (K,), x (K, ...) -> `Resampled(indices (K,) int64, ascending; particles (K, ...) of x's dtype or None;
    weights (K,), normalised, before resampling; log_weights (K,) to go on with; log_z and ess, 0-d)`, the floating
    results in float32 (float64 for float64 logw). Gradients flow to x through the gather, to logw through weights,
    log_weights, log_z and ess.

    Raises:
        ValueError, TypeError: naming the argument whose shape, dtype, device or value does not fit.

    Source: Kitagawa, "Monte Carlo Filter and Smoother", 1996; used by Skreta et al., "Feynman-Kac Correctors in
    Diffusion", 2025, with center and clip.
    """
    _check.tensor("logw", logw, dim=1)
    if x is not None:
        _check.tensor("x", x, min_dim=1)
        if x.shape[0] != logw.shape[0] or x.device != logw.device:
            raise ValueError(
                f"x: expected {logw.shape[0]} rows on {logw.device} to go with logw, got shape "
                f"{tuple(x.shape)} on {x.device}"
            )
    if u is None:
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(
                f"generator: expected a torch.Generator, got {type(generator).__name__}"
            )
        u = torch.rand((), dtype=torch.float64, device=logw.device, generator=generator)
    elif generator is not None:
        raise ValueError("u: given beside a generator; expected one of them")
    elif isinstance(u, Tensor):
        if u.numel() != 1 or u.device != logw.device:
            raise ValueError(
                f"u: expected one element on {logw.device}, got shape {tuple(u.shape)} on {u.device}"
            )
        u = u.detach().reshape(()).double()
    else:
        u = _check.number("u", u, low=0.0, high=math.nextafter(1.0, 0.0))
        u = torch.full((), u, dtype=torch.float64, device=logw.device)
    share = math.inf
    if ess_threshold is not None:
        share = _check.number("ess_threshold", ess_threshold, low=0.0, high=1.0)
    bound = 0.0 if clip is None else _check.number("clip", clip, low=1e-30)
    rows = None if x is None else _particles(x)
    if use_reference():
        out = resample_reference(logw, rows, u, share, center, bound)
    else:
        if needs_graph(logw, x):
            out = _resample_with_graph(logw, rows, u, share, center, bound)
        else:
            out = _op.smc_resample(logw, rows, u, share, center, bound)
    indices, moved, weights, after, log_z, ess = out
    return Resampled(
        indices, None if x is None else moved.reshape(x.shape), weights, after, log_z, ess
    )


def _resample_with_graph(logw, x, u, share, center, bound):
    """The op decides the indices; what is differentiable is recorded by torch."""
    acc = accumulate_type(logw)
    with torch.no_grad():
        indices, _, _, kept, _, op_ess = _op.smc_resample(logw, None, u, share, center, bound)
    a, mean = _log_weights(logw, center, bound)
    w, log_z, ess = _statistics(a, mean)
    taken = op_ess.isfinite() & (op_ess < share * logw.shape[0])
    after = torch.where(taken, kept, a.to(acc))
    rows = None if x is None else x.index_select(0, indices)
    return indices, rows, w.to(acc), after, log_z.to(acc), ess.to(acc)
