"""Core sweep: all interpolations of two models against the formula in float64, gradients, and bad input."""

import pytest
import torch
from helpers import DEVICE, DTYPES, INTERPRETED, ULP, assert_accurate, randn
from hypothesis import given
from hypothesis import strategies as st

import solera
from solera.weights import interpolate, wise_ft

ops = torch.ops.solera
SHAPES = [(1,), (3, 5), (100,), (2048 + 24,), (3, 5461 + 17)]


def exact(a, b, t):
    """The formula in float64, written out; t (A,)."""
    a, b = a.double(), b.double()
    return torch.stack([(1 - x) * a + x * b for x in t.double()])


def eager(a, b, t):
    return torch.stack([(1 - x) * a + x * b for x in t.tolist()])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 3, 11])
def test_forward_and_backward_against_float64(count, dtype):
    for shape in SHAPES[:4] if INTERPRETED else SHAPES:
        a, b = randn(*shape, dtype=dtype, grad=True), randn(*shape, dtype=dtype, grad=True)
        t_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        t = torch.rand(count).to(device=DEVICE, dtype=t_dtype).requires_grad_()
        g = randn(count, *shape, dtype=dtype)
        y = interpolate(a, b, t)
        assert y.dtype == dtype and y.shape == (count, *shape)
        ours = (y, *torch.autograd.grad(y, (t, a, b), g))
        with torch.no_grad():
            assert torch.equal(interpolate(a, b, t), y)
            today = eager(a, b, t)
        copies = [x.detach().double().requires_grad_() for x in (t, a, b)]
        truth = exact(copies[1], copies[2], copies[0])
        truths = (truth, *torch.autograd.grad(truth, copies, g.double()))
        assert_accurate(ours[0], truths[0], today, "out")
        size = (g.double().norm() * (b.double() - a.double()).norm()).item()
        assert (ours[1].double() - truths[1]).norm() <= 4 * ULP[t_dtype] * size
        for d, e in zip(ours[2:], truths[2:]):
            assert d.dtype == dtype
            if d.dtype == torch.float32:  # a sum of `count` terms that may cancel
                assert (d.double() - e).norm() <= 2e-7 * g.double().norm()
            else:
                assert_accurate(d, e, e.float(), "dmodel")


def test_the_ends_are_exact_and_a_number_has_no_dimension():
    a, b = randn(1000), randn(1000)
    y = interpolate(a, b, [0.0, 1.0, 0.3, -0.5])
    assert torch.equal(y[0], a) and torch.equal(y[1], b)
    for t in (0.3, torch.tensor(0.3, device=DEVICE), torch.tensor(0.3, dtype=torch.float64)):
        z = wise_ft(a, b, t.to(DEVICE) if isinstance(t, torch.Tensor) else t)
        assert z.shape == a.shape
        torch.testing.assert_close(z, y[2])
    assert torch.equal(wise_ft(a, b, 0.3), y[2])
    t = torch.tensor(0.3, device=DEVICE, requires_grad=True)
    (dt,) = torch.autograd.grad(wise_ft(a, b, t), t, a)
    assert dt.shape == ()
    torch.testing.assert_close(dt, (a.double() * (b.double() - a.double())).sum().float())


