"""Core logit_mixture: scores and combinations, their gradients, their bits, and bad input."""

import math

import function_checks
import pytest
import torch
from helpers import (
    DEVICE,
    DTYPES,
    INTERPRETED,
    SLACK,
    assert_accurate,
    double,
    randn,
    relative_error,
)
from hypothesis import given
from hypothesis import strategies as st

import solera
from solera.ensemble import combine_logits, mix_log_probs, mixture_nll
from solera.ensemble.logit_mixture import mixture_scores

ops = torch.ops.solera
KINDS = ("logit", "log_probability", "probability")
# (rows, models, classes); past a block of the C++ kernel (1024) and, in the last, a tile of the Triton kernel.
SHAPES = [(1, 1, 1), (3, 2, 3), (5, 4, 17), (2, 3, 1500), (2, 2, 2100)]


def formula(logits, weights, space="logit", plausibility=None, temperature=1.0, normalize=True):
    """(B, C) of logits (B, K, C) and weights (B, K)."""
    w = weights[..., None]
    if space == "probability":
        v = (w * logits.softmax(-1)).sum(1).log()
    else:
        v = (w * (logits if space == "logit" else logits.log_softmax(-1))).sum(1)
    v = v / temperature
    if plausibility is not None:
        p = logits[:, 0].softmax(-1)
        v = v.masked_fill(p < plausibility * p.amax(-1, keepdim=True), float("-inf"))
    return v.log_softmax(-1) if normalize else v


def ours(logits, weights, space="logit", **options):
    if space == "probability":
        return mix_log_probs(logits, weights)
    return combine_logits(logits, weights, space=space, **options)


def batch(rows, members, width, dtype=torch.float32, grad=True, scale=2.0):
    logits = randn(rows, members, width, dtype=dtype, grad=grad, scale=scale)
    weights = (torch.rand(rows, members, dtype=torch.float64) + 0.2).to(DEVICE, dtype)
    return logits, weights.requires_grad_(grad)


def exactly(name, a, b, c):
    if a.dtype == torch.float64:
        assert relative_error(a, b) <= 1e-12, name
    elif a.dtype == torch.float32:
        # Responsibilities are exponentials of log p - log q, so that they survive underflow: their error is
        # that of a logarithm of about 10 (2.8e-7 measured, eager's 1e-7).
        assert relative_error(a, b) <= max(6e-7, 2 * SLACK * relative_error(c, b)), name
    else:
        assert_accurate(a, b, c, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("space", KINDS)
def test_combination_and_gradients_against_float64(space, shape, dtype):
    logits, weights = batch(*shape, dtype)
    if space == "probability":
        with torch.no_grad():
            weights /= weights.sum(1, keepdim=True)
    options = {} if space == "probability" else {"temperature": 1.3}
    wide = (logits.detach().float(), weights.detach().float())
    wide = [t.requires_grad_() for t in wide] if dtype.itemsize == 2 else (logits, weights)
    truth = double(logits, weights)
    got = ours(logits, weights, space, **options)
    want = formula(*truth, space, **options)
    today = formula(*wide, space, **options)
    assert got.dtype == dtype and got.shape == (shape[0], shape[2])
    g = randn(*got.shape).to(dtype)
    mine = torch.autograd.grad(got, (logits, weights), g)
    exact = torch.autograd.grad(want, truth, g.double())
    eager = torch.autograd.grad(today, wide, g.to(wide[0].dtype))
    if shape[2] == 1:
        assert all(t.abs().max() <= 1e-2 for t in (got - want, mine[0] - exact[0]))
        return
    for name, a, b, c in zip(
        ("out", "logits", "weights"), (got, *mine), (want, *exact), (today, *eager)
    ):
        exactly(name, a, b, c)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scores_and_gradient_against_float64(shape, dtype):
    rows, members, width = shape
    logits, _ = batch(*shape, dtype)
    target = torch.randint(width, (rows,), device=DEVICE)
    if rows > 2:
        target[1] = -1
    got = mixture_scores((logits,), target)

    def scores(z):
        at = target.clamp(min=0)[:, None, None].expand(rows, members, 1)
        found = z.log_softmax(-1).gather(-1, at)[..., 0].t()
        return torch.where(target < 0, 0.0, found)

    truth = double(logits)
    wide = logits.detach().float().requires_grad_() if dtype.itemsize == 2 else logits
    g = randn(members, rows)
    (dz,) = torch.autograd.grad(got, logits, g.to(got.dtype))
    want, today = scores(truth), scores(wide)
    (exact,) = torch.autograd.grad(want, truth, g.double())
    (eager,) = torch.autograd.grad(today, wide, g.to(today.dtype))
    if width == 1:
        assert not got.any() and not dz.any()
        return
    exactly("score", got, want, today)
    exactly("logits", dz, exact, eager)


@pytest.mark.parametrize("space", KINDS[:2])
@pytest.mark.parametrize("normalize", (True, False))
def test_plausibility_and_raw_combinations(normalize, space):
    logits, weights = batch(4, 3, 30)
    with torch.no_grad():
        weights[:, 1] *= -1
    options = {"plausibility": 0.1, "normalize": normalize, "temperature": 0.7}
    got, want = (
        ours(logits, weights, space, **options),
        formula(*double(logits, weights), space, **options),
    )
    kept = want.isfinite()
    assert 4 < kept.sum() < kept.numel() and torch.equal(got == float("-inf"), ~kept)
    torch.testing.assert_close(got[kept].double(), want[kept], rtol=1e-5, atol=1e-5)
    g = randn(4, 30)
    found = torch.autograd.grad(got, (logits, weights), g)
    d, w = double(logits, weights)
    held = formula(d, w, space, **options)
    exact = torch.autograd.grad(held[kept], (d, w), g.double()[kept])
    for a, b in zip(found, exact):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)
    whole = combine_logits(logits, weights, space=space, plausibility=1.0)
    top = logits[:, 0].argmax(1)
    assert torch.equal(whole.isfinite().nonzero()[:, 1], top)


