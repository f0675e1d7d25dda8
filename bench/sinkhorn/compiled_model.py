"""The Sinkhorn loss between embedded points inside a compiled model, forward and backward."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..case import Case, Spec, compiled_model_spec, model_case

POINTS, WIDTH, ITERATIONS, EPSILON = 256, 32, 20, 0.1


def model(loss):
    def forward(x: Tensor, weight: Tensor, y: Tensor) -> Tensor:
        z = torch.tanh(x @ weight)
        cost = (z.square().sum(1)[:, None] + y.square().sum(1) - 2 * z @ y.T) / WIDTH
        return loss(cost)

    return forward


def ours(cost: Tensor) -> Tensor:
    from solera.sinkhorn import sinkhorn

    return sinkhorn(cost, epsilon=EPSILON, max_iterations=ITERATIONS).cost


def theirs(cost: Tensor) -> Tensor:
    """The dual value at potentials that are constants: its gradient in the cost is the plan."""
    n, m = cost.shape
    c = cost.detach()
    g = c.new_zeros(m)
    for _ in range(ITERATIONS):
        f = -EPSILON * (torch.logsumexp((g - c) / EPSILON, 1) - math.log(m))
        g = -EPSILON * (torch.logsumexp((f[:, None] - c) / EPSILON, 0) - math.log(n))
    mass = torch.exp((f[:, None] + g - cost) / EPSILON).mean()
    return f.mean() + g.mean() - EPSILON * (mass - 1)


def specs(device: str) -> Iterator[Spec]:
    def make() -> Case:
        x, y = (torch.randn(POINTS, WIDTH, device=device) for _ in range(2))
        weight = (WIDTH**-0.5 * torch.randn(WIDTH, WIDTH, device=device)).requires_grad_()
        return model_case(model, ours, theirs, [x, weight, y])

    label = f"loss on {POINTS}x{POINTS} points, {ITERATIONS} iterations"
    yield compiled_model_spec("sinkhorn.sinkhorn", label, make)
