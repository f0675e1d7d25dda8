"""GPU kernels of core `streaming_apply`: a plan's density applied to columns, tile by tile.

A program takes R rows and up to 64 columns of v: for each tile of the columns of the plan, u (see `_points`), the
densities, and their product with v, in registers. 2 n m (d + k) flops and n m exponentials for k <= 64; for more
columns the densities are made again for each 64 of them.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl

from .._launch import accumulator, on_device_of
from ._points import LOG2E, centred, geometry_of, numbers_of, tile_of, tile_sizes


@triton.jit
def _densities(
    x, y, xx, yy, f, g, item, i, j, n, m, d, numbers,
    POWER: tl.constexpr, SOURCE: tl.constexpr, ACC: tl.constexpr, K: tl.constexpr, R: tl.constexpr,
    C: tl.constexpr,
):  # fmt: skip
    kappa = tl.load(numbers)
    alpha = tl.load(numbers + 1)
    lift = tl.load(numbers + 2)
    most = tl.load(numbers + 3)
    u = tile_of(x, y, item, i, j, n, m, d, SOURCE, ACC, K, R, C)
    left = lift * tl.load(xx + item * n + i, mask=i < n, other=0.0)
    right = lift * tl.load(yy + item * m + j, mask=j < m, other=0.0)
    F = tl.load(f + item * n + i, mask=i < n, other=0.0) * kappa
    G = tl.load(g + item * m + j, mask=j < m, other=0.0) * kappa
    t = (G - right)[None, :] + alpha * u + (F - left)[:, None]
    w = tl.exp2(tl.where(t > most, most, t))
    if POWER == 1:
        w = w * (left[:, None] + right[None, :] - alpha * u) / kappa
    if POWER == -1:
        w = tl.where(u > 0, w / tl.where(u > 0, u, 1.0), tl.where(u == u, 0.0, u))
    return tl.where((j < m)[None, :], w, 0.0)


@triton.jit
def points_apply_kernel(
    x, y, xx, yy, f, g, v, out, n, m, d, width, tiles, parts, numbers,
    POWER: tl.constexpr, SOURCE: tl.constexpr, ACC: tl.constexpr, K: tl.constexpr, R: tl.constexpr,
    C: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """R rows of the density times W columns of v."""
    program = tl.program_id(0).to(tl.int64)
    part = program % parts
    item = program // parts // tiles
    i = ((program // parts) % tiles) * R + tl.arange(0, R)
    c = part * W + tl.arange(0, W)
    acc = tl.zeros((R, W), ACC)
    for start in range(0, m, C):
        j = start + tl.arange(0, C)
        w = _densities(
            x, y, xx, yy, f, g, item, i, j, n, m, d, numbers, POWER, SOURCE, ACC, K, R, C
        )
        at = (item * m + j)[:, None] * width + c[None, :]
        columns = tl.load(v + at, mask=(j < m)[:, None] & (c < width)[None, :], other=0.0)
        acc = tl.dot(w, columns, acc, input_precision="ieee", out_dtype=ACC)
    at = (item * n + i)[:, None] * width + c[None, :]
    tl.store(out + at, acc, mask=(i < n)[:, None] & (c < width)[None, :])


@triton.jit
def points_signs_kernel(
    x, y, xx, yy, f, g, v, out, n, m, d, tiles, numbers,
    POWER: tl.constexpr, SOURCE: tl.constexpr, ACC: tl.constexpr, K: tl.constexpr, R: tl.constexpr,
    C: tl.constexpr,
):  # fmt: skip
    """sum_j w_ij v_j sign(x_ik - y_jk) of R rows; the sums so far lie in `out`, which one program owns."""
    program = tl.program_id(0).to(tl.int64)
    item = program // tiles
    i = (program % tiles) * R + tl.arange(0, R)
    row = (item * n + i) * d
    for start in range(0, m, C):
        j = start + tl.arange(0, C)
        w = _densities(
            x, y, xx, yy, f, g, item, i, j, n, m, d, numbers, POWER, SOURCE, ACC, K, R, C
        )
        w = w * tl.load(v + item * m + j, mask=j < m, other=0.0)[None, :]
        for k in range(d):
            left = tl.load(x + row + k, mask=i < n, other=0.0)
            right = tl.load(y + (item * m + j) * d + k, mask=j < m, other=0.0)
            t = left[:, None] - right[None, :]
            s = tl.sum(tl.where(t > 0, w, tl.where(t < 0, -w, 0.0)), 1)
            before = tl.load(out + row + k, mask=(i < n) & (start > 0), other=0.0)
            tl.store(out + row + k, before + s, mask=i < n)


def sinkhorn_points_apply(x, y, f, g, v, cost, epsilon, power, signs):
    f, g, v = f.contiguous(), g.contiguous(), v.contiguous()
    batch, n, d = x.shape
    m, width = y.shape[1], v.shape[2]
    out = x.new_empty((batch, n, d if signs else width))
    if out.numel() == 0:
        return out
    source, factor, lift = geometry_of(cost, d)
    double = x.element_size() == 8
    sizes = tile_sizes(source, d, double)
    tiles = triton.cdiv(n, sizes["R"])
    kappa = LOG2E / epsilon
    with on_device_of(x):
        numbers = numbers_of(x, [kappa, factor * kappa, lift * kappa, 1022.0 if double else 126.0])
        x, y, xx, yy = centred(x, y, cost)
        options = {"POWER": power, "SOURCE": source, "ACC": accumulator(x), **sizes}
        if signs:
            points_signs_kernel[(batch * tiles,)](
                x, y, xx, yy, f, g, v, out, n, m, d, tiles, numbers, **options
            )
        else:
            # 16 columns in float64 spill
            W = 32 if double else max(16, min(64, triton.next_power_of_2(width)))
            parts = triton.cdiv(width, W)
            points_apply_kernel[(batch * tiles * parts,)](
                x, y, xx, yy, f, g, v, out, n, m, d, width, tiles, parts, numbers, W=W, **options
            )
    return out


def aot() -> Iterator:
    """By products with few and with many columns, by differences, and the signs."""
    from .._aot import AotCase

    pointers = ("x", "y", "xx", "yy", "f", "g", "v", "out", "numbers")
    for word, acc, double in (("*fp32", tl.float32, False), ("*fp64", tl.float64, True)):
        types = {**dict.fromkeys(pointers, word), **dict.fromkeys(("n", "m", "d", "tiles"), "i32")}
        tag = "64" if double else "32"
        for name, source, d, W in (("product", 0, 64, 64), ("differences", 1, 2, 16)):
            sizes = tile_sizes(source, d, double)
            warps = sizes.pop("num_warps")
            yield AotCase(
                name=f"points_apply_{name}_{tag}",
                fn=points_apply_kernel,
                signature={**types, "width": "i32", "parts": "i32"},
                constexprs={
                    "POWER": 0, "SOURCE": source, "ACC": acc, "W": 32 if double else W, **sizes,
                },
                divisible_by_16=(*pointers, "n", "m", *(("d",) if d > 8 else ())),
                num_warps=warps,
            )  # fmt: skip
        sizes = tile_sizes(3, 64, double)
        warps = sizes.pop("num_warps")
        yield AotCase(
            name=f"points_signs_{tag}",
            fn=points_signs_kernel,
            signature=types,
            constexprs={"POWER": 0, "SOURCE": 3, "ACC": acc, **sizes},
            divisible_by_16=(*pointers, "n", "m"),
            num_warps=warps,
        )
