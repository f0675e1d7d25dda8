"""Positional normalisation, moment shortcuts and moment exchange against the formulas of the authors' code."""

import copy
import pickle

import pytest
import torch
from function_checks import (
    agrees_with_formula,
    compiles,
    differentiates,
    images,
    works_under_torch_func,
)
from helpers import DEVICE, DTYPES, randn

import solera
from solera.nn import MomentShortcut, PositionalNorm
from solera.norm import moment_exchange, moment_shortcut, positional_norm

KINDS = ("pono", "instance", "layer", "group", "group_pono", "batch")
GROUPS = {"group": 2, "group_pono": 2}


def exchange(x, index, kind, correction=1, positive_only=False, eps=1e-5):
    shape = x.shape
    if kind.startswith("group"):
        x = x.reshape(shape[0], GROUPS[kind], -1, *shape[2:])
    dims = {
        "pono": (1,),
        "instance": tuple(range(2, x.dim())),
        "layer": tuple(range(1, x.dim())),
        "group": tuple(range(2, x.dim())),
        "group_pono": (2,),
        "batch": (0, *range(2, x.dim())),
    }[kind]

    def moments_of(x):
        if positive_only:
            p = x.relu()
            count = (x > 0).sum(dims, keepdim=True).clamp(min=1)
            mean = p.sum(dims, keepdim=True) / count
            var = p.square().sum(dims, keepdim=True) / count - mean.square()
        else:
            mean, var = x.mean(dims, keepdim=True), x.var(dims, correction=correction, keepdim=True)
        return mean, (var + eps).sqrt()

    mean, std = moments_of(x)
    if kind == "batch":
        donor_mean, donor_std = moments_of(x[index])
    else:
        donor_mean, donor_std = mean[index], std[index]
    return ((x - mean) / std * donor_std + donor_mean).reshape(shape)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_moment_exchange(kind, dtype, last):
    index = torch.tensor([2, 0, 2], device=DEVICE)  # one donor twice: its gradients add up
    x = images(3, 6, 4, 5, dtype=dtype, last=last)
    y, _ = agrees_with_formula(
        lambda x: moment_exchange(x, index, kind=kind, groups=GROUPS.get(kind)),
        lambda x: exchange(x, index, kind),
        (x,),
    )
    assert y.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("positive_only", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_moment_exchange_options(kind, positive_only, dtype):
    index = torch.tensor([1, 1, 0], device=DEVICE)
    options = {"correction": 0, "positive_only": positive_only}
    x = images(3, 4, 5, dtype=dtype)
    if positive_only:
        x = (x.detach() - 1.0).requires_grad_()  # some sets without a positive element
    agrees_with_formula(
        lambda x: moment_exchange(x, index, kind=kind, groups=GROUPS.get(kind), **options),
        lambda x: exchange(x, index, kind, **options),
        (x,),
        # The code's variance is E[x^2] - E[x]^2, beside a small eps.
        allowed=1e-2 if positive_only else 0.0,
    )


@pytest.mark.no_interpreter  # the walk over the donors is the CPU kernel's
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize("kind", ["pono", "instance"])
def test_cycles_and_trees_of_donors(kind, last):
    """Two cycles with samples hanging on them; several blocks of sets, the last one narrower."""
    index = torch.tensor([1, 2, 0, 4, 3, 3, 5, 1], device=DEVICE)
    x = images(8, 301, 5, 41, dtype=torch.float32, last=last)
    agrees_with_formula(
        lambda x: moment_exchange(x, index, kind=kind), lambda x: exchange(x, index, kind), (x,)
    )


def test_opcheck_and_compile():
    index = torch.tensor([1, 0], device=DEVICE)
    for shape in ((2, 1, 4, 3), (2, 3, 4, 1)):
        x = images(*shape, grad=False)
        mean, deviation = torch.ops.solera.moment_exchange(x, index, 1e-5, 1.5)[1:]
        for t in (x, x.expand_as(x).transpose(0, 1).contiguous().transpose(0, 1)):
            torch.library.opcheck(torch.ops.solera.moment_exchange.default, (t, index, 1e-5, 1.5))
            torch.library.opcheck(
                torch.ops.solera.moment_exchange_backward.default,
                (x.new_ones(1).expand(shape), t, index, mean, deviation, 1.5),
            )
    compiles(
        lambda x, index: moment_exchange(x, index), lambda size: (images(2, size, 3, 5), index)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_exchange_differentiates(kind):
    index = torch.tensor([1, 1], device=DEVICE)
    differentiates(
        lambda x: moment_exchange(x, index, kind=kind, groups=GROUPS.get(kind)),
        (images(2, 4, 3),),
    )


def test_exchange_with_oneself_changes_nothing():
    x = images(3, 4, 5, grad=False)
    index = torch.arange(3, device=DEVICE)
    for kind in KINDS:
        torch.testing.assert_close(
            moment_exchange(x, index, kind=kind, groups=GROUPS.get(kind)), x, rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_positional_norm(dtype, last):
    x = images(2, 6, 4, 5, dtype=dtype, last=last)
    weight, bias = (randn(4, 5, dtype=dtype, grad=True) for _ in range(2))

    def formula(x, weight, bias):
        mean, std = x.mean(1, keepdim=True), (x.var(1, keepdim=True) + 1e-5).sqrt()
        return (x - mean) / std * weight + bias, mean, std

    out = agrees_with_formula(positional_norm, formula, (x, weight, bias))
    assert all(t.dtype == dtype for t in out)
    assert out[0].stride() == x.stride() and out[1].shape == out[2].shape == (2, 1, 4, 5)


def test_moments_go_out_and_come_back():
    x = images(2, 6, 4, 5)
    xhat, mean, std = positional_norm(x, correction=0)
    torch.testing.assert_close(xhat.mean(1), torch.zeros_like(xhat[:, 0]), rtol=0, atol=1e-6)
    torch.testing.assert_close(moment_shortcut(xhat, mean, std), x)
    agrees_with_formula(
        moment_shortcut,
        lambda x, m, s: x * s + m,
        (x, mean.detach().requires_grad_(), std.detach().requires_grad_()),
    )
    differentiates(lambda x: moment_shortcut(x.relu(), *positional_norm(x)[1:]), (images(2, 3, 2),))


def test_same_bits_for_any_thread_count():
    x, index = images(4, 6, 9, 7), torch.tensor([1, 0, 0, 2], device=DEVICE)
    threads = torch.get_num_threads()
    for kind in KINDS:
        results = []
        try:
            for n in (1, 2, 3):
                torch.set_num_threads(n)
                y = moment_exchange(x, index, kind=kind, groups=GROUPS.get(kind))
                results.append((y, *torch.autograd.grad(y.square().sum(), x)))
        finally:
            torch.set_num_threads(threads)
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def shortcut(x, index):
    xhat, mean, std = positional_norm(x)
    return moment_shortcut(moment_exchange(xhat, index, kind="layer"), mean, std)


def test_compile_aot_eager():
    index = torch.tensor([1, 1], device=DEVICE)
    compiles(shortcut, lambda size: (images(2, size, 3, 5), index))


def test_torch_func_and_backends():
    tensors = images(2, 3, 4), torch.tensor([1, 0], device=DEVICE)
    works_under_torch_func(shortcut, tensors)
    with solera.backend("reference"):
        want = shortcut(*tensors)
    torch.testing.assert_close(shortcut(*tensors), want)


def test_modules():
    x = images(2, 6, 4, 5)
    for options in ({"input_size": (4, 5)}, {"affine": False}):
        module = PositionalNorm(**options).to(DEVICE)
        keys = ["beta", "gamma"] if "input_size" in options else []
        assert list(module.state_dict()) == keys
        assert all(p.shape == (1, 1, 4, 5) for p in module.parameters())
        out = module(x)
        assert all(torch.equal(a, b) for a, b in zip(out, positional_norm(x)))
        for clone in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert all(torch.equal(a, b) for a, b in zip(clone(x), out))
        back = MomentShortcut()(out[0], out[1], out[2])
        torch.testing.assert_close(back, x)
    torch.testing.assert_close(MomentShortcut(beta=out[1])(x), x + out[1])
    torch.testing.assert_close(MomentShortcut(gamma=out[2])(x), x * out[2])
    assert MomentShortcut()(x) is x
    with pytest.raises(ValueError, match="input_size: expected x's spatial shape"):
        PositionalNorm()


X, I = torch.ones(2, 4, 3, device=DEVICE), torch.tensor([1, 0], device=DEVICE)
BAD = [
    (lambda: moment_exchange(X[0], I), ValueError, "x: expected at least 3"),
    (lambda: moment_exchange(X, [1, 0]), TypeError, "index: expected a torch.Tensor"),
    (lambda: moment_exchange(X, I.int()), TypeError, "index: expected int64"),
    (lambda: moment_exchange(X, I[:1]), ValueError, r"index: expected shape \(2,\)"),
    (lambda: moment_exchange(X, I, kind="in"), ValueError, "kind: expected one of"),
    (lambda: moment_exchange(X, I, groups=2), ValueError, "groups: expected None with kind 'pono'"),
    (lambda: moment_exchange(X, I, kind="group"), TypeError, "groups: expected a positive integer"),
    (
        lambda: moment_exchange(X, I, kind="group", groups=3),
        ValueError,
        "groups: expected a divisor",
    ),
    (lambda: moment_exchange(X[:, :1], I), ValueError, "x: each position: expected more than 1"),
    (lambda: moment_exchange(X[..., :1], I, kind="instance"), ValueError, "x: each channel: expec"),
    (lambda: moment_exchange(X, I, eps=-1), ValueError, "eps: expected a finite number"),
    (lambda: positional_norm(X, X), ValueError, r"weight: expected shape \(3,\)"),
    (lambda: positional_norm(X, correction=2), ValueError, "correction: expected 0 or 1"),
    (lambda: moment_shortcut(X, X[:, 0], X[:, :1]), ValueError, r"mean: expected shape \(3,\)"),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input_is_named(case):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.skipif(DEVICE != "cpu", reason="values are read from CPU tensors only")
def test_index_out_of_range_is_named():
    with pytest.raises(ValueError, match=r"index: expected values in \[0, 1\]"):
        moment_exchange(X, torch.tensor([0, 2]))
