"""What a merge will do, decided before a byte of data is read: each tensor's method, sources, tiles, memory."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from .._check import FLOATS
from . import _safetensors
from ._checkpoint import INDEX, Checkpoint, Located
from ._method import Method, Tiling
from ._ring import PAGE, up
from ._rules import Rule, chosen, unused
from ._sizes import spelled_size, spelled_times
from ._sweeps import CHUNK
from ._task_vectors import TaskVectors
from .methods import Copy, FromBase, Same

MiB = 1 << 20
# What a run holds besides the ring and a method's temporaries: stacks and heaps of threads, plan, headers.
OVERHEAD = 32 * MiB
_TILE = 8 * MiB  # of one model; more gains nothing
_LEAST_TILE = 64 << 10
_LEAST_RING = 8 * MiB
_MOST_RING = 256 * MiB


@dataclass(frozen=True, eq=False)
class Item:
    """One tensor of the result."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    method: Method  # for the sources in their order
    spelled: Method  # as it was given, for the models in theirs
    rule: str | None  # the pattern that chose it
    sources: tuple[Located, ...]
    base: Located | None
    note: str = ""
    sweeps: int = 1  # how often the inputs are read
    twin: str = ""  # the name that this one is tied to in every model, and whose random masks it therefore has

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.elements * self.dtype.itemsize

    @property
    def inputs(self) -> tuple[Located, ...]:
        return self.sources if self.base is None else (*self.sources, self.base)

    @property
    def tiling(self) -> Tiling:
        return self.method.tiling(self.shape) if self.sweeps == 1 else "elements"

    @property
    def light(self) -> bool:
        """Whether its arithmetic is next to nothing beside reading it."""
        return self.tiling == "elements" and not isinstance(self.method, TaskVectors)

    @property
    def wide(self) -> bool:
        """Whether it is computed in float64."""
        return torch.float64 in {self.dtype, *(i.dtype for i in self.inputs)}

    @property
    def row(self) -> int:
        """Elements that stay together when the tensor is cut."""
        if self.tiling == "elements":
            return 1
        return math.prod(self.shape[1:]) if self.tiling == "rows" else self.elements

    @property
    def grain(self) -> int:
        """Elements that every tile has a multiple of, but for the last: a row, or a chunk of sums or words."""
        if self.sweeps > 1:
            return CHUNK
        return self.method.grain if self.tiling == "elements" else self.row

    @property
    def widest(self) -> int:
        """The largest element that goes in or out, in bytes."""
        return max(self.dtype.itemsize, *(i.dtype.itemsize for i in self.inputs))

    def room(self, elements: int) -> int:
        """Bytes of the ring that a tile takes: whole pages around every piece."""
        pieces = [*(i.dtype.itemsize for i in self.inputs), self.dtype.itemsize]
        return sum(up(elements * size) + PAGE for size in pieces)

    def scratch(self, elements: int) -> int:
        """Bytes a method takes besides: its temporaries, copies in a common dtype, a result not yet in place."""
        if isinstance(self.method, Copy | FromBase | Same):
            return 0
        wide = 8 if self.wide else 4
        own = self.method.scratch(len(self.sources))
        if self.tiling != "elements" or self.sweeps > 1 or not self.light:
            # The result before it is in place, and inputs in a wider dtype.
            own += 1 + (len(self.inputs) if any(i.dtype != self.dtype for i in self.inputs) else 0)
        found = 0 if self.sweeps == 1 else self.method.study_bytes(len(self.sources), elements)
        return int(elements * wide * own) + found


