"""Benchmark lines of cores streaming and streaming_apply, beside chunked torch and geomloss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from bench.case import Case, Spec, in_double, step
from solera.nn import SamplesLoss
from solera.sinkhorn import sinkhorn_points

from . import ott

CHUNK = 1000


def _chunked(x: Tensor, y: Tensor, epsilon: float, iterations: int) -> tuple[Tensor, Tensor]:
    """What a user writes to stay within memory: rows of the squared distances, a thousand at a time."""

    def softmin(x: Tensor, y: Tensor, g: Tensor) -> Tensor:
        lengths = y.square().sum(-1)
        out = []
        for rows in x.split(CHUNK):
            c = rows.square().sum(-1, keepdim=True) + lengths - 2.0 * (rows @ y.mT)
            out.append(-epsilon * torch.logsumexp((g - c) / epsilon, -1))
        return torch.cat(out) + epsilon * torch.tensor(float(len(y))).log()

    g = y.new_zeros(len(y))
    for _ in range(iterations):
        f = softmin(x, y, g)
        g = softmin(y, x, f)
    shift = 0.5 * (g.mean() - f.mean())
    return f + shift, g - shift


def _ours(x: Tensor, y: Tensor, epsilon: float, iterations: int) -> tuple[Tensor, Tensor]:
    r = sinkhorn_points(x, y, epsilon=epsilon, max_iterations=iterations, validate=False)
    return r.f, r.g


def _solve_case(n: int, d: int, epsilon: float, iterations: int, device: str) -> Case:
    x, y = torch.randn(n, d, device=device), torch.randn(n, d, device=device)
    options = {"epsilon": epsilon, "iterations": iterations}
    return Case(
        ours=step(partial(_ours, **options), (x, y)),
        exact=in_double(lambda *t: step(partial(_ours, **options), t), (x, y)),
        eager=step(partial(_chunked, **options), (x, y)),
        peers={"OTT-JAX": step(ott.points(epsilon, iterations), (x, y))}
        if ott.available() and n >= 5000
        else {},
        bytes=2 * n * (d + 2) * 4,
        flops=2 * n * n * d * iterations,
        tolerance=1e-4,
        floor_note="one product an iteration; n m exponentials besides",
    )


def _gradient(x: Tensor, y: Tensor, epsilon: float) -> Tensor:
    return sinkhorn_points(x, y, epsilon=epsilon, max_iterations=10, validate=False).cost


def _whole_gradient(x: Tensor, y: Tensor, epsilon: float) -> Tensor:
    """The potentials chunked and the plan's row means from the whole matrix."""
    with torch.no_grad():
        f, g = _chunked(x, y, epsilon, 10)
    c = x.square().sum(-1, keepdim=True) + y.square().sum(-1) - 2.0 * (x @ y.mT)
    p = torch.exp((f[:, None] + g - c.detach()) / epsilon) / (len(x) * len(y))
    return f.mean() + g.mean() + (p * (c - c.detach())).sum()


def _gradient_case(n: int, d: int, epsilon: float, device: str) -> Case:
    x, y = (torch.randn(n, d, device=device).requires_grad_() for _ in range(2))
    one = torch.ones((), device=device)
    ours, whole = partial(_gradient, epsilon=epsilon), partial(_whole_gradient, epsilon=epsilon)
    return Case(
        ours=step(ours, (x, y), [one]),
        exact=in_double(lambda *t: step(ours, t, [one.double()]), (x, y)),
        eager=step(whole, (x, y), [one]),
        bytes=4 * n * (d + 2) * 4,
        flops=2 * n * n * d * 14,
        tolerance=1e-4,
    )


def _to_error(tolerance: float, epsilon: float, x: Tensor, y: Tensor) -> Tensor:
    return sinkhorn_points(
        x, y, epsilon=epsilon, epsilon_scaling=(0.5, 0.25), tolerance=tolerance,
        max_iterations=1000, validate=False,
    ).cost  # fmt: skip


def _error_case(n: int, tolerance: float, device: str) -> Case:
    """Solves to an L1 error of the marginals, each package by its own stopping rule and schedule of epsilon.

    geomloss has no rule but its schedule: scaling 0.9 ends at 8e-3 here, so it stands beside a tolerance of 1e-2 alone.
    """
    epsilon = 0.005  # of |x - y|^2: geomloss's blur 0.05
    x, y = torch.rand(n, 2, device=device), 0.8 * torch.rand(n, 2, device=device)
    ours = partial(_to_error, tolerance, epsilon)
    peers = {}
    if ott.available() and tolerance < 1e-2:
        peers["OTT-JAX"] = step(ott.points_to(epsilon, tolerance), (x, y))
    if tolerance >= 1e-2:
        try:
            import geomloss

            theirs: Callable = geomloss.SamplesLoss(
                "sinkhorn", blur=0.05, scaling=0.9, debias=False, backend="tensorized"
            )
            peers["geomloss"] = step(theirs, (x, y))
        except ImportError:
            pass
    return Case(
        ours=step(ours, (x, y)),
        exact=in_double(lambda *t: step(partial(_to_error, tolerance / 100, epsilon), t), (x, y)),
        peers=peers,
        bytes=2 * n * 4 * 4,
        tolerance=tolerance,
        floor_note="iterations until the error is small",
    )


def _loss_case(n: int, d: int, device: str) -> Case:
    x, y = torch.rand(n, d, device=device), 0.8 * torch.rand(n, d, device=device)
    ours = SamplesLoss("sinkhorn", blur=0.05)
    peers = {}
    try:
        import geomloss

        theirs: Callable = geomloss.SamplesLoss("sinkhorn", blur=0.05, backend="tensorized")
        peers["geomloss"] = step(theirs, (x, y))
    except ImportError:
        pass
    return Case(
        ours=step(ours, (x, y)),
        exact=in_double(lambda *t: step(ours, t), (x, y)),
        peers=peers,
        bytes=2 * n * (d + 2) * 4,
        tolerance=1e-3,
    )


def specs(device: str) -> Iterator[Spec]:
    f32 = torch.float32

    def solve(label: str, quick: bool, **case) -> Spec:
        make = lambda: _solve_case(device=device, **case)
        return Spec("sinkhorn.sinkhorn_points", label, f32, make, quick, {"eager": 3, "OTT-JAX": 3})

    yield solve("10000x10000, d=64, 10 it", False, n=10000, d=64, epsilon=5.0, iterations=10)
    yield solve("3000x3000, d=64, 10 it", True, n=3000, d=64, epsilon=5.0, iterations=10)
    yield solve("5000x5000, d=2, 10 it", False, n=5000, d=2, epsilon=0.05, iterations=10)
    for tolerance, peer in ((1e-2, "geomloss"), (1e-3, "OTT-JAX")):
        yield Spec("sinkhorn.sinkhorn_points", f"5000x5000, d=2, to an error of {tolerance:g}", f32,
                   partial(_error_case, 5000, tolerance, device), False, {peer: 2})  # fmt: skip
    yield Spec("sinkhorn.sinkhorn_points", "fwd+bwd of cost 2000x2000, d=64, 10 it", f32,
               lambda: _gradient_case(2000, 64, 5.0, device), False, {"eager": 3})  # fmt: skip
    yield Spec("sinkhorn.SamplesLoss", "3000x3000, d=2, blur 0.05", f32,
               lambda: _loss_case(3000, 2, device), False, {"geomloss": 3})  # fmt: skip
    yield Spec("sinkhorn.SamplesLoss", "3000x3000, d=64, blur 0.05", f32,
               lambda: _loss_case(3000, 64, device), False, {"geomloss": 3})  # fmt: skip
