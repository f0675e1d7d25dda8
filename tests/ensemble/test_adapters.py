"""Core adapters: the three forms against a loop over adapters, their gradients, bits, and bad input."""

import pytest
import torch
import torch.nn.functional as F
from function_checks import compiles, differentiates, works_under_torch_func
from helpers import DEVICE, DTYPES, INTERPRETED, ULP, assert_accurate, double, randn, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st

import solera
from solera.ensemble import batched_adapter, moe_lora_linear, multi_lora_linear
from solera.ensemble.adapters import branches

ops = torch.ops.solera
FLOATS = DTYPES[:3] if INTERPRETED else DTYPES


def make(N, I, O, E, r, dtype=torch.float32, bias=True):
    x = randn(N, I, dtype=dtype, grad=True)
    weight = randn(O, I, dtype=dtype, scale=max(I, 1) ** -0.5, grad=True)
    a = randn(E, r, I, dtype=dtype, scale=max(I, 1) ** -0.5, grad=True)
    b = randn(E, O, r, dtype=dtype, grad=True)
    return x, weight, a, b, randn(O, dtype=dtype, grad=True) if bias else None


def any_index(E, *shape):
    return torch.randint(-1, E, shape).to(DEVICE)


def loop(x, weight, a, b, bias, index, gates=None, scaling=0.7):
    """As written today: the layer, then each adapter on its rows; index and gates (N, k)."""
    y = F.linear(x, weight, bias)
    for slot in range(index.shape[1]):
        for e in range(a.shape[0]):
            rows = (index[:, slot] == e).nonzero().squeeze(1)
            part = scaling * (x[rows] @ a[e].T) @ b[e].T
            if gates is not None:
                part = part * gates[rows, slot].unsqueeze(1).to(part.dtype)
            y = y.index_add(0, rows, part.to(y.dtype))
    return y


def compare(ours, today, tensors):
    """Values and gradients within twice the loop's error, or a few roundings of few values."""
    tensors = [t for t in tensors if t is not None]
    y = ours()
    dy = randn(*y.shape, dtype=y.dtype)
    mine = (y, *torch.autograd.grad(y, tensors, dy))
    other = today(*tensors)
    other = (other, *torch.autograd.grad(other, tensors, dy))
    exact = [double(t) for t in tensors]
    truth = today(*exact)
    truth = (truth, *torch.autograd.grad(truth, exact, dy.double()))
    for i, (m, t, o) in enumerate(zip(mine, truth, other, strict=True)):
        if m.dtype == torch.float64:
            assert relative_error(m, t) < 1e-13, i
        elif m.numel() < 64:
            assert relative_error(m, t) <= 4 * max(ULP[m.dtype], relative_error(o, t)), i
        else:
            assert_accurate(m, t, o, f"value {i}")


# (N, I, O, E, r): one of each, odd sizes, more rows than a tile, rank above a block, many adapters.
SHAPES = [(1, 1, 1, 1, 1), (9, 5, 7, 3, 4), (70, 40, 33, 2, 40)]
if not INTERPRETED:
    SHAPES += [(600, 24, 1100, 3, 5), (300, 2100, 16, 70, 2)]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_indexed_against_a_loop(shape, dtype):
    x, weight, a, b, bias = make(*shape, dtype=dtype)
    index = any_index(shape[3], shape[0])
    compare(
        lambda: multi_lora_linear(x, weight, a, b, index=index, scaling=0.7, bias=bias),
        lambda *t: loop(*t, index.unsqueeze(1)),
        (x, weight, a, b, bias),
    )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("k", [1, 3])
def test_sparsely_gated_against_a_loop(k, dtype):
    N, E = 40, 5
    x, weight, a, b, _ = make(N, 20, 30, E, 4, dtype, bias=False)
    index, gates = any_index(E, N, k), randn(N, k, dtype=dtype, grad=True)
    compare(
        lambda: moe_lora_linear(x, weight, a, b, gates, index=index, scaling=0.7),
        lambda x, weight, a, b, gates: loop(x, weight, a, b, None, index, gates),
        (x, weight, a, b, gates),
    )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_densely_gated_against_a_loop(dtype):
    N, E = 40, 5
    x, weight, a, b, bias = make(N, 20, 30, E, 4, dtype)
    gates = randn(N, E, dtype=dtype, grad=True)
    every = torch.arange(E, device=DEVICE).expand(N, E)
    compare(
        lambda: multi_lora_linear(x, weight, a, b, gates=gates, scaling=0.7, bias=bias),
        lambda *t: loop(*t[:5], every, t[5]),
        (x, weight, a, b, bias, gates),
    )


