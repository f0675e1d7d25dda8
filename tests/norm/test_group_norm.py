"""Core group_norm: group, instance and batch norm against float64, gradients, contract."""

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, DTYPES, INTERPRETED, assert_accurate, double, randn, relative_error
from hypothesis import given
from hypothesis import strategies as st

import solera
from solera.norm import batch_norm, group_norm, instance_norm
from solera.norm.group_norm import grouped_norm

ops = torch.ops.solera
ACTIVATIONS = {None: lambda z: z, "relu": F.relu, "gelu": F.gelu, "silu": F.silu}
ACTIVATIONS["sigmoid"] = torch.sigmoid
# One position, rows below and past a vector with tails, a channel count below a vector and past the
# register block of columns, and (3, 4, 150, 120): rows of more than one slab.
SHAPES = [(3, 8, 1), (2, 6, 5), (4, 36, 7, 7), (2, 12, 33), (3, 4, 150, 120), (1, 160, 3, 50)]
if INTERPRETED:
    SHAPES = [(3, 8, 1), (2, 6, 5), (2, 12, 9, 9), (2, 4, 40, 60)]

KINDS = {
    "group": (
        lambda x, w, b, r, a: group_norm(x, 2, w, b, activation=a),
        lambda x, w, b, r: F.group_norm(x, 2, w, b),
    ),
    "instance": (
        lambda x, w, b, r, a: instance_norm(x, None, None, w, b),
        lambda x, w, b, r: F.instance_norm(x, None, None, w, b),
    ),
    "batch": (
        lambda x, w, b, r, a: batch_norm(x, None, None, w, b, True, activation=a, residual=r),
        lambda x, w, b, r: F.batch_norm(x, None, None, w, b, True) + r,
    ),
}


def channels_last(x):
    """The same values with the channels next to each other, for any rank."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def make(shape, dtype, last=False, grad=True):
    x, r = randn(*shape, dtype=dtype), randn(*shape, dtype=dtype)
    if last:
        x, r = channels_last(x), channels_last(r)
    w, b = randn(shape[1], dtype=dtype), randn(shape[1], dtype=dtype)
    return tuple(t.requires_grad_(grad) for t in (x, w, b, r))


def plain(*tensors):
    """Contiguous copies: torch's own instance norm of a single channels-last image has a wrong gradient."""
    return tuple(t.detach().contiguous().requires_grad_() for t in tensors)


def usable(kind, shape):
    if kind == "instance":
        return len(shape) > 2 and torch.Size(shape[2:]).numel() > 1
    return True


def gradients(y, tensors, g):
    got = torch.autograd.grad(y, tensors, g, allow_unused=True)
    return [t for t in got if t is not None]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_forward_and_backward_against_float64(kind, shape, last, dtype):
    if not usable(kind, shape):
        with pytest.raises(ValueError, match="Expected more than 1"):
            KINDS[kind][0](*make(shape, dtype, last), None)
        return
    ours, theirs = KINDS[kind]
    tensors = make(shape, dtype, last)
    activation = None if kind == "instance" else "silu"
    g = channels_last(randn(*shape, dtype=dtype)) if last else randn(*shape, dtype=dtype)
    y, x_size = ours(*tensors, activation), tensors[0].numel()
    assert y.dtype == dtype and y.shape == tensors[0].shape
    if torch.Size(shape[2:]).numel() > 1:
        assert y.stride() == tensors[0].stride()
    eager = plain(*tensors)
    today = ACTIVATIONS[activation](theirs(*eager))
    exact = double(*eager)
    truth = ACTIVATIONS[activation](theirs(*exact))
    if dtype == torch.float64:
        assert relative_error(y, truth) < 1e-13
    else:
        assert_accurate(y, truth, today, "y")
    for name, a, b, c in zip(
        ("dx", "dweight", "dbias", "dresidual"),
        gradients(y, tensors, g),
        gradients(truth, exact, g.double().contiguous()),
        gradients(today, eager, g.contiguous()),
        strict=False,
    ):
        assert a.dtype == dtype
        if dtype == torch.float64:  # torch's float64 is no more exact, and dx is a difference
            assert relative_error(a, b) < 1e-12, name
        elif dtype == torch.float32 and x_size < 4000:  # a few sums of a few terms: luck decides
            assert relative_error(a, b) <= 4e-7, name
        else:
            assert_accurate(a, b, c, name)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("last", [False, True])
