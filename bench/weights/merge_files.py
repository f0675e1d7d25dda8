"""Merging files: the linear merge of four, in a budget of memory smaller than one of them.

`specs` are lines of the table: the files are dropped from the page cache before every run, on every side, and every
side's output is flushed to the disk. A peer that is not installed is left out.

    python -m bench.weights.merge_files [--quick] [--folder F]

is the same by itself, and what a line of the table cannot show: the disk's own sequential copy rate in turns with
ours, and the peak of anonymous memory, each side measured in a process of its own. The device decides, so the run
should have the machine to itself.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import functools
import json
import mmap
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from bench.case import Case, Spec
from solera.weights import merge_files
from solera.weights._safetensors import read_header, write_file
from solera.weights.methods import Linear

MODELS, SIZE, BUDGET = 4, 1_000_000_000, 512_000_000
QUICK_SIZE, QUICK_BUDGET = 100_000_000, 96_000_000
NAMED = "SOLERA_BENCH_FOLDER"  # where the files go: on the disk that is to be measured


# ---- the files ---------------------------------------------------------------------------------------


@functools.cache
def folder() -> Path:
    found = Path(tempfile.mkdtemp(prefix="solera-merge-", dir=os.environ.get(NAMED)))
    atexit.register(shutil.rmtree, found, ignore_errors=True)
    return found


@functools.cache
def inputs(size: int) -> tuple[Path, ...]:
    """Four models of `size` bytes: matrices of 4096 columns and vectors, float32."""
    needed = (MODELS + 3) * size
    free = shutil.disk_usage(folder()).free
    if free < needed:
        raise OSError(
            f"{folder()}: {free} bytes free, {needed} needed; {NAMED} names another place"
        )
    rows = max(1, size // 4 // 4097 // 60)
    paths = []
    for k in range(MODELS):
        state = {}
        generator = torch.Generator().manual_seed(k)
        for i in range(60):
            state[f"layers.{i}.weight"] = torch.randn(rows, 4096, generator=generator)
            state[f"layers.{i}.bias"] = torch.randn(rows, generator=generator)
        folder_of = folder() / f"{size}-{k}"
        folder_of.mkdir()
        (folder_of / "config.json").write_text(json.dumps({"architectures": ["Bench"]}))
        write_file(folder_of / "model.safetensors", state, {"format": "pt"})
        flush(folder_of / "model.safetensors")
        paths.append(folder_of / "model.safetensors")
    return tuple(paths)


def flush(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def drop(paths: Sequence[Path]) -> None:
    """Out of the page cache."""
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


# ---- the sides ---------------------------------------------------------------------------------------


def ours(paths: Sequence[Path], out: Path, budget: int) -> None:
    merge_files(paths, out, Linear(), max_memory=budget, overwrite=True)


def numpy_loop(paths: Sequence[Path], out: Path, budget: int) -> None:
    """What a user writes today: open all, average tensor by tensor, save."""
    from safetensors import safe_open
    from safetensors.numpy import save_file

    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(safe_open(path, "np")) for path in paths]
        merged = {}
        for name in files[0].keys():
            total = files[0].get_tensor(name) / len(files)
            for file in files[1:]:
                total += file.get_tensor(name) / len(files)
            merged[name] = total
    save_file(merged, out)
    flush(out)


def torch_loop(paths: Sequence[Path], out: Path, budget: int) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(safe_open(path, "pt")) for path in paths]
        merged = {}
        for name in files[0].keys():
            total = files[0].get_tensor(name).div_(len(files))
            for file in files[1:]:
                total.add_(file.get_tensor(name), alpha=1 / len(files))
            merged[name] = total
    save_file(merged, out)
    flush(out)


def mergekit_command() -> str | None:
    """The tool of that name; MERGEKIT names it where it has an environment of its own."""
    return os.environ.get("MERGEKIT") or shutil.which("mergekit-yaml")


def mergekit(paths: Sequence[Path], out: Path, budget: int) -> None:
    """Its command as a process, start included: nobody uses it otherwise. It knows models by their configuration;
    the raw form takes any tensors.
    """
    command = mergekit_command()
    if command is None:
        raise FileNotFoundError("mergekit-yaml is not installed (MERGEKIT=path names it)")
    models = [{"model": str(path.parent), "parameters": {"weight": 1.0}} for path in paths]
    config = {"merge_method": "linear", "models": models, "dtype": "float32"}
    raw = Path(command).with_name("mergekit-pytorch")
    done = out.with_suffix(".mergekit")
    shutil.rmtree(done, ignore_errors=True)
    text = out.with_suffix(".json")  # JSON is YAML
    config["models"] = [{**m, "model": str(path)} for m, path in zip(models, paths)]
    text.write_text(json.dumps(config))
    subprocess.run([raw, text, done, "--quiet"], check=True, capture_output=True)
    files = sorted(done.glob("*.safetensors"))
    for file in files:
        flush(file)
    files[0].replace(out)
    shutil.rmtree(done)


SIDES: dict[str, Callable[[Sequence[Path], Path, int], None]] = {
    "ours": ours,
    "numpy + safetensors": numpy_loop,
    "torch + safetensors": torch_loop,
    "mergekit": mergekit,
}


def copy_file(source: Path, target: Path, direct: bool, block: int = 8 << 20) -> None:
    """The disk's own sequential copy: one thread, large blocks, flushed."""
    flag = getattr(os, "O_DIRECT", 0) if direct else 0
    size = source.stat().st_size // 4096 * 4096
    target.unlink(missing_ok=True)
    a = os.open(source, os.O_RDONLY | flag)
    b = os.open(target, os.O_WRONLY | os.O_CREAT | flag)
    try:
        os.posix_fallocate(b, 0, size)
        buffer = memoryview(mmap.mmap(-1, block))
        for at in range(0, size, block):
            part = buffer[: min(block, size - at)]
            os.preadv(a, [part], at)
            os.pwritev(b, [part], at)
        os.fsync(b)
    finally:
        os.close(a)
        os.close(b)


