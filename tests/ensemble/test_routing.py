"""Core routing: scores, windows and merges against the formulas in float64, gradients, torch's contract, bad input."""

import pytest
import torch
from function_checks import agrees_with_formula, compiles, works_under_torch_func
from helpers import DEVICE, DTYPES, INTERPRETED, assert_accurate, double, randn
from hypothesis import given
from hypothesis import strategies as st

import solera
from solera.ensemble import cascade_merge_, uncertainty_scores, window_exit
from solera.ensemble.routing import KINDS, uncertainty_reference

ops = torch.ops.solera
F64, INF, NAN = torch.float64, float("inf"), float("nan")


def formulas(x):
    """The four scores as the paper and the textbooks write them."""
    p = x.softmax(-1)
    entropy = -(p * x.log_softmax(-1)).sum(-1)
    two = p.topk(2, dim=-1).values
    return p.amax(-1), entropy, -x.logsumexp(-1), two[..., 0] - two[..., 1]


def in_accumulator(x):
    return formulas(x.to(F64 if x.dtype == F64 else torch.float32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 2), (3, 10), (2, 37, 70), (3, 5000)], ids=str)
def test_scores_and_gradients_against_float64(shape, dtype):
    x = randn(*shape, scale=3)
    most = x.amax(-1)  # no equal ones among the two largest: their order is a choice
    x[..., 0], x[..., 1] = most + 0.5, most + 1
    x = x.to(dtype).requires_grad_()
    # p_c and its complements cancel in the formula's gradient: the rounding of one product is allowed for.
    agrees_with_formula(uncertainty_scores, in_accumulator, (x,), allowed=4e-7)
    scores = uncertainty_scores(x)
    assert scores._fields == KINDS and all(s.shape == shape[:-1] for s in scores)


def test_a_sure_row_keeps_its_digits():
    x = torch.tensor([[13.0, 0.0, 1.0], [0.0, -12.0, -13.0]], device=DEVICE)
    exact = formulas(x.double())
    for got, want in zip(uncertainty_scores(x), exact):
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)


def test_ties_infinities_and_nan():
    x = torch.tensor(
        [[1.0, 1.0, 0.0], [0.0, -INF, -INF], [INF, 0.0, 1.0], [-INF, -INF, -INF], [0.0, NAN, 1.0],
         [INF, INF, 0.0]], device=DEVICE,
    )  # fmt: skip
    scores, top = ops.uncertainty_scores(x)
    with solera.backend("reference"):
        torch.testing.assert_close(scores, torch.stack(uncertainty_scores(x)), equal_nan=True)
    assert scores[3, 0] == 0 and top[:, 0].tolist() == [0, 1]
    assert scores[:2, 1].tolist() == [1, 0] and scores[0, 2] == 1
    assert scores[:, 3:].isnan().all()
    assert ((top >= 0) & (top < 3)).all() and (top[0] != top[1]).all()
    y = x[:3].clone().requires_grad_()
    sum(s[:2].sum() for s in uncertainty_scores(y)).backward()
    assert y.grad[:2].isfinite().all()


@given(
    rows=st.integers(0, 9), columns=st.integers(2, 40), dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(["plain", "transposed", "expanded", "sliced"]),
    scale=st.sampled_from([1.0, 1e-30, 1e4]),
)  # fmt: skip
def test_any_shape_layout_and_size(rows, columns, dtype, layout, scale):
    x = randn(rows, columns, dtype=dtype, scale=scale)
    if layout == "transposed":
        x = x.t().contiguous().t()
    elif layout == "expanded":
        x = randn(1, columns, dtype=dtype, scale=scale).expand(rows, columns)
    elif layout == "sliced":
        x = randn(rows, 2 * columns, dtype=dtype, scale=scale)[:, ::2]
    with solera.backend("reference"):
        want = uncertainty_scores(x)
    for got, expected in zip(uncertainty_scores(x), want):
        torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-6)
    done, index, count = window_exit(x, 0.3, 0.7, "msp")
    stays = (~done).nonzero().flatten()
    assert index[: int(count)].tolist() == stays.tolist() and (index[int(count) :] == -1).all()


