"""Runs a plan: reads, arithmetic and writes of different tiles at the same time, within one ring of memory."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ._checkpoint import Located
from ._method import Study
from ._plan import Plan, Tile
from ._ring import PAGE, Arena, OpenFile, down, make_ring, up
from ._safetensors import Stored

WRITERS = 2


@dataclass
class _Piece:
    """Part of an input or of the output: where it lies in the ring."""

    dtype: torch.dtype
    place: int
    room: int


@dataclass
class _Running:
    tile: Tile
    ticket: int
    begin: int  # in the arena
    inputs: list[_Piece]
    out: _Piece
    loads: list[tuple[Located, _Piece]] = field(default_factory=list)  # of memory-mapped tensors


class Stream:
    """`run` merges all tiles of a plan into files that exist and have their size."""

    def __init__(self, plan: Plan, targets: dict[str, tuple[OpenFile, Stored]], seed: int,
                 readers: int, device: torch.device):  # fmt: skip
        self.plan, self.targets, self.seed, self.device = plan, targets, seed, device
        self.arena = Arena(plan.ring)
        self.ring = make_ring(self.arena, readers, WRITERS)
        self.sources: dict[Path, OpenFile] = {}
        self.tickets = itertools.count()
        self.threads = torch.get_num_threads()
        self.study: Study | None = None  # of the item that is read several times

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_) -> None:
        torch.set_num_threads(self.threads)
        self.ring.close()
        for file in self.sources.values():
            file.close()

    def run(self, done: Callable[[int], None]) -> None:
        """`done` is told the bytes (read and written) of each tile once it is with the system."""
        reading: deque[_Running] = deque()
        writing: deque[_Running] = deque()
        waiting: Tile | None = None
        tiles = self._tiles()
        while True:
            while True:
                waiting = waiting or next(tiles, None)
                started = self._start(waiting) if waiting is not None else None
                if started is None:
                    break
                reading.append(started)
                waiting = None
            if reading:
                running = reading.popleft()
                self._merge(running)
                writing.append(running)
            elif writing:
                self._finish(writing.popleft(), done)
            else:
                break
            while writing and self._written(writing[0]):
                self._finish(writing.popleft(), done)

    def _tiles(self) -> Iterator[Tile]:
        by_name = {item.name: item for item in self.plan.items}
        for names in self.plan.files.values():
            places = [(self.targets[name][1].offset, name) for name in names]
            for offset, name in sorted(places):
                yield from self.plan.tiles_of(by_name[name], offset)

    def _start(self, tile: Tile) -> _Running | None:
        """Submit a tile's reads; None if the ring is full."""
        begin = self.arena.take(tile.item.room(tile.count))
        if begin is None:
            return None
        place, ticket = begin, next(self.tickets)
        inputs: list[_Piece] = []
        loads = []
        for source in tile.item.inputs:
            size = source.dtype.itemsize
            offset, length = source.offset + tile.begin * size, tile.count * size
            if source.tensor is not None:
                piece = _Piece(source.dtype, place, up(length))
                loads.append((source, piece))
            else:
                file = self._source(source.path)
                # A file whose tensors are not aligned to their elements is read to where they are.
                aligned = offset % size == 0
                within = offset % PAGE if aligned else 0
                direct = file.direct if aligned else -1
                room = up(offset + length) - down(offset) if aligned else up(length)
                piece = _Piece(source.dtype, place + within, room)
                self.ring.read(
                    ticket, file.path, file.fd, direct, file.drop, offset, length, piece.place
                )
            inputs.append(piece)
            place += piece.room
        offset = self.targets[tile.item.name][1].offset + tile.begin * tile.item.dtype.itemsize
        out = _Piece(tile.item.dtype, place + offset % PAGE, 0)
        return _Running(tile, ticket, begin, inputs, out, loads)

    def _source(self, path: Path) -> OpenFile:
        if path not in self.sources:
            self.sources[path] = OpenFile(path)
        return self.sources[path]

    def _merge(self, running: _Running) -> None:
        """Wait for a tile's inputs, merge, submit the write."""
        tile, item = running.tile, running.tile.item
        for source, piece in running.loads:
            _load(source, tile, self.arena.tensor(piece.place, (tile.count,), piece.dtype))
        self.ring.wait_read(running.ticket)
        out = self.arena.tensor(running.out.place, tile.shape, item.dtype)
        inputs = [self.arena.tensor(p.place, tile.shape, p.dtype) for p in running.inputs]
        if self.device.type != "cpu":
            inputs = [t.to(self.device) for t in inputs]
        # A tile of a linear merge takes one core a tenth of the time that reading it takes: several would only wait
        # for each other, and for cores that readers and writers use.
        threads = 1 if item.light else self.threads
        if threads != torch.get_num_threads():
            torch.set_num_threads(threads)
        split = len(item.sources)
        models, base = inputs[:split], inputs[split] if item.base is not None else None
        if not tile.last:
            self._learn(tile, models, base)
            return
        result = item.method.merge_tile(
            item.twin or item.name,
            models,
            base,
            self.study if item.sweeps > 1 else None,
            begin=tile.begin,
            seed=self.seed,
            out_dtype=item.dtype,
            out=out if self.device.type == "cpu" else None,
        )
        if result is not out:
            out.copy_(result)
        file, stored = self.targets[item.name]
        size = item.dtype.itemsize
        self.ring.write(
            running.ticket, file.path, file.fd, file.direct, stored.offset + tile.begin * size,
            tile.count * size, running.out.place,
        )  # fmt: skip

    def _learn(self, tile: Tile, models: list[Tensor], base: Tensor | None) -> None:
        item = tile.item
        if tile.sweep == 0 and tile.begin == 0:
            self.study = item.method.study(
                item.twin or item.name, item.shape, len(item.sources), item.wide, self.seed
            )
        assert self.study is not None
        self.study.add(models, base, tile.begin, item.dtype)
        if tile.begin + tile.count == item.elements:
            self.study.turn()

    def _written(self, running: _Running) -> bool:
        return not running.tile.last or self.ring.written(running.ticket)

    def _finish(self, running: _Running, done: Callable[[int], None]) -> None:
        tile = running.tile
        if tile.last:
            self.ring.wait_write(running.ticket)
        self.arena.give(running.begin)
        read = sum(source.dtype.itemsize for source in tile.item.inputs)
        done(tile.count * (read + tile.item.dtype.itemsize if tile.last else read))


def _load(source: Located, tile: Tile, into: Tensor) -> None:
    """Elements of a memory-mapped tensor, whatever its strides; no more than a row around them is copied."""
    t = source.tensor
    assert t is not None
    begin, end = tile.begin, tile.begin + tile.count
    if t.is_contiguous():
        into.copy_(t.view(-1)[begin:end])
        return
    row = t[0].numel()
    first = begin // row
    rows = t[first : -(-end // row)].reshape(-1)
    into.copy_(rows[begin - first * row : end - first * row])
