"""Tensors, lists of tensors and state dicts as one flat list with names, and the checks on such lists."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .._check import FLOATS

Key = int | str
_PLAIN = frozenset((Tensor, torch.nn.Parameter))
_FLOATS = frozenset(FLOATS)


def plain(value: Any) -> bool:
    """A Tensor or Parameter itself, no subclass with ideas of its own."""
    return type(value) in _PLAIN


def local(t: Any) -> Any:
    """A DTensor's shard on this process; anything else itself."""
    return t.to_local() if hasattr(t, "to_local") else t


def all_plain(flat: Iterable[Any]) -> bool:
    """True where none is a subclass: no DTensor, no wrapper."""
    return _PLAIN.issuperset(map(type, flat))


def shards(value: Any) -> Any:
    """A tensor, list or state dict with its DTensors replaced by this process's shards."""
    if isinstance(value, Mapping):
        if all_plain(value.values()):
            return value
        return {key: local(t) for key, t in value.items()}
    if isinstance(value, list | tuple):
        return value if all_plain(value) else [local(t) for t in value]
    return local(value)


def uniform(flat: Sequence[Any], like: Sequence[Tensor]) -> bool:
    """True if flat[i] is a plain dense floating-point tensor of the shape of like[i % len(like)], all on one
    device. The quick way through the checks; a False is explained by `match`.
    """
    if not all_plain(flat):
        return False
    first = like[0]
    device, strided = first.device, torch.strided
    if len(like) == 1:
        shape = first.shape
        for t in flat:
            if (
                t.dtype not in _FLOATS
                or t.shape != shape
                or t.device != device
                or t.layout is not strided
            ):
                return False
        return True
    shapes = [t.shape for t in like]
    return (
        _FLOATS.issuperset([t.dtype for t in flat])
        and [t.shape for t in flat] == shapes * (len(flat) // len(like))
        and all([t.device == device for t in flat])
        and all([t.layout is strided for t in flat])
    )


def disjoint(written: Sequence[Tensor], read: Sequence[Tensor]) -> bool:
    """True if all are contiguous and no two share a byte (two that are only read count too).

    Also true where there are no addresses to compare: on fake and batched tensors.
    """
    try:
        spans = [(t.data_ptr(), t.nbytes) for t in (*written, *read)]
    except RuntimeError:
        return True
    if not all([t.is_contiguous() for t in (*written, *read)]):
        return False
    spans.sort()
    end = 0
    for start, size in spans:
        if start < end:
            return False
        end = start + size
    return True


def entries(name: str, value: Any, kind: str) -> dict[Key, Tensor]:
    """What `value` holds, by key: a tensor under 0, a list under its indices, a dict under its keys."""
    found = kind_of(name, value)
    if found != kind:
        raise TypeError(f"{name}: expected a {kind} like the rest, got a {found}")
    if kind == "tensor":
        return {0: value}
    items = dict(value) if kind == "state dict" else dict(enumerate(value))
    if not items:
        raise ValueError(f"{name}: expected at least one tensor, got an empty {kind}")
    for key, item in items.items():
        if not isinstance(item, Tensor):
            raise TypeError(f"{name}[{key!r}]: expected a torch.Tensor, got {type(item).__name__}")
    return items


def kind_of(name: str, value: Any) -> str:
    """What the user handed over: a tensor, a state dict or a list."""
    if isinstance(value, Tensor):
        return "tensor"
    if isinstance(value, Mapping):
        return "state dict"
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return "list"
    raise TypeError(
        f"{name}: expected a tensor, a list of tensors or a state dict, got {type(value).__name__}"
    )


def spelled(name: str, kind: str, key: Key) -> str:
    """How an error names one tensor of a list or state dict."""
    return name if kind == "tensor" else f"{name}[{key!r}]"


def match_keys(
    name: str, keys: Iterable[Key], like_name: str, like: Iterable[Key], kind: str
) -> None:
    """The same entries, or an error naming the missing and the unexpected ones."""
    have, want = list(keys), list(like)
    if have == want or (len(have) == len(want) and set(have) == set(want)):
        return
    if kind == "list":
        raise ValueError(f"{name}: expected {len(want)} tensors like {like_name}, got {len(have)}")
    missing = [k for k in want if k not in set(have)]
    extra = [k for k in have if k not in set(want)]
    raise ValueError(f"{name}: keys differ from {like_name}: missing {missing}, unexpected {extra}")


def match(name: str, t: Any, like_name: str, like: Tensor) -> None:
    """A dense floating-point tensor of like's shape on like's device, or an error saying which it is not."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(t).__name__}")
    if t.dtype not in FLOATS:
        raise TypeError(f"{name}: expected float32, float64, bfloat16 or float16, got {t.dtype}")
    if t.layout is not torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got layout {t.layout}")
    if t.shape != like.shape:
        raise ValueError(
            f"{name}: expected shape {tuple(like.shape)} (that of {like_name}), got {tuple(t.shape)}"
        )
    if t.device != like.device:
        raise ValueError(
            f"{name}: expected device {like.device} (that of {like_name}), got {t.device}"
        )


def refuse_expanded(name: str, t: Tensor) -> None:
    """t can be written element by element."""
    if not t.is_contiguous() and any(n > 1 and s == 0 for n, s in zip(t.shape, t.stride())):
        raise ValueError(
            f"{name}: expanded (several elements share one place in memory), cannot be written"
        )


def _span(t: Tensor) -> tuple[int, int]:
    """First byte and one past the last byte a tensor reaches (strides are never negative)."""
    start = t.data_ptr()
    if t.is_contiguous():
        return start, start + t.nbytes
    reach = sum((n - 1) * s for n, s in zip(t.shape, t.stride()))
    return start, start + (reach + 1) * t.element_size() if t.numel() else start


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return (
        a.data_ptr() == b.data_ptr() and a.dtype == b.dtype and a.shape == b.shape
        and a.stride() == b.stride()
    )  # fmt: skip


def refuse_overlap(
    written: Sequence[Tensor],
    read: Sequence[Tensor],
    written_name: Callable[[int], str],
    read_name: Callable[[int], str],
) -> None:
    """An error if writing one tensor would change another that is read or written.

    A tensor read at a position may be exactly the tensor written there (read[i] belongs to
    written[i % len(written)]): elementwise ops allow it. Under torch.compile there are no addresses to
    compare.
    """
    if torch.compiler.is_compiling() or disjoint(written, read):
        return
    count = len(written)
    spans = sorted([(*_span(t), i) for i, t in enumerate((*written, *read)) if t.nbytes])
    end, last = -1, -1  # of the spans so far, the one that reaches furthest
    written_end, written_last = -1, -1
    for start, stop, i in spans:
        # Only pairs with a written tensor matter; the furthest written span and the furthest of all do.
        for other_end, j in ((written_end, written_last), (end, last)):
            if start < other_end and min(i, j) < count:
                _refuse_pair(written, read, written_name, read_name, *sorted((i, j)))
        if stop > end:
            end, last = stop, i
        if i < count and stop > written_end:
            written_end, written_last = stop, i


def _refuse_pair(written, read, written_name, read_name, i, j):
    count = len(written)
    if j < count:
        raise ValueError(
            f"{written_name(i)} and {written_name(j)} overlap in memory; both are written"
        )
    k = j - count
    if k % count == i and _same_memory(written[i], read[k]):
        return
    raise ValueError(
        f"{written_name(i)} overlaps {read_name(k)} in memory; it may be exactly the same memory at the "
        "same position, or none of it"
    )
