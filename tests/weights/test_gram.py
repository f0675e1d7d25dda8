"""Core gram: the kernel against the dots in float64, its gradients, and its bad input."""

import pytest
import torch
from helpers import DEVICE, DTYPES, INTERPRETED, ULP, assert_accurate, randn, relative_error
from hypothesis import given
from hypothesis import strategies as st

import solera
from solera.weights import gram

ops = torch.ops.solera
# One element, below a vector, odd, a tile and a tail, chunks and a tail.
SHAPES = [(1,), (3, 5), (1024 + 24,), (3, 11000 + 17)]
COUNTS = (1, 2, 3, 4, 5, 8, 11)  # blocks of 4, 3, 2 and 1 streams


def exact(tensors, base=None, dim=None):
    """The dots in float64."""
    deltas = torch.stack([t.double() - (0 if base is None else base.double()) for t in tensors])
    if dim is None:
        flat = deltas.unsqueeze(-1).flatten(1)
        return flat @ flat.T
    rows = deltas.movedim(1 + dim % (deltas.dim() - 1), 0).unsqueeze(-1).flatten(2)
    return rows @ rows.mT


def assert_dots(value, truth, wide):
    """Within a few float32 roundings of the vectors' lengths."""
    lengths = truth.diagonal(dim1=-2, dim2=-1).sqrt()
    size = lengths[..., :, None] * lengths[..., None, :] + 1e-300
    assert value.dtype == torch.float64 and value.shape == truth.shape
    assert ((value - truth).abs() / size).max() <= (3e-14 if wide else 1.2e-6)


def make(count, shape, dtype=torch.float32, with_base=False, grad=False):
    tensors = [randn(*shape, dtype=dtype, grad=grad) for _ in range(count)]
    return tensors, randn(*shape, dtype=dtype, grad=grad) if with_base else None


@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", (1, 2, 3, 9) if INTERPRETED else COUNTS)
def test_forward_and_backward_against_float64(count, dtype, with_base):
    for shape in SHAPES[:2] if INTERPRETED else SHAPES:
        tensors, base = make(count, shape, dtype, with_base, grad=True)
        inputs = [*tensors, *([base] if with_base else [])]
        found = gram(tensors, base=base)
        with torch.no_grad():
            assert torch.equal(gram(tensors, base=base), found)
        assert torch.equal(found, found.T)
        copies = [t.detach().double().requires_grad_() for t in inputs]
        truth = exact(copies[:count], copies[-1] if with_base else None)
        assert_dots(found, truth, dtype == torch.float64)
        g = randn(count, count, dtype=torch.float64)
        ours = torch.autograd.grad(found, inputs, g)
        truths = torch.autograd.grad(truth, copies, g)
        # Sums of terms that may cancel, the base's above all: judged by the largest gradient.
        size = max(t.norm() for t in truths)
        for a, b in zip(ours, truths):
            assert a.dtype == dtype
            assert (a.double() - b).norm() <= 4 * ULP[dtype] * size


def test_rows_lists_and_state_dicts():
    shapes = [(4, 5), (0,), (7,), (), (2, 3, 40), (3, 0)]
    models = [[randn(s, grad=True) for s in shapes] for _ in range(3)]
    base = [randn(s, grad=True) for s in shapes]
    flat = [t for m in models for t in m] + base
    whole = gram(models, base=base)
    assert whole.shape == (6, 3, 3)
    for dim in (None, 0, -1):
        parts = whole if dim is None else gram(models, base=base, dim=dim)
        truths = []
        for item, shape in enumerate(shapes):
            column = [m[item] for m in models]
            by_row = dim is not None and len(shape) > 1
            truth = exact(column, base[item], dim) if by_row else exact(column, base[item])
            if dim is not None and not by_row:
                truth = truth[None]
            assert_dots(parts[item], truth, False) if truth.numel() else None
            truths.append(truth)
        weights = [randn(*t.shape, dtype=torch.float64) for t in truths]
        ours = torch.autograd.grad(sum((w * p).sum() for w, p in zip(weights, parts)), flat)
        expected = torch.autograd.grad(sum((w * p).sum() for w, p in zip(weights, truths)), flat)
        for a, b in zip(ours, expected):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    named = [{"w": m[0], "n": torch.tensor(3, device=DEVICE), "b": m[2]} for m in models]
    assert torch.equal(gram(named), gram([[m[0], m[2]] for m in models]))
    rows = gram(named, dim=0)
    assert (
        list(rows) == ["w", "b"] and rows["w"].shape == (4, 3, 3) and rows["b"].shape == (1, 3, 3)
    )


