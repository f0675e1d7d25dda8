"""AdaIN and its relatives against their formulas, in both layouts."""

import pytest
import torch
import torch.nn.functional as F
from function_checks import (
    agrees_with_formula,
    compiles,
    differentiates,
    images,
    works_under_torch_func,
)
from helpers import DEVICE, DTYPES, INTERPRETED, randn
from hypothesis import given, settings
from hypothesis import strategies as st

import solera
from solera.norm import (
    adain_perturb,
    adain_tokens,
    adaptive_instance_norm,
    attn_inject,
    conditional_instance_norm,
    gated_stream_sum,
    region_adain,
    style_mix_adain,
)

SHAPE = (2, 5, 4, 3) if INTERPRETED else (3, 8, 6, 5)


def spread(t, x):
    """(C,) or (N, C) -> broadcastable to (N, C, *)."""
    return t.reshape(*t.shape, *[1] * (x.dim() - 2))


def statistics(x, eps=1e-5, eps_at="variance", correction=1):
    dims = tuple(range(2, x.dim()))
    var = x.var(dims, correction=correction, keepdim=True)
    std = (var + eps).sqrt() if eps_at == "variance" else var.sqrt() + eps
    return x.mean(dims, keepdim=True), std


def adain(content, style, alpha=1.0, **options):
    (m, s), (sm, ss) = statistics(content, **options), statistics(style, **options)
    return alpha * ((content - m) / s * ss + sm) + (1 - alpha) * content


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("alpha", [1.0, 0.6])
def test_adaptive_instance_norm(alpha, dtype, last):
    content = images(*SHAPE, dtype=dtype, last=last)
    style = images(SHAPE[0], SHAPE[1], 7, dtype=dtype, mean=2.0)
    y, *_ = agrees_with_formula(
        lambda c, s: adaptive_instance_norm(c, s, alpha=alpha),
        lambda c, s: adain(c, s[..., None], alpha),
        (content, style),
    )
    assert y.stride() == content.stride() and y.dtype == dtype


@pytest.mark.parametrize("eps_at", ["variance", "std"])
@pytest.mark.parametrize("correction", [0, 1])
def test_adain_options(correction, eps_at):
    options = {"eps": 0.1, "eps_at": eps_at, "correction": correction}
    content, style = images(*SHAPE), images(1, SHAPE[1], 3, 3)
    agrees_with_formula(
        lambda c, s: adaptive_instance_norm(c, s, **options),
        lambda c, s: adain(c, s, **options),
        (content, style),
    )
    mean, std = randn(*SHAPE[:2], grad=True), randn(SHAPE[1], grad=True)

    def formula(c, mean, std):
        m, s = statistics(c, **options)
        return (c - m) / s * spread(std, c) + spread(mean, c)

    agrees_with_formula(
        lambda c, m, s: adaptive_instance_norm(c, (m, s), style_eps=9.0, **options),
        formula,
        (content, mean, std),
    )


def test_latents_take_the_style_encodings_statistics():
    """z_t <- AdaIN(z_t, z_t of the style), the step of STRDP, and StyleID's initial latent (no eps)."""
    z, style = images(1, 4, 8, 8), images(1, 4, 8, 8, mean=-1.0)
    agrees_with_formula(adaptive_instance_norm, adain, (z, style))
    moved = adaptive_instance_norm(z, style, eps=0.0)
    torch.testing.assert_close(moved.std((0, 2, 3)), style.std((0, 2, 3)))
    torch.testing.assert_close(moved.mean((0, 2, 3)), style.mean((0, 2, 3)))


def test_colour_statistics_from_an_embedding():
    """Line-art colourisation: (mean, std) come from an MLP of the reference's colour embedding."""
    x, embedding = images(*SHAPE), randn(SHAPE[0], 6)
    layer = torch.nn.Linear(6, 2 * SHAPE[1], device=DEVICE)
    mean, std = layer(embedding).chunk(2, 1)
    y = adaptive_instance_norm(x, (mean, std))
    m, s = statistics(x)
    torch.testing.assert_close(y, (x - m) / s * spread(std, x) + spread(mean, x))
    (grad,) = torch.autograd.grad(y.square().sum(), layer.weight)
    assert grad.abs().sum() > 0


def test_adain_differentiates():
    content, style = images(2, 3, 2, 2), images(2, 3, 4)
    differentiates(lambda c, s: adaptive_instance_norm(c, s, alpha=0.7), (content, style))
    differentiates(lambda x, s, t: conditional_instance_norm(x, scale=s, shift=t, activation="silu"),
                   (content, randn(2, 3, grad=True), randn(3, grad=True)))  # fmt: skip


