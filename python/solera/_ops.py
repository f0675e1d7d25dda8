"""The table of contents: every op's schema and fake in one block, then the kernels are attached.

An op `name` of the core `family.core` has four rooms, all by the same name:

    python/solera/<family>/<core>.py    its reference (`@reference("name")`), autograd, public function
    csrc/cpu/<family>/<core>.cpp        its CPU kernel
    triton_kernels/<family>/<core>.py   its GPU launcher, a function called `name`
    tests/ and bench/ <family>/<core>.py

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
SCHEMAS: dict[str, str] = {}


def op(core: str, schema: str) -> Callable[[Callable], Callable]:
    """Define an op from its schema; the decorated function is its fake (shapes, dtypes, strides)."""

    def define(fake: Callable) -> Callable:
        name = schema.split("(", 1)[0]
        LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"solera::{name}", fake, lib=LIBRARY)
        CORES[name] = core
        SCHEMAS[name] = schema
        return fake

    return define


def reference(name: str) -> Callable[[Callable], Callable]:
    """Register the decorated function as op `name` on every device that has no kernel for it."""

    def attach(function: Callable) -> Callable:
        LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        return function

    return attach


def accumulate_type(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# ---- norm.row_norm -----------------------------------------------------------------------------------


@op(
    "norm.row_norm",
    "row_norm(Tensor x, Tensor? weight, Tensor? bias, float eps, float weight_offset, bool centred)"
    " -> Tensor",
)
def _(x, weight, bias, eps, weight_offset, centred):
    return x.new_empty(x.shape)


@op(
    "norm.row_norm",
    "row_norm_stats(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps,"
    " float residual_scale, float weight_offset, bool centred)"
    " -> (Tensor y, Tensor u, Tensor mean, Tensor rstd)",
)
def _(x, residual, weight, bias, eps, residual_scale, weight_offset, centred):
    stats = accumulate_type(x)
    return (
        x.new_empty(x.shape),
        x.new_empty(x.shape if residual is not None else (0,)),
        x.new_empty(x.shape[:-1] if centred else (0,), dtype=stats),
        x.new_empty(x.shape[:-1], dtype=stats),
    )


@op(
    "norm.row_norm",
    "row_norm_backward(Tensor dy, Tensor? du, Tensor u, Tensor? weight, Tensor mean, Tensor rstd,"
    " float weight_offset, bool centred, bool need_x, bool need_weight, bool need_bias)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias)",
)
def _(
    dy, du, u, weight, mean, rstd, weight_offset, centred, need_x, need_weight, need_bias
):  # fmt: skip
    stats = accumulate_type(u)
    return (
        u.new_empty(u.shape if need_x else (0,)),
        u.new_empty((u.shape[-1],) if need_weight else (0,), dtype=stats),
        u.new_empty((u.shape[-1],) if need_bias else (0,), dtype=stats),
    )


# ---- ensemble.batch_ensemble -------------------------------------------------------------------------


# ---- sinkhorn.dense ----------------------------------------------------------------------------------


# ---- weights.lincomb ---------------------------------------------------------------------------------


# ---- attaching the kernels ---------------------------------------------------------------------------

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
            stacklevel=3,
        )


_attach_triton()
_attach_cpu()
