"""Benchmark lines of core dense (and of plan, through the gradient of the transport cost)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from bench.case import Case, Spec, in_double, step
from solera.sinkhorn import sinkhorn

from . import ott


def _loop(epsilon: float, iterations: int, rho: float | None = None) -> Callable:
    """What a user writes today: uniform marginals, two logsumexps an iteration."""

    def solve(cost: Tensor) -> tuple[Tensor, Tensor]:
        n, m = cost.shape[-2:]
        f, g = cost.new_zeros(cost.shape[:-1]), cost.new_zeros((*cost.shape[:-2], m))
        scaled = cost / epsilon
        la, lb = -torch.log(cost.new_tensor(n)), -torch.log(cost.new_tensor(m))
        damping = 1.0 if rho is None else rho / (rho + epsilon)
        for _ in range(iterations):
            f = -damping * torch.logsumexp((g + lb).unsqueeze(-2) - scaled, -1)
            g = -damping * torch.logsumexp((f + la).unsqueeze(-1) - scaled, -2)
        if rho is not None:
            return epsilon * f, epsilon * g
        shift = (g.mean(-1, keepdim=True) - f.mean(-1, keepdim=True)) / 2
        return epsilon * (f + shift), epsilon * (g - shift)

    return solve


def _compiled_loop(epsilon: float, iterations: int) -> Callable:
    """The same with one iteration compiled (the whole loop unrolled takes minutes to compile)."""

    @torch.compile
    def one(g: Tensor, scaled: Tensor, la: float, lb: float):
        f = -torch.logsumexp((g + lb).unsqueeze(-2) - scaled, -1)
        return f, -torch.logsumexp((f + la).unsqueeze(-1) - scaled, -2)

    def solve(cost: Tensor) -> tuple[Tensor, Tensor]:
        n, m = cost.shape[-2:]
        la, lb = -float(torch.tensor(n).log()), -float(torch.tensor(m).log())
        scaled = cost / epsilon
        f, g = cost.new_zeros(cost.shape[:-1]), cost.new_zeros((*cost.shape[:-2], m))
        for _ in range(iterations):
            f, g = one(g, scaled, la, lb)
        shift = (g.mean(-1, keepdim=True) - f.mean(-1, keepdim=True)) / 2
        return epsilon * (f + shift), epsilon * (g - shift)

    return solve


def _with_cost(solve: Callable, epsilon: float, kind: str) -> Callable:
    """`solve` followed by the dual value or by <P, C>."""

    def value(cost: Tensor) -> Tensor:
        f, g = solve(cost)
        if kind == "value":
            return f.mean(-1) + g.mean(-1)
        plan = torch.exp((f.unsqueeze(-1) + g.unsqueeze(-2) - cost) / epsilon)
        return (plan * cost).mean((-2, -1))

    return value


def _ours(epsilon: float, iterations: int, kind: str, rho: float | None = None) -> Callable:
    def solve(cost: Tensor):
        r = sinkhorn(cost, epsilon=epsilon, max_iterations=iterations, rho=rho)
        if kind == "potentials":
            return r.f, r.g
        return r.cost if kind == "value" else r.transport_cost()

    return solve


def _pot(epsilon: float, iterations: int) -> Callable | None:
    try:
        import ot
    except ImportError:
        return None

    def solve(cost: Tensor) -> tuple[Tensor, Tensor]:
        n, m = cost.shape
        a, b = cost.new_full((n,), 1 / n), cost.new_full((m,), 1 / m)
        _, log = ot.bregman.sinkhorn_log(
            a, b, cost, epsilon, numItermax=iterations, stopThr=0, log=True, warn=False
        )
        f, g = epsilon * (log["log_u"] - a.log()), epsilon * (log["log_v"] - b.log())
        shift = (g.mean() - f.mean()) / 2
        return f + shift, g - shift

    return solve


def _pot_exponential(epsilon: float, iterations: int) -> Callable | None:
    """POT outside the log domain: fast, and NaN or wrong where exp(-C / epsilon) underflows."""
    try:
        import ot
    except ImportError:
        return None

    def solve(cost: Tensor) -> tuple[Tensor, Tensor]:
        n, m = cost.shape
        a, b = cost.new_full((n,), 1 / n), cost.new_full((m,), 1 / m)
        _, log = ot.bregman.sinkhorn_knopp(
            a, b, cost, epsilon, numItermax=iterations, stopThr=0, log=True, warn=False
        )
        f, g = epsilon * (log["u"] / a).log(), epsilon * (log["v"] / b).log()
        shift = (g.mean() - f.mean()) / 2
        return f + shift, g - shift

    return solve


def _pot_batch(epsilon: float, iterations: int) -> Callable | None:
    """POT's batched log-domain solver; it has no lengths, so it solves the padded problems."""
    try:
        from ot.batch import solve_batch
    except ImportError:
        return None

    def solve(cost: Tensor) -> Tensor:
        return solve_batch(cost, epsilon, max_iter=iterations, tol=0, method="log_sinkhorn").value

    return solve


