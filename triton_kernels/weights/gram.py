"""GPU kernels of core `gram`: the formulas are in solera/weights/gram.py.

Bytes an element of s bytes: forward K s, one more s with a base; backward reads the same and writes what is
asked for. A program takes a chunk of one row of one tensor: it reads the K streams once from memory and again, for
the other pairs, from the first cache; its K (K + 1) / 2 sums are reduced once a step. The programs' sums are then
added in order. Up to eight streams (and any mixture of dtypes) are unrolled; more of one dtype run in a loop.

H200 at 4.3 TB/s: 8-way with a base, 100M float32 837 us is the floor.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from .._launch import on_device_of
from ._table import LANGUAGE_DTYPE, aligned, build, each_row, pointer, program_of, size
from .lincomb import _accumulator, _columns, _config, _rounded, _stream, _unrolled


# A row of the table: the K streams, the base (or 0), the number of elements, the first partial.
@triton.jit
def gram_forward_kernel(
    rows, programs, partial, K,
    DTYPES: tl.constexpr, COUNT: tl.constexpr, BASE: tl.constexpr, HAS_BASE: tl.constexpr,
    ACC: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    PP: tl.constexpr,
):  # fmt: skip
    """The dots of a chunk into partial[first + chunk]: streams i >= j at i (i + 1) / 2 + j."""
    item, chunk = program_of(programs)
    row = rows + item * (K + 3)
    n = size(row + K + 1, ALIGNED)
    lane = tl.arange(0, PP)
    dots = tl.zeros((PP,), tl.float64)
    end = tl.minimum(n, (chunk + 1) * CHUNK)
    for start in range(chunk * CHUNK, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        mask = at < n
        b = tl.zeros((BLOCK,), ACC)
        if HAS_BASE:
            b = tl.load(pointer(row + K, BASE, ALIGNED) + at, mask=mask, other=0.0).to(ACC)
        if COUNT > 0:
            for i in tl.static_range(COUNT):
                x = _stream(row, i, at, mask, b, DTYPES[i], HAS_BASE, ACC, ALIGNED)
                for j in tl.static_range(i + 1):
                    y = _stream(row, j, at, mask, b, DTYPES[j], HAS_BASE, ACC, ALIGNED)
                    dot = tl.sum(tl.where(mask, x * y, 0.0)).to(tl.float64)
                    dots += tl.where(lane == i * (i + 1) // 2 + j, dot, 0.0)
        else:
            for i in range(K):
                x = _stream(row, i, at, mask, b, DTYPES[0], HAS_BASE, ACC, ALIGNED)
                for j in range(i + 1):
                    y = _stream(row, j, at, mask, b, DTYPES[0], HAS_BASE, ACC, ALIGNED)
                    dot = tl.sum(tl.where(mask, x * y, 0.0)).to(tl.float64)
                    dots += tl.where(lane == i * (i + 1) // 2 + j, dot, 0.0)
    slot = tl.load(row + K + 2) + chunk
    pairs = K * (K + 1) // 2
    tl.store(partial + slot * pairs + lane, dots, mask=lane < pairs)


@triton.jit
def gram_sum_kernel(first, partial, out, K, PP: tl.constexpr, C: tl.constexpr):
    """out[row] (K, K) = the sums of the row's chunks, in order; its range is first[row : row + 2]."""
    row = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(first + row), tl.load(first + row + 1)
    pairs = K * (K + 1) // 2
    lane = tl.arange(0, PP)
    total = tl.zeros((C, PP), tl.float64)
    for start in range(begin, end, C):
        slot = start + tl.arange(0, C)[:, None]
        mask = (slot < end) & (lane[None, :] < pairs)
        total += tl.load(partial + slot * pairs + lane[None, :], mask=mask, other=0.0)
    found = tl.sum(total, 0)
    # The pair's stream i is the last one whose triangle begins at or before the lane.
    i = tl.zeros((PP,), tl.int32)
    for k in range(1, K):
        i += (lane >= k * (k + 1) // 2).to(tl.int32)
    j = lane - i * (i + 1) // 2
    to = out + row * K * K
    tl.store(to + i * K + j, found, mask=lane < pairs)
    tl.store(to + j * K + i, found, mask=lane < pairs)


@triton.jit
def _store_mixture(row, entry, at, mask, b, factor, K, DTYPES: tl.constexpr, COUNT: tl.constexpr,
                   OUT: tl.constexpr, HAS_BASE: tl.constexpr, ACC: tl.constexpr,
                   ALIGNED: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """sum_j factor[j] (w_j - b) where the table holds an address."""
    if tl.load(row + entry) != 0:
        total = tl.zeros((BLOCK,), ACC)
        if COUNT > 0:
            for j in tl.static_range(COUNT):
                y = _stream(row, j, at, mask, b, DTYPES[j], HAS_BASE, ACC, ALIGNED)
                total += tl.load(factor + j).to(ACC) * y
        else:
            for j in range(K):
                y = _stream(row, j, at, mask, b, DTYPES[0], HAS_BASE, ACC, ALIGNED)
                total += tl.load(factor + j).to(ACC) * y
        tl.store(pointer(row + entry, OUT, ALIGNED) + at, _rounded(total, OUT), mask=mask)


# A row: the K streams, the base (or 0), where K + 1 gradients go (or 0), the number of elements, the row.
@triton.jit
def gram_backward_kernel(
    rows, programs, factors, K,
    DTYPES: tl.constexpr, COUNT: tl.constexpr, BASE: tl.constexpr, HAS_BASE: tl.constexpr,
    ACC: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """dw_k = sum_j factors[row, k, j] (w_j - b); the base's row of factors is the last."""
    item, chunk = program_of(programs)
    row = rows + item * (2 * K + 4)
    n = size(row + 2 * K + 2, ALIGNED)
    factor = factors + tl.load(row + 2 * K + 3) * (K + 1) * K
    end = tl.minimum(n, (chunk + 1) * CHUNK)
    for start in range(chunk * CHUNK, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        mask = at < n
        b = tl.zeros((BLOCK,), ACC)
        if HAS_BASE:
            b = tl.load(pointer(row + K, BASE, ALIGNED) + at, mask=mask, other=0.0).to(ACC)
        if COUNT > 0:
            for k in tl.static_range(COUNT):
                _store_mixture(row, K + 1 + k, at, mask, b, factor + k * K, K, DTYPES, COUNT,
                               DTYPES[k], HAS_BASE, ACC, ALIGNED, BLOCK)  # fmt: skip
        else:
            for k in range(K):
                _store_mixture(row, K + 1 + k, at, mask, b, factor + k * K, K, DTYPES, COUNT,
                               DTYPES[0], HAS_BASE, ACC, ALIGNED, BLOCK)  # fmt: skip
        if HAS_BASE:
            _store_mixture(row, 2 * K + 1, at, mask, b, factor + K * K, K, DTYPES, COUNT,
                           BASE, HAS_BASE, ACC, ALIGNED, BLOCK)  # fmt: skip


# ---- launchers ---------------------------------------------------------------------------------------


def rows_of(like: torch.Tensor, by_row: bool) -> tuple[int, int]:
    """How many rows a tensor has, and their length."""
    rows = like.shape[0] if by_row else 1
    return rows, like.numel() // rows if rows else 0


def grouped(found: dict, key, table: torch.Tensor, chunks: int) -> None:
    """Adds a tensor's rows and their chunks to the launch of its kind."""
    found.setdefault(key, ([], []))
    found[key][0].append(table)
    found[key][1].append(torch.full((len(table),), chunks))


def gram(tensors, base, models, by_row):
    K = models
    length = len(tensors) // K
    columns, bases = _columns(tensors, base, tensors[:length])
    like = tensors[0]
    config = _config(like)
    first, total = [torch.zeros(1, dtype=torch.int64)], 0
    groups: dict = {}
    for column, b in zip(columns, bases):
        rows, n = rows_of(column[0], by_row)
        chunks = triton.cdiv(n, config["CHUNK"])
        first.append(total + chunks * torch.arange(1, rows + 1))
        numbers = [t.data_ptr() for t in (*column, *([] if b is None else [b]))] + [n]
        if rows and chunks:
            row = [*(t.data_ptr() for t in column), 0 if b is None else b.data_ptr(), n, total]
            steps = [n * t.element_size() for t in column]
            steps += [0 if b is None else n * b.element_size(), 0, chunks]
            key = (tuple(t.dtype for t in column), None if b is None else b.dtype, aligned(numbers))
            grouped(groups, key, each_row(row, steps, rows), chunks)
        total += rows * chunks
    starts, _ = build(torch.cat(first), [0], like)
    pairs = K * (K + 1) // 2
    PP = triton.next_power_of_2(pairs)
    partial = like.new_empty((total, pairs), dtype=torch.float64)
    out = like.new_empty((len(starts) - 1, K, K), dtype=torch.float64)
    for (dtypes, base_dtype, even), (rows, chunks) in groups.items():
        DTYPES, COUNT = _unrolled(dtypes)
        table, programs = build(torch.cat(rows), torch.cat(chunks), like)
        with on_device_of(like):
            gram_forward_kernel[(len(programs),)](
                table, programs, partial, K, DTYPES=DTYPES, COUNT=COUNT,
                BASE=LANGUAGE_DTYPE[base_dtype or dtypes[0]], HAS_BASE=base_dtype is not None,
                ACC=_accumulator((*dtypes, base_dtype)), ALIGNED=even, PP=PP, **config,
            )  # fmt: skip
    if len(out):
        with on_device_of(like):
            gram_sum_kernel[(len(out),)](starts, partial, out, K, PP=PP, C=max(1, 256 // PP))
    return out


def gram_backward(dgram, tensors, base, by_row, need_tensors):
    K = dgram.shape[1]
    length = len(tensors) // K
    columns, bases = _columns(tensors, base, tensors[:length])
    every = (*tensors, *base)
    found = [
        t.new_empty(t.shape) if need else None for t, need in zip(every, need_tensors, strict=True)
    ]
    like = tensors[0]
    config = _config(like)
    factors = dgram + dgram.mT
    factors = torch.cat([factors, -factors.sum(1, keepdim=True)], 1).contiguous()
    groups: dict = {}
    start = 0
    for item, (column, b) in enumerate(zip(columns, bases)):
        rows, n = rows_of(column[0], by_row)
        chunks = triton.cdiv(n, config["CHUNK"])
        if rows and chunks:
            read = [*column, b]
            written = [*found[item::length], *([None] if b is None else [])]
            entries = [*read, *written]
            row = [0 if t is None else t.data_ptr() for t in entries]
            steps = [0 if t is None else n * t.element_size() for t in entries]
            key = (
                tuple(t.dtype for t in column),
                None if b is None else b.dtype,
                aligned([*row, n]),
            )
            table = each_row([*row, n, start], [*steps, 0, 1], rows)
            grouped(groups, key, table, chunks)
        start += rows
    for (dtypes, base_dtype, even), (rows, chunks) in groups.items():
        DTYPES, COUNT = _unrolled(dtypes)
        table, programs = build(torch.cat(rows), torch.cat(chunks), like)
        with on_device_of(like):
            gram_backward_kernel[(len(programs),)](
                table, programs, factors, K, DTYPES=DTYPES, COUNT=COUNT,
                BASE=LANGUAGE_DTYPE[base_dtype or dtypes[0]], HAS_BASE=base_dtype is not None,
                ACC=_accumulator((*dtypes, base_dtype)), ALIGNED=even, **config,
            )  # fmt: skip
    return [t for t in found if t is not None]


# ---- ahead-of-time compilation -----------------------------------------------------------------------


def aot() -> Iterator:
    """The variants held to tests/budgets.json: two and eight streams and the loop, with a base."""
    from .._aot import AotCase

    for name, dtype, K, count in (
        ("float32", tl.float32, 8, 8),
        ("bfloat16", tl.bfloat16, 8, 8),
        ("two", tl.float32, 2, 2),
        ("loop", tl.bfloat16, 16, 0),
    ):
        flags = {
            "DTYPES": (dtype,) * max(count, 1), "COUNT": count, "BASE": dtype, "HAS_BASE": True,
            "ACC": tl.float32, "ALIGNED": True, "BLOCK": 1024, "CHUNK": 8192,
        }  # fmt: skip
        yield AotCase(
            name=f"gram_forward_{name}",
            fn=gram_forward_kernel,
            signature={"rows": "*i64", "programs": "*i64", "partial": "*fp64", "K": "i32"},
            constexprs={**flags, "PP": triton.next_power_of_2(K * (K + 1) // 2)},
            divisible_by_16=("rows", "programs", "partial"),
        )
        yield AotCase(
            name=f"gram_backward_{name}",
            fn=gram_backward_kernel,
            signature={"rows": "*i64", "programs": "*i64", "factors": "*fp64", "K": "i32"},
            constexprs=flags,
            divisible_by_16=("rows", "programs", "factors"),
        )
    yield AotCase(
        name="gram_sum",
        fn=gram_sum_kernel,
        signature={"first": "*i64", "partial": "*fp64", "out": "*fp64", "K": "i32"},
        constexprs={"PP": 64, "C": 4},
        divisible_by_16=("first", "partial", "out"),
    )
