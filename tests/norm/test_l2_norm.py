"""Theme l2_norm: unit vectors, SimpleRMSNorm, rescaling, norm_linear, and the papers composed of them."""

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, DTYPES, INTERPRETED, assert_accurate, double, randn
from hypothesis import given
from hypothesis import strategies as st

import solera
from solera.norm import (
    class_shift,
    gated_rms_norm,
    l2_normalize,
    layer_norm,
    maxsim,
    norm_linear,
    rescale_to_norm,
    rms_norm,
    simple_rms_norm,
)

F64 = torch.float64


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def rsqrt_add(x, dim=-1, eps=1e-12):
    return x * (x.square().sum(dim, keepdim=True) + eps).rsqrt()


THEIRS = {"clamp": F.normalize, "rsqrt_add": rsqrt_add}


# ---- l2_normalize ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", THEIRS)
def test_l2_normalize_against_float64(mode, dtype):
    for shape, dim in (((37, 50), -1), ((37, 20), 0), ((2, 3, 4, 5, 30), -1), ((3, 40, 7), 1)):
        x, g = randn(*shape, dtype=dtype, grad=True), randn(*shape, dtype=dtype)
        exact = x.detach().double().requires_grad_()
        eps = 1e-6 if dtype != torch.float16 else 1e-3
        y, today = l2_normalize(x, dim, eps, mode=mode), THEIRS[mode](x, dim=dim, eps=eps)
        truth = THEIRS[mode](exact, dim=dim, eps=eps)
        assert_accurate(y, truth, today)
        got, old = (torch.autograd.grad(t, x, g)[0] for t in (y, today))
        assert_accurate(got, torch.autograd.grad(truth, exact, g.double())[0], old)


def test_l2_normalize_wide_rows_and_zero_rows():
    """Wider than the GPU kernels' register tile; and rows below eps, which are divided by eps."""
    for mode in THEIRS:
        x = randn(3, 8192 + 40, grad=True)
        exact = x.detach().double().requires_grad_()
        y, truth = l2_normalize(x, mode=mode), THEIRS[mode](exact)
        g = torch.randn_like(y)
        assert_accurate(y, truth, F.normalize(x))
        (got,), (want,) = (
            torch.autograd.grad(y, x, g),
            torch.autograd.grad(truth, exact, g.double()),
        )
        assert_accurate(got, want, want.float())
    x = torch.tensor([[0.0, 0.0], [1e-9, 0.0], [3.0, 4.0]], device=DEVICE, requires_grad=True)
    y, today = l2_normalize(x, eps=1e-6), F.normalize(x, eps=1e-6)
    torch.testing.assert_close(y, today)
    g = torch.ones_like(y)
    torch.testing.assert_close(*(torch.autograd.grad(t, x, g)[0] for t in (y, today)))


@pytest.mark.no_interpreter
def test_l2_normalize_gradcheck():
    x = randn(3, 4, dtype=F64, grad=True)
    for mode in THEIRS:
        for dim in (0, -1):
            f = lambda x: l2_normalize(x, dim, 0.1, mode=mode)
            assert torch.autograd.gradcheck(f, x)
            assert torch.autograd.gradgradcheck(f, x)


@given(
    shape=st.lists(st.integers(0, 4), min_size=1, max_size=6),
    dim=st.integers(-6, 5),
    dtype=st.sampled_from(DTYPES),
    mode=st.sampled_from(sorted(THEIRS)),
    swap=st.booleans(),
)
def test_l2_normalize_any_shape(shape, dim, dtype, mode, swap):
    x = randn(*shape, dtype=dtype)
    x = x.transpose(0, -1) if swap else x
    if not -x.dim() <= dim < x.dim():
        with pytest.raises(ValueError, match="dim: expected one of"):
            l2_normalize(x, dim, mode=mode)
        return
    y = l2_normalize(x, dim, mode=mode)
    want = THEIRS[mode](x.double(), dim=dim)
    assert_accurate(y, want, THEIRS[mode](x.float() if x.dtype != F64 else x, dim=dim).to(dtype))


