"""Core lincomb: the kernel against the formula in float64, its gradients, and its bad input."""

import pytest
import torch
from helpers import DEVICE, DTYPES, INTERPRETED, ULP, assert_accurate, randn, relative_error
from hypothesis import given
from hypothesis import strategies as st

import solera
from solera.weights import lincomb

ops = torch.ops.solera
# One element, below a vector, odd, a tile and a tail, a chunk and a tail.
SHAPES = [(1,), (3, 5), (100,), (2048 + 24,), (3, 5461 + 17)]
COUNTS = (1, 2, 3, 4, 7, 8, 11)  # groups of 8, 4, 3, 2 and 1 streams


def exact(tensors, c, base=None):
    """The formula in float64, written out; c (K,)."""
    tensors, c = [t.double() for t in tensors], c.double()
    if base is None:
        return sum(ck * w for ck, w in zip(c, tensors))
    b = base.double()
    return b + sum(ck * (w - b) for ck, w in zip(c, tensors))


def eager(tensors, c, base=None):
    """What a user writes today, in the tensors' dtype."""
    total = torch.zeros_like(tensors[0]) if base is None else base
    for ck, w in zip(c.tolist(), tensors):
        total = total + ck * (w if base is None else w - base)
    return total


def assert_close_to(value, tensors, c, base=None):
    """Error within a few roundings of the terms, which may cancel."""
    truth = exact(tensors, c, base)
    terms = [
        ck * (w.double() - (0 if base is None else base.double()))
        for ck, w in zip(c.double(), tensors)
    ]
    size = sum(t.norm() for t in terms) + (0 if base is None else base.double().norm())
    rounding = 1.2e-7 * size * (1 if value.dtype != torch.float64 else 1e-8)
    assert (value.double() - truth).norm() <= rounding + ULP[value.dtype] * truth.norm()


def make(count, shape, dtype=torch.float32, with_base=False, grad=False):
    tensors = [randn(*shape, dtype=dtype, grad=grad) for _ in range(count)]
    base = randn(*shape, dtype=dtype, grad=grad) if with_base else None
    c_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return tensors, randn(count, dtype=c_dtype, grad=grad), base


@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", COUNTS)
def test_forward_and_backward_against_float64(count, dtype, with_base):
    for shape in SHAPES[:4] if INTERPRETED else SHAPES:
        tensors, c, base = make(count, shape, dtype, with_base, grad=True)
        g = randn(*shape, dtype=dtype)
        inputs = [c, *tensors] + ([base] if with_base else [])
        y = lincomb(tensors, c, base=base)
        ours = (y, *torch.autograd.grad(y, inputs, g))
        with torch.no_grad():
            assert torch.equal(lincomb(tensors, c, base=base), y)
            today = eager(tensors, c, base)
        copies = [t.detach().double().requires_grad_() for t in inputs]
        truth = exact(copies[1 : count + 1], copies[0], copies[-1] if with_base else None)
        truths = (truth, *torch.autograd.grad(truth, copies, g.double()))
        assert y.dtype == dtype
        assert_accurate(ours[0], truths[0], today, "out")
        # A dot of n terms that cancel: judged by the size of its terms.
        terms = (g.double().norm() * tensors[0].detach().double().norm() * count).item()
        assert (ours[1].double() - truths[1]).norm() <= 4 * ULP[c.dtype] * terms
        for a, b in zip(ours[2:], truths[2:]):
            assert a.dtype == dtype
            assert_accurate(a, b, b.to(torch.float32), "dtensor")


