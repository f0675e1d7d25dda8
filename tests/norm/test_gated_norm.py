"""Core gated_norm: the kernel against the formula in float64, its gradients, and its bad input."""

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, DTYPES, INTERPRETED, ULP, assert_accurate, double, randn, relative_error
from hypothesis import given
from hypothesis import strategies as st

import solera
from solera.norm import gated_rms_norm

EPS = 1e-5
ACTIVATIONS = (None, "relu", "gelu", "silu", "sigmoid")
ACTS = {None: lambda z: z, "relu": F.relu, "gelu": F.gelu, "silu": F.silu, "sigmoid": torch.sigmoid}
# Below a vector, odd, several vectors with a tail, past one chunk of rows, wider than the GPU's register tile.
SHAPES = [(4, 13), (2, 3, 17), (7, 100), (131, 64), (2, 8192 + 40)]
ops = torch.ops.solera


def plain(x, gate, weight, bias, activation, norm_first, groups=1, eps=EPS):
    """What a user writes today, in x's dtype; in float64 it is the formula."""
    a = ACTS[activation](gate)
    u = (x if norm_first else x * a).unflatten(-1, (groups, -1))
    y = F.rms_norm(u, u.shape[-1:], None, eps).flatten(-2)
    y = y if weight is None else y * weight
    y = y if bias is None else y + bias
    return y * a if norm_first else y


def make(shape, dtype=torch.float32, with_weight=True, with_bias=True, grad=True):
    D = shape[-1:]
    return (
        randn(*shape, dtype=dtype, grad=grad),
        randn(*shape, dtype=dtype, grad=grad),
        randn(*D, dtype=dtype, grad=grad) if with_weight else None,
        randn(*D, dtype=dtype, grad=grad) if with_bias else None,
    )


def ours(x, gate, weight, bias, activation="silu", norm_first=True, groups=1):
    return gated_rms_norm(
        x, gate, weight, bias=bias, activation=activation, norm_first=norm_first, eps=EPS,
        group_size=None if groups == 1 else x.shape[-1] // groups,
    )  # fmt: skip


def whole(function, tensors, g, *options):
    y = function(*tensors, *options)
    return y, *torch.autograd.grad(y, [t for t in tensors if t is not None], g)


NAMES = ("y", "dx", "dgate", "dweight", "dbias")


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_backward_against_float64(shape, dtype, norm_first):
    tensors, g = make(shape, dtype), randn(*shape, dtype=dtype)
    options = ("silu", norm_first)
    truth = whole(plain, double(*tensors), g.double(), *options)
    for row in zip(
        NAMES, whole(ours, tensors, g, *options), whole(plain, tensors, g, *options), truth
    ):
        name, a, b, c = row
        assert a.dtype == dtype
        assert_accurate(a, c, b, name)


