"""Core grad_step: Stable-SPAM, Fira and normalised momentum against their formulas in float64."""

import copy
import math

import pytest
import torch
from helpers import DEVICE, DTYPES, INTERPRETED, ULP, randn, relative_error

import solera
from solera.norm import (
    StableSPAM,
    StableSpamState,
    fira_residual_,
    normalized_momentum_step_,
    stable_spam_step_,
)

ops = torch.ops.solera
SHAPES = [(3, 5), (7,), (), (2, 1500), (0, 4), (40, 30)]


def of(shape, **options):
    """randn of a shape that may be ()."""
    return randn(*(shape or (1,)), **options).reshape(shape)


def slack(dtype):
    return ULP[dtype] * (2 if INTERPRETED and dtype == torch.bfloat16 else 1)


class Formula:
    """Stable-SPAM in float64, tensor by tensor, as the paper states it; t is never restarted."""

    def __init__(self, p, lr, betas, eps, wd, gammas, theta, every, cosine=None):
        self.p = p.detach().double().clone()
        self.lr, self.betas, self.eps, self.wd = lr, betas, eps, wd
        self.gammas, self.theta, self.every, self.cosine = gammas, theta, every, cosine
        self.m1 = self.v1 = torch.zeros_like(self.p)
        self.mx = self.m = self.v = 0.0
        self.t = self.k = 0

    def step(self, grad):
        g = grad.double()
        if self.every and self.k == self.every:
            self.m1, self.v1, self.k = torch.zeros_like(self.p), torch.zeros_like(self.p), 0
        self.t, self.k = self.t + 1, self.k + 1
        (b1, b2), (g1, g2) = self.betas, self.gammas
        if self.cosine:
            f = 0.75 + 0.25 * math.cos(math.pi * min(self.t / self.cosine, 1))
            b1, g1 = b1 * f, g1 * f
        if g.numel():
            largest = g.abs().max()
            self.mx = self.theta * self.mx + (1 - self.theta) * largest
            mxh = self.mx / (1 - self.theta**self.t)
            g = torch.where(g.abs() > mxh, g * mxh / largest, g)
            n = g.norm()
            self.m = g1 * self.m + (1 - g1) * n
            self.v = g2 * self.v + (1 - g2) * n * n
            mh, vh = self.m / (1 - g1**self.t), self.v / (1 - g2**self.t)
            g = g / n * mh / (vh**0.5 + self.eps) if n > 0 else g
        self.m1 = b1 * self.m1 + (1 - b1) * g
        self.v1 = b2 * self.v1 + (1 - b2) * g * g
        mh, vh = self.m1 / (1 - b1**self.k), self.v1 / (1 - b2**self.k)
        self.p = (1 - self.lr * self.wd) * self.p - self.lr * mh / (vh.sqrt() + self.eps)


SETTINGS = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}


