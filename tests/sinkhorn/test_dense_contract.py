"""Core dense: its contract with torch (opcheck, compile, torch.func, autocast, copies) and bad input."""

import copy
import importlib
import math
import pickle
import warnings

import pytest
import torch
from functorch.compile import make_boxed_func
from helpers import DEVICE
from hypothesis import given
from hypothesis import strategies as st
from sinkhorn_problems import problem
from torch._dynamo.backends.common import aot_autograd

import solera
from solera.sinkhorn import SinkhornResult, sinkhorn

ops = torch.ops.solera
INF = math.inf


def test_opcheck():
    cost, a, b = problem(3, 6, 5)
    views = (cost, cost.transpose(0, 1).contiguous().transpose(0, 1), cost[:1].expand(3, 6, 5))
    for c in views:
        for init in ((None, None), (torch.rand_like(a), torch.rand_like(b))):
            args = (c, a, b, *init, 0.1, 5, 1e-3, 2)
            torch.library.opcheck(ops.sinkhorn_dense.default, args)
        f, g = ops.sinkhorn_dense(c, a, b, None, None, 0.1, 5, 0.0, 10)[:2]
        for y in (None, b):
            torch.library.opcheck(ops.sinkhorn_plan.default, (c, a, b, f, g, a, y, 0.1))
        for grad in (c, torch.ones((), device=DEVICE).expand(3, 6, 5)):
            args = (grad, c, a, b, f, g, 0.1)
            torch.library.opcheck(ops.sinkhorn_plan_backward.default, args)


def compiled_matches(backend):
    def f(cost, a, b):
        r = sinkhorn(cost * 2, a.softmax(-1), b.softmax(-1), epsilon=0.3, tolerance=1e-3)
        return r, r.plan(), r.cost.sum() + r.transport_cost().sum() + r.f.sin().sum()

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend=backend)
    for shape in ((2, 4, 6), (3, 7, 5)):
        tensors = [t.requires_grad_() for t in problem(*shape)]
        want, got = f(*tensors), compiled(*tensors)
        assert isinstance(got[0], SinkhornResult)
        torch.testing.assert_close(got[1], want[1])
        for name in ("f", "g", "cost", "iterations", "marginal_error", "converged"):
            torch.testing.assert_close(getattr(got[0], name), getattr(want[0], name))
        torch.testing.assert_close(
            torch.autograd.grad(got[2], tensors), torch.autograd.grad(want[2], tensors)
        )


@pytest.mark.inductor
@pytest.mark.no_interpreter
def test_compile_inductor():
    compiled_matches("inductor")


def backward_targets(loss):
    """What the backward graph of a compiled loss calls, and its gradients to cost, a and b."""
    graphs = []

    def keep(module, _):
        graphs.append([str(n.target) for n in module.graph.nodes if n.op == "call_function"])
        return make_boxed_func(module.forward)

    tensors = [t.requires_grad_() for t in problem(2, 4, 6)]
    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    compiled = torch.compile(
        lambda *args: loss(sinkhorn(*args, epsilon=0.3, max_iterations=20)),
        fullgraph=True,
        backend=backend,
    )
    got = torch.autograd.grad(compiled(*tensors), tensors)
    want = loss(sinkhorn(*tensors, epsilon=0.3, max_iterations=20))
    torch.testing.assert_close(got, torch.autograd.grad(want, tensors))
    assert len(graphs) == 2
    return " ".join(graphs[1])


def test_compiled_loss_on_the_cost_alone_solves_nothing_in_backward():
    targets = backward_targets(lambda r: r.cost.sum())
    assert "sinkhorn_plan" in targets
    assert "cholesky" not in targets and "linalg" not in targets and "bmm" not in targets
    assert "cholesky" in backward_targets(lambda r: r.cost.sum() + r.f.square().sum())


def test_eager_loss_on_the_cost_alone_solves_nothing_in_backward(monkeypatch):
    def refuse(*_):
        raise AssertionError("the adjoint system was solved")

    monkeypatch.setattr(importlib.import_module("solera.sinkhorn.dense"), "adjoint", refuse)
    tensors = [t.requires_grad_() for t in problem(5, 4)]
    torch.autograd.grad(sinkhorn(*tensors, epsilon=0.3).cost, tensors)
    with pytest.raises(AssertionError, match="was solved"):
        torch.autograd.grad(sinkhorn(*tensors, epsilon=0.3).f.sum(), tensors)


