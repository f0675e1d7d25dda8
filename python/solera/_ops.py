"""The table of contents: every op's schema in one block, then the kernels are attached.

An op `name` of the core `family.core` has four rooms, all by the same name:

    python/solera/<family>/<core>.py    its reference (`@reference("name")`), autograd, public function
    csrc/cpu/<family>/<core>.cpp        its CPU kernel
    triton_kernels/<family>/<core>.py   its GPU launcher, a function called `name`
    tests/ and bench/ <family>/<core>.py

A function decorated by `op(...)` is the op's fake: shapes, dtypes and strides. Where none is given the
reference is run on fake tensors instead: it returns what the kernels return, and `opcheck` holds them to it.
(Sinkhorn's would trace its whole loop.)
"""

from __future__ import annotations

import torch

from . import _registry
from ._registry import op

# ---- norm.row_norm -----------------------------------------------------------------------------------


op(
    "norm.row_norm",
    "row_norm(Tensor x, Tensor? weight, Tensor? bias, float eps, float weight_offset, bool centred)"
    " -> Tensor",
)
op(
    "norm.row_norm",
    "row_norm_stats(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps,"
    " float residual_scale, float weight_offset, bool centred)"
    " -> (Tensor y, Tensor u, Tensor mean, Tensor rstd)",
)
op(
    "norm.row_norm",
    "row_norm_backward(Tensor dy, Tensor? du, Tensor u, Tensor? weight, Tensor mean, Tensor rstd,"
    " float weight_offset, bool centred, bool need_x, bool need_weight, bool need_bias)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias)",
)


# ---- norm.channel_norm -------------------------------------------------------------------------------

# x, dy, residual (A, M, K); center, scale, shift, p, q, moments and sums (A, K) in the accumulator's
# dtype; lengths (A,) int64.

op("norm.channel_norm", "channel_moments(Tensor x, Tensor? lengths) -> (Tensor mean, Tensor var)")
op(
    "norm.channel_norm",
    "channel_affine(Tensor x, Tensor center, Tensor scale, Tensor shift, Tensor? residual,"
    " Tensor? lengths, int activation) -> Tensor",
)
op(
    "norm.channel_norm",
    "channel_reduce(Tensor dy, Tensor x, Tensor center, Tensor scale, Tensor shift, Tensor? residual,"
    " Tensor? lengths, int activation) -> (Tensor dshift, Tensor dscale)",
)
op(
    "norm.channel_norm",
    "channel_gradient(Tensor dy, Tensor x, Tensor center, Tensor scale, Tensor shift, Tensor? residual,"
    " Tensor? lengths, int activation, Tensor p, Tensor q, bool need_x, bool need_residual)"
    " -> (Tensor dx, Tensor dresidual)",
)


# ---- norm.group_norm ---------------------------------------------------------------------------------

# x, dy, residual (N, C, S), or (N, S, C) if `last`, not empty; weight, bias (C,) or (N, C). Moments
# (N, groups), or (1, C) over the batch, in the accumulator's dtype, as are dweight and dbias.

op(
    "norm.group_norm",
    "group_norm(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, int groups, bool batch,"
    " bool last, float eps, float correction, int activation) -> (Tensor y, Tensor mean, Tensor var)",
)
op(
    "norm.group_norm",
    "group_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor mean,"
    " Tensor var, int groups, bool batch, bool last, float eps, float correction, int activation,"
    " bool need_x, bool need_residual, bool need_affine)"
    " -> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)",
)


# ---- norm.evonorm ------------------------------------------------------------------------------------

# x, dy (A, M, K) as in norm.channel_norm; the coefficients (A, K) in the accumulator's dtype. left and
# offset are given for the B forms, not for S. reduce gives (3, A, K) or (5, A, K): the gradients of shift,
# scale, slope, left, offset.

op(
    "norm.evonorm",
    "evonorm(Tensor x, Tensor shift, Tensor scale, Tensor slope, Tensor? left, Tensor? offset) -> Tensor",
)
op(
    "norm.evonorm",
    "evonorm_reduce(Tensor dy, Tensor x, Tensor scale, Tensor slope, Tensor? left, Tensor? offset)"
    " -> Tensor",
)
op(
    "norm.evonorm",
    "evonorm_gradient(Tensor dy, Tensor x, Tensor scale, Tensor slope, Tensor? left, Tensor? offset,"
    " Tensor mean, Tensor p, Tensor q) -> Tensor",
)


