"""GPU kernels of core `oblivious_forest`: the formulas are in solera/ensemble/oblivious_forest.py.

Leaves: a program has a tile of rows and trees. Sums: a tile of rows, one tree after another. The adjoint: a
program has some leaves of one tree and goes through the batch in order, adding a row where the leaf is the
row's; so there is no atomic, and the order is that of the batch.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from .._aot import AotCase
from .._launch import accumulate_type, accumulator, on_device_of


@triton.jit
def forest_leaves_kernel(
    x, features, thresholds, index, rows, trees, depth, width, ACC: tl.constexpr, BB: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    b = (tl.program_id(0) * BB + tl.arange(0, BB)).to(tl.int64)[:, None]  # [BB, 1]
    k = (tl.program_id(1) * BK + tl.arange(0, BK)).to(tl.int64)[None, :]  # [1, BK]
    leaf = tl.zeros((BB, BK), tl.int32)
    for d in range(depth):
        f = tl.load(features + k * depth + d, mask=k < trees, other=-1)
        known = (f >= 0) & (f < width)
        value = tl.load(x + b * width + f, mask=(b < rows) & known, other=0.0).to(ACC)
        threshold = tl.load(thresholds + k * depth + d, mask=k < trees, other=0.0).to(ACC)
        leaf += ((value > threshold) & known).to(tl.int32) << d
    tl.store(index + b * trees + k, leaf, mask=(b < rows) & (k < trees))


@triton.jit
def leaf_sum_kernel(
    index, leaves, out, rows, trees, count, outputs, ACC: tl.constexpr, BB: tl.constexpr,
    BA: tl.constexpr,
):  # fmt: skip
    b = (tl.program_id(0) * BB + tl.arange(0, BB)).to(tl.int64)[:, None]  # [BB, 1]
    a = (tl.program_id(1) * BA + tl.arange(0, BA))[None, :]  # [1, BA]
    total = tl.zeros((BB, BA), ACC)
    for k in range(trees):
        leaf = tl.load(index + b * trees + k, mask=b < rows, other=-1).to(tl.int64)
        mask = (leaf >= 0) & (leaf < count) & (a < outputs)
        first = tl.full((), 0, tl.int64) + k
        total += tl.load(leaves + (first * count + leaf) * outputs + a, mask=mask, other=0.0).to(
            ACC
        )
    at = out + b * outputs + a
    tl.store(at, total.to(out.dtype.element_ty), mask=(b < rows) & (a < outputs))


@triton.jit
def leaf_scatter_kernel(
    index, dy, out, rows, trees, count, outputs, ACC: tl.constexpr, BL: tl.constexpr,
    BB: tl.constexpr, BA: tl.constexpr,
):  # fmt: skip
    leaf = (tl.program_id(0) * BL + tl.arange(0, BL))[:, None]  # [BL, 1]
    a = (tl.program_id(1) * BA + tl.arange(0, BA))[None, :]  # [1, BA]
    k = tl.program_id(2).to(tl.int64)
    total = tl.zeros((BL, BA), ACC)
    for start in range(0, rows, BB):
        b = (start + tl.arange(0, BB)).to(tl.int64)
        at = tl.load(index + b * trees + k, mask=b < rows, other=-1)[None, :]  # [1, BB]
        mine = (leaf == at).to(ACC)  # [BL, BB]
        mask = (b < rows)[:, None] & (a < outputs)
        g = tl.load(dy + b[:, None] * outputs + a, mask=mask, other=0.0).to(ACC)  # [BB, BA]
        total = tl.dot(mine, g, total, input_precision="ieee", out_dtype=ACC)
    at = out + (k * count + leaf) * outputs + a
    tl.store(at, total.to(out.dtype.element_ty), mask=(leaf < count) & (a < outputs))


# ---- launchers ---------------------------------------------------------------------------------------

LEAVES = {"BB": 32, "BK": 32, "num_warps": 4}
SCATTER = {"BL": 32, "BB": 32, "BA": 16, "num_warps": 4}


def _sum_config(outputs: int) -> dict[str, int]:
    ba = min(64, triton.next_power_of_2(max(outputs, 1)))
    return {"BB": max(16, 512 // ba), "BA": ba, "num_warps": 4}


def forest_leaves(x, features, thresholds):
    x, features, thresholds = x.contiguous(), features.contiguous(), thresholds.contiguous()
    (rows, width), (trees, depth) = x.shape, features.shape
    index = x.new_empty((rows, trees), dtype=torch.int32)
    if index.numel():
        grid = (triton.cdiv(rows, LEAVES["BB"]), triton.cdiv(trees, LEAVES["BK"]))
        with on_device_of(x):
            forest_leaves_kernel[grid](
                x,
                features,
                thresholds,
                index,
                rows,
                trees,
                depth,
                width,
                ACC=accumulator(x),
                **LEAVES,
            )
    return index


def leaf_sum(index, leaves):
    index, leaves = index.contiguous(), leaves.contiguous()
    rows, (trees, count, outputs) = index.shape[0], leaves.shape
    out = leaves.new_empty((rows, outputs))
    if out.numel():
        config = _sum_config(outputs)
        grid = (triton.cdiv(rows, config["BB"]), triton.cdiv(outputs, config["BA"]))
        with on_device_of(leaves):
            leaf_sum_kernel[grid](
                index, leaves, out, rows, trees, count, outputs, ACC=accumulator(leaves), **config
            )
    return out


def leaf_scatter(index, dy, count):
    index, dy = index.contiguous(), dy.contiguous()
    (rows, trees), outputs = index.shape, dy.shape[1]
    out = dy.new_empty((trees, count, outputs), dtype=accumulate_type(dy))
    if out.numel():
        grid = (triton.cdiv(count, SCATTER["BL"]), triton.cdiv(outputs, SCATTER["BA"]), trees)
        with on_device_of(dy):
            leaf_scatter_kernel[grid](
                index, dy, out, rows, trees, count, outputs, ACC=accumulator(dy), **SCATTER
            )
    return out


def aot() -> Iterator[AotCase]:
    for name, element in (("bf16", "*bf16"), ("fp32", "*fp32")):
        common = {"rows": "i32", "trees": "i32"}
        yield AotCase(
            name=f"forest_leaves_{name}",
            fn=forest_leaves_kernel,
            signature={
                "x": element, "features": "*i64", "thresholds": "*fp32", "index": "*i32", **common,
                "depth": "i32", "width": "i32",
            },
            constexprs={"ACC": tl.float32, "BB": LEAVES["BB"], "BK": LEAVES["BK"]},
            divisible_by_16=("x", "features", "thresholds", "index", "rows", "trees"),
            num_warps=4,
        )  # fmt: skip
        sizes = {**common, "count": "i32", "outputs": "i32"}
        config = _sum_config(4)
        yield AotCase(
            name=f"leaf_sum_{name}",
            fn=leaf_sum_kernel,
            signature={"index": "*i32", "leaves": element, "out": element, **sizes},
            constexprs={"ACC": tl.float32, "BB": config["BB"], "BA": config["BA"]},
            divisible_by_16=("index", "leaves", "out", "rows", "trees", "count"),
            num_warps=4,
        )
        tiles = {k: SCATTER[k] for k in ("BL", "BB", "BA")}
        yield AotCase(
            name=f"leaf_scatter_{name}",
            fn=leaf_scatter_kernel,
            signature={"index": "*i32", "dy": element, "out": "*fp32", **sizes},
            constexprs={"ACC": tl.float32, **tiles},
            divisible_by_16=("index", "dy", "out", "rows", "trees", "count"),
            num_warps=4,
        )