def test_mixed_dtypes():
    w = {d: randn(1000, dtype=d) for d in DTYPES}
    f64, f32, bf16, f16 = DTYPES
    for group, base in (
        ((bf16, f16), None),
        ((bf16, bf16), f32),
        ((f32, f64, bf16), f16),
        ((f16,) * 5, f64),
    ):
        tensors = [w[d].clone().requires_grad_() for d in group]
        b = None if base is None else w[base]
        found = gram(tensors, base=b)
        assert_dots(found, exact(tensors, b), f64 in (*group, base))
        grads = torch.autograd.grad(found.sum(), tensors)
        assert [g.dtype for g in grads] == list(group)


@pytest.mark.parametrize("dim", [None, 0, 1])
@pytest.mark.parametrize("with_base", [False, True])
def test_gradcheck_and_gradgradcheck(with_base, dim):
    tensors, base = make(3, (3, 2), torch.float64, with_base, grad=True)

    def f(base, *tensors):
        return gram(tensors, base=base, dim=dim)

    assert torch.autograd.gradcheck(f, (base, *tensors), fast_mode=INTERPRETED)
    assert torch.autograd.gradgradcheck(f, (base, *tensors), fast_mode=INTERPRETED)


def test_only_what_is_asked_for():
    tensors, base = make(3, (40,), with_base=True)
    tensors[1].requires_grad_()
    g = randn(3, 3, dtype=torch.float64)
    (dw,) = torch.autograd.grad(gram(tensors, base=base), tensors[1], g)
    found = ops.gram_backward(g[None], tensors, [base], False, [False, True, False, False])
    assert len(found) == 1 and torch.equal(found[0], dw)


def test_strided_and_expanded_input():
    base = randn(12, 20)
    for view in (base.t(), base[:, ::2], base[None].expand(3, 12, 20), base.flip(0)):
        dense = view.contiguous()
        other = randn(*view.shape)
        for dim in (None, 0, -1):
            a = gram([view, other], base=view * 2, dim=dim)
            assert torch.equal(a, gram([dense, other], base=dense * 2, dim=dim))
    tensors = [randn(5, 6, grad=True) for _ in range(2)]
    grads = torch.autograd.grad(gram(tensors).sum(), tensors)  # expanded, stride 0
    for g in grads:
        assert_accurate(g, 2 * sum(t.detach().double() for t in tensors))


def test_extreme_values():
    nan, inf = float("nan"), float("inf")
    ones = torch.ones(70, device=DEVICE)
    bad = ones.clone()
    bad[3] = nan
    found = gram([ones, bad])
    assert found[0, 0] == 70 and found[0, 1].isnan() and found[1].isnan().all()
    assert gram([ones * 1e30])[0, 0] == inf  # products are float32
    huge = torch.full((70,), 1e30, dtype=torch.float64, device=DEVICE)
    assert relative_error(gram([huge])[0, 0], torch.tensor(70e60, dtype=torch.float64)) < 1e-14
    assert (
        relative_error(gram([ones * 1e-15])[0, 0], torch.tensor(70e-30, dtype=torch.float64)) < 1e-6
    )
    assert gram([torch.empty(0, device=DEVICE)] * 2).tolist() == [[0, 0], [0, 0]]
    assert gram([torch.empty(0, 3, device=DEVICE)] * 2, dim=0).shape == (0, 2, 2)
    assert gram([torch.empty(3, 0, device=DEVICE)] * 2, dim=0).tolist() == [[[0, 0], [0, 0]]] * 3


@given(
    shapes=st.lists(st.lists(st.integers(0, 6), max_size=3), min_size=1, max_size=4),
    count=st.integers(1, 6),
    data=st.data(),
    with_base=st.booleans(),
    dim=st.sampled_from([None, 0, -1]),
)
def test_any_shapes_dtypes_and_counts(shapes, count, data, with_base, dim):
    dtypes = [[data.draw(st.sampled_from(DTYPES)) for _ in shapes] for _ in range(count)]
    models = [[randn(s, dtype=d) for s, d in zip(shapes, row)] for row in dtypes]
    base = [randn(s) for s in shapes] if with_base else None
    for item, found in enumerate(gram(models, base=base, dim=dim)):
        column = [m[item] for m in models]
        b = None if base is None else base[item]
        truth = (
            exact(column, b, dim) if dim is not None and len(shapes[item]) > 1 else exact(column, b)
        )
        if found.numel():
            assert_dots(found.reshape(truth.shape), truth, False)


