"""Averages and splits of adapters, and layers of thin factors, against their papers' formulas in float64."""

import pytest
import torch
import torch.nn.functional as F
from function_checks import compiles
from helpers import DEVICE, assert_accurate, randn

import solera
from solera.weights import (
    average_lora,
    decomposed_fusion,
    diag_low_rank_linear,
    ldu_init,
    low_rank_delta,
    low_rank_linear,
    merge_lora_,
    nested_lora_linear,
    proto_calibrate,
    svd_split,
    weighted_lora_sum,
)

f64 = torch.float64


def truncated(m, rank):
    u, s, vh = torch.linalg.svd(m, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def adapters(ranks=(2, 3, 1), out=9, inner=7, dtype=f64):
    return [(randn(r, inner, dtype=dtype), randn(out, r, dtype=dtype)) for r in ranks]


def test_average_lora_averages_the_products():
    found = adapters()
    for weights in (None, [0.5, -1.0, 2.0], torch.tensor([0.2, 0.3, 0.5], device=DEVICE)):
        w = [1 / 3] * 3 if weights is None else [float(v) for v in weights]
        want = sum(wk * b @ a for wk, (a, b) in zip(w, found))
        a, b = average_lora(found, weights)
        assert a.shape == (6, 7) and b.shape == (9, 6)
        torch.testing.assert_close(b @ a, want, rtol=1e-6, atol=1e-6)
        a, b = average_lora(found, weights, rank=2)
        torch.testing.assert_close(b @ a, truncated(want, 2), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0))
    one = average_lora(found[:1])
    torch.testing.assert_close(one[1] @ one[0], found[0][1] @ found[0][0])
    half = adapters(dtype=torch.bfloat16)
    a, b = average_lora(half)
    assert a.dtype == b.dtype == torch.bfloat16
    exact = sum(y.double() @ x.double() for x, y in half) / 3
    assert (b.double() @ a.double() - exact).norm() < 0.02 * exact.norm()


def test_jare_is_the_weighted_sum_of_updates():
    """Scalable Language Model with Generalized Continual Learning."""
    a, b = randn(5, 2, 3, 4, dtype=f64, grad=True), randn(5, 2, 3, 6, dtype=f64, grad=True)
    index = torch.tensor([4, 0, 4], device=DEVICE)
    w = randn(3, dtype=f64, grad=True)
    want = torch.stack(
        [sum(w[n] * a[i, l].T @ b[i, l] for n, i in enumerate([4, 0, 4])) for l in range(2)]
    )
    torch.testing.assert_close(weighted_lora_sum(a, b, index, w), want)
    assert torch.autograd.gradcheck(lambda a, b, w: weighted_lora_sum(a, b, index, w), (a, b, w))


def test_low_rank_delta_is_the_leading_part():
    """LoRE; FlexiGPT's start for a shared block; Low-Rank Approximation, Adaptation, and Other Tales."""
    base, tuned = randn(9, 7, dtype=f64), randn(9, 7, dtype=f64)
    delta = tuned - base
    a, b = low_rank_delta(base, tuned, rank=3)
    assert a.shape == (3, 7) and b.shape == (9, 3)
    torch.testing.assert_close(b @ a, truncated(delta, 3))
    s = torch.linalg.svdvals(delta)
    for energy in (0.3, 0.8, 1.0):
        a, b = low_rank_delta(base, tuned, energy=energy)
        k = a.shape[0]
        share = s.square().cumsum(0) / s.square().sum()
        assert share[k - 1] >= energy - 1e-12 and (k == 1 or share[k - 2] < energy)
    # A difference of low rank: the randomised decomposition finds it, the same each time.
    tuned = base + randn(9, 2, dtype=f64) @ randn(2, 7, dtype=f64)
    a, b = low_rank_delta(base, tuned, rank=2, iterations=2, seed=5)
    torch.testing.assert_close(base + b @ a, tuned)
    again = low_rank_delta(base, tuned, rank=2, iterations=2, seed=5)
    assert torch.equal(a, again[0]) and torch.equal(b, again[1])
    merged = base.clone()
    merge_lora_(merged, a, b)
    torch.testing.assert_close(merged, tuned)


