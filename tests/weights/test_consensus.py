"""Core consensus by its functions ties and dare: the papers' formulas in float64, masks, gradients, contract."""

import itertools

import pytest
import torch
from helpers import DEVICE, DTYPES, INTERPRETED, assert_accurate, randn

import solera
from solera.weights import dare, ties
from solera.weights._random import keep_below, random_words, tensor_key
from solera.weights.consensus import consensus_lists, consensus_norms_reference

ops = torch.ops.solera
F64, F32, BF16, F16 = DTYPES
# The interpreter rounds to bfloat16 by cutting off.
EXACT = (F64, F32, F16) if INTERPRETED else DTYPES


def make(count, shape, dtype=F32, grad=False):
    base = randn(*shape, dtype=dtype)
    tensors = [(base.double() + randn(*shape, dtype=F64) * 0.1).to(dtype) for _ in range(count)]
    weights = torch.tensor([0.5, 1.0, -0.3, 0.7, 1.1, 0.2, 0.4, 0.9, 0.8][:count], dtype=F64)
    leaves = [weights.to(DEVICE), base, *tensors]
    return [t.requires_grad_(grad) for t in leaves]


def merge_formula(base, deltas, kept, w, factors, elect, weigh, divide, scale):
    """deltas, kept (K, ...), w, factors (K,): the definition, stacked."""
    shape = (-1,) + (1,) * base.dim()
    w, f = w.view(shape), factors.view(shape)
    v = torch.where(kept, w * f * deltas, 0)
    if elect is None:
        return base + scale * v.sum(0)
    u = v if weigh == "before" else torch.where(kept, f * deltas, 0)
    mass = u.abs() if elect == "mass" else torch.ones_like(u)
    plus, minus = (torch.where(side, mass, 0).sum(0) for side in (u > 0, u < 0))
    agree = torch.where(plus >= minus, u > 0, u < 0)
    divisor = {
        None: lambda: 1.0,
        "count": lambda: agree.sum(0),
        "weight": lambda: (agree * w).sum(0),
    }
    d = divisor[divide]()
    if divide is not None:
        d = torch.where(d.abs() < 1e-8, 1, d)
    return base + scale * torch.where(agree, v, 0).sum(0) / d


def ties_formula(base, tensors, w, density, elect="mass", weigh="before", divide="weight",
                 scope="tensor", scale=1.0):  # fmt: skip
    """Of lists in float64: thresholds by sorting."""
    deltas = [torch.stack([m[i] - base[i] for m in tensors]) for i in range(len(base))]

    def threshold(sizes):
        k = int(density * len(sizes))
        return sizes.sort(descending=True).values[k - 1] if k else float("inf")

    whole = [
        threshold(torch.cat([d[k].flatten().abs() for d in deltas])) for k in range(len(tensors))
    ]
    out = []
    for b, d in zip(base, deltas):
        each = [threshold(row.flatten().abs()) for row in d] if scope == "tensor" else whole
        kept = torch.stack([row.abs() >= t for row, t in zip(d, each)])
        one = torch.ones(len(tensors), dtype=F64, device=b.device)
        out.append(merge_formula(b, d, kept, w, one, elect, weigh, divide, scale))
    return out


CHOICES = list(
    itertools.product(
        ("mass", "count"), ("before", "after"), ("weight", "count", None), ("tensor", "model")
    )
)


@pytest.mark.parametrize("elect, weigh, divide, scope", CHOICES[:: 7 if INTERPRETED else 1])
def test_ties_against_the_papers_formula(elect, weigh, divide, scope):
    options = {"elect": elect, "weigh": weigh, "divide": divide, "scope": scope}
    w, *_ = make(4, (1,))
    base = [randn(s, dtype=F64) for s in [(30, 7), (), (700,)]]
    models = [[b + randn(b.shape, dtype=F64) for b in base] for _ in range(4)]
    for density, scale in ((0.3, 0.7), (1.0, 1.0))[: 1 if INTERPRETED else 2]:
        truth = ties_formula(base, models, w, density, scale=scale, **options)
        ours = ties(base, models, w, density, scale=scale, **options)
        for a, b in zip(ours, truth):
            assert_accurate(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [3] if INTERPRETED else [1, 3, 8, 9])