# ---- norm.online_norm --------------------------------------------------------------------------------

# Per (sample, channel) numbers (N, C), states (C,); results (N + 1, C).

op(
    "norm.online_norm",
    "online_scan(Tensor mean, Tensor var, Tensor m, Tensor v, float alpha) -> (Tensor ms, Tensor vs)",
)
op(
    "norm.online_norm",
    "online_scan_backward(Tensor g, Tensor gy, Tensor y, Tensor yy, Tensor rstd, Tensor u, Tensor w,"
    " float alpha) -> (Tensor us, Tensor ws)",
)


# x, dy (A, M, K) as in norm.channel_norm, with A = N C, K = 1 or A = N, K = C; mean, var (N, C); ms, vs (N + 1, C).


@op(
    "norm.online_norm",
    "online_norm(Tensor x, Tensor? weight, Tensor? bias, Tensor m, Tensor v, float alpha, float eps)"
    " -> (Tensor y, Tensor mean, Tensor var, Tensor ms, Tensor vs)",
)
def _(x, weight, bias, m, v, alpha, eps):
    acc, c = _registry.accumulate_type(x), m.shape[0]
    n = x.shape[0] * x.shape[2] // c
    y = x.new_empty(x.shape)
    return y, *(x.new_empty((rows, c), dtype=acc) for rows in (n, n, n + 1, n + 1))


@op(
    "norm.online_norm",
    "online_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor mean, Tensor var, Tensor ms,"
    " Tensor vs, Tensor u, Tensor w, float alpha, float eps, bool need_x)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor u_after, Tensor w_after)",
)
def _(dy, x, weight, mean, var, ms, vs, u, w, alpha, eps, need_x):
    each = (mean.new_empty(u.shape) for _ in range(4))
    return x.new_empty(x.shape if need_x else (0,)), *each


# ---- norm.gated_norm ---------------------------------------------------------------------------------

# x, gate, y (..., D); rstd (..., groups), which divide D; activation as in solera._activation.

op(
    "norm.gated_norm",
    "gated_norm(Tensor x, Tensor gate, Tensor? weight, Tensor? bias, float eps, int activation,"
    " bool norm_first, int groups) -> (Tensor y, Tensor rstd)",
)
op(
    "norm.gated_norm",
    "gated_norm_backward(Tensor dy, Tensor x, Tensor gate, Tensor? weight, Tensor? bias, Tensor rstd,"
    " int activation, bool norm_first, bool need_x, bool need_gate, bool need_weight, bool need_bias)"
    " -> (Tensor dx, Tensor dgate, Tensor dweight, Tensor dbias)",
)


# ---- norm.qk_norm ------------------------------------------------------------------------------------

# x, y (B, ., ., d) of any strides, positions along dimension `positions` (1 or 2) and heads along the
# other; weight (d,) or (heads, d); cos, sin (B or 1, positions, R / 2) contiguous in the accumulator's
# dtype; kind is the index in solera.norm.qk_norm.KINDS.

op(
    "norm.qk_norm",
    "head_norm(Tensor x, Tensor? weight, Tensor? cos, Tensor? sin, int kind, float eps, int positions,"
    " bool interleaved) -> (Tensor y, Tensor mean, Tensor rstd)",
)
op(
    "norm.qk_norm",
    "head_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor? cos, Tensor? sin, Tensor mean,"
    " Tensor rstd, int kind, float eps, int positions, bool interleaved, bool need_x, bool need_weight)"
    " -> (Tensor dx, Tensor dweight)",
)


# ---- norm.logit_norm ---------------------------------------------------------------------------------

# logits (B, C); target (B,) int64, negative where a row is left out; scale (B,), columns (C,) and all row
# statistics in the accumulator's dtype; bounds (T + 1,) int64; kind indexes
# solera.norm.logit_norm.MODES (not called mode: torch's functionalisation passes names on, and has its own).

op(
    "norm.logit_norm",
    "logit_statistics(Tensor logits, Tensor target, Tensor? scale, Tensor? columns, Tensor? bounds,"
    " float eps, int kind) -> (Tensor a, Tensor b, Tensor picked, Tensor norms)",
)
op(
    "norm.logit_norm",
    "logit_gradient(Tensor logits, Tensor target, Tensor? scale, Tensor? columns, Tensor? bounds,"
    " Tensor a, Tensor da, Tensor db, Tensor dpicked, int kind) -> Tensor",
)
op(
    "norm.logit_norm",
    "logit_gradient_(Tensor(a!) logits, Tensor target, Tensor? scale, Tensor? columns, Tensor? bounds,"
    " Tensor a, Tensor da, Tensor db, Tensor dpicked, int kind) -> ()",
)


