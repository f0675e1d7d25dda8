"""The discrete key-value bottleneck: nearest keys, learned values, keys that follow averages."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _check
from .._route import without_autocast
from .oblivious_forest import leaf_rows

CHUNK = 1 << 22  # distances held at once


def nearest_keys(x: Tensor, keys: Tensor, topk: int = 1) -> Tensor:
    r"""The keys nearest to each row, $\arg\min_j \lVert x - k_j \rVert^2$, by codebook.

    Distances are products, made for some rows at a time: no (c, N, J) tensor beyond 4 million elements.

    Args:
        x: (c, N, d).
        keys: (c, J, d).
        topk: how many, nearest first.

    Shapes: x (c, N, d), keys (c, J, d) -> (c, N, topk) int64. No gradient.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Träuble et al., "Discrete Key-Value Bottleneck", ICML 2023.
    """
    _check.tensor("x", x, dim=3)
    _check.tensor("keys", keys, dim=3)
    books, count, _ = keys.shape
    _check.like("keys", keys, (x.shape[0], count, x.shape[2]), x)
    if not isinstance(topk, int) or not 1 <= topk <= count:
        raise ValueError(f"topk: expected 1 to {count} (the keys), got {topk!r}")
    with torch.no_grad(), without_autocast(x):
        acc = torch.float64 if x.dtype == torch.float64 else torch.float32
        wide = keys.to(acc)
        half = wide.square().sum(2).unsqueeze(1) / 2  # |x|^2 is the same for every key
        found = []
        for part in x.split(max(1, CHUNK // max(1, books * count)), 1):
            score = torch.baddbmm(half, part.to(acc), wide.mT, alpha=-1)
            if topk == 1:
                found.append(score.argmin(2, keepdim=True))
            else:
                found.append(score.topk(topk, 2, largest=False).indices)
        if not found:
            return torch.empty((books, 0, topk), dtype=torch.int64, device=x.device)
        return torch.cat(found, 1)


def kv_bottleneck(x: Tensor, keys: Tensor, values: Tensor, topk: int = 1) -> tuple[Tensor, Tensor]:
    r"""The values of the nearest keys: $y_{ci} = v_{c,j^*}$, $j^* = \arg\min_j \lVert x_{ci} - k_{cj}\rVert^2$.

    A composition. Only the values get a gradient: neither x nor the keys do. With several keys the mean of their
    values is taken.

    Args:
        x: (c, N, d), the heads of N encoded inputs, one for each codebook.
        keys: (c, J, d), values: (c, J, v).
        topk: how many keys.

    Returns:
        (y, index): the values (c, N, v), and the keys' numbers (c, N, topk) int64 for `vq_ema_update_`.

    Shapes: x (c, N, d), keys (c, J, d), values (c, J, v) -> (c, N, v), (c, N, topk).

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Träuble et al., "Discrete Key-Value Bottleneck", ICML 2023; the mean over several keys is this
    library's.
    """
    index = nearest_keys(x, keys, topk)
    _check.tensor("values", values, dim=3)
    _check.like("values", values, (*keys.shape[:2], values.shape[2]), values, "keys")
    _check.same_device("values", values, x)
    at = index.flatten(1).unsqueeze(2).expand(-1, -1, values.shape[2])
    picked = values.gather(1, at)
    if topk > 1:
        picked = picked.unflatten(1, index.shape[1:]).mean(2)
    return picked, index


def vq_ema_update_(
    keys: Tensor,
    key_sum: Tensor,
    size: Tensor,
    x: Tensor,
    index: Tensor,
    decay: float = 0.95,
    eps: float = 1e-5,
) -> None:
    r"""Keys follow the mean of the rows they were nearest to, in place.

    $$n_j \leftarrow d\,n_j + (1-d)\,\#_j,\qquad s_j \leftarrow d\,s_j + (1-d) \sum_{i:\,j_i=j} x_i,\qquad
      k_j = s_j \Big/ \frac{(n_j + \epsilon) \sum n}{\sum n + J\epsilon} .$$

    The sums run in the order of the rows, whatever the device and the thread count.

    Args:
        keys: (c, J, d), key_sum: (c, J, d), size: (c, J); all written.
        x: (c, N, d), the rows; index: (c, N) or (c, N, 1) integers, as `kv_bottleneck` gives them.
        decay: d in [0, 1].
        eps: keeps a key without rows where it is.

    Shapes: keys, key_sum (c, J, d), size (c, J), x (c, N, d), index (c, N) -> None.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: van den Oord, Vinyals, Kavukcuoglu, "Neural Discrete Representation Learning", 2017, appendix A.1;
    decay 0.95 as in the key-value bottleneck's code.
    """
    _check.tensor("keys", keys, dim=3)
    _check.tensor("x", x, dim=3)
    _check.like("key_sum", key_sum, tuple(keys.shape), keys, "keys")
    _check.like("size", size, tuple(keys.shape[:2]), keys, "keys")
    _check.like("x", x, (keys.shape[0], x.shape[1], keys.shape[2]), keys, "keys")
    decay = _check.number("decay", decay, low=0.0, high=1.0)
    eps = _check.number("eps", eps, low=0.0)
    if not isinstance(index, Tensor) or index.dtype not in (torch.int64, torch.int32):
        raise TypeError("index: expected a tensor of int64 or int32")
    _check.same_device("index", index, keys, "keys")
    rows = index.squeeze(2) if index.dim() == 3 and index.shape[2] == 1 else index
    if rows.shape != x.shape[:2]:
        raise ValueError(f"index: expected shape {tuple(x.shape[:2])}, got {tuple(index.shape)}")
    count = keys.shape[1]
    with torch.no_grad():
        for c in range(keys.shape[0]):
            sums, counts = leaf_rows(rows[c], x[c], count)
            size[c].mul_(decay).add_(counts.to(size.dtype), alpha=1 - decay)
            key_sum[c].mul_(decay).add_(sums.to(key_sum.dtype), alpha=1 - decay)
        total = size.sum(1, keepdim=True)
        smooth = (size + eps) * total / (total + count * eps)
        keys.copy_(key_sum / smooth.unsqueeze(2))
