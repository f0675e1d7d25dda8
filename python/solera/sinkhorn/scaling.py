r"""Core `scaling`: a tall matrix of logits brought to given column masses, its rows summing to one.

With $t_{nk} = l_{nk} / \tau$, row weights $r_n$ and column masses $c_k$ (both up to a common factor),
Sinkhorn's iteration in the log domain alternates

$$F_n = -\log \sum_k e^{t_{nk} + G_k},\qquad G_k = \log c_k - \log \sum_n r_n e^{t_{nk} + F_n},\qquad
  Q_{nk} = e^{t_{nk} + F_n + G_k} = \mathrm{softmax}_k(t_n + G)_k .$$

- `balanced_assignment` starts from the columns ($F = 0$) and takes a few iterations: SwAV, DINO, novel class discovery.
- `prior_match` starts from $G = 0$ and goes on until $\sum_n r_n Q_{nk} = c_k$: the offsets $a = G$ of the classes.

The row pass's terms, divided by their row's sum, already are the next column pass's terms: an iteration is one read
of the logits and one exponential an entry.

**Gradient of the matched prior.** At the solution $\sum_n r_n p_{nk} = c_k$ with $p_n = \mathrm{softmax}(l_n + a)$.
Differentiating,

$$H\,\mathrm da = \mathrm dc - \sum_n r_n J_n\,\mathrm dl_n,\qquad J_n = \mathrm{diag}(p_n) - p_n p_n^\top,\quad
  H = \sum_n r_n J_n .$$

H is symmetric, positive semidefinite, its null vector is 1 (a constant added to a). For gradients $u$ of $a$ (whose
mean is fixed at 0) and $D$ of $p$, with $J_n$ symmetric,

$$H y = u - \bar u + \sum_n J_n D_n,\qquad \mathrm dl_n = J_n (D_n - r_n y),\qquad \mathrm dc = y .$$

Sources: Caron et al., "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments" (SwAV), 2020;
Liusie, Manakul, Gales, "Mitigating Word Bias in Zero-shot Prompt-based Classifiers", 2023. The implicit gradient
is derived here.
"""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _check
from .._registry import accumulate_type, reference
from .._route import needs_graph, use_reference
from .plan import transforms_active

_op = torch.ops.solera
RIDGE = 1e-12


# ---- reference ---------------------------------------------------------------------------------------
# Potentials are in base 2: G log2(e) is `g`, log2 of the column sums without G is `sums`.


def _log2_sum(t: Tensor, dim: int) -> Tensor:
    if t.shape[dim] == 0:
        return t.sum(dim) - torch.inf
    return torch.logsumexp(t * math.log(2.0), dim) / math.log(2.0)


def _next_g(log_target: Tensor, sums: Tensor) -> Tensor:
    """0 for a column in which nothing is allowed, -inf for one that is to be empty."""
    g = torch.where(sums == -torch.inf, 0.0, log_target - sums)
    return torch.where(log_target == -torch.inf, -torch.inf, g)


def scaling_solve_reference(logits, weight, log_target, g, scale, steps, tolerance):
    """The loop, without a host synchronisation; arguments as the op's."""
    live = (weight != 0).unsqueeze(-1)
    t = torch.where(live, logits.to(weight.dtype) * scale, -torch.inf)
    log_weight = torch.log2(weight).unsqueeze(-1)
    sums = torch.zeros_like(log_target)
    if g is None:
        sums = _log2_sum(t + log_weight, -2)
        g = _next_g(log_target, sums)
    done = torch.zeros(log_target.shape[0], dtype=torch.int64, device=logits.device)
    active = torch.ones_like(done, dtype=torch.bool)
    for _ in range(steps):
        f = _log2_sum(t + g.unsqueeze(-2), -1)
        f = torch.where(f == -torch.inf, -torch.inf, -f).unsqueeze(-1)
        now = _log2_sum(t + (f + log_weight), -2)
        sums = torch.where(active.unsqueeze(-1), now, sums)
        done = done + active
        if tolerance > 0:
            error = (torch.exp2(sums + g) - torch.exp2(log_target)).abs().sum(-1)
            active = active & ~(error <= tolerance)
        g = torch.where(active.unsqueeze(-1), _next_g(log_target, sums), g)
    return g.clone(), sums, done


