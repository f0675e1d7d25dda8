"""Core scaling: assignments and matched priors against their formulas in float64, gradients, extremes, ranks."""

import math
import socket

import pytest
import torch
from helpers import DEVICE, DTYPES, INTERPRETED, randn, relative_error

import solera
from solera.sinkhorn import balanced_assignment, null_offsets, prior_match

ops = torch.ops.solera
INF = math.inf
# Few columns (lanes are rows), whole vectors, tails, one row, more than one block of rows.
SHAPES = [(1, 1), (50, 3), (33, 130)]
LARGE = [] if INTERPRETED else [(3, 1), (1, 5), (67, 15), (9, 16), (70, 37), (700, 300), (5000, 3)]


def cosines(*shape, dtype=torch.float32):
    return (torch.rand(*shape, dtype=torch.float64) * 2 - 1).to(device=DEVICE, dtype=dtype)


def public_loop(logits, temperature=0.05, iterations=3):
    """SwAV's and DINO's loop, (N, K), in the tensor's dtype."""
    q = torch.exp(logits / temperature).t()
    k, n = q.shape
    q = q / q.sum()
    for _ in range(iterations):
        q = q / q.sum(1, keepdim=True) / k
        q = q / q.sum(0, keepdim=True) / n
    return (q * n).t()


def weighted_loop(logits, temperature, iterations, r, c):
    """The same with weights, in logarithms and in float64; padded rows (r = 0) come out 0."""
    t = logits.double() / temperature
    f = torch.zeros(t.shape[:-1], dtype=t.dtype, device=t.device)
    for _ in range(iterations):
        sums = torch.logsumexp(t + f[..., None] + r.double().log()[..., None], -2)
        g = c.double().log() - sums
        f = -torch.logsumexp(t + g[..., None, :], -1)
    q = torch.exp(t + f[..., None] + g[..., None, :])
    return torch.where((r == 0)[..., None], 0.0, q)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES + LARGE, ids=str)
def test_balanced_assignment_against_float64(shape, dtype):
    logits = cosines(*shape, dtype=dtype)
    ours, truth = balanced_assignment(logits), public_loop(logits.double())
    assert ours.dtype == dtype and not ours.requires_grad
    limit = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
    assert relative_error(ours, truth) <= limit[dtype]
    with solera.backend("reference"):
        assert relative_error(balanced_assignment(logits), truth) <= limit[dtype]


def test_float32_is_as_near_as_the_public_loop():
    logits = cosines(200, 61)
    truth = public_loop(logits.double())
    allowed = 2 * relative_error(public_loop(logits), truth)
    assert relative_error(balanced_assignment(logits), truth) <= allowed


@pytest.mark.parametrize("k", [5, 40])
def test_marginals_padding_and_batches(k):
    logits = cosines(3, 45, k, dtype=torch.float64)
    r = torch.rand(3, 45, dtype=torch.float64, device=DEVICE) + 0.1
    c = torch.rand(3, k, dtype=torch.float64, device=DEVICE) + 0.1
    c[1, 2] = 0
    valid = torch.rand(3, 45, device=DEVICE) > 0.3
    dirty = torch.where(valid[..., None], logits, math.nan)  # whatever stands in the padding
    ours = balanced_assignment(dirty, 0.2, 4, row_marginal=r, column_marginal=c, valid=valid)
    truth = weighted_loop(logits, 0.2, 4, torch.where(valid, r, 0.0), c)
    assert relative_error(ours, truth) < 1e-13
    assert not ours[~valid].any() and not ours[1, :, 2].any()
    torch.testing.assert_close(ours.sum(-1), valid.double())
    for item in range(3):
        alone = balanced_assignment(
            dirty[item], 0.2, 4, row_marginal=r[item], column_marginal=c[item], valid=valid[item]
        )
        assert torch.equal(alone, ours[item])
    # A sample of weight 2 counts twice, and a shared marginal serves the whole batch.
    twice = torch.cat([logits[0], logits[0, :1]])
    weight = torch.ones(45, dtype=torch.float64, device=DEVICE)
    weight[0] = 2
    torch.testing.assert_close(
        balanced_assignment(logits, row_marginal=weight)[0], balanced_assignment(twice)[:-1]
    )


@pytest.mark.no_interpreter
def test_converges_to_both_marginals():
    q = balanced_assignment(cosines(120, 20, dtype=torch.float64), 0.1, 300)
    torch.testing.assert_close(q.sum(0), torch.full((20,), 6.0, dtype=q.dtype, device=DEVICE))
    torch.testing.assert_close(q.sum(1), torch.ones(120, dtype=q.dtype, device=DEVICE))


