"""GPU kernel of core `lookahead`: the formula is in solera/weights/lookahead.py.

Elements of traffic: reads slow and fast, writes both. Compiled without contraction to fused multiply-adds, so the
bits are those of the other backends.

H200 at 4.3 TB/s: 200 x 100k float32 74 us is the floor.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from .._launch import accumulator, on_device_of
from ._table import LANGUAGE_DTYPE, aligned, build, pointer, program_of, size
from .lincomb import _rounded


# A row of the table: slow, fast, number of elements, the bits of alpha.
@triton.jit
def lookahead_kernel(
    rows, programs, SLOW: tl.constexpr, FAST: tl.constexpr, KEEP: tl.constexpr, COPY: tl.constexpr,
    ACC: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """KEEP is alpha 0, COPY alpha 1: the weights themselves, also where slow + (fast - slow) would not be them."""
    item, chunk = program_of(programs)
    row = rows + item * 4
    slow = pointer(row, SLOW, ALIGNED)
    fast = pointer(row + 1, FAST, ALIGNED)
    n = size(row + 2, ALIGNED)
    alpha = tl.load(row + 3).to(tl.float64, bitcast=True).to(ACC)
    end = tl.minimum(n, (chunk + 1) * CHUNK)
    for start in range(chunk * CHUNK, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        mask = at < n
        s = tl.load(slow + at, mask=mask, other=0.0).to(ACC)
        f = tl.load(fast + at, mask=mask, other=0.0).to(ACC)
        if KEEP:
            value = s
        elif COPY:
            value = f
        else:
            value = s + alpha * (f - s)
        stored = _rounded(value, SLOW)
        tl.store(slow + at, stored, mask=mask)
        tl.store(fast + at, _rounded(stored.to(ACC), FAST), mask=mask)


def _config(x: torch.Tensor) -> dict[str, int]:
    if x.is_cuda:
        return {"BLOCK": 1024, "CHUNK": 8192, "num_warps": 4}
    return {"BLOCK": 4096, "CHUNK": 16384, "num_warps": 4}


def lookahead_(slow, fast, alpha):
    if any([s.shape != f.shape for s, f in zip(slow, fast, strict=True)]):
        raise RuntimeError("lookahead_: a fast tensor differs in shape from its slow one")
    (bits,) = struct.unpack("q", struct.pack("d", alpha))
    pairs = [(s.contiguous(), f.contiguous()) for s, f in zip(slow, fast)]
    groups: dict = {}
    for s, f in pairs:
        if s.numel():
            row = [s.data_ptr(), f.data_ptr(), s.numel(), bits]
            groups.setdefault((s.dtype, f.dtype, aligned(row[:3])), []).append((row, s))
    for (slow_dtype, fast_dtype, even), members in groups.items():
        rows, like = [row for row, _ in members], members[0][1]
        config = _config(like)
        table, programs = build(rows, [triton.cdiv(r[2], config["CHUNK"]) for r in rows], like)
        with on_device_of(like):
            lookahead_kernel[(len(programs),)](
                table, programs, SLOW=LANGUAGE_DTYPE[slow_dtype], FAST=LANGUAGE_DTYPE[fast_dtype],
                KEEP=alpha == 0, COPY=alpha == 1, ACC=accumulator(like), ALIGNED=even,
                enable_fp_fusion=False, **config,
            )  # fmt: skip
    for given, computed in zip((*slow, *fast), (*(s for s, _ in pairs), *(f for _, f in pairs))):
        if not given.is_contiguous():
            given.copy_(computed)


def aot() -> Iterator:
    """The variants held to tests/budgets.json."""
    from .._aot import AotCase

    pointers = {"rows": "*i64", "programs": "*i64"}
    for name, fast in (("float32", tl.float32), ("bfloat16", tl.bfloat16)):
        yield AotCase(
            name=f"lookahead_{name}",
            fn=lookahead_kernel,
            signature=pointers,
            constexprs={
                "SLOW": tl.float32, "FAST": fast, "KEEP": False, "COPY": False, "ACC": tl.float32,
                "ALIGNED": True, "BLOCK": 1024, "CHUNK": 8192,
            },
            divisible_by_16=tuple(pointers),
        )  # fmt: skip
