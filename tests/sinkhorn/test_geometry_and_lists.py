"""Fréchet and cluster assignments and list-wise losses against their formulas; compositions, not interpreted."""

import itertools
import math

import pytest
import torch
from function_checks import agrees_with_formula, compiles, differentiates
from helpers import DEVICE, randn, relative_error

from solera.sinkhorn import frechet as frechet_module
from solera.sinkhorn import (
    frechet_argmin,
    frechet_assign,
    kmeans_assign,
    laplacian_assign,
    pld_loss,
    project_simplex,
    sinkhorn,
    soft_assign_pool,
)

pytestmark = pytest.mark.no_interpreter
F64 = torch.float64


# ---- Fréchet means -------------------------------------------------------------------------------------


@pytest.mark.parametrize("squared", [True, False])
@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16], ids=str)
def test_frechet_argmin_is_the_papers_argmin(dtype, squared, monkeypatch):
    monkeypatch.setattr(frechet_module, "CHUNK", 100)  # several chunks of two rows
    p = randn(2, 7, 6, dtype=dtype).softmax(-1)
    d = randn(40, 6, dtype=dtype).abs()
    index, value = frechet_argmin(p, d, squared=squared)
    wide = d.double() ** 2 if squared else d.double()
    cost = torch.einsum("...k,yk->...y", p.double(), wide)
    assert index.shape == value.shape == (2, 7)
    assert relative_error(value, cost.amin(-1)) < (1e-14 if dtype == F64 else 1e-6)
    torch.testing.assert_close(cost.gather(-1, index[..., None])[..., 0], cost.amin(-1))
    # The optimal transport cost from p to a Dirac, which has one plan.
    b, y = 1, int(index[1, 2])
    c = wide[y][:, None].contiguous()
    moved = sinkhorn(c, p[b, 2].double(), p[b, 2].double().sum()[None], epsilon=1.0)
    torch.testing.assert_close(moved.transport_cost(), cost[b, 2, y])


def test_frechet_argmin_on_a_one_hot_row_is_its_class():
    d = torch.cdist(randn(5, 3), randn(5, 3))
    d = d + d.mT
    d.fill_diagonal_(0)
    assert torch.equal(frechet_argmin(torch.eye(5, device=DEVICE), d)[0], torch.arange(5))


def brute_projection(x):
    """The best of all supports: on each, x less a constant; feasible if positive."""
    best, found = math.inf, None
    for size in range(1, len(x) + 1):
        for support in itertools.combinations(range(len(x)), size):
            p = torch.zeros_like(x)
            kept = x[list(support)]
            p[list(support)] = kept - (kept.sum() - 1) / size
            gap = float((p - x).square().sum())
            if (p >= 0).all() and gap < best:
                best, found = gap, p
    return found


