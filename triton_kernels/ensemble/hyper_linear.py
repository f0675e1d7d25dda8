"""GPU kernels of core `hyper_linear`: the formulas are in solera/ensemble/hyper_linear.py.

A program has a tile of pairs (n, o), in the order of memory, and goes through their P positions. Forward: 3 N O P +
2 N O elements of traffic; backward 3 N O P + 5 N O, with each pair's share of db, summed over n in order.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from .._aot import AotCase
from .._launch import accumulate_type, accumulator, on_device_of


@triton.jit
def hyper_gate_kernel(
    a, u, s, bias, y, pairs, outputs, places, step, HAS_BIAS: tl.constexpr, ACC: tl.constexpr,
    Q: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    q = tl.program_id(0).to(tl.int64) * Q + tl.arange(0, Q)  # [Q]
    n, o = q // outputs, q % outputs
    w = tl.load(s + n * step + o, mask=q < pairs, other=0.0).to(ACC)
    shift = tl.zeros((Q,), ACC)
    if HAS_BIAS:
        shift += tl.load(s + n * step + outputs + o, mask=q < pairs, other=0.0).to(ACC)
        shift *= tl.load(bias + o, mask=q < pairs, other=0.0).to(ACC)
    for start in range(0, places, BP):
        p = start + tl.arange(0, BP)[None, :]
        at = (q * places)[:, None] + p  # [Q, BP]
        mask = (q < pairs)[:, None] & (p < places)
        v = tl.load(a + at, mask=mask, other=0.0).to(ACC)
        v += w[:, None] * tl.load(u + at, mask=mask, other=0.0).to(ACC) + shift[:, None]
        tl.store(y + at, v.to(y.dtype.element_ty), mask=mask)


@triton.jit
def hyper_gate_backward_kernel(
    dy, u, s, bias, du, ds, shares, pairs, outputs, places, step, HAS_BIAS: tl.constexpr,
    ACC: tl.constexpr, Q: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    q = tl.program_id(0).to(tl.int64) * Q + tl.arange(0, Q)
    n, o = q // outputs, q % outputs
    w = tl.load(s + n * step + o, mask=q < pairs, other=0.0).to(ACC)
    dw = tl.zeros((Q, BP), ACC)
    total = tl.zeros((Q, BP), ACC)
    for start in range(0, places, BP):
        p = start + tl.arange(0, BP)[None, :]
        at = (q * places)[:, None] + p
        mask = (q < pairs)[:, None] & (p < places)
        g = tl.load(dy + at, mask=mask, other=0.0).to(ACC)
        dw += g * tl.load(u + at, mask=mask, other=0.0).to(ACC)
        total += g
        tl.store(du + at, (g * w[:, None]).to(du.dtype.element_ty), mask=mask)
    tl.store(ds + n * step + o, tl.sum(dw, 1).to(ds.dtype.element_ty), mask=q < pairs)
    if HAS_BIAS:
        all_places = tl.sum(total, 1)
        b = tl.load(bias + o, mask=q < pairs, other=0.0).to(ACC)
        at = n * step + outputs + o
        scale = tl.load(s + at, mask=q < pairs, other=0.0).to(ACC)
        tl.store(ds + at, (all_places * b).to(ds.dtype.element_ty), mask=q < pairs)
        tl.store(shares + q, scale * all_places, mask=q < pairs)


# ---- launchers ---------------------------------------------------------------------------------------


def _config(places: int) -> dict[str, int]:
    """About 1024 elements at once: pairs side by side, or the positions of few pairs."""
    bp = min(512, triton.next_power_of_2(max(places, 1)))
    return {"Q": 1024 // bp, "BP": bp, "num_warps": 4}


def hyper_gate(a, u, s, bias):
    a, u, s = a.contiguous(), u.contiguous(), s.contiguous()
    y = a.new_empty(a.shape)
    if y.numel():
        rows, outputs, places = a.shape
        pairs, config = rows * outputs, _config(places)
        b = a if bias is None else bias.contiguous()
        with on_device_of(a):
            hyper_gate_kernel[(triton.cdiv(pairs, config["Q"]),)](
                a, u, s, b, y, pairs, outputs, places, s.shape[1], HAS_BIAS=bias is not None,
                ACC=accumulator(a), **config,
            )  # fmt: skip
    return y


def hyper_gate_backward(dy, u, s, bias):
    dy, u, s = dy.contiguous(), u.contiguous(), s.contiguous()
    rows, outputs, places = dy.shape
    pairs, config = rows * outputs, _config(places)
    du, ds = dy.new_empty(dy.shape), s.new_empty(s.shape)
    shares = dy.new_empty((rows, outputs if bias is not None else 0), dtype=accumulate_type(dy))
    if pairs:
        b = dy if bias is None else bias.contiguous()
        with on_device_of(dy):
            hyper_gate_backward_kernel[(triton.cdiv(pairs, config["Q"]),)](
                dy, u, s, b, du, ds, shares, pairs, outputs, places, s.shape[1],
                HAS_BIAS=bias is not None, ACC=accumulator(dy), **config,
            )  # fmt: skip
    return du, ds, torch.sum(shares, 0)


def aot() -> Iterator[AotCase]:
    for name, element in (("bf16", "*bf16"), ("fp32", "*fp32")):
        for places, label in ((1, "linear"), (1024, "conv")):
            options = {"HAS_BIAS": True, "ACC": tl.float32, **_config(places)}
            launch = {"num_warps": options.pop("num_warps")}
            sizes = {"pairs": "i32", "outputs": "i32", "places": "i32", "step": "i32"}
            fixed = {}
            if places == 1:  # a launch makes it a constant
                fixed = {"places": sizes.pop("places") and 1}
            even = ("pairs", "outputs", *(["places"] if places > 1 else []), "step")
            pointers = {k: element for k in ("a", "u", "s", "bias", "y")}
            yield AotCase(
                name=f"hyper_gate_{label}_{name}",
                fn=hyper_gate_kernel,
                signature={**pointers, **sizes},
                constexprs={**options, **fixed},
                divisible_by_16=(*pointers, *even),
                **launch,
            )
            pointers = {k: element for k in ("dy", "u", "s", "bias", "du", "ds")}
            yield AotCase(
                name=f"hyper_gate_backward_{label}_{name}",
                fn=hyper_gate_backward_kernel,
                signature={**pointers, "shares": "*fp32", **sizes},
                constexprs={**options, **fixed},
                divisible_by_16=(*pointers, "shares", *even),
                **launch,
            )
