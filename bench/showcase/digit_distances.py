"""How far the ten digits are from each other: Sinkhorn divergences between the classes, as a heat map.

Each class of the digits is a cloud of some 178 images of 64 pixels; the divergence of two clouds compares them as sets,
not by their means. The same matrix in plain torch, from iterations on stored costs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from . import Outcome, pyplot, seconds
from .colour_transfer import plain_sinkhorn, squared_distance

BLUR, ITERATIONS = 1.0, 30  # epsilon is BLUR squared; pixels are scaled to [0, 1]
PICTURE = "digit_distances.png"


def plain_value(x: Tensor, y: Tensor) -> Tensor:
    f, g = plain_sinkhorn(squared_distance(x, y), BLUR**2, ITERATIONS)
    return f.mean() + g.mean()


def divergences(value: Callable[[Tensor, Tensor], Tensor], clouds: list[Tensor]) -> Tensor:
    """OT(x, y) - (OT(x, x) + OT(y, y)) / 2 of every pair; a class with itself is solved once."""
    own = [value(x, x) for x in clouds]
    found = clouds[0].new_zeros(10, 10)
    for i, j in itertools.combinations(range(10), 2):
        found[i, j] = found[j, i] = value(clouds[i], clouds[j]) - (own[i] + own[j]) / 2
    return found


def draw(distances: Tensor, path: Path) -> bool:
    plt = pyplot()
    if plt is None:
        return False
    figure, axis = plt.subplots(figsize=(4.8, 4.2), layout="constrained")
    shown = axis.imshow(distances.numpy(), cmap="viridis")
    for i, j in itertools.product(range(10), repeat=2):
        light = float(distances[i, j]) > 0.6 * float(distances.max())
        axis.text(j, i, f"{distances[i, j]:.1f}", ha="center", va="center", fontsize=7,
                  color="black" if light else "white")  # fmt: skip
    axis.set_xticks(range(10))
    axis.set_yticks(range(10))
    axis.set_title("Sinkhorn divergence between the digits", fontsize=10)
    figure.colorbar(shown, ax=axis, shrink=0.8)
    figure.savefig(path, dpi=90)
    plt.close(figure)
    return True


def run(quick: bool, folder: Path) -> Outcome:
    from sklearn.datasets import load_digits

    from solera.sinkhorn import sinkhorn_points

    data = load_digits()
    images = torch.tensor(data.data, dtype=torch.float32) / 16
    labels = torch.tensor(data.target)
    clouds = [images[labels == digit][: 60 if quick else None] for digit in range(10)]

    def value(x: Tensor, y: Tensor) -> Tensor:
        return sinkhorn_points(x, y, epsilon=BLUR**2, max_iterations=ITERATIONS).cost

    found: dict[str, Tensor] = {}
    ours = seconds(lambda: found.update(ours=divergences(value, clouds)))
    theirs = seconds(lambda: found.update(plain=divergences(plain_value, clouds)))
    exact = divergences(plain_value, [c.double() for c in clouds])
    off = [float((found[k] - exact).abs().max() / exact.max()) for k in ("ours", "plain")]
    agrees = off[0] < max(2 * off[1], 1e-3)
    far = exact + torch.diag(torch.full((10,), math.inf, dtype=exact.dtype))
    near = divmod(int(far.argmin()), 10)
    drawn = draw(found["ours"], folder / PICTURE)
    return Outcome(
        name="digit_distances",
        title="Distances between the ten digits by the Sinkhorn divergence",
        rows=[
            ["45 pairs of classes and 10 of their own, time", "1x", f"{theirs / ours:.2f}x"],
            [
                "largest error against float64, of the largest distance",
                f"{off[0]:.1e}",
                f"{off[1]:.1e}",
            ],
            ["nearest pair", f"{near[0]} and {near[1]}", f"{near[0]} and {near[1]}"],
        ],
        ratio=theirs / ours,
        agrees=agrees,
        problem="" if agrees else f"distances off by {off}",
        note=f"Squared Euclidean cost of pixels in [0, 1], epsilon {BLUR**2:g}, {ITERATIONS} iterations.",
        numbers={"error": off[0], "plain_error": off[1]},
        pictures=[PICTURE] if drawn else [],
    )
