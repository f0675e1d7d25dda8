"""GPU kernels of core `anchor`: distances of parameters from anchors, their gradients and steps towards them; the
formulas are in solera/weights/anchor.py.

One launch covers all entries of one combination of dtypes through a pointer table (see _table.py). Bytes an element
in float32 without weights: sums read x and the anchor (8), the gradient writes as well (12). Sums are taken by chunk
in float64 and then, one program an entry, over the chunks in order.

H200 at 4.3 TB/s: 200 x 100k float32, forward and backward 93 us is the floor.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from .._launch import on_device_of
from ..norm.grad_norm import accumulator, config, joined, put_back
from ._table import LANGUAGE_DTYPE, aligned, build, pointer, program_of, size
from .perturb import rounded_to


# A row of the table: x, anchor, weight, start (x again where there is none), the number of elements, the first partial.
@triton.jit
def anchor_sums_kernel(
    rows, programs, partial, X: tl.constexpr, A: tl.constexpr, F: tl.constexpr, S: tl.constexpr,
    WEIGHTED: tl.constexpr, STARTED: tl.constexpr, ACC: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    item, chunk = program_of(programs)
    row = rows + item * 6
    x, a = pointer(row, X, ALIGNED), pointer(row + 1, A, ALIGNED)
    f, s = pointer(row + 2, F, ALIGNED), pointer(row + 3, S, ALIGNED)
    n = size(row + 4, ALIGNED)
    total = tl.full((), 0.0, tl.float64)
    away = total
    for start in range(chunk * CHUNK, tl.minimum(n, (chunk + 1) * CHUNK), BLOCK):
        at = start + tl.arange(0, BLOCK)
        mask = at < n
        anchor = tl.load(a + at, mask=mask, other=0.0).to(ACC)
        d = tl.load(x + at, mask=mask, other=0.0).to(ACC) - anchor
        if WEIGHTED:
            total += tl.sum(tl.load(f + at, mask=mask, other=0.0).to(ACC) * d * d).to(tl.float64)
        else:
            total += tl.sum(d * d).to(tl.float64)
        if STARTED:
            d = tl.load(s + at, mask=mask, other=0.0).to(ACC) - anchor
            away += tl.sum(d * d).to(tl.float64)
    slot = partial + (tl.load(row + 5) + chunk) * 2
    tl.store(slot, total)
    tl.store(slot + 1, away)


# A row: x, anchor, weight (x again where there is none), the result, the number of elements, index of the factor.
@triton.jit
def anchor_step_kernel(
    rows, programs, factors, X: tl.constexpr, A: tl.constexpr, F: tl.constexpr,
    WEIGHTED: tl.constexpr, IN_PLACE: tl.constexpr, ACC: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    item, chunk = program_of(programs)
    row = rows + item * 6
    x, a = pointer(row, X, ALIGNED), pointer(row + 1, A, ALIGNED)
    f, out = pointer(row + 2, F, ALIGNED), pointer(row + 3, X, ALIGNED)
    n = size(row + 4, ALIGNED)
    factor = tl.load(factors + tl.load(row + 5)).to(ACC)
    for start in range(chunk * CHUNK, tl.minimum(n, (chunk + 1) * CHUNK), BLOCK):
        at = start + tl.arange(0, BLOCK)
        mask = at < n
        value = tl.load(x + at, mask=mask, other=0.0).to(ACC)
        d = value - tl.load(a + at, mask=mask, other=0.0).to(ACC)
        if WEIGHTED:
            d *= tl.load(f + at, mask=mask, other=0.0).to(ACC)
        d *= factor
        if IN_PLACE:
            d = value - d
        tl.store(out + at, rounded_to(d, X), mask=mask)


# ---- launchers ---------------------------------------------------------------------------------------


def _entries(op, parameters, *others):
    """Contiguous (x, anchor, weight, start), x itself where a list is empty."""
    lists = [parameters, *(other or parameters for other in others)]
    entries = list(zip(*lists, strict=True))
    if any([t.shape != entry[0].shape for entry in entries for t in entry]):
        raise RuntimeError(f"{op}: the tensors of an entry differ in shape")
    return [[t.contiguous() for t in entry] for entry in entries]


def anchor_sums(parameters, anchors, weights, starts):
    like, settings = parameters[0], config(parameters[0])
    first: list[int] = [0]
    groups: dict = {}
    flat = _entries("anchor_sums", parameters, anchors, weights, starts)
    for entry in flat:
        n = entry[0].numel()
        chunks = triton.cdiv(n, settings["CHUNK"])
        if chunks:
            row = [*(t.data_ptr() for t in entry), n]
            key = (*(t.dtype for t in entry), aligned(row))
            groups.setdefault(key, []).append(([*row, first[-1]], chunks))
        first.append(first[-1] + chunks)
    partial = torch.empty((first[-1], 2), dtype=torch.float64, device=like.device)
    for (x, a, f, s, even), members in groups.items():
        table, programs = build([row for row, _ in members], [n for _, n in members], like)
        with on_device_of(like):
            anchor_sums_kernel[(len(programs),)](
                table, programs, partial, X=LANGUAGE_DTYPE[x], A=LANGUAGE_DTYPE[a],
                F=LANGUAGE_DTYPE[f], S=LANGUAGE_DTYPE[s], WEIGHTED=bool(weights),
                STARTED=bool(starts), ACC=accumulator(x, a, f, s), ALIGNED=even, **settings,
            )  # fmt: skip
    return joined(first, partial, len(flat), 2, 1, torch.float64, like)


def _step(flat, out, factors, weighted, in_place):
    like, settings = flat[0][0], config(flat[0][0])
    groups: dict = {}
    for index, ((x, a, f), y) in enumerate(zip(flat, out)):
        if x.numel():
            row = [x.data_ptr(), a.data_ptr(), f.data_ptr(), y.data_ptr(), x.numel()]
            key = (x.dtype, a.dtype, f.dtype, aligned(row))
            groups.setdefault(key, []).append([*row, 0 if factors.dim() == 0 else index])
    factors = factors.contiguous()
    for (x, a, f, even), rows in groups.items():
        chunks = [triton.cdiv(row[4], settings["CHUNK"]) for row in rows]
        table, programs = build(rows, chunks, like)
        with on_device_of(like):
            anchor_step_kernel[(len(programs),)](
                table, programs, factors, X=LANGUAGE_DTYPE[x], A=LANGUAGE_DTYPE[a],
                F=LANGUAGE_DTYPE[f], WEIGHTED=weighted, IN_PLACE=in_place,
                ACC=accumulator(x, a, f), ALIGNED=even, **settings,
            )  # fmt: skip


def anchor_gradient(parameters, anchors, weights, factors):
    flat = _entries("anchor_gradient", parameters, anchors, weights)
    out = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in parameters]
    if flat:
        _step(flat, out, factors, bool(weights), False)
    return out


def anchor_step_(parameters, anchors, weights, factors):
    flat = _entries("anchor_step_", parameters, anchors, weights)
    if flat:
        out = [entry[0] for entry in flat]
        _step(flat, out, factors, bool(weights), True)
        put_back(parameters, out)


# ---- ahead-of-time compilation -----------------------------------------------------------------------


def aot() -> Iterator:
    """The variants held to tests/budgets.json."""
    from .._aot import AotCase

    pointers = {"rows": "*i64", "programs": "*i64"}
    steps = {"ACC": tl.float32, "ALIGNED": True, "BLOCK": 1024, "CHUNK": 8192}
    for name, dtype in (("float32", tl.float32), ("bfloat16", tl.bfloat16)):
        types = {"X": dtype, "A": dtype, "F": tl.float32}
        for form, weighted, other in (("", False, True), ("weighted_", True, False)):
            yield AotCase(
                name=f"anchor_sums_{form}{name}",
                fn=anchor_sums_kernel,
                signature={**pointers, "partial": "*fp64"},
                constexprs={**types, "S": dtype, "WEIGHTED": weighted, "STARTED": other, **steps},
                divisible_by_16=(*pointers, "partial"),
            )
            yield AotCase(
                name=f"anchor_step_{form}{name}",
                fn=anchor_step_kernel,
                signature={**pointers, "factors": "*fp32"},
                constexprs={**types, "WEIGHTED": weighted, "IN_PLACE": other, **steps},
                divisible_by_16=(*pointers, "factors"),
            )
