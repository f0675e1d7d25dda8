"""Several models' logits as one row of log-probabilities: a few lines over core `logit_mixture`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import _check
from .._registry import accumulate_type
from ._logits import Members, member_logits
from .logit_mixture import KINDS, LOG_PROBABILITY, LOGIT, PROBABILITY, combine


def _row_weights(weights: object, members: Members) -> Tensor:
    """(N, K) of (K,), (..., K), a list of numbers or None (1/K each)."""
    first = members.first
    acc = accumulate_type(first)
    rows = math.prod(members.shape)
    if weights is None:
        weights = torch.full((members.count,), 1.0 / members.count, dtype=acc, device=first.device)
    elif not isinstance(weights, Tensor):
        try:
            weights = torch.tensor(weights, dtype=acc, device=first.device)
        except (TypeError, ValueError):
            raise TypeError(
                f"weights: expected a tensor or a list of numbers, got {type(weights).__name__}"
            ) from None
    shape = (members.count,) if weights.dim() == 1 else (*members.shape, members.count)
    _check.like("weights", weights, shape, first, "logits")
    weights = weights.to(acc)
    if weights.dim() > 1:
        weights = weights.reshape(rows, members.count)
    return weights.expand(rows, members.count).contiguous()


def combine_logits(
    logits: Tensor | Sequence[Tensor],
    weights: Tensor | Sequence[float] | None = None,
    *,
    space: str = "logit",
    plausibility: float | None = None,
    reference: int = 0,
    temperature: float = 1.0,
    normalize: bool = True,
    member_dim: int = 1,
) -> Tensor:
    r"""Several models' logits as one row: $\sum_m w_m z_m / \tau$, by default as log-probabilities.

    Classifier-free guidance is weights (1 + g, -g) of conditional and unconditional logits, or (s, 1 - s);
    contrastive decoding (1, -1) of expert and amateur with `plausibility`; a delta ensemble (1, b, -b) of large,
    tuned and original model; two-view decoding (1, alpha) with `plausibility`; the logit average is weights None.

    Args:
        logits: (..., K, C) with its members along `member_dim`, or a list of K tensors (..., C).
        weights: (K,), one set a row (..., K), or None for 1/K each; may be negative.
        space: "logit" adds the logits, "log_probability" their log-softmaxes (the same after normalising).
        plausibility: beta in (0, 1]: classes whose probability under model `reference` is below beta times its
            largest get -inf. None keeps all.
        temperature: tau, positive; applied before normalising.
        normalize: log-probabilities over the classes kept.

    Shapes: (..., K, C), (K,) -> (..., C), the logits' dtype. Gradients go to logits and weights.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Li et al., "Contrastive Decoding", 2022 (plausibility); "AGLA: Mitigating Object Hallucinations in Large
    Vision-Language Models with Assembly of Global and Local Attention", 2024 (two views); Hewitt et al., "Model
    Editing with Canonical Examples", 2024 (the delta ensemble; its scaled difference from knowledge).
    """
    members = member_logits(logits, member_dim)
    _check.choice("space", space, KINDS[:2])
    if members.classes == 0:
        raise ValueError("logits: expected at least one class, got 0")
    tau = _check.number("temperature", temperature, low=0.0)
    if tau == 0.0:
        raise ValueError("temperature: expected a positive number, got 0")
    beta = 0.0 if plausibility is None else _check.number("plausibility", plausibility, high=1.0)
    if plausibility is not None and beta <= 0.0:
        raise ValueError(f"plausibility: expected None or a number in (0, 1], got {plausibility!r}")
    if not isinstance(reference, int) or not -members.count <= reference < members.count:
        raise ValueError(
            f"reference: expected a member, 0 to {members.count - 1}, got {reference!r}"
        )
    kind = LOGIT if space == "logit" else LOG_PROBABILITY
    out = combine(
        members.tensors, _row_weights(weights, members), kind, temperature=tau, plausibility=beta,
        anchor=reference % members.count, normalize=normalize,
    )  # fmt: skip
    return out.reshape(*members.shape, members.classes)


def mix_log_probs(
    logits: Tensor | Sequence[Tensor],
    weights: Tensor | Sequence[float] | None = None,
    *,
    member_dim: int = 1,
) -> Tensor:
    r"""Log-probabilities of a mixture: $\log\sum_m w_m\,\mathrm{softmax}(z_m)$, normalised over the classes.

    Log-probabilities may be given in the logits' place (their log-softmax is themselves). Adaptive smoothing mixes
    an accurate and a robust model by a weight a row: `mix_log_probs([g, h], torch.stack([1 - a, a], -1))`.

    Args:
        logits: (..., K, C) with its members along `member_dim`, or a list of K tensors (..., C).
        weights: (K,) or one set a row (..., K), not negative; None is 1/K each.

    Shapes: (..., K, C), (..., K) -> (..., C), the logits' dtype. Gradients go to both. Finite where probabilities
    underflow.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Bai et al., "Improving the Accuracy-Robustness Trade-Off of Classifiers via Adaptive Smoothing", 2023.
    """
    members = member_logits(logits, member_dim)
    if members.classes == 0:
        raise ValueError("logits: expected at least one class, got 0")
    out = combine(members.tensors, _row_weights(weights, members), PROBABILITY)
    return out.reshape(*members.shape, members.classes)


def knn_mix_log_probs(
    logits: Tensor,
    ids: Tensor,
    distances: Tensor,
    *,
    tau: float,
    temperature: float | None = None,
) -> Tensor:
    r"""Next-token log-probabilities mixed with those of k retrieved neighbours.

    $p = \lambda\,p_{knn} + (1 - \lambda)\,p_{nmt}$ with $\lambda = \mathrm{relu}(1 - d_0/\tau)$, $d_0$ the smallest
    distance, and $p_{knn}(v) \propto \sum_{i: id_i = v} e^{-d_i/\tau'}$. The neighbours' distribution is never spread
    over the vocabulary: only the k entries of a row that it touches change. Composition.

    Args:
        logits: (B, V). ids: (B, k) int64, the neighbours' tokens. distances: (B, k).
        tau: the distance from which on neighbours count for nothing. temperature: tau', by default tau.

    Shapes: (B, V), (B, k), (B, k) -> (B, V). Gradients go to logits and distances.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Dai et al., "Simple and Scalable Nearest Neighbor Machine Translation", 2023 (abstract and knowledge).
    """
    _check.tensor("logits", logits, dim=2)
    _check.tensor("distances", distances, dim=2)
    shape = tuple(distances.shape)
    if not isinstance(ids, Tensor) or ids.dtype != torch.int64 or tuple(ids.shape) != shape:
        raise ValueError(f"ids: expected int64 of shape {shape}, that of distances")
    if shape[0] != logits.shape[0] or shape[1] == 0:
        raise ValueError(
            f"distances: expected ({logits.shape[0]}, k) to go with logits of shape "
            f"{tuple(logits.shape)}, got {shape}"
        )
    _check.same_device("ids", ids, logits, "logits")
    _check.same_device("distances", distances, logits, "logits")
    temperature = tau if temperature is None else temperature
    for name, positive in (("tau", tau), ("temperature", temperature)):
        if _check.number(name, positive, low=0.0) == 0.0:
            raise ValueError(f"{name}: expected a positive number, got 0")
    acc = accumulate_type(logits)
    d = distances.to(acc)
    lam = (1 - d.amin(1, keepdim=True) / tau).clamp(min=0.0)
    base = logits.to(acc).log_softmax(1) + torch.log1p(-lam)
    share = (-d / temperature).log_softmax(1)
    same = ids[:, :, None] == ids[:, None, :]  # (B, k, k)
    mass = torch.where(same, share[:, None, :], float("-inf")).logsumexp(2)
    # log 0 has no gradient: where neighbours count for nothing, a finite stand-in far below everything.
    log_lam = torch.where(lam > 0, torch.where(lam > 0, lam, 1.0).log(), torch.finfo(acc).min / 2)
    value = torch.logaddexp(base.gather(1, ids), log_lam + mass)
    # A token that several neighbours name gets its value, and passes its gradient on, once.
    first = same.int().argmax(2) == torch.arange(shape[1], device=ids.device)
    if forward_ad._current_level >= 0:  # a tangent goes where its value does: the others aside
        aside = torch.nn.functional.pad(base, (0, 1))
        spread = aside.scatter(1, torch.where(first, ids, logits.shape[1]), value)
        return spread[:, : logits.shape[1]].to(logits.dtype)
    value = torch.where(first, value, value.detach())
    return base.scatter(1, ids, value).to(logits.dtype)
