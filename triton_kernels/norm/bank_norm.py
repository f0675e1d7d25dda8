"""GPU kernels of core `bank_norm`: the formulas are in solera/norm/bank_norm.py.

Products are torch's, on tiles of whole gallery rows; a kernel folds a tile into the running maxima and sums of
its columns, another marks its rows' largest. Bytes: a given matrix is read once for the columns' sums and once
(k times for k largest) for the activation set; a tile of a product is written and read as often, from L2 as far
as it fits.

H200 at 4.3 TB/s, 20,000 x 50,000 float32 given: 0.93 ms for the sums; the product of embeddings of width 256
is 512 GFLOP, about 10 ms at float32's 50 TFLOP/s, and is what counts.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from .._launch import accumulate_type, accumulator, on_device_of

FOLD = {"BM": 32, "BN": 64, "num_warps": 4}
ROW = {"BN": 1024, "num_warps": 4}
WEIGHTS = {"BM": 8, "BN": 256, "num_warps": 4}
TILE_ELEMENTS = 1 << 26  # of a product that exist at a time


@triton.jit
def _log2_e(ACC: tl.constexpr):
    return tl.full((), 1.4426950408889634, ACC)


@triton.jit
def bank_fold_kernel(
    s, maximum, total, lse, rows, columns, beta_at, FIRST: tl.constexpr, LAST: tl.constexpr,
    ACC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Rows of a tile folded into the running maximum and sum of BN columns."""
    j = tl.program_id(0) * BN + tl.arange(0, BN)
    inside = j < columns
    beta = tl.load(beta_at)
    kappa = beta * _log2_e(ACC)
    if FIRST:
        top = tl.full((BN,), float("-inf"), ACC)
        held = tl.zeros((BN,), ACC)
    else:
        top = tl.load(maximum + j, mask=inside, other=0.0)
        held = tl.load(total + j, mask=inside, other=0.0)
    for start in range(0, rows, BM):
        i = start + tl.arange(0, BM)
        at = i.to(tl.int64)[:, None] * columns + j[None, :]
        mask = (i < rows)[:, None] & inside[None, :]
        v = tl.load(s + at, mask=mask, other=float("-inf")).to(ACC)  # [BM, BN]
        new = tl.maximum(top, tl.max(v, 0))
        # An infinite maximum is not subtracted: its own exponential then is infinite or 0, not NaN.
        base = tl.where(new - new == 0, new, 0.0)
        before = tl.where(top - top == 0, top, 0.0)
        held *= tl.exp2(kappa * tl.minimum(before - base, 0.0))
        held += tl.sum(tl.exp2(kappa * (v - base[None, :])), 0)
        top = new
    if LAST:
        base = tl.where(top - top == 0, top, 0.0)
        tl.store(lse + j, beta * base + tl.log(held), mask=inside)
    else:
        tl.store(maximum + j, top, mask=inside)
        tl.store(total + j, held, mask=inside)


@triton.jit
def _next_largest(row, columns, last, last_at, ACC: tl.constexpr, BN: tl.constexpr):
    """The largest of a row behind (last, last_at) in the order of value, then place; -inf if none is."""
    best = tl.full((BN,), float("-inf"), ACC)
    where = tl.full((BN,), 0, tl.int32)
    for start in range(0, columns, BN):
        j = start + tl.arange(0, BN)
        v = tl.load(row + j, mask=j < columns, other=float("-inf")).to(ACC)
        behind = (v < last) | ((v == last) & (j > last_at))
        better = behind & (v > best)
        best = tl.where(better, v, best)
        where = tl.where(better, j, where)
    value = tl.max(best, 0)
    return value, tl.min(tl.where(best == value, where, 2147483647), 0)


@triton.jit
def bank_top_kernel(
    s, values, indices, active, columns, k, FLAGS: tl.constexpr, ACC: tl.constexpr, BN: tl.constexpr
):
    """The k largest of a row: written down, or only marked."""
    i = tl.program_id(0).to(tl.int64)
    last = tl.full((), float("inf"), ACC)
    last_at = tl.full((), -1, tl.int32)
    for n in range(k):
        value, at = _next_largest(s + i * columns, columns, last, last_at, ACC, BN)
        found = value > float("-inf")
        if FLAGS:
            tl.store(active + at, 1, mask=found)
        else:
            tl.store(values + i * k + n, value.to(values.dtype.element_ty))
            tl.store(indices + i * k + n, tl.where(found, at, -1).to(tl.int64))
        last = value
        last_at = at


