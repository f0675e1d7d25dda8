"""Mixtures and selections over the cores, against the papers' formulas in float64."""

import pytest
import torch
from function_checks import agrees_with_formula, differentiates
from helpers import DEVICE, DTYPES, randn

from solera.weights import (
    coteaching_select,
    mix_logprobs,
    nonneg_project_,
    prefix_mask,
    softplus_weight,
    weighted_sum,
)


def smoothing(g, h, a, s_g=2.0, s_h=1.0):
    """log((1-a) softmax(s_g g) + a softmax(s_h h)), written out."""
    return ((1 - a) * (s_g * g).softmax(-1) + a * (s_h * h).softmax(-1)).log()


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_adaptive_smoothing_is_the_papers_formula(dtype):
    g, h = randn(6, 10, dtype=dtype, grad=True), randn(6, 10, dtype=dtype, grad=True)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    a = torch.rand(6, 1, dtype=wide, device=DEVICE).requires_grad_()
    formula = lambda g, h, a: smoothing(g, h, a).to(g.dtype)
    agrees_with_formula(lambda g, h, a: mix_logprobs(g, h, a, 2.0, 1.0), formula, (g, h, a))


def test_adaptive_smoothing_gradient_and_extremes():
    g, h = (randn(3, 5, dtype=torch.float64, grad=True) for _ in range(2))
    a = torch.rand(3, 1, dtype=torch.float64, device=DEVICE).requires_grad_()
    differentiates(lambda g, h, a: mix_logprobs(g, h, a, 2.0, 0.5), (g, h, a))
    # The paper's backward, as derived.
    out, grad = mix_logprobs(g, h, a, 2.0, 0.5), randn(3, 5, dtype=torch.float64)
    got = torch.autograd.grad(out, [g, h, a], grad)
    p, q, u = (2.0 * g).softmax(-1), (0.5 * h).softmax(-1), grad / out.exp()
    dot = lambda x, y: (x * y).sum(-1, keepdim=True)
    want = (2.0 * (1 - a) * p * (u - dot(u, p)), 0.5 * a * q * (u - dot(u, q)), dot(u, q - p))
    torch.testing.assert_close(got, want)
    for alpha, only in ((0.0, 2.0 * g), (1.0, 0.5 * h)):
        torch.testing.assert_close(mix_logprobs(g, h, alpha, 2.0, 0.5), only.log_softmax(-1))
    far = torch.tensor([[0.0, -500.0]], device=DEVICE)
    assert mix_logprobs(far, far, 0.5).isfinite().all()
    with pytest.raises(ValueError, match="alpha: expected a shape"):
        mix_logprobs(g, h, a[:2])
    with pytest.raises(ValueError, match="h: expected shape"):
        mix_logprobs(g, h[:2], 0.5)


@pytest.mark.parametrize("max_w", [False, True])
def test_sharpdarts_mixed_operation(max_w):
    outs, w = randn(4, 3, 5, grad=True), randn(4).softmax(0).requires_grad_()

    def formula(outs, w):
        c = 1 - w.max() + w if max_w else w
        return torch.einsum("o,o...->...", c, outs)

    agrees_with_formula(lambda o, w: weighted_sum(o, w, max_w=max_w), formula, (outs, w), 1e-6)
    torch.testing.assert_close(
        weighted_sum(list(outs), w, max_w=max_w), weighted_sum(outs, w, max_w=max_w)
    )
    with pytest.raises(ValueError, match="outs: expected 4"):
        weighted_sum(outs[:2], w)


def test_compressed_features_prefix_and_selection():
    x, k = randn(4, 6, dtype=torch.float64, grad=True), torch.tensor([0, 1, 6, 9], device=DEVICE)
    j = torch.arange(1, 7, device=DEVICE)
    formula = lambda x, k: x * (j <= k[:, None])
    agrees_with_formula(prefix_mask, formula, (x, k))
    one, two = randn(10), randn(10)
    for_first, for_second = coteaching_select(one, two, 0.7)
    assert set(for_first.tolist()) == set(two.topk(7, largest=False).indices.tolist())
    assert set(for_second.tolist()) == set(one.topk(7, largest=False).indices.tolist())
    with pytest.raises(TypeError, match="k: expected"):
        prefix_mask(x, k.double())
    with pytest.raises(ValueError, match="k: expected shape"):
        prefix_mask(x, k[:2])
    with pytest.raises(ValueError, match="loss_second: expected shape"):
        coteaching_select(one, two[:3], 0.5)


def test_learned_proximal_networks_weights():
    w = [randn(3, 4), randn(5).requires_grad_()]
    want = [t.detach().clamp(min=0) for t in w]
    nonneg_project_(w)
    assert all(torch.equal(t.detach(), e) for t, e in zip(w, want))
    v = randn(3, 4, dtype=torch.float64, grad=True)
    agrees_with_formula(
        lambda v: softplus_weight(v, 2.0), lambda v: (1 + (2 * v).exp()).log() / 2, (v,)
    )
    with pytest.raises(ValueError, match="beta"):
        softplus_weight(v, 0.0)
    with pytest.raises(TypeError, match=r"parameters\[0\]"):
        nonneg_project_([torch.ones(2, dtype=torch.int64)])
