"""Core perturb: SAM's steps and noise against the formulas in float64, bits across backends, bad input."""

import math

import pytest
import torch
from helpers import DEVICE, DTYPES, INTERPRETED, ULP, randn, relative_error
from hypothesis import given
from hypothesis import strategies as st

import solera
from solera.weights import (
    SAM,
    normalized_step,
    perturb_weights_,
    sam_perturb_,
    sam_restore_,
)
from solera.weights._random import random_words, tensor_key
from solera.weights.perturb import normal_of

ops = torch.ops.solera
SHAPES = [(3, 5), (7,), (), (6, 3, 2, 2), (0, 4), (1,), (40, 30), (17000,)]
HALVES = (torch.bfloat16, torch.float16)


def of(shape, **options):
    """randn of a shape that may be ()."""
    return randn(*(shape or (1,)), **options).reshape(shape)


def params(shapes=SHAPES, dtype=torch.float32, mixed=False):
    """Parameters with gradients; mixed: their dtypes differ, also within a pair."""
    out = []
    for i, s in enumerate(shapes):
        p = torch.nn.Parameter(of(s, dtype=DTYPES[i % 4] if mixed else dtype))
        p.grad = of(s, dtype=p.dtype)
        out.append(p)
    return out


def grads_of(ps):
    return [p.grad for p in ps]


def values(ps):
    return [p.detach().clone() for p in ps]


def slack(dtype):
    """Half precision is rounded once; the interpreter cuts bfloat16 off instead."""
    return ULP[dtype] * (2 if INTERPRETED and dtype == torch.bfloat16 else 1)


def climbed(ws, gs, rho, adaptive, eta, eps=1e-12):
    """SAM's and ASAM's point and norm in float64."""
    ws, gs = [w.double() for w in ws], [g.double() for g in gs]
    scale = [w.abs() + eta if adaptive else torch.ones_like(w) for w in ws]
    norm = torch.sqrt(sum(((t * g) ** 2).sum() for t, g in zip(scale, gs)))
    return [w + rho * t * t * g / (norm + eps) for w, t, g in zip(ws, scale, gs)], norm


@pytest.mark.parametrize("dtype", [*DTYPES, "mixed"], ids=str)
@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
def test_perturb_against_the_papers_formula(adaptive, dtype):
    mixed = dtype == "mixed"
    ps = params(dtype=torch.float32 if mixed else dtype, mixed=mixed)
    before, grads = values(ps), grads_of(ps)
    kept = [torch.empty_like(p) for p in ps]
    wanted, norm = climbed(before, grads, 0.5, adaptive, 0.01)
    version = ps[0]._version
    found = sam_perturb_(ps, rho=0.5, adaptive=adaptive, eta=0.01, backup=kept)
    assert ps[0]._version > version and found.dim() == 0 and found.device == ps[0].device
    wide = mixed or dtype == torch.float64
    assert found.dtype == (torch.float64 if wide else torch.float32)
    assert relative_error(found, norm) < (1e-6 if mixed or not wide else 1e-14)
    for p, w, k, exact in zip(ps, before, kept, wanted):
        limit = 1e-9 if mixed else slack(p.dtype)  # a part of the norm in float32
        assert relative_error(p, exact) <= max(slack(p.dtype), limit)
        assert torch.equal(k, w)
    assert all(p.grad is g for p, g in zip(ps, grads))
    sam_restore_(ps, backup=kept)
    assert all(torch.equal(p, w) for p, w in zip(ps, before))


