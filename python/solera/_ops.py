"""The table of contents: every op's schema in one block, then the kernels are attached.

An op `name` of the core `family.core` has four rooms, all by the same name:

    python/solera/<family>/<core>.py    its reference (`@reference("name")`), autograd, public function
    csrc/cpu/<family>/<core>.cpp        its CPU kernel
    triton_kernels/<family>/<core>.py   its GPU launcher, a function called `name`
    tests/ and bench/ <family>/<core>.py

A function decorated by `op(...)` is the op's fake: shapes, dtypes and strides. Where none is given the
reference is run on fake tensors instead: it returns what the kernels return, and `opcheck` holds them to it.
"""

from __future__ import annotations

import torch

from . import _registry
from ._registry import accumulate_type, op

# ---- norm.row_norm -----------------------------------------------------------------------------------


@op(
    "norm.row_norm",
    "row_norm(Tensor x, Tensor? weight, Tensor? bias, float eps, float weight_offset, bool centred)"
    " -> Tensor",
)
def _(x, weight, bias, eps, weight_offset, centred):
    return x.new_empty(x.shape)


@op(
    "norm.row_norm",
    "row_norm_stats(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps,"
    " float residual_scale, float weight_offset, bool centred)"
    " -> (Tensor y, Tensor u, Tensor mean, Tensor rstd)",
)
def _(x, residual, weight, bias, eps, residual_scale, weight_offset, centred):
    stats = accumulate_type(x)
    return (
        x.new_empty(x.shape),
        x.new_empty(x.shape if residual is not None else (0,)),
        x.new_empty(x.shape[:-1] if centred else (0,), dtype=stats),
        x.new_empty(x.shape[:-1], dtype=stats),
    )


@op(
    "norm.row_norm",
    "row_norm_backward(Tensor dy, Tensor? du, Tensor u, Tensor? weight, Tensor mean, Tensor rstd,"
    " float weight_offset, bool centred, bool need_x, bool need_weight, bool need_bias)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias)",
)
def _(
    dy, du, u, weight, mean, rstd, weight_offset, centred, need_x, need_weight, need_bias
):  # fmt: skip
    stats = accumulate_type(u)
    return (
        u.new_empty(u.shape if need_x else (0,)),
        u.new_empty((u.shape[-1],) if need_weight else (0,), dtype=stats),
        u.new_empty((u.shape[-1],) if need_bias else (0,), dtype=stats),
    )


# ---- ensemble.batch_ensemble -------------------------------------------------------------------------

# Shapes: x (B, K, I) or, shared by the members, (B, I); y, dy (B, K, O). activation is the index in
# ensemble._activation.ACTIVATIONS. `saved` is y for relu, the pre-activation z for gelu and silu.


def _members(x, r, s, bias):
    if x.dim() == 3:
        return x.shape[1]
    return next(t.shape[0] for t in (r, s, bias) if t is not None and t.dim() == 2)


def _saved_shape(y, activation):
    return y if activation >= 2 else (0,)


@op(
    "ensemble.batch_ensemble",
    "batch_ensemble(Tensor x, Tensor weight, Tensor? r, Tensor? s, Tensor? bias, int activation) -> Tensor",
)
def _(x, weight, r, s, bias, activation):
    return x.new_empty((x.shape[0], _members(x, r, s, bias), weight.shape[0]))


@op(
    "ensemble.batch_ensemble",
    "batch_ensemble_saved(Tensor x, Tensor weight, Tensor? r, Tensor? s, Tensor? bias, int activation)"
    " -> (Tensor y, Tensor z)",
)
def _(x, weight, r, s, bias, activation):
    y = (x.shape[0], _members(x, r, s, bias), weight.shape[0])
    return x.new_empty(y), x.new_empty(_saved_shape(y, activation))


@op(
    "ensemble.batch_ensemble",
    "batch_ensemble_backward(Tensor dy, Tensor x, Tensor weight, Tensor? r, Tensor? s, Tensor? saved,"
    " int activation, bool bias_per_member, bool need_x, bool need_weight, bool need_r, bool need_s,"
    " bool need_bias) -> (Tensor dx, Tensor dweight, Tensor dr, Tensor ds, Tensor dbias)",
)
def _(
    dy, x, weight, r, s, saved, activation, bias_per_member,
    need_x, need_weight, need_r, need_s, need_bias,
):  # fmt: skip
    acc = accumulate_type(x)
    out, inner = weight.shape
    members = dy.shape[1]
    bias = (members, out) if bias_per_member else (out,)
    return (
        x.new_empty(x.shape if need_x else (0,)),
        x.new_empty((out, inner) if need_weight else (0,), dtype=acc),
        x.new_empty((members, inner) if need_r else (0,), dtype=acc),
        x.new_empty((members, out) if need_s else (0,), dtype=acc),
        x.new_empty(bias if need_bias else (0,), dtype=acc),
    )


# ---- ensemble.member_linear --------------------------------------------------------------------------


