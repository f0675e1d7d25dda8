"""`python -m bench`: the command line. `make bench` calls it; see --help."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        prog="python -m bench",
        description="Check every op against float64, then time it beside eager torch, torch.compile, the "
        "best peers and the measured floor. The exit code is 1 if any value is wrong.",
    )
    add = p.add_argument
    add("--family", help="only this family: norm, ensemble, sinkhorn or weights")
    add("--op", help="only lines whose op, case or dtype holds this text")
    add("--quick", action="store_true", help="a shorter run: under four minutes on two cores")
    add("--device", default="cpu", help="cpu (default) or cuda")
    add("--list", action="store_true", help="print the lines and stop")
    add("--check-only", action="store_true", help="values only, no timing")
    add("--no-showcase", action="store_true", help="leave the section on real data out")
    add("--json", type=Path, metavar="PATH", help="write the result here, not to bench/results")
    add("--compare", type=Path, metavar="OLD.json", help="print the times over an earlier run's")
    add("--repeat", type=int, metavar="N", help="exactly N rounds a line")
    add("--min-time", type=float, metavar="S", help="seconds of rounds a line (1, quick 0.3)")
    add(
        "--budget",
        type=float,
        metavar="S",
        help="seconds after which lines without a target are left out (quick: 60); half of it may "
        "go into torch.compile",
    )
    add("--threads", type=int, help="torch threads")
    add("--default-malloc", action="store_true", help="leave malloc as it is")
    add("--render", nargs=2, type=Path, metavar=("JSON", "PAGE"), help="write the page and stop")
    return p.parse_args(argv)


def main() -> int:
    options = arguments()
    if options.render:
        from .report import render

        render(*options.render)
        return 0
    if sys.platform == "linux" and options.device == "cpu" and not options.default_malloc:
        from .malloc import tune

        tune()
    from .session import session

    return session(options)


if __name__ == "__main__":
    sys.exit(main())
