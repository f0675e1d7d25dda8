"""What 32 members know about their own mistakes: ensembles of three kinds beside a single model, on the digits.

Trained on clean images, asked about noisy ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from . import Outcome, median_ratio, pyplot, seconds
from .ensemble import MEMBERS, WIDTH, plain_model, solera_model

BATCH, NOISE, BINS, GROUPS = 128, 0.3, 10, 8
ALPHA = 4  # of Packed-Ensembles: a member is ALPHA * WIDTH / MEMBERS wide
PICTURE = "uncertainty.png"
COLOURS = {
    "single model": "#555555",
    "deep ensemble": "#0072B2",
    "batch ensemble": "#D55E00",
    "packed ensemble": "#009E73",
}

Model = Callable[[Tensor], Tensor]  # (B, 64) -> logits (B, K, 10)


def mlp(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
    )


class Side:
    """One model in training."""

    def __init__(self, model: Model, parameters: Iterable[Tensor], rate: float = 3e-3) -> None:
        self.model, self.parameters = model, list(parameters)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=rate, weight_decay=1e-4, fused=True)
        self.losses: list[float] = []
        self.times: list[float] = []

    def step(self, x: Tensor, y: Tensor) -> None:
        def once() -> None:
            logits = self.model(x)
            target = y[:, None].expand(logits.shape[:2])
            loss = cross_entropy(logits.flatten(0, 1), target.flatten())
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.losses.append(loss.item())

        self.times.append(seconds(once))

    @property
    def size(self) -> int:
        return sum(p.numel() for p in self.parameters)


def members_of_their_own(width: int, rate: float = 3e-3) -> tuple[Side, Side]:
    """MEMBERS perceptrons: by ensemble_mlp, and by torch.vmap over their stacked state."""
    from solera.ensemble import ensemble_mlp, stack_members

    modules = [mlp(width) for _ in range(MEMBERS)]
    members = stack_members(modules)
    state, _ = torch.func.stack_module_state(modules)
    base = mlp(width).to("meta")

    def plain(x: Tensor) -> Tensor:
        call = lambda p: torch.func.functional_call(base, p, (x,))
        return torch.vmap(call, out_dims=1)(state)

    ours = Side(lambda x: ensemble_mlp(x, members), members.values(), rate)
    return ours, Side(plain, state.values(), rate)


def contenders() -> dict[str, tuple[Side, ...]]:
    """name -> (Solera's side, plain torch's); the single model is torch's own either way."""
    single = mlp(WIDTH)
    shared = solera_model(64, 10)
    plain, _ = plain_model(shared)
    return {
        "single model": (Side(lambda x: single(x).unsqueeze(1), single.parameters()),),
        "deep ensemble": members_of_their_own(WIDTH),
        "batch ensemble": (Side(shared, shared.parameters()), Side(plain, plain.parameters())),
        "packed ensemble": members_of_their_own(ALPHA * WIDTH // MEMBERS, rate=6e-3),  # narrow
    }


def plain_statistics(logits: Tensor) -> tuple[Tensor, Tensor]:
    mean = logits.softmax(-1).mean(1)
    return mean, -(mean * mean.clamp_min(1e-30).log()).sum(-1)


class Report:
    """How right a model is, and how well it knows when it is not."""

    def __init__(self, mean: Tensor, entropy: Tensor, y: Tensor) -> None:
        confidence, guess = mean.max(-1)
        right = (guess == y).double()
        self.accuracy = 100 * float(right.mean())
        self.nll = -float(mean.gather(1, y[:, None]).clamp_min(1e-30).log().mean())
        # The reliability diagram: predictions in bins of confidence.
        bins = (confidence * BINS).long().clamp_max(BINS - 1)
        self.reliability: list[tuple[float, float]] = []
        self.ece = 0.0
        for i in range(BINS):
            inside = bins == i
            if inside.any():
                point = float(confidence[inside].mean()), float(right[inside].mean())
                self.ece += float(inside.double().mean()) * abs(point[0] - point[1])
                if inside.sum() >= 10:  # fewer say little: not drawn
                    self.reliability.append(point)
        # From the surest to the least sure prediction.
        order = entropy.argsort(stable=True)
        ordered, sure = right[order], entropy[order]
        self.by_entropy = [
            (float(e.mean()), 100 - 100 * float(r.mean()))
            for e, r in zip(sure.chunk(GROUPS), ordered.chunk(GROUPS))
        ]
        kept = ordered.cumsum(0) / torch.arange(1, len(y) + 1)
        self.rejected = [i / 50 for i in range(36)]
        self.accepted = [100 * float(kept[math.ceil(len(y) * (1 - f)) - 1]) for f in self.rejected]

    def accuracy_without(self, share: float) -> float:
        """Accuracy when the given share, the least sure, is left to somebody else."""
        return self.accepted[self.rejected.index(share)]


def draw(reports: dict[str, Report], path: Path) -> bool:
    plt = pyplot()
    if plt is None:
        return False
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.9), layout="constrained")
    reliability, entropy, rejection = axes
    reliability.plot([0, 1], [0, 1], color="#bbbbbb", linewidth=1, linestyle="--")
    for name, report in reports.items():
        style = {"color": COLOURS[name], "marker": "o", "markersize": 3.5, "linewidth": 1.6}
        label = f"{name} (ECE {100 * report.ece:.1f}%)"
        reliability.plot(*zip(*report.reliability), **style, label=label)
        entropy.plot(*zip(*report.by_entropy), **style, label=name)
        style["marker"] = ""
        rejection.plot([100 * f for f in report.rejected], report.accepted, **style, label=name)
    reliability.set(
        xlabel="confidence", ylabel="share that is right", title="Calibration", xlim=(0.2, 1.02)
    )
    reliability.set_ylim(0, 1.02)
    entropy.set(
        xlabel="entropy of the prediction, nats",
        ylabel="wrong, %",
        title="Error against entropy",
    )
    rejection.set(
        xlabel="rejected (highest entropy first), %",
        ylabel="accuracy of the rest, %",
        title="Accuracy against rejection",
    )
    for axis in axes:
        axis.grid(color="#dddddd", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    reliability.legend(frameon=False, fontsize=8.5)
    figure.savefig(path, dpi=90)
    plt.close(figure)
    return True


def run(quick: bool, folder: Path) -> Outcome:
    from sklearn.datasets import load_digits

    from solera.ensemble import ensemble_statistics

    data = load_digits()
    x = torch.tensor(data.data, dtype=torch.float32) / 16
    y = torch.tensor(data.target)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(x), generator=generator)
    train, test = order[:400], order[400:]
    asked = x[test] + NOISE * torch.randn(x[test].shape, generator=generator)
    sides = contenders()
    for epoch in range(10 if quick else 24):
        shuffled = train[torch.randperm(len(train), generator=generator)]
        for i, rows in enumerate(shuffled.split(BATCH)):
            for pair in sides.values():
                for side in pair if (epoch + i) % 2 == 0 else pair[::-1]:
                    side.step(x[rows], y[rows])

    reports: dict[str, Report] = {}
    ratios: dict[str, float] = {}
    apart = {"loss": 0.0, "statistics": 0.0, "accuracy": 0.0}
    for name, (ours, *plain) in sides.items():
        with torch.no_grad():
            logits = ours.model(asked)
            found = ensemble_statistics(logits, outputs=("mean", "total_entropy"))
            by_hand = plain_statistics(logits)
        for a, b in zip((found["mean"], found["total_entropy"]), by_hand):
            apart["statistics"] = max(apart["statistics"], float((a - b).abs().max()))
        reports[name] = Report(found["mean"], found["total_entropy"], y[test])
        for other in plain:
            with torch.no_grad():
                theirs = Report(*plain_statistics(other.model(asked)), y[test])
            off = max(abs(a - b) / max(b, 0.05) for a, b in zip(ours.losses, other.losses))
            apart["loss"] = max(apart["loss"], off)
            away = abs(theirs.accuracy - reports[name].accuracy)
            apart["accuracy"] = max(apart["accuracy"], away)
            ratios[name] = median_ratio(ours.times, other.times)
    trio = [sides[name] for name in ratios]
    sums = [[sum(t) for t in zip(*(pair[i].times for pair in trio))] for i in (0, 1)]
    agrees = apart["loss"] < 0.02 and apart["statistics"] < 1e-5 and apart["accuracy"] < 1.0
    base = sides["single model"][0]
    rows = []
    for name, report in reports.items():
        side = sides[name][0]
        cost = 1.0 if side is base else median_ratio(base.times, side.times)
        beside = f"{ratios[name]:.2f}x" if name in ratios else "–"
        rows.append([
            name, f"{report.accuracy:.1f}%", f"{report.nll:.3f}", f"{100 * report.ece:.1f}%",
            f"{report.accuracy_without(0.2):.1f}%", f"{side.size / 1000:.0f}k", f"{cost:.1f}x", beside,
        ])  # fmt: skip
    return Outcome(
        name="uncertainty",
        title=f"What {MEMBERS} members know about their mistakes: digits with noise",
        columns=[
            "", "accuracy", "NLL", "ECE", "a fifth rejected", "parameters", "time a step", "plain torch",
        ],
        rows=rows,
        ratio=median_ratio(*sums),
        agrees=agrees,
        problem=""
        if agrees
        else "the two sides differ: " + ", ".join(f"{n} by {v:.2g}" for n, v in apart.items()),
        note=f"Perceptrons of 64-{WIDTH}-{WIDTH}-10 trained on {len(train)} clean digits, asked about {len(test)} "
        f"with noise of deviation {NOISE}. Time a step in those of the single model; plain torch's over Solera's "
        f"(vmap over stacked modules, the package tabm). Same start and batches: losses differ by at most "
        f"{apart['loss']:.1e} (relative), statistics by {apart['statistics']:.1e}.",
        numbers={
            **{f"accuracy {n}": r.accuracy for n, r in reports.items()},
            **{f"ece {n}": r.ece for n, r in reports.items()},
            **{f"ratio {n}": r for n, r in ratios.items()},
            **{f"difference of {n}": v for n, v in apart.items()},
        },
        pictures=[PICTURE] if not quick and draw(reports, folder / PICTURE) else [],  # what the page shows
    )  # fmt: skip
