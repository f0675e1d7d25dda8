"""Core evonorm: the formulas in float64, timm's modules, gradients, layouts, and bad input."""

import copy
import importlib.util
import pickle
import types
from pathlib import Path

import pytest
import torch
from helpers import DEVICE, DTYPES, INTERPRETED, ULP, assert_accurate, double, randn, relative_error
from hypothesis import given
from hypothesis import strategies as st

import solera
from solera.norm import evonorm_b0, evonorm_b1, evonorm_b2, evonorm_s0

FORMS = ("s0", "b0", "b1", "b2")
WITH_V = ("s0", "b0")
EPS = 1e-5
# (N, C, *): one position, below a vector, odd, several vectors with a tail, more than one chunk of sums.
SHAPES = [(2, 4), (1, 4, 1, 1), (3, 8, 5), (2, 4, 7, 9), (3, 24, 4, 3), (2, 48, 25, 44)]
if INTERPRETED:
    SHAPES[-1] = (1, 4, 25, 44)
ops = torch.ops.solera


def run(form, x, weight, bias, v, *, groups=2, running_var=None, training=True, eps=EPS):
    if form == "s0":
        return evonorm_s0(x, weight, bias, v, groups=groups, eps=eps)
    options = {"running_var": running_var, "training": training, "eps": eps}
    if form == "b0":
        return evonorm_b0(x, weight, bias, v, **options)
    return {"b1": evonorm_b1, "b2": evonorm_b2}[form](x, weight, bias, **options)


def formula(form, x, weight, bias, v, *, groups=2, running_var=None, training=True, eps=EPS):
    """As the paper writes it, in x's dtype (what a user writes today)."""
    wide = lambda t: t.view(1, -1, *[1] * (x.dim() - 2))
    spatial = tuple(range(2, x.dim()))

    def var(t, dims):
        return (t - t.mean(dims, keepdim=True)).square().mean(dims, keepdim=True) if dims else 0 * t

    if form == "s0":
        g = x.reshape(x.shape[0], groups, -1)
        std = (var(g, (2,)) + eps).sqrt().expand(g.shape).reshape(x.shape)
        y = x * torch.sigmoid(wide(v) * x) / std
    else:
        batch = var(x, (0, *spatial)) if training else wide(running_var)
        left = (batch + eps).sqrt()
        mean_square = x.square().mean(spatial, keepdim=True) if spatial else x.square()
        rms = (mean_square + eps).sqrt()
        right = {
            "b0": lambda: wide(v) * x + (var(x, spatial) + eps).sqrt(),
            "b1": lambda: (x + 1) * rms,
            "b2": lambda: rms - x,
        }[form]()
        y = x / torch.maximum(left.expand_as(x), right)
    return y * wide(weight) + wide(bias)


def make(shape, dtype, grad=True, last=False):
    x = randn(*shape, dtype=dtype)
    if last and x.dim() > 2:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    params = [randn(shape[1], dtype=dtype, grad=grad) for _ in range(3)]
    return [x.requires_grad_(grad), *params]


def whole(function, form, tensors, g, **options):
    used = tensors if form in WITH_V else tensors[:3]
    y = function(form, *tensors, **options)
    return (y, *torch.autograd.grad(y, used, g))


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_forward_and_backward_against_float64(form, shape, dtype, last):
    tensors = make(shape, dtype, last=last)
    g = randn(*shape, dtype=dtype)
    for training in (True, False) if form != "s0" else (True,):
        options = {"training": training}
        running = None if training else randn(shape[1], dtype=dtype).square() + 0.1
        ours = whole(run, form, tensors, g, running_var=running, **options)
        today = whole(formula, form, tensors, g, running_var=running, **options)
        truth = whole(
            formula, form, double(*tensors), double(g), running_var=double(running), **options
        )
        for name, a, b, c in zip(("y", "dx", "dweight", "dbias", "dv"), ours, today, truth):
            assert a.dtype == dtype
            # Terms of a gradient cancel: a few roundings of the largest may be left.
            roundings = 2 if name == "y" else 16
            floor = roundings if dtype in (torch.float32, torch.float64) else 1
            if relative_error(a, c) > floor * ULP[dtype]:
                assert_accurate(a, c, b, f"{name}, training={training}")
        if last and len(shape) > 2 and shape[1] > 1:
            assert ours[0].stride() == ours[1].stride() == tensors[0].stride()


