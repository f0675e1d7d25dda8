"""Core batch_ensemble: the kernels against float64, their gradients, their bits, and bad input."""

import os
import subprocess
import sys

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
from hypothesis import given, settings
from hypothesis import strategies as st

import solera
from solera.ensemble import batch_ensemble_linear, ensemble_linear
from solera.ensemble.batch_ensemble import ACTIVATIONS

ops = torch.ops.solera
# (B, K, I, O): single elements, odd sizes, tiles with a tail, several blocks, a long batch, many members.
SHAPES = [(1, 1, 1, 1), (3, 4, 5, 7), (8, 32, 24, 40), (17, 3, 16, 300), (70, 2, 530, 20)]
LARGE = [(600, 2, 20, 17), (10, 300, 8, 8)]
SHAPES_HERE = SHAPES if INTERPRETED else SHAPES + LARGE


def eager(x, weight, r, s, bias, activation):
    """What a user writes today, in x's dtype."""
    h = x.unsqueeze(1) if x.dim() == 2 else x
    h = h if r is None else h * r
    h = h @ weight.T
    h = h if s is None else h * s
    h = h if bias is None else h + bias
    return h if activation is None else getattr(F, activation)(h)


def eager_separate(x, weight, bias, activation):
    h = x.unsqueeze(1).expand(-1, weight.shape[0], -1) if x.dim() == 2 else x
    h = (h.transpose(0, 1) @ weight).transpose(0, 1)
    h = h if bias is None else h + bias
    return h if activation is None else getattr(F, activation)(h)


def make(shape, dtype, shared=False, scales=True, bias="member", separate=False):
    B, K, I, O = shape
    x = randn(*((B, I) if shared else (B, K, I)), dtype=dtype, grad=True)
    weight = randn(
        *((K, I, O) if separate else (O, I)), dtype=dtype, scale=max(I, 1) ** -0.5, grad=True
    )
    r = randn(K, I, dtype=dtype, grad=True) if scales else None
    s = randn(K, O, dtype=dtype, grad=True) if scales else None
    sizes = {"member": (K, O), "one": (O,), None: None}[bias]
    b = None if sizes is None else randn(*sizes, dtype=dtype, grad=True)
    return (x, weight, b) if separate else (x, weight, r, s, b)


def whole(function, tensors, activation, dy):
    """y and the gradients."""
    y = function(*tensors, activation)
    return (y, *torch.autograd.grad(y, [t for t in tensors if t is not None], dy))


def ours(*arguments):
    *tensors, activation = arguments
    function = batch_ensemble_linear if len(tensors) == 5 else ensemble_linear
    return function(*tensors, activation=activation)


def check(tensors, activation, shape):
    today = eager if len(tensors) == 5 else eager_separate
    B, K, _, O = shape
    dy = randn(B, K, O, dtype=tensors[0].dtype)
    a = whole(ours, tensors, activation, dy)
    b = whole(today, double(*tensors), activation, dy.double())
    c = whole(today, tensors, activation, dy)
    names = ["y"] + [n for n, t in zip(("x", "weight", "r", "s", "bias"), tensors) if t is not None]
    for name, mine, truth, other in zip(names, a, b, c, strict=True):
        assert mine.dtype == tensors[0].dtype
        if mine.numel() < 64:  # the error of a handful of values is luck: a few roundings each
            assert relative_error(mine, truth) <= 4 * max(
                ULP[mine.dtype], relative_error(other, truth)
            ), name
        else:
            assert_accurate(mine, truth, other, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES_HERE, ids=str)
@pytest.mark.parametrize("separate", [False, True])
def test_forward_and_backward_against_float64(separate, shape, dtype):
    for activation in (None, "gelu") if INTERPRETED else ACTIVATIONS:
        check(make(shape, dtype, separate=separate), activation, shape)


