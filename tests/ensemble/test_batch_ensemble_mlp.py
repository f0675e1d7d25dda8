"""Core batch_ensemble_mlp: whole networks against float64, their gradients, masks, bits, and bad input."""

import pytest
import torch
import torch.nn.functional as F
from ensemble_layers import eager
from function_checks import compiles
from helpers import DEVICE, DTYPES, INTERPRETED, SLACK, ULP, double, randn, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st

import solera
from solera.ensemble import ensemble_linear, tabm_mlp
from solera.ensemble.batch_ensemble_mlp import dropout_mask, keep_threshold

ops = torch.ops.solera

# (B, K, I, widths): single elements, odd sizes, several tiles and chunks, a mask longer than one group.
SHAPES = [
    (1, 1, 1, (1,)),
    (5, 3, 4, (6, 3)),
    (9, 2, 20, (18, 33, 7)),
    (20, 4, 6, (150, 130)),
]
LARGE = [(70, 33, 9, (24, 16))]
SHAPES_HERE = SHAPES[1:3] if INTERPRETED else SHAPES + LARGE


def make(shape, dtype, shared=True, scales="all", bias="member", grad=True, x_grad=True):
    """x and the layers; `scales` "first" is TabM-mini's form, "none" leaves them out."""
    B, K, I, widths = shape
    x = randn(*((B, I) if shared else (B, K, I)), dtype=dtype, grad=grad and x_grad)
    layers = []
    for index, O in enumerate(widths):
        weight = randn(O, I, dtype=dtype, scale=max(I, 1) ** -0.5, grad=grad)
        has = scales == "all" or (scales == "first" and index == 0)
        r = randn(K, I, dtype=dtype, grad=grad) if has else None
        s = randn(K, O, dtype=dtype, grad=grad) if scales == "all" else None
        size = {"member": (K, O), "one": (O,), None: None}[bias]
        layers.append(
            (weight, r, s, None if size is None else randn(*size, dtype=dtype, grad=grad))
        )
        I = O
    return x, layers


def chain(x, layers, activation, masks=None):
    """What a user writes today, in x's dtype."""
    names = activation if isinstance(activation, (list, tuple)) else [activation] * len(layers)
    for index, (layer, name) in enumerate(zip(layers, names)):
        x = eager(x, *layer, name)
        if masks is not None:
            x = x * masks[index].to(x.dtype)
    return x


def leaves(x, layers):
    every = [x, *(t for layer in layers for t in layer)]
    return [t for t in every if t is not None and t.requires_grad]


def in_double(x, layers):
    return double(x), [tuple(double(*layer)) for layer in layers]


def whole(function, x, layers, dy):
    y = function(x, layers)
    return y, *torch.autograd.grad(y, leaves(x, layers), dy)


def check(x, layers, activation, **options):
    masks = None
    if options:
        B, K = x.shape[0], next(t.shape[0] for t in layers[0][1:] if t is not None and t.dim() == 2)
        masks = [
            dropout_mask(options["seed"], i, randn(B, K, w.shape[0]).double(), options["dropout_p"])
            for i, (w, *_) in enumerate(layers)
        ]
    with torch.no_grad():
        dy = randn(*chain(x, layers, activation).shape, dtype=x.dtype)
    ours = whole(lambda x, n: tabm_mlp(x, n, activation=activation, **options), x, layers, dy)
    today = whole(lambda x, n: chain(x, n, activation, masks), x, layers, dy)
    exact = whole(lambda x, n: chain(x, n, activation, masks), *in_double(x, layers), dy.double())
    assert ours[0].dtype == x.dtype
    for index, (mine, other, truth) in enumerate(zip(ours, today, exact)):
        few = 6 if mine.numel() < 64 else 1.5  # the error of a handful of values is luck
        if x.dtype == torch.float64:
            few = 10  # what it is held to is no more exact
        allowed = few * SLACK * max(ULP[x.dtype], 2 * relative_error(other, truth))
        assert relative_error(mine, truth) <= allowed, (index, mine.shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES_HERE, ids=str)
def test_network_and_gradients_against_float64(shape, dtype):
    check(*make(shape, dtype), "gelu")
    check(*make(shape, dtype, shared=False), "relu")
    if not INTERPRETED:
        check(*make(shape, dtype, x_grad=False), "silu")
        check(*make(shape, dtype, x_grad=False), None)


