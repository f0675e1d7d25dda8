"""Modules: tabm's names, initialisation and checkpoints; member counts are checked, never broadcast."""

import copy
import pickle

import numpy as np
import pytest
import torch
from helpers import DEVICE, assert_accurate, randn

from solera import nn

tabm = pytest.importorskip("tabm")

CASES = {
    "batch": (nn.LinearBatchEnsemble, "LinearBatchEnsemble", {"k": 4, "scaling_init": "normal"}),
    "signs": (
        nn.LinearBatchEnsemble,
        "LinearBatchEnsemble",
        {"k": 3, "scaling_init": ("random-signs", "ones"), "first_scaling_init_chunks": [2, 5]},
    ),
    "separate": (nn.LinearEnsemble, "LinearEnsemble", {"k": 4}),
}


def pair(case, bias=True):
    ours, name, options = CASES[case]
    torch.manual_seed(1)
    a = ours(7, 5, bias, **options, device=DEVICE)
    torch.manual_seed(1)
    b = getattr(tabm, name)(7, 5, bias, **options, device=DEVICE)
    return a, b


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_same_start_and_checkpoints_both_ways(case, bias):
    ours, theirs = pair(case, bias)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), key
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = randn(6, ours.k, 7)
    assert_accurate(ours(x), theirs.double()(x.double()), theirs.float()(x))


@pytest.mark.parametrize("case", CASES)
def test_trains_like_tabm(case):
    ours, theirs = pair(case)
    x = randn(9, ours.k, 7)
    for module in (ours, theirs):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            module(x).square().mean().backward()
            optimizer.step()
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_member_count_is_never_broadcast(case):
    module, _ = pair(case)
    for shape in [
        (6, 1, 7),
        (6, module.k + 1, 7),
        (6, module.k, 8),
        (6, 3),
        (2, 6, module.k, 7),
        (7,),
    ]:
        with pytest.raises(ValueError, match="x: expected"):
            module(randn(*shape))
    other = type(module)(7, 5, **{**CASES[case][2], "k": 2})
    with pytest.raises(RuntimeError, match="size mismatch"):
        module.load_state_dict(other.state_dict())


@pytest.mark.parametrize("case", CASES)
def test_shared_input_pickle_deepcopy_repr(case):
    module, _ = pair(case)
    x = randn(5, 7)
    y = module(x)
    assert y.shape == (5, module.k, 5)
    wide = module(x[:, None].expand(-1, module.k, -1))
    torch.testing.assert_close(y, wide)
    assert torch.equal(pickle.loads(pickle.dumps(module))(x), y)
    assert torch.equal(copy.deepcopy(module)(x), y)
    assert f"k={module.k}" in repr(module)


def test_from_linear_and_bad_arguments():
    linear = torch.nn.Linear(7, 5, bias=False, dtype=torch.float64)
    made = nn.LinearBatchEnsemble.from_linear(linear, k=2, scaling_init="ones")
    assert made.weight.dtype == torch.float64 and made.bias is None and made.weight.shape == (5, 7)
    assert nn.LinearEnsemble.from_linear(linear, k=np.int64(2)).weight.shape == (2, 7, 5)
    with pytest.raises(ValueError, match="k: expected"):
        nn.LinearEnsemble(7, 5, k=0)
    with pytest.raises(TypeError, match="in_features: expected"):
        nn.LinearEnsemble(7.0, 5, k=1)
    with pytest.raises(ValueError, match="scaling_init: expected"):
        nn.LinearBatchEnsemble(7, 5, k=2, scaling_init="zeros")
    with pytest.raises(ValueError, match="first_scaling_init_chunks: expected sizes"):
        nn.LinearBatchEnsemble(7, 5, k=2, scaling_init="normal", first_scaling_init_chunks=[3])
    with pytest.raises(ValueError, match="first_scaling_init_chunks: expected None"):
        nn.LinearBatchEnsemble(7, 5, k=2, scaling_init="ones", first_scaling_init_chunks=[7])


def test_activation_in_the_module():
    module = nn.LinearEnsemble(7, 5, k=3, activation="relu", device=DEVICE)
    assert (module(randn(4, 7)) >= 0).all()
