"""Benchmark lines of core ada_norm."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.case import Case, Spec, in_double, step
from solera.norm import ada_layer_norm, ada_rms_norm, indexed_layer_norm


def _ours(kind: str):
    norm = ada_rms_norm if kind == "rms" else ada_layer_norm

    def f(x: Tensor, branch: Tensor, modulation: Tensor):
        gate, scale, shift = modulation.chunk(3, dim=-1)
        return norm(x, branch=branch, gate=gate, scale=scale, shift=shift)

    return f


def _eager(kind: str):
    norm = F.rms_norm if kind == "rms" else F.layer_norm

    def f(x: Tensor, branch: Tensor, modulation: Tensor):
        gate, scale, shift = modulation.unsqueeze(1).chunk(3, dim=-1)
        h = x + gate * branch
        return h, norm(h, h.shape[-1:], eps=1e-6) * (1 + scale) + shift

    return f


def _case(kind: str, shape: tuple[int, int, int], dtype, device: str, backward: bool) -> Case:
    make = lambda *s: torch.randn(*s, device=device).to(dtype).requires_grad_(backward)
    inputs = [make(*shape), make(*shape), make(shape[0], 3 * shape[2])]
    grads = [torch.randn(*shape, device=device).to(dtype) for _ in range(2)]

    def steps(function):
        def build(*tensors: Tensor):
            g = [t.to(tensors[0].dtype) for t in grads]
            return step(function, tensors, g if backward else None)

        return build

    # Forward reads x and branch, writes h and y; backward reads dy, dh, h, branch, writes dx, dbranch.
    return Case(
        ours=steps(_ours(kind))(*inputs),
        exact=in_double(steps(_eager(kind)), inputs),
        eager=steps(_eager(kind))(*inputs),
        compiled=steps(torch.compile(_eager(kind)))(*inputs),
        bytes=inputs[0].numel() * inputs[0].element_size() * (10 if backward else 4),
    )


def _indexed(shape: tuple[int, int, int], dtype, device: str) -> Case:
    B, _, D = shape
    make = lambda *s: torch.randn(*s, device=device).to(dtype).requires_grad_()
    inputs = [make(*shape), make(10, D), make(10, D)]
    index = torch.randint(0, 10, (B,), device=device)
    grad = torch.randn(*shape, device=device).to(dtype)

    def ours(x: Tensor, weight: Tensor, bias: Tensor):
        return indexed_layer_norm(x, weight, bias, index)

    def eager(x: Tensor, weight: Tensor, bias: Tensor):
        return F.layer_norm(x, (D,)) * weight[index].unsqueeze(1) + bias[index].unsqueeze(1)

    def build(function):
        return lambda *t: step(function, t, [grad.to(t[0].dtype)])

    return Case(
        ours=build(ours)(*inputs),
        exact=in_double(build(eager), inputs),
        eager=build(eager)(*inputs),
        compiled=build(torch.compile(eager))(*inputs),
        bytes=inputs[0].numel() * inputs[0].element_size() * 5,
    )


def specs(device: str) -> Iterator[Spec]:
    shape = (64, 512, 4096) if device == "cuda" else (16, 256, 1024)
    size = "x".join(map(str, shape))
    goal = {"eager": 2.5, "compile": 1.3}
    for dtype in (torch.float32, torch.bfloat16):
        for kind, name in (("layer", "ada_layer_norm"), ("rms", "ada_rms_norm")):
            for backward in (True, False):
                yield Spec(
                    op=f"norm.{name}",
                    label=f"gate, residual {'fwd+bwd' if backward else 'fwd'} {size}",
                    dtype=dtype,
                    make=lambda k=kind, d=dtype, b=backward: _case(k, shape, d, device, b),
                    targets=goal if kind == "layer" and backward else {},
                    quick=kind == "layer" and backward and dtype == torch.float32,
                )
        yield Spec(
            op="norm.indexed_layer_norm",
            label=f"fwd+bwd {size}, 10 sets",
            dtype=dtype,
            make=lambda d=dtype: _indexed(shape, d, device),
            quick=False,
        )
