"""Core bank_norm: the kernels against the formula in float64, gradients, ties, infinities, bad input."""

import pytest
import torch
from helpers import DEVICE, DTYPES, INTERPRETED, assert_accurate, double, randn
from hypothesis import given
from hypothesis import strategies as st

import solera
from solera.norm import (
    column_lse,
    dual_bank_norm,
    dual_bank_norm_embed,
    querybank_norm,
    querybank_norm_embed,
)
from solera.norm.bank_norm import bank_columns_reference, bank_stream_reference

ops = torch.ops.solera
F64 = torch.float64
UNIT = torch.nn.functional.normalize
# (bank, gallery): single elements, below a vector, past a block of rows, past a tile of columns.
SHAPES = [(1, 1), (3, 5), (37, 70), (300, 33), (21, 1100)]


def exact_lse(b, beta):
    """The formula as it stands, without a shift: float64 holds it for the sizes here."""
    return torch.log(torch.exp(beta * b.double()).sum(0))


def exact_active(b, k):
    active = torch.zeros(b.shape[1], dtype=torch.bool, device=b.device)
    for row in b.double():
        order = sorted(range(b.shape[1]), key=lambda j: (-float(row[j]), j))
        active[[j for j in order[:k] if row[j] > -torch.inf]] = True
    return active


def paper_querybank(s, b, beta, k, dynamic):
    """Rows divided by the column sums of the bank's exponentials, as the paper writes it."""
    ratio = torch.exp(beta * s) / torch.exp(beta * b).sum(0)
    if not dynamic:
        return ratio, torch.ones(len(s), dtype=torch.bool)
    active = set(torch.topk(b, k, dim=1).indices.flatten().tolist())
    rows = torch.tensor([int(r.argmax()) in active for r in s])
    return torch.where(rows[:, None], ratio, s), rows


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_columns_against_float64(shape, dtype):
    if INTERPRETED and shape[0] > 100:
        shape = (40, shape[1])
    b = randn(*shape, dtype=dtype)
    for k in (0, 1, 3):
        lse, active = ops.bank_columns(b, 3.0, k)
        assert lse.dtype == (F64 if dtype == F64 else torch.float32)
        assert_accurate(lse, exact_lse(b, 3.0), torch.logsumexp(3.0 * b.to(lse.dtype), 0))
        assert torch.equal(active, exact_active(b, k) if k else active.new_zeros(0))
    dlse = randn(shape[1], dtype=lse.dtype)
    ours = ops.bank_columns_backward(dlse, lse, b, 3.0)
    x = double(b).requires_grad_()
    truth = torch.autograd.grad(exact_lse(x, 3.0), x, dlse.double())[0]
    y = b.clone().requires_grad_()
    today = torch.autograd.grad(torch.logsumexp(3.0 * y.to(lse.dtype), 0), y, dlse)[0]
    assert ours.dtype == dtype
    assert_accurate(ours, truth, today)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_stream_against_float64(shape, dtype):
    x, y = randn(shape[0], 12, dtype=dtype), randn(shape[1], 12, dtype=dtype)
    acc = F64 if dtype == F64 else torch.float32
    s = x.double() @ y.double().T
    today = torch.logsumexp(0.5 * (x.to(acc) @ y.to(acc).T), 0)
    lse, active = ops.bank_stream(x, y, 0.5, 2)
    assert_accurate(lse, exact_lse(s, 0.5), today)
    assert torch.equal(active, exact_active(s, 2))
    dlse = randn(shape[1], dtype=acc)
    ours = ops.bank_stream_backward(dlse, lse, x, y, 0.5, True, True)
    a, b = (t.double().requires_grad_() for t in (x, y))
    truth = torch.autograd.grad(exact_lse(a @ b.T, 0.5), (a, b), dlse.double())
    c, d = (t.to(acc).requires_grad_() for t in (x, y))
    today = torch.autograd.grad(torch.logsumexp(0.5 * (c @ d.T), 0), (c, d), dlse)
    for got, want, eager in zip(ours, truth, today):
        assert_accurate(got, want, eager)
    none, dy = ops.bank_stream_backward(dlse, lse, x, y, 0.5, False, True)
    assert none.numel() == 0 and torch.equal(dy, ours[1])


