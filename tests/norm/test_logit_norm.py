"""Core logit_norm and its losses: statistics, values and gradients against the papers' formulas in float64."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, DTYPES, assert_accurate, double, randn, relative_error
from hypothesis import given
from hypothesis import strategies as st

import solera
from solera.norm import (
    aldr_kl_loss,
    comp_sum_loss,
    decoupled_softmax_loss,
    ldr_kl_loss,
    log_stablemax,
    logit_norm_cross_entropy,
    spherical_z_loss,
    stablemax,
    stablemax_cross_entropy,
    z_loss,
)
from solera.norm.logit_norm import MODES

ops = torch.ops.solera
# Past a block of the C++ kernel (1024) and a tile of the Triton kernel (4096).
SHAPES = [(1, 1), (3, 3), (5, 17), (2, 1500), (2, 4100)]


def scores(x):
    return torch.where(x >= 0, x + 1, 1 / (1 - x.clamp(max=0)))


def eager_z(x, y):
    z = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-12).sqrt()
    return F.softplus(0.7 * (1.5 - z.gather(1, y[:, None])[:, 0]), threshold=1e9) / 0.7


def eager_stablemax(x, y):
    p = scores(x) / scores(x).sum(-1, keepdim=True)
    return -p.gather(1, y[:, None])[:, 0].log()


def eager_logit_norm(x, y):
    return F.cross_entropy(x / ((x.norm(dim=-1, keepdim=True) + 1e-7) * 0.2), y, reduction="none")


def eager_segments(x, y):
    parts = x.split([1, x.shape[1] - 1], 1) if x.shape[1] > 1 else (x,)
    size = torch.stack([p.norm(dim=1) for p in parts], 1).mean(1, keepdim=True) + 1e-7
    return F.cross_entropy(x / (size * 0.2), y, reduction="none")


def eager_ldr(x, y):
    picked = x.gather(1, y[:, None])
    c = torch.full_like(x, 0.3).scatter(1, y[:, None], 0.0)
    return 0.6 * (((x - picked + c) / 0.6).logsumexp(1) - math.log(x.shape[1]))


def ours_segments(x, y, **options):
    lengths = [1, x.shape[-1] - 1] if x.shape[-1] > 1 else [1]
    return logit_norm_cross_entropy(x, y, temperature=0.2, segments=lengths, **options)


LOSSES = {
    "z": (lambda x, y, **o: z_loss(x, y, a=0.7, b=1.5, **o), eager_z),
    "stablemax": (stablemax_cross_entropy, eager_stablemax),
    "logit_norm": (
        lambda x, y, **o: logit_norm_cross_entropy(x, y, temperature=0.2, **o),
        eager_logit_norm,
    ),
    "segments": (ours_segments, eager_segments),
    "ldr_kl": (lambda x, y, **o: ldr_kl_loss(x, y, lam=0.6, margin=0.3, **o), eager_ldr),
    "log": (
        lambda x, y, **o: comp_sum_loss(x, y, **o),
        lambda x, y: F.cross_entropy(x, y, reduction="none"),
    ),
}


def batch(rows, width, dtype, grad=True, scale=2.0):
    y = torch.randint(width, (rows,), device=DEVICE)
    return randn(rows, width, dtype=dtype, grad=grad, scale=scale), y


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradient_against_float64(name, shape, dtype):
    ours, eager = LOSSES[name]
    x, y = batch(*shape, dtype)
    d = double(x)
    g = randn(shape[0]).abs() + 0.5
    got = ours(x, y, reduction="none")
    want = eager(d, y)
    assert got.dtype == dtype and got.shape == y.shape
    # Eager's error in the accumulator's dtype, for half: its own bfloat16 arithmetic would forgive anything.
    wide = x.detach().float().requires_grad_() if dtype.itemsize == 2 else x
    today = eager(wide, y)
    (dx,) = torch.autograd.grad(got, x, g.to(dtype))
    (dw,) = torch.autograd.grad(want, d, g.to(dtype).double())
    if shape[1] == 1 and name in ("z", "logit_norm", "segments", "ldr_kl", "stablemax", "log"):
        assert torch.allclose(got.double(), want, atol=1e-6, rtol=1e-2)
        assert dx.abs().max() <= 1e-5
        return
    (dt,) = torch.autograd.grad(today, wide, g.to(dtype).to(wide.dtype))
    if dtype == torch.float64:
        assert relative_error(got, want) <= 1e-13 and relative_error(dx, dw) <= 1e-13
        return
    if dtype == torch.float32 and shape[1] < 20:
        # Of so few elements one rounding decides: two units in the last place.
        assert relative_error(got, want) <= 2.4e-7 and relative_error(dx, dw) <= 2.4e-7
        return
    assert_accurate(got, want, today, "loss")
    assert_accurate(dx, dw, dt, "dx")


def test_z_loss_is_the_papers():
    """softplus(a (b - z_y)) / a, and the gradient written in the paper's form."""
    x, y = batch(6, 9, torch.float64)
    (dx,) = torch.autograd.grad(z_loss(x, y, a=0.4, b=2.0, reduction="sum"), x)
    mean, sd = x.mean(1, keepdim=True), x.std(1, correction=0, keepdim=True)
    z = (x - mean) / sd
    zy = z.gather(1, y[:, None])
    hot = F.one_hot(y, 9).double()
    want = -torch.sigmoid(0.4 * (2.0 - zy)) / sd * (hot - 1 / 9 - z * zy / 9)
    torch.testing.assert_close(dx, want)
    shifted = z_loss(3.0 * x + 5.0, y, a=0.4, b=2.0)
    torch.testing.assert_close(shifted, z_loss(x, y, a=0.4, b=2.0))


