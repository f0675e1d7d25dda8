r"""Core `oblivious_forest`: the leaves that K trees send a row to, and sums of what stands in them.

An oblivious tree of depth D asks the same D questions of every row, so its leaf is a number in binary:

$$\ell_k(x) = \sum_{d<D} 2^d\,[\,x_{f_{kd}} > v_{kd}\,],\qquad
  S_b = \sum_k V_{k,\ell_k(x_b)},\qquad F(x) = F_0 - \eta \odot S .$$

The sum S is linear in the leaf values V (K, L, A), and its gradient the sum over the rows of a leaf,

$$\mathrm{d}V_{k\ell} = \sum_{b:\,\ell_k(x_b)=\ell} \mathrm{d}S_b ,$$

whose own gradient is S again; so the two ops differentiate each other to any order. The structure (f, v) has
no gradient. Rows of a leaf are added in the order of the batch.

Sources: oblivious trees: Prokhorenkova et al., "CatBoost", NeurIPS 2018; one structure with a vector in each
leaf and a learning rate for each output: Fuhrer, Tessler, Dalal, "Gradient Boosting Reinforcement Learning",
2024.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _check
from .._registry import accumulate_type, reference
from .._route import needs_graph, use_reference
from ._members import fresh

_op = torch.ops.solera

MAX_DEPTH = 16


# ---- reference ---------------------------------------------------------------------------------------


@reference("forest_leaves")
def forest_leaves_reference(x, features, thresholds):
    """(B, K) int32; a feature number outside x counts as a NaN, whose answer is no."""
    width = x.shape[1]
    if width == 0:
        return x.new_zeros((x.shape[0], features.shape[0]), dtype=torch.int32)
    known = (features >= 0) & (features < width)
    asked = x[:, features.clamp(0, width - 1)].to(accumulate_type(x))  # (B, K, D)
    bits = (asked > thresholds.to(asked.dtype)) & known
    place = 2 ** torch.arange(features.shape[1], device=x.device)
    return (bits * place).sum(2).to(torch.int32)


@reference("leaf_sum")
def leaf_sum_reference(index, leaves):
    """(B, A): the sum over trees of the leaves' rows, an index outside them adding nothing."""
    acc = accumulate_type(leaves)
    trees, count, outputs = leaves.shape
    total = leaves.new_zeros((index.shape[0], outputs), dtype=acc)
    if count:
        known = (index >= 0) & (index < count)
        at = index.clamp(0, count - 1).long()
        for k in range(trees):
            row = leaves[k].to(acc).index_select(0, at[:, k])
            total = total + torch.where(known[:, k, None], row, 0.0)
    return total.to(leaves.dtype)


@reference("leaf_scatter")
def leaf_scatter_reference(index, dy, count):
    """(K, count, A), in the accumulator's type: the sum over the rows in each leaf."""
    acc = accumulate_type(dy)
    trees = index.shape[1]
    out = dy.new_zeros((trees, count + 1, dy.shape[1]), dtype=acc)
    known = (index >= 0) & (index < count)
    at = torch.where(known, index, count).long()
    rows = dy.to(acc)
    parts = [out[k].index_add(0, at[:, k], rows) for k in range(trees)]
    return fresh(torch.stack(parts)[:, :count] if parts else out[:, :count])


# ---- autograd ----------------------------------------------------------------------------------------


class _LeafSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, index, leaves):
        ctx.count, ctx.dtype = leaves.shape[1], leaves.dtype
        ctx.save_for_backward(index)
        return _op.leaf_sum(index, leaves)

    @staticmethod
    def backward(ctx, dy):
        (index,) = ctx.saved_tensors
        return None, _leaf_scatter(index, dy, ctx.count).to(ctx.dtype)


class _LeafScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, index, dy, count):
        ctx.dtype = dy.dtype
        ctx.save_for_backward(index)
        return _op.leaf_scatter(index, dy, count)

    @staticmethod
    def backward(ctx, grad):
        (index,) = ctx.saved_tensors
        return None, _leaf_sum(index, grad).to(ctx.dtype), None


def _leaf_sum(index: Tensor, leaves: Tensor) -> Tensor:
    if use_reference():
        return leaf_sum_reference(index, leaves)
    return _LeafSum.apply(index, leaves) if needs_graph(leaves) else _op.leaf_sum(index, leaves)


def _leaf_scatter(index: Tensor, dy: Tensor, count: int) -> Tensor:
    if use_reference():
        return leaf_scatter_reference(index, dy, count)
    if needs_graph(dy):
        return _LeafScatter.apply(index, dy, count)
    return _op.leaf_scatter(index, dy, count)


# ---- public functions --------------------------------------------------------------------------------


def forest_leaves(x: Tensor, features: Tensor, thresholds: Tensor) -> Tensor:
    r"""Each row's leaf in each oblivious tree: $\ell_k(x) = \sum_d 2^d [x_{f_{kd}} > v_{kd}]$.

    Args:
        x: (B, F).
        features: (K, D) integers in [0, F); a NaN there answers no, and so does a number outside the range.
        thresholds: (K, D).

    Shapes: x (B, F), features and thresholds (K, D) -> (B, K) int32. No gradient.

    Raises:
        ValueError, TypeError: naming the argument that does not fit; D over 16.

    Source: Prokhorenkova et al., "CatBoost", NeurIPS 2018.
    """
    _check.tensor("x", x, dim=2)
    _check.tensor("thresholds", thresholds, dim=2)
    _check.like("thresholds", thresholds, tuple(thresholds.shape), x)
    _check_integers("features", features, tuple(thresholds.shape), x)
    if thresholds.shape[1] > MAX_DEPTH:
        raise ValueError(
            f"thresholds: expected at most {MAX_DEPTH} questions, got {tuple(thresholds.shape)}"
        )
    x, features, thresholds = x.detach(), features.long(), thresholds.detach()
    if use_reference():
        return forest_leaves_reference(x, features, thresholds)
    return _op.forest_leaves(x, features, thresholds)