def test_the_bits_of_the_sorted_reference(count, dtype):
    for shape in [(9, 300)] if INTERPRETED else [(1,), (37,), (9, 300), (70000,)]:
        w, base, *tensors = make(count, shape, dtype)
        runs = [
            lambda: ties(base, tensors, w, 0.2),
            lambda: ties(base, tensors, w, 0.4, elect="count", weigh="after", divide="count"),
            lambda: dare(base, tensors, w, 0.3, seed=1),
            lambda: dare(base, tensors, w, 0.3, seed=1, consensus="mass", rescale="l1"),
        ]
        for run in runs[:: 2 if INTERPRETED else 1]:
            ours = run()
            with solera.backend("reference"):
                truth = run()
            assert ours.dtype == dtype and ours.shape == base.shape
            # The two sums of "l1" agree to a rounding in float64, which float32 factors do not see.
            if dtype in EXACT and not (dtype == F64 and run is runs[3]):
                assert torch.equal(ours, truth)
            else:
                assert_accurate(ours, truth.double())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "elect, weigh, divide", [c[:3] for c in CHOICES[:: 10 if INTERPRETED else 2]]
)
def test_gradients_against_the_reference(elect, weigh, divide, dtype):
    """Masks and signs are those of the same dtype, so the two differentiate one function."""
    count = 9 if divide is None else 3
    w, base, *tensors = make(count, (5, 300), dtype, grad=True)
    options = {"elect": elect, "weigh": weigh, "divide": divide, "scale": 0.6}
    g = randn(5, 300, dtype=dtype)
    for run in (
        lambda: ties(base, tensors, w, 0.4, **options),
        lambda: dare(base, tensors, w, 0.6, seed=2, consensus=elect, weigh=weigh, divide=divide),
    ):
        ours = torch.autograd.grad(run(), [w, base, *tensors], g)
        with solera.backend("reference"):
            truth = torch.autograd.grad(run(), [w, base, *tensors], g)
        terms = (g.double().norm() * (tensors[0] - base).double().norm()).item() * 10
        assert (ours[0] - truth[0]).norm() <= 3e-7 * terms
        for a, b in zip(ours[1:], truth[1:]):
            assert a.dtype == dtype
            assert_accurate(a, b.double(), b * (1 + 1e-6))


@pytest.mark.no_interpreter
def test_gradcheck_and_second_derivatives():
    w, base, *tensors = make(3, (17,), F64, grad=True)
    for divide, elect, weigh in (
        ("weight", "mass", "before"),
        ("count", "count", "after"),
        (None, "mass", "after"),
    ):

        def merge(w, base, *tensors, divide=divide, elect=elect, weigh=weigh):
            return ties(base, tensors, w, 0.6, elect=elect, weigh=weigh, divide=divide)

        assert torch.autograd.gradcheck(merge, (w, base, *tensors))
        assert torch.autograd.gradgradcheck(merge, (w, base, *tensors))
    linear = lambda w, base, *tensors: dare(base, tensors, w, 0.6, seed=4)
    assert torch.autograd.gradcheck(linear, (w, base, *tensors))
    per_tensor = w.detach()[:, None].repeat(1, 2).requires_grad_()
    lists = [[t, t[:5]] for t in tensors]
    columns = lambda w: tuple(ties([base, base[:5]], lists, w, 0.6))
    assert torch.autograd.gradcheck(columns, (per_tensor,))
    # Only what is asked for; gradients stop at a tensor even where another was made of it.
    doubled = tensors[0] * 2
    y = ties(base.detach(), [tensors[0], doubled, tensors[2].detach()], w.detach(), 0.6)
    once = torch.autograd.grad(y.sum(), tensors[0], create_graph=True)[0]
    plain = torch.autograd.grad(
        ties(base.detach(), [tensors[0], doubled, tensors[2].detach()], w.detach(), 0.6).sum(),
        tensors[0],
    )[0]
    torch.testing.assert_close(once, plain)


