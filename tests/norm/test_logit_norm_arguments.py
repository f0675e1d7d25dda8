"""Losses over logits: bad input gets an error that names it."""

import pytest
import torch
from helpers import DEVICE, INTERPRETED, randn

import solera
from solera.norm import (
    aldr_kl_loss,
    comp_sum_loss,
    decoupled_softmax_loss,
    ldr_kl_loss,
    logit_norm_cross_entropy,
    spherical_z_loss,
    stablemax_cross_entropy,
    z_loss,
)

ops = torch.ops.solera

X, Y = randn(3, 4), torch.tensor([0, 1, 2], device=DEVICE)
BAD = [
    (lambda: z_loss([1.0], Y, a=1.0, b=0.0), TypeError, "logits: expected a torch.Tensor, got list"),
    (lambda: z_loss(Y[None].float().int(), Y, a=1.0, b=0.0), TypeError, "logits: expected float32"),
    (lambda: z_loss(X, Y.float(), a=1.0, b=0.0), TypeError, "target: expected int64"),
    (lambda: z_loss(X, Y[:2], a=1.0, b=0.0), ValueError, r"target: expected shape \(3,\)"),
    (lambda: z_loss(X, None, a=1.0, b=0.0), TypeError, "target: expected a torch.Tensor"),
    (lambda: z_loss(X, Y, a=0.0, b=0.0), ValueError, "a: expected a number above 0"),
    (lambda: z_loss(X, Y, a=1.0, b=float("nan")), ValueError, "b: expected a finite number"),
    (lambda: z_loss(X, Y, a=1.0, b=0.0, reduction="avg"), ValueError, "reduction: expected one of"),
    (lambda: z_loss(X, Y, a=1.0, b=0.0, eps=-1.0), ValueError, "eps: expected a finite number"),
    (lambda: z_loss(randn(3, 0), Y, a=1.0, b=0.0), ValueError, "logits: expected at least one class"),
    (lambda: stablemax_cross_entropy(X, Y + 2), IndexError, r"target: expected labels in \[0, 4\).*got 4 at row 2"),
    (lambda: stablemax_cross_entropy(X, Y - 1), IndexError, "got -1 at row 0"),
    (lambda: logit_norm_cross_entropy(X, Y, temperature=0), ValueError, "temperature: expected a number above 0"),
    (lambda: logit_norm_cross_entropy(X, Y, segments=[3, 2]), ValueError, "segments: expected positive lengths"),
    (lambda: logit_norm_cross_entropy(X, Y, segments=[]), ValueError, "segments: expected positive lengths"),
    (lambda: ldr_kl_loss(X, Y, lam=randn(4)), ValueError, r"lam: expected shape \(3,\)"),
    (lambda: aldr_kl_loss(X, Y, 1.0, lam0=1.0, alpha=1.0), ValueError, "alpha: expected a number above 1"),
    (lambda: comp_sum_loss(X, Y, kind="exq"), ValueError, "kind: expected one of"),
    (lambda: decoupled_softmax_loss(X, X), TypeError, "positive_mask: expected a bool"),
    (lambda: decoupled_softmax_loss(X, X[:2] > 0), ValueError, r"positive_mask: expected shape \(3, 4\)"),
    (lambda: spherical_z_loss(X, randn(5, 3), Y, a=1.0, b=0.0), ValueError, r"weight: expected shape \(5, 4\)"),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input_is_named(case):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.skipif(INTERPRETED, reason="the C++ kernel's own checks")
@pytest.mark.skipif(solera._registry.compiled_library is None, reason="no compiled library here")
def test_the_kernel_refuses_what_would_leave_its_memory():
    ones = torch.ones(3)
    for args in (
        (X, Y[:2], ones, None, None, 0.0, 2),
        (X, Y, ones[:2], None, None, 0.0, 2),
        (X, Y, None, None, None, 0.0, 2),
        (X, Y, ones, ones, None, 0.0, 2),
        (X, Y, ones, None, torch.tensor([0, 9]), 0.0, 3),
        (X, Y, ones, None, torch.tensor([0, 3, 1, 4]), 0.0, 3),
        (X, Y, ones.double(), None, None, 0.0, 2),
    ):
        with pytest.raises(RuntimeError, match="solera:"):
            ops.logit_statistics(*args)
