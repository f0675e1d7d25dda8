"""breadcrumbs, della and the masks by importance: the papers' formulas in float64, gradients, errors."""

import pytest
import torch
from helpers import DEVICE, DTYPES, assert_accurate, randn

import solera
from solera.weights import (
    breadcrumbs,
    della,
    importance_mask,
    importance_merge,
    masked_lerp_,
    prune_rewind,
)
from solera.weights._random import random_words, tensor_key

F64, F32, BF16, F16 = DTYPES


def make(count, *shapes, dtype=F64):
    base = {f"p{i}": randn(s, dtype=dtype) for i, s in enumerate(shapes)}
    models = [{k: b + randn(b.shape, dtype=dtype) for k, b in base.items()} for _ in range(count)]
    return base, models, torch.linspace(0.4, 1.2, count, dtype=F64, device=DEVICE)


def vote(kept_deltas, w):
    """TIES' merge of (K, ...) sparse deltas: elect by mass, divide by the sum of weights."""
    v = w.view(-1, *[1] * (kept_deltas.dim() - 1)) * kept_deltas
    agree = v.sign() == torch.where(v.sum(0) >= 0, 1.0, -1.0)
    divisor = (agree * w.view(-1, *[1] * (v.dim() - 1))).sum(0)
    return (v * agree).sum(0) / torch.where(divisor.abs() < 1e-8, 1, divisor)


def test_breadcrumbs_against_the_papers_formula():
    base, models, w = make(3, (40, 25), (30,))
    for density, gamma in ((0.5, 0.1), (0.9, 0.3), (0.3, 0.0)):
        ours = breadcrumbs(base, models, w, density, gamma)
        elected = breadcrumbs(base, models, w, density, gamma, consensus="mass", divide="weight")
        for key, b in base.items():
            sparse = []
            for model in models:
                d = (model[key] - b).flatten()
                n, order = d.numel(), d.abs().argsort(descending=True)
                kept = int(density * n)
                top = min(int(gamma * n), n - kept)
                mask = torch.zeros(n, dtype=F64, device=DEVICE)
                mask[order[top : top + kept]] = 1
                sparse.append((d * mask).view(b.shape))
            sparse = torch.stack(sparse)
            assert_accurate(ours[key], b + torch.einsum("k,k...->...", w, sparse))
            assert_accurate(elected[key], b + vote(sparse, w))
    whole = breadcrumbs(base, models, w, 0.5, 0.1, scope="model")
    every = torch.cat([(models[0][k] - base[k]).flatten() for k in base]).abs()
    top, low = int(0.1 * 1030), every.sort(descending=True).values[int(0.1 * 1030) + 515 - 1]
    one = breadcrumbs(base, models[:1], w[:1], 0.5, 0.1, scope="model")
    changed = torch.cat([(one[k] != base[k]).flatten() for k in base])
    assert changed.sum() == 515 and every[changed].min() == low and whole.keys() == base.keys()
    assert every[changed].max() == every.sort(descending=True).values[top]
    with pytest.raises(ValueError, match=r"gamma: expected a finite number in \[0, 1\]"):
        breadcrumbs(base, models, w, 0.5, 2)


def test_della_against_the_papers_formula():
    base, models, w = make(3, (12, 25), (30,), (3, 4, 5), ())
    density, epsilon = 0.6, 0.25
    for rescale in ("probability", "l1", None):
        ours = della(base, models, w, density, epsilon=epsilon, rescale=rescale, seed=9)
        for key, b in base.items():
            sparse = []
            for k, model in enumerate(models):
                d = (model[key] - b).reshape(b.shape[0] if b.dim() > 1 else 1, -1)
                ranks = d.abs().argsort(1).argsort(1).double()
                p = torch.full_like(d, density)
                if d.shape[1] > 1:
                    p = density - epsilon + 2 * epsilon * ranks / (d.shape[1] - 1)
                words = random_words(9, tensor_key(key), k, d.numel(), DEVICE).view(d.shape)
                mask = words < (p * 2**32).round()
                kept = d * mask
                if rescale == "probability":
                    kept = kept / p
                elif rescale == "l1" and mask.any():
                    kept = kept * d.abs().sum() / kept.abs().sum()
                sparse.append(kept.view(b.shape))
            assert_accurate(ours[key], b + vote(torch.stack(sparse), w))
    # Large entries are kept more often than small ones, all of them `density` of the time.
    zero, ramp = (
        torch.zeros(1, 40000, device=DEVICE),
        torch.arange(40000.0, device=DEVICE)[None] + 1,
    )
    kept = della(zero, [ramp], [1.0], 0.5, epsilon=0.4, rescale=None, seed=1)[0] > 0
    assert abs(kept.float().mean() - 0.5) < 0.01
    assert kept[:4000].float().mean() < 0.2 and kept[-4000:].float().mean() > 0.8