def test_same_bits_for_any_thread_count_and_list():
    sizes = (40000, 3, 16384, 16385) if not INTERPRETED else (5000, 3)
    models = [[randn(n) for n in sizes] for _ in range(5)]
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(gram(models))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])
    for item in range(len(sizes)):  # a tensor's dots do not depend on the list it came in
        assert torch.equal(gram([m[item] for m in models]), results[0][item])
    rows = torch.stack([models[0][0][:60], models[1][0][:60]])
    by_row = gram([rows, rows * 2], dim=0)
    for r in range(2):
        assert torch.equal(by_row[r], gram([rows[r], rows[r] * 2]))


@pytest.mark.no_interpreter
def test_many_tensors_and_models():
    models = [[randn(17) for _ in range(300)] for _ in range(20)]
    for item, found in enumerate(gram(models)):
        assert_dots(found, exact([m[item] for m in models]), False)
    large = [randn((9 << 20) + 5) for _ in range(2)]  # gradients take the streaming stores
    for t in large:
        t.requires_grad_()
    grads = torch.autograd.grad(gram(large)[0, 1], large)
    assert torch.equal(grads[0], large[1]) and torch.equal(grads[1], large[0])


# ---- the contract with torch --------------------------------------------------------------------------


def test_opcheck():
    a, b, c = randn(4, 6), randn(6, 4).t(), randn(1, 6).expand(4, 6)
    small = randn(3, 2)
    tensors = [a, small, b, small * 2]
    for base in ([], [c, small]):
        for by_row in (False, True):
            torch.library.opcheck(ops.gram.default, (tensors, base, 2, by_row))
            g = randn(7 if by_row else 2, 2, 2, dtype=torch.float64)
            flags = [True, False, True, True] + [True] * len(base)
            torch.library.opcheck(ops.gram_backward.default, (g, tensors, base, by_row, flags))


def compiled_matches(backend):
    def f(base, *tensors):
        whole = gram([[t, t[0]] for t in tensors], base=[base, base[0]])
        return whole.sum(0) + gram(tensors, base=base, dim=0).sum(0)

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend=backend)
    for n in (4, 7):
        args = [randn(n, 6, grad=True) for _ in range(4)]
        ours, plain = compiled(*args), f(*args)
        torch.testing.assert_close(ours, plain)
        g = randn(*plain.shape, dtype=torch.float64)
        for p, q in zip(torch.autograd.grad(ours, args, g), torch.autograd.grad(plain, args, g)):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)


@pytest.mark.inductor
@pytest.mark.no_interpreter
def test_inductor():
    compiled_matches("inductor")


def test_functional_transforms_backends_and_autocast():
    tensors, base = make(3, (4, 6), with_base=True)

    def loss(a, *rest):
        return gram([a, *rest], base=base, dim=0).square().sum().float()

    got = torch.func.grad(loss)(*tensors)
    leaf = tensors[0].clone().requires_grad_()
    (plain,) = torch.autograd.grad(loss(leaf, *tensors[1:]), leaf)
    torch.testing.assert_close(got, plain, rtol=1e-4, atol=1e-4)
    many = randn(5, 4, 6)
    mapped = torch.func.vmap(lambda a: gram([a, *tensors[1:]]))(many)
    torch.testing.assert_close(
        mapped, torch.stack([gram([a, *tensors[1:]]) for a in many]), rtol=1e-5, atol=1e-5
    )
    found = gram(tensors, base=base)
    with solera.backend("reference"):
        torch.testing.assert_close(gram(tensors, base=base), found, rtol=1e-5, atol=1e-5)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert torch.equal(gram(tensors, base=base), found)


def test_bad_input():
    a, i64 = torch.ones(3, device=DEVICE), torch.ones(3, dtype=torch.int64, device=DEVICE)
    for call, kind, message in (
        (lambda: gram([]), ValueError, "tensors: expected at least one model"),
        (lambda: gram(a), TypeError, "tensors: expected a list of K"),
        (lambda: gram([a, i64]), TypeError, r"tensors\[1\]: expected float32.*int64"),
        (lambda: gram([a, torch.ones(4, device=DEVICE)]), ValueError, r"tensors\[1\]: expected shape \(3,\)"),
        (lambda: gram([a, a], base=[a]), TypeError, "base: expected a tensor"),
        (lambda: gram([[a], [a, a]]), ValueError, r"tensors\[1\]: expected 1 tensors"),
        (lambda: gram([a, a.to("meta")]), ValueError, r"tensors\[1\]: expected device"),
        (lambda: gram([a[None]], dim=2), ValueError, "dim: 2 is out of range"),
        (lambda: gram([a], dim=0.5), TypeError, "dim: expected an integer"),
        (lambda: gram([{"a": a}, {"b": a}]), ValueError, r"missing \['a'\], unexpected \['b'\]"),
    ):  # fmt: skip
        with pytest.raises(kind, match=message):
            call()
