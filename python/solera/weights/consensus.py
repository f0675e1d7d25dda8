r"""Core `consensus`: task vectors $d_k = w_k - b$, trimmed or dropped, merged by a vote on the sign.

With $f_k$ a factor (1, or what makes up for the dropped), $c_k = \lambda_k f_k$ and $\lambda_k$ the weights:

$$\mathrm{kept}_k = [\,\mathrm{low}_k \le |d_k| \le \mathrm{high}_k\,]
  \quad\text{or}\quad [\,\mathrm{word}_k < \mathrm{keep}_k\,]$$
$$u_k = c_k d_k \text{ (weighed before the vote) or } f_k d_k,\qquad
  s = \begin{cases} + & \sum_{u_k > 0} |u_k| \ge \sum_{u_k < 0} |u_k| \\ - & \text{else}\end{cases}$$
$$\mathrm{out} = b + \mathrm{scale}\;\frac{\sum_{k \in S} c_k d_k}{D},\qquad
  S = \{k : \mathrm{kept}_k,\ \mathrm{sign}\,u_k = s\}$$

$D$ is $\sum_S \lambda_k$, the number of members of $S$, or 1; where it is below 1e-8 it is 1. Voting by count
compares the numbers of positive and negative $u_k$; without a vote $S$ is all that is kept and $D = 1$. A NaN
is never dropped by a threshold and shows in its own element.

**Gradients.** Masks, thresholds, factors and elected signs are held constant (they are so almost everywhere,
but for a factor that is a ratio of norms). With $G$ the gradient of out, $H = \mathrm{scale}\,G / D$:

$$\mathrm{d}w_k = [k \in S]\, c_k H,\qquad \mathrm{d}b = G - \sum_k \mathrm{d}w_k,\qquad
  \mathrm{d}\lambda_k = \sum [k \in S]\, H\,(f_k d_k - m)$$

with $m = \sum_S c_k d_k / D$ where $D$ depends on the weights, else 0.

Computed in float32 (float64 where a tensor is float64), products and sums rounded one by one in the order of
the models, so that the bits are the same on every backend. Random words: `_random.py`, stream = model.

Sources: TIES, Yadav et al., 2023; DARE, Yu et al., 2023.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._registry import reference
from .._route import use_reference
from ._random import random_words
from .abs_quantile import columns, refuse_mismatch

_op = torch.ops.solera
VOTES = (None, "mass", "count")
DIVISORS = (None, "weight", "count")
LEAST_DIVISOR = 1e-8


class Rule(NamedTuple):
    """The arguments of the ops that say what is kept and how it is merged."""

    factors: Tensor | None
    low: Tensor | None
    high: Tensor | None
    seed: Tensor | None
    keys: list[int]
    keep: list[int]
    vote: int
    before: bool
    divide: int
    scale: float
    begins: Sequence[int] = ()


# ---- reference ---------------------------------------------------------------------------------------


def _kept(d: Tensor, k: int, item: int, rule: Rule) -> Tensor:
    if rule.seed is not None:
        begin = rule.begins[item] if rule.begins else 0
        words = random_words(rule.seed, rule.keys[item], k, d.numel(), begin=begin)
        return (words < rule.keep[k]).view(d.shape)
    size, dropped = d.detach().abs(), torch.zeros_like(d, dtype=torch.bool)
    if rule.low is not None:
        dropped = dropped | (size < rule.low[k, item].to(d.dtype))
    if rule.high is not None:
        dropped = dropped | (size > rule.high[k, item].to(d.dtype))
    return ~dropped


def _merge(deltas: Sequence[Tensor], weights: Tensor, item: int, rule: Rule) -> Tensor:
    """scale * (sum of those that agree) / divisor."""
    acc = deltas[0].dtype
    sums, divisors, masses = ([torch.zeros_like(deltas[0]) for _ in range(2)] for _ in range(3))
    for k, d in enumerate(deltas):
        kept = _kept(d, k, item, rule)
        wide = weights[k, item].double()
        factor = torch.ones_like(wide) if rule.factors is None else rule.factors[k, item].double()
        value = d * (wide * factor).to(acc)
        if rule.vote == 0:
            sums[0] = sums[0] + torch.where(kept, value, 0)
            continue
        u = value.detach() if rule.before else d.detach() * factor.detach().to(acc)
        for side, agrees in enumerate((kept & ~(u <= 0), kept & (u < 0))):
            mass = u.abs() if VOTES[rule.vote] == "mass" else torch.ones_like(u)
            divisor = wide.to(acc) if DIVISORS[rule.divide] == "weight" else torch.ones_like(u)
            sums[side] = sums[side] + torch.where(agrees, value, 0)
            divisors[side] = divisors[side] + torch.where(agrees, divisor, 0)
            masses[side] = masses[side] + torch.where(agrees, mass, 0)
    if rule.vote == 0:
        return sums[0] * rule.scale
    negative = masses[0] < masses[1]
    merged = torch.where(negative, sums[1], sums[0]) * rule.scale
    if rule.divide == 0:
        return merged
    divisor = torch.where(negative, divisors[1], divisors[0])
    return merged / torch.where(divisor.abs() < LEAST_DIVISOR, 1, divisor)


def consensus_reference(
    tensors: Sequence[Tensor], base: Sequence[Tensor], weights: Tensor, *rest
) -> list[Tensor]:
    """The formula on K * L tensors (model by model) and L base tensors or none; itself differentiable."""
    rule, models = Rule(*rest), weights.shape[0]
    length = len(tensors) // models
    refuse_mismatch("consensus", [*tensors, *base], tensors[:length])
    out = []
    for item, (deltas, b) in enumerate(columns(tensors, base, models)):
        every = [*tensors[item::length], *base[item : item + 1]]
        dtype = every[0].dtype
        for t in every:
            dtype = torch.promote_types(dtype, t.dtype)
        merged = _merge(deltas, weights, item, rule)
        out.append((merged if b is None else merged + b).to(dtype))
    return out


@reference("consensus")
def _consensus(tensors, base, weights, *rest):
    return [t.contiguous() for t in consensus_reference(tensors, base, weights, *rest)]


def consensus_vjp(grads, tensors, base, weights, *args):
    """(dweights (K, L) or empty, gradients of the tensors asked for) by autograd of the reference, itself
    differentiable where gradients are on.
    """
    *rest, need_weights, need_tensors = args
    again = torch.is_grad_enabled()
    with torch.enable_grad():

        def start(t: Tensor, need: bool) -> Tensor:
            # A view of its own: gradients stop here even if one input was computed from another.
            t = t.view_as(t) if again else t.detach()
            return t.requires_grad_() if need and not t.requires_grad else t

        flat = [start(t, need) for t, need in zip((*tensors, *base), need_tensors)]
        w = start(weights, need_weights)
        out = consensus_reference(flat[: len(tensors)], flat[len(tensors) :], w, *rest)
        wanted = [w] * need_weights + [t for t, need in zip(flat, need_tensors) if need]
        found = torch.autograd.grad(
            out, wanted, list(grads), create_graph=again, materialize_grads=True
        )
    dweights = found[0].double() if need_weights else weights.new_empty(0, dtype=torch.float64)
    return dweights, list(found[need_weights:])


@reference("consensus_backward")
def _consensus_backward(*args):
    with torch.no_grad():
        dweights, found = consensus_vjp(*args)
    return dweights.contiguous(), [t.contiguous() for t in found]


@reference("consensus_norms")
def consensus_norms_reference(tensors, base, seed, keys, keep, begins=()):
    """(2, K, L): sum |w - base| over all elements and over those that the random words keep."""
    rule = Rule(None, None, None, seed, keys, keep, 0, True, 0, 1.0, list(begins))
    out = []
    for item, (deltas, _) in enumerate(columns(tensors, base, len(keep))):
        sizes = [d.double().abs() for d in deltas]
        masks = [_kept(d, k, item, rule) for k, d in enumerate(deltas)]
        kept = [torch.where(m, s, 0) for m, s in zip(masks, sizes)]
        out.append(torch.stack([torch.stack([s.sum() for s in group]) for group in (sizes, kept)]))
    return torch.stack(out, 2)


# ---- autograd ----------------------------------------------------------------------------------------


class _Consensus(torch.autograd.Function):
    """weights and the K * L tensors followed by the base's L (or none) -> L tensors."""

    @staticmethod
    def forward(ctx, weights, length, rule, *flat):
        split = weights.shape[0] * length
        if rule.begins:
            raise RuntimeError("consensus: a part of a tensor is merged without gradients")
        ctx.split, ctx.rest = split, rule[4:-1]
        ctx.save_for_backward(weights, *rule[:4], *flat)
        return tuple(_op.consensus(flat[:split], flat[split:], weights, *rule))

    @staticmethod
    def backward(ctx, *grads):
        weights, factors, low, high, seed, *flat = ctx.saved_tensors
        tensors, base = flat[: ctx.split], flat[ctx.split :]
        need_weights, need_tensors = ctx.needs_input_grad[0], list(ctx.needs_input_grad[3:])
        backward = consensus_vjp if torch.is_grad_enabled() else _op.consensus_backward
        dweights, found = backward(
            grads, tensors, base, weights, factors, low, high, seed, *ctx.rest,
            need_weights, need_tensors,
        )  # fmt: skip
        given = iter(found)
        dtensors = [next(given) if need else None for need in need_tensors]
        return dweights.to(weights.dtype) if need_weights else None, None, None, *dtensors


