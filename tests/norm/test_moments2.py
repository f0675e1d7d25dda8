"""Core moments2: the kernels against the sums in float64, gradients, strides, determinism, bad input."""

import pytest
import torch
from helpers import DEVICE, DTYPES, INTERPRETED, assert_accurate, double, randn
from hypothesis import given
from hypothesis import strategies as st

import solera
from solera.norm import class_moments, covariance, gram_pairs, masked_mean_pool_layers

ops = torch.ops.solera
F64 = torch.float64


def labels_of(n, classes):
    return torch.randint(0, classes, (n,), device=DEVICE)


def exact_class_moments(x, labels, classes, correction):
    x = x.double()
    counts, means, covariances = [], [], []
    for c in range(classes):
        rows = x[labels == c]
        n = len(rows)
        mean = rows.sum(0) / max(n, 1)
        d = rows - mean
        counts.append(n)
        means.append(mean)
        covariances.append(d.T @ d / max(n - correction, 1))
    return torch.tensor(counts, device=x.device), torch.stack(means), torch.stack(covariances)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n, columns, classes", [(1, 1, 1), (60, 17, 4), (90, 70, 11), (130, 5, 3)])
def test_class_moments_against_float64(n, columns, classes, dtype):
    x, labels = randn(n, columns, dtype=dtype) + 3, labels_of(n, classes)
    labels[labels == 1] = 0  # a class without rows
    count, mean, full = class_moments(x, labels, classes)
    want = exact_class_moments(x, labels, classes, 1)
    acc = F64 if dtype == F64 else torch.float32
    with solera.backend("reference"):
        today = class_moments(x, labels, classes)
    assert torch.equal(count, want[0]) and mean.dtype == full.dtype == acc
    assert_accurate(mean, want[1], today[1])
    assert_accurate(full, want[2], today[2])
    assert torch.equal(full, full.mT)
    _, same, diagonal = class_moments(x, labels, classes, covariance=False, correction=0)
    assert torch.equal(same, mean)
    exact = exact_class_moments(x, labels, classes, 0)[2].diagonal(dim1=1, dim2=2)
    assert_accurate(diagonal, exact, today[2].diagonal(dim1=1, dim2=2))


@pytest.mark.no_interpreter
def test_many_rows_and_columns():
    """Past a block of rows, a tile of columns, and both ways of sharing the work out."""
    x = randn(1200, 400) + 100
    for classes in (1, 9):
        labels = labels_of(1200, classes)
        _, mean, full = class_moments(x, labels, classes)
        want = exact_class_moments(x, labels, classes, 1)
        today = torch.stack([torch.cov(x[labels == c].T) for c in range(classes)])
        assert_accurate(mean, want[1])
        assert_accurate(full, want[2], today)


def test_labels_outside_belong_to_no_class():
    x = randn(6, 3)
    labels = torch.tensor([0, -1, 1, 7, 0, 2], device=DEVICE)
    count, mean, _ = class_moments(x, labels, 2)
    assert count.tolist() == [2, 1]
    torch.testing.assert_close(mean[0], (x[0] + x[4]) / 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_covariance_and_its_gradient(dtype):
    x = (randn(50, 30, dtype=dtype) + 2).detach().requires_grad_()
    g, dm = randn(30, 30), randn(30)

    def whole(x):
        mean, c = covariance(x, correction=1)
        (dx,) = torch.autograd.grad((mean, c), x, (dm.to(mean.dtype), g.to(c.dtype)))
        return mean, c, dx

    ours = whole(x)
    with solera.backend("reference"):
        today, truth = whole(x), whole(double(x))
    assert ours[2].dtype == dtype
    for got, want, eager in zip(ours, truth, today):
        assert_accurate(got, want, eager)
    torch.testing.assert_close(truth[1], torch.cov(double(x).T))


@pytest.mark.no_interpreter
def test_gradcheck():
    x = randn(6, 4, dtype=F64, grad=True)
    assert torch.autograd.gradcheck(covariance, x)
    assert torch.autograd.gradgradcheck(covariance, x)
    f = randn(2, 3, 5, dtype=F64, grad=True)
    pairs = torch.tensor([[0, 1], [2, 2], [1, 0], [0, 2]], device=DEVICE)
    assert torch.autograd.gradcheck(gram_pairs, (f, pairs))
    assert torch.autograd.gradgradcheck(gram_pairs, (f, pairs))
    h = randn(2, 2, 4, 3, dtype=F64, grad=True)
    mask = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0]], device=DEVICE).bool()
    assert torch.autograd.gradcheck(masked_mean_pool_layers, (h, mask))
    assert torch.autograd.gradgradcheck(masked_mean_pool_layers, (h, mask))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 7, 33), (3, 12, 4, 9)], ids=str)
