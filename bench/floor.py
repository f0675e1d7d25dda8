"""What this machine can do, measured in the same run: the floor that a time is compared with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from .measure import Clock

GIB = 1 << 30


@dataclass
class Rates:
    """Bytes and operations a second; `end` is the copy rate measured again after the last line."""

    copy: float
    copy_by: str
    read: float
    matrix: dict[str, float]
    buffer_bytes: int
    candidates: dict[str, float] = field(default_factory=dict)
    end: float | None = None

    def as_dict(self) -> dict:
        return dict(vars(self))

    @property
    def best_copy(self) -> float:
        """The faster of the two measurements: a busy moment must not lower the floor."""
        return max(self.copy, self.end or 0.0)

    def floor(self, bytes: int, written: int | None, flops: int, dtype: str) -> float | None:
        """The least seconds for so many bytes and operations, or None where neither was counted."""
        moving = bytes / self.best_copy
        if written is not None:
            paired = min(bytes, 2 * written)
            read = max(self.read, self.best_copy)
            moving = paired / self.best_copy + (bytes - paired) / read
        # A half-precision product may also be done in float32, if the machine does that faster.
        rates = [self.matrix.get("float32", 0.0), self.matrix.get(dtype, 0.0)]
        rate = rates[0] / 2 if dtype == "float64" else max(rates)
        computing = flops / rate if rate else 0.0
        return max(moving, computing) or None


def _best(clock: Clock, call: Callable[[], object], repeats: int = 5) -> float:
    call()
    return min(clock(call, 1) for _ in range(repeats))  # type: ignore[arg-type]


def copies(device: torch.device, buffer_bytes: int) -> dict[str, float]:
    """Bytes read plus bytes written a second, by kind of copy."""
    clock = Clock(device)
    source = torch.ones(buffer_bytes // 4, device=device)
    target = torch.zeros_like(source)
    calls: dict[str, Callable[[], object]] = {"copy_": lambda: target.copy_(source)}
    try:
        from solera.weights import lincomb  # streams its stores where the output is large

        lincomb([source[:64]], [1.0], out=target[:64])
        calls["solera.weights.lincomb"] = lambda: lincomb([source], [1.0], out=target)
    except Exception:
        pass  # not there (yet): the ordinary copy is the rate
    return {name: 2 * buffer_bytes / _best(clock, call) for name, call in calls.items()}


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of torch.mm, at a size that takes about 0.1 s or 8192 square."""
    clock = Clock(device)
    n, rate = 512, 0.0
    while True:
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        seconds = _best(clock, lambda: a @ b, 3)
        rate = max(rate, 2 * n**3 / seconds)
        if n >= 8192 or 8 * seconds > 0.2:
            return rate
        n *= 2


def measure_rates(device: torch.device, quick: bool) -> Rates:
    buffer_bytes = GIB // 4 if quick else GIB
    found = copies(device, buffer_bytes)
    by = max(found, key=found.__getitem__)
    clock = Clock(device)
    source = torch.ones(buffer_bytes // 4, device=device)
    reads = {
        "sum": _best(clock, source.sum),
        "dot": _best(clock, lambda: torch.dot(source, source)),
    }
    matrix = {}
    for dtype in (torch.float32, torch.bfloat16):
        try:
            matrix[str(dtype)[6:]] = matrix_rate(device, dtype)
        except RuntimeError:
            continue  # a device without products in this dtype
    read = buffer_bytes / min(reads.values())
    return Rates(found[by], by, read, matrix, buffer_bytes, found)
