"""Core lookahead: bits against the reference, its use as momentum interpolation, and bad input."""

import pytest
import torch
from helpers import DEVICE, DTYPES, INTERPRETED, randn
from hypothesis import given
from hypothesis import strategies as st

import solera
from solera.weights import ema_, lookahead_

ops = torch.ops.solera
SIZES = (7, 3 * 1024 + 130) if INTERPRETED else (1, 7, 128, 1000, 40007)


def same_bits(a, b, slow):
    if INTERPRETED and torch.bfloat16 in (a.dtype, slow):
        # The interpreter cuts float32 off to bfloat16, and flushes denormals, where a GPU rounds.
        torch.testing.assert_close(a, b, rtol=2**-7, atol=1e-37, equal_nan=True)
        return True
    nan = a.isnan() & b.isnan()
    return torch.equal(a[~nan], b[~nan])


def special(n, dtype):
    t = randn(n)
    values = [0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1e-7, 6e4, 1e30, 1e-42]
    t[: len(values)] = torch.tensor(values, device=DEVICE)[:n]
    return t.to(dtype)


@pytest.mark.parametrize("fast", DTYPES, ids=str)
@pytest.mark.parametrize("slow", DTYPES, ids=str)
def test_same_bits_as_the_reference(slow, fast):
    for alpha in (0.0, 1.0, 0.3):
        s = [special(n, slow) for n in SIZES]
        f = [special(n, fast).flip(0) for n in SIZES]
        expected_s, expected_f = [t.clone() for t in s], [t.clone() for t in f]
        assert lookahead_(s, f, alpha) is True
        with solera.backend("reference"):
            lookahead_(expected_s, expected_f, alpha)
        for a, b in zip((*s, *f), (*expected_s, *expected_f)):
            assert same_bits(a, b, slow)


@pytest.mark.parametrize("slow", DTYPES, ids=str)
def test_against_the_formula_in_float64(slow):
    s, f = randn(500, dtype=slow), randn(500)
    truth = s.double() + 0.25 * (f.double() - s.double())
    lookahead_(s, f, 0.25)
    limit = 2 * max(torch.finfo(slow).eps, 2.3e-16)
    assert ((s.double() - truth).abs() <= limit * (truth.abs() + 0.5)).all()


def test_lookahead_is_the_papers():
    """k steps of the fast weights, then one of the slow, which the fast ones go back to."""
    slow = [randn(4, 5, dtype=torch.float64), randn(3, dtype=torch.float64)]
    fast = [t.clone() for t in slow]
    expected = [t.clone() for t in slow]
    followed = [t.clone() for t in slow]
    for step in range(1, 11):
        for f, e in zip(fast, followed):
            update = randn(*f.shape, dtype=torch.float64)
            f -= 0.1 * update
            e -= 0.1 * update
        assert lookahead_(slow, fast, 0.5, every=5, step=step) == (step % 5 == 0)
        if step % 5 == 0:
            for e, f in zip(expected, followed):
                e += 0.5 * (f - e)
                f.copy_(e)
    torch.testing.assert_close(slow, expected)
    torch.testing.assert_close(fast, followed)


def test_momentum_interpolation_of_a_zero_shot_model():
    """theta_s <- tau theta_s + (1 - tau) theta_f, every step or every k steps; the fast weights are left alone."""
    zero_shot, tau = randn(30, dtype=torch.float64), 0.99
    for every in (1, 3):
        slow, fast, expected = zero_shot.clone(), zero_shot.clone(), zero_shot.clone()
        for step in range(1, 8):
            fast += 0.1 * randn(30, dtype=torch.float64)
            before = fast.clone()
            lookahead_(slow, fast, 1 - tau, every=every, step=step, write_back=False)
            assert torch.equal(fast, before)
            if step % every == 0:
                expected = tau * expected + (1 - tau) * fast
        torch.testing.assert_close(slow, expected)
    a, b, p = randn(40), randn(0), randn(40)
    b = a.clone()
    lookahead_(a, p, 0.25, write_back=False)
    ema_(b, p, 0.75)
    assert torch.equal(a, b)


