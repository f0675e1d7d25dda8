"""Benchmark lines of core particles: resampling and the two steps on 100k particles."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bench.case import Case, Spec, in_double, step
from solera.ensemble import afdps_step, fkc_step, smc_resample


def _resample(count: int, width: int, dtype, device: str) -> Case:
    logw = torch.randn(count, device=device)
    x = torch.randn(count, width, device=device).to(dtype)

    def eager(logw, x):
        w = torch.softmax(logw, 0)
        points = (0.37 + torch.arange(count, device=device, dtype=torch.float64)) / count
        index = torch.searchsorted(w.double().cumsum(0), points, right=True).clamp(max=count - 1)
        ess = 1 / w.square().sum()
        log_z = torch.logsumexp(logw, 0)
        return x.index_select(0, index), w, ess, log_z

    def ours(logw, x):
        out = smc_resample(logw, x, u=0.37)
        return (
            out.particles,
            out.weights,
            out.ess,
            out.log_z + torch.log(torch.tensor(float(count))),
        )

    return Case(
        ours=step(ours, (logw, x)),
        exact=in_double(lambda *t: step(eager, t), (logw, x)),
        eager=step(eager, (logw, x)),
        compiled=step(torch.compile(eager), (logw, x)),
        bytes=2 * x.numel() * x.element_size() + count * 20,
        tolerance=2e-2,  # a boundary between two particles may fall on either side of float32's weights
    )


def _step(kind: str, count: int, width: int, dtype, device: str) -> Case:
    new = lambda *s: torch.randn(*s, device=device).to(dtype)
    x, a, b, noise = new(count, width), new(count, width), new(count, width), new(count, width)
    scores = torch.stack([a, b])

    def fkc(x, scores, noise):
        s0, s1 = scores
        S = -1.5 * s0 + 2.5 * s1
        y = x + S * 0.01 + 0.1 * noise
        rate = 0.5 * (S.square().sum(-1) + 1.5 * s0.square().sum(-1) - 2.5 * s1.square().sum(-1))
        return y, rate * 0.01

    def afdps(x, b, g, noise):
        y = x + (b - g) * 0.01 + 0.1 * noise
        return y, (0.5 * g.square().sum(-1) - (b * g).sum(-1)) * 0.01

    if kind == "fkc":
        inputs, eager = (x, scores, noise), fkc
        ours = lambda x, s, n: fkc_step(x, s, [-1.5, 2.5], 0.0, 1.0, 0.01, n)
    else:
        inputs, eager = (x, a, b, noise), afdps
        ours = lambda x, a, b, n: afdps_step(x, a, b, None, 1.0, 0.01, n)
    return Case(
        ours=step(ours, inputs),
        exact=in_double(lambda *t: step(eager, t), inputs),
        eager=step(eager, inputs),
        compiled=step(torch.compile(eager), inputs),
        bytes=5 * x.numel() * x.element_size() + count * 4,
    )


def specs(device: str) -> Iterator[Spec]:
    f32, bf16 = torch.float32, torch.bfloat16
    yield Spec(
        op="ensemble.smc_resample",
        label="100k x 64",
        dtype=f32,
        make=lambda: _resample(100_000, 64, f32, device),
        targets={"eager": 5},
    )
    for kind in ("fkc", "afdps"):
        for dtype in (f32, bf16):
            yield Spec(
                op=f"ensemble.{kind}_step",
                label="100k x 64",
                dtype=dtype,
                make=lambda kind=kind, dtype=dtype: _step(kind, 100_000, 64, dtype, device),
                quick=dtype == f32,
            )
