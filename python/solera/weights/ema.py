r"""Core `ema`: exponential moving averages of weights, in place.

$$a \leftarrow a + (1 - \mathrm{decay})\,(p - a)$$

computed in float32 (float64 for float64 averages) with the product and the sum rounded separately, so that
every backend gives the same bits.

**Stochastic rounding.** A bfloat16 average has 8 significant bits: with decay 0.999 every step is below half
a unit in the last place and rounding to nearest returns the old average forever. Rounding up with
probability equal to the fraction cut off makes the expected value of the stored average that of the exact
one. With $r$ uniform on $0..2^{16}-1$: bfloat16 adds $r$ to the float32 bits and drops the low 16; float16
adds $\lfloor r / 8 \rfloor$ and drops 13, and below $2^{-14}$ takes $\lfloor |x|\,2^{24} + r\,2^{-16} \rfloor$.

**Random bits** are a function of (seed, step, index of the tensor in the list, index of the element in
row-major order), the same on every device and at any tiling, and never stored. Philox4x32-10 has the
counter (block & 0xffffffff, block >> 32, tensor index, step) and the key (seed & 0xffffffff, seed >> 32).
Element e belongs to chunk e // 1024, slot (e % 1024) // 128, lane e % 128, and takes 16 bits from block
chunk * 128 + lane: word slot // 2, the low half for even slots, the high half for odd ones.

Sources: Polyak, Juditsky, 1992; Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011 (Philox);
Gupta et al., "Deep learning with limited numerical precision", 2015 (stochastic rounding).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .. import _check
from .._registry import accumulate_type, compiled_library, reference
from .._route import use_reference
from . import _lists

_ema_op = torch.ops.solera.ema_.default
_LOW = 0xFFFFFFFF
ROUNDINGS = ("nearest", "stochastic")
HALVES = (torch.bfloat16, torch.float16)


# ---- reference ---------------------------------------------------------------------------------------


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10 on int64 tensors that hold 32-bit words: four output words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # the low 64 bits: int64 multiplication wraps
        c0, c2 = ((b >> 32) & _LOW) ^ c1 ^ k0, ((a >> 32) & _LOW) ^ c3 ^ k1
        c1, c3 = b & _LOW, a & _LOW
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return c0, c1, c2, c3


def random_halves(seed: Tensor, tensor_index: int, elements: int) -> Tensor:
    """The 16 random bits of each element of a tensor; seed holds (seed, step)."""
    e = torch.arange(elements, device=seed.device)
    block = e // 1024 * 128 + e % 128
    slot = e % 1024 // 128
    zero = torch.zeros_like(e)
    words = philox(
        (block & _LOW, block >> 32, zero + tensor_index, zero + (seed[1] & _LOW)),
        (seed[0] & _LOW, (seed[0] >> 32) & _LOW),
    )
    word = torch.stack(words).gather(0, (slot // 2).unsqueeze(0)).squeeze(0)
    return torch.where(slot % 2 == 0, word & 0xFFFF, word >> 16)


def round_stochastic(x: Tensor, dtype: torch.dtype, r: Tensor) -> Tensor:
    """float32 x to bfloat16 or float16, up with the probability of what is cut off; r as random_halves."""
    bits = x.view(torch.int32).long() & _LOW
    if dtype == torch.bfloat16:
        rounded = ((bits + r) & ~0xFFFF).int().view(torch.float32).bfloat16()
        return torch.where(x.isnan(), x.bfloat16(), rounded)
    sign, size = bits & 0x80000000, bits & 0x7FFFFFFF
    normal = ((size + (r >> 3)) & ~0x1FFF).int().view(torch.float32)
    scaled = x.abs() * 2.0**24
    whole = scaled.floor()
    tiny = (whole + (scaled - whole >= 1 - r.float() * 2.0**-16).float()) * 2.0**-24
    rounded = torch.where(size < 0x38800000, tiny, normal)
    rounded = torch.where(sign != 0, -rounded, rounded).half()
    return torch.where(size < 0x7F800000, rounded, x.half())


@reference("ema_")
def _ema(averages, parameters, decay, seed):
    if any(a.shape != p.shape for a, p in zip(averages, parameters, strict=True)):
        raise RuntimeError("ema_: a parameter differs in shape from its average")
    weight = 1 - decay
    for index, (average, parameter) in enumerate(zip(averages, parameters)):
        acc = accumulate_type(average)
        p = parameter.to(acc)
        a = average.to(acc)
        # weight is rounded to the accumulator before the product, as in the kernels.
        value = p if decay == 0 else a + (p - a) * torch.tensor(weight, dtype=acc, device=a.device)
        if seed is None or average.dtype not in HALVES:
            average.copy_(value)
        else:
            r = random_halves(seed, index, value.numel()).view(value.shape)
            average.copy_(round_stochastic(value.contiguous(), average.dtype, r))


# ---- public function ---------------------------------------------------------------------------------


def _containers(value: Any) -> Any:
    """A generator as a list; anything else as it is."""
    if (
        type(value) is list
        or _lists.plain(value)
        or isinstance(value, Tensor | Mapping | list | tuple)
    ):
        return value
    return list(value) if isinstance(value, Iterable) else value


def _kernel_checks(averages: Any, parameters: Any) -> bool:
    """True where the compiled op itself refuses what does not fit, at a tenth of the price."""
    if compiled_library is None or torch.compiler.is_compiling() or use_reference():
        return False
    if type(averages) not in (list, tuple) or type(parameters) not in (list, tuple):
        return False
    if not len(averages) == len(parameters) > 0:
        return False
    try:
        return all([t.is_cpu and t.is_contiguous() for t in averages]) and all(
            [t.is_cpu and t.is_contiguous() for t in parameters]
        )
    except AttributeError:
        return False


def _gather_with_care(averages: Any, parameters: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Both as checked lists."""
    kind = _lists.kind_of("averages", averages)
    wanted = _lists.entries("averages", averages, kind)
    given = _lists.entries("parameters", parameters, kind)
    _lists.match_keys("parameters", given, "averages", wanted, kind)
    keys = list(wanted)
    names = [_lists.spelled("averages", kind, key) for key in keys]
    parameter_names = [_lists.spelled("parameters", kind, key) for key in keys]
    flat, flat_parameters = [wanted[key] for key in keys], [given[key] for key in keys]
    for name, parameter_name, a, p in zip(names, parameter_names, flat, flat_parameters):
        _lists.match(name, a, name, a)
        _lists.match(parameter_name, p, name, a)
        _lists.refuse_expanded(name, a)
        if a.device != flat[0].device:
            raise ValueError(
                f"{name}: expected device {flat[0].device} (that of {names[0]}), got {a.device}"
            )
    _lists.refuse_overlap(flat, flat_parameters, names.__getitem__, parameter_names.__getitem__)
    return flat, flat_parameters


