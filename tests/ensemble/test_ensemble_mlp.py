"""Core ensemble_mlp: against the formula in float64, gradients, bits, torch's contract, bad input."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from function_checks import compiles, differentiates, works_under_torch_func
from helpers import DEVICE, DTYPES, INTERPRETED, SLACK, ULP, double, randn, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st

import solera
from solera.ensemble import ensemble_mlp

ops = torch.ops.solera

# (B, K, widths): single elements, a tail, several tiles, one layer, many members.
CASES = [
    (1, 1, (1, 1, 1)),
    (3, 4, (5, 7, 3)),
    (70, 3, (20, 33, 18, 10)),
    (17, 20, (6, 4)),
    (40, 2, (64, 130, 1)),
]
LARGE = [(1100, 3, (24, 40, 10)), (9, 40, (16, 16, 16, 16))]
CASES_HERE = CASES[:3] if INTERPRETED else CASES + LARGE


def make(batch, members, widths, dtype, shared=True, bias=True, grad=True):
    x = randn(
        *((batch, widths[0]) if shared else (batch, members, widths[0])), dtype=dtype, grad=grad
    )
    tensors = [x]
    for i, o in itertools.pairwise(widths):
        tensors.append(randn(members, i, o, dtype=dtype, scale=i**-0.5, grad=grad))
        if bias:
            tensors.append(randn(members, o, dtype=dtype, scale=0.3, grad=grad))
    return tensors


def pairs(tensors, bias=True):
    rest = tensors[1:]
    return list(zip(rest[::2], rest[1::2])) if bias else [(w, None) for w in rest]


def network(tensors, activation, reduce, bias=True):
    return ensemble_mlp(tensors[0], pairs(tensors, bias), activation=activation, reduce=reduce)


def eager(tensors, activation, reduce, bias=True):
    """What a user writes today, in x's dtype."""
    x, layers = tensors[0], pairs(tensors, bias)
    h = x.expand(layers[0][0].shape[0], *x.shape) if x.dim() == 2 else x.transpose(0, 1)
    for i, (w, b) in enumerate(layers):
        h = h @ w if b is None else torch.baddbmm(b[:, None], h, w)
        if activation and i < len(layers) - 1:
            h = getattr(F, activation)(h)
    y = h.transpose(0, 1)
    if reduce is None:
        return y
    if isinstance(reduce, torch.Tensor):
        return torch.einsum("bko,k->bo", y, reduce.to(y.dtype))
    return y.mean(1) if reduce == "mean" else y.sum(1)


def whole(function, tensors, *options, dy):
    y = function(tensors, *options)
    return y, *torch.autograd.grad(y, [t for t in tensors if t.requires_grad], dy.to(y.dtype))


def check(tensors, activation, reduce=None, bias=True):
    with torch.no_grad():
        dy = randn(*eager(tensors, activation, reduce, bias).shape, dtype=tensors[0].dtype)
    options = (activation, reduce, bias)
    truth = whole(eager, double(*tensors), *options, dy=dy.double())
    today = whole(eager, tensors, *options, dy=dy)
    mine = whole(network, tensors, *options, dy=dy)
    for i, (a, b, c) in enumerate(zip(mine, truth, today, strict=True)):
        few = 4 if a.numel() < 64 else 1  # the error of a handful of values is luck
        if INTERPRETED and a.dtype == torch.bfloat16:
            few = 4  # the interpreter cuts bits off where a GPU rounds, at every layer
        limit = SLACK * few * max(ULP[a.dtype], 2 * relative_error(c, b))
        assert a.dtype == tensors[0].dtype
        assert relative_error(a, b) <= limit, f"value {i}: {relative_error(a, b):.3g} > {limit:.3g}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES_HERE, ids=str)
def test_forward_and_backward_against_float64(case, dtype):
    for activation in ("gelu",) if INTERPRETED else (None, "relu", "gelu", "silu"):
        check(make(*case, dtype), activation)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("reduce", [None, "mean", "sum", "weights"])
