"""Core reparam: mixout, masked weights, gradient dropout, companders against their formulas in float64."""

import math

import pytest
import torch
from helpers import (
    DEVICE,
    DTYPES,
    INTERPRETED,
    ULP,
    assert_accurate,
    double,
    randn,
    relative_error,
)
from hypothesis import given
from hypothesis import strategies as st

import solera
from solera.weights import gradient_dropout, masked_weight, mixout, weight_compand
from solera.weights._random import keep_below, random_words, tensor_key
from solera.weights.reparam import kept

ops = torch.ops.solera
SEED = 0x1234567890ABCDEF
# One element, below a vector, a row that no chunk divides, chunks and a tail, more than one task.
SHAPES = [(1,), (3, 5), (7, 300), (1030,)] + ([] if INTERPRETED else [(40, 1024), (3, 5, 7, 11)])


def same_bits(a, b):
    """The interpreter cuts float32 off to bfloat16 where a GPU rounds."""
    if INTERPRETED and a.dtype == torch.bfloat16:
        torch.testing.assert_close(a, b, rtol=2**-7, atol=1e-30, equal_nan=True)
        return True
    return torch.equal(a.nan_to_num(), b.nan_to_num()) and torch.equal(a.isnan(), b.isnan())


def seed_of(value=SEED):
    return torch.tensor(value, device=DEVICE)


def paper_mixout(w, u, m, p):
    """(M W + (1 - M) U - p U) / (1 - p), as the authors have it."""
    return (m * w + (1 - m) * u - p * u) / (1 - p)


# ---- mixout ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", ["element", "column"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mixout_is_the_papers_formula(dtype, mask):
    for shape in SHAPES:
        w, u = randn(*shape, dtype=dtype, grad=True), randn(*shape, dtype=dtype, grad=True)
        g = randn(*shape, dtype=dtype)
        for p in (0.3, 0.9) if not INTERPRETED else (0.7,):
            y = mixout(w, u, p, SEED, mask=mask)
            m = kept(w, seed_of(), p, 0, mask == "column").double()
            wd, ud = double(w, u)
            truth = paper_mixout(wd, ud, m, p)
            ours = (y, *torch.autograd.grad(y, [w, u], g))
            truths = (truth, *torch.autograd.grad(truth, [wd, ud], g.double()))
            with torch.no_grad():
                eager = paper_mixout(w, u, m.to(dtype), p)
            assert y.dtype == dtype
            for a, b in zip(ours, truths):
                assert a.dtype == dtype
                assert_accurate(a, b, eager if a is y else b.float())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mixout_same_bits_as_the_reference(dtype):
    for shape in SHAPES:
        for anchor in (randn(*shape, dtype=dtype), None):
            for mask, p in (("element", 0.5), ("column", 0.25), ("element", 1.0)):
                w, g = randn(*shape, dtype=dtype, grad=True), randn(*shape, dtype=dtype)
                u = None if anchor is None else anchor.clone().requires_grad_()
                wanted = [w] if u is None else [w, u]

                def run(w=w, u=u, g=g, mask=mask, p=p, wanted=wanted):
                    y = mixout(w, u, p, SEED, mask=mask)
                    return y, *torch.autograd.grad(y, wanted, g)

                ours = run()
                with solera.backend("reference"):
                    theirs = run()
                for a, b in zip(ours, theirs):
                    assert same_bits(a, b)


def test_mixout_mask_is_the_shared_convention():
    """The elements that move are those whose word lies below the bound, whatever is around them."""
    w, u = torch.ones(5, 331, device=DEVICE), torch.zeros(5, 331, device=DEVICE)
    words = random_words(seed_of(), 0, 0, w.numel()).view(w.shape)
    assert torch.equal(mixout(w, u, 0.6, SEED) > 0, words < keep_below(0.4))
    assert torch.equal(mixout(w, u, 0.6, seed_of()) > 0, words < keep_below(0.4))
    columns = mixout(w, u, 0.6, SEED, mask="column") > 0
    assert torch.equal(columns, (words[:1] < keep_below(0.4)).expand(5, -1))
    assert torch.equal(mixout(w[0], u[0], 0.6, SEED), mixout(w[0], u[0], 0.6, SEED, mask="column"))


