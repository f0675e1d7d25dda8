"""Core dense: what a result offers, the choice of gradients, the linear solve behind them."""

import pytest
import torch
from helpers import DEVICE, INTERPRETED, relative_error
from sinkhorn_problems import problem

import solera
from solera.sinkhorn import _adjoint, sinkhorn

CONVERGED = {"epsilon": 0.3, "max_iterations": 300}


def test_apply_marginals_and_projection():
    cost, a, b = problem(2, 6, 9, dtype=torch.float64, zeros=True)
    r = sinkhorn(cost, a, b, epsilon=0.1)
    plan = r.plan()
    for v in (torch.rand(9), torch.rand(2, 9), torch.rand(9, 3), torch.rand(2, 9, 3)):
        v = v.double().to(DEVICE)
        vector = v.shape in ((9,), (2, 9))
        want = (
            (plan @ v.unsqueeze(-1)).squeeze(-1)
            if v.dim() == 1
            else plan @ v
            if not vector
            else None
        )
        want = torch.einsum("bij,bj->bi", plan, v) if want is None else want
        torch.testing.assert_close(r.apply(v), want)
    w = torch.rand(2, 6, dtype=torch.float64, device=DEVICE)
    torch.testing.assert_close(r.apply_transposed(w), torch.einsum("bij,bi->bj", plan, w))
    for got, want in zip(r.marginals(), (plan.sum(-1), plan.sum(-2))):
        torch.testing.assert_close(got, want)
    y = torch.rand(9, 2, dtype=torch.float64, device=DEVICE)
    moved = r.barycentric_projection(y)
    some = a > 0
    torch.testing.assert_close(moved[some], (plan @ y / plan.sum(-1, keepdim=True))[some])
    assert not moved[~some].any()
    torch.testing.assert_close(
        sinkhorn(cost[0], epsilon=1e-3).apply(y[:, 0]).shape, torch.Size([6])
    )


def test_gradients_of_apply_and_projection():
    cost, a, b = problem(4, 3, dtype=torch.float64, grad=True)
    v = torch.rand(3, 2, dtype=torch.float64, device=DEVICE, requires_grad=True)

    def f(cost, v):
        iterations = 40 if INTERPRETED else 100
        r = sinkhorn(cost, a.detach(), b.detach(), epsilon=0.4, max_iterations=iterations)
        return r.apply(v), r.barycentric_projection(v), *r.marginals()

    assert torch.autograd.gradcheck(f, (cost, v), fast_mode=True)


@pytest.mark.parametrize(
    "call, error, match",
    [
        (lambda r: r.apply(torch.rand(3)), ValueError, r"v: expected shape \(4,\) or \(4, 'd'\)"),
        (lambda r: r.apply([1.0]), TypeError, "v: expected a torch.Tensor"),
        (lambda r: r.apply_transposed(torch.rand(4)), ValueError, r"v: expected shape \(3,\)"),
        (lambda r: r.apply(torch.rand(4).double()), TypeError, "v: float64 with the plan"),
        (lambda r: r.barycentric_projection(torch.rand(3, 2)), ValueError, r"y: expected shape \(4, 'd'\)"),
    ],
)  # fmt: skip
def test_bad_vectors(call, error, match):
    with pytest.raises(error, match=match):
        call(sinkhorn(torch.rand(3, 4), epsilon=1))


def total(r):
    return r.cost.sum() + r.f.square().sum() + r.plan().square().sum()


@pytest.mark.no_interpreter
@pytest.mark.parametrize("rho", [None, 0.5, (None, 1.0)], ids=str)
def test_unrolled_gradients_agree_at_convergence(rho):
    tensors = problem(5, 7, dtype=torch.float64, grad=True)
    grads = []
    for gradient in ("auto", "unrolled"):
        r = sinkhorn(*tensors, gradient=gradient, rho=rho, epsilon_scaling=1.0, **CONVERGED)
        grads.append(torch.autograd.grad(total(r), tensors))
    for k, (x, y) in enumerate(zip(*grads)):
        if k and rho is None:  # along the simplex: up to a constant
            x, y = x - x.mean(), y - y.mean()
        torch.testing.assert_close(x, y, rtol=1e-7, atol=1e-9)
    assert not sinkhorn(*tensors, gradient="none", **CONVERGED).plan().requires_grad


