"""AdaLIN and ILN against the formula of U-GAT-IT's PyTorch code, and their modules."""

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
from solera.nn import ILN, AdaLIN
from solera.norm import ada_layer_instance_norm, layer_instance_norm


def adalin(x, rho, gamma, beta, correction=1):
    wide = (slice(None), slice(None)) + (None,) * (x.dim() - 2)
    space = tuple(range(2, x.dim()))

    def normal(dims):
        var = x.var(dims, correction=correction, keepdim=True)
        return (x - x.mean(dims, keepdim=True)) / (var + 1e-5).sqrt()

    r = rho.reshape(1, -1)[wide]
    y = r * normal(space) + (1 - r) * normal((1, *space))
    return y * gamma.reshape(-1, x.shape[1])[wide] + beta.reshape(-1, x.shape[1])[wide]


def make(shape, dtype=torch.float32, last=False):
    n, c = shape[:2]
    rho = torch.rand(c, dtype=torch.float64).to(DEVICE, dtype).requires_grad_()
    return (
        images(*shape, dtype=dtype, last=last),
        rho,
        randn(n, c, dtype=dtype, grad=True),
        randn(n, c, dtype=dtype, grad=True),
    )


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 5, 4, 3), (3, 2, 17), (1, 1, 2, 1)], ids=str)
def test_ada_layer_instance_norm(shape, dtype, last):
    tensors = make(shape, dtype, last)
    # In float32 rho's gradient is a sum that cancels.
    allowed = 2e-6 if dtype == torch.float32 else 0.0
    y, *_ = agrees_with_formula(ada_layer_instance_norm, adalin, tensors, allowed)
    assert y.dtype == dtype and y.stride() == tensors[0].stride()


@pytest.mark.parametrize("correction", [0, 1])
def test_layer_instance_norm(correction):
    x, rho, _, _ = make((2, 6, 5, 3))
    weight, bias = randn(1, 6, 1, 1, grad=True), randn(6, grad=True)
    agrees_with_formula(
        lambda *t: layer_instance_norm(*t, correction=correction),
        lambda *t: adalin(*t, correction=correction),
        (x, rho, weight, bias),
    )
    plain = layer_instance_norm(x, rho, correction=correction)
    ones = torch.ones(6, device=DEVICE)
    torch.testing.assert_close(plain, adalin(x, rho, ones, 0 * ones, correction))


def test_rho_chooses_between_the_two():
    x = images(2, 8, 5, 5, grad=False)
    one = torch.ones(8, device=DEVICE)
    torch.testing.assert_close(
        layer_instance_norm(x, one, correction=0), torch.nn.functional.instance_norm(x)
    )
    torch.testing.assert_close(
        layer_instance_norm(x, 0 * one, correction=0),
        torch.nn.functional.group_norm(x, 1),
    )


def test_large_mean_keeps_the_digits():
    x, *rest = make((2, 4, 16, 16))
    x = (x.detach() + 1e3).requires_grad_()
    agrees_with_formula(ada_layer_instance_norm, adalin, (x, *rest), allowed=1e-3)


def test_differentiates():
    differentiates(ada_layer_instance_norm, make((2, 3, 2, 2)))


def test_same_bits_for_any_thread_count_and_batch():
    x, rho, gamma, beta = make((4, 6, 9, 7))
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            y = ada_layer_instance_norm(x, rho, gamma, beta)
            results.append((y, *torch.autograd.grad(y.square().sum(), (x, rho, gamma, beta))))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))
    few = ada_layer_instance_norm(x[1:3], rho, gamma[1:3], beta[1:3])
    assert torch.equal(few, results[0][0][1:3])


def test_compile_aot_eager():
    compiles(ada_layer_instance_norm, lambda size: make((2, size, 3, 5)))


def test_torch_func_and_backends():
    tensors = make((2, 3, 4))
    works_under_torch_func(ada_layer_instance_norm, tensors)
    with solera.backend("reference"):
        want = ada_layer_instance_norm(*tensors)
    torch.testing.assert_close(ada_layer_instance_norm(*tensors), want)


def test_modules_take_the_repositorys_checkpoints():
    ada, static = AdaLIN(6).to(DEVICE), ILN(6).to(DEVICE)
    assert list(ada.state_dict()) == ["rho"]
    assert list(static.state_dict()) == ["rho", "gamma", "beta"]
    assert ada.rho.shape == static.rho.shape == static.gamma.shape == (1, 6, 1, 1)
    assert float(ada.rho.detach().mean()) == pytest.approx(0.9) and not static.rho.any()
    x, _, gamma, beta = make((2, 6, 4, 4))
    ones = torch.ones(6, device=DEVICE)
    torch.testing.assert_close(ada(x, gamma, beta), adalin(x, 0.9 * ones, gamma, beta))
    torch.testing.assert_close(static(x), adalin(x, 0 * ones, ones, 0 * ones))
    for module, arguments in ((ada, (x, gamma, beta)), (static, (x,))):
        for clone in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert torch.equal(clone(*arguments), module(*arguments))
        with torch.no_grad():
            module.rho.copy_(torch.linspace(-1, 2, 6).reshape(1, 6, 1, 1))
        module.clip_rho_()
        assert module.rho.min() == 0 and module.rho.max() == 1
    assert repr(ada) == "AdaLIN(6, eps=1e-05)"


X, R, G = torch.ones(2, 3, 4, device=DEVICE), torch.ones(3, device=DEVICE), randn(2, 3)
BAD = [
    (lambda: ada_layer_instance_norm(G, R, G, G), ValueError, "x: expected at least 3"),
    (lambda: ada_layer_instance_norm(X, R[:2], G, G), ValueError, r"rho: expected shape \(3,\)"),
    (lambda: ada_layer_instance_norm(X, R, G[:, :2], G), ValueError, "gamma: expected shape"),
    (lambda: ada_layer_instance_norm(X, R, G, G.double()), TypeError, "beta: float64 with x"),
    (lambda: ada_layer_instance_norm(X, R, G, 1.0), TypeError, "beta: expected a torch.Tensor"),
    (lambda: ada_layer_instance_norm(X, R, G, G, eps=-1.0), ValueError, "eps: expected a finite"),
    (lambda: ada_layer_instance_norm(X[..., :1], R, G, G), ValueError, "x: each channel: expected"),
    (lambda: layer_instance_norm(X, R, R[:1]), ValueError, r"weight: expected shape \(3,\)"),
    (lambda: layer_instance_norm(X, R, correction=3), ValueError, "correction: expected 0 or 1"),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input_is_named(case):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()
