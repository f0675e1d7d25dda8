"""Federated averaging by principal directions of the clients' updates (FedLD)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import _check
from ._span import Span
from .lincomb import Weights


def principal_aggregate(deltas: Sequence[Weights], ratio: float) -> Any:
    r"""The clients' updates, each projected on the principal directions of all, averaged.

    For each tensor with the K updates $g_i$ as rows of $G$, $\frac1K G G^\top = U\,\mathrm{diag}(s)\,U^\top$ with
    $s_1 \ge \dots \ge s_K$, and directions $v_j = G^\top u_j$,

    $$\mathrm{out} = \frac1K \sum_i \sum_{j \le \lfloor K\rho \rfloor}
      \frac{s_j}{\sum_l s_l}\,\lVert g_i\rVert\,\mathrm{sign}\langle g_i, v_j\rangle\,
      \frac{v_j}{\lVert v_j\rVert} ,$$

    a combination of the $g_i$ whose coefficients follow from the K x K dots: $\langle g_i, v_j\rangle = K s_j
    u_{ij}$ and $\lVert v_j\rVert^2 = K s_j$. Two passes over the updates.

    Args:
        deltas: K tensors of one shape, or K lists of L tensors, or K state dicts: what each client added to the shared
            weights. Add the result to those.
        ratio: rho, the share of directions that is kept, in (0, 1]; at least one direction must remain.

    Shapes: K of any shape S -> S; lists and state dicts likewise. No gradient flows. The eigenvalues of a float64 K x K
    matrix a tensor are torch.linalg.eigh's, which on a GPU waits for the device.

    Raises:
        ValueError, TypeError: naming the argument; a ratio that leaves no direction.

    Source: Zeng et al., "Tackling Data Heterogeneity in Federated Learning via Loss Decomposition", 2024, as its public
    code has it (there the first round is the plain mean: `lincomb(deltas, [1 / K] * K)`).
    """
    ratio = _check.number("ratio", ratio, low=0, high=1)
    with torch.no_grad():
        try:
            span = Span(deltas, None, None)
        except (TypeError, ValueError) as error:
            text = re.sub(r"\btensors(?=\[|:)", "deltas", str(error))
            raise type(error)(text) from None
        count = len(deltas)
        kept = int(count * ratio)
        if kept < 1:
            raise ValueError(
                f"ratio: {ratio} of {count} directions leaves none; expected at least {1 / count:g}"
            )
        values, vectors = torch.linalg.eigh(span.gram / count)
        values, vectors = values.flip(1)[:, :kept].clamp_min(0), vectors.flip(2)[:, :, :kept]
        norms = span.gram.diagonal(dim1=1, dim2=2).sqrt()
        total = norms.square().sum(1, keepdim=True) / count
        share = values / torch.where(total == 0, 1, total)
        signed = (norms[:, None, :] @ vectors.sign())[:, 0] / count
        lengths = (count * values).sqrt()
        factor = share * signed / torch.where(lengths == 0, 1, lengths)
        return span.combine((vectors @ factor[:, :, None])[:, :, 0])


def softmax_margin_ce(logits: Tensor, target: Tensor, weight: float) -> Tensor:
    r"""Cross entropy and a penalty on confident predictions: FedLD's local loss.

    $$\mathrm{mean}_b\bigl(-\log p_{b, y_b}\bigr) + \lambda \log\bigl(1 + \sum_{b, c} p_{bc}^2\bigr),\qquad
      p = \mathrm{softmax}(z),$$

    the norm taken over the whole batch, as the paper's public code does.

    Args:
        logits: (B, C). target: (B,) int64. weight: lambda.

    Shapes: -> (). float32, float64, bfloat16, float16. Differentiable in the logits.

    Source: Zeng et al., "Tackling Data Heterogeneity in Federated Learning via Loss Decomposition", 2024.
    """
    _check.tensor("logits", logits, dim=2)
    if not isinstance(target, Tensor) or target.dtype != torch.int64:
        raise TypeError("target: expected an int64 tensor")
    if target.shape != logits.shape[:1]:
        raise ValueError(
            f"target: expected shape ({logits.shape[0]},) to go with logits of shape "
            f"{tuple(logits.shape)}, got {tuple(target.shape)}"
        )
    weight = _check.number("weight", weight)
    wide = torch.promote_types(logits.dtype, torch.float32)
    log_p = logits.log_softmax(1, dtype=wide)
    loss = F.nll_loss(log_p, target) + weight * (2 * log_p).exp().sum().log1p()
    return loss.to(logits.dtype)
