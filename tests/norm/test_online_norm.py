"""Core online_norm: the serial loop of the paper in float64 against the scan, its state, and its bad input."""

import copy
import pickle

import pytest
import torch
from helpers import DEVICE, DTYPES, INTERPRETED, ULP, assert_accurate, randn, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st

import solera
from solera.nn import OnlineNorm1d, OnlineNorm2d
from solera.norm import OnlineNormState, online_norm

ops = torch.ops.solera
SHAPES = [(1, 2), (5, 3), (4, 3, 7), (6, 5, 3, 4), (3, 17, 2, 2, 2)]


class Serial:
    """The loop over samples as the paper writes it, in x's dtype: forward, then the manual backward."""

    def __init__(self, x, state, weight, bias, af, ab, eps, layer_eps=None):
        self.m, self.v, self.u, self.w = (t.clone() for t in state)
        self.k, self.af, self.weight, self.bias = 1 - ab, af, weight, bias
        self.y, self.s, self.z, self.r = [], [], [], []
        out = []
        for sample in x.unbind(0):  # (C, *)
            flat = sample.reshape(len(sample), -1)
            s = (self.v + eps).sqrt()
            y = (flat - self.m[:, None]) / s[:, None]
            mu, var = flat.mean(1), flat.var(1, unbiased=False)
            d = mu - self.m
            self.v = af * self.v + (1 - af) * var + af * (1 - af) * d * d
            self.m = self.m + (1 - af) * d
            z = y * weight[:, None] + bias[:, None]
            r = torch.ones((), dtype=x.dtype, device=x.device)
            if layer_eps is not None:
                r = (z.square().mean() + layer_eps).rsqrt()
            self.y.append(y), self.s.append(s), self.z.append(z), self.r.append(r)
            out.append((z * r).reshape(sample.shape))
        self.layer, self.shape = layer_eps is not None, x.shape
        self.out = torch.stack(out)

    def backward(self, grad):
        dx, dweight, dbias = [], 0, 0
        for n, g in enumerate(grad.unbind(0)):
            dz = g.reshape(g.shape[0], -1) * self.r[n]
            if self.layer:
                dz = dz - self.r[n] ** 2 * (dz * self.z[n]).mean() * self.z[n]
            y, s = self.y[n], self.s[n]
            dweight, dbias = dweight + (dz * y).sum(1), dbias + dz.sum(1)
            h = dz * self.weight[:, None] - self.k * self.w[:, None] * y
            self.w = self.w + (h * y).mean(1)
            h = h / s[:, None] - self.k * self.u[:, None]
            self.u = self.u + h.mean(1)
            dx.append(h.reshape(g.shape))
        return torch.stack(dx), dweight, dbias


def make(shape, dtype=torch.float32, grad=True):
    x = randn(*shape, dtype=dtype) * 1.5 + 0.7
    c = shape[1]
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    state = OnlineNormState(
        randn(c, dtype=acc), randn(c, dtype=acc).abs() + 0.3, randn(c, dtype=acc) * 0.1,
        randn(c, dtype=acc) * 0.1,
    )  # fmt: skip
    weight, bias = randn(c, dtype=acc), randn(c, dtype=acc)
    return [t.detach().requires_grad_(grad) for t in (x, weight, bias)], state


def results(x, weight, bias, state, g, **options):
    y = online_norm(x, state, weight, bias, **options)
    return [y, *torch.autograd.grad(y, (x, weight, bias), g), *state]


OPTIONS = {"alpha_forward": 0.97, "alpha_backward": 0.9, "eps": 1e-4}


