"""Swap a model's torch norms for Solera's, in place, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import nn

from . import channel_norm, norm

# Only these exact classes: a subclass may compute something else, and is reported instead.
SWAPS: dict[type[nn.Module], type[nn.Module]] = {
    nn.LayerNorm: norm.LayerNorm,
    nn.RMSNorm: norm.RMSNorm,
    nn.GroupNorm: channel_norm.GroupNorm,
    nn.InstanceNorm1d: channel_norm.InstanceNorm1d,
    nn.InstanceNorm2d: channel_norm.InstanceNorm2d,
    nn.InstanceNorm3d: channel_norm.InstanceNorm3d,
    nn.BatchNorm1d: channel_norm.BatchNorm1d,
    nn.BatchNorm2d: channel_norm.BatchNorm2d,
    nn.BatchNorm3d: channel_norm.BatchNorm3d,
}

Selector = str | type[nn.Module] | Callable[[str, nn.Module], bool]


@dataclass
class Conversion:
    """What `convert` or `revert` did: module names by what happened to them. `print(report)` shows it.

    Shapes: none.
    """

    changed: dict[str, tuple[str, str]] = field(default_factory=dict)  # name -> (from, to)
    kept: dict[str, str] = field(default_factory=dict)  # name -> why a norm was left alone

    def __str__(self) -> str:
        width = max((len(name) for name in (*self.changed, *self.kept)), default=0)
        lines = [f"{len(self.changed)} module(s) changed, {len(self.kept)} norm(s) left"]
        lines += [f"  {name:{width}}  {old} -> {new}" for name, (old, new) in self.changed.items()]
        lines += [f"  {name:{width}}  left: {why}" for name, why in self.kept.items()]
        return "\n".join(lines)


def _full(kind: type) -> str:
    return f"{kind.__module__.split('.')[0]}.nn.{kind.__name__}"


def _selectors(name: str, given: object) -> tuple[Selector, ...]:
    if isinstance(given, str | type) or callable(given):
        given = (given,)
    if not isinstance(given, Iterable):
        raise TypeError(
            f"{name}: expected name patterns, module classes or functions (name, module) -> bool, "
            f"got {type(given).__name__} {given!r}"
        )
    found = tuple(given)
    for item in found:
        if not (isinstance(item, str | type) or callable(item)):
            raise TypeError(
                f"{name}: expected name patterns, module classes or functions (name, module) -> bool, "
                f"got {type(item).__name__} {item!r}"
            )
    return found


def _matches(selectors: tuple[Selector, ...], name: str, module: nn.Module) -> bool:
    for item in selectors:
        if isinstance(item, str):
            if fnmatchcase(name, item):
                return True
        elif isinstance(item, type):
            if isinstance(module, item):
                return True
        elif item(name, module):
            return True
    return False


def _check_model(model: object) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__} {model!r}")
    return model


def convert(
    model: nn.Module,
    include: Selector | Iterable[Selector] = "*",
    exclude: Selector | Iterable[Selector] = (),
) -> Conversion:
    """Make every torch norm of a model compute by Solera's kernels, in place.

    A module keeps its identity: parameters, buffers, hooks, training flag and everybody's reference to it
    stay, only its class becomes the Solera class of the same name, which is a subclass of torch's. The
    state_dict is unchanged, so checkpoints load either way, and `revert` is exact. Convert before
    `torch.compile`, which has already traced what it compiled.

    Args:
        model: swapped in place; may itself be a norm.
        include, exclude: which modules, by their name in `model.named_modules()` (patterns such as
            "encoder.*"), by class, or by a function (name, module) -> bool. exclude wins.

    Shapes: none; outputs and gradients of the model agree within eager's own rounding error.

    Returns a `Conversion`: what was changed, and which norms were left alone and why.

    Raises:
        TypeError: model is not a module, or a selector is none of the three kinds.
    """
    wanted, unwanted = _selectors("include", include), _selectors("exclude", exclude)
    report = Conversion()
    for name, module in _check_model(model).named_modules():
        kind = type(module)
        if kind not in SWAPS:
            if isinstance(module, tuple(SWAPS)) and kind not in SWAPS.values():
                report.kept[name] = f"{kind.__name__} is a subclass with a forward of its own"
            continue
        if not _matches(wanted, name, module):
            report.kept[name] = "not included"
        elif _matches(unwanted, name, module):
            report.kept[name] = "excluded"
        else:
            module.__class__ = SWAPS[kind]
            report.changed[name] = (_full(kind), _full(SWAPS[kind]))
    return report


def revert(
    model: nn.Module,
    include: Selector | Iterable[Selector] = "*",
    exclude: Selector | Iterable[Selector] = (),
) -> Conversion:
    """Undo `convert`: Solera's norms become torch's again, in place. Selectors as there.

    A norm that uses what torch's class cannot do (an activation, say) is left alone and reported.

    Shapes: none.

    Raises:
        TypeError: model is not a module, or a selector is none of the three kinds.
    """
    wanted, unwanted = _selectors("include", include), _selectors("exclude", exclude)
    back = {ours: theirs for theirs, ours in SWAPS.items()}
    report = Conversion()
    for name, module in _check_model(model).named_modules():
        kind = type(module)
        if kind not in back:
            continue
        if not _matches(wanted, name, module) or _matches(unwanted, name, module):
            report.kept[name] = "excluded"
        elif getattr(module, "activation", None) is not None:
            report.kept[name] = f"its activation {module.activation!r} is not torch's"
        else:
            module.__class__ = back[kind]
            report.changed[name] = (_full(kind), _full(back[kind]))
    return report
