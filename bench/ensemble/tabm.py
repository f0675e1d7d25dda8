"""Benchmark lines of core batch_ensemble_mlp: a TabM network, 3 layers of 512, k = 32, beside eager torch and tabm.

x is shared by the members and needs no gradient, as in training. Bytes: forward x and the parameters read, the
products h of each layer written once where backward will read them, y written; backward dy and the h read, the
parameters read and their gradients written. Operations: 2 B K I O a layer forward; backward twice that, less the
product that would give the first layer's dx.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch.nn.functional import relu

from bench.case import Case, Spec, in_double, step
from solera.ensemble import tabm_mlp

DEPTH, WIDTH, MEMBERS = 3, 512, 32


def chain(x, *flat):
    """TabM's backbone as it is written today: five passes around each product."""
    h = x.unsqueeze(1)
    for i in range(0, len(flat), 4):
        weight, r, s, bias = flat[i : i + 4]
        h = relu(h * r @ weight.T * s + bias)
    return h


def ours(x, *flat):
    return tabm_mlp(x, [flat[i : i + 4] for i in range(0, len(flat), 4)])


def specs(device: str) -> Iterator[Spec]:
    both = {
        torch.bfloat16: {"tabm": 2.0, "compile": 2.3},
        torch.float32: {"tabm": 1.25, "compile": 1.35},
    }
    forward = {torch.bfloat16: {"tabm": 2.0}, torch.float32: {"tabm": 1.2}}
    for dtype in (torch.float32, torch.bfloat16):
        yield _spec(device, dtype, 256, WIDTH, True, both[dtype], quick=dtype == torch.float32)
        yield _spec(device, dtype, 256, WIDTH, False, forward[dtype], quick=False)
        yield _spec(device, dtype, 256, 32, True, {}, quick=False)
        yield _spec(device, dtype, 1024, WIDTH, True, {}, quick=False)


def _spec(device, dtype, batch, inputs, backward, targets, quick) -> Spec:
    kind = "fwd+bwd" if backward else "fwd"
    label = f"{kind} {DEPTH}x{WIDTH} k={MEMBERS} B={batch} from {inputs}"

    def make() -> Case:
        return _case(device, dtype, batch, inputs, backward)

    return Spec("ensemble.tabm_mlp", label, dtype, make, quick, targets)


def _case(device, dtype, batch, inputs, backward) -> Case:
    def random(*size, scale=1.0, grad=backward):
        return (torch.randn(*size, device=device) * scale).to(dtype).requires_grad_(grad)

    x, flat = random(batch, inputs, grad=False), []
    operations = 0
    for index in range(DEPTH):
        width = inputs if index == 0 else WIDTH
        flat += [random(WIDTH, width, scale=width**-0.5)]
        flat += [random(MEMBERS, n) for n in (width, WIDTH, WIDTH)]
        products = 1 if not backward else 2 if index == 0 else 3
        operations += products * 2 * batch * MEMBERS * width * WIDTH
    tensors = (x, *flat)
    shape = (batch, MEMBERS, WIDTH)
    grads = (torch.randn(*shape, device=device).to(dtype),) if backward else None
    exact_grads = None if grads is None else (grads[0].double(),)
    peers, compiled = {}, step(torch.compile(chain), tensors, grads)
    try:
        import tabm

        module = tabm.MLPBackboneBatchEnsemble(
            d_in=inputs, n_blocks=DEPTH, d_block=WIDTH, dropout=0.0, k=MEMBERS, tabm_init=True,
            scaling_init="normal", start_scaling_init_chunks=None,
        ).to(device, dtype)  # fmt: skip
        own = []
        for index, block in enumerate(module.blocks):
            for key, value in zip(("weight", "r", "s", "bias"), flat[4 * index : 4 * index + 4]):
                parameter = torch.nn.Parameter(value.detach().clone(), requires_grad=backward)
                setattr(block[0], key, parameter)
                own.append(parameter)

        def run(model: Callable) -> Callable:
            return lambda x, *_: model(x.unsqueeze(1).expand(-1, MEMBERS, -1))

        peers["tabm"] = step(run(module), (x, *own), grads)
        compiled = step(run(torch.compile(module)), (x, *own), grads)
    except ImportError:
        pass
    size = torch.finfo(dtype).bits // 8
    parameters = sum(t.numel() for t in flat)
    rows = batch * MEMBERS * WIDTH
    traffic = x.numel() + parameters + rows
    if backward:
        traffic += x.numel() + 2 * parameters + rows + 2 * DEPTH * rows
    return Case(
        ours=step(ours, tensors, grads),
        exact=in_double(lambda *t: step(chain, t, exact_grads), tensors),
        eager=step(chain, tensors, grads),
        compiled=compiled,
        peers=peers,
        bytes=traffic * size,
        flops=operations,
        saved_bytes=(DEPTH * rows + x.numel() + parameters) * size if backward else None,
    )


def small_calls(device: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """Every kernel once on awkward shapes, for bench.every_op."""

    def call(dtype: torch.dtype, batch: int, x_grad: bool, dropout: float) -> None:
        make = lambda *size: torch.randn(*size, device=device).to(dtype).requires_grad_()
        x = make(batch, 5).detach().requires_grad_(x_grad)
        layers = [
            (make(19, 5), make(3, 5), make(3, 19), make(3, 19)),
            (make(7, 19), None, make(3, 7), make(7)),
        ]
        with torch.no_grad():
            tabm_mlp(x, layers, activation="gelu")
        y = tabm_mlp(x, layers, activation="silu", dropout_p=dropout)
        y.backward(torch.randn_like(y))

    for dtype in (torch.float32, torch.bfloat16):
        for batch, x_grad, dropout in ((3, True, 0.5), (70, False, 0.0)):
            name = f"tabm_mlp {dtype} {batch}"
            yield name, partial(call, dtype, batch, x_grad, dropout)
