"""Layers over several feature sets or experts: sums of products, without the concatenated or stacked tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import _check
from .._autograd import differentiable_vjp
from .._registry import accumulate_type
from .._route import autocast_dtype, needs_graph, use_reference, without_autocast
from ..norm import batch_norm, l2_normalize
from ..norm.grad_scale import grad_scale
from ._members import cast_grad
from .ensemble_mlp import ensemble_mlp

Activation = str | Callable[[Tensor], Tensor] | None

NORMS = ("none", "l2", "bn")


# ---- mixtures of weights -----------------------------------------------------------------------------


def mixing_gate(x: Tensor, weight: Tensor, epsilon: float = 0.0) -> Tensor:
    r"""Smoothed expert weights by token: $D(x) = (1 - \epsilon)\,\mathrm{softmax}(Rx) + \epsilon / K$.

    Shapes: x (..., I), weight R (K, I) -> (..., K).

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Jiang et al., "Multi-Domain Neural Machine Translation with Word-Level Adaptive Layer-wise Domain Mixing",
    ACL 2020, which "Improving Both Domain Robustness and Domain Adaptability in Machine Translation", 2021, builds on.
    """
    _check.tensor("x", x, min_dim=1)
    _check.tensor("weight", weight, dim=2)
    if weight.shape[0] == 0:
        raise ValueError(f"weight: expected at least one expert, got {tuple(weight.shape)}")
    _check.like("weight", weight, (weight.shape[0], x.shape[-1]), x)
    _check.product_dtype("weight", weight, x)
    epsilon = _check.number("epsilon", epsilon, low=0.0, high=1.0)
    gate = F.linear(x, weight).softmax(-1)
    return (1 - epsilon) * gate + epsilon / weight.shape[0]


def _mixture_reference(x: Tensor, weight: Tensor, gate: Tensor, bias: Tensor | None) -> Tensor:
    acc = accumulate_type(x)
    g = gate.to(acc)
    with without_autocast(x):
        y = torch.einsum("tk,koi,ti->to", g, weight.to(acc), x.to(acc))
        y = y if bias is None else y + g @ bias.to(acc)
    return y.to(x.dtype)


class _MixtureLinear(torch.autograd.Function):
    """One expert after another both ways, so that no (T, K, .) tensor exists; only the inputs are saved."""

    @staticmethod
    def forward(ctx, x, weight, gate, bias):
        ctx.save_for_backward(x, weight, gate, bias)
        acc = accumulate_type(x)
        g = gate.to(acc)
        y = x.new_zeros((x.shape[0], weight.shape[1]), dtype=acc)
        for k in range(weight.shape[0]):
            y.addcmul_(torch.mm(x, weight[k].mT.to(x.dtype)).to(acc), g[:, k, None])
        if bias is not None:
            y.addmm_(g, bias.to(acc))
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        x, weight, gate, bias = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled():
            return tuple(
                differentiable_vjp(_mixture_reference, (x, weight, gate, bias), needs, (dy,))
            )
        acc = accumulate_type(x)
        g, wide = gate.to(acc), dy.to(acc)
        dx = x.new_zeros(x.shape, dtype=acc) if needs[0] else None
        dweight = torch.empty_like(weight) if needs[1] else None
        dgate = x.new_empty(gate.shape, dtype=acc) if needs[2] else None
        for k in range(weight.shape[0]):
            w = weight[k].to(x.dtype)
            if dgate is not None:
                h = torch.mm(x, w.mT).to(acc)
                dgate[:, k] = (h * wide).sum(1)
            if dx is not None or dweight is not None:
                part = (wide * g[:, k, None]).to(x.dtype)
                if dweight is not None:
                    dweight[k] = torch.mm(part.mT, x)
                if dx is not None:
                    dx += torch.mm(part, w)
        if dgate is not None and bias is not None:
            dgate += wide @ bias.to(acc).mT
        dbias = g.mT @ wide if needs[3] else None
        return (
            None if dx is None else dx.to(x.dtype),
            dweight,
            None if dgate is None else dgate.to(gate.dtype),
            None if dbias is None else cast_grad(dbias, bias, True),
        )


def mixture_linear(x: Tensor, weight: Tensor, gate: Tensor, bias: Tensor | None = None) -> Tensor:
    r"""A linear layer whose weight is a mixture for each token: $y_t = \sum_k g_{tk} (W_k x_t + b_k)$.

    A composition of K products whose sum is kept in float32 (float64 for float64); neither the tokens' weights nor
    a (T, K, O) tensor exist, forward or backward.

    Args:
        x: (..., I).
        weight: (K, O, I).
        gate: (..., K), for instance `mixing_gate(x, R, epsilon)`.
        bias: (K, O), mixed likewise.

    Under autocast x is taken, and y returned, in the autocast dtype.

    Shapes: x (..., I), gate (..., K) -> (..., O).

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: the word-level domain mixing of Jiang et al., ACL 2020, used in "Improving Both Domain Robustness and
    Domain Adaptability in Machine Translation", 2021.
    """
    _check.tensor("x", x, min_dim=1)
    _check.tensor("weight", weight, dim=3)
    experts, out, inputs = weight.shape
    _check.like("weight", weight, (experts, out, x.shape[-1]), x)
    _check.like("gate", gate, (*x.shape[:-1], experts), x)
    if bias is not None:
        _check.like("bias", bias, (experts, out), x)
    dtype = autocast_dtype(x)
    x = x if dtype is None or x.dtype == torch.float64 else x.to(dtype)
    shape = (*x.shape[:-1], out)
    x, gate = x.reshape(-1, inputs), gate.reshape(-1, experts)
    if use_reference():
        return _mixture_reference(x, weight, gate, bias).view(shape)
    if needs_graph(x, weight, gate, bias):
        return _MixtureLinear.apply(x, weight, gate, bias).view(shape)
    with without_autocast(x):
        return _MixtureLinear.forward(_Nothing(), x, weight, gate, bias).view(shape)


class _Nothing:
    def save_for_backward(self, *tensors: Tensor | None) -> None:
        pass


# ---- one expert for each example ---------------------------------------------------------------------


def indexed_mlp(
    x: Tensor,
    index: Tensor,
    w1: Tensor,
    w2: Tensor,
    b1: Tensor | None = None,
    b2: Tensor | None = None,
    *,
    activation: Activation = "gelu",
) -> Tensor:
    r"""Each example through the perceptron it names: $y_b = W^2_{i_b}\,\phi(W^1_{i_b} x_b + b^1_{i_b}) + b^2_{i_b}$.

    A composition: the examples of an expert are gathered, run together and put back. The group sizes are read on
    the host, so a GPU is waited for once, and `torch.compile` breaks the graph there.

    Args:
        x: (B, I) or (B, T, I): an index holds for all tokens of an example.
        index: (B,) integers in [0, E).
        w1: (E, H, I), w2: (E, O, H).
        b1: (E, H), b2: (E, O).
        activation: "relu", "gelu", "silu", None, or a function of a tensor.

    Shapes: x (B, I) or (B, T, I), index (B,) -> (B, O) or (B, T, O).

    Raises:
        ValueError, TypeError: naming the argument that does not fit; an index outside [0, E).

    Source: the enforced routing of Hallee, Kapur, Patel, Gleghorn, Khomtchouk, "Contrastive Learning and Mixture of
    Experts Enables Precise Vector Embeddings", 2024.
    """
    _check.tensor("x", x)
    if x.dim() not in (2, 3):
        raise ValueError(f"x: expected (B, I) or (B, T, I), got {tuple(x.shape)}")
    _check.tensor("w1", w1, dim=3)
    _check.tensor("w2", w2, dim=3)
    experts, hidden, _ = w1.shape
    out = w2.shape[1]
    for name, t, size in (
        ("w1", w1, (experts, hidden, x.shape[-1])),
        ("w2", w2, (experts, out, hidden)),
        ("b1", b1, (experts, hidden)),
        ("b2", b2, (experts, out)),
    ):
        if t is not None:
            _check.like(name, t, size, x)
    if not isinstance(index, Tensor) or index.dtype not in (torch.int64, torch.int32):
        raise TypeError("index: expected a tensor of int64 or int32")
    _check.same_device("index", index, x)
    if index.shape != x.shape[:1]:
        raise ValueError(f"index: expected shape {tuple(x.shape[:1])}, got {tuple(index.shape)}")
    if activation is not None and not callable(activation):
        _check.choice("activation", activation, ("relu", "gelu", "silu"))
    function = getattr(F, activation) if isinstance(activation, str) else activation
    order = torch.argsort(index, stable=True)
    if len(index) and not 0 <= int(index[order[0]]) <= int(index[order[-1]]) < experts:
        raise ValueError(f"index: expected numbers in [0, {experts})")
    counts = torch.bincount(index, minlength=experts).tolist()
    groups = x.index_select(0, order).split(counts)
    results = []
    for e, group in enumerate(groups):
        if group.shape[0] == 0:
            continue
        h = F.linear(group, w1[e].to(x.dtype), None if b1 is None else b1[e].to(x.dtype))
        h = h if function is None else function(h)
        results.append(F.linear(h, w2[e].to(h.dtype), None if b2 is None else b2[e].to(h.dtype)))
    if not results:
        return x.new_zeros((*x.shape[:-1], out)) + 0 * (w1.sum() + w2.sum()).to(x.dtype)
    return torch.cat(results).index_select(0, torch.argsort(order))


# ---- feature sets side by side -----------------------------------------------------------------------


def _normalized(f: Tensor, norm: str) -> Tensor:
    if norm == "l2":
        return l2_normalize(f)
    return batch_norm(f, training=True) if norm == "bn" else f


def cat_linear(
    features: Sequence[Tensor], weight: Tensor, bias: Tensor | None = None, *, norm: str = "none"
) -> Tensor:
    r"""A linear probe over features side by side, not concatenated: $y = \sum_k \mathrm{norm}(f_k) W_k^\top + b$.

    A composition: one product for each feature set over its columns of the weight.

    Args:
        features: K tensors (B, d_k), of one dtype.
        weight: (C, d_1 + ... + d_K).
        bias: (C,).
        norm: "none", "l2" (each row of each set at length one) or "bn" (each feature standardised by the batch).

    Shapes: features (B, d_k) each -> (B, C).

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Zhang, Bottou, "Learning useful representations for shifting tasks and distributions", ICML 2023 (Cat); the
    super-feature of DER (Yan, Xie, He, CVPR 2021).
    """
    _check.choice("norm", norm, NORMS)
    if isinstance(features, Tensor) or not isinstance(features, Sequence) or not features:
        raise TypeError("features: expected a list of tensors (B, d)")
    first = _check.tensor("features[0]", features[0], dim=2)
    for i, f in enumerate(features):
        _check.tensor(f"features[{i}]", f, dim=2)
        _check.like(f"features[{i}]", f, (first.shape[0], f.shape[1]), first, "features[0]")
        _check.same_dtype(f"features[{i}]", f, first, "features[0]")
    _check.tensor("weight", weight, dim=2)
    sizes = [f.shape[1] for f in features]
    _check.like("weight", weight, (weight.shape[0], sum(sizes)), first, "features[0]")
    if bias is not None:
        _check.like("bias", bias, (weight.shape[0],), first, "features[0]")
    y = None
    for f, w in zip(features, weight.split(sizes, 1)):
        f = _normalized(f, norm)
        if autocast_dtype(f) is None:
            w = w.to(f.dtype)
            b = None if bias is None else bias.to(f.dtype)
        else:
            b = bias
        y = F.linear(f, w, b) if y is None else y + F.linear(f, w)
    assert y is not None
    return y


def layer_ensemble_heads(
    h: Tensor,
    g: Tensor,
    w1_h: Tensor,
    w1_g: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    weights: Tensor | None = None,
    *,
    activation: Activation = "relu",
) -> Tensor:
    r"""Heads on L layers of a large model, each beside a small model's view, averaged.

    $$y = \sum_l w_l \bigl( \phi(h_l W^{1h}_l + g_l W^{1g}_l + b^1_l)\, W^2_l + b^2_l \bigr),\qquad w_l = 1/L
      \text{ if not given} .$$

    The concatenation [h_l ; g_l] is never made, and the average is taken in the pass of the last layer
    (`ensemble_mlp` with `reduce`), so the L heads' outputs are not written.

    Args:
        h: (L, B, Dh), chosen intermediate outputs of the pre-trained model.
        g: (L, B, Dg), or (1, B, Dg) for one view beside every layer.
        w1_h: (L, Dh, H), w1_g: (L, Dg, H), b1: (L, H).
        w2: (L, H, C), b2: (L, C).
        weights: (L,).
        activation: "relu", "gelu", "silu", None, or a function of a tensor.

    Shapes: h (L, B, Dh), g (L or 1, B, Dg) -> (B, C).

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Roh, Chen, Jang et al., "LEVI: Generalizable Fine-tuning via Layer-wise Ensemble of Different Views", ICML
    2024; equal weights are this library's reading.
    """
    _check.tensor("h", h, dim=3)
    _check.tensor("g", g, dim=3)
    layers, items, _ = h.shape
    if g.shape[0] not in (1, layers):
        raise ValueError(f"g: expected 1 or {layers} views, got shape {tuple(g.shape)}")
    _check.like("g", g, (g.shape[0], items, g.shape[2]), h, "h")
    _check.tensor("w1_h", w1_h, dim=3)
    _check.tensor("w2", w2, dim=3)
    hidden, out = w1_h.shape[2], w2.shape[2]
    for name, t, size in (
        ("w1_h", w1_h, (layers, h.shape[2], hidden)),
        ("w1_g", w1_g, (layers, g.shape[2], hidden)),
        ("b1", b1, (layers, hidden)),
        ("w2", w2, (layers, hidden, out)),
        ("b2", b2, (layers, out)),
    ):
        _check.like(name, t, size, h, "h")
    if weights is not None:
        _check.like("weights", weights, (layers,), h, "h")
    if activation is not None and not callable(activation):
        _check.choice("activation", activation, ("relu", "gelu", "silu"))
    function = getattr(F, activation) if isinstance(activation, str) else activation
    z = torch.baddbmm(b1.to(h.dtype).unsqueeze(1), h, w1_h.to(h.dtype))
    z = torch.baddbmm(z, g.to(h.dtype).expand(layers, -1, -1), w1_g.to(h.dtype))
    z = z if function is None else function(z)
    return ensemble_mlp(
        z.transpose(0, 1), [(w2, b2)], reduce="mean" if weights is None else weights
    )


def fanout_scale_grad(x: Tensor, heads: int) -> list[Tensor]:
    r"""x for each of K heads, whose K gradients are averaged: forward identity, backward $1/K$ times their sum.

    Shapes: x (...) -> K views (...).

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: the gradient division at the split of "One-Shot Neural Ensemble Architecture Search by Diversity-Guided
    Search Space Shrinking", CVPR 2021.
    """
    if not isinstance(heads, int) or heads < 1:
        raise ValueError(f"heads: expected a positive number of heads, got {heads!r}")
    y = grad_scale(x, 1.0 / heads)
    return [y.view_as(y) for _ in range(heads)]


# ---- two heads on one feature ------------------------------------------------------------------------


def dual_head_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    r"""Two classifiers on one feature, $[z_1; z_2] = f\,[W_1; W_2]^\top$, in one product.

    Shapes: x (B, D), weight (2, C, D), bias (2, C) -> two (B, C).

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Yang et al., "Dual-Head Knowledge Distillation: Enhancing Logits Utilization with an Auxiliary Head", 2024.
    """
    _check.tensor("x", x, dim=2)
    _check.tensor("weight", weight, dim=3)
    _check.like("weight", weight, (2, weight.shape[1], x.shape[1]), x)
    _check.product_dtype("weight", weight, x)
    if bias is not None:
        _check.like("bias", bias, (2, weight.shape[1]), x)
        _check.product_dtype("bias", bias, x)
        bias = bias.flatten()
    first, second = F.linear(x, weight.flatten(0, 1), bias).chunk(2, 1)
    return first, second


def binary_kl_norm(student: Tensor, teacher: Tensor, tau: float = 1.0) -> Tensor:
    r"""The loss $\frac{\tau^2}{B} \sum_{b,c} \mathrm{KL}\bigl(\tfrac12 \,\|\, \sigma((s-t)/\tau)\bigr)$.

    With $d = (s - t)/\tau$ a term is $\tfrac12 (\mathrm{softplus}(d) + \mathrm{softplus}(-d)) - \log 2$, which neither
    overflows nor cancels: $\log\cosh(d/2)$, computed as $|d|/2 + \log(1 + e^{-|d|}) - \log 2$.

    Args:
        student, teacher: logits (B, C); the teacher's may need no gradient.
        tau: a positive temperature.

    Shapes: student, teacher (B, C) -> a scalar, in float32 (float64 for float64).

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Yang et al., "Dual-Head Knowledge Distillation", 2024 (BinaryKL-Norm, which does not standardise its input).
    """
    _check.tensor("student", student, dim=2)
    _check.like("teacher", teacher, tuple(student.shape), student, "student")
    tau = _check.number("tau", tau)
    if tau <= 0:
        raise ValueError(f"tau: expected a positive number, got {tau!r}")
    acc = accumulate_type(student)
    d = (student.to(acc) - teacher.to(acc)).abs() / tau
    terms = d / 2 + torch.log1p(torch.exp(-d)) - 0.6931471805599453
    return terms.sum() * (tau**2 / max(student.shape[0], 1))


def gated_mix(h: Tensor, gates: Tensor) -> Tensor:
    r"""The members' features, weighted by item: $y_b = \sum_m g_{bm} h_{mb}$.

    A composition: one batched product, summed in float32 by the product itself.

    Args:
        h: (M, B, D), the members' features.
        gates: (B, M), for instance a softmax of a linear function of the input.

    Shapes: h (M, B, D), gates (B, M) -> (B, D).

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: the gated fusion that "Adaptive Ensemble Learning: Boosting Model Performance through Intelligent
    Feature Fusion in Deep Neural Networks", 2023, describes in words (it gives no equation; this is the usual
    one), and the combination of mixtures of experts.
    """
    _check.tensor("h", h, dim=3)
    _check.like("gates", gates, (h.shape[1], h.shape[0]), h, "h")
    return torch.matmul(gates.to(h.dtype).unsqueeze(1), h.transpose(0, 1)).squeeze(1)
