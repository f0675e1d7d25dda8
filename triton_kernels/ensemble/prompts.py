"""GPU kernels of core `prompts`: the formulas are in solera/ensemble/prompts.py.

A program scores one prompt on BM images: a product for each block of classes, folded into the rows' maxima in
registers, so the logits are never written; what leaves it is one partial sum (and, for a gradient, the classes).
Operations: 2 N P C D. Bytes: images and texts, from L2 as often as tiles ask for them.

H200, 10,000 images x 80 prompts x 1,000 classes, D 512: 819 GFLOP, 1.04 ms at bfloat16's 790 TFLOP/s.

Backward reads a row of texts for each (image, prompt) and a row of images for each, sorted by class so that every sum
has one order.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from .._launch import accumulate_type, accumulator, on_device_of

# The interpreter multiplies bfloat16 tiles wrongly, without a word; there operands are widened first.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GATHER = {"R": 16, "BD": 64, "num_warps": 4}


@triton.jit
def prompt_scores_kernel(
    images, texts, bias, parts, choice, rows, classes, inner, tiles, HAS_BIAS: tl.constexpr,
    CHOICE: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    prompt = tl.program_id(1).to(tl.int64)
    i = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)  # [BM]
    t = texts + prompt * classes * inner
    best = tl.full((BM,), float("-inf"), ACC)
    wrong = tl.zeros((BM,), tl.int32)
    where = tl.zeros((BM,), tl.int32)
    for first in range(0, classes, BN):
        c = first + tl.arange(0, BN)  # [BN]
        acc = tl.zeros((BM, BN), ACC)
        for start in range(0, inner, BK):
            k = start + tl.arange(0, BK)
            mask = (i < rows)[:, None] & (k < inner)[None, :]
            a = tl.load(images + i[:, None] * inner + k[None, :], mask=mask, other=0.0)
            mask = (k < inner)[:, None] & (c < classes)[None, :]
            b = tl.load(t + c.to(tl.int64)[None, :] * inner + k[:, None], mask=mask, other=0.0)
            acc = tl.dot(a.to(DOT), b.to(DOT), acc, input_precision="ieee", out_dtype=ACC)
        if HAS_BIAS:
            acc += tl.load(bias + prompt * classes + c, mask=c < classes, other=0.0)[None, :]
        v = tl.where((c < classes)[None, :], acc, float("-inf"))
        wrong += tl.sum((v != v).to(tl.int32), 1)
        top = tl.max(v, 1)
        if CHOICE:
            at = tl.min(tl.where(v == top[:, None], c[None, :], classes), 1)
            where = tl.where((top > best) & (at < classes), at, where)
        best = tl.maximum(best, top)
    best = tl.where(wrong == 0, best, float("nan"))
    total = tl.sum(tl.where(i < rows, best, 0.0), 0)
    tl.store(parts + prompt * tiles + tl.program_id(0), total)
    if CHOICE:
        tl.store(choice + prompt * rows + i, where.to(tl.int64), mask=i < rows)


@triton.jit
def prompt_images_kernel(
    share, texts, choice, dimages, rows, prompts, classes, inner, ACC: tl.constexpr, R: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    """dimages of R rows: over prompts, the texts of the classes they chose."""
    i = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    mask = (i < rows)[:, None] & (d < inner)[None, :]
    total = tl.zeros((R, BD), ACC)
    wide = tl.full((), 0, tl.int64)
    for p in range(prompts):
        c = tl.load(choice + (wide + p) * rows + i, mask=i < rows, other=0)
        at = ((wide + p) * classes + c)[:, None] * inner + d[None, :]
        total += tl.load(share + p) * tl.load(texts + at, mask=mask, other=0.0).to(ACC)
    at = dimages + i[:, None] * inner + d[None, :]
    tl.store(at, total.to(dimages.dtype.element_ty), mask=mask)


@triton.jit
def prompt_texts_kernel(
    share, images, order, offsets, dtexts, rows, classes, inner, ACC: tl.constexpr, R: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    """dtexts of one (prompt, class): the images that chose it, in their order."""
    prompt = tl.program_id(0).to(tl.int64) // classes
    c = tl.program_id(0).to(tl.int64) % classes
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    begin = tl.load(offsets + prompt * (classes + 1) + c)
    end = tl.load(offsets + prompt * (classes + 1) + c + 1)
    total = tl.zeros((R, BD), ACC)
    for start in range(begin, end, R):
        n = start + tl.arange(0, R)
        i = tl.load(order + prompt * rows + n, mask=n < end, other=0)
        mask = (n < end)[:, None] & (d < inner)[None, :]
        total += tl.load(images + i[:, None] * inner + d[None, :], mask=mask, other=0.0).to(ACC)
    out = tl.sum(total, 0) * tl.load(share + prompt)
    at = dtexts + (prompt * classes + c) * inner + d
    tl.store(at, out.to(dtexts.dtype.element_ty), mask=d < inner)


# ---- launchers ---------------------------------------------------------------------------------------


def _config(dtype: torch.dtype) -> dict[str, int]:
    if dtype == torch.float64:
        return {"BM": 32, "BN": 32, "BK": 16, "num_warps": 4, "num_stages": 2}
    if dtype == torch.float32:
        return {"BM": 64, "BN": 64, "BK": 16, "num_warps": 8, "num_stages": 3}
    return {"BM": 128, "BN": 128, "BK": 64, "num_warps": 8, "num_stages": 3}


def _dot_type(x: torch.Tensor) -> tl.dtype:
    if x.dtype == torch.float64:
        return tl.float64
    if x.dtype == torch.float32 or (INTERPRETED and x.dtype == torch.bfloat16):
        return tl.float32
    return tl.bfloat16 if x.dtype == torch.bfloat16 else tl.float16


def _scores(images, texts, bias, choice):
    x, t = images.contiguous(), texts.contiguous()
    acc = accumulate_type(x)
    prompts, classes, inner = t.shape
    config = _config(x.dtype)
    tiles = triton.cdiv(x.shape[0], config["BM"])
    parts = x.new_empty((prompts, tiles), dtype=acc)
    if prompts:
        b = parts if bias is None else bias.to(acc).contiguous()
        with on_device_of(x):
            prompt_scores_kernel[(tiles, prompts)](
                x, t, b, parts, parts if choice is None else choice, x.shape[0], classes, inner, tiles,
                HAS_BIAS=bias is not None, CHOICE=choice is not None, ACC=accumulator(x),
                DOT=_dot_type(x), **config,
            )  # fmt: skip
    return parts.sum(1, dtype=torch.float64).div_(x.shape[0]).to(acc)


def prompt_scores(images, texts, bias):
    return _scores(images, texts, bias, None)


def prompt_scores_choice(images, texts, bias):
    choice = images.new_empty((texts.shape[0], images.shape[0]), dtype=torch.int64)
    return _scores(images, texts, bias, choice), choice


def prompt_scores_backward(grad, images, texts, choice, need_images, need_texts, need_bias):
    x, t, choice = images.contiguous(), texts.contiguous(), choice.contiguous()
    acc = accumulate_type(x)
    rows, inner = x.shape
    prompts, classes = t.shape[:2]
    share = (grad.to(acc) / rows).contiguous()
    dimages = x.new_zeros(x.shape if need_images else (0,))
    dtexts = x.new_zeros(t.shape if need_texts else (0,))
    dbias = x.new_zeros((prompts, classes) if need_bias else (0,), dtype=acc)
    if prompts == 0 or inner == 0:
        return dimages, dtexts, dbias
    blocks = triton.cdiv(inner, GATHER["BD"])
    with on_device_of(x):
        if need_images:
            prompt_images_kernel[(triton.cdiv(rows, GATHER["R"]), blocks)](
                share,
                t,
                choice,
                dimages,
                rows,
                prompts,
                classes,
                inner,
                ACC=accumulator(x),
                **GATHER,
            )
        if need_texts or need_bias:
            held = torch.sort(choice, dim=1, stable=True)
            edges = torch.arange(classes + 1, device=x.device).expand(prompts, -1).contiguous()
            offsets = torch.searchsorted(held.values, edges)
            if need_texts:
                prompt_texts_kernel[(prompts * classes, blocks)](
                    share, x, held.indices.contiguous(), offsets, dtexts, rows, classes, inner,
                    ACC=accumulator(x), **GATHER,
                )  # fmt: skip
            if need_bias:
                dbias = offsets.diff(dim=1).to(acc) * share[:, None]
    return dimages, dtexts, dbias


# ---- ahead-of-time compilation -----------------------------------------------------------------------


def aot() -> Iterator:
    """Scores with and without classes, bfloat16 and float32; backward in bfloat16."""
    from .._aot import AotCase

    acc, label = "*fp32", "*i64"
    sizes = {"rows": "i32", "classes": "i32", "inner": "i32"}
    for dtype, element, dot in (
        (torch.bfloat16, "*bf16", tl.bfloat16),
        (torch.float32, acc, tl.float32),
    ):
        config = _config(dtype)
        warps, stages = config.pop("num_warps"), config.pop("num_stages")
        for kept in (False, True):
            yield AotCase(
                name=f"prompt_scores_{element[1:]}_{'choice' if kept else 'plain'}",
                fn=prompt_scores_kernel,
                signature={
                    "images": element, "texts": element, "bias": acc, "parts": acc, "choice": label,
                    **sizes, "tiles": "i32",
                },
                constexprs={"HAS_BIAS": True, "CHOICE": kept, "ACC": tl.float32, "DOT": dot, **config},
                divisible_by_16=("images", "texts", "bias", "parts", "choice", "inner"),
                num_warps=warps,
                num_stages=stages,
            )  # fmt: skip
    gather = {"ACC": tl.float32, "R": GATHER["R"], "BD": GATHER["BD"]}
    yield AotCase(
        name="prompt_images",
        fn=prompt_images_kernel,
        signature={
            "share": acc, "texts": "*bf16", "choice": label, "dimages": "*bf16", "prompts": "i32",
            **sizes,
        },
        constexprs=gather,
        divisible_by_16=("share", "texts", "choice", "dimages", "inner"),
        num_warps=GATHER["num_warps"],
    )  # fmt: skip
    yield AotCase(
        name="prompt_texts",
        fn=prompt_texts_kernel,
        signature={
            "share": acc, "images": "*bf16", "order": label, "offsets": label, "dtexts": "*bf16",
            **sizes,
        },
        constexprs=gather,
        divisible_by_16=("share", "images", "order", "offsets", "dtexts", "inner"),
        num_warps=GATHER["num_warps"],
    )  # fmt: skip
