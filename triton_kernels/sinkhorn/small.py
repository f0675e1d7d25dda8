"""GPU kernels of core `small`: a program balances a block of matrices, all iterations in one launch.

K is made once, a step is a product of it with the other side's factors (see solera.sinkhorn.small). Bytes: 8 a float32
entry forward, 12 backward; beside them 2 n reciprocals and 2 n^2 multiply-adds an iteration forward, 6 n^2 backward.
65,536 x 4 x 4, 20 iterations: 8.4 MB and 10.5M reciprocals, 42M multiply-adds.

Backward needs the factors of every step again, from the last to the first. Registers cannot be indexed by the
iteration, so each program writes them to scratch of its own and uses the same lines for all the blocks it
works through: they stay in L2 however many matrices there are.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from .._aot import AotCase
from .._launch import accumulate_type, accumulator, on_device_of, processors

LOG: tl.constexpr = tl.constexpr(2)


@triton.jit
def _limits(ACC: tl.constexpr):
    """Smallest reciprocal of a factor, how far apart logits of a row may be, the lowest number."""
    if ACC == tl.float64:
        return 1e-300, 300.0, -1.79e308
    else:
        return 2e-36, 30.0, -3.4e38


@triton.jit
def _load(x, at, inside, ACC: tl.constexpr):
    """A block of logits with the largest of each row, padding forbidden."""
    tiny, far, lowest = _limits(ACC)
    t = tl.load(x + at, mask=inside, other=float("-inf")).to(ACC)
    top = tl.maximum(tl.max(t, 2), lowest)
    return t, top


@triton.jit
def _start(t, top, EPS: tl.constexpr, KIND: tl.constexpr, ACC: tl.constexpr):
    """(K, the softmax or K) of logits [B, N, M]."""
    tiny, far, lowest = _limits(ACC)
    e = tl.exp(t - top[:, :, None])
    p = e
    if KIND == 0:
        s = tl.sum(e, 2)
        p = e / tl.where(s < tiny, tiny, s)[:, :, None]
        e = tl.where(t == float("-inf"), 0.0, p + EPS)
    return e, p


@triton.jit
def _factor(t, w, EPS: tl.constexpr, KIND: tl.constexpr, ACC: tl.constexpr):
    """(1 / w, w, whether the sum t counts)."""
    tiny, far, lowest = _limits(ACC)
    least = w * EPS
    live = t >= least
    if KIND == 0:
        w = t + least
    elif KIND == 1:
        w = tl.where(least > t, least, t)
    else:
        w = t
    w = tl.where(w < tiny, tiny, w)
    return 1.0 / w, w, live


@triton.jit
def _far(t, top, ACC: tl.constexpr):
    """[B]: 1 where a row's logits are too far apart for exponentials."""
    tiny, far, lowest = _limits(ACC)
    below = tl.where(t == float("-inf"), 0.0, top[:, :, None] - t)
    return (tl.max(tl.max(below, 2), 1) > far).to(tl.int32)


@triton.jit
def _line(y, AXIS: tl.constexpr):
    """-log sum exp over an axis, 0 where all is -inf."""
    top = tl.max(y, AXIS)
    none = top == float("-inf")
    top = tl.where(none, 0.0, top)
    s = tl.sum(tl.exp(y - tl.expand_dims(top, AXIS)), AXIS)
    return tl.where(none, 0.0, -(top + tl.log(tl.where(none, 1.0, s))))


