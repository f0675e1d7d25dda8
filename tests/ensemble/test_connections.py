"""Core connections: hyper-connections against the paper's algorithm in float64, their gradients, and bad input."""

import copy
import pickle

import pytest
import torch
from function_checks import compiles, with_gradients, works_under_torch_func
from helpers import DEVICE, DTYPES, INTERPRETED, ULP, assert_accurate, double, randn, relative_error
from hypothesis import given
from hypothesis import strategies as st

import solera
from solera.ensemble import (
    hyper_connection_depth,
    hyper_connection_depth_width,
    hyper_connection_width,
    manifold_connection,
)

ops = torch.ops.solera


def algorithm(H, alpha, beta, wa=None, wb=None, sa=0.01, sb=0.01, nw=None, nb=None, **options):
    """Algorithm 2 of the paper, line by line; H (..., n, D)."""
    if wa is not None:
        normal = H - H.mean(-1, keepdim=True) if options.get("norm", "layer") == "layer" else H
        normal = normal / (normal.square().mean(-1, keepdim=True) + options.get("eps", 1e-5)).sqrt()
        normal = normal if nw is None else normal * nw
        normal = normal if nb is None else normal + nb
        act = torch.tanh if options.get("tanh", True) else lambda t: t
        alpha = act(normal @ wa) * sa + alpha
        beta = act(normal @ wb) * sb + beta
    mix = alpha.mT @ H
    return mix[..., 0, :], mix[..., 1:, :], beta.expand(H.shape[:-1])


def depth(out, H_r, beta):
    return beta.unsqueeze(-1).to(out.dtype) * out.unsqueeze(-2) + H_r


def sinkhorn(t, iterations):
    m = t.exp()
    for _ in range(iterations):
        m = m / m.sum(-2, keepdim=True)
        m = m / m.sum(-1, keepdim=True)
    return m


def manifold(H, weight, bias, scale, iterations=20, eps=1e-6):
    n = H.shape[-2]
    x = H.flatten(-2)
    x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    a = torch.cat([scale[0].expand(n), scale[1].expand(n), scale[2].expand(n * n)])
    t = a * (x @ weight) + bias
    m = sinkhorn(t[..., 2 * n :].unflatten(-1, (n, n)), iterations)
    h_in = (torch.sigmoid(t[..., :n]).unsqueeze(-2) @ H).squeeze(-2)
    return h_in, m @ H, 2 * torch.sigmoid(t[..., n : 2 * n])


def make(tokens, n, D, dtype=torch.float32, grad=True, merged=False, dynamic=True):
    """H, alpha, beta, weights, scales, norm; for the merged form the layer's output and weights first."""
    new = lambda *shape, **k: randn(*shape, dtype=dtype, grad=grad, **k)
    first = (
        [new(*tokens, D), new(*tokens, n, D), new(*tokens, n)] if merged else [new(*tokens, n, D)]
    )
    static = [new(n, n + 1), new(n)]
    if not dynamic:
        return [*first, *static]
    weights = [new(D, n + 1, scale=D**-0.5), new(D, scale=D**-0.5), new(1), new(1), new(D), new(D)]
    return [*first, *static, *weights]


def make_manifold(tokens, n, D, dtype=torch.float32, grad=True):
    new = lambda *shape, **k: randn(*shape, dtype=dtype, grad=grad, **k)
    P = n * (n + 2)
    return [new(*tokens, n, D), new(n * D, P, scale=(n * D) ** -0.5), new(P), new(3)]


def both_layers(out, H_r, beta0, *rest, **options):
    return algorithm(depth(out, H_r, beta0), *rest, **options)


