"""Interpolations and means by angle against their formulas, written out on vectors in float64."""

import math

import pytest
import torch
from function_checks import agrees_with_formula, compiles, differentiates, works_under_torch_func
from helpers import DEVICE, DTYPES, INTERPRETED, randn, relative_error

import solera
from solera.norm import linear_cka
from solera.weights import (
    gram,
    karcher_mean,
    lincomb,
    model_stock,
    multi_slerp,
    principal_aggregate,
    slerp,
    softmax_margin_ce,
)

F64 = torch.float64


def rows_of(t, dim):
    """(rows, elements) of a tensor, and the way back."""
    if dim is None or t.dim() < 2:
        return t.reshape(1, -1), lambda r: r.reshape(t.shape)
    moved = t.movedim(dim, 0)
    return moved.flatten(1), lambda r: r.reshape(moved.shape).movedim(0, dim)


def by_rows(formula, tensors, dim):
    """formula(vectors...) applied to each row of the tensors."""
    rows = [rows_of(t, dim) for t in tensors]
    back = rows[0][1]
    return back(torch.stack([formula(*vectors) for vectors in zip(*(r for r, _ in rows))]))


def slerp_formula(a, b, t, base=None, dim=None):
    def one(a, b):
        angle = torch.acos((a @ b) / (a.norm() * b.norm()))
        return (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)

    if base is None:
        return by_rows(one, (a, b), dim)
    return base + by_rows(one, (a - base, b - base), dim)


def sphere_mean_formula(tensors, w, base, dim, iterations):
    w = w / w.sum()

    def one(*vectors):
        x = torch.stack(vectors)
        norms = x.norm(dim=1, keepdim=True)
        u = x / norms
        m = w @ u
        m = m / m.norm()
        for _ in range(iterations):
            cos = u @ m
            angle = torch.acos(cos)
            tangent = (w * angle / torch.sin(angle)) @ (u - cos[:, None] * m)
            length = tangent.norm()
            m = torch.cos(length) * m + torch.sin(length) * tangent / length
            m = m / m.norm()
        return (w @ norms) * m

    if base is None:
        return by_rows(one, tensors, dim)
    return base + by_rows(one, [t - base for t in tensors], dim)


def model_stock_formula(base, tensors, dim=None):
    ratios = []

    def one(base, *vectors):
        deltas, K = [v - base for v in vectors], len(vectors)
        pairs = [
            deltas[i] @ deltas[j] / (deltas[i].norm() * deltas[j].norm())
            for i in range(K)
            for j in range(i)
        ]
        cos = (sum(pairs) / len(pairs)).clamp(0, 1)
        t = K * cos / (1 + (K - 1) * cos)
        ratios.append(t)
        return t * sum(vectors) / K + (1 - t) * base

    merged = by_rows(one, [base, *tensors], dim)
    return merged, torch.stack(ratios) if dim is not None else ratios[0]


def near(base, count, spread=1.0, shared=1.0):
    """Models around a base whose differences have a part in common."""
    common = randn(*base.shape, dtype=F64)
    return [
        (base.double() + shared * common + spread * randn(*base.shape, dtype=F64)).to(base.dtype)
        for _ in range(count)
    ]


@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize("dim", [None, 0, -1])
def test_slerp(dim, with_base):
    shapes = [(4, 30)] if INTERPRETED else [(4, 30), (3, 5, 4), (2, 3, 2, 2)]
    for shape in shapes:
        tensors = [randn(*shape, grad=True) for _ in range(2 + with_base)]
        t = torch.tensor(0.3, device=DEVICE, requires_grad=True)

        def ours(a, b, t, base=None):
            return slerp(a, b, t, base=base, dim=dim)

        def formula(a, b, t, base=None):
            return slerp_formula(a, b, t, base, dim)

        # The gradient to t, one dot that may cancel, is judged in float64 below.
        fixed = [*tensors[:2], t.detach(), *tensors[2:]]
        agrees_with_formula(ours, formula, fixed, 5e-6)
        y = ours(tensors[0], tensors[1], 0.3, *tensors[2:])
        assert y.is_contiguous()
    differentiates(ours, [x[:2] for x in tensors[:2]] + [t] + [x[:2] for x in tensors[2:]])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_slerp_dtypes_and_ends(dtype):
    a, b = randn(50, dtype=dtype), randn(50, dtype=dtype)
    y = slerp(a, b, 0.25)
    assert y.dtype == dtype
    exact = slerp_formula(a.double(), b.double(), 0.25)
    assert relative_error(y, exact) < {2: 8e-3, 4: 1e-6, 8: 1e-13}[a.element_size()]
    assert torch.equal(slerp(a, b, 0.0), a) and relative_error(slerp(a, b, 1.0), b.double()) < 1e-6
    norm = slerp(a / a.norm(), b / b.norm(), 0.7).double().norm()
    assert abs(norm - 1) < 10 * torch.finfo(dtype).eps