def test_lists_state_dicts_modules_and_columns():
    shapes = [(4, 5), (0,), (7,), (), (3000,)]
    a, b = ([randn(s, grad=True) for s in shapes] for _ in range(2))
    t = torch.rand(3, len(shapes), device=DEVICE, requires_grad=True)
    out = interpolate(a, b, t)
    grads = [randn(3, *s) for s in shapes]
    dt, *dmodels = torch.autograd.grad(out, [t, *a, *b], grads)
    for item, shape in enumerate(shapes):
        assert out[item].shape == (3, *shape)
        column = t.detach()[:, item]
        torch.testing.assert_close(
            out[item].double(),
            exact(a[item].detach(), b[item].detach(), column),
            rtol=1e-6,
            atol=1e-6,
        )
        flat = grads[item].double().reshape(3, a[item].numel())
        delta = (b[item] - a[item]).detach().double().flatten()
        torch.testing.assert_close(dt[:, item].double(), flat @ delta, rtol=1e-4, atol=1e-4)
        far = column.double().view(3, *(1,) * len(shape))
        for place, factor in ((item, 1 - far), (len(shapes) + item, far)):
            expected = (factor * grads[item].double()).sum(0)
            torch.testing.assert_close(dmodels[place].double(), expected, rtol=1e-5, atol=1e-6)
    # A result that nothing depends on.
    (partial,) = torch.autograd.grad(interpolate(a, b, t)[4], t, grads[4])
    assert torch.equal(partial[:, 4], dt[:, 4]) and not partial[:, :4].any()

    def model():
        return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).to(DEVICE)

    first, second = model(), model()
    states = wise_ft(first, second, [0.25, 0.5])
    assert list(states) == list(first.state_dict())
    assert states["0.weight"].shape == (2, 4, 3) and not states["0.weight"].requires_grad
    assert states["1.num_batches_tracked"].shape == ()
    single = wise_ft(first.state_dict(), second.state_dict(), 0.5)
    assert torch.equal(single["0.weight"], states["0.weight"][1])
    model().load_state_dict(single)


def test_dtypes_of_a_pair_are_promoted():
    a, b = randn(50, dtype=torch.bfloat16), randn(50)
    y = interpolate(a, b, [0.25, 0.75])
    assert y.dtype == torch.float32
    assert_accurate(y, exact(a, b, torch.tensor([0.25, 0.75])))
    assert interpolate(a, a.half(), 0.5).dtype == torch.float32
    assert interpolate(a, b.double(), 0.5).dtype == torch.float64


def test_gradcheck_and_gradgradcheck():
    a, b = (randn(2, 3, dtype=torch.float64, grad=True) for _ in range(2))
    t = randn(2, dtype=torch.float64, grad=True)
    assert torch.autograd.gradcheck(interpolate, (a, b, t))
    assert torch.autograd.gradgradcheck(interpolate, (a, b, t))
    both = randn(2, 2, dtype=torch.float64, grad=True)

    def f(t, *tensors):
        return interpolate(tensors[:2], tensors[2:], t)[1]

    tensors = [randn(n, dtype=torch.float64, grad=True) for n in (2, 3, 2, 3)]
    assert torch.autograd.gradcheck(f, (both, *tensors))
    assert torch.autograd.gradgradcheck(f, (both, *tensors))


def test_frozen_models_cost_nothing():
    a, b = randn(256), randn(256, grad=True)
    t = torch.rand(4, device=DEVICE)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: saved.append(x.numel()) or x, lambda x: x
    ):
        y = interpolate(a, b, t)
    assert sum(saved) == 4
    (db,) = torch.autograd.grad(y, b, torch.ones_like(y))
    torch.testing.assert_close(db, t.sum().expand(256))
    dots, da, db = ops.lerp_sweep_backward([y.detach()], [], [], t, False, True, False)
    assert dots.numel() == 0 and len(da) == 1 and not db


def test_strided_and_expanded_input():
    base = randn(12, 20)
    t = torch.tensor([0.5, -1.0, 2.0], device=DEVICE)
    for view in (base.t(), base[:, ::2], base[None].expand(3, 12, 20)):
        dense = view.contiguous()
        other = randn(*view.shape)
        y = interpolate(view, other, t)
        assert y.is_contiguous() and torch.equal(y, interpolate(dense, other, t))
    a, b = (randn(5, 6, grad=True) for _ in range(2))
    da, db = torch.autograd.grad(interpolate(a, b, t).sum(), (a, b))  # expanded, stride 0
    torch.testing.assert_close(db, torch.full_like(db, 1.5))
    torch.testing.assert_close(da, torch.full_like(da, 1.5))
    wide = torch.rand(6, device=DEVICE)[::2]
    assert torch.equal(interpolate(a, b, wide), interpolate(a, b, wide.contiguous()))


