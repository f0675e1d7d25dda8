"""Benchmark lines of core lincomb."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from bench.case import Case, Spec, step
from solera.weights import lincomb


def _numbers(count: int) -> list[float]:
    return [0.25 * (k + 1) / count for k in range(count)]


def _loop(models: Sequence[Sequence[Tensor]], c: Sequence[float]) -> list[Tensor]:
    """What a user writes today."""
    out = []
    for column in zip(*models):
        total = torch.zeros_like(column[0])
        for ck, w in zip(c, column):
            total = total + ck * w
        out.append(total)
    return out


def _foreach(models: Sequence[Sequence[Tensor]], c: Sequence[float]) -> list[Tensor]:
    """The quickest of torch's own forms: multi-tensor, in place after the first."""
    total = torch._foreach_mul(models[0], c[0])
    for ck, model in zip(c[1:], models[1:]):
        torch._foreach_add_(total, model, alpha=ck)
    return list(total)


def _case(count: int, shapes: list[tuple[int, ...]], dtype, device, with_out: bool = False) -> Case:
    models = [[torch.randn(*s, device=device).to(dtype) for s in shapes] for _ in range(count)]
    c = _numbers(count)
    out = [torch.empty_like(t) for t in models[0]] if with_out else None

    def ours() -> list[Tensor]:
        with torch.no_grad():
            return lincomb(models, c, out=out)

    def exact() -> list[Tensor]:
        return [sum(ck * w.double() for ck, w in zip(c, column)) for column in zip(*models)]

    n = sum(t.numel() for t in models[0]) * models[0][0].element_size()
    return Case(
        ours=ours,
        exact=exact,
        eager=lambda: _loop(models, c),
        compiled=step(torch.compile(lambda *flat: _loop(_unflatten(flat, count), c)), [t for m in models for t in m])
        if len(shapes) <= 8 else None,
        peers={"_foreach": lambda: _foreach(models, c)},
        bytes=n * (count + 1),
        written=n,
    )  # fmt: skip


def _unflatten(flat: Sequence[Tensor], count: int) -> list[Sequence[Tensor]]:
    length = len(flat) // count
    return [flat[k * length : (k + 1) * length] for k in range(count)]


def _learned(count: int, shape: tuple[int, ...], device) -> Case:
    """Gradient to the coefficients around a base; the models are frozen."""
    tensors = [torch.randn(*shape, device=device) for _ in range(count)]
    base = torch.randn(*shape, device=device)
    # A gradient along the deltas: dots with one that has nothing to do with them cancel to a thousandth of
    # their size, and then two float32 errors say nothing about each other.
    g = sum(tensors) - count * base
    c = torch.tensor(_numbers(count), device=device, requires_grad=True)

    def loop(c: Tensor, *w: Tensor) -> Tensor:
        b = w[-1]
        return b + sum(ck * (t - b) for ck, t in zip(c, w))

    def build(function, c: Tensor):
        inputs = [c, *(t.to(c.dtype) for t in (*tensors, base))]
        return step(function, inputs, [g.to(c.dtype)])

    ours = build(lambda c, *w: lincomb(w[:-1], c, base=w[-1]), c)
    n = base.numel() * 4
    return Case(
        ours=ours,
        exact=lambda: build(loop, c.detach().double().requires_grad_())(),
        eager=build(loop, c),
        compiled=build(torch.compile(loop), c),
        bytes=n * (2 * count + 4),
        written=n,
    )


def _call(device) -> Case:
    a, b = torch.randn(16, device=device), torch.randn(16, device=device)
    return Case(
        ours=lambda: [lincomb([a, b], [0.5, 0.25])],
        exact=lambda: [0.5 * a.double() + 0.25 * b.double()],
        eager=lambda: [0.5 * a + 0.25 * b],
        peers={"mul": step(torch.mul, (a, b))},
        bytes=16 * 4 * 3,
    )


def specs(device) -> Iterator[Spec]:
    f32, bf16 = torch.float32, torch.bfloat16
    big = [(1_000_000,)] * 100
    goal = {"eager": 2.5, "_foreach": 1.4, "copy": 1.0}

    def line(label, dtype, make, targets=None, quick=False, notes=""):
        return Spec("weights.lincomb", label, dtype, make, quick, targets or {}, notes)

    yield line("8-way, 100 x 1M", f32, lambda: _case(8, big, f32, device), goal)
    yield line("8-way, 25 x 1M", f32, lambda: _case(8, big[:25], f32, device), goal, quick=True)
    yield line("8-way, 100 x 1M, out=", f32, lambda: _case(8, big, f32, device, True))
    yield line("8-way, 100 x 1M", bf16, lambda: _case(8, big, bf16, device))
    yield line("2-way, 8 x 4M", f32, lambda: _case(2, [(4_000_000,)] * 8, f32, device), quick=True)
    yield line("20-way, 8 x 1M", f32, lambda: _case(20, [(1_000_000,)] * 8, f32, device))
    yield line("8-way, 1000 x 1k", f32, lambda: _case(8, [(1000,)] * 1000, f32, device), quick=True)
    yield line("8-way, 100 x 100003", f32, lambda: _case(8, [(100_003,)] * 100, f32, device))
    yield line(
        "learned c, base, 4-way 4M", f32, lambda: _learned(4, (4_000_000,), device), quick=True
    )
    notes = "beside torch.mul's own call: the price of a call that does nothing"
    yield line("one call, 2 x 16 floats", f32, lambda: _call(device), {"mul": 1 / 3}, True, notes)
