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


DIGIT = 16  # bits that one sweep over the parts of a tensor settles


@reference("abs_digits")
def abs_digits_reference(tensors, base, which, prefixes, shift):
    """(H, 2^16) counts of the keys of |w - base| by the bits at `shift`, among those with the prefix above them."""
    refuse_mismatch("abs_digits", [*tensors, *base], tensors[:1])
    [(deltas, _)] = columns(tensors, base, len(tensors))
    out = []
    for k, prefix in zip(which, prefixes):
        d = deltas[k].reshape(-1)
        wide = d.dtype == torch.float64
        largest = torch.iinfo(torch.int64 if wide else torch.int32).max
        keys = (d.view(torch.int64 if wide else torch.int32) & largest).long() >> shift
        mine = keys[keys >> DIGIT == prefix] & ((1 << DIGIT) - 1)
        out.append(torch.bincount(mine, minlength=1 << DIGIT))
    return torch.stack(out)


class DigitSearch:
    r"""The r-th largest of $|w_k - b|$ over parts that are seen one after the other, `sweeps` times each.

    Every sweep settles 16 bits of each value, from the top: two in float32, four in float64. The bits of
    `abs_quantile` on all of the tensor, however it is cut.

    ranks: (K, G), from the largest; 0 gives inf. After the last sweep `found` is (K, G) float64.
    """

    def __init__(self, ranks: Sequence[Sequence[int]], wide: bool) -> None:
        self.ranks = [list(row) for row in ranks]
        self.wide = wide
        self.sweeps = 4 if wide else 2
        self._shift = DIGIT * (self.sweeps - 1)
        self._prefixes = [[0] * len(row) for row in ranks]
        self._counts: dict[tuple[int, int], Tensor] = {}  # by model and prefix

    def add(self, tensors: Sequence[Tensor], base: Tensor | None) -> None:
        """A part: one tensor a model, in any shape."""
        rows = sorted(
            {
                (k, prefix)
                for k, (ranks, row) in enumerate(zip(self.ranks, self._prefixes))
                for rank, prefix in zip(ranks, row)
                if rank
            }
        )
        if not rows or tensors[0].numel() == 0:
            return
        run = abs_digits_reference if use_reference() else _op.abs_digits
        which, prefixes = zip(*rows)
        around = [] if base is None else [base]
        counts = run(list(tensors), around, list(which), list(prefixes), self._shift).cpu()
        for row, more in zip(rows, counts):
            if row in self._counts:
                self._counts[row] += more
            else:
                self._counts[row] = more

    def turn(self) -> None:
        """All parts have been seen once more."""
        for k, (ranks, prefixes) in enumerate(zip(self.ranks, self._prefixes)):
            for g, (rank, prefix) in enumerate(zip(ranks, prefixes)):
                if rank == 0:
                    continue
                from_top = self._counts[k, prefix].flip(0).cumsum(0)
                place = int(torch.searchsorted(from_top, rank))
                ranks[g] = rank - (int(from_top[place - 1]) if place else 0)
                prefixes[g] = prefix << DIGIT | ((1 << DIGIT) - 1 - place)
        self._counts.clear()
        self._shift -= DIGIT

    @property
    def found(self) -> Tensor:
        keys = torch.tensor(self._prefixes, dtype=torch.int64 if self.wide else torch.int32)
        values = keys.view(torch.float64) if self.wide else keys.view(torch.float32).double()
        nothing = torch.tensor(self.ranks) == 0
        return torch.where(nothing | values.isnan(), float("inf"), values)


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