def test_every_activation(activation, last):
    x, w, b, r = make((3, 8, 6, 7), torch.float32, last)
    g = randn(3, 8, 6, 7)
    y = batch_norm(x, None, None, w, b, True, activation=activation, residual=r)
    exact = double(x, w, b, r)
    z = F.batch_norm(exact[0], None, None, *exact[1:3], True) + exact[3]
    truth = ACTIVATIONS[activation](z)
    assert relative_error(y, truth) < 5e-7
    for a, c in zip(gradients(y, (x, w, b, r), g), gradients(truth, exact, g.double())):
        assert relative_error(a, c) < 2e-6


@pytest.mark.parametrize("activation", ["silu", "sigmoid", "gelu", "relu"])
def test_activations_far_out(activation):
    """Where the exponential under- and overflows, and through infinity."""
    values = [-1e30, -200.0, -100.0, -89.0, -20.0, 0.0, 20.0, 100.0, 1e30]
    z = torch.tensor(values, device=DEVICE).repeat(4).requires_grad_()
    weight, bias = torch.ones(1, device=DEVICE), torch.zeros(1, device=DEVICE)
    y = batch_norm(z.view(1, 1, -1), bias, weight, activation=activation, eps=0.0)
    truth = ACTIVATIONS[activation](z.double())
    torch.testing.assert_close(y.view(-1).double(), truth, rtol=1e-6, atol=1e-35)
    (dz,) = torch.autograd.grad(y.sum(), z)
    (exact,) = torch.autograd.grad(truth.sum(), z)
    torch.testing.assert_close(dz, exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("last", [False, True])
def test_parameters_of_each_sample_and_unbiased_variance(last):
    x, *_ = make((3, 4, 5, 6), torch.float64, last)
    w, b = randn(3, 4, dtype=torch.float64, grad=True), randn(3, 4, dtype=torch.float64, grad=True)

    def exact(x, w, b):
        var, mean = torch.var_mean(x, (2, 3), correction=1, keepdim=True)
        return (x - mean) / (var + 1e-3).sqrt() * w[..., None, None] + b[..., None, None]

    def ours(x, w, b):
        return grouped_norm(x, w, b, groups=4, eps=1e-3, correction=30 / 29)[0]

    g = randn(3, 4, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(ours(x, w, b), exact(x, w, b))
    for a, c in zip(
        gradients(ours(x, w, b), (x, w, b), g), gradients(exact(x, w, b), (x, w, b), g)
    ):
        torch.testing.assert_close(a, c)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_and_gradgradcheck(kind, last):
    x, w, b, r = make((3, 4, 3), torch.float64, last)
    activation = None if kind == "instance" else "silu"
    f = lambda x, w, b, r: KINDS[kind][0](x, w, b, r, activation)
    assert torch.autograd.gradcheck(f, (x, w, b, r))
    assert torch.autograd.gradgradcheck(f, (x, w, b, r))
    linear = lambda x, w, b, r: KINDS[kind][0](x, w, b, r, None)
    assert torch.autograd.gradgradcheck(linear, (x, w, b, r))


def test_second_derivatives_of_the_stored_form():
    x, w, b, r = make((2, 3, 4), torch.float64)
    mean, var = randn(3, dtype=torch.float64), randn(3, dtype=torch.float64).square() + 0.5
    f = lambda x, w, b, r: batch_norm(x, mean, var, w, b, activation="silu", residual=r)
    assert torch.autograd.gradcheck(f, (x, w, b, r))
    assert torch.autograd.gradgradcheck(f, (x, w, b, r))


@pytest.mark.parametrize("kind", KINDS)
def test_float32_parameters_with_half_input(kind):
    x, _, _, r = make((4, 6, 11), torch.bfloat16)
    w, b = randn(6, grad=True), randn(6, grad=True)
    y = KINDS[kind][0](x, w, b, r, None)
    g = randn(4, 6, 11, dtype=torch.bfloat16)
    got = gradients(y, (x, w, b), g)
    assert [t.dtype for t in (y, *got)] == [torch.bfloat16] * 2 + [torch.float32] * 2
    exact = double(x, w, b, r)
    truth = KINDS[kind][1](*exact)
    assert relative_error(y, truth) < 4e-3
    for a, c, limit in zip(got, gradients(truth, exact[:3], g.double()), (4e-3, 1e-6, 1e-6)):
        assert relative_error(a, c) < limit


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_large_mean_keeps_eager_accuracy(kind, last):
    x, w, b, r = make((4, 8, 16, 16), torch.float32, last)
    with torch.no_grad():
        x += 1e3
    g = randn(4, 8, 16, 16)
    eager = plain(x, w, b, r)
    ours, today = KINDS[kind][0](x, w, b, r, None), KINDS[kind][1](*eager)
    exact = double(*eager)
    truth = KINDS[kind][1](*exact)
    results = zip(
        (ours, *gradients(ours, (x, w), g)),
        (truth, *gradients(truth, exact[:2], g.double())),
        (today, *gradients(today, eager[:2], g)),
    )
    for value, exactly, now in results:
        if (
            INTERPRETED
        ):  # GPU kernels merge their tiles' means in float32, eager torch and C++ in double
            assert relative_error(value, exactly) <= 4 * relative_error(now, exactly)
        else:
            assert_accurate(value, exactly, now)


def test_strided_and_expanded_input():
    base = randn(6, 8, 5, 4)
    views = [
        base.transpose(2, 3),
        base[:, ::2],
        base[::2],
        base.flip(0),
        base[:1].expand(3, 8, 5, 4),
    ]
    for kind, (ours, _) in KINDS.items():
        for view in views:
            w = randn(view.shape[1])
            r = randn(*view.shape)
            a, b = ours(view, w, w, r, None), ours(view.contiguous(), w, w, r, None)
            torch.testing.assert_close(a, b, msg=kind)
        x = base.clone().requires_grad_()
        (one,) = torch.autograd.grad(ours(x, None, None, base, "relu").sum(), x)
        (two,) = torch.autograd.grad(ours(x, None, None, base, "relu"), x, torch.ones_like(x))
        assert torch.equal(one, two)


@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 4, 0), (0, 4), (2, 0, 3)], ids=str)
def test_empty(shape):
    x, w, b, r = make(shape, torch.float32)
    groups = 2 if shape[1] else 1
    results = [batch_norm(x, None, None, w, b, True, residual=r, activation="relu")]
    results += [batch_norm(x, torch.zeros(shape[1]), torch.ones(shape[1]), w, b)]
    if shape[1]:
        results += [group_norm(x, groups, w, b)]
    if len(shape) > 2:
        results += [instance_norm(x, None, None, w, b)]
    for y in results:
        assert y.shape == torch.Size(shape)
        dx, dw, db = torch.autograd.grad(y.sum(), (x, w, b))
        assert dx.shape == x.shape and not dw.any() and not db.any()
    running = torch.ones(shape[1]), torch.ones(shape[1])
    batch_norm(x, *running, training=True)
    assert all(t.eq(1).all() for t in running)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("last", [False, True])