@pytest.mark.parametrize("layer", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_serial_loop(shape, dtype, layer):
    (x, weight, bias), state = make(shape, dtype)
    g = randn(*shape, dtype=dtype)
    layer_eps = 1e-3 if layer else None

    def serial(dtype, grad_dtype=None):
        wide = [t.detach().to(dtype) for t in (x, weight, bias)]
        loop = Serial(
            wide[0], [t.to(dtype) for t in state], wide[1], wide[2], 0.97, 0.9, 1e-4, layer_eps
        )
        grads = loop.backward(g.to(dtype))
        return [loop.out, *grads, loop.m, loop.v, loop.u, loop.w]

    truth = serial(torch.float64)
    eager = serial(torch.float32 if dtype != torch.float64 else dtype)
    mine = results(
        x, weight, bias, state, g, layer_scaling=layer, layer_scaling_eps=1e-3, **OPTIONS
    )
    names = ("y", "dx", "dweight", "dbias", "m", "v", "u", "w")
    for name, value, exact, today in zip(names, mine, truth, eager):
        if dtype == torch.float64:
            assert relative_error(value, exact) < 1e-13, name
        elif INTERPRETED and dtype == torch.bfloat16:
            assert relative_error(value, exact) < 2 * ULP[dtype], name  # it cuts off, not rounds
        else:
            # The state keeps its own float32 roundings; a few of them where the loop has one. Layer
            # scaling subtracts a projection, which leaves little where a sample has few numbers.
            ulps = 20 if layer and len(shape) == 2 else 4
            assert relative_error(value, exact) <= max(
                2 * relative_error(today, exact), ulps * ULP[value.dtype]
            ), name


def test_equals_the_loop_to_the_last_places_over_many_samples():
    """The claim of the equivalent form, over a batch much longer than the averages' memory."""
    (x, weight, bias), state = make((200, 4, 5), torch.float64)
    g = randn(200, 4, 5, dtype=torch.float64)
    loop = Serial(x.detach(), state, weight.detach(), bias.detach(), 0.97, 0.9, 1e-4)
    truth = [loop.out, *loop.backward(g), loop.m, loop.v, loop.u, loop.w]
    for value, exact in zip(results(x, weight, bias, state, g, **OPTIONS), truth):
        assert relative_error(value, exact) < 1e-14


def test_batches_follow_one_another():
    """Two batches one after the other are one batch; forward alone updates the same state."""
    (x, weight, bias), state = make((8, 3, 6), torch.float64)
    g = randn(8, 3, 6, dtype=torch.float64)
    whole, halves = (OnlineNormState(*(t.clone() for t in state)) for _ in range(2))
    y = results(x, weight, bias, whole, g, **OPTIONS)
    first = results(x[:5], weight, bias, halves, g[:5], **OPTIONS)[:2]
    second = results(x[5:], weight, bias, halves, g[5:], **OPTIONS)[:2]
    for both, a, b in zip(y, first, second):
        torch.testing.assert_close(both, torch.cat([a, b]))
    for a, b in zip(whole, halves):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        z = online_norm(x, state, weight, bias, **OPTIONS)
    torch.testing.assert_close(z, y[0])
    torch.testing.assert_close(state.m, whole.m)
    assert not torch.equal(state.u, whole.u)  # only backward moves it


@pytest.mark.parametrize("layer", [False, True])
def test_layouts_agree_and_are_kept(layer):
    (x, weight, bias), state = make((4, 6, 5, 3))
    states = [OnlineNormState(*(t.clone() for t in state)) for _ in range(3)]
    g = randn(4, 6, 5, 3)
    last = x.detach().to(memory_format=torch.channels_last).requires_grad_()
    strided = torch.cat([x.detach(), x.detach()], 1)[:, ::2].requires_grad_()
    plain = results(x, weight, bias, states[0], g, layer_scaling=layer)
    other = results(last, weight, bias, states[1], g.contiguous(), layer_scaling=layer)
    assert other[0].is_contiguous(memory_format=torch.channels_last)
    assert other[1].is_contiguous(memory_format=torch.channels_last)
    for a, b in zip(plain, other):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    y = online_norm(strided, states[2], weight, bias, layer_scaling=layer)
    y.sum().backward()  # a gradient of stride 0
    assert strided.grad.shape == strided.shape and strided.grad.isfinite().all()


def test_evaluation_is_an_ordinary_differentiable_function():
    (x, weight, bias), state = make((4, 3, 5), torch.float64)
    for layer in (False, True):
        fixed = [t.clone() for t in state]

        def f(x, weight, bias, layer=layer):
            return online_norm(x, state, weight, bias, training=False, layer_scaling=layer)

        s = (state.v + 1e-5).sqrt()[:, None]
        z = (x - state.m[:, None]) / s * weight[:, None] + bias[:, None]
        if layer:
            z = z * (z.square().mean((1, 2), keepdim=True) + 1e-5).rsqrt()
        torch.testing.assert_close(f(x, weight, bias), z)
        assert torch.autograd.gradcheck(f, (x, weight, bias))
        assert torch.autograd.gradgradcheck(f, (x, weight, bias))
        assert all(torch.equal(a, b) for a, b in zip(state, fixed))


def test_clamp():
    (x, weight, bias), state = make((4, 3, 5))
    again = OnlineNormState(*(t.clone() for t in state))
    y = online_norm(x, state, weight, bias, clamp=0.5)
    free = online_norm(x, again, weight, bias)
    assert torch.equal(y, free.clamp(-0.5, 0.5)) and (free.abs() > 0.5).any()
    (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert gradient.isfinite().all()


def test_no_double_backward_and_no_transforms():
    (x, weight, bias), state = make((4, 3, 5))
    y = online_norm(x, state, weight, bias)
    with pytest.raises(RuntimeError, match="create_graph=True is not supported"):
        torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"torch.func transforms"):
        torch.func.grad(lambda x: online_norm(x, state).sum())(x)
    rest = torch.func.grad(lambda x: online_norm(x, state, training=False).square().sum())(x)
    assert rest.shape == x.shape


@pytest.mark.parametrize(
    "needs", [(True, False, False), (False, True, False), (False, False, True)]
)
def test_gradients_asked_for_alone(needs):
    (x, weight, bias), state = make((5, 3, 4))
    again = OnlineNormState(*(t.clone() for t in state))
    g = randn(5, 3, 4)
    every = results(x, weight, bias, state, g)[1:4]
    inputs = [t.detach().requires_grad_(need) for t, need in zip((x, weight, bias), needs)]
    y = online_norm(inputs[0], again, inputs[1], inputs[2])
    at = needs.index(True)
    assert torch.equal(torch.autograd.grad(y, inputs[at], g)[0], every[at])
    assert torch.equal(again.u, state.u)


@pytest.mark.parametrize("layer", [False, True])
def test_backends_agree(layer):
    (x, weight, bias), state = make((7, 4, 3, 3))
    g = randn(7, 4, 3, 3)
    again = OnlineNormState(*(t.clone() for t in state))
    mine = results(x, weight, bias, state, g, layer_scaling=layer)
    with solera.backend("reference"):
        plain = results(x, weight, bias, again, g, layer_scaling=layer)
    for a, b in zip(mine, plain):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-5)


