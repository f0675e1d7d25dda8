"""Weights edited at keys, merged in a basis of the old weight, cleaned of directions."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _check
from .._registry import accumulate_type
from .._route import full_precision
from .low_rank_update import turned, update_
from .merging import check_matrix


def rank_one_edit_(
    weight: Tensor,
    key: Tensor,
    value: Tensor,
    covariance: Tensor | None = None,
    *,
    validate: bool | None = None,
) -> Tensor:
    r"""The least change of W by which it answers one key with one value, in place. Returns weight.

    $$W \leftarrow W + \frac{(v - Wk)\,(C^{-1}k)^\top}{k^\top C^{-1}k}$$

    so that Wk = v; of all such matrices the nearest in the metric of C. A row of W is read for its dot with k and
    updated before it leaves the cache. Without autograd.

    Args:
        weight: (O, I), float32, float64, bfloat16, float16.
        key: k (I,); value: v (O,).
        covariance: C (I, I), $E[kk^\top]$ of other inputs, symmetric and positive definite, solved with in float64;
            None for I.
        validate: refuse a key that is zero or not finite, which no edit can answer. None: for CPU tensors outside
            torch.compile. Where it is not checked, such a key leaves the weight as it is.

    Shapes: (O, I), (I,), (O,) -> weight.

    Raises:
        ValueError, TypeError: naming the argument that does not fit; the weight is as it was.

    Source: the form of ROME, Meng et al., 2022, by which the rank-one redirection of "LLM Unlearning Should Be
    Form-Independent", 2025, is understood (its choice of C and layer is not fixed here).
    """
    weight = check_matrix("weight", weight)
    _check.like("key", key, (weight.shape[1],), weight, "weight")
    _check.like("value", value, (weight.shape[0],), weight, "weight")
    if _checked(validate, key) and not bool(key.isfinite().all() & (key != 0).any()):
        raise ValueError("key: expected a finite vector that is not zero")
    return low_rank_edit_(weight, key[:, None], value[:, None], covariance, validate=validate)


def _checked(validate: bool | None, key: Tensor) -> bool:
    _check.choice("validate", validate, (None, True, False))
    if validate is None:
        return key.device.type == "cpu" and not torch.compiler.is_compiling()
    return validate


@torch.no_grad()
def low_rank_edit_(
    weight: Tensor,
    keys: Tensor,
    values: Tensor,
    covariance: Tensor | None = None,
    *,
    validate: bool | None = None,
) -> Tensor:
    r"""r keys at once, in place: $W \leftarrow W + (V - WK)(K^\top C^{-1}K)^{-1}K^\top C^{-1}$. Returns weight.

    Args:
        weight: (O, I); keys: K (I, r), linearly independent; values: V (O, r); covariance: C (I, I) or None for I.
        validate: refuse keys that are not finite or depend on each other to float64's accuracy, a zero one among
            them. None: for CPU tensors outside torch.compile. Where it is not checked, keys for which the system
            has no finite solution leave the weight as it is.

    Shapes: (O, I), (I, r), (O, r) -> weight, with WK = V.

    Raises:
        ValueError, TypeError: naming the argument that does not fit; the weight is as it was.

    Source: as `rank_one_edit_`; r keys: Meng et al., "Mass-Editing Memory in a Transformer", 2023, without its
    damping.
    """
    weight = check_matrix("weight", weight)
    out, inner = weight.shape
    keys = _check.tensor("keys", keys, dim=2)
    _check.like("keys", keys, (inner, keys.shape[1]), weight, "weight")
    _check.like("values", values, (out, keys.shape[1]), weight, "weight")
    k = keys.double()
    whitened = k
    if covariance is not None:
        _check.like("covariance", covariance, (inner, inner), weight, "weight")
        whitened = torch.linalg.solve_ex(covariance.double(), k).result
    gram = k.mT @ whitened
    if _checked(validate, keys) and k.shape[1] and not _independent(gram):
        raise ValueError(
            "keys: expected finite, linearly independent columns, none of them zero"
            + (", and a positive definite covariance" if covariance is not None else "")
        )
    a = torch.linalg.solve_ex(gram, whitened.mT).result
    sound = a.isfinite().all() & k.isfinite().all()  # else no edit, rather than a weight of NaN
    a, k = torch.where(sound, a, 0), torch.where(sound, k, 0)
    acc = accumulate_type(weight)
    update_([weight], [a.to(acc)], [values.to(acc)], [k.mT.to(acc).contiguous()])
    return weight


def _independent(gram: Tensor) -> bool:
    """Whether a Gram matrix has full rank once its vectors have length one."""
    squares = gram.diagonal()
    if not bool((squares > 0).all() & gram.isfinite().all()):
        return False
    inverse = squares.rsqrt()
    unit = gram * inverse[:, None] * inverse
    return int(torch.linalg.matrix_rank(unit, hermitian=True)) == len(gram)


@full_precision
def project_out(e: Tensor, directions: Tensor, strength: float = 1.0) -> Tensor:
    r"""Rows of e without their part in the span of some directions: $E - \lambda\,E V(V^\top V)^{-1}V^\top$.

    With $\lambda$ = 2 and one direction it is a Householder reflection.

    Args:
        e: (..., D); directions: V (D, m), linearly independent; strength: $\lambda$.

    Shapes: (..., D), (D, m) -> (..., D) of e's dtype. Differentiable in both, twice. Core `low_rank_update`.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: "DECOR: Decomposition and Projection of Text Embeddings for Text-to-Image Customization", 2024, from its
    abstract and the usual projector.
    """
    e = _check.tensor("e", e, min_dim=1)
    v = _check.tensor("directions", directions, dim=2)
    _check.like("directions", v, (e.shape[-1], v.shape[1]), e, "e")
    strength = _check.number("strength", strength)
    if v.shape[1] == 0:
        return e.clone()
    v = v.to(accumulate_type(e))
    a = strength * torch.linalg.solve(v.mT @ v, v.mT)
    rows = e.reshape(e.shape[:-1].numel(), e.shape[-1])
    return turned(rows, a, v.mT).reshape(e.shape)


@full_precision
@torch.no_grad()
def decomposed_fusion(w_old: Tensor, w_new: Tensor, bias: float) -> Tensor:
    r"""An old and a new weight merged in the left singular basis of the old one.

    $$\Delta = U^\top(W_{new} - W_{old}),\quad M = \min\Bigl(\frac{|\Delta|}{\max|\Delta|} + b,\ 1\Bigr),\quad
      W = W_{old} + U(M\odot\Delta)$$

    with $W_{old} = USV^\top$, which is $U(P_n\odot M + P_o\odot(1 - M))$ of the projections $P_n = U^\top W_{new}$
    and $P_o = SV^\top$. U is square. Equal weights stay as they are.

    A composition of torch operations: the decomposition takes nearly all of the time (at 512 x 512 the elementwise
    part, which a kernel could fuse, is below 0.1%), and the basis is one of many where singular values coincide. No
    gradient.

    Args:
        w_old, w_new: (..., O, I), float32 or float64 (half precision is computed in float32); bias: b, not negative.

    Shapes: (..., O, I) twice -> the same; the maximum is that of each matrix.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Huang, Cao, Lu, Tao, "Class-Incremental Learning with CLIP: Adaptive Representation Adjustment and
    Parameter Fusion", 2024 (RAPF), checked against its public code.
    """
    w_old = _check.tensor("w_old", w_old, min_dim=2)
    _check.like("w_new", w_new, tuple(w_old.shape), w_old, "w_old")
    bias = _check.number("bias", bias, low=0.0)
    acc = accumulate_type(w_old)
    old, new = w_old.to(acc), w_new.to(acc)
    u = torch.linalg.svd(old, full_matrices=old.shape[-2] > old.shape[-1]).U
    delta = u.mT @ (new - old)
    if delta.numel() == 0:
        return w_old.clone()
    size = delta.abs()
    most = size.amax((-2, -1), keepdim=True)
    mask = (size / torch.where(most > 0, most, 1.0) + bias).clamp(max=1.0)
    return (old + u @ (mask * delta)).to(w_old.dtype)
