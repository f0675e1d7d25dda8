"""Losses, scores and votes of ensembles against the papers' formulas, in float64."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, assert_accurate, randn

from solera.ensemble import (
    crps_ensemble,
    diversity_loss,
    el2n,
    energy_hinge,
    ensemble_cross_entropy,
    ensemble_mean_prob,
    ensemble_moments,
    ensemble_statistics,
    ensloss,
    flops_reg,
    log_mean_softmax,
    multi_expert_loss,
    pairwise_sigmoid_mean,
    prompt_ensemble_logits,
    score_ensemble,
    token_confidence,
    weighted_vote,
)

close = torch.testing.assert_close

# Compositions: their cores are interpreted in the cores' own tests.
pytestmark = pytest.mark.no_interpreter


def logits(*shape, grad=True):
    z = randn(*shape, dtype=torch.float64, scale=2.0, grad=grad)
    return z, torch.randint(shape[-1], (shape[0],), device=DEVICE)


def mean_ce(z, y):
    """The mean over members and rows of the members' own losses; z (B, K, C)."""
    return torch.stack([F.cross_entropy(m, y) for m in z.unbind(1)]).mean()


# ---- losses ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [0.0, 1.0, -0.7])
def test_diversity_loss_and_the_papers_gradient(gamma):
    z, y = logits(6, 4, 9)
    loss, member, ensemble, gap = diversity_loss(z, y, gamma)
    mean = z.softmax(-1).mean(1)
    want = F.nll_loss(mean.log(), y)
    close(member, mean_ce(z, y))
    close(ensemble, want)
    close(gap, mean_ce(z, y) - want)
    close(loss, (1 - gamma) * mean_ce(z, y) + gamma * want)
    assert gap > 0
    (dz,) = torch.autograd.grad(loss, z)
    p = z.detach().softmax(-1)
    at = y[:, None, None].expand(6, 4, 1)
    q = p.gather(2, at).log().softmax(1)
    hot = F.one_hot(y, 9)[:, None]
    close(dz, ((1 - gamma) / 4 + gamma * q) * (p - hot) / 6)
    y[2] = -100
    kept = torch.arange(6, device=DEVICE) != 2
    close(diversity_loss(z, y, gamma), diversity_loss(z[kept], y[kept], gamma))


def test_other_measures_of_diversity():
    z, y = logits(5, 3, 7)
    p = z.softmax(-1)
    mean = p.mean(1, keepdim=True)
    spread = (p - mean).square().sum((1, 2)).mean() / 3
    js = (p * (p / mean).log()).sum((1, 2)).mean() / 3
    for measure, want in (("variance", spread), ("js", js)):
        got = diversity_loss(z, y, 0.3, measure=measure)
        close(got.diversity, want)
        close(got.loss, mean_ce(z, y) - 0.3 * want)
        assert torch.autograd.gradcheck(
            lambda z, m=measure: diversity_loss(z, y, 0.3, measure=m).loss, z
        )


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_mdcs_against_the_papers_formula(temperature):
    z, y = logits(8, 3, 6)
    y[:4] = z[:4].mean(1).argmax(-1)  # some right
    y[4:] = y[:4]
    prior = torch.rand(6, dtype=torch.float64, device=DEVICE).add(0.1).log()
    lambdas = (-0.5, 1.0, 2.5)

    def paper(z):
        diversity = consistency = 0.0
        for k, strength in enumerate(lambdas):
            v = z[:, k] + strength * prior
            diversity = diversity + F.cross_entropy(v, y)
            teacher = (v[:4].detach() / temperature).softmax(-1)
            student = (v[4:] / temperature).log_softmax(-1)
            right = v[:4].argmax(-1) == y[:4]
            kl = (teacher * (teacher.log() - student)).sum(-1)
            if right.any():
                consistency = consistency + kl[right].mean()
        return diversity, consistency

    got = multi_expert_loss(z, y, prior, kd_weight=0.4, temperature=temperature)
    diversity, consistency = paper(z)
    close(got.diversity, diversity)
    close(got.consistency, consistency)
    want = diversity + 0.4 * consistency
    close(got.loss, want)
    close(torch.autograd.grad(got.loss, z), torch.autograd.grad(want, z))
    wrong = (z[:, 0] + lambdas[0] * prior).argmin(-1)
    wrong[4:] = wrong[:4]
    first = multi_expert_loss(z[:, :1], wrong, prior, lambdas=lambdas[:1])
    assert first.consistency == 0  # no sample that the expert has right