@pytest.mark.parametrize("parts", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_options(activation, norm_first, parts):
    for groups in (1, 3):
        tensors, g = make((6, 33), torch.float32, *parts), randn(6, 33)
        options = (activation, norm_first, groups)
        truth = whole(plain, double(*tensors), g.double(), *options)
        got, today = whole(ours, tensors, g, *options), whole(plain, tensors, g, *options)
        for a, b, c in zip(got, today, truth, strict=True):
            assert_accurate(a, c, b)


def test_mamba_and_transnormer_orders():
    """Mamba-2's output norm with groups, and NormAttention's SRMS(o) * u, by their formulas."""
    x, z, w = (randn(*s, dtype=torch.float64) for s in ((4, 12), (4, 12), (12,)))
    u = (x * z * torch.sigmoid(z)).view(4, 3, 4)
    mamba = (u / (u.square().mean(-1, keepdim=True) + 1e-5).sqrt()).view(4, 12) * w
    got = gated_rms_norm(x, z, w, norm_first=False, eps=1e-5, group_size=4)
    torch.testing.assert_close(got, mamba, rtol=1e-13, atol=1e-13)
    srms = x / (x.norm(dim=-1, keepdim=True) / 12**0.5) * z
    got = gated_rms_norm(x, z, activation=None, eps=0.0)
    torch.testing.assert_close(got, srms, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("norm_first", [True, False])
def test_float32_weight_with_half_input(norm_first):
    x, gate = (randn(9, 40, dtype=torch.bfloat16, grad=True) for _ in range(2))
    weight, bias = randn(40, grad=True), randn(40, grad=True)
    g = randn(9, 40, dtype=torch.bfloat16)
    tensors = (x, gate, weight, bias)
    got = whole(ours, tensors, g, "silu", norm_first)
    half, single = torch.bfloat16, torch.float32
    assert [t.dtype for t in got] == [half, half, half, single, single]
    for a, b in zip(got, whole(plain, double(*tensors), g.double(), "silu", norm_first)):
        # No eager run to compare with: a few roundings of float32 where the output is float32.
        assert relative_error(a, b) <= (4e-7 if a.dtype == single else ULP[half])


def test_weight_gradient_of_half_is_summed_in_float32():
    x = randn(512, 48, dtype=torch.bfloat16).abs()
    gate = randn(512, 48, dtype=torch.bfloat16).abs()
    weight = torch.ones(48, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    g = randn(512, 48, dtype=torch.bfloat16).abs()
    got = torch.autograd.grad(gated_rms_norm(x, gate, weight, eps=EPS), weight, g)[0]
    d = double(x, gate, weight)
    truth = torch.autograd.grad(plain(*d, None, "silu", True), d[2], g.double())[0]
    assert relative_error(got, truth) <= 2.5e-3  # rounding the result to bfloat16, and no more


@pytest.mark.no_interpreter
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck_and_gradgradcheck(activation, norm_first):
    tensors = make((3, 6), torch.float64)

    def f(*tensors):
        return ours(*tensors, activation, norm_first, 2)

    assert torch.autograd.gradcheck(f, tensors)
    assert torch.autograd.gradgradcheck(f, tensors)


def test_strided_and_expanded_input():
    w = randn(20)
    both = randn(6, 2, 3, 40)
    x, gate = both.chunk(2, -1)
    cases = [(x, gate), (x.transpose(0, 2), gate.transpose(0, 2)), (x[::2], gate[::2])]
    cases += [(x[:1].expand(4, 2, 3, 20), gate[:1].expand(4, 2, 3, 20)), (x.flip(0), gate.flip(0))]
    cases += [(randn(5, 1, 20).expand(5, 4, 20), randn(1, 4, 20).expand(5, 4, 20))]
    cases += [(both[..., ::2], both[..., 1::2]), (randn(20, 4).t(), randn(20).expand(4, 20))]
    for a, b in cases:
        for first in (True, False):
            want = gated_rms_norm(a.contiguous(), b.contiguous(), w, norm_first=first)
            assert torch.equal(gated_rms_norm(a, b, w, norm_first=first), want)
    both = both.requires_grad_()
    (grad,) = torch.autograd.grad(gated_rms_norm(*both.chunk(2, -1), w).sum(), both)
    dense = [t.detach().contiguous().requires_grad_() for t in both.chunk(2, -1)]
    y = gated_rms_norm(*dense, w)
    parts = torch.autograd.grad(y, dense, torch.ones_like(y))
    assert torch.equal(grad, torch.cat(parts, -1))


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0), (2, 0, 3)], ids=str)
def test_empty(shape):
    tensors = make(shape)
    y = ours(*tensors)
    assert y.shape == torch.Size(shape)
    grads = torch.autograd.grad(y.sum(), tensors)
    assert all(d.shape == t.shape for d, t in zip(grads, tensors))
    assert not any(d.any() for d in grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm_first", [True, False])
def test_extreme_values(norm_first, dtype):
    x, gate = randn(7, 24, dtype=dtype), randn(7, 24, dtype=dtype)
    x[0, 3], x[1, 4], gate[2, 5] = float("nan"), float("inf"), float("nan")
    x[3], x[4], gate[5] = 0.0, 1e-42, 200.0
    y = gated_rms_norm(x, gate, norm_first=norm_first, eps=EPS)
    want = plain(x.double(), gate.double(), None, None, "silu", norm_first)
    assert torch.equal(y.isnan(), want.isnan())
    assert not y[3].any()
    assert y[5:].isfinite().all()
    alone = gated_rms_norm(x[6:], gate[6:], norm_first=norm_first, eps=EPS)
    assert torch.equal(alone[0], y[6])  # NaN stays in its row


@given(
    rows=st.lists(st.integers(0, 5), max_size=3),
    columns=st.tuples(st.integers(1, 4), st.integers(0, 20)),
    dtype=st.sampled_from(DTYPES),
    activation=st.sampled_from(ACTIVATIONS),
    norm_first=st.booleans(),
    scale=st.sampled_from([1e-30, 1e-3, 1.0, 1e4, 1e30]),
    parts=st.tuples(st.booleans(), st.booleans()),
    swap=st.booleans(),
)
def test_any_shape_dtype_and_scale(
    rows, columns, dtype, activation, norm_first, scale, parts, swap
):
    groups, size = columns
    scale = min(scale, 1e4) if dtype == torch.float16 else scale
    x, gate, weight, bias = make((*rows, groups * size), dtype, *parts, grad=False)
    x = x * scale
    if swap and len(rows) > 1:
        x, gate = x.transpose(0, 1), gate.transpose(0, 1)
    groups = groups if size else 1
    options = (activation, norm_first, groups)
    y = ours(x, gate, weight, bias, *options)
    assert y.shape == x.shape and y.dtype == dtype
    if not y.numel():
        return
    truth = plain(*double(x, gate, weight, bias), *options)
    today = plain(x, gate, weight, bias, *options)
    if torch.isfinite(today).all() and torch.isfinite(truth).all():
        assert_accurate(y, truth, today)


@pytest.mark.parametrize("norm_first", [True, False])
def test_same_bits_for_any_thread_count_and_batch(norm_first):
    rows = 70 if INTERPRETED else 300  # past one chunk of rows either way
    tensors, g = make((rows, 72)), randn(rows, 72)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(whole(ours, tensors, g, "silu", norm_first, 2))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))
    x, gate, w, b = tensors
    for at in (slice(0, 1), slice(5, 12), slice(3, 67)):
        few = ours(x[at], gate[at], w, b, "silu", norm_first, 2)
        assert torch.equal(few, results[0][0][at])


