"""Core streaming: Sinkhorn between points against the whole matrix in float64, its gradients, its extremes."""

import math
import warnings

import pytest
import torch
from helpers import DEVICE, DTYPES, INTERPRETED, randn, relative_error
from sinkhorn_problems import clouds

import solera
from solera.sinkhorn import sinkhorn, sinkhorn_points, soft_c_transform
from solera.sinkhorn.streaming import points_reference, run_symmetric
from solera.sinkhorn.streaming_apply import COSTS, cost_matrix

NAMES = [*COSTS, "cosine"]


def matrix(x, y, name):
    """The cost matrix as its formula reads."""
    t = x.unsqueeze(-2) - y.unsqueeze(-3)
    if name == "dot":
        return -(x @ y.mT)
    if name == "cosine":
        return (
            1
            - torch.nn.functional.normalize(x, dim=-1) @ torch.nn.functional.normalize(y, dim=-1).mT
        )
    if name == "l1":
        return t.abs().sum(-1)
    square = t.square().sum(-1)
    return {"sqeuclidean": square, "half_sqeuclidean": square / 2, "euclidean": square.sqrt()}[name]


SHAPES = [(1, 1, 1), (9, 5, 2), (70, 131, 3), (37, 70, 12)]


@pytest.mark.parametrize("name", NAMES)
def test_is_the_dense_solve_of_the_cost_matrix(name):
    """`sinkhorn` on the matrix: potentials, value, iterations, error, and all that the plan does."""
    for n, m, d in SHAPES[1:3] if INTERPRETED else SHAPES:
        x, y, a, b = clouds(n, m, d, 2, zeros=n > 1)
        options = {"epsilon": 0.05, "max_iterations": 6}
        ours = sinkhorn_points(x, y, a, b, cost=name, **options)
        dense = sinkhorn(matrix(x, y, name), a, b, **options)
        for part in ("f", "g", "cost", "marginal_error"):
            torch.testing.assert_close(getattr(ours, part), getattr(dense, part), msg=part)
        plan = dense.plan()
        v, w = randn(2, m, 3, dtype=torch.float64), randn(2, n, dtype=torch.float64)
        torch.testing.assert_close(ours.plan(), plan)
        torch.testing.assert_close(ours.apply(v), plan @ v)
        torch.testing.assert_close(ours.apply_transposed(w), (plan * w[..., None]).sum(-2))
        torch.testing.assert_close(ours.marginals(), (plan.sum(-1), plan.sum(-2)))
        torch.testing.assert_close(ours.transport_cost(), dense.transport_cost())
        live = a > 0
        ends = torch.nn.functional.normalize(y, dim=-1) if name == "cosine" else y
        mean = (plan @ ends) / plan.sum(-1, keepdim=True)
        torch.testing.assert_close(ours.barycentric_projection()[live], mean[live])
        if INTERPRETED:
            break


@pytest.mark.parametrize("name", ["sqeuclidean", "euclidean", "l1", "dot"])
def test_float32_is_as_near_as_the_plain_loop(name):
    for n, m, d in SHAPES[2:3] if INTERPRETED else [*SHAPES, (300, 520, 24)]:
        for epsilon in (0.05,) if INTERPRETED else (1e-3, 0.05, 10.0):
            exact = clouds(n, m, d)
            low = [t.float() for t in exact]
            wide = [t.double() for t in low]
            code, rest = COSTS[name], ([epsilon], -1.0, -1.0, 1.0, 5, 0.0, 1)
            ours = sinkhorn_points(
                *low, cost=name, epsilon=epsilon, max_iterations=5, validate=False
            )
            today = points_reference(*low, None, None, code, *rest)
            truth = points_reference(*wide, None, None, code, *rest)
            floor = 2e-6 * max(1.0, epsilon) * max(1.0, d / 8)
            for k, part in enumerate((ours.f, ours.g, ours.cost)):
                assert part.dtype == torch.float32
                error, allowed = ((t - truth[k]).abs().max() for t in (part, today[k]))
                assert error <= max(2 * allowed, floor), (n, m, d, epsilon, k)


