"""A linear layer whose weights are mixed with an anchor's while it trains."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import _check
from ..weights.reparam import MASKS, pair
from ..weights.reparam_linear import mixout_linear


class MixoutLinear(nn.Linear):
    r"""`torch.nn.Linear` with mixout: in training $y = x\,(U + M\odot(W - U)/(1 - p))^\top + b$ with a fresh mask at
    each call, in eval mode $y = xW^\top + b$.

    Args:
        in_features, out_features, bias, device, dtype: as `torch.nn.Linear`.
        p: probability of the anchor's element, in [0, 1].
        anchor: U (out_features, in_features), copied; None is zeros (DropConnect). It is a buffer outside the
            state_dict, which has torch's keys: a checkpoint of `torch.nn.Linear` loads. After loading pretrained
            weights, `anchor_here()` makes them the anchor.
        mask: "element" or "column".

    Shapes: (..., in_features) -> (..., out_features). The mask is not stored; seeds are drawn from torch's generator.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Lee, Cho, Kang, "Mixout: Effective Regularization to Finetune Large-scale Pretrained Language Models",
    2020; see `solera.weights.mixout_linear`.
    """

    anchor: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        p: float = 0.9,
        *,
        anchor: Tensor | None = None,
        mask: str = "element",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self._set(p, anchor, mask)

    def _set(self, p: float, anchor: Tensor | None, mask: str) -> None:
        self.p = _check.number("p", p, low=0.0, high=1.0)
        _check.choice("mask", mask, MASKS)
        self.mask = mask
        if anchor is not None:
            anchor = pair("anchor", anchor, self.weight).detach().clone()
        self.register_buffer("anchor", anchor, persistent=False)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        p: float = 0.9,
        *,
        anchor: Tensor | None = None,
        mask: str = "element",
    ) -> MixoutLinear:
        """A layer that shares linear's parameters; its anchor is a copy of the weight as it is now, or `anchor`."""
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear: expected a torch.nn.Linear, got {type(linear).__name__}")
        made = cls(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        made.weight, made.bias = linear.weight, linear.bias
        made._set(p, linear.weight if anchor is None else anchor, mask)
        return made.train(linear.training)

    def anchor_here(self) -> None:
        """Makes the weight as it is now the anchor."""
        self.anchor = self.weight.detach().clone()

    def forward(self, input: Tensor) -> Tensor:
        return mixout_linear(
            input, self.weight, self.anchor, self.p, None, self.bias, mask=self.mask,
            training=self.training,
        )  # fmt: skip

    def extra_repr(self) -> str:
        anchor = "zeros" if self.anchor is None else "given"
        return f"{super().extra_repr()}, p={self.p}, mask={self.mask!r}, anchor={anchor}"
