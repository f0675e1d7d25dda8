"""Mixtures of feed-forward experts and fast weights against their formulas."""

import pytest
import torch
import torch.nn.functional as F
from function_checks import agrees_with_formula, compiles
from helpers import DEVICE, DTYPES, randn

from solera.ensemble import (
    embed_router,
    fastweight_accumulate,
    fastweight_lora_linear,
    moe_ffn,
    polar_normalize,
    top_k_gate,
)


def differentiates_in_one_direction(function, tensors):
    """First and second derivatives along a random direction: the core's are tested element by element."""
    assert torch.autograd.gradcheck(function, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


def experts(N=20, E=5, D=8, f=6, dtype=torch.float64):
    shapes = (N, D), (N, E), (E, f, D), (E, D, f)
    return [randn(*s, dtype=dtype, scale=0.5, grad=True) for s in shapes]


def formula(x, logits, w1, w2, k, act=F.gelu):
    p, index = logits.softmax(-1).topk(k)
    every = torch.einsum("eof,nef->neo", w2, act(torch.einsum("efd,nd->nef", w1, x)))
    chosen = every.gather(1, index.unsqueeze(-1).expand(-1, -1, every.shape[2]))
    return (p.unsqueeze(-1) * chosen).sum(1)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("k", [1, 3])
def test_fine_grained_experts(k, dtype):
    """The top G of G E experts of 1 / G the width; k = 1 is the switch case."""
    ours = lambda *t: moe_ffn(*t, k)
    agrees_with_formula(ours, lambda *t: formula(*t, k), experts(dtype=dtype), allowed=2e-7)


@pytest.mark.kernel
def test_differentiates_and_honours_its_options():
    tensors = experts(4, 3, 3, 2)
    differentiates_in_one_direction(lambda *t: moe_ffn(*t, 2, activation="silu"), tensors)
    x, logits, w1, w2 = tensors
    shared = randn(4, 3, dtype=torch.float64)
    gates, index = top_k_gate(logits, 2)
    y = moe_ffn(x, logits, w1, w2, 2, normalize=True, shared=shared)
    own = moe_ffn(x, None, w1, w2, 2, index=index, gates=gates)
    torch.testing.assert_close(y, own + shared)
    other = moe_ffn(x.reshape(2, 2, 3), logits.reshape(2, 2, 3), w1, w2, 1)
    assert torch.equal(other.flatten(0, 1), moe_ffn(x, logits, w1, w2, 1))


@pytest.mark.no_interpreter
def test_a_token_does_not_depend_on_the_others():
    x, logits, w1, w2 = (t.detach() for t in experts(200, 7, 33, 20, torch.float32))
    full = moe_ffn(x, logits, w1, w2, 3)
    for count in (1, 9, 150):
        assert torch.equal(moe_ffn(x[:count], logits[:count], w1, w2, 3), full[:count])
    order = torch.randperm(200)
    assert torch.equal(moe_ffn(x[order], logits[order], w1, w2, 3), full[order])


def test_upcycled_experts_are_the_dense_layer():
    """N copies of a dense layer under gates that sum to one give that layer."""
    x, logits, w1, w2 = experts(6, 4, 5, 3)
    copies = w1[:1].expand(4, -1, -1), w2[:1].expand(4, -1, -1)
    y = moe_ffn(x, logits, *copies, 2, normalize=True)
    torch.testing.assert_close(y, F.gelu(x @ w1[0].T) @ w2[0].T)


@pytest.mark.no_interpreter
def test_nexus_router_takes_a_new_expert_by_its_embedding():
    x, _, w1, w2 = experts(6, 4, 5, 3)
    project, domains = torch.nn.Linear(7, 5, dtype=torch.float64), randn(4, 7, dtype=torch.float64)
    embeddings = project.to(DEVICE)(domains)
    logits = embed_router(x, embeddings)
    torch.testing.assert_close(logits, x @ embeddings.T)
    shared = F.gelu(x @ w1[0].T) @ w2[0].T
    y = moe_ffn(x, logits, w1, w2, 1, shared=shared)
    torch.testing.assert_close(y, shared + formula(x, logits, w1, w2, 1))
    more = torch.cat([embeddings, project(randn(1, 7, dtype=torch.float64))])
    assert torch.equal(embed_router(x, more)[:, :4], logits)


@pytest.mark.no_interpreter
def test_moe_compiles():
    compiles(lambda *t: moe_ffn(*t, 2), lambda size: experts(size, 3, 4, 2, torch.float32))


def test_no_tokens():
    x, logits, w1, w2 = experts()
    y = moe_ffn(x[:0], logits[:0], w1, w2, 2)
    assert y.shape == (0, 8)
    assert not any(g.any() for g in torch.autograd.grad(y.sum(), (w1, w2)))


def test_bad_experts():
    x, logits, w1, w2 = (t.detach() for t in experts())
    for changes, message in (
        ({"router_logits": logits[:, :4]}, r"router_logits: expected shape \(20, 5\)"),
        ({"top_k": 6}, r"^top_k: expected an int in \[1, 5\]"),
        ({"top_k": 0}, r"^top_k: expected an int in \[1, 5\]"),
        ({"w2": w2[:, :, :5]}, r"w2: expected shape \(5, 8, 6\)"),
        ({"shared": x[:5]}, r"shared: expected shape \(20, 8\)"),
        ({"gates": logits}, "index: expected index and gates together"),
        ({"activation": "tanh"}, "activation: expected one of"),
    ):
        given = {"x": x, "router_logits": logits, "w1": w1, "w2": w2, "top_k": 2, **changes}
        with pytest.raises(ValueError, match=message):
            moe_ffn(**given)


# ---- fast weights ------------------------------------------------------------------------------------


@pytest.mark.no_interpreter
def test_fast_weights_accumulate_over_chunks():
    h, a2, a3 = (randn(*s, dtype=torch.float64, grad=True) for s in ((2, 9, 6), (4, 6), (3, 6)))
    want = torch.einsum("bmp,bmr->bpr", h @ a2.T, h @ a3.T)
    torch.testing.assert_close(fastweight_accumulate(None, h, a2, a3), want)
    state = fastweight_accumulate(None, h[:, :4], a2, a3)
    torch.testing.assert_close(fastweight_accumulate(state, h[:, 4:], a2, a3), want)
    mask = (torch.arange(9, device=DEVICE) < 4).expand(2, 9)
    torch.testing.assert_close(fastweight_accumulate(None, h, a2, a3, mask=mask), state)
    differentiates_in_one_direction(lambda *t: fastweight_accumulate(None, *t), (h[:1, :2], a2, a3))
    half = fastweight_accumulate(None, h.bfloat16(), a2.bfloat16(), a3.bfloat16())
    assert half.dtype == torch.float32
    with pytest.raises(ValueError, match="mask: expected a bool tensor"):
        fastweight_accumulate(None, h, a2, a3, mask=mask[:, :3])


@pytest.mark.no_interpreter
@pytest.mark.parametrize("shape", [(2, 4, 7), (2, 7, 4)], ids=str)
def test_polar_normalize(shape):
    s = randn(*shape, dtype=torch.float64)
    polar = polar_normalize(s)
    torch.testing.assert_close(
        torch.linalg.svdvals(polar), torch.ones(2, 4, dtype=s.dtype, device=DEVICE)
    )
    torch.testing.assert_close(polar_normalize(s, kind="newton_schulz", iterations=40), polar)
    u, _, vh = torch.linalg.svd(s, full_matrices=False)
    torch.testing.assert_close(polar_normalize(s, 2), u[..., :2] @ vh[..., :2, :])
    flat = polar_normalize(s, kind="frobenius")
    torch.testing.assert_close(flat, s / s.flatten(1).norm(dim=1)[:, None, None])
    assert not polar_normalize(torch.zeros(2, 3, device=DEVICE), kind="newton_schulz").any()
    differentiates_in_one_direction(polar_normalize, (s[0].requires_grad_(),))
    with pytest.raises(ValueError, match="k: expected an int in"):
        polar_normalize(s, 5)


def test_a_layer_with_a_state_for_every_sample():
    """Generative Adapter: y = W x + s B S^T A1 x, each sample with its own S."""
    shapes = (2, 4, 6), (5, 6), (3, 6), (2, 3, 2), (5, 2), (5,)
    tensors = [randn(*s, dtype=torch.float64, grad=True) for s in shapes]
    ours = lambda x, w, a1, s, b, d: fastweight_lora_linear(x, w, a1, s, b, scaling=0.5, bias=d)

    def want(x, w, a1, s, b, d):
        return F.linear(x, w, d) + 0.5 * torch.stack([x[n] @ (b @ s[n].T @ a1).T for n in range(2)])

    agrees_with_formula(ours, want, tensors)
    differentiates_in_one_direction(ours, (tensors[0][:, :1], *tensors[1:]))
    assert ours(tensors[0][:0], *tensors[1:3], tensors[3][:0], *tensors[4:]).shape == (0, 4, 5)
    with pytest.raises(ValueError, match=r"state: expected shape \(2, 3, 2\)"):
        fastweight_lora_linear(*tensors[:3], tensors[3][:1], tensors[4])
