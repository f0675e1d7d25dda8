"""Batch, group and instance norm as torch has them: running statistics, modules, ranks, bad input, papers."""

import copy
import pickle
import socket

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, assert_accurate, randn

import solera
from solera.norm import batch_norm, fold_batch_norm, group_norm, instance_norm


def images(shape, dtype, last=False):
    x = randn(*shape, dtype=dtype)
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x


# ---- running statistics ------------------------------------------------------------------------------


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("name", ["batch", "instance"])
def test_running_statistics_are_torchs(name, last, dtype):
    x = images((4, 6, 7, 5), dtype, last)
    stats = torch.float64 if dtype == torch.float64 else torch.float32
    ours = [torch.zeros(6, dtype=stats, device=DEVICE), torch.ones(6, dtype=stats, device=DEVICE)]
    theirs = [t.clone() for t in ours]
    for _ in range(3):
        if name == "batch":
            batch_norm(x, *ours, training=True, momentum=0.3)
            F.batch_norm(x, *theirs, training=True, momentum=0.3)
        else:
            instance_norm(x, *ours, momentum=0.3)
            # Of a bfloat16 x torch keeps the statistics in bfloat16 on the way.
            F.instance_norm(x if x.dtype == stats else x.float(), *theirs, momentum=0.3)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=2e-6 if dtype != torch.float64 else 1e-12, atol=1e-7)
    y = batch_norm(x, *ours) if name == "batch" else instance_norm(x, *ours, use_input_stats=False)
    exact = F.batch_norm(x.double(), *(t.double() for t in ours))
    assert_accurate(y, exact, F.batch_norm(x, *ours))


def test_batch_norm_is_the_papers_formula():
    """Ioffe, Szegedy 2015, Algorithm 1, its gradients as printed there, and the inference form."""
    x = randn(9, 5, dtype=torch.float64, grad=True)
    w, b = (randn(5, dtype=torch.float64, grad=True) for _ in range(2))
    y = batch_norm(x, None, None, w, b, True, eps=1e-3)
    m = x.shape[0]
    mu = x.mean(0)
    var = (x - mu).square().mean(0)
    normal = (x - mu) / (var + 1e-3).sqrt()
    torch.testing.assert_close(y, w * normal + b)
    dy = randn(9, 5, dtype=torch.float64)
    dx, dw, db = torch.autograd.grad(y, (x, w, b), dy)
    of_normal = dy * w
    of_var = (of_normal * (x - mu) * -0.5 * (var + 1e-3) ** -1.5).sum(0)
    of_mean = -of_normal.sum(0) / (var + 1e-3).sqrt() + of_var * (-2 * (x - mu)).mean(0)
    expected = of_normal / (var + 1e-3).sqrt() + of_var * 2 * (x - mu) / m + of_mean / m
    torch.testing.assert_close(dx, expected)
    torch.testing.assert_close(dw, (dy * normal).sum(0))
    torch.testing.assert_close(db, dy.sum(0))


def test_fold_batch_norm():
    x = randn(2, 3, 8, 8, dtype=torch.float64)
    conv = torch.nn.Conv2d(3, 5, 3, dtype=torch.float64, device=DEVICE)
    mean, gamma, beta = (randn(5, dtype=torch.float64) for _ in range(3))
    var = randn(5, dtype=torch.float64).square() + 0.1
    for bias in (conv.bias, None):
        for g, b in ((gamma, beta), (None, None)):
            weight, shift = fold_batch_norm(conv.weight, bias, mean, var, g, b, 1e-3)
            expected = F.batch_norm(F.conv2d(x, conv.weight, bias), mean, var, g, b, eps=1e-3)
            torch.testing.assert_close(F.conv2d(x, weight, shift), expected)
    with pytest.raises(ValueError, match=r"running_mean: expected shape \(5,\)"):
        fold_batch_norm(conv.weight, None, mean[:2], var)


