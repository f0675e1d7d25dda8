"""Core row_norm: the kernel against the reference in float64, its gradients, and its bad input."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    DEVICE,
    DTYPES,
    INTERPRETED,
    ULP,
    assert_accurate,
    double,
    randn,
    relative_error,
)
from hypothesis import given
from hypothesis import strategies as st

import solera
from solera.norm import layer_norm, rms_norm

NORMS = {"layer": layer_norm, "rms": rms_norm}
EPS = 1e-5
# (rows..., D): a single element, below a vector, odd, several vectors with a tail, a chunk and a tail of
# rows, and rows wider than the GPU kernels' register tile.
SHAPES = [(1, 1), (3, 5), (2, 3, 17), (7, 100), (131, 64), (5, 1000), (2, 8192 + 40)]
ops = torch.ops.solera


def eager(kind, x, weight, bias, eps, residual=None, residual_scale=1.0, weight_offset=0.0):
    """What a user writes today, in x's dtype."""
    u = x if residual is None else x + residual_scale * residual
    w = weight if weight is None or weight_offset == 0 else weight + weight_offset
    norm = F.layer_norm if kind == "layer" else F.rms_norm
    args = (w, None, eps) if kind == "layer" else (w, eps)
    y = norm(u, u.shape[-1:], *args)
    return (y if bias is None else y + bias), u


def exact(kind, *args, **options):
    """The formula in float64, written out."""
    x, weight, bias, eps = args
    residual = options.get("residual")
    u = x if residual is None else x + options.get("residual_scale", 1.0) * residual
    d = u - u.mean(-1, keepdim=True) if kind == "layer" else u
    y = d / (d.square().mean(-1, keepdim=True) + eps).sqrt()
    if weight is not None:
        y = y * (weight + options.get("weight_offset", 0.0))
    return (y if bias is None else y + bias), u


def run(kind, x, weight, bias, eps, **options):
    out = NORMS[kind](x, weight, bias=bias, eps=eps, **options)
    return out if isinstance(out, tuple) else (out, x)


def gradients(outputs, inputs, grads):
    inputs = [t for t in inputs if t is not None]
    pairs = [(o, g) for o, g in zip(outputs, grads) if o.requires_grad and g is not None]
    return torch.autograd.grad([o for o, _ in pairs], inputs, [g for _, g in pairs])