def scaling_assign_reference(logits, weight, g, scale):
    """softmax(scale logits + g) in base 2, 0 where the weight is 0."""
    t = logits.to(weight.dtype) * scale + g.unsqueeze(-2)
    live = (weight != 0).unsqueeze(-1)
    q = torch.softmax(torch.where(live, t, 0.0) * math.log(2.0), -1)
    return torch.where(live, q, 0.0).to(logits.dtype).contiguous()


def scaling_backward_reference(grad, q, y, weight):
    """q * (c - <q, c>) of every row, c = grad - weight y."""
    wide = q.to(weight.dtype)
    c = -weight.unsqueeze(-1) * y.unsqueeze(-2)
    if grad is not None:
        c = grad.to(weight.dtype) + c
    return (wide * (c - (wide * c).sum(-1, keepdim=True))).to(q.dtype).contiguous()


@reference("scaling_solve")
def _scaling_solve(logits, weight, log_target, g, scale, steps, tolerance):
    return scaling_solve_reference(logits, weight, log_target, g, scale, steps, tolerance)


@reference("scaling_assign")
def _scaling_assign(logits, weight, g, scale):
    return scaling_assign_reference(logits, weight, g, scale)


@reference("scaling_balance")
def _scaling_balance(logits, weight, log_target, scale, iterations):
    g = scaling_solve_reference(logits, weight, log_target, None, scale, iterations - 1, 0.0)[0]
    return scaling_assign_reference(logits, weight, g, scale)


@reference("scaling_backward")
def _scaling_backward(grad, q, y, weight):
    return scaling_backward_reference(grad, q, y, weight)


def _solve(*args):
    return (_scaling_solve if use_reference() else _op.scaling_solve)(*args)


def _assign(*args):
    return (_scaling_assign if use_reference() else _op.scaling_assign)(*args)


# ---- arguments ---------------------------------------------------------------------------------------


def _positive(name: str, value: object) -> float:
    number = _check.number(name, value)
    if not number > 0:
        raise ValueError(f"{name}: expected a number > 0, got {value!r}")
    return number


def _iterations(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"iterations: expected an int, got {type(value).__name__} {value!r}")
    if value < 1:
        raise ValueError(f"iterations: expected at least 1, got {value}")
    return value


def _marginal(name: str, value: Tensor | None, logits: Tensor, count: int) -> Tensor:
    """(batch..., count) in the type that is computed in; ones for None."""
    batch = logits.shape[:-2]
    acc = accumulate_type(logits)
    if value is None:
        return logits.new_ones((1,), dtype=acc).expand(*batch, count)
    shape = (count,) if isinstance(value, Tensor) and value.dim() == 1 else (*batch, count)
    _check.like(name, value, shape, logits, "logits")
    return value.to(acc).expand(*batch, count)


def _weights(name: str, value: Tensor | None, valid: Tensor | None, logits: Tensor) -> Tensor:
    """Row weights with 0 for padded rows."""
    *batch, n, _ = logits.shape
    weight = _marginal(name, value, logits, n)
    if valid is None:
        return weight
    if not isinstance(valid, Tensor) or valid.dtype != torch.bool:
        came = valid.dtype if isinstance(valid, Tensor) else type(valid).__name__
        raise TypeError(f"valid: expected a bool tensor, got {came}")
    if valid.shape not in ((n,), (*batch, n)):
        raise ValueError(
            f"valid: expected shape {(*batch, n)} to go with logits of shape {tuple(logits.shape)}, "
            f"got {tuple(valid.shape)}"
        )
    if valid.device != logits.device:
        raise ValueError(f"valid: expected device {logits.device}, got {valid.device}")
    return torch.where(valid, weight, 0.0)


