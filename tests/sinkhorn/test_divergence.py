"""Sinkhorn divergences and SamplesLoss: against the matrix form, and against geomloss."""

import copy
import pickle

import pytest
import torch
from helpers import DEVICE, INTERPRETED, relative_error

from solera.nn import SamplesLoss
from solera.sinkhorn import sinkhorn, sinkhorn_divergence


def clouds(n, m, d, *batch, dtype=torch.float64):
    x, y = torch.rand(*batch, n, d, dtype=dtype), 0.7 * torch.rand(*batch, m, d, dtype=dtype) + 0.2
    a, b = (torch.rand(*batch, k, dtype=dtype) + 0.1 for k in (n, m))
    a, b = a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)
    return [t.to(DEVICE).requires_grad_() for t in (x, y, a, b)]


@pytest.mark.no_interpreter
def test_divergence_is_the_three_values():
    x, y, a, b = clouds(14, 11, 2)
    options = {"epsilon": 0.1, "max_iterations": 60}
    terms = [
        sinkhorn(torch.cdist(p, q).square(), v, w, epsilon=0.1, max_iterations=300).cost
        for p, q, v, w in ((x, y, a, b), (x, x, a, a), (y, y, b, b))
    ]
    want = terms[0] - 0.5 * (terms[1] + terms[2])
    ours = sinkhorn_divergence(x, y, a, b, **options)
    torch.testing.assert_close(ours, want, rtol=1e-7, atol=1e-10)
    got = torch.autograd.grad(ours, (x, y))
    for u, v in zip(got, torch.autograd.grad(want, (x, y))):
        assert relative_error(u, v) < 1e-5
    assert sinkhorn_divergence(x, x, a, a, **options).abs() < 1e-8
    raw = sinkhorn_divergence(x, y, a, b, debias=False, **options)
    torch.testing.assert_close(raw, terms[0], rtol=1e-7, atol=1e-10)


@pytest.mark.no_interpreter
def test_divergence_gradients_and_masses():
    x, y, a, b = (t.detach()[..., :4] if t.dim() == 1 else t.detach()[:4] for t in clouds(9, 9, 2))
    for reach in (None, 0.6):

        def f(x, y, a, b):
            a, b = a.softmax(-1), (1.0 if reach is None else 1.5) * b.softmax(-1)
            return sinkhorn_divergence(x, y, a, b, epsilon=0.4, max_iterations=80, reach=reach)

        leaves = [t.clone().requires_grad_() for t in (x, y, a, b)]
        assert torch.autograd.gradcheck(f, leaves, fast_mode=True)
        assert torch.autograd.gradgradcheck(f, leaves, fast_mode=True)
    same = sinkhorn_divergence(x, x, 3 * a, 3 * a, epsilon=0.4, reach=0.6)
    assert same.abs() < 1e-8
    with pytest.raises(TypeError, match="reach: expected None or one number"):
        sinkhorn_divergence(x, y, epsilon=0.1, reach=(None, 1.0))


@pytest.mark.no_interpreter
@pytest.mark.parametrize("reach", [None, 0.6])
def test_divergence_under_torch_func(reach):
    x, y, a, b = (t.detach() for t in clouds(5, 4, 2))
    f = lambda x, a: sinkhorn_divergence(
        x, y, a.softmax(-1), b, epsilon=0.4, max_iterations=80, reach=reach
    )
    want = torch.autograd.functional.jacobian(f, (x, a))
    for got, exact in zip(torch.func.grad(f, argnums=(0, 1))(x, a), want):
        assert relative_error(got, exact) < 1e-7
    v = torch.rand_like(x)
    _, slope = torch.func.jvp(lambda x: f(x, a), (x,), (v,))
    assert relative_error(slope, (want[0] * v).sum()) < 1e-7
    both = torch.func.vmap(f, in_dims=(0, None))(torch.stack([x, x + 0.1]), a)
    torch.testing.assert_close(both[1], f(x + 0.1, a), rtol=1e-9, atol=1e-12)


CASES = [
    {"p": 2, "reach": None, "debias": True},
    {"p": 2, "reach": 0.5, "debias": True},
    {"p": 2, "reach": 0.5, "debias": False},
    {"p": 1, "reach": None, "debias": False},
    {"p": 1, "reach": 0.5, "debias": False},
    {"p": 1, "reach": None, "debias": True},
]


