"""The facts that a figure depends on: machine, versions, commit, allocator, threads."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

from .malloc import MALLOC

ROOT = Path(__file__).parent.parent
PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "tabm",
    "POT",
    "geomloss",
    "timm",
    "mergekit",
    "scikit-learn",
)
PACKAGES += ("ott-jax", "liger-kernel", "quack-kernels", "fla-core")
FLAGS = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_tile",
    "amx_bf16",
    "asimd",
    "sve",
    "bf16",
)


def cpu() -> dict:
    model, flags = platform.processor() or platform.machine(), []
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    if found := re.search(r"^model name\s*:\s*(.+)$", text, re.M):
        model = " ".join(found[1].split())
    if found := re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.M):
        present = set(found[1].split())
        flags = [f for f in FLAGS if f in present]
    return {"model": model, "cores": os.cpu_count(), "flags": flags, "machine": platform.machine()}


def gpu(device: torch.device) -> dict | None:
    if device.type != "cuda":
        return None
    p = torch.cuda.get_device_properties(device)
    capability = f"{p.major}.{p.minor}"
    return {
        "name": p.name,
        "memory": p.total_memory,
        "sms": p.multi_processor_count,
        "cc": capability,
    }


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    found["torch"] = torch.__version__
    try:
        import solera

        found["solera"] = solera.__version__
    except ImportError:
        pass
    return found


def commit() -> dict:
    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "-uno", "--", ".", ":!bench/results", ":!docs")
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(changed)}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "changed": None}


def allocator() -> dict:
    """The malloc settings in force; `tuned` if large buffers keep their pages between calls."""
    found = {name: os.environ[name] for name in MALLOC if name in os.environ}
    return {
        "tuned": found == MALLOC,
        "settings": found,
        "preload": os.environ.get("LD_PRELOAD", ""),
    }


def isa() -> str:
    """The instruction set the kernels run on here, as csrc/cpu/parallel.h chooses it."""
    asked = os.environ.get("SOLERA_ISA")
    flags = cpu()["flags"]
    best = "avx512" if "avx512f" in flags else "avx2" if "avx2" in flags else "generic"
    order = ("generic", "avx2", "avx512")
    return asked if asked in order and order.index(asked) < order.index(best) else best


def facts(device: torch.device) -> dict:
    return {
        "cpu": cpu(),
        "isa": isa(),
        "gpu": gpu(device),
        "system": f"{platform.system()} {platform.release()}",
        "versions": versions(),
        **commit(),
        "allocator": allocator(),
        "threads": torch.get_num_threads(),
        "device": device.type,
    }


def slug(machine: dict) -> str:
    """A short name for file names, from the processor and not from the host."""
    name = machine["gpu"]["name"] if machine["gpu"] else machine["cpu"]["model"]
    name = re.sub(r"\((R|TM|r|tm)\)|@|CPU|Processor", " ", name)
    words = re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")
    return words if machine["gpu"] else f"{words}-{machine['threads']}t"
