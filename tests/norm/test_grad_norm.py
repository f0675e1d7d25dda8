"""Core grad_norm: norms, dots, clipping and projections of lists against float64, timm's loop, bad input."""

import math

import pytest
import torch
from helpers import DEVICE, DTYPES, INTERPRETED, ULP, assert_accurate, randn, relative_error
from hypothesis import given
from hypothesis import strategies as st

import solera
from solera.norm import (
    adaptive_grad_clip_,
    multi_tensor_norm,
    norm_growth_limit_,
    orthogonalize_grad_,
)

ops = torch.ops.solera
SHAPES = [(3, 5), (7,), (), (6, 3, 2, 2), (0, 4), (1,), (2, 1500), (40, 30), (17000,)]


def mixed(shapes=SHAPES, dtypes=DTYPES, scale=1.0):
    return [of(s, dtype=dtypes[i % len(dtypes)], scale=scale) for i, s in enumerate(shapes)]


def params(shapes=SHAPES, dtype=torch.float32, grad_scale=1.0, zero=()):
    """Parameters with gradients, as an optimiser sees them."""
    out = []
    for i, s in enumerate(shapes):
        p = torch.nn.Parameter(of(s, dtype=dtype))
        p.grad = of(s, dtype=dtype, scale=grad_scale)
        if i in zero:
            p.grad.zero_()
        out.append(p)
    return out


def of(shape, **options):
    """randn of a shape that may be ()."""
    return randn(*(shape or (1,)), **options).reshape(shape)


def slack(dtype):
    """Half precision is rounded once; the interpreter cuts bfloat16 off instead."""
    return ULP[dtype] * (2 if INTERPRETED and dtype == torch.bfloat16 else 1)


@pytest.mark.parametrize("ord", [1, 2, math.inf])
def test_norms_of_mixed_lists(ord):
    tensors = mixed()
    each = [
        torch.linalg.vector_norm(t.double().flatten(), ord) if t.numel() else 0 for t in tensors
    ]
    truth = torch.tensor(each, dtype=torch.float64)
    found = multi_tensor_norm(tensors, ord, per_tensor=True)
    assert found.dtype == torch.float64 and found.shape == truth.shape
    torch.testing.assert_close(found.cpu(), truth, rtol=1e-6, atol=0)
    total = multi_tensor_norm(tensors, ord)
    torch.testing.assert_close(total.cpu(), torch.linalg.vector_norm(truth, ord), rtol=1e-6, atol=0)
    plain = [t.float() for t in tensors]
    assert multi_tensor_norm(plain, ord).dtype == torch.float32
    assert_accurate(
        multi_tensor_norm(plain, ord),
        torch.linalg.vector_norm(torch.cat([t.flatten().double() for t in plain]), ord),
        torch.nn.utils.get_total_norm([t for t in plain if t.numel()], ord),
    )


def test_norms_of_what_is_not_ordinary():
    nan = torch.tensor([1.0, float("nan"), 3.0], device=DEVICE)
    inf = torch.tensor([1.0, -float("inf")], device=DEVICE)
    for ord in (1, 2, math.inf):
        found = multi_tensor_norm([nan, inf, nan[:1]], ord, per_tensor=True)
        assert found[0].isnan() and found[1] == math.inf and found[2] == 1
        assert multi_tensor_norm([nan, inf], ord).isnan()
        assert multi_tensor_norm([], ord) == 0
        assert multi_tensor_norm(torch.zeros(0, device=DEVICE), ord) == 0
    assert multi_tensor_norm([], per_tensor=True).shape == (0,)
    strided = randn(6, 8)[:, ::2]
    for t in (strided, strided.t(), randn(3, 1).expand(3, 5), randn(2, 3, 4, 4).mT):
        torch.testing.assert_close(multi_tensor_norm(t), t.norm(), rtol=1e-6, atol=0)
    t = randn(3, grad=True)
    assert not multi_tensor_norm(t).requires_grad


@given(
    shape=st.lists(st.integers(0, 5), max_size=3),
    dtype=st.sampled_from(DTYPES),
    ord=st.sampled_from([1, 2, math.inf]),
    value=st.sampled_from([1.0, 1e-15, 1e15, 0.0, math.inf]),
    transpose=st.booleans(),
)
def test_norm_fuzz(shape, dtype, ord, value, transpose):
    t = of(shape, dtype=dtype) * value
    t = t.mT if transpose and t.dim() >= 2 else t
    truth = t.to(torch.float64 if dtype == torch.float64 else torch.float32).flatten()
    truth = torch.linalg.vector_norm(truth, ord) if t.numel() else truth.sum()
    torch.testing.assert_close(
        multi_tensor_norm(t, ord), truth, rtol=1e-6, atol=1e-38, equal_nan=True
    )


