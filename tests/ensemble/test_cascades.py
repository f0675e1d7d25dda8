"""Cascades over core routing: what runs, what comes back, what it costs, and windows from validation scores."""

import copy
import pickle

import pytest
import torch
from helpers import DEVICE, randn

from solera.ensemble import Cascade, fit_windows, uncertainty_scores

pytestmark = pytest.mark.no_interpreter
F64, INF, NAN = torch.float64, float("inf"), float("nan")


def members(count=3, classes=4, seed=1):
    torch.manual_seed(seed)
    models = [torch.nn.Linear(6, classes).to(DEVICE, F64) for _ in range(count)]
    for model in models:
        torch.nn.init.normal_(model.weight)
    return models


def by_rows(models, windows, x, kind, combine="logit", how="mean"):
    """Row by row, as the paper's cascade reads."""
    out, seen = [], [0] * len(models)
    for row in x:
        held = []
        for m, model in enumerate(models):
            seen[m] += 1
            held.append(model(row))
            stack = torch.stack(held)
            if how == "replace":
                now = held[-1] if combine == "logit" else held[-1].log_softmax(0)
            elif combine == "logit":
                now = stack.mean(0)
            else:
                now = stack.softmax(-1).mean(0).log()
            score = getattr(uncertainty_scores(now), kind)
            if m < len(windows) and (score > windows[m][1] or score < windows[m][0]):
                break
        out.append(now)
    return torch.stack(out), seen


@pytest.mark.parametrize("combine", ["logit", "probability"])
@pytest.mark.parametrize("how", ["mean", "replace"])
def test_cascade_is_the_papers(how, combine):
    models, x = members(), randn(40, 6, dtype=F64)
    for kind, windows in (
        ("msp", [(-INF, 0.7), (-INF, 0.6)]),
        ("entropy", [(0.6, 1.2), (0.7, 1.1)]),
        ("margin", [(0.1, 0.5), (0.2, INF)]),
    ):
        cascade = Cascade(models, windows, kind, combine=combine, how=how, costs=[1, 2, 3])
        want, seen = by_rows(models, windows, x, kind, combine, how)
        torch.testing.assert_close(cascade(x), want)
        assert list(cascade.report.rows) == seen and 0 < seen[2] < seen[1] < 40
        work = sum(n * c for n, c in zip(seen, (1, 2, 3))) / (40 * 6)
        assert cascade.report.work == pytest.approx(work) and cascade.report.saved == 1 - work
        assert torch.equal(cascade(x[:0]), x[:0, :4]) and cascade.report.work == 0


def test_windows_open_on_both_sides_give_the_ensemble():
    models, x = members(4), randn(9, 6, dtype=F64)
    cascade = Cascade(models, [(-INF, INF)] * 3)
    torch.testing.assert_close(cascade(x), torch.stack([m(x) for m in models]).mean(0))
    assert cascade.report.work == 1
    first = Cascade(models, [(INF, -INF)] * 3)
    assert torch.equal(first(x), models[0](x)) and first.report.rows == (9, 0, 0, 0)


def test_a_broken_row_does_not_leak():
    models, x = members(2), randn(5, 6, dtype=F64)
    x[3] = NAN
    out = Cascade(models, [(-INF, 0.5)])(x)
    assert out[3].isnan().all() and out[[0, 1, 2, 4]].isfinite().all()
    spoiled = [models[0], lambda x: torch.full((len(x), 4), INF, dtype=F64, device=DEVICE)]
    cascade = Cascade(spoiled, [(-INF, 0.5)])
    out = cascade(x[:3])
    assert out.isfinite().all(1).sum() == 3 - cascade.report.rows[1]


@pytest.mark.parametrize("combine", ["logit", "probability"])
@pytest.mark.parametrize("how", ["mean", "replace"])
def test_cascade_trains_what_ran_and_copies(how, combine):
    models, x = members(3), randn(20, 6, dtype=F64)
    windows = [(-INF, 0.7), (-INF, 0.6)]
    cascade = Cascade(models, windows, combine=combine, how=how)
    want, _ = by_rows(models, windows, x, "msp", combine, how)
    weights = [m.weight for m in models]
    ours = torch.autograd.grad(cascade(x).square().sum(), weights)
    torch.testing.assert_close(ours, torch.autograd.grad(want.square().sum(), weights))
    assert next(iter(cascade.state_dict())) == "models.0.weight"
    for other in (copy.deepcopy(cascade), pickle.loads(pickle.dumps(cascade))):
        assert torch.equal(other(x), cascade(x))


