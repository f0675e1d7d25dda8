r"""Core `adapters`: low-rank or narrow branches over one shared linear layer.

Row n has k slots; slot j names a branch $e = \mathrm{index}_{nj}$ (below 0: none) and has gates
$g_{njc}$ for G groups of the branch's r columns (G = 1: one gate). With $A_e$ (r, I), $B_e$ (O, r):

$$p_{nj} = A_e x_n + c_e,\qquad q_{nj} = s\, g_{nj} \odot \phi(p_{nj}),\qquad
  y_n = W x_n + d + \sum_j B_e q_{nj} .$$

W may be left out: y then starts from zero, or from x (a residual). No O x I delta is ever formed.

The gradient. With $u_{nj} = B_e^\top\mathrm{d}y_n$ and $v_{nj} = s\,g_{nj}\odot u_{nj}\odot\phi'(p_{nj})$:

$$\mathrm{d}x_n = W^\top\mathrm{d}y_n + \sum_j A_e^\top v_{nj},\quad
  \mathrm{d}A_e = \sum_{nj:\,e} v_{nj} x_n^\top,\quad \mathrm{d}c_e = \sum_{nj:\,e} v_{nj},\quad
  \mathrm{d}B_e = \sum_{nj:\,e} \mathrm{d}y_n q_{nj}^\top,$$

$$\mathrm{d}g_{njc} = s\sum_{i\in c} \phi(p_{nj})_i u_{nji},\quad
  \mathrm{d}W = \sum_n \mathrm{d}y_n x_n^\top,\quad \mathrm{d}d = \sum_n \mathrm{d}y_n .$$

Three forms are the same op. *Indexed*: k = 1, no gates. *Sparsely gated*: k slots with a gate each.
*Densely gated* over E branches: one wide branch of E r columns in G = E groups. Rows cut into n blocks
(`melora_linear`) are n times as many rows, each with its block's branch.

Sources: Hu et al., "LoRA", ICLR 2022; many adapters in one batch: Chen et al., "Punica", MLSys 2024; Sheng
et al., "S-LoRA", MLSys 2024; gated: Liu, Luo, "AdaMoLE", COLM 2024. The backward is derived here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _check
from .._activation import activate, delta_of
from .._autograd import differentiable_vjp
from .._registry import accumulate_type, reference
from .._route import needs_graph, readable, use_reference, without_autocast
from ._members import activation_code, autocast, cast_grad, fresh

_op = torch.ops.solera


# ---- reference ---------------------------------------------------------------------------------------


def _matches(index: Tensor, experts: int) -> Tensor:
    """(M, k, E): slot j of row m names branch e."""
    return index.unsqueeze(-1) == torch.arange(experts, device=index.device)


def _per_column(gates: Tensor | None, rank: int, like: Tensor) -> Tensor:
    """The gates (M, k, G) as (M, k, r), or ones."""
    if gates is None:
        return like.new_ones(())
    return gates.to(like.dtype).repeat_interleave(rank // gates.shape[2], 2)


def adapter_linear_reference(
    x, weight, bias, a, a_bias, b, gates, index, scaling, activation, residual
):
    """(y, p of every slot) by the formula, in float32 (float64 for float64), y rounded to x's dtype."""
    acc = accumulate_type(x)
    experts, rank, width = a.shape
    wide = x.to(acc)
    with without_autocast(x):
        rows = wide.reshape(-1, width)
        p = torch.einsum("mi,eri->mer", rows, a.to(acc))
        if a_bias is not None:
            p = p + a_bias.to(acc)
        match = _matches(index, experts)
        gate = torch.einsum(
            "mke,mkr->mer",
            match.to(acc),
            _per_column(gates, rank, rows).expand(*index.shape, rank),
        )
        used = match.any(1).unsqueeze(-1)
        q = torch.where(used, activate(p, activation) * gate * scaling, 0.0)
        y = torch.einsum("mer,eor->mo", q, b.to(acc)).reshape(x.shape[0], -1)
        if weight is not None:
            y = y + torch.nn.functional.linear(wide, weight.to(acc))
    if bias is not None:
        y = y + bias.to(acc)
    if residual:
        y = y + wide
    slots = index.clamp(0, max(experts - 1, 0)).unsqueeze(-1).expand(*index.shape, rank)
    pre = torch.where(match.any(2).unsqueeze(-1), p.gather(1, slots), 0.0)
    return y.to(x.dtype), pre


