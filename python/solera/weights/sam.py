"""SAM as a torch user has it: an optimizer that takes its step at the worst point nearby."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _check
from .perturb import sam_perturb_, sam_restore_


class SAM:
    r"""Sharpness-aware minimisation around an optimizer: its step with the gradient at $w + \rho\, g / \lVert g\rVert$.

    >>> sam = SAM(torch.optim.AdamW(model.parameters()), rho=0.05)
    >>> def closure():
    ...     sam.zero_grad()
    ...     loss = loss_of(model(x), y)
    ...     loss.backward()
    ...     return loss
    >>> sam.step(closure)

    or by hand: backward, `perturb()`, `zero_grad()`, backward again, `step()`. Learning rate schedulers and state dicts
    are the optimizer's own. The old weights are kept in buffers made at the first step and restored bit for bit.

    Args:
        optimizer: any torch optimizer.
        rho, adaptive, eta, eps, swap: of `sam_perturb_`; the norm is that of all parameter groups together.

    Shapes: parameters of any shape, float32, float64, bfloat16, float16; DTensors.

    Raises:
        ValueError, TypeError: naming the argument. RuntimeError: two perturbations without a step between.

    Source: Foret et al., "Sharpness-Aware Minimization for Efficiently Improving Generalization", 2021.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        rho: float = 0.05,
        *,
        adaptive: bool = False,
        eta: float = 0.0,
        eps: float = 1e-12,
        swap: bool = False,
    ) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(
                f"optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__}"
            )
        self.optimizer = optimizer
        self.rho = _check.number("rho", rho, low=0.0)
        self.adaptive, self.swap = adaptive, swap
        self.eta = _check.number("eta", eta, low=0.0)
        self.eps = _check.number("eps", eps, low=0.0)
        self._backup: dict[Tensor, Tensor] = {}
        self._moved: list[Tensor] = []

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's."""
        return self.optimizer.param_groups

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The optimizer's."""
        self.optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's: between steps nothing else is kept."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The optimizer's."""
        self.optimizer.load_state_dict(state_dict)

    def perturb(self) -> Tensor:
        """Climb, with the gradients that are there; returns their norm, () on the device."""
        if self._moved:
            raise RuntimeError("SAM: the weights are already perturbed; step() restores them")
        live = [p for g in self.param_groups for p in g["params"] if p.grad is not None]
        for p in live:
            if p not in self._backup:
                self._backup[p] = torch.empty_like(p, requires_grad=False)
        norm = sam_perturb_(
            live, None, self.rho, adaptive=self.adaptive, eta=self.eta, eps=self.eps,
            backup=[self._backup[p] for p in live], swap=self.swap,
        )  # fmt: skip
        self._moved = live
        return norm

    def restore(self) -> None:
        """Back to the weights before `perturb`, bit for bit."""
        if self._moved:
            kept = [self._backup[p] for p in self._moved]
            sam_restore_(self._moved, backup=kept, swap=self.swap)
            self._moved = []

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Restore and take the optimizer's step; with a closure (zero_grad, forward, backward), all of it.

        Returns the first loss, that at the weights themselves.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
            self.perturb()
            with torch.enable_grad():
                closure()
        self.restore()
        self.optimizer.step()
        return loss