def test_spherical_z_loss_is_z_loss_without_logits():
    h, weight = randn(7, 5, dtype=torch.float64, grad=True), randn(11, 5, dtype=torch.float64)
    weight.requires_grad_()
    y = torch.randint(11, (7,), device=DEVICE)
    y[2] = -100
    ours = spherical_z_loss(h, weight, y, a=0.7, b=1.0)
    want = z_loss(h @ weight.t(), y, a=0.7, b=1.0)
    torch.testing.assert_close(ours, want)
    torch.testing.assert_close(
        torch.autograd.grad(ours, (h, weight)), torch.autograd.grad(want, (h, weight))
    )
    with_gram = spherical_z_loss(h, weight, y, a=0.7, b=1.0, gram=(weight.t() @ weight).detach())
    torch.testing.assert_close(with_gram, want)
    assert torch.autograd.gradgradcheck(
        lambda h, w: spherical_z_loss(h, w, y, a=0.7, b=1.0), (h, weight)
    )


def test_stablemax_keeps_float64_digits_in_float32():
    """The paper's code computes in float64: the tail of a nearly certain row is exact here without it."""
    x = torch.tensor([[1e6, -1e6, -1e5], [30.0, -1e7, -2e3], [-5.0, 2.0, 0.0]], device=DEVICE)
    y = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    got = stablemax_cross_entropy(x, y, reduction="none")
    s = scores(x.double())
    want = torch.log1p(s[:, 1:].sum(1) / s[:, 0])
    torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=0)
    p = s / s.sum(1, keepdim=True)
    torch.testing.assert_close(stablemax(x).double(), p, rtol=1e-6, atol=0)
    torch.testing.assert_close(log_stablemax(x).double(), p.log(), rtol=1e-6, atol=1e-6)
    # The paper's gradient: s'(x_i)/S - [i = y] s'(x_i)/s(x_i).
    x, y = batch(4, 6, torch.float64)
    (dx,) = torch.autograd.grad(stablemax_cross_entropy(x, y, reduction="sum"), x)
    s = scores(x)
    slope = torch.where(x >= 0, 1.0, s.square())
    torch.testing.assert_close(dx, slope / s.sum(1, keepdim=True) - F.one_hot(y, 6) * slope / s)


def test_slca_divides_by_the_mean_norm_of_the_tasks():
    x, y = batch(4, 9, torch.float64)
    tasks = [2, 3, 4]
    norm = torch.stack([t.norm(dim=1) for t in x.split(tasks, 1)], 1).mean(1, keepdim=True)
    want = F.cross_entropy(x / (norm * 0.1), y)
    ours = logit_norm_cross_entropy(x, y, temperature=0.1, segments=tasks, eps=0.0)
    torch.testing.assert_close(ours, want)


