"""Core prompts: scores against the N x P x C logits in float64, gradients, torch's contract, bad input."""

import pytest
import torch
from function_checks import agrees_with_formula, compiles, works_under_torch_func
from helpers import DEVICE, DTYPES, INTERPRETED, assert_accurate, randn
from hypothesis import given
from hypothesis import strategies as st

import solera
from solera.ensemble import prompt_bias, prompt_scores

ops = torch.ops.solera
F64, INF, NAN = torch.float64, float("inf"), float("nan")


def formula(images, texts, bias=None):
    """Every logit, as the paper writes it."""
    acc = F64 if images.dtype == F64 else torch.float32
    logits = torch.einsum("nd,pcd->npc", images.to(acc), texts.to(acc))
    if bias is not None:
        logits = logits + bias.to(acc)
    return logits.max(-1).values.mean(0)


# (N, P, C, D): one of all, several small prompts in a tile, past a tile's rows, past a tile's classes.
SHAPES = [(1, 1, 1, 1), (9, 5, 3, 20), (70, 2, 130, 40), (1100, 3, 5, 8), (5, 2, 1100, 6)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scores_and_gradients_against_float64(shape, dtype):
    n, p, c, d = shape
    if INTERPRETED and n * p * c > 10000:
        n, c = min(n, 70), min(c, 70)
    x, t = (randn(*s, dtype=dtype, scale=0.5).requires_grad_() for s in ((n, d), (p, c, d)))
    bias = randn(p, c, dtype=F64 if dtype == F64 else torch.float32, grad=True)
    for tensors in ((x, t), (x, t, bias)):
        agrees_with_formula(prompt_scores, formula, tensors, allowed=3e-7)


def test_debiased_scores_are_the_papers():
    test, pretrain, t = randn(30, 8, dtype=F64), randn(40, 8, dtype=F64), randn(4, 6, 8, dtype=F64)
    logits = torch.einsum("nd,pcd->npc", test, t)
    of_pretrain = torch.einsum("nd,pcd->npc", pretrain, t)
    for given_means, mean in (
        ({"test": test, "pretrain": pretrain}, 0.5 * (logits.mean(0) + of_pretrain.mean(0))),
        ({"test": test}, logits.mean(0)),
        ({"pretrain": pretrain.mean(0)}, of_pretrain.mean(0)),
    ):
        want = (logits - mean).amax(-1).mean(0)
        torch.testing.assert_close(prompt_scores(test, t, prompt_bias(t, **given_means)), want)


def test_ties_go_to_the_first_class_and_nan_stays_in_its_prompt():
    x = torch.ones(3, 2, device=DEVICE)
    t = torch.ones(2, 4, 2, device=DEVICE)
    t[1, 2, 1] = NAN
    scores, choice = ops.prompt_scores_choice(x, t, None)
    assert scores[0] == 2 and scores[1].isnan() and choice[0].tolist() == [0, 0, 0]
    assert ((choice >= 0) & (choice < 4)).all()
    t[1, 2, 1], t[1, 0] = 1.0, INF
    assert prompt_scores(x, t)[1] == INF
    bias = torch.full((2, 4), -INF, device=DEVICE)
    assert (prompt_scores(x, torch.ones_like(t), bias) == -INF).all()


@given(
    n=st.integers(1, 12), p=st.integers(0, 5), c=st.integers(1, 9), d=st.integers(0, 9),
    dtype=st.sampled_from(DTYPES), layout=st.sampled_from(["plain", "transposed", "expanded"]),
    scale=st.sampled_from([1.0, 1e-30, 1e3]),
)  # fmt: skip
def test_any_shape_layout_and_size(n, p, c, d, dtype, layout, scale):
    x, t = randn(n, d, dtype=dtype, scale=scale), randn(p, c, d, dtype=dtype)
    if layout == "transposed":
        x, t = x.t().contiguous().t(), t.transpose(0, 2).contiguous().transpose(0, 2)
    elif layout == "expanded":
        x, t = x[:1].expand(n, d), t[:, :1].expand(p, c, d)
    got, want = prompt_scores(x, t), formula(x.double(), t.double())
    acc = F64 if dtype == F64 else torch.float32
    assert got.dtype == acc
    assert_accurate(got, want, formula(x, t) * (1 + 4e-7))


def test_second_derivatives():
    x, t, b = (randn(*s, dtype=F64, grad=True) for s in ((5, 3), (2, 4, 3), (2, 4)))
    assert torch.autograd.gradcheck(prompt_scores, (x, t, b))
    assert torch.autograd.gradgradcheck(prompt_scores, (x, t, b))


def test_func_transforms():
    x, t, b = (randn(*s, dtype=F64) for s in ((5, 3), (2, 4, 3), (2, 4)))
    works_under_torch_func(prompt_scores, (x, t, b))
    many = torch.func.vmap(prompt_scores)(torch.stack([x, -x]), torch.stack([t, t]))
    torch.testing.assert_close(many[1], prompt_scores(-x, t))


def test_reference_in_steps_is_the_same(monkeypatch):
    from solera.ensemble import prompts

    x, t = randn(6, 3), randn(5, 4, 3)
    with solera.backend("reference"):
        whole = prompt_scores(x, t)
        monkeypatch.setattr(prompts, "CHUNK", 50)
        torch.testing.assert_close(prompt_scores(x, t), whole)


@pytest.mark.no_interpreter
def test_memory_is_a_tile():
    """The whole logits here are 128 MB; the tiles of every thread together stay under a quarter of that."""
    import resource

    x, t = randn(8000, 4), randn(4, 1000, 4)
    prompt_scores(x[:1100], t)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    prompt_scores(x, t)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 * 1024


def test_opcheck():
    check = torch.library.opcheck
    x, t, b = randn(4, 5), randn(2, 3, 5), randn(2, 3)
    check(ops.prompt_scores.default, (x.t().contiguous().t(), t[:, :1].expand(2, 3, 5), b))
    check(
        ops.prompt_scores_choice.default, (x, t.transpose(0, 1).contiguous().transpose(0, 1), None)
    )
    _, choice = ops.prompt_scores_choice(x, t, b)
    grad = torch.ones((), device=DEVICE).expand(2)
    for needs in ((True, True, True), (False, True, False)):
        check(ops.prompt_scores_backward.default, (grad, x, t, choice, *needs))


def make(n):
    return randn(n, 5, grad=True), randn(3, 4, 5, grad=True), randn(3, 4, grad=True)


def test_compile():
    compiles(prompt_scores, make)


@pytest.mark.inductor
@pytest.mark.no_interpreter
def test_compile_inductor():
    compiles(prompt_scores, make, backend="inductor")


@pytest.mark.no_interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_for_any_threads(dtype):
    x, t = randn(2100, 24, dtype=dtype), randn(6, 400, 24, dtype=dtype)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y, u = x.clone().requires_grad_(), t.clone().requires_grad_()
            scores = prompt_scores(y, u)
            found.append((scores.detach(), *torch.autograd.grad(scores.sum(), (y, u))))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, found[0]))


