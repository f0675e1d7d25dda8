"""Time-dependent norms, DeepNorm, the layer-normalised LSTM, row_scale and the modulated modules."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, DTYPES, INTERPRETED, assert_accurate, double, randn, relative_error

import solera
from solera.norm import (
    deep_norm,
    deep_norm_constants,
    ln_lstm_cell,
    row_scale,
    time_layer_norm,
    time_parameter,
    time_rms_norm,
)

EPS = 1e-5


def curve(t, p0, p1, w, b):
    s = torch.sigmoid((1 + w) * t[:, None] + b)
    return p1 + s * (p0 - p1)


def formula(kind, x, t, *rows, eps=EPS):
    """The paper's formula: x (B, N, D) normalised, times gamma(t), plus beta(t)."""
    gamma, beta = curve(t, *rows[:4]).to(x.dtype), curve(t, *rows[4:]).to(x.dtype)
    norm = F.layer_norm if kind == "layer" else F.rms_norm
    return norm(x, x.shape[-1:], eps=eps) * gamma[:, None] + beta[:, None]


NORMS = {"layer": time_layer_norm, "rms": time_rms_norm}


def assert_right(value, exact, eager):
    """Compositions over cores that are held to eager's own error elsewhere: half precision to that, else rounding."""
    if value.dtype in (torch.float64, torch.float32):
        assert relative_error(value, exact) < {8: 1e-12, 4: 1e-5}[value.element_size()]
    else:
        assert_accurate(value, exact, eager)


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("times", [3, 1])
@pytest.mark.parametrize("kind", NORMS)
def test_time_norm_against_the_papers_formula(kind, times, dtype):
    x = randn(3, 7, 40, dtype=dtype, grad=True)
    t = randn(times, dtype=dtype, grad=True)
    rows = [randn(40, dtype=dtype, grad=True) for _ in range(8)]
    g = randn(3, 7, 40, dtype=dtype)
    tensors = (x, t, *rows)
    got = NORMS[kind](*tensors, eps=EPS)
    truth, today = formula(kind, *(d := double(*tensors))), formula(kind, *tensors)
    assert_right(got, truth, today)
    for a, b, c in zip(
        torch.autograd.grad(got, tensors, g),
        torch.autograd.grad(truth, d, g.double()),
        torch.autograd.grad(today, tensors, g),
        strict=True,
    ):
        assert a.dtype == dtype
        assert_right(a, b, c)


def test_time_norm_without_beta_and_its_second_derivatives():
    x = randn(2, 3, 4, dtype=torch.float64, grad=True)
    t = randn(2, dtype=torch.float64, grad=True)
    rows = [randn(4, dtype=torch.float64, grad=True) for _ in range(8)]
    zeros = [torch.zeros(4, dtype=torch.float64, device=DEVICE)] * 4
    torch.testing.assert_close(
        time_rms_norm(x, t, *rows[:4], eps=EPS), formula("rms", x, t, *rows[:4], *zeros)
    )
    fast = {"fast_mode": INTERPRETED}  # random projections in place of every element
    for f in NORMS.values():
        assert torch.autograd.gradcheck(lambda *a, f=f: f(*a, eps=0.1), (x, t, *rows), **fast)
    f = lambda *a: time_layer_norm(*a, eps=0.1)
    assert torch.autograd.gradgradcheck(f, (x, t, *rows), **fast)


def test_time_parameter_compiles_and_is_the_published_curve():
    t, rows = randn(5), [randn(6) for _ in range(4)]
    torch.testing.assert_close(time_parameter(t, *rows), curve(t, *rows))
    x, eight = randn(5, 3, 6, grad=True), [*rows, *(randn(6) for _ in range(4))]
    compiled = torch.compile(time_layer_norm, fullgraph=True, dynamic=True, backend="aot_eager")
    got, want = compiled(x, t, *eight), time_layer_norm(x, t, *eight)
    torch.testing.assert_close(got, want)
    g = randn(5, 3, 6)
    torch.testing.assert_close(torch.autograd.grad(got, x, g), torch.autograd.grad(want, x, g))


