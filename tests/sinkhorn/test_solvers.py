"""Compositions: c-transform and semi-dual, barycenters, Gromov-Wasserstein, low-rank couplings."""

import math
import warnings

import pytest
import torch
from helpers import DEVICE
from sinkhorn_problems import problem

from solera.sinkhorn import (
    barycenter,
    c_transform,
    dual_ascent,
    free_support_barycenter,
    gromov_wasserstein,
    low_rank_sinkhorn,
    semi_dual_cost,
    sinkhorn,
    squared_distance_factors,
)

pytestmark = pytest.mark.no_interpreter
_scipy = pytest.importorskip("scipy.optimize", reason="scipy is not installed")
F64 = torch.float64


def rand(*shape, grad=False):
    return torch.rand(*shape, dtype=F64, device=DEVICE).requires_grad_(grad)


def pot():
    return pytest.importorskip("ot", reason="POT is not installed")


# ---- the dual ----------------------------------------------------------------------------------------


def test_c_transform_soft_and_hard():
    cost, a, b = problem(2, 7, 5, dtype=F64)
    g = rand(2, 5) / 5
    soft = -0.1 * torch.logsumexp((g[:, None] - cost) / 0.1 + b.log()[:, None], -1)
    torch.testing.assert_close(c_transform(cost, g, b, epsilon=0.1), soft)
    torch.testing.assert_close(
        c_transform(cost, g, b, epsilon=1e-5), c_transform(cost, g, b), atol=1e-4, rtol=0
    )
    value, index = c_transform(cost, g, b, return_indices=True)
    want = (cost - g[:, None]).min(-1)
    assert torch.equal(value, want.values) and torch.equal(index, want.indices)
    b[:, 2] = 0  # a column without weight is never chosen, and counts for nothing
    cost[:, :, 2] = -9.0
    cost[0, 0] = math.inf
    assert not (c_transform(cost, g, b, return_indices=True)[1][:, 1:] == 2).any()
    soft = c_transform(cost, g, b, epsilon=0.1)
    assert (
        soft[0, 0].isnan() and soft[:, 1:].min() > -1 and c_transform(cost, g, b)[0, 0] == math.inf
    )
    for epsilon in (0.1, None):
        inputs = (rand(4, 3, grad=True), rand(3, grad=True), rand(3, grad=True))
        f = lambda c, g, b: c_transform(c, g, b, epsilon=epsilon)
        assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(lambda c, g: c_transform(c, g, epsilon=0.2), inputs[:2])


def test_semi_dual_is_below_and_meets_the_value():
    cost, a, b = problem(2, 9, 6, dtype=F64)
    r = sinkhorn(cost, a, b, epsilon=0.05, max_iterations=1000, tolerance=1e-12)
    torch.testing.assert_close(semi_dual_cost(cost, r.g, a, b, epsilon=0.05), r.cost)
    g = rand(2, 6, grad=True)
    value = semi_dual_cost(cost, g, a, b, epsilon=0.05)
    assert (value < r.cost).all()
    (slope,) = torch.autograd.grad(value.sum(), g)
    f = c_transform(cost, g.detach(), b, epsilon=0.05)
    plan = a[..., None] * b[:, None] * ((f[..., None] + g[:, None] - cost) / 0.05).exp()
    torch.testing.assert_close(slope, b - plan.sum(-2))
    assert torch.autograd.gradcheck(
        lambda *t: semi_dual_cost(*t, epsilon=0.3),
        (rand(4, 3, grad=True), rand(3, grad=True), rand(4), rand(3)),
    )


def test_dual_ascent_with_and_without_entropy():
    cost, a, b = problem(12, 9, dtype=F64)
    f, g = dual_ascent(cost, a, b, epsilon=0.1, steps=300)
    want = sinkhorn(cost, a, b, epsilon=0.1, max_iterations=1000, tolerance=1e-12)
    value = semi_dual_cost(cost, g, a, b, epsilon=0.1)
    torch.testing.assert_close(value, want.cost, rtol=1e-6, atol=0)
    torch.testing.assert_close(f, c_transform(cost, g, b, epsilon=0.1))
    cost = rand(8, 8)
    rows, columns = _scipy.linear_sum_assignment(cost.cpu().numpy())
    best = cost[rows, columns].mean()
    _, g = dual_ascent(cost, steps=1000, step_size=0.3)
    assert best - 1e-2 < semi_dual_cost(cost, g) <= best + 1e-12


