"""Stable-SPAM as a torch optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .. import _check
from .grad_step import StableSpamState, stable_spam_step_


class StableSPAM(torch.optim.Optimizer):
    r"""Stable-SPAM: `stable_spam_step_` over parameter groups, one multi-tensor step a group.

    The state of a parameter is `exp_avg`, `exp_avg_sq` and `gradient` (3,), with the counters `step` and
    `since_reset`, so a state_dict loads as any optimizer's does. Parameters that miss a gradient in a step keep
    their own counters.

    Args:
        params: parameters or groups.
        lr, betas, eps, weight_decay: AdamW's.
        gamma1, gamma2, theta: decays of the gradient's norm, squared norm and maximum.
        update_proj_gap: steps between resets of the moments.
        total_T: steps over which betas[0] and gamma1 fall by a cosine to half; None keeps them.

    Shapes: parameters of any shape, float32, float64, bfloat16, float16.

    Source: Huang et al., "Stable-SPAM: How to Train in 4-Bit More Stably than 16-Bit Adam", 2025.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        gamma1: float = 0.7,
        gamma2: float = 0.9,
        theta: float = 0.999,
        total_T: int | None = None,
        update_proj_gap: int = 1000,
    ) -> None:
        _check.number("lr", lr, low=0.0)
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "gamma1": gamma1,
            "gamma2": gamma2, "theta": theta, "total_T": total_T,
            "update_proj_gap": update_proj_gap,
        }  # fmt: skip
        super().__init__(params, defaults)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As every optimizer's, but the gradient's running numbers keep their dtype beside half parameters."""
        super().load_state_dict(state_dict)
        saved = [key for group in state_dict["param_groups"] for key in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for key, p in zip(saved, params):
            if key in state_dict["state"]:
                numbers = state_dict["state"][key]["gradient"]
                self.state[p]["gradient"] = numbers.detach().clone().to(p.device)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of every parameter that has a gradient; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for counters, members in self._by_counters(group["params"]).items():
                self._step(group, counters, members)
        return loss

    def _by_counters(self, params: Iterable[Tensor]) -> dict[tuple, list[Tensor]]:
        """The parameters that have a gradient, by device and by how many steps they have taken."""
        found: dict[tuple, list[Tensor]] = {}
        for p in params:
            if p.grad is None:
                continue
            state = self.state[p]
            if not state:
                kind = torch.float64 if p.dtype == torch.float64 else torch.float32
                state["exp_avg"] = torch.zeros_like(p, requires_grad=False)
                state["exp_avg_sq"] = torch.zeros_like(p, requires_grad=False)
                state["gradient"] = torch.zeros(3, dtype=kind, device=p.device)
                state["step"], state["since_reset"] = 0, 0
            key = (p.device, p.dtype, state["step"], state["since_reset"])
            found.setdefault(key, []).append(p)
        return found

    def _step(self, group: dict[str, Any], counters: tuple, members: list[Tensor]) -> None:
        states = [self.state[p] for p in members]
        grads = [p.grad for p in members if p.grad is not None]
        together = StableSpamState(
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            torch.stack([s["gradient"] for s in states], 1),
            step=counters[2],
            since_reset=counters[3],
        )
        stable_spam_step_(
            members, grads, together, lr=float(group["lr"]), betas=group["betas"], eps=group["eps"],
            weight_decay=group["weight_decay"], gammas=(group["gamma1"], group["gamma2"]),
            theta=group["theta"], reset_every=group["update_proj_gap"],
            cosine_steps=group["total_T"],
        )  # fmt: skip
        for s, column in zip(states, together.gradient.unbind(1)):
            s["gradient"] = column
            s["step"], s["since_reset"] = together.step, together.since_reset