@pytest.mark.no_interpreter
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("width", [4096, 4099])
def test_large_tensors_take_the_streaming_stores(width, norm_first):
    """Outputs of 16 MB and more pass the caches: same bits as for few of their rows."""
    tensors, g = make((1100, width)), randn(1100, width)
    big = whole(ours, tensors, g, "silu", norm_first)
    rows = slice(1030, 1034)
    few = [t.detach()[rows].requires_grad_() for t in tensors[:2]]
    small = whole(ours, (*few, *tensors[2:]), g[rows], "silu", norm_first)
    for a, b in zip(big[:3], small[:3]):
        assert torch.equal(a[rows], b)


@pytest.mark.parametrize("norm_first", [True, False])
def test_frozen_inputs(norm_first):
    g = randn(5, 8)
    tensors = make((5, 8))
    full = whole(ours, tensors, g, "silu", norm_first)[1:]
    for wanted in ([0], [1], [2], [3], [0, 2], [1, 3]):
        some = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(tensors)]
        got = torch.autograd.grad(ours(*some, "silu", norm_first), [some[i] for i in wanted], g)
        assert all(torch.equal(a, full[i]) for a, i in zip(got, wanted))


def test_saved_for_backward_is_inputs_and_one_number_a_row():
    tensors = make((64, 256))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.numel()) or t, lambda t: t
    ):
        ours(*tensors)
    assert sum(saved) == sum(t.numel() for t in tensors) + 64


# ---- the contract with torch --------------------------------------------------------------------------


@pytest.mark.parametrize("norm_first", [True, False])
def test_opcheck(norm_first):
    base, other = randn(3, 8, 6), randn(3, 8, 6)
    w, b, ones = randn(6), randn(6), randn(1).expand(8, 3, 6)
    x, gate = base.transpose(0, 1), other.transpose(0, 1)
    torch.library.opcheck(ops.gated_norm.default, (x, gate, w, b, EPS, 3, norm_first, 2))
    _, rstd = ops.gated_norm(x, gate, w, b, EPS, 3, norm_first, 2)
    args = (ones, x, gate, w, b, rstd, 3, norm_first, True, True, True, True)
    torch.library.opcheck(ops.gated_norm_backward.default, args)
    x = base[:1].expand(3, 8, 6)
    torch.library.opcheck(ops.gated_norm.default, (x, other, None, None, EPS, 0, norm_first, 1))
    _, rstd = ops.gated_norm(x, other, None, None, EPS, 0, norm_first, 1)
    args = (base, x, other, None, None, rstd, 0, norm_first, True, False, False, False)
    torch.library.opcheck(ops.gated_norm_backward.default, args)


def compiled_matches(backend):
    def f(x, gate, w, b):
        y = gated_rms_norm(x, gate, w, bias=b)
        return gated_rms_norm(y * 2, gate, activation=None, norm_first=False, group_size=4)

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend=backend)
    for n in (4, 7):
        tensors, g = make((n, 16)), randn(n, 16)
        want, got = f(*tensors), compiled(*tensors)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(
            torch.autograd.grad(got, tensors, g), torch.autograd.grad(want, tensors, g)
        )