def timm_norms():
    """timm's EvoNorm modules; the file is read alone, its package needs torchvision."""
    found = importlib.util.find_spec("timm")
    if found is None or not found.submodule_search_locations:
        pytest.skip("timm is not installed")
    text = (Path(found.submodule_search_locations[0]) / "layers/evo_norm.py").read_text()
    relative = [line for line in text.splitlines() if line.startswith("from .")]
    for line in relative:
        text = text.replace(line, "")
    module = types.ModuleType("timm_evo_norm")
    module.__dict__["_assert"] = lambda condition, message: None
    exec(compile(text, "timm_evo_norm", "exec"), module.__dict__)
    return module


@pytest.mark.parametrize("name", ["S0", "B0", "B1", "B2"])
def test_agrees_with_timm_on_random_input(name):
    theirs = getattr(timm_norms(), f"EvoNorm2d{name}")(64)
    ours = getattr(solera.nn, f"EvoNorm2d{name}")(64)
    assert ours.eps == theirs.eps
    for p in theirs.parameters():
        torch.nn.init.normal_(p)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs, ours = theirs.to(DEVICE), ours.to(DEVICE)
    for training in (True, False, True):
        ours.train(training), theirs.train(training)
        x = (randn(3, 64, 5, 4) + 0.3).requires_grad_()
        y, want = ours(x), theirs(x)
        torch.testing.assert_close(y, want, rtol=2e-5, atol=2e-5)
        g = randn(*x.shape)
        torch.testing.assert_close(
            torch.autograd.grad(y, (x, *ours.parameters()), g),
            torch.autograd.grad(want, (x, *theirs.parameters()), g),
            rtol=1e-4,
            atol=1e-4,
        )
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


def test_modules():
    for name in ("S0", "B0", "B1", "B2"):
        kind = getattr(solera.nn, f"EvoNorm2d{name}")
        plain = kind(8, apply_act=False).to(DEVICE)
        torch.nn.init.normal_(plain.weight)
        torch.nn.init.normal_(plain.bias)
        assert getattr(plain, "v", None) is None
        x = randn(2, 8, 3, 3)
        want = x * plain.weight.view(1, 8, 1, 1) + plain.bias.view(1, 8, 1, 1)
        torch.testing.assert_close(plain(x), want)
        norm = kind(8, **({"groups": 4} if name == "S0" else {})).to(DEVICE).eval()
        for clone in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
            assert torch.equal(clone(x), norm(x))
        assert "8" in repr(norm)
        with pytest.raises(ValueError, match=r"x: expected shape \(N, 8, H, W\)"):
            norm(randn(2, 7, 3, 3))
        torch.nn.init.normal_(norm.weight)
        norm.reset_parameters()
        assert (norm.weight == 1).all()
    assert solera.nn.EvoNorm2dS0(16, group_size=4).groups == 4
    with pytest.raises(ValueError, match="group_size: expected a divisor"):
        solera.nn.EvoNorm2dS0(16, group_size=5)


@pytest.mark.parametrize("form", ["b0", "b1", "b2"])
def test_running_variance_is_unbiased_and_moves_by_momentum(form):
    x, weight, bias, v = make((3, 4, 5, 2), torch.float32, grad=False)
    running = randn(4).square()
    before = running.clone()
    run(form, x, weight, bias, v, running_var=running)
    want = 0.9 * before.double() + 0.1 * x.double().transpose(0, 1).flatten(1).var(1)
    assert relative_error(running, want) < 1e-6
    run(form, x, weight, bias, v, running_var=running, training=False)
    assert relative_error(running, want) < 1e-6
    half = before.bfloat16()
    run(form, x, weight, bias, v, running_var=half)
    assert relative_error(half, want) < ULP[torch.bfloat16]


def test_optional_weight_and_bias():
    x, _, _, v = make((2, 4, 3), torch.float64, grad=False)
    one, zero = torch.ones(4, device=DEVICE).double(), torch.zeros(4, device=DEVICE).double()
    for form in FORMS:
        assert relative_error(run(form, x, None, None, v), formula(form, x, one, zero, v)) < 1e-14


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_gradcheck_and_gradgradcheck(form, last):
    tensors = make((2, 4, 3, 2), torch.float64, last=last)
    used = tensors if form in WITH_V else tensors[:3]

    def f(*given):
        return run(form, *given, *tensors[len(given) :], eps=0.1)

    assert torch.autograd.gradcheck(f, tuple(used))
    assert torch.autograd.gradgradcheck(f, tuple(used))