@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
def test_memory_exchanged_with_the_backup(adaptive):
    ps = params(mixed=True)
    ps[1].grad = None
    before, other = values(ps), [torch.nn.Parameter(p.detach().clone()) for p in ps]
    kept = [torch.empty_like(p, requires_grad=False) for p in ps]
    places = [p.data_ptr() for p in ps], [k.data_ptr() for k in kept]
    grads, version = grads_of(ps), ps[0]._version
    norm = sam_perturb_(other, grads, 0.5, adaptive=adaptive, eta=0.01)
    assert sam_perturb_(ps, rho=0.5, adaptive=adaptive, eta=0.01, backup=kept, swap=True) == norm
    assert ps[0]._version > version
    assert all(torch.equal(p, q) for p, q in zip(ps, other))
    assert all(torch.equal(k, w) for k, w in zip(kept, before))
    assert ([k.data_ptr() for k in kept], [p.data_ptr() for p in ps]) == places
    sam_restore_(ps, backup=kept, swap=True, add=[torch.ones_like(p) for p in ps])
    assert all(torch.equal(p, w) for p, w in zip(ps, before))
    assert (ps[1].grad == 1).all() and [p.data_ptr() for p in ps] == places[0]
    strided = randn(4, 6).t()
    start, out = strided.clone(), torch.empty(6, 4, device=DEVICE)
    sam_perturb_(strided, torch.ones_like(strided), 0.5, backup=out, swap=True)
    torch.testing.assert_close(strided, start + 0.5 / 24**0.5)
    assert torch.equal(out, start)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_restore_computes_the_step_again(dtype):
    ps = params(dtype=dtype)
    before, grads = values(ps), [g.clone() for g in grads_of(ps)]
    norm = sam_perturb_(ps, rho=0.5)
    moved = values(ps)
    for p in ps:
        p.grad = torch.zeros_like(p)
    sam_restore_(ps, grads, norm, 0.5)
    for p, w, m in zip(ps, before, moved):
        unit = torch.finfo(dtype).eps * torch.maximum(w.abs(), m.abs())
        assert ((p - w).abs() <= unit).all()


@pytest.mark.parametrize("kept", [False, True], ids=["again", "backup"])
def test_imbsam_perturbs_by_the_tail_and_steps_with_both(kept):
    """g_head kept, e = rho g_tail / (|g_tail| + 1e-16), the step's gradient g_head + the one at w + e."""
    ps = params(dtype=torch.float64)
    before = values(ps)
    head, tail = [of(s, dtype=torch.float64) for s in SHAPES], grads_of(ps)
    backup = [torch.empty_like(p) for p in ps] if kept else None
    norm = sam_perturb_(ps, tail, rho=0.1, eps=1e-16, backup=backup)
    at_peak = [p.detach() ** 2 for p in ps]  # of the loss sum p^3 / 3
    wanted, _ = climbed(before, tail, 0.1, False, 0, 1e-16)
    for p, g in zip(ps, at_peak):
        p.grad = g.clone()
    ps[1].grad = None
    if kept:
        sam_restore_(ps, backup=backup, add=head)
    else:
        sam_restore_(ps, tail, norm, 0.1, eps=1e-16, add=[*head[:3], None, *head[4:]])
    for i, (p, w, g, h, peak) in enumerate(zip(ps, before, at_peak, head, wanted)):
        torch.testing.assert_close(p.detach(), w, rtol=0, atol=1e-15)
        torch.testing.assert_close(g, peak**2)
        if i == 1:
            assert torch.equal(p.grad, h) and p.grad is not h
        elif i == 3 and not kept:
            assert torch.equal(p.grad, g)
        else:
            torch.testing.assert_close(p.grad, g + h)


def test_what_has_no_gradient_stays():
    ps = params([(4, 5), (6,), (3,)])
    ps[1].grad = None
    before = values(ps)
    kept = [torch.empty_like(p) for p in ps]
    sam_perturb_(iter(ps), rho=0.5, backup=kept)
    assert torch.equal(ps[1], before[1]) and not torch.equal(ps[0], before[0])
    assert all(torch.equal(k, w) for k, w in zip(kept, before))
    sam_restore_(iter(ps), backup=kept)
    named = {f"p{i}": p for i, p in enumerate(ps)}
    given = {"p0": ps[0].grad, "p1": None, "p2": None}
    norm = sam_perturb_(named, given, 0.5)
    torch.testing.assert_close(norm, ps[0].grad.norm())
    assert torch.equal(ps[2], before[2])
    sam_restore_(named, given, norm, 0.5)
    torch.testing.assert_close(values(ps), before)
    for p in ps:
        p.grad = None
    assert sam_perturb_(ps, backup=kept) == 0 and sam_perturb_([]) == 0
    assert all(torch.equal(k, p) for k, p in zip(kept, ps))
    sam_restore_([], [], torch.zeros(()))


