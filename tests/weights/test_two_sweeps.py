"""Tensors that do not fit in memory, merged in two sweeps over their tiles: the bits of the form in one piece."""

import pytest
import torch
from checkpoint_files import assert_same, load, saved, two_sweeps

from solera.weights import _plan, _sweeps, merge, merge_files
from solera.weights.methods import Karcher, ModelStock, MultiSlerp, Slerp

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
    with pytest.raises(ValueError, match=r"'w'.*in one piece.*compiled kernels and device=\"cpu\""):
        merge_files(paths, tmp_path / "out", Slerp(), max_memory="64MiB", dry_run=True)