def test_constant_channels_have_finite_gradients():
    content = torch.full((1, 2, 3, 3), 2.0, device=DEVICE, requires_grad=True)
    style = torch.full((1, 2, 4), 5.0, device=DEVICE, requires_grad=True)
    for eps_at in ("variance", "std"):
        y = adaptive_instance_norm(content, style, eps_at=eps_at)
        torch.testing.assert_close(y, torch.full_like(y, 5.0))
        for grad in torch.autograd.grad(y.sum(), (content, style)):
            assert torch.isfinite(grad).all()


@given(
    n=st.integers(0, 3), c=st.integers(0, 5), size=st.lists(st.integers(0, 5), min_size=1, max_size=3),
    dtype=st.sampled_from(DTYPES), scale=st.sampled_from([1e-3, 1.0, 1e3]), last=st.booleans(),
)  # fmt: skip
@settings(max_examples=8 if INTERPRETED else 40)
def test_any_shape(n, c, size, dtype, scale, last):
    content = (images(n, c, *size, grad=False, last=last) * scale).to(dtype)
    style = (images(n, c, 3, grad=False) * scale).to(dtype)
    y = adaptive_instance_norm(content, style, correction=0)
    assert y.shape == content.shape and y.dtype == dtype
    if y.numel():
        formula = lambda c, s: adain(c, s.reshape(n, -1, *[1] * (len(size) - 1), 3), correction=0)
        agrees_with_formula(
            lambda c, s: adaptive_instance_norm(c, s, correction=0), formula,
            (content.requires_grad_(), style.requires_grad_()),
            allowed={torch.float64: 1e-9, torch.float32: 3e-3}.get(dtype, 0.2),
        )  # fmt: skip


def test_any_strides():
    base = images(4, 3, 6, 5, grad=False)
    style = images(4, 3, 9, grad=False)
    for view in (base.transpose(2, 3), base[:, :, ::2], base[:1].expand(4, 3, 6, 5), base.flip(0)):
        ours = adaptive_instance_norm(view, style)
        torch.testing.assert_close(ours, adaptive_instance_norm(view.contiguous(), style))


def test_same_bits_for_any_thread_count_and_batch():
    content, style = images(4, 6, 9, 7), images(4, 6, 11)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            y = adaptive_instance_norm(content, style)
            results.append((y, *torch.autograd.grad(y.square().sum(), (content, style))))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))
    assert torch.equal(adaptive_instance_norm(content[1:3], style[1:3]), results[0][0][1:3])


# ---- conditional instance norm -----------------------------------------------------------------------


def conditional(x, scale, shift, residual=None, correction=0):
    m, s = statistics(x, correction=correction)
    y = (x - m) / s * spread(scale, x) + spread(shift, x)
    return y if residual is None else y + residual


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_conditional_instance_norm(activation, dtype):
    """DyAd's layer, and with residual and relu the tail of OSNet-AIN's block."""
    act = {None: lambda t: t, "relu": F.relu, "silu": F.silu}[activation]
    x, residual = images(*SHAPE, dtype=dtype), images(*SHAPE, dtype=dtype)
    scale, shift = (
        randn(*SHAPE[:2], dtype=dtype, grad=True),
        randn(SHAPE[1], dtype=dtype, grad=True),
    )
    agrees_with_formula(
        lambda x, s, t, r: conditional_instance_norm(
            x, scale=s, shift=t, residual=r, activation=activation
        ),
        lambda x, s, t, r: act(conditional(x, s, t, r)),
        (x, scale, shift, residual),
    )


@pytest.mark.kernel
def test_ragged_time_is_each_row_alone():
    """SAIN over frames: positions past a row's end count nowhere and come out 0."""
    lengths = torch.tensor([7, 3, 0, 1], device=DEVICE)
    x = images(4, 5, 7, dtype=torch.float64)
    scale, shift = (randn(4, 5, dtype=torch.float64, grad=True) for _ in range(2))
    g = randn(4, 5, 7, dtype=torch.float64)
    y = conditional_instance_norm(x, scale=scale, shift=shift, lengths=lengths)
    grads = torch.autograd.grad(y, (x, scale, shift), g)
    assert all(torch.isfinite(t).all() for t in (y, *grads))
    for row, length in enumerate(lengths.tolist()):
        assert not y[row, :, length:].any() and not grads[0][row, :, length:].any()
        if length == 0:
            assert not any(t[row].any() for t in grads)
            continue
        alone = x[row : row + 1, :, :length].detach().requires_grad_()
        s, t = (v[row : row + 1].detach().requires_grad_() for v in (scale, shift))
        want = conditional(alone, s, t)
        torch.testing.assert_close(y[row : row + 1, :, :length], want)
        for a, b in zip(
            grads, torch.autograd.grad(want, (alone, s, t), g[row : row + 1, :, :length])
        ):
            torch.testing.assert_close(
                a[row : row + 1, :, : b.shape[2]] if a.dim() == 3 else a[row : row + 1], b
            )