def test_pela_splits_a_weight():
    """PELA: Learning Parameter-Efficient Models with Low-Rank Approximation."""
    w, x, bias = randn(12, 8, dtype=f64), randn(3, 8, dtype=f64), randn(12, dtype=f64)
    r, q = svd_split(w, ratio=1.5)
    assert r.shape == (int(12 * 8 / (1.5 * 20)), 8) and q.shape == (12, 3)
    torch.testing.assert_close(q @ r, truncated(w, 3))
    torch.testing.assert_close(low_rank_linear(x, r, q, bias), x @ r.T @ q.T + bias)
    r, q = svd_split(w, 8)
    torch.testing.assert_close(low_rank_linear(x, r, q), x @ w.T)
    grads = [t.requires_grad_() for t in (x, r, q, bias)]
    assert torch.autograd.gradcheck(low_rank_linear, grads)


def test_glad_is_lora():
    """GLAD: Generalizable Tuning for Vision-Language Models: y = x W^T + s (x A^T) B^T."""
    x, w, a, b = (randn(*s, dtype=f64) for s in ((3, 8), (5, 8), (2, 8), (5, 2)))
    y = F.linear(x, w) + 0.5 * low_rank_linear(x, a, b)
    torch.testing.assert_close(y, F.linear(x, merge_lora_(w, a, b, 0.5)))


def test_corda_is_a_split_in_the_context():
    """CorDA: W C = U S V^T, its leading part taken back by the inverse of C."""
    w, root = randn(6, 8, dtype=f64), randn(8, 20, dtype=f64)
    c = root @ root.T / 20 + 0.1 * torch.eye(8, device=DEVICE)
    r, q = svd_split(w @ c, 3)
    a = torch.linalg.solve(c, r.T).T
    u, s, vh = torch.linalg.svd(w @ c, full_matrices=False)
    torch.testing.assert_close(q @ a, (u[:, :3] * s[:3]) @ vh[:3] @ torch.linalg.inv(c))
    residual = merge_lora_(w.clone(), a, q, -1.0)
    x = randn(2, 8, dtype=f64)
    torch.testing.assert_close(F.linear(x, residual) + low_rank_linear(x, a, q), x @ w.T)


@pytest.mark.parametrize("shape", [(6, 6), (5, 8), (8, 5)], ids=str)
def test_loldu_is_the_papers_layer(shape):
    """LoLDU: Low-Rank Adaptation via Lower-Diag-Upper Decomposition for Parameter-Efficient Fine-Tuning."""
    w, x = randn(*shape, dtype=f64), randn(3, shape[1], dtype=f64)
    residual, l_r, perm, z, s, u_r = ldu_init(w, 3)
    p, lower, upper = torch.linalg.lu(w)
    d = upper.diagonal()[:3]
    update = p @ lower[:, :3] @ torch.diag(d) @ (upper[:3] / d[:, None])
    torch.testing.assert_close(residual, w - update)
    torch.testing.assert_close(diag_low_rank_linear(x, residual, l_r, perm, z, s, u_r), x @ w.T)
    z, s, bias = randn(3, dtype=f64), 0.7, randn(shape[0], dtype=f64)
    delta = s * p @ l_r @ torch.diag(z) @ u_r
    want = x @ (residual + delta).T + bias
    got = diag_low_rank_linear(x, residual, l_r, perm, z, s, u_r, bias)
    torch.testing.assert_close(got, want)
    scale = torch.tensor(s, dtype=f64, device=DEVICE, requires_grad=True)
    layer = lambda x, z, s: diag_low_rank_linear(x, residual, l_r, perm, z, s, u_r, bias)
    assert torch.autograd.gradcheck(layer, (x.requires_grad_(), z.requires_grad_(), scale))
    zero = ldu_init(torch.zeros(4, 4, device=DEVICE), 2)
    assert not zero[0].any() and all(t.isfinite().all() for t in zero)