def test_torch_func():
    cost, a, b = problem(2, 4, 5, dtype=torch.float64)
    options = {"epsilon": 0.5, "max_iterations": 100}
    value = lambda c, a, b: sinkhorn(c, a, b, **options).transport_cost()
    x = cost.clone().requires_grad_()
    want = torch.autograd.grad(value(x, a, b).sum(), x)[0]
    each = torch.func.vmap(torch.func.grad(value))(cost, a, b)
    torch.testing.assert_close(each, want)
    torch.testing.assert_close(torch.func.vmap(value)(cost, a, b), value(cost, a, b))
    _, tangent = torch.func.jvp(
        lambda c: value(c, a[0], b[0]), (cost[0],), (a[0][:, None] * cost[0],)
    )
    torch.testing.assert_close(tangent, (want[0] * a[0][:, None] * cost[0]).sum())


def test_backend_switch_and_autocast():
    cost, a, b = (t.requires_grad_() for t in problem(9, 7))
    run = lambda: sinkhorn(cost, a, b, epsilon=0.1, max_iterations=40)
    r = run()
    with solera.backend("reference"):
        q = run()
        slow = torch.autograd.grad(q.plan().square().sum() + q.cost, (cost, a, b))
    torch.testing.assert_close(q.plan(), r.plan())
    fast = torch.autograd.grad(r.plan().square().sum() + r.cost, (cost, a, b))
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        t = run()
        assert t.f.dtype == torch.float32
        assert torch.equal(t.plan(), r.plan())
        half = sinkhorn(cost.bfloat16(), epsilon=0.1)
        assert half.f.dtype == torch.float32


def test_result_is_a_pytree_and_copies():
    cost, a, b = problem(2, 4, 5)
    r = sinkhorn(cost, a, b, epsilon=0.1)
    leaves, spec = torch.utils._pytree.tree_flatten(r)
    assert len(leaves) == 9
    back = torch.utils._pytree.tree_unflatten(leaves, spec)
    double = torch.utils._pytree.tree_map(lambda t: t.double() if t.is_floating_point() else t, r)
    for other in (back, copy.deepcopy(r), pickle.loads(pickle.dumps(r))):
        assert torch.equal(other.plan(), r.plan())
    torch.testing.assert_close(double.plan().float(), r.plan())


# ---- bad input ---------------------------------------------------------------------------------------

