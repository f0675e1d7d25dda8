"""Losses on banks of moving averages, beside the papers' formulas in float64."""

import pytest
import torch
import torch.nn.functional as F
from function_checks import agrees_with_formula, differentiates
from helpers import DEVICE, DTYPES, randn

from solera.weights import (
    cfg_kd_loss,
    class_ema_,
    elr_loss,
    ema_,
    indexed_ema_,
    isogclr_loss,
    kl_to_bank,
    mix_pairs,
    rationale_loss,
)

F64 = torch.float64


def places(count, rows, distinct=True):
    return (torch.randperm(rows)[:count] if distinct else torch.randint(0, rows, (count,))).to(
        DEVICE
    )


def test_elr_is_the_papers_loss():
    for distinct in (True, False):
        z, bank = randn(6, 5, dtype=F64, grad=True), torch.rand(9, 5, dtype=F64, device=DEVICE)
        y, index = torch.randint(0, 5, (6,), device=DEVICE), places(6, 9, distinct)
        p = z.softmax(1).clamp(1e-4, 1 - 1e-4)
        target = bank.clone()
        for b, i in enumerate(index.tolist()):
            q = p[b].detach()
            target[i] = 0.7 * target[i] + 0.3 * q / q.sum()
        truth = F.cross_entropy(z, y) + 3 * torch.log(1 - (target[index] * p).sum(1)).mean()
        loss = elr_loss(z, y, bank, index, beta=0.7, lam=3)
        torch.testing.assert_close(bank, target)
        torch.testing.assert_close(loss, truth)
        (ours,), (theirs,) = torch.autograd.grad(loss, z), torch.autograd.grad(truth, z)
        torch.testing.assert_close(ours, theirs)
        still = lambda z: elr_loss(z, y, bank, index, 0.7, 3, update=False)
        assert torch.autograd.gradcheck(still, z)
    # ELR+: the bank's rows mixed as the inputs were.
    order, share = torch.randperm(6), 0.3
    mixed = mix_pairs(bank[index], order, share)
    torch.testing.assert_close(mixed, share * bank[index] + (1 - share) * bank[index][order])
    own = elr_loss(z, y, mixed, torch.arange(6, device=DEVICE), update=False)
    assert own.isfinite()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_elr_on_working_dtypes(dtype):
    bank, index = torch.rand(9, 5, device=DEVICE), places(6, 9)
    y = torch.randint(0, 5, (6,), device=DEVICE)

    def formula(z):
        acc = z.double() if z.dtype == F64 else z.float()
        p = acc.softmax(1).clamp(1e-4, 1 - 1e-4)
        agreement = (bank[index].to(p.dtype) * p).sum(1)
        return (F.cross_entropy(acc, y) + 3 * torch.log(1 - agreement).mean()).to(z.dtype)[None]

    z = randn(6, 5, dtype=dtype, grad=True)
    loss = lambda z: elr_loss(z, y, bank, index, update=False)[None]
    agrees_with_formula(loss, formula, (z,), 1e-6)


def test_kl_to_bank_is_saf_and_mesa():
    """(1 / B) sum KL(softmax(z_past / tau) || softmax(z / tau))."""
    z, tau = randn(6, 5, dtype=F64, grad=True), 5.0
    bank, index = randn(9, 5, dtype=F64), places(6, 9)
    past = F.log_softmax(bank[index] / tau, 1)
    truth = F.kl_div(F.log_softmax(z / tau, 1), past, log_target=True, reduction="batchmean")
    torch.testing.assert_close(kl_to_bank(z, bank, index, tau), truth)
    differentiates(lambda z: kl_to_bank(z, bank, index, tau), (z,))
    indexed_ema_(bank, index, z, 0.0)  # the epoch's outputs stored for later
    assert torch.equal(bank[index], z.detach())
    assert abs(kl_to_bank(z, bank, index, tau).item()) < 1e-12
    # MESA: the past outputs are those of averaged weights.
    v, theta, x = randn(5, 4, dtype=F64), randn(5, 4, dtype=F64), randn(6, 4, dtype=F64)
    expected = 0.999 * v + 0.001 * theta
    ema_(v, theta, 0.999)
    torch.testing.assert_close(v, expected)
    found = kl_to_bank(z, x @ v.T, torch.arange(6, device=DEVICE), tau)
    truth = F.kl_div((z / tau).log_softmax(1), (x @ v.T / tau).softmax(1), reduction="batchmean")
    torch.testing.assert_close(found, truth)
    half = kl_to_bank(z.detach().bfloat16(), bank.bfloat16(), index)
    assert half.dtype == torch.bfloat16