@pytest.mark.parametrize("space", KINDS)
def test_layouts_are_one_function(space):
    logits, weights = batch(6, 3, 40)
    logits, weights = logits.detach(), weights.detach()
    g = randn(6, 40)

    def run(z, **options):
        leaves = [t.detach().requires_grad_() for t in (z if isinstance(z, list) else [z])]
        w = weights.clone().requires_grad_()
        out = ours(leaves if isinstance(z, list) else leaves[0], w, space, **options)
        dw, *dz = torch.autograd.grad(out, (w, *leaves), g)
        dim = options.get("member_dim", 1)
        return out, dw, torch.stack(dz, 1) if isinstance(z, list) else dz[0].movedim(dim, 1)

    def listed(z):
        return list(z.unbind(1))

    want = run(logits)
    assert all(torch.equal(a, b) for a, b in zip(run(listed(logits)), want))
    if space != "probability":
        assert all(
            torch.equal(a, b)
            for a, b in zip(run(logits.movedim(1, 0).contiguous(), member_dim=0), want)
        )
    strided = logits.mT.contiguous().mT
    assert all(torch.equal(a, b) for a, b in zip(run(strided), want))
    first = logits[:1].expand(6, 3, 40)
    assert torch.equal(ours(first, weights, space), ours(first.contiguous(), weights, space))
    shared = ours(logits, weights[0], space)
    assert torch.equal(shared, ours(logits, weights[:1].expand(6, 3), space))
    apart = logits.reshape(2, 3, 3, 40), weights.reshape(2, 3, 3)
    if space == "probability":
        three = mix_log_probs(*apart, member_dim=2)
    else:
        three = combine_logits(*apart, space=space, member_dim=2)
    assert torch.equal(three, ours(logits, weights, space).reshape(2, 3, 40))


@pytest.mark.parametrize("space", KINDS)
def test_gradcheck_and_double_backward(space):
    logits, weights = batch(2, 3, 4, torch.float64)
    function_checks.differentiates(lambda z, w: ours(z, w, space), (logits, weights))
    if space != "probability":
        raw = lambda z, w: ours(z, w, space, normalize=False, temperature=0.8)
        assert torch.autograd.gradcheck(raw, (logits, weights))
    target = torch.tensor([1, -1], device=DEVICE)
    function_checks.differentiates(lambda z: mixture_scores((z,), target), (logits,))


