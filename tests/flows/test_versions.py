from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

import pytest

import flows.retrain
import flows.run
from flows.retrain import retrain
from flows.run import Outcome
from pipeline.engine import Silent
from pipeline.recipe import load_recipe
from storage import publishing
from storage.artifact import Artifact
from storage.errors import OutputExistsError
from storage.layout import LATEST, MANIFEST
from storage.stores import Store
from tests.pipeline.test_invariants import router_of
from tests.support.running import command, merged
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


def test_a_report_is_written_and_its_figures_are_printed(family: Family, tmp_path: Path) -> None:
    recipe = family.recipe()
    assert command("run", recipe).returncode == 0
    version = Artifact(tmp_path / "output").path
    done = command("report", tmp_path / "output", tmp_path / "page.html")
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "page.html").read_bytes() == (version / "report.html").read_bytes()
    figures = json.loads(command("report", version, "--json").stdout)
    assert [one["name"] for one in figures["experts"]] == sorted(family.experts)
    refused = command("report", tmp_path / "nowhere", tmp_path / "other.html")
    assert (refused.returncode, (tmp_path / "other.html").exists()) == (2, False)


def test_an_earlier_version_becomes_the_latest_again(family: Family, tmp_path: Path) -> None:
    first = json.loads(command("run", family.recipe(), "--json").stdout)["version"]
    second = json.loads(command("run", family.recipe(), "--set", "merge.groups=3", "--json").stdout)["version"]
    output = tmp_path / "output"
    assert command("latest", output).stdout.strip() == second != first
    assert command("latest", output, "--set", first).stdout.strip() == first
    assert Artifact(output).manifest.version == first
    strange = command("latest", output, "--set", "0" * 16)
    assert strange.returncode == 2
    assert "is not an artifact" in strange.stderr
    (output / second / "experts" / "math" / "config.json").unlink()
    damaged = command("latest", output, "--set", second)
    assert damaged.returncode == 2
    assert "is not whole. Choose another version: experts/math/config.json" in damaged.stderr
    assert Artifact(output).manifest.version == first


class DeathError(Exception):
    """What ends a run."""


def test_a_run_that_died_before_it_could_say_so_is_spoken_for(
    family: Family, output: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it had published is new to the next run, and to that alone; so it is with a new router."""
    recipe = family.recipe(router=router_of(family), output=output.place)

    def die(*_: object, **__: object) -> NoReturn:
        raise DeathError

    with monkeypatch.context() as patch:
        patch.setattr(flows.run, "_outcome", die)
        with pytest.raises(DeathError):
            merged(recipe)
    assert len(output.children(".work")) == 2  # the version's, and what is unfinished
    found = [merged(recipe) for _ in range(2)]
    assert [one.new for one in found] == [True, False]
    assert {one.version for one in found} == {Artifact(output.place).manifest.version}
    assert len(output.children(".work")) == 1
    other, own = load_recipe(recipe, {"router.total": 200}), publishing.publish

    def publish(*arguments: Any) -> NoReturn:
        own(*arguments)
        raise DeathError

    with monkeypatch.context() as patch:
        patch.setattr(flows.retrain, "publish", publish)
        with pytest.raises(DeathError):
            retrain(other, found[0].version, Silent())
    anew = [retrain(other, found[0].version, Silent()) for _ in range(2)]
    assert [one.new for one in anew] == [True, False]
    assert {one.version for one in anew} == {Artifact(output.place).manifest.version} != {found[0].version}
    assert [name for name in output.children(".work") if not name.endswith(".version")] == []
