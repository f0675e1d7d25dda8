"""The result on disk: written under another name beside its place, flushed, and put there in one step."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ._ring import OpenFile
from ._safetensors import Stored

try:
    import fcntl
except ImportError:  # no locks on this system
    fcntl = None  # type: ignore[assignment]

Layouts = dict[str, tuple[bytes, dict[str, Stored], int]]


class Target:
    """A file or folder to be. Leaving the `with` block by an error removes what was begun; a run that was
    killed leaves `.<name>.part` beside the place, which the next run removes.
    """

    def __init__(self, output: Path, overwrite: bool):
        self.output = output
        self.overwrite = overwrite
        self.single = output.suffix == ".safetensors"
        self.part = output.parent / f".{output.name}.part"
        self.files: list[OpenFile] = []
        self._lock: Any = None

    def refuse_existing(self) -> None:
        """An error if something is there that the result would replace and was not to."""
        there = self.output
        if self.single and there.is_dir():
            raise IsADirectoryError(f"output: {there} is a folder")
        if not self.single and there.exists() and not there.is_dir():
            raise NotADirectoryError(
                f"output: {there} is a file; a result that is one file ends in .safetensors"
            )
        if not there.exists():
            return
        here, place = Path.cwd(), there.resolve()
        if not self.single and (place.is_mount() or place in (here, *here.parents)):
            what = "a mount point" if place.is_mount() else "the current folder or holds it"
            raise ValueError(
                f"output: {there} is {what}, and no new folder can take its place in one step; name a folder in it"
            )
        if self.overwrite:
            return
        if self.single or any(there.iterdir()):
            raise FileExistsError(f"output: {there} exists (overwrite=True replaces it)")

    def __enter__(self) -> Target:
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self._lock_or_fail()
        old = self.part / "old"
        try:
            if old.exists() and not self.output.exists():
                os.rename(old, self.output)  # killed between the two renames of `publish`
            self.refuse_existing()  # what was just put back, or what another run made before the lock was ours
            shutil.rmtree(old, ignore_errors=True)
            shutil.rmtree(self.part / "new", ignore_errors=True)
            (self.part / "new").mkdir()
        except BaseException:
            if not old.exists():
                shutil.rmtree(self.part, ignore_errors=True)
            self._release()
            raise
        return self

    def __exit__(self, *_) -> None:
        for file in self.files:
            file.close()
        shutil.rmtree(self.part, ignore_errors=True)
        self._release()

    def _lock_or_fail(self) -> None:
        self.part.mkdir(exist_ok=True)
        if fcntl is None:
            return
        self._lock = open(self.part / "lock", "w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            self._lock = None
            raise RuntimeError(
                f"output: another process is writing {self.output} (it holds {self.part})"
            ) from None

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def create(self, layouts: Layouts) -> dict[str, tuple[OpenFile, Stored]]:
        """The files at their full size, headers written; where each tensor goes."""
        total = sum(size for _, _, size in layouts.values())
        free = shutil.disk_usage(self.part).free
        if total > free:
            raise OSError(f"output: {total} bytes to write, {free} free where {self.output} goes")
        found = {}
        for name, (header, places, size) in layouts.items():
            path = self.part / "new" / name
            path.touch()
            file = OpenFile(path, write=True)
            self.files.append(file)
            with _naming(path):
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fd, 0, size)
                else:
                    os.ftruncate(file.fd, size)
                os.pwrite(file.fd, header, 0)
            found.update({tensor: (file, place) for tensor, place in places.items()})
        return found

    def publish(
        self,
        layouts: Layouts,
        metadata: dict[str, str],
        beside: Iterable[tuple[Path, Path]],
        index_name: str,
    ) -> None:
        """Flush everything, write the index last, and give the result its name."""
        new = self.part / "new"
        for file in self.files:
            with _naming(file.path):
                os.fsync(file.fd)
            file.close()
        self.files.clear()
        if self.single:
            os.replace(new / self.output.name, self.output)
            _sync_folder(self.output.parent)
            return
        for path, relative in beside:
            (new / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, new / relative)
            _sync(new / relative)
        if len(layouts) > 1:
            weight_map = {t: name for name, (_, places, _) in layouts.items() for t in places}
            total = sum(s.nbytes for _, places, _ in layouts.values() for s in places.values())
            index = {"metadata": {**metadata, "total_size": total}, "weight_map": weight_map}
            path = new / index_name
            path.write_text(json.dumps(index, indent=1, ensure_ascii=False) + "\n")
            _sync(path)
        for folder in {path.parent for path in new.rglob("*")} | {new}:
            _sync_folder(folder)
        if self.output.exists():
            old = self.part / "old"
            os.rename(self.output, old)
        os.rename(new, self.output)
        _sync_folder(self.output.parent)


@contextlib.contextmanager
def _naming(path: Path | str) -> Iterator[None]:
    """Calls that take a descriptor do not know whose it is: errors with the path."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _sync_folder(path: Path) -> None:
    try:
        _sync(path)
    except OSError:  # a system on which folders are not flushed
        pass