# ---- barycenters -------------------------------------------------------------------------------------


def grid_histograms(m=24):
    t = torch.linspace(0, 1, m, dtype=F64, device=DEVICE)
    h = torch.stack([(-((t - c) ** 2) / 0.005).exp() for c in (0.25, 0.7)]) + 1e-9
    return h / h.sum(-1, keepdim=True), (t[:, None] - t).square(), t


@pytest.mark.parametrize("debiased", [False, True])
def test_barycenter_against_pot(debiased):
    ot = pot()
    h, cost, _ = grid_histograms()
    ours = barycenter(h, cost, epsilon=0.02, max_iterations=600, tolerance=1e-12, debiased=debiased)
    solve = ot.bregman.barycenter_debiased if debiased else ot.bregman.barycenter
    # Equal weights: POT starts from an unweighted mean, which unequal ones never forget.
    args = (h.T.cpu().numpy(), cost.cpu().numpy(), 0.02)
    theirs = torch.from_numpy(solve(*args, numItermax=2000, stopThr=1e-13))
    torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-6, atol=1e-5 if debiased else 1e-9)
    torch.testing.assert_close(ours.sum(), torch.ones((), dtype=F64, device=DEVICE))


def test_barycenter_with_weights_is_stationary():
    """log p + sum_k w_k f_k / epsilon is one constant, f_k the potentials from p to histogram k."""
    h, cost, _ = grid_histograms()
    w = torch.tensor([0.3, 0.7], dtype=F64, device=DEVICE)
    p = barycenter(h, cost, w, epsilon=0.05, max_iterations=600, tolerance=1e-13)
    f = sinkhorn(
        cost.expand(2, 24, 24), p.expand(2, 24), h, epsilon=0.05, max_iterations=400, validate=False
    ).f
    slope = p.log() + (w @ f) / 0.05
    torch.testing.assert_close(slope, slope.mean().expand(24), rtol=0, atol=1e-7)


def test_barycenter_warns_where_it_still_moves():
    h = torch.rand(2, 9, dtype=torch.float64, device=DEVICE).softmax(-1)
    cost = (torch.arange(9.0, dtype=torch.float64, device=DEVICE)[:, None] - torch.arange(9.0)) ** 2
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        barycenter(h, cost, epsilon=5.0)
        barycenter(h, cost, epsilon=5.0, max_iterations=1, tolerance=0)
    if DEVICE == "cpu":
        with pytest.warns(UserWarning, match="still moved by more than tolerance=1e-07"):
            barycenter(h, cost, epsilon=5.0, max_iterations=1)


def test_barycenter_at_small_epsilon_and_in_batches():
    h, cost, t = grid_histograms()
    p = barycenter(h, cost, epsilon=5e-4, max_iterations=600)  # exp(-C / epsilon) underflows to 0
    assert torch.isfinite(p).all() and abs(float((p * t).sum()) - 0.475) < 2e-3
    same = barycenter(h[:1], cost, epsilon=0.01, max_iterations=600, tolerance=1e-8, debiased=True)
    assert (
        (same - h[0]).abs().sum()
        < 0.02
        < (barycenter(h[:1], cost, epsilon=0.01) - h[0]).abs().sum()
    )
    both = barycenter(
        torch.stack([h, h.flip(-1)]), cost, epsilon=0.01, tolerance=0, max_iterations=50
    )
    one = barycenter(h, cost, epsilon=0.01, tolerance=0, max_iterations=50)
    torch.testing.assert_close(both[0], one)
    assert torch.autograd.gradcheck(
        lambda h, c, w: barycenter(
            h.softmax(-1), c, w, epsilon=0.3, max_iterations=15, tolerance=0
        ),
        (rand(2, 3, grad=True), rand(4, 3, grad=True), rand(2, grad=True)),
    )