@pytest.mark.parametrize("k", [6, 30])
@pytest.mark.parametrize("scale", [30.0, 1e3, 1e4])
def test_extreme_logits_stay_finite_and_right(scale, k):
    """exp(1e4 / 0.05) is far beyond any float: no overflow, no lost column, the loop's value in logarithms."""
    logits = cosines(80, k) * scale
    ours = balanced_assignment(logits)
    ones = torch.ones(80, device=DEVICE), torch.ones(k, device=DEVICE)
    truth = weighted_loop(logits, 0.05, 3, *ones)
    assert torch.isfinite(ours).all()
    torch.testing.assert_close(ours.sum(-1), torch.ones(80, device=DEVICE))
    # An exponent is rounded to 6e-8 of its size, a few times.
    assert relative_error(ours, truth) <= 1e-6 * scale / 0.05
    shifted = balanced_assignment(logits.double() + 1e6)
    torch.testing.assert_close(shifted, truth, rtol=1e-6, atol=1e-7)


def test_a_column_far_below_all_others_is_not_lost():
    logits = cosines(64, 20)
    logits[:, 3] -= 60  # e^-1200 of the rest at temperature 0.05
    ones = torch.ones(64, device=DEVICE), torch.ones(20, device=DEVICE)
    assert relative_error(balanced_assignment(logits), weighted_loop(logits, 0.05, 3, *ones)) < 1e-4


@pytest.mark.parametrize("k", [4, 18])
def test_forbidden_pairs_and_nan(k):
    logits = cosines(2, 30, k, dtype=torch.float64)
    logits[0, 5, :2] = -INF
    logits[0, :, 3] = -INF  # a cluster that nobody may have
    logits[0, 7] = -INF  # a sample that may have none
    logits[1, 0, 0] = math.nan
    q = balanced_assignment(logits)
    assert not q[0, :7, 3].any() and not q[0, 5, :2].any()
    assert q[0, 7].isnan().all() and q[1].isnan().all()
    rest = torch.cat([q[0, :7], q[0, 8:]])
    torch.testing.assert_close(rest.sum(-1), torch.ones(29, dtype=q.dtype, device=DEVICE))
    with solera.backend("reference"):
        torch.testing.assert_close(balanced_assignment(logits), q, equal_nan=True)


def test_a_maximum_a_sample_would_be_another_result():
    logits = cosines(40, 12, dtype=torch.float64)
    wrong = public_loop(logits - logits.amax(1, keepdim=True))
    right = public_loop(logits - logits.amax())
    assert relative_error(balanced_assignment(logits), right) < 1e-13
    assert relative_error(wrong, right) > 0.01


def test_empty_strided_and_one_number():
    assert balanced_assignment(torch.ones(0, 3, device=DEVICE)).shape == (0, 3)
    assert balanced_assignment(torch.ones(0, 4, 3, device=DEVICE)).shape == (0, 4, 3)
    logits = cosines(20, 30)
    assert torch.equal(
        balanced_assignment(logits.t()), balanced_assignment(logits.t().contiguous())
    )
    row = logits[:1].expand(5, 30)
    torch.testing.assert_close(balanced_assignment(row), torch.full_like(row, 1 / 30))


@pytest.mark.no_interpreter
def test_same_bits_for_any_thread_count():
    logits, few = cosines(3000, 70), cosines(30000, 5)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(
                (balanced_assignment(logits), *prior_match(few, iterations=5, tolerance=0))
            )
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def _rank(rank, port, logits, valid, results):
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    part = slice(0, 30) if rank == 0 else slice(30, 80)
    group = torch.distributed.group.WORLD
    wide = balanced_assignment(logits[:, part], valid=valid[:, part], group=group)
    few = balanced_assignment(logits[:, part, :4] * 1e3, iterations=2, group=group)
    nobody = balanced_assignment(logits[:, :0] if rank == 0 else logits, group=group)
    results[rank] = wide, few, nobody
    torch.distributed.destroy_process_group()


