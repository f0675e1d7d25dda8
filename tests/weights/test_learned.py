"""Soup with trainable coefficients: learned soups and AdaMerging, beside the functional form in torch."""

import copy
import pickle

import pytest
import torch
from helpers import DEVICE, randn
from torch import nn
from torch.func import functional_call

from solera.weights import Soup

F64 = torch.float64


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.last = nn.Linear(4, 2)
        self.again = self.last  # two names, one layer
        self.bound = nn.Linear(3, 4)
        self.bound.weight = self.first.weight  # tied: one parameter in two layers
        self.register_buffer("own", torch.ones(1), persistent=False)

    def forward(self, x):
        return self.last(torch.relu(self.norm(self.first(x) + self.bound(x)))) * self.own


def models(count, dtype=F64):
    found = []
    for _ in range(count):
        model = Net().to(DEVICE, dtype)
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(randn(*p.shape))
            model.norm.running_mean.copy_(randn(4))
            model.norm.running_var.copy_(randn(4).square() + 0.5)
        found.append(model.eval())
    return found


def functional(module, given, c, x, base=None):
    """What a user writes today: the weighted sum of stacked state dicts, then functional_call."""
    names = [n for n, _ in module.named_parameters()]
    merged = {}
    for item, name in enumerate(names):
        stacked = torch.stack([m.get_parameter(name).detach() for m in given])
        start = 0 if base is None else base.get_parameter(name).detach()
        merged[name] = start + torch.tensordot(c[:, item], stacked - start, 1)
    for name in ("norm.running_mean", "norm.running_var"):
        share = c.detach().mean(1)
        stacked = torch.stack([m.get_buffer(name) for m in given])
        start = 0 if base is None else base.get_buffer(name)
        merged[name] = start + torch.tensordot(share, stacked - start, 1)
    merged["bound.weight"] = merged["first.weight"]
    return functional_call(module, merged, (x,), tie_weights=False)


@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("granularity", ["tensor", "model"])
def test_values_and_gradients_are_those_of_the_functional_form(granularity, softmax, with_base):
    given, base = models(3), models(1)[0] if with_base else None
    tuned = Soup(
        Net().to(DEVICE, F64).eval(), given, granularity=granularity, softmax=softmax, base=base
    )
    with torch.no_grad():
        tuned.coefficients.add_(0.1 * randn(*tuned.coefficients.shape))
    x = randn(5, 3, dtype=F64)
    c = tuned.coefficients.detach().clone().requires_grad_()
    used = c.softmax(0) if softmax else c
    columns = used if used.dim() == 2 else used[:, None].expand(3, 7)
    y = tuned(x)
    truth = functional(Net().to(DEVICE, F64).eval(), given, columns, x, base)
    torch.testing.assert_close(y, truth)
    g = randn(5, 2, dtype=F64)
    (ours,) = torch.autograd.grad(y, tuned.coefficients, g)
    (theirs,) = torch.autograd.grad(truth, c, g)
    torch.testing.assert_close(ours, theirs)
    assert [n for n, _ in tuned.named_parameters()] == ["coefficients"]
    fresh = Net().to(DEVICE, F64).eval()
    fresh.load_state_dict(tuned.merged())
    torch.testing.assert_close(fresh(x), y)


