r"""Averages of parameters across the processes of a torch.distributed group.

Each process scales its parameters by $w_r / \sum_s w_s$ into flat buckets of 25 MiB (one `lincomb` a bucket), which are
summed over the group while the next one is filled, and spread again. float32, bfloat16 and float16 parameters travel
and are added in float32 and rounded once at the end; float64 ones in float64.

**Sharded parameters.** A DTensor (FSDP2's parameters, tensor parallelism) is averaged shard by shard over the
processes that hold the same shard: along the mesh dimensions where it is replicated (HSDP's first one) or, where
`group` is given, over that group, which must join the same shard of independent models. Where each shard exists once
there is nothing to average, and the call says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..norm.grad_norm import run_in_place
from ._distributed import refuse_partial, replicated_dims, sharded_dims
from ._lists import local
from ._parameters import beside, checked, parameters_of, written
from .ema import ema_
from .lincomb import _lincomb_out

BUCKET = 25 << 20  # bytes
Parameters = Tensor | Iterable[Tensor] | Mapping[str, Tensor]


def _groups(tensors: list[Any], group: Any) -> list[Any]:
    """The process groups over which to sum, one after the other."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "torch.distributed: not initialised; call torch.distributed.init_process_group first"
        )
    refuse_partial("parameters", tensors)
    meshes = {t.device_mesh for t in tensors if hasattr(t, "device_mesh")}
    if not meshes:
        return [group]
    if group is not None:
        for index, t in enumerate(tensors):
            if any([t.device_mesh.get_group(d) is group for d in sharded_dims(t)]):
                raise ValueError(
                    f"group: parameters[{index}] is sharded over it; its shards are different parts of one "
                    "tensor, not copies"
                )
        return [group]
    kinds = {(getattr(t, "device_mesh", None), replicated_dims(t)) for t in tensors}
    if len(kinds) > 1:
        raise ValueError(
            "parameters: replicated along different mesh dimensions; average them in one call each, or "
            "give the group"
        )
    mesh: Any
    mesh, dims = kinds.pop()
    if not dims:
        raise ValueError(
            "parameters: each shard exists once on their mesh, so there is nothing to average; give group= "
            "the processes that hold the same shard of other replicas"
        )
    return [mesh.get_group(dim) for dim in dims]


def _share(weights: Any, like: Tensor, groups: list[Any]) -> Tensor:
    """(1,) float64: this process's weight over the sum of all, on like's device."""
    import torch.distributed as dist

    if weights is None:
        count = 1
        for group in groups:
            count *= dist.get_world_size(group)
        return torch.full((1,), 1.0 / count, dtype=torch.float64, device=like.device)
    if isinstance(weights, Tensor):
        if weights.numel() != 1 or not weights.dtype.is_floating_point:
            raise ValueError(
                "weights: expected this process's weight, one floating-point number, got shape "
                f"{tuple(weights.shape)}, {weights.dtype}"
            )
        own = weights.detach().reshape(1).to(like.device, torch.float64)
    else:
        try:
            number = float(weights)
        except (TypeError, ValueError):
            raise TypeError(
                f"weights: expected this process's weight, a number, got {weights!r:.100}"
            ) from None
        if not 0.0 <= number < float("inf"):
            raise ValueError(f"weights: expected a finite number not below 0, got {weights!r}")
        own = torch.full((1,), number, dtype=torch.float64, device=like.device)
    total = own.clone()
    for group in groups:
        dist.all_reduce(total, group=group)
    return own / total


def _buckets(tensors: list[Tensor], limit: int) -> list[list[int]]:
    """Indices of what travels together: one sum's dtype, about `limit` bytes."""
    found: list[list[int]] = []
    filling: dict[torch.dtype, tuple[list[int], int]] = {}
    for index, t in enumerate(tensors):
        dtype = torch.float64 if t.dtype == torch.float64 else torch.float32
        members, size = filling.get(dtype, ([], 0))
        if not members or size >= limit:
            members, size = [], 0
            found.append(members)
        members.append(index)
        filling[dtype] = (members, size + t.numel() * dtype.itemsize)
    return found


def _averaged(
    tensors: list[Tensor],
    share: Tensor,
    groups: list[Any],
    use: Callable[[list[int], list[Tensor]], None],
    bucket: int,
) -> None:
    """use(indices, averages of those tensors) for one bucket after the other."""
    import torch.distributed as dist

    def finish(members: list[int], flat: Tensor, work: Any) -> None:
        work.wait()
        for group in groups[1:]:
            dist.all_reduce(flat, group=group)
        use(members, _views(flat, [tensors[i] for i in members]))

    pending = None
    for members in _buckets(tensors, bucket):
        inside = [tensors[i] for i in members]
        dtype = torch.float64 if inside[0].dtype == torch.float64 else torch.float32
        flat = share.new_empty(sum([t.numel() for t in inside]), dtype=dtype)
        arguments: Any = (inside, share, [], _views(flat, inside))
        run_in_place("lincomb_out", _lincomb_out, ([flat],), *arguments)
        work = dist.all_reduce(flat, group=groups[0], async_op=True)
        if pending is not None:
            finish(*pending)
        pending = (members, flat, work)
    if pending is not None:
        finish(*pending)