@pytest.mark.parametrize("count", [2, 9])
@pytest.mark.parametrize("with_base", [False, True])
def test_lists_and_columns_of_coefficients(count, with_base):
    shapes = [(4, 5), (0,), (7,), (), (3000,)]
    models = [[randn(s, grad=True) for s in shapes] for _ in range(count)]
    base = [randn(s) for s in shapes] if with_base else None
    c = randn(count, len(shapes), grad=True)
    out = lincomb(models, c, base=base)
    assert isinstance(out, list)
    flat = [t for m in models for t in m]
    grads = [randn(s) for s in shapes]
    dc, *dw = torch.autograd.grad(out, [c, *flat], grads)
    for item, shape in enumerate(shapes):
        column = [m[item].detach() for m in models]
        b = None if base is None else base[item]
        assert_close_to(out[item], column, c.detach()[:, item], b)
        assert out[item].shape == torch.Size(shape)
        for k in range(count):
            delta = column[k] if b is None else column[k] - b
            expected = (grads[item].double() * delta.double()).sum()
            torch.testing.assert_close(dc[k, item].double(), expected, rtol=1e-4, atol=1e-4)
            assert_accurate(
                dw[k * len(shapes) + item], c.detach()[k, item].double() * grads[item].double()
            )
    shared = randn(count, grad=True)
    (dshared,) = torch.autograd.grad(lincomb(models, shared, base=base), shared, grads)
    torch.testing.assert_close(dshared, dc.sum(1), rtol=1e-4, atol=1e-4)
    # A result that nothing depends on: its column is zero, the others as before.
    (partial,) = torch.autograd.grad(lincomb(models, c, base=base)[4], c, grads[4])
    assert torch.equal(partial[:, 4], dc[:, 4]) and not partial[:, :4].any()


def test_mixed_dtypes_promote_and_accumulate():
    w = {d: randn(1000, dtype=d) for d in DTYPES}
    f64, f32, bf16, f16 = DTYPES
    for group, base, result in (
        ((bf16, f16), None, f32), ((bf16, bf16), f32, f32), ((f32, f64, bf16), f16, f64),
        ((f16, f16, f16, f32, f16), bf16, f32), ((f64, f64), f32, f64),
    ):  # fmt: skip
        tensors, b = [w[d] for d in group], None if base is None else w[base]
        c = torch.linspace(-0.5, 1, len(group), dtype=torch.float64, device=DEVICE)
        y = lincomb(tensors, c, base=b)
        assert y.dtype == result
        assert_close_to(y, tensors, c, b)
        for out_dtype in DTYPES:
            z = lincomb(tensors, c, base=b, out_dtype=out_dtype)
            assert z.dtype == out_dtype
            assert_close_to(z, tensors, c, b)
        grads = [t.clone().requires_grad_() for t in tensors]
        cg = c.clone().requires_grad_()
        dc, *dw = torch.autograd.grad(lincomb(grads, cg, base=b).sum(), [cg, *grads])
        assert dc.dtype == f64 and [t.dtype for t in dw] == list(group)
        # Sums that partly cancel, in float32 where no float64 is present: an absolute bound.
        truth = torch.stack(
            [(t.double() - (0 if b is None else b.double())).sum() for t in tensors]
        )
        assert (dc - truth).abs().max() < (1e-9 if f64 in group else 1e-3)


def test_state_dicts():
    def model():
        return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).to(DEVICE)

    a, b, base = model().state_dict(), model().state_dict(), model().state_dict()
    out = lincomb([a, b], [0.25, 0.75], base=base)
    assert list(out) == list(a)
    for key in a:
        if a[key].dtype.is_floating_point:
            assert_accurate(
                out[key], exact([a[key], b[key]], torch.tensor([0.25, 0.75]), base[key])
            )
    model().load_state_dict(out)
    assert out["1.num_batches_tracked"] is not a["1.num_batches_tracked"]
    target = {key: torch.full_like(t, 3) for key, t in a.items()}
    assert lincomb([a, b], [0.25, 0.75], base=base, out=target) is target
    assert all(torch.equal(target[key], out[key]) for key in out)
    c = randn(2, len(a) - 1, grad=True)  # one column for each floating-point entry, in order
    lincomb([a, b], c)["1.weight"].sum().backward()
    assert c.grad[:, 2].tolist() == [4.0, 4.0] and c.grad[:, :2].any().item() is False
    b["1.num_batches_tracked"] = b["1.num_batches_tracked"] + 1
    with pytest.raises(ValueError, match=r"tensors\[1\]\['1.num_batches_tracked'\].*equal in all"):
        lincomb([a, b], [0.5, 0.5])
    renamed = {key.replace("0.", "2."): t for key, t in a.items()}
    with pytest.raises(
        ValueError, match=r"missing \['0.weight', '0.bias'\], unexpected \['2.weight'"
    ):
        lincomb([a, renamed], [0.5, 0.5])


