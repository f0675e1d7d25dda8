"""Core dense: Sinkhorn against the plain loop in float64 and against POT, its gradients, its extremes."""

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

INF = math.inf
# One row or column, below a vector, with a tail, more than one block of rows, wider than a GPU tile of rows.
SHAPES = [(1, 1), (1, 9), (9, 1), (5, 7), (33, 20), (70, 130), (131, 37)]
LARGE = [(2, 2100)] if INTERPRETED else [(300, 520), (2, 5000), (700, 700)]


def loop(cost, a, b, epsilon, iterations):
    """What a user writes today, in the tensors' own dtype; zero weights as -inf logarithms."""
    f, g = torch.zeros_like(a), torch.zeros_like(b)
    log_a, log_b = a.log(), b.log()
    for _ in range(iterations):
        f = -epsilon * torch.logsumexp((g[..., None, :] - cost) / epsilon + log_b[..., None, :], -1)
        g = -epsilon * torch.logsumexp((f[..., :, None] - cost) / epsilon + log_a[..., None], -2)
    plan = (f[..., :, None] + g[..., None, :] - cost) / epsilon
    plan = a[..., None] * b[..., None, :] * plan.exp()
    shift = ((b * g).sum(-1) - (a * f).sum(-1)) / (a.sum(-1) + b.sum(-1))
    value = (a * f).sum(-1) + (b * g).sum(-1)
    value = value - epsilon * (plan.sum((-2, -1)) - a.sum(-1) * b.sum(-1))
    value = value + shift * (a.sum(-1) - b.sum(-1))
    return f + shift[..., None], g - shift[..., None], value, plan


def parts(result):
    return result.f, result.g, result.cost, result.plan()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("epsilon", [1e-4, 1e-3, 0.05, 1.0, 1e4])
@pytest.mark.parametrize("shape", SHAPES + LARGE, ids=str)
def test_iterates_against_float64(shape, epsilon, dtype):
    if INTERPRETED and shape in LARGE and epsilon not in (1e-4, 0.05):
        pytest.skip(
            "interpreted, wide rows at one epsilon with the exact log-sum-exp and one without"
        )
    cost, a, b = problem(*shape, dtype=dtype, zeros=min(shape) > 4)
    wide = [t.double() for t in (cost, a, b)]
    iterations = 12
    ours = sinkhorn(cost, a, b, epsilon=epsilon, max_iterations=iterations, validate=False)
    truth, today = loop(*wide, epsilon, iterations), loop(cost, a, b, epsilon, iterations)
    # One rounding of an exponent: of the size of the cost, or of 1 where epsilon is larger than that.
    unit = torch.finfo(dtype).eps
    size = max(1.0, 1 / epsilon)
    allowed = (16 * unit * max(1.0, epsilon),) * 3 + (4 * unit * size,)
    for name, x, y, z, floor in zip("f g cost plan".split(), parts(ours), truth, today, allowed):
        assert x.dtype == dtype
        scale = 1.0 if name == "plan" else float(y.norm() / math.sqrt(y.numel()))
        error = relative_error(x, y)
        assert error <= max(2 * relative_error(z, y), floor / max(scale, 1e-30)), name
    rows = (truth[3].sum(-1) - wide[1]).abs().sum(-1)
    torch.testing.assert_close(ours.marginal_error.double(), rows, rtol=1e-3, atol=20 * unit * size)
    assert ours.iterations == iterations