def test_della_gradients_dtypes_and_errors():
    base, models, w = make(2, (3, 7))
    leaves = [
        w.requires_grad_(),
        *(t.requires_grad_() for t in (base["p0"], *[m["p0"] for m in models])),
    ]
    merge = lambda w, b, *tensors: della(b, tensors, w, 0.5, epsilon=0.2, seed=1)
    assert torch.autograd.gradcheck(merge, leaves)
    half = [t.detach().to(BF16) for t in leaves[1:]]
    assert della(half[0], half[1:], w.detach(), 0.5, epsilon=0.2, seed=1).dtype == BF16
    with pytest.raises(ValueError, match="epsilon: expected density - epsilon"):
        della(base, models, [1, 1], 0.9, epsilon=0.2, seed=1)
    crumbs = lambda w, b, *tensors: breadcrumbs(b, tensors, w, 0.5, 0.1)
    assert torch.autograd.gradcheck(crumbs, leaves)


# ---- importance --------------------------------------------------------------------------------------


def spider_mask(w0, gsum):
    z = lambda x: (x - x.mean()) / x.std()
    before, after = torch.sigmoid(z(w0.abs())), torch.sigmoid(z(gsum.abs()))
    r = (before < after) * after / (before + after)
    return (r / r[r != 0].mean()).clamp(max=1)


def test_importance_merge_against_the_papers_formula():
    """SPIDER: the mask, the merge after each step, lists and state dicts."""
    w0, w, g = (randn(30, 20, dtype=F64) for _ in range(3))
    m = spider_mask(w0, g)
    assert_accurate(importance_mask(w0, g), m)
    assert (m == 0).any() and (m == 1).any()
    truth = (1 - m) * w0 + m * w
    assert_accurate(importance_merge(w0, w, g), truth)
    stepped = w.clone()
    assert masked_lerp_(stepped, w0, importance_mask(w0, g)) is stepped
    assert_accurate(stepped, truth)
    assert torch.equal(stepped[m == 0], w0[m == 0]) and torch.equal(stepped[m == 1], w[m == 1])
    base = {"w": w0, "n": torch.tensor(2, device=DEVICE)}
    out = importance_merge(base, {"w": w, "n": torch.tensor(2, device=DEVICE)}, {"w": g})
    assert_accurate(out["w"], truth)
    assert out["n"] == 2 and list(out) == ["w", "n"]
    assert_accurate(importance_merge([w0], [w.float()], [g])[0], (1 - m) * w0 + m * w.float())
    half = importance_merge(w0.to(BF16), w.to(BF16), g.float())
    assert half.dtype == BF16
    leaves = [t.requires_grad_() for t in (w0, w)]
    assert torch.autograd.gradcheck(lambda a, b: importance_merge(a, b, g), leaves, fast_mode=True)


def test_importance_ends_and_errors():
    one = torch.ones(1, device=DEVICE)
    assert importance_mask(one, one) == 0 and importance_mask(one[:0], one[:0]).shape == (0,)
    flat = torch.ones(5, device=DEVICE)
    assert torch.equal(importance_mask(flat, flat), torch.zeros_like(flat))  # nothing stands out
    mask = torch.tensor([True, False, True], device=DEVICE)
    w = torch.tensor([1.0, 2.0, float("nan")], device=DEVICE)
    assert masked_lerp_(w, torch.tensor([7.0, 8.0, 9.0], device=DEVICE), mask)[:2].tolist() == [
        1,
        8,
    ]
    with pytest.raises(ValueError, match="gradient_sum: expected shape"):
        importance_mask(flat, one)
    with pytest.raises(ValueError, match="weight: expanded"):
        masked_lerp_(one.expand(5), flat, flat)
    with pytest.raises(ValueError, match="gradient_sum: keys differ"):
        importance_merge({"a": flat}, {"a": flat}, {"b": flat})


def test_prune_rewind_against_the_papers_formula():
    a, source = randn(2, 3, 50, dtype=F64, grad=True), randn(2, 3, 50, dtype=F64, grad=True)
    for percentile in (0.0, 0.37, 1.0):
        low = int(percentile * 300)
        order = a.detach().flatten().abs().argsort()
        kept = torch.ones(300, dtype=torch.bool, device=DEVICE)
        kept[order[:low]] = False
        kept = kept.view(a.shape)
        assert torch.equal(prune_rewind(a, percentile=percentile), torch.where(kept, a, 0))
        ours = prune_rewind(a, source, percentile=percentile)
        assert torch.equal(ours, torch.where(kept, a, source))
        da, ds = torch.autograd.grad(ours.sum(), (a, source))
        assert torch.equal(da, kept.double()) and torch.equal(ds, 1 - kept.double())
    with solera.backend("reference"):
        assert prune_rewind(a, percentile=0.5).count_nonzero() == 150
    with pytest.raises(ValueError, match="percentile: expected"):
        prune_rewind(a, percentile=50)
