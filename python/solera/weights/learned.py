"""A soup with trainable coefficients: learned soups and AdaMerging, over core `lincomb`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .. import _check
from . import _models
from .averages import combined


class Soup(nn.Module):
    r"""A module whose weights are a combination of K models, with coefficients to be trained.

    $\theta_l = \sum_k c_{kl}\,\theta_{kl}$, or around a base $\theta_{0l} + \sum_k c_{kl}(\theta_{kl} - \theta_{0l})$,
    in one pass a forward call; backward takes all $\mathrm d c_{kl} = \langle G_l, \theta_{kl} - \theta_{0l}\rangle$
    in one pass. The models are frozen: nothing but the merged weights exists beside them.

    Args:
        module: the architecture; its own weights are neither used nor trained. Held by reference: `to`, `train` and
            `eval` pass on to it. Its hooks run, its buffers outside the state dict are its own.
        models: K modules or state dicts with its parameters (and buffers). Held by reference, moved by `to`.
        granularity: "tensor", coefficients (K, L) by parameter (learned soups, layer-wise AdaMerging); or "model",
            (K,).
        softmax: coefficients are a softmax over the K models of what is trained (learned soups).
        base: one more model, the pretrained one (AdaMerging).
        init: what the coefficients start at: default 1 / K, around a base 0.3 (AdaMerging). Not with softmax.
        logit_scale: train a factor on the module's output, from 1 (learned soups).

    Parameters: `coefficients` (K, L) or (K,), before the softmax; `logit_scale` (). Only they are in `parameters()` and
    in the state dict.

    Shapes: as the module's. With K models of L parameters the coefficients are (K, L) or (K,).

    Floating-point buffers (running statistics) are combined with the mean coefficient of a model over its tensors,
    without gradient, and what training mode writes to them is dropped; other buffers are copied from the first model.

    Source: Wortsman et al., "Model soups", 2022, and its public code (softmax, logit temperature); Yang et al.,
    "AdaMerging: Adaptive Model Merging for Multi-Task Learning", 2023.
    """

    coefficients: nn.Parameter
    logit_scale: nn.Parameter | None

    def __init__(
        self,
        module: nn.Module,
        models: Sequence[nn.Module | dict[str, Tensor]],
        *,
        granularity: str = "tensor",
        softmax: bool = False,
        base: nn.Module | dict[str, Tensor] | None = None,
        init: float | None = None,
        logit_scale: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(module, nn.Module):
            raise TypeError(f"module: expected a torch.nn.Module, got {type(module).__name__}")
        _check.choice("granularity", granularity, ("tensor", "model"))
        states = _models.model_list("models", models)
        count = len(states)
        names = [f"models[{k}]" for k in range(count)]
        if base is not None:
            states, names = [*states, _models.weights_of(base)], [*names, "base"]
        for name, state in zip(names, states):
            if not isinstance(state, dict):
                raise TypeError(
                    f"{name}: expected a module or a state dict, got {type(state).__name__}"
                )
        kept = module.state_dict()
        self._keys = [key for key, _ in module.named_parameters()]
        # Tied parameters: the name of every other place that holds one, and its key. A module that occurs twice is
        # one place (functional_call's own tying would put back the wrong tensor there).
        first = {id(p): key for key, p in module.named_parameters()}
        self._tied = {}
        for prefix, part in module.named_modules():
            for name, p in part._parameters.items():
                place = f"{prefix}.{name}" if prefix else name
                if p is not None and place != first[id(p)]:
                    self._tied[place] = first[id(p)]
        buffers = [key for key, _ in module.named_buffers() if key in kept]
        if not self._keys:
            raise ValueError("module: expected at least one parameter, got none")
        for name, state in zip(names, states):
            missing = [key for key in (*self._keys, *buffers) if key not in state]
            if missing:
                raise ValueError(f"{name}: the module's {missing} are missing")
        self._float_buffers = [b for b in buffers if kept[b].is_floating_point()]
        whole = [b for b in buffers if b not in self._float_buffers]
        self._lists = [[state[key].detach() for key in self._keys] for state in states]
        self._buffers_of = [[s[key].detach() for key in self._float_buffers] for s in states]
        self._whole = {key: states[0][key] for key in whole}
        self._around = base is not None
        self._held = (
            module,
        )  # in a tuple: no submodule, so that its weights are nobody's parameters
        _models.gather(self._lists, names)
        if self._float_buffers:
            _models.gather(self._buffers_of, names)
        shape = (count, len(self._keys)) if granularity == "tensor" else (count,)
        self.softmax = softmax
        if softmax and init is not None:
            raise ValueError("init: has no meaning with softmax, which starts at equal shares")
        start = 0.0 if softmax else (0.3 if self._around else 1.0 / count) if init is None else init
        start = _check.number("init", start)
        like = self._lists[0][0]
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        self.coefficients = nn.Parameter(torch.full(shape, start, dtype=dtype, device=like.device))
        one = torch.ones((), dtype=dtype, device=like.device)
        self.logit_scale = nn.Parameter(one) if logit_scale else None

    @property
    def module(self) -> nn.Module:
        """The architecture the soup runs in."""
        return self._held[0]

    def weights(self) -> Tensor:
        """The coefficients that multiply the models: (K, L) or (K,)."""
        return self.coefficients.softmax(0) if self.softmax else self.coefficients

    def _merged(self) -> dict[str, Tensor]:
        """Parameters with their gradient to the coefficients, buffers without."""
        c = self.weights()
        models = self._lists
        around = models[-1] if self._around else None
        count = c.shape[0]
        names = [*(f"models[{k}]" for k in range(count)), "base"]
        out = dict(zip(self._keys, combined("coefficients", models[:count], names, c, around)[3]))
        if self._float_buffers:
            shares = c.detach() if c.dim() == 1 else c.detach().mean(1)
            around = self._buffers_of[-1] if self._around else None
            found = combined("coefficients", self._buffers_of[:count], names, shares, around)[3]
            out.update(zip(self._float_buffers, found))
        out.update({key: t.clone() for key, t in self._whole.items()})
        return out

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        merged = self._merged()
        merged.update({place: merged[key] for place, key in self._tied.items()})
        out = functional_call(self.module, merged, args, kwargs, tie_weights=False)
        if self.logit_scale is None:
            return out
        if not isinstance(out, Tensor):
            raise TypeError(
                f"logit_scale: expected a module that returns a tensor, got {type(out).__name__}"
            )
        return out * self.logit_scale.to(out.dtype)

    def merged(self) -> dict[str, Tensor]:
        """The state dict of the soup as it is, for `module.load_state_dict`."""
        with torch.no_grad():
            found = self._merged()
        tied = {id(t): found[key] for key, t in self.module.named_parameters()}
        state = self.module.state_dict(keep_vars=True)
        return {key: found[key] if key in found else tied.get(id(t), t) for key, t in state.items()}

    def train(self, mode: bool = True) -> Soup:
        self.module.train(mode)
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> Soup:
        self.module._apply(fn)
        self._lists = [[fn(t) for t in model] for model in self._lists]
        self._buffers_of = [[fn(t) for t in model] for model in self._buffers_of]
        self._whole = {key: fn(t) for key, t in self._whole.items()}
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        count = self.coefficients.shape[0]
        return f"{count} models, softmax={self.softmax}, base={self._around}"