def test_extreme_values(last, dtype):
    x = randn(6, 4, 30, dtype=dtype)
    x[0, 0, 3], x[1, 1, 4], x[2, 2, 5] = float("nan"), float("inf"), -float("inf")
    x[3], x[4], x[5, 0] = 0.0, 1e-42, 7.0
    x = channels_last(x) if last else x
    y = instance_norm(x)
    for n, c in ((0, 0), (1, 1), (2, 2)):
        assert y[n, c].isnan().all()
        rest = torch.arange(4, device=DEVICE) != c
        assert y[n, rest].isfinite().all()
    assert not y[3].any() and not y[5, 0].any() and y[4].isfinite().all()


@given(
    shape=st.tuples(
        st.integers(0, 4), st.sampled_from([1, 2, 4, 6, 18]), st.integers(0, 5), st.integers(0, 19)
    ),
    kind=st.sampled_from(sorted(KINDS)),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([1e-30, 1e-3, 1.0, 1e4, 1e30]),
    activation=st.sampled_from([None, "relu", "silu"]),
    last=st.booleans(),
)
def test_any_shape_dtype_and_scale(shape, kind, dtype, scale, activation, last):
    scale = min(scale, 1e4) if dtype == torch.float16 else scale
    x, w, b, r = make(shape, dtype, last, grad=False)
    x = x * scale
    if (kind == "group" and shape[1] % 2) or 0 in shape:
        return
    try:
        today = KINDS[kind][1](*plain(x, w, b, r))
    except ValueError:
        with pytest.raises(ValueError, match="Expected more than 1"):
            KINDS[kind][0](x, w, b, r, activation)
        return
    activation = None if kind == "instance" else activation
    y = KINDS[kind][0](x, w, b, r, activation)
    assert y.shape == x.shape and y.dtype == dtype
    today = ACTIVATIONS[activation](today)
    truth = ACTIVATIONS[activation](KINDS[kind][1](*double(*plain(x, w, b, r))))
    if torch.isfinite(today).all() and torch.isfinite(truth).all():
        assert_accurate(y, truth, today)