@pytest.mark.no_interpreter
def test_wide_strips_take_several_tiles_of_columns():
    """More columns than a strip keeps: sums first, the column sums from a second look."""
    x, y, a, b = clouds(150, 17000, 12, dtype=torch.float32)
    for name in ("half_sqeuclidean", "euclidean"):
        code, rest = COSTS[name], ([0.3], -1.0, -1.0, 1.0, 3, 0.0, 1)
        ours = sinkhorn_points(x, y, a, b, cost=name, epsilon=0.3, max_iterations=3, validate=False)
        truth = points_reference(x, y, a, b, None, None, code, *rest)
        for k, part in enumerate((ours.f, ours.g, ours.cost)):
            torch.testing.assert_close(part, truth[k], rtol=1e-5, atol=2e-6)
        far = (ours.f + 1e3, ours.g - 3e3)  # a bad shift: every strip is done again by its maximum
        again = sinkhorn_points(x, y, a, b, cost=name, epsilon=0.3, max_iterations=3, init=far)
        assert torch.isfinite(again.f).all() and again.marginal_error < 1e-3


@pytest.mark.no_interpreter
def test_a_distance_of_nearly_the_same_points_keeps_its_digits():
    x, _, _, _ = clouds(40, 40, 30, dtype=torch.float32)
    y = x + 1e-4 * torch.rand_like(x)
    r = soft_c_transform(x, y, torch.zeros(40, device=DEVICE), cost="euclidean", epsilon=1e-5)
    truth = torch.linalg.vector_norm((x.double() - y.double()), dim=-1) + 1e-5 * math.log(40)
    torch.testing.assert_close(r.double(), truth, rtol=1e-4, atol=0)


SETTLED = 80 if INTERPRETED else 300


def test_soft_marginals_schedule_momentum_and_start():
    x, y, a, b = clouds(30, 21, 2)
    b = 1.4 * b
    for reach in (0.5, (0.5, None), (None, 0.7), (0.3, 0.9)):
        pair = reach if isinstance(reach, tuple) else (reach, reach)
        rho = [-1.0 if r is None else r**2 for r in pair]
        options = {"epsilon_scaling": [1.0, 0.4], "momentum": 1.3, "max_iterations": 4}
        r = sinkhorn_points(x, y, a, b, epsilon=0.1, reach=reach, **options)
        rest = ([1.0, 0.4, 0.1], *rho, 1.3, 4, 0.0, 1)
        truth = points_reference(x, y, a, b, None, None, 0, *rest)
        for part, exact in zip((r.f, r.g, r.cost, r.marginal_error), (*truth[:3], truth[4])):
            torch.testing.assert_close(part, exact)
        assert r.iterations == 6
        done = sinkhorn_points(x, y, a, b, epsilon=0.1, reach=reach, max_iterations=SETTLED, init=r)
        left, right = done.marginals()  # P 1 = a exp(-f / rho)
        want = a if rho[0] < 0 else a * torch.exp(-done.f / rho[0])
        torch.testing.assert_close(left, want, rtol=1e-6, atol=1e-9)
        want = b if rho[1] < 0 else b * torch.exp(-done.g / rho[1])
        torch.testing.assert_close(right, want, rtol=1e-6, atol=1e-9)
        if INTERPRETED:
            break
    pair = sinkhorn_points(x, y, a, epsilon=0.1, epsilon_scaling=(1.0, 0.5), max_iterations=1)
    number = sinkhorn_points(x, y, a, epsilon=0.1, epsilon_scaling=1, max_iterations=1)
    assert torch.equal(number.f, pair.f)
    assert pair.iterations == 5  # 1, 0.5, 0.25, 0.125 and the target


@pytest.mark.no_interpreter
def test_over_relaxation_takes_fewer_iterations():
    x, y, a, b = clouds(200, 200, 2)
    options = {"epsilon": 2e-3, "max_iterations": 4000, "tolerance": 1e-7}
    plain = sinkhorn_points(x, y, a, b, **options)
    over = sinkhorn_points(x, y, a, b, momentum=1.7, **options)
    assert over.converged and over.iterations < 0.6 * plain.iterations
    torch.testing.assert_close(over.cost, plain.cost, rtol=1e-6, atol=0)


@pytest.mark.no_interpreter
def test_unbalanced_against_pot():
    ot = pytest.importorskip("ot", reason="POT is not installed")
    x, y, a, b = clouds(12, 17, 2)
    r = sinkhorn_points(x, y, a, 1.5 * b, epsilon=0.1, reach=0.8, max_iterations=200)
    plan = ot.unbalanced.sinkhorn_unbalanced(
        a.cpu(), 1.5 * b.cpu(), matrix(x, y, "sqeuclidean").cpu(), 0.1, 0.64, reg_type="kl",
        c=a.cpu()[:, None] * 1.5 * b.cpu()[None], numItermax=5000, stopThr=1e-13,
    )  # fmt: skip
    torch.testing.assert_close(r.plan().cpu(), plan, rtol=1e-6, atol=1e-10)


