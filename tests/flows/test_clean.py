"""``channel-merge clean`` after real runs: what artifacts and runs need stays, so that nothing is ingested again."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from flows.cli import app
from flows.run import Outcome, prepare, workplace
from pipeline.engine import Silent
from pipeline.job import Job
from pipeline.recipe import load_recipe
from storage.artifact import Artifact
from storage.stores import open_store
from tests.support.places import BUCKET
from tests.support.running import command, merged
from tests.support.store_gateway import Gateway
from tests.support.tiny_experts import NAMES, Family

TIES = {"merge.method": "ties", "merge.density": 0.5, "merge.trim_scope": "tensor"}


def recipe_of(family: Family, *names: str, **changes: Any) -> Path:
    return family.recipe(experts={name: f"./{name}" for name in names}, **{**TIES, **changes})


def cleaned(recipe: Path, *options: str | int) -> dict[str, Any]:
    """The answer of the command, in this process: an object store may be one of this test's."""
    done = CliRunner().invoke(app, ["clean", str(recipe), "--json", *map(str, options)])
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def kinds(found: dict[str, Any]) -> list[str]:
    return sorted(one["kind"] for one in found["leftovers"])


def age(folder: Path, days: float = 30) -> None:
    """Let all runs have begun so long ago."""
    started = (datetime.now(UTC) - timedelta(days=days)).isoformat(timespec="seconds")
    for path in [*folder.glob("deltas/*/runs/*.json"), *folder.glob("*/.work/*/job.json")]:
        path.write_text(json.dumps({**json.loads(path.read_text()), "started": started}))


def check_nothing_is_lost(family: Family, outcome: Outcome, *names: str) -> None:
    """The artifact is whole, its recipe finds it, and other merges of its experts read none of them again."""
    assert Artifact(outcome.path).verify() == []
    assert merged(recipe_of(family, *names)).version == outcome.version
    for changes in ({"merge.groups": 1}, {"merge.metric": "euclidean"}):
        again = merged(recipe_of(family, *names, output="../again", **changes))
        assert again.manifest.moved["ingest read"] == 0
        assert again.manifest.moved["similarity read"] == 0
    shutil.rmtree(outcome.path.parent)
    assert merged(recipe_of(family, *names)).version == outcome.version


def test_a_swapped_expert_goes_with_its_artifact(family: Family, tmp_path: Path) -> None:
    first = merged(recipe_of(family, "chinese", "code", "instruct"))
    second = merged(recipe_of(family, "chinese", "code", "math"))
    math, instruct = second.manifest.experts["math"].id, first.manifest.experts["instruct"].id
    recipe = recipe_of(family, "chinese", "code", "math")
    age(tmp_path)
    assert kinds(cleaned(recipe, "--delete")) == []
    shutil.rmtree(first.path)
    found = cleaned(recipe)
    assert kinds(found) == ["expert", "run record", "tables", "thresholds", "version name"]
    (expert,) = [one for one in found["leftovers"] if one["kind"] == "expert"]
    files = [path for path in Path(expert["place"]).rglob("*") if path.is_file()]
    assert (Path(expert["place"]).name, expert["files"]) == (instruct, len(files))
    assert expert["bytes"] == sum(path.stat().st_size for path in files)
    assert not found["removed"]
    assert Path(expert["place"]).exists()
    done = cleaned(recipe, "--delete")
    assert done == {**found, "removed": True}
    assert not any(Path(one["place"]).exists() for one in done["leftovers"])
    assert any((tmp_path / "deltas").glob(f"*/{math}/complete.json"))
    check_nothing_is_lost(family, second, "chinese", "code", "math")


def test_runs_of_other_outputs_keep_what_they_have(family: Family, tmp_path: Path) -> None:
    """An artifact of another output, and a run of it within the days, and after them."""
    merged(recipe_of(family, "chinese", "code"))
    other = merged(recipe_of(family, "code", "instruct", "math", output="../other"))
    recipe = recipe_of(family, "chinese", "code")
    age(tmp_path)
    assert kinds(cleaned(recipe, "--delete")) == []
    shutil.rmtree(tmp_path / "other")
    age(tmp_path, days=3)
    assert kinds(cleaned(recipe, "--delete")) == []
    assert kinds(cleaned(recipe, "--days", 2)) == ["expert"] * 2 + ["run record", "tables"] + ["thresholds"] * 2
    assert cleaned(recipe, "--days", 2, "--delete")["removed"]
    again = merged(recipe_of(family, "code", "instruct", "math", output="../other"))
    assert again.version == other.version
    assert again.manifest.moved["ingest read"] > 0


def test_a_store_without_artifacts_is_emptied(family: Family, tmp_path: Path) -> None:
    outcome = merged(recipe_of(family, *NAMES))
    shutil.rmtree(outcome.path.parent)
    age(tmp_path)
    (tmp_path / "deltas" / "mine.txt").write_text("mine")
    found = cleaned(recipe_of(family, *NAMES), "--delete")
    assert kinds(found) == ["expert"] * 4 + ["run record", "tables"] + ["thresholds"] * 4
    assert [path.name for path in (tmp_path / "deltas").iterdir()] == ["mine.txt"]
    assert any("mine.txt is nothing of a delta store" in note for note in found["notes"])


