"""What lies on disk between runs and in artifacts is not taken for something else."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from flows.run import Outcome
from pipeline.kernels.sizes import BINS, LOW
from pipeline.plan import TensorPlan
from pipeline.stages.trimming import read_counts, write_counts
from serving.lookup import export
from storage import deltas
from storage.artifact import Artifact
from storage.errors import ArtifactError, PlanError
from storage.layout import DELTA_FORMAT, MANIFEST, RESIDUE_FILE
from storage.local_store import LocalStore
from storage.manifest import FileRecord, Manifest
from tests.support.running import merged
from tests.support.tiny_experts import NAMES, Family


def test_kernels_count_into_as_many_bins_as_the_store_has() -> None:
    """The layers do not import each other."""
    assert deltas.BINS == BINS


def test_stores_of_another_format_are_made_anew(family: Family) -> None:
    first = merged(family.recipe())
    records = sorted((family.folder.parent / "deltas").rglob("complete.json"))
    assert len(records) == len(NAMES) + 1
    for path in records:
        record = json.loads(path.read_bytes())
        assert record["format"] == DELTA_FORMAT
        path.write_text(json.dumps({**record, "format": DELTA_FORMAT - 1}))
    second = merged(family.recipe(output="../again"))
    assert second.version == first.version
    assert second.manifest.moved["ingest read"] == first.manifest.moved["ingest read"] > 0
    assert second.manifest.moved["similarity read"] == first.manifest.moved["similarity read"] > 0


def test_counts_of_a_tensor_are_not_those_of_one_whose_name_begins_alike(tmp_path: Path) -> None:
    folder, counts = LocalStore(tmp_path), np.zeros(LOW, np.int64)
    for name, place in (("a.weight", 3), ("a.weight.0", 5), ("a", 7)):
        for start in (0, 8):
            here = counts.copy()
            here[place] = start + 1
            write_counts(folder, name, start, {1: here})
    found = read_counts(folder, [TensorPlan("a.weight", "merge", 2, None, {})], [1])[0]
    assert found.nonzero()[0].tolist() == [3]
    assert found[3] == 10
    assert not read_counts(folder, [TensorPlan("a.weight", "merge", 2, None, {})], [0]).any()


def declare(outcome: Outcome, path: Path) -> None:
    """Let the manifest list a file as it now is: an artifact made by somebody else."""
    place = outcome.path / MANIFEST
    manifest = Manifest.from_bytes(place.read_bytes(), "")
    name = path.relative_to(outcome.path).as_posix()
    record = FileRecord(bytes=path.stat().st_size, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    place.write_bytes(manifest.model_copy(update={"files": {**manifest.files, name: record}}).to_bytes())


@pytest.mark.parametrize("column", [-1, 16])
def test_an_entry_kept_beyond_its_row_is_damage(family: Family, tmp_path: Path, column: int) -> None:
    outcome = merged(family.recipe(**{"merge.method": "byom", "merge.groups": 1}))
    path = outcome.path / "experts" / "math" / RESIDUE_FILE
    tensors = load_file(path)
    name = "model.layers.0.self_attn.q_proj.weight.columns"
    tensors[name][2, 1] = column
    save_file(tensors, path)
    declare(outcome, path)
    with pytest.raises(ArtifactError, match=rf"{RESIDUE_FILE} is missing or damaged .*columns .* of 16"):
        export(Artifact(outcome.path), "math", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_residue_of_another_shape_is_damage(family: Family, tmp_path: Path) -> None:
    outcome = merged(family.recipe(**{"merge.method": "byom", "merge.groups": 1}))
    path = outcome.path / "experts" / "math" / RESIDUE_FILE
    tensors = load_file(path)
    name = "model.layers.0.self_attn.q_proj.weight.values"
    tensors[name] = torch.cat([tensors[name], tensors[name]], dim=1)
    save_file(tensors, path)
    declare(outcome, path)
    with pytest.raises(ArtifactError, match=r"damaged .*q_proj.*values at"):
        export(Artifact(outcome.path), "math", tmp_path / "out")


@pytest.mark.parametrize(
    ("groups", "rules"),
    [
        (2, [{"match": "*embed*", "policy": "private", "groups": "auto"}]),
        ("auto", [{"match": "*", "groups": 2}]),
    ],
)
def test_a_budget_that_nothing_would_spend_is_refused(family: Family, groups: object, rules: list[dict[str, object]]) -> None:
    recipe = family.recipe(**{"merge.groups": groups, "merge.budget": 0.5, "merge.rules": rules})
    with pytest.raises(PlanError, match=r"merge.budget: no merged tensor has groups: auto, so nothing is spent"):
        merged(recipe)


def test_the_budget_an_error_names_is_enough(family: Family) -> None:
    rules = [{"match": "*q_proj*", "groups": 3}]
    settings = {"merge.groups": "auto", "merge.rules": rules, "merge.method": "average"}
    with pytest.raises(PlanError, match=r"need 0\.\d{4}, got 0.26; raise it") as caught:
        merged(family.recipe(**settings, **{"merge.budget": 0.26}))
    named = float(str(caught.value).split("need ")[1].split(",")[0])
    outcome = merged(family.recipe(**settings, **{"merge.budget": named}))
    assert outcome.manifest.tensors["model.layers.0.self_attn.q_proj.weight"].groups == 3
