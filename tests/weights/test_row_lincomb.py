"""Core row_lincomb: the kernel against the formula in float64, its gradients, and its bad input."""

import pytest
import torch
from helpers import DEVICE, DTYPES, INTERPRETED, ULP, assert_accurate, randn
from hypothesis import given
from hypothesis import strategies as st

import solera
from solera.weights import lincomb, row_lincomb

ops = torch.ops.solera
SHAPES = [(1, 1), (3, 5), (4, 2, 9), (2, 2048 + 24), (3, 16384 + 17)]


def exact(tensors, c, base=None, dim=0):
    """The formula in float64; c (K, rows) of one tensor."""
    c = c.double()
    if tensors[0].dim() > 1:
        dim = dim % tensors[0].dim()
        c = c.reshape(len(c), *[-1 if i == dim else 1 for i in range(tensors[0].dim())])
    elif tensors[0].dim() == 0:
        c = c[:, 0]
    b = 0 if base is None else base.double()
    return b + sum(ck * (w.double() - b) for ck, w in zip(c, tensors))


def assert_combines(value, tensors, c, base=None, dim=0):
    truth = exact(tensors, c, base, dim)
    size = exact([t.abs() for t in tensors], c.abs(), None, dim).norm()
    if base is not None:
        size = size + base.double().norm() * (1 + c.double().abs().sum())
    rounding = 1.2e-7 * size * (1 if value.dtype != torch.float64 else 1e-8)
    assert (value.double() - truth).norm() <= rounding + ULP[value.dtype] * truth.norm()


@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", (1, 3, 9) if INTERPRETED else (1, 2, 3, 4, 7, 8, 11))
def test_forward_and_backward_against_float64(count, dtype, with_base):
    for shape in SHAPES[:3] if INTERPRETED else SHAPES:
        tensors = [randn(*shape, dtype=dtype, grad=True) for _ in range(count)]
        base = randn(*shape, dtype=dtype, grad=True) if with_base else None
        c_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        c = randn(count, shape[0], dtype=c_dtype, grad=True)
        inputs = [c, *tensors, *([base] if with_base else [])]
        y = row_lincomb(tensors, c, base=base)
        g = randn(*shape, dtype=dtype)
        dc, *rest = torch.autograd.grad(y, inputs, g)
        assert y.dtype == dtype and y.is_contiguous()
        assert_combines(y.detach(), [t.detach() for t in tensors], c.detach(), base)
        copies = [t.detach().double().requires_grad_() for t in inputs]
        truth = exact(copies[1 : count + 1], copies[0], copies[-1] if with_base else None)
        dtruth, *truths = torch.autograd.grad(truth, copies, g.double())
        terms = (g.double().norm() * tensors[0].detach().double().norm() * count).item()
        assert (dc.double() - dtruth).norm() <= 4 * ULP[c_dtype] * terms
        for a, b in zip(rest, truths):
            assert a.dtype == dtype
            assert_accurate(a, b, b.to(torch.float32))


def test_one_coefficient_for_all_rows_is_lincomb():
    shapes = [(4, 5), (7,), (), (30, 20), (0, 3)]
    models = [[randn(s) for s in shapes] for _ in range(3)]
    base = [randn(s) for s in shapes]
    rows = [4, 1, 1, 30, 0]
    c = randn(3, len(shapes))
    every = torch.cat([c[:, i : i + 1].expand(3, n) for i, n in enumerate(rows)], 1)
    assert all(
        torch.equal(a, b)
        for a, b in zip(row_lincomb(models, every, base=base), lincomb(models, c, base=base))
    )
    named = [{"w": m[0], "n": torch.tensor(3, device=DEVICE), "b": m[1]} for m in models]
    out = row_lincomb(named, every[:, :5])
    assert list(out) == ["w", "n", "b"] and out["n"] == 3
    assert torch.equal(out["w"], row_lincomb([m[0] for m in models], every[:, :4]))


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_any_dim_and_gradients(dim):
    tensors = [randn(3, 2, 4, dtype=torch.float64, grad=True) for _ in range(3)]
    base = randn(3, 2, 4, dtype=torch.float64, grad=True)
    c = randn(3, (3, 2, 4)[dim], dtype=torch.float64, grad=True)

    def f(c, base, *tensors):
        return row_lincomb(tensors, c, base=base, dim=dim)

    assert_accurate(f(c, base, *tensors), exact(tensors, c, base, dim))
    assert torch.autograd.gradcheck(f, (c, base, *tensors), fast_mode=True)
    assert torch.autograd.gradgradcheck(f, (c, base, *tensors), fast_mode=True)
    mixed = [tensors[0].float(), tensors[1].bfloat16(), tensors[2].float()]
    for out_dtype in (None, torch.bfloat16, torch.float64):
        y = row_lincomb(mixed, c, dim=dim, out_dtype=out_dtype)
        assert y.dtype == (out_dtype or torch.float32) and y.is_contiguous()
        assert_combines(y.detach(), [t.detach() for t in mixed], c.detach(), None, dim)


