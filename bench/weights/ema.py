"""Benchmark lines of core ema."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from bench.case import Case, Spec, Step
from solera.weights import ema_

DECAY = 0.999


def _timm() -> type | None:
    """timm's ModelEmaV3. Its file stands alone; the package needs torchvision to be imported."""
    found = importlib.util.find_spec("timm")
    if found is None or found.origin is None:
        return None
    path = Path(found.origin).parent / "utils" / "model_ema.py"
    spec = importlib.util.spec_from_file_location("timm_utils_model_ema", path)
    if spec is None or spec.loader is None or not path.exists():
        return None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.ModelEmaV3


class _Weights(torch.nn.Module):
    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self.weights = torch.nn.ParameterList([torch.nn.Parameter(t, False) for t in tensors])


def _stochastic_eager(averages: list[Tensor], parameters: list[Tensor]) -> None:
    """Random bits below the last place of bfloat16, then truncation: three tensors of temporaries."""
    for a, p in zip(averages, parameters):
        x = torch.lerp(a.float(), p.float(), 1 - DECAY)
        bits = x.view(torch.int32)
        bits += torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, device=a.device)
        bits &= -65536
        a.copy_(x)


def _case(count: int, n: int, average, parameter, rounding: str, device) -> Case:
    start = [torch.randn(n, device=device).to(average) for _ in range(count)]
    parameters = [torch.randn(n, device=device).to(parameter) for _ in range(count)]
    w = 1 - DECAY

    def running(update: Callable[[list[Tensor]], object]) -> Step:
        """Averages of its own; its first call, the one that is checked, makes one step from the start."""
        averages = [t.clone() for t in start]

        def run() -> list[Tensor]:
            update(averages)
            return averages

        return run

    peers = {}
    if rounding == "stochastic":
        eager = running(lambda a: _stochastic_eager(a, parameters))
        kind = _timm()
        if kind is not None and average == parameter == torch.bfloat16:
            model, averaged = _Weights(parameters), kind(_Weights(start), decay=DECAY)

            def timm() -> list[Tensor]:
                averaged.update(model)
                return list(averaged.module.weights)

            peers["timm"] = timm
    elif average == parameter:
        eager = running(lambda a: torch._foreach_lerp_(a, parameters, w))
    else:
        eager = running(lambda a: [t.lerp_(p.to(average), w) for t, p in zip(a, parameters)])
    written = count * n * start[0].element_size()
    return Case(
        ours=running(lambda a: ema_(a, parameters, DECAY, rounding=rounding)),
        exact=lambda: [
            a.double() + w * (p.double() - a.double()) for a, p in zip(start, parameters)
        ],
        eager=eager,
        peers=peers,
        bytes=2 * written + count * n * parameters[0].element_size(),
        written=written,
        tolerance=torch.finfo(average).eps,
    )


def specs(device) -> Iterator[Spec]:
    f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16

    def line(
        label, average, parameter, count, n, rounding="nearest", targets=None, quick=True, notes=""
    ):
        return Spec(
            op="weights.ema_",
            label=label,
            dtype=average,
            make=lambda: _case(count, n, average, parameter, rounding, device),
            targets=targets or {},
            quick=quick,
            notes=notes,
        )

    yield line(
        "200 x 100k stochastic", bf16, bf16, 200, 100_000, "stochastic", {"timm": 10},
        notes="eager: the same rounding in plain torch, with torch.randint",
    )  # fmt: skip
    yield line("200 x 100k stochastic", f16, f32, 200, 100_000, "stochastic", quick=False)
    yield line("200 x 100k", f32, f32, 200, 100_000, notes="eager: torch._foreach_lerp_")
    yield line("200 x 100k", bf16, bf16, 200, 100_000, notes="eager: torch._foreach_lerp_")
    yield line("200 x 100k, bfloat16 parameters", f32, bf16, 200, 100_000, quick=False)
    yield line("1000 x 1k", f32, f32, 1000, 1000, notes="eager: torch._foreach_lerp_")
    yield line(
        "10 x 10M", f32, f32, 10, 10_000_000, quick=False, notes="eager: torch._foreach_lerp_"
    )