def test_ties_split_the_gradient_as_torch_maximum():
    """x = 0 ties both sides of B2's maximum."""
    for shape in ((2, 2, 20), (2, 2, 3)):
        x = torch.zeros(shape, dtype=torch.float64, device=DEVICE, requires_grad=True)
        params = make((2, 2), torch.float64)[1:]
        g = randn(*shape, dtype=torch.float64)
        ours, want = (whole(f, "b2", [x, *params], g) for f in (run, formula))
        for a, b in zip(ours, want):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("form", FORMS)
def test_strided_expanded_and_float32_parameters(form):
    x, weight, bias, v = make((4, 8, 6, 5), torch.float32, grad=False)
    for view in (x[:, ::2], x.transpose(2, 3), x[:1].expand(3, 8, 6, 5), x.flip(0)):
        c = view.shape[1]
        p = (weight[:c], bias[:c], v[:c])
        assert torch.equal(run(form, view, *p), run(form, view.contiguous(), *p))
    xs = x.clone().requires_grad_()
    (a,) = torch.autograd.grad(run(form, xs, weight, bias, v).sum(), xs)  # expanded dy, stride 0
    (b,) = torch.autograd.grad(run(form, xs, weight, bias, v), xs, torch.ones_like(x))
    assert torch.equal(a, b)
    half = x.bfloat16().requires_grad_()
    params = [t.clone().requires_grad_() for t in (weight, bias, v)]
    g = randn(*x.shape, dtype=torch.bfloat16)
    ours = whole(run, form, [half, *params], g)
    truth = whole(formula, form, double(half, *params), g.double())
    for got, want in zip(ours, truth):
        assert relative_error(got, want) <= (ULP[got.dtype] if got.dtype != torch.float32 else 1e-5)
    assert [t.dtype for t in ours[:3]] == [torch.bfloat16, torch.bfloat16, torch.float32]


@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 4, 0), (0, 4)], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_empty(form, shape):
    tensors = make(shape, torch.float32)
    running = torch.ones(4, device=DEVICE)
    y, dx, dweight, dbias, *_ = whole(
        run, form, tensors, torch.empty(shape, device=DEVICE), running_var=running
    )
    assert y.shape == dx.shape == torch.Size(shape)
    assert not dweight.any() and not dbias.any()
    assert (running == 1).all()


def test_nan_and_infinity_stay_in_their_sample():
    x, weight, bias, v = make((4, 4, 3, 7), torch.float32, grad=False)
    x[0, 0, 0, 0], x[1, 2, 1, 1] = float("nan"), float("inf")
    for memory in (torch.contiguous_format, torch.channels_last):
        y = evonorm_s0(x.contiguous(memory_format=memory), weight, bias, v, groups=2)
        assert y[0, :2].isnan().all() and torch.isfinite(y[0, 2:]).all()
        assert y[1, 2:].isnan().any() and torch.isfinite(y[1, :2]).all()
        assert torch.isfinite(y[2:]).all()
        running = torch.ones(4, device=DEVICE)
        for form in ("b0", "b1", "b2"):
            args = (x.contiguous(memory_format=memory), weight, bias, v)
            y = run(form, *args, training=False, running_var=running)
            assert y[0, 0].isnan().all() and torch.isfinite(y[2:]).all()
            broken = torch.where(torch.arange(4, device=DEVICE) == 1, float("nan"), 1.0)
            y = run(form, *args, training=False, running_var=broken)
            assert y[:, 1].isnan().all() and torch.isfinite(y[2:, 2:]).all()


def test_large_mean():
    """A group in one stretch of memory keeps eager's accuracy; merged moments lose their means' last digits."""
    for form in FORMS:
        for last in (False, True):
            tensors = make((2, 4, 16, 16), torch.float32, grad=False, last=last)
            x = tensors[0] + 1e3
            args = (form, x, *tensors[1:])
            ours, today, exact = run(*args), formula(*args), formula(form, *double(x, *tensors[1:]))
            if form == "s0" and not last:
                assert_accurate(ours, exact, today, form)
            else:
                assert relative_error(ours, exact) < 5e-5, form