@pytest.mark.parametrize("last", [False, True])
def test_same_bits_for_any_thread_count_and_batch(last):
    """The schedule depends on the number of threads (fused by units, or pass by pass); the bits do not."""
    size = (6, 8, 20, 21) if INTERPRETED else (6, 8, 150, 121)
    x, w, b, r = make(size, torch.float32, last)
    g = randn(*size)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1,) if INTERPRETED else (1, 2, 3, 13):
            torch.set_num_threads(n)
            out = []
            for kind, (ours, _) in KINDS.items():
                y = ours(x, w, b, r, None if kind == "instance" else "silu")
                out += [y, *gradients(y, (x, w, b, r), g)]
            results.append(out)
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, c) for a, c in zip(results[0], other, strict=True))
    y = group_norm(x, 4, w, b)
    for first, n in ((0, 1), (2, 3)):
        assert torch.equal(group_norm(x[first : first + n], 4, w, b), y[first : first + n])


@pytest.mark.no_interpreter
@pytest.mark.parametrize("last", [False, True])
def test_large_tensors_take_the_streaming_stores(last):
    """Outputs of 16 MB and more pass the caches: same bits as for one sample of them."""
    x, w, b, _ = make((5, 64, 131, 128), torch.float32, last)
    g = randn(5, 64, 131, 128)
    g = channels_last(g) if last else g
    y = group_norm(x, 8, w, b, activation="silu")
    (dx,) = torch.autograd.grad(y, x, g)
    few = x.detach()[3:4].requires_grad_()
    y_few = group_norm(few, 8, w, b, activation="silu")
    (dx_few,) = torch.autograd.grad(y_few, few, g[3:4])
    assert torch.equal(y[3:4], y_few) and torch.equal(dx[3:4], dx_few)


def test_frozen_inputs():
    x, w, b, r = make((3, 4, 6), torch.float32)
    f = lambda: batch_norm(x, None, None, w, b, True, activation="silu", residual=r)
    g = randn(3, 4, 6)
    every = torch.autograd.grad(f(), (x, w, b, r), g)
    tensors = (x, w, b, r)
    for i, t in enumerate(tensors):
        for other in tensors:
            other.requires_grad_(other is t)
        (alone,) = torch.autograd.grad(f(), t, g)
        assert torch.equal(alone, every[i])


def test_saved_for_backward_is_input_moments_and_parameters():
    x, w, b, r = make((4, 16, 20, 20), torch.float32)
    for f, extra in (
        (lambda: group_norm(x, 4, w, b, activation="silu"), 2 * 4 * 4),
        (lambda: batch_norm(x, None, None, w, b, True, residual=r), 2 * 16),
        (
            lambda: batch_norm(x, None, None, w, b, True, residual=r, activation="relu"),
            2 * 16 + x.numel(),
        ),
    ):
        kept = []
        pack = lambda t: kept.append(t.numel()) or t
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            f()
        assert sum(kept) == x.numel() + 2 * 16 + extra


