r"""Core `abs_quantile`: the r-th largest of $|w_k - b|$, exactly, without a sort.

A value of the tensor itself, the one that sorting the magnitudes would give, bit for bit; NaN counts as the
largest and is returned as inf. The kernels bracket it by a sample, count and collect the few elements inside
the bracket in one pass, and select among those; where the counts say that the bracket missed they count bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._registry import reference
from .._route import use_reference

_op = torch.ops.solera


def delta_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """What w - base is taken in: float64 where one tensor is, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def columns(
    tensors: Sequence[Tensor], base: Sequence[Tensor], models: int
) -> list[tuple[list[Tensor], Tensor | None]]:
    """The deltas of each position and its base, in the dtype they are computed in."""
    length = len(tensors) // models
    out = []
    for item in range(length):
        column = tensors[item::length]
        acc = delta_dtype([*column, *base[item : item + 1]])
        deltas, b = [w.to(acc) for w in column], base[item].to(acc) if base else None
        out.append(([d - b for d in deltas] if b is not None else deltas, b))
    return out


def refuse_mismatch(op: str, flat: Sequence[Tensor], like: Sequence[Tensor]) -> None:
    """What the kernels refuse too: plain torch would broadcast."""
    if any(t.shape != like[i % len(like)].shape for i, t in enumerate(flat)):
        raise RuntimeError(f"{op}: a tensor differs in shape from the first model's")


@reference("abs_quantile")
def abs_quantile_reference(tensors, base, models, ranks, whole):
    """Sorts. ranks (K, G) flattened; (K, G) thresholds in float64, inf for rank 0."""
    length = len(tensors) // models
    refuse_mismatch("abs_quantile", [*tensors, *base], tensors[:length])
    deltas = [deltas for deltas, _ in columns(tensors, base, models)]
    groups = 1 if whole else length
    out = []
    for k in range(models):
        for group in range(groups):
            rank = ranks[k * groups + group]
            if rank == 0:
                out.append(tensors[0].new_full((), float("inf"), dtype=torch.float64))
                continue
            members = range(length) if whole else [group]
            every = torch.cat([deltas[item][k].reshape(-1).double() for item in members])
            size = every.abs()
            size = torch.where(size.isnan(), float("inf"), size)
            out.append(size.sort(descending=True).values[rank - 1])
    return torch.stack(out).view(models, groups)


def abs_quantile(
    tensors: Sequence[Tensor],
    base: Sequence[Tensor],
    models: int,
    ranks: Sequence[int],
    whole: bool = False,
) -> Tensor:
    r"""The ranks[k, l]-th largest of $|w_{kl} - b_l|$ (inf for rank 0), held constant in backward.

    Shapes: K * L tensors (model by model), L or no base tensors, K * G ranks -> (K, G) float64, G = L, or 1
    where all tensors of a model are ranked together.
    """
    tensors, base = [t.detach() for t in tensors], [t.detach() for t in base]
    run = abs_quantile_reference if use_reference() else _op.abs_quantile
    return run(tensors, base, models, ranks, whole)