def test_ragged_time_differentiates():
    lengths = torch.tensor([3, 2, 0], device=DEVICE)
    f = lambda x, s: conditional_instance_norm(x, scale=s, lengths=lengths, activation="relu")
    differentiates(f, (images(3, 2, 4), randn(3, 2, grad=True)))


def test_prompt_driven_instance_norm():
    """PIN: relu(std (f - mean(f)) / std(f) + mean), gradients to mean and std alone."""
    f = images(*SHAPE, grad=False)
    m, s = statistics(f)
    mean, std = m.clone().requires_grad_(), s.clone().requires_grad_()
    ours = lambda std, mean: conditional_instance_norm(
        f.to(std.dtype), scale=std.clamp(min=0), shift=mean, correction=1, activation="relu"
    )

    def formula(std, mean):
        x = f.to(std.dtype)
        m, s = statistics(x)
        return F.relu(std.clamp(min=0) * (x - m) / s + mean)

    y, *_ = agrees_with_formula(ours, formula, (std, mean), allowed=1e-6)
    torch.testing.assert_close(y, F.relu(f))  # it starts from f's own statistics


def test_osnet_ain_block():
    streams, gates = [images(*SHAPE) for _ in range(4)], randn(4, *SHAPE[:2], grad=True)
    w, b = randn(SHAPE[1], grad=True), randn(SHAPE[1], grad=True)

    def ours(residual, w, b, gates, *x):
        y = gated_stream_sum(x, gates)
        return conditional_instance_norm(y, scale=w, shift=b, residual=residual, activation="relu")

    def formula(residual, w, b, gates, *x):
        total = sum(g[..., None, None] * t for g, t in zip(gates, x))
        return F.relu(F.instance_norm(total, weight=w, bias=b) + residual)

    agrees_with_formula(ours, formula, (images(*SHAPE), w, b, gates, *streams), allowed=2e-6)


# ---- the others --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_adain_tokens(dtype):
    def formula(content, style):
        sm, ss = style.mean(1, keepdim=True), style.std(1, keepdim=True)
        return (content - content.mean(1, keepdim=True)) / content.std(1, keepdim=True) * ss + sm

    content, style = images(2, 9, 6, dtype=dtype), images(2, 7, 6, dtype=dtype)
    y, *_ = agrees_with_formula(adain_tokens, formula, (content, style))
    assert y.is_contiguous()


def test_attn_inject():
    q, qs, k, v = (randn(2, 3, n, 8, grad=True) for n in (5, 5, 7, 7))

    def formula(q, qs, k, v):
        scores = 1.5 * (0.75 * q + 0.25 * qs) @ k.transpose(-1, -2) / 8**0.5
        return scores.softmax(-1) @ v

    agrees_with_formula(attn_inject, formula, (q, qs, k, v), allowed=2e-6)
    with pytest.raises(ValueError, match=r"style_key: expected shape \(2, 3, 7, 8\)"):
        attn_inject(q, qs, k[..., :5], v)
    with pytest.raises(ValueError, match=r"style_value: expected shape \(2, 3, 7, 8\)"):
        attn_inject(q, qs, k, v[:, :, 1:])
    with pytest.raises(TypeError, match=r"style_value: expected torch\.float32"):
        attn_inject(q, qs, k, v.bfloat16())


