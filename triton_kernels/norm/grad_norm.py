"""GPU kernels of core `grad_norm`: lists of gradients in a few launches; the formulas are in solera/norm/grad_norm.py.

A launch covers all tensors of one combination of dtypes through a pointer table (see weights/_table.py). Norms and
dots are summed by chunk into float64 and then, one program a tensor, over the chunks in order. Clipping gives a
program whole units; where a unit does not fit into one step its second reading comes from L2.

Bytes: norms and dots read what they are given once; scaling reads and writes the tensors whose factor is not 1
(a program whose factor is 1 reads one number); clipping reads gradient and parameter, and writes what is clipped.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from .._launch import on_device_of
from ..weights._table import LANGUAGE_DTYPE, aligned, build, pointer, program_of, size


@triton.jit
def clipped(x, clip, index, length):
    """x, with entries above clip[0, index] times clip[1, index]."""
    threshold = tl.load(clip + index).to(x.dtype)
    factor = tl.load(clip + length + index).to(x.dtype)
    return tl.where(tl.abs(x) > threshold, x * factor, x)


@triton.jit
def _part(x, ORD: tl.constexpr):
    """What one step adds: a sum, or the largest (NaN if there is one)."""
    if ORD == 0:
        nan = tl.sum(tl.where(x == x, 0.0, x))
        return tl.max(tl.abs(x)).to(tl.float64) + nan.to(tl.float64)
    elif ORD == 1:
        return tl.sum(tl.abs(x)).to(tl.float64)
    else:
        return tl.sum(x * x).to(tl.float64)


@triton.jit
def _join(total, part, ORD: tl.constexpr):
    if ORD == 0:
        nan = tl.where(part == part, 0.0, part) + tl.where(total == total, 0.0, total)
        return tl.maximum(total, part) + nan
    return total + part


# A row of the table: the tensor, the number of elements, its index in the list, its first partial.
@triton.jit
def tensor_norm_kernel(
    rows, programs, clip, partial, length, DTYPE: tl.constexpr, CLIP: tl.constexpr, ORD: tl.constexpr,
    ACC: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    item, chunk = program_of(programs)
    row = rows + item * 4
    data = pointer(row, DTYPE, ALIGNED)
    n = size(row + 1, ALIGNED)
    total = tl.full((), 0.0, tl.float64)
    for start in range(chunk * CHUNK, tl.minimum(n, (chunk + 1) * CHUNK), BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(data + at, mask=at < n, other=0.0).to(ACC)
        if CLIP:
            x = clipped(x, clip, tl.load(row + 2), length)
        total = _join(total, _part(x, ORD), ORD)
    tl.store(partial + tl.load(row + 3) + chunk, total)


# A row: both tensors, the number of elements, the first partial.
@triton.jit
def tensor_dots_kernel(
    rows, programs, partial, A: tl.constexpr, B: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    item, chunk = program_of(programs)
    row = rows + item * 4
    a, b = pointer(row, A, ALIGNED), pointer(row + 1, B, ALIGNED)
    n = size(row + 2, ALIGNED)
    aa = tl.full((), 0.0, tl.float64)
    ab, bb = aa, aa
    for start in range(chunk * CHUNK, tl.minimum(n, (chunk + 1) * CHUNK), BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(a + at, mask=at < n, other=0.0).to(tl.float64)
        y = tl.load(b + at, mask=at < n, other=0.0).to(tl.float64)
        aa += tl.sum(x * x)
        ab += tl.sum(x * y)
        bb += tl.sum(y * y)
    slot = partial + (tl.load(row + 3) + chunk) * 3
    tl.store(slot, aa)
    tl.store(slot + 1, ab)
    tl.store(slot + 2, bb)


@triton.jit
def join_chunks_kernel(
    first, partial, out, length, K: tl.constexpr, ORD: tl.constexpr, C: tl.constexpr
):
    """out[k, item] from the item's chunks, in order: a sum, the largest (ORD 0) or a root (ORD 2)."""
    item = tl.program_id(0)
    begin, end = tl.load(first + item), tl.load(first + item + 1)
    for k in tl.static_range(K):
        total = tl.full((), 0.0, tl.float64)
        for start in range(begin, end, C):
            slot = start + tl.arange(0, C)
            x = tl.load(partial + slot * K + k, mask=slot < end, other=0.0)
            if ORD == 0:
                total = _join(total, _part(x, 0), 0)
            else:
                total += tl.sum(x)
        if ORD == 2:
            total = tl.sqrt(total)
        tl.store(out + k * length + item, total.to(out.dtype.element_ty))