def test_slerp_of_colinear_and_zero_vectors_is_linear():
    a, zero = randn(40), torch.zeros(40, device=DEVICE)
    for b in (a * 3, -a, a + 1e-3 * randn(40), zero):
        assert relative_error(slerp(a, b, 0.3), 0.7 * a.double() + 0.3 * b.double()) < 1e-6
    wide = a + 0.1 * randn(40)
    cos = torch.cosine_similarity(a, wide, 0).item()
    lerp = 0.7 * a.double() + 0.3 * wide.double()
    assert relative_error(slerp(a, wide, 0.3, colinear=cos - 1e-4), lerp) < 1e-6
    assert relative_error(slerp(a, wide, 0.3, colinear=cos + 1e-4), lerp) > 1e-5
    # The other branch leaves no NaN in the gradients.
    x, y = (torch.stack([a, a]).requires_grad_() for _ in range(2))
    t = torch.tensor(0.3, device=DEVICE, requires_grad=True)
    grads = torch.autograd.grad(slerp(x, y, t, dim=0).sum(), [x, y, t])
    assert all(g.isfinite().all() for g in grads)
    nan = torch.full((40,), float("nan"), device=DEVICE)
    out = slerp([a, nan], [wide, wide], 0.3)
    assert out[0].isfinite().all() and out[1].isnan().all()


def test_slerp_of_lists_and_state_dicts():
    shapes = [(3, 4), (5,), (2, 3, 2)]
    a, b = ([randn(*s) for s in shapes] for _ in range(2))
    for dim in (None, 0, -1):
        for t in (0.4, torch.tensor(0.4, device=DEVICE)):
            out = slerp(a, b, t, dim=dim)
            for y, x, z in zip(out, a, b):
                assert (
                    relative_error(y, slerp_formula(x.double(), z.double(), 0.4, None, dim)) < 1e-6
                )
        ts = torch.tensor([0.1, 0.5, 0.9], device=DEVICE)
        out = slerp(a, b, ts, dim=dim)
        for y, x, z, t in zip(out, a, b, ts.tolist()):
            assert relative_error(y, slerp_formula(x.double(), z.double(), t, None, dim)) < 1e-6
    whole = torch.tensor(7, device=DEVICE)
    da = {"w": a[0], "n": whole, "b": a[1]}
    out = slerp(da, {"b": b[1], "w": b[0], "n": whole.clone()}, 0.4)
    assert list(out) == ["w", "n", "b"] and torch.equal(out["n"], whole)
    assert torch.equal(out["w"], slerp(a[0], b[0], 0.4))


@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize("dim", [None, 0])
def test_multi_slerp_and_karcher_mean(dim, with_base):
    base = randn(3, 12) if with_base else None
    tensors = [randn(3, 12) + 1 for _ in range(4)]
    w = torch.tensor([0.1, 0.5, 1.0, 0.4], device=DEVICE)

    def both(kind, iterations):
        def ours(w, *tensors):
            models, b = (tensors[:-1], tensors[-1]) if with_base else (tensors, None)
            if kind == "multi":
                return multi_slerp(models, w, base=b, dim=dim)
            return karcher_mean(
                models, w, base=b, dim=dim, max_iterations=iterations, tolerance=0.0
            )

        def formula(w, *tensors):
            models, b = (tensors[:-1], tensors[-1]) if with_base else (tensors, None)
            return sphere_mean_formula(models, w, b, dim, iterations)

        return ours, formula

    inputs = [t.requires_grad_() for t in (w, *tensors, *([base] if with_base else []))]
    agrees_with_formula(*both("multi", 1), inputs, 5e-6)
    agrees_with_formula(*both("karcher", 4), inputs, 5e-6)
    differentiates(both("multi", 1)[0], [x[..., :4] for x in inputs])


