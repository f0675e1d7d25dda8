"""What a function of tensors over a core is held to: its formula in float64, its gradients, torch's contract."""

import torch
from functorch.compile import make_boxed_func
from helpers import DEVICE, INTERPRETED, SLACK, ULP, double, randn, relative_error
from torch._dynamo.backends.common import aot_autograd


def outputs_of(function, tensors):
    out = function(*tensors)
    return (out,) if isinstance(out, torch.Tensor) else tuple(out)


def with_gradients(function, tensors, grads):
    """The outputs, then the gradients of those of `tensors` that require one."""
    out = outputs_of(function, tensors)
    wanted = [t for t in tensors if t is not None and t.requires_grad]
    grads = [g.to(o.dtype) for o, g in zip(out, grads)]
    return *out, *torch.autograd.grad(out, wanted, grads)


def agrees_with_formula(function, formula, tensors, allowed=0.0):
    """Outputs and gradients against the formula in float64: within twice eager's error, one ulp, or `allowed`."""
    with torch.no_grad():
        grads = [randn(*o.shape, dtype=o.dtype) for o in outputs_of(formula, tensors)]
    ours = with_gradients(function, tensors, grads)
    today = with_gradients(formula, tensors, grads)
    truth = with_gradients(formula, double_floats(tensors), [g.double() for g in grads])
    assert len(ours) == len(truth)
    for i, (a, b, c) in enumerate(zip(ours, today, truth)):
        if a.dtype == torch.float64:  # the formula itself is no more exact than what is tested
            limit = 1e-10
        else:
            limit = SLACK * max(allowed, ULP[a.dtype], 2 * relative_error(b, c))
        error = relative_error(a, c)
        assert error <= limit, f"value {i}: relative error {error:.3g}, allowed {limit:.3g}"
    return ours


def double_floats(tensors):
    return [t if t is None or not t.is_floating_point() else double(t) for t in tensors]


def differentiates(function, tensors):
    """First and second derivatives of float64 copies against finite differences."""
    tensors = double_floats(tensors)
    assert torch.autograd.gradcheck(function, tensors, fast_mode=INTERPRETED)
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=INTERPRETED)


def compiles(function, make, backend="aot_eager", **tolerances):
    """One graph for any size, with the eager values and gradients."""
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)
    for size in (4, 6):
        tensors = make(size)
        with torch.no_grad():
            grads = [randn(*o.shape) for o in outputs_of(function, tensors)]
        got = with_gradients(compiled, tensors, grads)
        want = with_gradients(function, tensors, grads)
        torch.testing.assert_close(got, want, **tolerances)


def ops_in_graph(function, tensors):
    """The names of Solera's ops in the one graph that torch.compile makes of a scalar function and its backward."""
    found = set()

    def note(graph, _):
        targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        found.update(t.split(".")[1] for t in targets if t.startswith("solera."))
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=note, bw_compiler=note)
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)
    wanted = [t for t in tensors if t.requires_grad]
    torch.autograd.grad(compiled(*tensors), wanted)
    return found


def works_under_torch_func(function, tensors):
    """torch.func.grad as autograd, and jvp as a finite difference, in the first tensor."""
    x, *rest = double_floats(tensors)
    rest = [t if t is None else t.detach() for t in rest]
    leaf = x.detach().requires_grad_()
    scalar = lambda x: sum(o.square().sum() for o in outputs_of(function, (x, *rest)))
    got = torch.func.grad(scalar)(x.detach())
    torch.testing.assert_close(got, torch.autograd.grad(scalar(leaf), leaf)[0])
    direction, h = torch.randn_like(x), 1e-6
    _, tangent = torch.func.jvp(scalar, (x.detach(),), (direction,))
    with torch.no_grad():
        numeric = (scalar(x + h * direction) - scalar(x - h * direction)) / (2 * h)
    torch.testing.assert_close(tangent, numeric, rtol=1e-5, atol=1e-7)


def images(*shape, dtype=torch.float32, grad=True, last=False, mean=0.5):
    """Random (N, C, *), channels-last if asked."""
    t = randn(*shape, dtype=dtype) + mean
    if last:
        t = t.movedim(1, -1).contiguous().movedim(-1, 1)
    return t.to(DEVICE).requires_grad_(grad)