def _check_weights(name: str, value: Tensor, what: str) -> None:
    """The check that reads the data: only for CPU tensors in eager mode."""
    if value.device.type != "cpu" or torch.compiler.is_compiling() or transforms_active():
        return
    if not bool((torch.isfinite(value) & (value >= 0)).all()):
        raise ValueError(
            f"{name}: expected finite {what} >= 0, got a negative, NaN or infinite one"
        )
    if value.numel() > 0 and not bool((value.sum(-1) > 0).all()):
        raise ValueError(f"{name}: expected a positive total, got zeros")


# ---- balanced assignment -----------------------------------------------------------------------------


def _everyones(sums: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
    """log2 of the column sums of all ranks: a maximum and a sum of K numbers travel."""
    top = sums.clone()
    torch.distributed.all_reduce(top, op=torch.distributed.ReduceOp.MAX, group=group)
    shift = torch.where(top == -torch.inf, 0.0, top)
    total = torch.exp2(sums - shift)
    torch.distributed.all_reduce(total, group=group)
    return shift + torch.log2(total)


def balanced_assignment(
    logits: Tensor,
    temperature: float = 0.05,
    iterations: int = 3,
    *,
    row_marginal: Tensor | None = None,
    column_marginal: Tensor | None = None,
    valid: Tensor | None = None,
    group: torch.distributed.ProcessGroup | None = None,
) -> Tensor:
    r"""Soft assignment of N samples to K clusters that fills the clusters evenly, by Sinkhorn-Knopp; no gradient.

    $Q = \mathrm{diag}(u)\, e^{\text{logits}/\tau}\, \mathrm{diag}(v)$: `iterations` times, the columns (clusters)
    are scaled to their share $c_k$ of all mass, then the rows (samples) to theirs. The result is scaled so that each
    row sums to one: a target for a cross-entropy. In log-domain, so no logits overflow (cosines / 0.05 give
    $e^{20}$) and no entry's cluster or sample is lost however far it is below the global maximum; the shift is
    exact, which one maximum a sample before the first column sum is not.

    Args:
        logits: (..., N, K), any leading batch (views, heads), each item an assignment of its own; float32, float64,
            bfloat16, float16; computed in float32 (float64 for float64), returned in its own dtype. -inf forbids a
            pair.
        temperature: > 0; epsilon of the Sinkhorn literature.
        iterations: >= 1.
        row_marginal: (..., N) or (N,), >= 0, up to a factor; uniform if None. A weight of 2 counts as the sample twice.
        column_marginal: (..., K) or (K,), >= 0, up to a factor; uniform if None. 0 leaves the cluster empty.
        valid: bool (..., N) or (N,): rows that are False are padding, whatever stands there; their result is 0.
        group: a process group whose ranks hold rows of one assignment (their number may differ); only K numbers of
            sums and K maxima travel, twice an iteration. Every rank has to pass the same batch and K.

    Shapes: (..., N, K) -> (..., N, K).

    A sample that forbids every cluster gets NaN and counts for nothing; a NaN in the logits gives NaN in its batch item
    alone; a cluster that every sample forbids stays empty.

    Raises:
        ValueError, TypeError: naming the argument.

    Source: Caron et al., "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments", 2020;
    Cuturi, "Sinkhorn Distances", 2013.
    """
    _check.tensor("logits", logits, min_dim=2)
    *batch, n, k = logits.shape
    if k == 0:
        raise ValueError(f"logits: expected at least one column, got shape {tuple(logits.shape)}")
    scale = 1.0 / (_positive("temperature", temperature) * math.log(2.0))
    _iterations(iterations)
    weight = _weights("row_marginal", row_marginal, valid, logits)
    masses = _marginal("column_marginal", column_marginal, logits, k)
    for name, given in (("row_marginal", row_marginal), ("column_marginal", column_marginal)):
        if given is not None:
            _check_weights(name, given, "weights")
    with torch.no_grad():
        count = math.prod(batch)
        x = logits.detach().reshape(count, n, k)
        weight = weight.detach().reshape(count, n)
        target = torch.log2(masses.detach()).reshape(count, k)
        if group is None:
            op = _scaling_balance if use_reference() else _op.scaling_balance
            return op(x, weight, target, scale, iterations).reshape(logits.shape)
        sums = _solve(x, weight, target, None, scale, 0, 0.0)[1]
        g = _next_g(target, _everyones(sums, group))
        for _ in range(iterations - 1):
            sums = _solve(x, weight, target, g, scale, 1, 0.0)[1]
            g = _next_g(target, _everyones(sums, group))
        return _assign(x, weight, g, scale).reshape(logits.shape)


# ---- prior matching ----------------------------------------------------------------------------------


class PriorMatch(NamedTuple):
    """What `prior_match` returns. Shapes: offsets (..., K), probabilities (..., N, K)."""

    offsets: Tensor
    probabilities: Tensor


def _curvature(p: Tensor, weight: Tensor) -> Tensor:
    """H of the module's docstring with its null vector filled in, (batch, K, K)."""
    rows = weight.unsqueeze(-1) * p
    h = torch.diag_embed(rows.sum(-2)) - rows.transpose(-1, -2) @ p
    return h + 1.0 / p.shape[-1]


def _solve_curvature(h: Tensor, right: Tensor) -> Tensor:
    # Classes that no row's probability tells apart leave H singular: the ridge, above the rounding of its entries
    # (of 1 and below), moves nothing then.
    ridge = RIDGE * torch.eye(h.shape[-1], dtype=h.dtype, device=h.device)
    factor, failed = torch.linalg.cholesky_ex(h + ridge)
    y = torch.cholesky_solve(right.unsqueeze(-1), factor).squeeze(-1)
    return torch.where(failed.unsqueeze(-1) != 0, torch.nan, y)


class _Match(torch.autograd.Function):
    """Offsets and probabilities, implicitly differentiable in logits and prior."""

    @staticmethod
    def forward(ctx, logits, prior, weight, iterations, tolerance):
        a, p = _match(logits, prior, weight, iterations, tolerance)
        ctx.save_for_backward(p, weight)
        ctx.set_materialize_grads(False)
        return a, p

    @staticmethod
    def backward(ctx, da, dp):
        if da is None and dp is None:
            return (None,) * 5
        p, weight = ctx.saved_tensors
        wide = p.to(torch.float64)
        # Rows rounded to p's dtype do not sum to one, which would leave H indefinite where they are near 0 or 1.
        wide = wide / torch.where(wide > 0, wide, 0.0).sum(-1, keepdim=True).clamp_min(1e-9)
        w = weight.to(torch.float64)
        right = torch.zeros_like(wide[:, 0])
        if da is not None:
            right = right + (da - da.mean(-1, keepdim=True)).to(torch.float64)
        if dp is not None:
            d = dp.to(torch.float64)
            right = right + (wide * (d - (wide * d).sum(-1, keepdim=True))).sum(-2)
        y = _solve_curvature(_curvature(wide, w), right).to(weight.dtype)
        if torch.is_grad_enabled():
            dlogits = scaling_backward_reference(dp, p, y, weight)
        else:
            op = _scaling_backward if use_reference() else _op.scaling_backward
            dlogits = op(dp, p, y, weight)
        return dlogits, y if ctx.needs_input_grad[1] else None, None, None, None


def _match(logits, prior, weight, iterations, tolerance):
    """(a in natural logarithms with mean 0, probabilities) of tensors that were checked."""
    if transforms_active():
        solve, assign = scaling_solve_reference, scaling_assign_reference
    else:
        solve, assign = _solve, _assign
    scale = 1.0 / math.log(2.0)
    start = torch.zeros_like(prior)
    g, _, _ = solve(logits, weight, torch.log2(prior), start, scale, iterations, tolerance)
    p = assign(logits, weight, g, scale)
    a = g * math.log(2.0)
    return a - a.mean(-1, keepdim=True), p


def prior_match(
    logits: Tensor,
    prior: Tensor | None = None,
    *,
    iterations: int = 1000,
    tolerance: float = 1e-6,
    valid: Tensor | None = None,
) -> PriorMatch:
    r"""Class offsets under which the mean prediction is a given prior: $\frac1N\sum_n \mathrm{softmax}(l_n + a) = \pi$.

    Offsets of this kind undo the bias of a label word (a prompt that says "positive" to everything), and a shifted
    label distribution. They are Sinkhorn's column potential with row marginals 1 and column marginals $N\pi$. They are
    unique up to a constant; the ones returned have mean 0.

    Args:
        logits: (..., N, K), any leading batch (prompts), matched item by item.
        prior: (..., K) or (K,), > 0, scaled to total 1; uniform if None.
        iterations: at most so many, >= 1.
        tolerance: stop an item once the L1 error of its mean prediction is at most this, on the device; 0 never stops.
        valid: bool (..., N) or (N,): rows that are False are padding; their probabilities are 0.

    Shapes: (..., N, K), (K,) -> offsets (..., K), in float32 (float64 for float64), probabilities (..., N, K).

    Gradients flow from both results to logits and prior by implicit differentiation: one K x K solve, nothing is
    kept of the iterations; right at convergence. torch.func transforms and forward-mode AD differentiate the iterations
    themselves.

    Raises:
        ValueError, TypeError: naming the argument.
    Warns:
        UserWarning: on the CPU in eager mode, if the tolerance was not reached.

    Source: Liusie, Manakul, Gales, "Mitigating Word Bias in Zero-shot Prompt-based Classifiers", 2023, which searches
    a grid of offsets; the condition is the same.
    """
    _check.tensor("logits", logits, min_dim=2)
    *batch, n, k = logits.shape
    if n == 0 or k == 0:
        raise ValueError(
            f"logits: expected at least one row and one column, got {tuple(logits.shape)}"
        )
    _iterations(iterations)
    tolerance = _check.number("tolerance", tolerance, low=0.0)
    weight = _weights("valid", None, valid, logits)
    target = _marginal("prior", prior, logits, k)
    eager = (
        logits.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not transforms_active()
    )
    if prior is not None and eager and not bool((prior > 0).all() & torch.isfinite(prior).all()):
        raise ValueError("prior: expected finite probabilities > 0, got one that is not")
    count = math.prod(batch)
    x = logits.reshape(count, n, k)
    weight = weight.reshape(count, n)
    total = weight.sum(-1, keepdim=True)
    weight = weight / torch.where(
        total > 0, total, 1.0
    )  # without a valid row all probabilities are 0
    target = (target / target.sum(-1, keepdim=True)).reshape(count, k)
    arguments = (x, target, weight, iterations, tolerance)
    graph = needs_graph(x, target) and not transforms_active()
    a, p = _Match.apply(*arguments) if graph else _match(*arguments)
    if tolerance > 0 and eager and count > 0:
        with torch.no_grad():
            mean = (weight.unsqueeze(-2) @ p.to(weight.dtype)).squeeze(-2)
            error = (mean - target).abs().sum(-1)
            # Half-precision probabilities sum to one no better than they are rounded.
            allowed = tolerance + 4 * torch.finfo(p.dtype).eps
        if bool((error > allowed).any()):
            warnings.warn(
                f"solera.prior_match: {int((error > allowed).sum())} of {count} items have an error above "
                f"tolerance={tolerance:g} after iterations={iterations} (largest {float(error.max()):.3g})",
                UserWarning,
                stacklevel=2,
            )
    return PriorMatch(a.reshape(*batch, k), p.reshape(logits.shape))


def null_offsets(logits: Tensor) -> Tensor:
    r"""Offsets from the predictions for content-free inputs: $a_k = -\log \bar p_k$, their mean's logarithm negated.

    The zero-resource form of `prior_match`, and contextual calibration: softmax(l + a) divides each class's
    probability by what the class gets without any content.

    Shapes: (..., M, K), M null inputs -> (..., K). Differentiable.

    Raises:
        ValueError, TypeError: naming the argument.

    Source: Liusie, Manakul, Gales, 2023; Zhao et al., "Calibrate Before Use", 2021.
    """
    _check.tensor("logits", logits, min_dim=2)
    if logits.shape[-2] == 0 or logits.shape[-1] == 0:
        raise ValueError(
            f"logits: expected at least one row and one column, got {tuple(logits.shape)}"
        )
    log_p = torch.log_softmax(logits.to(accumulate_type(logits)), -1)
    return math.log(logits.shape[-2]) - torch.logsumexp(log_p, -2)