@pytest.mark.parametrize("case", CASES[:1] if INTERPRETED else CASES, ids=str)
def test_samples_loss_is_geomloss(case):
    geomloss = pytest.importorskip("geomloss", reason="geomloss is not installed")
    options = {"blur": 0.1, "scaling": 0.6, **case}
    # At p = 1 geomloss gives a point a distance of 1e-4 to itself.
    rough = 1e-3 if case["p"] == 1 and case["debias"] else 1e-10
    for shape in ((20, 17, 2),) if INTERPRETED else ((60, 50, 2), (60, 50, 12), (20, 30, 3, 4)):
        x, y, a, b = clouds(*shape)
        ours = SamplesLoss("sinkhorn", **options)(a, x, b, y)
        theirs = geomloss.SamplesLoss("sinkhorn", backend="tensorized", **options)(a, x, b, y)
        torch.testing.assert_close(ours, theirs, rtol=rough, atol=0)
        got = torch.autograd.grad(ours.sum(), (x, y, a, b))
        want = torch.autograd.grad(theirs.sum(), (x, y, a, b))
        factor = 1.0
        if case["reach"] is not None:  # what geomloss's gradient to the points lacks
            rho, epsilon = case["reach"] ** case["p"], 0.1 ** case["p"]
            factor = (rho + epsilon) / (rho + epsilon / 2)
        for k, (u, v) in enumerate(zip(got, want)):
            assert relative_error(u, v * factor if k < 2 else v) < rough, k
        ours = SamplesLoss(potentials=True, **options)(a, x, b, y)
        theirs = geomloss.SamplesLoss(potentials=True, backend="tensorized", **options)(a, x, b, y)
        for u, v in zip(ours, theirs):
            torch.testing.assert_close(u, v.reshape(u.shape), rtol=0, atol=rough)
        low = [t.detach().float() for t in (a, x, b, y)]
        value = SamplesLoss("sinkhorn", **options)(*low)
        exact = SamplesLoss("sinkhorn", **options)(*(t.double() for t in low))
        torch.testing.assert_close(value.double(), exact, rtol=1e-4, atol=2e-6)


@pytest.mark.no_interpreter
def test_soft_gradient_is_the_values_slope():
    """Where geomloss differs: the gradient with `reach`, against differences of the converged value."""
    x, y, a, b = (t.detach() for t in clouds(7, 6, 2))
    loss = SamplesLoss(p=2, blur=0.4, reach=0.7, scaling=0.97, debias=False)
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(a, leaf, b, y), leaf)
    loss.diameter = 1.5
    step = torch.zeros_like(x)
    step[2, 1] = 1e-4
    slope = (loss(a, x + step, b, y) - loss(a, x - step, b, y)) / 2e-4
    torch.testing.assert_close(grad[2, 1], slope, rtol=2e-3, atol=1e-7)


@pytest.mark.no_interpreter
def test_call_forms_and_module():
    x, y, a, b = (t.detach() for t in clouds(8, 9, 2, 3))
    loss = SamplesLoss(blur=0.2)
    uniform = [torch.full(t.shape, 1 / t.shape[-1], dtype=t.dtype, device=DEVICE) for t in (a, b)]
    batch = loss(x, y)
    assert batch.shape == (3,)
    torch.testing.assert_close(loss(uniform[0], x, uniform[1], y), batch)
    torch.testing.assert_close(loss(uniform[0][..., None], x, uniform[1][..., None], y), batch)
    loss.diameter = 2.0
    torch.testing.assert_close(loss(x[1], y[1]), loss(x, y)[1])
    assert loss(x[1], y[1]).shape == ()
    assert "blur=0.2" in repr(loss) and not list(loss.parameters())
    for other in (pickle.loads(pickle.dumps(loss)), copy.deepcopy(loss)):
        assert torch.equal(other(x, y), loss(x, y))
    with pytest.raises(ValueError, match="loss: expected one of"):
        SamplesLoss("energy")
    with pytest.raises(ValueError, match="scaling: expected a number in"):
        SamplesLoss(scaling=1.0)
    with pytest.raises(ValueError, match="blur: expected a number > 0"):
        SamplesLoss(blur=0.0)
    with pytest.raises(ValueError, match="SamplesLoss: expected"):
        loss(x)
    with pytest.raises(ValueError, match="x, y: expected"):
        loss(x, y[0])
    with pytest.raises(ValueError, match="a: expected shape"):
        loss(a[:, :3], x, b, y)


def test_distances_between_points_without_weight():
    """Their density is bounded by nothing, and over a small distance it overflows; their gradients are 0."""
    for dtype in (torch.float32, torch.float64):
        x, y, a, b = (t.detach().to(dtype) for t in clouds(6, 5, 2))
        a[1:] = 0
        a[0] = 1
        x = (1e-3 * x).requires_grad_()
        value = sinkhorn_divergence(x, 1e-3 * y, a, b, cost="euclidean", epsilon=1e-6)
        (grad,) = torch.autograd.grad(value, x)
        assert torch.isfinite(grad).all() and not grad[1:].any() and grad[0].any()