def test_layouts_and_values_that_are_not_ordinary():
    w, g = randn(6, 8), randn(6, 8)
    layouts = [
        (w.clone(), g.t().contiguous().t()), (w.t().contiguous().t(), g.clone()),
        (torch.cat([w, w], 1)[:, :8], g.clone()), (w.clone(), randn(6, 1).expand(6, 8)),
    ]  # fmt: skip
    for adaptive in (False, True):
        for x, y in layouts:
            x = x.clone() if x.is_contiguous() else x
            start, kept = x.clone(), torch.empty(8, 6, device=DEVICE).t()
            wanted, _ = climbed([start], [y], 0.5, adaptive, 0)
            sam_perturb_(x, y, 0.5, adaptive=adaptive, backup=kept)
            assert relative_error(x, wanted[0]) < ULP[torch.float32]
            sam_restore_(x, backup=kept)
            assert torch.equal(x, start)
    w = randn(5)
    start = w.clone()
    assert sam_perturb_(w, torch.zeros_like(w)) == 0 and torch.equal(w, start)
    assert sam_perturb_(w, torch.full_like(w, float("nan"))).isnan() and w.isnan().all()
    huge = torch.full((4,), 1e30, device=DEVICE)
    assert sam_perturb_(start, torch.full_like(start, 1e30), 0.5).isinf()  # as torch's norm is
    assert start.isfinite().all()
    assert sam_perturb_(huge.double(), huge.double(), 1.0).isfinite()


def test_adaptive_norms():
    ws, gs = [p.detach() for p in params(mixed=True)], [of(s, dtype=torch.float32) for s in SHAPES]
    found = ops.perturb_norms(ws, gs, 0.25)
    for n, w, g in zip(found, ws, gs):
        exact = ((w.double().abs() + 0.25) * g.double()).norm()
        assert abs(n - exact) <= 1e-6 * exact


@given(
    shape=st.lists(st.integers(0, 5), max_size=3),
    dtype=st.sampled_from(DTYPES),
    adaptive=st.booleans(),
    scale=st.sampled_from([1.0, 1e-15, 1e6, 0.0]),
    transpose=st.booleans(),
)
def test_fuzz(shape, dtype, adaptive, scale, transpose):
    w, g = of(shape, dtype=dtype), of(shape, dtype=dtype) * scale
    if transpose and len(shape) >= 2:
        w = w.mT.contiguous().mT
    start, kept = w.clone(), torch.empty_like(w)
    wanted, _ = climbed([w], [g], 0.5, adaptive, 0.1)
    sam_perturb_(w, g, 0.5, adaptive=adaptive, eta=0.1, backup=kept)
    if torch.isfinite(g).all():
        torch.testing.assert_close(w.double(), wanted[0], rtol=2 * slack(dtype), atol=1e-6)
    assert torch.equal(kept, start)


# ---- noise -------------------------------------------------------------------------------------------


def test_normal_numbers():
    """Against the inverse distribution in float64, and their first moments."""
    words = torch.tensor([0, 255, 2**31 - 1, 2**31, 2**32 - 1, 2**30, 3 * 2**30, 12345678])
    z = normal_of(torch.cat([words, random_words(7, 3, 0, 200000)]))
    part = torch.cat([words, random_words(7, 3, 0, 200000)]) >> 8
    exact = torch.special.ndtri((part.double() + 0.5) / 2**24)
    torch.testing.assert_close(z.double(), exact, rtol=2e-6, atol=1e-7)
    assert z.abs().max() < 5.5 and z[0] == -z[4] and z[2] < 0 < z[3]
    drawn = z[8:].double()
    assert abs(drawn.mean()) < 0.01 and abs(drawn.var() - 1) < 0.01
    assert abs((drawn**4).mean() - 3) < 0.1


