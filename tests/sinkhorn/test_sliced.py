"""Core sliced: against sorted projections in float64 and against POT, gradients, directions, slots' neighbours."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, INTERPRETED, randn, relative_error

import solera
from solera.nn import SelfAttentionProjection
from solera.sinkhorn import sliced_wasserstein, vmf_sample

ops = torch.ops.solera


def directions(*shape, dtype=torch.float32):
    return F.normalize(randn(*shape, dtype=torch.float64), dim=-1).to(dtype)


def composition(x, y, theta, p=2):
    """What a user writes today, (B,) for clouds of one size."""
    a, b = ((t @ theta.transpose(-1, -2)).sort(-2).values for t in (x, y))
    return (a - b).abs().pow(p).mean((-2, -1))


def clouds(batch, n, m, d, count, dtype=torch.float32, grad=False):
    x, y = randn(batch, n, d, dtype=dtype), randn(batch, m, d, dtype=dtype) * 0.7 + 0.2
    return [t.requires_grad_(grad) for t in (x, y, directions(batch, count, d, dtype=dtype))]


SIZES = [(1, 1, 1), (1, 70, 2)] + ([] if INTERPRETED else [(3, 5, 2), (2, 70, 20), (1, 300, 3)])


@pytest.mark.parametrize("p", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("batch, n, count", SIZES)
def test_against_float64(batch, n, count, dtype, p):
    x, y, theta = clouds(batch, n, n, 3, count, dtype, grad=True)
    wide = [t.detach().double().requires_grad_() for t in (x, y, theta)]
    value, truth = sliced_wasserstein(x, y, theta, p), composition(*wide, p)
    limit = 1e-12 if dtype == torch.float64 else 2e-6
    assert value.dtype == dtype and relative_error(value, truth) < limit
    got = torch.autograd.grad(value.sum(), (x, y, theta))
    for a, b in zip(got, torch.autograd.grad(truth.sum(), wide)):
        assert relative_error(a, b) < (1e-10 if dtype == torch.float64 else 2e-5)
    total = sliced_wasserstein(x, y, theta, p, reduction="sum")
    torch.testing.assert_close(total, value * n)
    torch.testing.assert_close(sliced_wasserstein(x, y, theta, p, reduction="none").mean(-1), value)


@pytest.mark.no_interpreter
@pytest.mark.parametrize("n, m", [(8, 8), (12, 7), (1, 6), (9, 6)])
@pytest.mark.parametrize("p", [1, 2, 1.5])
def test_against_pot(n, m, p):
    ot = pytest.importorskip("ot", reason="POT is not installed")
    x, y, theta = clouds(2, n, m, 4, 5, torch.float64, grad=True)
    value = sliced_wasserstein(x, y, theta, p)
    want = torch.stack([
        ot.sliced_wasserstein_distance(
            a.cpu(), b.cpu(), projections=t.cpu().T.contiguous(), p=p
        ) ** p
        for a, b, t in zip(x, y, theta)
    ])  # fmt: skip
    torch.testing.assert_close(value.cpu(), want)
    with solera.backend("reference"):
        again = sliced_wasserstein(x, y, theta, p)
    got = torch.autograd.grad(value.sum(), (x, y, theta))
    torch.testing.assert_close(got, torch.autograd.grad(again.sum(), (x, y, theta)))


@pytest.mark.parametrize("p", [2, 3])
@pytest.mark.parametrize("n, m", [(5, 5), (4, 6)])
def test_gradcheck_and_gradgradcheck(n, m, p):
    x, y, theta = clouds(1 if INTERPRETED else 2, n, m, 3, 4, torch.float64, grad=True)
    f = lambda x, y, t: sliced_wasserstein(x, y, t, p)
    assert torch.autograd.gradcheck(f, (x, y, theta))
    assert torch.autograd.gradgradcheck(f, (x, y, theta))
    if INTERPRETED:
        return
    shared = directions(4, 3, dtype=torch.float64).requires_grad_()
    each = lambda x, y, t: sliced_wasserstein(x, y, t, p, reduction="none")
    assert torch.autograd.gradcheck(each, (x, y, shared))


@pytest.mark.no_interpreter
def test_weights():
    x, y, theta = clouds(2, 6, 9, 3, 4, torch.float64, grad=True)
    a, b = torch.rand(2, 6, dtype=torch.float64) + 0.2, torch.rand(2, 9, dtype=torch.float64) + 0.2
    a, b = (t.to(DEVICE).requires_grad_() for t in (a, b))
    f = lambda *t: sliced_wasserstein(*t[:3], x_weights=t[3], y_weights=t[4])
    assert torch.autograd.gradcheck(f, (x, y, theta, a, b))
    ones = torch.ones_like(a)
    torch.testing.assert_close(
        sliced_wasserstein(x, y, theta, x_weights=ones), sliced_wasserstein(x, y, theta)
    )
    twice = torch.cat([x, x[:, :1]], 1)  # a point of weight 2 counts twice
    ones = ones.detach().clone()
    ones[:, 0] = 2
    torch.testing.assert_close(
        sliced_wasserstein(x, y, theta, x_weights=ones), sliced_wasserstein(twice, y, theta)
    )


def test_ties_nan_and_extremes():
    x = torch.zeros(1, 40, 2, device=DEVICE).requires_grad_()  # every projection ties
    y, theta = randn(1, 40, 2), directions(1, 6, 2)
    value = sliced_wasserstein(x, y, theta)
    torch.testing.assert_close(value, composition(x, y, theta))
    _, order, _ = ops.sliced_forward(x.detach(), y, theta, 2.0)
    assert (order == torch.arange(40, device=DEVICE)).all()  # by index
    same = sliced_wasserstein(y, y.clone().requires_grad_(), theta, 1)
    assert same == 0 and torch.isfinite(torch.autograd.grad(value, x)[0]).all()
    mixed = torch.tensor([[-1e30, 1e30, -0.0, 0.0, 1e-40, -1e-40]], device=DEVICE).unsqueeze(-1)
    one = torch.ones(1, 1, device=DEVICE)
    _, order, _ = ops.sliced_forward(mixed, mixed, one.unsqueeze(0), 2.0)
    assert (
        sorted(order[0, 0].tolist()) == list(range(6))
        and order[0, 0, 0] == 0
        and order[0, 0, 5] == 1
    )
    bad = randn(2, 10, 2)
    bad[0, 3] = math.nan
    value = sliced_wasserstein(bad, randn(2, 10, 2), directions(3, 2))
    assert value[0].isnan() and torch.isfinite(value[1])


@pytest.mark.no_interpreter
def test_same_bits_for_any_thread_count_and_batch():
    x, y, theta = clouds(5, 200, 200, 3, 40, grad=True)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            value = sliced_wasserstein(x, y, theta)
            results.append((value, *torch.autograd.grad(value.sum(), (x, y, theta))))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))
    alone = sliced_wasserstein(x[2], y[2], theta[2])
    assert torch.equal(alone, results[0][0][2])


def test_half_strided_and_frozen():
    x, y, theta = clouds(2, 9, 9, 3, 4, torch.bfloat16, grad=True)
    value = sliced_wasserstein(x, y, theta)
    grads = torch.autograd.grad(value.sum(), (x, y, theta))
    assert value.dtype == torch.float32 and all(g.dtype == torch.bfloat16 for g in grads)
    assert relative_error(value, composition(x.double(), y.double(), theta.double())) < 1e-5
    x, y, theta = clouds(2, 9, 9, 3, 4)
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(sliced_wasserstein(strided, y, theta), sliced_wasserstein(x, y, theta))
    y.requires_grad_()
    (dy,) = torch.autograd.grad(sliced_wasserstein(x, y, theta).sum(), y)
    assert torch.isfinite(dy).all()
    assert sliced_wasserstein(x[:0], y[:0], theta[:0]).shape == (0,)


def test_opcheck():
    x, y, theta = clouds(2, 6, 6, 3, 4)
    for a, t in ((x, theta), (x.transpose(0, 1).contiguous().transpose(0, 1), theta[:1])):
        torch.library.opcheck(ops.sliced_forward.default, (a, y, t, 2.0))
        _, px, py = ops.sliced_forward(a, y, t, 2.0)
        for grad in (randn(2, 4), torch.ones((), device=DEVICE).expand(2, 4)):
            torch.library.opcheck(ops.sliced_backward.default, (grad, a, y, t, px, py, 2.0))


def test_compile_aot_eager():
    f = lambda x, y, t: sliced_wasserstein(x * 2, y, t).sum()
    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (6, 9):
        tensors = clouds(2, n, n, 3, 4, grad=True)
        torch.testing.assert_close(
            torch.autograd.grad(compiled(*tensors), tensors),
            torch.autograd.grad(f(*tensors), tensors),
        )


@pytest.mark.no_interpreter
def test_torch_func():
    x, y, theta = clouds(3, 7, 7, 3, 5, torch.float64)
    f = lambda x, y, t: sliced_wasserstein(x, y, t)
    torch.testing.assert_close(torch.func.vmap(f)(x, y, theta), f(x, y, theta))
    leaf = x.clone().requires_grad_()
    want = torch.autograd.grad(f(leaf, y, theta).sum(), leaf)[0]
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(f))(x, y, theta), want)


# ---- directions --------------------------------------------------------------------------------------


@pytest.mark.no_interpreter
@pytest.mark.parametrize("d", [2, 3, 8])
@pytest.mark.parametrize("kappa", [0.5, 20.0])
def test_vmf_moments(d, kappa):
    """Unit vectors whose mean is A_d(kappa) mu, A_d the ratio of Bessel functions, by quadrature here."""
    generator = torch.Generator(DEVICE).manual_seed(1)
    mu = directions(d, dtype=torch.float64)
    x = vmf_sample(mu, kappa, 20000, generator=generator)
    assert x.shape == (20000, d)
    torch.testing.assert_close(x.norm(dim=-1), torch.ones(20000, dtype=x.dtype, device=DEVICE))
    angle = (torch.arange(200000, dtype=torch.float64) + 0.5) * (math.pi / 200000)
    density = torch.exp(kappa * (angle.cos() - 1)) * angle.sin() ** (d - 2)
    expected = (density * angle.cos()).sum() / density.sum()
    assert ((x @ mu).mean() - expected.to(DEVICE)).abs() < 0.012
    across = x - (x @ mu)[:, None] * mu
    assert across.mean(0).norm() < 0.03


@pytest.mark.no_interpreter
def test_vmf_3d_is_the_closed_form_and_reflects():
    mu = directions(4, 3, dtype=torch.float64)
    kappa = torch.tensor([0.1, 1.0, 10.0, 500.0], dtype=torch.float64, device=DEVICE)
    x = vmf_sample(mu, kappa, 7, generator=torch.Generator(DEVICE).manual_seed(3))
    g = torch.Generator(DEVICE).manual_seed(3)
    u = torch.rand(4, 7, generator=g, dtype=torch.float64, device=DEVICE)
    w = (
        1
        + torch.logsumexp(torch.stack([u.log(), (1 - u).log() - 2 * kappa[:, None]]), 0)
        / kappa[:, None]
    )
    torch.testing.assert_close((x * mu[:, None]).sum(-1), w)
    pole = torch.tensor([1.0, 0.0, 0.0], device=DEVICE, requires_grad=True)
    at_pole = vmf_sample(pole, 2.0, 5)
    assert torch.isfinite(torch.autograd.grad(at_pole.sum(), pole)[0]).all()


@pytest.mark.no_interpreter
@pytest.mark.parametrize("d", [2, 3, 5])
def test_vmf_at_any_concentration_in_float32(d):
    """|x - mu|^2 / 2 has the mean of 1 - w by quadrature, from uniform to within rounding of mu."""
    mu = torch.zeros(d, device=DEVICE)
    mu[-1] = 1  # exactly of length 1
    for kappa in (1e-12, 1e-8, 1e-3, 1e3, 1e7, 1e12):
        x = vmf_sample(mu, kappa, 4000, generator=torch.Generator(DEVICE).manual_seed(1))
        torch.testing.assert_close(x.norm(dim=-1), torch.ones(4000, device=DEVICE))
        end = min(math.pi, 20 / math.sqrt(kappa))
        angle = (torch.arange(100000, dtype=torch.float64) + 0.5) * (end / 100000)
        height = 2 * (angle / 2).sin().square()
        density = torch.exp(-kappa * height) * angle.sin() ** (d - 2)
        expected = float((density * height).sum() / density.sum())
        found = float((x - mu).double().square().sum(-1).mean()) / 2
        assert abs(found / expected - 1) < 0.06
    for h in (1e-5, 1e-4, 1e-3):  # near the pole of the reflection
        mean = F.normalize(torch.cat([torch.ones(1), h * torch.ones(d - 1)]), dim=0).to(DEVICE)
        assert (vmf_sample(mean, 1e14, 8) - mean).abs().max() < 2e-6


@pytest.mark.no_interpreter
def test_vmf_gradients():
    mu = randn(2, 3, dtype=torch.float64, grad=True)
    kappa = torch.tensor([0.7, 4.0], dtype=torch.float64, device=DEVICE, requires_grad=True)
    f = lambda m, k: vmf_sample(
        F.normalize(m, dim=-1), k, 4, generator=torch.Generator(DEVICE).manual_seed(0)
    )
    assert torch.autograd.gradcheck(f, (mu, kappa))
    wide = randn(2, 5, dtype=torch.float64, grad=True)
    assert torch.autograd.gradcheck(lambda m: f(m, 3.0), (wide,))


@pytest.mark.no_interpreter
def test_self_attention_amortized_projection():
    """The paper's mu by its formula, and its two steps: ascend in the attention, descend in the clouds."""
    module = SelfAttentionProjection(3, 8).double().to(DEVICE)
    x, y = randn(2, 20, 3, dtype=torch.float64, grad=True), randn(2, 30, 3, dtype=torch.float64)
    pooled = []
    for t in (x, y):
        q = (t @ module.query.weight.T).softmax(-1)
        k = (t @ module.key.weight.T).softmax(-2)
        pooled.append((q @ (k.transpose(1, 2) @ (t @ module.value.weight.T))).mean(1))
    mu = module(x, y)
    torch.testing.assert_close(mu, F.normalize((pooled[0] + pooled[1]) / 2, dim=-1))
    theta = vmf_sample(
        module(x.detach(), y), 1.0, 10, generator=torch.Generator(DEVICE).manual_seed(0)
    )
    ascent = sliced_wasserstein(x.detach(), y, theta)
    grads = torch.autograd.grad(ascent.sum(), list(module.parameters()))
    assert all(torch.isfinite(g).all() and g.any() for g in grads)
    pair = sliced_wasserstein(x, y[:, :20], theta.detach(), reduction="sum")
    sorted_ = [(t @ theta.detach().transpose(1, 2)).sort(1).values for t in (x, y[:, :20])]
    torch.testing.assert_close(pair, (sorted_[0] - sorted_[1]).square().sum(1).mean(1))
    with pytest.raises(ValueError, match=r"y: expected shape \(\.\.\., points, 3\)"):
        module(x, y[..., :2])


