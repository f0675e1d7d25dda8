"""Benchmark lines of core chain."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bench.case import Case, Spec, in_double, step
from solera.weights import givens_chain, givens_merge
from solera.weights.chain import givens_chain_reference


def _blocks(parameters: Tensor) -> Tensor:
    """(d - 1, 2, 2) from angles."""
    if parameters.dim() == 3:
        return parameters
    c, s = parameters.cos(), parameters.sin()
    return torch.stack([c, -s, s, c], 1).view(-1, 2, 2)


def _loop(x: Tensor, parameters: Tensor, merged: bool = False) -> Tensor:
    """What a user writes: every level on the whole row. d is a power of two."""
    rows, d = x.shape
    p, levels, first, width = _blocks(parameters).to(x.dtype), [], 0, 2
    while width <= d:
        levels.append((width, p[first : first + d // width]))
        first, width = first + d // width, 2 * width
    for width, p in reversed(levels) if merged else levels:
        p = p.mT if merged else p
        v = x.view(rows, -1, width)
        a, b = v[..., 0], v[..., width // 2]
        first_out = (p[:, 0, 0] * a + p[:, 0, 1] * b)[..., None]
        second_out = (p[:, 1, 0] * a + p[:, 1, 1] * b)[..., None]
        pieces = [first_out, v[..., 1 : width // 2], second_out, v[..., width // 2 + 1 :]]
        x = torch.cat(pieces, 2).view(rows, d)
    return x


def _halving(x: Tensor, parameters: Tensor, merged: bool = False) -> Tensor:
    """The quickest torch form known: only the columns that a level turns, half as many each time."""
    p = _blocks(parameters).flatten(1).t()
    c = torch.stack([p[0], p[2], p[1], p[3]]) if merged else p
    return givens_chain_reference(x, c, None, merged)


def _case(rows: int, d: int, dtype, device, blocks=False, merged=False, backward=True) -> Case:
    x = torch.randn(rows, d, device=device).to(dtype).requires_grad_(backward)
    p = torch.randn(d - 1, 2, 2, device=device) if blocks else torch.randn(d - 1, device=device)
    if blocks:
        p = torch.linalg.qr(p).Q + 0.01 * torch.randn_like(p)
    p = p.requires_grad_(backward)
    g = [torch.randn(rows, d, device=device).to(dtype)] if backward else None

    def build(function, x: Tensor, p: Tensor):
        grads = None if g is None else [g[0].to(x.dtype)]
        return step(function, (x, p), grads)

    ours = givens_merge if merged else givens_chain
    loop = lambda x, p: _loop(x, p, merged)
    n = rows * d * x.element_size()
    return Case(
        ours=build(ours, x, p),
        exact=in_double(lambda x, p: build(loop, x, p), (x, p)),
        eager=build(loop, x, p),
        compiled=build(torch.compile(loop), x, p),
        peers={"halving": build(lambda x, p: _halving(x, p, merged), x, p)},
        bytes=(5 if backward else 2) * n,
        written=(2 if backward else 1) * n,
    )


def specs(device) -> Iterator[Spec]:
    f32, bf16 = torch.float32, torch.bfloat16
    chain, merge = "weights.givens_chain", "weights.givens_merge"
    goal = {"eager": 10, "halving": 2}
    yield Spec(chain, "fwd+bwd 4096x1024", f32, lambda: _case(4096, 1024, f32, device), True, goal)
    yield Spec(
        chain, "fwd 4096x1024", f32, lambda: _case(4096, 1024, f32, device, backward=False), False
    )
    yield Spec(
        chain, "fwd+bwd 4096x1024", bf16, lambda: _case(4096, 1024, bf16, device), False, goal
    )
    yield Spec(
        chain, "blocks, fwd+bwd 4096x1024", f32, lambda: _case(4096, 1024, f32, device, True), False
    )
    yield Spec(chain, "fwd+bwd 2048x4096", f32, lambda: _case(2048, 4096, f32, device), False, goal)
    yield Spec(
        merge,
        "4096x4096",
        f32,
        lambda: _case(4096, 4096, f32, device, merged=True, backward=False),
        False,
        goal,
    )