@given(
    n=st.integers(0, 3),
    c=st.integers(1, 6),
    spatial=st.lists(st.integers(0, 9), max_size=3),
    form=st.sampled_from(FORMS),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([1e-30, 1e-3, 1.0, 1e4, 1e15]),
    last=st.booleans(),
)
def test_any_shape_dtype_and_scale(n, c, spatial, form, dtype, scale, last):
    scale = min(scale, 1e3) if dtype == torch.float16 else scale
    x, weight, bias, v = make((n, c, *spatial), dtype, grad=False, last=last)
    x = x * scale
    y = run(form, x, weight, bias, v, groups=1)
    assert y.shape == x.shape and y.dtype == dtype
    if x.numel() == 0:
        return
    truth = formula(form, *double(x, weight, bias, v), groups=1)
    today = formula(form, x, weight, bias, v, groups=1)
    finite = torch.isfinite(today).all() and torch.isfinite(truth).all()
    if finite and relative_error(y, truth) > 2 * ULP[dtype]:
        assert_accurate(y, truth, today)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_same_bits_for_any_thread_count_and_batch(form, last):
    shape = (3, 8, 40, 9) if INTERPRETED else (5, 8, 90, 70)
    tensors = make(shape, torch.float32, last=last)
    running = torch.ones(8, device=DEVICE)
    g = randn(*shape)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(whole(run, form, tensors, g))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))
    x, *params = (t.detach() for t in tensors)
    y = run(form, x, *params, training=False, running_var=running)
    for first, n in ((0, 1), (1, 2)):
        few = run(form, x[first : first + n], *params, training=False, running_var=running)
        assert torch.equal(few, y[first : first + n])


@pytest.mark.no_interpreter
def test_large_tensors_take_the_streaming_stores():
    """Outputs of 16 MB and more pass the caches: same bits as a sample of them."""
    x, weight, bias, v = make((70, 64, 32, 32), torch.float32, grad=False)
    g = randn(70, 64, 32, 32)
    for memory in (torch.contiguous_format, torch.channels_last):
        xs = x.contiguous(memory_format=memory).requires_grad_()
        y = run("s0", xs, weight, bias, v)
        (dx,) = torch.autograd.grad(y, xs, g)
        few = xs.detach()[3:5].requires_grad_()
        y_few = run("s0", few, weight, bias, v)
        (dx_few,) = torch.autograd.grad(y_few, few, g[3:5])
        assert torch.equal(y[3:5], y_few) and torch.equal(dx[3:5], dx_few)


def test_saved_for_backward_is_input_and_moments():
    tensors = make((4, 8, 6, 6), torch.float32)
    for form in FORMS:
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: saved.append(t.numel()) or t, lambda t: t
        ):
            run(form, *tensors)
        parameters = 3 if form in WITH_V else 2
        moments = 4 * (2 if form == "s0" else 8)
        assert sum(saved) == tensors[0].numel() + 2 * moments + parameters * 8


def test_frozen_input_or_parameters():
    for form in FORMS:
        x, weight, bias, v = make((2, 4, 3), torch.float32)
        every = whole(run, form, [x, weight, bias, v], g := randn(2, 4, 3))
        y = run(form, x, weight.detach(), bias.detach(), v.detach())
        assert torch.equal(torch.autograd.grad(y, x, g)[0], every[1])
        y = run(form, x.detach(), weight, bias.detach(), v.detach())
        assert torch.equal(torch.autograd.grad(y, weight, g)[0], every[2])


# ---- the contract with torch --------------------------------------------------------------------------


def test_opcheck():
    base = randn(3, 8, 6)
    coefficients = [randn(3, 6) for _ in range(8)]
    shift, scale, slope, left, offset, mean, p, q = coefficients
    views = (base, randn(8, 3, 6).transpose(0, 1), base[:1].expand(3, 8, 6))
    ends = ((None, None), (left, offset), (left, offset))
    for x, dy, end in zip(views, (base, randn(1).expand(x_shape := base.shape), base), ends):
        assert x.shape == x_shape
        torch.library.opcheck(ops.evonorm.default, (x, shift, scale, slope, *end))
        args = (dy, x, scale, slope, *end)
        torch.library.opcheck(ops.evonorm_reduce.default, args)
        torch.library.opcheck(ops.evonorm_gradient.default, (*args, mean, p, q))