def test_dense_members():
    E, T = 4, 11
    _, weight, a, b, bias = make(1, 9, 13, E, 3, torch.float64)
    own = randn(E, T, 9, dtype=torch.float64)
    formula = lambda x: F.linear(x, weight, bias) + 0.7 * (x @ a.mT) @ b.mT
    y = multi_lora_linear(own, weight, a, b, scaling=0.7, bias=bias)
    torch.testing.assert_close(y, formula(own))
    shared = multi_lora_linear(own[0], weight, a, b, scaling=0.7, bias=bias)
    torch.testing.assert_close(shared, formula(own[0].expand(E, T, 9)))
    assert shared.shape == (E, T, 13)
    each = torch.rand(E, dtype=torch.float64, device=DEVICE)
    y = multi_lora_linear(own, weight, a, b, scaling=each, bias=bias)
    want = F.linear(own, weight, bias) + each[:, None, None] * ((own @ a.mT) @ b.mT)
    torch.testing.assert_close(y, want)


def test_samples_and_rows_of_three_dimensions():
    B, T, E = 3, 5, 4
    _, weight, a, b, _ = make(1, 9, 13, E, 3, torch.float64, bias=False)
    x = randn(B, T, 9, dtype=torch.float64)
    sample = torch.tensor([2, -1, 0], device=DEVICE)
    y = multi_lora_linear(x, weight, a, b, index=sample, scaling=1)
    rows = sample[:, None].expand(B, T)
    assert torch.equal(y, multi_lora_linear(x, weight, a, b, index=rows, scaling=1))
    flat = multi_lora_linear(x.flatten(0, 1), weight, a, b, index=rows.flatten(), scaling=1)
    assert torch.equal(y.flatten(0, 1), flat)
    torch.testing.assert_close(y[0], x[0] @ weight.T + (x[0] @ a[2].T) @ b[2].T)
    torch.testing.assert_close(y[1], x[1] @ weight.T)
    gates = torch.rand(B, E, dtype=torch.float64, device=DEVICE)
    wide = gates[:, None].expand(B, T, E)
    y = multi_lora_linear(x, weight, a, b, gates=gates, scaling=1)
    assert torch.equal(y, multi_lora_linear(x, weight, a, b, gates=wide, scaling=1))


def test_a_generated_adapter_for_every_sample():
    """HyperTuning: a batch of tasks, each with the factors that a network wrote for it."""
    B, T = 3, 4
    x, weight = randn(B, T, 6), randn(5, 6)
    a, b = randn(B, 2, 6, grad=True), randn(B, 5, 2, grad=True)
    y = multi_lora_linear(x, weight, a, b, index=torch.arange(B, device=DEVICE), scaling=0.5)
    want = torch.stack([x[i] @ (weight + 0.5 * b[i] @ a[i]).T for i in range(B)])
    torch.testing.assert_close(y, want)
    mine = torch.autograd.grad(y.square().sum(), (a, b))
    torch.testing.assert_close(mine, torch.autograd.grad(want.square().sum(), (a, b)))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
def test_batched_adapter(activation, dtype):
    N, E, D, m = 30, 3, 20, 6
    x, down, up = randn(N, D, dtype=dtype, grad=True), randn(E, m, D, dtype=dtype), randn(E, D, m)
    down, up = (t.detach().to(dtype).mul(0.2).requires_grad_() for t in (down, up))
    c, f = randn(E, m, dtype=dtype, grad=True), randn(E, D, dtype=dtype, grad=True)
    index = any_index(E, N)

    def today(x, down, up, c, f):
        y = x
        for e in range(E):
            rows = (index == e).nonzero().squeeze(1)
            h = getattr(F, activation)(F.linear(x[rows], down[e], c[e]))
            y = y.index_add(0, rows, 0.5 * F.linear(h, up[e], f[e]))
        return y

    compare(
        lambda: batched_adapter(
            x, down, up, index, down_bias=c, up_bias=f, activation=activation, scaling=0.5
        ),
        today,
        (x, down, up, c, f),
    )