def test_opcheck():
    for dtype in (torch.float32, torch.float64):
        row = [randn(5, 3, dtype=dtype) for _ in range(5)]
        u, w = randn(3, dtype=dtype), randn(3, dtype=dtype)
        transposed = randn(3, 5, dtype=dtype).t()
        expanded = randn(3, dtype=dtype).expand(5, 3)
        torch.library.opcheck(ops.online_scan.default, (transposed, expanded, u, w, 0.9))
        torch.library.opcheck(ops.online_scan_backward.default, (*row, u, w, 0.9))
        arguments = (transposed, expanded, *row[2:], u, w, 0.9)
        torch.library.opcheck(ops.online_scan_backward.default, arguments)


@pytest.mark.parametrize("last", [False, True], ids=["rows", "channels-last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_whole_op(dtype, last):
    """Op `online_norm` beside its reference and under opcheck: both layouts, strided and expanded operands."""
    from solera.norm.online_norm import online_norm_backward_reference, online_norm_reference

    n, c, size = 5, 9, 37
    shape = (n, size, c) if last else (n * c, size, 1)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    x, dy = randn(*shape, dtype=dtype), randn(*shape, dtype=dtype)
    weight, bias, u, w = (randn(c, dtype=acc) for _ in range(4))
    v = randn(c, dtype=acc).abs() + 0.5
    given = (x, weight, bias, u, v, 0.95, 1e-4)
    found, wanted = ops.online_norm(*given), online_norm_reference(*given)
    kept = wanted[1:]
    back = (dy, x, weight, *kept, u, w, 0.9, 1e-4, True)
    found += ops.online_norm_backward(*back)
    wanted += online_norm_backward_reference(*back)
    for i, (a, b) in enumerate(zip(found, wanted)):
        assert a.shape == b.shape and a.dtype == b.dtype and a.is_contiguous()
        few = 2 * ULP[dtype] if i in (0, 5) else 1e-5 if acc == torch.float32 else 1e-13
        assert relative_error(a, b) < few, i
    strided = randn(*reversed(shape), dtype=dtype).permute(2, 1, 0)
    expanded = randn(1, 1, 1, dtype=dtype).expand(shape)
    torch.library.opcheck(ops.online_norm.default, (strided, None, bias, u, v, 0.95, 1e-4))
    for need in (True, False):
        arguments = (expanded, strided, None, *kept, u, w, 0.9, 1e-4, need)
        torch.library.opcheck(ops.online_norm_backward.default, arguments)


@settings(max_examples=6 if INTERPRETED else 40)
@given(n=st.integers(0, 9), c=st.integers(1, 70), seed=st.integers(0, 99))
def test_scans_against_their_definition(n, c, seed):
    from solera.norm.online_norm import online_scan_backward_reference, online_scan_reference

    torch.manual_seed(seed)
    row = [randn(n, c) for _ in range(5)]
    u, w = randn(c), randn(c)
    found = ops.online_scan(row[0], row[1].abs(), u, w.abs(), 0.9)
    wanted = online_scan_reference(row[0], row[1].abs(), u, w.abs(), 0.9)
    found += ops.online_scan_backward(*row, u, w, 0.8)
    wanted += online_scan_backward_reference(*row, u, w, 0.8)
    for a, b in zip(found, wanted):
        assert a.shape == (n + 1, c)
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_long_scans_are_exact():
    """More samples than a kernel takes at a time; float64 sums rounded once."""
    n = 150 if INTERPRETED else 1000
    mean, var = randn(n, 3), randn(n, 3).abs()
    m, v = torch.zeros(3, device=DEVICE), torch.ones(3, device=DEVICE)
    for value, exact in zip(
        ops.online_scan(mean, var, m, v, 0.999),
        ops.online_scan(*(t.double() for t in (mean, var, m, v)), 0.999),
    ):
        assert_accurate(value, exact)


@pytest.mark.no_interpreter
@pytest.mark.parametrize(
    "shape, layer",
    # Six channels are enough for one thread to take them apart, and too few for two; long rows in slabs.
    [((16, 33, 9, 9), True), ((16, 33, 9, 9), False), ((5, 6, 11), False), ((2, 6, 20000), False)],
    ids=str,
)
def test_same_bits_for_any_thread_count(shape, layer):
    (x, weight, bias), state = make(shape)
    g = randn(*shape)
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            mine = OnlineNormState(*(t.clone() for t in state))
            found.append(results(x, weight, bias, mine, g, layer_scaling=layer))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_nan_stays_in_its_channel():
    (x, weight, bias), state = make((4, 3, 5))
    with torch.no_grad():
        x[1, 1, 2] = float("nan")
        y = online_norm(x, state, weight, bias)
    assert y[:, (0, 2)].isfinite().all() and y[0, 1].isfinite().all() and y[2:, 1].isnan().all()


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 3, 0), (2, 0, 3), (0, 3)], ids=str)
def test_empty(shape):
    state = OnlineNormState.start(shape[1], device=DEVICE)
    x = randn(*shape, grad=True)
    y = online_norm(x, state)
    assert y.shape == shape and (state.m == 0).all() and (state.v == 1).all()
    y.sum().backward()
    assert x.grad.shape == shape


