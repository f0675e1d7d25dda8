"""Follows docs/adding-an-op.md literally, in a copy of the repository, and runs what it adds.

Every code block is preceded by a comment that says where it goes. Run with the Python that has the
package's dependencies; the copy is removed at the end, the repository stays as it is.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(
    r'<!-- (?:file (?P<file>\S+)|append to (?P<append>\S+)|insert before "(?P<mark>[^"]+)" in (?P<insert>\S+)) -->'
    r"\n```\w+\n(?P<code>.*?)```",
    re.DOTALL,
)


def place(copy: Path) -> list[str]:
    """Write each block of the page where its comment says; the paths written."""
    written = []
    for block in BLOCK.finditer((ROOT / "docs/adding-an-op.md").read_text()):
        code = block["code"]
        path = copy / (block["file"] or block["append"] or block["insert"])
        if block["file"]:
            path.write_text(code)
        elif block["append"]:
            path.write_text(path.read_text() + "\n" + code)
        else:
            text = path.read_text()
            if text.count(block["mark"]) != 1:
                sys.exit(f"{path.name}: {block['mark']!r} is not there exactly once")
            path.write_text(text.replace(block["mark"], code + block["mark"]))
        written.append(str(path.relative_to(copy)))
    return written


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "solera"
        ignore = shutil.ignore_patterns(".git", ".venv", "__pycache__", "results", ".*_cache")
        shutil.copytree(ROOT, copy, ignore=ignore)
        for path in place(copy):
            print("wrote", path)
        site = copy / "site"
        (site / "solera").parent.mkdir()
        environment = {**os.environ, "SOLERA_WERROR": "1"}
        subprocess.run(
            [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
            cwd=copy, env=environment, check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        shutil.copytree(copy / "python/solera", site / "solera")
        shutil.copytree(copy / "triton_kernels", site / "solera/triton_kernels")
        environment["PYTHONPATH"] = str(site)
        triton = {"SOLERA_BACKEND": "triton", "TRITON_INTERPRET": "1"}
        for name, extra in (
            ("C++", {}),
            ("reference", {"SOLERA_BACKEND": "reference"}),
            ("Triton", triton),
        ):
            print(f"{name}:", flush=True)
            subprocess.run(
                [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/norm/test_halve.py"],
                cwd=copy, env={**environment, **extra}, check=True,
            )  # fmt: skip
        subprocess.run(
            [sys.executable, "-m", "bench", "--op", "halve", "--no-showcase", "--quick", "--json", "halve.json"],
            cwd=copy, env=environment, check=True,
        )  # fmt: skip
    print("docs/adding-an-op.md holds")


if __name__ == "__main__":
    main()