def test_extreme_values_and_empty():
    inf, nan = float("inf"), float("nan")
    a = torch.tensor([nan, inf, 1e30, 1e-42, -0.0, 1.0] * 7, device=DEVICE)
    y = interpolate(a, torch.ones_like(a), [0.25, 0.5])
    torch.testing.assert_close(
        y, torch.stack([0.75 * a + 0.25, 0.5 * a + 0.5]), equal_nan=True, rtol=1e-6, atol=0
    )
    none = torch.empty(0, device=DEVICE)
    assert interpolate(a, a, none).shape == (0, 42)
    assert interpolate(none, none, [0.5, 0.2]).shape == (2, 0)
    x, t = randn(4, grad=True), none.clone().requires_grad_()
    dx, dt = torch.autograd.grad(interpolate(x, x.detach(), t).sum(), (x, t))
    assert not dx.any() and dt.shape == (0,)


@given(
    shapes=st.lists(st.lists(st.integers(0, 6), max_size=3), min_size=1, max_size=4),
    count=st.integers(0, 5),
    data=st.data(),
    columns=st.booleans(),
)
def test_any_shapes_dtypes_and_counts(shapes, count, data, columns):
    dtypes = [data.draw(st.sampled_from(DTYPES)) for _ in shapes]
    a, b = ([randn(s, dtype=d) for s, d in zip(shapes, dtypes)] for _ in range(2))
    t = torch.rand(*((count, len(shapes)) if columns else (count,)), device=DEVICE)
    for item, y in enumerate(interpolate(a, b, t)):
        column = t[:, item] if columns else t
        assert y.shape == (count, *shapes[item]) and y.dtype == dtypes[item]
        if count:
            assert_accurate(y, exact(a[item], b[item], column), eager(a[item], b[item], column))


def test_same_bits_for_any_thread_count_and_list():
    sizes = (40000, 3, 16384, 16385) if not INTERPRETED else (5000, 3)
    a, b = ([randn(n) for n in sizes] for _ in range(2))
    t = torch.rand(5, device=DEVICE, requires_grad=True)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            out = interpolate(a, b, t)
            results.append((*out, *torch.autograd.grad(out, t, [y.detach() for y in out])))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other))
    for item in range(len(sizes)):  # a tensor's result does not depend on the list it came in
        assert torch.equal(interpolate(a[item], b[item], t), results[0][item])


@pytest.mark.no_interpreter
def test_large_outputs_take_the_streaming_stores():
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        n = (9 << 20) // torch.finfo(
            dtype
        ).bits * 8 + 5  # the second result is not aligned to a vector
        a, b, t = randn(n, dtype=dtype), randn(n, dtype=dtype), [0.25, 0.5]
        y = interpolate(a, b, t)
        half = n // 2
        assert torch.equal(y[:, :half], interpolate(a[:half], b[:half], t))
        assert_accurate(y[1], exact(a, b, torch.tensor([0.5]))[0])


# ---- the contract with torch --------------------------------------------------------------------------


def test_opcheck():
    a, b, g = randn(4, 6), randn(6, 4).t(), randn(1).expand(2, 4, 6)
    small = randn(3)
    for t in (torch.rand(2, device=DEVICE), torch.rand(2, 2, device=DEVICE)):
        torch.library.opcheck(ops.lerp_sweep.default, ([a, small], [b, small], t))
        for need in ((True, True, True), (False, False, True)):
            args = ([g, randn(2, 3)], [a, small], [b, small], t, *need)
            torch.library.opcheck(ops.lerp_sweep_backward.default, args)


def compiled_matches(backend):
    def f(t, a, b):
        out = interpolate([a, a[0]], [b, b[0]], t)
        return out[0] * 2 + out[1].unsqueeze(1)

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend=backend)
    for n in (4, 7):
        args = [randn(3, grad=True), randn(n, 6, grad=True), randn(n, 6, grad=True)]
        ours, plain = compiled(*args), f(*args)
        torch.testing.assert_close(ours, plain)
        g = randn(*plain.shape)
        for p, q in zip(torch.autograd.grad(ours, args, g), torch.autograd.grad(plain, args, g)):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)


@pytest.mark.inductor
@pytest.mark.no_interpreter
def test_inductor():
    compiled_matches("inductor")