def test_containers_strides_and_dtypes():
    slow = {"w": randn(4, 6).t(), "b": randn(10)[::2], "n": randn(0)}
    fast = {"w": randn(6, 4, dtype=torch.bfloat16), "b": randn(5, 3).t()[0], "n": randn(0)}
    expected = {k: slow[k].double() + 0.5 * (fast[k].double() - slow[k].double()) for k in slow}
    lookahead_(slow, fast, 0.5)
    for key, e in expected.items():
        torch.testing.assert_close(slow[key].double(), e, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(fast[key].double(), e, rtol=8e-3, atol=8e-3)
    model, copy = (torch.nn.Linear(3, 2).to(DEVICE) for _ in range(2))
    lookahead_(copy.parameters(), model.parameters(), 0.5)
    assert torch.equal(copy.weight, model.weight) and copy.weight.grad_fn is None


@given(
    shapes=st.lists(st.lists(st.integers(0, 40), max_size=2), min_size=1, max_size=3),
    data=st.data(),
    alpha=st.floats(0, 1),
)
def test_any_shape_and_dtype(shapes, data, alpha):
    kinds = st.sampled_from(DTYPES)
    dtypes = [(data.draw(kinds), data.draw(kinds)) for _ in shapes]
    slow = [randn(s, dtype=d[0]) for s, d in zip(shapes, dtypes)]
    fast = [randn(s, dtype=d[1]) for s, d in zip(shapes, dtypes)]
    copies = [[t.clone() for t in group] for group in (slow, fast)]
    lookahead_(slow, fast, alpha)
    with solera.backend("reference"):
        lookahead_(*copies, alpha)
    for a, b, d in zip((*slow, *fast), (*copies[0], *copies[1]), (*dtypes, *dtypes)):
        assert same_bits(a, b, d[0])


def test_same_bits_for_any_thread_count():
    f = [randn(n) for n in ((5000, 3) if INTERPRETED else (100_000, 3, 16385))]
    results = []
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            s = [torch.ones_like(t) for t in f]
            lookahead_(s, [t.clone() for t in f], 0.3)
            results.append(s)
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


# ---- the contract with torch --------------------------------------------------------------------------


def test_autograd_sees_the_write():
    x, slow, fast = randn(5, grad=True), randn(5), randn(5)
    for seen in (slow, fast):
        y = x * seen
        lookahead_(slow, fast, 0.5)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_opcheck():
    slow = [randn(4, 6, dtype=torch.bfloat16), randn(6, 4).t()]
    fast = [randn(6, 4).t(), randn(4, 6, dtype=torch.float16)]
    torch.library.opcheck(ops.lookahead_.default, (slow, fast, 0.9))


def test_compile():
    def f(s, p):
        lookahead_([s], [p], 0.25)
        return s + p

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (4, 7):
        args = [randn(n), randn(n)]
        copies = [t.clone() for t in args]
        torch.testing.assert_close(compiled(*args), f(*copies))
        torch.testing.assert_close(args, copies)


A, B = torch.ones(3), torch.zeros(3)
I64 = torch.ones(3, dtype=torch.int64)
BASE = torch.arange(8.0)
BAD = [
    (lambda: lookahead_([], [], 0.5), ValueError, "slow: expected at least one tensor"),
    (lambda: lookahead_(3, A, 0.5), TypeError, "slow: expected a tensor, a list"),
    (lambda: lookahead_(A, [B], 0.5), TypeError, "fast: expected a tensor"),
    (lambda: lookahead_([A], [B, B], 0.5), ValueError, "fast: expected 1 tensors"),
    (lambda: lookahead_([A], [torch.ones(1, 3)], 0.5), ValueError, r"fast\[0\]: expected shape \(3,\)"),
    (lambda: lookahead_([A], [I64], 0.5), TypeError, r"fast\[0\]: expected float32.*int64"),
    (lambda: lookahead_({"w": A}, {"v": B}, 0.5), ValueError, r"missing \['w'\], unexpected \['v'\]"),
    (lambda: lookahead_(A, A, 0.5), ValueError, "slow and fast overlap"),
    (lambda: lookahead_([BASE[:4]], [BASE[2:6]], 0.5), ValueError, r"slow\[0\] and fast\[0\] overlap"),
    (lambda: lookahead_(A, torch.ones(1).expand(3), 0.5), ValueError, "fast: expanded"),
    (lambda: lookahead_(A, B.to("meta"), 0.5), ValueError, "fast: expected device cpu"),
    (lambda: lookahead_(A, B, 1.5), ValueError, "alpha: expected a finite number"),
    (lambda: lookahead_(A, B, 0.5, every=0), ValueError, "every: expected an int"),
    (lambda: lookahead_(A, B, 0.5, step=1.5), ValueError, "step: expected an int"),
]  # fmt: skip


@pytest.mark.skipif(DEVICE != "cpu", reason="the table's tensors are on the CPU")
@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input(case):
    call, kind, message = BAD[case]
    with pytest.raises(kind, match=message):
        call()
