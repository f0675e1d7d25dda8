"""grad_scale: the identity with a scaled gradient."""

import pytest
import torch
from helpers import DEVICE, DTYPES, randn
from hypothesis import given
from hypothesis import strategies as st

import solera
from solera.norm import embedding_shrink, grad_scale


@given(
    shape=st.lists(st.integers(0, 4), min_size=1, max_size=3),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([0.0, 0.1, -1.0, 3.0]),
)
def test_same_bits_forward_and_scaled_gradient(shape, dtype, scale):
    x = randn(*shape, dtype=dtype, grad=True)
    y = grad_scale(x, scale)
    assert torch.equal(y, x)
    g = randn(*shape, dtype=dtype)
    (dx,) = torch.autograd.grad(y, x, g)
    assert torch.equal(dx, g * scale) and dx.dtype == dtype


def test_embedding_shrink_is_the_papers_mixture():
    e = randn(5, 8, dtype=torch.float64, grad=True)
    g = randn(5, 8, dtype=torch.float64)
    want = 0.1 * e + 0.9 * e.detach()
    torch.testing.assert_close(embedding_shrink(e), want)
    torch.testing.assert_close(
        torch.autograd.grad(embedding_shrink(e, 0.1), e, g), torch.autograd.grad(want, e, g)
    )


def test_second_derivatives():
    """f(grad_scale(x, a)): the first derivative is a f', the second a f'' a, as of the mixture."""
    x = randn(4, dtype=torch.float64, grad=True)
    results = []
    for scaled in (lambda x: grad_scale(x, 0.3), lambda x: 0.3 * x + 0.7 * x.detach()):
        (dx,) = torch.autograd.grad(scaled(x).pow(3).sum(), x, create_graph=True)
        (ddx,) = torch.autograd.grad(dx.sum(), x)
        results.append((dx, ddx))
    torch.testing.assert_close(results[0][0], 0.3 * 3 * x**2)
    torch.testing.assert_close(results[0][1], 0.3 * 6 * x * 0.3)
    torch.testing.assert_close(results[0], results[1])


def test_compile_and_torch_func():
    f = lambda x: (grad_scale(x * 2, 0.5) ** 2).sum()
    x = randn(6, grad=True)
    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(x), x), torch.autograd.grad(f(x), x))
    (want,) = torch.autograd.grad(f(x), x)
    torch.testing.assert_close(torch.func.grad(f)(x.detach()), want)
    rows = randn(3, 6)
    assert torch.equal(torch.func.vmap(lambda r: grad_scale(r, 0.5))(rows), rows)
    _, tangent = torch.func.jvp(lambda x: grad_scale(x, 0.5), (rows,), (torch.ones_like(rows),))
    assert torch.equal(tangent, torch.full_like(rows, 0.5))
    with solera.backend("reference"):
        torch.testing.assert_close(torch.autograd.grad(f(x), x), (want,))


def test_without_gradient_and_in_place_use():
    x = randn(3)
    y = grad_scale(x, 0.5)
    assert not y.requires_grad and y.data_ptr() == x.data_ptr()


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: grad_scale([1.0], 0.5), TypeError, "x: expected a torch.Tensor, got list"),
        (lambda: grad_scale(torch.ones(2, device=DEVICE).int(), 0.5), TypeError, "x: expected f"),
        (lambda: grad_scale(torch.ones(2, device=DEVICE), "a"), TypeError, "scale: expected a num"),
        (lambda: grad_scale(torch.ones(2, device=DEVICE), float("nan")), ValueError, "scale: exp"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
