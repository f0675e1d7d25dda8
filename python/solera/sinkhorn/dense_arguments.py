"""The arguments of `sinkhorn`, checked once and brought to the form that its ops take."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _check
from .._registry import accumulate_type
from .plan import within
from .result import SinkhornResult

# How far the totals of a and b may differ, relatively, by the dtype they came in.
TOTALS = {
    torch.float64: 1e-8,
    torch.float32: 1e-4,
    torch.bfloat16: 3e-2,
    torch.float16: 4e-3,
}


def weights(
    name: str, value: Tensor | None, count: int, cost: Tensor, valid: Tensor | None = None
) -> Tensor:
    """A marginal as (batch..., count) in the dtype that is computed in; uniform for None, 0 in the padding."""
    batch = cost.shape[:-2]
    acc = accumulate_type(cost)
    if value is None:
        if valid is None:
            return cost.new_full((1,), 1.0 / count, dtype=acc).expand(*batch, count)
        return valid.to(acc) / valid.sum(-1, keepdim=True).clamp(min=1)
    if isinstance(value, Tensor) and value.dim() == 1 and len(batch) > 0:
        _check.like(name, value, (count,), cost, "cost")
    else:
        _check.like(name, value, (*batch, count), cost, "cost")
    value = value.to(acc).expand(*batch, count)
    return value if valid is None else torch.where(valid, value, 0.0)


def initial(init: Any, cost: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The potentials to start from, detached and in the dtype that is computed in; (None, None) for none."""
    if init is None:
        return None, None
    if isinstance(init, SinkhornResult):
        init = (init.f, init.g)
    if not isinstance(init, tuple | list) or len(init) != 2:
        raise TypeError(
            f"init: expected None, a pair (f, g) or a SinkhornResult, got {type(init).__name__}"
        )
    *batch, n, m = cost.shape
    _check.like("init[0]", init[0], (*batch, n), cost, "cost")
    _check.like("init[1]", init[1], (*batch, m), cost, "cost")
    acc = accumulate_type(cost)
    return init[0].detach().to(acc), init[1].detach().to(acc)


