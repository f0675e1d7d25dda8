"""Benchmark lines of core gram and what is made of it: slerp, Model Stock, Karcher means."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.case import Case, Spec, step
from solera.weights import gram, karcher_mean, model_stock, row_lincomb, slerp

Models = list[list[Tensor]]

try:
    from mergekit.merge_methods.api import merge_tensors
except ImportError:
    merge_tensors = None


def _mergekit(
    method: str, columns: Sequence[Sequence[Tensor]], base: bool, **parameters: Any
) -> dict:
    """mergekit's own function, where it is installed."""
    if merge_tensors is None:
        return {}
    index = 0 if base else None

    def run() -> list[Tensor]:
        return [
            merge_tensors(list(column), method, parameters=parameters, base_index=index)
            for column in columns
        ]

    return {"mergekit": run}


def _models(
    count: int, shapes: Sequence[tuple[int, ...]], dtype, device
) -> tuple[Models, list[Tensor]]:
    """Models around a base, with a part in common: fine-tuned weights are not independent."""
    base = [torch.randn(*s, device=device) for s in shapes]
    common = [torch.randn(*s, device=device) for s in shapes]
    models = [
        [(b + c + torch.randn_like(b)).to(dtype) for b, c in zip(base, common)]
        for _ in range(count)
    ]
    return models, [b.to(dtype) for b in base]


def _size(base: Sequence[Tensor]) -> int:
    return sum(t.nbytes for t in base)


