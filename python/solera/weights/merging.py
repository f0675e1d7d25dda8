"""Adapters merged into the weights they were trained beside, in place, over core `low_rank_update`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .. import _check
from .._registry import accumulate_type
from .._route import full_precision
from . import _lists
from .low_rank_update import update_

Weights = Tensor | Sequence[Tensor] | Mapping[str, Tensor]


def check_matrix(name: str, value: object) -> Tensor:
    """A dense floating-point matrix that can be written."""
    t = _check.tensor(name, value, dim=2)
    _lists.match(name, t, name, t)
    _lists.refuse_expanded(name, t)
    return t


def _check_factors(name: str, weight: Tensor, a: object, b: object, a_name: str, b_name: str):
    out, inner = weight.shape
    a, b = _check.tensor(a_name, a, dim=2), _check.tensor(b_name, b, dim=2)
    _check.like(a_name, a, (a.shape[0], inner), weight, name)
    _check.like(b_name, b, (out, a.shape[0]), weight, name)
    return a, b


def merge_lora_(
    weight: Weights,
    a: Weights,
    b: Weights,
    scale: float | Sequence[float] | Mapping[str, float] = 1.0,
) -> Weights:
    r"""Adds a LoRA adapter to the weight it belongs to, in place: $W \leftarrow W + s\,BA$. Returns weight.

    The product is accumulated in float32 (float64 for a float64 weight) and rounded once, also where the weight is
    bfloat16 and the factors float32; each weight is read and written once, a list of layers in one parallel region.
    Without autograd, as torch's optimizers write.

    Args:
        weight: a matrix (O, I), or a list or state dict of them, of any of float32, float64, bfloat16, float16; rows
            may be strided (a slice of a fused weight). No two may share memory.
        a: (r, I) each; b: (O, r) each: a tensor, list or dict like weight. Ranks may differ between layers.
        scale: s, LoRA's alpha / r: a number, or one for each layer.

    Shapes: (O, I), (r, I), (O, r) -> weight.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Hu et al., "LoRA", 2022; merged, then started anew with the optimizer: Xia, Qin, Hazan, "Chain of LoRA",
    2024.
    """
    kind = _lists.kind_of("weight", weight)
    layers = _lists.entries("weight", weight, kind)
    factors = [_lists.entries(n, t, kind) for n, t in (("a", a), ("b", b))]
    keys = list(layers)
    for name, found in zip("ab", factors):
        _lists.match_keys(name, found, "weight", keys, kind)
    scales = _scales(scale, keys, kind)
    flat, every_a, every_b = [], [], []
    for key, by in zip(keys, scales):
        spelled = [_lists.spelled(n, kind, key) for n in ("weight", "a", "b")]
        w = check_matrix(spelled[0], layers[key])
        one_a, one_b = _check_factors(spelled[0], w, factors[0][key], factors[1][key], *spelled[1:])
        flat.append(w)
        every_a.append(one_a.detach())
        every_b.append(one_b.detach().to(accumulate_type(w)) * by)
    _lists.refuse_overlap(
        flat,
        [*every_a, *every_b],
        lambda i: _lists.spelled("weight", kind, keys[i]),
        lambda i: _lists.spelled("ab"[i // len(keys)], kind, keys[i % len(keys)]),
    )
    update_(flat, every_a, every_b, [])
    return weight


def _scales(scale: object, keys: list, kind: str) -> list[float]:
    if isinstance(scale, Mapping):
        if kind != "state dict" or set(scale) != set(keys):
            raise ValueError("scale: expected a number, or one for each entry of weight")
        return [_check.number(f"scale[{k!r}]", scale[k]) for k in keys]
    if isinstance(scale, Sequence) and not isinstance(scale, str):
        if len(scale) != len(keys):
            raise ValueError(f"scale: expected {len(keys)} numbers like weight, got {len(scale)}")
        return [_check.number(f"scale[{i}]", s) for i, s in enumerate(scale)]
    return [_check.number("scale", scale)] * len(keys)


@full_precision
@torch.no_grad()
def merge_hydra_(
    weight: Tensor,
    a_parallel: Tensor,
    b_parallel: Tensor,
    a_sequential: Tensor,
    b_sequential: Tensor,
    scale: float = 1.0,
    *,
    bias: Tensor | None = None,
) -> Tensor:
    r"""Hydra's two heads merged, in place: $W \leftarrow W + s(B_pA_p + B_sA_sW)$, $d \leftarrow d + s\,B_sA_sd$.

    One update of rank 2 r with the factors $(A_p;\ A_sW)$ and $(B_p, B_s)$. `ensemble.hydra_merge` gives new tensors.
    (The released ViT merge takes its attention branch from the weights of another layer; this is the formula.)

    Args:
        weight: (O, I); a_parallel (r, I), b_parallel (O, r), a_sequential (r, O), b_sequential (O, r).
        scale: the number s. bias: d (O,), changed too, or None.

    Shapes: (O, I) and factors as above -> weight.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Kim et al., "Hydra: Multi-head Low-rank Adaptation for Parameter Efficient Fine-tuning", 2023.
    """
    weight = check_matrix("weight", weight)
    scale = _check.number("scale", scale)
    names = ("a_parallel", "b_parallel", "a_sequential", "b_sequential")
    _check_factors("weight", weight, a_parallel, b_parallel, *names[:2])
    a_s = _check.tensor(names[2], a_sequential, dim=2)
    out = weight.shape[0]
    _check.like(names[2], a_s, (a_s.shape[0], out), weight, "weight")
    _check.like(names[3], b_sequential, (out, a_s.shape[0]), weight, "weight")
    if bias is not None:
        _check.like("bias", bias, (out,), weight, "weight")
    acc = accumulate_type(weight)
    a_s, b_s = a_s.to(acc), b_sequential.to(acc)
    a = torch.cat([a_parallel.to(acc), a_s @ weight.to(acc)])
    b = torch.cat([b_parallel.to(acc), b_s], 1) * scale
    update_([weight], [a], [b], [])
    if bias is not None:
        wide = bias.to(acc)
        bias.copy_(wide + scale * (b_s @ (a_s @ wide)))
    return weight


def merge_melora_(
    weight: Tensor, a: Tensor, b: Tensor, scale: float | Sequence[float] = 1.0
) -> Tensor:
    r"""n small adapters into the n diagonal blocks of weight, in place: block i gets $s_i B_iA_i$. Returns weight.

    The blocks are views, updated in one parallel region; nothing else is touched.

    Args:
        weight: (O, I); a: (n, r, I / n); b: (n, O / n, r). scale: a number or n of them.

    Shapes: (O, I), (n, r, I / n), (n, O / n, r) -> weight.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Ren et al., "Mini-Ensemble Low-Rank Adapters for Parameter-Efficient Fine-Tuning", 2024;
    `ensemble.melora_merge_` is the same with a tensor of scales.
    """
    weight = check_matrix("weight", weight)
    a, b = _check.tensor("a", a, dim=3), _check.tensor("b", b, dim=3)
    (out, inner), (n, rank, width) = weight.shape, a.shape
    if n == 0 or n * width != inner or out % n:
        raise ValueError(
            f"a: expected shape (n, r, {inner} / n) with n a divisor of {out} to go with weight of shape "
            f"{tuple(weight.shape)}, got {tuple(a.shape)}"
        )
    _check.like("a", a, tuple(a.shape), weight, "weight")
    _check.like("b", b, (n, out // n, rank), weight, "weight")
    high = out // n
    blocks = [
        weight.detach()[i * high : (i + 1) * high, i * width : (i + 1) * width] for i in range(n)
    ]
    acc = accumulate_type(weight)
    scales = _scales(scale, list(range(n)), "list")
    update_(blocks, list(a.detach()), [t.to(acc) * s for t, s in zip(b.detach(), scales)], [])
    return weight
