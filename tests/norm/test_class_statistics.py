"""What is built on class statistics, Gram matrices and memories, each beside its formula in float64."""

import pytest
import torch
from helpers import DEVICE, INTERPRETED, randn

from solera.norm import (
    attenuated_cosine_score,
    cafa_loss,
    class_gaussian_sample,
    class_moments,
    corr_matrix,
    gaussian_weight,
    gnb_logits,
    gram_variance_pairs,
    hidden_covariance_score,
    indexed_stats_update_,
    iter_proto_adapt,
    linear_cka,
    mahalanobis,
    masked_gram_l1,
    masked_mix,
    memory_bank_ema_,
    prototype_drift,
    wpca_score,
)

F64 = torch.float64
close = torch.testing.assert_close


def spd(count, n):
    a = randn(count, n, n, dtype=F64)
    return a @ a.mT + 0.3 * torch.eye(n, dtype=F64, device=DEVICE)


def test_mahalanobis():
    x, means, sigma = randn(7, 4, dtype=F64), randn(3, 4, dtype=F64), spd(3, 4)
    factor = torch.linalg.cholesky(sigma)
    precision = torch.cholesky_inverse(factor)
    want = torch.stack(
        [torch.stack([(b - m) @ p @ (b - m) for m, p in zip(means, precision)]) for b in x]
    )
    close(mahalanobis(x, means, precision), want)
    close(mahalanobis(x, means, cholesky=factor), want)
    close(mahalanobis(x, means, precision[0])[:, 0], want[:, 0])
    close(mahalanobis(x, means, cholesky=factor[0])[:, 0], want[:, 0])
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: mahalanobis(x, means, precision), x)
    assert torch.autograd.gradcheck(lambda x: mahalanobis(x, means, cholesky=factor), x)
    with pytest.raises(ValueError, match="precision: expected exactly one"):
        mahalanobis(x, means)
    with pytest.raises(ValueError, match="means: expected 4 columns"):
        mahalanobis(x, means[:, :2], precision)
    with pytest.raises(ValueError, match="cholesky: expected shape"):
        mahalanobis(x, means, cholesky=factor[:2])


def test_cafa_loss():
    x, means, precision = randn(6, 4, dtype=F64, grad=True), randn(3, 4, dtype=F64), spd(3, 4)
    logits = randn(6, 3, dtype=F64)
    want = 0.0
    for b, row in zip(x.detach(), logits):
        d = [float((b - m) @ p @ (b - m)) for m, p in zip(means, precision)]
        own = d.pop(int(row.argmax()))
        want += torch.log(torch.tensor(own / sum(d), dtype=F64)) / 6
    close(cafa_loss(x, logits, means, precision), want.to(DEVICE))
    assert torch.autograd.gradcheck(lambda x: cafa_loss(x, logits, means, precision), x)
    with pytest.raises(ValueError, match="logits: expected shape"):
        cafa_loss(x, logits[:, :2], means, precision)


def test_masked_gram_l1_and_its_pairs():
    f, g = randn(3, 6, 4, 5, dtype=F64, grad=True), randn(3, 6, 4, 5, dtype=F64)
    pairs = gram_variance_pairs(f, g, 0.2)
    grams = [t.detach().flatten(2) @ t.detach().flatten(2).mT / 19 for t in (f, g)]
    variance = torch.stack(grams).var(0, correction=0).mean(0)
    assert len(pairs) == 7 and len({tuple(p) for p in pairs.tolist()}) == 7
    chosen = variance[pairs[:, 0], pairs[:, 1]]
    assert chosen.min() >= variance.flatten().sort(descending=True).values[6]
    # The published form: a C x C mask over the whole Gram matrix.
    mask = torch.zeros(6, 6, dtype=F64, device=DEVICE)
    mask[pairs[:, 0], pairs[:, 1]] = 1
    gram = f.flatten(2) @ f.flatten(2).mT / 19 + 1e-5 * torch.eye(6, dtype=F64, device=DEVICE)
    want = torch.relu((gram * mask).abs().sum((1, 2)) / mask.count_nonzero()).mean()
    loss = masked_gram_l1(f, pairs)
    close(loss, want)
    close(torch.autograd.grad(loss, f)[0], torch.autograd.grad(want, f)[0])
    assert masked_gram_l1(f, pairs, margin=1e6) == 0


def test_linear_cka():
    x, y = randn(12, 4, dtype=F64, grad=True), randn(12, 3, dtype=F64)
    center = torch.eye(12, dtype=F64, device=DEVICE) - 1 / 12
    k, l = center @ x @ x.T @ center, center @ y @ y.T @ center
    close(linear_cka(x, y), (k * l).sum() / (k.norm() * l.norm()))
    turn = torch.linalg.qr(randn(4, 4, dtype=F64)).Q
    close(linear_cka(x, 3 * x @ turn + 1), torch.ones((), dtype=F64, device=DEVICE))
    assert torch.autograd.gradcheck(lambda x: linear_cka(x, y), x)
    with pytest.raises(ValueError, match="y: expected 12 rows"):
        linear_cka(x, y[:3])


