"""Core plan_sums: sums of a plan's density over both sides, marginals and <P, C>, against the plan in float64."""

import pytest
import torch
from helpers import DEVICE, INTERPRETED, relative_error
from sinkhorn_problems import problem

import solera
from solera.sinkhorn import sinkhorn
from solera.sinkhorn.plan import plan_reference
from solera.sinkhorn.plan_sums import plan_cost, plan_marginals

ops = torch.ops.solera
EPSILON = 0.2
# One entry, one row, one column, less than a vector, several blocks of rows, rows of several tiles, columns shared out.
SHAPES = [(1, 1, 1), (2, 1, 9), (2, 9, 1), (3, 33, 20), (1, 70, 130), (2, 5, 1100)]


def inputs(batch, n, m, dtype=torch.float64, grad=False):
    cost, a, b = problem(batch, n, m)
    if n > 1 and m > 2:
        cost[0, 0, 1] = torch.inf
    f, g = torch.randn(batch, n, device=DEVICE) / 4, torch.randn(batch, m, device=DEVICE) / 4
    return [t.to(dtype).requires_grad_(grad) for t in (cost, a, b, f, g)]


def density(cost, f, g, by_cost):
    e = ((f[:, :, None] + g[:, None] - cost) / EPSILON).exp()
    return e * torch.where(cost == torch.inf, 0.0, cost) if by_cost else e


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("by_cost", [False, True])
@pytest.mark.parametrize("two", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_are_those_of_the_density_in_float64(shape, two, by_cost, dtype):
    cost, a, b, f, g = inputs(*shape, dtype=dtype)
    x, w, y = torch.randn_like(b), torch.randn_like(a) if two else None, torch.randn_like(a)
    rows, columns = ops.sinkhorn_plan_sums(cost, f, g, x, w, y, EPSILON, by_cost)
    assert rows.dtype == columns.dtype == dtype
    k = density(cost.double(), f.double(), g.double(), by_cost)
    row = (k @ x.double()[..., None]).squeeze(-1)
    side = y.double() if w is None else w.double() * row + y.double()
    allowed = 20 * torch.finfo(dtype).eps
    assert relative_error(rows, row) < allowed
    assert relative_error(columns, (k.mT @ side[..., None]).squeeze(-1)) < allowed


def marginals_formula(*tensors):
    plan = plan_reference(*tensors, tensors[1], None, EPSILON)
    return plan.sum(-1), plan.sum(-2)


def cost_formula(*tensors):
    cost = tensors[0]
    plan = plan_reference(*tensors, tensors[1], None, EPSILON)
    return ((plan * torch.where(cost == torch.inf, 0.0, cost)).sum((-2, -1)),)


FUNCTIONS = {
    "marginals": (plan_marginals, marginals_formula),
    "cost": (lambda *t: (plan_cost(*t),), cost_formula),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_against_autograd_of_the_plan(shape, name, dtype):
    function, formula = FUNCTIONS[name]
    tensors = inputs(*shape, dtype=dtype, grad=True)
    wide = [t.detach().double().requires_grad_() for t in tensors]
    got, want = function(*tensors, EPSILON), formula(*wide)
    grads = [torch.randn_like(t) for t in want]
    allowed = 100 * torch.finfo(dtype).eps
    for x, y in zip(got, want):
        assert x.dtype == dtype and relative_error(x, y) < allowed
    got = torch.autograd.grad(got, tensors, [t.to(dtype) for t in grads])
    want = torch.autograd.grad(want, wide, grads)
    for label, x, y in zip("cost a b f g".split(), got, want):
        assert x.dtype == dtype and relative_error(x, y) < allowed, label


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradcheck_and_gradgradcheck(name):
    tensors = inputs(2, 3, 4, grad=True)
    tensors[0].data.clamp_(max=2.0)
    call = lambda *t: FUNCTIONS[name][0](*t, EPSILON)
    assert torch.autograd.gradcheck(call, tensors, fast_mode=INTERPRETED)
    assert torch.autograd.gradgradcheck(call, tensors, fast_mode=INTERPRETED)


@pytest.mark.no_interpreter
@pytest.mark.parametrize("name", ["marginals", "transport_cost", "barycentric_projection"])
def test_gradcheck_through_the_solve(name):
    cost, a, b = problem(5, 4, dtype=torch.float64)
    points = torch.randn(4, 2, dtype=torch.float64, device=DEVICE)

    def f(cost, a, b, y):
        r = sinkhorn(cost, a.softmax(-1), b.softmax(-1), epsilon=0.3, max_iterations=300)
        return (
            r.barycentric_projection(y) if name == "barycentric_projection" else getattr(r, name)()
        )

    tensors = [t.requires_grad_() for t in (cost, a.log(), b.log(), points)]
    assert torch.autograd.gradcheck(f, tensors)
    assert torch.autograd.gradgradcheck(f, tensors, fast_mode=True)


def test_padding_is_not_read_and_gets_zeros():
    cost, a, b, f, g = inputs(3, 20, 37, dtype=torch.float32)
    lengths = torch.tensor([[20, 37], [7, 5], [0, 9]], device=DEVICE)
    x, w, y = torch.randn_like(b), torch.randn_like(a), torch.randn_like(a)
    for k, (n, m) in enumerate(lengths.tolist()):
        cost[k, n:] = cost[k, :, m:] = torch.nan
        for t in (f, y, w):
            t[k, n:] = torch.nan
        for t in (g, x):
            t[k, m:] = torch.nan
    for weight in (None, w):
        rows, columns = ops.sinkhorn_plan_sums(cost, f, g, x, weight, y, EPSILON, False, lengths)
        for k, (n, m) in enumerate(lengths.tolist()):
            assert not rows[k, n:].any() and not columns[k, m:].any()
            if n == 0:
                assert not rows[k].any() and not columns[k].any()
                continue
            part = [t[k : k + 1] for t in (cost[:, :n, :m], f[:, :n], g[:, :m], x[:, :m])]
            few = None if weight is None else weight[k : k + 1, :n]
            alone = ops.sinkhorn_plan_sums(*part, few, y[k : k + 1, :n], EPSILON)
            torch.testing.assert_close(rows[k : k + 1, :n], alone[0])
            torch.testing.assert_close(columns[k : k + 1, :m], alone[1])


def test_same_bits_for_any_thread_count_and_batch():
    cost, a, b, f, g = inputs(3, 70, 130, dtype=torch.float32)
    threads, runs = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            runs.append(ops.sinkhorn_plan_sums(cost, f, g, b, a, a, EPSILON))
    finally:
        torch.set_num_threads(threads)
    for other in runs[1:]:
        assert all(torch.equal(x, y) for x, y in zip(runs[0], other))
    alone = ops.sinkhorn_plan_sums(*(t[1:2] for t in (cost, f, g, b, a, a)), EPSILON)
    assert all(torch.equal(x[1:2], y) for x, y in zip(runs[0], alone))


def test_a_nan_stays_in_its_row_and_column_and_item():
    cost, a, b, f, g = inputs(2, 9, 11, dtype=torch.float32)
    cost[1, 2, 3] = torch.nan
    rows, columns = ops.sinkhorn_plan_sums(cost, f, g, b, None, a, EPSILON)
    assert rows.isnan().nonzero().tolist() == [[1, 2]]
    assert columns.isnan().nonzero().tolist() == [[1, 3]]


@pytest.mark.no_interpreter
def test_opcheck():
    cost, a, b, f, g = inputs(2, 6, 5)
    lengths = torch.tensor([[6, 5], [3, 2]])
    for c in (cost, cost.mT.contiguous().mT, cost[:1].expand(2, 6, 5)):
        for w, bounds in ((None, None), (a, lengths)):
            args = (c, f, g, b[:1].expand(2, 5), w, a, 0.1, True, bounds)
            torch.library.opcheck(ops.sinkhorn_plan_sums.default, args)


@pytest.mark.no_interpreter
def test_a_batch_of_gradients_and_compiled_graphs():
    tensors = inputs(2, 4, 5, grad=True)

    def call(*t):  # a number of the graph's own: a global float would be a dynamic one
        return plan_cost(*t, 0.2) + plan_marginals(*t, 0.2)[0].sum(-1)

    out = call(*tensors)
    each = [torch.autograd.grad(out[k], tensors, retain_graph=True) for k in range(2)]
    both = torch.autograd.grad(out, tensors, torch.eye(2).double(), is_grads_batched=True)
    for k, t in enumerate(both):
        torch.testing.assert_close(t, torch.stack([e[k] for e in each]))
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")(*tensors)
    torch.testing.assert_close(compiled, out)


@pytest.mark.no_interpreter
def test_nothing_of_the_plans_size_is_made():
    """Of a 600 x 500 problem: no tensor of 300,000 elements, but dC where it is asked for."""
    from torch.utils._python_dispatch import TorchDispatchMode

    made = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple | list) else (out,):
                if not isinstance(t, torch.Tensor) or t.numel() < 300_000:
                    continue
                if t.untyped_storage().data_ptr() != cost.untyped_storage().data_ptr():
                    made.append(str(func))
            return out

    cost, a, b = problem(600, 500)
    points = torch.randn(500, 2, device=DEVICE)
    a.requires_grad_()
    with Watch():
        r = sinkhorn(cost, a, b, epsilon=0.1, validate=False)
        value = r.transport_cost() + r.marginals()[0].square().sum() + r.f.square().sum()
        value.backward()
    assert not made, made
    assert a.grad.isfinite().all()
    with torch.no_grad(), solera.backend("reference"):
        want = r.plan() @ points
    mass = r.marginals()[0][:, None]
    torch.testing.assert_close(r.barycentric_projection(points), want / mass)
