"""Lists of parameters as the functions over them take them: a tensor, an iterable, or a mapping of names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..norm.grad_norm import tensor_list, writable
from . import _lists
from ._lists import Key


def parameters_of(name: str, value: Any) -> tuple[list[Key], list[Any]]:
    """Keys and entries: 0, 1, ... of a tensor or an iterable, names of a mapping, where counters are left out."""
    if isinstance(value, Tensor):
        return [0], [value]
    if isinstance(value, Mapping):
        kept = {k: t for k, t in value.items() if not _is_counter(t)}
        return list(kept), list(kept.values())
    if isinstance(value, Iterable) and not isinstance(value, str | bytes):
        found = list(value)
        return list(range(len(found))), found
    raise TypeError(
        f"{name}: expected a tensor, an iterable of tensors or a mapping of names to tensors, got "
        f"{type(value).__name__}"
    )


def _is_counter(t: Any) -> bool:
    return isinstance(t, Tensor) and not t.dtype.is_floating_point


def beside(name: str, value: Any, keys: Sequence[Key], of: str = "parameters") -> list[Any]:
    """One entry for each of `keys`: those of a mapping by name, those of an iterable in order."""
    if isinstance(value, Mapping):
        missing = [k for k in keys if k not in value]
        if missing:
            raise ValueError(f"{name}: keys missing beside {of}: {missing}")
        return [value[k] for k in keys]
    if keys and isinstance(keys[0], str):
        raise TypeError(f"{name}: expected a mapping like {of}, got {type(value).__name__}")
    _, found = parameters_of(name, value)
    if len(found) != len(keys):
        raise ValueError(f"{name}: expected {len(keys)} tensors like {of}, got {len(found)}")
    return found


def checked(name: str, tensors: list[Any], like: list[Tensor] | None = None) -> list[Tensor]:
    """Dense floating-point tensors on one device, shaped like `like` if given; or an error naming one."""
    if not tensors or not _lists.uniform(tensors, tensors if like is None else like):
        tensor_list(name, tensors, like)
    return tensors


def written(name: str, tensors: list[Tensor]) -> list[Tensor]:
    """Each once, none with elements that share memory."""
    writable(name, tensors)
    return tensors


def apart(name: str, tensors: list[Tensor], others: list[Tensor], other: str) -> None:
    """No two share memory, or an error."""
    if torch.compiler.is_compiling() or _lists.disjoint([*tensors, *others], ()):
        return
    _lists.refuse_overlap(
        [*tensors, *others],
        [],
        lambda i: f"{name}[{i}]" if i < len(tensors) else f"{other}[{i - len(tensors)}]",
        str,
    )
