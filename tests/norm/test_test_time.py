"""Batch statistics under a shift: mixed, recalibrated, by domain; the gated entropy; ConvLoRA's weight."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, DTYPES, INTERPRETED, ULP, assert_accurate, double, randn, relative_error
from torch import nn

import solera
from solera.norm import (
    BatchStatistics,
    alpha_batch_norm,
    batch_norm_recalibrate,
    bn_adapt,
    domain_batch_norm,
    gated_entropy_loss,
)
from solera.weights import conv_lora_weight

EPS = 1e-5


def batch_dims(x):
    return (0, *range(2, x.dim()))


def wide(t, x):
    return t.view(-1, x.shape[1], *[1] * (x.dim() - 2))


def alpha_formula(x, mean, var, weight, bias, *, source_weight, eps=EPS, correction=0):
    """As written in the paper: moments mixed, then one normalisation."""
    batch_mean = x.mean(batch_dims(x))
    batch_var = x.var(batch_dims(x), correction=correction)
    m = source_weight * mean + (1 - source_weight) * batch_mean
    v = source_weight * var + (1 - source_weight) * batch_var
    return (x - wide(m, x)) / (wide(v, x) + eps).sqrt() * wide(weight, x) + wide(bias, x)


def make(shape, dtype=torch.float32, grad=True):
    c = shape[1]
    source = (randn(c, dtype=dtype), randn(c, dtype=dtype).square() + 0.5)
    return randn(*shape, dtype=dtype, grad=grad), *source, *(
        randn(c, dtype=dtype, grad=grad) for _ in range(2)
    )  # fmt: skip


def with_gradients(function, tensors, g, **options):
    y = function(*tensors, **options)
    wanted = [t for t in tensors if t.requires_grad]
    return (y, *torch.autograd.grad(y, wanted, g))


# ---- alpha ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source_weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(6, 5), (3, 4, 7), (2, 4, 5, 6), (2, 3, 2, 3, 4)], ids=str)
def test_alpha_against_the_formula(shape, dtype, source_weight):
    tensors = make(shape, dtype)
    g = randn(*shape, dtype=dtype)
    options = {"source_weight": source_weight}
    ours = with_gradients(alpha_batch_norm, tensors, g, **options)
    truth = with_gradients(alpha_formula, double(*tensors), g.double(), **options)
    today = with_gradients(alpha_formula, tensors, g, **options)
    for i, (a, b, c) in enumerate(zip(ours, truth, today)):
        # Terms of a gradient cancel: a few roundings of the largest may be left.
        if i == 0 or dtype.itemsize == 2 or relative_error(a, b) > 8 * ULP[dtype]:
            assert_accurate(a, b, c)


def test_alpha_ends_and_correction():
    x, mean, var, weight, bias = make((4, 3, 5, 5), grad=False)
    args = (x, mean, var, weight, bias)
    stored = F.batch_norm(x, mean, var, weight, bias)
    torch.testing.assert_close(alpha_batch_norm(*args, source_weight=1), stored)
    batch = F.batch_norm(x, None, None, weight, bias, training=True)
    torch.testing.assert_close(alpha_batch_norm(*args, source_weight=0), batch)
    for source_weight in (0.0, 0.6):
        options = {"source_weight": source_weight, "correction": 1}
        want = alpha_formula(*double(*args), **options)
        assert relative_error(alpha_batch_norm(*args, **options), want) < 1e-6
    last = x.contiguous(memory_format=torch.channels_last)
    y = alpha_batch_norm(last, *args[1:], source_weight=0.6)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, alpha_batch_norm(*args, source_weight=0.6))


def test_alpha_gradients_scale_with_the_batchs_share():
    tensors = make((3, 2, 4), torch.float64)
    f = lambda *t: alpha_batch_norm(*t, source_weight=0.7)
    assert torch.autograd.gradcheck(f, tensors)
    assert torch.autograd.gradgradcheck(f, tensors)
    # At 1 the statistics are constants: dx is dy times a constant.
    x, mean, var, weight, bias = tensors
    (dx,) = torch.autograd.grad(alpha_batch_norm(*tensors, source_weight=1).sum(), x)
    torch.testing.assert_close(dx, wide(weight / (var + EPS).sqrt(), x).expand_as(x))


@pytest.mark.parametrize("mode", ["source", "batch", "mix", "ema"])
def test_bn_adapt_modes(mode):
    x, mean, var, weight, bias = make((5, 3, 4), torch.float64)
    new_mean, new_var = x.mean((0, 2)).detach(), x.var((0, 2), correction=0).detach()
    share = {"source": 1.0, "batch": 0.0}.get(mode, 0.8)
    want = alpha_formula(x, mean, var, weight, bias, source_weight=share)
    g = randn(5, 3, 4, dtype=torch.float64)
    want_grads = torch.autograd.grad(want, (x, weight, bias), g)
    running = mean.clone(), var.clone()
    y = bn_adapt(x, *running, weight, bias, mode=mode, momentum=0.2)
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(torch.autograd.grad(y, (x, weight, bias), g), want_grads)
    kept = 0.8 if mode == "ema" else 1.0
    torch.testing.assert_close(running[0], kept * mean + (1 - kept) * new_mean)
    torch.testing.assert_close(running[1], kept * var + (1 - kept) * new_var)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_alpha_module_loads_a_batch_norm(dims):
    theirs = getattr(nn, f"BatchNorm{dims}d")(4).to(DEVICE)
    ours = getattr(solera.nn, f"AlphaBatchNorm{dims}d")(4, source_weight=0.4).to(DEVICE)
    x = randn(3, 4, *[3] * dims) * 2 + 1
    torch.testing.assert_close(ours(x), theirs(x))  # training: as BatchNorm
    nn.init.normal_(theirs.weight)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    ours.eval()
    args = (x, ours.running_mean, ours.running_var, ours.weight, ours.bias)
    torch.testing.assert_close(ours(x), alpha_formula(*args, source_weight=0.4))
    for clone in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(clone(x), ours(x))
    assert "source_weight=0.4" in repr(ours)


# ---- AdaBN ----------------------------------------------------------------------------------------------


def test_statistics_of_batches_are_those_of_all_the_data():
    x = randn(37, 4, 5) * 3 + 100
    parts = x.split([1, 0, 9, 20, 7])
    whole = BatchStatistics()
    for part in parts:
        whole.update(part)
    left, right = BatchStatistics(), BatchStatistics()
    for i, part in enumerate(parts):
        (left, right)[i % 2].update(part)
    for statistics in (whole, left.merge(right)):
        assert statistics.count == 37 * 5
        torch.testing.assert_close(statistics.mean, x.double().mean((0, 2)), rtol=1e-6, atol=0)
        for correction in (0, 1):
            want = x.double().var((0, 2), correction=correction)
            torch.testing.assert_close(statistics.var(correction), want, rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match="x: expected 4 channels"):
        whole.update(randn(2, 3, 5))
    with pytest.raises(ValueError, match="expected more than 0 value"):
        BatchStatistics().var()


def test_recalibrate_running_statistics():
    batches = [randn(5, 3, 4) + 2, randn(2, 3, 4)]
    every = torch.cat(batches).double()
    for momentum in (1.0, 0.25):
        mean, var = torch.zeros(3, device=DEVICE), torch.ones(3, device=DEVICE)
        seen = []
        batch_norm_recalibrate(
            (mean, var), batches, momentum=momentum, progress=lambda *n: seen.append(n)
        )
        assert seen == [(1, 5), (2, 7)]
        assert relative_error(mean, momentum * every.mean((0, 2))) < 1e-6
        assert relative_error(var, 1 - momentum + momentum * every.var((0, 2))) < 1e-6


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, solera.nn.BatchNorm2d])
def test_recalibrate_model(kind):
    model = nn.Sequential(
        nn.Conv2d(2, 3, 1), kind(3), nn.ReLU(), nn.Dropout(), kind(3, affine=False)
    )
    model = model.to(DEVICE).train()
    model[1].eval()
    state = copy.deepcopy(model.state_dict())
    x = randn(8, 2, 4, 4) + 1
    found = batch_norm_recalibrate(model, [(x[:3],), x[3:]])
    assert sorted(found) == ["1", "4"]
    assert model.training and not model[1].training and model[4].track_running_stats
    first = model[0](x).detach()
    assert relative_error(model[1].running_mean, first.double().mean((0, 2, 3))) < 1e-5
    assert relative_error(model[1].running_var, first.double().var((0, 2, 3))) < 1e-5
    # Deeper norms see each batch normalised by its own statistics, and no dropout.
    norm = lambda t: F.batch_norm(t, None, None, model[1].weight, model[1].bias, training=True)
    second = torch.cat([norm(first[:3]), norm(first[3:])]).relu().double()
    assert relative_error(model[4].running_mean, second.mean((0, 2, 3))) < 1e-5
    for name, value in model.state_dict().items():
        if "running" not in name:
            assert torch.equal(value, state[name]), name
    assert not any(m._forward_pre_hooks for m in model.modules())
    for bad in (model, nn.Linear(2, 2)):
        with pytest.raises(ValueError, match=r"target: expected a model|batches: expected more"):
            batch_norm_recalibrate(bad, [])


def _rank(rank, size, file, out):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{file}", rank=rank, world_size=size
    )
    torch.manual_seed(3)
    x = torch.randn(11, 3, 4) * 2 + 1
    mine = [x[:4], x[4:6]] if rank == 0 else [x[6:]]
    model = nn.Sequential(nn.BatchNorm1d(3))
    batch_norm_recalibrate(model, mine, group=torch.distributed.group.WORLD)
    # A rank without data ends with the same statistics.
    mean, var = torch.zeros(3), torch.ones(3)
    one = [x] if rank == 0 else []
    batch_norm_recalibrate((mean, var), one, group=torch.distributed.group.WORLD)
    torch.save((x, model.state_dict(), mean, var), f"{out}.{rank}")
    torch.distributed.destroy_process_group()


@pytest.mark.no_interpreter
@pytest.mark.skipif(DEVICE != "cpu", reason="two gloo processes on the CPU")
def test_recalibrate_across_two_processes(tmp_path):
    torch.multiprocessing.spawn(_rank, (2, tmp_path / "store", tmp_path / "out"), nprocs=2)
    ranks = [torch.load(tmp_path / f"out.{rank}") for rank in range(2)]
    x = ranks[0][0].double()
    for _, state, mean, var in ranks:
        for m, v in ((state["0.running_mean"], state["0.running_var"]), (mean, var)):
            assert relative_error(m, x.mean((0, 2))) < 1e-6
            assert relative_error(v, x.var((0, 2))) < 1e-6
    for name in ranks[0][1]:
        assert torch.equal(ranks[0][1][name], ranks[1][1][name])


# ---- domains ----------------------------------------------------------------------------------------------


def domain_formula(x, domain, weight, bias, means=None, variances=None):
    """One batch norm per domain, one after the other."""
    y = torch.zeros_like(x)
    for d in domain.unique().tolist():
        rows = domain == d
        stored = (None, None) if means is None else (means[d], variances[d])
        part = F.batch_norm(x[rows], *stored, weight[d], bias[d], training=means is None)
        y = y.index_put((rows,), part)
    return y


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(7, 3), (7, 3, 4), (7, 3, 2, 5)], ids=str)
def test_domains_against_one_batch_norm_each(shape, training):
    domain = torch.tensor([2, 0, 0, 2, 2, 0, 0], device=DEVICE)
    for dtype in (torch.float64, torch.float32):
        x = randn(*shape, dtype=dtype, grad=True)
        weight, bias = (randn(4, 3, dtype=dtype, grad=True) for _ in range(2))
        mean, var = randn(4, 3, dtype=dtype), randn(4, 3, dtype=dtype).square() + 0.5
        stored = () if training else (mean.double(), var.double())
        exact = double(x, weight, bias)
        want = domain_formula(exact[0], domain, *exact[1:], *stored)
        before = mean.clone(), var.clone()
        y = domain_batch_norm(x, domain, weight, bias, mean, var, training=training, momentum=0.2)
        g = randn(*shape, dtype=dtype)
        wanted = torch.autograd.grad(want, exact, g.double())
        for a, b in zip((y, *torch.autograd.grad(y, (x, weight, bias), g)), (want, *wanted)):
            assert relative_error(a, b) < (1e-12 if dtype == torch.float64 else 2e-6)
        for d in range(4):
            if training and d in (0, 2):
                part = x[domain == d].detach().double()
                dims = batch_dims(part)
                assert relative_error(mean[d], 0.8 * before[0][d] + 0.2 * part.mean(dims)) < 1e-6
                assert relative_error(var[d], 0.8 * before[1][d] + 0.2 * part.var(dims)) < 1e-6
            else:
                assert torch.equal(mean[d], before[0][d]) and torch.equal(var[d], before[1][d])


def test_domains_gradcheck_and_nan_stays_in_its_domain():
    domain = torch.tensor([0, 1, 1, 0], device=DEVICE)
    x, weight, bias = (
        randn(*s, dtype=torch.float64, grad=True) for s in ((4, 2, 3), (2, 2), (2, 2))
    )
    f = lambda x, w, b: domain_batch_norm(x, domain, w, b, training=True)
    assert torch.autograd.gradcheck(f, (x, weight, bias))
    assert torch.autograd.gradgradcheck(f, (x, weight, bias))
    x = x.detach().clone()
    x[1, 0, 0] = float("nan")
    y = f(x, weight, bias)
    assert (
        y[1:3, 0].isnan().all()
        and torch.isfinite(y[[0, 3]]).all()
        and torch.isfinite(y[:, 1]).all()
    )
    plain = domain_batch_norm(x[[0, 3]], domain[[0, 3]], None, None, domains=2, training=True)
    torch.testing.assert_close(plain, F.batch_norm(x[[0, 3]], None, None, training=True))


def test_prototypes_align_through_the_same_map():
    """DAFOSNET: gamma_d p_d + beta_d, with gamma and beta averaged to numbers as in its public code."""
    weight, bias, p = randn(2, 5), randn(2, 5), randn(2, 3, 5)
    aligned = weight.mean(1)[:, None, None] * p + bias.mean(1)[:, None, None]
    want = torch.stack([float(w.mean()) * q + float(b.mean()) for w, b, q in zip(weight, bias, p)])
    torch.testing.assert_close(aligned, want)


# ---- gated entropy ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 5), (3, 4, 2, 3)], ids=str)
def test_gated_entropy_against_the_formula(shape):
    adapted = randn(*shape, dtype=torch.float64, grad=True)
    reference = randn(*shape, dtype=torch.float64)
    loss, mask = gated_entropy_loss(adapted, reference)
    rows = adapted.movedim(1, -1).reshape(-1, shape[1])
    frozen = reference.movedim(1, -1).reshape(-1, shape[1])
    terms, kept = [], []
    for z, o in zip(rows, frozen):
        p, q = z.softmax(0), o.softmax(0)
        kept.append(bool(p[q.argmax()] >= q.max()))
        terms.append(-(p * p.log()).sum())
    assert any(kept) and not all(kept)
    want = sum(t for t, k in zip(terms, kept) if k) / sum(kept)
    torch.testing.assert_close(loss, want)
    assert mask.flatten().tolist() == kept and mask.shape == (shape[0], *shape[2:])
    (dz,) = torch.autograd.grad(loss, adapted)
    torch.testing.assert_close(dz, torch.autograd.grad(want, adapted)[0])
    p = adapted.detach().softmax(1)
    entropy = -(p * p.log()).sum(1, keepdim=True)
    closed = -p * (p.log() + entropy) * mask.unsqueeze(1) / mask.sum()
    torch.testing.assert_close(dz, closed)


def test_gated_entropy_of_nobody_is_zero():
    reference = torch.tensor([[9.0, 0.0], [9.0, 0.0]], device=DEVICE)
    adapted = torch.zeros(2, 2, device=DEVICE, requires_grad=True)
    loss, mask = gated_entropy_loss(adapted, reference)
    assert loss == 0 and not mask.any()
    assert not torch.autograd.grad(loss, adapted)[0].any()
    assert gated_entropy_loss(reference.bfloat16(), reference.bfloat16())[0].dtype == torch.bfloat16


# ---- ConvLoRA -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 2])
def test_conv_lora_weight(groups):
    out, inner, k, rank = 4, 6, 3, 2
    weight = randn(out, inner // groups, k, k, dtype=torch.float64, grad=True)
    a = randn(rank * k, inner * k, dtype=torch.float64, grad=True)
    b = randn(out // groups * k, rank * k, dtype=torch.float64, grad=True)
    merged = conv_lora_weight(weight, a, b, scale=0.5)
    torch.testing.assert_close(merged, weight + (b @ a).view(weight.shape) * 0.5)
    assert torch.autograd.gradcheck(lambda *t: conv_lora_weight(*t, scale=0.5), (weight, a, b))
    x = randn(2, inner, 5, 5, dtype=torch.float64)
    low = F.conv2d(x, (b @ a).view(weight.shape), groups=groups)
    want = F.conv2d(x, weight, groups=groups) + 0.5 * low
    torch.testing.assert_close(F.conv2d(x, merged, groups=groups), want)
    assert conv_lora_weight(weight.half(), a.half(), b.half(), scale=1).dtype == torch.float16
    with pytest.raises(ValueError, match="b: expected shape"):
        conv_lora_weight(weight, a, b[:-1], scale=1.0)
    with pytest.raises(ValueError, match="a: expected a second dimension"):
        conv_lora_weight(weight, a[:, :7], b[:1].expand(weight.numel() // 7, -1), scale=1.0)


# ---- the contract with torch ----------------------------------------------------------------------------------


def test_compile():
    domain = torch.tensor([0, 1, 1, 0], device=DEVICE)

    def f(x, mean, var, weight, bias):
        y = alpha_batch_norm(x, mean, var, weight, bias, source_weight=0.4)
        pair = (torch.stack([weight, bias]), torch.stack([bias, weight]))
        y = y + domain_batch_norm(x, domain, *pair, training=True)
        return y * gated_entropy_loss(y.detach(), x.detach())[0]

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in (3, 5):
        tensors = make((4, 3, size))
        wanted = [t for t in tensors if t.requires_grad]
        want, got = f(*tensors), compiled(*tensors)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(
            torch.autograd.grad(got.sum(), wanted), torch.autograd.grad(want.sum(), wanted)
        )


def test_empty():
    for shape in ((0, 3, 2), (2, 3, 0)):
        x, mean, var, weight, bias = make(shape)
        y = alpha_batch_norm(x, mean, var, weight, bias, source_weight=0.5)
        dx, dw = torch.autograd.grad(y.sum(), (x, weight))
        assert y.shape == dx.shape == torch.Size(shape) and not dw.any()
        domain = torch.zeros(shape[0], dtype=torch.int64, device=DEVICE)
        assert domain_batch_norm(x, domain, None, None, domains=1, training=True).shape == y.shape


X, C3 = randn(2, 3, 4), randn(3)
D2 = torch.tensor([0, 1], device=DEVICE)
W2 = randn(2, 3)
alpha = lambda *a, source_weight=0.5, **k: alpha_batch_norm(*a, source_weight=source_weight, **k)
BAD = [
    (lambda: alpha(X[0, 0], C3, C3), ValueError, "x: expected at least 2"),
    (lambda: alpha(X, C3[:2], C3), ValueError, r"source_mean: expected shape \(3,\)"),
    (lambda: alpha(X, C3, None), TypeError, "source_var: expected a torch.Tensor"),
    (lambda: alpha(X, C3, C3, W2), ValueError, r"weight: expected shape \(3,\)"),
    (lambda: alpha(X, C3, C3, source_weight=1.5), ValueError, "source_weight: expected a finite"),
    (lambda: alpha(X, C3, C3, correction=2), ValueError, "correction: expected 0 or 1"),
    (
        lambda: alpha(X[:1, :, :1], C3, C3, correction=1),
        ValueError,
        "x: each channel: expected more",
    ),
    (lambda: bn_adapt(X, C3, C3, mode="best"), ValueError, "mode: expected one of"),
    (lambda: bn_adapt(X, C3, C3, momentum=-1), ValueError, "momentum: expected a finite"),
    (lambda: bn_adapt(X, C3[:2], C3), ValueError, "running_mean: expected shape"),
    (lambda: bn_adapt(X, C3, [1.0], mode="ema"), TypeError, "running_var: expected a torch"),
    (lambda: domain_batch_norm(X, D2, W2, None), ValueError, "running_mean: expected"),
    (lambda: domain_batch_norm(X, D2, None, None), ValueError, "domains: expected a positive"),
    (lambda: domain_batch_norm(X, D2[:1], W2, None, W2, W2), ValueError, "domain: expected shape"),
    (
        lambda: domain_batch_norm(X, D2.float(), W2, None, W2, W2),
        TypeError,
        "domain: expected int64",
    ),
    (
        lambda: domain_batch_norm(X, D2 + 1, W2, None, W2, W2),
        ValueError,
        r"domain: expected values",
    ),
    (lambda: domain_batch_norm(X, D2, W2, W2[:1], W2, W2), ValueError, r"bias: expected shape"),
    (lambda: gated_entropy_loss(X, X[:1]), ValueError, "reference: expected shape"),
    (lambda: gated_entropy_loss(X, X, rule="other"), ValueError, "rule: expected one of"),
    (lambda: batch_norm_recalibrate(3, []), TypeError, "target: expected a model"),
    (lambda: batch_norm_recalibrate((C3, C3), []), ValueError, "batches: expected more than one"),
    (lambda: batch_norm_recalibrate((C3, C3[:2]), []), ValueError, "running_var: expected shape"),
]


@pytest.mark.skipif(INTERPRETED, reason="argument checks do not depend on the backend")
@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input_is_named(case):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()