def test_bayesian_prompts():
    """The predictive, its loss with the KL term, and the logits without expanding the images."""
    img, txt = (randn(*s, dtype=torch.float64, grad=True) for s in ((5, 8), (3, 4, 8)))
    y = torch.randint(4, (5,), device=DEVICE)
    got = prompt_ensemble_logits(img, txt, 1.7)
    want = 1.7 * torch.einsum("lbd,lcd->blc", img.expand(3, 5, 8), txt)
    close(got, want)
    log_p = want.log_softmax(-1).logsumexp(1) - math.log(3)
    close(log_mean_softmax(got), log_p)
    close(ensemble_mean_prob(got), log_p.exp())
    mu, sd = randn(8, dtype=torch.float64), torch.rand(8, dtype=torch.float64, device=DEVICE) + 0.5
    kl = 0.5 * (mu.square() + sd.square() - 1 - 2 * sd.log()).sum()
    ours = ensemble_cross_entropy(got, y, combine="probability") + 1e-3 * kl
    theirs = F.nll_loss(log_p, y) + 1e-3 * kl
    close(ours, theirs)
    close(torch.autograd.grad(ours, (img, txt)), torch.autograd.grad(theirs, (img, txt)))


def test_log_mean_softmax_stays_in_the_log_domain():
    z = torch.tensor([[[0.0, -900.0], [0.0, -1000.0]]], device=DEVICE)
    close(log_mean_softmax(z), torch.tensor([[0.0, -900.0 - math.log(2)]], device=DEVICE))
    w = torch.tensor([0.25, 0.75], device=DEVICE)
    z = randn(4, 2, 6)
    close(ensemble_mean_prob(z, w), (w[:, None] * z.softmax(-1)).sum(1))
    close(log_mean_softmax([z[:, 0], z[:, 1]], w).exp(), ensemble_mean_prob(z, w))
    close(ensemble_mean_prob(z, 4 * w), ensemble_mean_prob(z, w))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weighted_mean_probability_is_rounded_once(dtype):
    z, w = randn(8, 4, 500, dtype=dtype), torch.tensor([0.1, 0.2, 0.3, 0.4], device=DEVICE)
    want = (w.double()[:, None] * z.double().softmax(-1)).sum(1)
    assert_accurate(ensemble_mean_prob(z, w), want)
    assert_accurate(ensemble_mean_prob(list(z.unbind(1)), w), want)


def test_late_fusion_of_scores_and_scaled_residual():
    """Late fusion of subnetworks, mean probabilities of models, and relu(x + s f(x))."""
    scores = [randn(5, 7, dtype=torch.float64) for _ in range(4)]
    y = torch.randint(7, (5,), device=DEVICE)
    close(
        ensemble_cross_entropy(scores, y, combine="logit"),
        F.cross_entropy(torch.stack(scores).mean(0), y),
    )
    mean = torch.stack(scores).softmax(-1).mean(0)
    close(ensemble_mean_prob(scores), mean)
    close(ensemble_mean_prob(torch.stack(scores), member_dim=0), mean)
    x, fx = randn(3, 4), randn(3, 4)
    close(torch.relu(torch.add(x, fx, alpha=0.2)), (x + 0.2 * fx).clamp(min=0))


def test_el2n():
    z, y = logits(5, 3, 6)
    hot = F.one_hot(y, 6)
    want = torch.stack([(m.softmax(-1) - hot).square().sum(-1).sqrt() for m in z.unbind(1)])
    close(el2n(z, y), want.mean(0))
    close(el2n(z.transpose(0, 1), y, member_dim=0), want.mean(0))