# ---- norm.row_dots -----------------------------------------------------------------------------------

# x (N, D), y (M, D); index (N,) int64 names the row of y beside each row of x (negative: none), None pairs
# row with row; sums and coefficients (N,) in the accumulator's dtype.

op(
    "norm.row_dots",
    "row_dots(Tensor x, Tensor y, Tensor? index) -> (Tensor xx, Tensor xy, Tensor yy)",
)
op(
    "norm.row_dots",
    "row_combine(Tensor x, Tensor y, Tensor? index, Tensor a, Tensor b) -> Tensor",
)
op(
    "norm.row_dots",
    "row_combine_(Tensor(a!) x, Tensor y, Tensor? index, Tensor a, Tensor b) -> ()",
)


# ---- norm.ada_norm -----------------------------------------------------------------------------------

# x, branch (B, T, D) or (B, D); gate, scale, shift, weight and bias (D,), (B, D) or (B, T, D); with an index
# (B,) weight and bias (sets, D). needs: x, branch, gate, scale, shift, weight, bias.
op(
    "norm.ada_norm",
    "ada_norm(Tensor x, Tensor? branch, Tensor? gate, Tensor? scale, Tensor? shift, Tensor? weight,"
    " Tensor? bias, Tensor? index, float eps, bool centred)"
    " -> (Tensor y, Tensor h, Tensor mean, Tensor rstd)",
)
op(
    "norm.ada_norm",
    "ada_norm_backward(Tensor dy, Tensor? dh, Tensor h, Tensor? branch, Tensor? gate, Tensor? scale,"
    " Tensor? weight, Tensor? bias, Tensor? index, Tensor mean, Tensor rstd, bool centred, int shift_dim,"
    " bool[] needs) -> (Tensor dx, Tensor dbranch, Tensor dgate, Tensor dscale, Tensor dshift,"
    " Tensor dweight, Tensor dbias)",
)


# ---- norm.bank_norm ----------------------------------------------------------------------------------

# similarities (M, G), bank (M, D), queries (Q, D), gallery (G, D); lse (G,) in the accumulator's dtype,
# active (G,) bool, empty for top_k = 0.

op(
    "norm.bank_norm",
    "bank_columns(Tensor similarities, float beta, int top_k) -> (Tensor lse, Tensor active)",
)
op(
    "norm.bank_norm",
    "bank_columns_backward(Tensor dlse, Tensor lse, Tensor similarities, float beta) -> Tensor",
)
op(
    "norm.bank_norm",
    "bank_stream(Tensor bank, Tensor gallery, float beta, int top_k) -> (Tensor lse, Tensor active)",
)
op(
    "norm.bank_norm",
    "bank_stream_backward(Tensor dlse, Tensor lse, Tensor bank, Tensor gallery, float beta,"
    " bool need_bank, bool need_gallery) -> (Tensor dbank, Tensor dgallery)",
)
op(
    "norm.bank_norm",
    "bank_apply(Tensor similarities, Tensor lse, Tensor? active, float beta, Tensor? lse2,"
    " Tensor? active2, float beta2) -> (Tensor out, Tensor used)",
)
op(
    "norm.bank_norm",
    "bank_scores(Tensor queries, Tensor gallery, Tensor lse, Tensor? active, float beta, Tensor? lse2,"
    " Tensor? active2, float beta2) -> Tensor",
)
op("norm.bank_norm", "row_top(Tensor scores, int k) -> (Tensor values, Tensor indices)")


# ---- norm.grad_norm ----------------------------------------------------------------------------------

# Lists of L tensors; norms (L,), dots (3, L) and factors (L,) in float32, or float64 where a tensor is float64.

op("norm.grad_norm", "tensor_norms(Tensor[] tensors, Tensor? clip, float ord) -> Tensor")
op("norm.grad_norm", "tensor_dots(Tensor[] a, Tensor[] b) -> Tensor")
op("norm.grad_norm", "scale_tensors_(Tensor(a!)[] tensors, Tensor factors) -> ()")
op(
    "norm.grad_norm",
    "clip_units_(Tensor(a!)[] grads, Tensor[] parameters, float clip, float eps, float ord) -> ()",
)