@pytest.mark.parametrize("cosine", [None, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_stable_spam_against_the_formula(dtype, cosine):
    ps = [of(s, dtype=dtype) for s in SHAPES]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    state = StableSpamState.start(ps, dtype=wide)
    exact = [Formula(p, 0.01, (0.8, 0.95), 1e-6, 0.1, (0.6, 0.9), 0.9, 3, cosine) for p in ps]
    for step in range(7):
        grads = [of(s, dtype=dtype, scale=10.0 if step == 3 else 1.0) for s in SHAPES]
        if step == 5:
            grads[0].zero_()
        # One step of rounding at a time where the parameters themselves are rounded.
        for p, e, g in zip(ps, exact, grads):
            e.p = p.double()
            e.step(g)
        stable_spam_step_(
            ps, grads, state, gammas=(0.6, 0.9), theta=0.9, reset_every=3, cosine_steps=cosine,
            **SETTINGS,
        )  # fmt: skip
        for p, e in zip(ps, exact):
            limit = 1e-12 if dtype == torch.float64 else max(slack(dtype), 2e-6)
            assert relative_error(p, e.p) <= limit, step
    assert state.step == 7 and state.since_reset == 1
    for m, e in zip(state.exp_avg, exact):
        assert relative_error(m, e.m1) < 1e-4


def test_clipping_goes_on_after_a_reset():
    """Caution: restarting t would inflate the kept maximum by 1 / (1 - theta) and clip nothing."""
    p, state = [randn(100)], None
    state = StableSpamState.start(p)
    for _ in range(50):
        stable_spam_step_(p, [randn(100)], state, reset_every=10, theta=0.99)
    threshold = float(state.gradient[0, 0] / (1 - 0.99**state.step))
    assert threshold < 6  # of standard normal gradients: about 2.5


def test_stable_spam_optimizer():
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Linear(8, 1)).to(DEVICE)
    model[1].half()
    by_hand = [p.detach().clone() for p in model.parameters()]
    state = [StableSpamState.start(by_hand[:2]), StableSpamState.start(by_hand[2:])]
    optimizer = StableSPAM(model.parameters(), lr=0.01, weight_decay=0.1, update_proj_gap=2)
    for step in range(5):
        for p in model.parameters():
            p.grad = of(p.shape, dtype=p.dtype)
        if step == 3:  # travels through a state_dict
            saved = copy.deepcopy(optimizer.state_dict())
            optimizer = StableSPAM(model.parameters(), lr=1.0)
            optimizer.load_state_dict(saved)
            kept = [optimizer.state[p]["gradient"] for p in model.parameters()]
            assert all(t.dtype == torch.float32 for t in kept)  # also a half parameter's
        optimizer.step()
        grads = [p.grad for p in model.parameters()]
        options = {"lr": 0.01, "weight_decay": 0.1, "reset_every": 2}
        stable_spam_step_(by_hand[:2], grads[:2], state[0], **options)
        stable_spam_step_(by_hand[2:], grads[2:], state[1], **options)
    for p, q in zip(model.parameters(), by_hand):
        torch.testing.assert_close(p.detach(), q)
    model.zero_grad()
    assert optimizer.step(lambda: 3.0) == 3.0  # nothing to do
    x = torch.nn.Parameter(torch.full((4,), 3.0, device=DEVICE))
    optimizer = StableSPAM([x], lr=0.05)
    for _ in range(20 if INTERPRETED else 200):
        optimizer.zero_grad()
        x.square().sum().backward()
        optimizer.step()
    assert x.detach().abs().max() < (2.5 if INTERPRETED else 0.5)


def fira_exact(g, r, q, a, left):
    g, r, q, a = (t.double() for t in (g, r, q, a))
    dim = 0 if left else 1
    phi = a.norm(dim=dim, keepdim=True) / (r.norm(dim=dim, keepdim=True) + 1e-8)
    return (g - (q @ r if left else r @ q)) * phi


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_fira_against_the_formula(dtype):
    gs, rs, qs, As, sides = [], [], [], [], []
    for m, n, r, left in (
        (8, 40, 3, True),
        (40, 8, 3, False),
        (30, 1100, 5, True),
        (9, 9, 2, True),
    ):
        g = randn(m, n, dtype=torch.float64)
        u, _, vh = torch.linalg.svd(g, full_matrices=False)
        q = u[:, :r] if left else vh[:r]
        reduced = q.mT @ g if left else g @ q.mT
        gs.append(g.to(dtype)), rs.append(reduced.to(dtype)), qs.append(q.to(dtype))
        As.append(randn(*reduced.shape, dtype=dtype)), sides.append(left)
    truth = [fira_exact(*entry) for entry in zip(gs, rs, qs, As, sides)]
    previous = torch.zeros(4, dtype=torch.float64, device=DEVICE)
    again = [g.clone() for g in gs]
    fira_residual_(gs, rs, qs, As, previous)
    limit = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 0.05}[dtype]
    for g, exact, n in zip(gs, truth, previous):
        assert relative_error(g, exact) < limit
        assert abs(n / exact.norm() - 1) < limit
    # The next step is held to 1.01 of half that norm.
    previous.mul_(0.5)
    fira_residual_(again, rs, qs, As, previous, 1.01)
    for g, exact in zip(again, truth):
        assert relative_error(g, exact * 0.505) < 2 * max(limit, 1e-8)
    if dtype == torch.float64:
        one = randn(8, 40, dtype=dtype)
        before = torch.zeros((), dtype=dtype, device=DEVICE)
        exact = fira_exact(one, rs[0], qs[0], As[0], True)
        fira_residual_(one, rs[0], qs[0], As[0], before)
        torch.testing.assert_close(one, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_normalized_momentum(dtype):
    ps = [of(s, dtype=dtype) for s in SHAPES]
    grads = [of(s, dtype=dtype) for s in SHAPES]
    moved = [of(s, dtype=torch.float32 if dtype != torch.float64 else dtype) for s in SHAPES]
    m = [0.7 * a.double() + 0.3 * g.double() for a, g in zip(moved, grads)]
    norm = torch.cat([t.flatten() for t in m]).norm()
    truth = [p.double() - 0.5 * t / norm for p, t in zip(ps, m)]
    normalized_momentum_step_(ps, grads, moved, lr=0.5, beta=0.7)
    for p, exact, a, t in zip(ps, truth, moved, m):
        assert relative_error(p, exact) <= max(slack(dtype), 1e-15)
        assert relative_error(a, t) <= max(3e-7 if dtype != torch.float64 else 0, 1e-15)
    # The step's length is lr whatever the gradient's.
    start = [randn(50, dtype=torch.float64)]
    x, zero = [start[0].clone()], [torch.zeros(50, dtype=torch.float64, device=DEVICE)]
    normalized_momentum_step_(x, [1e5 * start[0]], zero, lr=0.25)
    torch.testing.assert_close((x[0] - start[0]).norm().item(), 0.25)


def test_backends_agree():
    mine = [of(s) for s in SHAPES]
    plain = [t.clone() for t in mine]
    grads = [of(s) for s in SHAPES]
    states = [StableSpamState.start(mine) for _ in range(2)]
    for _ in range(3):
        stable_spam_step_(mine, grads, states[0], **SETTINGS)
        with solera.backend("reference"):
            stable_spam_step_(plain, grads, states[1], **SETTINGS)
    for a, b in zip(mine, plain):
        torch.testing.assert_close(a, b)


def test_opcheck():
    lists = [[randn(4, 6).t(), randn(5, dtype=torch.bfloat16)] for _ in range(4)]
    lists[3] = [t.abs() for t in lists[3]]
    clip, scale = torch.ones(2, 2, device=DEVICE), torch.ones(2, device=DEVICE)
    torch.library.opcheck(
        ops.adam_step_.default, (*lists, clip, scale, 0.9, 0.1, 0.9, 0.99, 1e-8, 1.0)
    )
    u = [randn(7, 4).t(), randn(6, 5)]
    r, a = ([randn(7, 2).t(), randn(6, 2)] for _ in range(2))
    torch.library.opcheck(ops.fira_scale_.default, (u, r, a))


@pytest.mark.no_interpreter
def test_same_bits_for_any_thread_count():
    start = [randn(300, 70), randn(70000)]
    grads = [randn(300, 70), randn(70000)]
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            ps = [t.clone() for t in start]
            state = StableSpamState.start(ps)
            stable_spam_step_(ps, grads, state)
            u = [grads[0].clone()]
            norm = ops.fira_scale_(u, [start[0][:5].clone()], [grads[0][:5].clone()])
            found.append([*ps, *state.exp_avg, state.gradient, *u, norm])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found))