@pytest.mark.parametrize("bias", ["member", "one", None])
@pytest.mark.parametrize("scales", ["all", "first", "none"])
def test_optional_parameters(scales, bias):
    if INTERPRETED and scales != "all" and bias != "member":
        pytest.skip("each option once: the C++ run has their combinations")
    for shape in ((5, 3, 4, (6, 3)), (80, 3, 4, (6, 3)))[: 1 if INTERPRETED else 2]:
        for x_grad in (True,) if INTERPRETED else (True, False):
            shared = scales != "none" or bias == "member"
            check(*make(shape, torch.float32, shared, scales, bias, x_grad=x_grad), ["relu", None])


@pytest.mark.parametrize("zero", range(4))
def test_empty_sizes(zero):
    sizes = [3, 2, 4, 5]
    sizes[zero] = 0
    B, K, I, O = sizes
    if K == 0:
        return
    x, layers = make((B, K, I, (O, 3)), torch.float32)
    out = whole(lambda x, n: tabm_mlp(x, n, activation="silu"), x, layers, randn(B, K, 3))
    for t, g in zip(leaves(x, layers), out[1:]):
        assert g.shape == t.shape and torch.isfinite(g).all()
    torch.testing.assert_close(out[0], chain(x, layers, "silu"))


@pytest.mark.no_interpreter
def test_frozen_layers_and_each_gradient_alone():
    for B in (5, 80):
        x, layers = make((B, 3, 4, (6, 5, 3)), torch.float32)
        dy = randn(B, 3, 3)
        every = whole(lambda x, n: tabm_mlp(x, n, activation="gelu"), x, layers, dy)[1:]
        flat = leaves(x, layers)
        for i in range(len(flat)):
            alone = [t.detach().requires_grad_(i == j) for j, t in enumerate(flat)]
            chained = [tuple(alone[1 + 4 * n : 5 + 4 * n]) for n in range(3)]
            y = tabm_mlp(alone[0], chained, activation="gelu")
            torch.testing.assert_close(
                torch.autograd.grad(y, alone[i], dy)[0], every[i], rtol=1e-4, atol=1e-5
            )


def test_zeros_in_the_scales_and_float32_parameters():
    x, layers = make((80, 3, 8, (5, 4)), torch.float32)
    with torch.no_grad():
        for _, r, s, _ in layers:
            r[:, ::2] = 0
            s[1] = 0
    check(x, layers, "gelu")
    half = x.detach().bfloat16()
    y, *grads = whole(lambda x, n: tabm_mlp(x, n), half, layers, randn(80, 3, 4).bfloat16())
    assert y.dtype == torch.bfloat16 and all(g.dtype == torch.float32 for g in grads)
    exact = chain(half.double(), in_double(x, layers)[1], "relu")
    assert relative_error(y, exact) <= ULP[torch.bfloat16]


def test_head_and_a_shared_row_expanded():
    x, layers = make((6, 4, 5, (8, 7)), torch.float32, grad=False)
    head = (randn(4, 7, 2), randn(4, 2))
    want = ensemble_linear(tabm_mlp(x, layers), *head)
    assert torch.equal(tabm_mlp(x, layers, head=head), want)
    assert torch.equal(tabm_mlp(x[:, None].expand(-1, 4, -1), layers, head=head), want)


@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
def test_dropout_is_the_stated_mask(p):
    seed = torch.tensor(-(2**62) + 12345, device=DEVICE)
    for dtype in (torch.float64,) if INTERPRETED else (torch.float32, torch.float64):
        x, layers = make((2, 2, 4, (150, 6)) if p == 0.5 else (5, 3, 4, (6, 3)), dtype)
        check(x, layers, "gelu", dropout_p=p, seed=seed)
    mask = dropout_mask(seed, 1, randn(200, 10, 40), p)
    cut = keep_threshold(p)
    assert set(mask.unique().tolist()) <= {0.0, torch.tensor(65536 / max(65536 - cut, 1)).item()}
    assert abs((mask == 0).double().mean().item() - p) < 0.01
    x, layers = make((5, 3, 4, (6, 3)), torch.float32)
    assert torch.equal(tabm_mlp(x, layers, dropout_p=p, training=False), tabm_mlp(x, layers))


