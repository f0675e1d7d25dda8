"""Core row_dots: three dots of two rows, and a linear combination of them."""

import pytest
import torch
from helpers import DEVICE, DTYPES, randn, relative_error

from solera.norm import row_dots as dots

ops = torch.ops.solera


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize(
    "kinds", [(d, d) for d in DTYPES] + [(torch.float32, torch.bfloat16)], ids=str
)
def test_row_dots_and_combine(kinds, indexed):
    for width in (1, 7, 100, 2100):
        x, y = randn(5, width, dtype=kinds[0]), randn(5, width, dtype=kinds[1])
        index = torch.tensor([3, -1, 0, 0, 4], device=DEVICE) if indexed else None
        beside = y.double() if index is None else y.double()[index] * (index >= 0)[:, None]
        got = ops.row_dots(x, y, index)
        v = x.double()
        want = ((v * v).sum(1), (v * beside).sum(1), (beside * beside).sum(1))
        tolerance = 1e-12 if kinds[0] == torch.float64 else 1e-4
        for a, b in zip(got, want):
            torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)
        a, b = randn(5, dtype=got[0].dtype), randn(5, dtype=got[0].dtype)
        out = ops.row_combine(x, y, index, a, b)
        exact = a.double()[:, None] * v + b.double()[:, None] * beside
        assert relative_error(out, exact) <= {torch.float64: 1e-14, torch.float32: 1e-6}.get(
            kinds[0], 8e-3
        )
        ops.row_combine_(x, y, index, a, b)
        assert torch.equal(x, out)


def test_row_dots_contract():
    base, y = randn(6, 5), randn(4, 6)
    index = torch.tensor([0, 3, -1, 2, 2], device=DEVICE)
    for x in (base.t(), base[:, :1].t().expand(5, 6)):
        torch.library.opcheck(ops.row_dots.default, (x, y, index))
        torch.library.opcheck(ops.row_combine.default, (x, y, index, randn(5), randn(1).expand(5)))
        torch.library.opcheck(ops.row_combine_.default, (x.clone(), y, index, randn(5), randn(5)))
    x = randn(3, 4, dtype=torch.float64, grad=True)
    z, rows = randn(2, 4, dtype=torch.float64), torch.tensor([1, 0, 1], device=DEVICE)
    assert torch.autograd.gradcheck(lambda x: dots.row_dots(x, z, rows), x)
    assert torch.autograd.gradgradcheck(lambda x: dots.row_dots(x, z, rows), x)
    assert all(
        t.numel() == 0
        for t in ops.row_dots(
            randn(0, 3), randn(2, 3), torch.zeros(0, dtype=torch.int64, device=DEVICE)
        )
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_beside_themselves(dtype):
    x = randn(4, 37, dtype=dtype)
    xx, xy, yy = ops.row_dots(x, x, None)
    assert torch.equal(xx, xy) and torch.equal(xx, yy)
    torch.testing.assert_close(xx, ops.row_dots(x, x.clone(), None)[0])


def test_an_index_past_the_rows_gives_nan_and_touches_nobody_else():
    x, y = randn(3, 9), randn(2, 9)
    index = torch.tensor([1, 2, 0], device=DEVICE)
    xx, xy, yy = ops.row_dots(x, y, index)
    assert bool(xx.isfinite().all())
    for t in (xy, yy):
        assert t.isnan().tolist() == [False, True, False]
    assert ops.row_combine(x, y, index, xx, xx).isnan().any(1).tolist() == [False, True, False]


def test_extreme_values_stay_in_their_row():
    x, y = randn(5, 20), randn(5, 20)
    x[0, 3], x[1, 4], x[2, 5] = float("inf"), float("nan"), 1e30
    for got, want in zip(ops.row_dots(x, y, None), dots.row_dots_reference(x, y, None)):
        torch.testing.assert_close(got, want, equal_nan=True)


def test_same_bits_for_any_thread_count_and_batch():
    x, y = randn(300, 70), randn(300, 70)
    whole = ops.row_dots(x, y, None)
    for threads in (1, 2, 5):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            assert all(torch.equal(a, b) for a, b in zip(ops.row_dots(x, y, None), whole))
        finally:
            torch.set_num_threads(before)
    alone = ops.row_dots(x[7:8], y[7:8], None)
    assert all(torch.equal(a, b[7:8]) for a, b in zip(alone, whole))
