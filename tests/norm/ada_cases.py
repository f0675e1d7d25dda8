"""What the tests of ada_norm share: its formula as a user writes it, and tensors of every form."""

import torch
import torch.nn.functional as F
from helpers import assert_accurate, double, randn, relative_error

from solera.norm import ada_layer_norm, ada_rms_norm

NORMS = {"layer": ada_layer_norm, "rms": ada_rms_norm}
NAMES = ("x", "branch", "gate", "scale", "shift", "weight", "bias")
EPS = 1e-5


def broadcast(p, x):
    return p.unsqueeze(1) if p is not None and p.dim() == 2 and x.dim() == 3 else p


def formula(kind, x, branch, gate, scale, shift, weight, bias, eps=EPS):
    """(y, h) in x's dtype: what a user writes today, and in float64 the truth."""
    gate, scale, shift = (broadcast(p, x) for p in (gate, scale, shift))
    h = x
    if branch is not None:
        h = x + (branch if gate is None else gate * branch)
    if x.dtype == torch.float64:
        d = h - h.mean(-1, keepdim=True) if kind == "layer" else h
        y = d / (d.square().mean(-1, keepdim=True) + eps).sqrt()
    else:
        norm = F.layer_norm if kind == "layer" else F.rms_norm
        y = norm(h, h.shape[-1:], eps=eps)
    y = y if weight is None else y * weight
    y = y if bias is None else y + bias
    y = y if scale is None else y * (1 + scale)
    y = y if shift is None else y + shift
    return y, h


def ours(kind, x, branch, gate, scale, shift, weight, bias, eps=EPS):
    out = NORMS[kind](
        x, branch=branch, gate=gate, scale=scale, shift=shift, weight=weight, bias=bias, eps=eps
    )
    return (out[1], out[0]) if branch is not None else (out, x)


def row_shape(shape, form):
    if form == "one":
        return shape[-1:]
    return (shape[0], shape[-1]) if form == "sample" else shape


def make(shape, dtype, form="sample", parts=NAMES[1:], grad=True, small=None):
    """x, branch, gate, scale, shift, weight, bias; `form` of the middle three, or three forms."""
    forms = (form,) * 3 if isinstance(form, str) else form
    shapes = [shape, shape, *(row_shape(shape, f) for f in forms), shape[-1:], shape[-1:]]
    dtypes = [dtype] * 2 + [small or dtype] * 5
    return tuple(
        randn(*s, dtype=d, grad=grad) if name == "x" or name in parts else None
        for name, s, d in zip(NAMES, shapes, dtypes)
    )


def both(function, kind, tensors, grads):
    out = function(kind, *tensors)
    pairs = [(o, g) for o, g in zip(out, grads) if o.requires_grad and g is not None]
    wanted = [t for t in tensors if t is not None]
    return (*out, *torch.autograd.grad([o for o, _ in pairs], wanted, [g for _, g in pairs]))


def compare(kind, tensors, with_h=True, context=""):
    x = tensors[0]
    grads = (randn(*x.shape, dtype=x.dtype), None)
    if with_h and tensors[1] is not None:
        grads = (grads[0], randn(*x.shape, dtype=x.dtype))
    got = both(ours, kind, tensors, grads)
    today = both(formula, kind, tensors, [None if g is None else g for g in grads])
    exact = both(
        formula, kind, double(*tensors), [None if g is None else g.double() for g in grads]
    )
    names = ("y", "h", *(f"d{n}" for n, t in zip(NAMES, tensors) if t is not None))
    wanted = [x, x, *(t for t in tensors if t is not None)]
    for name, a, b, c, like in zip(names, got, today, exact, wanted, strict=True):
        assert a.dtype == like.dtype
        assert_accurate(a, c, b, f"{context} {name}")


def same(tensors, context, with_h=True, kind="layer"):
    """Which gradient holds what: in float64, to rounding."""
    g = randn(*tensors[0].shape, dtype=torch.float64)
    grads = (g, g if with_h and tensors[1] is not None else None)
    got, want = (both(f, kind, tensors, grads) for f in (ours, formula))
    for a, b in zip(got, want, strict=True):
        assert relative_error(a, b) < 1e-13, context
