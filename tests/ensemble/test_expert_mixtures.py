"""Mixtures of experts over sequences and combined decoding, against the papers' formulas in float64."""

import math

import function_checks
import pytest
import torch
from helpers import DEVICE, randn

from solera.ensemble import (
    bayes_mixture_nll,
    combine_logits,
    domain_prior_scan,
    knn_mix_log_probs,
    mix_log_probs,
    mixture_next,
    mixture_nll,
    posterior_update,
)

F64 = torch.float64


def sequences(experts=3, batch=2, length=5, width=11, dtype=F64):
    logits = randn(experts, batch, length, width, dtype=dtype, grad=True, scale=2.0)
    target = torch.randint(width, (batch, length), device=DEVICE)
    log_prior = randn(experts, dtype=dtype, grad=True)
    return logits, target, log_prior


def token_by_token(logits, target, log_prior):
    """The papers' form: a posterior before each token, -log of the mixture's probability, summed."""
    experts, batch, length, _ = logits.shape
    p = logits.softmax(-1)
    posterior = log_prior.softmax(0)[:, None].expand(experts, batch)
    nll = 0.0
    for t in range(length):
        y = target[:, t]
        kept = y >= 0
        here = p[:, :, t].gather(-1, y.clamp(min=0)[None, :, None].expand(experts, batch, 1))[
            ..., 0
        ]
        here = torch.where(kept, here, 1.0)
        mixed = (posterior * here).sum(0)
        nll = nll - mixed.log()
        posterior = posterior * here / mixed
    return nll, posterior.log()


def test_branch_train_merge():
    logits, target, log_prior = sequences()
    with torch.no_grad():
        target[1, 3:] = -100  # ragged
    found = mixture_nll(logits, target, log_prior)
    nll, posterior = token_by_token(logits, target, log_prior)
    torch.testing.assert_close(found.nll, nll)
    torch.testing.assert_close(found.log_posterior, posterior)
    g = randn(2, dtype=F64)
    ours = torch.autograd.grad(found.nll, (logits, log_prior), g, retain_graph=True)
    theirs = torch.autograd.grad(nll, (logits, log_prior), g)
    torch.testing.assert_close(ours, theirs)
    # The closed form: the last posterior times (softmax - onehot).
    hot = torch.nn.functional.one_hot(target.clamp(min=0), 11).double()
    closed = found.log_posterior.exp()[:, :, None, None] * (logits.softmax(-1) - hot)
    closed = closed * ((target >= 0) * g[:, None])[None, :, :, None]
    torch.testing.assert_close(ours[0], closed)
    each = mixture_nll(logits, target, log_prior[:, None].expand(3, 2))
    torch.testing.assert_close(each, found)


def test_branch_train_merge_decoding():
    """The next token's distribution, its sparse form, and the posterior as tokens arrive."""
    logits, target, log_prior = sequences()
    logits, log_posterior = logits.detach(), log_prior.detach().log_softmax(0)[:, None].expand(3, 2)
    total = 0.0
    for t in range(5):
        now, y = logits[:, :, t], target[:, t]
        log_p = mixture_next(now, log_posterior)
        mixed = (now.softmax(-1) * log_posterior.exp()[..., None]).sum(0)
        torch.testing.assert_close(log_p, mixed.log())
        total = total - log_p.gather(1, y[:, None])[:, 0]
        each = now.log_softmax(-1).gather(-1, y[None, :, None].expand(3, 2, 1))[..., 0]
        log_posterior = posterior_update(log_posterior, each)
    found = mixture_nll(logits, target, log_prior.detach())
    torch.testing.assert_close(total, found.nll)
    torch.testing.assert_close(log_posterior, found.log_posterior)
    one = mixture_next(logits[:, :, 0], log_posterior, top_k=1)
    best = log_posterior.argmax(0)
    torch.testing.assert_close(one, logits[best, [0, 1], 0].log_softmax(-1))
    two = mixture_next(logits[:, :, 0], log_posterior, top_k=2)
    w = log_posterior.exp() * (log_posterior > log_posterior.amin(0))
    torch.testing.assert_close(
        two, ((w / w.sum(0))[..., None] * logits[:, :, 0].softmax(-1)).sum(0).log()
    )