@pytest.mark.no_interpreter
@pytest.mark.parametrize("rho", [None, 0.5], ids=str)
def test_hessian_vector_products_of_the_value(rho):
    """Against autograd of the unrolled loop at convergence, and against differences of the gradient."""
    (cost, a, b), direction = (
        problem(5, 6, dtype=torch.float64),
        torch.rand(5, 6, dtype=torch.float64),
    )
    direction = direction.to(DEVICE)
    products = []
    for gradient in ("auto", "unrolled"):
        c = cost.clone().requires_grad_()
        value = sinkhorn(c, a, b, gradient=gradient, rho=rho, **CONVERGED).cost
        (slope,) = torch.autograd.grad(value, c, create_graph=True)
        products.append(torch.autograd.grad((slope * direction).sum(), c)[0])
    torch.testing.assert_close(*products, rtol=1e-7, atol=1e-10)
    step = 1e-5
    ends = [
        sinkhorn(cost + s * direction, a, b, rho=rho, **CONVERGED).plan() for s in (step, -step)
    ]
    torch.testing.assert_close(products[0], (ends[0] - ends[1]) / (2 * step), rtol=1e-5, atol=1e-8)


@pytest.mark.no_interpreter
def test_create_graph_does_not_change_the_first_gradient():
    """The plan depends on its potentials, which depend on its cost: each path counts once."""
    cost, a, b = problem(6, 4, dtype=torch.float64, grad=True)
    for loss in (total, lambda r: r.transport_cost(), lambda r: r.apply(b.detach()).square().sum()):
        r = sinkhorn(cost, a, b, **CONVERGED)
        first = torch.autograd.grad(loss(r), (cost, a, b), retain_graph=True)
        again = torch.autograd.grad(loss(r), (cost, a, b), create_graph=True)
        torch.testing.assert_close(again, first)


