"""Benchmark lines of core low_rank_update, and of the adapters' averages beside it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bench.case import Case, Spec, in_double, step
from solera.weights import average_lora, householder_chain, merge_lora_, rank_one_edit_


def _reflections(x: Tensor, u: Tensor) -> Tensor:
    """One after the other."""
    for column in u.unbind(1):
        unit = column / column.norm()
        x = x - 2 * torch.outer(x @ unit, unit)
    return x


def _compact(x: Tensor, u: Tensor) -> Tensor:
    """The same compact form in torch's products."""
    unit = u / u.norm(dim=0)
    half = 0.5 * torch.eye(u.shape[1], dtype=u.dtype, device=u.device)
    a = torch.linalg.solve_triangular(torch.triu(unit.mT @ unit, 1) + half, unit.mT, upper=True)
    return torch.addmm(x, x @ unit, a, alpha=-1)


def _householder(rows: int, d: int, rank: int, device, backward: bool) -> Case:
    x = torch.randn(rows, d, device=device, requires_grad=backward)
    u = torch.randn(d, rank, device=device, requires_grad=backward)
    g = [torch.randn(rows, d, device=device)] if backward else None

    def build(function, x: Tensor, u: Tensor):
        return step(function, (x, u), None if g is None else [g[0].to(x.dtype)])

    n = rows * d * 4
    return Case(
        ours=build(householder_chain, x, u),
        exact=in_double(lambda x, u: build(_reflections, x, u), (x, u)),
        eager=build(_reflections, x, u),
        compiled=build(torch.compile(_reflections), x, u),
        peers={"compact in torch": build(_compact, x, u)},
        bytes=(5 if backward else 2) * n,
        written=(2 if backward else 1) * n,
        flops=(3 if backward else 1) * 4 * rows * d * rank,
    )


def _merge(layers: int, size: int, rank: int, dtype, device) -> Case:
    """In place; the scale's sign changes each time, so that the weights stay what they were."""
    weights = [torch.randn(size, size, device=device).to(dtype) for _ in range(layers)]
    a = [torch.randn(rank, size, device=device) for _ in range(layers)]
    b = [torch.randn(size, rank, device=device) for _ in range(layers)]

    def timed(merge):
        """There and back in turn; the first call, there, is what is checked."""
        mine = [w.clone() for w in weights]
        sign = [1.0]

        def run() -> list[Tensor]:
            merge(mine, sign[0] * 1e-3)
            sign[0] = -sign[0]
            return mine[:1]

        return run

    def eager(mine: list[Tensor], scale: float) -> None:
        for w, x, y in zip(mine, a, b):
            w.add_(y @ x, alpha=scale)

    def addmm(mine: list[Tensor], scale: float) -> None:
        for w, x, y in zip(mine, a, b):
            w.addmm_(y.to(w.dtype), x.to(w.dtype), alpha=scale)

    n = layers * size * size * weights[0].element_size()
    return Case(
        ours=timed(lambda mine, scale: merge_lora_(mine, a, b, scale)),
        exact=lambda: [weights[0].double() + 1e-3 * b[0].double() @ a[0].double()],
        eager=timed(eager),
        peers={"addmm_": timed(addmm)},
        bytes=2 * n,
        written=n,
        flops=2 * layers * size * size * rank,
        tolerance=1e-2 if dtype == torch.bfloat16 else 1e-5,
    )


def _edit(size: int, device) -> Case:
    w = torch.randn(size, size, device=device)
    k, v = torch.randn(size, device=device), torch.randn(size, device=device)

    def ours() -> list[Tensor]:
        return [rank_one_edit_(w, k, v)]

    def eager() -> list[Tensor]:
        return [w.add_(torch.outer(v - w @ k, k / (k @ k)))]

    def addr() -> list[Tensor]:
        return [w.addr_(v - w @ k, k / (k @ k))]

    start = w.double()
    kd, vd = k.double(), v.double()
    return Case(
        ours=ours,
        exact=lambda: [start + torch.outer(vd - start @ kd, kd / (kd @ kd))],
        eager=eager,
        peers={"addr_": addr},
        bytes=2 * w.numel() * 4,
        written=w.numel() * 4,
        tolerance=1e-6,
    )


def _average(count: int, size: int, rank: int, device) -> Case:
    found = [
        (torch.randn(rank, size, device=device), torch.randn(size, rank, device=device))
        for _ in range(count)
    ]

    def exact() -> list[Tensor]:
        return [sum(b.double() @ a.double() for a, b in found) / count]

    def ours() -> list[Tensor]:
        a, b = average_lora(found)
        return [b @ a]

    def eager() -> list[Tensor]:
        u, s, vh = torch.linalg.svd(sum(b @ a for a, b in found) / count, full_matrices=False)
        k = count * rank
        return [(u[:, :k] * s[:k]) @ vh[:k]]

    def randomised() -> list[Tensor]:
        u, s, v = torch.svd_lowrank(sum(b @ a for a, b in found) / count, count * rank)
        return [(u * s) @ v.mT]

    return Case(
        ours=ours, exact=exact, eager=eager, peers={"svd_lowrank": randomised}, tolerance=1e-4
    )


def specs(device) -> Iterator[Spec]:
    f32, bf16 = torch.float32, torch.bfloat16
    chain, merge = "weights.householder_chain", "weights.merge_lora_"
    goal = {"eager": 3, "compact in torch": 1.0}
    yield Spec(
        chain,
        "fwd 4096x1024, 8",
        f32,
        lambda: _householder(4096, 1024, 8, device, False),
        True,
        goal,
    )
    yield Spec(
        chain,
        "fwd+bwd 4096x1024, 8",
        f32,
        lambda: _householder(4096, 1024, 8, device, True),
        False,
        goal,
    )
    label = "8 x 2048x2048, 16"
    yield Spec(merge, label, f32, lambda: _merge(8, 2048, 16, f32, device), True, {"eager": 1.5})
    yield Spec(
        merge,
        label,
        bf16,
        lambda: _merge(8, 2048, 16, bf16, device),
        False,
        {"eager": 2},
        "float32 factors",
    )
    yield Spec("weights.rank_one_edit_", "4096x4096", f32, lambda: _edit(4096, device), False)
    notes = "the eager form's full SVD takes minutes at 8192, so a small layer"
    yield Spec(
        "weights.average_lora", "4 x (1024x1024, 16)", f32, lambda: _average(4, 1024, 16, device), False,
        {"eager": 10}, notes,
    )  # fmt: skip