def ema_(
    averages: Tensor | Iterable[Tensor] | Mapping[str, Tensor],
    parameters: Tensor | Iterable[Tensor] | Mapping[str, Tensor],
    decay: float,
    *,
    rounding: str = "nearest",
    seed: int | None = None,
    step: int | None = None,
) -> None:
    r"""One step of an exponential moving average, in place: $a \leftarrow a + (1 - \mathrm{decay})(p - a)$.

    Args:
        averages: a tensor, an iterable of tensors (`ema.parameters()`) or a state dict; written in place,
            without autograd (as torch's optimizers do), also where they require a gradient.
            float32, float64, bfloat16 or float16, also mixed.
        parameters: as many, of the same shapes; their dtypes may differ from the averages'. A parameter may
            be its own average (nothing changes); any other overlap in memory is an error.
        decay: in [0, 1]; 0 copies the parameters, 1 changes nothing.
        rounding: "nearest", or "stochastic" for bfloat16 and float16 averages: unbiased, so that a step
            smaller than the last place moves the average on the mean (float32 and float64 averages are
            rounded to nearest in either case).
        seed: of the random bits, in [0, 2^63). None draws a fresh one from torch's generator at each call.
            A given seed needs a step. Without stochastic rounding it has no effect.
        step: with a seed, a counter in [0, 2^32) that changes at every call: a constant one would round the
            same elements up each time, and freeze the others. Without a seed it has no effect.

    Shapes: each average and its parameter have one shape, any. Of DTensors each process averages its shards.

    Raises:
        ValueError, TypeError: naming the argument: empty lists, keys, shapes, dtypes (integer entries
            included) or devices that do not fit, an average given twice, decay outside [0, 1], a seed
            without a step.

    Source: Polyak, Juditsky, 1992; stochastic rounding: Gupta et al., 2015; random bits: Salmon et al., 2011.
    """
    decay = _check.number("decay", decay, low=0.0, high=1.0)
    if rounding != "nearest":
        _check.choice("rounding", rounding, ROUNDINGS)
    if seed is not None or step is not None:
        _check_seed(seed, step)
    averages = _lists.shards(_containers(averages))
    parameters = _lists.shards(_containers(parameters))
    flat: Any = averages
    flat_parameters: Any = parameters
    if _lists.plain(averages) and _lists.plain(parameters):
        flat, flat_parameters = [averages], [parameters]
    trusted = decay < 1.0 and _kernel_checks(flat, flat_parameters)
    if not trusted:
        flat, flat_parameters = _gather_with_care(averages, parameters)
    if decay == 1.0:
        return
    state = None
    if rounding == "stochastic" and any([t.dtype in HALVES for t in flat]):
        device = flat[0].device
        if seed is None:
            state = torch.randint(2**63 - 1, (2,), dtype=torch.int64, device=device)
        else:
            state = torch.tensor([seed, step], dtype=torch.int64, device=device)
    with torch.no_grad():
        if use_reference():
            _ema(flat, flat_parameters, decay, state)
            return
        try:
            _ema_op(flat, flat_parameters, decay, state)
        except RuntimeError:
            if trusted:
                _gather_with_care(
                    averages, parameters
                )  # says what is wrong with the input, if that is it
            raise
        if not torch.compiler.is_compiling():
            torch.autograd.graph.increment_version(flat)


def _check_seed(seed: int | None, step: int | None) -> None:
    if seed is not None and step is None:
        raise ValueError(
            "seed: a given seed needs a step that changes at every call; with the same random bits each "
            "time the same elements are rounded up, and the others stay frozen"
        )
    for name, value, bits in (("seed", seed, 63), ("step", step, 32)):
        if value is None:
            continue
        if not isinstance(value, int | torch.SymInt) or isinstance(value, bool):
            raise TypeError(f"{name}: expected an int, got {type(value).__name__} {value!r}")
        if not 0 <= value < 2**bits:
            raise ValueError(f"{name}: expected an int in [0, 2**{bits}), got {value}")