def consensus_lists(
    tensors: Sequence[Tensor],
    base: Sequence[Tensor],
    weights: Tensor,
    *,
    factors: Tensor | None = None,
    low: Tensor | None = None,
    high: Tensor | None = None,
    seed: Tensor | None = None,
    keys: Sequence[int] = (),
    keep: Sequence[int] = (),
    vote: str | None = None,
    before: bool = True,
    divide: str | None = None,
    scale: float = 1.0,
    begins: Sequence[int] = (),
) -> Sequence[Tensor]:
    """The op on flat lists: K * L tensors, model by model, L base tensors or none, weights (K, L).

    factors, low, high (K, L); seed with keys (L) and keep (K) bounds of random words, or thresholds; begins (L), where
    each tensor begins in the one that its words are drawn for. What the arguments mean is said above; results are
    new, contiguous, of the promoted dtype of what goes in.
    """
    rule = Rule(
        factors, low, high, seed, list(keys), list(keep), VOTES.index(vote), before,
        DIVISORS.index(divide), float(scale), list(begins),
    )  # fmt: skip
    if use_reference():
        return consensus_reference(tensors, base, weights, *rule)
    every = (weights, *tensors, *base)
    if torch.is_grad_enabled() and any([t.requires_grad for t in every]):
        length = len(tensors) // weights.shape[0]
        return _Consensus.apply(weights, length, rule, *tensors, *base)
    return _op.consensus(tensors, base, weights, *rule)
