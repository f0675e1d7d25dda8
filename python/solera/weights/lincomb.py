r"""Core `lincomb`: linear combinations of K weight lists.

$$\mathrm{out}_l = \sum_k c_{kl}\,w_{kl}
  \qquad\text{or, around a base,}\qquad
  \mathrm{out}_l = b_l + \sum_k c_{kl}\,(w_{kl} - b_l) .$$

Both are linear in the coefficients and in the tensors, so with $G_l$ the gradient of $\mathrm{out}_l$

$$\mathrm{d}c_{kl} = \langle G_l,\, w_{kl} - b_l\rangle,\qquad
  \mathrm{d}w_{kl} = c_{kl}\,G_l,\qquad
  \mathrm{d}b_l = \Bigl(1 - \sum_k c_{kl}\Bigr)\,G_l .$$

A coefficient shared by all tensors of a list (shape (K,)) gets the sum of its row. All dots are taken in
one pass over memory; tensors that require no gradient are neither written to nor, unless the coefficients
need them, kept.

Sources: model soups, Wortsman et al., 2022 (c = 1/K); WiSE-FT, Wortsman et al., 2021 (K = 2); task
arithmetic, Ilharco et al., 2022 (around a base). Learned coefficients: AdaMerging, Yang et al., 2023.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _check
from .._registry import compiled_library, reference
from .._route import use_reference
from . import _lists
from ._distributed import placements_of

_op = torch.ops.solera
_lincomb_op = _op.lincomb.default
Weights = Tensor | Sequence[Tensor] | Mapping[str, Tensor]


# ---- reference ---------------------------------------------------------------------------------------


def _column(coefficients: Tensor, k: int, item: int) -> Tensor:
    return coefficients[k] if coefficients.dim() == 1 else coefficients[k, item]


def _accumulator(tensors: Sequence[Tensor], out_dtype: torch.dtype | None) -> torch.dtype:
    wide = out_dtype == torch.float64 or any(t.dtype == torch.float64 for t in tensors)
    return torch.float64 if wide else torch.float32


def lincomb_reference(
    tensors: Sequence[Tensor],
    coefficients: Tensor,
    base: Sequence[Tensor],
    out_dtype: torch.dtype | None,
) -> list[Tensor]:
    """The formula on K * L tensors (model by model), summed in float32 (float64 where one is float64)."""
    length = len(tensors) // coefficients.shape[0]
    out = []
    for item in range(length):
        column = tensors[item::length]
        every = [*column, *base[item : item + 1]]
        dtype = out_dtype
        if dtype is None:
            dtype = every[0].dtype
            for t in every:
                dtype = torch.promote_types(dtype, t.dtype)
        acc = _accumulator(every, dtype)
        b = base[item].to(acc) if base else None
        total = b
        for k, w in enumerate(column):
            term = _column(coefficients, k, item).to(acc) * (
                w.to(acc) if b is None else w.to(acc) - b
            )
            total = term if total is None else total + term
        assert total is not None
        out.append(total.to(dtype))
    return out


def _refuse_mismatch(flat: Sequence[Tensor], like: Sequence[Tensor]) -> None:
    """What the kernels refuse too: plain torch would broadcast."""
    if any(t.shape != like[i % len(like)].shape for i, t in enumerate(flat)):
        raise RuntimeError("lincomb: a tensor differs in shape from the first model's")


@reference("lincomb")
def _lincomb(tensors, coefficients, base, out_dtype):
    _refuse_mismatch([*tensors, *base], tensors[: len(tensors) // coefficients.shape[0]])
    out = lincomb_reference(tensors, coefficients, base, out_dtype)
    return [t.contiguous() for t in out]


@reference("lincomb_out")
def _lincomb_out(tensors, coefficients, base, out):
    length = len(out)
    _refuse_mismatch([*tensors, *base], out)
    for item in range(length):
        column = coefficients if coefficients.dim() == 1 else coefficients[:, item : item + 1]
        value = lincomb_reference(
            tensors[item::length], column, base[item : item + 1], out[item].dtype
        )
        out[item].copy_(value[0])


def lincomb_vjp(
    grads: Sequence[Tensor],
    tensors: Sequence[Tensor],
    coefficients: Tensor,
    base: Sequence[Tensor],
    need_coefficients: bool,
    need_tensors: Sequence[bool],
) -> tuple[Tensor, list[Tensor]]:
    """dots (K, L) in float64 and the gradients asked for, in plain torch: itself differentiable."""
    count, length = coefficients.shape[0], len(grads)
    every = (*tensors, *base)

    def dot(k: int, item: int) -> Tensor:
        w = tensors[k * length + item].double()
        delta = w - base[item].double() if base else w
        return (grads[item].double() * delta).sum()

    dots = coefficients.new_empty(0, dtype=torch.float64)
    if need_coefficients:
        dots = torch.stack(
            [torch.stack([dot(k, item) for item in range(length)]) for k in range(count)]
        )
    out = []
    for i, need in enumerate(need_tensors):
        if not need:
            continue
        k, item = divmod(i, length)
        dtype = every[i].dtype
        acc = _accumulator([every[i], grads[item]], None)
        if k < count:
            factor = _column(coefficients, k, item)
        else:
            column = coefficients if coefficients.dim() == 1 else coefficients[:, item]
            factor = 1 - column.double().sum()
        out.append((grads[item].to(acc) * factor.to(acc)).to(dtype))
    return dots, out


@reference("lincomb_backward")
def _lincomb_backward(grads, tensors, coefficients, base, need_coefficients, need_tensors):
    dots, out = lincomb_vjp(grads, tensors, coefficients, base, need_coefficients, need_tensors)
    return dots, [t.contiguous() for t in out]


# ---- autograd ----------------------------------------------------------------------------------------


class _Lincomb(torch.autograd.Function):
    """coefficients and the K * L tensors followed by the base's L (or none) -> L tensors, or `known`."""

    @staticmethod
    def forward(ctx, coefficients, need_coefficients, length, out_dtype, known, *flat):
        split = coefficients.shape[0] * length
        ctx.length, ctx.split = length, split
        ctx.dtypes = [t.dtype for t in flat]
        # Only the dots read the tensors: without them no tensor is kept.
        ctx.save_for_backward(coefficients, *(flat if need_coefficients else ()))
        ctx.set_materialize_grads(False)
        return tuple(known or _op.lincomb(flat[:split], coefficients, flat[split:], out_dtype))

    @staticmethod
    def backward(ctx, *grads):
        coefficients, *flat = ctx.saved_tensors
        length, needs = ctx.length, ctx.needs_input_grad
        need_coefficients, need_tensors = needs[0], needs[5:]
        live = [item for item, g in enumerate(grads) if g is not None]
        if not live:
            return (None,) * len(needs)
        if not flat:
            stand_in = {d: grads[live[0]].new_empty(0, dtype=d) for d in set(ctx.dtypes)}
            flat = [stand_in[d] for d in ctx.dtypes]
        kept = [i for i in range(len(flat)) if grads[i % length] is not None]
        part = coefficients
        if coefficients.dim() == 2 and len(live) < length:
            part = coefficients[:, live]
        backward = lincomb_vjp if torch.is_grad_enabled() else _op.lincomb_backward
        dots, found = backward(
            [grads[item] for item in live],
            [flat[i] for i in kept if i < ctx.split],
            part,
            [flat[i] for i in kept if i >= ctx.split],
            need_coefficients,
            [need_tensors[i] for i in kept],
        )
        dcoefficients = None
        if need_coefficients:
            if coefficients.dim() == 1:
                dcoefficients = dots.sum(1)
            elif len(live) < length:
                place = torch.tensor(live, device=dots.device)
                dcoefficients = dots.new_zeros(coefficients.shape).index_copy(1, place, dots)
            else:
                dcoefficients = dots
            dcoefficients = dcoefficients.to(coefficients.dtype)
        dtensors: list[Tensor | None] = [None] * len(flat)
        for i, gradient in zip([i for i in kept if need_tensors[i]], found):
            dtensors[i] = gradient
        return dcoefficients, None, None, None, None, *dtensors


