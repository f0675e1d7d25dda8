"""A generator of points in the plane, trained with the Sinkhorn divergence to a photograph's sketch; its frames drawn.

The target is a cloud of points on the edges of flower.jpg (`point_matching.sketch`). A small network maps noise to
points; the loss is the debiased divergence between a batch of its points and a batch of the target's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from . import Outcome, pyplot, seconds
from .colour_transfer import squared_distance
from .point_matching import sketch

TARGET, BATCH, EPSILON, ITERATIONS = 4000, 192, 5e-3, 40
PICTURE = "generative_points.png"
FRAMES = 6


def network() -> torch.nn.Sequential:
    torch.manual_seed(0)
    layers: list[torch.nn.Module] = []
    for a, b in ((2, 128), (128, 128), (128, 128)):
        layers += [torch.nn.Linear(a, b), torch.nn.SiLU()]
    return torch.nn.Sequential(*layers, torch.nn.Linear(128, 2))


def _value(x: Tensor, y: Tensor) -> Tensor:
    """The regularised cost of one pair, every iteration recorded by autograd, as one writes it in plain torch."""
    cost = squared_distance(x, y)
    n, m = cost.shape
    f, g = cost.new_zeros(n), cost.new_zeros(m)
    for _ in range(ITERATIONS):
        f = -EPSILON * (torch.logsumexp((g - cost) / EPSILON, 1) - math.log(m))
        g = -EPSILON * (torch.logsumexp((f[:, None] - cost) / EPSILON, 0) - math.log(n))
    return f.mean() + g.mean()


def plain_divergence(x: Tensor, y: Tensor) -> Tensor:
    return _value(x, y) - (_value(x, x) + _value(y, y)) / 2


def train(divergence: Callable, target: Tensor, steps: int) -> tuple[list[float], list[Tensor]]:
    """(the loss at every step, points of the generator at FRAMES steps)."""
    generator = torch.Generator().manual_seed(1)
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    show = torch.randn(2000, 2, generator=torch.Generator().manual_seed(2))
    shown = {round(k * (steps - 1) / (FRAMES - 1)) for k in range(FRAMES)}
    losses, frames = [], []
    for k in range(steps):
        z = torch.randn(BATCH, 2, generator=generator)
        real = target[torch.randint(len(target), (BATCH,), generator=generator)]
        loss = divergence(model(z), real)
        if k in shown:
            with torch.no_grad():
                frames.append(model(show))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, frames


def draw(frames: list[Tensor], target: Tensor, steps: int, path: Path) -> bool:
    plt = pyplot()
    if plt is None:
        return False
    figure, axes = plt.subplots(
        1, FRAMES + 1, figsize=(2.6 * (FRAMES + 1), 2.2), layout="constrained"
    )
    titles = [f"step {round(k * (steps - 1) / (FRAMES - 1))}" for k in range(FRAMES)]
    for axis, points, title in zip(axes, [*frames, target], [*titles, "target"]):
        axis.scatter(*points.T, s=1, color="tab:red" if title == "target" else "tab:blue")
        axis.set_xlim(-0.1, 1.1)
        axis.set_ylim(-0.1, 0.8)
        axis.set_aspect("equal")
        axis.set_title(title, fontsize=9)
        axis.axis("off")
    figure.savefig(path, dpi=90)
    plt.close(figure)
    return True


def run(quick: bool, folder: Path) -> Outcome:
    from sklearn.datasets import load_sample_images

    from solera.sinkhorn import sinkhorn_divergence

    image = torch.tensor(load_sample_images().images[1], dtype=torch.float32) / 255
    target = sketch(image, TARGET, torch.Generator().manual_seed(0))
    ours = lambda x, y: sinkhorn_divergence(x, y, epsilon=EPSILON, max_iterations=ITERATIONS)
    steps, compared = (150, 3) if quick else (600, 10)
    found: dict = {}
    own = seconds(lambda: found.update(whole=train(ours, target, steps)))
    # Plain torch for a few steps only: its tape makes the whole training minutes long.
    short = seconds(lambda: found.update(ours=train(ours, target, compared)))
    other = seconds(lambda: found.update(plain=train(plain_divergence, target, compared)))
    losses, frames = found["whole"]
    pair = found["ours"][0], found["plain"][0]
    apart = max(abs(a - b) / abs(b) for a, b in zip(*pair))
    agrees = apart < 0.05 and losses[-1] < 0.2 * losses[0]
    drawn = draw(frames, target, steps, folder / PICTURE)
    last = sum(losses[-20:]) / 20
    return Outcome(
        name="generative_points",
        title="A generator of points trained with the Sinkhorn divergence",
        rows=[
            [f"{compared} steps of two batches of {BATCH}, time", "1x", f"{other / short:.2f}x"],
            ["divergence at the first step", f"{pair[0][0]:.4f}", f"{pair[1][0]:.4f}"],
            [f"after {compared} steps", f"{pair[0][-1]:.4f}", f"{pair[1][-1]:.4f}"],
            [f"after {steps} steps ({own:.0f} s)", f"{last:.4f}", "not run"],
        ],
        ratio=other / short,
        agrees=agrees,
        problem=""
        if agrees
        else f"losses {apart:.2g} apart, from {losses[0]:.3g} to {losses[-1]:.3g}",
        note=f"The losses of the first {compared} steps differ by at most {apart:.1e} of themselves: plain torch "
        f"differentiates {ITERATIONS} iterations, Solera the solution.",
        numbers={"loss": last, "apart": apart},
        pictures=[PICTURE] if drawn else [],
    )