C = torch.rand(2, 3, 4, device=DEVICE)
W = torch.full((2, 3), 1 / 3, device=DEVICE)
BAD = [
    (lambda: sinkhorn([[1.0]], epsilon=1), TypeError, "cost: expected a torch.Tensor, got list"),
    (lambda: sinkhorn(C.int(), epsilon=1), TypeError, "cost: expected float32.*int32"),
    (lambda: sinkhorn(C[0, 0], epsilon=1), ValueError, r"cost: expected at least 2 dim.*\(4,\)"),
    (lambda: sinkhorn(C[:, :0], epsilon=1), ValueError, r"cost: expected at least one row.*0, 4"),
    (lambda: sinkhorn(C[..., :0], epsilon=1), ValueError, "cost: expected at least one row"),
    (lambda: sinkhorn(C), TypeError, "epsilon"),
    (lambda: sinkhorn(C, epsilon=0.0), ValueError, "epsilon: expected a number > 0, got 0.0"),
    (lambda: sinkhorn(C, epsilon=-1), ValueError, "epsilon: expected a number > 0"),
    (lambda: sinkhorn(C, epsilon=INF), ValueError, "epsilon: expected a finite number"),
    (lambda: sinkhorn(C, epsilon="1e"), TypeError, "epsilon: expected a number"),
    (lambda: sinkhorn(C, epsilon=1, max_iterations=0), ValueError, "max_iterations: expected at least 1"),
    (lambda: sinkhorn(C, epsilon=1, max_iterations=2.0), TypeError, "max_iterations: expected an int"),
    (lambda: sinkhorn(C, epsilon=1, check_every=0), ValueError, "check_every: expected at least 1"),
    (lambda: sinkhorn(C, epsilon=1, tolerance=-1.0), ValueError, "tolerance: expected a finite number"),
    (lambda: sinkhorn(C, epsilon=1, validate="yes"), ValueError, "validate: expected one of"),
    (lambda: sinkhorn(C, W[:, :2], epsilon=1), ValueError, r"a: expected shape \(2, 3\).*\(2, 2\)"),
    (lambda: sinkhorn(C, W[0, :2], epsilon=1), ValueError, r"a: expected shape \(3,\).*\(2,\)"),
    (lambda: sinkhorn(C, W[:1], epsilon=1), ValueError, r"a: expected shape \(2, 3\).*\(1, 3\)"),
    (lambda: sinkhorn(C, None, W, epsilon=1), ValueError, r"b: expected shape \(2, 4\).*\(2, 3\)"),
    (lambda: sinkhorn(C, W.double(), epsilon=1), TypeError, "a: float64 with cost of torch.float32"),
    (lambda: sinkhorn(C, W.to("meta"), epsilon=1), ValueError, "a: expected device"),
    (lambda: sinkhorn(C, 2 * W, epsilon=1, validate=True), ValueError, "a, b: expected equal totals, got 2 and 1"),
    (lambda: sinkhorn(C, 0 * W, epsilon=1, validate=True), ValueError, "a: expected a positive total"),
    (lambda: sinkhorn(C, -W, epsilon=1, validate=True), ValueError, "a: expected finite weights >= 0"),
    (lambda: sinkhorn(C * math.nan, epsilon=1, validate=True), ValueError, "cost: expected numbers.*NaN"),
    (lambda: sinkhorn(C - INF, epsilon=1, validate=True), ValueError, "cost: expected numbers.*-inf"),
    (lambda: sinkhorn(C + INF, epsilon=1, validate=True), ValueError, "cost: a row with positive weight"),
    (lambda: sinkhorn(C, epsilon=1, init=W), TypeError, "init: expected None, a pair"),
    (lambda: sinkhorn(C, epsilon=1, init=(W, W)), ValueError, r"init\[1\]: expected shape \(2, 4\)"),
    (lambda: sinkhorn(C, epsilon=1, init=(W, None)), TypeError, r"init\[1\]: expected a torch.Tensor"),
]  # fmt: skip


@pytest.mark.parametrize("call, error, match", BAD, ids=[m for _, _, m in BAD])
def test_bad_input(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_differing_totals_without_validation():
    r = sinkhorn(C, 2 * W, epsilon=0.5, validate=False)
    assert not r.converged.any() and torch.isfinite(r.f).all()
    torch.testing.assert_close(r.marginal_error, torch.ones(2, device=DEVICE), atol=1e-3, rtol=0)


@pytest.mark.no_interpreter
def test_the_warning_survives_a_cost_of_nothing_finite():
    for value in (math.nan, INF):
        cost = torch.full((1, 3, 4), value)
        with pytest.warns(UserWarning, match="1 of 1 problems"):
            r = sinkhorn(cost, epsilon=0.1, tolerance=1e-6, validate=False)
        assert not r.converged.any()


def test_totals_that_nearly_agree_are_told_apart():
    third = torch.full((3,), 1 / 3, dtype=torch.float64, device=DEVICE)
    with pytest.raises(ValueError, match=r"got 1\.000001 and 1 "):
        sinkhorn(C.double(), (1 + 1e-6) * third, epsilon=1, validate=True)


ODD = st.one_of(
    st.none(),
    st.floats(),
    st.integers(-2, 3),
    st.sampled_from(["auto", (), (1.0, 2.0), [], {}]),
    st.builds(
        lambda shape, dtype: torch.ones(shape, dtype=dtype, device=DEVICE),
        st.lists(st.integers(0, 3), max_size=3),
        st.sampled_from([torch.float32, torch.float64, torch.int64, torch.bool, torch.bfloat16]),
    ),
)


@given(cost=ODD, a=ODD, b=ODD, epsilon=ODD, iterations=ODD, tolerance=ODD, init=ODD)
def test_any_argument_gives_a_result_or_a_clear_error(
    cost, a, b, epsilon, iterations, tolerance, init
):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            r = sinkhorn(
                cost,
                a,
                b,
                epsilon=epsilon,
                max_iterations=iterations,
                tolerance=tolerance,
                init=init,
            )
        except (ValueError, TypeError) as error:
            assert str(error).split(":")[0].split("[")[0] in (
                "cost", "a", "b", "a, b", "epsilon", "max_iterations", "tolerance", "init",
            )  # fmt: skip
        else:
            assert r.plan().shape == cost.shape
