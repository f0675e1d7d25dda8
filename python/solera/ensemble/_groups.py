"""Members spread over the ranks of a process group: what travels between them.

Every rank holds some members and all rows, and ends with the statistic of the whole ensemble. Its loss is then the
same on each rank, so the gradient of a sum over ranks is passed on as it is: nothing travels backward.
"""

from __future__ import annotations

import torch
from torch import Tensor


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        total = x.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def check_group(group: object) -> None:
    """A process group or None."""
    if group is None:
        return
    if not torch.distributed.is_available() or not isinstance(
        group, torch.distributed.ProcessGroup
    ):
        raise TypeError(
            f"group: expected a torch.distributed.ProcessGroup or None, got {type(group).__name__}"
        )


def summed_over(x: Tensor, group: torch.distributed.ProcessGroup | None) -> Tensor:
    """The sum of x over the ranks; x itself without a group."""
    return x if group is None else _Sum.apply(x, group)


def largest_over(x: Tensor, group: torch.distributed.ProcessGroup | None) -> Tensor:
    """The elementwise maximum over the ranks, a constant to autograd."""
    x = x.detach()
    if group is None:
        return x
    x = x.clone(memory_format=torch.contiguous_format)
    torch.distributed.all_reduce(x, torch.distributed.ReduceOp.MAX, group=group)
    return x


def world_members(
    count: int, x: Tensor, group: torch.distributed.ProcessGroup | None
) -> int | Tensor:
    """How many members all ranks hold together, as a tensor beside x where there is a group."""
    if group is None:
        return count
    return summed_over(x.new_full((), float(count)).detach(), group)