def test_adain_perturb():
    x, mean, std = images(*SHAPE), randn(SHAPE[1], grad=True), randn(SHAPE[1], grad=True)
    still = lambda x, m, s: adain_perturb(x, m, s, noise_std=0.0, seed=1)

    def formula(x, mean, std):
        m, s = statistics(x, 1e-7, "std")
        return (x - m) / s * spread(std, x) + spread(mean, x)

    agrees_with_formula(still, formula, (x, mean, std), allowed=2e-6)
    wide = images(64, 128, 2, 2, grad=False)
    zero, one = torch.zeros(128, device=DEVICE), torch.ones(128, device=DEVICE)
    shifts = adain_perturb(wide, one, zero, seed=5).mean(
        (2, 3)
    )  # the factors of the mean themselves
    assert abs(float(shifts.mean()) - 1) < 0.03 and abs(float(shifts.std()) - 0.75) < 0.03
    scales = adain_perturb(wide, zero, one, seed=5).std((2, 3))
    assert abs(float(scales.square().mean()) - (1 + 0.75**2)) < 0.06
    assert torch.equal(adain_perturb(x, mean, std, seed=3), adain_perturb(x, mean, std, seed=3))
    seed = torch.tensor(3, device=DEVICE)
    assert torch.equal(adain_perturb(x, mean, std, seed=3), adain_perturb(x, mean, std, seed=seed))
    assert not torch.equal(adain_perturb(x, mean, std, seed=3), adain_perturb(x, mean, std, seed=4))
    torch.manual_seed(0)
    first = adain_perturb(x, mean, std)
    torch.manual_seed(0)
    assert torch.equal(first, adain_perturb(x, mean, std))


def test_adain_perturb_applies_with_its_probability():
    x, mean, std = images(2, 3, 2, 2, grad=False), randn(3), randn(3)
    assert torch.allclose(adain_perturb(x, mean, std, p=0.0, seed=1), x)
    kept = sum(torch.allclose(adain_perturb(x, mean, std, p=0.3, seed=s), x) for s in range(60))
    assert 30 <= kept <= 54  # 42 expected; the seeds are fixed


def test_style_mix_adain():
    x, weights = images(*SHAPE), torch.softmax(randn(SHAPE[0], 4), 1)
    means, stds = randn(4, SHAPE[1]), randn(4, SHAPE[1]).abs()

    def formula(x, weights):
        m, s = statistics(x.detach())
        w = weights.to(x.dtype)
        return (x - m) / s * spread(w @ stds.to(x.dtype), x) + spread(w @ means.to(x.dtype), x)

    f = lambda x, w: style_mix_adain(x, means.to(x.dtype), stds.to(x.dtype), w)
    agrees_with_formula(f, formula, (x, weights.requires_grad_()), allowed=2e-6)
    through = style_mix_adain(x, means, stds, weights.detach(), detach_moments=False)
    want = adaptive_instance_norm(x, (weights.detach() @ means, weights.detach() @ stds))
    torch.testing.assert_close(
        torch.autograd.grad(through.square().sum(), x), torch.autograd.grad(want.square().sum(), x)
    )


def region_formula(content, style, masks, alpha):
    out = torch.zeros_like(content)
    for w, a in zip(masks, alpha):

        def of(x):
            m = (w * x).sum((2, 3), keepdim=True) / w.sum()
            return m, ((w * (x - m).square()).sum((2, 3), keepdim=True) / w.sum() + 1e-5).sqrt()

        (m, s), (sm, ss) = of(content), of(style)
        out = out + w * ((1 - a) * content + a * ((content - m) / s * ss + sm))
    return out  # fmt: skip


@pytest.mark.parametrize("soft", [False, True])
def test_region_adain(soft):
    content, style = images(2, 3, 6, 5), images(2, 3, 6, 5, mean=3.0)
    alpha = torch.tensor([0.2, 0.5, 1.0], device=DEVICE)
    labels = torch.arange(30, device=DEVICE).reshape(6, 5) % 3
    masks = F.one_hot(labels, 3).movedim(-1, 0).float()
    regions = labels
    if soft:
        regions = masks = torch.softmax(randn(3, 6, 5), 0)
    agrees_with_formula(
        lambda c, s: region_adain(c, s, regions, alpha=alpha),
        lambda c, s: region_formula(c, s, masks.to(c.dtype), alpha.to(c.dtype)),
        (content, style),
        allowed=3e-6,
    )
    one = region_adain(content, style, torch.zeros(6, 5, dtype=torch.int64, device=DEVICE))
    torch.testing.assert_close(one, adaptive_instance_norm(content, style, correction=0))
    other = region_adain(content, style[:, :, :4], labels, style_regions=labels[:4], alpha=0.5)
    assert other.shape == content.shape
    empty = region_adain(content, style, labels, num_regions=5)  # regions 3 and 4 hold nothing
    torch.testing.assert_close(empty, region_adain(content, style, labels))


# ---- the contract with torch -------------------------------------------------------------------------


def pair_inputs(size):
    return images(2, size, 3, 3), images(2, size, 9), randn(2, size, grad=True)


def both(content, style, scale):
    y = adaptive_instance_norm(content, style, alpha=0.5)
    return conditional_instance_norm(y, scale=scale, activation="silu")


