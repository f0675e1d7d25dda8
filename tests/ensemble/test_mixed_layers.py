"""Layers over several feature sets or experts: compositions, against the papers' formulas in float64."""

import pytest
import torch
import torch.nn.functional as F
from function_checks import compiles, differentiates, works_under_torch_func
from helpers import DEVICE, DTYPES, ULP, randn, relative_error

import solera
from solera.ensemble import (
    binary_kl_norm,
    cat_linear,
    dual_head_linear,
    ensemble_linear,
    fanout_scale_grad,
    gated_mix,
    grad_scale,
    indexed_mlp,
    layer_ensemble_heads,
    mixing_gate,
    mixture_linear,
)

pytestmark = pytest.mark.no_interpreter  # compositions; the cores below run interpreted elsewhere

D = torch.float64


def same_gradients(a, b, tensors):
    torch.testing.assert_close(a, b)
    dy = torch.randn_like(a)
    got = torch.autograd.grad(a, tensors, dy, retain_graph=True)
    torch.testing.assert_close(got, torch.autograd.grad(b, tensors, dy, retain_graph=True))


def mixture(x, weight, gate, bias=None):
    """y_t = sum_k D_k(x_t) (W_k x_t + b_k)"""
    y = torch.einsum("...k,koi,...i->...o", gate, weight, x)
    return y if bias is None else y + gate @ bias


def test_word_level_domain_mixing_against_the_papers_formula():
    x, w, r = (
        randn(3, 7, 5, dtype=D, grad=True),
        randn(4, 6, 5, dtype=D, grad=True),
        randn(4, 5, dtype=D, grad=True),
    )
    b = randn(4, 6, dtype=D, grad=True)
    gate = mixing_gate(x, r, 0.2)
    want = 0.8 * torch.softmax(x @ r.mT, -1) + 0.2 / 4
    same_gradients(mixture_linear(x, w, gate, b), mixture(x, w, want, b), [x, w, r, b])
    same_gradients(mixture_linear(x, w, gate), mixture(x, w, want), [x, w, r])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mixture_linear_in_working_precision(dtype):
    x, w, b = (randn(*s, dtype=dtype, grad=True) for s in ((50, 33), (5, 20, 33), (5, 20)))
    gate = torch.rand(50, 5, device=DEVICE).to(dtype).requires_grad_()
    tensors = [x, w, gate, b]
    wide = [t.detach().double().requires_grad_() for t in tensors]
    y, exact, today = mixture_linear(*tensors), mixture(*wide), mixture(*tensors)
    dy = randn(50, 20, dtype=dtype)
    mine = (y, *torch.autograd.grad(y, tensors, dy))
    truth = (exact, *torch.autograd.grad(exact, wide, dy.double()))
    eager = (today, *torch.autograd.grad(today, tensors, dy))
    for a, t, e in zip(mine, truth, eager):
        assert relative_error(a, t) <= max(1.5 * ULP[dtype], 2 * relative_error(e, t))
    with torch.no_grad():
        assert torch.equal(mixture_linear(*tensors), y)
    with solera.backend("reference"):
        torch.testing.assert_close(mixture_linear(*tensors), y, rtol=2e-2, atol=2e-2)


def test_mixture_linear_twice_compiled_and_transformed():
    make = lambda size: [
        randn(*s, dtype=D, grad=True) for s in ((size, 3), (2, 2, 3), (size, 2), (2, 2))
    ]
    differentiates(mixture_linear, make(1))
    works_under_torch_func(mixture_linear, make(3))
    single = lambda size: [t.float().detach().requires_grad_() for t in make(size)]
    compiles(mixture_linear, single)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert mixture_linear(*single(3)).dtype == torch.bfloat16


@pytest.mark.parametrize("tokens", [None, 6])
def test_enforced_routing_against_the_papers_formula(tokens):
    """Contrastive learning and mixture of experts: FFN of the example's domain."""
    x = randn(*((9, 5) if tokens is None else (9, tokens, 5)), dtype=D, grad=True)
    w1, w2 = randn(4, 8, 5, dtype=D, grad=True), randn(4, 3, 8, dtype=D, grad=True)
    b1, b2 = randn(4, 8, dtype=D, grad=True), randn(4, 3, dtype=D, grad=True)
    index = torch.tensor([2, 0, 2, 3, 0, 0, 2, 3, 2], device=DEVICE)  # nobody at expert 1
    rows = [
        F.gelu(x[i] @ w1[e].mT + b1[e]) @ w2[e].mT + b2[e] for i, e in enumerate(index.tolist())
    ]
    same_gradients(indexed_mlp(x, index, w1, w2, b1, b2), torch.stack(rows), [x, w1, w2, b1, b2])
    if tokens:  # the sentence's own router: the mean over its tokens
        router = randn(4, 5, dtype=D)
        chosen = F.linear(x.mean(1), router).argmax(1)
        y = indexed_mlp(x, chosen, w1, w2, activation=torch.tanh)
        want = torch.tanh(torch.einsum("bti,bhi->bth", x, w1[chosen])) @ w2[chosen].mT
        torch.testing.assert_close(y, want)
    assert indexed_mlp(x[:0], index[:0], w1, w2).shape == (0, *x.shape[1:-1], 3)


