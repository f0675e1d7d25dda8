#!/usr/bin/env python3
"""Runs other packages' own tests with Solera's functions in the place of theirs, and prints a table.

    python tools/peer_suites.py pot FOLDER         FOLDER: `test` of a checkout of POT
    python tools/peer_suites.py geomloss FOLDER    FOLDER: `tests` of a checkout of geomloss

(The source distributions that pip downloads lack files which the tests import.) Every file is run twice, with the
peer's own code and with tools/peers/<peer>.py loaded; a line tells how many tests passed in each and how many calls
were redirected. docs/peer_suites.md keeps the result and says why what fails, fails.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
PEERS = {
    "pot": {
        "package": "POT",
        "files": {
            "test_bregman.py": "sinkhorn or barycenter or empirical",
            "test_ot.py": "",
            "test_solvers.py": "",
            "test_da.py": "sinkhorn or class_reg",
            "unbalanced/test_sinkhorn.py": "",
            "batch/test_solve_batch.py": "",
            "sliced/test_sliced_distances.py": "",
        },
    },
    "geomloss": {"package": "geomloss", "files": {"test_ot_solve_matrix.py": "", "test_ot_solve_sample.py": ""}},
}  # fmt: skip


def run(
    tests: Path, file: str, chosen: str, plugin: str | None
) -> tuple[dict[str, int], int, list[str]]:
    """(outcomes by name, redirected calls, ids of the tests that failed)."""
    environment = {
        **os.environ,
        "PYTHONPATH": f"{HERE}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
    }
    environment.update({f"POT_BACKEND_DISABLE_{b}": "1" for b in ("JAX", "TENSORFLOW", "CUPY")})
    with tempfile.TemporaryDirectory() as scratch:
        calls = Path(scratch) / "calls"
        environment["SOLERA_PEER_CALLS"] = str(calls)
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-rf",
            "-p",
            "no:cacheprovider",
            "--no-header",
            file,
        ]
        command += ["-c", os.devnull, "--rootdir", str(tests), "-W", "ignore"]
        command += ["-k", chosen] if chosen else []
        command += ["-p", plugin] if plugin else []
        out = subprocess.run(
            command, cwd=tests, env=environment, capture_output=True, text=True
        ).stdout
        redirected = calls.read_text().split() if calls.exists() else []
    last = out.strip().splitlines()[-1] if out.strip() else ""
    outcomes = {
        name: int(n) for n, name in re.findall(r"(\d+) (passed|failed|skipped|errors?)", last)
    }
    failed = re.findall(r"^FAILED (\S+)", out, re.MULTILINE)
    return outcomes, sum(int(n) for n in redirected[1::2]), failed


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("tests", type=Path, help="folder with the peer's tests")
    parser.add_argument("--file", help="only files whose name holds this text")
    options = parser.parse_args()
    peer = PEERS[options.peer]
    wrong = 0
    tests = options.tests.resolve()
    print(f"{peer['package']} {version(peer['package'])}\n")
    print("| file | chosen | its own code | with Solera | calls redirected |")
    print("|---|---|---|---|---:|")
    for file, chosen in peer["files"].items():
        if options.file and options.file not in file:
            continue
        if not (tests / file).exists():
            print(f"| {file} | | not in this source | | |")
            continue
        theirs, _, known = run(tests, file, chosen, None)
        ours, calls, failed = run(tests, file, chosen, f"peers.{options.peer}")
        text = [", ".join(f"{n} {name}" for name, n in found.items()) for found in (theirs, ours)]
        print(f"| {file} | {chosen or 'all'} | {text[0]} | {text[1]} | {calls} |", flush=True)
        new = [name for name in failed if name not in known]
        print(
            *(f"FAILS {name}" for name in new),
            sep="\n",
            end="\n" if new else "",
            file=sys.stderr,
        )
        wrong += len(new)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