def test_class_gaussian_sample():
    means, sigma = randn(2, 3, dtype=F64), spd(2, 3)
    make = lambda: class_gaussian_sample(
        means, sigma, 20000, generator=torch.Generator(DEVICE).manual_seed(1)
    )
    f = make()
    assert f.shape == (2, 20000, 3) and torch.equal(f, make())
    for c in range(2):
        close(f[c].mean(0), means[c], rtol=0, atol=0.1)
        close(torch.cov(f[c].T), sigma[c], rtol=0.1, atol=0.15)
    generator = lambda: torch.Generator(DEVICE).manual_seed(1)
    noise = torch.randn(2, 4, 3, dtype=F64, device=DEVICE, generator=generator())
    want = means[:, None] + noise @ torch.linalg.cholesky(sigma).mT
    close(class_gaussian_sample(means, sigma, 4, jitter=0.0, generator=generator()), want)
    flat = class_gaussian_sample(means, torch.zeros_like(sigma), 2)  # classes of one sample
    assert torch.isfinite(flat).all()


def test_gaussian_naive_bayes():
    x, labels = randn(90, 5, dtype=F64) + 100, torch.arange(90, device=DEVICE) % 3
    count, means, variances = class_moments(x, labels, 3, covariance=False, correction=0)
    prior = (count / count.sum()).log().double()
    normal = torch.distributions.Normal(means, variances.sqrt())
    want = normal.log_prob(x[:, None]).sum(-1) + prior
    got = gnb_logits(x, means, variances, prior)
    close(got.log_softmax(1), want.log_softmax(1))
    close(got - got[:, :1], want - want[:, :1])
    close(gnb_logits(x, means, variances), got - prior)


def test_correlation_and_search_scores():
    h = randn(40, 6, dtype=F64)
    close(corr_matrix(h), torch.corrcoef(h.T))
    close(corr_matrix(h, normalize=False), torch.cov(h.T, correction=0))
    h[:, 2] = 1.0
    assert not corr_matrix(h)[2].any() and torch.isfinite(corr_matrix(h)).all()
    values = torch.linalg.eigvalsh(torch.corrcoef(h)) + 1e-5
    close(hidden_covariance_score(h), -(values.log() + 1 / values).sum(), rtol=1e-4, atol=1e-4)
    layers = [
        randn(30, 2, 5, dtype=F64) * torch.tensor([9.0, 3, 1, 0.1, 0.1], dtype=F64, device=DEVICE)
    ]
    layers.append(randn(50, 4, dtype=F64))
    want = 0
    for t in layers:
        v = torch.linalg.eigvalsh(torch.cov(t.reshape(-1, t.shape[-1]).T)).flip(0)
        want += next(k for k in range(1, len(v) + 1) if v[:k].sum() / v.sum() >= 0.9)
    assert wpca_score(layers, 1000, share=0.9) == 1000.0 * want


def test_memory_bank():
    bank = torch.nn.functional.normalize(randn(8, 4, dtype=F64), dim=1)
    x, index = randn(5, 4, dtype=F64), torch.tensor([1, 6, 1, 0, 1], device=DEVICE)
    want = bank.clone()
    for i, row in zip(index.tolist(), x):  # as the paper's index_copy, the last write staying
        moved = 0.3 * bank[i] + 0.7 * row
        want[i] = moved / moved.norm()
    out = memory_bank_ema_(bank, index, x, 0.3)
    assert out is bank
    close(bank, want)
    half = torch.ones(3, 2, dtype=torch.bfloat16, device=DEVICE)
    assert memory_bank_ema_(half, index[:0], half[:0]).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="index: expected shape"):
        memory_bank_ema_(bank, index[:2], x)
    with pytest.raises(ValueError, match="momentum: expected a finite number"):
        memory_bank_ema_(bank, index, x, 1.5)


def test_indexed_statistics_and_weight():
    n = 6
    count, mean, squares = (torch.zeros(n, dtype=F64, device=DEVICE) for _ in range(3))
    seen: list[list[float]] = [[] for _ in range(n)]
    for _ in range(4):
        index, value = torch.randint(0, n - 1, (9,), device=DEVICE), randn(9, dtype=F64) + 50
        indexed_stats_update_(count, mean, squares, index, value)
        for i, v in zip(index.tolist(), value.tolist()):
            seen[i].append(v)
    for i, values in enumerate(seen):
        t = torch.tensor(values, dtype=F64)
        assert count[i] == len(values)
        close(mean[i].cpu(), t.mean() if values else torch.zeros((), dtype=F64))
        close(squares[i].cpu(), (t - t.mean()).square().sum() if values else t.sum())
    w = gaussian_weight(mean[:2], mean[:1], torch.tensor(2.0, dtype=F64, device=DEVICE))
    close(w[1], torch.exp(-((mean[1] - mean[0]) ** 2) / 8))