def check(function, formula, tensors):
    """At most three times eager's error against float64 (its sums are in another order, and those of the scalars'
    gradients cancel), or a few ulps."""
    with torch.no_grad():
        grads = [randn(*o.shape, dtype=o.dtype) for o in function(*tensors)]
    ours = with_gradients(function, tensors, grads)
    today = with_gradients(formula, tensors, grads)
    truth = with_gradients(formula, double(*tensors), [g.double() for g in grads])
    for i, (a, b, c) in enumerate(zip(ours, today, truth, strict=True)):
        limit = {torch.float64: 1e-11, torch.float32: 1e-6}.get(a.dtype, ULP[a.dtype])
        if c.numel() == 1 and a.dtype == torch.float32:
            limit *= 10  # what is left of a sum over everything
        error, eager = relative_error(a, c), relative_error(b, c)
        assert error <= max(limit, 3 * eager), f"value {i}: {error:.3g}, eager {eager:.3g}"


# Few tokens interpreted: a program is a token, and costs tens of milliseconds there.
SHAPES = [
    ((3,), 4, 48),
    ((2, 3), 2, 16),
    ((5,), 3, 17),
    ((37,), 4, 20),
    ((2,), 1, 5),
    ((2,), 9, 33),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "tokens,n,D", [((2,), 4, 48), ((2, 1), 3, 17)] if INTERPRETED else SHAPES, ids=str
)
def test_hyper_connections_against_the_papers_algorithm(tokens, n, D, dtype):
    check(hyper_connection_width, algorithm, make(tokens, n, D, dtype))
    check(hyper_connection_depth_width, both_layers, make(tokens, n, D, dtype, merged=True))
    tensors = [randn(*tokens, D, dtype=dtype, grad=True), randn(*tokens, n, D, dtype=dtype, grad=True),
               randn(*tokens, n, dtype=dtype, grad=True)]  # fmt: skip
    check(lambda *t: (hyper_connection_depth(*t),), lambda *t: (depth(*t),), tensors)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("options", [{"norm": "rms"}, {"tanh": False}, {"static": True}], ids=str)
def test_forms(options, merged):
    options = dict(options)
    tensors = make(
        (2,) if INTERPRETED else (6,),
        4,
        40,
        merged=merged,
        dynamic=not options.pop("static", False),
    )
    ours, formula = (
        (hyper_connection_depth_width, both_layers)
        if merged
        else (hyper_connection_width, algorithm)
    )
    check(lambda *t: ours(*t, **options), lambda *t: formula(*t, **options), tensors)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "tokens,n,D", [((3,), 3, 7)] if INTERPRETED else [((19,), 4, 24), ((2, 2), 3, 7)], ids=str
)
def test_manifold_connection_against_the_formula(tokens, n, D, dtype):
    iterations = 3 if INTERPRETED else 20
    ours = lambda *t: manifold_connection(*t, iterations=iterations)
    tensors = make_manifold(tokens, n, D, dtype)
    # bfloat16 eager rounds the scaling itself; ours is held to its own rounding of the results.
    check(ours, lambda *t: manifold(*t, iterations=iterations), tensors)
    h, r, beta = ours(*(t.detach() for t in tensors))
    ones = torch.ones(*tokens, n, D, dtype=dtype, device=DEVICE)
    kept = ours(ones, *(t.detach() for t in tensors[1:]))[1]
    assert_accurate(kept, ones.double(), None)  # rows of the mixing sum to 1
    out = randn(*tokens, D, dtype=dtype)
    joined = manifold_connection(r, *(t.detach() for t in tensors[1:]), iterations=iterations, out=out,
                                 out_beta=beta)  # fmt: skip
    apart = ours(hyper_connection_depth(out, r, beta), *(t.detach() for t in tensors[1:]))
    for a, b in zip(joined, apart):
        torch.testing.assert_close(a, b, rtol=3e-2 if dtype == torch.bfloat16 else 1e-4, atol=2e-2)


def test_manifold_merged_gradients():
    tensors = [randn(2, 24, grad=True), randn(2, 4, grad=True), *make_manifold((2,), 4, 24)]
    ours = lambda out, b, *t: manifold_connection(*t, iterations=3, out=out, out_beta=b)
    formula = lambda out, b, H, *t: manifold(depth(out, H, b), *t, iterations=3)
    check(ours, formula, tensors)


