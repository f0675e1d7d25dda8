"""A model on disk, opened without reading it: its tensors by name, and where each lies."""

from __future__ import annotations

import ctypes
import json
import os
import pickle
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from . import _safetensors
from ._lists import local

PICKLED = (".bin", ".pt", ".pth", ".ckpt")
# Weights in other formats: no part of the result, since they would be of another model.
_OTHER_WEIGHTS = (".safetensors", *PICKLED, ".h5", ".msgpack", ".onnx", ".gguf", ".tflite", ".ot")
INDEX = ".index.json"
Path_ = str | os.PathLike


def memory_of(t: Tensor) -> tuple:
    """What two tensors have in common if they are one. A DTensor's memory is that of its shard."""
    return local(t).data_ptr() or id(t), t.dtype, t.shape, t.stride()


@dataclass(frozen=True, eq=False)
class Located:
    """One tensor of a checkpoint: bytes of a file, or (from a pickled file) a memory-mapped tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int
    tensor: Tensor | None = None

    def is_same(self, other: Located) -> bool:
        """Whether both are one tensor, and not two of equal values."""
        if self is other:
            return True
        one, two = self.tensor, other.tensor
        return one is not None and two is not None and memory_of(one) == memory_of(two)

    def read(self) -> Tensor:
        """All of it, in memory."""
        if self.tensor is not None:
            return self.tensor
        out = torch.empty(self.shape, dtype=self.dtype)
        if self.nbytes:
            with open(self.path, "rb") as file:
                file.seek(self.offset)
                into = (ctypes.c_char * self.nbytes).from_address(out.data_ptr())
                if file.readinto(into) != self.nbytes:
                    raise OSError(f"{self.path}: ended early")
        return out


@dataclass(eq=False)
class Checkpoint:
    """`tensors` in the order of the files; `files` says which file each belongs to, by name."""

    path: Path
    tensors: dict[str, Located] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    # Tensors left out because they are another one by another name: left out -> kept.
    tied: dict[str, str] = field(default_factory=dict)
    # What the files say of themselves beside their tensors and ties; not what an earlier merge wrote, nor hashes,
    # which are of their data.
    metadata: dict[str, str] = field(default_factory=dict)
    on_disk: bool = True
    index: str | None = None  # the file that says which tensor is in which file

    @property
    def folder(self) -> Path | None:
        return self.path if self.path.is_dir() else None

    def find(self, name: str) -> Located | None:
        """The tensor, also by a name under which it was left out."""
        found = self.tensors.get(name)
        return found if found is not None else self.tensors.get(self.tied.get(name, ""))

    def beside(self) -> Iterator[tuple[Path, Path]]:
        """(file, path relative to the folder) of what is no weights: configuration, tokenizer."""
        if self.folder is None:
            return
        for path in sorted(self.folder.rglob("*")):
            relative = path.relative_to(self.folder)
            hidden = any(
                part.startswith(".") and part != ".gitattributes" for part in relative.parts
            )
            weights = path.suffix in _OTHER_WEIGHTS or path.name.endswith(INDEX)
            if path.is_file() and not hidden and not weights:
                yield path, relative


def open_checkpoint(path: Path_, argument: str = "inputs") -> Checkpoint:
    """A .safetensors file, a .bin or .pt file, or a folder that holds one such file or an index of several."""
    where = Path(path)
    if where.is_dir():
        return _open_folder(where, argument)
    if not where.exists():
        raise FileNotFoundError(f"{argument}: no such file or folder: {where}")
    checkpoint = Checkpoint(where)
    _add_file(checkpoint, where, None, argument)
    return checkpoint


def _open_folder(folder: Path, argument: str) -> Checkpoint:
    checkpoint = Checkpoint(folder)
    for suffixes in ((".safetensors",), PICKLED):
        index = sorted(p for s in suffixes for p in folder.glob(f"*{s}{INDEX}"))
        if len(index) > 1:
            raise ValueError(f"{argument}: {folder} holds several indices: {_names(index)}")
        if index:
            _add_index(checkpoint, index[0], argument)
            return checkpoint
        single = sorted(p for s in suffixes for p in folder.glob(f"*{s}"))
        usual = [p for p in single if p.stem in ("model", "pytorch_model")]
        if len(usual or single) > 1:
            raise ValueError(
                f"{argument}: {folder} holds {_names(usual or single)} and no *{suffixes[0]}{INDEX} that says "
                "what they are; name one of the files"
            )
        if single:
            _add_file(checkpoint, (usual or single)[0], None, argument)
            return checkpoint
    raise FileNotFoundError(
        f"{argument}: {folder} holds no .safetensors, {', '.join(PICKLED)} file and no index of such"
    )


def _names(paths: list[Path]) -> str:
    return ", ".join(p.name for p in paths)


def _add_index(checkpoint: Checkpoint, index: Path, argument: str) -> None:
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        wanted: dict[str, list[str]] = {}
        for name, file in weight_map.items():
            wanted.setdefault(Path(file).name if file else file, []).append(name)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: expected JSON with a weight_map ({error!r})") from None
    for file in sorted(wanted):
        path = index.parent / file
        if not path.is_file():
            raise FileNotFoundError(f"{argument}: {index} names {file}, which is not there")
        _add_file(checkpoint, path, set(wanted[file]), argument)
        missing = [n for n in wanted[file] if n not in checkpoint.tensors]
        if missing:
            raise ValueError(f"{path}: lacks {_some(missing)}, which {index.name} says it holds")
    checkpoint.index = index.name


def _some(names: list[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(repr, names[:most])) + more


def _add_file(checkpoint: Checkpoint, path: Path, wanted: set[str] | None, argument: str) -> None:
    if path.suffix in PICKLED:
        found = _pickled(path)
        seen: dict[tuple, str] = {}
        for name, item in found.items():
            if item.tensor is not None and item.nbytes:
                same = memory_of(item.tensor)
                if seen.setdefault(same, name) != name:
                    checkpoint.tied[name] = seen[same]
    elif path.suffix == ".safetensors":
        stored, metadata = _safetensors.read_header(path)
        found = {n: Located(s.dtype, s.shape, path, s.offset, s.nbytes) for n, s in stored.items()}
        for key, text in metadata.items():
            if text in stored and key not in stored:
                checkpoint.tied[key] = text
            elif not key.startswith("solera.") and "hash" not in key.lower():
                checkpoint.metadata.setdefault(key, text)
    else:
        raise ValueError(
            f"{argument}: expected a .safetensors file, one of {', '.join(PICKLED)}, or a folder, got {path}"
        )
    for name, item in found.items():
        if wanted is None or name in wanted:
            checkpoint.tensors[name] = item
            checkpoint.files[name] = path.name


_CONVERT = (
    "convert it where you trust it: `torch.save(torch.load(path, weights_only=False), new)` "
    "of a plain state dict, or safetensors.torch.save_file"
)


def _pickled(path: Path) -> dict[str, Located]:
    """A state dict written by torch.save, mapped rather than read, and nothing but tensors unpickled."""
    if not zipfile.is_zipfile(path):
        raise ValueError(
            f"{path}: expected a file of torch.save's zip format (torch 1.6 and later), which can be read in "
            f"parts; this is an older format or no such file; {_CONVERT}"
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        text = str(error).strip()
        # The line that says what is in it: the others are advice to trust the file.
        told = re.search(r"(?im)^\s*(?:WeightsUnpickler error: )?(.*unsupported.*)$", text)
        text = told[1].split(". ")[0].rstrip(".") if told else text.split("\n")[0]
        raise ValueError(f"{path}: not read with weights_only=True ({text}); {_CONVERT}") from None
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not state:
        raise ValueError(f"{path}: expected a state dict, got {type(state).__name__}; {_CONVERT}")
    for name, t in state.items():
        if not isinstance(name, str) or not isinstance(t, Tensor) or t.layout is not torch.strided:
            what = f"a {t.layout} tensor" if isinstance(t, Tensor) else type(t).__name__
            raise ValueError(
                f"{path}: expected names and dense tensors, got {name!r}: {what}; {_CONVERT}"
            )
    return {
        name: Located(t.dtype, tuple(t.shape), path, 0, t.numel() * t.element_size(), t.detach())
        for name, t in state.items()
    }