def test_strided_expanded_and_frozen():
    w, c = randn(12, 20), randn(3, 12)
    for view in (randn(20, 12).t(), w[:, ::2], w[:, :1].expand(12, 20), w.flip(0)):
        dense = view.contiguous()
        y = row_lincomb([view, dense, view], c, base=view * 2)
        assert torch.equal(y, row_lincomb([dense] * 3, c, base=dense * 2))
    tensors = [randn(12, 20) for _ in range(3)]
    tensors[1].requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.numel()) or t, lambda t: t
    ):
        y = row_lincomb(tensors, c)
    assert sum(saved) == c.numel()  # no tensor is needed for dw
    (dw,) = torch.autograd.grad(y.sum(), tensors[1])
    assert torch.equal(dw, c[1][:, None].expand(12, 20))
    nan = torch.full((12, 20), float("nan"), device=DEVICE)
    nan[1:] = 1
    y = row_lincomb([nan, tensors[0]], c[:2])
    assert y[0].isnan().all() and y[1:].isfinite().all()


@given(
    shapes=st.lists(st.lists(st.integers(0, 6), max_size=3), min_size=1, max_size=4),
    count=st.integers(1, 9),
    with_base=st.booleans(),
    dim=st.sampled_from([0, -1]),
)
def test_any_shapes_and_counts(shapes, count, with_base, dim):
    models = [[randn(s) for s in shapes] for _ in range(count)]
    base = [randn(s) for s in shapes] if with_base else None
    rows = [s[dim] if len(s) > 1 else 1 for s in shapes]
    parts = [randn(count, n) for n in rows]
    out = row_lincomb(models, torch.cat(parts, 1), base=base, dim=dim)
    for item, y in enumerate(out):
        b = None if base is None else base[item]
        assert y.shape == torch.Size(shapes[item])
        assert_combines(y, [m[item] for m in models], parts[item], b, dim)


def test_same_bits_for_any_thread_count():
    rows = 9 if INTERPRETED else 30
    tensors, c = [randn(rows, 700) for _ in range(5)], randn(5, rows, grad=True)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            y = row_lincomb(tensors, c)
            results.append((y, *torch.autograd.grad(y, c, y.detach())))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))
    part = row_lincomb([t[2:6] for t in tensors], c[:, 2:6])
    assert torch.equal(part, results[0][0][2:6])


def test_contract_with_torch():
    a, b, g = randn(4, 6), randn(6, 4).t(), randn(1, 6).expand(4, 6)
    small = randn(3, 2)
    c = randn(7, 2).t()
    for base in ([], [a, small]):
        tensors = [a, small, b, small]
        for out_dtype in (None, torch.bfloat16):
            torch.library.opcheck(ops.row_lincomb.default, (tensors, c, base, out_dtype))
        for need in (True, False):
            flags = [need, True, False, True] + [True] * len(base)
            args = ([g, small], tensors, c, base, need, flags)
            torch.library.opcheck(ops.row_lincomb_backward.default, args)

    def f(c, base, *tensors):
        return row_lincomb(tensors, c, base=base) * 2

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (4, 7):
        args = [randn(3, n, grad=True), *[randn(n, 6, grad=True) for _ in range(4)]]
        ours, plain = compiled(*args), f(*args)
        torch.testing.assert_close(ours, plain)
        y = randn(*plain.shape)
        for p, q in zip(torch.autograd.grad(ours, args, y), torch.autograd.grad(plain, args, y)):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)
    args = [t.detach() for t in args]
    grad = torch.func.grad(lambda c, *rest: f(c, *rest).square().sum())(*args)
    leaf = args[0].clone().requires_grad_()
    (plain,) = torch.autograd.grad(f(leaf, *args[1:]).square().sum(), leaf)
    torch.testing.assert_close(grad, plain, rtol=1e-4, atol=1e-4)
    many = randn(2, *args[0].shape)
    mapped = torch.func.vmap(lambda c: f(c, *args[1:]))(many)
    torch.testing.assert_close(mapped, torch.stack([f(c, *args[1:]) for c in many]))
    y = f(*args)
    with solera.backend("reference"):
        torch.testing.assert_close(f(*args), y)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert torch.equal(f(*args), y)


def test_bad_input():
    a, c = torch.ones(3, 2, device=DEVICE), torch.ones(2, 3, device=DEVICE)
    for call, kind, message in (
        (lambda: row_lincomb([a, a], c[:, :2]), ValueError, r"coefficients: expected shape \(2, 3\)"),
        (lambda: row_lincomb([a, a], c, dim=1), ValueError, r"coefficients: expected shape \(2, 2\)"),
        (lambda: row_lincomb([a, a], [1.0, 2.0]), TypeError, "coefficients: expected a tensor"),
        (lambda: row_lincomb([a, a], c.long()), TypeError, "coefficients: expected a floating-point"),
        (lambda: row_lincomb([a, a], c.to("meta")), ValueError, "coefficients: expected device"),
        (lambda: row_lincomb([a, a[:2]], c), ValueError, r"tensors\[1\]: expected shape"),
        (lambda: row_lincomb([a, a], c, base=a[0]), ValueError, "base: expected shape"),
        (lambda: row_lincomb([a, a], c, dim=-3), ValueError, "dim: -3 is out of range"),
        (lambda: row_lincomb([a, a], c, dim=None), TypeError, "dim: expected an integer"),
        (lambda: row_lincomb([a, a], c, out_dtype=torch.int32), TypeError, "out_dtype: expected float32"),
        (lambda: row_lincomb([], c), ValueError, "tensors: expected at least one model"),
    ):  # fmt: skip
        with pytest.raises(kind, match=message):
            call()