@pytest.mark.parametrize("bias", [None, "one", "member"])
@pytest.mark.parametrize("scales", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("shape", [(3, 4, 5, 7), (40, 3, 20, 9)], ids=str)
def test_optional_arguments(shape, shared, scales, bias):
    if scales or not shared or bias == "member":
        check(make(shape, torch.float32, shared, scales, bias), "relu", shape)
    if not scales:
        check(make(shape, torch.float32, shared, False, bias, separate=True), "silu", shape)
    check(make(shape, torch.bfloat16, shared, True, bias), "gelu", shape)


@pytest.mark.parametrize("zero", range(4))
def test_empty_sizes(zero):
    shape = [3, 2, 4, 5]
    shape[zero] = 0
    for separate in (False, True):
        tensors = make(shape, torch.float32, separate=separate)
        if zero == 1:
            with pytest.raises(ValueError, match=r"K = 0|K >= 1"):
                ours(*tensors, "gelu")
            continue
        out = whole(ours, tensors, "gelu", randn(shape[0], shape[1], shape[3]))
        for t, g in zip(tensors, out[1:]):
            assert g.shape == t.shape and torch.isfinite(g).all()
        if zero == 2:
            assert_accurate(out[0], F.gelu(tensors[-1].double()).expand(3, 2, 5))


def test_zeros_in_the_scales():
    x, weight, r, s, b = make((6, 3, 8, 5), torch.float32)
    with torch.no_grad():
        r[:, ::2] = 0
        s[1] = 0
    check((x, weight, r, s, b), "gelu", (6, 3, 8, 5))


@pytest.mark.parametrize("separate", [False, True])
def test_float32_parameters_with_half_input(separate):
    shape = (9, 3, 20, 11)
    tensors = make(shape, torch.float32, separate=separate)
    x = randn(9, 3, 20, dtype=torch.bfloat16, grad=True)
    dy = randn(9, 3, 11, dtype=torch.bfloat16)
    out = whole(ours, (x, *tensors[1:]), "gelu", dy)
    assert [t.dtype for t in out] == [torch.bfloat16] * 2 + [torch.float32] * (len(tensors) - 1)
    today = eager_separate if separate else eager
    truth = whole(today, double(x, *tensors[1:]), "gelu", dy.double())
    for a, b in zip(out, truth):
        assert relative_error(a, b) <= ULP[torch.bfloat16]


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck_and_gradgradcheck(separate, activation):
    for shared in (False, True):
        tensors = make((2, 2, 3, 2), torch.float64, shared, separate=separate)
        f = lambda *t: ours(*t, activation)
        assert torch.autograd.gradcheck(f, tensors, fast_mode=INTERPRETED)
        assert torch.autograd.gradgradcheck(f, tensors, fast_mode=INTERPRETED)


def test_only_what_is_asked_for():
    """Each gradient alone equals the one among all."""
    for shape in ((3, 4, 5, 7), (20, 3, 6, 5)):
        for separate in (False, True):
            tensors = make(shape, torch.float32, separate=separate)
            dy = randn(shape[0], shape[1], shape[3])
            every = whole(ours, tensors, "gelu", dy)[1:]
            for i, want in enumerate(every):
                alone = [t.detach().requires_grad_(i == j) for j, t in enumerate(tensors)]
                (got,) = torch.autograd.grad(ours(*alone, "gelu"), alone[i], dy)
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_strided_and_expanded_input():
    x, weight, r, s, b = (t.detach() for t in make((6, 4, 10, 8), torch.float32))
    views = [x.flip(0), x.transpose(0, 1).contiguous().transpose(0, 1), x[:1].expand(6, 4, 10)]
    for view in views:
        y = batch_ensemble_linear(view, weight, r, s, b)
        assert torch.equal(y, batch_ensemble_linear(view.contiguous(), weight, r, s, b))
    turned = weight.t().contiguous().t()
    assert torch.equal(
        batch_ensemble_linear(x, turned, r, s, b), batch_ensemble_linear(x, weight, r, s, b)
    )
    x.requires_grad_()
    (a,) = torch.autograd.grad(batch_ensemble_linear(x, weight, r, s, b).sum(), x)
    (c,) = torch.autograd.grad(
        batch_ensemble_linear(x, weight, r, s, b), x, torch.ones(6, 4, 8, device=DEVICE)
    )
    assert torch.equal(a, c)


@pytest.mark.no_interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("separate", [False, True])
def test_a_row_has_the_same_bits_in_every_batch(separate, dtype):
    tensors = [t.detach() for t in make((256, 8, 96, 80), dtype, separate=separate)]
    full = ours(*tensors, "gelu")
    for batch in (1, 7, 255):
        assert torch.equal(ours(tensors[0][:batch], *tensors[1:], "gelu"), full[:batch]), batch


@pytest.mark.no_interpreter
@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("shape", [(5, 6, 70, 50), (100, 5, 600, 300)], ids=str)
def test_same_bits_for_any_thread_count(shape, separate):
    tensors = make(shape, torch.float32, separate=separate)
    dy = randn(shape[0], shape[1], shape[3])
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(whole(ours, tensors, "gelu", dy))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other):
            assert torch.equal(a, b)


