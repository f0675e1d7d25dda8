"""Prototype and Gaussian heads against their formulas in float64; compositions, so not run interpreted."""

import pytest
import torch
from function_checks import agrees_with_formula, compiles, differentiates
from helpers import DEVICE, randn
from torch.nn import functional as F

from solera import norm
from solera.ensemble import (
    class_stats,
    cosine_logits,
    cosine_route,
    dual_head_logits,
    gda_head,
    prototype_calibrate,
    prototype_complement,
    subspace_cosine_logits,
)
from solera.norm import class_moments

pytestmark = pytest.mark.no_interpreter
F64 = torch.float64


def cosines(a, b):
    return F.cosine_similarity(a[:, None], b[None], dim=-1)


def complement(old, new, target):
    return (cosines(old, new) / 0.5).softmax(1) @ target


def calibrated(new, base):
    return 0.3 * new + 0.7 * (5.0 * cosines(new, base)).softmax(1) @ base


def routed(x, centroids):
    z = cosines(x, centroids)
    z = (z - z.mean(1, keepdim=True)) / z.std(1, correction=0, keepdim=True)
    return (z / 0.5).softmax(1)


FORMULAS = {
    "cosine_logits": (lambda x, p: cosine_logits(x, p, 3.0), lambda x, p: 3 * cosines(x, p), "xp"),
    "cosine_route": (lambda x, p: cosine_route(x, p, 0.5), routed, "xp"),
    "prototype_calibrate": (lambda x, p: prototype_calibrate(x, p, 0.3, 5.0), calibrated, "xp"),
    "prototype_complement": (
        lambda x, p, q: prototype_complement(x, p, q, 0.5), complement, "xpq",
    ),
    "dual_head_logits": (
        lambda x, p, w, b: dual_head_logits(x, p, w, b, 0.7, 10.0),
        lambda x, p, w, b: 10.0 * x @ p.T + 0.7 * (x @ w.T + b), "xpwb",
    ),
}  # fmt: skip
SHAPES = {"x": (5, 6), "p": (4, 6), "q": (4, 3), "w": (4, 6), "b": (4,)}


@pytest.mark.parametrize("name", FORMULAS)
def test_formulas(name):
    ours, formula, letters = FORMULAS[name]
    for dtype, allowed in ((F64, 0.0), (torch.float32, 2e-6), (torch.bfloat16, 5e-2)):
        tensors = [randn(*SHAPES[c], dtype=dtype, grad=True) for c in letters]
        agrees_with_formula(ours, formula, tensors, allowed)
    differentiates(ours, tensors)


def test_subspace_cosines_are_eases():
    f, p, w = randn(3, 5, 4, dtype=F64), randn(3, 6, 4, dtype=F64), randn(3, 6, dtype=F64)
    each = torch.stack([cosines(a, b) for a, b in zip(f, p)])
    torch.testing.assert_close(subspace_cosine_logits(f, p, w), (w[:, None] * each).sum(0))
    torch.testing.assert_close(subspace_cosine_logits(f, p), each.sum(0))
    differentiates(subspace_cosine_logits, [t.requires_grad_() for t in (f, p, w)])


def test_adapted_and_pretrained_features_make_a_cosine_classifier():
    """APER: both features side by side, class means of them as prototypes."""
    pretrained, adapted = randn(12, 4, dtype=F64), randn(12, 4, dtype=F64)
    labels = torch.arange(12, device=DEVICE) % 3
    features = torch.cat([pretrained, adapted], 1)
    _, means, _ = class_moments(features, labels, 3, covariance=False)
    want = torch.stack([features[labels == c].mean(0) for c in range(3)])
    torch.testing.assert_close(cosine_logits(features, means), cosines(features, want))
    by_temperature = norm.cosine_logits(features, means, temperature=0.5, normalize_weight=True)
    assert torch.equal(cosine_logits(features, means, 2.0), by_temperature)


def test_a_router_without_spread_is_even():
    x, centroids = randn(3, 4), randn(1, 4).expand(2, 4)
    torch.testing.assert_close(cosine_route(x, centroids), torch.full((3, 2), 0.5, device=DEVICE))


def test_gaussian_head_is_the_papers(monkeypatch):
    from solera.ensemble import prototypes

    monkeypatch.setattr(prototypes, "STEP", 8)
    x, text = randn(40, 6, dtype=F64), randn(4, 6, dtype=F64)
    labels = torch.arange(40, device=DEVICE) % 4
    unit = F.normalize(x, dim=1)
    means = torch.stack([unit[labels == c].mean(0) for c in range(4)])
    centred = unit - means[labels]
    covariance = centred.T.cov()
    shrunk = 39 * covariance + covariance.trace() * torch.eye(6, dtype=F64, device=DEVICE)
    precision = 6 * torch.linalg.pinv(shrunk)
    weight = means @ precision
    bias = torch.tensor(0.25).log().double() - 0.5 * (means * weight).sum(1)
    count, got_means, got_covariance = class_stats(x, labels, 4)
    assert count.tolist() == [10] * 4
    torch.testing.assert_close(got_means, means)
    torch.testing.assert_close(got_covariance, covariance)
    got = gda_head(got_means, got_covariance, 40)
    torch.testing.assert_close(got, (weight, bias), rtol=1e-6, atol=1e-8)
    prior = torch.full((4,), 0.25, dtype=F64, device=DEVICE).log()
    torch.testing.assert_close(
        gda_head(got_means, got_covariance, 40, prior), got, rtol=1e-6, atol=1e-6
    )
    want = 100 * unit @ text.T + 0.5 * (unit @ weight.T + bias)
    torch.testing.assert_close(dual_head_logits(unit, text, *got, 0.5), want, rtol=1e-6, atol=1e-6)
    differentiates(
        lambda m, s: gda_head(m, s + s.T, 40), (means.requires_grad_(), covariance.requires_grad_())
    )


def test_compile():
    def f(x, p):
        weight, bias = p + 1.0, p.sum(1)
        return dual_head_logits(x, p, weight, bias, 0.5), cosine_route(x, p)

    compiles(f, lambda n: (randn(n, 6, grad=True), randn(4, 6, grad=True)))


X, P = randn(5, 6), randn(4, 6)
LABELS = torch.zeros(5, device=DEVICE).long()
BAD = [
    (lambda: cosine_logits(X[0], P), ValueError, "x: expected 2 dimensions"),
    (lambda: cosine_logits(X, P[:, 1:]), ValueError, "prototypes: expected shape"),
    (lambda: cosine_route(X, P[:, 1:]), ValueError, "centroids: expected shape"),
    (lambda: cosine_route(X, P, 0), ValueError, "temperature: expected a positive"),
    (lambda: prototype_calibrate(X, P, 2.0), ValueError, "alpha: expected a finite number in"),
    (lambda: prototype_complement(X, P, P[1:]), ValueError, "new_in_new: expected shape"),
    (lambda: subspace_cosine_logits(X, P), ValueError, "features: expected 3 dimensions"),
    (lambda: subspace_cosine_logits(X[None], P[None], X), ValueError, "weights: expected shape"),
    (lambda: class_stats(X[:1], LABELS[:1], 2), ValueError, "x: expected at least 2 rows"),
    (lambda: class_stats(X, LABELS.int(), 2), TypeError, "labels: expected an int64"),
    (lambda: gda_head(P, P, 9), ValueError, "covariance: expected shape"),
    (lambda: gda_head(P, X[:1].T @ X[:1], 1), ValueError, "count: expected an int"),
    (lambda: dual_head_logits(X, P, X, P[:, 0], 1.0), ValueError, "weight: expected shape"),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input_is_named(case):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()
