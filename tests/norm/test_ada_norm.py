"""Core ada_norm: the kernel against the formula in float64, its gradients, and its bad input."""

import pytest
import torch
import torch.nn.functional as F
from ada_cases import NAMES, NORMS, both, compare, formula, make, ours, same
from helpers import DEVICE, DTYPES, INTERPRETED, ULP, assert_accurate, double, randn, relative_error
from hypothesis import given
from hypothesis import strategies as st

from solera.norm import ada_layer_norm, ada_rms_norm

# One row of two, below a vector, a tail, a chunk and a tail of tokens, samples of few tokens together in a
# chunk, and rows wider than the GPU kernels' register tile.
SHAPES = [(1, 1, 2), (3, 2, 5), (2, 70, 17), (5, 9, 33), (2, 3, 128), (9, 40), (2, 1, 8192 + 40)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", NORMS)
def test_forward_and_backward_against_float64(kind, shape, dtype):
    compare(kind, make(shape, dtype))


FORMS = [
    ("one", "one", "one"),
    ("token", "token", "token"),
    ("one", "sample", "token"),
    ("token", "one", "sample"),
    ("sample", "token", "one"),
    ("sample", "token", "sample"),
    ("one", "token", "one"),
]


@pytest.mark.parametrize("forms", FORMS, ids="-".join)
def test_forms_of_gate_scale_and_shift(forms):
    for shape in ((3, 70, 20), (3, 5, 20)) if not INTERPRETED else ((3, 5, 20),):
        same(make(shape, torch.float64, forms), f"{shape}")
        compare("layer", make(shape, torch.bfloat16, forms), context=f"{shape}")


@pytest.mark.parametrize("kind", NORMS)
def test_any_subset_of_the_arguments(kind):
    for bits in range(0, 64, 3 if INTERPRETED else 1):
        parts = [n for i, n in enumerate(NAMES[1:]) if bits >> i & 1]
        if "gate" in parts and "branch" not in parts:
            continue
        form = ("one", "sample", "token")[bits // 3 % 3]
        same(make((3, 4, 20), torch.float64, form, parts), f"{form} {parts}", bits % 2 == 0, kind)


@pytest.mark.parametrize("small", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("form", ["one", "sample", "token"])
def test_parameters_of_another_dtype(form, small):
    """Parameters in float32 with x in bfloat16, and a half that is neither x's dtype nor the accumulator's."""
    tensors = make((3, 6, 40), torch.bfloat16, form, small=small)
    g = randn(3, 6, 40, dtype=torch.bfloat16)
    got = both(ours, "layer", tensors, (g, g))
    exact = both(formula, "layer", double(*tensors), (g.double(), g.double()))
    for a, b in zip(got, exact, strict=True):
        assert relative_error(a, b) <= 2 * ULP[torch.bfloat16]
    for a, b, like in zip(got[2:], exact[2:], tensors, strict=True):
        assert a.dtype == like.dtype
        if like.dtype == small:
            # What feeds these is rounded to bfloat16 nowhere but in h.
            assert relative_error(a, b) <= ULP[torch.bfloat16]


@pytest.mark.parametrize("form", ["sample", "keepdim"])
def test_views_of_chunk_are_read_in_place(form):
    B, T, D = 3, 5, 24
    x, branch = randn(B, T, D, grad=True), randn(B, T, D, grad=True)
    cond = randn(B, 6 * D) if form == "sample" else randn(B, 1, 6 * D)
    cond.requires_grad_()
    modulation = cond.chunk(6, dim=-1)
    h, y = ada_layer_norm(
        x, shift=modulation[0], scale=modulation[1], gate=modulation[2], branch=branch
    )
    rows = [m.reshape(B, D).detach().clone() for m in modulation[:3]]
    h2, y2 = ada_layer_norm(x, shift=rows[0], scale=rows[1], gate=rows[2], branch=branch)
    assert torch.equal(y, y2) and torch.equal(h, h2)
    y.sum().backward()
    assert cond.grad is not None and not cond.grad[..., 3 * D :].any()
    assert torch.equal(
        cond.grad[..., :D].reshape(B, D), torch.full((B, D), float(T), device=DEVICE)
    )


def test_one_dimension_and_more_than_three():
    x, s = randn(20), randn(20)
    torch.testing.assert_close(
        ada_layer_norm(x, scale=s), F.layer_norm(x, (20,), eps=1e-6) * (1 + s)
    )
    h, y = ada_layer_norm(x, scale=s, branch=x)
    assert h.shape == y.shape == x.shape
    x = randn(2, 3, 4, 20, grad=True)
    full = randn(2, 3, 4, 20, grad=True)
    for scale in (randn(2, 20), randn(2, 1, 1, 20)):
        want = F.layer_norm(x, (20,), eps=1e-6) * (1 + scale.view(2, 1, 1, 20)) + full
        h, y = ada_layer_norm(x, scale=scale, shift=full, branch=torch.zeros_like(x))
        torch.testing.assert_close(y, want)
        g = randn(2, 3, 4, 20)
        torch.testing.assert_close(
            torch.autograd.grad(y, (x, full), g), torch.autograd.grad(want, (x, full), g)
        )


def test_gradients_of_half_parameters_are_summed_in_float32():
    x = randn(2, 512, 48, dtype=torch.bfloat16).abs()
    scale = torch.zeros(2, 48, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    g = randn(2, 512, 48, dtype=torch.bfloat16).abs()
    got = torch.autograd.grad(ada_rms_norm(x, scale=scale), scale, g)[0]
    d = double(scale)
    truth = formula("rms", x.double(), None, None, d, None, None, None, 1e-6)[0]
    assert relative_error(got, torch.autograd.grad(truth, d, g.double())[0]) <= 2.5e-3


@pytest.mark.parametrize("kind", NORMS)
def test_large_mean_keeps_eager_accuracy(kind):
    tensors = list(make((4, 16, 256), torch.float32))
    tensors[0] = (tensors[0].detach() + 1e3).requires_grad_()
    compare(kind, tuple(tensors))


@pytest.mark.parametrize("form", ["one", "sample", "token"])
@pytest.mark.parametrize("kind", NORMS)
def test_gradcheck_and_gradgradcheck(kind, form):
    fast = {"fast_mode": INTERPRETED}  # random projections in place of every element
    tensors = make((2, 3, 4), torch.float64, form)
    assert torch.autograd.gradcheck(lambda *t: ours(kind, *t, eps=0.1), tensors, **fast)
    assert torch.autograd.gradgradcheck(lambda *t: ours(kind, *t, eps=0.1), tensors, **fast)
    x, *rest = make((2, 3, 4), torch.float64, form, ("scale", "weight"))
    assert torch.autograd.gradgradcheck(
        lambda x, s, w: ours(kind, x, None, None, s, None, w, None, eps=0.1)[0],
        (x, rest[2], rest[4]),
        **fast,
    )


def test_only_one_output_is_used():
    tensors = make((2, 3, 8), torch.float32)
    x, branch, gate = tensors[:3]
    y, h = ours("layer", *tensors)
    dx, dbranch, dgate = torch.autograd.grad(h.sum(), (x, branch, gate), retain_graph=True)
    assert torch.equal(dx, torch.ones_like(x))
    torch.testing.assert_close(dbranch, gate.unsqueeze(1).expand_as(x))
    torch.testing.assert_close(dgate, branch.sum(1))
    y, h = ours("layer", *tensors)
    (gx,) = torch.autograd.grad(h.sum(), x, create_graph=True)
    assert torch.equal(gx, torch.ones_like(x))


def test_frozen_inputs():
    whole = make((2, 3, 8), torch.float32)
    g = randn(2, 3, 8)
    grads = torch.autograd.grad(ours("layer", *whole), whole, (g, g))
    for i in range(7):
        some = [t.detach() for t in whole]
        some[i].requires_grad_()
        out = [(o, g) for o in ours("layer", *some) if o.requires_grad]
        assert len(out) == (2 if i < 3 else 1)  # h depends on x, branch and gate alone
        (one,) = torch.autograd.grad([o for o, _ in out], some[i], [g for _, g in out])
        torch.testing.assert_close(one, grads[i], rtol=0, atol=0)


def test_strided_input_and_expanded_gradient():
    base = randn(4, 6, 10)
    scale = randn(4, 20)[:, ::2]
    for view in (base, base.transpose(1, 2)[..., :6], base[:1].expand(4, 6, 10), base.flip(0)):
        s = scale[:, : view.shape[-1]]
        assert torch.equal(
            ada_layer_norm(view, scale=s), ada_layer_norm(view.contiguous(), scale=s.contiguous())
        )
    x = base.clone().requires_grad_()
    (dx,) = torch.autograd.grad(ada_layer_norm(x, scale=scale).sum(), x)
    (dx2,) = torch.autograd.grad(ada_layer_norm(x, scale=scale), x, torch.ones_like(x))
    assert torch.equal(dx, dx2)
    rows = randn(10).expand(4, 10).requires_grad_()
    y = ada_layer_norm(x, shift=rows, scale=rows)
    assert torch.equal(y, ada_layer_norm(x, shift=rows.contiguous(), scale=rows.contiguous()))


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 4)], ids=str)
@pytest.mark.parametrize("form", ["one", "sample", "token"])
def test_empty(shape, form):
    tensors = make(shape, torch.float32, form)
    y, h = ours("layer", *tensors)
    assert y.shape == h.shape == torch.Size(shape)
    grads = torch.autograd.grad(y.sum() + h.sum(), tensors)
    for g, t in zip(grads, tensors):
        assert g.shape == t.shape and not g.any()


def test_extreme_values():
    x = randn(4, 6, 24)
    x[0, 0, 3], x[1, 1, 4] = float("nan"), float("inf")
    x[2] = 7.0
    s, t = randn(4, 24), randn(4, 24)
    y = ada_layer_norm(x, scale=s, shift=t)
    assert y[0, 0].isnan().all() and y[1, 1].isnan().all()
    assert torch.isfinite(y[0, 1:]).all() and torch.isfinite(y[2:]).all()
    assert torch.equal(y[2], t[2].expand(6, 24))


@given(
    lead=st.lists(st.integers(0, 5), min_size=1, max_size=3),
    D=st.integers(0, 40),
    kind=st.sampled_from(sorted(NORMS)),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([1e-30, 1e-3, 1.0, 1e4, 1e30]),
    forms=st.tuples(*[st.sampled_from(["one", "sample", "token"])] * 3),
    parts=st.sets(st.sampled_from([n for n in NAMES[1:] if n != "gate"])),
    swap=st.booleans(),
)
def test_any_shape_dtype_and_scale(lead, D, kind, dtype, scale, forms, parts, swap):
    scale = min(scale, 1e4) if dtype == torch.float16 else scale
    x, branch, *rest = make((*lead, D), dtype, forms, parts, grad=False)
    x = x * scale
    if swap and len(lead) == 2 and lead[0] == lead[1]:
        x = x.transpose(0, 1)
    if len(lead) == 3:
        rest = [p.view(lead[0], 1, 1, D) if p is not None and p.dim() == 2 else p for p in rest]
    y, h = ours(kind, x, branch, *rest)
    assert y.shape == x.shape and y.dtype == dtype
    truth, today = formula(kind, *double(x, branch, *rest))[0], formula(kind, x, branch, *rest)[0]
    if torch.isfinite(today).all() and torch.isfinite(truth).all():
        assert_accurate(y, truth, today)


@pytest.mark.parametrize("form", ["one", "sample", "token"])
def test_same_bits_for_any_thread_count_and_batch(form):
    shape = (3, 70, 40) if INTERPRETED else (6, 150, 72)  # past one chunk of rows either way
    tensors = make(shape, torch.float32, form)
    g = randn(*shape)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1,) if INTERPRETED else (1, 2, 3):
            torch.set_num_threads(n)
            results.append(both(ours, "layer", tensors, (g, g)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))
    part = slice(1, 3)
    some = [t[part].detach().requires_grad_() if t.shape[:1] == shape[:1] else t for t in tensors]
    fewer = both(ours, "layer", some, (g[part], g[part]))
    for a, b, t in zip(fewer[2:], results[0][2:], tensors):
        if t.shape[:1] == shape[:1]:
            assert torch.equal(a, b[part])


@pytest.mark.no_interpreter
@pytest.mark.parametrize("width", [1024, 1027])
def test_large_tensors_take_the_streaming_stores(width):
    """Outputs of 16 MB and more pass the caches: same bits as for few of their rows."""
    tensors = make((9, 500, width), torch.float32)
    g = randn(9, 500, width)
    whole = both(ours, "layer", tensors, (g, g))
    part = slice(7, 9)
    some = [t[part].detach().requires_grad_() for t in tensors[:5]]
    some += [t.detach().requires_grad_() for t in tensors[5:]]
    few = both(ours, "layer", some, (g[part], g[part]))
    for a, b in zip(whole[:7], few):
        assert torch.equal(a[part], b)


def test_saved_for_backward_is_h_and_statistics_beyond_what_is_held():
    tensors = make((8, 64, 32), torch.float32, parts=("branch", "gate", "scale", "shift"))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        h, y = ada_layer_norm(*tensors[:1], **dict(zip(NAMES[1:5], tensors[1:5])))
    held = {t.data_ptr() for t in (*tensors[:5], h)}
    assert sum(t.numel() for t in saved if t.data_ptr() not in held) == 2 * 8 * 64
