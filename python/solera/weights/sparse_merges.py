r"""Merges of sparsified task vectors: `ties`, `dare`, `breadcrumbs`, `della`, all over core `consensus`.

They differ in what is kept of a task vector $w_k - b$: the largest entries, random ones, a band of magnitudes,
random ones with probabilities by rank; and in how what is kept is merged: summed, or by a vote on the sign.
Libraries differ in the details, and every one of them is an argument here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _check
from .._route import use_reference
from ._random import keep_below, random_words, tensor_key
from .abs_quantile import abs_quantile, columns
from .consensus import DIVISORS, VOTES, consensus_lists, consensus_norms_reference
from .lincomb import Weights, _gather_with_care

_op = torch.ops.solera


class _Lists(NamedTuple):
    """What a merge is given: K models and a base as flat lists, and how to give the result back."""

    kind: str
    keys: list
    whole: dict
    order: list
    tensors: list[Tensor]  # K * L, model by model
    base: list[Tensor]
    models: int

    def sizes(self) -> list[int]:
        return [t.numel() for t in self.base]

    def tensor_keys(self) -> list[int]:
        return [tensor_key(key) for key in self.keys]

    def result(self, merged: Sequence[Tensor]) -> Any:
        if self.kind == "tensor":
            return merged[0]
        if self.kind == "list":
            return list(merged)
        found = dict(zip(self.keys, merged))
        return {
            key: self.whole[key].clone() if key in self.whole else found[key] for key in self.order
        }


def _gathered(base: Any, tensors: Any) -> _Lists:
    if base is None:
        raise TypeError("base: expected a tensor, a list of tensors or a state dict, got None")
    kind, keys, whole, flat = _gather_with_care(tensors, base)
    split = len(flat) - len(keys)
    order = list(tensors[0]) if kind == "state dict" else []
    return _Lists(kind, keys, whole, order, flat[:split], flat[split:], len(tensors))


def _weights(value: Any, lists: _Lists) -> Tensor:
    """(K, L), from (K,) or (K, L) numbers or a tensor."""
    count, length, device = lists.models, len(lists.keys), lists.base[0].device
    if isinstance(value, Tensor):
        w = value
        if w.dtype not in _check.FLOATS:
            raise TypeError(f"weights: expected a floating-point dtype, got {w.dtype}")
        if w.device != device:
            raise ValueError(f"weights: expected device {device} (that of base), got {w.device}")
    else:
        dtype = torch.float32 if device.type == "mps" else torch.float64
        try:
            w = torch.tensor(value, dtype=dtype, device=device)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            raise TypeError(
                f"weights: expected a tensor or a list of K numbers, got {value!r:.200}"
            ) from None
    if w.dim() not in (1, 2) or w.shape[0] != count or (w.dim() == 2 and w.shape[1] != length):
        raise ValueError(
            f"weights: expected shape ({count},) or ({count}, {length}) for {count} models of {length} "
            f"floating-point tensor(s), got {tuple(w.shape)}"
        )
    return w if w.dim() == 2 else w[:, None].expand(count, length)


def _shares(name: str, value: Any, models: int) -> list[float]:
    """A number in [0, 1] for each model, from one number or K."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) != models:
            raise ValueError(f"{name}: expected one number or {models}, got {len(value)}")
        return [_check.number(f"{name}[{k}]", v, low=0, high=1) for k, v in enumerate(value)]
    return [_check.number(name, value, low=0, high=1)] * models


def _seed(value: Any, like: Tensor) -> Tensor:
    if isinstance(value, Tensor):
        if value.dtype != torch.int64 or value.numel() != 1 or value.device != like.device:
            raise ValueError(
                f"seed: expected an int or one int64 on {like.device}, got {value.dtype} of shape "
                f"{tuple(value.shape)} on {value.device}"
            )
        return value.reshape(1)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"seed: expected an int or an int64 tensor, got {value!r:.100}")
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"seed: expected an int that fits 64 bits, got {value}")
    return torch.full((1,), value, dtype=torch.int64, device=like.device)


