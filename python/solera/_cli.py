"""The command `solera`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from .weights import _merge_cli

DESCRIPTION = (
    "Fused PyTorch kernels for ensembles, normalization, Sinkhorn and weight interpolation."
)


def _info(arguments: argparse.Namespace) -> int:
    from . import _info

    facts = _info.collect()
    if arguments.json:
        print(json.dumps(facts, indent=2))
    else:
        _info.show(facts)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="solera", description=DESCRIPTION)
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="command")
    info = commands.add_parser(
        "info",
        help="versions, instruction set, live backends, threads, GPU: what a bug report needs",
    )
    info.add_argument("--json", action="store_true", help="as JSON")
    info.set_defaults(run=_info)
    _merge_cli.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The console script `solera`; returns the exit status."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.version:
        from . import __version__

        print(__version__)
        return 0
    if arguments.command is None:
        parser.print_help()
        return 2
    return arguments.run(arguments)


if __name__ == "__main__":
    sys.exit(main())
