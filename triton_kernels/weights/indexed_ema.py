"""GPU kernel of core `indexed_ema`: the formula and the rule for repeated rows are in solera/weights/indexed_ema.py.

Elements of traffic: a value is read once, a row of the bank read and written once however often it is named. The
batch is sorted by row on the device (stable); the program at a row's first place in the order applies all its values
in registers, the other programs return at once. Compiled without contraction to fused multiply-adds, so the bits are
those of the other backends.

H200 at 4.3 TB/s: 4096 values of 100 float32 1.1 us is the floor; the sort of 4096 numbers costs more than that.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from .._launch import accumulator, on_device_of
from .lincomb import _rounded


@triton.jit
def indexed_ema_kernel(
    bank, values, order, sorted_index, ends, decay, weight, N, D, B,
    COPY: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """PLACES places in the order (only firsts work) and BLOCK columns. decay and weight are the bits of float64
    numbers, COPY is decay 0.
    """
    keep = decay.to(tl.int64).to(tl.float64, bitcast=True).to(ACC)
    add = weight.to(tl.int64).to(tl.float64, bitcast=True).to(ACC)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = at < D
    first = tl.program_id(0) * PLACES
    for place in range(first, tl.minimum(first + PLACES, B)):
        row = tl.load(sorted_index + place)
        before = tl.load(sorted_index + tl.maximum(place - 1, 0))
        starts = (place == 0) | (before != row)
        if starts & (row >= 0) & (row < N):
            target = bank + row * D + at
            t = tl.load(target, mask=mask, other=0.0).to(ACC)
            for i in range(place, tl.load(ends + place)):
                v = tl.load(values + tl.load(order + i) * D + at, mask=mask, other=0.0).to(ACC)
                if COPY:
                    t = v
                else:
                    t = t * keep + v * add
            tl.store(target, _rounded(t, bank.dtype.element_ty), mask=mask)


def indexed_ema_(bank, index, values, decay):
    if values.shape != (index.shape[0], bank.shape[1]):
        raise RuntimeError("indexed_ema_: expected bank (N, D), index (B,) and values (B, D)")
    B, D = values.shape
    if B == 0 or D == 0:
        return
    target, values = bank.contiguous(), values.contiguous()
    sorted_index, order = torch.sort(index, stable=True)
    ends = torch.searchsorted(sorted_index, sorted_index, right=True)
    keep, add = struct.unpack("qq", struct.pack("dd", decay, 1 - decay))
    BLOCK = min(triton.next_power_of_2(D), 1024)
    # Places a program: one on a GPU, many for the interpreter, which pays by the program.
    PLACES = 1 if bank.is_cuda else 256
    with on_device_of(bank):
        indexed_ema_kernel[(triton.cdiv(B, PLACES), triton.cdiv(D, BLOCK))](
            target, values, order, sorted_index, ends, keep, add, bank.shape[0], D, B,
            COPY=decay == 0, ACC=accumulator(bank), BLOCK=BLOCK, PLACES=PLACES, num_warps=4,
            enable_fp_fusion=False,
        )  # fmt: skip
    if not bank.is_contiguous():
        bank.copy_(target)


def aot() -> Iterator:
    """The variants held to tests/budgets.json."""
    from .._aot import AotCase

    indices = {"order": "*i64", "sorted_index": "*i64", "ends": "*i64"}
    for name, dtype in (("float32", "*fp32"), ("bfloat16", "*bf16")):
        yield AotCase(
            name=f"indexed_ema_{name}",
            fn=indexed_ema_kernel,
            signature={
                "bank": dtype, "values": "*fp32", **indices, "decay": "i64", "weight": "i64",
                "N": "i32", "D": "i32", "B": "i32",
            },
            constexprs={"COPY": False, "ACC": tl.float32, "BLOCK": 1024, "PLACES": 1},
            divisible_by_16=("bank", "values", "order", "sorted_index", "ends", "D"),
        )  # fmt: skip