def test_gram_pairs_against_the_gram_matrix(shape, dtype):
    x = randn(*shape, dtype=dtype, grad=True)
    pairs = torch.randint(0, shape[1], (9, 2), device=DEVICE)
    g = randn(shape[0], 9).abs()  # of one sign: with one channel the gradient is their sum

    def gram(x, acc):
        rows = x.flatten(2).to(acc)
        return (rows @ rows.mT)[:, pairs[:, 0], pairs[:, 1]]

    def whole(f, x):
        out = f(x)
        return out, torch.autograd.grad(out, x, g.to(out.dtype))[0]

    acc = F64 if dtype == F64 else torch.float32
    ours = whole(lambda x: gram_pairs(x, pairs), x)
    today = whole(lambda x: gram(x, acc), x)
    for got, want, eager in zip(ours, whole(lambda x: gram(x, F64), double(x)), today):
        assert_accurate(got, want, eager)
    assert ours[0].dtype == acc and ours[1].dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 5, 17), (3, 2, 23, 130)], ids=str)
def test_pooling_against_float64(shape, dtype):
    h = randn(*shape, dtype=dtype, grad=True)
    mask = torch.rand(shape[1:3], device=DEVICE) < 0.6
    mask[0, 0] = True
    g = randn(shape[1], shape[3], dtype=dtype)

    def eager(h):
        m = mask[None, :, :, None].to(h.dtype)
        return ((h * m).sum(2) / m.sum(2).clamp_min(1)).mean(0)

    y, today, truth = masked_mean_pool_layers(h, mask), eager(h), eager(d := double(h))
    assert_accurate(y, truth, today)
    assert_accurate(
        torch.autograd.grad(y, h, g)[0],
        torch.autograd.grad(truth, d, g.double())[0],
        torch.autograd.grad(today, h, g)[0],
    )
    with torch.no_grad():
        padded = torch.where(mask[:, :, None], h, torch.nan)
    assert torch.equal(masked_mean_pool_layers(padded, mask), y)


@given(
    n=st.integers(0, 40),
    columns=st.integers(0, 40),
    classes=st.integers(1, 5),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([1e-15, 1.0, 1e4]),
    swap=st.booleans(),
)
def test_any_shape_and_stride(n, columns, classes, dtype, scale, swap):
    scale = 1.0 if dtype == torch.float16 else scale
    x = ((randn(columns, n).T if swap else randn(n, columns)) * scale).to(dtype)
    labels = labels_of(n, classes)
    count, mean, full = class_moments(x, labels, classes)
    want = exact_class_moments(x, labels, classes, 1)
    with solera.backend("reference"):
        today = class_moments(x, labels, classes)
    assert torch.equal(count, want[0])
    assert_accurate(mean, want[1], today[1])
    assert_accurate(full, want[2], today[2])


def test_extreme_values():
    x = randn(6, 4)
    x[0, 1], x[1, 2], x[2] = torch.nan, torch.inf, 1e-42
    labels = torch.tensor([0, 0, 1, 1, 1, 1], device=DEVICE)
    _, mean, full = class_moments(x, labels, 2)
    assert mean[0, 1].isnan() and mean[0, 2].isinf() and torch.isfinite(mean[0, [0, 3]]).all()
    assert torch.isfinite(full[1]).all()  # what class 0 holds stays in class 0


def test_same_bits_for_any_thread_count():
    n = 40 if INTERPRETED else 700
    x, labels = randn(n, 210 if not INTERPRETED else 30), labels_of(n, 3)
    f, pairs = randn(2, 9, 50, grad=True), torch.randint(0, 9, (30, 2), device=DEVICE)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            dots = gram_pairs(f, pairs)
            results.append(
                (*class_moments(x, labels, 3), dots, *torch.autograd.grad(dots.sum(), f))
            )
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


# ---- the contract with torch --------------------------------------------------------------------------


def test_opcheck():
    base = randn(8, 8)
    order, offsets = torch.randperm(8, device=DEVICE), torch.tensor([0, 3, 8], device=DEVICE)
    check = torch.library.opcheck
    for x in (base, base.T, base[:1].expand(8, 8)):
        for o in (None, order):
            check(ops.segment_moments.default, (x, o, offsets))
            mean = ops.segment_moments(x, o, offsets)[0]
            check(ops.segment_scatter.default, (x, o, offsets, mean))
    pairs = torch.tensor([[0, 1], [2, 2], [1, 0]], device=DEVICE)
    for x in (randn(2, 3, 4), randn(4, 3, 2).transpose(0, 2), randn(1, 3, 1).expand(2, 3, 4)):
        check(ops.pair_dots.default, (x, pairs))
        check(ops.pair_dots_backward.default, (randn(1, 1).expand(2, 3), x, pairs))
    mask = torch.ones(3, 4, dtype=torch.bool, device=DEVICE)
    for h in (
        randn(2, 3, 4, 5),
        randn(5, 3, 4, 2).transpose(0, 3),
        randn(1, 3, 4, 5).expand(2, 3, 4, 5),
    ):
        check(ops.pool_layers.default, (h, mask))


