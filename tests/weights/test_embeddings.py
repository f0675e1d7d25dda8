"""Pooling, focal InfoNCE, mixed pairs and diversity, beside the papers' formulas in float64."""

import pytest
import torch
import torch.nn.functional as F
from function_checks import agrees_with_formula, differentiates
from helpers import DEVICE, DTYPES, randn

from solera.norm import l2_normalize
from solera.weights import (
    ema_,
    focal_info_nce,
    masked_mean_pool,
    mix_negatives,
    mix_pairs,
    pairwise_cosine_diversity,
)

F64 = torch.float64


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalize", [False, True])
def test_masked_mean_pool(normalize, dtype):
    mask = torch.rand(4, 7, device=DEVICE) < 0.6
    mask[:, 0] = True

    def formula(x):
        acc = x.float() if x.dtype != F64 else x
        m = mask[:, :, None].to(acc.dtype)
        h = (acc * m).sum(1) / m.sum(1)
        return (F.normalize(h, dim=1) if normalize else h).to(x.dtype)

    x = randn(4, 7, 5, dtype=dtype, grad=True)
    allowed = 0 if dtype in (F64, torch.float32) else 2 * torch.finfo(dtype).eps
    pool = lambda x: masked_mean_pool(x, mask, normalize=normalize)
    agrees_with_formula(pool, formula, (x,), allowed)
    numbers = masked_mean_pool(x, mask.long(), normalize=normalize)
    assert torch.equal(numbers, pool(x))


def focal(q, p, negatives, tau, gamma):
    q, p = F.normalize(q, dim=-1), F.normalize(p, dim=-1)
    scores = [q @ p.T]
    if negatives is not None:
        n = F.normalize(negatives, dim=-1)
        scores.append(q @ n.T if n.dim() == 2 else torch.einsum("bd,bmd->bm", q, n))
    log_p = (torch.cat(scores, 1) / tau).log_softmax(1).diagonal()
    return -((1 - log_p.exp()) ** gamma) * log_p


@pytest.mark.parametrize("shape", [None, (6, 8), (5, 3, 8), (5, 0, 8)], ids=str)
def test_focal_info_nce(shape):
    q, p = randn(5, 8, dtype=F64, grad=True), randn(5, 8, dtype=F64, grad=True)
    negatives = None if shape is None else randn(*shape, dtype=F64, grad=True)
    for gamma in (0.0, 0.5, 2.0):
        truth = focal(q, p, negatives, 0.2, gamma)
        found = focal_info_nce(q, p, negatives, 0.2, gamma, reduction="none")
        torch.testing.assert_close(found, truth)
        torch.testing.assert_close(focal_info_nce(q, p, negatives, 0.2, gamma), truth.mean())
        inputs = [t for t in (q, p, negatives) if t is not None]
        ours = torch.autograd.grad(found.sum(), inputs)
        torch.testing.assert_close(ours, torch.autograd.grad(truth.sum(), inputs))


def test_mixed_negatives_are_convex_and_of_unit_length():
    n, a = (
        randn(3, 4, 8, dtype=F64, grad=True),
        torch.rand(3, 2, 4, dtype=F64, device=DEVICE).softmax(2),
    )
    truth = F.normalize(torch.einsum("bjm,bmd->bjd", a, n), dim=-1)
    torch.testing.assert_close(mix_negatives(n, a), truth)
    shared = F.normalize(torch.einsum("jm,bmd->bjd", a[0], n), dim=-1)
    torch.testing.assert_close(mix_negatives(n, a[0]), shared)
    differentiates(mix_negatives, (n, a.requires_grad_()))


