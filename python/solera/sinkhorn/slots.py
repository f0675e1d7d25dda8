r"""Slot normalisation: scores of K slots and N set elements, normalised over the slots and then over the elements.

$$W_{kn} = \frac{\sigma(s_{kn})}{\sum_j \sigma(s_{jn})},\qquad A_{kn} = \frac{W_{kn}}{\sum_i W_{ki}} ,$$

one column pass and one row pass of matrix scaling. The first sum is over the slots of one element and the second is of
numbers that add over chunks, so a set of any size can be encoded chunk by chunk with the result of the whole.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _check
from .._registry import accumulate_type
from .._route import full_precision
from ..norm.grad_scale import grad_scale

ACTIVATIONS = ("sigmoid", "softmax")


class SlotState(NamedTuple):
    """Sums over the elements seen so far. Shapes: weighted (..., K, D), total (..., K)."""

    weighted: Tensor
    total: Tensor


def _logits(scores: Tensor, activation: str) -> Tensor:
    """Logarithms of the activated scores in float32 (float64), so that no slot sum can vanish."""
    _check.choice("activation", activation, ACTIVATIONS)
    s = scores.to(accumulate_type(scores))
    return F.logsigmoid(s) if activation == "sigmoid" else s


def _without_padding(t: Tensor, valid: Tensor | None, scores: Tensor, padding: float) -> Tensor:
    if valid is None:
        return t
    if not isinstance(valid, Tensor) or valid.dtype != torch.bool:
        came = valid.dtype if isinstance(valid, Tensor) else type(valid).__name__
        raise TypeError(f"valid: expected a bool tensor, got {came}")
    expected = (*scores.shape[:-2], scores.shape[-1])
    if valid.shape not in (expected, expected[-1:]):
        raise ValueError(
            f"valid: expected shape {expected} to go with scores of shape {tuple(scores.shape)}, "
            f"got {tuple(valid.shape)}"
        )
    return torch.where(valid.unsqueeze(-2), t, padding)


def slot_normalize(
    scores: Tensor, *, activation: str = "sigmoid", valid: Tensor | None = None
) -> Tensor:
    r"""Attention of slots to set elements: $\sigma(s)$ over its sum over slots, then over its sum over elements.

    Args:
        scores: (..., K, N), K slots, N elements.
        activation: "sigmoid", or "softmax" for $e^s$ (slot attention).
        valid: bool (..., N) or (N,): elements that are False are padding and get 0.

    Shapes: (..., K, N) -> (..., K, N), the sum over N is 1. Differentiable; a composition.

    A slot without a valid element gets zeros.

    Raises:
        ValueError, TypeError: naming the argument.

    Source: Willette et al., "Scalable Set Encoding with Universal Mini-Batch Consistency and Unbiased Full Set Gradient
    Approximation", 2023; Locatello et al., "Object-Centric Learning with Slot Attention", 2020 (softmax).
    """
    _check.tensor("scores", scores, min_dim=2)
    # Logarithms throughout: a slot that every element all but ignores is normalised as any other one.
    shares = torch.log_softmax(_logits(scores, activation), -2)
    shares = _without_padding(shares, valid, scores, -torch.inf)
    none = (shares == -torch.inf).all(-1, keepdim=True)
    return torch.where(none, 0.0, torch.where(none, 0.0, shares).softmax(-1)).to(scores.dtype)


@full_precision
def slot_accumulate(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    state: SlotState | None = None,
    *,
    scale: float | None = None,
    activation: str = "sigmoid",
    valid: Tensor | None = None,
    gradient_scale: float = 1.0,
) -> SlotState:
    r"""Adds a chunk of a set to the sums of `slot_finalize`: $\sum_n W_{kn} v_n$ and $\sum_n W_{kn}$.

    Chunks of any sizes, in any order, give the result of the whole set at once.

    Args:
        queries: (..., K, D), the slots; keys: (..., N, D) and values: (..., N, E), a chunk's elements.
        state: of the chunks before; None for the first.
        scale: of the scores $q k^\top$; $D^{-1/2}$ if None.
        activation, valid: as in `slot_normalize`.
        gradient_scale: what the chunk's gradient is multiplied by. The unbiased gradient of a set too large for memory:
            0 for the chunks run without a graph, (elements of the set) / (elements with a graph) for the others,
            chosen at random.

    Shapes: (..., K, D), (..., N, D), (..., N, E) -> weighted (..., K, E), total (..., K), in float32 (float64 for
    float64).

    Raises:
        ValueError, TypeError: naming the argument.

    Source: as `slot_normalize`.
    """
    for name, t in (("queries", queries), ("keys", keys), ("values", values)):
        _check.tensor(name, t, min_dim=2)
    if keys.shape[-1] != queries.shape[-1]:
        raise ValueError(
            f"keys: expected {queries.shape[-1]} features as queries of shape {tuple(queries.shape)}, "
            f"got shape {tuple(keys.shape)}"
        )
    if values.shape[-2] != keys.shape[-2]:
        raise ValueError(
            f"values: expected {keys.shape[-2]} elements as keys of shape {tuple(keys.shape)}, "
            f"got shape {tuple(values.shape)}"
        )
    factor = queries.shape[-1] ** -0.5 if scale is None else _check.number("scale", scale)
    gradient_scale = _check.number("gradient_scale", gradient_scale)
    # Scores in float32: in half precision their products may overflow.
    q, k, v = (t.to(accumulate_type(queries)) for t in (queries, keys, values))
    scores = q @ k.transpose(-1, -2) * factor
    shares = _without_padding(torch.softmax(_logits(scores, activation), -2), valid, scores, 0.0)
    weighted, total = shares @ v, shares.sum(-1)
    if gradient_scale == 0:
        weighted, total = weighted.detach(), total.detach()
    elif gradient_scale != 1:
        weighted, total = grad_scale(weighted, gradient_scale), grad_scale(total, gradient_scale)
    if state is None:
        return SlotState(weighted, total)
    if not isinstance(state, SlotState):
        raise TypeError(f"state: expected None or a SlotState, got {type(state).__name__}")
    if state.weighted.shape != weighted.shape:
        raise ValueError(
            f"state: expected sums of shape {tuple(weighted.shape)}, got {tuple(state.weighted.shape)}"
        )
    return SlotState(state.weighted + weighted, state.total + total)


def slot_finalize(state: SlotState) -> Tensor:
    """The slots' values: weighted sums over their totals, `slot_normalize`'s attention applied to the whole set.

    Shapes: weighted (..., K, E), total (..., K) -> (..., K, E). A slot that saw nothing gets zeros; so does one whose
    total is below what can be divided by (1e-36, or 1e-306 in float64).

    Raises:
        TypeError: state is no SlotState.
    """
    if not isinstance(state, SlotState):
        raise TypeError(f"state: expected a SlotState, got {type(state).__name__}")
    total = state.total.unsqueeze(-1)
    some = total > 100 * torch.finfo(total.dtype).tiny
    return torch.where(some, state.weighted / torch.where(some, total, 1.0), 0.0)
