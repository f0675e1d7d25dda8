r"""Core `batch_ensemble_mlp`: a whole network of layers that share their weights among K members.

Layer l of L has a weight $W_l$ (O, I) for all members and scales $r_{lk}$, $s_{lk}$ and a bias $b_{lk}$ for each;
with $a_0 = x$ and a dropout mask $m_l$ (0 or 1/(1 - p), all ones when not training)

$$u_{lk} = r_{lk} \odot a_{l-1,k},\qquad h_{lk} = W_l\,u_{lk},\qquad z_{lk} = s_{lk} \odot h_{lk} + b_{lk},\qquad
  a_{lk} = m_l \odot \phi_l(z_{lk}) .$$

A row (batch item, member) passes through all layers by itself, so a tile of rows stays in cache from x to the
last $a_L$; what leaves a layer is $u_{l+1}$, ready for the next product. Kept for backward: the products $h_l$
alone, rounded to x's dtype (forward goes on from the rounded value, so both see the same). From them z and a are
recomputed, nothing is recovered by division, and zeros in r or s are as good as any value. With $g_l$ the
gradient of $a_l$,

$$\delta_l = \phi_l'(z_l) \odot m_l \odot g_l,\quad e_l = s_l \odot \delta_l,\quad d_l = W_l^\top e_l,\quad
  g_{l-1} = r_l \odot d_l,$$
$$\mathrm{d}W_l = \textstyle\sum_{bk} e_l u_l^\top,\quad \mathrm{d}b_{lk} = \sum_b \delta_l,\quad
  \mathrm{d}s_{lk} = \sum_b \delta_l \odot h_l,\quad \mathrm{d}r_{lk} = \sum_b d_l \odot a_{l-1} :$$

two products a layer, which are needed anyway, and every other gradient a sum over values that pass by. Of the
first layer, whose $d_1$ would serve $\mathrm{d}r_1$ only, the member products of core `batch_ensemble` take the
place of both.

The mask of layer l keeps element (row n, column o) if its 16 random bits are at least round(65536 p); they come
from Philox4x32-10 of the seed: half o/16 mod 8 of the block with counter (16 (o/128) + o mod 16, n, n / 2^32, l).

Sources: Gorishniy, Kotelnikov, Babenko, "TabM", ICLR 2025; Wen, Tran, Ba, "BatchEnsemble", ICLR 2020; the
backward is derived here. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011 (Philox).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _check
from .._activation import activate, delta_of
from .._autograd import differentiable_vjp
from .._registry import accumulate_type, reference
from .._route import needs_graph, use_reference, without_autocast
from ._members import (
    activation_code,
    autocast,
    by_member,
    cast_grad,
    check_bias,
    check_input,
    fresh,
)
from .member_linear import ensemble_linear

_op = torch.ops.solera
HAS_R, HAS_S, HAS_BIAS = 8, 16, 32  # bits of a layer's kind, beside its activation
Layer = Sequence[Tensor | None]


# ---- reference ---------------------------------------------------------------------------------------


def unpack(parameters: Sequence[Tensor], kinds: Sequence[int]) -> list[tuple]:
    """Per layer (weight, r, s, bias, activation), None for what a layer does not have."""
    given = iter(parameters)
    layers = []
    for kind in kinds:
        weight = next(given)
        rest = [next(given) if kind & bit else None for bit in (HAS_R, HAS_S, HAS_BIAS)]
        layers.append((weight, *rest, kind & 7))
    return layers


def members_of(x: Tensor, layers: Sequence[tuple]) -> int:
    """K, from x or from the first scale or bias that has a row for each member."""
    if x.dim() == 3:
        return x.shape[1]
    for layer in layers:
        for t in layer[1:4]:
            if isinstance(t, Tensor) and t.dim() == 2:
                return t.shape[0]
    raise ValueError(
        "x: a shared x (B, I) does not tell the number of members; expected x (B, K, I), or an r, s or bias "
        f"(K, .) in some layer, got x of shape {tuple(x.shape)} and none of them"
    )


def keep_threshold(p: float) -> int:
    """Dropout in units of 2^-16: an element is kept if its 16 random bits reach this."""
    return round(p * 65536)


def dropout_mask(seed: Tensor, layer: int, like: Tensor, p: float) -> Tensor:
    """0 or 1/(1 - p) for each element of a layer's output (B, K, O), p rounded to 2^-16."""
    from ..weights.ema import philox

    low, cut = 0xFFFFFFFF, keep_threshold(p)
    rows, columns = like.shape[0] * like.shape[1], like.shape[2]
    n = torch.arange(rows, device=like.device).unsqueeze(1)
    o = torch.arange(columns, device=like.device)
    zero = torch.zeros(rows, columns, dtype=torch.int64, device=like.device)
    counter = (zero + o // 128 * 16 + o % 16, zero + (n & low), zero + (n >> 32), zero + layer)
    words = philox(counter, (seed & low, (seed >> 32) & low))
    half = (o % 128 // 16 + zero).unsqueeze(0)
    word = torch.stack(words).gather(0, half // 2).squeeze(0)
    bits = torch.where(half[0] % 2 == 0, word & 0xFFFF, word >> 16)
    scale = 65536 / (65536 - cut) if cut < 65536 else 0.0
    return ((bits >= cut).to(like.dtype) * scale).view(like.shape)


def _through(
    h: Tensor, s, bias, activation: int, acc, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(z, a) of a layer from its product h."""
    z = h.to(acc)
    if s is not None:
        z = z * s.to(acc)
    if bias is not None:
        z = z + bias.to(acc)
    a = activate(z, activation)
    return z, a if mask is None else a * mask


def network_reference(
    x: Tensor, parameters, kinds, dropout: float, seed: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    """(y, the products h) by the formula, in float32 (float64 for float64); h and y in x's dtype."""
    acc = accumulate_type(x)
    a = by_member(x).to(acc)
    layers = unpack(parameters, kinds)
    members = members_of(x, layers)
    products = []
    for index, (weight, r, s, bias, activation) in enumerate(layers):
        u = a if r is None else a * r.to(acc)
        with without_autocast(x):
            h = (u @ weight.to(acc).T).expand(-1, members, -1).to(x.dtype)
        mask = None if seed is None else dropout_mask(seed, index, h.to(acc), dropout)
        products.append(h)
        _, a = _through(h, s, bias, activation, acc, mask)
    return a.to(x.dtype), products


@reference("batch_ensemble_mlp")
def _batch_ensemble_mlp(x, parameters, kinds, dropout, seed):
    return fresh(network_reference(x, parameters, kinds, dropout, seed)[0])


@reference("batch_ensemble_mlp_saved")
def _batch_ensemble_mlp_saved(x, parameters, kinds, dropout, seed):
    y, products = network_reference(x, parameters, kinds, dropout, seed)
    return fresh(y), [fresh(h) for h in products]


@reference("batch_ensemble_mlp_backward")
def _batch_ensemble_mlp_backward(dy, x, parameters, products, kinds, dropout, seed, need_x, needs):
    acc = accumulate_type(x)
    layers = unpack(parameters, kinds)
    members = dy.shape[1]
    values = []  # (mask, z, a) of each layer
    for index, (h, (_, _, s, bias, activation)) in enumerate(zip(products, layers)):
        mask = None if seed is None else dropout_mask(seed, index, h.to(acc), dropout)
        values.append((mask, *_through(h, s, bias, activation, acc, mask)))
    g = dy.to(acc)
    grads: list[Tensor] = []  # of the parameters, last to first
    for index in range(len(layers) - 1, -1, -1):
        weight, r, s, bias, activation = layers[index]
        mask, z, _ = values[index]
        before = values[index - 1][2] if index else by_member(x).to(acc).expand(-1, members, -1)
        delta = delta_of(g if mask is None else g * mask, z, activation)
        e = delta if s is None else delta * s.to(acc)
        d = e @ weight.to(acc)
        u = before if r is None else before * r.to(acc)
        if bias is not None:
            grads.append(delta.sum(0) if bias.dim() == 2 else delta.sum((0, 1)))
        if s is not None:
            grads.append((delta * products[index].to(acc)).sum(0))
        if r is not None:
            grads.append((d * before).sum(0))
        grads.append(e.flatten(0, 1).T @ u.flatten(0, 1))
        g = d if r is None else d * r.to(acc)
    if x.dim() == 2:
        g = g.sum(1)
    return fresh(g.to(x.dtype), need_x), [fresh(t, n) for t, n in zip(grads[::-1], needs)]


# ---- autograd ----------------------------------------------------------------------------------------


class _BatchEnsembleMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, kinds, dropout, seed, *parameters):
        y, products = _op.batch_ensemble_mlp_saved(x, parameters, kinds, dropout, seed)
        ctx.layout = kinds, dropout
        ctx.count = len(parameters)
        ctx.save_for_backward(x, seed, *parameters, *products)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, seed, *rest = ctx.saved_tensors
        parameters, products = rest[: ctx.count], rest[ctx.count :]
        kinds, dropout = ctx.layout
        needs = ctx.needs_input_grad[0], *ctx.needs_input_grad[4:]
        if torch.is_grad_enabled():

            def network(x, *parameters):
                return network_reference(x, parameters, kinds, dropout, seed)[0]

            grads = differentiable_vjp(network, (x, *parameters), needs, (dy,))
            return grads[0], None, None, None, *grads[1:]
        dx, grads = _op.batch_ensemble_mlp_backward(
            dy, x, parameters, products, kinds, dropout, seed, needs[0], list(needs[1:])
        )
        cast = (cast_grad(*three) for three in zip(grads, parameters, needs[1:]))
        return dx if needs[0] else None, None, None, None, *cast


# ---- public functions --------------------------------------------------------------------------------


def _activations(activation: object, count: int) -> list[int]:
    """The codes of the layers' activations: one for all, or one each."""
    if isinstance(activation, (list, tuple)):
        if len(activation) != count:
            raise ValueError(
                f"activation: expected one for each of the {count} layers, got {len(activation)}"
            )
        return [activation_code(name) for name in activation]
    return [activation_code(activation)] * count


def _layers(layers: object) -> list[tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]]:
    if not isinstance(layers, (list, tuple)) or not layers:
        raise ValueError(
            "layers: expected a list of at least one (weight, r, s, bias), got "
            f"{type(layers).__name__} {layers if not layers else ''}"
        )
    for index, layer in enumerate(layers):
        if not isinstance(layer, (list, tuple)) or len(layer) != 4:
            raise ValueError(
                f"layers[{index}]: expected (weight, r, s, bias), None for what is left out, got "
                f"{type(layer).__name__} of {len(layer) if isinstance(layer, (list, tuple)) else 1}"
            )
    return [tuple(layer) for layer in layers]


def tabm_mlp(
    x: Tensor,
    layers: Sequence[Layer],
    *,
    activation: str | Sequence[str | None] | None = "relu",
    head: tuple[Tensor, Tensor | None] | None = None,
    dropout_p: float = 0.0,
    training: bool = True,
    seed: Tensor | None = None,
) -> Tensor:
    r"""A whole TabM network: K multilayer perceptrons that share their weights, in one pass.

    Layer by layer $a_{bk} \leftarrow m \odot \phi\bigl(s_k \odot W(r_k \odot a_{bk}) + b_k\bigr)$ from a = x, then,
    with a head, $y_{bk} = V_k^\top a_{bk} + c_k$. Tiles of rows stay in cache through all layers; backward keeps
    one product a layer. Same values as a chain of `batch_ensemble_linear` up to rounding.

    Args:
        x: (B, I), shared by all members and never expanded in memory, or (B, K, I); float32, float64,
            bfloat16 or float16. The output has its dtype; sums run in float32 (float64 for float64).
        layers: (weight, r, s, bias) of each layer: weight (O, I), r (K, I) or None, s (K, O) or None, bias
            (K, O), (O,) or None. A layer's I is the O of the one before. Half-precision x may come with
            float32 parameters.
        activation: after every layer: None, "relu", "gelu" (with the exact erf) or "silu", or a list of one
            for each layer.
        head: (weight (K, O, C), bias (K, C), (C,) or None) of a last layer of separate weights, as
            `ensemble_linear` takes them.
        dropout_p: the probability of setting an element to zero after each activation (rounded to 2^-16), in
            training only.
        training: whether to drop out.
        seed: an int64 tensor of one element that fixes the masks; drawn from torch's generator when None.

    Shapes: x (B, I) or (B, K, I) -> (B, K, O of the last layer), or (B, K, C) with a head.

    Raises:
        ValueError: shapes or devices that do not fit, no layers, K = 0, or a shared x with nothing that tells K.
        TypeError: a dtype that does not fit, or an argument that is not a tensor.

    Source: Gorishniy, Kotelnikov, Babenko, "TabM: Advancing Tabular Deep Learning with Parameter-Efficient
    Ensembling", ICLR 2025; the layers: Wen, Tran, Ba, "BatchEnsemble", ICLR 2020.
    """
    x = check_input(x)
    chain = _layers(layers)
    codes = _activations(activation, len(chain))
    members = members_of(x, chain)
    if members == 0:
        raise ValueError(f"x: expected at least one member (K >= 1), got K = 0, x {tuple(x.shape)}")
    p = _check.number("dropout_p", dropout_p, low=0.0, high=1.0)
    width = x.shape[-1]
    parameters: list[Tensor] = []
    for index, (weight, r, s, bias) in enumerate(chain):
        name = f"layers[{index}]"
        _check.tensor(f"{name} weight", weight, dim=2)
        out = weight.shape[0]
        _check.like(f"{name} weight", weight, (out, width), x)
        if r is not None:
            _check.like(f"{name} r", r, (members, width), x)
            codes[index] |= HAS_R
        if s is not None:
            _check.like(f"{name} s", s, (members, out), x)
            codes[index] |= HAS_S
        if bias is not None:
            check_bias(bias, members, out, x, f"{name} bias")
            codes[index] |= HAS_BIAS
        parameters += [t for t in (weight, r, s, bias) if t is not None]
        width = out
    if head is not None and (not isinstance(head, (list, tuple)) or len(head) != 2):
        raise TypeError(f"head: expected a pair (weight, bias), got {type(head).__name__}")
    if not (training and p > 0):
        p, seed = 0.0, None
    elif seed is None:
        seed = torch.randint(-(2**63), 2**63 - 1, (), device=x.device)
    elif not isinstance(seed, Tensor) or seed.dtype != torch.int64 or seed.numel() != 1:
        raise TypeError(f"seed: expected an int64 tensor of one element, got {seed!r}")
    x = autocast(x)
    if x.dim() == 3 and x.stride(1) == 0 and members > 1 and not x.requires_grad:
        x = x[:, 0]  # what the members share is read once
    if use_reference():
        y = network_reference(x, parameters, codes, p, seed)[0]
    elif needs_graph(x, *parameters):
        y = _BatchEnsembleMLP.apply(x, codes, p, seed, *parameters)
    else:
        y = _op.batch_ensemble_mlp(x, parameters, codes, p, seed)
    return y if head is None else ensemble_linear(y, *head)