def test_free_support_barycenter_against_pot():
    ot = pot()
    clouds, masses = [rand(9, 2), rand(12, 2) + 1], [rand(9), rand(12)]
    masses = [m / m.sum() for m in masses]
    start, w = rand(5, 2), torch.tensor([0.4, 0.6], dtype=F64, device=DEVICE)
    ours = free_support_barycenter(
        clouds, start, masses, w, epsilon=0.1, max_iterations=8, sinkhorn_iterations=500
    )
    theirs = ot.bregman.free_support_sinkhorn_barycenter(
        [c.cpu() for c in clouds], [m.cpu() for m in masses], start.cpu(), 0.1, weights=w.cpu(),
        numItermax=8, stopThr=0, numInnerItermax=5000, method="sinkhorn_log",
    )  # fmt: skip
    torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-6, atol=1e-8)
    stacked = torch.stack([clouds[0], clouds[1][:9]])
    one = free_support_barycenter(stacked, start, epsilon=0.1, max_iterations=3)
    torch.testing.assert_close(
        one, free_support_barycenter(list(stacked), start, epsilon=0.1, max_iterations=3)
    )
    f = lambda y, x: free_support_barycenter(y, x, epsilon=0.5, max_iterations=2)
    assert torch.autograd.gradcheck(
        f, (rand(2, 3, 2, grad=True), rand(2, 2, grad=True)), fast_mode=True
    )


# ---- Gromov-Wasserstein ------------------------------------------------------------------------------


def distances(n, d=2):
    x = rand(n, d)
    return torch.cdist(x, x)


