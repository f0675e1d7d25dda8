"""Shapes without data: what works on a meta device, autocast on or off, as torch's own layers do."""

import pytest
import torch
from helpers import randn

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
