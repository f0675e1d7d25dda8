"""What the functions over parameters need of torch.distributed; none of it is imported without a DTensor."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
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
    """An error for a DTensor whose value is still to be summed over its mesh."""
    for index, t in enumerate(tensors):
        if any([p.is_partial() for p in getattr(t, "placements", ())]):
            raise ValueError(
                f"{name}[{index}]: a DTensor of partial sums; redistribute it to shards or replicas first"
            )


def placements_of(tensors: Any, base: Any) -> dict[Any, Callable[[Tensor], Any]]:
    """Of each entry that is a DTensor: what makes one like it of this process's shard. Empty if none is.

    All models have an entry on one mesh in one placement, or none of them is a DTensor.
    """
    if not isinstance(tensors, Sequence) or isinstance(tensors, str):
        return {}
    models = []
    for value in (*tensors, *(() if base is None else (base,))):
        if isinstance(value, Tensor):
            models.append({0: value})
        elif isinstance(value, Mapping):
            models.append(dict(value))
        elif isinstance(value, Sequence):
            models.append(dict(enumerate(value)))
    if not any([hasattr(t, "device_mesh") for model in models for t in model.values()]):
        return {}
    found: dict[Any, Callable[[Tensor], Any]] = {}
    for key, first in models[0].items():
        kinds = {_place(model.get(key)) for model in models}
        if kinds == {None}:
            continue
        if len(kinds) > 1:
            raise ValueError(
                f"tensors[0][{key!r}]: a DTensor whose mesh or placements differ between the models, or that "
                "is an ordinary tensor in some; redistribute them alike first"
            )
        refuse_partial(f"tensors[0][{key!r}]", [first])
        found[key] = functools.partial(_placed_like, first)
    return found


def _place(t: Any) -> Any:
    return (t.device_mesh, t.placements) if hasattr(t, "device_mesh") else None


def _placed_like(like: Any, shard: Tensor) -> Any:
    from torch.distributed.tensor import DTensor

    stride = torch.empty(like.shape, device="meta").stride()
    return DTensor.from_local(
        shard, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=stride
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