def test_reductions_and_own_inputs(reduce, shared, bias):
    sizes = ((20, 3, (6, 9, 5)),) if INTERPRETED else ((20, 3, (6, 9, 5)), (50, 18, (17, 12, 3)))
    for batch, members, widths in sizes:
        r = torch.rand(members, device=DEVICE) if reduce == "weights" else reduce
        check(make(batch, members, widths, torch.float32, shared, bias), "relu", r, bias)
        check(make(batch, members, widths, torch.bfloat16, shared, bias), "silu", r, bias)


@pytest.mark.parametrize("activation", ["tanh", None])
def test_a_function_as_activation_and_weights_that_learn(activation):
    tensors = make(6, 3, (4, 5, 2), torch.float64)
    function = torch.tanh if activation else None
    h = tensors[0].expand(3, 6, 4)
    for i, (w, b) in enumerate(pairs(tensors)):
        h = h @ w + b[:, None]
        h = function(h) if function and i == 0 else h
    for size in ((3,), (6, 3)):
        weights = torch.rand(size, dtype=torch.float64, device=DEVICE, requires_grad=True)
        y = ensemble_mlp(tensors[0], pairs(tensors), activation=function, reduce=weights)
        want = (h.transpose(0, 1) * weights.unsqueeze(-1)).sum(1)
        torch.testing.assert_close(y, want)
        got = torch.autograd.grad(y.square().sum(), [weights, *tensors], retain_graph=True)
        truth = torch.autograd.grad(want.square().sum(), [weights, *tensors], retain_graph=True)
        torch.testing.assert_close(got, truth)


def test_only_what_is_asked_for():
    tensors = make(20, 3, (5, 6, 4), torch.float32)
    dy = randn(20, 3, 4)
    every = whole(network, tensors, "gelu", None, dy=dy)[1:]
    for i, want in enumerate(every):
        alone = [t.detach().requires_grad_(i == j) for j, t in enumerate(tensors)]
        (got,) = torch.autograd.grad(network(alone, "gelu", None), alone[i], dy)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_both_layouts_of_a_weight_agree():
    tensors = make(70, 3, (20, 33, 18), torch.float32)
    named = {}
    for i, (w, b) in enumerate(pairs(tensors)):
        named[f"{i}.weight"] = w.detach().mT.contiguous().requires_grad_()
        named[f"{i}.bias"] = b
    dy = randn(70, 3, 18)
    got = torch.autograd.grad(
        ensemble_mlp(tensors[0], named, activation="gelu"), [tensors[0], *named.values()], dy
    )
    want = whole(network, tensors, "gelu", None, dy=dy)[1:]
    for a, b in zip(got, want):
        torch.testing.assert_close(a.mT if a.dim() == 3 else a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.no_interpreter
@pytest.mark.parametrize("out_first", [False, True])
@pytest.mark.parametrize("batch", [1, 3, 13, 270])
def test_blocks_of_registers_and_what_is_left_of_them(batch, out_first):
    """Widths around every number of vectors, with each of what a product does to its result."""
    for widths in ((1, 15, 16, 17), (31, 32, 33, 47), (48, 49, 63, 1), (64, 65, 100, 129)):
        tensors = make(batch, 2, widths, torch.float32)
        layers = pairs(tensors)
        if out_first:
            layers = {
                f"{i}.{name}": t
                for i, (w, b) in enumerate(layers)
                for name, t in (("weight", w.mT.contiguous()), ("bias", b))
            }
        y = ensemble_mlp(tensors[0], layers, activation="relu")
        dy = randn(*y.shape)
        got = y, *torch.autograd.grad(y, tensors, dy)
        want = whole(eager, double(*tensors), "relu", None, dy=dy.double())
        for a, b in zip(got, want, strict=True):
            # A weight's gradient is a sum over the batch whose terms may cancel: its rounding is of that sum's size.
            torch.testing.assert_close(
                a, b.float(), rtol=1e-5, atol=1e-5 * max(1, batch / 64) ** 0.5
            )


def test_float32_parameters_with_half_input():
    tensors = make(9, 3, (20, 11, 4), torch.float32)
    x = randn(9, 20, dtype=torch.bfloat16, grad=True)
    tensors[0] = x
    dy = randn(9, 3, 4, dtype=torch.bfloat16)
    out = whole(network, tensors, "gelu", None, dy=dy)
    assert [t.dtype for t in out[:2]] == [torch.bfloat16] * 2
    assert all(t.dtype == torch.float32 for t in out[2:])
    truth = whole(eager, double(*tensors), "gelu", None, dy=dy.double())
    for a, b in zip(out, truth):
        assert relative_error(a, b) <= 2 * ULP[torch.bfloat16]


@pytest.mark.parametrize("empty", ["items", "inputs", "hidden", "outputs"])
def test_empty_sizes(empty):
    batch, widths = (0 if empty == "items" else 3), [4, 5, 2]
    if empty != "items":
        widths[("inputs", "hidden", "outputs").index(empty)] = 0
    tensors = make(batch, 2, tuple(widths), torch.float32) if empty == "items" else None
    if tensors is None:
        tensors = [randn(3, widths[0], grad=True)]
        for i, o in itertools.pairwise(widths):
            tensors += [randn(2, i, o, grad=True), randn(2, o, grad=True)]
    dy = randn(batch, 2, widths[-1])
    got = whole(network, tensors, "relu", None, dy=dy)
    want = whole(eager, tensors, "relu", None, dy=dy)
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b)