def test_l2_normalize_contract():
    x = randn(4, 6)
    compiled = torch.compile(
        lambda x: l2_normalize(x, 0) + l2_normalize(x, mode="rsqrt_add"),
        fullgraph=True, dynamic=True, backend="aot_eager",
    )  # fmt: skip
    torch.testing.assert_close(compiled(x), l2_normalize(x, 0) + l2_normalize(x, mode="rsqrt_add"))
    torch.testing.assert_close(torch.func.vmap(l2_normalize)(x), l2_normalize(x))
    with solera.backend("reference"):
        torch.testing.assert_close(l2_normalize(x), F.normalize(x))


# ---- simple_rms_norm, rescale_to_norm ----------------------------------------------------------------


def test_simple_rms_norm():
    """x / (|x| / sqrt(D)); with a residual; by heads; gated, as NormAttention uses it."""
    x, r, u = (randn(3, 5, 12, dtype=F64) for _ in range(3))
    srms = lambda x: x / (x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5)
    close(simple_rms_norm(x, 0.0), srms(x))
    y, total = simple_rms_norm(x, 0.0, residual=r)
    close((y, total), (srms(x + r), x + r))
    heads = lambda x: srms(x.unflatten(-1, (3, 4))).flatten(-2)
    close(simple_rms_norm(x, 0.0, heads=3), heads(x))
    y, total = simple_rms_norm(x, 0.0, heads=3, residual=r)
    close((y, total), (heads(x + r), x + r))
    close(gated_rms_norm(x, u, activation=None, eps=0.0), srms(x) * u)
    leaf = x.clone().requires_grad_()
    g = torch.randn_like(x)
    (dx,) = torch.autograd.grad(simple_rms_norm(leaf, 0.0), leaf, g)
    rho = x.square().mean(-1, keepdim=True).rsqrt()
    close(dx, rho * (g - x * (g * x).mean(-1, keepdim=True) * rho**2))


def test_rescale_to_norm_neti():
    """NeTI's token |v| M / |M| and its bypass e + alpha |e| b / |b|."""
    m, e, b = (randn(4, 16, dtype=F64, grad=True) for _ in range(3))
    v = randn(16, dtype=F64, grad=True)
    token = rescale_to_norm(m, v.norm())
    close(token, v.norm() * m / m.norm(dim=-1, keepdim=True))
    bypass = e + rescale_to_norm(b, e.norm(dim=-1, keepdim=True), 0.2)
    want = e + 0.2 * e.norm(dim=-1, keepdim=True) * b / b.norm(dim=-1, keepdim=True)
    close(bypass, want)
    g = torch.randn_like(want)
    close(torch.autograd.grad(bypass, (e, b), g), torch.autograd.grad(want, (e, b), g))
    assert torch.autograd.grad(token.sum(), v)[0].shape == v.shape


# ---- norm_linear -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norm_linear_against_float64(kind, dtype):
    x, nw = randn(3, 21, 40, dtype=dtype, grad=True), randn(40, dtype=dtype, grad=True)
    w, b = randn(24, 40, dtype=dtype, grad=True), randn(24, dtype=dtype, grad=True)
    g = randn(3, 21, 24, dtype=dtype)

    def plain(x, nw, w, b):
        n = (
            F.rms_norm(x, (40,), nw, 1e-5)
            if kind == "rms"
            else F.layer_norm(x, (40,), nw, None, 1e-5)
        )
        return F.linear(n, w, b)

    def ours(*tensors):
        return norm_linear(*tensors, kind=kind, eps=1e-5)

    tensors = (x, nw, w, b)
    both = lambda f, t, g: (y := f(*t), *torch.autograd.grad(y, t, g))
    truth = both(plain, double(*tensors), g.double())
    for a, t, c in zip(both(ours, tensors, g), both(plain, tensors, g), truth):
        assert a.dtype == dtype
        assert_accurate(a, c, t)


def test_norm_linear_saves_input_and_statistics_only():
    x, nw, w, b = randn(64, 32, grad=True), randn(32, grad=True), randn(16, 32), randn(16)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.numel()) or t, lambda t: t
    ):
        norm_linear(x, nw, w, b)
    assert sum(saved) == sum(t.numel() for t in (x, nw, w, b)) + 64


