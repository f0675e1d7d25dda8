"""Core model_stock: the op against its reference, and the routes that keep the sums in different places."""

import pytest
import torch
from helpers import DEVICE, DTYPES, INTERPRETED, ULP, randn, relative_error

import solera
from solera.weights import gram, lincomb, model_stock
from solera.weights.model_stock import stock_coefficients

ops = torch.ops.solera
F64, F32, BF16, F16 = DTYPES


def near(base, count):
    """Models whose differences from the base have a part in common."""
    common = torch.randn_like(base)
    return [base + common + torch.randn_like(base) for _ in range(count)]


def exact(base, models, dim=None):
    """The two cores in float64."""
    up = [m.double() for m in models]
    dots = gram([[m] for m in up], base=[base.double()])
    return lincomb(up, stock_coefficients(dots)[:, 0], base=base.double())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [2, 5] if INTERPRETED else [2, 3, 4, 5, 8, 9])
def test_op_against_float64(count, dtype):
    for shape in ((1,), (3, 5)) if INTERPRETED else ((1,), (3, 5), (1048,), (3, 11017)):
        base = randn(*shape, dtype=dtype)
        models = near(base, count)
        (merged,), dots = ops.model_stock(models, [base], count, False)
        assert merged.dtype == dtype and merged.is_contiguous()
        assert torch.equal(dots, ops.gram(models, [base], count, False))
        assert relative_error(merged, exact(base, models)) <= ULP[dtype]
        rows, dots = ops.model_stock(models, [base], count, len(shape) > 1)
        if len(shape) > 1:
            for r in range(shape[0]):
                truth = exact(base[r], [m[r] for m in models])
                assert relative_error(rows[0][r], truth) <= ULP[dtype]


def test_mixed_and_strided():
    base = randn(24, 6, dtype=F32)
    tuned = near(base, 2)
    for dtypes in ((BF16, F16, F16), (F32, BF16, F16), (F32, F32, F64)):
        column = [t.to(d) for t, d in zip([base, *tuned], dtypes)]
        merged, _ = model_stock(column[0], column[1:])
        assert merged.dtype == (F64 if F64 in dtypes else F32)
        assert relative_error(merged, exact(column[0], column[1:])) <= ULP[merged.dtype]
    views = [t.t() for t in (base, *tuned)]
    merged, _ = model_stock(views[0], views[1:])
    dense, _ = model_stock(views[0].contiguous(), [v.contiguous() for v in views[1:]])
    assert torch.equal(merged, dense)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.no_interpreter
def test_same_bits_wherever_the_sums_are_kept(dtype):
    """Large tensors keep the sums in their result, or (half) form them again: beside a small one with the same t."""
    base, *models = (torch.randint(-9, 10, (16384,), device=DEVICE).to(dtype) for _ in range(4))
    models = [base + 3 + m for m in models]
    small, ratio = model_stock(base, models)  # its sums fit a group's memory
    assert 0 < ratio < 1
    large, same = model_stock(base.repeat(256), [m.repeat(256) for m in models])
    assert ratio == same and torch.equal(large, small.repeat(256))
    rows, _ = model_stock(base.repeat(2, 1), [m.repeat(2, 1) for m in models], dim=0)
    assert torch.equal(rows[0], small) and torch.equal(rows[1], small)


