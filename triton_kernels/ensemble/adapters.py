"""GPU kernels of core `adapters`: the formulas are in solera/ensemble/adapters.py.

Pairs (row, slot) are sorted by branch on the device; a table of tiles, as long as it can get, says which
branch and which pairs a program works on, so no size has to be known by the host. The product with the shared
weight is torch's own; each branch adds to its result in place (or, with several slots a row, through one
partial row a pair, summed in the order of the slots).

Operations beyond the shared product: 2 P r (I + O) forward, twice that backward. H200 at 4.3 TB/s and 790
TFLOP/s in bf16, 2048 rows, 4096 x 4096, r = 16: 87 us for the shared product by operations, 12 us a pass
for the branches by bytes (x read; y read and written).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from .._activation import activate, slope
from .._aot import AotCase
from .._launch import accumulate_type, accumulator, on_device_of
from ._product import _dot_type


@triton.jit
def _coefficients(
    pre, gates, pair, j, mask, scaling, rank, groups, GATED: tl.constexpr, ACT: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """scaling * gate * act(pre) of pairs [BM] at columns j [BR]."""
    v = tl.load(pre + pair[:, None] * rank + j[None, :], mask=mask, other=0.0).to(ACC)
    v = activate(v, ACT) * scaling
    if GATED:
        at = pair[:, None] * groups + (j // (rank // groups))[None, :]
        v *= tl.load(gates + at, mask=mask, other=0.0).to(ACC)
    return tl.where(mask, v, 0.0)


@triton.jit
def adapter_shrink_kernel(
    x, m, bias, pre, order, offsets, tile_branch, tile_begin, branches, slots, width, rank, m_step, m_row,
    m_column, HAS_BIAS: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr, BM: tl.constexpr,
    BR: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """pre[pair] = x[row of pair] M_e + bias_e, M_e (width, rank)."""
    e = tl.load(tile_branch + tl.program_id(0))
    if e < branches:
        at = tl.load(tile_begin + tl.program_id(0)) + tl.arange(0, BM)
        inside = at < tl.load(offsets + e + 1)
        pair = tl.load(order + at, mask=inside, other=0)  # [BM]
        j = tl.program_id(1) * BR + tl.arange(0, BR)  # [BR]
        row = (pair // slots)[:, None] * width
        acc = tl.zeros((BM, BR), ACC)
        for start in range(0, width, BK):
            i = start + tl.arange(0, BK)
            left = tl.load(
                x + row + i[None, :], mask=inside[:, None] & (i < width)[None, :], other=0.0
            )
            where = i.to(tl.int64)[:, None] * m_row + j.to(tl.int64)[None, :] * m_column
            mask = (i < width)[:, None] & (j < rank)[None, :]
            right = tl.load(m + e * m_step + where, mask=mask, other=0.0)  # [BK, BR]
            acc = tl.dot(left.to(DOT), right.to(DOT), acc, input_precision="ieee", out_dtype=ACC)
        if HAS_BIAS:
            acc += tl.load(bias + e * rank + j, mask=j < rank, other=0.0).to(ACC)[None, :]
        mask = inside[:, None] & (j < rank)[None, :]
        tl.store(pre + pair[:, None] * rank + j[None, :], acc, mask=mask)


@triton.jit
def adapter_expand_kernel(
    pre, gates, m, y, order, offsets, tile_branch, tile_begin, branches, scaling, width, rank, groups, m_step,
    m_row, m_column, ADD: tl.constexpr, GATED: tl.constexpr, ACT: tl.constexpr, ACC: tl.constexpr,
    DOT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """y[pair] (+)= coefficients[pair] M_e, M_e (rank, width)."""
    e = tl.load(tile_branch + tl.program_id(0))
    if e < branches:
        at = tl.load(tile_begin + tl.program_id(0)) + tl.arange(0, BM)
        inside = at < tl.load(offsets + e + 1)
        pair = tl.load(order + at, mask=inside, other=0)  # [BM]
        i = tl.program_id(1) * BN + tl.arange(0, BN)  # [BN]
        acc = tl.zeros((BM, BN), ACC)
        for start in range(0, rank, BR):
            j = start + tl.arange(0, BR)
            mask = inside[:, None] & (j < rank)[None, :]
            left = _coefficients(pre, gates, pair, j, mask, scaling, rank, groups, GATED, ACT, ACC)
            where = j.to(tl.int64)[:, None] * m_row + i.to(tl.int64)[None, :] * m_column
            mask = (j < rank)[:, None] & (i < width)[None, :]
            right = tl.load(m + e * m_step + where, mask=mask, other=0.0)  # [BR, BN]
            acc = tl.dot(left.to(DOT), right.to(DOT), acc, input_precision="ieee", out_dtype=ACC)
        mask = inside[:, None] & (i < width)[None, :]
        to = y + pair[:, None] * width + i[None, :]
        if ADD:
            acc += tl.load(to, mask=mask, other=0.0).to(ACC)
        tl.store(to, acc.to(y.dtype.element_ty), mask=mask)


@triton.jit
def adapter_combine_kernel(
    parts, index, y, branches, slots, width, ACC: tl.constexpr, BN: tl.constexpr
):
    """y[n] += the sum of a row's parts, in the order of its slots."""
    n = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BN + tl.arange(0, BN)
    total = tl.zeros((BN,), ACC)
    for slot in range(slots):
        pair = n * slots + slot
        e = tl.load(index + pair)
        used = (i < width) & (e >= 0) & (e < branches)
        total += tl.load(parts + pair * width + i, mask=used, other=0.0)
    to = y + n * width + i
    total += tl.load(to, mask=i < width, other=0.0).to(ACC)
    tl.store(to, total.to(y.dtype.element_ty), mask=i < width)


