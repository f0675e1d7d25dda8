"""Core small: many small matrices balanced at once, against the definition in float64."""

import pytest
import torch
from function_checks import compiles, works_under_torch_func
from helpers import DEVICE, DTYPES, INTERPRETED, ULP, assert_accurate, randn, relative_error
from hypothesis import given
from hypothesis import strategies as st

import solera
from solera.sinkhorn import sinkhorn_normalize
from solera.sinkhorn.small import (
    VARIANTS,
    normalize_factors,
    normalize_gradient,
    normalize_reference,
)

ops = torch.ops.solera
INF = float("inf")


def public_formula(x, repeat, eps):
    """The public kernels' definition, of square matrices."""
    x = x.softmax(-1) + eps
    x = x / (x.sum(-2, keepdim=True) + eps)
    for _ in range(repeat - 1):
        x = x / (x.sum(-1, keepdim=True) + eps)
        x = x / (x.sum(-2, keepdim=True) + eps)
    return x


def near_identity(batch, n):
    return 10 * torch.eye(n, device=DEVICE) + randn(batch, n, n, scale=0.5)


# Shapes that take every path: the 4 x 4 kernel, two vectors of matrices, one; tails; one row, one column.
LOGITS = {
    "4x4": lambda: randn(37, 4, 4),
    "4x4, far apart": lambda: randn(20, 4, 4, scale=6.0),
    "4x4, near identity": lambda: near_identity(20, 4),
    "3x3": lambda: randn(3, 5, 3, 3),
    "8x8": lambda: randn(9, 8, 8, scale=2.0),
    "13x13": lambda: randn(3, 13, 13),
    "5x9": lambda: randn(18, 5, 9),
    "11x6": lambda: randn(4, 11, 6),
    "1x7": lambda: randn(4, 1, 7),
    "7x1": lambda: randn(4, 7, 1),
    "32x32": lambda: randn(2, 32, 32),
    "40x33": lambda: randn(2, 40, 33),
}
FIRST_CASES = ["4x4", "5x9"]
CASES = FIRST_CASES if INTERPRETED else list(LOGITS)