def test_out_is_written_in_place_and_seen_by_autograd():
    tensors, c, base = make(3, (50, 7), with_base=True)
    expected = lincomb(tensors, c, base=base)
    out = torch.empty(50, 7, device=DEVICE)
    assert lincomb(tensors, c, base=base, out=out) is out
    assert torch.equal(out, expected)
    strided = torch.empty(7, 50, device=DEVICE).t()
    assert torch.equal(lincomb(tensors, c, base=base, out=strided), expected)
    for target in (tensors[1].clone(), base.clone()):
        mine = [tensors[0], target, tensors[2]] if target.equal(tensors[1]) else tensors
        around = base if mine[1] is target else target
        assert torch.equal(lincomb(mine, c, base=around, out=target), expected)
    x = randn(50, 7, grad=True)
    y = x * out
    lincomb(tensors, c, out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_overlapping_out_is_an_error():
    memory = randn(350)
    a, b, c = memory[:100], memory[100:200], memory[200:300]
    w = [0.5, 0.5]
    for out, name in ((memory[50:150], r"tensors\[0\]"), (memory[150:250], r"tensors\[1\]")):
        with pytest.raises(ValueError, match=f"out overlaps {name} in memory"):
            lincomb([a, b], w, out=out)
    with pytest.raises(ValueError, match=r"out\[0\] overlaps tensors\[0\]\[1\]"):
        lincomb([[a, b], [c, c]], w, out=[b, torch.empty(100, device=DEVICE)])
    with pytest.raises(ValueError, match=r"out\[0\] and out\[1\] overlap"):
        lincomb([[a, b], [b, a]], w, out=[c, c])
    with pytest.raises(ValueError, match="out overlaps base"):
        lincomb([a, b], w, base=c, out=memory[250:350])
    assert lincomb([a, b], w, out=b) is b


def test_frozen_tensors_cost_nothing():
    tensors, c, base = make(4, (256,), with_base=True)
    tensors[2].requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.numel()) or t, lambda t: t
    ):
        y = lincomb(tensors, c, base=base)
    assert sum(saved) == 4  # the coefficients: no tensor is needed for dw
    (dw,) = torch.autograd.grad(y, tensors[2], torch.ones_like(y))
    assert torch.equal(dw, c[2].expand(256))
    flags = [False, False, True, False, False]
    dots, found = ops.lincomb_backward([y.detach()], tensors, c, [base], False, flags)
    assert dots.numel() == 0 and len(found) == 1


@pytest.mark.parametrize("with_base", [False, True])
def test_gradcheck_and_gradgradcheck(with_base):
    tensors, c, base = make(3, (4,), torch.float64, with_base, grad=True)

    def f(c, base, *tensors):
        return lincomb(tensors, c, base=base)

    assert torch.autograd.gradcheck(f, (c, base, *tensors), fast_mode=INTERPRETED)
    assert torch.autograd.gradgradcheck(f, (c, base, *tensors), fast_mode=INTERPRETED)
    both = randn(2, 3, dtype=torch.float64, grad=True)

    def g(c, *t):
        return lincomb([t[:3], t[3:]], c)[1:]

    flat = [randn(n, dtype=torch.float64, grad=True) for n in (2, 1, 3, 2, 1, 3)]
    assert torch.autograd.gradcheck(g, (both, *flat), fast_mode=INTERPRETED)
    assert torch.autograd.gradgradcheck(g, (both, *flat), fast_mode=INTERPRETED)