def make(shape, dtype, with_weight=True, with_bias=True, with_residual=True, grad=True):
    D = shape[-1:]
    return (
        randn(*shape, dtype=dtype, grad=grad),
        randn(*D, dtype=dtype, grad=grad) if with_weight else None,
        randn(*D, dtype=dtype, grad=grad) if with_bias else None,
        randn(*shape, dtype=dtype, grad=grad) if with_residual else None,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", NORMS)
def test_forward_and_backward_against_float64(kind, shape, dtype):
    x, weight, bias, residual = make(shape, dtype)
    dy, du = randn(*shape, dtype=dtype), randn(*shape, dtype=dtype)
    options = {"residual_scale": 0.5, "weight_offset": 1.0}

    def whole(function, tensors, g):
        x, w, b, r = tensors
        out = function(kind, x, w, b, EPS, residual=r, **options)
        return (*out, *gradients(out, (x, w, b, r), g))

    tensors = (x, weight, bias, residual)
    ours = whole(run, tensors, (dy, du))
    today = whole(eager, tensors, (dy, du))
    truth = whole(exact, double(*tensors), double(dy, du))
    names = ("y", "u", "dx", "dweight", "dbias", "dresidual")
    for name, a, b, c in zip(names, ours, today, truth):
        assert a.dtype == dtype
        assert_accurate(a, c, b, name)


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("with_weight", [False, True])
@pytest.mark.parametrize("kind", NORMS)
def test_optional_arguments(kind, with_weight, with_bias, with_residual):
    tensors = make((6, 33), torch.float32, with_weight, with_bias, with_residual)
    x, weight, bias, residual = tensors
    g = randn(6, 33)
    for grads in ((g, g), (g, None), (None, g)) if with_residual else ((g, None),):
        ours = run(kind, x, weight, bias, EPS, residual=residual)
        truth = exact(
            kind, *(d := double(x, weight, bias))[:3], EPS, residual=(r := double(residual))
        )
        wanted = [t for t in (x, residual) if t is not None]
        exact_wanted = [t for t in (d[0], r) if t is not None]
        if grads[0] is not None:
            wanted += [t for t in (weight, bias) if t is not None]
            exact_wanted += [t for t in d[1:] if t is not None]
        grads64 = [None if t is None else t.double() for t in grads]
        for a, b in zip(
            gradients(ours, wanted, grads), gradients(truth, exact_wanted, grads64), strict=True
        ):
            assert_accurate(a, b, b.float())


@pytest.mark.parametrize("kind", NORMS)
def test_float32_weight_with_half_input(kind):
    x = randn(9, 40, dtype=torch.bfloat16, grad=True)
    weight, bias = randn(40, grad=True), randn(40, grad=True)
    y = NORMS[kind](x, weight, bias=bias, eps=EPS)
    g = randn(9, 40, dtype=torch.bfloat16)
    dx, dw, db = torch.autograd.grad(y, (x, weight, bias), g)
    assert (y.dtype, dx.dtype, dw.dtype, db.dtype) == (torch.bfloat16,) * 2 + (torch.float32,) * 2
    d = double(x, weight, bias)
    truth = exact(kind, *d, EPS)[0]
    for a, b in zip((y, dx, dw, db), (truth, *torch.autograd.grad(truth, d, g.double()))):
        assert relative_error(a, b) <= ULP[a.dtype]


@pytest.mark.parametrize("kind", NORMS)
def test_weight_gradient_of_half_is_summed_in_float32(kind):
    """Same-sign sums are where a half-precision accumulator loses digits."""
    x = randn(512, 48, dtype=torch.bfloat16).abs().requires_grad_()
    weight = torch.ones(48, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    g = randn(512, 48, dtype=torch.bfloat16).abs()
    ours = torch.autograd.grad(NORMS[kind](x, weight, eps=EPS), weight, g)[0]
    d = double(x, weight)
    truth = torch.autograd.grad(exact(kind, *d, None, EPS)[0], d[1], g.double())[0]
    assert relative_error(ours, truth) <= 2.5e-3  # rounding the result to bfloat16, and no more


@pytest.mark.parametrize("kind", NORMS)
def test_large_mean_keeps_eager_accuracy(kind):
    x = (randn(64, 512) + 1e3).requires_grad_()
    weight, bias = randn(512, grad=True), randn(512, grad=True)
    g = randn(64, 512)
    d = double(x, weight, bias)
    truth = exact(kind, *d, EPS)[0]
    today = eager(kind, x, weight, bias, EPS)[0]
    ours = NORMS[kind](x, weight, bias=bias, eps=EPS)
    assert_accurate(ours, truth, today)
    for a, b, c in zip(
        torch.autograd.grad(ours, (x, weight, bias), g),
        torch.autograd.grad(truth, d, g.double()),
        torch.autograd.grad(today, (x, weight, bias), g),
    ):
        assert_accurate(a, b, c)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_eps_none_is_torchs_rule(dtype):
    x = randn(4, 32, dtype=dtype, scale=1e-4)
    assert_accurate(
        rms_norm(x), F.rms_norm(x.double(), (32,), eps=torch.finfo(
            torch.float64 if dtype == torch.float64 else torch.float32).eps),
        F.rms_norm(x, (32,)),
    )  # fmt: skip


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("kind", NORMS)
def test_gradcheck_and_gradgradcheck(kind, with_residual):
    tensors = make((4, 6), torch.float64, with_residual=with_residual)

    def f(x, w, b, r):
        out = NORMS[kind](x, w, bias=b, eps=0.1, residual=r)
        return out

    tensors = tuple(tensors)
    assert torch.autograd.gradcheck(f, tensors)
    assert torch.autograd.gradgradcheck(f, tensors)


@pytest.mark.parametrize("kind", NORMS)
def test_strided_and_expanded_input(kind):
    base = randn(12, 20)
    weight = randn(40)[::2]
    views = [base.t(), base[:, ::2], base[None].expand(3, 12, 20), base[::3], base.flip(0)]
    for view in views:
        w = weight[: view.shape[-1]] if view.shape[-1] <= 20 else None
        assert torch.equal(NORMS[kind](view, w), NORMS[kind](view.contiguous(), w))
    x = base.clone().requires_grad_()
    (dx,) = torch.autograd.grad(NORMS[kind](x, weight[:20]).sum(), x)  # expanded dy, stride 0
    (dx2,) = torch.autograd.grad(NORMS[kind](x, weight[:20]), x, torch.ones_like(x))
    assert torch.equal(dx, dx2)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("kind", NORMS)
def test_empty(kind, shape):
    x, weight, bias, residual = make(shape, torch.float32)
    y, u = NORMS[kind](x, weight, bias=bias, residual=residual)
    assert y.shape == u.shape == torch.Size(shape)
    dx, dw, db, dr = torch.autograd.grad(y.sum() + u.sum(), (x, weight, bias, residual))
    assert dx.shape == dr.shape == torch.Size(shape)
    assert not dw.any() and not db.any()
    assert NORMS[kind](x, weight).shape == torch.Size(shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", NORMS)
def test_extreme_values(kind, dtype):
    x = randn(8, 24, dtype=dtype)
    x[0, 3], x[1, 4], x[2, 5] = float("nan"), float("inf"), 0.0
    x[3] = 0.0
    x[4] = 1e-42
    x[5] = 7.0
    y = NORMS[kind](x, eps=EPS)
    assert y[0].isnan().all()
    assert torch.isfinite(y[2:]).all()
    assert not y[3].any()
    if kind == "layer":
        assert y[1].isnan().all()
        assert not y[5].any()
    else:
        assert y[1, 4].isnan() and not y[1, torch.arange(24, device=DEVICE) != 4].any()
    clean = torch.ones(24, dtype=dtype, device=DEVICE) * 0 + x[6]
    assert torch.equal(NORMS[kind](clean[None], eps=EPS)[0], y[6])  # NaN stays in its row


@given(
    rows=st.lists(st.integers(0, 5), max_size=3),
    D=st.integers(0, 70),
    kind=st.sampled_from(sorted(NORMS)),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([1e-30, 1e-3, 1.0, 1e4, 1e30]),
    parts=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    swap=st.booleans(),
)
def test_any_shape_dtype_and_scale(rows, D, kind, dtype, scale, parts, swap):
    scale = min(scale, 1e4) if dtype == torch.float16 else scale
    x, weight, bias, residual = make((*rows, D), dtype, *parts, grad=False)
    x = x * scale
    if swap and len(rows) > 1:
        x = x.transpose(0, 1)
        residual = None if residual is None else residual.transpose(0, 1)
    y, u = run(kind, x, weight, bias, EPS, residual=residual)
    assert y.shape == x.shape and y.dtype == dtype
    truth = exact(kind, *double(x, weight, bias), EPS, residual=double(residual))[0]
    today = eager(kind, x, weight, bias, EPS, residual)[0]
    if torch.isfinite(today).all() and torch.isfinite(truth).all():
        assert_accurate(y, truth, today)


@pytest.mark.parametrize("kind", NORMS)
def test_same_bits_for_any_thread_count_and_batch(kind):
    rows = 70 if INTERPRETED else 300  # past one chunk of rows either way
    x, weight, bias, residual = make((rows, 72), torch.float32)
    g = randn(rows, 72)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            out = run(kind, x, weight, bias, EPS, residual=residual)
            results.append((*out, *gradients(out, (x, weight, bias, residual), (g, g))))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))
    y = NORMS[kind](x, weight, bias=bias)
    for first, n in ((0, 1), (5, 7), (3, 64)):
        assert torch.equal(
            NORMS[kind](x[first : first + n], weight, bias=bias), y[first : first + n]
        )


@pytest.mark.no_interpreter
@pytest.mark.parametrize("width", [4096, 4099])
def test_large_tensors_take_the_streaming_stores(width):
    """Outputs of 16 MB and more pass the caches: same bits as for few of their rows."""
    x, weight, _, residual = make((1100, width), torch.float32)
    g = randn(1100, width)
    whole = layer_norm(x, weight, residual=residual)
    grads = torch.autograd.grad(whole, (x, residual), (g, g))
    rows = slice(1030, 1034)
    xs, rs = (t.detach()[rows].requires_grad_() for t in (x, residual))
    few = layer_norm(xs, weight, residual=rs)
    few_grads = torch.autograd.grad(few, (xs, rs), (g[rows], g[rows]))
    for a, b in zip((*whole, *grads), (*few, *few_grads)):
        assert torch.equal(a[rows], b)


def test_frozen_input_or_weight():
    for kind in NORMS:
        x, weight = randn(5, 8, grad=True), randn(8)
        (dx,) = torch.autograd.grad(NORMS[kind](x, weight).square().sum(), x)
        x, weight = x.detach(), weight.requires_grad_()
        (dw,) = torch.autograd.grad(NORMS[kind](x, weight).square().sum(), weight)
        x, weight = x.requires_grad_(), weight
        both = torch.autograd.grad(NORMS[kind](x, weight).square().sum(), (x, weight))
        torch.testing.assert_close(both, (dx, dw), rtol=0, atol=0)


def test_saved_for_backward_is_input_and_statistics():
    x, weight = randn(64, 256, grad=True), randn(256, grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.numel()) or t, lambda t: t
    ):
        layer_norm(x, weight)
    assert sum(saved) == x.numel() + weight.numel() + 2 * 64


