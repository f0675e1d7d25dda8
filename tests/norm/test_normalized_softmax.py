"""normalized_softmax_cross_entropy against the plain composition in float64, and its margins."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, DTYPES, double, randn, relative_error

import solera
from solera.norm import (
    _widened,
    adaface,
    arcface,
    batch_negatives,
    cosface,
    madacos,
    normalized_softmax_cross_entropy,
)
from solera.norm import normalized_softmax as core


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    """Several chunks of rows, the last one shorter, and several blocks of a widened weight."""
    monkeypatch.setattr(core, "CHUNK_ELEMENTS", 1)
    monkeypatch.setattr(core, "WIDENED_ELEMENTS", 1)
    monkeypatch.setattr(core, "LEAST_ROWS", 2)
    monkeypatch.setattr(_widened, "ROWS", 4)


def problem(dtype=torch.float64, rows=5, classes=7, d=4):
    x, weight = randn(rows, d, dtype=dtype, grad=True), randn(classes, d, dtype=dtype, grad=True)
    y = torch.randint(classes, (rows,), device=DEVICE)
    return x, weight, y


def plain(x, weight, y, scale, moved=lambda c: c, extra=None):
    """What a user writes today: normalise, product, margin at the label, log-softmax."""
    cosine = F.normalize(x) @ F.normalize(weight).t()
    hot = F.one_hot(y, weight.shape[0]).bool()
    logits = scale * torch.where(hot, moved(cosine), cosine)
    if extra is not None:
        logits = torch.cat([logits, scale * extra], 1)
    return F.cross_entropy(logits, y, reduction="none")


MARGINS = {
    "none": (None, lambda c: c),
    "number": (0.35, lambda c: c - 0.35),
    "cosface": (cosface(0.2), lambda c: c - 0.2),
    "arcface": (arcface(0.5), lambda c: (c.clamp(-1, 1).acos() + 0.5).cos()),
}


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("name", MARGINS)
def test_against_the_plain_composition(name, reduction):
    margin, moved = MARGINS[name]
    x, weight, y = problem()
    want = plain(x, weight, y, 16.0, moved)
    got = normalized_softmax_cross_entropy(
        x, weight, y, scale=16.0, margin=margin, reduction=reduction
    )
    want = want if reduction == "none" else getattr(want, reduction)()
    torch.testing.assert_close(got, want)
    g = torch.rand_like(want)
    torch.testing.assert_close(
        torch.autograd.grad(got, (x, weight), g), torch.autograd.grad(want, (x, weight), g)
    )


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_against_float64(dtype):
    x, weight, y = problem(dtype, 9, 33, 16)
    d = double(x, weight)
    got = normalized_softmax_cross_entropy(x, weight, y, scale=8.0, margin=0.2)
    want = plain(*d, y, 8.0, lambda c: c - 0.2).mean()
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    grads = torch.autograd.grad(got, (x, weight))
    exact = torch.autograd.grad(want, d)
    limit = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
    for a, b in zip((got, *grads), (want, *exact)):
        assert relative_error(a, b) <= limit[dtype]
    assert [g.dtype for g in grads] == [dtype, dtype]


def test_past_pi_arcface_keeps_falling():
    margin = arcface(0.5)
    c = torch.linspace(-1, 1, 201, dtype=torch.float64)
    moved = margin(c, torch.ones_like(c))
    assert (moved.diff() > -1e-9).all()
    assert moved[0] == pytest.approx(-1 - 0.5 * math.sin(0.5))


def test_adaface():
    x, weight, y = problem()
    margin = adaface(m=0.4, h=0.333, momentum=0.01)
    length = x.detach().norm(dim=1)
    mean = 20 + 0.01 * (length.mean() - 20)
    std = 100 + 0.01 * (length.std() - 100)
    z = ((length - mean) / (std + 1e-3) * 0.333).clamp(-1, 1)[:, None]

    def moved(c):
        theta = c.clamp(-0.999, 0.999).acos() - 0.4 * z
        return theta.clamp(1e-3, math.pi - 1e-3).cos() - (0.4 + 0.4 * z)

    want = plain(x, weight, y, 64.0, moved).mean()
    got = normalized_softmax_cross_entropy(x, weight, y, margin=margin)
    torch.testing.assert_close(got, want)
    assert margin.mean == pytest.approx(float(mean)) and margin.std == pytest.approx(float(std))
    ours = torch.autograd.grad(got, (x, weight), retain_graph=True)
    torch.testing.assert_close(ours, torch.autograd.grad(want, (x, weight)))
    assert margin.mean == pytest.approx(float(mean))  # backward moves no statistics


@pytest.mark.parametrize("training", [True, False])
def test_madacos(training):
    x, weight, y = problem()
    a = 0.1
    cosine = (F.normalize(x) @ F.normalize(weight).t()).detach()
    picked = cosine.gather(1, y[:, None])[:, 0]
    t, row = picked.median(0)
    s = (math.log(9999999 * (1 - a) / a) / (1 - t)).clamp(min=32)
    total = (s * cosine[row]).exp().sum() - (s * t).exp()
    m = (t - (total * a / (1 - a)).log() / s).clamp(min=0) if training else 0.0
    want = plain(x, weight, y, s, lambda c: c - m).mean()
    margin = madacos(a)
    margin.training = training
    got = normalized_softmax_cross_entropy(x, weight, y, margin=margin)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(
        torch.autograd.grad(got, (x, weight)), torch.autograd.grad(want, (x, weight))
    )


def test_extra_negatives_from_the_batch():
    """UNPG: in-batch cosines of other classes join the denominator, and get their gradient."""
    x, weight, y = problem(rows=6)
    v = F.normalize(x)
    everything = torch.where(y[:, None] != y[None, :], v @ v.t(), float("-inf"))
    extra = batch_negatives(x, y, whisker=None)
    torch.testing.assert_close(extra, everything)
    want = plain(x, weight, y, 8.0, extra=everything).mean()
    got = normalized_softmax_cross_entropy(x, weight, y, scale=8.0, extra_negatives=extra)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(
        torch.autograd.grad(got, (x, weight)), torch.autograd.grad(want, (x, weight))
    )
    kept = batch_negatives(x, y, whisker=0.1)
    assert (kept == float("-inf")).sum() > (everything == float("-inf")).sum()


def test_gradients_to_scale_and_negatives():
    x, weight, y = problem()
    y[2] = -100
    scale = torch.tensor(4.0, dtype=torch.float64, device=DEVICE, requires_grad=True)
    extra = (torch.rand(5, 3, dtype=torch.float64, device=DEVICE) - 0.5).requires_grad_()
    for margin in (None, 0.3, arcface(0.4)):
        for reduction in ("mean", "none"):
            f = lambda x, w, s, e, m=margin, r=reduction: normalized_softmax_cross_entropy(
                x, w, y, scale=s, margin=m, extra_negatives=e, reduction=r
            )
            assert torch.autograd.gradcheck(f, (x, weight, scale, extra))
    assert torch.autograd.gradgradcheck(f, (x, weight, scale, extra))


def test_a_kept_graph_gives_the_same_gradient_twice():
    x, weight, y = problem(torch.float32)
    loss = normalized_softmax_cross_entropy(x, weight, y, margin=0.3)
    first = torch.autograd.grad(2 * loss, (x, weight), retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(2 * loss, (x, weight))
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(first, second, kept))


def test_frozen_input_or_weight_and_ignored_rows():
    x, weight, y = problem()
    want = torch.autograd.grad(normalized_softmax_cross_entropy(x, weight, y), (x, weight))
    (dx,) = torch.autograd.grad(normalized_softmax_cross_entropy(x, weight.detach(), y), x)
    (dw,) = torch.autograd.grad(normalized_softmax_cross_entropy(x.detach(), weight, y), weight)
    torch.testing.assert_close((dx, dw), want)
    y[1] = -100
    (dx,) = torch.autograd.grad(normalized_softmax_cross_entropy(x, weight, y), x)
    assert not dx[1].any()
    with torch.no_grad():
        loss = normalized_softmax_cross_entropy(x, weight, y, reduction="none")
    assert loss[1] == 0 and not loss.requires_grad


@pytest.mark.parametrize("margin", [None, 0.3, arcface(), madacos()])
def test_inference_mode(margin):
    x, weight, y = problem()
    want = normalized_softmax_cross_entropy(x, weight, y, margin=margin)
    with torch.inference_mode():
        inside = x.clone(), weight.clone()  # tensors that autograd refuses
        assert torch.equal(normalized_softmax_cross_entropy(x, weight, y, margin=margin), want)
        assert torch.equal(normalized_softmax_cross_entropy(*inside, y, margin=margin), want)


def test_a_float32_head_of_float64_features():
    x, weight, y = problem()
    weight = weight.detach().float().requires_grad_()
    got = normalized_softmax_cross_entropy(x, weight, y, scale=8.0)
    want = normalized_softmax_cross_entropy(x, weight.double(), y, scale=8.0)
    torch.testing.assert_close(got, want)
    assert torch.autograd.grad(got, weight)[0].dtype == torch.float32


def test_no_logits_are_kept():
    core.CHUNK_ELEMENTS = 1 << 20
    x, weight, y = problem(torch.float32, 64, 4096, 8)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        normalized_softmax_cross_entropy(x, weight, y, margin=0.3)
    assert max(t.numel() for t in saved) < 64 * 4096


def test_same_bits_twice_and_reference_backend():
    x, weight, y = problem(torch.float32, 40, 300, 16)
    run = lambda: torch.autograd.grad(
        normalized_softmax_cross_entropy(x, weight, y, margin=0.3), (x, weight)
    )
    assert all(torch.equal(a, b) for a, b in zip(run(), run()))
    with solera.backend("reference"):
        torch.testing.assert_close(run(), run())
        want = run()
    assert all(relative_error(a, b) <= 1e-5 for a, b in zip(run(), want))
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert all(relative_error(a, b) <= 1e-5 for a, b in zip(run(), want))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("margin", [None, 0.2, arcface(0.4), adaface()], ids=str)
def test_compile_keeps_the_kernels(margin, reduction):
    torch._dynamo.reset()  # every case compiles the same code anew

    def function():
        own = copy.deepcopy(margin)  # AdaFace's running statistics move at every call
        return lambda x, w, y, scale, extra: normalized_softmax_cross_entropy(
            x, w, y, scale=scale, margin=own, extra_negatives=extra, reduction=reduction
        )

    compiled, eager = (
        torch.compile(function(), fullgraph=True, dynamic=True, backend="aot_eager"), function()
    )  # fmt: skip
    for n in (4, 6):
        x, weight, y = problem(torch.float32, n)
        y[1] = -100
        scale, extra = torch.tensor(8.0, device=DEVICE), randn(n, 3).clamp(-1, 1)
        inputs = [x, weight, scale.requires_grad_(), extra.requires_grad_()]
        call = lambda f: f(x, weight, y, scale, extra)
        got, want = call(compiled), call(eager)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(
            torch.autograd.grad(got.sum(), inputs), torch.autograd.grad(want.sum(), inputs)
        )


def test_opaque_head():
    x, weight, y = (t.detach() for t in problem(torch.float32))
    label, scale = torch.rand(len(x), device=DEVICE), torch.tensor(8.0, device=DEVICE)
    for extra, rows in ((None, None), (randn(len(x), 2), torch.rand(len(x), device=DEVICE))):
        inputs = (x.t().contiguous().t(), weight, y, label, scale, extra, rows, True, True)
        torch.library.opcheck(torch.ops.solera.normalized_softmax.default, inputs)


def test_module():
    x, weight, y = problem(torch.float32)
    module = solera.nn.NormalizedSoftmaxCrossEntropyLoss(4, 7, scale=8.0, margin=arcface(0.4))
    module.load_state_dict({"weight": weight.detach()})
    want = normalized_softmax_cross_entropy(x, weight, y, scale=8.0, margin=arcface(0.4))
    for m in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        torch.testing.assert_close(m.to(DEVICE)(x, y), want)


# ---- bad input ----------------------------------------------------------------------------------------

X, W, Y = randn(3, 4), randn(5, 4), torch.tensor([0, 1, 4], device=DEVICE)
call = normalized_softmax_cross_entropy
BAD = [
    (lambda: call([1.0], W, Y), TypeError, "x: expected a torch.Tensor"),
    (lambda: call(X[0], W, Y), ValueError, "x: expected 2 dimensions"),
    (lambda: call(X, W.t(), Y), ValueError, r"weight: expected shape \(4, 4\)"),
    (lambda: call(X, W.bfloat16(), Y), TypeError, "weight: expected torch.float32"),
    (lambda: call(X, W, Y[:2]), ValueError, r"target: expected shape \(3,\)"),
    (lambda: call(X, W, Y + 1), IndexError, r"target: expected labels in \[0, 5\).*got 5"),
    (lambda: call(X, W, Y, scale=-1.0), ValueError, "scale: expected a finite number"),
    (lambda: call(X, W, Y, margin="big"), TypeError, "margin: expected a number"),
    (lambda: call(X, W, Y, reduction="avg"), ValueError, "reduction: expected one of"),
    (lambda: call(X, W, Y, extra_negatives=W), ValueError, r"extra_negatives: expected shape \(3, 4\)"),
    (lambda: arcface(-1.0), ValueError, "m: expected a finite number"),
    (lambda: madacos(0.0), ValueError, "alpha: expected a number between"),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input_is_named(case):
    function, error, message = BAD[case]
    with pytest.raises(error, match=message):
        function()
