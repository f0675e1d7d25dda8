"""Gates of expert mixtures, their balance losses, and routers. Compositions over (T, E) tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import _check
from .._registry import accumulate_type


class TopKGate(NamedTuple):
    """What `norm_top_k_gate` returns. Shapes: `gates` and `index` (T, k), `load` (E,), `aux` a scalar."""

    gates: Tensor
    index: Tensor  # type: ignore[assignment]  # of experts; nobody asks a result for tuple.index
    load: Tensor
    aux: Tensor


def count_in(name: str, value: object, high: int) -> int:
    """value, if it is an int in [1, high], else a ValueError that names the argument."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= high:
        raise ValueError(f"{name}: expected an int in [1, {high}], got {value!r}")
    return value


def _experts(logits: object, name: str = "logits") -> Tensor:
    logits = _check.tensor(name, logits, min_dim=2)
    if logits.shape[-1] == 0:
        raise ValueError(f"{name}: expected at least one expert, got shape {tuple(logits.shape)}")
    return logits


def _same_experts(name: str, value: object, like: Tensor, like_name: str) -> Tensor:
    value = _check.tensor(name, value)
    if value.shape != like.shape:
        raise ValueError(
            f"{name}: expected shape {tuple(like.shape)} (that of {like_name}), got "
            f"{tuple(value.shape)}"
        )
    return value


# ---- gates -------------------------------------------------------------------------------------------


def top_k_gate(logits: Tensor, k: int, *, normalize: bool = True) -> tuple[Tensor, Tensor]:
    r"""The k largest of $p = \mathrm{softmax}(z)$ and which they are.

    Args:
        logits: (..., E).
        k: how many, at most E.
        normalize: divide the k by their sum (the same as a softmax over the k largest logits).

    Shapes: (..., E) -> gates (..., k) in descending order, index (..., k) int64.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Shazeer et al., "Outrageously Large Neural Networks", 2017; normalised as by Fan et al., "Make LoRA
    Great Again" (GOAT), 2025. Composition.
    """
    logits = _experts(logits)
    k = count_in("k", k, logits.shape[-1])
    values, index = logits.to(accumulate_type(logits)).topk(k, dim=-1)
    if not normalize:
        values = values - torch.logsumexp(logits.to(values.dtype), -1, keepdim=True)
        return values.exp().to(logits.dtype), index
    return values.softmax(-1).to(logits.dtype), index


def threshold_gate(
    logits: Tensor, tau_logit: Tensor, tau_max: float | None = None
) -> tuple[Tensor, Tensor]:
    r"""AdaMoLE's gate: experts above a threshold that the token sets.

    $p = \mathrm{softmax}(z)$, $\tau = \tau_{max}\,\sigma(t)$,
    $w_i = \mathrm{relu}(p_i - \tau) / \sum_j \mathrm{relu}(p_j - \tau)$, a sum of 0 counting as 1.

    Args:
        logits: z (..., E).
        tau_logit: t (..., 1) or (...,).
        tau_max: the largest threshold. None: 1 / E, with which no token is left without an expert.

    Shapes: (..., E) -> w (..., E), and $p - \tau$ (..., E) for `threshold_balance_loss`.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Liu, Luo, "AdaMoLE: Fine-Tuning Large Language Models with Adaptive Mixture of Low-Rank Adaptation
    Experts", 2024. Composition.
    """
    logits = _experts(logits)
    tau_logit = _check.tensor("tau_logit", tau_logit)
    if tau_logit.shape == logits.shape[:-1]:
        tau_logit = tau_logit.unsqueeze(-1)
    if tau_logit.shape != (*logits.shape[:-1], 1):
        raise ValueError(
            f"tau_logit: expected shape {(*logits.shape[:-1], 1)} to go with logits of shape "
            f"{tuple(logits.shape)}, got {tuple(tau_logit.shape)}"
        )
    _check.same_device("tau_logit", tau_logit, logits, "logits")
    top = 1 / logits.shape[-1] if tau_max is None else _check.number("tau_max", tau_max, low=0.0)
    acc = accumulate_type(logits)
    over = logits.to(acc).softmax(-1) - top * torch.sigmoid(tau_logit.to(acc))
    kept = over.relu()
    total = kept.sum(-1, keepdim=True)
    weights = kept / torch.where(total == 0, 1.0, total)
    return weights.to(logits.dtype), over.to(logits.dtype)


def norm_top_k_gate(
    x: Tensor, weight: Tensor, k: int, scale: float = 1.0, *, eps: float = 1e-6
) -> TopKGate:
    r"""Skywork-MoE's gate: standardised logits, softmax, the k largest, and what balances them.

    $z = W_g x$, $\tilde z = \lambda (z - \mu(z)) / \sigma(z)$ over the experts ($\sigma$ with divisor E, and
    eps added to it), $p = \mathrm{softmax}(\tilde z)$; the gates are the k largest p, not normalised again.
    load is the fraction of the choices that went to each expert, aux $= E\sum_e f_e P_e$ with
    $P_e$ the mean of $p_e$.

    Args:
        x: (..., D); weight: W_g (E, D); k: experts a token; scale: $\lambda$; eps: keeps equal logits finite.

    Shapes: (..., D) -> gates (..., k), index (..., k) int64, load (E,), aux ().

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Wei et al., "Skywork-MoE", 2024: standardisation from the abstract; that gates are not normalised
    again and the form of aux (Fedus et al., "Switch Transformers", 2022) are common knowledge. Composition.
    """
    x = _check.tensor("x", x, min_dim=1)
    weight = _check.tensor("weight", weight, dim=2)
    _check.like("weight", weight, (weight.shape[0], x.shape[-1]), x)
    k = count_in("k", k, weight.shape[0])
    scale, eps = _check.number("scale", scale), _check.number("eps", eps, low=0.0)
    acc = accumulate_type(x)
    z = F.linear(x, weight.to(x.dtype)).to(acc)
    centred = z - z.mean(-1, keepdim=True)
    # The square root of 0 has no derivative; equal logits get none, as their difference is 0.
    variance = centred.square().mean(-1, keepdim=True)
    std = torch.where(variance == 0, 0.0, torch.where(variance == 0, 1.0, variance).sqrt())
    p = (scale * centred / (std + eps)).softmax(-1)
    gates, index = p.topk(k, dim=-1)
    load = _load(index, weight.shape[0], acc)
    aux = weight.shape[0] * (load * p.reshape(-1, p.shape[-1]).mean(0)).sum()
    return TopKGate(gates.to(x.dtype), index, load, aux)