@pytest.mark.parametrize("dynamic", [False, True])
def test_querybank_is_the_papers_ratio(dynamic):
    s, b = randn(20, 15, dtype=F64), randn(12, 15, dtype=F64)
    for k in (1, 2):
        out = querybank_norm(s, b, beta=2.5, top_k=k, dynamic=dynamic)
        ratio, rows = paper_querybank(s.cpu(), b.cpu(), 2.5, k, dynamic)
        rows = rows.to(out.device)
        assert rows.any()
        torch.testing.assert_close(out[rows].exp(), ratio.to(out.device)[rows])
        assert torch.equal(out[~rows], s[~rows])


@pytest.mark.parametrize("dynamic", [False, True])
def test_dual_bank_is_the_papers_product(dynamic):
    s, q, g = (randn(n, 9, dtype=F64) for n in (40, 4, 3))
    out = dual_bank_norm(s, q, g, beta1=2.0, beta2=0.7, dynamic=dynamic)
    kinds = set()
    for i, row in enumerate(s):
        want, any_factor = torch.ones(9, dtype=F64, device=s.device), False
        for bank, beta in ((q, 2.0), (g, 0.7)):
            if not dynamic or exact_active(bank, 1)[row.argmax()]:
                want = want * torch.exp(beta * row) / torch.exp(beta * bank).sum(0)
                any_factor = True
        kinds.add(any_factor)
        torch.testing.assert_close(out[i], want.log() if any_factor else row)
    assert kinds == ({True, False} if dynamic else {True})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dynamic", [False, True])
def test_embeddings_give_the_same_as_their_similarities(dynamic, dtype):
    q, b, c, g = (randn(n, 8, dtype=dtype) for n in (19, 13, 6, 40))
    wide = F64 if dtype == F64 else torch.float32
    options = {"top_k": 2, "dynamic": dynamic, "normalize": False}
    s, sb, sc = (t.to(wide) @ g.to(wide).T for t in (q, b, c))
    one = querybank_norm(s, sb, beta=3.0, top_k=2, dynamic=dynamic)
    two = dual_bank_norm(s, sb, sc, beta1=3.0, beta2=2.0, k=2, dynamic=dynamic)
    for want, embed in (
        (one, lambda **k: querybank_norm_embed(q, b, g, beta=3.0, **options, **k)),
        (two, lambda **k: dual_bank_norm_embed(q, b, c, g, beta1=3.0, beta2=2.0, **options, **k)),
    ):
        got = embed()
        assert got.dtype == wide
        torch.testing.assert_close(got, want)
        values, indices = embed(k=7)
        torch.testing.assert_close(values, torch.topk(want, 7, dim=1).values)
        torch.testing.assert_close(want.gather(1, indices), values)
    unit = querybank_norm_embed(UNIT(q), UNIT(b), UNIT(g), **{**options, "normalize": False})
    assert torch.equal(querybank_norm_embed(q, b, g, **{**options, "normalize": True}), unit)


def test_many_queries_and_bank_rows():
    """Past the blocks of every loop: queries of the top-k form, bank rows between two merges."""
    rows, queries = (20, 140) if INTERPRETED else (2100, 530)
    q, b, g = randn(queries, 4), randn(rows, 4), randn(20, 4)
    with solera.backend("reference"):
        want = querybank_norm_embed(q, b, g, dynamic=True)
    got = querybank_norm_embed(q, b, g, dynamic=True)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)
    values, indices = querybank_norm_embed(q, b, g, dynamic=True, k=20)
    assert torch.equal(values, got.sort(dim=1, descending=True, stable=True).values)
    assert torch.equal(indices.sort(1).values, torch.arange(20, device=DEVICE).expand(len(q), 20))
    lse, active = bank_stream_reference(b, g, 5.0, 1)
    torch.testing.assert_close(column_lse(b, g, 5.0), lse)
    assert torch.equal(ops.bank_stream(b, g, 5.0, 1)[1], active)


