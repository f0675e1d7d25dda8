"""Finds the lines: every `specs(device)` under bench/<family>/."""

from __future__ import annotations

import importlib
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch

from .case import Spec

FAMILIES = ("norm", "ensemble", "sinkhorn", "weights")


@dataclass
class Failure:
    """Something that did not work; any of them makes the exit code 1."""

    where: str
    what: str
    detail: str = ""

    def as_dict(self) -> dict:
        return dict(vars(self))


def last_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:200]


def failure(where: str, error: BaseException) -> Failure:
    return Failure(where, last_line(error), "".join(traceback.format_exception(error)))


def modules(root: Path, package: str) -> list[str]:
    """Names of the modules that may hold specs, family by family."""
    return [
        f"{package}.{family}.{path.stem}"
        for family in FAMILIES
        for path in sorted((root / family).glob("*.py"))
        if not path.stem.startswith("_")
    ]


def collect(
    device: torch.device,
    family: str | None = None,
    op: str | None = None,
    quick: bool = False,
    names: list[str] | None = None,
) -> tuple[list[Spec], list[Failure]]:
    """All specs that pass the filters, and what failed on the way."""
    specs: list[Spec] = []
    failures: list[Failure] = []
    for name in modules(Path(__file__).parent, __package__) if names is None else names:
        try:
            module = importlib.import_module(name)
            if hasattr(module, "specs"):
                specs += list(module.specs(device.type))
        except Exception as error:
            failures.append(failure(name, error))
    chosen = [
        s
        for s in specs
        if (family is None or s.op.split(".")[0] == family)
        and (op is None or op in f"{s.op} {s.label} {str(s.dtype)[6:]}")
        and (s.quick or not quick)
    ]
    order = {f: i for i, f in enumerate(FAMILIES)}
    chosen.sort(key=lambda s: (order.get(s.op.split(".")[0], len(order)), s.compiled_model))
    return chosen, failures