def test_strided_and_expanded_input():
    tensors = [t.detach() for t in make(6, 4, (10, 8, 5), torch.float32, shared=False)]
    x = tensors[0]
    for view in (x.flip(0), x.transpose(0, 1).contiguous().transpose(0, 1), x[:1].expand(6, 4, 10)):
        y = network([view, *tensors[1:]], "relu", None)
        assert torch.equal(y, network([view.contiguous(), *tensors[1:]], "relu", None))
    tensors = make(6, 4, (10, 8, 5), torch.float32)
    y = network(tensors, "relu", "mean")
    (a,) = torch.autograd.grad(y.sum(), tensors[1], retain_graph=True)
    (b,) = torch.autograd.grad(y, tensors[1], torch.ones_like(y))
    assert torch.equal(a, b)


@pytest.mark.no_interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_has_the_same_bits_in_every_batch_and_ensemble(dtype):
    tensors = [t.detach() for t in make(700, 5, (48, 64, 10), dtype)]
    full = network(tensors, "gelu", None)
    for batch in (1, 7, 130, 699):
        part = network([tensors[0][:batch], *tensors[1:]], "gelu", None)
        assert torch.equal(part, full[:batch]), batch
    alone = [tensors[0], *(t[2:3] for t in tensors[1:])]
    assert torch.equal(network(alone, "gelu", None), full[:, 2:3])


@pytest.mark.no_interpreter
@pytest.mark.parametrize("widths", [(48, 64, 10), (9, 10, 20, 64, 3)], ids=str)
def test_what_is_kept_for_backward_changes_no_bit(widths):
    tensors = make(700, 3, widths, torch.float32)
    kept = network(tensors, "relu", None)
    with torch.no_grad():
        alone = network(tensors, "relu", None)
        part = network([tensors[0][:5], *tensors[1:]], "relu", None)
    assert kept.requires_grad and torch.equal(kept, alone) and torch.equal(part, alone[:5])


@pytest.mark.no_interpreter
@pytest.mark.parametrize("reduce", [None, "mean"])
@pytest.mark.parametrize("case", [(5, 6, (70, 50, 3)), (1100, 3, (24, 40, 10))], ids=str)
def test_same_bits_for_any_thread_count(case, reduce):
    tensors = make(*case, torch.float32)
    with torch.no_grad():
        dy = randn(*network(tensors, "gelu", reduce).shape)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(whole(network, tensors, "gelu", reduce, dy=dy))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@pytest.mark.no_interpreter
