"""What is done with class means and covariances, Gram matrices and memories; compositions over core `moments2`."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _check
from .._registry import accumulate_type
from .._route import without_autocast
from .moments2 import class_moments, covariance, gram_pairs, indices


def _means(x: Tensor, means: Tensor) -> Tensor:
    _check.tensor("means", means, dim=2)
    if means.shape[1] != x.shape[1] or means.device != x.device:
        raise ValueError(
            f"means: expected {x.shape[1]} columns on {x.device} (as x), "
            f"got {tuple(means.shape)} on {means.device}"
        )
    return means.to(accumulate_type(x))


def mahalanobis(
    x: Tensor, means: Tensor, precision: Tensor | None = None, *, cholesky: Tensor | None = None
) -> Tensor:
    r"""Squared Mahalanobis distances of rows to class means.

    $D_{bc} = (x_b-\mu_c)^\top\Sigma_c^{-1}(x_b-\mu_c) = \|L_c^{-1}(x_b-\mu_c)\|^2$.

    Args:
        x: (B, D), float32, float64, bfloat16 or float16.
        means: (C, D).
        precision: $\Sigma^{-1}$, (C, D, D), or (D, D) shared by the classes.
        cholesky: instead of it, the lower factor $L$ of $\Sigma = LL^\top$, of the same shapes.

    Shapes: (B, D), (C, D) -> (B, C) in float32 (float64 for float64). Differentiable.

    Raises:
        ValueError, TypeError: naming the argument that does not fit; exactly one of precision and cholesky
            has to be given.

    Source: Jung et al., "CAFA: Class-Aware Feature Alignment for Test-Time Adaptation", 2023. Composition.
    """
    _check.tensor("x", x, dim=2)
    means = _means(x, means)
    if (precision is None) == (cholesky is None):
        raise ValueError("precision: expected exactly one of precision and cholesky")
    name = "precision" if cholesky is None else "cholesky"
    matrix = _check.tensor(name, precision if cholesky is None else cholesky)
    classes, columns = means.shape
    if matrix.shape not in ((columns, columns), (classes, columns, columns)):
        raise ValueError(
            f"{name}: expected shape {(classes, columns, columns)} or {(columns, columns)}, "
            f"got {tuple(matrix.shape)}"
        )
    matrix = matrix.to(means.dtype)
    d = x.to(means.dtype) - means[:, None]  # (C, B, D)
    if cholesky is None:
        return ((d @ matrix) * d).sum(-1).mT
    matrix = matrix.expand(classes, columns, columns)
    return torch.linalg.solve_triangular(matrix, d.mT, upper=False).square().sum(1).mT


def cafa_loss(x: Tensor, logits: Tensor, means: Tensor, precision: Tensor) -> Tensor:
    r"""Class-aware feature alignment: near the predicted class's source statistics, far from the others'.

    $\frac1B\sum_b \log\bigl(D_{b\hat y_b} / \sum_{c\ne\hat y_b} D_{bc}\bigr)$ with $\hat y = \arg\max$ of the logits
    and D by `mahalanobis`.

    Args:
        x: (B, D) features; logits: (B, C) of the current model, of which only the arg max counts.
        means, precision: of the source classes, (C, D) and (C, D, D) or (D, D); C at least 2.

    Shapes: -> (). Differentiable in x (and the statistics).

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Jung et al., "CAFA: Class-Aware Feature Alignment for Test-Time Adaptation", 2023; the log ratio
    derived from the abstract's intra- and inter-class distances. Composition.
    """
    distance = mahalanobis(x, means, precision)
    _check.tensor("logits", logits, dim=2)
    if logits.shape != distance.shape or distance.shape[1] < 2:
        raise ValueError(
            f"logits: expected shape {tuple(distance.shape)} with at least 2 classes, "
            f"got {tuple(logits.shape)}"
        )
    label = logits.argmax(1, keepdim=True)
    own = distance.gather(1, label).squeeze(1)
    others = distance.scatter(1, label, 0.0).sum(1)
    return (own.log() - others.log()).mean()


def masked_gram_l1(
    features: Tensor, pairs: Tensor, *, eps: float = 1e-5, margin: float = 0.0
) -> Tensor:
    r"""Asymmetric instance-adaptive whitening: the mean of |chosen Gram entries|, K of C x C.

    $\frac1B\sum_b \operatorname{relu}\bigl(\frac1K\sum_k |G_b|_{i_kj_k} - \mathrm{margin}\bigr)$ with
    $G_b = F_bF_b^\top/(n-1) + \varepsilon I$, n positions, uncentred as the paper's code.

    Args:
        features: (B, C, *), float32, float64, bfloat16 or float16.
        pairs: (K, 2) int64 entries of the mask (`gram_variance_pairs` chooses them).

    Shapes: (B, C, *), (K, 2) -> (). Differentiable in features.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Zhou et al., "Instance-Aware Domain Generalization for Face Anti-Spoofing", 2023. Over core
    `moments2` (`gram_pairs`).
    """
    dots = gram_pairs(features, pairs)
    positions = features[0, 0].numel() if features.shape[0] and features.shape[1] else 2
    entry = dots / max(positions - 1, 1) + eps * (pairs[:, 0] == pairs[:, 1])
    return torch.relu(entry.abs().mean(1) - margin).mean()


def gram_variance_pairs(features: Tensor, augmented: Tensor, fraction: float) -> Tensor:
    r"""The share of Gram entries that augmentation moves most, as index pairs for `masked_gram_l1`.

    Args:
        features, augmented: (B, C, *) of the same images, before and after augmentation.
        fraction: of the C x C entries, in (0, 1]; 0.003 and 0.0006 in the paper.

    Shapes: (B, C, *) twice -> (K, 2) int64, K = max(1, floor(fraction C^2)). No gradient.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: as `masked_gram_l1`. Composition.
    """
    x = _check.tensor("features", features, min_dim=3).detach().flatten(2)
    fraction = _check.number("fraction", fraction, low=0.0, high=1.0)
    _check.like("augmented", augmented, features.shape, features, "features")
    acc = accumulate_type(x)
    both = torch.stack([x.to(acc), augmented.detach().flatten(2).to(acc)])
    gram = both @ both.mT / max(x.shape[2] - 1, 1)
    moved = gram.var(0, correction=0).mean(0).flatten()
    channels = x.shape[1]
    chosen = moved.topk(max(1, int(fraction * channels * channels))).indices
    return torch.stack([chosen // channels, chosen % channels], 1)


def linear_cka(x: Tensor, y: Tensor) -> Tensor:
    r"""Linear centred kernel alignment of two representations of the same samples.

    $\|\tilde X^\top\tilde Y\|_F^2 / (\|\tilde X^\top\tilde X\|_F\,\|\tilde Y^\top\tilde Y\|_F)$, columns centred.

    Shapes: (N, D), (N, E) -> () in float32 (float64 for float64). Differentiable.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Kornblith et al., "Similarity of Neural Network Representations Revisited", 2019; used by "Are We
    Truly Forgetting?", 2025. Composition.
    """
    _check.tensor("x", x, dim=2)
    _check.tensor("y", y, dim=2)
    if x.shape[0] != y.shape[0]:
        raise ValueError(f"y: expected {x.shape[0]} rows (as x), got shape {tuple(y.shape)}")
    a = x.to(accumulate_type(x))
    b = y.to(a.dtype)
    a, b = a - a.mean(0), b - b.mean(0)
    norm = torch.linalg.matrix_norm
    with without_autocast(x):
        return norm(a.mT @ b).square() / (norm(a.mT @ a) * norm(b.mT @ b))


def class_gaussian_sample(
    means: Tensor,
    covariances: Tensor,
    count: int,
    *,
    jitter: float = 1e-6,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Features drawn from each class's Gaussian: $\mu_c + L_c\epsilon$, $L_cL_c^\top = \Sigma_c + \mathrm{jitter}\,I$.

    Args:
        means: (C, D), float32 or float64; covariances: (C, D, D), positive semidefinite.
        count: samples a class.
        jitter: added to the diagonal, so that a class of few samples has a factor.

    Shapes: (C, D), (C, D, D) -> (C, count, D). Differentiable in both.

    Raises:
        ValueError, TypeError: naming the argument that does not fit; torch.linalg.LinAlgError where a
            covariance has no factor.

    Source: Zhang et al., "SLCA", 2023; Zhang et al., "When Noisy Labels Meet Long Tail Dilemmas", 2023.
    Composition (batched Cholesky).
    """
    _check.tensor("means", means, dim=2)
    classes, columns = means.shape
    _check.like("covariances", covariances, (classes, columns, columns), means, "means")
    eye = torch.eye(columns, dtype=covariances.dtype, device=means.device)
    factor = torch.linalg.cholesky(covariances + jitter * eye)
    noise = torch.randn(
        classes, count, columns, dtype=means.dtype, device=means.device, generator=generator
    )
    return means[:, None] + noise @ factor.mT