# ---- the contract with torch --------------------------------------------------------------------------


@pytest.mark.parametrize("centred", [False, True])
def test_opcheck(centred):
    base = randn(3, 8, 6)
    for x in (base, base.transpose(0, 1), base[:1].expand(3, 8, 6)):
        w, b = randn(6), randn(6)
        torch.library.opcheck(ops.row_norm.default, (x, w, b, EPS, 1.0, centred))
        for residual in (None, randn(*x.shape)):
            args = (x, residual, w, b, EPS, 0.5, 0.0, centred)
            torch.library.opcheck(ops.row_norm_stats.default, args)
        u = x.contiguous()
        _, _, mean, rstd = ops.row_norm_stats(u, None, w, b, EPS, 1.0, 0.0, centred)
        for dy, du in ((x, None), (randn(1).expand(x.shape), x)):
            args = (dy, du, u, w, mean, rstd, 0.0, centred, True, True, True)
            torch.library.opcheck(ops.row_norm_backward.default, args)
            args = (dy, du, u, None, mean, rstd, 0.0, centred, True, False, False)
            torch.library.opcheck(ops.row_norm_backward.default, args)


def compiled_matches(backend):
    def f(x, w, b, r):
        y, u = layer_norm(x, w, b, residual=r, residual_scale=0.5)
        return rms_norm(y * 2, w) + u

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend=backend)
    for n in (4, 7):
        tensors = make((n, 16), torch.float32)
        want, got = f(*tensors), compiled(*tensors)
        torch.testing.assert_close(got, want)
        g = randn(n, 16)
        torch.testing.assert_close(
            torch.autograd.grad(got, tensors, g), torch.autograd.grad(want, tensors, g)
        )


