"""stack_members: any modules as stacked parameters, perceptrons as what ensemble_mlp runs."""

import copy
import pickle

import pytest
import torch
from helpers import DEVICE, assert_accurate, randn
from torch import nn

from solera.ensemble import ensemble_mlp, stack_members

pytestmark = pytest.mark.no_interpreter  # compositions; the core's own tests run interpreted


def perceptrons(count=3, activation=nn.ReLU, end=None, bias=True):
    torch.manual_seed(0)
    tail = [] if end is None else [end()]
    return [
        nn.Sequential(
            nn.Linear(6, 9, bias),
            activation(),
            nn.Linear(9, 8),
            activation(),
            nn.Linear(8, 4),
            *tail,
        ).to(DEVICE)
        for _ in range(count)
    ]


def each(modules, x):
    return torch.stack([m(x) for m in modules], 1)


@pytest.mark.parametrize(
    "activation", [nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.LeakyReLU, nn.ELU]
)
@pytest.mark.parametrize("end", [None, nn.Sigmoid, nn.ReLU])
def test_against_the_modules_themselves(activation, end):
    modules = perceptrons(activation=activation, end=end)
    members = stack_members(modules)
    assert members.count == 3
    x = randn(10, 6, grad=True)
    y = ensemble_mlp(x, members)
    exact = each([copy.deepcopy(m).double() for m in modules], x.double())
    assert_accurate(y, exact, each(modules, x))
    torch.testing.assert_close(members.vmap(x), y)
    torch.testing.assert_close(ensemble_mlp(x, members, reduce="mean"), each(modules, x).mean(1))
    dy = torch.randn_like(y)
    got = torch.autograd.grad(y, [x, *members.values()], dy)
    parameters = [list(m.parameters()) for m in modules]
    want = torch.autograd.grad(each(modules, x), [x, *(p for ps in parameters for p in ps)], dy)
    torch.testing.assert_close(got[0], want[0], rtol=1e-4, atol=1e-5)
    for i, g in enumerate(got[1:]):
        one = torch.stack([want[1 + k * len(parameters[0]) + i] for k in range(3)])
        torch.testing.assert_close(g, one, rtol=1e-4, atol=1e-5)


def test_nested_sequential_dropout_and_missing_bias():
    def block():
        return nn.Sequential(
            nn.Flatten(),
            nn.Sequential(nn.Linear(6, 5, bias=False), nn.GELU(approximate="tanh")),
            nn.Dropout(0.5),
            nn.Linear(5, 2),
        ).to(DEVICE)

    modules = [block().eval() for _ in range(4)]
    members = stack_members(modules)
    assert members.layers == [("1.0.weight", None), ("3.weight", "3.bias")]
    x = randn(7, 6)
    torch.testing.assert_close(ensemble_mlp(x, members), each(modules, x))
    trained = stack_members([block() for _ in range(2)])
    assert trained.layers == []  # dropout draws
    with pytest.raises(ValueError, match=r"members of another kind run by params\.vmap"):
        ensemble_mlp(x, trained)


def test_any_architecture_runs_by_vmap():
    modules = [
        nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)).eval().to(DEVICE) for _ in range(3)
    ]
    for m in modules:
        nn.init.uniform_(m[1].running_mean)
    members = stack_members(modules)
    x = randn(2, 2, 5, 5)
    torch.testing.assert_close(members.vmap(x), each(modules, x), rtol=1e-4, atol=1e-5)


def test_the_dictionary_of_torch_func_is_taken_too():
    modules = perceptrons()
    parameters, _ = torch.func.stack_module_state(modules)
    x = randn(5, 6)
    y = ensemble_mlp(x, parameters, activation="relu")
    torch.testing.assert_close(y, each(modules, x))


def test_training_and_back_into_modules():
    modules = perceptrons()
    members = stack_members(modules)
    before = copy.deepcopy(modules)
    optimizer = torch.optim.SGD(members.values(), lr=0.1)
    x, target = randn(20, 6), randn(20, 4)
    first = None
    for _ in range(20):
        optimizer.zero_grad()
        loss = (ensemble_mlp(x, members) - target[:, None]).square().mean()
        first = loss.item() if first is None else first
        loss.backward()
        optimizer.step()
    assert loss.item() < first
    torch.testing.assert_close(each(modules, x), each(before, x), rtol=0, atol=0)
    members.copy_to(modules)
    torch.testing.assert_close(each(modules, x), ensemble_mlp(x, members))


def test_requires_grad_follows_and_pickles():
    modules = perceptrons()
    for m in modules:
        m[0].weight.requires_grad_(False)
    members = stack_members(modules)
    assert not members["0.weight"].requires_grad and members["0.bias"].requires_grad
    again = pickle.loads(pickle.dumps(members))
    x = randn(5, 6)
    assert torch.equal(ensemble_mlp(x, again), ensemble_mlp(x, members))
    assert torch.equal(ensemble_mlp(x, copy.deepcopy(members)), ensemble_mlp(x, members))


def test_every_activation_pickles():
    made = lambda: nn.Sequential(nn.Linear(6, 5), nn.GELU("tanh"), nn.Linear(5, 2)).to(DEVICE)
    modules = [made() for _ in range(3)]
    members, x = stack_members(modules), randn(5, 6)
    again = pickle.loads(pickle.dumps(members))
    assert torch.equal(ensemble_mlp(x, again), ensemble_mlp(x, members))
    torch.testing.assert_close(ensemble_mlp(x, again), torch.stack([m(x) for m in modules], 1))


def test_exact_learning_of_permutations_is_the_mean_of_two_layer_networks():
    """F(x) = (1/M) sum_m W2_m relu(W1_m x) on binary inputs, rounded."""
    w1, w2 = randn(7, 16, 5, dtype=torch.float64), randn(7, 5, 16, dtype=torch.float64)
    x = (torch.rand(12, 5, device=DEVICE) < 0.5).double()
    y = ensemble_mlp(x, {"0.weight": w1, "1.weight": w2}, activation="relu", reduce="mean")
    hidden = torch.einsum("mhk,bk->mbh", w1, x).relu()
    want = torch.einsum("mkh,mbh->bk", w2, hidden) / 7
    torch.testing.assert_close(y, want)
    assert torch.equal((y > 0.5).int(), (want > 0.5).int())


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: [], ValueError, "modules: expected at least one module"),
        (lambda: nn.Linear(2, 2), TypeError, "modules: expected a list of modules"),
        (lambda: [nn.Linear(2, 2), 3], TypeError, r"modules\[1\]: expected a torch.nn.Module"),
        (lambda: [nn.ReLU()], ValueError, "modules: expected modules with parameters"),
        (
            lambda: [nn.Linear(2, 2), nn.Linear(2, 3)],
            ValueError,
            r"modules\[1\]: expected parameter",
        ),
        (
            lambda: [nn.Linear(2, 2), nn.Linear(2, 2, bias=False)],
            ValueError,
            r"modules\[1\]: expected the parameters",
        ),
        (
            lambda: [nn.Sequential(nn.Linear(2, 2), a()) for a in (nn.ReLU, nn.GELU)],
            ValueError,
            "modules: expected one architecture",
        ),
        (
            lambda: [nn.Linear(2, 2), nn.Linear(2, 2).double()],
            ValueError,
            r"modules\[1\]: expected parameter",
        ),
    ],
)
def test_bad_modules(make, error, message):
    with pytest.raises(error, match=message):
        stack_members(make())


def test_bad_copies():
    members = stack_members(perceptrons())
    with pytest.raises(ValueError, match="modules: expected 3, got 2"):
        members.copy_to(perceptrons(2))
