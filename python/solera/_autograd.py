"""What every core's autograd Function shares."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def differentiable_vjp(
    reference: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor | None],
    needs: Sequence[bool],
    grad_outputs: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """The vector-Jacobian product of `reference` at `inputs`, itself differentiable.

    Backward under `create_graph=True` calls this instead of its kernel, so second derivatives are those
    of the reference: right, and slower. `inputs` are the tensors saved for backward (connected to the
    caller's graph), of which those with `needs` get a gradient; the others give None.
    """
    # Views, so that a gradient stops at its own input where one input was made from another.
    inputs = [t if t is None else t.view_as(t) for t in inputs]
    outputs = reference(*inputs)
    if isinstance(outputs, Tensor):
        outputs = (outputs,)
    pairs = [(o, g) for o, g in zip(outputs, grad_outputs) if g is not None and o.requires_grad]
    wanted = [t for t, need in zip(inputs, needs) if need and t is not None]
    if not wanted or not pairs:
        return [None] * len(inputs)
    grads = iter(
        torch.autograd.grad(
            [o for o, _ in pairs],
            wanted,
            [g for _, g in pairs],
            create_graph=True,
            allow_unused=True,
        )
    )
    return [next(grads) if need and t is not None else None for t, need in zip(inputs, needs)]
