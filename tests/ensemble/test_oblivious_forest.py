"""Core oblivious_forest: leaves, their sums and the adjoint, against trees walked one by one."""

import pytest
import torch
from function_checks import compiles
from helpers import DEVICE, DTYPES, INTERPRETED, ULP, randn, relative_error
from hypothesis import given
from hypothesis import strategies as st

import solera
from solera.ensemble import forest_leaves, leaf_kernel_apply, oblivious_forest, smoother_weights

ops = torch.ops.solera

# (rows, features, trees, depth, outputs)
SHAPES = [(1, 1, 1, 1, 1), (5, 7, 3, 2, 4), (130, 20, 33, 5, 3)]
SHAPES_HERE = [*SHAPES[:2], (40, 9, 5, 3, 20)] if INTERPRETED else [*SHAPES, (33, 3, 40, 3, 40)]


def make(rows, width, trees, depth, outputs, dtype=torch.float32):
    x = randn(rows, width, dtype=dtype)
    features = torch.randint(0, width, (trees, depth), device=DEVICE)
    thresholds = randn(trees, depth, dtype=dtype)
    leaves = randn(trees, 2**depth, outputs, dtype=dtype, grad=True)
    return x, features, thresholds, leaves


def walked(x, features, thresholds):
    """The leaf of each row in each tree, a question at a time."""
    index = torch.zeros(x.shape[0], features.shape[0], dtype=torch.int32, device=x.device)
    for d in range(features.shape[1]):
        index += (x[:, features[:, d]] > thresholds[:, d]).int() * 2**d
    return index


def formula(x, features, thresholds, leaves, rate, start):
    index = walked(x, features, thresholds).long()
    rows = leaves[torch.arange(features.shape[0], device=x.device), index]  # (B, K, A)
    return start - rate * rows.sum(1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES_HERE, ids=str)
def test_gradient_boosting_rl_against_the_papers_formula(shape, dtype):
    x, features, thresholds, leaves = make(*shape, dtype)
    assert torch.equal(forest_leaves(x, features, thresholds), walked(x, features, thresholds))
    rate, start = (randn(shape[-1], dtype=dtype, grad=True) for _ in range(2))
    wanted = [leaves, rate, start]
    y = oblivious_forest(x, features, thresholds, leaves, rate, start)
    dy = randn(*y.shape, dtype=dtype)
    wide = [t.detach().double().requires_grad_() for t in wanted]
    exact = formula(x, features, thresholds, *wide)
    today = formula(x, features, thresholds, *wanted)
    mine = (y, *torch.autograd.grad(y, wanted, dy))
    truth = (exact, *torch.autograd.grad(exact, wide, dy.double()))
    eager = (today, *torch.autograd.grad(today, wanted, dy))
    for a, b, c in zip(mine, truth, eager):
        few = 4 if a.numel() < 64 else 1
        assert a.dtype == dtype
        assert relative_error(a, b) <= few * max(ULP[dtype], 2 * relative_error(c, b))


def test_the_sum_and_its_adjoint_differentiate_each_other():
    x, features, thresholds, leaves = make(6, 3, 2, 2, 2, torch.float64)
    f = lambda leaves: oblivious_forest(x, features, thresholds, leaves, 0.5)
    assert torch.autograd.gradcheck(f, leaves) and torch.autograd.gradgradcheck(f, leaves)
    twice = lambda leaves: oblivious_forest(x, features, thresholds, leaves**2, 0.5)
    assert torch.autograd.gradgradcheck(twice, leaves)


def test_questions_without_an_answer_say_no():
    x = torch.tensor([[float("nan"), 5.0], [float("inf"), -5.0]], device=DEVICE)
    features = torch.tensor([[0, 1], [7, 1], [-1, 1]], device=DEVICE)
    thresholds = torch.zeros(3, 2, device=DEVICE)
    want = torch.tensor([[2, 2, 2], [1, 0, 0]], dtype=torch.int32, device=DEVICE)
    for backend in ("auto", "reference"):
        with solera.backend(backend):
            assert torch.equal(forest_leaves(x, features, thresholds), want)
    leaves = randn(3, 2, 4)  # numbers outside the leaves add nothing
    index = torch.tensor([[0, 5, 1], [-1, 1, 7]], dtype=torch.int32, device=DEVICE)
    got = ops.leaf_sum(index, leaves)
    torch.testing.assert_close(got, torch.stack([leaves[0, 0] + leaves[2, 1], leaves[1, 1]]))
    back = ops.leaf_scatter(index, randn(2, 4), 2)
    assert back.isfinite().all() and back[0, 1].eq(0).all()


def test_opcheck_and_strides():
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    x, features, thresholds, leaves = make(4, 6, 3, 2, 5)
    leaves = leaves.detach()
    index = forest_leaves(x, features, thresholds)
    for value in (x.t().contiguous().t(), x[:1].expand(4, 6)):
        torch.library.opcheck(ops.forest_leaves, (value, features, thresholds), test_utils=tests)
        got = forest_leaves(value, features, thresholds)
        assert torch.equal(got, walked(value, features, thresholds))
    for at in (index.t().contiguous().t(), index[:1].expand(4, 3)):
        torch.library.opcheck(ops.leaf_sum, (at, leaves.mT.contiguous().mT), test_utils=tests)
        torch.library.opcheck(ops.leaf_scatter, (at, randn(4, 1).expand(4, 5), 4), test_utils=tests)


