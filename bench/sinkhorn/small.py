"""Benchmark lines of core small: 65,536 matrices of 4 x 4, as hyper-connections balance them, and others."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bench.case import Case, Spec, in_double, step
from solera.sinkhorn import sinkhorn_normalize

EPS = 1e-6


def _deepseek(x: Tensor, iterations: int) -> Tensor:
    """The public formula."""
    x = x.softmax(-1) + EPS
    x = x / (x.sum(-2, keepdim=True) + EPS)
    for _ in range(iterations - 1):
        x = x / (x.sum(-1, keepdim=True) + EPS)
        x = x / (x.sum(-2, keepdim=True) + EPS)
    return x


def _scaling(x: Tensor, iterations: int) -> Tensor:
    """What the compiler does best with: the exponentials once, then two vectors."""
    k = torch.exp(x - x.detach().amax(-1, keepdim=True))
    v = torch.ones_like(x[..., :1, :])
    for _ in range(iterations):
        u = 1 / (k * v).sum(-1, keepdim=True)
        v = 1 / (k * u).sum(-2, keepdim=True)
    return k * u * v


def _log(x: Tensor, iterations: int) -> Tensor:
    for _ in range(iterations):
        x = x - torch.logsumexp(x, -1, keepdim=True)
        x = x - torch.logsumexp(x, -2, keepdim=True)
    return x.exp()


_EAGER: dict[str, Callable] = {"deepseek": _deepseek, "scaling": _scaling, "log": _log}


def _package(iterations: int) -> Callable | None:
    """The package hyper-connections's own (log-domain, columns first); None if it is not there."""
    try:
        from hyper_connections.mHCv2 import sinkhorn_knopps
    except ImportError:
        return None
    return lambda x: sinkhorn_knopps(x, iterations)


def _case(shape, variant: str, iterations: int, backward: bool, dtype, device: str) -> Case:
    x = torch.randn(shape, device=device).to(dtype).requires_grad_(backward)
    grads = [torch.randn(shape, device=device).to(dtype)] if backward else None

    def steps(function: Callable) -> Callable:
        return lambda t: step(function, [t], None if grads is None else [grads[0].to(t.dtype)])

    ours = lambda x: sinkhorn_normalize(x, iterations, variant=variant, eps=EPS)
    eager = lambda x: _EAGER[variant](x.float() if x.dtype == torch.bfloat16 else x, iterations).to(
        x.dtype
    )
    package = _package(iterations) if variant == "log" else None
    kept: list[int] = []
    if backward:
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: kept.append(t.numel() * t.element_size()) or t, lambda t: t
        ):
            ours(x)
    return Case(
        ours=steps(ours)(x),
        exact=in_double(steps(eager), [x]),
        eager=steps(eager)(x),
        compiled=steps(torch.compile(eager))(x),
        peers={} if package is None else {"hyper-connections": steps(package)(x)},
        # Forward reads x, writes the result; backward reads x and its gradient, writes x's.
        bytes=x.numel() * x.element_size() * (5 if backward else 2),
        saved_bytes=sum(kept) if backward else None,
        floor_note="arithmetic, not bytes: docs/performance/sinkhorn_small.md",
    )


def specs(device: str) -> Iterator[Spec]:
    f32, bf16 = torch.float32, torch.bfloat16
    mhc = (65536, 4, 4)
    for shape, variant, dtype, backward, targets in (
        (mhc, "deepseek", f32, False, {"eager": 40, "compile": 10}),
        (mhc, "deepseek", f32, True, {"eager": 30, "compile": 10}),
        (mhc, "scaling", f32, True, {}),
        (mhc, "log", f32, True, {}),
        (mhc, "deepseek", bf16, True, {}),
        ((16384, 8, 8), "deepseek", f32, True, {}),
        ((1024, 32, 32), "deepseek", f32, True, {}),
    ):
        sizes = "x".join(map(str, shape))
        yield Spec(
            op="sinkhorn.sinkhorn_normalize",
            label=f"{'fwd+bwd' if backward else 'fwd'} {sizes}, 20 it, {variant}",
            dtype=dtype,
            make=lambda s=shape, v=variant, d=dtype, b=backward: _case(s, v, 20, b, d, device),
            quick=bool(targets),
            targets=targets,
        )