@pytest.mark.no_interpreter
@pytest.mark.skipif(DEVICE != "cpu", reason="the switches are the CPU kernels'")
@pytest.mark.parametrize("name, value", [("SOLERA_GEMM", "native"), ("SOLERA_FIXED_TILES", "1")])
def test_environment_switches(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    for separate in (False, True):
        for shape in ((3, 4, 5, 7), (40, 3, 33, 20), (600, 2, 20, 17)):
            for shared in (False, True):
                check(make(shape, torch.bfloat16, shared, separate=separate), "gelu", shape)
        tensors = [t.detach() for t in make((40, 3, 33, 20), torch.bfloat16, separate=separate)]
        full = ours(*tensors, None)
        if name == "SOLERA_FIXED_TILES":
            assert torch.equal(ours(tensors[0][:7], *tensors[1:], None), full[:7])


@pytest.mark.no_interpreter
@pytest.mark.skipif(DEVICE != "cpu", reason="instruction sets of the CPU kernels")
@pytest.mark.parametrize("isa", ["generic", "avx2"])
def test_narrower_instruction_sets(isa):
    code = (
        "import test_batch_ensemble as t, torch\n"
        "for separate in (False, True):\n"
        "    for shape in ((3, 4, 5, 7), (40, 3, 33, 20)):\n"
        "        for dtype in t.DTYPES:\n"
        "            for a in t.ACTIVATIONS: t.check(t.make(shape, dtype, separate=separate), a, shape)\n"
    )
    environment = {**os.environ, "SOLERA_ISA": isa}
    paths = [os.path.dirname(__file__), os.path.dirname(os.path.dirname(__file__))]
    environment["PYTHONPATH"] = os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


@pytest.mark.parametrize("activation", range(4))
def test_opcheck(activation):
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    x, weight, r, s, b = (t.detach() for t in make((4, 3, 6, 5), torch.float32))
    w3 = randn(3, 6, 5)
    turned = x.transpose(0, 1).contiguous().transpose(0, 1)
    for x in (x.clone(), turned, x[:1].expand(4, 3, 6), x[:, 0]):  # noqa: B020
        for op in (ops.batch_ensemble, ops.batch_ensemble_saved):
            torch.library.opcheck(op, (x, weight, r, s, b, activation), test_utils=tests)
        for op in (ops.member_linear, ops.member_linear_saved):
            torch.library.opcheck(op, (x, w3, b, activation), test_utils=tests)
        saved = randn(4, 3, 5) if activation else None
        for dy in (randn(4, 3, 5), randn(1, 1, 1).expand(4, 3, 5)):
            for need in (True, False):
                torch.library.opcheck(
                    ops.batch_ensemble_backward,
                    (dy, x, weight, r, s, saved, activation, need, need, True, need, True, True),
                    test_utils=tests,
                )
                torch.library.opcheck(
                    ops.member_linear_backward,
                    (dy, x, w3, saved, activation, need, True, need, True),
                    test_utils=tests,
                )


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.inductor)]
)
def test_compile(separate, backend):
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *t: ours(*t, "gelu"), fullgraph=True, dynamic=True, backend=backend
    )
    for B in (5, 9):
        for shared in (False, True):
            tensors = make((B, 3, 6, 4), torch.float32, shared, separate=separate)
            dy = randn(B, 3, 4)
            a = whole(ours, tensors, "gelu", dy)
            y = compiled(*tensors)
            b = (y, *torch.autograd.grad(y, tensors, dy))
            for u, v in zip(a, b):
                torch.testing.assert_close(u, v)