@triton.jit
def adapter_slopes_kernel(
    pre, u, gates, v, dgates, scaling, pairs, rank, groups, GATED: tl.constexpr, NEED_GATES: tl.constexpr,
    ACT: tl.constexpr, ACC: tl.constexpr, BP: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """v = scaling * gate * u * act'(pre), and the gates' gradient, for one group of columns."""
    pair = tl.program_id(0).to(tl.int64) * BP + tl.arange(0, BP)
    group = tl.program_id(1)
    width = rank // groups
    by = tl.full((BP,), 1.0, ACC) * scaling
    if GATED:
        by *= tl.load(gates + pair * groups + group, mask=pair < pairs, other=0.0).to(ACC)
    dots = tl.zeros((BP,), ACC)
    for start in range(0, width, BW):
        j = start + tl.arange(0, BW)
        mask = (pair < pairs)[:, None] & (j < width)[None, :]
        at = pair[:, None] * rank + (group * width + j)[None, :]
        z = tl.load(pre + at, mask=mask, other=0.0)
        g = tl.load(u + at, mask=mask, other=0.0)
        dots += tl.sum(tl.where(mask, activate(z, ACT) * g, 0.0), 1)
        tl.store(v + at, slope(g, z, ACT) * by[:, None], mask=mask)
    if NEED_GATES:
        tl.store(dgates + pair * groups + group, dots * scaling, mask=pair < pairs)


@triton.jit
def adapter_outer_kernel(
    pre, gates, x, out, bias, order, offsets, scaling, slots, width, rank, groups, step_j, step_i,
    NEED: tl.constexpr, NEED_BIAS: tl.constexpr, GATED: tl.constexpr, ACT: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr, BB: tl.constexpr,
):  # fmt: skip
    """out_e = sum over the branch's pairs, in order, of coefficients[pair] x[row of pair]^T."""
    e = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * BR + tl.arange(0, BR)
    i = tl.program_id(2) * BN + tl.arange(0, BN)
    first = tl.load(offsets + e)
    last = tl.load(offsets + e + 1)
    acc = tl.zeros((BR, BN), ACC)
    sums = tl.zeros((BR,), ACC)
    for start in range(first, last, BB):
        at = start + tl.arange(0, BB)
        pair = tl.load(order + at, mask=at < last, other=0)
        mask = (at < last)[:, None] & (j < rank)[None, :]
        left = _coefficients(pre, gates, pair, j, mask, scaling, rank, groups, GATED, ACT, ACC)
        if NEED_BIAS:
            sums += tl.sum(left, 0)
        if NEED:
            mask = (at < last)[:, None] & (i < width)[None, :]
            right = tl.load(x + (pair // slots)[:, None] * width + i[None, :], mask=mask, other=0.0)
            acc = tl.dot(
                tl.trans(left.to(DOT)), right.to(DOT), acc, input_precision="ieee", out_dtype=ACC
            )
    if NEED_BIAS:
        if tl.program_id(2) == 0:
            tl.store(bias + e * rank + j, sums, mask=j < rank)
    if NEED:
        where = j.to(tl.int64)[:, None] * step_j + i.to(tl.int64)[None, :] * step_i
        mask = (j < rank)[:, None] & (i < width)[None, :]
        tl.store(out + e * rank * width + where, acc, mask=mask)


# ---- launchers ---------------------------------------------------------------------------------------

# Tiles by the element's size: rows, columns of a wide operand, depth of the shrinking product.
TILES = {
    2: {"rows": 64, "columns": 128, "depth": 64, "num_warps": 4, "num_stages": 3},
    4: {"rows": 64, "columns": 64, "depth": 32, "num_warps": 8, "num_stages": 2},
    8: {"rows": 32, "columns": 32, "depth": 16, "num_warps": 4, "num_stages": 2},
}
MOST_RANK = 32  # columns of a branch that a program takes at once


class _Call:
    """The pairs of one call, sorted by branch, and what every launch passes on."""

    def __init__(self, x, a, b, index, gates):
        self.like = x
        self.branches, self.rank, self.inner = a.shape
        self.outer = b.shape[1]
        self.index = index.contiguous()
        self.rows, self.slots = index.shape
        self.pairs = index.numel()
        self.gates = None if gates is None else gates.contiguous()
        self.groups = 1 if gates is None else gates.shape[2]
        self.acc, self.tile = accumulate_type(x), TILES[x.element_size()]
        self.options = {k: self.tile[k] for k in ("num_warps", "num_stages")}
        self.types = {"ACC": accumulator(x), "DOT": _dot_type(x)}
        self.block_rank = min(MOST_RANK, max(16, triton.next_power_of_2(max(self.rank, 1))))
        valid = (self.index >= 0) & (self.index < self.branches)
        key, self.order = torch.where(valid, self.index, -1).reshape(-1).sort(stable=True)
        edges = torch.arange(self.branches + 1, device=x.device)
        self.offsets = torch.searchsorted(key, edges)
        size = self.tile["rows"]
        tiles = (self.offsets.diff() + size - 1) // size
        ends = tiles.cumsum(0)
        self.tiles = min(triton.cdiv(self.pairs, size) + self.branches, max(self.pairs, 1))
        number = torch.arange(self.tiles, device=x.device)
        self.tile_branch = torch.searchsorted(ends, number, right=True)
        branch = self.tile_branch.clamp(max=self.branches - 1)
        self.tile_begin = self.offsets[branch] + (number - (ends - tiles)[branch]) * size

    def shrink(self, x, m, bias, steps, width):
        out = x.new_zeros((self.rows, self.slots, self.rank), dtype=self.acc)
        if out.numel():
            grid = (self.tiles, triton.cdiv(self.rank, self.block_rank))
            adapter_shrink_kernel[grid](
                x, m, x if bias is None else bias, out, self.order, self.offsets, self.tile_branch,
                self.tile_begin, self.branches, self.slots, width, self.rank, *steps,
                HAS_BIAS=bias is not None, **self.types, BM=self.tile["rows"], BR=self.block_rank,
                BK=self.tile["depth"], **self.options,
            )  # fmt: skip
        return out

    def expand(self, pre, gates, scaling, activation, m, steps, y, width):
        if y.numel() == 0 or self.pairs == 0 or self.rank == 0:
            return
        to = y
        if self.slots > 1:
            to = y.new_empty((self.pairs, width), dtype=self.acc)
        columns = self.tile["columns"]
        adapter_expand_kernel[(self.tiles, triton.cdiv(width, columns))](
            pre, pre if gates is None else gates, m, to, self.order, self.offsets, self.tile_branch,
            self.tile_begin, self.branches, scaling, width, self.rank, self.groups, *steps,
            ADD=self.slots == 1, GATED=gates is not None, ACT=activation, **self.types,
            BM=self.tile["rows"], BN=columns, BR=self.block_rank, **self.options,
        )  # fmt: skip
        if self.slots > 1:
            grid = (self.rows, triton.cdiv(width, 1024))
            adapter_combine_kernel[grid](
                to, self.index, y, self.branches, self.slots, width, ACC=self.types["ACC"], BN=1024,
                num_warps=4,
            )  # fmt: skip

    def outer_sum(self, pre, gates, scaling, activation, x, width, turned, need, need_bias):
        shape = (self.branches, width, self.rank) if turned else (self.branches, self.rank, width)
        out = x.new_empty(shape if need else (0,), dtype=self.acc)
        bias = x.new_empty((self.branches, self.rank) if need_bias else (0,), dtype=self.acc)
        if (need or need_bias) and self.rank:
            columns = self.tile["columns"]
            grid = (
                self.branches,
                triton.cdiv(self.rank, self.block_rank),
                max(1, triton.cdiv(width, columns)) if need else 1,
            )
            adapter_outer_kernel[grid](
                pre, pre if gates is None else gates, x, out, bias, self.order, self.offsets, scaling,
                self.slots, width, self.rank, self.groups, 1 if turned else width,
                self.rank if turned else 1, NEED=need, NEED_BIAS=need_bias, GATED=gates is not None,
                ACT=activation, **self.types, BR=self.block_rank, BN=columns, BB=32, **self.options,
            )  # fmt: skip
        return out, bias


def _start(x, weight, bias, residual, columns):
    """What the branches are added to: the shared product, x, or zero."""
    if weight is not None:
        bias = None if bias is None else bias.to(x.dtype)
        y = torch.nn.functional.linear(x, weight.to(x.dtype), bias)
        return y.contiguous()
    return x.clone() if residual else x.new_zeros((x.shape[0], columns))


def adapter_linear(x, weight, bias, a, a_bias, b, index, gates, scaling, activation, residual):
    x, a, b = x.contiguous(), a.contiguous(), b.contiguous()
    a_bias = None if a_bias is None else a_bias.contiguous()
    with on_device_of(x):
        call = _Call(x, a, b, index, gates)
        y = _start(x, weight, bias, residual, call.outer)
        size = call.rank * call.inner
        pre = call.shrink(x, a, a_bias, (size, 1, call.inner), call.inner)
        steps = (call.rank * call.outer, 1, call.rank)
        call.expand(pre, call.gates, scaling, activation, b, steps, y, call.outer)
    return y, pre


def adapter_linear_backward(
    dy, x, weight, a, b, pre, index, gates, scaling, activation, residual, need_x, need_weight, need_bias,
    need_a, need_a_bias, need_b, need_gates,
):  # fmt: skip
    dy, x, a, b, pre = (t.contiguous() for t in (dy, x, a, b, pre))
    with on_device_of(x):
        call = _Call(x, a, b, index, gates)
        acc, gates, size = call.acc, call.gates, call.rank * call.inner
        none = x.new_empty(0, dtype=acc)
        u = call.shrink(dy, b, None, (call.rank * call.outer, call.rank, 1), call.outer)
        v = torch.empty_like(u)
        dgates = x.new_empty(gates.shape if need_gates else (0,), dtype=acc)
        if call.pairs:
            width = max(call.rank // call.groups, 1)
            adapter_slopes_kernel[(triton.cdiv(call.pairs, 32), call.groups)](
                pre, u, pre if gates is None else gates, v, dgates, scaling, call.pairs, call.rank,
                call.groups, GATED=gates is not None, NEED_GATES=need_gates, ACT=activation,
                ACC=call.types["ACC"], BP=32, BW=min(64, triton.next_power_of_2(width)), num_warps=4,
            )  # fmt: skip
        dx = x.new_empty(0)
        if need_x:
            dx = dy.clone() if residual else x.new_zeros(x.shape)
            if weight is not None:
                dx = dy @ weight.to(dy.dtype)
            call.expand(v, None, 1.0, 0, a, (size, call.inner, 1), dx, call.inner)
        da, da_bias = call.outer_sum(v, None, 1.0, 0, x, call.inner, False, need_a, need_a_bias)
        db, _ = call.outer_sum(pre, gates, scaling, activation, dy, call.outer, True, need_b, False)
        dweight = none
        if weight is not None:
            dweight = (dy.mT @ x).to(weight.dtype) if need_weight else weight.new_empty(0)
        dbias = dy.sum(0, dtype=acc) if need_bias else none.clone()
    return dx, dweight, dbias, da, da_bias, db, dgates


# ---- ahead-of-time compilation -----------------------------------------------------------------------


def aot() -> Iterator[AotCase]:
    tables = {k: "*i64" for k in ("order", "offsets", "tile_branch", "tile_begin")}
    for name, size, element, dot in (
        ("bf16", 2, "*bf16", tl.bfloat16),
        ("fp32", 4, "*fp32", tl.float32),
    ):
        tile = TILES[size]
        launch = {k: tile[k] for k in ("num_warps", "num_stages")}
        types = {"ACC": tl.float32, "DOT": dot}
        yield AotCase(
            name=f"adapter_shrink_{name}",
            fn=adapter_shrink_kernel,
            signature={
                "x": element, "m": element, "bias": "*fp32", "pre": "*fp32", **tables, "branches": "i32",
                "width": "i32", "rank": "i32", "m_step": "i32", "m_column": "i32",
            },
            constexprs={
                "slots": 1, "m_row": 1, "HAS_BIAS": False, **types, "BM": tile["rows"], "BR": 16,
                "BK": tile["depth"],
            },
            divisible_by_16=("x", "m", "pre", "width", "rank", "m_step", "m_column", *tables),
            **launch,
        )  # fmt: skip
        yield AotCase(
            name=f"adapter_expand_{name}",
            fn=adapter_expand_kernel,
            signature={
                "pre": "*fp32", "gates": "*fp32", "m": element, "y": element, **tables, "branches": "i32",
                "scaling": "fp32", "width": "i32", "rank": "i32", "m_step": "i32", "m_column": "i32",
            },
            constexprs={
                "groups": 1, "m_row": 1, "ADD": True, "GATED": True, "ACT": 0, **types,
                "BM": tile["rows"], "BN": tile["columns"], "BR": 16,
            },
            divisible_by_16=("pre", "m", "y", "width", "rank", "m_step", "m_column", *tables),
            **launch,
        )  # fmt: skip
        yield AotCase(
            name=f"adapter_outer_{name}",
            fn=adapter_outer_kernel,
            signature={
                "pre": "*fp32", "gates": "*fp32", "x": element, "out": "*fp32", "bias": "*fp32",
                "order": "*i64", "offsets": "*i64", "scaling": "fp32", "width": "i32", "rank": "i32",
                "step_j": "i32",
            },
            constexprs={
                "slots": 1, "groups": 1, "step_i": 1, "NEED": True, "NEED_BIAS": True, "GATED": True,
                "ACT": 2, **types, "BR": 16, "BN": tile["columns"], "BB": 32,
            },
            divisible_by_16=("pre", "x", "out", "width", "rank", "step_j", "order", "offsets"),
            **launch,
        )  # fmt: skip
    yield AotCase(
        name="adapter_slopes",
        fn=adapter_slopes_kernel,
        signature={
            "pre": "*fp32", "u": "*fp32", "gates": "*fp32", "v": "*fp32", "dgates": "*fp32",
            "scaling": "fp32", "pairs": "i32", "rank": "i32",
        },
        constexprs={
            "groups": 1, "GATED": True, "NEED_GATES": True, "ACT": 2, "ACC": tl.float32, "BP": 32, "BW": 16,
        },
        divisible_by_16=("pre", "u", "v", "rank"),
    )  # fmt: skip
    yield AotCase(
        name="adapter_combine",
        fn=adapter_combine_kernel,
        signature={
            "parts": "*fp32", "index": "*i64", "y": "*bf16", "branches": "i32", "slots": "i32",
            "width": "i32",
        },
        constexprs={"ACC": tl.float32, "BN": 1024},
        divisible_by_16=("parts", "y", "width"),
    )  # fmt: skip
