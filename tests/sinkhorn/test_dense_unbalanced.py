"""Core dense with penalised marginals, over-relaxation and a schedule of epsilons."""

import math
import warnings

import pytest
import torch
from helpers import DEVICE, INTERPRETED, relative_error
from hypothesis import given
from hypothesis import strategies as st
from sinkhorn_problems import problem

import solera
from solera.sinkhorn import sinkhorn
from solera.sinkhorn.dense_reference import relaxation_range

INF = math.inf
# Both sides soft, one, the other, unequal; rho far below and far above epsilon.
RHOS = [0.5, (0.3, None), (None, 2.0), (0.01, 50.0)]
SHAPES = [(5, 7), (131, 37), (3, 2100)]
DTYPES = [torch.float64]
if not INTERPRETED:
    SHAPES += [(1, 1), (2, 9, 1), (300, 520)]
    DTYPES += [torch.float32]


def masses(*shape, dtype=torch.float64, grad=False, zeros=False):
    """A problem whose totals are neither equal nor 1."""
    cost, a, b = problem(*shape, dtype=dtype, zeros=zeros)
    return [t.requires_grad_(grad) for t in (cost, 1.7 * a, 0.6 * b)]


def pair(rho):
    return rho if isinstance(rho, tuple) else (rho, rho)


