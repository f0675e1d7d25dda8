"""Benchmark lines of core moments2."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bench.case import Case, Spec, in_double, step
from solera.norm import class_moments, covariance, gram_pairs, masked_mean_pool_layers


def _covariance(device: str) -> Case:
    x = torch.randn(50000, 768, device=device) + 1
    eager = lambda x: torch.cov(x.T, correction=0)
    return Case(
        ours=step(lambda x: covariance(x)[1], (x,)),
        exact=in_double(lambda *t: step(eager, t), (x,)),
        eager=step(eager, (x,)),
        bytes=4 * (x.numel() + 768 * 768),
        flops=768 * 769 * x.shape[0],
    )


def _classes(device: str, dtype: torch.dtype) -> Case:
    x = torch.randn(50000, 384, device=device).to(dtype)
    labels, classes = torch.randint(0, 100, (50000,), device=device), 100
    acc = torch.float64 if dtype == torch.float64 else torch.float32

    def ours(x: Tensor):
        return class_moments(x, labels, classes)[1:]

    def eager(x: Tensor):
        wide = torch.float64 if x.dtype == torch.float64 else acc
        rows = [x[labels == c].to(wide) for c in range(classes)]
        return torch.stack([r.mean(0) for r in rows]), torch.stack([torch.cov(r.T) for r in rows])

    return Case(
        ours=step(ours, (x,)),
        exact=in_double(lambda *t: step(eager, t), (x,)),
        eager=step(eager, (x,)),
        bytes=x.numel() * x.element_size() + 4 * classes * 384 * 385,
        flops=384 * 385 * x.shape[0],
    )


def _pool(device: str, dtype: torch.dtype) -> Case:
    h = torch.randn(2, 128, 128, 768, device=device).to(dtype)
    length = torch.randint(16, 129, (128, 1), device=device)
    mask = torch.arange(128, device=device) < length

    def eager(h: Tensor):
        m = mask[None, :, :, None].to(h.dtype)
        return ((h * m).sum(2) / m.sum(2)).mean(0)

    kept = 2 * int(mask.sum()) * 768 * h.element_size()
    return Case(
        ours=step(lambda h: masked_mean_pool_layers(h, mask), (h,)),
        exact=in_double(lambda *t: step(eager, t), (h,)),
        eager=step(eager, (h,)),
        compiled=step(torch.compile(eager), (h,)),
        bytes=kept,
        written=128 * 768 * h.element_size(),
        floor_note="the tokens that count, read once",
    )


def _pairs(device: str) -> Case:
    f = torch.randn(16, 384, 32, 32, device=device, requires_grad=True)
    pairs = torch.randint(0, 384, (442, 2), device=device)
    g = torch.randn(16, 442, device=device)

    def eager(f: Tensor):
        rows = f.flatten(2)
        return (rows @ rows.mT)[:, pairs[:, 0], pairs[:, 1]]

    steps = lambda function: lambda *t: step(function, t, [g.to(t[0].dtype)])
    return Case(
        ours=steps(lambda f: gram_pairs(f, pairs))(f),
        exact=in_double(steps(eager), (f,)),
        eager=steps(eager)(f),
        bytes=4 * 3 * f.numel(),
        written=4 * f.numel(),
    )


def specs(device: str) -> Iterator[Spec]:
    f32, bf16 = torch.float32, torch.bfloat16
    yield Spec("norm.covariance", "50000x768", f32, lambda: _covariance(device))
    for dtype in (f32, bf16):
        yield Spec(
            "norm.class_moments",
            "50000x384, 100 classes",
            dtype,
            lambda dtype=dtype: _classes(device, dtype),
            quick=dtype == f32,
        )
        yield Spec(
            "norm.masked_mean_pool_layers",
            "2x128x128x768",
            dtype,
            lambda dtype=dtype: _pool(device, dtype),
        )
    yield Spec("norm.gram_pairs", "fwd+bwd 16x384x32x32, 442 pairs", f32, lambda: _pairs(device))
