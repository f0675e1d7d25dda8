"""Two point sets made from scikit-learn's photographs, matched by optimal transport and the matching drawn.

Points are drawn from each photograph in proportion to how strongly the picture changes there (its edges), so that a
cloud is a sketch of its photograph. Every point of the one moves to its barycentric projection, the mean of where the
plan sends it; at a small epsilon that is close to the optimal one-to-one matching.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from . import Outcome, median_ratio, pyplot, seconds
from .colour_transfer import plain_sinkhorn, squared_distance

POINTS, EPSILON, ITERATIONS = 800, 3e-3, 120
PICTURE = "point_matching.png"


def sketch(image: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` points of [0, 1]^2 where the image has edges, y upwards."""
    light = image.mean(-1)
    change = (light[1:, 1:] - light[:-1, 1:]).abs() + (light[1:, 1:] - light[1:, :-1]).abs()
    picks = torch.multinomial(change.flatten() ** 1.5, count, generator=generator)
    height, width = change.shape
    points = torch.stack((picks % width, height - 1 - picks // width), 1).float()
    return (points + torch.rand(count, 2, generator=generator)) / max(height, width)


def draw(x: Tensor, y: Tensor, moved: Tensor, path: Path) -> bool:
    plt = pyplot()
    if plt is None:
        return False
    figure, axes = plt.subplots(1, 4, figsize=(15, 3.2), layout="constrained")
    lines = torch.stack((x, moved), 1)[:: max(1, len(x) // 300)]
    for axis, title in zip(axes, ("china.jpg", "flower.jpg", "matching", "half way")):
        axis.set_title(title, fontsize=10)
        axis.set_aspect("equal")
        axis.axis("off")
    axes[0].scatter(*x.T, s=2, color="tab:blue")
    axes[1].scatter(*y.T, s=2, color="tab:red")
    axes[2].plot(*lines.permute(2, 1, 0), color="0.6", linewidth=0.5)
    axes[2].scatter(*lines[:, 0].T, s=3, color="tab:blue")
    axes[2].scatter(*lines[:, 1].T, s=3, color="tab:red")
    axes[3].scatter(*((x + moved) / 2).T, s=2, color="tab:purple")
    figure.savefig(path, dpi=90)
    plt.close(figure)
    return True


def optimal_cost(cost: Tensor) -> float | None:
    """The mean cost of the best one-to-one matching, where scipy is there to find it."""
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        return None
    rows, columns = linear_sum_assignment(cost.double().numpy())
    return float(cost.double()[torch.as_tensor(rows), torch.as_tensor(columns)].mean())


def run(quick: bool, folder: Path) -> Outcome:
    from sklearn.datasets import load_sample_images

    from solera.sinkhorn import sinkhorn_points

    images = [torch.tensor(i, dtype=torch.float32) / 255 for i in load_sample_images().images]
    generator = torch.Generator().manual_seed(0)
    x, y = (sketch(image, POINTS, generator) for image in images)

    def ours() -> tuple[Tensor, Tensor]:
        result = sinkhorn_points(x, y, epsilon=EPSILON, max_iterations=ITERATIONS)
        return result.barycentric_projection(), result.transport_cost()

    def plain(x: Tensor = x, y: Tensor = y) -> tuple[Tensor, Tensor]:
        cost = squared_distance(x, y)
        f, g = plain_sinkhorn(cost, EPSILON, ITERATIONS)
        plan = torch.exp((f[:, None] + g - cost) / EPSILON - 2 * math.log(POINTS))
        return plan @ y / plan.sum(1, keepdim=True), (plan * cost).sum()

    moved, moved_cost = ours()
    theirs, _ = plain()
    exact, exact_cost = plain(x.double(), y.double())
    pairs = [(seconds(ours), seconds(plain)) for _ in range(1 if quick else 3)]
    ratio = median_ratio([p[0] for p in pairs], [p[1] for p in pairs])
    errors = [float((t - exact).abs().max()) for t in (moved, theirs)]
    agrees = errors[0] < max(2 * errors[1], 1e-3)
    best = optimal_cost(squared_distance(x.double(), y.double()))
    drawn = draw(x, y, moved, folder / PICTURE)
    rows = [
        [f"{POINTS} points each, {ITERATIONS} iterations, time", "1x", f"{ratio:.2f}x"],
        [
            "largest error of a matched point against float64",
            f"{errors[0]:.1e}",
            f"{errors[1]:.1e}",
        ],
        [
            "mean squared distance moved by the plan",
            f"{float(moved_cost):.5f}",
            f"{float(exact_cost):.5f}",
        ],
    ]
    if best is not None:
        rows.append(["that of the best one-to-one matching", f"{best:.5f}", f"{best:.5f}"])
    return Outcome(
        name="point_matching",
        title="Points of china.jpg matched to points of flower.jpg",
        rows=rows,
        ratio=ratio,
        agrees=agrees,
        problem="" if agrees else f"matched points differ from float64 by {errors}",
        note=f"Epsilon {EPSILON}; Solera never holds the {POINTS} x {POINTS} costs.",
        numbers={"error": errors[0], "plain_error": errors[1], "cost": float(moved_cost)},
        pictures=[PICTURE] if drawn else [],
    )