@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_adaptive_ldr_step(margin):
    x, y = batch(5, 7, torch.float64)
    lam0, alpha = 1.0, 2.0
    before = torch.rand(5, dtype=torch.float64, device=DEVICE) + 0.5
    loss, after = aldr_kl_loss(
        x, y, before, lam0=lam0, alpha=alpha, margin=margin, reduction="none"
    )
    c = torch.full_like(x, margin).scatter(1, y[:, None], 0.0)
    gap = x.detach() - x.detach().gather(1, y[:, None]) + c
    q = (gap / before[:, None]).softmax(1)
    kl = (q * (q * 7).log()).sum(1)
    lam = lam0 * (1 - kl / (alpha * math.log(7)))
    torch.testing.assert_close(after, lam)
    want = lam * (gap / lam[:, None]).logsumexp(1)
    want = want - 0.5 * alpha * math.log(7) / lam0 * (lam - lam0).square()
    torch.testing.assert_close(loss.detach(), want)
    direct = ldr_kl_loss(x, y, lam=lam, margin=margin, reduction="none")
    torch.testing.assert_close(
        torch.autograd.grad(loss.sum(), x), torch.autograd.grad(direct.sum(), x)
    )


def test_comp_sum_losses():
    x, y = batch(6, 5, torch.float64)
    u = ((x - x.gather(1, y[:, None])).exp().sum(1) - 1).detach()
    forms = {
        "log": (1 + u).log(),
        "gce": (1 - (1 + u) ** -0.4) / 0.4,
        "mae": 1 - 1 / (1 + u),
        "exp": u,
    }
    for kind, want in forms.items():
        got = comp_sum_loss(x, y, kind=kind, q=0.4, reduction="none")
        torch.testing.assert_close(got.detach(), want)
        assert torch.autograd.gradcheck(lambda x, k=kind: comp_sum_loss(x, y, kind=k, q=0.4), x)


def test_decoupled_softmax():
    s = randn(4, 8, dtype=torch.float64, grad=True)
    mask = torch.rand(4, 8, device=DEVICE) < 0.4
    mask[0], mask[1], mask[2, :2] = False, True, True
    want = 0.0
    for b in range(4):
        zn = s[b][~mask[b]].exp().sum()
        for p in mask[b].nonzero()[:, 0]:
            want = want - (s[b, p].exp() / (s[b, p].exp() + zn)).log()
    ours = decoupled_softmax_loss(s, mask, reduction="sum")
    torch.testing.assert_close(ours, want)
    (ds,) = torch.autograd.grad(ours, s)
    q = s.exp() / (s.exp() + (s.exp() * ~mask).sum(1, keepdim=True))
    torch.testing.assert_close(ds[mask], -(1 - q)[mask].detach())


# ---- gradients and rows -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck_and_gradgradcheck(name):
    x, y = batch(3, 5, torch.float64)
    y[1] = -100
    loss = lambda x: LOSSES[name][0](x, y)
    assert torch.autograd.gradcheck(loss, x)
    assert torch.autograd.gradgradcheck(loss, x)


def test_gradients_to_temperature_and_lambda():
    x, y = batch(4, 6, torch.float64)
    tau = torch.tensor(0.7, dtype=torch.float64, device=DEVICE, requires_grad=True)
    lam = (torch.rand(4, dtype=torch.float64, device=DEVICE) + 0.5).requires_grad_()
    for loss, t in ((lambda x, t: logit_norm_cross_entropy(x, y, temperature=t), tau),
                    (lambda x, t: ldr_kl_loss(x, y, lam=t, margin=0.2), lam)):  # fmt: skip
        assert torch.autograd.gradcheck(loss, (x, t))
        assert torch.autograd.gradgradcheck(loss, (x, t))


@pytest.mark.parametrize("name", LOSSES)
def test_reductions_and_ignored_rows(name):
    loss, _ = LOSSES[name]
    x, y = batch(6, 5, torch.float32)
    y[[1, 4]] = -100
    with torch.no_grad():
        x[1], x[4] = float("nan"), float("inf")
    each = loss(x, y, reduction="none")
    assert not each[[1, 4]].any() and each[[0, 2, 3, 5]].all()
    torch.testing.assert_close(loss(x, y, reduction="sum"), each.sum())
    torch.testing.assert_close(loss(x, y), each.sum() / 4)
    (dx,) = torch.autograd.grad(loss(x, y), x)
    assert not dx[[1, 4]].any() and dx.isfinite().all()
    torch.testing.assert_close(
        loss(x, y.clone().masked_fill(y == -100, 9), ignore_index=9), loss(x, y)
    )
    assert loss(x, torch.full_like(y, -100)).isnan()
    three = loss(x.reshape(2, 3, 5), y.reshape(2, 3), reduction="none")
    assert torch.equal(three, each.reshape(2, 3))