@pytest.mark.no_interpreter
@pytest.mark.parametrize("D", [1024, 1031])
def test_large_tensors_take_the_streaming_stores(D):
    """Outputs of 16 MB and more pass the caches: same bits as for few of their tokens."""
    tensors = make((1100,), 4, D, merged=True)
    whole = hyper_connection_depth_width(*tensors)
    grads = [torch.ones_like(o) for o in whole]
    dout, dh = torch.autograd.grad(whole, tensors[:2], grads)
    rows = slice(1030, 1034)
    few_tensors = [*(t.detach()[rows].requires_grad_() for t in tensors[:3]), *tensors[3:]]
    few = hyper_connection_depth_width(*few_tensors)
    few_grads = torch.autograd.grad(few, few_tensors[:2], [g[rows] for g in grads])
    for a, b in zip((*whole, dout, dh), (*few, *few_grads)):
        assert torch.equal(a[rows], b)


@pytest.mark.parametrize("stream_dim", [0, 1, -2])
def test_streams_anywhere(stream_dim):
    H, *rest = make((2, 3), 4, 24, grad=False)
    moved = H.movedim(-2, stream_dim).contiguous()
    want = hyper_connection_width(H, *rest)
    got = hyper_connection_width(moved, *rest, stream_dim=stream_dim)
    assert torch.equal(got[0], want[0]) and torch.equal(got[2], want[2])
    assert torch.equal(got[1].movedim(stream_dim, -2), want[1])
    out = randn(2, 3, 24)
    back = hyper_connection_depth(out, got[1], got[2], stream_dim=stream_dim)
    assert torch.equal(back.movedim(stream_dim, -2), hyper_connection_depth(out, *want[1:]))


CASES = {
    "width": (hyper_connection_width, lambda: make((2,), 2, 4)),
    "merged": (hyper_connection_depth_width, lambda: make((2,), 2, 4, merged=True)),
    "manifold": (
        lambda *t: manifold_connection(*t, iterations=2),
        lambda: make_manifold((2,), 2, 3),
    ),
    "depth": (
        hyper_connection_depth,
        lambda: [randn(2, 3, grad=True), randn(2, 2, 3, grad=True), randn(2, 2, grad=True)],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_gradients_to_second_order(case):
    function, tensors = CASES[case]
    tensors = [t.detach().double().requires_grad_() for t in tensors()]
    assert torch.autograd.gradcheck(function, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


@pytest.mark.no_interpreter
def test_only_some_gradients_come_in_or_go_out():
    tensors = make((4,), 4, 16)
    whole = hyper_connection_width(*tensors)
    exact = algorithm(*(d := double(*tensors)))
    for i in range(3):
        g = randn(*whole[i].shape)
        ours = torch.autograd.grad(whole[i], tensors, g, retain_graph=True, allow_unused=True)
        truth = torch.autograd.grad(exact[i], d, g.double(), retain_graph=True, allow_unused=True)
        for a, b in zip(ours, truth):
            assert torch.allclose(a.double(), 0 * a.double() if b is None else b, atol=1e-4)
    frozen = [t.detach() for t in tensors]
    H = frozen[0].requires_grad_()
    (dh,) = torch.autograd.grad(hyper_connection_width(H, *frozen[1:])[0].sum(), H)
    assert dh.isfinite().all()


def test_saved_for_backward_is_inputs_and_coefficients():
    tensors = make((32,), 4, 256, merged=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.numel()) or t, lambda t: t
    ):
        hyper_connection_depth_width(*tensors)
    big = 32 * 4 * 256 + 32 * 256
    assert sum(s for s in saved if s >= 32 * 256) == big
    assert sum(saved) <= big + 32 * (24 + 8 + 4) + 40 * 256


@pytest.mark.no_interpreter
@pytest.mark.parametrize("kind", ["hyper", "manifold", "static"])
def test_same_bits_for_any_thread_count_and_batch(kind):
    tokens = 300
    if kind == "manifold":
        tensors = make_manifold((tokens,), 4, 40)
        f = lambda *t: manifold_connection(*t, iterations=2)
    else:
        tensors, f = make((tokens,), 4, 40, dynamic=kind == "hyper"), hyper_connection_width
    grads = [torch.ones_like(o) for o in f(*(t.detach() for t in tensors))]
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(with_gradients(f, tensors, grads))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))
    for first, count in ((0, 1), (5, 7), (3, 30)):
        part = f(tensors[0][first : first + count], *tensors[1:])
        assert all(torch.equal(a, b[first : first + count]) for a, b in zip(part, results[0]))


