"""Benchmark lines of core consensus and of the exact quantiles under it: ties and dare."""

from __future__ import annotations

import importlib.util
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

import solera
from bench.case import Case, Spec, step
from solera.weights import breadcrumbs, dare, ties

DENSITY = 0.2
CHECKED = (
    2  # tensors of a list held to the sorted or seeded reference, which takes a second for each
)
Lists = Sequence[Sequence[Tensor]]


def peft_functions():
    """peft's merging functions, or None. The file is read alone: the package needs transformers."""
    found = importlib.util.find_spec("peft")
    if found is None or found.origin is None:
        return None
    module = types.ModuleType("peft_merge_utils")
    path = Path(found.origin).parent / "utils" / "merge_utils.py"
    exec(compile(path.read_text(), str(path), "exec"), module.__dict__)
    return module


def mergekit_merge() -> Callable[..., Tensor] | None:
    """mergekit's function over tensors, or None where it cannot be imported."""
    try:
        from mergekit.merge_methods import merge_tensors
    except ImportError:
        return None
    return merge_tensors


def _models(
    count: int, length: int, size: int, dtype, device
) -> tuple[list[Tensor], list[list[Tensor]]]:
    base = [torch.randn(size, device=device).to(dtype) for _ in range(length)]
    models = [[b + 0.1 * torch.randn_like(b) for b in base] for _ in range(count)]
    return base, models


def ties_by_kthvalue(base: Sequence[Tensor], models: Lists, w: Sequence[float]) -> list[Tensor]:
    """What a user writes in torch today: kthvalue per tensor, then masks on the stack."""
    out = []
    for item, b in enumerate(base):
        deltas = []
        for model, wk in zip(models, w):
            d = model[item] - b
            size = d.abs().flatten()
            k = int(DENSITY * size.numel())
            t = size.kthvalue(size.numel() - k + 1).values
            deltas.append(torch.where(d.abs() >= t, wk * d, 0))
        stacked = torch.stack(deltas)
        sign = torch.where(stacked.sum(0) >= 0, 1.0, -1.0).to(b.dtype)
        agree = stacked.sign() == sign
        shares = torch.tensor(w, dtype=b.dtype, device=b.device).view(-1, *[1] * b.dim())
        divisor = (agree * shares).sum(0)
        merged = (stacked * agree).sum(0) / torch.where(divisor.abs() < 1e-8, 1, divisor)
        out.append(b + merged)
    return out


def dare_by_bernoulli(base: Sequence[Tensor], models: Lists, w: Sequence[float]) -> list[Tensor]:
    out = []
    for item, b in enumerate(base):
        total = torch.zeros_like(b)
        for model, wk in zip(models, w):
            d = model[item] - b
            total += wk / DENSITY * d * torch.bernoulli(torch.full_like(d, DENSITY))
        out.append(b + total)
    return out


def _mergekit(
    method: str, base: Sequence[Tensor], models: Lists, w: Sequence[float], normalize: bool
):
    merge = mergekit_merge()
    if merge is None:
        return None
    parameters = {"weight": list(w), "density": DENSITY, "normalize": normalize, "lambda": 1.0}

    def run() -> list[Tensor]:
        with torch.no_grad():
            return [
                merge([b, *[m[item] for m in models]], method, parameters=parameters, base_index=0)
                for item, b in enumerate(base)
            ]

    return run


def _ties(
    count: int, length: int, size: int, dtype, device, peers: bool, model: bool = False
) -> Case:
    base, models = _models(count, length, size, dtype, device)
    w = [1 / count] * count
    scope, checked = ("model", length) if model else ("tensor", CHECKED)

    def ours() -> list[Tensor]:
        with torch.no_grad():
            return ties(base, models, w, DENSITY, scope=scope)[:checked]

    def exact() -> list[Tensor]:
        # The same float32 differences and thresholds, so that masks and signs are the same.
        first = [m[:checked] for m in models]
        with torch.no_grad(), solera.backend("reference"):
            return [t.double() for t in ties(base[:checked], first, w, DENSITY, scope=scope)]

    others: dict = {}
    if peers:
        peft, mergekit = peft_functions(), _mergekit("ties", base, models, w, True)
        if mergekit is not None:
            others["mergekit"] = mergekit
        if peft is not None:
            shares = torch.tensor(w, device=device)
            others["peft"] = lambda: [
                b + peft.ties([m[item] - b for m in models], shares, DENSITY)
                for item, b in enumerate(base)
            ]
    n = sum(t.numel() for t in base) * base[0].element_size()
    return Case(
        ours=ours,
        exact=exact,
        eager=None if model else lambda: ties_by_kthvalue(base, models, w)[:CHECKED],
        peers=others,
        bytes=n * (2 * (count + 1) + 1),
        written=n,
        tolerance=0.0 if dtype == torch.float32 else None,
        floor_note="two reads: thresholds, then the merge",
    )


def _dare(count: int, length: int, size: int, dtype, device, peers: bool, **options) -> Case:
    base, models = _models(count, length, size, dtype, device)
    w = [1 / count] * count

    def ours() -> list[Tensor]:
        with torch.no_grad():
            return dare(base, models, w, DENSITY, seed=1, **options)[:CHECKED]

    def exact() -> list[Tensor]:
        # A tensor's mask does not depend on the others of the list.
        first = [m[:CHECKED] for m in models]
        with torch.no_grad(), solera.backend("reference"):
            found = dare(base[:CHECKED], first, w, DENSITY, seed=1, **options)
        return [t.double() for t in found]

    others: dict = {}
    mergekit = _mergekit("dare_linear", base, models, w, False) if peers else None
    if mergekit is not None:
        others["mergekit"] = mergekit
    n = sum(t.numel() for t in base) * base[0].element_size()
    passes = 2 if options.get("rescale") == "l1" else 1
    return Case(
        ours=ours,
        exact=exact,
        eager=lambda: dare_by_bernoulli(base, models, w)[:CHECKED],
        peers=others,
        bytes=n * (passes * (count + 1) + 1),
        written=n,
        tolerance=1e-6,
    )


