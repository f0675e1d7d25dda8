"""GPU kernels of core `low_rank_update`: the formulas are in solera/weights/low_rank_update.py.

A program takes BM rows: their dots with the keys in one walk over the columns, the sum in a second one, whose reads
come from L2 (without keys there is one walk). Bytes an element: read and written once. One launch a matrix; ranks
above WIDEST go to torch's products.

H200 at 4.3 TB/s, float32: 4096 x 4096 31 us, 32768 x 4096 250 us are the floors.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl

from .._launch import accumulate_type, accumulator, on_device_of

WIDEST = 128


@triton.jit
def low_rank_update_kernel(
    w, out, a, b, keys, rows, columns, rank, w_step, out_step,
    HAS_B: tl.constexpr, HAS_KEYS: tl.constexpr, ACC: tl.constexpr, RANK: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM))[:, None]  # [BM, 1]
    k = tl.arange(0, RANK)  # [RANK]
    by = tl.zeros((BM, RANK), ACC)
    if HAS_KEYS:
        for begin in range(0, columns, BN):
            j = begin + tl.arange(0, BN)
            mask = (row < rows) & (j < columns)[None, :]
            v = tl.load(w + row * w_step + j[None, :], mask=mask, other=0.0).to(ACC)
            mask = (k < rank)[None, :] & (j < columns)[:, None]
            key = tl.load(keys + k[None, :] * columns + j[:, None], mask=mask, other=0.0)
            by = tl.dot(v, key, by, input_precision="ieee", out_dtype=ACC)  # [BM, RANK]
        by = -by
        tl.debug_barrier()  # every thread has read its rows before any is written
    if HAS_B:
        by += tl.load(
            b + row * rank + k[None, :], mask=(row < rows) & (k < rank)[None, :], other=0.0
        )
    for begin in range(0, columns, BN):
        j = begin + tl.arange(0, BN)
        mask = (row < rows) & (j < columns)[None, :]
        v = tl.load(w + row * w_step + j[None, :], mask=mask, other=0.0).to(ACC)
        line = tl.load(
            a + k[:, None] * columns + j[None, :], mask=(k < rank)[:, None] & (j < columns)[None, :], other=0.0
        )  # fmt: skip
        v += tl.dot(by, line, input_precision="ieee", out_dtype=ACC)
        tl.store(out + row * out_step + j[None, :], v.to(out.dtype.element_ty), mask=mask)


# ---- launchers ---------------------------------------------------------------------------------------


def _config(rank: int) -> dict[str, int]:
    RANK = max(16, triton.next_power_of_2(rank))
    return {"RANK": RANK, "BM": 32 if RANK <= 32 else 16, "BN": 32, "num_warps": 4}


def _update(w, out, a, b, keys):
    from solera.weights.low_rank_update import _refuse_misfits, low_rank_update_reference

    _refuse_misfits(w, a, b, keys)
    rank = a.shape[0]
    if rank > WIDEST:
        out.copy_(low_rank_update_reference(w, a, b, keys))
        return
    acc = accumulate_type(w)
    a, b, keys = (t if t is None else t.to(acc).contiguous() for t in (a, b, keys))
    config = _config(rank)
    if w.numel():
        with on_device_of(w):
            low_rank_update_kernel[(triton.cdiv(w.shape[0], config["BM"]),)](
                w, out, a, a if b is None else b, a if keys is None else keys, *w.shape, rank, w.stride(0),
                out.stride(0), HAS_B=b is not None, HAS_KEYS=keys is not None, ACC=accumulator(w), **config,
            )  # fmt: skip


def low_rank_update(w, a, b, keys):
    w = w.contiguous()
    out = w.new_empty(w.shape)
    _update(w, out, a, b, keys)
    return out


def low_rank_update_(w, a, b, keys):
    every = [None] * len(w)
    for one, a_one, b_one, keys_one in zip(w, a, b or every, keys or every, strict=True):
        dense = one if one.stride(1) == 1 else one.contiguous()
        _update(dense, dense, a_one, b_one, keys_one)
        if dense is not one:
            one.copy_(dense)


# ---- ahead-of-time compilation -----------------------------------------------------------------------


def aot() -> Iterator:
    from .._aot import AotCase

    sizes = {"rows": "i32", "columns": "i32", "rank": "i32", "w_step": "i32", "out_step": "i32"}
    for rank, w in ((16, "*fp32"), (64, "*bf16"), (128, "*bf16")):
        for keyed in (False, True):
            config = _config(rank)
            warps = config.pop("num_warps")
            factors = {"a": "*fp32", "b": "*fp32", "keys": "*fp32"}
            yield AotCase(
                name=f"low_rank_update_{rank}_{'keys' if keyed else 'merge'}",
                fn=low_rank_update_kernel,
                signature={"w": w, "out": w, **factors, **sizes},
                constexprs={"HAS_B": True, "HAS_KEYS": keyed, "ACC": tl.float32, **config},
                divisible_by_16=("w", "out", *factors, "columns", "w_step", "out_step"),
                num_warps=warps,
            )
