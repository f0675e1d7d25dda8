"""Benchmark lines of core gated_norm."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.case import Case, Spec, in_double, step
from solera.norm import gated_rms_norm

EPS = 1e-6


def _ours(norm_first: bool):
    def f(x: Tensor, gate: Tensor, weight: Tensor):
        return gated_rms_norm(x, gate, weight, eps=EPS, norm_first=norm_first)

    return f


def _eager(norm_first: bool):
    def f(x: Tensor, gate: Tensor, weight: Tensor):
        if norm_first:
            return F.rms_norm(x, x.shape[-1:], weight, EPS) * F.silu(gate)
        return F.rms_norm(x * F.silu(gate), x.shape[-1:], weight, EPS)

    return f


def _case(shape: tuple[int, int], dtype, device: str, norm_first: bool, backward: bool) -> Case:
    make = lambda *s: torch.randn(*s, device=device).to(dtype).requires_grad_(backward)
    inputs = [make(*shape), make(*shape), make(shape[1])]
    grad = torch.randn(*shape, device=device).to(dtype)

    def steps(function):
        def build(*tensors: Tensor):
            return step(function, tensors, [grad.to(tensors[0].dtype)] if backward else None)

        return build

    reference = _eager(norm_first)
    # Forward reads x and gate, writes y; backward reads dy, x and gate, writes two gradients.
    return Case(
        ours=steps(_ours(norm_first))(*inputs),
        exact=in_double(steps(reference), inputs),
        eager=steps(reference)(*inputs),
        compiled=steps(torch.compile(reference))(*inputs),
        bytes=grad.numel() * grad.element_size() * (8 if backward else 3),
    )


def specs(device: str) -> Iterator[Spec]:
    f32, bf16 = torch.float32, torch.bfloat16
    scale = 8 if device == "cuda" else 1
    tall, square = (16384 * scale, 1024), (4096 * scale, 4096)

    def line(shape, dtype, norm_first=True, backward=True, targets=None, quick=False):
        order = "" if norm_first else "gate first, "
        direction = "fwd+bwd" if backward else "fwd"
        return Spec(
            op="norm.gated_rms_norm",
            label=f"{order}{direction} {shape[0]}x{shape[1]}",
            dtype=dtype,
            make=lambda: _case(shape, dtype, device, norm_first, backward),
            targets=targets or {},
            quick=quick and dtype == f32,
        )

    goal = {"eager": 4, "compile": 1.5}
    for shape in (square, tall):
        for dtype in (f32, bf16):
            yield line(shape, dtype, targets=goal, quick=shape is square)
    for dtype in (f32, bf16):
        yield line(square, dtype, norm_first=False, targets=goal)
    yield line(square, f32, backward=False)
    yield line((8191, 1001), f32)
    yield line((65536, 64), bf16)


def small_calls(device: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """Every kernel once on awkward shapes, for bench.every_op."""

    def call(rows: int, columns: int, dtype, groups: int, activation: str | None, first: bool):
        make = lambda *s: torch.randn(*s, device=device).to(dtype).requires_grad_()
        x, gate, weight, bias = (
            make(rows, columns),
            make(rows, columns),
            make(columns),
            make(columns),
        )
        y = gated_rms_norm(
            x, gate, weight, bias=bias, activation=activation, norm_first=first,
            group_size=columns // groups,
        )  # fmt: skip
        y.backward(torch.randn_like(y))

    for dtype in (torch.float32, torch.bfloat16):
        for first in (True, False):
            for sizes in ((1, 2, 1), (7, 33, 3), (65, 1000, 2), (3, 5120, 1)):
                for activation in (None, "relu", "gelu", "silu", "sigmoid"):
                    rows, columns, groups = sizes
                    arguments = (rows, columns, dtype, groups, activation, first)
                    yield f"gated_norm {arguments}", lambda a=arguments: call(*a)
