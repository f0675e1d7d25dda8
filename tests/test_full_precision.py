"""Compositions that promise their inputs' precision keep it under autocast, which rounds torch's own products."""

import pytest
import torch
from helpers import DEVICE, randn

from solera import sinkhorn, weights

PAIR = lambda: (randn(3, 6), randn(8, 3))


def _isogclr(x):
    s, u, tau = torch.zeros(4), torch.zeros(4), torch.full((4,), 0.5)
    s, u, tau = (t.to(x.device) for t in (s, u, tau))
    index = torch.arange(4, device=x.device)
    return weights.isogclr_loss(x, index, s, u, tau), s, tau


def _implicit(cost):
    cost = cost + 0.1 * torch.rand_like(cost)
    cost = cost.requires_grad_()
    return torch.autograd.grad(sinkhorn.sinkhorn(cost, epsilon=0.5).transport_cost(), cost)[0]


def _written(call, x):
    x = x.clone()
    call(x)
    return x


CASES = {
    "householder_chain": lambda x: weights.householder_chain(x, randn(6, 3)),
    "householder_penalty": weights.householder_penalty,
    "project_out": lambda x: weights.project_out(x, randn(6, 2)),
    "conv_lora_weight": lambda x: weights.conv_lora_weight(x, *PAIR(), scale=0.5),
    "decomposed_fusion": lambda x: weights.decomposed_fusion(x, randn(8, 6), 0.2),
    "isogclr_loss": _isogclr,
    "task_arithmetic": lambda x: weights.task_arithmetic(x, [], [1.0], adapters=[PAIR()]),
    "merge_hydra_": lambda x: _written(
        lambda w: weights.merge_hydra_(w, *PAIR(), randn(3, 8), randn(8, 3)), x
    ),
    "low_rank_delta": lambda x: weights.low_rank_delta(x, randn(8, 6), rank=2, iterations=2),
    "average_lora": lambda x: weights.average_lora([PAIR(), PAIR()]),
    "ldu_init": lambda x: weights.ldu_init(x, 3)[0],
    "apply": lambda x: sinkhorn.sinkhorn(x.abs(), epsilon=0.3).apply(randn(6, 2)),
    "barycentric_projection": lambda x: sinkhorn.sinkhorn(
        x.abs(), epsilon=0.3
    ).barycentric_projection(randn(6, 2)),
    "points_plan": lambda x: sinkhorn.sinkhorn_points(
        torch.cat([x, x], 1), torch.cat([x, -x], 1), epsilon=9.0
    ).plan(),
    "slot_accumulate": lambda x: tuple(sinkhorn.slot_accumulate(x[:3], x, x)),
    "implicit_gradient": lambda x: _implicit(x.abs().repeat(20, 30)),
    "gromov_wasserstein": lambda x: (
        sinkhorn.gromov_wasserstein(
            torch.cdist(x, x), torch.cdist(x.mT, x.mT), epsilon=1.0, max_iterations=5, tolerance=0
        ).plan
    ),
    "low_rank_sinkhorn": lambda x: sinkhorn.low_rank_sinkhorn(
        x.abs(), rank=2, max_iterations=5, tolerance=0
    ).plan(),
    "laplacian_assign": lambda x: sinkhorn.laplacian_assign(
        x, randn(2, 6), torch.zeros(8, 1, dtype=torch.int64, device=x.device)
    ),
    "free_support_barycenter": lambda x: sinkhorn.free_support_barycenter(
        x[None], randn(5, 6), epsilon=1.0, max_iterations=2
    ),
    "sliced_wasserstein": lambda x: sinkhorn.sliced_wasserstein(
        x, randn(5, 6), randn(4, 6), x_weights=torch.ones(8, device=x.device)
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_autocast_does_not_round(name):
    x = randn(8, 6)
    results = []
    for enabled in (False, True):
        torch.manual_seed(1)
        with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=enabled):
            results.append(CASES[name](x))
    torch.testing.assert_close(*results, rtol=0, atol=0)
