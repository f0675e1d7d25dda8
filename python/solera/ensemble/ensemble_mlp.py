r"""Core `ensemble_mlp`: K multi-layer perceptrons with parameters of their own, evaluated as one.

Member k applies L linear layers with activations $\phi_l$ to x (B, I), shared by the members, or to its own
x (B, K, I):

$$h^0 = x_{bk},\qquad z^l = W^l_k h^{l-1} + b^l_k,\qquad h^l = \phi_l(z^l),\qquad y_{bk} = h^L ,$$

and with weights $w_k$ the members are combined in the same pass, $y_b = \sum_k w_k h^L_{bk}$, so that the
(B, K, O) outputs are never written.

The gradient goes down the layers, from $\delta^L = \mathrm{d}y_{bk}\,\phi_L'(z^L)$, or
$w_k\,\mathrm{d}y_b\,\phi_L'(z^L)$ where members are combined:

$$\mathrm{d}W^l_k = \sum_b \delta^l (h^{l-1})^\top,\qquad \mathrm{d}b^l_k = \sum_b \delta^l,\qquad
  \delta^{l-1} = \phi_{l-1}'(z^{l-1}) \odot (W^l_k)^\top \delta^l,\qquad
  \mathrm{d}x_{bk} = (W^1_k)^\top \delta^1 ,$$

and dx of a shared x is the sum over k. A hidden layer keeps one tensor for backward: h for relu and for no
activation, z for gelu and silu, from which h is computed again. It is flat, (K B H,) elements in the order
that suits the kernels of the device, so only the backward of the same device reads it.

Sources: Lakshminarayanan, Pritzel, Blundell, "Simple and Scalable Predictive Uncertainty Estimation using
Deep Ensembles", NeurIPS 2017; what is done today is `torch.vmap` over `torch.func.stack_module_state`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import _check
from .._activation import GELU, activate, delta_of
from .._autograd import differentiable_vjp
from .._registry import accumulate_type, reference
from .._route import needs_graph, use_reference, without_autocast
from ._members import ACTIVATIONS, autocast, check_input, fresh
from .members import Members, layer_names

_op = torch.ops.solera

Layer = tuple[Tensor, Tensor | None]
Activation = str | Callable[[Tensor], Tensor] | None


# ---- reference ---------------------------------------------------------------------------------------


def _by_member(x: Tensor, members: int, acc: torch.dtype) -> Tensor:
    """(K, B, I) in the accumulator's type."""
    if x.dim() == 2:
        return x.to(acc).expand(members, *x.shape)
    return x.to(acc).transpose(0, 1)


def _matrices(weights: Sequence[Tensor], out_first: bool, acc: torch.dtype) -> list[Tensor]:
    """(K, I, O) each."""
    return [(w.mT if out_first else w).to(acc) for w in weights]


def ensemble_mlp_reference(x, weights, biases, activations, out_first, combine):
    """y by the formula, in float32 (float64 for float64), rounded to x's dtype; what backward needs."""
    acc = accumulate_type(x)
    matrices = _matrices(weights, out_first, acc)
    h = _by_member(x, matrices[0].shape[0], acc)
    saved = []
    last = len(matrices) - 1
    with without_autocast(x):
        for i, (w, activation) in enumerate(zip(matrices, activations)):
            z = torch.matmul(h, w)
            if biases:
                z = z + biases[i].to(acc).unsqueeze(1)
            h = activate(z, activation)
            if i < last or activation:
                saved.append(z if activation >= GELU else h)
    h = h.transpose(0, 1)
    y = h if combine is None else (h * combine.to(acc)[:, None]).sum(1)
    return y.to(x.dtype), saved


@reference("ensemble_mlp")
def _ensemble_mlp(x, weights, biases, activations, out_first, combine):
    return fresh(ensemble_mlp_reference(x, weights, biases, activations, out_first, combine)[0])


@reference("ensemble_mlp_saved")
def _ensemble_mlp_saved(x, weights, biases, activations, out_first, combine):
    y, saved = ensemble_mlp_reference(x, weights, biases, activations, out_first, combine)
    return fresh(y), [fresh(t.to(x.dtype)).view(-1) for t in saved]


@reference("ensemble_mlp_backward")
def _ensemble_mlp_backward(
    dy, x, weights, saved, activations, out_first, combine, need_x, need_parameters
):
    acc = accumulate_type(x)
    matrices = _matrices(weights, out_first, acc)
    members, items = matrices[0].shape[0], x.shape[0]
    d = _by_member(dy, members, acc)
    if combine is not None:
        d = d * combine.to(acc)[:, None, None]
    dweights, dbiases = [], []
    for i in reversed(range(len(matrices))):
        if activations[i]:
            d = delta_of(d, saved[i].view(members, items, -1), activations[i])
        h = _by_member(x, members, acc)
        if i:
            h = activate(saved[i - 1].view(members, items, -1).to(acc), activations[i - 1])
        if need_parameters:
            pair = (d.mT, h) if out_first else (h.mT, d)
            dweights.append(fresh(torch.matmul(*pair).to(weights[i].dtype)))
            dbiases.append(fresh(d.sum(1)))
        if i or need_x:
            d = torch.matmul(d, matrices[i].mT)
    if x.dim() == 2:
        d = d.sum(0)
    elif need_x:
        d = d.transpose(0, 1)
    return fresh(d.to(x.dtype), need_x), dweights[::-1], dbiases[::-1]


