"""GPU kernels of core `perturb`: steps of sharpness-aware minimisation and noise over lists of parameters; the
formulas are in solera/weights/perturb.py.

One launch covers all tensors of one combination of dtypes through a pointer table (see _table.py). Bytes an element
in float32: norms read w and g (8), the step reads w and g and writes w or another tensor (12; 16 where the old
values are kept), noise reads and writes w (8). The noise is compiled without contraction to fused multiply-adds, so
its bits are those of the other backends.

H200 at 4.3 TB/s: 200 x 100k float32, norm, step and step back 130 us is the floor, with memory exchanged 74 us.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from .._launch import on_device_of
from ..norm.grad_norm import accumulator, config, joined, put_back, wide
from ._mask import mask_words
from ._table import LANGUAGE_DTYPE, aligned, build, pointer, program_of, size


@triton.jit
def rounded_to(x, DTYPE: tl.constexpr):
    """x in a tensor's dtype; float64 by way of float32, as the C++ kernels do (there is no other way to bfloat16)."""
    if x.dtype == tl.float64 and DTYPE != tl.float64:
        return x.to(tl.float32).to(DTYPE)
    return x.to(DTYPE)


# A row of the table: parameter, gradient, the number of elements, the first partial.
@triton.jit
def perturb_norm_kernel(
    rows, programs, eta, partial, W: tl.constexpr, G: tl.constexpr, ACC: tl.constexpr,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    item, chunk = program_of(programs)
    row = rows + item * 4
    w, g = pointer(row, W, ALIGNED), pointer(row + 1, G, ALIGNED)
    n = size(row + 2, ALIGNED)
    shift = tl.load(eta).to(tl.float64, bitcast=True).to(ACC)
    total = tl.full((), 0.0, tl.float64)
    for start in range(chunk * CHUNK, tl.minimum(n, (chunk + 1) * CHUNK), BLOCK):
        at = start + tl.arange(0, BLOCK)
        t = tl.abs(tl.load(w + at, mask=at < n, other=0.0).to(ACC)) + shift
        x = t * tl.load(g + at, mask=at < n, other=0.0).to(ACC)
        total += tl.sum(x * x).to(tl.float64)
    tl.store(partial + tl.load(row + 3) + chunk, total)


# A row: parameter, gradient, the other tensor, the number of elements, index of the factor, the bits of eta.
# OTHER: 0 there is none, 1 it takes the old values, 2 it takes the new ones and the parameter stays.
@triton.jit
def perturb_kernel(
    rows, programs, factors, W: tl.constexpr, G: tl.constexpr, ADAPTIVE: tl.constexpr,
    OTHER: tl.constexpr, ACC: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    item, chunk = program_of(programs)
    row = rows + item * 6
    w, g = pointer(row, W, ALIGNED), pointer(row + 1, G, ALIGNED)
    other = pointer(row + 2, W, ALIGNED)
    n = size(row + 3, ALIGNED)
    factor = tl.load(factors + tl.load(row + 4)).to(ACC)
    shift = tl.load(row + 5).to(tl.float64, bitcast=True).to(ACC)
    for start in range(chunk * CHUNK, tl.minimum(n, (chunk + 1) * CHUNK), BLOCK):
        at = start + tl.arange(0, BLOCK)
        given = tl.load(w + at, mask=at < n, other=0.0)
        if OTHER == 1:
            tl.store(other + at, given, mask=at < n)
        old = given.to(ACC)
        e = tl.load(g + at, mask=at < n, other=0.0).to(ACC)
        if ADAPTIVE:
            t = tl.abs(old) + shift
            e = t * t * e
        moved = rounded_to(old + factor * e, W)
        if OTHER == 2:
            tl.store(other + at, moved, mask=at < n)
        else:
            tl.store(w + at, moved, mask=at < n)


@triton.jit
def normal_of(word):
    """Normal from 32 random bits, the steps of normal_of in csrc/cpu/weights/perturb.cpp."""
    part = (word >> 8).to(tl.int32)
    x = (part * 2 - 16777215).to(tl.float32) * 5.9604644775390625e-08
    bits = ((1.0 - x) * (1.0 + x)).to(tl.uint32, bitcast=True)
    m = ((bits & 0x7FFFFF) | 0x3F000000).to(tl.float32, bitcast=True)
    low = tl.where(m < 0.70710678, 1.0, 0.0)
    e = ((bits >> 23).to(tl.int32) - 126).to(tl.float32) - low
    t = (m + low * m) - 1.0
    s = t * t
    p = t * 7.0376836292e-2 + -1.1514610310e-1
    p = p * t + 1.1676998740e-1
    p = p * t + -1.2420140846e-1
    p = p * t + 1.4249322787e-1
    p = p * t + -1.6668057665e-1
    p = p * t + 2.0000714765e-1
    p = p * t + -2.4999993993e-1
    p = p * t + 3.3333331174e-1
    rest = (p * t * s + e * -2.12194440e-4) + s * -0.5
    y = -((t + rest) + e * 0.693359375)
    v = y - 2.5
    a = v * 2.81022636e-08 + 3.43273939e-07
    a = a * v + -3.5233877e-06
    a = a * v + -4.39150654e-06
    a = a * v + 0.00021858087
    a = a * v + -0.00125372503
    a = a * v + -0.00417768164
    a = a * v + 0.246640727
    a = a * v + 1.50140941
    u = tl.sqrt_rn(tl.where(y < 0, 0.0, y)) - 3.0
    b = u * -0.000200214257 + 0.000100950558
    b = b * u + 0.00134934322
    b = b * u + -0.00367342844
    b = b * u + 0.00573950773
    b = b * u + -0.0076224613
    b = b * u + 0.00943887047
    b = b * u + 1.00167406
    b = b * u + 2.83297682
    return tl.where(y < 5.0, a, b) * x * 1.41421354


# A row: parameter, the number of elements, index of the norm, the bits of the scale, the key, the seed.
@triton.jit
def noise_kernel(
    rows, programs, norms, DTYPE: tl.constexpr, ACC: tl.constexpr, ALIGNED: tl.constexpr,
    R: tl.constexpr,
):  # fmt: skip
    item, chunk = program_of(programs)
    row = rows + item * 6
    w, n = pointer(row, DTYPE, ALIGNED), size(row + 1, ALIGNED)
    norm = tl.load(norms + tl.load(row + 2)).to(tl.float64)
    factor = (norm * tl.load(row + 3).to(tl.float64, bitcast=True)).to(ACC)
    key, seed = tl.load(row + 4), tl.load(row + 5)
    group = chunk * R + tl.arange(0, R)[:, None]  # [R, 1], chunks of 512
    lane = tl.arange(0, 128)[None, :]  # [1, 128]
    r0, r1, r2, r3 = mask_words(seed, group, lane, key, key * 0)
    for slot in tl.static_range(4):
        if slot == 0:
            word = r0
        elif slot == 1:
            word = r1
        elif slot == 2:
            word = r2
        else:
            word = r3
        at = group * 512 + slot * 128 + lane
        old = tl.load(w + at, mask=at < n, other=0.0).to(ACC)
        moved = old + factor * normal_of(word).to(ACC)
        tl.store(w + at, moved.to(DTYPE), mask=at < n)


# ---- launchers ---------------------------------------------------------------------------------------


def float_bits(value: float) -> int:
    """A float64 number as the integer of the same bits: a plain one would be rounded to float32."""
    return struct.unpack("q", struct.pack("d", value))[0]


def perturb_norms(parameters, grads, eta):
    if any([w.shape != g.shape for w, g in zip(parameters, grads, strict=True)]):
        raise RuntimeError("perturb_norms: a gradient differs in shape from its parameter")
    like, settings = parameters[0], config(parameters[0])
    first: list[int] = [0]
    groups: dict = {}
    flat = [(w.contiguous(), g.contiguous()) for w, g in zip(parameters, grads)]
    for w, g in flat:
        chunks = triton.cdiv(w.numel(), settings["CHUNK"])
        if chunks:
            row = [w.data_ptr(), g.data_ptr(), w.numel()]
            key = (w.dtype, g.dtype, aligned(row))
            groups.setdefault(key, []).append(([*row, first[-1]], chunks))
        first.append(first[-1] + chunks)
    partial = torch.empty(first[-1], dtype=torch.float64, device=like.device)
    shift, _ = build([[float_bits(eta)]], [0], like)
    for (of_w, of_g, even), members in groups.items():
        table, programs = build([row for row, _ in members], [n for _, n in members], like)
        with on_device_of(like):
            perturb_norm_kernel[(len(programs),)](
                table, programs, shift, partial, W=LANGUAGE_DTYPE[of_w], G=LANGUAGE_DTYPE[of_g],
                ACC=accumulator(of_w, of_g), ALIGNED=even, **settings,
            )  # fmt: skip
    return joined(first, partial, len(flat), 1, 2, wide((*parameters, *grads)), like)[0]


def _perturb(parameters, grads, factors, eta, others, mode):
    """Contiguous (parameter, gradient, other) of each entry, written."""
    entries = list(zip(parameters, grads, others, strict=True))
    if any([not w.shape == g.shape == o.shape or w.dtype != o.dtype for w, g, o in entries]):
        raise RuntimeError("perturb_: the tensors of an entry differ in shape or dtype")
    groups: dict = {}
    bits, shared = float_bits(eta or 0.0), factors.dim() == 0
    flat = [[t.contiguous() for t in entry] for entry in entries]
    for index, entry in enumerate(flat):
        w, g, _ = entry
        if w.numel():
            row = [*(t.data_ptr() for t in entry), w.numel()]
            key = (w.dtype, g.dtype, aligned(row))
            groups.setdefault(key, []).append([*row, 0 if shared else index, bits])
    factors = factors.contiguous()
    for (of_w, of_g, even), rows in groups.items():
        like, settings = flat[0][0], config(flat[0][0])
        chunks = [triton.cdiv(row[3], settings["CHUNK"]) for row in rows]
        table, programs = build(rows, chunks, like)
        with on_device_of(like):
            perturb_kernel[(len(programs),)](
                table, programs, factors, W=LANGUAGE_DTYPE[of_w], G=LANGUAGE_DTYPE[of_g],
                ADAPTIVE=eta is not None, OTHER=mode, ACC=accumulator(of_w, of_g), ALIGNED=even,
                **settings,
            )  # fmt: skip
    return flat


def perturb_(parameters, grads, factors, eta, kept):
    flat = _perturb(parameters, grads, factors, eta, kept or parameters, 1 if kept else 0)
    put_back(parameters, [entry[0] for entry in flat])
    put_back(kept, [entry[2] for entry in flat])


def perturb_out(parameters, grads, factors, eta, out):
    flat = _perturb(parameters, grads, factors, eta, out, 2)
    put_back(out, [entry[2] for entry in flat])


def noise_(parameters, norms, scales, seed, keys):
    groups: dict = {}
    flat = [w.contiguous() for w in parameters]
    for index, (w, scale, key) in enumerate(zip(flat, scales, keys, strict=True)):
        if w.numel():
            row = [w.data_ptr(), w.numel()]
            more = [0 if norms.dim() == 0 else index, float_bits(scale), key, seed]
            groups.setdefault((w.dtype, aligned(row)), []).append([*row, *more])
    norms = norms.contiguous()
    for (dtype, even), rows in groups.items():
        rows_of = 8 if flat[0].is_cuda else 32  # chunks of 512 a program
        chunks = [triton.cdiv(row[1], 512 * rows_of) for row in rows]
        table, programs = build(rows, chunks, flat[0])
        with on_device_of(flat[0]):
            noise_kernel[(len(programs),)](
                table, programs, norms, DTYPE=LANGUAGE_DTYPE[dtype], ACC=accumulator(dtype),
                ALIGNED=even, R=rows_of, num_warps=4, enable_fp_fusion=False,
            )  # fmt: skip
    put_back(parameters, flat)


# ---- ahead-of-time compilation -----------------------------------------------------------------------


def aot() -> Iterator:
    """The variants held to tests/budgets.json."""
    from .._aot import AotCase

    pointers = {"rows": "*i64", "programs": "*i64"}
    steps = {"ALIGNED": True, "BLOCK": 1024, "CHUNK": 8192}
    for name, dtype in (("float32", tl.float32), ("bfloat16", tl.bfloat16)):
        pair = {"W": dtype, "G": dtype, "ACC": tl.float32, **steps}
        yield AotCase(
            name=f"perturb_norm_{name}",
            fn=perturb_norm_kernel,
            signature={**pointers, "eta": "*i64", "partial": "*fp64"},
            constexprs=pair,
            divisible_by_16=(*pointers, "eta", "partial"),
        )
        for form, flags in (
            ("", {"ADAPTIVE": False, "OTHER": 0}),
            ("adaptive_kept_", {"ADAPTIVE": True, "OTHER": 1}),
            ("out_", {"ADAPTIVE": False, "OTHER": 2}),
        ):
            yield AotCase(
                name=f"perturb_{form}{name}",
                fn=perturb_kernel,
                signature={**pointers, "factors": "*fp32"},
                constexprs={**pair, **flags},
                divisible_by_16=(*pointers, "factors"),
            )
        yield AotCase(
            name=f"noise_{name}",
            fn=noise_kernel,
            signature={**pointers, "norms": "*fp32"},
            constexprs={"DTYPE": dtype, "ACC": tl.float32, "ALIGNED": True, "R": 8},
            divisible_by_16=(*pointers, "norms"),
        )
