"""GPU kernels of core `evonorm`: the formulas are in solera/norm/evonorm.py.

A tile is [R, C]. Where K is 1 (contiguous x) its rows are sets and its columns positions, and coefficients
are [R, 1]; otherwise (channels-last) its rows are positions and its columns channels, and coefficients are
[1, C]. Elements of traffic: forward 2, the sums 2, the gradient 3; the sums leave five floats (three for S)
for every 1024 positions (4096 where K is 1).

H200 at 4.3 TB/s, S0 8 x 256 x 64 x 64 bfloat16 with the moments' pass: 8 x 16.8 MB, 31 us.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl

from .._launch import accumulate_type, accumulator, on_device_of
from .row_norm import sum_partials_kernel


@triton.jit
def _place(outer, inner, sets, M, K, ROWS: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """Element offsets and mask of a tile [R, C], offsets of its coefficients and their mask.

    `outer` counts row blocks (set and block of positions together where ROWS is false), `inner` column
    blocks.
    """
    if ROWS:
        row = (outer * R + tl.arange(0, R))[:, None]
        col = (inner * C + tl.arange(0, C))[None, :]
        at, coefficient = row.to(tl.int64) * M + col, row
        mask, coefficient_mask = (row < sets) & (col < M), row < sets
    else:
        blocks = tl.cdiv(M, R)
        a = (outer // blocks).to(tl.int64)
        row = ((outer % blocks) * R + tl.arange(0, R))[:, None]
        col = (inner * C + tl.arange(0, C))[None, :]
        at, coefficient = (a * M + row) * K + col, a * K + col
        mask, coefficient_mask = (row < M) & (col < K), col < K
    return at, mask, coefficient, coefficient_mask


@triton.jit
def _denominator(z, left):
    """max(left, z); a NaN in either comes out."""
    z = tl.where(left == left, z, left)
    return z, tl.where(left >= z, left, z)


@triton.jit
def _flow(g, x, w, scale, slope, left, offset, at, mask, B: tl.constexpr):
    """(u, slope's share, left's, offset's, direct part of dx); the middle two only for B."""
    a = tl.load(slope + at, mask=mask, other=0.0)
    z = a * x
    if B:
        low = tl.load(left + at, mask=mask, other=1.0)
        z, bottom = _denominator(z + tl.load(offset + at, mask=mask, other=0.0), low)
        r = 1.0 / bottom
        u = x * r
        e = -w * u * r
        of_offset = tl.where(z > low, e, tl.where(z == low, 0.5 * e, 0.0))
        of_left, of_slope = e - of_offset, of_offset * x
        dx = w * r + a * of_offset
    else:
        s = 1.0 / (1.0 + tl.exp(-z))
        rest = 1.0 - s
        u = x * s
        of_slope, of_left, of_offset = w * x * u * rest, u, u
        dx = w * s * (1.0 + z * rest)
    return u, of_slope, of_left, of_offset, dx


@triton.jit
def evonorm_kernel(
    x, y, shift, scale, slope, left, offset, sets, M, K,
    B: tl.constexpr, ROWS: tl.constexpr, ACC: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    at, mask, c, c_mask = _place(tl.program_id(0), tl.program_id(1), sets, M, K, ROWS, R, C)
    v = tl.load(x + at, mask=mask, other=0.0).to(ACC)
    z = v * tl.load(slope + c, mask=c_mask, other=0.0)
    if B:
        low = tl.load(left + c, mask=c_mask, other=1.0)
        z, bottom = _denominator(z + tl.load(offset + c, mask=c_mask, other=0.0), low)
        u = v / bottom
    else:
        u = v / (1.0 + tl.exp(-z))
    value = u * tl.load(scale + c, mask=c_mask, other=0.0)
    value += tl.load(shift + c, mask=c_mask, other=0.0)
    tl.store(y + at, value.to(y.dtype.element_ty), mask=mask)


@triton.jit
def evonorm_gradient_kernel(
    dy, x, dx, scale, slope, left, offset, mean, p, q, sets, M, K,
    B: tl.constexpr, ROWS: tl.constexpr, ACC: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    at, mask, c, c_mask = _place(tl.program_id(0), tl.program_id(1), sets, M, K, ROWS, R, C)
    g = tl.load(dy + at, mask=mask, other=0.0).to(ACC)
    v = tl.load(x + at, mask=mask, other=0.0).to(ACC)
    w = g * tl.load(scale + c, mask=c_mask, other=0.0)
    _, _, _, _, value = _flow(g, v, w, scale, slope, left, offset, c, c_mask, B)
    d = v - tl.load(mean + c, mask=c_mask, other=0.0)
    value += tl.load(p + c, mask=c_mask, other=0.0) * d
    value += tl.load(q + c, mask=c_mask, other=0.0)
    tl.store(dx + at, value.to(dx.dtype.element_ty), mask=mask)


@triton.jit
def _store_sum(
    partial, which, value, part, sets, K, c, c_mask, SUMS: tl.constexpr, DIM: tl.constexpr
):  # fmt: skip
    """partial (parts, SUMS, A, K), the sum of `value` over dimension DIM of the tile."""
    total = tl.expand_dims(tl.sum(value, DIM), DIM)
    at = (part.to(tl.int64) * SUMS + which) * sets * K + c
    tl.store(partial + at, total, mask=c_mask)


@triton.jit
def evonorm_reduce_kernel(
    dy, x, partial, scale, slope, left, offset, sets, M, K, steps,
    B: tl.constexpr, ROWS: tl.constexpr, ACC: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """`steps` tiles along M, their sums kept in registers. Grid (row blocks or sets, parts or columns, ...)."""
    SUMS: tl.constexpr = 5 if B else 3
    DIM: tl.constexpr = 1 if ROWS else 0
    block, inner, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    shift_sum = tl.zeros((R, C), ACC)
    scale_sum = tl.zeros((R, C), ACC)
    slope_sum = tl.zeros((R, C), ACC)
    left_sum = tl.zeros((R, C), ACC)
    offset_sum = tl.zeros((R, C), ACC)
    if ROWS:
        c = (block * R + tl.arange(0, R))[:, None]
        c_mask = c < sets
    else:
        col = (inner * C + tl.arange(0, C))[None, :]
        c = block.to(tl.int64) * K + col
        c_mask = col < K
    factor = tl.load(scale + c, mask=c_mask, other=0.0)
    for i in range(steps):
        if ROWS:
            col = ((part * steps + i) * C + tl.arange(0, C))[None, :]
            at = c.to(tl.int64) * M + col
            mask = c_mask & (col < M)
        else:
            row = ((part * steps + i) * R + tl.arange(0, R))[:, None]
            at = (block.to(tl.int64) * M + row) * K + col
            mask = c_mask & (row < M)
        g = tl.load(dy + at, mask=mask, other=0.0).to(ACC)
        v = tl.load(x + at, mask=mask, other=0.0).to(ACC)
        u, of_slope, of_left, of_offset, _ = _flow(
            g, v, g * factor, scale, slope, left, offset, c, c_mask, B
        )
        shift_sum += g
        scale_sum += tl.where(mask, g * u, 0.0)
        slope_sum += tl.where(mask, of_slope, 0.0)
        if B:
            left_sum += tl.where(mask, of_left, 0.0)
            offset_sum += tl.where(mask, of_offset, 0.0)
    _store_sum(partial, 0, shift_sum, part, sets, K, c, c_mask, SUMS, DIM)
    _store_sum(partial, 1, scale_sum, part, sets, K, c, c_mask, SUMS, DIM)
    _store_sum(partial, 2, slope_sum, part, sets, K, c, c_mask, SUMS, DIM)
    if B:
        _store_sum(partial, 3, left_sum, part, sets, K, c, c_mask, SUMS, DIM)
        _store_sum(partial, 4, offset_sum, part, sets, K, c, c_mask, SUMS, DIM)


# ---- launchers ---------------------------------------------------------------------------------------


def _config(M: int, K: int) -> dict[str, int]:
    """Tiles of 2048 elements; short sets share a tile."""
    inner = M if K == 1 else K
    C = min(max(16, triton.next_power_of_2(inner)), 1024 if K == 1 else 128)
    return {"R": 2048 // C, "C": C, "num_warps": 4}


def _grid(sets: int, M: int, K: int, config: dict[str, int]) -> tuple[int, int]:
    if K == 1:
        return triton.cdiv(sets, config["R"]), triton.cdiv(M, config["C"])
    return sets * triton.cdiv(M, config["R"]), triton.cdiv(K, config["C"])


def _dense(x, *tensors):
    """Contiguous tensors; x stands in for an absent one."""
    return [x if t is None else t.contiguous() for t in tensors]


def evonorm(x, shift, scale, slope, left, offset):
    x = x.contiguous()
    y = x.new_empty(x.shape)
    if x.numel() == 0:
        return y
    sets, M, K = x.shape
    config = _config(M, K)
    with on_device_of(x):
        evonorm_kernel[_grid(sets, M, K, config)](
            x, y, *_dense(x, shift, scale, slope, left, offset), sets, M, K, B=left is not None,
            ROWS=K == 1, ACC=accumulator(x), **config,
        )  # fmt: skip
    return y


def evonorm_reduce(dy, x, scale, slope, left, offset):
    dy, x = dy.contiguous(), x.contiguous()
    sets, M, K = x.shape
    acc, sums = accumulate_type(x), 3 if left is None else 5
    if x.numel() == 0:
        return x.new_zeros((sums, sets, K), dtype=acc)
    config = _config(M, K)
    rows = K == 1
    tile = config["C"] if rows else config["R"]
    steps = triton.cdiv(min(M, 4096 if rows else 1024), tile)
    parts = triton.cdiv(M, steps * tile)
    partial = x.new_empty((parts, sums, sets, K), dtype=acc)
    grid = (triton.cdiv(sets, config["R"]), 1, parts)
    if not rows:
        grid = (sets, triton.cdiv(K, config["C"]), parts)
    with on_device_of(x):
        evonorm_reduce_kernel[grid](
            dy, x, partial, *_dense(x, scale, slope, left, offset), sets, M, K, steps,
            B=left is not None, ROWS=rows, ACC=accumulator(x), **{**config, "num_warps": 8},
        )  # fmt: skip
        if parts == 1:
            return partial.view(sums, sets, K)
        out = x.new_empty((sums, sets, K), dtype=acc)
        columns = sums * sets * K
        sum_partials_kernel[(triton.cdiv(columns, 128),)](
            partial, out, parts, columns, C=128, num_warps=4
        )
    return out


def evonorm_gradient(dy, x, scale, slope, left, offset, mean, p, q):
    dy, x = dy.contiguous(), x.contiguous()
    dx = x.new_empty(x.shape)
    if x.numel() == 0:
        return dx
    sets, M, K = x.shape
    config = _config(M, K)
    with on_device_of(x):
        evonorm_gradient_kernel[_grid(sets, M, K, config)](
            dy, x, dx, *_dense(x, scale, slope, left, offset, mean, p, q), sets, M, K,
            B=left is not None, ROWS=K == 1, ACC=accumulator(x), **config,
        )  # fmt: skip
    return dx


# ---- ahead-of-time compilation -----------------------------------------------------------------------


def aot() -> Iterator:
    """The variants held to tests/budgets.json: both forms, both layouts."""
    from .._aot import AotCase

    half, acc = "*bf16", "*fp32"
    sizes = {"sets": "i32", "M": "i32"}
    for form in ("s", "b"):
        b = form == "b"
        own = ("left", "offset")
        coefficients = {n: acc for n in ("scale", "slope", *(own if b else ()))}
        absent = {} if b else dict.fromkeys(own)
        for layout, M, K in (("rows", 4096, 1), ("columns", 4096, 256)):
            rows = K == 1
            config = _config(M, K)
            warps = config.pop("num_warps")
            flags = {"B": b, "ROWS": rows, "ACC": tl.float32, **config, **absent}
            where = dict(sizes)
            if rows:
                flags["K"] = 1
            else:
                where["K"] = "i32"
            aligned = ("M",) if rows else ("M", "K")
            kernels = (
                ("forward", evonorm_kernel, {"x": half, "y": half, "shift": acc}, {}),
                (
                    "gradient",
                    evonorm_gradient_kernel,
                    {"dy": half, "x": half, "dx": half, "mean": acc, "p": acc, "q": acc},
                    {},
                ),
                (
                    "reduce",
                    evonorm_reduce_kernel,
                    {"dy": half, "x": half, "partial": acc},
                    {"steps": "i32"},
                ),
            )
            for name, fn, pointers, more in kernels:
                pointers = {**pointers, **coefficients}
                yield AotCase(
                    name=f"evonorm_{form}_{name}_{layout}",
                    fn=fn,
                    signature={**pointers, **where, **more},
                    constexprs=flags,
                    divisible_by_16=(*pointers, *aligned),
                    num_warps=8 if name == "reduce" else warps,
                )
