"""Benchmark lines of core evonorm."""

from __future__ import annotations

import importlib.util
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from bench.case import Case, Spec, in_double, step
from solera.norm import evonorm_b0, evonorm_s0

GROUPS, EPS = 32, 1e-5


def _ours(form: str):
    if form == "s0":
        return lambda x, w, b, v: evonorm_s0(x, w, b, v, groups=GROUPS, eps=EPS)
    return lambda x, w, b, v: evonorm_b0(x, w, b, v, training=True, eps=EPS)


def _eager(form: str):
    def f(x: Tensor, w: Tensor, b: Tensor, v: Tensor) -> Tensor:
        w, b, v = (t.view(1, -1, 1, 1) for t in (w, b, v))
        if form == "s0":
            n, c, h, width = x.shape
            groups = x.reshape(n, GROUPS, c // GROUPS, h, width)
            var = groups.var((2, 3, 4), correction=0, keepdim=True)
            std = (var + EPS).sqrt().expand(groups.shape).reshape(x.shape)
            return x * (x * v).sigmoid() / std * w + b
        left = (x.var((0, 2, 3), correction=0, keepdim=True) + EPS).sqrt()
        right = x * v + (x.var((2, 3), correction=0, keepdim=True) + EPS).sqrt()
        return x / torch.maximum(left, right) * w + b

    return f


def _timm(form: str, channels: int, device: str, dtype: torch.dtype):
    """timm's module as a function of x, or None. Its file is read alone: the package needs torchvision."""
    found = importlib.util.find_spec("timm")
    if found is None or not found.submodule_search_locations:
        return None
    lines = (Path(found.submodule_search_locations[0]) / "layers/evo_norm.py").read_text()
    text = "\n".join(line for line in lines.splitlines() if not line.startswith("from ."))
    module = types.ModuleType("timm_evo_norm")
    module.__dict__["_assert"] = lambda condition, message: None
    exec(compile(text, "timm_evo_norm", "exec"), module.__dict__)
    kind = getattr(module, "EvoNorm2d" + form.upper())
    norm = kind(channels, eps=EPS, device=device, dtype=dtype)

    def f(x: Tensor, w: Tensor, b: Tensor, v: Tensor) -> Tensor:
        return torch.func.functional_call(norm, {"weight": w, "bias": b, "v": v}, x)

    return f


def _off_the_kink(x: Tensor, v: Tensor) -> Tensor:
    """x without the elements at which B0's two deviations are equal but for rounding.

    There the gradient jumps, and which side a float32 form takes says nothing about it.
    """
    wide, v = x.double(), v.double().view(1, -1, 1, 1)
    left = (wide.var((0, 2, 3), correction=0, keepdim=True) + EPS).sqrt()
    right = wide * v + (wide.var((2, 3), correction=0, keepdim=True) + EPS).sqrt()
    return torch.where((left - right).abs() < 1e-5 * left, x + 0.01, x)


def _case(
    form: str, shape: tuple[int, ...], dtype, device: str, backward: bool, last: bool
) -> Case:
    def make(*size):
        return torch.randn(*size, device=device).to(dtype)

    x, grad = make(*shape), make(*shape)
    if last:
        x, grad = (t.contiguous(memory_format=torch.channels_last) for t in (x, grad))
    inputs = [x, *(make(shape[1]) for _ in range(3))]
    if form == "b0" and dtype == torch.float32:
        inputs[0] = _off_the_kink(x, inputs[3])
    inputs = [t.requires_grad_(backward) for t in inputs]

    def steps(function):
        def build(*tensors: Tensor):
            return step(function, tensors, [grad.to(tensors[0].dtype)] if backward else None)

        return build

    saved = None
    if backward:
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: kept.append(t.numel() * t.element_size()) or t, lambda t: t
        ):
            _ours(form)(*inputs)
        saved = sum(kept)
    peers = {}
    timm = _timm(form, shape[1], device, dtype)
    if timm is not None:
        peers["timm"] = steps(timm)(*inputs)
    # Forward reads x and writes y; backward reads x and dy and writes dx.
    return Case(
        ours=steps(_ours(form))(*inputs),
        exact=in_double(steps(_eager(form)), inputs),
        eager=steps(_eager(form))(*inputs),
        compiled=steps(torch.compile(_eager(form)))(*inputs),
        peers=peers,
        bytes=x.numel() * x.element_size() * (5 if backward else 2),
        saved_bytes=saved,
    )


def specs(device: str) -> Iterator[Spec]:
    shape = (64, 256, 64, 64) if device == "cuda" else (8, 256, 64, 64)
    size = "x".join(map(str, shape))
    f32, bf16 = torch.float32, torch.bfloat16

    def line(form, dtype, backward=True, last=False, targets=None, quick=True):
        label = ("fwd+bwd " if backward else "fwd ") + size + (" channels-last" if last else "")
        return Spec(
            op=f"norm.evonorm_{form}",
            label=label,
            dtype=dtype,
            make=lambda: _case(form, shape, dtype, device, backward, last),
            targets=targets or {},
            quick=quick and dtype == f32,
        )

    goal = {"eager": 5, "compile": 1.5}
    yield line("s0", f32, targets=goal)
    yield line("s0", bf16, targets=goal)
    yield line("s0", f32, last=True, quick=False)
    yield line("s0", bf16, last=True, quick=False)
    yield line("s0", f32, backward=False, quick=False)
    yield line("b0", f32, quick=False)
    yield line("b0", f32, last=True, quick=False)


def small_calls(device: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """Both forms and layouts on shapes with tails, forward and backward."""

    def call(form: str, dtype: torch.dtype, shape: tuple[int, ...], last: bool) -> None:
        make = lambda *size: torch.randn(*size, device=device).to(dtype).requires_grad_()
        x, *params = make(*shape), *(make(shape[1]) for _ in range(3))
        if last:
            x = x.contiguous(memory_format=torch.channels_last)
        y = (
            evonorm_s0(x, *params, groups=1)
            if form == "s0"
            else evonorm_b0(x, *params, training=True)
        )
        y.backward(torch.randn_like(y))

    for form in ("s0", "b0"):
        for dtype in (torch.float32, torch.bfloat16):
            for shape in ((1, 1, 1, 1), (3, 5, 7, 9), (2, 33, 40, 41)):
                for last in (False, True):
                    name = f"evonorm_{form} {dtype} {shape}" + (" channels-last" if last else "")
                    yield name, lambda a=(form, dtype, shape, last): call(*a)
