"""What the functions over parameters need of torch.distributed; none of it is imported without a DTensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def sharded_dims(t: Any) -> tuple[int, ...]:
    """The mesh dimensions a DTensor is split along; none for other tensors."""
    return tuple([d for d, p in enumerate(getattr(t, "placements", ())) if p.is_shard()])


def replicated_dims(t: Any) -> tuple[int, ...]:
    """The mesh dimensions along which a DTensor's shard is held more than once."""
    return tuple([d for d, p in enumerate(getattr(t, "placements", ())) if p.is_replicate()])


def refuse_partial(name: str, tensors: Sequence[Any]) -> None:
    for index, t in enumerate(tensors):
        if any([p.is_partial() for p in getattr(t, "placements", ())]):
            raise ValueError(
                f"{name}[{index}]: a DTensor of partial sums; redistribute it to shards or replicas first"
            )


def whole_norm(norms: Tensor, tensors: Sequence[Any]) -> Tensor:
    """The norm of all tensors as one vector from those of this process's parts (L,), on every process."""
    if not any([hasattr(t, "device_mesh") for t in tensors]):
        return torch.linalg.vector_norm(norms)
    import torch.distributed as dist

    refuse_partial("gradients", tensors)
    groups: dict[Any, list[Tensor]] = {}
    for t, square in zip(tensors, norms.double().square().unbind()):
        dims = sharded_dims(t)
        groups.setdefault((t.device_mesh, dims) if dims else None, []).append(square)
    total = norms.new_zeros((), dtype=torch.float64)
    for key, squares in groups.items():
        part = torch.stack(squares).sum()
        if key is not None:
            for dim in key[1]:
                dist.all_reduce(part, group=key[0].get_group(dim))
        total = total + part
    return total.sqrt().to(norms.dtype)