def test_dots_in_double():
    a, b = mixed(), mixed(dtypes=DTYPES[::-1])
    found = ops.tensor_dots(a, b)
    for l, (x, y) in enumerate(zip(a, b)):
        x, y = x.double(), y.double()
        for k, truth in enumerate(((x * x).sum(), (x * y).sum(), (y * y).sum())):
            size = x.norm() * y.norm() if k == 1 else truth
            assert (found[k, l] - truth).abs() <= 1e-13 * size
    p = randn(1000)
    almost = p * (1 + 1e-6 * randn(1000))  # cancels to 1e-12 of the norm squared
    aa, ab, bb = ops.tensor_dots([p], [almost])[:, 0]
    assert abs((aa - ab * ab / bb) / (p.double() - almost.double()).square().sum() - 1) < 1


def unit_norm(x, ord):
    if x.dim() < 2:
        return torch.linalg.vector_norm(x, ord)
    return torch.linalg.vector_norm(x, ord, dim=tuple(range(1, x.dim())), keepdim=True)


def agc_exact(p, clip, eps, ord):
    g, w = p.grad.double(), p.detach().double()
    if g.numel() == 0:
        return g
    factor = clip * unit_norm(w, ord).clamp_min(eps) / unit_norm(g, ord).clamp_min(1e-6)
    return g * factor.clamp_max(1)


def timm_loop(parameters, clip_factor=0.01, eps=1e-3):
    """timm.utils.agc.adaptive_clip_grad, its formula: unit norms, then a choice per unit."""
    for p in parameters:
        limit = unit_norm(p.detach(), 2).clamp(min=eps) * clip_factor
        norm = unit_norm(p.grad, 2)
        clipped = p.grad * (limit / norm.clamp(min=1e-6))
        p.grad.copy_(torch.where(norm < limit, p.grad, clipped))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ord", [1, 2, math.inf])
def test_adaptive_grad_clip(ord, dtype):
    for scale in (1.0, 0.01):
        ps = params(dtype=dtype, grad_scale=scale, zero=(3,))
        truth = [agc_exact(p, 0.1, 1e-3, ord) for p in ps]
        before = [p.grad for p in ps]
        version = ps[0].grad._version
        adaptive_grad_clip_(ps, 0.1, norm_type=ord)
        assert ps[0].grad is before[0] and ps[0].grad._version > version
        for p, exact in zip(ps, truth):
            limit = max(slack(dtype), 4e-7 if dtype != torch.float64 else 2e-14)
            assert relative_error(p.grad, exact) <= limit


def test_adaptive_grad_clip_agrees_with_timm():
    ps = params([(64, 3, 7, 7), (64,), (128, 64, 1, 1), (10, 128), (10,)], grad_scale=0.02)
    with torch.no_grad():
        ps[2].mul_(1e-5)  # below eps
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ps]
    for p, q in zip(ps, theirs):
        q.grad = p.grad.clone()
    timm_loop(theirs)
    adaptive_grad_clip_(iter(ps))
    for p, q in zip(ps, theirs):
        torch.testing.assert_close(p.grad, q.grad, rtol=2e-6, atol=1e-9)


def test_adaptive_grad_clip_layouts_and_dtypes():
    """Channels-last and transposed memory, gradients of another dtype, unclipped units untouched."""
    weight, grad = randn(6, 4, 3, 3), randn(6, 4, 3, 3)
    grad[2] *= 1e-4
    grads = [
        grad.clone(), grad.to(memory_format=torch.channels_last), grad.mT.contiguous().mT,
        torch.cat([grad, grad], 1)[:, :4], grad.permute(1, 0, 2, 3).contiguous().permute(1, 0, 2, 3),
    ]  # fmt: skip
    ps = []
    for g in grads:
        ps.append(torch.nn.Parameter(weight.to(memory_format=torch.channels_last)))
        ps[-1].grad = g
    truth = agc_exact(ps[0], 0.01, 1e-3, 2)
    adaptive_grad_clip_(ps)
    for p, g in zip(ps, grads):
        assert p.grad is g and relative_error(g, truth) < 5e-7
        assert torch.equal(g[2], grad[2])