def _vote(elect: str | None, weigh: str, divide: str | None, name: str = "consensus") -> dict:
    """The keywords of `consensus_lists` that say how to merge."""
    _check.choice(name, elect, VOTES)
    _check.choice("weigh", weigh, ("before", "after"))
    _check.choice("divide", divide, DIVISORS)
    if elect is None and divide is not None:
        raise ValueError(f"divide: {divide!r} has no meaning without a vote; give {name}")
    return {"vote": elect, "before": weigh == "before", "divide": divide}


def _thresholds(lists: _Lists, ranks: list[list[int]], scope: str) -> Tensor:
    """(K, L) thresholds from ranks[k][g], one g a tensor or one for the model."""
    flat = [rank for row in ranks for rank in row]
    found = abs_quantile(lists.tensors, lists.base, lists.models, flat, scope == "model")
    return found.expand(lists.models, len(lists.keys))


def _group_sizes(lists: _Lists, scope: str) -> list[int]:
    _check.choice("scope", scope, ("tensor", "model"))
    return lists.sizes() if scope == "tensor" else [sum(lists.sizes())]


def ties(
    base: Weights,
    tensors: Sequence[Weights],
    weights: Tensor | Sequence[float] | Sequence[Sequence[float]],
    density: float | Sequence[float],
    *,
    elect: str = "mass",
    weigh: str = "before",
    divide: str | None = "weight",
    scope: str = "tensor",
    scale: float = 1.0,
) -> Any:
    r"""TIES merging: trim each task vector, elect a sign for each entry, average those that have it.

    $\mathrm{out} = b + \mathrm{scale}\,\sum_{k \in S} \lambda_k d_k / D$ with $d_k = w_k - b$, $S$ the models
    whose $d_k$ is kept and has the elected sign.

    **Kept** are the entries with $|d_k| \ge t_k$, $t_k$ the $\lfloor \mathrm{density} \cdot n \rfloor$-th largest
    of the $n$ magnitudes: exact, as sorting would give it. Entries equal to $t_k$ are all kept, so with ties
    (frequent in half precision) a few more than `int(density * n)` are; with `int(density * n) == 0` nothing
    is kept.

    Args:
        base: the tensor, list or state dict that the models were tuned from.
        tensors: K tensors, lists or state dicts like it.
        weights: $\lambda$, (K,) or (K, L), a tensor or numbers; columns follow the floating-point entries.
        density: share of entries kept, in [0, 1], one number or K.
        elect: "mass" elects the sign with the larger sum of $|\lambda_k d_k|$, "count" the more frequent one.
            A tie elects +.
        weigh: "before": weights take part in the election; "after": the election is over $d_k$.
        divide: $D$: "weight" the sum of the weights over $S$ (where that is below 1e-8, 1), "count" the number
            of members, None 1.
        scope: "tensor" ranks within each tensor, "model" all entries of a model together.
        scale: factor of the merged task vector.

    mergekit's `ties`: the defaults (but it keeps at least one entry); peft's: weigh="after", divide="count"; the
    paper: weights of one, scope="model", divide="count".

    Shapes: K of any shape S -> S; lists and state dicts -> the like. float32, float64, bfloat16, float16;
    computed in float32, float64 where a tensor is. State dicts: integer entries must be equal in all.

    Differentiable in weights, tensors and base: thresholds and elected signs are held constant, as they are
    almost everywhere.

    Raises:
        ValueError, TypeError: naming the argument: shapes, dtypes, keys or numbers that do not fit.

    Source: Yadav et al., "TIES-Merging: Resolving Interference When Merging Models", 2023.
    """
    lists = _gathered(base, tensors)
    if elect is None:
        raise ValueError('elect: expected one of ("mass", "count"), got None')
    how = _vote(elect, weigh, divide, "elect")
    shares = _shares("density", density, lists.models)
    scale = _check.number("scale", scale)
    w = _weights(weights, lists)
    ranks = [[ties_rank(share, n) for n in _group_sizes(lists, scope)] for share in shares]
    low = _thresholds(lists, ranks, scope)
    return lists.result(consensus_lists(lists.tensors, lists.base, w, low=low, scale=scale, **how))