@pytest.mark.parametrize("norm", ["none", "l2", "bn"])
def test_cat_linear_against_the_concatenation(norm):
    """Useful representations for shifting tasks: a linear probe over K seeds' features."""
    features = [randn(9, d, dtype=D, grad=True) for d in (4, 1, 6)]
    w, b = randn(3, 11, dtype=D, grad=True), randn(3, dtype=D, grad=True)

    def normalized(f):
        if norm == "l2":
            return f / f.norm(dim=1, keepdim=True)
        if norm == "bn":
            return (f - f.mean(0)) / (f.var(0, correction=0) + 1e-5).sqrt()
        return f

    want = torch.cat([normalized(f) for f in features], 1) @ w.mT + b
    same_gradients(cat_linear(features, w, b, norm=norm), want, [*features, w, b])
    y = torch.compile(cat_linear, fullgraph=True, backend="aot_eager")(features, w, b, norm=norm)
    torch.testing.assert_close(y, want)


def test_der_super_feature_and_channel_gate():
    """DER: the old extractors' features and a new one's, gated by channel, under one classifier."""
    old, new = randn(6, 4, dtype=D), randn(6, 5, dtype=D)
    e, s, w = randn(5, dtype=D, grad=True), 3.0, randn(3, 9, dtype=D)
    y = cat_linear([old, new * torch.sigmoid(s * e)], w)
    want = torch.cat([old, new * torch.sigmoid(s * e)], 1) @ w.mT
    same_gradients(y, want, [e])


def test_many_extractors_have_their_heads_in_one_call():
    """A model zoo's extractors, a head each: the batched form of whatever rule integrates them."""
    features, w, b = randn(7, 4, 6, dtype=D), randn(4, 6, 3, dtype=D), randn(4, 3, dtype=D)
    want = torch.stack([features[:, k] @ w[k] + b[k] for k in range(4)], 1)
    torch.testing.assert_close(ensemble_linear(features, w, b), want)


@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize("weighted", [True, False])
def test_levi_heads_against_the_papers_formula(views, weighted):
    h, g = randn(3, 8, 5, dtype=D, grad=True), randn(views, 8, 4, dtype=D, grad=True)
    w1 = randn(3, 9, 6, dtype=D, grad=True)
    b1, w2, b2 = (randn(*s, dtype=D, grad=True) for s in ((3, 6), (3, 6, 2), (3, 2)))
    weights = torch.rand(3, dtype=D, device=DEVICE, requires_grad=True) if weighted else None
    y = layer_ensemble_heads(h, g, w1[:, :5], w1[:, 5:], b1, w2, b2, weights)
    outputs = [
        torch.relu(torch.cat([h[i], g[i if views > 1 else 0]], 1) @ w1[i] + b1[i]) @ w2[i] + b2[i]
        for i in range(3)
    ]
    stacked = torch.stack(outputs)
    want = stacked.mean(0) if weights is None else torch.einsum("lbc,l->bc", stacked, weights)
    same_gradients(y, want, [h, g, w1, b1, w2, b2, *([weights] if weighted else [])])


def test_gradient_division_at_the_split():
    """One-shot neural ensemble architecture search: identity forward, 1/K backward, K heads averaged."""
    x, w, b = randn(5, 4, dtype=D, grad=True), randn(3, 4, 2, dtype=D), randn(3, 2, dtype=D)
    heads = [v @ w[k] + b[k] for k, v in enumerate(fanout_scale_grad(x, 3))]
    mean = torch.stack(heads).mean(0)
    torch.testing.assert_close(mean, torch.stack([x @ w[k] + b[k] for k in range(3)]).mean(0))
    (grad,) = torch.autograd.grad(sum(y.sum() for y in heads), x)
    torch.testing.assert_close(grad, (w.sum((0, 2)) / 3).expand(5, -1))


