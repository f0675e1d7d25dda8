"""Core pair_losses: adaptive multi-head contrastive learning against its formula, streamed, with gradients."""

import copy
import pickle

import pytest
import torch
from function_checks import compiles, works_under_torch_func
from helpers import DEVICE, DTYPES, INTERPRETED, ULP, double, randn, relative_error
from torch.nn import functional as F

import solera
from solera.ensemble import multi_head_contrastive_loss, pair_losses
from solera.nn import MultiHeadContrastiveLoss

ops = torch.ops.solera
F64 = torch.float64
NUMBERS = (0.05, 2.0, 0.01)


def mlp(d, dtype=torch.float32):
    """A smooth shared network, so that gradients can be checked by differences."""
    layers = torch.nn.Sequential(torch.nn.Linear(d, 5), torch.nn.Tanh(), torch.nn.Linear(5, d))
    return layers.to(DEVICE, dtype)


def paper(z1, z2, phi, tau_min, tau_max, beta, k):
    """Pair by pair, as the paper's equations read."""
    total = 0.0
    for h in range(z1.shape[1]):
        a, b = F.normalize(z1[:, h], dim=1), F.normalize(z2[:, h], dim=1)
        for anchors, partners in ((a, b), (b, a)):
            losses = []
            for i in range(len(a)):
                others = [j for j in range(len(a)) if j != i]
                negatives = torch.cat([anchors[others], partners[others]])
                negatives = negatives[(negatives @ anchors[i]).topk(min(k, len(negatives))).indices]
                tau = lambda u, v: tau_min + (tau_max - tau_min) * torch.sigmoid(-(phi(u) @ phi(v)))
                near = tau(anchors[i], partners[i])
                loss = -(anchors[i] @ partners[i]) / near
                loss = loss + beta * (0.5 * a.shape[1] * near.log() + 1 / near)
                far = torch.stack([tau(anchors[i], v) for v in negatives])
                loss = loss + ((negatives @ anchors[i]) / far).mean()
                losses.append(loss - beta * (far.log() + 1 / far).sum())
            total = total + 0.5 * torch.stack(losses).mean()
    return total


def arguments(k):
    return dict(zip(("tau_min", "tau_max", "beta", "top_k"), (*NUMBERS, k)))


@pytest.mark.parametrize("k", [1, 3, 100])
def test_loss_and_gradients_are_the_papers(k, monkeypatch):
    monkeypatch.setattr(pair_losses, "CHUNK", 30)  # a few anchors at a time
    z1, z2 = randn(5, 2, 4, dtype=F64, grad=True), randn(5, 2, 4, dtype=F64, grad=True)
    phi = mlp(4, F64)
    tensors = (z1, z2, *phi.parameters())
    ours = multi_head_contrastive_loss(z1, z2, phi, **arguments(k))
    want = paper(z1, z2, phi, *NUMBERS, k)
    torch.testing.assert_close(ours, want)
    torch.testing.assert_close(
        torch.autograd.grad(ours, tensors), torch.autograd.grad(want, tensors)
    )


def row_formula(s, g, negative, positive, tau_min, tau_max, beta, width):
    return pair_losses._row_losses(s, g, negative, positive, tau_min, tau_max, beta, width)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 7, 130])
def test_rows_against_float64(k, dtype):
    rows, columns = (3 if INTERPRETED else 40), k + 5
    s, g = randn(rows, columns, dtype=dtype), randn(rows, columns, dtype=dtype, scale=3)
    order = torch.stack([torch.randperm(columns) for _ in range(rows)]).to(DEVICE)
    negative, positive = order[:, :k], order[:, k]
    options = (negative, positive, *NUMBERS, 16.0)
    exact = [t.requires_grad_() for t in double(s, g)]
    truth = row_formula(*exact, *options)
    eager = [t.clone().requires_grad_() for t in (s, g)]
    today = row_formula(*eager, *options)
    losses, ds, dg = ops.pair_losses(s, g, *options, True)
    assert losses.dtype == (F64 if dtype == F64 else torch.float32) and ds.dtype == dtype
    # A dozen roundings in another order than eager's.
    close = lambda got, want, other: (
        relative_error(got, want)
        <= max(
            {F64: 1e-14, torch.float32: 4e-7}.get(got.dtype, ULP[got.dtype]),
            2 * relative_error(other, want),
        )
    )
    assert close(losses, truth, today)
    for got, want, other in zip(
        (ds, dg), torch.autograd.grad(truth.sum(), exact), torch.autograd.grad(today.sum(), eager)
    ):
        assert close(got, want, other)
    alone, none, _ = ops.pair_losses(s, g, *options, False)
    assert torch.equal(alone, losses) and none.numel() == 0


def test_extreme_logits_stay_finite():
    s, g = randn(2, 4), torch.tensor([[1e4, -1e4, 90.0, -90.0]] * 2, device=DEVICE)
    negative = torch.tensor([[1, 2, 3], [0, 2, 3]], device=DEVICE)
    positive = torch.tensor([0, 1], device=DEVICE)
    for t in ops.pair_losses(s, g, negative, positive, 1e-5, 2.0, 0.01, 8.0, True):
        assert t.isfinite().all()


