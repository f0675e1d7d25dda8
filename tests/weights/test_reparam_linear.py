"""Core reparam_linear: mixout and masks inside a linear layer, and the module over it."""

import copy
import pickle

import pytest
import torch
from helpers import DEVICE, DTYPES, INTERPRETED, assert_accurate, double, randn
from torch.nn import functional as F

import solera
from solera.nn import MixoutLinear
from solera.weights import masked_linear, masked_weight, mixout, mixout_linear

ops = torch.ops.solera
# N, I, O: whole rows in a tile, chunks of 512 columns, one past 2048 that no chunk divides, one of each.
SHAPES = [(5, 24, 7), (3, 1, 1)]
if not INTERPRETED:
    SHAPES += [(16, 512, 40), (70, 1024, 300), (17, 2100, 33), (130, 700, 130)]
KINDS = ("element", "column", "mask")


def layer(kind):
    """(ours, the composition) of x, weight, second tensor, bias."""
    if kind == "mask":
        return (
            lambda x, w, o, b: masked_linear(x, w, o, 0.1, b),
            lambda x, w, o, b: F.linear(x, masked_weight(w, o, 0.1), b),
        )
    return (
        lambda x, w, o, b: mixout_linear(x, w, o, 0.7, 9, b, mask=kind),
        lambda x, w, o, b: F.linear(x, mixout(w, o, 0.7, 9, mask=kind), b),
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_the_composition(dtype, kind):
    ours_of, theirs_of = layer(kind)
    for n, i, o in SHAPES:
        x = randn(n, i, dtype=dtype, grad=True)
        w, u = (randn(o, i, dtype=dtype, scale=i**-0.5, grad=True) for _ in range(2))
        b, g = randn(o, dtype=dtype, grad=True), randn(n, o, dtype=dtype)
        inputs = (x, w, u, b)

        def run(f, inputs=inputs, g=g):
            y = f(*inputs)
            return y, *torch.autograd.grad(y, inputs, g.to(y.dtype))

        ours, eager = run(ours_of), run(theirs_of)
        truths = run(theirs_of, double(*inputs), g.double())
        for a, b_, c in zip(ours, eager, truths):
            assert a.dtype == dtype
            assert_accurate(a, c, b_)
        with torch.no_grad():
            assert torch.equal(ours_of(*inputs), ours[0])


def test_without_bias_anchor_and_gradients():
    x, w, u = randn(2, 3, 40, grad=True), randn(30, 40, grad=True), randn(30, 40)
    for anchor in (u, None, 0):
        y = mixout_linear(x, w, anchor, 0.5, 3)
        want = F.linear(x, mixout(w, anchor, 0.5, 3))
        torch.testing.assert_close(y, want)
        for wanted in ([x], [w], [x, w]):
            g = torch.ones_like(y)
            got = torch.autograd.grad(y, wanted, g, retain_graph=True)
            torch.testing.assert_close(
                got, torch.autograd.grad(want, wanted, g, retain_graph=True), rtol=1e-5, atol=1e-5
            )
    frozen, score = randn(30, 40), randn(30, 40, grad=True)
    (d,) = torch.autograd.grad(masked_linear(x.detach(), frozen, score, 0.0).sum(), score)
    torch.testing.assert_close(d, x.detach().sum((0, 1)) * frozen)
    assert mixout_linear(x[0, 0], w, u, 0.5, 3).shape == (30,)


@pytest.mark.parametrize("n, i, o", [(0, 5, 4), (3, 0, 4), (3, 5, 0)])
def test_empty(n, i, o):
    x, w, u = randn(n, i, grad=True), randn(o, i, grad=True), randn(o, i, grad=True)
    b = randn(o, grad=True)
    for f in (layer(kind)[0] for kind in KINDS):
        y = f(x, w, u, b)
        torch.testing.assert_close(y, b.detach().expand(n, o) if i == 0 else torch.zeros(n, o))
        dx, dw, du, db = torch.autograd.grad(y.sum(), [x, w, u, b])
        assert not any(t.any() for t in (dx, dw, du)) and torch.equal(db, torch.full_like(b, n))


def test_p_zero_one_and_eval():
    x, w, u, b = randn(6, 20), randn(9, 20), randn(9, 20), randn(9)
    assert torch.equal(mixout_linear(x, w, u, 0.0, 3, b), F.linear(x, w, b))
    assert torch.equal(mixout_linear(x, w, u, 0.9, 3, b, training=False), F.linear(x, w, b))
    torch.testing.assert_close(mixout_linear(x, w, u, 1.0, 3, b), F.linear(x, u, b))


def test_dtypes_together_and_autocast():
    x, w, u = randn(6, 20), randn(9, 20, grad=True), randn(9, 20)
    for half in (torch.bfloat16, torch.float16):
        y = mixout_linear(x.to(half), w, u, 0.5, 3)
        want = F.linear(x.to(half).double(), mixout(w, u, 0.5, 3).double())
        assert y.dtype == half
        assert_accurate(y, want)
        (dw,) = torch.autograd.grad(y.sum(), w)
        assert dw.dtype == torch.float32
    with torch.autocast(DEVICE, torch.bfloat16):
        y = mixout_linear(x, w, u, 0.5, 3)
        assert y.dtype == F.linear(x, w).dtype == torch.bfloat16
        assert mixout_linear(x, w, u, 0.5, 3, training=False).dtype == torch.bfloat16
        assert mixout_linear(x.double(), w.double(), u.double(), 0.5, 3).dtype == torch.float64


@pytest.mark.no_interpreter
@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU the product is torch's")
@pytest.mark.parametrize("kind", KINDS)
def test_same_bits_for_any_thread_count_and_batch(kind):
    f = layer(kind)[0]
    x, w, u = randn(256, 1536, grad=True), randn(300, 1536, grad=True), randn(300, 1536, grad=True)
    b, g = randn(300, grad=True), randn(256, 300)

    def run(rows=256):
        y = f(x[:rows], w, u, b)
        return y, *torch.autograd.grad(y, [x, w, u, b], g[:rows])

    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(run())
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(p, q) for p, q in zip(found[0], other))
    for rows in (1, 7, 100):
        y, dx, *_ = run(rows)
        assert torch.equal(y, found[0][0][:rows])
        assert torch.equal(dx[:rows], found[0][1][:rows])