def dare(
    base: Weights,
    tensors: Sequence[Weights],
    weights: Tensor | Sequence[float] | Sequence[Sequence[float]],
    density: float | Sequence[float],
    *,
    rescale: str | None = "probability",
    consensus: str | None = None,
    weigh: str = "before",
    divide: str | None = None,
    scale: float = 1.0,
    seed: int | Tensor,
) -> Any:
    r"""DARE: drop entries of each task vector at random, rescale what is left, and sum or vote.

    $\mathrm{out} = b + \mathrm{scale}\,\sum_k \lambda_k f_k\,m_k \odot (w_k - b)$, $m_k$ Bernoulli with
    probability `density`.

    Args:
        base, tensors, weights, scale: as in `ties`.
        density: probability to keep an entry, in [0, 1], one number or K.
        rescale: $f_k$: "probability" 1 / density; "l1" $\|d_k\|_1 / \|m_k \odot d_k\|_1$ of each tensor (1
            where nothing is left); None 1.
        consensus: None sums; "mass" or "count" elect a sign among what is left, as in `ties` (then `weigh` and
            `divide` mean what they mean there; the default divides by nothing).
        seed: an int or an int64 tensor. The masks are a function of (seed, name or place of the tensor, model,
            element): the same on every device, at any tiling, whatever else is merged in the call.

    mergekit's `dare_linear` is rescale="l1"; its `dare_ties` adds consensus="mass"; peft's `dare_ties` is
    consensus="mass", weigh="after", divide="count".

    Shapes and dtypes: as in `ties`. No mask is stored.

    Differentiable in weights, tensors and base: masks, elected signs and the ratio of "l1" are held constant.

    Raises:
        ValueError, TypeError: naming the argument.

    Source: Yu et al., "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free
    Lunch", 2023.
    """
    lists = _gathered(base, tensors)
    how = _vote(consensus, weigh, divide)
    _check.choice("rescale", rescale, ("probability", "l1", None))
    shares = _shares("density", density, lists.models)
    scale = _check.number("scale", scale)
    w = _weights(weights, lists)
    drawn: dict[str, Any] = {
        "seed": _seed(seed, lists.base[0]),
        "keys": lists.tensor_keys(),
        "keep": [keep_below(share) for share in shares],
    }
    sums = _magnitudes(lists, drawn) if rescale == "l1" else None
    factors = made_up(rescale, shares, sums, w.device)
    if factors is not None:
        factors = factors.expand(lists.models, len(lists.keys))
    return lists.result(
        consensus_lists(lists.tensors, lists.base, w, factors=factors, scale=scale, **drawn, **how)
    )


def _magnitudes(lists: _Lists, drawn: dict) -> Tensor:
    """(2, K, L): the sums of magnitudes, of all and of what is left."""
    run = consensus_norms_reference if use_reference() else _op.consensus_norms
    flat = [[t.detach() for t in group] for group in (lists.tensors, lists.base)]
    return run(*flat, drawn["seed"], drawn["keys"], drawn["keep"])


def made_up(
    rescale: str | None, shares: Sequence[float], sums: Tensor | None, device: torch.device
) -> Tensor | None:
    """f of `dare`, (K, 1) or as wide as the sums (2, K, L) of "l1"."""
    if rescale == "l1":
        assert sums is not None
        total, kept = sums
        return torch.where(kept > 0, total / kept, 1)
    if rescale is None:
        return None
    inverse = [1 / share if share > 0 else 1.0 for share in shares]
    # No copy from the host, so no wait for it.
    return torch.stack(
        [torch.full((1,), value, dtype=torch.float64, device=device) for value in inverse]
    )


# ---- parts of a tensor that does not fit in memory ---------------------------------------------------


def merged_part(
    base: Tensor, tensors: Sequence[Tensor], weights: Sequence[float], *, elect: str | None,
    weigh: str, divide: str | None, scale: float, **rule: Any,
) -> Tensor:  # fmt: skip
    """A part of a merged tensor; `rule`: what `consensus_lists` is told of all of it, (K, 1)."""
    w = torch.tensor(list(weights), dtype=torch.float64)[:, None]
    rule = {key: v.to(base.device) if isinstance(v, Tensor) else v for key, v in rule.items()}
    how = _vote(elect, weigh, divide)
    return consensus_lists(list(tensors), [base], w.to(base.device), scale=scale, **how, **rule)[0]


