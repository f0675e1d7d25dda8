"""Benchmark lines of core perturb."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from bench.case import Case, Spec, Step
from solera.weights import perturb_weights_, sam_perturb_, sam_restore_

RHO = 0.05


def _loop(ws: Sequence[Tensor], gs: Sequence[Tensor], moved: Callable[[], object]) -> None:
    """SAM as its repositories write it: a loop over the parameters, the step kept to be taken off."""
    norm = torch.stack([g.norm(2) for g in gs]).norm(2)
    scale = RHO / (norm + 1e-12)
    steps = []
    for w, g in zip(ws, gs):
        e = g * scale
        w.add_(e)
        steps.append(e)
    moved()
    for w, e in zip(ws, steps):
        w.sub_(e)


def _loop_of_copies(
    ws: Sequence[Tensor], gs: Sequence[Tensor], moved: Callable[[], object]
) -> None:
    """The same with the old values kept: what half precision needs."""
    norm = torch.stack([g.norm(2) for g in gs]).norm(2)
    scale = RHO / (norm + 1e-12)
    old = []
    for w, g in zip(ws, gs):
        old.append(w.clone())
        w.add_(g * scale)
    moved()
    for w, o in zip(ws, old):
        w.copy_(o)


def _loop_of_swaps(ws: Sequence[Tensor], gs: Sequence[Tensor], moved: Callable[[], object]) -> None:
    """A widespread form: the copy becomes the parameter's memory again."""
    norm = torch.stack([g.norm(2) for g in gs]).norm(2)
    scale = RHO / (norm + 1e-12)
    old = []
    for w, g in zip(ws, gs):
        old.append(w.clone())
        w.add_(g * scale)
    moved()
    for w, o in zip(ws, old):
        w.data = o


def _foreach(ws: Sequence[Tensor], gs: Sequence[Tensor], moved: Callable[[], object]) -> None:
    scale = RHO / (torch.stack(torch._foreach_norm(gs)).norm(2) + 1e-12)
    steps = torch._foreach_mul(gs, scale)
    torch._foreach_add_(ws, steps)
    moved()
    torch._foreach_sub_(ws, steps)


def _foreach_of_copies(
    ws: Sequence[Tensor], gs: Sequence[Tensor], moved: Callable[[], object]
) -> None:
    scale = RHO / (torch.stack(torch._foreach_norm(gs)).norm(2) + 1e-12)
    old = [torch.empty_like(w) for w in ws]
    torch._foreach_copy_(old, ws)
    torch._foreach_add_(ws, torch._foreach_mul(gs, scale))
    moved()
    torch._foreach_copy_(ws, old)


def _foreach_with_host_number(
    ws: Sequence[Tensor], gs: Sequence[Tensor], moved: Callable[[], object]
) -> None:
    """No temporaries, but the host waits for the norm: free on a CPU."""
    scale = float(RHO / (torch.stack(torch._foreach_norm(gs)).norm(2) + 1e-12))
    torch._foreach_add_(ws, gs, alpha=scale)
    moved()
    torch._foreach_add_(ws, gs, alpha=-scale)


def _case(
    count: int, n: int, dtype: torch.dtype, kept: bool, device: str, swap: bool = False
) -> Case:
    start = [torch.randn(n, device=device).to(dtype) for _ in range(count)]
    grads = [torch.randn(n, device=device).to(dtype) for _ in range(count)]

    def running(function: Callable) -> Step:
        """What a step gives, up and down, at its first call; later ones are only timed."""
        ws, checked = [w.clone() for w in start], False

        def run() -> Sequence[Tensor]:
            nonlocal checked
            if checked:
                function(ws, grads, lambda: None)
                return ws
            checked, peak = True, []
            function(ws, grads, lambda: peak.extend(w.clone() for w in ws))
            return [*peak, *ws]

        return torch.no_grad()(run)

    backup = [torch.empty_like(w) for w in start]

    def ours(ws: Sequence[Tensor], gs: Sequence[Tensor], moved: Callable[[], object]) -> None:
        norm = sam_perturb_(ws, gs, RHO, backup=backup if kept else None, swap=swap)
        moved()
        if kept:
            sam_restore_(ws, backup=backup, swap=swap)
        else:
            sam_restore_(ws, gs, norm, RHO)

    def exact() -> list[Tensor]:
        ws, gs = [w.double() for w in start], [g.double() for g in grads]
        norm = torch.stack([g.norm() for g in gs]).norm()
        return [*(w + RHO * g / norm for w, g in zip(ws, gs)), *ws]

    peers = {"foreach": running(_foreach_of_copies if kept else _foreach)}
    if swap:
        peers["loop, swapping"] = running(_loop_of_swaps)
    if not kept:
        peers["foreach, waiting"] = running(_foreach_with_host_number)
    size = count * n * start[0].element_size()
    return Case(
        ours=running(ours),
        exact=exact,
        eager=running(_loop_of_copies if kept else _loop),
        peers=peers,
        bytes=(4 if swap else 7) * size,
        written=(1 if swap else 3 if kept else 2) * size,
        tolerance=torch.finfo(dtype).eps,
    )


def _noise_case(count: int, n: int, dtype: torch.dtype, device: str) -> Case:
    """Beside torch.randn, whose numbers differ: what is checked is the noise's size over rho |w|, tensor by tensor."""
    start = [torch.randn(n, device=device).to(dtype) for _ in range(count)]
    rho = 1e-3

    def running(function: Callable[[list[Tensor]], object]) -> Step:
        ws, checked = [w.clone() for w in start], False

        def run() -> Sequence[Tensor]:
            nonlocal checked
            function(ws)
            if checked:
                return ws
            checked = True
            moved = [
                (w.double() - s.double()).norm() / s.double().norm() for w, s in zip(ws, start)
            ]
            return [torch.stack(moved) / rho]

        return torch.no_grad()(run)

    def eager(ws: list[Tensor]) -> None:
        for w in ws:
            w.add_(torch.randn_like(w), alpha=float(rho * w.norm()) / n**0.5)

    size = count * n * start[0].element_size()
    return Case(
        ours=running(lambda ws: perturb_weights_(ws, rho, 1)),
        exact=lambda: [torch.ones(count, dtype=torch.float64, device=device)],
        eager=running(eager),
        bytes=3 * size,
        written=size,
        tolerance=0.01,  # the norm of n normal numbers varies by 1 / sqrt(2 n), 0.22%
    )


def specs(device: str) -> Iterator[Spec]:
    f32, bf16 = torch.float32, torch.bfloat16
    wanted = {"eager": 2, "foreach": 1.2}
    lines = (
        ("200 x 100k", f32, False, False, wanted, True),
        ("200 x 100k, swap", f32, True, True, wanted, False),
        ("200 x 100k, backup", f32, True, False, {}, False),
        ("200 x 100k, backup", bf16, True, False, {"foreach": 1.2}, False),
        ("200 x 100k, swap", bf16, True, True, wanted, False),
    )
    for label, dtype, kept, swap, targets, quick in lines:
        yield Spec(
            "weights.sam_perturb_ + restore", label, dtype,
            lambda dtype=dtype, kept=kept, swap=swap: _case(
                200, 100_000, dtype, kept, device, swap
            ), quick, targets,
            "eager: a loop over the parameters; 'foreach, waiting' brings the norm to the host",
        )  # fmt: skip
    yield Spec(
        "weights.perturb_weights_", "200 x 100k", f32,
        lambda: _noise_case(200, 100_000, f32, device), False, {}, "eager: torch.randn_like, a loop",
    )  # fmt: skip