def test_hdee():
    """Experts as a list; the public code's prior; an excluded expert counts for nothing."""
    logits, target, log_prior = sequences()
    parts = [z.detach().requires_grad_() for z in logits]
    listed = mixture_nll(parts, target, log_prior)
    stacked = mixture_nll(logits, target, log_prior)
    assert torch.equal(listed.nll, stacked.nll)
    a = torch.autograd.grad(listed.nll.sum(), parts)
    (b,) = torch.autograd.grad(stacked.nll.sum(), logits)
    assert torch.equal(torch.stack(a), b)
    scores = randn(3, 7, dtype=F64)
    prior = torch.ones(3, dtype=F64, device=DEVICE)
    for n in range(7):
        likelihood = scores[:, n].exp() * prior
        prior = 0.3 ** (n + 1) * prior + likelihood / likelihood.sum()
    found = domain_prior_scan(scores, 0.3, convention="hdee")
    torch.testing.assert_close(found.exp(), prior / prior.sum())
    posterior = scores.exp() / scores.exp().sum(0)
    prior = sum(0.3 ** (i + 1) * posterior[:, i] for i in range(7))
    torch.testing.assert_close(domain_prior_scan(scores).exp(), prior / prior.sum())
    without = torch.tensor([0.0, float("-inf"), 0.5], dtype=F64, device=DEVICE)
    some = mixture_nll(logits.detach(), target, without)
    torch.testing.assert_close(
        some.nll, mixture_nll(logits.detach()[[0, 2]], target, without[[0, 2]]).nll
    )


def test_universality_lens():
    """The sequential mixture, weight by weight."""
    logits = randn(3, 6, 5, dtype=F64, grad=True)
    target = torch.tensor([0, 4, -100, 2, 2, 1], device=DEVICE)
    log_w = randn(3, dtype=F64, grad=True)
    nll, last = bayes_mixture_nll(logits, target, log_w)
    w, want = log_w.softmax(0), []
    for t in range(6):
        p = logits[:, t].softmax(-1)[:, target[t]] if target[t] >= 0 else torch.ones_like(w)
        q = (w * p).sum()
        want.append(-q.log())
        w = w * p / q
    torch.testing.assert_close(nll, torch.stack(want))
    torch.testing.assert_close(last, w.log())
    g = randn(6, dtype=F64)
    torch.testing.assert_close(
        torch.autograd.grad(nll, (logits, log_w), g),
        torch.autograd.grad(torch.stack(want), (logits, log_w), g),
    )


def test_long_sequences_do_not_underflow():
    logits, target, log_prior = sequences(length=400, width=30, dtype=torch.float32)
    found = mixture_nll(logits, target, log_prior)
    want = mixture_nll(logits.detach().double(), target, log_prior.detach().double())
    torch.testing.assert_close(found.nll.double(), want.nll, rtol=1e-6, atol=0)
    assert found.nll.min() > 1000
    torch.testing.assert_close(
        found.log_posterior.exp().double(), want.log_posterior.exp(), rtol=1e-3, atol=1e-3
    )


def test_gradients_compile_and_layout():
    logits, target, log_prior = sequences(2, 2, 3, 4)
    f = lambda z, p: mixture_nll(z, target, p).nll
    function_checks.differentiates(f, (logits, log_prior))
    function_checks.differentiates(lambda z, p: mixture_next(z[:, :, 0], p), (logits, log_prior))
    function_checks.works_under_torch_func(f, (logits, log_prior))
    (d,) = torch.autograd.grad(f(logits, log_prior).sum(), logits)
    assert d.stride() == logits.stride() and d.is_contiguous()

    def compiled(z, p):
        nll, posterior = mixture_nll(z, target, p)
        return nll + mixture_next(z[:, :, 0], posterior).sum(-1)

    function_checks.compiles(
        compiled, lambda n: (randn(n, 2, 3, 4, grad=True), randn(n, grad=True))
    )