@pytest.mark.parametrize("separate", [False, True])
def test_transforms_take_the_reference(separate):
    tensors = [t.detach() for t in make((4, 3, 6, 5), torch.float64, separate=separate)]
    f = lambda *t: ours(*t, "gelu").square().sum()
    grads = torch.func.grad(f, argnums=tuple(range(len(tensors))))(*tensors)
    leaves = [t.clone().requires_grad_() for t in tensors]
    for a, b in zip(grads, torch.autograd.grad(f(*leaves), leaves)):
        torch.testing.assert_close(a, b)
    tangents = [torch.randn_like(t) for t in tensors]
    _, derivative = torch.func.jvp(f, tuple(tensors), tuple(tangents))
    torch.testing.assert_close(derivative, sum((g * t).sum() for g, t in zip(grads, tangents)))
    stack = torch.stack([tensors[0], 2 * tensors[0]])
    mapped = torch.func.vmap(lambda x: ours(x, *tensors[1:], "gelu"))(stack)
    torch.testing.assert_close(mapped[1], ours(2 * tensors[0], *tensors[1:], "gelu"))


@pytest.mark.parametrize("separate", [False, True])
def test_backend_switch_and_autocast(separate):
    shape = (6, 3, 10, 8)
    tensors = make(shape, torch.float32, separate=separate)
    with solera.backend("reference"):
        a = ours(*tensors, "silu")
    torch.testing.assert_close(a, ours(*tensors, "silu"))
    if DEVICE == "cpu":
        for name in ("auto", "reference"):
            with torch.autocast("cpu", torch.bfloat16), solera.backend(name):
                y = ours(*tensors, "silu")
                assert y.dtype == torch.bfloat16
            grads = torch.autograd.grad(y, tensors, randn(*y.shape, dtype=y.dtype))
            assert all(g.dtype == torch.float32 for g in grads)
            assert relative_error(y, a) < 1e-2


@settings(max_examples=15 if INTERPRETED else 60)
@given(
    st.sampled_from([0, 1, 2, 9, 33]), st.integers(1, 5), st.sampled_from([0, 1, 3, 17]),
    st.sampled_from([0, 1, 4, 19]), st.booleans(), st.booleans(), st.sampled_from(ACTIVATIONS),
    st.sampled_from(DTYPES[:2] if INTERPRETED else DTYPES),
    st.sampled_from([0.0, 1e-40, 1e30, float("inf"), float("nan"), 1.0]),
)  # fmt: skip
def test_any_shape_and_value(B, K, I, O, shared, separate, activation, dtype, value):
    tensors = [t.detach() for t in make((B, K, I, O), dtype, shared, separate=separate)]
    if tensors[0].numel():
        tensors[0].view(-1)[0] = value
    y = ours(*tensors, activation)
    today = eager_separate if separate else eager
    truth = today(*(t.double() for t in tensors), activation)
    assert y.shape == (B, K, O) and y.dtype == dtype
    finite = truth.abs() < torch.finfo(dtype).max / 2
    y, truth = y.double(), truth.double()
    rest = torch.where(finite, truth, 0.0)
    bound = 4 * ULP[dtype] * (rest.abs() + 1 + (abs(value) if abs(value) < 1e31 else 0) * 10)
    assert ((torch.where(finite, y, 0.0) - rest).abs() <= bound).all()
    if B > 1 and I > 0:  # a bad value stays in its batch item
        assert torch.isfinite(y[1:]).all()


