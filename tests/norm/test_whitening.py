"""Whitening, PHI-S, Newton's iterations and streaming moments against their definitions in float64."""

import copy
import pickle

import pytest
import torch
from helpers import DEVICE, INTERPRETED, randn

from solera.norm import (
    MomentAccumulator,
    iterative_whitening,
    newton_schulz,
    phi_standardize,
    phi_standardize_fit,
    phi_standardize_invert,
    whiten_apply,
    whiten_fit,
)
from solera.norm._hadamard import balanced_rotation, hadamard

F64 = torch.float64


def data(n, columns, dtype=F64):
    return (randn(n, columns, dtype=F64) @ randn(columns, columns, dtype=F64) + 5).to(dtype)


def eye(n):
    return torch.eye(n, dtype=F64, device=DEVICE)


def test_whitened_rows_have_identity_covariance():
    x = data(200, 8)
    mean, w = whiten_fit(x)
    y = whiten_apply(x, mean, w)
    torch.testing.assert_close(torch.cov(y.T, correction=0), eye(8))
    torch.testing.assert_close(mean, x.mean(0))
    # The formula: (x - mu) U L^(-1/2), up to the sign of each direction.
    values, vectors = torch.linalg.eigh(torch.cov(x.T, correction=0))
    want = ((x - x.mean(0)) @ vectors / values.sqrt()).flip(1)
    torch.testing.assert_close(y.abs(), want.abs())
    top = whiten_fit(x, 3)[1]
    assert top.shape == (8, 3) and torch.equal(top, w[:, :3])
    assert (w.gather(0, w.abs().argmax(0, keepdim=True)) > 0).all()


def test_whitening_without_variance_in_a_direction():
    x = data(50, 4)
    x = torch.cat([x, x[:, :1]], 1)  # rank 4 of 5
    mean, w = whiten_fit(x)
    assert not w[:, 4].any() and torch.isfinite(w).all()
    y = whiten_apply(x, mean, w)
    torch.testing.assert_close(torch.cov(y[:, :4].T, correction=0), eye(4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_whitening_keeps_dtype_and_a_large_mean(dtype):
    spread = torch.arange(1, 7, dtype=F64, device=DEVICE)
    x = (randn(300, 6, dtype=F64) * spread + 50).to(dtype)
    mean, w = whiten_fit(x)
    y = whiten_apply(x, mean, w)
    assert y.dtype == dtype and mean.dtype == torch.float32
    want = whiten_apply(x.double(), *whiten_fit(x.double()))
    torch.testing.assert_close(
        y.double(), want, rtol=2e-2, atol=2e-2 if dtype != torch.float32 else 1e-3
    )


def test_whiten_apply_gradient_and_many_rows():
    x, (mean, w) = data(5, 3).requires_grad_(), whiten_fit(data(20, 3))
    assert torch.autograd.gradcheck(whiten_apply, (x, mean.requires_grad_(), w.requires_grad_()))
    rows = randn(9000, 3)
    got = whiten_apply(rows, mean.detach().float(), w.detach().float())
    torch.testing.assert_close(got, (rows - mean.detach().float()) @ w.detach().float())
    compiled = torch.compile(whiten_apply, fullgraph=True, dynamic=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, mean, w), whiten_apply(x, mean, w))


def test_accumulator_merges_chunks_and_processes():
    x = data(101, 5) + 1e3
    whole, other = MomentAccumulator(), MomentAccumulator()
    for chunk in x[:60].split(17):
        whole.update(chunk)
    other.update(x[60:]).update(x[:0])
    state = pickle.loads(pickle.dumps(copy.deepcopy(other)))
    whole.merge(state).merge(MomentAccumulator())
    assert whole.count == 101
    torch.testing.assert_close(whole.mean, x.mean(0))
    torch.testing.assert_close(whole.covariance(1), torch.cov(x.T))
    torch.testing.assert_close(whiten_fit(whole)[1], whiten_fit(x)[1], rtol=1e-6, atol=1e-9)
    with pytest.raises(ValueError, match="x: expected 5 columns"):
        whole.update(x[:, :2])


@pytest.mark.parametrize("order", [1, 2, 4, 8, 12, 20, 24, 48, 768])
def test_hadamard_matrices(order):
    h = hadamard(order)
    assert torch.equal(h.abs(), torch.ones_like(h))
    assert torch.equal(h @ h.T, order * torch.eye(order, dtype=F64))


@pytest.mark.parametrize("order", [3, 5, 6, 7, 9, 10, 28, 36])
def test_levelling_where_no_hadamard_matrix_is_known(order):
    assert hadamard(order) is None
    for values in (torch.rand(order, dtype=F64) ** 4, torch.ones(order, dtype=F64)):
        r = balanced_rotation(values)
        torch.testing.assert_close(r @ r.T, torch.eye(order, dtype=F64))
        torch.testing.assert_close(
            (r @ torch.diag(values) @ r.T).diagonal(), values.mean().expand(order)
        )


@pytest.mark.parametrize("columns", [1, 7, 8, 12])
def test_phi_standardize(columns):
    x = data(150, columns)
    mean, rotation, scale = phi_standardize_fit(x)
    y = phi_standardize(x, mean, rotation, scale)
    torch.testing.assert_close(y.var(0, correction=0), torch.ones_like(mean))
    torch.testing.assert_close(y.mean(0), torch.zeros_like(mean), atol=1e-9, rtol=0)
    torch.testing.assert_close(phi_standardize_invert(y, mean, rotation, scale), x)
    # One scalar scale: distances only shrink by it.
    torch.testing.assert_close(torch.pdist(y[:9].cpu()), torch.pdist(x[:9].cpu()) / scale.cpu())
    values = torch.linalg.eigvalsh(torch.cov(x.T, correction=0).reshape(columns, columns))
    torch.testing.assert_close(scale, values.mean().sqrt())
    p = x.detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: phi_standardize(x, mean, rotation, scale), p[:3])