# ---- random masks ------------------------------------------------------------------------------------


def test_dare_against_the_papers_formula():
    base = {"a": randn(40, 30, dtype=F64), "b": randn(9, dtype=F64)}
    models = [{k: v + randn(*v.shape, dtype=F64) for k, v in base.items()} for _ in range(3)]
    w, p = torch.tensor([0.5, 0.2, 1.5], dtype=F64, device=DEVICE), [0.3, 0.5, 1.0]
    for rescale, elect in (("probability", None), ("l1", None), (None, None), ("l1", "mass")):
        ours = dare(base, models, w, p, rescale=rescale, consensus=elect, seed=-7)
        for key, b in base.items():
            deltas = torch.stack([m[key] - b for m in models])
            kept = torch.stack([
                random_words(-7, tensor_key(key), k, b.numel(), DEVICE).view(b.shape) < keep_below(p[k])
                for k in range(3)
            ])  # fmt: skip
            factors = 1 / torch.tensor(p, dtype=F64, device=DEVICE)
            if rescale == "l1":
                factors = deltas.abs().flatten(1).sum(1) / (deltas * kept).abs().flatten(1).sum(1)
            if rescale is None:
                factors = torch.ones_like(factors)
            truth = merge_formula(b, deltas, kept, w, factors, elect, "before", None, 1.0)
            assert_accurate(ours[key], truth)


def test_the_masks_are_a_function_of_seed_name_model_and_element():
    # Zero and one make the mask itself of the result; the sums were taken on one machine and hold on all.
    zero, ones = torch.zeros(3000, device=DEVICE), torch.ones(3000, device=DEVICE)
    place = torch.arange(3000, device=DEVICE)
    mask = lambda models, seed: dare(zero, [ones] * models, [0.0] * (models - 1) + [1.0], 0.25,
                                     rescale=None, seed=seed)  # fmt: skip
    found = [int((mask(m, s) * place).sum().long()) for m, s in ((1, 0), (1, 5), (2, 5), (1, -1))]
    sums = [(random_words(s, 0, m - 1, 3000) < 2**30).long() @ torch.arange(3000)
            for m, s in ((1, 0), (1, 5), (2, 5), (1, -1))]  # fmt: skip
    assert found == [int(s) for s in sums] == MASK_SUMS
    seed = torch.tensor([5], device=DEVICE)
    assert torch.equal(mask(1, seed), mask(1, 5))
    # Nothing depends on what else is merged, or on the order of a state dict.
    a, b = randn(700), randn(700)
    one = dare({"x": zero[:700]}, [{"x": a}, {"x": b}], [1, 1], 0.5, seed=3)["x"]
    both = dare(
        {"y": zero, "x": zero[:700]},
        [{"y": ones, "x": a}, {"y": ones, "x": b}],
        [1, 1],
        0.5,
        seed=3,
    )
    assert torch.equal(one, both["x"])


MASK_SUMS = [1167180, 1160558, 1127603, 1176060]


def test_densities_at_the_ends():
    w, base, *tensors = make(3, (100,))
    full = base + sum(wk * (t - base) for wk, t in zip(w.float(), tensors))
    torch.testing.assert_close(dare(base, tensors, w, 1, seed=1), full)
    for rescale in ("probability", "l1", None):
        assert torch.equal(dare(base, tensors, w, 0.0, rescale=rescale, seed=1), base)
    assert torch.equal(ties(base, tensors, w, 0.009), base)  # int(0.9) = 0 entries
    assert (ties(base, tensors, w, 0.01) != base).sum() <= 3