def gnb_logits(
    x: Tensor, means: Tensor, variances: Tensor, log_prior: Tensor | None = None
) -> Tensor:
    r"""Gaussian naive Bayes:
    $-\frac12\sum_d (x_d-\mu_{cd})^2/\sigma^2_{cd} - \frac12\sum_d\log\sigma^2_{cd} + \log\pi_c$.

    Two products: rows are taken relative to the mean of the class means first, so that the expansion of the
    square does not cancel.

    Args:
        x: (B, D), float32, float64, bfloat16 or float16; means, variances: (C, D), variances positive.
        log_prior: (C,), or None for equal classes.

    Shapes: (B, D), (C, D), (C, D) -> (B, C) in float32 (float64 for float64). Differentiable.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Zheng et al., "Revisiting Discriminative vs. Generative Classifiers: Theory and Implications", 2023.
    Composition (`class_moments(..., covariance=False)` fits it).
    """
    _check.tensor("x", x, dim=2)
    means = _means(x, means)
    _check.like("variances", variances, tuple(means.shape), means, "means")
    if log_prior is not None:
        _check.like("log_prior", log_prior, means.shape[:1], means, "means")
    inverse = 1.0 / variances.to(means.dtype)
    centre = means.mean(0)
    a, m = x.to(means.dtype) - centre, means - centre
    constant = (m.square() * inverse - inverse.log()).sum(1)
    out = -0.5 * (a.square() @ inverse.mT + constant) + a @ (m * inverse).mT
    return out if log_prior is None else out + log_prior