def compiled_matches(backend, forms):
    def f(form, *tensors):
        running = tensors[1].detach().square()
        return run(form, *tensors, running_var=running) * running.mean()

    def g(form, *tensors):
        return run(form, *tensors)

    for form in forms:
        for function in (g,) if form == "s0" else (f,):
            compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)
            for n, size in ((2, 3), (3, 5)):
                tensors = make((n, 8, size, 4), torch.float32)
                used = tensors if form in WITH_V else tensors[:3]
                want, got = function(form, *tensors), compiled(form, *tensors)
                torch.testing.assert_close(got, want)
                dy = randn(*want.shape)
                torch.testing.assert_close(
                    torch.autograd.grad(got, used, dy), torch.autograd.grad(want, used, dy)
                )


def test_compile_aot_eager():
    compiled_matches("aot_eager", FORMS)


@pytest.mark.inductor
@pytest.mark.no_interpreter
def test_compile_inductor():
    compiled_matches("inductor", ("s0",))


@pytest.mark.parametrize("form", FORMS)
def test_torch_func_and_backend(form):
    x, weight, bias, v = make((3, 4, 5), torch.float64, grad=False)
    scalar = lambda x: run(form, x, weight, bias, v).square().sum()
    got = torch.func.grad(scalar)(x)
    xs = x.clone().requires_grad_()
    torch.testing.assert_close(got, torch.autograd.grad(scalar(xs), xs)[0])
    direction = randn(3, 4, 5, dtype=torch.float64)
    _, tangent = torch.func.jvp(scalar, (x,), (direction,))
    torch.testing.assert_close(tangent, (got * direction).sum())
    if form == "s0":
        f = lambda x: evonorm_s0(x[None], weight, bias, v, groups=2)[0]
        torch.testing.assert_close(torch.func.vmap(f)(x), run(form, x, weight, bias, v))
    with solera.backend("reference"):
        y = run(form, x, weight, bias, v)
    torch.testing.assert_close(y, run(form, x, weight, bias, v))
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert run(form, x.float(), weight.float(), bias.float(), v.float()).dtype == torch.float32


# ---- bad input ---------------------------------------------------------------------------------------

X = randn(2, 4, 3)
W = randn(4)
R = torch.ones(4, device=DEVICE)
BAD = [
    (lambda: evonorm_s0(None, W, W, W), TypeError, "x: expected a torch.Tensor"),
    (lambda: evonorm_s0(X[0, 0], W, W, W), ValueError, r"x: expected at least 2 dimension"),
    (lambda: evonorm_s0(X.int(), W, W, W), TypeError, "x: expected float32"),
    (lambda: evonorm_s0(X, W[:3], W, W), ValueError, r"weight: expected shape \(4,\)"),
    (lambda: evonorm_s0(X, W, W.double(), W), TypeError, "bias: float64 with x"),
    (lambda: evonorm_s0(X, W, W, None), TypeError, "v: expected a torch.Tensor"),
    (lambda: evonorm_s0(X, W, W, W[:2]), ValueError, r"v: expected shape \(4,\)"),
    (lambda: evonorm_s0(X, W, W, W, groups=3), ValueError, "groups: expected a divisor"),
    (lambda: evonorm_s0(X, W, W, W, groups=0), ValueError, "groups: expected a divisor"),
    (lambda: evonorm_s0(X, W, W, W, groups=2.0), TypeError, "groups: expected"),
    (lambda: evonorm_s0(X, W, W, W, groups=2, eps=-1), ValueError, "eps: expected a finite"),
    (lambda: evonorm_b0(X, W, W, None, R), TypeError, "v: expected a torch.Tensor"),
    (lambda: evonorm_b0(X, W, W, W), ValueError, "running_var: expected .* training is False"),
    (lambda: evonorm_b1(X, W, W, R[:2]), ValueError, r"running_var: expected shape \(4,\)"),
    (lambda: evonorm_b2(X, W, W, R, momentum=2.0), ValueError, "momentum: expected a finite"),
    (lambda: evonorm_b2(X, W, W, R, eps="x"), TypeError, "eps: expected a number"),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input_is_named(case):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()
