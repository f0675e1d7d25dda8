"""Convolutions of many members in one call. Compositions over torch's convolution."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import _check

Pair = int | tuple[int, int]


def _check_images(x: object) -> Tensor:
    x = _check.tensor("x", x)
    if x.dim() not in (4, 5):
        raise ValueError(
            f"x: expected (B, C, H, W) shared by the members or (B, K, C, H, W), got {tuple(x.shape)}"
        )
    return x


def _check_members(x: Tensor, members: int, name: str) -> None:
    if members == 0:
        raise ValueError(f"{name}: expected at least one member, got none")
    if x.dim() == 5 and x.shape[1] != members:
        raise ValueError(
            f"x: expected {members} members to go with {name}, got {x.shape[1]} "
            f"(x of shape {tuple(x.shape)})"
        )


def batch_ensemble_conv2d(
    x: Tensor,
    weight: Tensor,
    r: Tensor | None = None,
    s: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    stride: Pair = 1,
    padding: Pair | str = 0,
    dilation: Pair = 1,
    groups: int = 1,
) -> Tensor:
    r"""K convolutions that share a weight: $y_{bk} = s_k \odot (W * (r_k \odot x_{bk})) + b_k$.

    A composition: the input's scale, one convolution of B K images, and one pass for s and bias. r, s and bias
    are broadcast, never repeated. Without r a shared x goes through the convolution once for all members.

    Args:
        x: (B, C, H, W), shared by the members, or (B, K, C, H, W).
        weight: (O, C / groups, kh, kw).
        r: (K, C), s: (K, O), the members' scales of input and output channels.
        bias: (K, O), or (O,) shared by the members.
        stride, padding, dilation, groups: as in `torch.nn.functional.conv2d`.

    Shapes: x (B, C, H, W) or (B, K, C, H, W) -> (B, K, O, H', W').

    Raises:
        ValueError, TypeError: naming the argument that does not fit; no argument that tells K.

    Source: Wen, Tran, Ba, "BatchEnsemble", ICLR 2020.
    """
    x = _check_images(x)
    _check.tensor("weight", weight, dim=4)
    _check.like("weight", weight, tuple(weight.shape), x)
    out, channels = weight.shape[0], x.shape[-3]
    if weight.shape[1] * groups != channels:
        raise ValueError(
            f"weight: expected {channels} input channels over groups={groups} to go with x of shape "
            f"{tuple(x.shape)}, got {tuple(weight.shape)}"
        )
    counts = [t.shape[0] for t in (r, s, bias) if isinstance(t, Tensor) and t.dim() == 2]
    members = x.shape[1] if x.dim() == 5 else counts[0] if counts else None
    if members is None:
        raise ValueError("x: a shared x of 4 dimensions needs r, s or a bias per member, to tell K")
    _check_members(x, members, "r, s and bias")
    for name, t, width in (("r", r, channels), ("s", s, out), ("bias", bias, out)):
        if t is not None:
            one = name == "bias" and isinstance(t, Tensor) and t.dim() == 1
            _check.like(name, t, (width,) if one else (members, width), x)
    wide = x.unsqueeze(1) if x.dim() == 4 else x
    if r is not None:
        wide = wide * r.to(x.dtype)[:, :, None, None]
    h = F.conv2d(wide.flatten(0, 1), weight.to(x.dtype), None, stride, padding, dilation, groups)
    h = h.unflatten(0, wide.shape[:2])
    scale = None if s is None else s.to(h.dtype)[:, :, None, None]
    shift = None if bias is None else bias.to(h.dtype)[..., None, None]
    if scale is not None:
        h = h * scale if shift is None else torch.addcmul(shift, h, scale)
    elif shift is not None:
        h = h + shift
    return h if h.shape[1] == members else h.expand(-1, members, -1, -1, -1)


def ensemble_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Pair = 1,
    padding: Pair | str = 0,
    dilation: Pair = 1,
    groups: int = 1,
) -> Tensor:
    r"""K convolutions with weights of their own: $y_{bk} = W_k * x_{bk} + b_k$.

    A composition: one grouped convolution of torch's, or for a shared x without groups one ordinary convolution
    with K O outputs, so that x is never repeated.

    Args:
        x: (B, C, H, W), shared by the members, or (B, K, C, H, W).
        weight: (K, O, C / groups, kh, kw).
        bias: (K, O).
        stride, padding, dilation, groups: as in `torch.nn.functional.conv2d`, groups within a member.

    Shapes: x (B, C, H, W) or (B, K, C, H, W) -> (B, K, O, H', W').

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Lakshminarayanan, Pritzel, Blundell, "Deep Ensembles", NeurIPS 2017; as one grouped convolution:
    Havasi et al., 2021; Laurent et al., "Packed-Ensembles", ICLR 2023.
    """
    x = _check_images(x)
    _check.tensor("weight", weight, dim=5)
    _check.like("weight", weight, tuple(weight.shape), x)
    members, out = weight.shape[:2]
    _check_members(x, members, "weight")
    if weight.shape[2] * groups != x.shape[-3]:
        raise ValueError(
            f"weight: expected {x.shape[-3]} input channels over groups={groups} to go with x of shape "
            f"{tuple(x.shape)}, got {tuple(weight.shape)}"
        )
    if bias is not None:
        _check.like("bias", bias, (members, out), x)
        bias = bias.to(x.dtype).flatten()
    if x.dim() == 5:
        flat, groups = x.flatten(1, 2), members * groups
    elif groups == 1:
        flat = x
    else:  # a group of outputs can read only its own copy of the channels
        flat, groups = x.repeat(1, members, 1, 1), members * groups
    y = F.conv2d(flat, weight.to(x.dtype).flatten(0, 1), bias, stride, padding, dilation, groups)
    return y.unflatten(1, (members, out))
