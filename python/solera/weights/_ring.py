"""Bytes between files and one arena of memory, by threads: the compiled form (`solera._io`, from
csrc/io/ring.cpp) and the same in Python.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import importlib
import mmap
import os
import sys
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import torch

PAGE = 4096
CHUNK = 4 << 20
_CACHESTAT = 451  # the system call's number, the same on all architectures; Linux 6.5


def down(value: int) -> int:
    """The page border at or before a position."""
    return value // PAGE * PAGE


def up(value: int) -> int:
    """The page border at or after a position."""
    return -(-value // PAGE) * PAGE


class Arena:
    """Memory handed out piece by piece in a circle, and used again in the order it was handed out."""

    def __init__(self, size: int):
        # Private: what is written here counts as this process's own memory, as it should in a budget.
        flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_ANONYMOUS", mmap.MAP_ANON)
        self.size = up(size)
        self.memory = mmap.mmap(-1, self.size, flags=flags)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without them
                self.memory.madvise(mmap.MADV_HUGEPAGE)
        self._pieces: deque[list] = deque()  # [begin, end, in use], oldest first

    def take(self, nbytes: int) -> int | None:
        """The begin of a piece of so many bytes, on a page; None while there is no room."""
        nbytes = up(nbytes)
        begin = 0
        if self._pieces:
            first, begin = self._pieces[0][0], self._pieces[-1][1]
            if (
                begin > first
            ):  # the free parts are the rest of the arena and what lies before `first`
                if begin + nbytes > self.size:
                    begin = 0
                    if nbytes > first:
                        return None
            elif begin + nbytes > first:
                return None
        elif nbytes > self.size:
            raise MemoryError(f"a piece of {nbytes} bytes in an arena of {self.size}")
        self._pieces.append([begin, begin + nbytes, True])
        return begin

    def give(self, begin: int) -> None:
        for piece in self._pieces:
            if piece[0] == begin and piece[2]:
                piece[2] = False
                break
        while self._pieces and not self._pieces[0][2]:
            self._pieces.popleft()

    def tensor(self, place: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        count = torch.Size(shape).numel()
        return torch.frombuffer(self.memory, dtype=dtype, count=count, offset=place).view(shape)


def _preadv(fd: int, views: list[memoryview], offset: int) -> int:
    """os.preadv, for systems without."""
    data = os.pread(fd, len(views[0]), offset)
    views[0][: len(data)] = data
    return len(data)


READ = getattr(os, "preadv", _preadv)
WRITE = getattr(os, "pwritev", lambda fd, views, offset: os.pwrite(fd, views[0], offset))


class Ring(Protocol):
    """What both forms do. Tickets of reads and of writes are numbered apart; a ticket may stand for several."""

    # fmt: off
    def read(self, ticket: int, path: str, fd: int, direct: int, drop: bool, offset: int, length: int,
             place: int, /) -> None: ...
    def write(self, ticket: int, path: str, fd: int, direct: int, offset: int, length: int,
              place: int, /) -> None: ...
    # fmt: on
    def wait_read(self, ticket: int, /) -> None: ...
    def wait_write(self, ticket: int, /) -> None: ...
    def written(self, ticket: int, /) -> bool: ...
    def close(self) -> None: ...


class PythonRing:
    """The ring on os.preadv, os.pwritev and two thread pools."""

    def __init__(self, arena: mmap.mmap, readers: int, writers: int):
        self._view = memoryview(arena)
        self._pools = (ThreadPoolExecutor(readers), ThreadPoolExecutor(writers))
        self._reading: dict[int, list[Future]] = {}
        self._writing: dict[int, list[Future]] = {}

    def read(self, ticket, path, fd, direct, drop, offset, length, place):
        jobs = self._reading.setdefault(ticket, [])
        for at, size in _chunks(offset, length):
            args = (path, fd, direct, drop, at, size, place + at - offset)
            jobs.append(self._pools[0].submit(self._read, *args))

    def write(self, ticket, path, fd, direct, offset, length, place):
        jobs = self._writing.setdefault(ticket, [])
        for at, size in _chunks(offset, length):
            args = (path, fd, direct, at, size, place + at - offset)
            jobs.append(self._pools[1].submit(self._write, *args))

    def wait_read(self, ticket):
        for job in self._reading.pop(ticket, ()):
            job.result()

    def wait_write(self, ticket):
        for job in self._writing.pop(ticket, ()):
            job.result()

    def written(self, ticket):
        return all(job.done() for job in self._writing.get(ticket, ()))

    def close(self):
        for pool in self._pools:
            pool.shutdown(cancel_futures=True)
        self._view.release()

    def _read(self, path, fd, direct, drop, offset, length, place):
        if direct >= 0:
            first = down(offset)
            try:
                want, least = up(offset + length) - first, offset + length - first
                self._all(READ, path, direct, first, want, place - (offset - first), least)
                return
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
        self._all(READ, path, fd, offset, length, place, length)
        if drop:
            forget(fd, offset, length)

    def _write(self, path, fd, direct, offset, length, place):
        first, last = up(offset), down(offset + length)
        if direct >= 0 and first < last:
            try:
                for f, a, b in ((direct, first, last), (fd, offset, first), (fd, last, offset + length)):  # fmt: skip
                    self._all(WRITE, path, f, a, b - a, place + a - offset, b - a)
                return
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
        self._all(WRITE, path, fd, offset, length, place, length)

    def _all(self, call, path, fd, offset, length, place, least):
        done = 0
        while done < length:
            try:
                got = call(fd, [self._view[place + done : place + length]], offset + done)
            except OSError as error:
                raise OSError(error.errno, error.strerror, path) from None
            done += got
            if got == 0 or (done >= least and least < length):
                break
        if done < least:
            raise OSError(errno.ENODATA, os.strerror(errno.ENODATA), path)


def _chunks(offset: int, length: int):
    end = offset + length
    while offset < end:
        size = min(end, (offset // CHUNK + 1) * CHUNK) - offset
        yield offset, size
        offset += size


def compiled() -> Any:
    """The module solera._io, or the reason why there is none."""
    if os.environ.get("SOLERA_IO", "") == "python":
        return "SOLERA_IO=python"
    try:
        return importlib.import_module("solera._io")
    except ImportError as error:
        return f"not built ({error})"


def make_ring(arena: Arena, readers: int, writers: int) -> Ring:
    """The compiled ring where it was built and is wanted, else Python's."""
    module = compiled()
    kind = PythonRing if isinstance(module, str) else module.Ring
    return kind(arena.memory, readers, writers)