# ---- public function ---------------------------------------------------------------------------------


_LISTS = (list, tuple)
_numbers: dict[tuple, Tensor] = {}  # coefficients given as a list, which a training loop repeats


def _coefficients(value: Any, count: int, length: int, like: Tensor) -> Tensor:
    if type(value) in _LISTS and len(value) == count and not torch.compiler.is_compiling():
        # The list as it was before. (1 and True are equal to 1.0, and make the same tensor.)
        try:
            return _numbers[like.device, *value]
        except (KeyError, TypeError, ValueError, RuntimeError):
            pass  # new, or without a hash, or without a truth when it is compared
    if isinstance(value, Tensor):
        c = value
        if c.dtype not in _check.FLOATS:
            raise TypeError(f"coefficients: expected a floating-point dtype, got {c.dtype}")
        if c.device != like.device:
            raise ValueError(
                f"coefficients: expected device {like.device} (that of tensors), got {c.device}"
            )
    else:
        c = _from_numbers(value, like.device)
    if c.dim() not in (1, 2) or c.shape[0] != count or (c.dim() == 2 and c.shape[1] != length):
        raise ValueError(
            f"coefficients: expected shape ({count},) or ({count}, {length}) for {count} models of "
            f"{length} floating-point tensor(s), got {tuple(c.shape)}"
        )
    return c


