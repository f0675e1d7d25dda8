"""GPU kernels of core `grad_step`: fused steps over lists; the formulas are in solera/norm/grad_step.py.

One launch covers all entries of one combination of dtypes through a pointer table (see weights/_table.py). Bytes an
element in float32: `adam_step_` reads p, g, m, v and writes p, m, v (28); `fira_scale_` reads and writes the
residual once, after a launch over the small reduced matrices that gives phi.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from .._launch import on_device_of
from ..weights._table import LANGUAGE_DTYPE, aligned, build, pointer, program_of, size
from .grad_norm import accumulator, clipped, config, joined, put_back, wide


@triton.jit
def _number(numbers, index, ACC: tl.constexpr):
    return tl.load(numbers + index).to(ACC)


# A row of the table: p, g, m, v, the number of elements, the index in the list.
@triton.jit
def adam_step_kernel(
    rows, programs, clip, scale, numbers, length, P: tl.constexpr, G: tl.constexpr, M: tl.constexpr,
    V: tl.constexpr, ACC: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    item, chunk = program_of(programs)
    row = rows + item * 6
    p, g = pointer(row, P, ALIGNED), pointer(row + 1, G, ALIGNED)
    m, v = pointer(row + 2, M, ALIGNED), pointer(row + 3, V, ALIGNED)
    n, index = size(row + 4, ALIGNED), tl.load(row + 5)
    factor = tl.load(scale + index).to(ACC)
    decay, step_size = _number(numbers, 0, ACC), _number(numbers, 1, ACC)
    grow1 = (1.0 - tl.load(numbers + 2)).to(ACC)
    keep2, grow2 = _number(numbers, 3, ACC), (1.0 - tl.load(numbers + 3)).to(ACC)
    eps, correction = _number(numbers, 4, ACC), _number(numbers, 5, ACC)
    for start in range(chunk * CHUNK, tl.minimum(n, (chunk + 1) * CHUNK), BLOCK):
        at = start + tl.arange(0, BLOCK)
        mask = at < n
        x = tl.load(g + at, mask=mask, other=0.0).to(ACC)
        x = clipped(x, clip, index, length) * factor
        first = tl.load(m + at, mask=mask, other=0.0).to(ACC)
        first += grow1 * (x - first)
        second = keep2 * tl.load(v + at, mask=mask, other=0.0).to(ACC) + grow2 * x * x
        root = tl.sqrt(second) * correction + eps
        moved = decay * tl.load(p + at, mask=mask, other=0.0).to(ACC) - step_size * first / root
        tl.store(p + at, moved.to(P), mask=mask)
        tl.store(m + at, first.to(M), mask=mask)
        tl.store(v + at, second.to(V), mask=mask)


# A row: reduced, update, where phi goes, lines, elements of a line, strides of line and element.
@triton.jit
def fira_ratio_kernel(
    rows, programs, REDUCED: tl.constexpr, UPDATE: tl.constexpr, ACC: tl.constexpr, L: tl.constexpr,
    E: tl.constexpr,
):  # fmt: skip
    """phi of L lines: the ratio of their norms."""
    item, chunk = program_of(programs)
    row = rows + item * 7
    reduced, update = pointer(row, REDUCED, False), pointer(row + 1, UPDATE, False)
    phi = tl.load(row + 2).to(tl.pointer_type(ACC))
    lines, length = tl.load(row + 3), tl.load(row + 4)
    line_stride, stride = tl.load(row + 5), tl.load(row + 6)
    line = chunk * L + tl.arange(0, L)
    of_r, of_a = tl.zeros((L,), ACC), tl.zeros((L,), ACC)
    for start in range(0, length, E):
        element = start + tl.arange(0, E)
        at = line[:, None] * line_stride + element[None, :] * stride
        mask = (line < lines)[:, None] & (element < length)[None, :]
        r = tl.load(reduced + at, mask=mask, other=0.0).to(ACC)
        a = tl.load(update + at, mask=mask, other=0.0).to(ACC)
        of_r += tl.sum(r * r, 1)
        of_a += tl.sum(a * a, 1)
    tl.store(phi + line, tl.sqrt(of_a) / (tl.sqrt(of_r) + 1e-8), mask=line < lines)


# A row: the residual, phi, the number of elements, columns, whether phi is per column, the first partial.
@triton.jit
def fira_scale_kernel(
    rows, programs, partial, DTYPE: tl.constexpr, ACC: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    item, chunk = program_of(programs)
    row = rows + item * 6
    u, n = pointer(row, DTYPE, ALIGNED), size(row + 2, ALIGNED)
    phi = tl.load(row + 1).to(tl.pointer_type(ACC))
    columns, per_column = tl.load(row + 3), tl.load(row + 4)
    total = tl.full((), 0.0, tl.float64)
    for start in range(chunk * CHUNK, tl.minimum(n, (chunk + 1) * CHUNK), BLOCK):
        at = start + tl.arange(0, BLOCK)
        mask = at < n
        line = tl.where(per_column != 0, at % columns, at // columns)
        x = tl.load(u + at, mask=mask, other=0.0).to(ACC)
        x *= tl.load(phi + line, mask=mask, other=0.0)
        tl.store(u + at, x.to(DTYPE), mask=mask)
        total += tl.sum(x * x).to(tl.float64)
    tl.store(partial + tl.load(row + 5) + chunk, total)


# ---- launchers ---------------------------------------------------------------------------------------


def adam_step_(
    parameters, grads, exp_avg, exp_avg_sq, clip, scale, decay, step_size, beta1, beta2, eps,
    correction,
):  # fmt: skip
    if not parameters:
        return
    settings, groups = config(parameters[0]), {}
    flat = [
        [t.contiguous() for t in entry]
        for entry in zip(parameters, grads, exp_avg, exp_avg_sq, strict=True)
    ]
    for index, entry in enumerate(flat):
        if any([t.shape != entry[0].shape for t in entry]):
            raise RuntimeError("adam_step_: the tensors of an entry differ in shape")
        if entry[0].numel():
            row = [*(t.data_ptr() for t in entry), entry[0].numel()]
            key = (*(t.dtype for t in entry), aligned(row))
            groups.setdefault(key, []).append([*row, index])
    like = parameters[0]
    # float64 numbers: as plain ones they would be rounded to float32.
    given = torch.tensor([decay, step_size, beta1, beta2, eps, correction], dtype=torch.float64)
    bits, _ = build([given.view(torch.int64).tolist()], [0], like)
    clip, scale = clip.contiguous(), scale.contiguous()
    for (p, g, m, v, even), rows in groups.items():
        table, programs = build(
            rows, [triton.cdiv(row[4], settings["CHUNK"]) for row in rows], like
        )
        with on_device_of(like):
            adam_step_kernel[(len(programs),)](
                table, programs, clip, scale, bits.view(torch.float64), len(flat),
                P=LANGUAGE_DTYPE[p], G=LANGUAGE_DTYPE[g], M=LANGUAGE_DTYPE[m], V=LANGUAGE_DTYPE[v],
                ACC=accumulator(p, g, m, v), ALIGNED=even, **settings,
            )  # fmt: skip
    for at, tensors in ((0, parameters), (2, exp_avg), (3, exp_avg_sq)):
        put_back(tensors, [entry[at] for entry in flat])


def fira_scale_(residuals, reduced, updates):
    if not residuals:
        return torch.empty(0)
    like, settings = residuals[0], config(residuals[0])
    flat, phis, first = [], [], [0]
    ratios, scales = {}, {}
    for u, r, a in zip(residuals, reduced, updates, strict=True):
        per_column = r.shape[0] < r.shape[1]
        if r.shape != a.shape or r.shape[per_column] != u.shape[per_column]:
            raise RuntimeError("fira_scale_: residual, reduced and update do not fit")
        u, r, a = u.contiguous(), r.contiguous(), a.contiguous()
        dtype = wide((u, r, a))
        lines, length = (r.shape[1], r.shape[0]) if per_column else r.shape
        phi = torch.empty(lines, dtype=dtype, device=like.device)
        strides = (1, lines) if per_column else (length, 1)
        chunks = triton.cdiv(u.numel(), settings["CHUNK"])
        if chunks:
            row = [r.data_ptr(), a.data_ptr(), phi.data_ptr(), lines, length, *strides]
            ratios.setdefault((r.dtype, a.dtype, dtype), []).append(row)
            row = [u.data_ptr(), phi.data_ptr(), u.numel(), u.shape[1], int(per_column), first[-1]]
            even = aligned((u.data_ptr(), u.numel()))
            scales.setdefault((u.dtype, dtype, even), []).append((row, chunks))
        flat.append((u, r, a)), phis.append(phi)
        first.append(first[-1] + chunks)
    for (of_r, of_a, dtype), rows in ratios.items():
        table, programs = build(rows, [triton.cdiv(row[3], LINES) for row in rows], like)
        with on_device_of(like):
            fira_ratio_kernel[(len(programs),)](
                table, programs, REDUCED=LANGUAGE_DTYPE[of_r], UPDATE=LANGUAGE_DTYPE[of_a],
                ACC=LANGUAGE_DTYPE[dtype], L=LINES, E=ELEMENTS, num_warps=4,
            )  # fmt: skip
    partial = torch.empty(first[-1], dtype=torch.float64, device=like.device)
    for (of_u, dtype, even), members in scales.items():
        table, programs = build([row for row, _ in members], [n for _, n in members], like)
        with on_device_of(like):
            fira_scale_kernel[(len(programs),)](
                table, programs, partial, DTYPE=LANGUAGE_DTYPE[of_u], ACC=LANGUAGE_DTYPE[dtype],
                ALIGNED=even, **settings,
            )  # fmt: skip
    put_back(residuals, [entry[0] for entry in flat])
    dtype = wide((*residuals, *reduced, *updates))
    return joined(first, partial, len(flat), 1, 2, dtype, like)[0]


LINES, ELEMENTS = 128, 16  # of one step over the reduced matrices


# ---- ahead-of-time compilation -----------------------------------------------------------------------


def aot() -> Iterator:
    """The variants held to tests/budgets.json."""
    from .._aot import AotCase

    pointers = {"rows": "*i64", "programs": "*i64"}
    steps = {"ALIGNED": True, "BLOCK": 1024, "CHUNK": 8192}
    for name, dtype in (("float32", tl.float32), ("bfloat16", tl.bfloat16)):
        yield AotCase(
            name=f"adam_step_{name}",
            fn=adam_step_kernel,
            signature={
                **pointers,
                "clip": "*fp32",
                "scale": "*fp32",
                "numbers": "*fp64",
                "length": "i32",
            },
            constexprs={
                "P": dtype, "G": dtype, "M": tl.float32, "V": tl.float32, "ACC": tl.float32, **steps,
            },
            divisible_by_16=(*pointers, "clip", "scale", "numbers"),
        )  # fmt: skip
        yield AotCase(
            name=f"fira_ratio_{name}",
            fn=fira_ratio_kernel,
            signature=pointers,
            constexprs={
                "REDUCED": dtype, "UPDATE": tl.float32, "ACC": tl.float32, "L": LINES, "E": ELEMENTS,
            },
            divisible_by_16=tuple(pointers),
        )  # fmt: skip
        yield AotCase(
            name=f"fira_scale_{name}",
            fn=fira_scale_kernel,
            signature={**pointers, "partial": "*fp64"},
            constexprs={"DTYPE": dtype, "ACC": tl.float32, **steps},
            divisible_by_16=(*pointers, "partial"),
        )