# ---- contract ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("last", [False, True])
def test_opcheck(last, batch, dtype):
    shape = (3, 7, 4) if last else (3, 4, 7)
    x, dy, r = (randn(*shape, dtype=dtype) for _ in range(3))
    w, b = randn(4), randn(4) if batch else randn(3, 4)
    for tensors in ((x, w, b, r), (x.mT.contiguous().mT, w, None, None)):
        args = (*tensors, 2, batch, last, 1e-5, 1.0, 3)
        torch.library.opcheck(ops.group_norm.default, args)
        mean, var = ops.group_norm(*args)[1:]
        dy_expanded = dy[:1, :1].expand(shape)
        for needs in ((True, True, True), (False, False, True), (True, False, False)):
            back = (dy_expanded, *tensors, mean, var, 2, batch, last, 1e-5, 1.0, 3, *needs)
            torch.library.opcheck(ops.group_norm_backward.default, back)


def compiled_matches(backend):
    running = [torch.zeros(6, device=DEVICE), torch.ones(6, device=DEVICE)]

    def f(x, w, b, r, running_mean, running_var):
        y = group_norm(x, 3, w, b, activation="silu")
        y = batch_norm(y, running_mean, running_var, w, b, True, activation="relu", residual=r)
        y = batch_norm(y, running_mean, running_var, w, b)
        return instance_norm(y, None, None, w, b)

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend=backend)
    for shape in ((2, 6, 5, 4), (3, 6, 7, 4)):
        for last in (False, True):
            tensors = make(shape, torch.float32, last)
            g = randn(*shape)
            a_stats, b_stats = ([t.clone() for t in running] for _ in range(2))
            a, b = compiled(*tensors, *a_stats), f(*tensors, *b_stats)
            torch.testing.assert_close(a, b)
            torch.testing.assert_close(a_stats, b_stats)
            for p, q in zip(gradients(a, tensors, g), gradients(b, tensors, g)):
                torch.testing.assert_close(p, q, rtol=2e-4, atol=2e-4)


@pytest.mark.inductor
@pytest.mark.no_interpreter
def test_compile_with_inductor():
    compiled_matches("inductor")


@pytest.mark.parametrize("kind", KINDS)
def test_torch_func(kind):
    x, w, b, r = make((3, 4, 5), torch.float64, grad=False)
    f = lambda x, w: KINDS[kind][0](x, w, b, r, None)
    scalar = lambda x, w: f(x, w).pow(3).sum()
    got = torch.func.grad(scalar, argnums=(0, 1))(x, w)
    xs, ws = x.clone().requires_grad_(), w.clone().requires_grad_()
    torch.testing.assert_close(got, torch.autograd.grad(scalar(xs, ws), (xs, ws)))
    direction = randn(3, 4, 5, dtype=torch.float64)
    _, tangent = torch.func.jvp(lambda x: f(x, w), (x,), (direction,))
    h = 1e-6
    numeric = (f(x + h * direction, w) - f(x - h * direction, w)) / (2 * h)
    torch.testing.assert_close(tangent, numeric, rtol=1e-6, atol=1e-8)
    many = torch.stack([x, 2 * x + 1])
    each = torch.stack([f(t, w) for t in many])
    torch.testing.assert_close(torch.func.vmap(f, in_dims=(0, None))(many, w), each)


def test_backend_switch_and_autocast():
    x, w, b, r = make((3, 4, 5, 6), torch.float32, grad=False)
    for kind in KINDS.values():
        with solera.backend("reference"):
            y = kind[0](x, w, b, r, None)
        torch.testing.assert_close(y, kind[0](x, w, b, r, None))
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        for t in (x, x.bfloat16()):
            expected = F.group_norm(t, 2, w.to(t.dtype), b.to(t.dtype)).dtype
            assert group_norm(t, 2, w, b).dtype == expected
