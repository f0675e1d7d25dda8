r"""Core `member_statistics`: what K members say about each row together, in one read of their logits.

For logits $z_{nk}$ (C,) with $p_{nk} = \mathrm{softmax}(z_{nk})$ (the row index n is left out):

$$\bar p = \tfrac1K\sum_k p_k,\qquad V_c = \tfrac1K\sum_k (p_{kc} - \bar p_c)^2,\qquad
  T = -\sum_c \bar p_c\log\bar p_c,\qquad A = \tfrac1K\sum_k H_k,\quad H_k = -\sum_c p_{kc}\log p_{kc},$$

mutual information $I = T - A$; with $t_k = \arg\max_c z_{kc}$ and $n_c$ the members whose top is c, the vote is
$\arg\max_c n_c$ (the lowest such class) and disagreement the share of pairs of members with different tops,
$D = 1 - \sum_c n_c(n_c - 1) / (K(K-1))$.

The gradient. Constants added to $\mathrm{d}p_k$ do not pass the softmax, so with
$u_c = \mathrm{d}\bar p_c - \mathrm{d}T\log\bar p_c - 2\,\mathrm{d}V_c\,\bar p_c$

$$s_{kc} = u_c + 2\,\mathrm{d}V_c\,p_{kc} - \mathrm{d}A\log p_{kc},\qquad
  \mathrm{d}z_{kc} = \tfrac1K\,p_{kc}\Bigl(s_{kc} - \sum_j p_{kj}s_{kj}\Bigr),$$

which needs the logits, their softmaxes' maxima and sums and $\bar p$: u is made once a row, each member's row is
read once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _check
from .._autograd import differentiable_vjp
from .._registry import accumulate_type, reference
from .._route import needs_graph, use_reference
from ._groups import check_group, summed_over, world_members
from ._logits import Members, member_logits, stacked, unstacked

_op = torch.ops.solera

MEAN, VARIANCE, ENTROPIES, VOTES, TOPS = 1, 2, 4, 8, 16
OUTPUTS = (
    "mean",
    "variance",
    "total_entropy",
    "aleatoric",
    "mutual_information",
    "disagreement",
    "vote",
)
FLAGS = dict(zip(OUTPUTS, (MEAN, VARIANCE, ENTROPIES, ENTROPIES, ENTROPIES, VOTES, VOTES)))


# ---- reference ---------------------------------------------------------------------------------------


def _entropy(p: Tensor) -> Tensor:
    """-sum p log p over the classes, 0 log 0 = 0."""
    return -(p * p.clamp(min=torch.finfo(p.dtype).tiny).log()).sum(-1)


def smooth_statistics(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(mean, variance, total, aleatoric), as plain torch."""
    z = stacked(tensors)
    p = z.to(accumulate_type(z)).softmax(-1)
    mean = p.mean(1)
    variance = (p - mean.unsqueeze(1)).square().mean(1)
    return mean, variance, _entropy(mean), _entropy(p).mean(1)


def row_sums(z: Tensor) -> Tensor:
    """(N, K, 2): the largest value of each row and 1 / sum e^(z - largest)."""
    top = z.amax(-1, keepdim=True)
    return torch.stack([top[..., 0], 1 / (z - top).exp().sum(-1)], -1)


def vote_statistics(counts: Tensor, members: int | Tensor) -> tuple[Tensor, Tensor]:
    """(disagreement, vote) from how many members have each class on top, (N, C)."""
    pairs = (counts * (counts - 1)).sum(1)
    among = members * (members - 1)
    least = among.clamp(min=1) if isinstance(among, Tensor) else torch.sym_max(among, 1)
    return (among - pairs) / least, counts.argmax(1)