def test_learned_soup_trains_and_the_models_stay_as_they_are():
    """Softmax by tensor and a logit temperature: the loss on held-out data falls below the uniform soup's."""
    given = models(4, torch.float32)
    x, target = randn(64, 3), torch.randint(0, 2, (64,), device=DEVICE)
    tuned = Soup(Net().to(DEVICE).eval(), given, softmax=True, logit_scale=True)
    before = [copy.deepcopy(m.state_dict()) for m in given]
    torch.testing.assert_close(tuned.weights(), torch.full((4, 7), 0.25, device=DEVICE))
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=0.05, weight_decay=0)
    losses = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(tuned(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.02
    assert tuned.logit_scale is not None and tuned.logit_scale.item() != 1
    for model, state in zip(given, before):
        assert all(torch.equal(t, state[k]) for k, t in model.state_dict().items())
        assert all(p.grad is None for p in model.parameters())


def test_adamerging_lowers_the_entropy():
    """Task vectors around a pretrained model, from 0.3, trained on unlabelled data."""
    given, base = models(2, torch.float32), models(1, torch.float32)[0]
    tuned = Soup(Net().to(DEVICE).eval(), given, base=base)
    assert torch.equal(tuned.coefficients.detach(), torch.full((2, 7), 0.3, device=DEVICE))
    x = randn(64, 3)
    optimizer = torch.optim.Adam(tuned.parameters(), lr=0.02)
    entropies = []
    for _ in range(20):
        log_p = tuned(x).log_softmax(1)
        entropy = -(log_p.exp() * log_p).sum(1).mean()
        optimizer.zero_grad()
        entropy.backward()
        optimizer.step()
        entropies.append(entropy.item())
    assert entropies[-1] < entropies[0]


def test_no_tape_of_the_models():
    """Kept for backward: the models themselves, the merged weights and the module's activations, once each."""
    given = [nn.Linear(100, 100, bias=False).to(DEVICE) for _ in range(8)]
    tuned = Soup(nn.Linear(100, 100, bias=False).to(DEVICE), given)
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.setdefault(t.data_ptr(), t.numel()) and t, lambda t: t
    ):
        tuned(randn(2, 100))
    own = {t.weight.data_ptr() for t in given}
    assert sum(n for p, n in kept.items() if p not in own) <= 10_000 + 400 + 8


def test_buffers():
    given = models(2)
    given[1].norm.num_batches_tracked += 5
    tuned = Soup(Net().to(DEVICE, F64), given, granularity="model", init=0.5)
    merged = tuned.merged()
    assert torch.equal(merged["norm.num_batches_tracked"], given[0].norm.num_batches_tracked)
    mean = (given[0].norm.running_mean + given[1].norm.running_mean) / 2
    torch.testing.assert_close(merged["norm.running_mean"], mean)
    assert merged["again.weight"] is merged["last.weight"]
    tuned.train()
    assert tuned.module.training
    y = tuned(
        randn(6, 3, dtype=F64)
    )  # training mode writes to the merged statistics, which are dropped
    y.sum().backward()
    torch.testing.assert_close(tuned.merged()["norm.running_mean"], mean)
    tuned.eval()
    assert not tuned.module.training


def test_moves_pickles_and_copies():
    tuned = Soup(Net().to(DEVICE, F64).eval(), models(2), softmax=True)
    x = randn(4, 3, dtype=F64)
    y = tuned(x)
    for other in (copy.deepcopy(tuned), pickle.loads(pickle.dumps(tuned))):
        assert torch.equal(other(x), y)
    other.load_state_dict(tuned.state_dict())
    assert set(tuned.state_dict()) == {"coefficients"}
    single = copy.deepcopy(tuned).float()
    assert single(x.float()).dtype == torch.float32 and single.coefficients.dtype == torch.float32
    assert "2 models" in repr(tuned)
    states = [m.state_dict() for m in models(2)]
    assert Soup(Net().to(DEVICE, F64), states)(x).shape == (4, 2)


def test_compile():
    tuned = Soup(
        nn.Linear(3, 2).to(DEVICE), [nn.Linear(3, 2).to(DEVICE) for _ in range(3)], softmax=True
    )
    compiled = torch.compile(tuned, fullgraph=True, backend="aot_eager")
    x = randn(4, 3)
    torch.testing.assert_close(compiled(x), tuned(x))
    (ours,) = torch.autograd.grad(compiled(x).square().sum(), tuned.coefficients)
    (plain,) = torch.autograd.grad(tuned(x).square().sum(), tuned.coefficients)
    torch.testing.assert_close(ours, plain)


def test_bad_input():
    net, given = Net(), [Net(), Net()]
    missing = {k: v for k, v in net.state_dict().items() if k != "first.bias"}
    for call, kind, message in (
        (lambda: Soup(3, given), TypeError, "module: expected a torch.nn.Module"),
        (lambda: Soup(net, []), ValueError, "models: expected at least one model"),
        (
            lambda: Soup(net, [torch.ones(2)]),
            TypeError,
            r"models\[0\]: expected a module or a state dict",
        ),
        (
            lambda: Soup(net, [net, missing]),
            ValueError,
            r"models\[1\]: the module's \['first.bias'\]",
        ),
        (lambda: Soup(net, given, base=missing), ValueError, "base: the module's"),
        (lambda: Soup(net, given, granularity="x"), ValueError, "granularity: expected one of"),
        (lambda: Soup(net, given, softmax=True, init=1.0), ValueError, "init: has no meaning"),
        (lambda: Soup(nn.ReLU(), given), ValueError, "module: expected at least one parameter"),
    ):
        with pytest.raises(kind, match=message):
            call()
