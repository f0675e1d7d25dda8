"""TabM besides its network: the mini form's scales, the training loss, folding for inference.

Source: Gorishniy, Kotelnikov, Babenko, "TabM: Advancing Tabular Deep Learning with Parameter-Efficient
Ensembling", ICLR 2025.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import _check
from ._members import check_bias

LOSSES = ("cross_entropy", "binary_cross_entropy", "mse", "l1")
_FUNCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": F.cross_entropy,
    "binary_cross_entropy": F.binary_cross_entropy_with_logits,
    "mse": F.mse_loss,
    "l1": F.l1_loss,
}


def scale_ensemble(x: Tensor, r: Tensor, bias: Tensor | None = None) -> Tensor:
    r"""K views of one input that differ by a scale: $y_{bk} = r_k \odot x_b + c_k$, all of TabM-mini's own parameters.

    Args:
        x: (B, I), shared by the members, or (B, K, I).
        r: (K, I).
        bias: (K, I) or None.

    Shapes: x (B, I) or (B, K, I) -> (B, K, I).

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit.

    Source: Gorishniy et al., "TabM", ICLR 2025. A composition; before a linear layer give r to `tabm_mlp` or
    `batch_ensemble_linear` instead, which never write the scaled input.
    """
    x = _check.tensor("x", x)
    _check.tensor("r", r, dim=2)
    if x.dim() not in (2, 3):
        raise ValueError(f"x: expected shape (B, I) or (B, K, I), got {tuple(x.shape)}")
    members = r.shape[0] if x.dim() == 2 else x.shape[1]
    _check.like("r", r, (members, x.shape[-1]), x)
    x = x.unsqueeze(1) if x.dim() == 2 else x
    if bias is None:
        return (x * r).to(x.dtype)
    _check.like("bias", bias, (members, x.shape[-1]), x)
    return torch.addcmul(bias, r, x).to(x.dtype)


def member_mean_loss(
    prediction: Tensor,
    target: Tensor,
    loss: str | Callable[[Tensor, Tensor], Tensor] = "cross_entropy",
) -> Tensor:
    r"""TabM's training loss $\frac{1}{BK}\sum_{bk} \ell(y_{bk}, t_b)$: the members' own losses, not that of their mean.

    Args:
        prediction: (B, K, C), or (B, K) for one output a member.
        target: (B,) classes for "cross_entropy"; values (B,) or (B, C) for the others. With another batch for
            each member (B, K) or (B, K, C).
        loss: "cross_entropy", "binary_cross_entropy" (of logits), "mse", "l1", or a function of
            (B K, .) predictions and targets that returns their mean.

    Shapes: prediction (B, K, C) or (B, K) -> ().

    Raises:
        ValueError: an unknown loss, or shapes that do not fit.

    Source: Gorishniy et al., "TabM", ICLR 2025. A composition.
    """
    prediction = _check.tensor("prediction", prediction)
    if prediction.dim() not in (2, 3):
        raise ValueError(
            f"prediction: expected shape (B, K, C) or (B, K), got {tuple(prediction.shape)}"
        )
    if isinstance(loss, str):
        _check.choice("loss", loss, LOSSES)
    batch, members = prediction.shape[:2]
    if not isinstance(target, Tensor):
        raise TypeError(f"target: expected a torch.Tensor, got {type(target).__name__}")
    _check.same_device("target", target, prediction, "prediction")
    classes = loss == "cross_entropy"
    if classes and prediction.dim() == 2:
        raise ValueError(
            f"prediction: expected shape (B, K, C) with cross_entropy, got {tuple(prediction.shape)}"
        )
    if classes and (target.is_floating_point() or target.is_complex()):
        raise TypeError(f"target: expected class numbers with cross_entropy, got {target.dtype}")
    single = (batch,) if classes else (batch, *prediction.shape[2:])
    each = (batch, members, *single[1:])
    if tuple(target.shape) == single or (
        tuple(target.shape) == (batch,) and prediction.numel() == batch * members
    ):
        target = target.unsqueeze(1).expand(-1, members, *target.shape[1:])
    elif tuple(target.shape) != each:
        raise ValueError(
            f"target: expected shape {single}, or {each} for a batch of each member's own, to go with "
            f"prediction of shape {tuple(prediction.shape)}, got {tuple(target.shape)}"
        )
    function = _FUNCTIONS[loss] if isinstance(loss, str) else loss
    flat = target.flatten(0, 1)
    rows = prediction.flatten(0, 1)
    return function(
        rows,
        flat if classes or not isinstance(loss, str) else flat.reshape(rows.shape).to(rows.dtype),
    )


def fold_for_inference(
    layers: Sequence[Sequence[Tensor | None]], *, members: int | None = None
) -> list[tuple[Tensor, Tensor | None]]:
    r"""The layers of `tabm_mlp` with the scales multiplied in: $W_k^\top = r_k \odot W^\top \odot s_k$, one a member.

    The result takes K times the memory, and each member may then be cut out as a plain network. It pays where
    few items meet many members and the scales' passes cost more than reading K weights; for whole batches the
    shared weight is faster.

    Args:
        layers: (weight (O, I), r (K, I) or None, s (K, O) or None, bias (K, O), (O,) or None) of each layer.
        members: K, needed only where no layer has anything of a member's own.

    Shapes: -> for each layer (weight (K, I, O), bias (K, O) or None), as `ensemble_linear` takes them.

    Raises:
        ValueError, TypeError: no layers, nothing that tells K, or a layer whose parts do not fit.

    Source: derived from the layer's formula; a composition.
    """
    if not isinstance(layers, (list, tuple)) or not layers:
        raise ValueError("layers: expected a list of at least one (weight, r, s, bias)")
    for i, layer in enumerate(layers):
        if not isinstance(layer, (list, tuple)) or len(layer) != 4:
            raise ValueError(
                f"layers[{i}]: expected (weight, r, s, bias), None for what is left out"
            )
    own = [t for layer in layers for t in layer[1:] if isinstance(t, Tensor) and t.dim() == 2]
    if members is None and not own:
        raise ValueError("members: expected the number of members, as no layer tells it; got None")
    count = own[0].shape[0] if members is None else members
    folded: list[tuple[Tensor, Tensor | None]] = []
    with torch.no_grad():
        for i, (weight, r, s, bias) in enumerate(layers):
            weight = _check.tensor(f"layers[{i}] weight", weight, dim=2)
            for name, t, width in (("r", r, weight.shape[1]), ("s", s, weight.shape[0])):
                if t is not None:
                    _check.like(f"layers[{i}] {name}", t, (count, width), weight, "weight")
            if bias is not None:
                check_bias(bias, count, weight.shape[0], weight, f"layers[{i}] bias", "weight")
            w = weight.T.unsqueeze(0)  # (1, I, O)
            if r is not None:
                w = w * r.unsqueeze(2)
            if s is not None:
                w = w * s.unsqueeze(1)
            w = w.expand(count, -1, -1).contiguous()
            if bias is not None:
                bias = bias.expand(count, -1).contiguous()
            folded.append((w, bias))
    return folded