# ---- gradients ---------------------------------------------------------------------------------------

OUTPUTS = {
    "cost": lambda r: r.cost,
    "f": lambda r: r.f,
    "plan": lambda r: r.plan(),
    "transport_cost": lambda r: r.transport_cost(),
    "apply": lambda r: r.apply(torch.arange(4.0, dtype=torch.float64, device=DEVICE)),
    "projection": lambda r: r.barycentric_projection(),
}


def small(d=2):
    return [randn(*s, dtype=torch.float64, grad=True) for s in ((3, d), (4, d), (3,), (4,))]


@pytest.mark.no_interpreter
@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name):
    for reach in (None, (None, 0.7)):
        for output in OUTPUTS:

            def f(x, y, a, b):
                options = {"epsilon": 0.9, "max_iterations": 150}
                total = 1.0 if reach is None else 1.3
                a, b = a.softmax(-1), total * b.softmax(-1)
                return OUTPUTS[output](
                    sinkhorn_points(x, y, a, b, cost=name, reach=reach, **options)
                )

            assert torch.autograd.gradcheck(f, small(), fast_mode=True)
            if output in ("cost", "f", "projection"):
                assert torch.autograd.gradgradcheck(f, small(), fast_mode=True)


def test_envelope_gradient_is_that_of_the_matrix():
    """Before convergence too, in every dtype; and the implicit one of <P, C>."""
    for name in ("sqeuclidean", "euclidean") if INTERPRETED else NAMES:
        for dtype in DTYPES[:2] if INTERPRETED else DTYPES:
            low = clouds(40, 30, 10, dtype=dtype, grad=True)
            wide = [t.detach().double().requires_grad_() for t in low]
            options = {
                "epsilon": 0.2,
                "max_iterations": 4 if INTERPRETED else 60,
                "validate": False,
            }
            dense = sinkhorn(matrix(*wide[:2], name), *wide[2:], **options)
            r = sinkhorn_points(*low, cost=name, **options)
            want = torch.autograd.grad(dense.cost, wide, retain_graph=True)
            got = torch.autograd.grad(r.cost, low, retain_graph=True)
            allowed = {torch.float64: 1e-9, torch.float32: 2e-5}.get(dtype, 1e-2)
            for u, v in zip(got[:2], want[:2]):
                assert u.dtype == dtype and relative_error(u, v) < allowed, (name, dtype)
            if INTERPRETED:
                continue
            want = torch.autograd.grad(dense.transport_cost(), wide)
            got = torch.autograd.grad(r.transport_cost(), low)
            for u, v in zip(got[:2], want[:2]):
                assert relative_error(u, v) < 50 * allowed, (name, dtype)


@pytest.mark.no_interpreter
def test_a_hessian_vector_product_streams():
    """The cost's, without one tensor of n m elements, and equal to the matrix's."""
    x, y, a, b = clouds(60, 50, 3)
    x.requires_grad_()
    v = randn(60, 3, dtype=torch.float64)
    options = {"epsilon": 0.1, "max_iterations": 200}

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple) else (out,):
                if isinstance(t, torch.Tensor):
                    Largest.seen = max(Largest.seen, t.numel())
            return out

    with Largest():
        value = sinkhorn_points(x, y, a, b, **options).cost
        (dx,) = torch.autograd.grad(value, x, create_graph=True)
        (ours,) = torch.autograd.grad((dx * v).sum(), x)
    assert Largest.seen < 60 * 50
    value = sinkhorn(matrix(x, y, "sqeuclidean"), a, b, **options).cost
    (dx,) = torch.autograd.grad(value, x, create_graph=True)
    (want,) = torch.autograd.grad((dx * v).sum(), x)
    torch.testing.assert_close(ours, want, rtol=1e-6, atol=1e-9)


