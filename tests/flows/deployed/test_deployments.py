"""The deployments on a real server with a real worker: what they publish, show and log, and what they refuse."""

from __future__ import annotations

import json
import re
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prefect.flows import Flow, load_flow_from_entrypoint

from flows.run import job_record
from pipeline.recipe import load_recipe
from storage.artifact import Artifact
from storage.stores import open_store
from tests.flows.deployed.conftest import LINKS
from tests.flows.deployed.test_recipes import PROMISED
from tests.support.prefect_server import POOL, ROOT, Document, Prefect, until

pytestmark = pytest.mark.server

EXPERTS = ("chinese", "code", "math", "prose")
INGESTS = {f"ingest {name}" for name in EXPERTS}
STEPS = {"resolve", "plan", *INGESTS, "queries", "similarity", "merge", "pack", "router", "report", "publish"}
STAGES = ("ingest", "similarity", "merge", "pack")
"""Those that are many blocks, and have a progress artifact."""


def versions(prefect: Prefect, name: str = "tiny") -> set[str]:
    """Versions of a recipe that are on the disk."""
    return {path.parent.name for path in (prefect.store / "artifacts" / name).glob("*/manifest.json")}


def latest(prefect: Prefect, name: str = "tiny") -> Artifact:
    return Artifact(str(prefect.store / "artifacts" / name))


def links(text: str) -> dict[str, str]:
    """What is linked in a text -> where a browser would find it."""
    lines = [line for line in text.splitlines() if "](" in line]
    return {line.removeprefix("- ").partition(":")[0]: line.partition("](")[2].rstrip(")") for line in lines}


def span(task: Document) -> tuple[datetime, datetime]:
    return datetime.fromisoformat(task["start_time"]), datetime.fromisoformat(task["end_time"])


def test_all_deployments_are_there(prefect: Prefect) -> None:
    found = {f"{one['flow']}/{one['name']}": one for one in _deployments(prefect)}
    assert found.keys() == PROMISED
    schedules = {name: [(s["schedule"]["cron"], s["active"]) for s in one["schedules"]] for name, one in found.items()}
    assert {name: crons for name, crons in schedules.items() if crons} == {
        "merge/mistral-4x": [("0 3 * * 1", True)],  # weekly
        "clean/mistral-4x": [("0 12 1 * *", True)],
    }
    for name, one in found.items():
        assert one["work_pool_name"] == POOL
        assert "channel-merging" in one["tags"], "what automations look for"
        assert not one["pull_steps"], "no folder of the machine that deployed"
        assert one["global_concurrency_limit"] is None, "its lease would end runs when the server is started anew"
        flow: Flow[..., Any] = load_flow_from_entrypoint(one["entrypoint"])
        assert (flow.name, bool(flow.description)) == (name.split("/")[0], True)


def _deployments(prefect: Prefect) -> list[Document]:
    flows = {flow["id"]: flow["name"] for flow in prefect.ask("/flows/filter")}
    return [{**one, "flow": flows[one["flow_id"]]} for one in prefect.ask("/deployments/filter")]


def test_schedules_make_runs(prefect: Prefect) -> None:
    """The server's scheduler knows when the next ones are due."""
    until(lambda: prefect.runs_of("merge/mistral-4x"), lambda: f"scheduled runs\n{prefect.tail('server')}")
    found = prefect.runs_of("merge/mistral-4x")
    assert {one["state_name"] for one in found} == {"Scheduled"}
    due = [datetime.fromisoformat(one["expected_start_time"]) for one in found]
    assert all((one.weekday(), one.hour, one.minute) == (0, 3, 0) for one in due)


def test_a_run_publishes_the_recipes_artifact(prefect: Prefect, first: str) -> None:
    found = prefect.flow_run(first)
    assert (found["name"], found["run_count"]) == ("tiny", 1)
    artifact = Artifact(str(prefect.store / "artifacts" / "tiny"))
    assert artifact.verify() == []
    assert artifact.manifest.recipe["merge"]["groups"] == 3
    assert set(artifact.manifest.experts) == set(EXPERTS)


def test_its_steps_are_task_runs(prefect: Prefect, first: str) -> None:
    tasks = prefect.task_runs(first)
    assert tasks.keys() == STEPS
    assert len(tasks) <= 15
    assert {task["state_name"] for task in tasks.values()} == {"Completed"}
    for task in tasks.values():
        assert set(task["tags"]) >= {"channel-merging"}
        assert task["run_count"] == 1


