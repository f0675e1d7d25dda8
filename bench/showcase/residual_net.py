"""A pre-norm residual MLP on the digits, its additions and norms fused in one call: the same loss curve."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, rms_norm, silu

from . import Outcome, median_ratio, pyplot, seconds

WIDTH, HIDDEN, DEPTH, BATCH = 256, 128, 6, 512
PICTURE = "residual_net.png"


class ResidualNet(nn.Module):
    """h <- h + W2 silu(W1 norm(h)), DEPTH times. `fused` takes each addition together with the next norm."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.inward = nn.Linear(64, WIDTH)
        self.up = nn.ModuleList(nn.Linear(WIDTH, HIDDEN) for _ in range(DEPTH))
        self.down = nn.ModuleList(nn.Linear(HIDDEN, WIDTH) for _ in range(DEPTH))
        self.scales = nn.ParameterList(torch.ones(WIDTH) for _ in range(DEPTH + 1))
        self.outward = nn.Linear(WIDTH, 10)
        for layer in self.down:  # each block starts as the identity
            nn.init.zeros_(layer.weight)

    def norm(self, h: Tensor, branch: Tensor | None, scale: Tensor) -> tuple[Tensor, Tensor]:
        """(norm of h + branch, h + branch)"""
        if self.fused:
            import solera

            if branch is None:
                return solera.norm.rms_norm(h, scale), h
            return solera.norm.rms_norm(branch, scale, residual=h)
        h = h if branch is None else h + branch
        return rms_norm(h, (WIDTH,), scale), h

    def forward(self, x: Tensor) -> Tensor:
        h, branch = self.inward(x), None
        for up, down, scale in zip(self.up, self.down, self.scales):
            y, h = self.norm(h, branch, scale)
            branch = down(silu(up(y)))
        y, _ = self.norm(h, branch, self.scales[-1])
        return self.outward(y)


def draw(curves: list[list[float]], path: Path) -> bool:
    plt = pyplot()
    if plt is None:
        return False
    figure, axis = plt.subplots(figsize=(6.5, 3.6), layout="constrained")
    axis.plot(curves[1], color="#E69F00", linewidth=5, alpha=0.6, label="plain torch")
    axis.plot(curves[0], color="#0072B2", linewidth=1.5, label="Solera, fused")
    axis.set(
        yscale="log", xlabel="step", ylabel="training loss", title="residual MLP on the digits"
    )
    axis.grid(color="#dddddd", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=90)
    plt.close(figure)
    return True


def run(quick: bool, folder: Path) -> Outcome:
    from sklearn.datasets import load_digits

    data = load_digits()
    x, y = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(x), generator=generator)
    train, test = order[:1300], order[1300:]
    ours = ResidualNet(fused=True)
    plain = copy.deepcopy(ours)
    plain.fused = False
    sides = [(m, torch.optim.SGD(m.parameters(), lr=0.02, momentum=0.9)) for m in (ours, plain)]
    times: list[list[float]] = [[], []]
    curves: list[list[float]] = [[], []]

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, rows: Tensor) -> float:
        loss = cross_entropy(model(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    for i in range(60 if quick else 150):
        rows = train[torch.randint(len(train), (BATCH,), generator=generator)]
        for side in (0, 1) if i % 2 == 0 else (1, 0):
            curve = curves[side]
            times[side].append(seconds(lambda: curve.append(step(*sides[side], rows))))
    with torch.no_grad():
        accuracy = [
            100 * float((m(x[test]).argmax(1) == y[test]).double().mean()) for m, _ in sides
        ]
    difference = max(abs(a - b) for a, b in zip(*curves))
    ratio = median_ratio(*times)
    agrees = difference < 1e-3 and abs(accuracy[0] - accuracy[1]) < 0.5
    drawn = draw(curves, folder / PICTURE)
    return Outcome(
        name="residual_net",
        title=f"A residual MLP with {DEPTH} blocks and fused add + rms_norm, on the digits",
        rows=[
            ["last training loss", f"{curves[0][-1]:.6f}", f"{curves[1][-1]:.6f}"],
            ["test accuracy", f"{accuracy[0]:.2f}%", f"{accuracy[1]:.2f}%"],
            ["a training step, time", "1x", f"{ratio:.2f}x"],
        ],
        ratio=ratio,
        agrees=agrees,
        problem="" if agrees else f"losses differ by {difference:.2g}, accuracies are {accuracy}",
        note=f"The two loss curves differ by at most {difference:.1e}. Most of a step is matrix products, "
        "which are the same on both sides.",
        numbers={"loss_difference": difference, "accuracy": accuracy[0]},
        pictures=[PICTURE] if drawn else [],
    )
