"""Scaled weight standardisation: the formula in float64, timm's convolution, gradients, bad input."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, DTYPES, assert_accurate, randn

from solera.nn import ScaledStdConv2d
from solera.norm import scaled_weight_standardize


def exact(w, gain, gamma, eps, add):
    w = w.double()
    rows = w.flatten(1)
    centred = rows - rows.mean(1, keepdim=True)
    total = centred.square().sum(1, keepdim=True)
    total = total + rows.shape[1] * eps if add else total.clamp_min(eps)
    out = gamma * centred / total.sqrt()
    if gain is not None:
        out = out * gain.double().view(-1, 1)
    return out.view(w.shape)


@pytest.mark.parametrize("mode", ["clamp", "add"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 3, 3, 3), (4, 70), (3, 1), (2, 2, 5)], ids=str)
def test_against_float64(shape, dtype, mode):
    w, gain = randn(*shape, dtype=dtype) + 0.5, randn(shape[0], dtype=dtype)
    options = {"gamma": 1.7, "eps": 1e-3, "eps_mode": mode}
    for g in (None, gain, gain.view(-1, *[1] * (len(shape) - 1))):
        found = scaled_weight_standardize(w, g, **options)
        truth = exact(w, g, 1.7, 1e-3, mode == "add")
        today = exact(w.float(), g, 1.7, 1e-3, mode == "add").to(dtype)
        assert found.dtype == dtype and found.shape == w.shape
        assert_accurate(found, truth, today)


def test_small_weights_are_held_by_eps():
    w = randn(3, 10, dtype=torch.float64) * 1e-6
    found = scaled_weight_standardize(w)
    torch.testing.assert_close(found, (w - w.mean(1, keepdim=True)) / 1e-2)
    assert (scaled_weight_standardize(torch.ones(2, 5, device=DEVICE)) == 0).all()


def test_agrees_with_timm():
    """timm's ScaledStdConv2d standardises by a batch norm over (1, O, N) with weight gain * scale."""
    conv = ScaledStdConv2d(4, 6, 3, stride=2, gamma=1.3, gain_init=0.8).to(DEVICE)
    with torch.no_grad():
        conv.gain.copy_(randn(6, 1, 1, 1))
    rows = conv.weight.reshape(1, 6, -1)
    scale = 1.3 * conv.weight[0].numel() ** -0.5
    theirs = F.batch_norm(rows, None, None, (conv.gain * scale).view(-1), training=True, eps=1e-6)
    x = randn(2, 4, 9, 9)
    wanted = F.conv2d(x, theirs.reshape_as(conv.weight), conv.bias, 2, 1)
    torch.testing.assert_close(conv(x), wanted, rtol=1e-5, atol=1e-5)
    assert list(conv.state_dict()) == ["weight", "bias", "gain"]
    clone = pickle.loads(pickle.dumps(copy.deepcopy(conv)))
    assert torch.equal(clone(x), conv(x))
    assert ScaledStdConv2d(2, 2, 3)(torch.ones(1, 2, 5, 5)).shape == (1, 2, 5, 5)
    assert ScaledStdConv2d(2, 2, (1, 3), dilation=2)(torch.ones(1, 2, 5, 5)).shape == (1, 2, 5, 5)


@pytest.mark.parametrize("mode", ["clamp", "add"])
def test_gradients(mode):
    w = randn(3, 2, 4, dtype=torch.float64, grad=True)
    gain = randn(3, dtype=torch.float64, grad=True)

    def f(w, gain):
        return scaled_weight_standardize(w, gain, gamma=1.5, eps=0.01, eps_mode=mode)

    assert torch.autograd.gradcheck(f, (w, gain))
    assert torch.autograd.gradgradcheck(f, (w, gain))
    with torch.no_grad():
        truth = exact(w, gain, 1.5, 0.01, mode == "add")
    torch.testing.assert_close(f(w, gain).detach(), truth)


def test_layouts_empty_and_compile():
    w = randn(4, 3, 5, 5)
    last = w.to(memory_format=torch.channels_last)
    torch.testing.assert_close(scaled_weight_standardize(last), scaled_weight_standardize(w))
    assert scaled_weight_standardize(randn(0, 3)).shape == (0, 3)
    compiled = torch.compile(
        scaled_weight_standardize, fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for n in (3, 6):
        w, gain = randn(n, 7, grad=True), randn(n, grad=True)
        mine = torch.autograd.grad(scaled_weight_standardize(w, gain).pow(3).sum(), (w, gain))
        theirs = torch.autograd.grad(compiled(w, gain).pow(3).sum(), (w, gain))
        for a, b in zip(mine, theirs):
            torch.testing.assert_close(a, b)


BAD = [
    ({"weight": torch.ones(3)}, ValueError, "weight: expected at least 2 dimension"),
    ({"weight": 3}, TypeError, "weight: expected a torch.Tensor"),
    ({"gain": torch.ones(4)}, ValueError, "gain: expected 3 numbers"),
    ({"gain": 1.0}, TypeError, "gain: expected a torch.Tensor"),
    ({"eps": -1}, ValueError, "eps: expected a finite number"),
    ({"gamma": "x"}, TypeError, "gamma: expected a number"),
    ({"eps_mode": "mul"}, ValueError, "eps_mode: expected one of"),
]


@pytest.mark.parametrize("change, error, message", BAD, ids=[m for _, _, m in BAD])
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        scaled_weight_standardize(**({"weight": torch.ones(3, 4)} | change))