def _check_integers(name: str, value: object, shape: tuple[int, ...], x: Tensor) -> None:
    if not isinstance(value, Tensor) or value.dtype not in (torch.int64, torch.int32):
        came = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name}: expected a tensor of int64 or int32, got {came}")
    if value.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(value.shape)}")
    if value.device != x.device:
        raise ValueError(f"{name}: expected device {x.device}, got {value.device}")


def oblivious_forest(
    x: Tensor,
    features: Tensor,
    thresholds: Tensor,
    leaves: Tensor,
    learning_rate: Tensor | float = 1.0,
    start: Tensor | float = 0.0,
) -> Tensor:
    r"""K oblivious trees with a vector in each leaf: $F(x) = F_0 - \eta \odot \sum_k V_{k,\ell_k(x)}$.

    One structure serves all A outputs (a policy's and its value), each with a learning rate of its own. The
    sign is that of a step against the gradient, which the leaves hold. Gradients go to the leaf values, the
    learning rate and the start; the structure has none.

    Args:
        x: (B, F).
        features, thresholds: (K, D), see `forest_leaves`.
        leaves: (K, 2^D, A), summed in float32 (float64 for float64).
        learning_rate: a number, or (A,).
        start: $F_0$, a number, or (A,).

    Shapes: x (B, F) -> (B, A), in the dtype of leaves.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Fuhrer, Tessler, Dalal, "Gradient Boosting Reinforcement Learning", 2024 (one structure for policy
    and value, learning rates by output); sums of oblivious trees: "CatBoost", 2018.
    """
    index = forest_leaves(x, features, thresholds)
    _check.tensor("leaves", leaves, dim=3)
    trees, depth = thresholds.shape
    _check.like("leaves", leaves, (trees, 2**depth, leaves.shape[2]), leaves)
    if leaves.device != x.device:
        raise ValueError(f"leaves: expected device {x.device}, got {leaves.device}")
    outputs = (leaves.shape[2],)
    for name, value in (("learning_rate", learning_rate), ("start", start)):
        if isinstance(value, Tensor):
            _check.like(name, value, () if value.dim() == 0 else outputs, leaves, "leaves")
        else:
            _check.number(name, value)
    return start - learning_rate * _leaf_sum(index, leaves)


def leaf_kernel_apply(query: Tensor, train: Tensor, y: Tensor, leaves: int) -> Tensor:
    r"""A forest as a smoother: $\hat y(x) = \frac1M\sum_m \frac{\sum_i [\ell_m(x)=\ell_m(x_i)]\,y_i}{n_{m,\ell_m(x)}}$.

    Two calls of the core: the mean of the training targets in each leaf, then their sum over trees; the (Nq, N)
    smoother is never formed. The gradient goes to y.

    Args:
        query, train: leaf numbers, (Nq, M) and (N, M) integers in [0, leaves).
        y: (N, C), the training targets.
        leaves: the number of leaves of a tree.

    Shapes: query (Nq, M), train (N, M), y (N, C) -> (Nq, C). A leaf without training rows gives 0.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Curth, Jeffares, van der Schaar, "Why do Random Forests Work? Understanding Tree Ensembles as
    Self-Regularizing Adaptive Smoothers", 2024.
    """
    _check.tensor("y", y, dim=2)
    for name, value in (("query", query), ("train", train)):
        if not isinstance(value, Tensor) or value.dim() != 2:
            raise ValueError(f"{name}: expected leaf numbers of shape (rows, trees), got {value!r}")
    trees = train.shape[1]
    _check_integers("query", query, (query.shape[0], trees), y)
    _check_integers("train", train, (y.shape[0], trees), y)
    _check.count("leaves", leaves)
    train, query = train.int(), query.int()
    counts = _leaf_scatter(train, y.new_ones(y.shape[0], 1), leaves)
    means = _leaf_scatter(train, y, leaves) / counts.clamp(min=1)
    return (_leaf_sum(query, means) / max(trees, 1)).to(y.dtype)


def smoother_weights(query: Tensor, train: Tensor, leaves: int) -> Tensor:
    r"""The smoother itself, $\hat s_i(x) = \frac1M\sum_m [\ell_m(x)=\ell_m(x_i)] / n_{m,\ell}$, (Nq, N).

    Its effective parameters are $\frac{n}{|I|}\sum_{x\in I}\lVert\hat s(x)\rVert^2$. Holds (Nq, N): call it on a
    chunk of queries.

    Shapes: query (Nq, M), train (N, M) integers -> (Nq, N) float32.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: as `leaf_kernel_apply`.
    """
    if not isinstance(train, Tensor) or train.dim() != 2:
        raise ValueError(f"train: expected leaf numbers of shape (rows, trees), got {train!r}")
    _check.count("leaves", leaves)
    count = train.shape[0]
    identity = torch.eye(count, device=train.device)
    return leaf_kernel_apply(query, train, identity, leaves)


def leaf_rows(index: Tensor, rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Sums (count, D) of the rows (N, D) that have a number, and how many (count,), in the rows' order."""
    one = index.int().unsqueeze(1)
    total = _leaf_scatter(one, rows, count)[0]
    return total, _leaf_scatter(one, rows.new_ones(rows.shape[0], 1), count)[0, :, 0]
