from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from storage.checkpoint import open_checkpoint, read_header
from storage.errors import CheckpointError
from tests.support.tiny_experts import Family, random_tensors, write_checkpoint


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def rewrite(path: Path, header: Any, data: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def test_rows_are_read_as_raw_bits(family: Family) -> None:
    for name, tensors in {"base": family.base, **family.experts}.items():
        checkpoint = open_checkpoint(name, family.folder / name)
        assert checkpoint.tensors.keys() == tensors.keys()
        for tensor, info in checkpoint.tensors.items():
            expected = tensors[tensor].view(torch.int16).numpy().view(np.uint16).reshape(info.rows, info.width)
            np.testing.assert_array_equal(info.read(0, info.rows), expected)
            middle = info.rows // 2
            np.testing.assert_array_equal(info.read(middle, info.rows), expected[middle:])


def test_files_that_matter_are_listed(family: Family) -> None:
    files = open_checkpoint("expert code", family.expert("code")).files
    assert "config.json" in files
    assert "tokenizer_config.json" in files
    assert "model.safetensors.index.json" in files
    assert sum(name.endswith(".safetensors") for name in files) == 3


def torn(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def torn_in_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def nearly_empty(path: Path) -> None:
    path.write_bytes(b"abc")


def enormous_header(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 2**31) + path.read_bytes()[8:])


def no_json(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[8] = ord("]")
    path.write_bytes(raw)


def edit(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        header, data = header_of(path)
        change(header)
        rewrite(path, header, data)

    return apply


def overlap(header: dict[str, Any]) -> None:
    a, b = header["lm_head.weight"], header["model.embed_tokens.weight"]
    b["data_offsets"] = [offset + 2 for offset in a["data_offsets"]]


def wrong_size(header: dict[str, Any]) -> None:
    header["lm_head.weight"]["shape"] = [20, 15]


def backwards(header: dict[str, Any]) -> None:
    header["lm_head.weight"]["data_offsets"].reverse()


def no_list(header: dict[str, Any]) -> None:
    header["lm_head.weight"]["shape"] = 5


def no_range(header: dict[str, Any]) -> None:
    header["lm_head.weight"]["data_offsets"] = None


def negative(header: dict[str, Any]) -> None:
    header["lm_head.weight"]["shape"] = [-20, -16]


def no_offsets(header: dict[str, Any]) -> None:
    del header["lm_head.weight"]["data_offsets"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (torn, r"must be saved or downloaded again: its tensors need \d+ bytes of data, the file has \d+ \(is it torn"),
        (torn_in_header, r"not a whole safetensors file: expected a header of 2 to 92 bytes"),
        (nearly_empty, r"not a whole safetensors file"),
        (enormous_header, r"not a whole safetensors file: .* got 2147483648"),
        (no_json, r"safetensors header cannot be read"),
        (edit(overlap), r"overlap"),
        (edit(wrong_size), r"tensor lm_head.weight: BF16 \[20, 15\] needs 600 bytes, the header gives 640"),
        (edit(backwards), r"tensor lm_head.weight: impossible byte range \[640, 0\]"),
        (edit(no_list), r"tensor lm_head.weight: impossible shape 5"),
        (edit(no_range), r"tensor lm_head.weight: impossible byte range None"),
        (edit(negative), r"tensor lm_head.weight: impossible shape \[-20, -16\]"),
        (edit(no_offsets), r"tensor lm_head.weight: its header entry lacks"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    write_checkpoint(tmp_path / "math", random_tensors(0))
    damage(tmp_path / "math" / "model.safetensors")
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint("expert math", tmp_path / "math")
    assert str(caught.value).startswith("expert math: ")


def test_a_config_that_is_no_object_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "math", random_tensors(0))
    (tmp_path / "math" / "config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match=r"config.json: expected a JSON object, got \[1\]"):
        open_checkpoint("expert math", tmp_path / "math")


def test_all_problems_of_a_checkpoint_are_listed(family: Family) -> None:
    folder = family.expert("code")
    (folder / "config.json").unlink()
    shards = sorted(folder.glob("*.safetensors"))
    torn(shards[0])
    torn_in_header(shards[1])
    with pytest.raises(CheckpointError, match="3 problems") as caught:
        open_checkpoint("expert code", folder)
    assert [part in str(caught.value) for part in ("config.json", shards[0].name, shards[1].name)] == [True] * 3


def test_pickles_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({"never": "opened"}))
    with pytest.raises(CheckpointError, match=r"only pickles \(pytorch_model.bin\), which are never opened. Convert it"):
        open_checkpoint("base", tmp_path)


def test_missing_shards_are_named(family: Family) -> None:
    sorted(family.expert("code").glob("*.safetensors"))[1].unlink()
    with pytest.raises(CheckpointError, match=r"lacks shards its index names: model-00002-of-00003"):
        open_checkpoint("expert code", family.expert("code"))


def test_names_never_leave_the_folder(family: Family) -> None:
    index = family.expert("code") / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../base/model.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"names files outside its folder"):
        open_checkpoint("expert code", family.expert("code"))


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"expert math: there is no directory .*nowhere. Correct the path"):
        open_checkpoint("expert math", tmp_path / "nowhere")


def test_a_file_cut_after_planning_is_noticed(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "math", random_tensors(0))
    path = tmp_path / "math" / "model.safetensors"
    info = max(read_header(path).values(), key=lambda info: info.offset)
    torn(path)
    with pytest.raises(CheckpointError, match="the file ends inside rows"):
        info.read(0, info.rows)
