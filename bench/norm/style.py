"""Benchmark lines of the style functions over core channel_norm."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bench.case import Case, Spec, in_double, step
from solera.norm import ada_layer_instance_norm, adaptive_instance_norm, moment_exchange

IMAGES = (8, 256, 64, 64)
EPS = 1e-5


def _moments(x: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    return x.mean(dims, keepdim=True), (x.var(dims, keepdim=True) + EPS).sqrt()


def _adain(content: Tensor, style: Tensor) -> Tensor:
    """The public PyTorch code's form."""
    mean, std = _moments(content, (2, 3))
    style_mean, style_std = _moments(style, (2, 3))
    return (content - mean) / std * style_std + style_mean


def _adalin(x: Tensor, rho: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """U-GAT-IT's code."""
    (m, s), (lm, ls) = _moments(x, (2, 3)), _moments(x, (1, 2, 3))
    rho = rho[None, :, None, None]
    y = rho * ((x - m) / s) + (1 - rho) * ((x - lm) / ls)
    return y * gamma[..., None, None] + beta[..., None, None]


def _moex(x: Tensor) -> Tensor:
    """MoEx's code with PONO moments, each sample with those of the one before it."""
    mean, std = _moments(x, (1,))
    index = torch.arange(x.shape[0], device=x.device).roll(1)
    scale = std[index] / std
    return x * scale + (mean[index] - mean * scale)


def _exchange(x: Tensor) -> Tensor:
    return moment_exchange(x, torch.arange(x.shape[0], device=x.device).roll(1))


# name -> (ours, eager, shapes of the inputs after x, units of x read or written by forward and backward)
N, C = IMAGES[:2]
VARIANTS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], tuple, int]] = {
    # content, style, y; dy, content, style, dcontent, dstyle
    "adaptive_instance_norm": (adaptive_instance_norm, _adain, (IMAGES,), 8),
    "ada_layer_instance_norm": (ada_layer_instance_norm, _adalin, ((C,), (N, C), (N, C)), 5),
    "moment_exchange": (_exchange, _moex, (), 5),
}


def _case(name: str, dtype, device: str, last: bool) -> Case:
    ours, eager, others, passes = VARIANTS[name]

    def make(shape: tuple[int, ...]) -> Tensor:
        t = torch.randn(*shape, device=device).to(dtype)
        return t.contiguous(memory_format=torch.channels_last) if last and len(shape) == 4 else t

    inputs = [make(shape).requires_grad_() for shape in (IMAGES, *others)]
    grad = make(IMAGES)

    def steps(function):
        def build(*tensors: Tensor):
            return step(function, tensors, [grad.to(tensors[0].dtype)])

        return build

    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.numel() * t.element_size()) or t, lambda t: t
    ):
        ours(*inputs)
    return Case(
        ours=steps(ours)(*inputs),
        exact=in_double(steps(eager), inputs),
        eager=steps(eager)(*inputs),
        compiled=steps(torch.compile(eager))(*inputs),
        bytes=inputs[0].numel() * inputs[0].element_size() * passes,
        saved_bytes=sum(kept),
    )


def specs(device: str) -> Iterator[Spec]:
    f32, bf16 = torch.float32, torch.bfloat16

    def line(name, dtype, last=False, targets=None, quick=True):
        label = f"fwd+bwd {'x'.join(map(str, IMAGES))}"
        return Spec(
            op=f"norm.{name}",
            label=f"{label} channels-last" if last else label,
            dtype=dtype,
            make=lambda: _case(name, dtype, device, last),
            targets=targets or {},
            quick=quick,
        )

    for dtype in (f32, bf16):
        goal = {"eager": 8, "compile": 1.3}
        yield line("adaptive_instance_norm", dtype, targets=goal, quick=dtype == f32)
    for name in ("ada_layer_instance_norm", "moment_exchange"):
        for dtype in (f32, bf16):
            goal = {"eager": 5, "compile": 1.5}
            yield line(name, dtype, targets=goal, quick=dtype == f32)
    for name in VARIANTS:
        yield line(name, f32, last=True, quick=False)