def test_norm_linear_contract():
    x, nw, w, b = (randn(*s, dtype=F64, grad=True) for s in ((3, 5), (5,), (4, 5), (4,)))
    for kind in ("rms", "layer"):
        f = lambda *t: norm_linear(*t, kind=kind, eps=0.1)
        if not INTERPRETED:
            assert torch.autograd.gradcheck(f, (x, nw, w, b))
            assert torch.autograd.gradgradcheck(f, (x, nw, w, b))
        assert norm_linear(x[0], nw, w, kind=kind).shape == (4,)
        compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x, nw, w, b), f(x, nw, w, b))
    frozen = norm_linear(x.detach(), None, w)
    close(frozen, F.linear(rms_norm(x), w))
    assert torch.autograd.grad(frozen.sum(), w)[0].shape == w.shape
    half = [t.detach().float() for t in (x, nw, w, b)]
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert norm_linear(*half).dtype == torch.bfloat16
    empty = norm_linear(x[:0], nw, w, b)
    assert not torch.autograd.grad(empty.sum(), w)[0].any()


# ---- papers composed of these ------------------------------------------------------------------------


def test_class_shift_fetril():
    """f + mu_target - mu_source, then length one."""
    f, mu = randn(6, 5, dtype=F64, grad=True), randn(3, 5, dtype=F64, grad=True)
    source = torch.tensor([0, 1, 2, 0, 1, 2], device=DEVICE)
    target = torch.tensor([1, 2, 0, 2, 0, 1], device=DEVICE)
    moved = torch.stack([f[i] + mu[t] - mu[s] for i, (s, t) in enumerate(zip(source, target))])
    close(class_shift(f, source, target, mu, normalize=False), moved)
    got, want = class_shift(f, source, target, mu), moved / moved.norm(dim=-1, keepdim=True)
    close(got, want)
    g = torch.randn_like(got)
    close(torch.autograd.grad(got, (f, mu), g), torch.autograd.grad(want, (f, mu), g))


def test_maxsim_with_a_glu_projection():
    """ColBERT's sum_i max_j <q_i, d_j> over unit tokens, after a gated linear unit."""
    x, d = randn(2, 3, 6, dtype=F64), randn(4, 5, 8, dtype=F64)
    mask = torch.tensor([[True] * (5 - n) + [False] * n for n in range(4)], device=DEVICE)
    w1, w2, w3 = (randn(*s, dtype=F64) for s in ((10, 6), (10, 6), (8, 10)))
    q = F.linear(F.silu(F.linear(x, w1)) * F.linear(x, w2), w3)
    got = maxsim(q, d, mask)
    unit = lambda t: t / t.norm(dim=-1, keepdim=True)
    want = torch.stack(
        [torch.stack([(unit(a) @ unit(b[m]).T).amax(1).sum() for b, m in zip(d, mask)]) for a in q]
    )
    close(got, want)
    close(maxsim(q, d, normalize=False), torch.einsum("qid,njd->qnij", q, d).amax(-1).sum(-1))


def test_hopular_layer_norm_before_attention():
    """x + softmax(beta Q K^T) V with Q, K, V of LN(x): the norm feeds one scaled_dot_product_attention."""
    x, w, b = randn(1, 1, 7, 12, dtype=F64), randn(12, dtype=F64), randn(12, dtype=F64)
    n = layer_norm(x, w, b, 1e-12)
    got = x + F.scaled_dot_product_attention(n, n, n, scale=0.5)
    d = x - x.mean(-1, keepdim=True)
    m = d / (d.square().mean(-1, keepdim=True) + 1e-12).sqrt() * w + b
    close(got, x + torch.softmax(0.5 * m @ m.mT, -1) @ m)


