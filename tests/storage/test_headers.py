from __future__ import annotations

import json
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from storage.errors import CheckpointError
from storage.files import LocalFile
from storage.headers import BITS, MAX_HEADER_BYTES, read_header
from storage.tensors import FileRows

A = {"dtype": "BF16", "shape": [3, 4], "data_offsets": [0, 24]}
B = {"dtype": "F32", "shape": [5], "data_offsets": [24, 44]}
DATA = bytes(range(44))


def raw(header: Any, data: bytes = DATA) -> bytes:
    """A file of this header: JSON text, or a value to be written as such."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def written(path: Path, content: bytes) -> LocalFile:
    path.write_bytes(content)
    return LocalFile(path, len(content))


def sound(**changes: Any) -> dict[str, Any]:
    """A header of A and B, the entry B with changes."""
    return {"a": A, "b": {**B, **changes}}


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize 988097824\n" % (b"4665a5ea" * 8)
NESTED = b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"
TWICE = b'{"a":%s,"b":%s,"a":%s}' % tuple(json.dumps(entry).encode() for entry in (A, B, A))
KEY_TWICE = b'{"a":%s,"b":{"dtype":"F32","dtype":"F32","shape":[5],"data_offsets":[24,44]}}' % json.dumps(A).encode()
FEW = "not a whole safetensors file"
BROKEN = "must be saved or downloaded again"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"", f"{FEW}: it is empty. Download", id="empty"),
        pytest.param(b"abc", f"{FEW}: expected at least 8 bytes, got 3", id="three bytes"),
        pytest.param(struct.pack("<Q", 100), f"{FEW}: expected a header of 2 to 0 bytes, got 100", id="nothing but a length"),
        pytest.param(raw(sound())[:60], f"{FEW}: expected a header of 2 to 52 bytes, got 129", id="torn in the header"),
        pytest.param(struct.pack("<Q", 2**31) + DATA, f"{FEW}: .* 2 to 44 bytes, got 2147483648", id="2 GB of header"),
        pytest.param(b"\xff" * 90, f"{FEW}: .* got 18446744073709551615", id="the largest length"),
        pytest.param(struct.pack("<Q", 1) + b"{}", f"{FEW}: .* got 1", id="one byte of header"),
        pytest.param(LFS, r"not a safetensors file: it is a Git LFS pointer, .*Run `git lfs pull`", id="LFS pointer"),
        pytest.param(b"<!DOCTYPE html><html><body>Sign in</body></html>", "it is a web page .*logged in", id="web page"),
        pytest.param(b"\n\n  <html><body>Sign in</body></html>", "it is a web page", id="web page after blanks"),
        pytest.param(b'{"error": "Repository not found"}', "it is a JSON text", id="JSON message"),
        pytest.param(b"PK\x03\x04\x14\0\0\0\x08\x08" + DATA, "it is a zip file, as torch.save writes it", id="torch.save"),
        pytest.param(
            b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19." + DATA, "it is a pickle, which is never opened", id="old torch.save"
        ),
        pytest.param(b"GGUF\x03\0\0\0" + DATA, "it is a GGUF file", id="GGUF"),
        pytest.param(raw(b'{"a\xff":1}'), r"cannot be read \(byte 3 of it is not UTF-8\)", id="no UTF-8"),
        pytest.param(raw(b'{"a":]}'), r"cannot be read \(Expecting value", id="no JSON"),
        pytest.param(raw(b'{"a":' + b"9" * 5000 + b"}"), r"cannot be read \(Exceeds the limit", id="5000 digits"),
        pytest.param(raw([1, 2]), r"cannot be read \(expected a JSON object, got b'\[1, 2\]'", id="no object"),
        pytest.param(raw(b" " + json.dumps(sound()).encode()), "expected a JSON object, got b' ", id="blank before it"),
        pytest.param(raw(NESTED), r"cannot be read \(it is nested too deep\)", id="nested"),
        pytest.param(raw(TWICE), f"{BROKEN}: tensor a: listed twice", id="name twice"),
        pytest.param(raw(KEY_TWICE), f"{BROKEN}: tensor b: dtype is listed twice in its header entry", id="key twice"),
        pytest.param(
            raw({"a": A, "b": 5}), "tensor b: expected an object with dtype, shape and data_offsets, got 5", id="number"
        ),
        pytest.param(raw({"a": A, "b": {"dtype": "F32"}}), "tensor b: .*lacks shape and data_offsets", id="lacking"),
        pytest.param(raw(sound(dtype=4)), "tensor b: expected a data type's name, got 4", id="type no text"),
        pytest.param(raw(sound(shape=5)), "tensor b: impossible shape 5", id="shape no list"),
        pytest.param(raw(sound(shape=[-5])), r"tensor b: impossible shape \[-5\]", id="negative shape"),
        pytest.param(raw(sound(shape=[5, True])), r"tensor b: impossible shape \[5, True\]", id="bool in shape"),
        pytest.param(raw(sound(shape=[5.0])), r"tensor b: impossible shape \[5.0\]", id="float in shape"),
        pytest.param(raw(sound(shape=[2**32, 2**32])), r"tensor b: impossible shape \[4294967296, 42", id="product overflows"),
        pytest.param(raw(sound(shape=[0, 2**63], data_offsets=[24, 24])), r"impossible shape \[0, 92", id="empty, yet huge"),
        pytest.param(raw(sound(shape=[10**4000] * 999)), r"tensor b: impossible shape \[1000", id="huge integers"),
        pytest.param(raw(sound(data_offsets=None)), "tensor b: impossible byte range null", id="no range"),
        pytest.param(raw(sound(data_offsets=[24])), r"tensor b: impossible byte range \[24\]", id="half a range"),
        pytest.param(raw(sound(data_offsets=[44, 24])), r"tensor b: impossible byte range \[44, 24\]", id="backwards"),
        pytest.param(raw(sound(data_offsets=[-4, 16])), r"tensor b: impossible byte range \[-4, 16\]", id="negative range"),
        pytest.param(raw(sound(data_offsets=[24.0, 44.0])), r"impossible byte range \[24.0, 44.0\]", id="range of floats"),
        pytest.param(raw(sound(data_offsets=[24, 10**30])), "tensor b: impossible byte range", id="range beyond any file"),
        pytest.param(raw(sound(shape=[4])), r"tensor b: F32 \[4\] needs 16 bytes, the header gives 20", id="too many bytes"),
        pytest.param(raw(sound(dtype="F64")), r"tensor b: F64 \[5\] needs 40 bytes, the header gives 20", id="wrong type"),
        pytest.param(raw(sound(dtype="F4", shape=[39])), r"tensor b: F4 \[39\] is no whole number of bytes", id="half a byte"),
        pytest.param(
            raw(sound(data_offsets=[20, 40]), DATA[:40]), "tensor b: its bytes 20 to 40 overlap those of tensor a", id="overlap"
        ),
        pytest.param(
            raw({"a": A, "z": {"dtype": "F32", "shape": [0], "data_offsets": [8, 8]}}, DATA[:24]),
            "tensor z: its bytes 8 to 8 overlap those of tensor a",
            id="nothing inside another",
        ),
        pytest.param(
            raw(sound(data_offsets=[28, 48]), DATA + b"1234"), "tensor b: expected .* start at 24, got 28: a hole", id="hole"
        ),
        pytest.param(raw({"b": B}), "tensor b: expected .* start at 0, got 24: a hole", id="hole at the start"),
        pytest.param(
            raw(sound(), DATA + b"more"), "need 44 bytes of data, the file has 48: the last 4 bytes are of no", id="trailing"
        ),
        pytest.param(
            raw({}), "need 0 bytes of data, the file has 44: the last 44 bytes are of no tensor", id="no tensors, but data"
        ),
        pytest.param(
            raw(sound(), DATA[:-5]), r"need 44 .* has 39 \(is it torn\? 5 bytes are missing, those of tensor b\)", id="torn"
        ),
        pytest.param(raw(sound(), b""), r"44 bytes are missing, those of tensor a and 1 more\)", id="no data at all"),
        pytest.param(
            raw({"__metadata__": [], **sound()}), r"__metadata__: expected an object of strings, got \[\]", id="metadata"
        ),
        pytest.param(
            raw({"__metadata__": {"n": 1}, **sound()}), "__metadata__: n: expected a string, got 1", id="metadata's value"
        ),
        pytest.param(
            raw({"__metadata__": A, **sound()}), "a tensor is named __metadata__, which the format", id="reserved name"
        ),
        pytest.param(raw({"a": A, "..": B}), r"tensor \.\.: its name cannot be a folder's", id="name leaves its folder"),
        pytest.param(
            raw({"a": A, "x/../../b": B}), "its name cannot be a folder's: .*without /. Rename it", id="name with slashes"
        ),
        pytest.param(raw({"a": A, "n" * 300: B}), "tensor n{120}…: its name cannot be a folder's", id="name too long"),
        pytest.param(raw({"a": A, "\ud800": B}), r"tensor '\\ud800': its name is not valid Unicode", id="name no Unicode"),
    ],
)
def test_damage_is_explained(tmp_path: Path, content: bytes, message: str) -> None:
    file = written(tmp_path / "model.safetensors", content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(file)
    assert str(caught.value).startswith(f"{file.place}")
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    assert len(str(caught.value).removeprefix(file.place)) < 600


def test_all_that_is_wrong_is_listed_at_once(tmp_path: Path) -> None:
    entries = {"c": {"dtype": "F32"}, "d": {**B, "shape": [-1]}, "e": {**A, "data_offsets": [8, 32]}, "f": None}
    file = written(tmp_path / "x.safetensors", raw({"a": A, "__metadata__": {"k": 1}, **entries}, DATA[:30]))
    with pytest.raises(CheckpointError, match=r"x\.safetensors is damaged and .*: 7 problems\n") as caught:
        read_header(file)
    for part in (
        "__metadata__: k: expected a string, got 1",
        "tensor c: its header entry lacks shape and data_offsets",
        "tensor d: impossible shape [-1]",
        "tensor e: its bytes 8 to 32 overlap those of tensor a",
        "tensor d: its bytes 24 to 44 overlap those of tensor e",
        "tensor f: expected an object with dtype, shape and data_offsets, got null",
        "14 bytes are missing, those of tensor e and 1 more",
    ):
        assert any(part in problem for problem in caught.value.problems)


def test_thousands_of_problems_are_cut(tmp_path: Path) -> None:
    file = written(tmp_path / "x.safetensors", raw({f"t{index}": 0 for index in range(5000)}))
    with pytest.raises(CheckpointError, match=r"t49: expected an object .*\n  - and 4950 more$"):
        read_header(file)


def test_a_header_over_the_limit_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", MAX_HEADER_BYTES + 1))
    with path.open("r+b") as file:
        file.truncate(2 * MAX_HEADER_BYTES)  # a sparse file
    with pytest.raises(
        CheckpointError, match=f"expected a header of 2 to {MAX_HEADER_BYTES} bytes, got {MAX_HEADER_BYTES + 1}"
    ):
        read_header(LocalFile(path, 2 * MAX_HEADER_BYTES))


def test_a_file_cut_while_it_is_read_is_noticed(tmp_path: Path) -> None:
    content = raw(sound())
    (tmp_path / "x.safetensors").write_bytes(content[:50])
    with pytest.raises(CheckpointError, match=r"expected 129 bytes from byte 8 on, got 42: it changed while it was read"):
        read_header(LocalFile(tmp_path / "x.safetensors", len(content)))


TORCH = {
    "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64, "BOOL": torch.bool,
    "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "U8": torch.uint8, "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}  # fmt: skip


def test_names_types_shapes_and_bytes_are_those_that_safetensors_wrote(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    tensors = {}
    for index, dtype in enumerate(TORCH.values()):
        size = torch.empty(0, dtype=dtype).element_size()
        entries = generator.integers(0, 2 if dtype == torch.bool else 256, 6 * size, dtype=np.uint8)
        tensors[f"weights.{index}"] = torch.from_numpy(entries).view(dtype).reshape(2, 3)
    tensors |= {
        "norm": torch.linspace(-1, 1, 7),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "größe": torch.ones(1),
    }
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    found = read_header(LocalFile(path, path.stat().st_size))
    assert found.keys() == tensors.keys()
    content = path.read_bytes()
    for name, expected in load_file(path).items():
        info = found[name]
        assert TORCH[info.dtype] == expected.dtype
        assert info.shape == tuple(expected.shape)
        assert isinstance(info.data, FileRows)
        length = expected.numel() * expected.element_size()
        bits = expected.reshape(-1).view(torch.uint8).numpy().tobytes() if length else b""
        assert content[info.data.offset : info.data.offset + length] == bits
        if info.dtype in ("BF16", "F16", "F32"):
            assert info.read(0, info.rows).tobytes() == bits
    assert pickle.loads(pickle.dumps(found)) == found


def test_rows_of_a_part_are_read(tmp_path: Path) -> None:
    weight = torch.linspace(-3, 3, 60).reshape(12, 5)
    save_file({"other": torch.ones(9), "w": weight}, tmp_path / "x.safetensors")
    info = read_header(LocalFile(tmp_path / "x.safetensors", (tmp_path / "x.safetensors").stat().st_size))["w"]
    np.testing.assert_array_equal(info.read(3, 7).view(np.float32), weight[3:7].numpy())


@pytest.mark.parametrize(
    ("header", "data", "names"),
    [
        pytest.param({}, b"", [], id="nothing"),
        pytest.param({"__metadata__": {}}, b"", [], id="metadata alone"),
        pytest.param({"__metadata__": None, "a": A}, DATA[:24], ["a"], id="metadata null"),
        pytest.param({"a": {**A, "note": 1}}, DATA[:24], ["a"], id="a key more"),
        pytest.param({"z": {**A, "shape": [0, 4], "data_offsets": [0, 0]}, "a": A}, DATA[:24], ["z", "a"], id="empty tensor"),
        pytest.param({"b": B, "a": A}, DATA, ["b", "a"], id="any order"),
        pytest.param(json.dumps(sound()).encode() + b"   ", DATA, ["a", "b"], id="padding"),
        pytest.param({"a": {"dtype": "F6_E2M3", "shape": [4, 2], "data_offsets": [0, 6]}}, DATA[:6], ["a"], id="six bits"),
        pytest.param({"a": {"dtype": "F4", "shape": [12], "data_offsets": [0, 6]}}, DATA[:6], ["a"], id="four bits"),
        pytest.param({"a": {"dtype": "I128", "shape": [5], "data_offsets": [0, 24]}}, DATA[:24], ["a"], id="type of tomorrow"),
    ],
)
def test_what_is_unusual_but_sound_is_read(tmp_path: Path, header: Any, data: bytes, names: list[str]) -> None:
    assert list(read_header(written(tmp_path / "x.safetensors", raw(header, data)))) == names


def test_every_type_the_package_writes_is_known() -> None:
    assert TORCH.keys() | {"F4", "F6_E2M3", "F6_E3M2"} == BITS.keys()
    for name, dtype in TORCH.items():
        assert BITS[name] == 8 * torch.empty(0, dtype=dtype).element_size()
