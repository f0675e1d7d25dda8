"""Core abs_quantile: bit for bit the value that sorting gives."""

import pytest
import torch
from helpers import DEVICE, DTYPES, INTERPRETED, randn
from hypothesis import given
from hypothesis import strategies as st

import solera
from solera.weights.abs_quantile import DigitSearch, abs_quantile

ops = torch.ops.solera
SIZES = (1, 7, 600, 5000) if INTERPRETED else (1, 7, 600, 4096, 5000, 300000)


def by_sorting(tensors, base, rank):
    """The rank-th largest of all |w - b|, in the dtype the difference is taken in."""
    return in_order(tensors, base)[-rank]


def in_order(tensors, base):
    deltas = []
    for i, w in enumerate(tensors):
        acc = torch.promote_types(w.dtype, torch.float32)
        b = base[i] if base else None
        if b is not None:
            acc = torch.promote_types(acc, b.dtype)
        deltas.append((w.to(acc) - (0 if b is None else b.to(acc))).abs().double().flatten())
    every = torch.cat(deltas)
    return every.where(~every.isnan(), float("inf")).sort().values


def ranks_of(n):
    return sorted({1, n, max(1, n // 5), max(1, n // 2), max(1, n - n // 7)})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_base", [False, True])
def test_every_rank_is_the_sorted_value(dtype, with_base):
    for n in SIZES[-2:] if INTERPRETED else SIZES:
        base = [randn(n, dtype=dtype)] if with_base else []
        tensors = [randn(n, dtype=dtype), randn(n, dtype=dtype, scale=1e-3)]
        truth = [in_order([w], base) for w in tensors]
        for rank in ranks_of(n)[:2] if INTERPRETED else ranks_of(n):
            found = abs_quantile(tensors, base, 2, [rank, rank])
            assert found.dtype == torch.float64 and found.shape == (2, 1)
            assert found[:, 0].tolist() == [values[-rank].item() for values in truth]


def crowded(n):
    """Values that a bracket cannot be narrow about, or that mislead it."""
    stride = n // max(1024, min(n // 128, 65536))
    hidden = torch.zeros(n)
    hidden[stride // 2 :: stride] = torch.arange(len(hidden[stride // 2 :: stride])) + 1.0
    inf, nan = float("inf"), float("nan")
    return {
        "all equal": torch.full((n,), -3.0),
        "mostly zero": torch.where(torch.rand(n) < 0.7, 0.0, torch.randn(n)),
        "two values": torch.where(torch.rand(n) < 0.5, 1.0, -2.0),
        "the sample sees nothing else": hidden,
        "the sample sees nothing": torch.where(hidden > 0, 0.0, torch.rand(n) + 1),
        "nan and inf": torch.tensor([nan, inf, -inf, 1.0, 2.0]).repeat(n // 5 + 1)[:n],
        "tiny": torch.randn(n) * 1e-42,
        "sorted": torch.arange(n) / n,
    }


@pytest.mark.parametrize("name", list(crowded(5000)))
def test_crowded_and_misleading_values(name):
    n = 5000 if INTERPRETED else 70001
    values = crowded(n)[name].to(DEVICE)
    for dtype in (torch.float32, torch.float64)[: 1 if INTERPRETED else 2]:
        x = values.to(dtype)
        truth = in_order([x], [])
        for rank in ranks_of(n)[:2] if INTERPRETED else ranks_of(n):
            assert abs_quantile([x], [], 1, [rank])[0, 0] == truth[-rank]


def test_whole_models_mixed_dtypes_and_rank_zero():
    f64, f32, bf16, _ = DTYPES
    shapes = [(40, 30), (0,), (7,), (2000,)]
    base = [randn(s, dtype=d) for s, d in zip(shapes, (f32, f32, bf16, bf16))]
    models = [[randn(s, dtype=f32) for s in shapes], [randn(s, dtype=bf16) for s in shapes]]
    for last in (f32, f64):  # one float64 tensor among the others: keys of 64 bits
        models[1][3] = models[1][3].to(last)
        flat = [t for m in models for t in m]
        found = abs_quantile(flat, base, 2, [500, 0], True)
        assert found.shape == (2, 1) and found[1, 0] == float("inf")
        # With a float64 tensor at a position its difference is taken in float64 for both models.
        first = [*models[0][:3], models[0][3].to(last)]
        assert found[0, 0] == by_sorting(first, base, 500)
        each = abs_quantile(flat, base, 2, [3, 0, 7, 1000] * 2)
        for k in range(2):
            for item, rank in ((0, 3), (2, 7), (3, 1000)):
                w = models[k][item].to(last) if item == 3 else models[k][item]
                assert each[k, item] == by_sorting([w], [base[item]], rank)
            assert each[k, 1] == float("inf")


@given(n=st.integers(1, 300), rank=st.integers(0, 300), data=st.data())
def test_any_values(n, rank, data):
    pool = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e30, 1e-42, float("inf"), float("nan"), 2.5])
    x = torch.tensor(data.draw(st.lists(pool, min_size=n, max_size=n)), device=DEVICE)
    rank = min(rank, n)
    expected = float("inf") if rank == 0 else by_sorting([x], [], rank)
    assert abs_quantile([x], [], 1, [rank])[0, 0] == expected
    with solera.backend("reference"):
        assert abs_quantile([x], [], 1, [rank])[0, 0] == expected


def test_same_bits_for_any_thread_count_and_stride():
    x = randn(400, 300)
    found = abs_quantile([x], [], 1, [1234])
    assert torch.equal(abs_quantile([x.t()], [], 1, [1234]), found)
    assert torch.equal(abs_quantile([x[None].expand(2, -1, -1)], [], 1, [2468]), found)
    threads = torch.get_num_threads()
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            assert torch.equal(abs_quantile([x], [], 1, [1234]), found)
    finally:
        torch.set_num_threads(threads)


def test_opcheck_and_bad_ranks():
    a, b = randn(4, 6), randn(6, 4).t()
    torch.library.opcheck(ops.abs_quantile.default, ([a, b], [a], 2, [3, 4], False))
    torch.library.opcheck(ops.abs_quantile.default, ([a, b], [], 1, [5], True))
    with pytest.raises(RuntimeError, match="differs in shape"):
        ops.abs_quantile([a, randn(3)], [], 2, [1, 1], False)


@pytest.mark.no_interpreter
@pytest.mark.skipif(DEVICE != "cpu", reason="the launcher trusts its one caller")
def test_ranks_out_of_range():
    if solera._registry.compiled_library is None:
        pytest.skip("needs the compiled library")
    with pytest.raises(RuntimeError, match="rank 25 of 24"):
        ops.abs_quantile([randn(4, 6)], [], 1, [25], False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["kernels", "reference"])
def test_digits_of_parts_find_what_all_of_it_has(dtype, backend):
    """Crowds of equal values, zeros, NaN and infinities, cut anywhere; ranks at the ends and none."""
    n = 5003
    b = randn(n, dtype=dtype)
    tensors = [(b + randn(n, dtype=dtype)).to(dtype) for _ in range(3)]
    tensors[1][5:300] = float("nan")
    tensors[1][400] = float("inf")
    tensors[2][:3000] = b[:3000]
    ranks = [[200, 0, 1], [n, 297, 298], [2002, 2004, 2003]]
    truth = torch.stack(
        [abs_quantile(tensors, [b], 3, [row[g] for row in ranks])[:, 0] for g in range(3)], 1
    )
    for part in (n, 777):
        search = DigitSearch(ranks, dtype == torch.float64)
        assert search.sweeps == (4 if dtype == torch.float64 else 2)
        with solera.backend("reference" if backend == "reference" else "auto"):
            for _ in range(search.sweeps):
                # The last part but one is of a single element, the last one empty.
                for begin in (*range(0, n - 1, part), n - 1, n):
                    end = min(begin + part, n - 1 if begin < n - 1 else n)
                    search.add([t[begin:end] for t in tensors], b[begin:end])
                search.turn()
        assert torch.equal(search.found, truth.cpu())
    alone = DigitSearch([[17]], dtype == torch.float64)
    for _ in range(alone.sweeps):
        alone.add([tensors[0].view(1, n)], None)
        alone.turn()
    assert alone.found.item() == abs_quantile([tensors[0]], [], 1, [17]).item()


def test_the_contract_of_digits():
    a, b = randn(40, 50), randn(40, 50)
    torch.library.opcheck(ops.abs_digits.default, ([a, b], [a], [0, 1, 1], [0, 0, 127], 16))
    torch.library.opcheck(ops.abs_digits.default, ([a.t()], [], [0], [0], 0))
    with pytest.raises(RuntimeError):
        ops.abs_digits([a, randn(3)], [], [0], [0], 16)
    if solera._registry.compiled_library is not None and not INTERPRETED and DEVICE == "cpu":
        for which, prefixes, shift in (
            ([2], [0], 16),
            ([0], [0, 1], 16),
            ([0], [0], 17),
            ([], [], 16),
        ):
            with pytest.raises(RuntimeError, match="abs_digits"):
                ops.abs_digits([a, b], [], which, prefixes, shift)
