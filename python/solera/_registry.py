"""How an op comes into being: schema, fake, reference, kernels.

The dispatcher picks: CPU -> C++, CUDA and XPU -> Triton, anything else (and everything that has no kernel
here) -> the reference. None of these ops has autograd of its own; the public functions wrap them.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ._route import AT_IMPORT

LIBRARY = torch.library.Library("solera", "DEF")
CORES: dict[str, str] = {}  # op name -> "family.core"
COMPOSED: dict[str, str] = {}  # the same of ops without kernels of their own
SCHEMAS: dict[str, str] = {}
_with_fake: set[str] = set()


def op(core: str, schema: str, *, composed: bool = False) -> Callable[[Callable], Callable]:
    """Define an op from its schema. The function this decorates, if any, is its fake.

    composed: its reference runs other ops of this package and is its kernel on every device; torch.compile then
    sees one call in place of the loops and buffers inside it, which it would unroll.
    """
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    (COMPOSED if composed else CORES)[name] = core
    SCHEMAS[name] = schema

    def fake(function: Callable) -> Callable:
        torch.library.register_fake(f"solera::{name}", function, lib=LIBRARY)
        _with_fake.add(name)
        return function

    return fake


def reference(name: str) -> Callable[[Callable], Callable]:
    """Register the decorated function as op `name` on every device that has no kernel for it.

    It also is the op's fake, if `_ops.py` gives none.
    """

    def attach(function: Callable) -> Callable:
        LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        if name not in _with_fake:
            torch.library.register_fake(f"solera::{name}", function, lib=LIBRARY)
        return function

    return attach


def accumulate_type(x: Tensor) -> torch.dtype:
    """The dtype sums over x are kept in: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


compiled_library: Path | None = None
load_error: str | None = None


def _launcher(name: str, core: str) -> Callable[..., Any]:
    """The Triton launcher of an op, imported at its first call (importing Triton takes a while)."""
    found: list[Callable[..., Any]] = []

    def call(*args: Any) -> Any:
        if not found:
            module = importlib.import_module(f"solera.triton_kernels.{core}")
            found.append(getattr(module, name))
        return found[0](*args)

    return call


def _attach_triton() -> None:
    if importlib.util.find_spec("triton") is None:
        return
    keys = ("CPU", "CUDA") if AT_IMPORT == "triton" else ("CUDA", "XPU")
    for name, core in CORES.items():
        for key in keys:
            LIBRARY.impl(name, _launcher(name, core), key)


def _attach_cpu() -> None:
    global compiled_library, load_error
    if AT_IMPORT != "auto":
        return
    found = sorted(Path(__file__).parent.glob("_C.*so"))
    if not found:
        load_error = "the compiled library is not there (installed without a C++ compiler?)"
    else:
        try:
            torch.ops.load_library(str(found[0]))
            compiled_library = found[0]
        except OSError as error:
            load_error = f"{found[0].name} does not load: {error}"
    if load_error:
        warnings.warn(
            f"solera: CPU kernels unavailable: {load_error}. CPU tensors use the Python reference, "
            "which is slower; `solera info` says more.",
            UserWarning,
            stacklevel=4,
        )


def attach_kernels() -> None:
    """Give every op defined so far its Triton launcher and its C++ kernel."""
    _attach_triton()
    _attach_cpu()
