"""The header of a safetensors file, read and written: where each tensor lies, before any of it is touched.

A file is eight bytes with the length N of the header (little-endian), N bytes of JSON, then the data.
The JSON maps each name to {"dtype", "shape", "data_offsets": [begin, end]}, offsets counted from the end of
the header; "__metadata__" maps strings to strings. The data has neither holes nor overlaps.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

PAGE = 4096
_LONGEST_HEADER = 100_000_000  # bytes; what the safetensors library accepts too
METADATA = "__metadata__"

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "BOOL": torch.bool, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies: dtype, shape, first byte in the file, bytes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def _fail(path: Any, what: str) -> ValueError:
    return ValueError(f"{path}: not a valid safetensors file: {what}")


def _without_repeats(path: Any):
    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) != len(items):
            names = [name for name, _ in items]
            twice = next(name for name in names if names.count(name) > 1)
            raise _fail(path, f"{twice!r} occurs twice in the header")
        return found

    return pairs


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _entry(path: Any, name: str, item: Any, start: int, size: int) -> Stored:
    if not isinstance(item, dict) or not {"dtype", "shape", "data_offsets"} <= item.keys():
        raise _fail(path, f"{name!r} lacks one of dtype, shape, data_offsets")
    dtype, shape, offsets = item["dtype"], item["shape"], item["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _fail(
            path, f"{name!r} has dtype {dtype!r}, expected one of {', '.join(sorted(DTYPES))}"
        )
    if not isinstance(shape, list) or not all(map(_is_count, shape)):
        raise _fail(path, f"{name!r} has shape {shape!r}, expected a list of sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise _fail(path, f"{name!r} has data_offsets {offsets!r}, expected [begin, end]")
    begin, end = offsets
    nbytes = math.prod(shape) * DTYPES[dtype].itemsize
    if end - begin != nbytes:
        raise _fail(
            path,
            f"{name!r} takes bytes {begin} to {end}, but {dtype} of shape {tuple(shape)} takes {nbytes}",
        )
    if start + end > size:
        raise _fail(
            path,
            f"{name!r} ends at byte {start + end}, the file at {size} (cut off in a download?)",
        )
    return Stored(DTYPES[dtype], tuple(shape), start + begin, nbytes)


def read_header(path: str | os.PathLike) -> tuple[dict[str, Stored], dict[str, str]]:
    """(tensors by name in the order of their data, metadata), everything checked against the file's size."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        head = file.read(8)
        if len(head) < 8:
            raise _fail(path, f"it has {size} bytes, the length of the header alone takes 8")
        length = int.from_bytes(head, "little")
        if length > min(_LONGEST_HEADER, size - 8):
            raise _fail(path, f"a header of {length} bytes in a file of {size}")
        text = file.read(length)
    try:
        header = json.loads(text.decode(), object_pairs_hook=_without_repeats(path))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise _fail(path, f"the header is not JSON ({error})") from None
    if not isinstance(header, dict):
        raise _fail(path, "the header is not a JSON object")
    metadata = header.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _fail(path, f"{METADATA} is not a map of strings to strings")
    found = {name: _entry(path, name, item, 8 + length, size) for name, item in header.items()}
    found = dict(sorted(found.items(), key=lambda item: (item[1].offset, item[1].nbytes)))
    end = 8 + length
    for name, item in found.items():
        if item.offset != end:
            kind = "overlaps what comes before it" if item.offset < end else "follows a hole"
            raise _fail(path, f"the data of {name!r} {kind}")
        end += item.nbytes
    if end != size:
        raise _fail(path, f"{size - end} bytes follow the last tensor")
    return found, metadata


def layout(
    tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, Stored], int]:
    """(header with its length, where each tensor goes, size of the file).

    The data is ordered by falling element size, so that every tensor is aligned to its elements, and begins
    on a page.
    """
    ordered = sorted(tensors, key=lambda item: -item[1].itemsize)
    header: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
    places: dict[str, tuple[torch.dtype, tuple[int, ...], int, int]] = {}
    end = 0
    for name, dtype, shape in ordered:
        nbytes = math.prod(shape) * dtype.itemsize
        places[name] = (dtype, shape, end, nbytes)
        offsets = [end, end + nbytes]
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": offsets}
        end += nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % PAGE)
    start = 8 + len(text)
    found = {name: Stored(d, s, start + begin, n) for name, (d, s, begin, n) in places.items()}
    return len(text).to_bytes(8, "little") + text, found, start + end


def write_file(
    path: str | os.PathLike, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> None:
    """A state dict as a safetensors file, from memory."""
    described = [(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()]
    header, places, size = layout(described, metadata)
    with open(path, "wb") as file:
        file.write(header)
        for name in places:
            flat = tensors[name].detach().cpu().contiguous()
            if flat.nbytes:
                file.write((ctypes.c_char * flat.nbytes).from_address(flat.data_ptr()))
