"""Benchmark lines of core adapters: rows of many LoRA adapters over one frozen layer.

Beside a loop over the adapters, the gathered factors with a batched product, and the layer alone (what the
adapters cost on top of it). Bytes: forward x, W, y and the factors once; backward dy, W, x, dx, the factors
and their gradients once. Operations: 2 N I O a product (forward, dx), 2 N r (I + O) for the branches,
twice that backward.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn import functional as F

from bench.case import Case, Spec, in_double, step
from solera.ensemble import moe_ffn, multi_lora_linear

SCALING = 2.0


def loop(x, weight, a, b, index):
    y = F.linear(x, weight)
    for e in range(a.shape[0]):
        rows = (index == e).nonzero().squeeze(1)
        y = y.index_add(0, rows, SCALING * (x[rows] @ a[e].T) @ b[e].T)
    return y


def gather(x, weight, a, b, index):
    z = torch.bmm(a[index], x.unsqueeze(2))
    return F.linear(x, weight) + SCALING * torch.bmm(b[index], z).squeeze(2)


def specs(device: str) -> Iterator[Spec]:
    for dtype in (torch.float32, torch.bfloat16):
        targets = (
            {"eager": 1.05, "gather+bmm": 1.6, "layer alone": 0.8}
            if dtype == torch.float32
            else {"eager": 1.3, "gather+bmm": 3, "layer alone": 0.8}
        )
        yield _spec(device, dtype, (2048, 16, 16, 4096, 4096), True, targets)
        yield _spec(device, dtype, (2048, 16, 16, 4096, 4096), False, {})
        yield _spec(device, dtype, (64, 16, 16, 4096, 4096), True, {})
        yield Spec(
            "ensemble.moe_ffn",
            "fwd+bwd N=2048 E=64 top 8 D=512 f=128",
            dtype,
            lambda dtype=dtype: _moe(device, dtype, (2048, 64, 8, 512, 128)),
            quick=False,
        )


def _spec(device, dtype, shape, backward, targets) -> Spec:
    N, E, r, I, O = shape
    label = f"{'fwd+bwd' if backward else 'fwd'} N={N} E={E} r={r} {I}x{O}"
    return Spec(
        "ensemble.multi_lora_linear",
        label,
        dtype,
        lambda: _case(device, dtype, shape, backward),
        N == 64 and dtype == torch.float32,
        targets,
    )


def _case(device, dtype, shape, backward) -> Case:
    N, E, r, I, O = shape

    def random(*size, scale=1.0, grad=backward):
        return (torch.randn(*size, device=device) * scale).to(dtype).requires_grad_(grad)

    x, weight = random(N, I), random(O, I, scale=I**-0.5, grad=False)
    a, b = random(E, r, I, scale=I**-0.5), random(E, O, r)
    index = torch.randint(0, E, (N,), device=device)
    tensors = (x, weight, a, b)
    grads = (torch.randn(N, O, device=device).to(dtype),) if backward else None
    exact_grads = None if grads is None else (grads[0].double(),)

    def over(function):
        return lambda *t: function(*t, index)

    def ours(x, weight, a, b):
        return multi_lora_linear(x, weight, a, b, index=index, scaling=SCALING)

    parameters = a.numel() + b.numel()
    traffic = N * (I + O) + I * O + parameters
    if backward:
        traffic += N * (O + 2 * I) + I * O + 2 * parameters
    products = 2 * N * I * O * (2 if backward else 1)
    return Case(
        ours=step(ours, tensors, grads),
        exact=in_double(lambda *t: step(over(loop), t, exact_grads), tensors),
        eager=step(over(loop), tensors, grads),
        peers={
            "gather+bmm": step(over(gather), tensors, grads),
            "layer alone": step(lambda x, w, *_: F.linear(x, w), (x, weight), grads),
        },
        bytes=traffic * dtype.itemsize,
        flops=products + 2 * N * r * (I + O) * (3 if backward else 1),
    )


def _moe(device, dtype, shape) -> Case:
    N, E, k, D, f = shape

    def random(*size, scale=1.0):
        return (torch.randn(*size, device=device) * scale).to(dtype).requires_grad_()

    tensors = (
        random(N, D),
        random(N, E),
        random(E, f, D, scale=D**-0.5),
        random(E, D, f, scale=f**-0.5),
    )
    grads = (torch.randn(N, D, device=device).to(dtype),)

    def eager(x, logits, w1, w2):
        p, index = logits.softmax(-1).topk(k)
        y = torch.zeros_like(x)
        for e in range(E):
            rows, slots = (index == e).nonzero(as_tuple=True)
            h = F.gelu(x[rows] @ w1[e].T) @ w2[e].T
            y = y.index_add(0, rows, h * p[rows, slots].unsqueeze(1))
        return y

    parameters = 2 * E * D * f
    return Case(
        ours=step(lambda *t: moe_ffn(*t, k), tensors, grads),
        exact=in_double(lambda *t: step(eager, t, (grads[0].double(),)), tensors),
        eager=step(eager, tensors, grads),
        bytes=(5 * N * D + 3 * parameters) * dtype.itemsize,
        flops=3 * 4 * N * k * D * f,
    )
