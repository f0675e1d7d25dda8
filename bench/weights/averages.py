"""Benchmark lines of the averages: sweeps, learned soups, running means, lookahead, indexed banks."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.func import functional_call

from bench.case import Case, Spec, Step, in_double, step
from solera.weights import Soup, indexed_ema_, lookahead_, running_mean_, wise_ft


def _sweep(count: int, n: int, dtype, device, backward: bool) -> Case:
    """`count` interpolations of two models of n parameters."""
    base, tuned = (torch.randn(n, device=device).to(dtype) for _ in range(2))
    alphas = torch.linspace(0, 1, count, device=device).requires_grad_(backward)

    def loop(alpha: Tensor, b: Tensor, w: Tensor) -> list[Tensor]:
        return [torch.lerp(b, w, a.to(b.dtype)) for a in alpha]

    def ours(alpha: Tensor, b: Tensor, w: Tensor) -> list[Tensor]:
        return list(wise_ft(b, w, alpha).unbind(0))

    # Along the difference of the models: dots with a gradient that has nothing to do with it cancel.
    grads = [(tuned - base) * (0.5 + a) for a in range(count)] if backward else None

    def build(function, tensors):
        g = None if grads is None else [x.to(tensors[1].dtype) for x in grads]
        return step(function, tensors, g)

    inputs = [alphas, base, tuned]
    size = base.element_size() * n
    return Case(
        ours=build(ours, inputs),
        exact=in_double(lambda *t: build(loop, t), inputs),
        eager=build(loop, inputs),
        bytes=size * (2 + count) * (2 if backward else 1),
        written=size * count,
    )


class _Mlp(nn.Module):
    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        layers = [nn.Linear(width, width) for _ in range(depth)]
        self.layers = nn.Sequential(*(x for layer in layers for x in (layer, nn.ReLU())))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def _learned(count: int, width: int, depth: int, rows: int, device) -> Case:
    """Forward and backward of the coefficients, beside functional_call on the weighted sum of the models."""
    models = [_Mlp(width, depth).to(device) for _ in range(count)]
    soup = Soup(_Mlp(width, depth).to(device), models)
    x = torch.randn(rows, width, device=device)
    names = [n for n, _ in models[0].named_parameters()]
    columns = [[m.get_parameter(n).detach() for m in models] for n in names]
    module = _Mlp(width, depth).to(device)

    def functional(merge: Callable, c: Tensor, columns: list, x: Tensor) -> Step:
        def run() -> list[Tensor]:
            merged = {n: merge(c[:, i], w) for i, (n, w) in enumerate(zip(names, columns))}
            value = functional_call(module, merged, (x,)).square().mean()
            return [value.detach(), *torch.autograd.grad(value, [c])]

        return run

    def ours() -> list[Tensor]:
        value = soup(x).square().mean()
        return [value.detach(), *torch.autograd.grad(value, list(soup.parameters()))]

    def terms(c: Tensor, w: list[Tensor]) -> Tensor:
        return sum(ck * t for ck, t in zip(c, w))  # type: ignore[return-value]

    c = soup.coefficients.detach().clone().requires_grad_()
    stacked = [torch.stack(w) for w in columns]
    parameters = sum(w[0].numel() for w in columns) * 4
    return Case(
        ours=ours,
        exact=lambda: functional(
            terms, c.detach().double().requires_grad_(), [[t.double() for t in w] for w in columns],
            x.double(),
        )(),
        eager=functional(terms, c, columns, x),
        peers={"stacked": functional(lambda c, w: torch.tensordot(c, w, 1), c, stacked, x)},
        bytes=parameters * (2 * count + 4),
        written=2 * parameters,
        flops=6 * rows * width * width * depth,
        tolerance=1e-5,  # dots of random gradients that cancel
    )  # fmt: skip


def _running(
    update: Callable[[list[Tensor], list[Tensor]], object], start: list[Tensor], new: list[Tensor]
) -> Step:
    """On averages of its own; its first call, the one that is checked, makes one step from the start."""
    averages, others = [t.clone() for t in start], [t.clone() for t in new]

    def run() -> list[Tensor]:
        update(averages, others)
        return averages

    return run


def _greedy_step(count: int, n: int, device) -> Case:
    start, new = ([torch.randn(n, device=device) for _ in range(count)] for _ in range(2))
    size = count * n * 4
    return Case(
        ours=_running(lambda a, p: running_mean_(a, p, 3), start, new),
        exact=lambda: [a.double() + (p.double() - a.double()) / 4 for a, p in zip(start, new)],
        eager=_running(lambda a, p: torch._foreach_lerp_(a, p, 0.25), start, new),
        bytes=3 * size,
        written=size,
    )


def _lookahead(count: int, n: int, device) -> Case:
    start, new = ([torch.randn(n, device=device) for _ in range(count)] for _ in range(2))
    size = count * n * 4

    def foreach(a: list[Tensor], p: list[Tensor]) -> None:
        torch._foreach_lerp_(a, p, 0.5)
        torch._foreach_copy_(p, a)

    def loop(a: list[Tensor], p: list[Tensor]) -> None:
        for x, y in zip(a, p):
            x.add_(y - x, alpha=0.5)
            y.copy_(x)

    return Case(
        ours=_running(lambda a, p: lookahead_(a, p, 0.5), start, new),
        exact=lambda: [a.double() + (p.double() - a.double()) / 2 for a, p in zip(start, new)],
        eager=_running(loop, start, new),
        peers={"_foreach": _running(foreach, start, new)},
        bytes=4 * size,
        written=2 * size,
    )


def _bank(rows: int, width: int, batch: int, distinct: int, device) -> Case:
    """A batch that names some rows more than once."""
    bank = torch.randn(rows, width, device=device)
    some = torch.randint(0, rows, (distinct,), device=device)
    index = some[torch.randint(0, distinct, (batch,), device=device)]
    values, decay = torch.randn(batch, width, device=device), 0.9
    places = index.tolist()

    def loop(t: Tensor) -> Tensor:
        for b, i in enumerate(places):
            t[i] = decay * t[i] + (1 - decay) * values[b].to(t.dtype)
        return t

    def running(update: Callable[[Tensor], object]) -> Step:
        own = bank.clone()

        def run() -> list[Tensor]:
            update(own)
            return [own]

        return run

    size = width * 4
    return Case(
        ours=running(lambda t: indexed_ema_(t, index, values, decay)),
        exact=lambda: [loop(bank.double())],
        eager=running(loop),
        bytes=size * (batch + 2 * len(set(places))),
        written=size * len(set(places)),
    )


def small_calls(device: str):
    """Every op once, on awkward shapes."""

    def call(dtype) -> None:
        random = lambda *s: torch.randn(*s, device=device).to(dtype)
        sizes = (1, 13, 1000, 70_001)
        a, b = ([random(n).requires_grad_() for n in sizes] for _ in range(2))
        alpha = torch.rand(3, len(sizes), device=device, requires_grad=True)
        out = wise_ft(a, b, alpha)
        torch.autograd.backward(out, [torch.randn_like(y) for y in out])
        slow, fast = ([random(n) for n in sizes] for _ in range(2))
        lookahead_(slow, fast, 0.5)
        for width in (1, 7, 1500):
            index = torch.randint(-1, 9, (40,), device=device)
            indexed_ema_(random(9, width), index, random(40, width), 0.9)

    for dtype in (torch.float32, torch.bfloat16):
        yield f"averages {dtype}", lambda d=dtype: call(d)


def specs(device) -> Iterator[Spec]:
    f32, bf16 = torch.float32, torch.bfloat16
    million = 1_000_000

    def line(op, label, dtype, make, targets=None, quick=False, notes=""):
        return Spec(f"weights.{op}", label, dtype, make, quick, targets or {}, notes)

    lerp = "eager: torch.lerp for each alpha"
    yield line(
        "wise_ft", "11 alphas, 2 x 25M", f32, lambda: _sweep(11, 25 * million, f32, device, False),
        {"eager": 2}, notes=lerp,
    )  # fmt: skip
    yield line(
        "wise_ft", "11 alphas, 2 x 2.5M", f32,
        lambda: _sweep(11, 5 * million // 2, f32, device, False), quick=True, notes=lerp,
    )  # fmt: skip
    yield line(
        "wise_ft", "11 alphas, 2 x 25M", bf16,
        lambda: _sweep(11, 25 * million, bf16, device, False), notes=lerp,
    )  # fmt: skip
    yield line(
        "wise_ft", "fwd+bwd of alpha, 11 alphas, 2 x 2.5M", f32,
        lambda: _sweep(11, 5 * million // 2, f32, device, True), {"eager": 2}, notes=lerp,
    )  # fmt: skip
    yield line(
        "Soup", "fwd+bwd of coefficients, 8 MLPs of 8 x 1024^2, 16 rows", f32,
        lambda: _learned(8, 1024, 8, 16, device), {"eager": 2}, quick=True,
        notes="eager: functional_call on sums of the models; stacked: tensordot of K models copied into one tensor",
    )  # fmt: skip
    yield line(
        "running_mean_", "200 x 100k", f32, lambda: _greedy_step(200, 100_000, device),
        quick=True, notes="one step of a greedy soup; eager: torch._foreach_lerp_, the same three streams",
    )  # fmt: skip
    yield line(
        "lookahead_", "200 x 100k", f32, lambda: _lookahead(200, 100_000, device),
        {"eager": 2, "_foreach": 1.2}, quick=True, notes="eager: a loop of add_ and copy_",
    )  # fmt: skip
    yield line(
        "lookahead_", "10 x 10M", f32, lambda: _lookahead(10, 10 * million, device),
        {"_foreach": 1.2},
    )  # fmt: skip
    yield line(
        "indexed_ema_", "bank 100k x 100, batch 4096 on 2048 rows", f32,
        lambda: _bank(100_000, 100, 4096, 2048, device), {"eager": 10},
        notes="eager: the loop over the batch",
    )  # fmt: skip
    yield line(
        "class_ema_", "10 prototypes x 512, batch 4096", f32,
        lambda: _bank(10, 512, 4096, 10, device), {"eager": 10},
        notes="eager: the loop over the batch",
    )  # fmt: skip