def test_karcher_mean_is_stationary_and_agrees_with_slerp():
    tensors = [randn(200, dtype=F64) + 1 for _ in range(5)]
    u = torch.stack([t / t.norm() for t in tensors])
    m = karcher_mean(tensors, max_iterations=100, tolerance=1e-12)
    assert abs(m.norm() - sum(t.norm() for t in tensors) / 5) < 1e-10
    m = m / m.norm()
    angles = torch.acos(u @ m)
    gradient = ((angles / torch.sin(angles))[:, None] * (u - (u @ m)[:, None] * m)).sum(0)
    assert gradient.norm() < 1e-10
    a, b = u[0], u[1]
    for t in (0.2, 0.5, 0.9):
        two = karcher_mean([a, b], [1 - t, t], max_iterations=100, tolerance=1e-12)
        assert relative_error(two, slerp(a, b, t)) < 1e-10
    # A tolerance ends each tensor's own iterations.
    loose = karcher_mean(tensors, tolerance=10.0)
    assert relative_error(loose, karcher_mean(tensors, max_iterations=0)) < 1e-12
    one = karcher_mean([a * 3])
    assert relative_error(one, a * 3) < 1e-12


def test_sphere_means_of_zero_and_cancelling_vectors():
    a, zero = randn(30), torch.zeros(30, device=DEVICE)
    assert relative_error(karcher_mean([zero, a]), a.double() / 2) < 1e-6
    assert not karcher_mean([zero, zero]).any()
    opposed = karcher_mean([a, -a])
    assert opposed.isfinite().all()
    same = [a.clone().requires_grad_() for _ in range(3)]
    grads = torch.autograd.grad(karcher_mean(same).sum(), same)
    assert all(g.isfinite().all() for g in grads)
    assert relative_error(karcher_mean(same), a.double()) < 1e-6


@pytest.mark.parametrize("dim", [None, 0, 1])
@pytest.mark.parametrize("count", [2, 3, 8])
def test_model_stock(count, dim):
    base = randn(5, 16)
    tensors = near(base, count)
    inputs = [base.requires_grad_(), *(t.requires_grad_() for t in tensors)]

    def ours(base, *tensors):
        merged, ratio = model_stock(base, tensors, dim=dim)
        return merged, ratio.reshape(-1).to(base.dtype)

    def formula(base, *tensors):
        merged, ratio = model_stock_formula(base, tensors, dim)
        return merged, ratio.reshape(-1)

    agrees_with_formula(ours, formula, inputs, 3e-6)
    merged, ratio = model_stock(base, tensors, dim=dim)
    assert ratio.dtype == F64 and ratio.shape == (() if dim is None else (5, 16)[dim : dim + 1])
    assert ((ratio >= 0) & (ratio <= 1)).all()
    if count == 2:
        differentiates(ours, [t[:2, :4] for t in inputs])


def test_model_stock_limits_lists_and_dtypes():
    base = randn(40)
    delta = randn(40)
    merged, ratio = model_stock(base, [base + delta, base + delta])
    assert abs(ratio - 1) < 1e-6 and relative_error(merged, (base + delta).double()) < 1e-6
    merged, ratio = model_stock(base, [base + delta, base - delta])
    assert ratio == 0 and torch.equal(merged, base)
    merged, ratio = model_stock(base, [base, base + delta])
    assert ratio == 0 and torch.equal(merged, base)
    # Two at an angle of 60 degrees: 2 cos / (1 + cos) = 2/3.
    two = torch.zeros(2, 2, dtype=F64, device=DEVICE)
    two[0, 0], two[1, 0], two[1, 1] = 1, 0.5, math.sqrt(0.75)
    merged, ratio = model_stock(torch.zeros(2, dtype=F64, device=DEVICE), list(two))
    assert abs(ratio - 2 / 3) < 1e-12 and relative_error(merged, two.mean(0) * 2 / 3) < 1e-12
    shapes = [(4, 6), (6,), (1,)]
    bases = [randn(*s) for s in shapes]
    models = list(zip(*(near(b, 3) for b in bases)))
    for dim in (None, 0):
        merged, ratios = model_stock(bases, models, dim=dim)
        for item, b in enumerate(bases):
            exact, t = model_stock_formula(
                b.double(), [m[item].double() for m in models], dim if b.dim() > 1 else None
            )
            assert relative_error(merged[item], exact) < 1e-6
            assert (ratios[item] - t).abs().max() < 1e-6
    named, ratios = model_stock({"w": bases[0]}, [{"w": m[0]} for m in models], dim=0)
    assert ratios["w"].shape == (4,) and named["w"].shape == (4, 6)
    half = [near(randn(100).to(d), 3) for d in (torch.bfloat16, torch.float16)]
    for models in half:
        assert model_stock(models[0], models[1:])[0].dtype == models[0].dtype


