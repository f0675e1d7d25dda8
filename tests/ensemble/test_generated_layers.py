"""Layers run with generated or retrieved parameters, boosted networks, convolutions of members: compositions."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, assert_accurate, randn

from solera import nn
from solera.ensemble import (
    batch_ensemble_conv2d,
    boosted_mlp,
    chunked_hypernet,
    ensemble_conv2d,
    hypernet_linear,
    hypernet_regularizer,
    key_value,
    kv_bottleneck,
    mpo_linear,
    nearest_keys,
    pseudo_residuals,
    vq_ema_update_,
)

pytestmark = pytest.mark.no_interpreter  # compositions; the cores below run interpreted elsewhere

D = torch.float64


def same_gradients(a, b, tensors):
    torch.testing.assert_close(a, b)
    dy = torch.randn_like(a)
    got = torch.autograd.grad(a, tensors, dy, retain_graph=True)
    torch.testing.assert_close(got, torch.autograd.grad(b, tensors, dy, retain_graph=True))


# ---- hypernetworks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_generated_linear_layers(bias):
    x, theta = randn(3, 6, 4, dtype=D, grad=True), randn(3, 5 * 4 + 5 * bias, dtype=D, grad=True)
    rows = [x[t] @ theta[t, :20].view(5, 4).mT + (theta[t, 20:] if bias else 0) for t in range(3)]
    same_gradients(hypernet_linear(x, theta, 5, bias=bias), torch.stack(rows), [x, theta])


def test_dependency_preserving_hypernetworks_against_the_papers_formula():
    """h_l = RNN(h_{l-1}, [e_t, c_l]), theta_l = U h_l; sum_s ||H(e_s) - H*(e_s)||^2."""
    torch.manual_seed(1)
    e, c, u = (
        randn(2, 3, dtype=D, grad=True),
        randn(4, 5, dtype=D, grad=True),
        randn(6, 7, dtype=D, grad=True),
    )
    cell = torch.nn.RNN(8, 7, batch_first=True).to(DEVICE, D)
    theta = []
    for t in range(2):
        h = torch.zeros(7, dtype=D, device=DEVICE)
        for step in range(4):
            v = torch.cat([e[t], c[step]])
            h = torch.tanh(
                cell.weight_ih_l0 @ v + cell.bias_ih_l0 + cell.weight_hh_l0 @ h + cell.bias_hh_l0
            )
            theta.append(u @ h)
    want = torch.stack(theta).view(2, 24)
    got = chunked_hypernet(e, c, u, cell)
    same_gradients(got, want, [e, c, u])
    alone = chunked_hypernet(e, c, randn(6, 8, dtype=D))
    assert alone.shape == (2, 24)
    before = randn(2, 24, dtype=D)
    torch.testing.assert_close(hypernet_regularizer(got, before), (want - before).square().sum())


def test_mpo_linear_is_the_contracted_matrix():
    """Scaling language models deeper: a central tensor shared by layers, outer ones of each layer."""
    left, core, right = (
        randn(2, 3, 4, dtype=D, grad=True),
        randn(4, 3, 2, 5, dtype=D, grad=True),
        randn(5, 2, 3, dtype=D, grad=True),
    )
    x = randn(6, 12, dtype=D, grad=True)
    w = torch.einsum("aop,pbrq,qcs->orsabc", left, core, right).reshape(18, 12)
    same_gradients(mpo_linear(x, left, core, right), x @ w.mT, [x, left, core, right])


# ---- key-value bottleneck ----------------------------------------------------------------------------


@pytest.mark.parametrize("topk", [1, 3])
def test_key_value_bottleneck_against_the_papers_formula(topk, monkeypatch):
    monkeypatch.setattr(key_value, "CHUNK", 40)  # several chunks of rows
    x, keys = randn(2, 13, 4, dtype=D, grad=True), randn(2, 6, 4, dtype=D, grad=True)
    values = randn(2, 6, 3, dtype=D, grad=True)
    y, index = kv_bottleneck(x, keys, values, topk)
    near = torch.cdist(x, keys).topk(topk, 2, largest=False).indices
    assert torch.equal(index, near)
    want = torch.stack([values[c][near[c]].mean(1) for c in range(2)])
    same_gradients(y, want, [values])
    assert torch.autograd.grad(y.sum(), [x, keys], allow_unused=True) == (None, None)
    assert nearest_keys(x[:, :0], keys).shape == (2, 0, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_keys_follow_the_average_of_their_rows(dtype):
    keys, total, size = (
        randn(2, 5, 3, dtype=dtype),
        randn(2, 5, 3, dtype=dtype),
        torch.rand(2, 5).to(DEVICE, dtype),
    )
    x = randn(2, 40, 3, dtype=dtype)
    index = nearest_keys(x, keys)
    one = F.one_hot(index.squeeze(2), 5).double()  # (c, N, J)
    n = 0.9 * size.double() + 0.1 * one.sum(1)
    s = 0.9 * total.double() + 0.1 * torch.einsum("cnj,cnd->cjd", one, x.double())
    all_n = n.sum(1, keepdim=True)
    want = s / ((n + 1e-3) / (all_n + 5e-3) * all_n).unsqueeze(2)
    vq_ema_update_(keys, total, size, x, index, decay=0.9, eps=1e-3)
    assert_accurate(size, n, n.to(dtype))
    assert_accurate(total, s, s.to(dtype).mul(1 + 1e-7))
    torch.testing.assert_close(keys.double(), want, rtol=1e-5, atol=1e-6)


# ---- boosted networks --------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["sigmoid", "tanh", "relu", torch.sin])
def test_boosted_networks_against_the_papers_formula(activation):
    """F_t(x) = F_0 + sum_{j<=t} rho_j (V_j sigma(W_j x + b_j) + c_j)"""
    x, w, b = (
        randn(7, 4, dtype=D, grad=True),
        randn(3, 2, 4, dtype=D, grad=True),
        randn(3, 2, dtype=D, grad=True),
    )
    v, c = randn(3, 5, 2, dtype=D, grad=True), randn(3, 5, dtype=D, grad=True)
    rho, start = randn(3, dtype=D, grad=True), randn(5, dtype=D, grad=True)
    sigma = activation if callable(activation) else getattr(torch, activation)
    stages, total = [], start
    for t in range(3):
        total = total + rho[t] * (sigma(x @ w[t].mT + b[t]) @ v[t].mT + c[t])
        stages.append(total)
    tensors = [x, w, b, v, c, rho, start]
    same_gradients(boosted_mlp(*tensors, activation=activation), stages[-1], tensors)
    staged = boosted_mlp(*tensors, activation=activation, staged=True)
    same_gradients(staged, torch.stack(stages), tensors)
    half = x.detach().bfloat16()
    parameters = [t.detach().float() for t in tensors[1:]]
    exact = boosted_mlp(half.double(), *tensors[1:], activation=activation, staged=True)
    for given, autocast in ((half, False), (half.float(), True)):
        with torch.autocast(half.device.type, torch.bfloat16, autocast):
            got = boosted_mlp(given, *parameters, activation=activation, staged=True)
        assert got.dtype == torch.bfloat16
        assert (got.double() - exact).norm() <= 0.02 * exact.norm()
    target = torch.arange(7, device=DEVICE) % 5
    (g,) = torch.autograd.grad(F.cross_entropy(stages[-1], target, reduction="sum"), stages[-1])
    torch.testing.assert_close(pseudo_residuals(stages[-1], target), -g)


# ---- convolutions ------------------------------------------------------------------------------------


def test_convolutions_want_members():
    for kind in (nn.EnsembleConv2d, nn.BatchEnsembleConv2d):
        with pytest.raises(ValueError, match="k: expected a positive integer"):
            kind(3, 4, 3, k=0)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("shared", [True, False])
def test_convolutions_of_members(shared, groups):
    options = {"stride": (2, 1), "padding": 1, "dilation": 1, "groups": groups}
    x = randn(*((2, 4, 6, 5) if shared else (2, 3, 4, 6, 5)), dtype=D, grad=True)
    of = lambda k: x if shared else x[:, k]
    w = randn(6, 4 // groups, 3, 3, dtype=D, grad=True)
    r, s, b = (randn(3, n, dtype=D, grad=True) for n in (4, 6, 6))
    rows = [
        F.conv2d(of(k) * r[k, :, None, None], w, None, **options) * s[k, :, None, None]
        + b[k, :, None, None]
        for k in range(3)
    ]
    y = batch_ensemble_conv2d(x, w, r, s, b, **options)
    same_gradients(y, torch.stack(rows, 1), [x, w, r, s, b])
    only_bias = batch_ensemble_conv2d(x, w, bias=b, **options)
    rows = [F.conv2d(of(k), w, b[k], **options) for k in range(3)]
    same_gradients(only_bias, torch.stack(rows, 1), [x, w, b])
    w = randn(3, 6, 4 // groups, 3, 3, dtype=D, grad=True)
    rows = [F.conv2d(of(k), w[k], b[k], **options) for k in range(3)]
    same_gradients(ensemble_conv2d(x, w, b, **options), torch.stack(rows, 1), [x, w, b])


def test_convolution_modules():
    shared = nn.BatchEnsembleConv2d(3, 4, 3, padding=1, k=2).to(DEVICE)
    apart = nn.EnsembleConv2d(3, 4, (3, 1), k=2).to(DEVICE)
    x = randn(2, 3, 5, 5)
    assert shared(x).shape == (2, 2, 4, 5, 5)
    want = torch.stack([F.conv2d(x, apart.weight[k], apart.bias[k]) for k in range(2)], 1)
    torch.testing.assert_close(apart(x), want)
    assert list(shared.state_dict()) == ["weight", "r", "s", "bias"]
    assert set(shared.r.unique().tolist()) <= {-1.0, 1.0}
    for module in (shared, apart):
        for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert torch.equal(other(x), module(x))
        module(x).sum().backward()
        assert all(p.grad is not None for p in module.parameters())
    with pytest.raises(ValueError, match="scaling_init"):
        nn.BatchEnsembleConv2d(3, 4, 3, k=2, scaling_init="other")
    with pytest.raises(ValueError, match="groups"):
        nn.EnsembleConv2d(3, 4, 3, groups=2, k=2)


@pytest.mark.parametrize("call", [batch_ensemble_conv2d, ensemble_conv2d])
def test_half_precision_against_float64(call):
    x = randn(2, 3, 4, 6, 5, dtype=torch.bfloat16)
    size = (5, 4, 3, 3) if call is batch_ensemble_conv2d else (3, 5, 4, 3, 3)
    rest = [randn(*size, dtype=torch.bfloat16)]
    rest += [randn(3, n, dtype=torch.bfloat16) for n in ((4, 5, 5) if len(size) == 4 else (5,))]
    wide = [t.double() for t in (x, *rest)]
    exact = call(*wide)
    assert_accurate(call(x, *rest), exact, exact.bfloat16().mul(1.02))


def boosted(out_weight, **options):
    tensors = randn(2, 3), randn(4, 2, 3), randn(4, 2), out_weight, randn(4, 5), randn(4)
    return boosted_mlp(*tensors, **options)


BAD = [
    (lambda: ensemble_conv2d(randn(2, 3, 4), randn(2, 5, 3, 3, 3)), "x: expected"),
    (lambda: ensemble_conv2d(randn(2, 3, 4, 4), randn(2, 5, 2, 3, 3)), "weight: expected 3 input channels"),
    (lambda: ensemble_conv2d(randn(2, 3, 3, 4, 4), randn(2, 5, 3, 3, 3)), "x: expected 2 members"),
    (lambda: batch_ensemble_conv2d(randn(2, 3, 4, 4), randn(5, 3, 3, 3)), "x: a shared x of 4 dimensions"),
    (lambda: batch_ensemble_conv2d(randn(2, 3, 4, 4), randn(5, 3, 3, 3), randn(2, 4)), "r: expected shape"),
    (lambda: boosted(randn(4, 5, 1)), "out_weight: expected shape"),
    (lambda: boosted(randn(4, 5, 2), activation="elu"), "activation: expected one of"),
    (lambda: hypernet_linear(randn(2, 3, 4), randn(2, 19), 5), "theta: expected shape"),
    (lambda: chunked_hypernet(randn(2, 3), randn(4, 5), randn(6, 7)), "weight: expected shape"),
    (lambda: mpo_linear(randn(2, 11), randn(2, 3, 4), randn(4, 3, 2, 5), randn(5, 2, 3)), "x: expected"),
    (lambda: mpo_linear(randn(2, 12), randn(2, 3, 4), randn(3, 3, 2, 5), randn(5, 2, 3)), "core: expected bonds"),
    (lambda: kv_bottleneck(randn(2, 3, 4), randn(2, 5, 4), randn(2, 6, 4)), "values: expected shape"),
    (lambda: kv_bottleneck(randn(2, 3, 4), randn(2, 5, 4), randn(2, 5, 4), 6), "topk: expected 1 to 5"),
    (lambda: pseudo_residuals(randn(2, 3), torch.zeros(3, dtype=torch.long)), "target: expected"),
]  # fmt: skip


@pytest.mark.parametrize("call, message", BAD)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
