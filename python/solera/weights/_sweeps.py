"""Tensors merged in several sweeps over their tiles: all but the last one find out what the last one needs.

Dots have the bits that core `gram` gives for all of the tensor at once: it takes them chunk by chunk and adds the
chunks' doubles in order, and so does this, however the chunks are spread over tiles. So do the sums of magnitudes
of core `consensus`. Ranks are counts of integers: in whatever order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _route
from .._registry import compiled_library
from ._method import Study, widened
from .abs_quantile import DigitSearch
from .gram import gram

CHUNK = 16384  # elements, kListChunk of csrc/cpu/weights/tensor_lists.h


def exact(device: torch.device) -> bool:
    """Whether the arithmetic is that of the kernels whose order of additions is known here."""
    own = compiled_library is not None and _route.AT_IMPORT != "triton"
    return own and device.type == "cpu" and not _route.use_reference()


class Ranks(Study):
    """Of each |w_k - b| the ranks[k]-th largest values, in two sweeps (four in float64)."""

    def __init__(self, ranks: Sequence[Sequence[int]], wide: bool) -> None:
        self.search = DigitSearch(ranks, wide)

    def add(self, tensors, base, begin, dtype):
        self.search.add(*widened(tensors, base, dtype))

    def turn(self):
        self.search.turn()

    def thresholds(self, place: int) -> Tensor:
        """(K, 1) float64."""
        return self.search.found[:, place : place + 1]


class Magnitudes(Study):
    """(2, K, 1): sum |w_k - b| over all elements, and over those that are drawn."""

    def __init__(self, key: int, keep: Sequence[int], seed: Tensor) -> None:
        self.key, self.keep, self.seed = key, list(keep), seed
        self.total = torch.zeros(2, len(keep), 1, dtype=torch.float64)

    def add(self, tensors, base, begin, dtype):
        tensors, base = widened(tensors, base, dtype)
        flat = [t.reshape(-1).split(CHUNK) for t in tensors]
        around = list(base.reshape(-1).split(CHUNK))
        begins = [begin + CHUNK * i for i in range(len(around))]
        pieces = [piece for model in flat for piece in model]
        keys = [self.key] * len(around)
        found = torch.ops.solera.consensus_norms(pieces, around, self.seed, keys, self.keep, begins)
        for i in range(len(around)):
            self.total += found[:, :, i : i + 1]


class Dots(Study):
    """(1, K, K) dots of the vectors that a geometric method combines."""

    def __init__(self, method) -> None:
        self.method = method
        self.total: Tensor | None = None

    def add(self, tensors, base, begin, dtype):
        self.total = add_dots(self.total, *self.method.vectors(tensors, base, dtype))


def add_dots(total: Tensor | None, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
    """total (1, K, K) and the dots of further elements, which begin on a chunk; None begins at zero."""
    count = len(tensors)
    if total is None:
        total = torch.zeros(1, count, count, dtype=torch.float64)
    flat = [t.reshape(-1) for t in tensors]
    around = None if base is None else base.reshape(-1)
    length = flat[0].numel()
    whole = length // CHUNK * CHUNK
    for begin, end, rows in ((0, whole, whole // CHUNK), (whole, length, 1)):
        if begin == end:
            continue
        cut = [t[begin:end].view(rows, -1) for t in flat]
        beside = None if around is None else around[begin:end].view(rows, -1)
        for chunk in gram(cut, base=beside, dim=0):
            total += chunk
    return total