def test_the_limit_of_downloads_holds_and_does_not_deadlock(prefect: Prefect, first: str) -> None:
    """Waves need all experts; the limit is one. What the server saw of it is told by its events."""

    def seen() -> list[str]:
        asked = {"event": {"prefix": ["prefect.concurrency-limit."]}}
        events = prefect.ask("/events/filter", filter=asked, limit=50)["events"]
        own = [one for one in events if one["resource"].get("prefect.resource.name") == "download"]
        told = [one["event"].rpartition(".")[2] for one in sorted(own, key=lambda one: str(one["occurred"]))]
        return [what for what in told if what in ("acquired", "released")]

    until(lambda: seen().count("released") >= len(EXPERTS), lambda: f"downloads\n{seen()}\n{prefect.told(first)}")
    assert seen()[: 2 * len(EXPERTS)] == ["acquired", "released"] * len(EXPERTS)
    assert all(task["state_name"] == "Completed" for name, task in prefect.task_runs(first).items() if name in INGESTS)


def test_the_plan_and_the_outcome_can_be_looked_at(prefect: Prefect, first: str) -> None:
    shown = prefect.artifacts(first)
    assert shown.keys() == {"tiny-plan", "tiny-outcome", *(f"tiny-{stage}" for stage in STAGES)}
    plan = json.loads(shown["tiny-plan"]["data"])
    assert {row["policy"] for row in plan} == {"private", "merge, K=3"}
    assert "model.layers.*.mlp.up_proj.weight" in {row["tensor"] for row in plan}
    assert all(name in shown["tiny-plan"]["description"] for name in EXPERTS)
    assert all((shown[f"tiny-{stage}"]["type"], shown[f"tiny-{stage}"]["data"]) == ("progress", 100) for stage in STAGES)
    text = shown["tiny-outcome"]["data"]
    version = latest(prefect).manifest.version
    assert f"`{version}`" in text
    assert "**published**" in text
    assert all(f"| {name} |" in text for name in EXPERTS)


def test_links_lead_to_version_and_report_by_the_address_that_a_secret_holds(prefect: Prefect, first: str) -> None:
    """The work pool's template has ``{{ prefect.blocks.secret.links }}`` in its environment."""
    found = links(prefect.artifacts(first)["tiny-outcome"]["data"])
    assert found.keys() == {"version", "report"}
    for place in found.values():
        assert place.startswith(f"{LINKS}/artifacts/tiny/")
        assert (prefect.store / place.removeprefix(f"{LINKS}/")).is_file()


def test_logs_say_expert_and_layer(prefect: Prefect, first: str) -> None:
    tasks = prefect.task_runs(first)
    told = {name: prefect.logs(first, task["id"]) for name, task in tasks.items()}
    place = r"(model\.layers\.\d+|model\.\w+|lm_head)"
    for name in EXPERTS:
        assert any(re.match(rf"ingest: \d+ of \d+ blocks, last {name} {place}", line) for line in told[f"ingest {name}"]), told
    assert any(re.match(rf"merge: \d+ of \d+ blocks, last {place}", line) for line in told["merge"]), told["merge"]
    assert not any("distributed." in line for line in prefect.tail("worker", 10_000).splitlines())


def test_a_second_run_publishes_nothing(prefect: Prefect, first: str) -> None:
    before = versions(prefect)
    run = prefect.run("merge/tiny", groups=3)
    prefect.wait(run)
    assert versions(prefect) == before
    version = prefect.artifacts(first)["tiny-outcome"]["data"].split("`")[1]
    prefect.logged(run, f"nothing changed: version {version} is already at")
    assert "nothing was published" in prefect.artifacts(run)["tiny-outcome"]["data"]
    assert prefect.task_runs(run).keys() == {"resolve"}


def test_what_is_wrong_with_parameters_ends_a_run_at_once(prefect: Prefect) -> None:
    places: dict[str, Any] = {"output": str(prefect.folder / "wrong-output"), "deltas": str(prefect.folder / "wrong-deltas")}
    wrong: dict[str, dict[str, Any]] = {
        "merge.groups: expected at most 4, the number of experts, got 9": {"groups": 9},
        "merge.method": {"method": "averaging"},
        "did you mean 'groups'": {"settings": {"merge.goups": 3}},
        "one of codellama-3x, mistral-4x, tiny": {"recipe": "unheard-of"},
    }
    runs = {message: prefect.run("merge/tiny", **places, **parameters) for message, parameters in wrong.items()}
    for message, run in runs.items():
        found = prefect.wait(run, "Failed")
        assert (found["run_count"], found["empirical_policy"]["retries"]) == (1, 0)
        assert "RecipeError" in found["state"]["message"]
        assert message in found["state"]["message"]
        prefect.logged(run, "the input is wrong, and no retry makes it right")
        assert prefect.task_runs(run) == {}
    assert not any(Path(place).exists() for place in places.values())


