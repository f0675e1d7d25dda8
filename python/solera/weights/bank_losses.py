"""Losses on banks of moving averages, a row for each sample or class: thin functions over core `indexed_ema`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _check
from .._registry import accumulate_type
from .._route import full_precision
from ..ensemble import ensemble_distillation_loss
from ..norm import l2_normalize
from .indexed_ema import check_bank, check_index, indexed_ema_


def _classes(name: str, target: object, rows: int, device: torch.device) -> Tensor:
    if not isinstance(target, Tensor) or target.dtype != torch.int64:
        came = target.dtype if isinstance(target, Tensor) else type(target).__name__
        raise TypeError(f"{name}: expected an int64 tensor, got {came}")
    if target.shape != (rows,) or target.device != device:
        raise ValueError(
            f"{name}: expected shape ({rows},) on {device}, got {tuple(target.shape)} on {target.device}"
        )
    return target


def _rows_of(bank: Tensor, index: Tensor, width: int, like: Tensor) -> None:
    if bank.shape[1:] != (width,) or bank.device != like.device or index.shape != like.shape[:1]:
        raise ValueError(
            f"bank: expected shape (N, {width}) on {like.device} and {like.shape[0]} row numbers, got "
            f"{tuple(bank.shape)} on {bank.device} and {tuple(index.shape)}"
        )


def elr_loss(
    logits: Tensor,
    target: Tensor,
    bank: Tensor,
    index: Tensor,
    beta: float = 0.7,
    lam: float = 3.0,
    *,
    update: bool = True,
) -> Tensor:
    r"""Early-learning regularisation: cross-entropy, and a pull to the average of the sample's earlier predictions.

    $p = \mathrm{clamp}(\mathrm{softmax}(z), 10^{-4}, 1 - 10^{-4})$; in place and without gradient
    $t_i \leftarrow \beta t_i + (1 - \beta)\,p / \sum_c p_c$; then
    $L = \mathrm{CE}(z, y) + \lambda\,\mathrm{mean}_i \log(1 - \langle t_i, p_i\rangle)$.

    Args:
        logits: (B, C), float32, float64, bfloat16 or float16; computed in float32 (float64 for float64).
        target: (B,) int64.
        bank: (N, C), one row a sample, zeros at first; updated in place.
        index: (B,) int64, the samples' rows; a row named twice takes both predictions in order, and both samples are
            pulled to the result.
        beta: in [0, 1]. lam: the weight of the pull. update: False leaves the bank alone (ELR+ mixes its rows first:
            `mix_pairs(bank[index], permutation, share)`, whose result stands for a bank of the batch's own).

    Shapes: (B, C), (B,), (N, C), (B,) -> (). Differentiable in logits. A composition.

    Raises:
        ValueError, TypeError, IndexError: naming the argument that does not fit.

    Source: Liu, Niles-Weed, Razavian, Fernandez-Granda, "Early-Learning Regularization Prevents Memorization of Noisy
    Labels", 2020, and its public code (the clamp).
    """
    z = _check.tensor("logits", logits, dim=2)
    y = _classes("target", target, z.shape[0], z.device)
    t = check_bank("bank", bank)
    i = check_index("index", index, t.shape[0], z.device, low=0)
    _rows_of(t, i, z.shape[1], z)
    lam = _check.number("lam", lam)
    log_p = z.to(accumulate_type(z)).log_softmax(1)
    p = log_p.exp().clamp(1e-4, 1 - 1e-4)
    if update:
        q = p.detach()
        indexed_ema_(t, i, q / q.sum(1, keepdim=True), beta)
    agreement = (t.detach()[i].to(p.dtype) * p).sum(1)
    loss = F.nll_loss(log_p, y) + lam * torch.log(1 - agreement).mean()
    return loss.to(z.dtype)


def kl_to_bank(logits: Tensor, bank: Tensor, index: Tensor, tau: float = 1.0) -> Tensor:
    r"""Divergence from stored past outputs: $\frac1B\sum_b \mathrm{KL}(\mathrm{softmax}(t_{i_b}/\tau) \,\|\,
    \mathrm{softmax}(z_b/\tau))$.

    SAF stores the logits of some epochs ago in the bank (`indexed_ema_(bank, index, logits, 0.0)`); MESA takes the
    outputs of an averaged model (`ema_`) as the bank, with `index` `torch.arange(B)`.

    Args:
        logits: (B, C). bank: (N, C) logits, a constant. index: (B,) int64. tau: positive. The paper's factor lambda
            (and any tau^2) multiplies the result.

    Shapes: (B, C), (N, C), (B,) -> (). Differentiable in logits. A composition over `ensemble_distillation_loss`.

    Raises:
        ValueError, TypeError, IndexError: naming the argument that does not fit.

    Source: Du, Zhou, Feng, Tan, Zhou, "Sharpness-Aware Training for Free", 2022.
    """
    z = _check.tensor("logits", logits, dim=2)
    t = _check.tensor("bank", bank, dim=2)
    i = check_index("index", index, t.shape[0], z.device, low=0)
    _rows_of(t, i, z.shape[1], z)
    tau = _check.number("tau", tau, low=0.0)
    if tau == 0.0:
        raise ValueError("tau: expected a positive number, got 0")
    acc = accumulate_type(z)
    past = t.detach()[i].to(acc)
    return _kl(z.to(acc), [past], [1.0], tau).to(z.dtype)


def _kl(student: Tensor, teachers: list[Tensor], weights: list[float], tau: float) -> Tensor:
    """Mean KL from softmax(sum_m w_m z_m / tau), a constant, to softmax(student / tau)."""
    cross = ensemble_distillation_loss(
        student, teachers, temperature=tau, weights=weights, combine="logit"
    )
    with torch.no_grad():
        mixed = torch.stack([w * t for w, t in zip(weights, teachers)]).sum(0)
        entropy = ensemble_distillation_loss(
            mixed, teachers, temperature=tau, weights=weights, combine="logit"
        )
    return cross - entropy


def cfg_kd_loss(
    student: Tensor, cond: Tensor, uncond: Tensor, gamma: float, *, temperature: float = 1.0
) -> Tensor:
    r"""Distillation of classifier-free guidance: KL from the guided teacher, $z = z_u + \gamma (z_c - z_u)$.

    Args:
        student: (..., V) logits. cond, uncond: the teacher's with and without the condition, constants. gamma: the
            guidance. temperature: positive.

    Shapes: three (..., V) -> (), the mean over the rows. Differentiable in student. The guided row is formed and read
    inside the kernel of `ensemble_distillation_loss`, once for the loss and its gradient and once for the entropy.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Cideron et al., "Diversity-Rewarded CFG Distillation", 2025.
    """
    x = _check.tensor("student", student, min_dim=1)
    for name, t in (("cond", cond), ("uncond", uncond)):
        _check.tensor(name, t)
        _check.like(name, t, tuple(x.shape), x, "student")
    gamma = _check.number("gamma", gamma)
    acc = accumulate_type(x)
    teachers = [t.detach().to(acc) for t in (cond, uncond)]
    return _kl(x.to(acc), teachers, [gamma, 1 - gamma], temperature).to(x.dtype)


@full_precision
def isogclr_loss(
    z: Tensor,
    index: Tensor,
    s: Tensor,
    u: Tensor,
    tau: Tensor,
    gamma: float = 0.9,
    beta: float = 0.9,
    eta: float = 0.01,
    rho: float = 0.3,
    *,
    tau_min: float = 0.05,
    tau_max: float = 1.0,
    clip: float = 3.0,
) -> Tensor:
    r"""Global contrastive loss with a temperature of its own for every sample, all state updated in place.

    With unit rows h of two views, $e_{ij} = e^{\langle h_i, h_j\rangle/\tau_i}$ and means over the 2B - 2 rows of the
    other samples: $g_i = \mathrm{mean}_j e_{ij}$; $s_i \leftarrow (1 - \gamma) s_i + \gamma g_i$ (g averaged over the
    sample's two views where it is stored, each view's own in what follows); weights
    $w_{ij} = e_{ij}/s_i$, constants; the loss is the mean over the 2B anchors of
    $\mathrm{mean}_j w_{ij}\langle h_i, h_j\rangle - \langle h_i, h_{i^+}\rangle$; the temperature's gradient
    $d_i = \log s_i + \rho - \mathrm{mean}_j w_{ij}\langle h_i, h_j\rangle/\tau_i$, clipped to [-clip, clip] and
    averaged over the views, goes into $u_i \leftarrow (1 - \beta) u_i + \beta d_i$ and
    $\tau_i \leftarrow \mathrm{clamp}(\tau_i - \eta u_i, \tau_{\min}, \tau_{\max})$.

    Args:
        z: (2B, d), the two views one after the other; brought to unit length. B at least 2.
        index: (B,) int64, the samples' places in the state, each once.
        s, u, tau: (N,) float32 or float64, updated in place; zeros, zeros and the first temperature at the start.
        gamma, beta: in [0, 1]; eta, rho, tau_min, tau_max, clip: numbers.

    Shapes: (2B, d), (B,), (N,) three times -> (). Differentiable in z. A composition; the (2B, 2B) similarities exist
    once, with their exponentials.

    Raises:
        ValueError, TypeError, IndexError: naming the argument that does not fit.

    Source: Qiu et al., "Not All Semantics are Created Equal: Contrastive Self-supervised Learning with Automatic
    Temperature Individualization", 2023, and its public code (clipping, bounds).
    """
    x = _check.tensor("z", z, dim=2)
    count = x.shape[0] // 2
    if x.shape[0] % 2 or count < 2:
        raise ValueError(f"z: expected an even number of rows, at least 4, got {x.shape[0]}")
    for name, t in (("s", s), ("u", u), ("tau", tau)):
        _check.tensor(name, t, dim=1)
        if t.shape != s.shape or t.device != x.device:
            raise ValueError(
                f"{name}: expected shape {tuple(s.shape)} on {x.device}, got {tuple(t.shape)} on {t.device}"
            )
    i = check_index("index", index, s.shape[0], x.device, low=0)
    if i.shape[0] != count:
        raise ValueError(f"index: expected {count} row numbers for {count} samples, got {len(i)}")
    gamma, beta = (
        _check.number(n, v, low=0.0, high=1.0) for n, v in (("gamma", gamma), ("beta", beta))
    )
    acc = accumulate_type(x)
    h = l2_normalize(x.to(acc))
    similarity = h @ h.mT
    sample = torch.arange(2 * count, device=x.device) % count
    others = sample[:, None] != sample
    negatives = 2 * count - 2
    with torch.no_grad():
        t = tau[i].to(acc).repeat(2)[:, None]
        e = torch.where(others, (similarity / t).exp(), 0)
        g = e.sum(1) / negatives
        new = (1 - gamma) * s[i].to(acc).repeat(2) + gamma * g
        w = e / new[:, None]
        s[i] = new.view(2, count).mean(0).to(s.dtype)
        d = new.log() + rho - (w * similarity).sum(1) / t[:, 0] / negatives
        indexed_ema_(u, i, d.clamp(-clip, clip).view(2, count).mean(0), 1 - beta)
        tau[i] = (tau[i] - eta * u[i].to(tau.dtype)).clamp(tau_min, tau_max)
    positive = (h[:count] * h[count:]).sum(1).repeat(2)
    loss = (w * similarity).sum(1) / negatives - positive
    return loss.mean().to(x.dtype)


def rationale_loss(
    z: Tensor, weight: Tensor, bank: Tensor, target: Tensor, *, reduction: str = "mean"
) -> Tensor:
    r"""Distance of a sample's rationale, $R_i = W \odot z_i$ (K, D), to its class's average: $\|R_i - M_{y_i}\|^2$.

    Expanded, $\sum_d z_d^2 \sum_k W_{kd}^2 - 2\sum_d z_d \sum_k W_{kd} M_{y,kd} + \|M_y\|^2$: the first two inner sums
    belong to the weight and to the classes, so no (B, K, D) tensor exists. Float64, since the three terms cancel as R
    nears M.

    Args:
        z: (B, D) features. weight: (K, D), the classifier's. bank: (C, K, D), a constant. target: (B,) int64.
        reduction: "mean", "sum" or "none" over the batch.

    Shapes: (B, D), (K, D), (C, K, D), (B,) -> () or (B,). Differentiable in z and weight. A composition; update the
    bank with `class_ema_`, or for class means of R with `indexed_ema_(bank, classes, weight * means[:, None], decay)`.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Chen, Zhang, Song, van den Hengel, Liu, "Domain Generalization via Rationale Invariance", 2023; the
    expansion is derived.
    """
    x = _check.tensor("z", z, dim=2)
    w = _check.tensor("weight", weight, dim=2)
    _check.like("weight", w, (w.shape[0], x.shape[1]), x, "z")
    m = _check.tensor("bank", bank, dim=3)
    _check.like("bank", m, (m.shape[0], *w.shape), x, "z")
    y = _classes("target", target, x.shape[0], x.device)
    _check.choice("reduction", reduction, ("mean", "sum", "none"))
    x64, w64, m64 = x.double(), w.double(), m.detach().double()
    cross = torch.einsum("kd,ckd->cd", w64, m64)
    size = m64.square().sum((1, 2))
    loss = (x64.square() * w64.square().sum(0) - 2 * x64 * cross[y]).sum(1) + size[y]
    if reduction != "none":
        loss = loss.mean() if reduction == "mean" else loss.sum()
    return loss.to(x.dtype)