@reference("adapter_linear")
def _adapter_linear(x, weight, bias, a, a_bias, b, index, gates, scaling, activation, residual):
    y, pre = adapter_linear_reference(
        x, weight, bias, a, a_bias, b, gates, index, scaling, activation, residual
    )
    return fresh(y), fresh(pre)


@reference("adapter_linear_backward")
def _adapter_linear_backward(
    dy, x, weight, a, b, pre, index, gates, scaling, activation, residual, need_x, need_weight,
    need_bias, need_a, need_a_bias, need_b, need_gates,
):  # fmt: skip
    acc = accumulate_type(x)
    experts, rank, width = a.shape
    wide, g = x.to(acc), dy.to(acc)
    rows = wide.reshape(-1, width)
    out = g.reshape(rows.shape[0], -1)
    match = _matches(index, experts)
    used = match.any(2).unsqueeze(-1)
    gate = _per_column(gates, rank, rows)
    u = torch.einsum("mo,eor->mer", out, b.to(acc))
    slots = index.clamp(0, max(experts - 1, 0)).unsqueeze(-1).expand(*index.shape, rank)
    u = torch.where(used, u.gather(1, slots), 0.0)  # (M, k, r)
    t = activate(pre, activation)
    v = torch.where(used, delta_of(u, pre, activation) * gate * scaling, 0.0)
    q = torch.where(used, t * gate * scaling, 0.0)
    match = match.to(acc)
    dx = torch.einsum("mke,mkr,eri->mi", match, v, a.to(acc)).reshape(x.shape)
    if weight is not None:
        dx = dx + g @ weight.to(acc)
    if residual:
        dx = dx + g
    none = x.new_empty(0, dtype=acc)
    dgates = none if gates is None else (t * u * scaling).unflatten(2, (gates.shape[2], -1)).sum(3)
    dweight = none if weight is None else (g.mT @ wide).to(weight.dtype)
    return (
        fresh(dx.to(x.dtype), need_x),
        fresh(dweight, need_weight),
        fresh(g.sum(0), need_bias),
        fresh(torch.einsum("mke,mkr,mi->eri", match, v, rows), need_a),
        fresh(torch.einsum("mke,mkr->er", match, v), need_a_bias),
        fresh(torch.einsum("mke,mkr,mo->eor", match, q, out), need_b),
        fresh(dgates, need_gates),
    )


# ---- autograd ----------------------------------------------------------------------------------------


class _AdapterLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, a, a_bias, b, gates, index, scaling, activation, residual):
        y, pre = _op.adapter_linear(
            x, weight, bias, a, a_bias, b, index, gates, scaling, activation, residual
        )
        ctx.settings = scaling, activation, residual
        ctx.save_for_backward(x, weight, bias, a, a_bias, b, gates, index, pre)
        return y

    @staticmethod
    def backward(ctx, dy):
        *tensors, index, pre = ctx.saved_tensors
        x, weight, bias, a, a_bias, b, gates = tensors
        needs = ctx.needs_input_grad[:7]
        if torch.is_grad_enabled():

            def layer(x, weight, bias, a, a_bias, b, gates):
                inputs = (x, weight, bias, a, a_bias, b, gates, index)
                return adapter_linear_reference(*inputs, *ctx.settings)[0]

            return *differentiable_vjp(layer, tensors, needs, (dy,)), None, None, None, None
        dx, dweight, dbias, da, da_bias, db, dgates = _op.adapter_linear_backward(
            dy, x, weight, a, b, pre, index, gates, *ctx.settings, *needs
        )
        return (
            dx if needs[0] else None,
            dweight if needs[1] else None,
            cast_grad(dbias, bias, needs[2]),
            cast_grad(da, a, needs[3]),
            cast_grad(da_bias, a_bias, needs[4]),
            cast_grad(db, b, needs[5]),
            cast_grad(dgates, gates, needs[6]),
            None,
            None,
            None,
            None,
        )


