"""Core particles: the corrected step and the resampling against their formulas in float64, and bad input."""

import math

import pytest
import torch
from helpers import DEVICE, DTYPES, INTERPRETED, assert_accurate, double, randn, relative_error
from hypothesis import given
from hypothesis import strategies as st

import solera
from solera.ensemble import afdps_step, fkc_step, smc_resample

ops = torch.ops.solera


def plain_fkc(x, scores, betas, f_div, sigma, dt, noise, drift=0.0, level=None):
    """The formula as written, in the dtype of its arguments."""
    f = drift if isinstance(drift, torch.Tensor) else drift * x
    if level is not None:
        scores = (scores - x) / level**2
    b = torch.as_tensor(betas, dtype=x.dtype, device=x.device).view(-1, *[1] * x.dim())
    S = (b * scores).sum(0)
    y = x + (sigma**2 * S - f) * dt + sigma * math.sqrt(abs(dt)) * noise
    square = lambda t: t.flatten(t.dim() - x.dim() + 1).square().sum(-1)
    spread = square(S) - (b.flatten(1) * square(scores)).sum(0)
    return y, (0.5 * sigma**2 * spread + (b.sum() - 1) * f_div) * dt


def plain_afdps(x, b, g, lap, V, dt, noise):
    y = x + (b - V**2 * g) * dt + V * math.sqrt(abs(dt)) * noise
    rows = lambda t: t.flatten(1).sum(1)
    return y, (0.5 * V**2 * (rows(g * g) - lap) - rows(b * g)) * dt


BETAS = {
    "anneal": [0.7],
    "guidance": [-1.5, 2.5],
    "product": [1.0, 1.0],
    "three": [0.5, -0.25, 1.5],
}
SHAPES = [(5, 1), (3, 7), (33, 64), (4, 2500), (6, 2, 3, 5), (1100, 2), (0, 4)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES[:5] if INTERPRETED else SHAPES, ids=str)
@pytest.mark.parametrize("case", BETAS)
def test_fkc_step_against_the_papers_formula(case, shape, dtype):
    betas = BETAS[case]
    x, noise, drift = (randn(*shape, dtype=dtype) for _ in range(3))
    scores, f_div = randn(len(betas), *shape, dtype=dtype), randn(shape[0], dtype=dtype)
    for f, level in ((drift, None), (0.3, 0.8)):
        args = (x, scores, betas, f_div, 1.3, 0.05, noise)
        y, change = fkc_step(*args, drift=f, noise_level=level)
        exact = [double(a) if isinstance(a, torch.Tensor) else a for a in args]
        f64 = f.double() if isinstance(f, torch.Tensor) else f
        want = plain_fkc(*exact, drift=f64, level=level)
        today = plain_fkc(*args, drift=f, level=level)
        assert y.dtype == dtype and change.shape == (shape[0],)
        assert_accurate(y, want[0], today[0])
        if shape[0]:
            assert relative_error(change, want[1]) <= (1e-12 if dtype == torch.float64 else 2e-6)


def test_fkc_cases_of_the_paper():
    """Annealing, guidance and the product of two in the closed forms that the paper gives."""
    x, noise = randn(9, 12, dtype=torch.float64), randn(9, 12, dtype=torch.float64)
    s = randn(2, 9, 12, dtype=torch.float64)
    sigma, dt, g, div = 1.7, 0.01, 3.0, 0.6
    rows = lambda t: t.sum(-1)
    cases = {
        (g,): rows(0.5 * sigma**2 * g * (g - 1) * s[0] ** 2) + (g - 1) * div,
        (1 - g, g): rows(0.5 * sigma**2 * g * (g - 1) * (s[1] - s[0]) ** 2),
        (1.0, 1.0): rows(sigma**2 * s[0] * s[1]) + div,
    }
    for betas, rate in cases.items():
        got = fkc_step(x, s[: len(betas)], list(betas), div, sigma, dt, noise)[1]
        torch.testing.assert_close(got, rate * dt)
    linear = fkc_step(x, list(s), torch.tensor([1.0, 1.0]), None, sigma, dt, noise, drift=0.05)[1]
    torch.testing.assert_close(linear, (cases[(1.0, 1.0)] - div + 0.05 * 12) * dt)


def test_guidance_of_nearly_equal_scores_keeps_its_digits():
    base = randn(50, 256) * 100
    s = torch.stack([base, base + randn(50, 256) * 1e-3])
    x = randn(50, 256)
    got = fkc_step(x, s, [-6.5, 7.5], 0.0, 1.0, 1.0, x)[1]
    want = 0.5 * 7.5 * 6.5 * (s[1] - s[0]).double().square().sum(-1)
    assert relative_error(got, want) <= 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES[:5] if INTERPRETED else SHAPES, ids=str)
