"""Querybank normalisation and its two-bank form, over core `bank_norm` (formulas there)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from .. import _check
from .._route import needs_graph, use_reference
from .bank_norm import (
    BankApply,
    BankColumns,
    BankStream,
    bank_apply_reference,
    bank_columns_reference,
    bank_stream_plain,
    similarities_of,
)

_op = torch.ops.solera
_TOP_ROWS = 128  # queries whose scores exist at a time in the top-k form


def _beta(name: str, beta: object) -> float:
    value = _check.number(name, beta)
    if not value > 0:
        raise ValueError(f"{name}: expected a positive number, got {beta!r}")
    return value


def _count(name: str, k: object, most: int, of: str) -> int:
    if isinstance(k, bool) or not isinstance(k, (int, torch.SymInt)):
        raise TypeError(f"{name}: expected an int, got {k!r}")
    if not 1 <= k <= most:
        raise ValueError(f"{name}: expected 1 to {most} ({of}), got {k}")
    return k  # type: ignore[return-value]


def _matrix(name: str, value: object, like: Tensor | None = None, like_name: str = "") -> Tensor:
    """A matrix; with `like`, of its dtype, device and number of columns."""
    t = _check.tensor(name, value, dim=2)
    if like is not None:
        if t.shape[1] != like.shape[1]:
            raise ValueError(
                f"{name}: expected {like.shape[1]} columns (those of {like_name}), "
                f"got shape {tuple(t.shape)}"
            )
        _check.same_dtype(name, t, like, like_name)
        if t.device != like.device:
            raise ValueError(
                f"{name}: expected device {like.device} (that of {like_name}), got {t.device}"
            )
    return t


def _bank(name: str, value: object, like: Tensor, like_name: str) -> Tensor:
    t = _matrix(name, value, like, like_name)
    if t.shape[0] == 0:
        raise ValueError(f"{name}: expected at least one row, got shape {tuple(t.shape)}")
    return t


def _columns(similarities: Tensor, beta: float, top_k: int) -> tuple[Tensor, Tensor]:
    if use_reference():
        return bank_columns_reference(similarities, beta, top_k)
    if needs_graph(similarities):
        return BankColumns.apply(similarities, beta, top_k)
    return _op.bank_columns(similarities, beta, top_k)


def _stream(bank: Tensor, gallery: Tensor, beta: float, top_k: int) -> tuple[Tensor, Tensor]:
    if use_reference():
        return bank_stream_plain(bank, gallery, beta, top_k)
    if needs_graph(bank, gallery):
        return BankStream.apply(bank, gallery, beta, top_k)
    return _op.bank_stream(bank, gallery, beta, top_k)


def _factors(parts: Sequence[tuple[tuple[Tensor, Tensor], float]], dynamic: bool) -> list[Any]:
    """(lse, active, beta) of one or two banks, as the ops take them: always two."""
    out: list[Any] = []
    for (lse, active), beta in parts:
        out += [lse, active if dynamic else None, beta]
    return out if len(parts) == 2 else [*out, None, None, 0.0]


def _apply(similarities: Tensor, factors: list[Any]) -> Tensor:
    if use_reference():
        return bank_apply_reference(similarities, *factors)[0]
    if needs_graph(similarities, factors[0], factors[3]):
        return BankApply.apply(similarities, *factors)
    return _op.bank_apply(similarities, *factors)[0]


def querybank_norm(
    similarities: Tensor,
    bank_similarities: Tensor,
    *,
    beta: float = 20.0,
    top_k: int = 1,
    dynamic: bool = False,
) -> Tensor:
    r"""Similarities with hubs held down by a bank of queries: the inverted softmax, in log space.

    $\hat S_{ij} = \beta S_{ij} - \log\sum_m e^{\beta B_{mj}}$; its exponential is the paper's ratio, its
    ranking the same. With `dynamic` only rows whose best item is in the activation set (the items among
    the `top_k` of some bank row) change; the others stay as they are.

    Args:
        similarities: (Q, G), float32, float64, bfloat16 or float16; sums are in float32 (float64).
        bank_similarities: (M, G) of the same dtype, M at least 1.
        beta: inverse temperature, positive.
        top_k: how many items of each bank row are active; used only with `dynamic`.
        dynamic: the dynamic inverted softmax.

    Shapes: (Q, G), (M, G) -> (Q, G). Differentiable in both; the activation set is a constant.

    Raises:
        ValueError, TypeError: naming the argument whose shape, dtype, device or value does not fit.

    Source: Bogolin et al., "Cross Modal Retrieval with Querybank Normalisation", 2022.
    """
    s = _matrix("similarities", similarities)
    b = _bank("bank_similarities", bank_similarities, s, "similarities")
    beta = _beta("beta", beta)
    k = _count("top_k", top_k, max(1, s.shape[1]), "gallery items") if dynamic else 0
    return _apply(s, _factors([(_columns(b, beta, k), beta)], dynamic))


def dual_bank_norm(
    similarities: Tensor,
    query_bank: Tensor,
    gallery_bank: Tensor,
    *,
    beta1: float = 20.0,
    beta2: float = 20.0,
    dynamic: bool = False,
    k: int = 1,
) -> Tensor:
    r"""Similarities normalised by a bank of queries and a bank of gallery items (DualIS, DualDIS).

    $\hat S_{ij} = (\beta_1 + \beta_2) S_{ij} - L^q_j - L^g_j$ with the column log-sum-exps of the two banks'
    similarities to the gallery: the logarithm of the product of both inverted softmaxes. With `dynamic`
    each factor applies only to rows whose best item is in that bank's activation set; a row in neither
    stays as it is.

    Args:
        similarities: (Q, G), float32, float64, bfloat16 or float16.
        query_bank: (Mq, G) similarities of the query bank to the gallery, of the same dtype.
        gallery_bank: (Mg, G) similarities of the gallery bank to the gallery, of the same dtype.
        beta1, beta2: inverse temperatures of the two, positive.
        dynamic, k: as `dynamic` and `top_k` of `querybank_norm`.

    Shapes: (Q, G), (Mq, G), (Mg, G) -> (Q, G). Differentiable in all three.

    Raises:
        ValueError, TypeError: naming the argument whose shape, dtype, device or value does not fit.

    Source: Wang et al., "Balance Act: Mitigating Hubness in Cross-Modal Retrieval with Query and Gallery
    Banks", 2023.
    """
    s = _matrix("similarities", similarities)
    q = _bank("query_bank", query_bank, s, "similarities")
    g = _bank("gallery_bank", gallery_bank, s, "similarities")
    beta1, beta2 = _beta("beta1", beta1), _beta("beta2", beta2)
    k = _count("k", k, max(1, s.shape[1]), "gallery items") if dynamic else 0
    parts = [(_columns(q, beta1, k), beta1), (_columns(g, beta2, k), beta2)]
    return _apply(s, _factors(parts, dynamic))


def column_lse(bank: Tensor, gallery: Tensor, beta: float = 20.0) -> Tensor:
    r"""$\log\sum_m e^{\beta \langle x_m, y_j\rangle}$ for every gallery item, without the bank x gallery matrix.

    Args:
        bank: (M, D), M at least 1; float32, float64, bfloat16 or float16.
        gallery: (G, D) of the same dtype.
        beta: inverse temperature, positive.

    Shapes: (M, D), (G, D) -> (G,) in float32 (float64 for float64). Differentiable in both.

    Raises:
        ValueError, TypeError: naming the argument whose shape, dtype, device or value does not fit.

    Source: the querybank's column sums, Bogolin et al., 2022, in one streaming pass.
    """
    gallery = _matrix("gallery", gallery)
    bank = _bank("bank", bank, gallery, "gallery")
    return _stream(bank, gallery, _beta("beta", beta), 0)[0]


def _embed(
    queries: Tensor,
    gallery: Tensor,
    banks: Sequence[tuple[str, Tensor, float]],
    top_k: int,
    dynamic: bool,
    normalize: bool,
    k: int | None,
) -> Tensor | tuple[Tensor, Tensor]:
    gallery = _matrix("gallery", gallery)
    queries = _matrix("queries", queries, gallery, "gallery")
    tensors = [_bank(name, bank, gallery, "gallery") for name, bank, _ in banks]
    items = gallery.shape[0]
    top_k = _count("top_k", top_k, max(1, items), "gallery items") if dynamic else 0
    if k is not None:
        k = _count("k", k, items, "gallery items")
    if normalize:
        unit = torch.nn.functional.normalize
        gallery, queries, tensors = unit(gallery), unit(queries), [unit(t) for t in tensors]
    parts = [
        (_stream(t, gallery, beta, top_k), beta)
        for t, (_, _, beta) in zip(tensors, banks, strict=True)
    ]
    factors = _factors(parts, dynamic)
    if use_reference() or needs_graph(queries, gallery, *tensors):
        scores = _apply(similarities_of(queries, gallery), factors)
        return scores if k is None else torch.topk(scores, k, dim=1)
    if k is None:
        return _op.bank_scores(queries, gallery, *factors)
    blocks = [queries] if is_dynamo_compiling() else queries.split(_TOP_ROWS)
    found = [_op.row_top(_op.bank_scores(block, gallery, *factors), k) for block in blocks]
    return torch.cat([v for v, _ in found]), torch.cat([i for _, i in found])


def querybank_norm_embed(
    queries: Tensor,
    bank: Tensor,
    gallery: Tensor,
    *,
    beta: float = 20.0,
    top_k: int = 1,
    dynamic: bool = False,
    normalize: bool = True,
    k: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""`querybank_norm` of the cosine similarities of embeddings, which are never written for the bank.

    Args:
        queries: (Q, D), float32, float64, bfloat16 or float16.
        bank: (M, D) of the same dtype, M at least 1.
        gallery: (G, D) of the same dtype.
        beta, top_k, dynamic: as in `querybank_norm`.
        normalize: bring the rows to unit length first; False takes plain inner products.
        k: None for all scores; a number for only each query's k best, in which case queries x gallery
            is not written either (128 queries' scores exist at a time; with a gradient, or compiled,
            all do). Where a query has fewer than k scores above -inf, the index is -1 (with a gradient
            torch.topk decides).

    Shapes: (Q, D), (M, D), (G, D) -> (Q, G), or with k the pair (values (Q, k), indices (Q, k)). Scores
    are float32 (float64 for float64) whatever the embeddings' dtype: rounded to half precision,
    neighbours would tie. Differentiable in all three; the activation set is a constant.

    Raises:
        ValueError, TypeError: naming the argument whose shape, dtype, device or value does not fit.

    Source: Bogolin et al., "Cross Modal Retrieval with Querybank Normalisation", 2022.
    """
    banks = [("bank", bank, _beta("beta", beta))]
    return _embed(queries, gallery, banks, top_k, dynamic, normalize, k)


