"""A cascade of four convolutional nets on the digits: the ensemble's accuracy at under half its work."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from . import Outcome, median_ratio, seconds

MEMBERS, BATCH, WIDTH = 4, 64, 24
FRACTIONS = (0.3, 0.2, 0.1)  # of the rows that reach members 2, 3, 4
WITHIN = 0.2  # points of accuracy


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, WIDTH, 3, padding=1), nn.ReLU(), nn.Conv2d(WIDTH, WIDTH, 3, 2, 1), nn.ReLU(),
        nn.Flatten(), nn.Linear(16 * WIDTH, 10),
    )  # fmt: skip


def trained(seed: int, x: Tensor, y: Tensor, epochs: int) -> nn.Sequential:
    torch.manual_seed(seed)
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(BATCH):
            optimizer.zero_grad()
            cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    return model.eval()


def run(quick: bool, folder: Path) -> Outcome:
    from sklearn.datasets import load_digits

    from solera.ensemble import Cascade, fit_windows

    data = load_digits()
    x = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    y = torch.tensor(data.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, held, test = order[:700], order[700:1000], order[1000:]
    members = [trained(seed, x[train], y[train], 3 if quick else 8) for seed in range(MEMBERS)]

    def accuracy(logits: Tensor) -> float:
        return 100 * float((logits.argmax(1) == y[test]).double().mean())

    def ensemble(x: Tensor) -> Tensor:
        return torch.stack([m(x) for m in members]).mean(0)

    with torch.no_grad():
        windows = fit_windows([m(x[held]) for m in members], FRACTIONS)
        cascade = Cascade(members, windows)
        one, whole, ours = accuracy(members[0](x[test])), ensemble(x[test]), cascade(x[test])
        report = cascade.report
        many = x[test].repeat(8, 1, 1, 1)
        times = [
            (seconds(lambda: cascade(many)), seconds(lambda: ensemble(many))) for _ in range(7)
        ]
    assert report is not None
    of_cascade, of_ensemble = accuracy(ours), accuracy(whole)
    agrees = of_cascade >= of_ensemble - WITHIN and report.work < 0.5
    ratio = median_ratio([a for a, _ in times], [b for _, b in times])
    rows = [
        ["one member", f"{one:.2f}%", f"{1 / MEMBERS:.0%}"],
        ["cascade", f"{of_cascade:.2f}%", f"{report.work:.0%}"],
        ["all four", f"{of_ensemble:.2f}%", "100%"],
    ]
    return Outcome(
        name="cascade",
        title="A cascade of four nets on the digits",
        columns=["", "test accuracy", "work"],
        rows=rows,
        ratio=ratio,
        agrees=agrees,
        problem=""
        if agrees
        else f"accuracy {of_cascade:.2f}% beside {of_ensemble:.2f}%, work {report.work:.0%}",
        note=f"Windows fitted on {len(held)} held-out images; of {len(test)} test images "
        f"{', '.join(map(str, report.rows))} reached members 1 to {MEMBERS}.",
        numbers={"work": report.work, "accuracy": of_cascade, "accuracy of all": of_ensemble},
    )
