"""Compositions over `small` and `dense`: soft permutations, orders, top k, matching with dustbins."""

import importlib
import math

import pytest
import torch
from helpers import DEVICE, randn, relative_error

from solera.sinkhorn import (
    gumbel_sinkhorn,
    log_optimal_transport,
    sinkhorn_normalize,
    soft_rank,
    soft_sort,
    soft_top_k,
)
from solera.weights._random import random_words

pytestmark = pytest.mark.no_interpreter
F64 = torch.float64


def log_sinkhorn(x, iterations):
    for _ in range(iterations):
        x = x - x.logsumexp(-1, keepdim=True)
        x = x - x.logsumexp(-2, keepdim=True)
    return x.exp()


def test_gumbel_sinkhorn_paper():
    x = randn(3, 5, 5, dtype=F64, grad=True)
    drawn = [torch.Generator(device=DEVICE).manual_seed(4) for _ in range(2)]
    e = torch.empty(2, 3, 5, 5, dtype=F64, device=DEVICE).exponential_(generator=drawn[0])
    gumbel = -torch.log(-torch.log(torch.exp(-e)))
    torch.testing.assert_close(
        gumbel_sinkhorn(x, 0.7, 10, n_samples=2, generator=drawn[1]),
        log_sinkhorn((x + gumbel) / 0.7, 10),
    )
    got = gumbel_sinkhorn(x, 0.7, 10, n_samples=2, seed=4)
    words = random_words(4, 0, 0, 2 * 3 * 25).to(DEVICE)
    gumbel = -torch.log(-torch.log((words.double() + 0.5) / 2**32)).reshape(2, 3, 5, 5)
    torch.testing.assert_close(got, log_sinkhorn((x + gumbel) / 0.7, 10))
    assert torch.equal(gumbel_sinkhorn(x, 0.7, 10, n_samples=2, seed=4), got)
    assert not torch.equal(gumbel_sinkhorn(x, 0.7, 10, n_samples=2, seed=5), got)
    plain = gumbel_sinkhorn(x, 1.0, 10, noise=0.0)
    torch.testing.assert_close(plain[0], sinkhorn_normalize(x, 10, variant="log"))
    assert torch.autograd.gradcheck(lambda x: gumbel_sinkhorn(x, 0.7, 3, seed=4), x)
    # The noise has the mean and variance of a Gumbel variable.
    many = gumbel_sinkhorn(
        torch.zeros(2, 2, dtype=F64, device=DEVICE), 1.0, n_samples=40000, seed=1
    )
    # log P_11 / P_12 of a balanced 2 x 2 is half of a difference of differences of four Gumbels.
    ratio = (many[..., 0, 0] / many[..., 0, 1]).log() * 2
    assert abs(float(ratio.var()) / (4 * math.pi**2 / 6) - 1) < 0.05


def test_gumbel_sinkhorn_of_a_seed_compiles():
    """One graph, with the noise of the same call in eager mode; any int is a seed."""
    x = randn(2, 4, 4, grad=True)
    for seed in (7, -1, 2**63):
        f = lambda x: gumbel_sinkhorn(x, 0.5, 5, n_samples=3, seed=seed)
        torch._dynamo.reset()
        compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), f(x))
        (grad,) = torch.autograd.grad(compiled(x).square().sum(), x)
        torch.testing.assert_close(grad, torch.autograd.grad(f(x).square().sum(), x)[0])
    assert torch.isfinite(gumbel_sinkhorn(torch.zeros(256, 256, device=DEVICE), seed=0)).all()


def test_gumbel_sinkhorn_hard(monkeypatch):
    pytest.importorskip("scipy")
    x = randn(2, 6, 6, grad=True)
    hard = gumbel_sinkhorn(x, 0.5, hard=True, seed=1)
    soft = gumbel_sinkhorn(x, 0.5, seed=1)
    rounded = hard.detach().round()
    assert (hard - rounded).abs().max() < 1e-6
    assert (rounded.sum(-1) == 1).all() and (rounded.sum(-2) == 1).all()
    grad = torch.randn_like(hard)
    for a, b in zip(torch.autograd.grad(hard, x, grad), torch.autograd.grad(soft, x, grad)):
        torch.testing.assert_close(a, b)

    def absent(name):
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(ImportError, match="needs scipy"):
        gumbel_sinkhorn(x, 0.5, hard=True)


