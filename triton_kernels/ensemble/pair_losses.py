"""GPU kernel of core `pair_losses`: the formulas are in solera/ensemble/pair_losses.py.

A program takes one anchor: the 1 + k chosen entries of its two rows are gathered, their gradients scattered into rows
that it first clears. The products before and after are torch's.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from .._launch import accumulate_type, accumulator, on_device_of

ROW = {"BK": 128, "num_warps": 4}


@triton.jit
def _pair(a, r, share, sign, half, tau_min, spread, beta):
    """A pair's part of the loss, d/ds and d/dr."""
    e = tl.exp(-tl.abs(r))
    one, less = 1.0 / (1.0 + e), e / (1.0 + e)
    against = tl.where(r < 0, one, less)
    favour = tl.where(r < 0, less, one)
    tau = tau_min + spread * against
    inverse = 1.0 / tau
    loss = share * a * inverse + sign * beta * (half * tl.log(tau) + inverse)
    dtau = -share * a * inverse * inverse + sign * beta * (half * inverse - inverse * inverse)
    return loss, share * inverse, -dtau * spread * against * favour


@triton.jit
def pair_losses_kernel(
    s, g, negative, positive, losses, ds, dg, columns, k, numbers, NEED: tl.constexpr,
    ACC: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """ds and dg are zero before."""
    row = tl.program_id(0).to(tl.int64)
    tau_min = tl.load(numbers)
    spread = tl.load(numbers + 1)
    beta = tl.load(numbers + 2)
    half_width = tl.load(numbers + 3)
    base = row * columns
    near = base + tl.load(positive + row)
    a = tl.load(s + near).to(ACC)
    r = tl.load(g + near).to(ACC)
    total, da, dr = _pair(a, r, -1.0, 1.0, half_width, tau_min, spread, beta)
    if NEED:
        tl.store(ds + near, da.to(ds.dtype.element_ty))
        tl.store(dg + near, dr.to(dg.dtype.element_ty))
    share = 1.0 / k.to(ACC)
    for start in range(0, k, BK):
        n = start + tl.arange(0, BK)
        inside = n < k
        at = base + tl.load(negative + row * k + n, mask=inside, other=0)
        far_a = tl.load(s + at, mask=inside, other=0.0).to(ACC)
        far_r = tl.load(g + at, mask=inside, other=0.0).to(ACC)
        loss, das, drs = _pair(far_a, far_r, share, -1.0, 1.0, tau_min, spread, beta)
        total += tl.sum(tl.where(inside, loss, 0.0), 0)
        if NEED:
            tl.store(ds + at, das.to(ds.dtype.element_ty), mask=inside)
            tl.store(dg + at, drs.to(dg.dtype.element_ty), mask=inside)
    tl.store(losses + row, total)


def pair_losses(s, g, negative, positive, tau_min, tau_max, beta, width, need_grad):
    s, g = s.contiguous(), g.contiguous()
    losses = s.new_empty(s.shape[0], dtype=accumulate_type(s))
    shape = s.shape if need_grad else (0,)
    ds, dg = s.new_zeros(shape), g.new_zeros(shape)
    if s.shape[0]:
        numbers = torch.empty(4, dtype=losses.dtype, device=s.device)
        for i, value in enumerate((tau_min, tau_max - tau_min, beta, 0.5 * width)):
            numbers[i] = value
        with on_device_of(s):
            pair_losses_kernel[(s.shape[0],)](
                s, g, negative.contiguous(), positive.contiguous(), losses, ds, dg, s.shape[1],
                negative.shape[1], numbers, NEED=need_grad, ACC=accumulator(s), **ROW,
            )  # fmt: skip
    return losses, ds, dg


# ---- ahead-of-time compilation -----------------------------------------------------------------------


def aot() -> Iterator:
    """With and without gradients, float32 similarities."""
    from .._aot import AotCase

    acc, label = "*fp32", "*i64"
    for need in (True, False):
        yield AotCase(
            name=f"pair_losses_{'gradient' if need else 'value'}",
            fn=pair_losses_kernel,
            signature={
                "s": acc, "g": acc, "negative": label, "positive": label, "losses": acc, "ds": acc,
                "dg": acc, "columns": "i32", "k": "i32", "numbers": acc,
            },
            constexprs={"NEED": need, "ACC": tl.float32, "BK": ROW["BK"]},
            divisible_by_16=("s", "g", "negative", "positive", "losses", "ds", "dg", "columns"),
            num_warps=ROW["num_warps"],
        )  # fmt: skip
