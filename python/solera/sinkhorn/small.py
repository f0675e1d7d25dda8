r"""Core `small`: thousands to millions of small matrices balanced at once (Sinkhorn's iteration on each).

The rows and the columns of a positive matrix are divided by their sums in turn, `iterations` times, which brings it
to a doubly stochastic one. Of a matrix n x m the side that goes first sums to 1 and the other one, in the mean, to
n / m (rows first) or m / n (columns first): a column's sum is multiplied by $r = m/n$ below, 1 for a square one.
Written for rows first; columns first is the same of the transpose. $x$ are the logits, `iterations` = T:

**deepseek** (the public kernels' formula): $M = \mathrm{softmax}_j(x) + \epsilon$, then columns, then T - 1 times
rows and columns, where a step is

$$M_{ij} \leftarrow \frac{M_{ij}}{\sum_j M_{ij} + \epsilon},\qquad
  M_{ij} \leftarrow \frac{M_{ij}}{r\sum_i M_{ij} + \epsilon}.$$

**scaling**: $M = e^{x - \max_j x}$, then T times rows and columns, each divided by $\max(\text{sum}, \epsilon)$.

**log**: $y = x$, then T times $y \leftarrow y - \mathrm{lse}_j\,y$, $y \leftarrow y - \mathrm{lse}_i\,y - \log r$;
$M = e^y$. No $\epsilon$, and no logit is too far from the others.

The kernels keep $M_{ij} = K_{ij} u_i v_j$ with K made once: a step is a product of K with the other side's factors,

$$t_j = r\sum_i K_{ij} u_i,\qquad w_j \leftarrow t_j + \epsilon w_j\ \text{ or }
  \max(t_j, \epsilon w_j)\ \text{ or }\ t_j,
  \qquad v_j = 1 / w_j ,$$

which is the division above, since $M$'s column sum is $v_j t_j$. An exponential is taken once an entry, "log" too,
unless the logits of a row lie further than 30 (300 in float64) from its largest: such a matrix stays with logarithms.

**Backward**, exact for these T iterations and not for their limit. The forward is done again, u and v of each step kept
(2 n numbers an iteration, in cache or scratch; nothing is saved but the input). $D = G \circ M$, the gradient of
$\log M$, goes back through the steps; one that divided columns turns it into

$$D_{ij} \leftarrow D_{ij} - r\,M_{ij}\sum_i D_{ij},\qquad M_{ij} = K_{ij}u_iv_j \text{ after the step},$$

and for "scaling" leaves it where the divisor was $\epsilon$. Last, through K: $\mathrm dx = D$, or with
$S = K - \epsilon$ the softmax $\mathrm dx = q - S\,\langle q, 1\rangle_{row}$, $q = D \circ S / K$.

**Implicit**: the gradient of the limit, whatever the iterations before it,
$\mathrm dx = M\circ(G - \alpha 1^\top - 1\beta^\top)$ with $\alpha, \beta$ such that its rows and columns sum to 0.
Near the identity 20 iterations are far from the limit and so are the two gradients from one another.

Sources: Sinkhorn, Knopp, 1967; Xie et al., "mHC: Manifold-Constrained Hyper-Connections", 2025 (arXiv 2512.24880);
"deepseek" is the definition of `sinkhorn_normalize_ref` in DeepSeek's TileKernels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import _check
from .._autograd import differentiable_vjp
from .._registry import accumulate_type, reference
from .._route import needs_graph, use_reference, without_autocast
from .plan import transforms_active

_op = torch.ops.solera
VARIANTS = ("deepseek", "scaling", "log")
DEEPSEEK, SCALING, LOG = range(3)
MOST = 32  # rows or columns that the kernels take


# ---- reference: the definition -----------------------------------------------------------------------


def _lse(y: Tensor, dim: int) -> Tensor:
    """logsumexp, 0 where every entry is -inf (and with a gradient there)."""
    none = (y == -torch.inf).all(dim, keepdim=True)
    return torch.where(none, 0.0, torch.logsumexp(torch.where(none, 0.0, y), dim, keepdim=True))


def _shifted(x: Tensor) -> Tensor:
    """x - its largest in a row, which only moves a factor of the row."""
    top = x.detach().amax(-1, keepdim=True).clamp_min(torch.finfo(x.dtype).min)
    return x - top


def _start(x: Tensor, kind: int, eps: float) -> tuple[Tensor, Tensor]:
    """The positive matrix that is balanced, and the softmax in it (or itself)."""
    e = torch.exp(_shifted(x))
    if kind != DEEPSEEK:
        return e, e
    p = e / e.sum(-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
    return torch.where(x == -torch.inf, 0.0, p + eps), p


def normalize_reference(logits, iterations, kind, rows, eps):
    """The definition in plain torch: logits (..., n, m); -inf is a forbidden entry."""
    x = logits.to(accumulate_type(logits))
    x = x if rows else x.mT
    ratio = x.shape[-1] / x.shape[-2]
    if kind == LOG:
        for _ in range(iterations):
            x = x - _lse(x, -1)
            x = x - _lse(x, -2) - math.log(ratio)
        m = torch.exp(x)
    else:
        m, _ = _start(x, kind, eps)
        for k in range(iterations):
            if kind == DEEPSEEK:
                if k > 0:
                    m = m / (m.sum(-1, keepdim=True) + eps)
                m = m / (m.sum(-2, keepdim=True) * ratio + eps)
            else:
                m = m / m.sum(-1, keepdim=True).clamp_min(eps)
                m = m / (m.sum(-2, keepdim=True) * ratio).clamp_min(eps)
    return (m if rows else m.mT).to(logits.dtype)


# ---- the same by factors: any size, and backward with 2 n numbers an iteration -------------------------


class _Factors:
    """u and v of every step; rows first. `log` keeps their logarithms."""

    def __init__(self, x: Tensor, iterations: int, kind: int, eps: float) -> None:
        self.kind, self.eps, self.iterations = kind, eps, iterations
        self.ratio = x.shape[-1] / x.shape[-2]
        self.K, self.softmax = (_shifted(x),) * 2 if kind == LOG else _start(x, kind, eps)
        fill = torch.zeros_like if kind == LOG else torch.ones_like
        u, v = fill(x[..., 0]), fill(x[..., 0, :])
        self.u, self.v = [u], [v]
        # Whether a step's sum counted, and not eps ("scaling").
        self.live_u, self.live_v = [torch.ones_like(u)], [torch.ones_like(v)]
        wu, wv = torch.ones_like(u), torch.ones_like(v)
        for k in range(iterations):
            if k > 0 or kind != DEEPSEEK:
                u, wu, live = self._step(self.K.mT, v, wu, 1.0)
                self.u.append(u)
                self.live_u.append(live)
            v, wv, live = self._step(self.K, u, wv, self.ratio)
            self.v.append(v)
            self.live_v.append(live)

    def _step(self, K, u, w, ratio):
        """The other side's factors from u: (factors, w, live)."""
        if self.kind == LOG:
            f = -_lse(K + u.unsqueeze(-1), -2).squeeze(-2) - math.log(ratio)
            return f, w, torch.ones_like(f)
        with without_autocast(K):  # sums are float32's or better
            t = (K.mT @ u.unsqueeze(-1)).squeeze(-1) * ratio
        least = self.eps * w
        live = (least <= t).to(t.dtype) if self.kind == SCALING else torch.ones_like(w)
        w = t + least if self.kind == DEEPSEEK else torch.where(least > t, least, t)
        w = torch.where(w < 1e-36, 1e-36, w)
        return 1 / w, w, live

    def matrix(self, k: int = -1, j: int = -1) -> Tensor:
        """M after the step that ended with u[k] and v[j]."""
        u, v = self.u[k].unsqueeze(-1), self.v[j].unsqueeze(-2)
        return torch.exp(self.K + u + v) if self.kind == LOG else self.K * u * v

    def gradient(self, G: Tensor) -> Tensor:
        """Of x, from that of M: D, that of log M, back through the steps."""
        D = G * self.matrix()
        a = len(self.u) - 1
        for j in range(self.iterations, 0, -1):
            share = self.matrix(a, j) * (D.sum(-2) * self.live_v[j] * self.ratio).unsqueeze(-2)
            D = D - share
            if a == 0 and self.kind == DEEPSEEK:
                break
            share = self.matrix(a, j - 1) * (D.sum(-1) * self.live_u[a]).unsqueeze(-1)
            D = D - share
            a -= 1
        if self.kind != DEEPSEEK:
            return D
        p = self.softmax
        dp = torch.where(p == 0, 0.0, D * p / self.K)
        return dp - p * dp.sum(-1, keepdim=True)