@pytest.mark.inductor
@pytest.mark.no_interpreter
def test_compile_inductor():
    compiled_matches("inductor")


def test_torch_func():
    x, gate, w, _ = make((5, 8), grad=False)
    scalar = lambda x, gate, w: gated_rms_norm(x, gate, w).square().sum()
    got = torch.func.grad(scalar, argnums=(0, 1, 2))(x, gate, w)
    leaves = [t.clone().requires_grad_() for t in (x, gate, w)]
    torch.testing.assert_close(got, torch.autograd.grad(scalar(*leaves), leaves))
    torch.testing.assert_close(
        torch.func.vmap(gated_rms_norm, in_dims=(0, 0, None))(x, gate, w),
        gated_rms_norm(x, gate, w),
    )
    x, gate, direction = x.double(), gate.double(), randn(5, 8, dtype=torch.float64)
    f = lambda x: gated_rms_norm(x, gate)
    _, tangent = torch.func.jvp(f, (x,), (direction,))
    h = 1e-6
    numeric = (f(x + h * direction) - f(x - h * direction)) / (2 * h)
    torch.testing.assert_close(tangent, numeric, rtol=1e-6, atol=1e-8)


def test_backend_switch_and_autocast():
    x, gate, w, b = make((5, 8), grad=False)
    with solera.backend("reference"):
        y = gated_rms_norm(x, gate, w, bias=b)
    torch.testing.assert_close(y, gated_rms_norm(x, gate, w, bias=b))
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        for t, z in ((x, gate), (x.bfloat16(), gate.bfloat16())):
            want = F.rms_norm(t, (8,), w.to(t.dtype)).dtype
            assert gated_rms_norm(t, z, w).dtype == want


# ---- bad input ---------------------------------------------------------------------------------------

X = randn(3, 4)
f = gated_rms_norm
BAD = [
    (lambda: f([1.0], X), TypeError, "x: expected a torch.Tensor, got list"),
    (lambda: f(X.int(), X), TypeError, "x: expected float32.*int32"),
    (lambda: f(X[0, 0], X), ValueError, "x: expected at least 1 dimension"),
    (lambda: f(X, None), TypeError, "gate: expected a torch.Tensor"),
    (lambda: f(X, randn(4)), ValueError, r"gate: expected shape \(3, 4\).*\(4,\)"),
    (lambda: f(X, X.half()), TypeError, "gate: expected torch.float32"),
    (lambda: f(X, X.to("meta")), ValueError, "gate: expected device"),
    (lambda: f(X, X, randn(3)), ValueError, r"weight: expected shape \(4,\).*\(3,\)"),
    (lambda: f(X, X, bias=randn(3)), ValueError, r"bias: expected shape \(4,\)"),
    (lambda: f(X, X, randn(4).double()), TypeError, "weight: float64 with x of torch.float32"),
    (lambda: f(X, X, activation="swish"), ValueError, "activation: expected one of.*'swish'"),
    (lambda: f(X, X, activation=3), TypeError, "activation: expected one of.*int 3"),
    (lambda: f(X, X, eps=-1.0), ValueError, r"eps: expected a finite number in \[0, inf\]"),
    (lambda: f(X, X, group_size=3), ValueError, "group_size: expected a divisor of x's 4 columns"),
    (lambda: f(X, X, group_size=0), ValueError, "group_size: expected a divisor"),
    (lambda: f(X, X, group_size=2.0), TypeError, "group_size: expected an int or None, got float"),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input_is_named(case):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()


anything = st.one_of(
    st.none(),
    st.integers(-2, 2),
    st.floats(),
    st.text(max_size=3),
    st.lists(st.integers(0, 3), max_size=3).map(lambda s: randn(s)),
    st.sampled_from([torch.int32, torch.bool, torch.float16, torch.float64]).map(
        lambda d: torch.ones(3, 4, device=DEVICE).to(d)
    ),
)


@pytest.mark.skipif(INTERPRETED, reason="argument checks do not depend on the backend")
@given(anything, anything, anything, anything, anything)
def test_arguments_give_a_result_or_a_clear_error(x, gate, weight, size, activation):
    try:
        gated_rms_norm(x, gate, weight, group_size=size, activation=activation)
    except (TypeError, ValueError) as error:
        names = {"x", "gate", "weight", "group_size", "activation"}
        assert str(error).split(":")[0] in names, error
