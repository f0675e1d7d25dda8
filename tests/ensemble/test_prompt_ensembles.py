"""Prompt and description ensembles against their formulas in float64; compositions, so not run interpreted."""

import pytest
import torch
from function_checks import agrees_with_formula, compiles, differentiates
from helpers import DEVICE, randn
from torch.nn import functional as F

from solera.ensemble import (
    merge_text_heads,
    prompt_bias,
    prompt_scores,
    prompt_weights,
    segment_similarity,
    select_descriptions,
)

pytestmark = pytest.mark.no_interpreter
F64 = torch.float64
OFFSETS = torch.tensor([0, 2, 3, 7], device=DEVICE)


def test_zero_shot_prompt_weighting_is_the_papers():
    """Scores, weights and prediction of the whole method, logits written out."""
    x, pretrain, t = randn(25, 6, dtype=F64), randn(30, 6, dtype=F64), randn(9, 4, 6, dtype=F64)
    logits = torch.einsum("nd,pcd->npc", x, t)
    mean = 0.5 * (logits.mean(0) + torch.einsum("nd,pcd->npc", pretrain, t).mean(0))
    a = (logits - mean).amax(-1).mean(0)
    scores = prompt_scores(x, t, prompt_bias(t, x, pretrain))
    torch.testing.assert_close(scores, a)
    spread = (a - a.median()).abs().median()
    weights = {
        "raw": a,
        "softmax": a.exp() / a.exp().sum(),
        "select": ((a - a.median()) / spread > 0.5).to(F64),
    }
    assert 0 < weights["select"].sum() < 9
    for kind, w in weights.items():
        torch.testing.assert_close(prompt_weights(scores, kind, 0.5), w)
        want = (w[:, None] * logits).mean(1)
        torch.testing.assert_close(x @ merge_text_heads(t, prompt_weights(scores, kind)).T, want)
    torch.testing.assert_close(merge_text_heads(t), t.mean(0))


def test_selection_never_is_empty():
    a = torch.tensor([1.0, 1.0, 1.0], device=DEVICE)
    assert prompt_weights(a, "select").tolist() == [1, 0, 0]
    assert prompt_weights(torch.tensor([1.0, 1.0, 2.0], device=DEVICE), "select").tolist() == [
        0,
        0,
        1,
    ]


@pytest.mark.parametrize("kind", ["raw", "softmax", "select"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weights_in_half_precision(kind, dtype):
    a = torch.tensor([0.125, 1.0, 0.25, 0.375, 0.1875, 0.75], device=DEVICE)
    got = prompt_weights(a.to(dtype), kind)
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), prompt_weights(a, kind), rtol=8e-3, atol=0)


def described(x, t, offsets, reduce, normalize):
    if normalize:
        x, t = F.normalize(x, dim=1), F.normalize(t, dim=1)
    columns = []
    for first, last in zip(offsets.tolist(), offsets.tolist()[1:]):
        s = x @ t[first:last].T
        part = {"mean": s.mean(1), "max": s.amax(1), "lse": s.logsumexp(1)}
        columns.append(part[reduce])
    return torch.stack(columns, 1)


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduce", ["mean", "max", "lse"])
def test_descriptions_are_the_papers(reduce, dtype):
    x, t = randn(5, 8, dtype=dtype, grad=True), randn(7, 8, dtype=dtype, grad=True)
    for normalize in (True, False):
        ours = lambda x, t, n=normalize: segment_similarity(x, t, OFFSETS, reduce, normalize=n)
        formula = lambda x, t, n=normalize: described(x, t, OFFSETS, reduce, n)
        # Half precision: two roundings of the product's operands.
        agrees_with_formula(ours, formula, (x, t), 5e-7 if dtype == torch.float32 else 2e-2)
    if dtype == F64:
        differentiates(lambda x, t: segment_similarity(x, t, OFFSETS, reduce), (x, t))


def test_selected_descriptions_are_the_best():
    images, t = randn(12, 6, dtype=F64), randn(7, 6, dtype=F64)
    labels = torch.arange(12, device=DEVICE) % 3
    neighbours = torch.tensor([[1], [2], [0]], device=DEVICE)
    s = F.normalize(images, dim=1) @ F.normalize(t, dim=1).T
    for beside in (None, neighbours):
        kept, offsets = select_descriptions(images, labels, t, OFFSETS, 2, beside)
        want = []
        for c in range(3):
            other = labels != c if beside is None else labels == beside[c, 0]
            first, last = OFFSETS[c], OFFSETS[c + 1]
            value = s[labels == c, first:last].mean(0) - s[other, first:last].mean(0)
            want += sorted((value.topk(min(2, len(value))).indices + first).tolist())
        assert kept.tolist() == want and offsets.tolist() == [0, 2, 3, 5]
        assert segment_similarity(images, t[kept], offsets).shape == (12, 3)


def test_compile():
    def f(x, t):
        heads = torch.stack([t, t + 1.0, 2.0 * t])
        w = prompt_weights(prompt_bias(heads, x).sum(1))
        return x @ merge_text_heads(heads, w).T, segment_similarity(x, t, OFFSETS, "lse")

    compiles(f, lambda n: (randn(n, 8, grad=True), randn(7, 8, grad=True)))


T, X = randn(2, 3, 4), randn(5, 4)
LABELS = torch.zeros(5, device=DEVICE).long()
BAD = [
    (lambda: prompt_bias(T), ValueError, "test: expected test images"),
    (lambda: prompt_bias(T, X[:, :3]), ValueError, "test: expected shape"),
    (lambda: prompt_bias(T[0], X), ValueError, "texts: expected 3 dimensions"),
    (lambda: prompt_bias(T, None, X[:0]), ValueError, "pretrain: expected shape"),
    (lambda: prompt_weights(T), ValueError, "scores: expected 1 dimensions"),
    (lambda: prompt_weights(X[0, :0]), ValueError, "scores: expected at least one"),
    (lambda: prompt_weights(X[0], "max"), ValueError, "kind: expected one of"),
    (lambda: prompt_weights(X[0], tau=float("nan")), ValueError, "tau: expected a finite"),
    (lambda: merge_text_heads(T[:0]), ValueError, "texts: expected at least one prompt"),
    (lambda: merge_text_heads(T, X[0]), ValueError, "weights: expected shape"),
    (lambda: segment_similarity(X, T[0], OFFSETS), ValueError, "offsets: expected numbers"),
    (lambda: segment_similarity(X, T[0], OFFSETS.int()), TypeError, "offsets: expected an int64"),
    (lambda: segment_similarity(X, T[0], [0, 3]), ValueError, "offsets: expected an int64"),
    (lambda: segment_similarity(X, T[0, :, :3], OFFSETS), ValueError, "texts: expected shape"),
    (lambda: segment_similarity(X, T[0].half(), OFFSETS), TypeError, "texts: expected torch.float32"),
    (lambda: segment_similarity(X, X, OFFSETS[:2] // 2 * 5, "sum"), ValueError, "reduce: expected"),
    (lambda: select_descriptions(X, LABELS, X, OFFSETS[:2] // 2 * 5, 0), ValueError, "count: expected"),
    (lambda: select_descriptions(X, LABELS[1:], X, OFFSETS[:2] // 2 * 5, 1), ValueError, "labels: "),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input_is_named(case):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()