@pytest.mark.skipif(DEVICE != "cpu", reason="the switches are the CPU kernels'")
@pytest.mark.parametrize(
    "name, value",
    [("SOLERA_GEMM", "native"), ("SOLERA_GEMM", "library"), ("SOLERA_FIXED_TILES", "1")],
)
def test_environment_switches(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    for case in ((3, 4, (5, 7, 3)), (600, 2, (20, 17, 4))):
        check(make(*case, torch.bfloat16), "gelu")
        check(make(*case, torch.float32), "relu", "mean")


@pytest.mark.no_interpreter
@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU rounds hidden values to bfloat16 between layers")
@pytest.mark.parametrize("widths", [(64, 64, 64, 10), (40, 72, 33, 3)], ids=str)
def test_relu_sees_the_sign_of_unrounded_sums(widths):
    tensors = make(200, 3, widths, torch.bfloat16)
    with torch.no_grad():
        dy = randn(*network(tensors, "relu", None).shape, dtype=torch.bfloat16)
    got = whole(network, tensors, "relu", None, dy=dy)
    want = whole(eager, double(*tensors), "relu", None, dy=dy.double())
    for a, b in zip(got, want, strict=True):  # signs of sums of rounded values would make it 0.03
        assert relative_error(a, b) <= ULP[torch.bfloat16]


@pytest.mark.no_interpreter
@pytest.mark.skipif(DEVICE != "cpu", reason="the products are the CPU kernels'")
@pytest.mark.parametrize("column", [float("inf"), 3.3895e38, float("nan")])
def test_what_is_not_finite_stays_so(column):
    """Infinities, and sums that become so when rounded, leave no rest that makes a NaN of the next sum."""
    x = torch.ones(40, 8, dtype=torch.bfloat16)
    first, second = torch.zeros(2, 8, 32), torch.ones(2, 32, 5)
    first[:, 0, 3] = 1e36
    bias = torch.zeros(2, 32)
    bias[:, 3] = column
    layers = [
        (first.bfloat16(), bias.bfloat16()),
        (second.bfloat16(), None),
        (second.mT.bfloat16(), None),
    ]
    y = ensemble_mlp(x, layers, activation="relu")
    assert y.isnan().all() if column != column else (y == float("inf")).all()


@pytest.mark.parametrize("activation, reduce", [("relu", None), ("gelu", "mean")])
def test_gradcheck_and_gradgradcheck(activation, reduce):
    f = lambda *t: network(t, activation, reduce)
    differentiates(f, make(2, 2, (2, 2, 1), torch.float64))


def test_opcheck():
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    x, w1, b1, w2, b2 = (t.detach() for t in make(4, 3, (6, 5, 2), torch.float32))
    combine = torch.rand(3, device=DEVICE)
    turned = w1.mT.contiguous().mT
    shared, own = x[:1].expand(4, 6), x.unsqueeze(1).expand(4, 3, 6)
    every = [
        (x, w1, [1, 0], None),
        (x.t().contiguous().t(), turned, [2, 3], combine),
        (shared, turned, [3, 1], None),
        (own, w1, [2, 0], combine),
    ]
    for value, first, codes, c in every[3:] if INTERPRETED else every:
        arguments = (value, [first, w2], [b1, b2], codes, False, c)
        torch.library.opcheck(ops.ensemble_mlp, arguments, test_utils=tests)
        torch.library.opcheck(ops.ensemble_mlp_saved, arguments, test_utils=tests)
        saved = ops.ensemble_mlp_saved(*arguments)[1]
        dy = randn(1, 2).expand(4, 2) if c is not None else randn(4, 1, 2).expand(4, 3, 2)
        arguments = (dy, value, [first, w2], saved, codes, False, c, True, codes[0] > 1)
        torch.library.opcheck(ops.ensemble_mlp_backward, arguments, test_utils=tests)


@pytest.mark.no_interpreter
@pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.inductor)]
)
def test_compile(backend):
    f = lambda *t: network(t, "gelu", "mean")
    compiles(f, lambda size: make(size, 3, (6, 5, 2), torch.float32), backend)


@pytest.mark.no_interpreter
def test_transforms_take_the_reference():
    tensors = make(4, 2, (3, 5, 2), torch.float64)
    works_under_torch_func(lambda *t: network(t, "gelu", None), tensors)
    layers = pairs([t.detach() for t in tensors])
    xs = randn(3, 4, 3, dtype=torch.float64)
    together = torch.vmap(lambda x: ensemble_mlp(x, layers, activation="gelu"))(xs)
    one = torch.stack([ensemble_mlp(x, layers, activation="gelu") for x in xs])
    torch.testing.assert_close(together, one)