def dual_bank_norm_embed(
    queries: Tensor,
    query_bank: Tensor,
    gallery_bank: Tensor,
    gallery: Tensor,
    *,
    beta1: float = 20.0,
    beta2: float = 20.0,
    top_k: int = 1,
    dynamic: bool = False,
    normalize: bool = True,
    k: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""`dual_bank_norm` of the cosine similarities of embeddings, which are never written for the banks.

    Args:
        queries, gallery: (Q, D) and (G, D), float32, float64, bfloat16 or float16.
        query_bank, gallery_bank: (Mq, D) and (Mg, D) of the same dtype, at least one row each.
        beta1, beta2, dynamic: as in `dual_bank_norm`; top_k is its k.
        normalize, k: as in `querybank_norm_embed`.

    Shapes: (Q, D), (Mq, D), (Mg, D), (G, D) -> (Q, G), or with k the pair (values, indices), both (Q, k).

    Raises:
        ValueError, TypeError: naming the argument whose shape, dtype, device or value does not fit.

    Source: Wang et al., "Balance Act: Mitigating Hubness in Cross-Modal Retrieval with Query and Gallery
    Banks", 2023.
    """
    banks = [
        ("query_bank", query_bank, _beta("beta1", beta1)),
        ("gallery_bank", gallery_bank, _beta("beta2", beta2)),
    ]
    return _embed(queries, gallery, banks, top_k, dynamic, normalize, k)
