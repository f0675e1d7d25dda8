"""Shapes without data: what works on a meta device, autocast on or off, as torch's own layers do."""

import pytest
import torch
from helpers import randn
from torch._subclasses.fake_tensor import FakeTensorMode

from solera import ensemble, norm

pytestmark = pytest.mark.no_interpreter  # no kernel runs


def labels(n):
    return torch.arange(n)


CASES = {
    "column_lse": lambda t: norm.column_lse(t(3, 4), t(5, 4)),
    "normalized_softmax": lambda t: norm.normalized_softmax_cross_entropy(t(3, 4), t(5, 4), t(3)),
    "cosine": lambda t: norm.batch_negatives(t(3, 4), t(3), whisker=None),
    "z_loss": lambda t: norm.z_loss(t(3, 5).half(), t(3), a=1.0, b=1.0),
    "ensemble_linear": lambda t: ensemble.ensemble_linear(t(3, 4), t(2, 4, 5), t(2, 5)),
    "batch_ensemble": lambda t: ensemble.batch_ensemble_linear(t(3, 4), t(5, 4), t(2, 4), t(2, 5)),
    "tabm": lambda t: ensemble.tabm_mlp(t(3, 4), [(t(5, 4), t(2, 4), t(2, 5), t(2, 5))]),
    "mlp": lambda t: ensemble.ensemble_mlp(t(3, 4), [(t(2, 4, 5), t(2, 5)), (t(2, 5, 1), t(2, 1))]),
    "lora": lambda t: ensemble.multi_lora_linear(
        t(3, 4), t(5, 4), t(2, 2, 4), t(2, 5, 2), gates=t(3, 2)
    ),
    "melora": lambda t: ensemble.melora_linear(t(3, 4), t(6, 4), t(2, 2, 2), t(2, 3, 2)),
    "mixture": lambda t: ensemble.mixture_linear(t(3, 4), t(2, 5, 4), t(3, 2)),
    "bank": lambda t: ensemble.adapter_bank_mix(t(3, 4), t(2, 2, 4), t(2, 4, 2), t(2, 4)),
    "heads": lambda t: ensemble.merge_text_heads(t(3, 4, 5)),
    "keys": lambda t: ensemble.nearest_keys(t(1, 3, 4), t(1, 5, 4)),
    "distillation": lambda t: ensemble.ensemble_distillation_loss(
        t(3, 5).half(), t(3, 2, 5).half()
    ),
}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_meta(name, autocast):
    made = lambda device: (
        lambda *shape: labels(*shape).to(device) if len(shape) == 1 else randn(*shape).to(device)
    )
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        want, got = CASES[name](made("cpu")), CASES[name](made("meta"))
    assert got.is_meta and got.shape == want.shape
    if not autocast:  # torch has no autocast for the meta device
        assert got.dtype == want.dtype


INDEX, OFFSETS = torch.tensor([1, -1, 0]), torch.tensor([0, 1, 3])
FAKE = {
    "cross_entropy": lambda t, y: ensemble.ensemble_cross_entropy(t(3, 2, 5), y(labels(3))),
    "diversity": lambda t, y: ensemble.diversity_loss(t(3, 2, 5), y(labels(3)), 0.1).loss,
    "el2n": lambda t, y: ensemble.el2n(t(3, 2, 5), y(labels(3))),
    "mixture": lambda t, y: ensemble.mixture_nll(t(2, 1, 3, 5), y(labels(3)[None]), t(2)).nll,
    "lora": lambda t, y: ensemble.multi_lora_linear(
        t(3, 4), t(5, 4), t(2, 2, 4), t(2, 5, 2), index=y(INDEX)
    ),
    "adapter": lambda t, y: ensemble.batched_adapter(t(3, 4), t(2, 2, 4), t(2, 4, 2), y(INDEX)),
    "descriptions": lambda t, y: ensemble.segment_similarity(t(3, 4), t(3, 4), y(OFFSETS), "lse"),
    "gaussian": lambda t, y: ensemble.gda_head(t(3, 4), t(4, 4), 5)[1],
}


@pytest.mark.parametrize("name", FAKE)
def test_fake_tensors_have_no_values_to_check(name):
    positive = lambda t: t @ t.mT + torch.eye(4) if t.shape == (4, 4) else t
    want = FAKE[name](lambda *shape: positive(randn(*shape).cpu()), lambda y: y)
    with FakeTensorMode() as mode:
        made = lambda t: mode.from_tensor(t)
        got = FAKE[name](lambda *shape: made(torch.empty(*shape)), made)
    assert got.shape == want.shape and got.dtype == want.dtype
