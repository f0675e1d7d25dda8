"""Core anchor: penalties, distances and decays over lists against the formulas in float64, bad input."""

import pytest
import torch
from helpers import DEVICE, DTYPES, INTERPRETED, ULP, randn, relative_error
from hypothesis import given
from hypothesis import strategies as st

import solera
from solera.weights import (
    anchor_decay_,
    anchor_penalty,
    ema_,
    lincomb,
    normalized_parameter_distance,
)

ops = torch.ops.solera
SHAPES = [(3, 5), (7,), (), (6, 3, 2, 2), (0, 4), (1,), (40, 30), (17000,)]


def of(shape, **options):
    """randn of a shape that may be ()."""
    return randn(*(shape or (1,)), **options).reshape(shape)


def a_list(dtype=torch.float32, shapes=SHAPES, grad=False, shift=0):
    dtypes = DTYPES if dtype == "mixed" else (dtype,)
    made = [of(s, dtype=dtypes[(i + shift) % len(dtypes)]) for i, s in enumerate(shapes)]
    return [t.requires_grad_(grad) for t in made]


def slack(dtype):
    """Half precision is rounded once; the interpreter cuts bfloat16 off instead."""
    return ULP[dtype] * (2 if INTERPRETED and dtype == torch.bfloat16 else 1)


def doubles(tensors):
    return [t.detach().double().requires_grad_(t.requires_grad) for t in tensors]


def penalty(xs, anchors, weights, strength):
    weights = weights or [1.0] * len(xs)
    return strength / 2 * sum((f * (x - a) ** 2).sum() for x, a, f in zip(xs, anchors, weights))


def distance(xs, targets, starts):
    near = sum(((x - t) ** 2).sum() for x, t in zip(xs, targets))
    return near / sum(((s - t) ** 2).sum() for s, t in zip(starts, targets))


@pytest.mark.parametrize("dtype", [*DTYPES, "mixed"], ids=str)
@pytest.mark.parametrize("weighted", [False, True], ids=["l2sp", "ewc"])
def test_rehearsal_free_penalty_against_the_formula(weighted, dtype):
    """(lambda / 2) sum F (theta - anchor)^2 with F = 1 or Fisher, and its gradient."""
    xs, anchors = a_list(dtype, grad=True), a_list(dtype, shift=1)
    weights = [w.abs() for w in a_list(dtype, shift=2)] if weighted else None
    exact_xs = doubles(xs)
    exact = penalty(exact_xs, doubles(anchors), weights and doubles(weights), 0.3)
    found = anchor_penalty(xs, anchors, weights, 0.3)
    wide = dtype in (torch.float64, "mixed")
    assert found.dtype == (torch.float64 if wide else torch.float32) and found.shape == ()
    assert relative_error(found, exact) <= (1e-13 if dtype == torch.float64 else 2e-7)
    wanted = torch.autograd.grad(exact * 2, exact_xs)
    for x, g, e in zip(xs, torch.autograd.grad(found * 2, xs), wanted):
        assert g.dtype == x.dtype and g.is_contiguous()
        assert relative_error(g, e) <= max(slack(x.dtype), 3e-7 if dtype != torch.float64 else 0)


@pytest.mark.parametrize("dtype", [*DTYPES, "mixed"], ids=str)
def test_trajectory_distance_against_the_formula(dtype):
    """|theta - target|^2 / |start - target|^2 over all tensors, and its gradient (MTT)."""
    xs, targets, starts = a_list(dtype, grad=True), a_list(dtype, shift=1), a_list(dtype, shift=2)
    exact_xs = doubles(xs)
    exact = distance(exact_xs, doubles(targets), doubles(starts))
    found = normalized_parameter_distance(xs, targets, starts)
    assert relative_error(found, exact) <= (1e-13 if dtype == torch.float64 else 3e-7)
    wanted = torch.autograd.grad(exact, exact_xs)
    for x, g, e in zip(xs, torch.autograd.grad(found, xs), wanted):
        assert g.dtype == x.dtype
        assert relative_error(g, e) <= max(slack(x.dtype), 3e-7 if dtype != torch.float64 else 0)


