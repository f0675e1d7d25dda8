"""Core indexed_ema: the loop over the batch, the closed form, bits, and bad input."""

import pytest
import torch
from helpers import DEVICE, DTYPES, INTERPRETED, randn
from hypothesis import given
from hypothesis import strategies as st

import solera
from solera.weights import class_ema_, indexed_ema_

ops = torch.ops.solera
ROUNDING = {torch.float64: 1e-14, torch.float32: 6e-7, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def loop(bank, index, values, decay):
    """The definition: one value after another, in float64 for the truth."""
    out = bank.double().clone()
    for i, row in enumerate(index.tolist()):
        if row >= 0:
            out[row] = (
                values[i].double() + 0
                if decay == 0
                else out[row] * decay + (1 - decay) * values[i].double()
            )
    return out


def close(bank, truth):
    error = (bank.double() - truth).abs()
    return (error <= ROUNDING[bank.dtype] * (truth.abs() + 0.5)).all()


@pytest.mark.parametrize("value", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_the_loop_over_the_batch(dtype, value):
    for shape in ((5,), (4, 3)) if INTERPRETED else ((), (5,), (4, 3), (1500,)):
        bank = randn(9, *shape, dtype=dtype)
        index = torch.randint(-1, 9, (40,), device=DEVICE)
        v = randn(40, *shape, dtype=value)
        for decay in (0.0, 0.9):
            truth = loop(bank, index, v, decay)
            ours, reference = bank.clone(), bank.clone()
            indexed_ema_(ours, index, v, decay)
            with solera.backend("reference"):
                indexed_ema_(reference, index, v, decay)
            assert close(ours, truth) and close(reference, truth)
            untouched = torch.tensor(
                [r for r in range(9) if r not in index.tolist()], dtype=torch.int64
            )
            assert torch.equal(ours[untouched], bank[untouched])


def test_bits_are_those_of_the_loop_in_float32():
    bank, index = randn(6, 33), torch.randint(0, 6, (50,), device=DEVICE)
    v, decay = randn(50, 33), 0.7
    expected = bank.clone()
    keep, add = (torch.tensor(x, device=DEVICE) for x in (decay, 1 - decay))
    for i, row in enumerate(index.tolist()):
        expected[row] = expected[row] * keep + v[i] * add
    indexed_ema_(bank, index, v, decay)
    assert torch.equal(bank, expected)


def test_class_ema_is_the_closed_form():
    """p m^n_c + sum_i (1 - m) m^(number of later samples of the class) q_i."""
    prototypes, labels = (
        randn(4, 7, dtype=torch.float64),
        torch.tensor([2, 0, 2, 2, 1, 0], device=DEVICE),
    )
    q, m = randn(6, 7, dtype=torch.float64), 0.9
    expected = prototypes.clone()
    for c in range(4):
        mine = (labels == c).nonzero().flatten().tolist()
        expected[c] = prototypes[c] * m ** len(mine)
        for place, i in enumerate(mine):
            expected[c] += (1 - m) * m ** (len(mine) - 1 - place) * q[i]
    class_ema_(prototypes, q, labels, m)
    torch.testing.assert_close(prototypes, expected)


def test_a_decay_of_one_and_empty_input():
    bank, v = randn(3, 4), randn(2, 4)
    before, index = bank.clone(), torch.tensor([1, 1], device=DEVICE)
    indexed_ema_(bank, index, v, 1.0)
    assert torch.equal(bank, before)
    indexed_ema_(bank, index, v, 0)
    assert torch.equal(bank[1], v[1]) and torch.equal(bank[[0, 2]], before[[0, 2]])
    indexed_ema_(bank, index[:0], v[:0], 0.5)
    indexed_ema_(torch.empty(0, 4, device=DEVICE), index[:0], v[:0], 0.5)
    indexed_ema_(torch.empty(3, 0, device=DEVICE), index, v[:, :0], 0.5)
    nan = torch.full((3, 4), float("nan"), device=DEVICE)
    indexed_ema_(nan, index, v, 0.0)  # a bank nobody has filled yet
    assert torch.equal(nan[1], v[1])
    left_out = bank.clone()
    indexed_ema_(left_out, torch.tensor([-1, -100], device=DEVICE), v, 0.5)
    assert torch.equal(left_out, bank)


def test_strided_and_expanded_input():
    memory, index = randn(4, 9), torch.tensor([8, 0, 8], device=DEVICE)
    v = randn(4, 3).t()
    expected = memory.t().contiguous()
    indexed_ema_(expected, index, v.contiguous(), 0.75)
    bank = memory.t()
    indexed_ema_(bank, index, v, 0.75)
    assert torch.equal(bank, expected)
    deep = randn(2, 9, 3).transpose(0, 1)
    expected = deep.contiguous()
    one = randn(1, 2, 3).expand(3, 2, 3)
    indexed_ema_(expected, index, one.contiguous(), 0.75)
    indexed_ema_(deep, index, one, 0.75)
    assert torch.equal(deep, expected)


@given(
    rows=st.integers(1, 5000), count=st.integers(0, 60), width=st.integers(0, 20),
    distinct=st.integers(1, 60), dtype=st.sampled_from(DTYPES), decay=st.floats(0, 1),
)  # fmt: skip
def test_any_size(rows, count, width, distinct, dtype, decay):
    bank, v = randn(rows, width, dtype=dtype), randn(count, width)
    some = torch.randint(0, rows, (distinct,))
    index = some[torch.randint(0, distinct, (count,))].to(DEVICE)
    truth = loop(bank, index, v, decay)
    indexed_ema_(bank, index, v, decay)
    assert close(bank, truth)


def test_same_bits_for_any_thread_count():
    count = 40 if INTERPRETED else 400
    index = torch.randint(0, 50, (count,), device=DEVICE)
    bank, v = randn(50, 1100), randn(count, 1100)
    results = []
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(bank.clone())
            indexed_ema_(results[-1], index, v, 0.9)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])


