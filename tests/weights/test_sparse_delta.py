"""Core sparse_delta: a linear layer with trained entries in a frozen weight, against the formula in float64."""

import pytest
import torch
from helpers import DEVICE, DTYPES, INTERPRETED, assert_accurate, double, randn
from torch.nn import functional as F

import solera
from solera.weights import (
    sparse_delta_linear,
    sparse_delta_weight,
    sparse_nuclear_norm,
    sparse_select,
)

ops = torch.ops.solera
SHAPES = [(5, 24, 7), (3, 1, 1), (6, 40, 3)]
if not INTERPRETED:
    SHAPES += [(70, 1024, 300), (17, 2100, 33), (600, 130, 90)]


def formula(x, w, index, p, b):
    """W with W[M] = p, by a scatter into a dense weight."""
    return F.linear(x, w.flatten().scatter(0, index, p).view(w.shape), b)


def make(n, i, o, dtype=torch.float32, share=0.2):
    x = randn(n, i, dtype=dtype, grad=True)
    w = randn(o, i, dtype=dtype, scale=i**-0.5)
    index = torch.nonzero(torch.rand(o * i, device=DEVICE) < share).squeeze(1)
    p = (w.flatten()[index] + randn(len(index), dtype=dtype, scale=0.1)).requires_grad_()
    return x, w, index, p, randn(o, dtype=dtype, grad=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sara_is_the_papers_formula(dtype):
    for n, i, o in SHAPES:
        x, w, index, p, b = make(n, i, o, dtype)
        g = randn(n, o, dtype=dtype)

        def run(f, x, w, p, b, g, index=index):
            y = f(x, w, index, p, b)
            return y, *torch.autograd.grad(y, [x, p, b], g)

        ours, eager = run(sparse_delta_linear, x, w, p, b, g), run(formula, x, w, p, b, g)
        xd, wd, pd, bd = double(x, w, p, b)
        truths = run(formula, xd, wd, pd, bd, g.double())
        for a, e, c in zip(ours, eager, truths):
            assert a.dtype == dtype
            assert_accurate(a, c, e)
        with torch.no_grad():
            assert torch.equal(sparse_delta_linear(x, w, index, p, b), ours[0])


def test_entries_at_the_edges_none_and_all():
    x, w, _, _, b = make(4, 6, 5)
    for places in ([], [0], [29], [0, 5, 6, 29], list(range(30))):
        index = torch.tensor(places, dtype=torch.int64, device=DEVICE)
        p = randn(len(places), grad=True)
        y = sparse_delta_linear(x, w, index, p, b)
        torch.testing.assert_close(y, formula(x, w, index, p, b))
        got = torch.autograd.grad(y.square().sum(), [x, p])
        want = torch.autograd.grad(formula(x, w, index, p, b).square().sum(), [x, p])
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n, i, o", [(0, 5, 4), (3, 5, 0)])
def test_empty(n, i, o):
    x, w, index, p, b = make(n, i, o)
    y = sparse_delta_linear(x, w, index, p, b)
    dx, dp, db = torch.autograd.grad(y.sum(), [x, p, b])
    assert y.shape == (n, o) and not dp.any() and not dx.any() and (db == n).all()


def test_dtypes_together_shapes_and_autocast():
    x, w, index, p, b = make(6, 20, 9)
    half = sparse_delta_linear(x.bfloat16(), w.bfloat16(), index, p, None)
    want = formula(x.bfloat16().double(), w.bfloat16().double(), index, p.double(), None)
    assert half.dtype == torch.bfloat16
    assert_accurate(half, want, half if INTERPRETED else None)
    (dp,) = torch.autograd.grad(half.sum(), p)
    assert dp.dtype == torch.float32
    deep = sparse_delta_linear(x.view(2, 3, 20), w, index, p, b)
    torch.testing.assert_close(deep, sparse_delta_linear(x, w, index, p, b).view(2, 3, 9))
    with torch.autocast(DEVICE, torch.bfloat16):
        assert sparse_delta_linear(x, w, index, p, b).dtype == torch.bfloat16


@pytest.mark.no_interpreter
@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU the product is torch's")
def test_same_bits_for_any_thread_count_and_batch():
    x, w, index, p, b = make(256, 1536, 300)
    g = randn(256, 300)

    def run(rows=256):
        y = sparse_delta_linear(x[:rows], w, index, p, b)
        return y, *torch.autograd.grad(y, [x, p, b], g[:rows])

    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(run())
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, c) for a, c in zip(found[0], other))
    for rows in (1, 7):
        y, dx, *_ = run(rows)
        assert torch.equal(y, found[0][0][:rows]) and torch.equal(dx[:rows], found[0][1][:rows])


def test_gradcheck():
    x, w, index, p, b = make(3, 5, 4, torch.float64, 0.4)
    call = lambda x, p, b: sparse_delta_linear(x, w, index, p, b)
    assert torch.autograd.gradcheck(call, (x, p, b))
    assert torch.autograd.gradgradcheck(call, (x, p, b))
    dense = lambda w, p: sparse_delta_weight(w, index, p)
    assert torch.autograd.gradcheck(dense, (w.clone().requires_grad_(), p))
    assert torch.autograd.gradcheck(lambda p: sparse_nuclear_norm(p, index, (4, 5)), (p,))


