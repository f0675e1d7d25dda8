"""Slot normalisation: against its formula, chunk by chunk against the whole set, the unbiased gradient."""

import itertools

import pytest
import torch
from helpers import DEVICE, randn

from solera.sinkhorn import SlotState, slot_accumulate, slot_finalize, slot_normalize

pytestmark = pytest.mark.no_interpreter  # a composition of torch's operations


def attention(scores, activation=torch.sigmoid):
    w = activation(scores)
    w = w / w.sum(-2, keepdim=True)
    return w / w.sum(-1, keepdim=True)


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_slot_normalize_against_its_formula(activation):
    scores = randn(2, 4, 9, dtype=torch.float64, grad=True)
    formula = {"sigmoid": torch.sigmoid, "softmax": torch.exp}[activation]
    ours = slot_normalize(scores, activation=activation)
    torch.testing.assert_close(ours, attention(scores, formula))
    valid = torch.arange(9, device=DEVICE) < 6
    masked = slot_normalize(scores, activation=activation, valid=valid)
    torch.testing.assert_close(masked[..., :6], attention(scores[..., :6], formula))
    assert not masked[..., 6:].any()
    f = lambda s: slot_normalize(s, activation=activation, valid=valid)
    assert torch.autograd.gradcheck(f, scores) and torch.autograd.gradgradcheck(f, scores)
    # Scores so low that every sigmoid is 0 in float32 keep their ratios.
    low = slot_normalize((scores.detach() - 500).float(), activation=activation)
    torch.testing.assert_close(low.sum(-1), torch.ones(2, 4, device=DEVICE))


def test_universal_mini_batch_consistency():
    """Any partition of the set gives the encoding of the whole: softmax-free attention by sums."""
    q, k, v = (randn(2, n, 6, dtype=torch.float64) for n in (3, 11, 11))
    scores = q @ k.transpose(1, 2) / 6**0.5
    whole = attention(scores) @ v
    torch.testing.assert_close(slot_finalize(slot_accumulate(q, k, v)), whole)
    for sizes in ((4, 4, 3), (1, 10), (11,)):
        state = None
        for part in torch.randperm(11).split(sizes):
            state = slot_accumulate(q, k[:, part], v[:, part], state)
        torch.testing.assert_close(slot_finalize(state), whole)


def test_unbiased_full_set_gradient():
    """The mean over all choices of one chunk with a graph, scaled by 1 / share, is the full gradient."""
    q, k, v = (randn(n, 5, dtype=torch.float64, grad=True) for n in (2, 6, 6))
    weight = randn(2, 5, dtype=torch.float64)
    parts = torch.arange(6).split(2)

    def gradient(chosen, scale):
        state = None
        for c, part in enumerate(parts):
            s = scale if c in chosen else 0.0
            state = slot_accumulate(q, k[part], v[part], state, gradient_scale=s)
        return torch.autograd.grad((slot_finalize(state) * weight).sum(), (q, k, v))

    full = gradient({0, 1, 2}, 1.0)
    for size, scale in ((1, 3.0), (2, 1.5)):
        each = [gradient(set(c), scale) for c in itertools.combinations(range(3), size)]
        for i in range(3):
            torch.testing.assert_close(torch.stack([e[i] for e in each]).mean(0), full[i])


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_scores_past_the_range_of_half_precision(activation):
    """Products of float16 queries and keys are taken in float32."""
    q, k, v = (torch.randn(4, 6, device=DEVICE) for _ in range(3))
    q, k, v = (400 * q).half(), (400 * k).half(), v.half()
    assert (q.float() @ k.float().mT).abs().max() > 65504
    got = slot_finalize(slot_accumulate(q, k, v, activation=activation, scale=1e-5))
    scores = 1e-5 * q.double() @ k.double().mT
    want = slot_normalize(scores, activation=activation) @ v.double()
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)


def test_a_slot_that_is_all_but_ignored():
    """Its shares are below float32: still normalised; as sums over chunks it is one that saw nothing."""
    scores = torch.tensor([[300.0, 310.0], [1.0, 2.0]], device=DEVICE, requires_grad=True)
    got = slot_normalize(scores, activation="softmax")
    wide = slot_normalize(scores.detach().double(), activation="softmax")
    torch.testing.assert_close(got.detach().double(), wide, rtol=1e-4, atol=1e-6)
    (grad,) = torch.autograd.grad(got[1, 0], scores)
    assert torch.isfinite(grad).all() and grad[1].abs().min() > 1e-6
    faint = torch.tensor([[90.0], [0.0]], device=DEVICE, requires_grad=True)
    one = torch.ones(1, 1, device=DEVICE)
    out = slot_finalize(slot_accumulate(faint, one, one, scale=1.0, activation="softmax"))
    assert torch.isfinite(torch.autograd.grad(out.sum(), faint)[0]).all() and float(out[1]) == 0


X = torch.rand(3, 4, device=DEVICE)
BAD = [
    (lambda: slot_normalize(X[0]), ValueError, "scores: expected at least 2"),
    (lambda: slot_normalize(X, activation="tanh"), ValueError, "activation: expected one of"),
    (lambda: slot_normalize(X, valid=X[0]), TypeError, "valid: expected a bool"),
    (lambda: slot_normalize(X, valid=X[:, 0] > 0), ValueError, r"valid: expected shape \(4,\)"),
    (lambda: slot_accumulate(X, X[:, :2], X), ValueError, "keys: expected 4 features"),
    (lambda: slot_accumulate(X, X, X[:2]), ValueError, "values: expected 3 elements"),
    (lambda: slot_accumulate(X, X, X, (X, X)), TypeError, "state: expected None or a SlotState"),
    (lambda: slot_accumulate(X, X, X, SlotState(X[:1], X[:1, 0])), ValueError, "state: expected sums"),
    (lambda: slot_finalize(X), TypeError, "state: expected a SlotState"),
]  # fmt: skip


@pytest.mark.parametrize("call, error, match", BAD, ids=[m for _, _, m in BAD])
def test_bad_input(call, error, match):
    with pytest.raises(error, match=match):
        call()