def _load(index: Tensor, experts: int, dtype: torch.dtype) -> Tensor:
    """The fraction of the entries of index that name each expert; negative ones name none."""
    flat = index.reshape(-1, 1)
    named = flat == torch.arange(experts, device=index.device)
    return named.to(dtype).mean(0) if flat.shape[0] else named.to(dtype).sum(0)


# ---- balance -----------------------------------------------------------------------------------------


def load_balance_loss(probabilities: Tensor, index: Tensor) -> Tensor:
    r"""$E\sum_e f_e P_e$: f_e the fraction of choices that fell on e, P_e its mean probability.

    1 for a uniform router; the gradient goes through P alone.

    Args:
        probabilities: (..., E); index: (..., k) integers, the experts chosen.

    Shapes: (..., E), (..., k) -> ().

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Fedus et al., "Switch Transformers", 2022; as surveyed by Cai et al., "A Survey on Mixture of
    Experts", 2024. Composition.
    """
    p = _experts(probabilities, "probabilities")
    if not isinstance(index, Tensor) or index.dtype.is_floating_point:
        raise TypeError("index: expected an integer tensor")
    if index.shape[:-1] != p.shape[:-1]:
        raise ValueError(
            f"index: expected shape {tuple(p.shape[:-1])} and k, got {tuple(index.shape)}"
        )
    _check.same_device("index", index, p, "probabilities")
    acc = accumulate_type(p)
    mean = p.to(acc).reshape(-1, p.shape[-1]).mean(0)
    return p.shape[-1] * (_load(index, p.shape[-1], acc) * mean).sum()


def threshold_balance_loss(over: Tensor) -> Tensor:
    r"""AdaMoLE's $E\sum_e f_e P_e$: f_e the share of the tokens for which e is active, P_e = mean(p_e - tau).

    The authors' code takes the mean of p - tau, not of p; so does this. A token may have several active experts, so
    the f_e add up to their mean number.

    Args:
        over: p - tau (..., E), the second result of `threshold_gate`; an expert is active where it is 0 or above.

    Shapes: (..., E) -> ().

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Liu, Luo, "AdaMoLE", 2024, and the authors' code. Composition.
    """
    over = _experts(over, "over")
    flat = over.to(accumulate_type(over)).reshape(-1, over.shape[-1])
    share = (flat >= 0).to(flat.dtype).mean(0)
    return flat.shape[1] * (share * flat.mean(0)).sum()


def adaptive_aux_coefficient(
    coefficient: float, drop_rate: float, *, momentum: float = 0.99, target: float = 0.2
) -> float:
    r"""Skywork-MoE's balance coefficient of a layer: $\alpha \leftarrow m\alpha + (1 - m)\,\xi d$.

    d is the layer's rate of dropped tokens, $\xi$ (`target`) the coefficient that d = 1 asks for: a layer that
    drops nothing lets its coefficient decay, one that drops much raises it.

    Shapes: numbers -> a number.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Wei et al., "Skywork-MoE", 2024 (an average driven by the drop rate); the linear target and its
    value are a reading, not the paper's code. Composition.
    """
    coefficient = _check.number("coefficient", coefficient, low=0.0)
    drop_rate = _check.number("drop_rate", drop_rate, low=0.0, high=1.0)
    momentum = _check.number("momentum", momentum, low=0.0, high=1.0)
    target = _check.number("target", target, low=0.0)
    return momentum * coefficient + (1 - momentum) * target * drop_rate


# ---- routers -----------------------------------------------------------------------------------------


def multi_hot_router_loss(logits: Tensor, expert_prediction: Tensor, target: Tensor) -> Tensor:
    r"""Binary cross-entropy of a router's logits with which experts were right.

    $\mathrm{mean}_{ie}\,\mathrm{BCE}(\sigma(z_{ie}), 1[\hat y_{ie} = y_i])$.

    Args:
        logits: z (B, E); expert_prediction: (B, E) of any dtype; target: (B,) of the same dtype.

    Shapes: -> ().

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Aspis et al., "DriftMoE", 2025 (the multi-hot mask from the abstract; the loss, common knowledge).
    Composition.
    """
    logits = _check.tensor("logits", logits, dim=2)
    for name, value, shape in (
        ("expert_prediction", expert_prediction, logits.shape),
        ("target", target, logits.shape[:1]),
    ):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
        if value.shape != shape:
            raise ValueError(
                f"{name}: expected shape {tuple(shape)} to go with logits of shape "
                f"{tuple(logits.shape)}, got {tuple(value.shape)}"
            )
        _check.same_device(name, value, logits, "logits")
    right = (expert_prediction == target.unsqueeze(1)).to(accumulate_type(logits))
    return F.binary_cross_entropy_with_logits(logits.to(right.dtype), right)
