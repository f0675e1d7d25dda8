"""Core hyper_linear: self-tuning layers against the paper's formula, gradients, torch's contract, bad input."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from function_checks import agrees_with_formula, compiles, differentiates, works_under_torch_func
from helpers import DEVICE, DTYPES, INTERPRETED, randn
from hypothesis import given
from hypothesis import strategies as st

import solera
from solera import nn
from solera.ensemble import hyper_conv2d, hyper_linear
from solera.ensemble.hyper_linear import hyper_gate

ops = torch.ops.solera


def formula(x, h, we, wh, hyper, be, bh, e):
    """y = e (x We' + be) + s_w (x Wh') + s_b bh, [s_w, s_b] = h H'."""
    out = we.shape[0]
    s = h @ hyper.mT
    s_w, s_b = s[:, :out], s[:, out:]
    if x.dim() == 2:
        y = e * (x @ we.mT + (0 if be is None else be)) + s_w * (x @ wh.mT)
        return y if bh is None else y + s_b * bh
    y = e * F.conv2d(x, we, be, padding=1) + s_w[:, :, None, None] * F.conv2d(x, wh, padding=1)
    return y if bh is None else y + (s_b * bh)[:, :, None, None]


def make(B, I, O, m, dtype=torch.float32, image=None, bias=True):
    size = () if image is None else (3, 3)
    x = randn(B, I, *(image or ()), dtype=dtype, grad=True)
    we = randn(O, I, *size, dtype=dtype, scale=0.3, grad=True)
    wh = randn(O, I, *size, dtype=dtype, scale=0.3, grad=True)
    h, hyper = randn(B, m, dtype=dtype, grad=True), randn(2 * O, m, dtype=dtype, grad=True)
    be, bh = (randn(O, dtype=dtype, grad=True) if bias else None for _ in range(2))
    return x, h, we, wh, hyper, be, bh, randn((), dtype=dtype, grad=True)


def conv(*t):
    return hyper_conv2d(*t, padding=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_self_tuning_layers_against_the_papers_formula(dtype, bias):
    sizes = [(5, 7, 9, 3)] if INTERPRETED else [(1, 1, 1, 1), (5, 7, 9, 3), (130, 20, 33, 4)]
    images = (2, 3, 4, 3) if INTERPRETED else (5, 3, 6, 2)
    for function, size, image in [
        *((hyper_linear, s, None) for s in sizes),
        (conv, images, (4, 7)),
    ]:
        *tensors, scale = make(*size, dtype, image, bias=bias)
        # The gradient of the one number `scale` is luck to the last bits: float64 below settles it.
        agrees_with_formula(function, formula, [*tensors, scale.detach()])
        if dtype == torch.float64:
            agrees_with_formula(function, formula, [*tensors, scale])


def gate_formula(a, u, s, bias):
    out = a.shape[1]
    y = a + s[:, :out, None] * u
    return y if bias is None else y + (s[:, out:] * bias).unsqueeze(2)


@pytest.mark.parametrize("shape", [(70, 18, 1), (3, 5, 1), (4, 6, 70), (130, 2, 33)], ids=str)
def test_the_pass_behind_the_products(shape):
    for dtype in (torch.float32, torch.bfloat16):
        N, O, P = shape
        a, u = randn(N, O, P, dtype=dtype, grad=True), randn(N, O, P, dtype=dtype, grad=True)
        s, b = randn(N, 2 * O, dtype=dtype, grad=True), randn(O, dtype=dtype, grad=True)
        agrees_with_formula(hyper_gate, gate_formula, (a, u, s, b), 2.5e-7)  # few sums: luck
        agrees_with_formula(hyper_gate, gate_formula, (a, u, s[:, :O].detach(), None))


def test_without_hyperparameters_the_elementary_layer_is_left():
    x, _, we, wh, hyper, be, bh, e = make(4, 5, 6, 2)
    y = hyper_linear(x, None, we, wh, hyper, be, bh, e)
    torch.testing.assert_close(y, e * F.linear(x, we, be))
    assert torch.equal(hyper_linear(x, None, we, wh, hyper, be, bh), F.linear(x, we, be))


def test_gradients_twice():
    differentiates(hyper_linear, make(2, 2, 2, 2, torch.float64))
    a, u = (randn(2, 2, 3, dtype=torch.float64, grad=True) for _ in range(2))
    s, b = randn(2, 4, dtype=torch.float64, grad=True), randn(2, dtype=torch.float64, grad=True)
    differentiates(hyper_gate, (a, u, s, b))


def test_opcheck_and_strides():
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    a, s, b = randn(4, 6, 3), randn(4, 12), randn(6)
    turned = a.transpose(0, 1).contiguous().transpose(0, 1)
    spread = randn(4, 1, 3).expand(4, 6, 3)
    for u in (turned, spread):
        for bias in (b, None):
            scale = s if bias is not None else s[:, :6]
            torch.library.opcheck(ops.hyper_gate, (a, u, scale, bias), test_utils=tests)
            torch.library.opcheck(
                ops.hyper_gate_backward, (spread, u, scale, bias), test_utils=tests
            )
            assert torch.equal(
                ops.hyper_gate(a, u, scale, bias), ops.hyper_gate(a, u.contiguous(), scale, bias)
            )


@pytest.mark.no_interpreter
@pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.inductor)]
)
def test_compile(backend):
    compiles(hyper_linear, lambda size: make(size, 5, 6, 2), backend)


