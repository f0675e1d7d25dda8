"""Adapters averaged, split off a weight, and applied: compositions of torch's products and decompositions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _check
from .._registry import accumulate_type
from .._route import full_precision


def _rank(name: str, rank: object, most: int) -> int:
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= most:
        raise ValueError(f"{name}: expected an int in [1, {most}], got {rank!r}")
    return rank


def _one_dtype(x: Tensor, **factors: Tensor | None) -> None:
    """What torch's products ask for, said by name."""
    for name, t in factors.items():
        if t is not None:
            _check.product_dtype(name, t, x)


@full_precision
@torch.no_grad()
def average_lora(
    adapters: Sequence[tuple[Tensor, Tensor]],
    weights: Sequence[float] | Tensor | None = None,
    *,
    rank: int | None = None,
) -> tuple[Tensor, Tensor]:
    r"""K LoRA adapters as one: the average of their products, $BA \approx \sum_k w_k B_kA_k$.

    Averaging the factors instead mixes every $B_j$ with every $A_k$. The scaled factors are put side by side,
    reduced by two QR decompositions and one SVD of size $\sum r_k$; the (O, I) sum is never formed. Exact if rank is
    the sum of the ranks, else the best approximation of that rank; both factors get the square root of the singular
    values.

    Args:
        adapters: K pairs (a (r_k, I), b (O, r_k)); ranks may differ.
        weights: K numbers; None for 1 / K.
        rank: of the result; None for $\min(\sum r_k, O, I)$, which loses nothing.

    Shapes: K of (r_k, I), (O, r_k) -> a (rank, I), b (O, rank), in the first pair's dtypes. No gradient.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: the "svd" merge of adapter libraries (Mangrulkar et al., PEFT, 2022), whose cheap exact form this is.
    """
    if not isinstance(adapters, Sequence) or len(adapters) == 0:
        raise ValueError("adapters: expected at least one pair (a, b)")
    first = _check.tensor("adapters[0][0]", adapters[0][0], dim=2)
    out = _check.tensor("adapters[0][1]", adapters[0][1], dim=2).shape[0]
    acc = accumulate_type(first)
    for k, (a, b) in enumerate(adapters):
        a = _check.tensor(f"adapters[{k}][0]", a, dim=2)
        _check.like(f"adapters[{k}][0]", a, (a.shape[0], first.shape[1]), first, "adapters[0][0]")
        _check.like(f"adapters[{k}][1]", b, (out, a.shape[0]), first, "adapters[0][0]")
    count = len(adapters)
    w = [1 / count] * count if weights is None else weights
    try:
        w = torch.as_tensor(w).to(device=first.device, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"weights: expected {count} numbers, got {weights!r:.200}") from None
    if w.shape != (count,):
        raise ValueError(f"weights: expected {count} numbers like adapters, got {tuple(w.shape)}")
    w = w.to(acc)
    right = torch.cat([a.to(acc) for a, _ in adapters])
    left = torch.cat([w[k] * b.to(acc) for k, (_, b) in enumerate(adapters)], 1)
    most = min(right.shape[0], right.shape[1], out)
    rank = most if rank is None else _rank("rank", rank, most)
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.mT)
    u, s, vh = torch.linalg.svd(r_left @ r_right.mT, full_matrices=False)
    root = s[:rank].sqrt()
    new_a = root[:, None] * (vh[:rank] @ q_right.mT)
    return new_a.to(first.dtype), (q_left @ (u[:, :rank] * root)).to(adapters[0][1].dtype)


