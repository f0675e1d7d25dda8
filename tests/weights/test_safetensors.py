"""The header of safetensors files: what is written loads elsewhere, and what is not valid is refused in words."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from solera.weights import _safetensors as S
from solera.weights.merge import merge
from solera.weights.methods import Copy


def some_tensors():
    return {
        "weight": torch.randn(30, 7),
        "flags": torch.tensor([True, False, True]),
        "bf16": torch.randn(5).bfloat16(),
        "half": torch.randn(3, 1, 2).half(),
        "double": torch.randn((), dtype=torch.float64),
        "empty": torch.empty(0, 4),
        "größe": torch.arange(7),
        "small": torch.arange(5, dtype=torch.uint8),
        "float8": torch.randn(11).to(torch.float8_e4m3fn),
    }


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and bytes_of(a) == bytes_of(b)


def bytes_of(t):
    return bytes(t.contiguous().reshape(-1).view(torch.uint8).tolist())


def test_written_and_read_again(tmp_path):
    tensors, path = some_tensors(), tmp_path / "a.safetensors"
    S.write_file(path, tensors, {"format": "pt"})
    found, metadata = S.read_header(path)
    assert metadata == {"format": "pt"} and set(found) == set(tensors)
    assert min(s.offset for s in found.values()) % S.PAGE == 0
    assert all(s.offset % s.dtype.itemsize == 0 for s in found.values())
    back = merge([path], Copy())
    assert all(same(back[name], t) for name, t in tensors.items())


def test_the_safetensors_package_reads_what_is_written_and_the_other_way_round(tmp_path):
    pytest.importorskip("safetensors")
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    tensors = some_tensors()
    S.write_file(tmp_path / "a.safetensors", tensors, {"key": "value"})
    theirs = load_file(tmp_path / "a.safetensors")
    assert all(same(theirs[name], t) for name, t in tensors.items())
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"key": "value"}
    save_file(tensors, tmp_path / "b.safetensors", {"key": "value"})
    ours = merge([tmp_path / "b.safetensors"], Copy())
    assert all(same(ours[name], t) for name, t in tensors.items())


KINDS, SIZES = st.sampled_from(sorted(S.DTYPES)), st.lists(st.integers(0, 5), max_size=3)


@given(st.lists(st.tuples(KINDS, SIZES), max_size=6))
def test_layouts_have_no_holes_and_are_aligned(items):
    described = [(str(i), S.DTYPES[d], tuple(shape)) for i, (d, shape) in enumerate(items)]
    header, places, size = S.layout(described, {})
    assert len(header) % S.PAGE == 0 and int.from_bytes(header[:8], "little") == len(header) - 8
    assert set(json.loads(header[8:])) == set(places)
    end = len(header)
    for name, place in sorted(places.items(), key=lambda p: (p[1].offset, p[1].nbytes)):
        assert place.offset == end and place.offset % place.dtype.itemsize == 0, name
        assert place.nbytes == math.prod(place.shape) * place.dtype.itemsize
        end += place.nbytes
    assert end == size


def raw(tmp_path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = tmp_path / "bad.safetensors"
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(begin, end, dtype="F32", shape=(1,)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "data", "says"),
    [
        ({"a": entry(0, 4)}, b"", "cut off"),
        ({"a": entry(0, 8)}, b"12345678", "takes 4"),
        ({"a": entry(4, 8)}, b"12345678", "hole"),
        ({"a": entry(0, 4), "b": entry(0, 4)}, b"1234", "overlaps"),
        ({"a": entry(0, 4), "b": entry(2, 6)}, b"123456", "overlaps"),
        ({"a": entry(0, 4)}, b"12345", "1 bytes follow"),
        ({"a": entry(0, 4, "F4")}, b"1234", "dtype 'F4'"),
        ({"a": entry(0, 4, ["F32"])}, b"1234", "dtype"),
        ({"a": entry(0, 4, shape=(-1,))}, b"1234", "shape"),
        ({"a": entry(0, 4, shape=(1.0,))}, b"1234", "shape"),
        ({"a": entry(4, 0)}, b"1234", "takes"),
        ({"a": {"dtype": "F32"}}, b"", "lacks"),
        ({"a": 3}, b"", "lacks"),
        ({"__metadata__": {"a": 1}}, b"", "strings"),
        ([1, 2], b"", "object"),
        (b"{", b"", "JSON"),
        (b"\xff\xfe", b"", "JSON"),
        (b'{"a":{},"a":{}}', b"", "twice"),
        (b"[" * 100_000, b"", "JSON"),
    ],
)
def test_what_is_not_valid_is_refused_in_words(tmp_path, header, data, says):
    path = raw(tmp_path, header, data)
    with pytest.raises(ValueError, match=says) as error:
        S.read_header(path)
    assert str(path) in str(error.value)


def test_a_length_that_is_not_true_and_a_file_without_one(tmp_path):
    with pytest.raises(ValueError, match=r"a header of \d+ bytes in a file of"):
        S.read_header(raw(tmp_path, {}, length=2**62))
    (tmp_path / "short").write_bytes(b"123")
    with pytest.raises(ValueError, match="takes 8"):
        S.read_header(tmp_path / "short")


@given(st.binary(max_size=200), st.integers(0, 300))
def test_any_bytes_are_read_or_refused(tmp_path_factory, data, at):
    path = tmp_path_factory.mktemp("fuzz") / "a.safetensors"
    header, _, _ = S.layout([("a", torch.float32, (2,)), ("b", torch.int8, (3,))], {"x": "y"})
    text = bytearray(header[:400] + bytes(11))
    text[:8] = (392).to_bytes(8, "little")
    text[at : at + len(data)] = data
    path.write_bytes(bytes(text))
    try:
        S.read_header(path)
    except ValueError as error:
        assert str(path) in str(error)
