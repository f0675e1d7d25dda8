"""solera.nn.MultiLoRALinear: the op behind it, its base, copies and checkpoints."""

import copy
import pickle

import pytest
import torch
from helpers import DEVICE, randn

from solera.ensemble import multi_lora_linear
from solera.nn import MultiLoRALinear

pytestmark = pytest.mark.no_interpreter  # a module over the op


def test_starts_as_its_base_and_trains_its_adapters():
    base = torch.nn.Linear(6, 5, device=DEVICE)
    layer = MultiLoRALinear.from_linear(base, 3, 2, lora_alpha=4.0)
    x, index = randn(7, 6), torch.tensor([0, 1, 2, -1, 0, 1, 2], device=DEVICE)
    torch.testing.assert_close(layer(x, index), base(x))
    assert layer.weight is base.weight and not layer.weight.requires_grad
    torch.nn.init.normal_(layer.lora_b)
    want = multi_lora_linear(
        x, base.weight, layer.lora_a, layer.lora_b, index=index, scaling=2.0, bias=base.bias
    )
    y = layer(x, index)
    assert torch.equal(y, want)
    y.sum().backward()
    assert layer.lora_a.grad.abs().sum() > 0 and layer.weight.grad is None
    gates = torch.rand(7, 3, device=DEVICE)
    assert layer(x, gates=gates).shape == (7, 5) and layer(x).shape == (3, 7, 5)


def test_copies_checkpoints_and_construction():
    layer = MultiLoRALinear(6, 5, 3, 2, bias=False, device=DEVICE)
    x, index = randn(4, 6), torch.tensor([0, 1, 2, -1], device=DEVICE)
    assert list(layer.state_dict()) == ["weight", "lora_a", "lora_b"]
    torch.nn.init.normal_(layer.lora_b)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x, index), layer(x, index))
    other = MultiLoRALinear(6, 5, 3, 2, bias=False, device=DEVICE)
    other.load_state_dict(layer.state_dict(), strict=True)
    assert torch.equal(other(x, index), layer(x, index))
    assert "num_adapters=3, r=2" in repr(layer)
    assert MultiLoRALinear(6, 5, 3, 2, train_base=True).weight.requires_grad
    with pytest.raises(ValueError, match="num_adapters: expected at least one adapter"):
        MultiLoRALinear(6, 5, 0, 2)
    with pytest.raises(ValueError, match="x: expected 6 features"):
        layer(randn(4, 7), index)
