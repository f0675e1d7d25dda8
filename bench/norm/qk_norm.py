"""Benchmark lines of core qk_norm, and of the functions of l2_norm.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.case import Case, Spec, in_double, step
from solera.norm import l2_normalize, norm_linear, qk_norm

EPS = 1e-6


def _rotated(y: Tensor, cos: Tensor, sin: Tensor, pairs: bool) -> Tensor:
    half = y.shape[-1] // 2
    if pairs:
        other = torch.stack((-y[..., 1::2], y[..., ::2]), -1).flatten(-2)
    else:
        other = torch.cat((-y[..., half:], y[..., :half]), -1)
    return y * cos + other * sin


def _functions(pairs: bool):
    def ours(q, k, q_weight, k_weight, cos, sin):
        return qk_norm(q, k, q_weight, k_weight, cos=cos, sin=sin, eps=EPS, interleaved=pairs)

    def eager(q, k, q_weight, k_weight, cos, sin):
        return tuple(
            _rotated(F.rms_norm(x, x.shape[-1:], w, EPS), cos, sin, pairs)
            for x, w in ((q, q_weight), (k, k_weight))
        )

    return ours, eager


def _case(sizes, dtype, device: str, pairs: bool, fused: bool) -> Case:
    """fused: q and k are views of one (B, T, H + Hk, d) projection, as attention layers make them."""
    B, H, Hk, T, d = sizes
    make = lambda *s: torch.randn(*s, device=device).to(dtype)
    if fused:
        both = make(B, T, H + Hk, d).transpose(1, 2)
        q, k = both[:, :H], both[:, H:]
    else:
        q, k = make(B, H, T, d), make(B, Hk, T, d)
    a = torch.randn(T, d // 2, device=device)
    a = a.repeat_interleave(2, -1) if pairs else torch.cat((a, a), -1)
    leaves = [t.detach().requires_grad_() for t in (q, k, make(d), make(d))]
    inputs = [*leaves, a.cos().to(dtype), a.sin().to(dtype)]
    grads = [make(B, H, T, d), make(B, Hk, T, d)]
    ours, eager = _functions(pairs)

    def steps(function):
        return lambda *t: step(function, t, [g.to(t[0].dtype) for g in grads])

    return Case(
        ours=steps(ours)(*inputs),
        exact=in_double(steps(eager), inputs),
        eager=steps(eager)(*inputs),
        compiled=steps(torch.compile(eager))(*inputs),
        bytes=5 * (q.numel() + k.numel()) * q.element_size(),
    )


def _unit_case(shape, dtype, device: str) -> Case:
    x = torch.randn(*shape, device=device).to(dtype).requires_grad_()
    g = torch.randn(*shape, device=device).to(dtype)
    eager = lambda x: F.normalize(x, dim=-1)
    steps = lambda f: lambda x: step(f, (x,), [g.to(x.dtype)])
    return Case(
        ours=steps(l2_normalize)(x),
        exact=in_double(steps(eager), (x,)),
        eager=steps(eager)(x),
        compiled=steps(torch.compile(eager))(x),
        bytes=5 * x.numel() * x.element_size(),
    )


def _linear_case(rows: int, width: int, dtype, device: str) -> Case:
    make = lambda *s: (torch.randn(*s, device=device) * s[-1] ** -0.5).to(dtype).requires_grad_()
    inputs = [make(rows, width), make(width), make(width, width)]
    g = torch.randn(rows, width, device=device).to(dtype)
    ours = lambda x, nw, w: norm_linear(x, nw, w, eps=EPS)
    eager = lambda x, nw, w: F.linear(F.rms_norm(x, x.shape[-1:], nw, EPS), w)
    steps = lambda f: lambda *t: step(f, t, [g.to(t[0].dtype)])
    return Case(
        ours=steps(ours)(*inputs),
        exact=in_double(steps(eager), inputs),
        eager=steps(eager)(*inputs),
        bytes=6 * rows * width * inputs[0].element_size(),
        flops=6 * rows * width * width,
    )


def specs(device: str) -> Iterator[Spec]:
    f32, bf16 = torch.float32, torch.bfloat16
    scale = 8 if device == "cuda" else 1
    goal = {"eager": 4, "compile": 1.5}

    def line(sizes, dtype, pairs=False, fused=False, targets=None, quick=False):
        B, H, Hk, T, d = sizes
        kind = ("interleaved, " if pairs else "") + ("views of one projection, " if fused else "")
        return Spec(
            op="norm.qk_norm",
            label=f"rotary, {kind}fwd+bwd {B}x({H}+{Hk})x{T}x{d}",
            dtype=dtype,
            make=lambda: _case(sizes, dtype, device, pairs, fused),
            targets=targets or {},
            quick=quick and dtype == f32,
        )

    large, grouped = (4 * scale, 16, 16, 1024, 128), (8 * scale, 16, 4, 2048, 64)
    for dtype in (f32, bf16):
        yield line(large, dtype, targets=goal, quick=True)
    for dtype in (f32, bf16):
        yield line(grouped, dtype, targets=goal)
    yield line(large, bf16, pairs=True)
    yield line(large, bf16, fused=True)
    yield line((2, 3, 1, 333, 80), f32)
    for shape in ((16384, 1024), (262144, 64)):
        yield Spec(
            op="norm.l2_normalize",
            label=f"fwd+bwd {shape[0]}x{shape[1]}",
            dtype=f32,
            make=lambda shape=shape: _unit_case(shape, f32, device),
            quick=False,
        )
    yield Spec(
        op="norm.norm_linear",
        label="fwd+bwd 4096x1024x1024",
        dtype=f32,
        make=lambda: _linear_case(4096, 1024, f32, device),
        quick=False,
        notes="saves half of what a norm before a projection keeps, and makes it again in backward",
    )


def small_calls(device: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """Every kernel once on awkward shapes, for bench.every_op."""

    def call(sizes, dtype, kind: str, pairs: bool, each: bool):
        B, H, Hk, T, d = sizes
        make = lambda *s: torch.randn(*s, device=device).to(dtype).requires_grad_()
        a = torch.randn(T, d // 4, device=device)
        weights = (make(H, d), make(Hk, d)) if each else (make(d), make(d))
        out = qk_norm(
            make(B, T, H, d).transpose(1, 2), make(B, Hk, T, d), *weights, kind=kind, cos=a.cos(),
            sin=a.sin(), interleaved=pairs, rotary_dim=d // 4 * 2,
        )  # fmt: skip
        torch.autograd.backward(out, [torch.randn_like(t) for t in out])

    def unit(rows: int, columns: int, mode: str):
        x = torch.randn(rows, columns, device=device, requires_grad=True)
        l2_normalize(x, mode=mode).sum().backward()

    for dtype in (torch.float32, torch.bfloat16):
        for kind in ("rms", "layer", "l2", "l2_add"):
            for pairs in (False, True):
                for sizes in ((1, 1, 1, 1, 4), (2, 3, 1, 37, 33), (1, 4, 2, 70, 128)):
                    arguments = (sizes, dtype, kind, pairs, pairs)
                    yield f"qk_norm {arguments}", lambda a=arguments: call(*a)
    for mode in ("clamp", "rsqrt_add"):
        for shape in ((3, 17), (5, 10_000)):
            yield f"l2_normalize {shape} {mode}", lambda s=shape, m=mode: unit(*s, m)