@pytest.mark.no_interpreter
@given(
    tokens=st.lists(st.integers(0, 4), max_size=2),
    n=st.integers(1, 6),
    D=st.integers(0, 40),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([1e-20, 1.0, 1e4]),
    merged=st.booleans(),
    swap=st.booleans(),
)
def test_any_shape_dtype_and_scale(tokens, n, D, dtype, scale, merged, swap):
    tensors = make(tokens, n, max(D, 1), dtype, grad=False, merged=merged)
    if D == 0:
        for i in (0, 1) if merged else (0,):
            tensors[i] = tensors[i][..., :0]
        for i in range(-6, 0):
            tensors[i] = (
                tensors[i][:0] if tensors[i].shape[0] == 1 and i != -4 and i != -3 else tensors[i]
            )
        tensors[-6], tensors[-5] = randn(0, n + 1, dtype=dtype), randn(0, dtype=dtype)
        tensors[-2], tensors[-1] = randn(0, dtype=dtype), randn(0, dtype=dtype)
    scale = min(scale, 1e2) if dtype == torch.float16 else scale
    at = 1 if merged else 0
    tensors[at] = tensors[at] * scale
    if swap:
        tensors[at] = tensors[at].mT.contiguous().mT
    ours, formula = (
        (hyper_connection_depth_width, both_layers)
        if merged
        else (hyper_connection_width, algorithm)
    )
    got, today = ours(*tensors), formula(*tensors)
    truth = formula(*double(*tensors))
    for a, b, c in zip(got, today, truth):
        assert a.shape == c.shape
        if D and torch.isfinite(b).all() and torch.isfinite(c).all():
            limit = {torch.float64: 1e-11, torch.float32: 1e-6}.get(a.dtype, ULP[a.dtype])
            assert relative_error(a, c) <= max(limit, 2 * relative_error(b, c))


def test_nan_and_inf_stay_in_their_token():
    H, *rest = make((5,), 4, 24, grad=False)
    clean = hyper_connection_width(H, *rest)
    H[1, 2, 3], H[3, 0, 0] = float("nan"), float("inf")
    for a, b in zip(hyper_connection_width(H, *rest), clean):
        assert a[1].isnan().any() and torch.equal(a[[0, 2, 4]], b[[0, 2, 4]])


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_opcheck(kind):
    n, D = 2, 6
    P = n * (n + 2)
    O, I = (1, 2) if INTERPRETED else (2, 3)
    base = randn(O, n, I, D)
    projection = {0: None, 1: randn(n + 2, D), 2: randn(P, n * D)}[kind]
    numbers = [randn(P) if kind == 1 else None, randn(P), randn(P) if kind else None]
    out, weights = randn(O, I, D), randn(O, I, n)
    turned = base.transpose(0, 2).contiguous().transpose(0, 2)
    for h, o, w in ((turned, out, weights), (base[:, :1].expand(O, n, I, D), None, None)):
        args = (h, o, w, projection, *numbers, kind, kind == 1, True, 1e-5, 2)
        torch.library.opcheck(ops.connection_width.default, args)
        x, r, beta, z, mean, rstd = ops.connection_width(*args)
        grads = (x, r, beta) if o is None else (randn(1).expand(x.shape), None, None)
        args = (*grads, h, o, w, projection, *numbers, z, mean, rstd, kind, kind == 1, True, 2)
        torch.library.opcheck(ops.connection_width_backward.default, args)
    if kind == 0:
        torch.library.opcheck(ops.connection_depth.default, (out, turned, weights))
        torch.library.opcheck(ops.connection_depth_backward.default, (turned, out, weights))


