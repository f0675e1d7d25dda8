"""Core streaming on padded clouds: every item is the problem it would be alone, whatever the padding holds."""

import pytest
import torch
from helpers import DEVICE, INTERPRETED, randn

import solera
from solera.sinkhorn import sinkhorn_points

# One item full, one without points in x, one without in y.
CASES = [(12, 20, (12, 1, 0, 7), (20, 5, 9, 0))]
if not INTERPRETED:
    CASES += [(300, 520, (300, 65), (511, 520))]
COSTS = ["sqeuclidean", "cosine"] if INTERPRETED else ["sqeuclidean", "cosine", "l1", "euclidean"]
FULL = ("f", "g", "cost", "marginal_error", "iterations", "converged")


def padded(n, m, rows, columns, weighted, grad=False, d=3):
    """Clouds and weights with NaN in the padding, the lengths, and each item cut out."""
    count = len(rows)
    x, y = randn(count, n, d, dtype=torch.float64), randn(count, m, d, dtype=torch.float64)
    a, b = (torch.rand(count, k, dtype=torch.float64, device=DEVICE) + 0.1 for k in (n, m))
    items = []
    for k, (p, q) in enumerate(zip(rows, columns)):
        a[k, :p] /= a[k, :p].sum()
        b[k, :q] /= b[k, :q].sum()
        weights = (a[k, :p].clone(), b[k, :q].clone()) if weighted else (None, None)
        items.append((x[k, :p].clone(), y[k, :q].clone(), *weights))
        x[k, p:] = y[k, q:] = a[k, p:] = b[k, q:] = torch.nan
    tensors = [t.requires_grad_(grad) for t in ((x, y, a, b) if weighted else (x, y))]
    return tensors, tuple(torch.tensor(t, device=DEVICE) for t in (rows, columns)), items


@pytest.mark.filterwarnings("ignore:solera.sinkhorn_points")  # five iterations are not enough
@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("n, m, rows, columns", CASES)
def test_same_as_the_items_alone(n, m, rows, columns, weighted, cost):
    options = {"epsilon": 0.3, "max_iterations": 5, "cost": cost, "tolerance": 1e-12}
    tensors, lengths, items = padded(n, m, rows, columns, weighted)
    for backend in ("auto", "reference"):
        with solera.backend(backend):
            r = sinkhorn_points(*tensors, lengths=lengths, **options)
            plan, marginals = r.plan(), r.marginals()
            assert not torch.cat([t.flatten() for t in (r.f, r.g, plan, *marginals)]).isnan().any()
            for k, item in enumerate(items):
                p, q = rows[k], columns[k]
                assert not plan[k, p:].any() and not plan[k, :, q:].any()
                assert not r.f[k, p:].any() and not r.g[k, q:].any()
                if p == 0 or q == 0:
                    assert r.cost[k] == 0 and r.converged[k] and r.iterations[k] == 0
                    assert not plan[k].any() and not r.f[k].any() and not r.g[k].any()
                    continue
                alone = sinkhorn_points(*item, **options)
                for name in FULL:
                    whole = getattr(r, name)[k]
                    whole = whole[:p] if name == "f" else whole[:q] if name == "g" else whole
                    torch.testing.assert_close(
                        whole, getattr(alone, name), rtol=1e-10, atol=1e-11, msg=name
                    )
                torch.testing.assert_close(plan[k, :p, :q], alone.plan(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("cost", ["sqeuclidean", "cosine"])
def test_gradients_stay_out_of_the_padding(cost):
    n, m, rows, columns = CASES[0]
    options = {"epsilon": 0.5, "max_iterations": 200, "cost": cost}
    tensors, lengths, items = padded(n, m, rows, columns, True, grad=True)
    r = sinkhorn_points(*tensors, lengths=lengths, **options)
    grads = torch.autograd.grad(r.cost.sum() + r.f.square().sum(), tensors)
    for k, item in enumerate(items):
        p, q = rows[k], columns[k]
        for t, length in zip(grads, (p, q, p, q)):
            assert not t[k, length:].any()
        if p == 0 or q == 0:
            assert not any(t[k].any() for t in grads)
            continue
        own = [t.requires_grad_() for t in item]
        alone = sinkhorn_points(*own, **options)
        wanted = torch.autograd.grad(alone.cost + alone.f.square().sum(), own)
        for t, w, length in zip(grads, wanted, (p, q, p, q)):
            torch.testing.assert_close(t[k, :length], w, rtol=1e-6, atol=1e-8)


def test_bad_lengths():
    x, y = torch.rand(2, 4, 3, device=DEVICE), torch.rand(2, 5, 3, device=DEVICE)
    with pytest.raises(TypeError, match="lengths: expected None or a pair"):
        sinkhorn_points(x, y, epsilon=0.1, lengths=3)
    with pytest.raises(ValueError, match=r"lengths\[1\]: expected a length in \[0, 5\], got 6"):
        sinkhorn_points(x, y, epsilon=0.1, lengths=(None, 6))
    with pytest.raises(ValueError, match=r"lengths\[0\]: expected shape \(2,\) to go with x of"):
        sinkhorn_points(x, y, epsilon=0.1, lengths=(torch.ones(3, dtype=torch.int64), None))
    long = torch.tensor([4, 5], device=DEVICE)
    with pytest.raises(ValueError, match=r"lengths\[0\]: expected lengths in \[0, 4\], got 4 to 5"):
        sinkhorn_points(x, y, epsilon=0.1, lengths=(long, None), validate=True)


@pytest.mark.no_interpreter
def test_barycentric_projection_of_a_problem_without_points():
    x, y = randn(3, 4, 2, grad=True), randn(3, 5, 2)
    lengths = tuple(torch.tensor(t, device=DEVICE) for t in ((4, 0, 2), (3, 5, 0)))
    found = sinkhorn_points(x, y, epsilon=0.5, lengths=lengths).barycentric_projection()
    assert torch.isfinite(found).all() and found[0].any() and not found[1:].any()
    assert torch.isfinite(torch.autograd.grad(found.sum(), x)[0]).all()
