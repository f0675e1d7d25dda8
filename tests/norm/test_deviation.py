"""Adaptive deviation and gated stream sums against their formulas; NormGrad as a composition."""

import pytest
import torch
from function_checks import (
    agrees_with_formula,
    compiles,
    differentiates,
    images,
    works_under_torch_func,
)
from helpers import DEVICE, DTYPES, randn

import solera
from solera.norm import adaptive_deviation_scale, gated_stream_sum


def deviation(y, skip, weight, bias, log_domain=False, correction=1):
    std = skip.std(tuple(range(1, skip.dim())), correction=correction, keepdim=True)
    phi = (weight * std.log() + bias).exp() if log_domain else weight * std + bias
    return y * phi + skip


def make(shape, dtype=torch.float32, last=False):
    y, skip = images(*shape, dtype=dtype, last=last), images(*shape, dtype=dtype, last=last)
    return y, skip, randn(1, dtype=dtype, grad=True), randn(1, dtype=dtype, grad=True)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("log_domain", [False, True])
def test_adaptive_deviation_scale(log_domain, dtype, last):
    agrees_with_formula(
        lambda *t: adaptive_deviation_scale(*t, log_domain=log_domain),
        lambda *t: deviation(*t, log_domain=log_domain),
        make((2, 5, 4, 3), dtype, last),
        # The scalars' gradients are sums that cancel.
        allowed={torch.bfloat16: 3e-2, torch.float16: 4e-3}.get(dtype, 5e-6),
    )


def test_numbers_and_correction():
    y, skip, *_ = make((2, 5, 4))
    agrees_with_formula(
        lambda y, s: adaptive_deviation_scale(y, s, 1.5, correction=0),
        lambda y, s: deviation(y, s, 1.5, 0.0, correction=0),
        (y, skip),
    )
    empty = adaptive_deviation_scale(y[:0], skip[:0], 1.5)
    assert empty.shape == (0, 5, 4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stacked", [False, True])
def test_gated_stream_sum(stacked, dtype):
    streams = [images(2, 5, 4, 3, dtype=dtype) for _ in range(4)]
    gate = randn(4, 2, 5, dtype=dtype, grad=True)

    def formula(gate, *x):
        total = gate[0][..., None, None] * x[0]
        for g, t in zip(gate[1:], x[1:]):
            total = total + g[..., None, None] * t
        return total

    agrees_with_formula(
        lambda gate, *x: gated_stream_sum(torch.stack(x) if stacked else x, gate),
        formula,
        (gate, *streams),
        # Each stream is added in the streams' dtype, as eager torch does.
        allowed=1.6e-2 if dtype == torch.bfloat16 else 0.0,
    )


def test_differentiates():
    differentiates(adaptive_deviation_scale, make((2, 3, 2)))
    differentiates(lambda g, a, b: gated_stream_sum((a, b), g),
                   (randn(2, 2, 3, grad=True), images(2, 3, 2), images(2, 3, 2)))  # fmt: skip


def test_normgrad_map():
    """NormGrad at a virtual 1x1 identity convolution: the norms over channels of x and its gradient, multiplied."""
    x = images(2, 6, 4, 5)
    (g,) = torch.autograd.grad(x.sin().square().sum(), x)
    saliency = torch.linalg.vector_norm(x, dim=1) * torch.linalg.vector_norm(g, dim=1)
    # The gradient of that convolution's weight at position u is the outer product x_u g_u^T, and the map its norm.
    outer = torch.einsum("nchw,ndhw->nhwcd", x, g)
    torch.testing.assert_close(saliency, torch.linalg.matrix_norm(outer))


def block(y, skip, weight, bias):
    branch = gated_stream_sum((y, skip), torch.stack((y.mean(2), skip.mean(2))))
    return adaptive_deviation_scale(branch, skip, weight, bias)


def test_contract():
    compiles(block, lambda size: make((2, size, 5)))
    works_under_torch_func(block, make((2, 3, 4)))
    tensors = make((2, 3, 4))
    with solera.backend("reference"):
        want = block(*tensors)
    torch.testing.assert_close(block(*tensors), want)


Y, G = torch.ones(2, 3, 4, device=DEVICE), torch.ones(2, 2, 3, device=DEVICE)
BAD = [
    (lambda: adaptive_deviation_scale(G[0], Y, 1.0), ValueError, "y: expected at least 3"),
    (lambda: adaptive_deviation_scale(Y, Y[:1], 1.0), ValueError, "skip: expected shape"),
    (lambda: adaptive_deviation_scale(Y, Y.half(), 1.0), TypeError, "skip: expected torch.float32"),
    (lambda: adaptive_deviation_scale(Y, Y, G), ValueError, "weight: expected one element"),
    (lambda: adaptive_deviation_scale(Y, Y, "a"), TypeError, "weight: expected a number"),
    (lambda: adaptive_deviation_scale(Y, Y, 1.0, correction=2), ValueError, "correction: expected"),
    (lambda: gated_stream_sum([], []), ValueError, "gate: expected one for each stream"),
    (lambda: gated_stream_sum([Y, Y], G[:1]), ValueError, "1 gates for 2 streams"),
    (lambda: gated_stream_sum([Y, Y[:1]], G), ValueError, "x: expected shape"),
    (lambda: gated_stream_sum([Y], G[:1, :1, :2]), ValueError, "gate: expected shape"),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input_is_named(case):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()
