"""Data and model selection by transport, against the formulas in float64 with the plan held."""

import itertools

import pytest
import torch
from helpers import DEVICE, randn

from solera.sinkhorn import (
    conditional_entropy,
    select_sources,
    sinkhorn,
    transfer_cost,
    transport_gradient,
)

pytestmark = pytest.mark.no_interpreter  # compositions


def test_transport_gradient():
    """f_i - mean of the others, and the value's slope when mass moves to one candidate from all others."""
    x, y = (randn(k, 3, dtype=torch.float64) for k in (12, 9))
    cost = torch.cdist(x, y).square()
    f = sinkhorn(cost, epsilon=0.5, max_iterations=400).f
    want = torch.stack([f[i] - (f.sum() - f[i]) / 11 for i in range(12)])
    got = transport_gradient(x, y, epsilon=0.5, max_iterations=400)
    torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-9)
    step = torch.full((12,), -1e-5 / 11, dtype=torch.float64, device=DEVICE)
    step[4] = 1e-5
    even = torch.full_like(step, 1 / 12)
    value = lambda a: sinkhorn(cost, a, epsilon=0.5, max_iterations=400).cost
    slope = (value(even + step) - value(even - step)) / 2e-5
    torch.testing.assert_close(got[4], slope, rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match="x: expected at least two candidates"):
        transport_gradient(x[:1], y, epsilon=0.5)


def test_transfer_cost():
    x, y = (randn(k, 4, dtype=torch.float64, grad=True) for k in (30, 25))
    ys, yt = torch.randint(3, (30,), device=DEVICE), torch.randint(4, (25,), device=DEVICE)
    plan = sinkhorn(torch.cdist(x, y).square(), epsilon=1.0, max_iterations=100)
    p = plan.plan()
    joint = torch.zeros(3, 5, dtype=torch.float64, device=DEVICE)
    for s, t in itertools.product(range(3), range(4)):
        joint[s, t] = p[ys == s][:, yt == t].sum()
    task = -sum(
        joint[s, t] * (joint[s, t] / joint[s].sum()).log() for s in range(3) for t in range(4)
    )
    got = transfer_cost(x, y, ys, yt, epsilon=1.0, max_iterations=100, target_classes=5)
    torch.testing.assert_close(got.joint, joint)
    torch.testing.assert_close(got.task, task)
    torch.testing.assert_close(got.domain, plan.transport_cost())
    want = torch.autograd.grad(task + plan.transport_cost(), (x, y))
    for u, v in zip(torch.autograd.grad(got.task + got.domain, (x, y)), want):
        torch.testing.assert_close(u, v, rtol=1e-5, atol=1e-8)
    with pytest.raises(ValueError, match="source_labels: expected int64 labels"):
        transfer_cost(x, y, ys[:3], yt, epsilon=1.0)
    with pytest.raises(ValueError, match=r"target_labels: expected labels in \[0, 2\)"):
        transfer_cost(x, y, ys, yt, epsilon=1.0, target_classes=2)


def test_conditional_entropy():
    joint = torch.tensor([[0.5, 0.0], [0.25, 0.25]], dtype=torch.float64, device=DEVICE)
    torch.testing.assert_close(
        conditional_entropy(joint),
        0.5 * torch.tensor(2.0, dtype=torch.float64, device=DEVICE).log(),
    )


def test_select_sources_is_the_greedy_choice():
    models, samples = 6, 40
    domain, task = (torch.rand(models, dtype=torch.float64, device=DEVICE) for _ in range(2))
    predictions = torch.randint(3, (models, samples), device=DEVICE)

    def entropy(i, j):
        joint = torch.zeros(3, 3, dtype=torch.float64)
        for u, v in zip(predictions[j].tolist(), predictions[i].tolist()):
            joint[u, v] += 1 / samples
        return float(conditional_entropy(joint))

    def score(chosen):
        own = -sum(float(domain[i] + 0.5 * task[i]) for i in chosen)
        return own - 0.3 * sum(entropy(i, j) for i, j in itertools.permutations(chosen, 2))

    chosen: list = []
    for _ in range(4):
        rest = [i for i in range(models) if i not in chosen]
        chosen.append(max(rest, key=lambda i: score([*chosen, i])))
    got = select_sources(domain, task, predictions, 4, weights=(1.0, 0.5, 0.3))
    assert got.tolist() == chosen
    with pytest.raises(ValueError, match="count: expected 1 to 6"):
        select_sources(domain, task, predictions, 7)
    with pytest.raises(ValueError, match="predictions: expected"):
        select_sources(domain, task, predictions[:2], 1)


def test_conditional_entropy_where_a_ratio_underflows():
    joint = torch.tensor([[1e-30, 1e20], [0.0, 2.0]], device=DEVICE, requires_grad=True)
    value = conditional_entropy(joint)
    assert torch.isfinite(value) and abs(float(value)) < 1e-25
    assert torch.isfinite(torch.autograd.grad(value, joint)[0]).all()