@pytest.mark.parametrize("epsilon", [0.3] if INTERPRETED else [0.01, 0.3])
def test_against_pot(epsilon):
    ot = pytest.importorskip("ot", reason="POT is not installed")
    cost, a, b = problem(12, 17, dtype=torch.float64)
    ours = sinkhorn(cost, a, b, epsilon=epsilon, max_iterations=3000, tolerance=1e-13)
    args = (a.cpu(), b.cpu(), cost.cpu(), epsilon)
    plan = ot.bregman.sinkhorn_log(*args, numItermax=20000, stopThr=1e-14)
    torch.testing.assert_close(ours.plan().cpu(), plan, rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(ours.transport_cost().cpu(), (plan * args[2]).sum())
    kl = (plan * (plan / (args[0][:, None] * args[1])).log()).sum()
    torch.testing.assert_close(ours.cost.cpu(), (plan * args[2]).sum() + epsilon * kl)


@pytest.mark.parametrize("epsilon", [0.5] if INTERPRETED else [0.05, 0.5])
def test_gradients_against_pot(epsilon):
    """POT's tape through its iterations, at convergence."""
    ot = pytest.importorskip("ot", reason="POT is not installed")
    cost, a, b = problem(6, 8, dtype=torch.float64, grad=True)
    weight = torch.rand(6, 8, dtype=torch.float64, device=DEVICE)
    result = sinkhorn(cost, a, b, epsilon=epsilon, max_iterations=4000, tolerance=1e-14)
    ours = torch.autograd.grad((result.plan() * weight).sum(), (cost, a, b))
    here = [t.detach().cpu().requires_grad_() for t in (cost, a, b)]
    plan = ot.bregman.sinkhorn_log(
        here[1], here[2], here[0], epsilon, numItermax=4000, stopThr=1e-14
    )
    theirs = torch.autograd.grad((plan * weight.cpu()).sum(), here)
    torch.testing.assert_close(ours[0].cpu(), theirs[0], rtol=1e-6, atol=1e-9)
    for x, y in zip(ours[1:], theirs[1:]):  # along the simplex: up to a constant
        x = x.cpu()
        torch.testing.assert_close(x - x.mean(), y - y.mean(), rtol=1e-6, atol=1e-9)


def test_gauge_value_and_marginals():
    cost, a, b = problem(3, 40, 23, dtype=torch.float64, zeros=True)
    r = sinkhorn(cost, a, b, epsilon=0.05, max_iterations=2000, tolerance=1e-12)
    plan = r.plan()
    assert r.converged.all() and (r.marginal_error <= 1e-12).all()
    torch.testing.assert_close((a * r.f).sum(-1), (b * r.g).sum(-1))
    torch.testing.assert_close(plan.sum(-1), a, atol=1e-12, rtol=0)
    torch.testing.assert_close(plan.sum(-2), b, atol=1e-12, rtol=0)
    assert not plan[:, 20].any() and not plan[:, :, 7].any()
    assert torch.isfinite(r.f).all() and torch.isfinite(r.g).all()
    # The potential at a zero weight is the c-transform of the other.
    transform = -0.05 * torch.logsumexp((r.g[:, None] - cost) / 0.05 + b.log()[:, None], -1)
    torch.testing.assert_close(r.f, transform, atol=1e-10, rtol=0)


def test_one_point_and_no_coupling():
    cost, a, b = problem(1, 6, dtype=torch.float64)
    r = sinkhorn(cost, a, b, epsilon=0.1, max_iterations=1)
    torch.testing.assert_close(r.plan(), a[:, None] * b)
    # Large epsilon: the independent coupling; small: the optimal permutation.
    cost = torch.rand(5, 5, dtype=torch.float64, device=DEVICE)
    torch.testing.assert_close(
        sinkhorn(cost, epsilon=1e6).plan(), torch.full_like(cost, 1 / 25), rtol=1e-5, atol=0
    )
    order = torch.randperm(5)
    cost = 1.0 + torch.rand(5, 5, dtype=torch.float64, device=DEVICE)
    cost[torch.arange(5), order] = 0.0
    plan = sinkhorn(cost, epsilon=1e-3, max_iterations=50).plan()
    assert torch.equal(plan.argmax(-1).cpu(), order)
    torch.testing.assert_close(
        plan.max(-1).values, torch.full((5,), 0.2, dtype=torch.float64, device=DEVICE)
    )


# ---- gradients ---------------------------------------------------------------------------------------

CONVERGED = {"epsilon": 0.3, "max_iterations": 60 if INTERPRETED else 400}
OUTPUTS = {
    "cost": lambda r: r.cost,
    "f": lambda r: r.f,
    "g": lambda r: r.g,
    "plan": lambda r: r.plan(),
    "transport_cost": lambda r: r.transport_cost(),
    "all": lambda r: (r.f * r.f).sum() + r.g.cos().sum() + r.cost.sum() + r.plan().square().sum(),
}


def tall_and_wide(shape):
    return [
        torch.rand(shape, dtype=torch.float64, device=DEVICE, requires_grad=True),
        torch.randn(
            (*shape[:-2], shape[-2]), dtype=torch.float64, device=DEVICE, requires_grad=True
        ),
        torch.randn(
            (*shape[:-2], shape[-1]), dtype=torch.float64, device=DEVICE, requires_grad=True
        ),
    ]


# Backward is one composition whatever solved the forward: interpreted, all outputs of a batch at once are enough.
CHECKED = ["all"] if INTERPRETED else list(OUTPUTS)
CHECKED_SHAPES = [(2, 3, 3)] if INTERPRETED else [(3, 4), (5, 3), (2, 3, 3)]


@pytest.mark.parametrize("shape", CHECKED_SHAPES, ids=str)
@pytest.mark.parametrize("output", CHECKED)
def test_gradcheck(output, shape):
    def f(cost, a, b):
        return OUTPUTS[output](sinkhorn(cost, a.softmax(-1), b.softmax(-1), **CONVERGED))

    assert torch.autograd.gradcheck(f, tall_and_wide(shape), fast_mode=INTERPRETED)


@pytest.mark.parametrize("output", CHECKED)
def test_gradgradcheck(output):
    def f(cost, a, b):
        return OUTPUTS[output](sinkhorn(cost, a.softmax(-1), b.softmax(-1), **CONVERGED))

    assert torch.autograd.gradgradcheck(f, tall_and_wide((3, 4)), fast_mode=INTERPRETED)


@pytest.mark.parametrize("output", CHECKED)
def test_gradients_with_zero_weights_and_forbidden_pairs(output):
    cost, a, b = problem(5, 6, dtype=torch.float64, zeros=True)
    cost[0, 0] = cost[3, 4] = INF
    free = torch.isfinite(cost)
    x = cost[free].requires_grad_()

    def f(x):
        return OUTPUTS[output](sinkhorn(cost.masked_scatter(free, x), a, b, **CONVERGED))

    assert torch.autograd.gradcheck(f, (x,), fast_mode=INTERPRETED)
    c = cost.clone().requires_grad_()
    (grad,) = torch.autograd.grad(OUTPUTS[output](sinkhorn(c, a, b, **CONVERGED)).sum(), c)
    assert torch.isfinite(grad).all() and grad[0, 0] == 0 and grad[3, 4] == 0


def test_envelope_gradients_are_plan_and_potentials():
    cost, a, b = problem(2, 8, 5, dtype=torch.float64, grad=True)
    r = sinkhorn(cost, a, b, epsilon=0.1, max_iterations=5)  # before convergence too
    dcost, da, db = torch.autograd.grad(r.cost.sum(), (cost, a, b))
    for x, y in ((dcost, r.plan()), (da, r.f), (db, r.g)):
        torch.testing.assert_close(x, y.detach())


def test_gradients_in_float32_and_half():
    cost, a, b = problem(20, 30, grad=True)
    weight = torch.rand(20, 30, device=DEVICE)
    options = {"epsilon": 0.1, "max_iterations": 50}
    for dtype, allowed in ((torch.float32, 2e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)):
        low = [t.detach().to(dtype).requires_grad_() for t in (cost, a, b)]
        wide = [t.detach().double().requires_grad_() for t in low]
        got = []
        for tensors in (low, wide):
            r = sinkhorn(*tensors, **options, validate=False)
            total = (r.plan() * weight).sum() + r.cost
            got.append((r, torch.autograd.grad(total, tensors)))
        (r, grads), (r64, grads64) = got
        assert r.f.dtype == r.cost.dtype == r.plan().dtype == torch.float32
        assert relative_error(r.plan(), r64.plan()) < 1e-5
        for x, y in zip(grads, grads64):
            assert x.dtype == dtype
            assert relative_error(x, y) < allowed


def test_some_inputs_frozen():
    cost, a, b = problem(6, 4, dtype=torch.float64, grad=True)
    options = {"epsilon": 0.2, "max_iterations": 40}
    full = torch.autograd.grad(sinkhorn(cost, a, b, **options).f.square().sum(), (cost, a, b))
    for k in range(3):
        tensors = [t.detach() for t in (cost, a, b)]
        tensors[k].requires_grad_()
        (alone,) = torch.autograd.grad(sinkhorn(*tensors, **options).f.square().sum(), tensors[k])
        torch.testing.assert_close(alone, full[k])


def test_shared_marginal_gets_the_sum_of_gradients():
    cost, a, b = problem(3, 6, 4, dtype=torch.float64)
    a, b = a[0].requires_grad_(), b[0]
    options = {"epsilon": 0.2, "max_iterations": 20}
    (da,) = torch.autograd.grad(sinkhorn(cost, a, b, **options).cost.sum(), a)
    each = [sinkhorn(c, a, b, **options).f.detach() for c in cost]
    torch.testing.assert_close(da, sum(each))


@pytest.mark.no_interpreter
def test_nothing_grows_with_iterations():
    cost = torch.rand(64, 64, requires_grad=True)
    for iterations in (1, 100):
        saved = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: saved.update({t.data_ptr(): t.numel()}) or t, lambda t: t
        ):
            result = sinkhorn(cost, epsilon=0.1, max_iterations=iterations)
        assert sum(saved.values()) == 64 * 64 + 4 * 64
        del result