@pytest.mark.parametrize("kind", KINDS)
def test_window_exit_is_the_papers_test(kind):
    x = randn(2500 if not INTERPRETED else 1100, 7, scale=2)
    u = dict(zip(KINDS, formulas(x.double())))[kind]
    low, high = float(u.quantile(0.3)), float(u.quantile(0.8))
    several = ((low, high), (-INF, high), (low, INF), (INF, -INF), (-INF, INF))
    for ends in several[:1] if INTERPRETED else several:
        done, index, count = window_exit(x, *ends, kind)
        near = ((u - ends[0]).abs() < 1e-5) | ((u - ends[1]).abs() < 1e-5)  # decided by rounding
        assert torch.equal(done | near, (u > ends[1]) | (u < ends[0]) | near)
        assert done.dtype == torch.bool and index.dtype == count.dtype == torch.int64
        stays = (~done).nonzero().flatten()
        assert int(count) == len(stays) and torch.equal(index[: len(stays)], stays)
        assert (index[len(stays) :] == -1).all()


def test_a_row_without_a_score_stays():
    x = torch.tensor([[5.0, 0.0], [NAN, 0.0], [9.0, 0.0]], device=DEVICE)
    done, index, count = window_exit(x, -INF, 0.5)
    assert done.tolist() == [True, False, True] and index.tolist() == [1, -1, -1] and count == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(6,), (6, 5), (6, 3, 70)], ids=str)
def test_merge_selects(shape, dtype):
    out, new = randn(*shape, dtype=dtype), randn(4, *shape[1:], dtype=dtype)
    out[1] = NAN
    new[2] = INF
    index = torch.tensor([4, 0, -1, 2], device=DEVICE)
    for how, weight, w in (("replace", None, 1.0), ("mean", None, 0.5), ("mean", 0.25, 0.25)):
        got = out.clone()
        assert cascade_merge_(got, new, index, how, weight=weight) is got
        assert torch.equal(got[[1, 3, 5]].nan_to_num(), out[[1, 3, 5]].nan_to_num())
        for j, i in ((0, 4), (1, 0), (3, 2)):
            want = (1 - w) * out[i].double() + w * new[j].double() if w < 1 else new[j].double()
            assert_accurate(got[i], want)
    wide = torch.stack([out, out], 1)[:, 0]
    cascade_merge_(wide, new, index, "replace")
    assert torch.equal(wide[4], new[0]) and torch.equal(wide[5], out[5])
    assert torch.equal(cascade_merge_(out.clone()[:0], new[:0], index[:0]), out[:0])


def test_merge_has_gradients():
    out, new = randn(5, 3, dtype=F64, grad=True), randn(3, 3, dtype=F64, grad=True)
    index = torch.tensor([3, -1, 0], device=DEVICE)
    for how in ("mean", "replace"):
        f = lambda out, new, how=how: cascade_merge_(out.clone(), new, index, how)
        assert torch.autograd.gradcheck(f, (out, new))
        assert torch.autograd.gradgradcheck(f, (out, new))


def test_derivatives_in_float64():
    x = randn(4, 6, dtype=F64, grad=True)
    f = lambda x: torch.stack(uncertainty_scores(x))
    assert torch.autograd.gradcheck(f, x)
    assert torch.autograd.gradgradcheck(f, x)
    works_under_torch_func(uncertainty_scores, (x,))
    many = torch.func.vmap(lambda x: uncertainty_scores(x).entropy)(torch.stack([x, 2 * x]))
    torch.testing.assert_close(many[1], uncertainty_scores(2 * x).entropy)


def test_opcheck():
    x = randn(6, 5)
    check = torch.library.opcheck
    check(ops.uncertainty_scores.default, (x[:0],))
    for y in (x.t(), x[:1].expand(4, 5)):
        check(ops.uncertainty_scores.default, (y,))
        check(ops.window_exit.default, (y, 0.2, 0.4, 1))
        scores, top = ops.uncertainty_scores(y)
        ones = torch.ones((), device=DEVICE).expand(scores.shape)
        check(ops.uncertainty_scores_backward.default, (ones, y, scores, top))
    index = torch.tensor([2, -1], device=DEVICE)
    check(ops.cascade_merge_.default, (x.clone(), randn(2, 5), index, 0.5))
    check(ops.cascade_merge_.default, (x.t(), randn(2, 6), index, 1.0))