def branches(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    index: Tensor,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    a_bias: Tensor | None = None,
    gates: Tensor | None = None,
    scaling: float = 1.0,
    activation: int = 0,
    residual: bool = False,
) -> Tensor:
    """The op on checked arguments: x (N, I), index (M, k), gates (M, k, G); M rows of a's width in all."""
    tensors = x, weight, bias, a, a_bias, b, gates
    if use_reference():
        return adapter_linear_reference(*tensors, index, scaling, activation, residual)[0]
    if needs_graph(*tensors):
        return _AdapterLinear.apply(*tensors, index, scaling, activation, residual)
    return _op.adapter_linear(
        x, weight, bias, a, a_bias, b, index, gates, scaling, activation, residual
    )[0]


def shared_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The shared layer alone, x (N, I): the op with a branch of rank 0 that no row takes."""
    a, b = weight.new_empty((1, 0, x.shape[1])), weight.new_empty((1, weight.shape[0], 0))
    index = torch.full((x.shape[0], 1), -1, dtype=torch.int64, device=x.device)
    return branches(x, a, b, index, weight=weight, bias=bias)


# ---- checks ------------------------------------------------------------------------------------------


def check_factors(
    a: object, b: object, x: Tensor, names: tuple[str, str] = ("a", "b"), x_name: str = "x"
) -> None:
    """a (E, r, I) and b (E, O, r) that go with x (..., I)."""
    a = _check.tensor(names[0], a, dim=3)
    b = _check.tensor(names[1], b, dim=3)
    if a.shape[0] == 0:
        raise ValueError(
            f"{names[0]}: expected at least one adapter (E >= 1), got {tuple(a.shape)}"
        )
    _check.like(names[0], a, (a.shape[0], a.shape[1], x.shape[-1]), x, x_name)
    _check.like(names[1], b, (a.shape[0], b.shape[1], a.shape[1]), x, x_name)


def check_weight(weight: object, bias: object, out: int, x: Tensor) -> None:
    """weight (O, I) and bias (O,) or None."""
    _check.like("weight", _check.tensor("weight", weight, dim=2), (out, x.shape[-1]), x)
    if bias is not None:
        _check.like("bias", bias, (out,), x)


def check_index(index: object, experts: int, x: Tensor, validate: bool | None) -> Tensor:
    """An integer tensor on x's device with values in [-1, E), as int64."""
    _check.choice("validate", validate, (None, True, False))
    if not isinstance(index, Tensor):
        raise TypeError(f"index: expected an integer tensor, got {type(index).__name__}")
    if index.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise TypeError(f"index: expected an integer dtype, got {index.dtype}")
    if index.device != x.device:
        raise ValueError(f"index: expected device {x.device} (that of x), got {index.device}")
    index = index.long()
    if validate is None:
        validate = readable(index)
    if validate and not torch._C._are_functorch_transforms_active() and index.numel():
        low, high = int(index.min()), int(index.max())
        if low < -1 or high >= experts:
            raise ValueError(
                f"index: expected values in [-1, {experts}) (-1: no adapter), got "
                f"{low if low < -1 else high}"
            )
    return index


def _per_row(name: str, t: Tensor, x: Tensor, last: int | None) -> Tensor:
    """t given per row, or per sample of x (B, T, I), as (N, k): its last dimension k is `last` or any."""
    lead = x.shape[:-1]
    for shape in (lead, lead[:1]):
        if t.shape == shape and last is None:
            per_row, k = t.unsqueeze(-1), 1
        elif t.dim() == len(shape) + 1 and t.shape[:-1] == shape and last in (None, t.shape[-1]):
            per_row, k = t, t.shape[-1]
        else:
            continue
        if len(shape) < len(lead):
            per_row = per_row.reshape(lead[0], *[1] * (len(lead) - 1), k).expand(*lead, k)
        return per_row.reshape(lead.numel(), k)
    raise ValueError(
        f"{name}: expected one entry (or k in a last dimension) for each row {tuple(lead)} or each "
        f"sample {tuple(lead[:1])} of x, got shape {tuple(t.shape)}"
    )


# ---- public functions --------------------------------------------------------------------------------


