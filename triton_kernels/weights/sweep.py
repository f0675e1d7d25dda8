"""GPU kernels of core `sweep`: the formulas are in solera/weights/sweep.py.

Elements of traffic for A interpolations: forward reads 2 and writes A, backward reads A (and 2 for dalpha) and
writes what is asked for: a program holds its block of both inputs in registers while it walks the A results.

H200 at 4.3 TB/s: 11 interpolations of 25M float32 302 us is the floor.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from .._launch import accumulator, on_device_of
from ._table import LANGUAGE_DTYPE, aligned, build, pointer, program_of, size
from .lincomb import _rounded, lincomb_sum_kernel


# A row of the table: base, tuned, out, the number of elements, the column of alpha.
@triton.jit
def sweep_forward_kernel(
    rows, programs, alpha, A, stride_a, stride_item,
    DTYPE: tl.constexpr, ACC: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    item, chunk = program_of(programs)
    row = rows + item * 5
    out = pointer(row + 2, DTYPE, ALIGNED)
    n = size(row + 3, ALIGNED)
    column = alpha + tl.load(row + 4) * stride_item
    end = tl.minimum(n, (chunk + 1) * CHUNK)
    for start in range(chunk * CHUNK, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        mask = at < n
        base = tl.load(pointer(row, DTYPE, ALIGNED) + at, mask=mask, other=0.0).to(ACC)
        tuned = tl.load(pointer(row + 1, DTYPE, ALIGNED) + at, mask=mask, other=0.0).to(ACC)
        for a in range(A):
            far = tl.load(column + a * stride_a).to(tl.float64)
            value = base * (1.0 - far).to(ACC) + tuned * far.to(ACC)
            tl.store(out + a * n + at, _rounded(value, DTYPE), mask=mask)


# A row: base, tuned (or 0 each), G, where dbase and dtuned go (or 0 each), the number of elements, the column,
# the first partial.
@triton.jit
def sweep_backward_kernel(
    rows, programs, alpha, partial, A, stride_a, stride_item,
    DTYPE: tl.constexpr, NEED_ALPHA: tl.constexpr, NEED_BASE: tl.constexpr, NEED_TUNED: tl.constexpr,
    ACC: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, AP: tl.constexpr,
):  # fmt: skip
    """A dots of a chunk into partial[first + chunk], and the sums over a of the two gradients."""
    item, chunk = program_of(programs)
    row = rows + item * 8
    incoming = pointer(row + 2, DTYPE, ALIGNED)
    n = size(row + 5, ALIGNED)
    column = alpha + tl.load(row + 6) * stride_item
    lane = tl.arange(0, AP)
    dots = tl.zeros((AP,), tl.float64)
    end = tl.minimum(n, (chunk + 1) * CHUNK)
    for start in range(chunk * CHUNK, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        mask = at < n
        delta = tl.zeros((BLOCK,), ACC)
        if NEED_ALPHA:
            base = tl.load(pointer(row, DTYPE, ALIGNED) + at, mask=mask, other=0.0).to(ACC)
            tuned = tl.load(pointer(row + 1, DTYPE, ALIGNED) + at, mask=mask, other=0.0).to(ACC)
            delta = tuned - base
        dbase = tl.zeros((BLOCK,), ACC)
        dtuned = tl.zeros((BLOCK,), ACC)
        for a in range(A):
            g = tl.load(incoming + a * n + at, mask=mask, other=0.0).to(ACC)
            far = tl.load(column + a * stride_a).to(tl.float64)
            if NEED_ALPHA:
                product = tl.where(mask, g * delta, 0.0)
                dots += tl.where(lane == a, tl.sum(product).to(tl.float64), 0.0)
            if NEED_BASE:
                dbase += g * (1.0 - far).to(ACC)
            if NEED_TUNED:
                dtuned += g * far.to(ACC)
        if NEED_BASE:
            tl.store(pointer(row + 3, DTYPE, ALIGNED) + at, _rounded(dbase, DTYPE), mask=mask)
        if NEED_TUNED:
            tl.store(pointer(row + 4, DTYPE, ALIGNED) + at, _rounded(dtuned, DTYPE), mask=mask)
    if NEED_ALPHA:
        slot = tl.load(row + 7) + chunk
        tl.store(partial + slot * A + lane, dots, mask=lane < A)


# ---- launchers ---------------------------------------------------------------------------------------


def _config(x: torch.Tensor, block: int = 1024) -> dict[str, int]:
    """Elements a step and a program; backward takes 512 a step (1024 spilled on sm_80)."""
    if x.is_cuda:
        return {"BLOCK": block, "CHUNK": 4096, "num_warps": 4}
    return {"BLOCK": 4096, "CHUNK": 16384, "num_warps": 4}


def _strides(alpha):
    return alpha.stride(0), alpha.stride(1) if alpha.dim() == 2 else 0


def _check(tensors, like, skip=0):
    """Shapes and dtypes that do not fit would read past the end."""
    for t, x in zip(tensors, like, strict=True):
        if t.shape[skip:] != x.shape or t.dtype != x.dtype:
            raise RuntimeError("lerp_sweep: a tensor differs in shape or dtype from its base")


def lerp_sweep(base, tuned, alpha):
    _check(tuned, base)
    if alpha.dim() == 2 and alpha.shape[1] != len(base):
        raise RuntimeError(f"lerp_sweep: expected {len(base)} columns of alpha")
    A = alpha.shape[0]
    sources = [(b.contiguous(), t.contiguous()) for b, t in zip(base, tuned)]
    out = [b.new_empty((A, *b.shape)) for b in base]
    groups: dict = {}
    for item, ((b, t), y) in enumerate(zip(sources, out)):
        if y.numel() == 0:
            continue
        row = [b.data_ptr(), t.data_ptr(), y.data_ptr(), b.numel()]
        groups.setdefault((b.dtype, aligned(row)), []).append(([*row, item], y))
    for (dtype, even), members in groups.items():
        rows, like = [row for row, _ in members], members[0][1]
        config = _config(like)
        table, programs = build(rows, [triton.cdiv(r[3], config["CHUNK"]) for r in rows], like)
        with on_device_of(like):
            sweep_forward_kernel[(len(programs),)](
                table, programs, alpha, A, *_strides(alpha), DTYPE=LANGUAGE_DTYPE[dtype],
                ACC=accumulator(like), ALIGNED=even, **config,
            )  # fmt: skip
    return out


def lerp_sweep_backward(grads, base, tuned, alpha, need_alpha, need_base, need_tuned):
    A, length = alpha.shape[0], len(grads)
    if need_alpha:
        _check(grads, base, 1)
        _check(tuned, base)
    grads = [g.contiguous() for g in grads]
    sources = [(b.contiguous(), t.contiguous()) for b, t in zip(base, tuned)]
    dbase = [g.new_empty(g.shape[1:]) for g in grads] if need_base else []
    dtuned = [g.new_empty(g.shape[1:]) for g in grads] if need_tuned else []
    like = grads[0]
    config = _config(like, 512)
    first, groups = [0], {}
    for item, g in enumerate(grads):
        n = g[:1].numel() if A else 0
        chunks = triton.cdiv(n, config["CHUNK"])
        first.append(first[-1] + chunks)
        if chunks == 0:
            continue
        row = [t.data_ptr() for t in sources[item]] if need_alpha else [0, 0]
        row += [g.data_ptr(), *(t[item].data_ptr() if t else 0 for t in (dbase, dtuned)), n]
        groups.setdefault((g.dtype, aligned(row)), []).append(([*row, item, first[-2]], g))
    AP = triton.next_power_of_2(max(A, 1))
    partial = like.new_empty((first[-1], A) if need_alpha else (0,), dtype=torch.float64)
    for (dtype, even), members in groups.items():
        rows, g = [row for row, _ in members], members[0][1]
        table, programs = build(rows, [triton.cdiv(r[5], config["CHUNK"]) for r in rows], g)
        with on_device_of(g):
            sweep_backward_kernel[(len(programs),)](
                table, programs, alpha, partial, A, *_strides(alpha), DTYPE=LANGUAGE_DTYPE[dtype],
                NEED_ALPHA=need_alpha, NEED_BASE=need_base, NEED_TUNED=need_tuned,
                ACC=accumulator(g), ALIGNED=even, AP=AP, **config,
            )  # fmt: skip
    dots = like.new_empty((A, length) if need_alpha else (0,), dtype=torch.float64)
    if need_alpha and A:
        ranges, _ = build([first], [0], like)
        with on_device_of(like):
            lincomb_sum_kernel[(length,)](
                ranges, partial, dots, A, length, KP=AP, C=max(1, 256 // AP)
            )
    if A == 0:
        for t in (*dbase, *dtuned):
            t.zero_()
    return dots, dbase, dtuned


# ---- ahead-of-time compilation -----------------------------------------------------------------------


def aot() -> Iterator:
    """The variants held to tests/budgets.json."""
    from .._aot import AotCase

    pointers = {"rows": "*i64", "programs": "*i64", "alpha": "*fp32"}
    numbers = {"A": "i32", "stride_a": "i32", "stride_item": "i32"}
    for name, dtype in (("float32", tl.float32), ("bfloat16", tl.bfloat16)):
        flags = {"DTYPE": dtype, "ACC": tl.float32, "ALIGNED": True, "BLOCK": 1024, "CHUNK": 4096}
        yield AotCase(
            name=f"sweep_forward_{name}",
            fn=sweep_forward_kernel,
            signature={**pointers, **numbers},
            constexprs=flags,
            divisible_by_16=tuple(pointers),
        )
        yield AotCase(
            name=f"sweep_backward_{name}",
            fn=sweep_backward_kernel,
            signature={**pointers, "partial": "*fp64", **numbers},
            constexprs={
                **flags,
                "BLOCK": 512,
                "NEED_ALPHA": True,
                "NEED_BASE": True,
                "NEED_TUNED": True,
                "AP": 16,
            },
            divisible_by_16=(*pointers, "partial"),
        )
