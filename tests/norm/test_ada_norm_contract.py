"""Core ada_norm: norms picked by an index, what torch asks of an op, and bad input."""

import pytest
import torch
import torch.nn.functional as F
from ada_cases import EPS, NORMS, ours, row_shape
from helpers import DEVICE, DTYPES, INTERPRETED, assert_accurate, double, randn

import solera
from solera.norm import ada_layer_norm, ada_rms_norm, indexed_layer_norm

ops = torch.ops.solera

# ---- indexed -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(5, 7, 20), (9 if INTERPRETED else 70, 3, 8), (6, 33), (3, 2, 4, 17)], ids=str
)
def test_indexed_layer_norm_against_float64(shape, dtype):
    x = randn(*shape, dtype=dtype, grad=True)
    weight, bias = (randn(4, shape[-1], dtype=dtype, grad=True) for _ in range(2))
    g = randn(*shape, dtype=dtype)
    for size in {shape[:1], shape[:-1]}:
        index = torch.randint(0, 3, size, device=DEVICE)  # the last set stays unused

        def exact(x, weight, bias, index=index):
            view = (*index.shape, *(1,) * (x.dim() - 1 - index.dim()), -1)
            y = F.layer_norm(x, x.shape[-1:], eps=EPS)
            return y * weight[index].view(view) + bias[index].view(view)

        y = indexed_layer_norm(x, weight, bias, index, eps=EPS)
        truth, today = exact(*(d := double(x, weight, bias))), exact(x, weight, bias)
        assert_accurate(y, truth, today)
        for a, b, c in zip(
            torch.autograd.grad(y, (x, weight, bias), g),
            torch.autograd.grad(truth, d, g.double()),
            torch.autograd.grad(today, (x, weight, bias), g),
        ):
            assert a.dtype == dtype
            assert_accurate(a, b, c)
        plain = indexed_layer_norm(x, weight, None, index, eps=EPS)
        assert_accurate(plain, exact(d[0], d[1], torch.zeros_like(d[2])), y)


def test_indexed_layer_norm_gradients_of_gradients_and_unused_sets():
    x = randn(3, 2, 4, dtype=torch.float64, grad=True)
    weight, bias = (randn(3, 4, dtype=torch.float64, grad=True) for _ in range(2))
    index = torch.tensor([2, 0, 2], device=DEVICE)
    f = lambda x, w, b: indexed_layer_norm(x, w, b, index, eps=0.1)
    fast = {"fast_mode": INTERPRETED}
    assert torch.autograd.gradcheck(f, (x, weight, bias), **fast)
    assert torch.autograd.gradgradcheck(f, (x, weight, bias), **fast)
    dw, db = torch.autograd.grad(f(x, weight, bias).square().sum(), (weight, bias))
    assert not dw[1].any() and not db[1].any() and dw[2].all()
    y = indexed_layer_norm(x[:0], weight, bias, index[:0])
    dw, db = torch.autograd.grad(y.sum(), (weight, bias))
    assert not dw.any() and not db.any()


def test_per_member_norm_is_an_index_over_members():
    """Each of K members its own LayerNorm, x (B, K, D)."""
    x = randn(4, 3, 8)
    norms = [torch.nn.LayerNorm(8, device=DEVICE) for _ in range(3)]
    for norm in norms:
        torch.nn.init.normal_(norm.weight)
    weight, bias = (torch.stack([getattr(n, k) for n in norms]) for k in ("weight", "bias"))
    index = torch.arange(3, device=DEVICE).expand(4, 3)
    want = torch.stack([norm(x[:, k]) for k, norm in enumerate(norms)], 1)
    torch.testing.assert_close(indexed_layer_norm(x, weight, bias, index), want)


# ---- the contract with torch ---------------------------------------------------------------------------