def _ragged_case(batch, n, dtype, device, epsilon, iterations) -> Case:
    """Lengths uniform in [n / 2, n]; what eager and POT do instead is all of the padded batch."""
    cost = torch.rand(batch, n, n, device=device).to(dtype)
    rows, columns = (torch.randint(n // 2, n + 1, (batch,), device=device) for _ in range(2))
    inside = torch.arange(n, device=device)
    valid = (inside < rows[:, None])[:, :, None] & (inside < columns[:, None])[:, None]

    def ours(cost: Tensor) -> tuple[Tensor, Tensor]:
        r = sinkhorn(
            cost,
            epsilon=epsilon,
            max_iterations=iterations,
            lengths=(rows, columns),
            validate=False,
        )
        return r.f, r.g

    def eager(cost: Tensor) -> tuple[Tensor, Tensor]:
        scaled = torch.where(valid, cost, torch.inf) / epsilon
        la, lb = (-torch.log(t.to(cost.dtype))[:, None] for t in (rows, columns))
        in_a, in_b = inside < rows[:, None], inside < columns[:, None]
        f, g = cost.new_zeros(batch, n), cost.new_zeros(batch, n)
        for _ in range(iterations):
            f = -torch.logsumexp((g + lb).unsqueeze(-2) - scaled, -1)
            f = torch.where(in_a, f, 0.0)
            g = -torch.logsumexp((f + la).unsqueeze(-1) - scaled, -2)
            g = torch.where(in_b, g, 0.0)
        shift = (g.sum(-1) / columns - f.sum(-1) / rows).unsqueeze(-1) / 2
        return (
            torch.where(in_a, epsilon * (f + shift), 0.0),
            torch.where(in_b, epsilon * (g - shift), 0.0),
        )

    pot = _pot_batch(epsilon, iterations)
    return Case(
        ours=step(ours, [cost]),
        exact=in_double(lambda t: step(eager, [t]), [cost]),
        eager=step(eager, [cost]),
        peers={} if pot is None else {"POT batch": step(pot, [cost])},
        bytes=cost.numel() * cost.element_size(),
        floor_note="bytes of the padded C once",
    )


def _tolerance(kind: str, rho: float | None, dtype: torch.dtype) -> float | None:
    """None: twice eager's error."""
    if kind == "transport":
        return 2e-4
    if dtype == torch.float64:  # the exact loop is eager's: it has no error to double
        return 1e-14
    # The mean error of a float32 exponential, 1.5e-8 here, moves f against g; with soft marginals nothing takes
    # that out, and iterations add it up to 1 / (1 - (rho / (rho + epsilon))^2), some ten times as much.
    return None if rho is None else 1e-6


def _case(
    shape, dtype, device, epsilon, iterations, kind="potentials", slow=True, rho=None
) -> Case:
    cost = torch.rand(*shape, device=device).to(dtype)
    backward = kind != "potentials"
    cost.requires_grad_(backward)
    grads = [torch.ones(shape[:-2], device=device, dtype=dtype)] if backward else None

    def steps(function: Callable) -> Callable:
        def build(t: Tensor):
            return step(function, [t], None if grads is None else [grads[0].to(t.dtype)])

        return build

    def finish(solve: Callable) -> Callable:
        return _with_cost(solve, epsilon, kind) if backward else solve

    eager = finish(_loop(epsilon, iterations, rho))
    saved = None
    if backward:
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: kept.append(t.numel() * t.element_size()) or t, lambda t: t
        ):
            _ours(epsilon, iterations, kind)(cost)
        saved = sum(kept)
    peers = {}
    pot = _pot(epsilon, iterations) if len(shape) == 2 and not backward and slow else None
    if pot is not None:
        peers["POT"] = steps(pot)(cost)
        peers["POT exp"] = steps(_pot_exponential(epsilon, iterations))(cost)
    if len(shape) == 2 and not backward and slow and dtype == torch.float32 and ott.available():
        peers["OTT-JAX"] = step(ott.dense(epsilon, iterations), [cost])
    ours = _ours(epsilon, iterations, kind, rho)
    return Case(
        ours=steps(ours)(cost),
        # The gradient of <P, C> is implicit, the tape's is the loop's: the exact one is ours in float64.
        exact=in_double(steps(ours if kind == "transport" else eager), [cost]),
        eager=steps(eager)(cost),
        compiled=None if backward or rho else steps(_compiled_loop(epsilon, iterations))(cost),
        peers=peers,
        bytes=cost.numel() * cost.element_size() * (2 if backward else 1),
        tolerance=_tolerance(kind, rho, dtype),
        saved_bytes=saved,
        floor_note=f"bytes of C once; the loop reads it {iterations} times from the caches",
    )


def _sums_case(n: int, dtype, device, epsilon: float) -> Case:
    """Marginals and <P, C> of given potentials, beside the plan written out."""
    cost = torch.rand(n, n, device=device).to(dtype)
    r = sinkhorn(cost, epsilon=epsilon, max_iterations=20)

    def ours(cost: Tensor, f: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        held = replace(r, f=f, g=g, _problem=(cost[None], *(t.to(f) for t in r._problem[1:])))
        return *held.marginals(), held.transport_cost()

    def eager(cost: Tensor, f: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        plan = torch.exp((f[:, None] + g - cost) / epsilon) / n**2
        return plan.sum(-1), plan.sum(-2), (plan * cost).sum()

    inputs = [cost, r.f, r.g]
    return Case(
        ours=step(ours, inputs),
        exact=in_double(lambda *t: step(eager, list(t)), inputs),
        eager=step(eager, inputs),
        compiled=step(torch.compile(eager), inputs),
        bytes=2 * cost.numel() * cost.element_size(),
        floor_note="bytes of C once for the marginals, once for <P, C>",
        written=0,
        # 1 / epsilon is rounded once, and that all exponents of a sum share; eager divides each by epsilon.
        tolerance=5e-7,
    )


def specs(device: str) -> Iterator[Spec]:
    f32, f64 = torch.float32, torch.float64

    def line(label, dtype=f32, quick=False, targets=None, notes="", **case):
        make = lambda: _case(dtype=dtype, device=device, **case)
        return Spec("sinkhorn.sinkhorn", label, dtype, make, quick, targets or {}, notes)

    big = {"shape": (1024, 1024), "epsilon": 0.05, "iterations": 100}
    yield line("1024x1024, 100 it", quick=True, targets={"compile": 4, "POT": 8, "POT exp": 1, "OTT-JAX": 5},
               **big)  # fmt: skip
    yield line("256x64x64, 50 it", quick=True, targets={"eager": 6}, shape=(256, 64, 64),
               epsilon=0.05, iterations=50)  # fmt: skip
    make = lambda: _ragged_case(256, 64, f32, device, 0.05, 50)
    yield Spec("sinkhorn.sinkhorn", "256x64x64 ragged, 50 it", f32, make, False,
               {"POT batch": 4, "eager": 6})  # fmt: skip
    yield line("fwd+bwd of cost 1024x1024, 100 it", kind="value", targets={"eager": 15}, **big)
    yield line("fwd+bwd of <P,C> 1024x1024, 100 it", kind="transport", targets={"eager": 6}, **big,
               notes="conjugate gradients instead of a tape of 200 matrices")  # fmt: skip
    yield line("1024x1024, 100 it, rho 1", slow=False, rho=1.0, **big)
    yield line("1024x1024, 100 it, eps 0.001", slow=False, **{**big, "epsilon": 0.001})
    yield line("1024x1024, 100 it", dtype=f64, slow=False, **big)
    yield line("1000x37, 100 it", quick=True, shape=(1000, 37), epsilon=0.05, iterations=100)
    yield Spec("sinkhorn.SinkhornResult", "marginals and <P,C> 4096x4096", f32,
               lambda: _sums_case(4096, f32, device, 0.05), False)  # fmt: skip
    yield line("4x5, 20 it", shape=(4, 5), epsilon=0.05, iterations=20)
