"""Benchmark lines of core member_linear: K linear layers with separate weights, beside eager torch and tabm.

Bytes: forward x, the weights and bias read, y written; backward dy, x and the parameters read, dx and
the parameters' gradients written. Operations: 2 B K I O a product, one forward and two backward.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bench.case import Case, Spec, in_double, step
from solera.ensemble import ensemble_linear


def eager(x, weight, bias):
    return (x.transpose(0, 1) @ weight).transpose(0, 1) + bias


def specs(device: str) -> Iterator[Spec]:
    main = (256, 32, 512, 512)
    for dtype in (torch.float32, torch.bfloat16):
        for shape in (main, (1, 32, 512, 512)):
            yield _spec(device, dtype, shape, True, {}, quick=False)
    yield _spec(device, torch.float32, (256, 32, 512, 10), True, {}, quick=False)


def _spec(device, dtype, shape, backward, targets, quick) -> Spec:
    B, K, I, O = shape
    label = f"{'fwd+bwd' if backward else 'fwd'} k={K} B={B} {I}x{O}"

    def make() -> Case:
        return _case(device, dtype, shape, backward)

    return Spec("ensemble.ensemble_linear", label, dtype, make, quick, targets)


def _case(device, dtype, shape, backward) -> Case:
    B, K, I, O = shape

    def random(*size, scale=1.0):
        return (torch.randn(*size, device=device) * scale).to(dtype).requires_grad_(backward)

    x, bias = random(B, K, I), random(K, O)
    tensors = (x, random(K, I, O, scale=I**-0.5), bias)
    grads = (torch.randn(B, K, O, device=device).to(dtype),) if backward else None
    exact_grads = None if grads is None else (grads[0].double(),)
    peers = {}
    try:
        import tabm

        module = tabm.LinearEnsemble(I, O, k=K, device=device, dtype=dtype)
        names = ("weight", "bias")
        for key, value in zip(names, tensors[1:]):
            setattr(module, key, torch.nn.Parameter(value.detach().clone(), requires_grad=backward))
        own = (x, *(getattr(module, key) for key in names))
        peers["tabm"] = step(lambda x, *_: module(x), own, grads)
    except ImportError:
        pass
    size = torch.finfo(dtype).bits // 8
    parameters = sum(t.numel() for t in tensors[1:])
    traffic = x.numel() + parameters + B * K * O
    if backward:
        traffic += B * K * O + 2 * x.numel() + 2 * parameters
    return Case(
        ours=step(ensemble_linear, tensors, grads),
        exact=in_double(lambda *t: step(eager, t, exact_grads), tensors),
        eager=step(eager, tensors, grads),
        compiled=step(torch.compile(eager), tensors, grads),
        peers=peers,
        bytes=traffic * size,
        flops=(6 if backward else 2) * B * K * I * O,
        saved_bytes=(x.numel() + parameters) * size if backward else None,
        # Rows are padded to the 16-row product, whose bits do not depend on the batch: its sums of 512 run
        # one after another, as eager's do from 16 rows on, while eager's product of one row splits them.
        tolerance=3.5e-7 if dtype == torch.float32 and B < 16 else None,
    )