def test_time_layer_norm_module():
    module = solera.nn.TimeLayerNorm(6, device=DEVICE)
    names = ("param0", "param1", "nodecay_weight", "nodecay_bias")
    assert list(module.state_dict()) == [f"{k}.{n}" for k in ("weight", "bias") for n in names]
    x, log_snr = randn(4, 3, 6), randn(4) * 8
    torch.testing.assert_close(module(x, log_snr), F.layer_norm(x, (6,)))  # as built: plain
    for p in module.parameters():
        torch.nn.init.normal_(p)
    rows = [p for part in (module.weight, module.bias) for p in part()]
    torch.testing.assert_close(module(x, log_snr), formula("layer", x, log_snr / 4, *rows))
    for clone in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(clone(x, log_snr), module(x, log_snr))


R = [randn(4) for _ in range(8)]
BAD = [
    (lambda f: f(randn(4), randn(4), *R), ValueError, "x: expected at least 2 dimension"),
    (lambda f: f(randn(3, 4), randn(2), *R), ValueError, r"t: expected shape \(1,\) or \(3,\)"),
    (lambda f: f(randn(3, 4), 0.5, *R), TypeError, "t: expected a torch.Tensor, got float 0.5"),
    (lambda f: f(randn(3, 4), randn(3), randn(5), *R[1:]), ValueError, "p0_gamma: expected shape"),
    (lambda f: f(randn(3, 4), randn(3), None, *R[1:]), TypeError, "p0_gamma: expected a torch"),
    (lambda f: f(randn(3, 4), randn(3), *R[:7], None), TypeError, "b_beta: expected a torch"),
    (lambda f: f(randn(3, 4), randn(3), *R, eps=-1), ValueError, "eps: expected a finite number"),
]


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input_is_named(case, kind):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call(NORMS[kind])


# ---- DeepNorm ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_deep_norm_against_the_papers_formula(dtype):
    alpha, gain = deep_norm_constants(70)
    assert abs(alpha - 11.83) < 0.01 and alpha * gain == pytest.approx(1)
    x, branch = randn(5, 3, 40, dtype=dtype, grad=True), randn(5, 3, 40, dtype=dtype, grad=True)
    w, b = randn(40, dtype=dtype, grad=True), randn(40, dtype=dtype, grad=True)
    f = lambda x, branch, w, b: F.layer_norm(alpha * x + branch, (40,), w, b)
    tensors, g = (x, branch, w, b), randn(5, 3, 40, dtype=dtype)
    got, truth, today = deep_norm(x, branch, alpha, w, b), f(*(d := double(*tensors))), f(*tensors)
    assert_right(got, truth, today)
    for a, e, c in zip(
        torch.autograd.grad(got, tensors, g),
        torch.autograd.grad(truth, d, g.double()),
        torch.autograd.grad(today, tensors, g),
        strict=True,
    ):
        assert_right(a, e, c)
    if dtype == torch.float32:
        module = solera.nn.DeepNorm(40, layers=70, device=DEVICE)
        module.load_state_dict({"weight": w.detach(), "bias": b.detach()}, strict=True)
        torch.testing.assert_close(module(x, branch), got)
        assert torch.equal(pickle.loads(pickle.dumps(module))(x, branch), module(x, branch))


def test_deep_norm_names_bad_input():
    x = randn(3, 4)
    with pytest.raises(ValueError, match=r"x: expected shape \(2, 4\) to go with branch"):
        deep_norm(x, x[:2], 2.0)
    with pytest.raises(TypeError, match=r"x: expected torch\.float16"):
        deep_norm(x, x.half(), 2.0)
    with pytest.raises(ValueError, match="alpha: expected a finite"):
        deep_norm(x, x, float("inf"))
    for layers in (0, 2.5, True):
        with pytest.raises(ValueError, match="layers: expected a positive int"):
            deep_norm_constants(layers)


# ---- compositions --------------------------------------------------------------------------------------