def test_gradients():
    shapes = [(2, 3), (4,)]
    xs, anchors, other = (a_list(torch.float64, shapes, grad=True) for _ in range(3))
    plain = [t.detach() for t in other]
    pen = lambda *t: anchor_penalty(t[:2], t[2:], [p.abs() for p in plain], 0.7)
    assert torch.autograd.gradcheck(pen, (*xs, *anchors))
    assert torch.autograd.gradgradcheck(pen, (*xs, *anchors))
    far = lambda *t: normalized_parameter_distance(t, plain, [p + 1 for p in plain])
    assert torch.autograd.gradcheck(far, xs)
    assert torch.autograd.gradgradcheck(far, xs)
    some = anchor_penalty([xs[0], plain[1]], plain)
    assert len(torch.autograd.grad(some, [xs[0]])) == 1
    assert not anchor_penalty(plain, plain).requires_grad
    bf16 = [x.detach().bfloat16().requires_grad_() for x in anchors]
    torch.autograd.grad(anchor_penalty(xs, bf16), bf16)


def test_trajectory_matching_through_an_unrolled_step():
    """The gradient to a learning rate and to data behind a step of SGD, as distillation takes it."""
    x, y = randn(5, 3, dtype=torch.float64, grad=True), randn(5, dtype=torch.float64)
    lr = torch.tensor(0.1, dtype=torch.float64, device=DEVICE, requires_grad=True)
    start, target = [randn(3, dtype=torch.float64)], [randn(3, dtype=torch.float64)]

    def matched(function):
        w = start[0].clone().requires_grad_()
        (g,) = torch.autograd.grad(((x @ w - y) ** 2).mean(), w, create_graph=True)
        return torch.autograd.grad(function([w - lr * g], target, start), (x, lr))

    torch.testing.assert_close(matched(normalized_parameter_distance), matched(distance))


@pytest.mark.parametrize("dtype", [*DTYPES, "mixed"], ids=str)
@pytest.mark.parametrize("weighted", [False, True], ids=["l2sp", "ewc"])
def test_decay_is_a_step_of_the_penalty(weighted, dtype):
    xs, anchors = a_list(dtype), a_list(dtype, shift=1)
    weights = [w.abs() for w in a_list(dtype, shift=2)] if weighted else None
    exact_xs = [x.double().requires_grad_() for x in xs]
    grads = torch.autograd.grad(
        penalty(exact_xs, doubles(anchors), weights and doubles(weights), 2.0), exact_xs
    )
    wanted = [x.detach() - 0.1 * g for x, g in zip(exact_xs, grads)]
    version, again = xs[0]._version, [x.clone() for x in xs]
    anchor_decay_(xs, anchors, 0.2, weights)
    assert xs[0]._version > version
    for x, e in zip(xs, wanted):
        assert relative_error(x, e) <= max(slack(x.dtype), 2e-7 if dtype != torch.float64 else 0)
    anchor_decay_(
        iter(again), anchors, torch.tensor(0.2, device=DEVICE, dtype=torch.float64), weights
    )
    assert all(torch.equal(a, b) for a, b in zip(again, xs))


def test_prolip_l2_to_the_start():
    """lambda |W - W0|_F^2 and its decoupled form."""
    w, w0 = randn(6, 4, dtype=torch.float64, grad=True), randn(6, 4, dtype=torch.float64)
    exact = 0.3 * ((w - w0) ** 2).sum()
    torch.testing.assert_close(anchor_penalty(w, w0, strength=2 * 0.3), exact)
    moved = w.detach().clone()
    anchor_decay_(moved, w0, 2 * 0.1 * 0.3)
    (g,) = torch.autograd.grad(exact, w)
    torch.testing.assert_close(moved, w.detach() - 0.1 * g)


def test_fisher_is_a_moving_average_of_squares():
    """F <- gamma F + (1 - gamma) g^2, and the sum F <- gamma F + g^2."""
    fisher, g = randn(7, dtype=torch.float64).abs(), randn(7, dtype=torch.float64)
    summed = lincomb([fisher, g * g], [0.9, 1.0])
    torch.testing.assert_close(summed, 0.9 * fisher + g**2)
    wanted = 0.9 * fisher + 0.1 * g**2
    ema_([fisher], [g * g], 0.9)
    torch.testing.assert_close(fisher, wanted)