X, W, R, S, BIAS = (4, 3, 6), (5, 6), (3, 6), (3, 5), (3, 5)
BAD = [
    ({"x": (6,)}, ValueError, r"x: expected shape \(B, I\)"),
    ({"x": (2, 4, 3, 6)}, ValueError, r"x: expected shape \(B, I\)"),
    ({"x": (4, 3, 7)}, ValueError, r"weight: expected shape \(5, 7\)"),
    ({"x": (4, 1, 6)}, ValueError, r"r: expected shape \(1, 6\)"),
    ({"x": (4, 0, 6)}, ValueError, "K = 0"),
    ({"weight": (3, 5, 6)}, ValueError, "weight: expected 2 dimensions"),
    ({"r": (1, 6)}, ValueError, r"r: expected shape \(3, 6\)"),
    ({"s": (3, 6)}, ValueError, r"s: expected shape \(3, 5\)"),
    ({"bias": (1, 5)}, ValueError, r"bias: expected shape \(3, 5\)"),
    ({"bias": (6,)}, ValueError, r"bias: expected shape \(5,\)"),
    (
        {"x": (4, 6), "r": None, "s": None, "bias": (5,)},
        ValueError,
        "does not tell the number of members",
    ),
    (
        {"x": (4, 6), "r": None, "s": None, "bias": None},
        ValueError,
        "does not tell the number of members",
    ),
    ({"x": (4, 6), "r": (6,)}, ValueError, "r: expected 2 dimensions"),
    ({"x": 3.0}, TypeError, "x: expected a torch.Tensor"),
    ({"r": [1.0]}, TypeError, "r: expected a torch.Tensor"),
    ({"activation": "tanh"}, ValueError, "activation: expected one of"),
    ({"activation": 1}, TypeError, "activation: expected one of"),
    ({"activation": ["relu"]}, TypeError, "activation: expected one of"),
]


@pytest.mark.parametrize("changes, error, message", BAD)
def test_bad_input(changes, error, message):
    arguments = {"x": X, "weight": W, "r": R, "s": S, "bias": BIAS, "activation": None, **changes}
    arguments = {k: randn(*v) if isinstance(v, tuple) else v for k, v in arguments.items()}
    with pytest.raises(error, match=message):
        batch_ensemble_linear(**arguments)


def test_bad_dtypes_and_separate_weights():
    x, weight, r, s, b = (t.detach() for t in make((4, 3, 6, 5), torch.float32))
    with pytest.raises(TypeError, match="x: expected float32"):
        batch_ensemble_linear(x.int(), weight, r, s, b)
    with pytest.raises(TypeError, match="weight: expected float32"):
        batch_ensemble_linear(x, weight.long(), r, s, b)
    with pytest.raises(TypeError, match="s: float64 with x"):
        batch_ensemble_linear(x, weight, r, s.double(), b)
    with pytest.raises(ValueError, match="r: expected device"):
        batch_ensemble_linear(x, weight, r.to("meta"), s, b)
    with pytest.raises(ValueError, match="x: expected 2 members"):
        ensemble_linear(x, randn(2, 6, 5))
    with pytest.raises(ValueError, match="weight: expected shape"):
        ensemble_linear(x, randn(3, 7, 5))
    with pytest.raises(ValueError, match="weight: expected at least one member"):
        ensemble_linear(x, randn(0, 6, 5))
    with pytest.raises(ValueError, match="bias: expected shape"):
        ensemble_linear(x, randn(3, 6, 5), randn(3, 6))


@settings(max_examples=150)
@given(st.data())
def test_fuzzed_arguments(data):
    """A clear ValueError or TypeError, or a result; never anything else."""
    sizes = st.lists(st.sampled_from([0, 1, 2, 3]), max_size=4).map(tuple)
    dtypes = st.sampled_from([torch.float32] * 4 + [torch.float64, torch.int64, torch.bool])
    tensors = st.builds(lambda s, d: torch.zeros(s, dtype=d, device=DEVICE), sizes, dtypes)
    anything = st.one_of(tensors, tensors, st.none(), st.just("x"), st.just(1))
    activation = data.draw(st.sampled_from([None, "relu", "gelu", "silu", "GELU", 2, object()]))
    try:
        if data.draw(st.booleans()):
            y = batch_ensemble_linear(
                *(data.draw(anything) for _ in range(5)), activation=activation
            )
        else:
            y = ensemble_linear(*(data.draw(anything) for _ in range(3)), activation=activation)
        assert y.dim() == 3
    except (ValueError, TypeError) as error:
        assert ": " in str(error)