@pytest.mark.no_interpreter
@pytest.mark.skipif(DEVICE != "cpu", reason="two gloo processes on the CPU")
def test_two_ranks_are_one_assignment():
    """Ranks with 30 and 50 rows, and with 0 and 80, against one process that holds them all."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    logits, valid = cosines(2, 80, 20, dtype=torch.float64), torch.rand(2, 80) > 0.2
    context = torch.multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        results = manager.dict()
        args = (port, logits, valid, results)
        workers = [context.Process(target=_rank, args=(rank, *args)) for rank in range(2)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(240)  # each imports torch, on a machine that may be busy
        assert [worker.exitcode for worker in workers] == [0, 0]
        first, second = results[0], results[1]
    wide = balanced_assignment(logits, valid=valid)
    few = balanced_assignment(logits[..., :4] * 1e3, iterations=2)
    torch.testing.assert_close(torch.cat([first[0], second[0]], 1), wide)
    torch.testing.assert_close(torch.cat([first[1], second[1]], 1), few)
    torch.testing.assert_close(torch.cat([first[2], second[2]], 1), balanced_assignment(logits))


# ---- papers ------------------------------------------------------------------------------------------


def test_class_relation_distillation_pseudo_labels_and_heads():
    """Cr-KD-NCD: labels of views x heads by Sinkhorn, the weight of its distillation, its heads as an ensemble."""
    views, heads, n, k, d = 2, 3, 24, 10, 8
    x = randn(views * n, d, dtype=torch.float64)
    w1, b1 = randn(heads, d, 16, dtype=torch.float64), randn(heads, 16, dtype=torch.float64)
    w2, b2 = randn(heads, 16, 6, dtype=torch.float64), randn(heads, 6, dtype=torch.float64)
    prototypes = torch.nn.functional.normalize(randn(heads, k, 6, dtype=torch.float64), dim=-1)
    hidden = solera.ensemble.ensemble_linear(x, w1, b1)
    hidden = solera.norm.batch_norm(hidden.flatten(1), training=True).view_as(hidden).relu()
    features = solera.norm.l2_normalize(solera.ensemble.ensemble_linear(hidden, w2, b2))
    logits = solera.ensemble.ensemble_linear(features, prototypes.transpose(1, 2).contiguous())
    for h in range(heads):  # one head after another, as written
        a = x @ w1[h] + b1[h]
        a = (a - a.mean(0)) / (a.var(0, correction=0) + 1e-5).sqrt()
        z = torch.nn.functional.normalize(a.relu() @ w2[h] + b2[h], dim=-1)
        torch.testing.assert_close(logits[:, h], z @ prototypes[h].T)
    each = logits.view(views, n, heads, k).transpose(1, 2)  # (views, heads, n, k)
    q = balanced_assignment(each)
    for v in range(views):
        for h in range(heads):
            torch.testing.assert_close(q[v, h], public_loop(each[v, h]))


@pytest.mark.no_interpreter
def test_novel_class_discovery_equal_partition():
    """The survey's form: Q = diag(u) exp(Z / eps) diag(v) for Z (K, B), rows summing to B / K, columns to 1."""
    z = cosines(6, 48, dtype=torch.float64)
    q = balanced_assignment(z.T, 0.05, 200).T
    torch.testing.assert_close(q.sum(1), torch.full((6,), 8.0, dtype=q.dtype, device=DEVICE))
    torch.testing.assert_close(q.sum(0), torch.ones(48, dtype=q.dtype, device=DEVICE))
    scaled = q.log() - z / 0.05  # log u + log v: a matrix of rank "one" in logarithms
    mixed = scaled - scaled.mean(0) - scaled.mean(1, keepdim=True) + scaled.mean()
    assert mixed.abs().max() < 1e-9


def test_prior_match_gradients_of_hard_predictions():
    """Probabilities of 0 and 1, rounded to float32, leave the system singular: the gradient is finite, near 0."""
    logits = (1e6 * torch.randn(2, 17, 17, device=DEVICE)).requires_grad_()
    a, p = prior_match(logits, iterations=3, tolerance=0)
    for out in (a, p):
        (grad,) = torch.autograd.grad((out * torch.rand_like(out)).sum(), logits, retain_graph=True)
        assert torch.isfinite(grad).all()


def test_mitigating_word_bias_against_the_grid():
    """The paper searches offsets so that the mean prediction is uniform; two classes, a grid of step 0.01."""
    logits = randn(300, 2, dtype=torch.float64) * 2 + torch.tensor([1.5, 0.0], device=DEVICE)
    a, p = prior_match(logits, tolerance=1e-12)
    torch.testing.assert_close(p.mean(0), torch.full_like(a, 0.5), atol=1e-12, rtol=0)
    torch.testing.assert_close(p, (logits + a).softmax(-1))
    grid = torch.arange(-4, 4, 0.01, dtype=torch.float64, device=DEVICE)
    means = torch.stack([(logits + torch.stack([g, -g * 0])).softmax(-1).mean(0) for g in grid])
    best = grid[(means[:, 0] - 0.5).abs().argmin()]
    assert abs(best - (a[0] - a[1])) <= 0.01
    null = randn(1, 4, dtype=torch.float64)
    torch.testing.assert_close(null_offsets(null), -null[0].log_softmax(-1))
    shifted = (randn(5, 4, dtype=torch.float64) + null_offsets(null)).softmax(-1)
    assert torch.isfinite(shifted).all()