def _spam(**changes):
    p = [torch.ones(3)]
    options = {"grads": [torch.ones(3)], "state": StableSpamState.start(p)} | changes
    return lambda: stable_spam_step_(p, options.pop("grads"), options.pop("state"), **options)


def _fira(grad=(4, 6), reduced=(2, 6), projector=(4, 2), update=(2, 6)):
    tensors = [torch.ones(*s) for s in (grad, reduced, projector, update)]
    return lambda: fira_residual_(*tensors, torch.zeros(()))


BAD = [
    (_spam(lr=-1), ValueError, "lr: expected a finite number"),
    (_spam(betas=(1.0, 0.9)), ValueError, r"betas\[0\]: expected a number in \[0, 1\)"),
    (_spam(theta=2), ValueError, "theta: expected a finite number"),
    (_spam(grads=[torch.ones(4)]), ValueError, r"grads\[0\]: expected shape \(3,\)"),
    (_spam(grads=[]), ValueError, "grads: expected 1 tensors, got 0"),
    (_spam(state=3), TypeError, "state: expected a StableSpamState"),
    (_spam(state=StableSpamState.start([])), ValueError, "state.exp_avg: expected 1 tensors"),
    (_fira(update=(3, 6)), ValueError, r"reduced\[0\], projector\[0\], update\[0\]: expected"),
    (_fira(projector=(2, 4)), ValueError, r"to go with grad of shape \(4, 6\)"),
    (
        lambda: normalized_momentum_step_([torch.ones(3)], [torch.ones(3)], [], lr=1.0),
        ValueError,
        "momentum: expected 1 tensors",
    ),
    (
        lambda: normalized_momentum_step_([], [], [], lr=float("nan")),
        ValueError,
        "lr: expected a finite number",
    ),
]