def test_soft_c_transform():
    x, y, _, b = clouds(13, 9, 3)
    g = randn(9, dtype=torch.float64)
    for name in ("sqeuclidean", "l1"):
        want = -0.3 * torch.logsumexp((g - matrix(x, y, name)) / 0.3 + b.log(), -1)
        torch.testing.assert_close(soft_c_transform(x, y, g, b, cost=name, epsilon=0.3), want)
    leaves = [t.clone().requires_grad_() for t in (x[:3], y[:4], g[:4], b[:4])]
    f = lambda *t: soft_c_transform(*t, cost="sqeuclidean", epsilon=0.8)
    assert torch.autograd.gradcheck(f, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(f, leaves, fast_mode=True)


# ---- stopping, threads, layouts, extremes --------------------------------------------------------------


def test_stopping_is_per_problem():
    x, y, a, b = clouds(24, 24, 2, 3)
    x[1], y[1] = 0.1 * x[1], 0.1 * y[1]  # converges at once
    tolerance = 1e-3 if INTERPRETED else 1e-7
    options = {"epsilon": 0.2, "tolerance": tolerance, "check_every": 2 if INTERPRETED else 4}
    r = sinkhorn_points(x, y, a, b, max_iterations=12 if INTERPRETED else 200, **options)
    assert r.converged.all() and (r.marginal_error <= tolerance).all()
    every = options["check_every"]
    assert (r.iterations % every == 0).all() and r.iterations[1] == every < r.iterations[0]
    with solera.backend("reference"):
        q = sinkhorn_points(x, y, a, b, max_iterations=200, **options)
    assert torch.equal(q.iterations, r.iterations)
    with (
        pytest.warns(UserWarning, match="problems have a marginal error above")
        if (DEVICE == "cpu")
        else warnings.catch_warnings()
    ):
        assert not sinkhorn_points(
            x, y, epsilon=1e-3, max_iterations=2, tolerance=1e-9
        ).converged.any()


@pytest.mark.parametrize("name", ["sqeuclidean", "euclidean"])
def test_same_bits_for_any_thread_count_and_batch(name):
    shape = (40, 50, 12, 2) if INTERPRETED else (400, 700, 12, 2)
    x, y, a, b = clouds(*shape, dtype=torch.float32)
    threads, found = torch.get_num_threads(), []
    options = {"cost": name, "epsilon": 0.05, "max_iterations": 4}
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            leaf = x.clone().requires_grad_()
            r = sinkhorn_points(leaf, y, a, b, **options)
            found.append((r.f, r.g, r.cost, *torch.autograd.grad(r.cost.sum(), leaf)))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(u, v) for u, v in zip(found[0], other))
    alone = sinkhorn_points(x[1], y[1], a[1], b[1], **options)
    assert torch.equal(alone.f, found[0][0][1]) and torch.equal(alone.g, found[0][1][1])


@pytest.mark.no_interpreter
def test_layouts_and_shapes():
    x, y, a, b = clouds(6, 8, 3, 4)
    want = sinkhorn_points(x, y, a, b, epsilon=0.1)
    moved = x.mT.contiguous().mT
    assert torch.equal(sinkhorn_points(moved, y, a, b, epsilon=0.1).f, want.f)
    one = sinkhorn_points(x[0].expand(4, 6, 3), y[0].expand(4, 8, 3), a[0], b[0], epsilon=0.1)
    assert torch.equal(one.f[3], want.f[0])
    nested = [t.reshape(2, 2, *t.shape[1:]) for t in (x, y, a, b)]
    r = sinkhorn_points(*nested, epsilon=0.1)
    assert r.f.shape == (2, 2, 6) and r.plan().shape == (2, 2, 6, 8) and r.cost.shape == (2, 2)
    assert r.apply(torch.rand(2, 2, 8, 5, dtype=torch.float64, device=DEVICE)).shape == (2, 2, 6, 5)
    assert torch.equal(r.f.reshape(4, 6), want.f)
    empty = sinkhorn_points(x[:0], y[:0], epsilon=0.1)
    assert empty.f.shape == (0, 6) and empty.apply(y[:0]).shape == (0, 6, 3)
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(sinkhorn_points(leaf, y, epsilon=0.1).apply(y).sum(), leaf)
    assert torch.isfinite(grad).all()  # a gradient of stride 0