@op(
    "ensemble.member_linear",
    "member_linear(Tensor x, Tensor weight, Tensor? bias, int activation) -> Tensor",
)
def _(x, weight, bias, activation):
    return x.new_empty((x.shape[0], weight.shape[0], weight.shape[2]))


@op(
    "ensemble.member_linear",
    "member_linear_saved(Tensor x, Tensor weight, Tensor? bias, int activation) -> (Tensor y, Tensor z)",
)
def _(x, weight, bias, activation):
    y = (x.shape[0], weight.shape[0], weight.shape[2])
    return x.new_empty(y), x.new_empty(_saved_shape(y, activation))


@op(
    "ensemble.member_linear",
    "member_linear_backward(Tensor dy, Tensor x, Tensor weight, Tensor? saved, int activation,"
    " bool bias_per_member, bool need_x, bool need_weight, bool need_bias)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias)",
)
def _(dy, x, weight, saved, activation, bias_per_member, need_x, need_weight, need_bias):
    members, _, out = weight.shape
    bias = (members, out) if bias_per_member else (out,)
    return (
        x.new_empty(x.shape if need_x else (0,)),
        weight.new_empty(weight.shape if need_weight else (0,)),
        x.new_empty(bias if need_bias else (0,), dtype=accumulate_type(x)),
    )


# ---- sinkhorn.dense ----------------------------------------------------------------------------------


@op(
    "sinkhorn.dense",
    "sinkhorn_dense(Tensor cost, Tensor a, Tensor b, Tensor? f, Tensor? g, float epsilon,"
    " int max_iterations, float tolerance, int check_every)"
    " -> (Tensor f, Tensor g, Tensor value, Tensor iterations, Tensor error, Tensor converged)",
)
def _(cost, a, b, f, g, epsilon, max_iterations, tolerance, check_every):
    batch, n, m = cost.shape
    return (
        cost.new_empty((batch, n)),
        cost.new_empty((batch, m)),
        cost.new_empty((batch,)),
        cost.new_empty((batch,), dtype=torch.int64),
        cost.new_empty((batch,)),
        cost.new_empty((batch,), dtype=torch.bool),
    )


# ---- sinkhorn.plan -----------------------------------------------------------------------------------


@op(
    "sinkhorn.plan",
    "sinkhorn_plan(Tensor cost, Tensor a, Tensor b, Tensor f, Tensor g, Tensor x, Tensor? y,"
    " float epsilon) -> Tensor",
)
def _(cost, a, b, f, g, x, y, epsilon):
    return cost.new_empty(cost.shape)


@op(
    "sinkhorn.plan",
    "sinkhorn_plan_backward(Tensor grad, Tensor cost, Tensor a, Tensor b, Tensor f, Tensor g,"
    " float epsilon) -> (Tensor dcost, Tensor row_sum, Tensor column_sum)",
)
def _(grad, cost, a, b, f, g, epsilon):
    batch, n, m = cost.shape
    return (
        cost.new_empty(cost.shape),
        cost.new_empty((batch, n)),
        cost.new_empty((batch, m)),
    )


# ---- weights.lincomb ---------------------------------------------------------------------------------


@op(
    "weights.lincomb",
    "lincomb(Tensor[] tensors, Tensor coefficients, Tensor[] base, ScalarType? out_dtype) -> Tensor[]",
)
def _(tensors, coefficients, base, out_dtype):
    length = len(tensors) // coefficients.shape[0]
    out = []
    for item, first in enumerate(tensors[:length]):
        dtype = out_dtype
        if dtype is None:
            dtype = first.dtype
            for t in (*tensors[item::length], *base[item : item + 1]):
                dtype = torch.promote_types(dtype, t.dtype)
        out.append(first.new_empty(first.shape, dtype=dtype))
    return out


@op(
    "weights.lincomb",
    "lincomb_out(Tensor[] tensors, Tensor coefficients, Tensor[] base, Tensor(a!)[] out) -> ()",
)
def _(tensors, coefficients, base, out):
    return None


@op(
    "weights.lincomb",
    "lincomb_backward(Tensor[] grads, Tensor[] tensors, Tensor coefficients, Tensor[] base,"
    " bool need_coefficients, bool[] need_tensors) -> (Tensor dcoefficients, Tensor[] dtensors)",
)
def _(grads, tensors, coefficients, base, need_coefficients, need_tensors):
    length = len(grads)
    dots = (coefficients.shape[0], length) if need_coefficients else (0,)
    every = (*tensors, *base)
    return coefficients.new_empty(dots, dtype=torch.float64), [
        grads[i % length].new_empty(grads[i % length].shape, dtype=every[i].dtype)
        for i, need in enumerate(need_tensors)
        if need
    ]


# ---- weights.ema -------------------------------------------------------------------------------------


@op(
    "weights.ema",
    "ema_(Tensor(a!)[] averages, Tensor[] parameters, float decay, Tensor? seed) -> ()",
)
def _(averages, parameters, decay, seed):
    return None


_registry.attach_kernels()