@pytest.mark.parametrize("centred", [False, True])
def test_opcheck(centred):
    base = randn(3, 8, 6)
    views = (base, base.transpose(0, 1), base[:1].expand(3, 8, 6))
    for x, form, dh in zip(views, ("one", "sample", "token"), (False, True, False)):
        dh = x if dh else None
        shape = row_shape(tuple(x.shape), form)
        gate, scale, shift = randn(*shape), randn(*shape), randn(*shape)
        weight, bias = randn(6), randn(6)
        args = (x, x, gate, scale, shift, weight, bias, None, EPS, centred)
        torch.library.opcheck(ops.ada_norm.default, args)
        u = x.contiguous()
        _, h, mean, rstd = ops.ada_norm(u, u, *args[2:])
        needs = [True] * 7
        needs[4] = form != "token"
        dim = len(shape) if form != "token" else 0
        dy = randn(1).expand(x.shape)
        args = (dy, dh, h, x, gate, scale, weight, bias, None, mean, rstd, centred, dim, needs)
        torch.library.opcheck(ops.ada_norm_backward.default, args)
    x, sets, index = base, randn(2, 6), torch.randint(0, 2, (3,), device=DEVICE)
    args = (x, None, None, None, None, sets, sets, index, EPS, centred)
    torch.library.opcheck(ops.ada_norm.default, args)
    _, _, mean, rstd = ops.ada_norm(*args)
    needs = [False, False, False, False, False, True, True]
    args = (x, None, x, None, None, None, sets, sets, index, mean, rstd, centred, 0, needs)
    torch.library.opcheck(ops.ada_norm_backward.default, args)


def compiled_matches(backend):
    def f(x, branch, cond, weight, sets, index):
        shift, scale, gate = cond.chunk(3, dim=-1)
        h, y = ada_layer_norm(x, shift=shift, scale=scale, gate=gate, branch=branch, weight=weight)
        return indexed_layer_norm(ada_rms_norm(y * 2, scale=scale) + h, sets, None, index)

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend=backend)
    for B, T in ((4, 5), (7, 3)):
        tensors = tuple(
            randn(*s, grad=True) for s in ((B, T, 16), (B, T, 16), (B, 48), (16,), (2, 16))
        )
        index = torch.randint(0, 2, (B,), device=DEVICE)
        want, got = f(*tensors, index), compiled(*tensors, index)
        torch.testing.assert_close(got, want)
        g = randn(B, T, 16)
        torch.testing.assert_close(
            torch.autograd.grad(got, tensors, g), torch.autograd.grad(want, tensors, g)
        )


@pytest.mark.inductor
@pytest.mark.no_interpreter
def test_compile_inductor():
    compiled_matches("inductor")


@pytest.mark.parametrize("kind", NORMS)
def test_torch_func(kind):
    x, s = randn(5, 3, 8), randn(5, 8)
    scalar = lambda x, s: ours(kind, x, x, s, s, s, None, None)[0].square().sum()
    got = torch.func.grad(scalar, argnums=(0, 1))(x, s)
    xs, ss = x.clone().requires_grad_(), s.clone().requires_grad_()
    torch.testing.assert_close(got, torch.autograd.grad(scalar(xs, ss), (xs, ss)))
    f = NORMS[kind]
    torch.testing.assert_close(torch.func.vmap(lambda x, s: f(x, scale=s))(x, s), f(x, scale=s))
    x, s, direction = x.double(), s.double(), randn(5, 3, 8, dtype=torch.float64)
    _, tangent = torch.func.jvp(lambda x: f(x, scale=s), (x,), (direction,))
    e = 1e-6
    numeric = (f(x + e * direction, scale=s) - f(x - e * direction, scale=s)) / (2 * e)
    torch.testing.assert_close(tangent, numeric, rtol=1e-6, atol=1e-8)


def test_backend_switch_and_autocast():
    x, s = randn(5, 3, 8), randn(5, 8)
    with solera.backend("reference"):
        y = ada_layer_norm(x, scale=s)
        h, z = ada_layer_norm(x[0, 0], branch=x[0, 0])
    torch.testing.assert_close(y, ada_layer_norm(x, scale=s))
    assert h.shape == z.shape == (8,)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        for t in (x, x.bfloat16()):
            assert ada_layer_norm(t, scale=s).dtype == F.layer_norm(t, (8,)).dtype


