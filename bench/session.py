"""A whole run: machine, rates, lines, showcase, then table, files and exit code."""

from __future__ import annotations

import argparse
import datetime
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from . import compare, report
from .case import Spec
from .collect import Failure, collect
from .floor import Rates, copies, measure_rates
from .machine import facts, slug
from .measure import Clock
from .run import Budget, Options, judge, run_line

RESULTS = Path(__file__).parent / "results"
QUICK_BUDGET = 60.0  # seconds, of which the showcase and the first import are no part


@contextmanager
def progress(printer: report.Printer, total: int) -> Iterator:
    """A function to call with the name of each line; draws a bar on a terminal."""
    if not printer.live:
        yield lambda name: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    name = TextColumn("{task.description}")
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), name)
    with Progress(*columns, console=printer.console, transient=True) as bar:
        task = bar.add_task("", total=total, completed=-1)
        yield lambda name: bar.update(task, advance=1, description=report.escape(name))


def brief(line: dict) -> str:
    """A finished line for a log, where there is no bar."""
    cells = [f"{c} {v}" for c, v in zip(report.COLUMNS[3:9], report.row(line)[3:9]) if v != "–"]
    spent = f" ({line['seconds']:.0f} s)" if "seconds" in line else ""
    return f"{line['op']} {line['label']} {line['dtype']}: " + ", ".join(cells) + spent


def run_lines(
    specs: list[Spec],
    options: Options,
    device: torch.device,
    rates: Rates | None,
    budget: Budget,
    printer: report.Printer,
    keep: Callable[[dict], None],
) -> list[Failure]:
    """Each line goes to `keep` as soon as it is done."""
    failures = []
    clock = Clock(device)
    with progress(printer, len(specs)) as show:
        for spec in specs:
            show(f"{spec.op} {spec.label}")
            line, new = run_line(spec, options, clock, rates, budget)
            keep(line)
            failures += new
            if not printer.live:
                printer.say(brief(line))
            for problem in new:
                printer.say(f"*** {problem.where}: {problem.what}", "bold white on red")
    return failures


def run_showcase(device: torch.device, quick: bool, folder: Path, printer: report.Printer):
    from .showcase import run_all

    parts, failures = [], []
    for outcome, problem in run_all(device, quick, folder, printer.say):
        if problem is not None:
            failures.append(problem)
            printer.say(f"*** {problem.where}: {problem.what}", "bold white on red")
        if outcome is not None:
            parts.append(outcome)
            printer.table(outcome["title"], outcome["columns"], outcome["rows"])
            if outcome["note"]:
                printer.say(outcome["note"])
            printer.say()
    return parts, failures


def show_table(result: dict, printer: report.Printer) -> None:
    for family, lines in report.families(result["lines"]).items():
        printer.table(family, list(report.COLUMNS), [report.row(line) for line in lines])
    reasons = {
        f"{name} of {line['op']} {line['label']} {line['dtype']}: {reason}"
        for line in result["lines"]
        for name, reason in line["skipped"].items()
        if "--quick" not in reason and reason != "only checked"
    }
    for reason in sorted(reasons):
        printer.say(f"did not run: {reason}")
    for text in (*report.rate_lines(result), *report.target_lines(result["lines"])):
        printer.say(text)


def files(args: argparse.Namespace, result: dict) -> list[Path]:
    """Where the result goes: --json alone, else bench/results (only unfiltered, timed runs)."""
    if args.json:
        return [args.json]
    if args.family or args.op or args.check_only or result["machine"]["device"] != "cpu":
        return []
    tail = "-quick" if args.quick else ""
    dated = f"{result['date'][:10]}-{slug(result['machine'])}{tail}.json"
    return [RESULTS / dated, RESULTS / f"latest{tail}.json"]


