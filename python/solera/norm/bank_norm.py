r"""Core `bank_norm`: similarities normalised by how often a gallery item is near a bank of queries.

Items that are close to everything (hubs) win too many queries. With similarities $S$ (Q, G) of queries to
gallery items and $B$ (M, G) of a bank of queries to the same items, the inverted softmax divides by the
column sums over the bank; in log space, so that nothing overflows,

$$L_j = \log\textstyle\sum_m e^{\beta B_{mj}},\qquad \hat S_{ij} = \beta S_{ij} - L_j .$$

The dynamic form applies it only to rows whose best item lies in the activation set
$A = \{j : B_{mj} \text{ among the } k \text{ largest of row } m \text{, for some } m\}$; other rows stay $S_i$.
With two banks (of queries and of gallery items) each factor has its own $\beta$, $L$ and $A$.

From embeddings $B = XY^\top$ is made in tiles and folded into running maxima and sums of the columns (and the
k largest of the rows), so nothing of size M x G is kept: with $m' = \max(m, \max_r t_r)$ over a tile's rows,
$s' = s\,e^{\beta(m - m')} + \sum_r e^{\beta(t_r - m')}$ and at the end $L = \beta m + \log s$.

Gradient: $\mathrm dB_{mj} = \mathrm dL_j\,\beta\,e^{\beta B_{mj} - L_j}$ (tiles again: $\mathrm dX = \mathrm dB\,Y$,
$\mathrm dY = \mathrm dB^\top X$), $\mathrm dS_i$ = the row's factor times $\mathrm d\hat S_i$ and
$\mathrm dL_j = -\sum_i \mathrm d\hat S_{ij}$ over the rows that used it. Which rows did, and $A$, are constants.

NaN and $-\infty$ are never among the largest; equal values rank by their place.

Sources: Bogolin et al., "Cross Modal Retrieval with Querybank Normalisation", 2022; Wang et al., "Balance
Act: Mitigating Hubness in Cross-Modal Retrieval with Query and Gallery Banks", 2023. The public functions
are in `querybank.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._autograd import differentiable_vjp
from .._registry import accumulate_type, reference
from .._route import without_autocast

_op = torch.ops.solera
_ROWS = 1024  # bank rows a step of the reference's product


def similarities_of(x: Tensor, y: Tensor) -> Tensor:
    """x @ y.T in the accumulator's type, under autocast too: rounded to half, neighbours would tie."""
    acc = accumulate_type(x)
    with without_autocast(x):
        return x.to(acc) @ y.to(acc).T


# ---- reference ---------------------------------------------------------------------------------------