# ---- the contract with torch --------------------------------------------------------------------------


def test_autograd_sees_the_write_and_nothing_else():
    index = torch.tensor([0, 1], device=DEVICE)
    x, bank, v = randn(3, 5, grad=True), randn(3, 5), randn(2, 5, grad=True)
    y = x * bank
    indexed_ema_(bank, index, v, 0.5)
    assert not bank.requires_grad
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_opcheck():
    index = torch.tensor([1, -1, 1, 3], device=DEVICE)
    for bank, v in ((randn(4, 6), randn(6, 4).t()), (randn(6, 4).t(), randn(1, 6).expand(4, 6))):
        torch.library.opcheck(ops.indexed_ema_.default, (bank, index, v, 0.9))


def test_compile():
    def f(bank, index, v):
        indexed_ema_(bank, index, v * 2, 0.75)
        return bank + 1

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (4, 7):
        bank, index, v = randn(6, 3), torch.randint(0, 6, (n,), device=DEVICE), randn(n, 3)
        other = bank.clone()
        torch.testing.assert_close(compiled(bank, index, v), f(other, index, v))
        torch.testing.assert_close(bank, other)


def test_functional_transforms():
    index, bank, v = torch.tensor([0, 2, 0], device=DEVICE), randn(3, 4), randn(3, 4)

    def step(bank, v):
        bank = bank.clone()
        indexed_ema_(bank, index, v, 0.75)
        return bank

    gradient = torch.func.grad(lambda v: step(bank, v).sum())(v)
    assert not gradient.any()  # in place and outside autograd: documented


A, V = torch.ones(3, 4), torch.zeros(2, 4)
I = torch.tensor([0, 2])
BAD = [
    (lambda: indexed_ema_(3, I, V, 0.5), TypeError, "bank: expected a torch.Tensor"),
    (lambda: indexed_ema_(A.long(), I, V, 0.5), TypeError, "bank: expected float32"),
    (lambda: indexed_ema_(torch.ones(()), I, V, 0.5), ValueError, "bank: expected at least 1 dim"),
    (lambda: indexed_ema_(torch.ones(1, 4).expand(3, 4), I, V, 0.5), ValueError, "bank: expanded"),
    (lambda: indexed_ema_(A, [0, 2], V, 0.5), TypeError, "index: expected an int64 tensor.*list"),
    (lambda: indexed_ema_(A, I.int(), V, 0.5), TypeError, "index: expected an int64 tensor.*int32"),
    (lambda: indexed_ema_(A, I[None], V, 0.5), TypeError, r"index: expected an int64 tensor of shape \(B,\)"),
    (lambda: indexed_ema_(A, I + 1, V, 0.5), IndexError, "index: expected row numbers below 3.*got 3"),
    (lambda: class_ema_(A, V, I + 1, 0.5), IndexError, "labels: expected row numbers below 3"),
    (lambda: indexed_ema_(A, I, V.long(), 0.5), TypeError, "value: expected float32"),
    (lambda: indexed_ema_(A, I, V[:1], 0.5), ValueError, r"value: expected shape \(2, 4\)"),
    (lambda: class_ema_(A, V[:, :3], I, 0.5), ValueError, r"values: expected shape \(2, 4\)"),
    (lambda: indexed_ema_(A, I.to("meta"), V, 0.5), ValueError, "index: expected device cpu"),
    (lambda: indexed_ema_(A, I, V.to("meta"), 0.5), ValueError, "value: expected shape.*on cpu"),
    (lambda: indexed_ema_(A, I, A[:2], 0.5), ValueError, "bank overlaps value in memory"),
    (lambda: indexed_ema_(A, I, V, 1.5), ValueError, "decay: expected a finite number"),
    (lambda: indexed_ema_(A, I, V, "x"), TypeError, "decay: expected a number"),
]  # fmt: skip


@pytest.mark.skipif(DEVICE != "cpu", reason="the table's tensors are on the CPU")
@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input(case):
    call, kind, message = BAD[case]
    with pytest.raises(kind, match=message):
        call()


THING = st.one_of(
    st.none(),
    st.integers(-3, 3),
    st.lists(st.integers(0, 2), max_size=2),
    st.builds(
        lambda shape, dtype: torch.ones(shape, dtype=dtype, device=DEVICE),
        st.lists(st.integers(0, 3), max_size=3),
        st.sampled_from([*DTYPES, torch.int64, torch.bool, torch.complex64]),
    ),
)


@given(bank=THING, index=THING, value=THING, decay=st.one_of(st.floats(), THING))
def test_a_clear_error_or_a_result(bank, index, value, decay):
    try:
        indexed_ema_(bank, index, value, decay)
    except (ValueError, TypeError, IndexError) as error:
        assert str(error).startswith(("bank", "index", "value", "decay")), error
