r"""Time-dependent norms (TD-LN): weight and bias that move with the noise level, in place of adaLN's network.

Each of the D weights goes from one learned value to another along a sigmoid of time,

$$\gamma(\tau) = p_1 + s\,(p_0 - p_1),\qquad s = \sigma\bigl((1 + w)\,\tau + b\bigr),\qquad
  \tau = \tfrac14\log\mathrm{SNR},$$

and $\beta(\tau)$ likewise with its own four rows. The (B, D) rows are made by plain torch (eight rows of D get their
gradients from it); the norm itself is core `ada_norm`, which reads one row a sample.

Source: Liu et al., "Alleviating Distortion in Image Generation via Multi-Resolution Diffusion Models", 2024; public
code qihao067/DiMR, libs/core/sigmoid (w is kept there as `nodecay_weight`, zero at the start, and 1 is added).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _check
from .._registry import accumulate_type
from .ada_norm import _ada_norm_public
from .row_norm import layer_norm, rms_norm


def _time_parameter(acc: torch.dtype, *tensors: Tensor) -> Tensor:
    t, p0, p1, w, b = (v.to(acc) for v in tensors)
    s = torch.sigmoid((1 + w) * t[:, None] + b)
    return p1 + s * (p0 - p1)


def time_parameter(t: Tensor, p0: Tensor, p1: Tensor, w: Tensor, b: Tensor) -> Tensor:
    r"""A row of parameters per time: $p_1 + \sigma((1 + w) t + b)\,(p_0 - p_1)$.

    Shapes: t (B,), p0, p1, w, b (D,) -> (B, D), in float32 (float64 if p0 is).

    Raises:
        ValueError, TypeError: naming the argument whose shape or dtype does not fit.

    Source: DiMR's time-dependent parameter, see `time_layer_norm`.
    """
    _check.tensor("t", t, dim=1)
    _check.tensor("p0", p0, dim=1)
    for name, p in (("p1", p1), ("w", w), ("b", b)):
        _check.like(name, p, p0.shape, p0, "p0")
    return _time_parameter(accumulate_type(p0), t, p0, p1, w, b)


def _time_norm(x, t, gamma, beta, eps, centred):
    _check.tensor("x", x, min_dim=2)
    _check.tensor("t", t, dim=1)
    if t.shape[0] not in (1, x.shape[0]):
        raise ValueError(
            f"t: expected shape (1,) or ({x.shape[0]},) to go with x of shape {tuple(x.shape)}, "
            f"got {tuple(t.shape)}"
        )
    for kind, four in (("gamma", gamma), ("beta", beta)):
        absent = [p is None for p in four]
        if all(absent) and kind == "beta":
            continue
        for name, p in zip(("p0", "p1", "w", "b"), four, strict=True):
            _check.like(f"{name}_{kind}", p, x.shape[-1:], x)
    eps = _check.number("eps", eps, low=0.0)
    acc = accumulate_type(x)
    weight = _time_parameter(acc, t, *gamma)
    bias = None if beta[0] is None else _time_parameter(acc, t, *beta)
    if t.shape[0] == 1:
        norm = layer_norm if centred else rms_norm
        return norm(x, weight[0], bias=None if bias is None else bias[0], eps=eps)
    index = torch.arange(x.shape[0], device=x.device)
    return _ada_norm_public(x, None, None, None, None, weight, bias, eps, centred, index)


def time_layer_norm(
    x: Tensor,
    t: Tensor,
    p0_gamma: Tensor,
    p1_gamma: Tensor,
    w_gamma: Tensor,
    b_gamma: Tensor,
    p0_beta: Tensor,
    p1_beta: Tensor,
    w_beta: Tensor,
    b_beta: Tensor,
    *,
    eps: float = 1e-5,
) -> Tensor:
    r"""Time-dependent layer norm: $y = \gamma(t_b)\,(x - \mu)/\sqrt{\sigma^2 + \varepsilon} + \beta(t_b)$.

    $\gamma(t) = p_1 + \sigma((1 + w) t + b)\,(p_0 - p_1)$, $\beta(t)$ likewise with its own rows.

    Args:
        x: (B, ..., D), float32, float64, bfloat16 or float16; computed in float32 (float64 for float64).
        t: (B,) or (1,) for all samples, the paper's $\tau$, that is log SNR / 4; differentiable too.
        p0_gamma to b_beta: (D,); may be float32 with a half-precision x.
        eps: added to the variance; not negative.

    Shapes: x (B, ..., D), t (B,), eight rows (D,) -> (B, ..., D).

    Raises:
        ValueError, TypeError: naming the argument whose shape, dtype or device does not fit.

    Source: Liu et al., "Alleviating Distortion in Image Generation via Multi-Resolution Diffusion Models", 2024
    (compared with the public code's formula).
    """
    gamma = (p0_gamma, p1_gamma, w_gamma, b_gamma)
    return _time_norm(x, t, gamma, (p0_beta, p1_beta, w_beta, b_beta), eps, True)


def time_rms_norm(
    x: Tensor,
    t: Tensor,
    p0_gamma: Tensor,
    p1_gamma: Tensor,
    w_gamma: Tensor,
    b_gamma: Tensor,
    p0_beta: Tensor | None = None,
    p1_beta: Tensor | None = None,
    w_beta: Tensor | None = None,
    b_beta: Tensor | None = None,
    *,
    eps: float = 1e-6,
) -> Tensor:
    r"""Time-dependent RMS norm: $y = \gamma(t_b)\,x/\sqrt{\overline{x^2} + \varepsilon}\;[+ \beta(t_b)]$.

    The paper's public module divides by $\sqrt{\overline{x^2}} + 10^{-8}$ instead; with a tiny eps the two agree on
    rows that are not close to zero.

    Args, errors: as `time_layer_norm`; the four rows of beta may be None together.

    Shapes: x (B, ..., D), t (B,), four or eight rows (D,) -> (B, ..., D).

    Source: Liu et al., "Alleviating Distortion in Image Generation via Multi-Resolution Diffusion Models", 2024.
    """
    gamma = (p0_gamma, p1_gamma, w_gamma, b_gamma)
    return _time_norm(x, t, gamma, (p0_beta, p1_beta, w_beta, b_beta), eps, False)