def test_dropout_follows_torchs_generator():
    x, layers = make((6, 4, 5, (8, 7)), torch.float32)
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(tabm_mlp(x, layers, dropout_p=0.5))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize(
    "activation", ["relu", pytest.param("silu", marks=pytest.mark.no_interpreter)]
)
def test_gradcheck_and_gradgradcheck(activation):
    seed = torch.tensor(7, device=DEVICE) if activation == "silu" else None
    x, layers = make((2, 2, 3, (3, 2)), torch.float64, shared=activation == "relu")

    def network(x, *flat):
        options = {} if seed is None else {"dropout_p": 0.3, "seed": seed}
        return tabm_mlp(x, [flat[:4], flat[4:]], activation=activation, **options)

    flat = leaves(x, layers)
    assert torch.autograd.gradcheck(network, flat, fast_mode=INTERPRETED)
    assert torch.autograd.gradgradcheck(network, flat, fast_mode=True)


@pytest.mark.no_interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_has_the_same_bits_in_every_batch(dtype):
    x, layers = make((256, 8, 40, (96, 80)), dtype, grad=False)
    full = tabm_mlp(x, layers, activation="gelu")
    for batch in (1, 7, 255):
        assert torch.equal(tabm_mlp(x[:batch], layers, activation="gelu"), full[:batch]), batch


@pytest.mark.no_interpreter
def test_same_bits_for_any_thread_count():
    before = torch.get_num_threads()
    for x_grad in (True, False):
        x, layers = make((100, 9, 33, (70, 50)), torch.float32, x_grad=x_grad)
        dy, results = randn(100, 9, 50), []
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(whole(lambda x, n: tabm_mlp(x, n), x, layers, dy))
        finally:
            torch.set_num_threads(before)
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@pytest.mark.no_interpreter
@pytest.mark.skipif(DEVICE != "cpu", reason="the switches are the CPU kernels'")
@pytest.mark.parametrize(
    "name, value",
    [("SOLERA_GEMM", "native"), ("SOLERA_GEMM", "library"), ("SOLERA_FIXED_TILES", "1")],
)
def test_environment_switches(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    for shape in (SHAPES[1], SHAPES[3], LARGE[0]):
        check(*make(shape, torch.bfloat16, x_grad=False), "gelu")
        check(*make(shape, torch.bfloat16), "relu")


def flat_arguments(x, layers):
    parameters = [t.detach() for layer in layers for t in layer if t is not None]
    bits = [sum(b for b, t in zip((8, 16, 32), layer[1:]) if t is not None) for layer in layers]
    return x.detach(), parameters, [1 + b for b in bits]


def test_opcheck():
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    check_op = lambda op, *arguments: torch.library.opcheck(op, arguments, test_utils=tests)
    seed = torch.tensor(3, device=DEVICE)
    for shared, drop in ((True, None), (False, seed))[int(INTERPRETED) :]:
        x, parameters, kinds = flat_arguments(*make((4, 3, 6, (5, 2)), torch.float32, shared))
        turned = x.transpose(0, 1).contiguous().transpose(0, 1)
        for view in (turned,) if INTERPRETED else (x, turned, x[:1].expand(x.shape)):
            check_op(ops.batch_ensemble_mlp, view, parameters, kinds, 0.5, drop)
            check_op(ops.batch_ensemble_mlp_saved, view, parameters, kinds, 0.5, drop)
        _, products = ops.batch_ensemble_mlp_saved(x, parameters, kinds, 0.5, drop)
        for dy in (randn(4, 3, 2), randn(1, 1, 1).expand(4, 3, 2))[int(INTERPRETED) :]:
            for need_x, needs in ((True, [True] * 8), (False, [False, True] * 4)):
                check_op(
                    ops.batch_ensemble_mlp_backward, dy, x, parameters, products, kinds, 0.5, drop,
                    need_x, needs,
                )  # fmt: skip


@pytest.mark.no_interpreter
@pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.inductor)]
)
def test_compile(backend):
    def network(x, *flat):
        return tabm_mlp(x, [flat[:4], flat[4:]], activation="gelu")

    compiles(network, lambda B: leaves(*make((B, 3, 6, (5, 2)), torch.float32)), backend)


def test_backend_switch_autocast_and_transforms():
    x, layers = make((5, 3, 4, (6, 3)), torch.float32)
    want = tabm_mlp(x, layers, activation="gelu")
    with solera.backend("reference"):
        torch.testing.assert_close(tabm_mlp(x, layers, activation="gelu"), want)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert tabm_mlp(x, layers).dtype == torch.bfloat16
    x, layers = make((5, 3, 4, (6, 3)), torch.float64, grad=False)
    loss = lambda x: tabm_mlp(x, layers, activation="gelu").square().sum()
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(torch.func.grad(loss)(x), torch.autograd.grad(loss(leaf), leaf)[0])
    singles = torch.func.vmap(lambda row: tabm_mlp(row[None], layers, activation="gelu")[0])(x)
    torch.testing.assert_close(singles, tabm_mlp(x, layers, activation="gelu"))