@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_noise_follows_its_definition(scope):
    """w + rho |w| / sqrt(n) z with z of (seed, key, element), the same bits on every backend."""
    names = ["a", "b", "c", "d"]
    shapes = [(3, 5), (1700,), (), (0, 4)]
    seed = 0x1234567890ABCDEF
    for dtype in DTYPES:
        weights = {n: of(s, dtype=dtype) for n, s in zip(names, shapes)}
        start = {n: w.clone() for n, w in weights.items()}
        perturb_weights_(weights, 0.1, seed, scope=scope)
        plain = {n: w.clone() for n, w in start.items()}
        with solera.backend("reference"):
            perturb_weights_(plain, 0.1, seed, scope=scope)
        every = torch.cat([w.flatten().double() for w in start.values()])
        for n, w in weights.items():
            own = every if scope == "model" else start[n].double().flatten()
            z = normal_of(random_words(seed, tensor_key(n), 0, w.numel(), DEVICE)).double()
            size = own.norm() / max(own.numel(), 1) ** 0.5
            exact = start[n].double() + 0.1 * size * z.view(w.shape)
            assert relative_error(w, exact) <= max(slack(dtype), 1e-14)
            assert relative_error(w, plain[n]) <= max(
                slack(dtype), 1e-14
            )  # the norms differ in a bit
    one = torch.zeros(())
    z = [of((3000,)).zero_() for _ in range(2)]
    ops.noise_(z[:1], one + 1, [1.0], 5, [2])
    with solera.backend("reference"):
        solera.weights.perturb._noise(z[1:], one + 1, [1.0], 5, [2])
    assert torch.equal(z[0], z[1])  # bit for bit


def test_noise_of_a_name_depends_on_nothing_else():
    a, b = of((50, 3)), of((700,))
    alone, both = {"b": b.clone()}, {"a": a.clone(), "b": b.clone()}
    other = {"b": b.clone()}
    for weights, seed in ((alone, 1), (both, 1), (other, 2)):
        perturb_weights_(weights, 0.5, seed)
    assert torch.equal(alone["b"], both["b"]) and not torch.equal(alone["b"], other["b"])
    noise = (alone["b"] - b).double()
    assert abs(noise.norm() / (0.5 * b.double().norm()) - 1) < 0.1
    strided = b.view(70, 10).t().contiguous().t().clone(memory_format=torch.preserve_format)
    assert not strided.is_contiguous()
    perturb_weights_({"b": strided}, 0.5, 1)
    assert torch.equal(strided.reshape(-1), alone["b"])


# ---- what is built on it -----------------------------------------------------------------------------


@pytest.mark.parametrize("per_sample", [True, False])
def test_udim_normalized_step(per_sample):
    """x + rho g / |g|, one norm a sample."""
    for dtype in DTYPES:
        x, g = randn(4, 3, 5, dtype=dtype), randn(4, 3, 5, dtype=dtype)
        g[1] = 0
        rows = g.double().reshape(4 if per_sample else 1, -1)
        unit = rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12)
        found = normalized_step(x, g, 0.7, per_sample=per_sample)
        exact = x.double() + 0.7 * unit.view(x.shape)
        assert found.dtype == dtype and relative_error(found, exact) <= 2 * slack(dtype)
    x, g = randn(2, 3, dtype=torch.float64, grad=True), randn(2, 3, dtype=torch.float64, grad=True)
    assert torch.autograd.gradcheck(lambda x, g: normalized_step(x, g, 0.5), (x, g))
    assert normalized_step(x[:0], g[:0], 1.0).shape == (0, 3)