def test_only_the_inputs_are_kept():
    """No mask, no mixed weight: x, W, U and the seed."""
    x, w, u = randn(4, 60, grad=True), randn(50, 60, grad=True), randn(50, 60)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        mixout_linear(x, w, u, 0.5, 3, randn(50))
    places = {t.data_ptr() for t in kept if t.numel() > 50}
    assert places == {t.data_ptr() for t in (x, w, u)}
    assert sum(t.numel() for t in kept) == x.numel() + 2 * w.numel() + 1 + 50


def test_gradcheck():
    x, b = randn(3, 5, dtype=torch.float64, grad=True), randn(4, dtype=torch.float64, grad=True)
    w, u = (randn(4, 5, dtype=torch.float64, grad=True) for _ in range(2))
    for kind in ("element", "column"):
        assert torch.autograd.gradcheck(layer(kind)[0], (x, w, u, b))
        assert torch.autograd.gradgradcheck(layer(kind)[0], (x, w, u, b))
    masked = lambda x, w, b: masked_linear(x, w, u.detach(), 0.1, b)
    assert torch.autograd.gradcheck(masked, (x, w, b))
    assert torch.autograd.gradgradcheck(masked, (x, w, b))


@pytest.mark.parametrize("form", ["plain", "transposed", "expanded"])
def test_opcheck(form):
    def make(rows, columns):
        if form == "plain":
            return randn(rows, columns)
        return (
            randn(columns, rows).t()
            if form == "transposed"
            else randn(columns).expand(rows, columns)
        )

    seed = torch.tensor(3, device=DEVICE)
    for kind in (0, 1, 2) if form == "plain" else (0,):
        rest = (None if kind == 2 else seed, kind, 0.5, 0)
        x, w, u = make(5, 6), make(4, 6), make(4, 6)
        torch.library.opcheck(ops.reparam_linear.default, (x, w, u, randn(4), *rest))
        torch.library.opcheck(
            ops.reparam_linear_backward.default,
            (make(5, 4), x, w, u, *rest, True, True, True, True),
        )
    args = (make(5, 4), x, w, None, seed, 0, 0.5, 0, False, True, False, False)
    torch.library.opcheck(ops.reparam_linear_backward.default, args)


def test_compile():
    def f(x, w, u, b):
        return mixout_linear(x, w, u, 0.5, 3, b) + masked_linear(x, w, u, 0.2, b)

    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    for n, i in ((4, 6), (5, 9)):
        t = [randn(*s, grad=True) for s in ((2, n, i), (7, i), (7, i), (7,))]
        got, want = compiled(*t), f(*t)
        torch.testing.assert_close(got, want)
        grads = [torch.autograd.grad(y.square().sum(), t) for y in (got, want)]
        torch.testing.assert_close(*grads)


def test_torch_func():
    x, w, u = randn(3, 6), randn(4, 6), randn(4, 6)
    leaf = w.clone().requires_grad_()
    for kind in KINDS:
        f = lambda w, kind=kind: layer(kind)[0](x, w, u, None).square().sum()
        torch.testing.assert_close(torch.func.grad(f)(w), torch.autograd.grad(f(leaf), leaf)[0])
    rows = torch.vmap(lambda x: mixout_linear(x, w, u, 0.5, 3))(x)
    torch.testing.assert_close(rows, mixout_linear(x, w, u, 0.5, 3))


