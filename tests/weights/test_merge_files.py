"""Checkpoints on disk merged into one: the values of `merge`, whatever the tiles, threads and shards; a budget of
memory that is kept; no half results.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from checkpoint_files import assert_same, load, saved, sharded, state

import solera.weights
from solera import _cli
from solera.weights import merge, merge_files
from solera.weights._safetensors import read_header, write_file
from solera.weights.methods import (
    Copy,
    Dare,
    FromBase,
    Linear,
    Slerp,
    TaskArithmetic,
    Ties,
)

MiB = 1 << 20


def test_the_same_as_merge_in_memory(tmp_path, ring):
    states = [state() for _ in range(3)]
    paths = saved(tmp_path, states)
    out = tmp_path / "new" / "out.safetensors"
    plan = merge_files(paths, out, Linear([1, 2, 3]))
    assert_same(load(out), merge(states, Linear([1, 2, 3])))
    assert plan.bytes_written == sum(t.nbytes for t in states[0].values())
    assert os.listdir(out.parent) == ["out.safetensors"]
    _, metadata = read_header(out)
    assert metadata["solera.method"] == "Linear(weights=(1.0, 2.0, 3.0), normalize=True)"
    assert json.loads(metadata["solera.inputs"]) == [p.name for p in paths]
    assert metadata["solera.seed"] == "0" and metadata["format"] == "pt"


def test_rules_base_and_dtype(tmp_path, ring):
    states, base = [state() for _ in range(2)], state()
    paths = saved(tmp_path, [*states, base])
    options = {
        "rules": [("*.bias", Copy(1)), ("re:layer.1.*", FromBase())],
        "out_dtype": "bfloat16",
    }
    out = tmp_path / "out.safetensors"
    merge_files(paths[:2], out, TaskArithmetic([0.5, 0.1]), base=paths[2], **options)
    assert_same(load(out), merge(states, TaskArithmetic([0.5, 0.1]), base=base, **options))


def test_the_safetensors_package_loads_the_output(tmp_path, ring):
    safetensors = pytest.importorskip("safetensors.torch")
    states = [state() for _ in range(2)]
    out = tmp_path / "out.safetensors"
    merge_files(saved(tmp_path, states), out, Linear())
    assert_same(safetensors.load_file(out), merge(states, Linear()))


def test_tiles_threads_and_order_do_not_matter(tmp_path, ring, monkeypatch):
    states = [state(rows=5000) for _ in range(3)]
    a, b, c = saved(tmp_path, states)

    def data(inputs, weights, **options):
        out = tmp_path / "out.safetensors"
        merge_files(inputs, out, Linear(weights), overwrite=True, **options)
        raw = out.read_bytes()
        return raw[8 + int.from_bytes(raw[:8], "little") :]

    first = data([a, b, c], [1, 2, 4])
    assert first == data([c, a, b], [4, 1, 2])
    assert first == data([a, b, c], [1, 2, 4], readers=5)
    monkeypatch.setattr("solera.weights._plan._TILE", 70_000)
    assert first == data([a, b, c], [1, 2, 4])
    monkeypatch.setattr("solera.weights._plan._MOST_RING", 100_000)
    monkeypatch.setattr("solera.weights._plan._LEAST_RING", 0)
    monkeypatch.setattr("solera.weights._plan._LEAST_TILE", 4096)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert first == data([b, c, a], [2, 4, 1])
    finally:
        torch.set_num_threads(before)


def test_sharded_folders_keep_their_files_and_what_lies_beside(tmp_path, ring):
    states = [state() for _ in range(2)]
    folders = [sharded(tmp_path / str(i), s, 3 - i) for i, s in enumerate(states)]
    out = tmp_path / "out"
    plan = merge_files(folders, out, Linear())
    assert_same(load(out), merge(states, Linear()))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    old = json.loads((folders[0] / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == old["weight_map"]
    assert index["metadata"]["total_size"] == plan.bytes_written
    assert (out / "config.json").read_text() == '{"layers": 2}'
    assert (out / "1_Pooling/config.json").exists()
    assert len(list(out.glob("*.safetensors"))) == 3
    merge_files(saved(tmp_path, states), tmp_path / "one.safetensors", Linear())
    assert_same(load(tmp_path / "one.safetensors"), load(out))


@pytest.mark.parametrize("suffix", [".bin", ".pt"])
def test_pickled_inputs_are_mapped(tmp_path, ring, suffix):
    states = [state(rows=2000) for _ in range(2)]
    for s in states:
        s["turned"] = torch.randn(700, 300).t()
        s["tied"] = s["embed.weight"]
    expected = merge(states, Linear())
    for i, s in enumerate(states):
        torch.save(s, tmp_path / f"{i}{suffix}")
    out = tmp_path / "out.safetensors"
    plan = merge_files([tmp_path / f"{i}{suffix}" for i in range(2)], out, Linear())
    assert_same(load(out), expected)
    assert any("'tied' is tied to 'embed.weight'" in note for note in plan.notes)
    folders = [
        sharded(tmp_path / f"f{i}", s, 2, suffix, "pytorch_model") for i, s in enumerate(states)
    ]
    merge_files(folders, tmp_path / "out", Linear())
    assert_same(load(tmp_path / "out"), expected)
    assert {p.name for p in (tmp_path / "out").glob("model*")} == {
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json",
    }  # fmt: skip


class Evil:
    def __reduce__(self):
        return (os.system, ("true",))


def test_pickles_of_more_than_tensors_are_refused_with_the_way_out(tmp_path):
    torch.save({"w": torch.ones(2), "x": Evil()}, tmp_path / "evil.pt")
    torch.save({"w": torch.ones(2)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    torch.save({"w": 3}, tmp_path / "number.pt")
    (tmp_path / "text.bin").write_text("text")
    for name, says in {"evil": "weights_only", "old": "older format", "number": "dense"}.items():
        with pytest.raises(ValueError, match=says) as error:
            merge_files([tmp_path / f"{name}.pt"], tmp_path / "out.safetensors", Linear())
        assert "convert" in str(error.value) and f"{name}.pt" in str(error.value)
        # torch's advice is to load the file all the same
        assert "Re-running" not in str(error.value)
        assert name != "evil" or "system" in str(error.value)
    with pytest.raises(ValueError, match="zip format"):
        merge_files([tmp_path / "text.bin"], tmp_path / "out.safetensors", Linear())
    torch.save({"state_dict": {"w": torch.ones(2)}, "epoch": 3}, tmp_path / "training.pt")
    merge_files([tmp_path / "training.pt"], tmp_path / "out.safetensors", Linear())
    assert_same(load(tmp_path / "out.safetensors"), {"w": torch.ones(2)})


def test_a_tensor_saved_unaligned_is_read(tmp_path, ring):
    """Valid, though nobody writes it: three bytes before float32 data, and no padding of the header."""
    data = torch.randn(50_000)
    header = json.dumps({
        "m": {"dtype": "BOOL", "shape": [3], "data_offsets": [0, 3]},
        "w": {"dtype": "F32", "shape": [50_000], "data_offsets": [3, 200_003]},
    }).encode()  # fmt: skip
    header += b" " * ((1 - len(header)) % 4)
    raw = len(header).to_bytes(8, "little") + header + b"\1\0\1" + data.numpy().tobytes()
    (tmp_path / "a.safetensors").write_bytes(raw)
    out = tmp_path / "out.safetensors"
    merge_files([tmp_path / "a.safetensors"] * 2, out, Linear())
    assert_same(load(out), {"m": torch.tensor([True, False, True]), "w": data})


def test_what_differs_is_named_and_not_strict_copies_it(tmp_path, ring):
    a, b, base = state(), state(), state()
    del a["layer.0.bias"]
    b["embed.weight"] = torch.randn(301, 257)
    b["extra"] = torch.ones(3)
    b["steps"] = torch.tensor(8)
    paths = saved(tmp_path, [a, b, base])
    out = tmp_path / "out.safetensors"
    with pytest.raises(ValueError) as error:
        merge_files(paths[:2], out, TaskArithmetic(0.3), base=paths[2])
    for text in ("lacks 'layer.0.bias'", "has besides 'extra'", "(301, 257), not (300, 257)"):
        assert text in str(error.value) and "a.safetensors" in str(error.value)
    plan = merge_files(paths[:2], out, TaskArithmetic(0.3), base=paths[2], strict=False)
    found = load(out)
    assert set(found) == set(base)
    for name in ("layer.0.bias", "embed.weight", "steps"):
        assert torch.equal(found[name], base[name])
    assert any("copied from base" in n and "'embed.weight'" in n for n in plan.notes)
    expected = base["layer.0.weight"].double() + 0.3 * sum(
        m["layer.0.weight"].double() - base["layer.0.weight"].double() for m in (a, b)
    )
    one_rounding = {"rtol": torch.finfo(found["layer.0.weight"].dtype).eps, "atol": 1e-6}
    torch.testing.assert_close(found["layer.0.weight"].double(), expected, **one_rounding)


def test_a_name_left_out_as_tied_is_found_by_its_twin(tmp_path):
    full = {"embed": torch.randn(4, 3), "head": torch.randn(4, 3)}
    tied = {"embed": torch.randn(4, 3)}
    write_file(tmp_path / "full.safetensors", full, {})
    write_file(tmp_path / "tied.safetensors", tied, {"head": "embed"})
    write_file(tmp_path / "bare.safetensors", tied, {})
    out = tmp_path / "out.safetensors"
    merge_files([tmp_path / "full.safetensors", tmp_path / "tied.safetensors"], out, Linear())
    torch.testing.assert_close(load(out)["head"], (full["head"] + tied["embed"]) / 2)
    with pytest.raises(ValueError, match="lacks 'head'"):
        merge_files([tmp_path / "full.safetensors", tmp_path / "bare.safetensors"], out, Linear())
    two = [tmp_path / "tied.safetensors"] * 2
    merge_files(two, out, Linear(), overwrite=True)
    assert read_header(out)[1]["head"] == "embed" and set(load(out)) == {"embed"}


def test_a_name_tied_in_the_reference_only_is_written_apart(tmp_path):
    full = {"embed": torch.randn(4, 3), "head": torch.randn(4, 3)}
    tied = {"embed": torch.randn(4, 3)}
    for name, tensors, metadata in (("full", full, {}), ("tied", tied, {"head": "embed"})):
        (tmp_path / name).mkdir()
        write_file(tmp_path / name / "model.safetensors", tensors, metadata)
    out = tmp_path / "out"
    plan = merge_files([tmp_path / "tied", tmp_path / "full"], out, Linear())
    assert "'head' is tied to 'embed' in inputs[0]" in str(plan)
    found, metadata = read_header(out / "model.safetensors")
    assert set(found) == {"embed", "head"} and "head" not in metadata
    torch.testing.assert_close(load(out)["head"], (full["head"] + tied["embed"]) / 2)
    torch.testing.assert_close(load(out)["embed"], (full["embed"] + tied["embed"]) / 2)


def test_a_tie_to_a_tensor_that_the_index_leaves_out_is_none(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    tensors = {"embed": torch.randn(4, 3), "w": torch.randn(3)}
    write_file(folder / "model-1.safetensors", tensors, {"head": "embed"})
    index = {"weight_map": {"w": "model-1.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    full = {"head": torch.randn(4, 3), "w": torch.randn(3)}
    write_file(tmp_path / "full.safetensors", full, {})
    inputs = [folder, tmp_path / "full.safetensors"]
    with pytest.raises(ValueError, match="has besides 'head'"):
        merge_files(inputs, tmp_path / "out", Linear())


def test_tied_tensors_of_pickles_stay_equal_under_random_masks(tmp_path):
    paths = [tmp_path / "a.pt", tmp_path / "base.pt"]
    for path in paths:
        w = torch.randn(50, 30)
        torch.save({"embed": w, "head": w, "other": torch.randn(50, 30)}, path)
    out = tmp_path / "out.safetensors"
    merge_files(paths[:1], out, Dare(0.5), base=paths[1], seed=3)
    found = load(out)
    assert torch.equal(found["embed"], found["head"])
    assert_same(found, merge(paths[:1], Dare(0.5), base=paths[1], seed=3))


def test_what_the_reference_says_of_itself_is_kept(tmp_path):
    said = {
        "lora_adapter_metadata": '{"r": 4}',
        "total_size": "no",
        "modelspec.hash_sha256": "0x12",
    }
    for i in range(2):
        write_file(tmp_path / f"{i}.safetensors", {"w": torch.ones(3)}, {**said, "i": str(i)})
    paths = [tmp_path / "0.safetensors", tmp_path / "1.safetensors"]
    out = tmp_path / "out.safetensors"
    merge_files(paths, out, Linear())
    merge_files([out, paths[1]], tmp_path / "again.safetensors", Copy(1))
    for path, method in ((out, Linear()), (tmp_path / "again.safetensors", Copy(1))):
        metadata = read_header(path)[1]
        assert metadata["lora_adapter_metadata"] == '{"r": 4}' and metadata["i"] == "0"
        assert metadata["solera.method"] == repr(method)
        assert "modelspec.hash_sha256" not in metadata  # of other data


def test_integers_that_differ_leave_nothing_behind(tmp_path, ring):
    states = [state(), {**state(), "steps": torch.tensor(8)}]
    paths = saved(tmp_path, states)
    out = tmp_path / "out.safetensors"
    with pytest.raises(ValueError, match=r"'steps'.*differs"):
        merge_files(paths, out, Linear())
    assert sorted(os.listdir(tmp_path)) == ["a.safetensors", "b.safetensors"]
    merge_files(paths, out, Linear(), rules={"steps": Copy(1)})
    assert load(out)["steps"] == 8


def test_outputs_that_exist_and_inputs_are_not_overwritten(tmp_path):
    paths = saved(tmp_path, [state(), state()])
    out = tmp_path / "out.safetensors"
    out.write_text("precious")
    with pytest.raises(FileExistsError, match="overwrite"):
        merge_files(paths, out, Linear())
    assert out.read_text() == "precious"
    merge_files(paths, out, Linear(), overwrite=True)
    with pytest.raises(ValueError, match="is, or holds, the input"):
        merge_files(paths, paths[0], Linear(), overwrite=True)
    with pytest.raises(ValueError, match="is, or holds, the input"):
        merge_files(paths, tmp_path, Linear(), overwrite=True)
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    with pytest.raises(FileExistsError):
        merge_files(paths, folder, Linear())
    merge_files(paths, folder, Linear(), overwrite=True)
    assert os.listdir(folder) == ["model.safetensors"]
    with pytest.raises(NotADirectoryError):
        merge_files(paths, out.rename(tmp_path / "file"), Linear())  # fmt: skip


def test_folders_that_nothing_can_take_the_place_of_are_refused_at_once(tmp_path, monkeypatch):
    paths = saved(tmp_path, [state()])
    (tmp_path / "here/below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here/below")
    for output in (".", "", "..", tmp_path / "here", "../below"):
        with pytest.raises(ValueError, match=r"current folder .*name a folder in it"):
            merge_files(paths, output, Linear(), overwrite=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "here")
    with pytest.raises(ValueError, match="mount point"):
        merge_files(paths, tmp_path / "here", Linear())
    merge_files(paths, tmp_path / "here/out", Linear())
    assert sorted(os.listdir(tmp_path / "here")) == ["below", "out"]


def test_a_dry_run_writes_nothing_and_says_all(tmp_path):
    paths = saved(tmp_path, [state(), state()])
    rules = {"*.bias": Copy(1)}
    plan = merge_files(paths, tmp_path / "x/out", Linear(), rules=rules, dry_run=True)
    assert sorted(os.listdir(tmp_path)) == ["a.safetensors", "b.safetensors"]
    text = str(plan)
    for part in ("Linear(weights=None, normalize=True)", "Copy(index=1): 1 tensors, by rule '*.bias'",
                 "9 tensors", "to read", "memory", "budget", "equal in all models"):  # fmt: skip
        assert part in text
    assert ("layer.0.bias", "64", "float32", "Copy(index=1)", "") in plan.table()


def test_the_budget_decides_the_tiles_or_names_what_is_too_large(tmp_path):
    big = {"w": torch.zeros(3000, 2000)}
    paths = saved(tmp_path, [big] * 4)
    out = tmp_path / "out.safetensors"
    plan = merge_files(paths, out, Linear(), max_memory="64MiB", dry_run=True)
    assert plan.memory <= 64 * MiB and sum(1 for _ in plan.tiles_of(plan.items[0])) > 4
    with pytest.raises(ValueError, match=r"max_memory: 'w'.*in one piece"):
        merge_files(paths[:2], out, Slerp(dim=1), max_memory="64MiB", dry_run=True)
    thrice = merge_files(paths[:2], out, Ties(), base=paths[2], max_memory="64MiB", dry_run=True)
    assert thrice.bytes_read == 3 * 3 * big["w"].nbytes and "sweeps   3" in str(thrice)
    rows = merge_files(paths[:2], out, Slerp(dim=0), max_memory="64MiB", dry_run=True)
    assert all(tile.shape[1:] == (2000,) for tile in rows.tiles_of(rows.items[0]))
    with pytest.raises(ValueError, match="max_memory: 'w'"):
        merge_files(paths, out, Linear(), max_memory="1MB", dry_run=True)
    for wrong in ("much", "4 apples", 0, -1, 1.5, True, "..GB"):
        with pytest.raises(ValueError, match="max_memory: expected"):
            merge_files(paths, out, Linear(), max_memory=wrong)


@pytest.mark.parametrize(
    ("method", "function"), [(Ties(0.3), "ties"), (Slerp(0.3), "slerp"), (Dare(0.5), "dare")]
)
def test_whole_tensors_give_what_merge_gives(tmp_path, ring, method, function):
    if not hasattr(solera.weights, function):
        pytest.skip(f"solera.weights.{function} is not there")
    states, base = [state() for _ in range(2)], state()
    paths = saved(tmp_path, [*states, base])
    out = tmp_path / "out.safetensors"
    merge_files(paths[:2], out, method, base=paths[2], seed=4)
    assert_same(load(out), merge(states, method, base=base, seed=4))


@pytest.mark.parametrize(
    ("change", "kind", "says"),
    [
        ({"inputs": []}, ValueError, "at least one path"),
        ({"inputs": "a.safetensors"}, ValueError, "list"),
        ({"inputs": ["/no/such.safetensors"]}, FileNotFoundError, r"inputs\[0\].*/no/such"),
        ({"method": "linear"}, TypeError, "method"),
        ({"base": "/no/such"}, FileNotFoundError, "base"),
        ({"seed": "x"}, TypeError, "seed"),
        ({"seed": 2**63}, ValueError, "seed"),
        ({"readers": 0}, ValueError, "readers"),
        ({"out_dtype": "int32"}, ValueError, "out_dtype"),
        ({"output": "x.pt"}, ValueError, "safetensors"),
        ({"method": Copy(5)}, ValueError, "index"),
    ],
)
def test_bad_arguments_are_named(tmp_path, change, kind, says):
    inputs = saved(tmp_path, [state()])
    options = {"inputs": inputs, "output": tmp_path / "out", "method": Linear(), **change}
    with pytest.raises(kind, match=says):
        merge_files(**options)
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_folders_that_are_none(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no"):
        merge_files([tmp_path / "empty"], tmp_path / "out", Linear())
    saved(tmp_path / "empty", [state(), state()])
    with pytest.raises(ValueError, match=r"a.safetensors, b.safetensors"):
        merge_files([tmp_path / "empty"], tmp_path / "out", Linear())
    folder = sharded(tmp_path / "shards", state())
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model-00002-of-00003"):
        merge_files([folder], tmp_path / "out", Linear())
    (folder / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ValueError, match="weight_map"):
        merge_files([folder], tmp_path / "out", Linear())


def test_the_command(tmp_path, capsys):
    states = [state() for _ in range(2)]
    a, b = map(str, saved(tmp_path, states))
    out = str(tmp_path / "out.safetensors")
    assert _cli.main(["merge", a, b, "-o", out, "--dry-run", "--list"]) == 0
    said = capsys.readouterr().out
    assert "Linear(weights=None, normalize=True)" in said and "layer.0.bias  64  float32" in said
    assert not os.path.exists(out)
    rules = ["--rule", "*.bias=copy(index=1)", "--rule", "re:(?=s).*=base"]
    more = ["--method", "task_arithmetic", "--weights", "0.5", "--base", a]
    assert _cli.main(["merge", a, b, "-o", out, *more, *rules, "--quiet"]) == 0
    assert capsys.readouterr().out == ""
    same_rules = {"*.bias": Copy(1), "s*": FromBase()}
    assert_same(load(out), merge(states, TaskArithmetic(0.5), base=states[0], rules=same_rules))
    assert _cli.main(["merge", a, b, "-o", out]) == 1
    said = capsys.readouterr().err
    assert "(--overwrite replaces it)" in said and "=True" not in said
    del states[1]["steps"]
    a, b = map(str, saved(tmp_path, states))
    assert _cli.main(["merge", a, b, "-o", out, "--overwrite"]) == 1
    assert "With --no-strict these" in capsys.readouterr().err
    for text in ("--rule x", "--method no", "--method ties", "", "--max-memory x"):
        wrong = text.split()
        assert _cli.main(["merge", a, b, "-o", out, *wrong]) == 1
        assert capsys.readouterr().err.startswith("solera merge: ")