def routed(x, y):
    done, index, count = window_exit(x, 0.2, 0.6, "margin")
    out = cascade_merge_(x * 1.0, y, torch.where(index < 3, index, -1), "mean")
    scores = uncertainty_scores(out)
    return scores.entropy, scores.msp


def test_compile():
    make = lambda n: (randn(n, 5, grad=True), randn(n, 5, grad=True))
    compiles(routed, make)


@pytest.mark.inductor
@pytest.mark.no_interpreter
def test_compile_inductor():
    make = lambda n: (randn(n, 5, grad=True), randn(n, 5, grad=True))
    compiles(routed, make, backend="inductor")


@pytest.mark.no_interpreter
def test_same_bits_for_any_threads_and_batch():
    x = randn(3000, 17)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y = x.clone().requires_grad_()
            scores = torch.stack(uncertainty_scores(y))
            found.append((scores.detach(), torch.autograd.grad(scores.square().sum(), y)[0]))
    finally:
        torch.set_num_threads(before)
    for scores, dx in found[1:]:
        assert torch.equal(scores, found[0][0]) and torch.equal(dx, found[0][1])
    part = torch.stack(uncertainty_scores(x[5:12]))
    assert torch.equal(part, found[0][0][:, 5:12])


def test_autocast_leaves_scores_alone():
    x = randn(4, 5)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert uncertainty_scores(x).msp.dtype == torch.float32
        assert torch.equal(uncertainty_scores(x).entropy, uncertainty_scores(x.clone()).entropy)


def test_reference_is_the_definition():
    x = randn(4, 6, dtype=F64)
    for got, want in zip(uncertainty_reference(double(x))[0], formulas(x)):
        torch.testing.assert_close(got, want)


# ---- bad input ---------------------------------------------------------------------------------------

X, I = randn(3, 4), torch.tensor([0], device=DEVICE)
BAD = [
    (lambda: uncertainty_scores([1.0]), TypeError, "logits: expected a torch.Tensor"),
    (lambda: uncertainty_scores(X.int()), TypeError, "logits: expected float32"),
    (lambda: uncertainty_scores(X[:, :1]), ValueError, "logits: expected at least 2 classes"),
    (lambda: window_exit(X[0], 0, 1), ValueError, "logits: expected 2 dimensions"),
    (lambda: window_exit(X, 0, 1, "max"), ValueError, "kind: expected one of"),
    (lambda: window_exit(X, NAN, 1), ValueError, "low: expected a number or an infinity"),
    (lambda: window_exit(X, 0, None), TypeError, "high: expected a number"),
    (lambda: cascade_merge_(X.clone(), X[:1], [0]), TypeError, "index: expected an int64 tensor"),
    (lambda: cascade_merge_(X.clone(), X[:1], I.int()), TypeError, "index: expected an int64"),
    (lambda: cascade_merge_(X.clone(), X[:2], I), ValueError, "compact: expected shape"),
    (lambda: cascade_merge_(X.clone(), X[:1].double(), I), TypeError, "compact: float64"),
    (lambda: cascade_merge_(X.clone(), X[:1].half(), I), TypeError, "compact: expected torch.float32"),
    (lambda: cascade_merge_(X.clone(), X[:1], I, "sum"), ValueError, "how: expected one of"),
    (lambda: cascade_merge_(X.clone(), X[:1], I, weight=2.0), ValueError, "weight: expected a finite"),
    (lambda: cascade_merge_(X.clone(), X[:1], I, "replace", weight=1), ValueError, "weight: expected None"),
    (lambda: cascade_merge_(X.clone(), X[:1], I.to("meta")), ValueError, "index: expected device"),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input_is_named(case):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.skipif(DEVICE != "cpu" or INTERPRETED, reason="an index is looked at on the CPU only")
def test_an_index_past_the_rows_is_refused():
    with pytest.raises(RuntimeError, match="index: expected rows below 3, got 3"):
        cascade_merge_(X.clone(), X[:1], I + 3)