BAD = [
    ({"x": torch.ones(3)}, ValueError, "x: expected at least 2 dimension"),
    ({"x": torch.ones(2, 3, dtype=torch.int64)}, TypeError, "x: expected float32"),
    ({"state": None}, TypeError, "state: expected an OnlineNormState"),
    ({"state": OnlineNormState.start(4)}, ValueError, r"state.m: expected shape \(3,\)"),
    ({"state": OnlineNormState.start(3, dtype=torch.bfloat16)}, TypeError, "state.m: expected"),
    ({"weight": torch.ones(4)}, ValueError, r"weight: expected shape \(3,\)"),
    ({"bias": 3.0}, TypeError, "bias: expected a torch.Tensor"),
    ({"alpha_forward": 1.5}, ValueError, "alpha_forward: expected a finite number"),
    ({"alpha_backward": "x"}, TypeError, "alpha_backward: expected a number"),
    ({"eps": -1}, ValueError, "eps: expected a finite number"),
    ({"clamp": -1}, ValueError, "clamp: expected a finite number"),
    ({"layer_scaling": True, "layer_scaling_eps": -1}, ValueError, "layer_scaling_eps: expected"),
]


@pytest.mark.parametrize("change, error, message", BAD, ids=[m for _, _, m in BAD])
def test_bad_input(change, error, message):
    arguments = {"x": torch.ones(2, 3), "state": OnlineNormState.start(3)} | change
    with pytest.raises(error, match=message):
        online_norm(arguments.pop("x"), arguments.pop("state"), **arguments)