def test_ln_lstm_cell_against_the_papers_formula():
    B, inner, H = 3, 5, 4
    make = lambda *s: randn(*s, dtype=torch.float64, grad=True)
    x, h, c = make(B, inner), make(B, H), make(B, H)
    w_ih, w_hh, bias = make(4 * H, inner), make(4 * H, H), make(4 * H)
    norms = [(make(n), make(n)) for n in (4 * H, 4 * H, H)]
    got = ln_lstm_cell(x, h, c, w_ih, w_hh, bias, *norms)
    normal = lambda v, p: (
        (v - v.mean(-1, keepdim=True)) / (v.var(-1, correction=0, keepdim=True) + EPS).sqrt() * p[0]
        + p[1]
    )
    i, f, g, o = (normal(x @ w_ih.T, norms[0]) + normal(h @ w_hh.T, norms[1]) + bias).split(H, 1)
    cell = f.sigmoid() * c + i.sigmoid() * g.tanh()
    want = (o.sigmoid() * normal(cell, norms[2]).tanh(), cell)
    torch.testing.assert_close(got, want)
    inputs = (x, h, c, w_ih, w_hh, bias, *(p for pair in norms for p in pair))
    g = [randn(B, H, dtype=torch.float64) for _ in range(2)]
    torch.testing.assert_close(
        torch.autograd.grad(got, inputs, g), torch.autograd.grad(want, inputs, g)
    )
    with pytest.raises(ValueError, match="h: expected 2 dimensions"):
        ln_lstm_cell(x, h[0], c, w_ih, w_hh, bias, *norms)
    compiled = torch.compile(ln_lstm_cell, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, h, c, w_ih, w_hh, bias, *norms), want)


def test_row_scale():
    x, s = randn(3, 2, 4, grad=True), randn(3, grad=True)
    torch.testing.assert_close(row_scale(x, s), x * s[:, None, None])
    mask = (randn(3, 4) > 0).float()
    torch.testing.assert_close(row_scale(x[:, 0], mask), x[:, 0] * mask)
    (ds,) = torch.autograd.grad(row_scale(x, s).sum(), s)
    torch.testing.assert_close(ds, x.sum((1, 2)))
    assert row_scale(x.half(), s).dtype == torch.float16
    with pytest.raises(ValueError, match=r"scale: expected shape \(3,\) or \(3, 4\)"):
        row_scale(x, randn(2))


# ---- modulated modules ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["AdaLayerNorm", "AdaRMSNorm"])
def test_ada_modules(name):
    module = getattr(solera.nn, name)(8, 5, device=DEVICE)
    x, cond = randn(3, 4, 8), randn(3, 5)
    norm = F.layer_norm if name == "AdaLayerNorm" else F.rms_norm
    plain = norm(x, (8,), eps=1e-6)
    torch.testing.assert_close(module(x, cond), plain)  # zero at the start
    assert list(module.state_dict()) == ["adaLN_modulation.1.weight", "adaLN_modulation.1.bias"]
    for p in module.parameters():
        torch.nn.init.normal_(p)
    linear = module.adaLN_modulation[1]
    shift, scale = linear(F.silu(cond)).chunk(2, -1)
    want = plain * (1 + scale[:, None]) + shift[:, None]
    torch.testing.assert_close(module(x, cond), want)
    for clone in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(clone(x, cond), module(x, cond))


def test_ada_layer_norm_zero_is_dits_block():
    module = solera.nn.AdaLayerNormZero(8, 5, device=DEVICE)
    for p in module.parameters():
        torch.nn.init.normal_(p)
    x, cond = randn(3, 4, 8, grad=True), randn(3, 5)
    mlp, attention = (torch.nn.Linear(8, 8, device=DEVICE) for _ in range(2))
    y, rows = module(x, cond)
    h, y = module.between(x, attention(y), rows)
    got = torch.addcmul(h, rows[5].unsqueeze(1), mlp(y))
    modulation = module.adaLN_modulation[1](F.silu(cond)).unsqueeze(1).chunk(6, -1)
    shift, scale, gate, shift2, scale2, gate2 = modulation
    plain = lambda x: F.layer_norm(x, (8,), eps=1e-6)
    want = x + gate * attention(plain(x) * (1 + scale) + shift)
    want = want + gate2 * mlp(plain(want) * (1 + scale2) + shift2)
    torch.testing.assert_close(got, want)
    parameters = (x, *module.parameters())
    g = randn(3, 4, 8)
    torch.testing.assert_close(
        torch.autograd.grad(got, parameters, g), torch.autograd.grad(want, parameters, g)
    )
