"""Core batch_ensemble: the kernels against float64, their gradients, their bits, and bad input."""

import ensemble_layers as layers
import pytest
import torch
from ensemble_layers import ACTIVATIONS, SHAPES_HERE, check, make
from helpers import DEVICE, DTYPES, INTERPRETED, randn
from hypothesis import given, settings
from hypothesis import strategies as st

from solera.ensemble import batch_ensemble_linear

ops = torch.ops.solera


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES_HERE, ids=str)
def test_forward_and_backward_against_float64(shape, dtype):
    for activation in (None, "gelu") if INTERPRETED else ACTIVATIONS:
        check(make(shape, dtype, separate=False), activation, shape)


@pytest.mark.parametrize("bias", [None, "one", "member"])
@pytest.mark.parametrize("scales", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("shape", [(3, 4, 5, 7), (40, 3, 20, 9)], ids=str)
def test_optional_arguments(shape, shared, scales, bias):
    if scales or not shared or bias == "member":
        check(make(shape, torch.float32, shared, scales, bias), "relu", shape)
    check(make(shape, torch.bfloat16, shared, True, bias), "gelu", shape)


@pytest.mark.parametrize("zero", (0, 2, 3))
def test_empty_sizes(zero):
    layers.check_empty_sizes(zero, False)


def test_zeros_in_the_scales():
    x, weight, r, s, b = make((6, 3, 8, 5), torch.float32)
    with torch.no_grad():
        r[:, ::2] = 0
        s[1] = 0
    check((x, weight, r, s, b), "gelu", (6, 3, 8, 5))


def test_float32_parameters_with_half_input():
    layers.check_float32_parameters(False)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck_and_gradgradcheck(activation):
    layers.check_double_backward(False, activation)


def test_only_what_is_asked_for():
    layers.check_each_gradient_alone(False)


def test_strided_and_expanded_input():
    layers.check_strides(False)


@pytest.mark.no_interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_has_the_same_bits_in_every_batch(dtype):
    layers.check_rows_in_every_batch(False, dtype)


@pytest.mark.no_interpreter
@pytest.mark.parametrize(
    "shape", [(1, 2, 16, 16), (5, 6, 70, 50), (100, 5, 600, 300), (20, 2, 2100, 1100)], ids=str
)
def test_same_bits_for_any_thread_count(shape):
    layers.check_thread_counts(shape, False)


@pytest.mark.no_interpreter
@pytest.mark.skipif(DEVICE != "cpu", reason="the switches are the CPU kernels'")
@pytest.mark.parametrize(
    "name, value",
    [("SOLERA_GEMM", "native"), ("SOLERA_GEMM", "library"), ("SOLERA_FIXED_TILES", "1")],
)
def test_environment_switches(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    layers.check_switches(False, fixed=name == "SOLERA_FIXED_TILES")


@pytest.mark.no_interpreter
@pytest.mark.skipif(DEVICE != "cpu", reason="instruction sets of the CPU kernels")
@pytest.mark.parametrize("isa", ["generic", "avx2"])
def test_narrower_instruction_sets(isa):
    layers.check_instruction_set(isa, False)


@pytest.mark.parametrize("activation", range(4))
def test_opcheck(activation):
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    x, weight, r, s, b = (t.detach() for t in make((4, 3, 6, 5), torch.float32))
    turned = x.transpose(0, 1).contiguous().transpose(0, 1)
    for x in (x.clone(), turned, x[:1].expand(4, 3, 6), x[:, 0]):  # noqa: B020
        for op in (ops.batch_ensemble, ops.batch_ensemble_saved):
            torch.library.opcheck(op, (x, weight, r, s, b, activation), test_utils=tests)
        saved = randn(4, 3, 5) if activation else None
        for dy, need in layers.gradients_and_needs():
            torch.library.opcheck(
                ops.batch_ensemble_backward,
                (dy, x, weight, r, s, saved, activation, need, need, True, need, True, True),
                test_utils=tests,
            )


@pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.inductor)]
)
def test_compile(backend):
    layers.check_compile(backend, False)


def test_transforms_take_the_reference():
    layers.check_transforms(False)


def test_backend_switch_and_autocast():
    layers.check_backend_and_autocast(False)


@settings(max_examples=12 if INTERPRETED else 60)
@given(*layers.SHAPES_AND_VALUES)
def test_any_shape_and_value(B, K, I, O, shared, activation, dtype, value):
    layers.check_shape_and_value(False, B, K, I, O, shared, activation, dtype, value)


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


def test_bad_dtypes_and_devices():
    x, weight, r, s, b = (t.detach() for t in make((4, 3, 6, 5), torch.float32))
    with pytest.raises(TypeError, match="x: expected float32"):
        batch_ensemble_linear(x.int(), weight, r, s, b)
    with pytest.raises(TypeError, match="weight: expected float32"):
        batch_ensemble_linear(x, weight.long(), r, s, b)
    with pytest.raises(TypeError, match="s: float64 with x"):
        batch_ensemble_linear(x, weight, r, s.double(), b)
    with pytest.raises(ValueError, match="r: expected device"):
        batch_ensemble_linear(x, weight, r.to("meta"), s, b)


@settings(max_examples=150)
@given(st.tuples(*[layers.ANYTHING] * 5), layers.ANY_ACTIVATION)
def test_fuzzed_arguments(arguments, activation):
    layers.check_fuzzed(batch_ensemble_linear, arguments, activation)
