"""Core dense on padded batches: every item is the problem it would be alone, whatever the padding holds."""

import pytest
import torch
from helpers import DEVICE, INTERPRETED
from sinkhorn_problems import problem

import solera
from solera.sinkhorn import SinkhornResult, sinkhorn

# In one program, in tiles of rows and wider (on the GPU); one item full, one without rows, one without columns.
CASES = [(12, 20, (12, 1, 0, 7), (20, 5, 9, 0))]
CASES += [(40, 130, (17, 40), (130, 60)), (3, 2100, (2, 3), (2100, 70))]
if not INTERPRETED:
    CASES += [(300, 520, (300, 65, 129), (511, 520, 8))]
FULL = ("f", "g", "cost", "marginal_error", "iterations", "converged")


def padded(n, m, rows, columns, dtype=torch.float64, grad=False):
    """Costs and weights with NaN in the padding, the lengths, and each item cut out."""
    count = len(rows)
    cost, a, b = problem(count, n, m, dtype=dtype)
    lengths = tuple(torch.tensor(t, device=DEVICE) for t in (rows, columns))
    items = []
    for k, (p, q) in enumerate(zip(rows, columns)):
        total_a, total_b = a[k, :p].sum(), b[k, :q].sum()
        a[k, :p] /= total_a
        b[k, :q] /= total_b
        items.append((cost[k, :p, :q].clone(), a[k, :p].clone(), b[k, :q].clone()))
        cost[k, p:] = cost[k, :, q:] = a[k, p:] = b[k, q:] = torch.nan
    return [t.requires_grad_(grad) for t in (cost, a, b)], lengths, items


OPTIONS = [
    {"epsilon": 0.05, "max_iterations": 5},
    {"epsilon": 0.05, "max_iterations": 6, "rho": (0.3, None), "momentum": 1.5},
]


@pytest.mark.parametrize("options", OPTIONS, ids=["hard", "general"])
@pytest.mark.parametrize("n, m, rows, columns", CASES)
def test_same_as_the_items_alone(n, m, rows, columns, options):
    tensors, lengths, items = padded(n, m, rows, columns)
    init = (torch.full_like(tensors[1], 0.1), torch.full_like(tensors[2], 0.1))
    for backend in ("auto", "reference"):
        with solera.backend(backend):
            r = sinkhorn(*tensors, lengths=lengths, init=init, **options)
            plan = r.plan()
            for k, item in enumerate(items):
                p, q = rows[k], columns[k]
                assert not plan[k, p:].any() and not plan[k, :, q:].any()
                assert not r.f[k, p:].any() and not r.g[k, q:].any()
                if p == 0 or q == 0:
                    assert r.cost[k] == 0 and r.converged[k] and r.iterations[k] == 0
                    assert not plan[k].any() and not r.f[k].any() and not r.g[k].any()
                    continue
                alone = sinkhorn(*item, init=(init[0][k, :p], init[1][k, :q]), **options)
                for name in FULL:
                    whole = getattr(r, name)[k]
                    whole = whole[:p] if name == "f" else whole[:q] if name == "g" else whole
                    want = getattr(alone, name)
                    if backend == "auto" and not INTERPRETED:
                        assert torch.equal(whole, want), name
                    else:
                        torch.testing.assert_close(whole, want)
                torch.testing.assert_close(plan[k, :p, :q], alone.plan(), rtol=1e-10, atol=0)


def test_uniform_weights_and_lengths_of_one_side():
    cost = torch.rand(3, 6, 5, dtype=torch.float64, device=DEVICE)
    lengths = (torch.tensor([6, 2, 0], device=DEVICE, dtype=torch.int32), None)
    r = sinkhorn(cost, epsilon=0.2, lengths=lengths, max_iterations=40)
    torch.testing.assert_close(r.plan()[1].sum(0), torch.full_like(r.g[1], 0.2))
    torch.testing.assert_close(r.f[1, :2], sinkhorn(cost[1, :2], epsilon=0.2, max_iterations=40).f)
    one = sinkhorn(cost[0], epsilon=0.2, lengths=(4, 3), max_iterations=40)
    torch.testing.assert_close(
        one.f[:4], sinkhorn(cost[0, :4, :3], epsilon=0.2, max_iterations=40).f
    )


