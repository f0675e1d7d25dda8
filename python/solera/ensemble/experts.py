"""Mixtures of narrow feed-forward experts over core `adapters`."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _check
from ._members import activation_code, autocast
from .adapters import branches, check_factors, check_index
from .gates import count_in, top_k_gate


def moe_ffn(
    x: Tensor,
    router_logits: Tensor,
    w1: Tensor,
    w2: Tensor,
    top_k: int,
    *,
    activation: str | None = "gelu",
    normalize: bool = False,
    shared: Tensor | None = None,
    index: Tensor | None = None,
    gates: Tensor | None = None,
) -> Tensor:
    r"""Each token's k best experts: $y_n = \sum_{e \in \mathrm{top}_k} p_{ne}\,W^{(2)}_e\,\phi(W^{(1)}_e x_n)$.

    (token, expert) pairs are sorted by expert; each expert is two products on tiles of its own tokens, and a
    token's results are added in the order of its experts (on a GPU, of its choices), so the sum is the same
    every time. No token is dropped.

    Args:
        x: (..., D); router_logits: (..., E), of which p is the softmax.
        w1: (E, f, D); w2: (E, O, f).
        top_k: experts a token.
        activation: None, "relu", "gelu" or "silu".
        normalize: divide the k gates by their sum.
        shared: (..., O) to be added, such as a shared expert's output.
        index, gates: (..., k) from a gate of your own, with router_logits None and top_k their k.

    Shapes: (..., D) -> (..., O).

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Krajewski et al., "Scaling Laws for Fine-Grained Mixture of Experts", 2024 (G times as many experts of
    1 / G the width, top G); Shazeer et al., 2017.
    """
    x = _check.tensor("x", x, min_dim=2)
    check_factors(w1, w2, x, ("w1", "w2"))
    experts, out, lead = w1.shape[0], w2.shape[1], x.shape[:-1]
    code = activation_code(activation)
    if (index is None) != (gates is None):
        raise ValueError("index: expected index and gates together, or neither")
    if index is None:
        router_logits = _check.tensor("router_logits", router_logits)
        if router_logits.shape != (*lead, experts):
            raise ValueError(
                f"router_logits: expected shape {(*lead, experts)} to go with x of shape "
                f"{tuple(x.shape)} and w1 of shape {tuple(w1.shape)}, got {tuple(router_logits.shape)}"
            )
        k = count_in("top_k", top_k, experts)
        gates, index = top_k_gate(router_logits, k, normalize=normalize)
    else:
        if router_logits is not None:
            raise ValueError("router_logits: expected None where index and gates are given")
        index = check_index(index, experts, x, None)
        gates = _check.tensor("gates", gates)
        if index.shape != (*lead, top_k) or gates.shape != index.shape:
            raise ValueError(
                f"index: expected index and gates of shape {(*lead, top_k)}, got "
                f"{tuple(index.shape)} and {tuple(gates.shape)}"
            )
    if shared is not None:
        _check.like("shared", shared, (*lead, out), x)
    x = autocast(x)
    rows = lead.numel()
    y = branches(
        x.reshape(rows, x.shape[-1]), w1, w2, index.reshape(rows, top_k), gates=gates.reshape(rows, top_k, 1),
        activation=code,
    ).reshape(*lead, out)  # fmt: skip
    return y if shared is None else y + shared.to(y.dtype)


def embed_router(x: Tensor, embeddings: Tensor) -> Tensor:
    r"""Router logits from expert embeddings: $z_{ne} = x_n \cdot e_e$.

    A new expert joins by its embedding alone, such as a projection of its domain's.

    Args:
        x: (..., D); embeddings: (E, D).

    Shapes: -> (..., E).

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Gritsch et al., "Nexus: Specialization meets Adaptability for Efficiently Training Mixture of Experts",
    2024. Composition.
    """
    x = _check.tensor("x", x, min_dim=1)
    embeddings = _check.tensor("embeddings", embeddings, dim=2)
    _check.like("embeddings", embeddings, (embeddings.shape[0], x.shape[-1]), x)
    return torch.nn.functional.linear(x, embeddings.to(x.dtype))
