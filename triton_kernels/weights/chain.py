"""GPU kernels of core `chain`: the formulas are in solera/weights/chain.py.

A program takes R whole rows through all levels. Of each pair the first element goes on to the next level's row, half
as long, which lies in a scratch of the program's own that stays in the caches; the second is at its column of x or y.
(Whole rows in registers, taken apart by tl.split and joined again, were compiled to conversions between layouts with
up to 6 KB of spills a thread.) Bytes a row of d elements: forward 2d, backward 3d (x and dy are read, dx written), and
a part of the parameters' gradients for each program.

H200 at 4.3 TB/s, float32, 32768 x 4096: forward 250 us, backward 375 us are the floors.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl

from .._launch import accumulate_type, accumulator, on_device_of, processors
from ..norm.row_norm import sum_partials_kernel


@triton.jit
def _turn(
    coefficients, at, pairs, there, first, second, BLOCKS: tl.constexpr, TRANSPOSED: tl.constexpr
):
    """The blocks at `at` [1, S] on pairs [R, S], or their transposes; nothing where there is no pair."""
    if BLOCKS:
        b00 = tl.load(coefficients + at, mask=there, other=1.0)
        b01 = tl.load(coefficients + pairs + at, mask=there, other=0.0)
        b10 = tl.load(coefficients + 2 * pairs + at, mask=there, other=0.0)
        b11 = tl.load(coefficients + 3 * pairs + at, mask=there, other=1.0)
    else:
        b00 = tl.load(coefficients + at, mask=there, other=1.0)
        b10 = tl.load(coefficients + pairs + at, mask=there, other=0.0)
        b01 = -b10
        b11 = b00
    if TRANSPOSED:
        b01, b10 = b10, b01
    return b00 * first + b01 * second, b10 * first + b11 * second


# A row between the levels, [R, n] with n = ceil(d / 2^l), lies in a scratch after 2 (d - n) + l numbers. What one
# thread puts there another one takes: a barrier after each level.


@triton.jit
def _size(d, l):
    """Elements of level l's rows."""
    return (d + (1 << l) - 1) >> l


@triton.jit
def _start(d, l):
    return 2 * (d - _size(d, l)) + l


@triton.jit
def _factor(scale, col, mask, SCALED: tl.constexpr, ACC: tl.constexpr):
    """The scale of these columns, or 1."""
    if SCALED:
        return tl.load(scale + col, mask=mask, other=0.0)
    return tl.full(col.shape, 1.0, ACC)


@triton.jit
def _add_part(to, value, mask, started):
    """to [1, S] += the sum of value [R, S] over rows; the first time, to = it."""
    before = tl.load(to, mask=mask & started, other=0.0)
    tl.store(to, before + tl.sum(value, 0)[None, :], mask=mask)


@triton.jit
def _add_gradient(
    parts, at, pairs, there, a, b, in_a, in_b, out_a, out_b, started, BLOCKS: tl.constexpr
):
    """The pair (a, b) went in; in_ is its gradient there, out_ on the other side."""
    if BLOCKS:
        _add_part(parts + at, out_a * a, there, started)
        _add_part(parts + pairs + at, out_a * b, there, started)
        _add_part(parts + 2 * pairs + at, out_b * a, there, started)
        _add_part(parts + 3 * pairs + at, out_b * b, there, started)
    else:
        _add_part(parts + at, a * in_b - b * in_a, there, started)