@triton.jit
def bank_apply_kernel(
    s, out, lse, active, lse2, active2, used, columns, beta_at, beta2_at, DYNAMIC: tl.constexpr,
    FLAGS: tl.constexpr, FLAGS2: tl.constexpr, SECOND: tl.constexpr, ACC: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """One row: its best item if that decides, then the factors it uses."""
    i = tl.program_id(0).to(tl.int64)
    row = s + i * columns
    beta = tl.load(beta_at)
    beta2 = tl.load(beta2_at)
    one = tl.full((), 1, tl.int32)
    two = tl.full((), 1 if SECOND else 0, tl.int32)
    if DYNAMIC:
        last = tl.full((), float("inf"), ACC)
        value, at = _next_largest(row, columns, last, tl.full((), -1, tl.int32), ACC, BN)
        found = value > float("-inf")
        if FLAGS:
            one = tl.load(active + at, mask=found, other=0).to(tl.int32)
        if FLAGS2:
            two = tl.load(active2 + at, mask=found, other=0).to(tl.int32)
    tl.store(used + i, one + 2 * two)
    scale = one * beta + two * beta2
    scale = tl.where(one + two == 0, 1.0, scale)
    for start in range(0, columns, BN):
        j = start + tl.arange(0, BN)
        v = tl.load(row + j, mask=j < columns, other=0.0).to(ACC) * scale
        v -= tl.load(lse + j, mask=(j < columns) & (one != 0), other=0.0)
        if SECOND:
            v -= tl.load(lse2 + j, mask=(j < columns) & (two != 0), other=0.0)
        tl.store(out + i * columns + j, v.to(out.dtype.element_ty), mask=j < columns)


@triton.jit
def bank_weights_kernel(
    s, lse, dlse, out, rows, columns, beta_at, ACC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):
    """beta dL exp(beta s - L) of a tile."""
    beta = tl.load(beta_at)
    i = tl.program_id(0) * BM + tl.arange(0, BM)
    j = tl.program_id(1) * BN + tl.arange(0, BN)
    at = i.to(tl.int64)[:, None] * columns + j[None, :]
    mask = (i < rows)[:, None] & (j < columns)[None, :]
    v = tl.load(s + at, mask=mask, other=0.0).to(ACC)
    shift = tl.load(lse + j, mask=j < columns, other=0.0)
    d = tl.load(dlse + j, mask=j < columns, other=0.0) * beta
    v = tl.exp2((beta * v - shift[None, :]) * _log2_e(ACC)) * d[None, :]
    tl.store(out + at, v.to(out.dtype.element_ty), mask=mask)


# ---- launchers ---------------------------------------------------------------------------------------


def _number(value, like):
    """A number on the device in the accumulator's precision; a float argument would be a float32."""
    return like.new_full((), value, dtype=accumulate_type(like))


def _product(a, b):
    """a @ b, not lowered to half precision by autocast."""
    with torch.autocast(a.device.type, enabled=False):
        return a @ b


def _fold(s, state, lse, beta, first, last):
    rows, columns = s.shape
    bank_fold_kernel[(triton.cdiv(columns, FOLD["BN"]),)](
        s,
        *state,
        lse,
        rows,
        columns,
        _number(beta, s),
        FIRST=first,
        LAST=last,
        ACC=accumulator(s),
        **FOLD,
    )


def _mark(s, active, k):
    bank_top_kernel[(s.shape[0],)](
        s, s, s, active, s.shape[1], k, FLAGS=True, ACC=accumulator(s), **ROW
    )


def _activation(like, columns, top_k):
    return like.new_zeros(columns if top_k else 0, dtype=torch.uint8)


def bank_columns(similarities, beta, top_k):
    s = similarities.contiguous()
    rows, columns = s.shape
    lse = s.new_empty(columns, dtype=accumulate_type(s))
    active = _activation(s, columns, top_k)
    if columns:
        with on_device_of(s):
            _fold(s, (lse, lse), lse, beta, True, True)
            if top_k and rows:
                _mark(s, active, min(top_k, columns))
    return lse, active.bool()


def bank_columns_backward(dlse, lse, similarities, beta):
    s = similarities.contiguous()
    out = s.new_empty(s.shape)
    if s.numel():
        with on_device_of(s):
            _weights(s, lse, dlse, out, beta)
    return out


def _weights(s, lse, dlse, out, beta):
    acc = accumulate_type(s)
    rows, columns = s.shape
    grid = (triton.cdiv(rows, WEIGHTS["BM"]), triton.cdiv(columns, WEIGHTS["BN"]))
    bank_weights_kernel[grid](
        s, lse.to(acc).contiguous(), dlse.to(acc).contiguous(), out, rows, columns, _number(beta, s),
        ACC=accumulator(s), **WEIGHTS,
    )  # fmt: skip


def _blocks(x, columns):
    """Blocks of rows whose products with `columns` rows are one tile each."""
    return x.split(max(64, TILE_ELEMENTS // max(columns, 1)))


def bank_stream(bank, gallery, beta, top_k):
    acc = accumulate_type(bank)
    columns = gallery.shape[0]
    y = gallery.to(acc).T
    state = torch.empty((3, columns), dtype=acc, device=bank.device).unbind(0)
    active = _activation(bank, columns, top_k)
    blocks = _blocks(bank, columns)
    if columns:
        with on_device_of(bank):
            for n, block in enumerate(blocks):
                s = _product(block.to(acc), y)
                _fold(s, state[:2], state[2], beta, n == 0, n + 1 == len(blocks))
                if top_k and s.shape[0]:
                    _mark(s, active, min(top_k, columns))
    return state[2].clone(), active.bool()


def bank_stream_backward(dlse, lse, bank, gallery, beta, need_bank, need_gallery):
    acc = accumulate_type(bank)
    y = gallery.to(acc)
    dbank = bank.new_zeros(bank.shape if need_bank else (0,), dtype=acc)
    dgallery = bank.new_zeros(gallery.shape if need_gallery else (0,), dtype=acc)
    if bank.shape[0] == 0 or y.shape[0] == 0:
        return dbank, dgallery
    first = 0
    with on_device_of(bank):
        for block in _blocks(bank, y.shape[0]):
            x = block.to(acc)
            d = _product(x, y.T)
            _weights(d, lse, dlse, d, beta)
            if need_bank:
                dbank[first : first + len(x)] = _product(d, y)
            if need_gallery:
                dgallery += _product(d.T, x)
            first += len(x)
    return dbank, dgallery


def _apply(s, out, used, lse, active, beta, lse2, active2, beta2):
    acc = accumulate_type(s)
    second = lse2 is not None
    bank_apply_kernel[(s.shape[0],)](
        s, out, lse.to(acc).contiguous(), s if active is None else active.contiguous().view(torch.uint8),
        lse2.to(acc).contiguous() if second else s,
        s if active2 is None else active2.contiguous().view(torch.uint8), used, s.shape[1],
        _number(beta, s), _number(beta2, s),
        DYNAMIC=active is not None or active2 is not None, FLAGS=active is not None,
        FLAGS2=active2 is not None, SECOND=second, ACC=accumulator(s), **ROW,
    )  # fmt: skip


def bank_apply(similarities, lse, active, beta, lse2, active2, beta2):
    s = similarities.contiguous()
    out = s.new_empty(s.shape)
    used = s.new_empty(s.shape[0], dtype=torch.int32)
    if s.shape[0]:
        with on_device_of(s):
            _apply(s, out, used, lse, active, beta, lse2, active2, beta2)
    return out, used


def bank_scores(queries, gallery, lse, active, beta, lse2, active2, beta2):
    acc = accumulate_type(queries)
    s = _product(queries.to(acc), gallery.to(acc).T)
    if s.shape[0]:
        used = s.new_empty(s.shape[0], dtype=torch.int32)
        with on_device_of(s):
            _apply(s, s, used, lse, active, beta, lse2, active2, beta2)
    return s


def row_top(scores, k):
    s = scores.contiguous()
    values = s.new_empty((s.shape[0], k))
    indices = s.new_empty((s.shape[0], k), dtype=torch.int64)
    if values.numel():
        with on_device_of(s):
            bank_top_kernel[(s.shape[0],)](
                s, values, indices, s, s.shape[1], k, FLAGS=False, ACC=accumulator(s), **ROW
            )
    return values, indices


# ---- ahead-of-time compilation -----------------------------------------------------------------------


def aot() -> Iterator:
    """The variants held to tests/budgets.json, of float32 and bfloat16 similarities."""
    from .._aot import AotCase

    acc = "*fp32"

    def options(config, **flags):
        config = dict(config)
        warps = config.pop("num_warps")
        return {"constexprs": {**flags, "ACC": tl.float32, **config}, "num_warps": warps}

    for name, element in (("fp32", acc), ("bf16", "*bf16")):
        for first, last in ((True, True), (False, False)):
            yield AotCase(
                name=f"bank_fold_{name}_{'whole' if last else 'part'}",
                fn=bank_fold_kernel,
                signature={
                    "s": element, "maximum": acc, "total": acc, "lse": acc, "rows": "i32",
                    "columns": "i32", "beta_at": acc,
                },
                divisible_by_16=("s", "maximum", "total", "lse", "columns"),
                **options(FOLD, FIRST=first, LAST=last),
            )  # fmt: skip
        for flags in (True, False):
            yield AotCase(
                name=f"bank_top_{name}_{'flags' if flags else 'values'}",
                fn=bank_top_kernel,
                signature={
                    "s": element, "values": element, "indices": "*i64", "active": "*u8",
                    "columns": "i32", "k": "i32",
                },
                divisible_by_16=("s", "values", "indices", "active", "columns"),
                **options(ROW, FLAGS=flags),
            )  # fmt: skip
        yield AotCase(
            name=f"bank_apply_{name}",
            fn=bank_apply_kernel,
            signature={
                "s": element, "out": element, "lse": acc, "active": "*u8", "lse2": acc,
                "active2": "*u8", "used": "*i32", "columns": "i32", "beta_at": acc, "beta2_at": acc,
            },
            divisible_by_16=("s", "out", "lse", "active", "lse2", "active2", "used", "columns"),
            **options(ROW, DYNAMIC=True, FLAGS=True, FLAGS2=True, SECOND=True),
        )  # fmt: skip
        yield AotCase(
            name=f"bank_weights_{name}",
            fn=bank_weights_kernel,
            signature={
                "s": element, "lse": acc, "dlse": acc, "out": element, "rows": "i32", "columns": "i32",
                "beta_at": acc,
            },
            divisible_by_16=("s", "lse", "dlse", "out", "columns"),
            **options(WEIGHTS),
        )  # fmt: skip