def test_strided_and_expanded_input():
    base = randn(12, 20)
    c = torch.tensor([0.5, -1.0, 2.0], device=DEVICE)
    for view in (base.t(), base[:, ::2], base[None].expand(3, 12, 20), base.flip(0)):
        dense = view.contiguous()
        y = lincomb([view, dense, view], c, base=view)
        assert y.is_contiguous() and torch.equal(y, lincomb([dense] * 3, c, base=dense))
    tensors = [randn(5, 6, grad=True) for _ in range(3)]
    grads = torch.autograd.grad(lincomb(tensors, c).sum(), tensors)  # expanded, stride 0
    assert all(torch.equal(g, ck.expand(5, 6)) for g, ck in zip(grads, c))
    # Coefficients that are a strided view.
    wide = randn(6)[::2]
    assert torch.equal(lincomb(tensors, wide), lincomb(tensors, wide.contiguous()))


def test_extreme_values():
    inf, nan = float("inf"), float("nan")
    a = torch.tensor([nan, inf, 1e30, 1e-42, -0.0, 1.0] * 7, device=DEVICE)
    b = torch.ones_like(a)
    y = lincomb([a, b], [2.0, 1.0])
    expected = 2 * a + b
    torch.testing.assert_close(y, expected, equal_nan=True, rtol=1e-6, atol=0)
    assert lincomb([a, b], [1.0, 0.0], base=b)[5] == 1
    assert lincomb([a.half(), b.half()], [7e4, 0.0])[5] == inf
    assert lincomb([a], [1.0])[3] == a[3]  # denormals are kept


@given(
    shapes=st.lists(st.lists(st.integers(0, 6), max_size=3), min_size=1, max_size=4),
    count=st.integers(1, 10),
    data=st.data(),
    with_base=st.booleans(),
    columns=st.booleans(),
)
def test_any_shapes_dtypes_and_counts(shapes, count, data, with_base, columns):
    dtypes = [[data.draw(st.sampled_from(DTYPES)) for _ in shapes] for _ in range(count)]
    models = [[randn(s, dtype=d) for s, d in zip(shapes, row)] for row in dtypes]
    base = [randn(s) for s in shapes] if with_base else None
    c = randn(count, len(shapes)) if columns else randn(count)
    out = lincomb(models, c, base=base)
    for item, y in enumerate(out):
        column = [m[item] for m in models]
        b = None if base is None else base[item]
        ck = c[:, item] if columns else c
        assert_close_to(y, column, ck, b)


def test_same_bits_for_any_thread_count_and_list():
    sizes = (40000, 3, 16384, 16385) if not INTERPRETED else (5000, 3)
    models = [[randn(n) for n in sizes] for _ in range(5)]
    c = randn(5, grad=True)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            out = lincomb(models, c)
            results.append((*out, *torch.autograd.grad(out, c, [t.detach() for t in out])))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))
    columns = c.detach()[:, None].expand(5, len(sizes)).contiguous().requires_grad_()
    out = lincomb(models, columns)
    dots = torch.autograd.grad(out, columns, [t.detach() for t in out])[0]
    for item in range(len(sizes)):  # a tensor's result does not depend on the list it came in
        alone = c.detach().clone().requires_grad_()
        y = lincomb([m[item] for m in models], alone)
        assert torch.equal(y, results[0][item])
        assert torch.equal(torch.autograd.grad(y, alone, y.detach())[0], dots[:, item])


@pytest.mark.no_interpreter
def test_more_than_eight_streams_and_many_tensors():
    models = [[randn(17) for _ in range(300)] for _ in range(20)]
    c = randn(20)
    for item, y in enumerate(lincomb(models, c)):
        column = [m[item] for m in models]
        assert_close_to(y, column, c)


@pytest.mark.no_interpreter
def test_large_outputs_take_the_streaming_stores():
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        n = (18 << 20) // torch.finfo(dtype).bits * 8 + 5
        tensors, c, _ = make(2, (n,), dtype)
        aligned = lincomb(tensors, c)
        memory = torch.empty(n + 1, dtype=dtype, device=DEVICE)
        shifted = lincomb(tensors, c, out=memory[1:])  # not aligned to a vector
        assert torch.equal(aligned, shifted)
        assert relative_error(aligned, exact(tensors, c)) <= ULP[dtype]