def test_bad_input():
    x, w = randn(3, 4), randn(5, 4)
    cases = [
        (lambda: mixout_linear(x, randn(5, 3), None, 0.5, 1), ValueError, "x: expected 3 features"),
        (lambda: mixout_linear(x, w[0], None, 0.5, 1), ValueError, "weight: expected 2 dim"),
        (lambda: mixout_linear(x, w, w.t(), 0.5, 1), ValueError, "anchor: expected shape"),
        (lambda: mixout_linear(x, w, w, 0.5, 1, randn(4)), ValueError, "bias: expected shape"),
        (
            lambda: mixout_linear(x.double(), w, w, 0.5, 1),
            TypeError,
            "weight: expected torch.float64",
        ),
        (lambda: mixout_linear(x, w, w, -0.5, 1), ValueError, "p: expected"),
        (lambda: mixout_linear(x, w, w, 0.5, "a"), TypeError, "seed: expected"),
        (lambda: masked_linear(x, w, randn(5, 5), 0.5), ValueError, "score: expected shape"),
        (lambda: masked_linear(x, w, None, 0.5), TypeError, "score: expected"),
        (lambda: MixoutLinear(4, 5, p=2), ValueError, "p: expected"),
        (lambda: MixoutLinear(4, 5, anchor=randn(4, 5)), ValueError, "anchor: expected shape"),
        (lambda: MixoutLinear.from_linear(torch.nn.ReLU()), TypeError, "linear: expected"),
    ]
    for call, error, message in cases:
        with pytest.raises(error, match=message):
            call()


# ---- the module --------------------------------------------------------------------------------------


def test_module_is_a_linear_layer():
    linear = torch.nn.Linear(12, 7, device=DEVICE)
    ours = MixoutLinear(12, 7, p=0.6, anchor=randn(7, 12), device=DEVICE)
    assert list(ours.state_dict()) == list(linear.state_dict())
    ours.load_state_dict(linear.state_dict())
    x = randn(3, 12)
    assert torch.equal(ours.eval()(x), linear(x))
    ours.train()
    torch.manual_seed(3)
    a, b = ours(x), ours(x)
    torch.manual_seed(3)
    again = copy.deepcopy(ours)
    assert torch.equal(pickle.loads(pickle.dumps(ours))(x), a) and not torch.equal(a, b)
    assert torch.equal(again.anchor, ours.anchor)
    assert "p=0.6" in repr(ours)
    # Without an anchor: DropConnect.
    drop = MixoutLinear(12, 7, p=0.5, device=DEVICE)
    drop.load_state_dict(linear.state_dict())
    torch.manual_seed(4)
    y = drop(x)
    torch.manual_seed(4)
    seed = torch.randint(2**63 - 1, (), device=DEVICE)
    torch.testing.assert_close(y, mixout_linear(x, linear.weight, None, 0.5, seed, linear.bias))


def test_module_on_meta():
    layer = MixoutLinear(5, 3, device="meta")
    for mode in (True, False):
        assert layer.train(mode)(torch.empty(2, 5, device="meta")).shape == (2, 3)


def test_module_from_linear():
    linear = torch.nn.Linear(12, 7, bias=False, device=DEVICE)
    ours = MixoutLinear.from_linear(linear, p=1.0, mask="column")
    assert ours.weight is linear.weight and ours.bias is None
    with torch.no_grad():
        linear.weight.add_(1.0)
    x = randn(3, 12)
    torch.testing.assert_close(ours(x), F.linear(x, linear.weight - 1.0))
    ours.anchor_here()
    torch.testing.assert_close(ours(x), linear(x))
    assert ours.to(torch.float64).anchor.dtype == torch.float64


def test_compile_module():
    """In one graph, with a fresh mask at each call."""
    layer = MixoutLinear.from_linear(torch.nn.Linear(12, 7, device=DEVICE), p=0.5)
    with torch.no_grad():
        layer.weight.mul_(2.0)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = randn(3, 12)
    a, b = compiled(x), compiled(x)
    assert not torch.equal(a, b)
    a.sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.any()


def test_reference_backend_agrees():
    x, w, u, b = randn(5, 30), randn(9, 30, grad=True), randn(9, 30, grad=True), randn(9)
    for kind in KINDS:
        f = layer(kind)[0]
        got = torch.autograd.grad(f(x, w, u, b).sum(), [w, u])
        with solera.backend("reference"):
            want = torch.autograd.grad(f(x, w, u, b).sum(), [w, u])
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