def test_project_simplex():
    for scale in (0.1, 1.0, 30.0):
        x = randn(6, 5, dtype=F64, scale=scale)
        want = torch.stack([brute_projection(row) for row in x])
        torch.testing.assert_close(project_simplex(x), want)
    assert torch.equal(project_simplex(torch.full((4,), 7.0)), torch.full((4,), 0.25))
    torch.testing.assert_close(project_simplex(torch.tensor([1e30, 0.0])), torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(
        project_simplex(torch.tensor([1e4, 1e4 + 1])), torch.tensor([0.0, 1.0])
    )
    differentiates(project_simplex, (randn(3, 6, dtype=F64, grad=True),))
    low = randn(3, 50, dtype=torch.bfloat16)
    assert relative_error(project_simplex(low), project_simplex(low.double())) < 8e-3


def test_frechet_assign_gradients_are_the_papers():
    p = randn(4, 5, dtype=F64).softmax(-1).requires_grad_()
    d = randn(6, 5, dtype=F64).abs().requires_grad_()
    g = randn(4, 6, dtype=F64)
    hot = frechet_assign(p, d, step=0.3)
    assert torch.equal(hot.argmax(-1), frechet_argmin(p, d)[0])
    assert torch.equal(hot.sum(-1), torch.ones(4, dtype=F64))
    for kind in ("projected", "straight_through"):
        dp, dd = torch.autograd.grad(frechet_assign(p, d, backward=kind, step=0.3), (p, d), g)
        h = hot.detach()
        scores = g if kind == "straight_through" else h - project_simplex(h - 0.3 * g)
        torch.testing.assert_close(dp, -scores @ d.detach() ** 2)
        torch.testing.assert_close(dd, -2 * d.detach() * (scores.mT @ p.detach()))
    (dp,) = torch.autograd.grad(frechet_assign(p, d).square().sum(), p, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dp.sum().backward()


# ---- clusters ------------------------------------------------------------------------------------------


def test_kmeans_assign():
    x, centers = randn(50, 3), randn(7, 3)
    index, distance = kmeans_assign(x, centers)
    every = (x[:, None].double() - centers.double()).square().sum(-1)
    assert torch.equal(index, every.argmin(1))
    torch.testing.assert_close(distance.double(), every.amin(1), rtol=1e-5, atol=1e-9)
    assert kmeans_assign(x[:0], centers)[0].shape == (0,)
    assert not kmeans_assign(centers, centers)[1].any()


def test_diversify_and_conquers_sampling_weights():
    """A cluster is drawn from in proportion to its mean quality, round after round: one line around the assignment."""
    x, centers, quality = randn(30, 2), randn(4, 2), torch.rand(30)
    index, _ = kmeans_assign(x, centers)
    weights = torch.full((4,), 0.25)
    score = torch.zeros(4).index_add_(0, index, quality) / index.bincount(minlength=4).clamp(min=1)
    weights = weights * score / (weights * score).sum()
    want = torch.tensor(
        [quality[index == k].mean() if (index == k).any() else 0.0 for k in range(4)]
    )
    torch.testing.assert_close(weights, want / want.sum())


def laplacian_loop(x, centers, near, w, lam, iterations, labels):
    """The update point by point."""
    n, k = x.shape[0], centers.shape[0]
    s = None
    for _ in range(iterations):
        rows = []
        for p in range(n):
            logits = -(x[p] - centers).square().sum(-1)
            if s is not None:
                logits = logits + lam * sum(w[p, i] * s[near[p, i]] for i in range(near.shape[1]))
            fixed = labels is not None and labels[p] >= 0
            rows.append(torch.eye(k, dtype=F64)[labels[p]] if fixed else logits.softmax(-1))
        s = torch.stack(rows)
        centers = (s.mT @ x) / s.sum(0)[:, None]
    return s, centers


def test_laplacian_assign_is_the_papers_update():
    x, centers = randn(2, 9, 3, dtype=F64, grad=True), randn(2, 4, 3, dtype=F64, grad=True)
    near, w = torch.randint(9, (2, 9, 3)), torch.rand(2, 9, 3, dtype=F64)
    labels = torch.full((2, 9), -1)
    labels[:, 2], labels[1, 5] = 1, 3
    s, m = laplacian_assign(x, centers, near, w, smoothness=0.7, iterations=4, labels=labels)
    for e in range(2):
        want = laplacian_loop(x[e], centers[e], near[e], w[e], 0.7, 4, labels[e])
        torch.testing.assert_close((s[e], m[e]), want)
    small = (randn(3, 1, dtype=F64, grad=True), randn(2, 1, dtype=F64, grad=True))
    near = torch.tensor([[1], [2], [0]])
    differentiates(lambda x, c: laplacian_assign(x, c, near, iterations=2), small)
    # No neighbours, no labels: soft k-means.
    s, _ = laplacian_assign(x, centers, near[:0].new_zeros(2, 9, 0), iterations=1)
    torch.testing.assert_close(s, (-(torch.cdist(x, centers) ** 2)).softmax(-1))


def test_soft_assign_pool():
    def formula(x, g):
        share = (torch.einsum("bnd,bmd->bnm", x, g) / 0.5).softmax(-1)
        return torch.einsum("bnm,bnd->bmd", share, x) / share.sum(1)[..., None], share

    ours = lambda x, g: soft_assign_pool(x, g, 0.5)
    for dtype in (F64, torch.float32, torch.bfloat16):
        tensors = (randn(2, 7, 4, dtype=dtype, grad=True), randn(2, 3, 4, dtype=dtype, grad=True))
        agrees_with_formula(
            ours, formula, tensors, allowed=2e-2 if dtype == torch.bfloat16 else 1e-6
        )
    differentiates(
        ours, (randn(1, 3, 2, dtype=F64, grad=True), randn(1, 2, 2, dtype=F64, grad=True))
    )


def test_rank_detr_matching_is_hungarians_at_small_epsilon():
    """The cost -score * IoU^4 of queries to boxes; the plan's matching at small epsilon is the optimal one."""
    scipy = pytest.importorskip("scipy.optimize", reason="scipy is not installed")
    cost = -(torch.rand(12, 12, dtype=F64) * torch.rand(12, 12, dtype=F64) ** 4)
    plan = sinkhorn(cost, epsilon=2e-4, max_iterations=5000).plan()
    assert torch.equal(
        plan.argmax(1), torch.as_tensor(scipy.linear_sum_assignment(cost.numpy())[1])
    )


# ---- lists ---------------------------------------------------------------------------------------------


def pld_loop(student, teacher, target, tau):
    """Term by term, as the paper writes it."""
    losses = []
    for s, t, y in zip(student, teacher, target):
        rest = [c for c in t.argsort(descending=True).tolist() if c != int(y)]
        order = [int(y), *rest]
        alpha = (t / tau).softmax(-1)
        terms = [alpha[c] * (torch.logsumexp(s[order[k:]], 0) - s[c]) for k, c in enumerate(order)]
        losses.append(sum(terms))
    return torch.stack(losses)


def test_pld_loss_is_the_papers_sum():
    teacher, target = randn(6, 9, dtype=F64), torch.randint(9, (6,))
    for dtype in (F64, torch.float32, torch.bfloat16):
        student = randn(6, 9, dtype=dtype, grad=True)
        t = teacher.to(dtype)
        ours = lambda s: pld_loss(s, t, target, temperature=2.0, reduction="none")
        formula = lambda s: pld_loop(s.double(), t.double(), target, 2.0).to(ours(s).dtype)
        agrees_with_formula(
            ours, formula, (student,), allowed=1e-2 if dtype == torch.bfloat16 else 1e-6
        )
    pair = lambda s: pld_loss(s, teacher[:2], target[:2])
    differentiates(pair, (randn(2, 9, dtype=F64, grad=True),))
    s = randn(6, 9, dtype=F64)
    every = pld_loss(s, teacher, target, reduction="none")
    torch.testing.assert_close(pld_loss(s, teacher, target), every.mean())
    torch.testing.assert_close(pld_loss(s, teacher, target, reduction="sum"), every.sum())
    assert torch.isfinite(pld_loss(1e4 * s, 1e4 * teacher, target))


def test_compile():
    target = torch.tensor([1, 0, 2, 1, 3, 0])
    pld = lambda s: pld_loss(s, s.detach().flip(1), target, reduction="none")
    compiles(pld, lambda n: [randn(6, n, grad=True)])
    compiles(project_simplex, lambda n: [randn(n, 5, grad=True)])
    compiles(soft_assign_pool, lambda n: [randn(n, 5, 3, grad=True), randn(n, 2, 3, grad=True)])


x32 = torch.zeros(4, 3)


@pytest.mark.parametrize(
    "call, error, match",
    [
        (lambda: frechet_argmin(x32, torch.zeros(5, 4)), ValueError, "distances: expected shape"),
        (lambda: frechet_argmin(x32.long(), torch.zeros(5, 3)), TypeError, "probabilities: expected float32"),
        (lambda: frechet_argmin(x32, torch.zeros(0, 3)), ValueError, "at least one label"),
        (lambda: frechet_assign(x32, torch.zeros(5, 3), backward="soft"), ValueError, "backward: expected one"),
        (lambda: frechet_assign(x32, torch.zeros(5, 3), step=0), ValueError, "step: expected a positive"),
        (lambda: project_simplex(torch.zeros(3, 0)), ValueError, "x: expected at least one entry"),
        (lambda: kmeans_assign(x32, torch.zeros(2, 4)), ValueError, "centers: expected shape"),
        (lambda: kmeans_assign(x32, torch.zeros(0, 3)), ValueError, "centers: expected at least one"),
        (lambda: laplacian_assign(x32, x32, x32), TypeError, "neighbors: expected int64"),
        (lambda: laplacian_assign(x32, x32, torch.zeros(3, 1).long()), ValueError, "neighbors: expected shape"),
        (lambda: laplacian_assign(x32, x32, torch.zeros(4, 1).long(), iterations=0), ValueError, "at least 1"),
        (lambda: laplacian_assign(x32, x32, torch.zeros(4, 1).long(), labels=x32), TypeError, "labels: expected int64"),
        (lambda: soft_assign_pool(x32, x32, 0.0), ValueError, "temperature: expected a positive"),
        (lambda: pld_loss(x32, x32[:2], torch.zeros(4).long()), ValueError, "teacher: expected shape"),
        (lambda: pld_loss(x32, x32, torch.zeros(4)), TypeError, "target: expected int64"),
        (lambda: pld_loss(x32, x32, torch.zeros(3).long()), ValueError, "target: expected shape"),
        (lambda: pld_loss(x32, x32, torch.zeros(4).long(), reduction="max"), ValueError, "reduction: expected one"),
    ],
)  # fmt: skip
def test_bad_input(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_assignments_far_from_the_origin_and_without_mass():
    """Differences keep their digits about any origin; a centre that nothing is near gets no NaN."""
    x = torch.rand(12, 2, dtype=torch.float64, device=DEVICE)
    centers = torch.rand(3, 2, dtype=torch.float64, device=DEVICE)
    near = torch.arange(12, device=DEVICE)[:, None]
    want, moved = laplacian_assign(x, centers, near, iterations=5)
    far = [(t + 4096).float() for t in (x, centers)]
    exact, _ = laplacian_assign(*(t.double() for t in far), near, iterations=5)
    got, found = laplacian_assign(*far, near, iterations=5)
    torch.testing.assert_close(got.double(), exact, rtol=0, atol=1e-5)
    torch.testing.assert_close(exact, want, rtol=0, atol=1e-2)
    torch.testing.assert_close(found.double(), moved + 4096, rtol=0, atol=1e-2)
    lone = torch.tensor([[0.0, 0.0], [9.6, 0.0], [30.0, 0.0]], device=DEVICE).requires_grad_()
    cloud = torch.zeros(4, 2, device=DEVICE).requires_grad_()
    for outputs in (
        laplacian_assign(cloud, lone, near[:4], iterations=3),
        soft_assign_pool(cloud + 1.0, lone * torch.tensor([[1.0], [-9.6], [-1.0]], device=DEVICE)),
    ):
        grads = torch.autograd.grad(sum(o.sum() for o in outputs), (cloud, lone))
        assert all(torch.isfinite(t).all() for t in (*outputs, *grads))