def test_gromov_wasserstein_against_pot():
    ot = pot()
    x, y, (_, a, b) = distances(10), distances(8, 3), problem(10, 8, dtype=F64)
    options = {"max_iterations": 200, "sinkhorn_iterations": 500}
    r = gromov_wasserstein(x, y, a, b, epsilon=0.05, **options, tolerance=1e-12)
    plan, log = ot.gromov.entropic_gromov_wasserstein(
        x.cpu(), y.cpu(), a.cpu(), b.cpu(), "square_loss", epsilon=0.05, tol=1e-13, max_iter=300,
        log=True, numItermax=5000, stopThr=1e-14,
    )  # fmt: skip
    torch.testing.assert_close(r.plan.cpu(), plan, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(r.distortion.cpu(), log["gw_dist"], rtol=1e-6, atol=0)
    four = (x[:, None, :, None] - y[None, :, None, :]).square()
    want = torch.einsum("ijkl,ij,kl->", four, r.plan, r.plan)
    torch.testing.assert_close(r.distortion, want)
    kl = (r.plan * (r.plan / (a[:, None] * b)).log()).sum()
    torch.testing.assert_close(r.cost, want + 0.05 * kl)


def test_gromov_wasserstein_gradient_batch_and_asymmetric():
    x, y = rand(2, 4, 4), rand(2, 3, 3)
    options = {
        "epsilon": 0.5,
        "max_iterations": 100,
        "sinkhorn_iterations": 100,
        "tolerance": 1e-12,
    }
    f = lambda x, y: gromov_wasserstein(x, y, **options).cost
    assert torch.autograd.gradcheck(f, (x.requires_grad_(), y.requires_grad_()), atol=1e-5)
    r = gromov_wasserstein(x, y, **options)
    one = gromov_wasserstein(x[1], y[1], **options)
    torch.testing.assert_close(one.plan, r.plan[1])
    torch.testing.assert_close(r.plan.sum(-2), torch.full_like(r.plan[:, 0], 1 / 3))
    turned = gromov_wasserstein(y, x, **options)
    torch.testing.assert_close(turned.plan.mT, r.plan, rtol=1e-6, atol=1e-9)


# ---- low rank ----------------------------------------------------------------------------------------


def test_low_rank_against_pot_and_the_dense_value():
    ot = pot()
    torch.manual_seed(1)
    x, y, (_, a, b) = rand(15, 2), rand(12, 2) + 0.3, problem(15, 12, dtype=F64)
    factors = squared_distance_factors(x, y)
    cost = torch.cdist(x, y).square()
    torch.testing.assert_close(factors[0] @ factors[1].mT, cost)
    arrays = [t.cpu().numpy() for t in (x, y, a, b)]
    start = ot.lowrank._init_lr_sinkhorn(*arrays, 3, "random", 0.1, 49)
    init = tuple(torch.from_numpy(t).to(DEVICE) for t in start)
    options = {"max_iterations": 40, "dykstra_iterations": 60}
    r = low_rank_sinkhorn(factors, a, b, rank=3, init=init, **options)
    *_, log = ot.lowrank.lowrank_sinkhorn(
        *arrays, rank=3, numItermax=60, rescale_cost=False, log=True, warn=False
    )
    assert abs(float(r.cost) / float(log["value_linear"]) - 1) < 0.02
    plan = r.plan()
    assert r.marginal_error < 1e-3 and torch.linalg.matrix_rank(plan, rtol=1e-9) <= 3
    torch.testing.assert_close(plan.sum(-1), a, atol=1e-4, rtol=0)
    torch.testing.assert_close(plan.sum(-2), b, atol=1e-4, rtol=0)
    torch.testing.assert_close(r.cost, (plan * cost).sum())
    best = ot.emd2(*arrays[2:], cost.cpu().numpy())
    independent = (a[:, None] * b * cost).sum()
    assert best <= r.cost < best + 0.5 * (independent - best)
    same = low_rank_sinkhorn(cost, a, b, rank=3, init=init, **options)
    torch.testing.assert_close(same.cost, r.cost, rtol=1e-6, atol=0)
    v = rand(12, 3)
    torch.testing.assert_close(r.apply(v), plan @ v)
    torch.testing.assert_close(r.apply_transposed(plan), plan.mT @ plan)


def test_low_rank_gradient_and_entropy():
    x, y = rand(12, 2, grad=True), rand(10, 2)
    r = low_rank_sinkhorn(squared_distance_factors(x, y), rank=2, seed=3, max_iterations=20)
    (grad,) = torch.autograd.grad(r.cost, x)
    plan = r.plan()
    torch.testing.assert_close(grad, 2 * (plan.sum(-1, keepdim=True) * x - plan @ y))
    spread = low_rank_sinkhorn(
        squared_distance_factors(x, y), rank=2, epsilon=10.0, max_iterations=60
    )
    torch.testing.assert_close(spread.plan(), torch.full_like(plan, 1 / 120), rtol=1e-2, atol=0)


def test_low_rank_does_not_depend_on_the_unit_of_cost():
    x, y = rand(12, 2), rand(10, 2)
    options = {"rank": 3, "max_iterations": 20, "tolerance": 0}
    want = low_rank_sinkhorn(torch.cdist(x, y).square(), **options)
    for k in (-60, -20, 20, 60):
        got = low_rank_sinkhorn(torch.cdist(x, y).square() * 2.0**k, **options)
        torch.testing.assert_close(got.plan(), want.plan())
        torch.testing.assert_close(got.cost, want.cost * 2.0**k)
    low = low_rank_sinkhorn(torch.cdist(x, y).float() * 1e-25, **options)
    assert torch.isfinite(low.plan()).all()


def test_low_rank_of_a_cost_that_is_zero():
    for cost in (torch.zeros(4, 5, device=DEVICE), squared_distance_factors(*[rand(1, 2)] * 2)):
        r = low_rank_sinkhorn(cost, rank=1, epsilon=0.0)
        assert float(r.cost) == 0 and torch.isfinite(r.plan()).all() and r.marginal_error < 1e-6


def test_barycenter_with_forbidden_pairs():
    """A point that a histogram cannot reach gets no mass; as with costs far above the others, and with gradients."""
    h = rand(2, 3, 5) + 0.1
    h = (h / h.sum(-1, keepdim=True)).requires_grad_()
    cost = rand(6, 5).requires_grad_()
    mask = torch.zeros(6, 5, dtype=torch.bool, device=DEVICE)
    mask[0], mask[1, 2], mask[4, :4] = True, True, True
    grads = []
    for far in (torch.inf, 500.0):
        p = barycenter(h, torch.where(mask, far, cost), epsilon=0.5, max_iterations=300)
        assert p[:, 0].abs().max() < 1e-100
        grads.append((p, *torch.autograd.grad(p.square().sum(), (h, cost))))
    for got, want in zip(*grads):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)
    unused = barycenter(
        h, torch.where(mask, torch.inf, cost), h.new_tensor([0.0, 0.5, 0.5]), epsilon=0.5
    )
    assert torch.isfinite(unused).all()