@dataclass(frozen=True)
class Tile:
    """Elements begin .. begin + count of an item, row-major."""

    item: Item
    begin: int
    count: int
    sweep: int = 0  # of the item's: all but the last one only read

    @property
    def last(self) -> bool:
        return self.sweep == self.item.sweeps - 1

    @property
    def shape(self) -> tuple[int, ...]:
        if self.count == self.item.elements:
            return self.item.shape
        if self.item.tiling == "elements":
            return (self.count,)
        return (self.count // self.item.row, *self.item.shape[1:])


@dataclass(eq=False)
class Plan:
    """What `merge_files` does, or did. `print(plan)` shows it."""

    output: Path
    inputs: list[Path]
    base: Path | None
    items: list[Item]
    files: dict[str, list[str]]  # names of tensors by file of the result
    metadata: dict[str, str]
    budget: int
    ring: int = 0
    memory: int = 0  # the most the run is to hold above what the process held
    notes: list[str] = field(default_factory=list)
    compiled: bool = False
    exact: bool = True  # whether sums over a tensor may be taken tile by tile (_sweeps.exact)

    @property
    def bytes_read(self) -> int:
        return sum(item.sweeps * source.nbytes for item in self.items for source in item.inputs)

    @property
    def bytes_written(self) -> int:
        return sum(item.nbytes for item in self.items)

    def tiles_of(self, item: Item, offset: int = 0) -> Iterator[Tile]:
        """The item in tiles that fit the ring, cut on pages of the file it goes to (from `offset` on).

        Of an item that is read several times first those that are only read, cut on chunks.
        """
        if item.elements == 0:
            return
        most = self._tile(item)
        for sweep in range(item.sweeps - 1):
            for begin in range(0, item.elements, most):
                yield Tile(item, begin, min(most, item.elements - begin), sweep)
        begin = 0
        while begin < item.elements:
            end = min(begin + most, item.elements)
            if item.row == 1 and item.method.grain == 1 and end < item.elements:
                spare = (offset + end * item.dtype.itemsize) % PAGE // item.dtype.itemsize
                end -= spare if end - spare > begin else 0
            yield Tile(item, begin, end - begin, item.sweeps - 1)
            begin = end

    def _tile(self, item: Item) -> int:
        """Elements of a tile: a quarter of the ring, so that reading, arithmetic and writing overlap."""
        row = item.grain
        if row >= item.elements:
            return item.elements
        element = sum(i.dtype.itemsize for i in item.inputs) + item.dtype.itemsize
        widest = item.widest
        most = min(self.ring // 4 // element, _TILE // widest)
        return max(row, most // row * row, min(item.elements, _LEAST_TILE // widest // row * row))

    def settle_memory(self) -> None:
        """The ring and the tiles within the budget, or an error naming the tensor that needs more.

        Tensors that do not fit in one piece are read several times, the largest first, where their method allows it.
        """
        floor = {item.name: _floor(item) for item in self.items}  # what each item takes at least
        places = {item.name: i for i, item in enumerate(self.items)}
        pieces = [item for item in self.items if self._may_sweep(item)]
        pieces.sort(key=lambda item: sum(floor[item.name]))
        while True:
            room = max((r for r, _ in floor.values()), default=0)
            scratch = max((s for _, s in floor.values()), default=0)
            needed = OVERHEAD + max(up(room), _LEAST_RING) + scratch
            if needed <= self.budget:
                break
            if not pieces:
                raise ValueError(self._too_large(floor, needed))
            item = pieces.pop()
            sweeps = item.method.sweeps(item.wide)
            item = replace(item, sweeps=sweeps, note=f"read {spelled_times(sweeps)}")
            self.items[places[item.name]] = item
            floor[item.name] = _floor(item)
        # Room for two of the largest, if there is any: one is read while the other is merged.
        self.ring = up(min(max(2 * room, _MOST_RING), self.budget - OVERHEAD - scratch))
        total = sum(item.room(item.elements) for item in self.items)
        self.ring = max(min(self.ring, up(total + _LEAST_RING)), up(room))
        # Tiles are larger than the least ones, and so may be their temporaries.
        scratch = max((item.scratch(self._tile(item)) for item in self.items), default=0)
        while OVERHEAD + self.ring + scratch > self.budget and self.ring > max(room, _LEAST_RING):
            self.ring = max(up(room), _LEAST_RING, up(self.ring // 2))
            scratch = max((item.scratch(self._tile(item)) for item in self.items), default=0)
        self.memory = OVERHEAD + self.ring + scratch

    def _may_sweep(self, item: Item) -> bool:
        return (
            (self.exact or not item.method.ordered)
            and item.method.sweeps(item.wide) > 1
            and item.tiling == "whole"
            and item.elements > CHUNK
        )

    def _too_large(self, floor: Mapping[str, tuple[int, int]], needed: int) -> str:
        largest = max(self.items, key=lambda item: sum(floor[item.name]))
        whole = "" if largest.row < largest.elements or largest.elements <= 1 else " in one piece"
        ways = "give a larger one, or the tensor a rule with an elementwise method"
        if whole and largest.method.sweeps(largest.wide) > 1 and not self._may_sweep(largest):
            ways += '; in several sweeps over tiles only with the compiled kernels and device="cpu"'
        elif whole and getattr(largest.method, "dim", None) is not None:
            ways += "; with dim=None it is read twice, tile by tile, instead"
        return (
            f"max_memory: {largest.name!r} {largest.shape} with {largest.spelled!r} is merged{whole}; this "
            f"needs {spelled_size(needed)}, the budget is {spelled_size(self.budget)} ({ways})"
        )

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def lines(self, most: int = 40) -> list[str]:
        groups = Counter((item.spelled, item.rule) for item in self.items)
        out = [
            f"output   {self.output}"
            + (f" ({len(self.files)} files)" if len(self.files) > 1 else "")
        ]
        out += [f"input    {path}" for path in self.inputs]
        out += [f"base     {self.base}"] if self.base is not None else []
        for (method, rule), count in groups.items():
            by = f"by rule {rule!r}" if rule is not None else "by default"
            if isinstance(method, Same):
                by = "integers and such, equal in all models"
            out.append(f"method   {method!r}: {count} tensors, {by}")
        tiles = sum(1 for item in self.items for _ in self.tiles_of(item))
        out.append(
            f"data     {len(self.items)} tensors, {tiles} tiles; {spelled_size(self.bytes_read)} to read, "
            f"{spelled_size(self.bytes_written)} to write"
        )
        out.append(
            f"memory   {spelled_size(self.memory)} at most (ring {spelled_size(self.ring)}) of a budget of "
            f"{spelled_size(self.budget)}"
        )
        for sweeps in sorted({item.sweeps for item in self.items} - {1}):
            names = [item.name for item in self.items if item.sweeps == sweeps]
            out.append(
                _listed(f"sweeps   {sweeps}, the last for the result, over", names)
                + ": more than fits in one piece"
            )
        out.append(f"files    {'threads in C++' if self.compiled else 'threads in Python'}")
        out += [f"note     {text}" for text in self.notes]
        return out

    def table(self) -> list[tuple[str, str, str, str, str]]:
        """(name, shape, dtype, method, note) of every tensor."""
        return [
            (
                i.name,
                "x".join(map(str, i.shape)) or "scalar",
                str(i.dtype)[6:],
                repr(i.spelled),
                i.note,
            )
            for i in self.items
        ]


def _floor(item: Item) -> tuple[int, int]:
    """(bytes of the ring, bytes beside it) of an item's smallest tile."""
    grain = max(item.grain, 1)
    least = min(item.elements, max(1, _LEAST_TILE // item.widest // grain) * grain)
    return item.room(least), item.scratch(least)


# ---- which tensors, from where -----------------------------------------------------------------------


def _listed(what: str, names: Sequence[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{what} {', '.join(map(repr, names[:most]))}{more}"


def disagreements(
    models: Sequence[Checkpoint], labels: Sequence[str], like: Checkpoint, like_label: str
) -> list[str]:
    """In words: what each model lacks, has beside, and has in another shape than `like`."""
    found = []
    for label, model in zip(labels, models):
        if model is like:
            continue
        parts = []
        missing = [n for n in like.tensors if model.find(n) is None]
        extra = [n for n in model.tensors if like.find(n) is None]
        if missing:
            hints = [f"{n!r} is tied to {like.tied[n]!r} there" for n in missing if n in like.tied]
            parts.append(_listed("lacks", missing) + (f" ({'; '.join(hints)})" if hints else ""))
        if extra:
            hints = [f"{n!r} is tied to {model.tied[n]!r} here" for n in extra if n in model.tied]
            parts.append(
                _listed("has besides", extra) + (f" ({'; '.join(hints)})" if hints else "")
            )
        for name, item in like.tensors.items():
            other = model.find(name)
            if other is not None and other.shape != item.shape:
                parts.append(f"has {name!r} of shape {other.shape}, not {item.shape}")
        if parts:
            found.append(f"{label} beside {like_label}: " + "; ".join(parts))
    return found


def are_one(a: Item, b: Item) -> bool:
    """Whether two names get one tensor: tied in every model they are made of, and merged by one method."""
    pairs = zip(a.inputs, b.inputs)
    same = len(a.inputs) == len(b.inputs) and all(x.is_same(y) for x, y in pairs)
    return same and a.spelled == b.spelled and (a.dtype, a.shape) == (b.dtype, b.shape)


def make_items(
    models: Sequence[Checkpoint],
    labels: Sequence[str],
    base: Checkpoint | None,
    method: Method,
    rules: Sequence[Rule],
    strict: bool,
    out_dtype: torch.dtype | None,
) -> tuple[list[Item], list[str]]:
    """(items in the order of the reference's files, notes). The reference is the base, or the first model."""
    like = models[0] if base is None else base
    like_label = labels[0] if base is None else "base"
    notes = disagreements(models, labels, like, like_label)
    if notes and strict:
        raise ValueError(
            "inputs: the models hold different tensors: " + " | ".join(notes)
            + f". With strict=False these are copied from {like_label}, and what it lacks is left out"
        )  # fmt: skip
    parted = _untied(models, like)
    items = [
        _item(name, models, labels, base, like, like_label, method, rules, strict, out_dtype)
        for name in (*like.tensors, *parted)
    ]
    by_name = {item.name: item for item in items}
    for place, item in enumerate(items):
        kept = by_name.get(like.tied.get(item.name, ""))
        if kept is not None and are_one(item, kept):
            items[place] = replace(item, twin=kept.name)
    notes += [
        f"rule {p!r} matches the whole name of no tensor" for p in unused(like.tensors, rules)
    ]
    copied = [item.name for item in items if item.note.startswith("copied")]
    if copied:
        notes.append(_listed(f"copied from {like_label}:", copied))
    tied = {gone: kept for gone, kept in like.tied.items() if gone in like.tensors}
    notes += [
        f"{gone!r} is tied to {kept!r} in {like_label}; both are written"
        for gone, kept in tied.items()
    ]
    notes += [
        f"{gone!r} is tied to {like.tied[gone]!r} in {like_label}, but not in all models; both are written"
        for gone in parted
    ]
    return items, notes


def _untied(models: Sequence[Checkpoint], like: Checkpoint) -> list[str]:
    """Names that the reference leaves out as tied, and that another model has as a tensor of its own."""
    return [
        gone
        for gone, kept in like.tied.items()
        if gone not in like.tensors
        and kept in like.tensors
        and any(gone in model.tensors and model.tied.get(gone) != kept for model in models)
    ]


def _item(name, models, labels, base, like, like_label, method, rules, strict, out_dtype) -> Item:
    own = like.find(name)
    assert own is not None
    found = [model.find(name) for model in models]
    special, rule = chosen(name, method, rules)
    fits = all(t is not None and t.shape == own.shape for t in found)
    averaged = [t for t in (*found, own) if t is not None]
    if not all(t.dtype in FLOATS for t in averaged) and not isinstance(special, Copy | FromBase):
        special, rule = Same(), None
        kinds = sorted({str(t.dtype) for t in found if t is not None})
        if fits and len(kinds) > 1:
            if strict:
                raise ValueError(
                    f"inputs: {name!r} is of {' and '.join(kinds)}: such tensors are not averaged and must be "
                    "of one dtype (or get a rule: Copy(0) or FromBase())"
                )
            fits = False
        if not strict:
            fits = False  # whether they are equal is not known yet, and no reason to stop
    if not fits:
        dtype = out_dtype if out_dtype is not None and own.dtype in FLOATS else own.dtype
        note = f"copied from {like_label}"
        return Item(name, dtype, own.shape, Copy(), Copy(), None, (own,), None, note)
    try:
        special.check(len(models), base is not None)
        special.check_shape(name, own.shape)
    except ValueError as error:
        where = f" (for {name!r}, by rule {rule!r})" if rule is not None else ""
        raise ValueError(f"{error}{where}") from None
    used = list(special.models(len(models)))
    method = special
    if special.symmetric and all(model.on_disk for model in models):
        # By name, so that the sums do not depend on the order in which the files were listed.
        used.sort(key=lambda k: (str(models[k].path), k))
        if used != sorted(used):
            method = special.permuted(used)
    sources = tuple(found[k] for k in used)
    with_base = own if special.reads_base(len(models)) else None
    dtype = sources[0].dtype if sources else own.dtype
    for t in sources if with_base is None else (*sources, with_base):
        dtype = torch.promote_types(dtype, t.dtype) if t.dtype in FLOATS else t.dtype
    if out_dtype is not None and dtype in FLOATS:
        dtype = out_dtype
    return Item(name, dtype, own.shape, method, special, rule, sources, with_base)


def make_files(
    items: Sequence[Item], like: Checkpoint, single: str | None
) -> tuple[dict[str, list[str]], str]:
    """(names of tensors by file of the result, name of the index): one file, or the reference's own. A pickled
    file becomes a safetensors file.
    """
    usual = "model.safetensors"
    if single is not None:
        return {single: [item.name for item in items]}, usual + INDEX
    files: dict[str, list[str]] = {}
    for item in items:
        place = like.files.get(item.name) or like.files[like.tied[item.name]]
        files.setdefault(_renamed(place), []).append(item.name)
    if len(files) == 1 and (like.index is not None or like.folder is None):
        files = {usual: next(iter(files.values()))}
    return dict(sorted(files.items())), _renamed(like.index or usual + INDEX)


def _renamed(name: str) -> str:
    """pytorch_model-00001-of-00002.bin -> model-00001-of-00002.safetensors; safetensors names stay."""
    index = INDEX if name.endswith(INDEX) else ""
    stem = Path(name.removesuffix(index))
    if stem.suffix == ".safetensors":
        return name
    return re.sub(r"^pytorch_model", "model", stem.stem) + ".safetensors" + index


def file_layouts(plan: Plan) -> dict[str, tuple[bytes, dict[str, _safetensors.Stored], int]]:
    """Header, places and size of each file of the result."""
    by_name: Mapping[str, Item] = {item.name: item for item in plan.items}
    return {
        file: _safetensors.layout(
            [(n, by_name[n].dtype, by_name[n].shape) for n in names], plan.metadata
        )
        for file, names in plan.files.items()
    }