def finish(args, result: dict, failures: list[Failure], old: dict | None, printer) -> int:
    if old is not None:
        printer.table(f"beside {args.compare.name}", *compare.table(compare.compare(old, result)))
    for path in files(args, result):
        report.write_json(result, path)
        printer.say(f"wrote {path}")
    if not args.check_only and (paths := files(args, result)):
        from .plot import draw

        picture = paths[-1].with_suffix(".png")
        if draw(result, picture):
            printer.say(f"wrote {picture}")
        else:
            printer.say("no picture: matplotlib is missing or nothing was timed")
    if failures:
        printer.say(f"\n{len(failures)} FAILED:", "bold red")
        for problem in failures:
            printer.say(f"  {problem.where}: {problem.what}", "red")
            if problem.detail and "WRONG" not in problem.what:
                printer.say(problem.detail)
        return 1
    checked = sum(line["ok"] is True for line in result["lines"])
    spent = f"{result['seconds']:.0f} s in all"
    printer.say(f"{checked} lines checked against float64: all right. {spent}.")
    return 0


def show_list(specs: list[Spec], printer: report.Printer) -> None:
    rows = []
    for s in specs:
        targets = ", ".join(f"{name} {value:g}" for name, value in s.targets.items())
        rows.append([s.op, s.label, str(s.dtype)[6:], targets, "quick" if s.quick else ""])
    printer.table(f"{len(rows)} lines", ["op", "case", "dtype", "targets", ""], rows)


def new_result(args: argparse.Namespace, machine: dict) -> dict:
    return {
        "schema": 1,
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": ["python", "-m", "bench", *sys.argv[1:]],
        "quick": args.quick,
        "machine": machine,
        "rates": None,
        "lines": [],
        "showcase": [],
        "failures": [],
    }


def measure(args, result: dict, specs: list[Spec], device, printer) -> list[Failure]:
    """The rates and the lines, into `result`."""
    rates = None
    if specs and not args.check_only:
        rates = measure_rates(device, args.quick)
        result["rates"] = rates.as_dict()
    min_time = args.min_time or (0.3 if args.quick else 1.0)
    options = Options(args.quick, args.check_only, min_time, args.repeat)
    seconds = args.budget or (QUICK_BUDGET if args.quick else math.inf)

    def keep(line: dict) -> None:
        result["lines"].append(line)
        if args.json:  # what is done so far, should the run be stopped
            report.write_json(result, args.json)

    budget = Budget(seconds / 4, seconds)
    failures = run_lines(specs, options, device, rates, budget, printer, keep)
    if rates is not None:
        rates.end = max(copies(device, rates.buffer_bytes).values())
        result["rates"] = rates.as_dict()
        for line in result["lines"]:
            judge(line, rates)
        moved = rates.end / rates.copy - 1
        if abs(moved) > 0.2:
            printer.say(
                f"the copy rate moved by {100 * moved:+.0f}% during the run: a busy machine"
            )
    return failures


def session(args: argparse.Namespace, names: list[str] | None = None) -> int:
    """Run as the arguments say; `names` replaces the modules that specs come from. The exit code."""
    begun = time.monotonic()
    printer = report.Printer()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        printer.say("--device cuda: torch sees no CUDA device here", "bold red")
        return 2
    old = json.loads(args.compare.read_text()) if args.compare else None
    torch.manual_seed(0)
    specs, failures = collect(device, args.family, args.op, args.quick, names)
    for problem in failures:
        printer.say(f"*** {problem.where}: {problem.what}", "bold white on red")
    if args.list:
        show_list(specs, printer)
        return int(bool(failures))
    result = new_result(args, facts(device))
    for text in report.machine_lines(result["machine"]):
        printer.say(text)
    failures += measure(args, result, specs, device, printer)
    printer.say()
    show_table(result, printer)
    filtered = args.family or args.op or args.check_only or names is not None
    if not args.no_showcase and not filtered and device.type == "cpu":
        folder = args.json.parent if args.json else RESULTS
        result["showcase"], wrong = run_showcase(device, args.quick, folder, printer)
        failures += wrong
    result["failures"] = [{"where": f.where, "what": f.what} for f in failures]
    result["seconds"] = time.monotonic() - begun
    return finish(args, result, failures, old, printer)