@pytest.mark.parametrize("n", [8, 40])
def test_soft_sort_and_rank(n):
    """The formula in float64, and the hard limit."""
    x = randn(3, n, dtype=F64)
    z = torch.sigmoid((x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True, unbiased=False))
    y = torch.linspace(0, 1, n, dtype=F64, device=DEVICE)
    plan = log_sinkhorn(-(z.unsqueeze(-1) - y).square() / 0.05, 60)
    options = {"epsilon": 0.05, "iterations": 60}
    ranks = torch.arange(1, n + 1, dtype=F64, device=DEVICE)
    torch.testing.assert_close(soft_sort(x, **options), (plan * x.unsqueeze(-1)).sum(-2))
    torch.testing.assert_close(soft_rank(x, **options), plan @ ranks)
    torch.testing.assert_close(
        soft_sort(x, **options, direction="descending"), soft_sort(x, **options).flip(-1)
    )
    torch.testing.assert_close(
        soft_rank(x, **options, direction="descending"), n + 1 - plan @ ranks
    )
    even = torch.randperm(n, device=DEVICE).double() / (n - 1)
    sharp = {"epsilon": 1e-4 / n, "iterations": 500, "squash": False}
    torch.testing.assert_close(soft_sort(even, **sharp), even.sort()[0], atol=1e-2, rtol=0)
    torch.testing.assert_close(
        soft_rank(even, **sharp), even.argsort().argsort().double() + 1, atol=1e-2, rtol=0
    )


@pytest.mark.parametrize("n", [4, 33])
def test_soft_sort_and_rank_gradients(n):
    x = randn(n, dtype=F64, grad=True)
    for f in (soft_sort, soft_rank):
        g = lambda x: f(x, epsilon=0.3, iterations=100, squash=False)
        assert torch.autograd.gradcheck(g, x, fast_mode=True)
    assert soft_sort(x.detach().bfloat16()).dtype == torch.bfloat16


def test_soft_top_k_against_sinkhorn_to_two_bins():
    x, k, eps = randn(4, 9, dtype=F64), 2.5, 0.3
    y = soft_top_k(x, k, epsilon=eps)
    assert (y.sum(-1) - k).abs().max() < 1e-12
    masses = torch.tensor([k, 9 - k], dtype=F64, device=DEVICE)
    z = torch.stack([x, torch.zeros_like(x)], -1) / eps
    for _ in range(500):  # rows of mass 1, columns of masses k and n - k
        z = z - z.logsumexp(-1, keepdim=True)
        z = z - z.logsumexp(-2, keepdim=True) + masses.log()
    torch.testing.assert_close(y, z.exp()[..., 0], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(
        soft_top_k(x, k, epsilon=eps, largest=False), soft_top_k(-x, k, epsilon=eps)
    )
    hard = soft_top_k(x, 3, epsilon=1e-4)
    assert torch.equal(hard.round(), torch.zeros_like(x).scatter(-1, x.topk(3)[1], 1.0))


def test_soft_top_k_gradients_and_range():
    x = randn(2, 6, dtype=F64, grad=True)
    f = lambda x: soft_top_k(x, 2, epsilon=0.5)
    assert torch.autograd.gradcheck(f, x)
    assert torch.autograd.gradgradcheck(f, x)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        z = randn(3, 1000, dtype=dtype, grad=True)
        y = soft_top_k(z, 10)
        wide = z.detach().double().requires_grad_()
        exact = soft_top_k(wide, 10)
        allowed = 1e-5 if dtype == torch.float32 else 1e-2
        grad = torch.randn_like(exact)
        want = torch.autograd.grad(exact, wide, grad)[0]
        assert y.dtype == dtype and relative_error(y, exact) < allowed
        assert relative_error(torch.autograd.grad(y, z, grad.to(dtype))[0], want) < 2 * allowed
    for value in (1e30, 0.0):  # far apart, and all alike
        z = torch.linspace(-1, 1, 5, device=DEVICE) * value
        y = soft_top_k(z.requires_grad_(), 2)
        assert torch.isfinite(y).all() and abs(float(y.detach().sum()) - 2) < 1e-5
        assert torch.isfinite(torch.autograd.grad(y.sum(), z)[0]).all()
    with pytest.raises(ValueError, match="k: expected 0 < k < n"):
        soft_top_k(x, 6)
    with pytest.raises(NotImplementedError, match=r"torch\.func"):
        torch.func.vmap(lambda x: soft_top_k(x, 2))(x)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_soft_top_k_at_any_epsilon(dtype):
    """The sum is k where epsilon is far below a last place of x, too: against exact differences in float64."""
    ties = torch.tensor([3.0, 3.0, 1.0, 3.0, 1.0, -2.0], device=DEVICE)
    last = torch.finfo(dtype).eps
    rows = [ties, 1 + last * torch.arange(6.0, device=DEVICE), randn(6), torch.zeros_like(ties)]
    for x in rows:
        x = x.to(dtype).requires_grad_()
        for k in (1, 2, 2.5, 5, 5.7, 0.3):
            for epsilon in (1e-50, 1e-30, 1e-12, last / 3, 1e-6, 0.1, 1e8):
                y = soft_top_k(x, k, epsilon=epsilon)
                d = x.detach().double()
                z = (d - d.sort(descending=True)[0][math.ceil(k) - 1]) / epsilon
                z = torch.where(z.isnan(), 0.0, z).clamp(-1e6, 1e6)
                low, high = torch.tensor(-2e6), torch.tensor(2e6)
                for _ in range(200):
                    middle = (low.double() + high) / 2
                    above = torch.sigmoid(z - middle).sum() > k
                    low, high = torch.where(above, middle, low), torch.where(above, high, middle)
                torch.testing.assert_close(
                    y.detach().double(), torch.sigmoid(z - middle), rtol=0, atol=2e-5
                )
                (grad,) = torch.autograd.grad((y * torch.arange(6.0, device=DEVICE)).sum(), x)
                assert not grad.isnan().any()


def matching_formula(scores, alpha, iterations):
    """The definition, written out: marginals, alternation in the log domain, normalisation put back."""
    b, m, n = scores.shape
    z = torch.nn.functional.pad(scores, (0, 1, 0, 1))
    inside = torch.nn.functional.pad(torch.ones_like(scores), (0, 1, 0, 1))
    z = z + (1 - inside) * alpha
    mu = torch.ones(m + 1, dtype=z.dtype, device=z.device)
    nu = torch.ones(n + 1, dtype=z.dtype, device=z.device)
    mu[-1], nu[-1] = n, m
    log_mu, log_nu = (mu / (m + n)).log(), (nu / (m + n)).log()
    v = z.new_zeros(b, n + 1)
    for _ in range(iterations):
        u = log_mu - (z + v.unsqueeze(1)).logsumexp(2)
        v = log_nu - (z + u.unsqueeze(2)).logsumexp(1)
    return z + u.unsqueeze(2) + v.unsqueeze(1) + math.log(m + n)


def test_log_optimal_transport():
    scores, alpha = randn(2, 5, 7, dtype=F64, grad=True), torch.tensor(0.3, dtype=F64)
    alpha = alpha.detach().to(DEVICE).requires_grad_()
    got, want = log_optimal_transport(scores, alpha, 7), matching_formula(scores, alpha, 7)
    torch.testing.assert_close(got, want)
    assert (got - want).abs().max() < 1e-12
    grad = torch.randn_like(got)
    for a, b in zip(
        torch.autograd.grad(got, (scores, alpha), grad),
        torch.autograd.grad(want, (scores, alpha), grad),
    ):
        torch.testing.assert_close(a, b)
    f = lambda s, a: log_optimal_transport(s, a, 3)
    assert torch.autograd.gradcheck(f, (scores, alpha), fast_mode=True)
    assert torch.autograd.gradgradcheck(f, (scores, alpha), fast_mode=True)
    # Ordinary rows and columns sum to 1, the bins to the other side's count.
    p = log_optimal_transport(scores, alpha, 300).detach().exp()
    torch.testing.assert_close(p.sum(-1)[:, :-1], torch.ones_like(p.sum(-1)[:, :-1]))
    torch.testing.assert_close(p.sum(-2)[:, :-1], torch.ones_like(p.sum(-2)[:, :-1]))
    torch.testing.assert_close(p.sum((-1, -2)), p.new_full((2,), 12.0))
    grads = [
        torch.autograd.grad(
            log_optimal_transport(scores, alpha, 300, gradient=g), (scores, alpha), grad
        )
        for g in ("unrolled", "implicit")
    ]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-6, atol=1e-9)
    each = torch.func.vmap(lambda s: log_optimal_transport(s, 0.3, 7))(scores.detach())
    torch.testing.assert_close(each, got.detach())
    large = log_optimal_transport(randn(1, 30, 40, scale=20.0), 1.0)
    assert torch.isfinite(large).all()


