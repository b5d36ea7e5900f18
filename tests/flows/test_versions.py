from __future__ import annotations

from pathlib import Path

import pytest

from flows.run import Outcome
from storage.artifact import Artifact
from storage.errors import OutputExistsError
from storage.layout import LATEST, MANIFEST
from tests.pipeline.test_invariants import router_of
from tests.support.running import merged
from tests.support.tiny_experts import Family


@pytest.fixture
def outcome(family: Family) -> Outcome:
    return merged(family.recipe(router=router_of(family)))


@pytest.fixture
def version(outcome: Outcome, tmp_path: Path) -> Path:
    """The folder of what was published."""
    return tmp_path / "output" / outcome.version


def test_an_output_with_strange_content_is_refused(family: Family, tmp_path: Path) -> None:
    output = tmp_path / "output"
    output.mkdir()
    (output / "thesis.tex").write_text("mine")
    with pytest.raises(OutputExistsError, match=r"is not a folder of artifacts: .* thesis.tex"):
        merged(family.recipe())
    assert sorted(path.name for path in output.iterdir()) == ["thesis.tex"]


def test_a_version_without_manifest_is_built_again(version: Path, outcome: Outcome, family: Family) -> None:
    (version / MANIFEST).unlink()
    (version / "rubbish").write_text("half")
    (version.parent / LATEST).unlink()
    again = merged(family.recipe(router=router_of(family)))
    assert (again.new, again.version) == (True, outcome.version)
    assert Artifact(version).verify() == []


def test_a_damaged_version_is_built_again(version: Path, outcome: Outcome, family: Family) -> None:
    (version / "experts" / "math" / "config.json").unlink()
    again = merged(family.recipe(router=router_of(family)))
    assert (again.new, again.version) == (True, outcome.version)
    assert Artifact(version).verify() == []


def test_a_version_with_a_flipped_byte_is_built_again(version: Path, outcome: Outcome, family: Family) -> None:
    pool = version / "pool-00001-of-00001.safetensors"
    raw = bytearray(pool.read_bytes())
    raw[-3] ^= 1
    pool.write_bytes(raw)
    again = merged(family.recipe(router=router_of(family)))
    assert (again.new, again.version) == (True, outcome.version)
    assert Artifact(version).verify() == []


def test_a_renamed_version_is_not_taken_for_done(version: Path, family: Family) -> None:
    version.rename(version.with_name("kept"))
    assert merged(family.recipe(router=router_of(family))).new
    assert Artifact(version.parent).path == version


@pytest.mark.parametrize("content", ["{", '{"version": "x"}', '{"version": "x", "sequence": "y"}'])
def test_a_damaged_latest_is_mended_by_the_next_run(version: Path, family: Family, content: str) -> None:
    (version.parent / LATEST).write_text(content)
    assert not merged(family.recipe(router=router_of(family))).new
    assert Artifact(version.parent).path == version
