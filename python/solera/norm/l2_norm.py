"""Rows at a norm: unit vectors, SimpleRMSNorm, a norm taken from elsewhere, a norm folded into a product.

Everything here goes through the kernels of cores `qk_norm` (L2) and `row_norm` (RMS, layer), except class_shift
and maxsim, which are compositions over l2_normalize.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import _check
from .._autograd import differentiable_vjp
from .._registry import accumulate_type
from .._route import autocast_dtype, needs_graph, use_reference
from .qk_norm import L2, L2_ADD, head_norm
from .row_norm import rms_norm, row_norm_reference

MODES = ("clamp", "rsqrt_add")
_op = torch.ops.solera


def l2_normalize(x: Tensor, dim: int = -1, eps: float = 1e-12, *, mode: str = "clamp") -> Tensor:
    r"""Vectors along `dim` brought to length one.

    mode "clamp": $y = x / \max(\|x\|, \varepsilon)$, as `torch.nn.functional.normalize`; "rsqrt_add":
    $y = x\,(\|x\|^2 + \varepsilon)^{-1/2}$, which is smooth at 0.

    Args:
        x: (..., D), float32, float64, bfloat16 or float16; computed in float32 (float64 for float64), so that an eps
            of 1e-12 also holds for float16.
        dim: the dimension the vectors lie along. The last one is read as it is; another is copied into its place.
        eps: not negative. With 0 a zero vector gives NaN.

    Shapes: x (...) -> y of the same shape. Saved for backward: x and one number a vector.

    Raises:
        ValueError, TypeError: naming the argument.

    Source: the formula of `torch.nn.functional.normalize`; "rsqrt_add" is the form of linear-attention code.
    """
    _check.tensor("x", x, min_dim=1)
    _check.choice("mode", mode, MODES)
    eps = _check.number("eps", eps, low=0.0)
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"dim: expected an int, got {type(dim).__name__} {dim!r}")
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"dim: expected one of x's {x.dim()} dimensions, got {dim}")
    if x.is_cuda and torch.is_autocast_enabled("cuda") and x.dtype != torch.float64:
        x = x.float()
    kind = L2 if mode == "clamp" else L2_ADD
    rows = x if dim in (-1, x.dim() - 1) else x.movedim(dim, -1)
    # The kernel takes four dimensions of any strides: a view where there are fewer, or where they merge.
    four = rows.flatten(2, -2) if rows.dim() > 4 else rows[(None,) * (4 - rows.dim())]
    y = head_norm(four, kind, eps).reshape(rows.shape)
    return y if rows is x else y.movedim(-1, dim)


def simple_rms_norm(
    x: Tensor,
    eps: float | None = None,
    *,
    residual: Tensor | None = None,
    heads: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""TransNormer's SimpleRMSNorm: $y = x / (\|x\|_2 / \sqrt D)$, RMS normalisation without a weight.

    $y = u\,(\overline{u^2} + \varepsilon)^{-1/2}$, with $u = x$ or, given a residual, $u = x + \mathrm{residual}$; with
    `heads` the mean is taken over each of so many equal parts of the row (weight-free QK-norm). Gated (the
    NormAttention of the paper): `gated_rms_norm(x, gate, activation=None)`.

    Args:
        x: (..., D), float32, float64, bfloat16 or float16; computed in float32 (float64 for float64).
        eps: None takes torch's rule: the machine epsilon of the dtype that is computed in.
        residual: (..., D) of x's dtype.
        heads: divides D.

    Shapes: x (..., D) -> y (..., D); with a residual the pair (y, u), both (..., D).

    Raises:
        ValueError, TypeError: naming the argument.

    Source: Qin et al., "Scaling TransNormer to 175 Billion Parameters", 2023.
    """
    if heads is None:
        return rms_norm(x, None, eps, residual=residual)
    _check.tensor("x", x, min_dim=1)
    if isinstance(heads, bool) or not isinstance(heads, int) or heads < 1 or x.shape[-1] % heads:
        raise ValueError(f"heads: expected a divisor of x's {x.shape[-1]} columns, got {heads!r}")
    parts = (heads, x.shape[-1] // heads)
    if residual is None:
        y = rms_norm(x.unflatten(-1, parts), None, eps)
        assert isinstance(y, Tensor)
        return y.flatten(-2)
    _check.like("residual", residual, x.shape, x)
    y, u = rms_norm(x.unflatten(-1, parts), None, eps, residual=residual.unflatten(-1, parts))
    return y.flatten(-2), u.flatten(-2)


def rescale_to_norm(
    x: Tensor, ref_norm: Tensor | float, alpha: float | Tensor = 1.0, *, eps: float = 1e-12
) -> Tensor:
    r"""Rows of x at the norm of something else: $y = \alpha\,\mathrm{ref\_norm}\;x / \max(\|x\|, \varepsilon)$.

    NeTI's token is `rescale_to_norm(M, v.norm())`, its bypass
    `e + rescale_to_norm(b, e.norm(dim=-1, keepdim=True), alpha)`.

    Args:
        x: (..., D).
        ref_norm: a number or a tensor that broadcasts with x.
        alpha: a number or a tensor that broadcasts with x.

    Shapes: x (..., D) -> (..., D).

    Raises:
        ValueError, TypeError: naming the argument.

    Source: Alaluf et al., "A Neural Space-Time Representation for Text-to-Image Personalization", 2023 (derived from
    the text; composition over l2_normalize).
    """
    _check.tensor("x", x, min_dim=1)
    for name, value in (("ref_norm", ref_norm), ("alpha", alpha)):
        if not isinstance(value, Tensor):
            _check.number(name, value)
            continue
        _check.tensor(name, value)
        try:
            fits = torch.broadcast_shapes(value.shape, x.shape) == x.shape
        except RuntimeError:
            fits = False
        if not fits:
            raise ValueError(
                f"{name}: expected a shape that broadcasts with x of {tuple(x.shape)}, got "
                f"{tuple(value.shape)}"
            )
    return l2_normalize(x, eps=eps) * (ref_norm * alpha)


class _NormLinear(torch.autograd.Function):
    """Keeps x and its statistics; backward makes the normalised rows again."""

    @staticmethod
    def forward(ctx, x, norm_weight, weight, bias, eps, centred):
        n, _, mean, rstd = _op.row_norm_stats(x, None, norm_weight, None, eps, 1.0, 0.0, centred)
        ctx.save_for_backward(x, norm_weight, weight, bias, mean, rstd)
        ctx.options = (eps, centred)
        return F.linear(n, weight, bias)

    @staticmethod
    def backward(ctx, dy):
        x, norm_weight, weight, bias, mean, rstd = ctx.saved_tensors
        eps, centred = ctx.options
        needs = ctx.needs_input_grad[:4]
        if torch.is_grad_enabled():
            tensors = (x, norm_weight, weight, bias)
            plain = lambda x, n, w, b: _norm_linear_reference(x, n, w, b, eps, centred)
            return (*differentiable_vjp(plain, tensors, needs, (dy,)), None, None)
        dx = dnorm = dweight = dbias = None
        g = dy.flatten(0, -2)
        if needs[0] or needs[1]:
            dn = (g @ weight).view(x.shape)
            dx, dnorm, _ = _op.row_norm_backward(
                dn, None, x, norm_weight, mean, rstd, 0.0, centred, needs[0], needs[1], False
            )
            dx = dx if needs[0] else None
            dnorm = dnorm.to(norm_weight.dtype) if needs[1] else None
        if needs[2]:
            n = _op.row_norm(x, norm_weight, None, eps, 0.0, centred)
            dweight = g.mT @ n.flatten(0, -2)
        if needs[3]:
            dbias = g.sum(0, dtype=accumulate_type(g)).to(bias.dtype)
        return dx, dnorm, dweight, dbias, None, None


def _norm_linear_reference(x, norm_weight, weight, bias, eps, centred):
    n = row_norm_reference(x, None, norm_weight, None, eps, 1.0, 0.0, centred)[0]
    return F.linear(n, weight, bias)


def norm_linear(
    x: Tensor,
    norm_weight: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    kind: str = "rms",
    eps: float | None = None,
) -> Tensor:
    r"""A norm and the linear map after it: $y = \mathrm{norm}(x)\,W^\top + b$, saving only x and its statistics.

    $\mathrm{norm}(x) = (x - \mu)\,r\,\mathrm{norm\_weight}$, by `kind` "rms" ($\mu = 0$) or "layer". The normalised
    rows are written for the product and dropped; backward makes them again in one pass. A norm before a projection
    then keeps half as much; time is not saved: there is one more pass over x (see docs/performance/qk_norm.md).

    Args:
        x: (..., D), float32, float64, bfloat16 or float16.
        norm_weight: (D,) or None; may be float32 with a half-precision x.
        weight: (O, D), x's dtype. bias: (O,), x's dtype, or None. Under autocast x, weight and bias are taken in
            its dtype, as `torch.nn.functional.linear` takes them.
        eps: None: torch's rule for rms, 1e-5 for layer.

    Shapes: x (..., D) -> y (..., O).

    Raises:
        ValueError, TypeError: naming the argument.

    Source: the composition of `rms_norm` or `layer_norm` and `torch.nn.functional.linear`.
    """
    _check.tensor("x", x, min_dim=1)
    _check.choice("kind", kind, ("rms", "layer"))
    if norm_weight is not None:
        _check.like("norm_weight", norm_weight, x.shape[-1:], x)
    _check.tensor("weight", weight, dim=2)
    _check.like("weight", weight, (weight.shape[0], x.shape[-1]), x)
    if bias is not None:
        _check.like("bias", bias, weight.shape[:1], x)
    dtype = autocast_dtype(x)
    if dtype is not None and x.dtype != torch.float64:
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    _check.same_dtype("weight", weight, x)
    if bias is not None:
        _check.same_dtype("bias", bias, x)
    if eps is None:
        eps = torch.finfo(accumulate_type(x)).eps if kind == "rms" else 1e-5
    eps = _check.number("eps", eps, low=0.0)
    centred = kind == "layer"
    if use_reference():
        return _norm_linear_reference(x, norm_weight, weight, bias, eps, centred)
    if needs_graph(x, norm_weight, weight, bias):
        return _NormLinear.apply(x, norm_weight, weight, bias, eps, centred)
    return F.linear(_op.row_norm(x, norm_weight, None, eps, 0.0, centred), weight, bias)


def class_shift(
    features: Tensor,
    source: Tensor,
    target: Tensor,
    means: Tensor,
    *,
    normalize: bool = True,
) -> Tensor:
    r"""Features of one class moved to another: $\hat f_i = f_i + \mu_{\mathrm{target}_i} - \mu_{\mathrm{source}_i}$.

    Pseudo-features of past classes, whose means alone were kept; `normalize` brings them to length one.

    Args:
        features: (N, d). means: (C, d), the classes' means, of the same dtype.
        source, target: (N,) integer class indices in [0, C).

    Shapes: (N, d) -> (N, d).

    Raises:
        ValueError, TypeError: naming the argument.

    Source: Petit et al., "FeTrIL: Feature Translation for Exemplar-Free Class-Incremental Learning", 2023
    (composition over l2_normalize).
    """
    _check.tensor("features", features, dim=2)
    _check.tensor("means", means, dim=2)
    _check.like("means", means, (means.shape[0], features.shape[1]), features, "features")
    for name, index in (("source", source), ("target", target)):
        if not isinstance(index, Tensor) or index.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{name}: expected an integer tensor, got {_check._came(index)}")
        if index.shape != features.shape[:1]:
            raise ValueError(
                f"{name}: expected shape ({features.shape[0]},), got {tuple(index.shape)}"
            )
    moved = features + (means[target] - means[source])
    return l2_normalize(moved) if normalize else moved


def maxsim(
    queries: Tensor, documents: Tensor, mask: Tensor | None = None, *, normalize: bool = True
) -> Tensor:
    r"""Late interaction: $s_{qn} = \sum_i \max_j \langle q_i, d_{nj} \rangle$ over unit token vectors.

    ColBERT's projection variants come before it, such as a gated linear unit:
    `maxsim(F.linear(F.silu(F.linear(x, W1)) * F.linear(x, W2), W3), documents)`.

    Args:
        queries: (Q, Lq, d). documents: (N, Ld, d).
        mask: (N, Ld), True where the document has a token; each document has at least one.
        normalize: bring the tokens of both to length one first.

    Shapes: -> (Q, N).

    Raises:
        ValueError, TypeError: naming the argument.

    Source: "Simple Projection Variants Improve ColBERT Performance", 2025; MaxSim: Khattab, Zaharia, "ColBERT",
    2020 (composition over l2_normalize and a product).
    """
    _check.tensor("queries", queries, dim=3)
    _check.tensor("documents", documents, dim=3)
    shape = (*documents.shape[:2], queries.shape[2])
    _check.like("documents", documents, shape, queries, "queries")
    _check.same_dtype("documents", documents, queries, "queries")
    if normalize:
        queries, documents = l2_normalize(queries), l2_normalize(documents)
    similarity = torch.einsum("qid,njd->qnij", queries, documents)
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise TypeError(f"mask: expected a bool tensor, got {_check._came(mask)}")
        if mask.shape != documents.shape[:2]:
            raise ValueError(
                f"mask: expected shape {tuple(documents.shape[:2])}, got {tuple(mask.shape)}"
            )
        similarity = similarity.masked_fill(~mask[None, :, None, :], -torch.inf)
    return similarity.amax(-1).sum(-1)
