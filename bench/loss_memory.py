"""What forward and backward of the losses over vocabularies add to a process's memory, beside plain torch.

`python -m bench.loss_memory [--quick]`: one process for each loss and side, so that one's peak does not hide another's.
Counted is anonymous resident memory, sampled every millisecond, above what it was with the inputs in place.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import torch

from bench.case import Case
from bench.ensemble import logit_mixture, member_logits


def resident() -> int:
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith("RssAnon"):
                return 1024 * int(line.split()[1])
    raise RuntimeError("no RssAnon in /proc/self/status")


def added(step: Callable[[], object]) -> int:
    """The most that a step adds, its results included."""
    before, peak, done = resident(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, resident())
            time.sleep(0.001)

    thread = threading.Thread(target=watch)
    thread.start()
    kept = step()
    peak = max(peak, resident())
    done.set()
    thread.join()
    del kept
    return peak - before


def case_of(name: str, quick: bool) -> tuple[Case, int]:
    """The benchmark's case and the bytes of the gradient."""
    rows, f32 = 64 if quick else 512, torch.float32
    if name == "mixture_nll":
        case = logit_mixture._mixture_case(f32, "cpu", 16 if quick else 128)
    elif name == "ensemble_distillation_loss":
        case = logit_mixture._distillation_case(False, f32, "cpu", rows)
    else:
        case = member_logits._case((rows, 8, 50257), f32, name.split()[1], "cpu")
    assert case.written is not None
    return case, case.written


NAMES = (
    *(f"ensemble_cross_entropy {c}" for c in ("probability", "logit", "log_probability")),
    "ensemble_distillation_loss",
    "mixture_nll",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--one", nargs=2, metavar=("LOSS", "SIDE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        case, gradient = case_of(options.one[0], options.quick)
        step = case.ours if options.one[1] == "ours" else case.eager
        assert step is not None
        print(added(step), gradient)
        return
    print(
        "| loss | gradient, MB | ours adds | plain torch adds | times |\n|---|---:|---:|---:|---:|"
    )
    for name in NAMES:
        figures = []
        for side in ("ours", "plain"):
            command = [sys.executable, "-m", "bench.loss_memory", "--one", name, side]
            command += ["--quick"] if options.quick else []
            out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            figures.append([int(n) / 1e6 for n in out.split()])
        (ours, size), (theirs, _) = figures
        print(f"| {name} | {size:.0f} | {ours:.0f} | {theirs:.0f} | {theirs / ours:.1f} |")


if __name__ == "__main__":
    main()