def _views(flat: Tensor, like: list[Tensor]) -> list[Tensor]:
    parts = flat.split([t.numel() for t in like])
    return [part.view(t.shape) for part, t in zip(parts, like)]


def _own(parameters: Parameters, group: Any) -> tuple[list, list, list[Tensor], list[Any]]:
    """(keys, as given, this process's parts, the groups)."""
    keys, every = parameters_of("parameters", parameters)
    if not every:
        raise ValueError("parameters: expected at least one floating-point tensor")
    groups = _groups(every, group)
    return keys, every, checked("parameters", [local(t) for t in every]), groups


def average_parameters_(
    parameters: Parameters,
    weights: float | Tensor | None = None,
    group: Any = None,
    *,
    bucket_bytes: int = BUCKET,
) -> None:
    r"""The weighted average of each parameter over the processes of a group, in place on all of them.

    $p \leftarrow \sum_r w_r p_r / \sum_r w_r$: the soup of the models the processes hold, local SGD's and federated
    averaging's round. A collective call: every process of the group makes it, with the same shapes in the same
    order (a mapping's order included). The result is that of `lincomb` on one process holding all, to rounding of
    the sum.

    Args:
        parameters: a tensor, an iterable or a mapping of names, of which integer entries are left alone. DTensors
            as they are; see this module.
        weights: this process's $w_r$, at least 0 (samples it saw, for instance); a number or a tensor of one.
            None: all equal. If all are 0 the result is NaN.
        group: a process group; default: all processes, or for DTensors the replicas of each shard.
        bucket_bytes: bytes summed at a time.

    Shapes: any. float32, float64, bfloat16, float16, mixed; the sum is in float32 (float64 for float64).

    Raises:
        ValueError, TypeError: naming the argument. RuntimeError: no process group.

    Source: Wortsman et al., "Model soups", 2022; McMahan et al., "Communication-Efficient Learning of Deep Networks
    from Decentralized Data", 2017.
    """
    _, every, own, groups = _own(parameters, group)
    written("parameters", every)
    with torch.no_grad():
        share = _share(weights, own[0], groups)

        def use(members: list[int], averages: list[Tensor]) -> None:
            targets = [own[i] for i in members]
            arguments: Any = (averages, torch.ones_like(share), [], targets)
            run_in_place("lincomb_out", _lincomb_out, (targets,), *arguments)

        _averaged(own, share, groups, use, bucket_bytes)


def soup_over_group(
    parameters: Parameters,
    weights: float | Tensor | None = None,
    group: Any = None,
    *,
    bucket_bytes: int = BUCKET,
) -> Any:
    """The average `average_parameters_` would write, as new tensors; the parameters stay.

    Args:
        parameters, weights, group, bucket_bytes: as there.

    Returns a tensor, a list or a dict, as `parameters` was; DTensors give DTensors, a mapping's integer entries are
    this process's.

    Shapes: those of the parameters, in their dtypes.

    Raises:
        ValueError, TypeError: naming the argument. RuntimeError: no process group.

    Source: Wortsman et al., "Model soups", 2022.
    """
    if isinstance(parameters, Tensor):
        found: Any = parameters.detach().clone()
    elif isinstance(parameters, Mapping):
        found = {key: t.detach().clone() for key, t in parameters.items()}
    else:
        found = [t.detach().clone() for t in parameters]
    average_parameters_(found, weights, group, bucket_bytes=bucket_bytes)
    return found


def ema_over_group_(
    averages: Parameters,
    parameters: Parameters,
    decay: float,
    *,
    weights: float | Tensor | None = None,
    group: Any = None,
    bucket_bytes: int = BUCKET,
) -> None:
    r"""A moving average of the group's weighted mean, in place.

    $a \leftarrow a + (1 - \mathrm{decay})(\sum_r w_r p_r / \sum_r w_r - a)$. The parameters stay; the mean is never
    rounded to their dtype, nor stored beyond a bucket.

    Args:
        averages: as many as parameters, of the same shapes, in any dtypes; written in place.
        parameters, weights, group, bucket_bytes: as in `average_parameters_`.
        decay: in [0, 1].

    Shapes: any.

    Raises:
        ValueError, TypeError: naming the argument. RuntimeError: no process group.

    Source: Polyak, Juditsky, 1992, of the average of Wortsman et al., 2022.
    """
    keys, _, own, groups = _own(parameters, group)
    targets = [local(t) for t in beside("averages", averages, keys)]
    written("averages", checked("averages", targets, own))
    with torch.no_grad():
        _averaged(
            own,
            _share(weights, own[0], groups),
            groups,
            lambda members, means: ema_([targets[i] for i in members], means, decay),
            bucket_bytes,
        )
