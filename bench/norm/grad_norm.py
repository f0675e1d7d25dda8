"""Benchmark lines of core grad_norm."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from bench.case import Case, Spec, Step
from solera.norm import adaptive_grad_clip_, multi_tensor_norm, orthogonalize_grad_


def resnet50_shapes() -> list[tuple[int, ...]]:
    """A ResNet-50's 161 parameters, 25.6 million numbers."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7), (64,), (64,)]
    width = 64
    for inner, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            for conv in ((inner, width, 1, 1), (inner, inner, 3, 3), (4 * inner, inner, 1, 1)):
                shapes += [conv, (conv[0],), (conv[0],)]
            if block == 0:
                shapes += [(4 * inner, width, 1, 1), (4 * inner,), (4 * inner,)]
            width = 4 * inner
    return [*shapes, (1000, 2048), (1000,)]


def _unit_norm(x: Tensor) -> Tensor:
    if x.dim() < 2:
        return x.norm(2.0)
    return x.norm(2.0, dim=tuple(range(1, x.dim())), keepdim=True)


def timm_clip(parameters: Sequence[Tensor]) -> None:
    """timm.utils.agc.adaptive_clip_grad, step for step."""
    for p in parameters:
        if p.grad is None:
            continue
        w, g = p.detach(), p.grad.detach()
        limit = _unit_norm(w).clamp_(min=1e-3).mul_(0.01)
        norm = _unit_norm(g)
        clipped = g * (limit / norm.clamp(min=1e-6))
        p.grad.detach().copy_(torch.where(norm < limit, g, clipped))


def _project(parameters: Sequence[Tensor]) -> None:
    """OrthoGrad as its repository writes it: a loop over the parameters."""
    for p in parameters:
        if p.grad is None:
            continue
        w, g = p.detach().view(-1), p.grad.view(-1)
        projected = g - torch.dot(w, g) / (torch.dot(w, w) + 1e-30) * w
        projected.mul_(g.norm() / (projected.norm() + 1e-30))
        p.grad.copy_(projected.view_as(p.grad))


def _case(
    ours: Callable, eager: Callable, dtype: torch.dtype, scale: float, device: str, moves: int
) -> Case:
    weights = [torch.randn(s, device=device).mul_(0.05).to(dtype) for s in resnet50_shapes()]
    grads = [torch.randn_like(w).mul_(scale) for w in weights]

    def running(function: Callable, as_dtype: torch.dtype) -> Step:
        """Each on gradients of its own, put back by the first call only: a limit holds what it made."""
        ps = [torch.nn.Parameter(w.to(as_dtype)) for w in weights]
        for p, g in zip(ps, grads):
            p.grad = g.to(as_dtype, copy=True)

        def run() -> Sequence[Tensor]:
            function(ps)
            return [p.grad for p in ps if p.grad is not None]

        return run

    n = sum(w.numel() for w in weights) * weights[0].element_size()
    return Case(
        ours=running(ours, dtype),
        exact=running(eager, torch.float64),
        eager=running(eager, dtype),
        bytes=moves * n,
        written=n if moves == 3 else 0,
    )


def _norm_case(dtype: torch.dtype, device: str) -> Case:
    tensors = [torch.randn(s, device=device).to(dtype) for s in resnet50_shapes()]
    n = sum(t.numel() for t in tensors)
    return Case(
        ours=lambda: [multi_tensor_norm(tensors)],
        exact=lambda: [torch.nn.utils.get_total_norm([t.double() for t in tensors])],
        eager=lambda: [torch.nn.utils.get_total_norm(tensors)],
        bytes=n * tensors[0].element_size(),
        written=0,
        tolerance=1e-6,
    )


def specs(device: str) -> Iterator[Spec]:
    f32, bf16 = torch.float32, torch.bfloat16

    def line(op, label, dtype, make, targets=None, quick=True, notes=""):
        return Spec(f"norm.{op}", label, dtype, make, quick, targets or {}, notes)

    timm = "eager: timm's loop, step for step"
    for dtype, quick in ((f32, True), (bf16, False)):
        yield line(
            "adaptive_grad_clip_", "ResNet-50, none clipped", dtype,
            lambda dtype=dtype: _case(adaptive_grad_clip_, timm_clip, dtype, 1e-4, device, 2),
            {"eager": 5} if quick else {}, quick, timm,
        )  # fmt: skip
    yield line(
        "orthogonalize_grad_", "ResNet-50", f32,
        lambda: _case(orthogonalize_grad_, _project, f32, 1.0, device, 3), quick=False, notes="eager: a loop",
    )  # fmt: skip
    for dtype, quick in ((f32, True), (bf16, False)):
        yield line(
            "multi_tensor_norm", "ResNet-50", dtype,
            lambda dtype=dtype: _norm_case(dtype, device), {}, quick, "eager: get_total_norm",
        )  # fmt: skip
