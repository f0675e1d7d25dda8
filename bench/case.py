"""What a benchmark line is. `bench/<family>/<core>.py` has one function `specs(device)` that yields Specs.

`device` is a string, "cpu" or "cuda".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

Step = Callable[[], Sequence[Tensor]]


@dataclass
class Case:
    """One workload, ready to run. A step runs it once and returns the tensors to be checked."""

    ours: Step
    exact: Step  # the same tensors in float64, by the reference; run once
    eager: Step | None = None  # what a user writes today, in plain torch
    compiled: Step | None = None  # torch.compile of the reference, not run yet
    peers: dict[str, Step] = field(default_factory=dict)  # the best packages installed, by name
    bytes: int = 0  # least traffic: each input read once, each output written once
    written: int | None = None  # of `bytes`; if given, what is only read counts at the read rate
    flops: int = 0  # operations of the matrix products, 0 where there is none
    tolerance: float | None = None  # relative L2; default: twice eager's own error, or one ulp
    saved_bytes: int | None = None  # kept between forward and backward, measured by the case
    floor_note: str = ""


@dataclass
class Spec:
    """A line of the table before its data exists: `make()` builds the tensors."""

    op: str  # "norm.rms_norm"
    label: str  # "fwd+bwd 4096x4096"
    dtype: torch.dtype
    make: Callable[[], Case]
    quick: bool = True  # part of --quick
    # {"eager": 5, "compile": 2, "tabm": 1.7}: at least so many times as fast. "floor": 0.8 is a share of
    # the floor, "copy": 1.0 of the measured copy bandwidth.
    targets: dict[str, float] = field(default_factory=dict)
    notes: str = ""
    compile_in_quick: bool = False  # --quick compiles these, and lines with a "compile" target
    compiled_model: bool = False  # `ours` is itself a compiled model that holds the op


def step(
    function: Callable[..., Tensor | Sequence[Tensor]],
    inputs: Sequence[Tensor | None],
    grad_outputs: Sequence[Tensor] | None = None,
) -> Step:
    """Forward of `function(*inputs)`, and backward to every input that requires grad if grads are given.

    Returns the outputs followed by the gradients.
    """
    wanted = [t for t in inputs if t is not None and t.requires_grad]

    def forward() -> Sequence[Tensor]:
        with torch.no_grad():
            out = function(*inputs)
        return (out,) if isinstance(out, Tensor) else tuple(out)

    def both() -> Sequence[Tensor]:
        out = function(*inputs)
        out = (out,) if isinstance(out, Tensor) else tuple(out)
        return (*out, *torch.autograd.grad(out, wanted, grad_outputs))

    return forward if grad_outputs is None else both


def in_double(step_of: Callable[..., Step], tensors: Sequence[Tensor | None]) -> Step:
    """`step_of(*tensors in float64)`: the exact form of a step built by the same function."""
    copies = [
        None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in tensors
    ]
    return step_of(*copies)


def model_case(
    model: Callable[..., Callable[..., Tensor]],
    ours: Callable[..., object],
    theirs: Callable[..., object],
    inputs: Sequence[Tensor],
) -> Case:
    """The op inside a compiled model: `model(op)` is a function of the inputs, forward and backward.

    An opaque op can cost the compiler more in lost fusion than it gains, so both sides are compiled:
    `model(ours)` beside `model(theirs)`, where `theirs` is the op in plain torch.
    """
    with torch.no_grad():
        grad = torch.randn_like(model(theirs)(*inputs))

    def exact(*tensors: Tensor) -> Step:
        return step(model(theirs), tensors, [grad.double()])

    return Case(
        ours=step(torch.compile(model(ours), fullgraph=True), inputs, [grad]),
        exact=in_double(exact, inputs),
        eager=step(model(theirs), inputs, [grad]),
        compiled=step(torch.compile(model(theirs), fullgraph=True), inputs, [grad]),
    )


def compiled_model_spec(op: str, label: str, make: Callable[[], Case]) -> Spec:
    """Left out of --quick: such a line compiles two models."""
    label = f"in a compiled model: {label}"
    return Spec(op, label, torch.float32, make, quick=False, compiled_model=True)
