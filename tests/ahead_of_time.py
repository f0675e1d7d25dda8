"""Compiles the `aot()` cases of the Triton modules for GPUs that are not here, and reads what they use."""

from __future__ import annotations

import faulthandler
import importlib
import json
import math
import multiprocessing
import re
import signal
import subprocess
import tempfile
from collections.abc import Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUDGETS = Path(__file__).with_name("budgets.json")
TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
SECONDS = 60  # one compile; ptxas takes minutes over a kernel that spills badly


@dataclass(frozen=True)
class Usage:
    """What one thread and one block of a compiled kernel take; an error if it did not compile."""

    registers: int = 0
    spills: int = 0  # to memory: bytes of a thread's local memory (NVIDIA), vector registers (AMD)
    scalar_spills: int = 0  # AMD only, reported and not held to zero: see _amd_usage
    shared: int = 0
    error: str = ""


def modules() -> list[str]:
    """Every Triton module, as family.core."""
    return sorted(
        f"{path.parent.name}.{path.stem}"
        for path in (ROOT / "triton_kernels").glob("*/*.py")
        if not path.stem.startswith("_")
    )


def cases(module: str) -> list:
    found = list(importlib.import_module(f"solera.triton_kernels.{module}").aot())
    names = [case.name for case in found]
    if len(set(names)) != len(names):
        raise ValueError(f"{module}: two cases of one name in {names}")
    return found


def _nvidia_spills(ptx: str, arch: int) -> int:
    """Spill bytes by `ptxas -v`: a stack frame alone need not be one."""
    from triton.backends.nvidia.compiler import get_ptxas

    full = f"sm_{arch}a" if arch >= 90 else f"sm_{arch}"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [get_ptxas(arch).path, "-v", f"-arch={full}", str(source), "-o", "/dev/null"]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", log))


def _nvidia_usage(kernel, arch: int) -> Usage:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {key: int(n) for key, n in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", text)}
    stack = found["STACK"] + found["LOCAL"]
    spills = _nvidia_spills(kernel.asm["ptx"], arch) if stack else 0
    return Usage(found["REG"], spills, 0, max(found["SHARED"], kernel.metadata.shared))


def _amd_usage(kernel) -> Usage:
    """A spilled scalar register goes to a lane of a vector register (v_writelane), not to memory, so it is
    told apart. Should one reach memory after all, the private segment is not empty: that is a spill."""
    text = kernel.asm["amdgcn"]

    def number(key: str) -> int:
        return max((int(n) for n in re.findall(rf"\.{key}:\s+(\d+)", text)), default=0)

    spills = number("vgpr_spill_count") or number("private_segment_fixed_size")
    shared = max(number("group_segment_fixed_size"), kernel.metadata.shared)
    return Usage(number("vgpr_count"), spills, number("sgpr_spill_count"), shared)


def _late(signum, frame):
    raise TimeoutError(f"more than {SECONDS} s")


def compile_module(module: str, target: str) -> dict[str, Usage]:
    """Case name -> usage. A hanging compiler takes the process down."""
    import triton
    from triton.backends.compiler import GPUTarget

    signal.signal(signal.SIGALRM, _late)
    used: dict[str, Usage] = {}
    for case in cases(module):
        signal.alarm(SECONDS)
        faulthandler.dump_traceback_later(4 * SECONDS, exit=True)
        try:
            gpu = GPUTarget(*TARGETS[target])
            kernel = triton.compile(case.source(), target=gpu, options=case.options())
            cuda = gpu.backend == "cuda"
            used[case.name] = _nvidia_usage(kernel, gpu.arch) if cuda else _amd_usage(kernel)
        except Exception as error:
            used[case.name] = Usage(error=f"{type(error).__name__}: {error}")
        finally:
            signal.alarm(0)
            faulthandler.cancel_dump_traceback_later()
    return used


def compile_all(
    names: Iterable[str], pool: ProcessPoolExecutor
) -> dict[tuple[str, str], Future[dict[str, Usage]]]:
    return {(m, t): pool.submit(compile_module, m, t) for m in names for t in TARGETS}


def workers(count: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn"))


def budgets() -> dict[str, dict[str, dict[str, dict[str, int]]]]:
    """Module -> case -> target -> {"registers": ..., "shared": ...}."""
    return json.loads(BUDGETS.read_text())["kernels"] if BUDGETS.exists() else {}


def written_for() -> str:
    """The Triton version whose code the budgets are of; another's is held to no spills only."""
    return json.loads(BUDGETS.read_text())["triton"] if BUDGETS.exists() else ""


def budget_of(usage: Usage) -> dict[str, int]:
    """What is written for a kernel: its registers, rounded up to the 8 a GPU allocates at once."""
    return {"registers": math.ceil(usage.registers / 8) * 8, "shared": usage.shared}
