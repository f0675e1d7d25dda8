"""Values before times: each tensor a case returns, against its float64 form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from .case import Case


@dataclass
class Check:
    """One returned tensor: relative L2 errors of ours and of eager against the exact one."""

    error: float
    eager: float | None
    allowed: float
    ok: bool
    problem: str = ""

    def as_dict(self) -> dict:
        return {k: v if v != math.inf else "inf" for k, v in asdict(self).items()}


def relative_error(value: Tensor, exact: Tensor) -> float:
    """||value - exact|| / ||exact|| in float64 (absolute where exact is 0); inf if shapes or NaNs differ."""
    if value.shape != exact.shape:
        return math.inf
    if value.numel() == 0:
        return 0.0
    value, exact = value.detach().double(), exact.detach().double()
    nan, inf = exact.isnan(), exact.isinf()
    if not torch.equal(value.isnan(), nan):
        return math.inf
    if inf.any() and not torch.equal(value[inf], exact[inf]):
        return math.inf
    if nan.any() or inf.any():
        zero = value.new_zeros(())
        value, exact = torch.where(nan | inf, zero, value), torch.where(nan | inf, zero, exact)
    difference = float((value - exact).norm())
    scale = float(exact.norm())
    error = difference / scale if scale > 0 else difference
    return error if math.isfinite(error) else math.inf


def worst_error(values: Sequence[Tensor], exact: Sequence[Tensor]) -> float | None:
    """The largest relative error, or None where the two do not return the same tensors."""
    if len(values) != len(exact) or any(v.shape != e.shape for v, e in zip(values, exact)):
        return None
    return max((relative_error(v, e) for v, e in zip(values, exact)), default=0.0)


def check(
    case: Case, ours: Sequence[Tensor], exact: Sequence[Tensor], eager: Sequence[Tensor] | None
) -> list[Check]:
    """`ours` may err twice as far as eager torch, or one ulp of its dtype; `case.tolerance` replaces both."""
    if len(ours) != len(exact):
        problem = f"{len(ours)} tensors returned, {len(exact)} expected"
        return [Check(math.inf, None, 0.0, False, problem)]
    if eager is not None and len(eager) != len(exact):
        eager = None
    results = []
    for i, (value, true) in enumerate(zip(ours, exact)):
        problem = ""
        if value.shape != true.shape:
            problem = f"tensor {i}: shape {tuple(value.shape)}, expected {tuple(true.shape)}"
        error = relative_error(value, true)
        theirs = None if eager is None else relative_error(eager[i], true)
        allowed = 0.0 if not value.is_floating_point() else torch.finfo(value.dtype).eps
        if case.tolerance is not None:
            allowed = case.tolerance
        elif theirs is not None and math.isfinite(theirs):
            allowed = max(allowed, 2 * theirs)
        ok = error <= allowed
        if not ok and not problem:
            beside = "" if theirs is None else f"; eager's own error is {theirs:.3g}"
            problem = f"tensor {i}: relative error {error:.3g}, allowed {allowed:.3g}{beside}"
        results.append(Check(error, theirs, allowed, ok, problem))
    return results
