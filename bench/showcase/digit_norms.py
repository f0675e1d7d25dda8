"""A convolutional net on the digits under each normalisation, and alpha_batch_norm on digits that have changed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from . import Outcome, median_ratio, pyplot, seconds

WIDTH, BATCH = 24, 64
PICTURE = "digit_norms.png"
SHARES = [i / 10 for i in range(11)]


def net(norm: Callable[[int], nn.Module], conv: type[nn.Module] = nn.Conv2d) -> nn.Sequential:
    """Three convolutions, each followed by `norm(channels)`, which brings its own activation."""
    layers: list[nn.Module] = []
    for channels, width, stride in ((1, WIDTH, 1), (WIDTH, WIDTH, 2), (WIDTH, WIDTH, 1)):
        layers += [conv(channels, width, 3, stride, 1), norm(width)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTH, 10))


def clip_all_but_the_head(model: nn.Sequential) -> None:
    from solera.norm import adaptive_grad_clip_

    adaptive_grad_clip_(list(model[:-1].parameters()), 0.1)


def variants() -> dict[str, tuple[Callable[[], nn.Sequential], Callable | None]]:
    """name -> (the model, what happens to the gradients before a step)."""
    import solera.nn as s

    def then_relu(norm: Callable[[int], nn.Module]) -> Callable[[int], nn.Module]:
        return lambda width: nn.Sequential(norm(width), nn.ReLU())

    every: dict[str, tuple[Callable[[], nn.Sequential], Callable | None]] = {
        "batch": (lambda: net(lambda c: s.BatchNorm2d(c, activation="relu")), None),
        "group": (lambda: net(lambda c: s.GroupNorm(8, c, activation="relu")), None),
        "evonorm_s0": (lambda: net(lambda c: s.EvoNorm2dS0(c, groups=8)), None),
        "evonorm_b0": (lambda: net(s.EvoNorm2dB0), None),
        "scaled weights + clipping": (
            lambda: net(lambda c: nn.ReLU(), s.ScaledStdConv2d),
            clip_all_but_the_head,
        ),
        "online": (lambda: net(then_relu(s.OnlineNorm2d)), None),
    }
    return every


class Training:
    def __init__(self, model: nn.Module, after_backward: Callable | None) -> None:
        self.model, self.after_backward = model, after_backward
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        self.losses: list[float] = []
        self.times: list[float] = []

    def step(self, x: Tensor, y: Tensor) -> None:
        def once() -> None:
            loss = cross_entropy(self.model(x), y)
            self.optimizer.zero_grad()
            loss.backward()
            if self.after_backward is not None:
                self.after_backward(self.model)
            self.optimizer.step()
            self.losses.append(loss.item())

        self.times.append(seconds(once))

    @torch.no_grad()
    def accuracy(self, x: Tensor, y: Tensor) -> float:
        return 100 * float((self.model.eval()(x).argmax(1) == y).double().mean())


def plain_of(model: nn.Module) -> nn.Module:
    """The batch-norm model in torch's own modules, with the same weights."""
    plain = copy.deepcopy(model)
    for i, layer in enumerate(model):
        if isinstance(layer, nn.BatchNorm2d):
            plain[i] = nn.Sequential(nn.BatchNorm2d(layer.num_features), nn.ReLU())
    return plain


def by_share(model: nn.Module, x: Tensor, y: Tensor) -> list[float]:
    """Accuracy of the batch-norm model at each weight of the source's statistics."""
    from solera.nn import AlphaBatchNorm2d

    found = []
    for share in SHARES:
        mixed = copy.deepcopy(model).eval()
        for i, layer in enumerate(model):
            if isinstance(layer, nn.BatchNorm2d):
                alpha = AlphaBatchNorm2d(layer.num_features, source_weight=share).eval()
                alpha.load_state_dict(layer.state_dict())
                mixed[i] = nn.Sequential(alpha, nn.ReLU())
        with torch.no_grad():
            guesses = torch.cat([mixed(part) for part in x.split(BATCH)]).argmax(1)
        found.append(100 * float((guesses == y).double().mean()))
    return found


def draw(curves: dict[str, list[float]], path: Path) -> bool:
    plt = pyplot()
    if plt is None:
        return False
    figure, axis = plt.subplots(figsize=(6.5, 3.6), layout="constrained")
    for (name, curve), colour in zip(curves.items(), ("#0072B2", "#D55E00", "#009E73")):
        axis.plot(SHARES, curve, color=colour, marker="o", markersize=4, label=name)
    axis.set(
        xlabel="weight of the source's statistics (1: evaluation as usual)",
        ylabel="test accuracy, %",
        title="alpha_batch_norm on changed digits",
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
    x = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    y = torch.tensor(data.target)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(x), generator=generator)
    train, test = order[:1300], order[1300:]
    sides: dict[str, Training] = {}
    for name, (build, after_backward) in variants().items():
        torch.manual_seed(0)
        sides[name] = Training(build(), after_backward)
    plain = Training(plain_of(sides["batch"].model), None)
    for _ in range(2 if quick else 6):
        for rows in train[torch.randperm(len(train), generator=generator)].split(BATCH):
            for side in (*sides.values(), plain):
                side.step(x[rows], y[rows])
    accuracies = {name: side.accuracy(x[test], y[test]) for name, side in sides.items()}
    plain_accuracy = plain.accuracy(x[test], y[test])
    noise = torch.randn(x[test].shape, generator=generator)
    changed = {
        "as trained": x[test],
        "darker, noisy": 0.4 * x[test] + 0.15 * noise,
        "faint on grey": 0.5 * x[test] + 0.4,
    }
    curves = {name: by_share(sides["batch"].model, t, y[test]) for name, t in changed.items()}
    drawn = draw(curves, folder / PICTURE)
    # Rounding grows with the number of steps: the two sides are compared over the first epoch.
    first = len(train) // BATCH
    ours, theirs = sides["batch"].losses[:first], plain.losses[:first]
    difference = max(abs(a - b) for a, b in zip(ours, theirs))
    apart = abs(accuracies["batch"] - plain_accuracy)
    agrees = difference < 1e-2 and apart < 2.0
    ratio = median_ratio(sides["batch"].times, plain.times)
    rows = [
        [name, f"{accuracies[name]:.2f}%", f"{side.losses[-1]:.4f}"] for name, side in sides.items()
    ]
    rows.append(["batch, torch's modules", f"{plain_accuracy:.2f}%", f"{plain.losses[-1]:.4f}"])
    best = {name: max(range(len(c)), key=c.__getitem__) for name, c in curves.items()}
    said = "; ".join(
        f"{name}: {c[-1]:.1f}% with the source's statistics, {c[0]:.1f}% with the batch's, "
        f"at best {c[best[name]]:.1f}% (source_weight {SHARES[best[name]]:g})"
        for name, c in curves.items()
    )
    return Outcome(
        name="digit_norms",
        title="A convolutional net on the digits under each normalisation",
        columns=["norm", "test accuracy", "last training loss"],
        rows=rows,
        ratio=ratio,
        agrees=agrees,
        problem=""
        if agrees
        else f"losses differ by {difference:.2g}, accuracies by {apart:.1f} points",
        note=f"The first epoch's losses of batch norm, Solera's and torch's, differ by at most {difference:.1e}. "
        f"Changed digits in batches of {BATCH}, accuracy by the weight of the source's statistics: {said}.",
        numbers={
            "loss_difference": difference,
            **{f"accuracy {n}": a for n, a in accuracies.items()},
        },
        pictures=[PICTURE] if drawn else [],
    )