def test_members_of_a_batched_adapter_have_rows_of_their_own():
    x, down, up = randn(3, 4, 8), randn(3, 2, 8), randn(3, 8, 2)
    y = batched_adapter(x, down, up, activation="relu", residual=False)
    torch.testing.assert_close(y, (x @ down.mT).relu() @ up.mT)


def test_gradcheck_and_gradgradcheck():
    x, weight, a, b, bias = make(3, 3, 2, 2, 2, torch.float64)
    index = torch.tensor([[1, 0], [-1, 1], [0, 0]], device=DEVICE)
    gates = randn(3, 2, dtype=torch.float64, grad=True)
    f = lambda x, w, a, b, d, g: multi_lora_linear(x, w, a, b, index=index, gates=g, bias=d)
    differentiates(f, (x, weight, a, b, bias, gates))
    gates = randn(3, 2, dtype=torch.float64, grad=True)
    dense = lambda x, a, b, g: multi_lora_linear(x, weight.detach(), a, b, gates=g, scaling=0.5)
    differentiates(dense, (x, a, b, gates))
    if not INTERPRETED:
        down, c = randn(2, 2, 3, dtype=torch.float64, grad=True), randn(2, 2, dtype=torch.float64)
        up, place = randn(2, 3, 2, dtype=torch.float64, grad=True), index[:, 0]
        adapter = lambda x, d, u, c: batched_adapter(x, d, u, place, down_bias=c, activation="silu")
        differentiates(adapter, (x, down, up, c.requires_grad_()))


def test_each_gradient_alone_is_the_one_among_all():
    tensors = make(20, 6, 5, 3, 2)
    index, gates = any_index(3, 20, 2), randn(20, 2, grad=True)
    names = (*tensors, gates)
    call = lambda x, w, a, b, d, g: multi_lora_linear(x, w, a, b, index=index, gates=g, bias=d)
    dy = randn(20, 5)
    every = torch.autograd.grad(call(*names), names, dy)
    for i, want in enumerate(every):
        alone = [t.detach().requires_grad_(i == j) for j, t in enumerate(names)]
        (got,) = torch.autograd.grad(call(*alone), alone[i], dy)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_float32_parameters_with_half_input():
    x, weight, a, b, bias = make(20, 30, 25, 3, 4)
    x = x.detach().bfloat16().requires_grad_()
    index = any_index(3, 20)
    y = multi_lora_linear(x, weight, a, b, index=index, scaling=0.7, bias=bias)
    dy = randn(*y.shape, dtype=torch.bfloat16)
    grads = torch.autograd.grad(y, (x, weight, a, b, bias), dy)
    assert [t.dtype for t in (y, *grads)] == [torch.bfloat16] * 2 + [torch.float32] * 4
    exact = [double(t) for t in (x, weight, a, b, bias)]
    truth = loop(*exact, index.unsqueeze(1))
    for mine, want in zip(
        (y, *grads), (truth, *torch.autograd.grad(truth, exact, dy.double())), strict=True
    ):
        assert relative_error(mine, want) <= 1.5 * ULP[torch.bfloat16]


def test_what_a_row_does_not_use_does_not_reach_it():
    x, weight, a, b, _ = (None if t is None else t.detach() for t in make(6, 5, 4, 3, 2))
    index = torch.tensor([0, 1, 2, -1, 0, 2], device=DEVICE)
    clean = multi_lora_linear(x, weight, a, b, index=index)
    a[1], b[1], x[1] = float("nan"), float("inf"), float("nan")
    y = multi_lora_linear(x, weight, a, b, index=index)
    others = [0, 2, 3, 4, 5]
    assert torch.equal(y[others], clean[others]) and y[1].isnan().all()


@pytest.mark.parametrize("empty", range(4))
def test_empty_sizes(empty):
    shape = [6, 5, 4, 3, 2]
    shape[empty if empty < 3 else 4] = 0
    tensors = make(*shape)
    y = multi_lora_linear(*tensors[:4], bias=tensors[4], index=any_index(3, shape[0]), scaling=1.0)
    assert y.shape == (shape[0], shape[2])
    for t, g in zip(tensors, torch.autograd.grad(y, tensors, randn(*y.shape)), strict=True):
        assert g.shape == t.shape and g.isfinite().all()


# ---- bits --------------------------------------------------------------------------------------------