# ---- prior matching ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype",
    [torch.float32] if INTERPRETED else [torch.float64, torch.float32, torch.bfloat16],
    ids=str,
)
@pytest.mark.parametrize("k", [3, 21])
def test_prior_match_reaches_the_prior(k, dtype):
    logits = randn(2, 150, k, dtype=dtype)
    prior = (torch.rand(2, k, dtype=torch.float64) + 0.2).to(device=DEVICE, dtype=dtype)
    valid = torch.rand(2, 150, device=DEVICE) > 0.2
    a, p = prior_match(logits, prior, valid=valid)
    exact = (prior / prior.sum(-1, keepdim=True)).double()
    mean = p.double().sum(1) / valid.sum(1, keepdim=True)
    assert (mean - exact).abs().sum(-1).max() < (2e-2 if dtype == torch.bfloat16 else 2e-6)
    assert a.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert a.mean(-1).abs().max() < 1e-5 and not p[~valid].any()
    one = prior_match(logits[0], prior[0], valid=valid[0])
    assert torch.equal(one.offsets, a[0]) and torch.equal(one.probabilities, p[0])


@pytest.mark.no_interpreter
def test_prior_match_of_padding_alone():
    logits = randn(2, 6, 4, grad=True)
    valid = torch.ones(2, 6, dtype=torch.bool, device=DEVICE)
    valid[1] = False
    with pytest.warns(UserWarning, match="1 of 2 items"):
        _, p = prior_match(logits, valid=valid)
    (grad,) = torch.autograd.grad(p.square().sum(), logits)
    assert not p[1].any() and not grad[1].any() and torch.isfinite(grad).all()


@pytest.mark.no_interpreter
def test_the_brief_of_500_rows_and_3_classes():
    a, p = prior_match(randn(500, 3, dtype=torch.float64), iterations=54, tolerance=0)
    assert (p.mean(0) - 1 / 3).abs().max() < 1e-10


def match(logits, prior):
    return prior_match(
        logits, prior.softmax(-1), tolerance=1e-14, iterations=60 if INTERPRETED else 400
    )


@pytest.mark.parametrize(
    "shape", [(5, 17)] if INTERPRETED else [(7, 3), (2, 6, 4), (5, 17)], ids=str
)
def test_gradcheck_and_gradgradcheck(shape):
    logits = randn(*shape, dtype=torch.float64, grad=True)
    prior = randn(*shape[:-2], shape[-1], dtype=torch.float64, grad=True, scale=0.3)
    assert torch.autograd.gradcheck(lambda l, c: tuple(match(l, c)), (logits, prior))
    assert torch.autograd.gradcheck(lambda l, c: match(l, c).offsets, (logits, prior))
    if len(shape) == 2 and shape[1] == 3:
        assert torch.autograd.gradgradcheck(lambda l, c: tuple(match(l, c)), (logits, prior))


def test_gradients_in_float32_and_padding():
    logits, prior = randn(40, 5, grad=True), randn(5, grad=True, scale=0.3)
    valid = torch.arange(40, device=DEVICE) < 30
    f = lambda l, c, **o: prior_match(
        l, c.softmax(-1), iterations=200, tolerance=1e-7 if l.dtype == torch.float32 else 1e-13, **o
    )
    loss = lambda r: r.probabilities.square().sum() + r.offsets.sin().sum()
    got = torch.autograd.grad(loss(f(logits, prior, valid=valid)), (logits, prior))
    wide = [t.detach().double().requires_grad_() for t in (logits, prior)]
    want = torch.autograd.grad(loss(f(*wide, valid=valid)), wide)
    cut = torch.autograd.grad(loss(f(wide[0][:30], wide[1])), wide)
    for x, y, z in zip(got, want, cut):
        assert relative_error(x, y) < 1e-4
        torch.testing.assert_close(y, z)
    assert not got[0][30:].any()


def test_torch_func():
    logits = randn(9, 3, dtype=torch.float64)
    f = lambda l: prior_match(l, iterations=200, tolerance=0).offsets.sin().sum()
    leaf = logits.clone().requires_grad_()
    want = torch.autograd.grad(f(leaf), leaf)[0]
    torch.testing.assert_close(torch.func.grad(f)(logits), want, rtol=1e-6, atol=1e-9)
    batch = torch.stack([logits, logits + 1])
    torch.testing.assert_close(
        torch.func.vmap(balanced_assignment)(batch), balanced_assignment(batch)
    )