@settings(max_examples=6 if INTERPRETED else 40)
@given(
    *[st.sampled_from([1, 2, 3, 17])] * 3,
    st.lists(st.sampled_from([1, 3, 16, 40]), min_size=1, max_size=3),
    st.sampled_from([None, "relu", "gelu", "silu"]),
    st.sampled_from(DTYPES),
    st.sampled_from([0.0, -0.0, 1e-40, 1e30, float("inf"), float("nan")]),
)
def test_any_shape_and_value(B, K, I, widths, activation, dtype, value):
    x, layers = make((B, K, I, widths), dtype, grad=False)
    x[0, 0] = value
    y = tabm_mlp(x, layers, activation=activation)
    truth = chain(*in_double(x, layers), activation)
    assert y.shape == (B, K, widths[-1])
    torch.testing.assert_close(
        y[1:].double(),
        truth[1:],
        rtol=20 * ULP[dtype],
        atol=20 * ULP[dtype] * float(1 + truth[1:].abs().max() if B > 1 else 1),
    )
    if value in (0.0, 1e-40):
        assert torch.isfinite(y).all()


X, L = (4, 6), [((5, 6), (3, 6), (3, 5), (3, 5)), ((2, 5), (3, 5), None, (2,))]
BAD = [
    ({"x": (6,)}, ValueError, r"x: expected shape \(B, I\)"),
    ({"x": (4, 0, 6)}, ValueError, "K = 0"),
    ({"x": (4, 7)}, ValueError, r"layers\[0\] weight: expected shape \(5, 7\)"),
    ({"layers": []}, ValueError, "layers: expected a list of at least one"),
    ({"layers": 3}, ValueError, "layers: expected a list"),
    ({"layers": [((5, 6),)]}, ValueError, r"layers\[0\]: expected \(weight, r, s, bias\)"),
    ({"layers": [L[0], ((2, 4), None, None, None)]}, ValueError, r"layers\[1\] weight: expected"),
    ({"layers": [L[0], ((2, 5), (2, 5), None, None)]}, ValueError, r"layers\[1\] r: expected"),
    ({"layers": [((5, 6), None, None, (5,))]}, ValueError, "does not tell the number of members"),
    ({"layers": [((5, 6), [1.0], None, (3, 5))]}, TypeError, r"layers\[0\] r: expected"),
    (
        {"layers": [L[0], ((2, 5), None, None, (3,))]},
        ValueError,
        r"layers\[1\] bias: expected shape",
    ),
    ({"activation": "tanh"}, ValueError, "activation: expected one of"),
    ({"activation": ["relu"]}, ValueError, "activation: expected one for each of the 2 layers"),
    ({"dropout_p": 1.5}, ValueError, r"dropout_p: expected a finite number in \[0, 1\]"),
    ({"dropout_p": 0.5, "seed": 3}, TypeError, "seed: expected an int64 tensor"),
]


@pytest.mark.parametrize("changes, error, message", BAD)
def test_bad_input(changes, error, message):
    def built(v):
        if isinstance(v, tuple) and all(isinstance(i, int) for i in v):
            return randn(*v)
        return type(v)(map(built, v)) if isinstance(v, (list, tuple)) else v

    arguments = {"x": built(X), "layers": built(L), **changes}
    arguments["x"], arguments["layers"] = built(arguments["x"]), built(arguments["layers"])
    with pytest.raises(error, match=message):
        tabm_mlp(arguments.pop("x"), arguments.pop("layers"), **arguments)


def test_accuracy_of_relu_masks_does_not_drift():
    """Forward and backward see the same side of zero although h is rounded between them."""
    x, layers = make((40, 4, 16, (24, 8)), torch.bfloat16)
    y, *grads = whole(
        lambda x, n: tabm_mlp(x, n), x, layers, torch.ones(40, 4, 8, device=DEVICE).bfloat16()
    )
    positive = (y > 0).sum(
        0
    )  # with s = bias = anything, db of the last layer counts the open units
    assert torch.equal(grads[-1].float(), positive.to(grads[-1].dtype).float())
    assert F.relu(y).equal(y)