def _largest(s: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row and where they are (fewer if the row is shorter), ties by place."""
    value, index = s.masked_fill(s.isnan(), -torch.inf).sort(dim=1, descending=True, stable=True)
    return value[:, :k], index[:, :k]


def _activation(s: Tensor, top_k: int) -> Tensor:
    """Whether each column is among the top_k of some row."""
    columns = s.shape[1]
    value, index = _largest(s.detach(), top_k)
    index = torch.where(value > -torch.inf, index, columns)
    active = s.new_zeros(columns + 1, dtype=torch.bool)
    return active.scatter(0, index.flatten(), True)[:columns].clone()


@reference("bank_columns")
def bank_columns_reference(similarities, beta, top_k):
    """(L (G,) in the accumulator's type, A (G,) bool; A is empty for top_k = 0)."""
    s = similarities.to(accumulate_type(similarities))
    lse = torch.logsumexp(beta * s, 0)
    return lse, _activation(s, top_k) if top_k else s.new_zeros(0, dtype=torch.bool)


@reference("bank_columns_backward")
def _bank_columns_backward(dlse, lse, similarities, beta):
    acc = accumulate_type(similarities)
    weight = torch.exp(beta * similarities.to(acc) - lse)
    return (beta * dlse.to(acc) * weight).to(similarities.dtype).contiguous()


def bank_stream_plain(bank, gallery, beta, top_k):
    """The formula as one product."""
    return bank_columns_reference(similarities_of(bank, gallery), beta, top_k)


@reference("bank_stream")
def bank_stream_reference(bank, gallery, beta, top_k):
    """`bank_columns` of bank @ gallery.T, a block of bank rows at a time."""
    if bank.shape[0] <= _ROWS:
        return bank_stream_plain(bank, gallery, beta, top_k)
    parts = [bank_stream_plain(block, gallery, beta, top_k) for block in bank.split(_ROWS)]
    active = torch.stack([a for _, a in parts]).any(0)
    return torch.logsumexp(torch.stack([lse for lse, _ in parts]), 0), active


@reference("bank_stream_backward")
def _bank_stream_backward(dlse, lse, bank, gallery, beta, need_bank, need_gallery):
    acc = accumulate_type(bank)
    x, y = bank.to(acc), gallery.to(acc)
    none = x.new_empty(0)
    d = beta * dlse.to(acc) * torch.exp(beta * similarities_of(x, y) - lse)
    return d @ y if need_bank else none, d.T @ x if need_gallery else none.clone()


def _factors(s, lse, active, beta, lse2, active2, beta2):
    """For each row: does it use the first factor, the second?"""
    value, index = _largest(s.detach(), 1)

    def uses(lse, active):
        if lse is None:
            return s.new_zeros(s.shape[0], dtype=torch.bool)
        if active is None:
            return s.new_ones(s.shape[0], dtype=torch.bool)
        return (active[index] & (value > -torch.inf)).any(1)

    return uses(lse, active), uses(lse2, active2)


def row_scale(first: Tensor, second: Tensor, beta: float, beta2: float, dtype) -> Tensor:
    """What a row's similarities are multiplied with: its factors' betas, 1 where it has none."""
    scale = first.to(dtype) * beta + second.to(dtype) * beta2
    return torch.where(first | second, scale, 1.0)


@reference("bank_apply")
def bank_apply_reference(similarities, lse, active, beta, lse2, active2, beta2):
    """(normalised similarities, which factors each row used: 1, 2, 3 for both or 0)."""
    acc = accumulate_type(similarities)
    s = similarities.to(acc)
    first, second = _factors(s, lse, active, beta, lse2, active2, beta2)
    out = s * row_scale(first, second, beta, beta2, acc)[:, None]
    out = torch.where(first[:, None], out - lse, out)
    if lse2 is not None:
        out = torch.where(second[:, None], out - lse2, out)
    return out.to(similarities.dtype).contiguous(), first.to(torch.int32) + 2 * second.int()


@reference("bank_scores")
def bank_scores_reference(queries, gallery, lse, active, beta, lse2, active2, beta2):
    """`bank_apply` of queries @ gallery.T, in the accumulator's type."""
    s = similarities_of(queries, gallery)
    return bank_apply_reference(s, lse, active, beta, lse2, active2, beta2)[0]


@reference("row_top")
def row_top_reference(scores, k):
    """The k largest of each row, descending, and where they are; -inf and -1 where there are fewer."""
    value, index = _largest(scores, k)
    missing = k - value.shape[1]
    value = torch.nn.functional.pad(value, (0, missing), value=-torch.inf)
    index = torch.nn.functional.pad(index, (0, missing), value=-1)
    return value.contiguous(), torch.where(value > -torch.inf, index, -1).contiguous()


# ---- autograd ----------------------------------------------------------------------------------------


class BankColumns(torch.autograd.Function):
    """(L, A) of given similarities."""

    @staticmethod
    def forward(ctx, similarities, beta, top_k):
        lse, active = _op.bank_columns(similarities, beta, top_k)
        ctx.beta = beta
        ctx.mark_non_differentiable(active)
        ctx.save_for_backward(similarities, lse)
        return lse, active

    @staticmethod
    def backward(ctx, dlse, _):
        similarities, lse = ctx.saved_tensors
        if torch.is_grad_enabled():
            acc = accumulate_type(similarities)
            formula = lambda s: torch.logsumexp(ctx.beta * s.to(acc), 0)
            return *differentiable_vjp(formula, (similarities,), (True,), (dlse,)), None, None
        return _op.bank_columns_backward(dlse, lse, similarities, ctx.beta), None, None


class BankStream(torch.autograd.Function):
    """(L, A) of embeddings. The second derivative writes bank x gallery."""

    @staticmethod
    def forward(ctx, bank, gallery, beta, top_k):
        lse, active = _op.bank_stream(bank, gallery, beta, top_k)
        ctx.beta = beta
        ctx.mark_non_differentiable(active)
        ctx.save_for_backward(bank, gallery, lse)
        return lse, active

    @staticmethod
    def backward(ctx, dlse, _):
        bank, gallery, lse = ctx.saved_tensors
        needs = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled():
            formula = lambda x, y: bank_stream_plain(x, y, ctx.beta, 0)[0]
            return *differentiable_vjp(formula, (bank, gallery), needs, (dlse,)), None, None
        dbank, dgallery = _op.bank_stream_backward(dlse, lse, bank, gallery, ctx.beta, *needs)
        return (
            dbank.to(bank.dtype) if needs[0] else None,
            dgallery.to(gallery.dtype) if needs[1] else None,
            None,
            None,
        )


class BankApply(torch.autograd.Function):
    """The normalised similarities. Linear in similarities and L, so its backward needs neither."""

    @staticmethod
    def forward(ctx, similarities, lse, active, beta, lse2, active2, beta2):
        out, used = _op.bank_apply(similarities, lse, active, beta, lse2, active2, beta2)
        ctx.betas = beta, beta2
        ctx.save_for_backward(used)
        return out

    @staticmethod
    def backward(ctx, dout):
        (used,) = ctx.saved_tensors
        acc = accumulate_type(dout)
        first, second = (used & 1).bool(), (used & 2).bool()
        d = dout.to(acc)
        beta, beta2 = ctx.betas
        need_s, need_lse, need_lse2 = (ctx.needs_input_grad[i] for i in (0, 1, 4))
        ds = d * row_scale(first, second, beta, beta2, acc)[:, None] if need_s else None
        return (
            None if ds is None else ds.to(dout.dtype),
            -(first.to(acc) @ d) if need_lse else None,
            None,
            None,
            -(second.to(acc) @ d) if need_lse2 else None,
            None,
            None,
        )