# ---- contract ----------------------------------------------------------------------------------------


def test_opcheck():
    for x in (
        cosines(2, 9, 20),
        cosines(9, 2, 5).transpose(0, 1),
        cosines(1, 9, 20).expand(2, 9, 20),
    ):
        k = x.shape[-1]
        w, c, g = (torch.rand(2, s, device=DEVICE) for s in (9, k, k))
        for start, steps in ((None, 0), (g, 2)):
            torch.library.opcheck(ops.scaling_solve.default, (x, w, c, start, 2.0, steps, 0.1))
        torch.library.opcheck(ops.scaling_assign.default, (x, w, g, 2.0))
        torch.library.opcheck(ops.scaling_balance.default, (x, w, c, 2.0, 3))
        for grad in (None, torch.ones((), device=DEVICE).expand(2, 9, k)):
            torch.library.opcheck(ops.scaling_backward.default, (grad, x, g, w))


def test_compile_aot_eager():
    def f(logits):
        r = prior_match(logits, iterations=50)
        return balanced_assignment(logits), r.offsets.sin().sum() + r.probabilities.square().sum()

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((2, 12, 5), (3, 9, 7)):
        logits = randn(*shape, grad=True)
        want, got = f(logits), compiled(logits)
        torch.testing.assert_close(got[0], want[0])
        torch.testing.assert_close(
            torch.autograd.grad(got[1], logits), torch.autograd.grad(want[1], logits)
        )


L = torch.rand(2, 6, 4, device=DEVICE)
BAD = [
    (lambda: balanced_assignment([1.0]), TypeError, "logits: expected a torch.Tensor"),
    (lambda: balanced_assignment(L[0, 0]), ValueError, "logits: expected at least 2 dim"),
    (lambda: balanced_assignment(L.int()), TypeError, "logits: expected float32"),
    (lambda: balanced_assignment(L[..., :0]), ValueError, "logits: expected at least one column"),
    (lambda: balanced_assignment(L, 0.0), ValueError, "temperature: expected a number > 0"),
    (lambda: balanced_assignment(L, math.nan), ValueError, "temperature: expected a finite"),
    (lambda: balanced_assignment(L, 0.1, 0), ValueError, "iterations: expected at least 1"),
    (lambda: balanced_assignment(L, 0.1, 2.0), TypeError, "iterations: expected an int"),
    (lambda: balanced_assignment(L, row_marginal=L[0, 0]), ValueError, r"row_marginal: expected shape \(6,\)"),
    (lambda: balanced_assignment(L, column_marginal=L[:, 0, :3]), ValueError, "column_marginal: expected shape"),
    (lambda: balanced_assignment(L, column_marginal=-L[0, 0]), ValueError, "column_marginal: expected finite"),
    (lambda: balanced_assignment(L, row_marginal=0 * L[..., 0]), ValueError, "row_marginal: expected a positive"),
    (lambda: balanced_assignment(L, valid=L[..., 0]), TypeError, "valid: expected a bool"),
    (lambda: balanced_assignment(L, valid=L[0, 0] > 0), ValueError, r"valid: expected shape \(2, 6\)"),
    (lambda: prior_match(L[:, :0]), ValueError, "logits: expected at least one row"),
    (lambda: prior_match(L, 0 * L[0, 0]), ValueError, "prior: expected finite probabilities > 0"),
    (lambda: prior_match(L, L[0, 0, :2]), ValueError, r"prior: expected shape \(2,\)|prior: expected shape \(4,\)"),
    (lambda: prior_match(L, tolerance=-1), ValueError, "tolerance: expected a finite"),
    (lambda: null_offsets(L[:, :0]), ValueError, "logits: expected at least one row"),
]  # fmt: skip


@pytest.mark.parametrize("call, error, match", BAD, ids=[m for _, _, m in BAD])
@pytest.mark.skipif(DEVICE != "cpu", reason="values are read on the CPU alone")
def test_bad_input(call, error, match):
    with pytest.raises(error, match=match):
        call()


@pytest.mark.skipif(DEVICE != "cpu", reason="values are read on the CPU alone")
def test_warns_where_the_tolerance_is_not_reached():
    with pytest.warns(UserWarning, match="1 of 1 items have an error above"):
        prior_match(randn(30, 3) * 20, iterations=2)
