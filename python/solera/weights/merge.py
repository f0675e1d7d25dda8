"""Models in memory, or read into it, merged tensor by tensor with one method or several."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import _plan
from ._checkpoint import Checkpoint, Located, memory_of, open_checkpoint
from ._rules import Rules, checked_rules, unused
from .merge_files import check_seed, checked_dtype
from .methods import Method


def merge(
    models: Sequence[Any],
    method: Method,
    *,
    base: Any = None,
    rules: Rules = (),
    strict: bool = True,
    device: str | torch.device | None = None,
    out_dtype: torch.dtype | str | None = None,
    seed: int = 0,
) -> Any:
    """Merge K modules, state dicts or checkpoints on disk, tensor by tensor.

    Args:
        models: K modules, state dicts, or paths as for `merge_files`; also mixed.
        method: one of `solera.weights.methods`, such as Linear() or Ties(density=0.2).
        base: the model that task vectors are taken from; like one of the models.
        rules: (pattern, method) pairs; the first pattern that matches a tensor's whole name decides, else
            `method`. A pattern is a glob, or a regular expression after "re:". One that matches no tensor's name
            is warned of.
        strict: True: all models hold the same tensors in the same shapes, or an error names what differs.
            False: a tensor that a model lacks or has in another shape is copied from the base (from the first
            model if there is none), as are integer tensors; what only others have is left out.
        device: where the arithmetic runs and the result lies; default: each tensor's own (of the first model).
        out_dtype: dtype of the floating-point results, or its name; default: the promoted dtype of what each is
            made of.
        seed: of random methods. A mask depends on the seed, the tensor's name and the model's place.

    Returns a module where the first model is one (a copy of the base, or of the first model, that holds the
    merged weights), else a state dict. Names that share one tensor in all models, and have one method, share one
    in the result.

    Shapes: any; each result has the shape of its inputs. Results from state dicts carry gradients where the method
    does; see the functions of `solera.weights`.

    Raises:
        ValueError, TypeError: naming the tensor or argument, as for `merge_files`.
    """
    if isinstance(models, str | os.PathLike | Mapping | Tensor) or not isinstance(models, Sequence):
        raise TypeError(f"models: expected a list of models, got {type(models).__name__}")
    if not models:
        raise ValueError("models: expected at least one, got none (K = 0)")
    if not isinstance(method, Method):
        raise TypeError(f"method: expected one such as Linear() or Ties(0.2), got {method!r}")
    check_seed(seed)
    opened = [_opened(f"models[{k}]", model) for k, model in enumerate(models)]
    around = None if base is None else _opened("base", base)
    labels = [f"models[{k}]" for k in range(len(models))]
    dtype = checked_dtype(out_dtype)
    pairs = checked_rules(rules)
    items, _ = _plan.make_items(opened, labels, around, method, pairs, strict, dtype)
    like = opened[0] if around is None else around
    for text in unused(like.tensors, pairs):
        warnings.warn(
            f"rules: {text!r} matches the whole name of no tensor", UserWarning, stacklevel=2
        )
    where = None if device is None else torch.device(device)
    result: dict[str, Tensor] = {}
    for item in items:
        result[item.name] = result[item.twin] if item.twin else _merged(item, where, seed)
    if not isinstance(models[0], torch.nn.Module):
        return result
    pattern, own, label = models[0], opened[0], "models[0]"
    if around is not None and isinstance(base, torch.nn.Module):
        pattern, own, label = base, around, "base"
    apart = [pair for pair in own.tied.items() if result.get(pair[0]) is not result.get(pair[1])]
    if apart:
        names = ", ".join(f"{gone!r} and {kept!r}" for gone, kept in apart)
        raise ValueError(
            f"models: {names} are one tensor in {label}, but not in all models or not by one method, so that a "
            "module with one tensor cannot hold the result; give state dicts, or one rule for both"
        )
    return _module(pattern, result, dtype, where)


def _opened(name: str, model: Any) -> Checkpoint:
    if isinstance(model, str | os.PathLike):
        return open_checkpoint(model, name)
    if isinstance(model, torch.nn.Module):
        model = model.state_dict(keep_vars=False)
    if not isinstance(model, Mapping):
        raise TypeError(
            f"{name}: expected a module, a state dict or a path, got {type(model).__name__}"
        )
    found = Checkpoint(Path(name), on_disk=False)
    seen: dict[tuple, str] = {}
    for key, t in model.items():
        if not isinstance(t, Tensor) or t.layout is not torch.strided:
            raise TypeError(f"{name}[{key!r}]: expected a dense tensor, got {type(t).__name__}")
        found.tensors[key] = Located(t.dtype, tuple(t.shape), Path(name), 0, t.nbytes, t)
        if t.nbytes and not t.is_meta:
            same = memory_of(t)
            if seen.setdefault(same, key) != key:
                found.tied[key] = seen[same]
    return found


def _merged(item: _plan.Item, device: torch.device | None, seed: int) -> Tensor:
    inputs = [source.read() for source in item.inputs]
    where = device or inputs[0].device
    inputs = [t.to(where) for t in inputs]
    split = len(item.sources)
    around = inputs[split] if item.base is not None else None
    result = item.method.merge_tensor(
        item.name, inputs[:split], around, seed=seed, out_dtype=item.dtype
    ).to(item.dtype)
    # A copy is one: changing the result leaves the inputs as they are.
    return result.clone() if any(result.data_ptr() == t.data_ptr() for t in inputs) else result


def _module(pattern: torch.nn.Module, state: dict[str, Tensor], dtype, device) -> torch.nn.Module:
    found = copy.deepcopy(pattern)
    if dtype is not None or device is not None:
        found = found.to(device=device, dtype=dtype)
    with torch.no_grad():
        found.load_state_dict(state)
    return found