@triton.jit
def sinkhorn_small_kernel(
    x, y, batch, iterations, step_i, step_j, LOG_RATIO: tl.constexpr, EPS: tl.constexpr,
    KIND: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    B: tl.constexpr, N: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)[:, None, None]
    i, j = tl.arange(0, N)[None, :, None], tl.arange(0, M)[None, None, :]
    inside = (b < batch) & (i < ROWS) & (j < COLUMNS)
    at = b * (ROWS * COLUMNS) + i * step_i + j * step_j
    t, top = _load(x, at, inside, ACC)
    k, p = _start(t, top, EPS, KIND, ACC)
    u = tl.full((B, N), 1.0, ACC)
    v = tl.full((B, M), 1.0, ACC)
    wu, wv = u, v
    for iteration in range(iterations):
        if KIND != 0 or iteration > 0:
            u, wu, live = _factor(tl.sum(k * v[:, None, :], 2), wu, EPS, KIND, ACC)
        s = tl.sum(k * u[:, :, None], 1) * (COLUMNS / ROWS)
        v, wv, live = _factor(s, wv, EPS, KIND, ACC)
    out = k * u[:, :, None] * v[:, None, :]
    if KIND == LOG:
        far = _far(t, top, ACC)
        if tl.max(far) > 0:
            t = t - top[:, :, None]
            f = tl.zeros((B, N), ACC)
            g = tl.zeros((B, M), ACC)
            for _ in range(iterations):
                f = _line(t + g[:, None, :], 2)
                g = _line(t + f[:, :, None], 1) - LOG_RATIO
            out = tl.where(far[:, None, None] > 0, tl.exp(t + f[:, :, None] + g[:, None, :]), out)
    tl.store(y + at, out.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _counted(factor, sums, KIND: tl.constexpr):
    """factor * sums, 0 where the step divided by eps: there the factor was kept with a minus."""
    c = factor * sums
    if KIND == 1:
        c = tl.where(factor < 0, 0.0, c)
    return c


@triton.jit
def _signed(factor, live, KIND: tl.constexpr):
    if KIND == 1:
        factor = tl.where(live, factor, -factor)
    return factor


@triton.jit
def sinkhorn_small_backward_kernel(
    grad, x, dx, us, vs, batch, blocks, iterations, step_i, step_j, LOG_RATIO: tl.constexpr,
    EPS: tl.constexpr, KIND: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, B: tl.constexpr, N: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    i, j = tl.arange(0, N)[None, :, None], tl.arange(0, M)[None, None, :]
    # This program's scratch: u [iterations, B, N], v [iterations + 1, B, M].
    lane = tl.arange(0, B)[:, None]
    pid = tl.program_id(0).to(tl.int64)
    us += pid * iterations * (B * N) + lane * N + tl.arange(0, N)[None, :]
    vs += pid * (iterations + 1) * (B * M) + lane * M + tl.arange(0, M)[None, :]
    RATIO: tl.constexpr = COLUMNS / ROWS
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        b = tl.full((B, 1, 1), B, tl.int64) * block + tl.arange(0, B)[:, None, None]
        inside = (b < batch) & (i < ROWS) & (j < COLUMNS)
        at = b * (ROWS * COLUMNS) + i * step_i + j * step_j
        t, top = _load(x, at, inside, ACC)
        k, p = _start(t, top, EPS, KIND, ACC)
        u = tl.full((B, N), 1.0, ACC)
        v = tl.full((B, M), 1.0, ACC)
        wu, wv = u, v
        tl.store(vs, v)
        for iteration in range(iterations):
            if KIND != 0 or iteration > 0:
                u, wu, live = _factor(tl.sum(k * v[:, None, :], 2), wu, EPS, KIND, ACC)
                tl.store(us + iteration * (B * N), _signed(u, live, KIND))
            else:
                tl.store(us, u)
            s = tl.sum(k * u[:, :, None], 1) * RATIO
            v, wv, live = _factor(s, wv, EPS, KIND, ACC)
            tl.store(vs + (iteration + 1) * (B * M), _signed(v, live, KIND))
        tl.debug_barrier()  # scratch is read in another layout than it was written in
        d = tl.load(grad + at, mask=inside, other=0.0).to(ACC)
        # The gradient of log M, back through the steps.
        dm = d * k * u[:, :, None] * v[:, None, :]
        for back in range(iterations):
            iteration = iterations - 1 - back
            u = tl.load(us + iteration * (B * N))
            v = tl.load(vs + (iteration + 1) * (B * M))
            c = _counted(v, tl.sum(dm, 1), KIND) * RATIO
            dm -= k * tl.abs(u)[:, :, None] * c[:, None, :]
            if KIND != 0 or iteration > 0:
                v = tl.load(vs + iteration * (B * M))
                c = _counted(u, tl.sum(dm, 2), KIND)
                dm -= k * tl.abs(v)[:, None, :] * c[:, :, None]
        out = dm
        if KIND == 0:
            out = tl.where(p == 0, 0.0, dm * p / tl.where(k == 0, 1.0, k))
            out -= p * tl.sum(out, 2)[:, :, None]
        if KIND == LOG:
            far = _far(t, top, ACC)
            if tl.max(far) > 0:
                tl.debug_barrier()
                t = t - top[:, :, None]
                f = tl.zeros((B, N), ACC)
                g = tl.zeros((B, M), ACC)
                tl.store(vs, g)
                for iteration in range(iterations):
                    f = _line(t + g[:, None, :], 2)
                    g = _line(t + f[:, :, None], 1) - LOG_RATIO
                    tl.store(us + iteration * (B * N), f)
                    tl.store(vs + (iteration + 1) * (B * M), g)
                tl.debug_barrier()
                dt = d * tl.exp(t + f[:, :, None] + g[:, None, :])
                for back in range(iterations):
                    iteration = iterations - 1 - back
                    f = tl.load(us + iteration * (B * N))
                    g = tl.load(vs + (iteration + 1) * (B * M))
                    m = tl.exp(t + f[:, :, None] + g[:, None, :])
                    dt -= m * tl.sum(dt, 1)[:, None, :] * RATIO
                    g = tl.load(vs + iteration * (B * M))
                    m = tl.exp(t + f[:, :, None] + g[:, None, :])
                    dt -= m * tl.sum(dt, 2)[:, :, None]
                out = tl.where(far[:, None, None] > 0, dt, out)
        tl.store(dx + at, out.to(dx.dtype.element_ty), mask=inside)
        tl.debug_barrier()  # the next block writes the same scratch


# ---- launchers ---------------------------------------------------------------------------------------


def _config(n: int, m: int, wide: bool) -> dict:
    """Matrices a program: 1024 entries (512 in float64), eight (four) a thread."""
    N, M = triton.next_power_of_2(n), triton.next_power_of_2(m)
    return {"B": max(1, (512 if wide else 1024) // (N * M)), "N": N, "M": M}


def _arguments(x, iterations, kind, rows, eps):
    n, m = x.shape[1:]
    r, c = (n, m) if rows else (m, n)
    steps = (m, 1) if rows else (1, m)
    return steps, {
        "LOG_RATIO": math.log(c / r), "EPS": eps, "KIND": kind, "ACC": accumulator(x),
        "ROWS": r, "COLUMNS": c, **_config(r, c, x.dtype == torch.float64), "num_warps": 4,
    }  # fmt: skip


def sinkhorn_small(logits, iterations, kind, rows, eps):
    x = logits.contiguous()
    y = x.new_empty(x.shape)
    if x.numel():
        steps, constants = _arguments(x, iterations, kind, rows, eps)
        grid = (triton.cdiv(x.shape[0], constants["B"]),)
        with on_device_of(x):
            sinkhorn_small_kernel[grid](x, y, x.shape[0], iterations, *steps, **constants)
    return y


def sinkhorn_small_backward(grad, logits, iterations, kind, rows, eps):
    x, grad = logits.contiguous(), grad.contiguous()
    dx = x.new_empty(x.shape)
    if x.numel():
        steps, constants = _arguments(x, iterations, kind, rows, eps)
        B, N, M = constants["B"], constants["N"], constants["M"]
        blocks = triton.cdiv(x.shape[0], B)
        programs = min(blocks, 4 * processors(x))
        us = x.new_empty((programs, iterations, B, N), dtype=accumulate_type(x))
        vs = x.new_empty((programs, iterations + 1, B, M), dtype=accumulate_type(x))
        with on_device_of(x):
            sinkhorn_small_backward_kernel[(programs,)](
                grad, x, dx, us, vs, x.shape[0], blocks, iterations, *steps, **constants
            )
    return dx


def aot():
    for n, kind, dtype in (
        (4, 0, "fp32"), (4, 1, "bf16"), (4, 2, "fp32"), (4, 0, "fp64"), (8, 0, "fp32"), (32, 2, "fp32"),
    ):  # fmt: skip
        pointer, wide = f"*{dtype}", dtype == "fp64"
        sizes = {"iterations": "i32", "step_i": "i32"}
        constants = {
            "step_j": 1, "LOG_RATIO": math.log(1.0), "EPS": 1e-6, "KIND": kind, "ROWS": n, "COLUMNS": n,
            "ACC": tl.float64 if wide else tl.float32, **_config(n, n, wide),
        }  # fmt: skip
        name = f"{('deepseek', 'scaling', 'log')[kind]}_{n}_{dtype}"
        yield AotCase(
            name=f"forward_{name}",
            fn=sinkhorn_small_kernel,
            signature={"x": pointer, "y": pointer, "batch": "i32", **sizes},
            constexprs=constants,
            divisible_by_16=("x", "y", "batch"),
        )
        scratch = "*fp64" if wide else "*fp32"
        yield AotCase(
            name=f"backward_{name}",
            fn=sinkhorn_small_backward_kernel,
            signature={
                "grad": pointer, "x": pointer, "dx": pointer, "us": scratch, "vs": scratch,
                "batch": "i32", "blocks": "i32", **sizes,
            },
            constexprs=constants,
            divisible_by_16=("grad", "x", "dx", "us", "vs", "batch"),
        )  # fmt: skip