# ---- stopping ----------------------------------------------------------------------------------------


def test_stopping_is_per_problem():
    cost, a, b = problem(3, 24, 24, dtype=torch.float64)
    cost[1] *= 0.01  # converges at once
    r = sinkhorn(cost, a, b, epsilon=0.05, max_iterations=300, tolerance=1e-8, check_every=4)
    assert r.converged.all() and (r.marginal_error <= 1e-8).all()
    assert (r.iterations % 4 == 0).all() and r.iterations[1] == 4 < r.iterations[0] < 300
    for k in range(3):
        n = int(r.iterations[k])
        alone = sinkhorn(cost[k], a[k], b[k], epsilon=0.05, max_iterations=n)
        for x, y in ((alone.f, r.f[k]), (alone.g, r.g[k])):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-13)
        before = sinkhorn(cost[k], a[k], b[k], epsilon=0.05, max_iterations=max(n - 4, 1))
        assert before.marginal_error > 1e-8 or n == 4
    with solera.backend("reference"):
        q = sinkhorn(cost, a, b, epsilon=0.05, max_iterations=300, tolerance=1e-8, check_every=4)
    assert torch.equal(q.iterations, r.iterations)


def test_warm_start():
    cost, a, b = problem(30, 20, dtype=torch.float64)
    options = {"epsilon": 0.05, "max_iterations": 400, "tolerance": 1e-9}
    cold = sinkhorn(cost, a, b, **options)
    for init in (cold, (cold.f, cold.g)):
        warm = sinkhorn(cost, a, b, init=init, **options)
        assert warm.iterations == 10 and cold.iterations > 10
        torch.testing.assert_close(warm.f, cold.f, rtol=0, atol=1e-8)
    far = (cold.f + 1e4, cold.g - 3e4)  # a bad shift costs the fallback, not the result
    torch.testing.assert_close(sinkhorn(cost, a, b, init=far, **options).plan(), cold.plan())