def test_cfg_kd_is_kl_from_the_guided_teacher():
    student, cond, uncond = (randn(2, 3, 7, dtype=F64) for _ in range(3))
    gamma = 3.0
    teacher = uncond + gamma * (cond - uncond)
    truth = F.kl_div(
        student.log_softmax(-1).flatten(0, 1),
        teacher.softmax(-1).flatten(0, 1),
        reduction="batchmean",
    )
    torch.testing.assert_close(cfg_kd_loss(student, cond, uncond, gamma), truth)
    student.requires_grad_()
    differentiates(lambda s: cfg_kd_loss(s, cond, uncond, gamma), (student,))


def sog_step(z, index, s, u, tau, gamma, beta, eta, rho):
    """iSogCLR written out anchor by anchor."""
    h = F.normalize(z, dim=1)
    count = len(index)
    losses, weights_s, weights_d = (
        [],
        torch.zeros(2, count, dtype=F64),
        torch.zeros(2, count, dtype=F64),
    )
    for a in range(2 * count):
        b, view = a % count, a // count
        others = [j for j in range(2 * count) if j % count != b]
        similarity = h[others] @ h[a]
        t = tau[index[b]]
        e = (similarity.detach() / t).exp()
        new = (1 - gamma) * s[index[b]] + gamma * e.mean()
        w = e / new
        losses.append((w * similarity).mean() - h[a] @ h[(a + count) % (2 * count)])
        weights_s[view, b] = new
        weights_d[view, b] = (new.log() + rho - (w * similarity.detach()).mean() / t).clamp(-3, 3)
    s, u, tau = s.clone(), u.clone(), tau.clone()
    s[index] = weights_s.mean(0)
    u[index] = (1 - beta) * u[index] + beta * weights_d.mean(0)
    tau[index] = (tau[index] - eta * u[index]).clamp(0.05, 1)
    return torch.stack(losses).mean(), s, u, tau


def test_isogclr_is_the_papers_step():
    s, u = torch.zeros(9, dtype=F64), torch.zeros(9, dtype=F64)
    tau = torch.full((9,), 0.3, dtype=F64)
    s, u, tau = s.to(DEVICE), u.to(DEVICE), tau.to(DEVICE)
    for _ in range(3):
        z, index = randn(8, 6, dtype=F64, grad=True), places(4, 9)
        options = (0.8, 0.9, 0.05, 0.3)
        truth, *state = sog_step(z, index, s, u, tau, *options)
        loss = isogclr_loss(z, index, s, u, tau, *options)
        torch.testing.assert_close(loss, truth)
        torch.testing.assert_close([s, u, tau], state)
        (ours,), (theirs,) = torch.autograd.grad(loss, z), torch.autograd.grad(truth, z)
        torch.testing.assert_close(ours, theirs)