def test_nora_is_nested_lora():
    """NoRA: Nested Low-Rank Adaptation for Efficient Fine-Tuning Large Models."""
    w, x, bias = randn(9, 7, dtype=f64), randn(2, 3, 7, dtype=f64), randn(9, dtype=f64)
    a, b = svd_split(w, 4)
    inner_a, inner_b = randn(2, 4, dtype=f64, grad=True), randn(4, 2, dtype=f64, grad=True)
    want = x @ (w + 0.5 * b @ inner_b @ inner_a @ a).T + bias
    got = nested_lora_linear(x, w, a, inner_a, inner_b, b, 0.5, bias)
    torch.testing.assert_close(got, want)
    grads = torch.autograd.grad(got.sum(), (inner_a, inner_b))
    torch.testing.assert_close(grads, torch.autograd.grad(want.sum(), (inner_a, inner_b)))
    thin = [t.detach().float() for t in (inner_a, inner_b)]
    layer = lambda x, a, b: nested_lora_linear(x, w.float(), a, *thin, b)
    compiles(layer, lambda n: (randn(n, 7, grad=True), a.float(), b.float().requires_grad_()))


def test_rapf_is_the_papers_fusion():
    """Class-Incremental Learning with CLIP: Adaptive Representation Adjustment and Parameter Fusion."""
    for shape in ((6, 6), (4, 7), (7, 4), (2, 5, 5)):
        old, new = randn(*shape, dtype=f64), randn(*shape, dtype=f64)
        u, s, vh = torch.linalg.svd(old, full_matrices=True)
        sigma = torch.zeros(shape, dtype=f64, device=DEVICE)
        sigma.diagonal(dim1=-2, dim2=-1).copy_(s)
        projected_new, projected_old = u.mT @ new, sigma @ vh
        difference = (projected_new - projected_old).abs()
        for bias in (0.0, 0.3, 1.0):
            m = (difference / difference.amax((-2, -1), keepdim=True) + bias).clamp(max=1)
            want = u @ (projected_new * m + projected_old * (1 - m))
            torch.testing.assert_close(decomposed_fusion(old, new, bias), want)
    torch.testing.assert_close(decomposed_fusion(old, new, 1.0), new)
    assert torch.equal(decomposed_fusion(old, old, 0.2), old)
    assert decomposed_fusion(old[:, :0], new[:, :0], 0.1).shape == (2, 0, 5)
    assert_accurate(decomposed_fusion(old.bfloat16(), new.bfloat16(), 1.0), new.bfloat16())


def test_teen_calibrates_prototypes():
    """Few-Shot Class-Incremental Learning via Training-Free Prototype Calibration."""
    new, base, x = (randn(n, 6, dtype=f64, grad=True) for n in (3, 5, 4))
    n, b = F.normalize(new, dim=1), F.normalize(base, dim=1)
    delta = F.normalize((16 * n @ b.T).softmax(1) @ b, dim=1)
    want = 0.7 * n + 0.3 * delta
    w = proto_calibrate(new, base, 16.0, 0.3)
    torch.testing.assert_close(w, want)
    logits = 10 * F.normalize(x, dim=1) @ F.normalize(want, dim=1).T
    torch.testing.assert_close(solera.ensemble.cosine_logits(x, w, 10.0), logits)
    assert torch.autograd.gradcheck(proto_calibrate, (new, base))
    half = [t.detach().float() for t in (new, base)]
    with torch.autocast(DEVICE, torch.bfloat16):  # made once, so in the prototypes' own precision
        assert torch.equal(proto_calibrate(*half), proto_calibrate(*half).float())
        assert_accurate(proto_calibrate(*half, 16.0, 0.3), want)


