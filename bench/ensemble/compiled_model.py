"""batch_ensemble_linear inside a compiled MLP ensemble, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn.functional import relu

from ..case import Case, Spec, compiled_model_spec, model_case

DEPTH, MEMBERS, BATCH, WIDTH = 3, 32, 128, 256


def model(layer):
    def forward(x, *weights):
        for w, r, s, b in zip(weights[::4], weights[1::4], weights[2::4], weights[3::4]):
            x = layer(x, w, r, s, b)
        return x

    return forward


def ours(x, w, r, s, b):
    from solera.ensemble import batch_ensemble_linear

    return batch_ensemble_linear(x, w, r, s, b, activation="relu")


def theirs(x, w, r, s, b):
    return relu((x * r) @ w.T * s + b)


def specs(device: str) -> Iterator[Spec]:
    def make() -> Case:
        def leaf(*shape: int, scale: float = 1.0) -> torch.Tensor:
            return (scale * torch.randn(*shape, device=device)).requires_grad_()

        weights = []
        for _ in range(DEPTH):
            weights.append(leaf(WIDTH, WIDTH, scale=WIDTH**-0.5))
            weights += [leaf(MEMBERS, WIDTH) for _ in range(3)]
        return model_case(model, ours, theirs, [leaf(BATCH, MEMBERS, WIDTH), *weights])

    label = f"MLP {DEPTH}x{WIDTH}, k={MEMBERS} B={BATCH}"
    yield compiled_model_spec("ensemble.batch_ensemble_linear", label, make)
