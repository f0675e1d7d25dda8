"""Interleaved timing: every contender once a round, in rotating order, compared within the round.

A machine that slows down for a second slows all contenders of that round, so the median of the rounds'
ratios is far steadier than a ratio of two medians, and that steadier than any time.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from dataclasses import dataclass

import torch

from .case import Step

SHORT = 50e-6  # a call shorter than this is repeated inside one sample
SAMPLE = 400e-6  # about how long such a sample lasts
MOST_ROUNDS = 300
SLOW_ROUNDS = 3  # rounds that a contender takes part in whose call outlasts the time for the line
TOO_SLOW = 4.0  # seconds of a call from which on it takes part in one round


@dataclass
class Timing:
    """Seconds for one call."""

    median: float
    low: float
    high: float
    rounds: int
    inner: int

    def as_dict(self) -> dict:
        return dict(vars(self))


class Clock:
    """Seconds for `inner` calls: wall time on the CPU, events with a flushed L2 on CUDA."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        if self.cuda:
            l2 = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 50 << 20
            self.flush = torch.empty(2 * l2, dtype=torch.int8, device=device)

    def __call__(self, step: Step, inner: int) -> float:
        if not self.cuda:
            start = time.perf_counter()
            for _ in range(inner):
                step()
            return time.perf_counter() - start
        # The flush also keeps the device busy while the host queues the call behind it.
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        begin.record()
        for _ in range(inner):
            step()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


def time_rounds(
    steps: dict[str, Step], clock: Clock, min_time: float, rounds: int | None = None
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds a call by contender and round, and the calls a sample. The steps have run before.

    A contender too slow for the time of the line leaves after SLOW_ROUNDS (or one), so lists may be shorter
    than the first contender's; the i-th entries of all lists are from the same round.
    """
    names = list(steps)
    inner, once = {}, {}
    for name in names:
        once[name] = clock(steps[name], 1)
        if once[name] < TOO_SLOW:
            once[name] = max(min(once[name], clock(steps[name], 1)), 1e-7)
        inner[name] = 1
        if once[name] < SHORT:
            inner[name] = max(1, math.ceil(SAMPLE / once[name]))
            once[name] = max(clock(steps[name], inner[name]) / inner[name], 1e-7)
    slow = {n for n in names[1:] if once[n] > min_time / 2 and once[n] > 2 * once[names[0]]}
    a_round = sum(once[n] * inner[n] for n in names if n not in slow)
    if rounds is None:
        least = 5 if a_round < min_time else 3
        rounds = min(MOST_ROUNDS, max(least, round(min_time / a_round)))
    samples: dict[str, list[float]] = {n: [] for n in names}
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for i in range(rounds):
            turn = names[i % len(names) :] + names[: i % len(names)]
            for name in turn if i % 2 == 0 else reversed(turn):
                if name not in slow or i < (SLOW_ROUNDS if once[name] < TOO_SLOW else 1):
                    samples[name].append(clock(steps[name], inner[name]) / inner[name])
    finally:
        if was_enabled:
            gc.enable()
    return samples, inner


def summary(samples: list[float], inner: int = 1) -> Timing:
    return Timing(statistics.median(samples), min(samples), max(samples), len(samples), inner)


def ratio(theirs: list[float], ours: list[float]) -> Timing:
    """How many times as fast as theirs ours is: median, least and most of the rounds' ratios."""
    return summary([t / o for t, o in zip(theirs, ours)])