# ---- norm.grad_step ----------------------------------------------------------------------------------

op(
    "norm.grad_step",
    "fira_scale_(Tensor(a!)[] residuals, Tensor[] reduced, Tensor[] updates) -> Tensor",
)
op(
    "norm.grad_step",
    "adam_step_(Tensor(a!)[] parameters, Tensor[] grads, Tensor(b!)[] exp_avg, Tensor(c!)[] exp_avg_sq,"
    " Tensor clip, Tensor scale, float decay, float step_size, float beta1, float beta2, float eps,"
    " float correction) -> ()",
)


# ---- norm.moments2 -----------------------------------------------------------------------------------

# x (N, D), order (N,) and offsets (C + 1,) int64; features x (B, C, L), pairs (K, 2) int64; h (S, B, T, D),
# mask (B, T) bool. Sums are in the accumulator's dtype.

op(
    "norm.moments2",
    "segment_moments(Tensor x, Tensor? order, Tensor offsets) -> (Tensor mean, Tensor squares)",
)
op(
    "norm.moments2",
    "segment_scatter(Tensor x, Tensor? order, Tensor offsets, Tensor mean) -> Tensor",
)
op("norm.moments2", "pair_dots(Tensor x, Tensor pairs) -> Tensor")
op("norm.moments2", "pair_dots_backward(Tensor grad, Tensor x, Tensor pairs) -> Tensor")
op("norm.moments2", "pool_layers(Tensor h, Tensor mask) -> Tensor")


# ---- ensemble.batch_ensemble -------------------------------------------------------------------------

# Shapes: x (B, K, I) or, shared by the members, (B, I); y, dy (B, K, O). activation is the index in
# solera._activation.ACTIVATIONS. `saved` is y for relu, the pre-activation z for gelu and silu.

op(
    "ensemble.batch_ensemble",
    "batch_ensemble(Tensor x, Tensor weight, Tensor? r, Tensor? s, Tensor? bias, int activation) -> Tensor",
)
op(
    "ensemble.batch_ensemble",
    "batch_ensemble_saved(Tensor x, Tensor weight, Tensor? r, Tensor? s, Tensor? bias, int activation)"
    " -> (Tensor y, Tensor z)",
)
op(
    "ensemble.batch_ensemble",
    "batch_ensemble_backward(Tensor dy, Tensor x, Tensor weight, Tensor? r, Tensor? s, Tensor? saved,"
    " int activation, bool bias_per_member, bool need_x, bool need_weight, bool need_r, bool need_s,"
    " bool need_bias) -> (Tensor dx, Tensor dweight, Tensor dr, Tensor ds, Tensor dbias)",
)


# ---- ensemble.member_linear --------------------------------------------------------------------------


op(
    "ensemble.member_linear",
    "member_linear(Tensor x, Tensor weight, Tensor? bias, int activation) -> Tensor",
)
op(
    "ensemble.member_linear",
    "member_linear_saved(Tensor x, Tensor weight, Tensor? bias, int activation) -> (Tensor y, Tensor z)",
)
op(
    "ensemble.member_linear",
    "member_linear_backward(Tensor dy, Tensor x, Tensor weight, Tensor? saved, int activation,"
    " bool bias_per_member, bool need_x, bool need_weight, bool need_bias)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias)",
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


op(
    "weights.lincomb",
    "lincomb(Tensor[] tensors, Tensor coefficients, Tensor[] base, ScalarType? out_dtype) -> Tensor[]",
)
op(
    "weights.lincomb",
    "lincomb_out(Tensor[] tensors, Tensor coefficients, Tensor[] base, Tensor(a!)[] out) -> ()",
)
op(
    "weights.lincomb",
    "lincomb_backward(Tensor[] grads, Tensor[] tensors, Tensor coefficients, Tensor[] base,"
    " bool need_coefficients, bool[] need_tensors) -> (Tensor dcoefficients, Tensor[] dtensors)",
)


# ---- weights.ema -------------------------------------------------------------------------------------


op(
    "weights.ema",
    "ema_(Tensor(a!)[] averages, Tensor[] parameters, float decay, Tensor? seed) -> ()",
)


_registry.attach_kernels()