@pytest.mark.skipif(DEVICE != "cpu", reason="warns on the CPU only")
def test_warns_only_where_it_was_asked_to_converge():
    cost, a, b = problem(9, 9)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        sinkhorn(cost, a, b, epsilon=0.001, max_iterations=2)
        sinkhorn(cost, a, b, epsilon=1.0, tolerance=1e-3)
    with pytest.warns(UserWarning, match="1 of 1 problems have a marginal error above"):
        assert not sinkhorn(cost, a, b, epsilon=1e-3, max_iterations=2, tolerance=1e-6).converged


# ---- determinism, layouts, extremes --------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape", [(2, 70, 40)] if INTERPRETED else [(3, 400, 400), (9, 70, 40)], ids=str
)
def test_same_bits_for_any_thread_count_and_batch(shape):
    cost, a, b = problem(*shape)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            c = cost.clone().requires_grad_()
            r = sinkhorn(c, a, b, epsilon=0.01, max_iterations=7)
            results.append((r.f, r.g, r.cost, torch.autograd.grad(r.plan().square().sum(), c)[0]))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0][:3], other))
    r = sinkhorn(cost, a, b, epsilon=0.01, max_iterations=7)
    for pick in (slice(0, 1), slice(1, 3)):
        s = sinkhorn(cost[pick], a[pick], b[pick], epsilon=0.01, max_iterations=7)
        assert torch.equal(s.f, r.f[pick]) and torch.equal(s.g, r.g[pick])
        assert torch.equal(s.plan(), r.plan()[pick]) and torch.equal(s.cost, r.cost[pick])


