"""Core channel_norm: its four passes against the reference in float64, and the engine around them."""

import pytest
import torch
from helpers import DEVICE, DTYPES, INTERPRETED, ULP, randn, relative_error
from hypothesis import given
from hypothesis import strategies as st

import solera
from solera.norm.channel_norm import channel_norm, moments

ops = torch.ops.solera
# (A, M, K): rows below a vector, with a tail, of several slabs; columns below a vector, past a register
# block with a tail, past a chunk of columns, and of several slabs.
SHAPES = [
    (5, 3, 1),
    (4, 77, 1),
    (2, 40000, 1),
    (2, 9, 3),
    (2, 70, 150),
    (1, 5, 1500),
    (2, 3000, 24),
]
if INTERPRETED:
    SHAPES = [(5, 3, 1), (4, 77, 1), (2, 9, 3), (2, 70, 40)]


def make(shape, dtype, with_lengths):
    A, M, K = shape
    x, dy, residual = (randn(*shape, dtype=dtype) for _ in range(3))
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    numbers = [randn(A, K, dtype=acc) for _ in range(5)]  # center, scale, shift, p, q
    lengths = None
    if with_lengths:
        lengths = torch.tensor([M, *range(1, A)], device=DEVICE)[:A].clamp(max=M)
    return x, dy, residual, numbers, lengths


def passes(x, dy, residual, numbers, lengths, activation):
    center, scale, shift, p, q = numbers
    affine = (center, scale, shift, residual, lengths, activation)
    return (
        *ops.channel_moments(x, lengths),
        ops.channel_affine(x, *affine),
        *ops.channel_reduce(dy, x, *affine),
        *ops.channel_gradient(dy, x, *affine, p, q, True, True),
    )


NAMES = ("mean", "var", "y", "dshift", "dscale", "dx", "dresidual")


def exact_passes(x, dy, residual, numbers, lengths, activation):
    with solera.backend("reference"):
        from solera.norm import channel_norm as core

        d = [t.double() for t in (x, dy, *numbers)]
        r = None if residual is None else residual.double()
        affine = (*d[2:5], r, lengths, activation)
        return (
            *core._channel_moments(d[0], lengths),
            core._channel_affine(d[0], *affine),
            *core._channel_reduce(d[1], d[0], *affine),
            *core._channel_gradient(d[1], d[0], *affine, *d[5:], True, True),
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_lengths", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_passes_against_float64(shape, with_lengths, dtype):
    activation = 3 if shape[1] % 2 else 1
    x, dy, residual, numbers, lengths = make(shape, dtype, with_lengths)
    for r in (residual, None):
        arguments = (x, dy, r, numbers, lengths, activation)
        for name, a, b in zip(NAMES, passes(*arguments), exact_passes(*arguments), strict=True):
            if name == "mean":  # of signed terms, near zero: held to the size of the terms
                rms = x.double().square().mean().sqrt()
                assert (a - b).abs().max() <= 8 * ULP[a.dtype] * rms, name
                continue
            # Sums of signed terms lose digits with the square root of their number.
            half = a.dtype in (torch.bfloat16, torch.float16)
            limit = ULP[a.dtype] * (1 if half else 8 * max(1.0, (shape[1] / 64) ** 0.5))
            assert relative_error(a, b) <= limit, name


@pytest.mark.parametrize("activation", range(5))
@pytest.mark.parametrize("shape", [(3, 33, 1), (2, 9, 20)], ids=str)
def test_every_activation(shape, activation):
    arguments = (*make(shape, torch.float32, True), activation)
    for name, a, b in zip(NAMES, passes(*arguments), exact_passes(*arguments), strict=True):
        assert relative_error(a, b) <= 1e-6, name


@given(
    shape=st.tuples(st.integers(0, 4), st.integers(0, 40), st.sampled_from([0, 1, 2, 17, 33])),
    dtype=st.sampled_from(DTYPES),
    activation=st.integers(0, 4),
    with_lengths=st.booleans(),
)
def test_any_shape(shape, dtype, activation, with_lengths):
    arguments = (*make(shape, dtype, with_lengths and shape[0] > 0), activation)
    for name, a, b in zip(NAMES, passes(*arguments), exact_passes(*arguments), strict=True):
        assert a.shape == b.shape, name
        assert relative_error(a, b) <= max(8 * ULP[a.dtype], 2e-6), name


def test_an_empty_row_has_no_moments_and_is_zero():
    x = randn(2, 5, 1)
    lengths = torch.tensor([0, 5], device=DEVICE)
    mean, var = ops.channel_moments(x, lengths)
    assert mean[0].isnan() and var[0].isnan() and mean[1].isfinite()
    y = ops.channel_affine(x, mean, var, var, None, lengths, 0)
    assert not y[0].any() and y[1].isfinite().all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_large_mean_and_constant_rows(shape):
    x = randn(*shape) + 1e4
    x[0] = 3.3
    mean, var = ops.channel_moments(x, None)
    d = x.double()
    torch.testing.assert_close(mean.double(), d.mean(1), rtol=1.2e-7, atol=0)
    exact = d.var(1, correction=0)
    # A slab's mean is kept to half a unit of 1e4, 5e-4 of the deviation.
    near = 5e-4 if INTERPRETED else 1e-4  # a tile of the interpreter adds one row after another
    torch.testing.assert_close(var.double()[1:], exact[1:], rtol=near, atol=1e-9)
    assert (var >= 0).all() and (var[0] < 1e-12).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_same_bits_for_any_thread_count_and_batch(shape):
    arguments = (*make(shape, torch.float32, False), 3)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(passes(*arguments))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))
    x, dy, residual, numbers, _, _ = arguments
    first = passes(x[:1], dy[:1], residual[:1], [t[:1] for t in numbers], None, 3)
    assert all(torch.equal(a[:1], b) for a, b in zip(results[0], first))


