"""Core chain: the kernel against the product of plane rotations in float64, its gradients, and its bad input."""

import pytest
import torch
from function_checks import agrees_with_formula, compiles, differentiates, works_under_torch_func
from helpers import DEVICE, DTYPES, INTERPRETED, assert_accurate, randn
from hypothesis import given, settings
from hypothesis import strategies as st

import solera
from solera.weights import givens_chain, givens_merge, soft_orthogonality_penalty
from solera.weights.chain import pairs

ops = torch.ops.solera
# One column, no power of two at any level, a vector of every width and a tail.
WIDTHS = (1, 2, 3, 8, 31, 33, 77) if INTERPRETED else (1, 2, 3, 5, 8, 16, 31, 33, 64, 77, 130, 1000)


def product(parameters, d):
    """Q of y = x Q, the 2x2 blocks multiplied out one by one in float64."""
    q, blocks = torch.eye(d, dtype=torch.float64), parameters.double().cpu()
    if parameters.dim() == 1:
        c, s = blocks.cos(), blocks.sin()
        blocks = torch.stack([c, -s, s, c], 1).view(-1, 2, 2)
    flat = [pair for level in pairs(d) for pair in level]
    assert len(flat) == d - 1
    for (i, j), block in zip(flat, blocks):
        q[:, [i, j]] = q[:, [i, j]] @ block.T
    return q.to(parameters.device)


def loop(x, parameters, scale=None, merged=False):
    """Level by level on views of the whole row; x (N, d), d a power of two."""
    d, first, step = x.shape[1], 0, 1
    levels = []
    while step < d:
        n = d // (2 * step)
        p = parameters[first : first + n]
        if p.dim() == 1:
            p = torch.stack([p.cos(), -p.sin(), p.sin(), p.cos()], 1).view(-1, 2, 2)
        levels.append((step, p.mT if merged else p))
        first, step = first + n, 2 * step
    if merged and scale is not None:
        x = x * scale
    for step, p in reversed(levels) if merged else levels:
        v = x.view(len(x), -1, 2 * step)
        a, b = v[..., 0], v[..., step]
        first = p[:, 0, 0] * a + p[:, 0, 1] * b
        second = p[:, 1, 0] * a + p[:, 1, 1] * b
        rest = [v[..., 1:step], second[..., None], v[..., step + 1 :]]
        x = torch.cat([first[..., None], *rest], 2).flatten(1)
    return x if merged or scale is None else x * scale


def make(d, blocks, dtype=torch.float32, rows=5, grad=True, scaled=True):
    p_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    p = randn(d - 1, 2, 2, dtype=p_dtype, scale=0.7) if blocks else randn(d - 1, dtype=p_dtype)
    scale = randn(d, dtype=p_dtype, grad=grad) if scaled else None
    return randn(rows, d, dtype=dtype, grad=grad), p.requires_grad_(grad), scale


def test_the_pairs():
    assert pairs(8) == [[(0, 1), (2, 3), (4, 5), (6, 7)], [(0, 2), (4, 6)], [(0, 4)]]
    for d in (1, 2, 6, 7, 100):
        flat = [pair for level in pairs(d) for pair in level]
        assert sorted(j for _, j in flat) == list(range(1, d))
        assert all(j - i == j & -j for i, j in flat)