# ---- values and containers ---------------------------------------------------------------------------


def test_containers_and_mixed_dtypes():
    base = {"w": randn(6, 5, dtype=BF16), "steps": torch.tensor(3, device=DEVICE), "b": randn(5)}
    models = [
        {"w": randn(6, 5, dtype=d), "steps": torch.tensor(3, device=DEVICE), "b": randn(5)}
        for d in (F32, F16)
    ]
    out = ties(base, models, [1.0, 0.5], 0.5)
    assert list(out) == ["w", "steps", "b"] and out["steps"] == 3 and out["w"].dtype == F32
    wide = {k: v.double() for k, v in base.items() if k != "steps"}
    truth = ties_formula(
        list(wide.values()), [[m[k].double() for k in wide] for m in models],
        torch.tensor([1.0, 0.5], dtype=F64, device=DEVICE), 0.5,
    )  # fmt: skip
    for key, t in zip(wide, truth):
        assert_accurate(out[key], t)
    listed = ties([base["b"]], [[m["b"]] for m in models], [1.0, 0.5], 0.5)
    assert torch.equal(listed[0], out["b"])
    assert torch.equal(ties(base["b"], [m["b"] for m in models], [1.0, 0.5], 0.5), out["b"])
    leaves = [t["w"].clone().requires_grad_() for t in (base, *models)]
    y = ties(leaves[0], leaves[1:], [1.0, 0.5], 0.5)
    grads = torch.autograd.grad(y.sum(), leaves)
    assert [g.dtype for g in grads] == [BF16, F32, F16]
    assert_accurate(grads[0], 1 - grads[1].double() - grads[2].double())
    empty = torch.zeros(0, 3, device=DEVICE)
    assert ties(empty, [empty, empty], [1, 1], 0.2).shape == (0, 3)
    assert dare([empty, base["b"]], [[empty, base["b"]]], [1], 0.2, seed=1, rescale="l1")[
        0
    ].shape == (0, 3)


def test_strided_and_expanded_input():
    w, wide, other = make(1, (12, 20))[0], randn(12, 20), randn(12, 20)
    for view in (lambda t: t.t(), lambda t: t[:, ::2], lambda t: t[None].expand(3, -1, -1)):
        a, b = view(wide), view(other)
        y = ties(a, [b], w, 0.3)
        assert y.is_contiguous()
        assert torch.equal(y, ties(a.contiguous(), [b.contiguous()], w, 0.3))
    x = randn(7, 9, grad=True)
    (g,) = torch.autograd.grad(ties(torch.zeros_like(x), [x], [2.0], 1.0, divide=None).sum(), x)
    assert torch.equal(g, torch.full_like(g, 2.0))


def test_extreme_values():
    inf, nan = float("inf"), float("nan")
    base = torch.zeros(70, device=DEVICE)
    a = torch.tensor([nan, inf, 1e30, 1e-42, -0.0, 1.0, 2.0] * 10, device=DEVICE)
    y = ties(base, [a, a], [1.0, 1.0], 0.5)
    assert y[:7].isnan().tolist() == [True] + [False] * 6
    assert y[1] == inf and y[2] == 1e30 and y[3] == 0 and y[5] == 0 and y[6] == 2
    # A zero sum elects +: of 1 and -1 the positive one is kept.
    one = torch.ones(3, device=DEVICE)
    for elect in ("mass", "count"):
        assert torch.equal(ties(0 * one, [-one, one], [1.0, 1.0], 1.0, elect=elect), one)
    # Weights that cancel: the divisor is 1. Equal magnitudes at the threshold: all are kept.
    assert torch.equal(ties(0 * one, [one, -2 * one], [1.0, -1.0], 1.0), 3 * one)
    assert torch.equal(ties(0 * one, [one], [1.0], 0.4), one)