def sam_by_hand(model, loss_of, rho, lr, adaptive):
    """Two gradients and a step, written out in float64."""
    ps = list(model.parameters())
    grads = torch.autograd.grad(loss_of(model), ps)
    before = [p.detach().clone() for p in ps]
    peak, _ = climbed(before, grads, rho, adaptive, 0)
    with torch.no_grad():
        for p, q in zip(ps, peak):
            p.copy_(q)
    grads = torch.autograd.grad(loss_of(model), ps)
    with torch.no_grad():
        for p, w, g in zip(ps, before, grads):
            p.copy_(w - lr * g)


@pytest.mark.parametrize("adaptive, swap", [(False, False), (True, False), (False, True)])
def test_sam_trains_as_the_paper_writes_it(adaptive, swap):
    make = lambda: torch.nn.Sequential(
        torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)
    )
    mine, theirs = make().double().to(DEVICE), make().double().to(DEVICE)
    theirs.load_state_dict(mine.state_dict())
    x, y = randn(16, 4, dtype=torch.float64), randn(16, 1, dtype=torch.float64)
    loss_of = lambda m: (m(x) - y).square().mean()
    sam = SAM(torch.optim.SGD(mine.parameters(), lr=0.1), rho=0.2, adaptive=adaptive, swap=swap)

    def closure():
        sam.zero_grad()
        loss = loss_of(mine)
        loss.backward()
        return loss

    for _ in range(3):
        first = loss_of(mine).detach()
        assert sam.step(closure) == first
        sam_by_hand(theirs, loss_of, 0.2, 0.1, adaptive)
    torch.testing.assert_close(list(mine.parameters()), list(theirs.parameters()))
    closure()
    start = values(mine.parameters())
    sam.perturb()
    with pytest.raises(RuntimeError, match="already perturbed"):
        sam.perturb()
    sam.restore()
    assert all(torch.equal(p, w) for p, w in zip(mine.parameters(), start))
    sam.load_state_dict(sam.state_dict())
    assert sam.param_groups is sam.optimizer.param_groups
    with pytest.raises(TypeError, match=r"optimizer: expected a torch\.optim"):
        SAM(list(mine.parameters()))


# ---- torch's contract --------------------------------------------------------------------------------


def test_opcheck():
    ws = [randn(4, 6).t(), randn(2, 3), randn(5, dtype=torch.bfloat16)]
    gs = [randn(6, 4), randn(1, 3).expand(2, 3), randn(5)]
    torch.library.opcheck(ops.perturb_norms.default, (ws, gs, 0.1))
    kept = [torch.empty_like(w) for w in ws]
    torch.library.opcheck(ops.perturb_.default, (ws, gs, randn(3), None, []))
    torch.library.opcheck(ops.perturb_.default, (ws, gs, randn(3)[0], 0.5, kept))
    torch.library.opcheck(ops.perturb_out.default, (ws, gs, randn(3), 0.5, kept))
    torch.library.opcheck(ops.noise_.default, (ws, randn(3), [0.1, 0.2, 0.3], 7, [0, 1, 2]))
    torch.library.opcheck(ops.noise_.default, (ws, randn(3)[0], [0.1, 0.2, 0.3], 7, [0, 1, 2]))


def test_compiles():
    def step(ws, gs, kept):
        norm = sam_perturb_(ws, gs, 0.1, backup=kept)
        moved = [w * 2 for w in ws]
        sam_restore_(ws, backup=kept)
        return norm, moved

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (4, 6):
        ws, gs = [randn(n), randn(n, 2)], [randn(n), randn(n, 2)]
        other, kept = [w.clone() for w in ws], [torch.empty_like(w) for w in ws]
        got = compiled(ws, gs, kept)
        torch.testing.assert_close(got, step(other, gs, [torch.empty_like(w) for w in ws]))
        assert all(torch.equal(a, b) for a, b in zip(ws, other))


