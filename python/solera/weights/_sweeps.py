"""Tensors merged in two sweeps over their tiles: one for the dots of the models, one for the combination.

The dots have the bits that core `gram` gives for all of the tensor at once: it takes them chunk by chunk and adds the
chunks' doubles in order, and so does this, however the chunks are spread over tiles.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _route
from .._registry import compiled_library
from .gram import gram

CHUNK = 16384  # elements, kListChunk of csrc/cpu/weights/tensor_lists.h


def exact(device: torch.device) -> bool:
    """Whether the arithmetic is that of the kernels whose order of additions is known here."""
    own = compiled_library is not None and _route.AT_IMPORT != "triton"
    return own and device.type == "cpu" and not _route.use_reference()


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
