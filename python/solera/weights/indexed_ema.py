r"""Core `indexed_ema`: exponential moving averages of single rows of a bank, in place.

$$t_{\mathrm{index}_i} \leftarrow m\,t_{\mathrm{index}_i} + (1 - m)\,v_i,\qquad i = 0, 1, \dots, B - 1 .$$

**Rows named more than once** take their values in the order of the batch, as the loop over i would. For a row with
values $q_1, \dots, q_n$ that is the closed form

$$t \leftarrow m^n\,t + (1 - m)\sum_i m^{n - i}\,q_i .$$

Computed in float32 (float64 for a float64 bank), rounded once a row; product and sum are rounded separately, so that
every backend gives the same bits, whatever the thread count.

Sources: per-sample targets, Liu et al., "Early-Learning Regularization Prevents Memorization of Noisy Labels", 2020;
class prototypes, Qu et al., "Rethinking Multiple Instance Learning for Whole Slide Image Classification: A Good
Instance Classifier is All You Need", 2023 (a loop over the batch there).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from .. import _check
from .._registry import reference
from .._route import use_reference
from . import _lists

_indexed_ema_op = torch.ops.solera.indexed_ema_.default


# ---- reference ---------------------------------------------------------------------------------------


@reference("indexed_ema_")
def _indexed_ema(bank, index, values, decay):
    """The closed form in float64. Entries outside the bank land in a row that is thrown away."""
    rows, count = bank.shape[0], index.shape[0]
    if count == 0:
        return
    if values.shape != (count, bank.shape[1]):
        raise RuntimeError("indexed_ema_: expected bank (N, D), index (B,) and values (B, D)")
    inside = (index >= 0) & (index < rows)
    place, order = torch.sort(torch.where(inside, index, rows), stable=True)
    start = torch.searchsorted(place, place)
    end = torch.searchsorted(place, place, right=True)
    position = torch.arange(count, device=index.device)
    m = torch.full((), decay, dtype=torch.float64, device=index.device)
    share = (1 - m) * m ** (end - 1 - position)
    terms = share[:, None] * values[order].double()
    sums = torch.zeros_like(terms).index_add_(0, start, terms)[start]
    padded = torch.cat([bank, bank.new_zeros((1, bank.shape[1]))])
    old = padded[place].double()
    new = sums + (0 if decay == 0 else m ** (end - start)[:, None] * old)
    padded[place] = new.to(bank.dtype)  # the same value each time a row is written
    bank.copy_(padded[:rows])


# ---- public functions --------------------------------------------------------------------------------


def check_bank(name: str, bank: object) -> Tensor:
    """A bank whose rows can be written, or be read: (N, ...)."""
    t = _check.tensor(name, bank, min_dim=1)
    _lists.refuse_expanded(name, t)
    return t


def check_index(
    name: str, index: object, rows: int, device: torch.device, low: int | None = None
) -> Tensor:
    """Row numbers (B,) int64. On the CPU, in eager mode, they are held to [low, rows); without `low` negative ones
    are let through.
    """
    if not isinstance(index, Tensor) or index.dtype != torch.int64 or index.dim() != 1:
        came = (
            f"{index.dtype} of shape {tuple(index.shape)}"
            if isinstance(index, Tensor)
            else type(index).__name__
        )
        raise TypeError(f"{name}: expected an int64 tensor of shape (B,), got {came}")
    if index.device != device:
        raise ValueError(f"{name}: expected device {device}, got {index.device}")
    if (
        index.is_cpu
        and index.numel()
        and not is_dynamo_compiling()
        and not torch._C._are_functorch_transforms_active()
    ):
        least, most = (int(t) for t in torch.aminmax(index))
        if most >= rows:
            rest = " (negative: left out)" if low is None else ""
            raise IndexError(f"{name}: expected row numbers below {rows}{rest}, got {most}")
        if low is not None and least < low:
            raise IndexError(f"{name}: expected row numbers of at least {low}, got {least}")
    return index


def _update(
    bank: Tensor, index: Tensor, values: Tensor, decay: float, names: tuple[str, str, str]
) -> None:
    t = check_bank(names[0], bank)
    i = check_index(names[1], index, t.shape[0], t.device)
    v = _check.tensor(names[2], values)
    if v.shape != (i.shape[0], *t.shape[1:]) or v.device != t.device:
        raise ValueError(
            f"{names[2]}: expected shape {(i.shape[0], *t.shape[1:])} on {t.device} to go with {names[0]} of "
            f"shape {tuple(t.shape)} and {i.shape[0]} row numbers, got {tuple(v.shape)} on {v.device}"
        )
    decay = _check.number("decay", decay, low=0.0, high=1.0)
    if not is_dynamo_compiling():
        _lists.refuse_overlap([t], [v.detach()], lambda _: names[0], lambda _: names[2])
    if decay == 1.0 or t.numel() == 0:
        return
    width = t[0].numel()
    with torch.no_grad():
        flat = t.reshape(t.shape[0], width) if t.is_contiguous() else t.flatten(1).contiguous()
        given = v.reshape(v.shape[0], width)
        if use_reference():
            _indexed_ema(flat, i, given, decay)
        else:
            _indexed_ema_op(flat, i, given, decay)
            if not is_dynamo_compiling():
                torch.autograd.graph.increment_version(t)
        if not t.is_contiguous():
            t.copy_(flat.view(t.shape))


def indexed_ema_(bank: Tensor, index: Tensor, value: Tensor, decay: float) -> None:
    r"""One step of the moving averages of the rows that `index` names: $t_i \leftarrow m\,t_i + (1 - m)\,v$, in place.

    Args:
        bank: (N, ...), written in place without autograd. float32, float64, bfloat16 or float16.
        index: (B,) int64; negative numbers are left out. A row that is named more than once takes its values in the
            order of the batch, as a loop would: $m^n t + (1 - m)\sum_i m^{n - i} q_i$.
        value: (B, ...), of any of these dtypes; no gradient flows.
        decay: m in [0, 1]; 0 stores the (last) value, 1 changes nothing.

    Shapes: bank (N, *S), index (B,), value (B, *S).

    Raises:
        IndexError: a row number at or past N (eager, on the CPU; elsewhere such an entry is left out).
        ValueError, TypeError: naming the argument that does not fit.

    Source: Liu et al., "Early-Learning Regularization Prevents Memorization of Noisy Labels", 2020; the closed form is
    derived.
    """
    _update(bank, index, value, decay, ("bank", "index", "value"))


def class_ema_(prototypes: Tensor, values: Tensor, labels: Tensor, decay: float) -> None:
    r"""Class prototypes drawn to the values of a batch, one after another: $p_{y_i} \leftarrow m\,p_{y_i} +
    (1 - m)\,q_i$, in place.

    The same op as `indexed_ema_`, in the order of arguments that prototypes have. Normalise afterwards where the
    prototypes are directions (`norm.l2_normalize`).

    Args:
        prototypes: (C, ...), written in place without autograd. values: (B, ...). labels: (B,) int64, negative where a
            sample is left out. decay: m in [0, 1].

    Shapes: prototypes (C, *S), values (B, *S), labels (B,).

    Raises:
        IndexError, ValueError, TypeError: as `indexed_ema_`.

    Source: Qu et al., "Rethinking Multiple Instance Learning for Whole Slide Image Classification: A Good Instance
    Classifier is All You Need", 2023.
    """
    _update(prototypes, labels, values, decay, ("prototypes", "labels", "values"))