def test_loldu_trains_in_float32_beside_half_factors():
    w, x = randn(5, 6), randn(3, 6)
    half = [t.bfloat16() if t.is_floating_point() else t for t in ldu_init(w, 2)]
    half[3], half[4] = half[3].float().requires_grad_(), half[4].float().requires_grad_()
    y = diag_low_rank_linear(x.bfloat16(), *half)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and half[3].grad.dtype == half[4].grad.dtype == torch.float32
    wide = [t.detach().double() if t.is_floating_point() else t for t in half]
    want = diag_low_rank_linear(x.bfloat16().double(), *wide)
    assert (
        y.double() - want
    ).norm() < 2**-7 * want.norm()  # torch's products in bfloat16, and their sum


def test_bad_input():
    w = randn(4, 6)
    half = w.bfloat16()
    with pytest.raises(TypeError, match=r"r: expected torch\.bfloat16"):
        low_rank_linear(half, randn(2, 6), randn(4, 2))
    with pytest.raises(TypeError, match=r"weight: expected torch\.bfloat16"):
        diag_low_rank_linear(half, *ldu_init(w, 2))
    with pytest.raises(TypeError, match=r"w0: expected torch\.bfloat16"):
        nested_lora_linear(half, w, randn(3, 6), randn(2, 3), randn(3, 2), randn(4, 3))
    with pytest.raises(ValueError, match=r"weights: expected 1 numbers like adapters, got \(\)"):
        average_lora(adapters((2,)), torch.tensor(1.0))
    with pytest.raises(TypeError, match="weights: expected 1 numbers"):
        average_lora(adapters((2,)), ["x"])
    with pytest.raises(ValueError, match="a: expected at least one element"):
        low_rank_delta(randn(0, 4), randn(0, 4), energy=0.9)
    with pytest.raises(ValueError, match="adapters: expected at least one pair"):
        average_lora([])
    with pytest.raises(ValueError, match=r"adapters\[1\]\[1\]: expected shape \(9, 3\)"):
        average_lora([*adapters((2,)), (randn(3, 7, dtype=f64), randn(8, 3, dtype=f64))])
    with pytest.raises(ValueError, match="weights: expected 2 numbers"):
        average_lora(adapters((2, 2)), [1.0])
    with pytest.raises(ValueError, match=r"rank: expected an int in \[1, 4\]"):
        average_lora(adapters((2, 2)), rank=5)
    with pytest.raises(ValueError, match="rank, energy: expected exactly one"):
        low_rank_delta(w, w)
    with pytest.raises(ValueError, match="energy: expected a finite number"):
        low_rank_delta(w, w, energy=1.5)
    with pytest.raises(ValueError, match="iterations: expected None"):
        low_rank_delta(w, w, energy=0.5, iterations=1)
    with pytest.raises(ValueError, match="rank, ratio: expected exactly one"):
        svd_split(w)
    with pytest.raises(ValueError, match="b: expected shape"):
        weighted_lora_sum(randn(5, 2, 3, 4), randn(5, 2, 2, 4), torch.tensor([0]), randn(1))
    with pytest.raises(TypeError, match="index: expected a vector of integers"):
        weighted_lora_sum(randn(5, 2, 3, 4), randn(5, 2, 3, 4), randn(1), randn(1))
    with pytest.raises(ValueError, match="perm: expected 4 integers"):
        diag_low_rank_linear(w, w, randn(4, 2), torch.arange(3), randn(2), 1.0, randn(2, 6))
    with pytest.raises(ValueError, match="b_inner: expected shape"):
        nested_lora_linear(w, w, randn(3, 6), randn(2, 3), randn(2, 3), randn(4, 3))
    with pytest.raises(ValueError, match="w_new: expected shape"):
        decomposed_fusion(w, w[1:], 0.1)
    with pytest.raises(ValueError, match="base: expected shape"):
        proto_calibrate(w, randn(3, 5))
    with pytest.raises(ValueError, match="q: expected shape"):
        low_rank_linear(w, randn(2, 6), randn(4, 3))
