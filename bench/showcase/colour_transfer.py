"""Colour transfer between scikit-learn's two photographs by entropic optimal transport.

1,024 colours of each photograph are matched by Sinkhorn. A pixel of colour x then moves to the entropic
map's T(x) = sum_j w_j y_j with w = softmax_j(log b_j + (g_j - |x - y_j|^2) / epsilon), which on the sampled
colours is the plan's barycentre (Pooladian, Niles-Weed, 2021).
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from . import Outcome, median_ratio, pyplot, seconds

COLOURS, EPSILON, ITERATIONS = 1024, 0.02, 100
PICTURE = "colour_transfer.png"


def plain_sinkhorn(cost: Tensor, epsilon: float, iterations: int) -> tuple[Tensor, Tensor]:
    """Log-domain Sinkhorn with uniform marginals, as it is written with torch.logsumexp."""
    n, m = cost.shape
    f, g = cost.new_zeros(n), cost.new_zeros(m)
    for _ in range(iterations):
        f = -epsilon * (torch.logsumexp((g - cost) / epsilon, 1) - math.log(m))
        g = -epsilon * (torch.logsumexp((f[:, None] - cost) / epsilon, 0) - math.log(n))
    return f, g


def exact_sinkhorn(cost: Tensor, epsilon: float, iterations: int) -> Tensor:
    """g by matrix scaling in float64, where exp(-cost / epsilon) does not underflow."""
    kernel = torch.exp(-cost.double() / epsilon)
    n, m = cost.shape
    v = kernel.new_ones(m)
    for _ in range(iterations):
        u = m / (kernel @ v)
        v = n / (kernel.T @ u)
    return epsilon * v.log()


def squared_distance(x: Tensor, y: Tensor) -> Tensor:
    return (x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T).clamp_min(0)


def entropic_map(x: Tensor, y: Tensor, g: Tensor) -> Tensor:
    parts = [
        torch.softmax((g - squared_distance(part, y)) / EPSILON, 1) @ y for part in x.split(16384)
    ]
    return torch.cat(parts)


def recolour(image: Tensor, y: Tensor, g: Tensor) -> Tensor:
    """The map on every pixel, computed once for each colour that occurs (of 64 a channel)."""
    coarse = (image.reshape(-1, 3) * 63).round().long()
    codes = (coarse[:, 0] * 64 + coarse[:, 1]) * 64 + coarse[:, 2]
    unique, inverse = codes.unique(return_inverse=True)
    colours = torch.stack((unique // 4096, unique // 64 % 64, unique % 64), 1).to(image.dtype) / 63
    moved = entropic_map(colours, y, g) - colours
    return (image.reshape(-1, 3) + moved[inverse]).clamp(0, 1).reshape(image.shape)


def draw(images: list[tuple[str, Tensor]], path: Path) -> bool:
    plt = pyplot()
    if plt is None:
        return False
    figure, axes = plt.subplots(
        1, len(images), figsize=(4 * len(images), 3.1), layout="constrained"
    )
    for axis, (title, image) in zip(axes, images):
        axis.imshow(image.numpy())
        axis.set_title(title, fontsize=10)
        axis.axis("off")
    figure.savefig(path, dpi=90)
    plt.close(figure)
    return True


def run(quick: bool, folder: Path) -> Outcome:
    from sklearn.datasets import load_sample_images

    from solera.sinkhorn import sinkhorn

    source, target = (
        torch.tensor(i, dtype=torch.float32) / 255 for i in load_sample_images().images
    )
    generator = torch.Generator().manual_seed(0)

    def sample(image: Tensor) -> Tensor:
        pixels = image.reshape(-1, 3)
        return pixels[torch.randperm(len(pixels), generator=generator)[:COLOURS]]

    x, y = sample(source), sample(target)
    cost = squared_distance(x, y)
    ours = lambda: sinkhorn(cost, epsilon=EPSILON, max_iterations=ITERATIONS)
    plain = lambda: plain_sinkhorn(cost, EPSILON, ITERATIONS)
    result, (_, plain_g) = ours(), plain()
    exact_g = exact_sinkhorn(cost, EPSILON, ITERATIONS)
    pairs = [(seconds(ours), seconds(plain)) for _ in range(2 if quick else 5)]
    ratio = median_ratio([p[0] for p in pairs], [p[1] for p in pairs])
    exact = entropic_map(x.double(), y.double(), exact_g)
    errors = [float((entropic_map(x, y, g) - exact).abs().max()) for g in (result.g, plain_g)]
    images = [recolour(source, y, g) for g in (result.g, plain_g)]
    apart = float((images[0] - images[1]).abs().max())
    agrees = apart < 1e-2 and errors[0] < max(2 * errors[1], 1e-4)

    def statistics(image: Tensor) -> str:
        return " ".join(f"{v:.3f}" for v in image.reshape(-1, 3).mean(0).tolist())

    titles = ("china.jpg", "flower.jpg", "china in flower's colours", "flower in china's colours")
    back = recolour(target, x, result.f)
    drawn = draw(list(zip(titles, (source, target, images[0], back))), folder / PICTURE)
    marginal = float(result.marginal_error)
    return Outcome(
        name="colour_transfer",
        title="Colour transfer between china.jpg and flower.jpg by Sinkhorn",
        rows=[
            [f"{COLOURS} x {COLOURS}, {ITERATIONS} iterations, time", "1x", f"{ratio:.2f}x"],
            ["largest error of the map against float64", f"{errors[0]:.1e}", f"{errors[1]:.1e}"],
            ["mean colour of china.jpg (r g b)", statistics(source), statistics(source)],
            ["mean colour of the result", statistics(images[0]), statistics(images[1])],
            ["mean colour of flower.jpg, wanted", statistics(target), statistics(target)],
        ],
        ratio=ratio,
        agrees=agrees,
        problem="" if agrees else f"pixels differ by {apart:.2g}, map errors {errors}",
        note=f"The pixels of the two results differ by at most {apart:.1e}; epsilon {EPSILON}, the "
        f"plan's row sums are {marginal:.1e} from uniform (L1).",
        numbers={"pixel_difference": apart, "map_error": errors[0], "plain_map_error": errors[1]},
        pictures=[PICTURE] if drawn else [],
    )
