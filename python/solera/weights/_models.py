"""Several models (tensors, lists, state dicts or modules) as one flat list, with errors that name the argument."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _lists


def weights_of(value: Any) -> Any:
    """A module as its (detached) state dict; anything else as it is."""
    return value.state_dict() if isinstance(value, torch.nn.Module) else value


def is_whole(t: Tensor) -> bool:
    """An integer or boolean entry: counters and indices have no average."""
    return not (t.dtype.is_floating_point or t.dtype.is_complex)


def gather(
    models: Sequence[Any], names: Sequence[str]
) -> tuple[str, list, dict[Any, Tensor | None], list[Tensor]]:
    """(kind, keys of the floating-point entries, the other entries, all floating-point tensors, model by model).

    The other entries must be equal in all models. Where there are any they come as a dict of all keys in order, None
    where an entry is floating-point.
    """
    models = [weights_of(m) for m in models]
    kind = _lists.kind_of(names[0], models[0])
    found = [_lists.entries(name, m, kind) for name, m in zip(names, models)]
    keys: list = list(found[0])
    for name, model in zip(names[1:], found[1:]):
        _lists.match_keys(name, model, names[0], keys, kind)
    whole: dict[Any, Tensor] = {}
    if kind == "state dict":
        whole = {key: found[0][key] for key in keys if is_whole(found[0][key])}
        keys = [key for key in keys if key not in whole]
        if not keys:
            raise ValueError(f"{names[0]}: the state dict holds no floating-point entry")
        _refuse_differing(whole, found, names)
    flat = [model[key] for model in found for key in keys]
    if not _lists.uniform(flat, flat[: len(keys)]):
        device = found[0][keys[0]].device
        for name, model in zip(names, found):
            for key in keys:
                spelled, first = (_lists.spelled(n, kind, key) for n in (name, names[0]))
                _lists.match(spelled, model[key], first, found[0][key])
                if model[key].device != device:
                    raise ValueError(
                        f"{spelled}: expected device {device} (that of "
                        f"{_lists.spelled(names[0], kind, keys[0])}), got {model[key].device}"
                    )
    order = {key: whole.get(key) for key in found[0]} if whole else {}
    return kind, keys, order, flat


def _refuse_differing(whole, found, names):
    for key, first in whole.items():
        for name, model in zip(names[1:], found[1:]):
            if model[key].dtype != first.dtype or not torch.equal(model[key], first):
                raise ValueError(
                    f"{name}[{key!r}]: {first.dtype} entries are not averaged and must be equal in all "
                    "models; this one differs (leave the key out, or make them equal)"
                )


def as_given(kind: str, keys: list, whole: dict, results: Sequence[Tensor]) -> Any:
    """Results in the container that the models came in; `whole` gives the order of a dict that has other entries."""
    if kind == "tensor":
        return results[0]
    if kind == "list":
        return list(results)
    found = dict(zip(keys, results))
    if not whole:
        return found
    return {key: found[key] if t is None else t.clone() for key, t in whole.items()}


def model_list(name: str, models: Any) -> list:
    """At least one model, modules as state dicts."""
    if isinstance(models, Tensor | str | dict | torch.nn.Module) or not isinstance(
        models, Sequence
    ):
        raise TypeError(
            f"{name}: expected a list of K tensors, lists, state dicts or modules, got "
            f"{type(models).__name__}"
        )
    if not models:
        raise ValueError(f"{name}: expected at least one model, got none (K = 0)")
    return [weights_of(m) for m in models]