def test_mixout_p_zero_one_and_eval():
    w, u = randn(4, 6), randn(4, 6)
    w[0, 0], u[1, 1] = float("nan"), float("inf")
    assert mixout(w, u, 0.0, 3) is w
    assert mixout(w, u, 0.9, 3, training=False) is w
    assert same_bits(mixout(w, u, 1.0, 3), u)
    assert not mixout(w, None, 1.0, 3).any()  # a dropped NaN is not multiplied by 0
    a = w.clone().requires_grad_()
    (grad,) = torch.autograd.grad(mixout(a, None, 1.0, 3).sum(), a)
    assert not grad.any()


@pytest.mark.parametrize("mask", ["element", "column"])
def test_mixout_mean_and_rate(mask):
    w, u = randn(64, 512), randn(64, 512)
    p, count = 0.75, 2 if INTERPRETED else 60
    total, moved = torch.zeros_like(w), 0.0
    for seed in range(count):
        y = mixout(w, u, p, seed, mask=mask)
        total += y
        moved += (y != u).double().mean().item()
    trials = count * (w.numel() if mask == "element" else 512)
    assert abs(moved / count - 0.25) < 5 * math.sqrt(p * 0.25 / trials)
    spread = (w - u).abs().mean() * math.sqrt(p / (1 - p) / count)
    assert (total / count - w).abs().mean() < 1.1 * spread


def test_mixout_lists_and_state_dicts():
    """Each tensor has a mask of its own, by its place or its name, whatever the order."""
    w = {"a.weight": randn(3, 40), "b.weight": randn(50)}
    u = {k: torch.zeros_like(t) for k, t in w.items()}
    out = mixout(w, u, 0.5, 7)
    other_way = mixout(dict(reversed(w.items())), u, 0.5, 7)
    assert list(out) == list(w)
    for name, t in w.items():
        m = random_words(seed_of(7), tensor_key(name), 0, t.numel()).view(t.shape) < keep_below(0.5)
        assert torch.equal(out[name], torch.where(m, 2 * t, 0.0))
        assert torch.equal(out[name], other_way[name])
    first, second = mixout([w["b.weight"], w["b.weight"]], None, 0.5, 7)
    assert not torch.equal(first, second)
    assert torch.equal(first, mixout(w["b.weight"], 0, 0.5, 7))


def test_mixout_fresh_seeds_follow_torchs_generator():
    w = randn(1000)
    torch.manual_seed(5)
    a, b = mixout(w, None, 0.5), mixout(w, None, 0.5)
    torch.manual_seed(5)
    assert not torch.equal(a, b) and torch.equal(a, mixout(w, None, 0.5))


@pytest.mark.no_interpreter
def test_same_bits_for_any_thread_count():
    w, u = randn(37, 3000, grad=True), randn(37, 3000, grad=True)
    v, g = randn(37, 3000, grad=True), randn(37, 3000)
    a, b = randn(1, grad=True), torch.full((1,), 0.7, device=DEVICE, requires_grad=True)

    def run():
        outputs = [mixout(w, u, 0.5, 3), weight_compand(v, a, b), gradient_dropout(w, u, 1.0, 3)]
        return *outputs, *torch.autograd.grad(outputs[:2], [w, u, v, a, b], [g, g])

    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(run())
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], other))


@given(
    shape=st.lists(st.integers(0, 40), max_size=3),
    p=st.floats(0.01, 1.0),
    mask=st.sampled_from(["element", "column"]),
    seed=st.integers(-(2**63), 2**63 - 1),
    value=st.sampled_from([1.0, float("inf"), float("nan"), 1e30, 1e-42]),
)
def test_mixout_of_any_shape_and_value(shape, p, mask, seed, value):
    w, u = randn(shape, grad=True), randn(shape)
    if w.numel() > 1:
        w.data.view(-1)[0], u.view(-1)[1] = value, value
    y = mixout(w, u, p, seed, mask=mask)
    (dw,) = torch.autograd.grad(y.sum(), w)
    with solera.backend("reference"):
        want = mixout(w, u, p, seed, mask=mask)
        (dwant,) = torch.autograd.grad(want.sum(), w)
    assert same_bits(y, want) and same_bits(dw, dwant)


