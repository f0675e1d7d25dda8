"""Benchmark lines of core online_norm."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from bench.case import Case, Spec, Step
from solera.norm import OnlineNormState, online_norm

AF, AB, EPS = 0.999, 0.99, 1e-5


def _loop(x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor) -> Step:
    """What a user writes: the paper's loop over samples, forward and its manual backward."""
    w, b = weight[:, None, None], bias[:, None, None]

    def run() -> Sequence[Tensor]:
        c = x.shape[1]
        kind = torch.float64 if x.dtype == torch.float64 else torch.float32
        m, u, v = (torch.zeros(c, dtype=kind, device=x.device) for _ in range(3))
        var = torch.ones(c, dtype=kind, device=x.device)
        out, kept = [], []
        for sample in x.unbind(0):
            s = (var + EPS).rsqrt()
            y = (sample - m[:, None, None]) * s[:, None, None]
            spread, mean = torch.var_mean(sample.to(kind), (1, 2), correction=0)
            d = mean - m
            var = AF * var + (1 - AF) * spread + AF * (1 - AF) * d * d
            m = m + (1 - AF) * d
            out.append((y * w + b).to(x.dtype))
            kept.append((y, s))
        dx, dweight, dbias = [], torch.zeros_like(m), torch.zeros_like(m)
        for g, (y, s) in zip(grad.unbind(0), kept):
            dweight = dweight + (g * y).sum((1, 2))
            dbias = dbias + g.sum((1, 2))
            h = g * w - (1 - AB) * v[:, None, None] * y
            v = v + (h * y).mean((1, 2))
            h = h * s[:, None, None] - (1 - AB) * u[:, None, None]
            u = u + h.mean((1, 2))
            dx.append(h.to(x.dtype))
        return torch.stack(out), torch.stack(dx), dweight, dbias

    return run


def _case(shape: tuple[int, ...], dtype: torch.dtype, device: str, last: bool) -> Case:
    order = torch.channels_last if last else torch.contiguous_format
    x = torch.randn(*shape, device=device).to(dtype).to(memory_format=order).requires_grad_()
    grad = torch.randn(*shape, device=device).to(dtype).to(memory_format=order)
    weight = torch.rand(shape[1], device=device).requires_grad_()
    bias = torch.randn(shape[1], device=device).requires_grad_()
    inputs = (x, weight, bias)

    def ours() -> Sequence[Tensor]:
        state = OnlineNormState.start(shape[1], device=device)
        y = online_norm(x, state, weight, bias, alpha_forward=AF, alpha_backward=AB, eps=EPS)
        return (y, *torch.autograd.grad(y, inputs, grad))

    plain = [t.detach() for t in (*inputs, grad)]
    n, item = x.numel(), x.element_size()
    return Case(
        ours=ours,
        exact=_loop(*(t.double() for t in plain)),
        eager=_loop(*plain),
        bytes=5 * n * item,
        written=2 * n * item,
        floor_note="forward reads x and writes y; backward reads x and dy and writes dx",
    )


def specs(device: str) -> Iterator[Spec]:
    shape = (256, 64, 32, 32)
    for dtype, last, targets, quick in (
        (torch.float32, False, {"eager": 6, "floor": 0.6}, True),
        (torch.bfloat16, False, {}, False),
        (torch.float32, True, {}, False),
    ):
        yield Spec(
            op="norm.online_norm",
            label=f"fwd+bwd 256x64x32x32{' channels-last' if last else ''}",
            dtype=dtype,
            make=lambda dtype=dtype, last=last: _case(shape, dtype, device, last),
            targets=targets,
            quick=quick,
            notes="eager: a loop over the samples, with the paper's manual backward",
        )