def drawn_part(
    name: str, seed: int, shares: Sequence[float], device: torch.device | None = None
) -> dict[str, Any]:
    """What masks are drawn from: seed, keys and bounds, as `consensus_lists` takes them."""
    keep = [keep_below(share) for share in shares]
    like = torch.empty(0, device=device)
    return {"seed": _seed(seed, like), "keys": [tensor_key(name)], "keep": keep}


def della_part(
    name: str, base: Tensor, tensors: Sequence[Tensor], weights: Sequence[float], density: float,
    *, epsilon: float, rescale: str | None, seed: int, begin: int, elect: str | None, weigh: str,
    divide: str | None, scale: float,
) -> Tensor:  # fmt: skip
    """Rows of a merged tensor, from element `begin` on."""
    lists = _gathered({name: base}, [{name: t} for t in tensors])
    drop = _Drop([density] * lists.models, epsilon, rescale, _seed(seed, base))
    how = {"scale": scale, **_vote(elect, weigh, divide)}
    return _della(lists, _weights(list(weights), lists), drop, how, begin)[0]


def ties_rank(density: float, n: int) -> int:
    """The rank from the largest, among n magnitudes, of the smallest that is kept; 0: none is."""
    return int(density * n)


def breadcrumb_ranks(density: float, gamma: float, n: int) -> tuple[int, int]:
    """The ranks from the largest, among n magnitudes, of the smallest and of the largest kept; 0: no border."""
    kept = int(density * n)
    dropped = min(int(gamma * n), n - kept)
    return (kept + dropped if kept else 0), (dropped + 1 if dropped and kept else 0)


def breadcrumbs(
    base: Weights,
    tensors: Sequence[Weights],
    weights: Tensor | Sequence[float] | Sequence[Sequence[float]],
    density: float | Sequence[float],
    gamma: float | Sequence[float],
    *,
    consensus: str | None = None,
    weigh: str = "before",
    divide: str | None = None,
    scope: str = "tensor",
    scale: float = 1.0,
) -> Any:
    r"""Model Breadcrumbs: of each task vector drop the largest and the smallest entries, then sum or vote.

    Of $n$ magnitudes the `int(gamma * n)` largest are dropped (fewer, if less than `density` would be left) and
    of the rest the `int(density * n)` largest kept. Equal magnitudes at either border are all kept.

    Args:
        base, tensors, weights, scope, scale: as in `ties`.
        density: share of entries kept, in [0, 1], one number or K.
        gamma: share dropped from above, in [0, 1], one number or K.
        consensus, weigh, divide: as in `dare`.

    Shapes, dtypes, gradients and errors: as in `ties`.

    Source: Davari, Belilovsky, "Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks", 2023.
    """
    lists = _gathered(base, tensors)
    how = _vote(consensus, weigh, divide)
    shares = _shares("density", density, lists.models)
    tops = _shares("gamma", gamma, lists.models)
    scale = _check.number("scale", scale)
    w = _weights(weights, lists)
    sizes = _group_sizes(lists, scope)
    ranks = [[breadcrumb_ranks(*both, n) for n in sizes] for both in zip(shares, tops)]
    low, high = ([[pair[end] for pair in row] for row in ranks] for end in (0, 1))
    merged = consensus_lists(
        lists.tensors, lists.base, w, low=_thresholds(lists, low, scope),
        high=_thresholds(lists, high, scope), scale=scale, **how,
    )  # fmt: skip
    return lists.result(merged)