def test_compile_aot_eager():
    compiles(both, pair_inputs)


@pytest.mark.inductor
@pytest.mark.no_interpreter
def test_compile_inductor():
    compiles(both, pair_inputs, backend="inductor")


def test_torch_func_and_backends():
    tensors = pair_inputs(4)
    works_under_torch_func(both, tensors)
    with solera.backend("reference"):
        want = both(*tensors)
    torch.testing.assert_close(both(*tensors), want)
    content, style, _ = (t.detach() for t in tensors)
    rows = torch.func.vmap(adaptive_instance_norm)(content[:, None], style[:, None])
    torch.testing.assert_close(rows[:, 0], adaptive_instance_norm(content, style))


def test_autocast_leaves_the_dtype():
    content, style = images(2, 3, 4, 4), images(2, 3, 4, 4)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert adaptive_instance_norm(content, style).dtype == torch.float32
        half = content.bfloat16()
        assert adaptive_instance_norm(half, style).dtype == torch.bfloat16


X = torch.ones(2, 3, 4, 4, device=DEVICE)
T = torch.ones(2, 3, 5, device=DEVICE)
V = torch.ones(2, 3, device=DEVICE)
BAD = [
    (lambda: adaptive_instance_norm(V, X), ValueError, "content: expected at least 3"),
    (lambda: adaptive_instance_norm(X.int(), X), TypeError, "content: expected float32"),
    (lambda: adaptive_instance_norm(X, X[:, :2]), ValueError, r"style: expected shape \(1 or 2, 3"),
    (lambda: adaptive_instance_norm(X, X.double()), TypeError, "style: float64 with content"),
    (lambda: adaptive_instance_norm(X, (V,)), ValueError, "style: expected a .mean, std. pair"),
    (lambda: adaptive_instance_norm(X, (V, V[:, :2])), ValueError, "style std: expected shape"),
    (lambda: adaptive_instance_norm(X, 3), TypeError, "style: expected a torch.Tensor"),
    (lambda: adaptive_instance_norm(X, X, eps=-1), ValueError, "eps: expected a finite number"),
    (lambda: adaptive_instance_norm(X, X, eps_at="x"), ValueError, "eps_at: expected one of"),
    (lambda: adaptive_instance_norm(X, X, correction=2), ValueError, "correction: expected 0 or 1"),
    (lambda: adaptive_instance_norm(X[..., :1, :1], X), ValueError, "content: each channel: expec"),
    (lambda: adaptive_instance_norm(X, X[..., :1, :1]), ValueError, "style: each channel: expec"),
    (lambda: conditional_instance_norm(X, scale=V[:1, :2]), ValueError, "scale: expected shape"),
    (lambda: conditional_instance_norm(X, lengths=V), TypeError, "lengths: expected int64"),
    (lambda: conditional_instance_norm(X, lengths=V[:, 0].long()), ValueError, "lengths: expected x"),
    (lambda: conditional_instance_norm(T, lengths=V.long()), ValueError, "lengths: expected shape"),
    (lambda: conditional_instance_norm(X, residual=X[:1]), ValueError, "residual: expected shape"),
    (lambda: conditional_instance_norm(X, activation="tanh"), ValueError, "activation: expected"),
    (lambda: adain_perturb(X, V, V, p=2.0), ValueError, r"p: expected a finite number in \[0, 1\]"),
    (lambda: adain_perturb(X, V[0, :2], V), ValueError, "mean: expected shape"),
    (lambda: style_mix_adain(X, V, V[0], V), ValueError, "mean_bank: expected shape"),
    (lambda: adain_tokens(X, X), ValueError, "content: expected 3 dimensions"),
    (lambda: region_adain(X, X, X), ValueError, "regions: expected masks of shape"),
    (lambda: region_adain(X, X, [0]), TypeError, "regions: expected a torch.Tensor"),
    (lambda: region_adain(X, X[..., :2], X[0, 0].long()), ValueError, "style: expected spatial"),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input_is_named(case):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.skipif(DEVICE != "cpu", reason="values are read from CPU tensors only")
def test_lengths_out_of_range_are_named():
    with pytest.raises(ValueError, match=r"lengths: expected values in \[0, 5\]"):
        conditional_instance_norm(T, lengths=torch.tensor([6, 1]))


def test_large_mean_keeps_the_digits():
    content, style = images(2, 4, 16, 16, mean=1e3), images(2, 4, 16, 16)
    agrees_with_formula(adaptive_instance_norm, adain, (content, style), allowed=5e-5)
