"""`solera.nn.convert`: a model's norms swapped and swapped back."""

import copy
import pickle

import pytest
import torch
from helpers import DEVICE, assert_accurate, randn
from torch import nn

import solera


class Residual(nn.Module):
    """Every kind of norm a vision or language model has, one of them used twice."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.norm = nn.GroupNorm(4, 16)
        self.instance = nn.InstanceNorm2d(16, affine=True, track_running_stats=True)
        self.again = self.norm
        self.rows = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16), nn.RMSNorm(16))
        self.grid = nn.LayerNorm((8, 16))
        self.head = nn.Sequential(nn.BatchNorm1d(16), nn.Linear(16, 5))

    def forward(self, x):
        x = self.stem(x)
        x = x + self.instance(self.norm(x))
        tokens = self.grid(self.again(x).flatten(2).transpose(1, 2).reshape(x.shape[0], -1, 8, 16))
        tokens = self.rows(tokens.flatten(1, 2))
        return self.head(tokens.mean(1))


def model(dtype=torch.float32):
    torch.manual_seed(1)
    return Residual().to(device=DEVICE, dtype=dtype)


def step(net, x):
    net.zero_grad()
    y = net(x)
    y.square().sum().backward()
    return {"y": y.detach(), **{name: p.grad for name, p in net.named_parameters()}}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_outputs_gradients_and_running_statistics_agree(dtype, training):
    eager, net, exact = (model(d).train(training) for d in (dtype, dtype, torch.float64))
    report = solera.nn.convert(net)
    assert set(report.changed) == {
        "stem.1", "norm", "instance", "rows.0", "rows.2", "grid", "head.0",
    }  # fmt: skip
    assert all(type(net.get_submodule(n)).__module__.startswith("solera") for n in report.changed)
    x = randn(6, 3, 8, 8, dtype=dtype)
    theirs, ours, right = step(eager, x), step(net, x), step(exact, x.double())
    for name, value in ours.items():
        allowed = max(
            2 * float((theirs[name] - right[name]).norm()), 1e-6 * float(right[name].norm())
        )
        # The bias before a norm has a gradient of zero: what is left of it is rounding, on both sides.
        floor = 1e-5 if dtype is torch.float32 else 1e-12
        assert float((value - right[name]).norm()) <= max(allowed, floor), name
    for (name, value), other in zip(net.named_buffers(), dict(exact.named_buffers()).values()):
        if value.is_floating_point():
            if dtype is torch.float64:  # a mean near zero of terms near one
                torch.testing.assert_close(value, other, rtol=1e-12, atol=1e-13)
            else:
                assert_accurate(value, other, dict(eager.named_buffers())[name], name)
        else:
            assert torch.equal(value, other), name


def test_the_state_dict_is_unchanged_and_everybody_keeps_their_reference():
    net = model()
    before, seen = copy.deepcopy(net.state_dict()), dict(net.named_modules())
    parameters = dict(net.named_parameters())
    solera.nn.convert(net)
    assert list(net.state_dict()) == list(before)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(module is seen[name] for name, module in net.named_modules())
    assert all(p is parameters[name] for name, p in net.named_parameters())
    model().load_state_dict(net.state_dict(), strict=True)


def test_revert_gives_the_very_same_model_back():
    net, untouched = model().eval(), model().eval()
    converted = solera.nn.convert(net)
    pickle.loads(pickle.dumps(net))
    back = solera.nn.revert(copy.deepcopy(net))
    report = solera.nn.revert(net)
    assert set(report.changed) == set(back.changed) == set(converted.changed)
    kinds = [type(m) for m in net.modules()]
    assert kinds == [type(m) for m in untouched.modules()]
    x = randn(2, 3, 8, 8)
    assert torch.equal(net(x), untouched(x))


def test_hooks_and_the_training_flag_stay():
    net = model()
    net.norm.eval()
    calls = []
    net.norm.register_forward_hook(lambda *_: calls.append(1))
    solera.nn.convert(net)
    net(randn(2, 3, 8, 8))
    assert calls == [1, 1] and not net.norm.training


@pytest.mark.parametrize(
    ("options", "changed"),
    [
        ({"include": "rows.*"}, {"rows.0", "rows.2"}),
        ({"include": nn.BatchNorm2d}, {"stem.1"}),
        ({"include": ("norm", nn.RMSNorm)}, {"norm", "rows.2"}),
        ({"include": lambda name, module: name.startswith("head")}, {"head.0"}),
        ({"include": nn.LayerNorm, "exclude": "grid"}, {"rows.0"}),
    ],
)
def test_selectors(options, changed):
    net = model()
    report = solera.nn.convert(net, **options)
    assert set(report.changed) == changed
    assert set(report.kept) | changed == set(solera.nn.convert(model()).changed)
    assert "left" in str(report) and "->" in str(report)


def test_a_subclass_is_left_alone_and_named():
    class Fixed(nn.LayerNorm):
        def forward(self, x):
            return super().forward(x) * 2

    net = nn.Sequential(Fixed(4), nn.LayerNorm(4))
    report = solera.nn.convert(net)
    assert list(report.changed) == ["1"] and "Fixed is a subclass" in report.kept["0"]
    assert solera.nn.convert(net).changed == {}


def test_a_norm_alone_and_one_torch_cannot_be():
    norm = nn.GroupNorm(2, 4)
    assert list(solera.nn.convert(norm).changed) == [""]
    fused = solera.nn.GroupNorm(2, 4, activation="silu")
    assert "activation" in solera.nn.revert(fused).kept[""]


def test_bad_arguments():
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module"):
        solera.nn.convert([nn.LayerNorm(4)])
    with pytest.raises(TypeError, match="include: expected name patterns"):
        solera.nn.convert(model(), include=3)
    with pytest.raises(TypeError, match="exclude: expected name patterns"):
        solera.nn.revert(model(), exclude=[3])
