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


# ---- norm.moment_exchange ----------------------------------------------------------------------------

# x, dy (N, R, M, K), R or K 1; index (N,) int64; mean, deviation (N, R K) in the accumulator's dtype.

op(
    "norm.moment_exchange",
    "moment_exchange(Tensor x, Tensor index, float eps, float ratio)"
    " -> (Tensor y, Tensor mean, Tensor deviation)",
)
op(
    "norm.moment_exchange",
    "moment_exchange_backward(Tensor dy, Tensor x, Tensor index, Tensor mean, Tensor deviation, float ratio)"
    " -> Tensor",
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


# ---- norm.normalized_softmax -------------------------------------------------------------------------

# A loop over chunks of rows with the ops of norm.logit_norm and norm.row_dots inside.


@op(
    "norm.normalized_softmax",
    "normalized_softmax(Tensor x, Tensor weight, Tensor target, Tensor label, Tensor scale, Tensor? extra,"
    " Tensor? row_weight, bool need_x, bool need_weight)"
    " -> (Tensor losses, Tensor dx, Tensor dweight, Tensor dextra, Tensor dscale, Tensor dlabel)",
    composed=True,
)
def _(x, weight, target, label, scale, extra, row_weight, need_x, need_weight):
    acc, grads = _registry.accumulate_type(x), row_weight is not None
    shapes = (
        label.shape,
        x.shape if grads and need_x else (0,),
        weight.shape if grads and need_weight else (0,),
        extra.shape if grads and extra is not None else (0,),
        (),
        label.shape,
    )
    return tuple(x.new_empty(shape, dtype=acc) for shape in shapes)


# ---- norm.class_softmax ------------------------------------------------------------------------------

# For half-precision tensors on the CPU only, so without a Triton kernel: a GPU multiplies halves itself, and
# takes the loop above. x (B, d), weight (C, d); cosines (C, B rounded up) int16; the rest (B,) or (C,) float32.


@op(
    "norm.class_softmax",
    "class_statistics(Tensor x, Tensor weight, Tensor target, Tensor scale, Tensor row_inverse,"
    " Tensor class_inverse, bool keep) -> (Tensor others, Tensor mean, Tensor cosines)",
    composed=True,
)
def _(x, weight, target, scale, row_inverse, class_inverse, keep):
    from .norm.class_softmax import padded

    rows = x.new_empty(x.shape[0], dtype=torch.float32)
    shape = (weight.shape[0] if keep else 0, padded(x.shape[0]))
    return rows, torch.empty_like(rows), x.new_empty(shape, dtype=torch.int16)


@op(
    "norm.class_softmax",
    "class_gradient(Tensor x, Tensor weight, Tensor target, Tensor cosines, Tensor scale, Tensor row_inverse,"
    " Tensor class_inverse, Tensor others, Tensor share, Tensor label, bool need_x, bool need_weight)"
    " -> (Tensor dx, Tensor dweight)",
    composed=True,
)
def _(x, weight, *rest):
    *_, need_x, need_weight = rest
    return (
        x.new_empty(x.shape if need_x else (0,)),
        weight.new_empty(weight.shape if need_weight else (0,)),
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


# ---- ensemble.ensemble_mlp ---------------------------------------------------------------------------

# weights (K, O, I) if out_first, else (K, I, O); biases (K, O) each, or none at all; combine (K,). saved: a
# flat tensor of K B H elements for each hidden layer (and the last, if it has an activation).

op(
    "ensemble.ensemble_mlp",
    "ensemble_mlp(Tensor x, Tensor[] weights, Tensor[] biases, int[] activations, bool out_first,"
    " Tensor? combine) -> Tensor",
)
op(
    "ensemble.ensemble_mlp",
    "ensemble_mlp_saved(Tensor x, Tensor[] weights, Tensor[] biases, int[] activations,"
    " bool out_first, Tensor? combine) -> (Tensor y, Tensor[] saved)",
)
op(
    "ensemble.ensemble_mlp",
    "ensemble_mlp_backward(Tensor dy, Tensor x, Tensor[] weights, Tensor[] saved, int[] activations,"
    " bool out_first, Tensor? combine, bool need_x, bool need_parameters)"
    " -> (Tensor dx, Tensor[] dweights, Tensor[] dbiases)",
)


# ---- ensemble.routing --------------------------------------------------------------------------------

# logits (B, C); scores (4, B) in the accumulator's dtype, in the order of solera.ensemble.routing.KINDS, which kind
# indexes; top (2, B) and index (B,) or (n,) int64, exit (B,) bool, count () int64; out (B, ...), compact (n, ...).

op("ensemble.routing", "uncertainty_scores(Tensor logits) -> (Tensor scores, Tensor top)")
op(
    "ensemble.routing",
    "uncertainty_scores_backward(Tensor dscores, Tensor logits, Tensor scores, Tensor top) -> Tensor",
)
op(
    "ensemble.routing",
    "window_exit(Tensor logits, float low, float high, int kind)"
    " -> (Tensor exit, Tensor index, Tensor count)",
)
op(
    "ensemble.routing",
    "cascade_merge_(Tensor(a!) out, Tensor compact, Tensor index, float weight) -> ()",
)


# ---- ensemble.batch_ensemble_mlp ---------------------------------------------------------------------

# x (B, I) or (B, K, I); parameters: of each layer its weight (O, I), then r (K, I), s (K, O) and bias (K, O)
# or (O,) where it has them; kinds: a layer's activation plus 8, 16, 32 for r, s and bias. products: h of each
# layer (B, K, O), in x's dtype. seed: one int64, given where dropout is at work.
op(
    "ensemble.batch_ensemble_mlp",
    "batch_ensemble_mlp(Tensor x, Tensor[] parameters, int[] kinds, float dropout, Tensor? seed)"
    " -> Tensor",
)
op(
    "ensemble.batch_ensemble_mlp",
    "batch_ensemble_mlp_saved(Tensor x, Tensor[] parameters, int[] kinds, float dropout, Tensor? seed)"
    " -> (Tensor y, Tensor[] products)",
)
op(
    "ensemble.batch_ensemble_mlp",
    "batch_ensemble_mlp_backward(Tensor dy, Tensor x, Tensor[] parameters, Tensor[] products, int[] kinds,"
    " float dropout, Tensor? seed, bool need_x, bool[] needs) -> (Tensor dx, Tensor[] grads)",
)


# ---- ensemble.member_logits --------------------------------------------------------------------------

# logits: [(N, K, C)] or K times (N, C); target (N,) int64, negative where a row is left out; weights (N, K)
# and row numbers (N, K), or (N, 1) with weights, in the accumulator's dtype. A gradient to the logits is (N, K, C),
# or (K, N, C) to a list. scale, one number, multiplies member_cross_entropy's losses (N,) and gradients; kind is the
# index in solera.ensemble.member_logits.COMBINATIONS. Its dlogits is (N, 1, C) where all members of one tensor share
# it: averaged logits without weights.

op(
    "ensemble.member_logits",
    "member_logsumexp(Tensor[] logits, Tensor target, Tensor? weights)"
    " -> (Tensor lse, Tensor logp)",
)
op(
    "ensemble.member_logits",
    "member_softmax(Tensor[] logits, Tensor target, Tensor? weights, Tensor lse, Tensor a, Tensor b,"
    " bool need_weights) -> (Tensor dlogits, Tensor dweights)",
)
op(
    "ensemble.member_logits",
    "member_cross_entropy(Tensor[] logits, Tensor target, Tensor? weights, Tensor? scale, int kind,"
    " bool need_logits, bool need_weights) -> (Tensor loss, Tensor dlogits, Tensor dweights)",
)


# ---- ensemble.member_statistics ----------------------------------------------------------------------

# logits as above; wanted is a sum of the flags in solera.ensemble.member_statistics; sums (N, K, 2) the largest
# value of each row and 1 / sum e^(z - largest).

op(
    "ensemble.member_statistics",
    "member_statistics(Tensor[] logits, int wanted) -> (Tensor mean, Tensor variance, Tensor total,"
    " Tensor aleatoric, Tensor sums, Tensor disagreement, Tensor vote, Tensor top)",
)
op(
    "ensemble.member_statistics",
    "member_statistics_backward(Tensor[] logits, Tensor sums, Tensor mean, Tensor? dmean, Tensor? dvariance,"
    " Tensor? dtotal, Tensor? daleatoric) -> Tensor",
)


# ---- ensemble.particles ------------------------------------------------------------------------------

# x, b, drift, grad_mu, noise (K, d); scores (m, K, d); betas (m,) float64; divergence, lap_mu, logw (K,);
# u a float64 scalar. An ess_threshold of inf always resamples, a clip of 0 bounds nothing.

op(
    "ensemble.particles",
    "fkc_step(Tensor x, Tensor scores, Tensor betas, Tensor? drift, Tensor? divergence, Tensor noise,"
    " float drift_rate, float sigma, float dt, float level) -> (Tensor y, Tensor dlogw)",
)
op(
    "ensemble.particles",
    "afdps_step(Tensor x, Tensor b, Tensor grad_mu, Tensor? lap_mu, Tensor noise, float sigma, float dt)"
    " -> (Tensor y, Tensor dlogw)",
)
op(
    "ensemble.particles",
    "smc_resample(Tensor logw, Tensor? x, Tensor u, float ess_threshold, bool center, float clip)"
    " -> (Tensor indices, Tensor particles, Tensor weights, Tensor after, Tensor log_z, Tensor ess)",
)


# ---- ensemble.connections ----------------------------------------------------------------------------

# h, rest, drest (O, n, I, D): n streams of O * I tokens; out, input, dinput (O, I, D); beta, dbeta (O, I, n).
# kind 0: fixed coefficients; 1: hyper-connections, projection (n + 2, D); 2: manifold-constrained,
# projection (n * (n + 2), n * D). fixed, scale, constant (n * (n + 2),) in the accumulator's dtype.


@op(
    "ensemble.connections",
    "connection_width(Tensor h, Tensor? out, Tensor? out_beta, Tensor? projection, Tensor? constant,"
    " Tensor fixed, Tensor? scale, int kind, bool centred, bool tanh, float eps, int iterations)"
    " -> (Tensor input, Tensor rest, Tensor beta, Tensor z, Tensor mean, Tensor rstd)",
)
def _(h, out, out_beta, projection, constant, fixed, scale, kind, centred, tanh, eps, iterations):
    outer, n, inner, width = h.shape
    acc = _registry.accumulate_type(h)
    new = lambda *shape: h.new_empty(shape, dtype=acc)
    return (
        h.new_empty((outer, inner, width)),
        h.new_empty(h.shape),
        new(outer, inner, n),
        new(outer, inner, n * (n + 2)) if kind else new(0),
        new(outer, n, inner) if kind == 1 and centred else new(0),
        new(outer, n, inner) if kind == 1 else (new(outer, inner) if kind else new(0)),
    )


@op(
    "ensemble.connections",
    "connection_width_backward(Tensor? dinput, Tensor? drest, Tensor? dbeta, Tensor h, Tensor? out,"
    " Tensor? out_beta, Tensor? projection, Tensor? constant, Tensor fixed, Tensor? scale, Tensor z,"
    " Tensor mean, Tensor rstd, int kind, bool centred, bool tanh, int iterations)"
    " -> (Tensor dh, Tensor dout, Tensor dout_beta, Tensor dprojection, Tensor dconstant, Tensor dfixed,"
    " Tensor dscale)",
)
def _(dinput, drest, dbeta, h, out, out_beta, projection, constant, fixed, scale, z, mean, rstd,
      kind, centred, tanh, iterations):  # fmt: skip
    outer, n, inner, width = h.shape
    acc = _registry.accumulate_type(h)
    new = lambda *shape: h.new_empty(shape, dtype=acc)
    return (
        h.new_empty(h.shape),
        h.new_empty((0,) if out is None else (outer, inner, width)),
        new(0) if out is None else new(outer, inner, n),
        new(*projection.shape) if kind else new(0),
        new(*fixed.shape) if kind else new(0),
        new(*fixed.shape),
        new(*fixed.shape) if kind else new(0),
    )


op("ensemble.connections", "connection_depth(Tensor out, Tensor h, Tensor beta) -> Tensor")
op(
    "ensemble.connections",
    "connection_depth_backward(Tensor grad, Tensor out, Tensor beta) -> (Tensor dout, Tensor dbeta)",
)


# ---- ensemble.logit_mixture --------------------------------------------------------------------------

# logits: K tensors (N, C) of one dtype; weights (N, K), dscore (K, N) in the accumulator's dtype; target (N,)
# int64. top, log_total (K, N), or (K + 1, N) with the combined row's last. dlogits (N, K, C) if rows_first, else
# (K, N, C). kind is the index in solera.ensemble.logit_mixture.KINDS.

op(
    "ensemble.logit_mixture",
    "mixture_scores(Tensor[] logits, Tensor target) -> (Tensor score, Tensor top, Tensor log_total)",
)
op(
    "ensemble.logit_mixture",
    "mixture_scores_backward(Tensor[] logits, Tensor target, Tensor top, Tensor log_total, Tensor dscore,"
    " bool rows_first) -> Tensor",
)
op(
    "ensemble.logit_mixture",
    "combine_logits(Tensor[] logits, Tensor weights, int kind, float inverse_temperature,"
    " float plausibility, int anchor, bool normalize) -> (Tensor out, Tensor top, Tensor log_total)",
)
op(
    "ensemble.logit_mixture",
    "combine_logits_backward(Tensor dout, Tensor[] logits, Tensor weights, Tensor top, Tensor log_total,"
    " int kind, float inverse_temperature, float plausibility, int anchor, bool normalize,"
    " bool need_logits, bool need_weights, bool rows_first) -> (Tensor dlogits, Tensor dweights)",
)


# ---- ensemble.distillation ---------------------------------------------------------------------------

# student (N, C), teachers K tensors (N, C), weights (K,), dweights (N, K) and factor (N,) in the accumulator's
# dtype; dteachers (N, K, C) if rows_first, else (K, N, C); x (A, N, C). Gradients not needed are empty.

op(
    "ensemble.distillation",
    "distill(Tensor student, Tensor[] teachers, Tensor weights, float inverse_temperature, float scale,"
    " int kind, bool need_student, bool need_teachers, bool need_weights, bool rows_first)"
    " -> (Tensor loss, Tensor dstudent, Tensor dteachers, Tensor dweights)",
)
op("ensemble.distillation", "distill_scale_(Tensor(a!) x, Tensor factor) -> ()")


# ---- ensemble.adapters -------------------------------------------------------------------------------

# x (N, I), weight (O, I); index (M, k) int64, M = N n for rows cut into n blocks; a (E, r, I / n), a_bias
# (E, r), b (E, O / n, r); gates (M, k, G), G dividing r. pre (M, k, r) and the parameters' gradients are in
# the accumulator's dtype, but for dweight. Without a weight n = 1 and y starts from zero or, `residual`, from x.


@op(
    "ensemble.adapters",
    "adapter_linear(Tensor x, Tensor? weight, Tensor? bias, Tensor a, Tensor? a_bias, Tensor b, Tensor index,"
    " Tensor? gates, float scaling, int activation, bool residual) -> (Tensor y, Tensor pre)",
)
def _(x, weight, bias, a, a_bias, b, index, gates, scaling, activation, residual):
    if weight is not None:
        out = weight.shape[0]
    else:
        out = x.shape[1] if residual else b.shape[1]
    pre = x.new_empty((*index.shape, a.shape[1]), dtype=_registry.accumulate_type(x))
    return x.new_empty((x.shape[0], out)), pre


@op(
    "ensemble.adapters",
    "adapter_linear_backward(Tensor dy, Tensor x, Tensor? weight, Tensor a, Tensor b, Tensor pre, Tensor index,"
    " Tensor? gates, float scaling, int activation, bool residual, bool need_x, bool need_weight,"
    " bool need_bias, bool need_a, bool need_a_bias, bool need_b, bool need_gates)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor da, Tensor da_bias, Tensor db, Tensor dgates)",
)
def _(
    dy, x, weight, a, b, pre, index, gates, scaling, activation, residual, need_x, need_weight,
    need_bias, need_a, need_a_bias, need_b, need_gates,
):  # fmt: skip
    def sums(need, shape):
        return x.new_empty(shape if need else (0,), dtype=pre.dtype)

    like = pre if weight is None else weight
    return (
        x.new_empty(x.shape if need_x else (0,)),
        like.new_empty(like.shape if need_weight else (0,)),
        sums(need_bias, (dy.shape[1],)),
        sums(need_a, a.shape),
        sums(need_a_bias, a.shape[:2]),
        sums(need_b, b.shape),
        sums(need_gates, None if gates is None else gates.shape),
    )


# ---- ensemble.hyper_linear ---------------------------------------------------------------------------

# a, u, dy (N, O, P); s (N, 2 O), or (N, O) without bias (O,).

op("ensemble.hyper_linear", "hyper_gate(Tensor a, Tensor u, Tensor s, Tensor? bias) -> Tensor")
op(
    "ensemble.hyper_linear",
    "hyper_gate_backward(Tensor dy, Tensor u, Tensor s, Tensor? bias)"
    " -> (Tensor du, Tensor ds, Tensor dbias)",
)


# ---- ensemble.oblivious_forest -----------------------------------------------------------------------

# x (B, F); features int64, thresholds (K, D); index (B, K) int32; leaves (K, L, A); dy (B, A).

op(
    "ensemble.oblivious_forest",
    "forest_leaves(Tensor x, Tensor features, Tensor thresholds) -> Tensor",
)
op("ensemble.oblivious_forest", "leaf_sum(Tensor index, Tensor leaves) -> Tensor")
op("ensemble.oblivious_forest", "leaf_scatter(Tensor index, Tensor dy, int count) -> Tensor")


# ---- ensemble.prompts --------------------------------------------------------------------------------

# images (N, D), texts (P, C, D), bias (P, C), choice (P, N) int64, grad and scores (P,) in the accumulator's dtype, as
# is dbias.

op("ensemble.prompts", "prompt_scores(Tensor images, Tensor texts, Tensor? bias) -> Tensor")
op(
    "ensemble.prompts",
    "prompt_scores_choice(Tensor images, Tensor texts, Tensor? bias) -> (Tensor scores, Tensor choice)",
)
op(
    "ensemble.prompts",
    "prompt_scores_backward(Tensor grad, Tensor images, Tensor texts, Tensor choice, bool need_images,"
    " bool need_texts, bool need_bias) -> (Tensor dimages, Tensor dtexts, Tensor dbias)",
)


# ---- ensemble.pair_losses ----------------------------------------------------------------------------

# s, g (R, M) similarities and temperature logits of R anchors with M candidates; negative (R, k) and positive (R,)
# int64 columns. ds and dg (R, M) hold the gradients of each row's own loss, or are empty.

op(
    "ensemble.pair_losses",
    "pair_losses(Tensor s, Tensor g, Tensor negative, Tensor positive, float tau_min, float tau_max,"
    " float beta, float width, bool need_grad) -> (Tensor losses, Tensor ds, Tensor dg)",
)


@op(
    "ensemble.pair_losses",
    "pair_head_loss(Tensor z, Tensor q, SymInt k, float tau_min, float tau_max, float beta, bool need_grad)"
    " -> (Tensor loss, Tensor dz, Tensor dq)",
    composed=True,
)
def _(z, q, k, tau_min, tau_max, beta, need_grad):
    grads = [t.new_empty(t.shape if need_grad else (0,)) for t in (z, q)]
    return z.new_empty(()), *grads


# ---- sinkhorn.dense ----------------------------------------------------------------------------------


@op(
    "sinkhorn.dense",
    "sinkhorn_dense(Tensor cost, Tensor a, Tensor b, Tensor? f, Tensor? g, float epsilon,"
    " int max_iterations, float tolerance, int check_every, float? rho_a=None, float? rho_b=None,"
    " float momentum=1.0, Tensor? lengths=None)"
    " -> (Tensor f, Tensor g, Tensor value, Tensor iterations, Tensor error, Tensor converged)",
)
def _(cost, a, b, f, g, epsilon, max_iterations, tolerance, check_every, *_):
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
    " float epsilon, Tensor? lengths=None) -> Tensor",
)
def _(cost, a, b, f, g, x, y, epsilon, lengths=None):
    return cost.new_empty(cost.shape)


@op(
    "sinkhorn.plan",
    "sinkhorn_plan_backward(Tensor grad, Tensor cost, Tensor a, Tensor b, Tensor f, Tensor g,"
    " float epsilon, Tensor? lengths=None) -> (Tensor dcost, Tensor row_sum, Tensor column_sum)",
)
def _(grad, cost, a, b, f, g, epsilon, lengths=None):
    batch, n, m = cost.shape
    return (
        cost.new_empty(cost.shape),
        cost.new_empty((batch, n)),
        cost.new_empty((batch, m)),
    )


# ---- sinkhorn.plan_sums ------------------------------------------------------------------------------


@op(
    "sinkhorn.plan_sums",
    "sinkhorn_plan_sums(Tensor cost, Tensor f, Tensor g, Tensor x, Tensor? w, Tensor y, float epsilon,"
    " bool by_cost=False, Tensor? lengths=None) -> (Tensor rows, Tensor columns)",
)
def _(cost, f, g, x, w, y, epsilon, by_cost=False, lengths=None):
    batch, n, m = cost.shape
    return cost.new_empty((batch, n)), cost.new_empty((batch, m))


# ---- sinkhorn.streaming ------------------------------------------------------------------------------

# x (B, n, d), y (B, m, d), a and f (B, n), b and g (B, m), all of one dtype. cost: 0 squared, 1 half squared,
# 2 minus the inner product, 3 Euclidean, 4 city block. epsilons: a schedule whose last is the target; a negative
# rho is a hard marginal.


@op(
    "sinkhorn.streaming",
    "sinkhorn_points(Tensor x, Tensor y, Tensor a, Tensor b, Tensor? f, Tensor? g, int cost,"
    " float[] epsilons, float rho_a, float rho_b, float momentum, int max_iterations, float tolerance,"
    " int check_every)"
    " -> (Tensor f, Tensor g, Tensor value, Tensor iterations, Tensor error, Tensor converged)",
)
def _(x, y, a, b, f, g, cost, epsilons, rho_a, rho_b, momentum, max_iterations, tolerance, every):
    batch, n, _ = x.shape
    return (
        x.new_empty((batch, n)),
        x.new_empty((batch, y.shape[1])),
        x.new_empty((batch,)),
        x.new_empty((batch,), dtype=torch.int64),
        x.new_empty((batch,)),
        x.new_empty((batch,), dtype=torch.bool),
    )


@op(
    "sinkhorn.streaming",
    "sinkhorn_points_symmetric(Tensor x, Tensor? y, Tensor a, Tensor? b, int cost, float[] epsilons,"
    " float rho) -> (Tensor f, Tensor g)",
)
def _(x, y, a, b, cost, epsilons, rho):
    batch, n, _ = x.shape
    return x.new_empty((batch, n)), x.new_empty((batch, 0 if y is None else y.shape[1]))


@op(
    "sinkhorn.streaming",
    "sinkhorn_points_softmin(Tensor x, Tensor y, Tensor g, Tensor b, int cost, float epsilon) -> Tensor",
)
def _(x, y, g, b, cost, epsilon):
    return x.new_empty((x.shape[0], x.shape[1]))


# ---- sinkhorn.streaming_apply ------------------------------------------------------------------------

# v (B, m, k). power: -1, 0 or 1, of the cost. signs: v (B, m, 1), out (B, n, d).


@op(
    "sinkhorn.streaming_apply",
    "sinkhorn_points_apply(Tensor x, Tensor y, Tensor f, Tensor g, Tensor v, int cost, float epsilon,"
    " int power, bool signs) -> Tensor",
)
def _(x, y, f, g, v, cost, epsilon, power, signs):
    batch, n, d = x.shape
    return x.new_empty((batch, n, d if signs else v.shape[2]))


# ---- sinkhorn.small ----------------------------------------------------------------------------------

# logits (batch, n, m), n and m up to 32; kind is the index in solera.sinkhorn.small.VARIANTS.


@op(
    "sinkhorn.small",
    "sinkhorn_small(Tensor logits, int iterations, int kind, bool rows, float eps) -> Tensor",
)
def _(logits, iterations, kind, rows, eps):
    return logits.new_empty(logits.shape)


@op(
    "sinkhorn.small",
    "sinkhorn_small_backward(Tensor grad, Tensor logits, int iterations, int kind, bool rows, float eps)"
    " -> Tensor",
)
def _(grad, logits, iterations, kind, rows, eps):
    return logits.new_empty(logits.shape)


# ---- sinkhorn.newton_sparse --------------------------------------------------------------------------

# All in float64. values (batch, n, keep) and index, int64: the largest entries of each row of the plan; p (batch,
# n) and q (batch, m) its sums; ra and rb the right-hand side.


@op(
    "sinkhorn.newton_sparse",
    "sinkhorn_newton_pass(Tensor cost, Tensor a, Tensor b, Tensor f, Tensor g, float epsilon, int keep)"
    " -> (Tensor row_sum, Tensor column_sum, Tensor values, Tensor index)",
)
def _(cost, a, b, f, g, epsilon, keep):
    batch, n, m = cost.shape
    return (
        cost.new_empty((batch, n)),
        cost.new_empty((batch, m)),
        cost.new_empty((batch, n, keep)),
        cost.new_empty((batch, n, keep), dtype=torch.int64),
    )


@op(
    "sinkhorn.newton_sparse",
    "sinkhorn_newton_solve(Tensor values, Tensor index, Tensor p, Tensor q, Tensor ra, Tensor rb,"
    " float shift, float tolerance, int max_iterations) -> (Tensor x, Tensor y, Tensor iterations)",
)
def _(values, index, p, q, ra, rb, shift, tolerance, max_iterations):
    return (
        values.new_empty(p.shape),
        values.new_empty(q.shape),
        values.new_empty(p.shape[:1], dtype=torch.int64),
    )


# ---- sinkhorn.scaling --------------------------------------------------------------------------------


@op(
    "sinkhorn.scaling",
    "scaling_solve(Tensor logits, Tensor weight, Tensor log_target, Tensor? g, float scale, int steps,"
    " float tolerance) -> (Tensor g, Tensor sums, Tensor steps)",
)
def _(logits, weight, log_target, g, scale, steps, tolerance):
    return (
        log_target.new_empty(log_target.shape),
        log_target.new_empty(log_target.shape),
        log_target.new_empty((log_target.shape[0],), dtype=torch.int64),
    )


@op(
    "sinkhorn.scaling",
    "scaling_assign(Tensor logits, Tensor weight, Tensor g, float scale) -> Tensor",
)
def _(logits, weight, g, scale):
    return logits.new_empty(logits.shape)


@op(
    "sinkhorn.scaling",
    "scaling_balance(Tensor logits, Tensor weight, Tensor log_target, float scale, int iterations) -> Tensor",
)
def _(logits, weight, log_target, scale, iterations):
    return logits.new_empty(logits.shape)


@op(
    "sinkhorn.scaling",
    "scaling_backward(Tensor? grad, Tensor q, Tensor y, Tensor weight) -> Tensor",
)
def _(grad, q, y, weight):
    return q.new_empty(q.shape)


# ---- sinkhorn.sliced ---------------------------------------------------------------------------------


@op(
    "sinkhorn.sliced",
    "sliced_forward(Tensor x, Tensor y, Tensor directions, float p)"
    " -> (Tensor value, Tensor order_x, Tensor order_y)",
)
def _(x, y, directions, p):
    batch, n, _ = x.shape
    count = directions.shape[1]
    return (
        x.new_empty((batch, count)),
        x.new_empty((batch, count, n), dtype=torch.int32),
        x.new_empty((batch, count, y.shape[1]), dtype=torch.int32),
    )


@op(
    "sinkhorn.sliced",
    "sliced_backward(Tensor grad, Tensor x, Tensor y, Tensor directions, Tensor order_x, Tensor order_y,"
    " float p) -> (Tensor dx, Tensor dy, Tensor ddirections)",
)
def _(grad, x, y, directions, order_x, order_y, p):
    batch, _, d = x.shape
    return (
        x.new_empty(x.shape),
        x.new_empty(y.shape),
        x.new_empty((batch, directions.shape[1], d)),
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


# ---- weights.sweep -----------------------------------------------------------------------------------

# base, tuned: L tensors each, a pair of one dtype; alpha (A,) or (A, L) float32 or float64; out and grads (A, ...).

op("weights.sweep", "lerp_sweep(Tensor[] base, Tensor[] tuned, Tensor alpha) -> Tensor[]")
op(
    "weights.sweep",
    "lerp_sweep_backward(Tensor[] grads, Tensor[] base, Tensor[] tuned, Tensor alpha, bool need_alpha,"
    " bool need_base, bool need_tuned) -> (Tensor dalpha, Tensor[] dbase, Tensor[] dtuned)",
)


# ---- weights.lookahead -------------------------------------------------------------------------------

op("weights.lookahead", "lookahead_(Tensor(a!)[] slow, Tensor(b!)[] fast, float alpha) -> ()")


# ---- weights.indexed_ema -----------------------------------------------------------------------------

# bank (N, D), index (B,) int64 (negative: left out), values (B, D).

op(
    "weights.indexed_ema",
    "indexed_ema_(Tensor(a!) bank, Tensor index, Tensor values, float decay) -> ()",
)


# ---- weights.gram ------------------------------------------------------------------------------------

# tensors: models times L, model by model; by_row: the rows are those along a tensor's first dimension, else each
# tensor is one. The result is (rows of all L tensors, K, K) in float64, as is dgram; need_tensors covers the base.


@op("weights.gram", "gram(Tensor[] tensors, Tensor[] base, int models, bool by_row) -> Tensor")
def _(tensors, base, models, by_row):
    length = len(tensors) // models
    rows = sum([t.shape[0] for t in tensors[:length]]) if by_row else length
    return tensors[0].new_empty((rows, models, models), dtype=torch.float64)


@op(
    "weights.gram",
    "gram_backward(Tensor dgram, Tensor[] tensors, Tensor[] base, bool by_row, bool[] need_tensors)"
    " -> Tensor[]",
)
def _(dgram, tensors, base, by_row, need_tensors):
    return [t.new_empty(t.shape) for t, need in zip((*tensors, *base), need_tensors) if need]


# ---- weights.model_stock -----------------------------------------------------------------------------

# Arguments and dots are gram's; merged in the dtype of what goes in, promoted. With dots given (of rows that the
# tensors are a part of) none are taken, and `gram` is a copy of them.


@op(
    "weights.model_stock",
    "model_stock(Tensor[] tensors, Tensor[] base, int models, bool by_row, Tensor? dots=None)"
    " -> (Tensor[] merged, Tensor gram)",
)
def _(tensors, base, models, by_row, dots=None):
    length = len(tensors) // models
    like = tensors[:length]
    rows = sum([t.shape[0] for t in like]) if by_row else length
    merged = []
    for item, t in enumerate(like):
        dtype = base[item].dtype
        for other in tensors[item::length]:
            dtype = torch.promote_types(dtype, other.dtype)
        merged.append(t.new_empty(t.shape, dtype=dtype))
    return merged, like[0].new_empty((rows, models, models), dtype=torch.float64)


# ---- weights.row_lincomb -----------------------------------------------------------------------------

# lincomb with coefficients (K, rows of all L tensors), the rows along the first dimension of each.

op(
    "weights.row_lincomb",
    "row_lincomb(Tensor[] tensors, Tensor coefficients, Tensor[] base, ScalarType? out_dtype)"
    " -> Tensor[]",
)
op(
    "weights.row_lincomb",
    "row_lincomb_backward(Tensor[] grads, Tensor[] tensors, Tensor coefficients, Tensor[] base,"
    " bool need_coefficients, bool[] need_tensors) -> (Tensor dcoefficients, Tensor[] dtensors)",
)


# ---- weights.reparam ---------------------------------------------------------------------------------

# One dtype for all tensors of a call; seed one int64 number; a, b of weight_compand one number in the
# accumulator's dtype, its kind 0 for arctan, 1 for tanh; dab (2,) float64.

op(
    "weights.reparam",
    "mixout(Tensor weight, Tensor? anchor, Tensor seed, float p, int key, bool column) -> Tensor",
)
op(
    "weights.reparam",
    "mixout_backward(Tensor grad, Tensor seed, float p, int key, bool column, bool need_weight,"
    " bool need_anchor) -> (Tensor dweight, Tensor danchor)",
)
op("weights.reparam", "masked_weight(Tensor weight, Tensor score, float threshold) -> Tensor")
op(
    "weights.reparam",
    "masked_weight_backward(Tensor grad, Tensor weight, Tensor score, float threshold, bool need_weight,"
    " bool need_score) -> (Tensor dweight, Tensor dscore)",
)
op(
    "weights.reparam",
    "gradient_dropout(Tensor grad, Tensor other, Tensor seed, float rate, float eps, int key) -> Tensor",
)
op("weights.reparam", "weight_compand(Tensor v, Tensor a, Tensor b, int kind) -> Tensor")
op(
    "weights.reparam",
    "weight_compand_backward(Tensor grad, Tensor v, Tensor a, Tensor b, int kind, bool need_v)"
    " -> (Tensor dv, Tensor dab)",
)


# ---- weights.reparam_linear --------------------------------------------------------------------------

# x (N, I), weight and other (O, I) of one dtype. kind 0, 1: mixout of elements, of columns (other the anchor,
# number p); 2: the mask (other the score, number the threshold). dbias in the accumulator's dtype.

op(
    "weights.reparam_linear",
    "reparam_linear(Tensor x, Tensor weight, Tensor? other, Tensor? bias, Tensor? seed, int kind,"
    " float number, int key) -> Tensor",
)
op(
    "weights.reparam_linear",
    "reparam_linear_backward(Tensor dy, Tensor x, Tensor weight, Tensor? other, Tensor? seed, int kind,"
    " float number, int key, bool need_x, bool need_weight, bool need_other, bool need_bias)"
    " -> (Tensor dx, Tensor dweight, Tensor dother, Tensor dbias)",
)


# ---- weights.sparse_delta ----------------------------------------------------------------------------

# x (N, I), weight (O, I); index (S,) int64, increasing places in the flattened weight; value (S,).

op(
    "weights.sparse_delta",
    "sparse_delta_linear(Tensor x, Tensor weight, Tensor index, Tensor value, Tensor? bias) -> Tensor",
)
op(
    "weights.sparse_delta",
    "sparse_delta_linear_backward(Tensor dy, Tensor x, Tensor weight, Tensor index, Tensor value,"
    " bool need_x, bool need_value, bool need_bias) -> (Tensor dx, Tensor dvalue, Tensor dbias)",
)


# ---- weights.perturb ---------------------------------------------------------------------------------

# Lists of L tensors; factors and norms () or (L,), float32 or float64; kept as the parameters, or empty.

op("weights.perturb", "perturb_norms(Tensor[] parameters, Tensor[] grads, float eta) -> Tensor")
op(
    "weights.perturb",
    "perturb_(Tensor(a!)[] parameters, Tensor[] grads, Tensor factors, float? eta, Tensor(b!)[] kept)"
    " -> ()",
)
op(
    "weights.perturb",
    "perturb_out(Tensor[] parameters, Tensor[] grads, Tensor factors, float? eta, Tensor(a!)[] out) -> ()",
)
op(
    "weights.perturb",
    "noise_(Tensor(a!)[] parameters, Tensor norms, float[] scales, int seed, int[] keys) -> ()",
)


# ---- weights.anchor ----------------------------------------------------------------------------------

# Lists of L tensors, weights and starts also empty; sums (2, L) float64; factors () or (L,).

op(
    "weights.anchor",
    "anchor_sums(Tensor[] parameters, Tensor[] anchors, Tensor[] weights, Tensor[] starts) -> Tensor",
)
op(
    "weights.anchor",
    "anchor_gradient(Tensor[] parameters, Tensor[] anchors, Tensor[] weights, Tensor factors)"
    " -> Tensor[]",
)
op(
    "weights.anchor",
    "anchor_step_(Tensor(a!)[] parameters, Tensor[] anchors, Tensor[] weights, Tensor factors) -> ()",
)


# ---- weights.consensus -------------------------------------------------------------------------------


# tensors: K models of L tensors each, model by model; base: L or none. ranks (K, G) from the largest, 0 for none
# (inf); thresholds (K, G) float64, G = 1 if whole, else L.
@op(
    "weights.abs_quantile",
    "abs_quantile(Tensor[] tensors, Tensor[] base, int models, int[] ranks, bool whole) -> Tensor",
)
def _(tensors, base, models, ranks, whole):
    return tensors[0].new_empty((models, len(ranks) // models), dtype=torch.float64)


# One tensor of each of K models, base one or none. (H, 2^16) int64: of model which[h] the elements whose key (the
# bits of |w - base|) has prefixes[h] above the 16 bits at `shift`, counted by those bits.
@op(
    "weights.abs_quantile",
    "abs_digits(Tensor[] tensors, Tensor[] base, int[] which, int[] prefixes, int shift) -> Tensor",
)
def _(tensors, base, which, prefixes, shift):
    return tensors[0].new_empty((len(which), 1 << 16), dtype=torch.int64)


# weights, factors, low, high (K, L); seed one int64 with keys (L) and keep (K), bounds of 32-bit words. vote and
# divide index VOTES and DIVISORS of solera.weights.consensus. dweights (K, L), norms (2, K, L), both float64.
# begins (L) or none: where each tensor begins in the one its words are drawn for, a multiple of 512.
@op(
    "weights.consensus",
    "consensus(Tensor[] tensors, Tensor[] base, Tensor weights, Tensor? factors, Tensor? low, Tensor? high,"
    " Tensor? seed, int[] keys, int[] keep, int vote, bool before, int divide, float scale, int[] begins=[])"
    " -> Tensor[]",
)
def _(tensors, base, weights, *rest):
    out = []
    for item in range(len(tensors) // weights.shape[0]):
        dtype = tensors[item].dtype
        for t in (*tensors[item :: len(tensors) // weights.shape[0]], *base[item : item + 1]):
            dtype = torch.promote_types(dtype, t.dtype)
        out.append(tensors[item].new_empty(tensors[item].shape, dtype=dtype))
    return out


@op(
    "weights.consensus",
    "consensus_backward(Tensor[] grads, Tensor[] tensors, Tensor[] base, Tensor weights, Tensor? factors,"
    " Tensor? low, Tensor? high, Tensor? seed, int[] keys, int[] keep, int vote, bool before, int divide,"
    " float scale, bool need_weights, bool[] need_tensors) -> (Tensor dweights, Tensor[] dtensors)",
)
def _(grads, tensors, base, weights, *rest):
    need_weights, need_tensors = rest[-2:]
    shape = weights.shape if need_weights else (0,)
    wanted = [t for t, need in zip((*tensors, *base), need_tensors) if need]
    return weights.new_empty(shape, dtype=torch.float64), [t.new_empty(t.shape) for t in wanted]


@op(
    "weights.consensus",
    "consensus_norms(Tensor[] tensors, Tensor[] base, Tensor seed, int[] keys, int[] keep, int[] begins=[])"
    " -> Tensor",
)
def _(tensors, base, seed, keys, keep, begins=()):
    shape = (2, len(keep), len(tensors) // len(keep))
    return tensors[0].new_empty(shape, dtype=torch.float64)


# ---- weights.chain -----------------------------------------------------------------------------------

# x, dy (N, d); coefficients (2, d - 1) cosines and sines or (4, d - 1) blocks, scale (d,), in the
# accumulator's dtype; dcoefficients (1, d - 1) of the angles or (4, d - 1).


@op(
    "weights.chain",
    "givens_chain(Tensor x, Tensor coefficients, Tensor? scale, bool reverse) -> Tensor",
)
def _(x, coefficients, scale, reverse):
    return x.new_empty(x.shape)


@op(
    "weights.chain",
    "givens_chain_backward(Tensor dy, Tensor x, Tensor coefficients, Tensor? scale, bool reverse,"
    " bool need_x, bool need_coefficients, bool need_scale)"
    " -> (Tensor dx, Tensor dcoefficients, Tensor dscale)",
)
def _(dy, x, coefficients, scale, reverse, need_x, need_coefficients, need_scale):
    rows = 4 if coefficients.shape[0] == 4 else 1
    return (
        x.new_empty(x.shape if need_x else (0,)),
        coefficients.new_empty((rows, x.shape[1] - 1) if need_coefficients else (0,)),
        coefficients.new_empty((x.shape[1],) if need_scale and scale is not None else (0,)),
    )


# ---- weights.low_rank_update -------------------------------------------------------------------------

# w (O, I), a (r, I), b (O, r), keys (r, I); of b and keys one may be missing (an empty list).


@op(
    "weights.low_rank_update",
    "low_rank_update(Tensor w, Tensor a, Tensor? b, Tensor? keys) -> Tensor",
)
def _(w, a, b, keys):
    return w.new_empty(w.shape)


op(
    "weights.low_rank_update",
    "low_rank_update_(Tensor(a!)[] w, Tensor[] a, Tensor[] b, Tensor[] keys) -> ()",
)


_registry.attach_kernels()
