"""rms_norm with its residual addition inside a compiled residual MLP, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn.functional import linear, rms_norm, silu

from ..case import Case, Spec, compiled_model_spec, model_case

DEPTH, ROWS, WIDTH, HIDDEN = 4, 2048, 512, 256


def model(norm):
    def forward(x, *weights):
        h, branch = x, torch.zeros_like(x)
        for scale, up, down in zip(weights[::3], weights[1::3], weights[2::3]):
            y, h = norm(branch, scale, h)
            branch = linear(silu(linear(y, up)), down)
        return h + branch

    return forward


def ours(branch, scale, h):
    from solera.norm import rms_norm

    return rms_norm(branch, scale, residual=h)


def theirs(branch, scale, h):
    h = h + branch
    return rms_norm(h, scale.shape, scale), h


def specs(device: str) -> Iterator[Spec]:
    def make() -> Case:
        def leaf(*shape: int) -> torch.Tensor:
            scale = 1.0 if len(shape) == 1 else shape[-1] ** -0.5
            return (scale * torch.randn(*shape, device=device)).requires_grad_()

        weights = [leaf(*s) for s in ((WIDTH,), (HIDDEN, WIDTH), (WIDTH, HIDDEN)) * DEPTH]
        x = torch.randn(ROWS, WIDTH, device=device).requires_grad_()
        return model_case(model, ours, theirs, [x, *weights])

    label = f"residual MLP {DEPTH}x{WIDTH}, {ROWS} rows"
    yield compiled_model_spec("norm.rms_norm", label, make)