@pytest.mark.no_interpreter
def test_large_outputs_take_the_streaming_stores():
    w, base, *tensors = make(2, ((5 << 20) + 3,))
    y = ties(base, tensors, w, 0.2)
    with solera.backend("reference"):
        assert torch.equal(y, ties(base, tensors, w, 0.2))
    assert torch.equal(ties([base], [[t] for t in tensors], w, 0.2)[0], y)


def test_same_bits_for_any_thread_count_and_list():
    sizes = (40000, 3, 16384, 16385) if not INTERPRETED else (5000, 3)
    base = [randn(n) for n in sizes]
    models = [[b + randn(*b.shape) for b in base] for _ in range(3)]
    w = randn(3, grad=True)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            out = ties(base, models, w, 0.3)
            results.append((*out, *torch.autograd.grad(out, w, [t.detach() for t in out]),
                            *dare(base, models, w, 0.3, seed=1, rescale="l1")))  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))
    for item in range(len(sizes)):
        assert torch.equal(ties(base[item], [m[item] for m in models], w, 0.3), results[0][item])


# ---- the contract with torch -------------------------------------------------------------------------


def test_opcheck():
    a, b, c, g = randn(4, 6), randn(6, 4).t(), randn(3), randn(1).expand(4, 6)
    numbers, seed = torch.rand(2, 2, dtype=F64, device=DEVICE), torch.tensor([3], device=DEVICE)
    tensors, need = [a, c, b, c], [True, False, True, True]
    for base, rule in (
        ([b, c], (None, numbers * 0.1, None, None, [], [], 1, True, 1, 0.5)),
        ([], (numbers, None, numbers + 1, None, [], [], 2, False, 2, 1.0)),
        ([a, c], (numbers, None, None, seed, [0, 1], [2**31, 2**32], 0, True, 0, 1.0)),
    ):
        torch.library.opcheck(ops.consensus.default, (tensors, base, numbers, *rule))
        flags = need + [True] * len(base)
        for need_weights in (True, False):
            args = ([g, c], tensors, base, numbers, *rule, need_weights, flags)
            torch.library.opcheck(ops.consensus_backward.default, args)
    torch.library.opcheck(
        ops.consensus_norms.default, (tensors, [b, c], seed, [0, 1], [2**31, 2**30])
    )


def test_compile():
    def f(w, base, *tensors):
        return ties(base, tensors, w, 0.4) + dare(base, tensors, w, 0.5, seed=3)

    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (40, 70):
        leaves = make(3, (n,), grad=True)
        ours, plain = compiled(*leaves), f(*leaves)
        torch.testing.assert_close(ours, plain)
        g = randn(n)
        for p, q in zip(
            torch.autograd.grad(ours, leaves, g), torch.autograd.grad(plain, leaves, g)
        ):
            torch.testing.assert_close(p, q)


def test_functional_transforms_and_autocast():
    w, base, *tensors = make(3, (30,))
    loss = lambda w, t: ties(base, [t, *tensors[1:]], w, 0.4).square().sum()
    dw, dt = torch.func.grad(loss, argnums=(0, 1))(w, tensors[0])
    leaves = [w.clone().requires_grad_(), tensors[0].clone().requires_grad_()]
    plain = torch.autograd.grad(loss(*leaves), leaves)
    torch.testing.assert_close([dw, dt], list(plain))
    many = torch.rand(4, 3, dtype=F64, device=DEVICE)
    mapped = torch.func.vmap(lambda w: ties(base, tensors, w, 0.4))(many)
    torch.testing.assert_close(mapped, torch.stack([ties(base, tensors, w, 0.4) for w in many]))
    with torch.autocast(DEVICE, dtype=BF16):
        assert torch.equal(ties(base, tensors, w, 0.4), ties(base, tensors, w.clone(), 0.4))


