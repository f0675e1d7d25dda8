"""Runs every op once, forward and backward, on small awkward shapes: what compute-sanitizer looks at.

`python -m bench.every_op cuda` prints the ops of the library that no call here reached, and exits 1 if
there are any, or if a call fails. A core may bring its own calls: a function `small_calls(device)` in
bench/<family>/<core>.py that yields (name, call) pairs.
"""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .collect import modules

Call = Callable[[], object]


class Seen(TorchDispatchMode):
    """Collects the names of Solera's ops as they pass the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "solera":
            self.names.add(function._schema.name.split("::")[1])
        return function(*args, **(kwargs or {}))


def backward(*outputs: torch.Tensor) -> None:
    torch.autograd.backward(outputs, [torch.randn_like(o) for o in outputs])


def calls(device: torch.device) -> Iterator[tuple[str, Call]]:
    """(name, call) pairs; a family that cannot be imported fails in its own calls only."""

    def randn(*shape: int, dtype=torch.float32, grad: bool = True) -> torch.Tensor:
        return torch.randn(*shape, device=device).to(dtype).requires_grad_(grad)

    def norms(dtype: torch.dtype, rows: int, width: int) -> None:
        from solera.norm import layer_norm, rms_norm

        for residual in (False, True):
            for norm in (layer_norm, rms_norm):
                x, w, b = (randn(*s, dtype=dtype) for s in ((rows, width), (width,), (width,)))
                y = norm(
                    x, w, bias=b, residual=randn(rows, width, dtype=dtype) if residual else None
                )
                backward(*((y,) if isinstance(y, torch.Tensor) else y))
        with torch.no_grad():
            rms_norm(randn(rows, width, dtype=dtype))
            rms_norm(randn(rows, 2 * width, dtype=dtype)[:, ::2])

    def ensembles(dtype: torch.dtype, k: int, batch: int, width: int) -> None:
        from solera.ensemble import batch_ensemble_linear, ensemble_linear

        for shape in ((batch, width), (batch, k, width)):
            for activation in (None, "relu", "gelu", "silu"):
                x, w, r, s, b = (
                    randn(*n, dtype=dtype)
                    for n in (shape, (width + 3, width), (k, width), (k, width + 3), (k, width + 3))
                )
                backward(batch_ensemble_linear(x, w, r, s, b, activation=activation))
                with torch.no_grad():
                    batch_ensemble_linear(x, w, r, s, b, activation=activation)
                w = randn(k, width, width + 3, dtype=dtype)
                backward(ensemble_linear(x, w, b, activation=activation))
                with torch.no_grad():
                    ensemble_linear(x, w, b, activation=activation)

    def transport(dtype: torch.dtype, *shape: int) -> None:
        from solera.sinkhorn import sinkhorn

        cost = torch.rand(*shape, device=device, dtype=dtype).requires_grad_()
        result = sinkhorn(cost, epsilon=0.1, max_iterations=20, tolerance=1e-4)
        backward(result.cost)
        cost.grad = None
        result = sinkhorn(cost, epsilon=0.1, max_iterations=20)
        backward(result.plan())

    def weights(dtype: torch.dtype, *sizes: int) -> None:
        from solera.weights import ema_, lincomb

        lists = [[randn(n, dtype=dtype) for n in sizes] for _ in range(3)]
        coefficients = torch.tensor([0.2, 0.3, 0.5], device=device, requires_grad=True)
        backward(*lincomb(lists, coefficients, base=[randn(n, dtype=dtype) for n in sizes]))
        backward(lincomb([t[-1] for t in lists], coefficients))
        with torch.no_grad():
            out = [torch.empty_like(t) for t in lists[0]]
            lincomb(lists, coefficients.detach(), out=out)
        averages = [randn(n, dtype=dtype, grad=False) for n in sizes]
        ema_(averages, [t.detach() for t in lists[0]], 0.9)
        if dtype in (torch.bfloat16, torch.float16):
            ema_(
                averages, [t.detach() for t in lists[0]], 0.9, rounding="stochastic", seed=1, step=2
            )

    for dtype in (torch.float32, torch.bfloat16):
        for size in ((1, 1), (7, 33), (65, 1000), (5, 5120)):
            yield f"norm {dtype} {size}", lambda d=dtype, s=size: norms(d, *s)
        for size in ((2, 3, 17), (5, 70, 64)):
            yield f"ensemble {dtype} {size}", lambda d=dtype, s=size: ensembles(d, *s)
        yield f"weights {dtype}", lambda d=dtype: weights(d, 1, 13, 1000, 70_001)
    for size in ((1, 1), (37, 53), (3, 64, 64), (4, 5, 7), (300, 1030)):
        yield f"sinkhorn {size}", lambda s=size: transport(torch.float32, *s)
    for name in modules(Path(__file__).parent, "bench"):
        module = importlib.import_module(name)
        if hasattr(module, "small_calls"):
            yield from module.small_calls(device.type)


def main(name: str) -> int:
    from solera._registry import CORES

    device = torch.device(name)
    torch.manual_seed(0)
    failed = []
    # One thread for backward too, since the mode that collects the names belongs to a thread.
    with torch.autograd.set_multithreading_enabled(False), Seen() as seen:
        for what, call in calls(device):
            try:
                call()
                if device.type == "cuda":
                    torch.cuda.synchronize()
            except Exception:
                failed.append(what)
                print(f"FAILED {what}\n{traceback.format_exc()}", flush=True)
    missing = sorted(set(CORES) - seen.names)
    print(f"{len(seen.names)} of {len(CORES)} ops ran; not reached: {', '.join(missing) or 'none'}")
    print(f"{len(failed)} calls failed" + (f": {', '.join(failed)}" if failed else ""))
    return int(bool(failed or missing))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else "cpu"))
