#!/usr/bin/env python3
"""Holds text files to the house rules that no formatter checks; prints what is wrong and exits 1."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

MOST_LINES = 500
SOURCE = {".py", ".cpp", ".h", ".cu", ".sh"}
TABLES = {"python/solera/_ops.py"}  # one page is the point of it


def faults(path: Path) -> list[str]:
    data = path.read_bytes()
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return ["is not UTF-8"]
    found = []
    if "\r" in text:
        found.append("has carriage returns")
    if text and not text.endswith("\n"):
        found.append("does not end in a newline")
    lines = text.split("\n")
    for number, line in enumerate(lines, 1):
        if line != line.rstrip():
            found.append(f"line {number} ends in blanks")
        if line.startswith(("<<<<<<< ", ">>>>>>> ")):
            found.append(f"line {number} is a conflict mark")
    table = path.as_posix() in TABLES
    if path.suffix in SOURCE and not table and len(lines) - 1 > MOST_LINES:
        found.append(f"has {len(lines) - 1} lines; past {MOST_LINES} it is two files")
    return found


def tracked() -> list[str]:
    names = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True)
    return [n for n in names.stdout.splitlines() if Path(n).suffix in SOURCE | {".md", ".toml"}]


def main(names: list[str]) -> int:
    wrong = [f"{name}: {fault}" for name in names or tracked() for fault in faults(Path(name))]
    print(*wrong, sep="\n", end="\n" if wrong else "")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
