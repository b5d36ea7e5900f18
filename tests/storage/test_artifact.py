from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from flows.run import Outcome
from serving.lookup import export
from serving.router import artifact_router
from storage.artifact import Artifact, find_by_inputs, make_latest, publish, resolve
from storage.errors import ArtifactError, OutputExistsError
from storage.layout import LATEST, MANIFEST
from storage.manifest import Manifest
from tests.pipeline.test_invariants import router_of
from tests.support.running import merged
from tests.support.tiny_experts import Family


@pytest.fixture
def outcome(family: Family) -> Outcome:
    return merged(family.recipe(router=router_of(family)))


def test_a_fresh_artifact_verifies(outcome: Outcome) -> None:
    assert Artifact(outcome.path).verify() == []


def test_every_changed_byte_is_found(outcome: Outcome) -> None:
    """In every file, the first, a middle and the last byte; the manifest refuses to open."""
    files = sorted(path for path in outcome.path.rglob("*") if path.is_file())
    assert len(files) > 12
    for path in files:
        original = path.read_bytes()
        for position in {0, len(original) // 2, len(original) - 1}:
            changed = bytearray(original)
            changed[position] ^= 1
            path.write_bytes(changed)
            if path.name == MANIFEST:
                with pytest.raises(ArtifactError, match=r"damaged|was changed|expected artifact format"):
                    Artifact(outcome.path)
            else:
                name = path.relative_to(outcome.path).as_posix()
                assert [p for p in Artifact(outcome.path).verify() if p.startswith(f"{name}: expected sha256")]
        path.write_bytes(original)
    assert Artifact(outcome.path).verify() == []


def test_every_byte_of_the_manifest_counts(outcome: Outcome) -> None:
    path = outcome.path / MANIFEST
    original = path.read_bytes()
    for position in range(0, len(original), 97):
        changed = bytearray(original)
        changed[position] ^= 2
        with pytest.raises(ArtifactError):
            Manifest.from_bytes(bytes(changed), "m")


def test_missing_short_and_foreign_files_are_found(outcome: Outcome) -> None:
    (outcome.path / "experts" / "math" / "config.json").unlink()
    (outcome.path / "stray.txt").write_text("x")
    pool = outcome.path / "pool-00001-of-00001.safetensors"
    pool.write_bytes(pool.read_bytes()[:-1])
    problems = "\n".join(Artifact(outcome.path).verify())
    assert "experts/math/config.json is missing" in problems
    assert "stray.txt is not part of the artifact" in problems
    assert "pool-00001-of-00001.safetensors: expected" in problems


def test_a_folder_without_manifest_is_refused(outcome: Outcome) -> None:
    (outcome.path / MANIFEST).unlink()
    with pytest.raises(ArtifactError, match=r"is not an artifact: it has no manifest.json"):
        Artifact(outcome.path)
    with pytest.raises(ArtifactError, match=r"is not an artifact: it has no manifest.json"):
        Artifact(outcome.path.parent)


def test_work_is_never_an_artifact(outcome: Outcome) -> None:
    hidden = outcome.path.parent / ".work" / "x"
    shutil.copytree(outcome.path, hidden)
    with pytest.raises(ArtifactError, match="is not an artifact"):
        Artifact(hidden)


def test_an_artifact_is_named_in_three_ways(outcome: Outcome) -> None:
    output = outcome.path.parent
    assert resolve(str(output)) == resolve(f"{output}@{outcome.version}") == resolve(str(outcome.path)) == outcome.path
    with pytest.raises(ArtifactError, match="no such directory"):
        resolve(str(output / "nowhere"))
    with pytest.raises(ArtifactError, match="it has no manifest"):
        resolve(f"{output}@0123")


def test_a_damaged_latest_is_explained(outcome: Outcome) -> None:
    (outcome.path.parent / LATEST).write_text('{"version": "../../etc"}')
    with pytest.raises(ArtifactError, match=r"latest.json is damaged .* Name a version"):
        Artifact(outcome.path.parent)


def test_an_output_with_strange_content_is_refused(family: Family) -> None:
    output = family.folder.parent / "output"
    output.mkdir()
    (output / "thesis.tex").write_text("mine")
    with pytest.raises(OutputExistsError, match=r"is not a folder of artifacts: .* thesis.tex"):
        merged(family.recipe())
    assert sorted(path.name for path in output.iterdir()) == ["thesis.tex"]


def test_a_killed_publish_is_replaced(outcome: Outcome, family: Family) -> None:
    """A version folder without manifest is what a kill between rename and manifest leaves."""
    (outcome.path / MANIFEST).unlink()
    (outcome.path / "rubbish").write_text("half")
    (outcome.path.parent / LATEST).unlink()
    again = merged(family.recipe(router=router_of(family)))
    assert again.new
    assert again.version == outcome.version
    assert Artifact(outcome.path).verify() == []


def test_a_damaged_version_is_built_again(outcome: Outcome, family: Family) -> None:
    assert find_by_inputs(outcome.path.parent, outcome.manifest.inputs) is not None
    (outcome.path / "experts" / "math" / "config.json").unlink()
    assert find_by_inputs(outcome.path.parent, outcome.manifest.inputs) is None
    again = merged(family.recipe(router=router_of(family)))
    assert (again.new, again.version) == (True, outcome.version)
    assert Artifact(outcome.path).verify() == []
    assert [path.name for path in (outcome.path.parent / ".work").iterdir() if path.is_dir()] == []


def test_a_version_with_a_flipped_byte_is_built_again(outcome: Outcome, family: Family) -> None:
    pool = outcome.path / "pool-00001-of-00001.safetensors"
    raw = bytearray(pool.read_bytes())
    raw[-3] ^= 1
    pool.write_bytes(raw)
    again = merged(family.recipe(router=router_of(family)))
    assert (again.new, again.version) == (True, outcome.version)
    assert Artifact(outcome.path).verify() == []


def test_a_manifest_that_names_another_version_is_found(outcome: Outcome) -> None:
    other = outcome.manifest.model_copy(update={"version": "0" * 16})
    (outcome.path / MANIFEST).write_bytes(other.to_bytes())
    assert any("its files make version" in problem for problem in Artifact(outcome.path).verify())


def test_an_expert_without_all_its_tensors_is_not_exported(outcome: Outcome, tmp_path: Path) -> None:
    path = outcome.path / "experts" / "math" / "rows.safetensors"
    rows = load_file(path)
    rows.pop("model.norm.weight")
    save_file(rows, path)
    with pytest.raises(ArtifactError, match=r"rows.safetensors is missing or damaged .*expected rows of 21 tensors, got 20"):
        export(Artifact(outcome.path), "math", tmp_path / "x")


def test_foreign_links_are_found(outcome: Outcome) -> None:
    (outcome.path / "link").symlink_to("/tmp", target_is_directory=True)
    assert Artifact(outcome.path).verify() == ["link is not part of the artifact"]


def test_a_renamed_version_is_not_taken_for_done(outcome: Outcome, family: Family) -> None:
    outcome.path.rename(outcome.path.with_name("kept"))
    again = merged(family.recipe(router=router_of(family)))
    assert again.new
    assert Artifact(outcome.path.parent).path == outcome.path


def test_a_damaged_latest_is_mended_by_the_next_run(outcome: Outcome, family: Family) -> None:
    for content in ("{", '{"version": "x"}', '{"version": "x", "sequence": "y"}'):
        (outcome.path.parent / LATEST).write_text(content)
        assert not merged(family.recipe(router=router_of(family))).new
        assert Artifact(outcome.path.parent).path == outcome.path


@pytest.mark.parametrize(
    "name", ["pool.safetensors.index.json", "experts/math/rows.safetensors", "pool-00001-of-00001.safetensors"]
)
def test_reading_a_damaged_artifact_is_explained(outcome: Outcome, tmp_path: Path, name: str) -> None:
    for content in (b"", b"[1]", b"\xff" * 100):
        (outcome.path / name).write_bytes(content)
        with pytest.raises(ArtifactError, match=r"is missing or damaged .* Pull or build the artifact again"):
            export(Artifact(outcome.path), "math", tmp_path / "x")


def test_a_damaged_router_is_explained(outcome: Outcome) -> None:
    (outcome.path / "router" / "router.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"its router is damaged .* Pull or build the artifact again"):
        artifact_router(Artifact(outcome.path))


def test_two_publishers_leave_both_versions_and_one_latest(outcome: Outcome, tmp_path: Path) -> None:
    output = outcome.path.parent
    versions = []
    threads = []
    for i in range(4):
        staged = tmp_path / f"staged{i}"
        shutil.copytree(outcome.path, staged)
        (staged / MANIFEST).unlink()
        manifest = outcome.manifest.model_copy(update={"version": f"v{i}"})
        versions.append(manifest.version)
        threads.append(threading.Thread(target=publish, args=(staged, output, manifest)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all((output / version / MANIFEST).is_file() for version in versions)
    found = json.loads((output / LATEST).read_bytes())
    assert found["version"] in versions
    assert found["sequence"] == 5
    make_latest(output, outcome.version)
    make_latest(output, outcome.version)
    assert json.loads((output / LATEST).read_bytes()) == {"version": outcome.version, "sequence": 6}