def _from_numbers(value: Any, device: torch.device) -> Tensor:
    """A tensor of a list. Short lists of numbers are kept: making one costs as much as a small call, and
    waits for the device on a GPU. (Zeros are not: 0.0 and -0.0 are one key.)
    """
    key = None
    if type(value) in _LISTS and len(value) <= 64 and not torch.compiler.is_compiling():
        if all([type(v) is float and v != 0.0 for v in value]):
            key = (device, *value)
    dtype = torch.float32 if device.type == "mps" else torch.float64
    try:
        c = torch.tensor(value, dtype=dtype, device=device)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise TypeError(
            "coefficients: expected a tensor or a list of K numbers (or K lists of L), got "
            f"{value!r:.200}; a list of tensors goes through torch.stack"
        ) from None
    if key is not None and type(c) is Tensor and not c.is_inference() and not use_reference():
        if len(_numbers) >= 64:
            _numbers.clear()
        _numbers[key] = c
    return c


def _is_whole(t: Tensor) -> bool:
    return not (t.dtype.is_floating_point or t.dtype.is_complex)


def _same_whole(key: Any, models: list[dict], names: list[str]) -> Tensor:
    """The common value of an integer or boolean entry: there is no average of counters and indices."""
    first = models[0][key]
    for name, model in zip(names[1:], models[1:]):
        if model[key].dtype != first.dtype or not torch.equal(model[key], first):
            raise ValueError(
                f"{name}[{key!r}]: {first.dtype} entries are not averaged and must be equal in all "
                "models; this one differs (leave the key out, or make them equal)"
            )
    return first


def _gather(tensors: Any, base: Any) -> tuple[str, list, dict, list] | None:
    """The quick way to what _gather_with_care returns: containers looked at, not what is in them."""
    if type(tensors) not in (list, tuple) or not tensors:
        return None
    models = [*tensors] if base is None else [*tensors, base]
    first = models[0]
    if _lists.plain(first):
        return "tensor", [0], {}, models
    if type(first) not in (list, tuple) or not first or not _lists.plain(first[0]):
        return None
    length = len(first)
    for model in models:
        if type(model) not in (list, tuple) or len(model) != length:
            return None
    return "list", list(range(length)), {}, [t for model in models for t in model]


def _kernel_checks(flat: list) -> bool:
    """True where the compiled op itself refuses what does not fit, at a tenth of the price."""
    if compiled_library is None or torch.compiler.is_compiling():
        return False
    try:
        return all([t.is_cpu for t in flat])
    except AttributeError:
        return False