def test_layouts():
    cost, a, b = problem(4, 6, 8)
    options = {"epsilon": 0.1, "max_iterations": 5}
    want = sinkhorn(cost, a, b, **options)
    moved = cost.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(sinkhorn(moved, a, b, **options).f, want.f)
    spaced = torch.stack([cost, cost], -1)[..., 0]
    assert torch.equal(sinkhorn(spaced, a, b, **options).f, want.f)
    one = sinkhorn(cost[0].expand(4, 6, 8), a[0], b[0], **options)
    assert torch.equal(one.f[3], want.f[0])
    nested = sinkhorn(cost.reshape(2, 2, 6, 8), a.reshape(2, 2, 6), b.reshape(2, 2, 8), **options)
    assert nested.f.shape == (2, 2, 6) and nested.plan().shape == (2, 2, 6, 8)
    assert nested.converged.shape == nested.cost.shape == (2, 2)
    assert torch.equal(nested.f.reshape(4, 6), want.f)
    c = cost.clone().requires_grad_()
    (x,) = torch.autograd.grad(sinkhorn(c, a, b, **options).plan().sum(), c)  # a stride of 0
    assert torch.isfinite(x).all()


@pytest.mark.parametrize(
    "dtype", [torch.float32] if INTERPRETED else [torch.float64, torch.float32], ids=str
)
@pytest.mark.parametrize("bad", ["nan", "row", "column", "-inf", "a", "a nan", "zero"])
def test_a_bad_problem_stays_in_its_batch_item(bad, dtype):
    cost, a, b = problem(3, 20, 21, dtype=dtype)
    clean = sinkhorn(cost, a, b, epsilon=0.1, max_iterations=20, tolerance=0.5)
    if bad == "nan":
        cost[1, 3, 5] = math.nan
    elif bad == "row":
        cost[1, 3] = INF
    elif bad == "column":
        cost[1, :, 5] = INF
    elif bad == "-inf":
        cost[1, 3, 5] = -INF
    elif bad == "a":
        a[1, 2] = -0.1
    elif bad == "a nan":
        a[1, 2] = math.nan
    else:
        b[1] = 0.0
    with pytest.raises(ValueError, match=r"^(cost|a|b): expected|^cost: a (row|column)"):
        sinkhorn(cost, a, b, epsilon=0.1, validate=True)
    for backend in ("auto", "reference"):
        with solera.backend(backend):
            c = cost.clone().requires_grad_()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                r = sinkhorn(c, a, b, epsilon=0.1, max_iterations=20, tolerance=0.5, validate=False)
        assert r.converged.tolist() == [True, False, True]
        assert r.f[1].isnan().all() and r.g[1].isnan().all() and r.cost[1].isnan()
        (grad,) = torch.autograd.grad(r.cost.sum() + r.plan().square().sum(), c)
        assert torch.isfinite(grad[[0, 2]]).all()
        for x, y in ((r.f, clean.f), (r.g, clean.g), (r.plan(), clean.plan())):
            torch.testing.assert_close(x[[0, 2]], y[[0, 2]])


def test_padding_by_forbidden_pairs_without_mass():
    """A smaller problem inside a larger one: what a ragged batch uses."""
    cost, a, b = problem(6, 5, dtype=torch.float64)
    padded = torch.full((9, 8), INF, dtype=torch.float64, device=DEVICE)
    padded[:6, :5] = cost
    pa, pb = (torch.nn.functional.pad(w, (0, 3)) for w in (a, b))
    small = sinkhorn(cost, a, b, epsilon=0.1)
    c = padded.clone().requires_grad_()
    large = sinkhorn(c, pa, pb, epsilon=0.1)
    torch.testing.assert_close(large.cost, small.cost)
    torch.testing.assert_close(large.plan()[:6, :5], small.plan())
    assert not large.plan()[6:].any() and not large.plan()[:, 5:].any()
    (grad,) = torch.autograd.grad(large.cost + large.transport_cost(), c)
    assert torch.isfinite(grad).all() and not grad[6:].any() and not grad[:, 5:].any()


