"""Many modules of one architecture as one set of stacked parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Names = list[tuple[str, str | None]]

# What an element-wise module does between two layers: a name the kernels know, or a function.
_NAMED = {nn.ReLU: "relu", nn.SiLU: "silu"}
_PASSED = (nn.Identity, nn.Flatten, nn.Dropout)
_ELEMENTWISE = (
    nn.Tanh,
    nn.Sigmoid,
    nn.ELU,
    nn.SELU,
    nn.CELU,
    nn.LeakyReLU,
    nn.Softplus,
    nn.Softsign,
    nn.Mish,
    nn.Hardtanh,
    nn.ReLU6,
    nn.Hardswish,
    nn.Hardsigmoid,
    nn.LogSigmoid,
    nn.Tanhshrink,
)


class Members(dict[str, Tensor]):
    """Parameters of K modules, stacked: name -> (K, *shape), in the order of `named_parameters()`.

    A dictionary that `torch.func.functional_call` takes under `vmap`, `ensemble_mlp` takes as it is, and whose
    `.values()` an optimiser takes. Besides: `buffers`, the stacked buffers; `layers`, the names (weight, bias)
    of the linear layers and `activations`, what follows each, if the modules are perceptrons; `base`, a copy
    of the architecture without memory.
    """

    buffers: dict[str, Tensor]
    base: nn.Module
    layers: Names
    activations: list[str | Callable[[Tensor], Tensor] | None]

    @property
    def count(self) -> int:
        """K."""
        return next(iter(self.values())).shape[0]

    def vmap(self, x: Tensor) -> Tensor:
        """Every member's output, for any architecture: x shared by the members -> (B, K, ...).

        This is `torch.vmap` over `torch.func.functional_call`; `ensemble_mlp(x, members)` is faster where it
        applies. Random modules draw differently for each member.
        """

        def call(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
            return torch.func.functional_call(self.base, (parameters, buffers), (x,))

        return torch.vmap(call, out_dims=1, randomness="different")(dict(self), self.buffers)

    def copy_to(self, modules: Sequence[nn.Module]) -> None:
        """Write the members' parameters and buffers into K modules of the same architecture."""
        if len(modules) != self.count:
            raise ValueError(f"modules: expected {self.count}, got {len(modules)}")
        with torch.no_grad():
            for k, module in enumerate(modules):
                state = module.state_dict(keep_vars=True)
                for name, stacked in (*self.items(), *self.buffers.items()):
                    state[name].copy_(stacked[k])


def layer_names(params: Mapping[str, Tensor]) -> Names:
    """The (weight, bias) names of stacked linear layers in order; empty if there is anything else."""
    names: Names = []
    for name, value in params.items():
        if not isinstance(value, Tensor):
            return []
        stem, _, kind = name.rpartition(".")
        if kind == "weight" and value.dim() == 3:
            bias = f"{stem}.bias" if stem else "bias"
            names.append((name, bias if bias in params else None))
    known = {n for pair in names for n in pair}
    return names if known >= set(params) else []


def _pieces(module: nn.Module, prefix: str = "") -> list[tuple[str, nn.Module]] | None:
    """The modules a Sequential runs one after another, nested ones opened."""
    if isinstance(module, nn.Sequential):
        found: list[tuple[str, nn.Module]] = []
        for name, child in module.named_children():
            inner = _pieces(child, f"{prefix}{name}.")
            if inner is None:
                return None
            found += inner
        return found
    return [(prefix, module)]


def _perceptron(module: nn.Module) -> tuple[Names, list]:
    """Names and activations of the layers, if the module is linear layers and elementwise functions."""
    pieces = _pieces(module) or []
    names: Names = []
    activations: list = []
    for prefix, piece in pieces:
        if type(piece) is nn.Linear:
            names.append((f"{prefix}weight", f"{prefix}bias" if piece.bias is not None else None))
            activations.append(None)
        elif isinstance(piece, _PASSED):
            if isinstance(piece, nn.Dropout) and piece.training and piece.p > 0:
                return [], []
            if isinstance(piece, nn.Flatten) and names:
                return [], []
        elif not activations or activations[-1] is not None:
            return [], []
        elif isinstance(piece, nn.GELU):
            tanh = piece.approximate == "tanh"
            activations[-1] = partial(F.gelu, approximate="tanh") if tanh else "gelu"
        elif type(piece) in _NAMED:
            activations[-1] = _NAMED[type(piece)]
        elif isinstance(piece, _ELEMENTWISE):
            activations[-1] = _functional(piece)
        else:
            return [], []
    return names, activations


def _functional(piece: nn.Module) -> Callable[[Tensor], Tensor]:
    """The module's function, never writing into its input."""
    piece = copy.deepcopy(piece)
    if hasattr(piece, "inplace"):
        setattr(piece, "inplace", False)  # noqa: B010
    return piece


def stack_members(modules: Sequence[nn.Module]) -> Members:
    r"""The parameters of K modules of one architecture as one dictionary of tensors (K, *shape).

    The stacked tensors are new leaves with the `requires_grad` of the first module's parameters; the modules
    themselves are not changed and share no memory with them. `Members.copy_to(modules)` goes back.

    Args:
        modules: K modules with the same parameter names, shapes, dtypes and devices. For a `Sequential` (also a
            nested one) of `Linear` and element-wise activations, the result knows its layers, and
            `ensemble_mlp(x, members)` runs them; everything else runs by `members.vmap(x)`. Dropout counts as
            nothing in evaluation, and is left to `vmap` in training.

    Shapes: parameters (*shape) of K modules -> (K, *shape).

    Raises:
        ValueError: no module, or modules that differ in names, shapes, dtypes or devices.
        TypeError: not a sequence of modules.

    Source: `torch.func.stack_module_state`, whose dictionary this is.
    """
    if isinstance(modules, nn.Module) and not isinstance(modules, nn.ModuleList):
        raise TypeError(f"modules: expected a list of modules, got {type(modules).__name__}")
    modules = list(modules)
    if not modules:
        raise ValueError("modules: expected at least one module, got none")
    for i, module in enumerate(modules):
        if not isinstance(module, nn.Module):
            raise TypeError(
                f"modules[{i}]: expected a torch.nn.Module, got {type(module).__name__}"
            )
    members = Members(_stack([dict(m.named_parameters()) for m in modules], "parameter", True))
    members.buffers = _stack([dict(m.named_buffers()) for m in modules], "buffer", False)
    if not members:
        raise ValueError("modules: expected modules with parameters, got none")
    members.base = copy.deepcopy(modules[0]).to("meta")
    members.layers, members.activations = _perceptron(modules[0])
    if any(repr(m) != repr(modules[0]) for m in modules):
        raise ValueError("modules: expected one architecture, got modules that print differently")
    return members


def _stack(states: list[dict[str, Tensor]], kind: str, learn: bool) -> dict[str, Tensor]:
    first = states[0]
    for i, state in enumerate(states):
        if list(state) != list(first):
            raise ValueError(f"modules[{i}]: expected the {kind}s {list(first)}, got {list(state)}")
        for name, value in state.items():
            other = first[name]
            if (value.shape, value.dtype, value.device) != (
                other.shape,
                other.dtype,
                other.device,
            ):
                raise ValueError(
                    f"modules[{i}]: expected {kind} {name} of shape {tuple(other.shape)}, {other.dtype} "
                    f"on {other.device}, got {tuple(value.shape)}, {value.dtype} on {value.device}"
                )
    stacked = {}
    for name, value in first.items():
        t = torch.stack([state[name].detach() for state in states])
        stacked[name] = t.requires_grad_(value.requires_grad) if learn else t
    return stacked