@pytest.mark.parametrize("name", LOSSES)
def test_empty_strided_and_expanded(name):
    loss, _ = LOSSES[name]
    empty = loss(
        randn(0, 4, grad=True), torch.zeros(0, dtype=torch.int64, device=DEVICE), reduction="sum"
    )
    assert empty == 0
    base, y = randn(6, 8), torch.randint(6, (8,), device=DEVICE)
    for view in (base.t(), base.flip(0).t(), base[:, :1].t().expand(8, 6)):
        assert torch.equal(loss(view, y), loss(view.contiguous(), y))
        leaf = view.detach().requires_grad_()
        (a,) = torch.autograd.grad(loss(leaf, y, reduction="none").sum(), leaf)
        copy_ = view.contiguous().requires_grad_()
        (b,) = torch.autograd.grad(
            loss(copy_, y, reduction="none"), copy_, torch.ones(8, device=DEVICE)
        )
        assert torch.equal(a, b)


def test_masked_and_extreme_logits():
    """-inf leaves a class out; huge logits and denormals stay finite; NaN stays in its row."""
    x = randn(6, 9)
    y = torch.zeros(6, dtype=torch.int64, device=DEVICE)
    x[0, 3:] = float("-inf")
    x[1] = 1e30 * torch.randn(9).to(DEVICE)
    x[2] = 1e-42
    x[3, 4] = float("nan")
    x[4, 1:] = float("-inf")
    x.requires_grad_()
    got = comp_sum_loss(x, y, reduction="none")
    want = F.cross_entropy(x, y, reduction="none")
    torch.testing.assert_close(got, want, equal_nan=True)
    rows = [0, 1, 2, 4, 5]
    (a,) = torch.autograd.grad(got[rows].sum(), x)
    (b,) = torch.autograd.grad(want[rows].sum(), x)
    torch.testing.assert_close(a[rows], b[rows])
    assert not a[0, 3:].any()


@given(
    rows=st.integers(0, 4),
    width=st.integers(1, 70),
    name=st.sampled_from(sorted(LOSSES)),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([1e-3, 1.0, 30.0, 1e3]),
    ignore=st.booleans(),
)
def test_any_shape_dtype_and_scale(rows, width, name, dtype, scale, ignore):
    ours, eager = LOSSES[name]
    x, y = batch(rows, width, dtype, grad=False, scale=scale)
    got = ours(x, y, reduction="none")
    want = eager(x.double(), y) if rows else torch.zeros(0, device=DEVICE)
    tolerance = {
        torch.float64: 1e-9,
        torch.float32: 2e-4,
        torch.bfloat16: 1e-2,
        torch.float16: 2e-3,
    }
    rtol = tolerance[dtype]
    torch.testing.assert_close(
        got.double(), want.double(), rtol=rtol, atol=rtol * (1e-2 + scale / 100)
    )
    if ignore and rows:
        y[0] = -100
        assert torch.equal(ours(x, y, reduction="none")[1:], got[1:])


@pytest.mark.parametrize("name", LOSSES)
def test_same_bits_for_any_thread_count_and_batch(name):
    loss, _ = LOSSES[name]
    x, y = batch(40, 300, torch.float32)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            each = loss(x, y, reduction="none")
            results.append((each, *torch.autograd.grad(each.sum(), x)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))
    each = results[0][0]
    for first, n in ((0, 1), (7, 5)):
        part = slice(first, first + n)
        assert torch.equal(loss(x[part], y[part], reduction="none"), each[part])


@pytest.mark.no_interpreter
def test_large_gradients_take_the_streaming_stores():
    x, y = batch(130, 40000, torch.float32)
    for name in ("z", "stablemax", "logit_norm", "log"):
        loss, _ = LOSSES[name]
        (dx,) = torch.autograd.grad(loss(x, y, reduction="sum"), x)
        few = x.detach()[60:62].requires_grad_()
        (dfew,) = torch.autograd.grad(loss(few, y[60:62], reduction="sum"), few)
        assert torch.equal(dx[60:62], dfew)