def test_log_optimal_transport_saves_the_scores_alone():
    scores = randn(1, 20, 30, grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.numel()) or t, lambda t: t
    ):
        log_optimal_transport(scores, 0.0, 50)
    assert sum(kept) <= 21 * 31


def test_bad_input():
    x = randn(2, 3, 4)
    for error, match, call in (
        (ValueError, "logits: expected square", lambda: gumbel_sinkhorn(x)),
        (ValueError, "tau: expected a number > 0", lambda: gumbel_sinkhorn(x[:, :, :3], 0.0)),
        (TypeError, "seed: expected an int", lambda: gumbel_sinkhorn(x[:, :, :3], seed=1.5)),
        (ValueError, "seed: given together", lambda: gumbel_sinkhorn(
            x[:, :, :3], seed=1, generator=torch.Generator())),
        (ValueError, "epsilon: expected a number > 0", lambda: soft_sort(x, epsilon=0.0)),
        (ValueError, "direction: expected one of", lambda: soft_rank(x, direction="up")),
        (TypeError, "iterations: expected an int", lambda: soft_rank(x, iterations=2.0)),
        (ValueError, "scores: expected at least one", lambda: log_optimal_transport(x[:, :0], 1.0)),
        (ValueError, "bin_score: expected a number or", lambda: log_optimal_transport(x, x)),
        (ValueError, "gradient: expected one of", lambda: log_optimal_transport(x, 1.0, gradient="no")),
        (ValueError, "iterations: expected a positive", lambda: log_optimal_transport(x, 1.0, 0)),
    ):  # fmt: skip
        with pytest.raises(error, match=match):
            call()