def test_bad_input():
    w, base, *tensors = make(3, (30,))
    for error, match, call in (
        (TypeError, "base: expected a tensor", lambda: ties(None, tensors, w, 0.2)),
        (ValueError, r"tensors\[1\]: expected shape", lambda: ties(base, [base, base[:2]], [1, 1], 0.2)),
        (ValueError, "weights: expected shape", lambda: ties(base, tensors, [1, 2], 0.2)),
        (TypeError, "weights: expected a tensor or", lambda: ties(base, tensors, "abc", 0.2)),
        (TypeError, "weights: expected a floating", lambda: ties(base, tensors, torch.ones(3, dtype=torch.int64), 0.2)),
        (ValueError, r"density: expected a finite number in \[0, 1\]", lambda: ties(base, tensors, w, 1.5)),
        (ValueError, "density: expected one number or 3", lambda: ties(base, tensors, w, [0.1, 0.2])),
        (ValueError, "elect: expected", lambda: ties(base, tensors, w, 0.2, elect=None)),
        (ValueError, "consensus: expected", lambda: dare(base, tensors, w, 0.2, consensus="sum", seed=1)),
        (ValueError, "weigh: expected", lambda: ties(base, tensors, w, 0.2, weigh="during")),
        (ValueError, "scope: expected", lambda: ties(base, tensors, w, 0.2, scope="row")),
        (ValueError, "divide: 'count' has no meaning", lambda: dare(base, tensors, w, 0.2, divide="count", seed=1)),
        (ValueError, "rescale: expected", lambda: dare(base, tensors, w, 0.2, rescale="l2", seed=1)),
        (TypeError, "seed: expected an int", lambda: dare(base, tensors, w, 0.2, seed=1.5)),
        (ValueError, "seed: expected an int or one int64", lambda: dare(base, tensors, w, 0.2, seed=base)),
        (ValueError, "seed: expected an int that fits", lambda: dare(base, tensors, w, 0.2, seed=2**64)),
        (ValueError, "scale: expected a finite", lambda: ties(base, tensors, w, 0.2, scale=float("nan"))),
    ):  # fmt: skip
        with pytest.raises(error, match=match):
            call()


@pytest.mark.parametrize("backend", ["kernels", "reference"])
def test_a_part_draws_the_words_of_its_place(backend):
    n, cuts = 6000, (0, 512, 3072, 6000)
    w, base, *tensors = make(3, (n,))
    w, seed = w[:, None], torch.tensor([5], device=DEVICE)
    drawn = {"seed": seed, "keys": [11], "keep": [2**30, 2**31, 2**32]}
    whole = consensus_lists(tensors, [base], w, vote="mass", divide="weight", **drawn)[0]
    sums = ops.consensus_norms(tensors, [base], seed, [11], drawn["keep"])
    found, added = [], torch.zeros_like(sums)
    with solera.backend("reference" if backend == "reference" else "auto"):
        for begin, end in itertools.pairwise(cuts):
            part, around = [t[begin:end] for t in tensors], [base[begin:end]]
            found += consensus_lists(
                part, around, w, vote="mass", divide="weight", begins=[begin], **drawn
            )
            run = consensus_norms_reference if backend == "reference" else ops.consensus_norms
            added += run(part, around, seed, [11], drawn["keep"], [begin])
    assert torch.equal(torch.cat(found), whole)
    torch.testing.assert_close(added, sums, rtol=1e-12, atol=0)
    words = random_words(5, 11, 2, 700, DEVICE, begin=1001)
    assert torch.equal(words, random_words(5, 11, 2, 1701, DEVICE)[1001:])
    with pytest.raises(RuntimeError, match="without gradients"):
        grad = [t.clone().requires_grad_() for t in tensors]
        consensus_lists(grad, [base], w, begins=[512], **drawn)
    if solera._registry.compiled_library is not None and not INTERPRETED and DEVICE == "cpu":
        for begins in ([100], [-512], [0, 0]):
            with pytest.raises(RuntimeError, match="begin"):
                consensus_lists(tensors, [base], w, begins=begins, **drawn)