def test_rationale_loss_and_its_bank():
    z, weight = randn(6, 5, dtype=F64, grad=True), randn(4, 5, dtype=F64, grad=True)
    bank, y = randn(4, 4, 5, dtype=F64), torch.randint(0, 4, (6,), device=DEVICE)
    rationale = weight[None] * z[:, None]  # (B, K, D)
    truth = (rationale - bank[y]).square().sum((1, 2))
    torch.testing.assert_close(rationale_loss(z, weight, bank, y, reduction="none"), truth)
    torch.testing.assert_close(rationale_loss(z, weight, bank, y), truth.mean())
    differentiates(lambda z, w: rationale_loss(z, w, bank, y, reduction="sum"), (z, weight))
    near = bank.float()
    near[y] = (rationale.detach() * (1 + 1e-4)).float()  # the terms cancel to 1e-8 of their size
    last = torch.arange(6, device=DEVICE)[[int((y == c).nonzero()[-1]) for c in y.tolist()]]
    direct = (rationale.detach()[last].float().double() - near[y].double()).square().sum((1, 2))
    found = rationale_loss(
        z.detach().float()[last], weight.detach().float(), near, y, reduction="none"
    )
    torch.testing.assert_close(found.double(), direct, rtol=1e-2, atol=1e-9)
    # Momentum of the class means of R, or of one sample after another.
    classes = y.unique()
    means = torch.stack([z.detach()[y == c].mean(0) for c in classes])
    expected = bank.clone()
    for c in classes.tolist():
        expected[c] = 0.9 * bank[c] + 0.1 * rationale.detach()[y == c].mean(0)
    after = bank.clone()
    indexed_ema_(after, classes, weight.detach() * means[:, None], 0.9)
    torch.testing.assert_close(after, expected)
    one_by_one, expected = bank.clone(), bank.clone()
    class_ema_(one_by_one, rationale, y, 0.9)
    for b, c in enumerate(y.tolist()):
        expected[c] = 0.9 * expected[c] + 0.1 * rationale.detach()[b]
    torch.testing.assert_close(one_by_one, expected)


def test_good_instance_prototypes():
    """p[y] <- m p[y] + (1 - m) q for one sample after another, then unit length."""
    from solera.norm import l2_normalize

    p, q = F.normalize(randn(3, 8, dtype=F64)), F.normalize(randn(7, 8, dtype=F64))
    y, expected = torch.randint(0, 3, (7,), device=DEVICE), None
    expected = p.clone()
    for b, c in enumerate(y.tolist()):
        expected[c] = 0.999 * expected[c] + 0.001 * q[b]
    class_ema_(p, q, y, 0.999)
    torch.testing.assert_close(l2_normalize(p), F.normalize(expected))


Z, Y, I = torch.ones(2, 3), torch.tensor([0, 1]), torch.tensor([0, 1])
BANK, S = torch.ones(4, 3), torch.ones(4)
BAD = [
    (lambda: elr_loss(Z[0], Y, BANK, I), ValueError, "logits: expected 2 dimensions"),
    (lambda: elr_loss(Z, Y.float(), BANK, I), TypeError, "target: expected an int64"),
    (lambda: elr_loss(Z, Y[:1], BANK, I), ValueError, r"target: expected shape \(2,\)"),
    (lambda: elr_loss(Z, Y, BANK[:, :2], I), ValueError, r"bank: expected shape \(N, 3\)"),
    (lambda: elr_loss(Z, Y, BANK, I - 1), IndexError, "index: expected row numbers of at least 0"),
    (lambda: elr_loss(Z, Y, BANK, I + 3), IndexError, "index: expected row numbers below 4"),
    (lambda: elr_loss(Z, Y, BANK, I, beta=2.0), ValueError, "decay"),
    (lambda: kl_to_bank(Z, BANK, I[:1]), ValueError, "bank: expected shape.*2 row numbers"),
    (lambda: kl_to_bank(Z, BANK, I, 0.0), ValueError, "tau: expected a positive"),
    (lambda: cfg_kd_loss(Z, BANK, Z, 2.0), ValueError, "cond: expected shape"),
    (lambda: isogclr_loss(Z, I, S, S, S), ValueError, "z: expected an even number"),
    (lambda: isogclr_loss(torch.ones(4, 3), I, S, S[:2], S), ValueError, "u: expected shape"),
    (lambda: isogclr_loss(torch.ones(4, 3), I[:1], S, S, S), ValueError, "index: expected 2 row"),
    (lambda: rationale_loss(Z, BANK, BANK, Y), ValueError, "bank: expected 3 dim"),
    (lambda: rationale_loss(Z, Z[:, :2], BANK[None], Y), ValueError, "weight: expected shape"),
    (lambda: rationale_loss(Z, Z, torch.ones(2, 2, 3), Y, reduction="x"), ValueError, "reduction"),
]  # fmt: skip


@pytest.mark.skipif(DEVICE != "cpu", reason="the table's tensors are on the CPU")
@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input(case):
    call, kind, message = BAD[case]
    with pytest.raises(kind, match=message):
        call()