def test_token_relationship_graphs():
    """Cosine graphs (B, N, N) of the tokens, the student's matched to the teacher's by KL."""
    s, t, tau = randn(2, 5, 8, dtype=F64, grad=True), randn(2, 5, 6, dtype=F64), 0.5
    graph = lambda x: (n := l2_normalize(x)) @ n.mT / tau
    kl = lambda a, b: F.kl_div(a.log_softmax(-1), b.softmax(-1), reduction="batchmean")
    cosine = lambda x: F.cosine_similarity(x[:, :, None], x[:, None], dim=-1) / tau
    got, want = kl(graph(s), graph(t)), kl(cosine(s), cosine(t))
    close(got, want)
    close(torch.autograd.grad(got, s), torch.autograd.grad(want, s))


def test_alignment_and_uniformity():
    """mean |x - y|^a and log mean_{i<j} exp(-t |x_i - x_j|^2) of unit vectors, a = 2 and t = 2."""
    x, y = (l2_normalize(randn(6, 4, dtype=F64)) for _ in range(2))
    align = (x - y).norm(dim=1).pow(2).mean()
    uniform = torch.pdist(x).square().mul(-2).exp().mean().log()
    close(align, (2 - 2 * (x * y).sum(1)).mean())
    pairs = [((x[i] - x[j]).square().sum() * -2).exp() for i in range(6) for j in range(i + 1, 6)]
    close(uniform, torch.stack(pairs).mean().log())


# ---- bad input ---------------------------------------------------------------------------------------

X = randn(3, 4)
I = torch.zeros(3, dtype=torch.int64, device=DEVICE)
BAD = [
    (lambda: l2_normalize([1.0]), TypeError, "x: expected a torch.Tensor"),
    (lambda: l2_normalize(X.int()), TypeError, "x: expected float32"),
    (lambda: l2_normalize(X[0, 0]), ValueError, "x: expected at least 1 dimension"),
    (lambda: l2_normalize(X, 2), ValueError, "dim: expected one of x's 2 dimensions, got 2"),
    (lambda: l2_normalize(X, 1.0), TypeError, "dim: expected an int"),
    (lambda: l2_normalize(X, eps=-1), ValueError, "eps: expected a finite number"),
    (lambda: l2_normalize(X, mode="add"), ValueError, "mode: expected one of"),
    (lambda: simple_rms_norm(X, heads=3), ValueError, "heads: expected a divisor of x's 4"),
    (lambda: simple_rms_norm(X, heads=2, residual=X[0]), ValueError, "residual: expected shape"),
    (lambda: rescale_to_norm(X, "one"), TypeError, "ref_norm: expected a number"),
    (
        lambda: rescale_to_norm(X, randn(5)),
        ValueError,
        "ref_norm: expected a shape that broadcasts",
    ),
    (lambda: rescale_to_norm(X, 1.0, randn(2, 3, 4)), ValueError, "alpha: expected a shape"),
    (lambda: norm_linear(X, None, randn(4)), ValueError, "weight: expected 2 dimensions"),
    (lambda: norm_linear(X, None, randn(2, 3)), ValueError, r"weight: expected shape \(2, 4\)"),
    (lambda: norm_linear(X, randn(3), randn(2, 4)), ValueError, "norm_weight: expected shape"),
    (lambda: norm_linear(X, None, randn(2, 4), randn(4)), ValueError, "bias: expected shape"),
    (lambda: norm_linear(X, None, randn(2, 4).half()), TypeError, "weight: expected torch.float32"),
    (lambda: norm_linear(X, None, randn(2, 4), kind="l2"), ValueError, "kind: expected one of"),
    (lambda: class_shift(X, I, I.float(), X), TypeError, "target: expected an integer tensor"),
    (lambda: class_shift(X, I[:2], I, X), ValueError, r"source: expected shape \(3,\)"),
    (lambda: class_shift(X, I, I, randn(2, 3)), ValueError, r"means: expected shape \(2, 4\)"),
    (lambda: maxsim(X, X), ValueError, "queries: expected 3 dimensions"),
    (lambda: maxsim(X[None], randn(1, 2, 3)), ValueError, "documents: expected shape"),
    (lambda: maxsim(X[None], X[None], X), TypeError, "mask: expected a bool tensor"),
    (lambda: maxsim(X[None], X[None], X[:2] > 0), ValueError, r"mask: expected shape \(1, 3\)"),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input_is_named(case):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()