# A row: the tensor, the number of elements, its index in the list.
@triton.jit
def scale_tensors_kernel(
    rows, programs, factors, DTYPE: tl.constexpr, ACC: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    item, chunk = program_of(programs)
    row = rows + item * 3
    factor = tl.load(factors + tl.load(row + 2)).to(ACC)
    if factor != 1.0:
        data = pointer(row, DTYPE, ALIGNED)
        n = size(row + 1, ALIGNED)
        for start in range(chunk * CHUNK, tl.minimum(n, (chunk + 1) * CHUNK), BLOCK):
            at = start + tl.arange(0, BLOCK)
            x = tl.load(data + at, mask=at < n, other=0.0).to(ACC) * factor
            tl.store(data + at, x.to(DTYPE), mask=at < n)


@triton.jit
def _unit_part(x, ORD: tl.constexpr):
    if ORD == 0:
        nan = tl.sum(tl.where(x == x, 0.0, x), 1)
        return tl.max(tl.abs(x), 1) + nan
    elif ORD == 1:
        return tl.sum(tl.abs(x), 1)
    else:
        return tl.sum(x * x, 1)


@triton.jit
def _unit_norm(data, row, columns, units, ORD: tl.constexpr, ACC: tl.constexpr, R: tl.constexpr,
               C: tl.constexpr, ONE: tl.constexpr):  # fmt: skip
    """The norms of R units [R, 1] of `columns` elements each."""
    total = tl.zeros((R,), ACC)
    for start in range(0, C if ONE else columns, C):
        col = start + tl.arange(0, C)[None, :]
        mask = (row < units) & (col < columns)
        x = tl.load(data + row * columns + col, mask=mask, other=0.0).to(ACC)
        total = _join(total, _unit_part(x, ORD), ORD)
    if ORD == 2:
        total = tl.sqrt(total)
    return total[:, None]


# A row: gradient, parameter, units, elements of a unit.
@triton.jit
def clip_units_kernel(
    rows, programs, numbers, G: tl.constexpr, W: tl.constexpr, ORD: tl.constexpr, ACC: tl.constexpr,
    ALIGNED: tl.constexpr, R: tl.constexpr, C: tl.constexpr, ONE: tl.constexpr,
):  # fmt: skip
    item, chunk = program_of(programs)
    entry = rows + item * 4
    g, w = pointer(entry, G, ALIGNED), pointer(entry + 1, W, ALIGNED)
    units, columns = tl.load(entry + 2), size(entry + 3, ALIGNED)
    row = chunk * R + tl.arange(0, R)[:, None]  # [R, 1]
    clip, eps = tl.load(numbers).to(ACC), tl.load(numbers + 1).to(ACC)
    of_w = _unit_norm(w, row, columns, units, ORD, ACC, R, C, ONE)
    of_g = _unit_norm(g, row, columns, units, ORD, ACC, R, C, ONE)
    limit = tl.where(of_w < eps, eps, of_w) * clip  # a NaN stays
    factor = limit / tl.where(of_g < 1e-6, 1e-6, of_g)
    for start in range(0, C if ONE else columns, C):
        col = start + tl.arange(0, C)[None, :]
        mask = (row < units) & (col < columns) & ~(of_g < limit)
        at = row * columns + col
        x = tl.load(g + at, mask=mask, other=0.0).to(ACC) * factor
        tl.store(g + at, x.to(G), mask=mask)


# ---- launchers ---------------------------------------------------------------------------------------


def config(x: torch.Tensor) -> dict[str, int]:
    """Elements a step and a program; larger for the interpreter, which pays by the program."""
    if x.is_cuda:
        return {"BLOCK": 1024, "CHUNK": 8192, "num_warps": 4}
    return {"BLOCK": 4096, "CHUNK": 16384, "num_warps": 4}


def accumulator(*dtypes: torch.dtype) -> tl.dtype:
    return tl.float64 if torch.float64 in dtypes else tl.float32


def wide(tensors) -> torch.dtype:
    return torch.float64 if any([t.dtype == torch.float64 for t in tensors]) else torch.float32


def put_back(tensors, computed) -> None:
    """Contiguous copies that were written, back into their strided tensors."""
    for t, c in zip(tensors, computed):
        if not t.is_contiguous():
            t.copy_(c)


def joined(first, partial, count, width, ord, dtype, like):
    """(width, count) from partials, item by item."""
    out = torch.empty((width, count), dtype=dtype, device=like.device)
    ranges, _ = build([first], [0], like)
    with on_device_of(like):
        join_chunks_kernel[(count,)](ranges, partial, out, count, K=width, ORD=ord, C=256)
    return out


def tensor_norms(tensors, clip, ord):
    if not tensors:
        return torch.empty(0)
    code = 0 if math.isinf(ord) else int(ord)
    like, settings = tensors[0], config(tensors[0])
    first, groups = [0], {}
    flat = [t.contiguous() for t in tensors]
    for index, t in enumerate(flat):
        chunks = triton.cdiv(t.numel(), settings["CHUNK"])
        if chunks:
            key = (t.dtype, aligned((t.data_ptr(), t.numel())))
            row = [t.data_ptr(), t.numel(), index, first[-1]]
            groups.setdefault(key, []).append((row, chunks))
        first.append(first[-1] + chunks)
    partial = torch.empty(first[-1], dtype=torch.float64, device=like.device)
    for (dtype, even), members in groups.items():
        table, programs = build([row for row, _ in members], [n for _, n in members], like)
        with on_device_of(like):
            tensor_norm_kernel[(len(programs),)](
                table, programs, clip, partial, len(flat), DTYPE=LANGUAGE_DTYPE[dtype],
                CLIP=clip is not None, ORD=code, ACC=accumulator(dtype), ALIGNED=even, **settings,
            )  # fmt: skip
    return joined(first, partial, len(flat), 1, code, wide(tensors), like)[0]


def tensor_dots(a, b):
    if any([x.shape != y.shape for x, y in zip(a, b, strict=True)]):
        raise RuntimeError("tensor_dots: two tensors of a pair differ in shape")
    if not a:
        return torch.empty(3, 0, dtype=torch.float64)
    like, settings = a[0], config(a[0])
    first, groups = [0], {}
    flat = [(x.contiguous(), y.contiguous()) for x, y in zip(a, b)]
    for x, y in flat:
        chunks = triton.cdiv(x.numel(), settings["CHUNK"])
        if chunks:
            row = [x.data_ptr(), y.data_ptr(), x.numel()]
            key = (x.dtype, y.dtype, aligned(row))
            groups.setdefault(key, []).append(([*row, first[-1]], chunks))
        first.append(first[-1] + chunks)
    partial = torch.empty((first[-1], 3), dtype=torch.float64, device=like.device)
    for (of_a, of_b, even), members in groups.items():
        table, programs = build([row for row, _ in members], [n for _, n in members], like)
        with on_device_of(like):
            tensor_dots_kernel[(len(programs),)](
                table, programs, partial, A=LANGUAGE_DTYPE[of_a], B=LANGUAGE_DTYPE[of_b],
                ALIGNED=even, **settings,
            )  # fmt: skip
    return joined(first, partial, len(flat), 3, 1, torch.float64, like)


def scale_tensors_(tensors, factors):
    if not tensors:
        return
    settings = config(tensors[0])
    factors = factors.contiguous()
    flat = [t.contiguous() for t in tensors]
    groups: dict = {}
    for index, t in enumerate(flat):
        if t.numel():
            row = [t.data_ptr(), t.numel()]
            groups.setdefault((t.dtype, aligned(row)), []).append([*row, index])
    for (dtype, even), rows in groups.items():
        chunks = [triton.cdiv(row[1], settings["CHUNK"]) for row in rows]
        table, programs = build(rows, chunks, flat[0])
        with on_device_of(flat[0]):
            scale_tensors_kernel[(len(programs),)](
                table, programs, factors, DTYPE=LANGUAGE_DTYPE[dtype], ACC=accumulator(dtype),
                ALIGNED=even, **settings,
            )  # fmt: skip
    put_back(tensors, flat)


WIDTHS = (32, 256, 2048)  # elements a step takes of a unit
TILE = 4096  # elements of all units a step takes


def clip_units_(grads, parameters, clip, eps, ord):
    if any([g.shape != w.shape for g, w in zip(grads, parameters, strict=True)]):
        raise RuntimeError("clip_units_: a parameter differs in shape from its gradient")
    flat = [(g.contiguous(), w.contiguous()) for g, w in zip(grads, parameters)]
    groups: dict = {}
    for g, w in flat:
        if g.numel() == 0:
            continue
        units = 1 if g.dim() < 2 else g.shape[0]
        columns = g.numel() // units
        width = next((c for c in WIDTHS if columns <= c), WIDTHS[-1])
        even = aligned((g.data_ptr(), w.data_ptr(), columns))
        key = (g.dtype, w.dtype, width, columns <= width, even)
        groups.setdefault(key, []).append([g.data_ptr(), w.data_ptr(), units, columns])
    if not groups:
        return
    like = grads[0]
    # Two float64 numbers: as plain ones they would be rounded to float32.
    numbers, _ = build([torch.tensor([clip, eps], dtype=torch.float64).view(torch.int64).tolist()],
                       [0], like)  # fmt: skip
    for (of_g, of_w, width, one, even), rows in groups.items():
        height = TILE // width
        table, programs = build(rows, [triton.cdiv(row[2], height) for row in rows], like)
        with on_device_of(like):
            clip_units_kernel[(len(programs),)](
                table, programs, numbers.view(torch.float64), G=LANGUAGE_DTYPE[of_g],
                W=LANGUAGE_DTYPE[of_w], ORD=0 if math.isinf(ord) else int(ord),
                ACC=accumulator(of_g, of_w), ALIGNED=even, R=height, C=width, ONE=one, num_warps=8,
            )  # fmt: skip
    put_back(grads, [g for g, _ in flat])


# ---- ahead-of-time compilation -----------------------------------------------------------------------


def aot() -> Iterator:
    """The variants held to tests/budgets.json."""
    from .._aot import AotCase

    pointers = {"rows": "*i64", "programs": "*i64"}
    steps = {"ALIGNED": True, "BLOCK": 1024, "CHUNK": 8192}
    for name, dtype in (("float32", tl.float32), ("bfloat16", tl.bfloat16)):
        for ord in (0, 2):
            yield AotCase(
                name=f"tensor_norm_{ord}_{name}",
                fn=tensor_norm_kernel,
                signature={**pointers, "clip": "*fp32", "partial": "*fp64", "length": "i32"},
                constexprs={"DTYPE": dtype, "CLIP": True, "ORD": ord, "ACC": tl.float32, **steps},
                divisible_by_16=(*pointers, "clip", "partial"),
            )
        yield AotCase(
            name=f"tensor_dots_{name}",
            fn=tensor_dots_kernel,
            signature={**pointers, "partial": "*fp64"},
            constexprs={"A": dtype, "B": tl.float32, **steps},
            divisible_by_16=(*pointers, "partial"),
        )
        yield AotCase(
            name=f"scale_tensors_{name}",
            fn=scale_tensors_kernel,
            signature={**pointers, "factors": "*fp32"},
            constexprs={"DTYPE": dtype, "ACC": tl.float32, **steps},
            divisible_by_16=(*pointers, "factors"),
        )
        for width, one in ((32, True), (256, True), (2048, True), (2048, False)):
            yield AotCase(
                name=f"clip_units_{width}{'' if one else '_loop'}_{name}",
                fn=clip_units_kernel,
                signature={**pointers, "numbers": "*fp64"},
                constexprs={
                    "G": dtype, "W": tl.float32, "ORD": 2, "ACC": tl.float32, "ALIGNED": True,
                    "R": TILE // width, "C": width, "ONE": one,
                },
                divisible_by_16=(*pointers, "numbers"),
                num_warps=8,
            )  # fmt: skip
    yield AotCase(
        name="join_chunks",
        fn=join_chunks_kernel,
        signature={"first": "*i64", "partial": "*fp64", "out": "*fp32", "length": "i32"},
        constexprs={"K": 1, "ORD": 2, "C": 256},
        divisible_by_16=("first", "partial", "out"),
    )