def test_adam_and_adamax_moments():
    """m and v are moving averages of g and g^2; AdaMax's u = max(b2 u, |g|) is a line of torch."""
    p, m, v, u, g = (randn(9, dtype=torch.float64) for _ in range(5))
    v, u = v.abs(), u.abs()
    b1, b2, lr, t = 0.9, 0.99, 0.1, 3
    m1, v1 = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
    adam = p - lr * (m1 / (1 - b1**t)) / ((v1 / (1 - b2**t)).sqrt() + 1e-8)
    adamax = p - lr / (1 - b1**t) * m1 / torch.maximum(b2 * u, g.abs())
    ema_([m], [g], b1)
    ema_([v], [g * g], b2)
    step = m / ((v / (1 - b2**t)).sqrt() + 1e-8)
    torch.testing.assert_close(lincomb([p, step], [1.0, -lr / (1 - b1**t)]), adam)
    torch.maximum(u * b2, g.abs(), out=u)
    torch.testing.assert_close(lincomb([p, m / u], [1.0, -lr / (1 - b1**t)]), adamax)


def test_adam_with_critical_momenta():
    """a = m + the mean of C stored momenta; v uses a^2; theta -= lr a / (sqrt(v) + eps)."""
    p, m, g, v = (randn(9, dtype=torch.float64) for _ in range(4))
    v, stored = v.abs(), [randn(9, dtype=torch.float64) for _ in range(5)]
    m1 = 0.9 * m + 0.1 * g
    a1 = m1 + torch.stack(stored).mean(0)
    v1 = 0.99 * v + 0.01 * a1**2
    wanted = p - 0.1 * a1 / (v1.sqrt() + 1e-8)
    ema_([m], [g], 0.9)
    a = lincomb([m, *stored], [1.0, *[1 / len(stored)] * len(stored)])
    ema_([v], [a * a], 0.99)
    torch.testing.assert_close(lincomb([p, a / (v.sqrt() + 1e-8)], [1.0, -0.1]), wanted)


def test_names_layouts_and_values_that_are_not_ordinary():
    model = torch.nn.BatchNorm1d(4).to(DEVICE)
    anchor = {k: t.clone() for k, t in model.state_dict().items()}
    with torch.no_grad():
        model.weight.add_(2.0)
    named = dict(model.named_parameters())
    assert anchor_penalty(named, anchor, strength=1.0) == 8.0  # anchors: more keys than asked for
    anchor_decay_(model.state_dict(), anchor, 0.5)
    assert (model.weight == 2).all() and model.num_batches_tracked == 0
    x, a = randn(6, 8), randn(6, 8)
    for y, b in ((x.t().contiguous().t(), a), (x, a[:, :1].expand(6, 8)), (x.mT, a.mT)):
        y = y.detach().requires_grad_()
        found, exact = anchor_penalty(y, b), 0.5 * ((y.double() - b.double()) ** 2).sum()
        assert relative_error(found, exact) < 2e-7
        (g,) = torch.autograd.grad(found, y)
        torch.testing.assert_close(g, (y - b).detach())
        z = y.detach().clone(memory_format=torch.preserve_format)
        anchor_decay_(z, b, 0.5)
        torch.testing.assert_close(z, (y - 0.5 * (y - b)).detach())
    nan = torch.tensor([1.0, float("nan")], device=DEVICE)
    assert anchor_penalty(nan, torch.zeros_like(nan)).isnan()
    assert anchor_penalty(torch.full_like(nan, 1e30), nan[:1].expand(2)).isinf()
    assert normalized_parameter_distance(nan[:1], nan[:1], nan[:1]).isnan()
    assert normalized_parameter_distance(nan[:1] + 1, nan[:1], nan[:1]).isinf()
    empty = torch.zeros(0, device=DEVICE, requires_grad=True)
    (g,) = torch.autograd.grad(anchor_penalty(empty, empty.detach()), empty)
    assert g.shape == (0,)


@given(
    shape=st.lists(st.integers(0, 5), max_size=3),
    dtype=st.sampled_from(DTYPES),
    weighted=st.booleans(),
    strength=st.floats(-2, 2),
)
def test_fuzz(shape, dtype, weighted, strength):
    x, a = of(shape, dtype=dtype, grad=False), of(shape, dtype=dtype)
    f = of(shape, dtype=dtype).abs() if weighted else None
    exact = penalty([x.double()], [a.double()], [f.double()] if weighted else None, strength)
    found = anchor_penalty(x, a, f, strength)
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=1e-12)
    with solera.backend("reference"):
        plain = anchor_penalty(x, a, f, strength)
    torch.testing.assert_close(found, plain, rtol=1e-6, atol=1e-12)


# ---- torch's contract --------------------------------------------------------------------------------


