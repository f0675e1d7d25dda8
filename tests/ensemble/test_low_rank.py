"""Blocks, two heads, banks, fusion and merging of low-rank layers, against their formulas."""

import pytest
import torch
import torch.nn.functional as F
from function_checks import agrees_with_formula, compiles
from helpers import DEVICE, double, randn

from solera.ensemble import (
    adapter_bank_mix,
    adapter_fusion,
    average_lora,
    goat_split,
    hydra_linear,
    hydra_merge,
    melora_linear,
    melora_merge_,
    rank_one_shift,
)


def differentiates_in_one_direction(function, tensors):
    """First and second derivatives along a random direction: the core's are tested element by element."""
    assert torch.autograd.gradcheck(function, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


HALF_AND_WHOLE = (torch.float32, torch.bfloat16)


def melora(dtype=torch.float64, rows=7, n=3, r=2, inner=12, out=9):
    return (
        randn(rows, inner, dtype=dtype, grad=True),
        randn(out, inner, dtype=dtype, scale=0.3, grad=True),
        randn(n, r, inner // n, dtype=dtype, grad=True),
        randn(n, out // n, r, dtype=dtype, grad=True),
        randn(out, dtype=dtype, grad=True),
    )


def melora_formula(x, weight, a, b, bias, scales):
    n = a.shape[0]
    parts = [scales[i] * (x.chunk(n, -1)[i] @ a[i].T) @ b[i].T for i in range(n)]
    return F.linear(x, weight, bias) + torch.cat(parts, -1)


@pytest.mark.parametrize("dtype", HALF_AND_WHOLE, ids=str)
def test_melora(dtype):
    ours = lambda *t: melora_linear(*t[:4], bias=t[4], scaling=0.5)
    agrees_with_formula(
        ours, lambda *t: melora_formula(*t, [0.5] * 3), melora(dtype, rows=40), allowed=3e-7
    )
    scales = torch.tensor([0.5, 1.0, -2.0], device=DEVICE, dtype=dtype)
    ours = lambda *t: melora_linear(*t[:4], bias=t[4], scaling=scales)
    formula = lambda *t: melora_formula(*t, [0.5, 1.0, -2.0])
    agrees_with_formula(ours, formula, melora(dtype, rows=40), allowed=0.01)


def test_melora_merged_is_the_same_layer_and_differentiates():
    x, weight, a, b, bias = melora()
    y = melora_linear(x, weight, a, b, bias=bias, scaling=0.5)
    merged = weight.detach().clone()
    assert melora_merge_(merged, a, b, scaling=0.5) is merged
    torch.testing.assert_close(F.linear(x, merged, bias), y)
    off = merged - weight
    off[:3, :4] = off[3:6, 4:8] = off[6:, 8:] = 0
    assert not off.any()
    differentiates_in_one_direction(
        lambda *t: melora_linear(*t[:4], bias=t[4]), melora(rows=2, n=2, r=1, inner=4, out=4)
    )
    with pytest.raises(ValueError, match=r"scaling: expected shape \(\d+,\) to go with weight of"):
        melora_merge_(
            torch.zeros(8, 6), torch.zeros(2, 2, 3), torch.zeros(2, 4, 2), scaling=torch.ones(3)
        )
    with pytest.raises(TypeError, match=r"b: float64 with weight of torch\.float32"):
        melora_merge_(torch.zeros(8, 6), torch.zeros(2, 2, 3), torch.zeros(2, 4, 2).double())
    with pytest.raises(ValueError, match="a: expected shape"):
        melora_linear(x, weight, randn(5, 2, 3, dtype=torch.float64), b)
    with pytest.raises(ValueError, match="b: expected shape"):
        melora_linear(x, weight, a, b[:, :2])


@pytest.mark.no_interpreter
def test_melora_compiles():
    def make(size):
        return [t.detach().float().requires_grad_() for t in melora(rows=size)]

    compiles(lambda *t: melora_linear(*t[:4], bias=t[4]), make)


def hydra(dtype=torch.float64, rows=6, inner=8):
    shapes = (rows, inner), (5, inner), (2, inner), (5, 2), (3, 5), (5, 3), (5,)
    return [randn(*s, dtype=dtype, scale=0.4, grad=True) for s in shapes]


def hydra_formula(x, weight, ap, bp, a, b, bias):
    z = F.linear(x, weight, bias)
    return z + 0.7 * (x @ ap.T) @ bp.T + 0.7 * (z @ a.T) @ b.T


@pytest.mark.parametrize("dtype", HALF_AND_WHOLE, ids=str)
def test_hydra(dtype):
    ours = lambda *t: hydra_linear(*t[:6], scaling=0.7, bias=t[6])
    agrees_with_formula(ours, hydra_formula, hydra(dtype, rows=30), allowed=3e-7)


def test_hydra_merged_is_the_same_layer_and_differentiates():
    tensors = hydra()
    y = hydra_linear(*tensors[:6], scaling=0.7, bias=tensors[6])
    weight, bias = hydra_merge(*tensors[1:6], scaling=0.7, bias=tensors[6])
    torch.testing.assert_close(F.linear(tensors[0], weight, bias), y)
    assert hydra_merge(*tensors[1:6])[1] is None
    differentiates_in_one_direction(
        lambda *t: hydra_linear(*t[:6], bias=t[6]), hydra(rows=2, inner=2)
    )
    with pytest.raises(
        ValueError, match=r"bias: expected shape \(\d+,\) to go with weight of shape"
    ):
        hydra_merge(
            *(torch.zeros(s) for s in ((8, 6), (2, 6), (8, 2), (3, 8), (8, 3))), bias=torch.zeros(7)
        )
    with pytest.raises(ValueError, match="a_sequential: expected shape"):
        hydra_linear(*tensors[:4], tensors[2], tensors[5])
    with pytest.raises(ValueError, match="b_parallel: expected rank 2"):
        hydra_linear(*tensors[:3], tensors[5], *tensors[4:6])


@pytest.mark.parametrize("dtype", HALF_AND_WHOLE, ids=str)
@pytest.mark.parametrize("uniform", [False, True])
def test_adapter_bank(uniform, dtype):
    S, m, D = 3, 4, 10
    h, down = randn(20, D, dtype=dtype, grad=True), randn(S, m, D, dtype=dtype, grad=True)
    up = randn(S, D, m, dtype=dtype, grad=True)
    omega = randn(*((S,) if uniform else (S, D)), dtype=dtype, grad=True)

    def formula(h, down, up, omega):
        parts = [omega[t] * (F.gelu(h @ down[t].T) @ up[t].T) for t in range(S)]
        return torch.stack(parts).sum(0)

    ours = lambda *t: adapter_bank_mix(*t, activation="gelu")
    agrees_with_formula(ours, formula, (h, down, up, omega), allowed=3e-7)
    with pytest.raises(ValueError, match=r"down: expected shape \(3, 2, 6\) to go with h of shape"):
        adapter_bank_mix(
            torch.zeros(5, 6), torch.zeros(3, 2, 7), torch.zeros(3, 6, 2), torch.zeros(3)
        )
    with pytest.raises(ValueError, match="omega: expected shape"):
        adapter_bank_mix(h, down, up, randn(S + 1, dtype=dtype))


@pytest.mark.kernel
def test_adapter_bank_with_frozen_adapters():
    h, down, up = randn(5, 6, dtype=torch.float64), randn(2, 3, 6), randn(2, 6, 3)
    omega = randn(2, 6, dtype=torch.float64, grad=True)
    down, up = down.double(), up.double()
    (got,) = torch.autograd.grad(adapter_bank_mix(h, down, up, omega).sum(), omega)
    want = torch.stack([(h @ down[t].T).relu() @ up[t].T for t in range(2)]).sum(1)
    torch.testing.assert_close(got, want)


@pytest.mark.no_interpreter
@pytest.mark.parametrize("dtype", HALF_AND_WHOLE, ids=str)
def test_adapter_fusion(dtype):
    N, K, D = 20, 3, 6
    shapes = (N, D), (K, N, D), (D, D), (D, D), (D, D), (N, D)
    tensors = [randn(*s, dtype=dtype, scale=0.5, grad=True) for s in shapes]

    def formula(h, o, q, k, v, rest):
        scores = torch.einsum("nd,knd->kn", h @ q.T, o @ k.T)
        return torch.einsum("kn,knd->nd", scores.softmax(0), o @ v.T) + rest

    ours = lambda *t: adapter_fusion(*t[:5], residual=t[5])
    agrees_with_formula(ours, formula, tensors, allowed=3e-7)
    few = (tensors[0][:2], tensors[1][:2, :2], *tensors[2:5], tensors[5][:2])
    few = [t[..., :2] if t.shape[0] < 6 else t[:2, :2] for t in few]
    differentiates_in_one_direction(ours, [double(t) for t in few])
    with pytest.raises(ValueError, match="outputs: expected shape"):
        adapter_fusion(tensors[0], tensors[1][:, 1:], *tensors[2:5])


@pytest.mark.no_interpreter
@pytest.mark.parametrize("dtype", HALF_AND_WHOLE, ids=str)
def test_rank_one_shift(dtype):
    h, w, v = randn(4, 5, 6, dtype=dtype, grad=True), *(randn(6, dtype=dtype) for _ in range(2))
    b = randn(1, dtype=dtype, grad=True)
    tensors = (h, w.requires_grad_(), b, v.requires_grad_())
    formula = lambda h, w, b, v: h + ((h @ w) + b).unsqueeze(-1) * v
    agrees_with_formula(rank_one_shift, formula, tensors, allowed=3e-7)
    differentiates_in_one_direction(rank_one_shift, [double(t) for t in (h[0, :2], w, b, v)])
    assert torch.equal(rank_one_shift(h, w, 0.0, torch.zeros_like(v)), h)
    with pytest.raises(ValueError, match=r"w: expected shape \(6,\)"):
        rank_one_shift(h, w[:3], b, v)
    with pytest.raises(ValueError, match="b: expected one element"):
        rank_one_shift(h, w, v, v)


@pytest.mark.no_interpreter
def test_average_of_adapters():
    a, b = randn(3, 2, 9, dtype=torch.float64), randn(3, 7, 2, dtype=torch.float64)
    w = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64, device=DEVICE)
    mean_a, mean_b = average_lora(a, b, w)
    torch.testing.assert_close(mean_a, 0.5 * a[0] - a[1] + 2 * a[2])
    torch.testing.assert_close(mean_b, 0.5 * b[0] - b[1] + 2 * b[2])
    only_a, only_b = average_lora(a, b, w, kind="linear_only_negate_b")
    torch.testing.assert_close(only_a, 0.5 * a[0] + a[1] + 2 * a[2])
    assert torch.equal(only_b, mean_b)
    delta = torch.einsum("k,kor,kri->oi", w, b, a)
    full_a, full_b = average_lora(a, b, w, kind="delta_w_svd", rank=6)
    torch.testing.assert_close(full_b @ full_a, delta)
    low_a, low_b = average_lora(a, b, w, kind="delta_w_svd")
    u, s, vh = torch.linalg.svd(delta)
    torch.testing.assert_close(low_b @ low_a, (u[:, :2] * s[:2]) @ vh[:2])
    for rank in (0, 8, 1.0):
        with pytest.raises(ValueError, match="rank: expected an int"):
            average_lora(a, b, w, kind="delta_w_svd", rank=rank)
    with pytest.raises(ValueError, match="kind: expected one of"):
        average_lora(a, b, w, kind="mean")


@pytest.mark.no_interpreter
def test_goat_starts_as_the_whole_weight():
    weight = randn(12, 10, dtype=torch.float64)
    rest, a, b, s = goat_split(weight, 2, 6, eta=0.5, rho=3.0)
    assert a.shape == (2, 3, 10) and b.shape == (2, 12, 3)
    assert s == pytest.approx((3 * 0.5 * 10 / 3) ** 0.5)
    torch.testing.assert_close(rest + s * sum(b[e] @ a[e] for e in range(2)), weight)
    u, sigma, vh = torch.linalg.svd(weight, full_matrices=False)
    segment = (u[:, 5:8] * sigma[5:8]) @ vh[5:8]
    torch.testing.assert_close(s * 3.0 * b[1] @ a[1], segment)
    for experts, rank in ((2, 5), (2, 12), (0, 4)):
        with pytest.raises(ValueError, match=r"(rank|experts): expected"):
            goat_split(weight, experts, rank)