@pytest.mark.parametrize("call, error, message", BAD, ids=[m for _, _, m in BAD])
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


# ---- optimisers that are a few lines ----------------------------------------------------------------


def test_lion():
    """Symbolic discovery: u = sign(b1 m + (1 - b1) g), w -= lr (u + wd w), m = b2 m + (1 - b2) g."""
    from solera.weights import ema_, lincomb

    w, g, m = ([randn(5, 4, dtype=torch.float64), randn(3, dtype=torch.float64)] for _ in range(3))
    truth = [p - 0.1 * ((0.9 * a + 0.1 * b).sign() + 0.01 * p) for p, a, b in zip(w, m, g)]
    slow = [0.99 * a + 0.01 * b for a, b in zip(m, g)]
    u = [t.sign_() for t in lincomb([m, g], [0.9, 0.1])]
    lincomb([w, u], [1 - 0.1 * 0.01, -0.1], out=w)
    ema_(m, g, 0.99)
    for a, b in zip((*w, *m), (*truth, *slow)):
        torch.testing.assert_close(a, b)


def test_adam_atan2():
    """Scaling exponents: theta -= lr atan2(m, sqrt v), which needs no epsilon."""
    from solera.weights import ema_, lincomb

    p, g, m = ([randn(6, dtype=torch.float64)] for _ in range(3))
    v = [randn(6, dtype=torch.float64).square()]
    first, second = 0.9 * m[0] + 0.1 * g[0], 0.99 * v[0] + 0.01 * g[0] ** 2
    truth = p[0] - 0.1 * torch.atan2(first, second.sqrt())
    ema_(m, g, 0.9)
    ema_(v, [t.square() for t in g], 0.99)
    lincomb([p, [torch.atan2(a, b.sqrt()) for a, b in zip(m, v)]], [1.0, -0.1], out=p)
    torch.testing.assert_close(p[0], truth)


def test_innaprop():
    """INNAprop: INNA's two-variable form with RMSprop's scaling (alpha, beta its friction and damping)."""
    from solera.weights import ema_, lincomb

    alpha, beta, lr = 0.5, 0.9, 0.1
    x, psi, g = ([randn(6, dtype=torch.float64)] for _ in range(3))
    v = [torch.zeros(6, dtype=torch.float64, device=DEVICE)]
    ema_(v, [t.square() for t in g], 0.99)
    scaled = [t / (s.sqrt() + 1e-8) for t, s in zip(g, v)]
    friction = [(1 / beta - alpha) * lr, -lr / beta]
    new_psi = lincomb([psi, x, psi], [1.0, friction[0], friction[1]])
    new_x = lincomb([x, x, psi, scaled], [1.0, friction[0], friction[1], -beta * lr])
    d = g[0] / ((0.01 * g[0] ** 2).sqrt() + 1e-8)
    common = (1 / beta - alpha) * x[0] - psi[0] / beta
    torch.testing.assert_close(new_x[0], x[0] + lr * (common - beta * d))
    torch.testing.assert_close(new_psi[0], psi[0] + lr * common)
