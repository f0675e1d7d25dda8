"""Numbers of bytes and of times, read and spelled as people write them."""

from __future__ import annotations

import re

_UNITS = {"": 1, "b": 1, "k": 1e3, "kb": 1e3, "m": 1e6, "mb": 1e6, "g": 1e9, "gb": 1e9, "tb": 1e12}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


def size_in_bytes(value: int | str) -> int:
    """Bytes from a number or from text such as "4GiB", "512 MB"."""
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    match = (
        re.fullmatch(r"\s*([0-9.]+)\s*([a-zA-Z]*)\s*", value) if isinstance(value, str) else None
    )
    if match and match[2].lower() in _UNITS:
        try:
            return int(float(match[1]) * _UNITS[match[2].lower()])
        except ValueError:
            pass
    raise ValueError(f'max_memory: expected bytes or text such as "4GiB", got {value!r}')


def spelled_size(value: float) -> str:
    """Bytes for people, in powers of 1000."""
    for unit in ("B", "KB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def spelled_times(count: int) -> str:
    """Twice, 3 times."""
    return "twice" if count == 2 else f"{count} times"
