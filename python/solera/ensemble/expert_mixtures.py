"""Mixtures of experts over sequences, with a posterior over the experts: a few lines over core `logit_mixture`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _check
from .._registry import accumulate_type
from ..norm._labels import labels
from ._logits import Members, member_logits
from .logit_mixture import PROBABILITY, combine, mixture_scores


class MixtureNLL(NamedTuple):
    """What `mixture_nll` returns. Shapes: `nll` (B,) of each sequence; `log_posterior` (J, B) after it."""

    nll: Tensor
    log_posterior: Tensor


def _expert_logits(logits: Tensor | Sequence[Tensor], form: str, first: str, rank: int) -> Members:
    members = member_logits(logits, 0)
    if len(members.shape) != rank:
        raise ValueError(
            f"logits: expected ({first}, {form}) or a list of {first} tensors ({form}), "
            f"got {members.count} of shape {(*members.shape, members.classes)}"
        )
    return members


def _log_weights(name: str, value: object, members: Members, batch: int) -> Tensor:
    """(J, batch) of (J,) or (J, batch)."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    wide = value.dim() == 2
    shape = (members.count, batch) if wide else (members.count,)
    _check.like(name, value, shape, members.first, "logits")
    value = value.to(accumulate_type(members.first))
    return value if wide else value[:, None].expand(-1, batch)


def mixture_nll(
    logits: Tensor | Sequence[Tensor],
    target: Tensor,
    log_prior: Tensor,
    *,
    ignore_index: int = -100,
) -> MixtureNLL:
    r"""Negative log-likelihood of sequences under a mixture of experts with a posterior over them.

    The mixture predicts token t by $\sum_j p_j(x_t \mid x_{<t})\,p(j \mid x_{<t})$ with the posterior
    $p(j \mid x_{<t}) \propto \pi_j \prod_{s<t} p_j(x_s \mid x_{<s})$. The sum over a sequence telescopes:

    $$-\sum_t \log p(x_t \mid x_{<t}) = \log\sum_j \pi_j - \log\sum_j \pi_j \prod_t p_j(x_t \mid x_{<t}),$$

    so no posterior of a token is needed, and with $r_j$ the posterior after the whole sequence the gradient is
    $\partial/\partial z_{jt} = r_j\,(\mathrm{softmax}(z_{jt}) - \mathrm{onehot}(x_t))$. The logits are read once
    forward and once backward; probabilities are never stored. Experts may be of any size: only their vocabulary is
    shared.

    Args:
        logits: (J, B, T, V), or a list of J tensors (B, T, V), one an expert.
        target: (B, T) int64; `ignore_index` marks the places that do not count (padding of ragged sequences).
        log_prior: (J,) or (J, B), log pi, not necessarily normalised; -inf leaves an expert out.

    Shapes: (J, B, T, V), (B, T), (J,) -> nll (B,), log_posterior (J, B), in float32 (float64 for float64).
    Divide `nll.sum()` by the number of tokens and exponentiate for a perplexity. Gradients go to logits and prior.

    Raises:
        ValueError, TypeError, IndexError: naming the argument that does not fit.

    Source: Li et al., "Branch-Train-Merge: Embarrassingly Parallel Training of Expert Language Models", 2022; "HDEE:
    Heterogeneous Domain Expert Ensemble", 2025 (experts of several sizes). The telescoped form and its gradient
    are derived here: each predictive probability is the quotient of two successive evidences
    $\sum_j \pi_j \prod_{s \le t} p_j$.
    """
    members = _expert_logits(logits, "B, T, V", "J", 2)
    batch, length = members.shape
    y = labels("target", target, members.shape, members.classes, members.first.device, ignore_index)
    prior = _log_weights("log_prior", log_prior, members, batch)
    score = mixture_scores(members.tensors, y).reshape(members.count, batch, length).sum(2)
    joint = prior + score
    evidence = joint.logsumexp(0)
    return MixtureNLL(prior.logsumexp(0) - evidence, joint - evidence)


def mixture_next(
    logits: Tensor | Sequence[Tensor], log_posterior: Tensor, top_k: int | None = None
) -> Tensor:
    r"""Log-probabilities of the next token: $\log\sum_j p(j \mid x_{<t})\,\mathrm{softmax}(z_j)$.

    Args:
        logits: (J, B, V), or a list of J tensors (B, V).
        log_posterior: (J,) or (J, B); normalised here.
        top_k: keep the k most probable experts of each sequence, renormalised; None keeps all.

    Shapes: (J, B, V), (J, B) -> (B, V). Gradients go to both.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Li et al., "Branch-Train-Merge", 2022 (the output ensemble and its sparse form).
    """
    members = _expert_logits(logits, "B, V", "J", 1)
    posterior = _log_weights("log_posterior", log_posterior, members, members.shape[0])
    if top_k is not None:
        if isinstance(top_k, bool) or not isinstance(top_k, int) or not 1 <= top_k <= members.count:
            raise ValueError(f"top_k: expected None or 1 to {members.count}, got {top_k!r}")
        held = torch.zeros_like(posterior, dtype=torch.bool)
        held = held.scatter(0, posterior.topk(top_k, 0).indices, True)
        posterior = torch.where(held, posterior, float("-inf"))
    return combine(members.tensors, posterior.softmax(0).t().contiguous(), PROBABILITY)