def corr_matrix(h: Tensor, *, normalize: bool = True) -> Tensor:
    r"""Correlation of columns, $\Sigma_{ij}/\sqrt{\Sigma_{ii}\Sigma_{jj}}$; with normalize=False their covariance.

    Shapes: (N, D) -> (D, D) in float32 (float64 for float64); a constant column gives 0. Differentiable.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: the definition; asked for by "Training-free Neural Architecture Search for RNNs and Transformers"
    and "W-PCA". Over core `moments2`.
    """
    _, matrix = covariance(h)
    if not normalize:
        return matrix
    scale = matrix.diagonal()
    scale = torch.where(scale > 0, torch.where(scale > 0, scale, 1.0).rsqrt(), 0.0)
    return matrix * scale[:, None] * scale


def hidden_covariance_score(h: Tensor, k: float = 1e-5) -> Tensor:
    r"""$-\sum_i [\log(\lambda_i + k) + 1/(\lambda_i + k)]$ over the eigenvalues of the samples' correlation.

    Args:
        h: (B, H) hidden states of B samples; their B x B correlation is taken.

    Shapes: (B, H) -> (). No gradient is needed by the search.

    Raises:
        ValueError, TypeError: naming h where it does not fit.

    Source: Serianni, Kalita, "Training-free Neural Architecture Search for RNNs and Transformers", 2023; the
    eigenvalue score as in Mellor et al., 2021. Composition.
    """
    _check.tensor("h", h, dim=2)
    values = torch.linalg.eigvalsh(corr_matrix(h.mT)) + k
    return -(values.log() + 1.0 / values).sum()


def wpca_score(hiddens: list[Tensor], parameters: int, *, share: float = 0.99) -> float:
    r"""Parameters times the number of principal components that explain `share` of the variance, over layers.

    Args:
        hiddens: one (..., D) tensor of hidden states for each feed-forward layer.
        parameters: of the network.
        share: eta in (0, 1].

    Shapes: a list of (..., D) -> a Python float.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: "W-PCA Based Gradient-Free Proxy for Efficient Search of Lightweight Language Models", 2025.
    Composition.
    """
    share = _check.number("share", share, low=0.0, high=1.0)
    total = 0
    for h in hiddens:
        rows = _check.tensor("hiddens", h, min_dim=2).flatten(0, -2)
        values = torch.linalg.eigvalsh(corr_matrix(rows, normalize=False)).flip(0).clamp_min(0)
        part = values.cumsum(0) / values.sum()
        total += int((part < share * (1 - 1e-6)).sum()) + 1
    return float(parameters) * total