@pytest.mark.parametrize("first", ["rows", "columns"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", CASES)
def test_forward_and_backward_against_float64(case, variant, first):
    x = LOGITS[case]()
    T = 6 if INTERPRETED else 20
    options = (T, VARIANTS.index(variant), first == "rows", 1e-6)
    grad = torch.randn_like(x)

    def of(function, x, grad, **kw):
        x = x.detach().requires_grad_()
        y = function(x)
        return y, torch.autograd.grad(y, x, grad.to(x.dtype))[0]

    ours = lambda x: sinkhorn_normalize(x, T, variant=variant, first=first)
    formula = lambda x: normalize_reference(x, *options)
    y, dx = of(ours, x, grad)
    eager_y, eager_dx = of(formula, x, grad)
    exact_y, exact_dx = of(formula, x.double(), grad)
    assert y.dtype == dx.dtype == torch.float32 and y.shape == dx.shape == x.shape
    assert relative_error(y, exact_y) <= max(2 * relative_error(eager_y, exact_y), 2.5e-7)
    if min(x.shape[-2:]) == 1:  # then the result does not depend on x, or is its softmax
        assert (dx - exact_dx).abs().max() < 1e-6
    else:
        assert relative_error(dx, exact_dx) <= max(2 * relative_error(eager_dx, exact_dx), 2.5e-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype):
    for shape in ((21, 4, 4), (7, 3, 5)):
        x, grad = randn(*shape, dtype=dtype), randn(*shape, dtype=dtype)
        for variant in VARIANTS:
            leaf = x.clone().requires_grad_()
            y = sinkhorn_normalize(leaf, 3, variant=variant)
            dx = torch.autograd.grad(y, leaf, grad)[0]
            wide = x.double().requires_grad_()
            exact = normalize_reference(wide, 3, VARIANTS.index(variant), True, 1e-6)
            assert y.dtype == dx.dtype == dtype
            allowed = 4 * ULP[dtype] if dtype in (torch.float32, torch.float64) else ULP[dtype]
            assert relative_error(y, exact) <= allowed
            assert (
                relative_error(dx, torch.autograd.grad(exact, wide, grad.double())[0])
                <= 2 * allowed
            )


@pytest.mark.no_interpreter
def test_the_public_formula():
    x = randn(5, 4, 4, dtype=torch.float64, scale=3.0)
    for repeat in (1, 2, 20):
        assert_accurate(sinkhorn_normalize(x, repeat), public_formula(x, repeat, 1e-6))
        assert_accurate(
            sinkhorn_normalize(x, repeat, first="columns", eps=1e-3),
            public_formula(x.mT, repeat, 1e-3).mT,
        )


@pytest.mark.no_interpreter
@pytest.mark.parametrize("variant", VARIANTS)
def test_doubly_stochastic(variant):
    """Sums to 1 (the side that is not first to eps at once), and the limit is a scaling of exp(logits)."""
    x = randn(50, 4, 4, dtype=torch.float64)
    eps = 1e-12
    for first, last_dim in (("rows", -2), ("columns", -1)):
        m = sinkhorn_normalize(x, 100, variant=variant, first=first, eps=eps)
        assert (m >= 0).all()
        assert (m.sum(last_dim) - 1).abs().max() < 10 * eps
        assert (m.sum((-1, -2)) - 4).abs().max() < 40 * eps
        assert (m.sum(-3 - last_dim) - 1).abs().max() < 1e-9
        # log M - x is a row term plus a column term.
        rest = m.log() - x
        rest = rest - rest.mean(-1, keepdim=True)
        rest = rest - rest.mean(-2, keepdim=True)
        assert rest.abs().max() < 1e-8
    wide = sinkhorn_normalize(randn(9, 3, 5, dtype=torch.float64), 200, variant=variant, eps=eps)
    assert (wide.sum(-1) - 1).abs().max() < 1e-9 and (wide.sum(-2) - 0.6).abs().max() < 1e-9
    tall = sinkhorn_normalize(
        randn(9, 5, 3, dtype=torch.float64), 200, variant=variant, eps=eps, first="columns"
    )
    assert (tall.sum(-2) - 1).abs().max() < 1e-9 and (tall.sum(-1) - 0.6).abs().max() < 1e-9


@pytest.mark.parametrize("first", ["rows", "columns"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradcheck(variant, first):
    mask = torch.ones(3, 3, dtype=torch.bool, device=DEVICE)
    mask[0, 1] = False
    cases = [(randn(1, 3, 3), mask), (randn(2, 3, 3), None), (randn(1, 2, 4, scale=4.0), None)]
    for x, m in cases[: 1 if INTERPRETED else 3]:
        f = lambda x: sinkhorn_normalize(x, 3, variant=variant, first=first, mask=m, eps=1e-2)
        x = x.double().requires_grad_()
        assert torch.autograd.gradcheck(f, x)
        assert torch.autograd.gradgradcheck(f, x)


def test_floored_sums_have_the_gradient_of_the_floor():
    """ "scaling" with an eps that some sums fall below."""
    x = randn(2, 4, 4, dtype=torch.float64, scale=3.0).requires_grad_()
    f = lambda x: sinkhorn_normalize(x, 3, variant="scaling", eps=0.7)
    assert torch.autograd.gradcheck(f, x)
    y = normalize_reference(x.detach(), 3, 1, True, 0.7)
    assert (y.sum(-1) < 0.99).any()


def test_log_variant_beyond_exponentials():
    """Logits a thousand apart: no sum underflows, and neighbours that are not far keep their bits."""
    x = randn(19, 4, 4)
    T = 3 if INTERPRETED else 10
    near = sinkhorn_normalize(x, T, variant="log")
    x[3] *= 1000
    x[7, :, 2] -= 500
    leaf = x.requires_grad_()
    y = sinkhorn_normalize(leaf, T, variant="log")
    wide = leaf.detach().double().requires_grad_()
    exact = normalize_reference(wide, T, 2, True, 1e-6)
    assert relative_error(y, exact) < 1e-4  # of logits of 3000 in float32
    assert torch.isfinite(y).all() and (y[7].sum(-2) - 1).abs().max() < 1e-4
    others = [k for k in range(19) if k not in (3, 7)]
    assert torch.equal(y[others], near[others])
    grad = torch.randn_like(y)
    dx = torch.autograd.grad(y, leaf, grad)[0]
    want = torch.autograd.grad(exact, wide, grad.double())[0]
    assert relative_error(dx[others], want[others]) < 1e-6
    assert relative_error(dx[7], want[7]) < 1e-3 and (dx[3] - want[3]).abs().max() < 1e-3


@pytest.mark.parametrize("variant", VARIANTS)
def test_mask_and_forbidden_entries(variant):
    x = randn(6, 4, 4)
    mask = torch.rand(6, 4, 4, device=DEVICE) > 0.3
    mask |= torch.eye(4, dtype=torch.bool, device=DEVICE)
    mask[2, 1] = False  # a row and
    mask[4, :, 3] = False  # a column with nothing
    leaf = x.clone().requires_grad_()
    T = 5 if INTERPRETED else 200
    y = sinkhorn_normalize(leaf, T, variant=variant, mask=mask)
    assert torch.isfinite(y).all() and (y[~mask] == 0).all()
    exact = normalize_reference(
        x.double().where(mask, -INF), T, VARIANTS.index(variant), True, 1e-6
    )
    assert relative_error(y, exact) < 2e-6
    dx = torch.autograd.grad(y, leaf, torch.randn_like(y))[0]
    assert torch.isfinite(dx).all() and (dx[~mask] == 0).all()
    shared = sinkhorn_normalize(x, 2, mask=mask[0], variant=variant)
    assert torch.equal(shared, sinkhorn_normalize(x.where(mask[0], -INF), 2, variant=variant))
    large = torch.zeros(1, 35, 35, device=DEVICE)
    assert (sinkhorn_normalize(large, mask=mask.new_zeros(35, 35), variant=variant) == 0).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_nan_stays_in_its_matrix(variant):
    x = randn(40, 4, 4)
    clean = sinkhorn_normalize(x, 5, variant=variant)
    x[5, 1, 2], x[11, 0, 0], x[20] = float("nan"), INF, 1e30
    y = sinkhorn_normalize(x, 5, variant=variant)
    assert y[5].isnan().all() and y[11].isnan().any() and torch.isfinite(y[20]).all()
    rest = [k for k in range(40) if k not in (5, 11, 20)]
    assert torch.equal(y[rest], clean[rest])


@pytest.mark.no_interpreter
def test_implicit_gradient():
    """That of the limit: where it has converged the unrolled one, and twice differentiable."""
    x = randn(3, 4, 4, dtype=torch.float64, grad=True)
    for shape in ((3, 4, 4), (2, 3, 5), (1, 36, 34)):
        x = randn(*shape, dtype=torch.float64, grad=True)
        grad = torch.randn_like(x)
        got = [
            torch.autograd.grad(sinkhorn_normalize(x, 200, variant="log", gradient=g), x, grad)[0]
            for g in ("implicit", "unrolled")
        ]
        torch.testing.assert_close(got[0], got[1], rtol=1e-8, atol=1e-10)
    f = lambda x: sinkhorn_normalize(x, 300, variant="scaling", gradient="implicit")
    x = randn(1, 3, 3, dtype=torch.float64, grad=True)
    assert torch.autograd.gradcheck(f, x)
    assert torch.autograd.gradgradcheck(f, x)
    # Near the identity 20 iterations are not the limit: the default is exact, the implicit one far off.
    x = near_identity(200, 4).double().requires_grad_()
    grad = torch.randn_like(x)
    each = {}
    for kind in ("unrolled", "implicit"):
        each[kind] = torch.autograd.grad(sinkhorn_normalize(x, gradient=kind), x, grad)[0]
    want = torch.autograd.grad(public_formula(x, 20, 1e-6), x, grad)[0]
    assert relative_error(each["unrolled"], want) < 1e-10
    assert relative_error(each["implicit"], want) > 0.3


@pytest.mark.no_interpreter
def test_no_gradient():
    x = randn(2, 3, 3, grad=True)
    y = sinkhorn_normalize(x, gradient="none")
    assert not y.requires_grad and torch.equal(y, sinkhorn_normalize(x.detach()))


@pytest.mark.no_interpreter
def test_only_the_input_is_saved():
    x = randn(64, 4, 4, grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.numel()) or t, lambda t: t
    ):
        sinkhorn_normalize(x, 100)
    assert kept == [x.numel()]


def test_same_bits_in_any_batch():
    for shape in ((70, 4, 4), (70, 3, 3), (9, 10, 10)):
        x, grad = randn(*shape), randn(*shape)
        for kind in range(1 if INTERPRETED else 3):
            args = (2, kind, True, 1e-6)
            y = ops.sinkhorn_small(x, *args)
            dx = ops.sinkhorn_small_backward(grad, x, *args)
            for at in (slice(0, 1), slice(3, 8)):
                assert torch.equal(ops.sinkhorn_small(x[at], *args), y[at])
                assert torch.equal(ops.sinkhorn_small_backward(grad[at], x[at], *args), dx[at])


@pytest.mark.no_interpreter
def test_same_bits_for_any_thread_count():
    x, grad = randn(5000, 4, 4), randn(5000, 4, 4)
    args = (20, 0, True, 1e-6)
    want = ops.sinkhorn_small(x, *args), ops.sinkhorn_small_backward(grad, x, *args)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        got = ops.sinkhorn_small(x, *args), ops.sinkhorn_small_backward(grad, x, *args)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_strides_and_sizes_of_zero_and_one():
    x = randn(4, 3, 4, 4)
    want = sinkhorn_normalize(x)
    assert torch.equal(sinkhorn_normalize(x.transpose(0, 1)), want.transpose(0, 1))
    turned = sinkhorn_normalize(x.mT, first="columns").mT
    assert torch.equal(turned, want)
    same = sinkhorn_normalize(x[:1, :1].expand(2, 5, 4, 4))
    assert torch.equal(same, want[:1, :1].expand(2, 5, 4, 4))
    for shape in ((0, 4, 4), (3, 0, 5), (2, 5, 0)):
        empty = torch.zeros(shape, device=DEVICE, requires_grad=True)
        y = sinkhorn_normalize(empty)
        assert y.shape == shape
        y.sum().backward()
    one = sinkhorn_normalize(torch.tensor([[3.0]], device=DEVICE), variant="log")
    assert one.shape == (1, 1) and abs(float(one) - 1) < 1e-6


@pytest.mark.no_interpreter
def test_reference_backend_and_factors_agree():
    for shape in ((2, 3, 5), (2, 4, 4)):
        x, grad = randn(*shape, dtype=torch.float64, grad=True), randn(*shape, dtype=torch.float64)
        for kind, variant in enumerate(VARIANTS):
            for rows in (True, False):
                args = (7, kind, rows, 1e-3)
                y = normalize_reference(x, *args)
                dx = torch.autograd.grad(y, x, grad)[0]
                torch.testing.assert_close(normalize_factors(x.detach(), *args), y.detach())
                torch.testing.assert_close(normalize_gradient(grad, x.detach(), *args), dx)
                with solera.backend("reference"):
                    first = "rows" if rows else "columns"
                    z = sinkhorn_normalize(x, 7, variant=variant, first=first, eps=1e-3)
                    assert torch.equal(z, y)
                    assert torch.equal(torch.autograd.grad(z, x, grad)[0], dx)


def test_opcheck():
    x = randn(5, 4, 4)
    for logits in (x, x.mT, x[:1].expand(5, 4, 4), randn(2, 3, 5)):
        torch.library.opcheck(ops.sinkhorn_small.default, (logits, 3, 0, True, 1e-6))
        for grad in (torch.ones((), device=DEVICE).expand(logits.shape), torch.randn_like(logits)):
            args = (grad, logits, 3, 1, False, 1e-6)
            torch.library.opcheck(ops.sinkhorn_small_backward.default, args)


def test_compile():
    def both(x):
        return sinkhorn_normalize(x * 2, 3) + sinkhorn_normalize(x, 2, gradient="implicit")

    compiles(both, lambda n: (randn(n, n, n + 1, grad=True),))


@pytest.mark.no_interpreter
def test_torch_func():
    for variant in VARIANTS:
        works_under_torch_func(
            lambda x: sinkhorn_normalize(x, 3, variant=variant), (randn(2, 3, 3),)
        )
    x = randn(5, 2, 3, 3)
    each = torch.func.vmap(sinkhorn_normalize)(x)
    torch.testing.assert_close(each, sinkhorn_normalize(x))
    with pytest.raises(NotImplementedError, match="implicit"):
        torch.func.vmap(lambda x: sinkhorn_normalize(x, gradient="implicit"))(x)


@pytest.mark.no_interpreter
@given(
    shape=st.tuples(st.integers(0, 20), st.integers(0, 9), st.integers(0, 9)),
    options=st.tuples(
        st.integers(1, 4), st.integers(0, 2), st.booleans(), st.sampled_from([1e-6, 0.1])
    ),
    scale=st.sampled_from([0.0, 1.0, 50.0, 1e30]),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_any_shape_and_value(shape, options, scale, dtype):
    x = (torch.randn(shape, dtype=torch.float64) * scale).to(DEVICE, dtype).requires_grad_()
    iterations, kind, rows, eps = options
    y = sinkhorn_normalize(
        x, iterations, variant=VARIANTS[kind], first="rows" if rows else "columns", eps=eps
    )
    dx = torch.autograd.grad(y.sum(), x)[0]
    assert y.shape == dx.shape == shape
    assert torch.isfinite(y).all() and torch.isfinite(dx).all()
    if x.numel() and scale < 1e30:
        # A logit of 50 has an ulp of 4e-6 in float32, and so has the result.
        allowed = (1e-13 if dtype == torch.float64 else 1e-6) * max(1.0, scale)
        exact = normalize_reference(x.detach().double(), *options)
        assert (y - exact).abs().max() < allowed


@pytest.mark.no_interpreter
def test_autocast_leaves_it_alone():
    for n in (4, 40):
        x = randn(3, n, n)
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            y = sinkhorn_normalize(x)
        assert torch.equal(y, sinkhorn_normalize(x))


@pytest.mark.no_interpreter
def test_bad_input():
    x = randn(2, 3, 3)
    for error, match, call in (
        (TypeError, "logits: expected float32", lambda: sinkhorn_normalize(x.long())),
        (ValueError, "logits: expected at least 2", lambda: sinkhorn_normalize(x[0, 0])),
        (ValueError, "iterations: expected a positive", lambda: sinkhorn_normalize(x, 0)),
        (ValueError, "iterations: expected a positive", lambda: sinkhorn_normalize(x, 2.0)),
        (ValueError, "variant: expected one of", lambda: sinkhorn_normalize(x, variant="exp")),
        (ValueError, "first: expected one of", lambda: sinkhorn_normalize(x, first="row")),
        (ValueError, "eps: expected a finite", lambda: sinkhorn_normalize(x, eps=0.0)),
        (ValueError, "gradient: expected one of", lambda: sinkhorn_normalize(x, gradient="exact")),
        (TypeError, "mask: expected a bool", lambda: sinkhorn_normalize(x, mask=x)),
        (ValueError, "mask: expected a shape", lambda: sinkhorn_normalize(x, mask=x[:, :2] > 0)),
        (ValueError, "mask: expected a shape", lambda: sinkhorn_normalize(x[0], mask=x > 0)),
    ):
        with pytest.raises(error, match=match):
            call()