@pytest.mark.no_interpreter
def test_same_bits_for_any_thread_count_and_company():
    shapes = [(300, 70), (70000,), (64, 3, 7, 7)]
    start, grads = [of(s) for s in shapes], [of(s) for s in shapes]
    found, before = [], torch.get_num_threads()
    try:
        for threads, company in ((1, 0), (2, 0), (2, 5)):
            torch.set_num_threads(threads)
            ws = [*(torch.zeros(50, 20) for _ in range(company)), *(w.clone() for w in start)]
            gs = [*(torch.zeros(50, 20) for _ in range(company)), *grads]
            norm = sam_perturb_(ws, gs, 0.1, adaptive=True)
            names = {f"p{i - company}": w for i, w in enumerate(ws)}
            perturb_weights_(names, 0.1, 3)
            found.append([*ws[company:], norm])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other))


W = torch.ones(3)
BAD = [
    (lambda: sam_perturb_(3), TypeError, "parameters: expected a tensor, an iterable"),
    (lambda: sam_perturb_([W], rho=-1), ValueError, "rho: expected a finite number"),
    (lambda: sam_perturb_([W], eta=-1), ValueError, "eta: expected a finite number"),
    (lambda: sam_perturb_([W], eps=math.nan), ValueError, "eps: expected a finite number"),
    (lambda: sam_perturb_([W], [W, W]), ValueError, "gradients: expected 1 tensors"),
    (lambda: sam_perturb_([W], [W[:2]]), ValueError, r"gradients\[0\]: expected shape \(3,\)"),
    (lambda: sam_perturb_([W.long()], [W]), TypeError, r"parameters\[0\]: expected a dense"),
    (lambda: sam_perturb_([W[:1].expand(3)], [W]), ValueError, r"parameters\[0\]: expanded"),
    (lambda: sam_perturb_([W, W], [W, W]), ValueError, "the same tensor is given twice"),
    (lambda: sam_perturb_({"a": W}, [W]), TypeError, "gradients: expected a mapping"),
    (lambda: sam_perturb_({"a": W}, {"b": W}), ValueError, r"gradients: keys missing .*\['a'\]"),
    (lambda: sam_perturb_([W], [W], backup=[]), ValueError, "backup: expected 1 tensors"),
    (
        lambda: sam_perturb_([W], [W], backup=[W]),
        ValueError,
        r"parameters\[0\] and backup\[0\] overlap",
    ),
    (
        lambda: sam_perturb_([W], [W], backup=[W.double()]),
        TypeError,
        r"backup\[0\]: expected torch",
    ),
    (lambda: sam_perturb_([W], [W], swap=True), ValueError, "swap: expected a backup"),
    (lambda: sam_restore_([W], swap=True), ValueError, "swap: expected a backup"),
    (lambda: sam_restore_([W]), ValueError, "gradients, norm: expected those of sam_perturb_"),
    (lambda: sam_restore_([W], [W], W), ValueError, "gradients, norm: expected those"),
    (lambda: sam_restore_([W], [W], W[0], adaptive=True), ValueError, "backup: an adaptive step"),
    (
        lambda: sam_restore_([W.half()], [W], W[0]),
        ValueError,
        r"parameters\[0\]: w \+ e - e drifts in torch.float16",
    ),
    (lambda: sam_restore_([W], [W], W[0], add=[W[:2]]), ValueError, "add: expected a tensor of"),
    (lambda: perturb_weights_([W], -1, 0), ValueError, "rho: expected a finite number"),
    (lambda: perturb_weights_([W], 1, -1), ValueError, "seed: expected an int in"),
    (lambda: perturb_weights_([W], 1, 0.5), TypeError, "seed: expected an int"),
    (lambda: perturb_weights_([W], 1, 0, scope="row"), ValueError, "scope: expected one of"),
    (lambda: normalized_step(W, W[:2], 1), ValueError, r"g: expected shape \(3,\)"),
    (lambda: normalized_step(W[0], W[0], 1), ValueError, "x: expected at least 1 dim"),
]


@pytest.mark.parametrize("call, error, message", BAD, ids=range(len(BAD)))
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
