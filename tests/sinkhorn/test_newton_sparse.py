"""Core newton_sparse: the step against the formula in float64, the solver on easy, hard and impossible problems."""

import copy
import math

import pytest
import torch
from helpers import DEVICE, INTERPRETED, relative_error
from sinkhorn_problems import problem

import solera
from solera.sinkhorn import NewtonResult, sinkhorn, sinkhorn_newton_sparse
from solera.sinkhorn.newton_sparse import newton_pass_reference, newton_solve_reference

ops = torch.ops.solera
F64 = torch.float64
# One entry, one column, less than a vector, more than a block of rows, more than a GPU tile of columns.
SHAPES = [(1, 1, 1, 1), (1, 9, 1, 1), (2, 9, 4, 0), (2, 70, 33, 5), (1, 70, 530, 8)]


def state(batch, n, m, zeros=False):
    cost, a, b = problem(batch, n, m, dtype=F64, zeros=zeros)
    f, g = (torch.randn(batch, k, dtype=F64, device=DEVICE) / 5 for k in (n, m))
    return cost, a, b, f, g


def assignment(n, seed=0, dtype=F64):
    torch.manual_seed(seed)
    return torch.rand(n, n, dtype=F64).to(device=DEVICE, dtype=dtype)


def clouds(n, m):
    c = torch.cdist(torch.rand(n, 2, dtype=F64), torch.rand(m, 2, dtype=F64)).square()
    return (c / c.max()).to(DEVICE)


def assert_solved(r, cost, a=None, b=None, tolerance=1e-12):
    n, m = cost.shape[-2:]
    a = torch.full((n,), 1 / n, dtype=F64, device=DEVICE) if a is None else a.double()
    b = torch.full((m,), 1 / m, dtype=F64, device=DEVICE) if b is None else b.double()
    plan = r.plan()
    assert r.converged.all()
    assert ((plan.sum(-1) - a).abs().sum(-1) <= 2 * tolerance).all()
    assert ((plan.sum(-2) - b).abs().sum(-1) <= 2 * tolerance).all()


# ---- one step ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pass_is_the_sums_and_the_largest_entries_of_the_plan(shape):
    *size, keep = shape
    cost, a, b, f, g = state(*size, zeros=min(size[1:]) > 3)
    cost[0, 0, 0] = math.inf if min(size[1:]) > 3 else 0.5
    plan = a[:, :, None] * b[:, None] * ((f[:, :, None] + g[:, None] - cost) / 0.05).exp()
    p, q, values, index = ops.sinkhorn_newton_pass(cost, a, b, f, g, 0.05, keep)
    torch.testing.assert_close(p, plan.sum(-1), rtol=1e-13, atol=0)
    torch.testing.assert_close(q, plan.sum(-2), rtol=1e-13, atol=0)
    torch.testing.assert_close(values, plan.sort(-1, descending=True)[0][..., :keep])
    torch.testing.assert_close(plan.gather(-1, index), values)
    assert all(row.unique().numel() == keep for row in index.flatten(0, 1))


def newton_matrix(values, index, p, q):
    s = torch.zeros(*p.shape, q.shape[-1], dtype=F64, device=DEVICE).scatter(-1, index, values)
    top = torch.cat([torch.diag_embed(p), s], -1)
    return torch.cat([top, torch.cat([s.mT, torch.diag_embed(q)], -1)], -2)


@pytest.mark.parametrize("shape", SHAPES[3:], ids=str)
def test_solve_solves_the_truncated_system(shape):
    *size, keep = shape
    out = ops.sinkhorn_newton_pass(*state(*size), 0.05, keep)
    p, q, values, index = out
    ra, rb = torch.randn_like(p), torch.randn_like(q)
    x, y, iterations = ops.sinkhorn_newton_solve(values, index, p, q, ra, rb, 0.0, 1e-13, 1000)
    z, r = torch.cat([x, y], -1), torch.cat([ra, rb], -1)
    left = (newton_matrix(values, index, p, q) @ z[..., None]).squeeze(-1)
    scale = torch.cat([p, q], -1).rsqrt()  # iterative solvers end by the system of unit diagonal
    assert relative_error(scale * left, scale * r) < 1e-9
    u, v, _ = newton_solve_reference(values, index, p, q, ra, rb, 0.0, 0.0, 0)
    assert relative_error(x, u) < 1e-9 and relative_error(y, v) < 1e-9
    assert (iterations < 100).all()


