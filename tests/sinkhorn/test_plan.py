"""Core plan: the plan of given potentials and its gradient, against the formula in float64."""

import pytest
import torch
from helpers import DEVICE, INTERPRETED, relative_error
from sinkhorn_problems import problem

import solera
from solera.sinkhorn.plan import plan_reference, transport_plan

ops = torch.ops.solera
EPSILON = 0.2
SHAPES = [(1, 1, 1), (2, 1, 9), (2, 9, 1), (3, 33, 20), (1, 70, 130)]


def inputs(batch, n, m, dtype=torch.float64, grad=False):
    cost, a, b = problem(batch, n, m)
    f, g = torch.randn(batch, n, device=DEVICE) / 4, torch.randn(batch, m, device=DEVICE) / 4
    return [t.to(dtype).requires_grad_(grad) for t in (cost, a, b, f, g)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape, dtype):
    tensors = inputs(*shape, dtype=dtype)
    x, y = torch.randn_like(tensors[1]), torch.randn_like(tensors[2])
    allowed = 10 * torch.finfo(dtype).eps
    for extra in ((tensors[1], None), (x, y)):
        wide = [t if t is None else t.double() for t in (*tensors, *extra)]
        got = ops.sinkhorn_plan(*tensors, *extra, EPSILON)
        assert got.dtype == dtype
        assert relative_error(got, plan_reference(*wide, EPSILON)) < allowed


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_against_autograd_of_the_formula(shape, dtype):
    tensors = inputs(*shape, dtype=dtype, grad=True)
    wide = [t.detach().double().requires_grad_() for t in tensors]
    grad = torch.randn(shape, device=DEVICE)
    got = torch.autograd.grad(transport_plan(*tensors, EPSILON), tensors, grad.to(dtype))
    plan = plan_reference(*wide, wide[1], None, EPSILON)
    want = torch.autograd.grad(plan, wide, grad.double())
    for name, x, y in zip("cost a b f g".split(), got, want):
        assert x.dtype == dtype and x.shape == y.shape
        assert relative_error(x, y) < 50 * torch.finfo(dtype).eps, name


def test_gradcheck_and_gradgradcheck():
    def f(*tensors):
        return transport_plan(*tensors, EPSILON)

    tensors = inputs(2, 3, 4, grad=True)
    assert torch.autograd.gradcheck(f, tensors, fast_mode=INTERPRETED)
    assert torch.autograd.gradgradcheck(f, tensors, fast_mode=INTERPRETED)


def test_same_bits_in_any_batch_and_the_reference_agrees():
    tensors = inputs(4, 20, 37, dtype=torch.float32)
    plan = transport_plan(*tensors, EPSILON)
    alone = transport_plan(*(t[1:3] for t in tensors), EPSILON)
    assert torch.equal(alone, plan[1:3])
    with solera.backend("reference"):
        torch.testing.assert_close(transport_plan(*tensors, EPSILON), plan)


def test_exponents_past_the_range():
    """A forbidden pair is 0; a zero weight stays 0 whatever the exponent; a NaN shows."""
    cost, a, b, f, g = inputs(1, 5, 6, dtype=torch.float32)
    cost[0, 1, 2] = torch.inf
    cost[0, 3, 4] = torch.nan
    a[0, 0] = 0
    f[0, 0] = 1e6
    plan = transport_plan(cost, a, b, f, g, EPSILON)
    assert plan[0, 1, 2] == 0 and not plan[0, 0].any()
    assert plan.isnan().sum() == 1 and plan[0, 3, 4].isnan()