@pytest.mark.no_interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_has_the_same_bits_in_every_batch(dtype):
    x, weight, a, b, bias = (t.detach() for t in make(256, 96, 300, 5, 8, dtype))
    index = any_index(5, 256)
    call = lambda x, i: multi_lora_linear(x, weight, a, b, index=i, scaling=0.7, bias=bias)
    full = call(x, index)
    for count in (1, 7, 255):
        assert torch.equal(call(x[:count], index[:count]), full[:count]), count
    other = any_index(5, 256)
    other[:40] = index[:40]
    assert torch.equal(call(x, other)[:40], full[:40])
    order = torch.randperm(256)
    assert torch.equal(call(x[order], index[order]), full[order])


@pytest.mark.no_interpreter
@pytest.mark.parametrize("shape", [(3, 16, 16, 2, 2), (70, 90, 70, 3, 5), (500, 600, 2100, 4, 16)])
def test_same_bits_for_any_thread_count(shape):
    tensors = make(*shape)
    index, gates = any_index(shape[3], shape[0], 2), randn(shape[0], 2, grad=True)
    dy = randn(shape[0], shape[2])
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y = multi_lora_linear(*tensors[:4], bias=tensors[4], index=index, gates=gates)
            results.append((y, *torch.autograd.grad(y, (*tensors, gates), dy)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(u, v) for u, v in zip(results[0], other, strict=True))


@pytest.mark.no_interpreter
@pytest.mark.skipif(DEVICE != "cpu", reason="the switches are the CPU kernels'")
@pytest.mark.parametrize("name, value", [("SOLERA_GEMM", "native"), ("SOLERA_FIXED_TILES", "1")])
def test_environment_switches(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    x, weight, a, b, bias = make(70, 40, 33, 3, 6, torch.bfloat16)
    index, gates = any_index(3, 70, 2), randn(70, 2, dtype=torch.bfloat16, grad=True)
    compare(
        lambda: multi_lora_linear(
            x, weight, a, b, index=index, gates=gates, scaling=0.7, bias=bias
        ),
        lambda *t: loop(*t[:5], index, t[5]),
        (x, weight, a, b, bias, gates),
    )


# ---- torch's contract --------------------------------------------------------------------------------


def test_opcheck():
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    x, weight, a, b, bias = (t.detach() for t in make(6, 5, 4, 3, 2))
    index, gates = any_index(3, 6, 2), randn(6, 2, 1)
    turned = [t.mT.contiguous().mT for t in (x, weight, a, b)]
    cases = [(x, weight, a, b, bias), (*turned, bias), (x[:1].expand(6, 5), None, a, b, None)]
    for xx, w, aa, bb, d in cases[1:] if INTERPRETED else cases:
        given = (index, gates, 0.5, 2, False)
        torch.library.opcheck(
            ops.adapter_linear, (xx, w, d, aa, a[:, :, 0], bb, *given), test_utils=tests
        )
        pre = ops.adapter_linear(xx, w, d, aa, None, bb, *given)[1]
        for dy, need in ((randn(6, 4), True), (randn(1, 1).expand(6, 4), False)):
            torch.library.opcheck(
                ops.adapter_linear_backward,
                (dy, xx, w, aa, bb, pre, *given, True, need and w is not None, need, True, need,
                 not need, need),
                test_utils=tests,
            )  # fmt: skip
    pre = ops.adapter_linear(x, None, None, a, None, a.mT, index, None, 1.0, 0, True)[1]
    torch.library.opcheck(
        ops.adapter_linear_backward,
        (x, x, None, a, a.mT, pre, index, None, 1.0, 0, True) + 7 * (False,),
        test_utils=tests,
    )


@pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.inductor)]
)
def test_compile(backend):
    def make_here(size):
        x, weight, a, b, bias = make(size, 6, 5, 3, 2)
        return x, weight, a, b, bias, randn(size, 2, grad=True), any_index(3, size, 2)

    def call(x, weight, a, b, bias, gates, index):
        return multi_lora_linear(x, weight, a, b, index=index, gates=gates, bias=bias)

    compiles(call, make_here, backend)


