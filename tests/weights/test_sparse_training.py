"""Sparse training: masked updates, prune and grow, densities."""

import math

import pytest
import torch
from helpers import DEVICE, randn

from solera.weights import erk_density, masked_linear, masked_update_, prune_grow_


def test_masked_update_is_the_papers_formula():
    w, g = randn(5, 6, dtype=torch.float64), randn(5, 6, dtype=torch.float64)
    m, earlier = randn(5, 6) > 0, randn(5, 6) > 0.5
    want = w - 0.1 * g * m * (1 - earlier.double())
    g[~m] = float("nan")
    updated = w.clone()
    masked_update_(updated, g, m, 0.1, frozen=earlier)
    torch.testing.assert_close(updated, want)
    listed = [w.clone(), w.float()]
    masked_update_(listed, [g, g], [m, m], 0.1)
    torch.testing.assert_close(listed[0], torch.where(m, w - 0.1 * g, w))
    torch.testing.assert_close(listed[1], listed[0].float())
    # y = x (W M)^T and its gradient, which is what such a step takes.
    x, weight = randn(3, 6), randn(5, 6, grad=True)
    y = masked_linear(x, weight, m.float(), 0.5)
    torch.testing.assert_close(y, x @ (weight * m).T)
    (dw,) = torch.autograd.grad(y.sum(), weight)
    assert torch.equal(dw[~m], torch.zeros_like(dw[~m]))


@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
def test_prune_grow(fraction):
    w, score = randn(8, 10), randn(8, 10).abs()
    mask = randn(8, 10) > 0.3
    count = int(mask.sum())
    old_w, old = w * mask, mask.clone()
    w = old_w.clone()
    k = prune_grow_(w, mask, score, fraction)
    expected = min(math.floor(fraction * count + 1e-3), 80 - count)
    assert int(k) == expected and int(mask.sum()) == count
    gone, come = old & ~mask, mask & ~old
    assert int(gone.sum()) == int(come.sum()) == expected
    if 0 < expected < min(count, 80 - count):
        assert old_w[gone].abs().max() <= old_w[old & mask].abs().min()
        assert score[come].min() >= score[~old & ~mask].max()
    assert not w[gone | come].any() and torch.equal(w[old & mask], old_w[old & mask])
    torch.manual_seed(1)
    prune_grow_(w, mask, None, fraction)
    assert int(mask.sum()) == count


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_prune_grow_keeps_the_number_of_connections_whatever_the_values(value):
    w, score = randn(6), randn(6)
    w[:2] = value
    score[4:] = value
    mask = torch.tensor([True] * 3 + [False] * 3, device=DEVICE)
    for _ in range(2):
        assert prune_grow_(w, mask, score, 1.0) == 3 and mask.sum() == 3


def test_float64_weights_are_ranked_as_such():
    one = 1.0 + torch.tensor([2e-12, 0.0, 1e-12, 0.0, 0.0], dtype=torch.float64, device=DEVICE)
    score = torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0 + 1e-12], dtype=torch.float64, device=DEVICE)
    mask = torch.tensor([True] * 3 + [False] * 2, device=DEVICE)
    assert prune_grow_(one, mask, score, 0.34) == 1
    assert mask.tolist() == [True, False, True, False, True]


def test_masked_update_of_a_half_weight_is_rounded_once():
    w, g = randn(1000).bfloat16(), randn(1000)
    mask = torch.ones(1000, dtype=torch.bool, device=DEVICE)
    want = (w.double() - 0.5 * g.double()).bfloat16()
    masked_update_(w, g, mask, 0.5)
    assert (w != want).sum() <= 2  # float32 may round a tie of bfloat16 the other way
    with pytest.raises(ValueError, match="weight: expanded"):
        masked_update_(torch.zeros(1, device=DEVICE).expand(1000), g, mask, 0.5)


def test_erk_density_is_the_papers_formula():
    shapes = [(64, 3, 3, 3), (128, 64, 3, 3), (256, 128, 3, 3), (10, 256)]
    d = erk_density(shapes, 0.2)
    sizes = [math.prod(s) for s in shapes]
    assert abs(sum(a * n for a, n in zip(d, sizes)) - 0.2 * sum(sizes)) < 1e-6 * sum(sizes)
    raw = [sum(s) / n for s, n in zip(shapes, sizes)]
    free = [i for i, a in enumerate(d) if a < 1]
    ratios = [d[i] / raw[i] for i in free]
    assert max(ratios) - min(ratios) < 1e-12 and all(
        ratios[0] * raw[i] >= 1 for i in range(4) if i not in free
    )
    assert erk_density(shapes, 1.0) == pytest.approx([1.0] * 4)
    assert erk_density(shapes, 0.0) == [0.0] * 4


def test_bad_input():
    w, m = randn(3, 4), torch.ones(3, 4, dtype=torch.bool, device=DEVICE)
    cases = [
        (lambda: masked_update_(w, w, w, 0.1), TypeError, "mask: expected a bool"),
        (lambda: masked_update_(w, w, m[0], 0.1), ValueError, "mask: expected shape"),
        (lambda: masked_update_([w, w], [w], [m, m], 0.1), ValueError, "grad: expected 2"),
        (lambda: masked_update_(w, randn(2), m, 0.1), ValueError, "grad: expected shape"),
        (lambda: prune_grow_(w, m, None, 1.5), ValueError, "fraction: expected"),
        (lambda: prune_grow_(w, m, randn(2), 0.5), ValueError, "score: expected shape"),
        (lambda: erk_density([(3, 0)], 0.5), ValueError, r"shapes\[0\]: expected"),
        (lambda: erk_density([(3, 4)], 2.0), ValueError, "density: expected"),
    ]
    for call, error, message in cases:
        with pytest.raises(error, match=message):
            call()
