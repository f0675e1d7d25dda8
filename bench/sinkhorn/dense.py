"""Benchmark lines of core dense (and of plan, through the gradient of the transport cost)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bench.case import Case, Spec, in_double, step
from solera.sinkhorn import sinkhorn


def _loop(epsilon: float, iterations: int) -> Callable:
    """What a user writes today: uniform marginals, two logsumexps an iteration."""

    def solve(cost: Tensor) -> tuple[Tensor, Tensor]:
        n, m = cost.shape[-2:]
        f, g = cost.new_zeros(cost.shape[:-1]), cost.new_zeros((*cost.shape[:-2], m))
        scaled = cost / epsilon
        la, lb = -torch.log(cost.new_tensor(n)), -torch.log(cost.new_tensor(m))
        for _ in range(iterations):
            f = -torch.logsumexp((g + lb).unsqueeze(-2) - scaled, -1)
            g = -torch.logsumexp((f + la).unsqueeze(-1) - scaled, -2)
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


def _ours(epsilon: float, iterations: int, kind: str) -> Callable:
    def solve(cost: Tensor):
        r = sinkhorn(cost, epsilon=epsilon, max_iterations=iterations)
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


def _case(shape, dtype, device, epsilon, iterations, kind="potentials", slow=True) -> Case:
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

    eager = finish(_loop(epsilon, iterations))
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
    ours = _ours(epsilon, iterations, kind)
    return Case(
        ours=steps(ours)(cost),
        # The gradient of <P, C> is implicit, the tape's is the loop's: the exact one is ours in float64.
        exact=in_double(steps(ours if kind == "transport" else eager), [cost]),
        eager=steps(eager)(cost),
        compiled=None if backward else steps(_compiled_loop(epsilon, iterations))(cost),
        peers=peers,
        bytes=cost.numel() * cost.element_size() * (2 if backward else 1),
        tolerance=2e-4 if kind == "transport" else None,
        saved_bytes=saved,
        floor_note=f"bytes of C once; the loop reads it {iterations} times from the caches",
    )


def specs(device: str) -> Iterator[Spec]:
    f32, f64 = torch.float32, torch.float64

    def line(label, dtype=f32, quick=False, targets=None, notes="", **case):
        make = lambda: _case(dtype=dtype, device=device, **case)
        return Spec("sinkhorn.sinkhorn", label, dtype, make, quick, targets or {}, notes)

    big = {"shape": (1024, 1024), "epsilon": 0.05, "iterations": 100}
    yield line("1024x1024, 100 it", quick=True, targets={"compile": 3, "POT": 5}, **big)
    yield line("256x64x64, 50 it", quick=True, targets={"eager": 6}, shape=(256, 64, 64),
               epsilon=0.05, iterations=50)  # fmt: skip
    yield line("fwd+bwd of cost 1024x1024, 100 it", kind="value", **big)
    yield line("fwd+bwd of <P,C> 1024x1024, 100 it", kind="transport", **big,
               notes="one Cholesky of 1024 in float64 instead of a tape of 200 matrices")  # fmt: skip
    yield line("1024x1024, 100 it, eps 0.001", slow=False, **{**big, "epsilon": 0.001})
    yield line("1024x1024, 100 it", dtype=f64, slow=False, **big)
    yield line("1000x37, 100 it", quick=True, shape=(1000, 37), epsilon=0.05, iterations=100)
    yield line("4x5, 20 it", shape=(4, 5), epsilon=0.05, iterations=20)
