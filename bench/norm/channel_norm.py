"""Benchmark lines of core channel_norm."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.case import Case, Spec, in_double, step
from solera.norm import batch_norm, group_norm, instance_norm

GROUPS = 32
IMAGES = (8, 256, 64, 64)

# name -> (ours, eager, with a residual)
VARIANTS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], bool]] = {
    "group_norm": (
        lambda x, w, b: group_norm(x, GROUPS, w, b),
        lambda x, w, b: F.group_norm(x, GROUPS, w, b),
        False,
    ),
    "group_norm + silu": (
        lambda x, w, b: group_norm(x, GROUPS, w, b, activation="silu"),
        lambda x, w, b: F.silu(F.group_norm(x, GROUPS, w, b)),
        False,
    ),
    "instance_norm": (
        lambda x, w, b: instance_norm(x, None, None, w, b),
        lambda x, w, b: F.instance_norm(x, None, None, w, b),
        False,
    ),
    "batch_norm": (
        lambda x, w, b: batch_norm(x, None, None, w, b, True),
        lambda x, w, b: F.batch_norm(x, None, None, w, b, True),
        False,
    ),
    "batch_norm + relu + residual": (
        lambda x, w, b, r: batch_norm(x, None, None, w, b, True, activation="relu", residual=r),
        lambda x, w, b, r: F.relu(F.batch_norm(x, None, None, w, b, True) + r),
        True,
    ),
}


def _case(
    name: str, shape: tuple[int, ...], dtype, device: str, last: bool, backward: bool = True
) -> Case:
    ours, eager, residual = VARIANTS[name]

    def images() -> Tensor:
        t = torch.randn(*shape, device=device).to(dtype)
        return t.contiguous(memory_format=torch.channels_last) if last else t

    inputs = [images(), *(torch.randn(shape[1], device=device).to(dtype) for _ in range(2))]
    if residual:
        inputs.append(images())
    inputs = [t.requires_grad_(backward) for t in inputs]
    grad = images()

    def steps(function):
        def build(*tensors: Tensor):
            return step(function, tensors, [grad.to(tensors[0].dtype)] if backward else None)

        return build

    # Forward reads x and writes y, backward reads x and dy and writes dx; the residual is read twice (the
    # activation needs it again) and its gradient written.
    passes = (2 + residual) + ((3 + 2 * residual) if backward else 0)
    saved = None
    if backward:
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: kept.append(t.numel() * t.element_size()) or t, lambda t: t
        ):
            ours(*inputs)
        saved = sum(kept)
    return Case(
        ours=steps(ours)(*inputs),
        exact=in_double(steps(eager), inputs),
        eager=steps(eager)(*inputs),
        compiled=steps(torch.compile(eager))(*inputs),
        bytes=inputs[0].numel() * inputs[0].element_size() * passes,
        saved_bytes=saved,
    )


def specs(device: str) -> Iterator[Spec]:
    f32, bf16 = torch.float32, torch.bfloat16

    def line(name, dtype, last=False, shape=IMAGES, targets=None, quick=True, backward=True):
        label = f"{'fwd+bwd' if backward else 'fwd'} {'x'.join(map(str, shape))}"
        return Spec(
            op=f"norm.{name}",
            label=f"{label} channels-last" if last else label,
            dtype=dtype,
            make=lambda: _case(name, shape, dtype, device, last, backward),
            targets=targets or {},
            quick=quick and dtype == f32,
        )

    for dtype in (f32, bf16):
        yield line("group_norm + silu", dtype, targets={"eager": 1.8, "compile": 1.5})
    for dtype, eager in ((f32, 1.3), (bf16, 3)):
        yield line(
            "group_norm", dtype, last=True, targets={"eager": eager, "compile": 4}, quick=False
        )
    for dtype in (f32, bf16):
        yield line("batch_norm + relu + residual", dtype, targets={"eager": 1.5})
    yield line("batch_norm + relu + residual", f32, last=True, quick=False)
    yield line("group_norm", f32, quick=False)
    for dtype in (f32, bf16):
        yield line("instance_norm", dtype, quick=False)
    yield line("batch_norm", f32, quick=False)
    yield line("batch_norm", f32, shape=(128, 512, 7, 7), quick=False)
    yield line("group_norm", f32, shape=(32, 512, 7, 7), quick=False)
    yield line("group_norm", f32, shape=(2, 64, 4, 4), quick=False)
    yield line("group_norm", f32, shape=(2, 64, 4, 4), quick=False, backward=False)