def test_opcheck():
    xs = [randn(4, 6).t(), randn(2, 3), randn(5, dtype=torch.bfloat16)]
    anchors = [randn(6, 4), randn(1, 3).expand(2, 3), randn(5)]
    weights = [randn(6, 4), randn(2, 3), randn(5, dtype=torch.float64)]
    torch.library.opcheck(ops.anchor_sums.default, (xs, anchors, [], []))
    torch.library.opcheck(ops.anchor_sums.default, (xs, anchors, weights, anchors))
    torch.library.opcheck(ops.anchor_gradient.default, (xs, anchors, weights, randn(3)))
    torch.library.opcheck(ops.anchor_gradient.default, (xs, anchors, [], randn(3)[0]))
    torch.library.opcheck(ops.anchor_step_.default, (xs, anchors, weights, randn(3)))


@pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.inductor)]
)
def test_compiles(backend):
    def loss(x, y, a, b, f):
        far = normalized_parameter_distance(
            [x, y], [a, b], [b.new_zeros(x.shape), a.new_ones(y.shape)]
        )
        return anchor_penalty([x, y], [a, b], [f, f.square()[:, None].expand(y.shape)], 0.5) + far

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=backend)
    for n in (4, 6):
        x, y = randn(n, grad=True), randn(n, 3, grad=True)
        rest = (randn(n), randn(n, 3), randn(n))
        got, want = compiled(x, y, *rest), loss(x, y, *rest)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(
            torch.autograd.grad(got, (x, y)), torch.autograd.grad(want, (x, y))
        )


def test_torch_func():
    x, a = randn(4, dtype=torch.float64), randn(4, dtype=torch.float64)
    found = torch.func.grad(lambda x: anchor_penalty(x, a, strength=0.5))(x)
    torch.testing.assert_close(found, 0.5 * (x - a))
    found = torch.func.vmap(lambda x: normalized_parameter_distance(x, a, a + 1))(x.expand(3, 4))
    torch.testing.assert_close(found, (((x - a) ** 2).sum() / 4).expand(3))


@pytest.mark.no_interpreter
def test_same_bits_for_any_thread_count():
    xs, anchors = [randn(300, 700), randn(70001)], [randn(300, 700), randn(70001)]
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            leaves = [x.clone().requires_grad_() for x in xs]
            value = anchor_penalty(leaves, anchors, anchors, 0.3)
            far = normalized_parameter_distance(leaves, anchors, xs)
            found.append([value, far, *torch.autograd.grad(value + far, leaves)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found))


W = torch.ones(3)
LEAF = torch.ones(3, requires_grad=True)
BAD = [
    (lambda: anchor_penalty(3, W), TypeError, "parameters: expected a tensor, an iterable"),
    (lambda: anchor_penalty([], []), ValueError, "parameters: expected at least one"),
    (lambda: anchor_penalty([W], [W, W]), ValueError, "anchors: expected 1 tensors"),
    (lambda: anchor_penalty([W], [W[:2]]), ValueError, r"anchors\[0\]: expected shape \(3,\)"),
    (lambda: anchor_penalty([W], [None]), TypeError, r"anchors\[0\]: expected a torch.Tensor"),
    (lambda: anchor_penalty([W], [W], [W.int()]), TypeError, r"weights\[0\]: expected a dense"),
    (lambda: anchor_penalty(W, W, LEAF), ValueError, "weights: no gradient flows"),
    (lambda: anchor_penalty(W, W, strength=None), TypeError, "strength: expected a number"),
    (lambda: anchor_penalty({"a": W}, {"b": W}), ValueError, r"anchors: keys missing .*\['a'\]"),
    (lambda: anchor_penalty({"a": W}, [W]), TypeError, "anchors: expected a mapping"),
    (lambda: normalized_parameter_distance(W, LEAF, W), ValueError, "target: no gradient flows"),
    (lambda: normalized_parameter_distance(W, W, LEAF), ValueError, "start: no gradient flows"),
    (lambda: anchor_decay_([W, W], [W, W], 0.1), ValueError, "the same tensor is given twice"),
    (lambda: anchor_decay_(W[:1].expand(3), W, 0.1), ValueError, r"parameters\[0\]: expanded"),
    (lambda: anchor_decay_(W, W, W), ValueError, "rate: expected a number or a float32"),
    (lambda: anchor_decay_(W, W, "a"), TypeError, "rate: expected a number"),
]


@pytest.mark.parametrize("call, error, message", BAD, ids=range(len(BAD)))
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
