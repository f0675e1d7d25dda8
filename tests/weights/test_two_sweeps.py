"""Tensors that do not fit in memory, merged in several sweeps over their tiles: the bits of the form in one piece."""

import pytest
import torch
from checkpoint_files import assert_same, load, saved, two_sweeps

from solera.weights import _plan, _sweeps, merge, merge_files
from solera.weights.methods import (
    Breadcrumbs,
    Dare,
    Della,
    Karcher,
    ModelStock,
    MultiSlerp,
    Slerp,
    Ties,
)

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16


def tight(monkeypatch):
    """Budgets that tensors of a test can exceed."""
    for name, value in (("OVERHEAD", 0), ("_LEAST_RING", 0), ("_LEAST_TILE", 4096)):
        monkeypatch.setattr(_plan, name, value)


@two_sweeps
@pytest.mark.parametrize(
    ("method", "models", "base"),
    [
        (Slerp(0.3), 2, False),
        (Slerp(0.3), 1, True),
        (MultiSlerp([1, 2, 5]), 3, False),
        (Karcher(), 3, False),
        (ModelStock(), 3, True),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("dtypes", "out_dtype"),
    [
        ((F32, F32, F32, F32), None),
        ((BF16, BF16, BF16, BF16), None),
        ((BF16, BF16, BF16, BF16), F16),
        ((F32, BF16, F16, BF16), BF16),
        ((F64, F32, BF16, F32), F32),
        ((F32, F32, F32, F32), F64),
    ],
    ids=str,
)
def test_two_sweeps_give_the_bits_of_one(
    tmp_path, ring, monkeypatch, method, models, base, dtypes, out_dtype
):
    tight(monkeypatch)
    common = torch.randn(11 * 16384 + 1234)
    states = [
        {
            "small": torch.randn(7).to(d),
            "long": (common + torch.randn_like(common)).to(d),
            "wide": torch.randn(300, 401).to(d),
            "steps": torch.tensor(3),
        }
        for d in dtypes
    ]
    paths = saved(tmp_path, states)
    out = tmp_path / "out.safetensors"
    around = {"base": states[3]} if base else {}
    expected = merge(states[:models], method, out_dtype=out_dtype, **around)
    threads = torch.get_num_threads()
    try:
        for budget, count in ((2_400_000 if F64 in dtypes or out_dtype == F64 else 1_000_000, 1),
                              (3_500_000, 2)):  # fmt: skip
            torch.set_num_threads(count)
            seen = []
            plan = merge_files(
                paths[:models], out, method, base=paths[3] if base else None, out_dtype=out_dtype,
                max_memory=budget, overwrite=True, progress=lambda *both: seen.append(both),
            )  # fmt: skip
            assert_same(load(out), expected)
            assert plan.memory <= budget
            total = plan.bytes_read + plan.bytes_written
            assert seen[-1] == (total, total) and seen == sorted(seen)
            if count == 1:
                twice = [item.name for item in plan.items if item.sweeps == 2]
                assert "long" in twice and "small" not in twice
                assert "'long'" in str(plan) and "read twice" in {row[-1] for row in plan.table()}
                once = sum(s.nbytes for item in plan.items for s in item.inputs)
                again = sum(s.nbytes for i in plan.items if i.name in twice for s in i.inputs)
                assert plan.bytes_read == once + again
    finally:
        torch.set_num_threads(threads)


def task_vectors(dtypes):
    """A base and models: crowds of equal magnitudes, zeros and NaN among the differences."""
    base = torch.randn(70 * 16384 + 1234)
    states = []
    for k, d in enumerate(dtypes):
        long = base + torch.randn_like(base)
        long[1000 * k : 200_000] = base[1000 * k : 200_000]
        long[-300_000:] = base[-300_000:] + 0.5
        long[500_000 + k] = float("nan")
        states.append(
            {
                "long": long.to(d),
                "wide": torch.randn(1500, 401).to(d),
                "small": torch.randn(7).to(d),
            }
        )
    return states


THIN = [
    (Ties(0.2), 3, False),
    (Ties(0.7, [1, 2, 5], elect="count", weigh="after", divide="count", scale=0.5), 3, False),
    (Ties(0.0), 3, False),
    (Dare(0.3), 1, False),
    (Dare(0.3, [0.1, 0.7, 0.2], consensus="mass", rescale=None), 1, False),
    (Dare(0.3, rescale="l1"), 2, True),
    (Breadcrumbs(0.4, 0.05), 3, False),
    (Breadcrumbs(0.9, 0.3, consensus="mass"), 3, False),
]


@pytest.mark.parametrize(("method", "sweeps", "ordered"), THIN, ids=str)
@pytest.mark.parametrize(
    ("dtypes", "out_dtype"),
    [
        ((F32, F32, F32, F32), None),
        ((BF16, BF16, BF16, BF16), F16),
        ((F32, BF16, F16, BF16), BF16),
        ((F64, F32, BF16, F32), F32),
    ],
    ids=str,
)
def test_task_vectors_beyond_the_budget(
    tmp_path, ring, monkeypatch, method, sweeps, ordered, dtypes, out_dtype
):
    if ordered and not _sweeps.exact(torch.device("cpu")):
        pytest.skip("sums in the order of the compiled CPU kernels")
    tight(monkeypatch)
    states = task_vectors(dtypes)
    paths, out = saved(tmp_path, states), tmp_path / "out.safetensors"
    expected = merge(states[:3], method, base=states[3], out_dtype=out_dtype, seed=5)
    wide = F64 in dtypes
    sweeps = 5 if wide and sweeps == 3 else sweeps
    data = set()
    threads = torch.get_num_threads()
    try:
        for budget, count in ((13_000_000, 1), (16_000_000, 2)):
            torch.set_num_threads(count)
            seen = []
            plan = merge_files(
                paths[:3], out, method, base=paths[3], out_dtype=out_dtype, seed=5, max_memory=budget,
                overwrite=True, progress=lambda *both: seen.append(both),
            )  # fmt: skip
            found = load(out)
            data.add(out.read_bytes())
            for name, t in expected.items():
                assert found[name].dtype == t.dtype
                assert torch.equal(found[name].nan_to_num(9e9), t.nan_to_num(9e9)), name
            total = plan.bytes_read + plan.bytes_written
            assert seen[-1] == (total, total) and seen == sorted(seen)
            assert plan.memory <= budget
            long = next(item for item in plan.items if item.name == "long")
            assert long.sweeps == sweeps
            if count == 1:
                assert sum(1 for _ in plan.tiles_of(long)) > sweeps
            if sweeps > 1:
                times = "twice" if sweeps == 2 else f"{sweeps} times"
                assert f"sweeps   {sweeps}" in str(plan) and f"read {times}" in plan.table()[0]
    finally:
        torch.set_num_threads(threads)
    assert len(data) == 1


@pytest.mark.parametrize(
    "method", [Della(0.5, 0.2), Della(0.6, 0.1, rescale=None, consensus=None)], ids=str
)
def test_della_passes_in_rows(tmp_path, ring, monkeypatch, method):
    tight(monkeypatch)
    states = [{"w": torch.randn(900, 301).to(d)} for d in (F32, BF16, F32)]
    paths, out = saved(tmp_path, states), tmp_path / "out.safetensors"
    plan = merge_files(paths[:2], out, method, base=paths[2], seed=3, max_memory=8_000_000)
    assert sum(1 for _ in plan.tiles_of(plan.items[0])) > 3 and plan.items[0].sweeps == 1
    assert_same(load(out), merge(states[:2], method, base=states[2], seed=3))
    with pytest.raises(ValueError, match="in one piece"):
        merge_files(paths[:2], out, Della(0.5, rescale="l1"), base=paths[2], max_memory=8_000_000)


@two_sweeps
def test_two_sweeps_over_mapped_and_strided_tensors(tmp_path, ring, monkeypatch):
    tight(monkeypatch)
    states = [{"turned": torch.randn(700, 300).t(), "w": torch.randn(400, 500)} for _ in range(2)]
    paths = [tmp_path / f"{i}.pt" for i in range(2)]
    for path, state in zip(paths, states):
        torch.save(state, path)
    plan = merge_files(paths, tmp_path / "out.safetensors", Slerp(), max_memory=1_000_000)
    assert [item.sweeps for item in plan.items] == [2, 2]
    assert_same(load(tmp_path / "out.safetensors"), merge(states, Slerp()))


def test_without_the_compiled_kernels_there_is_one_sweep(tmp_path, monkeypatch):
    paths = saved(tmp_path, [{"w": torch.zeros(3000, 2000)}] * 2)
    monkeypatch.setattr(_sweeps, "exact", lambda device: False)
    options = {"max_memory": "64MiB", "dry_run": True, "base": paths[0]}
    for method in (Slerp(), Dare(rescale="l1")):
        with pytest.raises(
            ValueError, match=r"'w'.*in one piece.*compiled kernels and device=\"cpu\""
        ):
            merge_files(paths, tmp_path / "out", method, **options)
    # Ranks are counts: known whatever takes them.
    assert merge_files(paths, tmp_path / "out", Ties(), **options).items[0].sweeps == 3