def _breadcrumbs(device) -> Case:
    base, models = _models(4, 8, 1_000_000, torch.float32, device)
    w = [0.25] * 4

    def run() -> list[Tensor]:
        with torch.no_grad():
            return breadcrumbs(base, models, w, DENSITY, 0.01)

    def sorted_form() -> list[Tensor]:
        out = []
        for item, b in enumerate(base):
            total = b.clone()
            for model in models:
                d = model[item] - b
                size = d.abs()
                order = size.flatten().sort(descending=True).values
                kept, top = int(DENSITY * order.numel()), int(0.01 * order.numel())
                band = (size >= order[kept + top - 1]) & (size <= order[top])
                total += torch.where(band, 0.25 * d, 0)
            out.append(total)
        return out

    n = sum(t.numel() for t in base) * 4
    return Case(
        ours=run,
        exact=lambda: [t.double() for t in sorted_form()],
        eager=sorted_form,
        bytes=n * (3 * 5 + 1),
        written=n,
        tolerance=1e-6,
    )


def _learned(device) -> Case:
    """Gradients to weights and to nothing else: the models are frozen."""
    base, models = _models(4, 1, 4_000_000, torch.float32, device)
    w = torch.tensor([0.3, 0.2, 0.4, 0.1], device=device, requires_grad=True)
    g = sum(m[0] for m in models) - 4 * base[0]

    def merged(w: Tensor, b: Tensor, *tensors: Tensor) -> Tensor:
        return ties(b, tensors, w, DENSITY)

    def eager(w: Tensor, b: Tensor, *tensors: Tensor) -> Tensor:
        deltas = []
        for k, t in enumerate(tensors):
            d = t - b
            size = d.detach().abs().flatten()
            threshold = size.kthvalue(size.numel() - int(DENSITY * size.numel()) + 1).values
            deltas.append(torch.where(d.detach().abs() >= threshold, w[k] * d, 0))
        stacked = torch.stack(deltas)
        agree = stacked.sign() == torch.where(stacked.sum(0) >= 0, 1.0, -1.0).to(b.dtype)
        divisor = (agree * w[:, None]).sum(0)
        return b + (stacked * agree).sum(0) / torch.where(divisor.abs() < 1e-8, 1, divisor)

    def build(function, dtype):
        v = w if dtype == torch.float32 else w.detach().to(dtype).requires_grad_()
        inputs = [v, *(t.to(dtype) for t in (base[0], *[m[0] for m in models]))]
        return step(function, inputs, [g.to(dtype)])

    n = base[0].numel() * 4
    return Case(
        ours=build(merged, torch.float32),
        exact=lambda: build(eager, torch.float64)(),
        eager=build(eager, torch.float32),
        bytes=n * (3 * 5 + 2),
        written=n,
        tolerance=1e-4,  # float64 finds other signs where float32 sums nearly cancel
    )


def specs(device) -> Iterator[Spec]:
    f32, bf16 = torch.float32, torch.bfloat16
    million = 1_000_000

    def line(op, label, dtype, make, targets=None, quick=False, notes=""):
        return Spec(f"weights.{op}", label, dtype, make, quick, targets or {}, notes)

    exact = "bit-equal to the sorted reference"
    tenth = f"a tenth of 8 x 100M, since the peers take minutes; {exact}"
    yield line("ties", "8 x 10 x 1M", f32, lambda: _ties(8, 10, million, f32, device, True),
               {"eager": 14, "peft": 30, "mergekit": 50}, notes=tenth)  # fmt: skip
    yield line("ties", "8 x 100 x 1M", f32, lambda: _ties(8, 100, million, f32, device, False),
               {"eager": 14}, notes=exact)  # fmt: skip
    yield line("ties", "8 x 2 x 1M", f32, lambda: _ties(8, 2, million, f32, device, True),
               {"eager": 14, "peft": 30, "mergekit": 50}, True, exact)  # fmt: skip
    yield line("ties", "8 x 10 x 1M", bf16, lambda: _ties(8, 10, million, bf16, device, False))
    yield line(
        "ties",
        "8 x 10 x 1M, scope model",
        f32,
        lambda: _ties(8, 10, million, f32, device, False, True),
    )
    yield line("ties", "8 x 1000 x 1k", f32, lambda: _ties(8, 1000, 1000, f32, device, False))
    yield line("ties", "learned weights, 4 x 4M, fwd+bwd", f32, lambda: _learned(device))
    yield line("dare", "8 x 10 x 1M", f32, lambda: _dare(8, 10, million, f32, device, True),
               {"eager": 8, "mergekit": 10}, notes="a tenth of 8 x 100M, since the peers take minutes")  # fmt: skip
    yield line(
        "dare",
        "8 x 100 x 1M",
        f32,
        lambda: _dare(8, 100, million, f32, device, False),
        {"eager": 8},
    )
    yield line("dare", "8 x 2 x 1M", f32, lambda: _dare(8, 2, million, f32, device, True),
               {"eager": 8, "mergekit": 10})  # fmt: skip
    yield line(
        "dare",
        "8 x 10 x 1M, l1",
        f32,
        lambda: _dare(8, 10, million, f32, device, False, rescale="l1"),
    )
    yield line(
        "dare",
        "8 x 10 x 1M, mass",
        f32,
        lambda: _dare(8, 10, million, f32, device, False, consensus="mass"),
    )
    yield line("breadcrumbs", "4 x 8 x 1M", f32, lambda: _breadcrumbs(device))
