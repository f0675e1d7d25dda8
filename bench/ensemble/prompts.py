"""Benchmark lines of core prompts: scores of prompts beside einsum in chunks of images.

10,000 images, 80 prompts, 1,000 classes of width 512 are 819 GFLOP; the quick lines keep the proportions of a tile
and take a fortieth.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bench.case import Case, Spec, step
from solera.ensemble import prompt_scores

CHUNK = 256  # images whose logits a careful user holds at a time


def chunked(x: Tensor, t: Tensor, bias: Tensor) -> Tensor:
    """The paper's score with the logits of a chunk of images written out."""
    total = torch.zeros(
        len(t), dtype=torch.float64 if x.dtype == torch.float64 else torch.float32, device=x.device
    )
    for rows in x.split(CHUNK):
        logits = torch.einsum("nd,pcd->npc", rows, t) + bias
        total += logits.amax(-1).sum(0, dtype=total.dtype)
    return total / len(x)


def _case(device: str, dtype: torch.dtype, size: tuple[int, int, int, int]) -> Case:
    n, p, c, d = size
    unit = lambda *s: torch.nn.functional.normalize(torch.randn(*s, device=device), dim=-1).to(
        dtype
    )
    x, t = unit(n, d), unit(p, c, d)
    bias = (0.01 * torch.randn(p, c, device=device)).to(dtype)
    inputs = (x, t, bias)

    def exact():
        with torch.no_grad():
            return (chunked(*(v.double() for v in inputs)),)

    return Case(
        ours=step(prompt_scores, inputs),
        exact=exact,
        eager=step(chunked, inputs),
        bytes=x.nbytes + t.nbytes,
        flops=2 * n * p * c * d,
        floor_note="the product",
    )


def specs(device: str) -> Iterator[Spec]:
    full, part = (10000, 80, 1000, 512), (2048, 10, 1000, 512)
    for dtype, target in ((torch.float32, 1.05), (torch.bfloat16, 1.3)):
        for size in (part, full):
            yield Spec(
                op="ensemble.prompt_scores",
                label="x".join(map(str, size[:3])) + f" d{size[3]}",
                dtype=dtype,
                make=lambda dtype=dtype, size=size: _case(device, dtype, size),
                quick=size == part and dtype == torch.float32,
                targets={"eager": target},
            )