def test_memory_of_the_top_k_form_and_of_the_bank():
    """Nothing of bank x gallery or queries x gallery elements is allocated on the way."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = [0]

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(t, torch.Tensor):
                    largest[0] = max(largest[0], t.numel())
            return out

    q, b, g = randn(200, 4), randn(150, 4), randn(90, 4)
    with Watch():
        querybank_norm_embed(q, b, g, k=3)
        column_lse(b, g)
    assert largest[0] <= (128 if not INTERPRETED else 150) * 90


@pytest.mark.no_interpreter
def test_gradients():
    s, b, c = (randn(n, 5, dtype=F64, grad=True) for n in (6, 4, 3))
    for dynamic in (False, True):
        one = lambda s, b: querybank_norm(s, b, beta=1.5, dynamic=dynamic)
        two = lambda s, b, c: dual_bank_norm(s, b, c, beta1=1.5, beta2=0.5, dynamic=dynamic)
        for f, args in ((one, (s, b)), (two, (s, b, c))):
            assert torch.autograd.gradcheck(f, args)
            assert torch.autograd.gradgradcheck(f, args)
    x, y, q = (randn(n, 3, dtype=F64, grad=True) for n in (4, 6, 5))
    assert torch.autograd.gradcheck(column_lse, (x, y, 1.5))
    assert torch.autograd.gradgradcheck(column_lse, (x, y, 1.5))
    embed = lambda q, x, y: querybank_norm_embed(q, x, y, beta=2.0, dynamic=True)
    assert torch.autograd.gradcheck(embed, (q, x, y))
    best = lambda q, x, y: querybank_norm_embed(q, x, y, beta=2.0, k=2)[0]
    assert torch.autograd.gradcheck(best, (q, x, y))
    frozen = torch.autograd.grad(column_lse(x.detach(), y).sum(), y)[0]
    assert torch.equal(frozen, torch.autograd.grad(column_lse(x, y).sum(), y)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_in_working_dtypes(dtype):
    s, b = randn(9, 30, dtype=dtype, grad=True), randn(40, 30, dtype=dtype, grad=True)
    x, y = randn(40, 6, dtype=dtype, grad=True), randn(30, 6, dtype=dtype, grad=True)
    dout, dl = randn(9, 30, dtype=dtype), randn(30)

    def grads():
        return (
            *torch.autograd.grad(querybank_norm(s, b, beta=2.0, dynamic=True), (s, b), dout),
            *torch.autograd.grad(column_lse(x, y, 0.7), (x, y), dl),
        )

    ours = grads()
    with solera.backend("reference"):
        today = grads()
    s, b, x, y = double(s, b, x, y)
    dout, dl = dout.double(), dl.double()
    for got, eager, want in zip(ours, today, grads()):
        assert got.dtype == dtype
        assert_accurate(got, want, eager)


def test_infinite_nan_and_equal_values():
    inf, nan = torch.inf, torch.nan
    b = torch.tensor(
        [[1.0, -inf, nan, 2.0, inf, 0.0], [1.0, -inf, 0.0, 2.0, 1.0, -1e30]], device=DEVICE
    )
    lse, active = ops.bank_columns(b, 2.0, 1)
    want, flags = bank_columns_reference(b, 2.0, 1)
    torch.testing.assert_close(lse, want, equal_nan=True)
    assert torch.equal(active, flags) and active.tolist() == [
        False,
        False,
        False,
        True,
        True,
        False,
    ]
    none = torch.full((2, 3), -inf, device=DEVICE)
    assert not ops.bank_columns(none, 2.0, 1)[1].any()
    flat = torch.ones(3, 40, device=DEVICE)
    assert ops.bank_columns(flat, 1.0, 2)[1].nonzero().flatten().tolist() == [0, 1]
    values, indices = ops.row_top(b, 6)
    assert indices[0].tolist() == [4, 3, 0, 5, -1, -1] and values[0, 4:].tolist() == [-inf, -inf]
    big = torch.tensor([[3e38, -3e38, 1e-42], [3e38, 3e38, 0.0]], device=DEVICE)
    torch.testing.assert_close(
        ops.bank_columns(big, 0.5, 0)[0], torch.logsumexp(0.5 * big, 0), rtol=1e-6, atol=1e-6
    )
    far = randn(50, 3) - 1e4  # every exponential underflows without the shift
    assert_accurate(ops.bank_columns(far, 20.0, 0)[0], torch.logsumexp(20 * far.double(), 0), None)


@given(
    rows=st.integers(1, 40),
    columns=st.integers(0, 90),
    queries=st.integers(0, 5),
    k=st.integers(1, 5),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([1e-30, 1.0, 1e4]),
    swap=st.booleans(),
    dynamic=st.booleans(),
)
def test_any_shape_and_stride(rows, columns, queries, k, dtype, scale, swap, dynamic):
    make = lambda n: (randn(columns, n).T if swap else randn(n, columns)).mul(scale).to(dtype)
    s, b = make(queries), make(rows)
    k = max(1, min(k, columns))
    out = querybank_norm(s, b, beta=0.5, top_k=k, dynamic=dynamic)
    with solera.backend("reference"):
        want = querybank_norm(s, b, beta=0.5, top_k=k, dynamic=dynamic)
        exact = querybank_norm(s.double(), b.double(), beta=0.5, top_k=k, dynamic=dynamic)
    assert out.shape == s.shape and out.dtype == dtype
    if torch.isfinite(want).all():
        assert_accurate(out, exact, want)


@pytest.mark.skipif(
    INTERPRETED,
    reason="the launcher's products are torch's, whose bits on a CPU follow its threads",
)
@pytest.mark.parametrize("width", [16, 1100])
def test_same_bits_for_any_thread_count(width):
    n = 700
    q, b, g = randn(20, width), randn(n, width, grad=True), randn(n, width, grad=True)
    b, g = ((t / width).detach().requires_grad_() for t in (b, g))
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            dl = torch.autograd.grad(column_lse(b, g).sum(), (b, g))
            with torch.no_grad():
                scores = querybank_norm_embed(q, b, g, dynamic=True)
                results.append((scores, *ops.bank_columns(scores, 2.0, 3), *dl))
            if (
                width < 512
            ):  # with a gradient the product is torch.mm, whose long sums follow the threads
                out = querybank_norm_embed(q, b, g, dynamic=True)
                results[-1] = (*results[-1], out.detach())
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


# ---- the contract with torch --------------------------------------------------------------------------


def test_opcheck():
    base = randn(8, 8)
    check = torch.library.opcheck
    for s in (base.T,) if INTERPRETED else (base, base.T, base[:1].expand(8, 8)):
        for k in (0, 2):
            check(ops.bank_columns.default, (s, 2.0, k))
            check(ops.bank_stream.default, (s, base, 2.0, k))
        lse, active = ops.bank_columns(s, 2.0, 1)
        check(ops.bank_columns_backward.default, (randn(1).expand(8), lse, s, 2.0))
        check(ops.bank_stream_backward.default, (lse, lse, s, base, 2.0, True, True))
        check(ops.bank_stream_backward.default, (lse, lse, s, base, 2.0, False, False))
        for a in (None, active):
            check(ops.bank_apply.default, (s, lse, a, 2.0, None, None, 0.0))
            check(ops.bank_apply.default, (s, lse, None, 2.0, lse, a, 1.0))
            check(ops.bank_scores.default, (s, base, lse, a, 2.0, lse, a, 1.0))
        check(ops.row_top.default, (s, 3))


def compiled_matches(backend):
    def f(q, b, g):
        s = querybank_norm(q @ g.T, b @ g.T, beta=2.0, dynamic=True)
        return s + querybank_norm_embed(q, b, g, beta=2.0) + column_lse(b, g)

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend=backend)
    for n in (4, 7):
        tensors = [randn(n + i, 6, grad=True) for i in range(3)]
        want, got = f(*tensors), compiled(*tensors)
        torch.testing.assert_close(got, want)
        grad = torch.ones_like(want)
        torch.testing.assert_close(
            torch.autograd.grad(got, tensors, grad), torch.autograd.grad(want, tensors, grad)
        )
        top = torch.compile(querybank_norm_embed, fullgraph=True, dynamic=True, backend=backend)
        plain = [t.detach() for t in tensors]
        torch.testing.assert_close(top(*plain, k=2), querybank_norm_embed(*plain, k=2))


@pytest.mark.inductor
@pytest.mark.no_interpreter
def test_compile_inductor():
    compiled_matches("inductor")


def test_func_transforms():
    s, b = randn(3, 5, dtype=F64), randn(4, 5, dtype=F64)
    f = lambda s, b: querybank_norm(s, b, beta=1.5, dynamic=True).square().sum()
    x, y = s.clone().requires_grad_(), b.clone().requires_grad_()
    want = torch.autograd.grad(f(x, y), (x, y))
    torch.testing.assert_close(torch.func.grad(f, argnums=(0, 1))(s, b), want)
    many = torch.func.vmap(querybank_norm)(torch.stack([s, 2 * s]), torch.stack([b, b]))
    torch.testing.assert_close(many[1], querybank_norm(2 * s, b))
    _, tangent = torch.func.jvp(lambda s: f(s, b), (s,), (torch.ones_like(s),))
    torch.testing.assert_close(tangent, want[0].sum())


def test_autocast_leaves_embeddings_alone():
    q, b, g = randn(4, 5), randn(3, 5), randn(6, 5)
    want = querybank_norm_embed(q, b, g)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert torch.equal(querybank_norm_embed(q, b, g), want)


# ---- bad input ---------------------------------------------------------------------------------------

S, B = randn(3, 4), randn(5, 4)
BAD = [
    (lambda: querybank_norm([1.0], B), TypeError, "similarities: expected a torch.Tensor"),
    (lambda: querybank_norm(S[0], B), ValueError, "similarities: expected 2 dimensions"),
    (lambda: querybank_norm(S.int(), B), TypeError, "similarities: expected float32"),
    (lambda: querybank_norm(S, B[:, :3]), ValueError, "bank_similarities: expected 4 columns"),
    (lambda: querybank_norm(S, B.double()), TypeError, "bank_similarities: expected torch.float32"),
    (lambda: querybank_norm(S, B[:0]), ValueError, "bank_similarities: expected at least one row"),
    (lambda: querybank_norm(S, B.to("meta")), ValueError, "bank_similarities: expected device"),
    (lambda: querybank_norm(S, B, beta=0.0), ValueError, "beta: expected a positive"),
    (lambda: querybank_norm(S, B, beta="x"), TypeError, "beta: expected a number"),
    (lambda: querybank_norm(S, B, top_k=5, dynamic=True), ValueError, "top_k: expected 1 to 4"),
    (lambda: querybank_norm(S, B, top_k=1.0, dynamic=True), TypeError, "top_k: expected an int"),
    (lambda: dual_bank_norm(S, B, B[:, 1:]), ValueError, "gallery_bank: expected 4 columns"),
    (lambda: dual_bank_norm(S, B, B, beta2=-1.0), ValueError, "beta2: expected a positive"),
    (lambda: column_lse(B, S[:, :2]), ValueError, "bank: expected 2 columns"),
    (lambda: querybank_norm_embed(S, B, S, k=4), ValueError, "k: expected 1 to 3"),
    (lambda: querybank_norm_embed(S[:, :2], B, S), ValueError, "queries: expected 4 columns"),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input_is_named(case):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()