@pytest.mark.no_interpreter
def test_extremes():
    x, y, a, b = clouds(40, 33, 2, zeros=True)
    for epsilon in (1e-4, 1e4):
        for dtype in (torch.float32, torch.float64):
            r = sinkhorn_points(
                *(t.to(dtype) for t in (x, y, a, b)), epsilon=epsilon, max_iterations=20
            )
            assert all(torch.isfinite(t).all() for t in (r.f, r.g, r.cost, r.marginal_error))
    # far from the origin, one point repeated, points of 1e15, a single point
    there = sinkhorn_points(x.float() + 1000, y.float() + 1000, epsilon=0.1)
    here = sinkhorn_points(x, y, epsilon=0.1)
    torch.testing.assert_close(there.cost.double(), here.cost, rtol=1e-3, atol=0)
    same = sinkhorn_points(x[:1].expand(9, 2), x[:1].expand(5, 2), epsilon=0.1)
    torch.testing.assert_close(same.plan(), torch.full_like(same.plan(), 1 / 45))
    big = sinkhorn_points(x.float() * 1e15, y.float() * 1e15, epsilon=1e29, max_iterations=20)
    scaled = sinkhorn_points(x, y, epsilon=0.1, max_iterations=20)
    torch.testing.assert_close(big.f.double() / 1e30, scaled.f, rtol=1e-4, atol=1e-5)
    for name in NAMES:
        assert torch.isfinite(sinkhorn_points(x[:1], x[:1], cost=name, epsilon=0.1).cost)


@pytest.mark.parametrize("bad", ["x", "zero"] if INTERPRETED else ["x", "y", "a", "a nan", "zero"])
def test_a_bad_problem_stays_in_its_batch_item(bad):
    for d in (2,) if INTERPRETED else (2, 12):
        x, y, a, b = clouds(20, 21, d, 3)
        clean = sinkhorn_points(x, y, a, b, epsilon=0.2, max_iterations=5, tolerance=0.5)
        if bad in ("x", "y"):
            {"x": x, "y": y}[bad][1, 3, 1] = math.nan
        elif bad == "zero":
            b[1] = 0.0
        else:
            a[1, 2] = math.nan if bad == "a nan" else -0.1
        with pytest.raises(ValueError, match=r"^(x|y|a|b): expected"):
            sinkhorn_points(x, y, a, b, epsilon=0.2, validate=True)
        for backend in ("auto", "reference"):
            with solera.backend(backend), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                r = sinkhorn_points(
                    x, y, a, b, epsilon=0.2, max_iterations=5, tolerance=0.5, validate=False
                )
            assert r.converged.tolist() == [True, False, True]
            assert r.f[1].isnan().all() and r.g[1].isnan().all() and r.cost[1].isnan()
            torch.testing.assert_close(r.f[[0, 2]], clean.f[[0, 2]])


@pytest.mark.no_interpreter
def test_gradient_choices():
    """Unrolled and implicit agree at convergence, not before; "none" gives constants."""
    x, y, a, b = clouds(6, 5, 2)
    x = x.detach().requires_grad_()

    def slope(gradient, iterations):
        r = sinkhorn_points(x, y, a, b, epsilon=0.3, max_iterations=iterations, gradient=gradient)
        return torch.autograd.grad(r.f[0] + r.transport_cost(), x)[0]

    torch.testing.assert_close(slope("unrolled", 300), slope("auto", 300), rtol=1e-6, atol=1e-9)
    assert relative_error(slope("unrolled", 1), slope("auto", 1)) > 1e-3

    def two(x):
        r = sinkhorn_points(x, y, a, b, epsilon=0.3, max_iterations=2, gradient="unrolled")
        return r.cost + r.f[1]

    assert torch.autograd.gradcheck(two, x)
    assert not sinkhorn_points(x, y, epsilon=0.3, gradient="none").plan().requires_grad


def test_symmetric_updates():
    x, y, a, b = clouds(15, 11, 2, 2)
    epsilons = [1.0, 1.0, 0.3, 0.1]
    for rho in (-1.0, 0.5):
        c, f, g, h = (
            cost_matrix(x, y, 0),
            torch.zeros_like(a),
            torch.zeros_like(b),
            torch.zeros_like(a),
        )
        for k, e in enumerate(epsilons):
            damp, keep = 1.0 if rho < 0 else 1 / (1 + e / rho), 0.0 if k == 0 else 0.5
            lse = lambda c, g, b: (
                -damp * e * torch.logsumexp((g[:, None] - c) / e + b.log()[:, None], -1)
            )
            f, g = (
                keep * f + (1 - keep) * lse(c, g, b),
                keep * g + (1 - keep) * lse(c.mT, f, a),
            )
            h = keep * h + (1 - keep) * lse(cost_matrix(x, x, 0), h, a)
        ours = run_symmetric(x, y, a, b, 0, epsilons, rho)
        torch.testing.assert_close(ours, (f, g))
        torch.testing.assert_close(run_symmetric(x, None, a, None, 0, epsilons, rho)[0], h)
