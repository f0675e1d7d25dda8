"""GPU kernels of core `online_norm`: the two scans over samples; the formulas are in solera/norm/online_norm.py.

The norm itself is those and the passes of `channel_norm`, put together there (`forward_by_passes`).

Both recurrences are linear, state <- a state + b, so a tile of samples is one associative scan in float64 and only
the tiles follow one another. A program owns C channels; the numbers are (N, C), nothing beside the passes
over x, whose kernels are `channel_norm`'s.

The state before a step is the scan of the steps one row earlier, which are loaded a second time (from L1).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from ...norm.online_norm import backward_by_passes, forward_by_passes
from .._launch import on_device_of
from .channel_norm import channel_affine, channel_gradient, channel_moments, channel_reduce

SAMPLES = 64  # of one associative scan
CHANNELS = 16  # of a program


def _config(x: torch.Tensor) -> dict[str, int]:
    """Samples and channels of a tile; no more than there are for the interpreter, which pays by the element."""
    if x.is_cuda:
        return {"N": SAMPLES, "C": CHANNELS, "num_warps": 4}
    samples, channels = (triton.next_power_of_2(max(1, n)) for n in x.shape)
    return {"N": min(SAMPLES, samples), "C": min(CHANNELS, channels), "num_warps": 4}


@triton.jit
def _then(a0, b0, a1, b1):
    """First x -> a0 x + b0, then x -> a1 x + b1."""
    return a0 * a1, a1 * b0 + b1


@triton.jit
def _states(a, b, state):
    """The state after each of the steps a, b [N, C] that start from state [C]."""
    factor, added = tl.associative_scan((a, b), 0, _then)
    return factor * state[None, :] + added


@triton.jit
def _last(x, N: tl.constexpr):
    """The last row of x [N, C]."""
    return tl.sum(tl.where(tl.arange(0, N)[:, None] == N - 1, x, 0.0), 0)


@triton.jit
def _numbers(x, at, mask):
    return tl.load(x + at, mask=mask, other=0.0).to(tl.float64)


@triton.jit
def _start(state, out, c, channels):
    """The given state [C], copied into row 0 of the result."""
    value = tl.load(state + c, mask=c < channels, other=0.0)
    tl.store(out + c, value, mask=c < channels)
    return value.to(tl.float64)


@triton.jit
def online_scan_kernel(
    mean, var, m, v, ms, vs, samples, channels, decay, N: tl.constexpr, C: tl.constexpr
):
    c = tl.program_id(0) * C + tl.arange(0, C)
    alpha = tl.load(decay)
    m_now = _start(m, ms, c, channels)
    v_now = _start(v, vs, c, channels)
    k = 1.0 - alpha
    for start in range(0, samples, N):
        n = start + tl.arange(0, N)[:, None]  # [N, 1]
        inside = (n < samples) & (c < channels)[None, :]
        earlier = (n > start) & (n <= samples) & (c < channels)[None, :]
        at = n.to(tl.int64) * channels + c[None, :]  # [N, C]
        # Outside, a step changes nothing: a = 1, b = 0.
        shifted = _numbers(mean, at - channels, earlier)
        before = _states(tl.where(earlier, alpha, 1.0), tl.where(earlier, k * shifted, 0.0), m_now)
        d = _numbers(mean, at, inside) - before
        after = before + tl.where(inside, k * d, 0.0)
        added = k * _numbers(var, at, inside) + alpha * k * d * d
        variance = _states(tl.where(inside, alpha, 1.0), tl.where(inside, added, 0.0), v_now)
        tl.store(ms + at + channels, after.to(ms.dtype.element_ty), mask=inside)
        tl.store(vs + at + channels, variance.to(vs.dtype.element_ty), mask=inside)
        m_now = _last(after, N)
        v_now = _last(variance, N)


@triton.jit
def online_scan_backward_kernel(
    g, gy, y, yy, rstd, u, w, us, ws, samples, channels, decay, N: tl.constexpr, C: tl.constexpr
):
    c = tl.program_id(0) * C + tl.arange(0, C)
    alpha = tl.load(decay)
    u_now = _start(u, us, c, channels)
    w_now = _start(w, ws, c, channels)
    k = 1.0 - alpha
    for start in range(0, samples, N):
        n = start + tl.arange(0, N)[:, None]  # [N, 1]
        inside = (n < samples) & (c < channels)[None, :]
        earlier = (n > start) & (n <= samples) & (c < channels)[None, :]
        at = n.to(tl.int64) * channels + c[None, :]  # [N, C]
        factor = 1.0 - k * _numbers(yy, at - channels, earlier)  # 1 outside
        before = _states(factor, _numbers(gy, at - channels, earlier), w_now)
        after = (1.0 - k * _numbers(yy, at, inside)) * before + _numbers(gy, at, inside)
        added = _numbers(g, at, inside) - k * before * _numbers(y, at, inside)
        added *= _numbers(rstd, at, inside)  # 0 outside
        corrected = _states(tl.where(inside, alpha, 1.0), tl.where(inside, added, 0.0), u_now)
        tl.store(us + at + channels, corrected.to(us.dtype.element_ty), mask=inside)
        tl.store(ws + at + channels, after.to(ws.dtype.element_ty), mask=inside)
        u_now = _last(corrected, N)
        w_now = _last(after, N)


# ---- launchers ---------------------------------------------------------------------------------------


def _launch(kernel, rows, states, alpha):
    """One result of N + 1 rows for each state."""
    like = rows[0]
    samples, channels = like.shape
    for t in rows:
        if t.shape != like.shape or t.dtype != like.dtype:
            raise RuntimeError("online_scan: expected (N, C) tensors of one shape and dtype")
    for t in states:
        if t.shape != (channels,) or t.dtype != like.dtype:
            raise RuntimeError("online_scan: expected (C,) states of the (N, C) tensors' dtype")
    out = [like.new_empty((samples + 1, channels)) for _ in states]
    if channels:
        given = [t.contiguous() for t in (*rows, *states)]
        # A float64 scalar: as a plain number alpha would be rounded to float32.
        decay = torch.full((1,), alpha, dtype=torch.float64, device=like.device)
        with on_device_of(like):
            settings = _config(like)
            kernel[(triton.cdiv(channels, settings["C"]),)](
                *given, *out, samples, channels, decay, **settings
            )
    return tuple(out)


def online_scan(mean, var, m, v, alpha):
    return _launch(online_scan_kernel, (mean, var), (m, v), alpha)


def online_scan_backward(g, gy, y, yy, rstd, u, w, alpha):
    return _launch(online_scan_backward_kernel, (g, gy, y, yy, rstd), (u, w), alpha)


class _Launchers:
    """What `forward_by_passes` calls."""

    channel_moments = staticmethod(channel_moments)
    channel_affine = staticmethod(channel_affine)
    channel_reduce = staticmethod(channel_reduce)
    channel_gradient = staticmethod(channel_gradient)
    online_scan = staticmethod(online_scan)
    online_scan_backward = staticmethod(online_scan_backward)


def online_norm(x, weight, bias, m, v, alpha, eps):
    return forward_by_passes(_Launchers, x, weight, bias, m, v, alpha, eps)


def online_norm_backward(dy, x, weight, mean, var, ms, vs, u, w, alpha, eps, need_x):
    kept = (mean, var, ms, vs, u, w)
    return backward_by_passes(_Launchers, dy, x, weight, None, *kept, alpha, eps, need_x)


# ---- ahead-of-time compilation -----------------------------------------------------------------------


def aot() -> Iterator:
    from .._aot import AotCase

    for name, kernel, rows in (
        ("forward", online_scan_kernel, ("mean", "var", "m", "v", "ms", "vs")),
        (
            "backward",
            online_scan_backward_kernel,
            ("g", "gy", "y", "yy", "rstd", "u", "w", "us", "ws"),
        ),
    ):
        yield AotCase(
            name=f"online_scan_{name}",
            fn=kernel,
            signature={
                **dict.fromkeys(rows, "*fp32"),
                "samples": "i32",
                "channels": "i32",
                "decay": "*fp64",
            },
            constexprs={"N": SAMPLES, "C": CHANNELS},
            divisible_by_16=(*rows, "channels", "decay"),
        )