def test_parameters_of_another_type_are_refused_by_the_server(prefect: Prefect) -> None:
    (deployment,) = (one for one in _deployments(prefect) if (one["flow"], one["name"]) == ("merge", "tiny"))
    answer = httpx.post(
        f"{prefect.api}/deployments/{deployment['id']}/create_flow_run", json={"parameters": {"density": "much"}}, timeout=30
    )
    assert answer.status_code == 409, answer.text
    assert "density" in answer.text


def test_a_new_router_is_a_version_that_shares_its_weights(prefect: Prefect, first: str) -> None:
    old = latest(prefect)
    tiny = load_recipe(ROOT / "flows" / "recipes" / "tiny.yaml")
    more = prefect.folder / "math.jsonl"
    query = json.dumps({"text": "What is the integral of x squared from zero to three?"})
    queries = {name: source.source for name, (source,) in tiny.router.queries.items()}
    more.write_text(Path(queries["math"]).read_text("utf-8").rstrip("\n") + f"\n{query}\n", "utf-8")
    run = prefect.run("train-router/tiny", settings={"router.queries": {**queries, "math": str(more)}})
    prefect.wait(run)
    new = latest(prefect)
    assert new.manifest.version != old.manifest.version
    assert new.verify() == []
    pools = [name for name in new.manifest.files if name.startswith("pool-")]
    assert pools
    for name in pools:
        paths = [prefect.store / "artifacts" / "tiny" / one.manifest.version / name for one in (old, new)]
        assert paths[0].samefile(paths[1]), "a hard link, not a copy"
    assert prefect.task_runs(run).keys() == {"resolve", "queries", "router", "report", "publish"}
    assert "**published**" in prefect.artifacts(run)["tiny-outcome"]["data"]
    before = versions(prefect)
    after = prefect.run("merge/tiny", groups=3)
    prefect.wait(after)
    assert versions(prefect) == before
    assert latest(prefect).manifest.version == new.manifest.version
    assert "nothing was published" in prefect.artifacts(after)["tiny-outcome"]["data"]


def test_a_sweep_compares_its_candidates_in_a_table(prefect: Prefect, first: str) -> None:
    """As it is deployed: two K, two methods; the recipe's own versions stay what they are."""
    before, current = versions(prefect), latest(prefect).manifest.version
    run = prefect.run("sweep/tiny")
    prefect.wait(run)
    shown = prefect.artifacts(run)
    assert shown.keys() == {"tiny-sweep", "tiny-candidates"}
    assert (shown["tiny-sweep"]["type"], shown["tiny-sweep"]["data"]) == ("progress", 100)
    rows = json.loads(shown["tiny-candidates"]["data"])
    labels = ["k1-task_arithmetic", "k1-dare-0.7", "k2-task_arithmetic", "k2-dare-0.7"]
    assert [row["candidate"] for row in rows] == labels
    assert prefect.task_runs(run).keys() == set(labels)
    for row in rows:
        artifact = latest(prefect, f"tiny-sweep/{row['candidate']}")
        assert (artifact.manifest.version, artifact.verify()) == (row["version"], [])
        assert row["share of parameters"] == round(artifact.manifest.parameters.ratio, 4)
        assert row["errors"].count(",") == len(EXPERTS) - 1
    assert rows[0]["share of parameters"] < rows[2]["share of parameters"]
    assert (versions(prefect), latest(prefect).manifest.version) == (before, current)


def test_leftovers_are_listed_and_removed_where_asked(prefect: Prefect, first: str) -> None:
    place = latest(prefect).store.place.rpartition("/")[0]
    record = job_record("tiny", open_store(place), str(latest(prefect).manifest.base["id"]), [])
    left = Path(place) / ".work" / ("0123456789" * 4)
    (left / "staged").mkdir(parents=True)
    (left / "staged" / "pool-00001-of-00001.safetensors").write_bytes(bytes(1000))
    (left / "job.json").write_text(json.dumps({**json.loads(record), "started": "2020-01-01T00:00:00+00:00"}))
    before = versions(prefect)
    runs = []
    for delete in (False, True):
        run = prefect.run("clean/mistral-4x", recipe="tiny", days=1, delete=delete)
        prefect.wait(run)
        runs.append(json.loads(prefect.artifacts(run)["tiny-leftovers"]["data"]))
        assert (left / "staged").exists() != delete
    assert any(str(left) in row["place"] for row in runs[0]), runs
    assert runs[0] == runs[1]
    assert versions(prefect) == before
    assert latest(prefect).verify() == []


def test_the_file_says_what_the_server_has(prefect: Prefect) -> None:
    """Parameters, as they were registered."""
    said = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
    flows = {one["entrypoint"]: load_flow_from_entrypoint(one["entrypoint"]).name for one in said}
    expected = {f"{flows[one['entrypoint']]}/{one['name']}": one["parameters"] for one in said}
    assert {f"{one['flow']}/{one['name']}": one["parameters"] for one in _deployments(prefect)} == expected
