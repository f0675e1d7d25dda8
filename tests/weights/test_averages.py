"""Averages of models: soups, greedy soups, windows, running means, task arithmetic, beside the papers' formulas."""

import pytest
import torch
from helpers import DEVICE, randn
from torch import nn

from solera.weights import (
    greedy_soup,
    interpolate,
    running_mean_,
    soup,
    task_arithmetic,
    windowed_ema,
    wise_ft,
)

F64 = torch.float64


def net(seed=None):
    if seed is not None:
        torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).to(DEVICE).double()


def filled(seed):
    model = net(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(randn(*p.shape, dtype=F64))
    return model


# ---- soups --------------------------------------------------------------------------------------------


def test_uniform_and_weighted_soups():
    """theta = sum_k alpha_k theta_k, alpha_k = 1 / K unless given."""
    models = [[randn(4, 3, dtype=F64), randn(5, dtype=F64)] for _ in range(3)]
    for weights in (
        None,
        [0.5, 0.2, 0.3],
        torch.tensor([[0.1, 0.4], [0.2, 0.3], [0.7, 0.3]], dtype=F64),
    ):
        found = soup(models, weights)
        for item in range(2):
            if weights is None:
                c = [1 / 3] * 3
            else:
                c = weights if isinstance(weights, list) else weights[:, item].tolist()
            truth = sum(ck * m[item] for ck, m in zip(c, models))
            torch.testing.assert_close(found[item], truth)
    a, b = randn(6), randn(6)
    torch.testing.assert_close(soup([a, b]), (a + b) / 2)
    weights = randn(2, dtype=F64, grad=True)
    tensors = [randn(4, dtype=F64, grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(lambda w, *t: soup(t, w), (weights, *tensors))


def test_step_checkpoints_are_merged_by_their_coefficients():
    """Dynamic Y-KD: theta = sum_i c_i theta_i over the networks of the steps."""
    steps, c = (
        [filled(i) for i in range(4)],
        torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=F64, device=DEVICE),
    )
    found = soup(steps, c)
    for key, value in net().state_dict().items():
        if value.is_floating_point():
            truth = sum(ci * m.state_dict()[key] for ci, m in zip(c, steps))
            torch.testing.assert_close(found[key], truth)
    net().load_state_dict(found)


def test_soup_of_modules_is_a_state_dict():
    models = [filled(1), filled(2)]
    found = soup(models)
    assert list(found) == list(models[0].state_dict())
    assert not any(t.requires_grad for t in found.values())
    models[1][1].num_batches_tracked += 1
    with pytest.raises(ValueError, match=r"models\[1\]\['1.num_batches_tracked'\].*equal in all"):
        soup(models)


def by_hand(models, evaluate, better):
    """Recipe 1 of the paper: sorted, then added while the held-out score does not drop."""
    scores = [evaluate(m) for m in models]
    order = sorted(range(len(models)), key=lambda k: scores[k], reverse=better > 0)
    kept, best = [order[0]], scores[order[0]]
    for k in order[1:]:
        mean = torch.stack([models[i] for i in [*kept, k]]).mean(0)
        if better * evaluate(mean) >= better * best:
            kept, best = [*kept, k], evaluate(mean)
    return kept, torch.stack([models[i] for i in kept]).mean(0), scores


@pytest.mark.parametrize("higher", [True, False])
def test_greedy_soup_is_the_papers_recipe(higher):
    for seed in range(5):
        torch.manual_seed(seed)
        target = randn(6, dtype=F64)
        models = [target + 0.5 * randn(6, dtype=F64) for _ in range(6)]
        sign = 1 if higher else -1
        evaluate = lambda t: -sign * float((t - target).norm())
        kept, mean, scores = by_hand(models, evaluate, sign)
        merged, log = greedy_soup(models, evaluate, higher_is_better=higher)
        torch.testing.assert_close(merged, mean)
        assert log.kept == tuple(kept) and log.scores == tuple(scores)
        assert len(log.steps) == 6 and log.score == pytest.approx(evaluate(merged))
        assert [s.kept for s in log.steps].count(True) == len(kept)


def test_greedy_soup_of_modules_and_half_precision():
    models = [filled(i) for i in range(3)]
    x = randn(8, 3, dtype=F64)
    seen = []

    def evaluate(model):
        assert isinstance(model, nn.Module)
        seen.append(model)
        with torch.no_grad():
            return -float(model.eval()(x).square().mean())

    before = [m.state_dict()["0.weight"].clone() for m in models]
    merged, log = greedy_soup(models, evaluate, progress=True)
    assert len(seen) == 5 and len({id(m) for m in seen}) == 1
    assert all(torch.equal(m.state_dict()["0.weight"], b) for m, b in zip(models, before))
    expected = sum(models[k].state_dict()["0.weight"] for k in log.kept) / len(log.kept)
    torch.testing.assert_close(merged["0.weight"], expected)
    halves = [randn(1000, dtype=torch.bfloat16) for _ in range(8)]
    merged, log = greedy_soup(halves, lambda t: 1.0)
    assert len(log.kept) == 8 and merged.dtype == torch.bfloat16
    truth = torch.stack([t.double() for t in halves]).mean(0)  # one rounding, not eight
    assert (merged.double() - truth).abs().max() <= 2**-8 * truth.abs().max()
    nan = iter([float("nan"), 1.0, float("nan")])
    merged, log = greedy_soup(halves[:2], lambda t: next(nan))
    assert log.kept == (1,) and torch.equal(merged, halves[1])


def test_running_mean():
    models = [[randn(4, dtype=F64), randn(2, 3, dtype=F64)] for _ in range(5)]
    average = [torch.full_like(t, 7) for t in models[0]]
    for n, model in enumerate(models):
        running_mean_(average, model, n)
        for item, a in enumerate(average):
            torch.testing.assert_close(a, torch.stack([m[item] for m in models[: n + 1]]).mean(0))


def test_averaged_perceptron():
    """w = (1 / T) sum_t w_t, and the majority vote of several such machines."""
    from solera.ensemble import ensemble_statistics

    weights, average = (
        [randn(7, dtype=F64) for _ in range(20)],
        torch.zeros(7, dtype=F64, device=DEVICE),
    )
    for t, w in enumerate(weights):
        running_mean_(average, w, t)
    torch.testing.assert_close(average, sum(weights) / 20)
    said = torch.randint(0, 4, (9, 5), device=DEVICE)  # 9 frames, 5 instances
    logits = 10 * torch.nn.functional.one_hot(said, 4).double()
    vote = ensemble_statistics(logits)["vote"]
    counts = torch.nn.functional.one_hot(said, 4).sum(1)
    assert torch.equal(counts.gather(1, vote[:, None])[:, 0], counts.amax(1))


# ---- interpolation ------------------------------------------------------------------------------------


def test_wise_ft_is_the_papers_sweep():
    base, tuned = filled(1).state_dict(), filled(2).state_dict()
    alphas = torch.linspace(0, 1, 11, dtype=F64)
    found = wise_ft(base, tuned, alphas.to(DEVICE))
    for key in base:
        if base[key].is_floating_point():
            for a, theta in zip(alphas.tolist(), found[key]):
                torch.testing.assert_close(theta, (1 - a) * base[key] + a * tuned[key])


def test_path_between_models():
    """A model zoo's loss along (1 - t) theta_a + t theta_b: every model of the path from one call."""
    a, b = randn(10, dtype=F64), randn(10, dtype=F64)
    t = torch.linspace(0, 1, 7, dtype=F64, device=DEVICE)
    path = interpolate(a, b, t)
    torch.testing.assert_close(path, torch.stack([(1 - x) * a + x * b for x in t]))


def test_quality_and_diversity_models_are_interpolated():
    q, d, lam = randn(10, dtype=F64), randn(10, dtype=F64), 0.3
    torch.testing.assert_close(interpolate(q, d, lam), (1 - lam) * q + lam * d)


# ---- windows ------------------------------------------------------------------------------------------


def test_windowed_ema():
    ring = randn(6, 4, 3, dtype=F64)
    for newest, window, decay in ((-1, 3, 0.9), (1, 4, 0.5), (2, 1, 0.7), (0, 6, 1.0), (3, 2, 0.0)):
        order = [(newest - j) % 6 for j in range(window)]
        share = torch.tensor([decay**j for j in range(window)], dtype=F64)
        share /= share.sum()
        truth = sum(s * ring[p] for s, p in zip(share.tolist(), order))
        torch.testing.assert_close(windowed_ema(ring, decay, window, newest=newest), truth)
        ema = ring[order[-1]].clone()
        for p in reversed(order[:-1]):
            ema = decay * ema + (1 - decay) * ring[p]
        found = windowed_ema(list(ring), decay, window, newest=newest, rule="recursive")
        torch.testing.assert_close(found, ema)
    models = [filled(i) for i in range(3)]
    found = windowed_ema(models, 0.5, 2)
    states = [m.state_dict()["0.weight"] for m in models]
    torch.testing.assert_close(found["0.weight"], (states[2] + 0.5 * states[1]) / 1.5)


# ---- task vectors -------------------------------------------------------------------------------------


def test_re_adapt_is_the_papers_sum():
    """theta = theta_base + alpha Delta_domain + beta Delta_instruct, the domain's delta full or low-rank."""
    base, instruct, domain = (randn(6, 5, dtype=F64, grad=True) for _ in range(3))
    a, b = randn(2, 5, dtype=F64, grad=True), randn(6, 2, dtype=F64, grad=True)
    weights = torch.tensor([0.6, 0.5], dtype=F64, device=DEVICE, requires_grad=True)
    full = task_arithmetic(base, [instruct, domain], weights)
    truth = base + weights[0] * (instruct - base) + weights[1] * (domain - base)
    torch.testing.assert_close(full, truth)
    low = task_arithmetic(base, [instruct], weights, adapters=[(a, b)])
    truth = base + weights[0] * (instruct - base) + weights[1] * b @ a
    torch.testing.assert_close(low, truth)

    def f(weights, base, instruct, a, b):
        return task_arithmetic(base, [instruct], weights, adapters=[(a, b)])

    assert torch.autograd.gradcheck(f, (weights, base, instruct, a, b))
    only = task_arithmetic(base, [], [0.5], adapters=[(a, b)])
    torch.testing.assert_close(only, base + 0.5 * b @ a)


def test_adapters_alone_leave_the_base_as_it_is():
    base = [randn(3, 3), randn(2)]
    kept = base[1].clone()
    out = task_arithmetic(base, [], [1.0], adapters=[{0: (randn(1, 3), randn(3, 1))}])
    assert torch.equal(out[1], kept)
    out[1].zero_()
    assert torch.equal(base[1], kept)


def test_re_adapt_ir_merges_state_dicts():
    """W = W0 + b D_domain + a (W_tuned - W0), with gradients <g, tau_k> to the coefficients."""
    base, tuned = filled(1).state_dict(), filled(2).state_dict()
    pair = (randn(2, 3, dtype=F64), randn(4, 2, dtype=F64))
    weights = torch.tensor([0.7, 0.4], dtype=F64, device=DEVICE, requires_grad=True)
    found = task_arithmetic(base, [tuned], weights, adapters=[{"0.weight": pair}])
    truth = (
        base["0.weight"] + 0.7 * (tuned["0.weight"] - base["0.weight"]) + 0.4 * pair[1] @ pair[0]
    )
    torch.testing.assert_close(found["0.weight"].detach(), truth)
    (gradient,) = torch.autograd.grad(found["0.weight"].sum(), weights)
    torch.testing.assert_close(gradient[0], (tuned["0.weight"] - base["0.weight"]).sum())
    torch.testing.assert_close(gradient[1], (pair[1] @ pair[0]).sum())
    assert torch.equal(found["1.num_batches_tracked"], base["1.num_batches_tracked"])
    models = [[randn(2, 3), randn(4)] for _ in range(2)]
    start = [randn(2, 3), randn(4)]
    found = task_arithmetic(start, models, [0.3, 0.3], adapters=[])
    for item, t in enumerate(found):
        truth = start[item] + sum(0.3 * (m[item] - start[item]) for m in models)
        torch.testing.assert_close(t, truth)


def test_compile():
    def f(weights, base, *tensors):
        mean = soup([tensors[:2], tensors[2:]], weights)
        return mean[0] + mean[1] + task_arithmetic(base, tensors[::2], weights)

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (4, 7):
        args = [randn(2, grad=True), *(randn(n, 3, grad=True) for _ in range(5))]
        found, plain = compiled(*args), f(*args)
        torch.testing.assert_close(found, plain)
        g = randn(n, 3)
        ours, theirs = (torch.autograd.grad(y, args, g) for y in (found, plain))
        torch.testing.assert_close(ours, theirs)


# ---- bad input ----------------------------------------------------------------------------------------

A, B = torch.ones(3), torch.ones(3)
W = torch.ones(2, 3)
ONE = lambda t: 1.0
BAD = [
    (lambda: soup([]), ValueError, "models: expected at least one model"),
    (lambda: soup(A), TypeError, "models: expected a list of K"),
    (lambda: soup([A, torch.ones(4)]), ValueError, r"models\[1\]: expected shape \(3,\)"),
    (lambda: soup([A, [B]]), TypeError, r"models\[1\]: expected a tensor"),
    (lambda: soup([A, B], [1.0]), ValueError, r"weights: expected shape \(2,\)"),
    (lambda: soup([A, B], "ab"), TypeError, "weights: expected a tensor or a list"),
    (lambda: greedy_soup([A], None), TypeError, "evaluate: expected a callable"),
    (lambda: greedy_soup([A], lambda t: "x"), TypeError, "evaluate: expected it to return a number"),
    (lambda: greedy_soup([A, torch.ones(4)], ONE), ValueError, r"models\[1\]: expected shape"),
    (lambda: running_mean_(A, B, -1), ValueError, "n: expected an int"),
    (lambda: running_mean_(A, B, 1.5), ValueError, "n: expected an int"),
    (lambda: windowed_ema(A, 0.5, 4), ValueError, r"window: expected an int in \[1, 3\]"),
    (lambda: windowed_ema(A, 0.5, 0), ValueError, "window"),
    (lambda: windowed_ema(A, 1.5, 1), ValueError, "decay"),
    (lambda: windowed_ema(A, 0.5, 1, newest=3), ValueError, "newest"),
    (lambda: windowed_ema(A, 0.5, 1, rule="x"), ValueError, "rule"),
    (lambda: windowed_ema([A, torch.ones(4)], 0.5, 2), ValueError, r"ring\[0\]: expected shape"),
    (lambda: task_arithmetic(A, None, [1.0]), TypeError, "tuned: expected a list, got NoneType"),
    (lambda: task_arithmetic(A, [], []), ValueError, "tuned: expected at least one"),
    (lambda: task_arithmetic(A, [torch.ones(4)], [1.0]), ValueError, r"base: expected shape \(4,\)"),
    (lambda: task_arithmetic(A, [B], [1.0, 2.0]), ValueError, "weights: expected shape"),
    (lambda: task_arithmetic(W, [W], [1.0], adapters=[(W, W)]), ValueError, "weights: expected shape"),
    (lambda: task_arithmetic(W, [W], [1.0, 1], adapters=[(W, W)]), ValueError, r"adapters\[0\]: expected A"),
    (lambda: task_arithmetic(W, [W], [1.0, 1], adapters=[W]), TypeError, r"adapters\[0\]: expected a pair"),
    (
        lambda: task_arithmetic({"w": W}, [], [1.0], adapters=[{"v": (W, W)}]),
        ValueError, r"adapters\[0\]\['v'\]: base has no",
    ),
    (lambda: task_arithmetic({"w": W}, [], [1.0], adapters=[W]), TypeError, r"adapters\[0\]: expected a map"),
]  # fmt: skip


@pytest.mark.skipif(DEVICE != "cpu", reason="the table's tensors are on the CPU")
@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input(case):
    call, kind, message = BAD[case]
    with pytest.raises(kind, match=message):
        call()
