"""What each family is for, on data shipped with scikit-learn: Solera and plain torch side by side.

Each module has `run(quick, folder) -> Outcome`. It trains or solves twice from the same start, compares the
results, and times the two sides in turns.
"""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..collect import Failure, failure

MODULES = (
    "ensemble",
    "colour_transfer",
    "soup",
    "residual_net",
    # The short form stops here: one for each family.
    "digit_norms",
    "style_statistics",
    "cascade",
    "tabm_training",
    "point_matching",
    "generative_points",
    "digit_distances",
    "uncertainty",
    "merging",
    "real_checkpoint",
)
QUICK = 4
COLUMNS = ["", "Solera", "plain torch"]


class Absent(Exception):
    """What a part is shown on is not installed: it is left out, and that is said."""


@dataclass
class Outcome:
    name: str
    title: str
    rows: list[list[str]]
    ratio: float  # plain torch's time over Solera's
    agrees: bool
    problem: str = ""  # where the two sides disagree
    note: str = ""
    numbers: dict[str, float] = field(default_factory=dict)
    pictures: list[str] = field(default_factory=list)  # file names in the results folder
    columns: list[str] = field(default_factory=lambda: list(COLUMNS))
    seconds: float = 0.0

    def as_dict(self) -> dict:
        return dict(vars(self))


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def median_ratio(ours: list[float], theirs: list[float]) -> float:
    """Median of theirs over ours, pair by pair, without the first pair (cold)."""
    pairs = list(zip(ours, theirs))
    return statistics.median(t / o for o, t in (pairs[1:] or pairs))


def pyplot():
    """matplotlib.pyplot without a display, or None where it is missing."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return None
    return plt


def run_all(
    device: torch.device, quick: bool, folder: Path, say: Callable[[str], None]
) -> Iterator[tuple[dict | None, Failure | None]]:
    """(outcome, failure) of each part; a part without its data is left out and said."""
    try:
        import sklearn
    except ImportError:
        say("no showcase: scikit-learn, which ships its data, is not installed")
        return
    folder.mkdir(parents=True, exist_ok=True)
    for name in MODULES[:QUICK] if quick else MODULES:
        start = time.monotonic()
        try:
            torch.manual_seed(0)
            outcome = importlib.import_module(f"{__name__}.{name}").run(quick, folder)
        except Absent as reason:
            say(f"no {name}: {reason}")
            continue
        except Exception as error:
            yield None, failure(f"showcase {name}", error)
            continue
        outcome.seconds = time.monotonic() - start
        disagree = None
        if not outcome.agrees:
            disagree = Failure(f"showcase {name}", f"WRONG VALUE: {outcome.problem}")
        yield outcome.as_dict(), disagree