def test_memorizing_neurons_are_scaled_down():
    """ "To grok or not to grok": batch norm over (B, D) divides a neuron of rare large activity by its deviation."""
    h = randn(64, 10, dtype=torch.float64)
    h[:, 3] = 0.0
    h[5, 3] = 40.0
    y = batch_norm(h, training=True)
    expected = (h - h.mean(0)) / (h.var(0, correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(y, expected)
    assert y[:, 3].norm() < h[:, 3].norm() / 4


# ---- modules -----------------------------------------------------------------------------------------


MODULES = [
    ("GroupNorm", (2, 6), (3, 6, 5), {}),
    ("GroupNorm", (3, 6), (3, 6, 5, 4), {"affine": False}),
    ("InstanceNorm1d", (6,), (3, 6, 5), {}),
    ("InstanceNorm1d", (6,), (6, 5), {"affine": True}),
    ("InstanceNorm2d", (6,), (3, 6, 5, 4), {"track_running_stats": True}),
    ("InstanceNorm3d", (6,), (6, 2, 3, 4), {"affine": True, "track_running_stats": True}),
    ("BatchNorm1d", (6,), (5, 6), {}),
    ("BatchNorm1d", (6,), (5, 6, 3), {"momentum": None}),
    ("BatchNorm2d", (6,), (3, 6, 5, 4), {"affine": False}),
    ("BatchNorm3d", (6,), (2, 6, 2, 3, 4), {"track_running_stats": False, "eps": 1e-3}),
]


@pytest.mark.parametrize("name, arguments, shape, options", MODULES)
def test_modules_are_drop_ins(name, arguments, shape, options):
    theirs = getattr(torch.nn, name)(*arguments, device=DEVICE, **options)
    ours = getattr(solera.nn, name)(*arguments, device=DEVICE, **options)
    assert isinstance(ours, getattr(torch.nn, name))
    for p in theirs.parameters():
        torch.nn.init.normal_(p)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict(), strict=True)
    for training in (True, True, False):
        ours.train(training)
        theirs.train(training)
        x = randn(*shape)
        torch.testing.assert_close(ours(x), theirs(x))
        for key, value in theirs.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[key], value)
    for clone in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(clone(x), ours(x))
    with pytest.raises(ValueError):
        ours(randn(*(2,) * 7))


def test_activation_and_residual_of_modules():
    x, r = randn(3, 4, 5, 6), randn(3, 4, 5, 6)
    norm = solera.nn.BatchNorm2d(4, activation="relu", device=DEVICE)
    y = norm(x, residual=r)
    torch.testing.assert_close(y, F.relu(F.batch_norm(x, None, None, training=True) + r))
    assert "activation='relu'" in repr(norm)
    norm = solera.nn.GroupNorm(2, 4, activation="silu", device=DEVICE)
    torch.testing.assert_close(norm(x), F.silu(F.group_norm(x, 2)))
    assert pickle.loads(pickle.dumps(norm)).activation == "silu"


# ---- bad input ---------------------------------------------------------------------------------------

