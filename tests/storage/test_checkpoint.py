from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from storage.errors import CheckpointError
from storage.tensors import FileRows
from tests.support.tiny_experts import Family, open_at, random_tensors, write_checkpoint


def test_rows_are_read_as_raw_bits(family: Family) -> None:
    for name, tensors in {"base": family.base, **family.experts}.items():
        checkpoint = open_at(name, family.folder / name)
        assert checkpoint.tensors.keys() == tensors.keys()
        for tensor, info in checkpoint.tensors.items():
            expected = tensors[tensor].view(torch.int16).numpy().view(np.uint16).reshape(info.rows, info.width)
            np.testing.assert_array_equal(info.read(0, info.rows), expected)
            middle = info.rows // 2
            np.testing.assert_array_equal(info.read(middle, info.rows), expected[middle:])


def test_files_that_matter_are_listed(family: Family) -> None:
    files = open_at("expert code", family.expert("code")).files
    assert "config.json" in files
    assert "tokenizer_config.json" in files
    assert "model.safetensors.index.json" in files
    assert sum(name.endswith(".safetensors") for name in files) == 3


def torn(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def torn_in_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


@pytest.mark.parametrize(("damage", "message"), [(torn, r"model.safetensors"), (torn_in_header, r"model.safetensors")])
def test_damaged_files_are_refused_by_expert_and_file(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    write_checkpoint(tmp_path / "math", random_tensors(0))
    damage(tmp_path / "math" / "model.safetensors")
    with pytest.raises(CheckpointError, match=message) as caught:
        open_at("expert math", tmp_path / "math")
    assert str(caught.value).startswith("expert math: ")


def test_a_config_that_is_no_object_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "math", random_tensors(0))
    (tmp_path / "math" / "config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match=r"config.json: expected a JSON object, got \[1\]"):
        open_at("expert math", tmp_path / "math")


def test_all_problems_of_a_checkpoint_are_listed(family: Family) -> None:
    folder = family.expert("code")
    (folder / "config.json").unlink()
    shards = sorted(folder.glob("*.safetensors"))
    torn(shards[0])
    torn_in_header(shards[1])
    with pytest.raises(CheckpointError, match="3 problems") as caught:
        open_at("expert code", folder)
    assert [part in str(caught.value) for part in ("config.json", shards[0].name, shards[1].name)] == [True] * 3


def test_pickles_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({"never": "opened"}))
    with pytest.raises(CheckpointError, match=r"only pickles \(pytorch_model.bin\), which are never opened. Convert it"):
        open_at("base", tmp_path)


def test_missing_shards_are_named(family: Family) -> None:
    sorted(family.expert("code").glob("*.safetensors"))[1].unlink()
    with pytest.raises(
        CheckpointError,
        match=r"index.json: it names shards that are not there: model-00002-of-00003\S+ \(with \S+ and \d+ other tensors\)",
    ):
        open_at("expert code", family.expert("code"))


def test_names_never_leave_the_folder(family: Family) -> None:
    index = family.expert("code") / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../base/model.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"names files outside its folder"):
        open_at("expert code", family.expert("code"))


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"expert math: there is no directory .*nowhere. Correct the path"):
        open_at("expert math", tmp_path / "nowhere")


def test_a_file_cut_after_planning_is_noticed(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "math", random_tensors(0))
    found = open_at("expert math", tmp_path / "math").tensors.values()
    info = max(found, key=lambda info: info.data.offset if isinstance(info.data, FileRows) else 0)
    torn(tmp_path / "math" / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=rf"model.safetensors: tensor {info.name}: expected \d+ bytes .* the file ends there"
    ):
        info.read(0, info.rows)


def test_one_file_is_used_before_an_index_of_others(family: Family) -> None:
    """As transformers does; and it is said."""
    folder = family.expert("code")
    save_file(family.experts["math"], folder / "model.safetensors")
    found = open_at("expert code", folder)
    info = found.tensors["lm_head.weight"]
    expected = family.experts["math"]["lm_head.weight"].view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(info.read(0, info.rows)[:20], expected[:20])
    assert [note for note in found.notes if "model.safetensors is used, as transformers does" in note]
    assert "model-00001-of-00003.safetensors" not in found.files
