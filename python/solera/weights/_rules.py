"""Which method a tensor gets: rules by name, and methods spelled as text."""

from __future__ import annotations

import ast
import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any

from .methods import (
    Breadcrumbs,
    Copy,
    Dare,
    Della,
    FromBase,
    Karcher,
    Linear,
    Method,
    ModelStock,
    MultiSlerp,
    Slerp,
    TaskArithmetic,
    Ties,
)  # fmt: skip

SPELLED: dict[str, type[Method]] = {
    "linear": Linear, "task_arithmetic": TaskArithmetic, "slerp": Slerp, "multi_slerp": MultiSlerp,
    "karcher": Karcher, "model_stock": ModelStock, "ties": Ties, "dare": Dare,
    "breadcrumbs": Breadcrumbs, "della": Della, "copy": Copy, "base": FromBase,
}  # fmt: skip

Rule = tuple[str, Method]
Rules = Sequence[Rule] | Mapping[str, Method]


def checked_rules(rules: Rules) -> tuple[Rule, ...]:
    """Rules as (pattern, method) pairs, every pattern compiled once so that a wrong one is named here."""
    pairs = list(rules.items()) if isinstance(rules, Mapping) else list(rules)
    for pair in pairs:
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise TypeError(f"rules: expected pairs (pattern, method), got {pair!r}")
        pattern, method = pair
        if not isinstance(pattern, str) or not isinstance(method, Method):
            raise TypeError(
                f"rules: expected a pattern and a method such as Linear(), got {pair!r}"
            )
        _compiled(pattern)
    return tuple((pattern, method) for pattern, method in pairs)


def _compiled(pattern: str) -> re.Pattern[str]:
    regex = pattern[3:] if pattern.startswith("re:") else fnmatch.translate(pattern)
    try:
        return re.compile(regex)
    except re.error as error:
        raise ValueError(f"rules: {pattern!r} is no regular expression ({error})") from None


def chosen(name: str, method: Method, rules: Iterable[Rule]) -> tuple[Method, str | None]:
    """(method, pattern) for a tensor: the first rule whose pattern matches the whole name, else the default.

    A pattern is a glob (`*` any text, dots too; `?`, `[abc]`) or, after `re:`, a regular expression.
    """
    for pattern, special in rules:
        if _compiled(pattern).fullmatch(name):
            return special, pattern
    return method, None


def unused(names: Iterable[str], rules: Iterable[Rule]) -> list[str]:
    """The patterns that match no name at all: more often a slip of the pen than meant."""
    names = list(names)
    return [p for p, _ in rules if not any(_compiled(p).fullmatch(name) for name in names)]


def parse(text: str, **more: Any) -> Method:
    """A method from text: `linear`, `ties(density=0.3)`, `slerp(t=0.2)`. `more` are further arguments."""
    try:
        spelled, bracket, rest = text.strip().partition("(")
        node = ast.parse(spelled.replace("-", "_") + bracket + rest, mode="eval").body
        call = node if isinstance(node, ast.Call) else None
        called = call.func if call else node
        if not isinstance(called, ast.Name) or (call and call.args):
            raise ValueError
        values = {str(k.arg): ast.literal_eval(k.value) for k in (call.keywords if call else ())}
    except (ValueError, SyntaxError):
        raise ValueError(
            f"method: expected name or name(argument=value), text values in quotes, got {text!r}"
        ) from None
    kind = SPELLED.get(called.id)
    if kind is None:
        raise ValueError(f"method: expected one of {', '.join(SPELLED)}, got {called.id!r}")
    known = [f.name for f in fields(kind)]
    values.update({key: value for key, value in more.items() if value is not None})
    for key in values:
        if key not in known:
            takes = f"it takes {', '.join(known)}" if known else "it takes no arguments"
            raise ValueError(f"method: {called.id} has no argument {key!r}; {takes}")
    for f in fields(kind):
        if f.default is MISSING and f.name not in values:
            raise ValueError(f"method: {called.id} needs {f.name}")
    return kind(**values)