def test_adaptive_gradient_modulation():
    """m_v = (f - f_noV + f_noA) / 2, m_a the other way round, gradients times kappa; the sum is f."""
    f, no_v, no_a = (randn(6, 4, dtype=D, grad=True) for _ in range(3))
    kappa = torch.tensor(0.7, dtype=D, device=DEVICE)
    v, a = 0.5 * (f - no_v + no_a), 0.5 * (f - no_a + no_v)
    total = grad_scale(v, kappa) + grad_scale(a, 1.3)
    torch.testing.assert_close(total, f)
    dy = torch.randn_like(f)
    got = torch.autograd.grad(total, [f, no_v, no_a], dy)
    want = (0.5 * (0.7 + 1.3) * dy, 0.5 * (1.3 - 0.7) * dy, 0.5 * (0.7 - 1.3) * dy)
    torch.testing.assert_close(got, want)
    assert solera.norm.grad_scale is grad_scale
    rows = torch.rand(6, 1, dtype=D, device=DEVICE)
    (grad,) = torch.autograd.grad(grad_scale(f, rows), f, dy)
    torch.testing.assert_close(grad, dy * rows)
    with pytest.raises(ValueError, match="scale: expected a shape that broadcasts"):
        grad_scale(f, torch.ones(7, 6, 4))


def test_gated_mix():
    """h = sum_m g_m(x) h_m"""
    h, g = randn(3, 7, 5, dtype=D, grad=True), randn(7, 3, dtype=D, grad=True)
    same_gradients(gated_mix(h, g), torch.einsum("bm,mbd->bd", g, h), [h, g])


def test_dual_heads_and_their_losses_against_the_papers_formula():
    f, w, b = (
        randn(6, 5, dtype=D, grad=True),
        randn(2, 4, 5, dtype=D, grad=True),
        randn(2, 4, dtype=D, grad=True),
    )
    z1, z2 = dual_head_linear(f, w, b)
    torch.testing.assert_close((z1, z2), (f @ w[0].mT + b[0], f @ w[1].mT + b[1]))
    teacher, tau = randn(6, 4, dtype=D), 2.0
    p = torch.sigmoid((z2 - teacher) / tau)
    half = torch.full_like(p, 0.5)
    kl = half * (half / p).log() + half * (half / (1 - p)).log()
    want = tau**2 / 6 * kl.sum()
    same_gradients(binary_kl_norm(z2, teacher, tau), want, [f, w, b])
    far = binary_kl_norm(torch.tensor([[1e4]]), torch.tensor([[-1e4]]))
    assert torch.isfinite(far)


def bad(call, error, message):
    return pytest.param(call, error, message, id=message)


@pytest.mark.parametrize(
    "call, error, message",
    [
        bad(lambda: mixture_linear(randn(4, 3), randn(2, 5, 4), randn(4, 2)), ValueError, "weight: expected shape"),
        bad(lambda: mixture_linear(randn(4, 3), randn(2, 5, 3), randn(4, 3)), ValueError, "gate: expected shape"),
        bad(lambda: mixing_gate(randn(4, 3), randn(2, 3), 1.5), ValueError, "epsilon: expected"),
        bad(
            lambda: indexed_mlp(randn(2, 3), torch.tensor([0, 5]), randn(2, 4, 3), randn(2, 1, 4)),
            ValueError,
            r"index: expected numbers in \[0, 2\)",
        ),
        bad(
            lambda: indexed_mlp(randn(2, 3), randn(2), randn(2, 4, 3), randn(2, 1, 4)),
            TypeError,
            "index: expected a tensor of int64",
        ),
        bad(lambda: cat_linear(randn(2, 3), randn(1, 3)), TypeError, "features: expected a list"),
        bad(lambda: cat_linear([randn(2, 3)], randn(1, 4)), ValueError, "weight: expected shape"),
        bad(lambda: cat_linear([randn(2, 3)], randn(1, 3), norm="l1"), ValueError, "norm: expected one of"),
        bad(lambda: fanout_scale_grad(randn(2), 0), ValueError, "heads: expected a positive"),
        bad(lambda: gated_mix(randn(3, 2, 4), randn(3, 2)), ValueError, "gates: expected shape"),
        bad(lambda: dual_head_linear(randn(2, 3), randn(3, 4, 3)), ValueError, "weight: expected shape"),
        bad(
            lambda: dual_head_linear(randn(2, 3).bfloat16(), randn(2, 4, 3)),
            TypeError,
            "weight: expected torch.bfloat16",
        ),
        bad(
            lambda: mixing_gate(randn(4, 3), randn(2, 3).bfloat16()),
            TypeError,
            "weight: expected torch.float32",
        ),
        bad(lambda: binary_kl_norm(randn(2, 3), randn(2, 3), 0.0), ValueError, "tau: expected a positive"),
    ],
)  # fmt: skip
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
