"""GPU kernels of core `member_statistics`: the formulas are in solera/ensemble/member_statistics.py.

Bytes: forward reads the logits of a row of all members once where they fit one tile [KB, BLOCK], otherwise a second
time for the moments, from L2 while the rows in flight fit there; it writes two rows of C. Backward the same, and writes
the gradient. One program takes one row n, with all its members side by side.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from .._launch import accumulate_type, accumulator, on_device_of
from ._members import LOWEST, gradient_like, member_config, stacked

MEAN, VARIANCE, ENTROPIES, VOTES, TOPS = 1, 2, 4, 8, 16
TINY = {torch.float64: 2.3e-308, torch.float32: 1.2e-38}


@triton.jit
def _logits(z, n, k, cols, mask, stride_n, stride_k, ACC: tl.constexpr):
    """A tile [KB, BLOCK], -inf outside."""
    at = n.to(tl.int64) * stride_n + k.to(tl.int64) * stride_k + cols
    return tl.load(z + at, mask=mask, other=float("-inf")).to(ACC)


@triton.jit
def member_statistics_kernel(
    z, mean_out, variance_out, total_out, aleatoric_out, sums_out, disagreement_out, vote_out, top_out,
    members, width, stride_n, stride_k, lowest, tiny, WANTED: tl.constexpr, ACC: tl.constexpr,
    KB: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0)
    k = tl.arange(0, KB)[:, None]  # [KB, 1]
    lane = tl.arange(0, BLOCK)[None, :]  # [1, BLOCK]
    here_k = k < members
    top = tl.zeros((KB, 1), ACC) + lowest
    total = tl.zeros((KB, 1), ACC)
    weighted = tl.zeros((KB, 1), ACC)
    best = tl.zeros((KB, 1), tl.int32)
    SMOOTH: tl.constexpr = (WANTED & 7) != 0
    for j in range(0, width, BLOCK):
        mask = here_k & (j + lane < width)
        v = _logits(z, n, k, j + lane, mask, stride_n, stride_k, ACC)
        largest = tl.max(v, 1)[:, None]
        if (WANTED & 24) != 0:
            best = tl.where(largest > top, j + tl.argmax(v, 1)[:, None], best)
        here = tl.maximum(top, largest)
        if SMOOTH:
            u = v - here
            e = tl.where(mask, tl.exp(u), 0.0)
            factor = tl.exp(top - here)
            weighted = factor * weighted + tl.where(total > 0, factor * total * (top - here), 0.0)
            weighted += tl.sum(tl.where(mask, e * tl.where(u < lowest, lowest, u), 0.0), 1)[:, None]
            total = factor * total + tl.sum(e, 1)[:, None]
        top = here
    row = n.to(tl.int64)
    if SMOOTH:
        inverse = 1 / total
        at = (row * members + k) * 2
        tl.store(sums_out + at, top, mask=here_k)
        tl.store(sums_out + at + 1, inverse, mask=here_k)
        negative = tl.sum(total * 0)
        for j in range(0, width, BLOCK):
            mask = here_k & (j + lane < width)
            v = _logits(z, n, k, j + lane, mask, stride_n, stride_k, ACC)
            p = tl.where(mask, tl.exp(v - top) * inverse, 0.0)
            mean = tl.sum(p, 0)[None, :] / members
            inside = j + lane < width
            tl.store(mean_out + row * width + j + lane, mean, mask=inside)
            if (WANTED & 2) != 0:
                d = tl.where(mask, p - mean, 0.0)
                variance = tl.sum(d * d, 0)[None, :] / members
                tl.store(variance_out + row * width + j + lane, variance, mask=inside)
            if (WANTED & 4) != 0:
                logs = tl.log(tl.where(mean < tiny, 1.0, mean))
                negative += tl.sum(tl.where(mean < tiny, 0.0, mean * logs))
        if (WANTED & 4) != 0:
            tl.store(total_out + row, -negative)
            entropy = tl.log(total) - weighted * inverse
            tl.store(aleatoric_out + row, tl.sum(tl.where(here_k, entropy, 0.0)) / members)
    if (WANTED & 16) != 0:
        tl.store(top_out + row * members + k, best, mask=here_k)
    if (WANTED & 8) != 0:
        pairs = 0
        most = 0
        vote = 0
        for i in range(members):
            mine = tl.sum(tl.where(k == i, best, 0))
            count = tl.sum(tl.where(here_k & (best == mine), 1, 0))
            pairs += count - 1
            better = (count > most) | ((count == most) & (mine < vote))
            most = tl.where(better, count, most)
            vote = tl.where(better, mine, vote)
        unit = tl.full((), 1.0, ACC)
        among = unit * tl.maximum(members * (members - 1), 1)
        tl.store(disagreement_out + row, (among - unit * pairs) / among * (members > 1))
        tl.store(vote_out + row, vote)


@triton.jit
def member_statistics_backward_kernel(
    z, sums, mean_in, dmean, dvariance, dtotal, daleatoric, out, members, width, stride_n, stride_k,
    out_n, out_k, lowest, tiny, HAS_MEAN: tl.constexpr, HAS_VARIANCE: tl.constexpr,
    HAS_TOTAL: tl.constexpr, HAS_ALEATORIC: tl.constexpr, ACC: tl.constexpr, KB: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0)
    row = n.to(tl.int64)
    k = tl.arange(0, KB)[:, None]
    lane = tl.arange(0, BLOCK)[None, :]
    here_k = k < members
    at = (row * members + k) * 2
    top = tl.load(sums + at, mask=here_k, other=0.0)
    inverse = tl.load(sums + at + 1, mask=here_k, other=1.0)
    log_inverse = tl.log(inverse)
    dot = tl.zeros((KB, 1), ACC)
    for step in range(2):
        for j in range(0, width, BLOCK):
            cols = j + lane
            mask = here_k & (cols < width)
            v = _logits(z, n, k, cols, mask, stride_n, stride_k, ACC)
            p = tl.where(mask, tl.exp(v - top) * inverse, 0.0)
            s = tl.zeros((KB, BLOCK), ACC)
            inside = cols < width
            mean = tl.load(mean_in + row * width + cols, mask=inside, other=1.0)
            if HAS_MEAN:
                s += tl.load(dmean + row * width + cols, mask=inside, other=0.0)
            if HAS_TOTAL:
                s -= tl.load(dtotal + row) * tl.log(tl.where(mean < tiny, tiny, mean))
            if HAS_VARIANCE:
                slope = 2 * tl.load(dvariance + row * width + cols, mask=inside, other=0.0)
                s += slope * (p - mean)
            if HAS_ALEATORIC:
                logs = v - top + log_inverse
                logs = tl.where(mask, tl.where(logs < lowest, lowest, logs), 0.0)
                s -= tl.load(daleatoric + row) * logs
            if step == 0:
                dot += tl.sum(p * s, 1)[:, None]
            else:
                to = row * out_n + k.to(tl.int64) * out_k + cols
                d = p * (s - dot) / members
                tl.store(out + to, d.to(out.dtype.element_ty), mask=mask)


# ---- launchers ---------------------------------------------------------------------------------------


def member_statistics(logits, wanted):
    z = stacked(logits)
    rows, members, width = z.shape
    acc = accumulate_type(z)
    smooth = wanted & (MEAN | VARIANCE | ENTROPIES)

    def make(needed, *shape, dtype=acc):
        return z.new_empty(shape if needed else (0,), dtype=dtype)

    out = (
        make(smooth, rows, width),
        make(wanted & VARIANCE, rows, width),
        make(wanted & ENTROPIES, rows),
        make(wanted & ENTROPIES, rows),
        make(smooth, rows, members, 2),
        make(wanted & VOTES, rows),
        make(wanted & VOTES, rows, dtype=torch.int64),
        make(wanted & TOPS, rows, members, dtype=torch.int64),
    )
    if rows:
        config = member_config(members, width)
        with on_device_of(z):
            member_statistics_kernel[(rows,)](
                z, *out, members, width, z.stride(0), z.stride(1), LOWEST[acc], TINY[acc],
                WANTED=wanted, ACC=accumulator(z), **config,
            )  # fmt: skip
    return out


def member_statistics_backward(logits, sums, mean, dmean, dvariance, dtotal, daleatoric):
    z = stacked(logits)
    rows, members, width = z.shape
    out, out_n, out_k = gradient_like(z, logits)
    if z.numel():
        config = member_config(members, width)
        grads = (dmean, dvariance, dtotal, daleatoric)
        given = [mean if t is None else t.contiguous() for t in grads]
        acc = accumulate_type(z)
        with on_device_of(z):
            member_statistics_backward_kernel[(rows,)](
                z, sums.contiguous(), mean.contiguous(), *given, out, members, width, z.stride(0),
                z.stride(1), out_n, out_k, LOWEST[acc], TINY[acc], HAS_MEAN=dmean is not None,
                HAS_VARIANCE=dvariance is not None, HAS_TOTAL=dtotal is not None,
                HAS_ALEATORIC=daleatoric is not None, ACC=accumulator(z), **config,
            )  # fmt: skip
    return out


# ---- ahead-of-time compilation -----------------------------------------------------------------------


def aot() -> Iterator:
    """Everything wanted of 32 members of 100 and of 65536 classes, and the votes alone."""
    from .._aot import AotCase

    half, acc, index = "*bf16", "*fp32", "*i64"
    sizes = dict.fromkeys(("members", "width", "stride_n", "stride_k"), "i32")
    numbers = {"lowest": "fp32", "tiny": "fp32"}
    outputs = dict.fromkeys(
        ("mean_out", "variance_out", "total_out", "aleatoric_out", "sums_out", "disagreement_out"), acc
    ) | {"vote_out": index, "top_out": index}  # fmt: skip
    for members, width, wanted in ((32, 112, 15), (8, 65536, 31), (32, 112, 8)):
        config = member_config(members, width)
        warps = config.pop("num_warps")
        yield AotCase(
            name=f"member_statistics_{members}x{width}_{wanted}",
            fn=member_statistics_kernel,
            signature={"z": half, **outputs, **sizes, **numbers},
            constexprs={"WANTED": wanted, "ACC": tl.float32, **config},
            divisible_by_16=("z", *outputs, "width", "stride_n", "stride_k"),
            num_warps=warps,
        )
        if wanted == 8:
            continue
        names = ("sums", "mean_in", "dmean", "dvariance", "dtotal", "daleatoric")
        given = dict.fromkeys(names, acc)
        strides = {"out_n": "i32", "out_k": "i32"}
        flags = dict.fromkeys(("HAS_MEAN", "HAS_VARIANCE", "HAS_TOTAL", "HAS_ALEATORIC"), True)
        yield AotCase(
            name=f"member_statistics_backward_{members}x{width}",
            fn=member_statistics_backward_kernel,
            signature={"z": half, **given, "out": half, **sizes, **strides, **numbers},
            constexprs={**flags, "ACC": tl.float32, **config},
            divisible_by_16=("z", *given, "out", "width", "stride_n", "stride_k", *strides),
            num_warps=warps,
        )