def memory_bank_ema_(bank: Tensor, index: Tensor, x: Tensor, momentum: float = 0.5) -> Tensor:
    r"""Move rows of a memory of unit vectors in place: $m_i \leftarrow \operatorname{unit}(\mu\,m_i + (1-\mu)\,x)$.

    Where an index occurs more than once, its last row of x counts (each from the old $m_i$), whatever the device.

    Args:
        bank: (n, D), changed in place; index: (B,) int64 in [0, n); x: (B, D) of bank's dtype.
        momentum: in [0, 1]; 0.5 in the paper.

    Shapes: (n, D), (B,), (B, D) -> bank. No gradient.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance-level Discrimination", 2018.
    Composition.
    """
    _check.tensor("bank", bank, dim=2)
    _check.tensor("x", x, dim=2)
    indices("index", index, x.shape[:1], bank)
    _check.like("x", x, (index.shape[0], bank.shape[1]), bank, "bank")
    momentum = _check.number("momentum", momentum, low=0.0, high=1.0)
    with torch.no_grad():
        place = torch.arange(index.shape[0], device=index.device)
        last = torch.zeros(bank.shape[0], dtype=torch.int64, device=bank.device)
        last = last.scatter_reduce(0, index, place, "amax")[index]
        acc = accumulate_type(bank)
        rows = momentum * bank[index].to(acc) + (1 - momentum) * x[last].to(acc)
        rows = torch.nn.functional.normalize(rows, dim=1)
        # Equal indices bring equal rows: the order in which they are written does not matter.
        bank.index_copy_(0, index, rows.to(bank.dtype))
    return bank


def indexed_stats_update_(
    count: Tensor, mean: Tensor, squares: Tensor, index: Tensor, value: Tensor
) -> None:
    r"""Running statistics of one number a slot, in place: count, mean and sum of squares about the mean.

    All values of a slot in the batch merge into it at once (Chan's formula), so duplicates in `index` count as
    often as they occur. `squares / count` is the variance.

    Args:
        count, mean, squares: (n,) float32 or float64, changed in place.
        index: (B,) int64; entries outside [0, n) are left out. value: (B,).

    Shapes: (n,) three times, (B,), (B,) -> None. No gradient.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Lan et al., "Towards Enhancing Time Series Contrastive Learning: A Dynamic Bad Pair Mining Approach",
    2024 (the memory of losses); Chan, Golub, LeVeque, 1979. Over core `moments2`.
    """
    _check.tensor("count", count, dim=1)
    for name, t in (("mean", mean), ("squares", squares)):
        _check.like(name, t, tuple(count.shape), count, "count")
    _check.tensor("value", value, dim=1)
    indices("index", index, value.shape, value)
    n, m, v = class_moments(value[:, None], index, count.shape[0], covariance=False, correction=0)
    new = n.to(count.dtype)
    total = (count + new).clamp_min(1)
    delta = torch.where(n > 0, m[:, 0].to(mean.dtype) - mean, 0.0)
    squares += (v[:, 0] * n).to(squares.dtype) + delta.square() * count * new / total
    mean += delta * new / total
    count += new