def della(
    base: Weights,
    tensors: Sequence[Weights],
    weights: Tensor | Sequence[float] | Sequence[Sequence[float]],
    density: float | Sequence[float],
    *,
    epsilon: float,
    rescale: str | None = "probability",
    consensus: str | None = "mass",
    weigh: str = "before",
    divide: str | None = "weight",
    scale: float = 1.0,
    seed: int | Tensor,
) -> Any:
    r"""DELLA: drop entries of each task vector at random, small ones more often, rescale, vote on the sign.

    In each row (all but the first dimension; a tensor of one dimension is one row) of $n$ entries, the one
    whose magnitude has rank $r$, 0 for the smallest, is kept with probability
    $p_r = \mathrm{density} - \epsilon + 2\epsilon\,r / (n - 1)$. Equal magnitudes rank in order.

    Args:
        base, tensors, weights, scale: as in `ties`.
        density: mean probability to keep an entry, one number or K, with epsilon <= density <= 1 - epsilon.
        epsilon: half the width of the window of probabilities (mergekit's; the paper's is the width).
        rescale: "probability" divides a kept entry by its own $p_r$, "l1" restores the sum of magnitudes of
            each tensor, None neither.
        consensus, weigh, divide: as in `dare`; the defaults are those of the paper and of mergekit.
        seed: as in `dare`.

    Shapes, dtypes and errors: as in `ties`. A composition: the ranks are torch's sort, the masks plain torch,
    the merge core `consensus`.

    Differentiable in weights, tensors and base: masks, probabilities, ratios and elected signs held constant.

    Source: Deep et al., "DELLA-Merging: Reducing Interference in Model Merging through Magnitude-Based
    Sampling", 2024.
    """
    lists = _gathered(base, tensors)
    how = _vote(consensus, weigh, divide)
    _check.choice("rescale", rescale, ("probability", "l1", None))
    shares = _shares("density", density, lists.models)
    epsilon = _check.number("epsilon", epsilon, low=0, high=0.5)
    for share in shares:
        if not epsilon <= share <= 1 - epsilon:
            raise ValueError(
                f"epsilon: expected density - epsilon and density + epsilon in [0, 1], got density "
                f"{share:g} and epsilon {epsilon:g}"
            )
    scale = _check.number("scale", scale)
    w = _weights(weights, lists)
    drop = _Drop(shares, epsilon, rescale, _seed(seed, lists.base[0]))
    return lists.result(_della(lists, w, drop, {"scale": scale, **how}))


class _Drop(NamedTuple):
    """What `della` draws its masks by."""

    density: list[float]
    epsilon: float
    rescale: str | None
    seed: Tensor


def _della(lists: _Lists, w: Tensor, drop: _Drop, how: dict, begin: int = 0) -> list[Tensor]:
    deltas: list[list[Tensor]] = [[] for _ in range(lists.models)]
    every = columns(lists.tensors, lists.base, lists.models)
    for (column, _), key in zip(every, lists.tensor_keys()):
        for k, d in enumerate(column):
            deltas[k].append(d * _ranked_mask(d.detach(), drop, key, k, begin))
    flat = [d for model in deltas for d in model]
    merged = consensus_lists(flat, [], w, **how)
    out = [m if b is None else b + m for (_, b), m in zip(every, merged)]
    return [t.to(_promoted(lists, i)) for i, t in enumerate(out)]


def _promoted(lists: _Lists, item: int) -> torch.dtype:
    dtype = lists.base[item].dtype
    for t in lists.tensors[item :: len(lists.keys)]:
        dtype = torch.promote_types(dtype, t.dtype)
    return dtype


def _ranked_mask(d: Tensor, drop: _Drop, key: int, model: int, begin: int) -> Tensor:
    """0 where dropped, else the factor that makes up for it; d begins at element `begin` of its tensor."""
    density, epsilon, rescale = drop.density[model], drop.epsilon, drop.rescale
    if d.numel() == 0:
        return torch.ones_like(d)
    rows = d.reshape(d.shape[0] if d.dim() > 1 else 1, -1)
    order = rows.abs().argsort(dim=1, stable=True)
    places = torch.arange(rows.shape[1], device=d.device).expand_as(order)
    ranks = torch.empty_like(order).scatter_(1, order, places)
    p = torch.full(rows.shape, density, dtype=torch.float64, device=d.device)
    if rows.shape[1] > 1:
        p = density - epsilon + 2 * epsilon * ranks.double() / (rows.shape[1] - 1)
    words = random_words(drop.seed, key, model, d.numel(), begin=begin).view(rows.shape)
    kept = words < (p * 2.0**32).round()
    if rescale == "probability":
        factor = torch.where(kept, 1 / p, 0)
    elif rescale == "l1":
        size = rows.double().abs()
        left = torch.where(kept, size, 0).sum()
        factor = kept * torch.where(left > 0, size.sum() / left, 1)
    else:
        factor = kept
    return factor.to(d.dtype).view(d.shape)