def weighted_lora_sum(a: Tensor, b: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    r"""Chosen entries of a bank of adapters as one update a layer: $\Delta W_l = \sum_n w_n A_{i_n l}^\top B_{i_n l}$.

    One batched product of rank k r; the k updates are not formed.

    Args:
        a: (P, L, r, D); b: (P, L, r, E). index: (k,) integers in [0, P). weights: (k,).

    Shapes: (P, L, r, D), (P, L, r, E), (k,), (k,) -> (L, D, E). Differentiable in a, b and weights.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Peng et al., "Scalable Language Model with Generalized Continual Learning", 2024 (the update of JARe; the
    retrieval of index and weights is the caller's).
    """
    a, b = _check.tensor("a", a, dim=4), _check.tensor("b", b, dim=4)
    _check.like("b", b, (*a.shape[:3], b.shape[3]), a, "a")
    if not isinstance(index, Tensor) or index.dim() != 1 or index.is_floating_point():
        raise TypeError("index: expected a vector of integers")
    _check.like("weights", weights, tuple(index.shape), a, "a")
    layers = a.shape[1]
    scaled = a[index] * weights.to(a.dtype)[:, None, None, None]
    flat = lambda t: t.transpose(0, 1).reshape(layers, -1, t.shape[-1])
    return flat(scaled).mT @ flat(b[index].to(a.dtype))


def _truncated(
    m: Tensor, rank: int | None, energy: float | None, iterations: int | None, seed: int
):
    """(U, S, V^T) of m's leading part."""
    if iterations is not None:
        assert rank is not None
        generator = torch.Generator(m.device).manual_seed(seed)
        width = min(rank + 8, *m.shape)
        q = torch.randn(m.shape[1], width, dtype=m.dtype, device=m.device, generator=generator)
        q = torch.linalg.qr(m @ q).Q
        for _ in range(iterations):
            q = torch.linalg.qr(m @ torch.linalg.qr(m.mT @ q).Q).Q
        u, s, vh = torch.linalg.svd(q.mT @ m, full_matrices=False)
        u = q @ u
    else:
        u, s, vh = torch.linalg.svd(m, full_matrices=False)
    if energy is not None:
        share = s.square().cumsum(0)
        rank = min(int((share < energy * share[-1]).sum()) + 1, len(s))
    return u[:, :rank], s[:rank], vh[:rank]


@full_precision
@torch.no_grad()
def low_rank_delta(
    a: Tensor,
    b: Tensor,
    *,
    rank: int | None = None,
    energy: float | None = None,
    iterations: int | None = None,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    r"""The way from one weight to another as an adapter: $b - a \approx B A$, the leading singular part.

    Args:
        a, b: (O, I), say the base and the tuned weight.
        rank: k; or energy: the smallest k whose squared singular values have this share of the whole, in (0, 1].
        iterations: None for the whole SVD; a number for the randomised one with so many power iterations (2 is
            usual) and 8 columns more than rank, which it needs. seed: of its random columns.

    Shapes: (O, I) twice -> A (k, I), B (O, k), in a's dtype; both factors get the square root of the singular values.
    No gradient. With `energy` the rank is read from the device.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: LoRE of Fleshman, Van Durme, "RE-Adapt: Reverse Engineered Adaptation of Large Language Models", 2024;
    randomised: Halko, Martinsson, Tropp, 2011.
    """
    a = _check.tensor("a", a, dim=2)
    _check.like("b", b, tuple(a.shape), a, "a")
    if (rank is None) == (energy is None):
        raise ValueError("rank, energy: expected exactly one of them")
    if rank is not None:
        rank = _rank("rank", rank, min(a.shape))
    if energy is not None:
        energy = _check.number("energy", energy, low=0.0, high=1.0)
        if iterations is not None:
            raise ValueError(
                "iterations: expected None with energy, which needs all singular values"
            )
    if a.numel() == 0:
        raise ValueError(f"a: expected at least one element, got shape {tuple(a.shape)}")
    acc = accumulate_type(a)
    u, s, vh = _truncated(b.to(acc) - a.to(acc), rank, energy, iterations, seed)
    root = s.sqrt()
    return (root[:, None] * vh).to(a.dtype), (u * root).to(a.dtype)


@torch.no_grad()
def svd_split(
    weight: Tensor, rank: int | None = None, *, ratio: float | None = None
) -> tuple[Tensor, Tensor]:
    r"""A weight as two thin ones: $W \approx QR$, $Q = U_rS_r^{1/2}$, $R = S_r^{1/2}V_r^\top$.

    Args:
        weight: (O, I). rank: r; or ratio: how many times fewer numbers,
            $r = \lfloor OI / (\mathrm{ratio}\,(O + I))\rfloor$.

    Shapes: (O, I) -> R (r, I), Q (O, r), for `low_rank_linear`. No gradient.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Guo et al., "PELA: Learning Parameter-Efficient Models with Low-Rank Approximation", 2024.
    """
    weight = _check.tensor("weight", weight, dim=2)
    if (rank is None) == (ratio is None):
        raise ValueError("rank, ratio: expected exactly one of them")
    out, inner = weight.shape
    if ratio is not None:
        ratio = _check.number("ratio", ratio, low=1.0)
        rank = max(1, int(out * inner / (ratio * (out + inner))))
    rank = _rank("rank", rank, min(out, inner))
    u, s, vh = _truncated(weight.to(accumulate_type(weight)), rank, None, None, 0)
    root = s.sqrt()
    return (root[:, None] * vh).to(weight.dtype), (u * root).to(weight.dtype)


def low_rank_linear(x: Tensor, r: Tensor, q: Tensor, bias: Tensor | None = None) -> Tensor:
    r"""A linear layer of a split weight: $y = (xR^\top)Q^\top + b$.

    Shapes: x (..., I), r (k, I), q (O, k), bias (O,) or None -> (..., O). Differentiable; two products of torch,
    under autocast as `F.linear`.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: as `svd_split`.
    """
    x = _check.tensor("x", x, min_dim=1)
    r, q = _check.tensor("r", r, dim=2), _check.tensor("q", q, dim=2)
    _check.like("r", r, (r.shape[0], x.shape[-1]), x)
    _check.like("q", q, (q.shape[0], r.shape[0]), x)
    if bias is not None:
        _check.like("bias", bias, (q.shape[0],), x)
    _one_dtype(x, r=r, q=q, bias=bias)
    return F.linear(F.linear(x, r), q, bias)


def diag_low_rank_linear(
    x: Tensor,
    weight: Tensor,
    l_r: Tensor,
    perm: Tensor,
    z: Tensor,
    s: Tensor | float,
    u_r: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    r"""A layer, and an update with a trained diagonal: $y = xW^\top + s\,((xU_r^\top)\odot z)(PL_r)^\top + b$.

    P is a gather of the rows of L. With frozen factors gradients go to z and s alone (and x).

    Args:
        x: (..., I); weight: the residual (O, I); l_r: (O, r); perm: (O,) integers, $(PL)_o = L_{perm_o}$; z: (r,);
            s: a number or a tensor of one element; u_r: (r, I); bias: (O,) or None.

    Shapes: (..., I) -> (..., O). Differentiable. A composition of torch's products.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Shi et al., "LoLDU: Low-Rank Adaptation via Lower-Diag-Upper Decomposition for Parameter-Efficient
    Fine-Tuning", 2024. Other adapters with a trained diagonal (VeRA, SVDiff) are the same call with their own
    factors.
    """
    x = _check.tensor("x", x, min_dim=1)
    weight = _check.tensor("weight", weight, dim=2)
    out, inner = weight.shape
    l_r = _check.tensor("l_r", l_r, dim=2)
    rank = l_r.shape[1]
    for name, t, shape in (
        ("weight", weight, (out, x.shape[-1])), ("l_r", l_r, (out, rank)), ("z", z, (rank,)),
        ("u_r", u_r, (rank, inner)),
    ):  # fmt: skip
        _check.like(name, t, shape, x)
    if not isinstance(perm, Tensor) or perm.shape != (out,) or perm.is_floating_point():
        raise ValueError(f"perm: expected {out} integers")
    if bias is not None:
        _check.like("bias", bias, (out,), x)
    _one_dtype(x, weight=weight, l_r=l_r, u_r=u_r, bias=bias)
    inner_rows = F.linear(x, u_r)
    scaled = (inner_rows * (s * z)).to(
        inner_rows.dtype
    )  # z and s may be float32 beside half factors
    return F.linear(x, weight, bias) + F.linear(scaled, l_r[perm])


@full_precision
@torch.no_grad()
def ldu_init(weight: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    r"""LoLDU's start: the first r parts of $W = PL\,\mathrm{diag}(D)\,U$ (pivoted LU), and what is left.

    Shapes: (O, I) -> (weight (O, I), l_r (O, r), perm (O,), z (r,), s (), u_r (r, I)), the arguments of
    `diag_low_rank_linear` in order; s is 1. A pivot of zero leaves its row of U as it is. No gradient.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: as `diag_low_rank_linear`.
    """
    weight = _check.tensor("weight", weight, dim=2)
    rank = _rank("rank", rank, min(weight.shape))
    wide = weight.to(accumulate_type(weight))
    p, lower, upper = torch.linalg.lu(wide)
    perm = p.argmax(1)
    d = upper.diagonal()[:rank]
    u_r = upper[:rank] / torch.where(d == 0, 1.0, d)[:, None]
    l_r = lower[:, :rank]
    residual = wide - (l_r[perm] * d) @ u_r
    parts = (t.to(weight.dtype).contiguous() for t in (residual, l_r, d, u_r))
    residual, l_r, z, u_r = parts
    return residual, l_r, perm, z, weight.new_ones(()), u_r


def nested_lora_linear(
    x: Tensor,
    w0: Tensor,
    a: Tensor,
    a_inner: Tensor,
    b_inner: Tensor,
    b: Tensor,
    scale: float = 1.0,
    bias: Tensor | None = None,
) -> Tensor:
    r"""LoRA within LoRA: $y = xW_0^\top + s\,xA^\top A'^\top B'^\top B^\top$, of which the inner factors are trained.

    Four skinny products, from the thin side: nothing of size (O, I) is formed.

    Args:
        x: (..., I); w0: (O, I); outer factors a (r, I), b (O, r), from the SVD of w0 (`svd_split`), frozen;
            a_inner: A' (r', r); b_inner: B' (r, r'); scale: s; bias: (O,) or None.

    Shapes: (..., I) -> (..., O). Differentiable in what requires a gradient. A composition of torch's products.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Lin et al., "NoRA: Nested Low-Rank Adaptation for Efficient Fine-Tuning Large Models", 2024: the
    structure from the abstract, the shapes of the factors from knowledge of such methods.
    """
    x = _check.tensor("x", x, min_dim=1)
    w0 = _check.tensor("w0", w0, dim=2)
    a, a_inner = _check.tensor("a", a, dim=2), _check.tensor("a_inner", a_inner, dim=2)
    (out, inner), rank, thin = w0.shape, a.shape[0], a_inner.shape[0]
    for name, t, shape in (
        ("w0", w0, (out, x.shape[-1])), ("a", a, (rank, inner)), ("a_inner", a_inner, (thin, rank)),
        ("b_inner", b_inner, (rank, thin)), ("b", b, (out, rank)),
    ):  # fmt: skip
        _check.like(name, t, shape, x)
    if bias is not None:
        _check.like("bias", bias, (out,), x)
    _one_dtype(x, w0=w0, a=a, a_inner=a_inner, b_inner=b_inner, b=b, bias=bias)
    scale = _check.number("scale", scale)
    thin_rows = F.linear(F.linear(x, a), a_inner) * scale
    return F.linear(x, w0, bias) + F.linear(F.linear(thin_rows, b_inner), b)


@full_precision
def proto_calibrate(
    new: Tensor, base: Tensor, temperature: float = 16.0, alpha: float = 0.5
) -> Tensor:
    r"""New classes' prototypes moved towards the base classes they resemble, all of unit length, without training.

    $S = \operatorname{softmax}_b(\tau\,\hat N\hat B^\top)$, $\Delta = \mathrm{norm}(S\hat B)$,
    $\hat w = (1-\alpha)\hat N + \alpha\Delta$. `ensemble.prototype_calibrate` mixes the prototypes as they are; here
    rows have unit length, as in the public code.
    Logits: `ensemble.cosine_logits(x, w, scale)`.

    Args:
        new: N (C_n, d); base: B (C_b, d). temperature: $\tau$; alpha: in [0, 1].

    Shapes: (C_n, d), (C_b, d) -> (C_n, d) of new's dtype. Differentiable. Composition over `norm.l2_normalize`.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Wang et al., "Few-Shot Class-Incremental Learning via Training-Free Prototype Calibration", 2023 (TEEN),
    public code.
    """
    from ..norm import l2_normalize

    new, base = _check.tensor("new", new, dim=2), _check.tensor("base", base, dim=2)
    _check.like("base", base, (base.shape[0], new.shape[1]), new, "new")
    temperature = _check.number("temperature", temperature, low=0.0)
    alpha = _check.number("alpha", alpha, low=0.0, high=1.0)
    n, b = l2_normalize(new), l2_normalize(base.to(new.dtype))
    delta = l2_normalize((temperature * (n @ b.mT)).softmax(1) @ b)
    return (1 - alpha) * n + alpha * delta