def _quiet(function: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        with torch.no_grad():
            return function()

    return run


# ---- gram --------------------------------------------------------------------------------------------


def _dots(deltas: Tensor) -> Tensor:
    flat = deltas.flatten(1)
    return flat @ flat.T


def _gram(count: int, shapes, dtype, device) -> Case:
    models, base = _models(count, shapes, dtype, device)
    columns = list(zip(*models))

    def eager() -> list[Tensor]:
        return [torch.stack([_dots(torch.stack(c) - b) for c, b in zip(columns, base)])]

    def exact() -> list[Tensor]:
        deltas = (torch.stack([t.double() for t in c]) - b.double() for c, b in zip(columns, base))
        return [torch.stack([_dots(d) for d in deltas])]

    return Case(
        ours=_quiet(lambda: [gram(models, base=base)]),
        exact=exact,
        eager=eager,
        bytes=_size(base) * (count + 1),
        written=0,
        tolerance=1e-6 if dtype != torch.float64 else None,
    )


def _gram_backward(count: int, n: int, device) -> Case:
    models, base = _models(count, [(n,)], torch.float32, device)
    inputs = [*(m[0].requires_grad_() for m in models), base[0]]
    g = torch.randn(count, count, device=device, dtype=torch.float64)

    def build(function, inputs: Sequence[Tensor]):
        return step(function, inputs, [g])

    def plain(*w: Tensor) -> Tensor:
        return _dots(torch.stack(w[:-1]) - w[-1]).double()

    double = [t.detach().double().requires_grad_(t.requires_grad) for t in inputs]
    return Case(
        ours=build(lambda *w: gram(w[:-1], base=w[-1]), inputs),
        exact=build(plain, double),
        eager=build(plain, inputs),
        bytes=_size(base) * (3 * count + 2),
        written=_size(base) * count,
    )


# ---- slerp -------------------------------------------------------------------------------------------


def _plain_slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """What a user writes today."""
    cos = (a * b).sum() / (a.norm() * b.norm())
    angle = torch.acos(cos)
    sine = torch.sin(angle)
    return torch.sin((1 - t) * angle) / sine * a + torch.sin(t * angle) / sine * b


def _flat_slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """The same with the dot products of linear algebra, the fewest passes torch can do it in."""
    x, y = a.flatten(), b.flatten()
    cos = torch.dot(x, y) / (torch.dot(x, x) * torch.dot(y, y)).sqrt()
    angle = torch.acos(cos)
    sine = torch.sin(angle)
    out = a * (torch.sin((1 - t) * angle) / sine)
    return out.addcmul_(b, torch.sin(t * angle) / sine)


def _slerp(shapes, dtype, device) -> Case:
    (a, b), _ = _models(2, shapes, dtype, device)
    pairs = list(zip(a, b))

    return Case(
        ours=_quiet(lambda: slerp(a, b, 0.3)),
        exact=lambda: [_plain_slerp(x.double(), y.double(), 0.3) for x, y in pairs],
        eager=lambda: [_plain_slerp(x, y, 0.3) for x, y in pairs],
        peers={
            "torch.dot": lambda: [_flat_slerp(x, y, 0.3) for x, y in pairs],
            **_mergekit("slerp", pairs, True, t=0.3),
        },
        bytes=_size(a) * 3,
        written=_size(a),
        floor_note="one pass; two are needed (5 streams)",
    )


# ---- model_stock -------------------------------------------------------------------------------------


def _stock_of(deltas: Tensor, base: Tensor, by_row: bool) -> Tensor:
    """Deltas (K, ...) and their Gram matrix in one product each (per row if asked)."""
    K = len(deltas)
    flat = deltas.flatten(2).movedim(1, 0) if by_row else deltas.flatten(1)[None]
    dots = flat @ flat.mT
    norms = dots.diagonal(dim1=1, dim2=2).sqrt()
    cosines = dots / (norms[:, :, None] * norms[:, None, :])
    cos = (cosines.sum((1, 2)) - K) / (K * (K - 1))
    t = (K * cos / (1 + (K - 1) * cos)).clamp(0, 1)
    return base + t.reshape(-1, *[1] * (base.dim() - 1) if by_row else []) * deltas.mean(0)


def _stock(count: int, shapes, dtype, device, by_row: bool = False) -> Case:
    models, base = _models(count, shapes, dtype, device)
    columns = list(zip(*models))
    dim = 0 if by_row else None

    def plain(double: bool) -> list[Tensor]:
        up = (lambda t: t.double()) if double else (lambda t: t)
        return [
            _stock_of(torch.stack([up(t) for t in c]) - up(b), up(b), by_row)
            for c, b in zip(columns, base)
        ]

    peers = (
        {} if by_row else _mergekit("model_stock", [(b, *c) for c, b in zip(columns, base)], True)
    )
    return Case(
        ours=_quiet(lambda: model_stock(base, models, dim=dim)[0]),
        exact=lambda: plain(True),
        eager=lambda: plain(False),
        peers=peers,
        bytes=_size(base) * (count + 2),
        written=_size(base),
        floor_note="one pass; the second one reads what the first left in the cache",
    )


# ---- Karcher mean ------------------------------------------------------------------------------------


def _plain_karcher(x: Tensor, iterations: int) -> Tensor:
    """K tensors in one: every iteration passes over all of them."""
    shape, x = x.shape[1:], x.flatten(1)
    norms = x.norm(dim=1, keepdim=True)
    u = x / norms
    m = u.mean(0)
    m = m / m.norm()
    for _ in range(iterations):
        cos = (u @ m).clamp(-1, 1)
        angle = torch.acos(cos)
        tangent = (angle / torch.sin(angle) / len(u)) @ u - (
            angle / torch.sin(angle) * cos
        ).mean() * m
        length = tangent.norm()
        m = torch.cos(length) * m + torch.sin(length) * tangent / length
    return (m * norms.mean()).reshape(shape)


def _karcher(count: int, shapes, device) -> Case:
    models, _ = _models(count, shapes, torch.float32, device)
    columns = list(zip(*models))
    return Case(
        ours=_quiet(lambda: karcher_mean(models, max_iterations=4, tolerance=0.0)),
        exact=lambda: [_plain_karcher(torch.stack(c).double(), 4) for c in columns],
        eager=lambda: [_plain_karcher(torch.stack(c), 4) for c in columns],
        peers=_mergekit("karcher", columns, False, max_iter=4, tol=0.0),
        bytes=sum(t.nbytes for t in models[0]) * (count + 1),
        written=sum(t.nbytes for t in models[0]),
        tolerance=1e-5,
        floor_note=f"one pass; two are made ({2 * count + 1} streams)",
    )


# ---- row_lincomb -------------------------------------------------------------------------------------


def _rows(count: int, shape: tuple[int, int], dtype, device) -> Case:
    models, base = _models(count, [shape], dtype, device)
    tensors, b = [m[0] for m in models], base[0]
    c = torch.rand(count, shape[0], device=device) / count

    def plain(tensors: Sequence[Tensor], b: Tensor, c: Tensor) -> list[Tensor]:
        total = b
        for ck, w in zip(c, tensors):
            total = total + ck[:, None] * (w - b)
        return [total]

    return Case(
        ours=_quiet(lambda: [row_lincomb(tensors, c, base=b)]),
        exact=lambda: plain([t.double() for t in tensors], b.double(), c.double()),
        eager=lambda: plain(tensors, b, c.to(dtype)),
        bytes=b.nbytes * (count + 2),
        written=b.nbytes,
    )


def specs(device) -> Iterator[Spec]:
    f32, bf16 = torch.float32, torch.bfloat16
    big, tenth = [(1_000_000,)] * 100, [(1_000_000,)] * 10
    layers = [(1024, 1024)] * 24

    def line(op, label, dtype, make, targets=None, quick=False, notes=""):
        return Spec(f"weights.{op}", label, dtype, make, quick, targets or {}, notes)

    yield line(
        "gram", "8-way, base, 100 x 1M", f32, lambda: _gram(8, big, f32, device), {"eager": 3}
    )
    yield line("gram", "8-way, base, 10 x 1M", bf16, lambda: _gram(8, tenth, bf16, device))
    yield line(
        "gram", "8-way, base, 1000 x 1k", f32, lambda: _gram(8, [(1000,)] * 1000, f32, device)
    )
    yield line("gram", "fwd+bwd 4-way, base, 4M", f32, lambda: _gram_backward(4, 4_000_000, device))
    goal = {"eager": 2}
    yield line(
        "slerp", "2 x 100M, one tensor", f32, lambda: _slerp([(100_000_000,)], f32, device), goal
    )
    yield line("slerp", "2 x 100 x 1M", f32, lambda: _slerp(big, f32, device), goal)
    yield line("slerp", "2 x 24 x 1M", f32, lambda: _slerp(layers, f32, device), goal, quick=True)
    yield line("slerp", "2 x 24 x 1M", bf16, lambda: _slerp(layers, bf16, device))
    goal = {"eager": 3, "mergekit": 20}
    yield line("model_stock", "8 x 100 x 1M", f32, lambda: _stock(8, big, f32, device), goal)
    yield line(
        "model_stock", "8 x 10 x 1M", f32, lambda: _stock(8, tenth, f32, device), goal, quick=True
    )
    yield line("model_stock", "2 x 24 x 1M", bf16, lambda: _stock(2, layers, bf16, device))
    yield line(
        "model_stock", "by filter, 4 x 24 x 1M", f32, lambda: _stock(4, layers, f32, device, True)
    )
    yield line("karcher_mean", "4 steps, 8 x 10 x 1M", f32, lambda: _karcher(8, tenth, device),
               notes="a tenth of the other lines' size: the plain form passes 40 times over it")  # fmt: skip
    yield line(
        "row_lincomb", "8-way, base, 4096x4096", f32, lambda: _rows(8, (4096, 4096), f32, device)
    )


def small_calls(device) -> Iterator[tuple[str, Callable[[], object]]]:
    """Every op once, forward and backward, on small awkward shapes (python -m bench.every_op)."""

    def run(dtype: torch.dtype, count: int, dim: int | None) -> None:
        models, base = _models(count, [(3, 1031), (2, 5, 7)], dtype, device)
        for t in (*base, *(t for m in models for t in m)):
            t.requires_grad_()
        merged, _ = model_stock(base, models, dim=dim)
        torch.autograd.backward(merged, [torch.randn_like(t) for t in merged])
        with torch.no_grad():
            slerp(models[0], base, 0.3, dim=dim)

    for dtype in (torch.float32, torch.bfloat16):
        for count in (2, 9):
            for dim in (None, 0, -1):
                yield f"model_stock {dtype} {count} {dim}", partial(run, dtype, count, dim)
