"""Fine-tuned runs of one small net merged into one: soups, the WiSE-FT sweep, Model Stock, and two tasks by TIES."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from . import Outcome, median_ratio, pyplot, seconds
from .soup import accuracy, network, plain_soup

RUNS, NOISE, PICTURE = 8, 0.35, "merging.png"
ALPHAS = [i / 20 for i in range(21)]
DENSITY, SCALE = 0.3, 1.0
State = dict[str, Tensor]


# ---- the same merges in plain torch ----------------------------------------------------------------------


def plain_stock(base: State, states: list[State]) -> State:
    """Model Stock of two: t = 2 cos / (1 + cos), tensor by tensor."""
    out = {}
    for name, start in base.items():
        a, b = (s[name] - start for s in states)
        cosine = (a * b).sum() / (a.norm() * b.norm())
        t = 2 * cosine / (1 + cosine)
        out[name] = start + t * (a + b) / 2
    return out


def plain_ties(base: State, states: list[State], density: float) -> State:
    """Trim each task's changes to the largest, elect a sign for each weight, average those that have it."""
    out = {}
    for name, start in base.items():
        deltas = torch.stack([s[name] - start for s in states])
        flat = deltas.abs().flatten(1)
        kept = max(1, int(density * flat.shape[1]))
        bound = flat.kthvalue(flat.shape[1] - kept + 1, dim=1).values
        bound = bound.view(-1, *[1] * start.dim())
        deltas = torch.where(deltas.abs() >= bound, deltas, 0.0)
        sign = torch.where(deltas.sum(0) >= 0, 1.0, -1.0)
        agree = (deltas * sign > 0).to(deltas.dtype)
        out[name] = start + SCALE * (deltas * agree).sum(0) / agree.sum(0).clamp(min=1)
    return out


def plain_arithmetic(base: State, states: list[State]) -> State:
    return {n: t + SCALE * sum(s[n] - t for s in states) for n, t in base.items()}


# ---- data and training -----------------------------------------------------------------------------------


class Digits:
    """The digits, clean and as another camera sees them, in parts for each step of the story."""

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        data = load_digits()
        self.x = torch.tensor(data.data, dtype=torch.float32) / 16
        self.y = torch.tensor(data.target)
        self.generator = torch.Generator().manual_seed(0)
        order = torch.randperm(len(self.x), generator=self.generator)
        self.start, self.tune, self.check, self.test = order.split([100, 500, 300, 897])
        # Turned a quarter and dimmed: what the net is fine-tuned for in the sweep.
        turned = self.x.view(-1, 8, 8).rot90(1, (1, 2)).reshape(-1, 64)
        self.other = 0.6 * turned + 0.2

    def fit(
        self, model: nn.Module, x: Tensor, rows: Tensor, steps: int, rate: float, noise: float
    ) -> nn.Module:
        optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
        for _ in range(steps):
            batch = rows[torch.randint(len(rows), (32,), generator=self.generator)]
            blur = noise * torch.randn(32, 64, generator=self.generator)
            loss = cross_entropy(model(x[batch] + blur), self.y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return model

    def score(self, state: State, x: Tensor, rows: Tensor) -> float:
        model = lambda inputs: functional_call(self.net, state, (inputs,))
        return accuracy(model, x[rows], self.y[rows])  # type: ignore[arg-type]

    net = network().to("meta")


def weights(model: nn.Module) -> State:
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def apart(ours: State, plain: State) -> float:
    return max(float((ours[n] - plain[n]).abs().max()) for n in plain)


def timed(ours: Callable[[], object], plain: Callable[[], object]) -> float:
    pairs = [(seconds(ours), seconds(plain)) for _ in range(15)]
    return median_ratio([p[0] for p in pairs], [p[1] for p in pairs])


# ---- the picture -----------------------------------------------------------------------------------------


def draw(sweep: dict[str, list[float]], bars: dict[str, tuple[float, float]], path: Path) -> bool:
    plt = pyplot()
    if plt is None:
        return False
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 3.9), layout="constrained")
    for (name, values), colour in zip(sweep.items(), ("#0072B2", "#D55E00", "#555555")):
        left.plot(ALPHAS, values, color=colour, marker="o", markersize=3, label=name)
    left.set(
        xlabel="alpha: 0 the base, 1 the fine-tuned net", ylabel="accuracy, %",
        title="WiSE-FT: every interpolation from one read",
    )  # fmt: skip
    left.legend(frameon=False)
    names = list(bars)
    for offset, part, colour in ((-0.2, 0, "#0072B2"), (0.2, 1, "#D55E00")):
        values = [bars[n][part] for n in names]
        label = ("digits 0 to 4", "digits 5 to 9")[part]
        right.bar([i + offset for i in range(len(names))], values, 0.38, color=colour, label=label)
    right.set_xticks(range(len(names)), names, fontsize=8)
    right.set(ylabel="accuracy, %", title="Two tasks in one net", ylim=(0, 118))
    right.legend(frameon=False, ncols=2, loc="upper center")
    for axis in (left, right):
        axis.grid(axis="y", color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=90)
    plt.close(figure)
    return True