def count(name: str, value: object) -> None:
    """value is an int of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__} {value!r}")
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")


def penalties(rho: Any) -> tuple[float | None, float | None]:
    """`rho` as a pair; None (or inf) for a hard marginal."""
    pair = rho if isinstance(rho, tuple | list) else (rho, rho)
    if len(pair) != 2:
        raise ValueError(f"rho: expected None, a number or a pair of them, got {rho!r}")

    def one(value: Any) -> float | None:
        if value is None or (isinstance(value, float) and value == float("inf")):
            return None
        value = _check.number("rho", value)
        if not value > 0:
            raise ValueError(f"rho: expected None or a number > 0, got {value!r}")
        return value

    return one(pair[0]), one(pair[1])


def relaxation(momentum: Any) -> float:
    """`momentum` in [1, 2)."""
    momentum = _check.number("momentum", momentum)
    if not 1 <= momentum < 2:
        raise ValueError(f"momentum: expected a number in [1, 2), got {momentum!r}")
    return momentum


def schedule(scaling: Any, epsilon: float, max_iterations: int) -> list[float]:
    """The epsilons, larger than the target, of the iterations before it is reached."""
    if scaling is None:
        return []
    if isinstance(scaling, list):
        given = [_check.number("epsilon_scaling", value) for value in scaling]
        if not all(value > 0 for value in given):
            raise ValueError(f"epsilon_scaling: expected epsilons > 0, got {scaling!r}")
        if len(given) >= max_iterations:
            raise ValueError(
                f"epsilon_scaling: expected fewer epsilons than max_iterations={max_iterations}, "
                f"got {len(given)}"
            )
        return given
    start, factor = scaling if isinstance(scaling, tuple) and len(scaling) == 2 else (scaling, 0.5)
    if isinstance(start, tuple):
        raise ValueError(f"epsilon_scaling: expected a number or (start, factor), got {scaling!r}")
    start, factor = (
        _check.number("epsilon_scaling", start),
        _check.number("epsilon_scaling", factor),
    )
    if not start > 0:
        raise ValueError(f"epsilon_scaling: expected a start > 0, got {start!r}")
    if not 0 < factor < 1:
        raise ValueError(f"epsilon_scaling: expected a factor between 0 and 1, got {factor!r}")
    steps: list[float] = []
    while start > epsilon:
        steps.append(start)
        start *= factor
        if len(steps) >= max_iterations:
            raise ValueError(
                f"epsilon_scaling: reaches epsilon={epsilon:g} in more than max_iterations="
                f"{max_iterations} iterations; raise max_iterations or lower the factor"
            )
    return steps


def bounds(lengths: Any, like: Tensor, shape: tuple[int, ...], goes_with: str) -> Tensor | None:
    """`lengths` as (batch..., 2), int64: the rows and columns of every problem; None if there is no padding.

    shape: (batch..., n, m); goes_with: what the user gave of that shape, whose device `like` has.
    """
    if lengths is None:
        return None
    if not isinstance(lengths, tuple | list) or len(lengths) != 2:
        raise TypeError(
            f"lengths: expected None or a pair (rows, columns), got {type(lengths).__name__}"
        )
    *batch, n, m = shape
    parts = []
    for k, (value, most) in enumerate(zip(lengths, (n, m))):
        name = f"lengths[{k}]"
        if value is None:
            value = most
        if isinstance(value, int) and not isinstance(value, bool):
            if not 0 <= value <= most:
                raise ValueError(f"{name}: expected a length in [0, {most}], got {value}")
            value = torch.full(batch, value, dtype=torch.int64, device=like.device)
        if not isinstance(value, Tensor):
            raise TypeError(
                f"{name}: expected None, an int or a tensor, got {type(value).__name__}"
            )
        if value.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8):
            raise TypeError(f"{name}: expected integers, got {value.dtype}")
        if value.shape != torch.Size(batch):
            raise ValueError(
                f"{name}: expected shape {tuple(batch)} to go with {goes_with}, "
                f"got {tuple(value.shape)}"
            )
        if value.device != like.device:
            raise ValueError(f"{name}: expected device {like.device}, got {value.device}")
        parts.append(value.to(torch.int64))
    return torch.stack(parts, -1)


def check_bounds(lengths: Tensor, n: int, m: int) -> None:
    """Every length within its side."""
    for k, most in enumerate((n, m)):
        if not bool(((lengths[..., k] >= 0) & (lengths[..., k] <= most)).all()):
            raise ValueError(
                f"lengths[{k}]: expected lengths in [0, {most}], got {int(lengths[..., k].min())} to "
                f"{int(lengths[..., k].max())}"
            )


def check_weights(a: Tensor, b: Tensor, tolerance_totals: float) -> None:
    """Weights >= 0 of equal, positive totals; those of one problem or of a batch."""
    for name, weight in (("a", a), ("b", b)):
        if not bool((torch.isfinite(weight) & (weight >= 0)).all()):
            raise ValueError(
                f"{name}: expected finite weights >= 0, got a negative, NaN or infinite one"
            )
        if not bool((weight.sum(-1) > 0).all()):
            raise ValueError(f"{name}: expected a positive total, got a marginal of zeros")
    total_a, total_b = a.double().sum(-1), b.double().sum(-1)
    apart = (total_a - total_b).abs() / total_a.maximum(total_b)
    if apart.numel() and float(apart.max()) > tolerance_totals:
        k = int(apart.argmax())
        raise ValueError(
            f"a, b: expected equal totals, got {float(total_a.flatten()[k]):.6g} and "
            f"{float(total_b.flatten()[k]):.6g}"
        )


def check_values(
    cost: Tensor,
    a: Tensor,
    b: Tensor,
    lengths: Tensor | None,
    balanced: bool,
    tolerance_totals: float,
) -> None:
    """The checks that read the data (see `validate`)."""
    some = None
    if lengths is not None:
        n, m = cost.shape[-2:]
        check_bounds(lengths, n, m)
        rows, columns = within(lengths, n, m)
        cost = torch.where(rows.unsqueeze(-1) & columns.unsqueeze(-2), cost, torch.inf)
        some = (lengths > 0).all(-1)
    for name, weight in (("a", a), ("b", b)):
        if not bool((torch.isfinite(weight) & (weight >= 0)).all()):
            raise ValueError(
                f"{name}: expected finite weights >= 0, got a negative, NaN or infinite one"
            )
        positive = weight.sum(-1) > 0
        if not bool((positive if some is None else positive | ~some).all()):
            raise ValueError(f"{name}: expected a positive total, got a marginal of zeros")
    if balanced:
        total_a, total_b = a.double().sum(-1), b.double().sum(-1)
        apart = (total_a - total_b).abs() / total_a.maximum(total_b)
        if some is not None:
            apart = torch.where(some, apart, 0.0)
        if float(apart.max()) > tolerance_totals:
            k = int(apart.argmax())
            digits = 12 if float(apart.max()) < 1e-5 else 6
            raise ValueError(
                f"a, b: expected equal totals, got {float(total_a.flatten()[k]):.{digits}g} and "
                f"{float(total_b.flatten()[k]):.{digits}g} (rho= allows totals that differ)"
            )
    for dim, name, weight in ((-1, "row", a), (-2, "column", b)):
        least = cost.amin(dim)  # NaN where there is one
        if not bool((least > -torch.inf).all()):
            what = "NaN" if bool(least.isnan().any()) else "-inf"
            raise ValueError(f"cost: expected numbers or +inf (a forbidden pair), got {what}")
        lonely = (least == torch.inf) & (weight > 0)
        if bool((lonely if some is None else lonely & some.unsqueeze(-1)).any()):
            raise ValueError(
                f"cost: a {name} with positive weight has only forbidden pairs (inf), so no plan exists"
            )