def test_calibrator_over_transformed_copies():
    """Pooled views give a temperature; the loss raises the confidence of right answers alone."""
    views, y = logits(6, 4, 5)
    pooled = ensemble_mean_prob(views)
    w = randn(5, dtype=torch.float64, grad=True)
    tau = F.softplus(pooled.sort(-1, descending=True).values @ w)
    z = views[:, 0]
    top = (z / tau[:, None]).softmax(-1).amax(-1)
    right = (z.argmax(-1) == y).double()
    (dtop,) = torch.autograd.grad(F.binary_cross_entropy(top, right), top, retain_graph=True)
    assert ((dtop < 0) == right.bool()).all()
    assert torch.autograd.grad(top.sum(), w)[0].abs().sum() > 0


def test_ensloss_gives_the_papers_gradient():
    f = randn(7, dtype=torch.float64, grad=True)
    y = torch.tensor([1, -1, 1, 1, -1, -1, 1], dtype=torch.float64, device=DEVICE)
    draws = torch.rand(7, dtype=torch.float64, device=DEVICE) + 0.1
    (df,) = torch.autograd.grad(ensloss(f, y, draws=draws), f)
    slope = -df * y * 7
    close(slope.sort().values, draws.sort().values)
    order = (f * y).detach().argsort()
    assert (slope[order].diff() <= 0).all()  # convex: the slope -u rises with the margin
    for power in (0.0, 0.5):
        (df,) = torch.autograd.grad(ensloss(f, y, power=power), f)
        assert (df * y < 0).all()


def test_hedged_embeddings():
    z1, z2 = (randn(3, k, 4, dtype=torch.float64, grad=True) for k in (2, 5))
    want = torch.zeros(3, dtype=torch.float64, device=DEVICE)
    for k, m in itertools.product(range(2), range(5)):
        want = want + torch.sigmoid(-1.5 * (z1[:, k] - z2[:, m]).norm(dim=-1) + 0.3) / 10
    close(pairwise_sigmoid_mean(z1, z2, 1.5, 0.3), want)
    half = pairwise_sigmoid_mean(z1.bfloat16(), z2.bfloat16(), 1.5, 0.3)
    close(half, want.bfloat16(), rtol=3e-2, atol=1e-2)
    with pytest.raises(TypeError, match=r"prompts: expected torch\.float64"):
        prompt_ensemble_logits(randn(2, 3, dtype=torch.float64), randn(4, 5, 3))


def test_energy_hinge():
    inliers, outliers = (randn(n, 6, dtype=torch.float64, scale=9.0, grad=True) for n in (5, 3))

    def mean(gap):
        gap = gap.clamp(min=0)
        return torch.where(gap < 1, gap.square() / 2, gap - 0.5).mean()

    energy = lambda z: -z.exp().sum(1).log()
    want = 0.1 * (mean(energy(inliers) + 15) + mean(-3 - energy(outliers)))
    ours = energy_hinge(inliers, outliers)
    close(ours, want)
    close(
        torch.autograd.grad(ours, (inliers, outliers)),
        torch.autograd.grad(want, (inliers, outliers)),
    )


def test_flops_regulariser():
    w, idf = torch.rand(4, 9, dtype=torch.float64, device=DEVICE), torch.rand(9, device=DEVICE)
    idf = idf.double()
    close(flops_reg(w), w.mean(0).square().sum())
    close(flops_reg(w, 1 / idf), sum((w[:, v] / idf[v]).mean() ** 2 for v in range(9)))