# ---- masked weights ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_weight_is_the_papers_formula(dtype):
    for shape in SHAPES:
        w, m = randn(*shape, dtype=dtype, grad=True), randn(*shape, dtype=dtype, grad=True)
        g = randn(*shape, dtype=dtype)
        y = masked_weight(w, m, 0.25)
        dw, dm = torch.autograd.grad(y, [w, m], g)
        passed = m > 0.25
        assert torch.equal(y, torch.where(passed, w, 0.0))
        assert torch.equal(dw, torch.where(passed, g, 0.0))
        assert_accurate(dm, g.double() * w.detach().double(), (g * w).detach())
        with solera.backend("reference"):
            again = masked_weight(w, m, 0.25)
            for a, b in zip((y, dw), (again, torch.autograd.grad(again, [w, m], g)[0])):
                assert torch.equal(a, b)
    frozen = w.detach()
    (only,) = torch.autograd.grad(masked_weight(frozen, m, 0.25), m, g)
    assert torch.equal(only, dm)


# ---- gradient dropout --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_dropout_is_the_papers_formula(dtype):
    for shape in SHAPES:
        g, h = randn(*shape, dtype=dtype), randn(*shape, dtype=dtype)
        g.view(-1)[0] = 0.0
        for rate in (1.0, 0.3):
            y = gradient_dropout(g, h, rate, SEED)
            gd, hd = g.double(), h.double()
            p = 0.5 * (1 + gd.sign() * (gd + hd) / (gd.abs() + hd.abs() + 1e-20))
            u = (random_words(seed_of(), 0, 0, g.numel()) >> 8).double().view(shape) * 2.0**-24
            sure = (p - u).abs() > 1e-6  # P is rounded to float32
            truth = (1 - rate + rate * (p > u).double()) * gd
            assert_accurate(torch.where(sure, y, 0.0), torch.where(sure, truth, 0.0), truth.float())
            with solera.backend("reference"):
                assert same_bits(y, gradient_dropout(g, h, rate, SEED))
        agree = gradient_dropout(g, g.sign() * h.abs(), 1.0, SEED)
        assert torch.equal(agree, g)
    against = gradient_dropout(g, -2 * g, 1.0, SEED)
    assert not against[g != 0].all()
    listed = gradient_dropout([g, h], [h, g], 0.5, 3)
    assert torch.equal(listed[0], gradient_dropout(g, h, 0.5, 3))


# ---- companders --------------------------------------------------------------------------------------


def compand(v, a, b, kind):
    return a * ((v / b).atan() if kind == "arctan" else (v / b).tanh())