def test_masked_and_extreme_logits():
    """-inf leaves a class out; offsets cost no accuracy; a weight of 0 and vanishing probabilities have gradients."""
    logits, _ = batch(4, 2, 9, grad=False)
    weights = torch.tensor([0.25, 0.75], device=DEVICE)
    logits[0, :, 3:6] = float("-inf")
    logits[1] += 1e4
    logits[2, :, 1:] -= 300.0
    logits[3] = 1e-42
    for space in ("log_probability", "probability"):
        got = ours(logits, weights, space)
        want = formula(logits.double(), weights.double().expand(4, 2), space)
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=2e-5)
    one = torch.tensor([1.0, 0.0], device=DEVICE, requires_grad=True)
    mixed = mix_log_probs(logits[1:3], one)
    torch.testing.assert_close(mixed, logits[1:3, 0].log_softmax(-1), rtol=1e-5, atol=1e-5)
    (d,) = torch.autograd.grad(mixed[0].sum(), one)
    p = logits[1].double().softmax(-1)
    torch.testing.assert_close(
        d.double(), (p / p[0] - p.sum(1, keepdim=True)).sum(1), rtol=1e-4, atol=1e-4
    )
    logits[0, 0, 0] = float("nan")
    got = combine_logits(logits, weights)
    assert got[0].isnan().any() and not got[1:].isnan().any()
    assert mixture_scores((logits,), torch.full((4,), 2, device=DEVICE))[0, 0].isnan()
    past = mixture_scores((logits,), torch.full((4,), 9, device=DEVICE))
    assert past.isnan().all()


@given(
    rows=st.integers(0, 4),
    members=st.integers(1, 5),
    width=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([1e-3, 1.0, 30.0]),
    space=st.sampled_from(KINDS),
    listed=st.booleans(),
)
def test_any_shape_dtype_and_scale(rows, members, width, dtype, scale, space, listed):
    logits, weights = batch(rows, members, width, dtype, scale=scale)
    got = ours(list(logits.unbind(1)) if listed else logits, weights, space)
    wide = double(logits, weights)
    want = formula(wide[0].log_softmax(-1), wide[1], space)
    if space == "probability":  # the weights need not sum to 1: log-probabilities all the same
        want = want.log_softmax(-1)
    rtol = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 3e-3}[
        dtype
    ]
    finite = want > -80.0  # the plain formula underflows beyond
    torch.testing.assert_close(
        got.double()[finite], want[finite], rtol=rtol, atol=rtol * (0.1 + scale)
    )


def test_same_bits_for_any_thread_count_and_batch():
    logits, weights = batch(14, 3, 40) if INTERPRETED else batch(40, 3, 300)
    target = torch.randint(logits.shape[-1], logits.shape[:1], device=DEVICE)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1,) if INTERPRETED else (1, 2, 3):
            torch.set_num_threads(n)
            outs = [ours(logits, weights, space) for space in KINDS]
            outs.append(mixture_scores((logits,), target).t())
            grads = [torch.autograd.grad(o.square().sum(), logits)[0] for o in outs]
            results.append((*outs, *grads))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))
    for part in (slice(0, 1), slice(7, 12)):
        for i, space in enumerate(KINDS):
            assert torch.equal(ours(logits[part], weights[part], space), results[0][i][part])


@pytest.mark.no_interpreter
def test_large_gradients_take_the_streaming_stores():
    logits, _ = batch(64, 2, 40000)
    target = torch.randint(40000, (64,), device=DEVICE)
    (d,) = torch.autograd.grad(mixture_scores((logits,), target).sum(), logits)
    few = logits.detach()[30:32].requires_grad_()
    (part,) = torch.autograd.grad(mixture_scores((few,), target[30:32]).sum(), few)
    assert torch.equal(d[30:32], part)


