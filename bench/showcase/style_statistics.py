"""AdaIN between scikit-learn's two photographs: the statistics of one in the bands of the other.

Each photograph is taken apart into six frequency bands of three opponent colours, undecimated, so that their
sum is the photograph again. AdaIN gives every band of the one the mean and the deviation of the other's band:
colours and contrasts at each scale move, what is where stays. No trained network is needed for that.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from . import Outcome, median_ratio, seconds
from .colour_transfer import draw

LEVELS, EPS = 6, 1e-5
PICTURE = "style_statistics.png"
# Orthonormal opponent colours: light, red against blue, green against the others.
COLOURS = torch.tensor(
    [[3**-0.5] * 3, [2**-0.5, 0.0, -(2**-0.5)], [-(6**-0.5), 2 * 6**-0.5, -(6**-0.5)]]
)


def blur(x: Tensor, step: int) -> Tensor:
    """The cubic spline's five taps, `step` pixels apart, along both axes."""
    taps = x.new_tensor([1, 4, 6, 4, 1]) / 16
    c = x.shape[1]
    for shape, pad in (((1, 1, 1, 5), (0, 2 * step)), ((1, 1, 5, 1), (2 * step, 0))):
        kernel = taps.reshape(shape).expand(c, *shape[1:])
        dilation = tuple(step if extent == 5 else 1 for extent in shape[2:])
        padded = F.pad(x, (pad[1], pad[1], pad[0], pad[0]), mode="reflect")
        x = F.conv2d(padded, kernel, dilation=dilation, groups=c)
    return x


def bands(image: Tensor) -> Tensor:
    """(H, W, 3) -> (1, 3 * LEVELS, H, W), fine to coarse; the sum over levels is the image in COLOURS."""
    rest = torch.einsum("hwc,dc->dhw", image, COLOURS.to(image))[None]
    parts = []
    for level in range(LEVELS - 1):
        smooth = blur(rest, 2**level)
        parts.append(rest - smooth)
        rest = smooth
    return torch.cat([*parts, rest], 1)


def picture(x: Tensor) -> Tensor:
    colours = x.reshape(LEVELS, 3, *x.shape[2:]).sum(0)
    return torch.einsum("dhw,dc->hwc", colours, COLOURS.to(x)).clamp(0, 1)


def plain_adain(content: Tensor, style: Tensor) -> Tensor:
    """AdaIN as its public PyTorch code has it."""
    n, c = content.shape[:2]

    def moments(x: Tensor) -> tuple[Tensor, Tensor]:
        flat = x.view(n, c, -1)
        std = (flat.var(2) + EPS).sqrt().view(n, c, 1, 1)
        return flat.mean(2).view(n, c, 1, 1), std

    (mean, std), (style_mean, style_std) = moments(content), moments(style)
    return (content - mean) / std * style_std + style_mean


def run(quick: bool, folder: Path) -> Outcome:
    from sklearn.datasets import load_sample_images

    from solera.norm import adaptive_instance_norm

    china, flower = (
        torch.tensor(i, dtype=torch.float32) / 255 for i in load_sample_images().images
    )
    content, style = bands(china), bands(flower)
    ours = lambda: adaptive_instance_norm(content, style, eps=EPS)
    plain = lambda: plain_adain(content, style)
    result, other = ours(), plain()
    exact = plain_adain(content.double(), style.double())
    pairs = [(seconds(ours), seconds(plain)) for _ in range(4 if quick else 12)]
    ratio = median_ratio([p[0] for p in pairs], [p[1] for p in pairs])
    errors = [float((r - exact).norm() / exact.norm()) for r in (result, other)]
    agrees = errors[0] <= max(2 * errors[1], 1e-6)

    def deviation(x: Tensor) -> str:
        of_light = x.reshape(LEVELS, 3, *x.shape[2:])[:, 0].std((1, 2))
        return " ".join(f"{v:.3f}" for v in of_light.tolist())

    titles = ("china.jpg", "flower.jpg", "china, flower's statistics", "flower, china's statistics")
    images = [china, flower, picture(result), picture(adaptive_instance_norm(style, content))]
    halfway = picture(adaptive_instance_norm(content, style, alpha=0.5))
    drawn = draw([*zip(titles, images), ("china, half way (alpha 0.5)", halfway)], folder / PICTURE)
    shape = "x".join(map(str, content.shape))
    return Outcome(
        name="style_statistics",
        title="AdaIN style statistics between china.jpg and flower.jpg, band by band",
        rows=[
            [f"AdaIN of {shape}, time", "1x", f"{ratio:.2f}x"],
            ["relative error against float64", f"{errors[0]:.1e}", f"{errors[1]:.1e}"],
            ["deviation of light, fine to coarse: china.jpg", deviation(content), ""],
            ["of the result", deviation(result), deviation(other)],
            ["of flower.jpg, wanted", deviation(style), ""],
        ],
        ratio=ratio,
        agrees=agrees,
        problem="" if agrees else f"errors {errors}",
        note=f"{LEVELS} undecimated spline bands of three opponent colours; no trained network.",
        numbers={"error": errors[0], "plain_error": errors[1]},
        pictures=[PICTURE] if drawn else [],
    )