def test_newton_schulz():
    a = randn(3, 5, 5, dtype=F64)
    s = a @ a.mT + 0.5 * eye(5)
    torch.testing.assert_close(newton_schulz(s, 40), torch.linalg.inv(s.cpu()).to(DEVICE))
    root = newton_schulz(s, 60, "inverse_sqrt")
    torch.testing.assert_close(root @ s @ root, eye(5).expand(3, 5, 5), rtol=1e-7, atol=1e-7)
    # The papers' iterations as they stand, a few steps.
    m = s[0] / (s[0].abs().sum(0).max() * s[0].abs().sum(1).max())
    p, unit = eye(5), s[0] / s[0].trace()
    for _ in range(4):
        m = 2 * m - m @ s[0] @ m
        p = 0.5 * (3 * p - p @ p @ p @ unit)
    torch.testing.assert_close(newton_schulz(s[0], 4), m)
    torch.testing.assert_close(newton_schulz(s[0], 4, "inverse_sqrt"), p / s[0].trace().sqrt())
    for mode in ("inverse", "inverse_sqrt"):
        assert torch.autograd.gradcheck(lambda s: newton_schulz(s, 3, mode), s[0].requires_grad_())
    assert newton_schulz(s.half(), 3).dtype == torch.float16


@pytest.mark.parametrize("groups", [1, 2])
def test_iterative_whitening(groups):
    x = (
        randn(40, 4, 3, 2, dtype=F64)
        * torch.tensor([1.0, 2.0, 0.5, 1.0], dtype=F64, device=DEVICE)[:, None, None]
    )
    y = iterative_whitening(x, groups=groups, iterations=30, eps=0.0)
    assert y.shape == x.shape
    rows = y.movedim(1, -1).reshape(-1, 4)
    for part in rows.chunk(groups, 1):
        torch.testing.assert_close(torch.cov(part.T, correction=0), eye(4 // groups))
    few = x[:5].detach().requires_grad_()
    if not INTERPRETED:
        assert torch.autograd.gradcheck(
            lambda x: iterative_whitening(x, groups=groups, iterations=2), few
        )


BAD = [
    (lambda x: whiten_fit(x, 9), "k: expected None or an int from 1 to 3"),
    (lambda x: whiten_apply(x, x[0, :2], x), r"mean: expected shape \(3,\)"),
    (lambda x: whiten_apply(x, x[0], x[:2]), r"weight: expected shape \(3, 3\)"),
    (lambda x: phi_standardize(x, x[0], x[:2], x[0, 0]), "rotation: expected shape"),
    (lambda x: phi_standardize(x, x[0], x[:3, :2], x[0, 0]), r"rotation: expected shape \(3, 3\)"),
    (lambda x: phi_standardize(x, x[0], x[:3], x[0]), r"scale: expected shape \(\)"),
    (lambda x: phi_standardize_invert(x[0], x[0], x[:3], x[0, 0]), "y: expected 2 dim"),
    (lambda x: newton_schulz(x, 3), "s: expected square"),
    (lambda x: newton_schulz(x[:3], -1), "iterations: expected an int"),
    (lambda x: newton_schulz(x[:3], 1, "root"), "mode: expected one of"),
    (lambda x: iterative_whitening(x, groups=2), "groups: expected a divisor of 3"),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input_is_named(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call(randn(4, 3))
