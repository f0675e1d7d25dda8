"""A soup and an EMA of small nets on the digits: averaging weights against the average net."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from . import Outcome, median_ratio, seconds

MEMBERS, DECAY, NOISE = 8, 0.98, 0.35


def network() -> nn.Module:
    return nn.Sequential(
        nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
    )


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return 100 * float((model(x).argmax(1) == y).double().mean())


def with_weights(state: dict[str, Tensor]) -> nn.Module:
    model = network()
    model.load_state_dict(state)
    return model


def plain_soup(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: sum(s[name] for s in states) / len(states) for name in states[0]}


@torch.no_grad()
def plain_ema(averages: list[Tensor], parameters: list[Tensor]) -> None:
    for average, parameter in zip(averages, parameters):
        average.mul_(DECAY).add_(parameter, alpha=1 - DECAY)


def run(quick: bool, folder: Path) -> Outcome:
    from sklearn.datasets import load_digits

    from solera.weights import ema_, lincomb

    data = load_digits()
    x, y = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(x), generator=generator)
    start, tune, test = order[:100], order[100:500], order[500:]
    ema_times: list[list[float]] = [[], []]

    def fit(model: nn.Module, rows: Tensor, steps: int, rate: float, averages=None) -> nn.Module:
        """Noisy SGD; with `averages` (ours, plain) both are updated after each step, in turns."""
        optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
        parameters = [p.detach() for p in model.parameters()]
        for i in range(steps):
            batch = rows[torch.randint(len(rows), (32,), generator=generator)]
            noise = NOISE * torch.randn(32, x.shape[1], generator=generator)
            loss = cross_entropy(model(x[batch] + noise), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if averages is not None:
                sides = [
                    lambda: ema_(averages[0], parameters, DECAY),
                    lambda: plain_ema(averages[1], parameters),
                ]
                for side in (0, 1) if i % 2 == 0 else (1, 0):
                    ema_times[side].append(seconds(sides[side]))
        return model

    base = fit(network(), start, 300, 0.05)
    steps = 120 if quick else 400
    averages = tuple([p.detach().clone() for p in base.parameters()] for _ in range(2))
    members = [
        fit(copy.deepcopy(base), tune, steps, 0.06, averages if i == 0 else None)
        for i in range(MEMBERS)
    ]
    states = [{k: v.detach() for k, v in m.state_dict().items()} for m in members]
    weights = [1 / MEMBERS] * MEMBERS
    soup, plain = lincomb(states, weights), plain_soup(states)
    pairs = [
        (seconds(lambda: lincomb(states, weights)), seconds(lambda: plain_soup(states)))
        for _ in range(50)
    ]
    soup_ratio = median_ratio([p[0] for p in pairs], [p[1] for p in pairs])
    ema_ratio = median_ratio(*ema_times)
    names = list(states[0])
    apart = max(float((soup[n] - plain[n]).abs().max()) for n in names)
    apart = max(apart, *(float((a - b).abs().max()) for a, b in zip(*averages)))
    emas = [with_weights(dict(zip(names, side))) for side in averages]
    single = [accuracy(m, x[test], y[test]) for m in members]
    mean = sum(single) / MEMBERS
    of_soup = [accuracy(with_weights(s), x[test], y[test]) for s in (soup, plain)]
    of_ema = [accuracy(m, x[test], y[test]) for m in emas]
    agrees = (
        apart < 1e-5 and abs(of_soup[0] - of_soup[1]) < 0.2 and abs(of_ema[0] - of_ema[1]) < 0.2
    )
    size = sum(v.numel() for v in states[0].values())
    return Outcome(
        name="soup",
        title=f"A soup of {MEMBERS} nets and the EMA of one, fine-tuned on 400 noisy digits",
        rows=[
            ["accuracy of the soup", f"{of_soup[0]:.2f}%", f"{of_soup[1]:.2f}%"],
            [f"mean accuracy of the {MEMBERS} nets", f"{mean:.2f}%", f"{mean:.2f}%"],
            ["accuracy of the first net's EMA", f"{of_ema[0]:.2f}%", f"{of_ema[1]:.2f}%"],
            ["accuracy of the first net", f"{single[0]:.2f}%", f"{single[0]:.2f}%"],
            ["making the soup, time", "1x", f"{soup_ratio:.2f}x"],
            ["one EMA update, time", "1x", f"{ema_ratio:.2f}x"],
        ],
        ratio=soup_ratio,
        agrees=agrees,
        problem="" if agrees else f"averaged weights differ by {apart:.2g}, or accuracies do",
        note=f"{size:,} weights a net, so both sides mostly pay for their calls; weights differ by at most "
        f"{apart:.1e}.",
        numbers={"soup": of_soup[0], "mean_member": mean, "ema": of_ema[0], "ema_ratio": ema_ratio},
    )