def test_torch_func_backend_and_autocast():
    x, weight, a, b, bias = make(6, 5, 4, 3, 2)
    index, gates = any_index(3, 6, 2), randn(6, 2)
    call = lambda x, a, b, g: multi_lora_linear(
        x, weight.detach().to(x.dtype), a, b, index=index, gates=g, scaling=0.5
    )
    works_under_torch_func(call, (x, a, b, gates))
    stack = torch.stack([x.detach(), 2 * x.detach()])
    mapped = torch.func.vmap(lambda x: call(x, a.detach(), b.detach(), gates))(stack)
    torch.testing.assert_close(mapped[1], call(stack[1], a, b, gates))
    want = multi_lora_linear(x, weight, a, b, index=index, gates=gates, bias=bias)
    with solera.backend("reference"):
        torch.testing.assert_close(
            multi_lora_linear(x, weight, a, b, index=index, gates=gates, bias=bias), want
        )
    if DEVICE == "cpu":
        with torch.autocast("cpu", torch.bfloat16):
            y = multi_lora_linear(x, weight, a, b, index=index, gates=gates, bias=bias)
        assert y.dtype == torch.bfloat16 and relative_error(y, want) < 1e-2
        grads = torch.autograd.grad(y.float().sum(), (x, weight, a, b, bias))
        assert all(g.dtype == torch.float32 for g in grads)


def test_strides_do_not_matter():
    x, weight, a, b, bias = (t.detach() for t in make(6, 5, 4, 3, 2))
    index = any_index(3, 6)
    y = multi_lora_linear(x, weight, a, b, index=index, bias=bias)
    turned = [t.mT.contiguous().mT for t in (x, weight, a, b)]
    wide = index.repeat_interleave(2)[::2]
    again = multi_lora_linear(*turned, index=wide, bias=bias)
    if INTERPRETED:  # the launcher's base product is torch's, whose bits follow the layout
        torch.testing.assert_close(again, y)
    else:
        assert torch.equal(again, y)


@settings(max_examples=10 if INTERPRETED else 60)
@given(
    st.sampled_from([0, 1, 2, 17, 33]), st.sampled_from([1, 3, 18]), st.sampled_from([1, 5, 19]),
    st.integers(1, 4), st.sampled_from([1, 2, 17]), st.integers(1, 3),
    st.sampled_from(DTYPES[:2] if INTERPRETED else DTYPES),
    st.sampled_from([0.0, 1e-40, 1e30, float("inf"), float("nan"), 1.0]),
)  # fmt: skip
def test_any_shape_and_value(N, I, O, E, r, k, dtype, value):
    x, weight, a, b, _ = (t.detach() for t in make(N, I, O, E, r, dtype))
    index, gates = any_index(E, N, k), randn(N, k, dtype=dtype)
    if N:
        x[0, 0] = value
    y = multi_lora_linear(x, weight, a, b, index=index, gates=gates, scaling=0.7)
    assert y.shape == (N, O) and y.dtype == dtype
    exact = [t.double() for t in (x, weight, a, b)]
    truth = loop(*exact, None, index, gates.double())
    size = loop(*(t.abs() for t in exact), None, index, gates.double().abs())
    finite = size < torch.finfo(dtype).max / 4
    error = torch.where(finite, y.double() - truth, 0.0).abs()
    assert (error <= 4 * ULP[dtype] * torch.where(finite, size, 0.0) + 1e-37).all()
    if N > 1:  # a bad value stays in its row
        assert torch.isfinite(y[1:]).all()


# ---- arguments ---------------------------------------------------------------------------------------

