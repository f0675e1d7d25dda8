"""Benchmark lines of core grad_step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from bench.case import Case, Spec
from bench.norm.grad_norm import resnet50_shapes
from solera.norm import StableSpamState, fira_residual_, stable_spam_step_

LR, B1, B2, EPS, G1, G2, THETA = 1e-3, 0.9, 0.999, 1e-8, 0.7, 0.9, 0.999


class _Loop:
    """Stable-SPAM as its repository writes it: tensor by tensor, in plain torch."""

    def __init__(self, parameters: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
        self.parameters, self.grads, self.t = [p.clone() for p in parameters], grads, 0
        self.moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in parameters]
        self.running = [[p.new_zeros(()) for _ in range(3)] for p in parameters]

    def __call__(self) -> Sequence[Tensor]:
        self.t += 1
        t = self.t
        for p, given, (m, v), kept in zip(self.parameters, self.grads, self.moments, self.running):
            g = given.clone()
            largest = g.abs().max()
            kept[0] = THETA * kept[0] + (1 - THETA) * largest
            limit = kept[0] / (1 - THETA**t)
            mask = g.abs() > limit
            g[mask] = g[mask] / largest * limit
            n = g.norm()
            kept[1] = G1 * kept[1] + (1 - G1) * n
            kept[2] = G2 * kept[2] + (1 - G2) * n * n
            wanted = kept[1] / (1 - G1**t) / ((kept[2] / (1 - G2**t)).sqrt() + EPS)
            g = g / n * wanted
            m.mul_(B1).add_(g, alpha=1 - B1)
            v.mul_(B2).addcmul_(g, g, value=1 - B2)
            denominator = (v / (1 - B2**t)).sqrt().add_(EPS)
            p.addcdiv_(m, denominator, value=-LR / (1 - B1**t))
        return self.parameters


def _spam(dtype: torch.dtype, device: str) -> Case:
    weights = [torch.randn(s, device=device).mul_(0.05).to(dtype) for s in resnet50_shapes()]
    grads = [torch.randn_like(w) for w in weights]
    mine = [w.clone() for w in weights]
    state = StableSpamState.start(mine)

    def ours() -> Sequence[Tensor]:
        stable_spam_step_(mine, grads, state, lr=LR)
        return mine

    n = sum(w.numel() for w in weights) * weights[0].element_size()
    # Two passes over the gradient for its largest entry and its norm, then one over everything.
    return Case(
        ours=ours,
        exact=_Loop([w.double() for w in weights], [g.double() for g in grads]),
        eager=_Loop(weights, grads),
        bytes=9 * n,
        written=3 * n,
    )


def _fira(device: str) -> Case:
    m, n, r, count = 1024, 4096, 128, 8
    grads = [torch.randn(m, n, device=device) for _ in range(count)]
    q = [torch.linalg.qr(torch.randn(m, r, device=device))[0].contiguous() for _ in range(count)]
    reduced = [a.mT @ g for a, g in zip(q, grads)]
    updates = [torch.randn_like(t) for t in reduced]

    def exact() -> Sequence[Tensor]:
        return eager(*([t.double() for t in group] for group in (grads, q, reduced, updates)))

    def eager(grads, q, reduced, updates) -> Sequence[Tensor]:
        out = []
        for g, a, low, update in zip(grads, q, reduced, updates):
            phi = update.norm(dim=0) / (low.norm(dim=0) + 1e-8)
            out.append((g - a @ low) * phi)
            limit = (out[-1].norm() / 1e9).clamp_min(1.01) / 1.01
            out[-1] = out[-1] / limit
        return out

    def ours() -> Sequence[Tensor]:
        work = [g.clone() for g in grads]
        fira_residual_(work, reduced, q, updates, torch.zeros(count, device=device))
        return work

    return Case(
        ours=ours,
        exact=exact,
        eager=lambda: eager(grads, q, reduced, updates),
        bytes=count * m * n * 4 * 4,
        written=count * m * n * 4 * 2,
        flops=2 * count * m * n * r,
        floor_note="the product, and the residual read and written; ours also copies the gradient",
    )


def specs(device: str) -> Iterator[Spec]:
    f32 = torch.float32

    yield Spec(
        "norm.stable_spam_step_", "ResNet-50", f32, lambda: _spam(f32, device),
        quick=False, notes="eager: a loop over the parameters",
    )  # fmt: skip
    yield Spec(
        "norm.fira_residual_", "8 x 1024x4096, rank 128", f32, lambda: _fira(device), quick=False,
        notes="eager: a loop in plain torch",
    )  # fmt: skip
