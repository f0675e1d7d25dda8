r"""The two passes of a normalised softmax over a half-precision weight, on the CPU: classes in blocks.

With $c_{bk} = x_b\cdot w_k\,/\,(\|x_b\|\,\|w_k\|)$ and $z_{bk} = r_b\,c_{bk}$:

- `class_statistics` reads the weight once and gives, over the classes other than the label,
  $\ell_b = \log\sum_k e^{z_{bk}}$ and the mean of $c_{bk}$ under that softmax; and if wanted the cosines, rounded
  to multiples of 1/32767 in int16 (-32768 for NaN), class by class: 2 B C bytes. A half's own
  rounding of a weight's entries moves a cosine by about as much.
- `class_gradient` makes of them the gradient to $x_b\cdot w_k$,
  $g_{bk} = (\text{share}_b\,r_b\,e^{z_{bk} - \ell_b}$, at the label $\text{label}_b)\,/\,(\|x_b\|\,\|w_k\|)$,
  and from that both gradients,

$$\mathrm{d}x_b = d - x_b\,\frac{x_b\cdot d}{\|x_b\|^2},\ d = \sum_k g_{bk} w_k;\qquad
  \mathrm{d}w_k = e - w_k\,\frac{w_k\cdot e}{\|w_k\|^2},\ e = \sum_b g_{bk} x_b.$$

A block of classes finishes its part of dw, which is rounded once; no float32 array of the weight's size exists.
The price is the cosines, so this is for B up to 2 d: beyond, the rows in chunks of `normalized_softmax` hold less.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._registry import reference
from .._route import AT_IMPORT

STEPS = 32767.0  # of int16 in a cosine of 1
NAN = -32768
LANES = 32  # rows are padded to a multiple of this many
BLOCK = 1024  # classes at a time in the reference
EPS = 1e-12


def suits(x: Tensor, weight: Tensor) -> bool:
    """Whether these are the passes for them: halves on the CPU, and no more rows than pay."""
    if not weight.is_cpu or AT_IMPORT == "triton" or x.dtype != weight.dtype:
        return False
    return x.dtype in (torch.bfloat16, torch.float16) and x.shape[0] <= 2 * x.shape[1]


def padded(rows: int) -> int:
    """The rows of a class's kept cosines: those of x, up to the next multiple of LANES."""
    return -(-rows // LANES) * LANES


def _blocks(x: Tensor, weight: Tensor):
    wide = x.float()
    for first in range(0, weight.shape[0], BLOCK):
        part = slice(first, first + BLOCK)
        yield part, wide, weight[part].float()


@reference("class_statistics")
def _class_statistics(x, weight, target, scale, row_inverse, class_inverse, keep):
    rows, classes = x.shape[0], weight.shape[0]
    kept = torch.zeros(classes if keep else 0, padded(rows), dtype=torch.int16, device=x.device)
    number = torch.arange(classes, device=x.device)
    others = x.new_full((rows,), float("-inf"), dtype=torch.float32)
    sums, weighted = torch.zeros_like(others), torch.zeros_like(others)
    top = torch.full_like(others, torch.finfo(torch.float32).min)
    for part, wide, w in _blocks(x, weight):
        cosine = (w @ wide.t()) * (class_inverse[part, None] * row_inverse)  # [classes, B]
        if keep:
            steps = (cosine * STEPS).round().clamp(-STEPS, STEPS)
            kept[part, :rows] = torch.where(steps.isnan(), float(NAN), steps).to(torch.int16)
        label = number[part, None] == target
        z = torch.where(label, float("-inf"), cosine * scale)
        highest = torch.maximum(top, z.nan_to_num(nan=float("-inf"), neginf=float("-inf")).amax(0))
        factor, e = (top - highest).exp(), (z - highest).exp()
        sums = sums * factor + e.sum(0)
        weighted = weighted * factor + (e * cosine).sum(0)
        top = highest
    others = torch.where(sums == 0, others, top + sums.log())
    mean = torch.where(sums == 0, 0.0, weighted / sums)
    left_out = target < 0
    return torch.where(left_out, 0.0, others), torch.where(left_out, 1.0, mean), kept


def _tangent(e: Tensor, v: Tensor, inverse: Tensor) -> Tensor:
    along = (e * v).sum(1) * inverse.square()
    return e - torch.where(inverse < 1 / EPS, along, 0.0)[:, None] * v


@reference("class_gradient")
def _class_gradient(
    x, weight, target, cosines, scale, row_inverse, class_inverse, others, share, label, need_x, need_weight
):  # fmt: skip
    rows = x.shape[0]
    number = torch.arange(weight.shape[0], device=x.device)
    d = x.new_zeros(x.shape, dtype=torch.float32)
    dweight = torch.empty_like(weight) if need_weight else weight.new_empty(0)
    for part, wide, w in _blocks(x, weight):
        steps = cosines[part, :rows]
        cosine = torch.where(steps == NAN, float("nan"), steps / STEPS)
        e = share * scale * (cosine * scale - others).clamp(max=80.0).exp()
        g = torch.where(number[part, None] == target, label, torch.where(share == 0, 0.0, e))
        g = g * (class_inverse[part, None] * row_inverse)
        if need_x:
            d.addmm_(g.t(), w)
        if need_weight:
            dweight[part] = _tangent(g @ wide, w, class_inverse[part]).to(weight.dtype)
    dx = _tangent(d, x.float(), row_inverse).to(x.dtype) if need_x else x.new_empty(0)
    return dx, dweight