# ---- scores ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fair", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_crps_is_the_double_sum(fair, weighted):
    x, y = randn(6, 2, 3, dtype=torch.float64, grad=True), randn(2, 3, dtype=torch.float64)
    w = torch.full((6,), 1 / 6, dtype=torch.float64, device=DEVICE)
    if weighted:
        w = randn(6, dtype=torch.float64).softmax(0)
    pairs = (w[:, None] * w)[..., None, None] * (x[:, None] - x).abs()
    spread = pairs.sum((0, 1)) / 2
    if fair:
        spread = spread / (1 - w.square().sum())
    want = (w[:, None, None] * (x - y).abs()).sum(0) - spread
    given_ = 3 * w if weighted else None
    got = crps_ensemble(x, y, fair=fair, weights=given_)
    close(got, want)
    assert torch.autograd.gradcheck(
        lambda x: crps_ensemble(x, y, fair=fair, weights=given_, member_dim=-1),
        x.detach().movedim(0, -1).requires_grad_(),
    )
    far = crps_ensemble(x.float() + 4096, y.float() + 4096, fair=fair)
    close(far.double(), crps_ensemble(x, y, fair=fair), rtol=5e-3, atol=5e-3)


def test_ensemble_moments_and_rank():
    x, y = randn(5, 2, 3, dtype=torch.float64), randn(2, 3, dtype=torch.float64)
    mean, variance, rank = ensemble_moments(x, y)
    close(mean, x.mean(0))
    close(variance, x.var(0))
    assert torch.equal(rank, torch.cat([x, y[None]]).argsort(0).argsort(0)[-1])
    assert ensemble_moments(x, correction=0).rank is None
    close(ensemble_moments(x, correction=0).variance, x.var(0, correction=0))


def test_score_ensemble_and_its_teacher():
    t = randn(3, 2, 5, dtype=torch.float64)
    w = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64, device=DEVICE)
    low, high = t.amin(-1, keepdim=True), t.amax(-1, keepdim=True)
    want = 4 * (w[:, None, None] * (t - low) / (high - low)).sum(0)
    close(score_ensemble(t, w, scale=4.0), want)
    z = (t - t.mean(-1, keepdim=True)) / t.std(-1, correction=0, keepdim=True)
    close(score_ensemble(t, norm="zscore"), z.mean(0))
    mask = torch.ones(2, 5, dtype=torch.bool, device=DEVICE)
    mask[1, 3:] = False
    t[:, 1, 3:] = float("nan")
    got = score_ensemble(t, w, mask=mask)
    close(got[1, :3], score_ensemble(t[:, 1:, :3], w)[0])
    assert got[1, 3:].isneginf().all()
    assert not score_ensemble(torch.ones(2, 1, 4, device=DEVICE)).any()
    u = torch.rand(3, 7, dtype=torch.float64, device=DEVICE)
    weights = torch.tensor([0.56, 0.14, 0.3], dtype=torch.float64, device=DEVICE)
    close(score_ensemble(u[:, None], weights.tolist(), norm="none")[0], weights @ u)


@pytest.mark.parametrize("norm", ["minmax", "zscore"])
def test_equal_scores_count_nothing_and_nan_shows(norm):
    t = randn(2, 3, 5, dtype=torch.float32)
    t[0, 1] = 0.1  # whose mean over five is not 0.1 in float32
    want = score_ensemble(t[:, 1:2], [0.0, 1.0], norm=norm)
    leaf = t.clone().requires_grad_()
    got = score_ensemble(leaf, [1.0, 1.0], norm=norm)
    close(got[1:2], want)
    (grad,) = torch.autograd.grad(got.square().sum(), leaf)
    assert grad.isfinite().all() and not grad[0, 1].any()
    t[1, 2, 3] = float("nan")
    assert torch.equal(
        score_ensemble(t, norm=norm).isnan().any(1).cpu(), torch.tensor([False, False, True])
    )