GOOD = {"x": (6, 5), "weight": (4, 5), "a": (3, 2, 5), "b": (3, 4, 2), "bias": (4,)}
BAD = [
    ({"x": (5,)}, ValueError, "x: expected at least 2 dimension"),
    ({"x": (6, 7)}, ValueError, r"a: expected shape \(3, 2, 7\)"),
    ({"x": 3.0}, TypeError, "x: expected a torch.Tensor"),
    ({"weight": (4, 6)}, ValueError, r"weight: expected shape \(4, 5\)"),
    ({"weight": (3, 5)}, ValueError, r"weight: expected shape \(4, 5\)"),
    ({"a": (2, 5)}, ValueError, "a: expected 3 dimensions"),
    ({"a": (0, 2, 5)}, ValueError, "a: expected at least one adapter"),
    ({"b": (3, 4, 3)}, ValueError, r"b: expected shape \(3, 4, 2\)"),
    ({"b": (2, 4, 2)}, ValueError, r"b: expected shape \(3, 4, 2\)"),
    ({"bias": (5,)}, ValueError, r"bias: expected shape \(4,\)"),
    ({"index": (5,)}, TypeError, "index: expected an integer dtype"),
    ({"index": [1, 2]}, TypeError, "index: expected an integer tensor"),
    ({"index": torch.zeros(5, dtype=torch.int64)}, ValueError, "index: expected one entry"),
    ({"index": torch.full((6,), 3)}, ValueError, r"index: expected values in \[-1, 3\).* got 3"),
    ({"index": torch.full((6,), -2)}, ValueError, r"index: expected values in .* got -2"),
    ({"index": None, "gates": (6, 4)}, ValueError, "gates: expected one entry"),
    ({"gates": (6, 3)}, ValueError, r"gates: expected the shape of index \(6,\)"),
    ({"index": None}, ValueError, "x: expected 3 members"),
    ({"scaling": (2,)}, ValueError, r"scaling: expected shape \(3,\)"),
    ({"scaling": "1"}, None, ""),
    ({"scaling": float("nan")}, ValueError, "scaling: expected a finite number"),
    ({"validate": 1.5}, ValueError, "validate: expected one of"),
]


@pytest.mark.parametrize("changes, error, message", BAD)
def test_bad_input(changes, error, message):
    arguments = {**GOOD, "index": torch.tensor([0, 1, 2, -1, 0, 1]), **changes}
    if changes == {"index": None}:
        arguments["x"] = (2, 6, 5)
    arguments = {k: randn(*v) if isinstance(v, tuple) else v for k, v in arguments.items()}
    if isinstance(arguments["index"], torch.Tensor):
        arguments["index"] = arguments["index"].to(DEVICE)
    if error is None:
        assert multi_lora_linear(**arguments).shape == (6, 4)
        return
    with pytest.raises(error, match=message):
        multi_lora_linear(**arguments)


def test_an_index_out_of_range_that_is_not_checked_names_nothing():
    x, weight, a, b, _ = (t.detach() for t in make(6, 5, 4, 3, 2))
    far = torch.tensor([5, -9, 3, 2**40, -1, 1], device=DEVICE)
    y = multi_lora_linear(x, weight, a, b, index=far, validate=False)
    none = torch.where(far == 1, far, -1)
    assert torch.equal(y, multi_lora_linear(x, weight, a, b, index=none))


def test_bad_adapters_and_gates():
    x, down, up = randn(6, 5), randn(3, 2, 5), randn(3, 5, 2)
    index = any_index(3, 6)
    for changes, message in (
        ({"up": randn(3, 4, 2)}, "up: expected 5 outputs"),
        ({"down_bias": randn(3, 3)}, r"down_bias: expected shape \(3, 2\)"),
        ({"up_bias": randn(2, 5)}, r"up_bias: expected shape \(3, 5\)"),
        ({"index": None}, "x: expected 3 members"),
        ({"activation": "tanh"}, "activation: expected one of"),
    ):
        with pytest.raises(ValueError, match=message):
            batched_adapter(**{"x": x, "down": down, "up": up, "index": index, **changes})
    with pytest.raises(TypeError, match=r"gates: expected a torch\.Tensor"):
        moe_lora_linear(x, randn(5, 5), down, up, None)


TENSORS = st.builds(
    lambda s, d: torch.zeros(s, dtype=d, device=DEVICE),
    st.lists(st.sampled_from([0, 1, 2, 3]), max_size=4).map(tuple),
    st.sampled_from([torch.float32] * 4 + [torch.float64, torch.int64, torch.bool]),
)
ANYTHING = st.one_of(TENSORS, TENSORS, st.none(), st.just("x"), st.just(1))


@settings(max_examples=150)
@given(st.tuples(*[ANYTHING] * 4), ANYTHING, ANYTHING)
def test_fuzzed_arguments(arguments, index, gates):
    try:
        assert multi_lora_linear(*arguments, index=index, gates=gates).dim() >= 2
    except (ValueError, TypeError) as error:
        assert ": " in str(error)


def test_nothing_but_a_residual():
    x, a, b = randn(6, 5), randn(1, 2, 5), randn(1, 5, 2)
    none = torch.full((6, 1), -1, device=DEVICE)
    assert torch.equal(branches(x, a, b, none, residual=True), x)
    assert torch.equal(branches(x, a, b, none), torch.zeros_like(x))