def multi_lora_linear(
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    index: Tensor | None = None,
    gates: Tensor | None = None,
    scaling: float | Tensor = 1.0,
    bias: Tensor | None = None,
    validate: bool | None = None,
) -> Tensor:
    r"""A linear layer with E low-rank adapters: $y_n = Wx_n + d + s\sum_e g_{ne} B_e A_e x_n$.

    The products stay low-rank: no (O, I) delta is formed, and with an index only the needed columns are
    computed. Gradients go to x, a, b, gates, and to weight and bias where they require them.

    Args:
        x: (N, I) or (B, T, I) (any number of leading dimensions); float32, float64, bfloat16, float16.
        weight: (O, I), frozen or trained; bias: (O,) or None. Parameters may be float32 with a half x.
        a: (E, r, I); b: (E, O, r).
        index: which adapter a row takes, integers, -1 for none: per row (the leading shape of x), per
            sample (B,), or with a last dimension of k adapters a row.
        gates: with index, of its shape: the weight of each adapter named. Without: weights of all E
            adapters, (..., E) per row or (B, E) per sample.
            With neither, members are dense: x (E, ..., I) has rows of its own for each, or an x (T, I) is
            shared by all; both give (E, ..., O).
        scaling: the number s (LoRA's alpha / r), or (E,) for one of each adapter.
        validate: check that the index is in [-1, E). None: for eager CPU tensors. Where it is not checked,
            an index outside names no adapter.

    Under autocast x is taken, and y returned, in the autocast dtype.

    Shapes: x (..., I) -> y (..., O); a shared x (T, I) -> (E, T, O).

    Raises:
        ValueError: shapes, devices or index values that do not fit.
        TypeError: a dtype that does not fit, or an argument that is not a tensor.

    Source: Hu et al., "LoRA", 2022; rows of many adapters: Chen et al., "Punica", 2024; members side by side:
    Li et al., "Ensembles of Low-Rank Expert Adapters", 2025; generated per sample: Phang et al.,
    "HyperTuning", 2022.
    """
    x = _check.tensor("x", x, min_dim=2)
    check_factors(a, b, x)
    experts, rank, width = a.shape
    out = b.shape[1]
    check_weight(weight, bias, out, x)
    if isinstance(scaling, Tensor):
        _check.like("scaling", scaling, (experts,), x)
        b, scaling = b * scaling.to(b.dtype)[:, None, None], 1.0
    else:
        scaling = _check.number("scaling", scaling)
    if gates is not None:
        gates = _check.tensor("gates", gates)
        if gates.device != x.device:
            raise ValueError(f"gates: expected device {x.device} (that of x), got {gates.device}")
    if index is not None:
        index = check_index(index, experts, x, validate)
        if gates is not None and gates.shape != index.shape:
            raise ValueError(
                f"gates: expected the shape of index {tuple(index.shape)}, got {tuple(gates.shape)}"
            )
    x = autocast(x)
    lead = x.shape[:-1]
    rows = x.reshape(lead.numel(), width)
    shared: dict[str, Any] = {"weight": weight, "bias": bias, "scaling": scaling}
    if index is not None:
        places = _per_row("index", index, x, None)
        if gates is not None:
            shared["gates"] = _per_row("gates", gates, x, None).unsqueeze(-1)
        return branches(rows, a, b, places, **shared).reshape(*lead, out)
    if gates is not None:
        each = _per_row("gates", gates, x, experts).unsqueeze(1)
        return dense_branches(rows, a, b, gates=each, **shared).reshape(*lead, out)
    if x.dim() > 2:
        if lead[0] != experts:
            raise ValueError(
                f"x: expected {experts} members in the first dimension to go with a of shape "
                f"{tuple(a.shape)} (or an index, or gates), got shape {tuple(x.shape)}"
            )
        places = torch.arange(experts, device=x.device).repeat_interleave(lead[1:].numel())
        return branches(rows, a, b, places.unsqueeze(1), **shared).reshape(*lead, out)
    base = shared_linear(x, weight, bias)
    z = torch.einsum("ti,eri->etr", x, a.to(x.dtype))
    return torch.baddbmm(base.expand(experts, *base.shape), z, b.to(x.dtype).mT, alpha=scaling)


def dense_branches(x: Tensor, a: Tensor, b: Tensor, *, a_bias=None, **settings) -> Tensor:
    """All branches of every row as a single one of E r columns; gates (N, 1, E) or None."""
    experts, rank, width = a.shape
    wide_a = a.reshape(1, experts * rank, width)
    wide_b = b.permute(1, 0, 2).reshape(1, b.shape[1], experts * rank)
    index = torch.zeros((x.shape[0], 1), dtype=torch.int64, device=x.device)
    if a_bias is not None:
        a_bias = a_bias.reshape(1, experts * rank)
    return branches(x, wide_a, wide_b, index, a_bias=a_bias, **settings)