# ---- bad input -----------------------------------------------------------------------------------------

X = randn(3, 2, 4)
BAD = [
    (lambda f: f([1.0]), TypeError, "x: expected a torch.Tensor, got list"),
    (lambda f: f(torch.ones(3, 4, dtype=torch.int64)), TypeError, "x: expected float32.*int64"),
    (lambda f: f(torch.tensor(1.0)), ValueError, r"x: expected at least 1 dimension.*\(\)"),
    (lambda f: f(X, scale=randn(5)), ValueError, r"scale: expected shape \(4,\) or \(3, 4\) or"),
    (lambda f: f(X, shift=randn(2, 4)), ValueError, r"shift: expected shape .*got \(2, 4\)"),
    (lambda f: f(X, scale=2.0), TypeError, "scale: expected a torch.Tensor or None, got float 2.0"),
    (lambda f: f(X, scale=randn(4).double()), TypeError, "scale: float64 with x of torch.float32"),
    (lambda f: f(X, scale=randn(4).int()), TypeError, "scale: expected float32.*int32"),
    (lambda f: f(X, shift=randn(4).to("meta")), ValueError, "shift: expected device"),
    (lambda f: f(X, gate=randn(4)), ValueError, "gate: given without a branch"),
    (lambda f: f(X, branch=randn(3, 4)), ValueError, r"branch: expected shape \(3, 2, 4\)"),
    (lambda f: f(X, branch=X.half()), TypeError, "branch: expected torch.float32"),
    (lambda f: f(X, weight=randn(3, 4)), ValueError, r"weight: expected shape \(4,\)"),
    (lambda f: f(X, bias=randn(3)), ValueError, r"bias: expected shape \(4,\)"),
    (lambda f: f(X, eps=-1.0), ValueError, r"eps: expected a finite number in \[0, inf\]"),
]


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input_is_named(case, kind):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call(NORMS[kind])


W, I3 = randn(2, 4), torch.zeros(3, dtype=torch.int64, device=DEVICE)
BAD_INDEX = [
    (lambda f: f(randn(4), W, W, I3), ValueError, "x: expected at least 2 dimension"),
    (lambda f: f(X, randn(4), None, I3), ValueError, "weight: expected 2 dimensions"),
    (lambda f: f(X, randn(2, 5), None, I3), ValueError, r"weight: expected shape \(2, 4\)"),
    (lambda f: f(X, W, randn(4), I3), ValueError, r"bias: expected shape \(2, 4\)"),
    (lambda f: f(X, W, W, I3.int()), TypeError, "index: expected an int64 tensor"),
    (lambda f: f(X, W, W, [0, 0, 0]), TypeError, "index: expected an int64 tensor, got list"),
    (lambda f: f(X, W, W, I3[:2]), ValueError, r"index: expected shape \(3,\) or \(3, 2\)"),
    (lambda f: f(X, W, W, I3.to("meta")), ValueError, "index: expected device"),
    (lambda f: f(X, W, W, I3, eps=float("nan")), ValueError, "eps: expected a finite"),
]


@pytest.mark.parametrize("case", range(len(BAD_INDEX)))
def test_bad_index_is_named(case):
    call, error, message = BAD_INDEX[case]
    with pytest.raises(error, match=message):
        call(indexed_layer_norm)


@pytest.mark.parametrize("outside", [-1, 2])
def test_index_outside_the_sets(outside):
    index = torch.tensor([0, outside, 1], device=DEVICE)
    if DEVICE == "cpu":
        with pytest.raises(IndexError, match=r"index: expected numbers in \[0, 2\)"):
            indexed_layer_norm(X, W, None, index)
    if DEVICE != "cpu" or INTERPRETED:
        y = ops.ada_norm(X, None, None, None, None, W, None, index, EPS, True)[0]
        assert y[1].isnan().all() and torch.isfinite(y[0]).all() and torch.isfinite(y[2]).all()