def test_what_has_no_mass_stays_and_a_column_may_be_in_every_row():
    n, m = 40, 30
    i = torch.arange(n, device=DEVICE)
    index = torch.stack([0 * i, 1 + i % 14, 15 + i % 14], -1)[None]
    values = torch.rand(1, n, 3, dtype=F64, device=DEVICE) + 0.1
    values[0, 5] = 0
    p = values.sum(-1) * 1.2
    q = torch.zeros(1, m, dtype=F64, device=DEVICE).scatter_add(
        -1, index.flatten(1), values.flatten(1)
    )
    q *= 1.2
    ra, rb = torch.randn_like(p), torch.randn_like(q)
    out = ops.sinkhorn_newton_solve(values, index, p, q, ra, rb, 0.01, 1e-14, 1000)
    want = newton_solve_reference(values, index, p, q, ra, rb, 0.01, 0.0, 0)
    assert relative_error(out[0], want[0]) < 1e-11 and relative_error(out[1], want[1]) < 1e-11
    assert out[0][0, 5] == 0 and out[1][0, m - 1] == 0
    nothing = ops.sinkhorn_newton_solve(values, index, p, q, 0 * ra, 0 * rb, 0.01, 1e-14, 1000)
    assert not nothing[0].any() and not nothing[1].any() and nothing[2] == 0


@pytest.mark.no_interpreter
@pytest.mark.skipif(DEVICE != "cpu", reason="conjugate gradients serve the CPU")
@pytest.mark.parametrize("eta", [1200, 5000])
def test_the_forest_takes_few_iterations_where_the_diagonal_takes_hundreds(eta):
    cost = assignment(300)
    a = torch.full((1, 300), 1 / 300, dtype=F64)
    r = sinkhorn_newton_sparse(cost, epsilon=1 / eta)
    p, q, values, index = newton_pass_reference(cost[None], a, a, r.f[None], r.g[None], 1 / eta, 8)
    ra = torch.randn_like(p)
    rb = torch.randn_like(q)
    rb = rb + (ra.sum() - rb.sum()) / 300
    *_, iterations = ops.sinkhorn_newton_solve(values, index, p, q, ra, rb, 1e-13, 1e-6, 1000)
    assert iterations < 60
    exact, short = (
        ops.sinkhorn_newton_solve(values, index, p, q, ra, rb, 1e-13, 1e-14, k)[:2]
        for k in (1000, 5)
    )
    slope = [(ra * x).sum() + (rb * y).sum() for x, y in (exact, short)]
    assert 0 < slope[1] <= slope[0] * (1 + 1e-9)  # cut short it ascends too


@pytest.mark.parametrize("shape", [(2, 70, 33), (1, 70, 530)], ids=str)
def test_same_bits_for_any_thread_count_and_batch(shape):
    cost, a, b, f, g = state(*shape)
    threads, runs = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            out = ops.sinkhorn_newton_pass(cost, a, b, f, g, 0.05, 4)
            p, q, v, i = out
            runs.append(
                (*out, *ops.sinkhorn_newton_solve(v, i, p, q, a - p, b - q, 1e-9, 1e-6, 50))
            )
    finally:
        torch.set_num_threads(threads)
    for other in runs[1:]:
        assert all(torch.equal(x, y) for x, y in zip(runs[0], other))
    alone = ops.sinkhorn_newton_pass(cost[:1], a[:1], b[:1], f[:1], g[:1], 0.05, 4)
    assert all(torch.equal(x[:1], y) for x, y in zip(runs[0], alone))


@pytest.mark.no_interpreter
def test_opcheck():
    cost, a, b, f, g = state(2, 6, 5)
    for c in (cost, cost.mT.contiguous().mT, cost[:1].expand(2, 6, 5)):
        torch.library.opcheck(ops.sinkhorn_newton_pass.default, (c, a, b, f, g, 0.1, 3))
    p, q, v, i = ops.sinkhorn_newton_pass(cost, a, b, f, g, 0.1, 3)
    args = (v, i, p, q, a - p, (b - q)[:1].expand(2, 5), 1e-9, 1e-6, 50)
    torch.library.opcheck(ops.sinkhorn_newton_solve.default, args)


# ---- the solver --------------------------------------------------------------------------------------


@pytest.mark.no_interpreter
@pytest.mark.parametrize("seed", [0, 1])
def test_the_papers_random_assignment(seed):
    """n = 500, 1/epsilon = 1200: about nine steps (Sinkhorn needs some 56,000 iterations)."""
    cost = assignment(500, seed)
    r = sinkhorn_newton_sparse(cost, epsilon=1 / 1200)
    assert_solved(r, cost)
    assert r.newton_steps <= 11 and r.keep_per_row == 8 and not r.returned_to_sinkhorn
    assert 1e-6 < r.dropped_mass < 1e-3 and r.iterations == 21
    assert sinkhorn(cost, epsilon=1 / 1200, max_iterations=300).marginal_error > 1e-6