def moe_lora_linear(
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    gates: Tensor,
    *,
    index: Tensor | None = None,
    scaling: float | Tensor = 1.0,
    bias: Tensor | None = None,
    validate: bool | None = None,
) -> Tensor:
    r"""A mixture of LoRA experts: $y_n = Wx_n + d + s\sum_e g_{ne} B_e A_e x_n$.

    With `top_k_gate` give its gates and index, and only the experts named are computed. Gates without an
    index, such as those of `threshold_gate`, weigh all E; the work on an expert is then the same whether
    its gate is zero or not.

    Args:
        x: (..., I); weight: (O, I); bias: (O,) or None; a: (E, r, I); b: (E, O, r).
        gates: (..., E), or of the index's shape.
        index: (..., k) integers, -1 for none.
        scaling, validate: as in `multi_lora_linear`.

    Shapes: x (..., I) -> y (..., O).

    Raises:
        ValueError, TypeError: as `multi_lora_linear`.

    Source: Liu, Luo, "AdaMoLE: Fine-Tuning Large Language Models with Adaptive Mixture of Low-Rank Adaptation
    Experts", 2024; Fan et al., "Make LoRA Great Again", 2025.
    """
    if gates is None:
        raise TypeError("gates: expected a torch.Tensor, got None")
    return multi_lora_linear(
        x, weight, a, b, index=index, gates=gates, scaling=scaling, bias=bias, validate=validate
    )


def batched_adapter(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    index: Tensor | None = None,
    *,
    down_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    activation: str | None = "relu",
    residual: bool = True,
    scaling: float = 1.0,
    validate: bool | None = None,
) -> Tensor:
    r"""Bottleneck adapters, one for each row: $y_n = x_n + s\,(U_e\,\phi(D_e x_n + c_e) + f_e)$.

    Args:
        x: (..., D); down: (E, m, D); up: (E, D, m); down_bias: (E, m); up_bias: (E, D).
        index: per row or per sample as in `multi_lora_linear`, -1 for none (y = x). None: x (E, ..., D) has
            rows of its own for each adapter.
        activation: None, "relu", "gelu" or "silu".
        residual: whether x is added.
        scaling: the number s.
        validate: as in `multi_lora_linear`.

    Shapes: x (..., D) -> (..., D). The up bias is a second pass, of one gathered row a row.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Houlsby et al., "Parameter-Efficient Transfer Learning for NLP", 2019; several adapters in a batch
    (Parallel, BatchSplit): Poth et al., "Adapters: A Unified Library for Parameter-Efficient and Modular
    Transfer Learning", 2023.
    """
    x = _check.tensor("x", x, min_dim=2)
    code = activation_code(activation)
    check_factors(down, up, x, ("down", "up"))
    experts, rank, width = down.shape
    if residual and up.shape[1] != width:
        raise ValueError(
            f"up: expected {width} outputs to be added to x of shape {tuple(x.shape)}, got "
            f"{tuple(up.shape)}"
        )
    if down_bias is not None:
        _check.like("down_bias", down_bias, (experts, rank), x)
    if up_bias is not None:
        _check.like("up_bias", up_bias, (experts, up.shape[1]), x)
    scaling = _check.number("scaling", scaling)
    x = autocast(x)
    lead = x.shape[:-1]
    if index is None:
        if x.dim() < 3 or lead[0] != experts:
            raise ValueError(
                f"x: expected {experts} members in the first dimension (or an index), got shape "
                f"{tuple(x.shape)}"
            )
        places = torch.arange(experts, device=x.device).repeat_interleave(lead[1:].numel())[:, None]
    else:
        places = _per_row("index", check_index(index, experts, x, validate), x, None)
    y = branches(
        x.reshape(lead.numel(), width), down, up, places, a_bias=down_bias, scaling=scaling,
        activation=code, residual=residual,
    )  # fmt: skip
    if up_bias is not None:
        named = (places >= 0) & (places < experts)
        rows = up_bias[places.clamp(0, experts - 1)] * named.unsqueeze(-1)
        y = y + (scaling * rows.sum(1)).to(y.dtype)
    return y.reshape(*lead, up.shape[1])