@pytest.mark.parametrize("shape", [(3, 7, 1), (2, 7, 5)], ids=str)
def test_opcheck(shape):
    for with_lengths in (False, True):
        x, dy, residual, numbers, lengths = make(shape, torch.float32, with_lengths)
        center, scale, shift, p, q = numbers
        for data, r in ((x, residual), (x.mT.contiguous().mT, None), (x[:1].expand(shape), x)):
            affine = (center, scale, shift, r, lengths, 3)
            torch.library.opcheck(ops.channel_moments.default, (data, lengths))
            torch.library.opcheck(ops.channel_affine.default, (data, *affine))
            back = (dy[:, :1].expand(shape), data, *affine)
            torch.library.opcheck(ops.channel_reduce.default, back)
            for needs in ((True, True), (False, True), (True, False)):
                torch.library.opcheck(ops.channel_gradient.default, (*back, p, q, *needs))


# ---- the engine --------------------------------------------------------------------------------------


def _instance(mean, var, scale, shift):
    return mean, torch.rsqrt(var + 0.1) * scale, shift


@pytest.mark.parametrize("channels", [False, True])
@pytest.mark.parametrize("last", [False, True])
def test_engine_gradients(last, channels):
    x, r = (randn(2, 3, 4, dtype=torch.float64) for _ in range(2))
    if last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    shape = (2, 4) if channels else (2, 3)
    s, t = (randn(*shape, dtype=torch.float64, grad=True) for _ in range(2))
    lengths = None if channels else torch.tensor([4, 2], device=DEVICE)

    def f(x, r, s, t):
        options = {"residual": r, "lengths": lengths, "channels": channels}
        return channel_norm(x, _instance, (s, t), activation=3, **options)[0]

    inputs = (x.requires_grad_(), r.requires_grad_(), s, t)
    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs)
    both = lambda x: moments(x, lengths=lengths, channels=channels)
    assert torch.autograd.gradcheck(both, (x,))
    assert torch.autograd.gradgradcheck(both, (x,))


def test_engine_compiles():
    def f(x, s, t, mean, var):
        y = channel_norm(x, _instance, (s, t), activation=1)[0]
        y = channel_norm(y, _stored, (mean, var, s), moments=False, batch=True)[0]
        return y + moments(y)[0][..., None]

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in (5, 7):
        tensors = (randn(3, 4, size, grad=True), *(randn(3, 4, grad=True) for _ in range(2)))
        tensors += (randn(4), randn(4).square())
        a, b = compiled(*tensors), f(*tensors)
        torch.testing.assert_close(a, b)
        g = torch.randn_like(a)
        got, expected = (torch.autograd.grad(y, tensors[:3], g) for y in (a, b))
        torch.testing.assert_close(got, expected)


def _stored(_mean, _var, mean, var, scale):
    return mean, torch.rsqrt(var + 0.1) * scale.mean(0), mean