def test_weighted_vote_is_the_naive_bayes_posterior():
    scores = torch.rand(4, 3, 5, dtype=torch.float64, device=DEVICE)
    hit, false, prior = torch.rand(5).double(), torch.rand(5).double(), 0.3
    hit, false = hit.to(DEVICE), false.to(DEVICE)
    weights = torch.stack([((1 - hit) / (1 - false)).log(), (hit / false).log()], 1)
    got = weighted_vote(scores, weights, math.log(prior / (1 - prior)), threshold=0.4, norm="none")
    yes = scores >= 0.4
    right = prior * torch.where(yes, hit, 1 - hit).prod(-1)
    wrong = (1 - prior) * torch.where(yes, false, 1 - false).prod(-1)
    close(got.logit.sigmoid(), right / (right + wrong))
    assert torch.equal(got.best, (right / wrong).argmax(1))
    whole = (scores - scores.amin((0, 1))) / (scores.amax((0, 1)) - scores.amin((0, 1)))
    close(weighted_vote(7 * scores - 2, weights), weighted_vote(whole, weights, norm="none"))
    mask = torch.rand(4, 3, 5, device=DEVICE) < 0.5
    kept = torch.where(mask, torch.where(yes, weights[:, 1], weights[:, 0]), 0.0).sum(-1)
    close(weighted_vote(scores, weights, threshold=0.4, norm="none", mask=mask).logit, kept)


def test_token_confidence():
    z, _ = logits(2, 6, 8)
    tokens = torch.randint(8, (2, 6), device=DEVICE)
    log_p = -ensemble_cross_entropy([z], tokens, reduction="none")
    close(log_p, z.log_softmax(-1).gather(2, tokens[..., None])[..., 0])
    mask = torch.ones(2, 6, dtype=torch.bool, device=DEVICE)
    mask[1, 4:] = False
    got = token_confidence(log_p, mask)
    close(got.normalized[1], log_p[1, :4].mean().exp())
    close(got.least[1], log_p[1, :4].exp().min())
    close(got.perplexity, 1 / got.normalized)
    close(token_confidence(log_p).normalized[0], got.normalized[0])


def test_compiles():
    def f(z, y, x, t):
        loss = diversity_loss(z, y, 0.5).loss + log_mean_softmax(z).sum()
        return loss + crps_ensemble(x, t).sum() + ensemble_statistics(z)["aleatoric"].sum()

    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (4, 6):
        z, y = logits(n, 3, 5)
        x, t = randn(4, n), randn(n)
        want, got = f(z, y, x, t), compiled(z, y, x, t)
        close(got, want)
        close(torch.autograd.grad(got, z), torch.autograd.grad(want, z))


Z, Y, S = torch.zeros(4, 3, 5), torch.zeros(4, dtype=torch.int64), torch.zeros(3, 2, 5)
BAD = {
    "gamma": (lambda: diversity_loss(Z, Y, float("nan")), "gamma: expected a finite"),
    "measure": (lambda: diversity_loss(Z, Y, 1.0, measure="kl"), "measure: expected one of"),
    "views": (lambda: multi_expert_loss(Z[:3], Y[:3], S[0, 0]), "even number of rows"),
    "lambdas": (lambda: multi_expert_loss(Z, Y, S[0, 0], lambdas=(1,)), "lambdas: expected 3"),
    "prior": (lambda: multi_expert_loss(Z, Y, Z[0, :, 0]), "log_prior: expected shape"),
    "tau": (lambda: multi_expert_loss(Z, Y, S[0, 0], temperature=0), "temperature: expected"),
    "prompts": (lambda: prompt_ensemble_logits(Z[0], S[:, :, :4]), "prompts: expected shape"),
    "crps": (lambda: crps_ensemble(Z, Z), "y: expected shape"),
    "fair": (lambda: crps_ensemble(Z[:1], Z[0], fair=True), "at least two members"),
    "moments": (lambda: ensemble_moments(Z, correction=4), "correction: expected"),
    "norm": (lambda: score_ensemble(S, norm="max"), "norm: expected one of"),
    "judges": (lambda: score_ensemble(S, [0.5, 0.5]), r"weights: expected shape \(3,\)"),
    "mask": (lambda: score_ensemble(S, mask=S > 0), "mask: expected shape"),
    "vote": (lambda: weighted_vote(S, S[0]), r"weights: expected shape \(5, 2\)"),
    "draws": (lambda: ensloss(S[0, 0], S[0, 0], draws=S[0]), "draws: expected shape"),
    "outliers": (lambda: energy_hinge(S[0], Z[0][:, :4]), "outliers: expected shape"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()