def compiled_matches(backend):
    def f(x, labels, features, pairs, h, mask):
        _, mean, full = class_moments(x, labels, 3)
        one, c = covariance(x)
        y = gram_pairs(features, pairs).sum() + masked_mean_pool_layers(h, mask).sum()
        return y + mean.sum() + full.sum() + one.sum() + c.square().sum()

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend=backend)
    for n in (5, 8):
        x, features, h = (
            randn(n, 4, grad=True),
            randn(2, n, 6, grad=True),
            randn(2, n, 3, 4, grad=True),
        )
        args = (x, labels_of(n, 3), features, torch.randint(0, n, (4, 2), device=DEVICE), h,
                torch.ones(n, 3, dtype=torch.bool, device=DEVICE))  # fmt: skip
        want, got = f(*args), compiled(*args)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(
            torch.autograd.grad(got, (x, features, h)), torch.autograd.grad(want, (x, features, h))
        )


@pytest.mark.inductor
@pytest.mark.no_interpreter
def test_compile_inductor():
    compiled_matches("inductor")


def test_func_transforms():
    x = randn(5, 3, dtype=F64)
    f = lambda x: covariance(x)[1].square().sum()
    y = x.clone().requires_grad_()
    want = torch.autograd.grad(f(y), y)[0]
    torch.testing.assert_close(torch.func.grad(f)(x), want)
    many = torch.func.vmap(covariance)(torch.stack([x, 2 * x]))[1]
    torch.testing.assert_close(many[1], covariance(2 * x)[1])
    _, tangent = torch.func.jvp(f, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, want.sum(), atol=1e-12, rtol=1e-9)


# ---- bad input ---------------------------------------------------------------------------------------

X, L = randn(4, 3), torch.zeros(4, dtype=torch.int64, device=DEVICE)
F, P = randn(2, 3, 4), torch.zeros(5, 2, dtype=torch.int64, device=DEVICE)
H, M = randn(2, 3, 4, 5), torch.ones(3, 4, dtype=torch.bool, device=DEVICE)
BAD = [
    (lambda: class_moments(X[0], L, 2), ValueError, "features: expected 2 dimensions"),
    (lambda: class_moments(X.int(), L, 2), TypeError, "features: expected float32"),
    (lambda: class_moments(X, L[:3], 2), ValueError, r"labels: expected shape \(4,\)"),
    (lambda: class_moments(X, L.int(), 2), TypeError, "labels: expected an int64 tensor"),
    (lambda: class_moments(X, L, 0), ValueError, "num_classes: expected a positive int"),
    (lambda: covariance(X[0]), ValueError, "x: expected 2 dimensions"),
    (lambda: gram_pairs(X, P), ValueError, "features: expected at least 3"),
    (lambda: gram_pairs(F, P.float()), TypeError, "pairs: expected an int64"),
    (lambda: gram_pairs(F, P[:, 0]), ValueError, r"pairs: expected shape \(5, 2\)"),
    (lambda: gram_pairs(F, P + 3), ValueError, r"pairs: expected indices in \[0, 3\)"),
    (lambda: masked_mean_pool_layers(H[0], M), ValueError, "h: expected 4 dimensions"),
    (lambda: masked_mean_pool_layers(H, M.int()), TypeError, "mask: expected a bool tensor"),
    (lambda: masked_mean_pool_layers(H, M[:2]), ValueError, r"mask: expected shape \(3, 4\)"),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input_is_named(case):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.skipif(INTERPRETED, reason="what the C++ kernels refuse themselves")
def test_kernels_read_nothing_outside():
    offsets = torch.tensor([0, 4], device=DEVICE)
    for call in (
        lambda: ops.segment_moments(X, torch.tensor([0, 1, 2, 9]), offsets),
        lambda: ops.segment_moments(X, None, torch.tensor([0, 5])),
        lambda: ops.segment_moments(X, None, torch.tensor([3, 1])),
        lambda: ops.pair_dots(F, P - 1),
    ):
        with pytest.raises(RuntimeError, match=r"out of range|must not fall"):
            call()