@pytest.mark.parametrize("eta", [100] if INTERPRETED else [100, 10000, 100000])
def test_any_epsilon_converges(eta):
    cost, a, b = problem(*((10, 8) if INTERPRETED else (90, 70)), dtype=F64)
    tolerance = max(1e-12, 3e-16 * eta)
    r = sinkhorn_newton_sparse(cost, a, b, epsilon=1 / eta, tolerance=tolerance)
    assert_solved(r, cost, a, b, tolerance)


@pytest.mark.no_interpreter
def test_dense_plans_take_more_entries_or_the_whole_plan():
    """The hard cases of smooth costs, where eight entries a row stall short of 1e-6."""
    for eta, cost, whole in ((5, clouds(100, 80), True), (300, clouds(150, 150), False)):
        r = sinkhorn_newton_sparse(cost, epsilon=1 / eta, n_sinkhorn=5)
        assert_solved(r, cost)
        assert r.keep_per_row > 8 and not r.returned_to_sinkhorn
        assert not whole or (r.keep_per_row == 80 and r.dropped_mass == 0)
        assert r.newton_steps < 30
    want = sinkhorn(cost, epsilon=1 / eta, init=r, max_iterations=50)
    torch.testing.assert_close(want.f, r.f, rtol=0, atol=1e-12)


@pytest.mark.no_interpreter
def test_returns_to_sinkhorn_where_the_plan_is_too_large_to_factor(monkeypatch):
    module = __import__("solera.sinkhorn.newton_sparse", fromlist=["WHOLE"])
    monkeypatch.setattr(module, "WHOLE", 40)
    cost = clouds(300, 300)
    r = sinkhorn_newton_sparse(cost, epsilon=1 / 20, n_sinkhorn=1, keep_per_row=100)
    assert r.returned_to_sinkhorn and r.keep_per_row == 64 and r.iterations > 20
    assert_solved(r, cost)