def _gather_with_care(tensors: Any, base: Any) -> tuple[str, list, dict[Any, Tensor], list[Tensor]]:
    """(kind, keys of the floating-point entries, the other entries, all floating-point tensors in order).

    For state dicts, subclasses, and input that deserves an error.
    """
    if isinstance(tensors, Tensor | Mapping | str) or not isinstance(tensors, Sequence):
        raise TypeError(
            f"tensors: expected a list of K tensors, lists or state dicts, got {type(tensors).__name__}"
        )
    if len(tensors) == 0:
        raise ValueError("tensors: expected at least one model, got none (K = 0)")
    kind = _lists.kind_of("tensors[0]", tensors[0])
    names = _names(len(tensors))
    models = [_lists.entries(name, value, kind) for name, value in zip(names, tensors)]
    if base is not None:
        models.append(_lists.entries("base", base, kind))
    keys: list = list(models[0])
    for name, model in zip(names[1:], models[1:]):
        _lists.match_keys(name, model, "tensors[0]", keys, kind)
    whole: dict[Any, Tensor] = {}
    if kind == "state dict":
        whole = {key: _same_whole(key, models, names) for key in keys if _is_whole(models[0][key])}
        keys = [key for key in keys if key not in whole]
        if not keys:
            raise ValueError("tensors: the state dicts hold no floating-point entry")
    like = models[0]
    for name, model in zip(names, models):
        for key in keys:
            spelled, first = (_lists.spelled(n, kind, key) for n in (name, names[0]))
            _lists.match(spelled, model[key], first, like[key])
            if model[key].device != like[keys[0]].device:
                raise ValueError(
                    f"{spelled}: expected device {like[keys[0]].device} (that of "
                    f"{_lists.spelled(names[0], kind, keys[0])}), got {model[key].device}"
                )
    return kind, keys, whole, [model[key] for model in models for key in keys]


def _names(count: int) -> list[str]:
    return [*(f"tensors[{k}]" for k in range(count)), "base"]


def lincomb(
    tensors: Sequence[Weights],
    coefficients: Tensor | Sequence[float] | Sequence[Sequence[float]],
    *,
    base: Weights | None = None,
    out_dtype: torch.dtype | None = None,
    out: Weights | None = None,
) -> Any:
    r"""Linear combination of K tensors, K lists of tensors or K state dicts, in one pass over memory.

    $\mathrm{out}_l = \sum_k c_{kl} w_{kl}$, or with a base $b_l + \sum_k c_{kl} (w_{kl} - b_l)$. A uniform soup is
    `lincomb(models, [1 / K] * K)`, an interpolation `lincomb([b], [t], base=a)`, task arithmetic
    `lincomb(models, [0.3] * K, base=pretrained)`.

    Args:
        tensors: K tensors of one shape, or K lists of L tensors, or K state dicts with the same keys.
            float32, float64, bfloat16 or float16, also mixed; summed in float32 (float64 where a tensor or
            the result is float64), rounded once. Integer and boolean entries of state dicts must be equal
            in all models and are copied.
        coefficients: (K,) or (K, L), a tensor or numbers; columns follow the floating-point entries of
            `tensors[0]` in order. They need not sum to one.
        base: one more tensor, list or state dict like the others.
        out_dtype: dtype of the results; default: the promoted dtype of what goes in, tensor by tensor.
        out: written and returned instead of new tensors; saves touching fresh memory. It may be exactly
            one of the inputs at the same position; any other overlap is an error. No gradient flows.

    DTensors of one mesh and placement give such DTensors: each process combines its shards. Their coefficients get no
    gradient, and sums of partial values are refused.

    Shapes: K of any shape S -> S; K lists of shapes S_1..S_L -> the list; state dicts -> a dict. New results
    are contiguous.

    Differentiable in the coefficients, the tensors and the base; what requires no gradient costs nothing in
    backward.

    Raises:
        ValueError, TypeError: naming the argument: no models, empty lists, missing or unexpected keys,
            shapes, dtypes or devices that do not fit, an integer entry that differs, an overlapping `out`.

    Source: Wortsman et al., "Model soups", 2022; Ilharco et al., "Editing models with task arithmetic", 2022.
    """
    reference_only = use_reference()
    gathered = _gather(tensors, base)
    if gathered is None or not _lists.all_plain(gathered[3]):
        placed = placements_of(tensors, base)
        if placed:
            return _of_shards(placed, tensors, coefficients, base, out_dtype, out)
    trusted = (
        gathered is not None and not reference_only and out is None and _kernel_checks(gathered[3])
    )
    if gathered is None or not (
        trusted or _lists.uniform(gathered[3], gathered[3][: len(gathered[1])])
    ):
        gathered = _gather_with_care(tensors, base)
    kind, keys, whole, flat = gathered
    count, length = len(tensors), len(keys)
    if out_dtype is not None and out_dtype not in _check.FLOATS:
        raise TypeError(
            f"out_dtype: expected float32, float64, bfloat16 or float16, got {out_dtype!r}"
        )
    c = _coefficients(coefficients, count, length, flat[0])
    split = count * length
    graph = torch.is_grad_enabled() and (c.requires_grad or any([t.requires_grad for t in flat]))
    if out is not None:
        return _into(out, out_dtype, kind, keys, whole, flat, c, split, graph)
    around: list[Tensor] = []
    if base is not None:
        flat, around = flat[:split], flat[split:]
    results: Sequence[Tensor]
    try:
        if reference_only:
            results = lincomb_reference(flat, c, around, out_dtype)
        elif graph:
            results = _Lincomb.apply(c, c.requires_grad, length, out_dtype, None, *flat, *around)
        else:
            results = _lincomb_op(flat, c, around, out_dtype)
    except RuntimeError:
        if trusted:
            _gather_with_care(tensors, base)  # says what is wrong with the input, if that is it
        raise
    if kind == "tensor":
        return results[0]
    if kind == "list":
        return list(results)
    found = dict(zip(keys, results))
    return {key: whole[key].clone() if key in whole else found[key] for key in tensors[0]}