@pytest.mark.parametrize("kind", ["arctan", "tanh"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weight_compand_is_the_papers_formula(dtype, kind):
    for shape in [*SHAPES, (0,)]:
        v = randn(*shape, dtype=dtype, grad=True)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        a = torch.tensor(1.3, dtype=wide, device=DEVICE, requires_grad=True)
        b = torch.tensor([0.7], dtype=wide, device=DEVICE, requires_grad=True)
        g = randn(*shape, dtype=dtype)
        y = weight_compand(v, a, b, kind)
        ours = (y, *torch.autograd.grad(y, [v, a, b], g))
        doubles = double(v, a, b)
        truth = compand(*doubles, kind)
        truths = (truth, *torch.autograd.grad(truth, doubles, g.double()))
        eager = compand(v.to(wide), a, b, kind).to(dtype)
        (slope,) = torch.autograd.grad(eager, v, g)
        assert y.dtype == dtype and ours[3].shape == b.shape
        assert_accurate(ours[0], truths[0], eager)
        assert_accurate(ours[1], truths[1], slope)
        size = g.double().norm() * v.detach().double().norm()
        for sum_, exact in zip(ours[2:], truths[2:]):
            limit = 4 * ULP[wide] * size + 1e-30
            assert (sum_.double() - exact).abs().max() <= limit


@pytest.mark.parametrize("kind", ["arctan", "tanh"])
def test_weight_compand_over_the_whole_range(kind):
    for dtype in (torch.float32, torch.float64):
        reach = torch.logspace(-30, 30, 400, dtype=torch.float64)
        near = torch.linspace(-4, 4, 1001, dtype=torch.float64)
        v = torch.cat([reach, -reach, near]).to(device=DEVICE, dtype=dtype)
        y = weight_compand(v, 1.0, 1.0, kind)
        truth = v.double().atan() if kind == "arctan" else v.double().tanh()
        error = ((y.double() - truth).abs() / truth.abs().clamp_min(1e-300)).max()
        assert error < 4 * torch.finfo(dtype).eps
    special = torch.tensor([float("inf"), float("-inf"), float("nan"), 0.0], device=DEVICE)
    y = weight_compand(special, 2.0, 1.0, kind)
    bound = math.pi if kind == "arctan" else 2.0
    torch.testing.assert_close(y[:2].cpu(), torch.tensor([bound, -bound]))
    assert y[2].isnan() and y[3] == 0


# ---- contract ----------------------------------------------------------------------------------------


def test_gradcheck():
    w, u = (randn(3, 5, dtype=torch.float64, grad=True) for _ in range(2))
    for mask in ("element", "column"):
        call = lambda w, u, mask=mask: mixout(w, u, 0.6, 3, mask=mask)
        assert torch.autograd.gradcheck(call, (w, u))
        assert torch.autograd.gradgradcheck(call, (w, u))
    a = torch.tensor(0.9, dtype=torch.float64, device=DEVICE, requires_grad=True)
    b = torch.tensor(0.6, dtype=torch.float64, device=DEVICE, requires_grad=True)
    for kind in ("arctan", "tanh"):
        call = lambda v, a, b, kind=kind: weight_compand(v, a, b, kind)
        assert torch.autograd.gradcheck(call, (w, a, b))
        assert torch.autograd.gradgradcheck(call, (w, a, b))


def test_masked_weight_twice():
    """dM = g W: its derivatives are W and g."""
    w, m, g = (randn(4, 3, dtype=torch.float64, grad=True) for _ in range(3))
    y = masked_weight(w, m, 0.0)
    (dm,) = torch.autograd.grad(y, m, g, create_graph=True)
    dw, dg = torch.autograd.grad(dm.sum(), [w, g])
    assert torch.equal(dw, g.detach()) and torch.equal(dg, w.detach())


@pytest.mark.parametrize("form", ["plain", "transposed", "expanded"])
def test_opcheck(form):
    def make():
        t = randn(6, 4)
        return t if form == "plain" else t.t() if form == "transposed" else t[0].expand(6, 4)

    seed, a = seed_of(), torch.tensor(0.5, device=DEVICE)
    check = torch.library.opcheck
    for column in (False, True) if form == "plain" else (False,):
        check(ops.mixout.default, (make(), make(), seed, 0.5, 0, column))
        check(ops.mixout.default, (make(), None, seed, 0.5, 0, column))
        check(ops.mixout_backward.default, (make(), seed, 0.5, 0, column, True, column))
    check(ops.masked_weight.default, (make(), make(), 0.1))
    check(ops.masked_weight_backward.default, (make(), make(), make(), 0.1, True, True))
    check(ops.masked_weight_backward.default, (make(), make(), make(), 0.1, False, True))
    check(ops.gradient_dropout.default, (make(), make(), seed, 0.5, 1e-8, 3))
    check(ops.weight_compand.default, (make(), a, a, 0))
    check(ops.weight_compand_backward.default, (make(), make(), a, a, 1, True))
    check(ops.weight_compand_backward.default, (make(), make(), a, a, 0, False))


def test_strides_do_not_matter():
    w, u = randn(40, 30), randn(40, 30)
    for f in (
        lambda w, u: mixout(w, u, 0.5, 3),
        lambda w, u: mixout(w, u, 0.5, 3, mask="column"),
        lambda w, u: masked_weight(w, u, 0.1),
        lambda w, u: gradient_dropout(w, u, 0.5, 3),
        lambda w, u: weight_compand(w, 1.0, 2.0) + u,
    ):
        want = f(w.t().contiguous(), u.t().contiguous())
        assert torch.equal(f(w.t(), u.t()), want) and f(w.t(), u.t()).is_contiguous()


def test_compile():
    w, u = randn(6, 8, grad=True), randn(6, 8, grad=True)
    a = torch.tensor(0.7, device=DEVICE, requires_grad=True)

    def f(w, u, a):
        y = mixout(w, u, 0.5, 11) + mixout(w, None, 0.3, 5, mask="column")
        return (
            y
            + masked_weight(w, u, 0.2)
            + weight_compand(u, a, 0.4)
            + weight_compand(w, a, a, "tanh")
        )

    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    for t in ((w, u), (randn(5, 7, grad=True), randn(5, 7, grad=True))):
        got, want = compiled(*t, a), f(*t, a)
        torch.testing.assert_close(got, want)
        grads = [torch.autograd.grad(y.square().sum(), [*t, a]) for y in (got, want)]
        torch.testing.assert_close(*grads)


def test_torch_func():
    w, u = randn(4, 6, dtype=torch.float64), randn(4, 6, dtype=torch.float64)
    scalar = lambda w: (mixout(w, u, 0.5, 3) * masked_weight(w, u, 0.1)).sum()
    leaf = w.clone().requires_grad_()
    torch.testing.assert_close(
        torch.func.grad(scalar)(w), torch.autograd.grad(scalar(leaf), leaf)[0]
    )
    batch = torch.stack([w, 2 * w])
    shared = torch.vmap(lambda w: mixout(w, u, 0.5, 3))(batch)
    assert torch.equal(shared, torch.stack([mixout(t, u, 0.5, 3) for t in batch]))
    seeds = torch.tensor([3, 4], device=DEVICE)
    own = torch.vmap(lambda w, s: mixout(w, u, 0.5, s))(batch, seeds)
    assert torch.equal(own, torch.stack([mixout(t, u, 0.5, s) for t, s in zip(batch, seeds)]))
    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(lambda w: mixout(w, u, 0.5))(batch)
    score = torch.func.grad(lambda m: masked_weight(w, m, 0.1).sum())(u)
    assert torch.equal(score, w)


def test_bad_input():
    w = randn(3, 4)
    cases = [
        (lambda: mixout(w, randn(4, 3), 0.5, 1), ValueError, "anchor: expected shape"),
        (lambda: mixout(w, w.double(), 0.5, 1), TypeError, "anchor: float64"),
        (lambda: mixout(w, w.half(), 0.5, 1), TypeError, "anchor: expected torch.float32"),
        (lambda: mixout(w, 1.0, 0.5, 1), TypeError, "anchor: expected a tensor"),
        (lambda: mixout(w, w, 1.5, 1), ValueError, "p: expected a finite number in"),
        (lambda: mixout(w, w, 0.5, 1, mask="row"), ValueError, "mask: expected one of"),
        (lambda: mixout(w, w, 0.5, 1.5), TypeError, "seed: expected an int"),
        (lambda: mixout(w, w, 0.5, 2**63), ValueError, "seed: expected an int within"),
        (lambda: mixout(w, w, 0.5, torch.ones(2)), TypeError, "seed: expected an int or an int64"),
        (lambda: mixout(w.long(), w, 0.5, 1), TypeError, "weight: expected float32"),
        (lambda: mixout({"a": w}, {"b": w}, 0.5, 1), ValueError, "anchor: keys differ"),
        (lambda: masked_weight(w, randn(2), 0.0), ValueError, "score: expected shape"),
        (lambda: masked_weight(w, w, float("nan")), ValueError, "threshold: expected a finite"),
        (lambda: gradient_dropout(w, None, 0.5, 1), TypeError, "other: expected"),
        (lambda: gradient_dropout(w, w, 2.0, 1), ValueError, "rate: expected"),
        (lambda: weight_compand(w, 1.0, 1.0, "sin"), ValueError, "kind: expected one of"),
        (
            lambda: weight_compand(w, torch.ones(2, device=DEVICE), 1.0),
            ValueError,
            "a: expected one",
        ),
    ]
    for call, error, message in cases:
        with pytest.raises(error, match=message):
            call()


def test_relative_error_of_large_sums():
    """da and db over a million elements, where one float32 accumulator would be off by 1e-4."""
    if INTERPRETED:
        pytest.skip("a large tensor")
    v, g = randn(1 << 20), randn(1 << 20) + 1.0
    a = torch.ones((), device=DEVICE, requires_grad=True)
    b = torch.ones((), device=DEVICE, requires_grad=True)
    da, db = torch.autograd.grad(weight_compand(v + 1, a, b), [a, b], g)
    doubles = double(a, b)
    truths = torch.autograd.grad(compand((v + 1).double(), *doubles, "arctan"), doubles, g.double())
    assert relative_error(da, truths[0]) < 1e-6 and relative_error(db, truths[1]) < 1e-6