def gaussian_weight(x: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    r"""$e^{-(x-\mu)^2/2\sigma^2}$: the weight of a pair whose mean loss stands out from the epoch's.

    Shapes: broadcast. Differentiable.

    Source: as `indexed_stats_update_`; the Gaussian form derived from the paper's description. Composition.
    """
    return torch.exp(-0.5 * ((x - mean) / deviation).square())


def iter_proto_adapt(
    support: Tensor,
    labels: Tensor,
    query: Tensor,
    num_classes: int,
    *,
    iterations: int = 3,
    tau: float = 0.1,
) -> Tensor:
    r"""Prototypes adapted to the queries: normalise, assign softly by cosine, average, repeat.

    $p_c \leftarrow (\sum_{y_i=c} s_i + \sum_j a_{jc} q_j)/(n_c + \sum_j a_{jc})$ with
    $a = \operatorname{softmax}(\cos(q, p)/\tau)$.

    Args:
        support: (E, S, D) and labels (E, S) int64 of E episodes; query: (E, Q, D).

    Shapes: -> prototypes (E, num_classes, D). Differentiable.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: "Hybrid Consistency Training with Prototype Adaptation for Few-Shot Learning", 2020; centring and
    temperature are not in its abstract: none, and an argument. Composition.
    """
    _check.tensor("support", support, dim=3)
    _check.tensor("query", query, dim=3)
    episodes, _, columns = support.shape
    _check.like("query", query, (episodes, query.shape[1], columns), support, "support")
    _check.product_dtype("query", query, support, "support")
    indices("labels", labels, support.shape[:2], support)
    unit = torch.nn.functional.normalize
    s, q = unit(support, dim=-1), unit(query, dim=-1)
    own = torch.nn.functional.one_hot(labels, num_classes).to(s.dtype)  # (E, S, C)
    sums, count = own.mT @ s, own.sum(1)[:, :, None]
    p = sums / count.clamp_min(1)
    for _ in range(iterations):
        a = torch.softmax(q @ unit(p, dim=-1).mT / tau, -1)
        p = (sums + a.mT @ q) / (count + a.sum(1)[:, :, None])
    return p


def attenuated_cosine_score(
    x: Tensor, weight: Tensor, logits: Tensor, means: Tensor
) -> tuple[Tensor, Tensor]:
    r"""The predicted class's logit times the cosine of $[x, x\odot w_{\hat y}]$ with that class's mean.

    Args:
        x: (B, D); weight: (C, D) of the classifier; logits: (B, C); means: (C, 2 D) of the same features.

    Shapes: -> (scores (B,), predicted (B,) int64).

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: "COSTARR: Consolidated Open Set Technique with Attenuation for Robust Recognition", 2025; the product
    with the logit derived from the abstract. Composition.
    """
    _check.tensor("x", x, dim=2)
    _check.tensor("weight", weight, dim=2)
    rows, columns = x.shape
    classes = weight.shape[0]
    _check.like("weight", weight, (classes, columns), x)
    _check.tensor("logits", logits, dim=2)
    _check.like("logits", logits, (rows, classes), x)
    _check.tensor("means", means, dim=2)
    _check.like("means", means, (classes, 2 * columns), x)
    best, predicted = logits.max(1)
    both = torch.cat([x, x * weight[predicted]], 1)
    return best * torch.cosine_similarity(both, means[predicted], dim=1), predicted


def masked_mix(x1: Tensor, x2: Tensor, mask: Tensor) -> Tensor:
    r"""$m\odot x_1 + (1-m)\odot x_2$: ExcelFormer's HID-MIX (mask over hidden dimensions) and FEAT-MIX (over features).

    Shapes: mask broadcasts against x1 and x2, bool or real -> their shape. Differentiable.

    Raises:
        TypeError: naming the argument whose dtype does not fit.

    Source: Chen et al., "ExcelFormer: Can a DNN be a Sure Bet for Tabular Prediction?", 2023. Composition.
    """
    _check.tensor("x1", x1)
    _check.tensor("x2", x2)
    _check.same_dtype("x2", x2, x1, "x1")
    return (
        torch.where(mask, x1, x2)
        if mask.dtype == torch.bool
        else torch.lerp(x2, x1, mask.to(x1.dtype))
    )


def prototype_drift(old: Tensor, new: Tensor, prototypes: Tensor, sigma: float) -> Tensor:
    r"""How far prototypes moved with the features near them:
    $\Delta_c = \sum_i w_{ic}(f^{new}_i - f^{old}_i)/\sum_i w_{ic}$, $w_{ic} = e^{-\|f^{old}_i - p_c\|^2/2\sigma^2}$.

    A softmax over the samples, so far prototypes do not divide 0 by 0.

    Shapes: old, new (N, D), prototypes (C, D) -> (C, D) of old's dtype. Differentiable.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: "Semantically-Shifted Incremental Adapter-Tuning is A Continual ViTransformer", 2024; the weights as
    in Yu et al., "Semantic Drift Compensation", 2020. Composition.
    """
    _check.tensor("old", old, dim=2)
    _check.like("new", new, tuple(old.shape), old, "old")
    _check.tensor("prototypes", prototypes, dim=2)
    _check.like("prototypes", prototypes, (prototypes.shape[0], old.shape[1]), old, "old")
    sigma = _check.number("sigma", sigma, low=0.0)
    acc = accumulate_type(old)
    p, before, after = (t.to(acc) for t in (prototypes, old, new))
    distance = torch.cdist(p, before, compute_mode="donot_use_mm_for_euclid_dist").square()
    with without_autocast(old):
        drift = torch.softmax(-distance / (2 * sigma * sigma), 1) @ (after - before)
    return drift.to(old.dtype)
