"""Margins of a normalised softmax: what replaces the cosine at the label.

A margin is called as `margin(cosine, norms)` with the cosines at the labels and the lengths of the features, both
(B,), and returns the cosines to put in their place. It must map each cosine by itself: statistics that it takes
over the batch are constants. `MadaCos` is the one that also sets the scale: it has a method `adapt`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .. import _check


@dataclass
class CosFace:
    """cos(theta) - m.

    Shapes: cosine (B,), norms (B,) -> (B,).
    """

    m: float = 0.35

    def __call__(self, cosine: Tensor, norms: Tensor) -> Tensor:
        return cosine - self.m


@dataclass
class ArcFace:
    """cos(theta + m); past theta = pi - m, where that would rise again, cos(theta) - m sin(m).

    Shapes: cosine (B,), norms (B,) -> (B,).
    """

    m: float = 0.5

    def __call__(self, cosine: Tensor, norms: Tensor) -> Tensor:
        # sin(theta) by (1 - c)(1 + c), whose slope at |c| = 1 is cut off rather than infinite.
        sine = ((1 - cosine) * (1 + cosine)).clamp(min=1e-12).sqrt()
        turned = cosine * math.cos(self.m) - sine * math.sin(self.m)
        past = cosine <= math.cos(math.pi - self.m)
        return torch.where(past, cosine - self.m * math.sin(self.m), turned)


@dataclass
class AdaFace:
    """cos(theta - m z) - (m + m z), z the feature's length standardised by running statistics and cut to [-1, 1].

    `training` False leaves the statistics as they are. `mean` and `std` are scalar tensors made at the first call.

    Shapes: cosine (B,), norms (B,) -> (B,).
    """

    m: float = 0.4
    h: float = 0.333
    momentum: float = 0.01
    eps: float = 1e-3
    training: bool = True
    mean: Tensor | None = field(default=None, repr=False)
    std: Tensor | None = field(default=None, repr=False)

    def quality(self, norms: Tensor) -> Tensor:
        """z (B,), after the running mean and deviation have taken in these norms."""
        n = norms.detach().clamp(0.001, 100.0)
        if self.mean is None or self.std is None:
            self.mean, self.std = n.new_full((), 20.0), n.new_full((), 100.0)
        if self.training and n.numel() > 1:
            self.mean = self.mean + self.momentum * (n.mean() - self.mean)
            self.std = self.std + self.momentum * (n.std() - self.std)
        return ((n - self.mean) / (self.std + self.eps) * self.h).clamp(-1.0, 1.0)

    def __call__(self, cosine: Tensor, norms: Tensor) -> Tensor:
        z = self.quality(norms)
        theta = cosine.clamp(-1 + self.eps, 1 - self.eps).acos() - self.m * z
        theta = theta.clamp(self.eps, math.pi - self.eps)
        return theta.cos() - (self.m + self.m * z)


@dataclass
class MadaCos:
    """Scale and margin from the batch: the median sample gets probability 1 - alpha, then alpha.

    With t the median cosine at the label and S(s) the sum of e^{s cos} over that sample's other classes:
    s = max(32, log(9999999 (1 - alpha) / alpha) / (1 - t)), margin = max(0, t - log(S(s) alpha / (1 - alpha)) / s),
    0 when not training. Both are constants for the gradient.

    Shapes: cosine (B,) -> (scale (), margin ()).
    """

    alpha: float = 0.1
    training: bool = True

    def adapt(
        self, cosine: Tensor, others: Callable[[Tensor, Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """`others(row, scale)`: the log of S(scale) for sample `row`, a one-element tensor of each."""
        t, row = cosine.detach().median(0)
        odds = math.log(9999999 * (1 - self.alpha) / self.alpha)
        scale = (odds / (1 - t).clamp(min=1e-6)).clamp(min=32.0)
        if not self.training:
            return scale, torch.zeros_like(scale)
        log_sum = others(row.reshape(1), scale.reshape(1))[0]
        margin = t - (log_sum + math.log(self.alpha / (1 - self.alpha))) / scale
        return scale, margin.clamp(min=0.0)


def cosface(m: float = 0.35) -> CosFace:
    """The additive cosine margin cos(theta) - m.

    Shapes: the margin maps (B,) cosines to (B,).

    Source: Wang et al., "CosFace: Large Margin Cosine Loss for Deep Face Recognition", 2018.
    """
    return CosFace(_check.number("m", m))


def arcface(m: float = 0.5) -> ArcFace:
    """The additive angular margin cos(theta + m), kept falling past theta = pi - m.

    Shapes: the margin maps (B,) cosines to (B,).

    Source: Deng et al., "ArcFace: Additive Angular Margin Loss for Deep Face Recognition", 2019.
    """
    return ArcFace(_check.number("m", m, low=0.0, high=math.pi))


def adaface(m: float = 0.4, h: float = 0.333, momentum: float = 0.01) -> AdaFace:
    """AdaFace's margin: angular for poor images, additive for good ones, by the feature's length.

    The object holds the running mean and deviation of the lengths (20 and 100 at first, as in the public code).

    Shapes: the margin maps (B,) cosines and (B,) lengths to (B,).

    Source: Kim, Jain, Liu, "AdaFace: Quality Adaptive Margin for Face Recognition", 2022.
    """
    number = _check.number
    return AdaFace(number("m", m), number("h", h), number("momentum", momentum, low=0.0, high=1.0))


def madacos(alpha: float = 0.1) -> MadaCos:
    """MadaCos: scale and additive margin set by the batch's median sample.

    Shapes: (B,) cosines to a scale () and a margin ().

    Source: Zhu et al., "Coarse-to-Fine: Learning Compact Discriminative Representation for Single-Stage Image
    Retrieval", 2023.
    """
    alpha = _check.number("alpha", alpha, low=0.0, high=1.0)
    if not 0 < alpha < 1:
        raise ValueError(f"alpha: expected a number between 0 and 1, got {alpha!r}")
    return MadaCos(alpha)