@pytest.mark.parametrize("blocks", [False, True], ids=["angles", "blocks"])
@pytest.mark.parametrize("d", WIDTHS)
def test_goft_is_the_papers_product(d, blocks):
    """Parameter Efficient Quasi-Orthogonal Fine-Tuning via Givens Rotation, and both ways back."""
    x, p, s = make(d, blocks, torch.float64, grad=False)
    q = product(p, d)
    if not blocks:
        assert (q @ q.T - torch.eye(d, device=DEVICE)).norm() < 1e-13 * d
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    close(givens_chain(x, p), x @ q)
    close(givens_chain(x, p, s), (x @ q) * s)
    close(givens_merge(x, p, s), (x * s) @ q.T)
    close(givens_merge(x, p), x @ q.T)
    if d < 20:
        near = p if not blocks else torch.eye(2, device=DEVICE) + 0.3 * p
        close(givens_chain(givens_chain(x, near, s), near, s, inverse=True), x)
    # The paper's layer: y = (x Q) diag(s) W0^T, and its merged weight.
    w = randn(3, d, dtype=torch.float64)
    close(givens_chain(x, p, s) @ w.T, x @ givens_merge(w, p, s).T)
    assert givens_chain(x[0], p, s).shape == (d,)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("blocks", [False, True], ids=["angles", "blocks"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(dtype, blocks, merged):
    for d, rows in ((1, 3), (2, 1), (16, 7), (128, 70)):
        x, p, s = make(d, blocks, dtype, rows)
        for scale in (s, None):
            ours = givens_merge if merged else givens_chain
            formula = lambda x, p, s: loop(
                x, p.to(x.dtype), None if s is None else s.to(x.dtype), merged
            )
            if d == 1:
                formula = lambda x, p, s: x * (1 if s is None else s.to(x.dtype)) + 0 * p.sum()
            # A single gradient cancels in its two products.
            agrees_with_formula(ours, formula, (x, p, scale), allowed=4e-7)
            assert ours(x, p, scale).dtype == dtype


def test_only_what_is_asked_for():
    for blocks in (False, True):
        for function in (givens_chain, givens_merge):
            x, p, s = make(19, blocks)
            y = function(x, p, s)
            g = randn(*y.shape)
            every = torch.autograd.grad(y, (x, p, s), g)
            for i, t in enumerate((x, p, s)):
                inputs = [v.detach().requires_grad_(v is t) for v in (x, p, s)]
                (alone,) = torch.autograd.grad(function(*inputs), inputs[i], g)
                assert torch.equal(alone, every[i])


@pytest.mark.parametrize("blocks", [False, True], ids=["angles", "blocks"])
def test_second_derivatives(blocks):
    tensors = make(6, blocks, torch.float64, rows=2)
    differentiates(givens_chain, tensors)
    differentiates(givens_merge, tensors)
    if not INTERPRETED:
        near = torch.eye(2) + 0.2 * randn(5, 2, 2) if blocks else randn(5)
        tensors = (
            randn(2, 6, grad=True),
            near.requires_grad_(),
            (randn(6).abs() + 1).requires_grad_(),
        )
        differentiates(lambda x, p, s: givens_chain(x, p, s, inverse=True), tensors)


def test_same_bits_for_any_batch_and_thread_count():
    rows = 70 if INTERPRETED else 300
    x, p, s = make(257, False, rows=rows)
    g = randn(rows, 257)
    whole = givens_chain(x, p, s)
    grads = torch.autograd.grad(whole, (x, p, s), g)
    for begin, end in ((0, 1), (5, 12), (rows - 10, rows)):
        assert torch.equal(givens_chain(x[begin:end], p, s), whole[begin:end])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        again = givens_chain(x, p, s)
        assert torch.equal(again, whole)
        for a, b in zip(torch.autograd.grad(again, (x, p, s), g), grads):
            assert torch.equal(a, b)
    finally:
        torch.set_num_threads(threads)


@settings(max_examples=6 if INTERPRETED else 40)
@given(d=st.integers(1, 70), rows=st.integers(0, 5), blocks=st.booleans(), merged=st.booleans())
def test_any_shape_and_stride(d, rows, blocks, merged):
    x, p, s = make(d, blocks, torch.float64, rows, grad=False)
    q = product(p, d)
    ours = givens_merge if merged else givens_chain
    want = (x * s) @ q.T if merged else (x @ q) * s
    for view in (x, x.t().contiguous().t(), x[None].expand(2, rows, d)):
        got = ours(view, p, s)
        assert got.shape == view.shape
        torch.testing.assert_close(got, want.expand(view.shape), rtol=1e-10, atol=1e-10)


def test_no_rows_have_zero_gradients():
    for function in (givens_chain, givens_merge):
        x, p, s = make(9, False, rows=0)
        dx, dp, ds = torch.autograd.grad(function(x, p, s).sum(), (x, p, s))
        assert dx.shape == (0, 9) and not dp.any() and not ds.any()


def test_infinities_stay_in_their_rows_and_pairs():
    """An unpaired column passes alone: infinity times nothing does not make a NaN of it."""
    for d in (3, 5, 7, 31):
        x, p, _ = make(d, False, grad=False)
        x[1, d - 1], x[2, 0] = float("inf"), float("nan")
        y = givens_chain(x, p)
        with solera.backend("reference"):
            want = givens_chain(x, p)
        torch.testing.assert_close(y, want, equal_nan=True)
        assert y[[0, 3, 4]].isfinite().all()
        back = givens_merge(x, p)
        with solera.backend("reference"):
            torch.testing.assert_close(back, givens_merge(x, p), equal_nan=True)
    assert givens_chain(torch.full((1, 8), 1e30, device=DEVICE), randn(7)).isfinite().all()


@pytest.mark.parametrize("blocks", [False, True], ids=["angles", "blocks"])
def test_opcheck(blocks):
    x, p, s = make(20, blocks, grad=False)
    c = torch.stack([p.cos(), p.sin()]) if p.dim() == 1 else p.flatten(1).t().contiguous()
    dy = randn(5, 20)
    for v, g, reverse in ((x, dy, False), (x.t().contiguous().t(), dy[:1].expand(5, 20), True)):
        torch.library.opcheck(ops.givens_chain.default, (v, c, s, reverse))
        needs = (True, True, True) if reverse else (False, True, False)
        torch.library.opcheck(ops.givens_chain_backward.default, (g, v, c, s, reverse, *needs))


def test_compiles_into_one_graph():
    compiles(givens_chain, lambda n: make(4 * n, False, rows=n), rtol=1e-5, atol=1e-5)
    compiles(givens_merge, lambda n: make(4 * n, True, rows=n), rtol=1e-5, atol=1e-5)


def test_torch_func():
    works_under_torch_func(givens_chain, make(9, False))
    x, p, s = make(9, False, grad=False)
    batch = torch.stack([p, -p])
    got = torch.func.vmap(lambda p: givens_chain(x, p, s))(batch)
    torch.testing.assert_close(got[1], givens_chain(x, -p, s))


def test_soft_orthogonality_penalty_is_the_papers_distance():
    blocks = randn(6, 2, 2, dtype=torch.float64, grad=True)
    eye = torch.eye(2, device=DEVICE)
    want = ((blocks.mT @ blocks - eye) ** 2).sum()
    torch.testing.assert_close(soft_orthogonality_penalty(blocks), want)
    assert torch.autograd.gradcheck(soft_orthogonality_penalty, blocks)
    c, s = randn(4).cos(), randn(4)
    c, s = s.cos(), s.sin()
    turns = torch.stack([c, -s, s, c], 1).view(4, 2, 2)
    assert soft_orthogonality_penalty(turns) < 1e-12
    with pytest.raises(ValueError, match=r"blocks: expected shape \(P, 2, 2\)"):
        soft_orthogonality_penalty(randn(3, 2, 3))


def test_half_parameters():
    x, p, s = make(33, False, torch.bfloat16)
    half = [t.detach().bfloat16().requires_grad_() for t in (p, s)]
    y = givens_chain(x, *half)
    assert_accurate(
        y, (x.detach().double() @ product(half[0].detach(), 33)) * half[1].detach().double()
    )
    grads = torch.autograd.grad(y.sum(), (x, *half))
    assert [g.dtype for g in grads] == [torch.bfloat16] * 3


def test_bad_input():
    x, p, s = make(8, False, grad=False)
    with pytest.raises(TypeError, match="x: expected float32"):
        givens_chain(x.long(), p)
    with pytest.raises(ValueError, match="x: expected at least 1 dimension"):
        givens_chain(x[0, 0], p)
    with pytest.raises(ValueError, match=r"x: expected a last dimension of at least 1"):
        givens_chain(x[:, :0], p)
    with pytest.raises(ValueError, match=r"theta_or_blocks: expected angles \(7,\) or blocks"):
        givens_chain(x, p[:, None])
    with pytest.raises(ValueError, match=r"theta_or_blocks: expected shape \(7,\)"):
        givens_chain(x, p[1:])
    with pytest.raises(ValueError, match=r"theta_or_blocks: expected shape \(7, 2, 2\)"):
        givens_chain(x, randn(7, 2, 3))
    with pytest.raises(TypeError, match="theta_or_blocks: float64 with x"):
        givens_chain(x, p.double())
    with pytest.raises(ValueError, match=r"scale: expected shape \(8,\)"):
        givens_merge(x, p, s[1:])
    with pytest.raises(ValueError, match=r"theta_or_blocks.*weight"):
        givens_merge(x, p[1:])
    c = torch.stack([p.cos(), p.sin()])
    for bad in (c[:, 1:], c[:1], c.double()):
        with pytest.raises(Exception):  # noqa: B017 - the op itself, whatever serves it, reads nothing out of bounds
            ops.givens_chain(x, bad, torch.ones(3, device=DEVICE), False)