def test_autocast_leaves_embeddings_alone():
    x, t = randn(6, 4), randn(2, 3, 4)
    want = prompt_scores(x, t)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert torch.equal(prompt_scores(x, t), want)


# ---- bad input ---------------------------------------------------------------------------------------

X, T = randn(3, 4), randn(2, 5, 4)
BAD = [
    (lambda: prompt_scores([1.0], T), TypeError, "images: expected a torch.Tensor"),
    (lambda: prompt_scores(X[0], T), ValueError, "images: expected 2 dimensions"),
    (lambda: prompt_scores(X[:0], T), ValueError, "images: expected at least one row"),
    (lambda: prompt_scores(X, T[0]), ValueError, "texts: expected 3 dimensions"),
    (lambda: prompt_scores(X, T[:, :0]), ValueError, "texts: expected at least one class"),
    (lambda: prompt_scores(X, T[..., :3]), ValueError, "texts: expected shape"),
    (lambda: prompt_scores(X, T.half()), TypeError, "texts: expected torch.float32"),
    (lambda: prompt_scores(X, T.double()), TypeError, "texts: float64"),
    (lambda: prompt_scores(X, T.to("meta")), ValueError, "texts: expected device"),
    (lambda: prompt_scores(X, T, T[0]), ValueError, "bias: expected shape"),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input_is_named(case):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()