def network(H, *t):
    x, rest, beta = hyper_connection_width(H, *t)
    x, rest, beta = hyper_connection_depth_width(x * 2, rest, beta, *t)
    return hyper_connection_depth(x.sin(), rest, beta)


@pytest.mark.no_interpreter
def test_compile_aot_eager():
    compiles(network, lambda size: make((size,), 4, 16))
    compiles(
        lambda *t: manifold_connection(*t, iterations=2), lambda size: make_manifold((size,), 2, 8)
    )


@pytest.mark.inductor
@pytest.mark.no_interpreter
def test_compile_inductor():
    # Gradients of some hundreds: what the compiler rounds otherwise outside the ops comes back a thousandfold.
    make_one = lambda size: make((size,), 4, 16)
    compiles(network, make_one, backend="inductor", rtol=1e-4, atol=1e-3)


@pytest.mark.no_interpreter
def test_torch_func_and_backends():
    works_under_torch_func(network, make((2,), 2, 5, grad=False))
    H, *rest = make((3,), 4, 8, grad=False)
    batched = torch.func.vmap(lambda h: hyper_connection_width(h, *rest))(H)
    for a, b in zip(batched, hyper_connection_width(H, *rest)):
        torch.testing.assert_close(a, b)
    with solera.backend("reference"):
        want = network(H, *rest)
    torch.testing.assert_close(network(H, *rest), want)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert hyper_connection_width(H, *rest)[0].dtype == H.dtype


@pytest.mark.no_interpreter
def test_module_is_the_papers_layer():
    torch.manual_seed(0)
    for norm in ("rms", "layer"):
        layer = solera.nn.HyperConnections(4, dim=16, layer_index=1, norm=norm).to(DEVICE)
        assert "dynamic_alpha_fn" in layer.state_dict() and "norm.gamma" in layer.state_dict()
        x = randn(3, 5, 16)
        streams = layer.expand(x)
        branch_input, add = layer(streams)
        torch.testing.assert_close(branch_input, x)  # at the start every stream is x
        y = layer.reduce(add(branch_input.sin()))
        torch.testing.assert_close(y, 4 * (x + x.sin()))
        for p in layer.parameters():
            torch.nn.init.normal_(p, std=0.3)
        H = streams.unflatten(0, (3, 4)).movedim(1, -2)
        args = [layer.static_alpha, layer.static_beta, layer.dynamic_alpha_fn, layer.dynamic_beta_fn,
                layer.dynamic_alpha_scale, layer.dynamic_beta_scale, layer.norm.gamma + 1]  # fmt: skip
        options = {"norm": norm, "eps": layer.eps}
        want_in, want_r, want_beta = algorithm(H, *args, **options)
        got_in, add = layer(streams)
        torch.testing.assert_close(got_in, want_in)
        want = depth(got_in.sin(), want_r, want_beta).movedim(-2, 1).flatten(0, 1)
        torch.testing.assert_close(add(got_in.sin()), want)
        wrapped = solera.nn.HyperConnections(4, dim=16, branch=torch.nn.Linear(16, 16)).to(DEVICE)
        for clone in (copy.deepcopy(wrapped), pickle.loads(pickle.dumps(wrapped))):
            assert torch.equal(clone(streams), wrapped(streams))
        with torch.autocast(DEVICE, dtype=torch.bfloat16):  # the branch returns bfloat16
            mixed = wrapped(streams)
        torch.testing.assert_close(mixed, wrapped(streams), rtol=5e-2, atol=5e-2)
    with pytest.raises(ValueError, match="residuals: expected 8 features"):
        solera.nn.HyperConnections(4, dim=8)(torch.ones(8, 7))
    narrow = solera.nn.HyperConnections(4, dim=8, branch=torch.nn.Linear(8, 7))
    with pytest.raises(ValueError, match="the branch's output: expected shape"):
        narrow(torch.ones(8, 8))
    with pytest.raises(ValueError, match="residuals: expected a batch"):
        layer(randn(3, 5, 16))