# ---- the contract with torch --------------------------------------------------------------------------


def test_opcheck():
    a, b, g = randn(4, 6), randn(6, 4).t(), randn(1).expand(4, 6)
    small = randn(3)
    for c, base in ((randn(2), []), (randn(2, 2), [a, small])):
        tensors = [a, small, b, small]
        for out_dtype in (None, torch.bfloat16):
            torch.library.opcheck(ops.lincomb.default, (tensors, c, base, out_dtype))
        out = [torch.zeros(4, 6, device=DEVICE), torch.zeros(3, device=DEVICE)]
        torch.library.opcheck(ops.lincomb_out.default, (tensors, c, base, out))
        for need in (True, False):
            flags = [need, True, False, True] + [True] * len(base)
            args = ([g, small], tensors, c, base, need, flags)
            torch.library.opcheck(ops.lincomb_backward.default, args)


def compiled_matches(backend):
    def f(c, base, *tensors):
        soup = lincomb([[t, t[0]] for t in tensors], c, base=[base, base[0]])
        return soup[0] * 2 + soup[1]

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend=backend)
    for n in (4, 7):
        args = [randn(3, grad=True), *[randn(n, 6, grad=True) for _ in range(4)]]
        ours, plain = compiled(*args), f(*args)
        torch.testing.assert_close(ours, plain)
        g = randn(*plain.shape)
        for p, q in zip(torch.autograd.grad(ours, args, g), torch.autograd.grad(plain, args, g)):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)

    def into(out, a, b):
        lincomb([a, b], [0.5, 0.25], out=out)
        return out + 1

    a, b, out = randn(5), randn(5), torch.zeros(5, device=DEVICE)
    result = torch.compile(into, fullgraph=True, dynamic=True, backend=backend)(out, a, b)
    torch.testing.assert_close(result, out + 1)
    torch.testing.assert_close(out, 0.5 * a + 0.25 * b)


@pytest.mark.inductor
@pytest.mark.no_interpreter
def test_inductor():
    compiled_matches("inductor")


def test_functional_transforms():
    tensors, c, base = make(3, (6,), with_base=True)

    def loss(c, *tensors):
        return lincomb(tensors, c, base=base).square().sum()

    dc, dw = torch.func.grad(loss, argnums=(0, 1))(c, *tensors)
    inputs = [t.clone().requires_grad_() for t in (c, tensors[0])]
    plain = torch.autograd.grad(loss(inputs[0], inputs[1], *tensors[1:]), inputs)
    torch.testing.assert_close([dc, dw], list(plain))
    many = randn(5, 3)
    mapped = torch.func.vmap(lambda c: lincomb(tensors, c, base=base))(many)
    torch.testing.assert_close(mapped, torch.stack([lincomb(tensors, c, base=base) for c in many]))
    direction = randn(3)
    _, tangent = torch.func.jvp(lambda c: lincomb(tensors, c), (c,), (direction,))
    torch.testing.assert_close(tangent, lincomb(tensors, direction))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(c, direction)
        tangent = torch.autograd.forward_ad.unpack_dual(lincomb(tensors, dual)).tangent
    torch.testing.assert_close(tangent, lincomb(tensors, direction))


def test_backend_switch_autocast_and_create_graph():
    tensors, c, base = make(3, (40,), with_base=True, grad=True)
    y = lincomb(tensors, c, base=base)
    with solera.backend("reference"):
        torch.testing.assert_close(lincomb(tensors, c, base=base), y)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):  # elementwise ops are left alone
        assert torch.equal(lincomb(tensors, c, base=base), y)
    (dc,) = torch.autograd.grad(y.square().sum(), c, create_graph=True)
    assert dc.requires_grad
    (twice,) = torch.autograd.grad(dc.sum(), c)
    # The loss is quadratic in c: its Hessian is 2 D D^T, D the deltas.
    deltas = torch.stack([t - base for t in tensors]).detach().double()
    torch.testing.assert_close(twice.double(), 2 * deltas @ deltas.sum(0), rtol=1e-4, atol=1e-4)
