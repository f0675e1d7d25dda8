"""Contrastive, direction and metric losses against the papers' formulas in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, DTYPES, double, randn, relative_error

from solera.norm import (
    any_loss,
    bag_mean_loss,
    batch_negatives,
    cosine_cross_entropy,
    cosine_logits,
    cosine_relation_kl,
    dice_loss,
    feature_direction_loss,
    gaussian_weight,
    info_nce,
    kl_dro_loss,
    loss_reweight,
    multi_similarity_loss,
    pairwise_softplus,
    soft_confusion,
    soft_topk,
)

f64 = torch.float64


@pytest.mark.parametrize("bank", [0, 3])
def test_info_nce(bank):
    q, k = randn(5, 4, dtype=f64, grad=True), randn(5, 4, dtype=f64, grad=True)
    n = randn(bank, 4, dtype=f64, grad=True) if bank else None
    keys = k if n is None else torch.cat([k, n])
    own = torch.arange(5, device=DEVICE)
    want = F.cross_entropy(F.normalize(q) @ F.normalize(keys).t() / 0.2, own)
    got = info_nce(q, k, temperature=0.2, negatives=n)
    torch.testing.assert_close(got, want)
    inputs = [q, k] if n is None else [q, k, n]
    torch.testing.assert_close(torch.autograd.grad(got, inputs), torch.autograd.grad(want, inputs))


def test_float64_student_of_a_float32_teacher():
    s, t, c = randn(5, 4, dtype=f64, grad=True), randn(5, 4), randn(3, 4)
    y = torch.tensor([0, 1, 2, 0, 1], device=DEVICE)
    got = feature_direction_loss(s, t, c, y)
    torch.testing.assert_close(got, feature_direction_loss(s, t.double(), c.double(), y))


def nd(s, t, c, y):
    e = F.normalize(c[y])
    return 1 - (s * e).sum(1) / torch.maximum(s.norm(dim=1), t.norm(dim=1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_feature_direction_loss(dtype):
    s, t, c = (
        randn(6, 5, dtype=dtype, grad=True),
        randn(6, 5, dtype=dtype),
        randn(3, 5, dtype=dtype),
    )
    with torch.no_grad():
        s[:3] *= 4  # longer than the teacher: the cosine's gradient
        s[3:] *= 0.1  # shorter: -e_y / ||t||
    y = torch.tensor([0, 2, 1, 1, 0, 2], device=DEVICE)
    d = double(s, t, c)
    got = feature_direction_loss(s, t, c, y)
    want = nd(*d, y).mean()
    limit = {f64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    assert relative_error(got, want) <= limit
    (ds,) = torch.autograd.grad(got, s)
    (exact,) = torch.autograd.grad(want, d[0])
    assert ds.dtype == dtype and relative_error(ds, exact) <= limit
    if dtype == f64:
        short = -F.normalize(c)[y[3:]] / t[3:].norm(dim=1, keepdim=True) / 6
        torch.testing.assert_close(ds[3:], short)


def test_feature_direction_loss_gradients_and_rows():
    s, t, c = (randn(n, 4, dtype=f64, grad=True) for n in (5, 5, 3))
    y = torch.tensor([0, 2, -100, 1, 1], device=DEVICE)
    loss = lambda s, t, c: feature_direction_loss(s, t, c, y)
    assert torch.autograd.gradcheck(loss, (s, t, c))
    only = lambda s: feature_direction_loss(s, t.detach(), c.detach(), y)
    assert torch.autograd.gradcheck(only, s) and torch.autograd.gradgradcheck(only, s)
    compiled = torch.compile(only, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(s), only(s))
    each = feature_direction_loss(s, t, c, y, reduction="none")
    assert each[2] == 0
    with pytest.raises(ValueError, match="teacher: expected shape"):
        feature_direction_loss(s, t[:2], c, y)
    with pytest.raises(IndexError, match="target: expected labels"):
        feature_direction_loss(s, t, c, y + 2)


def test_cosine_cross_entropy():
    x, y = randn(5, 4, dtype=f64, grad=True), torch.tensor([0, 1, 2, 3, 5], device=DEVICE)
    basis = F.normalize(randn(6, 4, dtype=f64))
    want = F.cross_entropy(F.normalize(x) @ basis.t() / 0.07, y)
    torch.testing.assert_close(cosine_cross_entropy(x, basis, y), want)
    torch.testing.assert_close(F.cross_entropy(cosine_logits(x, basis), y), want)
    torch.testing.assert_close(
        cosine_logits(x, 3 * basis, normalize_weight=True), cosine_logits(x, basis)
    )


def test_multi_similarity_loss():
    x = randn(6, 4, dtype=f64, grad=True)
    y = torch.tensor([0, 0, 0, 1, 1, 2], device=DEVICE)
    s = F.normalize(x) @ F.normalize(x).t()
    total = 0.0
    for i in range(6):
        positive = [j for j in range(6) if y[j] == y[i] and j != i]
        negative = [j for j in range(6) if y[j] != y[i]]
        easiest = min((float(s[i, j]) for j in positive), default=math.inf)
        hardest = max(float(s[i, j]) for j in negative)
        pull = sum((-2 * (s[i, j] - 1)).exp() for j in positive if s[i, j] - 0.1 < hardest)
        push = sum((50 * (s[i, j] - 1)).exp() for j in negative if s[i, j] + 0.1 > easiest)
        total = total + torch.log(torch.as_tensor(1 + pull, dtype=f64)) / 2
        total = total + torch.log(torch.as_tensor(1 + push, dtype=f64)) / 50
    torch.testing.assert_close(multi_similarity_loss(x, y), total / 6)
    assert torch.autograd.gradcheck(lambda x: multi_similarity_loss(x, y), x)


@pytest.mark.parametrize("strategy", ["linupper", "quadratic", "extremes"])
def test_loss_reweight(strategy):
    losses = torch.rand(7, dtype=f64, device=DEVICE, requires_grad=True)
    v = losses.detach()
    h = 2 * (v - v.min()) / (v.max() - v.min()) - 1
    s = {"linupper": h.clamp(max=0.4), "quadratic": 1 - h**2, "extremes": h.abs()}[strategy]
    w = (s / 0.5).softmax(0)
    got = loss_reweight(losses, strategy=strategy, r=0.5, cap=0.4)
    torch.testing.assert_close(got, (w * losses).sum())
    torch.testing.assert_close(torch.autograd.grad(got, losses)[0], w)


def test_kl_dro_loss():
    losses = torch.rand(7, dtype=f64, device=DEVICE, requires_grad=True)
    loss, log_mean = kl_dro_loss(losses, 0.5)
    mean = (losses / 0.5).exp().mean()
    torch.testing.assert_close(loss, 0.5 * mean.log())
    torch.testing.assert_close(
        torch.autograd.grad(loss, losses)[0], (losses / 0.5).softmax(0).detach()
    )
    moved, average = kl_dro_loss(losses, 0.5, normalizer=log_mean + 1, momentum=0.9)
    blend = 0.9 * math.e * mean.detach() + 0.1 * mean.detach()
    torch.testing.assert_close(average.exp(), blend)
    (g,) = torch.autograd.grad(moved, losses)
    torch.testing.assert_close(g, (losses.detach() / 0.5).exp() / blend / 7)


def test_cosine_relation_kl():
    old, new, f = randn(3, 4, dtype=f64), randn(3, 4, dtype=f64, grad=True), randn(6, 4, dtype=f64)
    p, q = ((F.normalize(t) @ F.normalize(f).t() / 0.1).softmax(1) for t in (old, new))
    torch.testing.assert_close(cosine_relation_kl(old, new, f), (p * (p / q).log()).sum(1).mean())


def test_bad_pairs_get_a_gaussian_weight():
    mean = torch.rand(5, dtype=f64, device=DEVICE)
    want = (-((mean - mean.mean()) ** 2) / (2 * mean.var())).exp()
    torch.testing.assert_close(gaussian_weight(mean, mean.mean(), mean.std()), want)


def test_soft_topk():
    x = randn(3, 8, dtype=f64, grad=True)
    y = soft_topk(x, 2.5, alpha=1.5)
    torch.testing.assert_close(y.sum(1), torch.full((3,), 2.5, dtype=f64, device=DEVICE))
    assert torch.equal(y.argsort(1), x.argsort(1))
    g = randn(3, 8, dtype=f64)
    v = (1.5 * y * (1 - y)).detach()
    want = v * g - v * (v * g).sum(1, keepdim=True) / v.sum(1, keepdim=True)
    torch.testing.assert_close(torch.autograd.grad(y, x, g)[0], want)
    function = lambda x: soft_topk(x, 2.5, alpha=1.5)
    assert torch.autograd.gradcheck(function, x)
    assert torch.autograd.gradgradcheck(function, x)
    scalar = lambda x: function(x).square().sum()
    tangent = torch.func.jvp(scalar, (x.detach(),), (g,))[1]
    torch.testing.assert_close(tangent, (torch.func.grad(scalar)(x.detach()) * g).sum())
    with pytest.raises(ValueError, match="k: expected a number between 0 and 8"):
        soft_topk(x, 8)


@pytest.mark.parametrize("dtype", [torch.float32, f64])
def test_soft_topk_of_scores_far_apart(dtype):
    x = (1e4 * torch.arange(6.0, dtype=dtype, device=DEVICE)).requires_grad_()
    y = soft_topk(x, 2)  # every slope is 0
    torch.testing.assert_close(y, (x > 3.5e4).to(dtype))
    assert torch.isfinite(torch.autograd.grad(y, x, torch.ones_like(y))[0]).all()


def test_any_loss():
    p = torch.rand(9, dtype=f64, device=DEVICE, requires_grad=True)
    y = (torch.rand(9, device=DEVICE) < 0.5).double()
    a = 1 / (1 + (-73 * (p - 0.5)).exp())
    tp, fn = (a * y).sum(), ((1 - a) * y).sum()
    fp, tn = (a * (1 - y)).sum(), ((1 - a) * (1 - y)).sum()
    torch.testing.assert_close(soft_confusion(p, y), (tp, fn, fp, tn))
    forms = {
        "accuracy": (tp + tn) / 9,
        "f1": 2 * tp / (2 * tp + fp + fn),
        "balanced_accuracy": (tp / (tp + fn) + tn / (tn + fp)) / 2,
        "gmean": (tp / (tp + fn) * tn / (tn + fp)).sqrt(),
    }
    for metric, value in forms.items():
        torch.testing.assert_close(any_loss(p, y, metric=metric), 1 - value)


def test_dice_losses():
    p = torch.rand(9, dtype=f64, device=DEVICE)
    y = (torch.rand(9, device=DEVICE) < 0.5).double()
    q = (1 - p) ** 0.6 * p
    want = (1 - (2 * q * y + 1) / (q + y + 1)).mean()
    torch.testing.assert_close(dice_loss(p, y, alpha=0.6), want)
    pooled = 1 - 2 * (p * y).sum() / (p.sum() + y.sum())
    torch.testing.assert_close(dice_loss(p, y, gamma=0.0, pooled=True), pooled)


def test_bag_mean_loss():
    p = torch.rand(6, dtype=f64, device=DEVICE)
    bag = torch.tensor([0, 0, 1, 1, 1, 3], device=DEVICE)
    answer = torch.rand(4, dtype=f64, device=DEVICE)
    bags = torch.stack([(p[bag == b].mean() - answer[b]) ** 2 for b in (0, 1, 3)]).mean()
    want = 0.7 * bags + 0.3 * ((p - answer[bag]) ** 2).mean()
    torch.testing.assert_close(bag_mean_loss(p, bag, answer, rho=0.3), want)


def test_cosines_keep_their_precision_under_autocast():
    x, y = randn(5, 4), torch.arange(5, device=DEVICE) % 2
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        got = batch_negatives(x, y), multi_similarity_loss(x, y)
    torch.testing.assert_close(got, (batch_negatives(x, y), multi_similarity_loss(x, y)))


X, Y = randn(4, 3), torch.arange(4, device=DEVICE)
BAD = [
    (lambda: batch_negatives(X, Y[:3]), ValueError, r"target: expected shape \(4,\)"),
    (lambda: multi_similarity_loss(X, Y[:3]), ValueError, r"target: expected shape \(4,\)"),
    (lambda: cosine_relation_kl(X, X, X[:, :2]), ValueError, r"features: expected shape \(4, 3\)"),
    (lambda: cosine_relation_kl(X, X, X.bfloat16()), TypeError, "features: expected torch.float32"),
    (lambda: bag_mean_loss(X[0], Y, X[1]), ValueError, r"bag: expected shape \(3,\)"),
    (lambda: bag_mean_loss(X[0], X[1], X[1]), TypeError, "bag: expected an int64"),
    (lambda: bag_mean_loss(X[0], Y[:3], X), ValueError, "target: expected 1 dim"),
    (lambda: any_loss(X, X[0]), ValueError, r"y: expected shape \(4, 3\)"),
    (lambda: any_loss(X, X + 0j), TypeError, "y: expected zeros and ones"),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input_is_named(case):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()


def test_pairwise_softplus():
    a, b = randn(4, dtype=f64), randn(5, dtype=f64)
    want = torch.stack([F.softplus(-(i - j)) for i in a for j in b]).mean()
    torch.testing.assert_close(pairwise_softplus(a, b), want)