def test_mixup_of_embeddings_and_of_labels():
    """lambda a + (1 - lambda) b; per sample: a teacher's soft label with the smoothed hard one (FerKD)."""
    x, order = randn(6, 3, 2, dtype=F64, grad=True), torch.randperm(6, device=DEVICE)
    share = torch.rand(6, dtype=F64, device=DEVICE, requires_grad=True)
    truth = share.view(6, 1, 1) * x + (1 - share.view(6, 1, 1)) * x[order]
    torch.testing.assert_close(mix_pairs(x, order, share), truth)
    torch.testing.assert_close(mix_pairs(x, order, 0.3), 0.3 * x + 0.7 * x[order])
    differentiates(lambda x, s: mix_pairs(x, order, s), (x, share))
    teacher = randn(4, 5, dtype=F64).softmax(1)
    smooth = F.one_hot(torch.tensor([0, 1, 2, 3], device=DEVICE), 5).double() * 0.9 + 0.02
    a = torch.rand(4, dtype=F64, device=DEVICE)
    both, swap = torch.cat([teacher, smooth]), torch.arange(8, device=DEVICE).roll(4)
    found = mix_pairs(both, swap, torch.cat([a, a]))[:4]
    torch.testing.assert_close(found, a[:, None] * teacher + (1 - a[:, None]) * smooth)


def test_diversity_is_one_minus_the_mean_cosine_of_pairs():
    e = randn(3, 6, 8, dtype=F64, grad=True)
    unit = F.normalize(e, dim=-1)
    cosines = unit @ unit.mT
    off = ~torch.eye(6, dtype=torch.bool, device=DEVICE)
    truth = 1 - torch.stack([c[off].mean() for c in cosines])
    torch.testing.assert_close(pairwise_cosine_diversity(e), truth)
    differentiates(pairwise_cosine_diversity, (e,))
    same = randn(1, 8, dtype=torch.bfloat16).expand(6, 8)
    assert pairwise_cosine_diversity(same).abs() < 1e-2


def test_mean_teachers():
    """theta_t <- m theta_t + (1 - m) theta_s: MHIM, LPLD, WSCoL, BYOL, asynchronous encoders, BossNAS."""
    for m in (0.996, 0.9999, 0.99):
        teacher, student = randn(50, dtype=F64), randn(50, dtype=F64)
        truth = m * teacher + (1 - m) * student
        ema_(teacher, student, m)
        torch.testing.assert_close(teacher, truth)
    # BYOL's loss, and the consistency of two encoders: by the cosine.
    a, b = randn(6, 8, dtype=F64), randn(6, 8, dtype=F64)
    cosine = (l2_normalize(a) * l2_normalize(b)).sum(1)
    torch.testing.assert_close(cosine, F.cosine_similarity(a, b))
    z = randn(4, 6, 8, dtype=F64)  # paths, batch, features: the ensemble's normalised mean
    torch.testing.assert_close(l2_normalize(z).mean(0), F.normalize(z, dim=-1).mean(0))


X, M = torch.ones(2, 3, 4), torch.ones(2, 3, dtype=torch.bool)
Q = torch.ones(2, 4)
BAD = [
    (lambda: masked_mean_pool(Q, M), ValueError, "x: expected 3 dim"),
    (lambda: masked_mean_pool(X, M[:1]), ValueError, "mask: expected shape"),
    (lambda: masked_mean_pool(X, 3), TypeError, "mask: expected a torch.Tensor"),
    (lambda: focal_info_nce(Q, X), ValueError, "p: expected 2 dim"),
    (lambda: focal_info_nce(Q, Q, X[:1]), ValueError, "negatives: expected shape"),
    (lambda: focal_info_nce(Q, Q, tau=0.0), ValueError, "tau: expected a positive"),
    (lambda: focal_info_nce(Q, Q, gamma=-1.0), ValueError, "gamma"),
    (lambda: mix_negatives(Q, Q), ValueError, "negatives: expected 3 dim"),
    (lambda: mix_negatives(X, Q), ValueError, "weights: expected shape"),
    (lambda: mix_pairs(X, [1, 0], 0.5), TypeError, "permutation: expected an int64"),
    (lambda: mix_pairs(X, torch.tensor([0]), 0.5), ValueError, "permutation: expected shape"),
    (lambda: mix_pairs(X, torch.tensor([1, 0]), 1.5), ValueError, "share: expected a finite"),
    (lambda: mix_pairs(X, torch.tensor([1, 0]), torch.ones(3)), ValueError, "share: expected a number"),
    (lambda: pairwise_cosine_diversity(Q[:1]), ValueError, "embeddings: expected at least 2"),
]  # fmt: skip


@pytest.mark.skipif(DEVICE != "cpu", reason="the table's tensors are on the CPU")
@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input(case):
    call, kind, message = BAD[case]
    with pytest.raises(kind, match=message):
        call()