# ---- lines of the table ------------------------------------------------------------------------------


def _case(size: int, budget: int) -> Case:
    paths = inputs(size)
    out = folder() / "out.safetensors"
    stored, _ = read_header(paths[0])
    checked = ["layers.0.weight", "layers.31.bias", "layers.59.weight"]

    def values(files: Sequence[Path], name: str) -> list[Tensor]:
        found = []
        for path in files:
            place = read_header(path)[0][name]
            with open(path, "rb") as file:
                file.seek(place.offset)
                data = bytearray(file.read(place.nbytes))
            found.append(torch.frombuffer(data, dtype=place.dtype).view(place.shape))
        return found

    def step(side: str) -> Callable[[], list[Tensor]]:
        def run() -> list[Tensor]:
            drop(paths)
            SIDES[side](paths, out, budget)
            return [values([out], name)[0] for name in checked]

        return run

    def exact() -> list[Tensor]:
        return [sum(t.double() for t in values(paths, name)) / MODELS for name in checked]

    written = sum(s.nbytes for s in stored.values())
    return Case(
        ours=step("ours"),
        exact=exact,
        peers={side: step(side) for side in SIDES if side != "ours"},
        bytes=(MODELS + 1) * written,
        tolerance=1e-6,
        floor_note="the device's rate, not the memory's: see python -m bench.weights.merge_files",
    )


def specs(device) -> Iterator[Spec]:
    if device != "cpu" or not hasattr(os, "posix_fadvise"):
        return
    goals = {"numpy + safetensors": 1.3, "mergekit": 2.0}
    f32, op = torch.float32, "weights.merge_files"
    notes = "inputs dropped from the page cache before each run, outputs flushed, on all sides"
    yield Spec(
        op, "linear, 4 files of 1 GB, 512 MB budget", f32, lambda: _case(SIZE, BUDGET),
        quick=False, targets=goals, notes=notes,
    )  # fmt: skip
    small = lambda: _case(QUICK_SIZE, QUICK_BUDGET)
    yield Spec(op, "linear, 4 files of 100 MB, 96 MB budget", f32, small, notes=notes)


# ---- rate of the disk and memory ---------------------------------------------------------------------