def _counts(top: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
    ones = torch.ones((), dtype=dtype, device=top.device).expand_as(top)
    return torch.zeros(top.shape[0], classes, dtype=dtype, device=top.device).scatter_add(
        1, top, ones
    )


@reference("member_statistics")
def _member_statistics(logits, wanted):
    z = stacked(logits)
    z = z.to(accumulate_type(z))
    none, no_index = z.new_empty(0), z.new_empty(0, dtype=torch.int64)
    mean, variance, total, aleatoric = smooth_statistics([z])
    top = z.argmax(-1)
    disagreement, vote = vote_statistics(_counts(top, z.shape[2], z.dtype), z.shape[1])
    smooth = wanted & (MEAN | VARIANCE | ENTROPIES)
    keep = lambda t, flag: t.contiguous() if wanted & flag else none.clone()
    return (
        mean.contiguous() if smooth else none.clone(),
        keep(variance, VARIANCE),
        keep(total, ENTROPIES),
        keep(aleatoric, ENTROPIES),
        row_sums(z) if smooth else none.clone(),
        keep(disagreement, VOTES),
        vote.contiguous() if wanted & VOTES else no_index.clone(),
        top.contiguous() if wanted & TOPS else no_index.clone(),
    )


@reference("member_statistics_backward")
def _member_statistics_backward(logits, sums, mean, dmean, dvariance, dtotal, daleatoric):
    z = stacked(logits).to(mean.dtype)
    finfo = torch.finfo(mean.dtype)
    top, inverse = sums.unsqueeze(-2).unbind(-1)
    logs = (z - top + inverse.log()).clamp(min=finfo.min)
    p = (z - top).exp() * inverse
    s = torch.zeros_like(mean) if dmean is None else dmean
    if dtotal is not None:
        s = s - dtotal[:, None] * mean.clamp(min=finfo.tiny).log()
    s = s.unsqueeze(1).expand_as(p)
    if dvariance is not None:
        s = s + 2 * dvariance.unsqueeze(1) * (p - mean.unsqueeze(1))
    if daleatoric is not None:
        s = s - daleatoric[:, None, None] * logs
    d = p * (s - (p * s).sum(-1, keepdim=True)) / z.shape[1]
    d = d.to(logits[0].dtype)
    if logits[0].dim() == 2:
        d = d.transpose(0, 1)
    return d.clone(memory_format=torch.contiguous_format)


# ---- autograd ----------------------------------------------------------------------------------------


class _MemberStatistics(torch.autograd.Function):
    @staticmethod
    def forward(ctx, wanted, *tensors):
        out = _op.member_statistics(tensors, wanted)
        mean, _, _, _, sums, disagreement, vote, top = out
        ctx.save_for_backward(sums, mean, *tensors)
        ctx.mark_non_differentiable(sums, disagreement, vote, top)
        ctx.set_materialize_grads(False)
        return out

    @staticmethod
    def backward(ctx, dmean, dvariance, dtotal, daleatoric, *_):
        sums, mean, *tensors = ctx.saved_tensors
        grads = (dmean, dvariance, dtotal, daleatoric)
        if torch.is_grad_enabled():
            statistics = lambda *tensors: smooth_statistics(tensors)
            needs = ctx.needs_input_grad[1:]
            return None, *differentiable_vjp(statistics, tensors, needs, grads)
        dlogits = _op.member_statistics_backward(tensors, sums, mean, *grads)
        return None, *unstacked(dlogits, tensors)


def member_statistics(tensors: Sequence[Tensor], wanted: int) -> tuple[Tensor, ...]:
    """(mean, variance, total, aleatoric, sums, disagreement, vote, top) in the accumulator's dtype.

    What no flag of `wanted` asks for is an empty tensor; the first four are differentiable. mean and sums come with any
    of MEAN, VARIANCE and ENTROPIES.
    """
    if use_reference():
        z = stacked(tensors)
        top = z.argmax(-1)
        votes = vote_statistics(_counts(top, z.shape[2], accumulate_type(z)), z.shape[1])
        sums = row_sums(z.detach().to(accumulate_type(z)))
        return *smooth_statistics(tensors), sums, *votes, top
    if wanted & (MEAN | VARIANCE | ENTROPIES) and needs_graph(*tensors):
        return _MemberStatistics.apply(wanted, *tensors)
    return _op.member_statistics(tensors, wanted)


# ---- public function ---------------------------------------------------------------------------------


def ensemble_statistics(
    logits: Tensor | Sequence[Tensor],
    *,
    outputs: Sequence[str] = OUTPUTS,
    member_dim: int = 1,
    group: torch.distributed.ProcessGroup | None = None,
) -> dict[str, Tensor]:
    r"""Statistics of the members' predictions, in one read of their logits.

    With p_k the softmax of member k's logits and $\bar p$ their mean:

    - "mean": $\bar p$, (B, C); "variance": $\frac1K\sum_k (p_k - \bar p)^2$, (B, C);
    - "total_entropy": $H(\bar p)$; "aleatoric": $\frac1K\sum_k H(p_k)$; "mutual_information": their
      difference, in nats;
    - "disagreement": the share of pairs of members whose largest logits are in different classes (0 for one member);
    - "vote": int64, the class that most members have on top (the lowest of several).

    Args:
        logits: (B, K, C); or any (..., C) with its members along `member_dim`, whose other dimensions are
            rows; or a list of K tensors (..., C). float32, float64, bfloat16 or float16, any strides; computed in
            float32 (float64 for float64), returned in the logits' dtype.
        outputs: which of them, in any order; only those are computed.
        group: a process group whose ranks each hold some members, of the same rows. Only (B, C)-sized sums travel. Each
            rank gets the statistics of the whole ensemble and, if all ranks use them alike, the gradient to
            its own members (backward sends nothing).

    Returns a dict by the names in `outputs`. All but disagreement and vote are differentiable.

    Shapes: (B, K, C) -> (B, C) for mean and variance, (B,) for the others.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: definitions as in torch-uncertainty (MutualInformation, Disagreement, Entropy); Depeweg et al.,
    "Decomposition of Uncertainty in Bayesian Deep Learning", 2018.
    """
    names = _names(outputs)
    check_group(group)
    members = member_logits(logits, member_dim)
    if members.classes == 0:
        raise ValueError(
            f"logits: expected at least one class, got shape {tuple(members.first.shape)}"
        )
    wanted = 0
    for name in names:
        wanted |= FLAGS[name]
    if group is None:
        mean, variance, total, aleatoric, _, disagreement, vote, _ = member_statistics(
            members.tensors, wanted
        )
    else:
        mean, variance, total, aleatoric, disagreement, vote = _spread(members, wanted, group)
    found = {
        "mean": mean,
        "variance": variance,
        "total_entropy": total,
        "aleatoric": aleatoric,
        "disagreement": disagreement,
        "vote": vote,
    }
    if "mutual_information" in names:
        found["mutual_information"] = total - aleatoric
    dtype = members.first.dtype
    result = {}
    for name in names:
        value = found[name]
        value = value.reshape((*members.shape, *value.shape[1:]))
        result[name] = value if name == "vote" else value.to(dtype)
    return result


def _names(outputs: Sequence[str]) -> tuple[str, ...]:
    if isinstance(outputs, str):
        raise TypeError(f"outputs: expected a sequence of names, got the string {outputs!r}")
    names = tuple(outputs)
    for name in names:
        _check.choice("outputs", name, OUTPUTS)
    return names


def _spread(members: Members, wanted: int, group) -> tuple[Tensor, ...]:
    """The statistics of the members of all ranks, from each rank's own.

    The means are added up first: the variances, about the mean of all members, do not cancel.
    """
    local = wanted & ~VOTES | (TOPS if wanted & VOTES else 0)
    mean, variance, total, aleatoric, _, disagreement, vote, top = member_statistics(
        members.tensors, local
    )
    count = members.count
    everyone = world_members(count, mean, group)
    if wanted & (MEAN | VARIANCE | ENTROPIES):
        own, mean = mean, summed_over(count * mean, group) / everyone
        if wanted & VARIANCE:
            variance = (
                summed_over(count * (variance + (own - mean.detach()).square()), group) / everyone
            )
        if wanted & ENTROPIES:
            total = _entropy(mean)
            aleatoric = summed_over(count * aleatoric, group) / everyone
    if wanted & VOTES:
        acc = accumulate_type(members.first)
        counts = summed_over(_counts(top, members.classes, acc), group)
        disagreement, vote = vote_statistics(counts, everyone)
    return mean, variance, total, aleatoric, disagreement, vote
