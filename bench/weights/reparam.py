"""Benchmark lines of cores reparam, reparam_linear and sparse_delta."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.case import Case, Spec, in_double, step
from solera.weights import (
    gradient_dropout,
    masked_weight,
    mixout,
    mixout_linear,
    sparse_delta_linear,
    weight_compand,
)
from solera.weights.reparam import kept

SEED, P = 1234, 0.9


def _composed(w: Tensor, u: Tensor, m: Tensor) -> Tensor:
    """The authors' form for a mask m."""
    return (m * w + (1 - m) * u - P * u) / (1 - P)


def _drawn(w: Tensor) -> Tensor:
    return torch.bernoulli(torch.full_like(w, 1 - P))


def _mask(w: Tensor) -> Tensor:
    return kept(w, torch.tensor(SEED, device=w.device), P, 0, False)


def _pair(n: int, dtype, device) -> tuple[Tensor, Tensor]:
    w, u = (torch.randn(n, n, device=device) * n**-0.5 for _ in range(2))
    return w.to(dtype), u.to(dtype)


def _linear(n: int, rows: int, dtype, device) -> Case:
    w, u = _pair(n, dtype, device)
    x, g = (torch.randn(rows, n, device=device).to(dtype) for _ in range(2))
    x, w = x.requires_grad_(), w.requires_grad_()
    m = _mask(w.detach())

    def exact() -> list[Tensor]:
        built = lambda x, w: F.linear(x, _composed(w, u.double(), m.double()))
        return list(in_double(lambda x, w: step(built, (x, w), [g.double()]), (x, w))())

    size = w.element_size()
    return Case(
        ours=step(lambda x, w: mixout_linear(x, w, u, P, SEED), (x, w), [g]),
        exact=exact,
        eager=step(lambda x, w: F.linear(x, _composed(w, u, _drawn(w))), (x, w), [g]),
        peers={"linear alone": step(F.linear, (x, w), [g])},
        bytes=5 * n * n * size + 5 * rows * n * size,
        written=n * n * size + 2 * rows * n * size,
        flops=6 * rows * n * n,
        tolerance=4e-6 if dtype == torch.float32 else 2e-2,
    )


def _elements(n: int, dtype, device) -> Case:
    w, u = _pair(n, dtype, device)
    g = torch.randn_like(w)
    w.requires_grad_()
    m = _mask(w.detach())

    def exact() -> list[Tensor]:
        built = lambda w: _composed(w, u.double(), m.double())
        return list(in_double(lambda w: step(built, (w,), [g.double()]), (w,))())

    return Case(
        ours=step(lambda w: mixout(w, u, P, SEED), (w,), [g]),
        exact=exact,
        eager=step(lambda w: _composed(w, u, _drawn(w)), (w,), [g]),
        bytes=5 * w.numel() * w.element_size(),
        written=2 * w.numel() * w.element_size(),
        tolerance=torch.finfo(dtype).eps,
    )


def _masked(n: int, dtype, device) -> Case:
    w, score = _pair(n, dtype, device)
    g = torch.randn_like(w)
    score.requires_grad_()
    today = lambda score, w: w * ((score > 0).to(w.dtype) + score - score.detach())

    def exact() -> list[Tensor]:
        return [torch.where(score > 0, w, 0.0).double(), g.double() * w.double()]

    return Case(
        ours=step(lambda score: masked_weight(w, score, 0.0), (score,), [g]),
        exact=exact,
        eager=step(lambda score: today(score, w), (score,), [g]),
        bytes=6 * w.numel() * w.element_size(),
        written=2 * w.numel() * w.element_size(),
        tolerance=torch.finfo(dtype).eps,
    )


