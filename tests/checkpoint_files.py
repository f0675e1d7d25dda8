"""State dicts, the files they are saved in, and what the tests of merge_files ask of them."""

import json

import pytest
import torch

from solera.weights import _sweeps, merge
from solera.weights._safetensors import write_file
from solera.weights.methods import Copy

two_sweeps = pytest.mark.skipif(
    not _sweeps.exact(torch.device("cpu")), reason="two sweeps are for the compiled CPU kernels"
)


def state(scale=1.0, rows=300):
    return {
        "embed.weight": scale * torch.randn(rows, 257),
        "layer.0.weight": scale * torch.randn(64, 33).bfloat16(),
        "layer.0.bias": scale * torch.randn(64),
        "layer.1.half": scale * torch.randn(129).half(),
        "layer.1.wide": scale * torch.randn(5, dtype=torch.float64),
        "scalar": scale * torch.randn(()),
        "empty": torch.empty(0, 3),
        "mask": torch.tensor([True, False, True]),
        "steps": torch.tensor(7),
    }


def saved(folder, states, names="abcdefgh"):
    paths = []
    for name, tensors in zip(names, states):
        write_file(folder / f"{name}.safetensors", tensors, {})
        paths.append(folder / f"{name}.safetensors")
    return paths


def sharded(folder, tensors, parts=3, suffix=".safetensors", stem="model"):
    """A folder as transformers writes it."""
    folder.mkdir()
    names, weight_map = list(tensors), {}
    for i in range(parts):
        file = f"{stem}-{i + 1:05}-of-{parts:05}{suffix}"
        part = {name: tensors[name] for name in names[i::parts]}
        if suffix == ".safetensors":
            write_file(folder / file, part, {})
        else:
            torch.save(part, folder / file)
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text('{"layers": 2}')
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling/config.json").write_text("{}")
    return folder


def load(path):
    return merge([path], Copy())


def assert_same(found, expected):
    assert set(found) == set(expected)
    for name, t in expected.items():
        assert found[name].dtype == t.dtype and torch.equal(found[name], t), name
