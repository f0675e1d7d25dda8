"""Gates, balance losses and routers against their formulas."""

import pytest
import torch
import torch.nn.functional as F
from function_checks import compiles, differentiates
from helpers import DEVICE, randn

from solera.ensemble import (
    adaptive_aux_coefficient,
    cosine_route,
    load_balance_loss,
    moe_lora_linear,
    multi_hot_router_loss,
    multi_lora_linear,
    norm_top_k_gate,
    threshold_balance_loss,
    threshold_gate,
    top_k_gate,
)

pytestmark = pytest.mark.no_interpreter  # compositions: no kernel of their own


def test_top_k():
    logits = randn(6, 5, dtype=torch.float64, grad=True)
    p = logits.softmax(-1)
    values, index = p.topk(2)
    gates, named = top_k_gate(logits, 2)
    assert torch.equal(named, index)
    torch.testing.assert_close(gates, values / values.sum(-1, keepdim=True))
    torch.testing.assert_close(top_k_gate(logits, 2, normalize=False)[0], values)
    differentiates(lambda z: top_k_gate(z, 2)[0], (logits,))
    huge = top_k_gate(torch.tensor([[1e30, -1e30, 0.0]], device=DEVICE), 2)[0]
    assert torch.equal(huge, torch.tensor([[1.0, 0.0]], device=DEVICE))
    for k in (0, 6, True, 1.0):
        with pytest.raises(ValueError, match=r"k: expected an int in \[1, 5\]"):
            top_k_gate(logits, k)


def test_threshold_gate():
    """AdaMoLE: which experts, how much of each, and never none with the default threshold."""
    z, t = randn(40, 4, dtype=torch.float64, scale=2), randn(40, 1, dtype=torch.float64, scale=3)
    w, over = threshold_gate(z, t)
    p, tau = z.softmax(-1), 0.25 * torch.sigmoid(t)
    kept = (p - tau).clamp_min(0)
    torch.testing.assert_close(w, kept / kept.sum(-1, keepdim=True))
    torch.testing.assert_close(over, p - tau)
    torch.testing.assert_close(w.sum(-1), torch.ones(40, dtype=w.dtype, device=DEVICE))
    assert (w == 0).any()
    nobody, _ = threshold_gate(z, t + 100, tau_max=1.0)
    assert not nobody.any()
    assert torch.equal(threshold_gate(z, t.squeeze(1))[0], w)
    few = z[:3].requires_grad_(), t[:3].requires_grad_()
    differentiates(lambda z, t: threshold_gate(z, t)[0], few)
    with pytest.raises(ValueError, match="tau_logit: expected shape"):
        threshold_gate(z, t[:3])


def test_threshold_balance_follows_the_authors_code():
    z, t = randn(30, 4, dtype=torch.float64), randn(30, dtype=torch.float64)
    want = 0.0
    for e in range(
        4
    ):  # the share of the tokens that take e, not of the choices; the mean of p - tau, not of p
        over = z.softmax(-1)[:, e] - torch.sigmoid(t) / 4
        want += 4 * (over >= 0).double().mean() * over.mean()
    torch.testing.assert_close(threshold_balance_loss(threshold_gate(z, t)[1]), want)


def test_adamole_layer():
    """The whole layer: gates from x, a mixture of LoRA experts, all gradients as autograd's."""
    T, E, r = 12, 3, 2
    shapes = (T, 6), (5, 6), (E, r, 6), (E, 5, r), (E, 6), (1, 6)
    x, weight, a, b, router, tau = (randn(*s, dtype=torch.float64, grad=True) for s in shapes)
    w, over = threshold_gate(x @ router.T, x @ tau.T)
    y = moe_lora_linear(x, weight, a, b, w, scaling=2.0)
    gap = (x @ router.T).softmax(-1) - torch.sigmoid(x @ tau.T) / E
    kept = gap.clamp(min=0)
    gates = kept / kept.sum(1, keepdim=True)
    each = torch.einsum("ti,eri,eor->teo", x, a, b)
    want = x @ weight.T + 2 * (gates.unsqueeze(-1) * each).sum(1)
    torch.testing.assert_close(y, want)
    leaves = (x, weight, a, b, router, tau)
    mine = torch.autograd.grad(y.square().sum() + threshold_balance_loss(over), leaves)
    balance = E * ((gap >= 0).double().mean(0) * gap.mean(0)).sum()
    torch.testing.assert_close(mine, torch.autograd.grad(want.square().sum() + balance, leaves))


def test_goat_layer():
    """GOAT: the k best of E experts with renormalised gates, and its balance loss."""
    T, E = 12, 8
    shapes = (T, 6), (5, 6), (E, 1, 6), (E, 5, 1), (E, 6)
    x, weight, a, b, router = (randn(*s, dtype=torch.float64, grad=True) for s in shapes)
    logits = x @ router.T
    gates, index = top_k_gate(logits, 2)
    y = moe_lora_linear(x, weight, a, b, gates, index=index, scaling=0.5)
    p = logits.softmax(-1)
    best = torch.where(p >= p.topk(2).values[:, -1:], p, 0.0)
    g = best / best.sum(1, keepdim=True)
    want = x @ weight.T + 0.5 * torch.einsum("te,eor,eri,ti->to", g, b, a, x)
    torch.testing.assert_close(y, want)
    leaves = (x, weight, a, b, router)
    grads = [torch.autograd.grad(v.square().sum(), leaves, retain_graph=True) for v in (y, want)]
    torch.testing.assert_close(*grads)
    f = torch.bincount(index.flatten(), minlength=E) / (2 * T)
    torch.testing.assert_close(load_balance_loss(p, index), E * (f * p.mean(0)).sum())