@pytest.mark.parametrize("combine", ["logit", "probability"])
@pytest.mark.parametrize("kind", ["msp", "entropy", "margin"])
def test_fitted_windows_send_the_stated_shares(kind, combine):
    models, x = members(4), randn(200, 6, dtype=F64)
    logits = torch.stack([m(x) for m in models]).detach()
    for fractions in ((0.5, 0.25, 0.1), (0.3, 0.3, 0.0)):
        windows = fit_windows(logits, fractions, kind, combine=combine)
        cascade = Cascade(models, windows, kind, combine=combine)
        cascade(x)
        assert cascade.report.rows == (200, *(round(f * 200) for f in fractions))
        open_end = 0 if kind in ("msp", "margin") else 1
        assert abs(windows[0][open_end]) == INF
    rows = cascade.report.rows
    windows = fit_windows(list(logits), (0.4, 0.2, 0.1), kind, combine=combine, coverage=0.7)
    cascade = Cascade(models, windows, kind, combine=combine)
    cascade(x)
    assert cascade.report.rows == (200, 80, 40, 20) and rows[0] == 200
    first = logits[0] if combine == "logit" else logits[0].log_softmax(-1)
    score = getattr(uncertainty_scores(first), kind)
    certain = score if kind in ("msp", "margin") else -score
    rank = certain.argsort(descending=True).argsort()
    inside = (score >= windows[0][0]) & (score <= windows[0][1])
    assert rank[inside].min() == 100 and rank[inside].max() == 179  # 80 rows around rank 140


def test_digits_cost_less_than_half():
    """Four small nets on the digits: the ensemble's accuracy within a point at under half its work."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x, y = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, held, test = order[:700], order[700:1000], order[1000:]
    nets = []
    for seed in range(4):
        torch.manual_seed(seed)
        net = torch.nn.Sequential(torch.nn.Linear(64, 24), torch.nn.ReLU(), torch.nn.Linear(24, 10))
        optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
        for _ in range(40):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(net(x[train]), y[train]).backward()
            optimizer.step()
        nets.append(net.eval())
    with torch.no_grad():
        windows = fit_windows([n(x[held]) for n in nets], (0.3, 0.2, 0.15))
        cascade = Cascade(nets, windows)
        ours = (cascade(x[test]).argmax(1) == y[test]).double().mean()
        whole = (sum(n(x[test]) for n in nets).argmax(1) == y[test]).double().mean()
    assert cascade.report.work < 0.5 and whole > 0.9 and ours > whole - 0.01


M, L = members(2), randn(2, 5, 4)
BAD = [
    (lambda: Cascade([], []), TypeError, "models: expected at least one callable"),
    (lambda: Cascade([1], []), TypeError, "models: expected at least one callable"),
    (lambda: Cascade(M, []), ValueError, "windows: expected 1 for 2 models"),
    (lambda: Cascade(M, [0.5]), TypeError, r"windows\[0\]: expected a pair"),
    (lambda: Cascade(M, [(NAN, 1)]), ValueError, r"windows\[0\], low: expected a number"),
    (lambda: Cascade(M, [(0, 1)], "max"), ValueError, "kind: expected one of"),
    (lambda: Cascade(M, [(0, 1)], combine="sum"), ValueError, "combine: expected one of"),
    (lambda: Cascade(M, [(0, 1)], how="sum"), ValueError, "how: expected one of"),
    (lambda: Cascade(M, [(0, 1)], costs=[1]), ValueError, "costs: expected 2 numbers"),
    (lambda: Cascade(M, [(0, 1)], costs=[1, -1]), ValueError, r"costs\[1\]: expected a finite"),
    (lambda: fit_windows(L[:1], []), ValueError, "logits: expected at least 2 members"),
    (lambda: fit_windows([L[0], L[1, :4]], [0.5]), ValueError, r"logits\[1\]: expected shape"),
    (lambda: fit_windows(L, [0.5, 0.5]), ValueError, "fractions: expected 1 shares"),
    (lambda: fit_windows(L, [1.5]), ValueError, "fractions: expected a finite number"),
    (lambda: fit_windows(randn(3, 5, 4), [0.2, 0.5]), ValueError, "fractions: expected shares that do"),
    (lambda: fit_windows(L, [0.5], coverage=2), ValueError, "coverage: expected a finite"),
    (lambda: fit_windows(L[:, :0], [0.5]), ValueError, "logits: expected at least one row"),
    (lambda: Cascade([torch.sin, lambda x: x[:, :2]], [(0, 1)])(L[0]), ValueError, "models.1.'s output: exp"),
    (lambda: Cascade([torch.sin, lambda x: x.half()], [(0, 1)])(L[0]), TypeError, "models.1.'s output: exp"),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input_is_named(case):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()