@pytest.mark.no_interpreter
def test_transforms_backends_and_autocast():
    works_under_torch_func(hyper_linear, make(4, 5, 6, 2))
    tensors = make(40, 5, 6, 2)
    with solera.backend("reference"):
        want = hyper_linear(*tensors)
    torch.testing.assert_close(hyper_linear(*tensors), want)
    with torch.autocast(DEVICE, torch.bfloat16):
        y = hyper_linear(*tensors)
    assert y.dtype == torch.bfloat16
    grads = torch.autograd.grad(y.float().sum(), tensors)
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in grads)


@pytest.mark.no_interpreter
def test_same_bits_for_any_thread_count_and_batch():
    a, u = randn(300, 40, 9), randn(300, 40, 9)
    s, b, dy = randn(300, 80), randn(40), randn(300, 40, 9)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append((ops.hyper_gate(a, u, s, b), *ops.hyper_gate_backward(dy, u, s, b)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(x, y) for x, y in zip(*results))
    assert torch.equal(ops.hyper_gate(a[:7], u[:7], s[:7], b), results[0][0][:7])


@given(
    st.integers(0, 9), st.integers(0, 20), st.integers(0, 20), st.sampled_from(DTYPES),
    st.sampled_from([0.0, 1.0, 1e30, float("nan")]),
)  # fmt: skip
def test_any_shape_and_value(N, O, P, dtype, value):
    a = torch.full((N, O, P), value).to(DEVICE, dtype)
    u, s, b = randn(N, O, P, dtype=dtype), randn(N, 2 * O, dtype=dtype), randn(O, dtype=dtype)
    y = hyper_gate(a, u, s, b)
    want = gate_formula(a.double(), u.double(), s.double(), b.double())
    assert y.shape == want.shape and y.dtype == dtype
    torch.testing.assert_close(y, want.to(dtype), equal_nan=True)


BAD = [
    ({"x": (4, 5, 2)}, ValueError, "x: expected 2 dimensions"),
    ({"x": (4, 6)}, ValueError, "x: expected 5 features"),
    ({"weight": (5,)}, ValueError, "weight: expected 2 dimensions"),
    ({"hyper_weight": (3, 5)}, ValueError, r"hyper_weight: expected shape \(6, 5\)"),
    ({"hyper": (6, 2)}, ValueError, r"hyper: expected shape \(12, 2\)"),
    ({"h": (3, 2)}, ValueError, r"h: expected shape \(4, 2\)"),
    ({"bias": (5,)}, ValueError, r"bias: expected shape \(6,\)"),
    ({"hyper_bias": (5,)}, ValueError, r"hyper_bias: expected shape \(6,\)"),
    ({"scale": (2,)}, ValueError, "scale: expected one number"),
    ({"scale": "e"}, TypeError, "scale: expected a number"),
    ({"x": None}, TypeError, "x: expected a torch.Tensor"),
]


@pytest.mark.parametrize("changes, error, message", BAD)
def test_bad_input(changes, error, message):
    names = ("x", "h", "weight", "hyper_weight", "hyper", "bias", "hyper_bias", "scale")
    arguments = dict(zip(names, (t.detach() for t in make(4, 5, 6, 2))))
    arguments |= {k: randn(*v) if isinstance(v, tuple) else v for k, v in changes.items()}
    with pytest.raises(error, match=message):
        hyper_linear(**arguments)


def test_a_mixture_of_dtypes_is_autocasts_alone():
    x, *rest = (t.detach() for t in make(4, 5, 6, 2))
    with pytest.raises(TypeError, match=r"weight: expected torch\.bfloat16"):
        hyper_linear(x.bfloat16(), *rest)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert hyper_linear(x.bfloat16(), *rest).dtype == torch.bfloat16


@pytest.mark.no_interpreter
@pytest.mark.parametrize("bias", [True, False])
def test_modules(bias):
    linear = nn.HyperLinear(5, 6, 2, bias).to(DEVICE)
    image = nn.HyperConv2d(3, 4, 3, 2, padding=1, bias=bias).to(DEVICE)
    keys = ["elem_weight", "hnet_weight", "elem_scalar", "htensor_to_scalars.weight"]
    biases = ["elem_bias", "hnet_bias"] if bias else []
    for module, x in ((linear, randn(7, 5)), (image, randn(7, 3, 6, 6))):
        assert sorted(module.state_dict()) == sorted(keys + biases)
        h = randn(7, 2)
        p = {**dict.fromkeys(("elem_bias", "hnet_bias")), **dict(module.named_parameters())}
        want = formula(
            x, h, p["elem_weight"], p["hnet_weight"], p["htensor_to_scalars.weight"],
            p["elem_bias"], p["hnet_bias"], p["elem_scalar"],
        )  # fmt: skip
        torch.testing.assert_close(module(x, h), want, rtol=1e-4, atol=1e-5)
        assert module(x, None).shape == want.shape
        for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert torch.equal(other(x, h), module(x, h))
