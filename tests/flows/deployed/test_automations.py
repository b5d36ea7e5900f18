"""What happens on its own: a new version is evaluated, a run that failed is told of."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from flows.deployed.events import PUBLISHED, RESOURCE
from storage.artifact import Artifact
from tests.flows.deployed.conftest import Receiver
from tests.support.prefect_server import ROOT, Prefect, until

pytestmark = pytest.mark.server

FOLDER = ROOT / "infra" / "automations"


def known(prefect: Prefect) -> dict[str, str]:
    """Name -> id."""
    return {one["name"]: one["id"] for one in prefect.ask("/automations/filter")}


def test_they_are_made_once_however_often_the_server_is_told(prefect: Prefect, tmp_path: Path) -> None:
    before = known(prefect)
    paths = list(FOLDER.glob("*.yaml"))
    assert before.keys() == {yaml.safe_load(path.read_text())["name"] for path in paths}
    document = yaml.safe_load((FOLDER / "notify-on-failure.yaml").read_text())
    (tmp_path / "changed.yaml").write_text(yaml.safe_dump({**document, "description": "changed"}))
    for path in (tmp_path / "changed.yaml", FOLDER / "notify-on-failure.yaml"):
        assert prefect.command("python", FOLDER / "create.py", path) == f"{document['name']}: updated\n"
        (found,) = (one for one in prefect.ask("/automations/filter") if one["name"] == document["name"])
        assert found["description"] == yaml.safe_load(path.read_text())["description"]
    assert known(prefect) == before


def test_what_is_not_there_is_named(prefect: Prefect, tmp_path: Path) -> None:
    document = yaml.safe_load((FOLDER / "evaluate-new-version.yaml").read_text())
    document["actions"][0]["deployment_id"] = "evaluate/unheard-of"
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(document))
    with pytest.raises(AssertionError, match=r"other\.yaml: evaluate/unheard-of is not there"):
        prefect.command("python", FOLDER / "create.py", tmp_path / "other.yaml")


def test_a_file_with_ids_is_good_for_prefects_own_command(prefect: Prefect, tmp_path: Path) -> None:
    document = yaml.safe_load((FOLDER / "notify-on-failure.yaml").read_text())
    (block,) = (one for one in prefect.ask("/block_documents/filter") if one["name"] == "channel-merging")
    document["actions"][0]["block_document_id"] = block["id"]
    document |= {"name": "by hand", "enabled": False}
    (tmp_path / "by-hand.yaml").write_text(yaml.safe_dump(document))
    prefect.command("prefect", "automation", "create", "--from-file", tmp_path / "by-hand.yaml")
    assert "by hand" in known(prefect)
    prefect.command("prefect", "automation", "delete", "by hand")


def test_a_new_version_is_evaluated(prefect: Prefect, first: str) -> None:
    """The event carries what the evaluation takes."""
    events = {"event": {"name": [PUBLISHED]}, "resource": {"id": [f"{RESOURCE}.tiny"]}}
    until(lambda: prefect.ask("/events/filter", filter=events)["events"], lambda: "the event")
    event = prefect.ask("/events/filter", filter=events)["events"][-1]
    version = prefect.artifacts(first)["tiny-outcome"]["data"].split("`")[1]
    assert event["payload"]["artifact"] == f"{prefect.store}/artifacts/tiny@{version}"
    assert (event["payload"]["version"], event["resource"][f"{RESOURCE}.version"]) == (version, version)
    assert f"prefect.flow-run.{first}" in {one["prefect.resource.id"] for one in event["related"]}
    until(lambda: prefect.runs_of("evaluate/tiny"), lambda: "a run of evaluate/tiny")
    run = prefect.runs_of("evaluate/tiny")[-1]
    assert run["parameters"] == {"artifact": event["payload"]["artifact"], "texts": str(prefect.folder / "texts")}
    prefect.wait(run["id"])
    assert prefect.task_runs(run["id"]).keys() == {"verify", "measure"}
    shown = prefect.artifacts(run["id"])["tiny-evaluation"]
    rows = {row["expert"]: row for row in json.loads(shown["data"])}
    assert rows.keys() == Artifact(event["payload"]["artifact"]).manifest.experts.keys()
    assert all(float(row["expert alone"]) < float(row["rebuilt"]) for row in rows.values()), rows
    assert version in shown["description"]
    # further versions of these tests need no evaluation
    prefect.command("prefect", "automation", "pause", "evaluate new versions of tiny")


def test_a_run_that_failed_is_told_of(prefect: Prefect, chat: Receiver) -> None:
    run = prefect.run("merge/tiny", groups=9)
    found = prefect.wait(run, "Failed")
    until(lambda: [one for one in chat.posted if run in one["text"]], lambda: f"a message of {run}, got {chat.posted}")
    (message,) = (one["text"] for one in chat.posted if run in one["text"])
    title, *_ = message.splitlines()
    assert title == "merge tiny: Failed"
    assert found["state"]["message"] in message
    assert f"/runs/flow-run/{run}" in message
