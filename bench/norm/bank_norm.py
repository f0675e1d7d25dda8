"""Benchmark lines of core bank_norm: a tenth of the paper-size problem's queries and bank."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bench.case import Case, Spec, in_double, step
from solera.norm import querybank_norm, querybank_norm_embed

BETA, CHUNK = 20.0, 1024


def _embed(k: int | None):
    def f(queries: Tensor, bank: Tensor, gallery: Tensor):
        return querybank_norm_embed(
            queries, bank, gallery, beta=BETA, dynamic=True, normalize=False, k=k
        )

    return f


def _chunked(k: int | None):
    """What a careful user writes: the bank a chunk at a time, the rest in place where it can be."""

    def f(queries: Tensor, bank: Tensor, gallery: Tensor):
        active = torch.zeros(len(gallery), dtype=torch.bool, device=gallery.device)
        parts = []
        for rows in bank.split(CHUNK):
            s = rows @ gallery.T
            active[s.argmax(1)] = True
            parts.append(torch.logsumexp(s.mul_(BETA), 0))
        lse = torch.logsumexp(torch.stack(parts), 0)
        found = []
        for rows in queries.split(CHUNK):
            s = rows @ gallery.T
            use = active[s.argmax(1)][:, None]
            s = torch.where(use, BETA * s - lse, s)
            found.append(s if k is None else torch.topk(s, k, dim=1).values)
        return torch.cat(found)

    return f


def _case(device: str, sizes: tuple[int, int, int], k: int | None) -> Case:
    queries, bank, gallery = sizes
    d = 256
    unit = lambda n: torch.nn.functional.normalize(torch.randn(n, d, device=device))
    inputs = (unit(queries), unit(bank), unit(gallery))
    ours, eager = _embed(k), _chunked(k)
    first = (lambda *t: ours(*t)[0]) if k else ours
    return Case(
        ours=step(first, inputs),
        exact=in_double(lambda *t: step(eager, t), inputs),
        eager=step(eager, inputs),
        bytes=4 * (d * sum(sizes) + queries * (gallery if k is None else 2 * k)),
        flops=2 * d * gallery * (bank + queries),
    )


def _given(device: str) -> Case:
    s, bank = torch.randn(512, 8192, device=device), torch.randn(4096, 8192, device=device)

    def eager(s: Tensor, bank: Tensor):
        return BETA * s - torch.logsumexp(BETA * bank, 0)

    return Case(
        ours=step(lambda s, b: querybank_norm(s, b, beta=BETA), (s, bank)),
        exact=in_double(lambda *t: step(eager, t), (s, bank)),
        eager=step(eager, (s, bank)),
        compiled=step(torch.compile(eager), (s, bank)),
        bytes=4 * (2 * s.numel() + bank.numel()),
        written=4 * s.numel(),
    )


def specs(device: str) -> Iterator[Spec]:
    sizes = (5000, 20000, 50000) if device == "cuda" else (500, 2000, 50000)
    for k in (None, 10):
        size = "x".join(map(str, sizes))
        yield Spec(
            op="norm.querybank_norm_embed",
            label=f"dynamic {size} d256" + (f" top {k}" if k else ""),
            dtype=torch.float32,
            make=lambda k=k: _case(device, sizes, k),
            targets={"eager": 1.2},
            quick=False,
            notes="queries x bank x gallery; the product is the floor",
        )
    yield Spec(
        op="norm.querybank_norm",
        label="given 512x8192, bank 4096x8192",
        dtype=torch.float32,
        make=lambda: _given(device),
        quick=False,
    )
