"""A benchmark line of core pair_losses: the multi-head contrastive loss beside whole matrices of pairs."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.case import Case, Spec, in_double, step
from solera.ensemble import multi_head_contrastive_loss

TAU_MIN, TAU_MAX, BETA, TOP = 0.05, 2.0, 0.01, 100


def _eager(z1: Tensor, z2: Tensor, weight: Tensor) -> Tensor:
    """All pairs of a head at a time; the temperature network is one matrix here."""
    batch, _, d = z1.shape
    z = F.normalize(torch.cat([z1, z2]).transpose(0, 1), dim=-1)
    q = z @ weight.T
    s, r = z @ z.mT, q @ q.mT
    tau = TAU_MIN + (TAU_MAX - TAU_MIN) * torch.sigmoid(-r)
    rows = torch.arange(2 * batch, device=z.device)
    partner = (rows + batch) % (2 * batch)
    barred = torch.zeros(2 * batch, 2 * batch, dtype=torch.bool, device=z.device)
    barred[rows, rows] = barred[rows, partner] = True
    top = s.detach().masked_fill(barred, -torch.inf).topk(TOP, dim=-1).indices
    near, far = tau[:, rows, partner], tau.gather(-1, top)
    loss = -s[:, rows, partner] / near + (s.gather(-1, top) / far).mean(-1)
    loss = loss + BETA * (0.5 * d * near.log() + 1 / near) - BETA * (far.log() + 1 / far).sum(-1)
    return loss.mean(-1).sum()


def _ours(z1: Tensor, z2: Tensor, weight: Tensor) -> Tensor:
    phi = lambda z: z @ weight.T
    return multi_head_contrastive_loss(
        z1, z2, phi, tau_min=TAU_MIN, tau_max=TAU_MAX, beta=BETA, top_k=TOP
    )


def _case(device: str, batch: int, heads: int, d: int) -> Case:
    z1, z2 = (torch.randn(batch, heads, d, device=device).requires_grad_() for _ in range(2))
    weight = (0.3 * torch.randn(d, d, device=device)).requires_grad_()
    grads = [torch.ones((), device=device)]

    def exact(*tensors: Tensor):
        return step(_eager, tensors, [g.double() for g in grads])

    return Case(
        ours=step(_ours, (z1, z2, weight), grads),
        exact=in_double(exact, (z1, z2, weight)),
        eager=step(_eager, (z1, z2, weight), grads),
        compiled=step(torch.compile(_eager), (z1, z2, weight), grads),
        bytes=2 * 3 * (z1.nbytes + z2.nbytes),
        flops=6 * heads * (2 * batch) ** 2 * d * 2,
        # A pair that changes places with its neighbour in the top 100 changes the loss by rounding.
        tolerance=1e-4,
    )


def specs(device: str) -> Iterator[Spec]:
    yield Spec(
        op="ensemble.multi_head_contrastive_loss",
        label="fwd+bwd B=512 H=3 d=128 top 100",
        dtype=torch.float32,
        make=lambda: _case(device, 512, 3, 128),
    )
