from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from flows.run import read_recipe, run_recipe
from pipeline.engine import Silent
from serving import lookup
from serving.lookup import export
from storage.artifact import Artifact
from storage.checkpoint import SIDE_FILES
from storage.errors import ArtifactError, OutputExistsError
from tests.support.running import merged
from tests.support.tiny_experts import NAMES, Family, read_checkpoint

EXPERTS = ("chinese", "code", "math", "prose")


@pytest.fixture(scope="module")
def whole(tiny_mistral: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The trained family with K=N."""
    folder = tmp_path_factory.mktemp("whole")
    recipe = read_recipe(
        tiny_mistral / "recipe.yaml",
        {"merge.groups": 4, "router.kind": "none", "router.queries": {}},
        str(folder / "out"),
        str(folder / "deltas"),
        "none",
    )
    return Artifact(run_recipe(recipe, Silent()).path)


@pytest.mark.parametrize("expert", EXPERTS)
def test_exported_experts_load_in_transformers_and_answer_alike(
    whole: Artifact, tiny_mistral: Path, tmp_path: Path, expert: str
) -> None:
    export(whole, expert, tmp_path / expert)
    beside = [path.name for path in (tiny_mistral / "experts" / expert).iterdir() if path.name in SIDE_FILES]
    assert len(beside) == 4
    for name in beside:
        assert (tmp_path / expert / name).read_bytes() == (tiny_mistral / "experts" / expert / name).read_bytes()
    own, found = (AutoModelForCausalLM.from_pretrained(f) for f in (tiny_mistral / "experts" / expert, tmp_path / expert))
    assert {n: p.shape for n, p in own.named_parameters()} == {n: p.shape for n, p in found.named_parameters()}
    tokenizers = [AutoTokenizer.from_pretrained(f) for f in (tiny_mistral / "experts" / expert, tmp_path / expert)]
    text = (tiny_mistral / "texts" / f"{expert}.txt").read_text("utf-8")[:300]
    ids, again = (tokenizer(text, return_tensors="pt")["input_ids"] for tokenizer in tokenizers)
    assert torch.equal(ids, again)
    assert len(tokenizers[1]) == found.config.vocab_size
    with torch.inference_mode():
        assert torch.equal(own(input_ids=ids).logits, found(input_ids=ids).logits)


def test_an_export_in_shards_has_an_index(family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = merged(family.recipe(**{"merge.groups": 4}))
    monkeypatch.setattr(lookup, "SHARD_BYTES", 2000)
    files = export(Artifact(outcome.path), "math", tmp_path / "x")
    assert "model.safetensors.index.json" in [path.name for path in files]
    assert sum(path.suffix == ".safetensors" for path in files) > 2
    for name, tensor in read_checkpoint(tmp_path / "x").items():
        assert torch.equal(tensor, family.experts["math"][name])


def test_a_failed_export_leaves_nothing(family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = merged(family.recipe())

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lookup, "write_at", full)
    with pytest.raises(OSError, match="No space left"):
        export(Artifact(outcome.path), "math", tmp_path / "x" / "math")
    assert list((tmp_path / "x").iterdir()) == []


def test_exports_overwrite_nothing(family: Family, tmp_path: Path) -> None:
    outcome = merged(family.recipe())
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "mine").write_text("")
    with pytest.raises(OutputExistsError, match="exists and is not an empty folder"):
        export(Artifact(outcome.path), "math", tmp_path / "x")
    with pytest.raises(ArtifactError, match="has no expert 'poetry'"):
        export(Artifact(outcome.path), "poetry", tmp_path / "y")
    assert not (tmp_path / "y").exists()


def test_rows_are_gathered_in_any_order(family: Family) -> None:
    artifact = Artifact(merged(family.recipe()).path)
    name = "model.layers.0.mlp.up_proj.weight"
    rows = artifact.manifest.tensors[name].rows
    whole = artifact.rows(name, np.arange(rows, dtype=np.int32))
    mixed = np.array([rows - 1, 0, 3, 3, 1], np.int32)
    np.testing.assert_array_equal(artifact.rows(name, mixed), whole[mixed])
    with pytest.raises(ArtifactError, match=f"a row index lies outside its {rows} rows"):
        artifact.rows(name, np.array([rows], np.int32))
    assert set(artifact.expert_rows(NAMES[0])) == set(family.experts[NAMES[0]])
