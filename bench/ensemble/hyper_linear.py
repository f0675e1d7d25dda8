"""Benchmark lines of core hyper_linear: a self-tuning network's layer, beside its formula in torch.

Bytes: forward x, h and the parameters read, u = x W_h' and the elementary response written and read again, s, y
written; backward dy and u read, du written and read, and the gradients. Operations: two products of 2 B I O forward,
four backward.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from bench.case import Case, Spec, in_double, step
from solera.ensemble import hyper_linear


def specs(device: str) -> Iterator[Spec]:
    for dtype in (torch.float32, torch.bfloat16):
        yield Spec(
            "ensemble.hyper_linear",
            "fwd+bwd 4096 128x512 m=8",
            dtype,
            lambda dtype=dtype: _case(device, dtype, 4096, 128, 512, 8),
        )


def eager(x, h, weight, hyper_weight, hyper, bias, hyper_bias, scale):
    outputs = weight.shape[0]
    s = F.linear(h, hyper)
    y = F.linear(x, weight, bias) * scale
    return y + s[:, :outputs] * F.linear(x, hyper_weight) + s[:, outputs:] * hyper_bias


def _case(device, dtype, B, I, O, m) -> Case:
    def random(*size, scale=1.0):
        return (torch.randn(*size, device=device) * scale).to(dtype).requires_grad_()

    tensors = (
        random(B, I), random(B, m), random(O, I, scale=I**-0.5), random(O, I, scale=I**-0.5),
        random(2 * O, m), random(O), random(O), random(1),
    )  # fmt: skip
    tensors[-1].requires_grad_(False)  # the gradient of one number is luck to the last bits
    grads = (torch.randn(B, O, device=device).to(dtype),)
    size = torch.finfo(dtype).bits // 8
    traffic = 2 * B * I + 12 * B * O + 4 * I * O
    return Case(
        ours=step(hyper_linear, tensors, grads),
        exact=in_double(lambda *t: step(eager, t, (grads[0].double(),)), tensors),
        eager=step(eager, tensors, grads),
        compiled=step(torch.compile(eager), tensors, grads),
        bytes=traffic * size,
        flops=12 * B * I * O,
    )


def small_calls(device: str):
    """Both ops once: a linear layer, and positions of a convolution, with and without biases."""

    def call(places, biased, dtype) -> None:
        random = lambda *s: torch.randn(*s, device=device).to(dtype).requires_grad_()
        from solera.ensemble.hyper_linear import hyper_gate

        s, bias = random(9, 14 if biased else 7), random(7) if biased else None
        y = hyper_gate(random(9, 7, places), random(9, 7, places), s, bias)
        y.backward(torch.randn_like(y))

    for dtype in (torch.float32, torch.bfloat16):
        for places in (1, 33):
            for biased in (True, False):
                yield (
                    f"hyper_gate {places} {biased} {dtype}",
                    lambda a=(places, biased, dtype): call(*a),
                )