def normalize_factors(logits, iterations, kind, rows, eps):
    """By factors in plain torch, of any size."""
    if logits.numel() == 0:
        return torch.empty_like(logits, memory_format=torch.contiguous_format)
    x = logits.to(accumulate_type(logits))
    m = _Factors(x if rows else x.mT, iterations, kind, eps).matrix()
    return (m if rows else m.mT).to(logits.dtype).contiguous()


def normalize_gradient(grad, logits, iterations, kind, rows, eps):
    """Of logits (..., n, m), from that of the balanced matrices."""
    if logits.numel() == 0:
        return torch.empty_like(logits, memory_format=torch.contiguous_format)
    x, g = (t.to(accumulate_type(logits)) for t in (logits, grad))
    if not rows:
        x, g = x.mT, g.mT
    dx = _Factors(x, iterations, kind, eps).gradient(g)
    return (dx if rows else dx.mT).to(logits.dtype).contiguous()


reference("sinkhorn_small")(normalize_factors)
reference("sinkhorn_small_backward")(normalize_gradient)


# ---- autograd ----------------------------------------------------------------------------------------


def _small(logits: Tensor) -> bool:
    return max(logits.shape[-2:]) <= MOST


class _Unrolled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, *options):
        ctx.save_for_backward(logits)
        ctx.options = options
        return _plain(logits, options)

    @staticmethod
    def backward(ctx, grad):
        (logits,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            formula = lambda x: normalize_reference(x, *ctx.options)
            dx = differentiable_vjp(formula, (logits,), (True,), (grad,))[0]
        elif _small(logits):
            dx = _op.sinkhorn_small_backward(grad, logits, *ctx.options)
        else:
            dx = normalize_gradient(grad, logits, *ctx.options)
        return dx, *[None] * len(ctx.options)


class _Implicit(torch.autograd.Function):
    """The balanced matrix is an output, so that its own gradient is implicit too: twice differentiable."""

    @staticmethod
    def forward(ctx, logits, *options):
        m = _plain(logits, options)
        ctx.save_for_backward(m)
        ctx.count = len(options)
        return m

    @staticmethod
    def backward(ctx, grad):
        (m,) = ctx.saved_tensors
        return implicit_gradient(m, grad), *[None] * ctx.count


def implicit_gradient(m: Tensor, grad: Tensor) -> Tensor:
    """dx = m (grad - alpha - beta) with rows and columns that sum to 0; m (..., n, k) of any marginals."""
    wide = torch.float64
    p, g = m.to(wide), grad.to(wide)
    turned = p.shape[-1] > p.shape[-2]  # the system is of the smaller side's size
    if turned:
        p, g = p.mT, g.mT
    tiny = torch.finfo(wide).tiny
    rows, columns = p.sum(-1, keepdim=True).clamp_min(tiny), p.sum(-2, keepdim=True)
    gp = g * p
    right = gp.sum(-2).unsqueeze(-1) - p.mT @ (gp.sum(-1, keepdim=True) / rows)
    # diag(columns) - p^T diag(1 / rows) p, symmetric, with the null vector 1 (beta is free by a constant).
    system = torch.diag_embed(columns.squeeze(-2)) - p.mT @ (p / rows)
    size = p.shape[-1]
    eye = torch.eye(size, dtype=wide, device=p.device)
    system = system + (1.0 / size) + 1e-12 * eye + torch.where(columns == 0, 1.0, 0.0) * eye
    factor = torch.linalg.cholesky_ex(system)[0]
    beta = torch.cholesky_solve(right, factor)
    alpha = (gp.sum(-1, keepdim=True) - p @ beta) / rows
    dx = p * (g - alpha - beta.mT)
    return (dx.mT if turned else dx).to(grad.dtype)


def _plain(logits: Tensor, options: tuple) -> Tensor:
    if use_reference():
        return normalize_reference(logits, *options).contiguous()
    if _small(logits):
        return _op.sinkhorn_small(logits, *options)
    return normalize_factors(logits, *options)


# ---- public function ---------------------------------------------------------------------------------


def sinkhorn_normalize(
    logits: Tensor,
    iterations: int = 20,
    *,
    variant: str = "deepseek",
    first: str = "rows",
    eps: float = 1e-6,
    mask: Tensor | None = None,
    gradient: str = "unrolled",
) -> Tensor:
    r"""Doubly stochastic matrices from logits, each brought there by `iterations` of Sinkhorn.

    With rows first, `iterations` = T and $s$ the sums of the rows or columns (of M as it then is):

    - "deepseek": $M = \mathrm{softmax}_{row}(x) + \epsilon$, $M \leftarrow M / (s_{columns} + \epsilon)$, then
      T - 1 times $M \leftarrow M / (s_{rows} + \epsilon)$, $M \leftarrow M / (s_{columns} + \epsilon)$;
    - "scaling": $M = e^{x - \max_{row} x}$, then T times $M \leftarrow M / \max(s_{rows}, \epsilon)$,
      $M \leftarrow M / \max(s_{columns}, \epsilon)$;
    - "log": T times $x \leftarrow x - \mathrm{lse}_{row}(x)$, $x \leftarrow x - \mathrm{lse}_{column}(x)$, $M = e^x$.

    `first="columns"` exchanges rows and columns throughout; the side that is not first is the one whose sums are met
    exactly (to eps). A rectangular matrix: the side that is first sums to 1, the other one's sums are multiplied by
    (their number) / (the first side's number) before they divide, so that they tend to that ratio's inverse.

    Args:
        logits: (..., n, m), usually n = m. Up to 32 x 32 one kernel does all iterations of all matrices at once; larger
            ones are composed of matrix-vector products. -inf is a forbidden entry.
        iterations: T >= 1.
        eps: in (0, 1], as above; not used by "log".
        mask: bool, broadcast to logits: False is a forbidden entry, 0 in the result (and no eps is added to it).
            A row or column with no allowed entry is 0.
        gradient: "unrolled", exactly that of the T iterations, computed from the input alone, which is all that is
            saved; "implicit", that of the limit T to infinity at the returned matrix (a small linear solve in float64;
            off, by all of the gradient near the identity, where T iterations are not near the limit); "none".

    Shapes: (..., n, m) -> (..., n, m) of logits's dtype: float32, float64, bfloat16, float16, computed in float32
    (float64 for float64). A NaN stays in its own matrix. Twice differentiable (through the formula).

    Raises:
        TypeError, ValueError: naming the argument that does not fit.

    Sources: Sinkhorn, Knopp, 1967; Xie et al., "mHC: Manifold-Constrained Hyper-Connections", 2025 (arXiv 2512.24880).
    """
    _check.tensor("logits", logits, min_dim=2)
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
        raise ValueError(f"iterations: expected a positive integer, got {iterations!r}")
    _check.choice("variant", variant, VARIANTS)
    _check.choice("first", first, ("rows", "columns"))
    _check.choice("gradient", gradient, ("unrolled", "implicit", "none"))
    eps = _check.number("eps", eps, low=1e-30, high=1.0)
    if mask is not None:
        logits = torch.where(_mask(mask, logits), logits, -torch.inf)
    options = (iterations, VARIANTS.index(variant), first == "rows", eps)
    if gradient == "none":
        logits = logits.detach()
    if logits.numel() == 0:
        return logits * 1.0
    if transforms_active():
        if gradient == "implicit":
            raise NotImplementedError(
                'gradient: "implicit" is not implemented under torch.func or forward-mode AD; "unrolled" is'
            )
        return normalize_reference(logits, *options)
    flat = logits.reshape(-1, *logits.shape[-2:])
    if not needs_graph(logits):
        m = _plain(flat, options)
    elif gradient == "implicit":
        m = _Implicit.apply(flat, *options)
    elif use_reference():
        m = normalize_reference(flat, *options)
    else:
        m = _Unrolled.apply(flat, *options)
    return m.reshape(logits.shape)


def _mask(mask: object, logits: Tensor) -> Tensor:
    if not isinstance(mask, Tensor) or mask.dtype is not torch.bool:
        came = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask: expected a bool tensor, got {came}")
    try:
        fits = torch.broadcast_shapes(mask.shape, logits.shape) == logits.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"mask: expected a shape that broadcasts to logits's {tuple(logits.shape)}, "
            f"got {tuple(mask.shape)}"
        )
    if mask.device != logits.device:
        raise ValueError(f"mask: expected device {logits.device}, got {mask.device}")
    return mask
