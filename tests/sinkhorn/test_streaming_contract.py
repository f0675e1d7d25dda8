"""Core streaming as an op: its arguments, compilation, transforms, and any shape, cost and dtype."""

import pytest
import torch
from helpers import DEVICE, DTYPES
from hypothesis import given
from hypothesis import strategies as st
from sinkhorn_problems import clouds

import solera
from solera.sinkhorn import sinkhorn_points, streaming
from solera.sinkhorn.streaming_apply import COSTS

NAMES = [*COSTS, "cosine"]


def test_bad_arguments():
    x, y, a, b = clouds(4, 5, 2)
    ok = {"epsilon": 0.1}
    for match, arguments, options in (
        ("y: expected the batch and the dimension of x", (x, y[:, :1]), ok),
        ("y: expected torch.float64", (x, y.float()), ok),
        (r"a: expected shape \(4,\)", (x, y, a[:3]), ok),
        ("x: expected at least one point", (x[:0], y), ok),
        ("cost: expected one of", (x, y), {"cost": "chebyshev", **ok}),
        ("epsilon: expected a number > 0", (x, y), {"epsilon": 0.0}),
        ("momentum: expected a number in", (x, y), {"momentum": 2.0, **ok}),
        ("reach: expected a number > 0", (x, y), {"reach": -1.0, **ok}),
        ("epsilon_scaling: expected a ratio", (x, y), {"epsilon_scaling": (1.0, 2.0), **ok}),
        ("epsilon_scaling: expected None", (x, y), {"epsilon_scaling": "auto", **ok}),
        (
            "epsilon_scaling: reaches epsilon=0.1 in",
            (x, y),
            {"epsilon_scaling": (1.0, 1 - 1e-16), **ok},
        ),
        ("gradient: expected one of", (x, y), {"gradient": "envelope", **ok}),
        ("max_iterations: expected at least 1", (x, y), {"max_iterations": 0, **ok}),
        ("init: expected None, a pair", (x, y), {"init": 3, **ok}),
        (r"init\[1\]: expected shape", (x, y), {"init": (a, a), **ok}),
        ("a, b: expected equal totals, got 1 and 2; reach=", (x, y, a, 2 * b), ok),
    ):
        with pytest.raises((ValueError, TypeError), match=match):
            sinkhorn_points(*arguments, **options)
    with pytest.raises(ValueError, match="v: expected shape"):
        sinkhorn_points(x, y, **ok).apply(a)


@pytest.mark.no_interpreter
def test_opcheck():
    x, y, a, b = clouds(7, 6, 3, 2)
    f, g, v = torch.zeros_like(a), torch.zeros_like(b), torch.rand(2, 6, 1, dtype=torch.float64)
    v = v.to(DEVICE)
    op = torch.ops.solera
    moved = x.mT.contiguous().mT, y[:1].expand(2, 6, 3)
    rest = (0, [1.0, 0.3], -1.0, 0.5, 1.0, 3, 1e-3, 1)
    torch.library.opcheck(op.sinkhorn_points.default, (*moved, a, b, None, g, *rest))
    torch.library.opcheck(op.sinkhorn_points_symmetric.default, (x, None, a, None, 3, [0.3], -1.0))
    torch.library.opcheck(op.sinkhorn_points_softmin.default, (*moved, g, b, 2, 0.3))
    for power, signs, cost in ((0, False, 0), (1, False, 2), (-1, False, 3), (0, True, 4)):
        torch.library.opcheck(
            op.sinkhorn_points_apply.default, (*moved, f, g, v, cost, 0.3, power, signs)
        )


def test_compile_and_transforms(monkeypatch):
    # The value's gradient needs none of the steps that the compiler would unroll.
    monkeypatch.setattr(streaming, "_COMPILED_CG_STEPS", 2)
    x, y, a, b = clouds(6, 5, 2)

    def loss(x, y, a, b):
        r = sinkhorn_points(x, y, a, b, epsilon=0.2, max_iterations=20)
        return r.cost + r.marginal_error

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(compiled(leaf, y, a, b), loss(x, y, a, b))
    (grad,) = torch.autograd.grad(compiled(leaf, y, a, b), leaf)
    assert torch.isfinite(grad).all()

    def value(x):
        return sinkhorn_points(x, y, a, b, epsilon=0.2, max_iterations=200).cost

    (want,) = torch.autograd.grad(value(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(value)(x), want, rtol=1e-5, atol=1e-8)
    both = torch.func.vmap(value)(torch.stack((x, 2 * x)))
    torch.testing.assert_close(both, torch.stack((value(x), value(2 * x))))
    _, tangent = torch.func.jvp(value, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, want.sum(), rtol=1e-5, atol=1e-8)


@pytest.mark.no_interpreter
@given(
    n=st.integers(1, 40),
    m=st.integers(1, 40),
    d=st.integers(1, 12),
    name=st.sampled_from(NAMES),
    dtype=st.sampled_from(DTYPES),
    epsilon=st.sampled_from([1e-2, 0.3, 10.0]),
    zeros=st.booleans(),
)
def test_any_shape_cost_and_dtype(n, m, d, name, dtype, epsilon, zeros):
    x, y, a, b = clouds(n, m, d, dtype=dtype, zeros=zeros)
    r = sinkhorn_points(x, y, a, b, cost=name, epsilon=epsilon, max_iterations=2, validate=False)
    with solera.backend("reference"):
        wide = [t.double() for t in (x, y, a, b)]
        q = sinkhorn_points(*wide, cost=name, epsilon=epsilon, max_iterations=2, validate=False)
    unit = 1e-12 if dtype == torch.float64 else 2e-5
    for u, v in ((r.f, q.f), (r.g, q.g), (r.cost, q.cost)):
        torch.testing.assert_close(u.double(), v, rtol=0, atol=unit * max(1.0, epsilon))
