"""Core member_linear: the kernels against float64, their gradients, their bits, and bad input."""

import ensemble_layers as layers
import pytest
import torch
from ensemble_layers import ACTIVATIONS, SHAPES_HERE, check, make
from helpers import DEVICE, DTYPES, INTERPRETED, randn
from hypothesis import given, settings
from hypothesis import strategies as st

from solera.ensemble import ensemble_linear

ops = torch.ops.solera


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES_HERE, ids=str)
def test_forward_and_backward_against_float64(shape, dtype):
    for activation in (None, "gelu") if INTERPRETED else ACTIVATIONS:
        check(make(shape, dtype, separate=True), activation, shape)


@pytest.mark.parametrize("bias", [None, "one", "member"])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("shape", [(3, 4, 5, 7), (40, 3, 20, 9)], ids=str)
def test_optional_arguments(shape, shared, bias):
    check(make(shape, torch.float32, shared, bias=bias, separate=True), "silu", shape)
    check(make(shape, torch.bfloat16, shared, bias=bias, separate=True), "relu", shape)


@pytest.mark.parametrize("zero", (0, 2, 3))
def test_empty_sizes(zero):
    layers.check_empty_sizes(zero, True)


def test_float32_parameters_with_half_input():
    layers.check_float32_parameters(True)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck_and_gradgradcheck(activation):
    layers.check_double_backward(True, activation)


def test_only_what_is_asked_for():
    layers.check_each_gradient_alone(True)


def test_strided_and_expanded_input():
    layers.check_strides(True)


@pytest.mark.no_interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_has_the_same_bits_in_every_batch(dtype):
    for columns in (80, 10, 1):
        layers.check_rows_in_every_batch(True, dtype, columns)


@pytest.mark.no_interpreter
@pytest.mark.parametrize(
    "shape",
    [(1, 2, 16, 16), (5, 6, 70, 50), (1100, 3, 40, 10), (100, 5, 600, 300), (20, 2, 2100, 1100)],
    ids=str,
)
def test_same_bits_for_any_thread_count(shape):
    layers.check_thread_counts(shape, True)


@pytest.mark.no_interpreter
@pytest.mark.skipif(DEVICE != "cpu", reason="the switches are the CPU kernels'")
@pytest.mark.parametrize(
    "name, value",
    [("SOLERA_GEMM", "native"), ("SOLERA_GEMM", "library"), ("SOLERA_FIXED_TILES", "1")],
)
def test_environment_switches(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    layers.check_switches(True, fixed=name == "SOLERA_FIXED_TILES")


@pytest.mark.no_interpreter
@pytest.mark.skipif(DEVICE != "cpu", reason="instruction sets of the CPU kernels")
@pytest.mark.parametrize("isa", ["generic", "avx2"])
def test_narrower_instruction_sets(isa):
    layers.check_instruction_set(isa, True)


@pytest.mark.parametrize("activation", range(4))
def test_opcheck(activation):
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    x, weight, b = (t.detach() for t in make((4, 3, 6, 5), torch.float32, separate=True))
    turned = x.transpose(0, 1).contiguous().transpose(0, 1)
    for x in (x.clone(), turned, x[:1].expand(4, 3, 6), x[:, 0]):  # noqa: B020
        for w in (weight, weight.mT.contiguous().mT):
            for op in (ops.member_linear, ops.member_linear_saved):
                torch.library.opcheck(op, (x, w, b, activation), test_utils=tests)
        saved = randn(4, 3, 5) if activation else None
        for dy, need in layers.gradients_and_needs():
            torch.library.opcheck(
                ops.member_linear_backward,
                (dy, x, weight, saved, activation, need, True, need, True),
                test_utils=tests,
            )


@pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.inductor)]
)
def test_compile(backend):
    layers.check_compile(backend, True)


def test_transforms_take_the_reference():
    layers.check_transforms(True)


def test_backend_switch_and_autocast():
    layers.check_backend_and_autocast(True)


@settings(max_examples=12 if INTERPRETED else 60)
@given(*layers.SHAPES_AND_VALUES)
def test_any_shape_and_value(B, K, I, O, shared, activation, dtype, value):
    layers.check_shape_and_value(True, B, K, I, O, shared, activation, dtype, value)


X, W, BIAS = (4, 3, 6), (3, 6, 5), (3, 5)
BAD = [
    ({"x": (6,)}, ValueError, r"x: expected shape \(B, I\)"),
    ({"x": (2, 4, 3, 6)}, ValueError, r"x: expected shape \(B, I\)"),
    ({"x": (4, 3, 7)}, ValueError, r"weight: expected shape \(3, 7, 5\)"),
    ({"x": (4, 1, 6)}, ValueError, "x: expected 3 members"),
    ({"x": (4, 0, 6)}, ValueError, "x: expected 3 members"),
    ({"x": (4, 5)}, ValueError, r"weight: expected shape \(3, 5, 5\)"),
    ({"weight": (2, 6, 5)}, ValueError, "x: expected 2 members"),
    ({"weight": (3, 7, 5)}, ValueError, r"weight: expected shape \(3, 6, 5\)"),
    ({"weight": (0, 6, 5)}, ValueError, "weight: expected at least one member"),
    ({"weight": (5, 6)}, ValueError, "weight: expected 3 dimensions"),
    ({"bias": (1, 5)}, ValueError, r"bias: expected shape \(3, 5\)"),
    ({"bias": (3, 6)}, ValueError, r"bias: expected shape \(3, 5\)"),
    ({"bias": (6,)}, ValueError, r"bias: expected shape \(5,\)"),
    ({"x": 3.0}, TypeError, "x: expected a torch.Tensor"),
    ({"bias": [1.0]}, TypeError, "bias: expected a torch.Tensor"),
    ({"activation": "tanh"}, ValueError, "activation: expected one of"),
    ({"activation": 1}, TypeError, "activation: expected one of"),
]


@pytest.mark.parametrize("changes, error, message", BAD)
def test_bad_input(changes, error, message):
    arguments = {"x": X, "weight": W, "bias": BIAS, "activation": None, **changes}
    arguments = {k: randn(*v) if isinstance(v, tuple) else v for k, v in arguments.items()}
    with pytest.raises(error, match=message):
        ensemble_linear(**arguments)


def test_bad_dtypes_and_devices():
    x, weight, b = (t.detach() for t in make((4, 3, 6, 5), torch.float32, separate=True))
    with pytest.raises(TypeError, match="x: expected float32"):
        ensemble_linear(x.int(), weight, b)
    with pytest.raises(TypeError, match="weight: expected float32"):
        ensemble_linear(x, weight.long(), b)
    with pytest.raises(TypeError, match="bias: float64 with x"):
        ensemble_linear(x, weight, b.double())
    with pytest.raises(ValueError, match="weight: expected device"):
        ensemble_linear(x, weight.to("meta"), b)


@settings(max_examples=150)
@given(st.tuples(*[layers.ANYTHING] * 3), layers.ANY_ACTIVATION)
def test_fuzzed_arguments(arguments, activation):
    layers.check_fuzzed(ensemble_linear, arguments, activation)