def anonymous() -> int:
    with open("/proc/self/status") as file:
        return next(int(x.split()[1]) for x in file if x.startswith("RssAnon")) * 1024


def measured(side: str, paths: Sequence[Path], out: Path, budget: int) -> dict[str, float]:
    """Seconds, and the peak of this process's anonymous memory above what it holds after its imports."""
    with contextlib.suppress(ImportError):
        pass
    before = anonymous()
    peak, done = before, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, anonymous())

    thread = threading.Thread(target=watch)
    thread.start()
    begun = time.perf_counter()
    try:
        SIDES[side](paths, out, budget)
    finally:
        seconds = time.perf_counter() - begun
        done.set()
        thread.join()
    return {"seconds": seconds, "peak": max(peak, anonymous()) - before}


def in_a_process(side: str, paths: Sequence[Path], out: Path, budget: int) -> dict[str, float]:
    drop(paths)
    command = [sys.executable, "-m", __spec__.name, "--side", side, "--budget", str(budget)]
    command += ["--out", str(out), *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stderr.strip() or "failed").splitlines()[-1])
    return json.loads(done.stdout)


def main() -> int:
    parser = argparse.ArgumentParser(description="merge_files beside the disk's own copy rate")
    parser.add_argument("--quick", action="store_true", help="files of 100 MB, a budget of 96 MB")
    parser.add_argument("--folder", help="where the files go: on the disk to be measured")
    parser.add_argument("--rounds", type=int, default=3)
    for hidden in ("--side", "--out"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--budget", type=int, help=argparse.SUPPRESS)
    parser.add_argument("paths", nargs="*", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        out = Path(options.out)
        print(json.dumps(measured(options.side, options.paths, out, options.budget)))
        return 0
    if options.folder:
        os.environ[NAMED] = options.folder
    size, budget = (QUICK_SIZE, QUICK_BUDGET) if options.quick else (SIZE, BUDGET)
    paths, out = inputs(size), folder() / "out.safetensors"
    copies: dict[str, list[float]] = {"direct": [], "buffered": []}
    runs: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for _ in range(options.rounds):
        for kind, rates in copies.items():
            drop(paths)
            begun = time.perf_counter()
            copy_file(paths[0], out, kind == "direct")
            rates.append(2 * paths[0].stat().st_size / (time.perf_counter() - begun))
            out.unlink()
        for side in list(runs):
            try:
                runs[side].append(in_a_process(side, paths, out, budget))
            except RuntimeError as error:
                print(f"{side}: did not run: {error}")
                del runs[side]
    report(paths, budget, copies, runs)
    return 0


def report(paths, budget, copies, runs) -> None:
    moved = sum(p.stat().st_size for p in paths) + paths[0].stat().st_size
    size = sum(p.stat().st_size for p in paths)
    best = max(statistics.median(rates) for rates in copies.values())
    print(f"{len(paths)} files, {size / 1e6:.0f} MB to read; budget {budget / 1e6:.0f} MB")
    for kind, rates in copies.items():
        print(f"sequential copy, {kind}: {statistics.median(rates) / 1e9:.2f} GB/s read + written")
    reference = [r["seconds"] for r in runs["ours"]]
    for side, found in runs.items():
        seconds = [r["seconds"] for r in found]
        rate = moved / statistics.median(seconds)
        ratio = statistics.median(a / b for a, b in zip(seconds, reference))
        peak = max(r["peak"] for r in found)
        # mergekit is a process of its own: its memory is not seen here.
        memory = "" if side == "mergekit" else f", peak {peak / 1e6:.0f} MB"
        print(
            f"{side}: {statistics.median(seconds):.2f} s, {rate / 1e9:.2f} GB/s, {100 * rate / best:.0f}% of "
            f"the copy rate, ours is {ratio:.2f}x as fast{memory}"
        )
    worst = max(r["peak"] for r in runs["ours"])
    kept = "within" if worst <= budget else "OVER"
    print(f"memory: {worst / 1e6:.0f} of {budget / 1e6:.0f} MB, {kept} the budget")


if __name__ == "__main__":
    sys.exit(main())