H, C4 = torch.full((2, 4), 0.25), torch.rand(4, 4)
M = torch.rand(3, 4)
W = torch.full((3,), 1 / 3, requires_grad=True)
BAD = [
    (lambda: c_transform(M, M[0], epsilon=-1), ValueError, "epsilon: expected a finite number"),
    (lambda: c_transform(M, M), ValueError, r"g: expected shape \(4,\)"),
    (lambda: c_transform(M, M[0], epsilon=1, return_indices=True), ValueError, "return_indices"),
    (lambda: c_transform([1], M), TypeError, "cost: expected a torch.Tensor"),
    (lambda: dual_ascent(M, step_size=0), ValueError, "step_size: expected a number > 0"),
    (lambda: dual_ascent(M, steps=0), ValueError, "steps: expected at least 1"),
    (lambda: barycenter(M, M, epsilon=1.0, weights=M[0]), ValueError, r"weights: expected shape \(3,\)"),
    (lambda: barycenter(M, M[:, :3], epsilon=1.0), ValueError, r"cost: expected shape \(3, 4\)"),
    (lambda: barycenter(M, M, epsilon=1.0, debiased=True), ValueError, "cost: expected a square matrix"),
    (lambda: barycenter(M, M, epsilon=0.0), ValueError, "epsilon: expected a number > 0"),
    (lambda: barycenter(-H, C4, epsilon=1.0), ValueError, "histograms: expected finite masses >= 0"),
    (lambda: barycenter(H * torch.nan, C4, epsilon=1.0), ValueError, "histograms: expected finite masses"),
    (lambda: barycenter(0 * H, C4, epsilon=1.0), ValueError, "histograms: expected a positive total"),
    (lambda: barycenter(torch.stack([H[0], 2 * H[0]]), C4, epsilon=1.0), ValueError, "totals, got 1 and 2"),
    (lambda: barycenter(H, C4 * torch.nan, epsilon=1.0), ValueError, "cost: expected numbers or"),
    (lambda: barycenter(H, C4 + torch.inf, epsilon=1.0), ValueError, "cost: a point of a histogram"),
    (lambda: barycenter(H, C4, H[:, 0] * 0, epsilon=1.0), ValueError, "weights: expected a positive total"),
    (lambda: barycenter(H, C4, -H[:, 0], epsilon=1.0), ValueError, "weights: expected finite numbers >= 0"),
    (lambda: free_support_barycenter(M[None], M, epsilon=1.0, support_mass=torch.tensor([0.0, 0.5, 0.5])),
     ValueError, "support_mass: expected masses > 0"),
    (lambda: low_rank_sinkhorn(M, -W.detach(), rank=1), ValueError, "a: expected finite weights >= 0"),
    (lambda: low_rank_sinkhorn(M, 2 * W.detach(), rank=1), ValueError, "equal totals, got 2 and 1"),
    (lambda: low_rank_sinkhorn(M / 0, rank=1), ValueError, "cost: expected finite numbers"),
    (lambda: low_rank_sinkhorn((M, M * torch.nan), rank=1), ValueError, "cost: expected finite numbers"),
    (lambda: low_rank_sinkhorn(M, rank=2, least_mass=0.6), ValueError, "least_mass: expected rank"),
    (lambda: free_support_barycenter([], M, epsilon=1.0), ValueError, "points: expected at least one cloud"),
    (lambda: free_support_barycenter([M[:, :2]], M, epsilon=1.0), ValueError, r"points\[0\]: expected shape"),
    (lambda: free_support_barycenter([M], M, [M[0], M[0]], epsilon=1.0), ValueError, "masses: expected 1"),
    (lambda: gromov_wasserstein(M, M, epsilon=1.0), ValueError, "c_x: expected shape"),
    (lambda: gromov_wasserstein(M[:, :3], M[:, :3], W, epsilon=1.0), ValueError, "a: gradients"),
    (lambda: low_rank_sinkhorn(M, rank=4), ValueError, r"rank: expected at most min\(n, m\) = 3, got 4"),
    (lambda: low_rank_sinkhorn((M, M[:, :2]), rank=1), ValueError, r"cost\[1\]: expected shape"),
    (lambda: low_rank_sinkhorn(1.0, rank=1), TypeError, "cost: expected a tensor or a pair"),
    (lambda: low_rank_sinkhorn(M, rank=2, init=(M, M)), TypeError, r"init: expected None or \(q, r, g\)"),
    (lambda: low_rank_sinkhorn(M, rank=1, step_size=-1), ValueError, "step_size, least_mass: expected"),
    (lambda: squared_distance_factors(M, M[:, :2]), ValueError, r"y: expected shape \(3, 4\)"),
]  # fmt: skip


@pytest.mark.parametrize("call, error, match", BAD, ids=[m for _, _, m in BAD])
def test_bad_input(call, error, match):
    with pytest.raises(error, match=match):
        call()
