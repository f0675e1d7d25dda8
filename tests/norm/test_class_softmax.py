"""The passes over classes in blocks: kernel against reference and float64, tiles and the widened products."""

import pytest
import torch
import torch.nn.functional as F
from helpers import double, randn, relative_error

import solera
from solera._route import AT_IMPORT
from solera.norm import arcface, normalized_softmax_cross_entropy
from solera.norm import class_softmax as core

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(),
    reason="these passes are the CPU's; the suite's tensors lie elsewhere",
)

HALVES = (
    torch.bfloat16,
    torch.float16,
)  # the first on tiles where there are some, the other widened
SHAPES = ((5, 7, 3), (33, 2100, 40), (64, 300, 48), (40, 1, 32), (1, 65, 17))  # B, C, d
ops = torch.ops.solera


def problem(dtype, rows, classes, d):
    x, weight = randn(rows, d, dtype=dtype), randn(classes, d, dtype=dtype)
    y = torch.randint(classes, (rows,))
    weight[y] = (x.float() / 2 + randn(rows, d)).to(dtype)  # labels that some rows find
    if rows > 3:
        y[2] = -100
    return x, weight, y


def inverses(*tensors):
    return [1 / t.float().norm(dim=1).clamp(min=core.EPS) for t in tensors]


def cosines(x, weight):
    return F.normalize(x.double()) @ F.normalize(weight.double()).t()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_statistics(dtype, shape):
    x, weight, y = problem(dtype, *shape)
    scale = torch.rand(len(x)) * 60
    args = (x, weight, y, scale, *inverses(x, weight))
    c = cosines(x, weight)
    other = torch.arange(len(weight)) != y[:, None]
    z = torch.where(other, c * scale[:, None].double(), float("-inf"))
    left_out = y < 0
    want = torch.where(left_out, 0.0, z.logsumexp(1))
    mean = torch.where(left_out, 1.0, torch.where(other, z.softmax(1).nan_to_num() * c, 0.0).sum(1))
    for function in (ops.class_statistics, core._class_statistics):
        others, means, kept = function(*args, True)
        torch.testing.assert_close(others.double(), want, rtol=2e-6, atol=2e-5)
        torch.testing.assert_close(means.double(), mean, rtol=1e-5, atol=1e-5)
        assert kept.dtype == torch.int16 and kept.shape == (len(weight), core.padded(len(x)))
        assert (kept[:, : len(x)].t() / core.STEPS - c).abs().max() <= 0.51 / core.STEPS + 1e-6
        assert not kept[:, len(x) :].any()
        short = function(*args, False)
        assert torch.equal(short[0], others) and short[2].shape == (0, core.padded(len(x)))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradient_of_given_cosines(dtype, shape):
    x, weight, y = problem(dtype, *shape)
    scale, share, label = torch.rand(len(x)) * 30, torch.rand(len(x)), -torch.rand(len(x))
    if len(x) > 3:
        share[2], label[2] = 0, 0
    args = (x, weight, y, scale, *inverses(x, weight))
    others, _, kept = ops.class_statistics(*args, True)
    given_ = (x, weight, y, kept, *args[3:], others, share, label)

    wide = [t.requires_grad_() for t in double(x, weight)]
    c = F.normalize(wide[0]) @ F.normalize(wide[1]).t()
    at = torch.arange(len(weight)) == y[:, None]
    fixed = (c.detach() * scale[:, None] - others[:, None]).exp() * (share * scale)[:, None]
    slope = torch.where(at, label[:, None].double(), torch.where(share[:, None] == 0, 0.0, fixed))
    want = torch.autograd.grad(c, wide, slope)
    limit = {torch.bfloat16: 3e-3, torch.float16: 1e-3}[dtype]
    for function in (ops.class_gradient, core._class_gradient):
        got = function(*given_, True, True)
        assert [g.dtype for g in got] == [dtype, dtype]
        assert all(relative_error(a, b) <= limit for a, b in zip(got, want))
        assert torch.equal(function(*given_, True, False)[0], got[0])
        assert torch.equal(function(*given_, False, True)[1], got[1])
        assert [t.shape for t in function(*given_, False, False)] == [(0,), (0,)]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_opcheck(dtype):
    x, weight, y = problem(dtype, 9, 40, 6)
    args = (x.t().contiguous().t(), weight, y, torch.rand(9), *inverses(x, weight))
    torch.library.opcheck(ops.class_statistics.default, (*args, True))
    others, _, kept = ops.class_statistics(*args, True)
    rest = (others, torch.rand(9), torch.rand(9), True, True)
    given_ = (args[0], weight, y, kept, *args[3:], *rest)
    torch.library.opcheck(ops.class_gradient.default, given_)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_nan_reaches_what_it_touches(dtype):
    x, weight, y = problem(dtype, 6, 50, 8)
    y[2] = 0
    x[1, 3] = float("nan")
    with torch.no_grad():
        loss = normalized_softmax_cross_entropy(x, weight, y, reduction="none")
    assert loss.isnan().tolist() == [False, True, False, False, False, False]
    x, weight = x.requires_grad_(), weight.requires_grad_()
    loss = normalized_softmax_cross_entropy(x, weight, y, reduction="none")
    dx, dweight = torch.autograd.grad(loss.sum(), (x, weight))
    assert dx[1].isnan().all() and not dx[0].isnan().any() and dweight.isnan().all()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("value", [0.0, 1e-30, 1e4])