def run(quick: bool, folder: Path) -> Outcome:
    from solera.weights import greedy_soup, model_stock, soup, task_arithmetic, ties, wise_ft

    digits = Digits()
    every = digits.test
    base_net = digits.fit(network(), digits.x, digits.start, 300, 0.05, NOISE)
    base = weights(base_net)
    differ: dict[str, float] = {}
    ratios: dict[str, float] = {}
    rows: list[list[str]] = []

    def row(name: str, state: State, plain: State | None, call=None, plain_call=None) -> None:
        score = digits.score(state, digits.x, every)
        other = "–"
        if plain is not None:
            differ[name] = apart(state, plain)
            other = f"{digits.score(plain, digits.x, every):.2f}%"
            if call is not None:
                ratios[name] = timed(call, plain_call)
                other += f" ({ratios[name]:.2f}x the time)"
        rows.append([name, f"{score:.2f}%", other])

    # Runs of one task: another order of the data and another rate each.
    steps = 120 if quick else 400
    runs = [
        weights(
            digits.fit(
                copy.deepcopy(base_net), digits.x, digits.tune, steps, 0.02 + 0.015 * k, NOISE
            )
        )
        for k in range(RUNS)
    ]
    single = [digits.score(s, digits.x, every) for s in runs]
    rows.append(["the base", f"{digits.score(base, digits.x, every):.2f}%", ""])
    rows.append([f"{RUNS} fine-tuned runs, mean", f"{sum(single) / RUNS:.2f}%", ""])
    rows.append([f"{RUNS} fine-tuned runs, best on test", f"{max(single):.2f}%", ""])
    row("uniform soup", soup(runs), plain_soup(runs), lambda: soup(runs), lambda: plain_soup(runs))
    greedy, log = greedy_soup(runs, lambda s: digits.score(s, digits.x, digits.check))
    row("greedy soup", greedy, None)
    pair = runs[2:4]
    rows.append(["two runs, mean", f"{(single[2] + single[3]) / 2:.2f}%", ""])
    row(
        "Model Stock of the two", model_stock(base, pair)[0], plain_stock(base, pair),
        lambda: model_stock(base, pair), lambda: plain_stock(base, pair),
    )  # fmt: skip

    # Another camera: the fine-tuned net forgets the first one; between the two lies a better net.
    moved = weights(
        digits.fit(copy.deepcopy(base_net), digits.other, digits.tune, steps, 0.05, 0.1)
    )
    path = wise_ft(base, moved, torch.tensor(ALPHAS))
    plain_path = [{n: (1 - a) * base[n] + a * moved[n] for n in base} for a in ALPHAS]
    differ["WiSE-FT"] = max(
        apart({n: t[i] for n, t in path.items()}, p) for i, p in enumerate(plain_path)
    )
    ratios["WiSE-FT"] = timed(
        lambda: wise_ft(base, moved, torch.tensor(ALPHAS)),
        lambda: [{n: (1 - a) * base[n] + a * moved[n] for n in base} for a in ALPHAS],
    )
    sweep: dict[str, list[float]] = {"first camera": [], "second camera": [], "mean of both": []}
    for i in range(len(ALPHAS)):
        state = {n: t[i] for n, t in path.items()}
        both = [digits.score(state, x, every) for x in (digits.x, digits.other)]
        for values, value in zip(sweep.values(), (*both, sum(both) / 2)):
            values.append(value)
    mean = sweep["mean of both"]
    best = max(range(len(ALPHAS)), key=lambda i: mean[i])
    for name, i in (("base", 0), ("fine-tuned", -1), (f"WiSE-FT, alpha {ALPHAS[best]:.2f}", best)):
        rows.append([f"both cameras, {name}", f"{mean[i]:.2f}%", ""])

    # Two tasks: each run sees one half of the digits and forgets the other.
    tasks, bars = [], {}
    for low in (0, 5):
        mine = digits.tune[(digits.y[digits.tune] >= low) & (digits.y[digits.tune] < low + 5)]
        tasks.append(
            weights(digits.fit(copy.deepcopy(base_net), digits.x, mine, steps // 2, 0.02, NOISE))
        )
    halves = [every[(digits.y[every] < 5) == part] for part in (True, False)]

    def bar(name: str, state: State) -> None:
        bars[name] = tuple(digits.score(state, digits.x, half) for half in halves)

    merged = {
        "task\narithmetic": (
            task_arithmetic(base, tasks, [SCALE] * 2), plain_arithmetic(base, tasks),
        ),
        "TIES": (
            ties(base, tasks, [1.0] * 2, DENSITY, divide="count", scale=SCALE),
            plain_ties(base, tasks, DENSITY),
        ),
    }  # fmt: skip
    for name, state in (("base", base), ("task 1", tasks[0]), ("task 2", tasks[1])):
        bar(name, state)
    for name, (state, plain) in merged.items():
        bar(name, state)
        row(name.replace("\n", " ") + " of two tasks", state, plain)
    bar("mean", soup(tasks))
    row("mean of two tasks", soup(tasks), plain_soup(tasks))
    ratios["TIES"] = timed(
        lambda: ties(base, tasks, [1.0] * 2, DENSITY, divide="count", scale=SCALE),
        lambda: plain_ties(base, tasks, DENSITY),
    )
    for name, task in zip(("digits 0 to 4", "digits 5 to 9"), tasks):
        rows.append([f"run on {name} alone", f"{digits.score(task, digits.x, every):.2f}%", ""])

    pictures = [PICTURE] if draw(sweep, bars, folder / PICTURE) else []
    worst = max(differ.values())
    return Outcome(
        name="merging",
        title=f"{RUNS} fine-tuned runs, two cameras and two tasks of one small net, merged",
        rows=rows,
        ratio=ratios["TIES"],
        agrees=worst < 1e-5,
        problem="" if worst < 1e-5 else f"merged weights differ: {differ}",
        note=f"accuracy on {len(every)} digits; merged weights differ by at most {worst:.1e}; the greedy soup kept "
        f"{len(log.kept)} of {RUNS}; plain torch's time over Solera's: "
        + ", ".join(f"{name} {ratio:.2f}x" for name, ratio in ratios.items())
        + ".",
        numbers={name: ratio for name, ratio in ratios.items()},
        pictures=pictures,
    )