def test_orthogonalize():
    for dtype in DTYPES:
        for rescale in (True, False):
            shapes = [(3, 5), (7,), (2, 1500), (0, 4)]
            ps = params(shapes, dtype=dtype)
            truth = []
            for p in ps:
                w, g = p.detach().double().flatten(), p.grad.double().flatten()
                o = g - (w @ g) / (w @ w + 1e-30) * w
                truth.append((o * (g.norm() / o.norm()) if rescale and len(g) else o).view(p.shape))
            orthogonalize_grad_(ps, rescale=rescale)
            for p, exact in zip(ps, truth):
                assert relative_error(p.grad, exact) <= max(slack(dtype), 1e-15)


def test_orthogonalize_at_the_edges():
    """A gradient along the weight, a zero weight, a zero gradient: finite, and what the formula says."""
    p = params([(50,), (50,), (50,), (1,)])
    p[0].grad = p[0].detach().clone()
    with torch.no_grad():
        p[1].zero_()
    p[2].grad.zero_()
    kept, size = p[1].grad.clone(), p[0].grad.norm()
    orthogonalize_grad_(p)
    assert torch.equal(p[1].grad, kept) and (p[2].grad == 0).all()
    assert p[0].grad.norm() <= 1e-6 * size
    assert (p[3].grad.abs() <= 1e-6).all()


def test_norm_growth_limit():
    grads = [randn(30, 20), randn(5, dtype=torch.float64), randn(100, dtype=torch.bfloat16)]
    previous = torch.zeros(3, dtype=torch.float64, device=DEVICE)
    first = [g.clone() for g in grads]
    norm_growth_limit_(grads, previous)
    assert all(torch.equal(a, b) for a, b in zip(grads, first))  # no step before
    norms = [g.double().norm() for g in grads]
    torch.testing.assert_close(previous, torch.stack(norms), rtol=1e-6, atol=0)
    for factor, allowed in ((0.5, 0.5), (3.0, 0.5 * 1.1), (0.6, 0.6)):
        step = [(g * factor) for g in first]
        norm_growth_limit_(step, previous, gamma=1.1)
        for s, n, p in zip(step, norms, previous):
            assert abs(s.double().norm() / (n * allowed) - 1) < 1e-2
            assert abs(p / (n * allowed) - 1) < 1e-2
    one, before = randn(4), torch.zeros((), device=DEVICE)
    norm_growth_limit_(one, before)
    torch.testing.assert_close(before, one.norm())


def test_scaling_skips_what_stays():
    tensors = mixed()
    tensors[0][0, 0] = float("nan")
    factors = torch.tensor([1.0, 0.5, 2, 1, 1, 0, 1, 0.25, -1], device=DEVICE)
    before = [t.clone() for t in tensors]
    ops.scale_tensors_(tensors, factors)
    for t, b, f in zip(tensors, before, factors.tolist()):
        torch.testing.assert_close(t, (b.double() * f).to(t.dtype), equal_nan=True)


def test_backends_agree():
    mine, plain = params(), params()
    for p, q in zip(mine, plain):
        q.data.copy_(p.data)
        q.grad.copy_(p.grad)
    adaptive_grad_clip_(mine, 0.05)
    orthogonalize_grad_(mine)
    with solera.backend("reference"):
        adaptive_grad_clip_(plain, 0.05)
        orthogonalize_grad_(plain)
    for p, q in zip(mine, plain):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-7)


def test_opcheck():
    a = [randn(4, 6).t(), randn(1, 3).expand(2, 3), randn(5, dtype=torch.bfloat16)]
    b = [randn(6, 4), randn(2, 3), randn(5)]
    clip = torch.tensor([[0.5] * 3, [0.25] * 3], device=DEVICE)
    torch.library.opcheck(ops.tensor_norms.default, (a, None, 2.0))
    torch.library.opcheck(ops.tensor_norms.default, (a, clip, 1.0))
    torch.library.opcheck(ops.tensor_dots.default, (a, b))
    strided = [randn(4, 6).t(), randn(2, 3), randn(5, dtype=torch.bfloat16)]
    torch.library.opcheck(ops.scale_tensors_.default, (strided, randn(3)))
    torch.library.opcheck(ops.clip_units_.default, (strided, b, 0.1, 1e-3, 2.0))


