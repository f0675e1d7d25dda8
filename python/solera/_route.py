"""Which implementation serves a call: the one place that decides.

`solera.backend("reference")` or SOLERA_BACKEND=reference sends every op to its plain-torch reference, so
that one line settles whether a kernel is at fault. SOLERA_BACKEND=triton (read at import) serves CPU
tensors by the Triton launchers, for running them under TRITON_INTERPRET=1. Otherwise the dispatcher
picks by device.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

BACKENDS = ("auto", "reference")
AT_IMPORT = os.environ.get("SOLERA_BACKEND", "auto") or "auto"
if AT_IMPORT not in (*BACKENDS, "triton"):
    raise ImportError(f"SOLERA_BACKEND must be auto, reference or triton, got {AT_IMPORT!r}")

_forced_reference = AT_IMPORT == "reference"


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run every Solera op inside the block on one backend: "reference" (plain torch) or "auto".

    >>> with solera.backend("reference"):
    ...     y = solera.norm.rms_norm(x, weight)

    The switch is global to the process, not to the thread.
    """
    global _forced_reference
    if name not in BACKENDS:
        raise ValueError(f"backend: expected one of {BACKENDS}, got {name!r}")
    before = _forced_reference
    _forced_reference = name == "reference"
    try:
        yield
    finally:
        _forced_reference = before


def use_reference() -> bool:
    """True where a call must be composed of plain torch ops.

    Either the user asked for it, or a `torch.func` transform (grad, vmap, jvp) or forward-mode AD is
    active: those differentiate or batch the reference itself, which they can do for every torch op,
    instead of a kernel, which they would treat as a constant.
    """
    return (
        _forced_reference
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def needs_graph(*tensors: torch.Tensor | None) -> bool:
    """True if the call has to record itself for backward."""
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


def readable(t: torch.Tensor) -> bool:
    """Whether checks may look at the values of t: an eager CPU tensor that holds any, outside torch.func."""
    return (
        t.is_cpu
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and not isinstance(t, FakeTensor)
    )


def autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """The dtype autocast would give a matrix product on x's device, or None outside autocast."""
    return torch.get_autocast_dtype(x.device.type) if autocast_enabled(x) else None


def autocast_enabled(x: torch.Tensor) -> bool:
    """Whether autocast is on for x's device; never for meta tensors, whose device torch does not know here."""
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def without_autocast(x: torch.Tensor) -> torch.autocast:
    """A context in which products on x's device keep their operands' dtype."""
    return torch.autocast("cpu" if x.device.type == "meta" else x.device.type, enabled=False)


_Function = TypeVar("_Function", bound=Callable[..., Any])


def full_precision(function: _Function) -> _Function:
    """For a composition that is to be computed in its inputs' precision: autocast would round its products to half.

    The device is that of the first tensor among the arguments.
    """

    @wraps(function)
    def call(*args, **kwargs):
        x = _first_tensor((*args, *kwargs.values()))
        if x is None or autocast_dtype(x) is None:
            return function(*args, **kwargs)
        with without_autocast(x):
            return function(*args, **kwargs)

    return call  # type: ignore[return-value]


def _first_tensor(values: tuple[Any, ...]) -> torch.Tensor | None:
    for value in values:
        if isinstance(value, tuple | list):
            value = _first_tensor(tuple(value))
        if isinstance(value, torch.Tensor):
            return value
    return None