@triton.jit
def _down(src, low, ends, coefficients, scale, dy, scale_parts, d, l, start, inside, started,
          SCALED: tl.constexpr, NEED_SCALE: tl.constexpr, STORE: tl.constexpr, BLOCKS: tl.constexpr,
          ACC: tl.constexpr, S: tl.constexpr):  # fmt: skip
    """Level l of the natural order: pairs of src, the first on to the next level's row, the second to its column.

    With NEED_SCALE the second's share in the scale's gradient is added.
    """
    n = _size(d, l)
    for begin in range(0, (n + 1) // 2, S):
        k = begin + tl.arange(0, S)[None, :]
        there = k < n // 2
        a = tl.load(src + start + 2 * k, mask=inside & (2 * k < n), other=0.0).to(ACC)
        b = tl.load(src + start + 2 * k + 1, mask=inside & there, other=0.0).to(ACC)
        a, b = _turn(coefficients, d - n + k, d - 1, there, a, b, BLOCKS, False)
        tl.store(low + _start(d, l + 1) + k, a, mask=inside & (2 * k < n))
        col = (2 * k + 1) << l
        if STORE:
            value = b * _factor(scale, col, there, SCALED, ACC)
            tl.store(ends + col, value.to(ends.dtype.element_ty), mask=inside & there)
        if NEED_SCALE:
            g = tl.load(dy + col, mask=inside & there, other=0.0).to(ACC)
            _add_part(scale_parts + col, b * g, there, started)
    tl.debug_barrier()


@triton.jit
def _up(x, above, dst, coefficients, scale, d, l, start, inside, SCALED: tl.constexpr, BLOCKS: tl.constexpr,
        ACC: tl.constexpr, S: tl.constexpr):  # fmt: skip
    """Level l of the reversed order: the row above and the columns of x that join it, into the row dst."""
    n = _size(d, l)
    for begin in range(0, (n + 1) // 2, S):
        k = begin + tl.arange(0, S)[None, :]
        there = k < n // 2
        col = (2 * k + 1) << l
        a = tl.load(above + _start(d, l + 1) + k, mask=inside & (2 * k < n), other=0.0)
        b = tl.load(x + col, mask=inside & there, other=0.0).to(ACC)
        b *= _factor(scale, col, there, SCALED, ACC)
        a, b = _turn(coefficients, d - n + k, d - 1, there, a, b, BLOCKS, False)
        to = dst + start + 2 * k
        tl.store(to, a.to(dst.dtype.element_ty), mask=inside & (2 * k < n))
        tl.store(to + 1, b.to(dst.dtype.element_ty), mask=inside & there)
    tl.debug_barrier()


@triton.jit
def givens_forward_kernel(
    x, y, coefficients, scale, scratch, rows, d, levels, tiles,
    BLOCKS: tl.constexpr, REVERSED: tl.constexpr, SCALED: tl.constexpr, ACC: tl.constexpr,
    R: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """Rows of `tiles` tiles in turn."""
    program = tl.program_id(0).to(tl.int64)
    r = tl.arange(0, R)[:, None]
    row_size = 2 * d + levels + 1
    low = scratch + (program * R + r) * row_size
    zero = tl.zeros((1, 1), tl.int32)
    top = _start(d, levels)
    for tile in range(tiles):
        row = (program * tiles + tile) * R + r
        inside = row < rows
        xr, yr = x + row * d, y + row * d
        s = _factor(scale, zero, zero == 0, SCALED, ACC)
        if REVERSED:
            root = tl.load(xr, mask=inside, other=0.0).to(ACC) * s
            tl.store(low + top, root, mask=inside)
            tl.debug_barrier()
            for i in range(levels - 1):
                l = levels - 1 - i
                _up(
                    xr,
                    low,
                    low,
                    coefficients,
                    scale,
                    d,
                    l,
                    _start(d, l),
                    inside,
                    SCALED,
                    BLOCKS,
                    ACC,
                    S,
                )
            if levels > 0:
                _up(xr, low, yr, coefficients, scale, d, 0, 0, inside, SCALED, BLOCKS, ACC, S)
            else:
                tl.store(yr, root.to(y.dtype.element_ty), mask=inside)
        else:
            if levels > 0:
                _down(
                    xr, low, yr, coefficients, scale, yr, yr, d, 0, 0, inside, False, SCALED, False, True,
                    BLOCKS, ACC, S,
                )  # fmt: skip
                for l in range(1, levels):
                    _down(
                        low, low, yr, coefficients, scale, yr, yr, d, l, _start(d, l), inside, False, SCALED,
                        False, True, BLOCKS, ACC, S,
                    )  # fmt: skip
                root = tl.load(low + top, mask=inside, other=0.0)
            else:
                root = tl.load(xr, mask=inside, other=0.0).to(ACC)
            tl.store(yr, (root * s).to(y.dtype.element_ty), mask=inside)
        tl.debug_barrier()


@triton.jit
def _gradient_up(dy, above, x, dst, coefficients, scale, parts, d, l, start, x_start, inside, started,
                 STORE: tl.constexpr, NEED_PARTS: tl.constexpr, SCALED: tl.constexpr, BLOCKS: tl.constexpr,
                 ACC: tl.constexpr, S: tl.constexpr):  # fmt: skip
    """Level l of the natural order's backward: the gradient's row above joined by columns of dy, into the row dst."""
    n = _size(d, l)
    for begin in range(0, (n + 1) // 2, S):
        k = begin + tl.arange(0, S)[None, :]
        there = k < n // 2
        col = (2 * k + 1) << l
        out_a = tl.load(above + _start(d, l + 1) + k, mask=inside & (2 * k < n), other=0.0)
        out_b = tl.load(dy + col, mask=inside & there, other=0.0).to(ACC)
        out_b *= _factor(scale, col, there, SCALED, ACC)
        in_a, in_b = _turn(coefficients, d - n + k, d - 1, there, out_a, out_b, BLOCKS, True)
        if NEED_PARTS:
            a = tl.load(x + x_start + 2 * k, mask=inside & there, other=0.0).to(ACC)
            b = tl.load(x + x_start + 2 * k + 1, mask=inside & there, other=0.0).to(ACC)
            _add_gradient(
                parts, d - n + k, d - 1, there, a, b, in_a, in_b, out_a, out_b, started, BLOCKS
            )
        if STORE:
            to = dst + start + 2 * k
            tl.store(to, in_a.to(dst.dtype.element_ty), mask=inside & (2 * k < n))
            tl.store(to + 1, in_b.to(dst.dtype.element_ty), mask=inside & there)
    tl.debug_barrier()


@triton.jit
def givens_backward_kernel(
    dy, x, dx, coefficients, scale, parts, scale_parts, scratch, rows, d, levels, tiles,
    NEED_X: tl.constexpr, NEED_PARTS: tl.constexpr, NEED_SCALE: tl.constexpr, BLOCKS: tl.constexpr,
    SCALED: tl.constexpr, ACC: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """Natural order; the parameters' gradients of this program's rows in its row of parts."""
    program = tl.program_id(0).to(tl.int64)
    parts += program * (4 if BLOCKS else 1) * (d - 1)
    scale_parts += program * d
    r = tl.arange(0, R)[:, None]
    row_size = 2 * d + levels + 1
    x_low = scratch + (program * 2 * R + r) * row_size
    g_low = x_low + R * row_size
    zero = tl.zeros((1, 1), tl.int32)
    top = _start(d, levels)
    for tile in range(tiles):
        started = tile > 0
        row = (program * tiles + tile) * R + r
        inside = row < rows
        xr, gr, dxr = x + row * d, dy + row * d, dx + row * d
        if NEED_PARTS or NEED_SCALE:
            _down(
                xr, x_low, xr, coefficients, scale, gr, scale_parts, d, 0, 0, inside, started, SCALED,
                NEED_SCALE, False, BLOCKS, ACC, S,
            )  # fmt: skip
            for l in range(1, levels):
                _down(
                    x_low, x_low, xr, coefficients, scale, gr, scale_parts, d, l, _start(d, l), inside, started,
                    SCALED, NEED_SCALE, False, BLOCKS, ACC, S,
                )  # fmt: skip
        g = tl.load(gr, mask=inside, other=0.0).to(ACC)
        if NEED_SCALE:
            root = tl.load(x_low + top, mask=inside, other=0.0)
            _add_part(scale_parts + zero, root * g, zero == 0, started)
        g *= _factor(scale, zero, zero == 0, SCALED, ACC)
        tl.store(g_low + top, g, mask=inside)
        tl.debug_barrier()
        for i in range(levels - 1):
            l = levels - 1 - i
            _gradient_up(
                gr, g_low, x_low, g_low, coefficients, scale, parts, d, l, _start(d, l), _start(d, l), inside,
                started, True, NEED_PARTS, SCALED, BLOCKS, ACC, S,
            )  # fmt: skip
        _gradient_up(
            gr, g_low, xr, dxr, coefficients, scale, parts, d, 0, 0, 0, inside, started, NEED_X, NEED_PARTS,
            SCALED, BLOCKS, ACC, S,
        )  # fmt: skip


@triton.jit
def _gradient_down(src, low, x, above, dx, coefficients, scale, parts, scale_parts, d, l, start, inside, started,
                   NEED_X: tl.constexpr, NEED_PARTS: tl.constexpr, NEED_SCALE: tl.constexpr,
                   SCALED: tl.constexpr, BLOCKS: tl.constexpr, ACC: tl.constexpr, S: tl.constexpr):  # fmt: skip
    """Level l of the reversed order's backward: pairs of src, the first on to the next row, the second to dx."""
    n = _size(d, l)
    for begin in range(0, (n + 1) // 2, S):
        k = begin + tl.arange(0, S)[None, :]
        there = k < n // 2
        col = (2 * k + 1) << l
        out_a = tl.load(src + start + 2 * k, mask=inside & (2 * k < n), other=0.0).to(ACC)
        out_b = tl.load(src + start + 2 * k + 1, mask=inside & there, other=0.0).to(ACC)
        in_a, in_b = _turn(coefficients, d - n + k, d - 1, there, out_a, out_b, BLOCKS, True)
        tl.store(low + _start(d, l + 1) + k, in_a, mask=inside & (2 * k < n))
        s = _factor(scale, col, there, SCALED, ACC)
        if NEED_PARTS or NEED_SCALE:
            b = tl.load(x + col, mask=inside & there, other=0.0).to(ACC)
            if NEED_SCALE:
                _add_part(scale_parts + col, in_b * b, there, started)
            if NEED_PARTS:
                a = tl.load(above + _start(d, l + 1) + k, mask=inside & there, other=0.0)
                _add_gradient(
                    parts, d - n + k, d - 1, there, a, b * s, in_a, in_b, out_a, out_b, started, BLOCKS
                )  # fmt: skip
        if NEED_X:
            tl.store(dx + col, (in_b * s).to(dx.dtype.element_ty), mask=inside & there)
    tl.debug_barrier()


@triton.jit
def givens_reversed_backward_kernel(
    dy, x, dx, coefficients, scale, parts, scale_parts, scratch, rows, d, levels, tiles,
    NEED_X: tl.constexpr, NEED_PARTS: tl.constexpr, NEED_SCALE: tl.constexpr, BLOCKS: tl.constexpr,
    SCALED: tl.constexpr, ACC: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """The same where the scale comes first and the levels last to first."""
    program = tl.program_id(0).to(tl.int64)
    parts += program * (4 if BLOCKS else 1) * (d - 1)
    scale_parts += program * d
    r = tl.arange(0, R)[:, None]
    row_size = 2 * d + levels + 1
    x_low = scratch + (program * 2 * R + r) * row_size
    g_low = x_low + R * row_size
    zero = tl.zeros((1, 1), tl.int32)
    top = _start(d, levels)
    for tile in range(tiles):
        started = tile > 0
        row = (program * tiles + tile) * R + r
        inside = row < rows
        xr, gr, dxr = x + row * d, dy + row * d, dx + row * d
        s = _factor(scale, zero, zero == 0, SCALED, ACC)
        first = tl.load(xr, mask=inside, other=0.0).to(ACC)
        if NEED_PARTS:
            tl.store(x_low + top, first * s, mask=inside)
            tl.debug_barrier()
            for i in range(levels - 1):
                l = levels - 1 - i
                _up(
                    xr,
                    x_low,
                    x_low,
                    coefficients,
                    scale,
                    d,
                    l,
                    _start(d, l),
                    inside,
                    SCALED,
                    BLOCKS,
                    ACC,
                    S,
                )
        _gradient_down(
            gr, g_low, xr, x_low, dxr, coefficients, scale, parts, scale_parts, d, 0, 0, inside, started, NEED_X,
            NEED_PARTS, NEED_SCALE, SCALED, BLOCKS, ACC, S,
        )  # fmt: skip
        for l in range(1, levels):
            _gradient_down(
                g_low, g_low, xr, x_low, dxr, coefficients, scale, parts, scale_parts, d, l, _start(d, l), inside,
                started, NEED_X, NEED_PARTS, NEED_SCALE, SCALED, BLOCKS, ACC, S,
            )  # fmt: skip
        g = tl.load(g_low + top, mask=inside, other=0.0)
        if NEED_SCALE:
            _add_part(scale_parts + zero, first * g, zero == 0, started)
        if NEED_X:
            tl.store(dxr, (g * s).to(dx.dtype.element_ty), mask=inside)
        tl.debug_barrier()


# ---- launchers ---------------------------------------------------------------------------------------


def _config(x) -> dict[str, int]:
    """S slots of R rows at a time: four a thread."""
    S = max(16, min(512, triton.next_power_of_2(triton.cdiv(x.shape[1], 2))))
    if not x.is_cuda:  # the interpreter pays by the step
        return {"R": 8192 // S, "S": S, "num_warps": 4}
    return {"R": 512 // S, "S": S, "num_warps": 4}


def _spread(x, rows: int, R: int) -> tuple[int, int]:
    """(programs, tiles a program): a few programs a processor, whose scratch stays in the caches."""
    tiles = triton.cdiv(rows, R)
    each = max(1, triton.cdiv(tiles, 8 * processors(x)))
    return triton.cdiv(tiles, each), each


def _levels(d: int) -> int:
    return (d - 1).bit_length()


def _check(x, coefficients, scale):
    """What does not fit would be read past its end."""
    d = x.shape[-1]
    if (
        x.dim() != 2
        or coefficients.dtype != accumulate_type(x)
        or tuple(coefficients.shape) not in ((2, d - 1), (4, d - 1))
        or (scale is not None and (scale.shape != (d,) or scale.dtype != coefficients.dtype))
    ):
        raise RuntimeError("givens_chain: coefficients or scale do not fit x")


def givens_chain(x, coefficients, scale, reverse):
    _check(x, coefficients, scale)
    x, coefficients = x.contiguous(), coefficients.contiguous()
    rows, d = x.shape
    y = x.new_empty(x.shape)
    if rows:
        config = _config(x)
        programs, each = _spread(x, rows, config["R"])
        scratch = coefficients.new_empty(programs * config["R"] * (2 * d + _levels(d) + 1))
        with on_device_of(x):
            givens_forward_kernel[(programs,)](
                x, y, coefficients, x if scale is None else scale.contiguous(), scratch, rows, d, _levels(d),
                each, BLOCKS=coefficients.shape[0] == 4, REVERSED=reverse, SCALED=scale is not None,
                ACC=accumulator(x), **config,
            )  # fmt: skip
    return y


def _sum(parts):
    """Parts (P, ...) over P, in order."""
    columns = parts[0].numel()
    total = parts.new_empty(parts.shape[1:])
    sum_partials_kernel[(triton.cdiv(columns, 128),)](
        parts, total, parts.shape[0], columns, C=128, num_warps=4
    )
    return total


def givens_chain_backward(
    dy, x, coefficients, scale, reverse, need_x, need_coefficients, need_scale
):
    _check(x, coefficients, scale)
    x, dy, coefficients = x.contiguous(), dy.contiguous(), coefficients.contiguous()
    rows, d = x.shape
    need_scale = need_scale and scale is not None
    if d == 1 or rows == 0:
        from solera.weights.chain import _givens_chain_backward

        return _givens_chain_backward(
            dy, x, coefficients, scale, reverse, need_x, need_coefficients, need_scale
        )
    blocks = coefficients.shape[0] == 4
    config = _config(x)
    programs, each = _spread(x, rows, config["R"])
    dx = x.new_empty(x.shape if need_x else (0,))
    width = 4 if blocks else 1
    parts = coefficients.new_empty((programs, width, d - 1) if need_coefficients else (0,))
    scale_parts = coefficients.new_empty((programs, d) if need_scale else (0,))
    scratch = coefficients.new_empty(programs * 2 * config["R"] * (2 * d + _levels(d) + 1))
    kernel = givens_reversed_backward_kernel if reverse else givens_backward_kernel
    with on_device_of(x):
        kernel[(programs,)](
            dy, x, dx, coefficients, x if scale is None else scale.contiguous(), parts, scale_parts, scratch,
            rows, d, _levels(d), each, NEED_X=need_x, NEED_PARTS=need_coefficients, NEED_SCALE=need_scale,
            BLOCKS=blocks, SCALED=scale is not None, ACC=accumulator(x), **config,
        )  # fmt: skip
        return (
            dx,
            _sum(parts) if need_coefficients else parts,
            _sum(scale_parts) if need_scale else scale_parts,
        )


# ---- ahead-of-time compilation -----------------------------------------------------------------------


def aot() -> Iterator:
    """The variants held to tests/budgets.json: narrow, middling and the widest rows, with a scale."""
    from .._aot import AotCase

    values = {
        "coefficients": "*fp32", "scale": "*fp32", "scratch": "*fp32", "rows": "i32", "d": "i32",
        "levels": "i32", "tiles": "i32",
    }  # fmt: skip
    even = ("coefficients", "scale", "scratch", "d")
    for half, R, S in (("*fp32", 16, 32), ("*bf16", 1, 512)):
        for reverse in (False, True):
            order = "reversed" if reverse else "natural"
            constants = {"SCALED": True, "ACC": tl.float32, "R": R, "S": S, "BLOCKS": R == 16}
            yield AotCase(
                name=f"givens_forward_{order}_{S}",
                fn=givens_forward_kernel,
                signature={"x": half, "y": half, **values},
                constexprs={"REVERSED": reverse, **constants},
                divisible_by_16=("x", "y", *even),
            )
            tensors = {"dy": half, "x": half, "dx": half, "parts": "*fp32", "scale_parts": "*fp32"}
            needs = {"NEED_X": True, "NEED_PARTS": True, "NEED_SCALE": True}
            yield AotCase(
                name=f"givens_backward_{order}_{S}",
                fn=givens_reversed_backward_kernel if reverse else givens_backward_kernel,
                signature={**tensors, **values},
                constexprs={**needs, **constants},
                divisible_by_16=(*tensors, *even),
            )