@pytest.mark.no_interpreter
@pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.inductor)]
)
def test_compile(backend):
    _, features, thresholds, leaves = make(4, 6, 3, 2, 5)
    f = lambda x, leaves: oblivious_forest(x, features, thresholds, leaves, 0.1)
    compiles(f, lambda size: (randn(size, 6), leaves), backend)


@pytest.mark.no_interpreter
def test_same_bits_for_any_thread_count_and_batch():
    x, features, thresholds, leaves = make(700, 11, 37, 4, 6)
    index = forest_leaves(x, features, thresholds)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            y = ops.leaf_sum(index, leaves.detach())
            results.append((y, ops.leaf_scatter(index, y, 16)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results))
    assert torch.equal(ops.leaf_sum(index[:7], leaves.detach()), results[0][0][:7])


@pytest.mark.no_interpreter
def test_transforms_take_the_reference():
    x, features, thresholds, leaves = make(5, 6, 3, 2, 4, torch.float64)
    f = lambda leaves: oblivious_forest(x, features, thresholds, leaves).square().sum()
    torch.testing.assert_close(
        torch.func.grad(f)(leaves.detach()), torch.autograd.grad(f(leaves), leaves)[0]
    )


@given(
    st.integers(0, 40), st.integers(1, 9), st.integers(0, 20), st.integers(0, 4), st.integers(0, 20),
    st.sampled_from(DTYPES),
)  # fmt: skip
def test_any_shape(rows, width, trees, depth, outputs, dtype):
    x, features, thresholds, leaves = make(rows, width, trees, depth, outputs, dtype)
    index = forest_leaves(x, features, thresholds)
    assert torch.equal(index, walked(x, features, thresholds))
    y = oblivious_forest(x, features, thresholds, leaves)
    want = formula(x, features, thresholds, leaves.double(), 1.0, 0.0)
    assert y.shape == (rows, outputs) and relative_error(y, want) <= 20 * ULP[dtype]
    (grad,) = torch.autograd.grad(y.sum(), leaves)
    counts = torch.zeros(trees, 2**depth, device=DEVICE)
    counts.scatter_add_(1, index.t().long(), torch.ones(trees, rows, device=DEVICE))
    torch.testing.assert_close(-grad.float(), counts.unsqueeze(2).expand(-1, -1, outputs))


def test_a_forest_as_a_smoother():
    """Random forests as smoothers: y = S y_train, and the effective parameters of S."""
    trees, count, leaves = 5, 30, 4
    train = torch.randint(0, leaves, (count, trees), device=DEVICE)
    query = torch.randint(0, leaves + 1, (9, trees), device=DEVICE)  # a leaf nobody is in
    y = randn(count, 2, dtype=torch.float64, grad=True)
    same = query[:, None, :] == train[None]  # (Nq, N, M)
    n = (train[:, None, :] == train[None]).sum(1)  # rows in each training row's leaf
    s = (same / n).sum(2).double() / trees
    torch.testing.assert_close(leaf_kernel_apply(query, train, y, leaves + 1), s @ y)
    got = smoother_weights(query, train, leaves + 1)
    torch.testing.assert_close(got.double(), s, rtol=1e-5, atol=1e-6)
    parameters = count / len(query) * got.square().sum()
    torch.testing.assert_close(parameters.double(), count / len(query) * (s**2).sum())
    (grad,) = torch.autograd.grad(leaf_kernel_apply(query, train, y, leaves + 1).sum(), y)
    torch.testing.assert_close(grad, s.sum(0).unsqueeze(1).expand(-1, 2))


BAD = [
    ({"x": (4,)}, ValueError, "x: expected 2 dimensions"),
    ({"features": (3, 2)}, TypeError, "features: expected a tensor of int64"),
    (
        {"features": torch.zeros(2, 2, dtype=torch.long)},
        ValueError,
        r"features: expected shape \(3, 2\)",
    ),
    ({"thresholds": (3,)}, ValueError, "thresholds: expected 2 dimensions"),
    ({"thresholds": (3, 17)}, ValueError, "features: expected shape"),
    ({"leaves": (3, 3, 5)}, ValueError, r"leaves: expected shape \(3, 4, 5\)"),
    ({"learning_rate": (4,)}, ValueError, r"learning_rate: expected shape \(5,\)"),
    ({"learning_rate": "x"}, TypeError, "learning_rate: expected a number"),
    ({"start": (4,)}, ValueError, r"start: expected shape \(5,\)"),
]


@pytest.mark.parametrize("changes, error, message", BAD)
def test_bad_input(changes, error, message):
    names = ("x", "features", "thresholds", "leaves")
    arguments = dict(zip(names, make(4, 6, 3, 2, 5)))
    arguments |= {k: randn(*v) if isinstance(v, tuple) else v for k, v in changes.items()}
    with pytest.raises(error, match=message):
        oblivious_forest(**arguments)


def test_too_deep():
    features = torch.zeros(1, 17, dtype=torch.long, device=DEVICE)
    with pytest.raises(ValueError, match="at most 16 questions"):
        forest_leaves(randn(2, 3), features, randn(1, 17))
