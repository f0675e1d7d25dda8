"""Cascades over core `routing`: later members run on the rows that need them, and the work saved is told."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from .. import _check
from .routing import KINDS, bound, cascade_merge_, uncertainty_scores, window_exit

COMBINE = ("logit", "probability")
# Scores that are high where a row is certain; the others are low there.
_CONFIDENCES = ("msp", "margin")


@dataclass(frozen=True)
class CascadeReport:
    """What one call of a `Cascade` ran. Shapes: one entry a member.

    `rows` is how many rows each member saw; `work` their cost over the cost of all members on all rows (0 for an
    empty batch), `saved` the rest.
    """

    rows: tuple[int, ...]
    work: float

    @property
    def saved(self) -> float:
        return 1.0 - self.work


def _members_logits(x: Tensor, combine: str) -> Tensor:
    return x if combine == "logit" else x.log_softmax(-1)


def _window(name: str, window: object) -> tuple[float, float]:
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise TypeError(f"{name}: expected a pair (low, high), got {window!r}")
    return bound(f"{name}, low", window[0]), bound(f"{name}, high", window[1])


class Cascade(nn.Module):
    r"""Members one after the other, each on the rows whose uncertainty so far lies in a window.

    Stage m holds the mean $o_m$ of members 1..m on the rows that reached it; a row exits where its score is outside the
    stage's window, the others are gathered and member m + 1 runs on them alone. With windows that let every row
    stay this is the whole ensemble.

    Args:
        models: K callables that turn a batch (B, ...) into logits (B, C), cheapest first. Modules among them are
            registered, under `models.<i>`.
        windows: K - 1 pairs (low, high) as `window_exit` takes them; `fit_windows` finds them.
        kind: the score, "msp", "entropy", "energy" or "margin".
        combine: "logit" averages logits; "probability" averages softmaxes and returns their logarithm (whose energy
            is always 0, so it wants another kind).
        how: "mean" runs the mean; "replace" takes the last member's output instead.
        costs: of one row of each member, for the report; equal unless given.

    Shapes: forward (B, ...) -> (B, C). `report` holds the last call's `CascadeReport`. Differentiable in what ran. The
    size of a stage's batch is needed on the host: one synchronisation a stage. Rows do not depend on their
    neighbours as far as the members' own rows do not.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Xia, Bouganis, "Window-Based Early-Exit Cascades for Uncertainty Estimation: When Deep Ensembles are More
    Efficient than Single Models", 2023. The merge selects rows, where the public code multiplies by masks.
    """

    def __init__(
        self,
        models: Sequence[Callable[[Tensor], Tensor]],
        windows: Sequence[tuple[float, float]],
        kind: str = "msp",
        *,
        combine: str = "logit",
        how: str = "mean",
        costs: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        members = list(models)
        if not members or not all(callable(m) for m in members):
            raise TypeError(f"models: expected at least one callable, got {models!r}")
        self.models = nn.ModuleList([m if isinstance(m, nn.Module) else _Call(m) for m in members])
        if len(windows) != len(members) - 1:
            raise ValueError(
                f"windows: expected {len(members) - 1} for {len(members)} models, got {len(windows)}"
            )
        _check.choice("kind", kind, KINDS)
        _check.choice("combine", combine, COMBINE)
        _check.choice("how", how, ("mean", "replace"))
        self.windows = [_window(f"windows[{i}]", w) for i, w in enumerate(windows)]
        self.kind, self.combine, self.how = kind, combine, how
        self.costs = [1.0] * len(members) if costs is None else list(costs)
        if len(self.costs) != len(members):
            raise ValueError(f"costs: expected {len(members)} numbers, got {len(self.costs)}")
        for i, cost in enumerate(self.costs):
            _check.number(f"costs[{i}]", cost, low=0.0)
        self.report: CascadeReport | None = None

    def _merge(self, held: Tensor, new: Tensor, stage: int, index: Tensor) -> Tensor:
        """The rows of `held` named by index, merged with a later member's; others stay as they are."""
        if self.how == "replace":
            return cascade_merge_(held, new, index, "replace")
        if self.combine == "logit":
            return cascade_merge_(held, new, index, "mean", weight=1 / (stage + 1))
        before = held[index] + math.log(stage / (stage + 1))
        mixed = torch.logaddexp(before, new - math.log(stage + 1))
        return cascade_merge_(held, mixed, index, "replace")

    def forward(self, x: Tensor) -> Tensor:
        batch = x.shape[0]
        first = self.models[0](x)
        held = _members_logits(_check.tensor("models[0]'s output", first, dim=2), self.combine)
        held = (
            held.clone()
        )  # written to below, where autograd may need the member's own, or log_softmax's
        rows = torch.arange(batch, device=held.device)
        seen = [batch] + [0] * (len(self.models) - 1)
        here = held
        for stage, window in enumerate(self.windows, 1):
            _, index, count = window_exit(here, *window, self.kind)
            rows = rows[index[: int(count)]]
            if rows.numel() == 0:
                break
            seen[stage] = rows.numel()
            new, name = self.models[stage](x[rows]), f"models[{stage}]'s output"
            expected = (rows.numel(), held.shape[1])
            _check.like(name, new, expected, held, "models[0]'s output")
            _check.same_dtype(name, new, held, "models[0]'s output")
            new = _members_logits(new, self.combine)
            held = self._merge(held, new, stage, rows)
            here = held[rows]
        spent = sum(n * c for n, c in zip(seen, self.costs))
        everything = batch * sum(self.costs)
        self.report = CascadeReport(tuple(seen), spent / everything if everything else 0.0)
        return held