def test_nothing_of_the_logits_size_is_kept_but_they():
    for name, (loss, _) in LOSSES.items():
        x, y = batch(16, 512, torch.float32)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            loss(x, y)
        large = {t.data_ptr() for t in saved if t.numel() > 16 * 8}
        assert large <= {x.data_ptr()}, name


# ---- the contract with torch --------------------------------------------------------------------------


@pytest.mark.parametrize("mode", range(len(MODES)), ids=MODES)
def test_opcheck(mode):
    base = randn(6, 4)
    y = torch.tensor([0, -1, 3, 2], device=DEVICE)
    bounds = torch.tensor([0, 2, 6], device=DEVICE) if mode == 3 else None
    scale, columns = torch.rand(4, device=DEVICE) + 0.5, None
    for x in (base.t(), base[:, :1].t().expand(4, 6)):
        if mode == 2:
            columns = torch.rand(6, device=DEVICE)
        args = (x, y, scale, columns, bounds, 1e-7, mode)
        torch.library.opcheck(ops.logit_statistics.default, args)
        a = ops.logit_statistics(*args)[0]
        db = randn(4, 2) if mode == 3 else randn(4)
        given_ = (y, scale, columns, bounds, a, randn(4), db, randn(1).expand(4), mode)
        torch.library.opcheck(ops.logit_gradient.default, (x, *given_))
        torch.library.opcheck(ops.logit_gradient_.default, (x.clone(), *given_))
        inside = x.clone()
        ops.logit_gradient_(inside, *given_)
        assert torch.equal(inside, ops.logit_gradient(x, *given_))
    strided = base.clone().t()
    ops.logit_gradient_(strided, *given_)
    assert torch.equal(strided, ops.logit_gradient(base.t(), *given_))


def compiled_matches(backend):
    def f(x, y):
        return (
            z_loss(x * 2, y, a=0.7, b=1.5)
            + stablemax_cross_entropy(x, y)
            + logit_norm_cross_entropy(x, y, temperature=0.2)
            + ldr_kl_loss(x, y, lam=0.6)
        )

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend=backend)
    for n in (4, 7):
        x, y = batch(n, 16, torch.float32)
        want, got = f(x, y), compiled(x, y)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(torch.autograd.grad(got, x), torch.autograd.grad(want, x))


@pytest.mark.inductor
@pytest.mark.no_interpreter
def test_compile_inductor():
    compiled_matches("inductor")


@pytest.mark.parametrize("name", LOSSES)
def test_torch_func(name):
    loss, _ = LOSSES[name]
    x, y = batch(5, 8, torch.float64)
    f = lambda x: loss(x, y)
    torch.testing.assert_close(torch.func.grad(f)(x.detach()), torch.autograd.grad(f(x), x)[0])
    each = torch.func.vmap(lambda x, y: loss(x, y, reduction="sum"))(x.detach(), y)
    torch.testing.assert_close(each, loss(x, y, reduction="none"))
    direction = randn(5, 8, dtype=torch.float64)
    _, tangent = torch.func.jvp(f, (x.detach(),), (direction,))
    torch.testing.assert_close(tangent, (torch.autograd.grad(f(x), x)[0] * direction).sum())


def test_backend_switch_and_autocast():
    x, y = batch(5, 8, torch.float32)
    for loss, _ in LOSSES.values():
        with solera.backend("reference"):
            want = loss(x, y)
        torch.testing.assert_close(loss(x, y), want)
        assert loss(x.bfloat16(), y).dtype == torch.bfloat16
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            assert loss(x.bfloat16(), y).dtype == torch.float32


def test_modules():
    x, y = batch(5, 8, torch.float32)
    for module, want in (
        (solera.nn.ZLoss(0.7, 1.5), z_loss(x, y, a=0.7, b=1.5)),
        (solera.nn.StableMaxCrossEntropyLoss(), stablemax_cross_entropy(x, y)),
    ):
        for m in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert torch.equal(m(x, y), want)
    assert solera.nn.ZLoss(0.7, 1.5, reduction="none")(x, y).shape == y.shape
