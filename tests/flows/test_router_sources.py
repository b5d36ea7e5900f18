"""Whole runs whose router learns from several sources, a data set on the Hub among them."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, NoReturn

import pytest

from pipeline.stages.intake import Intake
from router_training.opening import CHECKED_ROWS
from storage.artifact import Artifact
from storage.errors import ChannelMergingError, QueryDataError
from storage.stores import Store
from tests.pipeline.test_invariants import router_of
from tests.support.hub_server import HubServer
from tests.support.query_sources import questions
from tests.support.running import merged
from tests.support.tiny_experts import Family

NAME = "org/sums"


def publish(hub: HubServer, folder: Path, texts: list[str]) -> str:
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps({"query": text}) + "\n" for text in texts))
    return hub.add_repo(f"datasets/{NAME}", folder)


def router(family: Family) -> dict[str, Any]:
    found = router_of(family)
    (family.folder / "far.txt").write_text("\n".join(f"a far away matter {i}" for i in range(70)))
    local = found["queries"]["math"]
    found["queries"]["math"] = [local, {"source": NAME, "column": "query", "language": "en"}]
    return found | {"outside": "./far.txt", "total": 400}


def test_a_version_says_which_commit_its_router_learned_from(family: Family, hub: HubServer, tmp_path: Path) -> None:
    commit = publish(hub, tmp_path / "first", questions("sum", 90))
    recipe = family.recipe(router=router(family), cluster={"kind": "none"})
    first = merged(recipe)
    assert Artifact(first.path).verify() == []
    config = json.loads((first.path / "router" / "router.json").read_bytes())
    (_, from_hub) = config["sources"]["math"]
    assert (from_hub["dataset"], from_hub["commit"], from_hub["rows"]) == (NAME, commit, 90)
    assert [spec["rows"] for spec in config["outside"]] == [70]
    assert sum(sum(counts.values()) for counts in config["counts"].values()) == 400
    written = (first.path / "router" / "router.json").read_text()
    assert str(tmp_path) not in written
    assert first.manifest.recipe["router"]["queries"]["math"][1]["source"] == f"{NAME}@{commit}"
    hub.forget()
    assert not merged(recipe).new
    assert not hub.asked("GET .*train.jsonl")  # a run that finds nothing changed fetches nothing
    publish(hub, tmp_path / "second", questions("sum", 95))
    second = merged(recipe)
    assert second.new
    assert second.version != first.version
    assert not list(Path(second.path).parent.glob(".work/*/router"))


def test_a_data_set_that_is_not_there_is_met_before_anything_is_merged(family: Family, hub: HubServer) -> None:
    with pytest.raises(ChannelMergingError, match=r"expert math: data set org/sums: there is no such repository") as caught:
        merged(family.recipe(router=router(family), cluster={"kind": "none"}))
    assert caught.value.exit_code == 2
    assert not (family.folder.parent / "output").exists()


def test_rows_that_cannot_be_read_are_met_while_experts_come_in(
    family: Family, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They lie behind the first rows, which alone are looked at beforehand: while experts come in they are found."""
    good = [{"query": text} for text in questions("sum", 2 * CHECKED_ROWS)]
    (tmp_path / "first").mkdir()
    lines = [json.dumps(row) + "\n" for row in [*good, *[{"query": None}] * len(good)]]
    (tmp_path / "first" / "train.jsonl").write_text("".join(lines))
    hub.add_repo(f"datasets/{NAME}", tmp_path / "first")

    def wave(intake: Intake, *_: object) -> NoReturn:
        """An expert that comes in for as long as the run goes on."""
        while True:
            intake.engine.check()
            time.sleep(0.05)

    monkeypatch.setattr(Intake, "wave", wave)
    with pytest.raises(QueryDataError, match=r"and 1980 more rows of org/sums@\w+; a share of 0.01 may be bad") as caught:
        merged(family.recipe(router=router(family), cluster={"kind": "none"}))
    assert caught.value.exit_code == 2


def test_what_was_prepared_is_taken_up_by_the_next_run(
    family: Family, hub: HubServer, tmp_path: Path, output: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training that is lost to the machine goes on: the data set is not streamed again."""
    publish(hub, tmp_path / "first", questions("sum", 90))
    recipe = family.recipe(router=router(family), cluster={"kind": "none"}, output=output.place)

    def lost(*_: object, **__: object) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as broken:
        broken.setattr("router_training.linear.train", lost)
        with pytest.raises(OSError, match="no space left"):
            merged(recipe)
    hub.forget()
    assert merged(recipe).new
    assert not hub.asked("GET .*train.jsonl")
    assert [key for key in output.sizes(".work") if "queries" in key] == []