@pytest.mark.no_interpreter
@pytest.mark.parametrize("rho", [None, 0.5, (0.3, None)], ids=str)
@pytest.mark.parametrize("shape", [(20, 30), (2, 30, 20)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_conjugate_gradients_agree_with_the_factorisation(monkeypatch, dtype, shape, rho):
    tensors = problem(*shape, dtype=dtype, zeros=True, grad=True)
    loss = lambda r: r.f.square().sum() + (r.plan() * 30).square().sum()
    r = sinkhorn(*tensors, epsilon=0.1, rho=rho, max_iterations=400)
    dense = torch.autograd.grad(loss(r), tensors, retain_graph=True)
    monkeypatch.setattr(_adjoint, "DENSE", 1)
    calls = []
    solve = _adjoint.conjugate_gradients
    monkeypatch.setattr(
        _adjoint, "conjugate_gradients", lambda *args: calls.append(1) or solve(*args)
    )
    free = torch.autograd.grad(loss(r), tensors, retain_graph=True)
    assert calls
    for k, (x, y) in enumerate(zip(free, dense)):
        if k and rho is None:
            x, y = x - x.mean(-1, keepdim=True), y - y.mean(-1, keepdim=True)
        assert relative_error(x, y) < (1e-9 if dtype == torch.float64 else 2e-5)
    # Too few steps: the factorisation takes over, and the gradient is the same.
    monkeypatch.setattr(_adjoint, "STEPS", 1)
    for x, y in zip(torch.autograd.grad(loss(r), tensors), dense):
        assert torch.equal(x, y)


def test_conjugate_gradients():
    matrix = torch.randn(3, 12, 12, dtype=torch.float64, device=DEVICE)
    matrix = matrix @ matrix.mT + torch.eye(12, dtype=torch.float64, device=DEVICE)
    right = torch.randn(3, 12, dtype=torch.float64, device=DEVICE)
    right[1] = 0
    right[2] *= 1e-200
    product = lambda z: (matrix @ z.unsqueeze(-1)).squeeze(-1)
    x, good = _adjoint.conjugate_gradients(product, right, 1e-12, 60)
    assert good.all() and not x[1].any()
    size = right.abs().amax(-1, keepdim=True).clamp(min=1e-300)
    torch.testing.assert_close(product(x) / size, right / size, rtol=1e-9, atol=1e-9)
    assert _adjoint.conjugate_gradients(product, right, 1e-12, 1)[1].tolist() == [
        False,
        True,
        False,
    ]


@pytest.mark.no_interpreter
def test_large_solve_forms_no_second_matrix(monkeypatch):
    """Beyond DENSE unknowns no m x m system and no factorisation."""
    cost = torch.rand(200, 300, requires_grad=True)

    def refuse(*_):
        raise AssertionError("factorised")

    monkeypatch.setattr(torch.linalg, "cholesky_ex", refuse)
    r = sinkhorn(cost, epsilon=0.05, max_iterations=200)
    (got,) = torch.autograd.grad(r.transport_cost(), cost)
    wide = cost.detach().double().requires_grad_()
    q = sinkhorn(wide, epsilon=0.05, max_iterations=400)
    (want,) = torch.autograd.grad(q.transport_cost(), wide)
    assert relative_error(got, want) < 2e-5


# ---- extremes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("epsilon", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("shape", [(1, 1), (300, 2), (2, 300), (12, 12)], ids=str)
def test_finite_in_the_whole_range_of_epsilon(shape, epsilon):
    """Repeated points, zero weights, one point, far more rows than columns: numbers, and gradients that are."""
    cost, a, b = problem(*shape, zeros=min(shape) > 2)
    if shape[0] > 3:
        cost[1], cost[:, -1] = cost[0], cost[:, 0]
    tensors = [t.requires_grad_() for t in (cost, a, b)]
    for options in ({}, {"momentum": 1.9}, {"epsilon_scaling": (2.0 * epsilon, 0.5)}):
        r = sinkhorn(*tensors, epsilon=epsilon, max_iterations=20, **options)
        grads = torch.autograd.grad(r.cost + r.transport_cost(), tensors)
        for t in (r.f, r.g, r.cost, r.plan(), *grads):
            assert torch.isfinite(t).all()
    with solera.backend("reference"):
        q = sinkhorn(*tensors, epsilon=epsilon, max_iterations=20, **options)
    torch.testing.assert_close(q.cost, r.cost, rtol=1e-4, atol=1e-6 * epsilon)


@pytest.mark.no_interpreter
@pytest.mark.parametrize("method", ("apply", "barycentric_projection"))
def test_compile_with_a_constant(method):
    """Its size is a number where the plan's is a symbol."""
    f = lambda cost: getattr(sinkhorn(cost, epsilon=0.3), method)(torch.ones(5, 3, device=DEVICE))
    cost = torch.rand(2, 6, 5, device=DEVICE)
    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    torch.testing.assert_close(compiled(cost), f(cost))


@pytest.mark.no_interpreter
@pytest.mark.parametrize("iterations", (1, 3))
def test_gradients_of_potentials_far_from_the_solution_are_numbers(iterations):
    """Massless rows and columns at a small epsilon: densities that would overflow."""
    for n, m, epsilon in ((4, 5, 1e-3), (3, 6, 1e-3), (4, 4, 1e-6), (6, 2, 1e-4)):
        for _ in range(10):
            tensors = [t.requires_grad_() for t in problem(n, m)]
            with torch.no_grad():
                tensors[1][1], tensors[2][0] = 0, 0
                for t in tensors[1:]:
                    t /= t.sum()
            r = sinkhorn(*tensors, epsilon=epsilon, max_iterations=iterations)
            grads = torch.autograd.grad(
                (r.f * torch.randn(n, device=DEVICE)).sum()
                + (r.g * torch.randn(m, device=DEVICE)).sum(),
                tensors,
            )
            assert all(torch.isfinite(t).all() for t in grads)
