"""Core low_rank_update: the kernel against the formula in float64, and what is made of it alone."""

import pytest
import torch
from function_checks import agrees_with_formula, compiles, differentiates, works_under_torch_func
from helpers import DEVICE, DTYPES, INTERPRETED, assert_accurate, randn

import solera
from solera.weights import (
    householder_chain,
    householder_merge,
    householder_penalty,
    low_rank_edit_,
    merge_hydra_,
    merge_lora_,
    merge_melora_,
    project_out,
    rank_one_edit_,
)
from solera.weights.low_rank_update import low_rank_update_reference, turned

ops = torch.ops.solera
SHAPES = [(1, 1, 1), (5, 7, 2), (9, 100, 5), (4, 33, 16), (37, 130, 9)]  # rows, columns, rank


@pytest.mark.parametrize("parts", ["b", "keys", "both"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_against_float64(dtype, parts):
    for rows, columns, rank in SHAPES:
        acc = torch.float64 if dtype == torch.float64 else torch.float32
        w, a = randn(rows, columns, dtype=dtype), randn(rank, columns, dtype=acc)
        b = randn(rows, rank, dtype=acc) if parts != "keys" else None
        keys = randn(rank, columns, dtype=acc, scale=columns**-0.5) if parts != "b" else None
        got = ops.low_rank_update(w, a, b, keys)
        wide = [None if t is None else t.double() for t in (w, a, b, keys)]
        by = 0 if b is None else wide[2]
        by = by if keys is None else by - wide[0] @ wide[3].T
        eager = low_rank_update_reference(w, a, b, keys)
        assert_accurate(got, wide[0] + by @ wide[1], eager)
        in_place = w.clone()
        ops.low_rank_update_(
            [in_place], [a], [] if b is None else [b], [] if keys is None else [keys]
        )
        assert torch.equal(in_place, got)


def test_ranks_wider_than_the_kernels():
    w, a, b = randn(3, 40), randn(150, 40), randn(3, 150)
    got = ops.low_rank_update(w, a, b, a / 40)
    want = w.double() + (b.double() - w.double() @ a.double().T / 40) @ a.double()
    assert_accurate(got, want, low_rank_update_reference(w, a, b, a / 40))


def test_same_bits_for_any_batch_and_thread_count():
    w, a, keys = randn(131, 70), randn(6, 70), randn(6, 70)
    whole = ops.low_rank_update(w, a, None, keys)
    for begin, end in ((0, 1), (3, 10), (120, 131)):
        assert torch.equal(ops.low_rank_update(w[begin:end], a, None, keys), whole[begin:end])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(ops.low_rank_update(w, a, None, keys), whole)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merge_lora_chain_of_lora(dtype):
    """Chain of LoRA: merge, start anew, merge again; a list of layers, strided rows included."""
    factors = torch.float64 if dtype == torch.float64 else torch.float32
    fused = randn(12, 20, dtype=dtype)
    weights = [randn(8, 6, dtype=dtype), fused[4:9], fused.t()[3:9], randn(0, 5, dtype=dtype)]
    before = [w.double() for w in weights]
    rest = fused.clone()
    a = [randn(r, w.shape[1], dtype=factors) for r, w in zip((1, 3, 4, 2), weights)]
    b = [randn(w.shape[0], r, dtype=factors) for r, w in zip((1, 3, 4, 2), weights)]
    scales = [0.5, 2.0, -1.0, 1.0]
    chain = [weights[0], weights[1], randn(3, 3, dtype=dtype), weights[3]]
    before[2] = chain[2].double()
    a[2], b[2] = randn(4, 3, dtype=factors), randn(3, 4, dtype=factors)
    assert merge_lora_(chain, a, b, scales) is chain
    for w, old, one_a, one_b, s in zip(chain, before, a, b, scales):
        assert_accurate(w, old + s * one_b.double() @ one_a.double(), w)
    assert torch.equal(fused[:4], rest[:4]) and torch.equal(fused[9:], rest[9:])
    second = chain[0].clone()
    merge_lora_(second, a[0], b[0], 0.25)
    assert_accurate(second, chain[0].double() + 0.25 * b[0].double() @ a[0].double())


def test_merge_into_strided_weights_and_dicts():
    base = randn(9, 5)
    weight, a, b = base.t(), randn(2, 9), randn(5, 2)
    want = weight.double() + 1.5 * b.double() @ a.double()
    merge_lora_(weight, a, b, 1.5)
    assert_accurate(weight, want)
    state = {"q": randn(3, 4, grad=True), "v": randn(3, 4)}
    old = {k: v.detach().clone() for k, v in state.items()}
    a = {k: randn(2, 4) for k in state}
    b = {k: randn(3, 2) for k in state}
    version = state["q"]._version
    assert merge_lora_(state, a, b, {"q": 1.0, "v": 0.0}) is state
    assert_accurate(state["q"], old["q"].double() + b["q"].double() @ a["q"].double())
    assert torch.equal(state["v"], old["v"]) and state["q"]._version > version


def test_hydra_and_melora_merge():
    """Hydra: Multi-head Low-rank Adaptation, and Mini-Ensemble Low-Rank Adapters."""
    w, d = randn(6, 8, dtype=torch.float64), randn(6, dtype=torch.float64)
    a_p, b_p, a_s, b_s = (randn(*s, dtype=torch.float64) for s in ((2, 8), (6, 2), (2, 6), (6, 2)))
    want, want_d = solera.ensemble.hydra_merge(w, a_p, b_p, a_s, b_s, scaling=0.7, bias=d)
    x = randn(3, 8, dtype=torch.float64)
    z = x @ w.T + d
    y = z + 0.7 * x @ a_p.T @ b_p.T + 0.7 * z @ a_s.T @ b_s.T
    assert merge_hydra_(w, a_p, b_p, a_s, b_s, 0.7, bias=d) is w
    torch.testing.assert_close((w, d), (want, want_d))
    torch.testing.assert_close(x @ w.T + d, y)
    w, a, b = randn(6, 8, dtype=torch.float64), randn(2, 3, 4), randn(2, 3, 3)
    a, b = a.double(), b.double()
    want = w + torch.block_diag(0.5 * b[0], 2.0 * b[1]) @ torch.block_diag(a[0], a[1])
    assert merge_melora_(w, a, b, [0.5, 2.0]) is w
    torch.testing.assert_close(w, want)


def formula(x, u, eps=0.0, transpose=False):
    """Reflection by reflection."""
    columns = u.unbind(1)
    for r in reversed(columns) if transpose else columns:
        unit = r / (r.square().sum() + eps).sqrt()
        x = x - 2 * (x @ unit)[:, None] * unit
    return x


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hra_is_the_papers_product_of_reflections(dtype):
    """Bridging The Gap between Low-rank and Orthogonal Adaptation via Householder Reflection Adaptation."""
    for rows, d, rank in ((3, 5, 1), (7, 40, 8), (70, 33, 6)):
        x = randn(rows, d, dtype=dtype, grad=True)
        u = randn(d, rank, dtype=dtype, grad=True)
        for eps, transpose in ((0.0, False), (1e-2, True)):
            ours = lambda x, u: householder_chain(x, u, eps=eps, transpose=transpose)
            agrees_with_formula(ours, lambda x, u: formula(x, u, eps, transpose), (x, u), 1e-6)
        agrees_with_formula(householder_merge, formula, (x, u), 1e-6)
    x, u = x.detach().double(), u.detach().double()
    torch.testing.assert_close(householder_chain(householder_chain(x, u), u, transpose=True), x)
    w = randn(4, 33, dtype=torch.float64)
    torch.testing.assert_close(
        householder_chain(x, u, transpose=True) @ w.T, x @ householder_merge(w, u).T
    )
    unit = u / u.norm(dim=0)
    want = ((unit.T @ unit - torch.eye(6, device=DEVICE)) ** 2).sum()
    torch.testing.assert_close(householder_penalty(u), want)
    assert torch.equal(householder_chain(x, u[:, :0]), x)


def test_derivatives():
    differentiates(householder_chain, (randn(3, 6, grad=True), randn(6, 3, grad=True)))
    differentiates(project_out, (randn(3, 6, grad=True), randn(6, 2, grad=True)))
    differentiates(turned, [randn(3, 5, grad=True), randn(2, 5, grad=True), randn(2, 5, grad=True)])
    works_under_torch_func(householder_chain, (randn(3, 6), randn(6, 3)))


def test_unlearning_edit_is_the_rank_one_form():
    """LLM Unlearning Should Be Form-Independent: one concept's key answers with another's value."""
    w = randn(7, 9, dtype=torch.float64)
    k, v = randn(9, dtype=torch.float64), randn(7, dtype=torch.float64)
    root = randn(9, 20, dtype=torch.float64)
    for c in (root @ root.T, None):
        inverse = torch.eye(9, device=DEVICE).double() if c is None else torch.linalg.inv(c)
        want = w + torch.outer(v - w @ k, inverse @ k) / (k @ inverse @ k)
        edited = w.clone()
        assert rank_one_edit_(edited, k, v, c) is edited
        torch.testing.assert_close(edited, want)
        torch.testing.assert_close(edited @ k, v)
        keys, values = randn(9, 3, dtype=torch.float64), randn(7, 3, dtype=torch.float64)
        several = w.clone()
        low_rank_edit_(several, keys, values, c)
        middle = torch.linalg.inv(keys.T @ inverse @ keys)
        want = w + (values - w @ keys) @ middle @ keys.T @ inverse
        torch.testing.assert_close(several, want)
        torch.testing.assert_close(several @ keys, values)
    half = w.bfloat16()
    rank_one_edit_(half, k.float(), v.float())
    assert ((half.double() @ k) - v).abs().max() < 0.1


def test_keys_that_no_edit_can_answer_leave_the_weight_as_it_is():
    w, k, v = randn(4, 6), randn(6), randn(4)
    for key, several in (
        (torch.zeros_like(k), torch.stack([k, torch.zeros_like(k)], 1)),
        (torch.full_like(k, float("nan")), torch.stack([k, k / 0], 1)),
    ):
        values = torch.stack([v, v], 1)
        for run in (
            lambda edited, **how: rank_one_edit_(edited, key, v, **how),
            lambda edited, **how: low_rank_edit_(edited, several, values, **how),
        ):
            edited = w.clone()
            with pytest.raises(ValueError, match=r"keys?: expected"):
                run(edited, validate=True)
            run(edited, validate=False)
            assert torch.equal(edited, w)
    dependent = torch.stack([k, -2 * k], 1)
    with pytest.raises(ValueError, match="keys: expected finite, linearly independent"):
        low_rank_edit_(w.clone(), dependent, torch.stack([v, v], 1), validate=True)
    if w.device.type == "cpu":
        with pytest.raises(ValueError, match="key: expected a finite vector that is not zero"):
            rank_one_edit_(w, torch.zeros_like(k), v)
    # Lengths far apart are no dependence.
    keys = torch.stack([randn(6), 1e-12 * randn(6)], 1)
    low_rank_edit_(w.double(), keys.double(), values.double(), validate=True)
    assert low_rank_edit_(w, keys[:, :0], values[:, :0]) is w


def test_decor_projects_directions_out():
    """DECOR:Decomposition and Projection of Text Embeddings for Text-to-Image Customization."""
    e, v = randn(5, 8, dtype=torch.float64), randn(8, 2, dtype=torch.float64)
    projector = v @ torch.linalg.inv(v.T @ v) @ v.T
    torch.testing.assert_close(project_out(e, v, 0.6), e - 0.6 * e @ projector)
    assert (project_out(e, v) @ v).abs().max() < 1e-12
    torch.testing.assert_close(project_out(e, v[:, :1], 2.0), householder_chain(e, v[:, :1]))
    assert torch.equal(project_out(e, v[:, :0]), e)


def test_opcheck():
    w, a, b, keys = randn(5, 12), randn(3, 12), randn(5, 3), randn(3, 12)
    for view in (w, w.t().contiguous().t(), w[:1].expand(5, 12)):
        torch.library.opcheck(ops.low_rank_update.default, (view, a, b, keys))
    torch.library.opcheck(ops.low_rank_update.default, (w, a, None, keys))
    if not INTERPRETED:
        torch.library.opcheck(ops.low_rank_update_.default, ([w, w.clone()], [a, a], [b, b], []))


def test_compiles_into_one_graph():
    make = lambda n: (randn(n, 12, grad=True), randn(12, 3, grad=True))
    compiles(householder_chain, make, rtol=1e-4, atol=1e-5)


def test_empty_and_extreme():
    for shape in ((0, 5), (5, 0), (0, 0)):
        w = randn(*shape)
        merge_lora_(w, randn(2, shape[1]), randn(shape[0], 2))
        assert turned(w, randn(2, shape[1]), randn(2, shape[1])).shape == w.shape
    w = randn(5, 40)
    w[1, 3], w[2, 0] = float("inf"), float("nan")
    got = turned(w, randn(2, 40), randn(2, 40))
    assert got[[0, 3, 4]].isfinite().all() and not got[1:3].isfinite().any()
    old = randn(5, 40)
    w = old.clone()
    merge_lora_(w, randn(2, 40), torch.zeros(5, 2, device=DEVICE))
    assert torch.equal(w, old)


def test_bad_input():
    w, a, b = randn(4, 6), randn(2, 6), randn(4, 2)
    with pytest.raises(TypeError, match="weight: expected float32"):
        merge_lora_(w.long(), a, b)
    with pytest.raises(ValueError, match=r"a: expected shape \(2, 6\)"):
        merge_lora_(w, a[:, 1:], b)
    with pytest.raises(ValueError, match=r"b\[1\]: expected shape \(4, 2\)"):
        merge_lora_([w, w.clone()], [a, a], [b, b[1:]])
    with pytest.raises(ValueError, match=r"weight.* overlap"):
        merge_lora_([w, w[1:]], [a, a], [b, b[1:]])
    with pytest.raises(ValueError, match="b: expected 2 tensors like weight, got 1"):
        merge_lora_([w, w.clone()], [a, a], [b])
    with pytest.raises(ValueError, match="expanded"):
        merge_lora_(w[:1].expand(4, 6), a, b)
    with pytest.raises(ValueError, match="scale: expected 1 numbers"):
        merge_lora_([w], [a], [b], [1.0, 2.0])
    with pytest.raises(ValueError, match="scale: expected a number, or one for each entry"):
        merge_lora_(w, a, b, {"q": 1.0})
    with pytest.raises(TypeError, match="a: float64 with weight"):
        merge_lora_(w, a.double(), b)
    with pytest.raises(ValueError, match="a: expected shape"):
        merge_melora_(w, randn(4, 2, 2), randn(4, 1, 2))
    with pytest.raises(ValueError, match="b_sequential: expected shape"):
        merge_hydra_(w, a, b, randn(2, 4), randn(3, 2))
    with pytest.raises(ValueError, match="key: expected shape"):
        rank_one_edit_(w, randn(4), randn(4))
    with pytest.raises(ValueError, match="covariance: expected shape"):
        rank_one_edit_(w, randn(6), randn(4), randn(4, 4))
    with pytest.raises(ValueError, match="u: expected shape"):
        householder_chain(w, randn(4, 2))
    with pytest.raises(ValueError, match="eps: expected a finite number in"):
        householder_merge(w, randn(6, 2), eps=-1.0)
    with pytest.raises(ValueError, match="directions: expected shape"):
        project_out(w, randn(5, 1))
    for bad in ((a[:, 1:], b, None), (a, b[1:], None), (a, None, None), (a, b, a[1:])):
        with pytest.raises(Exception):  # noqa: B017 - the op itself, whatever serves it, reads nothing out of bounds
            ops.low_rank_update(w, *bad)
