"""The command `solera merge`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection
from typing import Any

DESCRIPTION = """\
Merge checkpoints: safetensors files, folders with an index, or files of torch.save (.bin, .pt), into one
safetensors checkpoint, within a fixed amount of memory whatever their size."""

EPILOG = """\
methods, with their arguments (SPEC is a name, or name(argument=value, ...)):
  linear(weights=None, normalize=True)          weighted mean
  task_arithmetic(weights)                      base + sum of weighted task vectors        needs --base
  slerp(t=0.5, dim=None, colinear=0.9995)       spherical, between two models
  multi_slerp(weights=None), karcher(...)       spherical means of several models
  model_stock(dim=None)                         mean, drawn to the base by the angle       needs --base
  ties(density=0.2, weights=None, ...)          trim, elect sign, mean of those that agree needs --base
  dare(density=0.5, weights=None, ...)          task vectors dropped at random, rescaled   needs --base
  breadcrumbs(density=0.9, gamma=0.01, ...)     without the largest and the smallest       needs --base
  della(density=0.5, epsilon=0.1, ...)          dropped at random by magnitude             needs --base
  copy(index=0), base                           one model's tensor as it is; the base's

rules: PATTERN=SPEC, the first that matches a tensor's whole name decides. PATTERN is a glob (* is any text, dots
  too) or, after "re:", a regular expression.

examples:
  solera merge a.safetensors b.safetensors -o soup.safetensors
  solera merge ./tuned-a ./tuned-b -o ./merged --method ties --density 0.2 --base ./base
  solera merge ./a ./b -o ./c --method slerp --t 0.3 --rule '*.norm.*=linear' --rule 'lm_head.*=copy(index=1)'
  solera merge ./a ./b -o ./c --method linear --weights 0.7 0.3 --max-memory 512MB --dry-run"""


def add_parser(commands: Any) -> None:
    """Add `merge` to the commands of the console script."""
    parser = commands.add_parser(
        "merge",
        help="merge checkpoints on disk, larger than memory or not",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("inputs", nargs="+", metavar="MODEL", help="a .safetensors, .bin or .pt file, or a folder")
    add("-o", "--output", required=True, metavar="PATH", help="*.safetensors, or a folder")
    add("--method", default="linear", metavar="SPEC", help="see below (default: linear)")
    add("--base", metavar="MODEL", help="the model that task vectors are taken from")
    add("--weights", type=float, nargs="+", metavar="W", help="of the method: one a model")
    add("--density", type=float, metavar="D", help="of the method: the share that is kept")
    add("--t", type=float, metavar="T", help="of the method: 0 is the first model, 1 the second")
    add("--rule", action="append", default=[], metavar="PATTERN=SPEC", help="see below; repeatable")
    add("--max-memory", default="4GiB", metavar="SIZE", help="such as 512MB or 4GiB (default)")
    add("--out-dtype", metavar="DTYPE", help="float32, bfloat16, ... (default: as the inputs)")
    add("--no-strict", dest="strict", action="store_false",
        help="copy what models lack, or have in another shape, from the base or first model")  # fmt: skip
    add("--seed", type=int, default=0, help="of random methods (default: 0)")
    add("--readers", type=int, default=2, metavar="N", help="threads that read (default: 2)")
    add("--device", default="cpu", help="where the arithmetic runs (default: cpu)")
    add("--overwrite", action="store_true", help="replace an output that exists")
    add("--dry-run", action="store_true", help="print the plan, write nothing")
    add("--list", action="store_true", help="with the plan, every tensor and its method")
    add("-q", "--quiet", action="store_true", help="no plan, no progress")
    parser.set_defaults(run=run)


def _methods(arguments: argparse.Namespace):
    from . import _rules

    more: dict[str, Any] = {"density": arguments.density, "t": arguments.t}
    more["weights"] = arguments.weights
    if arguments.weights is not None and len(arguments.weights) == 1 and len(arguments.inputs) > 1:
        more["weights"] = arguments.weights * len(arguments.inputs)
    method = _rules.parse(arguments.method, **more)
    rules = []
    for text in arguments.rule:
        pattern, spec = _split(text, _rules.SPELLED)
        rules.append((pattern, _rules.parse(spec)))
    return method, rules


def _split(rule: str, known: Collection[str]) -> tuple[str, str]:
    """At the first "=" before a method's name: a regular expression may hold others, and so do arguments."""
    for place in (i for i, letter in enumerate(rule) if letter == "=" and i):
        spec = rule[place + 1 :]
        if spec.partition("(")[0].strip().replace("-", "_") in known:
            return rule[:place], spec
    raise ValueError(f"--rule: expected PATTERN=SPEC, SPEC one of {', '.join(known)}; got {rule!r}")


# What errors of merge_files call an argument, and what the command calls it.
_OPTIONS = {
    "overwrite=True": "--overwrite",
    "strict=False": "--no-strict",
    'device="cpu"': "--device cpu",
}


def _spelled(text: str) -> str:
    for argument, option in _OPTIONS.items():
        text = text.replace(argument, option)
    return text


def run(arguments: argparse.Namespace) -> int:
    """`solera merge`; the exit status is 1 for a merge that cannot be made, which stderr explains."""
    from .merge_files import merge_files

    try:
        method, rules = _methods(arguments)
        options: dict[str, Any] = {
            "base": arguments.base, "rules": rules, "strict": arguments.strict, "seed": arguments.seed,
            "out_dtype": arguments.out_dtype, "max_memory": arguments.max_memory,
            "readers": arguments.readers, "device": arguments.device, "overwrite": arguments.overwrite,
        }  # fmt: skip
        where = (arguments.inputs, arguments.output, method)
        if not arguments.quiet:
            plan = merge_files(*where, dry_run=True, **options)
            print(plan)
            if arguments.list:
                print(*("  ".join(row).rstrip() for row in plan.table()), sep="\n")
        if not arguments.dry_run:
            merge_files(*where, progress=False if arguments.quiet else None, **options)
    except (ValueError, TypeError, OSError, RuntimeError, MemoryError) as error:
        print(f"solera merge: {_spelled(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("solera merge: interrupted; nothing was left behind", file=sys.stderr)
        return 130
    return 0