@pytest.mark.no_interpreter
def test_batch_marginals_and_shapes():
    n, m = 40, 33
    cost, a, b = problem(2, 3, n, m, dtype=F64, zeros=True)
    cost[0, 1, 3, 2] = math.inf
    r = sinkhorn_newton_sparse(cost, a, b, epsilon=0.01)
    assert isinstance(r, NewtonResult) and r.newton_steps.shape == (2, 3)
    assert_solved(r, cost, a, b)
    assert r.plan()[0, 1, 3, 2] == 0 and not r.plan()[..., n // 2, :].any()
    assert torch.isfinite(r.f).all() and torch.isfinite(r.g).all()
    torch.testing.assert_close((a * r.f).sum(-1), (b * r.g).sum(-1))
    want = sinkhorn(cost, a, b, epsilon=0.01, init=r, max_iterations=20)
    torch.testing.assert_close(r.cost, want.cost, rtol=1e-12, atol=0)
    one = sinkhorn_newton_sparse(cost[1, 2], a[1, 2], b[1, 2], epsilon=0.01)
    assert torch.equal(one.f, r.f[1, 2]) and one.newton_steps == r.newton_steps[1, 2]
    turned = sinkhorn_newton_sparse(cost[1, 2].mT, b[1, 2], a[1, 2], epsilon=0.01)
    torch.testing.assert_close(turned.f, r.g[1, 2], rtol=0, atol=1e-10)
    empty = sinkhorn_newton_sparse(cost[:0], epsilon=0.01)
    assert empty.f.shape == (0, 3, n) and empty.newton_steps.shape == (0, 3)


def test_float32_and_half_input_reach_the_same_tolerance():
    cost, a, b = problem(8, 7)
    for dtype in (torch.float32, torch.bfloat16):
        c, x, y = (t.to(dtype) for t in (cost, a, b))
        r = sinkhorn_newton_sparse(c, x, y, epsilon=0.01)
        assert r.f.dtype == F64 and r.marginal_error < 1e-12
        y = y.double() * (x.double().sum() / y.double().sum())
        assert_solved(r, c.double(), x, y)


@pytest.mark.no_interpreter
def test_one_bad_problem_of_a_batch_leaves_the_others():
    cost, a, b = problem(3, 6, 5, dtype=F64)
    cost[1, 2] = math.nan
    with pytest.raises(ValueError, match=r"cost: expected numbers.*NaN"):
        sinkhorn_newton_sparse(cost, a, b, epsilon=0.1, validate=True)
    if DEVICE == "cpu":
        with pytest.warns(UserWarning, match="1 of 3 problems have a marginal error above"):
            r = sinkhorn_newton_sparse(cost, a, b, epsilon=0.1, validate=False)
    else:
        r = sinkhorn_newton_sparse(cost, a, b, epsilon=0.1, validate=False)
    assert r.converged.tolist() == [True, False, True] and r.f[1].isnan().all()
    alone = sinkhorn_newton_sparse(cost[2], a[2], b[2], epsilon=0.1)
    assert torch.equal(alone.f, r.f[2])


@pytest.mark.no_interpreter
@pytest.mark.filterwarnings("ignore:solera")
def test_an_infeasible_problem_and_a_tolerance_below_rounding_end():
    cost = torch.rand(6, 6, dtype=F64)
    cost[:3, 3:] = cost[3:, :3] = math.inf  # two blocks of unequal mass
    a = torch.tensor([0.2, 0.2, 0.2, 0.1, 0.1, 0.2], dtype=F64)
    r = sinkhorn_newton_sparse(cost, a, epsilon=0.1, max_iterations=50)
    assert not r.converged and r.returned_to_sinkhorn
    r = sinkhorn_newton_sparse(assignment(60), epsilon=1e-4, tolerance=0.0)
    assert not r.converged and r.marginal_error < 1e-11 and r.newton_steps < 100


@pytest.mark.no_interpreter
@pytest.mark.parametrize("output", ["cost", "f", "plan"])
def test_gradcheck(output):
    cost, a, b = problem(4, 3, dtype=F64)
    pick = {"cost": lambda r: r.cost, "f": lambda r: r.f, "plan": lambda r: r.plan()}[output]
    tensors = [t.requires_grad_() for t in (cost, a.log(), b.log())]

    def f(cost, a, b):
        return pick(sinkhorn_newton_sparse(cost, a.softmax(-1), b.softmax(-1), epsilon=0.2))

    assert torch.autograd.gradcheck(f, tensors)
    assert torch.autograd.gradgradcheck(f, tensors, fast_mode=True)


def test_reference_backend_copies_and_transforms():
    cost, a, b = problem(7, 6, dtype=F64)
    r = sinkhorn_newton_sparse(cost, a, b, epsilon=0.02)
    with solera.backend("reference"):
        q = sinkhorn_newton_sparse(cost, a, b, epsilon=0.02)
    torch.testing.assert_close(q.f, r.f, rtol=0, atol=1e-11)
    back = torch.utils._pytree.tree_map(lambda t: t, copy.deepcopy(r))
    assert isinstance(back, NewtonResult) and torch.equal(back.plan(), r.plan())
    with pytest.raises(RuntimeError, match=r"torch\.func transforms"):
        torch.func.vmap(lambda c: sinkhorn_newton_sparse(c, epsilon=0.1).f)(cost[None])


C = torch.rand(2, 3, 4, device=DEVICE)
BAD = [
    (lambda: sinkhorn_newton_sparse([[1.0]], epsilon=1), TypeError, "cost: expected a torch.Tensor, got list"),
    (lambda: sinkhorn_newton_sparse(C), TypeError, "epsilon"),
    (lambda: sinkhorn_newton_sparse(C, epsilon=0.0), ValueError, "epsilon: expected a number > 0"),
    (lambda: sinkhorn_newton_sparse(C[:, :0], epsilon=1), ValueError, "cost: expected at least one row"),
    (lambda: sinkhorn_newton_sparse(C, C[0, :2, 0], epsilon=1), ValueError, r"a: expected shape \(3,\).*\(2,\)"),
    (lambda: sinkhorn_newton_sparse(C, b=1.0, epsilon=1), TypeError, "b: expected a torch.Tensor"),
    (lambda: sinkhorn_newton_sparse(C, epsilon=1, keep_per_row=0), ValueError, "keep_per_row: expected at least 1"),
    (lambda: sinkhorn_newton_sparse(C, epsilon=1, n_sinkhorn=1.5), TypeError, "n_sinkhorn: expected an int"),
    (lambda: sinkhorn_newton_sparse(C, epsilon=1, max_newton=0), ValueError, "max_newton: expected at least 1"),
    (lambda: sinkhorn_newton_sparse(C, epsilon=1, tolerance=-1), ValueError, "tolerance: expected a finite"),
    (lambda: sinkhorn_newton_sparse(C, torch.ones(3), epsilon=1, validate=True), ValueError, "a, b: expected equal"),
]  # fmt: skip


@pytest.mark.parametrize("call, error, match", BAD, ids=[m for _, _, m in BAD])
def test_bad_input(call, error, match):
    with pytest.raises(error, match=match):
        call()