def test_clipped_norms():
    t = randn(3000)
    clip = torch.tensor([[1.0], [0.25]], device=DEVICE)
    wanted = torch.where(t.abs() > 1, t * 0.25, t)
    for ord in (1.0, 2.0, math.inf):
        found = ops.tensor_norms([t], clip, ord)[0]
        torch.testing.assert_close(found, torch.linalg.vector_norm(wanted, ord))


@pytest.mark.no_interpreter
def test_same_bits_for_any_thread_count_and_company():
    shapes = [(300, 70), (70000,), (64, 3, 7, 7)]
    start = params(shapes)
    found = []
    before = torch.get_num_threads()
    try:
        for threads, company in ((1, 0), (2, 0), (2, 5)):
            torch.set_num_threads(threads)
            ps = [torch.nn.Parameter(p.detach().clone()) for p in start]
            for p, q in zip(ps, start):
                p.grad = q.grad.clone()
            others = params([(50, 20)] * company)
            orthogonalize_grad_([*others, *ps])
            adaptive_grad_clip_([*others, *ps])
            norms = multi_tensor_norm([p.grad for p in (*others, *ps)], per_tensor=True)
            found.append([*(p.grad for p in ps), norms[company:]])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other))


BAD = [
    (lambda: multi_tensor_norm([torch.ones(2)], 3), ValueError, "ord: expected 1, 2 or inf"),
    (lambda: multi_tensor_norm(3), TypeError, "tensors: expected a tensor or an iterable"),
    (lambda: multi_tensor_norm([torch.ones(2), 3]), TypeError, r"tensors\[1\]: expected a torch"),
    (
        lambda: multi_tensor_norm([torch.ones(2).long()]),
        TypeError,
        r"tensors\[0\]: expected a dense",
    ),
    (lambda: adaptive_grad_clip_([], clip=-1), ValueError, "clip: expected a finite number"),
    (lambda: adaptive_grad_clip_([], norm_type=3), ValueError, "norm_type: expected one of"),
    (lambda: adaptive_grad_clip_(3), TypeError, "parameters: expected a tensor or an iterable"),
    (lambda: adaptive_grad_clip_([3]), TypeError, r"parameters\[0\]: expected a torch.Tensor"),
    (lambda: orthogonalize_grad_([], eps=-1), ValueError, "eps: expected a finite number"),
    (
        lambda: norm_growth_limit_(torch.ones(3), torch.zeros(2)),
        ValueError,
        r"prev_norm: expected a tensor of shape \(1,\)",
    ),
    (
        lambda: norm_growth_limit_(torch.ones(3), torch.zeros(1).half()),
        TypeError,
        "prev_norm: expected float32",
    ),
    (
        lambda: norm_growth_limit_(torch.ones(3), torch.zeros(1), 0.5),
        ValueError,
        "gamma: expected a finite number",
    ),
    (
        lambda: norm_growth_limit_(torch.ones(1).expand(3), torch.zeros(1)),
        ValueError,
        r"grad\[0\]: expanded",
    ),
]


@pytest.mark.parametrize("call, error, message", BAD, ids=[m for _, _, m in BAD])
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_ops_refuse_what_does_not_fit():
    a, b = [randn(3)], [randn(4)]
    with pytest.raises(RuntimeError, match="differ"):
        ops.tensor_dots(a, b)
    with pytest.raises(RuntimeError, match="differs in shape"):
        ops.clip_units_(a, b, 0.1, 1e-3, 2.0)


def test_parameter_given_twice_and_parameters_without_gradient():
    p = params([(3, 4)])[0]
    with pytest.raises(ValueError, match="given twice"):
        adaptive_grad_clip_([p, p])
    bare = torch.nn.Parameter(randn(3))
    adaptive_grad_clip_([bare])
    orthogonalize_grad_(bare)
    assert bare.grad is None


def test_compile():
    def f(x, y, previous):
        z = [x * 2, y.tanh()]
        norm_growth_limit_(z, previous)
        return multi_tensor_norm(z), z[0] + 1

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (3, 5):
        x, y = randn(n, 4), randn(n + 1)
        states = [torch.full((2,), 0.5, device=DEVICE) for _ in range(2)]
        for a, b in zip(f(x, y, states[0]), compiled(x, y, states[1])):
            torch.testing.assert_close(a, b)
        torch.testing.assert_close(*states)


# ---- papers that are a line or two ------------------------------------------------------------------