def test_afdps_step_against_the_papers_formula(shape, dtype):
    x, b, g, noise = (randn(*shape, dtype=dtype) for _ in range(4))
    lap = randn(shape[0], dtype=dtype)
    for laplacian in (lap, 0.4, None):
        args = (x, b, g, laplacian, 0.9, 0.03, noise)
        y, change = afdps_step(*args)
        zero = 0.0 if laplacian is None else laplacian
        args64 = [
            double(a) if isinstance(a, torch.Tensor) else a for a in (*args[:3], zero, *args[4:])
        ]
        want = plain_afdps(*args64)
        assert_accurate(y, want[0], plain_afdps(*args[:3], zero, *args[4:])[0])
        if shape[0]:
            assert relative_error(change, want[1]) <= (1e-12 if dtype == torch.float64 else 2e-6)


def test_linear_gaussian_posterior_is_sampled():
    """AFDPS on a Gaussian prior and likelihood: the weighted ensemble has the posterior's mean and variance."""
    torch.manual_seed(3)
    count, steps, y, noise2 = (400, 5, 1.0, 0.5) if INTERPRETED else (20000, 100, 1.0, 0.5)
    dt, V = 1.0 / steps, math.sqrt(2.0)
    posterior = 1 / (1 + 1 / noise2)
    x = randn(count, 1, dtype=torch.float64) * posterior**0.5 + posterior * y / noise2
    logw = torch.zeros(count, dtype=torch.float64, device=DEVICE)
    for _ in range(steps):
        x, change = afdps_step(x, -x, (x - y) / noise2, 1 / noise2, V, dt)
        logw = logw + change
        done = smc_resample(logw, x, ess_threshold=0.5)
        x, logw = done.particles, done.log_weights
    w = torch.softmax(logw, 0)
    mean = (w * x[:, 0]).sum()
    tolerance = 0.25 if INTERPRETED else 0.08
    assert abs(mean - posterior * y / noise2) < tolerance
    assert abs((w * (x[:, 0] - mean) ** 2).sum() - posterior) < tolerance


def exact_resample(logw, u, center=False, clip=None):
    a = logw.double()
    mean = a.mean() if center else 0.0
    a = a - mean
    a = a.clamp(-clip, clip) if clip else a
    w = a.softmax(0)
    points = (u + torch.arange(len(w), device=w.device)) / len(w)
    found = torch.searchsorted(w.cumsum(0), points, right=True).clamp(max=len(w) - 1)
    return found, w, a.logsumexp(0) - math.log(len(w)) + mean, 1 / w.square().sum()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 7, 1025] if INTERPRETED else [1, 7, 1025, 9001])