def test_forbidden_pairs():
    cost = torch.full((5, 5), INF, device=DEVICE)
    cost.fill_diagonal_(0.0)
    r = sinkhorn(cost, epsilon=0.1, tolerance=1e-5)
    assert r.converged
    torch.testing.assert_close(r.plan(), torch.eye(5, device=DEVICE) / 5)


@pytest.mark.parametrize("scale", [1e-30, 1e-5, 1e5, 1e30])
def test_scale_of_the_cost(scale):
    cost, a, b = problem(15, 18, dtype=torch.float64, zeros=True)
    r = sinkhorn(cost, a, b, epsilon=0.1, max_iterations=30)
    s = sinkhorn(cost * scale, a, b, epsilon=0.1 * scale, max_iterations=30)
    torch.testing.assert_close(s.plan(), r.plan())
    torch.testing.assert_close(s.f / scale, r.f)
    low = [t.float() for t in (cost * scale, a, b)]
    t = sinkhorn(*low, epsilon=0.1 * scale, max_iterations=30)
    torch.testing.assert_close(t.plan().double(), r.plan(), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(t.f.double() / scale, r.f, rtol=1e-4, atol=1e-6)
    big = sinkhorn(low[0] * 1e6, *low[1:], epsilon=0.1 * scale, max_iterations=5)
    assert torch.isfinite(big.f).all() or scale == 1e30


def test_tiny_and_large_totals():
    cost, a, b = problem(12, 14, dtype=torch.float64)
    want = sinkhorn(cost, a, b, epsilon=0.1, max_iterations=50).plan()
    for dtype in (torch.float64, torch.float32):
        for total in (1e-20, 1e6):
            low = [t.to(dtype) for t in (cost, a * total, b * total)]
            got = sinkhorn(*low, epsilon=0.1, max_iterations=50).plan()
            torch.testing.assert_close(got.double() / total, want, rtol=1e-4, atol=1e-8)


def test_empty_batch():
    cost = torch.rand(0, 4, 5, device=DEVICE, requires_grad=True)
    r = sinkhorn(cost, epsilon=0.1, tolerance=1e-3)
    assert r.f.shape == (0, 4) and r.g.shape == (0, 5) and r.plan().shape == (0, 4, 5)
    assert r.cost.shape == r.converged.shape == (0,)
    (grad,) = torch.autograd.grad(r.cost.sum() + r.plan().sum(), cost)
    assert grad.shape == cost.shape


@given(
    n=st.integers(1, 40),
    m=st.integers(1, 40),
    batch=st.sampled_from([(), (1,), (2, 2)]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    epsilon=st.sampled_from([1e-3, 0.1, 10.0]),
    scale=st.sampled_from([0.0, 1e-3, 1.0, 100.0]),
    zeros=st.booleans(),
    iterations=st.integers(1, 4),
)
def test_any_shape_dtype_and_scale(n, m, batch, dtype, epsilon, scale, zeros, iterations):
    cost, a, b = problem(*batch, n, m, dtype=dtype, zeros=zeros)
    cost = (cost.double() * scale).to(dtype)
    epsilon *= scale or 1.0
    r = sinkhorn(cost, a, b, epsilon=epsilon, max_iterations=iterations, validate=False)
    f, g, value, plan = loop(*(t.double() for t in (cost, a, b)), epsilon, iterations)
    unit = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    tolerance = 100 * unit * max(epsilon, float(cost.abs().max()))
    for x, y in ((r.f, f), (r.g, g), (r.cost, value)):
        torch.testing.assert_close(x.double(), y, rtol=0, atol=tolerance)
    torch.testing.assert_close(
        r.plan().double(), plan, rtol=100 * unit * max(1.0, scale / epsilon), atol=1e-30
    )