X, T = torch.rand(2, 5, 3, device=DEVICE), torch.rand(4, 3, device=DEVICE)
BAD = [
    (lambda: sliced_wasserstein([1.0], X, T), TypeError, "x: expected a torch.Tensor"),
    (lambda: sliced_wasserstein(X, X[..., :2], T), ValueError, r"y: expected shape \(2, 'm', 3\)"),
    (lambda: sliced_wasserstein(X, X[:1], T), ValueError, "y: expected shape"),
    (lambda: sliced_wasserstein(X, X, T[:, :2]), ValueError, r"directions: expected shape \(L, 3\)"),
    (lambda: sliced_wasserstein(X, X, T.double()), TypeError, "directions: float64"),
    (lambda: sliced_wasserstein(X, X, T[:0]), ValueError, "directions: expected at least one direction"),
    (lambda: sliced_wasserstein(X, X[:, :0], T), ValueError, "y: expected at least one point"),
    (lambda: sliced_wasserstein(X, X, T, 0.5), ValueError, "p: expected a finite number in"),
    (lambda: sliced_wasserstein(X, X, T, reduction="all"), ValueError, "reduction: expected one of"),
    (lambda: sliced_wasserstein(X, X[:, :4], T, reduction="sum"), ValueError, "reduction: 'sum' needs"),
    (lambda: sliced_wasserstein(X, X, T, x_weights=X[0, 0]), ValueError, "x_weights: expected shape"),
    (lambda: vmf_sample(T[:, :1], 1.0, 3), ValueError, "mu: expected at least 2 coordinates"),
    (lambda: vmf_sample(T, 0.0, 3), ValueError, "kappa: expected a number > 0"),
    (lambda: vmf_sample(T, -T[:, 0], 3), ValueError, "kappa: expected numbers > 0"),
    (lambda: vmf_sample(T, T[0], 3), ValueError, r"kappa: expected shape \(4,\)"),
    (lambda: vmf_sample(T, 1.0, 0), ValueError, "count: expected at least 1"),
    (lambda: vmf_sample(T, 1.0, 1.5), TypeError, "count: expected an int"),
]  # fmt: skip


@pytest.mark.parametrize("call, error, match", BAD, ids=[m for _, _, m in BAD])
def test_bad_input(call, error, match):
    with pytest.raises(error, match=match):
        call()