@pytest.mark.inductor
@pytest.mark.no_interpreter
def test_compile_inductor():
    compiled_matches("inductor")


@pytest.mark.parametrize("kind", NORMS)
def test_torch_func(kind):
    x, w = randn(5, 8), randn(8)
    f = NORMS[kind]
    scalar = lambda x, w: f(x, w).square().sum()
    got = torch.func.grad(scalar, argnums=(0, 1))(x, w)
    xs, ws = x.clone().requires_grad_(), w.clone().requires_grad_()
    torch.testing.assert_close(got, torch.autograd.grad(scalar(xs, ws), (xs, ws)))
    torch.testing.assert_close(torch.func.vmap(f, in_dims=(0, None))(x, w), f(x, w))
    x, w, direction = x.double(), w.double(), randn(5, 8, dtype=torch.float64)
    _, tangent = torch.func.jvp(lambda x: f(x, w), (x,), (direction,))
    h = 1e-6
    numeric = (f(x + h * direction, w) - f(x - h * direction, w)) / (2 * h)
    torch.testing.assert_close(tangent, numeric, rtol=1e-6, atol=1e-8)


def test_backend_switch_and_autocast():
    x, w = randn(5, 8), randn(8)
    with solera.backend("reference"):
        y = layer_norm(x, w)
    torch.testing.assert_close(y, layer_norm(x, w))
    with pytest.raises(ValueError, match="backend: expected one of"):
        with solera.backend("fast"):
            pass
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        for t in (x, x.bfloat16()):
            assert layer_norm(t, w).dtype == F.layer_norm(t, (8,), w.to(t.dtype)).dtype


