"""Benchmark lines of core ensemble_mlp: K perceptrons in one call, beside torch.vmap over stacked modules.

Bytes: forward x, the parameters and the hidden tensors (one a layer, written), y; backward dy, x, the parameters and
the hidden tensors read, the parameters' gradients written. Operations: 2 B K I O a product, one a layer forward and
two backward, less the first layer's dx, which nobody asks for.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import nn

from bench.case import Case, Spec, in_double, step
from solera.ensemble import ensemble_mlp, stack_members


def specs(device: str) -> Iterator[Spec]:
    small = (1024, 64, (64, 64, 64, 10))
    for dtype, target in ((torch.float32, {"vmap": 2.0}), (torch.bfloat16, {})):
        yield _spec(device, dtype, small, True, "relu", target, True)
    yield _spec(device, torch.float32, small, False, "relu", {"vmap": 2.0}, True)
    yield _spec(device, torch.float32, small, True, "gelu", {}, False)
    yield _spec(device, torch.float32, (256, 16, (256, 256, 256, 1)), True, "relu", {}, False)


def _spec(device, dtype, shape, backward, activation, targets, quick) -> Spec:
    B, K, widths = shape
    name = "-".join(str(w) for w in widths)
    label = f"{'fwd+bwd' if backward else 'fwd'} k={K} B={B} {name} {activation}"

    def make() -> Case:
        return _case(device, dtype, shape, backward, activation)

    return Spec("ensemble.ensemble_mlp", label, dtype, make, quick, targets)


def _case(device, dtype, shape, backward, activation) -> Case:
    B, K, widths = shape
    between = {"relu": nn.ReLU, "gelu": nn.GELU}[activation]

    def module() -> nn.Module:
        layers: list[nn.Module] = []
        for i, o in itertools.pairwise(widths):
            layers += [nn.Linear(i, o), between()]
        return nn.Sequential(*layers[:-1]).to(device, dtype)

    members = stack_members([module() for _ in range(K)])
    names, base = list(members), members.base
    x = torch.randn(B, widths[0], device=device).to(dtype)
    parameters = [p.requires_grad_(backward) for p in members.values()]
    grads = (torch.randn(B, K, widths[-1], device=device).to(dtype),) if backward else None
    exact_grads = None if grads is None else (grads[0].double(),)

    def ours(x, *parameters):
        return ensemble_mlp(x, dict(zip(names, parameters)), activation=activation)

    def vmapped(x, *parameters):
        call = lambda p: torch.func.functional_call(base, p, (x,))
        return torch.vmap(call, out_dims=1)(dict(zip(names, parameters)))

    def eager(x, *parameters):
        h = x.expand(K, *x.shape)
        for i in range(0, len(parameters), 2):
            h = torch.baddbmm(parameters[i + 1].unsqueeze(1), h, parameters[i].mT)
            if i + 2 < len(parameters):
                h = getattr(nn.functional, activation)(h)
        return h.transpose(0, 1)

    tensors = (x, *parameters)
    size = torch.finfo(dtype).bits // 8
    hidden = B * K * sum(widths[1:-1])
    numbers = sum(p.numel() for p in parameters)
    products = 2 * B * K * sum(i * o for i, o in itertools.pairwise(widths))
    traffic = x.numel() + numbers + (hidden if backward else 0) + B * K * widths[-1]
    if backward:
        traffic += B * K * widths[-1] + x.numel() + hidden + 2 * numbers
    return Case(
        ours=step(ours, tensors, grads),
        exact=in_double(lambda *t: step(eager, t, exact_grads), tensors),
        eager=step(eager, tensors, grads),
        compiled=step(torch.compile(eager), tensors, grads),
        peers={"vmap": step(vmapped, tensors, grads)},
        bytes=traffic * size,
        flops=(3 if backward else 1) * products
        - (2 * B * K * widths[0] * widths[1] if backward else 0),
        saved_bytes=hidden * size if backward else None,
    )


def small_calls(device: str):
    """Every op once, on awkward shapes."""

    def call(reduce, activation, dtype) -> None:
        torch.manual_seed(0)
        layers = [
            (torch.randn(3, i, o, device=device).to(dtype).requires_grad_(), None)
            for i, o in ((5, 7), (7, 3))
        ]
        x = torch.randn(17, 5, device=device).to(dtype).requires_grad_()
        y = ensemble_mlp(x, layers, activation=activation, reduce=reduce)
        y.backward(torch.randn_like(y))
        with torch.no_grad():
            ensemble_mlp(x, layers, activation=activation, reduce=reduce)

    for dtype in (torch.float32, torch.bfloat16):
        for reduce in (None, "mean"):
            for activation in ("relu", "gelu"):
                name = f"ensemble_mlp {activation} {reduce} {dtype}"
                yield name, lambda a=(reduce, activation, dtype): call(*a)
