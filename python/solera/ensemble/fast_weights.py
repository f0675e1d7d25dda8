"""Fast weights: a low-rank state written from context, read as an adapter."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _check
from .._registry import accumulate_type
from ._members import autocast
from .adapters import check_weight, shared_linear


def fastweight_accumulate(
    state: Tensor | None, h: Tensor, a2: Tensor, a3: Tensor, *, mask: Tensor | None = None
) -> Tensor:
    r"""Adds a chunk of context to the state: $S \leftarrow S + \sum_m (A_2h_m)(A_3h_m)^\top$.

    Args:
        state: (..., P, R), or None for zero; h: (..., M, d); a2: (P, d); a3: (R, d).
        mask: (..., M) bool, the positions that count, or None for all.

    Shapes: -> (..., P, R), in float32 (float64 for float64): sums of many chunks stay exact.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Chen et al., "Generative Adapter: Contextualizing Language Models in Parameters with A Single Forward
    Pass", 2024. Composition.
    """
    h = _check.tensor("h", h, min_dim=2)
    a2, a3 = _check.tensor("a2", a2, dim=2), _check.tensor("a3", a3, dim=2)
    _check.like("a2", a2, (a2.shape[0], h.shape[-1]), h, "h")
    _check.like("a3", a3, (a3.shape[0], h.shape[-1]), h, "h")
    acc = accumulate_type(h)
    left = torch.nn.functional.linear(h.to(acc), a2.to(acc))
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != h.shape[:-1]:
            raise ValueError(f"mask: expected a bool tensor of shape {tuple(h.shape[:-1])}")
        left = torch.where(mask.unsqueeze(-1), left, 0.0)
    chunk = left.mT @ torch.nn.functional.linear(h.to(acc), a3.to(acc))
    if state is None:
        return chunk
    _check.like("state", state, tuple(chunk.shape), h, "h")
    return state.to(acc) + chunk


def polar_normalize(
    state: Tensor, k: int | None = None, *, kind: str = "svd", iterations: int = 24
) -> Tensor:
    r"""Every singular value set to one: $S = U\Sigma V^\top \mapsto UV^\top$, or scaled by the norm.

    Args:
        state: (..., P, R).
        k: with "svd", keep the k largest singular directions: $U_kV_k^\top$.
        kind: "svd"; "newton_schulz": products alone, $X \leftarrow \frac32X - \frac12XX^\top X$ from
            $S / \|S\|_F$, for a state of full rank; "frobenius": $S / \|S\|_F$.
        iterations: of "newton_schulz"; the smallest singular value grows 1.5 times in each until it is near one.

    Shapes: (..., P, R) -> (..., P, R). The gradient of "svd" needs distinct singular values.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: as `fastweight_accumulate`; the iteration is Bjorck, Bowie, "An iterative algorithm for computing the best
    estimate of an orthogonal matrix", 1971. (`solera.norm.newton_schulz` is for inverses of square matrices.)
    Composition.
    """
    state = _check.tensor("state", state, min_dim=2)
    _check.choice("kind", kind, ("svd", "newton_schulz", "frobenius"))
    most = min(state.shape[-2:])
    if k is not None and (
        kind != "svd" or isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= most
    ):
        raise ValueError(f"k: expected an int in [1, {most}] with kind 'svd', got {k!r} ({kind})")
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 0:
        raise ValueError(f"iterations: expected an int, at least 0, got {iterations!r}")
    s = state.to(accumulate_type(state))
    if kind == "svd":
        u, _, vh = torch.linalg.svd(s, full_matrices=False)
        return (u[..., :k] @ vh[..., :k, :]).to(state.dtype)
    norm = torch.linalg.matrix_norm(s, keepdim=True)
    s = s / torch.where(norm == 0, 1.0, norm)
    if kind == "newton_schulz":
        turned = s.shape[-2] > s.shape[-1]
        s = s.mT if turned else s
        for _ in range(iterations):
            s = 1.5 * s - 0.5 * (s @ s.mT) @ s
        s = s.mT if turned else s
    return s.to(state.dtype)


def fastweight_lora_linear(
    x: Tensor,
    weight: Tensor,
    a1: Tensor,
    state: Tensor,
    b: Tensor,
    *,
    scaling: float = 1.0,
    bias: Tensor | None = None,
) -> Tensor:
    r"""A linear layer with an adapter that each sample carries: $y = Wx + d + s\,B\,S_n^\top A_1 x$.

    The rows go through $A_1$, the small S of their sample and B in turn: no factor of a sample is formed.

    Args:
        x: (N, T, I), or (N, I); weight: (O, I); bias: (O,) or None.
        a1: (P, I); state: (N, P, R); b: (O, R); scaling: the number s.

    Shapes: -> (N, T, O) or (N, O).

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: as `fastweight_accumulate`. The shared product is core `adapters`', the rest a composition.
    """
    x = _check.tensor("x", x, min_dim=2)
    a1, b = _check.tensor("a1", a1, dim=2), _check.tensor("b", b, dim=2)
    state = _check.tensor("state", state, dim=3)
    inner, samples = x.shape[-1], x.shape[0]
    check_weight(weight, bias, b.shape[0], x)
    _check.like("a1", a1, (a1.shape[0], inner), x)
    _check.like("state", state, (samples, a1.shape[0], b.shape[1]), x)
    _check.like("b", b, (b.shape[0], state.shape[2]), x)
    scaling = _check.number("scaling", scaling)
    x = autocast(x)
    acc = accumulate_type(x)
    rows = x.reshape(x.shape[:-1].numel(), inner)
    each = x.shape[1:-1].numel()  # rows of a sample
    z = torch.nn.functional.linear(x.to(acc), a1.to(acc)).reshape(samples, each, a1.shape[0])
    z = torch.bmm(z, state.to(acc)).reshape(rows.shape[0], b.shape[1])
    branch = torch.nn.functional.linear(z, b.to(acc))
    y = shared_linear(rows, weight, bias) + (scaling * branch).to(x.dtype)
    return y.reshape(*x.shape[:-1], b.shape[0])