def test_smc_resample_against_the_formula(count, dtype):
    logw, x = randn(count, dtype=dtype, scale=2.0), randn(count, 3, 5, dtype=dtype)
    for options in ({}, {"center": True, "clip": 1.0}):
        got = smc_resample(logw, x, u=0.37, **options)
        index, w, log_z, ess = exact_resample(logw, 0.37, **options)
        assert (got.indices != index).sum() <= count // 2000  # a boundary may fall on either side
        assert torch.equal(got.particles, x[got.indices])
        assert relative_error(got.weights, w) <= (1e-14 if dtype == torch.float64 else 2e-6)
        torch.testing.assert_close(got.log_z.double(), log_z, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(got.ess.double(), ess, rtol=1e-5, atol=1e-5)
        assert not got.log_weights.any()
        offspring = torch.bincount(got.indices, minlength=count)
        assert ((offspring - count * w).abs() < 1 + 1e-3).all()  # systematic: floor or ceiling
    assert smc_resample(logw, u=0.1).particles is None


def test_threshold_decides_without_the_host():
    logw, x = randn(50), randn(50, 4)
    ess = float(smc_resample(logw, u=0.5).ess)
    kept = smc_resample(logw, x, u=0.5, ess_threshold=0.9 * ess / 50)
    assert torch.equal(kept.indices, torch.arange(50, device=DEVICE))
    assert torch.equal(kept.particles, x) and torch.equal(kept.log_weights, logw)
    taken = smc_resample(logw, x, u=0.5, ess_threshold=1.1 * ess / 50)
    assert torch.equal(taken.indices, smc_resample(logw, u=0.5).indices)
    assert not taken.log_weights.any()


def test_impossible_weights():
    inf = float("inf")
    x = randn(6, 2)
    one = smc_resample(torch.tensor([-inf, 0.0, -inf, -inf, 0.0, -inf], device=DEVICE), x, u=0.25)
    assert one.indices.tolist() == [1, 1, 1, 4, 4, 4] and float(one.ess) == 2.0
    for bad in ([float("nan"), 0.0, 0.0], [inf, 0.0, 0.0], [-inf] * 3):
        got = smc_resample(torch.tensor(bad, device=DEVICE), x[:3], u=0.25)
        assert got.indices.tolist() == [0, 1, 2] and got.weights.isnan().all()
        assert got.ess.isnan() and got.log_z.isnan()
    held = torch.tensor([0.3, -inf, 1.2, -inf, -0.7], device=DEVICE)
    for backend in ("auto", "reference"):
        with solera.backend(backend):
            got = smc_resample(held, x[:5], u=0.25, center=True)
            plain = smc_resample(held, x[:5], u=0.25)
            whole = smc_resample(held, u=0.25, center=True, ess_threshold=0.1)
        assert torch.equal(got.indices, plain.indices)
        torch.testing.assert_close((got.weights, got.log_z), (plain.weights, plain.log_z))
        torch.testing.assert_close(whole.log_weights, held - held[held > -inf].mean())
    big = smc_resample(torch.tensor([1e30, 1e30, -1e30], device=DEVICE), u=0.25)
    assert big.indices.tolist() == [0, 0, 1] or big.indices.tolist() == [0, 1, 1]
    empty = smc_resample(torch.zeros(0, device=DEVICE), x[:0])
    assert empty.indices.shape == (0,) and empty.particles.shape == (0, 2)


@pytest.mark.skipif(INTERPRETED, reason="one program follows another there")
def test_same_bits_for_any_thread_count():
    logw, x, s = randn(20000), randn(20000, 24), randn(2, 20000, 24)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            step = fkc_step(x, s, [0.5, 0.5], 0.1, 1.0, 0.1, x)
            results.append((*step, *smc_resample(logw, x, u=0.3)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))
    part = fkc_step(x[5:9], s[:, 5:9], [0.5, 0.5], 0.1, 1.0, 0.1, x[5:9])
    assert all(torch.equal(a, b[5:9]) for a, b in zip(part, results[0][:2]))


@pytest.mark.no_interpreter
@pytest.mark.parametrize("width", [8, 64, 72, 300])
def test_rows_of_any_width_follow_their_indices(width):
    for scale in (0.1, 2.0, 6.0):  # from one or two offspring each to hundreds of one particle
        x = randn(700, width)
        got = smc_resample(randn(700) * scale, x, u=0.6)
        assert torch.equal(got.particles, x[got.indices])


@given(
    count=st.integers(0, 40),
    scale=st.sampled_from([1e-6, 1.0, 30.0, 1e4]),
    u=st.floats(0, 0.999),
    width=st.integers(0, 9),
    dtype=st.sampled_from(DTYPES),
)
def test_any_weights_give_valid_ascending_indices(count, scale, u, width, dtype):
    logw, x = randn(count, dtype=dtype) * scale, randn(width, count).T
    got = smc_resample(logw, x, u=u)
    assert got.indices.shape == (count,) and got.particles.shape == (count, width)
    if count and torch.isfinite(got.ess):
        assert 0 <= int(got.indices.min()) and int(got.indices.max()) < count
        assert (got.indices.diff() >= 0).all()
        assert torch.equal(got.particles, x[got.indices])
        assert 1 - 1e-4 <= float(got.ess) <= count * (1 + 1e-4)


def test_noise_by_generator_and_seed():
    x, s = randn(6, 3), randn(1, 6, 3)
    first = fkc_step(x, s, [1.0], seed=5)[0]
    assert torch.equal(first, fkc_step(x, s, [1.0], seed=5)[0])
    again = fkc_step(x, s, [1.0], generator=torch.Generator(DEVICE).manual_seed(5))[0]
    assert torch.equal(first, again)
    assert not torch.equal(first, fkc_step(x, s, [1.0], seed=6)[0])
    logw = randn(30)
    draw = lambda: smc_resample(logw, generator=torch.Generator(DEVICE).manual_seed(7)).indices
    assert torch.equal(draw(), draw())


def test_gradients_are_the_formulas():
    new = lambda *shape: randn(*shape, dtype=torch.float64, grad=True)
    x, s, b, noise = new(3, 4), new(2, 3, 4), new(2), new(3, 4)
    f = lambda x, s, b, noise: fkc_step(x, s, b, 0.3, 1.1, 0.2, noise)
    assert torch.autograd.gradcheck(f, (x, s, b, noise), fast_mode=True)
    assert torch.autograd.gradgradcheck(f, (x, s, b, noise), fast_mode=True)
    assert torch.autograd.gradcheck(
        lambda x, b, g: afdps_step(x, b, g, 0.3, 1.1, 0.2, noise.detach()), (x, new(3, 4), new(3, 4)), fast_mode=True
    )  # fmt: skip
    logw = new(6)
    parts = lambda logw: tuple(t for t in smc_resample(logw, u=0.3)[2:])
    assert torch.autograd.gradcheck(parts, (logw,))
    rows = new(6, 2)
    got = smc_resample(logw.detach(), rows, u=0.3)
    (dx,) = torch.autograd.grad(got.particles.sum(), rows)
    assert torch.equal(dx[:, 0], torch.bincount(got.indices, minlength=6).double())


def test_opcheck():
    x, s, noise = randn(4, 6).T, randn(2, 6, 4), randn(1).expand(6, 4)
    betas = torch.tensor([0.5, 1.0], dtype=torch.float64, device=DEVICE)
    args = (x, s, betas, None, randn(6), noise, 0.1, 1.0, 0.1, 0.0)
    torch.library.opcheck(ops.fkc_step.default, args)
    torch.library.opcheck(ops.afdps_step.default, (x, s[0], s[1], None, noise, 1.0, 0.1))
    u = torch.tensor(0.3, dtype=torch.float64, device=DEVICE)
    torch.library.opcheck(ops.smc_resample.default, (randn(6), x, u, 0.5, True, 1.0))


@pytest.mark.no_interpreter
def test_compile_backends_and_torch_func():
    def f(x, s, logw, noise):
        y, change = fkc_step(x, s, [0.5, 1.0], 0.1, 1.0, 0.1, noise)
        return smc_resample(logw + change, y, u=0.3)

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    for count in (4, 6):
        tensors = (randn(count, 3), randn(2, count, 3), randn(count), randn(count, 3))
        for a, b in zip(compiled(*tensors), f(*tensors)):
            torch.testing.assert_close(a, b)
        with solera.backend("reference"):
            want = f(*tensors)
        for a, b in zip(f(*tensors), want):
            torch.testing.assert_close(a, b)
    grad = torch.func.grad(
        lambda x: fkc_step(x, tensors[1], [1.0, 2.0], 0.1, 1.0, 0.1, tensors[3])[0].sum()
    )
    assert torch.equal(grad(tensors[0]), torch.ones_like(tensors[0]))


X, S2 = randn(4, 3), randn(2, 4, 3)
BAD = [
    (lambda: fkc_step([1.0], S2, [1, 1]), TypeError, "x: expected a torch.Tensor"),
    (lambda: fkc_step(X, S2, [1.0]), ValueError, "betas: expected one number for each of 2"),
    (lambda: fkc_step(X, S2, 3), TypeError, "betas: expected numbers"),
    (lambda: fkc_step(X, S2[:, :2], [1, 1]), ValueError, r"scores: expected shape \(2, 4, 3\)"),
    (lambda: fkc_step(X, S2.half(), [1, 1]), TypeError, "scores: expected torch.float32"),
    (lambda: fkc_step(X, 1.0, [1, 1]), TypeError, "scores: expected a tensor"),
    (lambda: fkc_step(X, S2, [1, 1], randn(3)), ValueError, r"f_div: expected shape \(4,\)"),
    (lambda: fkc_step(X, S2, [1, 1], sigma=-1), ValueError, "sigma: expected a finite number"),
    (lambda: fkc_step(X, S2, [1, 1], dt="a"), TypeError, "dt: expected a number"),
    (lambda: fkc_step(X, S2, [1, 1], drift=randn(4)), ValueError, "drift: expected shape"),
    (lambda: fkc_step(X, S2, [1, 1], noise=X, seed=1), ValueError, "noise: given beside"),
    (lambda: fkc_step(X, S2, [1, 1], generator=1), TypeError, "generator: expected"),
    (lambda: afdps_step(X, X[:2], X, None, 1.0, 0.1), ValueError, "b: expected shape"),
    (lambda: afdps_step(X, X, X.half(), None, 1.0, 0.1), TypeError, "grad_mu: expected"),
    (lambda: smc_resample(X), ValueError, "logw: expected 1 dimensions"),
    (lambda: smc_resample(X[0], X), ValueError, "x: expected 3 rows"),
    (lambda: smc_resample(X[0], u=1.0), ValueError, "u: expected a finite number"),
    (lambda: smc_resample(X[0], u=X), ValueError, "u: expected one element"),
    (lambda: smc_resample(X[0], ess_threshold=2), ValueError, "ess_threshold: expected"),
    (lambda: smc_resample(X[0], clip=0.0), ValueError, "clip: expected"),
    (lambda: smc_resample(X[0], u=0.5, generator=torch.Generator()), ValueError, "u: given beside"),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input_is_named(case):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()