def test_lengths_at_the_ends_of_the_range(dtype, value):
    """Vectors of length 0, or so short that EPS counts, or long."""
    x, weight, y = problem(dtype, 8, 30, 16)
    x[0], weight[3] = value, value
    wide = [t.requires_grad_() for t in double(x, weight)]
    x, weight = x.requires_grad_(), weight.requires_grad_()
    got = normalized_softmax_cross_entropy(x, weight, y, scale=8.0)
    hot = F.normalize(wide[0]) @ F.normalize(wide[1]).t()
    want = F.cross_entropy(8 * hot, y, ignore_index=-100)
    grads = zip(torch.autograd.grad(got, (x, weight)), torch.autograd.grad(want, wide))
    assert relative_error(got, want) <= 1e-5
    for a, b in grads:
        rows = (slice(1, None), slice(None)) if len(a) == 8 else (torch.arange(30) != 3,)
        assert relative_error(a[rows[0]], b[rows[0]]) <= 8e-3
        assert not a.isnan().any()  # float16 has no 1e12, the slope at length 0: infinite


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_same_bits_for_any_thread_count(dtype):
    x, weight, y = problem(dtype, 70, 3000, 64)

    def run():
        p, q = x.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = normalized_softmax_cross_entropy(p, q, y, margin=0.2)
        return loss.detach(), *torch.autograd.grad(loss, (p, q))

    first, threads = run(), torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 3)
        second = run()
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_like_the_loop_over_rows(dtype, reduction, monkeypatch):
    """Scale, extra negatives, a kept graph and a factor from outside: as where B is past 2 d."""
    x, weight, y = problem(dtype, 12, 90, 8)
    inputs = [t.requires_grad_() for t in (x, weight)]
    scale = torch.tensor(7.0, requires_grad=True)
    extra = (torch.rand(12, 3) - 0.5).requires_grad_()
    factor = torch.rand(12) if reduction == "none" else torch.tensor(3.0)

    def run():
        loss = normalized_softmax_cross_entropy(
            *inputs, y, scale=scale, margin=arcface(0.3), extra_negatives=extra, reduction=reduction
        )
        wanted = (*inputs, scale, extra)
        first = torch.autograd.grad(loss, wanted, factor, retain_graph=True)
        second = torch.autograd.grad(loss, wanted, factor)
        assert all(torch.equal(a, b) for a, b in zip(first, second))
        return loss.detach(), *first

    got = run()
    monkeypatch.setattr(core, "suits", lambda x, weight: False)
    want = run()
    limit = {torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    assert all(relative_error(a, b) <= limit for a, b in zip(got, want))


def test_what_it_suits():
    x, weight = randn(8, 4, dtype=torch.bfloat16), randn(9, 4, dtype=torch.bfloat16)
    # Where Triton serves CPU tensors, the loop over rows stands for a GPU's.
    assert core.suits(x, weight) == (AT_IMPORT != "triton")
    assert not core.suits(x.float(), weight.float())  # float32 has its gradient for a sum
    assert not core.suits(x, weight.float())
    assert not core.suits(torch.cat([x, x]), weight)  # more cosines than the sum they save


def test_no_float32_of_the_weights_size():
    x, weight, y = problem(torch.bfloat16, 8, 4096, 64)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        normalized_softmax_cross_entropy(x, weight, y, margin=0.3)
    assert all(t is weight or t.numel() <= 4096 * core.padded(8) for t in saved)
    with solera.backend("reference"):
        normalized_softmax_cross_entropy(x, weight, y)