class _Call(nn.Module):
    """A plain callable among the modules."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def _stages(logits: Sequence[Tensor] | Tensor, combine: str) -> list[Tensor]:
    """The running ensemble's logits after each member but the last."""
    if not isinstance(logits, (Tensor, list, tuple)):
        raise TypeError(f"logits: expected (K, N, C) or K tensors, got {type(logits).__name__}")
    members = list(logits.unbind(0)) if isinstance(logits, Tensor) else list(logits)
    if len(members) < 2:
        raise ValueError(f"logits: expected at least 2 members, got {len(members)}")
    for i, member in enumerate(members):
        _check.tensor(f"logits[{i}]", member, dim=2)
        if member.shape != members[0].shape:
            raise ValueError(
                f"logits[{i}]: expected shape {tuple(members[0].shape)}, got {tuple(member.shape)}"
            )
    if members[0].is_meta:
        raise ValueError("logits: expected values to fit the windows to, got tensors without data")
    stacked = torch.stack(members[:-1]).double()
    count = torch.arange(1, len(members), device=stacked.device, dtype=torch.float64)
    if combine == "logit":
        return list((stacked.cumsum(0) / count[:, None, None]).to(members[0].dtype).unbind(0))
    mixed = torch.logcumsumexp(stacked.log_softmax(-1), 0) - count.log()[:, None, None]
    return list(mixed.to(members[0].dtype).unbind(0))


def fit_windows(
    logits: Sequence[Tensor] | Tensor,
    fractions: Sequence[float],
    kind: str = "msp",
    *,
    combine: str = "logit",
    coverage: float | None = None,
) -> list[tuple[float, float]]:
    r"""Windows of a `Cascade` from validation scores: a stated share of the rows goes on at each stage.

    Without `coverage` the most uncertain rows go on (the window is open towards uncertainty). With it the decision
    that counts is whether a row is among the `coverage` most certain ones, as in selective classification or
    detection, and the window lies around that boundary: half of its rows on either side, as far as there are such.
    Thresholds lie halfway between the outermost rows inside and their neighbours outside; where no row is outside the
    window is open.

    Args:
        logits: (K, N, C) or K tensors (N, C), the members' on validation data, in the cascade's order.
        fractions: K - 1 shares of all N rows that reach members 2..K; not rising, in [0, 1].
        kind, combine: as the cascade's.
        coverage: in [0, 1], or None.

    Shapes: (K, N, C) -> K - 1 pairs (low, high) of Python floats.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Xia, Bouganis, "Window-Based Early-Exit Cascades for Uncertainty Estimation", 2023: percentiles of held-out
    scores around the decision's threshold. The paper's code takes one window; the stages here are fitted in turn, on
    the rows that reach each.
    """
    _check.choice("kind", kind, KINDS)
    _check.choice("combine", combine, COMBINE)
    stages = _stages(logits, combine)
    if not isinstance(fractions, (list, tuple)):
        raise TypeError(f"fractions: expected a list of shares, got {type(fractions).__name__}")
    if len(fractions) != len(stages):
        raise ValueError(f"fractions: expected {len(stages)} shares, got {len(fractions)}")
    shares = [_check.number("fractions", f, low=0.0, high=1.0) for f in fractions]
    if any(b > a for a, b in pairwise(shares)):
        raise ValueError(f"fractions: expected shares that do not rise, got {shares}")
    total = stages[0].shape[0]
    if total == 0:
        raise ValueError("logits: expected at least one row")
    boundary = total
    if coverage is not None:
        boundary = round(_check.number("coverage", coverage, low=0.0, high=1.0) * total)
    confident = kind in _CONFIDENCES
    rows = torch.arange(total, device=stages[0].device)
    windows: list[tuple[float, float]] = []
    for stage, share in zip(stages, shares):
        with torch.no_grad():
            score = getattr(uncertainty_scores(stage[rows]), kind)
        order = torch.sort(score, stable=True, descending=confident).indices  # most certain first
        wanted = min(round(share * total), len(rows))
        if coverage is None:
            start = len(rows) - wanted
        else:
            start = min(max(boundary - wanted // 2, 0), len(rows) - wanted)
        chosen = order[start : start + wanted]
        boundary -= start
        rows = rows[chosen.sort().values]
        if wanted == 0:
            windows.append((float("inf"), float("-inf")))
            continue
        ranked = score[order].tolist()
        last = start + wanted - 1
        # Halfway to the neighbours outside, so that rounding moves no row across; open where there are none.
        surest = float("inf") if confident else float("-inf")
        sure = 0.5 * (ranked[start - 1] + ranked[start]) if start else surest
        ends_here = coverage is None or last + 1 == len(ranked)
        unsure = -surest if ends_here else 0.5 * (ranked[last] + ranked[last + 1])
        windows.append((unsure, sure) if confident else (sure, unsure))
    return windows