@pytest.mark.parametrize("kind", range(3))
def test_opcheck(kind):
    weights = torch.rand(4, 3, device=DEVICE)
    lists = (
        list(randn(4, 3, 6).unbind(1)),
        [randn(6, 4).t() for _ in range(3)],
        [randn(1, 6).expand(4, 6)] * 3,
    )
    target = torch.tensor([0, -1, 3, 2], device=DEVICE)
    # Layouts and the gradients asked for are told apart before the kind is looked at.
    for i, logits in enumerate(lists if kind == 0 else lists[:1]):
        cases = ((True, 0.3, True), (False, 0.0, False))
        for normalize, plausibility, rows_first in cases if i == 0 else cases[:1]:
            options = (kind, 0.7, plausibility, 1, normalize)
            torch.library.opcheck(ops.combine_logits.default, (logits, weights, *options))
            _, top, total = ops.combine_logits(logits, weights, *options)
            every = ((True, True), (False, True), (True, False))
            for needs in every if kind == i == 0 else every[:1]:
                args = (randn(6, 4).t(), logits, weights, top, total, *options, *needs, rows_first)
                torch.library.opcheck(ops.combine_logits_backward.default, args)
        if kind == 0:
            torch.library.opcheck(ops.mixture_scores.default, (logits, target))
            _, top, total = ops.mixture_scores(logits, target)
            for rows_first in (True, False):
                args = (logits, target, top, total, randn(1).expand(3, 4), rows_first)
                torch.library.opcheck(ops.mixture_scores_backward.default, args)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=[
    pytest.mark.inductor, pytest.mark.no_interpreter])])  # fmt: skip
def test_compile(backend):
    def f(z, w):
        mixed = mix_log_probs(z * 2, w)
        return mixed + combine_logits(z, w, space="log_probability", plausibility=0.01).exp()

    function_checks.compiles(f, lambda n: batch(n, 3, 8), backend)


def test_compiled_graph_holds_the_kernels():
    z, w = batch(4, 3, 8)
    assert function_checks.ops_in_graph(lambda z, w: mix_log_probs(z, w).sum(), (z, w)) == {
        "combine_logits",
        "combine_logits_backward",
    }
    target = torch.tensor([[0, 3], [7, 2]], device=DEVICE)
    prior = torch.zeros(3, device=DEVICE)
    z = randn(3, 2, 2, 8, grad=True)
    nll = lambda z: mixture_nll(z, target, prior).nll.sum()
    assert function_checks.ops_in_graph(nll, (z,)) == {"mixture_scores", "mixture_scores_backward"}


@pytest.mark.parametrize("space", KINDS)
def test_torch_func_and_backend_switch(space):
    f = lambda z, w: ours(z, w, space)
    function_checks.works_under_torch_func(f, batch(3, 2, 5))
    logits, weights = batch(5, 3, 8)
    with solera.backend("reference"):
        want = f(logits, weights)
    torch.testing.assert_close(f(logits, weights), want)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert f(logits.bfloat16(), weights).dtype == torch.bfloat16
    target = torch.tensor([0, 3, -1, 7, 2], device=DEVICE)
    with solera.backend("reference"):
        want = mixture_scores((logits,), target)
    torch.testing.assert_close(mixture_scores((logits,), target), want)


BAD = [
    ({"space": "mean"}, ValueError, "space: expected one of"),
    ({"temperature": 0}, ValueError, "temperature: expected a positive"),
    ({"plausibility": 0.0}, ValueError, r"plausibility: expected None or a number in \(0, 1\]"),
    ({"plausibility": 2.0}, ValueError, "plausibility: expected a finite number"),
    ({"reference": 3}, ValueError, "reference: expected a member, 0 to 2"),
    ({"weights": torch.ones(2)}, ValueError, r"weights: expected shape \(3,\)"),
    ({"weights": torch.ones(3, 3)}, ValueError, r"weights: expected shape \(2, 3\)"),
    ({"weights": "x"}, TypeError, "weights: expected a tensor or a list"),
    ({"weights": torch.ones(3, dtype=torch.float64)}, TypeError, "weights: float64"),
    ({"logits": torch.ones(2, 3, 0)}, ValueError, "logits: expected at least one class"),
    ({"logits": [torch.ones(2, 4), torch.ones(2, 5)]}, ValueError, r"logits\[1\]: expected shape"),
    ({"logits": torch.ones(2, 3, 4, dtype=torch.int64)}, TypeError, "logits: expected float32"),
]  # fmt: skip


@pytest.mark.parametrize("options, error, message", BAD, ids=[m for _, _, m in BAD])
def test_bad_input(options, error, message):
    given_ = {"logits": torch.ones(2, 3, 4), **options}
    with pytest.raises(error, match=message):
        combine_logits(given_.pop("logits"), **given_)
    assert math.isclose(float(combine_logits(torch.ones(2, 3, 4)).exp().sum()), 2.0, rel_tol=1e-6)