# ---- modules -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(8,), (4, 2)], ids=str)
@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
def test_modules_are_drop_ins(name, shape):
    for options in ({}, {"elementwise_affine": False}, {"eps": 1e-3}):
        theirs = getattr(torch.nn, name)(shape, device=DEVICE, **options)
        ours = getattr(solera.nn, name)(shape, device=DEVICE, **options)
        for p in theirs.parameters():
            torch.nn.init.normal_(p)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        ours.load_state_dict(theirs.state_dict(), strict=True)
        x = randn(3, *shape)
        torch.testing.assert_close(ours(x), theirs(x))
        y, u = ours(x, residual=x, residual_scale=2.0)
        torch.testing.assert_close(y, theirs(3 * x))
        torch.testing.assert_close(u, 3 * x)
        for clone in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            assert torch.equal(clone(x), ours(x))
        with pytest.raises(ValueError, match="x: expected last dimensions"):
            ours(randn(3, 9))


# ---- bad input ---------------------------------------------------------------------------------------

X = randn(3, 4)
BAD = [
    (lambda f: f([1.0, 2.0]), TypeError, "x: expected a torch.Tensor, got list"),
    (lambda f: f(torch.ones(3, 4, dtype=torch.int64)), TypeError, "x: expected float32.*int64"),
    (lambda f: f(torch.tensor(1.0)), ValueError, r"x: expected at least 1 dimension.*\(\)"),
    (lambda f: f(X, randn(5)), ValueError, r"weight: expected shape \(4,\).*\(5,\)"),
    (lambda f: f(X, randn(1)), ValueError, r"weight: expected shape \(4,\).*\(1,\)"),
    (lambda f: f(X, randn(3, 4)), ValueError, r"weight: expected shape \(4,\).*\(3, 4\)"),
    (lambda f: f(X, randn(4).double()), TypeError, "weight: float64 with x of torch.float32"),
    (lambda f: f(X, randn(4).int()), TypeError, "weight: expected float32.*int32"),
    (lambda f: f(X, bias=randn(3)), ValueError, r"bias: expected shape \(4,\)"),
    (lambda f: f(X, randn(4).to("meta")), ValueError, "weight: expected device"),
    (lambda f: f(X, residual=randn(4)), ValueError, r"residual: expected shape \(3, 4\)"),
    (lambda f: f(X, residual=X.half()), TypeError, "residual: expected torch.float32"),
    (
        lambda f: f(X, residual=X, residual_scale=float("nan")),
        ValueError,
        "residual_scale: expected",
    ),
    (lambda f: f(X, residual_scale=2.0), ValueError, "residual_scale: 2.0 was given without"),
    (lambda f: f(X, eps="small"), TypeError, "eps: expected a number"),
    (lambda f: f(X, eps=-1.0), ValueError, r"eps: expected a finite number in \[0, inf\]"),
    (lambda f: f(X, eps=float("nan")), ValueError, "eps: expected a finite number"),
    (lambda f: f(X, weight_offset=float("inf")), ValueError, "weight_offset: expected a finite"),
]


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input_is_named(case, kind):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call(NORMS[kind])


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
@given(st.sampled_from(sorted(NORMS)), anything, anything, anything, anything, anything)
def test_arguments_give_a_result_or_a_clear_error(kind, x, weight, bias, residual, number):
    try:
        NORMS[kind](x, weight, eps=number, bias=bias, residual=residual)
    except (TypeError, ValueError) as error:
        assert str(error).split(":")[0] in {"x", "weight", "bias", "residual", "eps"}, error
