"""A soup with learned coefficients inside a compiled MLP: the gradient goes to the coefficients."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn.functional import linear, relu

from ..case import Case, Spec, compiled_model_spec, model_case

MODELS, BATCH, WIDTH = 4, 256, 1024


def model(average):
    def forward(x, coefficients, *tensors):
        lists = [list(tensors[i : i + 3]) for i in range(0, len(tensors), 3)]
        first, bias, second = average(lists, coefficients)
        return linear(relu(linear(x, first, bias)), second)

    return forward


def ours(lists, coefficients):
    from solera.weights import lincomb

    return lincomb(lists, coefficients)


def theirs(lists, coefficients):
    return [sum(c * t for c, t in zip(coefficients, column)) for column in zip(*lists)]


def specs(device: str) -> Iterator[Spec]:
    def make() -> Case:
        shapes = ((WIDTH, WIDTH), (WIDTH,), (WIDTH, WIDTH)) * MODELS
        tensors = [torch.randn(*s, device=device) / WIDTH**0.5 for s in shapes]
        coefficients = torch.full((MODELS,), 1 / MODELS, device=device).requires_grad_()
        x = torch.randn(BATCH, WIDTH, device=device)
        return model_case(model, ours, theirs, [x, coefficients, *tensors])

    label = f"soup of {MODELS} MLPs, width {WIDTH}"
    yield compiled_model_spec("weights.lincomb", label, make)