@pytest.mark.no_interpreter
def test_backend_switch_and_autocast():
    tensors = make(20, 3, (6, 9, 4), torch.float32)
    with solera.backend("reference"):
        want = network(tensors, "gelu", "mean")
    torch.testing.assert_close(network(tensors, "gelu", "mean"), want)
    with torch.autocast(DEVICE, torch.bfloat16):
        y = network(tensors, "gelu", None)
    assert y.dtype == torch.bfloat16
    grads = torch.autograd.grad(y.float().sum(), tensors)
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in grads)


@settings(max_examples=8 if INTERPRETED else 40)
@given(
    st.integers(0, 40), st.integers(1, 5), st.lists(st.integers(0, 40), min_size=2, max_size=4),
    st.booleans(), st.sampled_from(["relu", "gelu", "silu", None]), st.sampled_from(DTYPES),
    st.sampled_from([0.0, 1.0, 1e-30, 1e3, float("inf"), float("nan")]),
)  # fmt: skip
def test_any_shape_and_value(batch, members, widths, shared, activation, dtype, value):
    x = torch.full((batch, widths[0]) if shared else (batch, members, widths[0]), value)
    x = x.to(DEVICE, dtype)
    layers = [
        (randn(members, i, o, dtype=dtype), randn(members, o, dtype=dtype))
        for i, o in itertools.pairwise(widths)
    ]
    y = ensemble_mlp(x, layers, activation=activation)
    flat = [t for pair in layers for t in pair]
    want = eager([x.double(), *(t.double() for t in flat)], activation, None)
    assert y.shape == want.shape and y.dtype == dtype
    if value in (0.0, 1.0):
        assert relative_error(y, want) <= 20 * ULP[dtype]
    elif value != value and batch and widths[0] and all(widths):
        assert activation == "relu" or y.isnan().all()


X, W1, B1, W2, B2 = (4, 6), (3, 6, 5), (3, 5), (3, 5, 2), (3, 2)
BAD = [
    ({"x": (6,)}, ValueError, r"x: expected shape \(B, I\)"),
    ({"x": (4, 2, 6)}, ValueError, "x: expected 3 members"),
    ({"x": (4, 7)}, ValueError, r"params\[0\] weight: expected shape \(3, 7, 5\)"),
    ({"x": 3.0}, TypeError, "x: expected a torch.Tensor"),
    ({"w1": (6, 5)}, ValueError, r"params\[0\] weight: expected 3 dimensions"),
    ({"w1": (0, 6, 5)}, ValueError, "params: expected at least one member"),
    ({"w2": (3, 4, 2)}, ValueError, r"params\[1\] weight: expected shape \(3, 5, 2\)"),
    ({"w2": (2, 5, 2)}, ValueError, r"params\[1\] weight: expected shape \(3, 5, 2\)"),
    ({"b1": (5,)}, ValueError, r"params\[0\] bias: expected shape \(3, 5\)"),
    ({"b2": [1.0]}, TypeError, r"params\[1\] bias: expected a torch.Tensor"),
    ({"activation": "tanh"}, ValueError, "activation: expected one of"),
    ({"activation": 1}, TypeError, "activation: expected one of"),
    ({"reduce": "median"}, ValueError, "reduce: expected one of"),
    ({"reduce": 2}, TypeError, "reduce: expected None, 'mean'"),
    ({"reduce": (4,)}, ValueError, r"reduce: expected shape \(3,\)"),
    ({"reduce": (3, 3)}, ValueError, r"reduce: expected shape \(4, 3\)"),
]


@pytest.mark.parametrize("changes, error, message", BAD)
def test_bad_input(changes, error, message):
    given_ = {"x": X, "w1": W1, "b1": B1, "w2": W2, "b2": B2, "activation": None, "reduce": None}
    a = {k: randn(*v) if isinstance(v, tuple) else v for k, v in {**given_, **changes}.items()}
    layers = [(a["w1"], a["b1"]), (a["w2"], a["b2"])]
    with pytest.raises(error, match=message):
        ensemble_mlp(a["x"], layers, activation=a["activation"], reduce=a["reduce"])


@pytest.mark.parametrize(
    "params", [None, [], {}, "weights", [randn(3, 6, 5)], {"scale": randn(3, 6)}]
)
def test_bad_parameters(params):
    with pytest.raises((TypeError, ValueError), match="params"):
        ensemble_mlp(randn(4, 6), params)
