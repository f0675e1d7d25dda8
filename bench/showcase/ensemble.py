"""An MLP of 32 members (TabM, BatchEnsemble) on the digits as a table, against its mean single member."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from . import Outcome, median_ratio, seconds

MEMBERS, WIDTH, BATCH = 32, 192, 128


class PlainBatchEnsemble(nn.Module):
    """y_k = s_k (W (r_k x_k)) + b_k in separate torch ops, as the package tabm has it."""

    def __init__(self, r: Tensor, weight: Tensor, s: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.r, self.weight, self.s, self.bias = (nn.Parameter(t) for t in (r, weight, s, bias))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.r) @ self.weight.T * self.s + self.bias


class PlainEnsemble(nn.Module):
    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        return (x.transpose(0, 1) @ self.weight).transpose(0, 1) + self.bias


class Expand(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.unsqueeze(1).expand(-1, MEMBERS, -1)


def solera_model(inputs: int, classes: int) -> nn.Module:
    from solera.nn import LinearBatchEnsemble, LinearEnsemble

    return nn.Sequential(
        LinearBatchEnsemble(inputs, WIDTH, k=MEMBERS, scaling_init="random-signs"),
        nn.ReLU(),
        LinearBatchEnsemble(WIDTH, WIDTH, k=MEMBERS, scaling_init="ones"),
        nn.ReLU(),
        LinearEnsemble(WIDTH, classes, k=MEMBERS),
    )


def plain_model(model: nn.Module) -> tuple[nn.Module, str]:
    """The same network with the same weights, and whose layers it has: tabm's if it is installed."""
    first, _, second, _, last = model
    try:
        import tabm
    except ImportError:
        layers = [
            PlainBatchEnsemble(
                *(getattr(m, n).detach().clone() for n in ("r", "weight", "s", "bias"))
            )
            for m in (first, second)
        ]
        head = PlainEnsemble(last.weight.detach().clone(), last.bias.detach().clone())
        return nn.Sequential(Expand(), layers[0], nn.ReLU(), layers[1], nn.ReLU(), head), "torch's"
    copy = nn.Sequential(
        tabm.LinearBatchEnsemble(first.weight.shape[1], WIDTH, k=MEMBERS, scaling_init="ones"),
        nn.ReLU(),
        tabm.LinearBatchEnsemble(WIDTH, WIDTH, k=MEMBERS, scaling_init="ones"),
        nn.ReLU(),
        tabm.LinearEnsemble(WIDTH, last.weight.shape[2], k=MEMBERS),
    )
    copy.load_state_dict(model.state_dict())
    return nn.Sequential(Expand(), copy), "tabm's"


def accuracies(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """(ensemble, mean single member) in percent: the ensemble averages its members' probabilities."""
    with torch.no_grad():
        probabilities = model(x).softmax(-1)
    single = (probabilities.argmax(-1) == y[:, None]).double().mean()
    together = (probabilities.mean(1).argmax(-1) == y).double().mean()
    return 100 * float(together), 100 * float(single)


def run(quick: bool, folder: Path) -> Outcome:
    from sklearn.datasets import load_digits

    data = load_digits()
    x = torch.tensor(data.data, dtype=torch.float32) / 16
    y = torch.tensor(data.target)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(x), generator=generator)
    train, test = order[:400], order[400:]
    ours = solera_model(x.shape[1], 10)
    plain, whose = plain_model(ours)
    sides = [
        (m, torch.optim.AdamW(m.parameters(), lr=3e-3, weight_decay=1e-4)) for m in (ours, plain)
    ]
    times: list[list[float]] = [[], []]
    losses: list[list[float]] = [[], []]

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, rows: Tensor) -> float:
        logits = model(x[rows])
        target = y[rows, None].expand(-1, MEMBERS)
        loss = cross_entropy(logits.flatten(0, 1), target.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    for epoch in range(15 if quick else 40):
        shuffled = train[torch.randperm(len(train), generator=generator)]
        for i, rows in enumerate(shuffled.split(BATCH)):
            turns = (0, 1) if (epoch + i) % 2 == 0 else (1, 0)
            for side in turns:
                values = losses[side]
                times[side].append(seconds(lambda: values.append(step(*sides[side], rows))))
    difference = max(abs(a - b) / max(b, 0.05) for a, b in zip(*losses))
    (together, single), (plain_together, plain_single) = (
        accuracies(m, x[test], y[test]) for m, _ in sides
    )
    ratio = median_ratio(*times)
    agrees = difference < 0.01 and abs(together - plain_together) < 0.5
    return Outcome(
        name="ensemble",
        title=f"{MEMBERS} members in one MLP, trained on 400 digits",
        rows=[
            ["accuracy of the ensemble", f"{together:.2f}%", f"{plain_together:.2f}%"],
            ["mean accuracy of one member", f"{single:.2f}%", f"{plain_single:.2f}%"],
            ["last training loss", f"{losses[0][-1]:.5f}", f"{losses[1][-1]:.5f}"],
            ["training, time", "1x", f"{ratio:.2f}x"],
        ],
        ratio=ratio,
        agrees=agrees,
        problem="" if agrees else f"losses differ by {difference:.2g} (relative), or accuracies do",
        note=f"Same start, same batches; the loss curves differ by at most {difference:.1e} (relative). "
        f"The layers on the plain side are {whose}.",
        numbers={"ensemble": together, "single": single, "loss_difference": difference},
    )