def test_skywork_gate():
    x, weight = (
        randn(20, 6, dtype=torch.float64, grad=True),
        randn(5, 6, dtype=torch.float64, grad=True),
    )
    out = norm_top_k_gate(x, weight, 2, scale=1.5, eps=0.0)
    z = x @ weight.T
    z = 1.5 * (z - z.mean(-1, keepdim=True)) / z.std(-1, correction=0, keepdim=True)
    p = z.softmax(-1)
    values, index = p.topk(2)
    torch.testing.assert_close(out.gates, values)
    assert torch.equal(out.index, index)
    load = torch.bincount(index.flatten(), minlength=5) / 40
    torch.testing.assert_close(out.load, load.double())
    torch.testing.assert_close(out.aux, 5 * (load * p.mean(0)).sum())
    differentiates(lambda x, w: norm_top_k_gate(x, w, 2)[0], (x[:3, :3], weight[:, :3]))
    equal = torch.zeros_like(weight, requires_grad=True)
    flat = norm_top_k_gate(x, equal, 2)
    assert torch.autograd.grad(flat.gates.sum() + flat.aux, equal)[0].isfinite().all()
    torch.testing.assert_close(flat.gates, torch.full_like(flat.gates, 0.2))


def test_adaptive_coefficient_follows_the_drop_rate():
    alpha = 1.0
    for _ in range(2000):
        alpha = adaptive_aux_coefficient(alpha, 0.5, target=0.2)
    assert alpha == pytest.approx(0.1)
    assert adaptive_aux_coefficient(0.1, 0.0) == pytest.approx(0.099)
    with pytest.raises(ValueError, match="drop_rate: expected a finite number in"):
        adaptive_aux_coefficient(0.1, 1.5)


def test_cosine_route_and_a_mixture_of_members():
    """ELREA: clusters weighed by a gradient's direction, K LoRA members over one weight, mixed logits."""
    K, D, T = 4, 7, 5
    delta, centroids = randn(3, D, dtype=torch.float64, grad=True), randn(K, D, dtype=torch.float64)
    w = cosine_route(delta, centroids, 0.5)
    c = F.cosine_similarity(delta.unsqueeze(1), centroids, dim=-1)
    c = (c - c.mean(1, keepdim=True)) / c.std(1, correction=0, keepdim=True)
    torch.testing.assert_close(w, (c / 0.5).softmax(1))
    x, weight = randn(K, T, 6, dtype=torch.float64), randn(8, 6, dtype=torch.float64)
    a, b = randn(K, 2, 6, dtype=torch.float64), randn(K, 8, 2, dtype=torch.float64)
    members = multi_lora_linear(x, weight, a, b, scaling=2.0)
    mixed = torch.einsum("k,ktv->tv", w[0], members)
    want = sum(w[0, k] * x[k] @ (weight + 2 * b[k] @ a[k]).T for k in range(K))
    torch.testing.assert_close(mixed, want)


def test_expert_rewards_of_one_task():
    """DMoERM: E capability experts over one base, their scalar outputs through a small network."""
    E, N = 3, 4
    shapes = (N, 6), (8, 6), (E, 2, 6), (E, 8, 2)
    x, weight, a, b = (randn(*s, dtype=torch.float64, grad=True) for s in shapes)
    heads, out = randn(E, 8, dtype=torch.float64), randn(1, E, dtype=torch.float64)
    hidden = multi_lora_linear(x, weight, a, b, scaling=2.0)
    reward = (torch.einsum("eno,eo->ne", hidden.tanh(), heads) @ out.T).squeeze(1)
    want = [((x @ (weight + 2 * b[e] @ a[e]).T).tanh() @ heads[e]) for e in range(E)]
    torch.testing.assert_close(reward, (torch.stack(want, 1) @ out.T).squeeze(1))
    loss = -F.logsigmoid(reward[:2] - reward[2:]).mean()
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, (a, b)))


def test_multi_hot_router_loss():
    logits = randn(6, 3, dtype=torch.float64, grad=True)
    prediction, target = torch.randint(0, 2, (6, 3)), torch.randint(0, 2, (6,))
    right = (prediction == target[:, None]).double().to(DEVICE)
    p = torch.sigmoid(logits)
    want = -(right * p.log() + (1 - right) * (1 - p).log()).mean()
    got = multi_hot_router_loss(logits, prediction.to(DEVICE), target.to(DEVICE))
    torch.testing.assert_close(got, want)
    with pytest.raises(ValueError, match="target: expected shape"):
        multi_hot_router_loss(logits, prediction.to(DEVICE), target[:3].to(DEVICE))


def test_gates_compile():
    def gate(z, t):
        return threshold_gate(z, t)[0], top_k_gate(z, 2)[0]

    def make(size):
        return [randn(size, n).requires_grad_() for n in (4, 1)]

    compiles(gate, make)


def test_dtypes_are_kept():
    z, t = randn(5, 4, dtype=torch.bfloat16), randn(5, 1, dtype=torch.bfloat16)
    assert threshold_gate(z, t)[0].dtype == top_k_gate(z, 2)[0].dtype == torch.bfloat16
    with pytest.raises(TypeError, match="logits: expected float32"):
        top_k_gate(torch.zeros(3, 2, dtype=torch.int64), 1)
    with pytest.raises(TypeError, match="index: expected an integer tensor"):
        load_balance_loss(z, z)