def test_second_derivatives(monkeypatch):
    monkeypatch.setattr(pair_losses, "CHUNK", 20)
    phi = mlp(3, F64)
    f = lambda z1, z2: multi_head_contrastive_loss(z1, z2, phi, **arguments(3))
    z = randn(3, 1, 3, dtype=F64, grad=True), randn(3, 1, 3, dtype=F64, grad=True)
    assert torch.autograd.gradcheck(f, z)
    assert torch.autograd.gradgradcheck(f, z)


def test_func_transforms():
    phi = mlp(3, F64)
    for p in phi.parameters():
        p.requires_grad_(False)
    f = lambda z1, z2: multi_head_contrastive_loss(z1, z2, phi, **arguments(3))
    works_under_torch_func(f, (randn(3, 2, 3), randn(3, 2, 3)))


def test_opcheck():
    check = torch.library.opcheck
    s, g = randn(3, 4).t(), randn(1, 3).expand(4, 3)
    negative, positive = (
        torch.tensor([[1, 2]] * 4, device=DEVICE),
        torch.zeros(4, device=DEVICE).long(),
    )
    check(ops.pair_losses.default, (s, g, negative, positive, *NUMBERS, 4.0, True))


def test_compile():
    phi = mlp(4)
    f = lambda z1, z2: multi_head_contrastive_loss(z1, z2, phi, **arguments(3))[None]
    compiles(f, lambda n: (randn(n, 2, 4, grad=True), randn(n, 2, 4, grad=True)))


def test_head_loss_is_one_op_when_compiled():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    phi = mlp(4)
    torch._dynamo.reset()
    call = torch.compile(
        lambda a, b: multi_head_contrastive_loss(a, b, phi, **arguments(3)),
        fullgraph=True, backend=backend,
    )  # fmt: skip
    z1, z2 = randn(6, 2, 4), randn(6, 2, 4)
    torch.testing.assert_close(
        call(z1, z2), multi_head_contrastive_loss(z1, z2, phi, **arguments(3))
    )
    assert "pair_head_loss" in str([n.target for m in graphs[0].modules() for n in m.graph.nodes])
    z, q = randn(6, 4), randn(4, 6).t()
    for need in (False, True):
        torch.library.opcheck(ops.pair_head_loss.default, (z, q, 3, *NUMBERS, need))


@pytest.mark.no_interpreter
def test_same_bits_for_any_threads():
    z1, z2, phi = randn(120, 2, 16), randn(120, 2, 16), mlp(16)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            s = z1[:, 0] @ z2[:, 0].T
            negative = s.topk(9).indices
            found.append(ops.pair_losses(s, s, negative, negative[:, 0], *NUMBERS, 4.0, True))
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(found[0], found[1])
    assert multi_head_contrastive_loss(z1, z2, phi).isfinite()


@pytest.mark.no_interpreter
def test_nothing_of_pairs_is_kept():
    """What backward keeps is of the embeddings' size, whatever the number of pairs."""
    z1, z2 = randn(60, 1, 4, grad=True), randn(60, 1, 4, grad=True)
    kept = []
    pack = lambda t: kept.append(t.numel()) or t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        multi_head_contrastive_loss(z1, z2, lambda z: z, **arguments(100))
    assert max(kept) <= 2 * 60 * 4


def test_module():
    module = MultiHeadContrastiveLoss(4, 2, tau_min=0.05, topk=3, temperature_hidden_dim=6).to(
        DEVICE
    )
    assert list(module.state_dict()) == [
        f"temperature.phi.{i}.{p}" for i in (0, 2) for p in ("weight", "bias")
    ]
    z1, z2 = randn(4, 2, 4, grad=True), randn(4, 2, 4)
    loss = module(z1, z2)
    torch.testing.assert_close(loss, paper(z1, z2, module.temperature.phi, 0.05, 2.0, 0.01, 3))
    loss.backward()
    assert all(p.grad is not None for p in module.parameters())
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(z1, z2), loss)
    half = copy.deepcopy(module).bfloat16()(z1.detach().bfloat16(), z2.bfloat16())
    torch.testing.assert_close(half.float(), loss.detach(), rtol=5e-2, atol=5e-2)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert torch.equal(module(z1, z2), loss)
    assert module(z1.half(), z2.half()).dtype == torch.float32
    with solera.backend("reference"):
        torch.testing.assert_close(module(z1, z2), loss)


# ---- bad input ---------------------------------------------------------------------------------------

Z = randn(3, 2, 4)
PHI = torch.nn.Identity()
LOSS = multi_head_contrastive_loss
BAD = [
    (lambda: LOSS(Z[0], Z[0], PHI), ValueError, "z1: expected 3 dimensions"),
    (lambda: LOSS(Z, Z[:2], PHI), ValueError, "z2: expected shape"),
    (lambda: LOSS(Z[:1], Z[:1], PHI), ValueError, "z1: expected at least 2 samples"),
    (lambda: LOSS(Z, Z, None), TypeError, "phi: expected a callable"),
    (lambda: LOSS(Z, Z, lambda z: z[:1]), ValueError, "phi's output: expected shape"),
    (lambda: LOSS(Z, Z, PHI, top_k=0), ValueError, "top_k: expected a positive int"),
    (lambda: LOSS(Z, Z, PHI, tau_min=0.0), ValueError, "tau_min: expected 0 < tau_min"),
    (lambda: LOSS(Z, Z, PHI, beta=-1.0), ValueError, "beta: expected a finite number"),
    (lambda: MultiHeadContrastiveLoss(4, 3)(Z, Z), ValueError, "z1: expected shape"),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input_is_named(case):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()
