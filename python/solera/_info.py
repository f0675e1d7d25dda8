"""What `solera info` prints: what a bug report needs, gathered without importing Triton."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from importlib import metadata
from typing import Any

import torch

from . import __version__, _registry, _route

ALLOCATOR = (
    "LD_PRELOAD",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TRIM_THRESHOLD_",
    "MALLOC_TOP_PAD_",
    "GLIBC_TUNABLES",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
)
SETTINGS = ("SOLERA_BACKEND", "SOLERA_ISA", "TRITON_INTERPRET", "OMP_NUM_THREADS")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _instruction_set() -> str | None:
    """What the compiled kernels were picked for; SOLERA_ISA in the environment limits it."""
    if _registry.compiled_library is None:
        return None
    ask = getattr(ctypes.CDLL(str(_registry.compiled_library)), "solera_cpu_isa", None)
    if ask is None:
        return None
    ask.restype = ctypes.c_char_p
    return ask().decode()


def _implementation(op: str, key: str) -> str:
    """Which of the three implementations the dispatcher takes for an op on CPU or CUDA tensors."""
    if _route.AT_IMPORT == "reference":
        return "reference"
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"solera::{op}", key):
        return "reference"
    return "C++" if key == "CPU" and _route.AT_IMPORT != "triton" else "Triton"


def _backends() -> dict[str, dict[str, dict[str, str]]]:
    """Family -> core -> {"CPU": ..., "CUDA": ...}; a core whose ops differ names each."""
    table: dict[str, dict[str, dict[str, str]]] = {}
    for core in dict.fromkeys(_registry.CORES.values()):
        family, name = core.split(".")
        ops = [op for op, of in _registry.CORES.items() if of == core]
        row = {}
        for key in ("CPU", "CUDA"):
            live = {op: _implementation(op, key) for op in ops}
            kinds = sorted(set(live.values()))
            row[key] = (
                kinds[0]
                if len(kinds) == 1
                else "; ".join(f"{k}: {', '.join(o for o in ops if live[o] == k)}" for k in kinds)
            )
        table.setdefault(family, {})[name] = row
    return table


def _file_ring() -> dict[str, str | None]:
    """Whether merge_files reads and writes by threads in C++, or why not."""
    from .weights._ring import compiled

    module = compiled()
    if isinstance(module, str):
        return {"path": None, "error": module}
    return {"path": module.__file__, "error": None}


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _devices() -> list[str]:
    if not torch.cuda.is_available():
        return []
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [f"{p.name}, {p.total_memory / 2**30:.0f} GiB, {p.major}.{p.minor}" for p in found]


def collect() -> dict[str, Any]:
    """Everything `solera info` knows, as plain Python values."""
    return {
        "versions": {
            "solera": __version__,
            "torch": torch.__version__,
            "triton": _version("triton"),
            "numpy": _version("numpy"),
            "python": sys.version.split()[0],
            "platform": platform.platform(),
        },
        "cpu": {
            "processor": _processor(),
            "instruction_set": _instruction_set(),
            "threads": torch.get_num_threads(),
            "cores": os.cpu_count(),
        },
        "gpu": {
            "devices": _devices(),
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
        },
        "library": {
            "path": str(_registry.compiled_library) if _registry.compiled_library else None,
            "error": _registry.load_error,
        },
        "file_ring": _file_ring(),
        "backends": _backends(),
        "environment": {n: os.environ[n] for n in (*SETTINGS, *ALLOCATOR) if n in os.environ},
    }


def _lines(facts: dict[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """The facts as titled sections of (name, value)."""
    gpu, library, ring = facts["gpu"], facts["library"], facts["file_ring"]
    built = f"CUDA {gpu['cuda']}" if gpu["cuda"] else f"ROCm {gpu['hip']}" if gpu["hip"] else "CPU"
    return [
        ("versions", [(k, str(v or "not installed")) for k, v in facts["versions"].items()]),
        (
            "machine",
            [
                ("processor", facts["cpu"]["processor"]),
                ("instruction set", facts["cpu"]["instruction_set"] or "-"),
                ("threads", f"{facts['cpu']['threads']} of {facts['cpu']['cores']} cores"),
                ("GPU", "; ".join(gpu["devices"]) or "none visible"),
                ("torch built for", built),
            ],
        ),
        (
            "CPU kernels",
            [
                ("library", library["path"] or "not loaded"),
                *([("error", library["error"])] if library["error"] else []),
            ],
        ),
        (
            "files",
            [
                (
                    "merge_files",
                    f"threads in C++, {ring['path']}"
                    if ring["path"]
                    else f"threads in Python: {ring['error']}",
                )
            ],
        ),
        (
            "backends",
            [
                (f"{family}.{core}", f"CPU: {row['CPU']}   GPU: {row['CUDA']}")
                for family, cores in facts["backends"].items()
                for core, row in cores.items()
            ],
        ),
        ("environment", list(facts["environment"].items()) or [("-", "nothing set")]),
    ]


def show(facts: dict[str, Any]) -> None:
    """Print the facts: with colour on a terminal that has rich, otherwise as plain text."""
    sections = _lines(facts)
    width = max(len(name) for _, rows in sections for name, _ in rows)
    try:
        from rich.console import Console
        from rich.markup import escape
    except ImportError:
        for title, rows in sections:
            print(title, *(f"  {name:<{width}}  {value}" for name, value in rows), sep="\n")
        return
    console = Console(highlight=False, soft_wrap=True)
    for title, rows in sections:
        console.print(f"[bold]{title}[/bold]")
        for name, value in rows:
            console.print(f"  [cyan]{name:<{width}}[/cyan]  {escape(value)}")