def test_same_bits_for_any_thread_count_list_and_graph():
    sizes = (40000, 3, 16384, 0, 16385) if not INTERPRETED else (5000, 3)
    base = [randn(n) for n in sizes]
    models = [list(column) for column in zip(*(near(b, 5) for b in base))]
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(model_stock(base, models))
    finally:
        torch.set_num_threads(threads)
    leaves = [[t.clone().requires_grad_() for t in m] for m in models]
    results.append(model_stock(base, leaves))
    assert results[-1][0][0].requires_grad
    for merged, ratios in results[1:]:
        assert torch.equal(ratios, results[0][1])
        assert all(torch.equal(a, b) for a, b in zip(merged, results[0][0]))
    for item, b in enumerate(base):
        alone, _ = model_stock(b, [m[item] for m in models])
        assert torch.equal(alone, results[0][0][item])
    rows = [torch.stack([t[0][:60], t[0][60:120]]) for t in (base, *models)]
    merged, ratios = model_stock(rows[0], rows[1:], dim=0)
    rows = [t.requires_grad_() for t in rows]
    again, again_ratios = model_stock(rows[0], rows[1:], dim=0)
    assert torch.equal(merged, again) and torch.equal(ratios, again_ratios)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parts_with_the_dots_of_the_whole(dtype):
    base = randn(3, 2741, dtype=dtype)
    models = near(base, 3)
    for by_row in (False, True):
        (merged,), dots = ops.model_stock(models, [base], 3, by_row)
        for begin, end in ((0, 1000), (1000, 2741)):
            part = [t[:, begin:end] for t in models]
            (found,), same = ops.model_stock(part, [base[:, begin:end]], 3, by_row, dots)
            assert torch.equal(same, dots) and same.data_ptr() != dots.data_ptr()
            assert torch.equal(found, merged[:, begin:end])
    for wrong in (dots[:2], dots.float(), dots[:, :2, :2]):
        with pytest.raises(RuntimeError, match="model_stock: expected 3 float64 matrices"):
            ops.model_stock(models, [base], 3, True, wrong)


def test_extreme_values():
    nan = float("nan")
    base = torch.zeros(70, device=DEVICE)
    bad = torch.ones(70, device=DEVICE)
    bad[3] = nan
    merged, ratio = model_stock([base, base], [[bad, base + 1], [base + 2, base + 1]])
    assert ratio[0].isnan() and merged[0].isnan().all()
    assert ratio[1] == 1 and torch.equal(merged[1], base + 1)
    empty, ratio = model_stock(base[:0], [base[:0]] * 2)
    assert empty.shape == (0,) and ratio == 0
    empty, ratio = model_stock(base[:0].reshape(0, 3), [base[:0].reshape(0, 3)] * 2, dim=0)
    assert empty.shape == (0, 3) and ratio.shape == (0,)


# ---- the contract with torch --------------------------------------------------------------------------


def test_opcheck():
    a, b, c = randn(4, 6), randn(6, 4).t(), randn(1, 6).expand(4, 6)
    small = randn(3, 2, dtype=BF16)
    for by_row in (False, True):
        args = [a, small, b, small * 2], [c, small], 2, by_row
        torch.library.opcheck(ops.model_stock.default, args)
        _, dots = ops.model_stock(*args)
        torch.library.opcheck(ops.model_stock.default, [*args, dots])


def compiled_matches(backend):
    def f(base, *tensors):
        merged, ratio = model_stock([base, base[0]], [[t, t[0]] for t in tensors])
        rows, _ = model_stock(base, tensors, dim=0)
        return merged[0] + merged[1] + rows, ratio

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend=backend)
    for n in (4, 7):
        base = randn(n, 6)
        args = [base.requires_grad_(), *(m.detach().requires_grad_() for m in near(base, 3))]
        ours, plain = compiled(*args), f(*args)
        torch.testing.assert_close(ours, plain)
        g = torch.randn_like(plain[0])
        for p, q in zip(
            torch.autograd.grad(ours[0], args, g), torch.autograd.grad(plain[0], args, g)
        ):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            torch.testing.assert_close(compiled(*args), plain)


@pytest.mark.inductor
@pytest.mark.no_interpreter
def test_inductor():
    compiled_matches("inductor")


def test_merged_may_be_changed_in_place_and_backends_agree():
    base = randn(4, 6)
    tensors = [m.requires_grad_() for m in near(base, 2)]
    merged, _ = model_stock(base, tensors)
    (expected,) = torch.autograd.grad(2 * model_stock(base, tensors)[0].sum(), tensors[0])
    merged.mul_(2)
    (found,) = torch.autograd.grad(merged.sum(), tensors[0])
    torch.testing.assert_close(found, expected)
    with solera.backend("reference"):
        plain, ratio = model_stock(base, tensors)
    torch.testing.assert_close(merged, plain * 2)
    with torch.autocast(DEVICE, dtype=BF16):
        assert torch.equal(model_stock(base, tensors)[0] * 2, merged)
