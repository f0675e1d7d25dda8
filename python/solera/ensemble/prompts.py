r"""Core `prompts`: how well each of P prompts separates C classes on N images, scored without the N x P x C logits.

$$\ell_{ipc} = \langle x_i, t_{pc}\rangle + b_{pc},\qquad a_p = \tfrac1N \sum_i \max_c \ell_{ipc} .$$

The product runs on tiles of images and of one prompt's classes (or of a few small prompts); a tile is folded into its
rows' maxima while it is in cache. The bias carries what is subtracted to debias: a mean over images of
$\langle x, t\rangle$ is $\langle \bar x, t\rangle$, so it needs mean vectors alone (`prompt_bias`).

With $c^*_{ip}$ the class that attains the maximum (the first of equals), kept only where a gradient is wanted,

$$\mathrm dx_i = \tfrac1N\sum_p g_p\,t_{p c^*_{ip}},\qquad
  \mathrm dt_{pc} = \tfrac{g_p}N \sum_{i: c^*_{ip}=c} x_i,\qquad \mathrm db_{pc} = \tfrac{g_p}N \,|\{i: c^*_{ip}=c\}|
  .$$

Source: Allingham et al., "A Simple Zero-shot Prompt Weighting Technique to Improve Prompt Ensembling in Text-Image
Models", 2023 (scores and debiasing, from the public notebook); the bias by linearity.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _check
from .._autograd import differentiable_vjp
from .._registry import accumulate_type, reference
from .._route import needs_graph, use_reference

_op = torch.ops.solera

CHUNK = 1 << 24  # logits that exist at a time in the reference


# ---- reference ---------------------------------------------------------------------------------------


def _best(images: Tensor, texts: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """(maxima, their classes), (N, P) both, a few prompts at a time."""
    acc = accumulate_type(images)
    x, (prompts, classes) = images.to(acc), texts.shape[:2]
    per_step = max(1, CHUNK // max(1, images.shape[0] * classes))
    values, choice = [], []
    for first in range(0, prompts, per_step):
        some = texts[first : first + per_step].to(acc)
        logits = (x @ some.flatten(0, 1).mT).unflatten(1, (-1, classes))
        if bias is not None:
            logits = logits + bias[first : first + per_step].to(acc)
        best = logits.max(-1)
        values.append(best.values)
        choice.append(best.indices)
    if not values:
        return x.new_zeros(images.shape[0], 0), images.new_zeros(images.shape[0], 0).long()
    return torch.cat(values, 1), torch.cat(choice, 1)


def prompt_scores_reference(images: Tensor, texts: Tensor, bias: Tensor | None) -> Tensor:
    """(P,) by the formula, in the accumulator's precision."""
    return _best(images, texts, bias)[0].mean(0)


@reference("prompt_scores")
def _prompt_scores(images, texts, bias):
    return prompt_scores_reference(images, texts, bias).contiguous()


@reference("prompt_scores_choice")
def _prompt_scores_choice(images, texts, bias):
    values, choice = _best(images, texts, bias)
    return values.mean(0).contiguous(), choice.mT.contiguous()


@reference("prompt_scores_backward")
def _prompt_scores_backward(grad, images, texts, choice, need_images, need_texts, need_bias):
    acc = accumulate_type(images)
    x, share = images.to(acc), grad.to(acc) / images.shape[0]
    none = images.new_empty(0)
    dimages, dtexts, dbias = none, none.clone(), none.to(acc, copy=True)
    rows = torch.arange(texts.shape[0], device=images.device)
    if need_images:
        total = torch.zeros_like(x)
        for p in range(texts.shape[0]):
            total = total + share[p] * texts[p, choice[p]].to(acc)
        dimages = total.to(images.dtype)
    if need_texts:
        wide = torch.zeros(texts.shape, dtype=acc, device=texts.device)
        flat = (rows[:, None] * texts.shape[1] + choice).flatten()
        many = (share[:, None, None] * x).flatten(0, 1)
        dtexts = wide.flatten(0, 1).index_add(0, flat, many).view(texts.shape).to(texts.dtype)
    if need_bias:
        wide = torch.zeros(texts.shape[:2], dtype=acc, device=texts.device)
        dbias = wide.scatter_add(1, choice, share[:, None].expand(choice.shape))
    return dimages, dtexts, dbias


# ---- autograd ----------------------------------------------------------------------------------------


class _PromptScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx, images, texts, bias):
        scores, choice = _op.prompt_scores_choice(images, texts, bias)
        ctx.save_for_backward(images, texts, bias, choice)
        return scores

    @staticmethod
    def backward(ctx, grad):
        images, texts, bias, choice = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled():
            return tuple(
                differentiable_vjp(prompt_scores_reference, (images, texts, bias), needs, (grad,))
            )
        dimages, dtexts, dbias = _op.prompt_scores_backward(grad, images, texts, choice, *needs)
        return (
            dimages if needs[0] else None,
            dtexts if needs[1] else None,
            dbias.to(bias.dtype) if needs[2] else None,
        )


# ---- public functions --------------------------------------------------------------------------------


def check_texts(texts: object) -> Tensor:
    """texts of shape (P, C, D) with at least one class."""
    t = _check.tensor("texts", texts, dim=3)
    if t.shape[1] == 0:
        raise ValueError(f"texts: expected at least one class, got shape {tuple(t.shape)}")
    return t


def prompt_scores(images: Tensor, texts: Tensor, bias: Tensor | None = None) -> Tensor:
    r"""Zero-shot prompt scores: $a_p = \frac1N\sum_i \max_c\,(\langle x_i, t_{pc}\rangle + b_{pc})$.

    The images x prompts x classes logits are never written: memory beyond the result is a tile a thread.

    Args:
        images: (N, D), N at least 1; float32, float64, bfloat16 or float16, usually of unit length.
        texts: (P, C, D) of images' dtype, C at least 1.
        bias: (P, C) or None, added to the logits: `prompt_bias` for the debiased score.

    Shapes: (N, D), (P, C, D), (P, C) -> (P,) in float32 (float64 for float64). Differentiable; where several classes
    attain the maximum one of them (in the kernels the first) has the gradient. A NaN in a row of logits gives NaN.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Allingham et al., "A Simple Zero-shot Prompt Weighting Technique to Improve Prompt Ensembling in Text-Image
    Models", 2023.
    """
    x = _check.tensor("images", images, dim=2)
    if x.shape[0] == 0:
        raise ValueError(f"images: expected at least one row, got shape {tuple(x.shape)}")
    t = check_texts(texts)
    _check.like("texts", t, (*t.shape[:2], x.shape[1]), x, "images")
    _check.same_dtype("texts", t, x, "images")
    if bias is not None:
        _check.like("bias", bias, tuple(t.shape[:2]), x, "images")
    if use_reference():
        return prompt_scores_reference(x, t, bias)
    if needs_graph(x, t, bias):
        return _PromptScores.apply(x, t, bias)
    return _op.prompt_scores(x, t, bias)
