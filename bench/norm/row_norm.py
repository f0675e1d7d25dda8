"""Benchmark lines of core row_norm."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.case import Case, Spec, in_double, step
from solera.norm import layer_norm, rms_norm

EPS = 1e-6


def _ours(kind: str, residual: bool):
    norm = rms_norm if kind == "rms" else layer_norm

    def f(x: Tensor, weight: Tensor, res: Tensor | None = None):
        return norm(x, weight, eps=EPS, residual=res)

    return f


def _eager(kind: str, residual: bool):
    def f(x: Tensor, weight: Tensor, res: Tensor | None = None):
        u = x if res is None else x + res
        if kind == "rms":
            y = F.rms_norm(u, u.shape[-1:], weight, EPS)
        else:
            y = F.layer_norm(u, u.shape[-1:], weight, None, EPS)
        return y if res is None else (y, u)

    return f


def _case(
    kind: str, shape: tuple[int, ...], dtype, device: str, residual: bool, backward: bool
) -> Case:
    make = lambda *s: torch.randn(*s, device=device).to(dtype).requires_grad_(backward)
    x, weight = make(*shape), make(shape[-1])
    inputs = [x, weight, make(*shape)] if residual else [x, weight]
    n, item = x.numel(), x.element_size()
    grads = [torch.randn(*shape, device=device).to(dtype) for _ in range(2 if residual else 1)]

    def steps(function):
        def build(*tensors: Tensor):
            g = [t.to(tensors[0].dtype) for t in grads]
            return step(function, tensors, g if backward else None)

        return build

    reference = _eager(kind, residual)
    # Forward reads 1 (2 with a residual) and writes 1 (2); backward reads u, dy (and du) and writes one
    # gradient: the residual's gradient is the same tensor as x's.
    forward, back = (4, 4) if residual else (2, 3)
    saved = None
    if backward:
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: kept.append(t.numel() * t.element_size()) or t, lambda t: t
        ):
            _ours(kind, residual)(*inputs)
        saved = sum(kept)
    return Case(
        ours=steps(_ours(kind, residual))(*inputs),
        exact=in_double(steps(reference), inputs),
        eager=steps(reference)(*inputs),
        compiled=steps(torch.compile(reference))(*inputs),
        bytes=n * item * (forward + (back if backward else 0)),
        saved_bytes=saved,
    )


def specs(device: str) -> Iterator[Spec]:
    big = (32768, 4096) if device == "cuda" else (4096, 4096)
    size = "x".join(map(str, big))
    f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16

    def line(op, label, dtype, kind, shape, residual, backward, targets=None, quick=True):
        return Spec(
            op=f"norm.{op}",
            label=label,
            dtype=dtype,
            make=lambda: _case(kind, shape, dtype, device, residual, backward),
            targets=targets or {},
            quick=quick,
        )

    for dtype, eager in ((f32, 5), (bf16, 10)):
        goal = {"eager": eager, "compile": 2}
        yield line("rms_norm", f"fwd+bwd {size}", dtype, "rms", big, False, True, goal)
    for dtype in (f32, bf16):
        goal = {"eager": 5, "compile": 2.5}
        yield line("rms_norm", f"residual fwd+bwd {size}", dtype, "rms", big, True, True, goal)
    for dtype in (f32, bf16):
        goal = {"eager": 1.3, "compile": 1}
        yield line(
            "layer_norm", f"fwd+bwd {size}", dtype, "layer", big, False, True, goal, dtype == f32
        )
    yield line("rms_norm", f"fwd {size}", f32, "rms", big, False, False, quick=False)
    yield line("rms_norm", f"fwd {size}", bf16, "rms", big, False, False, quick=False)
    yield line("layer_norm", f"fwd {size}", f32, "layer", big, False, False, quick=False)
    yield line("rms_norm", f"fwd+bwd {size}", f16, "rms", big, False, True, quick=False)
    yield line("rms_norm", "fwd+bwd 65536x64", f32, "rms", (65536, 64), False, True, quick=False)
    yield line("rms_norm", "fwd+bwd 8191x1001", f32, "rms", (8191, 1001), False, True, quick=False)
    yield line(
        "layer_norm", "fwd+bwd 64x262144", f32, "layer", (64, 262144), False, True, quick=False
    )
    yield Spec(
        op="norm.rms_norm",
        label="one call, 16 floats, no grad",
        dtype=f32,
        make=lambda: _call(device),
        targets={"mul": 1 / 3},
        notes="beside torch.mul's own call: the price of a call that does nothing",
    )


def _call(device: str) -> Case:
    x, weight = torch.randn(16, device=device), torch.randn(16, device=device)
    ours, reference = _ours("rms", False), _eager("rms", False)
    return Case(
        ours=step(ours, (x, weight)),
        exact=in_double(lambda *t: step(reference, t), (x, weight)),
        eager=step(reference, (x, weight)),
        peers={"mul": step(torch.mul, (x, weight))},
        bytes=16 * 4 * 3,
    )