def test_functional_transforms_and_backend_switch():
    a, b, t = randn(6), randn(6), torch.rand(3, device=DEVICE)

    def loss(t, a):
        return interpolate(a, b, t).square().sum()

    dt, da = torch.func.grad(loss, argnums=(0, 1))(t, a)
    inputs = [x.clone().requires_grad_() for x in (t, a)]
    torch.testing.assert_close([dt, da], list(torch.autograd.grad(loss(*inputs), inputs)))
    mapped = torch.func.vmap(lambda a: interpolate(a, b, t))(randn(5, 6))
    assert mapped.shape == (5, 3, 6)
    _, tangent = torch.func.jvp(lambda t: interpolate(a, b, t), (t,), (torch.ones_like(t),))
    torch.testing.assert_close(tangent, (b - a).expand(3, 6))
    with solera.backend("reference"):
        torch.testing.assert_close(interpolate(a, b, t), exact(a, b, t).float())
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert interpolate(a, b, t).dtype == torch.float32


# ---- bad input ----------------------------------------------------------------------------------------

A, B = torch.ones(3), torch.ones(3)
I64 = torch.ones(3, dtype=torch.int64)
BAD = [
    (lambda: interpolate(3, B, 0.5), TypeError, "a: expected a tensor, a list"),
    (lambda: interpolate(A, [B], 0.5), TypeError, "b: expected a tensor"),
    (lambda: interpolate([], [], 0.5), ValueError, "a: expected at least one tensor"),
    (lambda: interpolate([A], [B, B], 0.5), ValueError, "b: expected 1 tensors"),
    (lambda: interpolate(A, torch.ones(4), 0.5), ValueError, r"b: expected shape \(3,\)"),
    (lambda: wise_ft([A], [I64], 0.5), TypeError, r"tuned\[0\]: expected float32.*int64"),
    (lambda: interpolate({"w": A}, {"v": B}, 0.5), ValueError, r"missing \['w'\], unexpected \['v'\]"),
    (lambda: interpolate({"w": I64}, {"w": I64}, 0.5), ValueError, "no floating-point entry"),
    (
        lambda: interpolate({"w": A, "n": I64}, {"w": A, "n": I64 + 1}, 0.5),
        ValueError, r"b\['n'\].*equal in all",
    ),
    (lambda: interpolate(A, B.to("meta"), 0.5), ValueError, "b: expected device cpu"),
    (lambda: interpolate(A, B, "x"), TypeError, "t: expected a number"),
    (lambda: interpolate(A, B, None), TypeError, "t: expected a number"),
    (lambda: interpolate(A, B, I64), TypeError, "t: expected a floating-point dtype"),
    (lambda: interpolate(A, B, torch.ones(2, 2)), ValueError, r"t: expected a number, shape \(A,\)"),
    (lambda: wise_ft(A, B, torch.ones(1, 1, 1)), ValueError, "alpha: expected a number, shape"),
    (lambda: interpolate(A, B, torch.ones(1, device="meta")), ValueError, "t: expected device"),
]  # fmt: skip


@pytest.mark.skipif(DEVICE != "cpu", reason="the table's tensors are on the CPU")
@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input(case):
    call, kind, message = BAD[case]
    with pytest.raises(kind, match=message):
        call()


JUNK = st.one_of(
    st.none(), st.integers(-3, 3), st.floats(), st.text(max_size=3), st.just(torch.float16),
    st.lists(st.floats(-2, 2), max_size=3), st.lists(st.lists(st.floats(-2, 2), max_size=2), max_size=3),
)  # fmt: skip
TENSOR = st.builds(
    lambda shape, dtype: torch.ones(shape, dtype=dtype, device=DEVICE),
    st.lists(st.integers(0, 3), max_size=2),
    st.sampled_from([*DTYPES, torch.int64, torch.bool, torch.complex64]),
)
WEIGHTS = st.one_of(
    TENSOR,
    st.lists(TENSOR, max_size=2),
    st.dictionaries(st.sampled_from("ab"), TENSOR, max_size=2),
    JUNK,
)


@given(a=WEIGHTS, b=WEIGHTS, t=st.one_of(TENSOR, JUNK))
def test_a_clear_error_or_a_result(a, b, t):
    try:
        interpolate(a, b, t)
    except (ValueError, TypeError) as error:
        assert str(error).startswith(("a", "b", "t")), error