def loop(cost, a, b, epsilon, rho, iterations, momentum=1.0):
    """The damped, over-relaxed iteration written down directly; its last iteration is plain."""
    ra, rb = (INF if r is None else r for r in pair(rho))
    f, g = torch.zeros_like(a), torch.zeros_like(b)
    la, lb = (1.0 if r == INF else r / (r + epsilon) for r in (ra, rb))

    def step(old, exact, scale, rho, w):
        level = (old - exact) / (epsilon * scale)
        low, high = relaxation_range(epsilon, None if rho == INF else rho, momentum)
        return torch.where((level >= low) & (level <= high), old + w * (exact - old), exact)

    for k in range(iterations):
        w = 1.0 if k + 1 == iterations else momentum
        t = (g[..., None, :] - cost) / epsilon + b.log()[..., None, :]
        f = step(f, -la * epsilon * torch.logsumexp(t, -1), la, ra, w)
        t = (f[..., :, None] - cost) / epsilon + a.log()[..., None]
        g = step(g, -lb * epsilon * torch.logsumexp(t, -2), lb, rb, w)
    e = ((f[..., :, None] + g[..., None, :] - cost) / epsilon).exp()
    phi = lambda x, r: x if r == INF else -r * torch.expm1(-x / r)
    value = (a * phi(f, ra)).sum(-1) + (b * phi(g, rb)).sum(-1)
    plan = a[..., None] * b[..., None, :] * e
    value = value - epsilon * (plan.sum((-1, -2)) - a.sum(-1) * b.sum(-1))
    wanted = a if ra == INF else a * (-f / ra).exp()
    return f, g, value, plan, (plan.sum(-1) - wanted).abs().sum(-1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("momentum", [1.5] if INTERPRETED else [1.0, 1.5])
@pytest.mark.parametrize("rho", RHOS[1:2] if INTERPRETED else RHOS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_iterates_against_float64(shape, rho, momentum, dtype):
    cost, a, b = masses(*shape, dtype=dtype, zeros=min(shape) > 4)
    options = {"epsilon": 0.05, "max_iterations": 6, "rho": rho, "momentum": momentum}
    truth = loop(*(t.double() for t in (cost, a, b)), 0.05, rho, 6, momentum)
    unit = 200 * torch.finfo(dtype).eps
    for backend in ("auto", "reference"):
        with solera.backend(backend):
            r = sinkhorn(cost, a, b, **options)
        for name, x, y in zip("f g cost plan".split(), (r.f, r.g, r.cost, r.plan()), truth):
            assert x.dtype == dtype
            assert relative_error(x, y) < unit, name
        torch.testing.assert_close(r.marginal_error.double(), truth[4], rtol=1e-3, atol=unit)


@pytest.mark.no_interpreter
@pytest.mark.parametrize("rho", [0.5, (0.3, None), (None, 2.0)], ids=str)
def test_against_pot(rho):
    """POT's KL(P | a b^T) is reg_type="kl" with c left out; reg_m is rho, inf for a hard side."""
    ot = pytest.importorskip("ot", reason="POT is not installed")
    cost, a, b = masses(12, 17)
    if rho != 0.5:
        a, b = a / a.sum(), b / b.sum()
    r = sinkhorn(cost, a, b, epsilon=0.1, rho=rho, max_iterations=3000, tolerance=1e-13)
    assert r.converged
    reg_m = tuple(INF if x is None else x for x in pair(rho))
    plan = ot.unbalanced.sinkhorn_stabilized_unbalanced(
        a.cpu(), b.cpu(), cost.cpu(), 0.1, reg_m, reg_type="kl", numItermax=20000, stopThr=1e-15
    )
    torch.testing.assert_close(r.plan().cpu(), plan, rtol=1e-7, atol=1e-12)
    kl = lambda p, q: (p * (p / q).log() - p + q).sum()
    primal = (plan * cost.cpu()).sum() + 0.1 * kl(plan, a.cpu()[:, None] * b.cpu())
    for penalty, got, want in zip(reg_m, (plan.sum(1), plan.sum(0)), (a.cpu(), b.cpu())):
        primal = primal + (0.0 if penalty == INF else penalty * kl(got, want))
    torch.testing.assert_close(r.cost.cpu(), primal)


@pytest.mark.no_interpreter
def test_limits_of_rho():
    """A large rho is the balanced problem; a small one lets the mass go wherever it costs nothing."""
    cost, a, b = problem(9, 11, dtype=torch.float64)
    hard = sinkhorn(cost, a, b, epsilon=0.2, max_iterations=400)
    soft = sinkhorn(cost, a, b, epsilon=0.2, rho=1e7, max_iterations=400)
    torch.testing.assert_close(soft.plan(), hard.plan(), rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(soft.cost, hard.cost, rtol=1e-5, atol=0)
    same = sinkhorn(cost, a, b, epsilon=0.2, rho=(INF, None), max_iterations=400)
    assert torch.equal(same.plan(), hard.plan())
    free = sinkhorn(cost, a, b, epsilon=0.2, rho=1e-9, max_iterations=50)
    torch.testing.assert_close(free.plan(), a[:, None] * b * (-cost / 0.2).exp(), rtol=1e-6, atol=0)


@pytest.mark.no_interpreter
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("rho", [1e-3, 1.0, 1e3])
def test_never_nan_from_finite_input(scale, rho):
    cost, a, b = masses(30, 17, zeros=True)
    cost[3] = cost[4]
    for dtype in (torch.float64, torch.float32):
        low = [t.to(dtype) for t in (cost, a, b)]
        for w in (1.0, 1.9):
            r = sinkhorn(*low, epsilon=scale, rho=rho, max_iterations=20, momentum=w)
            assert (
                torch.isfinite(r.f).all() and torch.isfinite(r.g).all() and torch.isfinite(r.cost)
            )
            assert torch.isfinite(r.plan()).all()


# ---- gradients ---------------------------------------------------------------------------------------

OUTPUTS = {
    "cost": lambda r: r.cost,
    "f": lambda r: r.f,
    "g": lambda r: r.g,
    "plan": lambda r: r.plan(),
    "all": lambda r: (r.f * r.f).sum() + r.g.cos().sum() + r.cost.sum() + r.plan().square().sum(),
}


@pytest.mark.no_interpreter
@pytest.mark.parametrize("rho", [0.5, (0.3, None), (None, 2.0)], ids=str)
@pytest.mark.parametrize("output", list(OUTPUTS))
def test_gradcheck(output, rho):
    """In every direction: the totals of a and b are free, unless both sides are hard."""

    def f(cost, a, b):
        r = sinkhorn(
            cost, a.exp(), b.exp(), epsilon=0.3, rho=rho, max_iterations=150, validate=False
        )
        return OUTPUTS[output](r)

    for shape in ((3, 4), (2, 4, 3)):
        tensors = [t.log() if k else t for k, t in enumerate(masses(*shape))]
        tensors = [t.detach().requires_grad_() for t in tensors]
        assert torch.autograd.gradcheck(f, tensors, fast_mode=True)
    if shape == (2, 4, 3) and output in ("all", "cost"):
        assert torch.autograd.gradgradcheck(f, [t[0] for t in tensors], fast_mode=True)


# ---- momentum ----------------------------------------------------------------------------------------


@pytest.mark.no_interpreter
def test_momentum_takes_fewer_iterations_to_the_same_solution():
    cost, a, b = problem(40, 30, dtype=torch.float64)
    options = {"epsilon": 0.01, "tolerance": 1e-8, "max_iterations": 3000}
    plain = sinkhorn(cost, a, b, **options)
    fast = sinkhorn(cost, a, b, momentum=1.7, **options)
    assert plain.converged and fast.converged
    assert 2 * fast.iterations < plain.iterations
    torch.testing.assert_close(fast.f, plain.f, rtol=0, atol=1e-6)
    # What is returned came from a plain iteration: its columns are met.
    torch.testing.assert_close(fast.plan().sum(0), b, rtol=1e-12, atol=0)


@pytest.mark.no_interpreter
@pytest.mark.parametrize(
    "epsilon, rho", [(0.3, None), (0.3, 0.1), (0.05, 3.0), (1e-3, None), (1.0, 1e-3)]
)
def test_the_step_that_is_taken_does_not_lower_the_dual_value(epsilon, rho):
    """The range of levels that `relaxation_range` allows, on the dual value itself."""
    w = 1.8
    low, high = relaxation_range(epsilon, rho, w)
    assert low < 0 < high
    level = torch.linspace(low, min(high, 30.0), 201, dtype=torch.float64)
    weight, f = torch.ones(()), 0.37 * torch.ones(201, dtype=torch.float64)
    asked = torch.ones_like(f) if rho is None else (-f / rho).exp()
    s = asked * level.exp()  # sum_j b_j E_ij
    scale = 1.0 if rho is None else rho / (rho + epsilon)
    move = -epsilon * scale * w * level

    def dual(x):
        phi = x if rho is None else -rho * torch.expm1(-x / rho)
        return weight * (phi - epsilon * s * ((x - f) / epsilon).exp())

    assert (dual(f + move) - dual(f) >= -1e-9 * (1 + asked)).all()


@pytest.mark.no_interpreter
def test_momentum_stays_finite_far_from_the_solution():
    cost, a, b = problem(20, 20, dtype=torch.float64)
    far = (1e3 * torch.randn(20, dtype=torch.float64, device=DEVICE), torch.zeros_like(b))
    r = sinkhorn(
        cost, a, b, epsilon=0.05, momentum=1.95, max_iterations=2000, tolerance=1e-6, init=far
    )
    assert r.converged


# ---- schedule ----------------------------------------------------------------------------------------


def test_epsilon_scaling_is_the_documented_schedule():
    cost, a, b = problem(2, 20, 30, dtype=torch.float64)
    r = sinkhorn(cost, a, b, epsilon=0.02, epsilon_scaling=(1.0, 0.25), max_iterations=8)
    init = None
    for larger in (1.0, 0.25, 0.0625):
        init = sinkhorn(cost, a, b, epsilon=larger, max_iterations=1, init=init)
    same = sinkhorn(cost, a, b, epsilon=0.02, max_iterations=5, init=init)
    assert torch.equal(r.f, same.f) and torch.equal(r.cost, same.cost)
    assert (r.iterations == 8).all()
    half = sinkhorn(cost, a, b, epsilon=0.3, epsilon_scaling=1.0, max_iterations=20)
    again = sinkhorn(cost, a, b, epsilon=0.3, epsilon_scaling=(1.0, 0.5), max_iterations=20)
    assert torch.equal(half.f, again.f)
    listed = sinkhorn(cost, a, b, epsilon=0.3, epsilon_scaling=[1.0, 0.5], max_iterations=20)
    assert torch.equal(listed.f, half.f)
    none = sinkhorn(cost, a, b, epsilon=0.3, epsilon_scaling=0.2, max_iterations=20)
    assert torch.equal(none.f, sinkhorn(cost, a, b, epsilon=0.3, max_iterations=20).f)


@pytest.mark.no_interpreter
def test_epsilon_scaling_helps_where_epsilon_is_small():
    x, y = (torch.rand(60, 2, dtype=torch.float64, device=DEVICE) for _ in range(2))
    cost = torch.cdist(x, y).square()
    options = {"epsilon": 1e-3, "max_iterations": 60}
    plain = sinkhorn(cost, **options)
    scaled = sinkhorn(cost, epsilon_scaling=(1.0, 0.8), **options)
    assert scaled.marginal_error < 0.5 * plain.marginal_error


# ---- arguments ---------------------------------------------------------------------------------------

C = torch.rand(2, 3, 4, device=DEVICE)
W = torch.full((2, 3), 1 / 3, device=DEVICE)
BAD = [
    ({"rho": 0.0}, ValueError, "rho: expected None or a number > 0, got 0.0"),
    ({"rho": (1.0, -1.0)}, ValueError, "rho: expected None or a number > 0"),
    ({"rho": (1.0, 1.0, 1.0)}, ValueError, "rho: expected None, a number or a pair"),
    ({"rho": "soft"}, TypeError, "rho: expected a number"),
    ({"rho": math.nan}, ValueError, "rho: expected a finite number"),
    ({"momentum": 2.0}, ValueError, r"momentum: expected a number in \[1, 2\), got 2.0"),
    ({"momentum": 0.5}, ValueError, "momentum: expected a number in"),
    ({"momentum": None}, TypeError, "momentum: expected a number"),
    ({"epsilon_scaling": -1.0}, ValueError, "epsilon_scaling: expected a start > 0"),
    ({"epsilon_scaling": (1.0, 1.0)}, ValueError, "epsilon_scaling: expected a factor between 0 and 1"),
    ({"epsilon_scaling": (1.0, 0.5, 2.0)}, ValueError, r"epsilon_scaling: expected a number or \(start"),
    ({"epsilon_scaling": [1.0, -0.5]}, ValueError, "epsilon_scaling: expected epsilons > 0"),
    ({"epsilon_scaling": [1.0] * 100}, ValueError, "epsilon_scaling: expected fewer epsilons than max_it"),
    ({"epsilon_scaling": "auto"}, TypeError, "epsilon_scaling: expected a number"),
    ({"epsilon_scaling": (1e9, 0.99)}, ValueError, "epsilon_scaling: reaches epsilon=1 in more than max_it"),
    ({"gradient": "exact"}, ValueError, "gradient: expected one of"),
]  # fmt: skip


@pytest.mark.parametrize("options, error, match", BAD, ids=[m for _, _, m in BAD])
def test_bad_input(options, error, match):
    with pytest.raises(error, match=match):
        sinkhorn(C, epsilon=1, **options)


def test_totals_and_warning():
    with pytest.raises(ValueError, match=r"a, b: expected equal totals, got 2 and 1.*rho="):
        sinkhorn(C, 2 * W, epsilon=1, validate=True)
    assert sinkhorn(C, 2 * W, epsilon=1, rho=(1.0, None), validate=True).cost.isfinite().all()
    if DEVICE == "cpu":
        with pytest.warns(UserWarning, match="at epsilon=0.001.*larger epsilon.*epsilon_scaling="):
            sinkhorn(C, epsilon=1e-3, max_iterations=2, tolerance=1e-7, rho=(1.0, None))


ODD = st.one_of(
    st.none(),
    st.floats(),
    st.integers(-2, 3),
    st.sampled_from(["auto", (), (1.0, 2.0), (0.5, None), (1.0, 0.5), (None, None), [], {}]),
    st.builds(lambda k: torch.full((2,), k, device=DEVICE), st.integers(-1, 4)),
    st.builds(lambda k: (torch.full((2,), k, device=DEVICE), None), st.integers(-1, 4)),
)


@pytest.mark.no_interpreter
@given(
    rho=ODD, momentum=ODD, scaling=ODD, lengths=ODD, gradient=st.sampled_from(["auto", "none", 3])
)
def test_any_argument_gives_a_result_or_a_clear_error(rho, momentum, scaling, lengths, gradient):
    options = {"rho": rho, "momentum": momentum, "epsilon_scaling": scaling, "lengths": lengths}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            r = sinkhorn(C, epsilon=0.3, gradient=gradient, max_iterations=9, **options)
        except (ValueError, TypeError) as error:
            name = str(error).split(":")[0].split("[")[0]
            assert name in (*options, "gradient", "cost", "a", "b"), error
        else:
            assert r.plan().shape == C.shape and torch.isfinite(r.plan()).all()


@pytest.mark.no_interpreter
def test_gradients_of_potentials_whose_marginals_hardly_hold():
    """exp(-f / rho) of 1e-8 and less: what would be far from a balanced solution is this one's."""
    cost = (torch.rand(4, 5, dtype=torch.float64, device=DEVICE) + 0.5).requires_grad_()

    def value(cost):
        r = sinkhorn(cost, epsilon=0.02, rho=0.02, max_iterations=3000)
        return r.f[0] + 0.5 * r.g[1]

    (grad,) = torch.autograd.grad(value(cost), cost)
    step = 1e-6 * torch.randn_like(cost)
    with torch.no_grad():
        difference = (value(cost + step) - value(cost - step)) / 2
    torch.testing.assert_close((grad * step).sum(), difference, rtol=1e-6, atol=0)
