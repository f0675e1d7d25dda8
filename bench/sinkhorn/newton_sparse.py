"""Benchmark lines of core newton_sparse, and of the solvers composed from dense steps."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import solera
from bench.case import Case, Spec, step
from solera.sinkhorn import (
    barycenter,
    gromov_wasserstein,
    low_rank_sinkhorn,
    sinkhorn,
    sinkhorn_newton_sparse,
    squared_distance_factors,
)


def _assignment(n: int, eta: float, device: str) -> Case:
    """To 1e-12. Sinkhorn needs some 56,000 iterations at n = 500, eta = 1200: a hundredth of them is timed."""
    cost = torch.rand(n, n, dtype=torch.float64, device=device)

    def potentials(cost, **options):
        r = sinkhorn_newton_sparse(cost, epsilon=1 / eta, **options)
        return r.f, r.g

    def hundredth(cost):
        r = sinkhorn(cost, epsilon=1 / eta, max_iterations=560)
        return r.f, r.g

    return Case(
        ours=step(potentials, (cost,)),
        # The whole plan in every Newton system, factored.
        exact=step(lambda c: potentials(c, keep_per_row=n), (cost,)),
        peers={"sinkhorn, 1/100 of its iterations": step(hundredth, (cost,))},
        bytes=cost.numel() * 8,
        tolerance=1e-8,
        floor_note="bytes of C once; 20 iterations and some ten passes read it from the caches",
    )


def _pass(n: int, device: str) -> Case:
    """The dense part of one Newton step beside what a user writes."""
    cost = torch.rand(1, n, n, dtype=torch.float64, device=device)
    a = torch.full((1, n), 1 / n, dtype=torch.float64, device=device)
    f = torch.zeros_like(a)

    def eager(cost, f):
        plan = a.unsqueeze(-1) * a.unsqueeze(-2) * torch.exp((f.unsqueeze(-1) - cost) * 20)
        return plan.sum(-1), plan.sum(-2), plan.topk(8, -1).values

    op = lambda c, f: torch.ops.solera.sinkhorn_newton_pass(c, a, a, f, f, 0.05, 8)[:3]
    return Case(
        ours=step(op, (cost, f)),
        exact=step(eager, (cost, f)),
        eager=step(eager, (cost, f)),
        compiled=step(torch.compile(eager), (cost, f)),
        bytes=cost.numel() * 8,
        written=0,
        tolerance=1e-14,  # the exact form is eager's, in the same precision
    )


def _barycenter(device: str) -> Case:
    t = torch.linspace(0, 1, 100, device=device, dtype=torch.float64)
    h = torch.stack([torch.exp(-((t - c) ** 2) / 0.005) + 1e-6 for c in (0.2, 0.4, 0.6, 0.8)])
    h, cost = h / h.sum(-1, keepdim=True), (t[:, None] - t).square()
    run = lambda h: barycenter(h, cost, epsilon=5e-3, max_iterations=100, tolerance=0)

    def direct(h):
        kernel, u = torch.exp(-cost / 5e-3), torch.ones_like(h)
        for _ in range(100):
            kv = (h / (u @ kernel)) @ kernel.mT
            p = kv.log().mean(0).exp()
            u = p / kv
        return p

    peers = {}
    try:
        import ot

        peers["POT"] = step(
            lambda h: ot.bregman.barycenter(
                h.T, cost, 5e-3, method="sinkhorn_log", numItermax=100, stopThr=0, warn=False
            ),
            (h,),
        )
    except ImportError:
        pass
    return Case(
        ours=step(run, (h,)),
        exact=step(direct, (h,)),
        peers=peers,
        bytes=h.numel() * 8,
        tolerance=1e-9,
    )


def _gromov(device: str) -> Case:
    x, y = torch.rand(100, 2, device=device).double(), torch.rand(80, 3, device=device).double()
    x, y = torch.cdist(x, x), torch.cdist(y, y)
    options = {"max_iterations": 20, "sinkhorn_iterations": 100, "tolerance": 0.0}
    run = lambda x, y: gromov_wasserstein(x, y, epsilon=0.02, **options).plan

    def plain(x, y):
        with solera.backend("reference"):
            return run(x, y)

    peers = {}
    try:
        import ot

        peers["POT"] = step(
            lambda x, y: ot.gromov.entropic_gromov_wasserstein(
                x, y, epsilon=0.02, max_iter=20, tol=0, numItermax=100, stopThr=0, warn=False
            ),
            (x, y),
        )
    except ImportError:
        pass
    return Case(
        ours=step(run, (x, y)),
        exact=step(plain, (x, y)),
        peers=peers,
        bytes=8000 * 8,
        tolerance=1e-9,
    )


def _low_rank(device: str) -> Case:
    factors = squared_distance_factors(
        torch.rand(2000, 3, device=device).double(), torch.rand(1500, 3, device=device).double()
    )
    options = {"rank": 8, "max_iterations": 10, "dykstra_iterations": 20, "tolerance": 0.0}
    run = lambda left, right: low_rank_sinkhorn((left, right), **options).cost
    return Case(
        ours=step(run, factors),
        exact=step(lambda x, y: low_rank_sinkhorn(x @ y.mT, **options).cost, factors),
        tolerance=1e-9,
        bytes=sum(t.numel() * 8 for t in factors),
    )


def specs(device: str) -> Iterator[Spec]:
    f64 = torch.float64
    name = "sinkhorn.sinkhorn_newton_sparse"
    yield Spec(name, "assignment 500x500, 1/eps 1200, to 1e-12", f64,
               lambda: _assignment(500, 1200, device),
               targets={"sinkhorn, 1/100 of its iterations": 1})  # fmt: skip
    yield Spec(name, "the pass of a step, 1000x1000", f64, lambda: _pass(1000, device), quick=False)
    yield Spec(
        "sinkhorn.barycenter", "4 x 100, 100 it", f64, lambda: _barycenter(device), quick=False
    )
    yield Spec("sinkhorn.gromov_wasserstein", "100 and 80 points, 20 x 100 it", f64,
               lambda: _gromov(device), quick=False)  # fmt: skip
    yield Spec("sinkhorn.low_rank_sinkhorn", "2000x1500, rank 8, 10 steps", f64,
               lambda: _low_rank(device), quick=False)  # fmt: skip


def small_calls(device: str):
    """Every op once, on awkward shapes: the sparse solve, and a plan too dense for it."""

    def call(n, m, eta) -> None:
        cost = torch.rand(2, n, m, device=device, dtype=torch.float64).requires_grad_()
        sinkhorn_newton_sparse(cost, epsilon=1 / eta).plan().square().sum().backward()

    yield "newton_sparse", lambda: call(70, 67, 500)
    yield "newton_sparse, dense", lambda: call(9, 5, 5)