@pytest.mark.no_interpreter
@pytest.mark.parametrize("rho", [None, 0.4, (0.3, None)], ids=str)
def test_gradients_are_those_of_the_items_alone(rho):
    tensors, lengths, items = padded(7, 6, (7, 4, 0), (5, 6, 3), grad=True)
    options = {"epsilon": 0.3, "max_iterations": 300, "rho": rho}
    v = torch.rand(6, 2, dtype=torch.float64, device=DEVICE)

    def loss(r):
        w = v[: r.g.shape[-1]]
        return (
            r.cost.sum() + r.f.square().sum() + r.transport_cost().sum() + r.apply(w).sin().sum()
            + (r.barycentric_projection(w) ** 2).sum() + r.marginals()[1].square().sum()
        )  # fmt: skip

    for create_graph in (False, True):
        r = sinkhorn(*tensors, lengths=lengths, **options)
        grads = torch.autograd.grad(loss(r), tensors, create_graph=create_graph)
        for k, item in enumerate(items):
            p, q = item[0].shape
            for x in (grads[0][k, p:], grads[0][k, :, q:], grads[1][k, p:], grads[2][k, q:]):
                assert not x.any()
            if p == 0:
                assert not grads[0][k].any()
                continue
            item = [t.clone().requires_grad_() for t in item]
            want = torch.autograd.grad(loss(sinkhorn(*item, **options)), item)
            got = (grads[0][k, :p, :q], grads[1][k, :p], grads[2][k, :q])
            for x, y in zip(got, want):
                if rho is None and x.dim() == 1:  # along the simplex: up to a constant
                    x, y = x - x.mean(), y - y.mean()
                torch.testing.assert_close(x, y, rtol=1e-7, atol=1e-9)


def test_compile_and_pytree():
    tensors, lengths, _ = padded(5, 6, (5, 3), (6, 2), dtype=torch.float32)

    def f(cost, a, b, p, q):
        r = sinkhorn(cost, a, b, epsilon=0.3, lengths=(p, q), rho=(0.5, None), momentum=1.5)
        return r, r.plan(), r.cost.sum() + r.f.square().sum()

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    tensors = [t.requires_grad_() for t in tensors]
    got, want = compiled(*tensors, *lengths), f(*tensors, *lengths)
    assert isinstance(got[0], SinkhornResult)
    torch.testing.assert_close(got[0].f, want[0].f)
    torch.testing.assert_close(got[1], want[1])
    for x, y in zip(torch.autograd.grad(got[2], tensors), torch.autograd.grad(want[2], tensors)):
        torch.testing.assert_close(x, y)


def test_opcheck():
    (cost, a, b), lengths, _ = padded(5, 6, (5, 3), (6, 2), dtype=torch.float32)
    a, b = a.nan_to_num(), b.nan_to_num()
    lengths = torch.stack(lengths, -1)
    ops = torch.ops.solera
    torch.library.opcheck(
        ops.sinkhorn_dense.default,
        (cost, a, b, None, None, 0.1, 5, 0.0, 2, 0.5, None, 1.5, lengths),
    )
    f, g = torch.zeros_like(a), torch.zeros_like(b)
    torch.library.opcheck(ops.sinkhorn_plan.default, (cost, a, b, f, g, a, None, 0.1, lengths))
    args = (torch.ones((), device=DEVICE).expand(2, 5, 6), cost, a, b, f, g, 0.1, lengths)
    torch.library.opcheck(ops.sinkhorn_plan_backward.default, args)


BAD = [
    (3, TypeError, "lengths: expected None or a pair"),
    ((1, 2, 3), TypeError, "lengths: expected None or a pair"),
    ((4, None), ValueError, r"lengths\[0\]: expected a length in \[0, 3\], got 4"),
    ((None, "2"), TypeError, r"lengths\[1\]: expected None, an int or a tensor, got str"),
    ((torch.ones(2), None), TypeError, r"lengths\[0\]: expected integers, got torch.float32"),
    ((torch.ones(3, dtype=torch.int64), None), ValueError, r"lengths\[0\]: expected shape \(2,\)"),
    ((torch.full((2,), 5), None), ValueError, r"lengths\[0\]: expected lengths in \[0, 3\], got 5 to 5"),
]  # fmt: skip


@pytest.mark.parametrize("lengths, error, match", BAD, ids=[m for _, _, m in BAD])
def test_bad_lengths(lengths, error, match):
    if isinstance(lengths, tuple):
        lengths = tuple(t.to(DEVICE) if isinstance(t, torch.Tensor) else t for t in lengths)
    with pytest.raises(error, match=match):
        sinkhorn(torch.rand(2, 3, 4, device=DEVICE), epsilon=1, lengths=lengths, validate=True)


def test_lengths_out_of_range_are_held_inside():
    cost = torch.rand(2, 3, 4, device=DEVICE)
    lengths = tuple(torch.tensor(t, device=DEVICE) for t in ((-5, 9), (4, 2)))
    r = sinkhorn(cost, epsilon=1, lengths=lengths, validate=False)
    assert r.cost[0] == 0 and not r.plan()[0].any()
    torch.testing.assert_close(r.f[1], sinkhorn(cost[1, :, :2], epsilon=1).f)