def _compand(n: int, kind: str, device) -> Case:
    v = torch.randn(n, n, device=device, requires_grad=True)
    a, b = (torch.full((), s, device=device, requires_grad=True) for s in (1.3, 0.7))
    g = torch.randn(n, n, device=device) + v.detach()

    def today(v: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return a * ((v / b).atan() if kind == "arctan" else (v / b).tanh())

    return Case(
        ours=step(lambda v, a, b: weight_compand(v, a, b, kind), (v, a, b), [g]),
        exact=in_double(lambda *t: step(today, t, [g.double()]), (v, a, b)),
        eager=step(today, (v, a, b), [g]),
        compiled=step(torch.compile(today), (v, a, b), [g]),
        bytes=5 * v.numel() * 4,
        written=2 * v.numel() * 4,
        tolerance=1e-6,
    )


def _dropout(n: int, device) -> Case:
    g, h = torch.randn(n, n, device=device), torch.randn(n, n, device=device)

    def today() -> list[Tensor]:
        p = 0.5 * (1 + g.sign() * (g + h) / (g.abs() + h.abs() + 1e-20))
        return [torch.where(p > torch.rand_like(g), g, 0.3 * g)]

    def exact() -> list[Tensor]:
        """The reference's own choices: P is rounded to float32, and at a tie so is the answer."""
        import solera

        with solera.backend("reference"):
            return [gradient_dropout(g, h, 0.7, SEED).double()]

    return Case(
        ours=lambda: [gradient_dropout(g, h, 0.7, SEED)],
        exact=exact,
        eager=today,
        bytes=3 * g.numel() * 4,
        written=g.numel() * 4,
        tolerance=1e-7,
    )


def _sparse(n: int, rows: int, share: float, device) -> Case:
    w, _ = _pair(n, torch.float32, device)
    index = torch.nonzero(torch.rand(n * n, device=device) < share).squeeze(1)
    p = (w.flatten()[index] + 0.01).requires_grad_()
    x = torch.randn(rows, n, device=device, requires_grad=True)
    g = torch.randn(rows, n, device=device)

    def today(x: Tensor, p: Tensor) -> Tensor:
        return F.linear(x, w.to(p.dtype).flatten().scatter(0, index, p).view(n, n))

    return Case(
        ours=step(lambda x, p: sparse_delta_linear(x, w, index, p), (x, p), [g]),
        exact=in_double(lambda *t: step(today, t, [g.double()]), (x, p)),
        eager=step(today, (x, p), [g]),
        bytes=2 * n * n * 4 + index.numel() * 24 + 5 * rows * n * 4,
        written=index.numel() * 4 + 2 * rows * n * 4,
        flops=int((4 + 2 * share) * rows * n * n),
        tolerance=4e-6,
    )


def specs(device) -> Iterator[Spec]:
    f32, bf16 = torch.float32, torch.bfloat16
    drawn = "eager: the mask from torch.bernoulli"

    def line(op, label, dtype, make, targets=None, quick=False, notes=""):
        return Spec(f"weights.{op}", label, dtype, make, quick, targets or {}, notes)

    size = "4096 x 4096"
    for dtype in (f32, bf16):
        yield line(
            "mixout_linear", f"fwd+bwd {size}, 64 rows", dtype,
            lambda dtype=dtype: _linear(4096, 64, dtype, device),
            {"eager": 2.5} if dtype == f32 else {}, dtype == f32, drawn,
        )  # fmt: skip
        yield line(
            "mixout", f"fwd+bwd {size}", dtype, lambda dtype=dtype: _elements(4096, dtype, device),
            quick=dtype == f32, notes=drawn,
        )  # fmt: skip
    yield line("mixout_linear", f"fwd+bwd {size}, 1024 rows", f32,
               lambda: _linear(4096, 1024, f32, device), notes=drawn)  # fmt: skip
    yield line("masked_weight", f"fwd+bwd {size}, frozen weight", f32,
               lambda: _masked(4096, f32, device))  # fmt: skip
    yield line("sparse_delta_linear", f"fwd+bwd {size}, 64 rows, 10% trained", f32,
               lambda: _sparse(4096, 64, 0.1, device), quick=True)  # fmt: skip
    for kind in ("arctan", "tanh"):
        yield line("weight_compand", f"fwd+bwd {size}, {kind}", f32,
                   lambda kind=kind: _compand(4096, kind, device))  # fmt: skip
    yield line(
        "gradient_dropout",
        size,
        f32,
        lambda: _dropout(4096, device),
        notes=drawn.replace("bernoulli", "rand"),
    )