def principal_formula(G, ratio):
    """FedLD's update of one layer, client by client, with the SVD."""
    K = len(G)
    u, s, _ = torch.linalg.svd(G @ G.T / K)
    total = 0
    for g in G:
        for j in range(int(K * ratio)):
            v = G.T @ u[:, j]
            total = total + s[j] / s.sum() * g.norm() * (g @ v).sign() * v / v.norm()
    return total / K


def test_principal_aggregate_is_fedlds():
    for count, n, ratio in ((4, 60, 0.5), (5, 40, 1.0), (3, 50, 0.4), (2, 30, 0.5)):
        deltas = [randn(n) + 0.5 for _ in range(count)]
        G = torch.stack(deltas).double()
        assert (
            relative_error(principal_aggregate(deltas, ratio), principal_formula(G, ratio)) < 2e-6
        )
    lists = [[randn(3, 4), randn(1)] for _ in range(3)]
    out = principal_aggregate(lists, 0.7)
    G = torch.stack([m[0].flatten() for m in lists]).double()
    assert relative_error(out[0], principal_formula(G, 0.7).reshape(3, 4)) < 2e-6
    # A layer of one number is its mean; updates that are all zero stay so.
    assert relative_error(out[1], sum(m[1].double() for m in lists) / 3) < 1e-6
    assert not principal_aggregate([torch.zeros(4, device=DEVICE)] * 2, 0.5).any()
    with pytest.raises(ValueError, match=r"ratio: 0\.1 of 3 directions leaves none"):
        principal_aggregate(lists, 0.1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_softmax_margin_ce_is_fedlds(dtype):
    z, y = randn(6, 5, dtype=dtype, grad=True), torch.tensor([0, 1, 4, 2, 2, 3], device=DEVICE)

    def formula(z):
        p = z.softmax(1)
        loss = torch.nn.functional.cross_entropy(z, y) + 0.3 * torch.log(1 + p.norm() ** 2)
        return loss[None]

    assert softmax_margin_ce(z, y, 0.3).shape == ()
    agrees_with_formula(lambda z: softmax_margin_ce(z, y, 0.3)[None], formula, [z])
    if dtype == F64:
        differentiates(lambda z: softmax_margin_ce(z, y, 0.3), [z])
    with pytest.raises(ValueError, match=r"target: expected shape \(6,\)"):
        softmax_margin_ce(z, y[:2], 0.3)


def test_pareto_direction_from_the_gram():
    # Pareto Domain Adaptation: simplex weights over the objectives' gradients chosen on their Gram alone; here those
    # of the least norm among two, whose closed form is clamp(<g2 - g1, g2> / |g1 - g2|^2).
    for spread in (0.1, 1.0, 3.0):
        a = [randn(30, dtype=F64), randn(4, 5, dtype=F64)]
        b = [spread * randn(30, dtype=F64) + x.mean() for x in (a[0],)] + [a[1] * spread]
        G = gram([a, b]).sum(0)
        alpha = ((G[1, 1] - G[0, 1]) / (G[0, 0] - 2 * G[0, 1] + G[1, 1])).clamp(0, 1)
        d = lincomb([a, b], torch.stack([alpha, 1 - alpha]))
        flat = lambda m: torch.cat([t.flatten() for t in m])
        grid = torch.linspace(0, 1, 2001, dtype=F64, device=DEVICE)[:, None]
        norms = (grid * flat(a) + (1 - grid) * flat(b)).norm(dim=1)
        assert flat(d).norm() <= norms.min() + 1e-12
        assert min(flat(d) @ flat(a), flat(d) @ flat(b)) >= flat(d).square().sum() - 1e-9


def test_model_zoo_average_path_and_similarity():
    # A Model Zoo on Phase Transitions: average of the zoo, the path between two members, similarity of members.
    zoo = [[randn(6, 5), randn(6)] for _ in range(4)]
    average = lincomb(zoo, [0.25] * 4)
    for item in range(2):
        assert relative_error(average[item], sum(m[item].double() for m in zoo) / 4) < 1e-6
    for t in (0.0, 0.3, 1.0):
        point = lincomb([zoo[1]], [t], base=zoo[0])
        exact = (1 - t) * zoo[0][0].double() + t * zoo[1][0].double()
        assert relative_error(point[0], exact) < 1e-6
    x, y = randn(20, 6, dtype=F64), randn(20, 6, dtype=F64)
    xc, yc = x - x.mean(0), y - y.mean(0)
    exact = (yc.T @ xc).square().sum() / ((xc.T @ xc).norm() * (yc.T @ yc).norm())
    assert abs(linear_cka(x, y) - exact) < 1e-10
    distance = gram([zoo[1]], base=zoo[0])[:, 0, 0].sum().sqrt()
    exact = sum((p - q).double().square().sum() for p, q in zip(*zoo[:2])).sqrt()
    assert abs(distance - exact) < 1e-5


def test_bad_input():
    a, b = torch.ones(3, device=DEVICE), torch.ones(3, device=DEVICE)
    for call, kind, message in (
        (lambda: slerp(a, torch.ones(4, device=DEVICE), 0.5), ValueError, r"^b: expected shape \(3,\) \(that of a\)"),
        (lambda: slerp(a, [b], 0.5), TypeError, "^b: expected a tensor"),
        (lambda: slerp(a, b, "x"), TypeError, "t: expected a number"),
        (lambda: slerp(a, b, torch.ones(2, device=DEVICE)), ValueError, r"t: expected shape \(\)"),
        (lambda: slerp([a], [b], torch.ones(2, device=DEVICE)), ValueError, r"t: expected shape \(\) or \(1,\)"),
        (lambda: slerp(a, b, 0.5, colinear=2), ValueError, "colinear: expected a finite number in"),
        (lambda: slerp(a[None], b[None], 0.5, dim=2), ValueError, "dim: 2 is out of range"),
        (lambda: slerp(a, b, 0.5, base=torch.ones(2, device=DEVICE)), ValueError, "base: expected shape"),
        (lambda: multi_slerp([a, b], [1.0]), ValueError, r"weights: expected shape \(2,\)"),
        (lambda: multi_slerp([a, b], ["x", 1]), TypeError, "weights: expected 2 numbers"),
        (lambda: multi_slerp([a, b], [1, -1]), ValueError, "weights: they add up to zero"),
        (lambda: karcher_mean([a, b], max_iterations=-1), ValueError, "max_iterations: expected"),
        (lambda: karcher_mean([a, b], tolerance=-1), ValueError, "tolerance: expected"),
        (lambda: karcher_mean([]), ValueError, "tensors: expected at least one model"),
        (lambda: model_stock(a, [b]), ValueError, "tensors: expected at least two models, got 1"),
        (lambda: model_stock(a, b), TypeError, "tensors: expected a list of K"),
        (lambda: model_stock(None, [a, b]), TypeError, "base: expected a tensor"),
        (lambda: principal_aggregate([], 0.5), ValueError, "deltas: expected at least one"),
        (lambda: principal_aggregate([a, a[:2]], 1), ValueError, r"deltas\[1\]: expected shape .*deltas\[0\]"),
        (lambda: softmax_margin_ce(a[None], torch.zeros_like(a[:1]).long(), "x"), TypeError, "weight: expected"),
        (lambda: principal_aggregate([a, b], 2.0), ValueError, "ratio: expected"),
        (lambda: softmax_margin_ce(a, b, 1.0), ValueError, "logits: expected 2 dimensions"),
    ):  # fmt: skip
        with pytest.raises(kind, match=message):
            call()


def test_contract_with_torch():
    def f(t, a, b):
        merged, ratio = model_stock(a * 0, [b, b + a, a * 2], dim=0)
        turned = slerp(a, b, t) + karcher_mean([a, b, a + b], max_iterations=1)
        return turned + merged * ratio.sum().to(a.dtype)

    def make(n):
        return [torch.tensor(0.3, device=DEVICE, requires_grad=True)] + [
            randn(n, 5, grad=True) for _ in range(2)
        ]

    compiles(f, make, rtol=1e-4, atol=1e-5)
    a, b = randn(4, 5, grad=True), randn(4, 5, grad=True)
    works_under_torch_func(lambda a, b: slerp(a, b, 0.3, dim=0), [a, b])
    works_under_torch_func(lambda a, b: model_stock(a * 0, [a, b])[0], [a, b])
    with solera.backend("reference"):
        expected = slerp(a, b, 0.3), karcher_mean([a, b], dim=0)
    torch.testing.assert_close((slerp(a, b, 0.3), karcher_mean([a, b], dim=0)), expected)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        torch.testing.assert_close(slerp(a, b, 0.3), expected[0])