def test_adagradnorm_and_its_norm_test():
    """AdAdaGrad: v += ||g||^2, x -= lr g / sqrt(v); batches grow to variance / (eta^2 ||g||^2)."""
    x, grads, v = randn(5, dtype=torch.float64), randn(3, 5, dtype=torch.float64), 0.3
    moved, state = x.clone(), torch.tensor(0.3, dtype=torch.float64, device=DEVICE)
    for g in grads:
        state += multi_tensor_norm(g).square()
        moved -= 0.1 * g / state.sqrt()
        v += float((g * g).sum())
        x = x - 0.1 * g / v**0.5
    torch.testing.assert_close(moved, x)
    per_sample = randn(8, 5, dtype=torch.float64)
    mean = per_sample.mean(0)
    spread = multi_tensor_norm(per_sample - mean).square() / (8 - 1)
    batch = spread / (0.5**2 * multi_tensor_norm(mean).square())
    truth = per_sample.var(0).sum() / (0.25 * mean.square().sum())
    torch.testing.assert_close(batch, truth)


def test_pairwise_cosine_of_gradients():
    """Few-Shot NAS with gradient matching: cosine similarities of the operations' shared gradients."""
    from solera.norm import l2_normalize

    g = randn(4, 30, dtype=torch.float64, grad=True)
    unit = l2_normalize(g)
    found = unit @ unit.mT
    truth = torch.nn.functional.cosine_similarity(g[:, None], g[None], dim=-1)
    torch.testing.assert_close(found, truth)


def test_layerwise_cosine_distance_twice_differentiable():
    """Dataset condensation with contrastive signals: sum over output nodes of 1 - cos(g_S, g_T)."""
    from solera.norm import l2_normalize

    def distance(gs, gt):
        return sum((1 - (l2_normalize(a) * l2_normalize(b)).sum(-1)).sum() for a, b in zip(gs, gt))

    gs = [randn(3, 4, dtype=torch.float64, grad=True), randn(2, 5, dtype=torch.float64, grad=True)]
    gt = [randn(3, 4, dtype=torch.float64), randn(2, 5, dtype=torch.float64)]
    truth = sum(
        (1 - torch.nn.functional.cosine_similarity(a, b, dim=-1)).sum() for a, b in zip(gs, gt)
    )
    torch.testing.assert_close(distance(gs, gt), truth)
    assert torch.autograd.gradgradcheck(lambda *g: distance(g, gt), gs)


def test_sampling_by_gradient_norm():
    """PA&DA: probabilities proportional to the gradient norm of each path."""
    paths = [[randn(3, 4), randn(5)], [randn(2)], [randn(7, 2)]]
    norms = torch.stack([multi_tensor_norm(p) for p in paths])
    found = norms / norms.sum()
    each = [torch.cat([t.flatten() for t in p]).norm() for p in paths]
    torch.testing.assert_close(found, torch.stack(each) / sum(each))
    torch.testing.assert_close(found.sum(), torch.ones((), device=DEVICE))


def test_guided_loss_scaling():
    """Is heuristic sampling necessary: the classification loss brought to w times the regression loss."""
    cls, reg = randn(1, grad=True)[0].square(), randn(1, grad=True)[0].square()
    scaled = cls * (multi_tensor_norm(reg) / multi_tensor_norm(cls)) * 2
    torch.testing.assert_close(scaled, 2 * reg)
    assert scaled.requires_grad


def test_d_adaptation_lower_bound():
    """D-Adaptation: d >= (d_0 sum lr <g, s> ...) from one dot and one norm over all tensors."""
    grads = [[randn(3, 2, dtype=torch.float64), randn(4, dtype=torch.float64)] for _ in range(5)]
    s = [torch.zeros_like(t) for t in grads[0]]
    total = torch.zeros((), dtype=torch.float64, device=DEVICE)
    for g in grads:
        total = total + ops.tensor_dots(g, s)[1].sum()
        solera.weights.lincomb([s, g], [1.0, 1.0], out=s)
    norm = multi_tensor_norm(s)
    found = 2 * total / norm  # at d_0 = lr = 1: (|s|^2 - sum |g|^2) / |s|
    flat = torch.stack([torch.cat([t.flatten() for t in g]) for g in grads])
    truth = (flat.sum(0).square().sum() - flat.square().sum()) / flat.sum(0).norm()
    torch.testing.assert_close(found, truth)