# ---- autograd ----------------------------------------------------------------------------------------


class _EnsembleMlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, combine, activations, out_first, layers, *parameters):
        weights, biases = list(parameters[:layers]), list(parameters[layers:])
        y, saved = _op.ensemble_mlp_saved(x, weights, biases, activations, out_first, combine)
        ctx.options = activations, out_first, layers
        ctx.save_for_backward(x, combine, *parameters, *saved)
        return y

    @staticmethod
    def backward(ctx, dy):
        activations, out_first, layers = ctx.options
        x, combine, *rest = ctx.saved_tensors
        count = len(ctx.needs_input_grad) - 5
        parameters, saved = rest[:count], rest[count:]
        needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[5:]]
        none = (None,) * 4
        if torch.is_grad_enabled():

            def network(x, *parameters):
                weights, biases = list(parameters[:layers]), list(parameters[layers:])
                return ensemble_mlp_reference(x, weights, biases, activations, out_first, combine)[
                    0
                ]

            grads = differentiable_vjp(network, (x, *parameters), needs, (dy,))
            return (grads[0], *none, *grads[1:])
        dx, dweights, dbiases = _op.ensemble_mlp_backward(
            dy, x, parameters[:layers], saved, activations, out_first, combine, needs[0], any(needs[1:])
        )  # fmt: skip
        grads = [
            g.to(p.dtype) if need else None
            for g, p, need in zip([*dweights, *dbiases], parameters, needs[1:])
        ] or [None] * count
        return (dx if needs[0] else None, *none, *grads)


# ---- the public function -----------------------------------------------------------------------------


def _layers_of(params: object, x: Tensor) -> tuple[list[Layer], bool]:
    """Weights and biases in order, and whether weights are (K, O, I) as torch's modules hold them."""
    if isinstance(params, Mapping):
        names = params.layers if isinstance(params, Members) else layer_names(params)
        if not names:
            raise ValueError(
                "params: expected the stacked linear layers of an MLP, keys '<name>.weight' and "
                f"'<name>.bias', got {list(params)}; members of another kind run by params.vmap(x)"
            )
        return [(params[w], None if b is None else params[b]) for w, b in names], True
    if isinstance(params, str | Tensor) or not isinstance(params, Sequence) or not params:
        raise TypeError(
            "params: expected what stack_members returns, or a list of (weight, bias) pairs, got "
            f"{type(params).__name__}"
        )
    pairs: list[Layer] = []
    for i, layer in enumerate(params):
        if isinstance(layer, Tensor) or not isinstance(layer, Sequence) or len(layer) != 2:
            raise TypeError(
                f"params[{i}]: expected a pair (weight, bias), got {type(layer).__name__}"
            )
        pairs.append((layer[0], layer[1]))
    return pairs, False


def _check_layers(layers: list[Layer], out_first: bool, x: Tensor) -> tuple[int, int]:
    """The number of members and of outputs."""
    first = _check.tensor("params[0] weight", layers[0][0], dim=3)
    members, width = first.shape[0], x.shape[-1]
    if members == 0:
        raise ValueError(f"params: expected at least one member, got {tuple(first.shape)}")
    if x.dim() == 3 and x.shape[1] != members:
        raise ValueError(
            f"x: expected {members} members to go with params, got {x.shape[1]} "
            f"(x of shape {tuple(x.shape)})"
        )
    for i, (weight, bias) in enumerate(layers):
        _check.tensor(f"params[{i}] weight", weight, dim=3)
        out = weight.shape[1] if out_first else weight.shape[2]
        size = (members, out, width) if out_first else (members, width, out)
        _check.like(f"params[{i}] weight", weight, size, x)
        if bias is not None:
            _check.like(f"params[{i}] bias", bias, (members, out), x)
        width = out
    return members, width


def _activations(activation: object, params: object, layers: int) -> list[Activation]:
    """One a layer, the last included."""
    if activation is None:
        if isinstance(params, Members):
            return list(params.activations)
        return [None] * layers
    if not isinstance(activation, str) and not callable(activation):
        raise TypeError(
            f"activation: expected one of {ACTIVATIONS} or a function of a tensor, got {activation!r}"
        )
    if isinstance(activation, str):
        _check.choice("activation", activation, ACTIVATIONS)
    return [activation] * (layers - 1) + [None]