H0, ALPHA, BETA = randn(3, 4, 8), randn(4, 5), randn(4)
WA, WB = randn(8, 5), randn(8)
W = hyper_connection_width
BAD = [
    (lambda: W([1.0], ALPHA, BETA), TypeError, "H: expected a torch.Tensor"),
    (lambda: W(randn(8), ALPHA, BETA), ValueError, "H: expected at least 2"),
    (lambda: W(randn(3, 17, 8), ALPHA, BETA), ValueError, "H: expected 1 to 16 streams"),
    (lambda: W(H0, ALPHA.T, BETA), ValueError, r"alpha: expected shape \(4, 5\)"),
    (lambda: W(H0, ALPHA, ALPHA), ValueError, r"^beta: expected shape \(4,\) to go with H "),
    (lambda: W(H0, ALPHA.double(), BETA), TypeError, "alpha: float64"),
    (lambda: W(H0, ALPHA, BETA, WA), ValueError, "beta_weight: expected beside"),
    (lambda: W(H0, ALPHA, BETA, WB, WB), ValueError, r"alpha_weight: expected shape \(8, 5\)"),
    (lambda: W(H0, ALPHA, BETA, WA, WB, BETA), ValueError, "alpha_scale: expected a number"),
    (lambda: W(H0, ALPHA, BETA, WA, WB, "x"), TypeError, "alpha_scale: expected a number"),
    (lambda: W(H0, ALPHA, BETA, norm_weight=WB), ValueError, "norm_weight: given without"),
    (lambda: W(H0, ALPHA, BETA, WA, WB, norm="batch"), ValueError, "norm: expected one of"),
    (lambda: W(H0, ALPHA, BETA, WA, WB, eps=-1), ValueError, "eps: expected a finite"),
    (lambda: W(H0, ALPHA, BETA, stream_dim=-1), ValueError, "stream_dim: expected a dimension"),
    (lambda: W(H0, ALPHA, BETA, stream_dim="n"), TypeError, "stream_dim: expected an integer"),
    (
        lambda: hyper_connection_depth(randn(3, 7), H0, randn(3, 4)),
        ValueError,
        "out: expected shape",
    ),
    (
        lambda: hyper_connection_depth(randn(3, 8).half(), H0, randn(3, 4)),
        TypeError,
        "out: expected",
    ),
    (
        lambda: hyper_connection_depth(randn(3, 8), H0, randn(4)),
        ValueError,
        r"^beta: expected shape \(3, 4\) to go with H_r ",
    ),
    (
        lambda: hyper_connection_depth_width(randn(3, 8), H0, randn(4), ALPHA, BETA),
        ValueError,
        r"^out_beta: expected shape \(3, 4\) to go with H_r ",
    ),
    (
        lambda: hyper_connection_depth_width(randn(3, 8), H0, randn(3, 4), ALPHA.T, BETA),
        ValueError,
        r"^alpha: expected shape \(4, 5\) to go with H_r ",
    ),
    (
        lambda: manifold_connection(H0, WA, BETA, randn(3)),
        ValueError,
        r"weight: expected .*\(32, 24\)",
    ),
    (
        lambda: manifold_connection(H0, randn(32, 24), randn(24), randn(3), iterations=0),
        ValueError,
        "iterations: expected a positive",
    ),
    (
        lambda: manifold_connection(H0, randn(32, 24), randn(24), randn(3), out=randn(3, 8)),
        ValueError,
        "out: expected together",
    ),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input_is_named(case):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()