X = randn(3, 4, 5)
V = torch.ones(4)
BAD = [
    (lambda: group_norm([1.0], 1), TypeError, "x: expected a torch.Tensor, got list"),
    (
        lambda: group_norm(torch.ones(2, 4, 3, dtype=torch.int64), 2),
        TypeError,
        "x: expected float32",
    ),
    (lambda: group_norm(randn(4), 2), ValueError, r"x: expected at least 2 dimension.*\(4,\)"),
    (lambda: group_norm(X, 3), ValueError, "num_groups: expected a positive divisor of the 4"),
    (lambda: group_norm(X, 0), ValueError, "num_groups: expected a positive divisor"),
    (lambda: group_norm(X, 2.0), TypeError, "num_groups: expected an integer, got float"),
    (lambda: group_norm(X, 2, randn(3)), ValueError, r"weight: expected shape \(4,\).*\(3,\)"),
    (lambda: group_norm(X, 2, V.double()), TypeError, "weight: float64 with x of torch.float32"),
    (lambda: group_norm(X, 2, bias=V.int()), TypeError, "bias: expected float32.*int32"),
    (lambda: group_norm(X, 2, V.to("meta")), ValueError, "weight: expected device"),
    (lambda: group_norm(X, 2, eps=-1.0), ValueError, "eps: expected a finite number"),
    (lambda: group_norm(X, 2, activation="tanh"), ValueError, "activation: expected one of"),
    (lambda: group_norm(X, 2, activation=3), TypeError, "activation: expected one of"),
    (lambda: group_norm(randn(1, 4), 4), ValueError, "x: Expected more than 1 value per channel"),
    (lambda: instance_norm(randn(2, 4, 1)), ValueError, "x: Expected more than 1 spatial element"),
    (
        lambda: instance_norm(X, use_input_stats=False),
        ValueError,
        "running_mean: expected a tensor",
    ),
    (lambda: instance_norm(X, V), ValueError, "running_var: expected both running statistics"),
    (lambda: batch_norm(X), ValueError, "running_mean: expected a tensor of shape"),
    (lambda: batch_norm(X, V, V[:3]), ValueError, r"running_var: expected shape \(4,\)"),
    (lambda: batch_norm(X, training=True, eps=0.0), ValueError, "eps: expected a positive number"),
    (lambda: batch_norm(X, training=True, momentum="a"), TypeError, "momentum: expected a number"),
    (lambda: batch_norm(X, V, V, residual=randn(3, 4)), ValueError, "residual: expected shape"),
    (lambda: batch_norm(X, V, V, residual=X.half()), TypeError, "residual: expected torch.float32"),
    (lambda: batch_norm(randn(1, 4), training=True), ValueError, "x: Expected more than 1 value"),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input_is_named(case):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()


# ---- across ranks ------------------------------------------------------------------------------------


def _rank(rank, port, layouts, results):
    """One process: batch norm of its part of each batch, its gradients and running statistics."""
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    part = slice(0, 2) if rank == 0 else slice(2, 5)
    for layout, (x, w, b, r, g) in enumerate(layouts):
        x, r = x[part].requires_grad_(), r[part].requires_grad_()
        w, b = w.requires_grad_(), b.requires_grad_()
        running = torch.zeros(4, dtype=x.dtype), torch.ones(4, dtype=x.dtype)
        group = torch.distributed.group.WORLD
        y = batch_norm(x, *running, w, b, True, 0.2, activation="silu", residual=r, group=group)
        grads = torch.autograd.grad(y, (x, r, w, b), g[part])
        results[layout, rank] = [t.detach() for t in (y, *grads, *running)]
    torch.distributed.destroy_process_group()


@pytest.mark.no_interpreter
def test_two_ranks_are_one_batch():
    """Ranks with two and three samples against one process that holds all five, contiguous and channels-last."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    layouts = []
    for last in (False, True):
        x, r, g = (images((5, 4, 3, 6), torch.float64, last) for _ in range(3))
        layouts.append((x, randn(4, dtype=torch.float64), randn(4, dtype=torch.float64), r, g))
    context = torch.multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        results = manager.dict()
        workers = [
            context.Process(target=_rank, args=(rank, port, layouts, results)) for rank in range(2)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(240)  # each imports torch, on a machine that may be busy
        assert [worker.exitcode for worker in workers] == [0, 0]
        results = dict(results)
    for layout, tensors in enumerate(layouts):
        _same_as_one_batch(results[layout, 0], results[layout, 1], *tensors)


def _same_as_one_batch(first, second, x, w, b, r, g):
    for t in (x, w, b, r):
        t.requires_grad_()
    running = torch.zeros(4, dtype=x.dtype), torch.ones(4, dtype=x.dtype)
    y = batch_norm(x, *running, w, b, True, 0.2, activation="silu", residual=r)
    grads = torch.autograd.grad(y, (x, r, w, b), g)
    whole = [y, *grads, *running]
    for i, name in enumerate(("y", "dx", "dresidual")):
        torch.testing.assert_close(torch.cat([first[i], second[i]]), whole[i], msg=name)
    for i in (
        3,
        4,
    ):  # gradients of the parameters are this rank's own, as with DistributedDataParallel
        torch.testing.assert_close(first[i] + second[i], whole[i])
    for i in (5, 6):
        assert torch.equal(first[i], second[i])
        torch.testing.assert_close(first[i], whole[i])
