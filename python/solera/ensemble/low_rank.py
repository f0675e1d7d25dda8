"""Low-rank and bottleneck layers beyond plain LoRA: blocks, two heads, banks, fusion, merging."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import _check
from .._registry import accumulate_type
from ._members import activation_code, autocast
from .adapters import branches, check_factors, check_weight, dense_branches, shared_linear


def _scales(
    scaling: float | Tensor, count: int, x: Tensor, x_name: str
) -> tuple[float, Tensor | None]:
    """A number as it is; (n,) numbers as a factor of each block."""
    if isinstance(scaling, Tensor):
        _check.like("scaling", scaling, (count,), x, x_name)
        return 1.0, scaling
    return _check.number("scaling", scaling), None


def _same_place(x: Tensor, x_name: str, **factors: Tensor) -> None:
    """Factors of checked shapes on x's device, in a dtype that goes with x's."""
    for name, t in factors.items():
        _check.like(name, t, tuple(t.shape), x, x_name)


def _check_blocks(weight: object, a: object, b: object) -> tuple[int, int, int]:
    weight = _check.tensor("weight", weight, dim=2)
    a, b = _check.tensor("a", a, dim=3), _check.tensor("b", b, dim=3)
    n, rank, width = a.shape
    out, inner = weight.shape
    if n == 0 or n * width != inner:
        raise ValueError(
            f"a: expected shape (n, r, {inner} / n) to go with weight of shape {tuple(weight.shape)}, "
            f"got {tuple(a.shape)}"
        )
    if out % n or b.shape != (n, out // n, rank):
        raise ValueError(
            f"b: expected shape (n, {out} / n, {rank}) with n = {n} to go with weight of shape "
            f"{tuple(weight.shape)} and a of shape {tuple(a.shape)}, got {tuple(b.shape)}"
        )
    return n, rank, width


def melora_linear(
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    scaling: float | Tensor = 1.0,
    bias: Tensor | None = None,
) -> Tensor:
    r"""Mini-ensemble LoRA: $y = Wx + d + \mathrm{concat}_i\, s_i B_i A_i x_i$, x and y cut into n blocks.

    The update is block diagonal: rank n r for the parameters of one LoRA of rank r.

    Args:
        x: (..., I); weight: (O, I); a: (n, r, I / n); b: (n, O / n, r); bias: (O,) or None.
        scaling: s, a number or (n,). Blocks of lower rank than r have zero rows in a.

    Shapes: (..., I) -> (..., O).

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Ren et al., "Mini-Ensemble Low-Rank Adapters for Parameter-Efficient Fine-Tuning", 2024.
    """
    x = _check.tensor("x", x, min_dim=2)
    check_weight(weight, bias, weight.shape[0] if isinstance(weight, Tensor) else 0, x)
    n, _, _ = _check_blocks(weight, a, b)
    _same_place(x, "x", a=a, b=b)
    scaling, each = _scales(scaling, n, x, "x")
    if each is not None:
        b = b * each.to(b.dtype)[:, None, None]
    x = autocast(x)
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    index = torch.arange(n, device=x.device).repeat(rows.shape[0]).unsqueeze(1)
    y = branches(rows, a, b, index, weight=weight, bias=bias, scaling=scaling)
    return y.reshape(*x.shape[:-1], weight.shape[0])


@torch.no_grad()
def melora_merge_(weight: Tensor, a: Tensor, b: Tensor, *, scaling: float | Tensor = 1.0) -> Tensor:
    r"""Adds $s_i B_i A_i$ to the n diagonal blocks of weight (O, I), in place; returns weight.

    Only the diagonal blocks are touched. No gradient flows to a, b and scaling.

    Shapes: weight (O, I), a (n, r, I / n), b (n, O / n, r) -> weight.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: as `melora_linear`. Composition.
    """
    n, _, width = _check_blocks(weight, a, b)
    _same_place(weight, "weight", a=a, b=b)
    scaling, each = _scales(scaling, n, weight, "weight")
    acc = accumulate_type(weight)
    delta = torch.bmm(b.to(acc), a.to(acc)) * scaling
    if each is not None:
        delta = delta * each.to(acc)[:, None, None]
    high = weight.shape[0] // n
    for i in range(n):
        block = weight[i * high : (i + 1) * high, i * width : (i + 1) * width]
        block.copy_(block.to(acc) + delta[i])
    return weight


def _check_hydra(weight, bias, a_p, b_p, a_s, b_s, x, x_name):
    out, inner = _check.tensor("weight", weight, dim=2).shape
    _check.like("weight", weight, (out, x.shape[-1]), x, x_name)
    if bias is not None:
        _check.like("bias", bias, (out,), x, x_name)
    for name, t, dims in (
        ("a_parallel", a_p, (None, inner)),
        ("b_parallel", b_p, (out, None)),
        ("a_sequential", a_s, (None, out)),
        ("b_sequential", b_s, (out, None)),
    ):
        t = _check.tensor(name, t, dim=2)
        _check.like(name, t, tuple(s if d is None else d for s, d in zip(t.shape, dims)), x, x_name)
    for name, a, b in (("b_parallel", a_p, b_p), ("b_sequential", a_s, b_s)):
        if a.shape[0] != b.shape[1]:
            raise ValueError(f"{name}: expected rank {a.shape[0]}, got shape {tuple(b.shape)}")


def hydra_linear(
    x: Tensor,
    weight: Tensor,
    a_parallel: Tensor,
    b_parallel: Tensor,
    a_sequential: Tensor,
    b_sequential: Tensor,
    *,
    scaling: float = 1.0,
    bias: Tensor | None = None,
) -> Tensor:
    r"""A parallel and a sequential low-rank head: $z = Wx + d$, $y = z + s B_pA_px + s B_sA_sz$.

    Args:
        x: (..., I); weight: (O, I); bias: (O,) or None.
        a_parallel (r, I), b_parallel (O, r), a_sequential (r, O), b_sequential (O, r).
        scaling: the number s.

    Shapes: (..., I) -> (..., O).

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Kim et al., "Hydra: Multi-head Low-rank Adaptation for Parameter Efficient Fine-tuning", 2023.
    Two calls of core `adapters`.
    """
    x = _check.tensor("x", x, min_dim=2)
    _check_hydra(weight, bias, a_parallel, b_parallel, a_sequential, b_sequential, x, "x")
    scaling = _check.number("scaling", scaling)
    x = autocast(x)
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    first = torch.zeros((rows.shape[0], 1), dtype=torch.int64, device=x.device)
    z = shared_linear(rows, weight, bias)
    y = branches(z, a_sequential[None], b_sequential[None], first, residual=True, scaling=scaling)
    y = y + branches(rows, a_parallel[None], b_parallel[None], first, scaling=scaling)
    return y.reshape(*x.shape[:-1], weight.shape[0])


def hydra_merge(
    weight: Tensor,
    a_parallel: Tensor,
    b_parallel: Tensor,
    a_sequential: Tensor,
    b_sequential: Tensor,
    *,
    scaling: float = 1.0,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    r"""The layer that `hydra_linear` is: $W + s(B_pA_p + B_sA_sW)$ and $d + s B_sA_sd$.

    Shapes: as `hydra_linear`; returns weight (O, I) and bias (O,) or None, new tensors.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: as `hydra_linear`; the formula is derived by putting z into y. Composition.
    """
    weight = _check.tensor("weight", weight, dim=2)
    _check_hydra(weight, bias, a_parallel, b_parallel, a_sequential, b_sequential, weight, "weight")
    scaling = _check.number("scaling", scaling)
    acc = accumulate_type(weight)
    w, a_p, b_p, a_s, b_s = (
        t.to(acc) for t in (weight, a_parallel, b_parallel, a_sequential, b_sequential)
    )
    merged = w + scaling * (b_p @ a_p + b_s @ (a_s @ w))
    if bias is None:
        return merged.to(weight.dtype), None
    d = bias.to(acc)
    return merged.to(weight.dtype), (d + scaling * (b_s @ (a_s @ d))).to(bias.dtype)


def adapter_bank_mix(
    h: Tensor, down: Tensor, up: Tensor, omega: Tensor, *, activation: str | None = "relu"
) -> Tensor:
    r"""Frozen source adapters, scaled and summed: $o = \sum_t \omega_t \odot U_t\,\phi(D_t h)$.

    One product to S m columns and one back, with $\omega$ in the second factor; the S outputs are never
    formed one by one.

    Args:
        h: (..., D); down: (S, m, D); up: (S, D, m).
        omega: (S, D), or (S,) for one number a source.
        activation: None, "relu", "gelu" or "silu".

    Shapes: (..., D) -> (..., D).

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Frohmann et al., "ScaLearn: Simple and Highly Parameter-Efficient Task Transfer by Learning to
    Scale", 2023 (with omega (S,) its uniform form).
    """
    h = _check.tensor("h", h, min_dim=2)
    check_factors(down, up, h, ("down", "up"), "h")
    sources, out = down.shape[0], up.shape[1]
    omega = _check.tensor("omega", omega)
    _check.like("omega", omega, (sources, out) if omega.dim() == 2 else (sources,), h, "h")
    code = activation_code(activation)
    h = autocast(h)
    scaled = up * omega.to(up.dtype).reshape(sources, -1, 1)
    rows = h.reshape(h.shape[:-1].numel(), h.shape[-1])
    return dense_branches(rows, down, scaled, activation=code).reshape(*h.shape[:-1], out)


def adapter_fusion(
    query: Tensor,
    outputs: Tensor,
    w_query: Tensor,
    w_key: Tensor,
    w_value: Tensor,
    *,
    residual: Tensor | None = None,
) -> Tensor:
    r"""Attention of each row over K adapters' outputs.

    $\alpha_{nk} = \mathrm{softmax}_k\big((W_q h_n)^\top W_k o_{nk}\big)$,
    $y_n = W_v \sum_k \alpha_{nk} o_{nk}$ (+ residual). Computed as $o_{nk}^\top(W_k^\top W_q h_n)$ and one product with
    the mixed rows, so that neither keys nor values of the K outputs are formed.

    Args:
        query: h (..., D); outputs: o (K, ..., D); w_query, w_key, w_value: (D, D); residual: (..., D) or None.

    Shapes: -> (..., D).

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Pfeiffer et al., "AdapterFusion", 2021, as in Poth et al., "Adapters: A Unified Library for
    Parameter-Efficient and Modular Transfer Learning", 2023 (their Fuse). Composition.
    """
    query = _check.tensor("query", query, min_dim=1)
    outputs = _check.tensor("outputs", outputs, min_dim=2)
    width = query.shape[-1]
    if outputs.shape[1:] != query.shape or outputs.shape[0] == 0:
        raise ValueError(
            f"outputs: expected shape (K, {', '.join(map(str, query.shape))}), got "
            f"{tuple(outputs.shape)}"
        )
    _check.like("outputs", outputs, tuple(outputs.shape), query, "query")
    _check.product_dtype("outputs", outputs, query, "query")
    for name, t in (("w_query", w_query), ("w_key", w_key), ("w_value", w_value)):
        _check.like(name, t, (width, width), query, "query")
    if residual is not None:
        _check.like("residual", residual, tuple(query.shape), query, "query")
    probe = F.linear(F.linear(query, w_query.to(query.dtype)), w_key.to(query.dtype).mT)
    scores = (outputs * probe).sum(-1, dtype=accumulate_type(query))
    mixed = (scores.softmax(0).unsqueeze(-1).to(query.dtype) * outputs).sum(0)
    y = F.linear(mixed, w_value.to(query.dtype))
    return y if residual is None else y + residual


def rank_one_shift(h: Tensor, w: Tensor, b: Tensor | float, v: Tensor) -> Tensor:
    r"""A shift along v as strong as each token says: $y = h + (h\cdot w + b)\,v$.

    Args:
        h: (..., D); w, v: (D,); b: a number or a tensor of one element.

    Shapes: (..., D) -> (..., D).

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Fu et al., "AdapterBias: Parameter-efficient Token-dependent Representation Shift for Adapters in NLP
    Tasks", 2022. Composition.
    """
    h = _check.tensor("h", h, min_dim=1)
    for name, t in (("w", w), ("v", v)):
        _check.like(name, t, (h.shape[-1],), h, "h")
    if isinstance(b, Tensor):
        if b.numel() != 1:
            raise ValueError(f"b: expected one element, got shape {tuple(b.shape)}")
        _check.like("b", b, tuple(b.shape), h, "h")
        b = b.reshape(())
    else:
        b = _check.number("b", b)
    acc = accumulate_type(h)
    wide = h.to(acc)
    strength = wide @ w.to(acc) + b
    return torch.addcmul(wide, strength.unsqueeze(-1), v.to(acc)).to(h.dtype)


def average_lora(
    a: Tensor, b: Tensor, weights: Tensor, *, kind: str = "linear", rank: int | None = None
) -> tuple[Tensor, Tensor]:
    r"""K LoRA adapters averaged into one.

    "linear": $\sum w_kA_k$ and $\sum w_kB_k$. "linear_only_negate_b": $\sum|w_k|A_k$ and $\sum w_kB_k$, so that a
    negative weight negates the update once. "delta_w_svd": the best approximation of rank `rank` of
    $\sum w_kB_kA_k$, found from the factors' QR decompositions: the (O, I) sum is never formed.

    Args:
        a: (K, r, I); b: (K, O, r); weights: (K,).
        rank: of the result of "delta_w_svd", at most K r (None: r).

    Shapes: -> a (r', I), b (O, r').

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Poth et al., "Adapters: A Unified Library for Parameter-Efficient and Modular Transfer Learning", 2023
    (average_adapter; the weighted sum alone is the task-arithmetic merge). Composition.
    """
    a, b = _check.tensor("a", a, dim=3), _check.tensor("b", b, dim=3)
    _check.choice("kind", kind, ("linear", "linear_only_negate_b", "delta_w_svd"))
    count, r, inner = a.shape
    _check.like("b", b, (count, b.shape[1], r), a, "a")
    _check.like("weights", weights, (count,), a, "a")
    acc = accumulate_type(a)
    w, wide_a, wide_b = weights.to(acc)[:, None, None], a.to(acc), b.to(acc)
    if kind != "delta_w_svd":
        by = w if kind == "linear" else w.abs()
        return (by * wide_a).sum(0).to(a.dtype), (w * wide_b).sum(0).to(b.dtype)
    most = min(count * r, inner, b.shape[1])
    rank = min(r, most) if rank is None else rank
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= most:
        raise ValueError(f"rank: expected an int in [1, {most}], got {rank!r}")
    left = (w * wide_b).permute(1, 0, 2).reshape(b.shape[1], count * r)
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(wide_a.reshape(count * r, inner).mT)
    u, s, vh = torch.linalg.svd(r_left @ r_right.mT, full_matrices=False)
    new_b = q_left @ (u[:, :rank] * s[:rank])
    return (vh[:rank] @ q_right.mT).to(a.dtype), new_b.to(b.dtype)


@torch.no_grad()
def goat_split(
    weight: Tensor, experts: int, rank: int, *, eta: float = 1.0, rho: float = 1.0
) -> tuple[Tensor, Tensor, Tensor, float]:
    r"""GOAT's start: E experts from segments of W's singular values, and what is left of W.

    With $W = U\Sigma V^\top$, segment e begins at $e\lfloor m / E\rfloor$, m = min(O, I), and takes r / E triples:
    $A_e = (s\rho)^{-1/2}\Sigma_e^{1/2}V_e^\top$, $B_e = (s\rho)^{-1/2}U_e\Sigma_e^{1/2}$,
    $s = \sqrt{3\eta I / (r / E)}$, $W_{res} = W - s\sum_e B_eA_e$.

    Args:
        weight: (O, I); experts: E; rank: r in all, a multiple of E with r / E at most m / E.
        eta: ratio of the learning rates (full fine-tuning over LoRA); rho: shrinks the factors.

    Shapes: -> W_res (O, I), a (E, r / E, I), b (E, O, r / E), s.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Fan et al., "Make LoRA Great Again: Boosting LoRA with Adaptive Singular Values and Mixture-of-Experts
    Optimization Alignment", 2025; the segments and the scale from the authors' code, rho from the paper as
    commonly cited. Composition.
    """
    weight = _check.tensor("weight", weight, dim=2)
    eta, rho = _check.number("eta", eta), _check.number("rho", rho)
    for name, value in (("eta", eta), ("rho", rho)):
        if value <= 0:
            raise ValueError(f"{name}: expected a number above 0, got {value!r}")
    for name, value in (("experts", experts), ("rank", rank)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: expected an int, at least 1, got {value!r}")
    each, segment = rank // experts, min(weight.shape) // experts
    if rank % experts or each > segment:
        raise ValueError(
            f"rank: expected a multiple of experts = {experts} of at most {segment * experts} for "
            f"weight of shape {tuple(weight.shape)}, got {rank}"
        )
    acc = accumulate_type(weight)
    wide = weight.to(acc)
    u, sigma, vh = torch.linalg.svd(wide, full_matrices=False)
    taken = torch.arange(experts, device=weight.device)[:, None] * segment
    taken = taken + torch.arange(each, device=weight.device)  # (E, r / E)
    s = (3 * eta * weight.shape[1] / each) ** 0.5
    root = (sigma[taken] / (s * rho)).sqrt()
    a = root.unsqueeze(-1) * vh[taken]
    b = u[:, taken].permute(1, 0, 2) * root.unsqueeze(1)
    rest = wide - s * torch.einsum("eor,eri->oi", b, a)
    return rest.to(weight.dtype), a.to(weight.dtype), b.to(weight.dtype), s
