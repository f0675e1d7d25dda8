r"""Core `lookahead`: slow weights take a step towards fast ones, which are set back to them, in one pass.

$$s \leftarrow s + \alpha\,(f - s),\qquad f \leftarrow s ,$$

computed in float32 (float64 for float64 slow weights), product and sum rounded separately, so that every backend gives
the same bits; f takes s as it was stored.

Source: Zhang, Lucas, Hinton, Ba, "Lookahead Optimizer: k steps forward, 1 step back", 2019.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .. import _check
from .._registry import accumulate_type, reference
from .._route import use_reference
from . import _lists
from .ema import ema_

_lookahead_op = torch.ops.solera.lookahead_.default


# ---- reference ---------------------------------------------------------------------------------------


@reference("lookahead_")
def _lookahead(slow, fast, alpha):
    if any(s.shape != f.shape for s, f in zip(slow, fast, strict=True)):
        raise RuntimeError("lookahead_: a fast tensor differs in shape from its slow one")
    for s, f in zip(slow, fast):
        acc = accumulate_type(s)
        a, b = s.to(acc), f.to(acc)
        if alpha == 0:
            value = a
        elif alpha == 1:
            value = b
        else:
            value = a + (b - a) * torch.tensor(alpha, dtype=acc, device=s.device)
        s.copy_(value)
        f.copy_(s)


# ---- public function ---------------------------------------------------------------------------------


def _containers(value: Any) -> Any:
    """A generator as a list; anything else as it is."""
    if isinstance(value, Tensor | Mapping | list | tuple) or not isinstance(value, Iterable):
        return value
    return list(value)


def _gather(slow: Any, fast: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Both as checked lists: of the same shapes, writable, no two of them sharing memory."""
    kind = _lists.kind_of("slow", slow)
    wanted, given = _lists.entries("slow", slow, kind), _lists.entries("fast", fast, kind)
    _lists.match_keys("fast", given, "slow", wanted, kind)
    keys = list(wanted)
    names = [
        _lists.spelled(name, kind, key) for name in ("slow", "fast") for key in keys
    ]  # the slow ones, then the fast ones
    flat = [*(wanted[key] for key in keys), *(given[key] for key in keys)]
    for i, (name, t) in enumerate(zip(names, flat)):
        _lists.match(name, t, names[i % len(keys)], flat[i % len(keys)])
        _lists.refuse_expanded(name, t)
        if t.device != flat[0].device:
            raise ValueError(
                f"{name}: expected device {flat[0].device} (that of {names[0]}), got {t.device}"
            )
    _lists.refuse_overlap(flat, [], names.__getitem__, names.__getitem__)
    return flat[: len(keys)], flat[len(keys) :]


def lookahead_(
    slow: Tensor | Iterable[Tensor] | Mapping[str, Tensor],
    fast: Tensor | Iterable[Tensor] | Mapping[str, Tensor],
    alpha: float,
    *,
    every: int = 1,
    step: int = 1,
    write_back: bool = True,
) -> bool:
    r"""Every k steps, in place: $s \leftarrow s + \alpha (f - s)$, then $f \leftarrow s$.

    With `write_back=False` it is an average of the fast weights with decay $1 - \alpha$ (`ema_`), made every k steps:
    the momentum-based weight interpolation of zero-shot models has decay $\tau = 1 - \alpha$ and starts at the
    zero-shot weights.

    Args:
        slow: a tensor, an iterable of tensors or a state dict; float32, float64, bfloat16 or float16, also mixed.
            Written in place, without autograd.
        fast: as many, of the same shapes; their dtypes may differ. Written unless `write_back` is False.
        alpha: in [0, 1].
        every, step: nothing happens unless step, which counts from 1, is a multiple of `every`.
        write_back: one pass that reads and writes both; False leaves the fast weights alone.

    Shapes: each slow tensor and its fast one have one shape, any. Of DTensors each process moves its shards. Returns
    whether the step was made.

    Raises:
        ValueError, TypeError: naming the argument: empty lists, keys, shapes, dtypes (integer entries included) or
            devices that do not fit, tensors that share memory, alpha outside [0, 1].

    Source: Zhang, Lucas, Hinton, Ba, "Lookahead Optimizer: k steps forward, 1 step back", 2019; Stojanovski, Roth,
    Akata, "Momentum-based Weight Interpolation of Strong Zero-Shot Models for Continual Learning", 2022.
    """
    alpha = _check.number("alpha", alpha, low=0.0, high=1.0)
    for name, value in (("every", every), ("step", step)):
        if isinstance(value, bool) or not isinstance(value, int | torch.SymInt) or value < 1:
            raise ValueError(f"{name}: expected an int of at least 1, got {value!r}")
    slow, fast = _lists.shards(_containers(slow)), _lists.shards(_containers(fast))
    flat_slow, flat_fast = _gather(slow, fast)
    if step % every:
        return False
    if not write_back:
        ema_(flat_slow, flat_fast, 1 - alpha)
        return True
    with torch.no_grad():
        if use_reference():
            _lookahead(flat_slow, flat_fast, alpha)
            return True
        _lookahead_op(flat_slow, flat_fast, alpha)
        if not torch.compiler.is_compiling():
            torch.autograd.graph.increment_version([*flat_slow, *flat_fast])
    return True