def test_nothing_of_the_logits_size_is_kept_but_they():
    logits, target, log_prior = sequences(2, 3, 4, 512, torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        mixture_nll(logits, target, log_prior)
    large = {t.untyped_storage().data_ptr() for t in saved if t.numel() > 1000}
    assert large == {logits.data_ptr()}


def test_agla():
    """softmax(z + alpha z_aug) over the tokens that the original view finds plausible."""
    views = randn(2, 3, 40, dtype=F64, scale=2.0)
    found = combine_logits(views, [1.0, 0.7], plausibility=0.1, member_dim=0)
    p = views[0].softmax(-1)
    z = (views[0] + 0.7 * views[1]).masked_fill(p < 0.1 * p.amax(-1, keepdim=True), float("-inf"))
    torch.testing.assert_close(found.exp(), z.softmax(-1))
    assert (found == float("-inf")).any()


def test_canonical_examples():
    """log p ~ log p_J + beta (log p_edited - log p_original), with gradients to the three and to beta."""
    big, new, old = (randn(3, 20, dtype=F64, grad=True) for _ in range(3))
    beta = torch.tensor(0.6, dtype=F64, device=DEVICE, requires_grad=True)
    w = torch.stack([torch.ones_like(beta), beta, -beta])
    found = combine_logits([big, new, old], w, space="log_probability")
    want = (big.log_softmax(-1) + beta * (new.log_softmax(-1) - old.log_softmax(-1))).log_softmax(
        -1
    )
    torch.testing.assert_close(found, want)
    g = randn(3, 20, dtype=F64)
    every = (big, new, old, beta)
    torch.testing.assert_close(
        torch.autograd.grad(found, every, g), torch.autograd.grad(want, every, g)
    )


def test_guidance_and_adaptive_smoothing():
    cond, uncond = (randn(3, 20, dtype=F64) for _ in range(2))
    guided = combine_logits([cond, uncond], [2.5, -1.5], normalize=False)
    torch.testing.assert_close(guided, uncond + 2.5 * (cond - uncond))
    a = torch.rand(3, dtype=F64).to(DEVICE)
    mixed = mix_log_probs([cond, uncond], torch.stack([1 - a, a], -1))
    want = (1 - a)[:, None] * cond.softmax(-1) + a[:, None] * uncond.softmax(-1)
    torch.testing.assert_close(mixed, want.log())


def test_simple_and_scalable_knn_mt():
    logits = randn(3, 9, dtype=F64, grad=True)
    ids = torch.tensor([[1, 4, 1], [2, 2, 2], [0, 8, 3]], device=DEVICE)
    d = torch.tensor([[1.0, 2.0, 3.0], [0.5, 4.0, 1.0], [30.0, 40.0, 50.0]], dtype=F64).to(DEVICE)
    d.requires_grad_()
    found = knn_mix_log_probs(logits, ids, d, tau=10.0, temperature=4.0)
    lam = (1 - d.amin(1, keepdim=True) / 10.0).clamp(min=0)
    knn = torch.zeros(3, 9, dtype=F64, device=DEVICE).scatter_add(1, ids, (-d / 4.0).softmax(1))
    want = (lam * knn + (1 - lam) * logits.softmax(1)).log()
    torch.testing.assert_close(found, want)
    torch.testing.assert_close(found[2], logits[2].log_softmax(0))  # neighbours too far away
    g = randn(3, 9, dtype=F64)
    torch.testing.assert_close(
        torch.autograd.grad(found, (logits, d), g), torch.autograd.grad(want, (logits, d), g)
    )
    near = d.detach()[:2], logits.detach()[:2], ids[:2]  # row 2 lies on a corner of lambda
    mix = lambda d: knn_mix_log_probs(near[1], near[2], d, tau=10.0, temperature=4.0)
    direction, h = randn(2, 3, dtype=F64), 1e-6
    _, tangent = torch.func.jvp(mix, near[:1], (direction,))
    numeric = (mix(near[0] + h * direction) - mix(near[0] - h * direction)) / (2 * h)
    torch.testing.assert_close(tangent, numeric, rtol=1e-6, atol=1e-8)


def test_bad_input():
    logits, target, log_prior = sequences(dtype=torch.float32)
    scores, d = torch.ones(3, 4), torch.ones(2, 3)
    ids = torch.zeros(2, 3, dtype=torch.int64)
    table = [
        (lambda: mixture_nll(logits[0], target, log_prior), ValueError, r"logits: expected \(J, B, T, V\)"),
        (lambda: mixture_nll(logits, target[:1], log_prior), ValueError, "target: expected shape"),
        (lambda: mixture_nll(logits, target.float(), log_prior), TypeError, "target: expected int64"),
        (lambda: mixture_nll(logits, target + 11, log_prior), IndexError, "target: expected labels in"),
        (lambda: mixture_nll(logits, target, log_prior[:2]), ValueError, "log_prior: expected shape"),
        (lambda: mixture_nll(logits, target, 0.0), TypeError, "log_prior: expected a torch.Tensor"),
        (lambda: mixture_next(logits, log_prior), ValueError, r"logits: expected \(J, B, V\)"),
        (lambda: mixture_next(logits[:, :, 0], log_prior, top_k=4), ValueError, "top_k: expected None or 1 to 3"),
        (lambda: posterior_update(log_prior, log_prior[:2]), ValueError, "token_log_prob: expected shape"),
        (lambda: domain_prior_scan(scores, 0.0), ValueError, "decay: expected a number"),
        (lambda: domain_prior_scan(scores, convention="x"), ValueError, "convention: expected one of"),
        (lambda: bayes_mixture_nll(logits, target, log_prior), ValueError, r"logits: expected \(K, T, C\)"),
        (lambda: knn_mix_log_probs(scores, ids, d, tau=1.0), ValueError, r"distances: expected \(3, k\)"),
        (lambda: knn_mix_log_probs(scores[:2], ids.float(), d, tau=1.0), ValueError, "ids: expected int64"),
        (lambda: knn_mix_log_probs(scores[:2], ids, d, tau=0.0), ValueError, "tau: expected a positive"),
    ]  # fmt: skip
    for call, error, message in table:
        with pytest.raises(error, match=message):
            call()
    empty = mixture_nll(
        torch.ones(2, 0, 3, 4), torch.zeros(0, 3, dtype=torch.int64), torch.zeros(2)
    )
    assert empty.nll.shape == (0,) and empty.log_posterior.shape == (2, 0)
    nothing = mixture_nll(logits, torch.full_like(target, -100), log_prior)
    assert math.isclose(float(nothing.nll.detach().abs().max()), 0.0, abs_tol=1e-6)