@pytest.mark.parametrize("form", ["plain", "transposed", "expanded"])
def test_opcheck(form):
    def turn(t):
        return (
            t
            if form == "plain"
            else t.t().contiguous().t()
            if form == "transposed"
            else t[:1].expand_as(t)
        )

    x, w, index, p, b = (t.detach() for t in make(5, 6, 4))
    x, w, dy = turn(x), turn(w), turn(randn(5, 4))
    torch.library.opcheck(ops.sparse_delta_linear.default, (x, w, index, p, b))
    backward = ops.sparse_delta_linear_backward.default
    torch.library.opcheck(backward, (dy, x, w, index, p, True, True, True))
    torch.library.opcheck(backward, (dy, x, w, index, p, False, True, False))


def test_compile_and_torch_func():
    def f(x, w, index, p, b):
        return sparse_delta_linear(x, w, index, p, b)

    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    for n, i in ((4, 6), (5, 9)):
        x, w, index, p, b = make(n, i, 7)
        got, want = compiled(x, w, index, p, b), f(x, w, index, p, b)
        torch.testing.assert_close(got, want)
        grads = [torch.autograd.grad(y.square().sum(), [x, p, b]) for y in (got, want)]
        torch.testing.assert_close(*grads)
    scalar = lambda p: f(x.detach(), w, index, p, None).square().sum()
    torch.testing.assert_close(
        torch.func.grad(scalar)(p.detach()), torch.autograd.grad(scalar(p), p)[0]
    )
    rows = torch.vmap(lambda x: f(x, w, index, p, None))(x.detach())
    torch.testing.assert_close(rows, f(x.detach(), w, index, p, None))


def test_select_and_its_progression():
    w = randn(20, 30)
    index = sparse_select(w, 0.5)
    assert torch.equal(index, torch.nonzero(w.flatten().abs() < 0.5).squeeze(1))
    value = w.flatten()[index] * torch.linspace(0, 3, len(index), device=DEVICE)
    left = sparse_select(value, 0.5, index)
    assert torch.equal(left, index[value.abs() < 0.5]) and 0 < len(left) < len(index)
    merged = sparse_delta_weight(w, index, value)
    assert torch.equal(merged.flatten()[index], value)
    outside = torch.ones_like(w, dtype=torch.bool).flatten()
    outside[index] = False
    assert torch.equal(merged.flatten()[outside], w.flatten()[outside])
    with solera.backend("reference"):
        x = randn(2, 30)
        y = sparse_delta_linear(x, w, index, value)
    torch.testing.assert_close(sparse_delta_linear(x, w, index, value), y)


def test_nuclear_norm_is_the_papers_regulariser():
    w = randn(8, 6, dtype=torch.float64)
    mask = w.abs() < 0.8
    index, p = sparse_select(w, 0.8), w[mask].clone().requires_grad_()
    u, s, vh = torch.linalg.svd(torch.where(mask, w, 0.0), full_matrices=False)
    norm = sparse_nuclear_norm(p, index, (8, 6))
    torch.testing.assert_close(norm, s.sum())
    (grad,) = torch.autograd.grad(norm, p)
    torch.testing.assert_close(grad, (u @ vh)[mask])
    assert sparse_nuclear_norm(p.half(), index, (8, 6)).dtype == torch.float32


def test_bad_input():
    x, w, index, p, _ = make(3, 4, 5)
    wrong = lambda *places: torch.tensor(places, device=DEVICE)
    cases = [
        (lambda: sparse_delta_linear(x, w, index.int(), p), TypeError, "index: expected an int64"),
        (lambda: sparse_delta_linear(x, w, [1], p), TypeError, "index: expected an int64"),
        (lambda: sparse_delta_linear(x, w, index, p[:-1]), ValueError, "value: expected shape"),
        (lambda: sparse_delta_linear(x, w, wrong(1, 1), p[:2]), ValueError, "index: expected incr"),
        (lambda: sparse_delta_linear(x, w, wrong(2, 1), p[:2]), ValueError, "index: expected incr"),
        (lambda: sparse_delta_linear(x, w, wrong(3, 20), p[:2]), ValueError, "below 20"),
        (lambda: sparse_delta_linear(x, w, wrong(-1, 2), p[:2]), ValueError, "index: expected incr"),
        (lambda: sparse_delta_linear(x, w.requires_grad_(), index, p), ValueError, "weight: expected a frozen"),
        (lambda: sparse_delta_linear(x[:, :3], w, index, p), ValueError, "x: expected 4 features"),
        (lambda: sparse_select(w, -1.0), ValueError, "threshold: expected"),
        (lambda: sparse_nuclear_norm(p, index, (20,)), ValueError, "shape: expected"),
    ]  # fmt: skip
    for call, error, message in cases:
        with pytest.raises(error, match=message):
            call()
