"""Checkpoints on disk merged into one on disk, in a fixed amount of memory.

A plan is made from the headers alone: for every tensor its method, where its K versions lie, and where the
result goes (a safetensors file's offsets are known before its data). Tiles then pass through a ring of memory:
while one is merged, later ones are read and earlier ones written. Everything goes to a folder beside the
target, is flushed, and takes its name in one step.

Bytes: each input once, the output once. The device that holds the files sets the pace, not the arithmetic.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from .._check import FLOATS
from . import _plan, _sweeps
from ._checkpoint import Checkpoint, Path_, open_checkpoint
from ._plan import Plan
from ._progress import Callback, progress_bar
from ._ring import compiled
from ._rules import Rules, checked_rules
from ._safetensors import NAMES
from ._sizes import size_in_bytes
from ._stream import Stream
from ._target import Target
from .methods import Method


def merge_files(
    inputs: Sequence[Path_],
    output: Path_,
    method: Method,
    *,
    base: Path_ | None = None,
    rules: Rules = (),
    strict: bool = True,
    out_dtype: torch.dtype | str | None = None,
    seed: int = 0,
    max_memory: int | str = "4GiB",
    readers: int = 2,
    device: str | torch.device = "cpu",
    overwrite: bool = False,
    dry_run: bool = False,
    progress: bool | Callback | None = None,
) -> Plan:
    """Merge checkpoints into a safetensors checkpoint, within `max_memory` whatever their size.

    Args:
        inputs: K models: .safetensors files, folders with such a file or with an index of several, or files of
            torch.save (.bin, .pt, .pth, .ckpt; in the zip format, mapped, loaded with weights_only=True).
        output: a path that ends in .safetensors, or a folder. A folder gets the files of the base (or of the
            first input) by the same names, an index where there are several, and what else lies beside the
            weights: configuration, tokenizer.
        method: one of `solera.weights.methods`: Linear(), TaskArithmetic(0.5), Slerp(0.3), Ties(density=0.2)...
        base: the model that task vectors are taken from; like an input.
        rules: (pattern, method) pairs; the first pattern that matches a tensor's whole name decides, else
            `method`. A pattern is a glob, or a regular expression after "re:".
        strict: True: all models hold the same tensors in the same shapes, or an error names what differs.
            False: a tensor that a model lacks or has in another shape is copied from the base (from the first
            input if there is none), as are integer tensors; what only others have is left out.
        out_dtype: dtype of the floating-point results, or its name; default: the promoted dtype of what each is
            made of. Sums are taken in float32 (float64 where a dtype is float64) and rounded once.
        seed: of random methods. A mask depends on the seed, the tensor's name and the model's place in `inputs`.
        max_memory: bytes, or text such as "512MB", "4GiB": the most anonymous memory above what the process
            holds already. Tensors merged elementwise (or row by row) pass in tiles. Others need room for all of
            one tensor in every model; where there is none, they are read several times, tile by tile, for the
            same bits: Ties and Breadcrumbs three times (five in float64); Slerp, MultiSlerp, Karcher and
            ModelStock with dim=None and Dare with rescale="l1" twice, these on the CPU with the compiled kernels.
        readers: threads that read.
        device: where the arithmetic runs.
        overwrite: replace an output that exists.
        dry_run: make the plan, write nothing.
        progress: None: a bar if standard error is a terminal; True: that, or else lines; False: nothing; or a
            function called with (bytes done, bytes in all).

    Returns the plan: `print(plan)` shows methods, bytes, tiles, memory, and what is read more than once.

    The output is in `output` only once it is complete and flushed; a run that is killed leaves `.<name>.part`
    beside it, which the next run removes. The data does not depend on max_memory, readers, threads, on the order
    of tensors or shards in the inputs, nor, for methods that treat the models alike (all but Slerp, Copy, Dare
    and Della), on the order in which these are listed.

    Shapes: any; each result has the shape of its inputs.

    Raises:
        ValueError: tensors that are missing, extra, of different shapes or (integers) values; an invalid
            file; a budget too small, with the tensor that needs more; a method that does not fit K models.
        FileNotFoundError, FileExistsError, OSError: with the path.
    """
    models, labels, around = _open(inputs, base)
    target = Target(Path(output), overwrite)
    if target.single is False and Path(output).suffix in (".bin", ".pt", ".pth", ".ckpt"):
        raise ValueError(f"output: expected a name in .safetensors or a folder, got {output}")
    check_seed(seed)
    if type(readers) is not int or readers < 1:
        raise ValueError(f"readers: expected 1 or more, got {readers!r}")
    where = _usable(device)
    plan, index_name = _make_plan(
        models,
        labels,
        around,
        target,
        method,
        rules,
        strict,
        checked_dtype(out_dtype),
        seed,
        max_memory,
        _sweeps.exact(where),
    )
    _refuse_self(plan, target)
    if dry_run:
        return plan
    target.refuse_existing()
    like = models[0] if around is None else around
    total = plan.bytes_read + plan.bytes_written
    sweeps = max(item.sweeps for item in plan.items)
    title = f"merging {len(models)} models" + (f" in up to {sweeps} sweeps" if sweeps > 1 else "")
    with target, progress_bar(progress, total, title) as done:
        layouts = _plan.file_layouts(plan)
        places = target.create(layouts)
        with torch.no_grad(), Stream(plan, places, seed, readers, where) as stream:
            stream.run(done)
        beside = () if target.single else like.beside()
        target.publish(layouts, plan.metadata, beside, index_name)
    return plan


def _open(
    inputs: Sequence[Path_], base: Path_ | None
) -> tuple[list[Checkpoint], list[str], Checkpoint | None]:
    if isinstance(inputs, str | Path) or not isinstance(inputs, Sequence) or not inputs:
        raise ValueError(f"inputs: expected a list of at least one path, got {inputs!r}")
    models = [open_checkpoint(path, f"inputs[{k}]") for k, path in enumerate(inputs)]
    labels = [f"inputs[{k}] ({path})" for k, path in enumerate(inputs)]
    return models, labels, None if base is None else open_checkpoint(base, "base")


def _usable(device: str | torch.device) -> torch.device:
    """The device if tensors can be made on it: known before anything is read or written."""
    try:
        where = torch.device(device)
        torch.empty(0, device=where)
    except (
        RuntimeError,
        TypeError,
        AssertionError,
    ) as error:  # AssertionError: a CUDA that is not there
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"device: {device!r} cannot be used ({reason})") from None
    if where.type == "meta":
        raise ValueError("device: expected one that holds values, got 'meta'")
    return where


def checked_dtype(value: torch.dtype | str | None) -> torch.dtype | None:
    """out_dtype by itself or by name, or an error."""
    found = getattr(torch, value, None) if isinstance(value, str) else value
    if (found is not None and found not in FLOATS) or (isinstance(value, str) and found is None):
        raise ValueError(
            f"out_dtype: expected float32, float64, bfloat16 or float16, got {value!r}"
        )
    return found


def check_seed(seed: object) -> None:
    """What the random methods take, known before they have their turn."""
    if type(seed) is not int:
        raise TypeError(f"seed: expected an int, got {seed!r}")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed: expected an int that fits 64 bits, got {seed}")


def _make_plan(
    models, labels, around, target, method, rules, strict, out_dtype, seed, max_memory, exact
) -> tuple[Plan, str]:
    from .. import __version__

    if not isinstance(method, Method):
        raise TypeError(f"method: expected one such as Linear() or Ties(0.2), got {method!r}")
    rules = checked_rules(rules)
    items, notes = _plan.make_items(models, labels, around, method, rules, strict, out_dtype)
    if not items:
        raise ValueError("inputs: the models hold no tensors")
    for item in items:
        if item.dtype not in NAMES:
            raise ValueError(
                f"inputs: {item.name!r} is of {item.dtype}, which safetensors has no name for"
            )
    like = models[0] if around is None else around
    single = target.output.name if target.single else None
    files, index_name = _plan.make_files(items, like, single)
    metadata = {
        **like.metadata,
        "format": "pt",  # what transformers asks for
        "solera.version": __version__,
        "solera.method": repr(method),
        "solera.rules": json.dumps([[pattern, repr(special)] for pattern, special in rules]),
        "solera.inputs": json.dumps([model.path.name for model in models]),
        "solera.base": "" if around is None else around.path.name,
        "solera.seed": str(seed),
    }
    written = {item.name for item in items}
    metadata.update({gone: kept for gone, kept in like.tied.items() if gone not in written})
    plan = Plan(
        output=target.output,
        inputs=[model.path for model in models],
        base=None if around is None else around.path,
        items=items,
        files=files,
        metadata=metadata,
        budget=size_in_bytes(max_memory),
        notes=notes,
        compiled=not isinstance(compiled(), str),
        exact=exact,
    )
    plan.settle_memory()
    return plan, index_name


def _refuse_self(plan: Plan, target: Target) -> None:
    """An output that is one of the inputs, or holds one, is refused before anything is touched."""
    if not target.output.exists():
        return
    place = target.output.resolve()
    for path in (*plan.inputs, *(() if plan.base is None else (plan.base,))):
        source = path.resolve()
        if source == place or place in source.parents:
            raise ValueError(f"output: {target.output} is, or holds, the input {path}")
