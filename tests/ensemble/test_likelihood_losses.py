"""Losses over likelihoods, past predictions and score matrices, against the papers' formulas in float64."""

import math

import function_checks
import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, randn

from solera.ensemble import (
    boost_margin_loss,
    cca_loss,
    l2_momentum_step_,
    pass_at_n_loss,
    self_distillation_loss,
)

F64 = torch.float64
pytestmark = pytest.mark.no_interpreter  # compositions; the cores are tested interpreted elsewhere


def test_progressive_self_knowledge_distillation():
    x, past = randn(5, 7, dtype=F64, grad=True), randn(5, 7, dtype=F64)
    y = torch.tensor([0, 3, 6, 6, -100], device=DEVICE)
    alpha = 0.8 * 3 / 10
    loss = self_distillation_loss(x, y, past, alpha=alpha)
    soft = (1 - alpha) * F.one_hot(y.clamp(min=0), 7) + alpha * past.softmax(1)
    each = -(soft * x.log_softmax(1)).sum(1)[:4]
    torch.testing.assert_close(loss, each.mean())
    (d,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(d, torch.autograd.grad(each.mean(), x)[0])
    rows = self_distillation_loss(x, y, past.log_softmax(1), alpha=alpha, reduction="none")
    torch.testing.assert_close(rows[:4], each)
    assert rows[4] == 0
    function_checks.differentiates(
        lambda x: self_distillation_loss(x, y, past, alpha=0.3, reduction="sum"), (x,)
    )
    function_checks.compiles(
        lambda x: self_distillation_loss(x, y[:4], past.float()[:4], alpha=0.3)[None],
        lambda n: (randn(4, 7, grad=True),),
    )


def test_pass_at_n_limits_confidence():
    p = torch.tensor([1e-3, 0.05, 0.4, 0.9, 0.999], dtype=F64, device=DEVICE)
    x = p.log().requires_grad_()
    for n in (1, 2, 16):
        loss = pass_at_n_loss(x, n)
        torch.testing.assert_close(loss, -(1 - (1 - p) ** n).log())
        (d,) = torch.autograd.grad(loss.sum(), x)
        torch.testing.assert_close(d, -n * (1 - p) ** (n - 1) * p / (1 - (1 - p) ** n))
    function_checks.differentiates(lambda x: pass_at_n_loss(x, 8), (x,))
    # Sequence probabilities far below the smallest float, and exactly one.
    far = torch.tensor([-300.0, -20.0, 0.0], device=DEVICE, requires_grad=True)
    loss = pass_at_n_loss(far, 8)
    want = torch.tensor([300.0 - math.log(8), 20.0 - math.log(8), 0.0])
    torch.testing.assert_close(loss.detach().cpu(), want)
    (d,) = torch.autograd.grad(loss.sum(), far)
    torch.testing.assert_close(d.cpu(), torch.tensor([-1.0, -1.0, 0.0]))
    with pytest.raises(ValueError, match="n: expected a positive int"):
        pass_at_n_loss(far, 0)


def test_condition_contrastive_alignment():
    a, b, c, d = (randn(6, dtype=F64, scale=20.0, grad=True) for _ in range(4))
    found = cca_loss(a, b, c, d, beta=0.1, weight=0.7)
    want = -torch.sigmoid(0.1 * (a - b)).log() - 0.7 * torch.sigmoid(-0.1 * (c - d)).log()
    torch.testing.assert_close(found, want)
    function_checks.differentiates(lambda *t: cca_loss(*t, beta=0.1), (a, b, c, d))
    with pytest.raises(ValueError, match="negative_log_prob: expected shape"):
        cca_loss(a, b, c[:2], d)


def test_deep_boosting_learning():
    s, anchor = randn(4, 4, dtype=F64, grad=True), randn(4, 4, dtype=F64)
    found = boost_margin_loss(s, anchor, relative=0.3, positive=0.2, negative=0.1)
    want = 0.0
    for x, a in ((s, anchor), (s.t(), anchor.t())):
        for i in range(4):
            others = [j for j in range(4) if j != i]
            want += max(F.relu(0.3 + (a[i, i] - a[i, j]) - (x[i, i] - x[i, j])) for j in others) / 4
            want += max(F.relu(0.1 + x[i, j] - a[i, j]) for j in others) / 4
    want += sum(F.relu(0.2 + anchor[i, i] - s[i, i]) for i in range(4)) / 4
    torch.testing.assert_close(found, want)
    torch.testing.assert_close(torch.autograd.grad(found, s), torch.autograd.grad(want, s))
    assert boost_margin_loss(s, anchor) < found
    for bad in (torch.ones(2, 3), torch.ones(1, 1)):
        with pytest.raises(ValueError, match="scores: expected"):
            boost_margin_loss(bad, bad)


def test_common_weakness_attack_step():
    origin = torch.rand(3, 2, 4, dtype=F64).to(DEVICE)
    x, grad, m = origin.clone(), randn(3, 2, 4, dtype=F64), randn(3, 2, 4, dtype=F64)
    grad[1] = 0
    norm = grad.flatten(1).norm(dim=1)[:, None, None]
    momentum = 0.9 * m + torch.where(norm > 0, grad / norm, 0.0)
    want = (origin + 0.5 * momentum).clamp(origin - 0.1, origin + 0.1).clamp(0, 1)
    out = l2_momentum_step_(x, grad, m, origin, decay=0.9, step_size=0.5, radius=0.1)
    assert out is x
    torch.testing.assert_close(x, want)
    torch.testing.assert_close(m, momentum)
    with pytest.raises(ValueError, match="momentum: expected shape"):
        l2_momentum_step_(x, grad, m[:1], origin, step_size=0.5, radius=0.1)


def test_self_distillation_bad_input():
    x, y = torch.ones(2, 3), torch.zeros(2, dtype=torch.int64)
    for call, error, message in (
        (
            lambda: self_distillation_loss(x, y, x[:1], alpha=0.1),
            ValueError,
            "past_logits: expected",
        ),
        (lambda: self_distillation_loss(x, y, x, alpha=2.0), ValueError, "alpha: expected"),
        (
            lambda: self_distillation_loss(x, y + 3, x, alpha=0.1),
            IndexError,
            "target: expected labels",
        ),
    ):
        with pytest.raises(error, match=message):
            call()
