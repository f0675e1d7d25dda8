"""P v and P^T v a block of the plan at a time: the whole plan's values and gradients, and nothing of its size."""

from dataclasses import replace

import pytest
import torch
from helpers import DEVICE, INTERPRETED, relative_error
from sinkhorn_problems import problem

import solera
from solera.sinkhorn import plan_apply, sinkhorn
from solera.sinkhorn.plan_apply import plan_apply as apply_plan

EPSILON = 0.3
ITERATIONS = 10 if INTERPRETED else 60


def blocks_of(monkeypatch, elements):
    """Plans of any size go by blocks of so many elements; None: no plan does."""
    for name in ("WHOLE", "DEVICE_WHOLE"):
        monkeypatch.setattr(plan_apply, name, 0 if elements else 2**60)
    for name in ("BLOCK", "DEVICE_BLOCK"):
        monkeypatch.setattr(plan_apply, name, elements or 2**60)
    monkeypatch.setattr(plan_apply, "ROWS", 1)


def vectors(batch, k, dtype, layout):
    lead, d = {"vector": ((), ()), "matrix": ((), (3,)), "batch": (batch, (3,))}[layout]
    v = torch.randn(*lead, k, *d, dtype=torch.float64)
    return v.to(device=DEVICE, dtype=dtype).requires_grad_()


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """The most elements of any tensor that an operation gave, and how often it was that many."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = (*args, *(kwargs or {}).values())
        old = {t.untyped_storage().data_ptr() for t in given if isinstance(t, torch.Tensor)}
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in old:
                self.sizes.append(t.numel())
        return out


@pytest.mark.parametrize("transposed", [False, True], ids=["P v", "P^T v"])
@pytest.mark.parametrize("layout", ["batch"] if INTERPRETED else ["vector", "matrix", "batch"])
@pytest.mark.parametrize("block", [60] if INTERPRETED else [7, 40, 130, 1000], ids=str)
@pytest.mark.parametrize("batch", [(2,)] if INTERPRETED else [(), (5,), (2, 2)], ids=str)
def test_values_and_gradients_are_those_of_the_whole_plan(
    monkeypatch, batch, block, layout, transposed
):
    """A row at a time, some rows, some problems, all: with zero weights and a forbidden pair."""
    cost, a, b = problem(*batch, 9, 11, dtype=torch.float64, zeros=True)
    cost[..., 2, 3] = torch.inf
    leaves = [t.requires_grad_() for t in (cost, a, b)]
    r = sinkhorn(*leaves, epsilon=EPSILON, max_iterations=ITERATIONS)
    v = vectors(batch, 9 if transposed else 11, torch.float64, layout)
    call = r.apply_transposed if transposed else r.apply
    found = []
    for elements in (None, block):
        blocks_of(monkeypatch, elements)
        out = call(v)
        with torch.no_grad():
            assert torch.equal(call(v), out)
        grad = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=DEVICE).view_as(out)
        inputs = (v, r.f, r.g, *leaves)
        first = torch.autograd.grad(out, inputs, grad, retain_graph=True)
        some = torch.autograd.grad(out, (v, cost), grad, retain_graph=True)
        again = torch.autograd.grad(out, inputs, grad, create_graph=True)
        (second,) = torch.autograd.grad(again[0].square().sum(), cost, retain_graph=True)
        found.append((out, *first, *some, *again, second))
    for want, got in zip(*found):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["P v", "P^T v"])
def test_accuracy_and_precisions(monkeypatch, dtype, transposed):
    cost, a, b = problem(3, 20, 13)
    cost = cost.to(dtype).requires_grad_()
    r = sinkhorn(cost, a, b, epsilon=EPSILON, max_iterations=ITERATIONS, gradient="none")
    tensors = [t.requires_grad_() for t in (*r._problem, r.f.detach(), r.g.detach())]
    v = vectors((3,), 20 if transposed else 13, torch.float32, "batch")
    wide = [t.detach().double().requires_grad_() for t in (*tensors, v)]
    blocks_of(monkeypatch, None)
    want = apply_plan(*wide, EPSILON, transposed=transposed)
    blocks_of(monkeypatch, 60)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        got = apply_plan(*tensors, v, EPSILON, transposed=transposed)
    assert got.dtype == torch.float32 and relative_error(got, want) < 1e-6
    grad = torch.randn_like(got)
    slopes = torch.autograd.grad(got, (*tensors, v), grad)
    for x, y in zip(slopes, torch.autograd.grad(want, wide, grad.double())):
        assert x.dtype == torch.float32 and relative_error(x, y) < 5e-6
    with solera.backend("reference"):
        other = apply_plan(*tensors, v, EPSILON, transposed=transposed)
        torch.testing.assert_close(other, got)
        torch.testing.assert_close(torch.autograd.grad(other, (*tensors, v), grad), slopes)


@pytest.mark.parametrize("transposed", [False, True], ids=["P v", "P^T v"])
def test_padding_is_not_read(monkeypatch, transposed):
    cost, *_ = problem(4, 9, 11, dtype=torch.float64)
    cost[1, 5:], cost[1, :, 2:] = torch.nan, torch.nan
    cost.requires_grad_()
    limits = torch.tensor([9, 5, 0, 2], device=DEVICE), torch.tensor([11, 2, 3, 0], device=DEVICE)
    r = sinkhorn(cost, epsilon=EPSILON, max_iterations=ITERATIONS, lengths=limits)
    v = torch.randn(4, 9 if transposed else 11, 2, dtype=torch.float64, device=DEVICE)
    v[1, 5:] = torch.nan
    v.requires_grad_()
    call = r.apply_transposed if transposed else r.apply
    found = []
    for elements in (None, 30):
        blocks_of(monkeypatch, elements)
        out = call(v)
        assert out.isfinite().all()
        found.append((out, *torch.autograd.grad(out.square().sum(), (v, cost), retain_graph=True)))
    for want, got in zip(*found):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


def test_weights_too_small_to_divide_by(monkeypatch):
    """Their gradients are still sums of the density, not 0 / 0."""
    tensors = [*problem(1, 6, 7), torch.randn(1, 6), torch.randn(1, 7)]
    tensors = [t.to(DEVICE) for t in tensors]
    tensors[1][0, :3] = torch.tensor([0.0, 1e-40, 1e-35], device=DEVICE)
    tensors[2][0, :3] = torch.tensor([0.0, 1e-41, 1e-34], device=DEVICE)
    tensors = [t.requires_grad_() for t in tensors]
    v = torch.randn(1, 7, 2, device=DEVICE)
    found = []
    for elements in (None, 21):
        blocks_of(monkeypatch, elements)
        out = apply_plan(*tensors, v, EPSILON)
        found.append((out, *torch.autograd.grad(out.sum(), tensors)))
    for want, got in zip(*found):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("transposed", [False, True], ids=["P v", "P^T v"])
def test_nothing_of_the_plans_size_is_made_or_saved(monkeypatch, transposed):
    """But the gradient of the cost, where it is asked for: one tensor."""
    n, m, block = 60, 50, 500
    blocks_of(monkeypatch, block)
    cost, a, b = problem(n, m)
    r = sinkhorn(cost, a, b, epsilon=EPSILON, max_iterations=2)
    potentials = [t.detach().requires_grad_() for t in (r.f, r.g)]
    v = torch.randn(n if transposed else m, 4, device=DEVICE, requires_grad=True)
    for with_cost in (False, True):
        problem_of = r._problem
        if with_cost:
            problem_of = tuple(t.detach().requires_grad_() for t in problem_of)
        leaf = replace(r, f=potentials[0], g=potentials[1], _problem=problem_of)
        inputs = [v, *potentials, *(problem_of if with_cost else ())]
        saved = []
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda t: saved.append(t) or t, lambda t: t
        )
        with Largest() as seen, hooks:
            out = (leaf.apply_transposed if transposed else leaf.apply)(v)
            torch.autograd.grad(out.sum(), inputs)
        large = [size for size in seen.sizes if size > block]
        assert large == ([n * m] if with_cost else [])
        assert all(t.data_ptr() == problem_of[0].data_ptr() for t in saved if t.numel() > block)
    with Largest() as seen, torch.no_grad():
        (r.apply_transposed if transposed else r.apply)(v)
    assert 0 < max(seen.sizes) <= block


@pytest.mark.no_interpreter
def test_transforms_and_batches_of_gradients(monkeypatch):
    blocks_of(monkeypatch, 20)
    cost, a, b = problem(6, 5, dtype=torch.float64)
    r = sinkhorn(cost.requires_grad_(), a, b, epsilon=EPSILON)
    v = torch.randn(3, 5, 2, dtype=torch.float64, device=DEVICE)
    torch.testing.assert_close(torch.func.vmap(r.apply)(v), torch.stack([r.apply(x) for x in v]))
    leaf = v[0].clone().requires_grad_()
    out = r.apply(leaf)
    grads = torch.randn(3, *out.shape, dtype=torch.float64, device=DEVICE)
    options = {"retain_graph": True}
    got = torch.autograd.grad(out, (leaf, cost), grads, is_grads_batched=True, **options)
    each = [torch.autograd.grad(out, (leaf, cost), g, **options) for g in grads]
    for x, y in zip(got, zip(*each)):
        torch.testing.assert_close(x, torch.stack(y))
