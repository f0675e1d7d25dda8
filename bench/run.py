"""One line of the table: data, values, times."""

from __future__ import annotations

import gc
import math
import sys
import time
from dataclasses import dataclass, field

import torch

from .case import Case, Spec, Step
from .check import check, worst_error
from .collect import Failure, failure, last_line
from .floor import Rates
from .measure import Clock, ratio, summary, time_rounds

LEAST_FLOOR = 1e-7  # seconds: below, the time is that of a call and no share of anything
NO_TIMING = ("floor", "copy")  # targets that are shares of a rate, not a contender


@dataclass
class Options:
    quick: bool = False
    check_only: bool = False
    min_time: float = 1.0  # seconds of timing a line and contender, about
    rounds: int | None = None


@dataclass
class Budget:
    """What --quick may spend. Past it, lines without a target are left out."""

    compiling: float = math.inf
    total: float = math.inf
    started: float = field(default_factory=time.monotonic)

    def spent(self) -> bool:
        return time.monotonic() - self.started > self.total


def new_line(spec: Spec) -> dict:
    return {
        "family": spec.op.split(".")[0],
        "op": spec.op,
        "label": spec.label,
        "dtype": str(spec.dtype)[6:],
        "notes": spec.notes,
        "compiled_model": spec.compiled_model,
        "ok": False,
        "checks": [],
        "times": {},
        "ratios": {},
        "other_errors": {},
        "skipped": {},
        "targets": {n: {"want": w, "got": None, "met": None} for n, w in spec.targets.items()},
        "failure": None,
    }


def may_compile(spec: Spec, options: Options, budget: Budget) -> str:
    """Empty if the line's compiled contenders may run, else the reason why not."""
    if not options.quick:
        return ""
    wanted = "compile" in spec.targets or spec.compile_in_quick or spec.compiled_model
    if not wanted:
        return "not compiled in --quick"
    return "" if budget.compiling > 0 else "the compile time of --quick is used up"


def warm(step: Step, budget: Budget | None = None):
    """Run a step until it is warm (compiled, cached); its values."""
    start = time.monotonic()
    values = step()
    if budget is not None:
        step()
        budget.compiling -= time.monotonic() - start
    return values


def contenders(
    spec: Spec, case: Case, exact, eager_values, line: dict, budget: Budget, no_compile: str
) -> dict[str, Step]:
    """Ours, eager, compile and the peers, each warm; what does not run is named in line["skipped"]."""
    steps: dict[str, Step] = {"ours": case.ours}
    if case.eager is not None:
        steps["eager"] = case.eager
        error = worst_error(eager_values, exact)
        line["other_errors"]["eager"] = error if error is None or math.isfinite(error) else "inf"
    others: dict[str, Step] = dict(case.peers)
    if case.compiled is not None:
        if no_compile:
            line["skipped"]["compile"] = no_compile
        else:
            others = {"compile": case.compiled, **others}
    for name, step in others.items():
        try:
            values = warm(step, budget if name == "compile" else None)
            error = worst_error(values, exact)
            line["other_errors"][name] = error if error is None or math.isfinite(error) else "inf"
            steps[name] = step
        except Exception as problem:
            line["skipped"][name] = last_line(problem)
    return steps


def judge(line: dict, rates: Rates | None) -> None:
    """Floor and targets, from the line's times; done again once the rates are final."""
    if not line["times"]:
        return
    ours = line["times"]["ours"]["median"]
    if rates is not None:
        floor = rates.floor(line["bytes"], line["written"], line["flops"], line["dtype"])
        floor = None if floor is None or floor < LEAST_FLOOR else floor
        line["floor_s"] = floor
        line["floor_fraction"] = None if floor is None else floor / ours
        copied = line["bytes"] / ours / rates.best_copy
        line["copy_fraction"] = copied if line["bytes"] else None
    shares = {"floor": line.get("floor_fraction"), "copy": line.get("copy_fraction")}
    for name, target in line["targets"].items():
        got = shares[name] if name in NO_TIMING else line["ratios"].get(name, {}).get("median")
        met = None if got is None else got >= target["want"]
        target.update(got=got, met=met)


def run_line(
    spec: Spec, options: Options, clock: Clock, rates: Rates | None, budget: Budget
) -> tuple[dict, list[Failure]]:
    line, failures = new_line(spec), []
    where = f"{spec.op} {spec.label} {line['dtype']}"
    no_compile = may_compile(spec, options, budget)
    left_out = no_compile if spec.compiled_model else ""
    if budget.spent() and not spec.targets:
        left_out = "the time of --quick is used up"
    if left_out:
        line["skipped"]["ours"] = left_out
        line["ok"] = None
        return line, failures
    begun = time.monotonic()
    try:
        if "torch._dynamo" in sys.modules:
            torch._dynamo.reset()  # else lines share one compile cache and later ones turn dynamic
        case = spec.make()
        ours = warm(case.ours, budget if spec.compiled_model else None)
        exact = case.exact()
        eager = None if case.eager is None else case.eager()
        checks = check(case, ours, exact, eager)
        line["checks"] = [c.as_dict() for c in checks]
        line["ok"] = all(c.ok for c in checks)
        failures += [Failure(where, f"WRONG VALUE: {c.problem}") for c in checks if not c.ok]
        line.update(
            bytes=case.bytes, written=case.written, flops=case.flops,
            saved_bytes=case.saved_bytes, floor_note=case.floor_note,
        )  # fmt: skip
        if options.check_only:
            line["skipped"]["ours"] = "only checked"
            return line, failures
        steps = contenders(spec, case, exact, eager, line, budget, no_compile)
        case.exact = case.ours  # frees the float64 data that the exact step holds
        del ours, exact, eager
        gc.collect()
        samples, inner = time_rounds(steps, clock, options.min_time, options.rounds)
        for name, seconds in samples.items():
            line["times"][name] = summary(seconds, inner[name]).as_dict()
            if name != "ours":
                line["ratios"][name] = ratio(seconds, samples["ours"]).as_dict()
        judge(line, rates)
    except Exception as error:
        failures.append(failure(where, error))
        line["failure"] = failures[-1].what
        line["ok"] = False
    finally:
        line["seconds"] = time.monotonic() - begun
    return line, failures