def posterior_update(log_posterior: Tensor, token_log_prob: Tensor) -> Tensor:
    r"""The posterior over experts after one more token.

    $\log p(j \mid x_{\le t}) = \mathrm{logsoftmax}_j(\log p(j \mid x_{<t}) + \log p_j(x_t \mid x_{<t}))$. Composition.

    Shapes: (J, ...), (J, ...) -> (J, ...).

    Source: Li et al., "Branch-Train-Merge", 2022.
    """
    _check.tensor("log_posterior", log_posterior, min_dim=1)
    _check.tensor("token_log_prob", token_log_prob, min_dim=1)
    if log_posterior.shape != token_log_prob.shape:
        raise ValueError(
            f"token_log_prob: expected shape {tuple(log_posterior.shape)}, "
            f"got {tuple(token_log_prob.shape)}"
        )
    _check.same_device("token_log_prob", token_log_prob, log_posterior, "log_posterior")
    return (log_posterior + token_log_prob).log_softmax(0)


def domain_prior_scan(
    sequence_log_prob: Tensor, decay: float = 0.3, *, convention: str = "btm"
) -> Tensor:
    r"""A prior over experts from N development sequences, in their order, for `mixture_nll`.

    - "btm": $\pi_j \propto \sum_{i=1}^N \lambda^i\,p(j \mid x^{(i)})$, the posteriors under a uniform prior.
    - "hdee": $\pi \leftarrow \lambda^i \pi + p(\cdot \mid x^{(i)})$ from $\pi = 1$, the posterior of sequence i under
      the prior so far: the old prior shrinks by a power that grows with i, so the last sequence counts most.

    Args:
        sequence_log_prob: (J, N), the log-probability of each whole sequence under each expert.
        decay: lambda, in (0, 1].

    Shapes: (J, N) -> (J,), log pi, normalised. Composition.

    Source: Li et al., "Branch-Train-Merge", 2022 (N = 100, lambda = 0.3; the weights' form from knowledge of the
    paper); "HDEE", 2025, whose public code has the second form.
    """
    _check.tensor("sequence_log_prob", sequence_log_prob, dim=2)
    _check.choice("convention", convention, ("btm", "hdee"))
    decay = _check.number("decay", decay, low=0.0, high=1.0)
    if decay == 0.0:
        raise ValueError("decay: expected a number in (0, 1], got 0")
    x = sequence_log_prob.to(accumulate_type(sequence_log_prob))
    if convention == "btm":
        power = torch.arange(1, x.shape[1] + 1, device=x.device, dtype=x.dtype) * math.log(decay)
        return (x.log_softmax(0) + power).logsumexp(1).log_softmax(0)
    log_prior = x.new_zeros(x.shape[0])
    for i, sequence in enumerate(x.unbind(1), 1):
        posterior = (log_prior + sequence).log_softmax(0)
        log_prior = torch.logaddexp(log_prior + i * math.log(decay), posterior)
    return log_prior.log_softmax(0)


def bayes_mixture_nll(
    logits: Tensor | Sequence[Tensor],
    target: Tensor,
    log_weights: Tensor,
    *,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor]:
    r"""The sequential Bayesian mixture: each row is predicted by the models weighted by the rows before it.

    $q(y_t) = \sum_k w_k\,p_k(y_t)$ with $\log w \leftarrow \log w + \log p_k(y_t) - \log q(y_t)$ after each row. With
    the cumulative scores $S_{kt} = \log w_k + \sum_{s \le t} \log p_k(y_s)$ that is
    $-\log q(y_t) = \mathrm{lse}_k S_{k,t-1} - \mathrm{lse}_k S_{kt}$: one read of the logits and a cumulative sum.

    Args:
        logits: (K, T, C), or a list of K tensors (T, C): rows in the order of time.
        target: (T,) int64; rows with `ignore_index` predict nothing and update nothing.
        log_weights: (K,), the log prior weights, normalised here.

    Shapes: (K, T, C), (T,), (K,) -> nll (T,), log_weights (K,) after the last row. Gradients go to logits and weights.

    Raises:
        ValueError, TypeError, IndexError: naming the argument that does not fit.

    Source: "The Universality Lens: Why Even Highly Over-Parametrized Models Learn Well", 2025 (the mixture learner;
    its form over finitely many models from knowledge, the cumulative form derived here).
    """
    members = _expert_logits(logits, "T, C", "K", 1)
    y = labels("target", target, members.shape, members.classes, members.first.device, ignore_index)
    prior = _log_weights("log_weights", log_weights, members, 1).log_softmax(0)
    score = mixture_scores(members.tensors, y)
    joint = torch.cat([prior, prior + score.cumsum(1)], 1)
    evidence = joint.logsumexp(0)
    return evidence[:-1] - evidence[1:], joint[:, -1] - evidence[-1]