def _of_shards(placed, tensors, coefficients, base, out_dtype, out):
    """The same of DTensors: each process combines its shards, which is the combination's shard."""
    if torch.is_grad_enabled() and isinstance(coefficients, Tensor) and coefficients.requires_grad:
        raise ValueError(
            "coefficients: their gradient is a sum over all shards, which is not taken; give them detached"
        )
    found = lincomb(
        [_lists.shards(model) for model in tensors],
        coefficients,
        base=_lists.shards(base),
        out_dtype=out_dtype,
        out=_lists.shards(out),
    )
    if out is not None:
        return out
    if isinstance(found, Tensor):
        return placed[0](found)
    if isinstance(found, list):
        return [placed[key](t) if key in placed else t for key, t in enumerate(found)]
    return {key: placed[key](t) if key in placed else t for key, t in found.items()}


def _into(out, out_dtype, kind, keys, whole, flat, c, split, graph):
    """The combination written into `out`, which is returned."""
    if out_dtype is not None:
        raise ValueError("out_dtype: has no meaning with out, whose own dtypes are kept")
    if graph:
        raise ValueError(
            "out: no gradient flows through it, but coefficients, tensors or base require one; "
            "call under torch.no_grad() or without out"
        )
    targets = _lists.entries("out", out, kind)
    _lists.match_keys("out", targets, "tensors[0]", [*keys, *whole], kind)
    flat_out = [targets[key] for key in keys]
    for t, like, key in zip(flat_out, flat, keys):
        name = _lists.spelled("out", kind, key)
        _lists.match(name, t, _lists.spelled("tensors[0]", kind, key), like)
        _lists.refuse_expanded(name, t)
    for key, value in whole.items():
        t = targets[key]
        if t.dtype != value.dtype or t.shape != value.shape:
            raise ValueError(
                f"out[{key!r}]: expected {value.dtype} of shape {tuple(value.shape)}, got {t.dtype} "
                f"of shape {tuple(t.shape)}"
            )
    names, length = _names(c.shape[0]), len(keys)
    _lists.refuse_overlap(
        flat_out,
        flat,
        lambda i: _lists.spelled("out", kind, keys[i]),
        lambda i: _lists.spelled(names[i // length], kind, keys[i % length]),
    )
    with torch.no_grad():
        if use_reference():
            _lincomb_out(flat[:split], c, flat[split:], flat_out)
        else:
            if not torch.compiler.is_compiling():
                torch.autograd.graph.increment_version(flat_out)
            _op.lincomb_out(flat[:split], c, flat[split:], flat_out)
        for key, value in whole.items():
            targets[key].copy_(value)
    return out