def test_prototype_adaptation():
    support, query = randn(2, 6, 4, dtype=F64, grad=True), randn(2, 5, 4, dtype=F64)
    labels = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 0, 0, 1, 2, 2]], device=DEVICE)
    unit = lambda t: t / t.norm(dim=-1, keepdim=True)
    got = iter_proto_adapt(support, labels, query, 3, iterations=2, tau=0.2)
    for e in range(2):
        s, q = unit(support[e]), unit(query[e])
        p = torch.stack([s[labels[e] == c].mean(0) for c in range(3)])
        for _ in range(2):
            a = torch.softmax(q @ unit(p).T / 0.2, 1)
            p = torch.stack([
                (s[labels[e] == c].sum(0) + a[:, c] @ q) / ((labels[e] == c).sum() + a[:, c].sum())
                for c in range(3)
            ])  # fmt: skip
        close(got[e], p)
    assert torch.autograd.gradcheck(lambda s: iter_proto_adapt(s, labels, query, 3), support)


def test_attenuated_cosine_score():
    x, weight, means = randn(5, 4, dtype=F64), randn(3, 4, dtype=F64), randn(3, 8, dtype=F64)
    logits = x @ weight.T
    score, predicted = attenuated_cosine_score(x, weight, logits, means)
    for i in range(5):
        c = int(logits[i].argmax())
        both = torch.cat([x[i], x[i] * weight[c]])
        assert predicted[i] == c
        close(score[i], logits[i, c] * (both @ means[c]) / (both.norm() * means[c].norm()))


def test_masked_mix():
    a, b = randn(3, 4, dtype=F64), randn(3, 4, dtype=F64)
    features = torch.tensor([True, False, True, False], device=DEVICE)
    m = features.double()
    close(masked_mix(a, b, features), m * a + (1 - m) * b)
    part = torch.rand(3, 1, dtype=F64, device=DEVICE)
    close(masked_mix(a, b, part), part * a + (1 - part) * b)
    close(masked_mix(a, b, features.long()), m * a + (1 - m) * b)
    close(masked_mix(a.float(), b.float(), m), (m * a + (1 - m) * b).float())


def test_prototype_drift():
    old, new, p = (randn(n, 4, dtype=F64) for n in (9, 9, 3))
    w = torch.exp(-(old[:, None] - p).square().sum(-1) / (2 * 0.7**2))
    want = (w[:, :, None] * (new - old)[:, None]).sum(0) / w.sum(0)[:, None]
    close(prototype_drift(old, new, p, 0.7), want)
    assert torch.isfinite(prototype_drift(old, new, p + 1e3, 0.7)).all()
    half = [t.bfloat16() for t in (old, new, p)]
    rounded = prototype_drift(*(t.double() for t in half), 0.7)
    close(prototype_drift(*half, 0.7), rounded.bfloat16())


def test_products_keep_their_precision_under_autocast():
    x, y, p = randn(9, 4), randn(9, 4), randn(3, 4)
    call = lambda: (linear_cka(x, y), prototype_drift(x, y, p, 0.7))
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        got = call()
    close(got, call())


X, M, I = randn(4, 3), randn(2, 3), torch.arange(4, device=DEVICE)
BAD = [
    (lambda: gnb_logits(X, M, M, M), ValueError, r"log_prior: expected shape \(2,\)"),
    (
        lambda: indexed_stats_update_(X[0], X[1], X[2], I, X[3]),
        ValueError,
        r"index: expected shape \(3,\)",
    ),
    (
        lambda: attenuated_cosine_score(X, M, X, torch.cat([M, M], 1)),
        ValueError,
        r"logits: expected shape \(4, 2\)",
    ),
    (
        lambda: attenuated_cosine_score(X, M, X[:, :2], M),
        ValueError,
        r"means: expected shape \(2, 6\)",
    ),
    (lambda: masked_mix(X, X.double(), X), TypeError, "x2: expected torch.float32"),
    (lambda: prototype_drift(X, X[:3], M, 1.0), ValueError, r"new: expected shape \(4, 3\)"),
    (lambda: prototype_drift(X, X, M[:, :2], 1.0), ValueError, "prototypes: expected shape"),
    (
        lambda: iter_proto_adapt(X[None], I[None], M[None, :, :2], 4),
        ValueError,
        r"query: expected shape \(1, 2, 3\)",
    ),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input_is_named(case):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.skipif(INTERPRETED, reason="compositions: nothing of theirs is a kernel")
def test_compile():
    x, means, precision = randn(6, 4), randn(3, 4), spd(3, 4).float()
    logits, pairs = randn(6, 3), torch.tensor([[0, 1], [2, 2]], device=DEVICE)

    def f(x, bank, index):
        loss = cafa_loss(x, logits, means, precision) + linear_cka(x, x * 2)
        loss = (
            loss + masked_gram_l1(x[None], pairs) + gnb_logits(x, means, means.square() + 1).sum()
        )
        return loss + corr_matrix(x).sum(), memory_bank_ema_(bank, index, x)

    bank, index = randn(9, 4), torch.arange(6, device=DEVICE)
    want = f(x, bank.clone(), index)
    got = torch.compile(f, fullgraph=True, backend="aot_eager")(x, bank.clone(), index)
    close(got, want)
