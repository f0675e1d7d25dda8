"""Core qk_norm: both heads against the formula in float64, layouts, rotation, gradients, bad input."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, DTYPES, INTERPRETED, ULP, assert_accurate, double, randn, relative_error
from hypothesis import given
from hypothesis import strategies as st

import solera
from solera.norm import qk_norm

KINDS = ("rms", "layer", "l2", "l2_add")
EPS = {"rms": 1e-6, "layer": 1e-5, "l2": 1e-12, "l2_add": 1e-6}
ops = torch.ops.solera


def normal(x, kind, eps):
    """The statistics as a user writes them today, in x's dtype; in float64 they are the formula."""
    if kind == "rms":
        return F.rms_norm(x, x.shape[-1:], None, eps)
    if kind == "layer":
        return F.layer_norm(x, x.shape[-1:], None, None, eps)
    if kind == "l2":
        return F.normalize(x, dim=-1, eps=eps)
    return x * (x.square().sum(-1, keepdim=True) + eps).rsqrt()


def rotated(y, cos, sin, interleaved, seq_dim):
    """The rotation as model code writes it, with tables of rotary_dim columns."""
    R = cos.shape[-1] * 2
    spread = lambda t: t.repeat_interleave(2, -1) if interleaved else torch.cat((t, t), -1)
    c, s = (spread(t).to(y.dtype).unsqueeze(-3 if seq_dim == -2 else -2) for t in (cos, sin))
    part = y[..., :R]
    if interleaved:
        other = torch.stack((-part[..., 1::2], part[..., ::2]), -1).flatten(-2)
    else:
        other = torch.cat((-part[..., R // 2 :], part[..., : R // 2]), -1)
    return torch.cat((part * c + other * s, y[..., R:]), -1)


def plain(
    q, k, q_weight=None, k_weight=None, scale=None, *, kind="rms", cos=None, sin=None,
    interleaved=False, seq_dim=-2, eps=None,
):  # fmt: skip
    out = []
    for x, w in ((q, q_weight), (k, k_weight)):
        y = normal(x, kind, EPS[kind] if eps is None else eps)
        if w is not None:
            y = y * (w if w.dim() == 1 or seq_dim == 1 else w[:, None])
        if x is q and scale is not None:
            y = y * (scale.view(-1, 1, 1) if seq_dim == -2 else scale.view(-1, 1))
        out.append(y if cos is None else rotated(y, cos, sin, interleaved, seq_dim))
    return tuple(out)


def ours(q, k, q_weight=None, k_weight=None, scale=None, *, kind="rms", eps=None, **options):
    eps = EPS[kind] if eps is None else eps
    return qk_norm(q, k, q_weight, k_weight, scale=scale, kind=kind, eps=eps, **options)


def make(B, H, Hk, T, d, dtype=torch.float32, grad=True, weights="d", seq_dim=-2, scale=False):
    shape = lambda h: (B, h, T, d) if seq_dim == -2 else (B, T, h, d)
    size = {"d": lambda h: (d,), "head": lambda h: (h, d), None: None}[weights]
    return (
        randn(*shape(H), dtype=dtype, grad=grad),
        randn(*shape(Hk), dtype=dtype, grad=grad),
        None if size is None else randn(*size(H), dtype=dtype, grad=grad),
        None if size is None else randn(*size(Hk), dtype=dtype, grad=grad),
        randn(1, dtype=dtype, grad=grad)[0] if scale else None,
    )


def angles(T, half, batch=()):
    a = randn(*batch, T, half, scale=2.0)
    return {"cos": a.cos(), "sin": a.sin()}


def whole(function, tensors, grads, **options):
    out = function(*tensors, **options)
    wanted = [t for t in tensors if t is not None and t.requires_grad]
    return *out, *torch.autograd.grad(out, wanted, grads)


def judge(value, exact, eager):
    """As assert_accurate, with two units for a weight's gradient: few numbers, each a sum over all rows.

    The interpreter adds a tile's rows one by one, which no GPU does: four there.
    """
    if value.dim() < 4:
        allowed = (4 if INTERPRETED else 2) * max(ULP[value.dtype], relative_error(eager, exact))
        assert relative_error(value, exact) <= allowed
    else:
        assert_accurate(value, exact, eager)


def compare(tensors, **options):
    grads = [torch.randn_like(t) for t in tensors[:2]]
    turn = {n: options[n].double() for n in ("cos", "sin") if n in options}
    truth = whole(plain, double(*tensors), [g.double() for g in grads], **{**options, **turn})
    got, today = whole(ours, tensors, grads, **options), whole(plain, tensors, grads, **options)
    for a, b, c in zip(got, today, truth, strict=True):
        assert a.dtype == tensors[0].dtype
        judge(a, c, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_against_float64(kind, dtype):
    sizes = ((14, 12), (64, 64), (80, 48), (33, 16))
    for d, R in sizes[::2] if INTERPRETED else sizes:
        tensors = make(2, 3, 2, 17, d, dtype)
        compare(tensors, kind=kind)
        if dtype != torch.float64:  # the tables here are float32
            turn = angles(17, R // 2)
            for interleaved in (False, True):
                compare_rotated(tensors, kind, interleaved, turn, R)


def compare_rotated(tensors, kind, interleaved, turn, R, **more):
    """As compare, with rotary_dim given to ours."""
    grads = [torch.randn_like(t) for t in tensors[:2]]
    options = {"kind": kind, "interleaved": interleaved, **turn, **more}
    exact = {**options, "cos": turn["cos"].double(), "sin": turn["sin"].double()}
    truth = whole(plain, double(*tensors), [g.double() for g in grads], **exact)
    got = whole(ours, tensors, grads, rotary_dim=R, **options)
    today = whole(plain, tensors, grads, **options)
    for a, b, c in zip(got, today, truth, strict=True):
        judge(a, c, b)


@pytest.mark.parametrize("weights", [None, "d", "head"])
@pytest.mark.parametrize("seq_dim", [-2, 1])
def test_layouts_and_weights(seq_dim, weights):
    for interleaved in (False, True):
        tensors = make(2, 4, 2, 5, 24, weights=weights, seq_dim=seq_dim)
        for batch in ((), (2,), (1,)):
            turn = angles(5, 8, batch)
            compare_rotated(tensors, "rms", interleaved, turn, 16, seq_dim=seq_dim)
        compare(tensors, kind="layer", seq_dim=seq_dim)


def test_scale_forms():
    """A number, one element, and one a head are the same product; the gradient is the sum's."""
    q, k, w, _, _ = make(2, 3, 3, 4, 8, torch.float64)
    base, key = ours(q, k, w, kind="l2")
    for scale in (2.5, torch.tensor(2.5, device=DEVICE, dtype=torch.float64)):
        y, z = ours(q, k, w, scale=scale, kind="l2")
        torch.testing.assert_close(y, base * 2.5)
        assert torch.equal(z, key)
    each = randn(3, dtype=torch.float64, grad=True)
    y, _ = ours(q, k, w, scale=each, kind="l2")
    torch.testing.assert_close(y, base * each[:, None, None])
    g = torch.randn_like(y)
    (got,) = torch.autograd.grad(y, each, g, retain_graph=True)
    torch.testing.assert_close(got, (g * base).sum((0, 2, 3)))


def test_query_key_normalization_paper():
    """softmax(g * q^ k^T) v with q^, k^ of length one: the scale takes the place of 1 / sqrt(d)."""
    q, k, v = (randn(2, 3, 7, 16, dtype=torch.float64) for _ in range(3))
    g = torch.tensor(math.log2(7 * 7 - 7), dtype=torch.float64, device=DEVICE)
    unit = [t / t.norm(dim=-1, keepdim=True) for t in (q, k)]
    want = torch.softmax(g * unit[0] @ unit[1].mT, -1) @ v
    a, b = qk_norm(q, k, scale=g, kind="l2")
    got = F.scaled_dot_product_attention(a, b, v, scale=1.0)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_dimr_per_head_form():
    """x * rsqrt(mean x^2 + eps) * exp(scale_h / 2 - log(d) / 4), the scale clamped at log 100."""
    q, k = randn(2, 3, 5, 16, dtype=torch.float64), randn(2, 3, 5, 16, dtype=torch.float64)
    s = (randn(3, dtype=torch.float64) * 4).requires_grad_()
    factor = (0.5 * s.clamp(max=math.log(100)) - 0.25 * math.log(16)).exp()[:, None]
    got = qk_norm(q, k, factor.expand(3, 16), factor.expand(3, 16), eps=1e-6)
    want = [
        t * (t.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * factor[..., None] for t in (q, k)
    ]
    torch.testing.assert_close(got, tuple(want))
    g = [torch.randn_like(t) for t in got]
    torch.testing.assert_close(
        torch.autograd.grad(got, s, g, retain_graph=True), torch.autograd.grad(want, s, g)
    )


def test_views_of_one_projection_and_full_tables():
    qkv = randn(2, 5, 3 * 4 * 8, grad=True)
    q, k, _ = qkv.view(2, 5, 3, 4, 8).unbind(2)
    turn = angles(9, 4)
    part = {n: t[2:7] for n, t in turn.items()}  # positions 2 to 6
    got = qk_norm(q.transpose(1, 2), k.transpose(1, 2), **part)
    again = qk_norm(q, k, seq_dim=1, **part)
    full = {n: torch.cat((t, t), -1) for n, t in part.items()}
    doubled = qk_norm(q.transpose(1, 2), k.transpose(1, 2), **full)
    want = qk_norm(*(t.detach().transpose(1, 2).contiguous() for t in (q, k)), **part)
    for a, b, c, e in zip(got, again, doubled, want):
        assert a.is_contiguous()
        assert torch.equal(a, b.transpose(1, 2)) and torch.equal(a, c) and torch.equal(a, e)
    spread = {n: t.repeat_interleave(2, -1) for n, t in part.items()}
    pairs = qk_norm(q, k, seq_dim=1, interleaved=True, **part)
    assert all(
        torch.equal(a, b)
        for a, b in zip(pairs, qk_norm(q, k, seq_dim=1, interleaved=True, **spread))
    )
    (grad,) = torch.autograd.grad(got[0].sum() + got[1].square().sum(), qkv)  # expanded dy
    leaf = qkv.detach().double().requires_grad_()
    q, k, _ = leaf.view(2, 5, 3, 4, 8).transpose(1, 3).unbind(2)
    y = plain(q, k, **{n: t.double() for n, t in part.items()}, eps=1.2e-7)
    (want,) = torch.autograd.grad(y[0].sum() + y[1].square().sum(), leaf)
    torch.testing.assert_close(grad.double(), want, rtol=1e-4, atol=1e-5)


def test_only_one_output_used():
    q, k, w, u, _ = tensors = make(2, 3, 3, 4, 8)
    g = torch.randn_like(q)
    full = whole(ours, tensors, (g, torch.zeros_like(k)))
    y, _ = ours(q, k, w, u)
    dq, dw = torch.autograd.grad(y, (q, w), g)
    assert torch.equal(dq, full[2]) and torch.equal(dw, full[4])


@pytest.mark.parametrize("frozen", [0, 1, 2, 3])
def test_frozen_inputs(frozen):
    tensors = make(2, 3, 1, 4, 8)[:4]
    g = [torch.randn_like(t) for t in tensors[:2]]
    full = whole(ours, tensors, g)[2:]
    some = [t.detach().requires_grad_(i != frozen) for i, t in enumerate(tensors)]
    got = whole(ours, some, g)[2:]
    assert all(torch.equal(a, b) for a, b in zip(got, [*full[:frozen], *full[frozen + 1 :]]))


@pytest.mark.no_interpreter
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_and_gradgradcheck(kind):
    tensors = make(1, 2, 1, 2, 5, torch.float64, weights="head", scale=True)
    a = randn(2, 2, dtype=torch.float64)

    def f(*tensors):
        return ours(
            *tensors, kind=kind, eps=0.1, cos=a.cos(), sin=a.sin(), rotary_dim=4, interleaved=True
        )

    assert torch.autograd.gradcheck(f, tensors)
    assert torch.autograd.gradgradcheck(f, tensors)


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)], ids=str)
def test_empty(shape):
    B, H, T, d = shape
    tensors = make(B, H, H, T, d, weights="head")
    y, z = ours(*tensors[:4])
    assert y.shape == z.shape == torch.Size(shape)
    grads = torch.autograd.grad(y.sum() + z.sum(), tensors[:4])
    assert all(g.shape == t.shape and not g.any() for g, t in zip(grads, tensors))
    if d:
        assert qk_norm(*tensors[:2], **angles(T, d // 2))[0].shape == torch.Size(shape)


@pytest.mark.parametrize("kind", KINDS)
def test_extreme_values(kind):
    q = randn(1, 1, 6, 24)
    q[..., 0, 3], q[..., 1, 4], q[..., 2, :], q[..., 3, :] = float("nan"), float("inf"), 0.0, 1e-42
    q.requires_grad_()
    y, _ = ours(q, q.detach(), kind=kind)
    want = normal(q, kind, EPS[kind])
    assert torch.equal(y.isnan(), want.isnan())
    assert not y[..., 2, :].any()
    g = torch.randn_like(y)
    (got,), (today,) = (torch.autograd.grad(t, q, g) for t in (y, want))
    rows = slice(2, 6)
    torch.testing.assert_close(got[..., rows, :], today[..., rows, :], rtol=2e-5, atol=1e-6)
    alone, _ = ours(q[:, :, 5:], q[:, :, 5:], kind=kind)
    assert torch.equal(alone[0, 0, 0], y[0, 0, 5])


@given(
    sizes=st.tuples(*[st.integers(0, 3)] * 3),
    kv=st.integers(0, 2),
    d=st.integers(0, 70),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([1e-30, 1e-3, 1.0, 1e4, 1e30]),
    weights=st.sampled_from([None, "d", "head"]),
    turn=st.sampled_from([None, False, True]),
    swap=st.booleans(),
)
def test_any_shape_dtype_and_scale(sizes, kv, d, kind, dtype, scale, weights, turn, swap):
    B, H, T = sizes
    scale = min(scale, 1e4) if dtype == torch.float16 else scale
    seq_dim = 1 if swap else -2
    q, k, w, u, _ = make(B, H, kv, T, d, dtype, False, weights, seq_dim)
    q = q * scale
    options = {"kind": kind, "seq_dim": seq_dim}
    if turn is not None and dtype != torch.float64:
        options |= {"interleaved": turn, **angles(T, d // 4)}
    rotary = {"rotary_dim": d // 4 * 2} if "cos" in options else {}
    got = ours(q, k, w, u, **options, **rotary)
    exact = {n: t.double() if isinstance(t, torch.Tensor) else t for n, t in options.items()}
    truth = plain(*double(q, k, w, u), **exact)
    today = plain(q, k, w, u, **options)
    for a, b, c, x in zip(got, today, truth, (q, k)):
        assert a.shape == x.shape and a.dtype == dtype
        fine = torch.isfinite(b).all() and torch.isfinite(c).all()
        # Where x^2 underflows or overflows, float32 has another answer than float64 whatever the code.
        if fine and (x is k or (1e-10 < scale < 1e10)):
            assert_accurate(a, c, b)


def test_same_bits_for_any_thread_count_and_batch():
    T = 40 if INTERPRETED else 400
    tensors = make(3, 2, 2, T, 24, weights="head")[:4]
    g = [torch.randn_like(t) for t in tensors[:2]]
    turn = angles(T, 12)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(whole(ours, tensors, g, **turn))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))
    q, k, w, u = tensors
    few = ours(q[1:2], k[1:2], w, u, **turn)
    assert all(torch.equal(a, b[1:2]) for a, b in zip(few, results[0]))


@pytest.mark.no_interpreter
@pytest.mark.parametrize("d", [64, 66])
def test_large_tensors_take_the_streaming_stores(d):
    """Outputs of 16 MB and more pass the caches: same bits as for few of their rows."""
    tensors = make(2, 16, 1, 2100, d, weights=None)[:2]
    g = [torch.randn_like(t) for t in tensors]
    turn = angles(2100, 16)
    big = whole(ours, tensors, g, rotary_dim=32, **turn)
    few = [t.detach()[1:].requires_grad_() for t in tensors]
    small = whole(ours, few, [t[1:] for t in g], rotary_dim=32, **turn)
    for a, b in zip(big, small):
        assert torch.equal(a[1:], b)


def test_float32_weight_with_half_input():
    q, k, *_ = make(2, 3, 3, 5, 40, torch.bfloat16, weights=None)
    w, u = randn(40, grad=True), randn(40, grad=True)
    g = [torch.randn_like(q) for _ in range(2)]
    turn = angles(5, 20)
    got = whole(ours, (q, k, w, u), g, **turn)
    half, single = torch.bfloat16, torch.float32
    assert [t.dtype for t in got] == [half] * 4 + [single] * 2
    exact = {n: t.double() for n, t in turn.items()}
    truth = whole(plain, double(q, k, w, u), [t.double() for t in g], **exact)
    for a, b in zip(got, truth):
        # No eager run to compare with: a few roundings of float32 where the output is float32.
        assert relative_error(a, b) <= (4e-7 if a.dtype == single else ULP[half])


def test_weight_offset():
    q, k, w, u, _ = make(1, 2, 2, 3, 8)
    got = qk_norm(q, k, w, u, weight_offset=1.0)
    want = qk_norm(q, k, w + 1, u + 1)
    torch.testing.assert_close(got, want)


# ---- the contract with torch --------------------------------------------------------------------------


def opcheck_both(x, w, turn, kind, positions, dy, needs):
    args = (x, w, *turn, kind, 1e-6, positions, False)
    torch.library.opcheck(ops.head_norm.default, args)
    _, mean, rstd = ops.head_norm(*args)
    back = (dy, x, w, *turn, mean, rstd, kind, 1e-6, positions, True)
    torch.library.opcheck(ops.head_norm_backward.default, (*back, *needs))


@pytest.mark.parametrize("case", range(4))
def test_opcheck(case):
    base, a = randn(2, 3, 4, 6), randn(1, 4, 2)
    turn, one = (a.cos(), a.sin()), randn(1).expand(2, 3, 4, 6)
    if case == 0:
        opcheck_both(base, randn(6), turn, 0, 2, one, (True, True))
    elif case == 1:
        opcheck_both(
            base.transpose(1, 2), randn(3, 6), turn, 1, 1, one.transpose(1, 2), (True, True)
        )
    elif case == 2:
        opcheck_both(base[:1].expand(2, 3, 4, 6), None, (None, None), 2, 2, base, (True, False))
    else:
        opcheck_both(randn(2, 3, 6, 4).mT, randn(6), (None, None), 3, 2, base, (False, True))


def compiled_matches(backend):
    def f(q, k, w, u, g, cos, sin):
        q, k = qk_norm(q, k, w, u, scale=g, cos=cos, sin=sin)
        return qk_norm(q * 2, k, kind="l2", cos=cos, sin=sin, interleaved=True)

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend=backend)
    for T in (4, 7):
        tensors = make(2, 3, 1, T, 16, scale=True)
        grads = [torch.randn_like(t) for t in tensors[:2]]
        turn = angles(T, 8).values()
        want, got = f(*tensors, *turn), compiled(*tensors, *turn)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(
            torch.autograd.grad(got, tensors, grads), torch.autograd.grad(want, tensors, grads)
        )


@pytest.mark.inductor
@pytest.mark.no_interpreter
def test_compile_inductor():
    compiled_matches("inductor")


def test_torch_func():
    q, k, w, u, _ = make(2, 2, 2, 3, 8, grad=False)
    turn = angles(3, 4)

    def scalar(q, k, w):
        y, z = qk_norm(q, k, w, **turn)
        return (y * z).sum()

    got = torch.func.grad(scalar, argnums=(0, 1, 2))(q, k, w)
    leaves = [t.clone().requires_grad_() for t in (q, k, w)]
    torch.testing.assert_close(got, torch.autograd.grad(scalar(*leaves), leaves))
    many = torch.stack((q, 2 * q)), torch.stack((k, 3 * k))
    mapped = torch.func.vmap(lambda q, k: qk_norm(q, k, w, u, **turn))(*many)
    torch.testing.assert_close(mapped[0][1], qk_norm(2 * q, k, w, u, **turn)[0])
    q, k, direction = q.double(), k.double(), randn(*q.shape, dtype=torch.float64)
    f = lambda q: qk_norm(q, k, kind="l2")[0]
    _, tangent = torch.func.jvp(f, (q,), (direction,))
    h = 1e-6
    numeric = (f(q + h * direction) - f(q - h * direction)) / (2 * h)
    torch.testing.assert_close(tangent, numeric, rtol=1e-6, atol=1e-8)


def test_backend_switch_and_autocast():
    q, k, w, u, _ = make(2, 2, 2, 3, 8, grad=False)
    turn = angles(3, 4)
    with solera.backend("reference"):
        want = qk_norm(q, k, w, u, **turn)
    torch.testing.assert_close(qk_norm(q, k, w, u, **turn), want)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        for t in (q, q.bfloat16()):
            want = F.rms_norm(t, (8,), w.to(t.dtype)).dtype
            assert qk_norm(t, t, w, u, **turn)[0].dtype == want


# ---- module ------------------------------------------------------------------------------------------


def test_module():
    q, k, *_ = make(2, 4, 2, 5, 16, grad=False)
    for kind, theirs in (("rms", torch.nn.RMSNorm), ("layer", torch.nn.LayerNorm)):
        module = solera.nn.QKNorm(16, kind=kind, eps=1e-5, device=DEVICE)
        one = theirs(16, eps=1e-5, device=DEVICE, **({"bias": False} if kind == "layer" else {}))
        torch.nn.init.normal_(one.weight)
        assert list(module.state_dict()) == ["q_norm.weight", "k_norm.weight"]
        module.load_state_dict({"q_norm.weight": one.weight, "k_norm.weight": one.weight})
        y, z = module(q, k)
        torch.testing.assert_close((y, z), (one(q), one(k)))
        for clone in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert torch.equal(clone(q, k)[0], y)
    paper = solera.nn.QKNorm(16, kind="l2", elementwise_affine=False, length=64, device=DEVICE)
    assert list(paper.state_dict()) == ["scale"]
    assert float(paper.scale.detach()) == pytest.approx(math.log2(64 * 64 - 64))
    assert paper.attention_scale == 1.0 and module.attention_scale is None
    y, z = paper(q, k, **angles(5, 8))
    torch.testing.assert_close(y.norm(dim=-1), paper.scale.detach().expand(2, 4, 5))
    torch.testing.assert_close(z.norm(dim=-1), torch.ones(2, 2, 5, device=DEVICE))
    y.sum().backward()
    assert paper.scale.grad is not None
    assert "kind='l2'" in repr(paper)
    with pytest.raises(ValueError, match="kind: expected one of"):
        solera.nn.QKNorm(16, kind="batch")
