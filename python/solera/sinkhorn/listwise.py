"""Losses on orders of classes: list-wise distillation."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _check
from .._registry import accumulate_type


def pld_loss(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    *,
    temperature: float = 1.0,
    reduction: str = "mean",
) -> Tensor:
    r"""List-wise distillation: the likelihood of the teacher's order under a Plackett-Luce model of the student.

    With $\pi$ the true class first and the others by falling teacher logit,

    $$L = \sum_k \alpha_k\Bigl(\log \sum_{l \ge k} e^{s_{\pi_l}} - s_{\pi_k}\Bigr),\qquad
      \alpha_k = \operatorname{softmax}(t / \tau)_{\pi_k} .$$

    The first term is the cross-entropy of the true class, weighted by the teacher's belief in it; every later term is
    the cross-entropy of the next choice among what is left. The tail sums are a reversed `logcumsumexp`: one sort, no
    (C, C) tensor. Composition. Equal teacher logits keep the order of their classes.

    Args:
        student, teacher: (..., C) logits. target: (...) int64. temperature: $\tau > 0$, of the teacher's weights.
        reduction: "mean", "sum" or "none".

    Shapes: (..., C), (..., C), (...) -> () or, for "none", (...); float32 (float64 for float64). Differentiable in
    student; the teacher is a constant.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: "PLD: A Choice-Theoretic List-Wise Knowledge Distillation", 2025; the weights' form from a public summary.
    """
    _check.tensor("student", student, min_dim=1)
    *batch, classes = student.shape
    _check.tensor("teacher", teacher, min_dim=1)
    _check.like("teacher", teacher, tuple(student.shape), student, "student")
    if not isinstance(target, Tensor) or target.dtype != torch.int64:
        raise TypeError(f"target: expected int64, got {getattr(target, 'dtype', type(target))}")
    if tuple(target.shape) != tuple(batch):
        raise ValueError(
            f"target: expected shape {tuple(batch)} to go with student of shape "
            f"{tuple(student.shape)}, got {tuple(target.shape)}"
        )
    if classes == 0:
        raise ValueError(f"student: expected at least one class, got {tuple(student.shape)}")
    temperature = _check.number("temperature", temperature, low=0.0)
    if temperature == 0.0:
        raise ValueError("temperature: expected a positive number, got 0")
    _check.choice("reduction", reduction, ("mean", "sum", "none"))
    acc = accumulate_type(student)
    t = teacher.detach().to(acc)
    first = target.unsqueeze(-1)
    ranked = t.scatter(-1, first, torch.inf)
    order = torch.sort(ranked, dim=-1, descending=True, stable=True).indices
    alpha = (t / temperature).softmax(-1).gather(-1, order)
    s = student.to(acc).gather(-1, order)
    tails = s.flip(-1).logcumsumexp(-1).flip(-1)
    loss = (alpha * (tails - s)).sum(-1)
    if reduction == "none":
        return loss
    return loss.mean() if reduction == "mean" else loss.sum()