def test_state_with_gradient_is_refused():
    state = OnlineNormState.start(3, device=DEVICE)
    with pytest.raises(ValueError, match=r"state.m: expected a tensor without requires_grad"):
        online_norm(randn(2, 3), state._replace(m=randn(3, grad=True)))


@pytest.mark.parametrize("ecm", ["ac", "ls", "none"])
def test_modules(ecm):
    for kind, shape in ((OnlineNorm1d, (4, 6)), (OnlineNorm2d, (4, 6, 3, 3))):
        layer = kind(6, 0.9, 0.8, 1e-4, True, ecm, clamp_val=0.7).to(DEVICE)
        keys = ["weight", "bias", "norm.m", "norm.var", "norm.u", "norm.v"]
        assert list(layer.state_dict()) == keys
        clone = pickle.loads(pickle.dumps(copy.deepcopy(layer)))
        x = randn(*shape, grad=True)
        y = layer(x)
        y.square().sum().backward()
        assert layer.norm.m.abs().sum() > 0 and layer.norm.u.abs().sum() > 0
        state = OnlineNormState(clone.norm.m, clone.norm.var, clone.norm.u, clone.norm.v)
        same = online_norm(
            x, state, clone.weight, clone.bias, alpha_forward=0.9, alpha_backward=0.8, eps=1e-4,
            layer_scaling=ecm == "ls", clamp=0.7 if ecm == "ac" else None,
        )  # fmt: skip
        assert torch.equal(y, same)
        layer.eval()
        before = layer.norm.m.clone()
        layer(x)
        assert torch.equal(layer.norm.m, before) and "ecm" in repr(layer)
        with pytest.raises(ValueError, match="dimensions"):
            layer(randn(2, 6, 3))
    with pytest.raises(ValueError, match="ecm: expected one of"):
        OnlineNorm1d(3, ecm="sl")
    assert OnlineNorm1d(3, affine=False).weight is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_in_another_dtype_keeps_its_state(dtype):
    layer = OnlineNorm1d(6).to(DEVICE)
    layer(randn(8, 6) + 3)
    before = {name: t.clone() for name, t in layer.norm.named_buffers()}
    x = randn(4, 6, dtype=dtype, grad=True)
    layer.to(dtype)
    assert layer.weight.dtype == dtype
    for name, t in layer.norm.named_buffers():
        assert t.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert torch.equal(t.float(), before[name])
    y = layer(x)
    assert y.dtype == dtype
    y.sum().backward()


def test_autocast_keeps_the_input_dtype():
    layer = OnlineNorm1d(6).to(DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert layer(randn(4, 6)).dtype == torch.float32
        assert layer(randn(4, 6, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "backend, ecm",
    [
        ("aot_eager", "ls"),
        ("aot_eager", "none"),
        pytest.param("inductor", "none", marks=pytest.mark.inductor),
    ],
)
def test_compile(backend, ecm):
    layer = OnlineNorm2d(4, ecm=ecm).to(DEVICE)
    clone = copy.deepcopy(layer)
    compiled = torch.compile(clone, fullgraph=True, dynamic=True, backend=backend)
    for size in (5, 7):
        x = randn(3, 4, size, size, grad=True)
        again = x.detach().clone().requires_grad_()
        y, z = layer(x), compiled(again)
        g = torch.randn_like(y)
        y.backward(g)
        z.backward(g)
        torch.testing.assert_close(z, y, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(again.grad, x.grad, rtol=1e-5, atol=1e-6)
        for (name, a), (_, b) in zip(layer.state_dict().items(), clone.state_dict().items()):
            torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6, msg=name)