class OpenFile:
    """A file opened twice: as usual, and past the page cache where the file system allows it.

    A file to be read that is in the page cache already, for more than half, is read from there.
    """

    def __init__(self, path: Path, write: bool = False):
        self.path = str(path)
        self.fd = os.open(path, os.O_RDWR if write else os.O_RDONLY)
        self.direct = -1
        self.drop = False
        size = os.fstat(self.fd).st_size
        if not write and 2 * cached(self.fd, size) > size:
            return
        self.drop = not write
        if hasattr(os, "O_DIRECT"):
            try:
                self.direct = os.open(path, (os.O_WRONLY if write else os.O_RDONLY) | os.O_DIRECT)
            except OSError:
                self.direct = -1

    def close(self) -> None:
        for fd in (self.fd, self.direct):
            if fd >= 0:
                os.close(fd)
        self.fd = self.direct = -1


def forget(fd: int, offset: int = 0, length: int = 0) -> None:
    """Tell the system that these bytes need not stay in the page cache."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, offset, length, os.POSIX_FADV_DONTNEED)


def cached(fd: int, size: int) -> int:
    """Bytes of a file that are in the page cache; 0 where the system does not say."""
    if not sys.platform.startswith("linux"):
        return 0
    span = (ctypes.c_uint64 * 2)(0, size)
    counts = (ctypes.c_uint64 * 5)()
    try:
        failed = ctypes.CDLL(None).syscall(
            ctypes.c_long(_CACHESTAT), ctypes.c_uint(fd), span, counts, ctypes.c_uint(0)
        )
    except (OSError, AttributeError):
        return 0
    return 0 if failed else counts[0] * mmap.PAGESIZE