def _combination(reduce: object, members: int, x: Tensor) -> Tensor | None:
    """The weight of each member, or of each for each item, (K,) or (B, K)."""
    if reduce is None:
        return None
    acc = accumulate_type(x)
    if isinstance(reduce, str):
        _check.choice("reduce", reduce, ("mean", "sum"))
        return x.new_full((members,), 1.0 / members if reduce == "mean" else 1.0, dtype=acc)
    if not isinstance(reduce, Tensor):
        raise TypeError(
            f"reduce: expected None, 'mean', 'sum' or a tensor of weights, got {reduce!r}"
        )
    size = (members,) if reduce.dim() == 1 else (x.shape[0], members)
    _check.like("reduce", reduce, size, x)
    return reduce.to(acc)


def _composed(x, layers, out_first, activations, combine):
    """The formula in torch: activations the kernels do not know, weights that differ by item or learn."""
    members = layers[0][0].shape[0]
    h = x.expand(members, *x.shape) if x.dim() == 2 else x.transpose(0, 1)
    for (weight, bias), activation in zip(layers, activations):
        w = (weight.mT if out_first else weight).to(h.dtype)
        h = torch.matmul(h, w) if bias is None else torch.baddbmm(bias.to(h.dtype)[:, None], h, w)
        if activation is not None:
            h = activation(h) if callable(activation) else getattr(F, activation)(h)
    h = h.transpose(0, 1)
    return h if combine is None else combine_members(h, combine)


def combine_members(y: Tensor, weights: Tensor) -> Tensor:
    """sum_k w_k y_bk, in the accumulator's type; w (K,) or (B, K)."""
    return torch.matmul(weights.expand(y.shape[:2]).unsqueeze(1), y.to(weights.dtype)).squeeze(1).to(
        y.dtype
    )  # fmt: skip


def ensemble_mlp(
    x: Tensor,
    params: Mapping[str, Tensor] | Sequence[Layer],
    *,
    activation: Activation = None,
    reduce: str | Tensor | None = None,
) -> Tensor:
    r"""K perceptrons in one call: $h^l_{bk} = \phi_l(W^l_k h^{l-1}_{bk} + b^l_k)$, $y_{bk} = h^L_{bk}$.

    Args:
        x: (B, I), shared by the members and never expanded in memory, or (B, K, I); float32, float64, bfloat16
            or float16. The output has its dtype; sums run in float32 (float64 for float64).
        params: what `stack_members(modules)` returns, or the dictionary of `torch.func.stack_module_state`
            (weights (K, O, I), torch's own layout); or a list of (weight, bias) pairs with weights (K, I, O),
            the layout of `ensemble_linear`. Biases (K, O), or None. Parameters may be float32 with a
            half-precision x.
        activation: between the layers, none after the last: "relu", "gelu" (with the exact erf) or "silu", in
            the same pass as the products; or any function of a tensor, which is then a pass of its own. None
            takes those of the modules that were stacked, for other `params` none at all.
        reduce: None for every member's output, "mean" or "sum" over members, or weights (K,) or (B, K). A mean,
            a sum and weights (K,) that need no gradient are applied in the same pass, and the members' outputs
            are never written.

    Under autocast x is taken, and y returned, in the autocast dtype, as by `torch.nn.functional.linear`.

    Shapes: x (B, I) or (B, K, I) -> y (B, K, O), or (B, O) with `reduce`.

    Raises:
        ValueError: shapes or devices that do not fit, K = 0, an unknown name.
        TypeError: a dtype or type that does not fit.

    Source: Lakshminarayanan et al., "Deep Ensembles", NeurIPS 2017. The mean of M two-layer networks is the
    predictor of "Exact Learning of Permutations for Nonzero Binary Inputs with Logarithmic Training Size and
    Quadratic Ensemble Complexity", 2025.
    """
    x = check_input(x)
    layers, out_first = _layers_of(params, x)
    members, _ = _check_layers(layers, out_first, x)
    activations = _activations(activation, params, len(layers))
    combine = _combination(reduce, members, x)
    x = autocast(x)
    plain = combine is None or (combine.dim() == 1 and not combine.requires_grad)
    if not plain or any(a not in ACTIVATIONS for a in activations):
        with without_autocast(x):
            return _composed(x, layers, out_first, activations, combine)
    codes = [ACTIVATIONS.index(a) for a in activations]  # type: ignore[arg-type]
    weights = [w for w, _ in layers]
    biases: list[Tensor] = []
    if any(b is not None for _, b in layers):
        axis = 1 if out_first else 2
        biases = [w.new_zeros(members, w.shape[axis]) if b is None else b for w, b in layers]
    if use_reference():
        return ensemble_mlp_reference(x, weights, biases, codes, out_first, combine)[0]
    if needs_graph(x, *weights, *biases):
        return _EnsembleMlp.apply(x, combine, codes, out_first, len(weights), *weights, *biases)
    return _op.ensemble_mlp(x, weights, biases, codes, out_first, combine)