def die_at_work(job: Job) -> None:
    with workplace(job, Silent()):
        job.staged.put("pool-00001-of-00001.safetensors", b"half")
        raise KeyboardInterrupt


def test_unfinished_runs(family: Family, tmp_path: Path) -> None:
    """One that died long ago, one that died now, and one that is still at work after all these days."""
    outcome = merged(recipe_of(family, "chinese", "code", **{"merge.groups": 1}))
    dead, busy = (prepare(load_recipe(recipe_of(family, *names))) for names in (("code", "math"), ("code", "instruct")))
    for job in (dead, busy):
        with pytest.raises(KeyboardInterrupt):
            die_at_work(job)
    recipe = recipe_of(family, "chinese", "code")
    assert kinds(cleaned(recipe)) == []
    age(tmp_path)
    merged(recipe_of(family, "instruct", "math", output="../other"))  # the experts of both are there
    shutil.rmtree(tmp_path / "other")
    age(tmp_path)
    recipe = recipe_of(family, "chinese", "code")
    program = (
        "import sys\nfrom storage.stores import open_store\n"
        "with open_store(sys.argv[1]).lock(sys.argv[2], lambda: None):\n    print('held', flush=True)\n    sys.stdin.read()\n"
    )
    line = [sys.executable, "-c", program, busy.output.place, busy.place_of_work]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        found = cleaned(recipe, "--delete")
        holder.communicate("")
    gone = {Path(one["place"]).name for one in found["leftovers"] if one["kind"] in ("expert", "unfinished run")}
    assert gone == {dead.inputs[:40], dead.experts["math"].id}
    assert any(busy.inputs[:40] in note and "a run holds its lock" in note for note in found["notes"])
    assert busy.staged.sizes()
    assert not dead.staged.sizes()
    after = cleaned(recipe, "--delete")
    assert {busy.inputs[:40], busy.experts["instruct"].id} <= {Path(one["place"]).name for one in after["leftovers"]}
    assert Artifact(outcome.path).verify() == []


def test_in_an_object_store(family: Family, gateway: Gateway) -> None:
    places = {"deltas": f"s3://{BUCKET}/team/deltas", "output": f"s3://{BUCKET}/team/output"}
    first = merged(recipe_of(family, "chinese", "code", "instruct", **places))
    second = merged(recipe_of(family, "code", "instruct", "math", **places))
    recipe = recipe_of(family, "code", "instruct", "math", **places)
    output = open_store(places["output"])
    output.clear(first.version)
    assert kinds(cleaned(recipe)) == ["version name"]
    found = cleaned(recipe, "--days", 0, "--delete")
    assert kinds(found) == ["expert", "run record", "tables", "thresholds", "version name"]
    assert all(one["place"].startswith(f"s3://{BUCKET}/team/") for one in found["leftovers"])
    assert Artifact(f"{places['output']}@{second.version}").verify() == []
    again = merged(
        recipe_of(family, "code", "instruct", "math", **{**places, "output": f"s3://{BUCKET}/again", "merge.groups": 1})
    )
    assert again.manifest.moved["ingest read"] == 0
    assert kinds(cleaned(recipe_of(family, *NAMES, **places), "--days", 0)) == []


def test_the_command_needs_places_alone(family: Family, tmp_path: Path) -> None:
    """The sources are gone, and what is merged is no recipe any more."""
    outcome = merged(recipe_of(family, "chinese", "code", "math"))
    shutil.rmtree(outcome.path.parent)
    text = recipe_of(family, "chinese", "code", **{"merge.groups": 9}, deltas="elsewhere").read_text()
    (tmp_path / "recipe.yaml").write_text(text)
    shutil.rmtree(family.folder)
    places = ("--set", f"deltas={tmp_path / 'deltas'}", "--output", tmp_path / "x")
    line: list[str | Path] = ["clean", tmp_path / "recipe.yaml", *places, "--days", "0"]
    shown = command(*line)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.rstrip().endswith("dry run: nothing was removed; add --delete")
    rows = [one for one in shown.stdout.splitlines() if str(tmp_path / "deltas") in one and not one.startswith("note")]
    assert len(rows) == 3 + 3 + 1 + 1
    assert all(" no artifact has " in row or "its run began" in row for row in rows)
    done = command(*line, "--delete")
    assert done.returncode == 0
    assert done.stdout.rstrip().endswith(": removed")
    assert list((tmp_path / "deltas").iterdir()) == []
    assert command(*line).stdout.rstrip().endswith("nothing to remove")


def test_places_that_cannot_be_meant_are_an_error(family: Family) -> None:
    found = command("clean", family.recipe(output="s3://"), "--json")
    assert found.returncode == 2
    assert "output: no bucket" in json.loads(found.stdout)["problems"][0]
